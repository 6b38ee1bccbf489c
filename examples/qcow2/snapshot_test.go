package main

import (
	"bytes"
	"os"
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// snapshotDate matches the date of a snapshot in a list, which the tools take at different moments.
var snapshotDate = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d`)

// TestSnapshot carries out the same command lines on two copies of an image, with qemu-img and with the tool, and
// compares outputs, exit codes and disks.
func TestSnapshot(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	writeDisk(t, "disk", 1<<20)
	for _, image := range []string{"theirs", "ours"} {
		qemutest.Img(t, "convert", "-f", "raw", "-O", "qcow2", "disk", image)
	}
	change := func(pattern string) {
		for _, image := range []string{"theirs", "ours"} {
			qemutest.IO(t, image, "write -P "+pattern+" 0 600k")
		}
	}
	same := func() {
		t.Helper()
		qemutest.Compare(t, "theirs", "qcow2", "ours", "qcow2")
		qemutest.CheckClean(t, "ours")
		list, _ := qemutest.ImgExit(t, "snapshot", "-l", "theirs")
		mine := mustTool(t, "snapshot", "-f", "qcow2", "-l", "ours")
		hide := func(s string) string { return snapshotDate.ReplaceAllString(s, "DATE") }
		if diff := cmp.Diff(hide(list), hide(mine)); diff != "" {
			t.Errorf("list (-QEMU +ours):\n%s", diff)
		}
		if bare := mustTool(t, "snapshot", "-f", "qcow2", "ours"); bare != mine {
			t.Errorf("without an option: %q", bare)
		}
	}
	both := func(args ...string) {
		t.Helper()
		_, want := qemutest.ImgExit(t, append(append([]string{"snapshot"}, args...), "theirs")...)
		_, stderr, got := tool(append(append([]string{"snapshot", "-f", "qcow2"}, args...), "ours")...)
		if got != want {
			t.Errorf("snapshot %q: exit %d, QEMU's %d: %s", args, got, want, stderr)
		}
		same()
	}
	same()
	both("-c", "2")
	change("1")
	both("-c", "1") // its id is 2
	change("2")
	both("-c", "")
	both("-a", "1") // the id counts before the name
	both("-d", "3") // a name alone is deleted
	both("-d", "1")
	both("-a", "2")
	both("-a", "none")
	both("-q", "-d", "2")
}

// TestConvertSnapshot converts snapshots by id and by name, and compares with qemu-img.
func TestConvertSnapshot(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	writeDisk(t, "disk", 1<<20)
	mustTool(t, "convert", "-f", "raw", "-O", "qcow2", "disk", "image")
	mustTool(t, "snapshot", "-f", "qcow2", "-c", "first", "image")
	qemutest.IO(t, "image", "write -P 7 0 1M")
	mustTool(t, "snapshot", "-f", "qcow2", "-c", "second", "image")
	qemutest.IO(t, "image", "write -P 8 0 1M")
	for _, which := range []string{"1", "first", "snapshot.id=1", "snapshot.name=second", "snapshot.id=2,snapshot.name=second"} {
		qemutest.Img(t, "convert", "-l", which, "-f", "qcow2", "-O", "raw", "image", "theirs")
		mustTool(t, "convert", "-l", which, "-f", "qcow2", "-O", "raw", "image", "ours")
		theirs, err := os.ReadFile("theirs")
		if err != nil {
			t.Fatal(err)
		}
		ours, err := os.ReadFile("ours")
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(theirs, ours) {
			t.Errorf("-l %s: the disks differ", which)
		}
	}
}
