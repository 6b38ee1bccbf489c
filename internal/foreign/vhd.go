package foreign

import (
	"fmt"
	"math/bits"
	"strings"
)

// VHD, by Microsoft's "Virtual Hard Disk Image Format Specification" 1.0: numbers are big-endian. The last 512 bytes of
// the file are the footer. A fixed disk has its content in front of that. A dynamic one has a copy of the footer at the
// start, a header, and the block allocation table: for each block the sector of the file where its bitmap begins, with
// a bit for each sector of the block, the most significant bit of the first byte for the first sector, set where the
// block's data, which comes after the bitmap, has that sector. Sectors whose bit is clear were never written.
const (
	vhdCookie     = "conectix"
	vhdFooterSize = 512

	vhdVersionAt     = 12 // 4 bytes: major and minor
	vhdDataOffAt     = 16 // 8, host offset of the header of a dynamic disk
	vhdCreatorAt     = 28 // 4 letters
	vhdCurrentSizeAt = 48 // 8, in bytes
	vhdCylindersAt   = 56 // 2
	vhdHeadsAt       = 58 // 1
	vhdSectorsAt     = 59 // 1, per track
	vhdTypeAt        = 60 // 4
	vhdChecksumAt    = 64 // 4: the complement of the sum of all bytes but these

	vhdFixed        = 2
	vhdDynamic      = 3
	vhdDifferencing = 4

	vhdHeaderCookie     = "cxsparse"
	vhdHeaderSize       = 1024
	vhdTableOffAt       = 16 // 8, host offset of the block allocation table
	vhdHeaderVersionAt  = 24 // 4
	vhdMaxEntriesAt     = 28 // 4
	vhdBlockSizeAt      = 32 // 4, in bytes, without the bitmap
	vhdHeaderChecksumAt = 36 // 4

	vhdEntrySize   = 4
	vhdUnallocated = 1<<32 - 1 // an entry of the block allocation table
	vhdMajor       = 1         // of both versions

	// vhdMaxGeometry is the largest geometry, in sectors: of a disk that may be larger.
	vhdMaxGeometry = 65535 * 16 * 255
)

// vhdFooter is a footer, as it stands in the file.
type vhdFooter []byte

// sound reports whether it is a footer, as cookie and checksum tell.
func (b vhdFooter) sound() bool {
	return string(b[:len(vhdCookie)]) == vhdCookie && be.Uint32(b[vhdChecksumAt:]) == vhdChecksum(b, vhdChecksumAt)
}

// vhdChecksum returns the checksum of a footer or header, which stands at the byte at.
func vhdChecksum(b []byte, at int) uint32 {
	sum := uint32(0)
	for i, v := range b {
		if i < at || i >= at+4 {
			sum += uint32(v)
		}
	}
	return ^sum
}

// vhdBySize are the creators whose current_size is the size of the disk. To all others, Virtual PC above all, it is
// what cylinders, heads and sectors multiply to, and current_size may be larger; but for the largest geometry, which
// stands for any disk beyond. QEMU decides so, by the same creators (found by trying); it writes "qemu", and "qem2"
// with force_size.
var vhdBySize = []string{"win ", "qem2", "d2v ", "tap\x00", "CTXS"}

// size returns the size of the disk in bytes, and the field that tells.
func (b vhdFooter) size() (field string, size uint64) {
	size = be.Uint64(b[vhdCurrentSizeAt:]) &^ (sector - 1)
	chs := uint64(be.Uint16(b[vhdCylindersAt:])) * uint64(b[vhdHeadsAt]) * uint64(b[vhdSectorsAt])
	if chs == vhdMaxGeometry {
		return "current_size", size
	}
	for _, creator := range vhdBySize {
		if string(b[vhdCreatorAt:vhdCreatorAt+4]) == creator {
			return "current_size", size
		}
	}
	return "disk_geometry", chs * sector
}

// vhdReadFooter returns the footer of a VHD.
//
// The one at the end counts. The copy at the start stands in for it where that is broken, as a dynamic disk may be left
// by a crash. It does not count before it, although QEMU looks at it first: of a fixed disk the start is the guest's,
// who could write a footer there.
func vhdReadFooter(f *file) (vhdFooter, error) {
	b, err := f.headerAt(0, vhdFooterSize)
	if err != nil {
		return nil, err
	}
	head := vhdFooter(b)
	if f.size >= vhdFooterSize {
		if b, err = f.headerAt(f.size-vhdFooterSize, vhdFooterSize); err != nil {
			return nil, err
		}
	}
	tail := vhdFooter(b)
	switch {
	case tail.sound():
		return tail, nil
	case head.sound() && be.Uint32(head[vhdTypeAt:]) != vhdFixed: // a fixed disk has its footer at the end alone
		return head, nil
	}
	for _, b := range []vhdFooter{tail, head} {
		if string(b[:len(vhdCookie)]) == vhdCookie {
			return nil, fieldErr("checksum", be.Uint32(b[vhdChecksumAt:]), ErrCorrupt,
				"%d", vhdChecksum(b, vhdChecksumAt))
		}
	}
	return nil, fieldErr("cookie", fmt.Sprintf("%q", tail[:len(vhdCookie)]), ErrWrongFormat, "%q", vhdCookie)
}

// openVHD reads and checks the footer, and the header, of a VHD.
func openVHD(f *file, limits Limits) (*Image, error) {
	b, err := vhdReadFooter(f)
	if err != nil {
		return nil, err
	}
	if v := be.Uint32(b[vhdVersionAt:]); v>>16 != vhdMajor {
		return nil, fieldErr("file_format_version", uint64(v), ErrUnsupported, "%#x", vhdMajor<<16)
	}
	field, size := b.size()
	if claimed := be.Uint64(b[vhdCurrentSizeAt:]); size == 0 && claimed >= sector {
		// QEMU opens an empty disk. A conversion of it would lose all there is.
		return nil, fieldErr(field, size, ErrCorrupt, "not 0 with a current_size of %#x", claimed)
	}
	if err := checkSize(field, size, limits); err != nil {
		return nil, err
	}
	creator := strings.TrimRight(string(b[vhdCreatorAt:vhdCreatorAt+4]), "\x00 ")
	img := &Image{Info: Info{Size: int64(size), Creator: creator}}
	switch typ := be.Uint32(b[vhdTypeAt:]); typ {
	case vhdFixed:
		if most := f.size - vhdFooterSize; int64(size) > most {
			return nil, fieldErr(field, size, ErrCorrupt, "at most %#x, which the file holds", most)
		}
		img.Subformat, img.Whole, img.m = "fixed", true, whole{}
	case vhdDynamic:
		v, err := openDynamicVHD(f, be.Uint64(b[vhdDataOffAt:]), int64(size), limits)
		if err != nil {
			return nil, err
		}
		img.Subformat, img.BlockSize, img.m = "dynamic", 1<<v.blockBits, v
	case vhdDifferencing:
		return nil, fieldErr("disk_type", typ, ErrUnsupported,
			"%d (fixed) or %d (dynamic), not differencing", vhdFixed, vhdDynamic)
	default:
		return nil, fieldErr("disk_type", typ, ErrCorrupt, "%d (fixed) or %d (dynamic)", vhdFixed, vhdDynamic)
	}
	return img, nil
}

// whole maps a disk that begins where the file does.
type whole struct{}

// lookup implements mapper.
func (whole) lookup(off, n int64) (Run, error) { return Run{Kind: Data, Len: n, HostOff: off}, nil }

// vhd maps a dynamic VHD.
type vhd struct {
	*tables
	blockBits   uint
	bitmapBytes uint64 // of a block: whole sectors
	table       uint64 // host offset of the block allocation table
	metadata    [3][2]uint64
	disk        int64 // its size in bytes
}

// openDynamicVHD reads and checks the header of a dynamic VHD, at host offset off.
func openDynamicVHD(f *file, off uint64, disk int64, limits Limits) (*vhd, error) {
	if off < vhdFooterSize || !f.holds(off, vhdHeaderSize) {
		return nil, fieldErr("data_offset", off, ErrCorrupt,
			"behind the copy of the footer, %d bytes before the end of the file of %#x at least",
			vhdHeaderSize, f.size)
	}
	b, err := f.headerAt(int64(off), vhdHeaderSize)
	if err != nil {
		return nil, err
	}
	var (
		table   = be.Uint64(b[vhdTableOffAt:])
		version = be.Uint32(b[vhdHeaderVersionAt:])
		entries = be.Uint32(b[vhdMaxEntriesAt:])
		block   = be.Uint32(b[vhdBlockSizeAt:])
		sum     = be.Uint32(b[vhdHeaderChecksumAt:])
		bytes   = uint64(entries) * vhdEntrySize
	)
	switch {
	case string(b[:len(vhdHeaderCookie)]) != vhdHeaderCookie:
		return nil, fieldErr("header cookie", fmt.Sprintf("%q", b[:len(vhdHeaderCookie)]), ErrCorrupt,
			"%q", vhdHeaderCookie)
	case sum != vhdChecksum(b, vhdHeaderChecksumAt):
		return nil, fieldErr("header checksum", sum, ErrCorrupt, "%d", vhdChecksum(b, vhdHeaderChecksumAt))
	case version>>16 != vhdMajor:
		return nil, fieldErr("header_version", uint64(version), ErrUnsupported, "%#x", vhdMajor<<16)
	case block < sector || block&(block-1) != 0:
		return nil, fieldErr("block_size", block, ErrCorrupt, "a power of two from %d on", sector)
	case uint64(entries)*uint64(block) < uint64(disk):
		return nil, fieldErr("max_table_entries", entries, ErrCorrupt, "at least %d for a disk of %#x bytes",
			(uint64(disk)+uint64(block)-1)/uint64(block), disk)
	case table < vhdFooterSize || !f.holds(table, bytes):
		return nil, fieldErr("table_offset", table, ErrCorrupt,
			"such that a table of %#x bytes lies within the file of %#x", bytes, f.size)
	case table < off+vhdHeaderSize && off < table+bytes:
		return nil, fieldErr("table_offset", table, ErrCorrupt, "beside the header, %#x to %#x", off, off+vhdHeaderSize)
	}
	v := &vhd{
		blockBits:   uint(bits.TrailingZeros32(block)),
		bitmapBytes: (uint64(block)/sector/8 + sector - 1) &^ (sector - 1),
		table:       table,
		metadata:    [...][2]uint64{{0, vhdFooterSize}, {off, off + vhdHeaderSize}, {table, table + bytes}},
		disk:        disk,
	}
	v.tables = newTables(f, bytes+uint64(entries)*pieceSize, limits)
	return v, nil
}

// lookup implements mapper.
func (v *vhd) lookup(off, n int64) (Run, error) {
	n = min(n, v.disk-off)
	block := int64(1) << v.blockBits
	i := uint64(off) >> v.blockBits
	b, err := v.at(int64(v.table), i*vhdEntrySize)
	if err != nil {
		return Run{}, fmt.Errorf("block allocation table: %w", err)
	}
	in := off & (block - 1)
	have := block - in
	e := be.Uint32(b)
	if e == vhdUnallocated {
		for have < n && len(b) >= 2*vhdEntrySize && be.Uint32(b[vhdEntrySize:]) == vhdUnallocated {
			b = b[vhdEntrySize:]
			have += block
		}
		return Run{Kind: Zero, Len: min(n, have)}, nil
	}
	host := uint64(e) * sector
	need := v.bitmapBytes + uint64(min(block, v.disk-(off-in)))
	if !v.places(host, need) {
		return Run{}, &EntryError{
			What:     fmt.Sprintf("block allocation table entry %#x is not the sector of a block in the file of %#x", e, v.size),
			HostOff:  int64(v.table + i*vhdEntrySize),
			GuestOff: off,
		}
	}
	return v.lookupBitmap(host, in, min(n, have))
}

// places reports whether n bytes at host offset off can be a block.
func (v *vhd) places(off, n uint64) bool {
	if !v.holds(off, n) {
		return false
	}
	for _, m := range v.metadata {
		if off < m[1] && m[0] < off+n {
			return false
		}
	}
	return true
}

// lookupBitmap returns the state of n bytes at most from the byte in on, in the block at host offset host, as
// its bitmap tells.
func (v *vhd) lookupBitmap(host uint64, in, n int64) (Run, error) {
	first := uint64(in) / sector
	b, err := v.at(int64(host), first/8)
	if err != nil {
		return Run{}, fmt.Errorf("bitmap of a block: %w", err)
	}
	b = b[:min(uint64(len(b)), v.bitmapBytes-first/8)]
	written, sectors := bitRun(b, int(first%8))
	r := Run{Kind: Zero, Len: min(n, int64(sectors)*sector-in%sector)}
	if written {
		r.Kind, r.HostOff = Data, int64(host+v.bitmapBytes)+in
	}
	return r, nil
}

// bitRun returns bit i of b, of which the first is the most significant one of its byte, and how many from there on are
// like it. Precondition: i lies within b.
func bitRun(b []byte, i int) (set bool, n int) {
	flip := byte(0) // makes the bits that go on with the run zeros
	if set = b[i/8]<<(i%8)&0x80 != 0; set {
		flip = 0xff
	}
	k := i / 8
	if rest := (b[k] ^ flip) << (i % 8); rest != 0 {
		return set, bits.LeadingZeros8(rest)
	}
	same := uint64(0) - uint64(flip&1)
	for k++; k+8 <= len(b) && be.Uint64(b[k:]) == same; k += 8 {
	}
	for ; k < len(b); k++ {
		if rest := b[k] ^ flip; rest != 0 {
			return set, 8*k - i + bits.LeadingZeros8(rest)
		}
	}
	return set, 8*len(b) - i
}
