package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
)

// AmendOptions says what Amend changes of an image. The zero value changes nothing.
type AmendOptions struct {
	// Version is the version that the image is to have, 2 or 3. Default 0: it stays.
	//
	// Version 2 has no zero clusters: Amend writes out those of the image and of its snapshots, which takes space,
	// unless they may become nothing at all where there is no backing file. Whatever else version 2 lacks is
	// refused by name: refcounts of other widths than 16 bits (unless RefcountBits is given with it), lazy
	// refcounts, a data file, extended L2 entries, zstd, persistent bitmaps, unknown features and header fields,
	// and snapshots of another size than the disk or with 4 GiB of VM state and more.
	Version int
	// RefcountBits is the width of a refcount: 1, 2, 4, ... 64. Default 0: it stays.
	RefcountBits int
	// LazyRefcounts lets refcounts lag behind on disk, or no longer. Default nil: it stays.
	LazyRefcounts *bool
	// DataFileRaw says whether the data file alone must always read as the disk; it can only be given up. Default
	// nil: it stays.
	DataFileRaw *bool
	// Progress, if not nil, is called with the bytes that were written of the zero clusters and refcount blocks that
	// are to be. It must not call the image.
	Progress func(done, total int64)
}

// validate returns all options that are not allowed, joined, or nil.
func (o *AmendOptions) validate() error {
	var errs []error
	refuse := func(bad bool, option string, value any, reason string) {
		if bad {
			errs = append(errs, &OptionError{Option: option, Value: value, Reason: reason})
		}
	}
	refuse(o.Version != 0 && o.Version != 2 && o.Version != 3, "Version", o.Version, "want 2 or 3")
	bits := o.RefcountBits
	refuse(bits != 0 && !isPowerOfTwo(bits, 1, 1<<maxRefcountOrder), "RefcountBits", bits, "want a power of two from 1 to 64")
	refuse(o.Version == 2 && bits != 0 && bits != defaultRefcountBits, "RefcountBits", bits, "version 2 has 16")
	refuse(o.Version == 2 && o.LazyRefcounts != nil && *o.LazyRefcounts, "LazyRefcounts", true, "needs version 3")
	return errors.Join(errs...)
}

// Amend changes features of the image. Writes, and a Sync, wait until it is done; reads go on.
//
// All of it takes effect in one moment, durably when Amend returns: after a crash, an error or the end of ctx the
// image has the old features or the new ones, and the same content; at worst zero clusters are written out already.
//
// Errors: *OptionError for what is not allowed or does not fit the image, all of them joined; ErrTooLarge for a refcount
// beyond the new width; ErrHeaderFull, before anything is written; ErrReadOnly; ErrCorrupt for tables that are
// malformed; ErrFailed; the error of ctx, and those of the storage.
func (img *Image) Amend(ctx context.Context, opts *AmendOptions) error {
	var o AmendOptions
	if opts != nil {
		o = *opts
	}
	err := o.validate()
	if err == nil {
		err = img.writable()
	}
	if err == nil {
		err = img.alone(func() error { return (&amender{img: img, ctx: ctx, o: &o}).run() })
	}
	if err != nil {
		return fmt.Errorf("qcow2: amend: %w", err)
	}
	return nil
}

// amender is one Amend. What it changes is new beside what is in force, until one header write switches to all of it:
//
//	1  zero clusters are written out, if version 2 is to be (zeroExpansion)    syncs of its own
//	2  a new snapshot table, if version 3 demands more of its entries,
//	   its clusters counted                                                    sync
//	3  new refcount blocks and a new table, which count themselves (widening)  sync
//	4  the header: version, features, refcount width, both pointers            rewriteHeader
//	5  what the header named before is freed                                   no sync
//
// A crash before step 4 is durable leaves the old header and what it names, unchanged but for the zero clusters, which
// read as before; after it the new one, which names what is durable (I3), with refcounts that are right for every
// reference on disk (I1). What a crash leaves of steps 2, 3 and 5 are leaks, or bytes that nothing counts or names.
// An error before the end of step 4 gives back what was allocated.
type amender struct {
	img  *Image
	ctx  context.Context
	o    *AmendOptions
	h    *header // as it is to be
	done int64   // of Progress
	all  int64
}

// run carries the amend out. Only within alone.
func (a *amender) run() (err error) {
	if err := a.plan(); err != nil {
		return err
	}
	img := a.img
	old := img.hdr
	// The dirty bit is off and stays so: every cut writes the refcounts.
	lazy := img.lazy
	img.lazy = false
	defer func() {
		if err != nil {
			img.lazy = lazy
		}
	}()
	width := newWidening(img, uint(a.h.refcountOrder))
	if a.h.refcountOrder != old.refcountOrder {
		if err := width.survey(a.ctx); err != nil {
			return err
		}
		a.all += int64(width.blocks()) << img.m.clusterBits
	}
	if _, _, err := img.planRewrite(a.h); err != nil {
		return err
	}
	if a.h.version < old.version {
		if err := a.expandZeros(); err != nil {
			return err
		}
	}
	table, err := a.placeSnapshots()
	if err != nil {
		return err
	}
	// What was allocated may have moved the refcount table since the plan.
	a.h.refTableOff, a.h.refTableClusters = old.refTableOff, old.refTableClusters
	if a.h.refcountOrder != old.refcountOrder {
		err = width.write(a.ctx, a.progress)
		a.h.refTableOff, a.h.refTableClusters = width.tableOff, uint32(width.tableClusters)
	}
	if err == nil {
		_, err = img.rewriteHeader(a.h)
	}
	if err != nil {
		if img.host.failure() == nil {
			width.giveUp()
			img.mu.Lock()
			img.m.alloc.undo(table)
			img.mu.Unlock()
			img.host.leave(OverlapSnapshotTable, table.first<<img.m.clusterBits, table.n<<img.m.clusterBits)
		}
		return err
	}
	return a.finish(width, table.n > 0)
}

// plan makes the header as it is to be, or returns all that speaks against it.
func (a *amender) plan() error {
	var errs []error
	old, o := a.img.hdr, a.o
	h := old.clone()
	a.h = h
	target := max(uint32(o.Version), 0)
	if target == 0 {
		target = old.version
	}
	order := old.refcountOrder
	if o.RefcountBits != 0 {
		order = log2(o.RefcountBits)
	}
	refuse := func(bad bool, option string, value any, reason string, args ...any) {
		if bad {
			errs = append(errs, &OptionError{Option: option, Value: value, Reason: fmt.Sprintf(reason, args...)})
		}
	}
	if target < 3 {
		if o.Version == 2 && old.version > 2 {
			a.refuseOld(order, refuse)
		}
		refuse(order != 4 && o.RefcountBits != 0, "RefcountBits", o.RefcountBits, "version 2 has 16")
		refuse(o.LazyRefcounts != nil && *o.LazyRefcounts, "LazyRefcounts", true, "needs version 3")
	}
	if raw := o.DataFileRaw; raw != nil && *raw != old.rawData() {
		refuse(*raw, "DataFileRaw", true, "cannot be set on an image that exists")
		h.autoclear &^= autoclearRawData
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	h.setVersion(target)
	h.refcountOrder = order
	if lazy := o.LazyRefcounts; lazy != nil && target >= 3 {
		h.compatible &^= compatLazyRefcounts
		if *lazy {
			h.compatible |= compatLazyRefcounts
		}
	}
	return nil
}

// refuseOld refuses what the image has and version 2 has not.
func (a *amender) refuseOld(order uint32, refuse func(bad bool, option string, value any, reason string, args ...any)) {
	h := a.img.hdr
	no := func(bad bool, reason string, args ...any) { refuse(bad, "Version", 2, reason, args...) }
	no(order != 4, "the image has refcounts of %d bits, version 2 has 16: set RefcountBits too", 1<<order)
	no(h.hasDataFile(), "the image has an external data file")
	no(h.extendedL2(), "the image has extended L2 entries")
	no(h.compression != CompressionDeflate, "the image has compression type %v", h.compression)
	no(h.bitmaps != nil, "the image has persistent bitmaps")
	for _, f := range []struct {
		typ   featureType
		word  uint64
		known uint64
	}{
		{featureCompatible, h.compatible, compatKnown},
		{featureAutoclear, h.autoclear, autoclearKnown},
	} {
		names := h.unknownFeatures(f.typ, f.word, f.known)
		no(names != nil, "the image has unknown features %q", names)
	}
	no(!isZero(h.unknownFields) || !isZero(h.padding), "the header has unknown fields")
	size := a.img.size.Load()
	for i := range a.img.snapshots {
		s := &a.img.snapshots[i]
		no(s.diskSize != size, "snapshot %q has a disk of %d bytes, not %d", s.id, s.diskSize, size)
		no(s.vmState > math.MaxUint32, "snapshot %q has %d bytes of VM state", s.id, s.vmState)
	}
}

// progress counts n bytes as written.
func (a *amender) progress(n int64) {
	a.done += n
	if a.o.Progress != nil {
		a.o.Progress(a.done, a.all)
	}
}

// placeSnapshots writes a new snapshot table beside the old one, and names it in the header to be, if an entry lacks
// what version 3 demands. It returns the clusters of the new table; none if the old one will do.
func (a *amender) placeSnapshots() (clusterRun, error) {
	img := a.img
	lacks := func(s snapshot) bool { return len(s.extra) < snapExtraDiskSize+8 }
	if a.h.version < 3 || img.hdr.version >= 3 || !slices.ContainsFunc(img.snapshots, lacks) {
		return clusterRun{}, nil
	}
	var data []byte
	for i := range img.snapshots {
		data = append(data, make([]byte, -len(data)&7)...)
		data = img.snapshots[i].append(data)
	}
	m := img.m
	img.mu.Lock()
	run, err := m.alloc.allocRun(m.alloc.many, m.clusters(uint64(len(data))))
	img.mu.Unlock()
	if err != nil {
		return clusterRun{}, fmt.Errorf("new snapshot table: %w", err)
	}
	off, n := run.first<<m.clusterBits, run.n<<m.clusterBits
	img.host.enter(OverlapSnapshotTable, off, n)
	err = img.host.write(useSnapshotTable, append(data, make([]byte, n-uint64(len(data)))...), off)
	if err == nil && img.wb.test.amendSkip != amendSyncSnapshots {
		err = img.writeCut() // with its refcounts
	}
	if err != nil {
		img.host.leave(OverlapSnapshotTable, off, n)
		img.mu.Lock()
		m.alloc.undo(run)
		img.mu.Unlock()
		return clusterRun{}, fmt.Errorf("new snapshot table: %w", err)
	}
	a.h.snapshotsOff = off
	return run, nil
}

// finish is what follows the switch: the memory is made what the disk is now, and what the header named before is
// freed. Readers may still look at none of that.
func (a *amender) finish(width *widening, tableMoved bool) error {
	img := a.img
	var freed []freedRun
	if width.placed {
		freed = width.old()
	}
	if n := img.snapshotTableBytes(); tableMoved && n > 0 {
		freed = append(freed, freedRun{clusterRun{first: img.hdr.snapshotsOff >> img.m.clusterBits, n: img.m.clusters(n)}, dropOther})
	}
	if err := img.reload(); err != nil {
		return err
	}
	if a.done = a.all; a.o.Progress != nil {
		a.o.Progress(a.done, a.all)
	}
	if len(freed) == 0 {
		return nil
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	img.wb.lowered = true
	rest, err := img.m.alloc.release(freed)
	for _, r := range rest {
		img.m.alloc.freeFor(r.cause, r.clusterRun) // the next cut tries again
	}
	_ = errors.Join(err, img.m.alloc.writeBack()) // what could not be written stays dirty
	return nil
}
