package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"
	"syscall"
)

// emptyOrder is an ordering of MakeEmpty or Commit that a test breaks. See testHooks.
type emptyOrder int

const (
	emptyOrderKept     emptyOrder = iota
	emptySwitchEarly              // switch to the tables beside before they are durable: breaks I3
	emptyFrontEarly               // write behind the header before nobody refers to it: breaks I3 and I4
	emptyFrontUnsynced            // switch to the tables behind the header before they are durable: breaks I3
	emptyTruncateEarly            // cut the tables beside off before the header has left them: breaks I3
	emptyReadersLate              // exchange the tables without waiting for requests in flight: breaks I4
	emptyLowerEarly               // lower the references of the old tables before the header has left them: breaks I1
	commitOverlayEarly            // empty the overlay before the base is durable: loses data
	emptyOrders                   // how many there are
)

// MakeEmpty makes the image hold nothing: every byte of its disk reads as the backing file has it, or as zero
// without one. The size of the disk, the header, internal snapshots and persistent bitmaps stay; bitmaps are marked as
// stale, as by a write (I9). It is atomic and durable when it returns: a crash at any time leaves all of the content
// of before, or none.
//
// Without snapshots, bitmaps and other structures besides, the cost depends on the size of the disk's L1 table alone,
// and not on how much data there is; what the file held is cut off. Otherwise the tables are read, and the clusters
// that become free stay in the file.
//
// Writes, syncs and other operations wait meanwhile. Reads go on, but for the moment in which the header is switched;
// each finds the old content or the new.
//
// An external data file is emptied as well, and what it held then is not taken back: it is done when the image has let
// go of it. A raw one must read as the disk at any moment, which two files cannot do together: ErrUnsupported.
//
// ctx is looked at until the header is switched. Errors: why the image takes no writes (WriteAt), ErrUnsupported, that
// of ctx, one that matches syscall.ENOSPC where a full host or device has no room for an empty L1 table beside the one
// in force, and those of the storage. After an error the image is as before, or emptied; where it is ErrFailed,
// nobody knows until it is opened again. That the host does not give space back is no error.
func (img *Image) MakeEmpty(ctx context.Context) error {
	err := img.exclusively(func() error { return img.makeEmpty(ctx) })
	if err != nil {
		return fmt.Errorf("qcow2: make empty: %w", err)
	}
	return nil
}

// makeEmpty is MakeEmpty within exclusively.
func (img *Image) makeEmpty(ctx context.Context) error {
	if img.hdr.rawData() {
		return fmt.Errorf("%w: to empty an image whose raw data file must always read as the disk", ErrUnsupported)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err := errNotBare
	if img.bare() {
		err = img.replaceTables(ctx)
	}
	if err == errNotBare || lacksRoom(err) {
		err = img.dropTree(ctx)
	}
	if err != nil {
		return err
	}
	if img.data != img.host {
		emptyStorage(img.data.s)
	}
	return nil
}

// errNotBare says that an image has more clusters than those of its header and of what it maps.
var errNotBare = errors.New("the image has structures besides its tables")

// lacksRoom reports whether err says that there is no place for tables: the host is full, or the place too far away for the
// format.
func lacksRoom(err error) bool { return isNoSpace(err) || errors.Is(err, ErrTooLarge) }

// bare reports whether nothing but the header stays of the image when it is emptied: it has no snapshots, no bitmaps,
// no crypto header, and no extension of which nobody here knows whether it names clusters.
func (img *Image) bare() bool {
	if img.hdr.nbSnapshots > 0 || img.hdr.cryptMethod != 0 {
		return false
	}
	for _, e := range img.hdr.extensions {
		switch e.typ {
		case extBackingFormat, extDataFile, extFeatureNames:
		default:
			return false
		}
	}
	return true
}

// emptyStorage gives the space of a data file back that no image refers to any more. Where that fails, the content
// stays, and is nobody's. A crash may leave any part of it.
func emptyStorage(s Storage) {
	size, err := s.Size()
	if err != nil || size == 0 || s.PunchHole(0, size) == nil || s.FixedSize() {
		return
	}
	if s.Truncate(0) == nil {
		_ = s.Truncate(size) // a data file that is too short reads as zeros behind its end
	}
}

// bareTables is the metadata of an image that maps nothing, without its header, in one run of host clusters:
//
//	first                 blocks                 l1             end
//	| refcount table ... | refcount blocks ... | L1 table ... |
//
// It describes itself and the header's cluster; to it, everything else is free.
type bareTables struct {
	g         geometry
	first     uint64   // host cluster of the refcount table
	clusters  uint64   // of the refcount table
	covered   []uint64 // the entries of the refcount table that have blocks, in the order of the blocks
	l1Entries uint64
	l1        uint64 // host cluster of the L1 table
	end       uint64 // host cluster behind it
}

// planBareTables lays out tables from host cluster first on, for a disk of size bytes.
func planBareTables(g geometry, first, size uint64) (*bareTables, error) {
	b := &bareTables{g: g, first: first, l1Entries: g.l1Entries(size)}
	block := first >> g.refBlockBits
	n := first&(g.perBlock()-1) + g.clusters(8*b.l1Entries) // what the blocks from this one on describe besides
	if block > 0 {
		n++ // the block of the header's cluster
		b.covered = append(b.covered, 0)
	}
	need, err := g.sizeRefcounts(block, n, false)
	if err != nil {
		return nil, err
	}
	for i := range need.blocks {
		b.covered = append(b.covered, block+i)
	}
	b.clusters = need.tableClusters
	b.l1 = first + b.clusters + uint64(len(b.covered))
	b.end = b.l1 + g.clusters(8*b.l1Entries)
	return b, nil
}

// watch enters the tables into the list of metadata of h, or takes them from it.
func (b *bareTables) watch(h *hostFile, on bool) {
	set := h.leave
	if on {
		set = h.enter
	}
	bits := b.g.clusterBits
	set(OverlapRefcountTable, b.first<<bits, b.clusters<<bits)
	set(OverlapRefcountBlock, (b.first+b.clusters)<<bits, uint64(len(b.covered))<<bits)
	if b.l1Entries > 0 {
		set(OverlapActiveL1, b.l1<<bits, (b.end-b.l1)<<bits)
	}
}

// table returns the refcount table.
func (b *bareTables) table() *table {
	t := newTable(b.clusters << b.g.clusterBits / 8)
	for i, entry := range b.covered {
		t.store(entry, (b.first+b.clusters+uint64(i))<<b.g.clusterBits)
	}
	return t
}

// write writes the tables to h.
func (b *bareTables) write(h *hostFile) error {
	bits := b.g.clusterBits
	buf := make([]byte, b.g.clusterSize)
	t := b.table()
	if err := h.writeRefcountTable(t, buf, b.first<<bits, b.clusters<<bits); err != nil {
		return err
	}
	for i, entry := range b.covered {
		clear(buf)
		lo := entry << b.g.refBlockBits
		if lo == 0 {
			setRefcountAt(buf, b.g.refcountOrder, 0, 1)
		}
		for ci := max(b.first, lo); ci < min(b.end, lo+b.g.perBlock()); ci++ {
			setRefcountAt(buf, b.g.refcountOrder, ci-lo, 1)
		}
		if err := h.write(useRefcountBlock, buf, (b.first+b.clusters+uint64(i))<<bits); err != nil {
			return fmt.Errorf("new refcount block: %w", err)
		}
	}
	if err := h.zero(useL1, b.l1<<bits, (b.end-b.l1)<<bits); err != nil {
		return fmt.Errorf("new L1 table: %w", err)
	}
	return nil
}

// l1Off returns the host offset of the L1 table; a disk of no bytes has none.
func (b *bareTables) l1Off() uint64 {
	if b.l1Entries == 0 {
		return 0
	}
	return b.l1 << b.g.clusterBits
}

// encodeFields returns the update of the header that switches to the tables: the fields of the L1 table and those of
// the refcount table follow each other.
func (b *bareTables) encodeFields() (off int64, p []byte) {
	off, p = encodeL1Fields(uint32(b.l1Entries), b.l1Off())
	_, q := encodeRefcountTableFields(b.first<<b.g.clusterBits, uint32(b.clusters))
	return off, append(p, q...)
}

// replaceTables empties an image of which nothing but the header stays, in a time that does not depend on how much it
// holds: everything that it refers to is left behind at once.
//
// Order, with the host clusters from left to right, H the header and * what it names:
//
//	0  H [old tables and data *                ]
//	1  H [old tables and data *                ] [beside  ]    new tables in free clusters, sync
//	2  H [nobody's                             ] [beside *]    one write of the header, sync
//	3  H [front] [nobody's                     ] [beside *]    the same tables behind the header, sync
//	4  H [front *] [nobody's                                ]  one write of the header, sync
//	5  H [front *]                                             the file is cut, sync
//
// Up to 2 a crash leaves the image as it was, with something in clusters that are free. From there on it leaves an
// empty one: the tables beside are whole, and describe themselves and the header, so the clusters that 3 writes are
// free to them. The front is whole before 4 names it. Refcounts on disk are exact at any time (I1), and no dirty bit is
// needed. Requests in flight that found old clusters are waited for in 2, before 3 writes there (I4).
//
// An error up to 2 changes nothing. One in 3 or later, which is not that of a sync, leaves the image empty with its
// tables where they are; that the file is longer than it must be is not an error.
func (img *Image) replaceTables(ctx context.Context) error {
	front, err := planBareTables(img.m.geometry, 1, img.size.Load())
	if err != nil {
		return err
	}
	if front.end > img.m.alloc.limit {
		return fmt.Errorf("empty tables up to host %#x: %w", front.end<<img.m.clusterBits, syscall.ENOSPC)
	}
	t := img.wb.test.emptyOrder
	if t == emptyFrontEarly {
		if err := front.write(img.host); err != nil {
			return err
		}
	}
	if err := img.switchBeside(ctx, front.end); err != nil {
		return err
	}
	if err := img.switchFront(front); err != nil {
		return img.host.failure()
	}
	return nil
}

// switchBeside does the steps 1 and 2 of replaceTables. The clusters before front are left alone. Behind the end of
// the file there is room without a search, if it can grow; else free clusters are looked for.
func (img *Image) switchBeside(ctx context.Context, front uint64) error {
	size, err := img.host.s.Size()
	if err != nil {
		return err
	}
	end := img.m.clusters(uint64(size))
	err = error(syscall.ENOSPC)
	if !img.host.fixed {
		if err = img.switchInto(ctx, max(front, end), math.MaxUint64); err != nil && img.host.failure() == nil {
			_ = img.host.s.Truncate(size) // what was written behind the end is nobody's
		}
	}
	if lacksRoom(err) && img.host.failure() == nil {
		err = img.switchInto(ctx, front, end)
	}
	return err
}

// switchInto writes tables into the first free clusters from host cluster from on, and not at or behind end, and switches
// to them.
func (img *Image) switchInto(ctx context.Context, from, end uint64) error {
	beside, err := img.placeBeside(from)
	if err != nil {
		return err
	}
	if beside.end > end {
		return fmt.Errorf("%d free clusters for empty tables: %w", beside.end-beside.first, syscall.ENOSPC)
	}
	h := img.host
	beside.watch(h, true)
	err = beside.write(h)
	if err == nil && img.wb.test.emptyOrder != emptySwitchEarly {
		err = h.sync()
	}
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = img.switchTables(beside)
	}
	if err != nil {
		beside.watch(h, false)
	}
	return err
}

// placeBeside plans tables in the first run of free clusters at or after host cluster from that is long enough. It
// changes nothing.
func (img *Image) placeBeside(from uint64) (*bareTables, error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	for {
		b, err := planBareTables(img.m.geometry, from, img.size.Load())
		if err != nil {
			return nil, err
		}
		r, err := img.m.alloc.vacant(from, b.end-b.first)
		if err != nil {
			return nil, fmt.Errorf("empty tables: %w", err)
		}
		if r.first == from {
			return b, nil
		}
		from = r.first // farther on, the refcount table may have to be longer
	}
}

// vacant returns the first run of n free clusters at or after host cluster from. Clusters without a refcount block are
// free, and none is made: this changes nothing.
func (a *allocator) vacant(from, n uint64) (clusterRun, error) {
	run := clusterRun{first: from}
	for run.n < n {
		ci := run.first + run.n
		if n-run.n > a.limit || ci > a.limit-(n-run.n) {
			return run, fmt.Errorf("%d clusters at host %#x: %w", n, run.first<<a.g.clusterBits, syscall.ENOSPC)
		}
		if !a.covered(ci) {
			run.n = min(n, run.n+a.g.perBlock()-ci&(a.g.perBlock()-1))
			continue
		}
		free, taken, err := a.look(ci, n-run.n)
		if err != nil {
			return run, err
		}
		if free > 0 {
			run.n += free
			continue
		}
		run = clusterRun{first: ci + taken}
	}
	return run, nil
}

// switchTables makes the header name the tables b, and then has them in memory, while nobody reads.
func (img *Image) switchTables(b *bareTables) error {
	return img.pausingUnlessTested(func() error {
		if err := img.switchHeader(b.encodeFields()); err != nil {
			return err
		}
		img.mu.Lock()
		defer img.mu.Unlock()
		img.setEmptyL1(uint32(b.l1Entries), b.l1Off())
		h := img.hdr
		h.refTableOff, h.refTableClusters = b.first<<b.g.clusterBits, uint32(b.clusters)
		img.m.alloc.reload(b.g, b.table(), h.refTableOff, b.clusters)
		img.refreshInfo()
		img.info.EndOffset = int64(b.end << b.g.clusterBits)
		if img.newMetadataList() {
			img.host.enter(OverlapMainHeader, 0, b.g.clusterSize)
			b.watch(img.host, true)
		}
		return nil
	})
}

// pausingUnlessTested is pausing, unless a test wants to see what that is for.
func (img *Image) pausingUnlessTested(f func() error) error {
	if img.wb.test.emptyOrder == emptyReadersLate {
		return f()
	}
	return img.pausing(f)
}

// setEmptyL1 has an L1 table of n zero entries at host offset off in memory. Preconditions: those of pausing, and mu.
func (img *Image) setEmptyL1(n uint32, off uint64) {
	m := img.m
	img.hdr.l1Size, img.hdr.l1Off = n, off
	m.l1, m.l1Off = newTable(uint64(n)), off
	clear(m.l1Dirty)
	m.cache.forget(m.id)
	img.decoded.forget()
}

// switchFront does the steps 3 to 5 of replaceTables.
func (img *Image) switchFront(front *bareTables) error {
	h, t := img.host, img.wb.test.emptyOrder
	front.watch(h, true)
	err := front.write(h)
	if err == nil && t != emptyFrontUnsynced {
		err = h.sync()
	}
	if err == nil && t == emptyTruncateEarly {
		err = img.cutFile(front.end)
	}
	if err == nil {
		err = img.switchTables(front)
	}
	if err != nil {
		front.watch(h, false)
		return err
	}
	return img.cutFile(front.end)
}

// cutFile ends the file behind host cluster end, durably, if that can be. Nothing that the image names is there.
func (img *Image) cutFile(end uint64) error {
	h := img.host
	size := end << img.m.clusterBits
	if h.fixed {
		return nil
	}
	if err := h.cut(size); err != nil {
		return err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	img.hdr.fileSize = int64(size)
	img.refreshInfo()
	return nil
}

// dropTree empties an image that has snapshots, bitmaps or other clusters of its own: the active L1 table is replaced by
// an empty one, and the references of the tables below it are taken back.
//
// Order: an empty L1 table in free clusters, with its refcounts, sync; one write of the header, sync; the references
// of the old tables and of the old L1 table are lowered, sync. Up to the switch a crash leaves the image as it was, with
// a leak; from there on an empty one, whose counts are too high at worst (I1).
//
// An error up to the switch gives the new clusters back. One behind it leaves the image empty; references that could not
// be lowered are tried again by the next write-back.
func (img *Image) dropTree(ctx context.Context) error {
	m := img.m
	w, err := img.newSnapshotWork()
	if err != nil {
		return err
	}
	old, err := img.collectTree(ctx, m.l1, m.l1Off, math.MaxUint64, w.size)
	if err != nil {
		return err
	}
	oldL1 := clusterRun{first: m.l1Off >> m.clusterBits, n: m.clusters(m.l1.n * l1EntrySize)}
	old.refs.addRun(oldL1, 1)
	img.mu.Lock()
	err = m.alloc.surveyRefs(ctx, old.refs, bulkLower)
	img.mu.Unlock()
	if err != nil {
		return err
	}
	if err := img.replaceL1(ctx, w, old); err != nil {
		w.giveBack()
		return err
	}
	img.host.leave(OverlapActiveL1, oldL1.first<<m.clusterBits, oldL1.n<<m.clusterBits)
	if err := w.lower(old, false); err != nil {
		return fmt.Errorf("the image is empty, but not all of its clusters are free: %w", err)
	}
	return nil
}

// replaceL1 switches from the L1 table of old to an empty one.
func (img *Image) replaceL1(ctx context.Context, w *snapshotWork, old *refTree) error {
	m := img.m
	entries := m.l1Entries(img.size.Load())
	off := uint64(0)
	if n := m.clusters(entries * l1EntrySize); n > 0 {
		r, err := w.take(n, OverlapActiveL1)
		if err != nil {
			return fmt.Errorf("empty L1 table: %w", err)
		}
		off = r.first << m.clusterBits
		if err := img.host.zero(useL1, off, n<<m.clusterBits); err != nil {
			return fmt.Errorf("empty L1 table: %w", err)
		}
	}
	if err := w.bringOut(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if img.wb.test.emptyOrder == emptyLowerEarly {
		_, _ = w.applyRefs(old.refs, bulkLower, math.MaxUint64)
		old.refs = newRefWords()
	}
	return img.pausingUnlessTested(func() error {
		if err := img.switchHeader(encodeL1Fields(uint32(entries), off)); err != nil {
			return err
		}
		img.mu.Lock()
		defer img.mu.Unlock()
		img.setEmptyL1(uint32(entries), off)
		img.refreshInfo()
		w.runs = nil
		return nil
	})
}
