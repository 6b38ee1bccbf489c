package qcow2

import (
	"context"
	"fmt"
	"slices"
	"syscall"
)

// widening makes refcount structures of another width, with the same counts, beside those that are in force. It
// writes new blocks and a new table behind everything that has a refcount, where nothing counts or names them; they
// count themselves. The old ones are counted in the new, until they are freed.
type widening struct {
	img *Image
	g   geometry // with the new width

	// Of the survey:
	end    uint64   // behind the last cluster that has a refcount
	ranges []uint64 // indexes of the new blocks whose ranges have refcounts, in their order

	// Of write:
	placed        bool
	table         *table
	run           clusterRun // of the new structures
	tableOff      uint64     // host offset
	tableClusters uint64

	// The old block that was read last:
	block []byte
	index uint64 // its table index plus 1; 0: none
}

// newWidening returns a widening to refcounts of 2^order bits.
func newWidening(img *Image, order uint) *widening {
	return &widening{img: img, g: newGeometry(img.m.clusterBits, order, img.m.extendedL2)}
}

// blocks returns about how many blocks there will be.
func (w *widening) blocks() int { return len(w.ranges) + 1 }

// survey looks at all refcounts: ErrTooLarge for the first that the new width cannot hold. A block that stands in two
// places of the table is ErrCorrupt, so that the table cannot claim more than the file holds.
func (w *widening) survey(ctx context.Context) error {
	m := w.img.m
	a := m.alloc
	old := &m.geometry
	most := maxRefcount(w.g.refcountOrder)
	w.end, w.ranges, w.index = 0, nil, 0
	seen := make(map[uint64]struct{})
	for k, chunk := range a.table.all() {
		for j := range chunk {
			b := k<<tableChunkBits + uint64(j)
			off := a.table.at(chunk, j)
			if off == 0 {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if _, twice := seen[off]; twice {
				return &CorruptError{What: fmt.Sprintf("refcount table entry %d names a block of another", b), HostOff: int64(off), GuestOff: noOffset}
			}
			seen[off] = struct{}{}
			p, err := w.read(b)
			if err != nil {
				return err
			}
			for i := uint64(0); i < old.perBlock(); i++ {
				if i += zeroRun(p, old.refcountOrder, i, old.perBlock()-i); i >= old.perBlock() {
					break
				}
				ci := b<<old.refBlockBits + i
				if v := refcountAt(p, old.refcountOrder, i); v > most {
					return fmt.Errorf("%w: refcount %d of the cluster at host %#x, above %d", ErrTooLarge, v, ci<<m.clusterBits, most)
				}
				w.end = ci + 1
				if n := ci >> w.g.refBlockBits; len(w.ranges) == 0 || w.ranges[len(w.ranges)-1] != n {
					w.ranges = append(w.ranges, n)
				}
			}
		}
	}
	if w.end == 0 {
		return &CorruptError{What: "nothing has a refcount", HostOff: int64(a.tableOff), GuestOff: noOffset}
	}
	return nil
}

// read returns the old block of table index b, which exists. It is valid until the next call.
func (w *widening) read(b uint64) ([]byte, error) {
	if w.index == b+1 {
		return w.block, nil
	}
	a := w.img.m.alloc
	off := a.table.load(b)
	if err := a.checkBlock(off, b); err != nil {
		return nil, err
	}
	if w.block == nil {
		w.block = make([]byte, w.g.clusterSize)
	}
	w.index = 0
	if err := w.img.host.readFull(w.block, off); err != nil {
		return nil, fmt.Errorf("refcount block: %w", err)
	}
	w.index = b + 1
	return w.block, nil
}

// write places and writes the new structures, and makes them durable. Nothing that is in force changes; nothing may
// change a refcount between the survey, which it makes again, and the switch. An error leaves giveUp to be called.
func (w *widening) write(ctx context.Context, progress func(n int64)) error {
	if err := w.survey(ctx); err != nil {
		return err
	}
	m := w.img.m
	first := w.end >> w.g.refBlockBits
	below := uint64(len(w.ranges)) // blocks that describe what lies before the new structures alone
	if w.ranges[below-1] == first {
		below--
	}
	size, err := w.g.sizeRefcounts(first, w.end-first<<w.g.refBlockBits+below, true)
	if err != nil {
		return err
	}
	n := below + size.blocks + size.tableClusters
	if w.end+n > m.alloc.limit {
		return fmt.Errorf("%d clusters of refcounts at host %#x: %w", n, w.end<<m.clusterBits, syscall.ENOSPC)
	}
	w.run, w.placed = clusterRun{first: w.end, n: n}, true
	w.table = newTable(size.tableClusters << m.clusterBits / 8)
	w.tableOff, w.tableClusters = (w.end+n-size.tableClusters)<<m.clusterBits, size.tableClusters
	blocks := append(slices.Clone(w.ranges[:below]), make([]uint64, size.blocks)...)
	for i := range size.blocks {
		blocks[below+i] = first + i
	}
	h := w.img.host
	h.enter(OverlapRefcountBlock, w.end<<m.clusterBits, uint64(len(blocks))<<m.clusterBits)
	h.enter(OverlapRefcountTable, w.tableOff, w.tableClusters<<m.clusterBits)
	p := make([]byte, m.clusterSize)
	for i, b := range blocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		off := (w.end + uint64(i)) << m.clusterBits
		if err := w.fill(p, b); err != nil {
			return err
		}
		if err := h.write(useRefcountBlock, p, off); err != nil {
			return fmt.Errorf("new refcount block: %w", err)
		}
		w.table.store(b, off)
		progress(int64(m.clusterSize))
	}
	if err := h.writeRefcountTable(w.table, p, w.tableOff, w.tableClusters<<m.clusterBits); err != nil {
		return err
	}
	if w.img.wb.test.amendSkip == amendSyncRefcounts {
		return nil
	}
	return h.sync()
}

// fill makes p the new block of table index b.
func (w *widening) fill(p []byte, b uint64) error {
	clear(p)
	a := w.img.m.alloc
	old := &w.img.m.geometry
	lo, hi := b<<w.g.refBlockBits, (b+1)<<w.g.refBlockBits
	for ci := lo; ci < hi; {
		ob := ci >> old.refBlockBits
		end := min((ob+1)<<old.refBlockBits, hi)
		if a.table.load(ob) == 0 {
			ci = end
			continue
		}
		q, err := w.read(ob)
		if err != nil {
			return err
		}
		for ; ci < end; ci++ {
			i := ci & (old.perBlock() - 1)
			ci += zeroRun(q, old.refcountOrder, i, end-ci)
			if ci < end {
				setRefcountAt(p, w.g.refcountOrder, ci-lo, refcountAt(q, old.refcountOrder, ci&(old.perBlock()-1)))
			}
		}
		ci = end
	}
	for ci := max(lo, w.run.first); ci < min(hi, w.run.first+w.run.n); ci++ {
		setRefcountAt(p, w.g.refcountOrder, ci-lo, 1)
	}
	return nil
}

// giveUp forgets what write placed. Nothing counts it.
func (w *widening) giveUp() {
	if w.placed {
		w.img.host.leave(OverlapRefcountBlock|OverlapRefcountTable, w.run.first<<w.g.clusterBits, w.run.n<<w.g.clusterBits)
		w.placed = false
	}
}

// old returns the clusters of the structures that are in force, and will not be any more.
func (w *widening) old() []freedRun {
	a := w.img.m.alloc
	runs := []freedRun{{clusterRun{first: a.tableOff >> w.g.clusterBits, n: a.tableClusters}, dropOther}}
	for _, chunk := range a.table.all() {
		for j := range chunk {
			if off := a.table.at(chunk, j); off != 0 {
				runs = append(runs, freedRun{clusterRun{first: off >> w.g.clusterBits, n: 1}, dropOther})
			}
		}
	}
	return runs
}
