package qcow2

import (
	"encoding/binary"
	"fmt"
	"syscall"
)

// lower is steps 5 and 6: it lowers the refcounts to what c counted and sets COPIED where it is missing.
func (r *repairer) lower(c *checker) error {
	if c.uncounted || c.unusable {
		return nil // more is wrong than can be mended
	}
	err := r.writeCounts(c, func(stored, n uint64) uint64 { return min(stored, n) })
	if err != nil {
		return err
	}
	if err := r.syncAt(repairSyncLower); err != nil {
		return err
	}
	set := func(w uint64) (uint64, error) {
		ci := w & offsetMask >> c.clusterBits
		if w&flagCopied != 0 || w&offsetMask == 0 || c.offsetInCluster(w&offsetMask) != 0 || c.refs.count(ci) != 1 {
			return w, nil
		}
		v, ok, err := c.stored(ci)
		if err != nil || !ok || v != 1 {
			return w, err
		}
		return w | flagCopied, nil
	}
	if err := r.eachCopied(c, set); err != nil {
		return err
	}
	return r.sync()
}

// writeCounts makes the refcounts of all clusters what pick returns for the stored refcount and the number of
// references that c counted. Ranges without a refcount block are passed over.
func (r *repairer) writeCounts(c *checker, pick func(stored, n uint64) uint64) error {
	before, now := make([]byte, c.clusterSize), make([]byte, c.clusterSize)
	for _, b := range c.refRanges() {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		off, ok := c.blockOff(b)
		if !ok || off == 0 {
			continue
		}
		if err := r.host.readFull(before, off); err != nil {
			return fmt.Errorf("refcount block: %w", err)
		}
		copy(now, before)
		first := b << c.refBlockBits
		for i := range c.perBlock() {
			stored, n := refcountAt(now, c.refcountOrder, i), c.refs.count(first+i)
			if v := pick(stored, n); v != stored {
				setRefcountAt(now, c.refcountOrder, i, v)
			}
		}
		if err := r.writeChanged(useRefcountBlock, before, now, off); err != nil {
			return fmt.Errorf("refcount block: %w", err)
		}
	}
	return nil
}

// take takes n clusters in one run that c counted no reference to, and counts one to each: behind all others,
// or between them where the host cannot grow so far. A snapshot table past the end of the file is left alone: the header
// names it, so that a reader would see there what is half written (I3).
func (r *repairer) take(c *checker, n uint64) (clusterRun, error) {
	run := clusterRun{first: c.refs.end(), n: n}
	beyond := func(ci uint64) bool { return ci-c.snapBeyond.first < c.snapBeyond.n }
	if beyond(run.first) || run.first < c.snapBeyond.first && n > c.snapBeyond.first-run.first {
		run.first = c.snapBeyond.first + c.snapBeyond.n
	}
	limit := uint64(maxHostOff) >> c.clusterBits
	if r.host.fixed {
		limit = min(limit, c.size>>c.clusterBits)
	}
	if run.first > limit || n > limit-run.first {
		run.first = 1
		for free := uint64(0); free < n; {
			ci := run.first + free
			switch {
			case ci >= limit:
				return run, fmt.Errorf("take %d clusters for the repair: %w", n, syscall.ENOSPC)
			case c.refs.count(ci) != 0 || beyond(ci):
				run.first, free = ci+1, 0
			default:
				free++
			}
		}
	}
	for i := range n {
		c.refs.set(run.first+i, 1)
	}
	return run, nil
}

// raise is step 2.
func (r *repairer) raise(c *checker) error {
	clearWrong := func(w uint64) (uint64, error) {
		if w&flagCopied != 0 && c.refs.count(w&offsetMask>>c.clusterBits) != 1 {
			w &^= flagCopied
		}
		return w, nil
	}
	if err := r.eachCopied(c, clearWrong); err != nil {
		return err
	}
	if err := r.syncAt(repairSyncClear); err != nil {
		return err
	}
	var blocks []newBlock
	if !c.unusable {
		var err error
		if blocks, err = r.missingBlocks(c); err != nil {
			return err
		}
	}
	if blocks == nil {
		if err := r.rebuild(c); err != nil {
			return err
		}
		// An entry in a cluster of the old structures could not be cleared before.
		if err := r.eachCopied(c, clearWrong); err != nil {
			return err
		}
		return r.sync()
	}
	err := r.writeCounts(c, func(stored, n uint64) uint64 { return max(stored, n) })
	if err != nil {
		return err
	}
	for _, b := range blocks {
		if err := r.writeBlock(c, b.index, b.off); err != nil {
			return err
		}
	}
	if err := r.sync(); err != nil {
		return err
	}
	for _, b := range blocks {
		if err := r.write(useRefcountTable, binary.BigEndian.AppendUint64(nil, b.off), r.h.refTableOff+8*b.index); err != nil {
			return fmt.Errorf("refcount table: %w", err)
		}
		c.refTable.store(b.index, b.off)
	}
	return r.sync()
}

// newBlock is a refcount block to be written: its index in the refcount table and its host offset.
type newBlock struct{ index, off uint64 }

// missingBlocks returns the refcount blocks that must be made so that every cluster with references has one,
// those blocks too; nil if the refcount table has no room for them.
func (r *repairer) missingBlocks(c *checker) ([]newBlock, error) {
	blocks := []newBlock{}
	made := make(map[uint64]bool)
	for again := true; again; {
		again = false
		for _, b := range c.refRanges() {
			if off, _ := c.blockOff(b); off != 0 || made[b] || !c.anyRef(b) {
				continue
			}
			if b >= c.refTable.n {
				return nil, nil
			}
			run, err := r.take(c, 1)
			if err != nil {
				return nil, err
			}
			blocks = append(blocks, newBlock{b, run.first << c.clusterBits})
			made[b] = true
			again = true // the block itself may be the first in its range
		}
	}
	return blocks, nil
}

// anyRef reports whether c counted references in the range of refcount block b.
func (c *checker) anyRef(b uint64) bool {
	first := b << c.refBlockBits
	for n := uint64(0); n < c.perBlock(); {
		k := min(c.perBlock()-n, refChunkWords-(first+n)&(refChunkWords-1))
		if c.refs.anyIn(first+n, k) {
			return true
		}
		n += k
	}
	return false
}

// writeBlock writes refcount block b whole at host offset off, with what c counted.
func (r *repairer) writeBlock(c *checker, b, off uint64) error {
	p := make([]byte, c.clusterSize)
	for i := range c.perBlock() {
		if n := c.refs.count(b<<c.refBlockBits + i); n != 0 {
			setRefcountAt(p, c.refcountOrder, i, n)
		}
	}
	r.host.enter(OverlapRefcountBlock, off, c.clusterSize)
	if err := r.write(useRefcountBlock, p, off); err != nil {
		return fmt.Errorf("new refcount block: %w", err)
	}
	return nil
}

// rebuild makes new refcount structures for what c counted, the old ones included, which are leaks then.
//
// Order: blocks and table are written whole behind everything that is referred to, sync; one header write
// switches to them, sync. A crash before leaves the old structures and what nobody refers to; after it the
// new ones, which are right for every entry on disk.
func (r *repairer) rebuild(c *checker) error {
	below := uint64(0) // blocks that describe what lies before the new structures alone
	end := c.refs.end()
	first := end >> c.refBlockBits
	for _, b := range c.refRanges() {
		if b != first && c.anyRef(b) {
			below++
		}
	}
	size, err := c.sizeRefcounts(first, end-first<<c.refBlockBits+below, true)
	if err != nil {
		return err
	}
	run, err := r.take(c, below+size.blocks+size.tableClusters)
	if err != nil {
		return err
	}
	t := newTable(size.tableClusters << c.clusterBits / 8)
	at := run.first << c.clusterBits
	left := run.n - size.tableClusters
	for _, b := range c.refRanges() {
		if !c.anyRef(b) {
			continue
		}
		if left == 0 || b >= t.n {
			// Between others, in a range that nothing else needed.
			return fmt.Errorf("place new refcount blocks: %w", syscall.ENOSPC)
		}
		if err := r.writeBlock(c, b, at); err != nil {
			return err
		}
		t.store(b, at)
		at, left = at+c.clusterSize, left-1
	}
	r.host.enter(OverlapRefcountTable, at, size.tableClusters<<c.clusterBits)
	p := make([]byte, c.clusterSize)
	for i := range size.tableClusters {
		t.encode(p, i<<c.clusterBits/8)
		if err := r.write(useRefcountTable, p, at+i<<c.clusterBits); err != nil {
			return fmt.Errorf("new refcount table: %w", err)
		}
	}
	if err := r.syncAt(repairSyncTable); err != nil {
		return err
	}
	off, header := encodeRefcountTableFields(at, uint32(size.tableClusters))
	if err := r.writeHeader(off, header); err != nil {
		return err
	}
	oldOff, oldBytes := r.h.refTableOff, r.h.refTableBytes()
	r.h.refTableOff, r.h.refTableClusters = at, uint32(size.tableClusters)
	r.rebuilt = true
	r.retire(c, oldOff, oldBytes)
	r.host.enter(OverlapRefcountTable, at, size.tableClusters<<c.clusterBits)
	for i := range t.n {
		if off := t.load(i); off != 0 {
			r.host.enter(OverlapRefcountBlock, off, c.clusterSize)
		}
	}
	return nil
}

// retire takes the refcount table of c, which was n bytes at host offset off, and its blocks off the list of
// metadata: another table that lies in one of their clusters has it for itself now, and is mended like others.
func (r *repairer) retire(c *checker, off, n uint64) {
	if c.refTable == nil {
		return
	}
	leave := func(k OverlapKinds, off, n uint64) {
		if n > 0 && c.inside(off, n) {
			r.host.leave(k, off, n)
		}
	}
	leave(OverlapRefcountTable, off, n)
	for _, chunk := range c.refTable.all() {
		for _, w := range chunk {
			leave(OverlapRefcountBlock, w&^refTableReserved, c.clusterSize)
		}
	}
}
