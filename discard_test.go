package qcow2

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// countingStorage counts the changes made to a storage, and keeps the ranges that were punched.
type countingStorage struct {
	Storage
	writes, written int64 // calls, bytes
	syncs           int
	punched         []clusterRange // in bytes
}

// WriteAt implements Storage.
func (s *countingStorage) WriteAt(p []byte, off int64) (int, error) {
	s.writes++
	s.written += int64(len(p))
	return s.Storage.WriteAt(p, off)
}

// Sync implements Storage.
func (s *countingStorage) Sync() error {
	s.syncs++
	return s.Storage.Sync()
}

// PunchHole implements Storage.
func (s *countingStorage) PunchHole(off, n int64) error {
	s.punched = append(s.punched, clusterRange{first: uint64(off), last: uint64(off + n - 1)})
	return s.Storage.PunchHole(off, n)
}

// punchedAll reports whether the n bytes at off were punched.
func (s *countingStorage) punchedAll(off, n uint64) bool {
	for at := off; at < off+n; {
		next := at
		for _, p := range s.punched {
			if p.first <= at && at <= p.last {
				next = p.last + 1
			}
		}
		if next == at {
			return false
		}
		at = next
	}
	return true
}

// newCounted creates an image in memory behind a countingStorage.
func newCounted(t *testing.T, size int64, o CreateOptions) (*Image, *countingStorage) {
	t.Helper()
	s := &countingStorage{Storage: NewMemoryStorage()}
	t.Cleanup(func() {
		if o.BackingFile == "" && o.DataFile == "" {
			checkByQEMU(t, s.Storage)
		}
	})
	return newTestImage(t, s, size, o), s
}

// TestDiscardRefused tries ranges outside the disk, unknown flags, images that take no change.
func TestDiscardRefused(t *testing.T) {
	const size = 1<<20 + 512
	img, s := newCounted(t, size, CreateOptions{})
	tests := []struct {
		off, n int64
		want   error
	}{
		{0, 0, nil}, {size, 0, nil}, {0, size, nil}, {size - 1, 1, nil},
		{-1, 1, ErrRange}, {0, -1, ErrRange}, {size, 1, ErrRange}, {0, size + 1, ErrRange}, {size + 1, 0, ErrRange},
		{1, math.MaxInt64, ErrRange}, {math.MaxInt64, math.MaxInt64, ErrRange},
	}
	for _, tt := range tests {
		if err := img.Discard(tt.off, tt.n); !errors.Is(err, tt.want) {
			t.Errorf("Discard(%d, %d): %v, want %v", tt.off, tt.n, err, tt.want)
		}
		if err := img.WriteZeroes(tt.off, tt.n, 0); !errors.Is(err, tt.want) {
			t.Errorf("WriteZeroes(%d, %d): %v, want %v", tt.off, tt.n, err, tt.want)
		}
	}
	if err := img.WriteZeroes(0, 512, 1<<5); !errors.Is(err, ErrOption) {
		t.Errorf("unknown flag: %v, want ErrOption", err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if err := img.Discard(0, 1); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("after Close: %v, want fs.ErrClosed", err)
	}
	ro, err := OpenStorage(s, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	if err := errors.Join(ro.Discard(0, 0)); !errors.Is(err, ErrReadOnly) {
		t.Errorf("read-only: %v, want ErrReadOnly", err)
	}
	if err := ro.WriteZeroes(0, 512, 0); !errors.Is(err, ErrReadOnly) {
		t.Errorf("read-only: %v, want ErrReadOnly", err)
	}
}

// TestDiscardOptions tries options that are refused.
func TestDiscardOptions(t *testing.T) {
	for _, o := range []*CreateOptions{
		{Open: &OpenOptions{Discard: 3}}, {Open: &OpenOptions{Discard: -1}}, {Version: 2, Open: &OpenOptions{DiscardNoUnref: true}},
	} {
		if _, err := CreateStorage(NewMemoryStorage(), 1<<20, o); !errors.Is(err, ErrOption) {
			t.Errorf("%+v: %v, want ErrOption", o.Open, err)
		}
	}
}

// TestDiscardUnmapped discards and zeroes what nothing maps: nothing is written, on a disk of any size. Over a backing
// file what it reaches gets zero clusters, and no more.
func TestDiscardUnmapped(t *testing.T) {
	const size = 1 << 50
	img, s := newCounted(t, size, CreateOptions{ClusterSize: 2 << 20})
	before := s.writes
	for _, f := range []func() error{
		func() error { return img.Discard(0, size) },
		func() error { return img.WriteZeroes(0, size, 0) },
		func() error { return img.WriteZeroes(5, size-7, ZeroMayUnmap) },
		img.Sync,
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	if s.writes != before {
		t.Errorf("%d writes", s.writes-before)
	}

	base := NewMemoryStorage()
	if _, err := base.WriteAt([]byte("base"), 4<<20); err != nil {
		t.Fatal(err)
	}
	disk, err := NewRawDisk(base)
	if err != nil {
		t.Fatal(err)
	}
	img, _ = newCounted(t, 64<<30, CreateOptions{BackingFile: "base", BackingFormat: "raw", Open: &OpenOptions{Backing: disk}})
	if err := img.Discard(0, 64<<30); err != nil {
		t.Fatal(err)
	}
	if err := wantAt(img, make([]byte, 8<<20), 0)(); err != nil {
		t.Error(err)
	}
	var got []Extent
	for e, err := range img.Extents(0, 64<<30) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e)
	}
	want := []Extent{
		{Off: 0, Len: 4<<20 + 64<<10, Kind: ExtentZero, HostOff: -1},
		{Off: 4<<20 + 64<<10, Len: 64<<30 - 4<<20 - 64<<10, Kind: ExtentUnallocated, HostOff: -1},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("extents (-want +got):\n%s", diff)
	}
}

// TestDiscardMissingBacking discards and zeroes an overlay that was opened without its backing file: what hides it is
// never dropped, and what cannot be known is refused.
func TestDiscardMissingBacking(t *testing.T) {
	for _, version := range []int{2, 3} {
		img, _ := newCounted(t, 1<<20, CreateOptions{Version: version, BackingFile: "base", BackingFormat: "raw"})
		mustWrite(t, img, pattern(1, 128<<10), 0)
		if err := img.Discard(0, 1<<20); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, 128<<10)
		if version == 2 {
			want = pattern(1, 128<<10)
		}
		if err := wantAt(img, want, 0)(); err != nil {
			t.Errorf("version %d: %v", version, err)
		}
		if err := img.WriteZeroes(0, 256<<10, ZeroMayUnmap); err != nil {
			t.Errorf("version %d: whole clusters: %v", version, err)
		}
		if err := wantAt(img, make([]byte, 256<<10), 0)(); err != nil {
			t.Errorf("version %d: %v", version, err)
		}
		err := img.WriteZeroes(512<<10+100, 100, 0)
		if version == 2 && !errors.Is(err, ErrBackingRequired) || version == 3 && err != nil {
			t.Errorf("version %d: part of a cluster: %v", version, err)
		}
	}
}

// TestDiscardModes frees clusters in every way, and wants the host to get back what OpenOptions.Discard says, and not
// before Sync.
func TestDiscardModes(t *testing.T) {
	const cs = 4096
	tests := []struct {
		name    string
		open    OpenOptions
		free    func(img *Image) error
		packed  bool // the cluster was compressed
		kind    clusterKind
		punched bool
		atOnce  bool // before Sync: the cluster stays, and is punched as a write of zeros in place
	}{
		{name: "discard", free: func(img *Image) error { return img.Discard(0, cs) }, kind: kindZeroPlain, punched: true},
		{name: "unmap", free: func(img *Image) error { return img.WriteZeroes(0, cs, ZeroMayUnmap) }, kind: kindZeroPlain, punched: true},
		{name: "zero", free: func(img *Image) error { return img.WriteZeroes(0, cs, 0) }, kind: kindZeroAlloc},
		{name: "discard compressed", packed: true, free: func(img *Image) error { return img.Discard(0, cs) }, kind: kindZeroPlain, punched: true},
		{name: "rewrite compressed", packed: true, free: func(img *Image) error { _, err := img.WriteAt(pattern(2, cs), 0); return err }, kind: kindNormal},
		{name: "all: rewrite compressed", open: OpenOptions{Discard: DiscardAll}, packed: true,
			free: func(img *Image) error { _, err := img.WriteAt(pattern(2, cs), 0); return err }, kind: kindNormal, punched: true},
		{name: "never: discard", open: OpenOptions{Discard: DiscardNever}, free: func(img *Image) error { return img.Discard(0, cs) }, kind: kindZeroPlain},
		{name: "no unref: discard", open: OpenOptions{DiscardNoUnref: true}, free: func(img *Image) error { return img.Discard(0, cs) },
			kind: kindZeroAlloc, punched: true, atOnce: true},
		{name: "no unref: unmap", open: OpenOptions{DiscardNoUnref: true}, free: func(img *Image) error { return img.WriteZeroes(0, cs, ZeroMayUnmap) },
			kind: kindZeroAlloc, punched: true, atOnce: true},
		{name: "no unref: zero", open: OpenOptions{DiscardNoUnref: true}, free: func(img *Image) error { return img.WriteZeroes(0, cs, 0) }, kind: kindZeroAlloc},
		{name: "no unref: discard compressed", open: OpenOptions{DiscardNoUnref: true}, packed: true,
			free: func(img *Image) error { return img.Discard(0, cs) }, kind: kindZeroPlain, punched: true},
		{name: "no unref, never: discard", open: OpenOptions{DiscardNoUnref: true, Discard: DiscardNever},
			free: func(img *Image) error { return img.Discard(0, cs) }, kind: kindZeroAlloc},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img, s := newCounted(t, 1<<20, CreateOptions{ClusterSize: cs, Open: &tt.open})
			var err error
			if tt.packed {
				err = img.WriteCompressed(pattern(1, cs), 0)
			} else {
				_, err = img.WriteAt(pattern(1, cs), 0)
			}
			if err = errors.Join(err, img.Sync()); err != nil {
				t.Fatal(err)
			}
			held := img.m.held(entryAt(t, img, 0))
			if err := tt.free(img); err != nil {
				t.Fatal(err)
			}
			if got := len(s.punched) > 0; got != tt.atOnce {
				t.Errorf("before Sync: punched %v, want %v", s.punched, tt.atOnce)
			}
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
			if got := s.punchedAll(held.first*cs, cs); got != tt.punched {
				t.Errorf("punched %v, want the cluster at %#x: %v", s.punched, held.first*cs, tt.punched)
			}
			if k := img.m.kind(entryAt(t, img, 0), 0); k != tt.kind {
				t.Errorf("the cluster is of kind %d, want %d", k, tt.kind)
			}
			want := uint64(0)
			if tt.kind == kindZeroAlloc {
				want = 1
			}
			if v, err := img.m.alloc.refcount(held.first); err != nil || v != want {
				t.Errorf("refcount %d (%v), want %d", v, err, want)
			}
		})
	}
}

// TestDiscardSharedHostCluster discards compressed clusters that share a host cluster: it is punched with the last of
// them, and the others read on.
func TestDiscardSharedHostCluster(t *testing.T) {
	const cs = 4096
	img, s := newCounted(t, 1<<20, CreateOptions{ClusterSize: cs, Open: &OpenOptions{Discard: DiscardAll}})
	for i := range int64(3) {
		if err := img.WriteCompressed(pattern(uint64(i), cs)[:cs], i*cs); err != nil {
			t.Fatal(err)
		}
	}
	shared := img.m.held(entryAt(t, img, 0)).first
	if got := img.m.held(entryAt(t, img, 2*cs)); got.first != shared {
		t.Fatalf("the clusters do not share a host cluster: %v, %d", got, shared)
	}
	for i := range int64(3) {
		if len(s.punched) > 0 {
			t.Fatalf("punched %v while %d clusters are left", s.punched, 3-i)
		}
		if err := errors.Join(img.Discard(i*cs, cs), img.Sync()); err != nil {
			t.Fatal(err)
		}
		for j := i + 1; j < 3; j++ {
			if err := wantAt(img, pattern(uint64(j), cs)[:cs], j*cs)(); err != nil {
				t.Error(err)
			}
		}
	}
	if !s.punchedAll(shared*cs, cs) {
		t.Errorf("punched %v, want the cluster at %#x", s.punched, shared*cs)
	}
}

// TestDiscardMeetsMetadata discards a guest cluster whose entry names a table: nothing is punched, the image is marked
// as corrupt and takes no more writes (I8).
func TestDiscardMeetsMetadata(t *testing.T) {
	const cs = 4096
	img, s := newCounted(t, 1<<20, CreateOptions{ClusterSize: cs})
	mustWrite(t, img, pattern(1, cs), 0)
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	bad := l2Entry{word: img.m.l1.load(0)&offsetMask | flagCopied}
	err := img.m.update(cs, img.flush, func(words []uint64, i uint64) { img.m.setEntry(words, i, bad) })
	if err = errors.Join(err, img.Sync(), img.Discard(cs, cs)); err != nil {
		t.Fatal(err)
	}
	_ = img.Sync()
	if len(s.punched) > 0 {
		t.Errorf("punched %v", s.punched)
	}
	if _, err := img.WriteAt(pattern(1, cs), 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("write: %v, want ErrCorrupt", err)
	}
	_ = img.Abandon()
	h, err := readHeader(s, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if h.incompatible&incompatCorrupt == 0 {
		t.Error("the image is not marked as corrupt")
	}
	s.Storage = &countingStorage{} // not for QEMU
}

// TestDiscardOnFullHost fills the host, discards and writes again: the space is found, without a Sync by the caller.
func TestDiscardOnFullHost(t *testing.T) {
	const cs = 4096
	for _, mode := range []DiscardMode{DiscardDefault, DiscardNever} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			s := &limitedStorage{Storage: NewMemoryStorage(), limit: 1 << 30}
			img, err := CreateStorage(s, 4<<20, &CreateOptions{ClusterSize: cs, Open: &OpenOptions{Discard: mode}})
			if err != nil {
				t.Fatal(err)
			}
			mustWrite(t, img, pattern(1, 2<<20), 0)
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
			s.limit, _ = s.Size()
			if _, err := img.WriteAt(pattern(2, 1<<20), 3<<20); !isNoSpace(err) {
				t.Fatalf("write on the full host: %v", err)
			}
			if err := img.Discard(0, 1<<20+64<<10); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, img, pattern(2, 1<<20), 3<<20)
			if err := wantAt(img, make([]byte, 1<<20), 0)(); err != nil {
				t.Error(err)
			}
			if err := wantAt(img, pattern(2, 1<<20), 3<<20)(); err != nil {
				t.Error(err)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			checkByQEMU(t, s.Storage)
		})
	}
}
