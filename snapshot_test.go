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
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// snapshotSpec is a snapshot table entry to be built. Its extra data may be any bytes.
type snapshotSpec struct {
	l1Off     uint64
	l1Size    uint32
	id, name  string
	sec, nsec uint32
	clock     uint64
	vmState32 uint32
	extra     []byte
	extraSize uint32 // what the field says; 0: the truth
}

// append appends the entry, padded, to the table b.
func (s snapshotSpec) append(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, make([]byte, -len(b)&7)...)
	b = be.AppendUint64(b, s.l1Off)
	b = be.AppendUint32(b, s.l1Size)
	b = be.AppendUint16(b, uint16(len(s.id)))
	b = be.AppendUint16(b, uint16(len(s.name)))
	b = be.AppendUint32(b, s.sec)
	b = be.AppendUint32(b, s.nsec)
	b = be.AppendUint64(b, s.clock)
	b = be.AppendUint32(b, s.vmState32)
	size := s.extraSize
	if size == 0 {
		size = uint32(len(s.extra))
	}
	b = be.AppendUint32(b, size)
	b = append(b, s.extra...)
	b = append(b, s.id...)
	return append(b, s.name...)
}

// snapshotExtra returns the extra data of the given numbers, of 8 bytes each.
func snapshotExtra(numbers ...uint64) (b []byte) {
	for _, n := range numbers {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	return b
}

// testSnapshotOff is where the tests put the snapshot table.
const testSnapshotOff = 4 << 16

// snapshotImage returns the header of an image of 3 MiB and 512 bytes whose snapshot table holds the
// entries, and the file, which ends with the table.
func snapshotImage(t testing.TB, specs ...snapshotSpec) (*header, []byte) {
	t.Helper()
	h := testHeader(t, 3<<20+512, nil)
	h.nbSnapshots, h.snapshotsOff = uint32(len(specs)), testSnapshotOff
	var table []byte
	for _, s := range specs {
		table = s.append(table)
	}
	file := testFile(t, h)
	file = append(file, make([]byte, testSnapshotOff-len(file))...)
	return h, append(file, table...)
}

// TestReadSnapshotTable checks what becomes of each field, at every length of the extra data.
func TestReadSnapshotTable(t *testing.T) {
	base := snapshotSpec{l1Off: 5 << 16, l1Size: 1, id: "1", name: "tag", sec: 1700000000, nsec: 123456789, clock: 5e9, vmState32: 77}
	plain := Snapshot{
		ID: "1", Name: "tag", DiskSize: 3<<20 + 512, VMStateSize: 77, ICount: -1,
		Date: time.Unix(1700000000, 123456789), VMClock: 5 * time.Second,
	}
	spec := func(change func(*snapshotSpec)) snapshotSpec {
		s := base
		change(&s)
		return s
	}
	want := func(change func(*Snapshot)) Snapshot {
		s := plain
		change(&s)
		return s
	}
	tests := []struct {
		name string
		spec snapshotSpec
		want Snapshot
	}{
		{"no extra data", base, plain},
		{"4 bytes", spec(func(s *snapshotSpec) { s.extra = []byte{1, 2, 3, 4} }), plain},
		{"VM state", spec(func(s *snapshotSpec) { s.extra = snapshotExtra(1 << 40) }), want(func(s *Snapshot) { s.VMStateSize = 1 << 40 })},
		{"disk size", spec(func(s *snapshotSpec) { s.extra = snapshotExtra(0, 1<<30) }), want(func(s *Snapshot) { s.VMStateSize, s.DiskSize = 0, 1<<30 })},
		{"icount", spec(func(s *snapshotSpec) { s.extra = snapshotExtra(0, 1<<30, 42) }),
			want(func(s *Snapshot) { s.VMStateSize, s.DiskSize, s.ICount = 0, 1<<30, 42 })},
		{"no icount", spec(func(s *snapshotSpec) { s.extra = snapshotExtra(0, 1<<30, math.MaxUint64) }),
			want(func(s *Snapshot) { s.VMStateSize, s.DiskSize = 0, 1<<30 })},
		{"unknown", spec(func(s *snapshotSpec) { s.extra = append(snapshotExtra(0, 1<<30, 42), "more"...) }),
			want(func(s *Snapshot) { s.VMStateSize, s.DiskSize, s.ICount = 0, 1<<30, 42 })},
		{"most extra data", spec(func(s *snapshotSpec) { s.extra = make([]byte, 1024) }),
			want(func(s *Snapshot) { s.VMStateSize, s.DiskSize, s.ICount = 0, 0, 0 })},
		{"no id and name", spec(func(s *snapshotSpec) { s.id, s.name = "", "" }), want(func(s *Snapshot) { s.ID, s.Name = "", "" })},
		{"long id and name", spec(func(s *snapshotSpec) { s.id, s.name = strings.Repeat("i", 65535), strings.Repeat("n", 65535) }),
			want(func(s *Snapshot) { s.ID, s.Name = strings.Repeat("i", 65535), strings.Repeat("n", 65535) })},
		{"numbers beyond int64", spec(func(s *snapshotSpec) {
			s.clock, s.extra = math.MaxUint64, snapshotExtra(1<<63, 1<<63, math.MaxUint64-1)
		}), want(func(s *Snapshot) {
			s.VMClock, s.VMStateSize, s.DiskSize, s.ICount = math.MaxInt64, math.MaxInt64, math.MaxInt64, math.MaxInt64
		})},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			// Between two others, so that lengths and padding must be right.
			h, file := snapshotImage(t, base, tt.spec, base)
			got, err := readSnapshotTable(bytes.NewReader(file), int64(len(file)), h, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != 3 {
				t.Fatalf("%d snapshots, want 3", len(got))
			}
			for i, want := range []Snapshot{plain, tt.want, plain} {
				if diff := cmp.Diff(want, got[i].public()); diff != "" {
					t.Errorf("snapshot %d (-want +got):\n%s", i, diff)
				}
			}
			if s := got[1]; !bytes.Equal(s.extra, tt.spec.extra) || s.l1Off != 5<<16 || s.l1Size != 1 {
				t.Errorf("extra data %x, L1 of %d at %#x", s.extra, s.l1Size, s.l1Off)
			}
			if want := uint64(testSnapshotOff + 48); got[1].entryOff != want {
				t.Errorf("entry at %#x, want %#x", got[1].entryOff, want)
			}
		})
	}
}

// TestReadSnapshotTableErrors checks the refusals, and that none of them costs memory.
func TestReadSnapshotTableErrors(t *testing.T) {
	ok := snapshotSpec{l1Off: 5 << 16, l1Size: 1, id: "1", name: "tag"}
	many := make([]snapshotSpec, 100)
	tests := []struct {
		name    string
		specs   []snapshotSpec
		change  func(h *header, file []byte) []byte
		limits  Limits
		wantErr error
		wantOff int64 // of the *CorruptError; 0: not asked
	}{
		{name: "too much extra data", specs: []snapshotSpec{ok, {extra: make([]byte, 1025)}}, wantErr: ErrCorrupt, wantOff: testSnapshotOff + 48 + 40},
		{name: "huge extra data", specs: []snapshotSpec{{extraSize: math.MaxUint32}}, wantErr: ErrCorrupt},
		{name: "name past the end", specs: []snapshotSpec{ok, ok}, wantErr: ErrCorrupt, wantOff: testSnapshotOff + 48 + 40,
			change: func(h *header, file []byte) []byte { return file[:len(file)-1] }},
		{name: "entry past the end", specs: []snapshotSpec{ok, {name: strings.Repeat("n", 100)}}, wantErr: ErrCorrupt, wantOff: testSnapshotOff + 48,
			change: func(h *header, file []byte) []byte { return file[:testSnapshotOff+48+39] }},
		{name: "table past the end", specs: []snapshotSpec{ok}, wantErr: ErrCorrupt, wantOff: 1 << 30,
			change: func(h *header, file []byte) []byte { h.snapshotsOff = 1 << 30; return file }},
		{name: "65536 past the end", specs: []snapshotSpec{ok}, wantErr: ErrCorrupt, wantOff: testSnapshotOff,
			change: func(h *header, file []byte) []byte { h.nbSnapshots = maxSnapshots; return file }},
		{name: "empty file", specs: []snapshotSpec{ok}, wantErr: ErrCorrupt, wantOff: testSnapshotOff,
			change: func(h *header, file []byte) []byte { return nil }},
		{name: "limit", specs: many, limits: Limits{MetadataBytes: 3999}, wantErr: ErrLimit},
		{name: "at the limit", specs: many, limits: Limits{MetadataBytes: 4000}},
		{name: "none", change: func(h *header, file []byte) []byte { return nil }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h, file := snapshotImage(t, tt.specs...)
			if tt.change != nil {
				file = tt.change(h, file)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			got, err := readSnapshotTable(bytes.NewReader(file), int64(len(file)), h, tt.limits)
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
				t.Errorf("allocated %d bytes", n)
			}
			if tt.wantErr == nil {
				if err != nil || len(got) != len(tt.specs) {
					t.Errorf("%d snapshots and %v, want %d", len(got), err, len(tt.specs))
				}
				return
			}
			if !errors.Is(err, tt.wantErr) {
				t.Fatalf("error %v, want %v", err, tt.wantErr)
			}
			var ce *CorruptError
			if tt.wantOff != 0 && (!errors.As(err, &ce) || ce.HostOff != tt.wantOff) {
				t.Errorf("error %v, want a *CorruptError at %#x", err, tt.wantOff)
			}
		})
	}
	h, _ := snapshotImage(t, ok)
	wantErr := errors.New("broken disk")
	if _, err := readSnapshotTable(&countingReader{err: wantErr}, 1<<30, h, Limits{}); !errors.Is(err, wantErr) || errors.Is(err, ErrCorrupt) {
		t.Errorf("error %v, want %v", err, wantErr)
	}
}

// TestSnapshotCheckL1 checks the bounds of a snapshot's L1 table.
func TestSnapshotCheckL1(t *testing.T) {
	g := newGeometry(16, 4, false)
	tests := []struct {
		name   string
		off    uint64
		size   uint32
		wantOK bool
	}{
		{"plain", 5 << 16, 1, true},
		{"empty", 0, 0, true},
		{"largest", 5 << 16, 4 << 20, true},
		{"too large", 5 << 16, 4<<20 + 1, false},
		{"huge", 5 << 16, math.MaxUint32, false},
		{"unaligned", 5<<16 + 512, 1, false},
		{"in the header", 0, 1, false},
		{"last", 1<<56 - 1<<16, 1 << 13, true},
		{"beyond", 1 << 56, 1, false},
		{"far beyond", 1<<64 - 1<<16, 1, false},
	}
	for _, tt := range tests {
		err := (&snapshot{id: "1", l1Off: tt.off, l1Size: tt.size}).checkL1(&g)
		var ce *CorruptError
		if tt.wantOK != (err == nil) || err != nil && !errors.As(err, &ce) {
			t.Errorf("%s: error %v, want ok %v", tt.name, err, tt.wantOK)
		}
	}
}

// TestSnapshotTableQEMU reads snapshot tables that qemu-img wrote, and compares them with its own list.
func TestSnapshotTableQEMU(t *testing.T) {
	qemutest.Require(t)
	for _, options := range []string{"compat=0.10", "compat=1.1", "cluster_size=512"} {
		t.Run(options, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "image.qcow2")
			qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", options, name, "3M")
			for _, tag := range []string{"one", "a longer name of a snapshot", "x", strings.Repeat("y", 255)} {
				qemutest.Img(t, "snapshot", "-c", tag, name)
				if tag == "x" && options != "compat=0.10" {
					qemutest.Img(t, "resize", "-q", "-f", "qcow2", name, "+1M")
				}
			}
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			h, _ := readImageHeader(t, name)
			snapshots, err := readSnapshotTable(bytes.NewReader(b), int64(len(b)), h, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			g := h.geometry()
			var got []any
			for i := range snapshots {
				if err := snapshots[i].checkL1(&g); err != nil {
					t.Error(err)
				}
				if want := uint64(3 << 20); i < 3 && snapshots[i].diskSize != want {
					t.Errorf("disk size %d, want %d", snapshots[i].diskSize, want)
				}
				s := snapshots[i].public()
				got = append(got, map[string]any{
					"id": s.ID, "name": s.Name,
					"vm-state-size": json.Number(fmt.Sprint(s.VMStateSize)),
					"date-sec":      json.Number(fmt.Sprint(s.Date.Unix())),
					"date-nsec":     json.Number(fmt.Sprint(s.Date.Nanosecond())),
					"vm-clock-sec":  json.Number(fmt.Sprint(int64(s.VMClock / time.Second))),
					"vm-clock-nsec": json.Number(fmt.Sprint(int64(s.VMClock % time.Second))),
				})
				if s.ICount != -1 {
					got[i].(map[string]any)["icount"] = json.Number(fmt.Sprint(s.ICount))
				}
			}
			if diff := cmp.Diff(qemutest.Info(t, name)["snapshots"], any(got)); diff != "" {
				t.Errorf("snapshots (-qemu +ours):\n%s", diff)
			}
		})
	}
}
