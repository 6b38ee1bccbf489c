package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// amendWork is an operation that changes an image's structure and leaves the content of the disk, and of every
// snapshot, as it is. A crash in it must leave the features of before or of afterwards; after its return those.
type amendWork struct {
	name string
	make func(c *amendCase, rng *rand.Rand) // fills in the case
}

// amendCase is one run of such an operation. A work and a seed give one.
type amendCase struct {
	work string
	seed uint64

	create   CreateOptions
	size     int64
	fill     float64 // part of the clusters that is written
	zeros    bool    // zero clusters of both kinds
	snapshot bool
	short    bool   // the snapshot's entry lacks what version 3 demands
	device   bool   // the image is a device: garbage where nothing was written
	base     Disk   // the backing disk, or nil
	baseFile []byte // its bytes
	other    Disk   // the disk that a rebase names afterwards
	change   func(ctx context.Context, img *Image) error
	old, now func(i *Info) bool // whether the features are those of before, of afterwards
	test     testHooks
}

// String says how to repeat the case.
func (c *amendCase) String() string {
	return fmt.Sprintf("work %s seed %d: cluster %d, refcount bits %d, version %d, size %#x, extended %t, lazy %t, fill %.2f, zeros %t, snapshot %t (short %t), device %t, base %t",
		c.work, c.seed, c.create.ClusterSize, c.create.RefcountBits, c.create.Version, c.size, c.create.ExtendedL2, c.create.LazyRefcounts,
		c.fill, c.zeros, c.snapshot, c.short, c.device, c.base != nil)
}

// amendDisk returns a raw disk of n bytes in memory: half of its sectors say where they are, others say the name, or
// are zeros.
func amendDisk(n int64, name uint64, rng *rand.Rand) (Disk, []byte) {
	p := make([]byte, n)
	crashContent(p, 0, 1<<20, true)
	for off := int64(0); off < n; off += 1024 {
		q := p[off:min(off+1024, n)]
		switch rng.IntN(4) {
		case 0:
			crashContent(q, off, name, true)
		case 1:
			clear(q)
		}
	}
	d, err := NewRawDisk(crashStorage{crashtest.NewDisk(p)})
	if err != nil {
		panic(err)
	}
	return d, p
}

// amendOverlay returns an image in memory over a disk, of which it hides a half with content of its own and with zeros.
func amendOverlay(base Disk, n int64, rng *rand.Rand) Disk {
	o := &CreateOptions{ClusterSize: 512, BackingFile: "base", BackingFormat: "raw", Open: &OpenOptions{Backing: base}}
	img, err := CreateStorage(NewMemoryStorage(), n, o)
	if err != nil {
		panic(err)
	}
	p := make([]byte, 512)
	for off := int64(0); off < n; off += 512 {
		switch rng.IntN(4) {
		case 0:
			crashContent(p, off, 3, true)
			_, err = img.WriteAt(p, off)
		case 1:
			err = img.WriteZeroes(off, 512, 0)
		}
		if err != nil {
			panic(err)
		}
	}
	return img
}

// backingIs returns a test of the backing file's name.
func backingIs(name string) func(*Info) bool {
	return func(i *Info) bool { return i.BackingFile == name }
}

// amendWorks are the operations: every part of Amend, and both kinds of Rebase.
func amendWorks() []amendWork {
	basic := func(c *amendCase, rng *rand.Rand) {
		c.create.ClusterSize = 512 << rng.IntN(4)
		c.size = int64(c.create.ClusterSize)*int64(60+rng.IntN(60)) + 512*rng.Int64N(2)
		c.fill, c.zeros = rng.Float64(), true
		c.create.RefcountBits = 16
	}
	based := func(c *amendCase, rng *rand.Rand) {
		c.base, c.baseFile = amendDisk((c.size*int64(60+rng.IntN(80))/100+511)&^511, 1, rng)
		c.create.BackingFile, c.create.BackingFormat = "base", "raw"
	}
	amended := func(c *amendCase, o AmendOptions) {
		c.change = func(ctx context.Context, img *Image) error { return img.Amend(ctx, &o) }
	}
	rebased := func(c *amendCase, o RebaseOptions) {
		o.Backing = c.other
		c.change = func(ctx context.Context, img *Image) error { return img.Rebase(ctx, &o) }
		c.old, c.now = backingIs(c.create.BackingFile), backingIs(o.BackingFile)
	}
	return []amendWork{
		{"downgrade", func(c *amendCase, rng *rand.Rand) {
			basic(c, rng)
			if rng.IntN(2) == 0 {
				based(c, rng)
			}
			c.snapshot = rng.IntN(3) > 0
			o := AmendOptions{Version: 2}
			if rng.IntN(3) == 0 {
				c.create.RefcountBits, o.RefcountBits = 32<<rng.IntN(2), 16
			}
			c.create.LazyRefcounts = rng.IntN(4) == 0
			amended(c, o)
			c.old = func(i *Info) bool { return i.Version == 3 && i.RefcountBits == c.create.RefcountBits }
			c.now = func(i *Info) bool { return i.Version == 2 && i.RefcountBits == 16 }
		}},
		{"upgrade", func(c *amendCase, rng *rand.Rand) {
			basic(c, rng)
			c.create.Version, c.zeros = 2, false
			if rng.IntN(2) == 0 {
				based(c, rng)
			}
			c.snapshot, c.short = true, rng.IntN(3) > 0
			on := true
			o := AmendOptions{Version: 3, LazyRefcounts: &on}
			bits := 16
			if rng.IntN(2) == 0 {
				bits = 8 << rng.IntN(4)
				o.RefcountBits = bits
			}
			amended(c, o)
			c.old = func(i *Info) bool { return i.Version == 2 }
			c.now = func(i *Info) bool { return i.Version == 3 && i.LazyRefcounts && i.RefcountBits == bits }
		}},
		{"width", func(c *amendCase, rng *rand.Rand) {
			basic(c, rng)
			if rng.IntN(2) == 0 {
				based(c, rng)
			}
			from := rng.IntN(7)
			to := (from + 1 + rng.IntN(6)) % 7
			c.snapshot = min(from, to) > 1 && rng.IntN(2) == 0
			c.create.RefcountBits = 1 << from
			c.create.LazyRefcounts = rng.IntN(4) == 0
			amended(c, AmendOptions{RefcountBits: 1 << to})
			c.old = func(i *Info) bool { return i.RefcountBits == 1<<from }
			c.now = func(i *Info) bool { return i.RefcountBits == 1<<to }
		}},
		{"rebase", func(c *amendCase, rng *rand.Rand) {
			basic(c, rng)
			c.create.Version = 2 + rng.IntN(2)
			c.zeros = c.create.Version == 3
			if c.zeros && rng.IntN(3) == 0 {
				c.create.ExtendedL2, c.create.ClusterSize = true, 16<<10
				c.size = 20*16<<10 + 512*rng.Int64N(8)
			}
			c.create.LazyRefcounts = c.zeros && rng.IntN(4) == 0
			if rng.IntN(4) > 0 {
				based(c, rng)
			}
			c.fill /= 2
			var o RebaseOptions
			if c.base == nil || rng.IntN(3) > 0 {
				below := (c.size*int64(60+rng.IntN(80))/100 + 511) &^ 511
				if c.base != nil && rng.IntN(2) == 0 {
					c.other = amendOverlay(c.base, below, rng) // the chains have a layer in common
				} else {
					c.other, _ = amendDisk(below, 2, rng)
				}
				o.BackingFile, o.BackingFormat = "another/base", "qcow2"
			}
			rebased(c, o)
		}},
		{"rename", func(c *amendCase, rng *rand.Rand) {
			basic(c, rng)
			c.create.ClusterSize = 2048 << rng.IntN(3)
			c.size = int64(c.create.ClusterSize) * 20
			c.create.Version = 2 + rng.IntN(2)
			c.zeros = c.create.Version == 3
			based(c, rng)
			c.other = c.base
			rebased(c, RebaseOptions{BackingFile: strings.Repeat("long/", 20+rng.IntN(100)) + "base", BackingFormat: "qcow2", Unsafe: true})
		}},
	}
}

// newAmendCase returns the case of a work and seed.
func newAmendCase(w amendWork, seed uint64) *amendCase {
	rng := rand.New(rand.NewPCG(seed, 31))
	c := &amendCase{work: w.name, seed: seed, device: seed%3 == 1}
	w.make(c, rng)
	return c
}

// amendRun is a case that was recorded.
type amendRun struct {
	*amendCase
	rec   *crashtest.Recorder
	image *crashtest.File
	guest []byte // what the disk reads, always
	snap  []byte // what the snapshot reads, always; nil without
}

// amendDone marks the return of the operation.
type amendDone struct{}

// newAmendRun makes the image of a case.
func newAmendRun(c *amendCase) (*amendRun, error) {
	r := &amendRun{amendCase: c, rec: crashtest.NewRecorder()}
	rng := rand.New(rand.NewPCG(c.seed, 32))
	disk := crashtest.NewDisk(nil)
	length := 4*c.size + 512<<10
	if c.device {
		disk = crashtest.NewDevice(nil, length)
	}
	o := c.create
	o.Open, o.Overwrite = &OpenOptions{Backing: c.base, NoSync: true}, true
	img, err := CreateStorage(crashStorage{disk}, c.size, &o)
	if err != nil {
		return nil, err
	}
	fill := func(img *Image, seq uint64, part float64) error {
		cs := int64(c.create.ClusterSize)
		for off := int64(0); off < c.size; off += cs {
			if rng.Float64() >= part {
				continue
			}
			p := make([]byte, min(cs, c.size-off))
			crashContent(p, off, seq, true)
			if _, err := img.WriteAt(p[:(rng.IntN(len(p))/512+1)*512], off); err != nil {
				return err
			}
		}
		return img.Close()
	}
	if err := fill(img, 1<<21, c.fill); err != nil {
		return nil, err
	}
	b, err := c.edit(disk.Bytes(), rng)
	if err != nil {
		return nil, err
	}
	if c.snapshot {
		// Some clusters are the image's own again, some of those zeros.
		s := crashStorage{crashtest.NewDisk(b)}
		if c.device {
			s.Storage = crashtest.NewDevice(b, int64(len(b)))
		}
		if img, err = OpenStorage(s, &OpenOptions{ReadWrite: true, Backing: c.base, NoSync: true}); err != nil {
			return nil, err
		}
		if err := fill(img, 1<<22, 0.3); err != nil {
			return nil, err
		}
		b = s.Storage.(*crashtest.Disk).Bytes()
		if c.zeros {
			e, err := newCrashBytes(b, c.device)
			if err != nil {
				return nil, err
			}
			if err := e.addZeros(rng); err != nil {
				return nil, err
			}
		}
	}
	if c.device {
		r.image = r.rec.Device("image", b, int64(len(b)))
	} else {
		r.image = r.rec.Regular("image", b)
	}
	rep, err := refwalk.Walk(bytes.NewReader(b), int64(len(b)))
	if err == nil && !rep.Clean() {
		err = fmt.Errorf("not clean before the record begins: %s", strings.Join(rep.Findings, "; "))
	}
	if err != nil {
		return nil, err
	}
	if r.guest, err = r.read(bytes.NewReader(b), int64(len(b)), 0, c.base); err == nil && c.snapshot {
		r.snap, err = r.read(bytes.NewReader(b), int64(len(b)), 1, c.base)
	}
	return r, err
}

// edit gives the image b what the library does not make.
func (c *amendCase) edit(b []byte, rng *rand.Rand) ([]byte, error) {
	e, err := newCrashBytes(b, c.device)
	if err != nil {
		return nil, err
	}
	if c.zeros {
		if err := e.addZeros(rng); err != nil {
			return nil, err
		}
		if !c.create.ExtendedL2 {
			// Zeros without a host cluster too.
			err := e.entries(func(off, _ uint64) error {
				if e.word(off) == 0 && rng.IntN(8) == 0 {
					e.setWord(off, flagZero)
				}
				return nil
			})
			if err != nil {
				return nil, err
			}
		}
	}
	if !c.snapshot {
		return e.b, nil
	}
	if err := e.addSnapshot(); err != nil {
		return nil, err
	}
	if c.short {
		table := e.b[binary.BigEndian.Uint64(e.b[fieldSnapshotsOff:]):]
		binary.BigEndian.PutUint32(table[snapExtraSize:], 0)
		clear(table[minSnapshotEntry:512])
		copy(table[minSnapshotEntry:], "1once")
	}
	return e.b, nil
}

// read returns what the disk (snapshot 0) or a snapshot of the image reads over the disk below, as the independent
// reader has it.
func (r *amendRun) read(image interface {
	ReadAt([]byte, int64) (int, error)
}, size int64, snapshot int, below Disk) ([]byte, error) {
	s := refwalk.Source{Image: image, Size: size, Snapshot: snapshot}
	if below != nil {
		s.Backing = func(p []byte, off int64) error {
			clear(p)
			if off < below.Size() {
				_, _ = below.ReadAt(p[:min(int64(len(p)), below.Size()-off)], off)
			}
			return nil
		}
	}
	return refwalk.ReadGuest(s)
}

// below returns the disk that an image names.
func (r *amendRun) below(i *Info) Disk {
	switch i.BackingFile {
	case "":
		return nil
	case "base":
		return r.base
	}
	return r.other
}

// perform records the operation.
func (r *amendRun) perform() error {
	img, err := OpenStorage(crashStorage{r.image}, &OpenOptions{ReadWrite: true, Backing: r.base, L2CacheBytes: 1, RefcountCacheBytes: 1, test: r.test})
	if err != nil {
		return err
	}
	if err := r.change(context.Background(), img); err != nil {
		return err
	}
	r.rec.Mark(amendDone{})
	p := make([]byte, len(r.guest))
	if _, err := img.ReadAt(p, 0); r.test == (testHooks{}) && (err != nil || !bytes.Equal(p, r.guest)) {
		return fmt.Errorf("the live image reads otherwise: %w", errors.Join(err, img.Abandon()))
	}
	return img.Close()
}

// amendLook looks at the crash states of one run.
type amendLook struct {
	*amendRun
	judge    *crashJudge
	findings []crashFinding
	judged   int
	written  int
	before   int // states with the old features
}

// add notes a finding.
func (l *amendLook) add(invariant, format string, args ...any) {
	l.findings = append(l.findings, crashFinding{invariant, fmt.Sprintf(format, args...)})
}

// state looks at a state.
func (l *amendLook) state(s *crashtest.State) []crashFinding {
	l.findings = nil
	d := s.Disk(l.image)
	size, err := d.Size()
	if err != nil {
		l.add("I3", "%v", err)
		return l.findings
	}
	info, err := Inspect(d, size, nil)
	if err != nil {
		l.add("I3", "inspect: %v", err)
		return l.findings
	}
	done := slices.Contains(s.Marks(), any(amendDone{}))
	if l.old(info) && !done {
		l.before++
	} else if !l.now(info) {
		l.add("I5", "the features are neither those of before nor of afterwards (returned %t): %+v", done, *info)
	}
	below := l.below(info)
	l.walk(d, size)
	if len(l.findings) > 0 {
		return l.findings
	}
	l.readAll(d, size, below)
	if len(l.findings) == 0 && s.Index%8 == 3 {
		l.goOn(d, below)
	}
	if len(l.findings) == 0 && l.judge != nil && s.Index%20 == int(l.seed%20) && (below == nil || info.BackingFile == "base") {
		l.ask(s.Disk(l.image))
	}
	return l.findings
}

// walk counts references.
func (l *amendLook) walk(d *crashtest.Disk, size int64) *refwalk.Report {
	rep, err := refwalk.Walk(d, size)
	if err != nil {
		l.add("I3", "walk: %v", err)
		return nil
	}
	if rep.Corruptions() > 0 {
		invariant := "I3"
		if rep.TooLow > 0 && !rep.Dirty() {
			invariant = "I1"
		}
		l.add(invariant, "%d corruptions: %s", rep.Corruptions(), strings.Join(rep.Findings, "; "))
	}
	return rep
}

// readAll compares what the library and the independent reader read.
func (l *amendLook) readAll(d *crashtest.Disk, size int64, below Disk) {
	changed := false
	img, err := OpenStorage(crashSealed{d, &changed}, &OpenOptions{Backing: below})
	if err != nil {
		l.add("I3", "open: %v", err)
		return
	}
	got := make([]byte, img.Size())
	if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, l.guest) {
		l.add("I5", "the disk reads otherwise: %v, %v", err, difference(got, l.guest, 0))
	}
	if err := img.Close(); err != nil || changed {
		l.add("I10", "close: %v, changed %t", err, changed)
	}
	if got, err := l.read(d, size, 0, below); err != nil || !bytes.Equal(got, l.guest) {
		l.add("I5", "the disk reads otherwise by the independent reader: %v", err)
	}
	if l.snap == nil {
		return
	}
	// A rebase changes what snapshots see, where they hold nothing.
	if got, err := l.read(d, size, 1, below); err != nil || !bytes.Equal(got, l.snap) && l.other == nil {
		l.add("I5", "the snapshot reads otherwise: %v, %v", err, difference(got, l.snap, 0))
	}
}

// goOn works on the state.
func (l *amendLook) goOn(d *crashtest.Disk, below Disk) {
	img, err := OpenStorage(crashStorage{d}, &OpenOptions{ReadWrite: true, Backing: below})
	if err != nil {
		l.add("I3", "writable open: %v", err)
		return
	}
	l.written++
	want := bytes.Clone(l.guest)
	rng := rand.New(rand.NewPCG(l.seed, 33))
	for range 5 {
		off := rng.IntN(len(want))
		p := want[off:min(off+1+rng.IntN(3*l.create.ClusterSize), len(want))]
		crashContent(p, int64(off), 1<<30, true)
		if _, err := img.WriteAt(p, int64(off)); err != nil {
			l.add("I5", "write after the crash: %v", errors.Join(err, img.Abandon()))
			return
		}
	}
	if err := img.Close(); err != nil {
		l.add("I5", "close after the crash: %v", err)
		return
	}
	size, err := d.Size()
	if err != nil {
		l.add("I5", "%v", err)
		return
	}
	l.walk(d, size)
	if got, err := l.read(d, size, 0, below); err != nil || !bytes.Equal(got, want) {
		l.add("I4", "work after the crash changed other content: %v", err)
	}
}

// ask asks QEMU.
func (l *amendLook) ask(d *crashtest.Disk) {
	err := d.WriteFile(filepath.Join(l.judge.dir, "image"))
	if err == nil && l.baseFile != nil {
		err = os.WriteFile(filepath.Join(l.judge.dir, "base"), l.baseFile, 0o600)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(l.judge.dir, "guest"), l.guest, 0o600)
	}
	if err != nil {
		l.judge.t.Error(err)
		return
	}
	l.judged++
	if c := l.judge.check(); c.CheckErrors > 0 || c.Exit == 1 || c.Corruptions > 0 && !onlyLostCopied(c.Output) {
		l.add("qemu", "check: %s", c.Output)
	}
	if out, exit := l.judge.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", "image", "guest"); exit != 0 {
		l.add("qemu", "compare: %s", out)
	}
}

// amendTotals counts what was looked at.
type amendTotals struct {
	crashtest.Stats
	runs, before, written, judged int
	found                         map[string]int
}

// runAmendCase records a case and looks at its states: at some of them at every point.
func runAmendCase(c *amendCase, perPoint int, judge *crashJudge, total *amendTotals) (failure *crashFinding, state string, err error) {
	r, err := newAmendRun(c)
	if err != nil {
		return nil, "", err
	}
	if err := r.perform(); err != nil {
		return nil, "", err
	}
	l := &amendLook{amendRun: r, judge: judge}
	stats, err := r.rec.States(rand.New(rand.NewPCG(c.seed, 34)), crashtest.Options{PerPoint: perPoint}, func(s *crashtest.State) error {
		if f := l.state(s); len(f) > 0 {
			for _, x := range f {
				total.found[x.invariant]++
			}
			failure, state = &f[0], s.String()
			return errCrashStop
		}
		return nil
	})
	total.Stats.Add(stats)
	total.runs, total.before, total.written, total.judged = total.runs+1, total.before+l.before, total.written+l.written, total.judged+l.judged
	if err != nil && err != errCrashStop {
		return failure, state, err
	}
	if failure == nil && c.test == (testHooks{}) {
		d := r.image.Disk()
		size, err := d.Size()
		if err != nil {
			return nil, "", err
		}
		if rep := l.walk(d, size); rep == nil || !rep.Clean() {
			return nil, "", fmt.Errorf("not clean after Close: %v", rep.Findings)
		}
	}
	return failure, state, nil
}

// TestCrashAmend looks at a slice of the crash states of Amend and Rebase; with QCOW2_CRASH_STATES set at many more, at
// least 10 000 of each operation.
func TestCrashAmend(t *testing.T) {
	perWork, perPoint := 100, 2
	if n, err := strconv.Atoi(os.Getenv(crashStatesEnv)); err == nil {
		perWork, perPoint = max(10_000, n/len(amendWorks())), 12
	}
	next := make(chan struct{}, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	for _, w := range amendWorks() {
		wg.Add(1)
		go func() {
			defer wg.Done()
			next <- struct{}{}
			defer func() { <-next }()
			judge := newCrashJudge(t)
			total := &amendTotals{found: make(map[string]int)}
			for seed := uint64(1); total.Distinct < perWork; seed++ {
				c := newAmendCase(w, seed)
				failure, state, err := runAmendCase(c, perPoint, judge, total)
				if failure != nil || err != nil {
					t.Errorf("%v: %v\n%v\n%s", c, err, failure, state)
					return
				}
			}
			t.Logf("%-10s %4d runs, %s, %d with the old features, %d written, %d judged by QEMU", w.name, total.runs, total.Stats, total.before, total.written, total.judged)
			if total.before == 0 || total.written == 0 || judge != nil && total.judged == 0 {
				t.Errorf("%s: %d states with the old features, %d written, %d judged: too few", w.name, total.before, total.written, total.judged)
			}
		}()
	}
	wg.Wait()
}

// TestCrashAmendBroken leaves one sync of Amend and Rebase out at a time, and wants the crash states to show it.
func TestCrashAmendBroken(t *testing.T) {
	works := make(map[string]amendWork)
	for _, w := range amendWorks() {
		works[w.name] = w
	}
	for _, tt := range []struct {
		name string
		skip amendSync
		work string
		want []string
	}{
		{"header/rename", amendSyncHeader, "rename", []string{"I3", "I5"}},
		{"copies/rebase", amendSyncCopy, "rebase", []string{"I5"}},
		{"refcounts/width", amendSyncRefcounts, "width", []string{"I1", "I3"}},
		{"snapshot table/upgrade", amendSyncSnapshots, "upgrade", []string{"I1", "I3", "I5"}},
		{"zeros/downgrade", amendSyncZeros, "downgrade", []string{"I1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			total := &amendTotals{found: make(map[string]int)}
			for seed := uint64(1); seed <= 12; seed++ {
				c := newAmendCase(works[tt.work], seed)
				c.test.amendSkip = tt.skip
				failure, _, err := runAmendCase(c, 12, nil, total)
				if failure == nil {
					if err != nil {
						t.Logf("%v: %v", c, err)
					}
					continue
				}
				if !slices.Contains(tt.want, failure.invariant) {
					t.Errorf("%v: %v, want %v", c, failure, tt.want)
				}
				t.Logf("seed %d, after %d states: %s: %.200s", seed, total.States, failure.invariant, failure.detail)
				return
			}
			t.Errorf("nothing found in %d states", total.States)
		})
	}
}

// TestDowngradeNeverUncounted is the window of the downgrade to version 2 in which QEMU 7.2 leaves clusters of zeros
// named by entries and without a refcount (after a crash there, the next allocation gives them to somebody else). Zero
// clusters of the disk and of a snapshot are written out; in every state between the writes each cluster has at least
// as many references counted as it has. With the sync between refcounts and entries left out the window is open, so
// the states that are looked at are the ones that matter.
func TestDowngradeNeverUncounted(t *testing.T) {
	uncounted := func(seed uint64, skip amendSync) (states, bad int, first string) {
		i := slices.IndexFunc(amendWorks(), func(w amendWork) bool { return w.name == "downgrade" })
		c := newAmendCase(amendWorks()[i], seed)
		c.test.amendSkip = skip
		r, err := newAmendRun(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.perform(); err != nil {
			t.Fatalf("%v: %v", c, err)
		}
		stats, err := r.rec.States(rand.New(rand.NewPCG(seed, 1)), crashtest.Options{PerPoint: 6}, func(s *crashtest.State) error {
			d := s.Disk(r.image)
			size, err := d.Size()
			if err != nil {
				return err
			}
			rep, err := refwalk.Walk(d, size)
			if err != nil {
				return err
			}
			if rep.TooLow > 0 {
				if bad++; first == "" {
					first = fmt.Sprintf("%v: %q\n%v", c, rep.Findings, s)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return stats.States, bad, first
	}
	states, open := 0, 0
	for seed := uint64(1); seed <= 5; seed++ {
		n, bad, first := uncounted(seed, amendSyncNone)
		if states += n; bad > 0 {
			t.Errorf("%d states with a cluster that has too few references: %s", bad, first)
		}
		_, bad, _ = uncounted(seed, amendSyncZeros)
		open += bad
	}
	t.Logf("%d states; with the order broken %d are bad", states, open)
	if open == 0 {
		t.Error("the window was not looked at")
	}
}
