package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/qemutest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
	"github.com/google/go-cmp/cmp"
)

// commitLayer is an image of a chain, or a raw file at its end.
type commitLayer struct {
	name   string // of its file
	raw    bool
	size   int64
	create CreateOptions
	write  []faultStep
	change func(t testing.TB, b []byte) []byte
}

// commitScenario is a chain, the lowest layer first, whose top is committed.
type commitScenario struct {
	name   string
	layers []commitLayer
	opts   CommitOptions
}

// commitScenarios are chains of every kind of base. The top layer holds data, compressed clusters and holes.
func commitScenarios() []commitScenario {
	const size = 128 << 10
	fill := []faultStep{{'w', 0, 20_000}, {'w', 50_000, 30_000}, {'w', 110_000, 300}}
	work := []faultStep{{'w', 10_000, 5_000}, {'w', 52_000, 100}, {'c', 24, 2}, {'w', 120_000, 8_000}}
	top := commitLayer{name: "image", size: size, create: CreateOptions{ClusterSize: 1024}, write: work}
	ext := commitLayer{name: "image", size: size, create: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}, write: []faultStep{{'w', 10_000, 5_000}, {'w', 52_000, 100}, {'c', 3, 1}, {'w', 120_000, 8_000}}}
	deep := commitLayer{name: "deep", raw: true, size: size + 512, write: fill}
	return []commitScenario{
		{name: "raw", layers: []commitLayer{{name: "base", raw: true, size: size, write: fill}, top}},
		{name: "raw, subclusters", layers: []commitLayer{{name: "base", raw: true, size: size, write: fill}, ext}},
		{name: "raw and larger", layers: []commitLayer{{name: "base", raw: true, size: 2 * size, write: append([]faultStep{{'w', size, size}}, fill...)}, top}},
		{name: "raw and smaller", layers: []commitLayer{{name: "base", raw: true, size: 60_001, write: fill[:1]}, top}},
		{name: "qcow2", layers: []commitLayer{{name: "base", size: size, create: CreateOptions{ClusterSize: 512}, write: fill}, top}},
		{name: "qcow2 with larger clusters", layers: []commitLayer{{name: "base", size: size, create: CreateOptions{ClusterSize: 16 << 10}, write: []faultStep{{'c', 0, 2}, {'c', 3, 2}}}, top}},
		{name: "qcow2 over a file", layers: []commitLayer{deep, {name: "base", size: size, create: CreateOptions{ClusterSize: 2048}, write: fill[:1]}, ext}},
		{name: "version 2", layers: []commitLayer{{name: "base", size: size, create: CreateOptions{ClusterSize: 512, Version: 2}, write: fill}, {name: "image", size: size, create: CreateOptions{ClusterSize: 1024, Version: 2}, write: work}}},
		{name: "lazy refcounts", layers: []commitLayer{{name: "base", size: size, create: CreateOptions{ClusterSize: 512, LazyRefcounts: true}, write: fill}, top}},
		{name: "base with snapshot", layers: []commitLayer{{name: "base", size: size, create: CreateOptions{ClusterSize: 512}, write: fill, change: addTestSnapshot}, top}},
		{name: "base with bitmap", layers: []commitLayer{{name: "base", size: size, create: CreateOptions{ClusterSize: 4096}, write: fill, change: addTestBitmap}, top}},
		{name: "base with data file", layers: []commitLayer{{name: "base", size: size, create: CreateOptions{ClusterSize: 1024, DataFile: "data"}, write: fill}, top}},
		{name: "kept", opts: CommitOptions{KeepOverlay: true}, layers: []commitLayer{{name: "base", size: size, create: CreateOptions{ClusterSize: 512}, write: fill}, top}},
		{name: "two levels", opts: CommitOptions{Depth: 2}, layers: []commitLayer{deep, {name: "mid", size: size, create: CreateOptions{ClusterSize: 2048}, write: fill[:1]}, top}},
		{name: "two levels past a short one", opts: CommitOptions{Depth: 2}, layers: []commitLayer{deep, {name: "mid", size: 80_384, create: CreateOptions{ClusterSize: 2048}, write: fill[:1]}, top}},
		{name: "three levels", opts: CommitOptions{Depth: 3}, layers: []commitLayer{
			{name: "deep", size: size, create: CreateOptions{ClusterSize: 4096}, write: fill}, {name: "low", size: size, create: CreateOptions{ClusterSize: 512}, write: work[:2]},
			{name: "mid", size: size, create: CreateOptions{ClusterSize: 2048}, write: fill[:1]}, top}},
	}
}

// base returns the layer that is written.
func (sc *commitScenario) base() *commitLayer {
	return &sc.layers[len(sc.layers)-1-max(sc.opts.Depth, 1)]
}

// build makes the files of the chain.
func (sc *commitScenario) build(t testing.TB) map[string]*crashtest.Disk {
	t.Helper()
	host := newFaultHost(map[string]*crashtest.Disk{"data": crashtest.NewDisk(nil)})
	for i, l := range sc.layers {
		d := crashtest.NewDisk(nil)
		host.disks[l.name] = d
		if l.raw {
			if err := d.Truncate(l.size); err != nil {
				t.Fatal(err)
			}
			for k, s := range l.write {
				if _, err := d.WriteAt(s.bytes(100*i+k, s.n), s.off); err != nil {
					t.Fatal(err)
				}
			}
			continue
		}
		o := l.create
		if i > 0 {
			o.BackingFile, o.BackingFormat = sc.layers[i-1].name, "qcow2"
			if sc.layers[i-1].raw {
				o.BackingFormat = "raw"
			}
		}
		o.Open = &OpenOptions{Resolver: host}
		img, err := CreateStorage(host.storage(l.name), l.size, &o)
		if err != nil {
			t.Fatal(err)
		}
		run := faultRun{TB: t, img: img, model: faultModel{now: make([]byte, l.size)}}
		for k, s := range l.write {
			if err := run.do(100*i+k, s); err != nil {
				t.Fatal(err)
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		if l.change != nil {
			host.disks[l.name] = crashtest.NewDisk(l.change(t, d.Bytes()))
		}
	}
	return host.disks
}

// openTop opens the top of the chain for writing.
func (sc *commitScenario) openTop(host *faultHost) (*Image, error) {
	return OpenStorage(host.storage("image"), &OpenOptions{ReadWrite: true, Resolver: host, Name: "image"})
}

// readLayer returns what the named layer reads, through another open, cut or padded to n bytes.
func (sc *commitScenario) readLayer(t testing.TB, host *faultHost, l *commitLayer, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	var d Disk
	if l.raw {
		raw, err := NewRawDisk(host.storage(l.name))
		if err != nil {
			t.Fatal(err)
		}
		d = raw
	} else {
		img, err := OpenStorage(host.storage(l.name), &OpenOptions{Resolver: host, Lock: LockOff})
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		d = img
	}
	if got, err := d.ReadAt(p, 0); got < int(min(n, d.Size())) {
		t.Fatalf("read layer %s: %v", l.name, err)
	}
	return p
}

// walkAll walks every image of the chain, which must be without a flaw, or with leaks.
func (sc *commitScenario) walkAll(t testing.TB, host *faultHost, leaks bool) {
	t.Helper()
	for _, l := range sc.layers {
		if l.raw {
			continue
		}
		d := host.disks[l.name]
		size, err := d.Size()
		if err != nil {
			t.Fatal(err)
		}
		rep, err := refwalk.Walk(d, size)
		if err != nil {
			t.Fatalf("%s: %v", l.name, err)
		}
		if rep.Corruptions() > 0 || !leaks && !rep.Clean() {
			t.Errorf("%s: dirty %v, %d corruptions, %d leaks: %q", l.name, rep.Dirty(), rep.Corruptions(), rep.Leaks, rep.Findings)
		}
	}
}

// allocates reports whether the image itself holds anything.
func allocates(t testing.TB, img *Image) bool {
	t.Helper()
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Depth == 0 && e.Kind != ExtentUnallocated {
			return true
		}
	}
	return false
}

// TestCommit commits chains of every kind. The guest reads the same as before, the base holds it, and the image nothing
// any more, unless it is kept; nobody holds more than before, and another round does the same.
func TestCommit(t *testing.T) {
	for _, sc := range commitScenarios() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			host := newFaultHost(sc.build(t))
			img, err := sc.openTop(host)
			if err != nil {
				t.Fatal(err)
			}
			locks, opens := fmt.Sprint(host.locks), fmt.Sprint(host.open)
			last := sc.readLayer(t, host, sc.base(), 2*img.Size())[img.Size():]
			for round := range 2 {
				p := faultStep{}.bytes(900+round, 3000)
				if _, err := img.WriteAt(p, 60_000); err != nil {
					t.Fatal(err)
				}
				want := readDisk(t, img)
				opts := sc.opts
				var done, total int64
				opts.Progress = func(d, n int64) {
					if d < done || n != img.Size() {
						t.Errorf("progress goes from %d to %d of %d", done, d, n)
					}
					done, total = d, n
				}
				if err := img.Commit(t.Context(), &opts); err != nil {
					t.Fatal(err)
				}
				if done != total || total != img.Size() {
					t.Errorf("progress ends with %d of %d", done, total)
				}
				if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
					t.Errorf("the image: %s", diff)
				}
				base := sc.readLayer(t, host, sc.base(), 2*img.Size())
				if diff := explainContent(base[:img.Size()], 0, want, nil); diff != "" {
					t.Errorf("the base: %s", diff)
				}
				if !bytes.Equal(base[img.Size():], last) {
					t.Error("the base behind the end of the image has changed")
				}
				if kept := sc.opts.KeepOverlay || sc.opts.Depth > 1; allocates(t, img) != kept {
					t.Errorf("the image holds something: %v, want %v", !kept, kept)
				}
				sc.walkAll(t, host, false)
				if diff := cmp.Diff([]string{locks, opens}, []string{fmt.Sprint(host.locks), fmt.Sprint(host.open)}); diff != "" {
					t.Errorf("locks and open storages (-before +after):\n%s", diff)
				}
			}
			want := readDisk(t, img)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			host.checkIdle(t)
			sc.walkAll(t, host, false)
			if diff := explainContent(sc.readLayer(t, host, &sc.layers[len(sc.layers)-1], int64(len(want))), 0, want, nil); diff != "" {
				t.Errorf("opened again: %s", diff)
			}
		})
	}
}

// TestCommitReaders commits an image of several pieces with one reader and with as many as there are: the base becomes
// the same file, byte by byte.
func TestCommitReaders(t *testing.T) {
	const size = 5*convertChunk + 512
	commit := func(procs int) []byte {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
		base := NewMemoryStorage()
		below, err := CreateStorage(base, size, &CreateOptions{ClusterSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(7, 7))
		scribble(t, below, rng, 40)
		if err := below.Close(); err != nil {
			t.Fatal(err)
		}
		open := OpenOptions{Resolver: ResolverMap{"base": base}}
		img, err := CreateStorage(NewMemoryStorage(), size, &CreateOptions{BackingFile: "base", BackingFormat: "qcow2", Open: &open})
		if err != nil {
			t.Fatal(err)
		}
		scribble(t, img, rng, 60)
		want := diskBytes(t, img)
		if err := img.Commit(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(diskBytes(t, img), want) {
			t.Error("the content differs")
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		return readAll(t, base)
	}
	want := commit(1)
	for _, procs := range []int{2, 8} {
		if got := commit(procs); !bytes.Equal(got, want) {
			t.Errorf("%d: the base differs at %#x", procs, differenceAt(got, want))
		}
	}
}

// TestCommitZeros commits zero clusters and subclusters, over content of the base.
func TestCommitZeros(t *testing.T) {
	for _, extended := range []bool{false, true} {
		host := newFaultHost(map[string]*crashtest.Disk{"image": crashtest.NewDisk(nil), "base": crashtest.NewDisk(nil)})
		const size = 1 << 20
		base, err := CreateStorage(host.storage("base"), size, &CreateOptions{ClusterSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, base, pattern(1, size), 0)
		o := &CreateOptions{ClusterSize: 16 << 10, ExtendedL2: extended, BackingFile: "base", BackingFormat: "qcow2", Open: &OpenOptions{Resolver: host}}
		img, err := CreateStorage(host.storage("image"), size, o)
		if err := errors.Join(err, base.Close()); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, img, pattern(2, size/4), 1000)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		edit, err := newCrashBytes(host.disks["image"].Bytes(), false)
		if err != nil {
			t.Fatal(err)
		}
		if err := edit.addZeros(rand.New(rand.NewPCG(1, 1))); err != nil {
			t.Fatal(err)
		}
		host.disks["image"] = crashtest.NewDisk(edit.b)
		if img, err = OpenStorage(host.storage("image"), &OpenOptions{ReadWrite: true, Resolver: host}); err != nil {
			t.Fatal(err)
		}
		want := readDisk(t, img)
		if bytes.Equal(want, pattern(1, size)) {
			t.Fatal("there is nothing to commit")
		}
		if err := img.Commit(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
			t.Errorf("extended %v: %s", extended, diff)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		host.checkIdle(t)
	}
}

// TestCommitCallersBase commits into a disk of the caller's: it is written as it is, and stays the caller's.
func TestCommitCallersBase(t *testing.T) {
	const size = 1 << 20
	ctx := t.Context()
	image, err := CreateStorage(NewMemoryStorage(), size/2, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	readOnlyHost := NewMemoryStorage()
	closed, err := CreateStorage(readOnlyHost, size, nil)
	if err := errors.Join(err, closed.Close()); err != nil {
		t.Fatal(err)
	}
	readOnly, err := OpenStorage(readOnlyHost, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	rawHost := NewMemoryStorage()
	raw, err := NewRawDisk(rawHost)
	if err != nil {
		t.Fatal(err)
	}
	small, err := NewRawDisk(NewMemoryDevice(4096))
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		base Disk
		want error
	}{
		{"image", image, nil},
		{"image for reading", readOnly, ErrReadOnly},
		{"raw", raw, nil},
		{"device that is too small", small, syscall.ENOSPC},
		{"disk that is only read", struct{ Disk }{raw}, ErrReadOnly},
		{"none", nil, ErrNoBacking},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img, err := CreateStorage(NewMemoryStorage(), size, &CreateOptions{Open: &OpenOptions{Backing: tt.base}})
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			want := pattern(3, size)
			mustWrite(t, img, want[:size-1000], 0)
			want = readDisk(t, img)
			err = img.Commit(ctx, nil)
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
				t.Error(diff)
			}
			if allocates(t, img) != (tt.want != nil) {
				t.Errorf("the image holds something: %v", tt.want == nil)
			}
			if tt.want == nil {
				if diff := explainContent(readDisk(t, tt.base), 0, want, nil); diff != "" {
					t.Errorf("the base: %s", diff)
				}
			}
		})
	}
}

// TestCommitOptions refuses what cannot be.
func TestCommitOptions(t *testing.T) {
	sc := commitScenarios()[0]
	host := newFaultHost(sc.build(t))
	img, err := sc.openTop(host)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	for _, depth := range []int{-1, 2, 3, 1 << 30} {
		var oe *OptionError
		if err := img.Commit(t.Context(), &CommitOptions{Depth: depth}); !errors.As(err, &oe) || oe.Option != "Depth" {
			t.Errorf("depth %d: error %v, want an *OptionError", depth, err)
		}
	}
	for _, op := range host.changes(0) {
		if op != "image sync" {
			t.Errorf("refusals changed: %s", op)
		}
	}
}

// TestCommitRebased commits into a backing file that a Rebase has opened, of an image that was opened without a Resolver.
func TestCommitRebased(t *testing.T) {
	const size = 1 << 20
	host := newFaultHost(map[string]*crashtest.Disk{"image": crashtest.NewDisk(nil), "base": crashtest.NewDisk(pattern(1, size))})
	img, err := CreateStorage(host.storage("image"), size, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := pattern(2, size)
	mustWrite(t, img, want[:size/2], 0)
	want = readDisk(t, img)
	o := &RebaseOptions{BackingFile: "base", BackingFormat: "raw", Resolver: host}
	if err := errors.Join(img.Rebase(t.Context(), o), img.Commit(t.Context(), nil)); err != nil {
		t.Error(err)
	}
	if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
		t.Error(diff)
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
	if diff := explainContent(host.disks["base"].Bytes(), 0, want, nil); diff != "" {
		t.Errorf("the base: %s", diff)
	}
	host.checkIdle(t)
}

// TestCommitCancelled ends a commit in its middle. The image is as before, holds its base for reading, and the next
// call does the work.
func TestCommitCancelled(t *testing.T) {
	const size = 16 << 20
	host := newFaultHost(map[string]*crashtest.Disk{"image": crashtest.NewDisk(nil), "base": crashtest.NewDisk(make([]byte, size))})
	img, err := CreateStorage(host.storage("image"), size, &CreateOptions{BackingFile: "base", BackingFormat: "raw", Open: &OpenOptions{Resolver: host}})
	if err != nil {
		t.Fatal(err)
	}
	want := pattern(1, size)
	mustWrite(t, img, want, 0)
	ctx, cancel := context.WithCancel(t.Context())
	err = img.Commit(ctx, &CommitOptions{Progress: func(done, total int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that of the context", err)
	}
	if !allocates(t, img) {
		t.Error("the image was emptied")
	}
	if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
		t.Error(diff)
	}
	if host.locks["base"] != 1 || host.open["base"] != 1 {
		t.Errorf("%d locks of the base, %d storages", host.locks["base"], host.open["base"])
	}
	if err := img.Commit(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(host.disks["base"].Bytes(), want) {
		t.Error("the base does not hold the content")
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	host.checkIdle(t)
}

// TestCommitLocks commits files while others hold the base. A reader of it keeps the commit out, which changes nothing;
// afterwards the base is locked for reading, and while it is written nobody else gets it.
func TestCommitLocks(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs image locks")
	}
	dir := t.TempDir()
	top, base := filepath.Join(dir, "top.qcow2"), filepath.Join(dir, "base.qcow2")
	b, err := Create(base, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, b, pattern(1, 1<<20), 0)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	files := openFiles()
	img, err := Create(top, 1<<20, &CreateOptions{BackingFile: "base.qcow2", BackingFormat: "qcow2", Open: &OpenOptions{Resolver: ResolveBeside(dir)}})
	if err != nil {
		t.Fatal(err)
	}
	if !img.Backing().(*Image).Info().Locked {
		t.Skip("no locks in this file system")
	}
	mustWrite(t, img, pattern(2, 300_000), 100_000)
	want := readDisk(t, img)
	reader, err := Open(base, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Commit(t.Context(), nil); !errors.Is(err, ErrLocked) {
		t.Errorf("beside a reader of the base: error %v, want ErrLocked", err)
	}
	if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
		t.Error(diff)
	}
	if err := reader.Close(); err != nil {
		t.Fatal(err)
	}
	before := img.Backing().(*Image)
	err = img.Commit(t.Context(), &CommitOptions{Progress: func(done, total int64) {
		if _, err := Open(base, nil); !errors.Is(err, ErrLocked) {
			t.Errorf("reader of the base while it is written: error %v, want ErrLocked", err)
		}
		if _, err := Open(base, &OpenOptions{ReadWrite: true}); !errors.Is(err, ErrLocked) {
			t.Errorf("another writer of the base: error %v, want ErrLocked", err)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := before.ReadAt(make([]byte, 1), 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("the backing disk of before: error %v, want fs.ErrClosed", err)
	}
	if diff := explainContent(readDisk(t, img.Backing()), 0, want, nil); diff != "" {
		t.Errorf("the backing disk: %s", diff)
	}
	if reader, err = Open(base, nil); err != nil {
		t.Fatalf("another reader afterwards: %v", err)
	}
	reader.Close()
	if _, err := Open(base, &OpenOptions{ReadWrite: true}); !errors.Is(err, ErrLocked) {
		t.Errorf("a writer of the base afterwards: error %v, want ErrLocked", err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err = Open(base, &OpenOptions{ReadWrite: true}); err != nil {
		t.Fatalf("a writer after close: %v", err)
	}
	b.Close()
	if n := openFiles(); n != files {
		t.Errorf("%d files are open, %d before", n, files)
	}
}

// TestCommitOtherFile refuses a base whose name leads to another file now.
func TestCommitOtherFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("open files are not renamed")
	}
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	for _, name := range []string{base, base + "2"} {
		if err := os.WriteFile(name, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	img, err := Create(filepath.Join(dir, "top"), 1<<20, &CreateOptions{BackingFile: "base", BackingFormat: "raw", Open: &OpenOptions{Resolver: ResolveBeside(dir)}})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	mustWrite(t, img, pattern(1, 1000), 0)
	if err := os.Rename(base+"2", base); err != nil {
		t.Fatal(err)
	}
	if err := img.Commit(t.Context(), nil); !errors.Is(err, ErrResolve) {
		t.Errorf("error %v, want ErrResolve", err)
	}
	if b, err := os.ReadFile(base); err != nil || !allZero(b) {
		t.Errorf("the other file was written, or %v", err)
	}
}

// TestCommitBeside reads the image, its extents included, while it is committed again and again, and written between.
// Every read finds what was written.
func TestCommitBeside(t *testing.T) {
	for _, sc := range commitScenarios() {
		if sc.name != "qcow2 with larger clusters" && sc.name != "base with snapshot" && sc.name != "three levels" && sc.name != "raw" {
			continue
		}
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			host := newFaultHost(sc.build(t))
			img, err := sc.openTop(host)
			if err != nil {
				t.Fatal(err)
			}
			want := readDisk(t, img)
			const hot = 64 << 10 // behind it nothing is written
			done := make(chan struct{})
			var running []<-chan struct{}
			for i := range 2 {
				running = append(running, background(t, "reader", func() error {
					rng := rand.New(rand.NewPCG(uint64(i), 1))
					for {
						select {
						case <-done:
							return nil
						default:
						}
						off := hot + rng.Int64N(img.Size()-hot-1)
						n := min(1+rng.Int64N(8000), img.Size()-off)
						if err := wantAt(img, want[off:off+n], off)(); err != nil {
							return err
						}
						if err := checkExtents(img, 0, img.Size()); err != nil {
							return err
						}
					}
				}))
			}
			for k := range 8 {
				mustWrite(t, img, faultStep{}.bytes(k, 5000), int64(k)*6000)
				if err := img.Commit(t.Context(), &sc.opts); err != nil {
					t.Error(err)
				}
			}
			close(done)
			for _, c := range running {
				await(t, "a reader", c)
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
			host.checkIdle(t)
			sc.walkAll(t, host, false)
		})
	}
}

// TestCommitQEMU commits chains that QEMU made, beside qemu-img commit on copies of them: the bases hold the same.
func TestCommitQEMU(t *testing.T) {
	qemutest.Require(t)
	for _, tt := range []struct {
		name, base, baseOpts, topOpts string
		baseSize, topSize             string
	}{
		{"raw", "raw", "", "", "16M", "16M"},
		{"qcow2", "qcow2", "", "cluster_size=4k", "16M", "16M"},
		{"subclusters", "qcow2", "cluster_size=2M", "extended_l2=on", "16M", "16M"},
		{"version 2", "qcow2", "compat=0.10", "compat=0.10", "16M", "16M"},
		{"smaller raw base", "raw", "", "", "9M", "16M"},
		{"smaller qcow2 base", "qcow2", "cluster_size=512", "", "9M", "16M"},
		{"larger base", "qcow2", "", "", "24M", "16M"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dirs := []string{t.TempDir(), t.TempDir()}
			for _, dir := range dirs {
				base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
				create := []string{"create", "-f", tt.base}
				if tt.baseOpts != "" {
					create = append(create, "-o", tt.baseOpts)
				}
				qemutest.Img(t, append(create, base, tt.baseSize)...)
				qemutest.IOWith(t, qemutest.IOOptions{Format: tt.base}, base, "write -P 1 0 5M", "write -P 2 8M 1M")
				create = []string{"create", "-f", "qcow2", "-b", "base", "-F", tt.base}
				if tt.topOpts != "" {
					create = append(create, "-o", tt.topOpts)
				}
				qemutest.Img(t, append(create, top, tt.topSize)...)
				work := []string{"write -P 3 1M 100k", "write -P 4 15M 512", "write -c -P 5 4M 2M"}
				if !strings.Contains(tt.topOpts, "0.10") {
					work = append(work, "write -z 2M 1M", "write -z 8M 10k")
				}
				qemutest.IO(t, top, work...)
			}
			qemutest.Img(t, "commit", "-f", "qcow2", filepath.Join(dirs[0], "top"))
			img, err := Open(filepath.Join(dirs[1], "top"), &OpenOptions{ReadWrite: true, Resolver: ResolveBeside(dirs[1])})
			if err != nil {
				t.Fatal(err)
			}
			err = errors.Join(img.Commit(t.Context(), nil), img.Close())
			if err != nil {
				t.Fatal(err)
			}
			qemutest.Compare(t, filepath.Join(dirs[0], "base"), tt.base, filepath.Join(dirs[1], "base"), tt.base)
			qemutest.Compare(t, filepath.Join(dirs[0], "top"), "qcow2", filepath.Join(dirs[1], "top"), "qcow2")
			qemutest.CheckClean(t, filepath.Join(dirs[1], "top"))
			if tt.base == "qcow2" {
				qemutest.CheckClean(t, filepath.Join(dirs[1], "base"))
			}
			size := func(dir string) any { return qemutest.Info(t, filepath.Join(dir, "base"))["virtual-size"] }
			if tt.base == "qcow2" && size(dirs[0]) != size(dirs[1]) {
				t.Errorf("the base has %v bytes, with qemu-img %v", size(dirs[1]), size(dirs[0]))
			}
		})
	}
}
