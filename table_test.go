package qcow2

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// TestTable reads tables of many sizes from a file that may end before them, changes and grows them, and
// compares them with a plain slice.
func TestTable(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 4))
	for _, n := range []uint64{0, 1, 63, 511, 512, 513, 1024, 5000} {
		for _, fileSize := range []uint64{0, 1000, 4096 + 8, 8*n + 4096, 1 << 20} {
			s := NewMemoryStorage()
			const off = 4096
			want := make([]uint64, n)
			raw := make([]byte, fileSize)
			for i := range raw {
				if i/4096%2 == 1 { // some pieces of zeros
					raw[i] = byte(rng.Uint32())
				}
			}
			if _, err := s.WriteAt(raw, 0); err != nil {
				t.Fatal(err)
			}
			padded := append(raw, make([]byte, off+8*n)...)
			for i := range want {
				want[i] = binary.BigEndian.Uint64(padded[off+8*i:])
			}
			tab, err := readTable(newHostFile(s, int64(fileSize), false), off, n, fileSize)
			if err != nil {
				t.Fatal(err)
			}
			same := func(when string) {
				t.Helper()
				for i := range want {
					if got := tab.load(uint64(i)); got != want[i] {
						t.Fatalf("%d entries, file of %d, %s: entry %d is %#x, want %#x", n, fileSize, when, i, got, want[i])
					}
				}
				for _, i := range []uint64{uint64(len(want)), uint64(len(want)) + 511, ^uint64(0)} {
					if got := tab.load(i); got != 0 {
						t.Fatalf("entry %d past the end is %#x", i, got)
					}
				}
				for _, first := range []uint64{0, 1, n / 2, n} {
					p := make([]byte, 8*70)
					for i := range p {
						p[i] = 0xee
					}
					tab.encode(p, first)
					for i := range uint64(70) {
						w := uint64(0)
						if first+i < uint64(len(want)) {
							w = want[first+i]
						}
						if got := binary.BigEndian.Uint64(p[8*i:]); got != w {
							t.Fatalf("%s: encoded entry %d is %#x, want %#x", when, first+i, got, w)
						}
					}
				}
			}
			same("as read")
			for range min(n, 100) {
				i := rng.Uint64N(n)
				want[i] = rng.Uint64() >> (rng.Uint32N(2) * 63)
				tab.store(i, want[i])
			}
			same("changed")
			grown := tab.grow(n + 700)
			tab, want = grown, append(want, make([]uint64, 700)...)
			same("grown")
			tab.store(n+699, 7)
			want[n+699] = 7
			same("changed after growing")
		}
	}
}

// TestTableCost is about what a table past the end of the file costs: one pointer per piece.
func TestTableCost(t *testing.T) {
	tab, err := readTable(newHostFile(NewMemoryStorage(), 0, false), 65536, 4<<20, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range tab.chunks {
		if tab.chunks[i].Load() != nil {
			t.Fatalf("piece %d takes memory", i)
		}
	}
}
