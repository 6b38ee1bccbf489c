package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/go-qcow2/qcow2/internal/hostfile"
)

// clusterUse says what a host write is: guest data, or one of the kinds of metadata. Every host write
// names its use, so that the metadata of one kind cannot be hit by a writer of another (I8).
type clusterUse uint8

const (
	useData clusterUse = iota
	useHeader
	useL1
	useL2
	useRefcountTable
	useRefcountBlock
	useBitmapDirectory
	// The rest is written by repairs alone.
	useInactiveL1
	useAnyL2 // of the active image, of snapshots or of both
	useSnapshotTable
	useBitmapTable
)

// useKinds are the kinds of metadata that a write of each use may meet: its own. It is refused where it meets
// any other.
var useKinds = [...]OverlapKinds{
	useData:            0,
	useHeader:          OverlapMainHeader,
	useL1:              OverlapActiveL1,
	useL2:              OverlapActiveL2,
	useRefcountTable:   OverlapRefcountTable,
	useRefcountBlock:   OverlapRefcountBlock,
	useBitmapDirectory: OverlapBitmapDirectory,
	useInactiveL1:      OverlapInactiveL1,
	useAnyL2:           OverlapActiveL2 | OverlapInactiveL2,
	useSnapshotTable:   OverlapSnapshotTable,
	useBitmapTable:     0,
}

// String says what is written.
func (u clusterUse) String() string {
	switch u {
	case useData:
		return "guest data"
	case useBitmapTable:
		return "bitmap table"
	case useAnyL2:
		return "L2 table"
	}
	return useKinds[u].String()
}

// hostFile is one host file (image or external data file) as the engine uses it: all of its writes and
// syncs pass here. It is safe for concurrent use.
type hostFile struct {
	s      Storage
	fixed  bool // a block device: cannot grow, never-written bytes are garbage
	noSync bool // OpenOptions.NoSync
	locked bool // this open took the image lock; immutable after open

	// pristine is the first host offset in bytes that no write of this open, and nothing in the file
	// at open, has reached. From there on a growing file reads as zeros, before and after a crash,
	// because nothing was ever written there. It rises before the write that raises it, and falls when the file was
	// cut, durably (cut).
	pristine atomic.Uint64

	// Where the metadata is that no other write may hit (I8); nil in a file that has none, and where nothing
	// is watched. Set before the file is written.
	metadata *overlapList
	watched  OverlapKinds // the kinds that count
	// onHit is called with a write that would hit metadata, and returns the error that refuses it.
	onHit func(*CorruptError) error

	failMu sync.Mutex
	failed atomic.Pointer[error] // the first failed sync; set once, under failMu (I6)
}

// newHostFile wraps s, whose current size in bytes is size.
func newHostFile(s Storage, size int64, noSync bool) *hostFile {
	h := &hostFile{s: s, fixed: s.FixedSize(), noSync: noSync}
	h.pristine.Store(uint64(size))
	return h
}

// release closes the storage if it is owned, and gives a lock back that this open took if not.
func (h *hostFile) release(owned bool) error {
	switch {
	case owned:
		return h.s.Close()
	case h.locked:
		return h.s.Unlock()
	}
	return nil
}

// readFull reads len(p) bytes at off; what lies past the end of the file is zeros, as the format has it
// for tables and for the last cluster.
func (h *hostFile) readFull(p []byte, off uint64) error {
	n, err := h.s.ReadAt(p, int64(off))
	if n == len(p) {
		return nil
	}
	if err == nil {
		return fmt.Errorf("read %d bytes at host %#x: %w", len(p), off, io.ErrUnexpectedEOF)
	}
	if err == io.EOF || errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	return fmt.Errorf("read %d bytes at host %#x: %w", len(p), off, err)
}

// readPiece is the unit in bytes in which tables are read.
const readPiece = 1 << 20

// words calls f with every non-zero 64-bit word of the n at host offset off, and its index, until f returns
// an error. Holes of the file, which has size bytes, and what lies past its end, are not read.
func (h *hostFile) words(off, n, size uint64, f func(i, word uint64) error) error {
	buf := getBuffer(min(readPiece, 8*n))
	defer putBuffer(buf)
	end := min(off+8*n, max(size, off))
	data := off // up to here the file is known to have data, or not to tell
	for pos := off; pos < end; {
		if pos >= data && end-pos > readPiece {
			start, stop, err := h.s.NextData(int64(pos))
			switch {
			case err == io.EOF || errors.Is(err, io.EOF):
				return nil
			case err != nil:
				data = end
			default:
				pos, data = max(pos, uint64(start)&^7), uint64(stop)
			}
			if pos >= end {
				return nil
			}
		}
		p := (*buf)[:min(end-pos, uint64(len(*buf)))]
		if err := h.readFull(p, pos); err != nil {
			return err
		}
		for i := 0; i+8 <= len(p); i += 8 {
			if w := binary.BigEndian.Uint64(p[i:]); w != 0 {
				if err := f((pos-off+uint64(i))/8, w); err != nil {
					return err
				}
			}
		}
		pos += uint64(len(p))
	}
	return nil
}

// write writes metadata, p, at off. A file that failed a sync takes no more writes, and no file takes a write
// that would hit metadata of another kind.
func (h *hostFile) write(use clusterUse, p []byte, off uint64) error {
	return h.writeFor(use, noOffset, p, off)
}

// writeData writes guest data, p, of guestOff at off, as write does.
func (h *hostFile) writeData(guestOff uint64, p []byte, off uint64) error {
	return h.writeFor(useData, int64(guestOff), p, off)
}

// writeFor is write for guestOff, or noOffset.
func (h *hostFile) writeFor(use clusterUse, guestOff int64, p []byte, off uint64) error {
	if err := h.claim(use, guestOff, off, uint64(len(p))); err != nil {
		return err
	}
	n, err := h.s.WriteAt(p, int64(off))
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write %d bytes at host %#x: %w", len(p), off, err)
	}
	return nil
}

// claim is what comes before a write of n bytes at off: it returns why there must be none, or notes that there may be one.
func (h *hostFile) claim(use clusterUse, guestOff int64, off, n uint64) error {
	if err := h.failure(); err != nil {
		return err
	}
	if h.watched != 0 {
		if kinds, at := h.metadata.query(off, n, h.watched&^useKinds[use]); kinds != 0 {
			return h.refuse(use, guestOff, kinds, at)
		}
	}
	h.reach(off + n)
	return nil
}

// refuse returns the error of a write that would hit metadata of the given kinds at host offset at.
func (h *hostFile) refuse(use clusterUse, guestOff int64, kinds OverlapKinds, at uint64) error {
	return h.onHit(&CorruptError{What: fmt.Sprintf("%s would overwrite %s", use, kinds), HostOff: int64(at), GuestOff: guestOff})
}

// enter notes that [off, off+n) is metadata of the given kinds, before it is written or named.
func (h *hostFile) enter(kinds OverlapKinds, off, n uint64) {
	if kinds &= h.watched; kinds != 0 {
		h.metadata.enter(kinds, off, n)
	}
}

// leave notes that [off, off+n) is not metadata of the given kinds any more.
func (h *hostFile) leave(kinds OverlapKinds, off, n uint64) {
	if kinds &= h.watched; kinds == 0 {
		return
	}
	if here, _ := h.metadata.query(off, n, kinds); here != 0 {
		h.metadata.remove(here, off, n)
	}
}

// writeHeader writes a part of the header that lies within one sector, so that it changes whole or not at
// all.
func (h *hostFile) writeHeader(off int64, p []byte) error {
	return h.write(useHeader, p, uint64(off))
}

// zeroChunk is the source of explicit zeros.
var zeroChunk [64 << 10]byte

// zero makes the n bytes at off read as zeros, now and after the next sync and a crash. It writes
// them: an unsynced punch or zero range could leave old content behind, but so could an unsynced
// write, and both are made durable by the sync that every mapping waits for (I2); a write is the one
// of the two that every storage has.
func (h *hostFile) zero(use clusterUse, off, n uint64) error {
	return h.zeroFor(use, noOffset, off, n)
}

// zeroFor is zero for guestOff, or noOffset.
func (h *hostFile) zeroFor(use clusterUse, guestOff int64, off, n uint64) error {
	for n > 0 {
		p := zeroChunk[:min(n, uint64(len(zeroChunk)))]
		if err := h.writeFor(use, guestOff, p, off); err != nil {
			return err
		}
		off += uint64(len(p))
		n -= uint64(len(p))
	}
	return nil
}

// punch gives the space of the n bytes at off back to the host: a wish that it may not grant, so its errors are
// nobody's. Guest data of guestOff stood there, or noOffset. It is a write to the overlap list: it may meet
// metadata of the own kinds alone (I8). A file that failed is not punched; that failure is returned.
func (h *hostFile) punch(own OverlapKinds, guestOff int64, off, n uint64) error {
	if err := h.failure(); err != nil {
		return err
	}
	if h.watched != 0 {
		if kinds, at := h.metadata.query(off, n, h.watched&^own); kinds != 0 {
			return h.refuse(useData, guestOff, kinds, at)
		}
	}
	_ = h.s.PunchHole(int64(off), int64(n))
	return nil
}

// clear makes the n bytes at off of the external data file read as zeros, as zero does, by the cheapest of what
// the host can: a hole, where the space may be given back, a zeroed range, or written zeros. All of them are
// durable with the next sync.
func (h *hostFile) clear(guestOff int64, off, n uint64, hole bool) error {
	if err := h.failure(); err != nil {
		return err
	}
	if hole && h.s.PunchHole(int64(off), int64(n)) == nil {
		return nil
	}
	h.reach(off + n)
	if h.s.WriteZeroes(int64(off), int64(n)) == nil {
		return nil
	}
	return h.zeroFor(useData, guestOff, off, n)
}

// reach notes that a write up to end may happen.
func (h *hostFile) reach(end uint64) {
	for {
		old := h.pristine.Load()
		if end <= old || h.pristine.CompareAndSwap(old, end) {
			return
		}
	}
}

// readsZero reports whether the range from off on reads as zeros although nothing was written there:
// the file grows, and neither it nor any write has come so far.
func (h *hostFile) readsZero(off uint64) bool {
	return !h.fixed && off >= h.pristine.Load()
}

// cut ends a file that is not fixed after size bytes, durably. Nothing names what goes, and nobody writes there. Only
// when it is durable, what the file grows by again counts as zeros.
func (h *hostFile) cut(size uint64) error {
	if err := h.s.Truncate(int64(size)); err != nil {
		return fmt.Errorf("truncate to %d bytes: %w", size, err)
	}
	if err := h.sync(); err != nil {
		return err
	}
	h.pristine.Store(size)
	return nil
}

// sync makes every write that returned before durable. A failure is final: what the host dropped is
// unknown, so no later write or sync may succeed (I6).
func (h *hostFile) sync() error {
	if err := h.failure(); err != nil {
		return err
	}
	if h.noSync {
		return nil
	}
	if err := h.s.Sync(); err != nil {
		return h.fail(fmt.Errorf("sync: %w", err))
	}
	return nil
}

// fail makes err the file's failure, if it is the first, and returns the failure in force.
func (h *hostFile) fail(err error) error {
	h.failFirst(err)
	return h.failure()
}

// failFirst makes err the file's failure, and reports whether it is the first.
func (h *hostFile) failFirst(err error) bool {
	h.failMu.Lock()
	defer h.failMu.Unlock()
	if h.failed.Load() != nil {
		return false
	}
	err = &failedError{err}
	h.failed.Store(&err)
	return true
}

// failure returns the error of the first failed sync, or nil.
func (h *hostFile) failure() error {
	if p := h.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// failedError is a failure after which nothing more is written. It Is ErrFailed.
type failedError struct{ err error }

func (e *failedError) Error() string        { return ErrFailed.Error() + ": " + e.err.Error() }
func (e *failedError) Is(target error) bool { return target == ErrFailed }
func (e *failedError) Unwrap() error        { return e.err }

// isNoSpace reports whether err says that the host is full, or its user's share of it.
func isNoSpace(err error) bool { return hostfile.IsNoSpace(err) }
