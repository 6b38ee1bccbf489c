package qcow2

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"

	"github.com/google/go-cmp/cmp"
)

// mustClose closes an image at the end of a test's work with it.
func mustClose(t testing.TB, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
}

// dirContents returns the contents of the files in dir by their names.
func dirContents(t testing.TB, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(b)
	}
	return files
}

// TestCreateRefuses has Create refuse to make an image over files that exist, and new ones beside them: no
// file changes, none stays behind, and none stays open.
func TestCreateRefuses(t *testing.T) {
	resolved := func(dir string) *OpenOptions { return &OpenOptions{Resolver: ResolveBeside(dir)} }
	unlocked := func(dir string) *OpenOptions {
		return &OpenOptions{Resolver: ResolveBeside(dir), Lock: LockOff}
	}
	over := func(name, format string) CreateOptions {
		return CreateOptions{BackingFile: name, BackingFormat: format, Overwrite: true}
	}
	tests := []struct {
		name string
		file string // "old", unless given
		opts CreateOptions
		open func(dir string) *OpenOptions
		want []error
	}{
		{name: "it exists", want: []error{fs.ErrExist}},
		{name: "its own backing file", opts: over("old", "qcow2"), open: resolved, want: []error{ErrChain}},
		{name: "its own backing file, unlocked", opts: over("old", "qcow2"), open: unlocked, want: []error{ErrChain}},
		{name: "its own raw backing file", opts: over("old", "raw"), open: resolved, want: []error{ErrChain}},
		{name: "its own backing file by another name", opts: over("link", "qcow2"), open: resolved, want: []error{ErrChain}},
		{name: "below its backing file", file: "base", opts: over("overlay", "qcow2"), open: resolved, want: []error{ErrChain}},
		{name: "new and its own backing file", file: "new", opts: over("new", "raw"), open: resolved, want: []error{ErrChain}},
		{name: "its own data file", opts: CreateOptions{DataFile: "old", Overwrite: true}, open: resolved, want: []error{ErrChain}},
		{name: "its own data file, unlocked", opts: CreateOptions{DataFile: "link", Overwrite: true}, open: unlocked, want: []error{ErrChain}},
		{name: "data file is backing file", opts: CreateOptions{DataFile: "base", BackingFile: "base", BackingFormat: "raw", Overwrite: true}, open: resolved, want: []error{ErrChain}},
		{name: "no backing file", opts: over("none", "raw"), open: resolved, want: []error{ErrResolve, fs.ErrNotExist}},
		{name: "new, no backing file", file: "new", opts: over("none", "raw"), open: resolved, want: []error{ErrResolve, fs.ErrNotExist}},
		{name: "backing file of another format", opts: over("base", "vmdk"), open: resolved, want: []error{ErrUnsupported}},
		{name: "backing file is no image", opts: over("text", "qcow2"), open: resolved, want: []error{ErrNotQcow2}},
		{name: "backing file without a format", opts: over("base", ""), open: resolved, want: []error{ErrOption}},
		{name: "no data file", opts: CreateOptions{DataFile: "none", Overwrite: true}, open: resolved, want: []error{ErrResolve, fs.ErrNotExist}},
		{name: "data file exists", file: "new", opts: CreateOptions{DataFile: "text"}, open: resolved, want: []error{fs.ErrExist}},
		{name: "nobody finds the data file", opts: CreateOptions{DataFile: "text", Overwrite: true}, want: []error{ErrBackingRequired}},
		{name: "beyond the limits", opts: CreateOptions{Overwrite: true}, want: []error{ErrLimit},
			open: func(string) *OpenOptions { return &OpenOptions{Limits: &Limits{VirtualSize: 1 << 19}} }},
		{name: "chain beyond the limits", opts: over("base", "qcow2"), want: []error{ErrChain, ErrLimit},
			open: func(dir string) *OpenOptions {
				return &OpenOptions{Resolver: ResolveBeside(dir), Limits: &Limits{ChainDepth: 1}}
			}},
		{name: "options of the open", file: "new", want: []error{ErrOption},
			open: func(string) *OpenOptions { return &OpenOptions{Lock: LockShare} }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			chainFile(t, filepath.Join(dir, "old"), nil)
			chainFile(t, filepath.Join(dir, "base"), nil)
			chainFile(t, filepath.Join(dir, "overlay"), overFile("base", "qcow2"))
			if err := os.WriteFile(filepath.Join(dir, "text"), []byte("no image"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Link(filepath.Join(dir, "old"), filepath.Join(dir, "link")); err != nil {
				t.Skip(err)
			}
			want, files := dirContents(t, dir), openFiles()
			if tt.open != nil {
				tt.opts.Open = tt.open(dir)
			}
			if tt.file == "" {
				tt.file = "old"
			}
			img, err := Create(filepath.Join(dir, tt.file), 1<<20, &tt.opts)
			if err == nil {
				mustClose(t, img)
			}
			for _, target := range tt.want {
				if !errors.Is(err, target) {
					t.Errorf("Create: %v, want %v", err, target)
				}
			}
			if diff := cmp.Diff(want, dirContents(t, dir)); diff != "" {
				t.Errorf("files changed (-want +got):\n%.2000s", diff)
			}
			if n := openFiles(); n != files {
				t.Errorf("%d files are open, want %d", n, files)
			}
		})
	}
}

// TestCreateStorageRefuses is TestCreateRefuses for storages and disks that the caller passes in.
func TestCreateStorageRefuses(t *testing.T) {
	old := func() *MemoryStorage {
		m := NewMemoryStorage()
		img, err := CreateStorage(m, 1<<20, nil)
		if err != nil {
			t.Fatal(err)
		}
		mustClose(t, img)
		return m
	}
	diskIn := func(m Storage, o *OpenOptions) *Image {
		img, err := OpenStorage(m, o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { mustClose(t, img) })
		return img
	}
	tests := []struct {
		name string
		opts func(s, other *MemoryStorage) *CreateOptions
		want error
	}{
		{"it holds something", func(s, other *MemoryStorage) *CreateOptions { return nil }, fs.ErrExist},
		{"its own backing disk", func(s, other *MemoryStorage) *CreateOptions {
			return &CreateOptions{Overwrite: true, Open: &OpenOptions{Backing: diskIn(s, nil)}}
		}, ErrChain},
		{"its own raw backing disk", func(s, other *MemoryStorage) *CreateOptions {
			raw, err := NewRawDisk(s)
			if err != nil {
				t.Fatal(err)
			}
			return &CreateOptions{Overwrite: true, Open: &OpenOptions{Backing: raw}}
		}, ErrChain},
		{"below its backing disk", func(s, other *MemoryStorage) *CreateOptions {
			return &CreateOptions{Overwrite: true, Open: &OpenOptions{Backing: diskIn(other, &OpenOptions{Backing: diskIn(s, nil)})}}
		}, ErrChain},
		{"its own data file", func(s, other *MemoryStorage) *CreateOptions {
			return &CreateOptions{DataFile: "d", Overwrite: true, Open: &OpenOptions{DataFile: s, Lock: LockOff}}
		}, ErrChain},
		{"data file in the backing disk", func(s, other *MemoryStorage) *CreateOptions {
			return &CreateOptions{DataFile: "d", Overwrite: true, Open: &OpenOptions{DataFile: other, Backing: diskIn(other, nil)}}
		}, ErrChain},
		{"data device too small", func(s, other *MemoryStorage) *CreateOptions {
			return &CreateOptions{DataFile: "d", Overwrite: true, Open: &OpenOptions{DataFile: NewMemoryDevice(1<<20 - 512)}}
		}, ErrOption},
		{"negative size", func(s, other *MemoryStorage) *CreateOptions { return nil }, ErrOption},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, other := old(), old()
			opts := tt.opts(s, other)
			want, wantOther := readAll(t, s), readAll(t, other)
			size := int64(1 << 20)
			if tt.name == "negative size" {
				size = -512
			}
			img, err := CreateStorage(s, size, opts)
			if err == nil {
				mustClose(t, img)
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("CreateStorage: %v, want %v", err, tt.want)
			}
			if !bytes.Equal(want, readAll(t, s)) || !bytes.Equal(wantOther, readAll(t, other)) {
				t.Error("a storage was changed")
			}
		})
	}
	t.Run("device too small", func(t *testing.T) {
		dev := NewMemoryDevice(100 << 10)
		want := readAll(t, dev)
		if _, err := CreateStorage(dev, 1<<20, &CreateOptions{Overwrite: true}); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("CreateStorage: %v, want ENOSPC", err)
		}
		if !bytes.Equal(want, readAll(t, dev)) {
			t.Error("the device was changed")
		}
	})
}

// TestCreateLocked overwrites images that somebody has open: they stay what they are.
func TestCreateLocked(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("SKIPPED: image locks are Linux's alone")
	}
	for _, readWrite := range []bool{false, true} {
		dir := t.TempDir()
		name := filepath.Join(dir, "image")
		img, err := Create(name, 1<<20, nil)
		if err != nil {
			t.Fatal(err)
		}
		text := []byte("still here")
		if _, err := img.WriteAt(text, 70_000); err != nil {
			t.Fatal(err)
		}
		mustClose(t, img)
		if img, err = Open(name, &OpenOptions{ReadWrite: readWrite}); err != nil {
			t.Fatal(err)
		}
		if !img.Info().Locked {
			qemutest.Missing(t, "no image locks here")
		}
		want := dirContents(t, dir)
		// The image, and the data file of another one.
		for _, create := range []func() (*Image, error){
			func() (*Image, error) { return Create(name, 1<<20, &CreateOptions{Overwrite: true}) },
			func() (*Image, error) {
				return Create(filepath.Join(dir, "other"), 1<<20, &CreateOptions{DataFile: "image", Overwrite: true, Open: &OpenOptions{Resolver: ResolveBeside(dir)}})
			},
		} {
			if img, err := create(); !errors.Is(err, ErrLocked) {
				t.Errorf("Create: %v, want ErrLocked", err)
				if err == nil {
					img.Abandon()
				}
			}
			if diff := cmp.Diff(want, dirContents(t, dir)); diff != "" {
				t.Errorf("files changed (-want +got):\n%.2000s", diff)
			}
		}
		got := make([]byte, len(text))
		if _, err := img.ReadAt(got, 70_000); err != nil || !bytes.Equal(text, got) {
			t.Errorf("ReadAt: %q, %v", got, err)
		}
		mustClose(t, img)
	}
}

// TestCreateResolvesOnce counts what the resolver is asked for, and what stays open after Close.
func TestCreateResolvesOnce(t *testing.T) {
	dir := t.TempDir()
	chainFile(t, filepath.Join(dir, "base"), nil)
	chainFile(t, filepath.Join(dir, "overlay"), overFile("base", "qcow2"))
	if err := os.WriteFile(filepath.Join(dir, "data"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	files := openFiles()
	r := &countingResolver{Resolver: ResolveBeside(dir)}
	img, err := Create(filepath.Join(dir, "top"), 1<<20, &CreateOptions{
		DataFile: "data", BackingFile: "overlay", BackingFormat: "qcow2", Open: &OpenOptions{Resolver: r},
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.asked != 3 {
		t.Errorf("the resolver was asked %d times for three files", r.asked)
	}
	buf := make([]byte, 1<<20)
	buf[0] = 1
	if _, err := img.WriteAt(buf[:1], 0); err != nil {
		t.Error(err)
	}
	if _, err := img.ReadAt(buf, 0); err != nil || buf[0] != 1 {
		t.Errorf("ReadAt: %v", err)
	}
	if _, ok := img.Backing().(*Image); !ok {
		t.Errorf("Backing is %T", img.Backing())
	}
	mustClose(t, img)
	if n := openFiles(); n != files {
		t.Errorf("%d files are open after Close, want %d", n, files)
	}
}

// TestCreateSyncsDirectory watches how Create makes the name of a file durable.
func TestCreateSyncsDirectory(t *testing.T) {
	errBroken := errors.New("broken")
	tests := []struct {
		name   string
		old    bool // the file exists
		err    error
		want   error // of Create
		synced bool
	}{
		{name: "new", synced: true},
		{name: "overwritten", old: true},
		{name: "no such thing here", err: errors.ErrUnsupported, synced: true},
		{name: "broken", err: errBroken, want: errBroken, synced: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			name := filepath.Join(dir, "image")
			if tt.old {
				chainFile(t, name, nil)
			}
			var synced []string
			files := openFiles()
			img, err := createFile(name, 1<<20, &CreateOptions{Overwrite: tt.old}, func(d string) error {
				synced = append(synced, d)
				if info, err := os.Stat(name); err != nil || info.Size() == 0 {
					t.Errorf("the directory is synced before there is an image: %v", err)
				}
				return tt.err
			})
			if !errors.Is(err, tt.want) {
				t.Errorf("Create: %v, want %v", err, tt.want)
			}
			if err == nil {
				mustClose(t, img)
			}
			if _, serr := os.Stat(name); (serr == nil) != (err == nil) {
				t.Errorf("the file is there: %v", serr)
			}
			var want []string
			if tt.synced {
				want = []string{dir}
			}
			if !slices.Equal(want, synced) {
				t.Errorf("synced %q, want %q", synced, want)
			}
			if n := openFiles(); n != files {
				t.Errorf("%d files are open, want %d", n, files)
			}
		})
	}
}

// TestCreateRemovesItsOwn has somebody replace the file while Create makes it, and Create fail then: what is
// removed is never his.
func TestCreateRemovesItsOwn(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("an open file cannot be replaced")
	}
	dir := t.TempDir()
	name := filepath.Join(dir, "image")
	errBroken := errors.New("broken")
	_, err := createFile(name, 1<<20, nil, func(string) error {
		if err := os.WriteFile(name+"2", []byte("his"), 0o600); err != nil {
			t.Error(err)
		}
		return errors.Join(errBroken, os.Rename(name+"2", name))
	})
	if !errors.Is(err, errBroken) {
		t.Errorf("Create: %v", err)
	}
	if diff := cmp.Diff(map[string]string{"image": "his"}, dirContents(t, dir)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// untruncated is a storage that grows and cannot be truncated.
type untruncated struct{ *MemoryStorage }

// Truncate refuses.
func (untruncated) Truncate(int64) error { return errors.ErrUnsupported }

// TestCreateWithoutTruncate creates images on storages that cannot be truncated, empty or full of garbage.
func TestCreateWithoutTruncate(t *testing.T) {
	garbage := func(n int) untruncated {
		m := NewMemoryStorage()
		if _, err := m.WriteAt(bytes.Repeat([]byte{0xa5}, n), 0); err != nil {
			t.Fatal(err)
		}
		return untruncated{m}
	}
	for _, cluster := range []int{512, 4096, 64 << 10} {
		for _, old := range []int{0, 100, 6000, 3 << 20} {
			for _, o := range []CreateOptions{{}, {DataFile: "d"}, {DataFile: "d", DataFileRaw: true}} {
				s, data := garbage(old), garbage(old)
				o.ClusterSize, o.Overwrite = cluster, true
				o.Open = &OpenOptions{DataFile: data}
				img, err := CreateStorage(s, 1<<20, &o)
				if err != nil {
					t.Fatalf("clusters of %d, %d bytes of garbage, %+v: %v", cluster, old, o, err)
				}
				want := make([]byte, 1<<20)
				copy(want[5000:], "text")
				if _, err := img.WriteAt(want[5000:5004], 5000); err != nil {
					t.Fatal(err)
				}
				mustClose(t, img)
				if img, err = OpenStorage(s, &OpenOptions{DataFile: data}); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(want))
				if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(want, got) {
					t.Errorf("clusters of %d, %d bytes of garbage, %+v: %v, or other bytes than written", cluster, old, o, err)
				}
				mustClose(t, img)
				if raw := readAll(t, data.MemoryStorage); o.DataFileRaw && (len(raw) < len(want) || !bytes.Equal(want, raw[:len(want)])) {
					t.Errorf("clusters of %d, %d bytes of garbage: the raw data file is not the disk", cluster, old)
				}
			}
		}
	}
}

// TestCreateDeviceFits creates an image over a data device that is just as large as the disk.
func TestCreateDeviceFits(t *testing.T) {
	data := NewMemoryDevice(1 << 20)
	img, err := CreateStorage(NewMemoryStorage(), 1<<20, &CreateOptions{DataFile: "d", Overwrite: true, Open: &OpenOptions{DataFile: data}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.WriteAt([]byte("end"), 1<<20-3); err != nil {
		t.Error(err)
	}
	mustClose(t, img)
}
