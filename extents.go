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
	return joinExtents(img.extents(off, n), func(err error) error { return opError("extents of", off, int(n), err) })
}

// joinExtents yields what runs does, as one where one goes on as the other. wrap adds its words to an error.
func joinExtents(runs iter.Seq2[Extent, error], wrap func(error) error) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		var run Extent
		for e, err := range runs {
			if err != nil {
				if run.Len == 0 || yield(run, nil) {
					yield(Extent{}, wrap(err))
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
	for {
		more, err := below.extents(&e, yield)
		if errors.Is(err, fs.ErrClosed) {
			if now := img.lower(); now.disk != below.disk {
				below = now // a Commit or Rebase has put another one into its place
				continue
			}
		}
		if err != nil {
			yield(Extent{}, err)
		}
		return more && err == nil
	}
}

// extents yields the state of e's range, which the disk above does not hold, one layer deeper. It takes from e what it
// has yielded. more reports whether to go on.
func (b *backing) extents(e *Extent, yield func(Extent, error) bool) (more bool, err error) {
	if b.missing != nil {
		return false, b.missing
	}
	if b.disk != nil {
		end := e.Off + e.Len
		for x, err := range extentsOf(b.disk, e.Off, e.Len) {
			if err == nil && (x.Off != e.Off || x.Len <= 0 || x.Len > end-x.Off) {
				err = errBadExtents
			}
			if err != nil {
				return false, fmt.Errorf("backing file: %w", err)
			}
			x.Depth++
			e.Off, e.Len = x.Off+x.Len, end-(x.Off+x.Len)
			if !yield(x, nil) {
				return false, nil
			}
		}
	}
	// What lies past the end of the backing disk is nobody's.
	return e.Len <= 0 || yield(*e, nil), nil
}

// errBadExtents says that a Disk of the caller's yields extents that are not runs without gaps within the range.
var errBadExtents = errors.New("extents do not follow each other within the range")

// extentsOf is d.Extents, without words that the caller adds.
func extentsOf(d Disk, off, n int64) iter.Seq2[Extent, error] {
	if d, ok := d.(quietDisk); ok {
		return d.extents(off, n)
	}
	return d.Extents(off, n)
}
