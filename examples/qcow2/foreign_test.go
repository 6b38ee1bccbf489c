package main

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// TestForeign describes, maps and converts images of the formats that are read only, as qemu-img does, with -f and
// without.
func TestForeign(t *testing.T) {
	qemutest.Require(t)
	tests := []struct {
		name, format, options string
		whole                 bool // qemu-img map does not tell the holes of the file
	}{
		{"qed", "qed", "cluster_size=64k", false},
		{"vdi", "vdi", "static=off", false},
		{"static vdi", "vdi", "static=on", true},
		{"vhd", "vpc", "subformat=dynamic", false},
		{"fixed vhd", "vpc", "subformat=fixed,force_size=on", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inTempDir(t)
			writeDisk(t, "disk", 5<<20)
			qemutest.Img(t, "convert", "-f", "raw", "-O", tt.format, "-o", tt.options, "disk", "image")
			for _, source := range [][]string{{"-f", tt.format}, nil} {
				want := qemutest.Img(t, "info", "-f", tt.format, "--output=json", "image")
				got := mustTool(t, append(append([]string{"info"}, source...), "--output=json", "image")...)
				if diff := cmp.Diff(decode(t, want), decode(t, got)); diff != "" {
					t.Errorf("info %q (-qemu-img +ours):\n%s", source, diff)
				}
				want = qemutest.Img(t, "info", "-f", tt.format, "image")
				got = mustTool(t, append(append([]string{"info"}, source...), "image")...)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("info %q (-qemu-img +ours):\n%s", source, diff)
				}
				want = qemutest.Img(t, "map", "-f", tt.format, "--output=json", "image")
				got = mustTool(t, append(append([]string{"map"}, source...), "--output=json", "image")...)
				if diff := cmp.Diff(decode(t, want), decode(t, got)); diff != "" && !tt.whole {
					t.Errorf("map %q (-qemu-img +ours):\n%s", source, diff)
				}
				for _, target := range []string{"raw", "qcow2"} {
					mustTool(t, append(append([]string{"convert", "-O", target}, source...), "image", "copy")...)
					qemutest.Compare(t, "image", tt.format, "copy", target)
				}
			}
		})
	}
}

// TestForeignRefusals has images of these formats where they are not taken.
func TestForeignRefusals(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	writeDisk(t, "base", 1<<20)
	qemutest.Img(t, "create", "-q", "-f", "vdi", "vdi", "1M")
	qemutest.Img(t, "convert", "-f", "raw", "-O", "qcow2", "base", "base.qcow2")
	qemutest.Img(t, "create", "-q", "-f", "qed", "-b", "base.qcow2", "-F", "qcow2", "qed")
	qemutest.Img(t, "create", "-q", "-f", "qed", "-b", "base", "-F", "raw", "over raw")
	before, err := os.ReadFile("vdi")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		args []string
		exit int
		want string // in the message; "" if there is none
	}{
		{[]string{"resize", "vdi", "2M"}, 1, "reading only"},
		{[]string{"resize", "-f", "vdi", "vdi", "2M"}, 1, "reading only"},
		{[]string{"amend", "-f", "qed", "-o", "lazy_refcounts=on", "qed"}, 1, "reading only"},
		{[]string{"snapshot", "-l", "vdi"}, 1, "reading only"},
		{[]string{"commit", "-f", "qed", "qed"}, 1, "reading only"},
		{[]string{"check", "vdi"}, exitNoCheck, "not supported"},
		{[]string{"check", "-f", "vpc", "vdi"}, 1, "not an image of this format"},
		{[]string{"create", "-f", "vdi", "new", "1M"}, 1, "unknown driver"},
		{[]string{"convert", "-O", "vdi", "base", "new"}, 1, "unknown driver"},
		{[]string{"convert", "-f", "vdi", "-l", "x", "vdi", "new"}, 1, "snapshots"},
		{[]string{"convert", "qed", "new"}, 1, "--trust"},
		{[]string{"convert", "-f", "qed", "qed", "new"}, 1, "--backing-format"},
		{[]string{"convert", "-f", "qed", "--backing-format", "vmdk", "qed", "new"}, 1, "unknown driver"},
		{[]string{"convert", "-f", "qed", "--backing-format", "qcow2", "qed", "new"}, 0, ""},
		{[]string{"convert", "--trust", "over raw", "new"}, 0, ""},
		{[]string{"info", "qed"}, 0, ""},
	}
	for _, tt := range tests {
		_ = os.Remove("new")
		stdout, stderr, exit := tool(tt.args...)
		if exit != tt.exit || tt.want != "" && !strings.Contains(stderr, tt.want) {
			t.Errorf("qcow2 %q: exit %d, want %d and %q\n%s", tt.args, exit, tt.exit, tt.want, stderr)
		}
		if exit != 0 && stdout != "" {
			t.Errorf("qcow2 %q prints %q", tt.args, stdout)
		}
		if tt.exit == 0 && tt.args[0] == "convert" {
			qemutest.Compare(t, "base", "raw", "new", "raw")
		}
		if _, err := os.Stat("new"); err == nil && exit != 0 {
			t.Errorf("qcow2 %q leaves a file", tt.args)
		}
	}
	if after, err := os.ReadFile("vdi"); err != nil || string(after) != string(before) {
		t.Errorf("an image was changed: %v", err)
	}
}
