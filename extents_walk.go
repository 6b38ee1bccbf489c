package qcow2

import "fmt"

// tableWalk looks up a guest range from its beginning to its end, of which it reads the L2 tables in large pieces. The
// first slice comes through the cache, so that short ranges cost what a read of them does; from there on it reads
// windows past the cache, each longer than the one before, so that one who stops early has not read much for nothing.
//
// A window is read by a registered request, and then a copy of the walk's own: what it tells is the state as of some
// moment within the walk, with the backing disk of that moment.
type tableWalk struct {
	img   *Image
	end   uint64  // guest offset where the walk ends
	below backing // what lies below the image, as of the last look-up

	cached uint64     // up to here entries come through the cache, the first slice; 0: the walk has not begun
	window l2Slice    // entries of the guest range from start on, of one or more tables that follow each other
	rules  entryRules // as of the last look-up
	start  uint64     // guest offset, cluster-aligned
	stop   uint64     // guest offset behind the window; 0: there is none
	grow   uint64     // bytes that the next window may have

	holes hostHoles
}

// Bounds of the windows of a tableWalk, in bytes of L2 entries. The largest is read with less than a hundredth of
// its time spent on the call, and fits the processor's cache.
const (
	firstWindow = 16 << 10
	lastWindow  = 256 << 10
)

// next returns the extent at off, where the walk has come to, as mapper.resolve does: it may be shorter than the run is.
func (w *tableWalk) next(off uint64) (extent, error) {
	if off < w.stop {
		if err := w.img.readable(); err != nil {
			return extent{}, err
		}
		return w.inWindow(off)
	}
	return w.look(off)
}

// look is next behind the window, as a request of its own.
func (w *tableWalk) look(off uint64) (extent, error) {
	img := w.img
	defer img.reqs.leave(img.reqs.enter())
	if err := img.readable(); err != nil {
		return extent{}, err
	}
	w.holes.begin(img)
	x, err := w.lookUp(off)
	if err == nil && x.kind == kindNormal {
		w.holes.found(img, int64(x.hostOff), int64(x.n))
	}
	return x, err
}

// lookUp returns the extent at off, behind the window: it reads the next one, or finds that none is needed.
// Precondition: the caller is a registered request.
func (w *tableWalk) lookUp(off uint64) (extent, error) {
	img, m := w.img, w.img.m
	w.below, w.rules = img.below, m.entryRules
	if w.cached == 0 {
		reach := uint64(1) << (m.clusterBits + m.sliceBits - m.l2EntryBits)
		w.cached = off&^(reach-1) + reach
		w.grow = firstWindow
	}
	l2Off, err := m.l2Table(off)
	switch {
	case err != nil:
		return extent{}, err
	case l2Off == 0:
		return extent{kind: kindUnallocated, n: m.withoutTable(off, w.end) - off}, nil
	case off < w.cached:
		return m.resolve(off, w.end-off)
	}
	if err := w.read(off, l2Off); err != nil {
		return extent{}, err
	}
	return w.inWindow(off)
}

// inWindow returns the extent at off, which lies in the window.
func (w *tableWalk) inWindow(off uint64) (extent, error) {
	return w.rules.resolveIn(&w.window, (off-w.start)>>w.rules.clusterBits, off, min(w.end, w.stop)-off)
}

// withoutTable returns the guest offset of the end of the run of L1 entries without an L2 table that off lies in, at most
// end.
func (m *mapper) withoutTable(off, end uint64) uint64 {
	reach := uint64(1) << (m.clusterBits + m.l2Bits)
	for off = off&^(reach-1) + reach; off < end && m.l1.load(m.l1Index(off))&offsetMask == 0; {
		off += reach
	}
	return min(off, end)
}

// read reads the window from off on, whose L2 table is at host offset l2Off, into the next tables, as far as they follow
// it in the host file. Precondition: the caller is a registered request.
func (w *tableWalk) read(off, l2Off uint64) error {
	m := w.img.m
	hostOff, _ := m.sliceAt(l2Off, off)
	perSlice := uint64(1) << (m.clusterBits + m.sliceBits - m.l2EntryBits) // guest bytes
	reach := uint64(1) << (m.clusterBits + m.l2Bits)
	start := off &^ (perSlice - 1)
	stop := start&^(reach-1) + reach
	most := w.grow >> m.l2EntryBits << m.clusterBits // guest bytes; windows are made of whole slices
	for next := l2Off + m.clusterSize; stop < w.end && stop-start < most; next += m.clusterSize {
		if e := m.l1.load(m.l1Index(stop)); e&offsetMask != next {
			break
		}
		stop += reach
	}
	need := (w.end - start + perSlice - 1) / perSlice * perSlice
	stop = min(stop, start+min(most, need))
	n := (stop - start) >> m.clusterBits << m.l2EntryBits
	if uint64(cap(w.window.words)) < n/8 {
		w.window.words = make([]uint64, n/8)
	}
	w.window.words, w.window.off = w.window.words[:n/8], hostOff
	w.stop = 0
	if err := m.cache.readMany(m.id, m.h, hostOff, 1<<m.sliceBits, w.window.words); err != nil {
		return fmt.Errorf("L2 table: %w", err)
	}
	w.start, w.stop = start, stop
	w.grow = min(4*w.grow, lastWindow)
	return nil
}

// forget drops the window. The next one is short again: it may not last longer.
func (w *tableWalk) forget() { w.stop, w.grow = 0, firstWindow }
