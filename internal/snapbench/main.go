// Command snapbench measures operations on internal snapshots beside qemu-img, on the same machine in one run:
//
//	go run ./internal/snapbench [-quick] [-dir DIR] [-run REGEXP]
//
// Each program has an image of its own, whose clusters QEMU has preallocated, and creates, applies and deletes a
// snapshot of it by turns with the other; a process is measured from its start to its end. The report in Markdown gives
// the medians and the ratio. It needs qemu-img. Its files go into a directory of its own, which it removes.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/measure"
)

// childVariable is the environment variable that makes this program carry out one operation, so that it can be measured
// like a process of QEMU: its value is the option of qemu-img snapshot, its argument the image.
const childVariable = "QCOW2_SNAPBENCH_CHILD"

// snapshotName is the name of the one snapshot of an image.
const snapshotName = "bench"

// operations are what is measured, in the order in which each needs the one before.
var operations = []struct {
	name, option string
	aim          float64 // how often as fast as qemu-img the library is meant to be; 0: no aim
}{
	{"create", "-c", 5},
	{"apply", "-a", 0},
	{"delete", "-d", 5},
}

// images are the images: sizes in bytes, and rounds of a full run.
var images = []struct {
	name    string
	size    int64
	cluster int
	rounds  int
}{
	{"64 GiB, 64 KiB clusters", 64 << 30, 64 << 10, 31},
	{"1 TiB, 64 KiB clusters", 1 << 40, 64 << 10, 7},
	{"2 GiB, 512-byte clusters", 2 << 30, 512, 3},
}

func main() {
	err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "snapbench:", err)
		os.Exit(1)
	}
}

// run is the child's work, or reads the command line and measures.
func run() error {
	if option := os.Getenv(childVariable); option != "" {
		return operate(option, os.Args[1])
	}
	f, err := measure.ParseFlags("three rounds, no image of 512-byte clusters", "1 TiB")
	if err != nil {
		return err
	}
	return measure.InDir(f.Dir, func(dir string) error { return report(dir, f) })
}

// operate carries out one operation on the image called name.
func operate(option, name string) (err error) {
	img, err := qcow2.Open(name, &qcow2.OpenOptions{ReadWrite: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	ctx, ref := context.Background(), qcow2.SnapshotRef{Name: snapshotName}
	switch option {
	case "-c":
		_, err = img.CreateSnapshot(ctx, &qcow2.SnapshotOptions{Name: snapshotName})
		return err
	case "-a":
		return img.ApplySnapshot(ctx, ref)
	}
	return img.DeleteSnapshot(ctx, ref)
}

// report measures with files in dir and prints the report.
func report(dir string, f measure.Flags) error {
	version, err := measure.QEMUVersion()
	if err != nil {
		return err
	}
	measure.PrintMachine(os.Stdout, version)
	fmt.Printf("\n| snapshot of | operation | rounds | QEMU | ours | QEMU / ours (95 %%) | aim |\n")
	fmt.Printf("| --- | --- | ---: | ---: | ---: | --- | --- |\n")
	begin := time.Now()
	for _, i := range images {
		if !f.Filter.MatchString(i.name) || f.Quick && i.cluster == 512 {
			continue
		}
		rounds := i.rounds
		if f.Quick {
			rounds = 3
		}
		if err := measureImage(dir, i.name, i.size, i.cluster, rounds); err != nil {
			return fmt.Errorf("%s: %w", i.name, err)
		}
	}
	fmt.Printf("\nTook %v.\n", time.Since(begin).Round(time.Second))
	return nil
}

// measureImage measures the operations on one kind of image, and prints a row for each.
func measureImage(dir, name string, size int64, cluster, rounds int) error {
	var paths [2]string // QEMU's and ours
	for i := range paths {
		paths[i] = filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
		defer os.Remove(paths[i])
		cmd := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("preallocation=metadata,cluster_size=%d", cluster),
			paths[i], fmt.Sprint(size))
		if _, err := seconds(cmd); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	times := make([][2][]float64, len(operations))
	ratios := make([][]float64, len(operations))
	for round := range rounds {
		for k, op := range operations {
			for turn := range 2 {
				who := (round + turn) % 2
				cmd := exec.Command("qemu-img", "snapshot", op.option, snapshotName, paths[0])
				if who == 1 {
					cmd = exec.Command(self, paths[1])
					cmd.Env = append(os.Environ(), childVariable+"="+op.option)
				}
				t, err := seconds(cmd)
				if err != nil {
					return err
				}
				times[k][who] = append(times[k][who], t)
			}
			ratios[k] = append(ratios[k], times[k][0][round]/times[k][1][round])
		}
	}
	for _, path := range paths {
		if _, err := seconds(exec.Command("qemu-img", "check", "-q", "-f", "qcow2", path)); err != nil {
			return err
		}
	}
	for k, op := range operations {
		ratio := measure.MedianInterval(ratios[k])
		aim := "none"
		if op.aim > 0 {
			aim = fmt.Sprintf("%.0f, met", op.aim)
			if ratio.Median < op.aim {
				aim = fmt.Sprintf("%.0f, **missed**", op.aim)
			}
		}
		fmt.Printf("| %s | %s | %d | %s | %s | %s | %s |\n", name, op.name, rounds, ms(times[k][0]), ms(times[k][1]), ratio, aim)
	}
	return nil
}

// seconds runs a command to its end, and returns what it took.
func seconds(cmd *exec.Cmd) (float64, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	begin := time.Now()
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out.Bytes())
	}
	return time.Since(begin).Seconds(), nil
}

// ms gives the median of times in milliseconds.
func ms(times []float64) string {
	return fmt.Sprintf("%.1f ms", 1000*measure.MedianInterval(times).Median)
}
