package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// crashSnapshot is an internal snapshot that an image must have.
type crashSnapshot struct {
	id, name string
	content  []byte
}

// Marks of operations on snapshots.
type (
	// crashSnapshotStart is the start of operation id. A crash leaves the image as before or as after it.
	crashSnapshotStart struct {
		id    int
		after []crashSnapshot
		disk  []byte // what the disk then holds; nil: what it did
	}
	// crashSnapshotEnd is its return; with failed, it has changed nothing.
	crashSnapshotEnd struct {
		id     int
		failed bool
	}
)

// snapshotWorkload is a kind of image for the crash states of operations on snapshots, and what is done with it.
type snapshotWorkload struct {
	name  string
	setup func(c *crashConfig, rng *rand.Rand)
	// resized images have a snapshot of a larger disk; stale ones flags COPIED where a snapshot alone has tables, and
	// in its L1 table, as QEMU leaves them.
	resized, stale bool
	// kinds are the operations on snapshots to choose from: c(reate), a(pply), d(elete), r(ename).
	kinds string
}

// snapshotWorkloads are the workloads.
func snapshotWorkloads() []snapshotWorkload {
	pick := func(rng *rand.Rand, of ...int) int { return of[rng.IntN(len(of))] }
	basic := func(c *crashConfig, rng *rand.Rand) {
		c.create.Version = 3
		c.create.ClusterSize = pick(rng, 512, 512, 1024, 4096)
		c.create.RefcountBits = pick(rng, 2, 4, 8, 16, 16, 32, 64)
		c.create.Compression = CompressionType(rng.IntN(2))
		clusters := 90 + rng.IntN(60)
		if c.create.ClusterSize == 4096 {
			clusters = 30 + rng.IntN(20)
		}
		c.size = int64(clusters * c.create.ClusterSize)
		c.ops, c.sync, c.reopen, c.compressed = 24, 8, 2, 10
		c.fill, c.packed, c.zeros = rng.Float64(), 0.3, rng.IntN(2) == 0
		c.snapshot = rng.IntN(2) == 0
		if c.create.RefcountBits == 16 && rng.IntN(2) == 0 {
			c.create.Version, c.create.Compression, c.zeros = 2, CompressionDeflate, false
		}
		switch rng.IntN(8) {
		case 0:
			c.create.ExtendedL2, c.create.Version, c.create.ClusterSize, c.zeros = true, 3, 16<<10, true
			c.size = int64(6+rng.IntN(6)) * 16 << 10
		case 1:
			c.backing = []string{"raw", "qcow2"}[rng.IntN(2)]
		case 2:
			c.create.LazyRefcounts, c.create.Version = true, 3
		}
	}
	return []snapshotWorkload{
		{name: "create", kinds: "cccd", setup: basic},
		{name: "delete", kinds: "cddd", setup: func(c *crashConfig, rng *rand.Rand) { basic(c, rng); c.snapshot = true }},
		{name: "apply", kinds: "caaad", setup: func(c *crashConfig, rng *rand.Rand) { basic(c, rng); c.snapshot = true }},
		{name: "rename", kinds: "crrr", setup: basic},
		{name: "sizes", kinds: "caad", resized: true, setup: func(c *crashConfig, rng *rand.Rand) { basic(c, rng); c.snapshot = true }},
		{name: "stale", kinds: "aacd", stale: true, setup: func(c *crashConfig, rng *rand.Rand) { basic(c, rng); c.snapshot = true; c.fill = 1 }},
		{name: "full", kinds: "caad", setup: func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng)
			c.device, c.full = true, true
		}},
	}
}

// snapshotCrash is one recorded run.
type snapshotCrash struct {
	*crashRun
	w     snapshotWorkload
	snaps []crashSnapshot
	first []crashSnapshot // when the record begins
	done  map[byte]int    // operations that succeeded, by kind
}

// newSnapshotCrash builds the files of a workload.
func newSnapshotCrash(w snapshotWorkload, seed uint64, test testHooks) (*snapshotCrash, error) {
	c := newCrashConfig(crashWorkload{name: "snapshot/" + w.name, setup: w.setup}, seed)
	if c.create.RefcountBits <= 4 {
		c.packed = 0 // a cluster of compressed data may have all the references that it can, and none is left for a snapshot
	}
	r, err := newCrashRun(c)
	if err != nil {
		return nil, err
	}
	c.test = test
	s := &snapshotCrash{crashRun: r, w: w, done: make(map[byte]int)}
	if r.snap != nil {
		s.snaps = []crashSnapshot{{"1", "once", r.snap}}
	}
	if w.resized || w.stale {
		if err := s.edit(rand.New(rand.NewPCG(seed, 5))); err != nil {
			return nil, err
		}
	}
	s.first = slices.Clone(s.snaps)
	return s, nil
}

// edit makes the image what the workload wants, before the record begins.
func (s *snapshotCrash) edit(rng *rand.Rand) error {
	if s.w.stale {
		if err := s.makeStale(rng); err != nil {
			return err
		}
	}
	if s.w.resized {
		// The disk is made shorter by the header alone: its L1 table then maps more than it needs.
		cs := int64(s.create.ClusterSize)
		s.size = s.size * 2 / 3 / cs * cs
		off, p := encodeSizeField(uint64(s.size))
		if _, err := s.image.WriteAt(p, off); err != nil {
			return err
		}
		s.guest = s.guest[:s.size]
	}
	s.rec.Rebase()
	return nil
}

// makeStale writes to the disk until some of its L2 tables are not the snapshot's any more, and sets COPIED in the
// snapshot's L1 table and where it alone has the L2 table.
func (s *snapshotCrash) makeStale(rng *rand.Rand) error {
	o := s.openOptions(nil)
	o.test = testHooks{}
	img, err := OpenStorage(crashStorage{s.image}, o)
	if err != nil {
		return err
	}
	for off := int64(0); off < s.size; off += int64(s.create.ClusterSize) << rng.IntN(4) {
		p := make([]byte, min(512, s.size-off))
		crashContent(p, off, 1<<22, true)
		if _, err := img.WriteAt(p, off); err != nil {
			return errors.Join(err, img.Abandon())
		}
		copy(s.guest[off:], p)
	}
	entry := img.snapshots[0]
	if err := img.Close(); err != nil {
		return err
	}
	b := s.image.Disk().Bytes()
	edit, err := newCrashBytes(b, true)
	if err != nil {
		return err
	}
	shared := make(map[uint64]bool)
	for i := range uint64(edit.h.L1Entries) {
		shared[edit.word(edit.h.L1Off+8*i)&offsetMask] = true
	}
	for i := range uint64(entry.l1Size) {
		at := entry.l1Off + 8*i
		l2 := edit.word(at) & offsetMask
		if l2 == 0 {
			continue
		}
		if _, err := s.image.WriteAt(binary.BigEndian.AppendUint64(nil, l2|flagCopied), int64(at)); err != nil {
			return err
		}
		stride := uint64(8)
		if s.create.ExtendedL2 {
			stride = 16
		}
		for off := l2; !shared[l2] && off < l2+uint64(s.create.ClusterSize); off += stride {
			if e := edit.word(off); e != 0 && e&flagCompressed == 0 && e&offsetMask != 0 {
				if _, err := s.image.WriteAt(binary.BigEndian.AppendUint64(nil, e|flagCopied), int64(off)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// perform does the work of the run on the recorded files.
func (s *snapshotCrash) perform() error {
	rng := rand.New(rand.NewPCG(s.seed, 3))
	open := s.openOptions(nil)
	img, err := OpenStorage(crashStorage{s.image}, open)
	if err != nil {
		return err
	}
	g := newCrashGenerator(s.crashRun, rng, 0, s.size)
	for range s.ops {
		switch k := rng.IntN(100); {
		case k < s.reopen:
			if err := s.syncWith("close", img.Close); err != nil {
				return err
			}
			if img, err = OpenStorage(crashStorage{s.image}, open); err != nil {
				return err
			}
		case k < 30:
			if err := s.change(img, rng); err != nil {
				return err
			}
		default:
			if err := g.step(img); err != nil {
				return err
			}
		}
	}
	return s.syncWith("close", img.Close)
}

// readWholeDisk returns what d reads.
func readWholeDisk(d Disk) ([]byte, error) {
	p := make([]byte, d.Size())
	if n, err := d.ReadAt(p, 0); n < len(p) || err != nil && err != io.EOF {
		return nil, fmt.Errorf("read %d of %d bytes: %w", n, len(p), err)
	}
	return p, nil
}

// change does one operation on snapshots, with its marks.
func (s *snapshotCrash) change(img *Image, rng *rand.Rand) error {
	kind := s.w.kinds[rng.IntN(len(s.w.kinds))]
	if len(s.snaps) == 0 || kind != 'c' && len(s.snaps) > 0 && rng.IntN(8) == 0 {
		kind = 'c'
	}
	ctx := context.Background()
	m := crashSnapshotStart{after: slices.Clone(s.snaps)}
	i := 0
	if len(s.snaps) > 0 {
		i = rng.IntN(len(s.snaps))
	}
	var do func() error
	switch kind {
	case 'c':
		content, err := readWholeDisk(img)
		if err != nil {
			return err
		}
		o := &SnapshotOptions{Name: fmt.Sprint("s", rng.IntN(1000)), Date: unixEpoch}
		if rng.IntN(4) == 0 {
			state := make([]byte, 1+rng.IntN(3*s.create.ClusterSize))
			o.VMState, o.VMStateSize = bytes.NewReader(state), int64(len(state))
		}
		m.id = s.next("create snapshot %q", o.Name)
		m.after = append(m.after, crashSnapshot{nextSnapshotID(img.snapshots), o.Name, content})
		do = func() error { _, err := img.CreateSnapshot(ctx, o); return err }
	case 'a':
		m.id, m.disk = s.next("apply snapshot %q", s.snaps[i].id), s.snaps[i].content
		do = func() error { return img.ApplySnapshot(ctx, SnapshotRef{ID: s.snaps[i].id}) }
	case 'd':
		m.id, m.after = s.next("delete snapshot %q", s.snaps[i].id), slices.Delete(m.after, i, i+1)
		do = func() error { return img.DeleteSnapshot(ctx, SnapshotRef{ID: s.snaps[i].id}) }
	case 'r':
		m.id, m.after[i].name = s.next("rename snapshot %q", s.snaps[i].id), fmt.Sprint("r", rng.IntN(1000))
		do = func() error { return img.RenameSnapshot(SnapshotRef{ID: s.snaps[i].id}, m.after[i].name) }
	}
	s.rec.Mark(m)
	err := do()
	s.rec.Mark(crashSnapshotEnd{m.id, err != nil})
	if err != nil {
		if s.full && isNoSpace(err) {
			s.refused++
			return nil
		}
		if s.create.RefcountBits <= 4 && errors.Is(err, ErrTooLarge) {
			return nil
		}
		return err
	}
	s.done[kind]++
	s.snaps = m.after
	return nil
}

// snapshotLook looks at the states of one run.
type snapshotLook struct {
	*crashLook
	s       *snapshotCrash
	snaps   []crashSnapshot
	pending *crashSnapshotStart
	since   int // position of its mark
	taken   int
	windows int // states in the middle of an operation
}

// advance takes in the marks that it has not seen.
func (l *snapshotLook) advance(marks []any) {
	for ; l.taken < len(marks); l.taken++ {
		l.oracle.advance(marks[:l.taken+1])
		switch m := marks[l.taken].(type) {
		case crashSnapshotStart:
			l.pending, l.since = &m, l.taken
		case crashSnapshotEnd:
			if !m.failed {
				l.oracle.promise(l.since)
				l.snaps = l.pending.after
				if l.pending.disk != nil {
					l.oracle.guest = bytes.Clone(l.pending.disk)
					clear(l.oracle.touched)
					clear(l.oracle.values)
				}
			}
			l.pending = nil
		}
	}
}

// state looks at one state and returns what is wrong with it.
func (l *snapshotLook) state(s *crashtest.State) []crashFinding {
	l.findings = nil
	l.advance(s.Marks())
	image := s.Disk(l.image)
	l.images++
	if l.pending != nil {
		l.windows++
	}
	rep := l.walk(image)
	if rep == nil {
		return l.findings
	}
	if rep.Dirty() {
		l.dirty++
	}
	l.got = make([]byte, rep.Header.VirtualSize)
	bad, ok := l.read(image, nil)
	if !ok {
		return l.findings
	}
	l.compareDisk(bad)
	list := l.compareSnapshots(image, rep)
	if len(l.findings) == 0 && s.Index%8 == 3 {
		l.goOnWith(image, list, uint64(s.Index))
	}
	return l.findings
}

// compareDisk wants the disk to be as before or as after what is being done.
func (l *snapshotLook) compareDisk(bad map[int64]error) {
	wants := []*crashOracle{l.oracle}
	if l.pending != nil && l.pending.disk != nil {
		wants = append(wants, newCrashOracle(l.pending.disk, true))
	}
	before := l.findings
	var first []crashFinding
	for _, want := range wants {
		l.findings = nil
		if len(want.guest) != len(l.got) {
			l.add("I3", "a disk of %#x bytes instead of %#x", len(l.got), len(want.guest))
		} else {
			l.compare(want, bad)
		}
		if len(l.findings) == 0 {
			l.findings = before
			return
		}
		if first == nil {
			first = l.findings
		}
	}
	l.findings = append(before, first...)
}

// compareSnapshots wants the snapshots to be as before or as after what is being done, and returns those that are.
func (l *snapshotLook) compareSnapshots(image *crashtest.Disk, rep *refwalk.Report) []crashSnapshot {
	lists := [][]crashSnapshot{l.snaps}
	if l.pending != nil {
		lists = append(lists, l.pending.after)
	}
	size, err := image.Size()
	if err != nil {
		l.add("oracle", "%v", err)
	}
next:
	for _, list := range lists {
		if len(list) != len(rep.InternalSnapshots) {
			continue
		}
		for i, s := range rep.InternalSnapshots {
			if s.ID != list[i].id || s.Name != list[i].name {
				continue next
			}
		}
		for i := range list {
			src := l.source(image, size, nil)
			src.Snapshot = i + 1
			if b, err := refwalk.ReadGuest(src); err != nil || !bytes.Equal(b, list[i].content) {
				l.add("I4", "the content of snapshot %d changed, error %v", i, err)
			}
		}
		return list
	}
	l.add("I3", "snapshots %+v, which are those of neither before nor after", rep.InternalSnapshots)
	return nil
}

// goOnWith works with what the crash left: it reads the snapshots, writes, and makes, applies and deletes snapshots.
func (l *snapshotLook) goOnWith(image *crashtest.Disk, list []crashSnapshot, index uint64) {
	o := l.openOptions(nil)
	o.test = testHooks{}
	img, err := OpenStorage(crashStorage{image}, o)
	if err != nil {
		l.add("I3", "writable open: %v", err)
		return
	}
	l.rewrites++
	rng := rand.New(rand.NewPCG(l.seed, index))
	want, list := bytes.Clone(l.got), slices.Clone(list)
	work := func() error {
		ctx := context.Background()
		for i, s := range list {
			d, err := img.OpenSnapshot(SnapshotRef{ID: s.id})
			if err != nil {
				return err
			}
			if b, err := readWholeDisk(d); err != nil || !bytes.Equal(b, s.content) {
				return fmt.Errorf("snapshot %d reads otherwise, error %w", i, err)
			}
			if err := d.Close(); err != nil {
				return err
			}
		}
		for i := range 8 {
			var err error
			switch k := rng.IntN(8); {
			case k == 0 && len(list) > 0:
				i := rng.IntN(len(list))
				if err = img.DeleteSnapshot(ctx, SnapshotRef{ID: list[i].id}); err == nil {
					list = slices.Delete(list, i, i+1)
				}
			case k == 1:
				var s Snapshot
				if s, err = img.CreateSnapshot(ctx, nil); err == nil {
					list = append(list, crashSnapshot{s.ID, s.Name, bytes.Clone(want)})
				}
			case k == 2 && len(list) > 0:
				i := rng.IntN(len(list))
				if err = img.ApplySnapshot(ctx, SnapshotRef{ID: list[i].id}); err == nil {
					want = bytes.Clone(list[i].content)
				}
			default:
				off := rng.Int64N(int64(len(want)))
				p := want[off : off+min(1+rng.Int64N(2*int64(l.create.ClusterSize)), int64(len(want))-off)]
				crashContent(p, off, uint64(1<<30+i), true)
				if _, err = img.WriteAt(p, off); err != nil && l.full && isNoSpace(err) {
					_, err = img.ReadAt(p, off)
				}
			}
			if err != nil && !(l.full && isNoSpace(err)) && !(l.create.RefcountBits <= 4 && errors.Is(err, ErrTooLarge)) {
				return err
			}
		}
		return nil
	}
	if err := errors.Join(work(), img.Close()); err != nil {
		l.add("I5", "work after the crash: %v", err)
		return
	}
	rep := l.walk(image)
	if rep == nil || len(l.findings) > 0 {
		return
	}
	l.got = make([]byte, rep.Header.VirtualSize)
	if bad, ok := l.read(image, nil); ok && (len(bad) > 0 || !bytes.Equal(l.got, want)) {
		l.add("I4", "work after the crash changed other content, or cannot be read: %v", bad)
		return
	}
	snaps, pending := l.snaps, l.pending
	l.snaps, l.pending = list, nil
	l.compareSnapshots(image, rep)
	l.snaps, l.pending = snaps, pending
}

// runSnapshotCrash records a run and looks at its crash states, as runCrash does.
func runSnapshotCrash(w snapshotWorkload, seed uint64, test testHooks, budget crashBudget) (*crashTotals, *crashFailure, error) {
	s, err := newSnapshotCrash(w, seed, test)
	if err != nil {
		return nil, nil, err
	}
	// Work on an image with a broken order may fail; what it has done by then is looked at all the same.
	if err := s.perform(); err != nil && test == (testHooks{}) {
		return nil, nil, fmt.Errorf("%w\n%s", err, s.history())
	}
	l := &snapshotLook{s: s, snaps: s.first, crashLook: &crashLook{crashRun: s.crashRun, oracle: newCrashOracle(s.guest, true)}}
	log := s.rec.Log()
	opts := crashtest.Options{PerPoint: 8, Tightens: func(m any) bool { _, ok := m.(crashSnapshotEnd); return ok || crashTightens(m) }}
	if !budget.every {
		opts.Every = max(1, len(log)*opts.PerPoint/max(budget.states, 1))
	}
	t := &crashTotals{Runs: 1, Found: make(map[string]int)}
	var failure *crashFailure
	t.Stats, err = s.rec.States(rand.New(rand.NewPCG(seed, 4)), opts, func(st *crashtest.State) error {
		findings := l.state(st)
		if len(findings) == 0 && budget.judge != nil && st.Index%80 == int(seed)%80 {
			l.got = make([]byte, len(l.got))
			var judged bool
			if judged, findings = budget.judge.judge(l.crashLook, st); judged {
				t.Judged++
			}
		}
		stop := false
		for _, f := range findings {
			t.Found[f.invariant]++
			stop = stop || budget.stopWith == "" || budget.stopWith == f.invariant
		}
		if !stop {
			return nil
		}
		failure = &crashFailure{run: s.crashRun, state: st.String(), findings: findings, files: map[string][]byte{"image": st.Disk(s.image).Bytes()}}
		return errCrashStop
	})
	t.Images, t.Dirty, t.Rewrites, t.Refused, t.Moves = l.images, l.dirty, l.rewrites, s.refused, l.windows
	if err != nil && err != errCrashStop {
		return t, failure, err
	}
	if failure == nil && test == (testHooks{}) {
		err = s.checkEnd()
	}
	return t, failure, err
}

// runSnapshotCrashes looks at no fewer than perWorkload states of each workload, and fails the test for each finding.
func runSnapshotCrashes(t *testing.T, firstSeed uint64, perWorkload, perRun int) {
	var names []string
	totals := make(map[string]*crashTotals)
	next := make(chan struct{}, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	for _, w := range snapshotWorkloads() {
		names = append(names, w.name)
		total := &crashTotals{}
		totals[w.name] = total
		wg.Add(1)
		go func() {
			defer wg.Done()
			next <- struct{}{}
			defer func() { <-next }()
			judge := newCrashJudge(t)
			for seed, done := firstSeed, 0; done < perWorkload; seed++ {
				stats, failure, err := runSnapshotCrash(w, seed, testHooks{}, crashBudget{states: perRun, judge: judge})
				if failure != nil {
					failure.report(t)
					return
				}
				if err != nil {
					t.Errorf("%s: seed %d: %v", w.name, seed, err)
					return
				}
				done += stats.Distinct
				total.add(stats)
			}
		}()
	}
	wg.Wait()
	t.Logf("crash states of operations on snapshots, distinct by content, seeds from %d; moves are states in their middle:\n%s",
		firstSeed, crashTable(names, totals))
	for _, name := range names {
		s := totals[name]
		if !t.Failed() && (s.Moves*5 < s.States || s.Rewrites == 0) {
			t.Errorf("%s: of %d states only %d are in the middle of an operation, %d were written", name, s.States, s.Moves, s.Rewrites)
		}
		if !t.Failed() && name == "full" && s.Refused == 0 {
			t.Errorf("%s: the host never lacked space", name)
		}
	}
}

// TestCrashSnapshots looks at a slice of the crash states of operations on snapshots.
func TestCrashSnapshots(t *testing.T) {
	n := 150
	if testing.Short() {
		n = 60
	}
	runSnapshotCrashes(t, 1, n, 75)
}

// TestCampaignCrashSnapshots is the long run of TestCrashSnapshots, with as many states as crashStatesEnv says.
func TestCampaignCrashSnapshots(t *testing.T) {
	total, first := crashCampaign(t)
	runSnapshotCrashes(t, first, total/len(snapshotWorkloads())+1, 600)
}

// TestCrashSnapshotsBroken breaks one ordering at a time and wants the crash states to show it, under the name of the
// invariant that the ordering is for.
func TestCrashSnapshotsBroken(t *testing.T) {
	tests := []struct {
		name     string
		test     testHooks
		workload string
		want     string
		seeds    uint64 // of this many runs one must show it
	}{
		{"raised before COPIED is off", testHooks{snapshotSkip: snapshotSyncBeside}, "create", "I7", 4},
		{"header before its table", testHooks{snapshotSkip: snapshotSyncBeside | snapshotSyncRaise}, "create", "I3", 8},
		{"header before the counts/create", testHooks{snapshotSkip: snapshotSyncRaise}, "create", "I1", 4},
		{"header before the counts/apply", testHooks{snapshotSkip: snapshotSyncRaise}, "apply", "I1", 8},
		{"lowered before the header/delete", testHooks{snapshotSkip: snapshotSyncSwitch}, "delete", "I1", 4},
		{"lowered before the header/apply", testHooks{snapshotSkip: snapshotSyncSwitch}, "apply", "I1", 8},
		{"COPIED before the count", testHooks{snapshotSkip: snapshotSyncLower}, "delete", "I7", 8},
		{"COPIED kept in an applied snapshot", testHooks{keepCopied: true}, "stale", "I7", 4},
	}
	workloads := make(map[string]snapshotWorkload)
	for _, w := range snapshotWorkloads() {
		workloads[w.name] = w
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			found := make(map[string]int)
			for seed := uint64(1); seed <= tt.seeds; seed++ {
				stats, failure, err := runSnapshotCrash(workloads[tt.workload], seed, tt.test, crashBudget{states: 400, every: true, stopWith: tt.want})
				if err != nil && failure == nil {
					t.Logf("seed %d: %v", seed, err) // of later work on a broken image
					continue
				}
				for k, n := range stats.Found {
					found[k] += n
				}
				if failure != nil {
					t.Logf("seed %d: %s (in all: %v)", seed, crashFirst(failure, tt.want), found)
					return
				}
			}
			t.Errorf("no %s in %d runs, but %v", tt.want, tt.seeds, found)
		})
	}
}

// TestHoleSnapshotApply enumerates the window in which QEMU 7.2 leaves COPIED set on shared clusters while a snapshot is
// applied: its copy of the L1 table has the flags of the time before the snapshot was taken, and so may its L2 tables; from
// the moment the copy is the disk's until the flags are computed again, a crash leaves a disk whose writes in place change
// the snapshot. Images with such flags are applied here; nothing is found, and with the flags kept the window shows.
func TestHoleSnapshotApply(t *testing.T) {
	var stale snapshotWorkload
	for _, w := range snapshotWorkloads() {
		if w.name == "stale" {
			stale = w
		}
	}
	stale.kinds = "a"
	setup := stale.setup
	stale.setup = func(c *crashConfig, rng *rand.Rand) { setup(c, rng); c.ops = 8 }
	windows := 0
	for seed := uint64(1); seed <= 2; seed++ {
		stats, failure, err := runSnapshotCrash(stale, seed, testHooks{}, crashBudget{every: true})
		if failure != nil {
			failure.report(t)
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		windows += stats.Moves
		_, failure, err = runSnapshotCrash(stale, seed, testHooks{keepCopied: true}, crashBudget{every: true, stopWith: "I7"})
		if failure == nil {
			t.Errorf("seed %d: with the flags kept, nothing is found either (error %v)", seed, err)
		}
	}
	t.Logf("%d crash states in the middle of an apply", windows)
	if windows == 0 {
		t.Error("no state is in the middle of an apply")
	}
}
