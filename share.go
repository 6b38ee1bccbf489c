package qcow2

import "slices"

// sharedTable names a table: its kind, of which those of bitmaps have the one of their directory, and its host offset.
type sharedTable struct {
	kind OverlapKinds
	off  uint64
}

// maxOver bounds the clusters of which is known how many references were too many: 1 MiB or so.
const maxOver = 1 << 15

// addOver notes that cluster ci has n more references than refs could count.
func (c *checker) addOver(ci, n uint64) {
	if _, ok := c.over[ci]; ok || len(c.over) < maxOver {
		c.over[ci] += n
	}
}

// references returns the references to cluster ci, those that its refcount cannot count too.
func (c *checker) references(ci uint64) uint64 { return c.refs.count(ci) + c.over[ci] }

// sharedCluster returns the first cluster of [off, off+n) that has more references than own, if there is one.
func (c *checker) sharedCluster(off, n, own uint64) (ci uint64, ok bool) {
	if n == 0 || !c.inside(off, n) {
		return 0, false
	}
	for ci := off >> c.clusterBits; ci <= (off+n-1)>>c.clusterBits; ci++ {
		if c.references(ci) > own {
			return ci, true
		}
	}
	return 0, false
}

// findShared finds the tables in clusters that are something else too. A refcount that counts both makes that no
// corruption to qemu-img check, nor to anybody who never writes; but most tables are written in place.
//
// Not shared are an L2 table that several L1 entries name, and an L1 table that several snapshots do: their refcounts
// say so, and a writer copies them. Refcount blocks are judged by walkBlocks.
func (c *checker) findShared() error {
	if c.endOnly {
		return nil
	}
	h := c.hdr
	table := func(k OverlapKinds, what string, off, n uint64) bool {
		ci, ok := c.sharedCluster(off, n, 1)
		if ok {
			c.foundShared(sharedTable{k, off}, ci, 1, part(FindingShared, what, off))
		}
		return ok
	}
	table(OverlapActiveL1, "active L1 table", h.l1Off, h.l1Bytes())
	table(OverlapSnapshotTable, "snapshot table", h.snapshotsOff, c.snapBytes)
	if c.refTable != nil && table(OverlapRefcountTable, "refcount table", h.refTableOff, h.refTableBytes()) {
		c.unusable = true
	}
	if h.bitmaps != nil {
		table(OverlapBitmapDirectory, "bitmap directory", h.bitmaps.dirOff, h.bitmaps.dirSize)
		for _, b := range c.bitmaps {
			table(OverlapBitmapDirectory, "bitmap table", b.lo, b.hi-b.lo)
		}
	}
	c.findSharedSnapshots()
	for _, r := range c.l2 {
		own := uint64(r.active) + uint64(r.inactive)
		if ci := r.off >> c.clusterBits; c.references(ci) > own {
			f := part(FindingShared, "L2 table", r.off)
			f.GuestOff = int64(uint64(r.l1Index) << (c.clusterBits + c.l2Bits))
			c.foundShared(sharedTable{kind: OverlapActiveL2, off: r.off}, ci, own, f)
		}
	}
	return c.ctx.Err()
}

// findSharedSnapshots is findShared for the L1 tables of snapshots. It looks at each cluster once, however many
// snapshots have it.
func (c *checker) findSharedSnapshots() {
	l1s := c.snapshotL1s()
	clusters := slices.Clone(l1s)
	for i := range clusters {
		clusters[i].hi = c.clusterStart(clusters[i].hi + c.clusterSize - 1)
	}
	var bad []span
	for _, s := range overlay(clusters) {
		if ci, ok := c.sharedCluster(s.lo, s.hi-s.lo, s.times); ok {
			bad = append(bad, s)
			c.foundShared(sharedTable{OverlapInactiveL1, s.lo}, ci, s.times, part(FindingShared, "snapshot L1 table", s.lo))
		}
	}
	for _, s := range l1s {
		i, _ := slices.BinarySearchFunc(bad, s.lo, func(b span, lo uint64) int {
			if b.hi <= lo {
				return -1
			}
			return 1
		})
		if s.lo < s.hi && i < len(bad) && bad[i].lo < s.hi {
			c.shared[sharedTable{OverlapInactiveL1, s.lo}] = true
		}
	}
}

// foundShared reports table t, in whose cluster ci there is more than the own references to it.
func (c *checker) foundShared(t sharedTable, ci, own uint64, f Finding) {
	c.structural = true
	c.shared[t] = true
	f.HostOff, f.Found, f.Expected = int64(ci<<c.clusterBits), c.references(ci), own
	c.find(f)
}
