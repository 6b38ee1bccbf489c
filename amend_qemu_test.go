package qcow2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// amendImages are images that QEMU makes for the tests of Amend and Rebase: the options of qemu-img create, and what
// qemu-io and "qemu-img snapshot" do with it, in order. A command that begins with "snapshot" takes one.
var amendImages = []struct {
	name    string
	options string
	backing bool
	do      []string
}{
	{"plain", "cluster_size=4096", false, []string{"write -P 1 0 300k", "write -P 2 1M 64k", "write -c -P 3 2M 4k"}},
	{"version 2", "cluster_size=4096,compat=0.10", false, []string{"write -P 1 0 300k", "snapshot one", "write -P 2 100k 64k", "write -P 4 3M 100k"}},
	{"version 2 overlay", "cluster_size=512,compat=0.10", true, []string{"write -P 1 0 30k", "write -P 2 100k 64k"}},
	{"zeros", "cluster_size=4096", false, []string{"write -P 1 0 300k", "write -z 16k 64k", "write -z -u 128k 64k", "write -z 2M 40k"}},
	{"zeros over base", "cluster_size=4096", true, []string{"write -P 1 0 300k", "write -z 16k 64k", "write -z -u 128k 64k", "write -z 2M 40k", "write -z 3M 1M"}},
	{"zeros in snapshots", "cluster_size=4096", true, []string{
		"write -P 1 0 300k", "write -z 16k 64k", "write -z -u 128k 64k", "snapshot one", "write -z 2M 40k", "write -P 5 20k 4k",
		"snapshot two", "write -z 0 40k", "write -z 200k 4k", "write -P 7 132k 20k", "snapshot three", "write -z -u 0 8M"}},
	{"one bit", "cluster_size=512,refcount_bits=1", false, []string{"write -P 1 0 300k", "write -P 2 1M 64k"}},
	{"wide", "cluster_size=512,refcount_bits=64", false, []string{"write -P 1 0 3000k", "snapshot one", "write -P 2 1M 64k"}},
	{"lazy", "cluster_size=4096,lazy_refcounts=on", true, []string{"write -P 1 0 300k", "write -P 2 1M 64k"}},
	{"extended", "cluster_size=16k,extended_l2=on", true, []string{"write -P 1 0 300k", "write -z 16k 2k", "write -P 2 1M 2k"}},
	{"large clusters", "cluster_size=64k", true, []string{"write -P 1 0 300k", "write -z 2M 2M"}},
}

// amendSize is the size of the disks.
const amendSize = "8M"

// makeAmendImage makes image i of amendImages in dir, with its base, and returns its path.
func makeAmendImage(t *testing.T, dir string, i int) string {
	t.Helper()
	im := amendImages[i]
	path := filepath.Join(dir, "image.qcow2")
	args := []string{"create", "-q", "-f", "qcow2", "-o", im.options}
	if im.backing {
		qemutest.Img(t, "create", "-q", "-f", "raw", filepath.Join(dir, "base"), "5M")
		qemutest.IOWith(t, qemutest.IOOptions{Format: "raw"}, filepath.Join(dir, "base"), "write -P 9 0 5M", "write -P 8 2M 100k")
		args = append(args, "-b", "base", "-F", "raw")
	}
	qemutest.Img(t, append(args, path, amendSize)...)
	for _, cmd := range im.do {
		if name, ok := strings.CutPrefix(cmd, "snapshot "); ok {
			qemutest.Img(t, "snapshot", "-c", name, path)
		} else {
			qemutest.IO(t, path, cmd)
		}
	}
	return path
}

// copyImage copies a file to another name in its directory.
func copyImage(t *testing.T, path, name string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(filepath.Dir(path), name)
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return to
}

// openBeside opens an image for writing, with the files beside it.
func openBeside(t *testing.T, path string) *Image {
	t.Helper()
	img, err := Open(path, &OpenOptions{ReadWrite: true, Resolver: ResolveBeside(filepath.Dir(path))})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// sameInfo compares what qemu-img info says about two images, but for their names, sizes on the host, and when
// snapshots were taken.
func sameInfo(t *testing.T, want, got string) {
	t.Helper()
	read := func(path string) map[string]any {
		info := qemutest.Info(t, path)
		delete(info, "filename")
		delete(info, "actual-size")
		return info
	}
	if diff := cmp.Diff(read(want), read(got)); diff != "" {
		t.Errorf("qemu-img info (-qemu +we):\n%s", diff)
	}
}

// sameSnapshots compares the content of the snapshots of two images.
func sameSnapshots(t *testing.T, want, got string) {
	t.Helper()
	list, _ := qemutest.Info(t, want)["snapshots"].([]any)
	for i := range list {
		a, b := want+".snap", got+".snap"
		for _, c := range [][2]string{{want, a}, {got, b}} {
			qemutest.Img(t, "convert", "-f", "qcow2", "-O", "raw", "-l", fmt.Sprintf("snapshot.id=%d", i+1), c[0], c[1])
		}
		qemutest.Compare(t, a, "raw", b, "raw")
	}
}

// TestAmendQEMU amends images that QEMU made as qemu-img amend does: QEMU finds the result clean, with the same
// content in the disk and in every snapshot, and says the same of it; or both refuse.
func TestAmendQEMU(t *testing.T) {
	qemutest.Require(t)
	on, off := true, false
	amends := []struct {
		options string
		ours    AmendOptions
	}{
		{"compat=0.10", AmendOptions{Version: 2}},
		{"compat=1.1", AmendOptions{Version: 3}},
		{"compat=0.10,refcount_bits=16", AmendOptions{Version: 2, RefcountBits: 16}},
		{"compat=1.1,refcount_bits=8,lazy_refcounts=on", AmendOptions{Version: 3, RefcountBits: 8, LazyRefcounts: &on}},
		{"refcount_bits=1", AmendOptions{RefcountBits: 1}},
		{"refcount_bits=2", AmendOptions{RefcountBits: 2}},
		{"refcount_bits=64", AmendOptions{RefcountBits: 64}},
		{"lazy_refcounts=on", AmendOptions{LazyRefcounts: &on}},
		{"lazy_refcounts=off", AmendOptions{LazyRefcounts: &off}},
	}
	for i, im := range amendImages {
		t.Run(im.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := makeAmendImage(t, dir, i)
			for j, a := range amends {
				if os.Getenv(crashStatesEnv) == "" && (2*i+j)%5 != 0 && !(j == 0 && strings.HasPrefix(im.name, "zeros")) {
					continue // all of them in the long run
				}
				theirs, ours := copyImage(t, path, "theirs"), copyImage(t, path, "ours")
				qemutest.Dump(t, ours)
				_, exit := qemutest.ImgExit(t, "amend", "-f", "qcow2", "-o", a.options, theirs)
				img := openBeside(t, ours)
				err := img.Amend(context.Background(), &a.ours)
				if (exit == 0) != (err == nil) {
					t.Errorf("%s: qemu-img exits with %d, our error is %v", a.options, exit, err)
				}
				if err != nil && !errors.Is(err, ErrOption) && !errors.Is(err, ErrTooLarge) {
					t.Errorf("%s: %v", a.options, err)
				}
				// The image goes on as what it is now.
				if _, err := img.WriteAt([]byte("still in use"), 5<<20); err != nil {
					t.Errorf("%s: write afterwards: %v", a.options, err)
				}
				if info := img.Info(); err == nil && a.ours.Version != 0 && info.Version != a.ours.Version {
					t.Errorf("%s: Info says version %d", a.options, info.Version)
				}
				if err := img.Close(); err != nil {
					t.Errorf("%s: close: %v", a.options, err)
				}
				if exit != 0 {
					theirs = copyImage(t, path, "theirs")
				}
				qemutest.CheckClean(t, ours)
				sameInfo(t, theirs, ours)
				img = openBeside(t, ours)
				if _, err := img.WriteAt(make([]byte, 12), 5<<20); err != nil {
					t.Error(err)
				}
				if err := img.Close(); err != nil {
					t.Error(err)
				}
				qemutest.Compare(t, path, "qcow2", ours, "qcow2")
				sameSnapshots(t, path, ours)
				if t.Failed() {
					t.Fatalf("after %s", a.options)
				}
			}
		})
	}
}
