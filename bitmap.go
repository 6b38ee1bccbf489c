package qcow2

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math"
)

// Layout of a bitmap directory entry: a fixed part, extra data and name, padded to 8 bytes.
// qcow2 spec, "Bitmap directory".
const (
	bitmapTableOff    = 0
	bitmapTableSize   = 8
	bitmapFlags       = 12
	bitmapType        = 16
	bitmapGranularity = 17
	bitmapNameSize    = 18
	bitmapExtraSize   = 20
)

// Flags of a bitmap.
const (
	bitmapInUse = 1 << 0 // not written back since its last use: the content is stale (BME_FLAG_IN_USE)
	bitmapAuto  = 1 << 1 // to be kept up to date by every writer (BME_FLAG_AUTO)

	bitmapFlagsKnown = bitmapInUse | bitmapAuto
)

// bitmapTypeDirty is the only type of bitmap that there is: dirty tracking.
const bitmapTypeDirty = 1

// Bounds of a bitmap, which are QEMU's where the specification leaves them open.
const (
	maxBitmapName        = 1023
	minBitmapGranularity = 9 // a sector
	maxBitmapGranularity = 31
	maxBitmapTableSize   = 0x8000000 // entries
	maxBitmapBytes       = 512 << 20 // the bitmap itself
)

// bitmapEntry is one entry of the bitmap directory: a persistent bitmap. qcow2 spec, "Bitmaps".
type bitmapEntry struct {
	dirOff      uint64 // host offset of the entry
	tableOff    uint64 // host offset of the bitmap table
	tableSize   uint32 // its entries, of 8 bytes each
	flags       uint32
	granularity uint8 // log2 of the guest bytes that one bit stands for
	name        string
}

// inUse reports whether the bitmap's content is stale.
func (e *bitmapEntry) inUse() bool { return e.flags&bitmapInUse != 0 }

// bitmapMark is a flags word of the bitmap directory to be written: 4 bytes, big-endian, at the host
// offset off, which lie inside one sector.
type bitmapMark struct {
	off   uint64
	flags uint32
}

// bitmapMarks returns the flag words that must be written to say that no bitmap can be trusted any
// more, as a writer that does not maintain them has to before its first guest write (I9): autoclear
// bit 0 cleared, sync, these marks, sync, the bit set again, sync. Empty if every bitmap says so
// already.
func bitmapMarks(entries []bitmapEntry) []bitmapMark {
	var marks []bitmapMark
	for i := range entries {
		if e := &entries[i]; !e.inUse() {
			marks = append(marks, bitmapMark{e.dirOff + bitmapFlags, e.flags | bitmapInUse})
		}
	}
	return marks
}

// readBitmapDirectory reads the bitmap directory that a validated header points at, from a file of
// fileSize bytes; nil if the header vouches for no bitmaps. It reads in pieces, and keeps no more than
// the directory holds. A directory that breaks the format is a *CorruptError, one with something
// newer than this library (flags, types, extra data) matches ErrUnsupported, one above
// limits.MetadataBytes is a *LimitError. The bitmap tables are not read. qcow2 spec, "Bitmaps".
func readBitmapDirectory(r io.ReaderAt, fileSize int64, h *header, limits Limits) ([]bitmapEntry, error) {
	if h.bitmaps == nil || h.autoclear&autoclearBitmaps == 0 {
		return nil, nil
	}
	limits = limits.withDefaults()
	ext := h.bitmaps
	t := &tableReader{what: "bitmap directory", start: ext.dirOff, off: ext.dirOff, limit: ext.dirSize}
	if ext.dirSize > uint64(limits.MetadataBytes) {
		return nil, &LimitError{Limit: "MetadataBytes", Value: int64(min(ext.dirSize, math.MaxInt64)), Max: limits.MetadataBytes}
	}
	end := uint64(max(fileSize, 0))
	if ext.dirOff > end || ext.dirSize > end-ext.dirOff {
		return nil, t.corrupt(fmt.Sprintf("of %d bytes ends beyond the file", ext.dirSize))
	}
	if uint64(ext.count)*minBitmapDirEntry > ext.dirSize {
		return nil, t.corrupt(fmt.Sprintf("of %d bytes is too short for %d bitmaps", ext.dirSize, ext.count))
	}
	t.r = bufio.NewReaderSize(io.NewSectionReader(r, int64(t.off), int64(ext.dirSize)), int(min(ext.dirSize, tableReadSize)))

	entries := make([]bitmapEntry, 0, ext.count)
	names := make(map[string]bool, ext.count)
	for range ext.count {
		e, err := readBitmapEntry(t, h)
		if err != nil {
			return nil, err
		}
		if names[e.name] {
			t.off = e.dirOff
			return nil, t.corrupt(fmt.Sprintf("has two bitmaps %q", e.name))
		}
		names[e.name] = true
		entries = append(entries, e)
	}
	if have := t.off - t.start; have != ext.dirSize {
		return nil, t.corrupt(fmt.Sprintf("of %d bytes has entries for %d", ext.dirSize, have))
	}
	return entries, nil
}

// readBitmapEntry reads the entry that t stands at, and its padding.
func readBitmapEntry(t *tableReader, h *header) (bitmapEntry, error) {
	e := bitmapEntry{dirOff: t.off}
	var fixed [minBitmapDirEntry]byte
	if err := t.read(fixed[:]); err != nil {
		return e, err
	}
	be := binary.BigEndian
	e.tableOff = be.Uint64(fixed[bitmapTableOff:])
	e.tableSize = be.Uint32(fixed[bitmapTableSize:])
	e.flags = be.Uint32(fixed[bitmapFlags:])
	e.granularity = fixed[bitmapGranularity]
	nameSize := be.Uint16(fixed[bitmapNameSize:])
	extraSize := be.Uint32(fixed[bitmapExtraSize:])

	unsupported := func(what string, v uint32) error {
		return fmt.Errorf("%w: bitmap directory entry at host %#x has %s %#x", ErrUnsupported, e.dirOff, what, v)
	}
	corrupt := func(format string, args ...any) error {
		return &CorruptError{What: "bitmap directory entry " + fmt.Sprintf(format, args...), HostOff: int64(e.dirOff), GuestOff: noOffset}
	}
	tableBytes := uint64(e.tableSize) * 8
	switch {
	case e.flags&^bitmapFlagsKnown != 0:
		return e, unsupported("flags", e.flags)
	case fixed[bitmapType] != bitmapTypeDirty:
		return e, unsupported("type", uint32(fixed[bitmapType]))
	case extraSize != 0:
		return e, unsupported("extra data of bytes", extraSize)
	case nameSize == 0 || nameSize > maxBitmapName:
		return e, corrupt("has a name of %d bytes, not 1 to %d", nameSize, maxBitmapName)
	case e.granularity < minBitmapGranularity || e.granularity > maxBitmapGranularity:
		return e, corrupt("has %d granularity bits, not %d to %d", e.granularity, minBitmapGranularity, maxBitmapGranularity)
	case e.tableSize == 0 || e.tableSize > maxBitmapTableSize || uint64(e.tableSize)<<h.clusterBits > maxBitmapBytes:
		return e, corrupt("has a table of %d entries, not 1 to %d", e.tableSize, min(maxBitmapTableSize, maxBitmapBytes>>h.clusterBits))
	case e.tableOff&(h.clusterSize()-1) != 0:
		return e, corrupt("has a table at %#x, which is not aligned to clusters", e.tableOff)
	case e.tableOff < h.clusterSize() || e.tableOff > maxHostOff-tableBytes:
		return e, corrupt("has a table of %d bytes at %#x, not behind the header's cluster and below %#x", tableBytes, e.tableOff, uint64(maxHostOff))
	}
	// A stale bitmap may be as long as the disk once was.
	if want := bitmapClusters(h, e.granularity); !e.inUse() && h.virtualSize() > 0 && uint64(e.tableSize) != want {
		return e, corrupt("has a table of %d entries, not the %d of the disk", e.tableSize, want)
	}
	name := make([]byte, nameSize)
	if err := t.read(name); err != nil {
		return e, err
	}
	e.name = string(name)
	return e, t.align()
}

// bitmapClusters returns how many clusters a bitmap of the whole disk takes, with one bit for
// 1<<granularity guest bytes.
func bitmapClusters(h *header, granularity uint8) uint64 {
	// Bits of the bitmap that fit into one cluster, as guest bytes: at most 2^(21+3+31).
	perCluster := uint64(8) << h.clusterBits << granularity
	return (h.virtualSize() + perCluster - 1) / perCluster
}
