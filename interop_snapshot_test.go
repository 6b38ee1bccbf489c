package qcow2_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// TestInteropSnapshots has QEMU and the library create, list, read, apply and delete each other's snapshots, and QEMU
// check the image after each step.
func TestInteropSnapshots(t *testing.T) {
	qemutest.Require(t)
	for _, options := range []string{
		"compat=v2,cluster_size=512", "compat=v2", "refcount_bits=4,cluster_size=4096", "refcount_bits=8", "refcount_bits=64,cluster_size=512",
		"cluster_size=2M,refcount_bits=32", "extended_l2=on,cluster_size=16k", "lazy_refcounts=on,cluster_size=1k", "compression_type=zstd,refcount_bits=16",
	} {
		t.Run(options, func(t *testing.T) {
			t.Parallel()
			testInteropSnapshots(t, options)
		})
	}
}

// snapshotFields are what qemu-img info tells of a snapshot.
type snapshotFields struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Sec     int64  `json:"date-sec"`
	Nsec    int64  `json:"date-nsec"`
	VMSec   int64  `json:"vm-clock-sec"`
	VMNsec  int64  `json:"vm-clock-nsec"`
	VMState int64  `json:"vm-state-size"`
	ICount  *int64 `json:"icount"`
}

// expectSnapshots compares the snapshots that the library lists with those that QEMU lists, field by field, and has
// QEMU check the image, unless its counts are not on disk yet.
func expectSnapshots(t *testing.T, img *qcow2.Image, path string) {
	t.Helper()
	var info struct{ Snapshots []snapshotFields }
	if err := json.Unmarshal([]byte(qemutest.Img(t, "info", "-U", "-f", "qcow2", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	var got []snapshotFields
	for _, s := range img.Snapshots() {
		f := snapshotFields{ID: s.ID, Name: s.Name, Sec: s.Date.Unix(), Nsec: int64(s.Date.Nanosecond()),
			VMSec: int64(s.VMClock / time.Second), VMNsec: int64(s.VMClock % time.Second), VMState: s.VMStateSize}
		if s.ICount >= 0 {
			f.ICount = &s.ICount
		}
		got = append(got, f)
	}
	if diff := cmp.Diff(info.Snapshots, got); diff != "" {
		t.Errorf("snapshots (-QEMU +ours):\n%s", diff)
	}
	if img.Info().LazyRefcounts {
		return
	}
	if r := qemutest.Check(t, path, "-U"); !r.Clean() {
		t.Errorf("qemu-img check: %s", r.Output)
	}
}

// testInteropSnapshots is TestInteropSnapshots with an image of the given options.
func testInteropSnapshots(t *testing.T, options string) {
	ctx := context.Background()
	const size = 1 << 20
	dir := t.TempDir()
	path := filepath.Join(dir, "image.qcow2")
	want := map[string][]byte{"": bytes.Repeat([]byte{1}, size)}
	keep := func(name string) { want[name] = bytes.Clone(want[""]) }
	write := func(b byte, off, n int) { copy(want[""][off:], bytes.Repeat([]byte{b}, n)) }

	qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size))
	qemutest.IO(t, path, "write -P 1 0 1M")
	qemutest.Img(t, "snapshot", "-c", "theirs", path)
	keep("theirs")
	qemutest.IO(t, path, "write -P 2 100k 300k")
	write(2, 100<<10, 300<<10)

	img := open(t, path, &qcow2.OpenOptions{ReadWrite: true})
	step := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if err := img.Sync(); err != nil {
			t.Fatal(err)
		}
		expectDisk(t, img, want[""])
		expectSnapshots(t, img, path)
		for _, s := range img.Snapshots() {
			d, err := img.OpenSnapshot(qcow2.SnapshotRef{Name: s.Name})
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
			if err != nil || !bytes.Equal(got, want[s.Name]) {
				t.Errorf("%s: snapshot %s reads otherwise, error %v", what, s.Name, err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	step("open", nil)
	writeAt(t, img, bytes.Repeat([]byte{3}, 70_000), 300<<10)
	write(3, 300<<10, 70_000)
	state := bytes.Repeat([]byte("state"), 20_000)
	_, err := img.CreateSnapshot(ctx, &qcow2.SnapshotOptions{Name: "ours", VMClock: 3725*time.Second + 7, ICount: 1234567,
		Date: time.Unix(1700000000, 123456789), VMState: bytes.NewReader(state), VMStateSize: int64(len(state))})
	keep("ours")
	step("create", err)
	writeAt(t, img, bytes.Repeat([]byte{4}, size), 0)
	write(4, 0, size)
	step("write", nil)
	step("apply theirs", func() error {
		copy(want[""], want["theirs"])
		return img.ApplySnapshot(ctx, qcow2.SnapshotRef{IDOrName: "theirs"})
	}())
	writeAt(t, img, bytes.Repeat([]byte{5}, 1000), 500)
	write(5, 500, 1000)
	step("write", nil)
	_, err = img.CreateSnapshot(ctx, &qcow2.SnapshotOptions{Name: "third", ICount: -1})
	keep("third")
	step("create", err)
	closeImage(t, img)

	expectConverted(t, path, want[""])
	for name, content := range want {
		if name == "" {
			continue
		}
		raw := filepath.Join(dir, "raw")
		qemutest.Img(t, "convert", "-l", "snapshot.name="+name, "-f", "qcow2", "-O", "raw", path, raw)
		if !bytes.Equal(readFile(t, raw), content) {
			t.Errorf("QEMU reads snapshot %s otherwise", name)
		}
	}
	// QEMU takes the VM state into the disk's address space with an apply, and out of it with the snapshot.
	qemutest.Img(t, "snapshot", "-a", "ours", path)
	qemutest.CheckClean(t, path)
	expectConverted(t, path, want["ours"])
	qemutest.IO(t, path, "write -P 6 0 64k")
	copy(want[""], want["ours"])
	write(6, 0, 64<<10)
	qemutest.Img(t, "snapshot", "-d", "third", path)
	delete(want, "third")
	qemutest.CheckClean(t, path)

	img = open(t, path, &qcow2.OpenOptions{ReadWrite: true})
	step("open again", nil)
	d, err := img.OpenSnapshot(qcow2.SnapshotRef{Name: "ours"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(d.VMState()); err != nil || !bytes.Equal(got, state) {
		t.Errorf("the VM state reads otherwise, error %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	_, err = img.CreateSnapshot(ctx, &qcow2.SnapshotOptions{Name: "fourth"})
	keep("fourth")
	step("create", err)
	for _, name := range []string{"theirs", "ours"} {
		delete(want, name)
		step("delete "+name, img.DeleteSnapshot(ctx, qcow2.SnapshotRef{Name: name}))
	}
	step("rename", img.RenameSnapshot(qcow2.SnapshotRef{Name: "fourth"}, "fourth"))
	closeImage(t, img)
	qemutest.Img(t, "snapshot", "-d", "fourth", path)
	qemutest.CheckClean(t, path)
	expectConverted(t, path, want[""])
}

// TestInteropSnapshotSizes applies snapshots of disks of other sizes, made by QEMU, and has QEMU apply ours.
func TestInteropSnapshotSizes(t *testing.T) {
	qemutest.Require(t)
	ctx := context.Background()
	for _, cluster := range []int{512, 64 << 10} {
		path := filepath.Join(t.TempDir(), "image.qcow2")
		qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", cluster), path, "1M")
		qemutest.IO(t, path, "write -P 1 0 1M")
		qemutest.Img(t, "snapshot", "-c", "small", path)
		qemutest.Img(t, "resize", "-q", "-f", "qcow2", path, "3M")
		qemutest.IO(t, path, "write -P 2 512k 2M")
		qemutest.Img(t, "snapshot", "-c", "large", path)
		small := bytes.Repeat([]byte{1}, 1<<20)
		large := make([]byte, 3<<20)
		copy(large, small)
		copy(large[512<<10:], bytes.Repeat([]byte{2}, 2<<20))

		img := open(t, path, &qcow2.OpenOptions{ReadWrite: true})
		for _, want := range []struct {
			name    string
			content []byte
		}{{"small", small}, {"large", large}, {"small", small}} {
			if err := img.ApplySnapshot(ctx, qcow2.SnapshotRef{Name: want.name}); err != nil {
				t.Fatal(err)
			}
			expectDisk(t, img, want.content)
			if info := img.Info(); info.VirtualSize != int64(len(want.content)) {
				t.Errorf("Info tells of a disk of %d bytes", info.VirtualSize)
			}
			if _, err := img.WriteAt([]byte{1}, int64(len(want.content))); !errors.Is(err, qcow2.ErrRange) {
				t.Errorf("write past the end: %v", err)
			}
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
			expectSnapshots(t, img, path)
		}
		if _, err := img.CreateSnapshot(ctx, &qcow2.SnapshotOptions{Name: "ours"}); err != nil {
			t.Fatal(err)
		}
		closeImage(t, img)
		qemutest.Img(t, "snapshot", "-a", "large", path)
		expectConverted(t, path, large)
		qemutest.Img(t, "snapshot", "-a", "ours", path)
		expectConverted(t, path, small)
		qemutest.CheckClean(t, path)
	}
}

// TestInteropSnapshotBitmaps applies and deletes snapshots of an image with a persistent bitmap: an apply marks it as in
// use, since it does not know what changed, and nothing else touches it.
func TestInteropSnapshotBitmaps(t *testing.T) {
	qemutest.Require(t)
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "image.qcow2")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", path, "1M")
	qemutest.IO(t, path, "write -P 1 0 1M")
	qemutest.Img(t, "bitmap", "--add", "-f", "qcow2", path, "changes")
	img := open(t, path, &qcow2.OpenOptions{ReadWrite: true})
	if _, err := img.CreateSnapshot(ctx, &qcow2.SnapshotOptions{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	closeImage(t, img)
	flags := func() string { return strings.Join(bitmapFlags(t, path)["changes"], " ") }
	if got := flags(); got != "auto" {
		t.Errorf("after the snapshot was created the bitmap is %q", got)
	}
	qemutest.CheckClean(t, path)
	img = open(t, path, &qcow2.OpenOptions{ReadWrite: true})
	if err := img.ApplySnapshot(ctx, qcow2.SnapshotRef{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	closeImage(t, img)
	if got := flags(); !strings.Contains(got, "in-use") {
		t.Errorf("after the snapshot was applied the bitmap is %q", got)
	}
	qemutest.CheckClean(t, path)
}
