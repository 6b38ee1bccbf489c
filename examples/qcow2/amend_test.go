package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// TestAmendRebase runs command lines on an image that qemu-img made, and the same with qemu-img on a copy: both succeed
// or both refuse, and qemu-img says the same of the two images.
func TestAmendRebase(t *testing.T) {
	qemutest.Require(t)
	tests := []struct {
		name   string
		create []string // arguments of qemu-img create, but the file and the size
		args   []string // the command line; FILE is the image
	}{
		{"to version 2", nil, []string{"amend", "-f", "qcow2", "-o", "compat=0.10", "FILE"}},
		{"to version 3", []string{"-o", "compat=0.10"}, []string{"amend", "-f", "qcow2", "-o", "compat=v3,lazy_refcounts=on", "FILE"}},
		{"widths", nil, []string{"amend", "-q", "-f", "qcow2", "-o", "refcount_bits=64", "FILE"}},
		{"both", []string{"-o", "refcount_bits=8"}, []string{"amend", "-f", "qcow2", "-o", "compat=0.10,refcount_bits=16", "FILE"}},
		{"two lists", nil, []string{"amend", "-p", "-f", "qcow2", "-o", "refcount_bits=1", "-o", "lazy_refcounts=on", "FILE"}},
		{"same backing", []string{"-b", "base", "-F", "raw"}, []string{"amend", "-f", "qcow2", "-o", "backing_file=base,backing_fmt=raw", "FILE"}},
		{"data file", []string{"-o", "data_file=data,data_file_raw=on"}, []string{"amend", "-f", "qcow2", "-o", "data_file_raw=off", "FILE"}},
		{"larger, to version 2", nil, []string{"amend", "-f", "qcow2", "-o", "size=5M,compat=0.10", "FILE"}},
		{"larger, to version 3", []string{"-o", "compat=0.10"}, []string{"amend", "-f", "qcow2", "-o", "compat=1.1,size=5M", "FILE"}},
		{"larger over a backing file", []string{"-b", "other", "-F", "qcow2"}, []string{"amend", "-f", "qcow2", "-o", "size=3M", "FILE"}},
		{"smaller", nil, []string{"amend", "-f", "qcow2", "-o", "size=1M", "FILE"}},
		{"the same size", nil, []string{"amend", "-f", "qcow2", "-o", "size=0", "FILE"}},
		{"refused: size", nil, []string{"amend", "-f", "qcow2", "-o", "size=1000", "FILE"}},
		{"refused: version 2", []string{"-o", "extended_l2=on"}, []string{"amend", "-f", "qcow2", "-o", "compat=0.10", "FILE"}},
		{"refused: backing", nil, []string{"amend", "-f", "qcow2", "-o", "backing_file=base", "FILE"}},
		{"refused: raw", []string{"-o", "data_file=data"}, []string{"amend", "-f", "qcow2", "-o", "data_file_raw=on", "FILE"}},
		{"refused: create only", nil, []string{"amend", "-f", "qcow2", "-o", "cluster_size=4k", "FILE"}},
		{"refused: width", nil, []string{"amend", "-f", "qcow2", "-o", "refcount_bits=3", "FILE"}},
		{"refused: unknown", nil, []string{"amend", "-f", "qcow2", "-o", "nothing=1", "FILE"}},
		{"refused: no options", nil, []string{"amend", "-f", "qcow2", "FILE"}},
		{"refused: not there", nil, []string{"amend", "-f", "qcow2", "-o", "compat=v2", "FILE.gone"}},
		{"rebase", []string{"-b", "base", "-F", "raw"}, []string{"rebase", "-f", "qcow2", "-b", "other", "-F", "qcow2", "FILE"}},
		{"rebase with progress", []string{"-b", "base", "-F", "raw"}, []string{"rebase", "-p", "-q", "-f", "qcow2", "-b", "other", "-F", "qcow2", "FILE"}},
		{"rebase to nothing", []string{"-b", "base", "-F", "raw"}, []string{"rebase", "-f", "qcow2", "-b", "", "FILE"}},
		{"rebase by name", []string{"-b", "base", "-F", "raw"}, []string{"rebase", "-f", "qcow2", "-u", "-b", "other", "-F", "qcow2", "FILE"}},
		{"rebase by name to nothing", []string{"-b", "base", "-F", "raw"}, []string{"rebase", "-f", "qcow2", "-u", "-F", "raw", "FILE"}},
		{"refused: no name", []string{"-b", "base", "-F", "raw"}, []string{"rebase", "-f", "qcow2", "FILE"}},
		{"refused: no format", []string{"-b", "base", "-F", "raw"}, []string{"rebase", "-f", "qcow2", "-u", "-b", "other", "FILE"}},
		{"refused: unknown format", []string{"-b", "base", "-F", "raw"}, []string{"rebase", "-f", "qcow2", "-u", "-b", "other", "-F", "x", "FILE"}},
		{"refused: backing not there", []string{"-b", "base", "-F", "raw"}, []string{"rebase", "-f", "qcow2", "-b", "gone", "-F", "raw", "FILE"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inTempDir(t)
			writeDisk(t, "base", 1<<20)
			qemutest.Img(t, "create", "-q", "-f", "qcow2", "other", "3M")
			qemutest.IO(t, "other", "write -P 3 500k 1M")
			for _, name := range []string{"theirs", "ours"} {
				args := append([]string{"create", "-q", "-f", "qcow2"}, tt.create...)
				for i := range args {
					args[i] = strings.ReplaceAll(args[i], "data_file=data", "data_file="+name+".data")
				}
				qemutest.Img(t, append(args, name, "2M")...)
				qemutest.IO(t, name, "write -P 1 0 100k", "write -P 2 1M 64k")
			}
			line := func(name string) (a []string) {
				for _, s := range tt.args {
					a = append(a, strings.ReplaceAll(s, "FILE", name))
				}
				return a
			}
			_, want := qemutest.ImgExit(t, line("theirs")...)
			_, stderr, got := tool(line("ours")...)
			if got != want {
				t.Errorf("exit code %d, of qemu-img %d: %s", got, want, stderr)
			}
			if refused := strings.HasPrefix(tt.name, "refused"); refused != (got != 0) {
				t.Errorf("exit code %d: %s", got, stderr)
			}
			if got == 0 {
				qemutest.CheckClean(t, "ours")
				qemutest.Compare(t, "theirs", "qcow2", "ours", "qcow2")
			}
			info := func(name string) any {
				s := qemutest.Img(t, "info", "-U", "-f", "qcow2", "--output=json", name)
				m := decode(t, strings.ReplaceAll(s, name, "IMAGE")).(map[string]any)
				delete(m, "actual-size")
				return m
			}
			if diff := cmp.Diff(info("theirs"), info("ours")); diff != "" {
				t.Errorf("qemu-img info (-its own +ours):\n%s", diff)
			}
		})
	}
}
