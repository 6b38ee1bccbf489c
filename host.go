package qcow2

import (
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

// hostFile is one host file (image or external data file) as the engine uses it: all of its writes and
// syncs pass here. It is safe for concurrent use.
type hostFile struct {
	s      Storage
	fixed  bool // a block device: cannot grow, never-written bytes are garbage
	noSync bool // OpenOptions.NoSync
	locked bool // this open took the image lock; immutable after open

	// pristine is the first host offset in bytes that no write of this open, and nothing in the file
	// at open, has reached. From there on a growing file reads as zeros, before and after a crash,
	// because nothing was ever written there. It only rises, and before the write that raises it.
	pristine atomic.Uint64

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

// write writes p at off. A file that failed a sync takes no more writes.
func (h *hostFile) write(use clusterUse, p []byte, off uint64) error {
	if err := h.failure(); err != nil {
		return err
	}
	h.reach(off + uint64(len(p)))
	n, err := h.s.WriteAt(p, int64(off))
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write %d bytes at host %#x: %w", len(p), off, err)
	}
	return nil
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
	for n > 0 {
		p := zeroChunk[:min(n, uint64(len(zeroChunk)))]
		if err := h.write(use, p, off); err != nil {
			return err
		}
		off += uint64(len(p))
		n -= uint64(len(p))
	}
	return nil
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
	h.failMu.Lock()
	defer h.failMu.Unlock()
	if h.failed.Load() == nil {
		err = &failedError{err}
		h.failed.Store(&err)
	}
	return *h.failed.Load()
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
