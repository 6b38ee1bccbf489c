package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
)

// ExtentKind says what a guest range reads as, and whose content it is.
type ExtentKind uint8

const (
	ExtentUnallocated ExtentKind = iota // nothing in the whole chain: reads as zeros
	ExtentZero                          // zero clusters, or holes of a host file: read as zeros, and hide what lies below
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

// readsZero reports whether all of the kind reads as zeros.
func (k ExtentKind) readsZero() bool { return k == ExtentUnallocated || k == ExtentZero }

// Extent is a run of guest bytes of one state.
type Extent struct {
	Off, Len int64      // guest range in bytes
	Kind     ExtentKind // what the range reads as
	Depth    int        // the layer that decides: 0 is the image itself, 1 its backing file, ...
	HostOff  int64      // host offset in that layer's file (or data file) where Off is stored, or -1
	// Hole marks an ExtentZero that a qcow2 image maps as data, and that reads as zeros because its host file has a
	// hole there: clusters that were preallocated and not written yet. See Image.Extents.
	Hole bool
}

// follows reports whether e goes on where x ends, in guest and host.
func (e *Extent) follows(x *Extent) bool {
	if e.Off != x.Off+x.Len || e.Kind != x.Kind || e.Depth != x.Depth || e.Hole != x.Hole {
		return false
	}
	if e.HostOff < 0 || x.HostOff < 0 {
		return e.HostOff < 0 && x.HostOff < 0
	}
	return e.HostOff == x.HostOff+x.Len
}

// Extents yields the allocation state of the guest range [off, off+n), cut to the disk, through the whole
// chain, in runs as long as they are. No lock is held while it yields; of a range that changes meanwhile it
// tells the state before or after. HostOff of a zero extent is that of the host cluster it keeps, if any, and so is that
// of subclusters that nobody holds, in a cluster that has its place.
//
// The tables of long ranges are read in large pieces, ahead of the run that is yielded and past the cache, which keeps
// what it holds: 1 TiB of 64 KiB clusters takes a fraction of a second. A range of a few clusters is looked up as a read
// would.
//
// In an image that looks as if its clusters had been preallocated, those that were never written are holes of the host
// file, and are told from the others (Extent.Hole), as QEMU does it. An image looks so if its refcounts say that it uses
// more clusters, by a ninth and by two at least, than its file takes space for (Storage.Allocated). That is found out once;
// in other images, and where a storage does not tell, what is mapped as data is data. What a walk calls a hole has read as
// zeros at some moment within it, whoever writes beside it.
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
		w := tableWalk{img: img, end: uint64(max(end, 0))}
		for off < end {
			x, err := w.next(uint64(off))
			if err != nil {
				yield(Extent{}, err)
				return
			}
			e := Extent{Off: off, Len: int64(x.n), HostOff: -1}
			goOn := true
			switch x.kind {
			case kindNormal:
				e.Kind, e.HostOff = ExtentData, int64(x.hostOff)
				e.Len, goOn = w.yieldData(e, yield)
			case kindZeroAlloc:
				e.Kind, e.HostOff = ExtentZero, int64(x.hostOff)
				goOn = yield(e, nil)
			case kindZeroPlain:
				e.Kind = ExtentZero
				goOn = yield(e, nil)
			case kindCompressed:
				e.Kind = ExtentCompressed
				goOn = yield(e, nil)
			case kindUnallocated:
				if w.rules.reserved(l2Entry{word: x.word}) {
					e.HostOff = int64(x.hostOff)
				}
				e.Len, goOn = w.yieldBelow(e, yield)
			}
			if !goOn {
				return
			}
			off += e.Len
		}
	}
}

// yieldBelow yields the state of e's range, which the image does not hold, from the backing disk. It returns how many
// bytes of it are done, and whether to go on. Where it is less than all, the image has another backing disk now, and
// what it holds itself is to be looked up again.
func (w *tableWalk) yieldBelow(e Extent, yield func(Extent, error) bool) (n int64, goOn bool) {
	first := e
	more, err := w.below.extents(&e, yield)
	if errors.Is(err, fs.ErrClosed) && w.img.lower().disk != w.below.disk {
		w.forget() // a Commit or Rebase has put another one into its place
		return e.Off - first.Off, true
	}
	if err != nil {
		yield(Extent{}, err)
	}
	return first.Len, more && err == nil
}

// extents yields the state of e's range, which the disk above does not hold, one layer deeper. It takes from e what it
// has yielded. more reports whether to go on.
func (b *backing) extents(e *Extent, yield func(Extent, error) bool) (more bool, err error) {
	if b.missing != nil {
		return false, b.missing
	}
	if b.disk != nil {
		for x, err := range checkedExtents(b.disk, e.Off, e.Len) {
			if err != nil {
				return false, fmt.Errorf("backing file: %w", err)
			}
			x.Depth++
			e.Off, e.Len = e.Off+x.Len, e.Len-x.Len
			if e.HostOff >= 0 {
				e.HostOff += x.Len
			}
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

// checkedExtents is d.Extents, without words that the caller adds, and with an error in place of an extent that does not
// go on where the one before it ended, or not within the range. It may end before the range does.
func checkedExtents(d Disk, off, n int64) iter.Seq2[Extent, error] {
	return inOrder(extentsOf(d, off, n), off, n)
}

// inOrder yields what seq does, the extents of n bytes from off on, with the errors of checkedExtents.
func inOrder(seq iter.Seq2[Extent, error], off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		next, end := off, off+n
		for e, err := range seq {
			if err == nil && (e.Off != next || e.Len <= 0 || e.Len > end-e.Off) {
				err = errBadExtents
			}
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if !yield(e, nil) {
				return
			}
			next += e.Len
		}
	}
}

// wholeExtents yields what seq does, the extents of a disk of size bytes from its beginning, with an error in place of one
// that does not go on where the one before it ended, and where they do not cover the disk, and with that of ctx once it has
// ended.
func wholeExtents(ctx context.Context, seq iter.Seq2[Extent, error], size int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if size == 0 {
			return
		}
		next := int64(0)
		for e, err := range inOrder(seq, 0, size) {
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if next += e.Len; !yield(e, nil) {
				return
			}
		}
		if next != size {
			yield(Extent{}, errBadExtents)
		}
	}
}

// extentsOf is d.Extents, without words that the caller adds.
func extentsOf(d Disk, off, n int64) iter.Seq2[Extent, error] {
	if d, ok := d.(quietDisk); ok {
		return d.extents(off, n)
	}
	return d.Extents(off, n)
}
