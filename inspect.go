package qcow2

import (
	"fmt"
	"io"
	"slices"
)

// Defaults of Limits.
const (
	defaultMetadataBytes = 64 << 20 // over the format's own bounds: 32 MiB of L1, 8 MiB of refcount table
	defaultChainDepth    = 32
	defaultSnapshots     = maxSnapshots
)

// withDefaults returns the limits with the defaults in place of fields that are zero or negative; l may
// be nil. No limit goes beyond the format's bound.
func (l *Limits) withDefaults() Limits {
	var d Limits
	if l != nil {
		d = *l
	}
	if d.MetadataBytes <= 0 {
		d.MetadataBytes = defaultMetadataBytes
	}
	if d.ChainDepth <= 0 {
		d.ChainDepth = defaultChainDepth
	}
	if d.Snapshots <= 0 || d.Snapshots > maxSnapshots {
		d.Snapshots = defaultSnapshots
	}
	d.VirtualSize = max(d.VirtualSize, 0)
	return d
}

// Info says what the header of an image tells: all that a service needs to decide whether it takes the
// image, and which other files reading it would touch. The names come from the image: they are
// untrusted, and may hold any byte but NUL.
type Info struct {
	// Version is 2 or 3. QEMU calls them compat 0.10 and 1.1.
	Version int
	// VirtualSize is the size of the disk in bytes, a multiple of 512.
	VirtualSize int64
	// HeaderSize is the header's size field, in bytes: VirtualSize before it was rounded down.
	HeaderSize int64
	// FileSize is the size in bytes of the file or storage that was read.
	FileSize int64
	// EndOffset is the host offset in bytes behind the last cluster in use, as the refcounts told at open; of a
	// dirty image, as its tables did. Where that would have taken long to find out, it is the end of the file.
	// Inspect does not look: 0.
	EndOffset int64
	// ClusterSize is the size of a cluster in bytes.
	ClusterSize int
	// SubclusterSize is the unit of allocation in bytes: ClusterSize without extended L2.
	SubclusterSize int
	// RefcountBits is the width of a refcount; 0 if the header's value means nothing.
	RefcountBits int
	// Compression is the type of compressed clusters.
	Compression CompressionType
	// ExtendedL2 tells whether clusters are divided into subclusters.
	ExtendedL2 bool
	// LazyRefcounts tells whether refcounts may be written late.
	LazyRefcounts bool
	// Dirty tells whether refcounts may be stale; a writable open must repair them.
	Dirty bool
	// Corrupt tells whether the image was marked corrupt: it is for reading only.
	Corrupt bool
	// Encryption is "", "aes" or "luks"; "unknown" for anything else.
	Encryption string
	// BackingFile is the name of the backing file, or "". BackingFormat is its format, or "" if the
	// image does not tell.
	BackingFile   string
	BackingFormat string
	// NeedsDataFile tells whether the guest's data lives in an external data file; DataFile is its name
	// as far as the image tells.
	NeedsDataFile bool
	DataFile      string
	// DataFileRaw tells whether the data file alone reads as the disk.
	DataFileRaw bool
	// SnapshotCount is the number of internal snapshots.
	SnapshotCount int
	// BitmapCount is the number of persistent bitmaps that the header vouches for.
	BitmapCount int
	// L1Entries is the number of entries of the active L1 table.
	L1Entries int
	// HeaderLength is the length of the header's fixed part in bytes.
	HeaderLength int
	// IncompatibleFeatures, CompatibleFeatures and AutoclearFeatures are the feature words.
	IncompatibleFeatures uint64
	CompatibleFeatures   uint64
	AutoclearFeatures    uint64
	// UnknownIncompatible, UnknownCompatible and UnknownAutoclear name the set bits of those words that
	// this library does not know: as the image names them, or by number. An image with an unknown
	// incompatible feature cannot be opened, and the other fields need not mean what they say.
	UnknownIncompatible []string
	UnknownCompatible   []string
	UnknownAutoclear    []string
	// UnknownExtensions are the types of the header extensions that this library does not know, in the
	// order of the file.
	UnknownExtensions []uint32
	// Locked tells whether the image lock is held. Inspect takes none.
	Locked bool
}

// Inspect tells what an image is from the first cluster of r, of which it reads what it needs. It opens
// no other file, and what it allocates is bounded by the cluster size, whatever the image claims. An
// image that could not be opened because of encryption or an unknown incompatible feature is described
// like any other. A header that breaks the format is a *HeaderError, as in Open: of the class
// ErrNotQcow2, ErrCorrupt, ErrUnsupported or ErrLimit. size is the size of the file in bytes; limits
// may be nil.
func Inspect(r io.ReaderAt, size int64, limits *Limits) (*Info, error) {
	h, err := readHeader(r, size)
	if err != nil {
		return nil, fmt.Errorf("qcow2: inspect: %w", err)
	}
	info := h.info()
	if len(info.UnknownIncompatible) > 0 {
		// The rules for the other fields are those of an image without that feature.
		return &info, nil
	}
	if err := h.validate(limits.withDefaults()); err != nil {
		return nil, fmt.Errorf("qcow2: inspect: %w", err)
	}
	return &info, nil
}

// info returns what the header tells. The header needs no more than readHeader's acceptance.
func (h *header) info() Info {
	info := Info{
		Version:              int(h.version),
		VirtualSize:          int64(h.virtualSize()),
		HeaderSize:           int64(h.size),
		FileSize:             h.fileSize,
		ClusterSize:          int(h.clusterSize()),
		SubclusterSize:       int(h.clusterSize()),
		Compression:          h.compression,
		ExtendedL2:           h.extendedL2(),
		LazyRefcounts:        h.lazyRefcounts(),
		Dirty:                h.dirty(),
		Corrupt:              h.corrupt(),
		BackingFile:          h.backingName,
		BackingFormat:        h.backingFormat,
		NeedsDataFile:        h.hasDataFile(),
		DataFile:             h.dataFileName,
		DataFileRaw:          h.rawData(),
		SnapshotCount:        int(min(h.nbSnapshots, 1<<30)),
		L1Entries:            int(min(h.l1Size, 1<<30)),
		HeaderLength:         int(h.headerLength),
		IncompatibleFeatures: h.incompatible,
		CompatibleFeatures:   h.compatible,
		AutoclearFeatures:    h.autoclear,
		UnknownIncompatible:  h.unknownIncompatible(),
		UnknownCompatible:    h.unknownFeatures(featureCompatible, h.compatible, compatKnown),
		UnknownAutoclear:     h.unknownFeatures(featureAutoclear, h.autoclear, autoclearKnown),
	}
	if h.extendedL2() {
		info.SubclusterSize /= subclustersPerCluster
	}
	if h.refcountOrder <= maxRefcountOrder {
		info.RefcountBits = 1 << h.refcountOrder
	}
	switch h.cryptMethod {
	case cryptNone:
	case cryptAES:
		info.Encryption = "aes"
	case cryptLUKS:
		info.Encryption = "luks"
	default:
		info.Encryption = "unknown"
	}
	if h.bitmaps != nil {
		info.BitmapCount = int(min(h.bitmaps.count, 1<<30))
	}
	for _, e := range h.extensions {
		if !slices.Contains(knownExtensions[:], e.typ) {
			info.UnknownExtensions = append(info.UnknownExtensions, e.typ)
		}
	}
	return info
}

// knownExtensions are the types of header extensions that this library understands.
var knownExtensions = [...]uint32{extBackingFormat, extFeatureNames, extBitmaps, extCryptoHeader, extDataFile}
