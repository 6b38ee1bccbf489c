// Package refwalk looks at the bytes of a qcow2 image and says what is wrong with them, and what its
// guest reads. It is an oracle for tests: written from the specification, it shares no code with the
// library, and takes the shortest way that can be read beside the specification. It keeps whole tables
// in memory and is meant for small images.
package refwalk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Feature bits, by their position in the three fields. qcow2 spec, "Header".
const (
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	autoclearBitmaps    = 1 << 0
)

// Bounds of what is read into memory, in bytes unless said otherwise. An image beyond them is an error:
// tests have none.
const (
	maxTable     = 32 << 20 // an L1 table, a refcount table, the snapshot table, a bitmap directory
	maxClusters  = 1 << 26  // host clusters
	maxSnapshots = 65536
)

// Header is the part of the image header that a walk needs. Offsets are host offsets in bytes.
type Header struct {
	Version          uint32
	BackingName      string
	ClusterBits      uint
	VirtualSize      uint64 // as it stands in the field
	CryptMethod      uint32
	L1Entries        uint32
	L1Off            uint64
	RefTableOff      uint64
	RefTableClusters uint32
	Snapshots        uint32
	SnapshotsOff     uint64
	Incompatible     uint64
	Autoclear        uint64
	RefcountOrder    uint
	Zstd             bool // compression type 1
	// CryptoOff and CryptoLen place the encryption header; 0 without one.
	CryptoOff, CryptoLen uint64
	// Bitmaps, BitmapDirOff and BitmapDirLen place the bitmap directory; 0 where the extension is
	// absent or its autoclear bit is not set.
	Bitmaps      uint32
	BitmapDirOff uint64
	BitmapDirLen uint64
}

// Dirty reports the dirty bit.
func (h *Header) Dirty() bool { return h.Incompatible&incompatDirty != 0 }

// Corrupt reports the corrupt bit.
func (h *Header) Corrupt() bool { return h.Incompatible&incompatCorrupt != 0 }

// ExtendedL2 reports L2 entries of 16 bytes with subclusters.
func (h *Header) ExtendedL2() bool { return h.Incompatible&incompatExtendedL2 != 0 }

// DataFile reports an external data file.
func (h *Header) DataFile() bool { return h.Incompatible&incompatDataFile != 0 }

// clusterSize is the size of a cluster in bytes.
func (h *Header) clusterSize() int64 { return 1 << h.ClusterBits }

// l2EntrySize is the size of an L2 entry in bytes.
func (h *Header) l2EntrySize() int64 {
	if h.ExtendedL2() {
		return 16
	}
	return 8
}

// errHeader is matched by every error about a header that cannot be walked.
var errHeader = errors.New("unusable qcow2 header")

// ParseHeader reads the header of an image of size bytes. qcow2 spec, "Header" and "Header extensions".
func ParseHeader(r io.ReaderAt, size int64) (*Header, error) {
	im := &file{r: r, size: size}
	b, err := im.padded(0, 112)
	if err != nil {
		return nil, err
	}
	be := binary.BigEndian
	if be.Uint32(b) != 0x514649fb {
		return nil, fmt.Errorf("%w: magic %#x", errHeader, be.Uint32(b))
	}
	h := &Header{
		Version:          be.Uint32(b[4:]),
		ClusterBits:      uint(be.Uint32(b[20:])),
		VirtualSize:      be.Uint64(b[24:]),
		CryptMethod:      be.Uint32(b[32:]),
		L1Entries:        be.Uint32(b[36:]),
		L1Off:            be.Uint64(b[40:]),
		RefTableOff:      be.Uint64(b[48:]),
		RefTableClusters: be.Uint32(b[56:]),
		Snapshots:        be.Uint32(b[60:]),
		SnapshotsOff:     be.Uint64(b[64:]),
		RefcountOrder:    4,
	}
	backingOff, backingLen := be.Uint64(b[8:]), be.Uint32(b[16:])
	headerLen := uint64(72)
	if h.Version != 2 && h.Version != 3 {
		return nil, fmt.Errorf("%w: version %d", errHeader, h.Version)
	}
	if h.ClusterBits < 9 || h.ClusterBits > 21 {
		return nil, fmt.Errorf("%w: cluster bits %d", errHeader, h.ClusterBits)
	}
	cs := uint64(h.clusterSize())
	if h.Version == 3 {
		h.Incompatible = be.Uint64(b[72:])
		h.Autoclear = be.Uint64(b[88:])
		h.RefcountOrder = uint(be.Uint32(b[96:]))
		headerLen = uint64(be.Uint32(b[100:]))
		if headerLen < 104 || headerLen > cs || headerLen%8 != 0 {
			return nil, fmt.Errorf("%w: header length %d", errHeader, headerLen)
		}
		if headerLen > 104 {
			switch b[104] {
			case 0:
			case 1:
				h.Zstd = true
			default:
				return nil, fmt.Errorf("%w: compression type %d", errHeader, b[104])
			}
		}
		if h.Zstd != (h.Incompatible&incompatCompression != 0) {
			return nil, fmt.Errorf("%w: compression type and incompatible features %#x disagree", errHeader, h.Incompatible)
		}
	}
	switch {
	case h.Incompatible>>5 != 0:
		return nil, fmt.Errorf("%w: incompatible features %#x", errHeader, h.Incompatible)
	case h.RefcountOrder > 6:
		return nil, fmt.Errorf("%w: refcount order %d", errHeader, h.RefcountOrder)
	case h.ExtendedL2() && h.ClusterBits < 14:
		return nil, fmt.Errorf("%w: extended L2 with cluster bits %d", errHeader, h.ClusterBits)
	case h.CryptMethod > 2:
		return nil, fmt.Errorf("%w: encryption method %d", errHeader, h.CryptMethod)
	case backingOff > cs || uint64(backingLen) > cs-backingOff || backingLen > 1023:
		return nil, fmt.Errorf("%w: backing name of %d bytes at %#x", errHeader, backingLen, backingOff)
	case uint64(h.L1Entries)*8 > maxTable || h.L1Off%cs != 0 || h.L1Off >= 1<<62:
		return nil, fmt.Errorf("%w: L1 table of %d entries at %#x", errHeader, h.L1Entries, h.L1Off)
	case h.RefTableClusters == 0 || uint64(h.RefTableClusters)*cs > maxTable || h.RefTableOff%cs != 0 ||
		h.RefTableOff >= 1<<62:
		return nil, fmt.Errorf("%w: refcount table of %d clusters at %#x", errHeader, h.RefTableClusters, h.RefTableOff)
	case h.Snapshots > maxSnapshots || h.Snapshots > 0 && (h.SnapshotsOff%cs != 0 || h.SnapshotsOff >= 1<<62):
		return nil, fmt.Errorf("%w: %d snapshots at %#x", errHeader, h.Snapshots, h.SnapshotsOff)
	case h.VirtualSize >= 1<<62:
		return nil, fmt.Errorf("%w: virtual size %#x", errHeader, h.VirtualSize)
	}
	span := uint64(h.clusterSize()) * (cs / uint64(h.l2EntrySize())) // guest bytes of an L2 table
	if need := (h.VirtualSize + span - 1) / span; need > uint64(h.L1Entries) {
		return nil, fmt.Errorf("%w: L1 table of %d entries for a disk of %#x bytes", errHeader, h.L1Entries, h.VirtualSize)
	}
	if backingOff != 0 && backingLen != 0 {
		name, err := im.padded(int64(backingOff), int64(backingLen))
		if err != nil {
			return nil, err
		}
		h.BackingName = string(name)
	}
	end := cs
	if backingOff != 0 {
		end = backingOff
	}
	return h, h.parseExtensions(im, headerLen, end)
}

// parseExtensions reads the header extensions in [off, end).
func (h *Header) parseExtensions(im *file, off, end uint64) error {
	if off >= end {
		return nil
	}
	b, err := im.padded(int64(off), int64(end-off))
	if err != nil {
		return err
	}
	be := binary.BigEndian
	for len(b) >= 8 {
		typ, n := be.Uint32(b), uint64(be.Uint32(b[4:]))
		if typ == 0 {
			return nil
		}
		b = b[8:]
		if n > uint64(len(b)) {
			return fmt.Errorf("%w: header extension %#x of %d bytes, %d left", errHeader, typ, n, len(b))
		}
		data := b[:n]
		switch typ {
		case 0x0537be77: // full disk encryption header pointer
			if n != 16 {
				return fmt.Errorf("%w: encryption header extension of %d bytes", errHeader, n)
			}
			h.CryptoOff, h.CryptoLen = be.Uint64(data), be.Uint64(data[8:])
			if h.CryptoOff%uint64(h.clusterSize()) != 0 || h.CryptoOff >= 1<<62 || h.CryptoLen > maxTable {
				return fmt.Errorf("%w: encryption header of %#x bytes at %#x", errHeader, h.CryptoLen, h.CryptoOff)
			}
		case 0x23852875: // bitmaps
			if n != 24 {
				return fmt.Errorf("%w: bitmaps extension of %d bytes", errHeader, n)
			}
			if h.Autoclear&autoclearBitmaps == 0 {
				break
			}
			h.Bitmaps, h.BitmapDirLen, h.BitmapDirOff = be.Uint32(data), be.Uint64(data[8:]), be.Uint64(data[16:])
			if be.Uint32(data[4:]) != 0 || h.BitmapDirOff%uint64(h.clusterSize()) != 0 || h.BitmapDirOff >= 1<<62 ||
				h.BitmapDirLen > maxTable {
				return fmt.Errorf("%w: bitmap directory of %#x bytes at %#x", errHeader, h.BitmapDirLen, h.BitmapDirOff)
			}
		}
		b = b[min((n+7)/8*8, uint64(len(b))):]
	}
	return nil
}

// file is the host file: size bytes, and zeros beyond them.
type file struct {
	r    io.ReaderAt
	size int64
}

// read fills p from off; what lies past the end is zeros.
func (f *file) read(p []byte, off int64) error {
	n := int64(0)
	if off < f.size {
		n = min(int64(len(p)), f.size-off)
		if m, err := f.r.ReadAt(p[:n], off); int64(m) < n {
			return fmt.Errorf("read %#x bytes at host %#x: %w", n, off, err)
		}
	}
	clear(p[n:])
	return nil
}

// padded returns n bytes from off, zeros past the end.
func (f *file) padded(off, n int64) ([]byte, error) {
	p := make([]byte, n)
	return p, f.read(p, off)
}

// clipped returns the part of the n bytes from off that lies within the file; the rest is zeros.
func (f *file) clipped(off, n int64) ([]byte, error) {
	return f.padded(off, max(0, min(n, f.size-off)))
}
