package qcow2

import (
	"errors"
	"fmt"
	"math"
)

// growth is the growth of a disk.
//
// Order:
//
//	behind the old end: what stands there is dropped; the rest of the last cluster becomes zeros; data, L2 tables,
//	refcounts and the new L1 table are written and made durable, L2 and L1 entries after what they name
//	the new size and, where it moved, the L1 table: one header write, durable
//	the old L1 table is freed by the next cut
//
// Nothing of the first step is seen while the old size hides it, so a crash before the second is durable leaves the
// disk as it was, and mapped clusters behind its end, or leaks; a crash after it leaves the new disk, of which
// everything was durable (I2, I3). An error before the switch undoes what was done; where the host does not let
// itself be undone, mapped clusters are left behind the end, and the next Resize drops them.
type growth struct {
	*resizing

	area      clusterRun // new clusters: the L1 table, the L2 tables, data
	nL1, nL2  uint64     // of these for the L1 table, and for L2 tables
	linked    uint64     // of the data clusters, mapped by the L2 table that the old end lies in
	inPlace   bool       // the L1 entries of the new L2 tables are in the present table
	first     uint64     // guest cluster behind the old end
	mapped    uint64     // guest clusters from first on that get an entry
	entry     l2Entry    // of guest cluster first; the host clusters of the others follow
	newTables uint64     // index of the first L1 entry that gets a new L2 table
	l1        *table     // the new L1 table, or nil
	dataZero  bool       // the new part of the data file reads as zeros
	hostSize  int64      // bytes of the image file before
}

// run makes the disk larger. An error leaves it as it was.
func (g *growth) run() error {
	g.first = g.m.clusters(g.old)
	if err := g.drop(g.first); err != nil {
		return err
	}
	// What was dropped must not wait for release while space is looked for.
	if len(g.m.alloc.freed) > 0 {
		if err := g.persist(); err != nil {
			return err
		}
	}
	err := g.prepare()
	if err == nil && g.img.wb.test.growSwitchFirst {
		if err = g.switchOver(); err == nil {
			return g.persist()
		}
	}
	if err == nil {
		err = g.persist()
	}
	if err == nil {
		err = g.ctx.Err()
	}
	if err == nil {
		err = g.switchOver()
	}
	if err != nil {
		return g.undo(err)
	}
	if g.img.wb.test.tailLast {
		if err := g.zeroTail(); err != nil {
			return err
		}
	}
	return nil // the next cut frees the old L1 table
}

// prepare makes everything that the larger disk needs, in memory or on the host, where the old size hides it.
func (g *growth) prepare() (err error) {
	if g.hostSize, err = g.img.host.s.Size(); err != nil {
		return err
	}
	if err := g.growData(); err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	mode, err := g.plan()
	if err != nil {
		return err
	}
	// The tail may need the L2 table in which the old end lies, so it comes before the tables are counted that are new.
	if !g.img.wb.test.tailLast {
		if err := g.zeroTail(); err != nil {
			return fmt.Errorf("zeros behind guest %#x: %w", g.old, err)
		}
	}
	if err := g.allocate(); err != nil {
		return err
	}
	if err := g.fillData(mode); err != nil {
		return err
	}
	if err := g.linkOldTable(); err != nil {
		return err
	}
	if err := g.writeL2(); err != nil {
		return err
	}
	return g.linkNew()
}

// growData makes the external data file as long as the disk. What it may hold behind the old end goes first: of a
// raw data file all is seen.
func (g *growth) growData() error {
	if !g.m.external {
		return nil
	}
	data := g.img.data
	if !data.fixed {
		size, err := data.s.Size()
		if err == nil && uint64(size) > g.old {
			err = data.s.Truncate(int64(g.old))
		}
		if err == nil {
			err = data.s.Truncate(int64(g.size))
		}
		if err == nil {
			g.dataZero = true
			return nil
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	if !g.img.hdr.rawData() {
		return nil
	}
	g.dataZero = true
	return g.inPieces(g.old, g.size-g.old, func(off, n uint64) error { return data.zero(useData, off, n) })
}

// inPieces calls f for the n bytes at off in pieces, until the context ends, and tells how far it is.
func (g *growth) inPieces(off, n uint64, f func(off, n uint64) error) error {
	const piece = 16 << 20
	for done := uint64(0); done < n; {
		if err := g.ctx.Err(); err != nil {
			return err
		}
		k := min(piece, n-done)
		if err := f(off+done, k); err != nil {
			return err
		}
		done += k
		g.progress(min(done, g.size-g.old))
	}
	return nil
}

// backingEnd returns how far the disk below may reach, in guest bytes.
func (g *growth) backingEnd() uint64 {
	b := &g.img.below
	switch {
	case b.missing != nil:
		return math.MaxUint64 // nobody knows
	case b.disk == nil:
		return 0
	}
	return uint64(b.disk.Size())
}

// plan decides which of the new clusters are mapped, and how: all of them where they are preallocated or the data
// file is raw; else those that the backing file would show in, as zeros. Version 2 has no zero clusters, so that
// zeros are written there. It returns the mode of preallocation of those that get a host cluster.
func (g *growth) plan() (Preallocation, error) {
	m, mode := g.m, g.o.Preallocation
	all := m.clusters(g.size) - g.first
	if mode == PreallocationOff && m.external && g.img.hdr.rawData() {
		mode = PreallocationMetadata
	}
	if mode != PreallocationOff {
		g.mapped = all
		return mode, nil
	}
	if below := g.backingEnd(); below > g.first<<m.clusterBits {
		g.mapped = min(m.clusters(min(below, g.size))-g.first, all)
	}
	switch {
	case g.mapped == 0:
		return mode, nil
	case !m.version2:
		g.entry = m.zeroEntry(l2Entry{})
		return mode, nil
	case g.img.below.missing != nil:
		return mode, g.img.below.missing
	}
	return PreallocationFull, nil
}

// allocate finds the places of everything new, in one run at the end of the image.
func (g *growth) allocate() error {
	m, a := g.m, g.m.alloc
	if n := m.l1Entries(g.size); n > m.l1.n {
		g.l1, g.nL1 = newTable(n), m.clusters(n*l1EntrySize)
	}
	g.newTables = g.first >> m.l2Bits
	if g.mapped > 0 {
		if m.l1.load(g.newTables) != 0 {
			g.newTables++ // the one that the old end lies in
		}
		g.nL2 = max((g.first+g.mapped-1)>>m.l2Bits+1, g.newTables) - g.newTables
	}
	n := g.nL1 + g.nL2
	hosted := g.mapped > 0 && g.entry == (l2Entry{}) // the clusters have places
	if hosted && !m.external {
		n += g.mapped
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if n > 0 {
		r, pristine, err := a.allocArea(n)
		if err != nil {
			return fmt.Errorf("allocate %d clusters: %w", n, err)
		}
		g.area = r
		if !m.external {
			g.dataZero = pristine
		}
	}
	if hosted {
		g.entry = l2Entry{word: (g.area.first+g.nL1+g.nL2)<<m.clusterBits | flagCopied}
		if m.external {
			g.entry.word = g.first<<m.clusterBits | flagCopied
		}
	}
	return nil
}

// zeroTail makes what lies between the old end and the end of its cluster read as zeros: there may be old content,
// or that of a longer backing file.
func (g *growth) zeroTail() error {
	m := g.m
	in := m.offsetInCluster(g.old)
	if in == 0 {
		return nil
	}
	e := l2Entry{}
	if m.l1.load(m.l1Index(g.old)) != 0 {
		entries, err := m.entries(g.old, 1)
		if err != nil {
			return err
		}
		e = entries[0]
	}
	below := g.backingEnd()
	start := m.clusterStart(g.old)
	shows := false
	for sub := in >> m.subBits; start+sub<<m.subBits < start+m.clusterSize; sub++ {
		switch m.kind(e, sub) {
		case kindNormal:
			shows = shows || !m.external || !g.dataZero
		case kindCompressed:
			shows = true
		case kindUnallocated:
			shows = shows || below > max(g.old, start+sub<<m.subBits)
		}
	}
	if !shows {
		return nil
	}
	n := m.clusterSize - in
	if m.external {
		n = min(n, g.size-g.old)
	}
	buf := getBuffer(n)
	defer putBuffer(buf)
	clear(*buf)
	var err error
	if m.owned(e) {
		_, err = g.img.writeOwned(*buf, g.old, e)
	} else {
		_, err = g.img.writeFresh(*buf, g.old, []l2Entry{e})
	}
	return err
}

// fillData does for the new clusters what the mode promises, and completes their entry by whether they read as zeros.
func (g *growth) fillData(mode Preallocation) error {
	m, data := g.m, g.img.data
	if mode == PreallocationOff || g.mapped == 0 {
		return nil
	}
	off, n := g.entry.hostOff(), g.mapped<<m.clusterBits
	if m.external {
		off, n = g.old, g.size-g.old
	} else if err := data.extend(off + n); err != nil {
		return err
	}
	pristine, zero := g.dataZero, true
	err := g.inPieces(off, n, func(off, n uint64) error {
		z, err := data.preallocate(mode, off, n, pristine, m.version2)
		zero = zero && z
		return err
	})
	if err != nil {
		return fmt.Errorf("preallocate: %w", err)
	}
	if zero {
		g.entry = m.dataEntry(g.entry)
	} else {
		g.entry = m.zeroEntry(g.entry)
	}
	return nil
}

// entryAt returns the entry of the k-th new guest cluster.
func (g *growth) entryAt(k uint64) l2Entry {
	e := g.entry
	if g.m.hasCluster(e) {
		e.word += k << g.m.clusterBits
	}
	return e
}

// linkOldTable sets the entries of new clusters that the L2 table maps in which the old end lies.
func (g *growth) linkOldTable() error {
	m := g.m
	if g.mapped == 0 || g.newTables == g.first>>m.l2Bits {
		return nil
	}
	perSlice := uint64(1) << (m.sliceBits - m.l2EntryBits)
	for end := min(g.mapped, g.newTables<<m.l2Bits-g.first); g.linked < end; {
		at := g.first + g.linked
		n := min(perSlice-at%perSlice, end-g.linked)
		err := m.update(at<<m.clusterBits, g.img.writeCut, func(words []uint64, i uint64) {
			for j := range n {
				m.setEntry(words, i+j, g.entryAt(g.linked+j))
			}
		})
		if err != nil {
			return err
		}
		g.linked += n
	}
	return nil
}

// writeL2 writes the new L2 tables.
func (g *growth) writeL2() error {
	m := g.m
	if g.nL2 == 0 {
		return nil
	}
	off, n := (g.area.first+g.nL1)<<m.clusterBits, g.nL2<<m.clusterBits
	for at := off; at < off+n; at += 1 << m.sliceBits {
		m.cache.drop(makeSliceKey(m.id, at))
	}
	m.h.enter(OverlapActiveL2, off, n)
	base := g.newTables << m.l2Bits // guest cluster of their first entry
	end := g.first + g.mapped
	return m.h.writeBulk(useL2, m.bulkBuffer(g.nL2), off, n, func(p []byte, pos uint64) error {
		if err := g.ctx.Err(); err != nil {
			return err
		}
		at := base + pos>>m.l2EntryBits
		lo, hi := max(at, g.first), min(at+uint64(len(p))>>m.l2EntryBits, end)
		clear(p)
		if lo < hi {
			m.putRun(p, lo-at, hi-lo, g.entryAt(lo-g.first))
			g.progress(min((hi-g.first)<<m.clusterBits, g.size-g.old))
		}
		return nil
	})
}

// linkNew names the new L2 tables: in the new L1 table, which is written, or in the present one, in memory.
func (g *growth) linkNew() error {
	m := g.m
	off := (g.area.first + g.nL1) << m.clusterBits
	if g.l1 == nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		for i := range g.nL2 {
			m.setL1(g.newTables+i, off+i<<m.clusterBits|flagCopied)
		}
		g.inPlace = g.nL2 > 0
		return nil
	}
	for i := range m.l1.n {
		if e := m.l1.load(i); e != 0 {
			g.l1.store(i, e)
		}
	}
	for i := range g.nL2 {
		g.l1.store(g.newTables+i, off+i<<m.clusterBits|flagCopied)
	}
	at, n := g.area.first<<m.clusterBits, g.nL1<<m.clusterBits
	m.h.enter(OverlapActiveL1, at, n)
	return m.h.writeBulk(useL1, m.bulkBuffer(g.nL1), at, n, func(p []byte, pos uint64) error {
		g.l1.encode(p, pos/l1EntrySize)
		return nil
	})
}

// switchOver makes the disk larger: on the host by one write, then in memory.
func (g *growth) switchOver() error {
	off, p := encodeSizeField(g.size)
	l1Off := g.area.first << g.m.clusterBits
	if g.l1 != nil {
		off, p = g.img.hdr.encodeSizeAndL1(g.size, uint32(g.l1.n), l1Off)
	}
	if err := g.img.switchHeader(off, p); err != nil {
		return err
	}
	return g.img.pausing(func() error {
		g.apply(g.l1, l1Off)
		return nil
	})
}

// undo gives back what a growth took that failed with err, which it returns. What entries behind the end name goes
// the way of dropped clusters, everything else is nobody's yet. If entries cannot be dropped they stay: they are
// mapped, behind the end, and the next Resize drops them.
func (g *growth) undo(err error) error {
	m := g.m
	if g.img.host.failure() != nil {
		return err // it is unknown which size is in force; nothing is written any more
	}
	if g.m.external && !g.img.data.fixed {
		_ = g.img.data.s.Truncate(int64(g.old)) // a data file that is too long says nothing
	}
	if g.l1 != nil && g.area.n > 0 {
		m.h.leave(OverlapActiveL1, g.area.first<<m.clusterBits, g.nL1<<m.clusterBits)
	}
	tables := min(g.area.n, g.nL1+g.nL2) // none, if there was no room
	unlinked := clusterRun{first: g.area.first, n: tables}
	data := clusterRun{first: g.area.first + tables, n: g.area.n - tables}
	if g.inPlace {
		// Their entries name the rest of the data, too.
		unlinked.n, data.n = 0, 0
	} else if data.n > 0 {
		data.first, data.n = data.first+g.linked, data.n-g.linked
	}
	m.mu.Lock()
	m.alloc.undo(unlinked)
	m.alloc.undo(data)
	end, eerr := m.alloc.usedEnd()
	m.mu.Unlock()
	switch {
	case g.linked > 0 || g.inPlace:
		if derr := g.drop(g.first); derr != nil {
			return errors.Join(err, fmt.Errorf("undo: %w", derr))
		}
	case eerr == nil && !g.img.host.fixed && g.hostSize > 0:
		// Nothing on disk names what stands behind the end; a full host gets its space back.
		if n := max(g.hostSize, int64(end<<m.clusterBits)); m.fileSize() > n {
			_ = g.img.host.s.Truncate(n) // what does not let itself be cut is free space
		}
	}
	return err
}

// fileSize returns the size of the image file in bytes, or 0 where it cannot be told.
func (m *mapper) fileSize() int64 {
	n, err := m.h.s.Size()
	if err != nil {
		return 0
	}
	return n
}
