package qcow2

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
)

// freeClusters returns the host offsets of n data clusters of a list with the given number of clusters: random ones,
// or as many as there are between tables in a row.
func freeClusters(l *overlapList, clusters, n uint64, sequential bool) []uint64 {
	rng := rand.New(rand.NewPCG(n, 64))
	offs := make([]uint64, 0, n)
	for c := clusters / 3; uint64(len(offs)) < n; c++ {
		if !sequential {
			c = rng.Uint64N(clusters)
		}
		if k, _ := l.query(c<<l.clusterBits, 1, overlapAllKinds); k == 0 {
			offs = append(offs, c<<l.clusterBits)
		}
	}
	return offs
}

// BenchmarkOverlapQuery asks about single data clusters, as guest writes do, with a cache of one window, of eight, and
// of all.
func BenchmarkOverlapQuery(b *testing.B) {
	for _, im := range []simulatedImage{
		{"1GiB of 512B", 9, 1 << 30}, // 132 windows
		{"1TiB of 64KiB", 16, 1 << 40},
	} {
		for _, windows := range []int64{1, 8, 1 << 20} {
			for _, order := range []string{"random", "sequential"} {
				name := fmt.Sprintf("image=%s/windows=%d/%s", im.name, windows, order)
				if windows == 1<<20 {
					name = fmt.Sprintf("image=%s/windows=all/%s", im.name, order)
				}
				b.Run(name, func(b *testing.B) {
					l, clusters := enterSimulated(im, overlapLimits{cacheBytes: windows * (overlapSlotBytes + overlapMapBytes)})
					offs := freeClusters(l, clusters, 1<<16, order == "sequential")
					b.ReportAllocs()
					for i := 0; b.Loop(); i++ {
						if k, _ := l.query(offs[i%(1<<16)], 1, overlapAllKinds); k != 0 {
							b.Fatalf("%#x is %v", offs[i%(1<<16)], k)
						}
					}
				})
			}
		}
	}
}

// BenchmarkOverlapQueryParallel is BenchmarkOverlapQuery on all processors, with random clusters.
func BenchmarkOverlapQueryParallel(b *testing.B) {
	im := simulatedImage{"", 16, 1 << 40}
	for name, windows := range map[string]int64{"windows=8": 8, "windows=all": 1 << 20} {
		b.Run(name, func(b *testing.B) {
			l, clusters := enterSimulated(im, overlapLimits{cacheBytes: windows * (overlapSlotBytes + overlapMapBytes)})
			offs := freeClusters(l, clusters, 1<<16, false)
			b.RunParallel(func(pb *testing.PB) {
				for i := rand.IntN(len(offs)); pb.Next(); i++ {
					l.query(offs[i%(1<<16)], 1, overlapAllKinds)
				}
			})
		})
	}
}

// BenchmarkOverlapEnter enters and removes again the L2 tables of 1 GiB of 512-byte clusters, 32768 of them, in the
// order of the host file and in another. A call is what is measured.
func BenchmarkOverlapEnter(b *testing.B) {
	im := simulatedImage{"", 9, 1 << 30}
	for _, order := range []string{"host", "random"} {
		b.Run(order, func(b *testing.B) {
			l := newOverlapList(9, overlapLimits{})
			var offs []uint64
			im.tables(func(kinds OverlapKinds, first, n uint64) {
				if kinds == OverlapActiveL2 {
					offs = append(offs, first<<9)
				} else {
					l.enter(kinds, first<<9, n<<9)
				}
			})
			if order == "random" {
				rng := rand.New(rand.NewPCG(1, 65))
				rng.Shuffle(len(offs), func(i, j int) { offs[i], offs[j] = offs[j], offs[i] })
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if off := offs[i%len(offs)]; i/len(offs)%2 == 0 {
					l.enter(OverlapActiveL2, off, 512)
				} else {
					l.remove(OverlapActiveL2, off, 512)
				}
			}
		})
	}
}

// BenchmarkOverlapMemory enters the metadata of large images and reports what the list takes, by its own count and
// on the heap.
func BenchmarkOverlapMemory(b *testing.B) {
	for _, im := range []simulatedImage{
		{"1TiB of 64KiB", 16, 1 << 40},
		{"1PiB of 64KiB", 16, 1 << 50},
		{"1TiB of 512B", 9, 1 << 40},
	} {
		b.Run("image="+im.name, func(b *testing.B) {
			for b.Loop() {
				before := heapInUse()
				l, clusters := enterSimulated(im, overlapLimits{listBytes: 1 << 30})
				for c := uint64(0); c < clusters; c += 1 << overlapWindowBits {
					l.query(c<<im.clusterBits, 1, overlapAllKinds)
				}
				heap := heapInUse() - before
				m := l.memory()
				b.ReportMetric(float64(m.list), "list-B")
				b.ReportMetric(float64(m.cache), "cache-B")
				b.ReportMetric(float64(heap), "heap-B")
				b.ReportMetric(float64(m.list)/float64(m.runs), "B/run")
				b.ReportMetric(float64(m.runs), "runs")
			}
		})
	}
}

// heapInUse returns the bytes of the objects that are reachable.
func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
