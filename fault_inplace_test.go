package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// inPlaceCall is a call that is to meet faults, and the file that it is given.
type inPlaceCall struct {
	name string
	disk *crashtest.Disk
	do   func(s Storage) error
}

// inPlaceCalls returns the conversion of the scenario, and resume and rollback of what one leaves that is interrupted.
func inPlaceCalls(t testing.TB, sc *inPlaceScenario) []inPlaceCall {
	half, image := interrupted(t, sc, false), interrupted(t, sc, true)
	torn := half.Clone() // tables that are not complete
	size, err := torn.Size()
	if err != nil {
		t.Fatal(err)
	}
	f, err := findFooter(crashStorage{torn}, uint64(size))
	if err != nil || f == nil {
		t.Fatal("no footer", err)
	}
	if _, err := torn.WriteAt(make([]byte, sectorSize), int64(f.tables)); err != nil {
		t.Fatal(err)
	}
	resume := func(s Storage) error { _, err := sc.resume(s); return err }
	rollback := func(s Storage) error {
		_, err := RollbackInPlace(context.Background(), s, int64(len(sc.source)))
		return err
	}
	end := func(s Storage) error {
		_, err := ResumeInPlace(context.Background(), s, nil, int64(len(sc.source)), &sc.opts)
		return err
	}
	// A layout, or options, that are not those of before begin anew.
	anew := func(s Storage) error {
		other := *sc
		other.opts.LazyRefcounts = !other.opts.LazyRefcounts
		_, err := other.resume(s)
		return err
	}
	return []inPlaceCall{
		{"convert", sc.disk(), func(s Storage) error { return sc.convert(s, inPlaceSyncNone) }},
		{"resume", half, resume},
		{"resume torn", torn, resume},
		{"resume switched", image, end},
		{"resume anew", half, anew},
		{"roll back", half, rollback},
	}
}

// TestFaultInPlace fails every host operation of conversions, resumes and rollbacks, once and for good: the call
// fails, and the file is what it was, or the source, or one that is resumed and rolled back. What says that it is the
// source is, bit by bit.
func TestFaultInPlace(t *testing.T) {
	plans := []faultPlan{
		{name: "once", Fault: crashtest.Fault{Err: syscall.EIO}},
		{name: "once after", Fault: crashtest.Fault{Err: syscall.EIO, After: true}, kinds: "wso"},
		{name: "short", Fault: crashtest.Fault{Err: syscall.EIO, Short: true}, kinds: "rw"},
		{name: "full", Fault: crashtest.Fault{Err: syscall.ENOSPC, Forever: true}, kinds: "w"},
		{name: "for good", Fault: crashtest.Fault{Err: syscall.EIO, Forever: true}},
		{name: "syncs for good", Fault: crashtest.Fault{Err: syscall.EIO, Forever: true}, kinds: "s"},
	}
	met, back, left := 0, 0, 0
	for _, name := range []string{"raw sparse", "raw of small clusters", "shuffled", "trailer", "overlay"} {
		sc := inPlaceScenarioNamed(t, name)
		l, err := newInPlaceLook(sc)
		if err != nil {
			t.Fatal(err)
		}
		for _, call := range inPlaceCalls(t, sc) {
			for _, plan := range plans {
				for at := 0; ; at++ {
					disks := map[string]*crashtest.Disk{"image": call.disk}
					host := newFaultHost(disks)
					host.faults.Set(plan.faultAt(at, disks))
					err := call.do(host.storage("image"))
					fired := host.faults.Fired() > 0
					host.faults.Heal()
					host.checkIdle(t)
					d := host.disks["image"]
					what := fmt.Sprintf("%s, %s, %s at %d: %v", name, call.name, plan.name, at, err)
					if !fired {
						if err != nil {
							t.Error(what)
						}
						break
					}
					met++
					if err != nil && !errors.Is(err, crashtest.ErrInjected) {
						t.Errorf("%s: no injected fault", what)
					}
					if err != nil && call.name == "convert" && !errors.Is(err, ErrInPlace) {
						back++
						if !bytes.Equal(d.Bytes(), l.source) {
							t.Errorf("%s: the file is not what it was", what)
						}
					} else if err != nil {
						left++
					}
					if call.name == "resume anew" && sc.finished(d) {
						err = sc.checkImage(d, l.content)
					} else {
						err = l.state(d, nil)
					}
					if err != nil {
						t.Errorf("%s: %v", what, err)
					}
					if t.Failed() {
						t.FailNow()
					}
				}
			}
		}
	}
	t.Logf("%d faults; after %d the conversion was taken back, after %d something was left to do", met, back, left)
	if back == 0 || left == 0 {
		t.Error("a kind of end is missing")
	}
}
