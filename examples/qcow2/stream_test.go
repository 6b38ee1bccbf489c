package main

import (
	"os"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// TestConvertToStdout writes images to standard output, for qemu-img to check and compare. Raw goes into files only.
func TestConvertToStdout(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	writeDisk(t, "disk", 5<<20+512)
	for _, args := range [][]string{
		{},
		{"-c"},
		{"-S", "4k"},
		{"-c", "-o", "compression_type=zstd,cluster_size=4k"},
		{"-o", "compat=0.10", "-p"},
	} {
		stdout := mustTool(t, append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), "disk", "-")...)
		if err := os.WriteFile("image", []byte(stdout), 0o600); err != nil {
			t.Fatal(err)
		}
		if !qemutest.CheckClean(t, "image") || !qemutest.Compare(t, "disk", "raw", "image", "qcow2") {
			t.Errorf("convert %q", args)
		}
		if c := qemutest.Check(t, "image"); (c.CompressedClusters > 0) != (len(args) > 0 && args[0] == "-c") {
			t.Errorf("convert %q: %d compressed clusters", args, c.CompressedClusters)
		}
	}
	for _, args := range [][]string{
		{"convert", "-f", "raw", "disk", "-"},
		{"convert", "-f", "raw", "-O", "qcow2", "-o", "preallocation=full", "disk", "-"},
		{"convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=x", "disk", "-"},
	} {
		if stdout, stderr, exit := tool(args...); exit != 1 || stdout != "" || stderr == "" {
			t.Errorf("qcow2 %q: exit %d, %d bytes, %q", args, exit, len(stdout), stderr)
		}
	}
	for _, name := range []string{"-", "x"} {
		if _, err := os.Stat(name); err == nil {
			t.Errorf("there is a file %q", name)
		}
	}
}
