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
	overlapBitBits    = 2  // clusters of one bit of the cache: 4
	overlapBlockBits  = 8  // no fragment crosses a multiple of this: 256 clusters
	overlapWindowBits = 14 // a window, the unit of the cache: 16384 clusters
	overlapGroupBits  = 19 // a group, the unit of the directory: 32 windows
)

const (
	overlapGroupWindows = 1 << (overlapGroupBits - overlapWindowBits) // windows of a group
	overlapWindowMask   = 1<<overlapWindowBits - 1
	overlapGroupMask    = 1<<overlapGroupBits - 1
)

// Bounds of memory, and what its pieces take, in bytes. What Go allocates is counted, not what was asked for.
const (
	overlapDefaultCache = 256_000     // 477 windows: 7.8 million clusters
	overlapDefaultList  = 64 << 20    // some 30 million tables of one cluster
	overlapGroupBytes   = 224         // an overlapGroup, without its words
	overlapDenseBytes   = 768 + 48    // an overlapDense, without its words, and its place in the map
	overlapSlotBytes    = 8 + 16 + 48 // an overlapSlot without its bitmap, what Go adds to its size, and its place
	overlapBitmapBytes  = 512         // an overlapBitmap
	overlapEditBytes    = 2048        // what an overlapEdit keeps at most
	overlapFilterMin    = 4 << 10     // bits of an overlapFilter
	overlapFilterMax    = 1 << 20     // bits of an overlapFilter
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
// Of windows in use there is a bitmap besides, with a bit set for each four clusters of which one is of any kind. It
// answers the question of nearly every host write, whether it hits nothing, by one or two words, without a lock and
// without allocating. The same holds for windows without a fragment. Every other query looks the fragments up
// under a mutex, by binary search.
//
// A query that begins after enter or remove returned sees what it did. One that runs beside it sees each cluster
// as it was before or as it is after.
//
// The memory is bounded, whatever the image claims. What does not fit in listBytes is suspect: a filter of fixed
// size remembers which clusters are, or that all are, and a query that meets a suspect cluster asks scan. So the
// list becomes slower, and never weaker. A cluster stays suspect for good; that costs a scan, not an answer.
type overlapList struct {
	clusterBits uint                          // immutable
	seed        uint64                        // odd; hashes, so that no image can be made for many collisions; immutable
	slots       []atomic.Pointer[overlapSlot] // the cache, from the front; written under mu
	limit       int64                         // bytes for all but the cache and the filter; immutable
	filterBytes int64                         // bytes for the filter; a power of two; immutable

	// scan finds metadata in the tables themselves: the kinds of the n clusters from cluster first on, and
	// the first cluster that is of any. What it cannot read, it reports as overlapAllKinds. It is called by
	// query only, with no lock of the list held, and must know a table before enter is called for it and until
	// remove is. Set before the first query; immutable then.
	scan func(first, n uint64) (OverlapKinds, uint64)

	directory atomic.Pointer[overlapDirectory] // never nil; written under mu
	filter    atomic.Pointer[overlapFilter]    // nil while everything fits; written once, under mu

	_ [64]byte // keeps the line that misses write away from what every query reads

	mu        sync.Mutex
	dense     map[uint64]*overlapDense // groups with too many words for one slice, by index; guarded by mu
	edit      overlapEdit              // guarded by mu
	taken     int                      // slots in use; they stay so; guarded by mu
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
	slots := max(1, min(o.cacheBytes/(overlapSlotBytes+overlapBitmapBytes), 65000))
	filter := max(overlapFilterMin, min(o.listBytes/16, overlapFilterMax))
	filter = 1 << (bits.Len64(uint64(filter)) - 1)
	l := &overlapList{
		clusterBits: clusterBits,
		seed:        rand.Uint64() | 1,
		slots:       make([]atomic.Pointer[overlapSlot], slots),
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
	if l.free(first, last) {
		return 0, 0
	}
	hit, c := l.search(first, last, mask)
	return hit, c << l.clusterBits
}

// free reports that the clusters from first to last are of no kind. It takes no lock; where it cannot tell, it
// says false.
//
// The filter is read after the windows, and written (dropLocked) before them: what moves from one to the other is
// seen in one of them.
func (l *overlapList) free(first, last uint64) bool {
	for c := first; c <= last; {
		end := min(last, c|overlapWindowMask)
		if g := l.group(c >> overlapGroupBits); g == nil {
			end = min(last, c|overlapGroupMask)
		} else if !l.freeInWindow(g, c, end) {
			return false
		}
		c = end + 1
	}
	f := l.filter.Load()
	return f == nil || !f.meets(first, last)
}

// freeInWindow is free for clusters of one window of g.
func (l *overlapList) freeInWindow(g *overlapGroup, first, last uint64) bool {
	w := first >> overlapWindowBits
	state := g.state(w)
	if state < overlapCached {
		return state == overlapEmpty
	}
	// While the bitmap is exchanged seq is odd, and afterwards it is another.
	s := l.slots[state-overlapCached].Load()
	seq := s.seq.Load()
	if seq&1 != 0 || s.window.Load() != w {
		return false
	}
	a, b := first&overlapWindowMask>>overlapBitBits, last&overlapWindowMask>>overlapBitBits
	i, j := a>>6, b>>6
	from, to := ^uint64(0)<<(a&63), ^uint64(0)>>(63-b&63)
	for ; i < j; i++ {
		if s.bitmap[i].Load()&from != 0 {
			return false
		}
		from = ^uint64(0)
	}
	if s.bitmap[i].Load()&from&to != 0 {
		return false
	}
	if s.used.Load() == 0 {
		s.used.Store(1)
	}
	return s.seq.Load() == seq
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
		cache:   int64(len(l.slots))*overlapSlotBytes + int64(l.taken)*overlapBitmapBytes,
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

// overlapBitmap has a bit set for each four clusters of a window of which one is of any kind. A bit for each cluster
// would send fewer queries to the fragments, but writes all over an image would find it in no cache of the
// processor: the bits of a GiB of 512-byte clusters take 64 KiB so.
type overlapBitmap [1 << (overlapWindowBits - overlapBitBits - 6)]atomic.Uint64

// overlapSlot is a place for a cached window.
type overlapSlot struct {
	seq    atomic.Uint32 // odd while another window takes the place; written under mu
	used   atomic.Uint32 // 1 when a query came since the hand of the clock did
	window atomic.Uint64 // index of the window; written under mu
	bitmap overlapBitmap // its bits; written under mu
}

// fill brings the bits of the clusters from first to last of the window, whose fragments are v, up to date. Each
// word changes at once, and only if it has to. Precondition: mu.
func (s *overlapSlot) fill(v overlapWords, first, last uint32) {
	const inWord = 64 << overlapBitBits // clusters of a word
	var words [len(s.bitmap)]uint64
	first, last = first&^(inWord-1), last|(inWord-1)
	it := v.iterate(first, last)
	for f, ok := it.next(); ok; f, ok = it.next() {
		for a, b := f.first>>overlapBitBits, (f.first+f.n-1)>>overlapBitBits; a <= b; {
			k := min(b-a+1, 64-a&63)
			words[a>>6] |= ^uint64(0) >> (64 - k) << (a & 63)
			a += k
		}
	}
	for i := first / inWord; i <= last/inWord; i++ {
		if p := &s.bitmap[i]; p.Load() != words[i] {
			p.Store(words[i])
		}
	}
}

// missLocked notes a query of window w of g, which is not cached, and may cache it: at once while there is room.
// Afterwards one miss in many is looked at, and the window of two such misses in a row takes the place of another.
// A few windows that are in use get there soon; queries all over more windows than there is room for, which
// no choice would serve, seldom spend time on bitmaps. Precondition: mu.
func (l *overlapList) missLocked(g *overlapGroup, w uint64) {
	if l.taken < len(l.slots) {
		l.taken++
		l.slots[l.taken-1].Store(new(overlapSlot))
		l.cacheLocked(l.taken-1, g, w)
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
	for range 2 * len(l.slots) {
		l.hand = (l.hand + 1) % len(l.slots)
		if l.slots[l.hand].Load().used.Swap(0) == 0 {
			break
		}
	}
	old := l.slots[l.hand].Load().window.Load()
	out := l.group(old / overlapGroupWindows)
	if v := l.wordsLocked(out, old); len(v.short)+len(v.long) > 0 {
		out.setState(old, overlapUncached)
	} else {
		out.setState(old, overlapEmpty)
	}
	l.cacheLocked(l.hand, g, w)
}

// cacheLocked makes slot i hold window w of g. Preconditions: mu; no state names the slot.
func (l *overlapList) cacheLocked(i int, g *overlapGroup, w uint64) {
	s := l.slots[i].Load()
	s.seq.Add(1)
	s.window.Store(w)
	s.fill(l.wordsLocked(g, w), 0, overlapWindowMask)
	s.seq.Add(1)
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
