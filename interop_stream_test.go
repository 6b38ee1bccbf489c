package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// streamInteropSources makes sources of every kind, with what each reads as.
func streamInteropSources(t *testing.T, size int64) map[string]Disk {
	t.Helper()
	rng := rand.New(rand.NewPCG(21, 1))
	content := newStreamDisk(rng, size, 64<<10, 0).content
	sources := map[string]Disk{"raw": newTestRaw(t, content)}

	base, err := CreateStorage(NewMemoryStorage(), size-100*512, nil)
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, base, content[:1<<20], 0)
	if err := base.WriteCompressed(content[1<<20:2<<20], 1<<20); err != nil {
		t.Fatal(err)
	}
	top, err := CreateStorage(NewMemoryStorage(), size, &CreateOptions{
		ClusterSize: 16 << 10, ExtendedL2: true, BackingFile: "base", BackingFormat: "qcow2", Open: &OpenOptions{Backing: base},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, img := range []*Image{top, base} {
			if err := img.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	mustWrite(t, top, content[700_000:900_000], 700_000)
	sources["chain"] = top

	img, err := CreateStorage(NewMemoryStorage(), size, nil)
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, img, content[:size/2], 0)
	if _, err := img.CreateSnapshot(context.Background(), &SnapshotOptions{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, img, pattern(4, 1<<20), 0)
	snap, err := img.OpenSnapshot(SnapshotRef{Name: "s"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := snap.Close(); err != nil {
			t.Error(err)
		}
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	})
	sources["snapshot"] = snap
	return sources
}

// TestInteropStream has QEMU check and compare streams, each through a pipe, of every kind of source, with and without
// compression, of every refcount width and both versions.
func TestInteropStream(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	const size = 3<<20 + 512*3
	ran, stride := 0, 2
	if testing.Short() {
		stride = 4
	}
	for name, src := range streamInteropSources(t, size) {
		raw := filepath.Join(dir, name+".raw")
		if err := os.WriteFile(raw, readDisk(t, src), 0o600); err != nil {
			t.Fatal(err)
		}
		for i, mode := range streamModes {
			for j, c := range []CreateOptions{
				{},
				{Version: 2, ClusterSize: 4096},
				{ClusterSize: 512, RefcountBits: 64},
				{ClusterSize: 512, RefcountBits: 1},
				{ClusterSize: 2 << 20, RefcountBits: 8},
				{ClusterSize: 16 << 10, RefcountBits: 2, ExtendedL2: true},
				{ClusterSize: 1024, RefcountBits: 4, LazyRefcounts: true},
				{RefcountBits: 32},
			} {
				if (i+j)%stride != len(name)%stride {
					continue
				}
				o := &StreamOptions{Create: &c}
				mode.set(o)
				path := filepath.Join(dir, fmt.Sprintf("%s-%s-%d.qcow2", name, mode.name, j))
				streamToFile(t, path, src, o)
				if !qemutest.CheckClean(t, path) || !qemutest.Compare(t, raw, "raw", path, "qcow2") {
					t.Fatalf("%s, %s, %+v", name, mode.name, c)
				}
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				ran++
			}
		}
	}
	t.Logf("%d streams", ran)
}

// streamToFile writes the stream of src to a file, through a pipe.
func streamToFile(t *testing.T, path string, src Disk, o *StreamOptions) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	go func() {
		_, err := WriteStream(context.Background(), w, src, o)
		w.CloseWithError(err)
	}()
	if _, err := io.Copy(f, r); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestInteropStreamBacking streams the upper layer of a chain, whose backing file QEMU then opens by the name in the
// stream.
func TestInteropStreamBacking(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	for i, mode := range streamModes {
		for _, version := range []int{2, 3} {
			d := newStreamDisk(rand.New(rand.NewPCG(22, uint64(i))), 2<<20, 4096, 1)
			o := &StreamOptions{Create: &CreateOptions{Version: version, ClusterSize: 4096, BackingFile: "below", BackingFormat: "raw"}, SharedDepth: 1}
			mode.set(o)
			names := []string{filepath.Join(dir, "below"), filepath.Join(dir, "disk"), filepath.Join(dir, "top.qcow2")}
			for k, p := range [][]byte{d.below, d.content, streamed(t, d, o)} {
				if err := os.WriteFile(names[k], p, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			qemutest.CheckClean(t, names[2])
			qemutest.Compare(t, names[1], "raw", names[2], "qcow2")
			if bytes.Equal(d.below, d.content) {
				t.Error("nothing is hidden")
			}
		}
	}
}
