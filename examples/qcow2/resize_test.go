package main

import (
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// TestResize resizes an image of ours and one of QEMU's by the same command lines, and compares exit codes, what is
// printed, sizes and content.
func TestResize(t *testing.T) {
	qemutest.Require(t)
	tests := []struct {
		name  string
		lines []string // of resize; IMAGE stands for the file
	}{
		{"larger", []string{"-f qcow2 IMAGE 7M"}},
		{"by a difference", []string{"-f qcow2 IMAGE +1M", "-f qcow2 IMAGE +512", "-f qcow2 --shrink IMAGE -3M"}},
		{"quietly", []string{"-q -f qcow2 IMAGE 7M"}},
		{"preallocated", []string{"-f qcow2 --preallocation=metadata IMAGE 7M", "-f qcow2 --preallocation=full IMAGE 8M", "-f qcow2 --preallocation=falloc IMAGE 9M"}},
		{"smaller", []string{"-f qcow2 IMAGE 1M", "-f qcow2 --shrink IMAGE 1M", "-f qcow2 IMAGE 2M"}},
		{"smaller, preallocated", []string{"-f qcow2 --shrink --preallocation=metadata IMAGE 1M"}},
		{"to nothing", []string{"-f qcow2 --shrink IMAGE 0", "-f qcow2 --shrink IMAGE -5M", "-f qcow2 --shrink IMAGE -8M"}},
		{"to no sectors", []string{"-f qcow2 IMAGE +100", "-f qcow2 IMAGE 6000001"}},
		{"no mode", []string{"-f qcow2 --preallocation=some IMAGE 7M"}},
		{"no size", []string{"-f qcow2 IMAGE", "-f qcow2 IMAGE much"}},
		{"no file", []string{"-f qcow2 nothing 7M"}},
		{"raw", []string{"-f raw IMAGE 7M", "-f raw IMAGE 6M", "-f raw --shrink IMAGE 6M"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inTempDir(t)
			for _, name := range []string{"ours", "theirs"} {
				qemutest.Img(t, "create", "-q", "-f", "qcow2", name, "5M")
				qemutest.IO(t, name, "write -P 1 0 3M", "write -P 2 4M 1M")
			}
			for _, line := range tt.lines {
				args := func(name string) []string {
					return append([]string{"resize"}, strings.Fields(strings.ReplaceAll(line, "IMAGE", name))...)
				}
				stdout, stderr, exit := tool(args("ours")...)
				wantOut, wantExit := qemutest.ImgExit(t, args("theirs")...)
				wantOut = strings.ReplaceAll(wantOut, "theirs", "ours")
				if exit != wantExit || exit == 0 && stdout != wantOut {
					t.Fatalf("%s: exit %d, want %d\n%s%s\nwant:\n%s", line, exit, wantExit, stdout, stderr, wantOut)
				}
			}
			format := "qcow2"
			if tt.name == "raw" {
				format = "raw"
			} else {
				qemutest.CheckClean(t, "ours")
			}
			qemutest.Compare(t, "ours", format, "theirs", format)
			if ours, theirs := qemutest.Info(t, "ours")["virtual-size"], qemutest.Info(t, "theirs")["virtual-size"]; ours != theirs {
				t.Errorf("size %v, want %v", ours, theirs)
			}
		})
	}
}
