package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"
)

// unixEpoch is a date that every snapshot may have.
var unixEpoch = time.Unix(0, 0)

// ApplySnapshot makes the disk what it was when the snapshot was taken, its size included. What it holds now is lost,
// unless another snapshot holds it; the snapshot stays. Of reads beside it, each reads the disk as it was before or
// as it is afterwards, not both. Its VM state is not touched: OpenSnapshot reads it.
//
// Persistent bitmaps do not know what changes, and are marked as in use before, as by any write (QEMU refuses to apply
// a snapshot then). In version 2 too a snapshot may have another size.
//
// It is atomic and durable: a crash leaves the disk as before or as in the snapshot, and at worst leaks and lost COPIED
// flags. After an error the image is as before, unless the error says that the snapshot is applied: then what
// failed was to free what the disk held, of which some may be leaks. The context ends it before that only.
//
// Errors: ErrSnapshotNotFound, ErrTooLarge where a refcount is too narrow, ErrLimit for the snapshot's size,
// ErrCorrupt where tables or refcounts are not sound, *OptionError, ErrUnsupported with an external data file, those
// of the context and of WriteAt. qcow2 spec, "Snapshots".
func (img *Image) ApplySnapshot(ctx context.Context, ref SnapshotRef) error {
	err := errors.Join(ref.validate(), img.snapshotsWritable())
	if err == nil {
		_, err = img.findSnapshot(ref) // nothing is marked for a snapshot that is not there
	}
	if err == nil {
		err = img.exclusively(func() error {
			i, err := ref.find(img.snapshots)
			if err != nil {
				return err
			}
			return img.applySnapshot(ctx, i)
		})
	}
	if err != nil {
		return snapshotError("apply", ref, err)
	}
	return nil
}

// snapshotApplication is a snapshot that is being applied.
type snapshotApplication struct {
	*snapshotWork
	s      snapshot
	hdr    header    // the header with the disk's new size and L1 table
	l1     *table    // what becomes the active L1 table
	tree   *refTree  // what it refers to
	old    *refTree  // what the present one does
	more   *refWords // references that tree has more of than old; old is left with what it has more of
	raised uint64    // refcounts of clusters below are raised
}

// applySnapshot is ApplySnapshot of snapshot i. Precondition: exclusively.
func (img *Image) applySnapshot(ctx context.Context, i int) error {
	w, err := img.newSnapshotWork()
	if err != nil {
		return err
	}
	c := &snapshotApplication{snapshotWork: w, s: img.snapshots[i]}
	if err := c.plan(ctx); err != nil {
		return err
	}
	if err := c.carryOut(ctx); err != nil {
		return c.undo(err)
	}
	if err := c.freeOld(); err != nil {
		return fmt.Errorf("the snapshot is applied, but not all that the disk held is free: %w", err)
	}
	return nil
}

// plan finds out whether the snapshot can be applied. It changes nothing.
//
// Both trees are counted, and only their difference is changed: raised where the snapshot's refers to a cluster more
// often, lowered where the present one does. So a cluster that both hold needs no room for a third reference.
func (c *snapshotApplication) plan(ctx context.Context) error {
	img, m := c.img, c.img.m
	if c.s.diskSize > math.MaxInt64 {
		return &CorruptError{What: fmt.Sprintf("snapshot of a disk of %#x bytes", c.s.diskSize), HostOff: int64(c.s.entryOff), GuestOff: noOffset}
	}
	c.hdr = *img.hdr
	c.hdr.size = c.s.diskSize
	entries := m.l1Entries(c.s.diskSize)
	if entries > maxL1Bytes/l1EntrySize {
		return fmt.Errorf("%w: a disk of %#x bytes needs an L1 table of %d entries, at most %d", ErrTooLarge, c.s.diskSize, entries, maxL1Bytes/l1EntrySize)
	}
	c.hdr.l1Size, c.hdr.l1Off = uint32(entries), m.clusterSize
	if err := c.hdr.validate(img.limits); err != nil {
		return err
	}
	from, err := img.readSnapshotL1(&c.s, c.size)
	if err != nil {
		return err
	}
	c.l1 = newTable(entries)
	for k, chunk := range from.all() {
		for j := range chunk {
			i := k<<tableChunkBits + uint64(j)
			e := from.at(chunk, j)
			if !img.wb.test.keepCopied {
				e &= offsetMask
			}
			if i < entries && e != 0 {
				c.l1.store(i, e)
			}
		}
	}
	if c.tree, err = img.collectTree(ctx, c.l1, c.s.l1Off, entries, c.size); err != nil {
		return err
	}
	if c.old, err = img.collectTree(ctx, m.l1, m.l1Off, math.MaxUint64, c.size); err != nil {
		return err
	}
	c.more = c.tree.refs
	cancel(c.more, c.old.refs)
	c.old.refs.addRun(clusterRun{first: m.l1Off >> m.clusterBits, n: m.clusters(m.l1.n * l1EntrySize)}, 1)
	img.mu.Lock()
	defer img.mu.Unlock()
	if err := m.alloc.surveyRefs(ctx, c.more, bulkRaise); err != nil {
		return err
	}
	return m.alloc.surveyRefs(ctx, c.old.refs, bulkLower)
}

// carryOut switches to the snapshot.
//
// Order:
//
//	1  a copy of the snapshot's L1 table in new clusters, without COPIED, and their refcounts; COPIED off in the L2
//	   tables of the snapshot                                                                             sync
//	2  refcounts raised of all that the snapshot refers to more often than the disk does                  sync
//	3  the header names the copy, and the disk's size, in one write                                       sync
//	4  refcounts lowered of all that the disk referred to more often, and of the old L1 table             sync
//
// What a crash leaves: in steps 1 and 2, leaks, while the disk is as before. Tables of the snapshot that it has
// in common with the disk have no COPIED flag to lose; of the others the flags say nothing. In step 3, either disk: what
// the new header names is durable (I3), counted (I1), and nowhere COPIED, as all of it is the snapshot's too (I7): that
// is where QEMU 7.2 has the flags of the time before the snapshot. In step 4, leaks.
func (c *snapshotApplication) carryOut(ctx context.Context) error {
	img, m := c.img, c.img.m
	if c.l1.n > 0 {
		n := m.clusters(c.l1.n * l1EntrySize)
		r, err := c.take(n, OverlapActiveL1)
		if err != nil {
			return fmt.Errorf("new L1 table: %w", err)
		}
		c.hdr.l1Off = r.first << m.clusterBits
		p := make([]byte, n<<m.clusterBits)
		c.l1.encode(p, 0)
		if err := img.host.write(useL1, p, c.hdr.l1Off); err != nil {
			return fmt.Errorf("new L1 table: %w", err)
		}
	} else {
		c.hdr.l1Off = 0
	}
	if !img.wb.test.keepCopied {
		if err := img.clearCopied(ctx, c.tree.tables, c.size); err != nil {
			return err
		}
	}
	if err := c.bringOut(); err != nil {
		return err
	}
	var err error
	if c.raised, err = c.raise(ctx, c.more); err != nil {
		return err
	}
	for _, t := range c.tree.tables {
		img.host.enter(OverlapActiveL2, t.off, m.clusterSize)
	}
	return img.pausing(c.switchDisk)
}

// switchDisk switches to the snapshot, on the host and in memory. Precondition: pausing.
func (c *snapshotApplication) switchDisk() error {
	img, m := c.img, c.img.m
	if err := img.switchTo(c.hdr.encodeSizeAndL1(c.hdr.size, c.hdr.l1Size, c.hdr.l1Off)); err != nil {
		return err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	img.host.leave(OverlapActiveL1, m.l1Off, m.l1.n*l1EntrySize)
	img.hdr.size, img.hdr.l1Size, img.hdr.l1Off = c.hdr.size, c.hdr.l1Size, c.hdr.l1Off
	m.l1, m.l1Off = c.l1, c.hdr.l1Off
	clear(m.l1Dirty)
	m.cache.forget(m.id)
	img.decoded.forget()
	img.size.Store(img.hdr.virtualSize())
	img.refreshInfo()
	c.runs = nil
	return nil
}

// freeOld frees what the disk held before.
func (c *snapshotApplication) freeOld() error {
	return c.lower(c.old, false)
}

// undo takes everything back after err. Where that fails, too, leaks are left. It returns err, and what else failed.
func (c *snapshotApplication) undo(err error) error {
	img, m := c.img, c.img.m
	if img.host.failure() != nil {
		return err
	}
	img.mu.Lock()
	lerr := m.alloc.lowerAgain(c.more, c.raised)
	c.unlistTables(c.tree.tables, nil)
	img.mu.Unlock()
	c.giveBack()
	if lerr == nil {
		lerr = c.bringOut()
	}
	if lerr != nil {
		return errors.Join(err, fmt.Errorf("take it back: %w", lerr))
	}
	return err
}
