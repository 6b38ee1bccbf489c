package qcow2

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// perBlock returns the number of refcounts of a refcount block.
func (g *geometry) perBlock() uint64 { return 1 << g.refBlockBits }

// blockOff returns the host offset of refcount block b, 0 if there is none. It reports false if there is none
// that can be read: the entry is not the offset of a cluster, or beyond what a file can reach.
func (c *checker) blockOff(b uint64) (uint64, bool) {
	if c.refTable == nil {
		return 0, false
	}
	off := c.refTable.load(b) &^ refTableReserved
	return off, c.offsetInCluster(off) == 0 && off <= maxFileEnd-c.clusterSize
}

// maxFileEnd is where the longest file ends to QEMU, in bytes (BDRV_MAX_LENGTH).
const maxFileEnd = 1<<63 - 1<<30

// refRanges returns the indexes of the refcount blocks whose ranges have refcounts or references, in order.
func (c *checker) refRanges() []uint64 {
	var bs []uint64
	add := func(b uint64) {
		if n := len(bs); n == 0 || bs[n-1] != b {
			bs = append(bs, b)
		}
	}
	for _, k := range c.refs.chunks() {
		ch := c.refs.chunk(k)
		for _, s := range ch.sparse {
			add((k<<refChunkBits + uint64(s.index)) >> c.refBlockBits)
		}
		if ch.words != nil {
			for ci := k << refChunkBits; ci < (k+1)<<refChunkBits; ci += min(c.perBlock(), refChunkWords) {
				add(ci >> c.refBlockBits)
			}
		}
	}
	if c.refTable != nil {
		for i, chunk := range c.refTable.all() {
			for j, w := range chunk {
				if w != 0 {
					bs = append(bs, i<<tableChunkBits+uint64(j))
				}
			}
		}
	}
	slices.Sort(bs)
	return slices.Compact(bs)
}

// compare sets the refcounts beside the references, and notes which refcounts are one. A cluster that is
// referred to past the end of the file, by less than one, is compared like any other. It also finds out
// whether a COPIED flag contradicts a refcount.
func (c *checker) compare() error {
	end := max(c.clusters(c.size), c.refs.end())
	ranges := c.refRanges()
	c.done, c.total = 0, int64(uint64(len(ranges))<<c.clusterBits)
	buf := make([]byte, c.clusterSize)
	last := uint64(0)
	for _, b := range ranges {
		if err := c.step(c.clusterSize); err != nil {
			return err
		}
		lo := b << c.refBlockBits
		hi := lo + c.perBlock()
		off, ok := c.blockOff(b)
		if !ok {
			if lo < end {
				c.unusable = true
				c.find(Finding{Kind: FindingUnreadable, Part: "refcount block", HostOff: int64(lo << c.clusterBits), GuestOff: noOffset,
					Found: off, Times: int64(min(hi, end) - lo)})
				c.copiedWrong = true // what can be told of the others must be told one by one
			}
			continue
		}
		var block []byte
		if off != 0 {
			block = buf
			if err := c.h.readFull(block, off); err != nil {
				return fmt.Errorf("refcount block: %w", err)
			}
		}
		if lo < end {
			last = max(last, c.compareRange(block, lo, min(hi, end)))
		}
		c.findPastEnd(block, lo, max(lo, end), hi)
	}
	c.res.ImageEndOffset = int64((last + 1) << c.clusterBits)
	return nil
}

// compareRange compares the clusters from lo to hi, which one refcount block describes; block is nil if it is
// missing. It returns the last one that has a refcount or references, or 0.
func (c *checker) compareRange(block []byte, lo, hi uint64) (last uint64) {
	order := c.refcountOrder
	base := lo
	for lo < hi {
		next := min(hi, (lo>>refChunkBits+1)<<refChunkBits)
		ch := c.refs.chunk(lo >> refChunkBits)
		if ch == nil {
			// No references: what has a refcount is leaked.
			for lo < next && block != nil {
				if lo += zeroRun(block, order, lo-base, next-lo); lo < next {
					last = lo
					c.mismatch(lo, refcountAt(block, order, lo-base), 0)
					lo++
				}
			}
			lo = next
			continue
		}
		for ; lo < next; lo++ {
			stored := uint64(0)
			if block != nil {
				if ch.words != nil {
					i := lo & (refChunkWords - 1)
					if n := markOnes(block, order, lo-base, ch.words[i:i+next-lo]); n > 0 {
						lo += n
						if last = lo - 1; lo == next {
							break
						}
					}
				}
				stored = refcountAt(block, order, lo-base)
			}
			var w uint16
			i := lo & (refChunkWords - 1)
			if ch.words != nil {
				if w = ch.words[i]; stored == 1 {
					ch.words[i] = w | refStoredOne
				}
			} else if j, ok := ch.find(uint16(i)); ok {
				if w = ch.sparse[j].word; stored == 1 {
					ch.sparse[j].word = w | refStoredOne
				}
			}
			n := uint64(w & refCountMask)
			if n == refCountMask {
				n = c.refs.more[lo]
			}
			if stored|n == 0 {
				continue
			}
			last = lo
			if stored != n {
				c.mismatch(lo, stored, n)
				c.missing = c.missing || block == nil
			}
			if w&refCopied != 0 && stored != 1 || w&refPlain != 0 && stored == 1 {
				c.copiedWrong = true
			}
		}
	}
	return last
}

// markOnes notes of the clusters from refcount i of block on that their refcount is one, in their words, as long as
// they have just one reference and no flag denies it. It returns how many those are: in most images nearly all. It
// goes by as many clusters as a 64-bit word of the block describes.
func markOnes(block []byte, order uint, i uint64, words []uint16) (n uint64) {
	perWord := uint64(64) >> order
	for i%perWord == 0 && uint64(len(words)) >= perWord && binary.BigEndian.Uint64(block[i/perWord*8:]) == laneOnes[order] {
		for _, w := range words[:perWord] {
			if w&(refCountMask|refPlain) != 1 {
				return n
			}
		}
		for j := range words[:perWord] {
			words[j] |= refStoredOne
		}
		words = words[perWord:]
		i += perWord
		n += perWord
	}
	return n
}

// mismatch finds that host cluster ci has another refcount than references.
func (c *checker) mismatch(ci, stored, n uint64) {
	kind := FindingRefcount
	if stored > n {
		kind = FindingLeak
	}
	c.find(Finding{Kind: kind, Part: "refcount block", HostOff: int64(ci << c.clusterBits), GuestOff: noOffset, Found: stored, Expected: n})
}

// findPastEnd finds refcounts from cluster from to hi in a block that begins with cluster lo.
func (c *checker) findPastEnd(block []byte, lo, from, hi uint64) {
	for ci := from; block != nil && ci < hi; ci++ {
		if ci += zeroRun(block, c.refcountOrder, ci-lo, hi-ci); ci < hi {
			c.find(Finding{Kind: FindingPastEnd, Part: "refcount block", HostOff: int64(ci << c.clusterBits), GuestOff: noOffset,
				Found: refcountAt(block, c.refcountOrder, ci-lo)})
		}
	}
}

// stored returns the refcount of host cluster ci as it stands on disk; false if it cannot be read.
func (c *checker) stored(ci uint64) (uint64, bool, error) {
	off, ok := c.blockOff(ci >> c.refBlockBits)
	if !ok || off == 0 {
		return 0, ok, nil
	}
	// The word that holds it, or the byte.
	i := ci & (c.perBlock() - 1)
	var p [8]byte
	perWord := uint64(64) >> c.refcountOrder
	if err := c.h.readFull(p[:], off+i/perWord*8); err != nil {
		return 0, false, fmt.Errorf("refcount block: %w", err)
	}
	return refcountAt(p[:], c.refcountOrder, i%perWord), true, nil
}

// storedOne reports whether the refcount of cluster ci is one; false for ok if it cannot be read.
func (c *checker) storedOne(ci uint64) (one, ok bool, err error) {
	// What compare has seen with references, it has marked.
	if w := c.refs.load(ci); w&refCountMask != 0 {
		if off, ok := c.blockOff(ci >> c.refBlockBits); !ok || off == 0 {
			return false, ok, nil
		}
		return w&refStoredOne != 0, true, nil
	}
	v, ok, err := c.stored(ci)
	return v == 1, ok, err
}

// compareCopied compares the COPIED flags of the active entries with the refcounts, one by one, and reports
// those that contradict them. It is asked only if some do. An L2 table is looked at once, however many L1
// entries name it, and left out if the refcount of its own cluster cannot be read.
func (c *checker) compareCopied() error {
	h := c.hdr
	c.done, c.total = 0, int64(uint64(len(c.l2)+len(c.misplaced))<<c.clusterBits)
	err := c.words(h.l1Off, uint64(h.l1Size), func(i, w uint64) error {
		if w&offsetMask == 0 {
			return nil
		}
		one, known, err := c.storedOne(w & offsetMask >> c.clusterBits)
		if known {
			c.foundCopied(Finding{Part: "active L1 table", HostOff: int64(h.l1Off + 8*i), GuestOff: int64(i << (c.clusterBits + c.l2Bits)),
				Found: w}, one)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := c.eachTable(c.l2, c.compareTable); err != nil {
		return err
	}
	return c.eachTable(c.misplaced, c.compareTable)
}

// compareTable is compareCopied of the L2 table r with content p. A cluster in a data file counts as one with
// refcount one.
func (c *checker) compareTable(r l2Ref, p []byte) error {
	if r.active == 0 || r.off == 0 {
		return nil
	}
	if _, known, err := c.storedOne(r.off >> c.clusterBits); err != nil || !known {
		return err
	}
	guest := uint64(r.l1Index) << (c.clusterBits + c.l2Bits)
	for j := range uint64(1) << c.l2Bits {
		w := binary.BigEndian.Uint64(p[j<<c.l2EntryBits:])
		if w&flagCompressed != 0 || w&offsetMask == 0 {
			continue
		}
		one, known := true, true
		if !c.external {
			var err error
			if one, known, err = c.storedOne(w & offsetMask >> c.clusterBits); err != nil {
				return err
			}
		}
		if known {
			c.foundCopied(Finding{Part: "L2 table", HostOff: int64(r.off + j<<c.l2EntryBits), GuestOff: int64(guest + j<<c.clusterBits), Found: w,
				Times: int64(r.active)}, one)
		}
	}
	return nil
}

// foundCopied reports the active entry of f if its COPIED flag contradicts the refcount of its cluster: one
// tells whether that is one.
func (c *checker) foundCopied(f Finding, one bool) {
	copied := f.Found&flagCopied != 0
	if one == copied {
		return
	}
	f.Kind, f.Expected = FindingCopied, f.Found^flagCopied
	if one {
		f.Kind = FindingCopiedLost
	}
	c.find(f)
}
