package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"
)

// SnapshotOptions says what is noted with a new snapshot. The zero value is what qemu-img snapshot -c notes, without a
// name.
type SnapshotOptions struct {
	// ID is the identifier, which no other snapshot may have. At most 65535 bytes, of which QEMU knows 127; no NUL.
	// Default: the largest number that an identifier begins with, plus one.
	ID string
	// Name is the name, which need not be unique. At most 65535 bytes, of which QEMU knows 255; no NUL.
	Name string
	// Date is when the snapshot is taken, between 1970 and 2106. Default: now.
	Date time.Time
	// VMClock is how long the machine has run. It must not be negative.
	VMClock time.Duration
	// ICount is the number of instructions that it has executed; -1: not recorded.
	ICount int64
	// VMState is read for VMStateSize bytes: the state of a machine, to be kept with the snapshot. It is read while
	// nobody can write to the image, so it must not wait for that. QEMU finds the state where it looks for its own.
	VMState     io.Reader
	VMStateSize int64
}

// validate returns all options that are not allowed, joined, or nil. The defaults are filled in.
func (o *SnapshotOptions) validate() error {
	var errs []error
	refuse := func(bad bool, option string, value any, reason string) {
		if bad {
			errs = append(errs, &OptionError{Option: option, Value: value, Reason: reason})
		}
	}
	for _, f := range []struct{ option, value string }{{"ID", o.ID}, {"Name", o.Name}} {
		refuse(len(f.value) > math.MaxUint16, f.option, len(f.value), "is the length in bytes, at most 65535")
		refuse(strings.IndexByte(f.value, 0) >= 0, f.option, f.value, "must not hold a NUL")
	}
	sec := o.Date.Unix()
	refuse(sec < 0 || sec > math.MaxUint32, "Date", o.Date, "does not lie between 1970 and 2106")
	refuse(o.VMClock < 0, "VMClock", o.VMClock, "must not be negative")
	refuse(o.ICount < -1, "ICount", o.ICount, "must not be negative, but for -1")
	refuse(o.VMStateSize < 0, "VMStateSize", o.VMStateSize, "must not be negative")
	refuse(o.VMStateSize > 0 && o.VMState == nil, "VMState", nil, "is needed with VMStateSize")
	refuse(o.VMStateSize == 0 && o.VMState != nil, "VMStateSize", 0, "is needed with VMState")
	return errors.Join(errs...)
}

// CreateSnapshot keeps the present content of the disk as an internal snapshot, and returns it. What every call that
// returned before has written is in it; writes beside it wait, and are not. It costs time in proportion to the tables
// of the disk, not to its content, and two bytes of memory for each cluster that the disk has.
//
// It is atomic and durable: a crash leaves the image with the snapshot or without it, and at worst leaks and lost COPIED
// flags. After an error the image is as before, and the call may be tried again. The context ends it before its last
// step only.
//
// Errors: *OptionError, ErrUnsupported with an external data file, ErrTooLarge where a refcount is too narrow (one bit
// counts no snapshot, two bits count two) or for more than 65536 snapshots, ErrLimit, ErrCorrupt where tables or
// refcounts are not sound, the error of VMState, those of the context and of WriteAt. qcow2 spec, "Snapshots".
func (img *Image) CreateSnapshot(ctx context.Context, opts *SnapshotOptions) (Snapshot, error) {
	var o SnapshotOptions
	if opts != nil {
		o = *opts
	}
	if o.Date.IsZero() {
		o.Date = time.Now()
	}
	s, err := img.createSnapshot(ctx, &o)
	if err != nil {
		return Snapshot{}, fmt.Errorf("qcow2: create snapshot %q: %w", o.Name, err)
	}
	return s, nil
}

// createSnapshot is CreateSnapshot without the words around the error.
func (img *Image) createSnapshot(ctx context.Context, o *SnapshotOptions) (created Snapshot, err error) {
	if err := errors.Join(o.validate(), img.snapshotsWritable()); err != nil {
		return created, err
	}
	err = img.alone(func() error {
		c, err := img.planSnapshot(ctx, o)
		if err != nil {
			return err
		}
		if err := c.carryOut(ctx, o); err != nil {
			return c.undo(err)
		}
		created = c.list[len(c.list)-1].public()
		return nil
	})
	return created, err
}

// snapshotsWritable returns why no snapshot of the image can be made, applied or deleted, or nil.
func (img *Image) snapshotsWritable() error {
	if err := img.writable(); err != nil {
		return err
	}
	if img.m.external {
		return fmt.Errorf("%w: snapshots with an external data file", ErrUnsupported)
	}
	return nil
}

// snapshotCreation is a snapshot that is being made.
type snapshotCreation struct {
	*snapshotWork
	s       snapshot
	entries uint64   // of the active L1 table that map the disk, which the snapshot shares
	tree    *refTree // what they refer to
	raised  uint64   // refcounts of clusters below are raised
	cleared bool     // COPIED flags may have been taken away
}

// planSnapshot finds out whether the snapshot can be made. It changes nothing.
func (img *Image) planSnapshot(ctx context.Context, o *SnapshotOptions) (*snapshotCreation, error) {
	m := img.m
	w, err := img.newSnapshotWork()
	if err != nil {
		return nil, err
	}
	c := &snapshotCreation{snapshotWork: w, entries: m.l1Entries(img.hdr.size)}
	c.s = snapshot{
		id: o.ID, name: o.Name, dateSec: uint32(o.Date.Unix()), dateNsec: uint32(o.Date.Nanosecond()),
		vmClock: uint64(o.VMClock), vmState: uint64(o.VMStateSize), diskSize: img.hdr.size, icount: uint64(o.ICount),
	}
	if c.s.id == "" {
		c.s.id = nextSnapshotID(img.snapshots)
	}
	for i := range img.snapshots {
		if img.snapshots[i].id == c.s.id {
			return nil, &OptionError{Option: "ID", Value: o.ID, Reason: "is that of another snapshot"}
		}
	}
	for _, v := range []uint64{c.s.vmState, c.s.diskSize, c.s.icount} {
		c.s.extra = binary.BigEndian.AppendUint64(c.s.extra, v)
	}
	entries := c.entries + m.l1Entries(c.s.vmState)
	if entries > maxL1Bytes/l1EntrySize {
		return nil, fmt.Errorf("%w: a VM state of %d bytes needs an L1 table of %d entries, at most %d", ErrTooLarge, c.s.vmState, entries, maxL1Bytes/l1EntrySize)
	}
	c.s.l1Size = uint32(entries)
	c.list = append(append(c.list, img.snapshots...), c.s)
	if err := img.checkList(c.list); err != nil {
		return nil, err
	}
	if c.tree, err = img.collectTree(ctx, m.l1, m.l1Off, c.entries, c.size); err != nil {
		return nil, err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	return c, m.alloc.surveyRefs(ctx, c.tree.refs, bulkRaise)
}

// carryOut makes the snapshot.
//
// Order:
//
//	1  VM state, L1 table and snapshot table in new clusters, and their refcounts; COPIED off in the active
//	   L2 and L1 tables                                                                              sync
//	2  refcounts of all that the disk refers to raised                                               sync
//	3  the header names the new snapshot table                                                       sync
//
// What a crash leaves: before the end of step 1, leaks and lost COPIED flags, while each refcount is what it was (I7).
// In step 2, counts that are too high, which are leaks, of clusters without COPIED, so nobody writes to them in place.
// In step 3, either header: what the new one names is durable (I3), and counted (I1). The old snapshot table is freed
// after the switch is durable.
func (c *snapshotCreation) carryOut(ctx context.Context, o *SnapshotOptions) error {
	img, m := c.img, c.img.m
	if err := c.placeL1(ctx, o); err != nil {
		return err
	}
	c.list[len(c.list)-1] = c.s
	if err := c.placeTable(c.list); err != nil {
		return err
	}
	c.cleared = true
	if err := img.clearCopied(ctx, c.tree.tables, c.size); err != nil {
		return err
	}
	err := img.editL1(func(i, w uint64) uint64 {
		if i < c.entries {
			w &^= flagCopied
		}
		return w
	})
	if err != nil {
		return err
	}
	if err := c.bringOut(); err != nil {
		return err
	}
	if c.raised, err = c.raise(ctx, c.tree.refs); err != nil {
		return err
	}
	for _, t := range c.tree.tables {
		img.host.enter(OverlapInactiveL2, t.off, m.clusterSize)
	}
	if err := c.switchTable(); err != nil {
		return err
	}
	return img.forgetSlices()
}

// raise raises the refcounts of refs, durably, and then looks at the context for the last time. It returns below which
// cluster they are raised, also with an error.
func (w *snapshotWork) raise(ctx context.Context, refs *refWords) (below uint64, err error) {
	below, err = w.applyRefs(refs, bulkRaise, math.MaxUint64)
	if err == nil {
		err = w.sync(snapshotSyncRaise)
	}
	if err == nil {
		err = ctx.Err()
	}
	return below, err
}

// applyRefs is allocator.applyRefs.
func (w *snapshotWork) applyRefs(refs *refWords, change bulkChange, below uint64) (uint64, error) {
	w.img.mu.Lock()
	defer w.img.mu.Unlock()
	return w.img.m.alloc.applyRefs(refs, change, below)
}

// placeL1 writes the snapshot's L1 table beside the active one, and the VM state that it maps behind the disk. Nothing
// names it yet. No entry is COPIED.
func (c *snapshotCreation) placeL1(ctx context.Context, o *SnapshotOptions) error {
	m := c.img.m
	if c.s.l1Size == 0 {
		return nil
	}
	n := m.clusters(uint64(c.s.l1Size) * l1EntrySize)
	p := make([]byte, n<<m.clusterBits)
	for i := range c.entries {
		binary.BigEndian.PutUint64(p[8*i:], m.l1.load(i)&offsetMask)
	}
	if err := c.writeState(ctx, o.VMState, p[8*c.entries:]); err != nil {
		return fmt.Errorf("VM state: %w", err)
	}
	r, err := c.take(n, OverlapInactiveL1)
	if err != nil {
		return fmt.Errorf("new L1 table: %w", err)
	}
	c.s.l1Off = r.first << m.clusterBits
	if err := c.img.host.write(useInactiveL1, p, c.s.l1Off); err != nil {
		return fmt.Errorf("new L1 table: %w", err)
	}
	return nil
}

// undo takes everything back after err, in the opposite order: the counts lowered again, sync; then COPIED where the
// count is one. Where that fails, too, leaks and lost COPIED flags are left. It returns err, and what else failed.
func (c *snapshotCreation) undo(err error) error {
	img, m := c.img, c.img.m
	if img.host.failure() != nil {
		return err
	}
	errs := []error{err}
	img.mu.Lock()
	lerr := m.alloc.lowerAgain(c.tree.refs, c.raised)
	for _, t := range c.tree.tables {
		if c.tree.refs.load(t.off>>m.clusterBits)&refStoredOne != 0 {
			img.host.leave(OverlapInactiveL2, t.off, m.clusterSize)
		}
	}
	img.mu.Unlock()
	c.giveBack()
	if lerr == nil {
		lerr = c.bringOut()
	}
	if lerr == nil && c.cleared {
		lerr = img.setCopied(context.Background(), c.tree.refs, c.size)
	}
	if lerr != nil {
		errs = append(errs, fmt.Errorf("take the snapshot back: %w", lerr))
	}
	if c.cleared {
		errs = append(errs, img.forgetSlices())
	}
	return errors.Join(errs...)
}

// lowerAgain takes a raise for refs of clusters below the given one back. What cannot be lowered now is tried again by
// the next write-back. Precondition: mu.
func (a *allocator) lowerAgain(refs *refWords, below uint64) error {
	if below == 0 {
		return nil
	}
	done, err := a.applyRefs(refs, bulkLower, below)
	if done < below {
		a.dropRefs(refs, done, below)
	}
	return err
}
