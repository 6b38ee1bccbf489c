package qcow2

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"sync/atomic"
)

// Disk is a source of guest data: an Image, a snapshot, a raw file. It is safe for concurrent use.
type Disk interface {
	// ReadAt is io.ReaderAt; reads past Size return io.EOF.
	io.ReaderAt
	// Size returns the size of the disk in bytes.
	Size() int64
	// Extents yields the allocation state of the range [off, off+n), cut to the disk, in runs without
	// gaps. An error ends it.
	Extents(off, n int64) iter.Seq2[Extent, error]
}

// quietDisk is a Disk of the library that has images below it. Its methods are ReadAt and Extents without the words
// that every layer would add to an error.
type quietDisk interface {
	readAt(p []byte, off int64) (int, error)
	extents(off, n int64) iter.Seq2[Extent, error]
}

var (
	_ quietDisk = (*Image)(nil)
	_ quietDisk = (*ForeignDisk)(nil)
)

// RawDisk is a Disk whose bytes are those of a storage: a raw image file, or a block device.
type RawDisk struct {
	s    Storage
	size atomic.Int64 // in bytes, rounded up to sectors; grows when an image above is committed
}

var (
	_ Disk        = (*RawDisk)(nil)
	_ io.WriterAt = (*RawDisk)(nil)
)

// NewRawDisk returns the disk in s, which stays the caller's. A size that is not a multiple of 512 is
// rounded up; the bytes that are missing read as zeros.
func NewRawDisk(s Storage) (*RawDisk, error) {
	n, err := s.Size()
	if err != nil {
		return nil, err
	}
	d := &RawDisk{s: s}
	d.size.Store((n + sectorSize - 1) / sectorSize * sectorSize)
	return d, nil
}

// Size returns the size of the disk in bytes, a multiple of 512.
func (d *RawDisk) Size() int64 { return d.size.Load() }

// ReadAt is io.ReaderAt.
func (d *RawDisk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("raw disk: %w", ErrRange)
	}
	var eof error
	size := d.Size()
	if off >= size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	if int64(len(p)) > size-off {
		p, eof = p[:size-off], io.EOF
	}
	n, err := d.s.ReadAt(p, off)
	if n < len(p) {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		clear(p[n:])
	}
	return len(p), eof
}

// WriteAt is io.WriterAt. It never grows the disk: ErrRange.
func (d *RawDisk) WriteAt(p []byte, off int64) (int, error) {
	if size := d.Size(); off < 0 || off > size || int64(len(p)) > size-off {
		return 0, fmt.Errorf("raw disk: write %d bytes at %#x: %w of %d bytes", len(p), off, ErrRange, size)
	}
	return d.s.WriteAt(p, off)
}

// Sync makes writes durable.
func (d *RawDisk) Sync() error { return d.s.Sync() }

// Extents yields where the storage has data and where it has holes, as far as it can tell.
func (d *RawDisk) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if off < 0 || n < 0 {
			yield(Extent{}, fmt.Errorf("raw disk: %w", ErrRange))
			return
		}
		end := min(d.Size(), off+min(n, d.Size())) // no overflow: both are at most size where it matters
		for off < end {
			start, stop, err := d.s.NextData(off)
			switch {
			case errors.Is(err, errors.ErrUnsupported):
				start, stop = off, end
			case errors.Is(err, io.EOF):
				start, stop = end, end
			case err != nil:
				yield(Extent{}, err)
				return
			}
			start, stop = min(max(start, off), end), min(stop, end)
			if stop <= off && start < end {
				stop = end // no answer at all: there may be data
			}
			if start > off && !yield(Extent{Off: off, Len: start - off, Kind: ExtentZero, HostOff: off}, nil) {
				return
			}
			if stop > start && !yield(Extent{Off: start, Len: stop - start, Kind: ExtentData, HostOff: start}, nil) {
				return
			}
			off = max(stop, start)
		}
	}
}
