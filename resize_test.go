package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// resizeCase is a kind of image that is resized.
type resizeCase struct {
	name   string
	create CreateOptions
	size   int64
	base   int64 // bytes of the backing file; 0: none
	device bool
}

// resizeCases are the kinds of images.
func resizeCases() []resizeCase {
	over := func(o CreateOptions) CreateOptions {
		o.BackingFile, o.BackingFormat = "base", "raw"
		return o
	}
	return []resizeCase{
		{name: "512", create: CreateOptions{ClusterSize: 512}, size: 100<<10 + 512},
		{name: "512 refcounts of 64 bits", create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, size: 200 << 10},
		{name: "1k refcounts of a bit", create: CreateOptions{ClusterSize: 1024, RefcountBits: 1}, size: 100<<10 + 512},
		{name: "4k lazy", create: CreateOptions{ClusterSize: 4096, LazyRefcounts: true}, size: 300<<10 + 512},
		{name: "64k", create: CreateOptions{}, size: 1<<20 + 1024},
		{name: "version 2", create: CreateOptions{Version: 2, ClusterSize: 1024}, size: 100<<10 + 512},
		{name: "version 2 over a base", create: over(CreateOptions{Version: 2, ClusterSize: 1024}), size: 100<<10 + 512, base: 200 << 10},
		{name: "over a base", create: over(CreateOptions{ClusterSize: 1024}), size: 100<<10 + 512, base: 300<<10 + 512},
		{name: "over a short base", create: over(CreateOptions{ClusterSize: 4096}), size: 100<<10 + 512, base: 50 << 10},
		{name: "extended", create: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}, size: 300<<10 + 512},
		{name: "extended over a base", create: over(CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}), size: 300<<10 + 512, base: 600 << 10},
		{name: "data file", create: CreateOptions{ClusterSize: 1024, DataFile: "data"}, size: 100<<10 + 512},
		{name: "data file over a base", create: over(CreateOptions{ClusterSize: 1024, DataFile: "data"}), size: 100<<10 + 512, base: 300 << 10},
		{name: "raw data file", create: CreateOptions{ClusterSize: 1024, DataFile: "data", DataFileRaw: true}, size: 100<<10 + 512},
		{name: "device", create: CreateOptions{ClusterSize: 512}, size: 100<<10 + 512, device: true},
		{name: "version 2 device over a base", create: over(CreateOptions{Version: 2, ClusterSize: 512}), size: 100<<10 + 512, base: 200 << 10, device: true},
		{name: "raw data file on a device", create: CreateOptions{ClusterSize: 1024, DataFile: "data", DataFileRaw: true}, size: 100 << 10, device: true},
	}
}

// resizeRun is one image under work, and what it must read.
type resizeRun struct {
	testing.TB
	c       resizeCase
	image   *MemoryStorage
	data    *MemoryStorage
	backing Disk
	base    []byte
	img     *Image
	want    []byte
	rng     *rand.Rand
	history []string
}

// newResizeRun creates the image.
func newResizeRun(t testing.TB, c resizeCase, seed uint64) *resizeRun {
	r := &resizeRun{TB: t, c: c, rng: rand.New(rand.NewPCG(seed, 7))}
	storage := func() *MemoryStorage {
		if c.device {
			return NewMemoryDevice(8 << 20)
		}
		return NewMemoryStorage()
	}
	r.image, r.data = storage(), storage()
	r.want = make([]byte, c.size)
	if c.base > 0 {
		r.base = fillRepeated(c.base)
		r.backing = newTestRaw(t, r.base)
		copy(r.want, r.base)
	}
	o := c.create
	o.Open, o.Overwrite = r.open(), true
	img, err := CreateStorage(r.image, c.size, &o)
	if err != nil {
		t.Fatal(err)
	}
	r.img = img
	return r
}

// open returns the options of an open.
func (r *resizeRun) open() *OpenOptions {
	o := &OpenOptions{ReadWrite: true, Backing: r.backing, L2CacheBytes: 1, RefcountCacheBytes: 1}
	if r.c.create.DataFile != "" {
		o.DataFile = r.data
	}
	return o
}

// note remembers what was done, for the report of a failure.
func (r *resizeRun) note(format string, args ...any) {
	r.history = append(r.history, fmt.Sprintf(format, args...))
}

// write writes n bytes at off, compressed if the image can and they are clusters.
func (r *resizeRun) write(off, n int64) {
	if n == 0 {
		return
	}
	r.note("write %#x+%#x", off, n)
	p := r.want[off : off+n]
	crashContent(p, off, r.rng.Uint64()>>40, true)
	var err error
	if cs := int64(r.img.m.clusterSize); !r.img.m.external && off%cs == 0 && (n%cs == 0 || off+n == int64(len(r.want))) && r.rng.IntN(2) == 0 {
		err = r.img.WriteCompressed(p, off)
	} else {
		_, err = r.img.WriteAt(p, off)
	}
	if err != nil {
		r.Fatalf("write %#x+%#x: %v\n%q", off, n, err, r.history)
	}
}

// resize changes the size, and what must be read.
func (r *resizeRun) resize(size int64, o ResizeOptions) {
	r.note("resize %#x %s", size, o.Preallocation)
	if err := r.img.Resize(r.Context(), size, &o); err != nil {
		r.Fatalf("resize from %#x to %#x: %v\n%q", len(r.want), size, err, r.history)
	}
	if n := int64(len(r.want)); size <= n {
		r.want = r.want[:size:size]
	} else {
		r.want = append(r.want, make([]byte, size-n)...)
	}
}

// judge looks at everything: content, references, the length of the data file.
func (r *resizeRun) judge() {
	r.Helper()
	if err := r.img.Sync(); err != nil {
		r.Fatal(err)
	}
	expectReads(r, r.img, r.want)
	if !r.c.create.LazyRefcounts {
		walkClean(r, r.image)
	}
	if r.c.create.DataFileRaw {
		got := make([]byte, len(r.want))
		if n, err := r.data.ReadAt(got, 0); n < len(got) {
			r.Errorf("the data file has %d bytes of %d: %v", n, len(got), err)
		}
		if !bytes.Equal(got, r.want) {
			r.Error("the raw data file does not read as the disk")
		}
	}
	if size, _ := r.data.Size(); r.c.create.DataFile != "" && !r.c.device && size != int64(len(r.want)) {
		r.Errorf("a data file of %d bytes for a disk of %d", size, len(r.want))
	}
	if r.Failed() {
		r.Fatalf("%q", r.history)
	}
}

// reopen closes and opens the image.
func (r *resizeRun) reopen() {
	r.note("reopen")
	if err := r.img.Close(); err != nil {
		r.Fatalf("close: %v\n%q", err, r.history)
	}
	walkClean(r, r.image)
	img, err := OpenStorage(r.image, r.open())
	if err != nil {
		r.Fatalf("open: %v\n%q", err, r.history)
	}
	r.img = img
}

// TestResize resizes images of every kind at random, between writes, and compares them with a model.
func TestResize(t *testing.T) {
	steps := 30
	if testing.Short() {
		steps = 15
	}
	for i, c := range resizeCases() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newResizeRun(t, c, uint64(i))
			for range steps {
				n := int64(len(r.want))
				switch r.rng.IntN(8) {
				case 0, 1, 2:
					if n > 0 {
						off := r.rng.Int64N(n/512) * 512
						r.write(off, min(n-off, (1+r.rng.Int64N(12))*512))
					}
				case 3:
					if n > 0 {
						cs := int64(r.img.m.clusterSize)
						off := r.rng.Int64N((n+cs-1)/cs) * cs
						r.write(off, min(n-off, cs))
					}
				case 4, 5:
					o := ResizeOptions{}
					if r.rng.IntN(2) == 0 {
						o.Preallocation = Preallocation(r.rng.IntN(4))
					}
					r.resize(n+512+r.rng.Int64N(c.size/512)*512, o)
					r.judge()
				case 6:
					size := r.rng.Int64N(n/512+1) * 512
					if r.rng.IntN(12) == 0 {
						size = 0
					}
					r.resize(size, ResizeOptions{Shrink: true})
					r.judge()
				default:
					r.reopen()
					r.judge()
				}
				if len(r.want) > 2<<20 {
					r.resize(c.size, ResizeOptions{Shrink: true})
				}
			}
			r.judge()
			r.reopen()
			mustClose(t, r.img)
		})
	}
}

// TestResizeRefused has Resize refuse what it cannot do, with nothing written.
func TestResizeRefused(t *testing.T) {
	tests := []struct {
		name string
		c    resizeCase
		size int64
		o    ResizeOptions
		want error
	}{
		{name: "no sectors", size: 1000, want: ErrOption},
		{name: "negative", size: -512, want: ErrOption},
		{name: "smaller", size: 512, want: ErrOption},
		{name: "smaller, preallocated", size: 512, o: ResizeOptions{Shrink: true, Preallocation: PreallocationFull}, want: ErrOption},
		{name: "no such mode", size: 1 << 30, o: ResizeOptions{Preallocation: 9}, want: ErrOption},
		{name: "beyond the L1 table", size: math.MaxInt64 &^ 511, want: ErrTooLarge},
		{name: "beyond the refcount table", c: resizeCase{create: CreateOptions{ClusterSize: 512, RefcountBits: 64}}, size: 64 << 30,
			o: ResizeOptions{Preallocation: PreallocationMetadata}, want: ErrTooLarge},
		{name: "beyond the data file", c: resizeCase{device: true, create: CreateOptions{DataFile: "data"}}, size: 1 << 30, want: ErrOption},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.c.size = 1 << 20
			r := newResizeRun(t, tt.c, 1)
			r.write(0, 1<<20)
			if err := r.img.Sync(); err != nil {
				t.Fatal(err)
			}
			before := memoryBytes(t, r.image)
			if err := r.img.Resize(t.Context(), tt.size, &tt.o); !errors.Is(err, tt.want) {
				t.Errorf("Resize: %v, want %v", err, tt.want)
			}
			if !bytes.Equal(before, memoryBytes(t, r.image)) {
				t.Error("the image changed")
			}
			r.judge()
			mustClose(t, r.img)
		})
	}
}

// TestResizeLimits has Resize keep to the limits of the open.
func TestResizeLimits(t *testing.T) {
	s := NewMemoryStorage()
	img, err := CreateStorage(s, 1<<20, &CreateOptions{ClusterSize: 512, Open: &OpenOptions{Limits: &Limits{VirtualSize: 1 << 30, MetadataBytes: 64 << 10}}})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, img)
	var limit *LimitError
	if err := img.Resize(t.Context(), 2<<30, nil); !errors.As(err, &limit) || limit.Limit != "VirtualSize" {
		t.Errorf("beyond VirtualSize: %v", err)
	}
	if err := img.Resize(t.Context(), 1<<30, nil); !errors.As(err, &limit) || limit.Limit != "MetadataBytes" {
		t.Errorf("beyond MetadataBytes: %v", err)
	}
	if err := img.Resize(t.Context(), 64<<20, nil); err != nil {
		t.Error(err)
	}
}

// memoryBytes returns what a storage holds.
func memoryBytes(t testing.TB, s *MemoryStorage) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := s.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestResizeGivesBack has a shrink cut the image file behind the last cluster in use, refcount blocks included, and
// a growth and shrink forth and back leave a file of the same length.
func TestResizeGivesBack(t *testing.T) {
	for _, bits := range []int{1, 16, 64} {
		t.Run(fmt.Sprint(bits), func(t *testing.T) {
			s := NewMemoryStorage()
			img, err := CreateStorage(s, 64<<10, &CreateOptions{ClusterSize: 512, RefcountBits: bits})
			if err != nil {
				t.Fatal(err)
			}
			writeAll(t, img, 0, 64<<10)
			var sizes []int64
			for range 6 {
				if err := img.Resize(t.Context(), 1<<20, &ResizeOptions{Preallocation: PreallocationMetadata}); err != nil {
					t.Fatal(err)
				}
				writeAll(t, img, 64<<10, 1<<20)
				if err := img.Resize(t.Context(), 64<<10, &ResizeOptions{Shrink: true}); err != nil {
					t.Fatal(err)
				}
				walkClean(t, s)
				n, _ := s.Size()
				sizes = append(sizes, n)
			}
			mustClose(t, img)
			if last := sizes[len(sizes)-1]; last > sizes[1] || last > 160<<10 {
				t.Errorf("the file has %v bytes after each shrink", sizes)
			}
		})
	}
}

// writeAll writes the bytes from off to end.
func writeAll(t testing.TB, img *Image, off, end int64) {
	t.Helper()
	p := make([]byte, end-off)
	crashContent(p, off, 3, true)
	if _, err := img.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

// TestResizeSnapshots resizes an image whose clusters a snapshot shares: the snapshot stays as it is. Version 2 has
// one size for all.
func TestResizeSnapshots(t *testing.T) {
	for _, version := range []int{2, 3} {
		s := NewMemoryStorage()
		img, err := CreateStorage(s, 60<<10+512, &CreateOptions{ClusterSize: 1024, Version: version})
		if err != nil {
			t.Fatal(err)
		}
		writeAll(t, img, 0, 60<<10+512)
		mustClose(t, img)
		b := addTestSnapshot(t, memoryBytes(t, s))
		if _, err := s.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		img, err = OpenStorage(s, &OpenOptions{ReadWrite: true})
		if err != nil {
			t.Fatal(err)
		}
		if version == 2 {
			for _, size := range []int64{1 << 20, 512} {
				if err := img.Resize(t.Context(), size, &ResizeOptions{Shrink: true}); !errors.Is(err, ErrUnsupported) {
					t.Errorf("version 2: %v", err)
				}
			}
			mustClose(t, img)
			continue
		}
		want := make([]byte, 60<<10+512)
		crashContent(want, 0, 3, true)
		for _, size := range []int64{40<<10 + 512, 100 << 10, 512, 0, 2 << 20, 30 << 10} {
			if err := img.Resize(t.Context(), size, &ResizeOptions{Shrink: true}); err != nil {
				t.Fatal(err)
			}
			want = want[:min(int64(len(want)), size)]
			want = append(want, make([]byte, size-int64(len(want)))...)
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
			expectReads(t, img, want)
			walkClean(t, s)
		}
		mustClose(t, img)
		snap := make([]byte, 60<<10+512)
		crashContent(snap, 0, 3, true)
		expectSnapshotContent(t, s, snap)
	}
}

// expectSnapshotContent fails the test unless the only snapshot of the image in s reads want.
func expectSnapshotContent(t testing.TB, s *MemoryStorage, want []byte) {
	t.Helper()
	size, _ := s.Size()
	got, err := refwalk.ReadGuest(refwalk.Source{Image: s, Size: size, Snapshot: 1})
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the snapshot changed: %d bytes, want %d, %v", len(got), len(want), err)
	}
}

// TestResizeCancelled ends a growth by its context: the disk is as before.
func TestResizeCancelled(t *testing.T) {
	r := newResizeRun(t, resizeCase{create: CreateOptions{ClusterSize: 512}, size: 60 << 10}, 1)
	r.write(0, 30<<10)
	ctx, cancel := context.WithCancel(t.Context())
	o := ResizeOptions{Preallocation: PreallocationFull, Progress: func(done, total int64) {
		if done < total {
			cancel()
		}
	}}
	if err := r.img.Resize(ctx, 100<<20, &o); !errors.Is(err, context.Canceled) {
		t.Errorf("Resize: %v", err)
	}
	if err := r.img.Resize(ctx, 512, &ResizeOptions{Shrink: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("Resize: %v", err)
	}
	if err := r.img.Sync(); err != nil {
		t.Fatal(err)
	}
	r.judge()
	r.resize(1<<20, ResizeOptions{})
	r.judge()
	mustClose(t, r.img)
}

// TestResizeProgress has the progress end with the total, and never go back.
func TestResizeProgress(t *testing.T) {
	r := newResizeRun(t, resizeCase{create: CreateOptions{ClusterSize: 512}, size: 60 << 10}, 1)
	for _, o := range []struct {
		size int64
		ResizeOptions
	}{{8 << 20, ResizeOptions{Preallocation: PreallocationMetadata}}, {9 << 20, ResizeOptions{}}, {1 << 20, ResizeOptions{Shrink: true}}} {
		old := r.img.Size()
		var done []int64
		o.Progress = func(n, total int64) {
			if want := max(o.size, old) - min(o.size, old); total != want {
				t.Errorf("a total of %d, want %d", total, want)
			}
			done = append(done, n)
		}
		r.resize(o.size, o.ResizeOptions)
		if !slices.IsSorted(done) || len(done) == 0 || done[len(done)-1] != max(o.size, old)-min(o.size, old) {
			t.Errorf("progress: %v", done)
		}
	}
	mustClose(t, r.img)
}

// TestResizeFull grows a disk, with all of it written, on a host that has no room: everything is as before, and what
// was taken of the host is given back.
func TestResizeFull(t *testing.T) {
	s := &cappedStorage{MemoryStorage: NewMemoryStorage(), most: 4 << 20}
	img, err := CreateStorage(s, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	writeAll(t, img, 0, 1<<20)
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	before, _ := s.Size()
	for _, mode := range []Preallocation{PreallocationFull, PreallocationFalloc} {
		if err := img.Resize(t.Context(), 16<<20, &ResizeOptions{Preallocation: mode}); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s: %v, want ENOSPC", mode, err)
		}
		if n, _ := s.Size(); n > before+64<<10 {
			t.Errorf("%s: the file has %d bytes, and had %d", mode, n, before)
		}
	}
	want := make([]byte, 1<<20)
	crashContent(want, 0, 3, true)
	expectReads(t, img, want)
	s.most = 32 << 20
	if err := img.Resize(t.Context(), 16<<20, &ResizeOptions{Preallocation: PreallocationFull}); err != nil {
		t.Error(err)
	}
	mustClose(t, img)
	walkClean(t, s)
}

// cappedStorage has room for so many bytes.
type cappedStorage struct {
	*MemoryStorage
	most int64
}

// WriteAt fails beyond the end of the room.
func (s *cappedStorage) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > s.most {
		return 0, syscall.ENOSPC
	}
	return s.MemoryStorage.WriteAt(p, off)
}

// Allocate fails beyond the end of the room.
func (s *cappedStorage) Allocate(off, n int64) error {
	if off+n > s.most {
		return syscall.ENOSPC
	}
	return s.MemoryStorage.Allocate(off, n)
}

// TestResizeBeside resizes an image while others read, write and sync it. Each writer owns a range below the smallest
// size and checks what it wrote; one reads whatever there is, which is zeros or written content; those at the moving
// end get their bytes, or are told that they are beyond it.
func TestResizeBeside(t *testing.T) {
	for _, o := range []CreateOptions{{ClusterSize: 512}, {ClusterSize: 4096, LazyRefcounts: true}, {ClusterSize: 16 << 10, ExtendedL2: true}} {
		const least, most, part = 256 << 10, 2 << 20, 64 << 10
		s := NewMemoryStorage()
		o.Open = &OpenOptions{L2CacheBytes: 1, RefcountCacheBytes: 1}
		img, err := CreateStorage(s, least, &o)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		errs := make(chan error, 8)
		seeds := uint64(1)
		var wg sync.WaitGroup
		beside := func(f func(rng *rand.Rand, k int) error) {
			wg.Add(1)
			seed := seeds
			seeds++
			go func() {
				defer wg.Done()
				rng := rand.New(rand.NewPCG(seed, 3))
				for k := 0; ; k++ {
					select {
					case <-done:
						return
					default:
					}
					if err := f(rng, k); err != nil {
						errs <- err
						return
					}
				}
			}()
		}
		for w := range int64(2) {
			beside(func(rng *rand.Rand, k int) error {
				off := w*part + rng.Int64N(part-9000)
				p := bytes.Repeat([]byte{byte(k)}, 1+rng.IntN(9000))
				if _, err := img.WriteAt(p, off); err != nil {
					return err
				}
				got := make([]byte, len(p))
				if _, err := img.ReadAt(got, off); err != nil {
					return err
				}
				if !bytes.Equal(got, p) {
					return fmt.Errorf("wrote %d bytes of %d at %#x, and read others", len(p), p[0], off)
				}
				return nil
			})
		}
		beside(func(rng *rand.Rand, _ int) error { // at the moving end
			p := bytes.Repeat([]byte{0xee}, 5000)
			_, err := img.WriteAt(p, least+rng.Int64N(most-least))
			if errors.Is(err, ErrRange) {
				err = nil
			}
			return err
		})
		beside(func(rng *rand.Rand, _ int) error {
			p := make([]byte, 20_000)
			n, err := img.ReadAt(p, least+rng.Int64N(most-least))
			for _, b := range p[:n] {
				if b != 0 && b != 0xee {
					return fmt.Errorf("read %#x behind what is written so", b)
				}
			}
			if err == io.EOF {
				err = nil
			}
			return err
		})
		beside(func(*rand.Rand, int) error { return img.Sync() })
		rng := rand.New(rand.NewPCG(1, 2))
		rounds := 25
		if testing.Short() {
			rounds = 8
		}
		for range rounds {
			ro := ResizeOptions{Shrink: true}
			size := least + rng.Int64N((most-least)/512)*512
			if size > img.Size() && rng.IntN(2) == 0 {
				ro.Preallocation = PreallocationMetadata
			}
			if err := img.Resize(t.Context(), size, &ro); err != nil {
				t.Fatal(err)
			}
		}
		close(done)
		wg.Wait()
		select {
		case err := <-errs:
			t.Error(err)
		default:
		}
		mustClose(t, img)
		walkClean(t, s)
	}
}

// TestResizeUnmappedTail grows a disk over a longer backing file where nothing is mapped yet, so that the zeros behind
// the old end and those of the new clusters need the same L2 table: both must be in it.
func TestResizeUnmappedTail(t *testing.T) {
	const old, size = 5*4096 + 512, 9 * 4096
	below := NewMemoryStorage()
	if _, err := below.WriteAt(bytes.Repeat([]byte{0xb5}, 64<<10), 0); err != nil {
		t.Fatal(err)
	}
	for _, version := range []int{2, 3} {
		t.Run(fmt.Sprint("version ", version), func(t *testing.T) {
			disk, err := NewRawDisk(below)
			if err != nil {
				t.Fatal(err)
			}
			img, err := CreateStorage(NewMemoryStorage(), old, &CreateOptions{
				Version: version, ClusterSize: 4096, BackingFile: "below", BackingFormat: "raw", Open: &OpenOptions{Backing: disk},
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := img.Resize(context.Background(), size, nil); err != nil {
				t.Fatal(err)
			}
			want := append(bytes.Repeat([]byte{0xb5}, old), make([]byte, size-old)...)
			got := make([]byte, size)
			if _, err := img.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if err := difference(got, want, 0); err != nil {
				t.Error(err)
			}
			if res, err := img.Check(context.Background(), nil); err != nil || !res.Clean() {
				t.Errorf("check: %+v, %v", res, err)
			}
			mustClose(t, img)
		})
	}
}
