package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// cacheModel is a table cache beside the words that each slice should have, and those on the host.
type cacheModel struct {
	t     *testing.T
	c     *tableCache
	h     *hostFile
	n     uint64           // bytes of a slice
	words map[int][]uint64 // slice index -> now
	disk  map[int][]uint64 // as of the last cut that was written
	dirty map[int]bool
}

// key returns the key of slice i of image 1.
func (m *cacheModel) key(i int) sliceKey { return makeSliceKey(1, uint64(i)*m.n) }

// checkDisk compares slice i on the host with words.
func (m *cacheModel) checkDisk(i int, words []uint64) {
	m.t.Helper()
	p := make([]byte, m.n)
	if err := m.h.readFull(p, uint64(i)*m.n); err != nil {
		m.t.Fatal(err)
	}
	for j, w := range words {
		if got := binary.BigEndian.Uint64(p[8*j:]); got != w {
			m.t.Fatalf("slice %d, word %d is %#x on the host, want %#x", i, j, got, w)
		}
	}
}

// check compares a slice that was handed out.
func (m *cacheModel) check(i int, s *l2Slice) {
	m.t.Helper()
	if s.key != m.key(i) || s.off != uint64(i)*m.n || !slices.Equal(s.words, m.words[i]) {
		m.t.Fatalf("slice %d at %#x: words differ from the model's", i, s.off)
	}
}

// TestTableCache changes slices at random, with cuts that succeed and fail, and changes while a cut is
// written. A slice always reads as it was left last; a cut writes what was there when it was taken; a
// dirty slice is never pushed out.
func TestTableCache(t *testing.T) {
	for _, capacity := range []int64{0, 1, 2, 3, 8, 16, 100} {
		t.Run(fmt.Sprintf("slices=%d", capacity), func(t *testing.T) {
			const bits, count = 9, 40
			rng := rand.New(rand.NewPCG(uint64(capacity), 9))
			m := &cacheModel{
				t: t, c: newTableCache(capacity<<bits, bits), h: newHostFile(NewMemoryStorage(), 0, false), n: 1 << bits,
				words: make(map[int][]uint64), disk: make(map[int][]uint64), dirty: make(map[int]bool),
			}
			if got := int64(len(m.c.sets)); got > max(capacity, 2) {
				t.Fatalf("room for %d slices", got)
			}
			for i := range count {
				m.words[i], m.disk[i] = make([]uint64, m.n/8), make([]uint64, m.n/8)
			}
			var cut []*l2Slice
			atCut := make(map[int][]uint64)
			fulls, changes, shadows := 0, 0, 0
			index := func(s *l2Slice) int { return int(s.off / m.n) }
			for range 20000 {
				i := rng.IntN(count)
				switch k := rng.IntN(20); {
				case k < 14:
					s, err := m.c.get(m.key(i), m.h, uint64(i)*m.n, m.n)
					if err == errCacheFull {
						fulls++
						for _, p := range ptrs(m.c, m.key(i)) {
							if p == nil || !p.dirty && !p.cut {
								t.Fatalf("the cache says it is full, with room for slice %d", i)
							}
						}
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					m.check(i, s)
					if k < 7 {
						j, v := rng.IntN(len(s.words)), rng.Uint64()
						if !m.c.change(s, func(words []uint64) { words[j] = v }) {
							t.Fatal("a slice that was just got is not resident")
						}
						m.words[i][j], m.dirty[i] = v, true
						changes++
						if s.shadow != nil {
							shadows++
						}
					}
				case k < 16 && cut == nil:
					cut = m.c.cutDirty(1)
					clear(atCut)
					for _, s := range cut {
						atCut[index(s)] = slices.Clone(m.words[index(s)])
						if !m.dirty[index(s)] {
							t.Fatalf("slice %d is in the cut without a change", index(s))
						}
						delete(m.dirty, index(s))
					}
					if len(m.dirty) > 0 {
						t.Fatalf("the cut left %d dirty slices", len(m.dirty))
					}
				case k < 18 && cut != nil:
					written := rng.IntN(4) > 0
					for _, s := range cut {
						if !written && rng.IntN(2) == 0 {
							continue
						}
						if err := m.c.writeCut(s, m.h); err != nil {
							t.Fatal(err)
						}
						m.checkDisk(index(s), atCut[index(s)])
						m.disk[index(s)] = atCut[index(s)]
					}
					m.c.endCut(cut, written)
					if !written {
						for i := range atCut {
							m.dirty[i] = true
						}
					}
					cut = nil
				case k == 18 && cut == nil:
					// The table is gone: its changes are, too.
					m.c.drop(m.key(i))
					m.words[i] = slices.Clone(m.disk[i])
					delete(m.dirty, i)
				case k == 19 && cut == nil:
					// A new table was written whole.
					if err := m.h.zero(useL2, uint64(i)*m.n, m.n); err != nil {
						t.Fatal(err)
					}
					m.words[i], m.disk[i] = make([]uint64, m.n/8), make([]uint64, m.n/8)
					m.c.fresh(m.key(i), uint64(i)*m.n, m.n)
					delete(m.dirty, i)
				}
				if len(m.c.dirty) != len(m.dirty) {
					t.Fatalf("%d slices are dirty, want %d", len(m.c.dirty), len(m.dirty))
				}
			}
			if changes == 0 || shadows == 0 || capacity < 16 && fulls == 0 {
				t.Errorf("%d changes, %d of slices in a cut, %d times full", changes, shadows, fulls)
			}
		})
	}
}

// ptrs returns the slices in the places where key can stand.
func ptrs(c *tableCache, key sliceKey) []*l2Slice {
	var out []*l2Slice
	set := c.set(key)
	for i := range set {
		out = append(out, set[i].Load())
	}
	return out
}

// TestTableCacheImages checks that a cut takes the slices of one image only, and that slices at the same
// offset of two images are told apart.
func TestTableCacheImages(t *testing.T) {
	c := newTableCache(64<<9, 9)
	h := newHostFile(NewMemoryStorage(), 0, false)
	for id := uint16(1); id <= 3; id++ {
		s, err := c.get(makeSliceKey(id, 512), h, 512, 512)
		if err != nil {
			t.Fatal(err)
		}
		c.change(s, func(words []uint64) { words[0] = uint64(id) })
	}
	cut := c.cutDirty(2)
	if len(cut) != 1 || cut[0].words[0] != 2 || len(c.dirty) != 2 {
		t.Fatalf("the cut of image 2 has %d slices and leaves %d", len(cut), len(c.dirty))
	}
	c.endCut(cut, true)
	for id := uint16(1); id <= 3; id++ {
		if s := c.lookup(makeSliceKey(id, 512)); s == nil || s.words[0] != uint64(id) {
			t.Errorf("image %d: %v", id, s)
		}
	}
}

// TestTableCacheReadError hands an error of the host to who asked, and tries again the next time.
func TestTableCacheReadError(t *testing.T) {
	var f crashtest.Faults
	h := newHostFile(unlockedStorage{f.Wrap("image", crashtest.NewDisk(make([]byte, 4096)))}, 4096, false)
	c := newTableCache(8<<9, 9)
	f.Set(crashtest.Fault{Err: syscall.EIO})
	if _, err := c.get(makeSliceKey(1, 512), h, 512, 512); !errors.Is(err, syscall.EIO) {
		t.Fatalf("%v, want EIO", err)
	}
	if s, err := c.get(makeSliceKey(1, 512), h, 512, 512); err != nil || len(s.words) != 64 {
		t.Fatalf("the second time: %v", err)
	}
}

// unlockedStorage makes a Storage of one of package crashtest.
type unlockedStorage struct{ crashtest.Storage }

// Lock implements Storage: it grants every role.
func (unlockedStorage) Lock(LockRole) error { return nil }

// TestTableCacheUsesItsRoom reads half as many slices as the cache has places, twice, and wants the second
// pass to find nearly all of them: slices go to empty places before any is pushed out.
func TestTableCacheUsesItsRoom(t *testing.T) {
	s := NewMemoryStorage()
	h := newHostFile(s, 0, false)
	c := newTableCache(4<<20, tableSliceBits)
	const n = 512
	misses := [2]int{}
	for pass := range misses {
		for i := range uint64(n) {
			off := i << 16 // as L2 tables of 64 KiB lie
			key := makeSliceKey(1, off)
			if c.lookup(key) == nil {
				misses[pass]++
			}
			if _, err := c.get(key, h, off, 1<<tableSliceBits); err != nil {
				t.Fatal(err)
			}
		}
	}
	if misses[0] != n || misses[1] > n/20 {
		t.Errorf("misses of the two passes: %d, want %d and at most %d", misses, n, n/20)
	}
}
