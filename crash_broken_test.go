package qcow2

import (
	"fmt"
	"testing"
)

// TestCrashBroken breaks one ordering at a time and wants the crash states to show it, under the name of the
// invariant that the ordering is for. The same runs without the break show nothing.
func TestCrashBroken(t *testing.T) {
	testCrashBroken(t, []crashBreak{
		// Where refcounts do not matter, so that what is missing is the data.
		{"mapping before data/lazy", testHooks{skipDataSync: true}, "lazy", "I2", 4},
		{"mapping before data/datafile", testHooks{skipDataSync: true}, "datafile", "I2", 4},
		{"mapping before refcount/allocate", testHooks{refcountsLast: true}, "allocate", "I1", 2},
		{"mapping before refcount/compressed", testHooks{refcountsLast: true}, "compressed", "I1", 2},
		{"mapping before refcount/snapshot", testHooks{refcountsLast: true}, "snapshot", "I1", 2},
		{"L1 before its L2/allocate", testHooks{pointerFirst: true}, "allocate", "I3", 8},
		{"L1 before its L2/snapshot", testHooks{pointerFirst: true}, "snapshot", "I3", 8},
		{"refcount table before its block", testHooks{hookFirst: true}, "growth", "I3", 4},
		{"header before its table", testHooks{headerFirst: true}, "growth", "I3", 8},
		{"reuse at once/rewrite", testHooks{reuseImmediately: true}, "rewrite", "I4", 8},
		{"reuse at once/compressed", testHooks{reuseImmediately: true}, "compressed", "I4", 8},
		{"punch before the drop", testHooks{punchEarly: true}, "discard", "I4", 12},
		{"punch after the release", testHooks{punchLate: true}, "discard", "I4", 12},
		{"reuse at once/discard", testHooks{reuseImmediately: true}, "discard", "I4", 12},
		{"reuse at once/snapshot", testHooks{reuseImmediately: true}, "snapshot", "I4", 8},
	})
}

// crashBreak is an ordering that is broken, and what must show it.
type crashBreak struct {
	name     string
	test     testHooks
	workload string
	want     string // the invariant
	seeds    uint64 // of this many runs one must show it
}

// testCrashBroken runs the tests of TestCrashBroken.
func testCrashBroken(t *testing.T, tests []crashBreak) {
	workloads := make(map[string]crashWorkload)
	for _, w := range crashWorkloads() {
		workloads[w.name] = w
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			found := make(map[string]int)
			states := 0
			for seed := uint64(1); seed <= tt.seeds; seed++ {
				c := newCrashConfig(workloads[tt.workload], seed)
				budget := crashBudget{states: 400, every: true, stopWith: tt.want}
				c.test = tt.test
				stats, failure, err := runCrash(c, budget)
				if err != nil && failure == nil {
					// A broken image may make its own later writes fail: that shows nothing about crashes.
					t.Logf("seed %d: %v", seed, err)
					continue
				}
				states += stats.States
				for k, n := range stats.Found {
					found[k] += n
				}
				if failure == nil {
					continue
				}
				t.Logf("seed %d, after %d states: %s (in all: %v)", seed, states, crashFirst(failure, tt.want), found)
				c = newCrashConfig(workloads[tt.workload], seed)
				if _, failure, err := runCrash(c, crashBudget{states: 400, every: true}); failure != nil || err != nil {
					t.Errorf("and without the break: %v, %v", failure, err)
				}
				return
			}
			t.Errorf("no %s in %d states of %d runs, but %v", tt.want, states, tt.seeds, found)
		})
	}
}

// crashFirst returns the first finding of the invariant.
func crashFirst(f *crashFailure, invariant string) string {
	for _, x := range f.findings {
		if x.invariant == invariant {
			return fmt.Sprintf("%s: %.200s", x.invariant, x.detail)
		}
	}
	return "none"
}
