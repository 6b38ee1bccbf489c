package qcow2

import (
	"fmt"
	"sync"
)

// write writes p at guestOff. It returns how many bytes were written before an error.
func (img *Image) write(p []byte, guestOff uint64) (int, error) {
	done := 0
	for done < len(p) {
		seen := img.m.alloc.released.Load()
		off := guestOff + uint64(done)
		n, err := img.writeInPlace(p[done:], off)
		if n == 0 && err == nil {
			n, err = img.writeNew(p[done:], off)
		}
		done += n
		if err != nil {
			// A full host may hold space that a write-back would free; nothing is held here (I4).
			if isNoSpace(err) && img.reclaim(seen) {
				continue
			}
			return done, err
		}
	}
	return done, nil
}

// writeInPlace writes the part of p at guestOff that lies in clusters which belong to the active image
// alone. It returns 0 if there is none at guestOff. No metadata changes, no lock is held.
func (img *Image) writeInPlace(p []byte, guestOff uint64) (int, error) {
	g := &img.m.geometry
	s := img.reqs.enterInPlace(guestOff>>g.clusterBits, (guestOff+uint64(len(p))-1)>>g.clusterBits)
	defer img.reqs.leave(s)
	if err := img.writableAt(guestOff, uint64(len(p))); err != nil {
		return 0, err
	}
	x, err := img.m.resolve(guestOff, uint64(len(p)))
	if err != nil || !x.inPlace() {
		return 0, err
	}
	if err := img.data.writeData(guestOff, p[:x.n], x.hostOff); err != nil {
		return 0, err
	}
	return int(x.n), nil
}

// clusterBuffers holds buffers for the parts of clusters that a write fills up from old content.
var clusterBuffers sync.Pool

// getBuffer returns a buffer of n bytes with any content; it goes back with putBuffer.
func getBuffer(n uint64) *[]byte {
	if b, _ := clusterBuffers.Get().(*[]byte); b != nil && uint64(cap(*b)) >= n {
		*b = (*b)[:n]
		return b
	}
	b := make([]byte, n)
	return &b
}

// putBuffer gives a buffer of getBuffer back.
func putBuffer(b *[]byte) { clusterBuffers.Put(b) }

// writeNew writes the beginning of p at guestOff, at least one cluster's part of it, into clusters whose
// mapping has to change: ones without a host cluster, shared or compressed ones, and such as hold a host
// cluster that they do not show yet.
//
// The order for each: (1) the new cluster's refcount is raised in memory and it is found or made a table
// to stand in (ownL2); (2) all of the cluster that will be readable is written, guest data and old content
// around it, without any lock but the one on these guest clusters; (3) the L2 entry is changed in memory,
// and the reference to the old cluster is dropped. A cut makes (1) and (2) durable before it writes (3), and
// only then frees the old cluster. An error in (1) or (2) gives the new cluster back and changes nothing; a
// crash leaves the old entry, or the new one with everything that it names (I1, I2).
func (img *Image) writeNew(p []byte, guestOff uint64) (int, error) {
	m := img.m
	// No further than the end of the L2 slice, so that one update makes all the changes.
	perSlice := uint64(1) << (m.sliceBits - m.l2EntryBits)
	sliceEnd := (guestOff>>m.clusterBits/perSlice + 1) * perSlice << m.clusterBits
	n := min(uint64(len(p)), sliceEnd-guestOff)
	held := clusterRange{first: guestOff >> m.clusterBits, last: (guestOff + n - 1) >> m.clusterBits}
	img.reqs.lock(&held)
	defer img.reqs.unlock(&held)
	defer img.reqs.leave(img.reqs.enter()) // old content and tables are read
	if err := img.writableAt(guestOff, n); err != nil {
		return 0, err
	}
	entries, err := m.entries(guestOff, held.last-held.first+1)
	if err != nil {
		return 0, err
	}
	if m.owned(entries[0]) {
		n = min(n, m.clusterSize-m.offsetInCluster(guestOff))
		return img.writeOwned(p[:n], guestOff, entries[0])
	}
	k := 1
	for k < len(entries) && !m.owned(entries[k]) {
		k++
	}
	return img.writeFresh(p[:n], guestOff, entries[:k])
}

// entries returns the L2 entries of n guest clusters from guestOff's on, within one slice. The caller
// holds the clusters exclusively.
func (m *mapper) entries(guestOff, n uint64) ([]l2Entry, error) {
	entries := make([]l2Entry, n)
	if err := m.readEntries(entries, guestOff); err != nil {
		return nil, err
	}
	return entries, nil
}

// readEntries fills entries with the L2 entries of the guest clusters from guestOff's on, as entries does.
func (m *mapper) readEntries(entries []l2Entry, guestOff uint64) error {
	l2Off, err := m.l2Table(guestOff)
	if err != nil {
		return err
	}
	if l2Off == 0 {
		clear(entries)
		return nil
	}
	sliceOff, i := m.sliceAt(l2Off, guestOff)
	s, err := m.slice(sliceOff)
	if err != nil {
		return err
	}
	for j := range entries {
		e := m.entry(s, i+uint64(j))
		at := m.clusterStart(guestOff) + uint64(j)<<m.clusterBits
		subs := uint64(1)
		if m.extendedL2 {
			subs = subclustersPerCluster
		}
		for sub := range subs {
			if m.kind(e, sub) == kindInvalid {
				return m.corruptEntry(s, i+uint64(j), e, at)
			}
		}
		if m.external && m.hasCluster(e) && e.hostOff() != at {
			return m.corruptEntry(s, i+uint64(j), e, at)
		}
		entries[j] = e
	}
	return nil
}

// owned reports whether e holds a host cluster that is the active image's alone, so that it may be written
// in place.
func (m *mapper) owned(e l2Entry) bool {
	return m.hasCluster(e) && e.word&flagCopied != 0
}

// writeOwned writes p at guestOff, within one cluster, into the host cluster that its entry e owns, and
// makes what was not shown of it readable. The subclusters that become readable are filled up first.
func (img *Image) writeOwned(p []byte, guestOff uint64, e l2Entry) (int, error) {
	m := img.m
	in := m.offsetInCluster(guestOff)
	end := in + uint64(len(p))
	first, last := in>>m.subBits, (end-1)>>m.subBits
	lo, hi := in, end
	if m.kind(e, first) != kindNormal {
		lo = first << m.subBits
	}
	if m.kind(e, last) != kindNormal {
		hi = (last + 1) << m.subBits
	}
	base := e.hostOff()
	if err := img.writeFilled(p, guestOff, lo, hi, base, false); err != nil {
		return 0, err
	}
	changed := e
	if m.extendedL2 {
		changed.bitmap = withData(e.bitmap, subclusterMask(first, last))
	} else {
		changed.word &^= flagZero
	}
	if changed != e {
		err := m.update(guestOff, img.flush, func(words []uint64, i uint64) { m.setEntry(words, i, changed) })
		if err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// writeFresh writes the beginning of p at guestOff into new host clusters for the guest clusters whose
// entries are given, none of which is owned: as many as one run of free clusters holds.
func (img *Image) writeFresh(p []byte, guestOff uint64, entries []l2Entry) (int, error) {
	m := img.m
	start := m.clusterStart(guestOff)
	run, fresh, err := img.takeClusters(guestOff, entries)
	if err != nil {
		return 0, err
	}
	entries = entries[:run.n]
	base := run.first << m.clusterBits // host offset of start
	end := min(guestOff+uint64(len(p)), start+run.n<<m.clusterBits)
	p = p[:end-guestOff]

	changed := make([]l2Entry, len(entries))
	for j := range changed {
		changed[j].word = base + uint64(j)<<m.clusterBits | flagCopied
	}
	err = img.fillClusters(p, guestOff, entries, changed, base, fresh)
	if err == nil {
		err = m.update(guestOff, img.flush, func(words []uint64, i uint64) {
			for j, e := range changed {
				m.setEntry(words, i+uint64(j), e)
			}
			img.dropReferences(entries, start)
		})
	}
	if err != nil {
		img.returnClusters(run)
		return 0, err
	}
	return len(p), nil
}

// takeClusters allocates host clusters for guest clusters with the given entries, in one run that may be
// shorter than asked for. With an external data file, they are those of the guest offset. fresh reports
// whether the run reads as zeros because it was never written.
func (img *Image) takeClusters(guestOff uint64, entries []l2Entry) (run clusterRun, fresh bool, err error) {
	m := img.m
	m.mu.Lock()
	defer m.mu.Unlock()
	_ = img.releaseLimbo() // what could not be released stays; Close meets the error
	if err := img.checkDisplaced(entries, guestOff); err != nil {
		return run, false, err
	}
	if _, err := m.ownL2(guestOff); err != nil {
		return run, false, err
	}
	if m.external {
		run = clusterRun{first: guestOff >> m.clusterBits, n: uint64(len(entries))}
	} else if run, err = m.alloc.alloc(uint64(len(entries))); err != nil {
		return run, false, fmt.Errorf("allocate %d clusters: %w", len(entries), err)
	}
	return run, img.data.readsZero(run.first << m.clusterBits), nil
}

// returnClusters gives back a run of takeClusters whose mapping was not made.
func (img *Image) returnClusters(run clusterRun) {
	if img.m.external {
		return
	}
	img.m.mu.Lock()
	img.m.alloc.undo(run)
	img.m.mu.Unlock()
}

// checkDisplaced refuses entries whose clusters have no refcount: dropping a reference would free somebody
// else's. Precondition: mu.
func (img *Image) checkDisplaced(entries []l2Entry, guestOff uint64) error {
	for _, e := range entries {
		if err := img.m.alloc.checkReferenced(img.m.held(e)); err != nil {
			return fmt.Errorf("replace the cluster of guest %#x: %w", guestOff, err)
		}
	}
	return nil
}

// dropReferences drops what the entries of guest clusters from start on held, once other entries have
// taken their place. Precondition: mu.
func (img *Image) dropReferences(entries []l2Entry, start uint64) {
	m := img.m
	for j, e := range entries {
		if r := m.held(e); r.n > 0 {
			m.alloc.free(r)
		}
		if e.word&flagCompressed != 0 {
			img.decoded.drop((start >> m.clusterBits) + uint64(j))
		}
	}
}

// fillClusters writes p at guestOff into the new host clusters from base on, with the old content around
// it, and sets the bitmaps of changed. entries are the old entries.
func (img *Image) fillClusters(p []byte, guestOff uint64, entries, changed []l2Entry, base uint64, fresh bool) error {
	m := img.m
	in := m.offsetInCluster(guestOff)
	end := in + uint64(len(p)) // relative to base, as lo and hi
	lo := in >> m.subBits << m.subBits
	hi := (end + 1<<m.subBits - 1) >> m.subBits << m.subBits
	if m.extendedL2 {
		for j, e := range entries {
			at := uint64(j) << m.clusterBits
			from := (max(lo, at) - at) >> m.subBits
			to := (min(hi, at+m.clusterSize) - at) >> m.subBits // exclusive
			mask := subclusterMask(from, to-1)
			keep := e.bitmap & bitmapAllocated
			if e.word&flagCompressed != 0 {
				keep = bitmapAllocated
			}
			changed[j].bitmap = withData(e.bitmap, mask|keep)
			// What the old cluster shows elsewhere moves along.
			for rest := keep &^ mask; rest != 0; {
				sub, n := firstSet(rest)
				if err := img.copyUp(m.clusterStart(guestOff)+at+sub<<m.subBits, base+at+sub<<m.subBits, n<<m.subBits); err != nil {
					return err
				}
				rest &^= subclusterMask(sub, sub+n-1)
			}
		}
	}
	return img.writeFilled(p, guestOff, lo, hi, base, fresh)
}

// copyUp writes the n bytes that the guest sees at guestOff to hostOff.
func (img *Image) copyUp(guestOff, hostOff, n uint64) error {
	buf := getBuffer(n)
	defer putBuffer(buf)
	if err := img.readGuest(*buf, guestOff); err != nil {
		return err
	}
	return img.data.writeData(guestOff, *buf, hostOff)
}

// writeFilled writes p at guestOff to the file of guest data, together with the old content around it, so
// that all from lo to hi is written: both count from the start of guestOff's cluster, which stands at host
// offset base. Where fresh, zeros need not be written. Small pieces go in one write.
func (img *Image) writeFilled(p []byte, guestOff, lo, hi, base uint64, fresh bool) error {
	m := img.m
	start := m.clusterStart(guestOff)
	in := guestOff - start
	end := in + uint64(len(p))
	if m.external {
		// A data file ends where the disk ends; it is not padded to a cluster.
		hi = max(min(hi, img.size.Load()-start), end)
	}
	head := guestPart{start + lo, in - lo}
	tail := guestPart{start + end, hi - end}
	headZero, err := img.partIsZero(head)
	if err != nil {
		return err
	}
	tailZero, err := img.partIsZero(tail)
	if err != nil {
		return err
	}
	if fresh {
		if headZero {
			head.n = 0
		}
		if tailZero {
			tail.n = 0
		}
	}
	if head.n == 0 && tail.n == 0 {
		return img.data.writeData(guestOff, p, base+in)
	}
	if head.n+uint64(len(p))+tail.n <= maxJoinedWrite {
		buf := getBuffer(head.n + uint64(len(p)) + tail.n)
		defer putBuffer(buf)
		b := *buf
		if err := img.readPart(b[:head.n], head, headZero); err != nil {
			return err
		}
		copy(b[head.n:], p)
		if err := img.readPart(b[head.n+uint64(len(p)):], tail, tailZero); err != nil {
			return err
		}
		return img.data.writeData(guestOff-head.n, b, base+in-head.n)
	}
	if err := img.writePart(head, base+in-head.n, headZero); err != nil {
		return err
	}
	if err := img.data.writeData(guestOff, p, base+in); err != nil {
		return err
	}
	return img.writePart(tail, base+end, tailZero)
}

// maxJoinedWrite is the size up to which a write is copied together with the content around it, rather
// than written beside it.
const maxJoinedWrite = 256 << 10

// guestPart is a range of guest bytes within a cluster; it may reach past the end of the disk.
type guestPart struct{ off, n uint64 }

// partIsZero reports whether the part is known to read as zeros, without reading it.
func (img *Image) partIsZero(g guestPart) (bool, error) {
	for g.n > 0 && g.off < img.size.Load() {
		x, err := img.m.resolve(g.off, g.n)
		if err != nil {
			return false, err
		}
		switch x.kind {
		case kindZeroPlain, kindZeroAlloc:
		case kindUnallocated:
			if img.below.missing != nil || img.below.disk != nil && g.off < uint64(img.below.disk.Size()) {
				return false, nil
			}
		default:
			return false, nil
		}
		g.off, g.n = g.off+x.n, g.n-x.n
	}
	return true, nil
}

// readPart reads the part into b; past the end of the disk it is zeros.
func (img *Image) readPart(b []byte, g guestPart, zero bool) error {
	b = b[:g.n]
	size := img.size.Load()
	if zero || g.off >= size {
		clear(b)
		return nil
	}
	inside := min(g.n, size-g.off)
	clear(b[inside:])
	return img.readGuest(b[:inside], g.off)
}

// writePart writes the part's old content to hostOff.
func (img *Image) writePart(g guestPart, hostOff uint64, zero bool) error {
	if g.n == 0 {
		return nil
	}
	if zero {
		return img.data.zeroFor(useData, int64(g.off), hostOff, g.n)
	}
	buf := getBuffer(g.n)
	defer putBuffer(buf)
	if err := img.readPart(*buf, g, false); err != nil {
		return err
	}
	return img.data.writeData(g.off, *buf, hostOff)
}
