package qcow2_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"path/filepath"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/qemutest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// apiCluster is the cluster size of images made with default options, in bytes.
const apiCluster = 64 << 10

// create makes an image in memory and closes it when the test ends, unless the test did.
func create(t *testing.T, size int64, opts *qcow2.CreateOptions) (*qcow2.Image, *qcow2.MemoryStorage) {
	t.Helper()
	s := qcow2.NewMemoryStorage()
	img, err := qcow2.CreateStorage(s, size, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = img.Close() })
	return img, s
}

// storageBytes returns what a storage holds.
func storageBytes(t *testing.T, s qcow2.Storage) []byte {
	t.Helper()
	n, err := s.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := s.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return b
}

// expectRefused makes a write of a part of a new overlay that must fail, twice. The first one leaves at most
// an empty L2 table, no leak and no cluster of data; the second one changes no byte of the storage.
func expectRefused(t *testing.T, img *qcow2.Image, s qcow2.Storage, write func()) {
	t.Helper()
	fresh := storageBytes(t, s)
	write()
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	once := storageBytes(t, s)
	if len(once) > len(fresh)+apiCluster {
		t.Errorf("a refused write grew the file from %d to %d bytes", len(fresh), len(once))
	}
	rep, err := refwalk.Walk(bytes.NewReader(once), int64(len(once)))
	if err != nil {
		t.Fatal(err)
	}
	if rep.Corruptions() != 0 || rep.Leaks != 0 || rep.PastEnd != 0 || rep.Allocated != 0 {
		t.Errorf("a refused write left %d corruptions, %d leaks, %d clusters of data: %q",
			rep.Corruptions(), rep.Leaks+rep.PastEnd, rep.Allocated, rep.Findings)
	}
	write()
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(storageBytes(t, s), once) {
		t.Error("a refused write changed the image")
	}
}

// callerDisk is a Disk of the caller's own: content, with whatever size and way of reading it is given.
type callerDisk struct {
	content []byte
	size    int64
	read    func(d *callerDisk, p []byte, off int64) (int, error) // nil: as io.ReaderAt has it
}

// Size returns the size that the disk claims.
func (d *callerDisk) Size() int64 { return d.size }

// ReadAt reads as the test wants.
func (d *callerDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.read != nil {
		return d.read(d, p, off)
	}
	return bytes.NewReader(d.content).ReadAt(p, off)
}

// Extents says that all of the disk is data.
func (d *callerDisk) Extents(off, n int64) iter.Seq2[qcow2.Extent, error] {
	return func(yield func(qcow2.Extent, error) bool) {
		if n = min(n, d.size-off); n > 0 {
			yield(qcow2.Extent{Off: off, Len: n, Kind: qcow2.ExtentData, HostOff: off}, nil)
		}
	}
}

// newCallerDisk returns a well-behaved disk.
func newCallerDisk(content []byte) *callerDisk {
	return &callerDisk{content: content, size: int64(len(content))}
}

// writeRange is a range of bytes that was written.
type writeRange struct{ Off, N int64 }

// writesDisk is a WritableDisk that keeps what was written to it, and where.
type writesDisk struct {
	*callerDisk
	writes []writeRange
	syncs  int
}

// WriteAt writes p and notes it.
func (d *writesDisk) WriteAt(p []byte, off int64) (int, error) {
	d.writes = append(d.writes, writeRange{off, int64(len(p))})
	return copy(d.content[off:], p), nil
}

// Sync counts.
func (d *writesDisk) Sync() error {
	d.syncs++
	return nil
}

// holesDisk is a writesDisk that says that it holds nothing yet.
type holesDisk struct{ *writesDisk }

// Extents says that all of the disk reads as zeros.
func (d holesDisk) Extents(off, n int64) iter.Seq2[qcow2.Extent, error] {
	return func(yield func(qcow2.Extent, error) bool) {
		yield(qcow2.Extent{Off: off, Len: n, Kind: qcow2.ExtentZero, HostOff: -1}, nil)
	}
}

// TestReadOnlyRefuses makes every changing call of an image that is open for reading: each is ErrReadOnly,
// whatever its range, and nothing is written.
func TestReadOnlyRefuses(t *testing.T) {
	const size = 4 * apiCluster
	img, s := create(t, size, nil)
	writeAt(t, img, text(1, 2*apiCluster), 0)
	closeImage(t, img)
	before := storageBytes(t, s)
	opens := map[string]func() (*qcow2.Image, error){
		"nil options": func() (*qcow2.Image, error) { return qcow2.OpenStorage(s, nil) },
		"zero":        func() (*qcow2.Image, error) { return qcow2.OpenStorage(s, &qcow2.OpenOptions{}) },
		"reader": func() (*qcow2.Image, error) {
			return qcow2.OpenReader(bytes.NewReader(before), int64(len(before)), nil)
		},
	}
	calls := map[string]func(img *qcow2.Image) error{
		"WriteAt":         func(img *qcow2.Image) error { _, err := img.WriteAt(text(2, 512), 0); return err },
		"WriteAt nothing": func(img *qcow2.Image) error { _, err := img.WriteAt(nil, 0); return err },
		"WriteAt outside": func(img *qcow2.Image) error { _, err := img.WriteAt(text(2, 512), size); return err },
		"WriteVecAt": func(img *qcow2.Image) error {
			_, err := img.WriteVecAt([][]byte{text(2, 512), text(3, 512)}, 0)
			return err
		},
		"WriteVecAt nothing": func(img *qcow2.Image) error { _, err := img.WriteVecAt(nil, 0); return err },
		"WriteCompressed":    func(img *qcow2.Image) error { return img.WriteCompressed(text(2, apiCluster), 0) },
		"Convert": func(img *qcow2.Image) error {
			return qcow2.Convert(context.Background(), img, newCallerDisk(text(2, size)), nil)
		},
		"Convert zeros": func(img *qcow2.Image) error {
			return qcow2.Convert(context.Background(), img, newCallerDisk(make([]byte, size)), nil)
		},
		"Convert compressed": func(img *qcow2.Image) error {
			return qcow2.Convert(context.Background(), img, newCallerDisk(text(2, size)), &qcow2.ConvertOptions{Compress: true})
		},
	}
	for how, openIt := range opens {
		for call, do := range calls {
			t.Run(how+"/"+call, func(t *testing.T) {
				img, err := openIt()
				if err != nil {
					t.Fatal(err)
				}
				if err := do(img); !errors.Is(err, qcow2.ErrReadOnly) {
					t.Errorf("%v, want ErrReadOnly", err)
				}
				expectDisk(t, img, append(text(1, 2*apiCluster), make([]byte, 2*apiCluster)...))
				if err := img.Sync(); err != nil {
					t.Errorf("Sync: %v", err)
				}
				closeImage(t, img)
				if !bytes.Equal(storageBytes(t, s), before) {
					t.Error("the storage was written")
				}
			})
		}
	}
}

// TestEdges gives ReadAt and WriteAt ranges at the edges of the disk.
func TestEdges(t *testing.T) {
	const size = 3*apiCluster + 512
	const fill = 0x5a // of buffers before a read
	content := text(1, size)
	tests := []struct {
		off      int64
		n        int
		read     int
		readErr  error // io.EOF stands for exactly that
		written  int
		writeErr error
	}{
		{off: 0, n: 0},
		{off: 5, n: 0},
		{off: size, n: 0},
		{off: size + 1, n: 0, writeErr: qcow2.ErrRange},
		{off: math.MaxInt64, n: 0, writeErr: qcow2.ErrRange},
		{off: -1, n: 0, readErr: qcow2.ErrRange, writeErr: qcow2.ErrRange},
		{off: -1, n: 1, readErr: qcow2.ErrRange, writeErr: qcow2.ErrRange},
		{off: -512, n: 1024, readErr: qcow2.ErrRange, writeErr: qcow2.ErrRange},
		{off: math.MinInt64, n: 512, readErr: qcow2.ErrRange, writeErr: qcow2.ErrRange},
		{off: size, n: 1, readErr: io.EOF, writeErr: qcow2.ErrRange},
		{off: size + 1<<40, n: 1, readErr: io.EOF, writeErr: qcow2.ErrRange},
		{off: math.MaxInt64, n: 512, readErr: io.EOF, writeErr: qcow2.ErrRange},
		{off: size - 1, n: 1, read: 1, written: 1},
		{off: size - 1, n: 2, read: 1, readErr: io.EOF, writeErr: qcow2.ErrRange},
		{off: size - 700, n: 700, read: 700, written: 700},
		{off: size - 700, n: 701, read: 700, readErr: io.EOF, writeErr: qcow2.ErrRange},
		{off: apiCluster - 1, n: 2*apiCluster + 2, read: 2*apiCluster + 2, written: 2*apiCluster + 2},
		{off: 0, n: size, read: size, written: size},
		{off: 0, n: size + 1, read: size, readErr: io.EOF, writeErr: qcow2.ErrRange},
	}
	same := func(got, want error) bool {
		if want == nil || want == io.EOF {
			return got == want
		}
		return errors.Is(got, want)
	}
	for _, vec := range []bool{false, true} {
		for _, tt := range tests {
			t.Run(fmt.Sprintf("off=%d/n=%d/vec=%t", tt.off, tt.n, vec), func(t *testing.T) {
				img, _ := create(t, size, nil)
				writeAt(t, img, content, 0)
				read, write := img.ReadAt, img.WriteAt
				if vec {
					split := func(p []byte) [][]byte { return [][]byte{p[:len(p)/3], nil, p[len(p)/3:]} }
					read = func(p []byte, off int64) (int, error) { return img.ReadVecAt(split(p), off) }
					write = func(p []byte, off int64) (int, error) { return img.WriteVecAt(split(p), off) }
				}
				p := bytes.Repeat([]byte{fill}, tt.n)
				n, err := read(p, tt.off)
				if n != tt.read || !same(err, tt.readErr) {
					t.Errorf("read: %d, %v, want %d, %v", n, err, tt.read, tt.readErr)
				}
				if tt.read > 0 && !bytes.Equal(p[:n], content[tt.off:][:n]) {
					t.Error("read other content")
				}
				for _, b := range p[n:] {
					if b != fill {
						t.Fatal("the buffer changed behind what was read")
					}
				}
				p = text(2, int64(tt.n))
				if n, err = write(p, tt.off); n != tt.written || !same(err, tt.writeErr) {
					t.Errorf("write: %d, %v, want %d, %v", n, err, tt.written, tt.writeErr)
				}
				want := bytes.Clone(content)
				if tt.written > 0 {
					copy(want[tt.off:], p)
				}
				expectDisk(t, img, want)
			})
		}
	}
}

// TestSectionReader reads an image of every kind of cluster through what testing/iotest demands of readers.
func TestSectionReader(t *testing.T) {
	const cluster, size = 512, 24 * 512
	want := text(3, size)
	clear(want[20*cluster:])
	img, _ := create(t, size, &qcow2.CreateOptions{
		ClusterSize: cluster, Open: &qcow2.OpenOptions{Backing: newCallerDisk(want[:20*cluster-100])},
	})
	clear(want[20*cluster-100:])
	for i := int64(0); i < 18; i += 6 {
		p := text(int(i), 2*cluster)
		writeAt(t, img, p, i*cluster)
		if err := img.WriteCompressed(p, (i+2)*cluster); err != nil {
			t.Fatal(err)
		}
		copy(want[i*cluster:], p)
		copy(want[(i+2)*cluster:], p)
	}
	if err := iotest.TestReader(io.NewSectionReader(img, 0, img.Size()), want); err != nil {
		t.Error(err)
	}
	if err := iotest.TestReader(io.NewSectionReader(img, 700, size-1400), want[700:size-700]); err != nil {
		t.Error(err)
	}
}

// TestNoBacking opens overlays without their backing file: what they hold is read and written, and so are
// whole clusters; the rest is ErrBackingRequired and changes nothing.
func TestNoBacking(t *testing.T) {
	const size = 6 * apiCluster
	for _, extended := range []bool{false, true} {
		unit := int64(apiCluster)
		if extended {
			unit /= 32
		}
		for _, reopen := range []bool{false, true} {
			t.Run(fmt.Sprintf("extended=%t/reopen=%t", extended, reopen), func(t *testing.T) {
				img, s := create(t, size, &qcow2.CreateOptions{BackingFile: "base", BackingFormat: "raw", ExtendedL2: extended})
				if reopen {
					closeImage(t, img)
					var err error
					if img, err = qcow2.OpenStorage(s, &qcow2.OpenOptions{ReadWrite: true, NoBacking: true}); err != nil {
						t.Fatal(err)
					}
					defer func() { _ = img.Close() }()
				}
				required := func(what string, n int, err error) {
					t.Helper()
					var file *qcow2.FileRequiredError
					if n != 0 || !errors.Is(err, qcow2.ErrBackingRequired) || !errors.As(err, &file) {
						t.Fatalf("%s: %d, %v, want 0 and a *FileRequiredError", what, n, err)
					}
					want := qcow2.FileRef{Name: "base", Format: "raw", Kind: qcow2.KindBacking}
					if d := cmp.Diff(want, file.Ref, cmpopts.IgnoreFields(qcow2.FileRef{}, "Image")); d != "" {
						t.Errorf("%s (-want +got):\n%s", what, d)
					}
				}
				p := make([]byte, apiCluster)
				n, err := img.ReadAt(p[:512], 0)
				required("read of a fresh overlay", n, err)
				expectRefused(t, img, s, func() {
					n, err := img.WriteAt(text(1, 100), 50)
					required("write of a part of a fresh overlay", n, err)
					n, err = img.WriteAt(text(1, 1), size-1)
					required("write of its last byte", n, err)
				})
				for _, err = range img.Extents(0, size) {
					if err != nil {
						break
					}
				}
				required("extents", 0, err)

				want := text(2, unit)
				writeAt(t, img, want, unit)
				writeAt(t, img, text(3, 99), unit+33)
				copy(want[33:], text(3, 99))
				if err := img.WriteCompressed(text(4, apiCluster), 3*apiCluster); err != nil {
					t.Fatal(err)
				}
				expect := func() {
					t.Helper()
					p := make([]byte, unit)
					if _, err := img.ReadAt(p, unit); err != nil || !bytes.Equal(p, want) {
						t.Errorf("what the overlay holds: %v, or other content", err)
					}
					p = make([]byte, apiCluster)
					if _, err := img.ReadAt(p, 3*apiCluster); err != nil || !bytes.Equal(p, text(4, apiCluster)) {
						t.Errorf("what the overlay holds compressed: %v, or other content", err)
					}
				}
				expect()
				n, err = img.ReadAt(p[:2], 2*unit-1)
				required("read across the end of what it holds", n, err)
				n, err = img.WriteAt(text(5, unit/2), 2*unit+1)
				required("write of a part beside what it holds", n, err)
				expect()
				closeImage(t, img)
				if img, err = qcow2.OpenStorage(s, &qcow2.OpenOptions{NoBacking: true}); err != nil {
					t.Fatal(err)
				}
				expect()
				closeImage(t, img)
			})
		}
	}
}

// TestBackingDisk puts Disks of the caller's own below an overlay.
func TestBackingDisk(t *testing.T) {
	const size = 4 * apiCluster
	broken := errors.New("broken")
	content := text(1, size)
	tests := []struct {
		name string
		disk *callerDisk
		err  error // of reads and of writes of parts; nil: it reads as content, and zeros behind
	}{
		{name: "equal", disk: newCallerDisk(content)},
		{name: "empty", disk: newCallerDisk(nil)},
		{name: "smaller", disk: newCallerDisk(content[:apiCluster+512])},
		{name: "odd", disk: newCallerDisk(content[:2*apiCluster+1000])},
		{name: "one byte", disk: newCallerDisk(content[:1])},
		{name: "larger", disk: newCallerDisk(append(bytes.Clone(content), content...))},
		{name: "full with EOF", disk: &callerDisk{content: content, size: size, read: func(d *callerDisk, p []byte, off int64) (int, error) {
			return copy(p, d.content[off:]), io.EOF
		}}},
		{name: "short with EOF", err: io.ErrUnexpectedEOF, disk: &callerDisk{content: content, size: size, read: func(d *callerDisk, p []byte, off int64) (int, error) {
			return copy(p[:len(p)/2], d.content[off:]), io.EOF
		}}},
		{name: "nothing with EOF", err: io.ErrUnexpectedEOF, disk: &callerDisk{size: size}},
		{name: "short with nil", err: io.ErrUnexpectedEOF, disk: &callerDisk{content: content, size: size, read: func(d *callerDisk, p []byte, off int64) (int, error) {
			return copy(p[:len(p)-1], d.content[off:]), nil
		}}},
		{name: "error", err: broken, disk: &callerDisk{content: content, size: size, read: func(*callerDisk, []byte, int64) (int, error) {
			return 0, broken
		}}},
		{name: "short with error", err: broken, disk: &callerDisk{content: content, size: size, read: func(d *callerDisk, p []byte, off int64) (int, error) {
			return copy(p[:len(p)/2], d.content[off:]), broken
		}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img, s := create(t, size, &qcow2.CreateOptions{
				BackingFile: "own", BackingFormat: "raw", Open: &qcow2.OpenOptions{Backing: tt.disk},
			})
			if img.Backing() != qcow2.Disk(tt.disk) {
				t.Error("Backing is another disk")
			}
			want := make([]byte, size)
			copy(want, tt.disk.content)
			part := text(2, 700)
			const off = apiCluster/2 + 3
			if tt.err != nil {
				if n, err := img.ReadAt(make([]byte, size), 0); n != 0 || !errors.Is(err, tt.err) {
					t.Errorf("ReadAt: %d, %v, want 0, %v", n, err, tt.err)
				}
				expectRefused(t, img, s, func() {
					if n, err := img.WriteAt(part, off); n != 0 || !errors.Is(err, tt.err) {
						t.Errorf("WriteAt of a part: %d, %v, want 0, %v", n, err, tt.err)
					}
				})
				writeAt(t, img, want, 0)
			} else {
				expectDisk(t, img, want)
			}
			writeAt(t, img, part, off)
			copy(want[off:], part)
			writeAt(t, img, part, size-700)
			copy(want[size-700:], part)
			expectDisk(t, img, want)
			closeImage(t, img)
		})
	}
}

// TestSnapshots compares Snapshots with what qemu-img says about an image with snapshots.
func TestSnapshots(t *testing.T) {
	qemutest.Require(t)
	path := filepath.Join(t.TempDir(), "image.qcow2")
	img, err := qcow2.Create(path, 4*apiCluster, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := img.Snapshots(); len(got) != 0 {
		t.Errorf("a new image has snapshots: %+v", got)
	}
	closeImage(t, img)
	for _, name := range []string{"first", "the second", "dritter für ü"} {
		qemutest.Img(t, "snapshot", "-q", "-c", name, path)
	}
	type row struct {
		ID, Name  string
		Sec, Nsec int64
	}
	var got, want []row
	for _, s := range qemutest.Info(t, path)["snapshots"].([]any) {
		m := s.(map[string]any)
		number := func(key string) int64 {
			n, err := m[key].(json.Number).Int64()
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		want = append(want, row{m["id"].(string), m["name"].(string), number("date-sec"), number("date-nsec")})
	}
	img = open(t, path, nil)
	list := img.Snapshots()
	for _, s := range list {
		got = append(got, row{s.ID, s.Name, s.Date.Unix(), int64(s.Date.Nanosecond())})
		if s.DiskSize != 4*apiCluster || s.VMStateSize != 0 {
			t.Errorf("snapshot %s: %+v", s.ID, s)
		}
	}
	if d := cmp.Diff(want, got); d != "" || len(got) != 3 {
		t.Errorf("%d snapshots (-qemu-img +got):\n%s", len(got), d)
	}
	if n := img.Info().SnapshotCount; n != 3 {
		t.Errorf("Info counts %d snapshots", n)
	}
	kept := slices.Clone(list)
	list[0].Name = "changed"
	if d := cmp.Diff(kept, img.Snapshots()); d != "" {
		t.Errorf("the caller's list is the image's (-want +got):\n%s", d)
	}
}

// TestCreateInfo compares Info after Create and after opening again.
func TestCreateInfo(t *testing.T) {
	const size = 1<<30 + 512
	tests := []struct {
		name string
		opts qcow2.CreateOptions
		want qcow2.Info
	}{
		{
			name: "default",
			want: qcow2.Info{Version: 3, ClusterSize: 65536, SubclusterSize: 65536, RefcountBits: 16, L1Entries: 3, HeaderLength: 112},
		},
		{
			name: "version 2",
			opts: qcow2.CreateOptions{Version: 2, ClusterSize: 4096},
			want: qcow2.Info{Version: 2, ClusterSize: 4096, SubclusterSize: 4096, RefcountBits: 16, L1Entries: 513, HeaderLength: 72},
		},
		{
			name: "overlay",
			opts: qcow2.CreateOptions{
				BackingFile: "base", BackingFormat: "qcow2", ExtendedL2: true, Compression: qcow2.CompressionZstd, RefcountBits: 64, LazyRefcounts: true,
			},
			want: qcow2.Info{
				Version: 3, ClusterSize: 65536, SubclusterSize: 2048, RefcountBits: 64, L1Entries: 5, HeaderLength: 112,
				BackingFile: "base", BackingFormat: "qcow2", ExtendedL2: true, Compression: qcow2.CompressionZstd, LazyRefcounts: true,
				IncompatibleFeatures: 1<<3 | 1<<4, CompatibleFeatures: 1 << 0,
			},
		},
		{
			name: "data file",
			opts: qcow2.CreateOptions{
				DataFile: "data", DataFileRaw: true, ClusterSize: 2 << 20, RefcountBits: 1,
				Open: &qcow2.OpenOptions{DataFile: qcow2.NewMemoryStorage()},
			},
			want: qcow2.Info{
				Version: 3, ClusterSize: 2 << 20, SubclusterSize: 2 << 20, RefcountBits: 1, L1Entries: 1, HeaderLength: 112,
				NeedsDataFile: true, DataFile: "data", DataFileRaw: true, IncompatibleFeatures: 1 << 2, AutoclearFeatures: 1 << 1,
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img, s := create(t, size, &tt.opts)
			want := tt.want
			want.VirtualSize, want.HeaderSize = size, size
			var err error
			if want.FileSize, err = s.Size(); err != nil {
				t.Fatal(err)
			}
			want.EndOffset = want.FileSize // a new file ends with what is in use
			ignore := cmpopts.IgnoreFields(qcow2.Info{}, "Locked")
			if d := cmp.Diff(want, img.Info(), ignore, cmpopts.EquateEmpty()); d != "" {
				t.Errorf("after Create (-want +got):\n%s", d)
			}
			if img.Size() != size {
				t.Errorf("Size is %d", img.Size())
			}
			closeImage(t, img)
			o := &qcow2.OpenOptions{NoBacking: true}
			if tt.opts.Open != nil {
				o = tt.opts.Open
			}
			if img, err = qcow2.OpenStorage(s, o); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, img.Info(), ignore, cmpopts.EquateEmpty()); d != "" {
				t.Errorf("opened again (-want +got):\n%s", d)
			}
			closeImage(t, img)
		})
	}
}

// TestConvertOptions gives Convert what it must refuse; the target stays as it was.
func TestConvertOptions(t *testing.T) {
	const size = 4 * apiCluster
	src := newCallerDisk(text(1, size))
	tests := []struct {
		name   string
		opts   qcow2.ConvertOptions
		src    qcow2.Disk
		err    error
		option string // of the *OptionError, if it is one
	}{
		{name: "sparse 1", opts: qcow2.ConvertOptions{SparseSize: 1}, err: qcow2.ErrOption, option: "SparseSize"},
		{name: "sparse 256", opts: qcow2.ConvertOptions{SparseSize: 256}, err: qcow2.ErrOption, option: "SparseSize"},
		{name: "sparse 1000", opts: qcow2.ConvertOptions{SparseSize: 1000}, err: qcow2.ErrOption, option: "SparseSize"},
		{name: "sparse 2M", opts: qcow2.ConvertOptions{SparseSize: 2 << 20}, err: qcow2.ErrOption, option: "SparseSize"},
		{name: "window 8192", opts: qcow2.ConvertOptions{DeflateWindow: 8192}, err: qcow2.ErrOption, option: "DeflateWindow"},
		{name: "zeroes 3", opts: qcow2.ConvertOptions{Zeroes: 3}, err: qcow2.ErrOption, option: "Zeroes"},
		{name: "zeroes -1", opts: qcow2.ConvertOptions{Zeroes: -1}, err: qcow2.ErrOption, option: "Zeroes"},
		{name: "zero clusters there", opts: qcow2.ConvertOptions{Zeroes: qcow2.ZeroesClusters, TargetIsZero: true},
			err: qcow2.ErrOption, option: "TargetIsZero"},
		{name: "shared above", opts: qcow2.ConvertOptions{SharedDepth: -1}, err: qcow2.ErrOption, option: "SharedDepth"},
		{name: "workers -1", opts: qcow2.ConvertOptions{Workers: -1}, err: qcow2.ErrOption, option: "Workers"},
		{name: "rate -1", opts: qcow2.ConvertOptions{Rate: -1}, err: qcow2.ErrOption, option: "Rate"},
		{name: "compress", opts: qcow2.ConvertOptions{Compress: true}, err: qcow2.ErrOption, option: "Compress"},
		{name: "smaller by a sector", src: newCallerDisk(text(1, size+512)), err: qcow2.ErrTooLarge},
		{name: "smaller by a byte", src: newCallerDisk(text(1, size+1)), err: qcow2.ErrTooLarge},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dst := &writesDisk{callerDisk: newCallerDisk(make([]byte, size))}
			from := tt.src
			if from == nil {
				from = src
			}
			err := qcow2.Convert(context.Background(), dst, from, &tt.opts)
			if !errors.Is(err, tt.err) {
				t.Errorf("%v, want %v", err, tt.err)
			}
			var option *qcow2.OptionError
			if tt.option != "" && (!errors.As(err, &option) || option.Option != tt.option) {
				t.Errorf("%v, want an *OptionError of %s", err, tt.option)
			}
			if len(dst.writes) > 0 {
				t.Errorf("it wrote %v", dst.writes)
			}
		})
	}
}

// TestConvertCompressDataFile refuses to compress into an image whose data is in a file of its own.
func TestConvertCompressDataFile(t *testing.T) {
	img, _ := create(t, apiCluster, &qcow2.CreateOptions{DataFile: "data", Open: &qcow2.OpenOptions{DataFile: qcow2.NewMemoryStorage()}})
	err := qcow2.Convert(context.Background(), img, newCallerDisk(text(1, apiCluster)), &qcow2.ConvertOptions{Compress: true})
	if !errors.Is(err, qcow2.ErrUnsupported) {
		t.Errorf("%v, want ErrUnsupported", err)
	}
	expectDisk(t, img, make([]byte, apiCluster))
}

// TestConvertSparse checks which ranges Convert writes, by SparseSize and target.
func TestConvertSparse(t *testing.T) {
	const size = 4 * apiCluster
	content := make([]byte, size)
	copy(content, text(1, 4096))
	content[12288] = 1
	content[3*apiCluster+5000] = 1
	tests := []struct {
		sparse int
		want   []writeRange // of a target that holds nothing
	}{
		{0, []writeRange{{0, 4096}, {12288, 4096}, {3*apiCluster + 4096, 4096}}},
		{512, []writeRange{{0, 4096}, {12288, 512}, {3*apiCluster + 4608, 512}}},
		{4096, []writeRange{{0, 4096}, {12288, 4096}, {3*apiCluster + 4096, 4096}}},
		{16 << 10, []writeRange{{0, 16 << 10}, {3 * apiCluster, 16 << 10}}},
		{1 << 20, []writeRange{{0, size}}},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.sparse), func(t *testing.T) {
			opts := &qcow2.ConvertOptions{SparseSize: tt.sparse}
			holes := holesDisk{&writesDisk{callerDisk: newCallerDisk(make([]byte, size))}}
			if err := qcow2.Convert(context.Background(), holes, newCallerDisk(content), opts); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, holes.writes); d != "" {
				t.Errorf("written (-want +got):\n%s", d)
			}
			if !bytes.Equal(holes.content, content) || holes.syncs == 0 {
				t.Errorf("other content, or not synced: %d syncs", holes.syncs)
			}
			// A target that holds something already gets all the zeros as well.
			full := &writesDisk{callerDisk: newCallerDisk(text(2, size))}
			if err := qcow2.Convert(context.Background(), full, newCallerDisk(content), opts); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(full.content, content) {
				t.Error("over old content: other content")
			}
			// An image is written by whole clusters at least.
			img, _ := create(t, size, nil)
			if err := qcow2.Convert(context.Background(), img, newCallerDisk(content), opts); err != nil {
				t.Fatal(err)
			}
			expectDisk(t, img, content)
			whole := []qcow2.ExtentKind{qcow2.ExtentData, qcow2.ExtentUnallocated, qcow2.ExtentUnallocated, qcow2.ExtentData}
			if tt.sparse > apiCluster {
				whole = slices.Repeat([]qcow2.ExtentKind{qcow2.ExtentData}, 4)
			}
			if d := cmp.Diff(whole, kinds(t, img)); d != "" {
				t.Errorf("clusters (-want +got):\n%s", d)
			}
		})
	}
}

// kinds returns what the clusters of an image with default options are.
func kinds(t *testing.T, img *qcow2.Image) (out []qcow2.ExtentKind) {
	t.Helper()
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		for n := int64(0); n < e.Len; n += apiCluster {
			out = append(out, e.Kind)
		}
	}
	return out
}

// TestConvertCancelled ends a Convert by its context: before it begins, and at the first report of progress.
func TestConvertCancelled(t *testing.T) {
	const size = 16 << 20
	src := newCallerDisk(text(1, size))
	cause := errors.New("enough")
	t.Run("before", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		dst := holesDisk{&writesDisk{callerDisk: newCallerDisk(make([]byte, size))}}
		if err := qcow2.Convert(ctx, dst, src, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want context.Canceled", err)
		}
		if len(dst.writes) > 0 {
			t.Errorf("it wrote %v", dst.writes)
		}
	})
	t.Run("within", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(context.Background())
		dst := holesDisk{&writesDisk{callerDisk: newCallerDisk(make([]byte, size))}}
		calls := 0
		opts := &qcow2.ConvertOptions{Progress: func(done, total int64) {
			calls++
			cancel(cause)
		}}
		if err := qcow2.Convert(ctx, dst, src, opts); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want context.Canceled", err)
		}
		if last := dst.writes[len(dst.writes)-1]; calls != 1 || last.Off+last.N >= size {
			t.Errorf("%d reports of progress, written up to %#x", calls, last.Off+last.N)
		}
	})
	t.Run("zeroing the rest", func(t *testing.T) {
		// The source is empty: all that there is to do is to make the target's old content zeros.
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		dst := &writesDisk{callerDisk: newCallerDisk(text(2, size))}
		if err := qcow2.Convert(ctx, dst, newCallerDisk(nil), nil); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want context.Canceled", err)
		}
		if len(dst.writes) > 0 {
			t.Errorf("it wrote %v", dst.writes)
		}
	})
}

// TestConvertProgress checks that progress rises, and ends with all of it.
func TestConvertProgress(t *testing.T) {
	for _, size := range []int64{0, 512, apiCluster, 5<<20 + 512} {
		for _, zeros := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d/zeros=%t", size, zeros), func(t *testing.T) {
				content := text(1, size)
				if zeros {
					clear(content)
				}
				img, _ := create(t, size+apiCluster, nil)
				last, calls := int64(-1), 0
				opts := &qcow2.ConvertOptions{Progress: func(done, total int64) {
					calls++
					if done <= last || done > total || total != size {
						t.Errorf("%d of %d after %d, want a total of %d", done, total, last, size)
					}
					last = done
				}}
				if err := qcow2.Convert(context.Background(), img, newCallerDisk(content), opts); err != nil {
					t.Fatal(err)
				}
				if last != size {
					t.Errorf("the last of %d reports says %d of %d", calls, last, size)
				}
				expectDisk(t, img, append(content, make([]byte, apiCluster)...))
			})
		}
	}
}

// TestConvertTargets converts into images that are larger, hold something, or lie over a backing disk: they
// read as the source afterwards, and as zeros behind it.
func TestConvertTargets(t *testing.T) {
	const size = 4*apiCluster + 1536 // ends inside a cluster
	content := text(1, size)
	clear(content[apiCluster : 2*apiCluster])
	clear(content[3*apiCluster+100 : 4*apiCluster])
	clear(content[2*apiCluster : 2*apiCluster+20000]) // a cluster that begins with zeros is still written whole
	for _, more := range []int64{0, 512, 3*apiCluster - 1536, 5 * apiCluster} {
		for _, compress := range []bool{false, true} {
			for _, below := range []bool{false, true} {
				for _, held := range []bool{false, true} {
					for _, zeros := range []bool{false, true} {
						t.Run(fmt.Sprintf("more=%d/compress=%t/backing=%t/held=%t/zeros=%t", more, compress, below, held, zeros), func(t *testing.T) {
							opts := &qcow2.CreateOptions{Open: &qcow2.OpenOptions{}}
							if below {
								opts.Open.Backing = newCallerDisk(text(2, size+more))
							}
							img, s := create(t, size+more, opts)
							if held {
								writeAt(t, img, text(3, size+more-700), 300)
							}
							src := content
							if zeros {
								src = make([]byte, size)
							}
							err := qcow2.Convert(context.Background(), img, newCallerDisk(src), &qcow2.ConvertOptions{Compress: compress})
							if err != nil {
								t.Fatal(err)
							}
							want := append(bytes.Clone(src), make([]byte, more)...)
							expectDisk(t, img, want)
							got := kinds(t, img)
							if compress && !zeros && (got[0] != qcow2.ExtentCompressed || got[2] != qcow2.ExtentCompressed) {
								t.Errorf("clusters %v, want those with data compressed", got)
							}
							if !below && !held && got[1] != qcow2.ExtentUnallocated {
								t.Errorf("clusters %v, want nothing where the source is zero", got)
							}
							closeImage(t, img)
							// All of it is in the image, or still hides the backing disk, once it is opened again.
							if img, err = qcow2.OpenStorage(s, opts.Open); err != nil {
								t.Fatal(err)
							}
							expectDisk(t, img, want)
							closeImage(t, img)
						})
					}
				}
			}
		}
	}
}
