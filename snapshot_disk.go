package qcow2

import (
	"fmt"
	"io"
	"io/fs"
	"iter"
)

// SnapshotDisk is the content of an internal snapshot, for reading beside the image it is in, which may be written
// meanwhile. It is safe for concurrent use. While it is open its snapshot cannot be deleted (ErrBusy).
type SnapshotDisk struct {
	img  *Image
	info Snapshot
	key  snapshotKey
	// disk reads the snapshot by its own tables, and otherwise with what the image has: files, cache, requests. state
	// does so for the VM state, which has nothing below it.
	disk, state *Image
	stateStart  uint64 // guest offset in bytes
	closing     bool   // Close was called; guarded by the image's mu
}

var _ Disk = (*SnapshotDisk)(nil)

// snapshotKey tells the snapshots of an image apart.
type snapshotKey struct {
	id    string
	l1Off uint64
}

// key returns what tells the snapshot from others.
func (s *snapshot) key() snapshotKey { return snapshotKey{id: s.id, l1Off: s.l1Off} }

// OpenSnapshot opens an internal snapshot for reading. It may be closed before or after the image; once that is closed,
// its reads return fs.ErrClosed. It keeps the snapshot's L1 table in memory.
//
// Errors: ErrSnapshotNotFound, ErrBusy while it is being deleted, *OptionError, ErrLimit for its L1 table, ErrCorrupt,
// ErrUnsupported with an external data file, fs.ErrClosed, and those of the storage. qcow2 spec, "Snapshots".
func (img *Image) OpenSnapshot(ref SnapshotRef) (*SnapshotDisk, error) {
	d, err := img.openSnapshot(ref)
	if err != nil {
		return nil, snapshotError("open", ref, err)
	}
	return d, nil
}

// openSnapshot is OpenSnapshot without the words around the error.
func (img *Image) openSnapshot(ref SnapshotRef) (*SnapshotDisk, error) {
	defer img.reqs.leave(img.reqs.enter()) // the structure of the image stays, and Close waits
	if err := img.readable(); err != nil {
		return nil, err
	}
	if img.m.external {
		return nil, fmt.Errorf("%w: snapshots with an external data file", ErrUnsupported)
	}
	d, s, err := img.pin(ref)
	if err != nil {
		return nil, err
	}
	if err := d.open(s); err != nil {
		img.unpin(d)
		return nil, err
	}
	return d, nil
}

// pin finds a snapshot, and keeps it from being deleted.
func (img *Image) pin(ref SnapshotRef) (*SnapshotDisk, *snapshot, error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.closed.Load() {
		return nil, nil, fs.ErrClosed
	}
	i, err := ref.find(img.snapshots)
	if err != nil {
		return nil, nil, err
	}
	s := img.snapshots[i]
	if img.deleting != nil && *img.deleting == s.key() {
		return nil, nil, fmt.Errorf("%w: the snapshot is being deleted", ErrBusy)
	}
	id, err := img.m.cache.takeID()
	if err != nil {
		return nil, nil, err
	}
	d := &SnapshotDisk{img: img, info: s.public(), key: s.key(), disk: img.shared(id), state: img.shared(id)}
	d.disk.below = img.below
	d.disk.below.owned = false
	if img.opened == nil {
		img.opened = make(map[*SnapshotDisk]struct{})
	}
	img.opened[d] = struct{}{}
	return d, &s, nil
}

// shared returns an image for reading that has all in common with img but the mapping, under a number of its own
// in the cache, and what is below.
func (img *Image) shared(id uint16) *Image {
	m := &mapper{entryRules: img.m.entryRules, id: id, h: img.host, cache: img.m.cache}
	m.mu = &img.mu
	d := &Image{m: m, host: img.host, data: img.data, hdr: img.hdr, codec: img.codec, reqs: img.reqs}
	d.readOnly.Store(true)
	return d
}

// unpin lets the snapshot go.
func (img *Image) unpin(d *SnapshotDisk) {
	img.m.cache.giveID(d.disk.m.id)
	img.mu.Lock()
	defer img.mu.Unlock()
	delete(img.opened, d)
}

// open fills in the mapping.
func (d *SnapshotDisk) open(s *snapshot) error {
	img := d.img
	size, err := img.host.s.Size()
	if err != nil {
		return err
	}
	if n, most := int64(s.l1Size)*l1EntrySize, d.img.limits.MetadataBytes; most > 0 && n > most {
		return &LimitError{Limit: "MetadataBytes", Value: n, Max: most}
	}
	l1, err := img.readSnapshotL1(s, uint64(max(size, 0)))
	if err != nil {
		return err
	}
	d.setL1(l1, s)
	d.disk.size.Store(uint64(d.info.DiskSize) &^ (sectorSize - 1))
	d.stateStart = img.m.stateStart(uint64(d.info.DiskSize))
	return nil
}

// setL1 makes l1 the L1 table, which is that of s. Precondition: nobody reads.
func (d *SnapshotDisk) setL1(l1 *table, s *snapshot) {
	d.disk.m.l1, d.disk.m.l1Off = l1, s.l1Off
	d.state.m.l1, d.state.m.l1Off = l1, s.l1Off
}

// Snapshot describes the snapshot as it was when it was opened.
func (d *SnapshotDisk) Snapshot() Snapshot { return d.info }

// Size returns the size of the disk in the snapshot, in bytes, rounded down to a multiple of 512.
func (d *SnapshotDisk) Size() int64 { return d.disk.Size() }

// ReadAt is io.ReaderAt, as Image.ReadAt.
func (d *SnapshotDisk) ReadAt(p []byte, off int64) (int, error) { return d.disk.ReadAt(p, off) }

// Extents yields the allocation state of the guest range [off, off+n) in the snapshot, as Image.Extents.
func (d *SnapshotDisk) Extents(off, n int64) iter.Seq2[Extent, error] { return d.disk.Extents(off, n) }

// VMState returns a reader of the VM state that was saved with the snapshot. What was never written of it is zeros.
func (d *SnapshotDisk) VMState() *io.SectionReader {
	return io.NewSectionReader(&vmStateReader{d}, 0, d.info.VMStateSize)
}

// vmStateReader reads VM state from its first byte on.
type vmStateReader struct{ d *SnapshotDisk }

// ReadAt is io.ReaderAt without an end.
func (r *vmStateReader) ReadAt(p []byte, off int64) (int, error) {
	d := r.d
	if off < 0 {
		return 0, opError("read VM state", off, len(p), ErrRange)
	}
	defer d.disk.reqs.leave(d.disk.reqs.enter())
	err := d.disk.readable()
	if err == nil {
		err = d.state.readGuest(p, d.stateStart+uint64(off))
	}
	if err != nil {
		return 0, opError("read VM state", off, len(p), err)
	}
	return len(p), nil
}

// Close waits for reads in flight and lets the snapshot go. The image stays open. A second Close is fs.ErrClosed.
func (d *SnapshotDisk) Close() error {
	img := d.img
	img.mu.Lock()
	_, open := img.opened[d]
	first := open && !d.closing
	d.closing = true
	img.mu.Unlock()
	if !first {
		return fmt.Errorf("qcow2: close snapshot: %w", fs.ErrClosed)
	}
	d.disk.closed.Store(true)
	img.reqs.waitPast(img.reqs.advance())
	img.m.cache.forget(d.disk.m.id)
	img.unpin(d)
	return nil
}

// markDeleted returns ErrBusy if the snapshot is open, and otherwise keeps it from being opened until unmarkDeleted.
func (img *Image) markDeleted(s *snapshot) error {
	img.mu.Lock()
	defer img.mu.Unlock()
	key := s.key()
	for d := range img.opened {
		if d.key == key {
			return fmt.Errorf("%w: the snapshot is open", ErrBusy)
		}
	}
	img.deleting = &key
	return nil
}

// unmarkDeleted ends markDeleted.
func (img *Image) unmarkDeleted() {
	img.mu.Lock()
	defer img.mu.Unlock()
	img.deleting = nil
}

// closeSnapshots makes reads of open snapshots return fs.ErrClosed from now on: the image is closed.
func (img *Image) closeSnapshots() {
	img.mu.Lock()
	defer img.mu.Unlock()
	for d := range img.opened {
		d.disk.closed.Store(true)
	}
}

// openSnapshots returns ErrBusy if a snapshot is open: for an operation that changes what open snapshots rely on, such
// as the backing file. Precondition: mu.
func (img *Image) openSnapshots() error {
	if n := len(img.opened); n > 0 {
		return fmt.Errorf("%w: %d snapshots are open", ErrBusy, n)
	}
	return nil
}

// reloadSnapshots reads the L1 tables of open snapshots again, after a repair. One that is gone, or cannot be read, is
// closed. Preconditions: mu, pausing.
func (img *Image) reloadSnapshots(size uint64) {
	for d := range img.opened {
		img.m.cache.forget(d.disk.m.id)
		found := false
		for i := range img.snapshots {
			s := &img.snapshots[i]
			if s.key() != d.key {
				continue
			}
			if l1, err := img.readSnapshotL1(s, size); err == nil {
				d.setL1(l1, s)
				found = true
			}
			break
		}
		if !found {
			d.disk.closed.Store(true)
		}
	}
}
