package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io"
)

// WritableDisk is a Disk that can be the target of Convert: an *Image or a *RawDisk.
type WritableDisk interface {
	Disk
	io.WriterAt
	Sync() error
}

var (
	_ WritableDisk = (*Image)(nil)
	_ WritableDisk = (*RawDisk)(nil)
)

// ConvertOptions says how Convert copies. The nil pointer and the zero value are right for most.
type ConvertOptions struct {
	// Compress writes compressed clusters. The target must be an *Image.
	Compress bool
	// SparseSize is the number of bytes, a power of two from 512 to 1 MiB, that must all be zero for a
	// range not to be written. Default 4096, and at least the cluster size of a target that is an
	// *Image.
	SparseSize int
	// Progress, if not nil, is called with the number of bytes of the source that are done with, now
	// and then and at the end, by the goroutine that called Convert.
	Progress func(done, total int64)
}

// convertChunk is what Convert reads at once, in bytes: a multiple of every cluster size.
const convertChunk = 2 << 20

// Convert copies the content of src to dst, whose size is at least that of src, and makes it durable. What
// reads as zeros in src and in dst already is neither read nor written; what reads as zeros in src only is
// written as zeros, and so is what lies behind the end of src.
//
// dst must not be written by others meanwhile; src may be read. After an error, or when ctx ends, dst holds a
// part of the copy.
//
// Errors: *OptionError, ErrTooLarge if dst is smaller than src, that of ctx, and those of src and dst.
func Convert(ctx context.Context, dst WritableDisk, src Disk, opts *ConvertOptions) error {
	c := converter{ctx: ctx, dst: dst, src: src, total: src.Size()}
	if opts != nil {
		c.opts = *opts
	}
	if err := c.prepare(); err != nil {
		return fmt.Errorf("qcow2: convert: %w", err)
	}
	if err := c.run(); err != nil {
		return fmt.Errorf("qcow2: convert: %w", err)
	}
	return nil
}

// converter is one Convert in progress.
type converter struct {
	ctx   context.Context
	dst   WritableDisk
	src   Disk
	opts  ConvertOptions
	image *Image // dst, if it is one
	total int64  // bytes of src
	unit  int64  // zero detection, in bytes
	buf   []byte
}

// prepare checks the options.
func (c *converter) prepare() error {
	if c.dst.Size() < c.total {
		return fmt.Errorf("%w: a disk of %d bytes into one of %d", ErrTooLarge, c.total, c.dst.Size())
	}
	c.unit = 4096
	if s := c.opts.SparseSize; s != 0 {
		if s < sectorSize || s > 1<<20 || s&(s-1) != 0 {
			return &OptionError{Option: "SparseSize", Value: s, Reason: "must be a power of two from 512 to 1 MiB"}
		}
		c.unit = int64(s)
	}
	c.image, _ = c.dst.(*Image)
	if c.image != nil {
		if c.opts.Compress && c.image.m.external {
			return fmt.Errorf("%w: compressed clusters with an external data file", ErrUnsupported)
		}
		c.unit = max(c.unit, int64(c.image.m.clusterSize))
	} else if c.opts.Compress {
		return &OptionError{Option: "Compress", Value: true, Reason: "needs a target that is an *Image"}
	}
	c.buf = make([]byte, convertChunk)
	return nil
}

// run copies everything.
func (c *converter) run() error {
	for off := int64(0); off < c.total; off += convertChunk {
		if err := c.chunk(off, min(convertChunk, c.total-off)); err != nil {
			return err
		}
		if c.opts.Progress != nil {
			c.opts.Progress(min(off+convertChunk, c.total), c.total)
		}
	}
	if c.opts.Progress != nil && c.total == 0 {
		c.opts.Progress(0, 0)
	}
	if err := c.zero(c.total, c.dst.Size()-c.total); err != nil {
		return err
	}
	return c.dst.Sync()
}

// chunk copies n bytes at off, which is a multiple of convertChunk.
func (c *converter) chunk(off, n int64) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	buf := c.buf[:n]
	data := false
	next := off
	for e, err := range c.src.Extents(off, n) {
		if err == nil && (e.Off != next || e.Len <= 0 || e.Len > off+n-next) {
			err = errBadExtents
		}
		if err != nil {
			return err
		}
		next += e.Len
		part := buf[e.Off-off:][:e.Len]
		if e.Kind == ExtentZero || e.Kind == ExtentUnallocated {
			clear(part)
			continue
		}
		data = true
		if got, err := c.src.ReadAt(part, e.Off); got < len(part) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	if next != off+n {
		return errBadExtents
	}
	if !data {
		return c.zero(off, n)
	}
	// Runs of units with and without data take turns.
	for pos := int64(0); pos < n; {
		zero := isZero(buf[pos:min(pos+c.unit, n)])
		end := min(pos+c.unit, n)
		for end < n && isZero(buf[end:min(end+c.unit, n)]) == zero {
			end = min(end+c.unit, n)
		}
		var err error
		if zero {
			err = c.zero(off+pos, end-pos)
		} else {
			err = c.write(buf[pos:end], off+pos)
		}
		if err != nil {
			return err
		}
		pos = end
	}
	return nil
}

// write writes p at off.
func (c *converter) write(p []byte, off int64) error {
	if c.opts.Compress {
		// The source may end inside a cluster of a larger target.
		size := int64(c.image.m.clusterSize)
		if rest := int64(len(p)) % size; rest != 0 && off+int64(len(p)) != c.dst.Size() {
			whole := int64(len(p)) - rest
			if err := c.image.WriteCompressed(p[:whole], off); err != nil {
				return err
			}
			_, err := c.dst.WriteAt(p[whole:], off+whole)
			return err
		}
		return c.image.WriteCompressed(p, off)
	}
	_, err := c.dst.WriteAt(p, off)
	return err
}

// zero makes n bytes at off of the target read as zeros, where they do not already.
func (c *converter) zero(off, n int64) error {
	if n <= 0 {
		return nil
	}
	for e, err := range c.dst.Extents(off, n) {
		if err != nil {
			return err
		}
		if e.Kind == ExtentZero || e.Kind == ExtentUnallocated {
			continue
		}
		for e.Len > 0 {
			if err := c.ctx.Err(); err != nil {
				return err
			}
			k := min(e.Len, int64(len(zeroChunk)))
			if _, err := c.dst.WriteAt(zeroChunk[:k], e.Off); err != nil {
				return err
			}
			e.Off, e.Len = e.Off+k, e.Len-k
		}
	}
	return nil
}

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
