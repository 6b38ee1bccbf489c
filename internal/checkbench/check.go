package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/go-qcow2/qcow2/internal/measure"
)

// checkRow is an image that is checked.
type checkRow struct {
	name      string
	size      int64 // of the disk in bytes
	cluster   int64 // cluster size in bytes
	snapshots int
	rounds    int
	aim       float64 // how often as fast as qemu-img check the library is meant to be
}

// memoryAllowance is how many bytes more than qemu-img a check may take.
const memoryAllowance = 16 << 20

// checkRows are the images. A quick run has smaller ones of the same kinds.
func (b *bench) checkRows() []checkRow {
	if b.Quick {
		return []checkRow{
			{name: "256 MiB, 512-byte clusters", size: 256 << 20, cluster: 512, rounds: 6, aim: 5},
			{name: "64 GiB, 64 KiB clusters", size: 64 << 30, cluster: 64 << 10, rounds: 6, aim: 1},
			{name: "256 GiB, 64 KiB clusters", size: 256 << 30, cluster: 64 << 10, rounds: 6, aim: 5},
			{name: "4 GiB, 64 KiB clusters, 10 snapshots", size: 4 << 30, cluster: 64 << 10, snapshots: 10, rounds: 6, aim: 5},
		}
	}
	return []checkRow{
		{name: "2 GiB, 512-byte clusters", size: 2 << 30, cluster: 512, rounds: 11, aim: 5},
		{name: "64 GiB, 64 KiB clusters", size: 64 << 30, cluster: 64 << 10, rounds: 31, aim: 1},
		{name: "1 TiB, 64 KiB clusters", size: 1 << 40, cluster: 64 << 10, rounds: 15, aim: 5},
		{name: "16 GiB, 64 KiB clusters, 100 snapshots", size: 16 << 30, cluster: 64 << 10, snapshots: 100, rounds: 31, aim: 5},
	}
}

// checks measures the checks and prints their table.
func (b *bench) checks() error {
	fmt.Printf("| check of | rounds | QEMU | ours | QEMU / ours (95 %%) | aim | QEMU's memory | ours | aim |\n")
	fmt.Printf("| --- | ---: | ---: | ---: | --- | --- | ---: | ---: | --- |\n")
	for _, r := range b.checkRows() {
		if !b.wants("check/" + r.name) {
			continue
		}
		if err := b.check(r); err != nil {
			return fmt.Errorf("check of %s: %w", r.name, err)
		}
	}
	return nil
}

// check measures and prints one row.
func (b *bench) check(r checkRow) error {
	path := filepath.Join(b.dir, "checked.qcow2")
	defer os.Remove(path)
	if err := r.makeImage(path); err != nil {
		return err
	}
	s, err := measure.SideBySide(r.rounds,
		func() (*exec.Cmd, error) { return exec.Command("qemu-img", "check", "-f", "qcow2", path), nil },
		func() (*exec.Cmd, error) { return child("check", path) })
	if err != nil {
		return err
	}
	memory := "not measured"
	if s.QEMU.Memory > 0 {
		memory = aim(s.Ours.Memory <= s.QEMU.Memory+memoryAllowance, fmt.Sprintf("%s more", mib(memoryAllowance)))
	}
	fmt.Printf("| %s | %d | %s | %s | %s | %s | %s | %s | %s |\n", r.name, r.rounds, ms(s.QEMU.Seconds), ms(s.Ours.Seconds),
		s.Ratio, aim(s.Ratio.Median >= r.aim, fmt.Sprintf("%.0f", r.aim)), mib(s.QEMU.Memory), mib(s.Ours.Memory), memory)
	return nil
}

// makeImage has QEMU make the image.
func (r *checkRow) makeImage(path string) error {
	options := fmt.Sprintf("preallocation=metadata,cluster_size=%d", r.cluster)
	if err := qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(r.size)); err != nil {
		return err
	}
	// Before each snapshot, a write to every GiB copies every second L2 table from the snapshot before.
	for i := range int64(r.snapshots) {
		args := []string{"-f", "qcow2"}
		for off := i << 20; off < r.size; off += 1 << 30 {
			args = append(args, "-c", fmt.Sprintf("write -q %d 64k", off))
		}
		if err := qemu("qemu-io", append(args, path)...); err != nil {
			return err
		}
		if err := qemu("qemu-img", "snapshot", "-c", fmt.Sprint("s", i), path); err != nil {
			return err
		}
	}
	return nil
}

// qemu runs one of QEMU's programs.
func qemu(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// ms gives a time in milliseconds.
func ms(seconds float64) string { return fmt.Sprintf("%.0f ms", 1000*seconds) }

// mib gives a size in MiB.
func mib(n int64) string { return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20)) }
