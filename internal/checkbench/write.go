package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/measure"
)

// What is written to an empty image of 512-byte clusters, in bytes.
const (
	writeBytes   = 128 << 20
	writeRequest = 64 << 10
	writeSlices  = 64 // parts in which two of our images take turns
)

// writeAim is how often as fast as QEMU with overlap checks the library is meant to write.
const writeAim = 8

// overheadAim is the part of the time without overlap checks that they are meant to add at most.
const overheadAim = 0.03

// writes measures allocating writes with overlap checks on and off, and prints their tables.
func (b *bench) writes() error {
	empty := filepath.Join(b.dir, "empty.qcow2")
	defer os.Remove(empty)
	if err := qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", empty, "2G"); err != nil {
		return err
	}
	fmt.Printf("| 128 MiB into an empty 2 GiB image, 512-byte clusters | rounds | QEMU | ours, all | QEMU / ours (95 %%) | aim |\n")
	fmt.Printf("| --- | ---: | ---: | ---: | --- | --- |\n")
	for _, row := range []struct {
		preset string
		aim    float64
	}{{"all", writeAim}, {"none", 0}} {
		if !b.wants("write/QEMU with " + row.preset) {
			continue
		}
		rounds := either(b, 7, 2)
		s, err := measure.SideBySide(rounds, func() (*exec.Cmd, error) { return b.qemuWrite(empty, row.preset) },
			func() (*exec.Cmd, error) {
				path, err := b.fresh(empty)
				if err != nil {
					return nil, err
				}
				return child("write", path)
			})
		if err != nil {
			return err
		}
		verdict := ""
		if row.aim > 0 {
			verdict = aim(s.Ratio.Median >= row.aim, fmt.Sprintf("%.0f", row.aim))
		}
		fmt.Printf("| QEMU with overlap-check=%s | %d | %s | %s | %s | %s |\n", row.preset, rounds, ms(s.QEMU.Seconds), ms(s.Ours.Seconds),
			s.Ratio, verdict)
	}
	if !b.wants("write/ours with all and none") {
		return nil
	}
	overhead, none, err := b.overhead(empty, either(b, 41, 6))
	if err != nil {
		return err
	}
	fmt.Printf("\nOurs with all takes %s %% more than with none (%s, without opening): aim %s.\n", percent(overhead).Format("%.1f"), ms(none),
		aim(overhead.Median < overheadAim, fmt.Sprintf("below %.0f %%", 100*overheadAim)))
	return nil
}

// percent returns a part of one in percent.
func percent(i measure.Interval) measure.Interval {
	return measure.Interval{Low: 100 * i.Low, Median: 100 * i.Median, High: 100 * i.High}
}

// fresh copies an image to where it is written.
func (b *bench) fresh(empty string) (string, error) {
	path := filepath.Join(b.dir, "written.qcow2")
	return path, copyFile(path, empty)
}

// copyFile makes to a new copy of from.
func copyFile(to, from string) error {
	if err := os.Remove(to); err != nil && !os.IsNotExist(err) {
		return err
	}
	p, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, p, 0o600)
}

// qemuWrite returns the command by which QEMU writes.
func (b *bench) qemuWrite(empty, preset string) (*exec.Cmd, error) {
	path, err := b.fresh(empty)
	if err != nil {
		return nil, err
	}
	return exec.Command("qemu-img", "bench", "-w", "--pattern=165", "-d", "1", "-t", "writeback",
		"-c", fmt.Sprint(writeBytes/writeRequest), "-s", fmt.Sprint(writeRequest),
		"--image-opts", "driver=qcow2,file.filename="+path+",overlap-check="+preset), nil
}

// openForWriting opens an image for writing with an overlap preset.
func openForWriting(path string, preset qcow2.OverlapPreset) (*qcow2.Image, error) {
	return qcow2.Open(path, &qcow2.OpenOptions{ReadWrite: true, OverlapCheck: qcow2.OverlapCheck{Preset: preset}})
}

// writePart writes from lo to hi, in order.
func writePart(img *qcow2.Image, lo, hi int64) error {
	p := bytes.Repeat([]byte{165}, writeRequest)
	for off := lo; off < hi; off += writeRequest {
		if _, err := img.WriteAt(p, off); err != nil {
			return err
		}
	}
	return nil
}

// writeImage writes to the image at path.
func writeImage(path string, preset qcow2.OverlapPreset) error {
	img, err := openForWriting(path, preset)
	if err != nil {
		return err
	}
	defer img.Close()
	if err := writePart(img, 0, writeBytes); err != nil {
		return err
	}
	if err := img.Sync(); err != nil {
		return err
	}
	return img.Close()
}

// overhead returns what overlap checks add to our time, as a part of it, and the seconds without. In a round two
// new images are written slice by slice by turns, in the order A B B A, so that both meet the same machine. The
// ratio of a round is that of the sums of its slices, without those quarters of the pairs of slices in which one of
// the two was disturbed the most.
func (b *bench) overhead(empty string, rounds int) (overhead measure.Interval, none float64, err error) {
	var overheads, nones []float64
	for round := range rounds {
		pairs, err := b.overheadRound(empty, round)
		if err != nil {
			return overhead, 0, err
		}
		slices.SortFunc(pairs, func(p, q [2]float64) int { return compareRatio(p, q) })
		var all, none, whole float64
		for i, p := range pairs {
			whole += p[0]
			if i >= len(pairs)/4 && i < len(pairs)-len(pairs)/4 {
				none += p[0]
				all += p[1]
			}
		}
		overheads = append(overheads, all/none-1)
		nones = append(nones, whole)
	}
	return measure.MedianInterval(overheads), measure.MedianInterval(nones).Median, nil
}

// compareRatio orders pairs of times by their ratio.
func compareRatio(p, q [2]float64) int {
	switch r, s := p[1]/p[0], q[1]/q[0]; {
	case r < s:
		return -1
	case r > s:
		return 1
	}
	return 0
}

// overheadRound returns the times of the slices of one round, without and with overlap checks.
func (b *bench) overheadRound(empty string, round int) (pairs [][2]float64, err error) {
	var images [2]*qcow2.Image
	for i, preset := range []qcow2.OverlapPreset{qcow2.OverlapNone, qcow2.OverlapAll} {
		path := filepath.Join(b.dir, fmt.Sprintf("slices-%v.qcow2", preset))
		defer os.Remove(path)
		if err := copyFile(path, empty); err != nil {
			return nil, err
		}
		if images[i], err = openForWriting(path, preset); err != nil {
			return nil, err
		}
		defer images[i].Close()
	}
	for s := range int64(writeSlices) {
		var pair [2]float64
		for turn := range 2 {
			which := (round + int(s) + turn) % 2
			begin := time.Now()
			if err := writePart(images[which], s*writeBytes/writeSlices, (s+1)*writeBytes/writeSlices); err != nil {
				return nil, err
			}
			if s == writeSlices-1 {
				if err := images[which].Sync(); err != nil {
					return nil, err
				}
			}
			pair[which] = time.Since(begin).Seconds()
		}
		pairs = append(pairs, pair)
	}
	return pairs, nil
}
