package qcow2

import (
	"io"
	"iter"
)

// Disk is a source of guest data: an Image, a snapshot, a raw file. Reads past Size return io.EOF.
type Disk interface {
	io.ReaderAt
	// Size returns the size of the disk in bytes.
	Size() int64
	// Extents yields the allocation state of the range [off, off+n) in runs.
	Extents(off, n int64) iter.Seq2[Extent, error]
}
