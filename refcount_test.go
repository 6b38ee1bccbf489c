package qcow2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
)

// naiveRefcounts unpacks refcounts of 2^order bits from p, bit by bit. qcow2 spec, "Refcount block entry":
// big-endian, and below eight bits the first one in the low bits of a byte.
func naiveRefcounts(p []byte, order uint) []uint64 {
	width := 1 << order
	var out []uint64
	if width >= 8 {
		for i := 0; i < len(p); i += width / 8 {
			v := uint64(0)
			for _, b := range p[i : i+width/8] {
				v = v<<8 | uint64(b)
			}
			out = append(out, v)
		}
		return out
	}
	for _, b := range p {
		for bit := 0; bit < 8; bit += width {
			v := uint64(0)
			for k := range width {
				v |= uint64(b>>(bit+k)&1) << k
			}
			out = append(out, v)
		}
	}
	return out
}

// sparseRefcounts returns n bytes of refcounts with runs of zeros and of others.
func sparseRefcounts(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := 0; i < n; {
		run := 1 + rng.IntN(40)
		kind := rng.IntN(4)
		for ; run > 0 && i < n; run, i = run-1, i+1 {
			switch kind {
			case 1:
				p[i] = 0xff
			case 2:
				p[i] = byte(rng.Uint32())
			case 3:
				p[i] = byte(1) << rng.UintN(8) & byte(rng.Uint32())
			}
		}
	}
	return p
}

// TestRefcountWidths reads and sets refcounts of all widths, and finds runs, beside naive versions.
func TestRefcountWidths(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 5))
	for order := uint(0); order <= 6; order++ {
		if got, want := maxRefcount(order), uint64(1)<<(1<<order)-1; order < 6 && got != want || order == 6 && got != ^uint64(0) {
			t.Errorf("order %d: at most %d", order, got)
		}
		for range 60 {
			p := sparseRefcounts(rng, 512)
			want := naiveRefcounts(p, order)
			n := uint64(len(want))
			for i, v := range want {
				if got := refcountAt(p, order, uint64(i)); got != v {
					t.Fatalf("order %d: refcount %d is %d, want %d", order, i, got, v)
				}
			}
			for range 60 {
				i := rng.Uint64N(n)
				count := rng.Uint64N(n - i + 1)
				zeros, others := uint64(0), uint64(0)
				for zeros < count && want[i+zeros] == 0 {
					zeros++
				}
				for others < count && want[i+others] != 0 {
					others++
				}
				if got := zeroRun(p, order, i, count); got != zeros {
					t.Fatalf("order %d: %d zeros from %d of %d, want %d\n% x", order, got, i, count, zeros, p)
				}
				if got := nonzeroRun(p, order, i, count); got != others {
					t.Fatalf("order %d: %d others from %d of %d, want %d\n% x", order, got, i, count, others, p)
				}
			}
			for range 30 {
				i, v := rng.Uint64N(n), rng.Uint64()&maxRefcount(order)
				setRefcountAt(p, order, i, v)
				want[i] = v
			}
			for i, v := range naiveRefcounts(p, order) {
				if v != want[i] {
					t.Fatalf("order %d: after setting, refcount %d is %d, want %d", order, i, v, want[i])
				}
			}
		}
	}
}

// TestNonzeroRunLanes tries every pair of neighbouring values at which a borrow could cross lanes.
func TestNonzeroRunLanes(t *testing.T) {
	for order := uint(0); order <= 6; order++ {
		perWord := uint64(64) >> order
		p := make([]byte, 16)
		for zero := range 2 * perWord {
			for _, v := range []uint64{1, maxRefcount(order), maxRefcount(order)>>1 + 1} {
				for i := range 2 * perWord {
					setRefcountAt(p, order, i, v)
				}
				setRefcountAt(p, order, zero, 0)
				if got := nonzeroRun(p, order, 0, 2*perWord); got != zero {
					t.Fatalf("order %d: run of %d up to the zero at %d", order, got, zero)
				}
				if got := zeroRun(p, order, zero, 2*perWord-zero); got != 1 {
					t.Fatalf("order %d: %d zeros at %d", order, got, zero)
				}
			}
		}
	}
}

// TestSizeRefcounts checks that what is asked for is enough, and the least that is.
func TestSizeRefcounts(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 6))
	eachGeometry(func(name string, g geometry) {
		if g.extendedL2 {
			return
		}
		perBlock, perTable := uint64(1)<<g.refBlockBits, g.clusterSize/8
		// enough reports whether blocks and tableClusters describe everything, themselves included.
		enough := func(first, clusters, blocks, tableClusters uint64) bool {
			return blocks*perBlock >= clusters+blocks+tableClusters && tableClusters*perTable >= first+blocks
		}
		for range 40 {
			first := rng.Uint64N(1 << rng.UintN(14))
			clusters := rng.Uint64N(1 << rng.UintN(24))
			if rng.IntN(3) == 0 {
				clusters = rng.Uint64N(5) * perBlock
				clusters -= min(clusters, rng.Uint64N(6))
			}
			s, err := g.sizeRefcounts(first, clusters, false)
			if err != nil {
				// Only where the table really is too long.
				if need := first + clusters/perBlock; need*8 < maxRefTableBytes/2 || !errors.Is(err, ErrTooLarge) {
					t.Fatalf("%s: %d clusters after %d blocks: %v", name, clusters, first, err)
				}
				continue
			}
			if !enough(first, clusters, s.blocks, s.tableClusters) {
				t.Fatalf("%s: %d clusters after %d blocks: %+v is not enough", name, clusters, first, s)
			}
			if s.blocks > 0 && enough(first, clusters, s.blocks-1, s.tableClusters) || s.tableClusters > 1 && enough(first, clusters, s.blocks, s.tableClusters-1) {
				t.Fatalf("%s: %d clusters after %d blocks: %+v is too much", name, clusters, first, s)
			}
			wide, err := g.sizeRefcounts(first, clusters, true)
			if err != nil {
				t.Fatal(err)
			}
			if !enough(first, clusters, wide.blocks, wide.tableClusters) || wide.tableClusters < s.tableClusters {
				t.Fatalf("%s: %d clusters after %d blocks: with slack %+v", name, clusters, first, wide)
			}
			full := wide.tableClusters<<g.clusterBits >= maxRefTableBytes
			if !full && wide.tableClusters*perTable*2 < 3*(first+wide.blocks)-2 {
				t.Fatalf("%s: %d clusters after %d blocks: %+v has no slack", name, clusters, first, wide)
			}
		}
	})
}

// allocatorModel is an allocator beside a plain array of refcounts.
type allocatorModel struct {
	t       *testing.T
	a       *allocator
	refs    map[uint64]uint64 // of clusters that are not 0
	top     uint64            // no cluster at or above it has a refcount
	payload map[uint64]uint64 // host offset and length of compressed payloads, those included that
	dropped map[uint64]bool   // were dropped and not released yet
	runs    []clusterRun      // allocated by alloc
}

// newAllocatorModel returns the allocator of a new image.
func newAllocatorModel(t *testing.T, s Storage, cluster, bits int, small bool) *allocatorModel {
	t.Helper()
	img, err := CreateStorage(s, 1<<20, &CreateOptions{ClusterSize: cluster, RefcountBits: bits, Overwrite: true, Open: openSmall(small)})
	if err != nil {
		t.Fatal(err)
	}
	m := &allocatorModel{t: t, a: img.m.alloc, refs: make(map[uint64]uint64), payload: make(map[uint64]uint64), dropped: make(map[uint64]bool)}
	for ci := uint64(0); m.a.covered(ci); ci++ {
		if v := m.stored(ci); v != 0 {
			m.refs[ci], m.top = v, ci+1
		}
	}
	return m
}

// stored returns the allocator's refcount.
func (m *allocatorModel) stored(ci uint64) uint64 {
	m.t.Helper()
	v, err := m.a.refcount(ci)
	if err != nil {
		m.t.Fatal(err)
	}
	return v
}

// adopt takes over what the allocator made for itself since the last call: blocks and tables, in clusters
// that were free.
func (m *allocatorModel) adopt() {
	m.t.Helper()
	own := make(map[uint64]bool)
	for i := range m.a.table.n {
		if off := m.a.table.load(i); off != 0 {
			own[off>>m.a.g.clusterBits] = true
		}
	}
	for i := range m.a.tableClusters {
		own[m.a.tableOff>>m.a.g.clusterBits+i] = true
	}
	for ci := range own {
		switch m.refs[ci] {
		case 0:
			m.refs[ci], m.top = 1, max(m.top, ci+1)
		case 1:
		default:
			m.t.Fatalf("metadata cluster %d has refcount %d", ci, m.refs[ci])
		}
	}
}

// compare compares all refcounts, and checks the hint for single clusters.
func (m *allocatorModel) compare(when string) {
	m.t.Helper()
	for ci := range m.top + 200 {
		if got := m.stored(ci); got != m.refs[ci] {
			m.t.Fatalf("%s: cluster %d has refcount %d, want %d", when, ci, got, m.refs[ci])
		}
		if ci < m.a.one && m.refs[ci] == 0 {
			m.t.Fatalf("%s: cluster %d is free, below the hint %d", when, ci, m.a.one)
		}
	}
}

// alloc allocates and checks that what it got was free.
func (m *allocatorModel) alloc(n uint64) error {
	m.t.Helper()
	r, err := m.a.alloc(n)
	if err != nil {
		m.adopt()
		return err
	}
	if r.n < 1 || r.n > n {
		m.t.Fatalf("asked for %d clusters, got %+v", n, r)
	}
	for ci := r.first; ci < r.first+r.n; ci++ {
		if m.refs[ci] != 0 {
			m.t.Fatalf("%+v holds cluster %d, which has refcount %d", r, ci, m.refs[ci])
		}
		m.refs[ci] = 1
	}
	m.top = max(m.top, r.first+r.n)
	m.adopt()
	if n == 1 {
		// First fit: nothing free lies below, but what the new block's own cluster skipped.
		for ci := range r.first {
			if m.refs[ci] == 0 {
				m.t.Fatalf("got cluster %d, while %d is free", r.first, ci)
			}
		}
	}
	m.runs = append(m.runs, r)
	return nil
}

// pack packs a payload and checks that it overlaps no other, nor a cluster that is somebody else's.
func (m *allocatorModel) pack(n uint64) error {
	m.t.Helper()
	off, err := m.a.pack(n)
	if err != nil {
		m.adopt()
		return err
	}
	for o, k := range m.payload {
		if off < o+k && o < off+n {
			m.t.Fatalf("%d bytes at %#x overlap the %d at %#x", n, off, k, o)
		}
	}
	first, last := off>>m.a.g.clusterBits, (off+n-1)>>m.a.g.clusterBits
	for ci := first; ci <= last; ci++ {
		users := uint64(0)
		for o, k := range m.payload {
			if o>>m.a.g.clusterBits <= ci && ci <= (o+k-1)>>m.a.g.clusterBits {
				users++
			}
		}
		if m.refs[ci] != users {
			m.t.Fatalf("packed into cluster %d with refcount %d, of which %d are payloads", ci, m.refs[ci], users)
		}
		m.refs[ci]++
		if m.refs[ci] > m.a.max {
			m.t.Fatalf("cluster %d has %d references", ci, m.refs[ci])
		}
		m.top = max(m.top, ci+1)
	}
	m.payload[off] = n
	m.adopt()
	return nil
}

// drop drops a run or a payload. Nothing becomes free before release.
func (m *allocatorModel) drop(rng *rand.Rand) {
	if len(m.runs) > 0 && rng.IntN(2) == 0 {
		i := rng.IntN(len(m.runs))
		m.a.free(m.runs[i])
		m.runs = append(m.runs[:i], m.runs[i+1:]...)
		return
	}
	for _, off := range sortedKeys(m.payload) {
		if !m.dropped[off] && rng.IntN(len(m.payload)) == 0 {
			first, last := off>>m.a.g.clusterBits, (off+m.payload[off]-1)>>m.a.g.clusterBits
			m.a.free(clusterRun{first: first, n: last - first + 1})
			m.dropped[off] = true
			return
		}
	}
}

// sortedKeys returns the keys of a map in order, so that a run repeats.
func sortedKeys(m map[uint64]uint64) []uint64 {
	keys := make([]uint64, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	for i := range keys {
		for j := i; j > 0 && keys[j-1] > keys[j]; j-- {
			keys[j-1], keys[j] = keys[j], keys[j-1]
		}
	}
	return keys
}

// release lowers what was dropped.
func (m *allocatorModel) release() {
	m.t.Helper()
	for off := range m.dropped {
		delete(m.payload, off)
	}
	clear(m.dropped)
	runs := m.a.freed
	m.a.freed = nil
	m.a.waiting.Store(0)
	for _, r := range runs {
		for ci := r.first; ci < r.first+r.n; ci++ {
			if m.refs[ci]--; m.refs[ci] == 0 {
				delete(m.refs, ci)
			}
		}
	}
	if rest, err := m.a.release(append([]freedRun(nil), runs...)); err != nil || rest != nil {
		m.t.Fatalf("release: %v, %v left", err, rest)
	}
}

// TestAllocator allocates, packs, drops and releases at random, beside a plain array: nothing is handed
// out twice, packing shares a cluster up to the largest refcount, single clusters are the first that fit.
func TestAllocator(t *testing.T) {
	for _, bits := range []int{1, 2, 4, 8, 16, 32, 64} {
		for _, small := range []bool{false, true} {
			for _, device := range []bool{false, true} {
				t.Run(fmt.Sprintf("bits=%d small-cache=%v device=%v", bits, small, device), func(t *testing.T) {
					rng := rand.New(rand.NewPCG(uint64(bits), 7))
					var s Storage = NewMemoryStorage()
					if device {
						s = NewMemoryDevice(1000 * 512)
					}
					m := newAllocatorModel(t, s, 512, bits, small)
					full := 0
					for i := range 1500 {
						var err error
						switch k := rng.IntN(20); {
						case k < 5:
							err = m.alloc(1)
						case k < 8:
							err = m.alloc(1 + rng.Uint64N(40))
						case k < 13:
							err = m.pack(1 + rng.Uint64N(511))
						case k < 19:
							m.drop(rng)
						default:
							m.release()
						}
						if err != nil {
							if !device || !errors.Is(err, syscall.ENOSPC) {
								t.Fatal(err)
							}
							full++
							for ci := range m.a.limit {
								if m.refs[ci] == 0 {
									t.Fatalf("%v, while cluster %d is free", err, ci)
								}
							}
							m.release()
						}
						if i%25 == 0 {
							m.compare(fmt.Sprintf("operation %d", i))
						}
					}
					m.release()
					m.compare("at the end")
					if device && full == 0 {
						t.Errorf("the device was never full: %d clusters", m.top)
					}
				})
			}
		}
	}
}

// TestAllocatorOverflow refuses a reference above the width, and leaves everything as it was.
func TestAllocatorOverflow(t *testing.T) {
	for _, bits := range []int{1, 2, 4, 8} {
		m := newAllocatorModel(t, NewMemoryStorage(), 512, bits, false)
		if err := m.alloc(8); err != nil {
			t.Fatal(err)
		}
		r := m.runs[0]
		// All but the last cluster of the run have room for one more; the last is at its maximum.
		for range m.a.max - 1 {
			if err := m.a.raise(clusterRun{first: r.first + 7, n: 1}); err != nil {
				t.Fatal(err)
			}
			m.refs[r.first+7]++
		}
		if bits == 1 {
			r = clusterRun{first: r.first + 7, n: 1}
		}
		if err := m.a.raise(r); !errors.Is(err, ErrTooLarge) {
			t.Fatalf("%d bits: %v, want ErrTooLarge", bits, err)
		}
		m.compare("after the refusal")
		// Below zero is a finding, not a wrap-around.
		var corrupt *CorruptError
		if _, err := m.a.add(clusterRun{first: m.top + 3, n: 1}, -1); !errors.As(err, &corrupt) {
			t.Fatalf("%d bits: %v, want a *CorruptError", bits, err)
		}
		m.compare("after lowering 0")
	}
}

// TestAllocatorWritesBack checks that what the disk holds after writeBack is what memory held, in caches of
// any size.
func TestAllocatorWritesBack(t *testing.T) {
	for _, small := range []bool{false, true} {
		s := NewMemoryStorage()
		m := newAllocatorModel(t, s, 512, 16, small)
		rng := rand.New(rand.NewPCG(1, 8))
		for range 300 {
			if err := m.alloc(1 + rng.Uint64N(20)); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.a.writeBack(); err != nil {
			t.Fatal(err)
		}
		block := make([]byte, 512)
		for ci := uint64(0); m.a.covered(ci); ci += 256 {
			if _, err := s.ReadAt(block, int64(m.a.table.load(ci/256))); err != nil {
				t.Fatal(err)
			}
			for i, v := range naiveRefcounts(block, 4) {
				if v != m.refs[ci+uint64(i)] {
					t.Fatalf("small %v: cluster %d has refcount %d on disk, want %d", small, ci+uint64(i), v, m.refs[ci+uint64(i)])
				}
			}
		}
	}
}
