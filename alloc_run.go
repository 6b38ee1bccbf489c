package qcow2

import (
	"fmt"
	"slices"
	"syscall"
)

// allocRun returns n free clusters in one run, with refcount one: a table that the header or an entry names by its
// offset alone needs them so. It looks for them from cluster from on first, then everywhere. Where the run passes clusters without refcount blocks, the blocks come to stand behind
// it rather than in it.
//
// Order: as alloc and createBlock. A new block is written whole here, and its table entry follows in a cut; an error
// here leaves blocks that nothing else uses, and changes nothing besides. Precondition: mu.
func (a *allocator) allocRun(from, n uint64) (clusterRun, error) {
	for {
		r, missing, err := a.findRun(max(from, a.one), n)
		if isNoSpace(err) && a.one < from {
			r, missing, err = a.findRun(a.one, n)
		}
		if err != nil {
			return clusterRun{}, err
		}
		if (r.first+r.n-1)>>a.g.refBlockBits >= a.table.n {
			if err := a.moveTable(); err != nil {
				return clusterRun{}, err
			}
			continue
		}
		// The last block first: a block's cluster is described by itself, by a block behind, or by one that was there.
		for i, b := range slices.Backward(missing) {
			if err := a.placeBlock(b, r.first+n+uint64(i)); err != nil {
				return clusterRun{}, err
			}
		}
		r.n = n
		if err := a.raise(r); err != nil {
			return clusterRun{}, err
		}
		if a.one == r.first {
			a.one += r.n
		}
		return r, nil
	}
}

// findRun returns the first run of free clusters from cluster from on that holds n clusters and, behind them, the
// refcount blocks that are missing for the whole of it, whose indexes in the refcount table are missing.
func (a *allocator) findRun(from, n uint64) (r clusterRun, missing []uint64, err error) {
	r.first = from
	for {
		need := n + uint64(len(missing))
		if r.n >= need {
			return r, missing, nil
		}
		ci := r.first + r.n
		if ci >= a.limit {
			return r, nil, fmt.Errorf("allocate %d clusters in one run below host %#x: %w", n, a.limit<<a.g.clusterBits, syscall.ENOSPC)
		}
		left := min(a.g.perBlock()-ci&(a.g.perBlock()-1), a.limit-ci)
		if !a.covered(ci) {
			missing = append(missing, ci>>a.g.refBlockBits)
			r.n += min(left, need+1-r.n)
			continue
		}
		s, i, err := a.slice(ci)
		if err != nil {
			return r, nil, err
		}
		left = min(left, uint64(8<<a.g.sliceBits)>>a.g.refcountOrder-i)
		if free := zeroRun(s.data, a.g.refcountOrder, i, min(left, need-r.n)); free > 0 {
			r.n += free
			continue
		}
		r, missing = clusterRun{first: ci + nonzeroRun(s.data, a.g.refcountOrder, i, left)}, missing[:0]
	}
}

// placeBlock creates the refcount block of table entry b in cluster at, which is free, as are all clusters that the
// block describes. See createBlock, which places it in the first of those.
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
