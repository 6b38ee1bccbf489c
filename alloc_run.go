package qcow2

import (
	"fmt"
	"slices"
	"syscall"
)

// allocRun returns n free clusters in one run, with refcount one: a table that the header or an entry names by its
// offset alone needs them so. It looks for them from cluster from on first, then everywhere. Where the run passes
// clusters without refcount blocks, the blocks come to stand behind it rather than in it.
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
		if !a.covered(ci) {
			left := min(a.g.perBlock()-ci&(a.g.perBlock()-1), a.limit-ci)
			missing = append(missing, ci>>a.g.refBlockBits)
			r.n += min(left, need+1-r.n)
			continue
		}
		free, taken, err := a.look(ci, need-r.n)
		if err != nil {
			return r, nil, err
		}
		if free > 0 {
			r.n += free
			continue
		}
		r, missing = clusterRun{first: ci + taken}, missing[:0]
	}
}
