package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// repairer mends an image whose check is done. Every step leaves an image in which nothing is worse than
// before, so that a repair that was interrupted, by a crash or an error, is simply made again:
//
//	1  what hides references: bitmaps and snapshots that cannot be read are dropped      header writes, sync
//	2  COPIED off where there is not exactly one reference                               sync
//	   refcounts raised to the references that the check counts: in place, with new      sync
//	   refcount blocks where some are missing (written, sync, hooked up, sync), or,
//	   where the table or a block cannot be used, in a new table with new blocks beside
//	   the old ones (written, sync, one header write, sync)
//	3  what shares a cluster is parted: see parting; snapshot table entries              sync
//	4  table entries that the format forbids                                             sync
//	   bitmaps that still share a cluster dropped, entries of their tables               sync
//	5  refcounts lowered to the references that are left                                 sync
//	6  COPIED on where there is exactly one reference                                    sync
//	7  if nothing is left: the dirty bit off, sync, the corrupt bit off                  sync
//
// Clearing COPIED makes nothing worse, and raising counts neither once the flags are gone that would speak of one.
// After step 2 the count of every cluster is at least the number of references to it on disk, and stays so: step 4 only
// takes references away, and step 5 lowers only counts whose references are durably gone (I1, I4).
// A new block or table is durable before anything points at it, and the header switches between tables that
// are both right for what is on disk (I3); the old ones are leaks until step 5. COPIED is set only on a
// cluster whose count of one is durable (I7). The bits that keep writers out go last.
//
// What is in a cluster that is something else too is left alone until it has a copy of its own, COPIED included: until
// then it is as wrong as it was. In an image with such clusters, steps 2 to 6 are made again until they have nothing to
// write: a second repair has nothing to write either, whatever is left.
type repairer struct {
	ctx   context.Context
	host  *hostFile
	h     *header
	o     *CheckOptions
	first *checker // the check before the repair
	last  *checker // the check after it

	zeros   *zeroClusters // for entries that read as zeros where no entry says so; nil: none are needed
	changed bool          // something was written since the last sync
	writes  int           // writes so far
	wrote   bool          // something was written at all
	rebuilt bool
}

// errRepairOverlap refuses a write of a repair that would hit metadata of another kind: where two tables share a
// cluster, mending one would break the other.
var errRepairOverlap = errors.New("two tables share a cluster")

// watch makes the list of the metadata that c found, against which every write of the repair is checked, as all
// others are (I8). A hit marks nothing here: what it would have mended stays a finding. The list is as large as
// what c keeps of the tables. The function that it returns puts back what was watched before.
func (r *repairer) watch(c *checker) (restore func()) {
	old, watched, onHit := r.host.metadata, r.host.watched, r.host.onHit
	r.host.metadata = newOverlapList(c.clusterBits, overlapLimits{listBytes: math.MaxInt64})
	r.host.watched = overlapAllKinds
	r.host.onHit = func(e *CorruptError) error { return fmt.Errorf("%w: %w", errRepairOverlap, e) }
	enter := func(k OverlapKinds, off, n uint64) {
		if n > 0 && c.inside(off, n) {
			r.host.enter(k, off, n)
		}
	}
	h := r.h
	enter(OverlapMainHeader, 0, c.clusterSize)
	enter(OverlapActiveL1, h.l1Off, h.l1Bytes())
	enter(OverlapSnapshotTable, h.snapshotsOff, c.snapBytes)
	for _, s := range overlay(c.snapshotL1s()) {
		enter(OverlapInactiveL1, s.lo, s.hi-s.lo)
	}
	for _, t := range c.l2 {
		if t.active > 0 {
			enter(OverlapActiveL2, t.off, c.clusterSize)
		}
		if t.inactive > 0 {
			enter(OverlapInactiveL2, t.off, c.clusterSize)
		}
	}
	if c.refTable != nil {
		enter(OverlapRefcountTable, h.refTableOff, h.refTableBytes())
		for _, chunk := range c.refTable.all() {
			for _, w := range chunk {
				if off := w &^ refTableReserved; off != 0 && c.offsetInCluster(off) == 0 {
					enter(OverlapRefcountBlock, off, c.clusterSize)
				}
			}
		}
	}
	if h.bitmaps != nil {
		enter(OverlapBitmapDirectory, h.bitmaps.dirOff, h.bitmaps.dirSize)
	}
	if h.crypto != nil {
		enter(OverlapCryptoHeader, h.crypto.off, h.crypto.length)
	}
	return func() { r.host.metadata, r.host.watched, r.host.onHit = old, watched, onHit }
}

// mended returns what became of the write of an entry that a finding speaks of: one that would break another
// table is not made, and the finding stays.
func mended(err error) error {
	if errors.Is(err, errRepairOverlap) {
		return nil
	}
	return err
}

// again checks the image as it now is, quietly.
func (r *repairer) again() (*checker, error) {
	size, err := r.host.s.Size()
	if err != nil {
		return nil, err
	}
	c := newChecker(r.ctx, r.host, r.h, size, &CheckOptions{Progress: r.o.Progress})
	c.cutExtra = r.o.Repair == RepairAll
	return c, c.walk()
}

// sync makes what was written durable.
func (r *repairer) sync() error { return r.syncAt(repairSyncOther) }

// syncAt is sync at a place that the crash tests know.
func (r *repairer) syncAt(at repairSync) error {
	if !r.changed || r.o.test.repairSkip == at {
		return nil
	}
	r.changed = false
	return r.host.sync()
}

// write writes p at host offset off.
func (r *repairer) write(use clusterUse, p []byte, off uint64) error {
	r.changed, r.wrote = true, true
	r.writes++
	return r.host.write(use, p, off)
}

// writeHeader writes a part of the header that lies within one sector, and makes it durable.
func (r *repairer) writeHeader(off int64, p []byte) error {
	if len(p) > 0 {
		if err := r.write(useHeader, p, uint64(off)); err != nil {
			return err
		}
	}
	return r.sync()
}

// writeChanged writes the sectors of now, a table at host offset off, that differ from before.
func (r *repairer) writeChanged(use clusterUse, before, now []byte, off uint64) error {
	for i := 0; i < len(now); {
		end := min(i+sectorSize, len(now))
		if string(before[i:end]) == string(now[i:end]) {
			i = end
			continue
		}
		for end < len(now) && string(before[end:min(end+sectorSize, len(now))]) != string(now[end:min(end+sectorSize, len(now))]) {
			end = min(end+sectorSize, len(now))
		}
		if err := r.write(use, now[i:end], off+uint64(i)); err != nil {
			return err
		}
		i = end
	}
	return nil
}

// repair mends what it can of what the first check found.
func (r *repairer) repair() error {
	if err := r.checkDataFile(); err != nil {
		return err
	}
	if r.o.Repair == RepairLeaks {
		return r.repairLeaks()
	}
	if r.first.sound() {
		return r.clearBits()
	}
	if err := r.showReferences(); err != nil {
		return err
	}
	for range maxRounds {
		written := r.writes
		if entangled, err := r.mend(); err != nil {
			return err
		} else if !entangled || r.writes == written {
			break
		}
	}
	return r.clearBits()
}

// maxRounds bounds the rounds of a repair.
const maxRounds = 4

// entangled reports whether clusters are more than one thing, so that what one round mends may make visible what the
// next one can mend. A repair ends when a round has nothing to write, so that another would not either.
func (c *checker) entangled() bool { return len(c.shared)+len(c.split)+len(c.over) > 0 }

// mend is steps 2 to 6. It reports whether the image was entangled before.
func (r *repairer) mend() (entangled bool, err error) {
	c, err := r.again()
	if err != nil {
		return false, err
	}
	entangled = c.entangled()
	restore := r.watch(c)
	defer func() { restore() }()
	p, err := r.planParting(c)
	if err != nil {
		return entangled, err
	}
	table, err := r.planSnapshotTable(c, p)
	if err != nil {
		return entangled, err
	}
	r.zeros = nil
	steps := []func() error{
		func() error { return r.planZeros(c) },
		func() error { return r.raise(c) },
		func() error { return r.moveL1(c, p) },
		func() error { return r.mendSnapshotTable(c, table, p) },
		func() error { return r.moveL2(c, p) },
		func() error { return r.mendEntries(c, p) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return entangled, err
		}
	}
	if c, err = r.again(); err != nil {
		return entangled, err
	}
	restore() // what was parted is something else alone now
	restore = r.watch(c)
	changed, err := r.mendBitmaps(c)
	if err == nil && changed {
		c, err = r.again()
	}
	if err != nil {
		return entangled, err
	}
	return entangled, r.lower(c)
}

// checkDataFile refuses to repair an image with the data file bit that names no data file, unless it is sound. If
// the bit is what is wrong, the clusters are in the image: a repair by it would free them all, and replace the
// offsets that lead to them.
func (r *repairer) checkDataFile() error {
	if !r.h.hasDataFile() || r.h.dataFileName != "" || r.first.sound() {
		return nil
	}
	return &CorruptError{What: "external data file bit without a data file's name", HostOff: fieldIncompatible, GuestOff: noOffset}
}

// sound reports that the check found nothing at all to mend, but for the bits in the header.
func (c *checker) sound() bool { return c.res.Clean() && c.res.PastEnd == 0 && !c.structural }

// repairLeaks lowers refcounts that are too high, and nothing else.
func (r *repairer) repairLeaks() error {
	c := r.first
	if c.uncounted || c.unusable || c.missing {
		return fmt.Errorf("%w: the refcounts cannot be corrected without RepairAll", ErrCorrupt)
	}
	defer r.watch(c)()
	return r.lower(c)
}

// eachCopied replaces every active L1 entry, and every active L2 entry that may hold a cluster, by what f
// returns for it.
func (r *repairer) eachCopied(c *checker, f func(w uint64) (uint64, error)) error {
	err := r.eachL1(c, func(w uint64) (uint64, error) {
		if w&offsetMask == 0 {
			return w, nil
		}
		return f(w)
	})
	if err != nil || c.external {
		return err
	}
	return r.eachL2(c, func(ref l2Ref, p []byte) error {
		if ref.active == 0 {
			return nil
		}
		for i := uint64(0); i < 1<<c.l2Bits; i++ {
			b := p[i<<c.l2EntryBits:]
			w := binary.BigEndian.Uint64(b)
			if w&flagCompressed != 0 || w&offsetMask == 0 {
				continue
			}
			now, err := f(w)
			if err != nil {
				return err
			}
			binary.BigEndian.PutUint64(b, now)
		}
		return nil
	})
}

// eachL1 replaces the entries of the active L1 table by what f returns for them, unless its clusters are something else
// too.
func (r *repairer) eachL1(c *checker, f func(w uint64) (uint64, error)) error {
	if c.shared[sharedTable{OverlapActiveL1, c.hdr.l1Off}] {
		return nil
	}
	err := c.words(c.hdr.l1Off, uint64(c.hdr.l1Size), func(i, w uint64) error {
		now, err := f(w)
		if err != nil || now == w {
			return err
		}
		return mended(r.write(useL1, binary.BigEndian.AppendUint64(nil, now), c.hdr.l1Off+8*i))
	})
	if err != nil {
		return fmt.Errorf("L1 table: %w", err)
	}
	return nil
}

// eachL2 lets f change the content of every L2 table that c found. What it changes in a table whose cluster is something
// else too is not written.
func (r *repairer) eachL2(c *checker, f func(ref l2Ref, p []byte) error) error {
	now := make([]byte, c.clusterSize)
	return c.eachTable(c.l2, func(ref l2Ref, before []byte) error {
		copy(now, before)
		if err := f(ref, now); err != nil {
			return err
		}
		if c.shared[sharedTable{OverlapActiveL2, ref.off}] {
			return nil
		}
		if err := mended(r.writeChanged(useAnyL2, before, now, ref.off)); err != nil {
			return fmt.Errorf("L2 table: %w", err)
		}
		return nil
	})
}

// snapshotL1s returns the L1 tables of the snapshots that can be one.
func (c *checker) snapshotL1s() []span {
	spans := make([]span, len(c.snapshots))
	for i := range c.snapshots {
		if s := &c.snapshots[i]; s.checkL1(&c.geometry) == nil && c.inside(s.l1Off, uint64(s.l1Size)*l1EntrySize) {
			spans[i] = span{lo: s.l1Off, hi: s.l1Off + uint64(s.l1Size)*l1EntrySize}
		}
	}
	return spans
}

// showReferences is step 1: it drops what keeps references from being known. A header write each, within one
// sector: a crash leaves either state.
func (r *repairer) showReferences() error {
	c := r.first
	if err := r.showL1(c); err != nil {
		return err
	}
	if c.uncounted || r.h.checkSnapshotTable(Limits{Snapshots: maxSnapshots}) != nil {
		// Which of the tables it was is found out one after the other.
		if err := r.dropSnapshots(c); err != nil {
			return err
		}
		var err error
		if c, err = r.again(); err != nil {
			return err
		}
	}
	if c.uncounted || c.badBitmaps {
		return r.dropBitmaps()
	}
	return nil
}

// showL1 makes the file so long that it holds the active L1 table, which is all zeros past its end: a truncation
// happens or not.
func (r *repairer) showL1(c *checker) error {
	end := r.h.l1Off + r.h.l1Bytes()
	if r.h.l1Size == 0 || c.inside(r.h.l1Off, r.h.l1Bytes()) {
		return nil
	}
	if r.host.fixed || end > c.size+2*maxL1Bytes {
		return &CorruptError{What: "active L1 table past the end of the file", HostOff: int64(r.h.l1Off), GuestOff: noOffset}
	}
	if err := r.host.s.Truncate(int64(end)); err != nil {
		return fmt.Errorf("active L1 table past the end of the file: %w", err)
	}
	r.changed, r.wrote = true, true
	return r.sync()
}

// dropSnapshots takes those snapshots out of the table that c could not read, and all behind them.
func (r *repairer) dropSnapshots(c *checker) error {
	if uint64(len(c.snapshots)) == uint64(r.h.nbSnapshots) && r.h.checkSnapshotTable(Limits{Snapshots: maxSnapshots}) == nil {
		return nil
	}
	n, at := uint32(len(c.snapshots)), r.h.snapshotsOff
	if n == 0 {
		at = 0
	}
	off, p := encodeSnapshotFields(n, at)
	if err := r.writeHeader(off, p); err != nil {
		return err
	}
	r.h.nbSnapshots, r.h.snapshotsOff = n, at
	return nil
}

// snapshotTablePlan is a new snapshot table, to be written at host offset off.
type snapshotTablePlan struct {
	off     uint64
	data    []byte
	entries []uint64 // where in data the entries begin
}

// planSnapshotTable builds a new snapshot table if entries of the old one are incomplete or too long, or past the end of
// the file, and takes clusters for it at the end of what c counted. Extra data above 1 KiB is not in the new one: no reader opens an image with it,
// so that nobody can have stored there what would be missed, while without the snapshot all of its disk would be.
// So are the new places of L1 tables by p.
func (r *repairer) planSnapshotTable(c *checker, p *parting) (*snapshotTablePlan, error) {
	incomplete := p.table || c.snapBeyond.n > 0 || len(c.snapshots) < int(r.h.nbSnapshots) // the rest is past the end of the file
	var data []byte
	var entries []uint64
	for i, s := range c.snapshots {
		if to, ok := p.l1[i]; ok {
			s.l1Off = to
		}
		incomplete = incomplete || s.cut > 0 || !c.version2 && len(s.extra) < snapExtraDiskSize+8
		data = append(data, make([]byte, -len(data)&7)...)
		entries = append(entries, uint64(len(data)))
		data = s.append(data)
	}
	if !incomplete {
		return nil, nil
	}
	if len(data) == 0 {
		return &snapshotTablePlan{}, nil
	}
	run, err := r.take(c, c.clusters(uint64(len(data))))
	if err != nil {
		return nil, err
	}
	return &snapshotTablePlan{off: run.first << c.clusterBits, data: data, entries: entries}, nil
}

// zeroClusters are clusters of zeros that entries share: each as many as its refcount counts.
type zeroClusters struct {
	first uint64 // the first cluster
	n     uint64 // clusters in use
	used  uint64 // references to the last of them
	most  uint64 // largest refcount
	limit uint64 // clusters that there are
}

// fits reports whether there is a cluster for an entry that counts so often.
func (z *zeroClusters) fits(times uint64) bool {
	return z.n < z.limit || z.n > 0 && times <= z.most-z.used
}

// next returns the cluster for an entry that counts so often.
func (z *zeroClusters) next(times uint64) uint64 {
	if z.n == 0 || times > z.most-z.used {
		z.n, z.used = z.n+1, 0
	}
	z.used += min(times, z.most)
	return z.first + z.n - 1
}

// planZeros writes clusters of zeros for the entries of a version 2 overlay that are to read as zeros: version 2 has
// no other word for that, and as nothing they would show the backing file. They stand behind all that c counted, and
// have the largest refcount until step 5. Nothing names them before step 4.
func (r *repairer) planZeros(c *checker) error {
	if !c.version2 || !r.h.hasBacking() {
		return nil
	}
	z := zeroClusters{most: c.most}
	err := r.eachMended(c, func(ref l2Ref, e, m l2Entry) l2Entry {
		if m.word == 0 {
			z.next(uint64(ref.active) + uint64(ref.inactive))
		}
		return e
	})
	if err != nil || z.n == 0 {
		return err
	}
	run, err := r.take(c, z.n)
	if err != nil {
		return err
	}
	zeros := make([]byte, c.clusterSize)
	for i := range run.n {
		c.refs.set(run.first+i, c.most)
		if err := r.write(useData, zeros, (run.first+i)<<c.clusterBits); err != nil {
			return fmt.Errorf("cluster of zeros: %w", err)
		}
	}
	r.zeros = &zeroClusters{first: run.first, most: c.most, limit: run.n}
	return nil
}

// append appends the snapshot as a table entry with all the extra data that version 3 demands. qcow2 spec,
// "Snapshots".
func (s *snapshot) append(p []byte) []byte {
	extra := s.extra
	if len(extra) < snapExtraDiskSize+8 {
		extra = binary.BigEndian.AppendUint64(nil, s.vmState)
		extra = binary.BigEndian.AppendUint64(extra, s.diskSize)
	}
	be := binary.BigEndian
	p = be.AppendUint64(p, s.l1Off)
	p = be.AppendUint32(p, s.l1Size)
	p = be.AppendUint16(p, uint16(len(s.id)))
	p = be.AppendUint16(p, uint16(len(s.name)))
	p = be.AppendUint32(p, s.dateSec)
	p = be.AppendUint32(p, s.dateNsec)
	p = be.AppendUint64(p, s.vmClock)
	vmState32 := uint32(s.vmState)
	if s.vmState > math.MaxUint32 {
		vmState32 = 0 // the extra data has it
	}
	p = be.AppendUint32(p, vmState32)
	p = be.AppendUint32(p, uint32(len(extra)))
	p = append(p, extra...)
	p = append(p, s.id...)
	return append(p, s.name...)
}

// mendSnapshotTable is step 3: it writes the new snapshot table, or the new places of L1 tables into the old one, and
// takes impossible L1 tables out. The size goes first: an L1 table of no entries is none, wherever it is.
func (r *repairer) mendSnapshotTable(c *checker, plan *snapshotTablePlan, p *parting) error {
	if plan != nil {
		if len(plan.data) > 0 {
			r.host.enter(OverlapSnapshotTable, plan.off, uint64(len(plan.data)))
			if err := r.write(useSnapshotTable, plan.data, plan.off); err != nil {
				return fmt.Errorf("snapshot table: %w", err)
			}
		}
		if err := r.sync(); err != nil {
			return err
		}
		n, at := uint32(len(c.snapshots)), plan.off
		if n == 0 {
			at = 0
		}
		off, p := encodeSnapshotFields(n, at)
		if err := r.writeHeader(off, p); err != nil {
			return err
		}
		r.h.nbSnapshots, r.h.snapshotsOff = n, at
		for i := range c.snapshots {
			c.snapshots[i].entryOff = plan.off + plan.entries[i]
		}
	}
	if c.shared[sharedTable{OverlapSnapshotTable, r.h.snapshotsOff}] {
		return nil
	}
	for i := range c.snapshots {
		s := &c.snapshots[i]
		if to, ok := p.l1[i]; ok {
			if plan == nil {
				if err := r.write(useSnapshotTable, binary.BigEndian.AppendUint64(nil, to), s.entryOff+snapL1Off); err != nil {
					return fmt.Errorf("snapshot table: %w", err)
				}
			}
			s.l1Off = to
			continue
		}
		if s.checkL1(&c.geometry) == nil && (s.l1Size == 0 || c.inside(s.l1Off, uint64(s.l1Size)*l1EntrySize)) {
			continue
		}
		for _, field := range []struct{ off, n uint64 }{{snapL1Size, 4}, {snapL1Off, 8}} {
			if err := mended(r.write(useSnapshotTable, make([]byte, field.n), s.entryOff+field.off)); err != nil {
				return fmt.Errorf("snapshot table: %w", err)
			}
			if err := r.sync(); err != nil {
				return err
			}
		}
		s.l1Size, s.l1Off = 0, 0
	}
	return r.sync()
}

// mendEntries is step 4 for L2 entries; moveL2 is for those of L1 tables. Entries change one by one, each within a sector,
// and each for itself.
func (r *repairer) mendEntries(c *checker, p *parting) error {
	err := r.eachMended(c, func(ref l2Ref, e, m l2Entry) l2Entry {
		if m.word == 0 && r.zeros != nil {
			times := uint64(ref.active) + uint64(ref.inactive)
			if !r.zeros.fits(times) {
				return e // tables that were parted count in another order than planned
			}
			m.word = r.zeros.next(times) << c.clusterBits
		}
		return m
	})
	if err != nil {
		return err
	}
	if err := r.moveData(c, p); err != nil {
		return err
	}
	return r.syncAt(repairSyncMend)
}

// eachMended replaces every L2 entry e that must be mended by what f returns for it; m is what the format alone makes
// of it.
func (r *repairer) eachMended(c *checker, f func(ref l2Ref, e, m l2Entry) l2Entry) error {
	return r.eachL2(c, func(ref l2Ref, p []byte) error {
		guest := uint64(ref.l1Index) << (c.clusterBits + c.l2Bits)
		for i := uint64(0); i < 1<<c.l2Bits; i++ {
			b := p[i<<c.l2EntryBits:]
			e := l2Entry{word: binary.BigEndian.Uint64(b)}
			if c.extendedL2 {
				e.bitmap = binary.BigEndian.Uint64(b[8:])
			}
			if e == (l2Entry{}) {
				continue
			}
			if m := c.mendL2(e, guest+i<<c.clusterBits); m != e {
				c.putEntry(p, i, f(ref, e, m))
			}
		}
		return nil
	})
}

// mendBitmaps takes impossible entries out of the tables of bitmaps. What such a bitmap says is not known any
// more: it is marked as stale, durably, before. Bitmaps in clusters that are still something else too are dropped. It
// reports whether anything was changed, durably.
func (r *repairer) mendBitmaps(c *checker) (changed bool, err error) {
	if r.h.bitmaps == nil {
		return false, nil
	}
	for t := range c.shared {
		if t.kind == OverlapBitmapDirectory {
			return true, r.dropBitmaps()
		}
	}
	entries, err := readBitmapDirectory(r.host.s, int64(c.size), r.h, Limits{MetadataBytes: maxBitmapDirBytes})
	if err != nil {
		return false, err
	}
	for i := range entries {
		b := &entries[i]
		var bad []uint64
		err := c.words(b.tableOff, uint64(b.tableSize), func(i, w uint64) error {
			if off := w & offsetMask; badBitmapEntry(w, c.clusterSize) || off != 0 && !c.inside(off, c.clusterSize) {
				bad = append(bad, b.tableOff+8*i)
			}
			return nil
		})
		if err != nil {
			return changed, fmt.Errorf("bitmap table: %w", err)
		}
		if len(bad) == 0 {
			continue
		}
		changed = true
		if !b.inUse() {
			err := r.write(useBitmapDirectory, binary.BigEndian.AppendUint32(nil, b.flags|bitmapInUse), b.dirOff+bitmapFlags)
			if err == nil {
				err = r.sync()
			}
			if err != nil {
				return changed, fmt.Errorf("bitmap directory: %w", err)
			}
		}
		for _, off := range bad {
			if err := r.write(useBitmapTable, make([]byte, 8), off); err != nil {
				return changed, fmt.Errorf("bitmap table: %w", err)
			}
		}
	}
	return changed, r.syncAt(repairSyncMend)
}

// dropBitmaps switches all bitmaps off in one header write.
func (r *repairer) dropBitmaps() error {
	off, p := r.h.encodeAutoclearField(r.h.autoclear &^ autoclearBitmaps)
	if err := r.writeHeader(off, p); err != nil {
		return err
	}
	r.h.autoclear &^= autoclearBitmaps
	r.h.bitmaps = nil
	return nil
}

// clearBits is step 7, after a last check.
func (r *repairer) clearBits() error {
	size, err := r.host.s.Size()
	if err != nil {
		return err
	}
	c := newChecker(r.ctx, r.host, r.h, size, r.o)
	if found := r.o.Found; found != nil {
		c.found = func(f Finding) {
			f.Left = true
			found(f)
		}
	}
	r.last = c
	if err := c.walk(); err != nil {
		return err
	}
	if !c.res.sound() {
		return nil
	}
	for _, bit := range []uint64{incompatDirty, incompatCorrupt} {
		if r.h.incompatible&bit == 0 {
			continue
		}
		off, p := r.h.encodeIncompatibleField(r.h.incompatible &^ bit)
		if err := r.writeHeader(off, p); err != nil {
			return err
		}
		r.h.incompatible &^= bit
	}
	return nil
}

// result returns what was found, fixed and is left.
func (r *repairer) result() (*CheckResult, error) {
	if r.last == nil {
		if err := r.clearBits(); err != nil {
			return r.first.res, err
		}
	}
	res := *r.last.res
	res.CorruptionsFixed = max(r.first.res.corrupt()-res.corrupt(), 0)
	res.LeaksFixed = max(r.first.res.Leaks-res.Leaks, 0)
	res.Rebuilt = r.rebuilt
	return &res, nil
}
