package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"syscall"
)

// maxPartBytes bounds the clusters that a repair copies to part what shares some, in bytes. It is far above what a
// damaged entry or header field brings about, and keeps an image whose L1 table names one L2 table a million times
// from growing without end. Over it, nothing is copied, so that a second repair finds the same.
const maxPartBytes = 256 << 20

// parting is what a repair does about clusters that are more than one thing (sharedTable), about L2 tables that can
// be right for one of the L1 entries that name them alone, and about L2 tables that more name than a refcount can
// count: each gets its own copy of the cluster, at a place that nothing named before.
//
// A copy has what the table was read as, but for COPIED, so that what could be read reads the same, whatever the
// table is to be mended to afterwards: that happens to the copy, and does no harm to what else was in the cluster.
// Of two that share a cluster every table moves, as neither tells which of them is the stranger there; guest data,
// the header and the crypto header stay. Refcount tables and blocks move in a rebuild, and bitmaps are
// dropped if they still share a cluster then, since a bitmap that somebody else may have written over says nothing.
//
// With an external data file the place of a cluster is its guest offset, so that a table that two L1 entries name can be
// right for one of them. Each gets its own copy, rather than the second none: an entry that was right for its place is
// right in one of the copies, and what needs no place (zeros, nothing) reads as it did for both. The others are mended
// to their own places in step 4, as those of any table are.
//
// The copies are counted before the refcounts are raised, so that they have a refcount on disk before anything names
// them (I1). What the entries of a copied L2 table refer to is counted once for each L1 entry that names the table:
// a copy that takes some of those over takes nothing else along. Then, in the order of the steps of repairer:
//
//	3a  the copies of L1 tables written            nobody names them                            sync
//	    the header switches to that of the         before or after: both say the same,          sync
//	    active one, in one write                   and both have their refcounts
//	3   snapshot table entries switch to theirs,   each before or after                         sync
//	    in the new snapshot table if there is one
//	3b  the copies of L2 tables, and of guest      nobody names them                            sync
//	    clusters (dataPart), written
//	    L1 entries switch to them, one by one      each before or after; old table and copies   sync
//	                                               have refcounts for all that name them
//
// An error or a crash between any two leaves what was moved, and what was not as it was, with counts that are too
// high (I1, I3). A second repair parts the rest. What remains of the old places is counted down in step 5.
type parting struct {
	places []l1Place          // all L1 tables, before and after
	l1     map[int]uint64     // host offsets of the copies of snapshots' L1 tables, by index of the snapshot
	l2     map[uint64]*l2Part // what becomes of L2 tables, by host offset
	table  bool               // the snapshot table moves
	data   *dataPart          // what becomes of guest data; nil: nothing
}

// l1Place is an L1 table, or the part of one that the same snapshots have.
type l1Place struct {
	use      clusterUse
	from, to uint64 // host offsets before and after; equal if it stays
	n        uint64 // entries
	first    uint64 // index of the first of them
	times    uint64 // how many L1 tables it belongs to
}

// l2Part is what becomes of an L2 table: the L1 entries that name it are put into groups, each with a table for itself.
type l2Part struct {
	most   uint64  // references of a group
	keep   bool    // the first group keeps the table where it is
	groups []l2Ref // the table of each group; at first with the old host offset

	group int    // the group of the last L1 entry
	used  uint64 // the references that it has so far
}

// next returns the group of the next L1 entry, which counts times. The same entries in the same order go into the
// same groups.
func (p *l2Part) next(times uint64) int {
	if p.used > 0 && (p.used >= p.most || times > p.most-p.used) {
		p.group, p.used = p.group+1, 0
	}
	p.used += times
	return p.group
}

// copies returns the groups whose table is a copy.
func (p *l2Part) copies() []l2Ref {
	if p.keep && len(p.groups) > 0 {
		return p.groups[1:]
	}
	return p.groups
}

// planParting finds out what must be parted, and takes clusters for it at the end of what c counted. Where they
// would be too many, or there is no room, nothing is parted, and the findings stay.
func (r *repairer) planParting(c *checker) (*parting, error) {
	p := &parting{l1: make(map[int]uint64), l2: make(map[uint64]*l2Part)}
	h := c.hdr
	left := uint64(maxPartBytes) >> c.clusterBits
	l1s := c.snapshotL1s()
	shared := []bool{c.shared[sharedTable{OverlapActiveL1, h.l1Off}]} // of the active L1 table and those of snapshots
	need := c.clusters(h.l1Bytes())
	if !shared[0] {
		need = 0
	}
	for _, s := range l1s {
		is := s.lo < s.hi && c.shared[sharedTable{OverlapInactiveL1, s.lo}]
		if shared = append(shared, is); is {
			need += c.clusters(s.hi - s.lo)
		}
	}
	moves := need <= left
	run := clusterRun{}
	if moves && need > 0 {
		var err error
		if run, err = r.take(c, need); err != nil {
			moves = false
			if err = noRoom(err); err != nil {
				return nil, err
			}
		}
	}
	at := run.first << c.clusterBits
	move := func(use clusterUse, off, n uint64) uint64 {
		to := at
		p.places = append(p.places, l1Place{use: use, from: off, to: to, n: n / l1EntrySize, times: 1})
		at += c.clusters(n) << c.clusterBits
		return to
	}
	if !shared[0] {
		p.places = append(p.places, l1Place{use: useL1, from: h.l1Off, to: h.l1Off, n: uint64(h.l1Size), times: 1})
	} else if moves {
		move(useL1, h.l1Off, h.l1Bytes())
	}
	for i := range l1s {
		s := &l1s[i]
		if !shared[i+1] {
			continue
		}
		if moves {
			p.l1[i] = move(useInactiveL1, s.lo, s.hi-s.lo)
		}
		*s = span{lo: s.lo, hi: s.lo}
	}
	for _, s := range overlay(l1s) {
		p.places = append(p.places, l1Place{use: useInactiveL1, from: s.lo, to: s.lo, n: (s.hi - s.lo) / l1EntrySize,
			first: (s.lo - l1s[s.one].lo) / l1EntrySize, times: s.times})
	}
	if !moves {
		return p, nil
	}
	p.table = c.shared[sharedTable{OverlapSnapshotTable, h.snapshotsOff}]
	if left, err := r.planL2(c, p, left-need); err != nil || left == 0 {
		return p, err
	} else if err := r.planData(c, p, left); err != nil {
		return p, err
	}
	return p, nil
}

// noRoom returns nil for the error of take that says that there is no room.
func noRoom(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		return nil
	}
	return err
}

// planL2 is planParting for L2 tables, of at most left copies. It returns how many more clusters may be copied.
func (r *repairer) planL2(c *checker, p *parting, left uint64) (uint64, error) {
	for _, ref := range c.l2 {
		shared, split := c.shared[sharedTable{OverlapActiveL2, ref.off}], c.split[ref.off]
		if !shared && !split && c.over[ref.off>>c.clusterBits] == 0 {
			continue
		}
		part := &l2Part{most: c.most, keep: !shared}
		if split {
			part.most = 1
		}
		p.l2[ref.off] = part
	}
	if len(p.l2) == 0 {
		return left, nil
	}
	need := uint64(0)
	for _, place := range p.places {
		err := c.words(place.from, place.n, func(i, w uint64) error {
			part := p.l2[c.mendL1(w)&offsetMask]
			if part == nil || need > left {
				return nil
			}
			g := part.next(place.times)
			if g == len(part.groups) {
				part.groups = append(part.groups, l2Ref{off: w & offsetMask, l1Index: uint32(place.first + i)})
				if g > 0 || !part.keep {
					need++
				}
			}
			if ref := &part.groups[g]; place.use == useL1 {
				ref.active += uint32(place.times)
			} else {
				ref.inactive += uint32(place.times)
			}
			return nil
		})
		if err != nil {
			return 0, fmt.Errorf("L1 table: %w", err)
		}
	}
	if need > left {
		clear(p.l2)
		return 0, nil
	}
	run, err := r.take(c, need)
	if err != nil {
		clear(p.l2)
		return 0, noRoom(err)
	}
	ci := run.first
	for _, ref := range c.l2 {
		part := p.l2[ref.off]
		if part == nil {
			continue
		}
		part.group, part.used = 0, 0
		copies := part.copies()
		for i := range copies {
			copies[i].off = ci << c.clusterBits
			c.refs.set(ci, min(uint64(copies[i].active)+uint64(copies[i].inactive), c.most))
			ci++
		}
	}
	return left - need, nil
}

// moveL1 is step 3a: it copies L1 tables, and switches the header to that of the active one.
func (r *repairer) moveL1(c *checker, p *parting) error {
	for _, place := range p.places {
		if place.from == place.to {
			continue
		}
		r.host.enter(useKinds[place.use], place.to, place.n*l1EntrySize)
		if err := r.copyL1(place); err != nil {
			return fmt.Errorf("copy of an L1 table: %w", err)
		}
	}
	if err := r.syncAt(repairSyncCopies); err != nil {
		return err
	}
	if len(p.places) == 0 || p.places[0].use != useL1 || p.places[0].from == p.places[0].to {
		return nil
	}
	off, b := encodeL1Fields(r.h.l1Size, p.places[0].to)
	if err := r.writeHeader(off, b); err != nil {
		return err
	}
	r.h.l1Off = p.places[0].to
	return nil
}

// copyL1 copies an L1 table without its COPIED flags, which step 6 sets again.
func (r *repairer) copyL1(place l1Place) error {
	buf := make([]byte, min(readPiece, place.n*l1EntrySize))
	for done := uint64(0); done < place.n*l1EntrySize; done += uint64(len(buf)) {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(uint64(len(buf)), place.n*l1EntrySize-done)]
		if err := r.host.readFull(b, place.from+done); err != nil {
			return err
		}
		for i := 0; i < len(b); i += l1EntrySize {
			b[i] &^= flagCopied >> 56
		}
		if err := r.write(place.use, b, place.to+done); err != nil {
			return err
		}
	}
	return nil
}

// moveL2 is step 3b, and step 4 for L1 entries: it copies L2 tables, and makes L1 entries name the copies, without COPIED. c
// knows the L2 tables as they are then. Precondition: the L1 tables have moved, and snapshots name theirs.
func (r *repairer) moveL2(c *checker, p *parting) error {
	for _, ref := range c.l2 {
		part := p.l2[ref.off]
		if part == nil {
			continue
		}
		if err := r.copyL2(c, ref.off, part.copies()); err != nil {
			return fmt.Errorf("copy of an L2 table: %w", err)
		}
	}
	if err := r.copyData(c, p); err != nil {
		return err
	}
	if err := r.syncAt(repairSyncCopies); err != nil {
		return err
	}
	for _, place := range p.places {
		// The copies are behind the end of the file that c knows.
		err := r.host.words(place.to, place.n, max(c.size, place.to+place.n*l1EntrySize), func(i, w uint64) error {
			now := c.mendL1(w)
			if part := p.l2[now&offsetMask]; part != nil {
				if to := part.groups[part.next(place.times)].off; to != now&offsetMask {
					now = to
				}
			}
			if now == w {
				return nil
			}
			return mended(r.write(place.use, binary.BigEndian.AppendUint64(nil, now), place.to+l1EntrySize*i))
		})
		if err != nil {
			return fmt.Errorf("L1 table: %w", err)
		}
	}
	c.l2, _ = p.tables(c)
	return r.sync()
}

// copyL2 copies the L2 table at host offset off, without COPIED where step 6 sets it again.
func (r *repairer) copyL2(c *checker, off uint64, copies []l2Ref) error {
	if len(copies) == 0 {
		return nil
	}
	if err := r.ctx.Err(); err != nil {
		return err
	}
	buf := make([]byte, c.clusterSize)
	if err := r.host.readFull(buf, off); err != nil {
		return err
	}
	for i := uint64(0); i < 1<<c.l2Bits && !c.external; i++ {
		b := buf[i<<c.l2EntryBits:]
		if w := binary.BigEndian.Uint64(b); w&flagCompressed == 0 {
			binary.BigEndian.PutUint64(b, w&^flagCopied)
		}
	}
	for _, to := range copies {
		r.host.enter(OverlapActiveL2|OverlapInactiveL2, to.off, c.clusterSize)
		if err := r.write(useAnyL2, buf, to.off); err != nil {
			return err
		}
	}
	return nil
}

// tables returns the L2 tables as they are after the parting, and where each of them was.
func (p *parting) tables(c *checker) (now, before []l2Ref) {
	for _, ref := range c.l2 {
		groups := []l2Ref{ref}
		if part := p.l2[ref.off]; part != nil {
			groups = part.groups
		}
		now = append(now, groups...)
		for _, to := range groups {
			to.off = ref.off
			before = append(before, to)
		}
	}
	return now, before
}

// dataPart is what becomes of guest clusters that more L2 entries name than a refcount can count: the cluster keeps as
// many of them as it can, and the others get copies, each as many as a refcount counts. Compressed clusters are not
// copied, but count.
//
// The copies are written with those of L2 tables, step 3b, and have their refcounts before. Step 4 makes the entries
// name them, one by one: each before or after, with the same content. Old cluster and copies have the largest refcount
// that there is, or one for all that will name them, until step 5 (I1, I2).
type dataPart struct {
	kept   map[uint64]uint64   // references that a cluster keeps so far
	copies map[uint64][]uint64 // the copies of a cluster, in clusters; at planning 0 for each
	used   map[uint64]uint64   // references to the copy in use so far
	at     map[uint64]int      // index of the copy in use
}

// newDataPart returns the part of the clusters that c has more references to than it could count.
func newDataPart(c *checker) *dataPart {
	d := &dataPart{copies: make(map[uint64][]uint64)}
	d.restart()
	return d
}

// restart begins again with the first entry.
func (d *dataPart) restart() {
	d.kept, d.used, d.at = make(map[uint64]uint64), make(map[uint64]uint64), make(map[uint64]int)
}

// place returns the copy of which the next entry, e, is to be, by its index; or that it stays where it is. The entry
// counts so often. The same entries in the same order get the same.
func (d *dataPart) place(c *checker, e l2Entry, guest, times uint64) (ci uint64, i int, moves bool) {
	if m := c.mendL2(e, guest); m.word&flagCompressed != 0 || m.hostOff() == 0 || m.hostOff() != e.hostOff() {
		if m.word&flagCompressed != 0 {
			off, n := c.compressed(m.word)
			for ci := off >> c.clusterBits; ci <= (off+n-1)>>c.clusterBits; ci++ {
				d.kept[ci] += times
			}
		}
		return 0, 0, false
	}
	ci = e.hostOff() >> c.clusterBits
	if c.over[ci] == 0 || times > c.most {
		return ci, 0, false
	}
	if kept := d.kept[ci] + times; kept <= c.most {
		d.kept[ci] = kept
		return ci, 0, false
	}
	if d.used[ci] > c.most-times {
		d.at[ci]++
		d.used[ci] = 0
	}
	d.used[ci] += times
	return ci, d.at[ci], true
}

// planData is planParting for guest data, of at most left copies.
func (r *repairer) planData(c *checker, p *parting, left uint64) error {
	if len(c.over) == 0 || c.external {
		return nil
	}
	d := newDataPart(c)
	need := uint64(0)
	_, before := p.tables(c)
	err := c.eachTable(before, func(ref l2Ref, b []byte) error {
		c.eachEntry(ref, b, func(_ uint64, e l2Entry, guest, times uint64) {
			ci, i, moves := d.place(c, e, guest, times)
			if moves && i == len(d.copies[ci]) && need <= left {
				d.copies[ci] = append(d.copies[ci], 0)
				need++
			}
		})
		return nil
	})
	if err != nil || need == 0 || need > left {
		return err
	}
	run, err := r.take(c, need)
	if err != nil {
		return noRoom(err)
	}
	next := run.first
	for _, ci := range slices.Sorted(maps.Keys(d.copies)) {
		for i := range d.copies[ci] {
			d.copies[ci][i] = next
			c.refs.set(next, c.most)
			next++
		}
	}
	d.restart()
	p.data = d
	return nil
}

// eachEntry calls f with every entry of an L2 table that is not zeros, its index, guest offset, and how often it counts.
func (c *checker) eachEntry(ref l2Ref, b []byte, f func(i uint64, e l2Entry, guest, times uint64)) {
	for i := uint64(0); i < 1<<c.l2Bits; i++ {
		e := l2Entry{word: binary.BigEndian.Uint64(b[i<<c.l2EntryBits:])}
		if c.extendedL2 {
			e.bitmap = binary.BigEndian.Uint64(b[i<<c.l2EntryBits+8:])
		}
		if e != (l2Entry{}) {
			f(i, e, (uint64(ref.l1Index)<<c.l2Bits+i)<<c.clusterBits, uint64(ref.active)+uint64(ref.inactive))
		}
	}
}

// copyData writes the copies of guest data.
func (r *repairer) copyData(c *checker, p *parting) error {
	if p.data == nil {
		return nil
	}
	buf := make([]byte, c.clusterSize)
	for _, ci := range slices.Sorted(maps.Keys(p.data.copies)) {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		if err := r.host.readFull(buf, ci<<c.clusterBits); err != nil {
			return err
		}
		for _, to := range p.data.copies[ci] {
			if err := r.write(useData, buf, to<<c.clusterBits); err != nil {
				return fmt.Errorf("copy of a cluster: %w", err)
			}
		}
	}
	return nil
}

// moveData is step 4 for entries of guest data that has copies. Preconditions: c knows the L2 tables as they are, and they
// are mended: the copies are behind the end of the file that c knows.
func (r *repairer) moveData(c *checker, p *parting) error {
	if p.data == nil {
		return nil
	}
	return r.eachL2(c, func(ref l2Ref, b []byte) error {
		c.eachEntry(ref, b, func(i uint64, e l2Entry, guest, times uint64) {
			if ci, k, moves := p.data.place(c, e, guest, times); moves {
				e.word = e.word&^(offsetMask|flagCopied) | p.data.copies[ci][k]<<c.clusterBits
				c.putEntry(b, i, e)
			}
		})
		return nil
	})
}
