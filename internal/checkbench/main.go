// Command checkbench measures the image check and the overlap list, beside QEMU on the same machine in one run:
//
//	go run ./internal/checkbench [-quick] [-dir DIR] [-run REGEXP]
//
// It prints a report in Markdown of three tables: time and memory of checks, the time of writes with overlap
// checks on and off, and the share of overlap checks in the processor time of writes. docs/PERFORMANCE.md holds
// such a report and says how to read it. It needs qemu-img, qemu-io and the go command. Its files go into a
// directory of its own, which it removes.
package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/go-qcow2/qcow2/internal/measure"
)

// bench holds the files of a run.
type bench struct {
	measure.Flags
	dir   string
	begin time.Time
}

func main() {
	err := runChild()
	if errors.Is(err, errNoChild) {
		err = parent()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "checkbench:", err)
		os.Exit(1)
	}
}

// parent reads the command line and measures.
func parent() error {
	f, err := measure.ParseFlags("smaller images, fewer rounds, shorter profiles", "check/.*snapshots")
	if err != nil {
		return err
	}
	return measure.InDir(f.Dir, func(dir string) error { return run(dir, f) })
}

// run measures with files in dir and prints the report, each table when it is complete.
//
// The checks come first: until then this process is small, and of a process that it starts the system counts
// the memory of this one too, for the moment before the other program is loaded.
func run(dir string, f measure.Flags) error {
	b := &bench{Flags: f, dir: dir, begin: time.Now()}
	version, err := measure.QEMUVersion()
	if err != nil {
		return err
	}
	measure.PrintMachine(os.Stdout, version)
	for _, table := range []func() error{b.checks, b.writes, b.shares} {
		fmt.Println()
		if err := table(); err != nil {
			return err
		}
	}
	fmt.Printf("\nTook %v.\n", time.Since(b.begin).Round(time.Second))
	return nil
}

// wants reports whether a row is to be run, and says that it begins.
func (b *bench) wants(name string) bool {
	if !b.Filter.MatchString(name) {
		return false
	}
	fmt.Fprintf(os.Stderr, "%4.0fs  %s\n", time.Since(b.begin).Seconds(), name)
	return true
}

// either returns one of two values: that of a full or that of a quick run.
func either[T any](b *bench, full, quick T) T {
	if b.Quick {
		return quick
	}
	return full
}

// aim says whether an aim is met.
func aim(met bool, text string) string {
	if met {
		return text + ", met"
	}
	return text + ", **missed**"
}
