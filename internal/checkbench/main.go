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
	"flag"
	"fmt"
	"os"
	"regexp"
	"time"

	"github.com/go-qcow2/qcow2/internal/measure"
)

// config is what the flags say.
type config struct {
	parent string         // where the directory for files goes; best a tmpfs
	quick  bool           // smaller images, fewer rounds, shorter profiles
	filter *regexp.Regexp // rows to run, by their names
}

// bench holds the files of a run.
type bench struct {
	config
	dir   string
	begin time.Time
}

// parseFlags reads the command line.
func parseFlags() (config, error) {
	dir := flag.String("dir", measure.DefaultDir(), "directory for the files; the figures are meant for a tmpfs")
	quick := flag.Bool("quick", false, "a short run, for a look: smaller images, fewer rounds, shorter profiles")
	run := flag.String("run", "", "only rows that match the regular expression, as in 'check/.*snapshots'")
	flag.Parse()
	filter, err := regexp.Compile(*run)
	return config{parent: *dir, quick: *quick, filter: filter}, err
}

func main() {
	err := errNoChild
	if err = runChild(); errors.Is(err, errNoChild) {
		var c config
		if c, err = parseFlags(); err == nil {
			err = measure.InDir(c.parent, func(dir string) error { return run(dir, c) })
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "checkbench:", err)
		os.Exit(1)
	}
}

// run measures with files in dir and prints the report, each table when it is complete.
//
// The checks come first: until then this process is small, and of a process that it starts the system counts
// the memory of this one too, for the moment before the other program is loaded.
func run(dir string, c config) error {
	b := &bench{config: c, dir: dir, begin: time.Now()}
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
	if !b.filter.MatchString(name) {
		return false
	}
	fmt.Fprintf(os.Stderr, "%4.0fs  %s\n", time.Since(b.begin).Seconds(), name)
	return true
}

// either returns one of two values: that of a full or that of a quick run.
func either[T any](b *bench, full, quick T) T {
	if b.quick {
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
