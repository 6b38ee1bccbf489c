package qcow2

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
)

// ExtentKind says what a guest range reads as, and whose content it is.
type ExtentKind uint8

const (
	ExtentUnallocated ExtentKind = iota // nothing in the whole chain: reads as zeros
	ExtentZero                          // zero clusters, or holes of a raw file: read as zeros, and hide what lies below
	ExtentData                          // stored data
	ExtentCompressed                    // stored data in compressed clusters
)

// String returns the kind's name in lower case.
func (k ExtentKind) String() string {
	switch k {
	case ExtentUnallocated:
		return "unallocated"
	case ExtentZero:
		return "zero"
	case ExtentData:
		return "data"
	case ExtentCompressed:
		return "compressed"
	}
	return "invalid"
}

// Extent is a run of guest bytes of one state.
type Extent struct {
	Off, Len int64      // guest range in bytes
	Kind     ExtentKind // what the range reads as
	Depth    int        // the layer that decides: 0 is the image itself, 1 its backing file, ...
	HostOff  int64      // host offset in that layer's file (or data file) where Off is stored, or -1
}

// follows reports whether e goes on where x ends, in guest and host.
func (e *Extent) follows(x *Extent) bool {
	if e.Off != x.Off+x.Len || e.Kind != x.Kind || e.Depth != x.Depth {
		return false
	}
	if e.HostOff < 0 || x.HostOff < 0 {
		return e.HostOff < 0 && x.HostOff < 0
	}
	return e.HostOff == x.HostOff+x.Len
}

// Extents yields the allocation state of the guest range [off, off+n), cut to the disk, through the whole
// chain, in runs as long as they are. No lock is held while it yields; of a range that changes meanwhile it
// tells the state before or after. HostOff of a zero extent is that of the host cluster it keeps, if any.
//
// Errors: ErrRange, ErrCorrupt, ErrBackingRequired, fs.ErrClosed, and those of the storage. An error ends
// the iteration.
func (img *Image) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		var run Extent
		for e, err := range img.extents(off, n) {
			if err != nil {
				if run.Len == 0 || yield(run, nil) {
					yield(Extent{}, opError("extents of", off, int(n), err))
				}
				return
			}
			if run.Len > 0 && e.follows(&run) {
				run.Len += e.Len
				continue
			}
			if run.Len > 0 && !yield(run, nil) {
				return
			}
			run = e
		}
		if run.Len > 0 {
			yield(run, nil)
		}
	}
}

// extents is Extents in runs that may be too short.
func (img *Image) extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if off < 0 || n < 0 {
			yield(Extent{}, ErrRange)
			return
		}
		end := int64(img.size.Load())
		if off < end && n < end-off {
			end = off + n
		}
		for off < end {
			x, err := img.mapped(uint64(off), uint64(end-off))
			if err != nil {
				yield(Extent{}, err)
				return
			}
			e := Extent{Off: off, Len: int64(x.n), HostOff: -1}
			off += e.Len
			switch x.kind {
			case kindNormal:
				e.Kind, e.HostOff = ExtentData, int64(x.hostOff)
			case kindZeroAlloc:
				e.Kind, e.HostOff = ExtentZero, int64(x.hostOff)
			case kindZeroPlain:
				e.Kind = ExtentZero
			case kindCompressed:
				e.Kind = ExtentCompressed
			case kindUnallocated:
				if !img.extentsBelow(e, yield) {
					return
				}
				continue
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// mapped is mapper.resolve as a request of its own.
func (img *Image) mapped(off, n uint64) (extent, error) {
	s := img.reqs.enter()
	defer img.reqs.leave(s)
	if err := img.readable(); err != nil {
		return extent{}, err
	}
	return img.m.resolve(off, n)
}

// extentsBelow yields the state of e's range, which the image does not hold, from the backing disk. It
// reports whether to go on.
func (img *Image) extentsBelow(e Extent, yield func(Extent, error) bool) bool {
	below := img.lower()
	if below.missing != nil {
		yield(Extent{}, below.missing)
		return false
	}
	end := e.Off + e.Len
	for again := below.disk != nil; again; {
		again = false
		for b, err := range extentsOf(below.disk, e.Off, end-e.Off) {
			if errors.Is(err, fs.ErrClosed) {
				if now := img.lower(); now.disk != below.disk {
					below, again = now, true // a Commit or Rebase has put another one into its place
					break
				}
			}
			if err == nil && (b.Off != e.Off || b.Len <= 0 || b.Len > end-b.Off) {
				err = errBadExtents
			}
			if err != nil {
				yield(Extent{}, fmt.Errorf("backing file: %w", err))
				return false
			}
			b.Depth++
			if !yield(b, nil) {
				return false
			}
			e.Off = b.Off + b.Len
		}
	}
	// What lies past the end of the backing disk is nobody's.
	e.Len = end - e.Off
	return e.Len <= 0 || yield(e, nil)
}

// errBadExtents says that a Disk of the caller's yields extents that are not runs without gaps within the range.
var errBadExtents = errors.New("extents do not follow each other within the range")

// extentsOf is d.Extents, without words that the caller adds.
func extentsOf(d Disk, off, n int64) iter.Seq2[Extent, error] {
	if img, ok := d.(*Image); ok {
		return img.extents(off, n)
	}
	return d.Extents(off, n)
}
