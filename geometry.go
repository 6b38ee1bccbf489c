package qcow2

// Host and guest offsets are uint64 inside the package and int64 at the io edge.

// geometry is the arithmetic of one image, made from a validated header and immutable. It is the only
// place that knows how offsets divide into clusters, tables and entries.
// qcow2 spec, "General", "Cluster mapping" and "Host cluster management".
type geometry struct {
	clusterBits   uint // 9 … 21
	clusterSize   uint64
	l2EntryBits   uint // log2 of the bytes of an L2 entry: 3, or 4 with extended L2
	l2Bits        uint // log2 of the entries of an L2 table
	refcountOrder uint // log2 of the bits of a refcount: 0 … 6
	refBlockBits  uint // log2 of the refcounts of a refcount block
	extendedL2    bool
	subBits       uint // log2 of the subcluster size; clusterBits without extended L2
	csizeShift    uint // compressed descriptor: first bit of the sector count
	sliceBits     uint // log2 of the bytes of a cached table slice
}

// subclustersPerCluster is the number of subclusters of a cluster with extended L2.
const subclustersPerCluster = 32

// tableSliceBits is log2 of the unit in which L2 tables and refcount blocks are cached: 4 KiB, or a
// cluster where that is smaller.
const tableSliceBits = 12

// newGeometry derives the geometry. Preconditions: 9 <= clusterBits <= 21, refcountOrder <= 6, and at
// least 14 cluster bits with extended L2.
func newGeometry(clusterBits, refcountOrder uint, extendedL2 bool) geometry {
	g := geometry{
		clusterBits:   clusterBits,
		clusterSize:   1 << clusterBits,
		l2EntryBits:   3,
		refcountOrder: refcountOrder,
		refBlockBits:  clusterBits + 3 - refcountOrder,
		extendedL2:    extendedL2,
		subBits:       clusterBits,
		csizeShift:    62 - (clusterBits - 8),
		sliceBits:     min(clusterBits, tableSliceBits),
	}
	if extendedL2 {
		g.l2EntryBits = 4
		g.subBits = clusterBits - 5
	}
	g.l2Bits = clusterBits - g.l2EntryBits
	return g
}

// offsetInCluster returns the offset of off from the start of its cluster.
func (g *geometry) offsetInCluster(off uint64) uint64 { return off & (g.clusterSize - 1) }

// clusterStart returns the offset of the cluster that holds off.
func (g *geometry) clusterStart(off uint64) uint64 { return off &^ (g.clusterSize - 1) }

// clusters returns how many clusters n bytes take, rounded up.
func (g *geometry) clusters(n uint64) uint64 {
	return n>>g.clusterBits + (n&(g.clusterSize-1)+g.clusterSize-1)>>g.clusterBits
}

// l1Index returns the index of the L1 entry for guestOff.
func (g *geometry) l1Index(guestOff uint64) uint64 { return guestOff >> (g.clusterBits + g.l2Bits) }

// l2Index returns the index of guestOff's entry in its L2 table.
func (g *geometry) l2Index(guestOff uint64) uint64 {
	return guestOff >> g.clusterBits & (1<<g.l2Bits - 1)
}

// l1Entries returns how many L1 entries a disk of size bytes needs.
func (g *geometry) l1Entries(size uint64) uint64 {
	if size == 0 {
		return 0
	}
	return (size-1)>>(g.clusterBits+g.l2Bits) + 1
}
