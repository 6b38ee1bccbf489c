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
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// The parity tests set our verdict on an image beside that of qemu-img check: TestCheckSound on the images of
// the pool, TestCheckParity on damaged copies of them. The campaign is
//
//	QCOW2_PARITY_IMAGES=1000 QCOW2_PARITY_SEED=7 go test -run TestCheckParity -timeout 30m -v .
//
// Image k of a seed is always the same, however many there are; QCOW2_PARITY_ONLY=k looks at it alone, prints
// all that both sides say, and keeps it.

// Bounds of one check of one image, so that a hang is reported as one.
const (
	parityTimeout     = time.Minute
	parityQEMUTimeout = 20 * time.Second
)

// parityLeast is the share of damaged images, in percent, on which both must agree.
const parityLeast = 97

// parityNumber returns the number in an environment variable, or the default.
func parityNumber(t testing.TB, name string, otherwise int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		t.Fatalf("%s=%s: not a number", name, s)
	}
	return n
}

// paritySeed returns the seed of the damages.
func paritySeed(t testing.TB) uint64 { return uint64(parityNumber(t, "QCOW2_PARITY_SEED", 1)) }

// parityImages returns how many damaged images a test looks at: long with plain go test, short with -short.
func parityImages(t testing.TB, long, short int) int {
	if testing.Short() {
		long = short
	}
	return parityNumber(t, "QCOW2_PARITY_IMAGES", long)
}

// checkOutcome is what a check of ours came to.
type checkOutcome struct {
	res      *CheckResult
	findings []Finding
	err      error
}

// verdict reports whether there is one.
func (o *checkOutcome) verdict() bool { return o.err == nil && o.res.CheckErrors == 0 }

// String shows the totals and the first findings.
func (o *checkOutcome) String() string {
	var b strings.Builder
	if r := o.res; r != nil {
		fmt.Fprintf(&b, "corruptions %d, leaks %d, errors %d, end %#x, clusters %d, allocated %d, fragmented %d, compressed %d",
			r.Corruptions, r.Leaks, r.CheckErrors, r.ImageEndOffset, r.TotalClusters, r.AllocatedClusters, r.FragmentedClusters,
			r.CompressedClusters)
	}
	if o.err != nil {
		fmt.Fprintf(&b, " error: %v", o.err)
	}
	for i, f := range o.findings {
		if i == 12 {
			fmt.Fprintf(&b, "\n\t... %d more", len(o.findings)-i)
			break
		}
		fmt.Fprintf(&b, "\n\t%v", f)
	}
	return b.String()
}

// errPanic is matched by the outcome of a check that panicked.
var errPanic = errors.New("panic")

// watched calls f and returns its error. A panic is an error that matches errPanic; a call that takes longer
// than parityTimeout ends the test, with the stacks of all goroutines.
func watched(t testing.TB, what string, f func(ctx context.Context) error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), parityTimeout)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- fmt.Errorf("%w: %v\n%s", errPanic, p, debug.Stack())
			}
		}()
		done <- f(ctx)
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(parityTimeout + 10*time.Second):
		stacks := make([]byte, 1<<20)
		t.Fatalf("%s hangs\n%s", what, stacks[:runtime.Stack(stacks, true)])
		return nil
	}
}

// checkStorage checks the image in s, repairing if scope says so.
func checkStorage(t testing.TB, what string, s Storage, scope RepairScope) *checkOutcome {
	t.Helper()
	o := &checkOutcome{}
	o.err = watched(t, what, func(ctx context.Context) error {
		img, err := OpenStorage(s, &OpenOptions{CheckOnly: true, ReadWrite: scope != RepairNothing})
		if err != nil {
			return err
		}
		o.res, err = img.Check(ctx, &CheckOptions{Repair: scope, Found: func(f Finding) { o.findings = append(o.findings, f) }})
		return errors.Join(err, img.Close())
	})
	if errors.Is(o.err, errPanic) || errors.Is(o.err, context.DeadlineExceeded) {
		t.Errorf("%s: %v", what, o.err)
	}
	return o
}

// parityCase is a damaged image.
type parityCase struct {
	seed    uint64
	k       int
	img     *poolImage
	damages []damage
}

// newParityCase returns image k of a seed.
func newParityCase(t testing.TB, seed uint64, k int) *parityCase {
	t.Helper()
	img := pool[k%len(pool)].image(t)
	return &parityCase{seed, k, img, damageImage(img, rand.New(rand.NewPCG(seed, uint64(k))))}
}

// String says what the image is and how to see it again.
func (c *parityCase) String() string {
	return fmt.Sprintf("QCOW2_PARITY_SEED=%d QCOW2_PARITY_ONLY=%d: %v: %s", c.seed, c.k, c.img, describeDamages(c.damages))
}

// both returns both verdicts on the image with the given damages.
func (c *parityCase) both(t testing.TB, dir poolDir, damages []damage) (qemu qemutest.CheckResult, ok bool, ours *checkOutcome) {
	t.Helper()
	f := damaged(c.img.file, damages...)
	path := c.img.place(t, dir, f)
	qemu, ok = qemutest.Verdict(t, parityQEMUTimeout, c.img.qemuTarget(path, f)...)
	return qemu, ok, checkStorage(t, c.String(), NewReaderStorage(f, f.size), RepairNothing)
}

// agree reports whether the verdicts agree: equal totals, or none on either side.
func agree(qemu qemutest.CheckResult, ok bool, ours *checkOutcome) bool {
	if !ok {
		return !ours.verdict()
	}
	return ours.err == nil && ours.res.Corruptions == qemu.Corruptions && ours.res.Leaks == qemu.Leaks
}

// statistics returns the other numbers that differ, in words, if both have a verdict.
func statistics(qemu qemutest.CheckResult, ours *CheckResult) string {
	var s []string
	for _, n := range []struct {
		name       string
		qemu, ours int64
	}{
		{"errors", qemu.CheckErrors, ours.CheckErrors},
		{"end", qemu.ImageEndOffset, ours.ImageEndOffset},
		{"total", qemu.TotalClusters, ours.TotalClusters},
		{"allocated", qemu.AllocatedClusters, ours.AllocatedClusters},
		{"fragmented", qemu.FragmentedClusters, ours.FragmentedClusters},
		{"compressed", qemu.CompressedClusters, ours.CompressedClusters},
	} {
		if n.qemu != n.ours {
			s = append(s, fmt.Sprintf("%s %d, QEMU %d", n.name, n.ours, n.qemu))
		}
	}
	return strings.Join(s, "; ")
}

// parityException is a class of damaged images on which the verdicts may differ.
type parityException struct {
	name   string
	reason string
	// excuses reports whether the verdicts differ for this reason alone.
	excuses func(qemu qemutest.CheckResult, ok bool, ours *checkOutcome) bool
}

// parityExceptions are all classes of images on which the verdicts may differ. TestCheckDiffersFromQEMU has a
// minimal image of each.
var parityExceptions = []parityException{
	{
		name: "impossible place of the snapshot table",
		reason: "No table lies in the header's cluster. QEMU reads the header as snapshot table entries and follows the pointers " +
			"that it takes from there; what it counts then means nothing. Beyond every file it takes the table for zeros. We say that " +
			"the table cannot be read.",
		excuses: func(_ qemutest.CheckResult, ok bool, ours *checkOutcome) bool {
			return ok && slices.ContainsFunc(ours.findings, func(f Finding) bool {
				return f.Kind == FindingSnapshotTable && (f.HostOff < 512 || f.HostOff >= maxHostOff)
			})
		},
	},
	{
		name:   "refcount table in the header",
		reason: "As for the snapshot table. We take no refcount from there.",
		excuses: func(_ qemutest.CheckResult, ok bool, ours *checkOutcome) bool {
			return ok && slices.ContainsFunc(ours.findings, func(f Finding) bool { return f.Kind == FindingRefcountTable && f.HostOff < 512 })
		},
	},
	{
		name: "impossible place of the L1 table",
		reason: "As for the snapshot table, if it is in the header. Beyond every file QEMU takes it for zeros. We do not open such an " +
			"image: nothing is left of the disk, and all that a repair could do is free its clusters.",
		excuses: unopened("l1_table_offset"),
	},
	{
		name: "backing file name in the header's fields",
		reason: "QEMU takes a name that overlaps the fields, and header extensions that end before they begin. We do not, since a header " +
			"cannot be written so.",
		excuses: unopened("backing_file_offset"),
	},
	refusedFor("data file missing", "QEMU opens the data file to check the image, and this one names none. We do not need it.",
		"data-file' is required"),
	refusedFor("raw without a data file", "QEMU refuses the feature bit without a data file, which changes nothing in the tables.",
		"data-file-raw requires a data file"),
	refusedFor("secret missing", "QEMU wants the secret of an encrypted image. No table is encrypted.", "encrypt.key-secret' is required"),
	refusedFor("bitmap that cannot be loaded", "QEMU loads the bitmaps when it opens the image, and gives up on an impossible entry of a "+
		"bitmap's table, or a disk without room for one. We count the entries as corruptions.",
		"Could not read bitmap_table table", "Could not read bitmap '"),
	refusedFor(tooLong, "QEMU reads an L2 table again for each L1 entry that names it, which can be four million.", context.DeadlineExceeded.Error()),
	refusedFor("backing file missing", "QEMU opens the backing file to check the image. We do not need it.", "Could not open backing file"),
}

// tooLong is the exception of images on which QEMU is not waited for. TestCheckBounded has one in its place.
const tooLong = "too long"

// unopened returns the excuse that we do not open the image because of a field of the header.
func unopened(field string) func(qemutest.CheckResult, bool, *checkOutcome) bool {
	return func(_ qemutest.CheckResult, ok bool, ours *checkOutcome) bool {
		var err *HeaderError
		return ok && errors.As(ours.err, &err) && err.Field == field
	}
}

// refusedFor returns the exception of images that QEMU does not open, with one of the messages.
func refusedFor(name, reason string, messages ...string) parityException {
	return parityException{name, reason, func(qemu qemutest.CheckResult, ok bool, ours *checkOutcome) bool {
		return !ok && slices.ContainsFunc(messages, func(m string) bool { return strings.Contains(qemu.Output, m) })
	}}
}

// exception returns the name of the exception that excuses verdicts which differ, or "".
func exception(qemu qemutest.CheckResult, ok bool, ours *checkOutcome) string {
	for _, e := range parityExceptions {
		if e.excuses(qemu, ok, ours) {
			return e.name
		}
	}
	return ""
}

// reduce returns a smallest selection of the damages on which both still disagree.
func (c *parityCase) reduce(t testing.TB, dir poolDir) []damage {
	t.Helper()
	left := c.damages
	for i := 0; i < len(left) && len(left) > 1; {
		fewer := slices.Delete(slices.Clone(left), i, i+1)
		if agree(c.both(t, dir, fewer)) {
			i++
		} else {
			left = fewer
		}
	}
	return left
}

// disagreement classifies verdicts that differ, by the way in which they do.
func disagreement(damages []damage, qemu qemutest.CheckResult, ok bool, ours *checkOutcome) string {
	var parts []string
	for _, d := range damages {
		parts = append(parts, string(d.part))
	}
	slices.Sort(parts)
	how := ""
	switch {
	case !ok && qemu.Exit < 0:
		how = "QEMU crashes"
	case !ok:
		how = "only we judge"
	case ours.err != nil:
		how = "only QEMU judges"
	default:
		sign := func(what string, ours, qemu int64) {
			if ours != qemu {
				how += fmt.Sprintf(" %s %+d", what, min(9, max(-9, ours-qemu)))
			}
		}
		sign("corruptions", ours.res.Corruptions, qemu.Corruptions)
		sign("leaks", ours.res.Leaks, qemu.Leaks)
	}
	return strings.Join(slices.Compact(parts), ", ") + ": " + strings.TrimSpace(how)
}

// brief cuts a tool's output to its first lines.
func brief(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	if len(lines) > 24 {
		lines = append(lines[:24], fmt.Sprintf("... %d more lines", len(lines)-24))
	}
	return "\t" + strings.Join(lines, "\n\t")
}

// TestCheckParity compares our totals of corruptions and leaks with those of qemu-img check on damaged images.
func TestCheckParity(t *testing.T) {
	qemutest.Require(t)
	seed, dir := paritySeed(t), newPoolDir(t)
	if os.Getenv("QCOW2_PARITY_ONLY") != "" {
		showParity(t, newParityCase(t, seed, parityNumber(t, "QCOW2_PARITY_ONLY", 0)), dir)
		return
	}
	images := parityImages(t, 60, 30)
	hits, misses := make(map[damagePart]int), make(map[damagePart]int)
	exits := make(map[int]int)
	excused, classes, statClasses := make(map[string][]string), make(map[string][]string), make(map[string][]string)
	agreed, oneSided, unreadable, sameStats, judged := 0, 0, 0, 0, 0
	for k := range images {
		c := newParityCase(t, seed, k)
		qemu, ok, ours := c.both(t, dir, c.damages)
		same := agree(qemu, ok, ours)
		exits[qemu.Exit]++
		seen := make(map[damagePart]bool)
		for _, d := range c.damages {
			if !seen[d.part] {
				seen[d.part] = true
				hits[d.part]++
				if !same {
					misses[d.part]++
				}
			}
		}
		if same {
			agreed++
			if !ok {
				continue
			}
			judged++
			if ours.res.Unreadable > 0 {
				unreadable++
			}
			if s := statistics(qemu, ours.res); s != "" {
				name, _, _ := strings.Cut(s, " ")
				statClasses[name] = append(statClasses[name], fmt.Sprintf("%v\n\t%s", c, s))
			} else {
				sameStats++
			}
			continue
		}
		if !ok || ours.err != nil {
			oneSided++
		}
		if name := exception(qemu, ok, ours); name != "" {
			excused[name] = append(excused[name], c.String())
			continue
		}
		small := &parityCase{seed, k, c.img, c.reduce(t, dir)}
		qemu, ok, ours = small.both(t, dir, small.damages)
		class := disagreement(small.damages, qemu, ok, ours)
		if name := exception(qemu, ok, ours); name != "" {
			class = name + ", and more"
		}
		classes[class] = append(classes[class], fmt.Sprintf("%v\nQEMU: exit %d\n%s\nours: %v\nall damages: %v", small, qemu.Exit, brief(qemu.Output), ours, c))
	}
	percent := func(n, of int) float64 { return 100 * float64(n) / float64(max(of, 1)) }
	share := percent(agreed, images)
	t.Logf("seed %d, %d images: %d agree (%.1f %%), %d of them judged by both and the others refused by both; of %d that both judge, or refuse, "+
		"%.1f %% agree; %d only one side judges", seed, images, agreed, share, judged, images-oneSided, percent(agreed, images-oneSided), oneSided)
	t.Logf("%d of those that agree have entries which no reader accepts, and QEMU's check passes over", unreadable)
	t.Logf("exit codes of qemu-img check: %v; the other numbers agree on %d of %d images", exits, sameStats, judged)
	for _, w := range damageWeights {
		t.Logf("%-20s hit in %4d images, of which differ %d", w.part, hits[w.part], misses[w.part])
	}
	for _, e := range parityExceptions {
		if n := len(excused[e.name]); n > 0 {
			t.Logf("exception %q: %d images; %s", e.name, n, excused[e.name][0])
		}
	}
	logClasses(t, "statistics", statClasses)
	logClasses(t, "totals", classes)
	if len(classes) > 0 {
		t.Errorf("%d classes of images differ without a reason", len(classes))
	}
	if agreed < images*parityLeast/100 {
		t.Errorf("%.1f %% of the images agree, want %d %% at least", share, parityLeast)
	}
}

// logClasses prints a sample of each class, the largest class first.
func logClasses(t testing.TB, what string, classes map[string][]string) {
	t.Helper()
	var names []string
	for name := range classes {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		if d := len(classes[b]) - len(classes[a]); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	for _, name := range names {
		t.Logf("%s differ, %d times: %s\n%s", what, len(classes[name]), name, strings.Join(classes[name][:min(3, len(classes[name]))], "\n"))
	}
}

// showParity prints both verdicts on one image, and keeps it.
func showParity(t *testing.T, c *parityCase, dir poolDir) {
	qemu, ok, ours := c.both(t, dir, c.damages)
	t.Logf("%v\nQEMU: verdict %v, exit %d\n%s", c, ok, qemu.Exit, qemu.Output)
	t.Logf("ours: %v", ours)
	for _, f := range ours.findings {
		t.Log(f)
	}
	kept := filepath.Join(os.TempDir(), fmt.Sprintf("parity-%d-%d", c.seed, c.k))
	if err := damaged(c.img.file, c.damages...).save(kept); err != nil {
		t.Fatal(err)
	}
	t.Logf("agree: %v; kept %s", agree(qemu, ok, ours), kept)
}

// TestCheckSound checks the undamaged images of the pool: both find nothing, and count the same.
func TestCheckSound(t *testing.T) {
	qemutest.Require(t)
	dir := newPoolDir(t)
	images := pool
	if testing.Short() {
		images = images[:40]
	}
	for _, img := range images {
		c := &parityCase{img: img.image(t)}
		qemu, ok, ours := c.both(t, dir, nil)
		if !ok || !qemu.Clean() || ours.err != nil || !ours.res.Clean() {
			t.Errorf("%v:\nQEMU: %s\nours: %v", img, qemu.Output, ours)
			continue
		}
		if s := statistics(qemu, ours.res); s != "" {
			t.Errorf("%v: %s", img, s)
		}
	}
}

// setField returns the damage that sets a field of the header.
func setField(t testing.TB, name string, value uint64) damage {
	t.Helper()
	p := fieldPoke(t, name, value)
	b := binary.BigEndian.AppendUint64(nil, value)
	return damage{part: partHeader, what: fmt.Sprintf("%s %#x", name, value), off: int64(p.off), b: b[8-p.size:]}
}

// setWord returns the damage that sets a word of a table.
func setWord(part damagePart, off int64, value uint64) damage {
	return damage{part: part, what: fmt.Sprintf("word at %#x: %#x", off, value), off: off, b: binary.BigEndian.AppendUint64(nil, value)}
}

// passedOver are the findings that qemu-img check does not look for, by the reason. They count in
// CheckResult.Unreadable alone, so that the totals agree.
var passedOver = map[FindingKind]string{
	FindingDataFilePlace: "With an external data file the host offset of a cluster must be its guest offset. QEMU refuses to read or " +
		"write an entry that says otherwise, but its check does not look.",
	FindingZeroFlag: "Version 2 knows no zero flag. QEMU takes the image for corrupt as soon as such an entry is read, but its check " +
		"takes it for a cluster that reads as zeros.",
}

// TestCheckDiffersFromQEMU has a minimal image of every class of images on which the verdicts may differ, and of
// every finding that is passedOver.
func TestCheckDiffersFromQEMU(t *testing.T) {
	qemutest.Require(t)
	dir := newPoolDir(t)
	image := func(spec poolSpec) *poolImage {
		spec.clusterBits, spec.width = 12, 16
		return (&poolImage{poolSpec: spec.legal(), seed: uint64(len(pool))}).image(t)
	}
	plain := image(poolSpec{kind: "plain"})
	v2 := image(poolSpec{kind: "v2", version: 2})
	data := image(poolSpec{kind: "data", byUs: true, external: true})
	snapshots := image(poolSpec{kind: "snapshots", snapshots: 1})
	bitmaps := image(poolSpec{kind: "bitmaps", bitmaps: 1})
	backing := image(poolSpec{kind: "backing", backing: true})
	for _, test := range []struct {
		kind   FindingKind
		img    *poolImage
		damage func(img *poolImage) damage
	}{
		{FindingDataFilePlace, data, func(img *poolImage) damage {
			at := img.sites.words[partL2][1]
			return setWord(partL2, at, img.sites.word(img.file, at)+uint64(img.clusterSize()))
		}},
		{FindingDataFilePlace, data, func(img *poolImage) damage {
			at := img.sites.words[partL2]
			return setWord(partL2, at[2], img.sites.word(img.file, at[1]))
		}},
		{FindingZeroFlag, v2, func(img *poolImage) damage {
			at := img.sites.words[partL2][0]
			return setWord(partL2, at, img.sites.word(img.file, at)|flagZero)
		}},
	} {
		c := &parityCase{img: test.img, damages: []damage{test.damage(test.img)}}
		qemu, ok, ours := c.both(t, dir, c.damages)
		if !ok || !agree(qemu, ok, ours) || !qemu.Clean() || ours.res.Unreadable == 0 || ours.res.Clean() {
			t.Errorf("%v, %s: want totals without a finding, and entries that cannot be read: %s\nQEMU: exit %d\n%s\nours: %v", test.img,
				describeDamages(c.damages), passedOver[test.kind], qemu.Exit, brief(qemu.Output), ours)
			continue
		}
		for _, f := range ours.findings {
			if f.Kind != test.kind {
				t.Errorf("%v, %s: found %v, want %v alone", test.img, describeDamages(c.damages), f, test.kind)
			}
		}
	}
	tests := []struct {
		exception string
		img       *poolImage
		damage    func(img *poolImage) damage
	}{
		{"impossible place of the snapshot table", plain, func(*poolImage) damage { return setField(t, "nb_snapshots", 1) }},
		{"impossible place of the snapshot table", snapshots, func(*poolImage) damage { return setField(t, "snapshots_offset", 1<<60) }},
		{"refcount table in the header", plain, func(*poolImage) damage { return setField(t, "refcount_table_offset", 0) }},
		{"impossible place of the L1 table", plain, func(*poolImage) damage { return setField(t, "l1_table_offset", 0) }},
		{"impossible place of the L1 table", plain, func(*poolImage) damage { return setField(t, "l1_table_offset", 1<<60) }},
		{"backing file name in the header's fields", plain, func(*poolImage) damage { return setField(t, "backing_file_offset", 32) }},
		{"data file missing", plain, func(*poolImage) damage { return setField(t, "incompatible_features", incompatDataFile) }},
		{"raw without a data file", plain, func(*poolImage) damage { return setField(t, "autoclear_features", autoclearRawData) }},
		{"secret missing", plain, func(*poolImage) damage { return setField(t, "crypt_method", cryptAES) }},
		{"bitmap that cannot be loaded", bitmaps, func(img *poolImage) damage {
			return setWord(partBitmapTable, img.sites.words[partBitmapTable][0], 1<<62)
		}},
		{"bitmap that cannot be loaded", bitmaps, func(*poolImage) damage { return setField(t, "size", 0) }},
		{"backing file missing", backing, func(*poolImage) damage { return setField(t, "backing_file_size", 3) }},
	}
	shown := make(map[string]bool)
	for _, test := range tests {
		shown[test.exception] = true
		c := &parityCase{img: test.img, damages: []damage{test.damage(test.img)}}
		qemu, ok, ours := c.both(t, dir, c.damages)
		if got := exception(qemu, ok, ours); agree(qemu, ok, ours) || got != test.exception {
			t.Errorf("%v, %s: agree %v, exception %q, want %q\nQEMU: exit %d\n%s\nours: %v", test.img, describeDamages(c.damages),
				agree(qemu, ok, ours), got, test.exception, qemu.Exit, brief(qemu.Output), ours)
		}
	}
	for _, e := range parityExceptions {
		if !shown[e.name] && e.name != tooLong {
			t.Errorf("no image shows the exception %q", e.name)
		}
	}
}

// TestCheckBounded checks images with an L1 table of a million entries that all name tables in a small file:
// one table, or one at every sector. Each is looked at as often as the file has room for tables.
func TestCheckBounded(t *testing.T) {
	const (
		clusterSize = 2 << 20
		entries     = 1 << 20
		l2Off       = 4 * clusterSize
	)
	for _, test := range []struct {
		name string
		word func(i uint64) uint64
	}{
		{"one table", func(uint64) uint64 { return l2Off }},
		{"a table in every sector", func(i uint64) uint64 { return flagCopied | l2Off + i*sectorSize%(2*clusterSize) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := NewMemoryStorage()
			img, err := CreateStorage(s, 1<<30, &CreateOptions{ClusterSize: clusterSize})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := img.WriteAt(bytes.Repeat([]byte{7}, sectorSize), 0); err != nil {
				t.Fatal(err)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			size, _ := s.Size()
			l1 := make([]byte, 8*entries)
			for i := range uint64(entries) {
				binary.BigEndian.PutUint64(l1[8*i:], test.word(i))
			}
			off := (size + clusterSize - 1) &^ (clusterSize - 1)
			for _, d := range []damage{{off: off, b: l1}, setField(t, "l1_size", entries), setField(t, "l1_table_offset", uint64(off))} {
				if _, err := s.WriteAt(d.b, d.off); err != nil {
					t.Fatal(err)
				}
			}
			if o := checkStorage(t, test.name, s, RepairNothing); o.err != nil || o.res.Corruptions == 0 {
				t.Errorf("%v", o)
			}
		})
	}
}
