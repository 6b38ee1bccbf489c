package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// convertContent returns n bytes as a disk has them: data that packs and data that does not, and zeros, long and short,
// aligned and not.
func convertContent(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 0))
	p := make([]byte, n)
	for off := 0; off < n; {
		run := min(n-off, 512*(1+rng.IntN(1<<rng.IntN(10))))
		b := p[off : off+run]
		switch rng.IntN(4) {
		case 0:
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
		case 1, 2:
			for i := range b {
				b[i] = byte(rng.Uint32()&3) + 1
			}
		}
		off += run
	}
	return p
}

// knownDisk is a Disk in memory that knows which of its groups of 4 KiB are zeros. Reads of some sectors fail.
type knownDisk struct {
	content []byte
	bad     map[int64]bool // sectors that cannot be read
	reads   atomic.Int64
	failAt  int64 // the read that fails, from 1; 0: none
	onRead  func(n int64)
}

// errBadSector is what reads of bad sectors return.
var errBadSector = errors.New("bad sector")

// Size returns the length of the content.
func (d *knownDisk) Size() int64 { return int64(len(d.content)) }

// ReadAt reads, slower or faster by chance of the scheduler.
func (d *knownDisk) ReadAt(p []byte, off int64) (int, error) {
	k := d.reads.Add(1)
	if d.onRead != nil {
		d.onRead(k)
	}
	if k == d.failAt {
		return 0, errBadSector
	}
	for s := off / sectorSize; s*sectorSize < off+int64(len(p)) && len(d.bad) > 0; s++ {
		if d.bad[s] {
			return 0, errBadSector
		}
	}
	return bytes.NewReader(d.content).ReadAt(p, off)
}

// Extents yields the zeros as such.
func (d *knownDisk) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for end := min(off+n, d.Size()); off < end; {
			k := min(4096-off%4096, end-off)
			e := Extent{Off: off, Len: k, Kind: ExtentData, HostOff: off}
			if isZero(d.content[off:][:k]) {
				e.Kind, e.HostOff = ExtentZero, -1
			}
			if !yield(e, nil) {
				return
			}
			off += k
		}
	}
}

// convertTarget is a kind of target, and options to fill it.
type convertTarget struct {
	name   string
	create *CreateOptions // nil: a raw disk
	opts   ConvertOptions
	more   int64                                      // bytes by which it is larger than the source
	below  []byte                                     // content of the disk below, or nil
	fill   func(t *testing.T, dst WritableDisk) error // what it holds before, or nil
}

// convertTargets are the targets of the tests.
func convertTargets() []convertTarget {
	old := func(t *testing.T, dst WritableDisk) error {
		_, err := dst.WriteAt(convertContent(7, int(dst.Size())), 0)
		return err
	}
	return []convertTarget{
		{name: "raw"},
		{name: "raw over content", fill: old, more: 1 << 20},
		{name: "raw without holes", opts: ConvertOptions{Zeroes: ZeroesData}},
		{name: "qcow2", create: &CreateOptions{}},
		{name: "larger", create: &CreateOptions{}, more: 3 << 20},
		{name: "no detection", create: &CreateOptions{}, opts: ConvertOptions{SparseSize: -1}},
		{name: "zero clusters", create: &CreateOptions{}, opts: ConvertOptions{Zeroes: ZeroesClusters}},
		{name: "extended, zero clusters", create: &CreateOptions{ExtendedL2: true}, opts: ConvertOptions{Zeroes: ZeroesClusters}},
		{name: "all allocated", create: &CreateOptions{}, opts: ConvertOptions{Zeroes: ZeroesData}},
		{name: "small clusters", create: &CreateOptions{ClusterSize: 512}}, // its refcount table moves
		{name: "large clusters", create: &CreateOptions{ClusterSize: 2 << 20}},
		{name: "known zero", create: &CreateOptions{RefcountBits: 1}, opts: ConvertOptions{TargetIsZero: true}},
		{name: "preallocated", create: &CreateOptions{Preallocation: PreallocationMetadata, ClusterSize: 4096}},
		{name: "version 2", create: &CreateOptions{Version: 2}, below: convertContent(5, 5<<20)},
		{name: "over a base", create: &CreateOptions{ClusterSize: 4096}, below: convertContent(5, 5<<20), more: 1 << 20},
		{name: "data file", create: &CreateOptions{DataFile: "data"}},
		{name: "over content", create: &CreateOptions{ClusterSize: 4096}, fill: old, more: 512},
		{name: "beside a snapshot", create: &CreateOptions{ClusterSize: 4096}, fill: func(t *testing.T, dst WritableDisk) error {
			err := old(t, dst)
			createSnapshot(t, dst.(*Image), "before")
			return err
		}},
		{name: "keeping the rest", create: &CreateOptions{ClusterSize: 4096}, fill: old, more: 1 << 20, opts: ConvertOptions{KeepRest: true}},
		{name: "packed, keeping the rest", create: &CreateOptions{}, fill: old, more: 1 << 20, opts: ConvertOptions{KeepRest: true, Compress: true}},
		{name: "deflate", create: &CreateOptions{}, opts: ConvertOptions{Compress: true}},
		{name: "deflate, wide", create: &CreateOptions{}, opts: ConvertOptions{Compress: true, DeflateWindow: DeflateWindow32K}, more: 512},
		{name: "deflate, small clusters", create: &CreateOptions{ClusterSize: 1024, RefcountBits: 8}, opts: ConvertOptions{Compress: true}},
		{name: "zstd", create: &CreateOptions{Compression: CompressionZstd}, opts: ConvertOptions{Compress: true}},
		{name: "zstd, large clusters", create: &CreateOptions{Compression: CompressionZstd, ClusterSize: 2 << 20}, opts: ConvertOptions{Compress: true}},
		{name: "deflate over packed content", create: &CreateOptions{ClusterSize: 4096}, opts: ConvertOptions{Compress: true},
			fill: func(t *testing.T, dst WritableDisk) error {
				return dst.(*Image).WriteCompressed(convertContent(8, int(dst.Size())), 0)
			}},
	}
}

// convertRun is a target that was made.
type convertRun struct {
	dst        WritableDisk
	image      *Image // dst, if it is one
	host, data *MemoryStorage
}

// make makes the target for a source of size bytes, behind wrap, if that is not nil.
func (tt *convertTarget) make(t *testing.T, size int64, wrap func(Storage) Storage) *convertRun {
	t.Helper()
	if wrap == nil {
		wrap = func(s Storage) Storage { return s }
	}
	r := &convertRun{host: NewMemoryStorage(), data: NewMemoryStorage()}
	size += tt.more
	if tt.create == nil {
		if err := r.host.Truncate(size); err != nil {
			t.Fatal(err)
		}
		d, err := NewRawDisk(wrap(r.host))
		if err != nil {
			t.Fatal(err)
		}
		r.dst = d
	} else {
		o := *tt.create
		o.Open = &OpenOptions{}
		if tt.below != nil {
			o.Open.Backing = &knownDisk{content: tt.below}
		}
		if o.DataFile != "" {
			o.Open.DataFile = r.data
		}
		img, err := CreateStorage(wrap(r.host), size, &o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = img.Abandon() })
		r.dst, r.image = img, img
	}
	if tt.fill != nil {
		if err := tt.fill(t, r.dst); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// TestConvertWorkers checks that the number of workers changes no byte of the target, whose content is right.
func TestConvertWorkers(t *testing.T) {
	content := convertContent(1, 5<<20+512)
	for _, tt := range convertTargets() {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			content := content
			if tt.create != nil && tt.create.ClusterSize > 0 && tt.create.ClusterSize <= 1024 {
				content = content[:2<<20]
			}
			var first, firstData []byte
			for _, workers := range []int{1, 2, 3, 8} {
				r := tt.make(t, int64(len(content)), nil)
				opts := tt.opts
				opts.Workers = workers
				if err := Convert(t.Context(), r.dst, &knownDisk{content: content}, &opts); err != nil {
					t.Fatalf("%d workers: %v", workers, err)
				}
				want := append(bytes.Clone(content), make([]byte, tt.more)...)
				if opts.KeepRest {
					copy(want[len(content):], convertContent(7, len(want))[len(content):])
				}
				expectContent(t, r.dst, want)
				if r.image != nil {
					tt.judge(t, r)
				}
				host, data := readStorage(t, r.host), readStorage(t, r.data)
				if first == nil {
					first, firstData = host, data
				} else if !bytes.Equal(host, first) || !bytes.Equal(data, firstData) {
					t.Errorf("%d workers: other bytes than with one", workers)
				}
			}
		})
	}
}

// judge closes the image and checks it, and what was asked of its clusters.
func (tt *convertTarget) judge(t *testing.T, r *convertRun) {
	t.Helper()
	for e, err := range r.image.Extents(0, r.image.Size()) {
		switch {
		case err != nil:
			t.Fatal(err)
		case tt.opts.Zeroes == ZeroesClusters && e.Kind == ExtentUnallocated,
			tt.opts.Zeroes == ZeroesData && e.Kind != ExtentData:
			t.Errorf("zeros as %v: %+v", tt.opts.Zeroes, e)
		}
	}
	if err := r.image.Close(); err != nil {
		t.Fatal(err)
	}
	if tt.create.DataFile == "" {
		checkSnapshotImage(t, r.host)
	}
}

// expectNoGoroutines waits for the goroutines that were not there before to end.
func expectNoGoroutines(t *testing.T, before int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		if runtime.NumGoroutine() <= before {
			return
		}
		runtime.Gosched()
	}
	p := make([]byte, 1<<20)
	t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, p[:runtime.Stack(p, true)])
}

// lockableStorage is a storage of the fault tests, which grants locks.
type lockableStorage struct{ crashtest.Storage }

// Lock grants the lock.
func (lockableStorage) Lock(LockRole) error { return nil }

// Unlock does nothing.
func (lockableStorage) Unlock() error { return nil }

// TestConvertFails ends conversions in every phase: by a read error, a target that is full or fails, or their context. No
// goroutine is left, and an image is sound; the same call does it all once what was wrong is gone.
func TestConvertFails(t *testing.T) {
	content := convertContent(2, 5<<19)
	for _, tt := range convertTargets() {
		if !slices.Contains([]string{"raw over content", "qcow2", "over content", "beside a snapshot", "deflate",
			"deflate over packed content", "zstd", "data file", "zero clusters"}, tt.name) {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			runs := 0
			for at := 0; ; at = at*4 + 1 {
				met := 0
				for _, f := range []convertFault{
					{cause: errBadSector, at: at}, {cause: context.Canceled, at: at},
					{cause: syscall.ENOSPC, at: at}, {cause: syscall.ENOSPC, at: at, forever: true},
					{cause: syscall.EIO, at: at}, {cause: syscall.EIO, at: at, forever: true},
				} {
					if tt.fails(t, content, f) {
						met++
					}
					runs++
				}
				if met == 0 {
					break
				}
			}
			t.Logf("%d conversions", runs)
		})
	}
}

// convertFault is what ends a conversion: an error of reading the source or of writing the target, or the context, at
// operation at of its kind.
type convertFault struct {
	cause   error
	at      int
	forever bool
}

// fails runs a conversion that meets f, unless it ends before. It reports whether it met it.
func (tt *convertTarget) fails(t *testing.T, content []byte, f convertFault) (met bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var faults crashtest.Faults
	r := tt.make(t, int64(len(content)), func(s Storage) Storage { return lockableStorage{faults.Wrap("target", s)} })
	src := &knownDisk{content: content}
	switch f.cause {
	case errBadSector:
		src.failAt = int64(f.at) + 1
	case context.Canceled:
		src.onRead = func(k int64) {
			if k == int64(f.at)+1 {
				cancel()
			}
		}
	default:
		faults.Set(crashtest.Fault{At: f.at, Forever: f.forever, Err: f.cause, Short: true, Match: func(op crashtest.Op) bool {
			return op.Kind == crashtest.Write
		}})
	}
	opts := tt.opts
	opts.Workers = 3
	before := runtime.NumGoroutine()
	err := Convert(ctx, r.dst, src, &opts)
	expectNoGoroutines(t, before)
	switch {
	case f.cause == errBadSector:
		met = src.reads.Load() > int64(f.at)
	case f.cause == context.Canceled:
		met = err != nil
	default:
		met = faults.Fired() > 0
	}
	// A host that was full once may be seen by nobody but who waits for space; a table is written again.
	once := f.cause == syscall.ENOSPC || f.cause == syscall.EIO
	if err != nil && !errors.Is(err, f.cause) || err != nil && !met || met && err == nil && !(once && !f.forever) {
		t.Errorf("%+v: met %t, %v", f, met, err)
	}
	faults.Heal()
	src.failAt, src.onRead = 0, nil
	if r.image != nil {
		if err := r.image.Close(); err != nil {
			t.Fatalf("%+v: %v", f, err)
		}
		if tt.create.DataFile == "" {
			checkSnapshotImage(t, r.host)
		}
		o := &OpenOptions{ReadWrite: true}
		if tt.create.DataFile != "" {
			o.DataFile = r.data
		}
		if r.image, err = OpenStorage(r.host, o); err != nil {
			t.Fatalf("%+v: %v", f, err)
		}
		r.dst = r.image
	}
	if err := Convert(t.Context(), r.dst, src, &tt.opts); err != nil {
		t.Fatalf("again, after %+v: %v", f, err)
	}
	expectContent(t, r.dst, append(bytes.Clone(content), make([]byte, tt.more)...))
	if r.image != nil {
		tt.judge(t, r)
	}
	return met
}

// TestConvertReadErrors has sectors fail, and the caller take them for zeros, or not.
func TestConvertReadErrors(t *testing.T) {
	const size = 3<<20 + 4096
	content := bytes.Repeat([]byte{1}, size)
	bad := map[int64]bool{0: true, 7: true, 8: true, 2047: true, 2048: true, 5000: true, size/sectorSize - 1: true}
	for _, compress := range []bool{false, true} {
		tt := convertTarget{create: &CreateOptions{ClusterSize: 4096}}
		r := tt.make(t, size, nil)
		var got []guestSpan
		opts := &ConvertOptions{Compress: compress, Workers: 3, OnReadError: func(off, n int64, err error) error {
			if !errors.Is(err, errBadSector) {
				t.Errorf("asked about %v", err)
			}
			got = append(got, guestSpan{off, n})
			return nil
		}}
		if err := Convert(t.Context(), r.dst, &knownDisk{content: content, bad: bad}, opts); err != nil {
			t.Fatal(err)
		}
		// A run ends where a piece does.
		want := []guestSpan{{0, 512}, {7 * 512, 1024}, {2047 * 512, 512}, {2048 * 512, 512}, {5000 * 512, 512}, {size - 512, 512}}
		slices.SortFunc(got, func(x, y guestSpan) int { return int(x.off - y.off) })
		if d := cmp.Diff(want, got, cmp.AllowUnexported(guestSpan{})); d != "" {
			t.Errorf("asked about (-want +got):\n%s", d)
		}
		after := bytes.Clone(content)
		for s := range bad {
			clear(after[s*sectorSize:][:sectorSize])
		}
		expectContent(t, r.dst, after)
		tt.judge(t, r)
	}
	tt := convertTarget{create: &CreateOptions{}}
	stop := errors.New("stop")
	err := Convert(t.Context(), tt.make(t, size, nil).dst, &knownDisk{content: content, bad: bad},
		&ConvertOptions{OnReadError: func(int64, int64, error) error { return stop }})
	if !errors.Is(err, stop) {
		t.Errorf("%v, want what the caller said", err)
	}
}

// TestConvertShared converts the upper layers of a chain, for an overlay of the lower ones.
func TestConvertShared(t *testing.T) {
	const size = 6 << 20
	base := &knownDisk{content: convertContent(3, 4<<20+512)} // ends before the image does, inside a cluster
	overlay := func(below Disk, clusterSize int) *Image {
		img, err := CreateStorage(NewMemoryStorage(), size, &CreateOptions{ClusterSize: clusterSize, Open: &OpenOptions{Backing: below}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = img.Close() })
		return img
	}
	write := func(img *Image, off, n int) {
		if _, err := img.WriteAt(bytes.Repeat([]byte{byte(off) | 1}, n), int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	mid := overlay(base, 512)
	write(mid, 1000, 3000)
	write(mid, 3<<20, 100<<10)
	top := overlay(mid, 512)
	write(top, 70_001, 100)
	write(top, 5<<20+77, 700)
	if err := top.WriteZeroes(1<<20, 1536, 0); err != nil { // hides what lies below
		t.Fatal(err)
	}
	want := make([]byte, size)
	if _, err := top.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	for depth, below := range []Disk{nil, mid, base} {
		for _, compress := range []bool{false, true} {
			for _, clusterSize := range []int{512, 64 << 10} {
				t.Run(fmt.Sprintf("depth=%d/compress=%t/cluster=%d", depth, compress, clusterSize), func(t *testing.T) {
					dst := overlay(below, clusterSize)
					if err := Convert(t.Context(), dst, top, &ConvertOptions{SharedDepth: depth, Compress: compress}); err != nil {
						t.Fatal(err)
					}
					expectContent(t, dst, want)
					own := int64(0)
					for e, err := range dst.Extents(0, size) {
						if err != nil {
							t.Fatal(err)
						}
						if e.Depth == 0 && e.Kind != ExtentUnallocated {
							own += e.Len
						}
					}
					// What was written by few calls, in whole clusters.
					if most := 12 * int64(clusterSize); depth == 1 && own > most || depth == 2 && own > most+110<<10 {
						t.Errorf("%d bytes are the target's own", own)
					}
				})
			}
		}
	}
}

// TestConvertRate checks that a bound on the rate holds, also while the context ends.
func TestConvertRate(t *testing.T) {
	content := bytes.Repeat([]byte{1}, 3<<20)
	tt := convertTarget{}
	begin := time.Now()
	if err := Convert(t.Context(), tt.make(t, 3<<20, nil).dst, &knownDisk{content: content}, &ConvertOptions{Rate: 10 << 20}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took < 200*time.Millisecond {
		t.Errorf("two MiB after the first took %v at 10 MiB/s", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	src := &knownDisk{content: content, onRead: func(int64) { cancel() }}
	if err := Convert(ctx, tt.make(t, 3<<20, nil).dst, src, &ConvertOptions{Rate: 1}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
}

// madeDisk is a Disk whose content is made when it is read, and costs no memory.
type madeDisk struct{ size int64 }

// Size returns the size.
func (d madeDisk) Size() int64 { return d.size }

// ReadAt makes bytes that pack to a half or so.
func (d madeDisk) ReadAt(p []byte, off int64) (int, error) {
	rng := rand.New(rand.NewPCG(uint64(off), 1))
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64()&0x0f0f0f0f0f0f0f0f)
	}
	return len(p), nil
}

// Extents says that all of it is data.
func (d madeDisk) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		yield(Extent{Off: off, Len: min(n, d.size-off), Kind: ExtentData, HostOff: -1}, nil)
	}
}

// TestConvertMemory converts with the largest clusters, and more workers than there may be: memory is bounded.
func TestConvertMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("in full runs only")
	}
	const most = 256 << 20
	for _, o := range []CreateOptions{{ClusterSize: 2 << 20}, {ClusterSize: 2 << 20, Compression: CompressionZstd}, {}} {
		for _, compress := range []bool{false, true} {
			runtime.GC()
			var before, m runtime.MemStats
			runtime.ReadMemStats(&before)
			peak := uint64(0)
			opts := &ConvertFileOptions{Create: &o}
			opts.Compress, opts.Workers = compress, 1000
			opts.Progress = func(int64, int64) {
				runtime.ReadMemStats(&m)
				peak = max(peak, m.HeapInuse)
			}
			name := filepath.Join(t.TempDir(), "image")
			if err := ConvertFile(t.Context(), name, madeDisk{96 << 20}, opts); err != nil {
				t.Fatal(err)
			}
			t.Logf("clusters of %d KiB, %v, compressed %t: %d MiB at the most", o.ClusterSize>>10, o.Compression, compress, peak>>20)
			if peak > before.HeapInuse+most {
				t.Errorf("%d bytes of memory, %d before", peak, before.HeapInuse)
			}
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
	}
}
