package qcow2

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/go-qcow2/qcow2/internal/codec"
)

// Image is an open qcow2 image: a block device of Size bytes. All methods are safe for concurrent use.
type Image struct {
	m    *mapper
	host *hostFile // the image file
	data *hostFile // where guest data is: the image file, or the external data file
	// hdr is what the header on disk says. It changes in exclusively, but for the place of the refcount table, which
	// mu guards, and incompatible.
	hdr   *header
	size  atomic.Uint64 // of the disk in bytes; changes in exclusively
	codec codec.Type    // of compressed clusters; immutable after open
	info  Info          // guarded by mu

	openedWith OpenOptions // with defaults; immutable after open, but what they point to may have changed

	turns     atomic.Uint64 // operations that were alone with the image
	chainMu   sync.Mutex    // held by who exchanges what lies below, from before he reads it: Commit, Rebase
	below     backing       // changes while no request is registered; read by who is one
	ownsHost  bool
	ownsData  bool
	readOnly  atomic.Bool // a Commit writes its base for a while
	checkOnly bool        // only Check works; there is no mapper
	repairs   bool        // Check may repair, although nothing else may write
	lazy      bool        // refcounts may lag behind on disk, under the dirty bit
	discard   DiscardMode // OpenOptions.Discard; immutable after open
	noUnref   bool        // OpenOptions.DiscardNoUnref; immutable after open
	snapshots []snapshot  // guarded by mu

	opened   map[*SnapshotDisk]struct{} // snapshots that are open; guarded by mu
	deleting *snapshotKey               // the snapshot that is being deleted, or nil; guarded by mu

	reqs    *requests
	mu      sync.Mutex // the metadata lock: mapper and allocator
	wb      writeback
	decoded decodeCache

	startMu sync.Mutex
	started atomic.Bool  // bitmaps are marked; set once, under startMu
	marking bool         // marking the bitmaps has begun, and may have taken them from the header; guarded by startMu
	bitmaps []bitmapMark // what there is to mark

	featureMu sync.Mutex          // guards hdr.incompatible, and the order in which it is written
	onCorrupt func(*CorruptError) // OpenOptions.OnCorrupt
	overlap   OverlapCheck        // OpenOptions.OverlapCheck
	limits    Limits              // OpenOptions.Limits, with defaults, of an image that is open for writing

	closed  atomic.Bool
	closing atomic.Bool // the last write-back
}

var (
	_ io.ReaderAt = (*Image)(nil)
	_ io.WriterAt = (*Image)(nil)
	_ io.Closer   = (*Image)(nil)
	_ Disk        = (*Image)(nil)
)

// opError adds what was being done at the exported edge.
func opError(op string, off int64, n int, err error) error {
	return fmt.Errorf("qcow2: %s %d bytes at guest %#x: %w", op, n, off, err)
}

// Size returns the size of the disk in bytes: the header's, rounded down to a multiple of 512.
func (img *Image) Size() int64 { return int64(img.size.Load()) }

// Info describes the image as it is; EndOffset, Dirty, Corrupt and FileSize are as of open, or of the last operation
// that changed the header.
func (img *Image) Info() Info {
	img.mu.Lock()
	defer img.mu.Unlock()
	info := img.info
	info.UnknownIncompatible = slices.Clone(info.UnknownIncompatible)
	info.UnknownCompatible = slices.Clone(info.UnknownCompatible)
	info.UnknownAutoclear = slices.Clone(info.UnknownAutoclear)
	info.UnknownExtensions = slices.Clone(info.UnknownExtensions)
	return info
}

// Backing returns the disk below the image, or nil. Commit and Rebase may close what it returned and put another
// disk into its place.
func (img *Image) Backing() Disk { return img.lower().disk }

// lower returns what lies below the image now.
func (img *Image) lower() backing {
	defer img.reqs.leave(img.reqs.enter())
	return img.below
}

// Snapshots returns the internal snapshots in the order of the snapshot table.
func (img *Image) Snapshots() []Snapshot {
	img.mu.Lock()
	defer img.mu.Unlock()
	out := make([]Snapshot, len(img.snapshots))
	for i := range img.snapshots {
		out[i] = img.snapshots[i].public()
	}
	return out
}

// ReadAt is io.ReaderAt. It returns a nil error whenever it filled p, and io.EOF only when the end of the
// disk kept it from that. A read beside a write of the same range sees each sector as it was before or
// after, as far as the storage keeps that promise.
//
// Errors: ErrCorrupt for a range whose entries are malformed (nothing is marked, other ranges still
// read), ErrBackingRequired for what a backing file holds that was not opened, ErrRange for a negative
// offset, fs.ErrClosed, and those of the storage.
func (img *Image) ReadAt(p []byte, off int64) (int, error) {
	n, err := img.readAt(p, off)
	if err != nil && err != io.EOF {
		err = opError("read", off, len(p), err)
	}
	return n, err
}

// readAt is ReadAt without the words around the error.
func (img *Image) readAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, ErrRange
	}
	s := img.reqs.enter()
	defer img.reqs.leave(s)
	if err := img.readable(); err != nil {
		return 0, err
	}
	size := img.size.Load()
	if uint64(off) >= size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	if left := size - uint64(off); uint64(len(p)) > left {
		if err := img.readGuest(p[:left], uint64(off)); err != nil {
			return 0, err
		}
		return int(left), io.EOF
	}
	if err := img.readGuest(p, uint64(off)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// readGuest reads p at guestOff. The range lies within the disk, and the caller is a registered request or
// holds the clusters exclusively.
func (img *Image) readGuest(p []byte, guestOff uint64) error {
	for len(p) > 0 {
		x, err := img.m.resolve(guestOff, uint64(len(p)))
		if err != nil {
			return err
		}
		part := p[:x.n]
		switch x.kind {
		case kindNormal:
			err = img.data.readFull(part, x.hostOff)
		case kindCompressed:
			err = img.readCompressed(part, guestOff, x)
		case kindUnallocated:
			err = img.readBacking(part, guestOff)
		default:
			clear(part)
		}
		if err != nil {
			return err
		}
		p, guestOff = p[x.n:], guestOff+x.n
	}
	return nil
}

// readBacking reads what the image itself does not hold: the backing disk, and zeros past its end.
func (img *Image) readBacking(p []byte, guestOff uint64) error { return img.below.read(p, guestOff) }

// WriteAt is io.WriterAt. It never grows the disk: a range that does not lie within it is ErrRange, and
// nothing is written. What it wrote is durable after the next Sync; until then a crash leaves old or new
// content, sector by sector.
//
// Errors: ErrReadOnly, ErrRange, fs.ErrClosed, ErrCorrupt where the mapping of the range is malformed,
// ErrFailed after a failed sync, and those of the storage. Where the host is full or a write fails, n
// bytes were written, everything else is as before, and the call may be tried again.
func (img *Image) WriteAt(p []byte, off int64) (int, error) {
	if err := img.checkRange(off, int64(len(p))); err != nil {
		return 0, opError("write", off, len(p), err)
	}
	n, err := img.write(p, uint64(off))
	if err == nil {
		err = img.relieve()
	}
	if err != nil {
		err = opError("write", off, len(p), err)
	}
	return n, err
}

// checkRange checks the range of a change of n bytes at off, and makes ready for the first one.
func (img *Image) checkRange(off, n int64) error {
	if err := img.writable(); err != nil {
		return err
	}
	if off < 0 || n < 0 {
		return ErrRange
	}
	if err := img.within(uint64(off), uint64(n)); err != nil {
		return err
	}
	if !img.started.Load() {
		return img.start()
	}
	return nil
}

// within returns ErrRange if n bytes at guestOff do not lie within the disk.
func (img *Image) within(guestOff, n uint64) error {
	if size := img.size.Load(); guestOff > size || n > size-guestOff {
		return fmt.Errorf("%w of %d bytes", ErrRange, size)
	}
	return nil
}

// writableAt returns why n bytes at guestOff take no write, or nil. The caller holds their clusters, or is
// registered as a writer of them, so that what it says stays so: an operation that changes the disk's size holds all
// clusters.
func (img *Image) writableAt(guestOff, n uint64) error {
	if err := img.writable(); err != nil {
		return err
	}
	return img.within(guestOff, n)
}

// readable returns why the image cannot be read, or nil.
func (img *Image) readable() error {
	switch {
	case img.closed.Load():
		return fs.ErrClosed
	case img.checkOnly:
		return ErrCheckOnly
	}
	return nil
}

// writable returns why the image takes no writes, or nil.
func (img *Image) writable() error {
	switch {
	case img.closed.Load():
		return fs.ErrClosed
	case img.checkOnly:
		return ErrCheckOnly
	case img.readOnly.Load():
		return ErrReadOnly
	}
	return img.host.failure()
}

// start makes ready for the first change of guest data: persistent bitmaps are marked as in use, since
// nobody keeps them from now on (I9).
//
// Order: autoclear bit 0 off, sync; the flags in the directory, sync; the bit on again, sync. A crash before
// the last step leaves bitmaps that nobody vouches for, whose clusters are leaks; after it, bitmaps that
// say themselves that they are stale. Guest data is not written before the end.
func (img *Image) start() error {
	img.startMu.Lock()
	defer img.startMu.Unlock()
	defer img.reqs.leave(img.reqs.enter()) // Close waits for it
	if img.closed.Load() {
		return fs.ErrClosed
	}
	return img.startLocked()
}

// startLocked is start for Close, too. Precondition: startMu.
func (img *Image) startLocked() error {
	if img.started.Load() {
		return nil
	}
	if len(img.bitmaps) > 0 {
		img.marking = true
		if err := img.markBitmaps(); err != nil {
			return fmt.Errorf("mark bitmaps: %w", err)
		}
	}
	img.started.Store(true)
	return nil
}

// endMarking ends what a start that failed began, at the last moment: otherwise nobody would vouch for the
// bitmaps any more, and their clusters would be leaks. Precondition: startMu.
func (img *Image) endMarking() error {
	if !img.marking {
		return nil
	}
	return img.startLocked()
}

// markBitmaps sets the in_use flag of the bitmaps, in the order of start.
func (img *Image) markBitmaps() error {
	features := img.hdr.autoclear
	if err := img.setAutoclear(features &^ autoclearBitmaps); err != nil {
		return err
	}
	for _, b := range img.bitmaps {
		p := []byte{byte(b.flags >> 24), byte(b.flags >> 16), byte(b.flags >> 8), byte(b.flags)}
		if err := img.host.write(useBitmapDirectory, p, b.off); err != nil {
			return err
		}
	}
	if err := img.host.sync(); err != nil {
		return err
	}
	return img.setAutoclear(features)
}

// setAutoclear writes the header's autoclear features, durably.
func (img *Image) setAutoclear(features uint64) error {
	if err := img.host.writeHeader(img.hdr.encodeAutoclearField(features)); err != nil {
		return err
	}
	return img.host.sync()
}

// Sync makes every call that returned before it was called durable: its data, and the metadata that maps
// it. Calls beside it go on. Syncs at the same time share their work.
//
// A failed Sync of the host is final (ErrFailed): what was lost is unknown, and the image takes no more
// writes. After any other error, a full host say, nothing is lost and Sync may be tried again.
func (img *Image) Sync() error {
	if img.closed.Load() {
		return fmt.Errorf("qcow2: sync: %w", fs.ErrClosed)
	}
	if img.readOnly.Load() {
		return nil
	}
	if err := img.flush(); err != nil {
		return fmt.Errorf("qcow2: sync: %w", err)
	}
	img.giveBack()
	return nil
}

// Close waits for calls in flight, writes everything back, makes it durable and releases the image. It
// closes only what the library opened. A second Close is fs.ErrClosed. After an error the image is closed
// all the same, and consistent on disk; what was not synced before may be lost.
func (img *Image) Close() error {
	if img.closed.Swap(true) {
		return fmt.Errorf("qcow2: close: %w", fs.ErrClosed)
	}
	img.closeSnapshots()
	img.reqs.drain()
	var err error
	if !img.readOnly.Load() {
		err = img.finish()
		img.wb.stop()
	}
	if err := errors.Join(err, img.release()); err != nil {
		return fmt.Errorf("qcow2: close: %w", err)
	}
	return nil
}

// Abandon closes the image without writing anything back: what was not synced may be lost, the image stays
// consistent, as after a crash: with lazy refcounts the dirty bit stays set. It waits for calls in flight.
func (img *Image) Abandon() error {
	if img.closed.Swap(true) {
		return fmt.Errorf("qcow2: abandon: %w", fs.ErrClosed)
	}
	img.closeSnapshots()
	img.reqs.drain()
	img.wb.stop()
	if err := img.release(); err != nil {
		return fmt.Errorf("qcow2: abandon: %w", err)
	}
	return nil
}

// finish writes back for the last time. No request is in flight, so all that was dropped can be released.
//
// Order: the cut; the lowered refcounts, sync; the dirty bit off, sync. The bit goes only when every refcount
// is durable; an error before leaves it set.
func (img *Image) finish() error {
	img.closing.Store(true)
	if err := img.flush(); err != nil {
		return err
	}
	img.startMu.Lock()
	defer img.startMu.Unlock()
	img.mu.Lock()
	defer img.mu.Unlock()
	a := img.m.alloc
	if err := errors.Join(img.releaseAll(), a.writeBack()); err != nil {
		return err
	}
	if err := img.padFile(); err != nil {
		return err
	}
	if err := img.endMarking(); err != nil {
		return err
	}
	if !img.wb.dirty && !img.wb.lowered {
		return nil
	}
	if err := img.host.sync(); err != nil {
		return err
	}
	if !img.wb.dirty {
		return nil
	}
	if err := img.setDirty(false); err != nil {
		return err
	}
	return img.host.sync()
}

// padFile ends the image file at the end of a cluster, with a hole: readers must take what is missing of the
// last one as zeros, but not all do. It matters to nothing else, so it needs no sync. An image that was not
// written stays as it is.
func (img *Image) padFile() error {
	size, err := img.host.s.Size()
	if err != nil || !img.started.Load() || img.host.fixed || img.m.offsetInCluster(uint64(size)) == 0 {
		return err
	}
	err = img.host.s.Truncate(int64(img.m.clusters(uint64(size)) << img.m.clusterBits))
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// release gives back what the library opened.
func (img *Image) release() error {
	var errs []error
	errs = append(errs, img.below.release())
	if img.data != img.host {
		errs = append(errs, img.data.release(img.ownsData))
	}
	errs = append(errs, img.host.release(img.ownsHost))
	return errors.Join(errs...)
}

// ReadVecAt reads consecutive guest bytes from off on into the buffers of v, as a ReadAt of all of them
// would. Short buffers are read together.
func (img *Image) ReadVecAt(v [][]byte, off int64) (int, error) {
	total, err := img.vecLength(v, off)
	if err == nil && total == 0 {
		return img.ReadAt(nil, off)
	}
	if err != nil {
		return 0, opError("read", off, total, err)
	}
	return img.vectored(v, off, func(p []byte, parts [][]byte, at int64) (int, error) {
		n, err := img.ReadAt(p, at)
		for rest := p[:n]; len(parts) > 0 && len(rest) > 0; parts = parts[1:] {
			rest = rest[copy(parts[0], rest):]
		}
		return n, err
	})
}

// WriteVecAt writes the buffers of v to consecutive guest bytes from off on, as a WriteAt of all of them
// would. Short buffers are written together, so that a cluster that must be allocated is filled once.
func (img *Image) WriteVecAt(v [][]byte, off int64) (int, error) {
	total, err := img.vecLength(v, off)
	if err == nil {
		err = img.checkRange(off, int64(total))
	}
	if err != nil {
		return 0, opError("write", off, total, err)
	}
	return img.vectored(v, off, func(p []byte, parts [][]byte, at int64) (int, error) {
		rest := p
		for _, q := range parts {
			rest = rest[copy(rest, q):]
		}
		return img.WriteAt(p, at)
	})
}

// vecLength returns the sum of the lengths of v. One that cannot be within a disk, or counted, is ErrRange.
func (img *Image) vecLength(v [][]byte, off int64) (int, error) {
	total := 0
	for _, p := range v {
		if len(p) > math.MaxInt-total {
			return 0, ErrRange
		}
		total += len(p)
	}
	if off < 0 {
		return total, ErrRange
	}
	return total, nil
}

// vecChunk is the most bytes that a vectored call moves together by copying.
const vecChunk = 1 << 20

// vectored calls do for the buffers of v one after the other: for a long one itself, with parts nil, and for
// short ones that follow each other with a buffer that stands for all of parts. It ends with the first error, or
// with the first call that did less than asked for.
func (img *Image) vectored(v [][]byte, off int64, do func(p []byte, parts [][]byte, at int64) (int, error)) (int, error) {
	done := 0
	for len(v) > 0 {
		k, n := 1, len(v[0])
		for k < len(v) && n+len(v[k]) <= vecChunk {
			n += len(v[k])
			k++
		}
		var got int
		var err error
		if k == 1 {
			got, err = do(v[0], nil, off+int64(done))
		} else {
			buf := getBuffer(uint64(n))
			got, err = do(*buf, v[:k], off+int64(done))
			putBuffer(buf)
		}
		done += got
		if err != nil {
			return done, err
		}
		v = v[k:]
	}
	return done, nil
}
