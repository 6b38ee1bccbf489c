package qcow2

import (
	"encoding/binary"
	"math/bits"
)

// The words of L1 and L2 tables. qcow2 spec, "L1 table entry", "Standard Cluster Descriptor", "Compressed
// Clusters Descriptor" and "Extended L2 Entries". Reserved bits are ignored when an entry is read and zero
// when one is written.
const (
	flagCopied     = 1 << 63            // the refcount is exactly one (QCOW_OFLAG_COPIED)
	flagCompressed = 1 << 62            // the cluster is compressed (QCOW_OFLAG_COMPRESSED)
	flagZero       = 1 << 0             // the cluster reads as zeros; not with extended L2 (QCOW_OFLAG_ZERO)
	offsetMask     = 0x00fffffffffffe00 // bits 9 … 55: host offset (L1E_OFFSET_MASK, L2E_OFFSET_MASK)
)

// bitmapAllocated has the "allocated" bits of all subclusters of an extended entry set.
const bitmapAllocated = 1<<subclustersPerCluster - 1

// clusterKind is what a guest cluster, or a subcluster, is.
type clusterKind uint8

const (
	kindUnallocated clusterKind = iota // reads from the backing file; no host cluster, or its subcluster is unused
	kindZeroPlain                      // reads as zeros, no host cluster
	kindZeroAlloc                      // reads as zeros, keeps a host cluster
	kindNormal                         // reads from the host cluster
	kindCompressed                     // reads from compressed data
	kindInvalid                        // the entry is corrupt
)

// l2Entry is an L2 entry: its word and, with extended L2, its subcluster bitmap.
type l2Entry struct {
	word   uint64
	bitmap uint64 // bits 0 … 31: subcluster allocated; 32 … 63: subcluster reads as zeros
}

// hostOff returns the host offset of a cluster that is not compressed, cluster-aligned in a sound image.
func (e l2Entry) hostOff() uint64 { return e.word & offsetMask }

// entryRules says how the entries of one image are to be understood.
type entryRules struct {
	geometry
	version2 bool // no zero flag
	external bool // guest data lies in an external data file
}

// hasCluster reports whether e holds a host cluster for plain data. With an external data file offset 0 is
// a place like any other, and COPIED tells.
func (r *entryRules) hasCluster(e l2Entry) bool {
	return e.word&flagCompressed == 0 && (e.hostOff() != 0 || r.external && e.word&flagCopied != 0)
}

// uniformBitmap returns the bitmap of a cluster with a place, all of whose subclusters are of one kind.
func uniformBitmap(k clusterKind) uint64 {
	switch k {
	case kindNormal:
		return bitmapAllocated
	case kindZeroAlloc:
		return bitmapAllocated << subclustersPerCluster
	}
	return 0
}

// reserved reports whether e holds a host cluster in which subclusters that are not allocated have their place.
func (r *entryRules) reserved(e l2Entry) bool { return r.extendedL2 && r.hasCluster(e) }

// kind returns the kind of subcluster sub, or of the whole cluster without extended L2.
func (r *entryRules) kind(e l2Entry, sub uint64) clusterKind {
	if e.word&flagCompressed != 0 {
		if r.external || e.bitmap != 0 {
			return kindInvalid
		}
		return kindCompressed
	}
	if r.hasCluster(e) && r.offsetInCluster(e.hostOff()) != 0 {
		return kindInvalid
	}
	if !r.extendedL2 {
		switch zero := e.word&flagZero != 0; {
		case zero && r.version2:
			return kindInvalid
		case zero && e.hostOff() != 0:
			return kindZeroAlloc
		case zero:
			return kindZeroPlain
		case r.hasCluster(e):
			return kindNormal
		}
		return kindUnallocated
	}
	has := r.hasCluster(e)
	allocated := e.bitmap>>sub&1 != 0
	zero := e.bitmap>>(32+sub)&1 != 0
	switch {
	case allocated && (zero || !has):
		return kindInvalid
	case allocated:
		return kindNormal
	case zero && has:
		return kindZeroAlloc
	case zero:
		return kindZeroPlain
	}
	return kindUnallocated
}

// kindRun returns the kind of subcluster sub and how many subclusters from there on share it. Without
// extended L2 the whole cluster is one.
func (r *entryRules) kindRun(e l2Entry, sub uint64) (clusterKind, uint64) {
	k := r.kind(e, sub)
	if !r.extendedL2 {
		return k, 1
	}
	if k == kindCompressed {
		return k, subclustersPerCluster - sub
	}
	// What the subclusters of an entry are differs by their two bits alone, but for invalid ones, whose runs may be cut.
	other := (e.bitmap ^ -(e.bitmap >> sub & 1)) | (e.bitmap>>subclustersPerCluster ^ -(e.bitmap >> (subclustersPerCluster + sub) & 1))
	return k, uint64(bits.TrailingZeros64(other>>sub | 1<<(subclustersPerCluster-sub)))
}

// compressed returns the host offset of a compressed cluster's payload, and the length in bytes up to the
// end of its last sector.
func (r *entryRules) compressed(word uint64) (off, n uint64) {
	off = word & (1<<r.csizeShift - 1)
	sectors := word >> r.csizeShift & (1<<(62-r.csizeShift) - 1)
	return off, (sectors+1)*sectorSize - off%sectorSize
}

// compressedWord returns the L2 word for n bytes of payload at host offset off.
func (r *entryRules) compressedWord(off, n uint64) uint64 {
	sectors := (off+n-1)/sectorSize - off/sectorSize
	return flagCompressed | sectors<<r.csizeShift | off
}

// held returns the host clusters that e holds a reference to each of; n is 0 if there is none. Clusters of
// an external data file have no references.
func (r *entryRules) held(e l2Entry) clusterRun {
	if e.word&flagCompressed != 0 {
		off, n := r.compressed(e.word)
		first := off >> r.clusterBits
		return clusterRun{first: first, n: (off+n-1)>>r.clusterBits - first + 1}
	}
	if r.external || e.hostOff() == 0 {
		return clusterRun{}
	}
	return clusterRun{first: e.hostOff() >> r.clusterBits, n: 1}
}

// subclusterMask returns the bits of subclusters first … last in the lower half of a bitmap.
func subclusterMask(first, last uint64) uint64 {
	return (1<<(last+1) - 1) &^ (1<<first - 1)
}

// withData returns the bitmap with the given subclusters allocated and not zero.
func withData(bitmap, mask uint64) uint64 { return (bitmap | mask) &^ (mask << 32) }

// firstSet returns the index of the lowest set bit of a non-zero mask, and the length of the run of set
// bits that begins there.
func firstSet(mask uint64) (first, n uint64) {
	first = uint64(bits.TrailingZeros64(mask))
	return first, uint64(bits.TrailingZeros64(^(mask >> first)))
}

// putEntry encodes e as entry i of the L2 table, or slice, p.
func (r *entryRules) putEntry(p []byte, i uint64, e l2Entry) {
	p = p[i<<r.l2EntryBits:]
	binary.BigEndian.PutUint64(p, e.word)
	if r.extendedL2 {
		binary.BigEndian.PutUint64(p[8:], e.bitmap)
	}
}
