package main

import (
	"crypto/sha256"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// TestCommit commits chains beside qemu-img: with the same outputs and exit codes, the files of both hold the same.
func TestCommit(t *testing.T) {
	qemutest.Require(t)
	tests := []struct {
		name string
		args []string // behind "commit"
		exit int
	}{
		{name: "one level", args: []string{"-f", "qcow2", "top"}},
		{name: "kept", args: []string{"-f", "qcow2", "-d", "top"}},
		{name: "down to the lowest", args: []string{"-f", "qcow2", "-b", "base", "top"}},
		{name: "its own backing file by name", args: []string{"-f", "qcow2", "-b", "mid", "top"}},
		{name: "quietly", args: []string{"-f", "qcow2", "-q", "top"}},
		{name: "a raw backing file", args: []string{"-f", "qcow2", "mid"}},
		{name: "no such base", args: []string{"-f", "qcow2", "-b", "none", "top"}, exit: 1},
		{name: "itself", args: []string{"-f", "qcow2", "-b", "top", "top"}, exit: 1},
		{name: "no backing file", args: []string{"-f", "raw", "base"}, exit: 1},
		{name: "no file", args: []string{"-f", "qcow2", "none"}, exit: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			type outcome struct {
				Stdout string
				Exit   int
				Base   [sha256.Size]byte
			}
			var outcomes []outcome
			var dirs []string
			for _, ours := range []bool{false, true} {
				inTempDir(t)
				dir, err := os.Getwd()
				if err != nil {
					t.Fatal(err)
				}
				dirs = append(dirs, dir)
				writeDisk(t, "base", 3<<20)
				qemutest.Img(t, "create", "-f", "qcow2", "-b", "base", "-F", "raw", "mid")
				qemutest.Img(t, "create", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top")
				qemutest.IO(t, "mid", "write -P 1 100k 200k")
				qemutest.IO(t, "top", "write -P 2 200k 1M", "write -z 2M 100k")
				var o outcome
				if args := append([]string{"commit"}, tt.args...); ours {
					o.Stdout, _, o.Exit = tool(args...)
				} else {
					o.Stdout, o.Exit = qemutest.ImgExit(t, args...)
				}
				p, err := os.ReadFile("base")
				if err != nil {
					t.Fatal(err)
				}
				o.Base = sha256.Sum256(p)
				outcomes = append(outcomes, o)
			}
			if diff := cmp.Diff(outcomes[0], outcomes[1]); diff != "" {
				t.Errorf("qemu-img and this (-qemu +this):\n%.2000s", diff)
			}
			if outcomes[1].Exit != tt.exit {
				t.Errorf("exit code %d, want %d", outcomes[1].Exit, tt.exit)
			}
			for _, name := range []string{"mid", "top"} {
				qemutest.Compare(t, dirs[0]+"/"+name, "qcow2", dirs[1]+"/"+name, "qcow2")
				qemutest.CheckClean(t, dirs[1]+"/"+name)
			}
			if theirs, ours := holds(t, dirs[0]+"/top"), holds(t, dirs[1]+"/top"); theirs != ours {
				t.Errorf("top holds something itself: %v with qemu-img, %v with this", theirs, ours)
			}
		})
	}
}

// holds reports whether the image holds anything itself.
func holds(t *testing.T, name string) bool {
	return slices.ContainsFunc(qemutest.Map(t, name), func(e qemutest.MapEntry) bool { return e.Depth == 0 && e.Present })
}

// TestCommitAlone commits without QEMU: only a format that is given makes it follow names, and the bar is shown.
func TestCommitAlone(t *testing.T) {
	inTempDir(t)
	writeDisk(t, "base", 1<<20)
	mustTool(t, "create", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "1M")
	if _, stderr, exit := tool("commit", "top"); exit != 1 || !strings.Contains(stderr, "--trust") {
		t.Errorf("without a format: exit %d, %s", exit, stderr)
	}
	if _, stderr, exit := tool("commit", "-f", "qcow2", "-U", "top"); exit != 1 {
		t.Errorf("with -U: exit %d, %s", exit, stderr)
	}
	if _, stderr, exit := tool("commit", "-f", "qcow2", "-p", "top"); exit != 0 {
		t.Errorf("with -p: exit %d, %s", exit, stderr)
	}
}
