package qcow2

import (
	"bytes"
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

// crashStatesEnv is the environment variable that asks for the long run, by the number of crash states that
// it shall look at in all: at least 5 000 of each workload.
//
//	QCOW2_CRASH_STATES=100000 go test -run TestCampaignCrash -timeout 60m -v .
//
// Another run looks at other states if QCOW2_CRASH_SEED gives the first seed; its default is 1. QCOW2_CRASH_WORKLOADS
// names workloads, separated by commas, to look at them alone.
const (
	crashStatesEnv = "QCOW2_CRASH_STATES"
	crashSeedEnv   = "QCOW2_CRASH_SEED"
	crashNamesEnv  = "QCOW2_CRASH_WORKLOADS"
)

// crashFinding is something that a crash must not leave.
type crashFinding struct {
	invariant string // "I1" ... of docs/GUARANTEES.md, or "oracle" where the readers disagree, or "qemu"
	detail    string
}

// crashCandidate is a write that may show in a sector, or not.
type crashCandidate struct {
	id   int
	in   int // where it begins in the sector
	data []byte
}

// crashOracle knows what the guest may read after a crash: of each sector what the last Sync promised, and
// what was written by writes that began later.
type crashOracle struct {
	guest    []byte // what is promised, if nothing later shows
	touched  map[int64][]crashCandidate
	values   map[int64][][]byte // of touched sectors: what they may hold; made when needed
	ended    map[int]int        // position of the end mark of writes that returned
	syncs    map[int]int        // position of the start mark of syncs
	left     []byte             // what is left when a MakeEmpty in progress has done its work; else nil
	size     int64              // of the disk, as promised
	next     int64              // the size that a resize gives it meanwhile; else size
	taken    int                // marks taken in
	promised bool               // Create has returned
}

// newCrashOracle returns the oracle for the beginning of a record.
func newCrashOracle(guest []byte, created bool) *crashOracle {
	size := int64(len(guest))
	return &crashOracle{
		guest: bytes.Clone(guest), size: size, next: size, touched: make(map[int64][]crashCandidate), values: make(map[int64][][]byte),
		ended: make(map[int]int), syncs: make(map[int]int), promised: created,
	}
}

// advance takes in the marks that it has not seen.
func (o *crashOracle) advance(marks []any) {
	for ; o.taken < len(marks); o.taken++ {
		switch m := marks[o.taken].(type) {
		case crashCreated:
			o.promised = true
		case crashWriteStart:
			for at, p := m.off, m.data; len(p) > 0; {
				sector, in := at/sectorSize, int(at%sectorSize)
				n := min(len(p), sectorSize-in)
				o.touched[sector] = append(o.touched[sector], crashCandidate{m.id, in, p[:n]})
				delete(o.values, sector)
				p, at = p[n:], at+int64(n)
			}
		case crashWriteEnd:
			o.ended[m.id] = o.taken
		case crashSyncStart:
			o.syncs[m.id] = o.taken
		case crashSyncEnd:
			o.promise(o.syncs[m.id])
		case crashEmptyStart, crashEmptyEnd:
			o.empty(m)
		case crashResizeStart:
			o.next = m.size
		case crashResizeEnd:
			o.resized()
		}
	}
}

// resized makes the next size the promised one. What was behind a smaller size is gone for good.
func (o *crashOracle) resized() {
	if o.next < o.size {
		clear(o.guest[o.next:o.size])
		for sector := range o.touched {
			if sector*sectorSize >= o.next {
				delete(o.touched, sector)
				delete(o.values, sector)
			}
		}
	}
	o.size = o.next
}

// promise makes durable what had returned before mark number start. Writes of one sector follow each other.
func (o *crashOracle) promise(start int) {
	for sector, list := range o.touched {
		n := 0
		for n < len(list) {
			end, ok := o.ended[list[n].id]
			if !ok || end > start {
				break
			}
			copy(o.guest[sector*sectorSize+int64(list[n].in):], list[n].data)
			n++
		}
		if n == 0 {
			continue
		}
		delete(o.values, sector)
		if n == len(list) {
			delete(o.touched, sector)
		} else {
			o.touched[sector] = slices.Clone(list[n:])
		}
	}
}

// maxCrashValues bounds how many contents a sector may have: the generator syncs long before that many
// writes of parts of one sector.
const maxCrashValues = 4096

// may reports whether a touched sector may read p: as promised, with any of the later writes upon it.
func (o *crashOracle) may(sector int64, p []byte) bool {
	values := o.values[sector]
	if values == nil {
		values = [][]byte{o.guest[sector*sectorSize:][:sectorSize]}
		for _, c := range o.touched[sector] {
			for _, v := range values[:len(values):len(values)] {
				if len(values) >= maxCrashValues {
					break
				}
				w := bytes.Clone(v)
				copy(w[c.in:], c.data)
				if !slices.ContainsFunc(values, func(v []byte) bool { return bytes.Equal(v, w) }) {
					values = append(values, w)
				}
			}
		}
		o.values[sector] = values
	}
	return slices.ContainsFunc(values, func(v []byte) bool { return bytes.Equal(v, p) })
}

// crashSealed is a storage under a read-only open: changing it is an error (I10).
type crashSealed struct {
	crashtest.Storage
	changed *bool
}

// Lock does nothing.
func (crashSealed) Lock(LockRole) error { return nil }

// change notes the attempt and refuses it.
func (s crashSealed) change() error {
	*s.changed = true
	return errors.New("change of a file that is open for reading")
}

// WriteAt refuses.
func (s crashSealed) WriteAt([]byte, int64) (int, error) { return 0, s.change() }

// Truncate refuses.
func (s crashSealed) Truncate(int64) error { return s.change() }

// PunchHole refuses.
func (s crashSealed) PunchHole(int64, int64) error { return s.change() }

// WriteZeroes refuses.
func (s crashSealed) WriteZeroes(int64, int64) error { return s.change() }

// Allocate refuses.
func (s crashSealed) Allocate(int64, int64) error { return s.change() }

// crashLook looks at the states of one run.
type crashLook struct {
	*crashRun
	oracle   *crashOracle
	buf      []byte // for the largest disk
	got      []byte // what the library reads of the state; of buf
	findings []crashFinding
	images   int // states that held an image
	dirty    int // states with the dirty bit
	rewrites int // states that were opened for writing, written and closed
}

// add notes a finding.
func (l *crashLook) add(invariant, format string, args ...any) {
	l.findings = append(l.findings, crashFinding{invariant, fmt.Sprintf(format, args...)})
}

// state looks at one state and returns what is wrong with it.
func (l *crashLook) state(s *crashtest.State) []crashFinding {
	l.findings = nil
	l.oracle.advance(s.Marks())
	image := s.Disk(l.image)
	var data *crashtest.Disk
	if l.data != nil {
		data = s.Disk(l.data)
	}
	want := l.oracle
	if !l.oracle.promised {
		none, old := l.beforeCreate(image)
		if none {
			return nil
		}
		if old {
			want = newCrashOracle(l.old, true)
		}
	}
	l.images++
	rep := l.walk(image)
	if rep == nil {
		return l.findings
	}
	if rep.Dirty() {
		l.dirty++
	}
	bad, ok := l.read(image, data, l.oracle.size, l.oracle.next)
	if !ok {
		return l.findings
	}
	if len(bad) > 0 || !want.emptied(l.got) {
		l.compare(want, bad)
	}
	l.readIndependently(image, data, bad)
	if len(l.findings) == 0 && s.Index%8 == 3 {
		l.goOn(image, data, rep, uint64(s.Index))
	}
	return l.findings
}

// beforeCreate looks at a state of before Create returned: whether there is no image, or still the old one,
// whole.
func (l *crashLook) beforeCreate(image *crashtest.Disk) (none, old bool) {
	b := image.Bytes()
	if len(b) < 4 || string(b[:4]) != "QFI\xfb" {
		return true, false
	}
	return false, len(b) == len(l.oldImage) && bytes.Equal(b[:sectorSize], l.oldImage[:sectorSize])
}

// walk counts references. It returns nil if there is nothing to walk.
func (l *crashLook) walk(image *crashtest.Disk) *refwalk.Report {
	size, err := image.Size()
	if err != nil {
		l.add("I3", "%v", err)
		return nil
	}
	rep, err := refwalk.Walk(image, size)
	if err != nil {
		l.add("I3", "walk: %v", err)
		return nil
	}
	l.findGarbage(rep)
	if rep.Corruptions() == 0 {
		return rep
	}
	var entry [8]byte
	if n, err := image.ReadAt(entry[:], int64(rep.Header.RefTableOff)); n < 8 || entry == [8]byte{} {
		l.add("I3", "the refcount table at %#x is blank: %v", rep.Header.RefTableOff, err)
	}
	for _, c := range []struct {
		invariant string
		n         int
		lazy      bool // harmless under the dirty bit
	}{
		{"I1", rep.TooLow, true},
		{"I3", rep.BadEntries, false},
		{"I7", rep.CopiedWrong, true},
		{"I8", rep.Overlaps, false},
	} {
		if c.n == 0 || c.lazy && rep.Dirty() {
			continue
		}
		detail := "(not spelled out)"
		for _, f := range rep.Findings {
			if !strings.HasPrefix(f, c.invariant+":") {
				continue
			}
			detail = f
			if strings.Contains(f, "(I3:") {
				l.add("I3", "%s", f)
				break
			}
		}
		l.add(c.invariant, "%d of: %s", c.n, detail)
	}
	return rep
}

// findGarbage looks for a refcount block that was never written, which to the walk is full of leaks: no run
// makes anything like so many references.
func (l *crashLook) findGarbage(rep *refwalk.Report) {
	for _, f := range rep.Findings {
		var cluster, stored, refs uint64
		if _, err := fmt.Sscanf(f, "leak: cluster %d refcount %d references %d", &cluster, &stored, &refs); err == nil && stored > 1<<20 {
			l.add("I3", "a refcount block holds garbage: %s", f)
			return
		}
	}
}

// read reads the whole guest with the library, opened read-only, into got. bad tells the sectors that it
// cannot read; ok is false if it cannot open the image, or the disk has none of the sizes,
// which are by default that of what was read before.
func (l *crashLook) read(image, data *crashtest.Disk, sizes ...int64) (bad map[int64]error, ok bool) {
	changed := false
	o := &OpenOptions{Backing: l.backingDisk}
	if data != nil {
		o.DataFile = crashSealed{data, &changed}
	}
	img, err := OpenStorage(crashSealed{image, &changed}, o)
	if err != nil {
		l.add("I3", "open: %v", err)
		return nil, false
	}
	if len(sizes) == 0 {
		sizes = []int64{int64(len(l.got))}
	}
	if n := img.Size(); !slices.Contains(sizes, n) {
		l.add("I3", "a disk of %#x bytes instead of %#x", n, sizes)
		return nil, false
	}
	if int64(len(l.buf)) < img.Size() {
		l.buf = make([]byte, img.Size())
	}
	l.got = l.buf[:img.Size()]
	if i := img.Info(); i.BackingFile != l.create.BackingFile || i.BackingFormat != l.create.BackingFormat || i.DataFile != l.create.DataFile {
		l.add("I3", "the header names backing file %q, format %q, and data file %q", i.BackingFile, i.BackingFormat, i.DataFile)
	}
	if _, err := img.ReadAt(l.got, 0); err != nil {
		bad = make(map[int64]error)
		for at := int64(0); at < int64(len(l.got)); at += sectorSize {
			if _, err := img.ReadAt(l.got[at:at+sectorSize], at); err != nil {
				bad[at/sectorSize] = err
			}
		}
		if len(bad) == 0 {
			l.add("oracle", "the whole cannot be read, but each sector: %v", err)
		}
	}
	if err := img.Close(); err != nil {
		l.add("oracle", "close: %v", err)
	}
	if changed {
		l.add("I10", "a read-only open changed a file")
	}
	return bad, true
}

// compare sets what was read beside what may be read. Content of another sector is somebody else's write (I4),
// and so is a change in a cluster that nobody touched since the last Sync; else the data of a mapping was
// not there (I2).
func (l *crashLook) compare(want *crashOracle, bad map[int64]error) {
	const chunk = 32 * sectorSize
	sectors := int64(len(l.got)) / sectorSize
	perCluster := max(int64(l.create.ClusterSize)/sectorSize, 1)
	found := make(map[string]bool)
	for at := int64(0); at < sectors; at++ {
		if at%32 == 0 && len(bad) == 0 {
			off := at * sectorSize
			end := min(off+chunk, int64(len(l.got)))
			if bytes.Equal(l.got[off:end], want.guest[off:end]) {
				at += 31
				continue
			}
		}
		p := l.got[at*sectorSize:][:sectorSize]
		err := bad[at]
		_, touched := want.touched[at]
		if err == nil && (bytes.Equal(p, want.guest[at*sectorSize:][:sectorSize]) || touched && want.may(at, p)) {
			continue
		}
		beside := false // the cluster was touched
		for s := at / perCluster * perCluster; s < (at/perCluster+1)*perCluster; s++ {
			_, ok := want.touched[s]
			beside = beside || ok
		}
		invariant := "I2"
		if err == nil && crashForeign(p, at, sectors) || !beside {
			invariant = "I4"
		}
		if found[invariant] {
			continue
		}
		found[invariant] = true
		l.add(invariant, "guest sector %d (touched since the last sync %t, its cluster %t) reads %x..., error %v, instead of %x... or one of %d writes",
			at, touched, beside, p[:24], err, want.guest[at*sectorSize:][:24], len(want.touched[at]))
	}
}

// readIndependently compares what the library read with what the independent reader does, and looks at the
// snapshot.
func (l *crashLook) readIndependently(image, data *crashtest.Disk, bad map[int64]error) {
	size, err := image.Size()
	if err != nil {
		l.add("oracle", "%v", err)
		return
	}
	var dataStorage crashtest.Storage
	if data != nil {
		dataStorage = data
	}
	src := l.source(image, size, dataStorage)
	b, err := refwalk.ReadGuest(src)
	switch {
	case err != nil && len(bad) == 0:
		l.add("oracle", "only the library can read: %v", err)
	case err == nil && len(bad) > 0:
		l.add("oracle", "only the library cannot read: %v", bad)
	case err == nil && !bytes.Equal(b, l.got):
		l.add("oracle", "library and independent reader disagree")
	}
	if l.snap == nil {
		return
	}
	src.Snapshot = 1
	if b, err = refwalk.ReadGuest(src); err != nil || !bytes.Equal(b, l.snap) {
		l.add("I4", "the snapshot's content changed, error %v", err)
	}
}

// goOn opens the state for writing, writes, syncs and closes, and walks and reads again: what the crash left
// must be fit to work on. A dirty image is repaired by that open, and refused if it may not be.
func (l *crashLook) goOn(image, data *crashtest.Disk, rep *refwalk.Report, index uint64) {
	var dataStorage Storage
	if data != nil {
		dataStorage = crashStorage{data}
	}
	o := l.openOptions(dataStorage)
	o.test = testHooks{}
	if rep.Dirty() {
		never := *o
		never.Repair = RepairNever
		if _, err := OpenStorage(crashStorage{image}, &never); !errors.Is(err, ErrDirty) {
			l.add("I1", "writable open of a dirty image without a repair: %v", err)
			return
		}
	}
	img, err := OpenStorage(crashStorage{image}, o)
	if err != nil {
		l.add("I3", "writable open: %v", err)
		return
	}
	l.rewrites++
	rng := rand.New(rand.NewPCG(l.seed, index))
	want := bytes.Clone(l.got)
	if l.resize > 0 {
		if want = l.resizeAfter(img, rng, want); want == nil {
			return
		}
	}
	for i := range 6 {
		if len(want) == 0 {
			break
		}
		off := rng.Int64N(int64(len(want)))
		n := min(1+rng.Int64N(2*int64(l.create.ClusterSize)), int64(len(want))-off)
		compress := l.compressed > 0 && rng.IntN(2) == 0
		if compress {
			off -= off % int64(l.create.ClusterSize)
			n = min(int64(l.create.ClusterSize), int64(len(want))-off)
		}
		p := want[off : off+n]
		crashContent(p, off, uint64(1<<30+i), true)
		if compress {
			err = img.WriteCompressed(p, off)
		} else {
			_, err = img.WriteAt(p, off)
		}
		if err == nil && rng.IntN(3) == 0 {
			err = img.Sync()
		}
		if l.full && isNoSpace(err) {
			_, err = img.ReadAt(p, off) // as much as was written
		}
		if err != nil {
			l.add("I5", "write after the crash: %v", errors.Join(err, img.Abandon()))
			return
		}
	}
	if err := img.Close(); err != nil {
		l.add("I5", "close after the crash: %v", err)
		return
	}
	if l.walk(image) == nil || len(l.findings) > 0 {
		return
	}
	bad, ok := l.read(image, data, int64(len(want)))
	if !ok {
		return
	}
	if len(bad) > 0 || !bytes.Equal(l.got, want) {
		l.add("I4", "work after the crash changed other content, or cannot be read: %v", bad)
		return
	}
	l.readIndependently(image, data, bad)
}

// crashTotals counts what was looked at: beside the states, the runs, the states that hold an image, have the
// dirty bit, were opened for writing and written, were judged by QEMU; the writes that failed on a full host,
// and the moves of refcount tables.
type crashTotals struct {
	crashtest.Stats
	Runs, Images, Dirty, Rewrites, Judged, Refused, Moves int
	Found                                                 map[string]int // findings by invariant
}

// add adds other counts.
func (t *crashTotals) add(o *crashTotals) {
	t.Stats.Add(o.Stats)
	t.Runs, t.Images, t.Dirty = t.Runs+o.Runs, t.Images+o.Images, t.Dirty+o.Dirty
	t.Rewrites, t.Judged, t.Refused = t.Rewrites+o.Rewrites, t.Judged+o.Judged, t.Refused+o.Refused
	t.Moves += o.Moves
	if t.Found == nil {
		t.Found = make(map[string]int)
	}
	for k, n := range o.Found {
		t.Found[k] += n
	}
}

// crashBudget says how many states of a run are looked at.
type crashBudget struct {
	states   int         // about so many
	every    bool        // look at every point
	judge    *crashJudge // nil: QEMU is not asked
	stopWith string      // end with the first finding of this invariant
}

// refTablePointer is the host offset of the header's pointer to the refcount table, which a move writes. qcow2
// spec, "Header".
const refTablePointer = 48

// errCrashStop ends a generation with the first finding.
var errCrashStop = errors.New("finding")

// crashFailure is a run with a finding.
type crashFailure struct {
	run      *crashRun
	state    string
	findings []crashFinding
	files    map[string][]byte
}

// runCrash records the run of a configuration and looks at its crash states. Findings of a run without broken
// orderings end it.
func runCrash(c *crashConfig, budget crashBudget) (*crashTotals, *crashFailure, error) {
	r, err := newCrashRun(c)
	if err != nil {
		return nil, nil, err
	}
	if err := r.perform(); err != nil {
		return nil, nil, fmt.Errorf("%w\n%s", err, r.history())
	}
	log := r.rec.Log()
	for _, e := range log {
		if e.File == "backing" {
			return nil, nil, fmt.Errorf("the backing file was changed: %s", e.Op)
		}
	}
	most := max(r.size, r.most)
	l := &crashLook{crashRun: r, oracle: newCrashOracle(r.guest, !c.fromCreate), buf: make([]byte, most)}
	l.oracle.guest = append(l.oracle.guest, make([]byte, most-l.oracle.size)...)
	opts := crashtest.Options{PerPoint: 8, Tightens: crashTightens}
	if c.fromCreate {
		opts.PerPoint = 48 // the writes of Create are long, and few
	}
	if !budget.every {
		opts.Every = max(1, len(log)*opts.PerPoint/max(budget.states, 1))
	}
	if opts.Every <= 1 && budget.states > 0 {
		opts.PerPoint = max(opts.PerPoint, budget.states/(len(log)+1)+2)
	}
	t := &crashTotals{Runs: 1, Found: make(map[string]int)}
	for _, e := range log {
		if e.File == "image" && e.Kind == crashtest.Write && e.Off == refTablePointer {
			t.Moves++
		}
	}
	var failure *crashFailure
	t.Stats, err = r.rec.States(rand.New(rand.NewPCG(c.seed, 4)), opts, func(s *crashtest.State) error {
		findings := l.state(s)
		if len(findings) == 0 && budget.judge != nil && s.Index%80 == int(c.seed)%80 {
			var judged bool
			if judged, findings = budget.judge.judge(l, s); judged {
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
		failure = &crashFailure{run: r, state: s.String(), findings: findings, files: map[string][]byte{"image": s.Disk(r.image).Bytes()}}
		if r.data != nil {
			failure.files["data"] = s.Disk(r.data).Bytes()
		}
		if r.backingFile != nil {
			failure.files["backing"] = r.backingFile.Disk().Bytes()
		}
		return errCrashStop
	})
	t.Images, t.Dirty, t.Rewrites, t.Refused = l.images, l.dirty, l.rewrites, r.refused
	if err != nil && err != errCrashStop {
		return t, failure, err
	}
	if failure == nil && c.test == (testHooks{}) {
		err = r.checkEnd()
	}
	return t, failure, err
}

// checkEnd looks at the image after the last Close: nothing at all may be wrong with it. A Create over an
// earlier image, and a data file, leave nothing behind either.
func (r *crashRun) checkEnd() error {
	d := r.image.Disk()
	rep, err := walkFile(d)
	if err != nil {
		return err
	}
	if !rep.Clean() {
		return fmt.Errorf("not clean after Close: %s\n%s", strings.Join(rep.Findings, "; "), r.history())
	}
	return nil
}

// history returns what the run did and what the host saw, in the order of the record.
func (r *crashRun) history() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", r.crashConfig)
	r.mu.Lock()
	lines := slices.Clone(r.lines)
	r.mu.Unlock()
	log := r.rec.Log()
	for _, line := range lines {
		at := 0
		if _, err := fmt.Sscanf(line, "at #%d:", &at); err != nil {
			at = 0
		}
		for ; len(log) > 0 && log[0].Begin < at; log = log[1:] {
			fmt.Fprintf(&b, "\t#%d %s\n", log[0].Begin, log[0].Op)
		}
		fmt.Fprintf(&b, "%s\n", line)
	}
	for _, e := range log {
		fmt.Fprintf(&b, "\t#%d %s\n", e.Begin, e.Op)
	}
	return b.String()
}

// report fails the test with all that is needed to look into a failure, and keeps the files.
func (f *crashFailure) report(t *testing.T) {
	t.Helper()
	var b strings.Builder
	for _, x := range f.findings {
		fmt.Fprintf(&b, "%s: %s\n", x.invariant, x.detail)
	}
	dir, err := os.MkdirTemp(os.Getenv("QCOW2_KEEP_DIR"), "qcow2-crash-")
	for name, content := range f.files {
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), content, 0o600)
		}
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "history"), []byte(f.run.history()+f.state+"\n"+b.String()), 0o600)
	}
	t.Errorf("%s%s\n%s\nfiles and history in %s (error %v)", b.String(), f.state, f.run.history(), dir, err)
}

// crashTable formats the counts of the workloads.
func crashTable(names []string, totals map[string]*crashTotals) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-12s %6s %8s %8s %9s %8s %8s %8s %8s %7s %7s %6s\n", "workload", "runs", "points", "states", "reordered", "torn", "images",
		"dirty", "written", "judged", "refused", "moves")
	sum := &crashTotals{}
	line := func(name string, t *crashTotals) {
		fmt.Fprintf(&b, "%-12s %6d %8d %8d %9d %8d %8d %8d %8d %7d %7d %6d\n", name, t.Runs, t.Points, t.Distinct, t.Reordered, t.Torn, t.Images,
			t.Dirty, t.Rewrites, t.Judged, t.Refused, t.Moves)
	}
	for _, name := range names {
		if t := totals[name]; t != nil {
			line(name, t)
			sum.add(t)
		}
	}
	line("all", sum)
	return b.String()
}

// runCrashWorkloads looks at no fewer than perWorkload states of each workload, and fails the test for each
// finding, and if less than half of the states keep a later and lose an earlier write.
func runCrashWorkloads(t *testing.T, firstSeed uint64, perWorkload, perRun int) {
	var names []string
	totals := make(map[string]*crashTotals)
	next := make(chan struct{}, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	only := os.Getenv(crashNamesEnv)
	for _, w := range crashWorkloads() {
		if only != "" && !slices.Contains(strings.Split(only, ","), w.name) {
			continue
		}
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
				c := newCrashConfig(w, seed)
				stats, failure, err := runCrash(c, crashBudget{states: perRun, judge: judge})
				if failure != nil {
					failure.report(t)
					return
				}
				if err != nil {
					t.Errorf("%s: %v", c, err)
					return
				}
				done += stats.Distinct
				total.add(stats)
			}
		}()
	}
	wg.Wait()
	judged := newCrashJudge(t) != nil
	t.Logf("crash states, distinct by content, seeds from %d:\n%s", firstSeed, crashTable(names, totals))
	for _, name := range names {
		if s := totals[name]; !t.Failed() && (2*s.Reordered < s.States || s.Images*2 < s.States || s.Rewrites == 0) {
			t.Errorf("%s: of %d states only %d keep a later and lose an earlier write, %d hold an image, %d were written", name,
				s.States, s.Reordered, s.Images, s.Rewrites)
		}
		if s := totals[name]; name == "full" && !t.Failed() && s.Refused == 0 {
			t.Errorf("%s: the host never lacked space", name)
		}
		if s := totals[name]; name == "growth" && !t.Failed() && s.Moves == 0 {
			t.Errorf("%s: the refcount table never moved", name)
		}
		if s := totals[name]; judged && !t.Failed() && 100*s.Judged < s.Images {
			t.Errorf("%s: QEMU judged only %d of %d states", name, s.Judged, s.Images)
		}
	}
}

// TestCrash looks at a slice of the crash states of every workload. What must hold is in
// docs/GUARANTEES.md.
func TestCrash(t *testing.T) {
	n := 600
	if testing.Short() {
		n = 300
	}
	runCrashWorkloads(t, 1, n, 150)
}

// crashCampaign returns how many states a long run has, and its first seed, as crashStatesEnv and crashSeedEnv say. It
// skips the test if none is asked for.
func crashCampaign(t *testing.T) (states int, first uint64) {
	t.Helper()
	states, err := strconv.Atoi(os.Getenv(crashStatesEnv))
	if err != nil {
		t.Skipf("a long run: set %s to the number of states", crashStatesEnv)
	}
	first = 1
	if s := os.Getenv(crashSeedEnv); s != "" {
		if first, err = strconv.ParseUint(s, 0, 64); err != nil {
			t.Fatal(err)
		}
	}
	return states, first
}

// TestCampaignCrash is the long run of TestCrash; see crashStatesEnv.
func TestCampaignCrash(t *testing.T) {
	total, first := crashCampaign(t)
	runCrashWorkloads(t, first, max(5000, total/len(crashWorkloads())+1), 400)
}

// TestCrashOne looks at every point of one run, given as QCOW2_CRASH_RUN=workload:seed, to repeat a failure.
func TestCrashOne(t *testing.T) {
	name, seed, ok := strings.Cut(os.Getenv("QCOW2_CRASH_RUN"), ":")
	if !ok {
		t.Skip("repeats one run: set QCOW2_CRASH_RUN to workload:seed")
	}
	n, err := strconv.ParseUint(seed, 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range crashWorkloads() {
		if w.name != name {
			continue
		}
		stats, failure, err := runCrash(newCrashConfig(w, n), crashBudget{every: true})
		if failure != nil {
			failure.report(t)
		} else if err != nil {
			t.Fatal(err)
		}
		t.Log(stats.Stats, stats.Found)
	}
}
