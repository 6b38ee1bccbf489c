package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// zeroExpansion writes out the zero clusters of an image and of its snapshots, so that no L2 entry has the zero flag
// any more, which version 2 does not know. Every L2 table is changed in place, once, however many L1 tables share it:
// the guest, and every snapshot, reads what it read.
//
// An entry without a host cluster gets a new one, or becomes nothing where there is no backing file; one with a host
// cluster that nobody else refers to has it filled with zeros; one with a shared one gets a new one. A new cluster
// has as many references as its table has: one for each L1 table.
//
// The order, for as many tables as expansionBatch allows at a time:
//
//	1  the new clusters are counted, in memory; they and the ones that are kept are written, zeros
//	2  a cut: refcounts and what they need, and the zeros                                             sync
//	3  the entries                                                                                    sync
//	4  the references to clusters that were replaced are lowered                                      no sync
//
// and at the end, where an active entry without the zero flag has become the only one with its cluster,
//
//	5  the refcounts                                                                                  sync
//	6  COPIED in such entries                                                                         sync
//
// A crash before step 3 leaves the old entries, which read as zeros whatever their clusters hold; in step 3, of each
// sector the old or the new ones, and both clusters of an entry are counted (I1) and hold zeros (I2). At worst there
// are leaks. An error gives back the clusters of entries that are not on disk.
type zeroExpansion struct {
	*amender
	rules  entryRules
	backed bool // what is not there reads from a backing file

	tables []expandedTable // of the batch
	bytes  uint64          // written for the batch

	single *refWords // clusters whose count has become one (refStoredOne); nil: none
}

// expandedTable is an L2 table in whose entries the zero flag is to be dropped.
type expandedTable struct {
	off      uint64 // host offset
	refs     uint64 // its refcount
	old, now []byte // its content, before and after
	swaps    []zeroSwap
}

// zeroSwap is an entry whose host cluster is replaced.
type zeroSwap struct {
	pos      uint64 // of the entry in its table, in bytes
	old, now uint64 // host offsets; old is 0 if there was none
}

// Bounds of a batch: memory for tables, and zeros between two syncs, in bytes.
const (
	expansionTables = 4 << 20
	expansionBytes  = 64 << 20
)

// expandZeros writes out all zero clusters. Only within alone.
func (a *amender) expandZeros() error {
	img := a.img
	x := &zeroExpansion{amender: a, rules: img.m.entryRules}
	x.backed = img.hdr.hasBacking() || img.below.disk != nil
	tables, err := x.l2Tables()
	if err != nil {
		return err
	}
	// Everything that can be refused is, before anything is changed.
	for _, t := range tables {
		n, err := x.survey(t)
		if err != nil {
			return err
		}
		a.all += int64(n << img.m.clusterBits)
	}
	for _, t := range tables {
		if err := x.expand(t); err != nil {
			return x.giveUp(err)
		}
		if x.bytes >= expansionBytes || uint64(len(x.tables))<<img.m.clusterBits >= expansionTables {
			if err := x.commit(); err != nil {
				return err
			}
		}
	}
	if err := x.commit(); err != nil {
		return err
	}
	// What follows reads refcounts from the host.
	img.mu.Lock()
	err = img.m.alloc.writeBack()
	img.mu.Unlock()
	if err != nil || x.single == nil {
		return err
	}
	return x.setCopied()
}

// setCopied is steps 5 and 6.
func (x *zeroExpansion) setCopied() error {
	img := x.img
	if err := img.host.sync(); err != nil {
		return err
	}
	size, err := img.host.s.Size()
	if err != nil {
		return err
	}
	return img.restoreCopied(x.ctx, x.single, uint64(size))
}

// l2Place is an L2 table: its host offset, with bit 0 set if the active L1 table names it.
type l2Place uint64

// off returns the table's host offset.
func (p l2Place) off() uint64 { return uint64(p) &^ 1 }

// active reports whether the active L1 table names the table.
func (p l2Place) active() bool { return p&1 != 0 }

// l2Tables returns the L2 tables of the image and its snapshots, each once.
func (x *zeroExpansion) l2Tables() ([]l2Place, error) {
	img := x.img
	m := img.m
	var found []l2Place
	add := func(where uint64, word uint64, active l2Place) error {
		off := word & offsetMask
		if off == 0 {
			return nil
		}
		if m.offsetInCluster(off) != 0 {
			return &CorruptError{What: fmt.Sprintf("L1 entry %#x: its L2 table is not aligned to clusters", word), HostOff: int64(where), GuestOff: noOffset}
		}
		found = append(found, l2Place(off)|active)
		return nil
	}
	for k, chunk := range m.l1.all() {
		for j := range chunk {
			if err := add(m.l1Off+8*(k<<tableChunkBits+uint64(j)), m.l1.at(chunk, j), 1); err != nil {
				return nil, err
			}
		}
	}
	size, err := img.host.s.Size()
	if err != nil {
		return nil, err
	}
	for i := range img.snapshots {
		s := &img.snapshots[i]
		if err := s.checkL1(&m.geometry); err != nil {
			return nil, err
		}
		if s.l1Size == 0 {
			continue
		}
		err := img.host.words(s.l1Off, uint64(s.l1Size), uint64(size), func(i, w uint64) error { return add(s.l1Off+8*i, w, 0) })
		if err != nil {
			return nil, fmt.Errorf("snapshot L1 table: %w", err)
		}
		found = sortPlaces(found)
	}
	return sortPlaces(found), nil
}

// sortPlaces sorts the places and leaves each table once.
func sortPlaces(p []l2Place) []l2Place {
	slices.Sort(p)
	out := p[:0]
	for _, t := range p {
		if n := len(out); n > 0 && out[n-1].off() == t.off() {
			out[n-1] |= t & 1
			continue
		}
		out = append(out, t)
	}
	return out
}

// eachZero calls f with the position and the word of every entry of the table p, at host offset off, that has the
// zero flag.
func (x *zeroExpansion) eachZero(off uint64, p []byte, f func(pos, word uint64) error) error {
	for pos := uint64(0); pos < uint64(len(p)); pos += 8 {
		w := binary.BigEndian.Uint64(p[pos:])
		if w&flagZero == 0 || w&flagCompressed != 0 {
			continue
		}
		if x.rules.kind(l2Entry{word: w}, 0) == kindInvalid {
			return &CorruptError{What: fmt.Sprintf("L2 entry %#x is not aligned to clusters", w), HostOff: int64(off + pos), GuestOff: noOffset}
		}
		if err := f(pos, w); err != nil {
			return err
		}
	}
	return nil
}

// read reads the table, and returns its refcount.
func (x *zeroExpansion) read(t l2Place) (p []byte, refs uint64, err error) {
	if err := x.ctx.Err(); err != nil {
		return nil, 0, err
	}
	m := x.img.m
	p = make([]byte, m.clusterSize)
	if err := x.img.host.readFull(p, t.off()); err != nil {
		return nil, 0, fmt.Errorf("L2 table: %w", err)
	}
	x.img.mu.Lock()
	defer x.img.mu.Unlock()
	refs, err = m.alloc.refcount(t.off() >> m.clusterBits)
	if err == nil && refs == 0 {
		err = m.alloc.checkReferenced(clusterRun{first: t.off() >> m.clusterBits, n: 1})
	}
	return p, refs, err
}

// survey returns how many clusters of zeros the table needs.
func (x *zeroExpansion) survey(t l2Place) (n uint64, err error) {
	p, _, err := x.read(t)
	if err != nil {
		return 0, err
	}
	err = x.eachZero(t.off(), p, func(_, word uint64) error {
		host := word & offsetMask
		if host != 0 || x.backed {
			n++
		}
		if host == 0 {
			return nil
		}
		x.img.mu.Lock()
		defer x.img.mu.Unlock()
		return x.img.m.alloc.checkReferenced(clusterRun{first: host >> x.img.m.clusterBits, n: 1})
	})
	return n, err
}

// expand is step 1 for one table.
func (x *zeroExpansion) expand(t l2Place) error {
	p, refs, err := x.read(t)
	if err != nil {
		return err
	}
	x.tables = append(x.tables, expandedTable{off: t.off(), refs: refs, old: p})
	e := &x.tables[len(x.tables)-1]
	now := slices.Clone(p)
	err = x.eachZero(t.off(), p, func(pos, word uint64) error {
		old := word & offsetMask
		if old == 0 && !x.backed {
			binary.BigEndian.PutUint64(now[pos:], 0)
			return nil
		}
		host, err := x.take(old, refs)
		if err != nil {
			return err
		}
		word &^= flagZero
		if host != old {
			e.swaps = append(e.swaps, zeroSwap{pos: pos, old: old, now: host})
			word = host
		}
		// Whichever it is, nobody else refers to it any more, durably; its count is before the entry is (I7).
		if t.active() && refs == 1 {
			word |= flagCopied
		}
		binary.BigEndian.PutUint64(now[pos:], word)
		if err := x.img.host.zero(useData, host, x.img.m.clusterSize); err != nil {
			return err
		}
		x.bytes += x.img.m.clusterSize
		x.progress(int64(x.img.m.clusterSize))
		return nil
	})
	e.now = now
	if err == nil && string(now) == string(p) {
		x.tables = x.tables[:len(x.tables)-1]
	}
	return err
}

// take returns the host cluster for an entry of a table with so many references, whose host cluster was old, or 0:
// that one, if nobody else refers to it, or a new one, counted.
func (x *zeroExpansion) take(old, refs uint64) (uint64, error) {
	m := x.img.m
	x.img.mu.Lock()
	defer x.img.mu.Unlock()
	if old != 0 {
		v, err := m.alloc.refcount(old >> m.clusterBits)
		if err != nil || v == refs {
			return old, err
		}
	}
	r, err := m.alloc.alloc(1)
	if err != nil {
		return 0, fmt.Errorf("a cluster of zeros: %w", err)
	}
	if refs > 1 {
		if _, err := m.alloc.add(r, int(refs-1)); err != nil {
			m.alloc.undo(r)
			return 0, err
		}
	}
	return r.first << m.clusterBits, nil
}

// commit is steps 2 to 4 for the batch.
func (x *zeroExpansion) commit() error {
	if len(x.tables) == 0 {
		return nil
	}
	early := x.img.wb.test.amendSkip == amendSyncZeros
	if early {
		if err := x.writeTables(); err != nil {
			return x.settleTables(err)
		}
	}
	if err := x.img.writeCut(); err != nil {
		return x.giveUp(err)
	}
	if !early {
		if err := x.writeTables(); err != nil {
			return x.settleTables(err)
		}
	}
	if err := x.img.host.sync(); err != nil {
		return err // the image is failed
	}
	x.forgetSlices()
	for i := range x.tables {
		for _, s := range x.tables[i].swaps {
			x.lower(s.old, x.tables[i].refs)
		}
	}
	x.tables, x.bytes = x.tables[:0], 0
	return nil
}

// writeTables writes the entries that change.
func (x *zeroExpansion) writeTables() error {
	for i := range x.tables {
		t := &x.tables[i]
		for pos := 0; pos < len(t.now); pos += sectorSize {
			p := t.now[pos:min(pos+sectorSize, len(t.now))]
			if string(p) == string(t.old[pos:pos+len(p)]) {
				continue
			}
			if err := x.img.host.write(useAnyL2, p, t.off+uint64(pos)); err != nil {
				return fmt.Errorf("L2 table: %w", err)
			}
		}
	}
	return nil
}

// forgetSlices takes the tables of the batch out of the cache, once no reader can put what it read of them before
// back there.
func (x *zeroExpansion) forgetSlices() {
	m := x.img.m
	_ = x.img.pausing(func() error {
		for i := range x.tables {
			for pos := uint64(0); pos < m.clusterSize; pos += 1 << m.sliceBits {
				m.cache.drop(makeSliceKey(m.id, x.tables[i].off+pos))
			}
		}
		return nil
	})
}

// lower takes so many references from the host cluster at off, if there is one. What cannot be lowered is a leak.
func (x *zeroExpansion) lower(off, refs uint64) {
	if off == 0 {
		return
	}
	x.img.mu.Lock()
	defer x.img.mu.Unlock()
	x.img.wb.lowered = true
	ci := off >> x.img.m.clusterBits
	if _, err := x.img.m.alloc.add(clusterRun{first: ci, n: 1}, -int(refs)); err != nil {
		return
	}
	if v, err := x.img.m.alloc.refcount(ci); err == nil && v == 1 {
		if x.single == nil {
			x.single = newRefWords()
		}
		x.single.add(ci, 0, refStoredOne, x.img.m.alloc.max)
	}
}

// giveUp gives the new clusters of the batch back, none of which is named, and returns err.
func (x *zeroExpansion) giveUp(err error) error {
	for i := range x.tables {
		for _, s := range x.tables[i].swaps {
			x.lower(s.now, x.tables[i].refs)
		}
	}
	x.tables = nil
	return err
}

// settleTables is for a batch of which not all entries could be written: what is on disk, once it is durable, tells
// which cluster of each is in use; the other is given back. It returns err, and what keeps it from finding out, which
// leaves both counted.
func (x *zeroExpansion) settleTables(err error) error {
	if serr := x.img.host.sync(); serr != nil {
		return errors.Join(err, serr)
	}
	x.forgetSlices()
	p := make([]byte, x.img.m.clusterSize)
	for i := range x.tables {
		t := &x.tables[i]
		if rerr := x.img.host.readFull(p, t.off); rerr != nil {
			err = errors.Join(err, rerr)
			continue
		}
		for _, s := range t.swaps {
			unused := s.now
			if binary.BigEndian.Uint64(p[s.pos:])&offsetMask == s.now {
				unused = s.old
			}
			x.lower(unused, t.refs)
		}
	}
	x.tables = nil
	return err
}
