package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/measure"
)

// qemu is the installed qemu-img.
type qemu struct {
	version string
}

// findQEMU looks for qemu-img.
func findQEMU() (*qemu, error) {
	version, err := measure.QEMUVersion()
	if err != nil {
		return nil, err
	}
	return &qemu{version: version}, nil
}

// qemuMode is how qemu-img reaches the file.
type qemuMode struct {
	cache, aio string
}

// qemuModes are the modes that are tried, the fastest of which is measured.
var qemuModes = []qemuMode{
	{"writeback", "threads"},
	{"writeback", "io_uring"},
	{"none", "native"},
}

// String names the mode as qemu-img's options do.
func (m qemuMode) String() string { return m.cache + "/" + m.aio }

// qemuRun is how qemu-img runs a workload.
type qemuRun struct {
	workload workload
	depth    int
	mode     qemuMode
	count    int64 // requests
}

// calibrate finds the fastest mode for the workload, and how many requests take about qemuTime.
func (q *qemu) calibrate(b *bench, w workload, depth int) (*qemuRun, error) {
	pilot := max(16, min(2000, (64<<20)/w.n))
	var best *qemuRun
	var bestRate float64
	var failures []error
	for _, mode := range qemuModes {
		r := &qemuRun{workload: w, depth: depth, mode: mode, count: pilot}
		rate, err := r.run(b)
		if err != nil {
			failures = append(failures, err) // a mode that this build or file system does not have
			continue
		}
		if rate > bestRate {
			best, bestRate = r, rate
		}
	}
	if best == nil {
		return nil, errors.Join(failures...)
	}
	best.count = max(pilot, int64(bestRate*qemuTime.Seconds()))
	if w.alloc {
		limit := b.allocSize / w.n
		if w.random {
			limit = b.allocSize / clusterSize
		}
		// No more than the others allocate, nor more than there is to allocate.
		best.count = min(best.count, limit, w.ops)
	}
	return best, nil
}

// completed finds the measured time in seconds in qemu-img's output.
var completed = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)

// run runs qemu-img once and returns the rate in requests per second, without the time for starting up,
// opening and closing.
func (r *qemuRun) run(b *bench) (float64, error) {
	w := &r.workload
	path := b.image
	size := b.size
	if w.alloc {
		size = b.allocSize
		path = filepath.Join(b.dir, "fresh.qemu")
		img, err := qcow2.Create(path, size, nil)
		if err != nil {
			return 0, err
		}
		defer os.Remove(path)
		if err := img.Close(); err != nil {
			return 0, err
		}
	}
	args := []string{"bench", "-f", "qcow2", "-c", strconv.FormatInt(r.count, 10), "-d", strconv.Itoa(r.depth),
		"-s", strconv.FormatInt(w.n, 10), "-S", strconv.FormatInt(r.step(size), 10), "-t", r.mode.cache, "-i", r.mode.aio}
	if w.write {
		args = append(args, "-w", "--pattern=165")
	}
	out, err := exec.Command("qemu-img", append(args, path)...).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("qemu-img %s: %w: %s", strings.Join(args, " "), err, out)
	}
	m := completed.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("qemu-img bench says nothing of time: %s", out)
	}
	seconds, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		return 0, err
	}
	// Half a millisecond more than the rounded time may have passed, and never none.
	return float64(r.count) / max(seconds, 0.0005), nil
}

// step returns the distance in bytes from one request of qemu-img to the next. It has no random order, but it
// wraps around at the end of the disk: an odd number of units near the (smaller) golden section of the disk
// visits each unit once before any is visited twice, and far from the one before. The larger section could be
// more than maxStep.
func (r *qemuRun) step(size int64) int64 {
	if !r.workload.random {
		return r.workload.n
	}
	unit := r.workload.n
	if r.workload.alloc {
		unit = clusterSize
	}
	return (int64(float64(size/unit)*(3-math.Sqrt(5))/2) | 1) * unit
}

// maxStep is the largest step in bytes that qemu-img bench takes.
const maxStep = 1<<31 - 1

// check has qemu-img check an image.
func (q *qemu) check(path string) error {
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img check: %w: %s", err, out)
	}
	return nil
}
