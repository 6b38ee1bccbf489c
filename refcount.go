package qcow2

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"syscall"
)

// refcountSize is how large a refcount structure must be.
type refcountSize struct {
	blocks        uint64 // refcount blocks
	tableClusters uint64 // clusters of the refcount table
}

// sizeRefcounts is the one sizing routine: creation, growth, preallocation and rebuild ask it. It returns
// how many refcount blocks, from table entry firstBlock on, and how many clusters of refcount table are
// needed to describe clusters host clusters together with the new blocks and the table themselves. With
// slack the table has room for half as many entries again.
//
// Each round can only raise the numbers, and a block describes at least 64 clusters while it adds one, so
// the rounds end. qcow2 spec, "Host cluster management".
func (g *geometry) sizeRefcounts(firstBlock, clusters uint64, slack bool) (refcountSize, error) {
	perBlock := uint64(1) << g.refBlockBits
	perTable := g.clusterSize / 8
	maxTable := uint64(max(maxRefTableBytes>>g.clusterBits, 1))
	s := refcountSize{blocks: 0, tableClusters: 1}
	for {
		blocks := (clusters + s.blocks + s.tableClusters + perBlock - 1) / perBlock
		entries := firstBlock + blocks
		table := (entries + perTable - 1) / perTable
		if table > maxTable {
			return s, fmt.Errorf("%w: a refcount table of %d clusters of %d bytes exceeds %d bytes",
				ErrTooLarge, table, g.clusterSize, maxRefTableBytes)
		}
		if slack {
			table = min((entries+entries/2+perTable-1)/perTable, maxTable)
		}
		if blocks <= s.blocks && table <= s.tableClusters {
			return s, nil
		}
		s.blocks, s.tableClusters = max(blocks, s.blocks), max(table, s.tableClusters)
	}
}

// refcountAt returns refcount i of p, which holds refcounts of 2^order bits. Below eight bits, the first
// refcount of a byte is in its low bits. qcow2 spec, "Refcount table entry" and "Refcount block entry".
func refcountAt(p []byte, order uint, i uint64) uint64 {
	switch order {
	case 3:
		return uint64(p[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(p[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(p[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(p[8*i:])
	}
	bit := i << order
	return uint64(p[bit/8]>>(bit%8)) & (1<<(1<<order) - 1)
}

// setRefcountAt sets refcount i of p to v. Precondition: v fits 2^order bits.
func setRefcountAt(p []byte, order uint, i, v uint64) {
	switch order {
	case 3:
		p[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(p[2*i:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(p[4*i:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(p[8*i:], v)
	default:
		bit := i << order
		mask := byte(1<<(1<<order)-1) << (bit % 8)
		p[bit/8] = p[bit/8]&^mask | byte(v)<<(bit%8)&mask
	}
}

// maxRefcount returns the largest refcount of 2^order bits.
func maxRefcount(order uint) uint64 {
	return ^uint64(0) >> (64 - 1<<order)
}

// laneOnes has the lowest bit of every refcount of 2^order bits in a 64-bit word set.
var laneOnes = [7]uint64{
	^uint64(0), 0x5555555555555555, 0x1111111111111111, 0x0101010101010101,
	0x0001000100010001, 0x0000000100000001, 1,
}

// zeroRun returns how many refcounts from i on, at most n, are zero. It looks at a whole word at once
// where it can.
func zeroRun(p []byte, order uint, i, n uint64) uint64 {
	perWord := uint64(64) >> order
	end := i + n
	for j := i; j < end; {
		if j%perWord == 0 && j+perWord <= end && binary.LittleEndian.Uint64(p[j/perWord*8:]) == 0 {
			j += perWord
			continue
		}
		if refcountAt(p, order, j) != 0 {
			return j - i
		}
		j++
	}
	return n
}

// nonzeroRun returns how many refcounts from i on, at most n, are not zero.
func nonzeroRun(p []byte, order uint, i, n uint64) uint64 {
	perWord := uint64(64) >> order
	ones := laneOnes[order]
	tops := ones << (1<<order - 1)
	end := i + n
	for j := i; j < end; {
		if j%perWord == 0 && j+perWord <= end {
			// A lane's top bit survives in some lane exactly if a lane is zero.
			w := binary.LittleEndian.Uint64(p[j/perWord*8:])
			if (w-ones)&^w&tops == 0 {
				j += perWord
				continue
			}
		}
		if refcountAt(p, order, j) == 0 {
			return j - i
		}
		j++
	}
	return n
}

// allocator hands out host clusters and keeps their refcounts. It sees host offsets only. Every method
// needs the metadata lock.
//
// What it holds in memory is never below what the disk needs (I1): raising is done at once, and a cluster
// that lost a reference is lowered only after the change that dropped the reference is durable (release).
// So a dirty slice may be written at any time, whatever else is or is not on disk, and nothing that is
// not durable is handed out again (I4).
//
// The refcount table in memory can be ahead of the disk: a block that was created since the last cut is
// written already, but its table entry waits (hooks) until the block is durable, and so does the header's
// pointer to a table that moved (moved). I3.
type allocator struct {
	g        geometry
	h        *hostFile
	max      uint64 // largest refcount
	capacity int    // number of slices in memory
	limit    uint64 // clusters of the host file if it cannot grow; else that of maxHostOff

	table         *table // refcount table
	tableOff      uint64 // its host offset
	tableClusters uint64
	moved         bool     // the header on disk names an earlier table
	hooks         []uint64 // table indexes whose entries are not on disk

	slices map[uint64]*refcountSlice // by host offset
	clock  uint64                    // counts uses of slices

	// Hints: no single free cluster lies below one; and no run of free clusters worth taking below many
	// (a run that was too short for an earlier request is left to single clusters).
	one, many uint64

	packOff uint64 // host offset where the next compressed cluster may start; 0: in a new cluster

	test testHooks

	freed   []freedRun    // references dropped since the last cut
	waiting atomic.Uint64 // their number; written under the metadata lock

	released atomic.Uint64 // counts the references that release lowered; written under the metadata lock
}

// clusterRun is a run of host clusters, or n references to one where that is said.
type clusterRun struct {
	first uint64 // cluster index
	n     uint64
}

// dropCause says why a reference was dropped, by which OpenOptions.Discard decides whether the host gets the space
// back.
type dropCause uint8

const (
	dropOther    dropCause = iota // the cluster was rewritten elsewhere, or is a table that moved
	dropDiscard                   // Discard, or WriteZeroes with ZeroMayUnmap
	dropSnapshot                  // a snapshot was deleted
)

// freedRun is references that were dropped, one to each cluster of the run.
type freedRun struct {
	clusterRun
	cause dropCause
}

// refcountSlice is a piece of a refcount block in memory, as it stands on disk.
type refcountSlice struct {
	off   uint64
	data  []byte
	dirty bool
	used  uint64 // allocator.clock of its last use
}

// newAllocator returns an allocator over the refcount table t at host offset off.
func newAllocator(g geometry, h *hostFile, t *table, off, clusters uint64, cacheBytes int64, size int64) *allocator {
	a := &allocator{
		g: g, h: h, max: maxRefcount(g.refcountOrder),
		table: t, tableOff: off, tableClusters: clusters,
		slices:   make(map[uint64]*refcountSlice),
		capacity: int(max(cacheBytes>>g.sliceBits, 2)),
		limit:    maxHostOff >> g.clusterBits,
	}
	if h.fixed {
		a.limit = min(a.limit, uint64(size)>>g.clusterBits)
	}
	return a
}

// reload takes the refcount table t, at host offset off, in place of what it knows; the width of refcounts may be
// another. Nothing is dirty.
func (a *allocator) reload(g geometry, t *table, off, clusters uint64) {
	a.g, a.max = g, maxRefcount(g.refcountOrder)
	a.hooks, a.moved = a.hooks[:0], false
	a.table, a.tableOff, a.tableClusters = t, off, clusters
	clear(a.slices)
	a.one, a.many, a.packOff = 0, 0, 0
}

// slice returns the slice that holds the refcount of host cluster ci, and the refcount's index in it.
// The refcount block must exist.
func (a *allocator) slice(ci uint64) (*refcountSlice, uint64, error) {
	block := a.table.load(ci >> a.g.refBlockBits)
	if err := a.checkBlock(block, ci>>a.g.refBlockBits); err != nil {
		return nil, 0, err
	}
	perSlice := uint64(8<<a.g.sliceBits) >> a.g.refcountOrder
	i := ci & (1<<a.g.refBlockBits - 1)
	off := block + i/perSlice<<a.g.sliceBits
	a.clock++
	if s := a.slices[off]; s != nil {
		s.used = a.clock
		return s, i % perSlice, nil
	}
	s, err := a.room()
	if err != nil {
		return nil, 0, err
	}
	if err := a.h.readFull(s.data, off); err != nil {
		return nil, 0, fmt.Errorf("refcount block: %w", err)
	}
	s.off, s.used = off, a.clock
	a.slices[off] = s
	return s, i % perSlice, nil
}

// checkBlock refuses a refcount table entry that cannot be one.
func (a *allocator) checkBlock(block, index uint64) error {
	if a.g.offsetInCluster(block) != 0 || block == 0 || block >= maxHostOff {
		return &CorruptError{
			What:    fmt.Sprintf("refcount table entry %d is %#x: not the offset of a cluster", index, block),
			HostOff: int64(a.tableOff + 8*index), GuestOff: noOffset,
		}
	}
	return nil
}

// room returns a slice to fill, pushing out the one that was not used for longest if there are too many.
// A dirty one is written first: it may be, at any time.
func (a *allocator) room() (*refcountSlice, error) {
	if len(a.slices) < a.capacity {
		return &refcountSlice{data: make([]byte, 1<<a.g.sliceBits)}, nil
	}
	var victim *refcountSlice
	for _, s := range a.slices {
		if victim == nil || s.used < victim.used {
			victim = s
		}
	}
	if err := a.writeSlice(victim); err != nil {
		return nil, err
	}
	delete(a.slices, victim.off)
	return victim, nil
}

// writeSlice writes a slice if it is dirty.
func (a *allocator) writeSlice(s *refcountSlice) error {
	if !s.dirty {
		return nil
	}
	if err := a.h.write(useRefcountBlock, s.data, s.off); err != nil {
		return fmt.Errorf("refcount block: %w", err)
	}
	s.dirty = false
	return nil
}

// writeBack writes all dirty slices, in the order of the file.
func (a *allocator) writeBack() error {
	var dirty []*refcountSlice
	for _, s := range a.slices {
		if s.dirty {
			dirty = append(dirty, s)
		}
	}
	slices.SortFunc(dirty, func(x, y *refcountSlice) int { return cmp.Compare(x.off, y.off) })
	for _, s := range dirty {
		if err := a.writeSlice(s); err != nil {
			return err
		}
	}
	return nil
}

// covered reports whether cluster ci has a refcount block.
func (a *allocator) covered(ci uint64) bool { return a.table.load(ci>>a.g.refBlockBits) != 0 }

// refcount returns the refcount of host cluster ci; without a refcount block it is 0.
func (a *allocator) refcount(ci uint64) (uint64, error) {
	if !a.covered(ci) {
		return 0, nil
	}
	s, i, err := a.slice(ci)
	if err != nil {
		return 0, err
	}
	return refcountAt(s.data, a.g.refcountOrder, i), nil
}

// allocatedKinds are the kinds of metadata that stop being so with the last reference. Those of snapshots, and
// those that the header names, do not: while something on disk still calls a cluster so, a refcount that says
// otherwise is wrong.
const allocatedKinds = OverlapActiveL2 | OverlapRefcountTable | OverlapRefcountBlock

// add changes the refcount of every cluster of r by delta. The refcount blocks must exist. A result that
// does not fit is an error; the clusters before it are changed, and n tells how many.
func (a *allocator) add(r clusterRun, delta int) (n uint64, err error) {
	perSlice := uint64(8<<a.g.sliceBits) >> a.g.refcountOrder
	for n < r.n {
		s, i, err := a.slice(r.first + n)
		if err != nil {
			return n, err
		}
		for ; i < perSlice && n < r.n; i, n = i+1, n+1 {
			v := refcountAt(s.data, a.g.refcountOrder, i)
			ci := r.first + n
			switch {
			case delta > 0 && a.max-v < uint64(delta):
				return n, fmt.Errorf("%w: refcount of the cluster at host %#x would exceed %d", ErrTooLarge, ci<<a.g.clusterBits, a.max)
			case delta < 0 && v < uint64(-delta):
				return n, &CorruptError{What: "refcount is below the number of references", HostOff: int64(ci << a.g.clusterBits), GuestOff: noOffset}
			}
			v += uint64(delta)
			setRefcountAt(s.data, a.g.refcountOrder, i, v)
			s.dirty = true
			if v == 0 {
				a.h.leave(allocatedKinds, ci<<a.g.clusterBits, a.g.clusterSize)
				a.one, a.many = min(a.one, ci), min(a.many, ci)
				if a.packOff>>a.g.clusterBits == ci {
					a.packOff = 0
				}
			}
		}
	}
	return n, nil
}

// raise adds a reference to every cluster of r, or to none.
func (a *allocator) raise(r clusterRun) error {
	n, err := a.add(r, 1)
	if err != nil {
		a.undo(clusterRun{first: r.first, n: n})
	}
	return err
}

// alloc returns up to n free clusters in one run, with refcount one: as many as the first run that is
// long enough to be worth it holds.
func (a *allocator) alloc(n uint64) (clusterRun, error) {
	// A run ends at the latest where the next refcount block stands, so no more than a quarter of a
	// block's range is insisted on.
	want := min(n, uint64(1)<<a.g.refBlockBits/4)
	hint := &a.many
	if want == 1 {
		hint = &a.one
	}
	r, err := a.find(*hint, want, n)
	if err != nil && want > 1 && isNoSpace(err) {
		hint = &a.one
		r, err = a.find(*hint, 1, n)
	}
	if err != nil {
		return r, err
	}
	if err := a.raise(r); err != nil {
		return clusterRun{}, err
	}
	*hint = r.first + r.n
	return r, nil
}

// find returns the first run of at least want free clusters at or after cluster from, cut to n. Refcount
// blocks that the run needs are created.
func (a *allocator) find(from, want, n uint64) (clusterRun, error) {
	run := clusterRun{first: from}
	for {
		ci := run.first + run.n
		if run.n >= n {
			return run, nil
		}
		if ci >= a.limit {
			if run.n >= want {
				return run, nil
			}
			return run, fmt.Errorf("allocate a cluster at host %#x: %w", ci<<a.g.clusterBits, syscall.ENOSPC)
		}
		if !a.covered(ci) {
			if run.n >= want {
				return run, nil
			}
			if err := a.createBlock(ci >> a.g.refBlockBits); err != nil {
				return run, err
			}
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
		if run.n >= want {
			return run, nil
		}
		run = clusterRun{first: ci + taken}
	}
}

// look returns how many clusters from ci on are free, at most n, or else how many are taken. It looks no further than
// the slice that holds ci's refcount, whose block must exist, and the limit.
func (a *allocator) look(ci, n uint64) (free, taken uint64, err error) {
	s, i, err := a.slice(ci)
	if err != nil {
		return 0, 0, err
	}
	left := min(uint64(8<<a.g.sliceBits)>>a.g.refcountOrder-i, a.limit-ci)
	if free = zeroRun(s.data, a.g.refcountOrder, i, min(left, n)); free > 0 {
		return free, 0, nil
	}
	return 0, nonzeroRun(s.data, a.g.refcountOrder, i, left), nil
}

// createBlock creates the refcount block of table entry b. It stands in the first cluster that it
// describes, which is free, as is all of its range while the block is missing; so it needs no other
// block. Where the table is too short, it moves first (and then the block may exist).
//
// Order: the block is written whole here; its table entry follows in a cut, after the sync that makes
// the block durable, and mappings into its range after the sync behind that. A crash in between leaves a
// block that nobody names, in a range that nobody uses; an error here leaves nothing.
func (a *allocator) createBlock(b uint64) error {
	if b >= a.table.n {
		return a.moveTable()
	}
	if b == 0 {
		return &CorruptError{What: "refcount table entry 0 is 0: the header has no refcount", HostOff: int64(a.tableOff), GuestOff: noOffset}
	}
	return a.placeBlock(b, b<<a.g.refBlockBits)
}

// placeBlock creates the refcount block of table entry b in cluster at, which is free, as are all clusters that the
// block describes. Where another block describes it, that one counts it.
func (a *allocator) placeBlock(b, at uint64) error {
	own := clusterRun{first: at, n: 1}
	block := make([]byte, a.g.clusterSize)
	if at>>a.g.refBlockBits == b {
		setRefcountAt(block, a.g.refcountOrder, at&(a.g.perBlock()-1), 1)
		own.n = 0
	} else if err := a.raise(own); err != nil {
		return err
	}
	off := at << a.g.clusterBits
	a.forget(clusterRun{first: at, n: 1})
	a.h.enter(OverlapRefcountBlock, off, a.g.clusterSize)
	if err := a.h.write(useRefcountBlock, block, off); err != nil {
		a.h.leave(OverlapRefcountBlock, off, a.g.clusterSize)
		a.undo(own)
		return fmt.Errorf("new refcount block: %w", err)
	}
	a.table.store(b, off)
	a.hooks = append(a.hooks, b)
	return nil
}

// moveTable replaces the full refcount table by a larger one. New blocks and the new table stand behind
// everything that the old table describes, and describe themselves.
//
// Order: blocks and table are written whole here, where nobody names them; the cut syncs them, then
// switches the header by one write of offset and length, syncs, and only then writes mappings into the
// new range; the old table is freed when the cut has ended. Before the switch is durable a crash leaves
// the old table, which still describes every mapping on disk; after it the new one, which holds all
// entries of the old. An error here leaves the old table in force.
func (a *allocator) moveTable() error {
	first := a.table.n << a.g.refBlockBits
	size, err := a.g.sizeRefcounts(a.table.n, 0, true)
	if err != nil {
		return err
	}
	end := first + size.blocks + size.tableClusters
	if end > a.limit {
		return fmt.Errorf("move the refcount table to host %#x: %w", first<<a.g.clusterBits, syscall.ENOSPC)
	}
	return a.takeArea(&area{start: first, first: first, size: size, run: clusterRun{first: end}, buf: make([]byte, a.g.clusterSize)})
}

// forget drops slices that stood where new refcount blocks or other clusters come to stand.
func (a *allocator) forget(r clusterRun) {
	lo, hi := r.first<<a.g.clusterBits, (r.first+r.n)<<a.g.clusterBits
	for off := range a.slices {
		if lo <= off && off < hi {
			delete(a.slices, off)
		}
	}
}

// pack returns the host offset where n bytes of a compressed cluster may be written, n < cluster size,
// and raises the refcounts of the one or two clusters that they touch. It packs to the byte: behind the
// payload before, unless that cluster's refcount is at its maximum, or the payload would need a next
// cluster that is taken. qcow2 spec, "Compressed Clusters Descriptor".
func (a *allocator) pack(n uint64) (uint64, error) {
	if in := a.g.offsetInCluster(a.packOff); in != 0 {
		ci := a.packOff >> a.g.clusterBits
		v, err := a.refcount(ci)
		if err != nil {
			return 0, err
		}
		if v > 0 && v < a.max {
			touched := clusterRun{first: ci, n: 1}
			if n > a.g.clusterSize-in {
				touched.n = 2
				next, err := a.refcount(ci + 1)
				if err != nil {
					return 0, err
				}
				if ci+1 >= a.limit || !a.covered(ci+1) || next != 0 {
					touched.n = 0
				}
			}
			if touched.n > 0 {
				if err := a.raise(touched); err != nil {
					return 0, err
				}
				return a.advancePack(n), nil
			}
		}
	}
	r, err := a.alloc(1)
	if err != nil {
		return 0, err
	}
	a.packOff = r.first << a.g.clusterBits
	return a.advancePack(n), nil
}

// advancePack takes n bytes at packOff and returns where they begin.
func (a *allocator) advancePack(n uint64) uint64 {
	off := a.packOff
	a.packOff += n
	if a.g.offsetInCluster(a.packOff) == 0 {
		a.packOff = 0
	}
	return off
}

// undo gives clusters back whose mapping was never made. No request can know them. Where the host fails to
// read their refcounts now, they go the way of dropped clusters, which tries again.
func (a *allocator) undo(r clusterRun) {
	if n, err := a.add(r, -1); err != nil {
		a.free(clusterRun{first: r.first + n, n: r.n - n})
	}
}

// free drops one reference of each cluster of r. The references are counted until the cut that holds the
// change is durable and release is called (I1, I4).
func (a *allocator) free(r clusterRun) { a.freeFor(dropOther, r) }

// freeFor is free for a cause of its own.
func (a *allocator) freeFor(cause dropCause, r clusterRun) {
	if a.test.reuseImmediately {
		_, _ = a.release([]freedRun{{r, cause}})
		return
	}
	a.waiting.Add(r.n)
	if n := len(a.freed); n > 0 && a.freed[n-1].first+a.freed[n-1].n == r.first && a.freed[n-1].cause == cause {
		a.freed[n-1].n += r.n
		return
	}
	a.freed = append(a.freed, freedRun{r, cause})
}

// release lowers the refcounts of runs whose drop is durable and that no request uses any more. It
// returns what it could not lower for an error of the host; an entry that cannot be lowered because the
// image is corrupt is passed over.
func (a *allocator) release(runs []freedRun) ([]freedRun, error) {
	for i, r := range runs {
		for r.n > 0 {
			n, err := a.add(r.clusterRun, -1)
			a.released.Add(n)
			r.first, r.n = r.first+n, r.n-n
			var corrupt *CorruptError
			switch {
			case errors.As(err, &corrupt):
				r.first, r.n = r.first+1, r.n-1
			case err != nil:
				runs[i] = r
				return runs[i:], err
			}
		}
	}
	return nil, nil
}

// releaseShared is release for the clusters of r that somebody else refers to as well. The others, whose only
// reference is the dropped one, it appends to sole and leaves as they are: until they are released nobody
// takes them, since pack is kept from what is left in them. It returns how many clusters it went through.
func (a *allocator) releaseShared(r freedRun, sole []freedRun) (n uint64, _ []freedRun, err error) {
	perSlice := uint64(8<<a.g.sliceBits) >> a.g.refcountOrder
	for n < r.n {
		s, i, err := a.slice(r.first + n)
		if err != nil {
			return n, sole, err
		}
		for ; i < perSlice && n < r.n; i, n = i+1, n+1 {
			ci := r.first + n
			switch v := refcountAt(s.data, a.g.refcountOrder, i); v {
			case 0: // corrupt: passed over, as release does
			case 1:
				if a.packOff>>a.g.clusterBits == ci {
					a.packOff = 0
				}
				if k := len(sole); k > 0 && sole[k-1].first+sole[k-1].n == ci && sole[k-1].cause == r.cause {
					sole[k-1].n++
				} else {
					sole = append(sole, freedRun{clusterRun{first: ci, n: 1}, r.cause})
				}
			default:
				setRefcountAt(s.data, a.g.refcountOrder, i, v-1)
				s.dirty = true
				a.released.Add(1)
			}
		}
	}
	return n, sole, nil
}

// checkReferenced refuses to go on if a cluster that is about to lose a reference has none: its refcount
// is wrong, and lowering it would free somebody else's cluster.
func (a *allocator) checkReferenced(r clusterRun) error {
	perSlice := uint64(8<<a.g.sliceBits) >> a.g.refcountOrder
	for r.n > 0 {
		n := uint64(0)
		if a.covered(r.first) {
			s, i, err := a.slice(r.first)
			if err != nil {
				return err
			}
			n = nonzeroRun(s.data, a.g.refcountOrder, i, min(r.n, perSlice-i))
			if n == min(r.n, perSlice-i) {
				r.first, r.n = r.first+n, r.n-n
				continue
			}
		}
		return &CorruptError{What: "refcount 0 of a cluster in use", HostOff: int64((r.first + n) << a.g.clusterBits), GuestOff: noOffset}
	}
	return nil
}
