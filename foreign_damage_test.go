package qcow2

import (
	"bytes"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
)

// foreignDamage is an illegal value in the header of an image, and what comes of it.
type foreignDamage struct {
	name  string
	image string // of foreignImages
	poke  func(im *foreignImage)
	field string // which the *HeaderError names
	class error
}

// le and be are pokes of a number of n bytes. beFoot pokes the footer of a VHD and its copy.
func le(off int64, n int, v uint64) func(*foreignImage) {
	return func(im *foreignImage) { im.le(off, n, v) }
}

func be(off int64, n int, v uint64) func(*foreignImage) {
	return func(im *foreignImage) { im.be(off, n, v); im.sumVHD() }
}

func beFoot(off int64, n int, v uint64) func(*foreignImage) {
	return func(im *foreignImage) {
		im.be(int64(len(im.file))-512+off, n, v)
		if string(im.file[:8]) == "conectix" {
			im.be(off, n, v)
		}
		im.sumVHD()
	}
}

// foreignDamages are the rules of the headers, each broken.
var foreignDamages = []foreignDamage{
	{"magic", "qed", le(0, 4, 0x1444551), "magic", ErrWrongFormat},
	{"unknown feature", "qed", le(16, 8, 8), "features", ErrUnsupported},
	{"feature 63", "qed", le(16, 8, 1<<63), "features", ErrUnsupported},
	{"no cluster", "qed", le(4, 4, 0), "cluster_size", ErrCorrupt},
	{"small cluster", "qed", le(4, 4, 2048), "cluster_size", ErrCorrupt},
	{"large cluster", "qed", le(4, 4, 128<<20), "cluster_size", ErrCorrupt},
	{"odd cluster", "qed", le(4, 4, 12288), "cluster_size", ErrCorrupt},
	{"no table", "qed", le(8, 4, 0), "table_size", ErrCorrupt},
	{"odd table", "qed", le(8, 4, 3), "table_size", ErrCorrupt},
	{"large table", "qed", le(8, 4, 32), "table_size", ErrCorrupt},
	{"no header", "qed", le(12, 4, 0), "header_size", ErrCorrupt},
	{"large header", "qed", le(12, 4, math.MaxUint32), "header_size", ErrCorrupt},
	{"header over the table", "qed", le(12, 4, 2), "l1_table_offset", ErrCorrupt},
	{"no L1 table", "qed", le(40, 8, 0), "l1_table_offset", ErrCorrupt},
	{"odd L1 table", "qed", le(40, 8, 4097), "l1_table_offset", ErrCorrupt},
	{"L1 table past the end", "qed", le(40, 8, 1<<40), "l1_table_offset", ErrCorrupt},
	{"L1 table at the end of offsets", "qed", le(40, 8, 1<<64-4096), "l1_table_offset", ErrCorrupt},
	{"odd size", "qed", le(48, 8, 1000), "image_size", ErrCorrupt},
	{"size beyond the tables", "qed", le(48, 8, 1<<30+512), "image_size", ErrCorrupt},
	{"largest size", "qed", le(48, 8, 1<<64-512), "image_size", ErrCorrupt},
	{"backing name outside", "qed", func(im *foreignImage) { im.le(16, 8, 1); im.le(56, 4, 4000); im.le(60, 4, 97) },
		"backing_filename_offset", ErrCorrupt},
	{"backing name at the end of offsets", "qed", func(im *foreignImage) { im.le(16, 8, 1); im.le(56, 4, math.MaxUint32); im.le(60, 4, 2) },
		"backing_filename_offset", ErrCorrupt},
	{"long backing name", "qed", func(im *foreignImage) { im.le(16, 8, 1); im.le(60, 4, 1024) }, "backing_filename_size", ErrUnsupported},
	{"size beyond numbers", "qed", func(im *foreignImage) {
		// The largest tables map all that 64 bits can say.
		im.le(4, 4, 64<<20)
		im.le(8, 4, 16)
		im.le(40, 8, 64<<20)
		im.le(48, 8, 1<<63)
		im.sparse = 4 << 30
	}, "image_size", ErrUnsupported},

	{"signature", "vdi", le(0x40, 4, 1), "signature", ErrWrongFormat},
	{"version", "vdi", le(0x44, 4, 2), "version", ErrUnsupported},
	{"undo", "vdi", le(0x4c, 4, 3), "image_type", ErrUnsupported},
	{"differencing", "vdi", le(0x4c, 4, 4), "image_type", ErrUnsupported},
	{"no type", "vdi", le(0x4c, 4, 0), "image_type", ErrCorrupt},
	{"sector size", "vdi", le(0x168, 4, 4096), "sector_size", ErrUnsupported},
	{"no block", "vdi", le(0x178, 4, 0), "block_size", ErrUnsupported},
	{"odd block", "vdi", le(0x178, 4, 3<<10), "block_size", ErrUnsupported},
	{"block extra", "vdi", le(0x17c, 4, 512), "block_extra", ErrUnsupported},
	{"link", "vdi", le(0x1a8, 4, 1), "uuid_link", ErrUnsupported},
	{"parent", "vdi", le(0x1c7, 1, 1), "uuid_parent", ErrUnsupported},
	{"size beyond the map", "vdi", le(0x170, 8, 10*4096+1), "blocks_in_image", ErrCorrupt},
	{"size beyond numbers", "vdi", le(0x170, 8, 1<<63), "disk_size", ErrUnsupported},
	{"few blocks", "vdi", le(0x180, 4, 9), "blocks_in_image", ErrCorrupt},
	{"map past the end", "vdi", le(0x154, 4, 1<<30), "offset_bmap", ErrCorrupt},
	{"map in the header", "vdi", le(0x154, 4, 0), "offset_bmap", ErrCorrupt},
	{"odd map", "vdi", le(0x154, 4, 516), "offset_bmap", ErrCorrupt},
	{"many blocks", "vdi", le(0x180, 4, math.MaxUint32), "offset_bmap", ErrCorrupt},
	{"data over the map", "vdi", le(0x158, 4, 512), "offset_data", ErrCorrupt},
	{"odd data", "vdi", le(0x158, 4, 1025), "offset_data", ErrCorrupt},

	{"cookies", "vhd fixed", beFoot(0, 8, 1), "cookie", ErrWrongFormat},
	{"checksum", "vhd fixed", func(im *foreignImage) { im.file[len(im.file)-1] ^= 1 }, "checksum", ErrCorrupt},
	{"checksums", "vhd dynamic", func(im *foreignImage) { im.file[511] ^= 1; im.file[len(im.file)-1] ^= 1 }, "checksum", ErrCorrupt},
	{"version", "vhd fixed", beFoot(12, 4, 0x20000), "file_format_version", ErrUnsupported},
	{"differencing", "vhd dynamic", beFoot(60, 4, 4), "disk_type", ErrUnsupported},
	{"no type", "vhd dynamic", beFoot(60, 4, 0), "disk_type", ErrCorrupt},
	{"deprecated type", "vhd dynamic", beFoot(60, 4, 6), "disk_type", ErrCorrupt},
	{"size beyond the file", "vhd fixed", beFoot(48, 8, 40<<10), "current_size", ErrCorrupt},
	{"size beyond numbers", "vhd fixed", beFoot(48, 8, 1<<63), "current_size", ErrUnsupported},
	{"no geometry", "vhd fixed", func(im *foreignImage) { beFoot(28, 4, 0x76706320)(im); beFoot(56, 4, 0)(im) }, "disk_geometry", ErrCorrupt},
	{"geometry beyond the file", "vhd fixed", func(im *foreignImage) { beFoot(28, 4, 0x76706320)(im); beFoot(56, 4, 0xffff0ffe)(im) },
		"disk_geometry", ErrCorrupt},
	{"header past the end", "vhd dynamic", beFoot(16, 8, 1<<40), "data_offset", ErrCorrupt},
	{"no header", "vhd dynamic", beFoot(16, 8, math.MaxUint64), "data_offset", ErrCorrupt},
	{"header over the footer", "vhd dynamic", beFoot(16, 8, 0), "data_offset", ErrCorrupt},
	{"header cookie", "vhd dynamic", be(512, 8, 1), "header cookie", ErrCorrupt},
	{"header checksum", "vhd dynamic", func(im *foreignImage) { im.file[1535] ^= 1 }, "header checksum", ErrCorrupt},
	{"header version", "vhd dynamic", be(512+24, 4, 0x20000), "header_version", ErrUnsupported},
	{"no block", "vhd dynamic", be(512+32, 4, 0), "block_size", ErrCorrupt},
	{"small block", "vhd dynamic", be(512+32, 4, 256), "block_size", ErrCorrupt},
	{"odd block", "vhd dynamic", be(512+32, 4, 12288), "block_size", ErrCorrupt},
	{"few blocks", "vhd dynamic", be(512+28, 4, 9), "max_table_entries", ErrCorrupt},
	{"size beyond the table", "vhd dynamic", beFoot(48, 8, 1<<40), "max_table_entries", ErrCorrupt},
	{"many blocks", "vhd dynamic", be(512+28, 4, math.MaxUint32), "table_offset", ErrCorrupt},
	{"table past the end", "vhd dynamic", be(512+16, 8, 1<<40), "table_offset", ErrCorrupt},
	{"no table", "vhd dynamic", be(512+16, 8, math.MaxUint64), "table_offset", ErrCorrupt},
	{"table over the footer", "vhd dynamic", be(512+16, 8, 500), "table_offset", ErrCorrupt},
	{"table over the header", "vhd dynamic", be(512+16, 8, 1535), "table_offset", ErrCorrupt},
}

// TestForeignDamagedHeader breaks every rule of the headers. The error is a *HeaderError that names the field, of
// the right class; little memory is used, and the storage is not written.
func TestForeignDamagedHeader(t *testing.T) {
	for _, tt := range foreignDamages {
		t.Run(tt.image+" "+tt.name, func(t *testing.T) {
			im := foreignImages[tt.image]()
			tt.poke(im)
			var err error
			n := allocated(func() { _, err = im.open(nil) })
			if n > 1<<20 {
				t.Errorf("allocated %d bytes", n)
			}
			var he *HeaderError
			if !errors.As(err, &he) || !errors.Is(err, tt.class) || he.Field != tt.field {
				t.Fatalf("open: %v, want field %q, class %q", err, tt.field, tt.class)
			}
			if he.Bound == "" || !strings.Contains(err.Error(), he.Bound) {
				t.Errorf("the bound is %q in %q", he.Bound, err)
			}
			if _, again := InspectForeign(im.reader(), im.size(), im.format, nil); !errors.Is(again, tt.class) {
				t.Errorf("InspectForeign: %v", again)
			}
		})
	}
}

// TestForeignDamagedTable breaks entries of tables. The range that they map is ErrCorrupt, at the entry; all else
// reads.
func TestForeignDamagedTable(t *testing.T) {
	tests := []struct {
		name     string
		image    string
		poke     func(im *foreignImage)
		host     int64 // of the entry
		from, to int64 // guest range that cannot be read
	}{
		{"odd L1 entry", "qed", le(4096, 8, 8193), 4096, 0, math.MaxInt64},
		{"L1 entry in the header", "qed", le(4096, 8, 1), 4096, 0, math.MaxInt64},
		{"L1 entry to the L1 table", "qed", le(4096, 8, 4096), 4096, 0, math.MaxInt64},
		{"L1 entry past the end", "qed", le(4096, 8, 1<<40), 4096, 0, math.MaxInt64},
		{"L1 entry at the end of offsets", "qed", le(4096, 8, 1<<64-4096), 4096, 0, math.MaxInt64},
		{"odd L2 entry", "qed", le(8192+24, 8, 4*4096+512), 8192 + 24, 3 * 4096, 4 * 4096},
		{"L2 entry 2", "qed", le(8192, 8, 2), 8192, 0, 4096},
		{"L2 entry to the L1 table", "qed", le(8192+32, 8, 4096), 8192 + 32, 4 * 4096, 5 * 4096},
		{"L2 entry past the end", "qed", le(8192+8, 8, 9*4096), 8192 + 8, 4096, 2 * 4096},
		{"L2 entry at the end of offsets", "qed", le(8192+8, 8, 1<<64-4096), 8192 + 8, 4096, 2 * 4096},
		{"block past the end", "vdi", le(512, 4, 6), 512, 0, 4096},
		{"block far away", "vdi", le(512+4, 4, 1<<32-3), 512 + 4, 4096, 2 * 4096},
		{"block in the footer's copy", "vhd dynamic", be(1536, 4, 0), 1536, 0, 4096},
		{"block in the header", "vhd dynamic", be(1536, 4, 2), 1536, 0, 4096},
		{"block in the table", "vhd dynamic", be(1536+12, 4, 3), 1536 + 12, 3 * 4096, 4 * 4096},
		{"block past the end", "vhd dynamic", be(1536+4, 4, 1<<31), 1536 + 4, 4096, 2 * 4096},
		{"block cut by the end", "vhd dynamic", be(1536+4, 4, (2048+6*4608)/512), 1536 + 4, 4096, 2 * 4096},
	}
	for _, tt := range tests {
		t.Run(tt.image+" "+tt.name, func(t *testing.T) {
			im := foreignImages[tt.image]()
			tt.poke(im)
			d := im.mustOpen(t, nil)
			defer mustClose(t, d)
			for off := int64(0); off < d.Size(); off += 512 {
				p := make([]byte, 512)
				_, err := d.ReadAt(p, off)
				broken := off >= tt.from && off < tt.to
				var ce *CorruptError
				switch {
				case broken && (!errors.As(err, &ce) || ce.HostOff != tt.host || ce.GuestOff != off):
					t.Fatalf("read at %#x: %v, want a *CorruptError at host %#x", off, err, tt.host)
				case !broken && (err != nil || !bytes.Equal(p, im.disk[off:][:512])):
					t.Fatalf("read at %#x: %v", off, err)
				}
			}
			// All up to the damage, and then the error.
			end, failed := int64(0), false
			for e, err := range d.Extents(0, d.Size()) {
				if failed = err != nil; failed {
					if !errors.Is(err, ErrCorrupt) {
						t.Errorf("extents: %v", err)
					}
					continue
				}
				end = e.Off + e.Len
			}
			if !failed || end != tt.from {
				t.Errorf("extents end at %#x (failed: %v), want %#x", end, failed, tt.from)
			}
			if n, err := d.ReadAt(make([]byte, d.Size()), 0); int64(n) != tt.from || !errors.Is(err, ErrCorrupt) {
				t.Errorf("read of all: %d bytes, %v", n, err)
			}
		})
	}
}

// TestForeignNeedsCheck opens a QED image that was not closed: what is not in the file counts as never allocated, and
// shows what lies below. What is broken otherwise stays an error.
func TestForeignNeedsCheck(t *testing.T) {
	im := newTestQED()
	im.le(16, 8, 2)
	im.le(8192, 8, 1<<40)          // a cluster beyond the end of the file
	im.le(8192+24, 8, 4096*9)      // one that would begin at its end
	im.le(8192+32, 8, 4096*4+1024) // damage
	below := newFuzzBacking(t)
	d := im.mustOpen(t, &OpenOptions{Backing: below})
	defer mustClose(t, d)
	if !d.Info().NeedsCheck {
		t.Error("the flag is not told")
	}
	p, want := make([]byte, 4096), make([]byte, 4096)
	for _, off := range []int64{0, 4096, 3 * 4096} {
		if _, err := d.ReadAt(p, off); err != nil {
			t.Errorf("read at %#x: %v", off, err)
		}
		if _, err := below.ReadAt(want, off); err != nil || !bytes.Equal(p, want) {
			t.Errorf("read at %#x: not what lies below: %v", off, err)
		}
	}
	if _, err := d.ReadAt(p, 4*4096); !errors.Is(err, ErrCorrupt) {
		t.Errorf("read of a misplaced cluster: %v", err)
	}
	im.le(4096, 8, 1<<40) // an L2 table beyond the end
	all := im.mustOpen(t, nil)
	defer mustClose(t, all)
	if list := extentsList(t, all); len(list) != 1 || list[0].Kind != ExtentUnallocated {
		t.Errorf("extents without the L2 table: %+v", list)
	}
}

// TestForeignSparseClaims opens images in sparse storages of many TiB whose headers claim tables as large as can be:
// little memory is used, whatever is read.
func TestForeignSparseClaims(t *testing.T) {
	tests := []struct {
		image string
		poke  func(im *foreignImage)
	}{
		{"qed", func(im *foreignImage) {
			im.le(4, 4, 64<<20)
			im.le(8, 4, 16)
			im.le(40, 8, 64<<20)
			im.le(48, 8, 1<<62)
		}},
		{"vdi", func(im *foreignImage) {
			im.le(0x154, 4, 1<<20)
			im.le(0x158, 4, 1<<32-512)
			im.le(0x178, 4, 1<<20)
			im.le(0x180, 4, 1<<29)
			im.le(0x170, 8, 1<<49)
		}},
		{"vhd dynamic", func(im *foreignImage) {
			im.be(512+16, 8, 1<<40)
			im.be(512+28, 4, math.MaxUint32)
			im.be(512+32, 4, 1<<31)
			beFoot(48, 8, 1<<62)(im)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.image, func(t *testing.T) {
			im := foreignImages[tt.image]()
			im.file = im.file[:max(2048, len(im.file))]
			tt.poke(im)
			im.sparse = 1 << 50
			n := allocated(func() {
				d := im.mustOpen(t, nil)
				defer d.Close()
				p := make([]byte, 4096)
				for i := range int64(1000) {
					_, _ = d.ReadAt(p, i*(d.Size()/1000))
				}
				runs := 0
				for range d.Extents(0, d.Size()) {
					if runs++; runs == 1000 {
						break
					}
				}
			})
			t.Logf("%d bytes allocated", n)
			if n > maxHostileAlloc {
				t.Errorf("allocated %d bytes", n)
			}
		})
	}
}

// size returns the size of the image's file in bytes.
func (im *foreignImage) size() int64 { return max(im.sparse, int64(len(im.file))) }

// reader returns the image's file.
func (im *foreignImage) reader() io.ReaderAt {
	if im.sparse == 0 {
		return bytes.NewReader(im.file)
	}
	return &sparseReader{im.file, im.sparse}
}

// sparseReader is a file that begins with b, and has nothing but zeros up to its size.
type sparseReader struct {
	b    []byte
	size int64
}

// ReadAt implements io.ReaderAt.
func (r *sparseReader) ReadAt(p []byte, off int64) (int, error) {
	n := int(min(int64(len(p)), max(r.size-off, 0)))
	clear(p[:n])
	if off < int64(len(r.b)) {
		copy(p[:n], r.b[off:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
