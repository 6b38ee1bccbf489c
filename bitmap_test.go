package qcow2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// bitmapSpec is a bitmap directory entry to be built.
type bitmapSpec struct {
	tableOff    uint64
	tableSize   uint32
	flags       uint32
	typ         uint8
	granularity uint8
	name        string
	nameSize    int // what the field says; 0: the truth
	extraSize   uint32
}

// append appends the entry, with its padding, to the directory b.
func (s bitmapSpec) append(b []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint64(b, s.tableOff)
	b = be.AppendUint32(b, s.tableSize)
	b = be.AppendUint32(b, s.flags)
	b = append(b, s.typ, s.granularity)
	size := s.nameSize
	if size == 0 {
		size = len(s.name)
	}
	b = be.AppendUint16(b, uint16(size))
	b = be.AppendUint32(b, s.extraSize)
	b = append(b, s.name...)
	return append(b, make([]byte, -len(b)&7)...)
}

// testBitmapOff is where the tests put the bitmap directory.
const testBitmapOff = 4 << 16

// bitmapImage returns the header of an image of 1 GiB whose bitmap directory holds the entries, and the
// file, which ends with the directory.
func bitmapImage(t testing.TB, specs ...bitmapSpec) (*header, []byte) {
	t.Helper()
	h := testHeader(t, 1<<30, nil)
	var dir []byte
	for _, s := range specs {
		dir = s.append(dir)
	}
	h.autoclear |= autoclearBitmaps
	h.bitmaps = &bitmapsExtension{count: uint32(len(specs)), dirSize: uint64(len(dir)), dirOff: testBitmapOff}
	file := testFile(t, h)
	file = append(file, make([]byte, testBitmapOff-len(file))...)
	return h, append(file, dir...)
}

// testBitmap is a valid entry: 1 GiB in units of 64 KiB are 2 KiB of bitmap, one cluster.
var testBitmap = bitmapSpec{tableOff: 5 << 16, tableSize: 1, flags: bitmapAuto, typ: 1, granularity: 16, name: "b"}

// TestReadBitmapDirectory checks entries that are taken, and the marks that they need.
func TestReadBitmapDirectory(t *testing.T) {
	with := func(change func(*bitmapSpec)) bitmapSpec {
		s := testBitmap
		change(&s)
		return s
	}
	specs := []bitmapSpec{
		testBitmap,
		with(func(s *bitmapSpec) { s.name, s.flags = "twelve bytes", bitmapInUse }),
		with(func(s *bitmapSpec) { s.name, s.granularity, s.tableSize = "fine", 9, 4 }), // 1 GiB / 512 / 8 = 256 KiB
		with(func(s *bitmapSpec) { s.name, s.granularity, s.flags = "coarse", 31, 0 }),
		with(func(s *bitmapSpec) { s.name, s.tableSize, s.flags = "stale and long", 77, bitmapInUse|bitmapAuto }),
		with(func(s *bitmapSpec) { s.name = strings.Repeat("n", 1023) }),
	}
	h, file := bitmapImage(t, specs...)
	got, err := readBitmapDirectory(bytes.NewReader(file), int64(len(file)), h, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	var want []bitmapEntry
	off := uint64(testBitmapOff)
	for _, s := range specs {
		want = append(want, bitmapEntry{off, s.tableOff, s.tableSize, s.flags, s.granularity, s.name})
		off += uint64(len(s.append(nil)))
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(bitmapEntry{})); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}

	marks := bitmapMarks(got)
	if len(marks) != 4 {
		t.Errorf("%d marks, want 4", len(marks))
	}
	for _, m := range marks {
		if m.off/sectorSize != (m.off+3)/sectorSize {
			t.Errorf("mark at %#x crosses a sector", m.off)
		}
		binary.BigEndian.PutUint32(file[m.off:], m.flags)
	}
	marked, err := readBitmapDirectory(bytes.NewReader(file), int64(len(file)), h, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		want[i].flags |= bitmapInUse
	}
	if diff := cmp.Diff(want, marked, cmp.AllowUnexported(bitmapEntry{})); diff != "" {
		t.Errorf("after the marks (-want +got):\n%s", diff)
	}
	if marks := bitmapMarks(marked); marks != nil {
		t.Errorf("marks %+v of marked bitmaps, want none", marks)
	}

	// Without the autoclear bit there are no bitmaps to speak of.
	h.autoclear = 0
	if got, err := readBitmapDirectory(bytes.NewReader(nil), 0, h, Limits{}); got != nil || err != nil {
		t.Errorf("%v, %v; want nothing", got, err)
	}
}

// TestReadBitmapDirectoryErrors pokes one thing at a time.
func TestReadBitmapDirectoryErrors(t *testing.T) {
	tests := []struct {
		name    string
		change  func(*bitmapSpec)
		header  func(*header)
		file    func([]byte) []byte
		limits  Limits
		wantErr error
	}{
		{name: "table at 0", change: func(s *bitmapSpec) { s.tableOff = 0 }, wantErr: ErrCorrupt},
		{name: "table unaligned", change: func(s *bitmapSpec) { s.tableOff += 512 }, wantErr: ErrCorrupt},
		{name: "table beyond", change: func(s *bitmapSpec) { s.tableOff = 1 << 56 }, wantErr: ErrCorrupt},
		{name: "table far beyond", change: func(s *bitmapSpec) { s.tableOff = 1<<64 - 1<<16 }, wantErr: ErrCorrupt},
		{name: "no table", change: func(s *bitmapSpec) { s.tableSize = 0 }, wantErr: ErrCorrupt},
		{name: "table too short", change: func(s *bitmapSpec) { s.granularity = 9 }, wantErr: ErrCorrupt},
		{name: "table too long", change: func(s *bitmapSpec) { s.tableSize = 2 }, wantErr: ErrCorrupt},
		{name: "stale table above 512 MiB", change: func(s *bitmapSpec) { s.tableSize, s.flags = 8193, bitmapInUse }, wantErr: ErrCorrupt},
		{name: "stale table huge", change: func(s *bitmapSpec) { s.tableSize, s.flags = math.MaxUint32, bitmapInUse }, wantErr: ErrCorrupt},
		{name: "stale table of 512 MiB", change: func(s *bitmapSpec) { s.tableSize, s.flags = 8192, bitmapInUse }},
		{name: "flag 2", change: func(s *bitmapSpec) { s.flags = 4 }, wantErr: ErrUnsupported},
		{name: "flag 31", change: func(s *bitmapSpec) { s.flags = 1 << 31 }, wantErr: ErrUnsupported},
		{name: "type 0", change: func(s *bitmapSpec) { s.typ = 0 }, wantErr: ErrUnsupported},
		{name: "type 2", change: func(s *bitmapSpec) { s.typ = 2 }, wantErr: ErrUnsupported},
		{name: "extra data", change: func(s *bitmapSpec) { s.extraSize = 8 }, wantErr: ErrUnsupported},
		{name: "extra data huge", change: func(s *bitmapSpec) { s.extraSize = math.MaxUint32 }, wantErr: ErrUnsupported},
		{name: "granularity 8", change: func(s *bitmapSpec) { s.granularity = 8 }, wantErr: ErrCorrupt},
		{name: "granularity 32", change: func(s *bitmapSpec) { s.granularity = 32 }, wantErr: ErrCorrupt},
		{name: "granularity 255", change: func(s *bitmapSpec) { s.granularity = 255 }, wantErr: ErrCorrupt},
		{name: "no name", change: func(s *bitmapSpec) { s.name = "" }, wantErr: ErrCorrupt},
		{name: "long name", change: func(s *bitmapSpec) { s.name = strings.Repeat("n", 1024) }, wantErr: ErrCorrupt},
		{name: "name past the end", change: func(s *bitmapSpec) { s.nameSize = 1000 }, wantErr: ErrCorrupt},
		{name: "same name", change: func(s *bitmapSpec) { s.name = "first" }, wantErr: ErrCorrupt},
		{name: "directory too long", header: func(h *header) { h.bitmaps.count = 1 }, wantErr: ErrCorrupt},
		{name: "directory too short", header: func(h *header) { h.bitmaps.count = 3 }, wantErr: ErrCorrupt},
		{name: "directory far too short", header: func(h *header) { h.bitmaps.count = math.MaxUint32 }, wantErr: ErrCorrupt},
		{name: "directory without padding", header: func(h *header) { h.bitmaps.dirSize-- }, wantErr: ErrCorrupt},
		{name: "directory past the end", file: func(b []byte) []byte { return b[:len(b)-1] }, wantErr: ErrCorrupt},
		{name: "directory far past the end", header: func(h *header) { h.bitmaps.dirOff = 1 << 50 }, wantErr: ErrCorrupt},
		{name: "limit", limits: Limits{MetadataBytes: 63}, wantErr: ErrLimit},
		{name: "at the limit", limits: Limits{MetadataBytes: 64}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			first, second := testBitmap, testBitmap
			first.name = "first"
			if tt.change != nil {
				tt.change(&second)
			}
			h, file := bitmapImage(t, first, second)
			if tt.header != nil {
				tt.header(h)
			}
			if tt.file != nil {
				file = tt.file(file)
			}
			got, err := readBitmapDirectory(bytes.NewReader(file), int64(len(file)), h, tt.limits)
			if !errors.Is(err, tt.wantErr) {
				t.Errorf("error %v, want %v", err, tt.wantErr)
			}
			if tt.wantErr == nil && len(got) != 2 {
				t.Errorf("%d bitmaps, want 2", len(got))
			}
		})
	}
	h, _ := bitmapImage(t, testBitmap)
	wantErr := errors.New("broken disk")
	if _, err := readBitmapDirectory(&countingReader{err: wantErr}, 1<<30, h, Limits{}); !errors.Is(err, wantErr) || errors.Is(err, ErrCorrupt) {
		t.Errorf("error %v, want %v", err, wantErr)
	}
}

// TestBitmapDirectoryQEMU reads a directory that qemu-img wrote, and lets qemu-img judge the marks.
func TestBitmapDirectoryQEMU(t *testing.T) {
	qemutest.Require(t)
	for _, options := range []string{"cluster_size=512", "cluster_size=64k", "cluster_size=2M"} {
		t.Run(options, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "image.qcow2")
			qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", options, name, "9M")
			for i, granularity := range []string{"512", "65536", "4096"} {
				qemutest.Img(t, "bitmap", "--add", "-g", granularity, name, strings.Repeat("bitmap", i*i+1))
			}
			qemutest.Img(t, "bitmap", "--disable", name, "bitmap")
			read := func() (*header, []bitmapEntry) {
				t.Helper()
				b, err := os.ReadFile(name)
				if err != nil {
					t.Fatal(err)
				}
				h, _ := readImageHeader(t, name)
				entries, err := readBitmapDirectory(bytes.NewReader(b), int64(len(b)), h, Limits{})
				if err != nil {
					t.Fatal(err)
				}
				return h, entries
			}
			compare := func(entries []bitmapEntry) {
				t.Helper()
				var got []any
				for _, e := range entries {
					flags := []any{}
					if e.inUse() {
						flags = append(flags, "in-use")
					}
					if e.flags&bitmapAuto != 0 {
						flags = append(flags, "auto")
					}
					got = append(got, map[string]any{"name": e.name, "flags": flags, "granularity": json.Number(fmt.Sprint(1 << e.granularity))})
				}
				data := qemutest.Info(t, name)["format-specific"].(map[string]any)["data"].(map[string]any)
				if diff := cmp.Diff(data["bitmaps"], any(got)); diff != "" {
					t.Errorf("bitmaps (-qemu +ours):\n%s", diff)
				}
			}
			h, entries := read()
			compare(entries)

			// The three steps of a writable open.
			marks := bitmapMarks(entries)
			if len(marks) != 3 {
				t.Fatalf("%d marks, want 3", len(marks))
			}
			off, b := h.encodeAutoclearField(h.autoclear &^ autoclearBitmaps)
			overwriteFile(t, name, off, b)
			for _, m := range marks {
				overwriteFile(t, name, int64(m.off), binary.BigEndian.AppendUint32(nil, m.flags))
			}
			off, b = h.encodeAutoclearField(h.autoclear)
			overwriteFile(t, name, off, b)
			if _, entries = read(); bitmapMarks(entries) != nil {
				t.Error("marks are still needed")
			}
			compare(entries)
			qemutest.CheckClean(t, name)
		})
	}
}
