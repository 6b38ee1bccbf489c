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

// TestCommitFaults fails every host operation of a Commit, on all files of the chain, in every way of faultPlans. The
// image reads the same afterwards, in memory and by another open, nobody holds more than before, and another call does the
// work (I6).
func TestCommitFaults(t *testing.T) {
	for k, sc := range commitScenarios() {
		switch sc.name {
		case "raw", "qcow2 over a file", "raw and smaller", "lazy refcounts", "base with snapshot", "base with data file", "two levels":
		default:
			continue
		}
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			f := &commitFaults{sc: &sc, disks: sc.build(t)}
			for i, plan := range faultPlans(&faultScenario{}) {
				if plan.through {
					continue // there is no Close in it
				}
				for at, stride := faultStride(k, i); ; at += stride {
					met := false
					t.Run(fmt.Sprintf("%s at %d", plan.name, at), func(t *testing.T) { met = f.run(t, &plan, at) })
					if !met || t.Failed() {
						break
					}
				}
			}
			t.Logf("%d runs: %d committed, %d gave an error, %d of them failed the image for good",
				f.runs, f.done, f.errors, f.failed)
			if os.Getenv(allFaultsEnv) != "" && (f.done == 0 || f.errors == 0 || f.failed == 0) {
				t.Error("one of these never happened")
			}
		})
	}
}

// commitFaults is a chain whose commit meets faults, and counts of how that ended.
type commitFaults struct {
	sc    *commitScenario
	disks map[string]*crashtest.Disk

	runs, done, errors, failed int
}

// run commits with the fault at the at-th operation. It reports whether the fault was met.
func (f *commitFaults) run(t *testing.T, plan *faultPlan, at int) bool {
	host := newFaultHost(f.disks)
	img, err := f.sc.openTop(host)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.WriteAt(faultStep{}.bytes(901, 3000), 60_000); err != nil {
		t.Fatal(err)
	}
	want := readDisk(t, img)
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	opens := host.open[f.sc.base().name]
	host.faults.Set(plan.faultAt(at, host.disks))
	err = img.Commit(context.Background(), &f.sc.opts)
	fired := host.faults.Fired() > 0
	host.faults.Heal()
	f.runs++
	if err != nil {
		f.errors++
		if i := new(crashtest.InjectedError); !errors.As(err, &i) {
			t.Errorf("error without an injected fault: %v", err)
		}
	} else {
		f.done++
		if got := f.sc.readLayer(t, host, f.sc.base(), int64(len(want))); !bytes.Equal(got, want) {
			t.Error("no error, and the base does not hold everything")
		}
	}
	if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
		t.Errorf("after the fault: %s", diff)
	}
	f.sc.walkAll(t, host, true)
	if n := host.open[f.sc.base().name]; n != opens {
		t.Errorf("the base is open %d times, %d before", n, opens)
	}
	if b, ok := img.Backing().(*Image); ok && !b.readOnly.Load() {
		t.Error("the base is still open for writing")
	}
	if img.host.failure() != nil {
		f.failed++
		if err := img.Close(); !errors.Is(err, ErrFailed) {
			t.Errorf("close after a failed sync: %v", err)
		}
		host.checkIdle(t)
		if img, err = f.sc.openTop(host); err != nil {
			t.Fatalf("open after a failed sync: %v", err)
		}
		if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
			t.Errorf("opened after the fault: %s", diff)
		}
	}
	p := faultStep{}.bytes(902, 9000)
	copy(want[70_000:], p)
	if _, err := img.WriteAt(p, 70_000); err != nil {
		t.Errorf("write after the fault: %v", err)
	}
	if err := img.Commit(context.Background(), &f.sc.opts); err != nil {
		t.Errorf("commit after the fault: %v", err)
	}
	if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
		t.Errorf("committed after the fault: %s", diff)
	}
	if err := img.Close(); err != nil {
		t.Errorf("close after the fault: %v", err)
	}
	host.checkIdle(t)
	f.sc.walkAll(t, host, true)
	if got := f.sc.readLayer(t, host, f.sc.base(), int64(len(want))); !bytes.Equal(got, want) {
		t.Error("the base does not hold everything")
	}
	return fired
}
