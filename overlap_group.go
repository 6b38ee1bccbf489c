package qcow2

import (
	"math/bits"
	"slices"
	"sync/atomic"
)

// overlapFragment is a run of clusters of the same kinds inside a block of 256 clusters, as long as can be there.
//
// As words it is short, one word of 14 bits cluster and 2 bits index into overlapShortKinds, if it is one cluster
// of such kinds; else long, two words of 14 bits cluster, 8 bits length-1 and 10 bits kinds together.
type overlapFragment struct {
	first uint32 // cluster in the window
	n     uint32 // clusters, 1 … 256
	kinds OverlapKinds
}

// overlapShortKinds are the kinds that short fragments can have.
var overlapShortKinds = [4]OverlapKinds{
	OverlapActiveL2, OverlapRefcountBlock, OverlapInactiveL2, OverlapActiveL2 | OverlapInactiveL2,
}

// shortFragment decodes a short fragment.
func shortFragment(word uint16) overlapFragment {
	return overlapFragment{first: uint32(word >> 2), n: 1, kinds: overlapShortKinds[word&3]}
}

// longFragment decodes a long fragment.
func longFragment(high, low uint16) overlapFragment {
	v := uint32(high)<<16 | uint32(low)
	return overlapFragment{first: v >> 18, n: v>>10&0xff + 1, kinds: OverlapKinds(v) & overlapAllKinds}
}

// longWords encodes a long fragment.
func (f overlapFragment) longWords() (high, low uint16) {
	v := f.first<<18 | (f.n-1)<<10 | uint32(f.kinds)
	return uint16(v >> 16), uint16(v)
}

// overlapWords are the fragments of one window: the short ones, one word each, and the long ones, two words each,
// both sorted.
type overlapWords struct{ short, long []uint16 }

// searchShort returns the index of the first short fragment at or behind cluster c of the window.
func (v overlapWords) searchShort(c uint32) int {
	lo, hi := 0, len(v.short)
	if hi > 0 && uint32(v.short[hi-1]>>2) < c {
		return hi // where new tables go while a file grows
	}
	for lo < hi {
		middle := int(uint(lo+hi) / 2)
		if uint32(v.short[middle]>>2) < c {
			lo = middle + 1
		} else {
			hi = middle
		}
	}
	return lo
}

// searchLong returns the index of the first word of the first long fragment that ends at or behind cluster c of
// the window.
func (v overlapWords) searchLong(c uint32) int {
	lo, hi := 0, len(v.long)/2
	for lo < hi {
		middle := int(uint(lo+hi) / 2)
		if f := longFragment(v.long[2*middle], v.long[2*middle+1]); f.first+f.n <= c {
			lo = middle + 1
		} else {
			hi = middle
		}
	}
	return 2 * lo
}

// iterate returns an iterator over the fragments that touch the clusters from first to last of the window, in
// order.
func (v overlapWords) iterate(first, last uint32) overlapIterator {
	return overlapIterator{v: v, short: v.searchShort(first), long: v.searchLong(first), last: last}
}

// overlapIterator iterates over fragments of a window.
type overlapIterator struct {
	v           overlapWords
	short, long int    // words of either sort that come next
	last        uint32 // cluster of the window
}

// next returns the next fragment, and false behind the last one.
func (it *overlapIterator) next() (overlapFragment, bool) {
	var f overlapFragment
	isLong := it.long < len(it.v.long)
	if isLong {
		f = longFragment(it.v.long[it.long], it.v.long[it.long+1])
	}
	if it.short < len(it.v.short) && (!isLong || uint32(it.v.short[it.short]>>2) < f.first) {
		f, isLong = shortFragment(it.v.short[it.short]), false
	}
	switch {
	case f.n == 0 || f.first > it.last:
		return f, false
	case isLong:
		it.long += 2
	default:
		it.short++
	}
	return f, true
}

// overlapEdit collects the fragments that take the place of others.
type overlapEdit struct {
	short, long []uint16
	pending     overlapFragment // grows while what follows is of the same kinds; n is 0 if there is none
}

// reset makes e empty. The rare large one gives its memory back.
func (e *overlapEdit) reset() {
	if 2*(cap(e.short)+cap(e.long)) > overlapEditBytes {
		*e = overlapEdit{}
	}
	e.short, e.long = e.short[:0], e.long[:0]
}

// put adds the clusters from first to last of the window, which lie behind those put before. With no kinds it
// does nothing.
func (e *overlapEdit) put(first, last uint32, kinds OverlapKinds) {
	if kinds == 0 {
		return
	}
	for first <= last {
		end := min(last, first|overlapBlockMask)
		p := &e.pending
		if p.n > 0 && p.first+p.n == first && p.kinds == kinds && first&overlapBlockMask != 0 {
			p.n += end + 1 - first
		} else {
			e.flush()
			*p = overlapFragment{first: first, n: end + 1 - first, kinds: kinds}
		}
		first = end + 1
	}
}

// flush encodes the pending fragment.
func (e *overlapEdit) flush() {
	f := e.pending
	if f.n == 0 {
		return
	}
	e.pending.n = 0
	if f.n == 1 {
		for i, kinds := range overlapShortKinds {
			if f.kinds == kinds {
				e.short = append(e.short, uint16(f.first<<2)|uint16(i))
				return
			}
		}
	}
	high, low := f.longWords()
	e.long = append(e.long, high, low)
}

// changeLocked adds the kinds add to the clusters from first to last, which are of one window, and takes the kinds
// del away. It reports false, and has changed nothing, if that needs more memory than there is. Preconditions: mu; if
// kinds are taken away, the group exists.
func (l *overlapList) changeLocked(first, last uint64, add, del OverlapKinds) bool {
	if first == last && del == 0 && l.insertLocked(first, add) {
		return true
	}
	w := first >> overlapWindowBits
	g := l.group(w / overlapGroupWindows)
	if g == nil {
		if g = l.newGroupLocked(w / overlapGroupWindows); g == nil {
			return false
		}
	}

	lo, hi := uint32(first&overlapWindowMask), uint32(last&overlapWindowMask)
	from, to := overlapReplaced(lo, hi)
	v := l.wordsLocked(g, w)
	it := v.iterate(from, to)
	short, long := it.short, it.long
	e := &l.edit
	defer e.reset()
	at := lo // what is before it is put
	for f, ok := it.next(); ok; f, ok = it.next() {
		end := f.first + f.n - 1
		switch {
		case f.first < at:
			e.put(f.first, min(end, at-1), f.kinds)
		case f.first > at: // nothing was there
			e.put(at, min(hi, f.first-1), add)
		}
		e.put(max(f.first, at), min(end, hi), (f.kinds|add)&^del)
		e.put(max(f.first, hi+1), end, f.kinds)
		at = max(at, end+1)
	}
	e.put(at, hi, add)
	e.flush()

	old := int64(it.short-short) + int64(it.long-long)/2
	if !l.spliceLocked(g, w, short, it.short, long, it.long) {
		return false
	}
	l.fragments += int64(len(e.short)) + int64(len(e.long))/2 - old

	now := l.wordsLocked(g, w)
	was, is := len(v.short)+len(v.long) > 0, len(now.short)+len(now.long) > 0
	if was != is {
		if is {
			l.windows++
		} else {
			l.windows--
		}
	}
	switch state := g.state(w); {
	case state >= overlapCached:
		l.slots[state-overlapCached].words.fill(now, lo, hi)
	case is:
		g.setState(w, overlapUncached)
	default:
		g.setState(w, overlapEmpty)
	}
	return true
}

// overlapReplaced widens a range of clusters of a window to all whose fragments change with it: those beside the
// range in its blocks may have to be joined to it.
func overlapReplaced(first, last uint32) (from, to uint32) {
	if first&overlapBlockMask != 0 {
		first--
	}
	if last&overlapBlockMask != overlapBlockMask {
		last++
	}
	return first, last
}

// insertLocked is changeLocked for what nearly every change is: a new table of one cluster, which is a short fragment
// more, or makes the long one that ends before it longer. It reports false, and has changed nothing, where that is
// not so, or needs a group or more memory than there is. Precondition: mu.
func (l *overlapList) insertLocked(c uint64, kinds OverlapKinds) bool {
	w := c >> overlapWindowBits
	g := l.group(w / overlapGroupWindows)
	kind := slices.Index(overlapShortKinds[:], kinds)
	if g == nil || kind < 0 {
		return false
	}
	at := uint32(c & overlapWindowMask)
	from, to := overlapReplaced(at, at)
	v := l.wordsLocked(g, w)
	short, long := v.searchShort(from), v.searchLong(from)
	if short < len(v.short) && uint32(v.short[short]>>2) <= to {
		return false
	}
	var before overlapFragment
	if long < len(v.long) {
		if f := longFragment(v.long[long], v.long[long+1]); f.first <= to {
			before = f
		}
	}
	switch {
	case before.n == 0:
		word := uint16(at<<2) | uint16(kind)
		l.edit.short = append(l.edit.short, word)
		ok := l.spliceLocked(g, w, short, short, long, long)
		l.edit.reset()
		if !ok {
			return false
		}
		l.fragments++
		if len(v.short)+len(v.long) == 0 {
			l.windows++
		}
	case before.first+before.n == at && before.kinds == kinds &&
		(long+2 == len(v.long) || longFragment(v.long[long+2], v.long[long+3]).first > to):
		before.n++
		v.long[long], v.long[long+1] = before.longWords()
	default:
		return false
	}
	switch state := g.state(w); {
	case state >= overlapCached:
		l.slots[state-overlapCached].words.fill(l.wordsLocked(g, w), at, at)
	case state == overlapEmpty:
		g.setState(w, overlapUncached)
	}
	return true
}

// Where overlapGroup.states sends a query about a window.
const (
	overlapEmpty    = iota // nowhere: it has no fragment
	overlapUncached        // to the fragments
	overlapCached          // to slot 0, and so on
)

// overlapGroup holds the fragments of 32 windows. It exists where there is a fragment or was one.
type overlapGroup struct {
	states [overlapGroupWindows / 4]atomic.Uint64 // 16 bits for each window; atomic; written under mu
	index  uint64                                 // immutable

	// words are the fragments, window by window, and ends where those of each window end. In a dense group
	// they are nil and meaningless. Guarded by mu.
	words []uint16
	ends  [overlapGroupWindows]uint16
	// shorts counts the short fragments of each window. Guarded by mu.
	shorts [overlapGroupWindows]uint16
}

// overlapDense holds the words of a group with too many for one slice, each window apart.
type overlapDense [overlapGroupWindows][]uint16

// state returns where a query about window w goes.
func (g *overlapGroup) state(w uint64) uint64 {
	w %= overlapGroupWindows
	return g.states[w/4].Load() >> (w % 4 * 16) & 0xffff
}

// setState changes where a query about window w goes. Precondition: mu.
func (g *overlapGroup) setState(w, state uint64) {
	w %= overlapGroupWindows
	p, shift := &g.states[w/4], w%4*16
	p.Store(p.Load()&^(0xffff<<shift) | state<<shift)
}

// placeLocked returns the slice that holds the words of window w of g, and where they are in it.
// Precondition: mu.
func (l *overlapList) placeLocked(g *overlapGroup, w uint64) (p *[]uint16, start, end int) {
	i := w % overlapGroupWindows
	if g.words == nil {
		if d := l.dense[g.index]; d != nil {
			return &d[i], 0, len(d[i])
		}
	}
	if i > 0 {
		start = int(g.ends[i-1])
	}
	return &g.words, start, int(g.ends[i])
}

// wordsLocked returns the fragments of window w of g, valid until they change. Precondition: mu.
func (l *overlapList) wordsLocked(g *overlapGroup, w uint64) overlapWords {
	p, start, end := l.placeLocked(g, w)
	middle := start + int(g.shorts[w%overlapGroupWindows])
	return overlapWords{short: (*p)[start:middle], long: (*p)[middle:end]}
}

// spliceLocked puts the words of l.edit in place of the short words from short to shortEnd, and of the long ones
// from long to longEnd, of window w of g. It reports false, and has changed nothing, if that needs more memory
// than there is. Precondition: mu.
func (l *overlapList) spliceLocked(g *overlapGroup, w uint64, short, shortEnd, long, longEnd int) bool {
	dShort := len(l.edit.short) - (shortEnd - short)
	d := dShort + len(l.edit.long) - (longEnd - long)
	if d > 0 && !l.reserveLocked(g, w, d) {
		return false
	}
	p, start, _ := l.placeLocked(g, w)
	i := w % overlapGroupWindows
	longs := start + int(g.shorts[i])
	words := *p
	n := len(words)
	if d > 0 {
		words = words[:n+d]
	}
	// Before:  … | short … shortEnd | A … long | long … longEnd | B …
	// A moves by dShort and B by d. Moved to the right, A could cover the start of B, and B goes first; moved to
	// the left, B could cover A.
	moveA := func() { copy(words[start+shortEnd+dShort:], words[start+shortEnd:longs+long]) }
	moveB := func() { copy(words[longs+longEnd+d:], words[longs+longEnd:n]) }
	if dShort > 0 {
		moveB()
		moveA()
	} else {
		moveA()
		moveB()
	}
	copy(words[start+short:], l.edit.short)
	copy(words[longs+dShort+long:], l.edit.long)

	*p = words[:n+d]
	g.shorts[i] += uint16(dShort)
	if p == &g.words {
		for ; i < overlapGroupWindows; i++ {
			g.ends[i] += uint16(d)
		}
	}
	if n+d <= cap(words)/2 && cap(words) > 32 {
		l.resizeLocked(p, n+d)
	}
	return true
}

// reserveLocked makes room for d more words of window w of g. It reports false, and has changed nothing, if that
// needs more memory than there is. Precondition: mu.
func (l *overlapList) reserveLocked(g *overlapGroup, w uint64, d int) bool {
	p, _, _ := l.placeLocked(g, w)
	if p == &g.words && len(g.words)+d > overlapGroupWords {
		if !l.makeDenseLocked(g) {
			return false
		}
		p, _, _ = l.placeLocked(g, w)
	}
	// A little more than is needed, so that insertions one by one move each word a bounded number of times.
	n := len(*p) + d
	return n <= cap(*p) || l.resizeLocked(p, n+n/8+4) || l.resizeLocked(p, n)
}

// resizeLocked gives p the capacity of about n words, at least its length. It reports false, and has changed
// nothing, if that is more memory than there is. Precondition: mu.
func (l *overlapList) resizeLocked(p *[]uint16, n int) bool {
	if !l.roomLocked(2 * int64(n-cap(*p))) {
		return false
	}
	var words []uint16
	if n > 0 {
		words = slices.Grow(words, n)[:len(*p)]
	}
	d := 2 * int64(cap(words)-cap(*p))
	if !l.roomLocked(d) {
		return false
	}
	l.bytes += d
	copy(words, *p)
	*p = words
	return true
}

// makeDenseLocked gives each window of g a slice of its own. It reports false, and has changed nothing, if that
// needs more memory than there is. Precondition: mu.
func (l *overlapList) makeDenseLocked(g *overlapGroup) bool {
	// Classes of sizes add up to an eighth, or 16 bytes to a small slice. This is asked first, so that a full list
	// does not copy in vain with every change.
	if !l.roomLocked(overlapDenseBytes + 2*int64(cap(g.words))/8 + 16*overlapGroupWindows) {
		return false
	}
	d := new(overlapDense)
	size := int64(overlapDenseBytes) - 2*int64(cap(g.words))
	start := 0
	for i := range d {
		end := int(g.ends[i])
		d[i] = append(d[i], g.words[start:end]...)
		size += 2 * int64(cap(d[i]))
		start = end
	}
	if !l.roomLocked(size) {
		return false
	}
	l.bytes += size
	if l.dense == nil {
		l.dense = make(map[uint64]*overlapDense)
	}
	l.dense[g.index] = d
	g.words = nil
	return true
}

// roomLocked reports whether the list may take d more bytes; less is always allowed. Precondition: mu.
func (l *overlapList) roomLocked(d int64) bool {
	used := l.bytes
	if l.filter.Load() != nil {
		used -= l.filterBytes
	}
	return d <= 0 || d <= l.limit-used
}

// overlapDirectory is a hash table of groups with linear probing. A group that is added is stored in a cell that was
// nil; a directory that is full is replaced. So it is read without a lock.
type overlapDirectory struct {
	cells  []atomic.Pointer[overlapGroup] // a power of two, a quarter of them nil; written under mu
	shift  uint                           // 64 - log2 of the cells; immutable
	groups int                            // guarded by mu
	wait   int                            // groups to refuse before a rebuild is tried again; guarded by mu
}

// newOverlapDirectory returns a directory of n cells, n a power of two.
func newOverlapDirectory(n int) *overlapDirectory {
	return &overlapDirectory{
		cells: make([]atomic.Pointer[overlapGroup], n),
		shift: 64 - uint(bits.TrailingZeros(uint(n))),
	}
}

// bytes returns the memory that d takes, groups apart, in bytes.
func (d *overlapDirectory) bytes() int64 { return 8 * int64(len(d.cells)) }

// overlapHash spreads x over 64 bits. Without the seed nobody can tell which x come to lie together.
func overlapHash(seed, x uint64) uint64 {
	x *= seed
	x ^= x >> 29
	return x * 0x9e3779b97f4a7c15
}

// add stores g, which is not there, in the first free cell from its own on. Precondition: mu.
func (d *overlapDirectory) add(seed uint64, g *overlapGroup) {
	h := overlapHash(seed, g.index) >> d.shift
	for d.cells[h&uint64(len(d.cells)-1)].Load() != nil {
		h++
	}
	d.cells[h&uint64(len(d.cells)-1)].Store(g)
	d.groups++
}

// group returns the group with an index (of clusters, in units of 2^overlapGroupBits), or nil. It takes no lock.
func (l *overlapList) group(index uint64) *overlapGroup {
	d := l.directory.Load()
	for h := overlapHash(l.seed, index) >> d.shift; ; h++ {
		if g := d.cells[h&uint64(len(d.cells)-1)].Load(); g == nil || g.index == index {
			return g
		}
	}
}

// newGroupLocked adds a group without fragments. It returns nil if there is no memory for it. Preconditions: mu; the
// group does not exist.
func (l *overlapList) newGroupLocked(index uint64) *overlapGroup {
	d := l.directory.Load()
	if 4*(d.groups+1) > 3*len(d.cells) {
		// A rebuild looks at every cell, so one that fails is not tried again at once.
		if d.wait > 0 {
			d.wait--
			return nil
		}
		d.wait = len(d.cells)
		if d = l.rebuildLocked(); d == nil {
			return nil
		}
	}
	if !l.roomLocked(overlapGroupBytes) {
		return nil
	}
	l.bytes += overlapGroupBytes
	g := &overlapGroup{index: index}
	d.add(l.seed, g)
	return g
}

// rebuildLocked replaces the directory by one with room. Groups without fragments go, unless one of their windows is
// still cached. (A query that holds one of them began before anything can be entered there again.) It returns nil if
// there is no memory. Precondition: mu.
func (l *overlapList) rebuildLocked() *overlapDirectory {
	old := l.directory.Load()
	var kept []*overlapGroup
	gone := int64(0)
	for i := range old.cells {
		g := old.cells[i].Load()
		if g == nil {
			continue
		}
		if g.idle() {
			gone += overlapGroupBytes + 2*int64(cap(g.words))
			if d := l.dense[g.index]; d != nil {
				gone += d.bytes()
			}
			continue
		}
		kept = append(kept, g)
	}
	n := 8
	for n < 2*(len(kept)+1) {
		n *= 2
	}
	d := newOverlapDirectory(n)
	size := d.bytes() - old.bytes() - gone
	if !l.roomLocked(size) {
		return nil
	}
	for _, g := range kept {
		d.add(l.seed, g)
	}
	l.directory.Store(d)
	l.bytes += size
	for i := range old.cells {
		if g := old.cells[i].Load(); g != nil && g.idle() {
			delete(l.dense, g.index)
		}
	}
	return d
}

// idle reports whether no window of g has a fragment or is cached.
func (g *overlapGroup) idle() bool {
	for i := range g.states {
		if g.states[i].Load() != 0 {
			return false
		}
	}
	return true
}

// bytes returns the memory that d takes, in bytes.
func (d *overlapDense) bytes() int64 {
	n := int64(overlapDenseBytes)
	for i := range d {
		n += 2 * int64(cap(d[i]))
	}
	return n
}
