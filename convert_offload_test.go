package qcow2

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// TestConvertOffload has the host copy, from raw files, images, what lies below them and snapshots, to both formats. The
// output is that of a copy by reading and writing, to the byte.
func TestConvertOffload(t *testing.T) {
	dir := t.TempDir()
	content := convertContent(6, 3<<20+1000)
	base := filepath.Join(dir, "base")
	raw := newRawFile(t, base, content, os.O_RDONLY)
	overlay := filepath.Join(dir, "overlay")
	img, err := Create(overlay, 4<<20, &CreateOptions{ClusterSize: 4096, Open: &OpenOptions{Backing: raw}})
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, img, convertContent(7, 300_000), 700_001)
	createSnapshot(t, img, "one")
	mustWrite(t, img, convertContent(8, 300_000), 900_001)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if img, err = Open(overlay, &OpenOptions{Backing: raw}); err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	snap, err := img.OpenSnapshot(SnapshotRef{Name: "one"})
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()

	sources := map[string]Disk{"raw": raw, "image": img, "snapshot": snap}
	for name, src := range sources {
		for _, sparse := range []int{-1, 0, 64 << 10} {
			for _, create := range []*CreateOptions{nil, {}, {ExtendedL2: true}, {ClusterSize: 2 << 20}} {
				t.Run(fmt.Sprintf("%s/sparse=%d/%+v", name, sparse, create != nil), func(t *testing.T) {
					var out [2][]byte
					for k, wrapped := range []bool{false, true} {
						c := &converter{src: src, total: src.Size(), opts: ConvertOptions{SparseSize: sparse}}
						file := filepath.Join(t.TempDir(), "out")
						s, err := OpenFileStorage(file, os.O_RDWR|os.O_CREATE, 0o600)
						if err != nil {
							t.Fatal(err)
						}
						defer s.Close()
						target := Storage(s)
						if wrapped {
							target = struct{ Storage }{s}
						}
						if create != nil {
							dst, err := CreateStorage(target, src.Size(), create)
							if err != nil {
								t.Fatal(err)
							}
							defer dst.Close()
							c.dst = dst
						} else {
							if err := s.Truncate(src.Size()); err != nil {
								t.Fatal(err)
							}
							if c.dst, err = NewRawDisk(target); err != nil {
								t.Fatal(err)
							}
						}
						if err := c.prepare(); err != nil {
							t.Fatal(err)
						}
						if err := c.run(t.Context()); err != nil {
							t.Fatal(err)
						}
						if want := !wrapped && (sparse != 0 || create != nil); c.offload != want {
							t.Errorf("the host is asked: %t, want %t", c.offload, want)
						}
						if c.noOffload.Load() && runtime.GOOS == "linux" {
							t.Log("this file system does not copy")
						}
						want, err := readWholeDisk(src)
						if err != nil {
							t.Fatal(err)
						}
						expectContent(t, c.dst, want)
						if out[k], err = os.ReadFile(file); err != nil {
							t.Fatal(err)
						}
					}
					if !bytes.Equal(out[0], out[1]) {
						t.Error("other bytes than by reading and writing")
					}
				})
			}
		}
	}
	// An image that may be written meanwhile is read.
	live, err := Create(filepath.Join(dir, "live"), 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	if sourceFile(live, 0) != nil {
		t.Error("a host offset of an image that is open for writing is relied on")
	}
}
