package qcow2

import (
	"context"
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

// parityTimeout bounds one check of one image, so that a hang is reported as one.
const parityTimeout = time.Minute

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
	qemu, ok = qemutest.Verdict(t, parityTimeout, c.img.qemuTarget(path)...)
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
	images := parityImages(t, 150, 40)
	hits, misses := make(map[damagePart]int), make(map[damagePart]int)
	exits := make(map[int]int)
	classes, statClasses := make(map[string][]string), make(map[string][]string)
	agreed, noVerdict, sameStats, bothVerdicts := 0, 0, 0, 0
	for k := range images {
		c := newParityCase(t, seed, k)
		qemu, ok, ours := c.both(t, dir, c.damages)
		same := agree(qemu, ok, ours)
		exits[qemu.Exit]++
		if !ok {
			noVerdict++
		}
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
			if ok {
				bothVerdicts++
				if s := statistics(qemu, ours.res); s != "" {
					name, _, _ := strings.Cut(s, " ")
					statClasses[name] = append(statClasses[name], fmt.Sprintf("%v\n\t%s", c, s))
				} else {
					sameStats++
				}
			}
			continue
		}
		small := &parityCase{seed, k, c.img, c.reduce(t, dir)}
		qemu, ok, ours = small.both(t, dir, small.damages)
		class := disagreement(small.damages, qemu, ok, ours)
		classes[class] = append(classes[class], fmt.Sprintf("%v\nQEMU: exit %d\n%s\nours: %v", small, qemu.Exit, brief(qemu.Output), ours))
	}
	t.Logf("seed %d: %d of %d images agree (%.1f %%); QEMU gives no verdict on %d; its exit codes %v", seed, agreed, images,
		100*float64(agreed)/float64(max(images, 1)), noVerdict, exits)
	t.Logf("the other numbers agree on %d of the %d images on which both judge", sameStats, bothVerdicts)
	for _, w := range damageWeights {
		t.Logf("%-20s hit in %4d images, of which differ %d", w.part, hits[w.part], misses[w.part])
	}
	logClasses(t, "statistics", statClasses)
	logClasses(t, "totals", classes)
	if 100*agreed < parityLeast*images {
		t.Errorf("%d of %d images agree, want %d %% at least", agreed, images, parityLeast)
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
		t.Logf("%s differ, %d times: %s\n%s", what, len(classes[name]), name, classes[name][0])
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
