package qcow2

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// faultAllEnv is the environment variable that has the fault tests of operations on snapshots fail every host
// operation, rather than every seventh:
//
//	QCOW2_FAULT_ALL=1 go test -run TestFaultsSnapshots -timeout 30m .
const faultAllEnv = "QCOW2_FAULT_ALL"

// snapshotFaultStep is one operation: 'w' writes, 's' syncs, 'c' creates, 'a' applies, 'd' deletes and 'r' renames a
// snapshot, 'o' reads it.
type snapshotFaultStep struct {
	op     byte
	name   string // of the snapshot
	off, n int64  // of a write; with 'c', n is the length of a VM state
}

// snapshotFaultScenario is an image, and operations on it that meet faults.
type snapshotFaultScenario struct {
	faultScenario
	shorter int64 // bytes by which the disk is shorter than in the snapshots that are there
	steps   []snapshotFaultStep
}

// snapshotFaultScenarios are the images and operations.
func snapshotFaultScenarios() []snapshotFaultScenario {
	tiny := OpenOptions{L2CacheBytes: 1, RefcountCacheBytes: 1}
	steps := []snapshotFaultStep{
		{op: 'w', off: 3000, n: 9000}, {op: 's'}, {op: 'c', name: "a", n: 5000}, {op: 'w', off: 5000, n: 700}, {op: 's'},
		{op: 'c', name: "b"}, {op: 'a', name: "a"}, {op: 'w', off: 8000, n: 2000}, {op: 's'}, {op: 'r', name: "b"}, {op: 'o', name: "a"},
		{op: 'd', name: "a"}, {op: 'a', name: "b-renamed"}, {op: 'd', name: "b-renamed"},
	}
	return []snapshotFaultScenario{
		{steps: steps, faultScenario: faultScenario{
			name: "plain", size: 64 << 10, create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, open: tiny,
			prepare: []faultStep{{'w', 0, 20_000}, {'w', 50_000, 700}},
		}},
		{steps: steps, faultScenario: faultScenario{
			name: "compressed", size: 128 << 10, create: CreateOptions{ClusterSize: 4096, Version: 2},
			prepare: []faultStep{{'c', 0, 6}, {'w', 28_000, 6000}},
		}},
		{steps: steps, faultScenario: faultScenario{
			name: "extended over base", size: 512 << 10, create: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true, BackingFile: "base", BackingFormat: "raw"},
			base: 300_000, prepare: []faultStep{{'w', 1_000, 10_000}, {'c', 8, 2}},
		}},
		{steps: steps, faultScenario: faultScenario{
			name: "lazy refcounts", size: 64 << 10, create: CreateOptions{ClusterSize: 512, LazyRefcounts: true}, open: tiny,
			prepare: []faultStep{{'w', 0, 3000}, {'c', 100, 3}},
		}},
		{shorter: 20 << 10, faultScenario: faultScenario{
			name: "sizes", size: 64 << 10, create: CreateOptions{ClusterSize: 512, RefcountBits: 8}, open: tiny,
			prepare: []faultStep{{'w', 0, 40_000}},
			change:  addTestSnapshot,
		}, steps: []snapshotFaultStep{
			{op: 'w', off: 3000, n: 9000}, {op: 's'}, {op: 'c', name: "a"}, {op: 'a', name: "before"}, {op: 'w', off: 40_000, n: 9000}, {op: 's'},
			{op: 'a', name: "a"}, {op: 'd', name: "before"},
		}},
	}
}

// snapshotFaultState is what an image must hold.
type snapshotFaultState struct {
	disk  []byte
	snaps []crashSnapshot // id is not looked at
}

// clone returns a copy whose disk may be written.
func (s snapshotFaultState) clone() snapshotFaultState {
	return snapshotFaultState{bytes.Clone(s.disk), slices.Clone(s.snaps)}
}

// find returns the index of a snapshot.
func (s snapshotFaultState) find(name string) int {
	return slices.IndexFunc(s.snaps, func(c crashSnapshot) bool { return c.name == name })
}

// after returns what the image holds once the step has succeeded.
func (s snapshotFaultState) after(k int, step snapshotFaultStep) snapshotFaultState {
	s = s.clone()
	i := s.find(step.name)
	switch step.op {
	case 'w':
		copy(s.disk[step.off:], faultStep{'w', step.off, step.n}.bytes(k, step.n))
	case 'c':
		s.snaps = append(s.snaps, crashSnapshot{name: step.name, content: bytes.Clone(s.disk)})
	case 'a':
		s.disk = bytes.Clone(s.snaps[i].content)
	case 'd':
		s.snaps = slices.Delete(s.snaps, i, i+1)
	case 'r':
		s.snaps[i].name += "-renamed"
	}
	return s
}

// snapshotFaultRun is one run of a scenario under one fault.
type snapshotFaultRun struct {
	faultRun
	sc    *snapshotFaultScenario
	state snapshotFaultState
	left  bool // clusters or flags may be left, as an error told, or since nothing could be taken back

	failed int // operations on snapshots that failed
}

// do carries out the k-th step.
func (r *snapshotFaultRun) do(k int, step snapshotFaultStep) error {
	ctx := context.Background()
	ref := SnapshotRef{Name: step.name}
	switch step.op {
	case 'w':
		_, err := r.img.WriteAt(faultStep{'w', step.off, step.n}.bytes(k, step.n), step.off)
		return err
	case 'c':
		o := &SnapshotOptions{Name: step.name, Date: unixEpoch}
		if step.n > 0 {
			o.VMState, o.VMStateSize = bytes.NewReader(make([]byte, step.n)), step.n
		}
		_, err := r.img.CreateSnapshot(ctx, o)
		return err
	case 'a':
		return r.img.ApplySnapshot(ctx, ref)
	case 'd':
		return r.img.DeleteSnapshot(ctx, ref)
	case 'r':
		return r.img.RenameSnapshot(ref, step.name+"-renamed")
	case 'o':
		d, err := r.img.OpenSnapshot(ref)
		if err != nil {
			return err
		}
		b, err := readWholeDisk(d)
		if want := r.state.snaps[r.state.find(step.name)].content; err == nil && !bytes.Equal(b, want) {
			r.Errorf("snapshot %s reads otherwise", step.name)
		}
		return errors.Join(err, d.Close())
	}
	return r.img.Sync()
}

// settle finds out whether a step that failed has happened, and fails the test if neither.
func (r *snapshotFaultRun) settle(k int, step snapshotFaultStep, list []Snapshot, disk []byte) (done bool) {
	r.Helper()
	states := []snapshotFaultState{r.state, r.state.after(k, step)}
	for i, s := range states {
		if len(s.snaps) != len(list) || len(disk) != len(s.disk) && disk != nil {
			continue
		}
		same := true
		for j := range list {
			same = same && s.snaps[j].name == list[j].Name
		}
		if same && (disk == nil || bytes.Equal(disk, s.disk)) {
			r.state = s
			return i == 1
		}
	}
	r.Fatalf("after step %d failed the image is neither as before nor as after: snapshots %+v", k, list)
	return false
}

// look reads the files without the library and compares them with what must be there; within the middle of a step
// that failed, with what was before or after it.
func (r *snapshotFaultRun) look(k int, step *snapshotFaultStep) {
	r.Helper()
	d := r.host.disks["image"]
	size, err := d.Size()
	if err != nil {
		r.Fatal(err)
	}
	rep, err := refwalk.Walk(d, size)
	if err != nil {
		r.Fatal(err)
	}
	if step != nil {
		var list []Snapshot
		for _, s := range rep.InternalSnapshots {
			list = append(list, Snapshot{Name: s.Name})
		}
		r.settle(k, *step, list, r.readDisks())
	}
	if !bytes.Equal(r.readDisks(), r.state.disk) {
		r.Error("the disk reads otherwise")
	}
	if len(rep.InternalSnapshots) != len(r.state.snaps) {
		r.Fatalf("%d snapshots instead of %d", len(rep.InternalSnapshots), len(r.state.snaps))
	}
	for i, s := range r.state.snaps {
		src := refwalk.Source{Image: d, Size: size, Snapshot: i + 1}
		if base := r.host.disks["base"]; base != nil {
			src.Backing = func(p []byte, off int64) error {
				clear(p)
				_, _ = base.ReadAt(p, off)
				return nil
			}
		}
		if b, err := refwalk.ReadGuest(src); err != nil || !bytes.Equal(b, s.content) {
			r.Errorf("snapshot %s reads otherwise, error %v", s.name, err)
		}
	}
}

// run runs the scenario with the fault at the at-th operation. It reports whether the fault was met.
func (r *snapshotFaultRun) run(plan *faultPlan, at int) bool {
	faults := r.host.faults
	faults.Set(plan.faultAt(at, r.host.disks))
	r.openImage()
	for k, step := range r.sc.steps {
		if step.op != 'w' && step.op != 'c' && step.op != 's' && r.state.find(step.name) < 0 {
			continue // what it works on was not made
		}
		err := r.do(k, step)
		if err == nil {
			r.state = r.state.after(k, step)
			continue
		}
		op := r.injected(err)
		if errors.Is(err, ErrFailed) {
			r.fail(plan, k, step)
			return true
		}
		if step.op == 'w' {
			faults.Heal() // how much of it was written is not what this is about
			if err := r.do(k, step); err != nil {
				r.Fatalf("write again: %v", err)
			}
			r.state = r.state.after(k, step)
			continue
		}
		disk, rerr := readWholeDisk(r.img)
		if rerr != nil {
			if r.injected(rerr).Kind != crashtest.Read {
				r.Errorf("read after step %d: %v", k, rerr)
			}
			disk = nil
		}
		if step.op == 's' {
			if plan.Forever {
				faults.Heal()
			}
			if err := r.do(k, step); err != nil {
				r.Fatalf("sync again after %s: %v", op, err)
			}
			continue
		}
		done := r.settle(k, step, r.img.Snapshots(), disk)
		r.failed++
		r.left = r.left || done || plan.Forever
		if plan.Forever {
			faults.Heal()
		}
		if !done {
			if err := r.do(k, step); err != nil {
				r.Fatalf("step %d again: %v", k, err)
			}
			r.state = r.state.after(k, step)
		}
	}
	fired := faults.Fired() > 0
	if !plan.through {
		faults.Heal()
	}
	err := r.img.Close()
	faults.Heal()
	r.host.checkIdle(r)
	if err != nil {
		r.injected(err)
		r.walk(true)
		return true
	}
	r.walk(r.left)
	r.look(0, nil)
	return fired
}

// fail checks an image whose host failed a sync in step k: no more changes, but reads.
func (r *snapshotFaultRun) fail(plan *faultPlan, k int, step snapshotFaultStep) {
	r.Helper()
	r.host.faults.Heal()
	before := len(r.host.faults.Ops())
	for _, s := range []snapshotFaultStep{{op: 'c', name: "x"}, {op: 'w', n: 1}, {op: 's'}} {
		if err := r.do(0, s); !errors.Is(err, ErrFailed) {
			r.Errorf("%c after a failed sync: error %v", s.op, err)
		}
	}
	if _, err := readWholeDisk(r.img); err != nil {
		r.Errorf("read after a failed sync: %v", err)
	}
	if err := r.img.Close(); !errors.Is(err, ErrFailed) {
		r.Errorf("Close after a failed sync: %v", err)
	}
	if ops := r.host.changes(before); len(ops) > 0 {
		r.Errorf("changes after a failed sync: %q", ops)
	}
	rep := r.walk(true)
	if step.op == 'w' || step.op == 's' {
		return // TestFaults looks at those
	}
	r.look(k, &step)
	if rep.Dirty() {
		return
	}
	r.openImage()
	for _, s := range []snapshotFaultStep{{op: 'c', name: "y"}, {op: 'w', n: 100}, {op: 'd', name: "y"}, {op: 's'}} {
		if err := r.do(700, s); err != nil {
			r.Errorf("%c after the image failed: %v", s.op, err)
			continue
		}
		r.state = r.state.after(700, s)
	}
	if err := r.img.Close(); err != nil {
		r.Errorf("Close after the image failed: %v", err)
	}
	r.walk(true)
	r.look(0, nil)
}

// build makes the scenario's files, and what they hold.
func (sc *snapshotFaultScenario) build(t testing.TB) (map[string]*crashtest.Disk, snapshotFaultState) {
	disks, content := sc.faultScenario.build(t)
	state := snapshotFaultState{disk: content}
	if sc.change != nil {
		state.snaps = []crashSnapshot{{name: "before", content: bytes.Clone(content)}}
	}
	if sc.shorter > 0 {
		state.disk = content[:sc.size-sc.shorter]
		off, p := encodeSizeField(uint64(sc.size - sc.shorter))
		if _, err := disks["image"].WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	return disks, state
}

// TestFaultsSnapshots fails host operations of every operation on snapshots, in every way of faultPlans, goes on, and
// compares (I6): an operation that failed has not happened, or has, and can be tried again.
func TestFaultsSnapshots(t *testing.T) {
	stride := 7
	if os.Getenv(faultAllEnv) != "" {
		stride = 1
	}
	for _, sc := range snapshotFaultScenarios() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			disks, state := sc.build(t)
			runs, left := 0, 0
			for i, plan := range faultPlans(&sc.faultScenario) {
				t.Run(plan.name, func(t *testing.T) {
					for at := i % stride; !t.Failed(); at += stride {
						r := snapshotFaultRun{
							faultRun: faultRun{TB: t, host: newFaultHost(disks), sc: &sc.faultScenario, model: faultModel{now: state.disk}, seen: &faultsSeen{}},
							sc:       &sc, state: state.clone(),
						}
						met := func() bool {
							defer func() {
								if t.Failed() {
									t.Logf("fault at operation %d; the operations:\n%s", at, logOps(r.host.faults.Ops()))
								}
							}()
							return r.run(&plan, at)
						}()
						runs++
						if r.failed > 0 {
							left++
						}
						if !met {
							break
						}
					}
				})
			}
			t.Logf("%d runs, in %d an operation on snapshots failed", runs, left)
			if left == 0 {
				t.Error("no operation on snapshots failed")
			}
		})
	}
}
