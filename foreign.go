package qcow2

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"sync/atomic"

	"github.com/go-qcow2/qcow2/internal/foreign"
)

// ForeignFormat is an image format other than qcow2 that is read, by the name that QEMU has for it. It is never guessed
// from the content: see DetectForeign.
type ForeignFormat string

const (
	// ForeignQED is QED, the QEMU enhanced disk, with its backing files.
	ForeignQED ForeignFormat = "qed"
	// ForeignVHD is VHD, the virtual hard disk of Virtual PC and Hyper-V, fixed and dynamic; QEMU calls it vpc. It is
	// not VHDX.
	ForeignVHD ForeignFormat = "vpc"
	// ForeignVDI is VDI, the virtual disk image of VirtualBox, static and dynamic.
	ForeignVDI ForeignFormat = "vdi"
)

// known reports whether f is one of the formats.
func (f ForeignFormat) known() bool { return f == ForeignQED || f == ForeignVHD || f == ForeignVDI }

// ForeignInfo says what the header of an image of a foreign format tells. Names come from the image: they are
// untrusted, and may hold any byte but NUL.
type ForeignInfo struct {
	// Format is the format of the image.
	Format ForeignFormat
	// Subformat is "fixed" or "dynamic" for VHD, "static" or "dynamic" for VDI, and "" for QED.
	Subformat string
	// VirtualSize is the size of the disk in bytes, a multiple of 512.
	VirtualSize int64
	// FileSize is the size in bytes of the file or storage that was read.
	FileSize int64
	// BlockSize is the unit of allocation in bytes: QED's clusters, the blocks of a VDI or a dynamic VHD. 0 for a fixed
	// VHD, which is stored in one piece.
	BlockSize int64
	// BackingFile is the name of the backing file of a QED image, or "". BackingFormat is "raw", or "" if the image
	// does not tell, as most do not.
	BackingFile   string
	BackingFormat string
	// NeedsCheck tells that a QED image was not closed. It reads as it would after the repair that a writer owes it, by
	// which what its tables name past the end of the file becomes unallocated.
	NeedsCheck bool
	// Creator is the creator application of a VHD, of four letters at most, by which the size of the disk is
	// current_size or the geometry's.
	Creator string
	// Locked tells whether the image lock is held. InspectForeign takes none.
	Locked bool
}

// DetectForeign returns the format that the magic of a file of size bytes tells. It looks at the first 512 bytes and,
// for a fixed VHD, at the last 512, where it wants a right checksum. Whoever wrote the content of a raw disk can make
// it look like any format, and most of all like a fixed VHD: to open a file as what was detected is safe only as long
// as no other file that it names is opened.
//
// Errors: ErrWrongFormat if it is none, and those of r.
func DetectForeign(r io.ReaderAt, size int64) (ForeignFormat, error) {
	f, err := foreign.Detect(r, size)
	if err == nil && f == "" {
		err = ErrWrongFormat
	}
	if err != nil {
		return "", fmt.Errorf("qcow2: detect a foreign format: %w", err)
	}
	return ForeignFormat(f), nil
}

// InspectForeign tells what an image is from its header, and opens no other file. limits may be nil. A header that
// breaks the format is a *HeaderError, as in OpenForeign. size is the size of the file in bytes.
func InspectForeign(r io.ReaderAt, size int64, format ForeignFormat, limits *Limits) (*ForeignInfo, error) {
	img, err := readForeign(r, size, format, limits.withDefaults())
	if err != nil {
		return nil, fmt.Errorf("qcow2: inspect %s: %w", format, err)
	}
	info := foreignInfo(img, size)
	return &info, nil
}

// foreignInfo returns what the header of img tells, in a file of size bytes.
func foreignInfo(img *foreign.Image, size int64) ForeignInfo {
	info := ForeignInfo{
		Format:      ForeignFormat(img.Format),
		Subformat:   img.Subformat,
		VirtualSize: img.Size,
		FileSize:    size,
		BlockSize:   img.BlockSize,
		BackingFile: img.BackingFile,
		NeedsCheck:  img.NeedsCheck,
		Creator:     img.Creator,
	}
	if img.BackingRaw {
		info.BackingFormat = "raw"
	}
	return info
}

// readForeign reads and checks the header of an image. Limits have their defaults.
func readForeign(r io.ReaderAt, size int64, format ForeignFormat, limits Limits) (*foreign.Image, error) {
	if !format.known() {
		return nil, &OptionError{Option: "format", Value: string(format), Reason: "must be qed, vpc or vdi"}
	}
	bounds := foreign.Limits{TableBytes: limits.MetadataBytes, VirtualSize: limits.VirtualSize}
	img, err := foreign.Open(r, size, foreign.Format(format), bounds)
	return img, foreignError(err, limits)
}

// foreignClasses are the classes of what is wrong with a header.
var foreignClasses = map[error]error{
	foreign.ErrWrongFormat: ErrWrongFormat,
	foreign.ErrCorrupt:     ErrCorrupt,
	foreign.ErrUnsupported: ErrUnsupported,
}

// foreignError returns err as the library has it: *HeaderError, *CorruptError, or as it is.
func foreignError(err error, limits Limits) error {
	if err == nil {
		return nil
	}
	var field *foreign.FieldError
	var entry *foreign.EntryError
	switch {
	case errors.As(err, &entry):
		return &CorruptError{What: entry.What, HostOff: entry.HostOff, GuestOff: entry.GuestOff}
	case !errors.As(err, &field):
		return err
	}
	class := foreignClasses[field.Class]
	if size, ok := field.Value.(uint64); ok && field.Class == foreign.ErrSizeLimit {
		class = &LimitError{Limit: "VirtualSize", Value: int64(size), Max: limits.VirtualSize}
	}
	return &HeaderError{Field: field.Field, Value: field.Value, Bound: field.Bound, Err: class}
}

// ForeignDisk is an open image of a foreign format, for reading. It is safe for concurrent use.
type ForeignDisk struct {
	img    *foreign.Image
	info   ForeignInfo // immutable after open
	limits Limits      // with defaults; immutable after open
	host   *hostFile   // the image file
	holes  *RawDisk    // the image file, where its holes are those of the disk; else nil
	below  backing     // immutable after open
	owns   bool        // whether it closes the image file
	reqs   *requests
	closed atomic.Bool
}

var (
	_ Disk      = (*ForeignDisk)(nil)
	_ io.Closer = (*ForeignDisk)(nil)
)

// OpenForeign opens the image of a foreign format in s for reading; s stays the caller's to close after the disk. Such
// an image can be converted from, in place where it is a Layout, and be the backing file of a qcow2 image.
//
// The size of a VHD is its current_size if its creator is one of those that mean it so (Hyper-V's "win ", QEMU's
// "qem2", Disk2vhd's "d2v ", Xen's "tap" and "CTXS"), or its geometry is the largest there is; otherwise it is what the
// geometry's cylinders, heads and sectors multiply to. QEMU decides in the same way.
//
// What a dynamic VHD has not written, by the bitmaps of its blocks, reads as zeros. QEMU does not look at them: it sets
// every bit of a block that it makes.
//
// A QED image may name a backing file, for which Resolver, Backing, BackingFormat, NoBacking and Limits count as in
// Open. It tells its format only if that is raw; otherwise BackingFormat is needed, because formats are never probed.
// Of the other options Name, Lock and L2CacheBytes (of qcow2 images below) count.
//
// Errors: *HeaderError of the class ErrWrongFormat, ErrCorrupt, ErrUnsupported (differencing VHD and VDI, which name a
// parent, among them) or ErrLimit; *OptionError for ReadWrite, CheckOnly, and a Backing for what has none; ErrLocked;
// those of a backing file as in OpenStorage; and those of the storage. After an error nothing is held.
func OpenForeign(s Storage, format ForeignFormat, opts *OpenOptions) (*ForeignDisk, error) {
	o := optionsOf(opts)
	d, err := openForeign(s, format, o, &chain{})
	switch {
	case err == nil:
		return d, nil
	case o.Name == "":
		return nil, fmt.Errorf("qcow2: open %s: %w", format, err)
	}
	return nil, fmt.Errorf("qcow2: open %s %s: %w", format, o.Name, err)
}

// openForeign opens an image of a foreign format in s. Below another one it closes s, after an error too.
func openForeign(s Storage, format ForeignFormat, o OpenOptions, c *chain) (*ForeignDisk, error) {
	d := &ForeignDisk{host: &hostFile{s: s}, owns: c.depth > 0, limits: *o.Limits, reqs: newRequests()}
	if err := d.open(format, o, c); err != nil {
		d.closed.Store(true)
		return nil, errors.Join(err, d.release())
	}
	return d, nil
}

// open fills in d. After an error release gives back what it took.
func (d *ForeignDisk) open(format ForeignFormat, o OpenOptions, c *chain) error {
	err := o.validate()
	for _, no := range []struct {
		option string
		set    bool
		reason string
	}{
		{"ReadWrite", o.ReadWrite, "the format is read only"},
		{"CheckOnly", o.CheckOnly, "the format is not checked"},
		{"Backing", o.Backing != nil && format != ForeignQED, "the format has no backing file"},
	} {
		if no.set {
			err = errors.Join(err, &OptionError{Option: no.option, Value: true, Reason: no.reason})
		}
	}
	if err != nil {
		return err
	}
	s := d.host.s
	if err := c.enter(s, o.Limits); err != nil {
		return err
	}
	if d.host.locked, err = lockStorage(s, lockRole(LockReader, LockWriter, o), o.Lock); err != nil {
		return err
	}
	size, err := s.Size()
	if err != nil {
		return err
	}
	if d.img, err = readForeign(s, size, format, *o.Limits); err != nil {
		return err
	}
	d.info = foreignInfo(d.img, size)
	d.info.Locked = d.host.locked
	if d.img.Whole {
		if d.holes, err = NewRawDisk(s); err != nil {
			return err
		}
	}
	switch {
	case o.Backing != nil && c.depth == 1:
		d.below = backing{disk: o.Backing}
	case d.info.BackingFile != "":
		d.below, err = openNamed(d.info.BackingFile, d.info.BackingFormat, o, c)
	}
	return err
}

// isForeign reports whether d is an image of a foreign format.
func isForeign(d Disk) bool {
	_, ok := d.(*ForeignDisk)
	return ok
}

// Size returns the size of the disk in bytes, a multiple of 512.
func (d *ForeignDisk) Size() int64 { return d.img.Size }

// Info describes the image as it was when it was opened.
func (d *ForeignDisk) Info() ForeignInfo { return d.info }

// Backing returns the disk below a QED image, or nil.
func (d *ForeignDisk) Backing() Disk { return d.below.disk }

// ReadAt is io.ReaderAt. It returns a nil error whenever it filled p, and io.EOF only when the end of the disk kept it
// from that.
//
// Errors: ErrCorrupt for a range whose entries are malformed (other ranges still read), ErrBackingRequired for what a
// backing file holds that was not opened, ErrRange for a negative offset, io.ErrUnexpectedEOF if the file became
// shorter since it was opened, fs.ErrClosed, and those of the storage.
func (d *ForeignDisk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.readAt(p, off)
	if err != nil && err != io.EOF {
		err = opError("read", off, len(p), err)
	}
	return n, err
}

// readAt is ReadAt without the words around the error.
func (d *ForeignDisk) readAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, ErrRange
	}
	s := d.reqs.enter()
	defer d.reqs.leave(s)
	if d.closed.Load() {
		return 0, fs.ErrClosed
	}
	var eof error
	if left := d.img.Size - off; left < int64(len(p)) && len(p) > 0 {
		p, eof = p[:max(left, 0)], io.EOF
	}
	for done := 0; done < len(p); {
		r, err := d.img.Lookup(off+int64(done), int64(len(p)-done))
		if err != nil {
			return done, foreignError(err, d.limits)
		}
		part := p[done:][:r.Len]
		switch r.Kind {
		case foreign.Data:
			err = d.readHost(part, r.HostOff)
		case foreign.Unallocated:
			err = d.below.read(part, uint64(off)+uint64(done))
		default:
			clear(part)
		}
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	return len(p), eof
}

// readHost reads p at the host offset off. All of it was in the file when that was opened.
func (d *ForeignDisk) readHost(p []byte, off int64) error {
	n, err := d.host.s.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at host %#x: %w", len(p), off, err)
}

// Extents yields the allocation state of the guest range [off, off+n), cut to the disk, through the whole chain, in
// runs as long as they are. HostOff is where data is stored, and -1 for all else. What a VHD or VDI has not allocated
// is ExtentZero, since nothing can lie below it; of a QED image it is the backing file's, or ExtentUnallocated. Where
// all of the disk has its place in the file, as in a fixed VHD and a static VDI, holes of the file are ExtentZero, as
// far as the storage tells them.
//
// A damaged image may name one host range for several guest ranges.
//
// Errors: as ReadAt. An error ends the iteration.
func (d *ForeignDisk) Extents(off, n int64) iter.Seq2[Extent, error] {
	return joinExtents(d.extents(off, n), func(err error) error { return opError("extents of", off, int(n), err) })
}

// extents is Extents in runs that may be too short.
func (d *ForeignDisk) extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if off < 0 || n < 0 {
			yield(Extent{}, ErrRange)
			return
		}
		end := d.img.Size
		if off < end && n < end-off {
			end = off + n
		}
		for off < end {
			r, err := d.mapped(off, end-off)
			if err != nil {
				yield(Extent{}, err)
				return
			}
			e := Extent{Off: off, Len: r.Len, Kind: ExtentZero, HostOff: -1}
			off += r.Len
			more := false
			switch r.Kind {
			case foreign.Data:
				e.Kind, e.HostOff = ExtentData, r.HostOff
				more, err = d.dataExtents(e, yield)
			case foreign.Unallocated:
				e.Kind = ExtentUnallocated
				more, err = d.below.extents(&e, yield)
			default:
				more = yield(e, nil)
			}
			if err != nil {
				yield(Extent{}, err)
			}
			if err != nil || !more {
				return
			}
		}
	}
}

// mapped is the lookup of a range as a request of its own.
func (d *ForeignDisk) mapped(off, n int64) (foreign.Run, error) {
	s := d.reqs.enter()
	defer d.reqs.leave(s)
	if d.closed.Load() {
		return foreign.Run{}, fs.ErrClosed
	}
	r, err := d.img.Lookup(off, n)
	return r, foreignError(err, d.limits)
}

// dataExtents yields e, which is data, without the holes of the file where those count. more reports whether to go on.
func (d *ForeignDisk) dataExtents(e Extent, yield func(Extent, error) bool) (more bool, err error) {
	if d.holes == nil {
		return yield(e, nil), nil
	}
	for x, err := range d.holes.Extents(e.HostOff, e.Len) {
		if err != nil {
			return false, err
		}
		x.Off += e.Off - e.HostOff
		if x.Kind != ExtentData {
			x.HostOff = -1
		}
		if !yield(x, nil) {
			return false, nil
		}
	}
	return true, nil
}

// Close waits for reads in flight and gives back what the disk holds: the lock of its storage, and the files below it
// that the library opened. A second Close is fs.ErrClosed.
func (d *ForeignDisk) Close() error {
	if d.closed.Swap(true) {
		return fmt.Errorf("qcow2: close: %w", fs.ErrClosed)
	}
	d.reqs.drain()
	if err := d.release(); err != nil {
		return fmt.Errorf("qcow2: close: %w", err)
	}
	return nil
}

// release gives back what the disk holds.
func (d *ForeignDisk) release() error {
	return errors.Join(d.below.release(), d.host.release(d.owns))
}
