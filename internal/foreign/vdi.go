package foreign

import (
	"fmt"
	"math"
	"math/bits"
)

// VDI, as VirtualBox and QEMU have it (there is no specification): numbers are little-endian. A header, a map with the
// number of each block in the file, and the blocks.
const (
	vdiSignatureAt  = 0x40  // 4 bytes, behind a text for people
	vdiVersionAt    = 0x44  // 4: major and minor
	vdiTypeAt       = 0x4c  // 4
	vdiMapOffAt     = 0x154 // 4, host offset of the block map in bytes
	vdiDataOffAt    = 0x158 // 4, host offset of the first block in bytes
	vdiSectorSizeAt = 0x168 // 4
	vdiDiskSizeAt   = 0x170 // 8, in bytes
	vdiBlockSizeAt  = 0x178 // 4, in bytes
	vdiBlockExtraAt = 0x17c // 4, bytes in front of each block
	vdiBlocksAt     = 0x180 // 4, of the disk
	vdiLinkAt       = 0x1a8 // 16: the UUID of the image below
	vdiParentAt     = 0x1b8 // 16: that of its state
	vdiHeaderSize   = 512

	vdiSignature = 0xbeda107f
	vdiVersion   = 1<<16 | 1

	vdiDynamic      = 1
	vdiStatic       = 2
	vdiUndo         = 3
	vdiDifferencing = 4

	vdiEntrySize   = 4
	vdiUnallocated = 1<<32 - 1 // an entry of the block map: never written, which reads as zeros
	vdiDiscarded   = 1<<32 - 2 // does so, too
)

// vdi is a mapper.
type vdi struct {
	*tables
	blockBits uint
	blockMap  int64  // host offset
	data      uint64 // host offset of block 0 in the file
	disk      int64  // its size in bytes
}

// openVDI reads and checks the header of a VDI. Blocks may have any power of two of sectors; QEMU takes those of 1 MiB
// alone, which is what everybody makes.
func openVDI(f *file, limits Limits) (*Image, error) {
	b, err := f.headerAt(0, vdiHeaderSize)
	if err != nil {
		return nil, err
	}
	var (
		signature = le.Uint32(b[vdiSignatureAt:])
		version   = le.Uint32(b[vdiVersionAt:])
		typ       = le.Uint32(b[vdiTypeAt:])
		mapOff    = le.Uint32(b[vdiMapOffAt:])
		data      = le.Uint32(b[vdiDataOffAt:])
		sectors   = le.Uint32(b[vdiSectorSizeAt:])
		size      = le.Uint64(b[vdiDiskSizeAt:])
		block     = le.Uint32(b[vdiBlockSizeAt:])
		extra     = le.Uint32(b[vdiBlockExtraAt:])
		blocks    = le.Uint32(b[vdiBlocksAt:])
		bytes     = uint64(blocks) * vdiEntrySize
	)
	switch {
	case signature != vdiSignature:
		return nil, fieldErr("signature", uint64(signature), ErrWrongFormat, "%#x", uint64(vdiSignature))
	case version != vdiVersion:
		return nil, fieldErr("version", uint64(version), ErrUnsupported, "%#x", vdiVersion)
	case typ == vdiUndo || typ == vdiDifferencing:
		return nil, fieldErr("image_type", typ, ErrUnsupported,
			"%d (dynamic) or %d (static), not undo or differencing", vdiDynamic, vdiStatic)
	case typ != vdiDynamic && typ != vdiStatic:
		return nil, fieldErr("image_type", typ, ErrCorrupt, "%d (dynamic) or %d (static)", vdiDynamic, vdiStatic)
	case sectors != sector:
		return nil, fieldErr("sector_size", sectors, ErrUnsupported, "%d", sector)
	case block < sector || block&(block-1) != 0:
		return nil, fieldErr("block_size", block, ErrUnsupported, "a power of two from %d on", sector)
	case extra != 0:
		return nil, fieldErr("block_extra", extra, ErrUnsupported, "0")
	case !isZero(b[vdiLinkAt : vdiLinkAt+16]):
		return nil, fieldErr("uuid_link", uuid(b[vdiLinkAt:]), ErrUnsupported,
			"none: an image that has another one below it")
	case !isZero(b[vdiParentAt : vdiParentAt+16]):
		return nil, fieldErr("uuid_parent", uuid(b[vdiParentAt:]), ErrUnsupported,
			"none: an image that has another one below it")
	case size > math.MaxInt64-sector:
		return nil, fieldErr("disk_size", size, ErrUnsupported, "at most %#x", uint64(math.MaxInt64&^(sector-1)))
	case uint64(blocks) < size>>bits.TrailingZeros32(block) || uint64(blocks)*uint64(block) < size:
		return nil, fieldErr("blocks_in_image", blocks, ErrCorrupt, "at least %d for a disk of %#x bytes",
			(size+uint64(block)-1)/uint64(block), size)
	case mapOff < vdiHeaderSize || mapOff%sector != 0:
		return nil, fieldErr("offset_bmap", mapOff, ErrCorrupt, "a multiple of %d behind the header", sector)
	case !f.holds(uint64(mapOff), bytes):
		return nil, fieldErr("offset_bmap", mapOff, ErrCorrupt,
			"such that a map of %#x bytes lies within the file of %#x", bytes, f.size)
	case uint64(data) < uint64(mapOff)+bytes || data%sector != 0:
		return nil, fieldErr("offset_data", data, ErrCorrupt,
			"a multiple of %d behind the block map, which ends at %#x", sector, uint64(mapOff)+bytes)
	}
	size = (size + sector - 1) &^ (sector - 1) // VBoxManage makes images of any size
	if err := checkSize("disk_size", size, limits); err != nil {
		return nil, err
	}
	v := &vdi{
		tables:    newTables(f, bytes, limits),
		blockBits: uint(bits.TrailingZeros32(block)),
		blockMap:  int64(mapOff),
		data:      uint64(data),
		disk:      int64(size),
	}
	img := &Image{m: v, Info: Info{Subformat: "dynamic", Size: v.disk, BlockSize: int64(block)}}
	if typ == vdiStatic {
		img.Subformat, img.Whole = "static", true
	}
	return img, nil
}

// isZero reports whether b is all zeros.
func isZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}

// uuid returns the UUID that b begins with, as it is written. Its first three numbers are little-endian.
func uuid(b []byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

// lookup implements mapper.
func (v *vdi) lookup(off, n int64) (Run, error) {
	n = min(n, v.disk-off)
	block := int64(1) << v.blockBits
	i := uint64(off) >> v.blockBits
	b, err := v.at(v.blockMap, i*vdiEntrySize)
	if err != nil {
		return Run{}, fmt.Errorf("block map: %w", err)
	}
	kind, host, ok := v.entry(b, off)
	if !ok {
		return Run{}, &EntryError{
			What:     fmt.Sprintf("block map entry %#x is not a block within the file of %#x", le.Uint32(b), v.size),
			HostOff:  v.blockMap + int64(i*vdiEntrySize),
			GuestOff: off,
		}
	}
	in := off & (block - 1)
	r := Run{Kind: kind, Len: block - in, HostOff: host + in}
	for b = b[vdiEntrySize:]; r.Len < n && len(b) >= vdiEntrySize; b = b[vdiEntrySize:] {
		k, h, ok := v.entry(b, off+r.Len)
		if !ok || k != kind || kind == Data && h != r.HostOff+r.Len {
			break // what is broken is broken for who looks it up
		}
		r.Len += block
	}
	r.Len = min(r.Len, n)
	if kind != Data {
		r.HostOff = 0
	}
	return r, nil
}

// entry decodes the entry that b begins with, which maps the block of off. It is ok unless the block is not in the
// file.
func (v *vdi) entry(b []byte, off int64) (kind Kind, host int64, ok bool) {
	switch e := le.Uint32(b); e {
	case vdiUnallocated, vdiDiscarded:
		return Zero, 0, true
	default:
		start := off &^ (1<<v.blockBits - 1)
		need := min(1<<v.blockBits, v.disk-start)
		at := v.data + uint64(e)<<v.blockBits
		return Data, int64(at), v.holds(at, uint64(need))
	}
}
