// Command lifebench compares operations on the structure of an image with qemu-img, on the same machine in one run:
//
//	go run ./internal/lifebench [-quick] [-dir DIR] [-run REGEXP]
//
// It prints a table in Markdown: for each case the library's median time and spread, qemu-img's, and the ratio of the
// medians. A case is made ready anew before each run, which is not measured; the first result of either side is
// checked by qemu-img. The files belong on a file system in memory, so that the work is measured and not the disk.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-qcow2/qcow2/internal/measure"
)

// benchCase is one operation by both sides. The working directory is empty but for what prepare made.
type benchCase struct {
	name    string
	prepare func() error            // not measured; nil: nothing
	ours    func(name string) error // makes or changes the image called name
	theirs  []string                // arguments of qemu-img, FILE standing for the image
	want    float64                 // the ratio that is asked for; 0: none
	rounds  int                     // runs of qemu-img, which may be slow
	slow    bool                    // left out with -quick
}

// times is what one side took.
type times []time.Duration

// String returns the median and the range.
func (t times) String() string {
	if len(t) == 0 {
		return "-"
	}
	s := slices.Sorted(slices.Values(t))
	round := func(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
	return fmt.Sprintf("%v (%v … %v)", round(s[len(s)/2]), round(s[0]), round(s[len(s)-1]))
}

// median returns the median.
func (t times) median() time.Duration {
	return slices.Sorted(slices.Values(t))[len(t)/2]
}

func main() {
	f, err := measure.ParseFlags("without the cases that take QEMU long", "create")
	if err == nil {
		err = measure.InDir(f.Dir, func(dir string) error { return run(dir, f) })
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lifebench:", err)
		os.Exit(1)
	}
}

// run measures the cases in dir and prints the table.
func run(dir string, f measure.Flags) error {
	if err := os.Chdir(dir); err != nil {
		return err
	}
	fmt.Println("| case | library | qemu-img | ratio | asked for |\n|---|---|---|---|---|")
	for _, c := range benchCases() {
		if !f.Filter.MatchString(c.name) || f.Quick && c.slow {
			continue
		}
		ours, theirs, err := c.measure()
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		asked := "-"
		if c.want > 0 {
			asked = fmt.Sprintf("%.0f", c.want)
		}
		fmt.Printf("| %s | %v | %v | %.1f | %s |\n", c.name, ours, theirs, float64(theirs.median())/float64(ours.median()), asked)
	}
	return nil
}

// measure runs both sides in turns.
func (c *benchCase) measure() (ours, theirs times, err error) {
	const ourRounds = 9
	once := func(k int, name string, f func(name string) error) (time.Duration, error) {
		if c.prepare != nil {
			if err := c.prepare(); err != nil {
				return 0, err
			}
		}
		begin := time.Now()
		if err := f(name); err != nil {
			return 0, err
		}
		took := time.Since(begin)
		if k == 0 {
			if out, err := exec.Command("qemu-img", "check", "-q", "-f", "qcow2", name).CombinedOutput(); err != nil {
				return 0, fmt.Errorf("check of %s: %w\n%s", name, err, out)
			}
		}
		return took, removeAll()
	}
	for k := range ourRounds {
		d, err := once(k, "image", c.ours)
		if err != nil {
			return nil, nil, err
		}
		ours = append(ours, d)
		if k >= c.rounds {
			continue
		}
		d, err = once(k, "image", func(name string) error {
			args := slices.Clone(c.theirs)
			for i, a := range args {
				args[i] = strings.ReplaceAll(a, "FILE", name)
			}
			if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
				return fmt.Errorf("qemu-img %q: %w\n%s", args, err, out)
			}
			return nil
		})
		if err != nil {
			return nil, nil, err
		}
		theirs = append(theirs, d)
	}
	return ours, theirs, nil
}

// removeAll removes the files of a run.
func removeAll() error {
	names, err := filepath.Glob("*")
	for _, name := range names {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return err
}
