package foreign

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
)

// Byte orders of the formats.
var (
	le = binary.LittleEndian // QED, VDI
	be = binary.BigEndian    // VHD
)

// file is the host file of an image.
type file struct {
	r    io.ReaderAt
	size int64 // in bytes
}

// readFull reads len(p) bytes at off. What lies past the end of the file is io.ErrUnexpectedEOF.
func (f *file) readFull(p []byte, off int64) error {
	n, err := f.r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at host %#x: %w", len(p), off, err)
}

// headerAt returns the n bytes at off. Those past the end of the file are zeros, so that it is the rules of the
// format that find a file too short. Precondition: n is a constant of the format.
func (f *file) headerAt(off int64, n int) ([]byte, error) {
	p := make([]byte, n)
	have := min(int64(n), max(f.size-off, 0))
	return p, f.readFull(p[:have], off)
}

// holds reports whether n bytes at off lie within the file.
func (f *file) holds(off, n uint64) bool {
	size := uint64(f.size)
	return off <= size && n <= size-off
}

// Pieces of tables: what is read at once, in bytes, and how many are kept for each bucket of the cache.
const (
	pieceSize = 4 << 10
	ways      = 2
	// maxTableBytes bounds the cache where the limits are generous: 16 MiB map 4 TiB of a VDI, 8 TiB of a VHD with
	// its blocks of 2 MiB, and 128 GiB of a QED with its clusters of 64 KiB. Beyond it a piece is read again for
	// every 512 or 1024 blocks.
	maxTableBytes = 16 << 20
)

// tables reads the tables of an image in pieces, and keeps those that were used last. A piece begins at a multiple of
// pieceSize within its table. Pieces are immutable. It is safe for concurrent use.
type tables struct {
	file
	buckets []bucket // by a hash of the piece's offset; at least one
}

// bucket holds pieces whose offsets have the same hash, the youngest first. Two goroutines that replace
// pieces at once may lose one of them, which is read again.
type bucket [ways]atomic.Pointer[piece]

// piece is a piece of a table.
type piece struct {
	off int64 // host offset in bytes
	n   int   // bytes of b that the file has
	b   [pieceSize]byte
}

// newTables returns the tables of f. need is how many bytes its tables may have in all: as many as the file holds, at
// most, whatever a header claims.
func newTables(f *file, need uint64, limits Limits) *tables {
	most := min(need, uint64(f.size), uint64(max(limits.TableBytes, 0)), maxTableBytes)
	return &tables{file: *f, buckets: make([]bucket, max(1, (most+ways*pieceSize-1)/(ways*pieceSize)))}
}

// at returns what is at the byte at of the table that begins at host offset base, to the end of its piece or of the
// file. The caller may read it and no more. Precondition: the byte lies within the file.
func (t *tables) at(base int64, at uint64) ([]byte, error) {
	off := base + int64(at&^(pieceSize-1))
	skip := int(at & (pieceSize - 1))
	b := &t.buckets[uint64(off)/sector*0x9e3779b97f4a7c15>>32%uint64(len(t.buckets))]
	for i := range b {
		if p := b[i].Load(); p != nil && p.off == off {
			return p.b[skip:p.n], nil
		}
	}
	p := &piece{off: off, n: int(min(pieceSize, t.size-off))}
	if err := t.readFull(p.b[:p.n], off); err != nil {
		return nil, err
	}
	for i := ways - 1; i > 0; i-- {
		b[i].Store(b[i-1].Load())
	}
	b[0].Store(p)
	return p.b[skip:p.n], nil
}
