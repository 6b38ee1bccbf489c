package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync/atomic"
)

// WritableDisk is a Disk that can be the target of Convert: an *Image or a *RawDisk, or one of the caller's.
type WritableDisk interface {
	Disk
	// WriteAt is io.WriterAt. It may be called from several goroutines at once, for ranges that do not overlap.
	io.WriterAt
	// Sync makes durable what was written.
	Sync() error
}

var (
	_ WritableDisk = (*Image)(nil)
	_ WritableDisk = (*RawDisk)(nil)
)

// TargetZeroes says what Convert makes of what reads as zeros in the source.
type TargetZeroes int

const (
	// ZeroesHoles leaves zeros out: they are unallocated in an image, and holes in a raw file. Where the target
	// would show something else, they are zero clusters, or a zeroed range of a raw file.
	ZeroesHoles TargetZeroes = iota
	// ZeroesClusters makes them zero clusters of an image of version 3, which hide whatever comes to lie below the
	// image later. In another target they are holes.
	ZeroesClusters
	// ZeroesData writes them, so that all of the target has its space.
	ZeroesData
)

// String returns the name in lower case.
func (z TargetZeroes) String() string {
	names := [...]string{"holes", "zero clusters", "data"}
	if z < 0 || int(z) >= len(names) {
		return fmt.Sprintf("TargetZeroes(%d)", int(z))
	}
	return names[z]
}

// Windows of deflate payloads, in bytes: how far back they reach.
const (
	// DeflateWindow4K is what QEMU writes, and what every reader accepts.
	DeflateWindow4K = 4 << 10
	// DeflateWindow32K is the largest that deflate has. It packs better. QEMU asks its inflate library for a window
	// of 4 KiB: zlib does not insist on that where a cluster is unpacked in one call, other libraries may.
	DeflateWindow32K = 32 << 10
)

// ConvertOptions says how Convert copies. The nil pointer and the zero value are right for most.
type ConvertOptions struct {
	// Compress writes compressed clusters. The target must be an *Image.
	Compress bool
	// DeflateWindow is how far back deflate payloads reach in bytes: 4096, the default, or 32768, which packs some
	// percent better and needs a reader that inflates with the format's full window. It means nothing for zstd.
	DeflateWindow int
	// SparseSize is the number of bytes, a power of two from 512 to 1 MiB, that must all be zero for a
	// range not to be written. Default 4096, and at least the cluster size of a target that is an
	// *Image. If it is negative, data is not searched for zeros: only what the source knows to be zeros is.
	SparseSize int
	// Zeroes says what becomes of zeros. Default: holes.
	Zeroes TargetZeroes
	// TargetIsZero says that all of the target reads as zeros already. It is taken at its word: zeros are not
	// written. Without it Convert looks where the target says itself that it reads as zeros.
	TargetIsZero bool
	// KeepRest leaves what lies behind the end of the source in a larger target as it is, as qemu-img convert -n does.
	// Default: it becomes zeros.
	KeepRest bool
	// SharedDepth, if positive, says that the layers of the source at that depth and below (Extent.Depth) lie below
	// the target, too: what only they hold is not copied. With 1 the target has the backing file of the source.
	// Default: everything is copied. The target is then an *Image, or another disk that has something below it.
	SharedDepth int
	// Workers is the number of goroutines that read, compress and write. Default: GOMAXPROCS. There are fewer where
	// their buffers would take more than 128 MiB.
	Workers int
	// Rate bounds what is copied, in bytes of the source per second. Zeros that need not be read do not count.
	// Default: no bound.
	Rate int64
	// OnReadError, if not nil, is asked what to do about n bytes at off that the source could not read, because of err:
	// sectors, as few as fail together. If it returns nil they are taken for zeros, and the copy goes on; else that
	// error ends it. It is called by one goroutine at a time, in no order. Default: a read error ends the copy.
	OnReadError func(off, n int64, err error) error
	// Progress, if not nil, is called with the number of bytes of the source that are done with, now
	// and then and at the end, by the goroutine that called Convert.
	Progress func(done, total int64)
}

// validDeflateWindow reports whether n is a DeflateWindow option, or 0.
func validDeflateWindow(n int) bool { return n == 0 || n == DeflateWindow4K || n == DeflateWindow32K }

// validate returns all options that are not allowed, joined, or nil.
func (o *ConvertOptions) validate() error {
	var errs []error
	bad := func(option string, value any, reason string) {
		errs = append(errs, &OptionError{Option: option, Value: value, Reason: reason})
	}
	if s := o.SparseSize; s > 0 && (s < sectorSize || s > maxSparseSize || s&(s-1) != 0) {
		bad("SparseSize", s, "must be a power of two from 512 to 1 MiB, or negative")
	}
	if !validDeflateWindow(o.DeflateWindow) {
		bad("DeflateWindow", o.DeflateWindow, "must be 4096 or 32768")
	}
	if o.Zeroes < ZeroesHoles || o.Zeroes > ZeroesData {
		bad("Zeroes", int(o.Zeroes), "is no TargetZeroes")
	}
	if o.Zeroes == ZeroesClusters && o.TargetIsZero {
		bad("TargetIsZero", true, "contradicts Zeroes, which asks for zero clusters")
	}
	if o.SharedDepth < 0 {
		bad("SharedDepth", o.SharedDepth, "must not be negative")
	}
	if o.Workers < 0 {
		bad("Workers", o.Workers, "must not be negative")
	}
	if o.Rate < 0 {
		bad("Rate", o.Rate, "must not be negative")
	}
	return errors.Join(errs...)
}

// maxSparseSize is the largest SparseSize in bytes.
const maxSparseSize = 1 << 20

// Convert copies the content of src to dst, whose size is at least that of src, and makes it durable. What
// reads as zeros in src and in dst already is neither read nor written; what reads as zeros in src only becomes
// zeros in dst, and so does what lies behind the end of src, unless KeepRest is set. Whole clusters of an *Image are written, and a cluster
// that is shared in a part (SharedDepth) is copied whole.
//
// The same source, target and options give the same bytes in the target, whatever the number of workers: an *Image
// finds its host clusters in the order of the guest. That holds for a storage that does not run out of space
// meanwhile.
//
// dst must not be written by others meanwhile; src may be read. After an error, or when ctx ends, dst holds a
// part of the copy, which is consistent if it is an *Image. All goroutines have ended when Convert returns.
//
// Where dst and src are files, data that is not searched for zeros, or for whole clusters of 32 KiB or more of them alone,
// is copied by the host (copy_file_range), if it can: on some file systems both share the space then. A src that is an
// *Image open for writing, or lies in a Storage of the caller's own, is read.
//
// Memory: at most 128 MiB of buffers, whatever the sizes, and the caches of dst and src.
//
// Errors: *OptionError, ErrTooLarge if dst is smaller than src, that of ctx, and those of src and dst.
func Convert(ctx context.Context, dst WritableDisk, src Disk, opts *ConvertOptions) error {
	c := converter{dst: dst, src: src, total: src.Size()}
	if opts != nil {
		c.opts = *opts
	}
	err := c.prepare()
	if err == nil {
		err = c.run(ctx)
	}
	if err != nil {
		return fmt.Errorf("qcow2: convert: %w", err)
	}
	return nil
}

const (
	// convertChunk is what Commit and Rebase read at once, in bytes: a multiple of every cluster size.
	convertChunk = 2 << 20
	// pieceSize is what a worker of Convert reads and writes at once, in bytes, unless a cluster or SparseSize is larger: so
	// little that it stays in the processor's cache. Output depends on it, through the order of allocations.
	pieceSize = 256 << 10
	// packedPiece is pieceSize where clusters are compressed: their payloads are written together.
	packedPiece = 1 << 20
	// maxConvertBuffers bounds the buffers of all workers in bytes.
	maxConvertBuffers = 128 << 20
)

// converter is one Convert in progress.
type converter struct {
	dst    WritableDisk
	src    Disk
	opts   ConvertOptions
	image  *Image // dst, if it is one
	total  int64  // bytes of src
	unit   int64  // what is copied whole, in bytes: clusters of an image
	piece  int64  // what is copied at once, in bytes
	detect int64  // zero detection, in bytes; a multiple of unit. 0: none

	offload   bool        // the host may copy data
	noOffload atomic.Bool // it said that it cannot

	targetZero bool // all of the target reads as zeros

	displaced bool // something of the target is about to be freed; belongs to the piece whose turn it is
	turns     turns
	buffers   chan *pieceBuffers
	reads     readPolicy
}

// prepare checks the options and looks at the target.
func (c *converter) prepare() error {
	if err := c.opts.validate(); err != nil {
		return err
	}
	if c.dst.Size() < c.total {
		return fmt.Errorf("%w: a disk of %d bytes into one of %d", ErrTooLarge, c.total, c.dst.Size())
	}
	c.unit, c.piece = 1, max(pieceSize, int64(c.opts.SparseSize))
	if c.opts.Compress {
		c.piece = packedPiece
	}
	c.image, _ = c.dst.(*Image)
	if err := c.checkTarget(); err != nil {
		return err
	}
	if c.image != nil {
		c.unit = int64(c.image.m.clusterSize)
		c.piece = max(c.piece, c.unit)
	}
	if c.opts.SparseSize >= 0 {
		c.detect = max(4096, c.unit)
		if c.opts.SparseSize > 0 {
			c.detect = max(int64(c.opts.SparseSize), c.unit)
		}
	}
	if c.opts.DeflateWindow == 0 {
		c.opts.DeflateWindow = DeflateWindow4K
	}
	c.offload = c.mayOffload()
	c.reads.ask = c.opts.OnReadError
	var err error
	if c.targetZero = c.opts.TargetIsZero; !c.targetZero && c.opts.Zeroes != ZeroesClusters {
		c.targetZero, err = readsAsZeros(c.dst)
	}
	return err
}

// checkTarget refuses what the target cannot do.
func (c *converter) checkTarget() error {
	switch img := c.image; {
	case img == nil && c.opts.Compress:
		return &OptionError{Option: "Compress", Value: true, Reason: "needs a target that is an *Image"}
	case img == nil:
		return nil
	case c.opts.Compress && img.m.external:
		return fmt.Errorf("%w: compressed clusters with an external data file", ErrUnsupported)
	case c.opts.Zeroes == ZeroesClusters && img.m.version2:
		return &OptionError{Option: "Zeroes", Value: c.opts.Zeroes, Reason: "an image of version 2 has no zero clusters"}
	default:
		return img.writable()
	}
}

// readsAsZeros reports whether a disk knows that all of it reads as zeros.
func readsAsZeros(d Disk) (bool, error) {
	for e, err := range d.Extents(0, d.Size()) {
		if err != nil {
			return false, err
		}
		if e.Kind != ExtentZero && e.Kind != ExtentUnallocated {
			return false, nil
		}
	}
	return true, nil
}

// workers returns how many workers there are.
func (c *converter) workers() int {
	n := c.opts.Workers
	if n == 0 {
		n = runtime.GOMAXPROCS(0)
	}
	each := c.piece
	if c.opts.Compress {
		each = 2*c.piece + encoderBytes
	}
	return int(min(int64(n), maxConvertBuffers/each))
}

// encoderBytes is about what an encoder takes besides, in bytes.
const encoderBytes = 4 << 20

// isZero reports whether p is all zeros.
func isZero(p []byte) bool {
	for len(p) > len(zeroChunk) {
		if !bytes.Equal(p[:len(zeroChunk)], zeroChunk[:]) {
			return false
		}
		p = p[len(zeroChunk):]
	}
	return bytes.Equal(p, zeroChunk[:len(p)])
}
