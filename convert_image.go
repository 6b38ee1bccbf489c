package qcow2

import (
	"context"
)

// Convert's way into an *Image. A piece takes its host clusters in its turn (place); it is written and mapped beside
// the other ones (writeImage). In between it holds its guest clusters alone, as a write does that allocates.

// clusterHold is guest clusters that one L2 slice maps, held alone, and what is about to be mapped there.
type clusterHold struct {
	held    clusterRange
	slot    *slot
	entries []l2Entry // of held
	changes []clusterChange
}

// clusterChange is new entries for clusters that follow each other.
type clusterChange struct {
	first   int       // of the hold's entries
	changed []l2Entry // what they become; bitmaps are set when they are written

	// Plain clusters in run, which reads as zeros where fresh is set; or payloads, at the host offsets in changed.
	run      clusterRun
	fresh    bool
	payloads [][]byte // by cluster; nil of plain clusters
}

// place sets host clusters aside for a piece, in its turn, and makes its zeros.
//
// The host clusters depend on what was freed before, and that depends on when the image was written back. So a piece
// that comes after one that displaced something waits for all before it, and has that released: whatever the workers
// do, it finds the same clusters free.
//
// After an error nothing is held.
func (c *converter) place(p *piece) error {
	img := c.image
	if c.displaced {
		if !c.turns.alone(p.seq) {
			return errTurnsOver
		}
		img.reclaim(0)
		c.displaced = false
	}
	if err := c.placeZeros(p); err != nil {
		return err
	}
	for {
		seen := img.m.alloc.released.Load()
		p.owned = nil
		err := c.placeData(p)
		if err == nil {
			return nil
		}
		c.giveUp(p)
		if !isNoSpace(err) || !img.reclaim(seen) {
			return err
		}
	}
}

// placeZeros makes what of the piece is zeros read as zeros in the target.
func (c *converter) placeZeros(p *piece) error {
	img := c.image
	if c.targetZero {
		return nil
	}
	for _, x := range p.parts {
		if x.class != classZero {
			continue
		}
		stored, err := c.storesAny(x.guestSpan)
		if err != nil {
			return err
		}
		if stored {
			c.displaced = true
			if !c.turns.alone(p.seq) {
				return errTurnsOver
			}
		}
		z := zeroing{unmap: true, always: c.opts.Zeroes == ZeroesClusters}
		if err := img.zeroGuest("write zeroes of", x.off, x.n, z); err != nil {
			return err
		}
	}
	return nil
}

// storesAny reports whether the target has anything of its own in the range that zeros would displace.
func (c *converter) storesAny(x guestSpan) (bool, error) {
	for e, err := range c.image.extents(x.off, x.n) {
		if err != nil {
			return false, err
		}
		if e.Depth == 0 && (e.HostOff >= 0 || e.Kind == ExtentCompressed) {
			return true, nil
		}
	}
	return false, nil
}

// placeData sets host clusters aside for what of the piece is data.
func (c *converter) placeData(p *piece) error {
	m := c.image.m
	perSlice := uint64(1) << (m.sliceBits - m.l2EntryBits)
	for _, x := range p.parts {
		if x.class != classCopy {
			continue
		}
		first, end := uint64(x.off)>>m.clusterBits, (uint64(x.off+x.n)+m.clusterSize-1)>>m.clusterBits
		for first < end {
			last := min((first/perSlice+1)*perSlice, end) - 1
			if err := c.placeRun(p, clusterRange{first, last}); err != nil {
				return err
			}
			first = last + 1
		}
	}
	return nil
}

// placeRun is placeData for guest clusters that one L2 slice maps.
func (c *converter) placeRun(p *piece, r clusterRange) error {
	img, m := c.image, c.image.m
	h := &clusterHold{held: r}
	img.reqs.lock(&h.held)
	h.slot = img.reqs.enter()
	p.holds = append(p.holds, h)
	start := r.first << m.clusterBits
	if err := img.writableAt(start, min(r.last<<m.clusterBits+m.clusterSize, img.size.Load())-start); err != nil {
		return err
	}
	var err error
	if h.entries, err = m.entries(start, r.last-r.first+1); err != nil {
		return err
	}
	tables := m.alloc.table.n
	for j := 0; j < len(h.entries); {
		k := 1
		switch {
		case p.payload(c, r.first+uint64(j)) > 0:
			k, err = c.placePacked(p, h, j)
		case m.owned(h.entries[j]):
			off := int64(start + uint64(j)<<m.clusterBits)
			p.owned = appendSpan(p.owned, guestSpan{off, min(c.unit, p.off+p.n-off)})
		default:
			k, err = c.placePlain(p, h, j)
		}
		if err != nil {
			return err
		}
		j += k
	}
	if m.alloc.table.n != tables {
		c.displaced = true // the old refcount table
	}
	return nil
}

// payload returns the length of the payload of a guest cluster, or 0 if it is stored plain.
func (p *piece) payload(c *converter, clusterIndex uint64) int {
	if p.buf.sizes == nil {
		return 0
	}
	return p.buf.sizes[int64(clusterIndex)-p.off/c.unit]
}

// placePlain sets a run of host clusters aside for the guest clusters from entry j of h on, and returns for how many.
func (c *converter) placePlain(p *piece, h *clusterHold, j int) (int, error) {
	img, m := c.image, c.image.m
	k := j + 1
	for k < len(h.entries) && !m.owned(h.entries[k]) && p.payload(c, h.held.first+uint64(k)) == 0 {
		k++
	}
	run, fresh, err := img.takeClusters((h.held.first+uint64(j))<<m.clusterBits, h.entries[j:k])
	if err != nil {
		return 0, err
	}
	k = j + int(run.n)
	ch := clusterChange{first: j, run: run, fresh: fresh, changed: make([]l2Entry, run.n)}
	for i := range ch.changed {
		ch.changed[i].word = (run.first+uint64(i))<<m.clusterBits | flagCopied
	}
	c.noteDisplaced(h.entries[j:k])
	h.changes = append(h.changes, ch)
	return k - j, nil
}

// placePacked sets places aside for the payloads of the guest clusters from entry j of h on, and returns for how many.
func (c *converter) placePacked(p *piece, h *clusterHold, j int) (int, error) {
	img, m := c.image, c.image.m
	at := 0 // of the payload in the buffer
	for _, n := range p.buf.sizes[:int64(h.held.first)+int64(j)-p.off/c.unit] {
		at += n
	}
	ch := clusterChange{first: j}
	img.mu.Lock()
	defer img.mu.Unlock()
	for k := j; k < len(h.entries); k++ {
		index := h.held.first + uint64(k)
		n := p.payload(c, index)
		if n == 0 {
			break
		}
		hostOff, err := img.takePackedLocked(h.entries[k:k+1], index<<m.clusterBits, uint64(n))
		if err == errNotPackable {
			p.buf.sizes[int64(index)-p.off/c.unit] = 0
			break
		}
		if err != nil {
			h.changes = append(h.changes, ch)
			return 0, err
		}
		ch.changed = append(ch.changed, l2Entry{word: m.compressedWord(hostOff, uint64(n))})
		ch.payloads = append(ch.payloads, p.buf.packed[at:at+n])
		at += n
	}
	c.noteDisplaced(h.entries[j : j+len(ch.changed)])
	if len(ch.changed) > 0 {
		h.changes = append(h.changes, ch)
	}
	return len(ch.changed), nil
}

// noteDisplaced notes whether entries that are about to be replaced hold anything.
func (c *converter) noteDisplaced(entries []l2Entry) {
	for _, e := range entries {
		if c.image.m.held(e).n > 0 {
			c.displaced = true
		}
	}
}

// writeImage writes a piece to the places that it has, and maps it there.
//
// The order for each change is that of writeNew and linkPacked: its clusters have their refcounts in memory; all that
// will be readable is written; then the L2 entries are changed in memory. A cut makes durable what comes first before it
// writes what comes last, so that a crash leaves the old entry, or the new one with what it names.
func (c *converter) writeImage(ctx context.Context, p *piece) error {
	img := c.image
	var again []guestSpan // there was no space for it
	var full error
	for _, h := range p.holds {
		for len(h.changes) > 0 {
			ch := &h.changes[0]
			err := ctx.Err()
			if err == nil {
				err = c.writeChange(ctx, p, h, ch)
			}
			switch {
			case err == nil:
				h.changes = h.changes[1:]
				continue
			case !isNoSpace(err):
				c.giveUp(p)
				return err
			}
			full = err
			off := int64((h.held.first + uint64(ch.first)) << img.m.clusterBits)
			again = append(again, guestSpan{off, min(int64(len(ch.changed))*c.unit, p.off+p.n-off)})
			img.undoChange(ch)
			h.changes = h.changes[1:]
		}
	}
	c.giveUp(p)
	if full != nil {
		// What waits to be freed may be enough. Nothing is held now (I4).
		if !img.reclaim(img.m.alloc.released.Load()) {
			return full
		}
	}
	if len(again)+len(p.owned) > 0 {
		if err := c.load(ctx, p); err != nil {
			return err
		}
	}
	for _, x := range again {
		if err := c.rewrite(p, x); err != nil {
			return err
		}
	}
	for _, x := range p.owned {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := img.write(p.data(x), uint64(x.off)); err != nil {
			return err
		}
	}
	return nil
}

// rewrite writes a range of whole clusters in the way of WriteAt or WriteCompressed.
func (c *converter) rewrite(p *piece, x guestSpan) error {
	if c.opts.Compress {
		return c.image.writeCompressed(p.data(x), uint64(x.off))
	}
	_, err := c.image.write(p.data(x), uint64(x.off))
	return err
}

// writeChange writes the data of a change, and makes it. After an error it is not made.
func (c *converter) writeChange(ctx context.Context, p *piece, h *clusterHold, ch *clusterChange) error {
	img, m := c.image, c.image.m
	start := (h.held.first + uint64(ch.first)) << m.clusterBits
	old := h.entries[ch.first:][:len(ch.changed)]
	if ch.payloads != nil {
		if err := img.writePayloads(start, ch); err != nil {
			return err
		}
	} else {
		x := guestSpan{int64(start), min(int64(len(ch.changed))*c.unit, p.off+p.n-int64(start))}
		done, err := c.offloadChange(ctx, p, x, ch)
		if err != nil {
			return err
		}
		if !done {
			err = img.fillClusters(p.data(x), start, old, ch.changed, ch.run.first<<m.clusterBits, ch.fresh)
		}
		if err != nil {
			return err
		}
	}
	return m.update(start, img.flush, func(words []uint64, i uint64) {
		for j, e := range ch.changed {
			if ch.payloads != nil {
				img.decoded.drop(start>>m.clusterBits + uint64(j)) // see decodeCache
			}
			m.setEntry(words, i+uint64(j), e)
		}
		img.dropReferences(old, start)
	})
}

// writePayloads writes the payloads of a change, from guest offset start on: as many at once as lie side by side on
// the host, as they do in memory.
func (img *Image) writePayloads(start uint64, ch *clusterChange) error {
	m := img.m
	for j := 0; j < len(ch.payloads); {
		hostOff, _ := m.compressed(ch.changed[j].word)
		n, k := uint64(len(ch.payloads[j])), j+1
		for ; k < len(ch.payloads); k++ {
			if next, _ := m.compressed(ch.changed[k].word); next != hostOff+n {
				break
			}
			n += uint64(len(ch.payloads[k]))
		}
		if err := m.h.writeData(start+uint64(j)<<m.clusterBits, ch.payloads[j][:n], hostOff); err != nil {
			return err
		}
		j = k
	}
	return nil
}

// undoChange gives the clusters of a change back that was not made.
func (img *Image) undoChange(ch *clusterChange) {
	if ch.payloads == nil {
		img.returnClusters(ch.run)
		return
	}
	for _, e := range ch.changed {
		img.returnClusters(img.m.held(e))
	}
}

// giveUp undoes the changes of the piece that were not made, and ends its holds.
func (c *converter) giveUp(p *piece) {
	for _, h := range p.holds {
		for i := range h.changes {
			c.image.undoChange(&h.changes[i])
		}
		c.image.reqs.leave(h.slot)
		c.image.reqs.unlock(&h.held)
	}
	p.holds = nil
}
