package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// diskBytes returns all of a disk.
func diskBytes(t testing.TB, d Disk) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return p
}

// TestRebaseQEMU rebases images that QEMU made, as qemu-img rebase does: QEMU finds the result clean, with the content
// that it had, and says the same of it. The live image reads the same before, afterwards and when it is opened again.
func TestRebaseQEMU(t *testing.T) {
	qemutest.Require(t)
	bases := []RebaseOptions{
		{},
		{BackingFile: "longer", BackingFormat: "qcow2"},
		{BackingFile: "shorter", BackingFormat: "raw"},
		{BackingFile: "base", BackingFormat: "raw"},
	}
	for i, im := range amendImages {
		if len(im.do) > 5 {
			continue
		}
		t.Run(im.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := makeAmendImage(t, dir, i)
			if !im.backing {
				qemutest.Img(t, "create", "-q", "-f", "raw", filepath.Join(dir, "base"), "5M")
			}
			qemutest.Img(t, "create", "-q", "-f", "raw", filepath.Join(dir, "shorter"), "2000k")
			qemutest.IOWith(t, qemutest.IOOptions{Format: "raw"}, filepath.Join(dir, "shorter"), "write -P 9 0 1900k", "write -P 3 700k 10k")
			qemutest.Img(t, "create", "-q", "-f", "qcow2", filepath.Join(dir, "longer"), "9M")
			qemutest.IO(t, filepath.Join(dir, "longer"), "write -P 9 0 4M", "write -P 6 500k 1000", "write -P 5 7M 2M", "write -z 1500k 64k")
			raw := filepath.Join(dir, "raw")
			qemutest.Img(t, "convert", "-f", "qcow2", "-O", "raw", path, raw)
			for j, o := range bases {
				if os.Getenv(crashStatesEnv) == "" && j%3 != i%3 {
					continue // all of them in the long run
				}
				theirs, ours := copyImage(t, path, "theirs"), copyImage(t, path, "ours")
				qemutest.Dump(t, ours)
				args := []string{"rebase", "-f", "qcow2", "-b", o.BackingFile}
				if o.BackingFile != "" {
					args = append(args, "-F", o.BackingFormat)
				}
				qemutest.Img(t, append(args, theirs)...)
				img := openBeside(t, ours)
				before := diskBytes(t, img)
				var last, total int64
				o.Resolver, o.Progress = ResolveBeside(dir), func(done, all int64) { last, total = done, all }
				if err := img.Rebase(context.Background(), &o); err != nil {
					t.Fatalf("to %q: %v", o.BackingFile, err)
				}
				if last != total || total != img.Size() {
					t.Errorf("progress ends at %d of %d", last, total)
				}
				if !bytes.Equal(diskBytes(t, img), before) {
					t.Errorf("to %q: the live image reads otherwise", o.BackingFile)
				}
				if (img.Backing() == nil) != (o.BackingFile == "") || img.Info().BackingFile != o.BackingFile || img.Info().BackingFormat != o.BackingFormat {
					t.Errorf("to %q: the image says %q, %q", o.BackingFile, img.Info().BackingFile, img.Info().BackingFormat)
				}
				if err := img.Close(); err != nil {
					t.Error(err)
				}
				img = openBeside(t, ours)
				if !bytes.Equal(diskBytes(t, img), before) {
					t.Errorf("to %q: opened again, the image reads otherwise", o.BackingFile)
				}
				if err := img.Close(); err != nil {
					t.Error(err)
				}
				qemutest.CheckClean(t, ours)
				sameInfo(t, theirs, ours)
				qemutest.Compare(t, raw, "raw", ours, "qcow2")
			}
			// The name alone.
			theirs, ours := copyImage(t, path, "theirs"), copyImage(t, path, "ours")
			qemutest.Img(t, "rebase", "-f", "qcow2", "-u", "-b", "longer", "-F", "qcow2", theirs)
			img, err := Open(ours, &OpenOptions{ReadWrite: true, NoBacking: true})
			if err != nil {
				t.Fatal(err)
			}
			o := RebaseOptions{BackingFile: "longer", BackingFormat: "qcow2", Unsafe: true}
			if err := img.Rebase(context.Background(), &o); err != nil {
				t.Fatal(err)
			}
			if _, err := img.ReadAt(make([]byte, 512), 6<<20); im.name != "lazy" && !errors.Is(err, ErrBackingRequired) {
				t.Errorf("read below without the new backing file: %v", err)
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
			qemutest.CheckClean(t, ours)
			sameInfo(t, theirs, ours)
			qemutest.Compare(t, theirs, "qcow2", ours, "qcow2")
		})
	}
}

// memoryOverlay makes an overlay of random content over base in memory.
func memoryOverlay(t testing.TB, base Disk, size int64, o CreateOptions, open OpenOptions) (*Image, Storage) {
	t.Helper()
	s := NewMemoryStorage()
	open.Backing = base
	o.Open = &open
	o.BackingFile, o.BackingFormat = "base", "raw"
	img, err := CreateStorage(s, size, &o)
	if err != nil {
		t.Fatal(err)
	}
	return img, s
}

// memoryDisk returns a raw disk in memory whose clusters of 4 KiB are content, zeros or holes by seed.
func memoryDisk(t testing.TB, size int64, seed uint64) *RawDisk {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 0))
	s := NewMemoryStorage()
	for off := int64(0); off < size; off += 4096 {
		p := make([]byte, min(4096, size-off))
		// Half of the content is that of every seed.
		switch rng.IntN(4) {
		case 0:
			content(p, uint64(off)+1)
		case 1:
			content(p[:len(p)/2], seed<<32+uint64(off)+1)
		case 2:
			continue
		}
		if _, err := s.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Truncate(size); err != nil {
		t.Fatal(err)
	}
	d, err := NewRawDisk(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestRebaseLive rebases beside writers and readers, back and forth, in every version: what is read is what was
// written, or what lay below at first.
func TestRebaseLive(t *testing.T) {
	const size = 2<<20 + 512*5
	for _, o := range []CreateOptions{
		{ClusterSize: 4096},
		{ClusterSize: 4096, Version: 2},
		{ClusterSize: 16 << 10, ExtendedL2: true},
		{ClusterSize: 512, LazyRefcounts: true},
	} {
		t.Run(fmt.Sprintf("cluster %d version %d extended %v", o.ClusterSize, o.Version, o.ExtendedL2), func(t *testing.T) {
			t.Parallel()
			disks := []*RawDisk{memoryDisk(t, size, 1), memoryDisk(t, size/2, 2), memoryDisk(t, 2*size, 3)}
			img, s := memoryOverlay(t, disks[0], size, o, OpenOptions{L2CacheBytes: 1, RefcountCacheBytes: 1})
			want := make([]byte, size)
			if _, err := disks[0].ReadAt(want, 0); err != nil {
				t.Fatal(err)
			}
			stop, done := make(chan struct{}), make(chan error)
			go func() { done <- writeAround(img, want, stop) }()
			for i := range 6 {
				o := RebaseOptions{BackingFile: fmt.Sprint("disk", i), BackingFormat: "raw", Backing: disks[(i+1)%3]}
				if i == 3 {
					o = RebaseOptions{}
				}
				if err := img.Rebase(context.Background(), &o); err != nil {
					t.Error(err)
				}
			}
			close(stop)
			if err := <-done; err != nil {
				t.Error(err)
			}
			if !bytes.Equal(diskBytes(t, img), want) {
				t.Error("the image reads otherwise")
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
			walkStorage(t, s, true)
		})
	}
}

// writeAround writes to random places of img and reads, with want as the model, until stop is closed.
func writeAround(img *Image, want []byte, stop chan struct{}) error {
	rng := rand.New(rand.NewPCG(9, 9))
	for k := uint64(0); ; k++ {
		select {
		case <-stop:
			return nil
		default:
		}
		off := rng.IntN(len(want))
		n := min(1+rng.IntN(9000), len(want)-off)
		if k%2 == 0 {
			content(want[off:off+n], k)
			if _, err := img.WriteAt(want[off:off+n], int64(off)); err != nil {
				return err
			}
		}
		p := make([]byte, n)
		if _, err := img.ReadAt(p, int64(off)); err != nil {
			return err
		}
		if err := difference(p, want[off:off+n], int64(off)); err != nil {
			return err
		}
		for _, err := range img.Extents(int64(off), int64(n)) {
			if err != nil {
				return err
			}
		}
	}
}

// TestRebaseRefused lists what is refused, with nothing changed.
func TestRebaseRefused(t *testing.T) {
	base := memoryDisk(t, 1<<20, 1)
	other := memoryDisk(t, 1<<20, 2)
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	tests := []struct {
		name   string
		create CreateOptions
		open   func(o *OpenOptions)
		opts   func(img *Image) *RebaseOptions
		ctx    context.Context
		want   error
	}{
		{name: "no format", opts: func(*Image) *RebaseOptions { return &RebaseOptions{BackingFile: "x", Backing: other} }, want: ErrOption},
		{name: "no name", opts: func(*Image) *RebaseOptions { return &RebaseOptions{BackingFormat: "raw"} }, want: ErrOption},
		{name: "long name", opts: func(*Image) *RebaseOptions {
			return &RebaseOptions{BackingFile: strings.Repeat("x", 1024), BackingFormat: "raw", Backing: other}
		}, want: ErrOption},
		{name: "no disk", opts: func(*Image) *RebaseOptions { return &RebaseOptions{BackingFile: "x", BackingFormat: "raw"} }, want: ErrOption},
		{name: "no room", create: CreateOptions{ClusterSize: 512}, opts: func(*Image) *RebaseOptions {
			return &RebaseOptions{BackingFile: strings.Repeat("x", 400), BackingFormat: "raw", Backing: other}
		}, want: ErrHeaderFull},
		{name: "itself", opts: func(img *Image) *RebaseOptions {
			return &RebaseOptions{BackingFile: "x", BackingFormat: "qcow2", Backing: img}
		}, want: ErrChain},
		{name: "its own file", opts: func(img *Image) *RebaseOptions {
			return &RebaseOptions{BackingFile: "x", BackingFormat: "raw", Resolver: ResolverMap{"x": img.host.s}}
		}, want: ErrChain},
		{name: "old one not open", open: func(o *OpenOptions) { o.Backing, o.NoBacking = nil, true },
			opts: func(*Image) *RebaseOptions {
				return &RebaseOptions{BackingFile: "x", BackingFormat: "raw", Backing: other}
			}, want: ErrBackingRequired},
		{name: "read-only", open: func(o *OpenOptions) { o.ReadWrite = false }, opts: func(*Image) *RebaseOptions { return nil }, want: ErrReadOnly},
		{name: "canceled", opts: func(*Image) *RebaseOptions { return nil }, ctx: canceled, want: context.Canceled},
		{name: "format unknown to us", opts: func(img *Image) *RebaseOptions {
			return &RebaseOptions{BackingFile: "x", BackingFormat: "vmdk", Resolver: ResolverMap{}}
		}, want: ErrUnsupported},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img, s := memoryOverlay(t, base, 1<<20, tt.create, OpenOptions{})
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			before := readAll(t, s)
			o := OpenOptions{ReadWrite: true, Backing: base}
			if tt.open != nil {
				tt.open(&o)
			}
			img, err := OpenStorage(s, &o)
			if err != nil {
				t.Fatal(err)
			}
			ctx := tt.ctx
			if ctx == nil {
				ctx = context.Background()
			}
			if err := img.Rebase(ctx, tt.opts(img)); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if img.Info().BackingFile != "base" {
				t.Errorf("the backing file is %q", img.Info().BackingFile)
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(before, readAll(t, s)) {
				t.Error("the file changed")
			}
		})
	}
}

// TestRebaseOpenSnapshot reads a snapshot that is open through the new backing file, once the old one is closed.
func TestRebaseOpenSnapshot(t *testing.T) {
	const size = 1 << 20
	disks := ResolverMap{"a": NewMemoryStorage(), "b": NewMemoryStorage()}
	for i, name := range []string{"a", "b"} {
		if _, err := disks[name].WriteAt(bytes.Repeat([]byte{byte(i + 1)}, size), 0); err != nil {
			t.Fatal(err)
		}
	}
	s := NewMemoryStorage()
	img, err := CreateStorage(s, size, &CreateOptions{BackingFile: "a", BackingFormat: "raw", Open: &OpenOptions{Resolver: disks}})
	if err != nil {
		t.Fatal(err)
	}
	snap, err := img.CreateSnapshot(context.Background(), &SnapshotOptions{Name: "before"})
	if err != nil {
		t.Fatal(err)
	}
	d, err := img.OpenSnapshot(SnapshotRef{ID: snap.ID})
	if err != nil {
		t.Fatal(err)
	}
	o := RebaseOptions{BackingFile: "b", BackingFormat: "raw", Resolver: disks}
	if err := img.Rebase(context.Background(), &o); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	if _, err := d.ReadAt(p, 4096); err != nil || p[0] != 2 {
		t.Errorf("the snapshot reads %d, %v", p[0], err)
	}
	if _, err := img.ReadAt(p, 4096); err != nil || p[0] != 1 {
		t.Errorf("the disk reads %d, %v", p[0], err)
	}
	if err := img.Amend(context.Background(), &AmendOptions{Version: 2}); err != nil {
		t.Error(err)
	}
	if _, err := d.ReadAt(p, 4096); err != nil || p[0] != 2 {
		t.Errorf("after an amend the snapshot reads %d, %v", p[0], err)
	}
	if err := errors.Join(d.Close(), img.Close()); err != nil {
		t.Error(err)
	}
	walkStorage(t, s, true)
}
