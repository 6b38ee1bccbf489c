package qcow2

import (
	"fmt"
	"iter"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// OverlapKinds is a set of kinds of metadata clusters.
type OverlapKinds uint16

const (
	OverlapMainHeader      OverlapKinds = 1 << iota // the header's cluster (QCOW2_OL_MAIN_HEADER)
	OverlapActiveL1                                 // the L1 table of the disk (QCOW2_OL_ACTIVE_L1)
	OverlapActiveL2                                 // L2 tables that it names (QCOW2_OL_ACTIVE_L2)
	OverlapRefcountTable                            // the refcount table (QCOW2_OL_REFCOUNT_TABLE)
	OverlapRefcountBlock                            // refcount blocks (QCOW2_OL_REFCOUNT_BLOCK)
	OverlapSnapshotTable                            // the snapshot table (QCOW2_OL_SNAPSHOT_TABLE)
	OverlapInactiveL1                               // L1 tables of snapshots (QCOW2_OL_INACTIVE_L1)
	OverlapInactiveL2                               // L2 tables that those name (QCOW2_OL_INACTIVE_L2)
	OverlapBitmapDirectory                          // the bitmap directory (QCOW2_OL_BITMAP_DIRECTORY)
	OverlapCryptoHeader                             // the LUKS header of an encrypted image
)

// overlapAllKinds is the set of all kinds.
const overlapAllKinds = OverlapCryptoHeader<<1 - 1

// overlapKindNames are the names of the kinds, lowest bit first.
var overlapKindNames = [...]string{
	"header", "active L1 table", "active L2 table", "refcount table", "refcount block", "snapshot table",
	"inactive L1 table", "inactive L2 table", "bitmap directory", "crypto header",
}

// String names the kinds of the set, as in "active L2 table, inactive L2 table"; the empty set is "nothing".
func (k OverlapKinds) String() string {
	var names []string
	for i, name := range overlapKindNames {
		if k>>i&1 != 0 {
			names = append(names, name)
		}
	}
	if rest := k &^ overlapAllKinds; rest != 0 {
		names = append(names, fmt.Sprintf("unknown kinds %#x", uint16(rest)))
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}

// OverlapPreset names the kinds of metadata that host writes are checked against, as QEMU's option
// overlap-check does. Every kind costs the same here, so the default is all of them.
type OverlapPreset int

const (
	// OverlapAll is every kind ("all"). The default.
	OverlapAll OverlapPreset = iota
	// OverlapCached is every kind but L2 tables of snapshots ("cached").
	OverlapCached
	// OverlapConstant is what does not move while a disk is written: header, active L1 table, refcount
	// table, snapshot table, bitmap directory and crypto header ("constant").
	OverlapConstant
	// OverlapNone is no kind: nothing is checked ("none").
	OverlapNone
)

// String returns QEMU's name of the preset.
func (p OverlapPreset) String() string {
	switch p {
	case OverlapAll:
		return "all"
	case OverlapCached:
		return "cached"
	case OverlapConstant:
		return "constant"
	case OverlapNone:
		return "none"
	}
	return fmt.Sprintf("OverlapPreset(%d)", int(p))
}

// kinds returns the kinds that the preset stands for. A preset that does not exist is all of them.
func (p OverlapPreset) kinds() OverlapKinds {
	const constant = OverlapMainHeader | OverlapActiveL1 | OverlapRefcountTable | OverlapSnapshotTable |
		OverlapBitmapDirectory | OverlapCryptoHeader
	switch p {
	case OverlapNone:
		return 0
	case OverlapConstant:
		return constant
	case OverlapCached:
		return constant | OverlapActiveL2 | OverlapRefcountBlock | OverlapInactiveL1
	}
	return overlapAllKinds
}

// The units of the list, as log2 of clusters.
const (
	overlapBitBits    = 2  // clusters of one bit of the cache, where there are bits: 4
	overlapBlockBits  = 8  // a block, 256 clusters: no fragment crosses its end, and the cache has a word for it
	overlapWindowBits = 14 // a window, the unit of the cache: 16384 clusters
	overlapGroupBits  = 19 // a group, the unit of the directory: 32 windows
)

const (
	overlapGroupWindows = 1 << (overlapGroupBits - overlapWindowBits) // windows of a group
	overlapBlockMask    = 1<<overlapBlockBits - 1
	overlapWindowMask   = 1<<overlapWindowBits - 1
	overlapGroupMask    = 1<<overlapGroupBits - 1
)

// Bounds of memory, and what its pieces take, in bytes. What Go allocates is counted, not what was asked for.
const (
	overlapDefaultCache = 256_000  // 470 windows: 7.7 million clusters
	overlapDefaultList  = 64 << 20 // some 30 million tables of one cluster
	overlapGroupBytes   = 224      // an overlapGroup, without its words
	overlapDenseBytes   = 768 + 48 // an overlapDense, without its words, and its place in the map
	overlapSlotBytes    = 32       // an overlapSlot without its map
	overlapMapBytes     = 512      // an overlapMap
	overlapEditBytes    = 2048     // what an overlapEdit keeps at most
	overlapFilterMin    = 4 << 10  // bits of an overlapFilter
	overlapFilterMax    = 1 << 20  // bits of an overlapFilter
)

// overlapGroupWords is how many words (of 2 bytes) the windows of a group hold in one slice at most: 32 KiB,
// so that the move behind an insertion stays short. An image of 512-byte clusters needs some 10000.
const overlapGroupWords = 16 << 10

// overlapSuspectRun is the largest number of clusters that are entered in the filter, or looked for in it, one by
// one. With a longer run everything is suspect, or the run is scanned as a whole.
const overlapSuspectRun = 4096

// overlapPromotion is how many misses there are to one that may exchange a cached window, once all slots are in use.
const overlapPromotion = 16

// overlapLimits bounds the memory of an overlapList. A field that is zero has its default.
type overlapLimits struct {
	cacheBytes int64 // cached windows; default 256 kB, minimum one window, maximum 65000 windows
	listBytes  int64 // everything else; default 64 MiB, minimum 6 KiB
}

// overlapList knows which host clusters hold metadata, and of which kinds; a cluster may be of several, as an
// L2 table is that the active L1 table shares with a snapshot. It knows nothing but host offsets, and does not
// decide what becomes of a hit (I8). It is safe for concurrent use.
//
// What holds is written in fragments, always and completely. A fragment is a run of clusters of the same kinds
// inside one block of 256 clusters. Nearly all metadata of an image is L2 tables and refcount blocks, one
// cluster each with data behind it, so a fragment of one such cluster is short, 2 bytes, and any other is long,
// 4 bytes. The fragments of a window are sorted, and those of the 32 windows of a group stand in one slice. So a
// TiB of 64 KiB clusters takes 13 kB, and one of 512-byte clusters 92 MB, of which the groups themselves are
// less than 8 bytes per window. Groups are found by a hash table, so that the size of an offset costs nothing.
//
// Of windows in use there is a map besides, which says of each block what is there: the fragments themselves where
// they are few, or else a bit for each four clusters. It answers nearly every host write, those of tables to their
// own place too, by one or two words, without a lock and without allocating. Most windows have their map in the slot
// of the cache that their index names, and are not even looked for. Windows without a fragment need no map to say so.
// Every other query looks the fragments up under a mutex, by binary search.
//
// A query that begins after enter or remove returned sees what it did. One that runs beside it sees each cluster
// as it was before or as it is after.
//
// The memory is bounded, whatever the image claims. What does not fit in listBytes is suspect: a filter of fixed
// size remembers which clusters are, or that all are, and a query that meets a suspect cluster asks scan. So the
// list becomes slower, and never weaker. A cluster stays suspect for good; that costs a scan, not an answer.
type overlapList struct {
	// What nearly every query reads, and no more, in one line of the processor's cache.
	clusterBits uint                          // immutable
	homes       uint64                        // the power of two from len(slots) on, less one; immutable
	slots       []overlapSlot                 // the cache
	filter      atomic.Pointer[overlapFilter] // nil while everything fits; written once, under mu

	directory   atomic.Pointer[overlapDirectory] // never nil; written under mu
	seed        uint64                           // odd; hashes, so that no image can be made for many collisions; immutable
	limit       int64                            // bytes for all but the cache and the filter; immutable
	filterBytes int64                            // bytes for the filter; a power of two; immutable

	// scan finds metadata in the tables themselves: the kinds of the n clusters from cluster first on, and
	// the first cluster that is of any. What it cannot read, it reports as overlapAllKinds. It is called by
	// query only, with no lock of the list held, and must know a table before enter is called for it and until
	// remove is. Set before the first query; immutable then.
	scan func(first, n uint64) (OverlapKinds, uint64)

	_ [64]byte // keeps the line that misses write away from what every query reads

	mu        sync.Mutex
	dense     map[uint64]*overlapDense // groups with too many words for one slice, by index; guarded by mu
	edit      overlapEdit              // guarded by mu
	taken     int                      // slots in use; they stay so; guarded by mu
	spare     int                      // slots from here on are in use; guarded by mu
	hand      int                      // of the clock that finds a window to exchange; guarded by mu
	misses    uint                     // counts them while all slots are in use; guarded by mu
	candidate uint64                   // window that is cached if another of these misses is its own; guarded by mu
	bytes     int64                    // memory but for the cache; guarded by mu
	fragments int64                    // their number; guarded by mu
	windows   int64                    // windows with a fragment; guarded by mu
}

// newOverlapList returns an empty list for an image with clusters of 2^clusterBits bytes.
func newOverlapList(clusterBits uint, o overlapLimits) *overlapList {
	if o.cacheBytes <= 0 {
		o.cacheBytes = overlapDefaultCache
	}
	if o.listBytes <= 0 {
		o.listBytes = overlapDefaultList
	}
	slots := int(max(1, min(o.cacheBytes/(overlapSlotBytes+overlapMapBytes), 65000)))
	filter := max(overlapFilterMin, min(o.listBytes/16, overlapFilterMax))
	filter = 1 << (bits.Len64(uint64(filter)) - 1)
	l := &overlapList{
		clusterBits: clusterBits,
		homes:       1<<bits.Len(uint(slots-1)) - 1,
		slots:       make([]overlapSlot, slots),
		spare:       slots,
		seed:        rand.Uint64() | 1,
		limit:       max(0, o.listBytes-filter-overlapEditBytes),
		filterBytes: filter,
	}
	d := newOverlapDirectory(8)
	l.directory.Store(d)
	l.bytes = d.bytes()
	return l
}

// clusters returns the first and the last cluster that the n bytes at host offset off touch. Preconditions: n > 0,
// off <= 2^56, n <= 2^40.
func (l *overlapList) clusters(off, n uint64) (first, last uint64) {
	return off >> l.clusterBits, (off + n - 1) >> l.clusterBits
}

// enter adds kinds to every cluster that the n bytes at host offset off touch.
// Preconditions: off <= 2^56, n <= 2^40.
func (l *overlapList) enter(kinds OverlapKinds, off, n uint64) {
	kinds &= overlapAllKinds
	if n == 0 || kinds == 0 {
		return
	}
	first, last := l.clusters(off, n)
	l.mu.Lock()
	defer l.mu.Unlock()
	// One fragment for each block is the least that the range can take.
	if int64((last-first)>>overlapBlockBits)*4 > l.limit {
		l.suspectLocked(first, last)
		return
	}
	for c := first; c <= last; {
		end := min(last, c|overlapWindowMask)
		if !l.changeLocked(c, end, kinds, 0) {
			if last-c >= overlapSuspectRun {
				end = last
			}
			l.suspectLocked(c, end)
		}
		c = end + 1
	}
}

// remove takes kinds away from every cluster that the n bytes at host offset off touch.
// Preconditions: off <= 2^56, n <= 2^40.
func (l *overlapList) remove(kinds OverlapKinds, off, n uint64) {
	if n == 0 || kinds == 0 {
		return
	}
	first, last := l.clusters(off, n)
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := first; c <= last; {
		end := min(last, c|overlapWindowMask)
		if l.group(c>>overlapGroupBits) == nil {
			end = min(last, c|overlapGroupMask)
		} else if !l.changeLocked(c, end, 0, kinds) {
			l.dropLocked(c, end)
		}
		c = end + 1
	}
}

// query returns which kinds in mask the clusters have that the n bytes at host offset off touch, and, if there
// are any, the host offset of the first such cluster. Preconditions: off <= 2^56, n <= 2^40.
func (l *overlapList) query(off, n uint64, mask OverlapKinds) (hit OverlapKinds, hitOff uint64) {
	if n == 0 || mask == 0 {
		return 0, 0
	}
	first, last := l.clusters(off, n)
	if first == last && l.freeOne(first) || l.free(first, last, mask) {
		return 0, 0
	}
	hit, c := l.search(first, last, mask)
	return hit, c << l.clusterBits
}

// freeOne reports that cluster c is of no kind, if one look at the map of its window tells so: the answer to most
// writes of guest data, in as few steps and lines of memory as can be. Where it cannot tell, it says false. It takes no
// lock.
func (l *overlapList) freeOne(c uint64) bool {
	w := c >> overlapWindowBits
	s := &l.slots[l.home(w)]
	tag := s.tag.Load()
	if tag>>overlapTagBits != w+1 || tag&overlapUsed == 0 {
		return false
	}
	word := s.words[c&overlapWindowMask>>overlapBlockBits].Load()
	switch c &= overlapBlockMask; {
	case word < overlapRunForm:
		// All fragments are compared at once: without its kinds each has 8 of its 10 bits, which are zero where it is
		// the cluster. The ninth bit, set before the subtraction, is lost where there is nothing else to borrow from.
		const ninth = 1 << overlapBlockBits * overlapFewOnes
		if other := word>>2&(overlapBlockMask*overlapFewOnes) ^ c*overlapFewOnes; word != 0 && ((other|ninth)-overlapFewOnes)&ninth != ninth {
			return false
		}
	case word < overlapCoarse:
		return false
	default:
		if lo, _ := overlapCoarseBits(c, c); word>>lo&1 != 0 {
			return false
		}
	}
	return s.tag.Load() == tag && l.filter.Load() == nil
}

// free reports that none of the clusters from first to last is of a kind in mask. It takes no lock; where it cannot
// tell, it says false.
//
// The filter is read after the windows, and written (dropLocked) before them: what moves from one to the other is
// seen in one of them.
func (l *overlapList) free(first, last uint64, mask OverlapKinds) bool {
	for c := first; c <= last; {
		end, w := min(last, c|overlapWindowMask), c>>overlapWindowBits
		s := &l.slots[l.home(w)]
		tag, ok := s.holds(w)
		if !ok {
			g := l.group(w / overlapGroupWindows)
			if g == nil {
				c = min(last, c|overlapGroupMask) + 1
				continue
			}
			switch state := g.state(w); state {
			case overlapEmpty:
				c = end + 1
				continue
			case overlapUncached:
				return false
			default:
				s = &l.slots[state-overlapCached]
			}
			if tag, ok = s.holds(w); !ok {
				return false
			}
		}
		if !s.words.free(c&overlapWindowMask, end&overlapWindowMask, mask) || !s.confirm(tag) {
			return false
		}
		c = end + 1
	}
	f := l.filter.Load()
	return f == nil || !f.meets(first, last)
}

// search is query by the fragments and, where clusters are suspect, by scan. It returns the first cluster that is
// of a kind in mask.
func (l *overlapList) search(first, last uint64, mask OverlapKinds) (hit OverlapKinds, at uint64) {
	for c := first; c <= last; {
		end := min(last, c|overlapWindowMask)
		if l.group(c>>overlapGroupBits) == nil {
			end = min(last, c|overlapGroupMask)
		} else if k, i := l.searchWindow(c, end, mask); k != 0 {
			if hit == 0 {
				at = i
			}
			hit |= k
		}
		c = end + 1
	}
	f := l.filter.Load()
	if f == nil {
		return hit, at
	}
	for c := first; c <= last; {
		end := f.suspects(c, last)
		if end > c {
			if k, i := l.scanFor(c, end-c, mask); k != 0 {
				if hit == 0 || i < at {
					at = i
				}
				hit |= k
			}
			c = end
		} else {
			c++
		}
	}
	return hit, at
}

// searchWindow is search by the fragments of one window. It may cache the window.
func (l *overlapList) searchWindow(first, last uint64, mask OverlapKinds) (hit OverlapKinds, at uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := first >> overlapWindowBits
	g := l.group(w / overlapGroupWindows)
	if g == nil {
		return 0, 0
	}
	from := uint32(first & overlapWindowMask)
	it := l.wordsLocked(g, w).iterate(from, uint32(last&overlapWindowMask))
	for f, ok := it.next(); ok; f, ok = it.next() {
		if k := f.kinds & mask; k != 0 {
			if hit == 0 {
				at = w<<overlapWindowBits | uint64(max(f.first, from))
			}
			hit |= k
		}
	}
	if g.state(w) == overlapUncached {
		l.missLocked(g, w)
	}
	return hit, at
}

// scanFor asks scan for kinds in mask on the n clusters from first on, and finds the first one that has any.
func (l *overlapList) scanFor(first, n uint64, mask OverlapKinds) (hit OverlapKinds, at uint64) {
	kinds, at := l.scan(first, n)
	hit = kinds & mask
	if hit == 0 || kinds == hit {
		return hit, at
	}
	// The cluster may be there for its other kinds: the range is halved until it has one cluster.
	end := first + n
	for end-at > 1 {
		middle := at + (end-at)/2
		if k, _ := l.scan(at, middle-at); k&mask != 0 {
			end = middle
		} else {
			at = middle
		}
	}
	return hit, at
}

// overlapMemory is the memory that an overlapList holds, in bytes, and for what.
type overlapMemory struct {
	list    int64 // fragments, groups, directory and filter
	cache   int64 // cached windows
	runs    int64 // fragments: runs of clusters of the same kinds, counted anew in each block of 256 clusters
	windows int64 // windows with a fragment
	suspect bool  // not everything fits
}

// memory returns what the list holds now.
func (l *overlapList) memory() overlapMemory {
	l.mu.Lock()
	defer l.mu.Unlock()
	return overlapMemory{
		list:    l.bytes + 2*int64(cap(l.edit.short)+cap(l.edit.long)),
		cache:   int64(len(l.slots))*overlapSlotBytes + int64(l.taken)*overlapMapBytes,
		runs:    l.fragments,
		windows: l.windows,
		suspect: l.filter.Load() != nil,
	}
}

// overlapRun is a run of clusters of the same kinds, as long as can be.
type overlapRun struct {
	first uint64 // cluster index
	n     uint64 // clusters
	kinds OverlapKinds
}

// runs iterates over the runs of metadata clusters in the order of the host file. Clusters that are suspect only
// are not among them. No lock is held while it yields; what changes meanwhile may be seen or not.
func (l *overlapList) runs() iter.Seq[overlapRun] {
	return func(yield func(overlapRun) bool) {
		var indexes []uint64
		d := l.directory.Load()
		for i := range d.cells {
			if g := d.cells[i].Load(); g != nil {
				indexes = append(indexes, g.index)
			}
		}
		slices.Sort(indexes)
		var run overlapRun
		var fragments []overlapFragment
		for _, index := range indexes {
			for w := index * overlapGroupWindows; w < (index+1)*overlapGroupWindows; w++ {
				fragments = l.windowFragments(fragments[:0], w)
				for _, f := range fragments {
					next := overlapRun{first: w<<overlapWindowBits | uint64(f.first), n: uint64(f.n), kinds: f.kinds}
					if run.n > 0 && next.first == run.first+run.n && next.kinds == run.kinds {
						run.n += next.n
						continue
					}
					if run.n > 0 && !yield(run) {
						return
					}
					run = next
				}
			}
		}
		if run.n > 0 {
			yield(run)
		}
	}
}

// windowFragments appends the fragments of window w to p.
func (l *overlapList) windowFragments(p []overlapFragment, w uint64) []overlapFragment {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.group(w / overlapGroupWindows)
	if g == nil {
		return p
	}
	it := l.wordsLocked(g, w).iterate(0, overlapWindowMask)
	for f, ok := it.next(); ok; f, ok = it.next() {
		p = append(p, f)
	}
	return p
}

// dropLocked makes the clusters from first to last of one window suspect, with all that is in the same fragments,
// and takes those away: so remove gets by without memory. Precondition: mu.
func (l *overlapList) dropLocked(first, last uint64) {
	w := first >> overlapWindowBits
	base := w << overlapWindowBits
	it := l.wordsLocked(l.group(w/overlapGroupWindows), w).iterate(uint32(first&overlapWindowMask), uint32(last&overlapWindowMask))
	for f, ok := it.next(); ok; f, ok = it.next() {
		first = min(first, base|uint64(f.first))
		last = max(last, base|uint64(f.first+f.n-1))
	}
	l.suspectLocked(first, last)
	l.changeLocked(first, last, 0, overlapAllKinds)
}

// suspectLocked makes the clusters from first to last suspect. Precondition: mu.
func (l *overlapList) suspectLocked(first, last uint64) {
	f := l.filter.Load()
	if f == nil {
		f = &overlapFilter{seed: l.seed, bits: make([]atomic.Uint64, l.filterBytes/8)}
		l.bytes += l.filterBytes
		defer l.filter.Store(f)
	}
	f.add(first, last)
}

// overlapMap says of each block of a window, in one word, which of its clusters are of any kind.
//
// Nearly all blocks, whatever the size of clusters, have few fragments or none, and those of the kinds that a short
// one can have; then the word has the fragments themselves. That is all there is to know, so that a table's own write
// is told from one that hits it.
//
//	0                            nothing
//	1 … 6 in bits 60 to 62       so many short fragments, 10 bits each: cluster in the block, kinds
//	7 in bits 60 to 62           up to three fragments, 18 bits each: first and last cluster in the block, kinds
//	1 in bit 63 (overlapCoarse)  a bit for each four clusters of which one is of any kind, and one for the last eight
//
// Places for fragments that there are not repeat the first, so that nobody has to count.
//
// It is a slice of overlapMapWords words: to index an array behind a pointer would first load a word of the array, to
// see that the pointer is not nil, and that is one line of memory more for each query.
type overlapMap []atomic.Uint64

// overlapMapWords is how many words an overlapMap has.
const overlapMapWords = 1 << (overlapWindowBits - overlapBlockBits)

// The bits of a word of an overlapMap.
const (
	overlapFew      = 6                                         // short fragments at most
	overlapFewBits  = 10                                        // of one: the lower bits of its word
	overlapFewOnes  = 1 | 1<<10 | 1<<20 | 1<<30 | 1<<40 | 1<<50 // the lowest bit of each
	overlapFewCount = overlapFew * overlapFewBits               // their number, from this bit on
	overlapRuns     = 3                                         // fragments of any length at most
	overlapRunBits  = 18                                        // of one
	overlapRunOnes  = 1 | 1<<18 | 1<<36                         // the lowest bit of each
	overlapRunForm  = 7 << overlapFewCount                      // says that there are such
	overlapCoarse   = 1 << 63                                   // says that there are bits
	overlapCoarseN  = 63                                        // bits
)

// overlapMapWord returns the word of a block with the given fragments.
func overlapMapWord(short, long []uint16) uint64 {
	word := uint64(0)
	switch {
	case len(short)+len(long) == 0:
		return 0
	case len(long) == 0 && len(short) <= overlapFew:
		for i, s := range short {
			word = overlapPut(word, uint64(s)&(1<<overlapFewBits-1), i, overlapFewBits, overlapFewOnes)
		}
		return word | uint64(len(short))<<overlapFewCount
	case len(short)+len(long)/2 <= overlapRuns && overlapAllShortKinds(long):
		i := 0
		put := func(f overlapFragment) {
			first := uint64(f.first & overlapBlockMask)
			kind := uint64(slices.Index(overlapShortKinds[:], f.kinds))
			word = overlapPut(word, first|(first+uint64(f.n)-1)<<8|kind<<16, i, overlapRunBits, overlapRunOnes)
			i++
		}
		overlapEach(short, long, put)
		return word | overlapRunForm
	}
	overlapEach(short, long, func(f overlapFragment) {
		lo, hi := overlapCoarseBits(uint64(f.first), uint64(f.first+f.n-1))
		word |= ^uint64(0) << lo & (1<<(hi+1) - 1)
	})
	return word | overlapCoarse
}

// overlapEach calls f with fragments that are given as words.
func overlapEach(short, long []uint16, f func(overlapFragment)) {
	for _, s := range short {
		f(shortFragment(s))
	}
	for i := 0; i < len(long); i += 2 {
		f(longFragment(long[i], long[i+1]))
	}
}

// overlapAllShortKinds reports whether all of the long fragments are of kinds that a short one can have.
func overlapAllShortKinds(long []uint16) bool {
	for i := 0; i < len(long); i += 2 {
		if !slices.Contains(overlapShortKinds[:], longFragment(long[i], long[i+1]).kinds) {
			return false
		}
	}
	return true
}

// overlapPut returns a word with value in place i, of a width in bits, and, if it is the first, in all others too.
// The lowest bits of all places are ones.
func overlapPut(word, value uint64, i, width int, ones uint64) uint64 {
	if i == 0 {
		return value * ones
	}
	return word&^((1<<width-1)<<(i*width)) | value<<(i*width)
}

// overlapCoarseBits returns the lowest and the highest bit of a coarse word that stand for the clusters from first to
// last of one block.
func overlapCoarseBits(first, last uint64) (lo, hi uint64) {
	lo, hi = first&overlapBlockMask>>overlapBitBits, last&overlapBlockMask>>overlapBitBits
	return min(lo, overlapCoarseN-1), min(hi, overlapCoarseN-1)
}

// overlapMapFree reports that none of the clusters from first to last of one block, which has the given word, is of a
// kind in mask. Where the word does not tell, it says false.
func overlapMapFree(word, first, last uint64, mask OverlapKinds) bool {
	first, last = first&overlapBlockMask, last&overlapBlockMask
	switch {
	case word == 0:
		return true
	case word < overlapRunForm:
		// All fragments are compared at once. Without its kinds a cluster has 8 of the 10 bits, and the ninth, set
		// before the subtraction, stays set unless there is something to borrow.
		const ninth = 1 << overlapBlockBits * overlapFewOnes
		clusters := word >> 2 & (overlapBlockMask * overlapFewOnes)
		behind := (clusters | ninth) - first*overlapFewOnes
		before := (last*overlapFewOnes | ninth) - clusters
		for hits := behind & before & ninth; hits != 0; hits &= hits - 1 {
			if overlapShortKinds[word>>(bits.TrailingZeros64(hits)-overlapBlockBits)&3]&mask != 0 {
				return false
			}
		}
		return true
	case word < overlapCoarse:
		for range overlapRuns {
			if word&overlapBlockMask <= last && word>>8&overlapBlockMask >= first && overlapShortKinds[word>>16&3]&mask != 0 {
				return false
			}
			word >>= overlapRunBits
		}
		return true
	}
	lo, hi := overlapCoarseBits(first, last)
	return word>>lo&(1<<(hi-lo+1)-1) == 0
}

// free reports that none of the clusters from first to last of the window is of a kind in mask. Where the words do not
// tell, it says false.
func (m overlapMap) free(first, last uint64, mask OverlapKinds) bool {
	for c := first; c <= last; c = c | overlapBlockMask + 1 {
		if !overlapMapFree(m[c>>overlapBlockBits].Load(), c, min(last, c|overlapBlockMask), mask) {
			return false
		}
	}
	return true
}

// fill brings the words of the clusters from first to last of the window, whose fragments are v, up to date. Each
// word changes at once, and only if it has to. Precondition: mu.
func (m overlapMap) fill(v overlapWords, first, last uint32) {
	first >>= overlapBlockBits
	short, long := v.searchShort(first<<overlapBlockBits), v.searchLong(first<<overlapBlockBits)
	for i := first; i <= last>>overlapBlockBits; i++ {
		end := (i + 1) << overlapBlockBits
		s, l := short, long
		for short < len(v.short) && uint32(v.short[short]>>2) < end {
			short++
		}
		for long < len(v.long) && longFragment(v.long[long], v.long[long+1]).first < end {
			long += 2
		}
		word := overlapMapWord(v.short[s:short], v.long[l:long])
		if p := &m[i]; p.Load() != word {
			p.Store(word)
		}
	}
}

// overlapSlot is a place for a cached window.
type overlapSlot struct {
	// tag says what the slot holds: from the lowest bit on, whether a query came since the hand of the clock did
	// (overlapUsed), how many windows it has held, modulo 2^29, and the index of the window plus one. It is 0
	// before the first window, and while another takes the place. Written under mu, but for overlapUsed.
	tag   atomic.Uint64
	words overlapMap // of the window; set under mu before the first tag is, and never again
}

const (
	overlapUsed    = 1  // bit of overlapSlot.tag
	overlapTagBits = 30 // of overlapSlot.tag, below the window
)

// holds reports whether the slot holds window w, and its tag.
func (s *overlapSlot) holds(w uint64) (tag uint64, ok bool) {
	tag = s.tag.Load()
	return tag, tag>>overlapTagBits == w+1
}

// confirm reports whether the slot has held the same window all the time since it had the given tag, and notes that a
// query came.
func (s *overlapSlot) confirm(tag uint64) bool {
	if tag&overlapUsed == 0 && s.tag.CompareAndSwap(tag, tag|overlapUsed) {
		return true
	}
	return s.tag.Load()|overlapUsed == tag|overlapUsed
}

// home returns the index of the slot that window w has unless it was in use. As many windows in a row as there are
// slots have different ones.
func (l *overlapList) home(w uint64) uint64 {
	i := w & l.homes
	if i >= uint64(len(l.slots)) {
		i -= (l.homes + 1) / 2
	}
	return i
}

// missLocked notes a query of window w of g, which is not cached, and may cache it: at once while there is room.
// Afterwards one miss in many is looked at, and the window of two such misses in a row takes the place of another.
// A few windows that are in use get there soon; queries all over more windows than there is room for, which
// no choice would serve, seldom spend time on maps. Precondition: mu.
func (l *overlapList) missLocked(g *overlapGroup, w uint64) {
	i := int(l.home(w))
	if l.taken < len(l.slots) {
		for ; l.slots[i].words != nil; i = l.spare {
			l.spare--
		}
		l.taken++
		l.slots[i].words = make(overlapMap, overlapMapWords)
		l.cacheLocked(i, g, w)
		return
	}
	l.misses++
	if l.misses%overlapPromotion != 0 {
		return
	}
	if l.candidate != w {
		l.candidate = w
		return
	}
	// The first round of the clock takes the marks away, so the second finds one, unless queries set them again;
	// then any will do.
	if l.slots[i].tag.Load()&overlapUsed != 0 {
		for range 2 * len(l.slots) {
			l.hand = (l.hand + 1) % len(l.slots)
			if l.slots[l.hand].tag.And(^uint64(overlapUsed))&overlapUsed == 0 {
				break
			}
		}
		i = l.hand
	}
	old := l.slots[i].tag.Load()>>overlapTagBits - 1
	out := l.group(old / overlapGroupWindows)
	if v := l.wordsLocked(out, old); len(v.short)+len(v.long) > 0 {
		out.setState(old, overlapUncached)
	} else {
		out.setState(old, overlapEmpty)
	}
	l.cacheLocked(i, g, w)
}

// cacheLocked makes slot i hold window w of g. Preconditions: mu; no state names the slot.
func (l *overlapList) cacheLocked(i int, g *overlapGroup, w uint64) {
	s := &l.slots[i]
	const held = 1<<overlapTagBits - 1
	tag := (w+1)<<overlapTagBits | ((s.tag.Load()|overlapUsed)+1)&held
	s.tag.Store(0)
	s.words.fill(l.wordsLocked(g, w), 0, overlapWindowMask)
	s.tag.Store(tag)
	g.setState(w, overlapCached+uint64(i))
}

// overlapFilter remembers clusters that are suspect, and takes others for suspect now and then (a Bloom filter with
// two hashes). It never forgets.
type overlapFilter struct {
	seed uint64          // immutable
	bits []atomic.Uint64 // a power of two; written under the list's mu
	all  atomic.Bool     // everything is suspect; written under the list's mu
}

// places returns the two bits of cluster c: words and masks.
func (f *overlapFilter) places(c uint64) (p, q *atomic.Uint64, bitP, bitQ uint64) {
	h := overlapHash(f.seed, c)
	i, j := h>>40, h>>16
	mask := uint64(len(f.bits) - 1)
	return &f.bits[i>>6&mask], &f.bits[j>>6&mask], 1 << (i & 63), 1 << (j & 63)
}

// add makes the clusters from first to last suspect. Precondition: the list's mu.
func (f *overlapFilter) add(first, last uint64) {
	if last-first >= overlapSuspectRun {
		f.all.Store(true)
		return
	}
	for c := first; c <= last; c++ {
		p, q, bitP, bitQ := f.places(c)
		p.Or(bitP)
		q.Or(bitQ)
	}
}

// suspects returns the cluster behind the run of suspect ones that begins with cluster c, at most last+1; c itself
// if it is not suspect. It takes no lock.
func (f *overlapFilter) suspects(c, last uint64) uint64 {
	if last-c >= overlapSuspectRun || f.all.Load() {
		return last + 1
	}
	for ; c <= last; c++ {
		p, q, bitP, bitQ := f.places(c)
		if p.Load()&bitP == 0 || q.Load()&bitQ == 0 {
			break
		}
	}
	return c
}

// meets reports whether any of the clusters from first to last is suspect. It takes no lock.
func (f *overlapFilter) meets(first, last uint64) bool {
	for c := first; c <= last; c++ {
		if f.suspects(c, last) > c {
			return true
		}
	}
	return false
}
