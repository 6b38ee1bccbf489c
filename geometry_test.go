package qcow2

import (
	"fmt"
	"math/big"
	"math/rand/v2"
	"testing"
)

// eachGeometry calls f with every geometry.
func eachGeometry(f func(name string, g geometry)) {
	for bits := uint(9); bits <= 21; bits++ {
		for order := uint(0); order <= 6; order++ {
			for _, extended := range []bool{false, true} {
				if extended && bits < 14 {
					continue
				}
				f(fmt.Sprintf("cluster bits %d, refcount order %d, extended %v", bits, order, extended), newGeometry(bits, order, extended))
			}
		}
	}
}

// TestGeometry compares the shifts and masks with divisions of whole numbers, over the whole range of
// guest offsets.
func TestGeometry(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	eachGeometry(func(name string, g geometry) {
		cluster := uint64(1) << g.clusterBits
		entry := uint64(8)
		if g.extendedL2 {
			entry = 16
		}
		if g.clusterSize != cluster || uint64(1)<<g.l2Bits != cluster/entry || uint64(1)<<g.l2EntryBits != entry {
			t.Errorf("%s: cluster %d, 2^%d entries of 2^%d bytes", name, g.clusterSize, g.l2Bits, g.l2EntryBits)
		}
		if got, want := uint64(1)<<g.refBlockBits, cluster*8/(1<<g.refcountOrder); got != want {
			t.Errorf("%s: %d refcounts per block, want %d", name, got, want)
		}
		if sub := uint64(1) << g.subBits; g.extendedL2 && sub*subclustersPerCluster != cluster || !g.extendedL2 && sub != cluster {
			t.Errorf("%s: subclusters of %d bytes", name, sub)
		}
		if slice := uint64(1) << g.sliceBits; slice > cluster || slice > 4096 || cluster%slice != 0 {
			t.Errorf("%s: slices of %d bytes", name, slice)
		}
		perTable := cluster / entry
		for range 200 {
			off := rng.Uint64() >> (1 + rng.UintN(63))
			if rng.IntN(2) == 0 {
				off = off / cluster * cluster
				off += rng.Uint64N(3)
				off -= min(off, 1)
			}
			if got, want := g.offsetInCluster(off), off%cluster; got != want {
				t.Fatalf("%s: offsetInCluster(%#x) = %#x, want %#x", name, off, got, want)
			}
			if got, want := g.clusterStart(off), off/cluster*cluster; got != want {
				t.Fatalf("%s: clusterStart(%#x) = %#x, want %#x", name, off, got, want)
			}
			if got, want := g.l1Index(off), off/cluster/perTable; got != want {
				t.Fatalf("%s: l1Index(%#x) = %d, want %d", name, off, got, want)
			}
			if got, want := g.l2Index(off), off/cluster%perTable; got != want {
				t.Fatalf("%s: l2Index(%#x) = %d, want %d", name, off, got, want)
			}
			// Without overflow, also at the top.
			for _, n := range []uint64{off, ^off} {
				if got, want := g.clusters(n), divideUp(n, cluster); got != want {
					t.Fatalf("%s: clusters(%#x) = %d, want %d", name, n, got, want)
				}
			}
			if got, want := g.l1Entries(off), divideUp(off, cluster*perTable); got != want {
				t.Fatalf("%s: l1Entries(%#x) = %d, want %d", name, off, got, want)
			}
		}
	})
}

// divideUp returns a divided by b, rounded up, by arithmetic that cannot overflow.
func divideUp(a, b uint64) uint64 {
	q, r := new(big.Int).DivMod(new(big.Int).SetUint64(a), new(big.Int).SetUint64(b), new(big.Int))
	n := q.Uint64()
	if r.Sign() != 0 {
		n++
	}
	return n
}
