// Command bench compares the library with the file under it and with QEMU, on the same machine in one run:
//
//	go run ./internal/bench [-quick] [-dir DIR] [-run REGEXP]
//
// It prints a report in Markdown: for each workload and number of goroutines the rate of a raw file through
// os.File, and the library's and qemu-img's as ratios to it. docs/PERFORMANCE.md holds such a report and says
// how to read it. Its files go into a directory of its own, which it removes.
package main

import (
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/go-qcow2/qcow2/internal/measure"
)

// config is what the flags say.
type config struct {
	measure.Flags
	size      int64         // of the mapped disks, in bytes
	allocSize int64         // of the disks that are filled, in bytes
	rounds    int           // measured rounds per row
	slice     time.Duration // time for the library, and for the raw file, in a round
	qemu      bool          // whether qemu-img runs too
}

// parseFlags reads the command line.
func parseFlags() (config, error) {
	rounds := flag.Int("rounds", 21, "measured rounds per row, at least 15")
	qemu := flag.Bool("qemu", true, "run qemu-img too, where it is installed")
	f, err := measure.ParseFlags("smaller disks and shorter slices", "random read/2")
	if err != nil {
		return config{}, err
	}
	c := config{Flags: f, size: 1 << 30, allocSize: 4 << 30, rounds: max(*rounds, 15), slice: 72 * time.Millisecond, qemu: *qemu}
	if c.Quick {
		c.size, c.allocSize, c.rounds, c.slice = 256<<20, 1<<30, 15, 24*time.Millisecond
	}
	return c, nil
}

func main() {
	c, err := parseFlags()
	if err == nil {
		err = run(c)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures in a directory of its own and prints the report.
func run(c config) error {
	return measure.InDir(c.Dir, func(dir string) error { return runIn(dir, c) })
}

// runIn makes the files in dir, measures and prints the report.
func runIn(dir string, c config) error {
	begin := time.Now()
	var q *qemu
	if c.qemu {
		var err error
		if q, err = findQEMU(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: without qemu-img:", err)
		}
	}
	b := &bench{config: c, dir: dir, qemu: q}
	if err := b.prepare(); err != nil {
		return err
	}
	var rows []row
	for _, w := range workloads {
		for _, g := range goroutines {
			name := fmt.Sprintf("%s/%d", w.name, g)
			if !c.Filter.MatchString(name) {
				continue
			}
			fmt.Fprintf(os.Stderr, "%4.0fs  %s\n", time.Since(begin).Seconds(), name)
			r, err := b.measure(w, g)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			rows = append(rows, r)
		}
	}
	allocs, err := b.allocations()
	if err != nil {
		return err
	}
	if err := b.judge(); err != nil {
		return err
	}
	printReport(os.Stdout, c, q, rows, allocs, time.Since(begin))
	return nil
}
