package qcow2

import (
	"context"
	"errors"
)

// writeDisk writes a piece to a target that is no image.
func (c *converter) writeDisk(ctx context.Context, p *piece) error {
	for _, x := range p.parts {
		if err := ctx.Err(); err != nil {
			return err
		}
		switch x.class {
		case classCopy:
			if !p.loaded && c.offloadRange(p, x.guestSpan, x.off) {
				continue
			}
			if err := c.load(ctx, p); err != nil {
				return err
			}
			if _, err := c.dst.WriteAt(p.data(x.guestSpan), x.off); err != nil {
				return err
			}
		case classZero:
			if c.targetZero {
				continue
			}
			if err := zeroDisk(ctx, c.dst, x.off, x.n); err != nil {
				return err
			}
		}
	}
	return nil
}

// zeroDisk makes n bytes at off of a disk that is no image read as zeros, where they do not already.
func zeroDisk(ctx context.Context, d WritableDisk, off, n int64) error {
	if n <= 0 {
		return nil
	}
	for e, err := range d.Extents(off, n) {
		if err != nil {
			return err
		}
		if e.Kind == ExtentZero || e.Kind == ExtentUnallocated {
			continue
		}
		if raw, ok := d.(*RawDisk); ok {
			err := raw.zero(e.Off, e.Len)
			if err == nil {
				continue
			}
			if !errors.Is(err, errors.ErrUnsupported) {
				return err
			}
		}
		if err := writeZeroes(ctx, d, e.Off, e.Len); err != nil {
			return err
		}
	}
	return nil
}

// writeZeroes writes n zeros at off.
func writeZeroes(ctx context.Context, d WritableDisk, off, n int64) error {
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		k := min(n, int64(len(zeroChunk)))
		if _, err := d.WriteAt(zeroChunk[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// zero makes n bytes at off read as zeros: a hole, if the storage punches, else what it has for zeros. If it has
// neither, the error matches errors.ErrUnsupported.
func (d *RawDisk) zero(off, n int64) error {
	if err := d.s.PunchHole(off, n); !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return d.s.WriteZeroes(off, n)
}
