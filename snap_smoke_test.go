package qcow2

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

func TestSmokeSnap(t *testing.T) {
	ctx := context.Background()
	name := filepath.Join(t.TempDir(), "a.qcow2")
	img, err := Create(name, 8<<20, &CreateOptions{ClusterSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	old := bytes.Repeat([]byte{1}, 1<<20)
	img.WriteAt(old, 0)
	s, err := img.CreateSnapshot(ctx, &SnapshotOptions{Name: "x", VMState: bytes.NewReader(old), VMStateSize: 12345})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", s)
	img.WriteAt(bytes.Repeat([]byte{2}, 1<<19), 1<<18)
	d, err := img.OpenSnapshot(SnapshotRef{ID: "1"})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1<<20)
	d.ReadAt(got, 0)
	if !bytes.Equal(got, old) {
		t.Error("differs")
	}
	got = make([]byte, 12345)
	if _, err := d.VMState().ReadAt(got, 0); err != nil || !bytes.Equal(got, old[:12345]) {
		t.Error("state", err)
	}
	t.Log(img.DeleteSnapshot(ctx, SnapshotRef{Name: "x"}))
	d.Close()
	img.Sync()
	if r := qemutest.Check(t, name, "-U"); !r.Clean() {
		t.Error(r.Output)
	}
	if err := checkList(img); err != nil {
		t.Error(err)
	}
	if err := img.ApplySnapshot(ctx, SnapshotRef{Name: "x"}); err != nil {
		t.Error(err)
	}
	got = make([]byte, 1<<20)
	img.ReadAt(got, 0)
	if !bytes.Equal(got, old) {
		t.Error("differs")
	}
	img.WriteAt(bytes.Repeat([]byte{2}, 1<<19), 1<<18)
	img.Sync()
	if r := qemutest.Check(t, name, "-U"); !r.Clean() {
		t.Error(r.Output)
	}
	if err := checkList(img); err != nil {
		t.Error(err)
	}
	if err := img.RenameSnapshot(SnapshotRef{Name: "x"}, "yyy"); err != nil {
		t.Error(err)
	}
	if err := img.DeleteSnapshot(ctx, SnapshotRef{Name: "yyy"}); err != nil {
		t.Error(err)
	}
	if err := checkList(img); err != nil {
		t.Error(err)
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
	if r := qemutest.Check(t, name); !r.Clean() {
		t.Error(r.Output)
	}
	t.Log(qemutest.Info(t, name))
}
