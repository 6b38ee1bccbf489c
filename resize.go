package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// ResizeOptions says how a disk is resized. The nil pointer and the zero value let it grow, with nothing
// preallocated.
type ResizeOptions struct {
	// Shrink allows a size smaller than the present one: what lies behind it is lost. With the present size, it
	// gives host space back that an earlier shrink, cut short, has left.
	Shrink bool
	// Preallocation maps the new part of the disk when it grows. A raw data file is always mapped, as with
	// PreallocationMetadata at least.
	Preallocation Preallocation
	// Progress, if not nil, is called with the number of bytes of the part that comes or goes that are done
	// with, now and then and at the end, by the goroutine that called Resize.
	Progress func(done, total int64)
}

// Resize makes the disk size bytes long, a multiple of 512. It is durable when it returns, and atomic: after a crash
// the disk has the old size and all of its old content, or the new one. New bytes read as zeros, whatever the
// backing file holds there. Snapshots keep their sizes. Writes and Syncs wait meanwhile, reads go on; those behind
// a smaller size return io.EOF.
//
// A shrink gives the host space back, as a Discard does (OpenOptions.Discard), and the image file ends behind the
// last cluster that is still in use. Persistent bitmaps are marked as in use, as by any change; they keep the size
// that they have.
//
// Errors: *OptionError for a size or options that are not allowed, for a smaller size without Shrink, and where a
// data file on a device is too small; ErrTooLarge for a size beyond the format, ErrLimit beyond the limits;
// ErrUnsupported for a version 2 image with snapshots, and for snapshots that do not say how large their disk is;
// ErrBackingRequired where content of a backing file that was not opened is needed; ErrReadOnly, ErrCorrupt,
// ErrFailed, fs.ErrClosed, and those of ctx and of the storage. The disk is as before then, and the call may be
// tried again; but for a shrink whose new size is in force already, as Size tells, and that could not give all host
// space back: it is not ended by ctx, and may be tried again with the same size.
func (img *Image) Resize(ctx context.Context, size int64, opts *ResizeOptions) error {
	r := resizing{img: img, m: img.m, ctx: ctx, size: uint64(size)}
	if opts != nil {
		r.o = *opts
	}
	err := img.writable()
	if err == nil {
		err = img.alone(r.run)
	}
	if err != nil {
		return fmt.Errorf("qcow2: resize to %d bytes: %w", size, err)
	}
	return nil
}

// resizing is one Resize. It is used by one goroutine, within Image.alone.
type resizing struct {
	img  *Image
	m    *mapper
	ctx  context.Context
	o    ResizeOptions
	size uint64 // the new size of the disk in bytes
	old  uint64 // the old one
}

// run resizes the disk. Nothing is written before all that is known beforehand has been checked.
func (r *resizing) run() error {
	r.old = r.img.size.Load()
	if err := r.check(); err != nil {
		return err
	}
	if err := r.ctx.Err(); err != nil {
		return err
	}
	if err := r.img.startLocked(); err != nil {
		return err
	}
	var err error
	switch {
	case r.size > r.old:
		g := growth{resizing: r}
		err = g.run()
	case r.o.Shrink:
		err = r.shrink()
	}
	if err == nil {
		r.progress(max(r.size, r.old) - min(r.size, r.old))
	}
	return err
}

// progress tells the caller that done bytes are done with.
func (r *resizing) progress(done uint64) {
	if r.o.Progress != nil {
		r.o.Progress(int64(done), int64(max(r.size, r.old)-min(r.size, r.old)))
	}
}

// check returns every reason, joined, why the disk cannot be resized.
func (r *resizing) check() error {
	var errs []error
	refuse := func(bad bool, option string, value any, reason string, args ...any) {
		if bad {
			errs = append(errs, &OptionError{option, value, fmt.Sprintf(reason, args...)})
		}
	}
	m := r.m
	refuse(!r.o.Preallocation.valid(), "Preallocation", int(r.o.Preallocation), "is no Preallocation")
	refuse(r.size <= r.old && r.o.Preallocation != PreallocationOff, "Preallocation", r.o.Preallocation, "is for growing disks only")
	switch {
	case r.size > math.MaxInt64:
		refuse(true, "size", int64(r.size), "want no negative number")
	case r.size%sectorSize != 0:
		refuse(true, "size", r.size, "want a multiple of %d", sectorSize)
	case r.size < r.old:
		refuse(!r.o.Shrink, "Shrink", false, "a disk of %d bytes loses what lies behind %d", r.old, r.size)
	case r.size > r.old:
		errs = append(errs, r.checkGrowth())
	}
	if r.size != r.old && m.version2 && len(r.img.snapshots) > 0 {
		errs = append(errs, fmt.Errorf("%w: a version 2 image with snapshots has one size", ErrUnsupported))
	}
	for i := range r.img.snapshots {
		if s := &r.img.snapshots[i]; r.size != r.old && !m.version2 && len(s.extra) < snapExtraICount {
			errs = append(errs, fmt.Errorf("%w: snapshot %q does not say how large its disk is", ErrUnsupported, s.id))
		}
	}
	return errors.Join(errs...)
}

// checkGrowth returns why a larger disk is beyond the format, the limits or the data file.
func (r *resizing) checkGrowth() error {
	entries := r.m.l1Entries(r.size)
	if entries > maxL1Bytes/l1EntrySize {
		return tooLarge(&r.m.geometry, r.size)
	}
	h := *r.img.hdr
	h.size, h.l1Size = r.size, max(h.l1Size, uint32(entries))
	if err := h.checkSize(r.img.limits); err != nil {
		return err
	}
	if err := h.checkMetadataLimit(r.img.limits); err != nil {
		return err
	}
	if !r.m.external || !r.img.data.fixed {
		return nil
	}
	n, err := r.img.data.s.Size()
	if err == nil && uint64(n) < r.size {
		err = &OptionError{Option: "size", Value: r.size, Reason: fmt.Sprintf("the data file is a device of %d bytes", n)}
	}
	return err
}

// persist makes all that was changed in memory durable, in writeback's order, and then the counts of what was
// dropped, which waits for readers that may use it. Refcounts are written even where they may be late otherwise.
func (r *resizing) persist() error {
	r.img.mu.Lock()
	err := r.m.alloc.writeBack()
	r.img.mu.Unlock()
	if err == nil {
		err = r.img.writeCut()
	}
	if err == nil {
		err = r.img.settle()
	}
	return err
}

// maxDropRuns is how many runs of dropped clusters may wait before they are released: 1 MiB of memory.
const maxDropRuns = 1 << 16

// drop unmaps everything from guest cluster first on, up to the end of the L1 table: with it goes what an earlier
// operation, cut short, or another program has left behind the end of the disk. It is in memory alone at the end;
// where much is dropped, all but the rest is durable and released.
//
// Order: entries of the L2 table that maps first are cleared in the cache, whole tables by their L1 entry. A cut
// makes the entries durable before it lowers the count of what they named (I1, I4).
func (r *resizing) drop(first uint64) error {
	m := r.m
	perTable := uint64(1) << m.l2Bits
	i := first >> m.l2Bits
	if first%perTable != 0 {
		if err := r.dropPart(first); err != nil {
			return err
		}
		i++
	}
	buf := getBuffer(m.clusterSize)
	defer putBuffer(buf)
	for ; i < m.l1.n; i++ {
		if m.l1.load(i) == 0 {
			continue
		}
		if err := r.dropTable(i, *buf); err != nil {
			return err
		}
		if len(m.alloc.freed) < maxDropRuns {
			continue
		}
		if err := r.persist(); err != nil {
			return err
		}
	}
	return nil
}

// dropTable unmaps all that the L2 table of L1 entry i maps, and the table. No change of it waits in memory.
func (r *resizing) dropTable(i uint64, buf []byte) error {
	m := r.m
	guestOff := i << (m.clusterBits + m.l2Bits)
	off, err := m.l2Table(guestOff)
	if err != nil {
		return err
	}
	if err := m.h.readFull(buf, off); err != nil {
		return fmt.Errorf("L2 table: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for j := uint64(0); j < uint64(len(buf)); j += 1 << m.l2EntryBits {
		e := l2Entry{word: binary.BigEndian.Uint64(buf[j:])}
		if err := r.release(e, off+j, guestOff+j>>m.l2EntryBits<<m.clusterBits); err != nil {
			return err
		}
	}
	if m.l1.load(i)&flagCopied == 0 {
		m.h.leave(OverlapActiveL2, off, m.clusterSize) // it stays as a snapshot's
	}
	m.alloc.free(clusterRun{first: off >> m.clusterBits, n: 1})
	m.setL1(i, 0)
	return nil
}

// release drops the references of an L2 entry at host offset off. Precondition: mu.
func (r *resizing) release(e l2Entry, off, guestOff uint64) error {
	held := r.m.held(e)
	if held.n == 0 {
		return nil
	}
	if e.word&flagCompressed == 0 && r.m.offsetInCluster(e.hostOff()) != 0 {
		return corrupt(fmt.Sprintf("L2 entry %#x is not aligned to clusters", e.word), off, guestOff)
	}
	r.m.alloc.freeFor(dropDiscard, held)
	return nil
}

// dropPart unmaps the clusters from first to the end of the L2 table that maps it, which stays.
func (r *resizing) dropPart(first uint64) error {
	m := r.m
	perSlice := uint64(1) << (m.sliceBits - m.l2EntryBits)
	perTable := uint64(1) << m.l2Bits
	for end := (first + perTable) &^ (perTable - 1); first < end; {
		n := min(perSlice-first%perSlice, end-first)
		guestOff := first << m.clusterBits
		if err := r.dropInSlice(guestOff, n); err != nil {
			return err
		}
		first += n
	}
	return nil
}

// dropInSlice unmaps n clusters from guestOff's on, within one slice.
func (r *resizing) dropInSlice(guestOff, n uint64) error {
	m := r.m
	l2Off, err := m.l2Table(guestOff)
	if err != nil || l2Off == 0 {
		return err
	}
	sliceOff, i := m.sliceAt(l2Off, guestOff)
	s, err := m.slice(sliceOff)
	if err != nil {
		return err
	}
	used := false
	for j := range n {
		e := m.entry(s, i+j)
		if e == (l2Entry{}) {
			continue
		}
		used = true
		if e.word&flagCompressed == 0 && m.offsetInCluster(e.hostOff()) != 0 {
			return m.corruptEntry(s, i+j, e, guestOff+j<<m.clusterBits)
		}
	}
	if !used {
		return nil
	}
	return m.update(guestOff, r.img.writeCut, func(words []uint64, i uint64) {
		for j := range n {
			if held := m.held(m.entryOf(words, i+j)); held.n > 0 {
				m.alloc.freeFor(dropDiscard, held)
			}
			m.setEntry(words, i+j, l2Entry{})
		}
	})
}

// entryOf returns entry i of a slice's words, within tableCache.change.
func (m *mapper) entryOf(words []uint64, i uint64) l2Entry {
	if m.extendedL2 {
		return l2Entry{word: words[2*i], bitmap: words[2*i+1]}
	}
	return l2Entry{word: words[i]}
}

// shrink makes the disk smaller.
//
// Order:
//
//	the new size, one header write, durable        the disk is smaller, nobody reads behind its end any more
//	entries behind the end are cleared, durably    writeback's third round
//	their refcounts are lowered, durably           settle
//	the data file is cut, durably
//	blocks that describe nothing in use leave the refcount table, durably
//	the image file is cut, durably
//
// A crash before the first step is durable leaves the disk as it was, whole. One after it leaves the smaller disk:
// mapped clusters behind the end, refcounts and file length agree with each other at every point, or are leaks (I1);
// what is left over there reads back nowhere, since a growth drops it first, and the next shrink gives it back.
// QEMU 7.2 cuts tables and file before entries and counts are durable.
//
// An L2 table that maps both sides of the end and belongs to a snapshot, too, is copied before anything else, so
// that nothing behind the first step needs space.
func (r *resizing) shrink() error {
	img, m := r.img, r.m
	first := m.clusters(r.size)
	if m.l2Index(first<<m.clusterBits) != 0 {
		if err := r.ownBoundary(first << m.clusterBits); err != nil {
			return err
		}
	}
	t := &img.wb.test
	if t.shrinkDropFirst {
		if err := errors.Join(r.drop(first), r.persist()); err != nil {
			return err
		}
	}
	if r.size != r.old {
		off, p := encodeSizeField(r.size)
		if err := img.switchHeader(off, p); err != nil {
			return err
		}
		if err := img.pausing(func() error { r.apply(nil, 0); return nil }); err != nil {
			return err
		}
	}
	if err := r.reclaim(first); err != nil {
		return fmt.Errorf("the disk has its new size, but not all space was given back: %w", err)
	}
	return nil
}

// ownBoundary makes sure that the L2 table that maps guestOff, if there is one, is the active image's alone, durably.
func (r *resizing) ownBoundary(guestOff uint64) error {
	if i := r.m.l1Index(guestOff); r.m.l1.load(i) == 0 || r.m.l1.load(i)&flagCopied != 0 {
		return nil
	}
	r.img.mu.Lock()
	_, err := r.m.ownL2(guestOff)
	r.img.mu.Unlock()
	if err != nil {
		return err
	}
	return r.persist()
}

// apply makes the new size that of the disk in memory, and, if it is not nil, l1 at host offset l1Off its L1 table.
// Precondition: in Image.pausing.
func (r *resizing) apply(l1 *table, l1Off uint64) {
	img, m := r.img, r.m
	img.mu.Lock()
	defer img.mu.Unlock()
	if l1 != nil {
		if m.l1.n > 0 {
			m.h.leave(OverlapActiveL1, m.l1Off, m.l1.n*l1EntrySize)
			m.alloc.free(clusterRun{first: m.l1Off >> m.clusterBits, n: m.clusters(m.l1.n * l1EntrySize)})
		}
		m.l1, m.l1Off = l1, l1Off
		img.hdr.l1Size, img.hdr.l1Off = uint32(l1.n), l1Off
	}
	img.hdr.size = r.size
	img.size.Store(r.size)
	img.decoded.forget()
	img.refreshInfo()
}

// reclaim gives the host space back that guest clusters from first on hold, in the order of shrink.
func (r *resizing) reclaim(first uint64) error {
	img, m := r.img, r.m
	if err := r.clearTail(); err != nil {
		return err
	}
	if err := r.drop(first); err != nil {
		return err
	}
	if img.wb.test.entriesLast {
		return r.reclaimEarly()
	}
	if err := r.persist(); err != nil {
		return err
	}
	if m.external {
		if err := r.truncateData(r.size); err != nil {
			return fmt.Errorf("data file: %w", err)
		}
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	return r.truncateHost()
}

// reclaimEarly breaks the order of shrink on purpose: counts, refcount table and file change before the entries that
// name what goes are cleared, as QEMU 7.2 has it.
func (r *resizing) reclaimEarly() error {
	a := r.m.alloc
	r.img.mu.Lock()
	_, err := a.release(a.freed)
	a.freed = nil
	err = errors.Join(err, r.truncateHost())
	r.img.mu.Unlock()
	return errors.Join(err, r.persist())
}

// clearTail makes the rest of the last cluster zeros, where it is the active image's alone: who lets the disk grow
// without a look at it must not show what was lost. The size that hides it is durable.
func (r *resizing) clearTail() error {
	m := r.m
	in := m.offsetInCluster(r.size)
	if in == 0 || m.external {
		return nil
	}
	entries, err := m.entries(r.size, 1)
	if err != nil {
		return err
	}
	e := entries[0]
	if !m.owned(e) {
		return nil
	}
	for sub := in >> m.subBits; sub<<m.subBits < m.clusterSize; sub++ {
		lo, hi := max(in, sub<<m.subBits), (sub+1)<<m.subBits
		if !m.extendedL2 {
			hi = m.clusterSize
		}
		if m.kind(e, sub) == kindNormal {
			if err := r.img.data.zeroFor(useData, int64(r.size), e.hostOff()+lo, hi-lo); err != nil {
				return err
			}
		}
		if !m.extendedL2 {
			break
		}
	}
	return nil
}

// truncateData cuts the external data file, durably, if it can be cut. Nothing maps what goes.
func (r *resizing) truncateData(size uint64) error {
	data := r.img.data
	if data.fixed {
		return nil
	}
	switch err := data.s.Truncate(int64(size)); {
	case errors.Is(err, errors.ErrUnsupported):
		return nil
	case err != nil:
		return err
	}
	return data.sync()
}

// truncateHost cuts the image file behind the last cluster in use, durably. What is dropped is released, durably.
// Precondition: mu.
//
// Order: see dropBlocks; then the counts of their clusters, sync; the cut, sync. Before the cut is durable nothing is
// written behind the new end.
func (r *resizing) truncateHost() error {
	a, h := r.m.alloc, r.img.host
	t, err := a.findEnd()
	if err != nil {
		return err
	}
	if err := a.dropBlocks(t.blocks); err != nil {
		return err
	}
	size, err := h.s.Size()
	end := t.end << a.g.clusterBits
	if err != nil || h.fixed || uint64(size) <= end {
		return errors.Join(err, a.writeBack())
	}
	if err := a.writeBack(); err != nil {
		return err
	}
	if err := h.sync(); err != nil {
		return err
	}
	err = h.cut(end)
	if errors.Is(err, errors.ErrUnsupported) && h.failure() == nil {
		return nil // the file stays as long as it is
	}
	return err
}

// tooLarge returns the error for a disk of size bytes that no L1 table maps.
func tooLarge(g *geometry, size uint64) error {
	return fmt.Errorf("%w: %w", ErrTooLarge, &OptionError{"size", size,
		fmt.Sprintf("at most %#x bytes with clusters of %d", uint64(maxL1Bytes/l1EntrySize)<<(g.clusterBits+g.l2Bits), g.clusterSize)})
}
