package qcow2

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestRebaseShared rebases between chains of files that have parts in common, each of its own size and clusters: the image
// keeps its content.
func TestRebaseShared(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	sector := func(n int64) int64 { return (rng.Int64N(n) + n) &^ 511 }
	for round := range 15 {
		dir := t.TempDir()
		raw := make([]byte, sector(1<<20))
		content(raw[len(raw)/4:len(raw)/2], 5)
		content(raw[len(raw)*3/4:], 6)
		if err := os.WriteFile(filepath.Join(dir, "raw"), raw, 0o666); err != nil {
			t.Fatal(err)
		}
		create := func(name, on string) *Image {
			format := "qcow2"
			if on == "raw" {
				format = "raw"
			}
			o := &CreateOptions{BackingFile: on, BackingFormat: format, ClusterSize: 512 << rng.IntN(8), Open: &OpenOptions{Resolver: ResolveBeside(dir)}}
			if o.ClusterSize >= 16<<10 {
				o.ExtendedL2 = rng.IntN(2) == 0
			}
			img, err := Create(filepath.Join(dir, name), sector(1<<20), o)
			if err != nil {
				t.Fatal(err)
			}
			scribble(t, img, rng, 1+rng.IntN(6))
			return img
		}
		for _, f := range [][2]string{{"a", "raw"}, {"b", "raw"}, {"aa", "a"}, {"ab", "a"}, {"ba", "b"}, {"aaa", "aa"}} {
			if err := create(f[0], f[1]).Close(); err != nil {
				t.Fatal(err)
			}
		}
		targets := []string{"raw", "a", "b", "aa", "ab", "ba", "aaa"}
		img := create("top", targets[rng.IntN(len(targets))])
		want := diskBytes(t, img)
		for range 6 {
			to := targets[rng.IntN(len(targets))]
			o := &RebaseOptions{BackingFile: to, BackingFormat: "qcow2", Resolver: ResolveBeside(dir)}
			if to == "raw" {
				o.BackingFormat = "raw"
			}
			from := img.Info().BackingFile
			if err := img.Rebase(t.Context(), o); err != nil {
				t.Fatalf("round %d, from %s to %s: %v", round, from, to, err)
			}
			if got := diskBytes(t, img); !bytes.Equal(got, want) {
				t.Fatalf("round %d, from %s to %s: differs at %#x", round, from, to, differenceAt(got, want))
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		img = openBeside(t, filepath.Join(dir, "top"))
		if !bytes.Equal(diskBytes(t, img), want) {
			t.Errorf("round %d: opened again, the image reads otherwise", round)
		}
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}
}

// unreadable is a storage whose content cannot be read.
type unreadable struct{ Storage }

func (unreadable) ReadAt([]byte, int64) (int, error) { return 0, io.ErrNoProgress }

// TestRebaseReadsNoSharedLayer rebases an image from one overlay of a disk that cannot be read to another, and to the disk
// itself: only what an overlay holds is compared.
func TestRebaseReadsNoSharedLayer(t *testing.T) {
	const size = 1 << 20
	s := NewMemoryStorage()
	if _, err := s.WriteAt(bytes.Repeat([]byte{9}, size), 0); err != nil {
		t.Fatal(err)
	}
	base, err := NewRawDisk(unreadable{s})
	if err != nil {
		t.Fatal(err)
	}
	var overlays []*Image
	for i := range 2 {
		img, _ := memoryOverlay(t, base, size, CreateOptions{}, OpenOptions{})
		if _, err := img.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 64<<10), 256<<10); err != nil {
			t.Fatal(err)
		}
		overlays = append(overlays, img)
	}
	top, _ := memoryOverlay(t, overlays[0], size, CreateOptions{}, OpenOptions{})
	o := &RebaseOptions{BackingFile: "b", BackingFormat: "qcow2", Backing: overlays[1]}
	if err := top.Rebase(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 64<<10)
	if _, err := top.ReadAt(p, 256<<10); err != nil || p[0] != 1 {
		t.Errorf("reads %d, %v", p[0], err)
	}
	o = &RebaseOptions{BackingFile: "base", BackingFormat: "raw", Backing: base}
	if err := top.Rebase(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	// What is not shared has to be read.
	o = &RebaseOptions{BackingFile: "other", BackingFormat: "raw", Backing: memoryDisk(t, size, 1)}
	if err := top.Rebase(t.Context(), o); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("to another disk: %v", err)
	}
	for _, img := range []*Image{top, overlays[0], overlays[1]} {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}
}

// partOf is a storage of the caller's: the part of another one from start on.
type partOf struct {
	Storage
	start int64
}

func (w partOf) ReadAt(p []byte, off int64) (int, error) { return w.Storage.ReadAt(p, w.start+off) }
func (w partOf) Size() (int64, error)                    { n, err := w.Storage.Size(); return n - w.start, err }
func (w partOf) NextData(off int64) (int64, int64, error) {
	return off, off + 1<<20, nil
}

// TestLayersOf says which disks are one layer: the same file in the same way, but not two parts of a file, nor what can be
// written.
func TestLayersOf(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "image")
	img, err := Create(path, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	open := func(o OpenOptions) *Image {
		img, err := Open(path, &o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { img.Close() })
		return img
	}
	raw := func(s Storage) Disk {
		d, err := NewRawDisk(s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	file := func() *FileStorage {
		s, err := OpenFileStorage(path, os.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	read1, read2 := open(OpenOptions{Lock: LockOff}), open(OpenOptions{Lock: LockOff})
	write := open(OpenOptions{ReadWrite: true, Lock: LockOff})
	part := raw(partOf{file(), 512})
	tests := []struct {
		name string
		a, b Disk
		same bool
	}{
		{"an image opened twice", read1, read2, true},
		{"an image and one that writes it", read1, write, false},
		{"an image with itself", write, write, true},
		{"a raw file opened twice", raw(file()), raw(file()), true},
		{"a raw file and the image in it", raw(file()), read1, false},
		{"two parts of a file", part, raw(partOf{file(), 1024}), false},
		{"a part with itself", part, part, true},
		{"a disk of the caller's with itself", struct{ Disk }{read1}, struct{ Disk }{read1}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := sameLayer(&Extent{}, &Extent{}, [2][]layer{layersOf(tt.a), layersOf(tt.b)}); got != tt.same {
				t.Errorf("the same: %v, want %v", got, tt.same)
			}
		})
	}
	// A layer further down is another's first.
	top, _ := memoryOverlay(t, read1, 1<<20, CreateOptions{}, OpenOptions{})
	defer top.Close()
	if layers := [2][]layer{layersOf(top), layersOf(read2)}; !sameLayer(&Extent{Depth: 1}, &Extent{}, layers) || sameLayer(&Extent{}, &Extent{}, layers) || sameLayer(&Extent{Depth: 2}, &Extent{}, layers) {
		t.Errorf("layers %v", layers)
	}
}

// TestRebaseParts rebases from one part of a file to another.
func TestRebaseParts(t *testing.T) {
	s := NewMemoryStorage()
	if _, err := s.WriteAt(append(bytes.Repeat([]byte{1}, 64<<10), bytes.Repeat([]byte{2}, 64<<10)...), 0); err != nil {
		t.Fatal(err)
	}
	var disks [2]Disk
	for i := range disks {
		d, err := NewRawDisk(partOf{s, int64(i) * 64 << 10})
		if err != nil {
			t.Fatal(err)
		}
		disks[i] = d
	}
	img, _ := memoryOverlay(t, disks[0], 64<<10, CreateOptions{}, OpenOptions{})
	if err := img.Rebase(t.Context(), &RebaseOptions{BackingFile: "b", BackingFormat: "raw", Backing: disks[1]}); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	if _, err := img.ReadAt(p, 0); err != nil || p[0] != 1 {
		t.Errorf("reads %d, %v", p[0], err)
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}
