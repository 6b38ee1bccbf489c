package qcow2

import (
	"fmt"
	"syscall"
)

// Host space by the area: one run of clusters at the end of the image, however long, whose refcounts are written in
// bulk; and its opposite, the end of the image without what only describes itself.

// lastNonzero returns the index behind the last of the first n refcounts that is not zero, or 0.
func lastNonzero(p []byte, order uint, n uint64) uint64 {
	perWord := uint64(64) >> order
	for n > 0 {
		if n%perWord == 0 && zeroRun(p, order, n-perWord, perWord) == perWord {
			n -= perWord
			continue
		}
		if refcountAt(p, order, n-1) != 0 {
			return n
		}
		n--
	}
	return 0
}

// trailing is what the end of an image looks like.
type trailing struct {
	end    uint64   // the cluster behind the last one in use, once the blocks are dropped
	blocks []uint64 // table indexes of the last refcount blocks, highest first, that describe nothing but each other
}

// findEnd looks for the end of the image from the end of the refcount table backwards. It reads no further than to
// the last cluster in use.
func (a *allocator) findEnd() (trailing, error) {
	var t trailing
	idle := make(map[uint64]bool) // clusters of the blocks of t
	for b := a.table.n; b > 0; b-- {
		if a.table.load(b-1) == 0 {
			continue
		}
		end, err := a.endInBlock(b-1, idle)
		if err != nil {
			return t, err
		}
		if end > 0 {
			t.end = end
			return t, nil
		}
		t.blocks = append(t.blocks, b-1)
		idle[a.table.load(b-1)>>a.g.clusterBits] = true
	}
	return t, &CorruptError{What: "no cluster has a refcount", HostOff: int64(a.tableOff), GuestOff: noOffset}
}

// usedEnd returns the cluster behind the last one that has a refcount.
func (a *allocator) usedEnd() (uint64, error) {
	t, err := a.findEnd()
	for _, b := range t.blocks {
		t.end = max(t.end, a.table.load(b)>>a.g.clusterBits+1)
	}
	return t.end, err
}

// endInBlock returns the cluster behind the last one in use that refcount block b describes, or 0 if only the
// block itself and idle ones are.
func (a *allocator) endInBlock(b uint64, idle map[uint64]bool) (uint64, error) {
	own := a.table.load(b) >> a.g.clusterBits
	perSlice := uint64(8<<a.g.sliceBits) >> a.g.refcountOrder
	lo, hi := b<<a.g.refBlockBits, (b+1)<<a.g.refBlockBits
	end := uint64(0) // behind the own cluster, once that was met
	for hi > lo {
		s, _, err := a.slice(hi - 1)
		if err != nil {
			return 0, err
		}
		start := (hi - 1) / perSlice * perSlice
		n := lastNonzero(s.data, a.g.refcountOrder, hi-start)
		hi = start + n
		switch {
		case n == 0:
		case hi-1 == own:
			end = hi
			hi--
		case idle[hi-1]:
			hi--
		default:
			return max(end, hi), nil
		}
	}
	if b == 0 {
		return max(end, 1), nil // the header's
	}
	return 0, nil
}

// area is a run of clusters at the end of the image with what describes it in front; the run may be empty.
type area struct {
	start    uint64       // first cluster: the new refcount blocks, then the new table, then the run
	first    uint64       // first cluster that has no refcount block yet
	size     refcountSize // blocks, from first on; tableClusters is 0 if the table has room for them
	run      clusterRun
	pristine bool   // the run reads as zeros, since nobody ever wrote there
	buf      []byte // whole clusters: what blocks and table are written by
}

// allocArea allocates n clusters in one run behind everything in use, with the refcount blocks that this takes in
// front of it, and a larger refcount table where they do not fit the present one. pristine reports whether the run
// reads as zeros, since nobody ever wrote there.
//
// Order: as createBlock and moveTable have it. Blocks and table are written whole, in large pieces, where nobody
// names them; the next cut names them, once they are durable. An error leaves everything as it was.
func (a *allocator) allocArea(n uint64) (run clusterRun, pristine bool, err error) {
	r, err := a.planArea(n)
	if err == nil {
		err = a.takeArea(&r)
	}
	return r.run, r.pristine, err
}

// planArea finds the place of an area with a run of n clusters.
func (a *allocator) planArea(n uint64) (r area, err error) {
	if r.start, err = a.usedEnd(); err != nil {
		return r, err
	}
	r.first = a.coveredEnd()
	full := fmt.Errorf("allocate %d clusters at host %#x: %w", n, r.start<<a.g.clusterBits, syscall.ENOSPC)
	if r.start > a.limit || n > a.limit-r.start {
		return r, full
	}
	if end := r.start + n; end > r.first {
		firstBlock := r.first >> a.g.refBlockBits
		if r.size, err = a.g.sizeRefcounts(firstBlock, end-r.first, true); err != nil {
			return r, err
		}
		if firstBlock+r.size.blocks <= a.table.n {
			r.size.tableClusters = 0
		}
	}
	r.run = clusterRun{first: r.start + r.size.blocks + r.size.tableClusters, n: n}
	if r.run.first > a.limit || n > a.limit-r.run.first {
		return r, full
	}
	r.pristine = a.h.readsZero(r.run.first << a.g.clusterBits)
	r.buf = a.g.bulkBuffer(max(r.size.blocks, r.size.tableClusters))
	return r, nil
}

// coveredEnd returns the cluster behind the range of the last refcount block.
func (a *allocator) coveredEnd() uint64 {
	b := a.table.n
	for b > 0 && a.table.load(b-1) == 0 {
		b--
	}
	return b << a.g.refBlockBits
}

// takeArea gives all clusters of the area one reference each, and makes its blocks and its table.
func (a *allocator) takeArea(r *area) error {
	bits, end := a.g.clusterBits, r.run.first+r.run.n
	a.forget(clusterRun{first: r.start, n: end - r.start})
	described := clusterRun{first: r.start, n: min(max(r.first, r.start), end) - r.start} // by blocks that exist
	if err := a.raise(described); err != nil || r.size.blocks == 0 {
		return err
	}
	grown := a.table
	if r.size.tableClusters > 0 {
		grown = a.table.grow(r.size.tableClusters << bits / 8)
	}
	blocksOff, tableOff := r.start<<bits, (r.start+r.size.blocks)<<bits
	a.h.enter(OverlapRefcountBlock, blocksOff, r.size.blocks<<bits)
	if r.size.tableClusters > 0 {
		a.h.enter(OverlapRefcountTable, tableOff, r.size.tableClusters<<bits)
	}
	if err := a.writeArea(r, grown); err != nil {
		a.h.leave(OverlapRefcountBlock|OverlapRefcountTable, blocksOff, (r.size.blocks+r.size.tableClusters)<<bits)
		for i := range r.size.blocks {
			grown.store(r.first>>a.g.refBlockBits+i, 0) // pieces of the old table may be among its own
		}
		a.undo(described)
		return err
	}
	if r.size.tableClusters > 0 {
		a.free(clusterRun{first: a.tableOff >> bits, n: a.tableClusters})
		a.table, a.tableOff, a.tableClusters = grown, tableOff, r.size.tableClusters
		a.moved = true
		a.hooks = a.hooks[:0] // all of them are in the new table
		return nil
	}
	for i := range r.size.blocks {
		a.hooks = append(a.hooks, r.first>>a.g.refBlockBits+i)
	}
	return nil
}

// writeArea writes the blocks of an area, and the table if it has one, and names them in grown.
func (a *allocator) writeArea(r *area, grown *table) error {
	bits, end := a.g.clusterBits, r.run.first+r.run.n
	err := a.h.writeBulk(useRefcountBlock, r.buf, r.start<<bits, r.size.blocks<<bits, func(p []byte, pos uint64) error {
		at := r.first + pos*8>>a.g.refcountOrder
		fillRefcounts(p, a.g.refcountOrder, max(end, at)-at)
		// Where the area begins behind first, there is nothing in front of it.
		for ci := at; ci < min(r.start, at+uint64(len(p))*8>>a.g.refcountOrder); ci++ {
			setRefcountAt(p, a.g.refcountOrder, ci-at, 0)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("new refcount blocks: %w", err)
	}
	for i := range r.size.blocks {
		grown.store(r.first>>a.g.refBlockBits+i, (r.start+i)<<bits)
	}
	if r.size.tableClusters == 0 {
		return nil
	}
	return a.h.writeRefcountTable(grown, r.buf, (r.start+r.size.blocks)<<bits, r.size.tableClusters<<bits)
}

// dropBlocks takes refcount blocks of findEnd out of the table, durably. Preconditions: the counts on the host are
// those in memory, durably, and no cut runs.
//
// Order: the entries, which lie in one range of the table with zeros between them, sync; only then the references
// to the blocks, where others describe them, are lowered in memory. A crash in between leaves some of the blocks
// named, each of which describes nothing in use, and at worst a leak: a block that nobody names, in the range of
// another one. A cluster that no block describes has no references.
func (a *allocator) dropBlocks(blocks []uint64) error {
	if len(blocks) == 0 {
		return nil
	}
	lo, hi := blocks[len(blocks)-1], blocks[0]
	if err := a.h.zero(useRefcountTable, a.tableOff+8*lo, 8*(hi-lo+1)); err != nil {
		return fmt.Errorf("refcount table: %w", err)
	}
	if err := a.h.sync(); err != nil {
		return err
	}
	var clusters []uint64
	for _, b := range blocks {
		off := a.table.load(b)
		a.forget(clusterRun{first: off >> a.g.clusterBits, n: 1})
		clusters = append(clusters, off>>a.g.clusterBits)
		a.table.store(b, 0)
		a.one, a.many = min(a.one, b<<a.g.refBlockBits), min(a.many, b<<a.g.refBlockBits)
	}
	for _, ci := range clusters {
		if a.covered(ci) {
			a.undo(clusterRun{first: ci, n: 1})
			continue
		}
		a.h.leave(OverlapRefcountBlock, ci<<a.g.clusterBits, a.g.clusterSize)
		a.one, a.many = min(a.one, ci), min(a.many, ci)
	}
	return nil
}
