package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// foreignImage is a small image of a foreign format: its file, and the disk that it must read as.
type foreignImage struct {
	format ForeignFormat
	file   []byte
	disk   []byte
	want   []Extent
	sparse int64 // size of the file in bytes, if it is larger: with zeros
}

// What a block of a foreignImage is, if it is not the number of its place in the file.
const (
	slotNone = -1 // not allocated
	slotZero = -2 // zeros
)

// foreignSlots are the blocks of a foreignImage: runs in the file, forwards and backwards, and blocks that are not
// there.
var foreignSlots = []int{3, slotNone, slotZero, 0, 1, slotNone, slotNone, 5, 4, 2}

// newForeign fills in disk and extents for blocks of the given size, the last of which is cut by tail bytes. place
// returns where a block is in the file; none is what is not allocated.
func newForeign(format ForeignFormat, block, tail int64, none ExtentKind, place func(slot int64) int64) *foreignImage {
	im := &foreignImage{format: format, disk: make([]byte, int64(len(foreignSlots))*block-tail)}
	rng := rand.New(rand.NewPCG(7, uint64(block)))
	for i, slot := range foreignSlots {
		off := int64(i) * block
		e := Extent{Off: off, Len: min(block, int64(len(im.disk))-off), HostOff: -1}
		part := im.disk[off:][:e.Len]
		switch slot {
		case slotNone:
			e.Kind = none
		case slotZero:
			e.Kind = ExtentZero
		default:
			e.Kind, e.HostOff = ExtentData, place(int64(slot))
			for j := range part {
				part[j] = byte(rng.Uint32()) | 1
			}
			im.put(part, e.HostOff)
		}
		if last := len(im.want) - 1; last >= 0 && e.follows(&im.want[last]) {
			im.want[last].Len += e.Len
			continue
		}
		im.want = append(im.want, e)
	}
	return im
}

// put writes p into the file at off.
func (im *foreignImage) put(p []byte, off int64) {
	if need := int(off) + len(p); need > len(im.file) {
		im.file = append(im.file, make([]byte, need-len(im.file))...)
	}
	copy(im.file[off:], p)
}

// le writes a little-endian number of n bytes into the file at off.
func (im *foreignImage) le(off int64, n int, v uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	im.put(b[:n], off)
}

// be writes a big-endian number of n bytes into the file at off.
func (im *foreignImage) be(off int64, n int, v uint64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], v)
	im.put(b[8-n:], off)
}

// newTestQED returns a QED image with clusters of 4 KiB. Its L1 table is at 4096, its first L2 table at 8192.
func newTestQED() *foreignImage {
	const cluster = 4096
	im := newForeign(ForeignQED, cluster, 1024, ExtentUnallocated, func(slot int64) int64 { return (3 + slot) * cluster })
	im.put([]byte("QED\x00"), 0)
	im.le(4, 4, cluster)
	im.le(8, 4, 1)
	im.le(12, 4, 1)
	im.le(40, 8, cluster)
	im.le(48, 8, uint64(len(im.disk)))
	im.le(cluster, 8, 2*cluster)
	for i, slot := range foreignSlots {
		switch slot {
		case slotNone:
		case slotZero:
			im.le(2*cluster+8*int64(i), 8, 1)
		default:
			im.le(2*cluster+8*int64(i), 8, uint64(3+slot)*cluster)
		}
	}
	return im
}

// newTestVDI returns a VDI with blocks of 4 KiB. Its block map is at 512.
func newTestVDI() *foreignImage {
	const block = 4096
	im := newForeign(ForeignVDI, block, 1024, ExtentZero, func(slot int64) int64 { return 1024 + slot*block })
	im.le(0x40, 4, 0xbeda107f)
	im.le(0x44, 4, 0x10001)
	im.le(0x4c, 4, 1)
	im.le(0x154, 4, 512)
	im.le(0x158, 4, 1024)
	im.le(0x168, 4, 512)
	im.le(0x170, 8, uint64(len(im.disk)))
	im.le(0x178, 4, block)
	im.le(0x180, 4, uint64(len(foreignSlots)))
	for i, slot := range foreignSlots {
		im.le(512+4*int64(i), 4, uint64(uint32(slot)))
	}
	return im
}

// sumVHD writes the checksums of a VHD: of the footer at its end, and of a copy of it and a header at its start.
func (im *foreignImage) sumVHD() {
	sum := func(off, n, at int64) {
		im.be(off+at, 4, 0)
		total := uint32(0)
		for _, v := range im.file[off:][:n] {
			total += uint32(v)
		}
		im.be(off+at, 4, uint64(^total))
	}
	sum(int64(len(im.file))-512, 512, 64)
	if string(im.file[:8]) == "conectix" {
		sum(0, 512, 64)
		sum(512, 1024, 36)
	}
}

// footVHD writes the field of a footer, or the copy of it.
func (im *foreignImage) footVHD(off int64, typ uint64) {
	im.put(make([]byte, 512), off)
	im.put([]byte("conectix"), off)
	im.be(off+12, 4, 0x10000)
	im.be(off+16, 8, 512)
	im.put([]byte("win "), off+28)
	im.be(off+48, 8, uint64(len(im.disk)))
	im.be(off+56, 4, 3<<16|4<<8|17)
	im.be(off+60, 4, typ)
}

// newTestVHD returns a dynamic VHD with blocks of 4 KiB. Its header is at 512, its block allocation table at 1536.
func newTestVHD() *foreignImage {
	const block, bitmap = 4096, 512
	place := func(slot int64) int64 { return 2048 + slot*(block+bitmap) + bitmap }
	im := newForeign(ForeignVHD, block, 1024, ExtentZero, place)
	im.footVHD(0, 3)
	im.put([]byte("cxsparse"), 512)
	im.be(512+16, 8, 1536)
	im.be(512+24, 4, 0x10000)
	im.be(512+28, 4, uint64(len(foreignSlots)))
	im.be(512+32, 4, block)
	for i, slot := range foreignSlots {
		entry := uint64(1<<32 - 1)
		if slot >= 0 {
			entry = uint64(place(int64(slot))-bitmap) / 512
			im.put([]byte{0xff}, place(int64(slot))-bitmap)
		}
		im.be(1536+4*int64(i), 4, entry)
	}
	im.put(nil, (int64(len(im.file))+511)&^511)
	im.footVHD(int64(len(im.file)), 3)
	im.sumVHD()
	return im
}

// newTestFixedVHD returns a fixed VHD.
func newTestFixedVHD() *foreignImage {
	im := newForeign(ForeignVHD, 4096, 1024, ExtentZero, func(int64) int64 { return 0 })
	im.file = nil
	im.put(im.disk, 0)
	im.footVHD(int64(len(im.file)), 2)
	im.sumVHD()
	im.want = []Extent{{Len: int64(len(im.disk)), Kind: ExtentData}} // without a storage that tells its holes
	return im
}

// foreignImages are images of all formats, by name.
var foreignImages = map[string]func() *foreignImage{
	"qed": newTestQED, "vdi": newTestVDI, "vhd dynamic": newTestVHD, "vhd fixed": newTestFixedVHD,
}

// open opens the image.
func (im *foreignImage) open(opts *OpenOptions) (*ForeignDisk, error) {
	return OpenForeign(NewReaderStorage(im.reader(), im.size()), im.format, opts)
}

// mustOpen is open of an image that is as it should be.
func (im *foreignImage) mustOpen(t testing.TB, opts *OpenOptions) *ForeignDisk {
	t.Helper()
	d, err := im.open(opts)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// extentsList returns the extents of all of a disk.
func extentsList(t testing.TB, d Disk) (list []Extent) {
	t.Helper()
	for e, err := range d.Extents(0, d.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}

// TestForeignRead reads images of all formats in ranges of all kinds, and compares their extents.
func TestForeignRead(t *testing.T) {
	for name, build := range foreignImages {
		t.Run(name, func(t *testing.T) {
			im := build()
			if f, err := DetectForeign(bytes.NewReader(im.file), int64(len(im.file))); err != nil || f != im.format {
				t.Errorf("detected as %q: %v", f, err)
			}
			for _, limits := range []*Limits{nil, {MetadataBytes: 1}} {
				d := im.mustOpen(t, &OpenOptions{Limits: limits})
				if err := iotest.TestReader(io.NewSectionReader(d, 0, d.Size()), im.disk); err != nil {
					t.Error(err)
				}
				if diff := cmp.Diff(im.want, extentsList(t, d)); diff != "" {
					t.Errorf("extents (-want +got):\n%s", diff)
				}
				rng := rand.New(rand.NewPCG(1, 2))
				for range 500 {
					off := rng.Int64N(d.Size())
					p := make([]byte, 1+rng.Int64N(d.Size()-off))
					if n, err := d.ReadAt(p, off); n != len(p) || err != nil {
						t.Fatalf("read %d bytes at %#x: %d, %v", len(p), off, n, err)
					}
					if !bytes.Equal(p, im.disk[off:][:len(p)]) {
						t.Fatalf("read %d bytes at %#x: not what is there", len(p), off)
					}
					next := off
					for e, err := range d.Extents(off, int64(len(p))) {
						if err != nil || e.Off != next || e.Len <= 0 {
							t.Fatalf("extents of %d bytes at %#x: %+v after %#x: %v", len(p), off, e, next, err)
						}
						next += e.Len
					}
					if next != off+int64(len(p)) {
						t.Fatalf("extents of %d bytes at %#x end at %#x", len(p), off, next)
					}
				}
				mustClose(t, d)
				if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, fs.ErrClosed) {
					t.Errorf("read of a closed disk: %v", err)
				}
				if err := d.Close(); !errors.Is(err, fs.ErrClosed) {
					t.Errorf("second Close: %v", err)
				}
			}
		})
	}
}

// TestForeignEdges asks for ranges at and beyond the ends of the disk.
func TestForeignEdges(t *testing.T) {
	im := newTestVDI()
	d := im.mustOpen(t, nil)
	size := d.Size()
	for _, tt := range []struct {
		off, n int64
		got    int
		want   error
	}{
		{0, 0, 0, nil}, {size, 0, 0, nil}, {size + 1, 0, 0, nil}, {size, 1, 0, io.EOF}, {1 << 62, 10, 0, io.EOF},
		{size - 1, 2, 1, io.EOF}, {-1, 1, 0, ErrRange},
	} {
		n, err := d.ReadAt(make([]byte, tt.n), tt.off)
		if n != tt.got || !errors.Is(err, tt.want) || tt.want == nil && err != nil {
			t.Errorf("read %d bytes at %d: %d, %v", tt.n, tt.off, n, err)
		}
	}
	for _, r := range [][2]int64{{-1, 1}, {0, -1}} {
		for _, err := range d.Extents(r[0], r[1]) {
			if !errors.Is(err, ErrRange) {
				t.Errorf("extents of %v: %v", r, err)
			}
		}
	}
	for e, err := range d.Extents(size, 1<<62) {
		t.Errorf("extent behind the end: %+v, %v", e, err)
	}
	// A consumer may stop anywhere.
	for stop := range len(im.want) {
		n := 0
		for range d.Extents(0, size) {
			if n++; n > stop {
				break
			}
		}
	}
}

// TestForeignInfo compares what is told about images.
func TestForeignInfo(t *testing.T) {
	qed := newTestQED()
	qed.le(16, 8, 7) // backing file, needs a check, raw
	qed.le(56, 4, 100)
	qed.le(60, 4, 4)
	qed.put([]byte("base"), 100)
	vdi := newTestVDI()
	vdi.le(0x4c, 4, 2)
	tests := []struct {
		name string
		im   *foreignImage
		want ForeignInfo
	}{
		{"qed", newTestQED(), ForeignInfo{Format: ForeignQED, BlockSize: 4096}},
		{"qed with all", qed, ForeignInfo{Format: ForeignQED, BlockSize: 4096, BackingFile: "base", BackingFormat: "raw", NeedsCheck: true}},
		{"vdi", newTestVDI(), ForeignInfo{Format: ForeignVDI, Subformat: "dynamic", BlockSize: 4096}},
		{"vdi static", vdi, ForeignInfo{Format: ForeignVDI, Subformat: "static", BlockSize: 4096}},
		{"vhd", newTestVHD(), ForeignInfo{Format: ForeignVHD, Subformat: "dynamic", BlockSize: 4096, Creator: "win"}},
		{"vhd fixed", newTestFixedVHD(), ForeignInfo{Format: ForeignVHD, Subformat: "fixed", Creator: "win"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.want.VirtualSize, tt.want.FileSize = int64(len(tt.im.disk)), int64(len(tt.im.file))
			got, err := InspectForeign(bytes.NewReader(tt.im.file), int64(len(tt.im.file)), tt.im.format, nil)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&tt.want, got); diff != "" {
				t.Errorf("info (-want +got):\n%s", diff)
			}
			d := tt.im.mustOpen(t, &OpenOptions{NoBacking: true})
			if diff := cmp.Diff(tt.want, d.Info()); diff != "" {
				t.Errorf("info of the disk (-want +got):\n%s", diff)
			}
			mustClose(t, d)
		})
	}
}

// TestForeignOptions opens images with options that do not fit, and takes what is no image.
func TestForeignOptions(t *testing.T) {
	disk := newFuzzBacking(t)
	tests := []struct {
		name   string
		im     *foreignImage
		format ForeignFormat
		opts   OpenOptions
		option string // which an OptionError must name
		want   error
	}{
		{"writing", newTestQED(), ForeignQED, OpenOptions{ReadWrite: true}, "ReadWrite", ErrOption},
		{"checking", newTestQED(), ForeignQED, OpenOptions{CheckOnly: true}, "CheckOnly", ErrOption},
		{"backing of a VDI", newTestVDI(), ForeignVDI, OpenOptions{Backing: disk}, "Backing", ErrOption},
		{"backing of a VHD", newTestVHD(), ForeignVHD, OpenOptions{Backing: disk}, "Backing", ErrOption},
		{"backing and none", newTestQED(), ForeignQED, OpenOptions{Backing: disk, NoBacking: true}, "NoBacking", ErrOption},
		{"no format", newTestQED(), "", OpenOptions{}, "format", ErrOption},
		{"unknown format", newTestQED(), "vmdk", OpenOptions{}, "format", ErrOption},
		{"another format", newTestQED(), ForeignVDI, OpenOptions{}, "", ErrWrongFormat},
		{"another format", newTestVDI(), ForeignVHD, OpenOptions{}, "", ErrWrongFormat},
		{"another format", newTestVHD(), ForeignQED, OpenOptions{}, "", ErrWrongFormat},
		{"size", newTestQED(), ForeignQED, OpenOptions{Limits: &Limits{VirtualSize: 1 << 10}}, "", ErrLimit},
		{"size", newTestVDI(), ForeignVDI, OpenOptions{Limits: &Limits{VirtualSize: 1 << 10}}, "", ErrLimit},
		{"size", newTestVHD(), ForeignVHD, OpenOptions{Limits: &Limits{VirtualSize: 1 << 10}}, "", ErrLimit},
		{"nothing", &foreignImage{}, ForeignQED, OpenOptions{}, "", ErrWrongFormat},
		{"nothing", &foreignImage{}, ForeignVHD, OpenOptions{}, "", ErrWrongFormat},
		{"nothing", &foreignImage{}, ForeignVDI, OpenOptions{}, "", ErrWrongFormat},
	}
	for _, tt := range tests {
		t.Run(tt.name+" "+string(tt.format), func(t *testing.T) {
			tt.im.format = tt.format
			_, err := tt.im.open(&tt.opts)
			var oe *OptionError
			if !errors.Is(err, tt.want) || errors.As(err, &oe) != (tt.option != "") || oe != nil && oe.Option != tt.option {
				t.Errorf("open: %v, want %v %q", err, tt.want, tt.option)
			}
		})
	}
	if f, err := DetectForeign(bytes.NewReader(rawSector(t)), 512); !errors.Is(err, ErrWrongFormat) {
		t.Errorf("a raw disk is %q: %v", f, err)
	}
}

// rawSector returns the first sector of a raw disk.
func rawSector(t *testing.T) []byte {
	p := make([]byte, 512)
	if _, err := newFuzzBacking(t).ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestForeignVHDSize opens VHD with the geometries and creators by which the size of the disk is decided. The sizes are
// those that QEMU finds.
func TestForeignVHDSize(t *testing.T) {
	const current = 36 << 10 &^ 511
	const chs = 3 * 4 * 17 * 512 // more than current
	tests := []struct {
		creator  string
		geometry uint64
		want     int64
	}{
		{"vpc ", 1<<16 | 4<<8 | 17, 68 * 512},
		{"vs  ", 1<<16 | 4<<8 | 17, 68 * 512},
		{"qemu", 1<<16 | 4<<8 | 17, 68 * 512},
		{"vbox", 1<<16 | 4<<8 | 17, 68 * 512},
		{"qem2", 1<<16 | 4<<8 | 17, current},
		{"win ", 1<<16 | 4<<8 | 17, current},
		{"d2v ", 1<<16 | 4<<8 | 17, current},
		{"CTXS", 1<<16 | 4<<8 | 17, current},
		{"tap\x00", 1<<16 | 4<<8 | 17, current},
		{"tap ", 1<<16 | 4<<8 | 17, 68 * 512},
		{"vpc ", 65535<<16 | 16<<8 | 255, current},
		{"win ", 0, current},
		{"vpc ", 0, 0},                 // refused: it would be empty
		{"vpc ", 3<<16 | 4<<8 | 17, 0}, // refused: the file is too short
	}
	for _, build := range []func() *foreignImage{newTestVHD, newTestFixedVHD} {
		for _, tt := range tests {
			im := build()
			offs := []int64{int64(len(im.file)) - 512}
			if string(im.file[:8]) == "conectix" {
				offs = append(offs, 0)
			}
			for _, off := range offs {
				im.put([]byte(tt.creator), off+28)
				im.be(off+48, 8, current+100) // whole sectors count
				im.be(off+56, 4, tt.geometry)
			}
			im.sumVHD()
			d, err := im.open(nil)
			var he *HeaderError
			switch {
			case tt.want == 0 && (!errors.As(err, &he) || he.Field != "disk_geometry" && he.Field != "max_table_entries"):
				t.Errorf("creator %q, geometry %#x: %v, want a *HeaderError", tt.creator, tt.geometry, err)
			case tt.want != 0 && err != nil:
				t.Errorf("creator %q, geometry %#x: %v", tt.creator, tt.geometry, err)
			case tt.want != 0 && d.Size() != tt.want:
				t.Errorf("creator %q, geometry %#x: size %d, want %d", tt.creator, tt.geometry, d.Size(), tt.want)
			}
		}
	}
	if chs <= current {
		t.Error("the geometry is not beyond the file")
	}
}

// TestForeignVHDBitmap clears bits of a block's bitmap: sectors that were never written read as zeros.
func TestForeignVHDBitmap(t *testing.T) {
	im := newTestVHD()
	const host = 2048 + 3*(4096+512) // of guest block 0
	im.put([]byte{0b01100111}, host)
	clear(im.disk[:512])
	clear(im.disk[3*512 : 5*512])
	d := im.mustOpen(t, nil)
	got := make([]byte, len(im.disk))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, im.disk) {
		t.Errorf("not what the bitmap tells: %v", err)
	}
	want := []Extent{
		{Off: 0, Len: 512, Kind: ExtentZero, HostOff: -1},
		{Off: 512, Len: 1024, Kind: ExtentData, HostOff: host + 512 + 512},
		{Off: 1536, Len: 1024, Kind: ExtentZero, HostOff: -1},
		{Off: 2560, Len: 1536, Kind: ExtentData, HostOff: host + 512 + 2560},
	}
	if diff := cmp.Diff(want, extentsList(t, d)[:4]); diff != "" {
		t.Errorf("extents (-want +got):\n%s", diff)
	}
}

// TestForeignVHDFooter opens VHD one of whose footers is broken, and a fixed one whose guest has written a footer
// at the start of its disk.
func TestForeignVHDFooter(t *testing.T) {
	read := func(im *foreignImage) {
		t.Helper()
		d := im.mustOpen(t, nil)
		got := make([]byte, len(im.disk))
		if _, err := d.ReadAt(got, 0); err != nil || d.Size() != int64(len(im.disk)) || !bytes.Equal(got, im.disk) {
			t.Errorf("size %d, want %d; read: %v", d.Size(), len(im.disk), err)
		}
	}
	im := newTestVHD()
	im.file[3] ^= 1
	read(im) // the end counts
	im = newTestVHD()
	im.file[len(im.file)-100] ^= 1
	read(im) // the copy does
	im.file = im.file[:len(im.file)-512]
	read(im)

	forged := newTestVHD()
	im = newTestFixedVHD()
	copy(im.file, forged.file[:2048])
	copy(im.disk, forged.file[:2048])
	read(im)

	// A raw disk whose guest has written a footer of a fixed disk at its start is none.
	copy(im.file, im.file[len(im.file)-512:])
	im.file = im.file[:len(im.file)-512]
	if _, err := im.open(nil); !errors.Is(err, ErrWrongFormat) && !errors.Is(err, ErrCorrupt) {
		t.Errorf("a fixed VHD without its footer: %v", err)
	}
}

// TestForeignHoles opens images of which all of the disk has its place, in a storage that tells its holes.
func TestForeignHoles(t *testing.T) {
	const size = 1 << 20
	vhd := &foreignImage{format: ForeignVHD, disk: make([]byte, size)}
	vhd.footVHD(size, 2)
	vhd.sumVHD()
	vdi := &foreignImage{format: ForeignVDI, disk: make([]byte, size)}
	vdi.file = newTestVDI().file[:512]
	vdi.le(0x4c, 4, 2)
	vdi.le(0x158, 4, 4096)
	vdi.le(0x170, 8, size)
	vdi.le(0x178, 4, size/4)
	vdi.le(0x180, 4, 4)
	for i := range int64(4) {
		vdi.le(512+4*i, 4, uint64(i))
	}
	for _, tt := range []struct {
		im   *foreignImage
		data int64 // host offset of the disk
		rest int64 // where what is behind the disk begins
	}{{vhd, 0, size}, {vdi, 4096, 4096 + size}} {
		s := NewMemoryStorage()
		for _, part := range [][2]int64{{0, min(4096, tt.data)}, {tt.rest, int64(len(tt.im.file))}} {
			if part[0] < part[1] {
				if _, err := s.WriteAt(tt.im.file[part[0]:part[1]], part[0]); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := s.Truncate(max(tt.rest, int64(len(tt.im.file)))); err != nil {
			t.Fatal(err)
		}
		if _, err := s.WriteAt(bytes.Repeat([]byte{1}, 64<<10), tt.data+256<<10); err != nil {
			t.Fatal(err)
		}
		d, err := OpenForeign(s, tt.im.format, nil)
		if err != nil {
			t.Fatal(err)
		}
		total := int64(0)
		for _, e := range extentsList(t, d) {
			if e.Kind == ExtentData {
				total += e.Len
				if e.HostOff != e.Off+tt.data {
					t.Errorf("%s: data of %#x at %#x", tt.im.format, e.Off, e.HostOff)
				}
			} else if e.HostOff != -1 {
				t.Errorf("%s: a hole has its place: %+v", tt.im.format, e)
			}
		}
		if total < 64<<10 || total > 256<<10 {
			t.Errorf("%s: %d bytes are data, 64 KiB were written", tt.im.format, total)
		}
		mustClose(t, d)
	}
}

// TestForeignAllocations reads without allocating once the tables are in memory.
func TestForeignAllocations(t *testing.T) {
	for name, build := range foreignImages {
		im := build()
		d := im.mustOpen(t, nil)
		p := make([]byte, len(im.disk))
		if n := testing.AllocsPerRun(100, func() {
			if _, err := d.ReadAt(p, 0); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations for a read", name, n)
		}
		mustClose(t, d)
	}
}

// TestForeignConcurrent reads from several goroutines, with the smallest cache, and closes beside them.
func TestForeignConcurrent(t *testing.T) {
	for name, build := range foreignImages {
		im := build()
		d := im.mustOpen(t, &OpenOptions{Limits: &Limits{MetadataBytes: 1}})
		var wg, ready sync.WaitGroup
		for g := range 4 {
			wg.Add(1)
			ready.Add(1)
			go func() {
				defer wg.Done()
				enough := sync.OnceFunc(ready.Done)
				defer enough()
				rng := rand.New(rand.NewPCG(3, uint64(g)))
				p := make([]byte, len(im.disk))
				for i := 0; ; i++ {
					if i == 300 {
						enough()
					}
					off := rng.IntN(len(im.disk))
					n, err := d.ReadAt(p[:1+rng.IntN(len(im.disk)-off)], int64(off))
					if errors.Is(err, fs.ErrClosed) && i >= 300 {
						return
					}
					if err != nil || !bytes.Equal(p[:n], im.disk[off:off+n]) {
						t.Errorf("%s: read at %#x: %d, %v", name, off, n, err)
						return
					}
				}
			}()
		}
		ready.Wait()
		mustClose(t, d)
		wg.Wait()
	}
}

// TestForeignShrunk reads an image whose file becomes shorter while it is open.
func TestForeignShrunk(t *testing.T) {
	for name, build := range foreignImages {
		im := build()
		s := NewMemoryStorage()
		if _, err := s.WriteAt(im.file, 0); err != nil {
			t.Fatal(err)
		}
		d, err := OpenForeign(s, im.format, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Truncate(600); err != nil {
			t.Fatal(err)
		}
		if n, err := d.ReadAt(make([]byte, len(im.disk)), 0); !errors.Is(err, io.ErrUnexpectedEOF) || n >= len(im.disk) {
			t.Errorf("%s: read %d bytes: %v", name, n, err)
		}
		mustClose(t, d)
	}
}
