package qcow2

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestEntryKind goes through the kinds of standard entries. qcow2 spec, "Standard Cluster Descriptor".
func TestEntryKind(t *testing.T) {
	plain := entryRules{geometry: newGeometry(16, 4, false)}
	v2, external := plain, plain
	v2.version2, external.external = true, true
	tests := []struct {
		name  string
		rules entryRules
		word  uint64
		want  clusterKind
		held  clusterRun
		owns  bool // holds a host cluster for plain data
	}{
		{"nothing", plain, 0, kindUnallocated, clusterRun{}, false},
		{"data", plain, 0x50000 | flagCopied, kindNormal, clusterRun{5, 1}, true},
		{"shared data", plain, 0x50000, kindNormal, clusterRun{5, 1}, true},
		{"zero", plain, 1, kindZeroPlain, clusterRun{}, false},
		{"zero with a cluster", plain, 0x50001 | flagCopied, kindZeroAlloc, clusterRun{5, 1}, true},
		{"highest offset", plain, 0x00ffffffffff0000, kindNormal, clusterRun{0xffffffffff, 1}, true},
		{"reserved bits", plain, 0x3f000000000001fe, kindUnallocated, clusterRun{}, false},
		{"misaligned", plain, 0x50200, kindInvalid, clusterRun{5, 1}, true},
		{"version 2 data", v2, 0x50000, kindNormal, clusterRun{5, 1}, true},
		{"version 2 zero", v2, 1, kindInvalid, clusterRun{}, false},
		{"version 2 zero with a cluster", v2, 0x50001, kindInvalid, clusterRun{5, 1}, true},
		{"compressed", plain, flagCompressed | 0x51234, kindCompressed, clusterRun{5, 1}, false},
		{"data file", external, 0x50000 | flagCopied, kindNormal, clusterRun{}, true},
		{"data file at 0", external, flagCopied, kindNormal, clusterRun{}, true},
		{"data file zero at 0", external, flagCopied | 1, kindZeroPlain, clusterRun{}, true},
		{"data file without", external, 0, kindUnallocated, clusterRun{}, false},
		{"data file zero", external, 1, kindZeroPlain, clusterRun{}, false},
		{"data file compressed", external, flagCompressed | 0x51234, kindInvalid, clusterRun{5, 1}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := l2Entry{word: tt.word}
			if got := tt.rules.kind(e, 0); got != tt.want {
				t.Errorf("kind %d, want %d", got, tt.want)
			}
			if k, n := tt.rules.kindRun(e, 0); k != tt.want || n != 1 {
				t.Errorf("run of kind %d, %d; want %d, 1", k, n, tt.want)
			}
			if got := tt.rules.hasCluster(e); got != tt.owns {
				t.Errorf("hasCluster %v, want %v", got, tt.owns)
			}
			if diff := cmp.Diff(tt.held, tt.rules.held(e), cmp.AllowUnexported(clusterRun{})); diff != "" {
				t.Errorf("held (-want +got):\n%s", diff)
			}
		})
	}
}

// TestSubclusterKind compares the kinds of subclusters, and their runs, with the table of the
// specification. qcow2 spec, "Extended L2 Entries".
func TestSubclusterKind(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	r := entryRules{geometry: newGeometry(16, 4, true)}
	// naive is one row of the specification's table.
	naive := func(alloc, zero, has bool) clusterKind {
		switch {
		case alloc && zero, alloc && !has:
			return kindInvalid
		case alloc:
			return kindNormal
		case zero && has:
			return kindZeroAlloc
		case zero:
			return kindZeroPlain
		}
		return kindUnallocated
	}
	for range 3000 {
		e := l2Entry{bitmap: rng.Uint64() & rng.Uint64()}
		if rng.IntN(3) == 0 { // long runs
			e.bitmap = rng.Uint64() << rng.UintN(64) >> rng.UintN(64)
		}
		if rng.IntN(2) == 0 {
			e.word = 0x70000 | flagCopied
		}
		var kinds [subclustersPerCluster]clusterKind
		for i := range kinds {
			kinds[i] = naive(e.bitmap>>i&1 != 0, e.bitmap>>(32+i)&1 != 0, e.word != 0)
		}
		for i := range kinds {
			if got := r.kind(e, uint64(i)); got != kinds[i] {
				t.Fatalf("%#x, %#x: subcluster %d is %d, want %d", e.word, e.bitmap, i, got, kinds[i])
			}
			n := 1
			for i+n < len(kinds) && kinds[i+n] == kinds[i] {
				n++
			}
			k, got := r.kindRun(e, uint64(i))
			if k == kindInvalid && got < uint64(n) {
				n = int(got) // none of it can be used, so that its length means nothing
			}
			if k != kinds[i] || got != uint64(n) || n == 0 {
				t.Fatalf("%#x, %#x: run from %d is %d of %d, want %d of %d", e.word, e.bitmap, i, k, got, kinds[i], n)
			}
		}
	}
	packed := l2Entry{word: flagCompressed | 0x12345}
	if k, n := r.kindRun(packed, 5); k != kindCompressed || n != 27 {
		t.Errorf("compressed: run of %d, %d", k, n)
	}
	packed.bitmap = 1
	if k := r.kind(packed, 0); k != kindInvalid {
		t.Errorf("compressed with subclusters: %d", k)
	}
}

// TestCompressedWord writes descriptors and reads them, and compares them with sectors that are counted
// one by one. qcow2 spec, "Compressed Clusters Descriptor".
func TestCompressedWord(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 3))
	eachGeometry(func(name string, g geometry) {
		if g.refcountOrder != 4 {
			return
		}
		r := entryRules{geometry: g}
		for range 300 {
			n := 1 + rng.Uint64N(g.clusterSize-1)
			off := rng.Uint64N(1 << 40)
			if rng.IntN(4) == 0 {
				off = 1<<r.csizeShift - n // the last place that a descriptor can name
			}
			word := r.compressedWord(off, n)
			if word&flagCompressed == 0 || word&flagCopied != 0 {
				t.Fatalf("%s: flags of %#x", name, word)
			}
			sectors := uint64(0)
			for s := off / sectorSize * sectorSize; s < off+n; s += sectorSize {
				sectors++
			}
			wantEnd := (off/sectorSize + sectors) * sectorSize
			gotOff, gotN := r.compressed(word)
			if gotOff != off || gotOff+gotN != wantEnd {
				t.Fatalf("%s: %d bytes at %#x: read back %d at %#x, want the end at %#x", name, n, off, gotN, gotOff, wantEnd)
			}
			first, last := off>>g.clusterBits, (off+n-1)>>g.clusterBits
			if held := r.held(l2Entry{word: word}); held.first != first || held.first+held.n-1 != last {
				t.Fatalf("%s: %d bytes at %#x hold %+v, want %d to %d", name, n, off, held, first, last)
			}
		}
	})
}

// TestSubclusterMasks compares the masks with bits that are set one by one.
func TestSubclusterMasks(t *testing.T) {
	for first := uint64(0); first < 32; first++ {
		for last := first; last < 32; last++ {
			want := uint64(0)
			for i := first; i <= last; i++ {
				want |= 1 << i
			}
			got := subclusterMask(first, last)
			if got != want {
				t.Fatalf("mask %d to %d is %#x, want %#x", first, last, got, want)
			}
			if i, n := firstSet(got | 1<<63); i != first || n != last-first+1 {
				t.Fatalf("first run of %#x is %d, %d", got, i, n)
			}
			for _, b := range []uint64{0, ^uint64(0), 0xffffffff00000000, 0x5555555555555555} {
				d := withData(b, got)
				if d&got != got || d>>32&got != 0 || (d^b)&^(got|got<<32) != 0 {
					t.Fatalf("data in %#x of %#x is %#x", got, b, d)
				}
			}
		}
	}
}

// TestPutEntry encodes entries in big-endian words.
func TestPutEntry(t *testing.T) {
	for _, extended := range []bool{false, true} {
		r := entryRules{geometry: newGeometry(16, 4, extended)}
		p := make([]byte, 48)
		r.putEntry(p, 1, l2Entry{word: 0x0102030405060708, bitmap: 0x1112131415161718})
		want := make([]byte, 48)
		copy(want[8:], "\x01\x02\x03\x04\x05\x06\x07\x08")
		if extended {
			want = make([]byte, 48)
			copy(want[16:], "\x01\x02\x03\x04\x05\x06\x07\x08\x11\x12\x13\x14\x15\x16\x17\x18")
		}
		if diff := cmp.Diff(fmt.Sprintf("% x", want), fmt.Sprintf("% x", p)); diff != "" {
			t.Errorf("extended %v (-want +got):\n%s", extended, diff)
		}
	}
}
