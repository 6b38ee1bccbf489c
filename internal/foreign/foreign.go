// Package foreign reads the metadata of image formats other than qcow2: QED, VHD and VDI. It checks their headers
// and tells where the content of a guest range lies; it reads no guest data, and opens no file.
//
// An image is untrusted. No table is read whole: what a lookup needs is read in pieces of 4 KiB, of which a
// bounded number stays in memory, so that what a header claims costs nothing. Every field that a lookup relies on
// is checked when the image is opened, against the format and the size of the file; every entry of a table when it
// is looked up.
package foreign

import (
	"errors"
	"fmt"
	"io"
	"math"
)

// Format is an image format, by the name that QEMU has for it.
type Format string

const (
	QED Format = "qed" // QEMU enhanced disk
	VHD Format = "vpc" // virtual hard disk, of Virtual PC and Hyper-V; not VHDX
	VDI Format = "vdi" // virtual disk image, of VirtualBox
)

// Classes of a FieldError.
var (
	ErrWrongFormat = errors.New("not an image of this format") // the magic is another
	ErrCorrupt     = errors.New("against the format")
	ErrUnsupported = errors.New("unsupported")
	ErrSizeLimit   = errors.New("beyond the limit for the size of the disk") // Limits.VirtualSize
)

// FieldError is a field of a header whose value is not allowed.
type FieldError struct {
	Field string // the field's name in the format's specification
	Value any    // what stands there
	Bound string // what would be allowed
	Class error  // one of the above
}

func (e *FieldError) Error() string {
	return fmt.Sprintf("header field %s is %v, want %s: %v", e.Field, e.Value, e.Bound, e.Class)
}

// Unwrap returns the class.
func (e *FieldError) Unwrap() error { return e.Class }

// fieldErr returns a FieldError.
func fieldErr(field string, value any, class error, bound string, args ...any) *FieldError {
	return &FieldError{Field: field, Value: value, Bound: fmt.Sprintf(bound, args...), Class: class}
}

// EntryError is an entry of a table that breaks the format.
type EntryError struct {
	What     string // the entry, and the rule that it breaks
	HostOff  int64  // host offset of the entry in bytes
	GuestOff int64  // guest offset in bytes that was looked up
}

func (e *EntryError) Error() string {
	return fmt.Sprintf("%s at host %#x for guest %#x", e.What, e.HostOff, e.GuestOff)
}

// Limits bounds what an image may ask for.
type Limits struct {
	TableBytes  int64 // memory for pieces of tables, in bytes; at least one piece is kept
	VirtualSize int64 // size of the disk in bytes; 0: what fits an int64
}

// Kind says what a guest range is.
type Kind uint8

const (
	Unallocated Kind = iota // not in the image, which may have a backing file: QED alone
	Zero                    // zeros
	Data                    // stored in the file
)

// Run is a guest range of one kind.
type Run struct {
	Kind    Kind
	Len     int64 // in bytes
	HostOff int64 // host offset in bytes where it is stored, of Data
}

// Info is what a header tells. Names come from the image, and hold any byte but NUL.
type Info struct {
	Format      Format
	Subformat   string // "fixed" or "dynamic" of VHD, "static" or "dynamic" of VDI, "" of QED
	Size        int64  // of the disk in bytes, a multiple of 512
	BlockSize   int64  // unit of allocation in bytes; 0 if the disk is stored in one piece
	BackingFile string // "" without one
	BackingRaw  bool   // the backing file is raw; otherwise the image does not tell its format
	NeedsCheck  bool   // QED: the image was not closed, and its tables may name clusters past the end of the file
	Creator     string // VHD: creator_app, without trailing NULs and spaces
	// Whole tells that all of the disk has its place in the file from the start, whether it was written or not, so
	// that the holes of the file are those of the disk.
	Whole bool
}

// Image is the metadata of an image. It is safe for concurrent use.
type Image struct {
	Info
	m mapper
}

// mapper finds guest ranges in the file.
type mapper interface {
	// lookup returns the state of the guest range at off, of n bytes at most and at least one. The range lies
	// within the disk, and n is not 0.
	lookup(off, n int64) (Run, error)
}

// Open reads and checks the header of an image in a file of size bytes.
//
// Errors: *FieldError, and those of r.
func Open(r io.ReaderAt, size int64, f Format, limits Limits) (*Image, error) {
	open, ok := map[Format]func(*file, Limits) (*Image, error){QED: openQED, VHD: openVHD, VDI: openVDI}[f]
	if !ok {
		return nil, fieldErr("format", string(f), ErrUnsupported, "qed, vpc or vdi")
	}
	img, err := open(&file{r: r, size: max(size, 0)}, limits)
	if err != nil {
		return nil, err
	}
	img.Format = f
	return img, nil
}

// Lookup returns the state of the guest range at off, of at most n bytes. The range must lie within the disk, and n
// must not be 0. It allocates nothing but for what it must read.
//
// Errors: *EntryError, and those of the file.
func (img *Image) Lookup(off, n int64) (Run, error) { return img.m.lookup(off, n) }

// Detect returns the format that the file's magic tells, or "" if none does. A VHD of fixed size has its magic at the
// end of the file alone, where it must have a right checksum. Whoever wrote the content of a raw disk can make it
// look like any of them.
func Detect(r io.ReaderAt, size int64) (Format, error) {
	f := &file{r: r, size: max(size, 0)}
	head, err := f.headerAt(0, vdiHeaderSize)
	if err != nil {
		return "", err
	}
	switch {
	case le.Uint32(head[qedMagicAt:]) == qedMagic:
		return QED, nil
	case le.Uint32(head[vdiSignatureAt:]) == vdiSignature:
		return VDI, nil
	case string(head[:len(vhdCookie)]) == vhdCookie:
		return VHD, nil
	}
	if f.size < vhdFooterSize {
		return "", nil
	}
	tail, err := f.headerAt(f.size-vhdFooterSize, vhdFooterSize)
	if err == nil && vhdFooter(tail).sound() {
		return VHD, nil
	}
	return "", err
}

// sector is the unit of a disk's size in bytes.
const sector = 512

// checkSize checks the size of a disk in bytes, as the named field claims it.
func checkSize(field string, size uint64, limits Limits) error {
	if most := uint64(math.MaxInt64 &^ (sector - 1)); size > most {
		return fieldErr(field, size, ErrUnsupported, "at most %#x", most)
	}
	if most := limits.VirtualSize; most > 0 && size > uint64(most) {
		return fieldErr(field, size, ErrSizeLimit, "at most %#x", most)
	}
	return nil
}
