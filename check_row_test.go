package qcow2

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMarkOnes compares markOnes with a look at every single cluster, for every width of refcounts.
func TestMarkOnes(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 66))
	for order := range uint(7) {
		perWord := uint64(64) >> order
		for range 200 {
			block := make([]byte, 512)
			for i := range 8 * uint64(len(block)) >> order {
				setRefcountAt(block, order, i, 1)
			}
			words := make([]uint16, rng.IntN(3*int(perWord)+1))
			for i := range words {
				words[i] = 1 | [...]uint16{0, refCopied, refStoredOne}[rng.IntN(3)]
			}
			first := rng.Uint64N(perWord+1) / 2 * 2
			if n := len(words); n > 0 && rng.IntN(4) > 0 {
				switch i := rng.IntN(n); rng.IntN(4) {
				case 0:
					words[i] = 2
				case 1:
					words[i] |= refPlain
				case 2:
					words[i] = 0
				default:
					setRefcountAt(block, order, first+uint64(i), 0)
				}
			}
			want, n := slices.Clone(words), uint64(0)
			for first%perWord == 0 && n+perWord <= uint64(len(words)) {
				fit := true
				for i := n; i < n+perWord; i++ {
					fit = fit && refcountAt(block, order, first+i) == 1 && words[i]&refCountMask == 1 && words[i]&refPlain == 0
				}
				if !fit {
					break
				}
				for range perWord {
					want[n] |= refStoredOne
					n++
				}
			}
			if got := markOnes(block, order, first, words); got != n {
				t.Fatalf("order %d, %d clusters from %d on: %d, want %d", order, len(words), first, got, n)
			}
			if diff := cmp.Diff(want, words); diff != "" {
				t.Fatalf("order %d: words (-want +got):\n%s", order, diff)
			}
		}
	}
}

// TestRefsInRow breaks a row of L2 entries in every way, at every place.
func TestRefsInRow(t *testing.T) {
	const cluster, n = 64 << 10, 6
	entry := func(i int) uint64 { return flagCopied | uint64(i+9)*cluster }
	for _, row := range []struct {
		name    string
		breakAt func(p []byte, words []uint16, i int)
	}{
		{"nowhere", func([]byte, []uint16, int) {}},
		{"no entry", func(p []byte, _ []uint16, i int) { binary.BigEndian.PutUint64(p[8*i:], 0) }},
		{"another place", func(p []byte, _ []uint16, i int) { binary.BigEndian.PutUint64(p[8*i:], entry(i+2)) }},
		{"without COPIED", func(p []byte, _ []uint16, i int) { binary.BigEndian.PutUint64(p[8*i:], entry(i)&^flagCopied) }},
		{"reserved bit", func(p []byte, _ []uint16, i int) { binary.BigEndian.PutUint64(p[8*i:], entry(i)|2) }},
		{"too many references", func(_ []byte, words []uint16, i int) { words[i] = 6 | refPlain }},
	} {
		for at := range n {
			p, words := make([]byte, 8*n), make([]uint16, n)
			for i := range n {
				binary.BigEndian.PutUint64(p[8*i:], entry(i))
				words[i] = uint16(i) | refStoredOne
			}
			row.breakAt(p, words, at)
			want := slices.Clone(words)
			wantN := at
			if row.name == "nowhere" {
				wantN = n
			}
			for i := range wantN {
				want[i] = uint16(i+3) | refStoredOne | refCopied
			}
			got := refsInRow(p, entry(-1), cluster, words, 3, n-1, refCopied)
			if diff := cmp.Diff(want, words); got != wantN || diff != "" {
				t.Errorf("%s at %d: %d, want %d; words (-want +got):\n%s", row.name, at, got, wantN, diff)
			}
		}
	}
	if got := refsInRow(nil, entry(0), cluster, make([]uint16, 2), 1, 9, 0); got != 0 {
		t.Errorf("at the end of the table: %d", got)
	}
}
