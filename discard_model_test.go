package qcow2

import (
	"errors"
	"fmt"
	"hash/fnv"
)

// discardOptions sets what an image of the configuration does with discarded clusters: each of the ways that there are
// meets each layout.
func (c workloadConfig) discardOptions(o *OpenOptions) {
	h := fnv.New32a()
	fmt.Fprint(h, c)
	n := h.Sum32()
	o.Discard = DiscardMode(n % 3)
	o.DiscardNoUnref = c.version == 3 && n/3%3 == 0
}

// zeroing returns a Discard or WriteZeroes of part of the disk, sometimes of a large one.
func (g *generator) zeroing() op {
	o := op{kind: [...]opKind{opDiscard, opDiscard, opZero, opUnmap}[g.rng.IntN(4)]}
	o.off, o.n = g.guestRange()
	switch k := g.rng.IntN(40); {
	case k == 0 && o.kind == opDiscard:
		o.off, o.n = 0, g.size
	case k < 4:
		o.n = g.size - o.off
		if o.kind != opDiscard || k > 1 {
			o.n = min(o.n, 8*g.c.clusterSize, 4<<20)
		}
	case k < 20: // whole clusters
		cs := g.c.clusterSize
		o.off -= o.off % cs
		o.n = min(cs*(1+g.rng.Int64N(4)), g.size-o.off)
	case k == 20: // past the end: refused
		o.off, o.n = g.size-g.rng.Int64N(1000), 1000+g.rng.Int64N(5000)
	}
	return o
}

// zero makes the n bytes at off zeros.
func (m *sparseBytes) zero(off, n int64) {
	for i, pg := range m.pages {
		lo, hi := max(off-i*modelPage, 0), min(off+n-i*modelPage, modelPage)
		if lo >= hi {
			continue
		}
		if lo == 0 && hi == modelPage {
			delete(m.pages, i)
		} else {
			clear(pg[lo:hi])
		}
	}
}

// zero carries out a Discard or WriteZeroes.
func (r *modelRun) zero(o op) error {
	size := r.model.size
	inside := o.off >= 0 && o.off <= size && o.n <= size-o.off
	err := r.zeroImage(o)
	if !inside {
		if !errors.Is(err, ErrRange) {
			return fmt.Errorf("%w, want ErrRange", err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	if o.kind != opDiscard {
		r.model.zero(o.off, o.n)
		return nil
	}
	cs := r.c.clusterSize
	lo, hi := (o.off+cs-1)/cs*cs, (o.off+o.n)/cs*cs
	if o.off+o.n == size {
		hi = size
	}
	if r.c.version == 2 && r.img.Backing() != nil {
		// Only what lies past the end of the backing file can be dropped.
		lo = max(lo, (r.img.Backing().Size()+cs-1)/cs*cs)
	}
	if lo < hi {
		r.model.zero(lo, hi-lo)
	}
	if r.c.layout == layoutExtended {
		return r.adoptEnds(o)
	}
	return nil
}

// zeroImage carries out o on the image.
func (r *modelRun) zeroImage(o op) error {
	switch o.kind {
	case opZero:
		return r.img.WriteZeroes(o.off, o.n, 0)
	case opUnmap:
		return r.img.WriteZeroes(o.off, o.n, ZeroMayUnmap)
	}
	return r.img.Discard(o.off, o.n)
}

// adoptEnds takes into the model the subclusters of the clusters at the ends of a discarded range: they are zeros, or,
// in compressed clusters, as they were.
func (r *modelRun) adoptEnds(o op) error {
	sub := r.c.clusterSize / subclustersPerCluster
	end := o.off + o.n
	for _, start := range []int64{o.off / r.c.clusterSize * r.c.clusterSize, (end - 1) / r.c.clusterSize * r.c.clusterSize} {
		for at := start; at < start+r.c.clusterSize; at += sub {
			if at < o.off || at+sub > end {
				continue
			}
			got, want := r.buffers(sub)
			if _, err := r.img.ReadAt(got, at); err != nil {
				return err
			}
			r.model.read(want, at)
			if allZero(got) {
				r.model.zero(at, sub)
			} else if err := difference(got, want, at); err != nil {
				return fmt.Errorf("neither discarded nor as it was: %w", err)
			}
		}
	}
	return nil
}
