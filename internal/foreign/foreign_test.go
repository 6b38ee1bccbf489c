package foreign

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// TestBitRun compares runs of bits with a walk bit by bit.
func TestBitRun(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		b := make([]byte, 1+rng.IntN(40))
		fill := byte(0)
		for i := range b {
			if rng.IntN(6) == 0 {
				fill = ^fill
			}
			b[i] = fill
			if rng.IntN(8) == 0 {
				b[i] ^= 1 << rng.IntN(8)
			}
		}
		bit := func(i int) bool { return b[i/8]&(0x80>>(i%8)) != 0 }
		for i := range 8 * len(b) {
			want := 1
			for i+want < 8*len(b) && bit(i+want) == bit(i) {
				want++
			}
			if set, n := bitRun(b, i); set != bit(i) || n != want {
				t.Fatalf("bit %d of %x: %v, %d; want %v, %d", i, b, set, n, bit(i), want)
			}
		}
	}
}

// TestTables reads a table through caches of all sizes. Its pieces are kept as far as the limit goes, and no more of it
// than is asked for is read.
func TestTables(t *testing.T) {
	const base, entries = 1000, 100_000
	b := make([]byte, base+entries)
	rng := rand.New(rand.NewPCG(2, 2))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	for _, tt := range []struct {
		limit    int64
		readings int // of the whole table, twice, in order: at most
	}{{0, 50}, {1, 50}, {5 * pieceSize, 50}, {1 << 20, 35}} {
		r := &countingReader{r: bytes.NewReader(b)}
		tab := newTables(&file{r: r, size: int64(len(b))}, entries, Limits{TableBytes: tt.limit})
		if most := max(ways*pieceSize, tt.limit+ways*pieceSize); int64(len(tab.buckets))*ways*pieceSize > most {
			t.Errorf("limit %d: %d buckets", tt.limit, len(tab.buckets))
		}
		for range 2 {
			for at := uint64(0); at < entries; {
				p, err := tab.at(base, at)
				if err != nil {
					t.Fatal(err)
				}
				if len(p) == 0 || !bytes.Equal(p, b[base+at:][:len(p)]) {
					t.Fatalf("limit %d: byte %d: not what is there", tt.limit, at)
				}
				at += uint64(len(p))/2 + 1
			}
		}
		if r.n > tt.readings {
			t.Errorf("limit %d: %d readings, want at most %d", tt.limit, r.n, tt.readings)
		}
	}
}

// countingReader counts readings.
type countingReader struct {
	r *bytes.Reader
	n int
}

// ReadAt implements io.ReaderAt.
func (r *countingReader) ReadAt(p []byte, off int64) (int, error) {
	r.n++
	return r.r.ReadAt(p, off)
}
