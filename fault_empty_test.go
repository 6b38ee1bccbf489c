package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// allFaultsEnv asks the tests of MakeEmpty and Commit for a fault at every operation, in every way. Otherwise they leave
// most of the pairs out, others in each scenario.
//
//	QCOW2_ALL_FAULTS=1 go test -run 'TestMakeEmptyFaults|TestCommitFaults' -v .
const allFaultsEnv = "QCOW2_ALL_FAULTS"

// faultStride returns at which operation the faults of the i-th plan of the k-th scenario begin, and how many later the
// next one is.
func faultStride(k, i int) (first, stride int) {
	if os.Getenv(allFaultsEnv) != "" {
		return 0, 1
	}
	return (3*k + 5*i) % 13, 13
}

// TestMakeEmptyFaults fails every host operation of a MakeEmpty, in every way of faultPlans. Afterwards the guest sees all
// of the old content or all of what lies below; what is in memory matches the disk, the image takes writes and can be
// emptied again, unless a sync failed. Then a new open finds the one or the other, too (I6).
//
// Of the traps of 2014 this is two: refcounts in memory that no longer match after a failure, and an image that an error
// makes unusable.
func TestMakeEmptyFaults(t *testing.T) {
	for k, sc := range emptyScenarios() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			disks, content := sc.build(t)
			e := &emptyFaults{sc: &sc, disks: disks, old: content, emptied: sc.emptied(disks)}
			for i, plan := range faultPlans(&sc) {
				for at, stride := faultStride(k, i); ; at += stride {
					name := fmt.Sprintf("%s at %d", plan.name, at)
					met := false
					t.Run(name, func(t *testing.T) { met = e.run(t, &plan, at) })
					if !met || t.Failed() {
						break
					}
				}
			}
			t.Logf("%d runs: %d emptied, %d as before, %d failed for good", e.runs, e.done, e.before, e.failed)
			if os.Getenv(allFaultsEnv) != "" && (e.done == 0 || e.before == 0 || e.failed == 0) {
				t.Error("one of these never happened")
			}
		})
	}
}

// emptyFaults is a scenario whose emptying meets faults, and counts of how that ended.
type emptyFaults struct {
	sc           *faultScenario
	disks        map[string]*crashtest.Disk
	old, emptied []byte

	runs, done, before, failed int
}

// which tells whether p is what the disk held before, or is empty, and fails the test if it is neither. late is a write
// that the disk may hold besides, since it was not synced.
func (e *emptyFaults) which(t *testing.T, when string, p []byte, late modelWrite, synced bool) (empty bool) {
	t.Helper()
	if bytes.Equal(p, e.emptied) {
		return true
	}
	want := bytes.Clone(e.old)
	if synced {
		copy(want[late.off:], late.p)
	}
	if diff := explainContent(p, 0, want, []modelWrite{late}); diff != "" {
		t.Errorf("%s the disk is neither as before nor empty: %s", when, diff)
	}
	return false
}

// run empties the image with the fault at the at-th operation. It reports whether the fault was met.
func (e *emptyFaults) run(t *testing.T, plan *faultPlan, at int) bool {
	host := newFaultHost(e.disks)
	r := &faultRun{TB: t, host: host, sc: e.sc, seen: &faultsSeen{}}
	img, err := e.sc.openScenario(host)
	if err != nil {
		t.Fatal(err)
	}
	r.img = img
	late := modelWrite{off: 50_000, p: faultStep{}.bytes(77, 2000), dead: make([]bool, 2000)}
	if _, err := img.WriteAt(late.p, late.off); err != nil {
		t.Fatal(err)
	}
	host.faults.Set(plan.faultAt(at, host.disks))
	err = img.MakeEmpty(t.Context())
	fired := host.faults.Fired() > 0
	host.faults.Heal()
	if err != nil {
		r.injected(err)
	}
	e.runs++
	empty := e.which(t, "to the image", readDisk(t, img), late, true)
	if err == nil && !empty {
		t.Error("no error, and it is not empty")
	}
	r.walk(true)
	if errors.Is(err, ErrFailed) {
		e.failed++
		e.reopen(r, late)
		return true
	}
	if err == nil {
		e.done++
	} else if !empty {
		e.before++
	}
	e.goOn(r, empty, late)
	return fired
}

// goOn writes to the image and empties it again. What is in memory must match the disk all the time.
func (e *emptyFaults) goOn(r *faultRun, empty bool, late modelWrite) {
	r.Helper()
	want := bytes.Clone(e.emptied)
	if !empty {
		want = bytes.Clone(e.old)
		copy(want[late.off:], late.p)
	}
	p := faultStep{}.bytes(78, 30_000)
	copy(want[20_000:], p)
	if _, err := r.img.WriteAt(p, 20_000); err != nil {
		r.Errorf("write after the fault: %v", err)
	}
	res, err := r.img.Check(context.Background(), nil)
	if err != nil || res.Corruptions+res.Unreadable > 0 {
		r.Errorf("check after the fault: %+v, %v", res, err)
	}
	if err := checkList(r.img); err != nil {
		r.Error(err)
	}
	if diff := explainContent(readDisk(r, r.img), 0, want, nil); diff != "" {
		r.Errorf("written after the fault: %s", diff)
	}
	if err := r.img.MakeEmpty(context.Background()); err != nil {
		r.Errorf("empty after the fault: %v", err)
	}
	if diff := explainContent(readDisk(r, r.img), 0, e.emptied, nil); diff != "" {
		r.Errorf("emptied after the fault: %s", diff)
	}
	if err := r.img.Close(); err != nil {
		r.Errorf("close after the fault: %v", err)
	}
	r.walk(true)
	r.host.checkIdle(r)
	if diff := explainContent(r.readDisks(), 0, e.emptied, nil); diff != "" {
		r.Errorf("closed after the fault: %s", diff)
	}
}

// reopen closes an image that failed for good, and opens it again.
func (e *emptyFaults) reopen(r *faultRun, late modelWrite) {
	r.Helper()
	if err := r.img.MakeEmpty(context.Background()); !errors.Is(err, ErrFailed) {
		r.Errorf("empty after a failed sync: error %v, want ErrFailed", err)
	}
	if err := r.img.Close(); !errors.Is(err, ErrFailed) {
		r.Errorf("close after a failed sync: error %v, want ErrFailed", err)
	}
	r.walk(true)
	img, err := e.sc.openScenario(r.host)
	if err != nil {
		r.Fatalf("open after a failed sync: %v", err)
	}
	r.img = img
	p := readDisk(r, img)
	empty := bytes.Equal(p, e.emptied)
	if !empty {
		if diff := explainContent(p, 0, e.old, []modelWrite{late}); diff != "" {
			r.Errorf("opened again, the disk is neither as before nor empty: %s", diff)
		}
		late.p = p[late.off : late.off+int64(len(late.p))] // what was kept of it
	}
	e.goOn(r, empty, late)
}
