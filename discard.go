package qcow2

import (
	"fmt"
	"math"
)

// ZeroFlags say how WriteZeroes may do its work.
type ZeroFlags uint

// ZeroMayUnmap lets WriteZeroes free the host clusters that it needs no more. Without it, clusters that have one
// keep it, so that writing them again allocates nothing.
const ZeroMayUnmap ZeroFlags = 1 << 0

// zeroFlagsKnown are the flags that there are.
const zeroFlagsKnown = ZeroMayUnmap

// Discard says that the guest does not need the n bytes at off any more: clusters of the range are freed and read
// as zeros. OpenOptions.Discard says whether the host file gives the space back, and DiscardNoUnref keeps the
// clusters allocated all the same.
//
// It is for whole clusters, or subclusters in an image that has them. What else the range holds of a cluster, at
// either end, stays as it is, unless the range ends at the end of the disk, which counts as the end of a cluster.
// So do parts of compressed clusters, and in a version 2 image, which has no zero clusters, whatever hides
// something of a backing file. The data file of an image with a raw one is zeroed, too.
//
// It may run beside any other call. Each cluster is old or zero, before Sync and after a crash; a large range is
// worked on piece by piece, so that others do not wait for the whole. It is durable after the next Sync. The freed
// space can be allocated, and the host gets it back, when it is durable and calls that began earlier have ended.
//
// It takes memory and time for the tables that map the range, not for its bytes; where nothing is mapped and
// nothing lies below, tables are not allocated.
//
// Errors: ErrReadOnly, ErrRange, fs.ErrClosed, ErrCorrupt where the mapping of the range is malformed, ErrFailed
// after a failed sync, and those of the storage. After an error part of the range is discarded; the call may be
// tried again. qcow2 spec, "Standard Cluster Descriptor" and "Extended L2 Entries".
func (img *Image) Discard(off, n int64) error {
	return img.zeroGuest("discard", off, n, zeroing{discard: true, unmap: true})
}

// WriteZeroes makes the n bytes at off read as zeros, by a change of the mapping where that suffices: for whole
// clusters, or subclusters in an image that has them; a range that ends at the end of the disk ends with a
// cluster. What is left at the ends, parts of compressed clusters, and in a version 2 image whatever hides
// something of a backing file, is written. Nothing is written or allocated where zeros are read already. The data
// file of an image with a raw one is zeroed, too.
//
// Concurrency, durability, cost and errors are those of Discard, with all of the range old or zero by cluster;
// flags that are unknown are an *OptionError. Where the host is full, it may be tried again as WriteAt may.
func (img *Image) WriteZeroes(off, n int64, flags ZeroFlags) error {
	if unknown := flags &^ zeroFlagsKnown; unknown != 0 {
		err := &OptionError{Option: "flags", Value: uint64(unknown), Reason: "are no ZeroFlags"}
		return rangeError("write zeroes of", off, n, err)
	}
	return img.zeroGuest("write zeroes of", off, n, zeroing{unmap: flags&ZeroMayUnmap != 0})
}

// rangeError adds what was being done to n bytes at off at the exported edge.
func rangeError(op string, off, n int64, err error) error {
	return fmt.Errorf("qcow2: %s %d bytes at guest %#x: %w", op, n, off, err)
}

// zeroing is one call of Discard or WriteZeroes.
type zeroing struct {
	discard bool   // what the mapping cannot do stays, rather than being written
	unmap   bool   // host clusters are freed
	always  bool   // zero clusters are made also where zeros are read without them; not in version 2
	below   uint64 // guest offset from where on nothing lies below the image; of the slice at hand

	entries, changed []l2Entry // of one slice; used again for the next
}

// zeroGuest is Discard or WriteZeroes, which op calls.
func (img *Image) zeroGuest(op string, off, n int64, z zeroing) error {
	err := img.checkRange(off, n)
	if err == nil && n > 0 {
		err = img.zeroRange(&z, uint64(off), uint64(off)+uint64(n))
	}
	if err == nil {
		err = img.relieve()
	}
	if err != nil {
		err = rangeError(op, off, n, err)
	}
	return err
}

// endBelow returns the guest offset from where on unallocated clusters read as zeros, because nothing lies below
// them. The caller is registered.
func (img *Image) endBelow() uint64 {
	switch {
	case img.below.missing != nil:
		return math.MaxUint64
	case img.below.disk != nil:
		return uint64(img.below.disk.Size())
	}
	return 0
}

// maxFreedRuns is the number of runs of dropped clusters up to which a long call lets them gather, before it
// writes back for their memory's sake: some megabytes.
const maxFreedRuns = 1 << 17

// zeroRange does z for the guest bytes from lo to hi, slice by slice.
func (img *Image) zeroRange(z *zeroing, lo, hi uint64) error {
	m := img.m
	perSlice := uint64(1) << (m.sliceBits - m.l2EntryBits + m.clusterBits)
	skip := img.skipUnmapped
	if z.always {
		skip = func(pos, _ uint64) uint64 { return pos }
	}
	for pos := skip(lo, hi); pos < hi; pos = skip(pos, hi) {
		end := min(hi, pos&^(perSlice-1)+perSlice)
		seen := m.alloc.released.Load()
		rest, err := img.zeroSlice(z, pos, end)
		if isNoSpace(err) && img.reclaim(seen) {
			continue
		}
		if err != nil {
			return err
		}
		if !z.discard {
			for _, g := range rest {
				if err := img.writeZeros(g); err != nil {
					return err
				}
			}
		}
		pos = end
		if err := img.relieveRuns(); err != nil {
			return err
		}
	}
	return nil
}

// skipUnmapped returns the first guest offset from pos on, hi at the most, that an L2 table maps or below which
// something lies. What it skips reads as zeros. A write that is about to map it has not returned, so the caller's
// work comes before it.
func (img *Image) skipUnmapped(pos, hi uint64) uint64 {
	m := img.m
	defer img.reqs.leave(img.reqs.enter())
	perTable := uint64(1) << (m.l2Bits + m.clusterBits)
	below := img.endBelow()
	for pos < hi && pos >= below && m.l1.load(m.l1Index(pos)) == 0 {
		pos = min(hi, pos&^(perTable-1)+perTable)
	}
	return pos
}

// relieveRuns writes back if dropped clusters take much memory.
func (img *Image) relieveRuns() error {
	img.mu.Lock()
	n := len(img.m.alloc.freed) + len(img.wb.punches)
	img.mu.Unlock()
	if n < maxFreedRuns {
		return nil
	}
	if err := img.flush(); err != nil {
		return err
	}
	img.giveBack()
	return nil
}

// zeroSlice does z for the guest bytes from lo to hi, which one L2 slice maps, and returns the parts that the
// mapping cannot do, in order.
//
// It holds the guest clusters alone, so that no write of them is in flight when it looks at their entries. The order
// for all of them together: (1) of a raw data file, the bytes that were shown are zeroed; (2) the entries are
// changed in memory, in one update, and the references to clusters that they held before are dropped. A cut
// makes the entries durable and only then frees the clusters (I4), and punches them (punchDropped). A crash leaves
// the old entry, whose cluster is still its own, or the new one, which names nothing but what the old one did
// (I1, I2). The only table that may be allocated is the L2 table itself (ownL2). An error leaves the entries as
// they were, and the call may be tried again.
//
// Clusters that stay where they are, because DiscardNoUnref says so, or in an external data file, may be punched
// here and now: to the guest that is a write of zeros in place, in clusters that it is discarding and that
// nobody else refers to. They are still held for this call, so that no later write is punched away, and whatever a
// crash loses of the punch or of the entry, each byte is old or zero.
func (img *Image) zeroSlice(z *zeroing, lo, hi uint64) (rest []guestPart, err error) {
	m := img.m
	held := clusterRange{first: lo >> m.clusterBits, last: (hi - 1) >> m.clusterBits}
	img.reqs.lock(&held)
	defer img.reqs.unlock(&held)
	defer img.reqs.leave(img.reqs.enter()) // tables are read
	if err := img.writableAt(lo, hi-lo); err != nil {
		return nil, err
	}
	z.below = img.endBelow()
	k := int(held.last - held.first + 1)
	if cap(z.entries) < k {
		z.entries, z.changed = make([]l2Entry, k), make([]l2Entry, k)
	}
	z.entries, z.changed = z.entries[:k], z.changed[:k]
	if err := m.readEntries(z.entries, lo); err != nil {
		return nil, err
	}
	if rest = img.zeroEntries(z, lo, hi); !z.changes() {
		return rest, nil
	}
	start := m.clusterStart(lo)
	if m.external && img.hdr.rawData() {
		if err := img.clearRaw(z, start); err != nil {
			return nil, err
		}
	}
	if err := img.checkDropped(z.entries, z.changed, start); err != nil {
		return nil, err
	}
	err = m.update(lo, img.flush, func(words []uint64, i uint64) {
		for j, e := range z.changed {
			if e != z.entries[j] {
				m.setEntry(words, i+uint64(j), e)
			}
		}
		img.dropUnmapped(z.entries, z.changed, start)
	})
	if err != nil {
		return nil, err
	}
	return rest, img.punchKept(z, start)
}

// changes reports whether an entry changes.
func (z *zeroing) changes() bool {
	for j, e := range z.changed {
		if e != z.entries[j] {
			return true
		}
	}
	return false
}

// zeroSpan returns the bytes of cluster j of a slice's piece from lo to hi, as offsets in the cluster. The end of the
// disk is the end of a cluster.
func (img *Image) zeroSpan(j int, lo, hi uint64) (from, to uint64) {
	m := img.m
	at := m.clusterStart(lo) + uint64(j)<<m.clusterBits
	from, to = max(lo, at)-at, min(hi-at, m.clusterSize)
	if hi == img.size.Load() {
		to = m.clusterSize
	}
	return from, to
}

// zeroEntries sets z.changed to what z.entries become for the guest bytes from lo to hi, and returns the parts
// that no entry can express.
func (img *Image) zeroEntries(z *zeroing, lo, hi uint64) (rest []guestPart) {
	m := img.m
	leave := func(off, n uint64) {
		if k := len(rest); k > 0 && rest[k-1].off+rest[k-1].n == off {
			rest[k-1].n += n
		} else if n > 0 {
			rest = append(rest, guestPart{off, n})
		}
	}
	subSize := uint64(1) << m.subBits
	for j, e := range z.entries {
		at := m.clusterStart(lo) + uint64(j)<<m.clusterBits
		from, to := img.zeroSpan(j, lo, hi)
		first, end := (from+subSize-1)>>m.subBits, to>>m.subBits
		z.changed[j] = e
		ok := false
		if first < end {
			z.changed[j], ok = img.zeroEntry(z, e, at, first, end)
		}
		switch {
		case !ok:
			leave(at+from, to-from)
		default:
			leave(at+from, first<<m.subBits-from)
			leave(at+end<<m.subBits, to-end<<m.subBits)
		}
	}
	return rest
}

// zeroEntry returns what entry e of the guest cluster at guest offset at becomes where its subclusters from first
// on, before end, are to read as zeros; without extended L2 that is the whole cluster. ok is false where no entry
// can say so.
func (img *Image) zeroEntry(z *zeroing, e l2Entry, at, first, end uint64) (_ l2Entry, ok bool) {
	m := img.m
	full := first == 0 && (end == subclustersPerCluster || !m.extendedL2)
	compressed := e.word&flagCompressed != 0
	has := m.hasCluster(e)
	switch {
	case compressed && !full:
		return e, false
	case !z.always && !compressed && !has && at+first<<m.subBits >= z.below:
		return e, true // nothing is stored, and nothing lies below
	case m.version2 && at < z.below:
		return e, false // only data hides what lies below
	case m.version2:
		return l2Entry{}, true
	}
	unmap := compressed || z.unmap && !img.noUnref
	if !m.extendedL2 {
		if has && !unmap {
			return l2Entry{word: e.word | flagZero}, true
		}
		return l2Entry{word: flagZero}, true
	}
	mask := subclusterMask(first, end-1)
	changed := l2Entry{word: e.word, bitmap: e.bitmap&^mask | mask<<32}
	if compressed || !has || unmap && changed.bitmap&bitmapAllocated == 0 {
		changed.word = 0
	}
	return changed, true
}

// checkDropped refuses changes that would drop a reference to a cluster without a refcount.
func (img *Image) checkDropped(entries, changed []l2Entry, start uint64) error {
	img.mu.Lock()
	defer img.mu.Unlock()
	return img.eachDropped(entries, changed, func(j int, r clusterRun) error {
		if err := img.m.alloc.checkReferenced(r); err != nil {
			return fmt.Errorf("free the cluster of guest %#x: %w", start+uint64(j)<<img.m.clusterBits, err)
		}
		return nil
	})
}

// dropUnmapped drops the references of entries that changed hold no more. Precondition: mu.
func (img *Image) dropUnmapped(entries, changed []l2Entry, start uint64) {
	m := img.m
	_ = img.eachDropped(entries, changed, func(_ int, r clusterRun) error {
		if img.wb.test.punchEarly {
			img.punchSole(r)
		}
		m.alloc.freeFor(dropDiscard, r)
		return nil
	})
	for j, e := range entries {
		if e.word&flagCompressed != 0 && changed[j] != e {
			img.decoded.drop(start>>m.clusterBits + uint64(j))
		}
	}
}

// punchSole punches the clusters of r that have no other reference, as the crash tests have it: too early.
func (img *Image) punchSole(r clusterRun) {
	for ci := r.first; ci < r.first+r.n; ci++ {
		if v, err := img.m.alloc.refcount(ci); err == nil && v == 1 {
			_ = img.host.punch(0, noOffset, ci<<img.m.clusterBits, img.m.clusterSize)
		}
	}
}

// eachDropped calls f with the runs of host clusters to which entries hold a reference each that changed do not,
// and the index of the first of them, until f returns an error.
func (img *Image) eachDropped(entries, changed []l2Entry, f func(j int, r clusterRun) error) error {
	var run clusterRun
	first := 0
	for j, e := range entries {
		r := img.m.held(e)
		if r.n == 0 || img.m.held(changed[j]) == r {
			continue
		}
		if run.n > 0 && run.first+run.n == r.first {
			run.n += r.n
			continue
		}
		if run.n > 0 {
			if err := f(first, run); err != nil {
				return err
			}
		}
		run, first = r, j
	}
	if run.n == 0 {
		return nil
	}
	return f(first, run)
}

// eachShown calls f with the ranges that guests read from a host cluster before z and do not after it, from the guest
// cluster at start on, until f returns an error: with the guest and the host offset of n bytes. Where owned is set,
// clusters that are not COPIED are left out.
func (img *Image) eachShown(z *zeroing, start uint64, owned bool, f func(guestOff, hostOff, n uint64) error) error {
	m := img.m
	var guestOff, hostOff, n uint64
	for j, e := range z.entries {
		if owned && e.word&flagCopied == 0 {
			continue
		}
		for sub := uint64(0); sub<<m.subBits < m.clusterSize; {
			kind, subs := m.kindRun(e, sub)
			after, k := m.kindRun(z.changed[j], sub)
			subs = min(subs, k)
			in := sub << m.subBits
			sub += subs
			if kind != kindNormal || after == kindNormal {
				continue
			}
			guest, host := start+uint64(j)<<m.clusterBits+in, e.hostOff()+in
			if n > 0 && (guest != guestOff+n || host != hostOff+n) {
				if err := f(guestOff, hostOff, n); err != nil {
					return err
				}
				n = 0
			}
			if n == 0 {
				guestOff, hostOff = guest, host
			}
			n += subs << m.subBits
		}
	}
	if n == 0 {
		return nil
	}
	return f(guestOff, hostOff, n)
}

// clearRaw zeroes what the raw data file shows of the subclusters that z turns into zeros: alone, it must read as
// the disk does.
func (img *Image) clearRaw(z *zeroing, start uint64) error {
	hole := z.unmap && img.discard != DiscardNever
	return img.eachShown(z, start, false, func(guestOff, hostOff, n uint64) error {
		if guestOff >= img.size.Load() {
			return nil
		}
		// A data file ends where the disk ends.
		return img.data.clear(int64(guestOff), hostOff, min(n, img.size.Load()-guestOff), hole)
	})
}

// punchKept punches what was shown of clusters that stay where they are, and are the active image's alone. Nothing
// of it is read any more.
func (img *Image) punchKept(z *zeroing, start uint64) error {
	m := img.m
	if !z.unmap || !img.discard.passes(dropDiscard) || !m.external && !img.noUnref || img.hdr.rawData() {
		return nil
	}
	return img.eachShown(z, start, true, func(guestOff, hostOff, n uint64) error {
		if m.external {
			if guestOff >= img.size.Load() {
				return nil
			}
			n = min(n, img.size.Load()-guestOff)
		}
		return img.data.punch(0, int64(guestOff), hostOff, n)
	})
}

// writeZeros writes zeros to the part, but where zeros are read already.
func (img *Image) writeZeros(g guestPart) error {
	chunk := max(img.m.clusterSize, uint64(len(zeroChunk)))
	zeros := zeroChunk[:]
	if g.n > uint64(len(zeros)) && chunk > uint64(len(zeros)) {
		buf := getBuffer(chunk)
		defer putBuffer(buf)
		clear(*buf)
		zeros = *buf
	}
	for end := min(g.off+g.n, img.size.Load()); g.off < end; {
		n := min(end-g.off, chunk-g.off&(chunk-1))
		zero, err := img.readsZero(guestPart{g.off, n})
		if err != nil {
			return err
		}
		if !zero {
			if _, err := img.write(zeros[:n], g.off); err != nil {
				return err
			}
		}
		g.off += n
	}
	return nil
}

// readsZero is partIsZero as a request of its own.
func (img *Image) readsZero(g guestPart) (bool, error) {
	defer img.reqs.leave(img.reqs.enter())
	if err := img.writable(); err != nil {
		return false, err
	}
	return img.partIsZero(g)
}
