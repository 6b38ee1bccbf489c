package qcow2

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// verifyOverlapList checks what must hold inside a list between two calls.
func verifyOverlapList(l *overlapList) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.directory.Load()
	bytes, fragments, windows, groups, cached := d.bytes(), int64(0), int64(0), 0, 0
	for i := range d.cells {
		g := d.cells[i].Load()
		if g == nil {
			continue
		}
		groups++
		if l.group(g.index) != g {
			return fmt.Errorf("group %d is not found", g.index)
		}
		bytes += overlapGroupBytes + 2*int64(cap(g.words))
		dense := l.dense[g.index]
		if dense != nil {
			bytes += dense.bytes()
			if g.words != nil {
				return fmt.Errorf("group %d is dense, and has %d words", g.index, len(g.words))
			}
		} else if int(g.ends[overlapGroupWindows-1]) != len(g.words) {
			return fmt.Errorf("group %d: windows end at %d, the words at %d", g.index, g.ends[overlapGroupWindows-1], len(g.words))
		}
		for w := g.index * overlapGroupWindows; w < (g.index+1)*overlapGroupWindows; w++ {
			n, err := verifyOverlapWindow(l.wordsLocked(g, w))
			if err != nil {
				return fmt.Errorf("window %d: %w", w, err)
			}
			fragments += n
			if n > 0 {
				windows++
			}
			switch state := g.state(w); {
			case state == overlapEmpty && n > 0, state == overlapUncached && n == 0:
				return fmt.Errorf("window %d: %d fragments in state %d", w, n, state)
			case state >= overlapCached:
				cached++
				if err := verifyOverlapSlot(&l.slots[state-overlapCached], w, l.wordsLocked(g, w)); err != nil {
					return fmt.Errorf("window %d: %w", w, err)
				}
			}
		}
	}
	f := l.filter.Load()
	if f != nil {
		bytes += 8 * int64(len(f.bits))
	}
	switch {
	case groups != d.groups || 4*groups > 3*len(d.cells):
		return fmt.Errorf("%d groups in %d cells, counted %d", groups, len(d.cells), d.groups)
	case fragments != l.fragments || windows != l.windows || bytes != l.bytes:
		return fmt.Errorf("%d fragments, %d windows, %d bytes; counted %d, %d, %d", fragments, windows, bytes, l.fragments, l.windows, l.bytes)
	case cached != l.taken:
		return fmt.Errorf("%d windows in %d slots", cached, l.taken)
	case bytes > max(l.limit+l.filterBytes, 64+overlapFilterMin):
		return fmt.Errorf("%d bytes, limit %d and %d for the filter", bytes, l.limit, l.filterBytes)
	}
	return nil
}

// verifyOverlapWindow checks that fragments are the only way to write what they say, and returns their number.
func verifyOverlapWindow(v overlapWords) (int64, error) {
	var last overlapFragment
	n := int64(0)
	it := v.iterate(0, overlapWindowMask)
	for f, ok := it.next(); ok; f, ok = it.next() {
		n++
		switch {
		case f.n < 1 || f.first+f.n > overlapWindowMask+1 || f.first>>overlapBlockBits != (f.first+f.n-1)>>overlapBlockBits:
			return n, fmt.Errorf("%+v crosses a block", f)
		case f.kinds == 0 || f.kinds&^overlapAllKinds != 0:
			return n, fmt.Errorf("%+v has bad kinds", f)
		case n > 1 && f.first < last.first+last.n:
			return n, fmt.Errorf("%+v follows %+v", f, last)
		case n > 1 && f.first == last.first+last.n && f.kinds == last.kinds && f.first%(1<<overlapBlockBits) != 0:
			return n, fmt.Errorf("%+v and %+v are not joined", last, f)
		}
		last = f
	}
	if it.short != len(v.short) || it.long != len(v.long) {
		return n, fmt.Errorf("the iteration ends at %d of %d, %d of %d", it.short, len(v.short), it.long, len(v.long))
	}
	for i := 0; i < len(v.long); i += 2 {
		if f := longFragment(v.long[i], v.long[i+1]); f.n == 1 && slices.Contains(overlapShortKinds[:], f.kinds) {
			return n, fmt.Errorf("%+v is long", f)
		}
	}
	return n, nil
}

// verifyOverlapSlot compares the map of a cached window with its fragments.
func verifyOverlapSlot(s *overlapSlot, w uint64, v overlapWords) error {
	if tag, ok := s.holds(w); !ok || s.words == nil {
		return fmt.Errorf("the slot has tag %#x, map %p", tag, s.words)
	}
	blocks := make([][]overlapFragment, len(s.words))
	it := v.iterate(0, overlapWindowMask)
	for f, ok := it.next(); ok; f, ok = it.next() {
		i := f.first / 256
		blocks[i] = append(blocks[i], f)
	}
	for i, fragments := range blocks {
		if err := verifyOverlapMapWord(s.words[i].Load(), fragments); err != nil {
			return fmt.Errorf("word %d of the map: %w", i, err)
		}
	}
	return nil
}

// verifyOverlapMapWord asks the word of a block for each of its clusters and kinds, and compares the answers with the
// fragments. Only a coarse word may be wrong about what there is not, by three clusters, or seven at the end; and only
// many fragments or those of other kinds may have one.
func verifyOverlapMapWord(word uint64, fragments []overlapFragment) error {
	if word == 0 && len(fragments) == 0 {
		return nil
	}
	var kinds [256]OverlapKinds
	long, other := 0, false
	for _, f := range fragments {
		for c := f.first % 256; c < f.first%256+f.n; c++ {
			kinds[c] = f.kinds
		}
		known := slices.Contains(overlapShortKinds[:], f.kinds)
		if f.n > 1 || !known {
			long++
		}
		other = other || !known
	}
	coarse := other || len(fragments) > 6 || len(fragments) > 3 && long > 0
	if word == 0 || len(fragments) == 0 || coarse != (word>>63 != 0) {
		return fmt.Errorf("%#x for %+v", word, fragments)
	}
	for c := range uint64(256) {
		near := kinds[c]
		if coarse {
			lo, hi := c&^3, c|3
			if c >= 248 {
				lo, hi = 248, 255
			}
			for _, k := range kinds[lo : hi+1] {
				if k != 0 {
					near = overlapAllKinds // some fragment is near, of whatever kinds
				}
			}
		}
		for i := range overlapKindNames {
			if k := OverlapKinds(1) << i; overlapMapFree(word, c, c, k) != (near&k == 0) {
				return fmt.Errorf("%#x for %+v: cluster %d is free of %v: %v", word, fragments, c, k, near&k != 0)
			}
		}
	}
	return nil
}

// TestOverlapMapWord makes words of random fragments, and asks for ranges of clusters and sets of kinds.
func TestOverlapMapWord(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 66))
	if !overlapMapFree(0, 0, 255, overlapAllKinds) {
		t.Error("an empty block is not free")
	}
	forms := map[string]int{}
	for range 20000 {
		var e overlapEdit
		var kinds [256]OverlapKinds
		for c, n := uint32(rng.IntN(60)), rng.IntN(9); n > 0 && c < 256; n-- {
			f := overlapFragment{first: c, n: 1, kinds: overlapShortKinds[rng.IntN(4)]}
			if rng.IntN(5) == 0 {
				f.n = min(256-c, 1+rng.Uint32N(100))
			}
			if rng.IntN(20) == 0 {
				f.kinds = overlapSomeKinds(rng)
			}
			for i := range f.n {
				kinds[c+i] = f.kinds
			}
			e.put(f.first, f.first+f.n-1, f.kinds)
			if c += f.n + rng.Uint32N(50); rng.IntN(6) == 0 {
				c = max(c, 250)
			}
		}
		e.flush()
		word := overlapMapWord(e.short, e.long)
		if err := verifyOverlapMapWord(word, overlapFragments(e.short, e.long)); err != nil {
			t.Fatal(err)
		}
		switch {
		case word == 0:
			forms["nothing"]++
		case word < overlapRunForm:
			forms["few"]++
		case word < overlapCoarse:
			forms["runs"]++
		default:
			forms["coarse"]++
		}
		for range 50 {
			first := rng.Uint64N(256)
			last := first + rng.Uint64N(256-first)
			if rng.IntN(2) == 0 {
				last = min(last, first+rng.Uint64N(4))
			}
			mask := overlapSomeKinds(rng)
			hit := OverlapKinds(0)
			for _, k := range kinds[first : last+1] {
				hit |= k & mask
			}
			block := rng.Uint64N(64) << overlapBlockBits
			if free := overlapMapFree(word, block+first, block+last, mask); free && hit != 0 || !free && hit == 0 && word < overlapCoarse {
				t.Fatalf("word %#x of %+v: clusters %d to %d free of %v: %v", word, overlapFragments(e.short, e.long), first, last, mask, free)
			}
		}
	}
	for _, form := range []string{"nothing", "few", "runs", "coarse"} {
		if forms[form] < 500 {
			t.Errorf("%d words of the form %q", forms[form], form)
		}
	}
}

// overlapFragments decodes words.
func overlapFragments(short, long []uint16) (fragments []overlapFragment) {
	overlapEach(short, long, func(f overlapFragment) { fragments = append(fragments, f) })
	return fragments
}

// overlapModel is a list beside a map of the same.
type overlapModel struct {
	t     testing.TB
	l     *overlapList
	bits  uint
	kinds map[uint64]OverlapKinds // by cluster
	scans int
	log   []string
}

// newOverlapModel returns an empty model. Its scan looks into the map.
func newOverlapModel(t testing.TB, clusterBits uint, limits overlapLimits) *overlapModel {
	m := &overlapModel{t: t, l: newOverlapList(clusterBits, limits), bits: clusterBits, kinds: make(map[uint64]OverlapKinds)}
	m.l.scan = func(first, n uint64) (OverlapKinds, uint64) {
		m.scans++
		return m.find(first, first+n-1, overlapAllKinds)
	}
	return m
}

// find returns the kinds in mask of the clusters from first to last, and the first cluster that has any.
func (m *overlapModel) find(first, last uint64, mask OverlapKinds) (hit OverlapKinds, at uint64) {
	look := func(c uint64) {
		if k := m.kinds[c] & mask; k != 0 {
			if hit == 0 || c < at {
				at = c
			}
			hit |= k
		}
	}
	if last-first < uint64(len(m.kinds)) {
		for c := first; c <= last; c++ {
			look(c)
		}
		return hit, at
	}
	for c := range m.kinds {
		if first <= c && c <= last {
			look(c)
		}
	}
	return hit, at
}

// fail ends the test with the operations that led there.
func (m *overlapModel) fail(format string, args ...any) {
	m.t.Helper()
	for _, line := range m.log[max(0, len(m.log)-20):] {
		m.t.Log(line)
	}
	m.t.Fatalf(format, args...)
}

// change enters or removes kinds in both.
func (m *overlapModel) change(add bool, kinds OverlapKinds, off, n uint64) {
	m.t.Helper()
	m.log = append(m.log, fmt.Sprintf("add=%v %#x at %#x (cluster %d) + %#x", add, uint16(kinds), off, off>>m.bits, n))
	if n > 0 {
		for c := off >> m.bits; c <= (off+n-1)>>m.bits; c++ {
			if add {
				m.kinds[c] |= kinds
			} else if m.kinds[c] &^= kinds; m.kinds[c] == 0 {
				delete(m.kinds, c)
			}
		}
	}
	if add {
		m.l.enter(kinds, off, n)
	} else {
		m.l.remove(kinds, off, n)
	}
}

// query asks both.
func (m *overlapModel) query(off, n uint64, mask OverlapKinds) {
	m.t.Helper()
	var want OverlapKinds
	var wantOff uint64
	if n > 0 {
		want, wantOff = m.find(off>>m.bits, (off+n-1)>>m.bits, mask)
		wantOff <<= m.bits
	}
	got, gotOff := m.l.query(off, n, mask)
	if got != want || want != 0 && gotOff != wantOff {
		m.fail("query of %#x (cluster %d) + %#x for %#x: %v at %#x, want %v at %#x", off, off>>m.bits, n, uint16(mask), got, gotOff, want, wantOff)
	}
}

// naiveRuns returns the runs of the map.
func (m *overlapModel) naiveRuns() []overlapRun {
	clusters := make([]uint64, 0, len(m.kinds))
	for c := range m.kinds {
		clusters = append(clusters, c)
	}
	slices.Sort(clusters)
	var runs []overlapRun
	for _, c := range clusters {
		if n := len(runs); n > 0 && runs[n-1].first+runs[n-1].n == c && runs[n-1].kinds == m.kinds[c] {
			runs[n-1].n++
		} else {
			runs = append(runs, overlapRun{first: c, n: 1, kinds: m.kinds[c]})
		}
	}
	return runs
}

// verify checks the list, and compares its runs with the map unless something is suspect.
func (m *overlapModel) verify() {
	m.t.Helper()
	if err := verifyOverlapList(m.l); err != nil {
		m.fail("%v", err)
	}
	if m.l.memory().suspect {
		return
	}
	if diff := cmp.Diff(m.naiveRuns(), slices.Collect(m.l.runs()), cmp.AllowUnexported(overlapRun{})); diff != "" {
		m.fail("runs (-want +got):\n%s", diff)
	}
}

// overlapPlace returns a random cluster near an edge of blocks, windows or groups.
func overlapPlace(rng *rand.Rand, clusterBits uint) uint64 {
	bases := []uint64{
		64, 1 << overlapBlockBits, 3 << overlapBlockBits,
		1 << overlapWindowBits, 2 << overlapWindowBits, 5 << overlapWindowBits, 6 << overlapWindowBits,
		1 << overlapGroupBits, 7 << overlapGroupBits, 1 << (56 - clusterBits),
	}
	return bases[rng.IntN(len(bases))] + rng.Uint64N(12) - 6
}

// overlapLength returns a random number of bytes, mostly few clusters.
func overlapLength(rng *rand.Rand, clusterBits uint) uint64 {
	switch rng.IntN(40) {
	case 0:
		return 0
	case 1, 2, 3:
		return 1 + rng.Uint64N(1<<clusterBits)
	case 4, 5, 6, 7:
		return (250 + rng.Uint64N(12)) << clusterBits
	case 8:
		return (505+rng.Uint64N(12))<<clusterBits + rng.Uint64N(1<<clusterBits)
	case 9:
		if rng.IntN(8) == 0 {
			return (1<<overlapWindowBits + rng.Uint64N(12) - 6) << clusterBits
		}
	}
	return (1 + rng.Uint64N(4)) << clusterBits
}

// overlapSomeKinds returns random kinds, mostly one.
func overlapSomeKinds(rng *rand.Rand) OverlapKinds {
	switch rng.IntN(6) {
	case 0:
		return 1 + OverlapKinds(rng.UintN(uint(overlapAllKinds)))
	case 1:
		return 1 << rng.UintN(uint(len(overlapKindNames)))
	}
	return []OverlapKinds{OverlapActiveL2, OverlapRefcountBlock, OverlapInactiveL2}[rng.IntN(3)]
}

// TestOverlapListModel runs random calls beside a map, around the edges of what the list divides clusters into:
// with one cached window, with several, and with so little memory that much is suspect.
func TestOverlapListModel(t *testing.T) {
	tests := []struct {
		name    string
		limits  overlapLimits
		suspect bool
	}{
		{"cache of one window", overlapLimits{cacheBytes: 1}, false},
		{"cache of three windows", overlapLimits{cacheBytes: 3 * (overlapSlotBytes + overlapMapBytes)}, false},
		{"default", overlapLimits{}, false},
		{"no memory", overlapLimits{cacheBytes: 1, listBytes: 1}, true},
		{"400 bytes of fragments", overlapLimits{cacheBytes: 1, listBytes: overlapFilterMin + overlapEditBytes + 400}, true},
		{"1500 bytes of fragments", overlapLimits{listBytes: overlapFilterMin + overlapEditBytes + 1500}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			scans := 0
			seeds := uint64(30)
			if testing.Short() {
				seeds = 10
			}
			for seed := range seeds {
				m := newOverlapModel(t, []uint{9, 16, 21}[seed%3], tt.limits)
				m.log = []string{fmt.Sprintf("seed %d, %d cluster bits", seed, m.bits)}
				m.run(rand.New(rand.NewPCG(seed, 60)), 400)
				scans += m.scans
				if suspect := m.l.memory().suspect; suspect && !tt.suspect {
					m.fail("suspect clusters at %+v", m.l.memory())
				}
			}
			if (scans > 0) != tt.suspect {
				t.Errorf("%d scans", scans)
			}
		})
	}
}

// run makes n random changes, with queries between them.
func (m *overlapModel) run(rng *rand.Rand, n int) {
	m.t.Helper()
	for i := range n {
		off := overlapPlace(rng, m.bits) << m.bits
		if rng.IntN(3) == 0 {
			off += rng.Uint64N(1 << m.bits)
		}
		m.change(rng.IntN(9) < 5, overlapSomeKinds(rng), off, overlapLength(rng, m.bits))
		for range 6 {
			mask := overlapAllKinds
			if rng.IntN(2) == 0 {
				mask = overlapSomeKinds(rng)
			}
			off := overlapPlace(rng, m.bits)<<m.bits + rng.Uint64N(1<<m.bits)
			m.query(off, overlapLength(rng, m.bits), mask)
		}
		if i%20 == 0 || i == n-1 {
			m.verify()
		}
	}
	// Once what is left is taken away, nothing may remain.
	for _, r := range m.naiveRuns() {
		m.change(false, r.kinds, r.first<<m.bits, r.n<<m.bits)
	}
	m.verify()
	if got := m.l.memory(); got.runs != 0 || got.windows != 0 {
		m.fail("an empty list has %+v", got)
	}
}

// TestOverlapListEdges calls the list with ranges that touch its edges, and looks at the clusters beside them.
func TestOverlapListEdges(t *testing.T) {
	const cs = 1 << 16
	type call struct {
		add    bool
		kinds  OverlapKinds
		off, n uint64
	}
	l2, block, l1 := OverlapActiveL2, OverlapRefcountBlock, OverlapActiveL1
	tests := []struct {
		name  string
		calls []call
		want  []overlapRun
	}{
		{"one cluster", []call{{true, l2, 5 * cs, cs}}, []overlapRun{{5, 1, l2}}},
		{"nothing", []call{{true, l2, 5 * cs, 0}, {true, l2, 5*cs + 1, 0}, {true, 0, 5 * cs, cs}}, nil},
		{"removing nothing", []call{{true, l2, 5 * cs, cs}, {false, l2, 5 * cs, 0}, {false, 0, 5 * cs, cs}}, []overlapRun{{5, 1, l2}}},
		{"a byte", []call{{true, l2, 5*cs + 77, 1}}, []overlapRun{{5, 1, l2}}},
		{"two bytes of two clusters", []call{{true, l2, 6*cs - 1, 2}}, []overlapRun{{5, 2, l2}}},
		{"removing one byte takes its cluster", []call{{true, l2, 5 * cs, 3 * cs}, {false, l2, 6*cs + 9, 1}}, []overlapRun{{5, 1, l2}, {7, 1, l2}}},
		{"removing two bytes takes two clusters", []call{{true, l2, 5 * cs, 4 * cs}, {false, l2, 7*cs - 1, 2}}, []overlapRun{{5, 1, l2}, {8, 1, l2}}},
		{"first cluster of a run", []call{{true, l1, 5 * cs, 9 * cs}, {false, l1, 5 * cs, cs}}, []overlapRun{{6, 8, l1}}},
		{"last cluster of a run", []call{{true, l1, 5 * cs, 9 * cs}, {false, l1, 13 * cs, cs}}, []overlapRun{{5, 8, l1}}},
		{"before and behind a run", []call{{true, l1, 5 * cs, 9 * cs}, {false, l1, 4 * cs, cs}, {false, l1, 14 * cs, cs}}, []overlapRun{{5, 9, l1}}},
		{"runs join", []call{{true, l1, 5 * cs, cs}, {true, l1, 7 * cs, cs}, {true, l1, 6 * cs, cs}}, []overlapRun{{5, 3, l1}}},
		{"runs of other kinds do not join", []call{{true, l2, 5 * cs, cs}, {true, block, 7 * cs, cs}, {true, l1, 6 * cs, cs}}, []overlapRun{{5, 1, l2}, {6, 1, l1}, {7, 1, block}}},
		{"twice", []call{{true, l2, 5 * cs, cs}, {true, l2, 5 * cs, cs}}, []overlapRun{{5, 1, l2}}},
		{"several kinds", []call{{true, l2, 5 * cs, cs}, {true, OverlapInactiveL2, 5 * cs, cs}}, []overlapRun{{5, 1, l2 | OverlapInactiveL2}}},
		{"removing one of several kinds", []call{{true, l2 | l1, 5 * cs, 3 * cs}, {false, l1, 6 * cs, cs}}, []overlapRun{{5, 1, l2 | l1}, {6, 1, l2}, {7, 1, l2 | l1}}},
		{"removing a kind that is not there", []call{{true, l2, 5 * cs, cs}, {false, l1, 5 * cs, cs}}, []overlapRun{{5, 1, l2}}},
		{"removing where nothing is", []call{{false, l2, 5 * cs, cs}, {false, overlapAllKinds, 1 << 50, 1 << 40}}, nil},
		{"part of a run gets a kind", []call{{true, l2, 5 * cs, 5 * cs}, {true, l1, 7 * cs, cs}}, []overlapRun{{5, 2, l2}, {7, 1, l2 | l1}, {8, 2, l2}}},
		{"more than a block", []call{{true, l1, 100 * cs, 700 * cs}}, []overlapRun{{100, 700, l1}}},
		{"more than a block, split", []call{{true, l1, 100 * cs, 700 * cs}, {false, l1, 255 * cs, 2 * cs}}, []overlapRun{{100, 155, l1}, {257, 543, l1}}},
		{"more than a window", []call{{true, l1, 100 * cs, 20000 * cs}}, []overlapRun{{100, 20000, l1}}},
		{"more than a window, ends away", []call{{true, l1, 100 * cs, 20000 * cs}, {false, l1, 100 * cs, cs}, {false, l1, 20099 * cs, cs}}, []overlapRun{{101, 19998, l1}}},
		{"edge of a window", []call{{true, l2, 16383 * cs, 2 * cs}}, []overlapRun{{16383, 2, l2}}},
		{"last cluster of a window", []call{{true, l2, 16383 * cs, 2 * cs}, {false, l2, 16384 * cs, cs}}, []overlapRun{{16383, 1, l2}}},
		{"first cluster of a window", []call{{true, l2, 16383 * cs, 2 * cs}, {false, l2, 16383 * cs, cs}}, []overlapRun{{16384, 1, l2}}},
		{"edge of a group", []call{{true, l2, 1<<overlapGroupBits*cs - 1, 2}}, []overlapRun{{1<<overlapGroupBits - 1, 2, l2}}},
		{"first cluster of a group", []call{{true, l2, 1<<overlapGroupBits*cs - 1, 2}, {false, l2, 1<<overlapGroupBits*cs - 1, 1}}, []overlapRun{{1 << overlapGroupBits, 1, l2}}},
		{"a whole group", []call{{true, l1, 1 << overlapGroupBits * cs, 1 << overlapGroupBits * cs}}, []overlapRun{{1 << overlapGroupBits, 1 << overlapGroupBits, l1}}},
		{"the highest offset", []call{{true, l2, 1<<56 - cs, cs}, {true, block, 1 << 56, 1}}, []overlapRun{{1<<40 - 1, 1, l2}, {1 << 40, 1, block}}},
		{"the highest offset and the longest range", []call{{true, l1, 1 << 56, 1 << 40}}, []overlapRun{{1 << 40, 1 << 24, l1}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, limits := range []overlapLimits{{cacheBytes: 1}, {}, {listBytes: 1}} {
				m := newOverlapModel(t, 16, limits)
				m.l.scan = func(first, n uint64) (OverlapKinds, uint64) { return findInRuns(tt.want, first, first+n-1) }
				for _, c := range tt.calls {
					if c.add {
						m.l.enter(c.kinds, c.off, c.n)
					} else {
						m.l.remove(c.kinds, c.off, c.n)
					}
					// Now the window is cached, and what follows must change its bits.
					m.l.query(c.off, 3*cs, overlapAllKinds)
				}
				if err := verifyOverlapList(m.l); err != nil {
					t.Fatal(err)
				}
				if got := slices.Collect(m.l.runs()); limits.listBytes == 0 {
					if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(overlapRun{})); diff != "" {
						t.Fatalf("runs (-want +got):\n%s", diff)
					}
				}
				for _, r := range tt.want {
					for _, c := range []uint64{r.first - 1, r.first, r.first + 1, r.first + r.n - 1, r.first + r.n, r.first | 255, r.first | 256, r.first | 16384} {
						want, _ := findInRuns(tt.want, c, c)
						if got, off := m.l.query(c*cs+cs-1, 1, overlapAllKinds); got != want || want != 0 && off != c*cs {
							t.Errorf("%+v: cluster %d is %v at %#x, want %v", limits, c, got, off, want)
						}
						want, at := findInRuns(tt.want, c, c+300)
						if got, off := m.l.query(c*cs, 301*cs, overlapAllKinds); got != want || want != 0 && off != at*cs {
							t.Errorf("%+v: clusters from %d are %v at %#x, want %v at %#x", limits, c, got, off, want, at*cs)
						}
					}
				}
			}
		})
	}
}

// findInRuns returns the kinds of the clusters from first to last, and the first one that is of any.
func findInRuns(runs []overlapRun, first, last uint64) (hit OverlapKinds, at uint64) {
	for _, r := range runs {
		if r.first <= last && first < r.first+r.n {
			if hit == 0 {
				at = max(first, r.first)
			}
			hit |= r.kinds
		}
	}
	return hit, at
}

// TestOverlapListDense fills windows with a fragment in every second cluster, in random order, and empties them.
func TestOverlapListDense(t *testing.T) {
	m := newOverlapModel(t, 9, overlapLimits{cacheBytes: 2 * (overlapSlotBytes + overlapMapBytes)})
	rng := rand.New(rand.NewPCG(1, 61))
	order := rng.Perm(3 << overlapWindowBits / 2)
	for i, c := range order {
		m.change(true, []OverlapKinds{OverlapActiveL2, OverlapActiveL1}[c%2], uint64(c)<<10, 512)
		m.query(rng.Uint64N(3<<overlapWindowBits)<<9, 512, overlapAllKinds)
		if i%4096 == 0 {
			m.verify()
		}
	}
	m.verify()
	if len(m.l.dense) != 1 {
		t.Errorf("%d dense groups, want 1", len(m.l.dense))
	}
	full := m.l.memory()
	m.change(true, OverlapInactiveL1, 1<<(overlapWindowBits+9), 1<<(overlapWindowBits+9))
	m.verify()
	m.change(false, OverlapInactiveL1, 1<<(overlapWindowBits+9), 1<<(overlapWindowBits+9))
	m.verify()
	for i, c := range order {
		m.change(false, overlapAllKinds, uint64(c)<<10, 512)
		m.query(rng.Uint64N(3<<overlapWindowBits)<<9, 512, overlapAllKinds)
		if i%4096 == 0 {
			m.verify()
		}
	}
	m.verify()
	if got := m.l.memory(); got.list > full.list/20 {
		t.Errorf("%+v when empty, %+v when full", got, full)
	}

	// Other windows push the group's out of the cache, and then it goes.
	for i := range uint64(20) {
		m.change(true, OverlapActiveL2, (1+i)<<40, 512)
		for range 4 * overlapPromotion {
			m.query((1+i)<<40, 512, overlapAllKinds)
		}
	}
	m.verify()
	if len(m.l.dense) != 0 {
		t.Errorf("%d dense groups, want none", len(m.l.dense))
	}
}

// TestOverlapListChurn moves one table through many groups: those behind it give their memory back.
func TestOverlapListChurn(t *testing.T) {
	l := newOverlapList(16, overlapLimits{cacheBytes: 1})
	const step = 1 << (overlapGroupBits + 16)
	for i := range uint64(10000) {
		l.enter(OverlapActiveL2, i*step, 1)
		if got, _ := l.query(i*step, 1, overlapAllKinds); got != OverlapActiveL2 {
			t.Fatalf("step %d: %v", i, got)
		}
		l.remove(OverlapActiveL2, i*step, 1)
	}
	if err := verifyOverlapList(l); err != nil {
		t.Error(err)
	}
	if got := l.memory(); got.list > 4<<10 {
		t.Errorf("%+v", got)
	}
}

// TestOverlapListBounds enters what a hostile image could claim: the list keeps to its bound, ends soon, and finds
// everything.
func TestOverlapListBounds(t *testing.T) {
	const limit = 1 << 20
	tests := []struct {
		name    string
		enter   func(l *overlapList)
		suspect bool
		limit   int64 // 0: limit
	}{
		{"2^31 clusters", func(l *overlapList) { l.enter(OverlapActiveL1, 1<<55, 1<<40) }, true, 0},
		{"2^31 clusters, again and again", func(l *overlapList) {
			for i := range uint64(1000) {
				l.enter(OverlapInactiveL1, i<<44, 1<<40)
			}
		}, true, 0},
		{"runs as long as can be one by one", func(l *overlapList) {
			for i := range uint64(4000) {
				l.enter(OverlapInactiveL1, i<<44, overlapSuspectRun<<9)
			}
		}, true, 0},
		{"tables far apart", func(l *overlapList) {
			for i := range uint64(100000) {
				l.enter(OverlapActiveL2, i<<36, 512)
			}
		}, true, 0},
		{"tables in every second cluster", func(l *overlapList) {
			for i := range uint64(1000000) {
				l.enter(OverlapActiveL2, i<<10, 512)
			}
		}, true, 0},
		{"tables in every second cluster, too little for a dense group", func(l *overlapList) {
			for i := range uint64(100000) {
				l.enter(OverlapActiveL2, i<<10, 512)
			}
		}, true, 42 << 10},
		{"tables in every second cluster, too little for what a dense group needs next", func(l *overlapList) {
			for i := range uint64(100000) {
				l.enter(OverlapActiveL2, i<<10, 512)
			}
		}, true, 48 << 10},
		{"a long run taken apart", func(l *overlapList) {
			l.enter(OverlapActiveL1, 0, 20000<<9)
			l.enter(OverlapActiveL1, 1<<40, limit/5<<(8+9-2))
			for i := range uint64(1 << 20) {
				l.remove(OverlapActiveL1, 1<<40+i<<10, 512)
			}
		}, true, 0},
		{"one table twice", func(l *overlapList) {
			for range 100000 {
				l.enter(OverlapActiveL2, 1<<30, 512)
			}
		}, false, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			limit := int64(limit)
			if tt.limit > 0 {
				limit = tt.limit
			}
			l := newOverlapList(9, overlapLimits{listBytes: limit})
			scans := 0
			l.scan = func(first, n uint64) (OverlapKinds, uint64) { scans++; return OverlapCryptoHeader, first }
			tt.enter(l)
			got := l.memory()
			if got.list > limit || got.suspect != tt.suspect {
				t.Errorf("%+v", got)
			}
			if err := verifyOverlapList(l); err != nil {
				t.Error(err)
			}
			for _, off := range []uint64{1 << 30, 1<<40 + 1<<11, 1 << 55, 1<<55 + 1<<40 - 1, 999 << 44, 99999 << 36, 999999 << 10} {
				l.query(off, 1, overlapAllKinds)
			}
			if (scans > 0) != tt.suspect {
				t.Errorf("%d scans", scans)
			}
		})
	}
}

// TestOverlapListScan asks for kinds among suspect clusters: scan is asked for those only, and the first cluster of
// the kinds in question is found although others of other kinds lie before it.
func TestOverlapListScan(t *testing.T) {
	m := newOverlapModel(t, 9, overlapLimits{listBytes: 1})
	m.change(true, OverlapActiveL2, 100<<9, 50<<9)
	m.change(true, OverlapRefcountBlock, 133<<9, 2<<9)
	m.query(0, 400<<9, OverlapRefcountBlock)
	m.query(0, 400<<9, OverlapRefcountBlock|OverlapActiveL2)
	m.query(0, 400<<9, OverlapSnapshotTable)
	m.query(134<<9, 1, OverlapRefcountBlock)
	before := m.scans
	for c := uint64(1000); c < 2000; c++ {
		m.query(c<<9, 512, overlapAllKinds)
	}
	if m.scans > before+10 {
		t.Errorf("%d scans for clusters that were never entered", m.scans-before)
	}

	// Without a bound on what is suspect, everything is scanned.
	m.l.enter(OverlapActiveL1, 1<<40, 1<<40)
	before = m.scans
	m.query(1000<<9, 512, overlapAllKinds)
	m.query(0, 1<<20<<9, OverlapRefcountBlock)
	if m.scans == before {
		t.Error("no scan although everything is suspect")
	}
}

// TestOverlapListRuns stops an iteration, and changes the list inside one.
func TestOverlapListRuns(t *testing.T) {
	l := newOverlapList(16, overlapLimits{})
	for i := range uint64(10) {
		l.enter(OverlapActiveL2, i<<40, 1)
	}
	n := uint64(0)
	for r := range l.runs() {
		if want := (overlapRun{first: n << 24, n: 1, kinds: OverlapActiveL2}); r != want {
			t.Fatalf("run %d is %+v, want %+v", n, r, want)
		}
		l.remove(OverlapActiveL2, n<<40, 1)
		if n++; n == 7 {
			break
		}
	}
	if got := l.memory().runs; got != 3 {
		t.Errorf("%d runs are left", got)
	}
}

// TestOverlapKindsString names sets of kinds.
func TestOverlapKindsString(t *testing.T) {
	for kinds, want := range map[OverlapKinds]string{
		0:                                   "nothing",
		OverlapRefcountBlock:                "refcount block",
		OverlapActiveL2 | OverlapInactiveL2: "active L2 table, inactive L2 table",
		OverlapMainHeader | 1<<15:           "header, unknown kinds 0x8000",
		overlapAllKinds: "header, active L1 table, active L2 table, refcount table, refcount block, snapshot table, " +
			"inactive L1 table, inactive L2 table, bitmap directory, crypto header",
	} {
		if got := kinds.String(); got != want {
			t.Errorf("%#x is %q, want %q", uint16(kinds), got, want)
		}
	}
}

// TestOverlapPreset compares the presets with QEMU's (block/qcow2.h: QCOW2_OL_CONSTANT and so on), in whose bits the
// kinds are given.
func TestOverlapPreset(t *testing.T) {
	var zero OverlapPreset
	for _, tt := range []struct {
		preset OverlapPreset
		name   string
		want   OverlapKinds
	}{
		{zero, "all", 0x1ff | OverlapCryptoHeader},
		{OverlapAll, "all", 0x1ff | OverlapCryptoHeader},
		{OverlapCached, "cached", 0x17f | OverlapCryptoHeader},
		{OverlapConstant, "constant", 0x12b | OverlapCryptoHeader},
		{OverlapNone, "none", 0},
		{17, "OverlapPreset(17)", overlapAllKinds},
	} {
		if got := tt.preset.kinds(); got != tt.want || tt.preset.String() != tt.name {
			t.Errorf("%v has kinds %v, want %s with %v", tt.preset, got, tt.name, tt.want)
		}
	}
}

// TestOverlapListSizes compares the sizes that are counted with those of the types. Go takes what it allocates
// from classes of sizes, so 32-bit groups are as large as 64-bit ones.
func TestOverlapListSizes(t *testing.T) {
	for _, tt := range []struct {
		v    any
		want uintptr
	}{
		{overlapGroup{}, overlapGroupBytes},
		{overlapDense{}, overlapDenseBytes - 48},
		{overlapSlot{}, overlapSlotBytes},
		{[overlapMapWords]uint64{}, overlapMapBytes},
	} {
		got := reflect.TypeOf(tt.v).Size()
		if got > tt.want || ^uint(0)>>63 != 0 && got != tt.want {
			t.Errorf("%T has %d bytes, counted as %d", tt.v, got, tt.want)
		}
	}
}

// TestOverlapListAllocs queries what needs no lock: cached windows, windows without fragments, and groups that do
// not exist, also with suspect clusters elsewhere. Nothing is allocated; nor for windows that are not cached.
func TestOverlapListAllocs(t *testing.T) {
	for _, limits := range []overlapLimits{{cacheBytes: 1}, {cacheBytes: 1, listBytes: overlapFilterMin + overlapEditBytes + 1000}} {
		l := newOverlapList(16, limits)
		l.scan = func(first, n uint64) (OverlapKinds, uint64) { return 0, 0 }
		const window = 1 << (overlapWindowBits + 16)
		l.enter(OverlapActiveL2, 5<<16, 1)
		l.enter(OverlapActiveL2, 3*window, 1)
		l.query(5<<16, 1, overlapAllKinds)
		for i := range uint64(20) {
			l.enter(OverlapActiveL2, 1<<50+i<<40, 1)
		}
		if got := l.memory().suspect; got != (limits.listBytes > 0) {
			t.Fatalf("%+v", l.memory())
		}
		for _, tt := range []struct {
			name string
			off  uint64
		}{
			{"cached", 7 << 16}, {"empty", 2*window + 7}, {"no group", 1 << 55}, {"not cached", 3*window + 1<<20},
		} {
			if n := testing.AllocsPerRun(100, func() {
				if k, _ := l.query(tt.off, 1<<16, overlapAllKinds); k != 0 {
					t.Errorf("%s: %v", tt.name, k)
				}
			}); n != 0 {
				t.Errorf("%s: %v allocations", tt.name, n)
			}
		}
	}
}

// TestOverlapListLockFree queries while the mutex is held: clusters beside metadata, and metadata for kinds that it is
// not of, as the writes of tables do. In a block with much of it, clusters must share no bit of the cache with any.
func TestOverlapListLockFree(t *testing.T) {
	l := newOverlapList(16, overlapLimits{})
	const window = 1 << (overlapWindowBits + 16)
	for _, e := range []struct {
		kinds    OverlapKinds
		first, n uint64
	}{
		{OverlapActiveL2, 5, 1}, {OverlapRefcountBlock, 7, 1},
		{OverlapActiveL2, 259, 100}, {OverlapRefcountBlock, 359, 1}, {OverlapInactiveL2, 361, 2},
		{OverlapActiveL1, 517, 2},
	} {
		l.enter(e.kinds, e.first<<16, e.n<<16)
	}
	l.query(5<<16, 1, overlapAllKinds)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, tt := range []struct {
		first, n uint64
		mask     OverlapKinds
	}{
		{0, 1, overlapAllKinds}, {4, 1, overlapAllKinds}, {6, 1, overlapAllKinds}, {8, 251, overlapAllKinds},
		{5, 1, overlapAllKinds &^ OverlapActiveL2}, {7, 1, overlapAllKinds &^ OverlapRefcountBlock},
		{256, 3, overlapAllKinds}, {360, 1, overlapAllKinds}, {363, 153, overlapAllKinds},
		{259, 100, overlapAllKinds &^ OverlapActiveL2}, {300, 1, overlapAllKinds &^ OverlapActiveL2},
		{361, 2, overlapAllKinds &^ OverlapInactiveL2},
		{515, 1, overlapAllKinds}, {520, 1000, overlapAllKinds},
	} {
		if k, _ := l.query(tt.first<<16, tt.n<<16, tt.mask); k != 0 {
			t.Errorf("%d clusters from %d are %v", tt.n, tt.first, k)
		}
	}
	for _, off := range []uint64{window, 3*window - 1, 1 << 40} {
		if k, _ := l.query(off, 1<<16, overlapAllKinds); k != 0 {
			t.Errorf("%#x is %v", off, k)
		}
	}
}

// TestOverlapListConcurrency queries beside a writer that enters and removes, makes groups, and has windows
// exchanged. Clusters that it leaves alone read the same all the time, whatever happens to others in the same word
// and to other kinds of the same cluster; what it has finished is seen by queries that begin afterwards.
func TestOverlapListConcurrency(t *testing.T) {
	for _, tt := range []struct {
		name    string
		limits  overlapLimits
		suspect bool
	}{
		{"one window", overlapLimits{cacheBytes: 1}, false},
		{"all windows", overlapLimits{}, false},
		{"little memory", overlapLimits{cacheBytes: 1, listBytes: overlapFilterMin + overlapEditBytes + 6000}, true},
	} {
		t.Run(tt.name, func(t *testing.T) { testOverlapConcurrency(t, tt.limits, tt.suspect) })
	}
}

// testOverlapConcurrency is TestOverlapListConcurrency with given limits.
func testOverlapConcurrency(t *testing.T, limits overlapLimits, suspect bool) {
	const (
		windows  = 5
		clusters = windows << overlapWindowBits
		steps    = 6000
		bits     = 9
	)
	// Each 64 clusters have the same uses. Entered and removed are those with a step's number.
	const (
		stable  = 5  // an active L2 table all the time, and an inactive one now and then
		never   = 6  // nothing
		changed = 8  // and up to 31: anything
		table   = 33 // and up to 37: an active L1 table, but for the cluster in the middle
		entered = 40
		removed = 50
	)
	l := newOverlapList(bits, limits)
	truth := make([]atomic.Uint32, clusters) // what the tables say
	l.scan = func(first, n uint64) (hit OverlapKinds, at uint64) {
		for c := first; c < first+n && c < clusters; c++ {
			if k := OverlapKinds(truth[c].Load()); k != 0 {
				if hit == 0 {
					at = c
				}
				hit |= k
			}
		}
		return hit, at
	}
	enter := func(kinds OverlapKinds, c, n uint64) {
		for i := range n {
			truth[c+i].Or(uint32(kinds))
		}
		l.enter(kinds, c<<bits, n<<bits)
	}
	remove := func(kinds OverlapKinds, c, n uint64) {
		for i := range n {
			truth[c+i].And(^uint32(kinds))
		}
		l.remove(kinds, c<<bits, n<<bits)
	}
	for c := uint64(0); c < clusters; c += 64 {
		enter(OverlapActiveL2, c+stable, 1)
		enter(OverlapActiveL1, c+table, 5)
		enter(OverlapRefcountBlock, c+removed, 1)
	}

	// Step i enters or removes the cluster of stepCluster(i).
	stepCluster := func(i uint64) uint64 { return i * 7 % (clusters / 64) * 64 }
	var done atomic.Uint64 // steps
	var readers sync.WaitGroup
	for r := range uint64(3) {
		readers.Add(1)
		go func() {
			defer readers.Done()
			rng := rand.New(rand.NewPCG(r, 62))
			for n := done.Load(); n < steps && !t.Failed(); n = done.Load() {
				c := rng.Uint64N(clusters/64) * 64
				if k, off := l.query((c+stable)<<bits, 3<<bits, OverlapActiveL2); k != OverlapActiveL2 || off != (c+stable)<<bits {
					t.Errorf("stable cluster %d: %v at %#x", c+stable, k, off)
				}
				if k, off := l.query((c+never)<<bits, 2<<bits, overlapAllKinds); k != 0 {
					t.Errorf("cluster %d, which is nothing: %v at %#x", c+never, k, off)
				}
				if k, _ := l.query(c<<bits, 128<<bits, OverlapActiveL2|OverlapSnapshotTable); k != OverlapActiveL2 {
					t.Errorf("clusters from %d: %v", c, k)
				}
				if k, _ := l.query((c+table+n%2*3)<<bits, 2<<bits, OverlapActiveL1); k != OverlapActiveL1 {
					t.Errorf("half of the table at cluster %d: %v", c+table, k)
				}
				if n == 0 {
					continue
				}
				i := n - 1 - rng.Uint64N(min(n, 100))
				c = stepCluster(i)
				if k, _ := l.query((c+entered)<<bits, 1, overlapAllKinds); k != OverlapRefcountBlock {
					t.Errorf("cluster %d is %v after it was entered", c+entered, k)
				}
				if k, _ := l.query((c+removed)<<bits, 1, overlapAllKinds); k != 0 {
					t.Errorf("cluster %d is %v after it was removed", c+removed, k)
				}
			}
		}()
	}
	rng := rand.New(rand.NewPCG(9, 62))
	for i := range uint64(steps) {
		if t.Failed() {
			break
		}
		enter(OverlapRefcountBlock, stepCluster(i)+entered, 1)
		remove(OverlapRefcountBlock, stepCluster(i)+removed, 1)
		done.Store(i + 1)

		c := rng.Uint64N(clusters/64) * 64
		first := c + changed + rng.Uint64N(12)
		switch rng.IntN(8) {
		case 0, 1:
			enter(overlapSomeKinds(rng)&^OverlapSnapshotTable, first, 1+rng.Uint64N(12))
		case 2, 3:
			remove(overlapAllKinds, first, 1+rng.Uint64N(12))
		case 4:
			enter(OverlapInactiveL2, c+stable, 1)
		case 5:
			remove(OverlapInactiveL2, c+stable, 1)
		case 6:
			enter(OverlapActiveL1, c+table+2, 1)
		case 7:
			remove(OverlapActiveL1, c+table+2, 1)
		}
		if i%10 == 0 {
			l.enter(OverlapInactiveL1, 1<<40+rng.Uint64N(1<<10)<<30, 512)
		}
	}
	done.Store(steps)
	readers.Wait()
	if err := verifyOverlapList(l); err != nil {
		t.Error(err)
	}
	if got := l.memory(); got.suspect != suspect {
		t.Errorf("%+v", got)
	}
}

// TestOverlapListStaleSlot queries a window whose slot is being exchanged, or holds another window already, or again
// the same one: what was read before does not count then.
func TestOverlapListStaleSlot(t *testing.T) {
	l := newOverlapList(9, overlapLimits{})
	l.enter(OverlapActiveL2, 5<<9, 1)
	l.query(5<<9, 1, overlapAllKinds)
	s, g := &l.slots[0], l.group(0)
	if !l.free(9, 9, overlapAllKinds) {
		t.Fatal("cluster 9 is not free")
	}
	tag, ok := s.holds(0)
	if !ok || !s.confirm(tag) || !s.confirm(tag&^overlapUsed) {
		t.Fatalf("the slot has tag %#x", tag)
	}
	s.tag.Store(0)
	if l.free(9, 9, overlapAllKinds) || s.confirm(tag) || s.confirm(tag&^overlapUsed) {
		t.Error("cluster 9 is found free while its window goes")
	}
	s.tag.Store(tag + 1<<overlapTagBits)
	if l.free(9, 9, overlapAllKinds) || s.confirm(tag) || s.confirm(tag&^overlapUsed) {
		t.Error("cluster 9 is found free by another window's bits")
	}
	s.tag.Store(tag)
	l.mu.Lock()
	l.cacheLocked(0, g, 0)
	l.mu.Unlock()
	if s.confirm(tag) || s.confirm(tag&^overlapUsed) {
		t.Error("the window is taken for the one that was there before")
	}
	if !l.free(9, 9, overlapAllKinds) {
		t.Error("cluster 9 is not free when its window is back")
	}
}

// TestOverlapListHomes asks for windows in a row, as many as there is room for, and finds each in the slot that its
// index names; where that slot is in use, the window has another, and is found there too.
func TestOverlapListHomes(t *testing.T) {
	const size = 1 << (overlapWindowBits + 9)
	for _, n := range []uint64{1, 2, 3, 4, 5, 8, 470} {
		for _, start := range []uint64{0, 1, 31, 1000 * n} {
			l := newOverlapList(9, overlapLimits{cacheBytes: int64(n) * (overlapSlotBytes + overlapMapBytes)})
			for w := start; w < start+n; w++ {
				l.enter(OverlapActiveL2, w*size, 1)
				l.query(w*size, 1, overlapAllKinds)
			}
			if start > 0 && n&(n-1) != 0 {
				continue // only a power of two of them has no end that comes first
			}
			for w := start; w < start+n; w++ {
				if _, ok := l.slots[l.home(w)].holds(w); !ok {
					t.Errorf("%d slots: window %d is not in slot %d", n, w, l.home(w))
				}
			}
		}

		l := newOverlapList(9, overlapLimits{cacheBytes: int64(n) * (overlapSlotBytes + overlapMapBytes)})
		for i := range n {
			w := i << 20
			l.enter(OverlapActiveL2, w*size, 1)
			l.query(w*size, 1, overlapAllKinds)
			if c := w << overlapWindowBits; !l.free(c+4, c+4, overlapAllKinds) || l.free(c, c, overlapAllKinds) {
				t.Errorf("%d slots: window %d is not cached", n, w)
			}
		}
		if err := verifyOverlapList(l); err != nil {
			t.Error(err)
		}
	}
}

// TestOverlapListExchangeConcurrency asks for two windows that take each other's place in the cache all the time. No
// query may take the bits of one for those of the other.
func TestOverlapListExchangeConcurrency(t *testing.T) {
	l := newOverlapList(9, overlapLimits{cacheBytes: 1})
	const size = 1 << overlapWindowBits
	l.enter(OverlapActiveL2, (size-1)<<9, 1)
	l.enter(OverlapActiveL2, size<<9, 1)
	l.query(0, 1, overlapAllKinds)
	var done atomic.Bool
	var reader sync.WaitGroup
	reader.Add(1)
	go func() {
		defer reader.Done()
		for !done.Load() && !t.Failed() {
			if l.free(0, size-1, overlapAllKinds) || l.free(size, 2*size-1, overlapAllKinds) {
				t.Error("a window with metadata is found free")
			}
		}
	}()
	g := l.group(0)
	for i := range uint64(60000) {
		runtime.Gosched()
		l.mu.Lock()
		g.setState(i%2, overlapUncached)
		l.cacheLocked(0, g, 1-i%2)
		l.mu.Unlock()
	}
	done.Store(true)
	reader.Wait()
	if err := verifyOverlapList(l); err != nil {
		t.Error(err)
	}
}

// TestOverlapListDropConcurrency removes clusters from the middle of fragments while there is no memory for the two that
// would be left. They become suspect, and at no time is any of them found free.
func TestOverlapListDropConcurrency(t *testing.T) {
	const blocks = 400
	l := newOverlapList(9, overlapLimits{})
	l.enter(OverlapActiveL1, 0, blocks<<(overlapBlockBits+9))
	for w := range uint64(blocks >> (overlapWindowBits - overlapBlockBits)) {
		l.query(w<<(overlapWindowBits+9), 1, overlapAllKinds)
	}
	l.limit = 0
	var at, queries atomic.Uint64 // the block that is next, and how many times it was asked for
	var reader sync.WaitGroup
	reader.Add(1)
	go func() {
		defer reader.Done()
		for i := at.Load(); i < blocks && !t.Failed(); i = at.Load() {
			if c := i << overlapBlockBits; l.free(c, c, overlapAllKinds) {
				t.Errorf("cluster %d is found free", c)
			}
			queries.Add(1)
		}
	}()
	for i := range uint64(blocks) {
		for n := queries.Load(); queries.Load() == n && !t.Failed(); {
			runtime.Gosched()
		}
		l.remove(OverlapActiveL1, i<<(overlapBlockBits+9)+128<<9, 512)
		at.Store(i + 1)
	}
	reader.Wait()
	if got := l.memory().runs; got > blocks*3/2 {
		t.Errorf("%d fragments are left: none was dropped", got)
	}
}

// simulatedImage is an image of which only the places of its metadata exist: all of the disk is written in order,
// with 16-bit refcounts.
type simulatedImage struct {
	name        string
	clusterBits uint
	size        uint64 // bytes of the disk
}

// tables calls enter for all metadata in the order of the host file, with host clusters.
func (im simulatedImage) tables(enter func(kinds OverlapKinds, first, n uint64)) (clusters uint64) {
	var (
		perL2    = uint64(1) << (im.clusterBits - 3)
		perBlock = uint64(1) << (im.clusterBits - 1)
		data     = im.size >> im.clusterBits
		blocks   = data/perBlock + 1
		pos      = uint64(2)
	)
	// skip passes n clusters, and the refcount blocks among them, each in the first cluster that it describes.
	skip := func(n uint64, kinds OverlapKinds) {
		for n > 0 {
			k := min(n, perBlock-pos%perBlock)
			if kinds != 0 {
				enter(kinds, pos, k)
			}
			pos, n = pos+k, n-k
			if pos%perBlock == 0 {
				enter(OverlapRefcountBlock, pos, 1)
				pos++
			}
		}
	}
	enter(OverlapMainHeader, 0, 1)
	enter(OverlapRefcountBlock, 1, 1)
	skip(blocks*8>>im.clusterBits+1, OverlapRefcountTable)
	skip(data/perL2*8>>im.clusterBits+1, OverlapActiveL1)
	for range data / perL2 {
		skip(1, OverlapActiveL2)
		skip(perL2, 0)
	}
	return pos
}

// enterSimulated enters the image's metadata into a new list with the given limits.
func enterSimulated(im simulatedImage, limits overlapLimits) (l *overlapList, clusters uint64) {
	l = newOverlapList(im.clusterBits, limits)
	clusters = im.tables(func(kinds OverlapKinds, first, n uint64) {
		l.enter(kinds, first<<im.clusterBits, n<<im.clusterBits)
	})
	return l, clusters
}

// TestOverlapListMemory builds the metadata of images and compares what the list takes with the budget: 4 bytes for a
// run of metadata, 8 for a window of clusters, 256 kB of cached windows.
func TestOverlapListMemory(t *testing.T) {
	for _, tt := range []struct {
		im   simulatedImage
		list int64
	}{
		{simulatedImage{"1 TiB of 64 KiB clusters", 16, 1 << 40}, 24e3},
		{simulatedImage{"1 PiB of 64 KiB clusters", 16, 1 << 50}, 1024 * 24e3},
		{simulatedImage{"64 GiB of 512-byte clusters", 9, 64 << 30}, 170e6 / 16},
	} {
		t.Run(tt.im.name, func(t *testing.T) {
			if testing.Short() && tt.im.size > 1<<40 {
				t.Skip("a smaller one does in short mode")
			}
			l, clusters := enterSimulated(tt.im, overlapLimits{})
			for c := uint64(0); c < clusters; c += 1 << overlapWindowBits {
				l.query(c<<tt.im.clusterBits, 1, overlapAllKinds)
			}
			got := l.memory()
			t.Logf("%+v, %d clusters", got, clusters)
			budget := 4*got.runs + 8*int64(clusters>>overlapWindowBits+1)
			if got.list > min(tt.list, budget) || got.cache > 256e3 || got.suspect {
				t.Errorf("%+v, want at most %d and %d", got, min(tt.list, budget), int64(256e3))
			}
		})
	}
}

// TestOverlapListMemoryRandomOrder enters the metadata of an image in an order that has nothing to do with the host
// file, as tables that are found by the L1 table have, and removes half of it.
func TestOverlapListMemoryRandomOrder(t *testing.T) {
	im := simulatedImage{"", 9, 4 << 30}
	var runs []overlapRun
	im.tables(func(kinds OverlapKinds, first, n uint64) { runs = append(runs, overlapRun{first, n, kinds}) })
	rng := rand.New(rand.NewPCG(1, 63))
	rng.Shuffle(len(runs), func(i, j int) { runs[i], runs[j] = runs[j], runs[i] })
	l := newOverlapList(9, overlapLimits{})
	for _, r := range runs {
		l.enter(r.kinds, r.first<<9, r.n<<9)
	}
	if err := verifyOverlapList(l); err != nil {
		t.Fatal(err)
	}
	if got := l.memory(); got.list > 170_000_000/256 || got.suspect {
		t.Errorf("%+v", got)
	}
	for _, r := range runs[:len(runs)/2] {
		l.remove(r.kinds, r.first<<9, r.n<<9)
	}
	if err := verifyOverlapList(l); err != nil {
		t.Fatal(err)
	}
	if got := l.memory(); got.list > 170_000_000/512*3/2 {
		t.Errorf("%+v, half removed", got)
	}
}
