package foreign

import (
	"bytes"
	"fmt"
	"math/bits"
)

// QED, by its specification: numbers are little-endian. A header of whole clusters, and two levels of tables of the
// same length, whose entries are host offsets in bytes, at multiples of the cluster size.
const (
	qedMagicAt       = 0  // 4 bytes
	qedClusterSizeAt = 4  // 4, in bytes
	qedTableSizeAt   = 8  // 4, in clusters
	qedHeaderSizeAt  = 12 // 4, in clusters
	qedFeaturesAt    = 16 // 8; whoever does not know one cannot open the image
	qedL1At          = 40 // 8, host offset in bytes
	qedImageSizeAt   = 48 // 8, in bytes
	qedBackingOffAt  = 56 // 4, in bytes from the start of the header
	qedBackingSizeAt = 60 // 4, in bytes
	qedHeaderLength  = 64

	qedMagic = 0x00444551 // "QED\0"

	qedBackingFile    = 1 << 0 // QED_F_BACKING_FILE
	qedNeedCheck      = 1 << 1 // QED_F_NEED_CHECK
	qedBackingNoProbe = 1 << 2 // QED_F_BACKING_FORMAT_NO_PROBE: the backing file is raw
	qedKnown          = qedBackingFile | qedNeedCheck | qedBackingNoProbe

	qedMinCluster  = 4 << 10
	qedMaxCluster  = 64 << 20
	qedMaxTable    = 16   // clusters
	qedMaxBacking  = 1023 // bytes of the backing file's name: as QEMU has it
	qedEntrySize   = 8
	qedEntryZeroes = 1 // an L2 entry that reads as zeros
)

// qed is a mapper.
type qed struct {
	*tables
	clusterBits uint
	tableBits   uint // log2 of the entries of a table
	tableBytes  uint64
	headerBytes uint64
	l1          uint64 // host offset
	disk        int64  // its size in bytes
	needsCheck  bool
}

// openQED reads and checks the header of a QED image.
//
// The flag QED_F_NEED_CHECK says that the image was not closed: what was written last may be there in any part. A
// writer repairs such an image first. A repair makes entries that name what is not in the file
// unallocated: their cluster was allocated, and named by a table, but never became durable. A reader changes
// nothing, and takes them for what the repair would make of them; without the flag they are errors.
func openQED(f *file, limits Limits) (*Image, error) {
	b, err := f.headerAt(0, qedHeaderLength)
	if err != nil {
		return nil, err
	}
	var (
		cluster  = le.Uint32(b[qedClusterSizeAt:])
		table    = le.Uint32(b[qedTableSizeAt:])
		header   = le.Uint32(b[qedHeaderSizeAt:])
		features = le.Uint64(b[qedFeaturesAt:])
		l1       = le.Uint64(b[qedL1At:])
		size     = le.Uint64(b[qedImageSizeAt:])
	)
	switch {
	case le.Uint32(b[qedMagicAt:]) != qedMagic:
		return nil, fieldErr("magic", fmt.Sprintf("%q", b[:4]), ErrWrongFormat, "%q", "QED\x00")
	case features&^qedKnown != 0:
		return nil, fieldErr("features", features, ErrUnsupported, "no bits but %#x", qedKnown)
	case cluster < qedMinCluster || cluster > qedMaxCluster || cluster&(cluster-1) != 0:
		return nil, fieldErr("cluster_size", cluster, ErrCorrupt,
			"a power of two from %d to %d", qedMinCluster, qedMaxCluster)
	case table < 1 || table > qedMaxTable || table&(table-1) != 0:
		return nil, fieldErr("table_size", table, ErrCorrupt, "a power of two from 1 to %d", qedMaxTable)
	case header < 1 || uint64(header)*uint64(cluster) >= 1<<32:
		return nil, fieldErr("header_size", header, ErrCorrupt, "1 to %d", (1<<32-1)/uint64(cluster))
	}
	q := &qed{
		clusterBits: uint(bits.TrailingZeros32(cluster)),
		tableBytes:  uint64(table) * uint64(cluster),
		headerBytes: uint64(header) * uint64(cluster),
		l1:          l1,
		needsCheck:  features&qedNeedCheck != 0,
	}
	q.tableBits = uint(bits.TrailingZeros64(q.tableBytes / qedEntrySize))
	switch mapped := 2*q.tableBits + q.clusterBits; {
	case size%sector != 0:
		return nil, fieldErr("image_size", size, ErrCorrupt, "a multiple of %d", sector)
	case mapped < 64 && size > 1<<mapped:
		return nil, fieldErr("image_size", size, ErrCorrupt, "at most %#x, which the tables map", uint64(1)<<mapped)
	case l1%uint64(cluster) != 0:
		return nil, fieldErr("l1_table_offset", l1, ErrCorrupt, "a multiple of the cluster size %#x", cluster)
	case l1 < q.headerBytes:
		return nil, fieldErr("l1_table_offset", l1, ErrCorrupt, "at least %#x, behind the header", q.headerBytes)
	case !f.holds(l1, q.tableBytes):
		return nil, fieldErr("l1_table_offset", l1, ErrCorrupt,
			"such that a table of %#x bytes lies within the file of %#x",
			q.tableBytes, f.size)
	}
	if err := checkSize("image_size", size, limits); err != nil {
		return nil, err
	}
	q.disk = int64(size)
	// Each L1 entry in use needs a table of its own.
	q.tables = newTables(f, min(size>>q.clusterBits, 1<<40)*qedEntrySize+2*q.tableBytes, limits)
	img := &Image{m: q, Info: Info{Size: q.disk, BlockSize: int64(cluster), NeedsCheck: q.needsCheck}}
	if features&qedBackingFile == 0 {
		return img, nil
	}
	img.BackingRaw = features&qedBackingNoProbe != 0
	img.BackingFile, err = q.backingName(le.Uint32(b[qedBackingOffAt:]), le.Uint32(b[qedBackingSizeAt:]))
	return img, err
}

// backingName reads the name of the backing file.
func (q *qed) backingName(off, n uint32) (string, error) {
	switch {
	case n > qedMaxBacking:
		return "", fieldErr("backing_filename_size", n, ErrUnsupported, "at most %d", qedMaxBacking)
	case uint64(off)+uint64(n) > q.headerBytes:
		return "", fieldErr("backing_filename_offset", off, ErrCorrupt,
			"such that %d bytes end within the header of %#x", n, q.headerBytes)
	}
	b, err := q.headerAt(int64(off), int(n))
	if err != nil {
		return "", err
	}
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b), nil
}

// lookup implements mapper.
func (q *qed) lookup(off, n int64) (Run, error) {
	n = min(n, q.disk-off)
	span := q.clusterBits + q.tableBits // log2 of the guest bytes that an L1 entry maps
	i := uint64(off) >> span
	b, err := q.at(int64(q.l1), i*qedEntrySize)
	if err != nil {
		return Run{}, fmt.Errorf("L1 table: %w", err)
	}
	l2 := le.Uint64(b)
	if l2 != 0 && !q.places(l2, q.tableBytes) {
		if !q.beyond(l2, q.tableBytes) {
			return Run{}, q.misplaced("L1", l2, q.l1+i*qedEntrySize, off)
		}
		l2 = 0
	}
	if l2 == 0 {
		// So are those that follow, maybe.
		have := int64(1)<<span - off&(1<<span-1)
		for b = b[qedEntrySize:]; have < n && len(b) >= qedEntrySize && le.Uint64(b) == 0; b = b[qedEntrySize:] {
			have += 1 << span
		}
		return Run{Kind: Unallocated, Len: min(n, have)}, nil
	}
	n = min(n, int64(1)<<span-off&(1<<span-1))
	return q.lookupL2(l2, off, n)
}

// lookupL2 is lookup in the L2 table at host offset l2, which maps all of the range.
func (q *qed) lookupL2(l2 uint64, off, n int64) (Run, error) {
	cluster := int64(1) << q.clusterBits
	i := uint64(off) >> q.clusterBits & (1<<q.tableBits - 1)
	b, err := q.at(int64(l2), i*qedEntrySize)
	if err != nil {
		return Run{}, fmt.Errorf("L2 table: %w", err)
	}
	kind, host, err := q.entry(b, l2+i*qedEntrySize, off)
	if err != nil {
		return Run{}, err
	}
	in := off & (cluster - 1)
	r := Run{Kind: kind, Len: cluster - in, HostOff: host + in}
	for b = b[qedEntrySize:]; r.Len < n && len(b) >= qedEntrySize; b = b[qedEntrySize:] {
		k, h, err := q.entry(b, 0, off+r.Len)
		if err != nil || k != kind || kind == Data && h != r.HostOff+r.Len {
			break // an error is that of who looks it up
		}
		r.Len += cluster
	}
	r.Len = min(r.Len, n)
	if kind != Data {
		r.HostOff = 0
	}
	return r, nil
}

// entry decodes the L2 entry that b begins with, which maps the cluster of off. It stands at host offset at.
func (q *qed) entry(b []byte, at uint64, off int64) (Kind, int64, error) {
	switch e := le.Uint64(b); {
	case e == 0:
		return Unallocated, 0, nil
	case e == qedEntryZeroes:
		return Zero, 0, nil
	default:
		start := off &^ (1<<q.clusterBits - 1)
		need := uint64(min(1<<q.clusterBits, q.disk-start)) // the last cluster need not be whole
		switch {
		case q.places(e, need):
			return Data, int64(e), nil
		case q.beyond(e, need):
			return Unallocated, 0, nil
		}
		return 0, 0, q.misplaced("L2", e, at, off)
	}
}

// places reports whether n bytes at host offset off can be a table or a cluster.
func (q *qed) places(off, n uint64) bool {
	return off&(1<<q.clusterBits-1) == 0 && off >= q.headerBytes && q.holds(off, n) &&
		(off >= q.l1+q.tableBytes || q.l1 >= off+n)
}

// beyond reports whether n bytes at host offset off, which are not a place, are what an image that needs a check may
// name: clusters that did not become part of the file.
func (q *qed) beyond(off, n uint64) bool {
	return q.needsCheck && off&(1<<q.clusterBits-1) == 0 && !q.holds(off, n)
}

// misplaced returns the error of an entry of a table, at host offset at.
func (q *qed) misplaced(table string, entry, at uint64, off int64) error {
	return &EntryError{
		What:     fmt.Sprintf("%s entry %#x is not a cluster behind the header in the file of %#x", table, entry, q.size),
		HostOff:  int64(at),
		GuestOff: off,
	}
}
