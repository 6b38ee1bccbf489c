package refwalk

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"

	"github.com/google/go-cmp/cmp"
)

// counts are the numbers of a report that a damage changes.
type counts struct{ Leaks, TooLow, CopiedWrong, CopiedMissing, BadEntries, Overlaps, PastEnd int }

// countsOf takes the numbers out of a report.
func countsOf(r *Report) counts {
	return counts{r.Leaks, r.TooLow, r.CopiedWrong, r.CopiedMissing, r.BadEntries, r.Overlaps, r.PastEnd}
}

// literal is an image of 64 KiB clusters.
func literal() []byte { return literalOf(16) }

// literalOf is an image of clusters of 1<<bits bytes and 16-bit refcounts whose every byte the tests know:
//
//	0 header  1 refcount table  2 refcount block  3 active L1  4 its L2 (entry 0)
//	5 6 data of guest clusters 0 and 1  7 compressed data of guest clusters 2 and 3
//	8 snapshot table  9 snapshot L1 (its own L2: 10, data 11 of guest cluster 0)
//
// Guest cluster 4 is zero plain.
func literalOf(bits uint32) []byte {
	cs := 1 << bits
	img := make([]byte, 12*cs)
	be := binary.BigEndian
	p32 := func(off int, v uint32) { be.PutUint32(img[off:], v) }
	p64 := func(off int, v uint64) { be.PutUint64(img[off:], v) }
	p32(0, 0x514649fb)
	p32(4, 3)
	p32(20, bits)
	p64(24, uint64(8*cs))
	p32(36, 1)
	p64(40, uint64(3*cs))
	p64(48, uint64(1*cs))
	p32(56, 1)
	p32(60, 1)
	p64(64, uint64(8*cs))
	p32(96, 4)
	p32(100, 104)
	p64(1*cs, uint64(2*cs))
	for c := range 12 {
		be.PutUint16(img[2*cs+2*c:], 1)
	}
	be.PutUint16(img[2*cs+2*7:], 2)
	p64(3*cs, flagCopied|uint64(4*cs))
	p64(4*cs, flagCopied|uint64(5*cs))
	p64(4*cs+8, flagCopied|uint64(6*cs))
	p64(4*cs+16, flagCompressed|uint64(7*cs))
	p64(4*cs+24, flagCompressed|uint64(7*cs+100))
	p64(4*cs+32, 1)
	copy(img[5*cs:], bytes.Repeat([]byte{5}, cs))
	copy(img[6*cs:], bytes.Repeat([]byte{6}, cs))
	p64(8*cs, uint64(9*cs))
	p32(8*cs+8, 1)
	be.PutUint16(img[8*cs+12:], 1)
	be.PutUint16(img[8*cs+14:], 3)
	p32(8*cs+36, 24)
	p64(8*cs+48, uint64(8*cs))
	copy(img[8*cs+64:], "1one")
	p64(9*cs, uint64(10*cs))
	p64(10*cs, uint64(11*cs))
	copy(img[11*cs:], bytes.Repeat([]byte{11}, cs))
	return img
}

// TestWalkDamage pokes one field of a sound image and looks for exactly its finding; where QEMU is
// installed, its check must count the same.
func TestWalkDamage(t *testing.T) {
	const cs = 0x10000
	be := binary.BigEndian
	p64 := func(off int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte { be.PutUint64(b[off:], v); return b }
	}
	count := func(cluster int, v uint16) func([]byte) []byte {
		return func(b []byte) []byte { be.PutUint16(b[2*cs+2*cluster:], v); return b }
	}
	tests := []struct {
		name    string
		poke    func([]byte) []byte
		want    counts
		finding string
		corrupt int // what qemu-img check counts as corruptions; -1: its own way of counting, not compared
	}{
		{"sound", func(b []byte) []byte { return b }, counts{}, "", 0},
		{"leak", count(20, 1), counts{PastEnd: 1}, "", 0},
		{"leak inside", func(b []byte) []byte { return count(12, 1)(append(b, make([]byte, cs)...)) }, counts{Leaks: 1},
			"leak: cluster 12 refcount 1 references 0", 0},
		{"compressed refcount high", count(7, 3), counts{Leaks: 1}, "leak: cluster 7 refcount 3 references 2", 0},
		{"compressed refcount low", count(7, 1), counts{TooLow: 1}, "I1: cluster 7, compressed data, refcount 1 references 2", 1},
		{"data refcount zero", count(11, 0), counts{TooLow: 1}, "I1: cluster 11, data, refcount 0 references 1", 1},
		{"table refcount zero", count(10, 0), counts{TooLow: 1}, "I1: cluster 10, L2 table, refcount 0 references 1", 1},
		{"active data refcount zero", count(5, 0), counts{TooLow: 1, CopiedWrong: 1}, "I1: cluster 5,", -1},
		{"active data refcount high", count(5, 2), counts{Leaks: 1, CopiedWrong: 1}, "leak: cluster 5", 1},
		{"L1 COPIED lost", p64(3*cs, 4*cs), counts{CopiedMissing: 1}, "lost COPIED: L1 entry 0, cluster 4", 1},
		{"L2 COPIED lost", p64(4*cs+8, 6*cs), counts{CopiedMissing: 1}, "lost COPIED: L2 entry of guest 0x10000, cluster 6", 1},
		{"L2 COPIED wrong, shared", func(b []byte) []byte {
			p64(10*cs, 5*cs)(b)
			count(5, 2)(b)
			count(11, 0)(b)
			return b
		}, counts{CopiedWrong: 1}, "I7: L2 entry of guest 0x0 has COPIED, cluster 5 has refcount 2 references 2", 1},
		{"compressed COPIED", p64(4*cs+16, flagCopied|flagCompressed|7*cs), counts{BadEntries: 1}, "I3: L2 entry of guest 0x20000", 1},
		{"L1 reserved", p64(3*cs, flagCopied|4*cs|1), counts{BadEntries: 1}, "I3: active L1 table entry 0", 1},
		{"L2 reserved", p64(4*cs+8, flagCopied|6*cs|2), counts{BadEntries: 1}, "I3: L2 entry of guest 0x10000", 1},
		{"L2 misaligned", p64(4*cs+8, flagCopied|6*cs|0x200), counts{BadEntries: 1, Leaks: 1}, "I3: L2 entry of guest 0x10000", -1},
		{"L2 beyond the end", p64(4*cs+8, 12*cs), counts{BadEntries: 1, Leaks: 1}, "I3: L2 entry of guest 0x10000", -1},
		{"L1 misaligned", p64(9*cs, 10*cs|0x200), counts{BadEntries: 1, Leaks: 2}, "I3: snapshot 0 L1 table entry 0", -1},
		{"two guests, one cluster", func(b []byte) []byte {
			p64(4*cs+8, 5*cs)(b)
			p64(4*cs, 5*cs)(b)
			count(5, 2)(b)
			count(6, 0)(b)
			return b
		}, counts{Overlaps: 1}, "I8: cluster 5 is data (of 0x0) and also data (of 0x10000)", 0},
		{"data over refcount block", func(b []byte) []byte {
			p64(4*cs+8, 2*cs)(b)
			count(2, 2)(b)
			count(6, 0)(b)
			return b
		}, counts{Overlaps: 1}, "I8: cluster 2 is refcount block (of 0x0) and also data (of 0x10000)", -1},
		{"refcount block all zeros", func(b []byte) []byte { clear(b[2*cs : 3*cs]); return b },
			counts{TooLow: 12, CopiedWrong: 3}, "I1: cluster 0, header, refcount 0 references 1 (I3: refcount block at 0x20000 is all zeros)", -1},
		{"refcount table reserved", p64(1*cs, 2*cs|1), counts{BadEntries: 1, TooLow: 11, CopiedWrong: 3}, "I3: refcount table entry 0", -1},
		{"snapshot L1 beyond the end", p64(8*cs, 13*cs), counts{BadEntries: 1, Leaks: 3}, "I3: snapshot 0 L1 table", 1},
		{"file ends in its last cluster", func(b []byte) []byte { return b[:12*cs-0x8000] }, counts{}, "", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img := tt.poke(literal())
			rep, err := Walk(bytes.NewReader(img), int64(len(img)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, countsOf(rep)); diff != "" {
				t.Errorf("counts (-want +got):\n%s%s", diff, strings.Join(rep.Findings, "\n"))
			}
			if tt.finding != "" && (len(rep.Findings) == 0 || !strings.HasPrefix(rep.Findings[0], tt.finding)) {
				t.Errorf("want the first finding to begin with %q, got %q", tt.finding, rep.Findings)
			}
			if got, want := rep.Clean(), tt.want == (counts{}); got != want {
				t.Errorf("Clean() = %t, want %t", got, want)
			}
		})
		if tt.corrupt < 0 {
			continue
		}
		t.Run(tt.name+"/qemu", func(t *testing.T) {
			qemutest.Require(t)
			name := filepath.Join(t.TempDir(), "img.qcow2")
			if err := os.WriteFile(name, tt.poke(literal()), 0o600); err != nil {
				t.Fatal(err)
			}
			got := qemuCheck(t, name)
			want := verdict{Corruptions: tt.corrupt, Leaks: tt.want.Leaks, Allocated: got.Allocated, Compressed: got.Compressed}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("qemu-img check (-want +got):\n%s", diff)
			}
		})
	}
}

// TestWalkExtended pokes the subcluster words of an image without L2 data but its entry.
func TestWalkExtended(t *testing.T) {
	const cs = 0x10000
	be := binary.BigEndian
	tests := []struct {
		name       string
		entry, sub uint64
		bad        int
	}{
		{"allocated", flagCopied | 5*cs, 0xffffffff, 0},
		{"allocated and zero apart", flagCopied | 5*cs, 0xffff0000_0000ffff, 0},
		{"zero without cluster", 0, 0xffffffff_00000000, 0},
		{"allocated and zero", flagCopied | 5*cs, 0x00000001_00000001, 1},
		{"allocated without cluster", 0, 1, 1},
		{"zero flag", flagCopied | 5*cs | 1, 1, 1},
		{"compressed with subclusters", flagCompressed | 5*cs, 1, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img := literal()[:6*cs]
			be.PutUint32(img[60:], 0) // no snapshot
			be.PutUint64(img[72:], incompatExtendedL2)
			clear(img[4*cs : 5*cs])
			be.PutUint64(img[4*cs:], tt.entry)
			be.PutUint64(img[4*cs+8:], tt.sub)
			for c := range 12 {
				be.PutUint16(img[2*cs+2*c:], 0)
				if c < 5 || c == 5 && tt.entry != 0 {
					be.PutUint16(img[2*cs+2*c:], 1)
				}
			}
			rep, err := Walk(bytes.NewReader(img), int64(len(img)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(counts{BadEntries: tt.bad}, countsOf(rep)); diff != "" {
				t.Errorf("counts (-want +got):\n%s%s", diff, strings.Join(rep.Findings, "\n"))
			}
		})
	}
}

// TestRefcountAt reads a known block at every width.
func TestRefcountAt(t *testing.T) {
	block := []byte{0x8d, 0x21, 0x43, 0x65, 0x87, 0xa9, 0xcb, 0xed, 1, 2, 3, 4, 5, 6, 7, 8}
	for _, tt := range []struct {
		order uint
		want  []uint64
	}{
		{0, []uint64{1, 0, 1, 1, 0, 0, 0, 1, 1}},
		{1, []uint64{1, 3, 0, 2, 1, 0, 2, 0}},
		{2, []uint64{0xd, 8, 1, 2, 3, 4}},
		{3, []uint64{0x8d, 0x21, 0x43}},
		{4, []uint64{0x8d21, 0x4365}},
		{5, []uint64{0x8d214365, 0x87a9cbed}},
		{6, []uint64{0x8d21436587a9cbed, 0x0102030405060708}},
	} {
		var got []uint64
		for i := range tt.want {
			got = append(got, refcountAt(block, int64(i), tt.order))
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("order %d (-want +got):\n%s", tt.order, diff)
		}
	}
}

// FuzzWalk takes any bytes: the walk and the reader must end without a panic.
func FuzzWalk(f *testing.F) {
	f.Add(literalOf(9))
	f.Fuzz(func(t *testing.T, img []byte) {
		rep, err := Walk(bytes.NewReader(img), int64(len(img)))
		if err == nil && rep.Header.VirtualSize <= 1<<20 {
			src := Source{Image: bytes.NewReader(img), Size: int64(len(img))}
			if p, err := ReadGuest(src); err == nil && uint64(len(p)) != rep.Header.VirtualSize&^511 {
				t.Errorf("read %#x bytes of a disk of %#x", len(p), rep.Header.VirtualSize)
			}
		}
	})
}

// BenchmarkWalk walks the literal image.
func BenchmarkWalk(b *testing.B) {
	img := literal()
	b.SetBytes(int64(len(img)))
	for b.Loop() {
		if _, err := Walk(bytes.NewReader(img), int64(len(img))); err != nil {
			b.Fatal(err)
		}
	}
}
