package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// compareCompares compares what compare prints, and its exit code, with qemu-img's.
func compareCompares(t *testing.T, args ...string) {
	t.Helper()
	all := append([]string{"compare"}, args...)
	want, wantExit := qemutest.ImgExit(t, all...)
	got, stderr, gotExit := tool(all...)
	if sooner(want, got) {
		got = want
	}
	if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); diff != "" || gotExit != wantExit {
		t.Errorf("%q: exit %d, want %d; %s(-qemu-img +ours):\n%s", all, gotExit, wantExit, stderr, diff)
	}
	if gotExit > 1 != (stderr != "") {
		t.Errorf("%q: exit %d with %q", all, gotExit, stderr)
	}
}

// sooner reports whether both verdicts are that the disks differ, and qemu-img's that their allocation does, before what
// ours found. In strict mode qemu-img compares more of its flags than what a range is: whether its run goes on to the
// end of the disk, and whether it asked the host file for holes.
func sooner(theirs, ours string) bool {
	var their, our int64
	if n, _ := fmt.Sscanf(theirs, "Strict mode: Offset %d block status", &their); n != 1 {
		return false
	}
	if n, _ := fmt.Sscanf(ours, "Content mismatch at offset %d", &our); n != 1 {
		if n, _ := fmt.Sscanf(ours, "Strict mode: Offset %d block status", &our); n != 1 {
			return false
		}
	}
	return their <= our
}

// TestCompare compares compare with qemu-img's on pairs of mapImages, plainly and strictly, of each with its own
// content in a raw file and in a compressed image, and of some that differ in length.
func TestCompare(t *testing.T) {
	qemutest.Require(t)
	makeMapImages(t)
	for i, im := range mapImages {
		t.Run(im.name, func(t *testing.T) {
			for _, other := range []string{mapImages[(i+1)%len(mapImages)].name, mapImages[(i+7)%len(mapImages)].name} {
				compareCompares(t, "-f", "qcow2", "-F", "qcow2", im.name, other)
				compareCompares(t, "-s", "-f", "qcow2", "-F", "qcow2", im.name, other)
			}
			qemutest.Img(t, "convert", "-f", "qcow2", "-O", "raw", im.name, "as raw")
			compareCompares(t, "-f", "raw", "-F", "qcow2", "as raw", im.name)
			compareCompares(t, "-s", "-f", "raw", "-F", "qcow2", "as raw", im.name)
			qemutest.Img(t, "convert", "-c", "-f", "qcow2", "-O", "qcow2", im.name, "as packed")
			compareCompares(t, "-f", "qcow2", "-F", "qcow2", "as packed", im.name)
			compareCompares(t, "-s", "-f", "qcow2", "-F", "qcow2", im.name, "as packed")
		})
	}
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "short", "2M")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "long", "4M")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "tail", "4M")
	qemutest.IO(t, "tail", "write -P 0 2M 64k", "write -P 1 3000001 2")
	for _, args := range [][]string{
		{"short", "long"}, {"-s", "long", "short"}, {"short", "tail"}, {"tail", "long"}, {"-q", "tail", "short"},
		{"-q", "short", "long"}, {"-q", "-s", "short", "long"}, {"-U", "long", "long"}, {"short", "mid"},
	} {
		compareCompares(t, append([]string{"-f", "qcow2", "-F", "qcow2"}, args...)...)
	}
}

// TestCompareErrors compares the exit codes of compare with qemu-img's where it cannot compare.
func TestCompareErrors(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	writeDisk(t, "disk", 1<<20)
	qemutest.Img(t, "convert", "-f", "raw", "-O", "qcow2", "disk", "image")
	qemutest.Img(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "disk", "packed")
	change := func(from, to string, f func(b imageBytes)) {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		f(b)
		if err := os.WriteFile(to, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l2 := func(b imageBytes) uint64 { return b.word(b.word(testHeaderL1)) & testOffMask }
	change("image", "unaligned", func(b imageBytes) { b[l2(b)+6] |= 2 })
	change("packed", "garbage", func(b imageBytes) {
		off := b.word(l2(b)+8*8) & (1<<54 - 1)
		copy(b[off:], bytes.Repeat([]byte{0xff}, 16))
	})
	for _, args := range [][]string{
		{"image", "disk"},
		{"image", "nothing"},
		{"nothing", "image"},
		{"image"},
		{},
		{"image", "image", "image"},
		{"-F", "qcow2", "image", "disk"},
		{"-f", "bogus", "image", "disk"},
		{"-F", "raw", "unaligned", "disk"},
		{"-f", "raw", "disk", "unaligned"},
		{"-f", "raw", "-F", "qcow2", "disk", "garbage"},
		{"-f", "qcow2", "garbage", "packed"},
		{"-f", "qcow2", "-F", "raw", "image", "garbage"},
	} {
		all := append([]string{"compare"}, args...)
		want, wantExit := qemutest.ImgExit(t, all...)
		got, stderr, gotExit := tool(all...)
		if got != want || gotExit != wantExit {
			t.Errorf("%q: exit %d, want %d; %q, want %q; stderr %q", all, gotExit, wantExit, got, want, stderr)
		}
	}
}
