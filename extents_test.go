package qcow2

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// slowExtents is what Extents of the whole disk must yield, found by a look-up of every sector on its own.
func slowExtents(img *Image, off, n int64) (runs []Extent, err error) {
	end := min(off+n, img.Size())
	for off < end {
		step := min(end, off&^(sectorSize-1)+sectorSize) - off
		x, err := img.m.resolve(uint64(off), uint64(step))
		if err != nil {
			return nil, err
		}
		e := Extent{Off: off, Len: step, HostOff: -1}
		switch x.kind {
		case kindNormal:
			e.Kind, e.HostOff = ExtentData, int64(x.hostOff)
		case kindZeroAlloc:
			e.Kind, e.HostOff = ExtentZero, int64(x.hostOff)
		case kindZeroPlain:
			e.Kind = ExtentZero
		case kindCompressed:
			e.Kind = ExtentCompressed
		case kindUnallocated:
			if img.m.reserved(l2Entry{word: x.word}) {
				e.HostOff = int64(x.hostOff)
			}
			if below, ok := img.below.disk.(*Image); ok && off < below.Size() {
				b, err := slowExtents(below, off, step)
				if err != nil {
					return nil, err
				}
				e = b[0]
				e.Depth++
			}
		}
		if k := len(runs); k > 0 && e.follows(&runs[k-1]) {
			runs[k-1].Len += e.Len
		} else {
			runs = append(runs, e)
		}
		off += step
	}
	return runs, nil
}

// collectExtents returns what a Disk yields.
func collectExtents(seq iter.Seq2[Extent, error]) (runs []Extent, err error) {
	for e, err := range seq {
		if err != nil {
			return runs, err
		}
		runs = append(runs, e)
	}
	return runs, nil
}

// newTestImage creates an image in memory and closes it when the test ends.
func newTestImage(t *testing.T, s Storage, size int64, o CreateOptions) *Image {
	t.Helper()
	img, err := CreateStorage(s, size, &o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
			t.Error(err)
		}
	})
	return img
}

// scribble writes, zeroes and discards in img at random.
func scribble(t *testing.T, img *Image, rng *rand.Rand, ops int) {
	t.Helper()
	p := make([]byte, 256<<10)
	for i := range p {
		p[i] = byte(rng.Uint32()) | 1
	}
	size := img.Size()
	for range ops {
		off := rng.Int64N(size/sectorSize) * sectorSize
		n := min(size-off, (1+rng.Int64N(int64(len(p))/sectorSize))*sectorSize)
		var err error
		switch rng.IntN(5) {
		case 0, 1:
			_, err = img.WriteAt(p[:n], off)
		case 2:
			err = img.WriteZeroes(off, n, ZeroMayUnmap)
		case 3:
			err = img.WriteZeroes(off, n, 0)
		case 4:
			err = img.Discard(off, n)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestExtentsWalk compares Extents, of whole disks and of parts, with look-ups of every sector on its own: chains of two
// images in many geometries, with changes in the cache, after they were synced, and in snapshots. The disks have more L2
// tables than one window holds, and caches of two slices.
func TestExtentsWalk(t *testing.T) {
	for _, o := range []CreateOptions{
		{ClusterSize: 512}, {ClusterSize: 1024, Version: 2}, {ClusterSize: 4096}, {},
		{ClusterSize: 16 << 10, ExtendedL2: true}, {ClusterSize: 64 << 10, ExtendedL2: true}, {ClusterSize: 2 << 20},
	} {
		t.Run(fmt.Sprintf("cluster=%d,extended=%v", o.ClusterSize, o.ExtendedL2), func(t *testing.T) {
			t.Parallel()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			base := newTestImage(t, NewMemoryStorage(), 20<<20, CreateOptions{ClusterSize: 4096})
			scribble(t, base, rng, 40)
			o.Open = &OpenOptions{Backing: base, L2CacheBytes: 2 << tableSliceBits}
			img := newTestImage(t, NewMemoryStorage(), 24<<20+512, o)
			compare := func(d Disk, ref *Image, off, n int64) {
				t.Helper()
				want, err := slowExtents(ref, off, n)
				if err != nil {
					t.Fatal(err)
				}
				got, err := collectExtents(d.Extents(off, n))
				if diff := cmp.Diff(want, got); diff != "" || err != nil {
					t.Fatalf("extents of %d bytes at %d: %v (-want +got):\n%s", n, off, err, diff)
				}
			}
			for round := range 3 {
				scribble(t, img, rng, 30)
				compare(img, img, 0, img.Size())
				for range 5 {
					off := rng.Int64N(img.Size())
					compare(img, img, off, rng.Int64N(img.Size()))
				}
				if round == 1 {
					if err := img.Sync(); err != nil {
						t.Fatal(err)
					}
					if _, err := img.CreateSnapshot(t.Context(), &SnapshotOptions{Name: "snap"}); err != nil {
						t.Fatal(err)
					}
				}
			}
			d, err := img.OpenSnapshot(SnapshotRef{Name: "snap"})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			compare(d, d.disk, 0, d.Size())
		})
	}
}

// countedStorage counts the reads of a storage, and the bytes that are read and written.
type countedStorage struct {
	Storage
	reads, bytes atomic.Int64
	written      atomic.Int64
}

// ReadAt implements Storage.
func (s *countedStorage) ReadAt(p []byte, off int64) (int, error) {
	s.reads.Add(1)
	s.bytes.Add(int64(len(p)))
	return s.Storage.ReadAt(p, off)
}

// WriteAt implements Storage.
func (s *countedStorage) WriteAt(p []byte, off int64) (int, error) {
	s.written.Add(int64(len(p)))
	return s.Storage.WriteAt(p, off)
}

// TestExtentsReads maps a preallocated image of 256 GiB: the tables are read once, in large pieces, what the cache held
// is still there, and a range of one cluster costs one slice.
func TestExtentsReads(t *testing.T) {
	s := &countedStorage{Storage: NewMemoryStorage()}
	const size = 256 << 30
	img := newTestImage(t, s, size, CreateOptions{Preallocation: PreallocationMetadata})
	p := make([]byte, 1)
	for off := int64(0); off < size; off += size / 64 {
		if _, err := img.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	s.reads.Store(0)
	s.bytes.Store(0)
	if runs, err := collectExtents(img.Extents(0, size)); err != nil || len(runs) != 1 || !runs[0].Hole {
		t.Fatalf("%v, %v", runs, err)
	}
	const tables = size >> 16 * 8
	if reads, n := s.reads.Load(), s.bytes.Load(); reads > tables/lastWindow+16 || n > tables+1<<20 {
		t.Errorf("%d reads of %d bytes for tables of %d", reads, n, tables)
	}
	s.reads.Store(0)
	for off := int64(0); off < size; off += size / 64 {
		if _, err := img.m.resolve(uint64(off), 1); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.reads.Load(); n != 0 {
		t.Errorf("%d slices are not in the cache any more", n)
	}
	s.bytes.Store(0)
	if _, err := collectExtents(img.Extents(size/3, 64<<10)); err != nil || s.bytes.Load() != 1<<tableSliceBits {
		t.Errorf("%d bytes read for one cluster; %v", s.bytes.Load(), err)
	}
}

// muteStorage does not tell what space it takes.
type muteStorage struct{ Storage }

// Allocated implements Storage.
func (muteStorage) Allocated() (int64, error) { return 0, errors.ErrUnsupported }

// TestExtentsHoles looks at preallocated images: what was written is data, the rest a hole with its place, by what the
// storage tells; a file that takes its space, or does not say, has data.
func TestExtentsHoles(t *testing.T) {
	const size = 8 << 20
	for _, tt := range []struct {
		name  string
		s     Storage
		mode  Preallocation
		holes bool
	}{
		{"metadata", NewMemoryStorage(), PreallocationMetadata, true},
		{"metadata, storage that does not tell", muteStorage{NewMemoryStorage()}, PreallocationMetadata, false},
		{"off", NewMemoryStorage(), PreallocationOff, false},
		{"full", NewMemoryStorage(), PreallocationFull, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := newTestImage(t, tt.s, size, CreateOptions{Preallocation: tt.mode})
			data := make([]byte, 128<<10)
			for i := range data {
				data[i] = 1
			}
			if _, err := img.WriteAt(data, 1<<20); err != nil {
				t.Fatal(err)
			}
			runs, err := collectExtents(img.Extents(0, size))
			if err != nil {
				t.Fatal(err)
			}
			var holes, stored int64
			p := make([]byte, size)
			for _, e := range runs {
				if _, err := img.ReadAt(p[:e.Len], e.Off); err != nil {
					t.Fatal(err)
				}
				if e.Kind.readsZero() && !isZero(p[:e.Len]) {
					t.Errorf("%+v has content", e)
				}
				switch {
				case e.Hole && (e.Kind != ExtentZero || e.HostOff < 0):
					t.Errorf("%+v is a hole without a place, or data", e)
				case e.Hole:
					holes += e.Len
				case e.Kind == ExtentData:
					stored += e.Len
				}
			}
			want := int64(size - len(data))
			if tt.mode == PreallocationOff || !tt.holes {
				want = 0
			}
			if holes != want || tt.holes && stored != int64(len(data)) {
				t.Errorf("%d bytes of holes, want %d; %d of data", holes, want, stored)
			}
		})
	}
}

// TestExtentsClosed closes an image within a walk: the walk ends with fs.ErrClosed. Close does not wait for it.
func TestExtentsClosed(t *testing.T) {
	img := newTestImage(t, NewMemoryStorage(), 64<<20, CreateOptions{ClusterSize: 512})
	for off := int64(0); off < 64<<20; off += 1 << 20 {
		if _, err := img.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	var err error
	for _, err = range img.Extents(0, 64<<20) {
		if n++; n == 20 {
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !errors.Is(err, fs.ErrClosed) || n > 22 {
		t.Errorf("%v after %d runs", err, n)
	}
}

// closingDisk is a Disk that is closed after a while, in whose place another one comes.
type closingDisk struct {
	*RawDisk
	after int // runs of one cluster until it is closed
	swap  func()
}

// Extents yields zeros by single clusters, and then fs.ErrClosed.
func (d *closingDisk) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for end := off + n; off < end; off += 64 << 10 {
			if d.after--; d.after < 0 {
				d.swap()
				yield(Extent{}, fs.ErrClosed)
				return
			}
			if !yield(Extent{Off: off, Len: min(64<<10, end-off), Kind: ExtentZero, HostOff: -1}, nil) {
				return
			}
		}
	}
}

// TestExtentsOtherBacking exchanges what lies below an image within a walk, as Rebase does when it has copied what
// differs into the image: the walk goes on with what the image and its new backing disk hold then, and not with what
// the image had before and the new disk has.
func TestExtentsOtherBacking(t *testing.T) {
	raw, err := NewRawDisk(NewMemoryStorage())
	if err != nil {
		t.Fatal(err)
	}
	raw.size.Store(8 << 20)
	// A table maps 2 MiB, and the last cluster of each is written, so that there are tables. The first comes through the
	// cache; the walk is in the window of the second when the disk below goes away.
	old := &closingDisk{RawDisk: raw, after: 40}
	img := newTestImage(t, NewMemoryStorage(), 8<<20, CreateOptions{ClusterSize: 4096, Open: &OpenOptions{Backing: old}})
	data := slices.Repeat([]byte{1}, 64<<10)
	for off := int64(2 << 20); off <= 8<<20; off += 2 << 20 {
		if _, err := img.WriteAt(data[:4096], off-4096); err != nil {
			t.Fatal(err)
		}
	}
	swapped := false
	old.swap = func() {
		if swapped {
			t.Fatal("the walk goes on with the disk that was closed")
		}
		swapped = true
		if _, err := img.WriteAt(data, 3<<20); err != nil {
			t.Error(err)
		}
		img.reqs.pause()
		img.below.disk = nil
		img.reqs.resume()
	}
	got, err := collectExtents(img.Extents(0, 8<<20))
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, e := range got {
		kinds = append(kinds, fmt.Sprintf("%d+%d %v depth %d", e.Off>>12, e.Len>>12, e.Kind, e.Depth))
	}
	want := []string{
		"0+511 zero depth 1", "511+1 data depth 0",
		"512+128 zero depth 1", "640+128 unallocated depth 0", "768+16 data depth 0", "784+239 unallocated depth 0", "1023+1 data depth 0",
		"1024+511 unallocated depth 0", "1535+1 data depth 0", "1536+511 unallocated depth 0", "2047+1 data depth 0",
	}
	if diff := cmp.Diff(want, kinds); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestExtentsBesideWriters walks an image while its clusters are written for the first time, one after the other, synced
// and pushed out of a cache of two slices. A walk that begins after a write has returned sees its cluster: the table
// on the host may be older than what the cache holds.
func TestExtentsBesideWriters(t *testing.T) {
	const cluster, size = 512, 1 << 20
	img := newTestImage(t, NewMemoryStorage(), size, CreateOptions{ClusterSize: cluster, Open: &OpenOptions{L2CacheBytes: 1, NoSync: true}})
	var written atomic.Int64 // clusters from the beginning
	var wait sync.WaitGroup
	wait.Add(1)
	go func() {
		defer wait.Done()
		p := slices.Repeat([]byte{1}, cluster)
		for off := int64(0); off < size; off += cluster {
			if _, err := img.WriteAt(p, off); err != nil {
				t.Error(err)
				return
			}
			written.Store(off/cluster + 1)
		}
	}()
	defer wait.Wait()
	for written.Load() < size/cluster && !t.Failed() {
		least := written.Load() * cluster
		sum := int64(0)
		for e, err := range img.Extents(0, size) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Kind != ExtentData {
				break
			}
			sum += e.Len
		}
		if sum < least {
			t.Fatalf("%d bytes of data, and %d were written before", sum, least)
		}
	}
}
