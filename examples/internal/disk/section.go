package disk

import (
	"io"
	"iter"

	"github.com/go-qcow2/qcow2"
)

// Section is the disk of n bytes that lies at off in another one. What of it lies behind the end of that is zeros.
func Section(d qcow2.Disk, off, n int64) qcow2.Disk { return &section{d, off, n} }

// section is a part of a disk.
type section struct {
	disk   qcow2.Disk
	off, n int64
}

// Size implements qcow2.Disk.
func (s *section) Size() int64 { return s.n }

// ReadAt implements qcow2.Disk.
func (s *section) ReadAt(p []byte, off int64) (int, error) {
	if off >= s.n {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > s.n-off {
		p, end = p[:s.n-off], io.EOF
	}
	n, err := s.disk.ReadAt(p, s.off+off)
	if err == io.EOF {
		clear(p[n:])
		n, err = len(p), end
	}
	if err == nil {
		err = end
	}
	return n, err
}

// Extents implements qcow2.Disk.
func (s *section) Extents(off, n int64) iter.Seq2[qcow2.Extent, error] {
	return func(yield func(qcow2.Extent, error) bool) {
		end := min(s.n, off+n)
		for e, err := range s.disk.Extents(s.off+off, end-off) {
			e.Off -= s.off
			if !yield(e, err) || err != nil {
				return
			}
			off = e.Off + e.Len
		}
		if off < end {
			yield(qcow2.Extent{Off: off, Len: end - off, HostOff: -1}, nil)
		}
	}
}
