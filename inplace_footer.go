package qcow2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math"
)

// InPlaceState is what an interrupted ConvertInPlace has left of a file.
type InPlaceState int

const (
	InPlaceNone        InPlaceState = iota // there is no footer: never begun, rolled back or finished
	InPlaceOtherLength                     // the footer tells another length than the one that was expected
	InPlaceIncomplete                      // the source, with tables behind it that are not complete
	InPlaceComplete                        // the source, with complete tables behind it
	InPlaceSwitched                        // the qcow2 image, with the footer behind it
	InPlaceChanged                         // a qcow2 image that was changed since, or never was what the footer tells
)

// String returns the state in words.
func (s InPlaceState) String() string {
	switch s {
	case InPlaceNone:
		return "no footer"
	case InPlaceOtherLength:
		return "footer of a source of another length"
	case InPlaceIncomplete:
		return "source with tables that are not complete"
	case InPlaceComplete:
		return "source with complete tables"
	case InPlaceSwitched:
		return "qcow2 image with the footer behind it"
	case InPlaceChanged:
		return "qcow2 image that is not what the footer tells"
	}
	return fmt.Sprintf("InPlaceState(%d)", int(s))
}

// InPlaceError says what was found where an interrupted conversion was looked for, or not expected. It Is ErrInPlace.
type InPlaceError struct {
	Found    InPlaceState
	Length   int64 // of the source in bytes, as the footer tells: untrusted; -1 without a footer
	Expected int64 // what the caller expects of it, or -1
}

func (e *InPlaceError) Error() string {
	s := "found: " + e.Found.String()
	switch {
	case e.Length < 0:
		return s
	case e.Expected < 0:
		return fmt.Sprintf("%s, of a source of %d bytes: use ResumeInPlace or RollbackInPlace", s, e.Length)
	}
	return fmt.Sprintf("%s, of a source of %d bytes, where %d were expected", s, e.Length, e.Expected)
}

// Is reports whether target is ErrInPlace.
func (e *InPlaceError) Is(target error) bool { return target == ErrInPlace }

// newInPlaceError returns the error for a file that was found with the footer f, or nil for none.
func newInPlaceError(found InPlaceState, f *inPlaceFooter, expected int64) *InPlaceError {
	e := &InPlaceError{Found: found, Length: noOffset, Expected: expected}
	if f != nil {
		e.Length = int64(min(f.length, math.MaxInt64))
	}
	return e
}

// InspectInPlace tells what an interrupted ConvertInPlace has left of s, whose source had originalLength bytes. It
// changes nothing, takes no lock, and reads all of the new tables. A guest could have written a footer at the end of a
// raw disk; it names the length of that disk then, or another one than is expected.
//
// Errors are that of ctx, and those of s.
func InspectInPlace(ctx context.Context, s Storage, originalLength int64) (InPlaceState, error) {
	found, _, err := inspectInPlace(ctx, s, originalLength)
	if err != nil {
		return found, fmt.Errorf("qcow2: inspect conversion in place: %w", err)
	}
	return found, nil
}

// The footer is one sector: a table of its fields by offset and size in bytes, big-endian.
const (
	footerMagicField  = 0   // 16: footerMagic
	footerVersion     = 16  // 4: 1
	footerClusterBits = 20  // 4
	footerLength      = 24  // 8: length of the source
	footerTables      = 32  // 8: host offset of the tables, and of the refcount table, their first
	footerOff         = 40  // 8: host offset of the footer, and the end of the tables
	footerTrailer     = 48  // 8: bytes of the copy of the source's trailer that follows: 0 or 512
	footerTablesSum   = 64  // 32: SHA-256 of the tables
	footerHeaderSum   = 96  // 32: SHA-256 of the first sector of the image
	footerSourceSum   = 128 // 32: SHA-256 of the first sector of the source, filled up with zeros
	footerSum         = 480 // 32: SHA-256 of everything before
	footerMagic       = "qcow2 in place\r\n"
)

// inPlaceFooter is the decoded footer. It is comparable: equal footers are those of equal conversions.
type inPlaceFooter struct {
	clusterBits uint32
	length      uint64 // of the source in bytes
	tables      uint64 // host offset of the tables, cluster-aligned
	off         uint64 // host offset of the footer, cluster-aligned
	trailer     uint64 // 0 or 512
	tablesSum   [sha256.Size]byte
	headerSum   [sha256.Size]byte
	sourceSum   [sha256.Size]byte
}

// clusterSize returns the size of a cluster in bytes.
func (f *inPlaceFooter) clusterSize() uint64 { return 1 << f.clusterBits }

// encode returns the footer's sector.
func (f *inPlaceFooter) encode() []byte {
	b := make([]byte, sectorSize)
	copy(b, footerMagic)
	be := binary.BigEndian
	be.PutUint32(b[footerVersion:], 1)
	be.PutUint32(b[footerClusterBits:], f.clusterBits)
	be.PutUint64(b[footerLength:], f.length)
	be.PutUint64(b[footerTables:], f.tables)
	be.PutUint64(b[footerOff:], f.off)
	be.PutUint64(b[footerTrailer:], f.trailer)
	copy(b[footerTablesSum:], f.tablesSum[:])
	copy(b[footerHeaderSum:], f.headerSum[:])
	copy(b[footerSourceSum:], f.sourceSum[:])
	sum := sha256.Sum256(b[:footerSum])
	copy(b[footerSum:], sum[:])
	return b
}

// decodeFooter returns the footer in the sector b at host offset off of a file of size bytes, or nil if there is none:
// a footer fits its place, and is what encode makes of it.
func decodeFooter(b []byte, off, size uint64) *inPlaceFooter {
	if !hasFooterMagic(b) {
		return nil
	}
	be := binary.BigEndian
	f := &inPlaceFooter{
		clusterBits: be.Uint32(b[footerClusterBits:]),
		length:      be.Uint64(b[footerLength:]),
		tables:      be.Uint64(b[footerTables:]),
		off:         be.Uint64(b[footerOff:]),
		trailer:     be.Uint64(b[footerTrailer:]),
		tablesSum:   [sha256.Size]byte(b[footerTablesSum:]),
		headerSum:   [sha256.Size]byte(b[footerHeaderSum:]),
		sourceSum:   [sha256.Size]byte(b[footerSourceSum:]),
	}
	if f.clusterBits < minClusterBits || f.clusterBits > maxClusterBits || string(f.encode()) != string(b) {
		return nil
	}
	inCluster := f.clusterSize() - 1
	switch {
	case f.off != off || f.off&inCluster != 0 || f.trailer != 0 && f.trailer != sectorSize:
	case size != off+sectorSize && size != off+sectorSize+f.trailer:
	case f.tables&inCluster != 0 || f.tables < f.clusterSize() || f.tables >= f.off || f.length > f.tables:
	default:
		return f
	}
	return nil
}

// hasFooterMagic reports whether a sector begins as a footer does.
func hasFooterMagic(b []byte) bool { return string(b[:len(footerMagic)]) == footerMagic }

// findFooter returns the footer of a file of size bytes, or nil if there is none. It is the last sector, or the last
// but one, before the copy of a trailer.
func findFooter(s Storage, size uint64) (*inPlaceFooter, error) {
	b := make([]byte, sectorSize)
	for n := uint64(1); n <= 2 && n*sectorSize < size; n++ {
		off := size - n*sectorSize
		if err := (&hostFile{s: s}).readFull(b, off); err != nil {
			return nil, fmt.Errorf("footer: %w", err)
		}
		if f := decodeFooter(b, off, size); f != nil {
			return f, nil
		}
	}
	return nil, nil
}

// inspectInPlace is InspectInPlace, and returns the footer too, or nil without one.
//
// Which of source and image the first sector is, is told by its digest; one that is neither is the source, written to
// in between, unless it has the magic of an image.
func inspectInPlace(ctx context.Context, s Storage, length int64) (InPlaceState, *inPlaceFooter, error) {
	size, err := s.Size()
	if err != nil {
		return InPlaceNone, nil, err
	}
	f, err := findFooter(s, uint64(size))
	if err != nil || f == nil {
		return InPlaceNone, nil, err
	}
	if length < 0 || f.length != uint64(length) {
		return InPlaceOtherLength, f, nil
	}
	first := make([]byte, sectorSize)
	if err := (&hostFile{s: s}).readFull(first, 0); err != nil {
		return InPlaceNone, nil, err
	}
	switch sum := sha256.Sum256(first); {
	case sum == f.headerSum:
		if ok, err := f.isBehind(s, first, uint64(size)); err != nil {
			return InPlaceNone, nil, err
		} else if ok {
			return InPlaceSwitched, f, nil
		}
		return InPlaceChanged, f, nil
	case sum != f.sourceSum && hasMagic(first):
		return InPlaceChanged, f, nil
	}
	sum, err := f.sumTables(ctx, s)
	if err != nil {
		return InPlaceNone, nil, err
	}
	if sum != f.tablesSum {
		return InPlaceIncomplete, f, nil
	}
	return InPlaceComplete, f, nil
}

// describes reports whether first, the first sector of a file, is the header of an image whose tables begin where the
// footer tells.
func (f *inPlaceFooter) describes(first []byte) bool {
	be := binary.BigEndian
	return hasMagic(first) && be.Uint32(first[fieldClusterBits:]) == f.clusterBits && be.Uint64(first[fieldRefTableOff:]) == f.tables
}

// isBehind reports whether the file s, of size bytes, is an image with first as its first sector, as a conversion makes
// it, which uses nothing from the footer on. A guest of an image may write a footer to its disk, with the digest of the
// header, and what stands from there on is its data then, or even a table.
func (f *inPlaceFooter) isBehind(s Storage, first []byte, size uint64) (bool, error) {
	if !f.describes(first) {
		return false, nil
	}
	h, err := readHeader(bytes.NewReader(first), sectorSize)
	if err != nil || h.validate(Limits{}) != nil || h.incompatible&^incompatCompression != 0 || h.nbSnapshots > 0 {
		return false, nil
	}
	g, host := h.geometry(), &hostFile{s: s}
	for ci := f.off >> g.clusterBits; ci < g.clusters(size); ci++ {
		if n, err := hostRefcount(host, h, &g, ci, size); err != nil || n != 0 {
			return false, err
		}
	}
	return true, nil
}

// hostRefcount returns the refcount of a cluster as it stands in the file of an image, which has size bytes. What no
// block in the file describes is 0. Precondition: h is valid.
func hostRefcount(host *hostFile, h *header, g *geometry, clusterIndex, size uint64) (uint64, error) {
	index := clusterIndex >> g.refBlockBits
	if index >= uint64(h.refTableClusters)<<g.clusterBits/8 {
		return 0, nil
	}
	var word [8]byte
	if err := host.readFull(word[:], h.refTableOff+8*index); err != nil {
		return 0, err
	}
	block := binary.BigEndian.Uint64(word[:]) &^ refTableReserved
	if block == 0 || block >= size {
		return 0, nil
	}
	perWord := uint64(64) >> g.refcountOrder
	i := clusterIndex & (g.perBlock() - 1)
	if err := host.readFull(word[:], block+8*(i/perWord)); err != nil {
		return 0, err
	}
	return refcountAt(word[:], g.refcountOrder, i%perWord), nil
}

// hasMagic reports whether a file that begins with b claims to be a qcow2 image.
func hasMagic(b []byte) bool { return binary.BigEndian.Uint32(b) == headerMagic }

// sumTables returns the SHA-256 of the tables as they are in s.
func (f *inPlaceFooter) sumTables(ctx context.Context, s Storage) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	buf := getBuffer(readPiece)
	defer putBuffer(buf)
	host := &hostFile{s: s}
	for off := f.tables; off < f.off; {
		if err := ctx.Err(); err != nil {
			return sum, err
		}
		p := (*buf)[:min(f.off-off, uint64(len(*buf)))]
		if err := host.readFull(p, off); err != nil {
			return sum, err
		}
		h.Write(p)
		off += uint64(len(p))
	}
	h.Sum(sum[:0])
	return sum, nil
}

// sourceView is the source in a file that has grown behind it.
type sourceView struct {
	BaseStorage
	s      Storage
	length int64 // in bytes
}

// NewSourceView returns a read-only Storage of the first originalLength bytes of s: the source of an interrupted
// ConvertInPlace, for ResumeInPlace to have its layout opened over. s stays the caller's; it is not locked.
func NewSourceView(s Storage, originalLength int64) Storage {
	return &sourceView{s: s, length: max(originalLength, 0)}
}

// ReadAt implements Storage.
func (v *sourceView) ReadAt(p []byte, off int64) (int, error) {
	return io.NewSectionReader(v.s, 0, v.length).ReadAt(p, off)
}

// Size implements Storage.
func (v *sourceView) Size() (int64, error) {
	size, err := v.s.Size()
	return min(size, v.length), err
}

// NextData implements Storage.
func (v *sourceView) NextData(off int64) (start, end int64, err error) {
	start, end, err = v.s.NextData(off)
	if err == nil && start >= v.length {
		return 0, 0, io.EOF
	}
	return start, min(end, v.length), err
}

// Identity implements Storage.
func (v *sourceView) Identity() any { return v.s.Identity() }
