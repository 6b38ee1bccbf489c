package main

import "testing"

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
