package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
)

// headerMagic begins every qcow2 image: "QFI\xfb".
const headerMagic = 0x514649fb

// Offsets of the header's fields in bytes from the start of the file. qcow2 spec, "Header".
const (
	fieldMagic            = 0
	fieldVersion          = 4
	fieldBackingOff       = 8
	fieldBackingSize      = 16
	fieldClusterBits      = 20
	fieldSize             = 24
	fieldCryptMethod      = 32
	fieldL1Size           = 36
	fieldL1Off            = 40
	fieldRefTableOff      = 48
	fieldRefTableClusters = 56
	fieldNbSnapshots      = 60
	fieldSnapshotsOff     = 64
	fieldIncompatible     = 72 // from here on in version 3 only
	fieldCompatible       = 80
	fieldAutoclear        = 88
	fieldRefcountOrder    = 96
	fieldHeaderLength     = 100
	fieldCompression      = 104 // from here on as far as header_length says
	fieldPadding          = 105
)

// Lengths of the fixed part of the header in bytes.
const (
	headerLengthV2  = 72  // all of a version 2 header
	headerLengthMin = 104 // the shortest version 3 header
	headerLengthV3  = 112 // a version 3 header with all the fields that we know
)

// headerField is the place of one field of the header: offset and size in bytes, and the name that
// the specification gives it.
type headerField struct {
	off, size int
	name      string
}

// headerFields is every field of the header that we know, in the order of the file. They lie end to
// end.
var headerFields = [...]headerField{
	{fieldMagic, 4, "magic"},
	{fieldVersion, 4, "version"},
	{fieldBackingOff, 8, "backing_file_offset"},
	{fieldBackingSize, 4, "backing_file_size"},
	{fieldClusterBits, 4, "cluster_bits"},
	{fieldSize, 8, "size"},
	{fieldCryptMethod, 4, "crypt_method"},
	{fieldL1Size, 4, "l1_size"},
	{fieldL1Off, 8, "l1_table_offset"},
	{fieldRefTableOff, 8, "refcount_table_offset"},
	{fieldRefTableClusters, 4, "refcount_table_clusters"},
	{fieldNbSnapshots, 4, "nb_snapshots"},
	{fieldSnapshotsOff, 8, "snapshots_offset"},
	{fieldIncompatible, 8, "incompatible_features"},
	{fieldCompatible, 8, "compatible_features"},
	{fieldAutoclear, 8, "autoclear_features"},
	{fieldRefcountOrder, 4, "refcount_order"},
	{fieldHeaderLength, 4, "header_length"},
	{fieldCompression, 1, "compression_type"},
	{fieldPadding, 7, "padding"},
}

// Incompatible features: an image with one that is not understood must not be opened.
const (
	incompatDirty       = 1 << 0 // refcounts may be stale (QCOW2_INCOMPAT_DIRTY)
	incompatCorrupt     = 1 << 1 // some structure was found broken: no writing (QCOW2_INCOMPAT_CORRUPT)
	incompatDataFile    = 1 << 2 // guest clusters live in an external data file (QCOW2_INCOMPAT_DATA_FILE)
	incompatCompression = 1 << 3 // compression_type is not deflate (QCOW2_INCOMPAT_COMPRESSION)
	incompatExtendedL2  = 1 << 4 // L2 entries have subcluster bitmaps (QCOW2_INCOMPAT_EXTL2)

	incompatKnown = incompatDirty | incompatCorrupt | incompatDataFile | incompatCompression | incompatExtendedL2
)

// Compatible features: whoever does not understand one may ignore it.
const (
	compatLazyRefcounts = 1 << 0 // refcounts may be written late (QCOW2_COMPAT_LAZY_REFCOUNTS)

	compatKnown = compatLazyRefcounts
)

// Autoclear features: whoever does not understand one clears it before writing.
const (
	autoclearBitmaps = 1 << 0 // the bitmaps extension is consistent (QCOW2_AUTOCLEAR_BITMAPS)
	autoclearRawData = 1 << 1 // the data file alone reads as the disk (QCOW2_AUTOCLEAR_DATA_FILE_RAW)

	autoclearKnown = autoclearBitmaps | autoclearRawData
)

// Values of the field crypt_method.
const (
	cryptNone = 0
	cryptAES  = 1 // obsolete: AES in CBC mode, keyed by the passphrase
	cryptLUKS = 2
)

// Types of header extensions. qcow2 spec, "Header extensions".
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extCryptoHeader  = 0x0537be77
	extDataFile      = 0x44415441 // "DATA"
)

// Sizes of header extensions in bytes.
const (
	extHeaderSize     = 8  // type and length
	extBitmapsSize    = 24 // the data of the bitmaps extension
	extCryptoSize     = 16 // the data of the crypto header extension
	featureRecordSize = 48 // one record of the feature name table
	featureNameSize   = 46 // the name in it, padded with zeros
)

// Bounds of the format. Those that the specification leaves open are QEMU's: no image that goes
// beyond them is read by anybody.
const (
	minClusterBits    = 9  // 512 bytes, a sector
	maxClusterBits    = 21 // 2 MiB
	minExtL2Bits      = 14 // 32 subclusters of a sector each
	maxRefcountOrder  = 6  // 64-bit refcounts
	maxHostOff        = 1 << 56
	maxBackingName    = 1023
	maxBackingFormat  = 15
	l1EntrySize       = 8
	maxL1Bytes        = 32 << 20 // a disk of 32 TiB with 8 KiB clusters, 2 EiB with 2 MiB clusters
	maxRefTableBytes  = 8 << 20  // 2 PiB of 64 KiB clusters with 16-bit refcounts
	maxSnapshots      = 65536
	maxSnapshotBytes  = 64 << 20 // the whole snapshot table
	maxSnapshotExtra  = 1024     // extra data of one snapshot
	minSnapshotEntry  = 40       // a snapshot table entry without extra data, id and name
	maxBitmaps        = 65535
	maxBitmapDirBytes = 1024 * maxBitmaps
	minBitmapDirEntry = 24 // a bitmap directory entry without extra data and name
	sectorSize        = 512
)

// header is the decoded image header: the fixed fields, the header extensions and the backing file
// name. The values of the extensions that we know stand in fields of their own, which are what counts
// when the header is encoded; of everything that is not changed the bytes are kept as they were read.
// Changes need the caller's own lock. qcow2 spec, "Header".
type header struct {
	version          uint32
	backingOff       uint64 // host offset of the backing name as read; 0: none, or to be placed
	backingSize      uint32 // its length in bytes as read
	clusterBits      uint32
	size             uint64 // virtual size as it stands in the field, in bytes
	cryptMethod      uint32
	l1Size           uint32 // entries of the active L1 table
	l1Off            uint64
	refTableOff      uint64
	refTableClusters uint32
	nbSnapshots      uint32
	snapshotsOff     uint64
	incompatible     uint64
	compatible       uint64
	autoclear        uint64
	refcountOrder    uint32
	headerLength     uint32
	compression      CompressionType
	padding          []byte            // header bytes from 105 to 111, as far as headerLength goes (I9)
	unknownFields    []byte            // header bytes from 112 to headerLength, kept verbatim (I9)
	extensions       []headerExtension // in the file's order, END excluded; data must not be changed
	backingName      string            // up to the first NUL
	backingNameRaw   []byte            // as it stands in the file
	backingFormat    string            // from the backing format extension, or ""
	dataFileName     string            // from the external data file extension, or ""

	// bitmaps is the bitmaps extension; nil if there is none, or none that the autoclear bit vouches for.
	bitmaps *bitmapsExtension
	// crypto is the crypto header extension, or nil.
	crypto *cryptoExtension
	// fileSize is the size in bytes of the file that the header was read from.
	fileSize int64
}

// headerExtension is one header extension: type and data, padding excluded.
type headerExtension struct {
	typ  uint32
	data []byte
}

// bitmapsExtension is the pointer to the bitmap directory. qcow2 spec, "Bitmaps extension".
type bitmapsExtension struct {
	count    uint32 // number of bitmaps
	reserved uint32
	dirSize  uint64 // bytes of the bitmap directory
	dirOff   uint64 // its host offset
}

// encode returns the extension's data.
func (b *bitmapsExtension) encode() []byte {
	p := make([]byte, extBitmapsSize)
	binary.BigEndian.PutUint32(p[0:], b.count)
	binary.BigEndian.PutUint32(p[4:], b.reserved)
	binary.BigEndian.PutUint64(p[8:], b.dirSize)
	binary.BigEndian.PutUint64(p[16:], b.dirOff)
	return p
}

// cryptoExtension is the pointer to the LUKS header. qcow2 spec, "Full disk encryption header pointer".
type cryptoExtension struct {
	off    uint64 // host offset
	length uint64 // bytes
}

// headerErr returns a located error of class err for a field of the header.
func headerErr(field string, value any, err error, bound string, args ...any) *HeaderError {
	return &HeaderError{Field: field, Value: value, Bound: fmt.Sprintf(bound, args...), Err: err}
}

// extensionName returns how errors call a header extension.
func extensionName(typ uint32) string {
	switch typ {
	case extEnd:
		return "extension END"
	case extBackingFormat:
		return "extension backing format"
	case extFeatureNames:
		return "extension feature name table"
	case extBitmaps:
		return "extension bitmaps"
	case extCryptoHeader:
		return "extension crypto header"
	case extDataFile:
		return "extension external data file"
	}
	return fmt.Sprintf("extension %#08x", typ)
}

// cString returns the bytes up to the first NUL. QEMU reads the names of the header so, and some
// writers store the NUL.
func cString(p []byte) string {
	if i := bytes.IndexByte(p, 0); i >= 0 {
		p = p[:i]
	}
	return string(p)
}

// headerWindow reads a header from the front, no further than it is asked for, and no byte twice.
type headerWindow struct {
	r    io.ReaderAt
	size int64  // bytes of the file; behind them everything is zero
	max  int    // bytes that may be asked for: one cluster
	buf  []byte // what has been read
}

// bytes returns the n bytes at off, which stay valid and must not be changed. The range must lie below
// w.max.
func (w *headerWindow) bytes(off, n int) ([]byte, error) {
	end := off + n
	if end > len(w.buf) {
		// A sector holds the usual header; else double, so that many small steps stay linear.
		length := min(max(end, 2*len(w.buf), sectorSize), w.max)
		buf := make([]byte, length)
		have := copy(buf, w.buf)
		if err := readPadded(w.r, w.size, buf[have:], int64(have)); err != nil {
			return nil, fmt.Errorf("read header at host %#x: %w", have, err)
		}
		w.buf = buf
	}
	return w.buf[off:end:end], nil
}

// readPadded fills p from off of a file of size bytes. What lies past the end of the file is zero: a
// file may end before its tables do.
func readPadded(r io.ReaderAt, size int64, p []byte, off int64) error {
	want := min(int64(len(p)), max(size-off, 0))
	n := 0
	if want > 0 {
		var err error
		n, err = r.ReadAt(p[:want], off)
		if int64(n) < want && !errors.Is(err, io.EOF) {
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	clear(p[n:])
	return nil
}

// readHeader decodes the header of a file of size bytes: its shape, which is all that must hold
// before the fields can be told apart. It reads at most one cluster. Bytes past the end of the file
// are zero. The errors are *HeaderError, or those of r. The other rules are validate's.
// qcow2 spec, "Header" and "Header extensions".
func readHeader(r io.ReaderAt, size int64) (*header, error) {
	// The smallest cluster bounds what is read until cluster_bits is known.
	w := &headerWindow{r: r, size: size, max: 1 << minClusterBits}
	b, err := w.bytes(0, headerLengthV3)
	if err != nil {
		return nil, err
	}
	be := binary.BigEndian
	if v := be.Uint32(b[fieldMagic:]); v != headerMagic {
		return nil, headerErr("magic", v, ErrNotQcow2, "%#x", headerMagic)
	}
	h := &header{
		version:          be.Uint32(b[fieldVersion:]),
		backingOff:       be.Uint64(b[fieldBackingOff:]),
		backingSize:      be.Uint32(b[fieldBackingSize:]),
		clusterBits:      be.Uint32(b[fieldClusterBits:]),
		size:             be.Uint64(b[fieldSize:]),
		cryptMethod:      be.Uint32(b[fieldCryptMethod:]),
		l1Size:           be.Uint32(b[fieldL1Size:]),
		l1Off:            be.Uint64(b[fieldL1Off:]),
		refTableOff:      be.Uint64(b[fieldRefTableOff:]),
		refTableClusters: be.Uint32(b[fieldRefTableClusters:]),
		nbSnapshots:      be.Uint32(b[fieldNbSnapshots:]),
		snapshotsOff:     be.Uint64(b[fieldSnapshotsOff:]),
		refcountOrder:    4, // what version 2 implies
		headerLength:     headerLengthV2,
		fileSize:         size,
	}
	if h.version < 2 || h.version > 3 {
		return nil, headerErr("version", h.version, ErrUnsupported, "2 or 3")
	}
	// Everything below shifts by cluster_bits.
	if h.clusterBits < minClusterBits {
		return nil, headerErr("cluster_bits", h.clusterBits, ErrCorrupt, "%d to %d", minClusterBits, maxClusterBits)
	}
	if h.clusterBits > maxClusterBits {
		return nil, headerErr("cluster_bits", h.clusterBits, ErrUnsupported, "%d to %d", minClusterBits, maxClusterBits)
	}
	if h.size > math.MaxInt64 {
		return nil, headerErr("size", h.size, ErrCorrupt, "at most %#x", uint64(math.MaxInt64))
	}
	if h.version >= 3 {
		h.incompatible = be.Uint64(b[fieldIncompatible:])
		h.compatible = be.Uint64(b[fieldCompatible:])
		h.autoclear = be.Uint64(b[fieldAutoclear:])
		h.refcountOrder = be.Uint32(b[fieldRefcountOrder:])
		h.headerLength = be.Uint32(b[fieldHeaderLength:])
		if h.headerLength < headerLengthMin || uint64(h.headerLength) > h.clusterSize() {
			return nil, headerErr("header_length", h.headerLength, ErrCorrupt,
				"%d to the cluster size of %d", headerLengthMin, h.clusterSize())
		}
		if h.headerLength > fieldCompression {
			h.compression = CompressionType(b[fieldCompression])
			h.padding = b[fieldPadding:max(min(h.headerLength, headerLengthV3), fieldPadding)]
		}
	}
	w.max = int(h.clusterSize())
	if h.headerLength > headerLengthV3 {
		h.unknownFields, err = w.bytes(headerLengthV3, int(h.headerLength)-headerLengthV3)
		if err != nil {
			return nil, err
		}
	}

	// The extensions end where the backing name begins, or with the cluster.
	extArea := w.max
	if h.backingOff != 0 {
		if h.backingOff > h.clusterSize() || h.backingOff < uint64(h.headerLength) {
			return nil, headerErr("backing_file_offset", h.backingOff, ErrCorrupt,
				"%#x to %#x, behind the header in its cluster", h.headerLength, h.clusterSize())
		}
		extArea = int(h.backingOff)
		if most := min(maxBackingName, h.clusterSize()-h.backingOff); uint64(h.backingSize) > most {
			return nil, headerErr("backing_file_size", h.backingSize, ErrCorrupt, "at most %d", most)
		}
		if h.backingNameRaw, err = w.bytes(extArea, int(h.backingSize)); err != nil {
			return nil, err
		}
		h.backingName = cString(h.backingNameRaw)
	}
	if err := h.readExtensions(w, extArea); err != nil {
		return nil, err
	}
	return h, nil
}

// readExtensions decodes the header extensions, which end at end or with END. A later extension of a
// type counts before an earlier one.
func (h *header) readExtensions(w *headerWindow, end int) error {
	for off := int(h.headerLength); off < end; {
		if end-off < extHeaderSize {
			return headerErr("header extensions", end-off, ErrCorrupt,
				"none, or at least %d bytes before the backing file name", extHeaderSize)
		}
		b, err := w.bytes(off, extHeaderSize)
		if err != nil {
			return err
		}
		typ, n := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
		off += extHeaderSize
		if n > uint32(end-off) {
			return headerErr(extensionName(typ)+" length", n, ErrCorrupt, "at most %d, the bytes left", end-off)
		}
		if typ == extEnd {
			return nil
		}
		data, err := w.bytes(off, int(n))
		if err != nil {
			return err
		}
		off += int(n+7) &^ 7
		h.extensions = append(h.extensions, headerExtension{typ, data})
		switch typ {
		case extBackingFormat:
			h.backingFormat = cString(data)
		case extDataFile:
			h.dataFileName = cString(data)
		case extBitmaps:
			// Without the autoclear bit, whoever wrote last knew nothing of bitmaps: what stands here
			// is stale, and only kept.
			if h.autoclear&autoclearBitmaps != 0 && n == extBitmapsSize {
				h.bitmaps = &bitmapsExtension{
					count:    binary.BigEndian.Uint32(data[0:]),
					reserved: binary.BigEndian.Uint32(data[4:]),
					dirSize:  binary.BigEndian.Uint64(data[8:]),
					dirOff:   binary.BigEndian.Uint64(data[16:]),
				}
			}
		case extCryptoHeader:
			if n == extCryptoSize {
				h.crypto = &cryptoExtension{
					off:    binary.BigEndian.Uint64(data[0:]),
					length: binary.BigEndian.Uint64(data[8:]),
				}
			}
		}
	}
	return nil
}

// clusterSize returns the size of a cluster in bytes.
func (h *header) clusterSize() uint64 { return 1 << h.clusterBits }

// virtualSize returns the size of the disk in bytes: the header's field rounded down to a sector, as
// QEMU does.
func (h *header) virtualSize() uint64 { return h.size &^ (sectorSize - 1) }

// geometry returns the arithmetic of the image. Precondition: validate accepted the header.
func (h *header) geometry() geometry {
	return newGeometry(uint(h.clusterBits), uint(h.refcountOrder), h.extendedL2())
}

// dirty reports whether refcounts may be stale.
func (h *header) dirty() bool { return h.incompatible&incompatDirty != 0 }

// corrupt reports whether the image is marked corrupt.
func (h *header) corrupt() bool { return h.incompatible&incompatCorrupt != 0 }

// hasDataFile reports whether guest clusters live in an external data file.
func (h *header) hasDataFile() bool { return h.incompatible&incompatDataFile != 0 }

// rawData reports whether the data file alone must read as the disk.
func (h *header) rawData() bool { return h.autoclear&autoclearRawData != 0 }

// extendedL2 reports whether L2 entries carry subcluster bitmaps.
func (h *header) extendedL2() bool { return h.incompatible&incompatExtendedL2 != 0 }

// lazyRefcounts reports whether refcounts may be written late.
func (h *header) lazyRefcounts() bool { return h.compatible&compatLazyRefcounts != 0 }

// hasBacking reports whether the header names a backing file.
func (h *header) hasBacking() bool { return h.backingName != "" }

// featureType is the kind of a feature in the feature name table.
type featureType uint8

const (
	featureIncompatible featureType = 0
	featureCompatible   featureType = 1
	featureAutoclear    featureType = 2
)

// featureNames are the features that we know, as the feature name table of a new image names them.
// The names are what QEMU writes there: tools show them.
var featureNames = [...]struct {
	typ  featureType
	bit  uint8
	name string
}{
	{featureIncompatible, 0, "dirty bit"},
	{featureIncompatible, 1, "corrupt bit"},
	{featureIncompatible, 2, "external data file"},
	{featureIncompatible, 3, "compression type"},
	{featureIncompatible, 4, "extended L2 entries"},
	{featureCompatible, 0, "lazy refcounts"},
	{featureAutoclear, 0, "bitmaps"},
	{featureAutoclear, 1, "raw external data"},
}

// encodeFeatureNames returns the data of the feature name table of a new image.
func encodeFeatureNames() []byte {
	p := make([]byte, len(featureNames)*featureRecordSize)
	for i, f := range featureNames {
		rec := p[i*featureRecordSize:]
		rec[0], rec[1] = byte(f.typ), f.bit
		copy(rec[2:featureRecordSize], f.name)
	}
	return p
}

// unknownFeatures returns the names of the bits of word that known lacks: from the image's own
// feature name table, and else by number, such as "incompatible feature 17".
func (h *header) unknownFeatures(typ featureType, word, known uint64) []string {
	word &^= known
	if word == 0 {
		return nil
	}
	kind := [...]string{"incompatible", "compatible", "autoclear"}[typ]
	var names []string
	for bit := range uint8(64) {
		if word>>bit&1 == 0 {
			continue
		}
		name := h.featureName(typ, bit)
		if name == "" {
			name = fmt.Sprintf("%s feature %d", kind, bit)
		}
		names = append(names, name)
	}
	return names
}

// featureName returns the name that the image's feature name table has for a feature, or "".
// qcow2 spec, "Feature name table".
func (h *header) featureName(typ featureType, bit uint8) string {
	for _, e := range h.extensions {
		if e.typ != extFeatureNames {
			continue
		}
		for p := e.data; len(p) >= featureRecordSize; p = p[featureRecordSize:] {
			if p[0] == byte(typ) && p[1] == bit {
				return cString(p[2:featureRecordSize])
			}
		}
	}
	return ""
}

// unknownIncompatible returns the names of the incompatible features that we do not know.
func (h *header) unknownIncompatible() []string {
	return h.unknownFeatures(featureIncompatible, h.incompatible, incompatKnown)
}

// encode returns the content of the header's cluster up to the end of the backing file name. It keeps
// the order of the extensions and what is unknown (I9), and the place of the backing name while there
// is room before it; of a header that was read and not changed it gives the bytes that were read, but
// for bytes that the format gives no meaning. Where there is no room, the feature name table is left
// out; ErrHeaderFull if there is still none.
func (h *header) encode() ([]byte, error) {
	exts := h.currentExtensions()
	for {
		b, need := h.layout(exts)
		if b != nil {
			return b, nil
		}
		i := slices.IndexFunc(exts, func(e headerExtension) bool { return e.typ == extFeatureNames })
		if i < 0 {
			return nil, fmt.Errorf("%w: %d bytes in a cluster of %d", ErrHeaderFull, need, h.clusterSize())
		}
		exts = slices.Delete(exts, i, i+1)
	}
}

// currentExtensions returns the extensions as they are to be written: those that were read, in their
// order, with the present values of the ones that have fields of their own; those that are new come
// first. Of several of such a type one stays.
func (h *header) currentExtensions() []headerExtension {
	type known struct {
		typ  uint32
		same func(data []byte) bool // whether data says what the header's field says
		data []byte                 // the field's value; nil: no such extension
	}
	named := func(typ uint32, value string) known {
		k := known{typ: typ, same: func(data []byte) bool { return cString(data) == value }}
		if value != "" {
			k.data = []byte(value)
		}
		return k
	}
	owned := []known{
		named(extBackingFormat, h.backingFormat),
		named(extDataFile, h.dataFileName),
	}
	if h.bitmaps != nil {
		data := h.bitmaps.encode()
		owned = append(owned, known{extBitmaps, func(old []byte) bool { return bytes.Equal(old, data) }, data})
	}

	exts := make([]headerExtension, 0, len(h.extensions)+len(owned))
	for _, k := range owned {
		// The last one of a type is the one that was decoded.
		if k.data != nil && !slices.ContainsFunc(h.extensions, func(e headerExtension) bool { return e.typ == k.typ }) {
			exts = append(exts, headerExtension{k.typ, k.data})
		}
	}
	last := make(map[uint32]int, len(owned))
	for i, e := range h.extensions {
		last[e.typ] = i
	}
	for i, e := range h.extensions {
		j := slices.IndexFunc(owned, func(k known) bool { return k.typ == e.typ })
		switch {
		case j < 0:
			exts = append(exts, e)
		case last[e.typ] != i:
		case owned[j].same(e.data):
			exts = append(exts, e)
		case owned[j].data != nil:
			exts = append(exts, headerExtension{e.typ, owned[j].data})
		}
	}
	return exts
}

// sortExtensions puts the extensions into the order that lets a later change of the ones we know stay
// inside the first sector (I3): those first, then the unknown ones in their order, then the feature
// name table. New headers are written so; one that was read keeps its order until it is rewritten for
// such a change.
func (h *header) sortExtensions() {
	rank := func(e headerExtension) int {
		switch e.typ {
		case extBackingFormat:
			return 0
		case extDataFile:
			return 1
		case extBitmaps:
			return 2
		case extCryptoHeader:
			return 3
		case extFeatureNames:
			return 5
		}
		return 4
	}
	slices.SortStableFunc(h.extensions, func(a, b headerExtension) int { return rank(a) - rank(b) })
}

// layout lays out the header with the given extensions. Without room it returns nil and the number of
// bytes that were needed.
func (h *header) layout(exts []headerExtension) (b []byte, need int) {
	size := int(h.clusterSize())
	b = h.encodeFixed()
	end := len(b) // of the extensions, without the padding of the last one
	for _, e := range exts {
		b = binary.BigEndian.AppendUint32(b, e.typ)
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.data)))
		b = append(b, e.data...)
		end = len(b)
		b = append(b, make([]byte, -len(e.data)&7)...)
	}
	// END, and the padding before it, may be missing where the area of the extensions ends anyway.
	fits := func(area int) bool { return end <= area && (len(b) >= area || area-len(b) >= extHeaderSize) }

	name := []byte(h.backingName)
	if cString(h.backingNameRaw) == h.backingName {
		name = h.backingNameRaw
	}
	backingOff, backingSize := uint64(0), uint32(len(name))
	switch off := h.backingOff; {
	case len(name) == 0 && off == 0:
		backingSize = h.backingSize // undefined without a backing file
	case len(name) == 0 && h.backingSize != 0:
		// The name was removed.
	case off != 0 && off <= uint64(size) && len(name) <= size-int(off) && fits(int(off)):
		backingOff = off
	case len(name) > 0:
		backingOff = uint64(len(b) + extHeaderSize)
	}
	need = len(b) + extHeaderSize + len(name)
	switch {
	case backingOff != 0:
		if backingOff > uint64(size) || len(name) > size-int(backingOff) {
			return nil, need
		}
		b = append(b[:min(len(b), int(backingOff))], make([]byte, max(int(backingOff)-len(b), 0))...)
		b = append(b, name...)
	case !fits(size):
		return nil, need
	default:
		b = append(b, make([]byte, extHeaderSize)...)
		b = b[:min(len(b), size)]
	}
	binary.BigEndian.PutUint64(b[fieldBackingOff:], backingOff)
	binary.BigEndian.PutUint32(b[fieldBackingSize:], backingSize)
	return b, need
}

// encodeFixed returns the fixed fields and the unknown ones behind them; offset and size of the backing
// name are left zero.
func (h *header) encodeFixed() []byte {
	n := max(int(h.headerLength), headerLengthMin)
	if h.version < 3 {
		n = headerLengthV2
	} else if n <= fieldCompression && h.compression != CompressionDeflate {
		n = headerLengthV3
	}
	b := make([]byte, n, n+512)
	be := binary.BigEndian
	be.PutUint32(b[fieldMagic:], headerMagic)
	be.PutUint32(b[fieldVersion:], h.version)
	be.PutUint32(b[fieldClusterBits:], h.clusterBits)
	be.PutUint64(b[fieldSize:], h.size)
	be.PutUint32(b[fieldCryptMethod:], h.cryptMethod)
	be.PutUint32(b[fieldL1Size:], h.l1Size)
	be.PutUint64(b[fieldL1Off:], h.l1Off)
	be.PutUint64(b[fieldRefTableOff:], h.refTableOff)
	be.PutUint32(b[fieldRefTableClusters:], h.refTableClusters)
	be.PutUint32(b[fieldNbSnapshots:], h.nbSnapshots)
	be.PutUint64(b[fieldSnapshotsOff:], h.snapshotsOff)
	if h.version < 3 {
		return b
	}
	be.PutUint64(b[fieldIncompatible:], h.incompatible)
	be.PutUint64(b[fieldCompatible:], h.compatible)
	be.PutUint64(b[fieldAutoclear:], h.autoclear)
	be.PutUint32(b[fieldRefcountOrder:], h.refcountOrder)
	be.PutUint32(b[fieldHeaderLength:], uint32(n))
	if n > fieldCompression {
		b[fieldCompression] = byte(h.compression)
		copy(b[fieldPadding:min(n, headerLengthV3)], h.padding)
	}
	if n > headerLengthV3 {
		copy(b[headerLengthV3:], h.unknownFields)
	}
	return b
}

// The functions below give the small updates of the header in place: host offset and bytes, which lie
// inside one sector, so that a crash leaves the old or the new value (I3).

// encodeSizeField returns the update of the virtual size.
func encodeSizeField(size uint64) (off int64, b []byte) {
	return fieldSize, binary.BigEndian.AppendUint64(nil, size)
}

// encodeL1Fields returns the update that switches to an L1 table of l1Size entries at l1Off.
func encodeL1Fields(l1Size uint32, l1Off uint64) (off int64, b []byte) {
	b = binary.BigEndian.AppendUint32(nil, l1Size)
	return fieldL1Size, binary.BigEndian.AppendUint64(b, l1Off)
}

// encodeSizeAndL1 returns the update that makes the disk size bytes large and switches to an L1 table of l1Size
// entries at l1Off; what lies between the fields is kept.
func (h *header) encodeSizeAndL1(size uint64, l1Size uint32, l1Off uint64) (off int64, b []byte) {
	b = binary.BigEndian.AppendUint64(nil, size)
	b = binary.BigEndian.AppendUint32(b, h.cryptMethod)
	b = binary.BigEndian.AppendUint32(b, l1Size)
	return fieldSize, binary.BigEndian.AppendUint64(b, l1Off)
}

// encodeRefcountTableFields returns the update that switches to a refcount table of the given clusters
// at refTableOff.
func encodeRefcountTableFields(refTableOff uint64, clusters uint32) (off int64, b []byte) {
	b = binary.BigEndian.AppendUint64(nil, refTableOff)
	return fieldRefTableOff, binary.BigEndian.AppendUint32(b, clusters)
}

// encodeSnapshotFields returns the update that switches to a table of n snapshots at snapshotsOff.
func encodeSnapshotFields(n uint32, snapshotsOff uint64) (off int64, b []byte) {
	b = binary.BigEndian.AppendUint32(nil, n)
	return fieldNbSnapshots, binary.BigEndian.AppendUint64(b, snapshotsOff)
}

// encodeIncompatibleField returns the update of the incompatible features. Version 2 has none, and
// other bytes in their place: there is nothing to write, and b is nil.
func (h *header) encodeIncompatibleField(features uint64) (off int64, b []byte) {
	if h.version < 3 {
		return fieldIncompatible, nil
	}
	return fieldIncompatible, binary.BigEndian.AppendUint64(nil, features)
}

// encodeAutoclearField returns the update of the autoclear features; b is nil for version 2, as in
// encodeIncompatibleField.
func (h *header) encodeAutoclearField(features uint64) (off int64, b []byte) {
	if h.version < 3 {
		return fieldAutoclear, nil
	}
	return fieldAutoclear, binary.BigEndian.AppendUint64(nil, features)
}
