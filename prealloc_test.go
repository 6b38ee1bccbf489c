package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// fillRepeated returns n bytes with the content of a backing file.
func fillRepeated(n int64) []byte {
	p := make([]byte, n)
	crashContent(p, 0, 77, true)
	return p
}

// walkClean fails the test unless the image in s is sound: no leak, no corruption, every count exact.
func walkClean(t testing.TB, s Storage) *refwalk.Report {
	t.Helper()
	rep, err := walkFile(s)
	if err != nil {
		t.Fatal(err)
	}
	if !rep.Clean() {
		t.Errorf("not clean: %q", rep.Findings)
	}
	return rep
}

// expectReads fails the test unless the disk reads want.
func expectReads(t testing.TB, d Disk, want []byte) {
	t.Helper()
	if d.Size() != int64(len(want)) {
		t.Fatalf("size %d, want %d", d.Size(), len(want))
	}
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("byte %#x is %#x, want %#x", i, got[i], want[i])
			}
		}
	}
}

// countKinds counts the guest clusters of each kind, by the first subcluster of each.
func countKinds(t testing.TB, img *Image) map[clusterKind]int {
	t.Helper()
	kinds := make(map[clusterKind]int)
	for off := uint64(0); off < uint64(img.Size()); off += img.m.clusterSize {
		x, err := img.m.resolve(off, 1)
		if err != nil {
			t.Fatal(err)
		}
		kinds[x.kind]++
	}
	return kinds
}

// TestPreallocation creates images in every mode, on files that grow and on devices full of garbage, and reads,
// writes and checks them.
func TestPreallocation(t *testing.T) {
	type geometryCase struct {
		name   string
		create CreateOptions
		size   int64
	}
	cases := []geometryCase{
		{"512", CreateOptions{ClusterSize: 512}, 300<<10 + 512},
		{"512 refcounts of a bit", CreateOptions{ClusterSize: 512, RefcountBits: 1}, 512 << 10},
		{"512 refcounts of 64 bits", CreateOptions{ClusterSize: 512, RefcountBits: 64}, 200 << 10},
		{"version 2", CreateOptions{Version: 2, ClusterSize: 4096}, 600<<10 + 1024},
		{"64k", CreateOptions{}, 2<<20 + 512},
		{"2M", CreateOptions{ClusterSize: 2 << 20}, 5 << 20},
		{"extended", CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}, 500<<10 + 512},
		{"extended over a base", CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true, BackingFile: "base", BackingFormat: "raw"}, 500<<10 + 512},
		{"data file", CreateOptions{ClusterSize: 4096, DataFile: "data"}, 500<<10 + 512},
		{"extended with a data file", CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true, DataFile: "data"}, 500<<10 + 512},
		{"raw data file", CreateOptions{ClusterSize: 4096, DataFile: "data", DataFileRaw: true}, 500<<10 + 512},
		{"empty", CreateOptions{}, 0},
	}
	for _, c := range cases {
		for mode := PreallocationMetadata; mode <= PreallocationFull; mode++ {
			for _, device := range []bool{false, true} {
				if device && mode == PreallocationFalloc {
					continue // as PreallocationMetadata
				}
				t.Run(fmt.Sprintf("%s/%s/device=%t", c.name, mode, device), func(t *testing.T) {
					storage := func(n int64) *MemoryStorage {
						if device {
							return NewMemoryDevice(n)
						}
						return NewMemoryStorage()
					}
					room := int64(4 << 20)
					if c.size > 1<<20 {
						room = 16 << 20
					}
					s, data := storage(room), storage(c.size)
					o := c.create
					o.Preallocation, o.Overwrite, o.Open = mode, true, &OpenOptions{}
					want := make([]byte, c.size)
					if o.DataFile != "" {
						o.Open.DataFile = data
					}
					if o.BackingFile != "" {
						base := fillRepeated(c.size / 2)
						copy(want, base)
						o.Open.Backing = newTestRaw(t, base)
					}
					img, err := CreateStorage(s, c.size, &o)
					if err != nil {
						t.Fatal(err)
					}
					expectReads(t, img, want)
					walkClean(t, s)
					kinds := countKinds(t, img)
					over := o.BackingFile != ""
					hidden := device && mode != PreallocationFull && o.Version != 2 && !o.DataFileRaw
					switch n := int(img.m.clusters(uint64(c.size))); {
					case over && kinds[kindUnallocated] != n,
						!over && hidden && kinds[kindZeroAlloc]+kinds[kindZeroPlain] != n,
						!over && !hidden && kinds[kindNormal] != n:
						t.Errorf("of %d clusters: %v", n, kinds)
					}
					end := img.Info().EndOffset
					for off := int64(100); off+5000 < c.size; off += 100_000 {
						p := bytes.Repeat([]byte{byte(off >> 8)}, 5000)
						copy(want[off:], p)
						if _, err := img.WriteAt(p, off); err != nil {
							t.Fatal(err)
						}
					}
					mustClose(t, img)
					if rep := walkClean(t, s); rep.Leaks > 0 {
						t.Errorf("leaks: %v", rep.Findings)
					}
					again, err := OpenStorage(s, o.Open)
					if err != nil {
						t.Fatal(err)
					}
					expectReads(t, again, want)
					if now := again.Info().EndOffset; now != end {
						t.Errorf("writes moved the end of the image from %d to %d", end, now)
					}
					mustClose(t, again)
				})
			}
		}
	}
}

// TestPreallocationRefused has Create refuse what cannot be preallocated, with nothing written.
func TestPreallocationRefused(t *testing.T) {
	over := CreateOptions{BackingFile: "base", BackingFormat: "raw", Preallocation: PreallocationMetadata}
	lent := CreateOptions{Preallocation: PreallocationFalloc, Open: &OpenOptions{Backing: newTestRaw(t, make([]byte, 512))}}
	tests := []struct {
		name string
		size int64
		opts CreateOptions
		want error
	}{
		{"over a base", 1 << 20, over, ErrOption},
		{"over a disk that is lent", 1 << 20, lent, ErrOption},
		{"no mode", 1 << 20, CreateOptions{Preallocation: 4}, ErrOption},
		{"negative mode", 1 << 20, CreateOptions{Preallocation: -1}, ErrOption},
		{"beyond the refcount table", 64 << 30, CreateOptions{ClusterSize: 512, RefcountBits: 64, Preallocation: PreallocationMetadata}, ErrTooLarge},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := NewMemoryStorage()
			if _, err := CreateStorage(s, tt.size, &tt.opts); !errors.Is(err, tt.want) {
				t.Errorf("Create: %v, want %v", err, tt.want)
			}
			if n, _ := s.Size(); n != 0 {
				t.Errorf("%d bytes were written", n)
			}
		})
	}
}

// TestPreallocationHost shows what each mode asks of the host: space reserved or zeros written for the data, or
// neither, and zeros where a storage cannot reserve space.
func TestPreallocationHost(t *testing.T) {
	tests := []struct {
		mode           Preallocation
		cannot         bool // the storage reserves nothing
		allocs, zeroes bool
	}{
		{PreallocationMetadata, false, false, false},
		{PreallocationFalloc, false, true, false},
		{PreallocationFalloc, true, false, true},
		{PreallocationFull, false, false, true},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s, cannot=%t", tt.mode, tt.cannot), func(t *testing.T) {
			s := &tallyStorage{MemoryStorage: NewMemoryStorage(), cannot: tt.cannot}
			img, err := CreateStorage(s, 4<<20, &CreateOptions{Preallocation: tt.mode})
			if err != nil {
				t.Fatal(err)
			}
			mustClose(t, img)
			if got := s.allocated >= 4<<20; got != tt.allocs {
				t.Errorf("%d bytes reserved, want all: %t", s.allocated, tt.allocs)
			}
			if got := s.written >= 4<<20; got != tt.zeroes {
				t.Errorf("%d bytes written, want all: %t", s.written, tt.zeroes)
			}
			if size, _ := s.Size(); size < 4<<20 {
				t.Errorf("the file ends at %d", size)
			}
		})
	}
}

// tallyStorage counts the bytes that are written and reserved, and the writes.
type tallyStorage struct {
	*MemoryStorage
	cannot                     bool // reserves nothing
	allocated, written, writes int64
}

// Allocate counts the bytes.
func (s *tallyStorage) Allocate(off, n int64) error {
	if s.cannot {
		return errors.ErrUnsupported
	}
	s.allocated += n
	return s.MemoryStorage.Allocate(off, n)
}

// WriteAt counts the bytes.
func (s *tallyStorage) WriteAt(p []byte, off int64) (int, error) {
	s.written += int64(len(p))
	s.writes++
	return s.MemoryStorage.WriteAt(p, off)
}

// TestPreallocationBulk has the tables of a large disk written in large pieces, each once.
func TestPreallocationBulk(t *testing.T) {
	s := &tallyStorage{MemoryStorage: NewMemoryStorage()}
	img, err := CreateStorage(s, 256<<20, &CreateOptions{ClusterSize: 512, Preallocation: PreallocationMetadata})
	if err != nil {
		t.Fatal(err)
	}
	tables := int64(img.Info().EndOffset) - 256<<20
	mustClose(t, img)
	if s.written > tables+bulkBytes || s.writes > 2*tables/bulkBytes+16 {
		t.Errorf("%d bytes in %d writes for %d bytes of tables", s.written, s.writes, tables)
	}
}

// TestFillRefcounts compares the words of the bulk filling with counts that are set one by one.
func TestFillRefcounts(t *testing.T) {
	for order := range uint(maxRefcountOrder + 1) {
		perBuf := uint64(512 * 8 >> order)
		for _, n := range []uint64{0, 1, 2, 7, 8, 63, 64, 65, perBuf - 1, perBuf, perBuf + 1, 1 << 40} {
			got, want := bytes.Repeat([]byte{0xa5}, 512), make([]byte, 512)
			fillRefcounts(got, order, n)
			for i := range min(n, perBuf) {
				setRefcountAt(want, order, i, 1)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("order %d, %d ones: %x, want %x", order, n, got, want)
			}
		}
	}
}

// TestPreallocationQEMU has QEMU check, read, map and write our preallocated images, and us its own.
func TestPreallocationQEMU(t *testing.T) {
	qemutest.Require(t)
	base := fillRepeated(700 << 10)
	tests := []struct {
		name string
		args string
		opts CreateOptions
	}{
		{"512", "cluster_size=512", CreateOptions{ClusterSize: 512}},
		{"refcounts of a bit", "cluster_size=1024,refcount_bits=1", CreateOptions{ClusterSize: 1024, RefcountBits: 1}},
		{"version 2", "compat=0.10", CreateOptions{Version: 2}},
		{"2M", "cluster_size=2M,refcount_bits=64", CreateOptions{ClusterSize: 2 << 20, RefcountBits: 64}},
		{"extended", "cluster_size=32k,extended_l2=on", CreateOptions{ClusterSize: 32 << 10, ExtendedL2: true}},
		{"over a base", "cluster_size=32k,extended_l2=on,backing_file=base,backing_fmt=raw",
			CreateOptions{ClusterSize: 32 << 10, ExtendedL2: true, BackingFile: "base", BackingFormat: "raw"}},
		{"data file", "data_file=data", CreateOptions{DataFile: "data"}},
	}
	const size = 3<<20 + 512
	for i, tt := range tests {
		// QEMU is slow to start: one mode of those with reserved space each.
		for _, mode := range []Preallocation{PreallocationMetadata, PreallocationFalloc + Preallocation(i%2)} {
			t.Run(fmt.Sprintf("%s/%s", tt.name, mode), func(t *testing.T) {
				t.Chdir(t.TempDir())
				writeTestFile(t, "base", base)
				want := make([]byte, size)
				if tt.opts.BackingFile != "" {
					copy(want, base)
				}
				resolver := ResolverFunc(func(ref FileRef) (Storage, error) {
					return OpenFileStorage(ref.Name, os.O_RDWR|os.O_CREATE, 0o600)
				})
				o := tt.opts
				o.Preallocation, o.Open = mode, &OpenOptions{Resolver: resolver}
				img, err := Create("ours", size, &o)
				if err != nil {
					t.Fatal(err)
				}
				mustClose(t, img)
				qemutest.CheckClean(t, "ours")
				writeTestFile(t, "want", want)
				qemutest.Compare(t, "ours", "qcow2", "want", "raw")
				p := bytes.Repeat([]byte{0x5a}, 100_000)
				copy(want[1_000_000&^511:], p)
				qemutest.IO(t, "ours", fmt.Sprintf("write -P 0x5a %d 100000", 1_000_000&^511))
				qemutest.CheckClean(t, "ours")
				expectFileContent(t, "ours", resolver, want)
				if err := os.Remove("data"); err == nil {
					want = make([]byte, size)
				}
				qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("%s,preallocation=%s", tt.args, mode), "theirs", fmt.Sprint(size))
				clear(want)
				if tt.opts.BackingFile != "" {
					copy(want, base)
				}
				expectFileContent(t, "theirs", resolver, want)
			})
		}
	}
}

// writeTestFile writes a file.
func writeTestFile(t testing.TB, name string, p []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.FromSlash(name), p, 0o600); err != nil {
		t.Fatal(err)
	}
}

// expectFileContent fails the test unless the image file reads want and our check finds nothing.
func expectFileContent(t testing.TB, name string, r Resolver, want []byte) {
	t.Helper()
	img, err := Open(name, &OpenOptions{Resolver: r})
	if err != nil {
		t.Fatal(err)
	}
	expectReads(t, img, want)
	res, err := img.Check(t.Context(), nil)
	if err != nil || res.Leaks+res.Corruptions > 0 {
		t.Errorf("Check: %+v, %v", res, err)
	}
	mustClose(t, img)
}
