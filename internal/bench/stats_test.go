package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestIntervalRank compares with the ranks of the published tables of the sign test (two-sided, 5 %), which
// count from 1.
func TestIntervalRank(t *testing.T) {
	for n, want := range map[int]int{6: 1, 8: 1, 9: 2, 11: 2, 12: 3, 15: 4, 21: 6, 25: 8, 30: 10, 50: 18} {
		if got := intervalRank(n) + 1; got != want {
			t.Errorf("%d samples: rank %d, want %d", n, got, want)
		}
	}
}

// TestMedianInterval holds the median and its interval against samples whose ranks are plain to see.
func TestMedianInterval(t *testing.T) {
	var odd []float64
	for i := range 15 {
		odd = append(odd, float64((i*7)%15+1)) // 1 … 15 in another order
	}
	if diff := cmp.Diff(interval{4, 8, 12}, medianInterval(odd), cmp.AllowUnexported(interval{})); diff != "" {
		t.Errorf("1 … 15 (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(interval{1, 1.5, 2}, medianInterval([]float64{2, 1}), cmp.AllowUnexported(interval{})); diff != "" {
		t.Errorf("two samples (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(interval{}, medianInterval(nil), cmp.AllowUnexported(interval{})); diff != "" {
		t.Errorf("no samples (-want +got):\n%s", diff)
	}
}

// TestQEMUStep shows that the step of random requests is one that qemu-img takes, and visits each unit once
// before it comes back.
func TestQEMUStep(t *testing.T) {
	for _, w := range workloads {
		if !w.random {
			continue
		}
		const size = 4 << 30
		r := qemuRun{workload: w}
		if step := r.step(size); step > maxStep {
			t.Errorf("%s: step %d is more than qemu-img takes", w.name, step)
		}
		unit := w.n
		if w.alloc {
			unit = clusterSize
		}
		seen := map[int64]bool{}
		for i, off := int64(0), int64(0); i < size/unit; i, off = i+1, (off+r.step(size))%size {
			if off%unit != 0 || seen[off] {
				t.Fatalf("%s: request %d at %#x", w.name, i, off)
			}
			seen[off] = true
		}
	}
}
