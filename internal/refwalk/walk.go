package refwalk

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
)

// use is what a host cluster is for. A cluster has one use.
type use uint8

// The uses. Only L2 tables, data and compressed data may have several references.
const (
	unused use = iota
	useHeader
	useL1
	useL2
	useRefTable
	useRefBlock
	useSnapshotTable
	useSnapshotL1
	useBitmapDir
	useBitmapTable
	useBitmapData
	useCrypto
	useData
	useCompressed
)

// useNames are the names of the uses, in their order.
var useNames = [...]string{
	"nothing", "header", "active L1 table", "L2 table", "refcount table", "refcount block", "snapshot table",
	"snapshot L1 table", "bitmap directory", "bitmap table", "bitmap data", "encryption header", "data", "compressed data",
}

// String returns the name of the use.
func (u use) String() string { return useNames[u] }

// MaxFindings is how many findings a report spells out.
const MaxFindings = 32

// Report is what a walk found. All numbers count findings; one cluster or entry may have several.
type Report struct {
	Header *Header
	// Clusters is the number of host clusters of the file, the last one perhaps short.
	Clusters int64
	// Leaks counts clusters with a refcount above their references: harmless.
	Leaks int
	// TooLow counts clusters with a refcount below their references (I1).
	TooLow int
	// CopiedWrong counts active L1 and L2 entries with the COPIED flag whose cluster does not have
	// exactly one reference and refcount 1 (I7).
	CopiedWrong int
	// CopiedMissing counts active entries without the flag whose cluster has: harmless. With a data
	// file, where it is not harmless, they are BadEntries.
	CopiedMissing int
	// BadEntries counts table entries and pointers that the format forbids: reserved bits, misaligned
	// offsets, places beyond the end of the file by a cluster or more, contradictory subclusters (I3).
	BadEntries int
	// Overlaps counts clusters with two uses or two owners (I8).
	Overlaps int
	// PastEnd counts refcounts that are not zero, of clusters past the end of the file without a
	// reference: harmless.
	PastEnd int
	// Findings spells out the first MaxFindings of the above but PastEnd, each beginning with the
	// invariant it breaks or the word "leak" or "lost COPIED".
	Findings []string
	// Allocated counts the guest clusters of the active L1 that have a place in the host file, and
	// Compressed those of them that are compressed.
	Allocated, Compressed int
	// InternalSnapshots are the snapshots, in the order of their table.
	InternalSnapshots []Snapshot
	// SnapshotsUnread says that the snapshot table cannot be read, which is one of BadEntries: what it and its
	// snapshots refer to is not counted.
	SnapshotsUnread bool
}

// Snapshot is an entry of the snapshot table.
type Snapshot struct {
	ID, Name  string
	L1Off     uint64
	L1Entries uint32
	// DiskSize is the virtual size in bytes; that of the header where the entry does not say.
	DiskSize uint64
}

// Dirty reports the dirty bit, with which refcounts and COPIED flags mean nothing.
func (r *Report) Dirty() bool { return r.Header.Dirty() }

// Corruptions is the number of findings that a crash must not leave: all but leaks and lost COPIED
// flags. With the dirty bit, refcounts and flags are not among them.
func (r *Report) Corruptions() int {
	if r.Dirty() {
		return r.BadEntries + r.Overlaps
	}
	return r.TooLow + r.CopiedWrong + r.BadEntries + r.Overlaps
}

// Clean reports that there is no finding at all, as after Close.
func (r *Report) Clean() bool {
	return !r.Dirty() && !r.Header.Corrupt() && r.Corruptions() == 0 && r.Leaks == 0 && r.CopiedMissing == 0 && r.PastEnd == 0
}

// walker is the state of one walk.
type walker struct {
	file
	*Header
	rep    *Report
	n      int64    // clusters; the slices have one more, for what reaches past the end by less than one
	stored []uint64 // refcount on disk, by cluster
	refs   []uint32 // references found, by cluster
	uses   []use    // by cluster
	owner  []uint64 // what an L2 table or data cluster belongs to, plus 1: an L1 index or guest offset
	clash  []bool   // an overlap of the cluster has been counted
	blank  map[uint64]uint64
	copied []flagged
	buf    []byte // of one L2 table
}

// flagged is an active entry whose COPIED flag is to be compared.
type flagged struct {
	cluster int64
	where   uint64 // L1 index, or guest offset
	set     bool
	l1      bool
}

// Masks of the entries. qcow2 spec, "Cluster mapping", "Refcount table" and "Bitmap table".
const (
	flagCopied      = 1 << 63
	flagCompressed  = 1 << 62
	offsetMask      = 0x00fffffffffffe00
	l1Reserved      = 0x7f000000000001ff
	l2Reserved      = 0x3f000000000001fe
	refTableMask    = 0x1ff
	bitmapReserved  = 0xff000000000001fe
	extendedSubMask = 0xffffffff
)

// Walk counts the references to every host cluster of an image of size bytes and compares them with
// its refcounts and flags. It returns an error only if there is nothing to walk: an unusable header, or
// a read that failed.
func Walk(r io.ReaderAt, size int64) (*Report, error) {
	h, err := ParseHeader(r, size)
	if err != nil {
		return nil, err
	}
	n := (size + h.clusterSize() - 1) >> h.ClusterBits
	if n > maxClusters {
		return nil, fmt.Errorf("refwalk: %d clusters are too many", n)
	}
	w := &walker{
		file:   file{r: r, size: size},
		Header: h,
		rep:    &Report{Header: h, Clusters: n},
		n:      n,
		stored: make([]uint64, n+1),
		refs:   make([]uint32, n+1),
		uses:   make([]use, n+1),
		owner:  make([]uint64, n+1),
		clash:  make([]bool, n+1),
		blank:  make(map[uint64]uint64),
		buf:    make([]byte, h.clusterSize()),
	}
	w.ref(0, h.clusterSize(), useHeader, 0, "header")
	for _, step := range []func() error{w.walkRefcounts, w.walkActive, w.walkSnapshots, w.walkBitmaps} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	if h.CryptMethod == 2 && h.CryptoLen > 0 {
		w.ref(h.CryptoOff, int64(h.CryptoLen), useCrypto, 0, "encryption header")
	}
	w.compare()
	return w.rep, nil
}

// find counts a finding and spells it out if there is room.
func (w *walker) find(count *int, format string, args ...any) {
	*count++
	if len(w.rep.Findings) < MaxFindings {
		w.rep.Findings = append(w.rep.Findings, fmt.Sprintf(format, args...))
	}
}

// bad counts an entry that the format forbids.
func (w *walker) bad(format string, args ...any) { w.find(&w.rep.BadEntries, "I3: "+format, args...) }

// ref counts a reference to each cluster that [off, off+n) touches, and reports whether the range is
// within the file, or past its end by less than a cluster. owner is an L1 index or guest offset for
// uses that may be shared. what describes the pointer.
func (w *walker) ref(off uint64, n int64, u use, owner uint64, what string) bool {
	if n == 0 {
		return true
	}
	if off >= 1<<62 || int64(off)+n-w.size >= w.clusterSize() {
		w.bad("%s points at %#x+%#x beyond the end of the file at %#x", what, off, n, w.size)
		return false
	}
	for c := int64(off) >> w.ClusterBits; c <= (int64(off)+n-1)>>w.ClusterBits; c++ {
		w.refs[c]++
		if w.uses[c] == unused {
			w.uses[c], w.owner[c] = u, owner+1
			continue
		}
		shared := w.uses[c] == u && (u == useCompressed || (u == useData || u == useL2) && w.owner[c] == owner+1)
		if !shared && !w.clash[c] {
			w.clash[c] = true
			w.find(&w.rep.Overlaps, "I8: cluster %d is %s (of %#x) and also %s (of %#x)", c, w.uses[c], w.owner[c]-1, u, owner)
		}
	}
	return true
}

// walkRefcounts reads the refcount table and its blocks. qcow2 spec, "Host cluster management".
func (w *walker) walkRefcounts() error {
	n := int64(w.RefTableClusters) << w.ClusterBits
	if !w.ref(w.RefTableOff, n, useRefTable, 0, "header refcount table") {
		return nil
	}
	table, err := w.clipped(int64(w.RefTableOff), n)
	if err != nil {
		return err
	}
	block := make([]byte, w.clusterSize())
	perBlock := w.clusterSize() * 8 >> w.RefcountOrder
	for i := int64(0); i+8 <= int64(len(table)); i += 8 {
		e := binary.BigEndian.Uint64(table[i:])
		switch {
		case e == 0:
			continue
		case e&refTableMask != 0:
			w.bad("refcount table entry %d is %#x: reserved bits", i/8, e)
			continue
		case e&uint64(w.clusterSize()-1) != 0:
			w.bad("refcount table entry %d is %#x: misaligned", i/8, e)
			continue
		case !w.ref(e, w.clusterSize(), useRefBlock, 0, "refcount table entry"):
			continue
		}
		if err := w.read(block, int64(e)); err != nil {
			return err
		}
		first, blank := i/8*perBlock, true
		for j := range perBlock {
			v := refcountAt(block, j, w.RefcountOrder)
			if v == 0 {
				continue
			}
			blank = false
			if c := first + j; c <= w.n {
				w.stored[c] = v
			} else {
				w.rep.PastEnd++
			}
		}
		if blank {
			w.blank[uint64(i/8)] = e
		}
	}
	return nil
}

// refcountAt returns refcount i of a block of 1<<order bits each. Widths below a byte fill it from its
// least significant bit.
func refcountAt(block []byte, i int64, order uint) uint64 {
	be := binary.BigEndian
	switch order {
	case 3:
		return uint64(block[i])
	case 4:
		return uint64(be.Uint16(block[2*i:]))
	case 5:
		return uint64(be.Uint32(block[4*i:]))
	case 6:
		return be.Uint64(block[8*i:])
	}
	width := uint(1) << order
	bit := uint(i) * width
	return uint64(block[bit/8]>>(bit%8)) & (1<<width - 1)
}

// walkActive walks the active L1 table.
func (w *walker) walkActive() error {
	return w.walkL1(w.L1Off, int64(w.L1Entries), useL1, "active L1 table")
}

// walkL1 walks an L1 table and the tables below it.
func (w *walker) walkL1(off uint64, entries int64, u use, what string) error {
	if entries == 0 || !w.ref(off, entries*8, u, 0, what) {
		return nil
	}
	table, err := w.clipped(int64(off), entries*8)
	if err != nil {
		return err
	}
	for i := int64(0); i+8 <= int64(len(table)); i += 8 {
		e := binary.BigEndian.Uint64(table[i:])
		if e == 0 {
			continue
		}
		l2Off := e & offsetMask
		if e&l1Reserved != 0 {
			w.bad("%s entry %d is %#x: reserved bits", what, i/8, e)
		}
		if l2Off == 0 {
			continue
		}
		if l2Off&uint64(w.clusterSize()-1) != 0 {
			w.bad("%s entry %d is %#x: misaligned", what, i/8, e)
			continue
		}
		if !w.ref(l2Off, w.clusterSize(), useL2, uint64(i/8), what+" entry") {
			continue
		}
		if u == useL1 {
			w.copied = append(w.copied, flagged{int64(l2Off) >> w.ClusterBits, uint64(i / 8), e&flagCopied != 0, true})
		}
		if err := w.walkL2(l2Off, uint64(i/8), u == useL1); err != nil {
			return err
		}
	}
	return nil
}

// walkL2 walks the L2 table of L1 entry l1Index. qcow2 spec, "Cluster mapping" and "Extended L2
// entries".
func (w *walker) walkL2(off, l1Index uint64, active bool) error {
	if err := w.read(w.buf, int64(off)); err != nil {
		return err
	}
	size := w.l2EntrySize()
	perTable := uint64(w.clusterSize() / size)
	for i := uint64(0); i < perTable; i++ {
		b := w.buf[int64(i)*size:]
		e, sub := binary.BigEndian.Uint64(b), uint64(0)
		if size == 16 {
			sub = binary.BigEndian.Uint64(b[8:])
		}
		if e == 0 && sub == 0 {
			continue
		}
		w.walkEntry(e, sub, (l1Index*perTable+i)<<w.ClusterBits, active)
	}
	return nil
}

// walkEntry looks at one L2 entry that is not all zeros.
func (w *walker) walkEntry(e, sub, guest uint64, active bool) {
	if e&flagCompressed != 0 {
		switch {
		case w.DataFile():
			w.bad("L2 entry of guest %#x is %#x: compressed with a data file", guest, e)
			return
		case e&flagCopied != 0:
			w.bad("L2 entry of guest %#x is %#x: compressed with COPIED", guest, e)
		case sub != 0:
			w.bad("L2 entry of guest %#x is %#x, %#x: compressed with subclusters", guest, e, sub)
		}
		off, n := w.compressedRange(e)
		if w.ref(off, n, useCompressed, guest, fmt.Sprintf("L2 entry of guest %#x", guest)) && active {
			w.rep.Allocated++
			w.rep.Compressed++
		}
		return
	}
	off := e & offsetMask
	if e&l2Reserved != 0 || e&1 != 0 && (w.Version == 2 || w.ExtendedL2()) {
		w.bad("L2 entry of guest %#x is %#x: reserved bits", guest, e)
	}
	alloc, zero := sub&extendedSubMask, sub>>32
	if alloc&zero != 0 {
		w.bad("L2 entry of guest %#x: subclusters %#x allocated and zero", guest, alloc&zero)
	}
	if w.DataFile() {
		w.walkDataFileEntry(e, off, alloc, guest, active)
		return
	}
	if off == 0 {
		switch {
		case alloc != 0:
			w.bad("L2 entry of guest %#x: subclusters %#x allocated without a cluster", guest, alloc)
		case e&flagCopied != 0:
			w.bad("L2 entry of guest %#x is %#x: COPIED without a cluster", guest, e)
		}
		return
	}
	if off&uint64(w.clusterSize()-1) != 0 {
		w.bad("L2 entry of guest %#x is %#x: misaligned", guest, e)
		return
	}
	// The description is made only where it is needed: most entries are sound.
	if int64(off)+w.clusterSize()-w.size >= w.clusterSize() {
		w.bad("L2 entry of guest %#x points at %#x beyond the end of the file at %#x", guest, off, w.size)
		return
	}
	w.ref(off, w.clusterSize(), useData, guest, "")
	if active {
		w.rep.Allocated++
		w.copied = append(w.copied, flagged{int64(off) >> w.ClusterBits, guest, e&flagCopied != 0, false})
	}
}

// walkDataFileEntry looks at an entry whose cluster is in the data file: at the guest's own offset, and
// always with COPIED, which tells a cluster at 0 from none.
func (w *walker) walkDataFileEntry(e, off, alloc, guest uint64, active bool) {
	if off == 0 && e&flagCopied == 0 {
		if alloc != 0 {
			w.bad("L2 entry of guest %#x: subclusters %#x allocated without a cluster", guest, alloc)
		}
		return
	}
	if off != guest {
		w.bad("L2 entry of guest %#x is %#x: elsewhere in the data file", guest, e)
	}
	if e&flagCopied == 0 {
		w.bad("L2 entry of guest %#x is %#x: in the data file without COPIED", guest, e)
	}
	if active {
		w.rep.Allocated++
	}
}

// compressedRange returns the host range of a compressed cluster's descriptor: to the end of its last
// sector. qcow2 spec, "Compressed Clusters Descriptor".
func (h *Header) compressedRange(e uint64) (off uint64, n int64) {
	x := 62 - (h.ClusterBits - 8)
	off = e & (1<<x - 1)
	sectors := e &^ (flagCompressed | flagCopied) >> x
	return off, int64((sectors+1)*512 - off%512)
}

// walkSnapshots reads the snapshot table and walks the L1 tables. qcow2 spec, "Snapshots".
func (w *walker) walkSnapshots() error {
	if w.Snapshots == 0 {
		return nil
	}
	snapshots, n, err := w.readSnapshots(&w.file)
	if err != nil {
		w.rep.SnapshotsUnread = true
		w.bad("%v", err)
		return nil
	}
	w.rep.InternalSnapshots = snapshots
	w.ref(w.SnapshotsOff, n, useSnapshotTable, 0, "header snapshot table")
	for i, s := range snapshots {
		what := fmt.Sprintf("snapshot %d L1 table", i)
		switch {
		case w.DataFile():
			w.bad("%s: with a data file", what)
		case s.L1Off&uint64(w.clusterSize()-1) != 0 || uint64(s.L1Entries)*8 > maxTable:
			w.bad("%s: %d entries at %#x", what, s.L1Entries, s.L1Off)
			continue
		}
		if err := w.walkL1(s.L1Off, int64(s.L1Entries), useSnapshotL1, what); err != nil {
			return err
		}
	}
	return nil
}

// readSnapshots reads the snapshot table, and returns its length in bytes, too.
func (h *Header) readSnapshots(f *file) ([]Snapshot, int64, error) {
	be := binary.BigEndian
	var list []Snapshot
	at := int64(h.SnapshotsOff)
	for i := range h.Snapshots {
		at = (at + 7) / 8 * 8
		b, err := f.padded(at, 40)
		if err != nil {
			return nil, 0, err
		}
		if at+40 > f.size {
			return nil, 0, fmt.Errorf("snapshot %d at %#x is beyond the end of the file", i, at)
		}
		s := Snapshot{L1Off: be.Uint64(b), L1Entries: be.Uint32(b[8:]), DiskSize: h.VirtualSize}
		idLen, nameLen := int64(be.Uint16(b[12:])), int64(be.Uint16(b[14:]))
		extra := int64(be.Uint32(b[36:]))
		if extra > 1024 || at-int64(h.SnapshotsOff) > maxTable {
			return nil, 0, fmt.Errorf("snapshot %d at %#x has %d bytes of extra data", i, at, extra)
		}
		if h.Version == 3 && extra < 16 {
			return nil, 0, fmt.Errorf("snapshot %d at %#x has only %d bytes of extra data", i, at, extra)
		}
		rest, err := f.padded(at+40, extra+idLen+nameLen)
		if err != nil {
			return nil, 0, err
		}
		if extra >= 16 {
			s.DiskSize = be.Uint64(rest[8:])
		}
		s.ID, s.Name = string(rest[extra:extra+idLen]), string(rest[extra+idLen:])
		list = append(list, s)
		at += 40 + int64(len(rest))
	}
	return list, at - int64(h.SnapshotsOff), nil
}

// walkBitmaps reads the bitmap directory and the tables. qcow2 spec, "Bitmaps".
func (w *walker) walkBitmaps() error {
	if w.Bitmaps == 0 || !w.ref(w.BitmapDirOff, int64(w.BitmapDirLen), useBitmapDir, 0, "bitmap directory") {
		return nil
	}
	be := binary.BigEndian
	dir, err := w.padded(int64(w.BitmapDirOff), int64(w.BitmapDirLen))
	if err != nil {
		return err
	}
	for i := range w.Bitmaps {
		if len(dir) < 24 {
			w.bad("bitmap directory ends before entry %d", i)
			return nil
		}
		tableOff, entries := be.Uint64(dir), int64(be.Uint32(dir[8:]))
		flags, nameLen, extra := be.Uint32(dir[12:]), int64(be.Uint16(dir[18:])), int64(be.Uint32(dir[20:]))
		length := (24 + nameLen + extra + 7) / 8 * 8
		if flags>>3 != 0 || dir[16] != 1 || nameLen == 0 || dir[17] > 63 {
			w.bad("bitmap directory entry %d: flags %#x, type %d, granularity bits %d, name of %d bytes", i, flags, dir[16],
				dir[17], nameLen)
		}
		if length > int64(len(dir)) {
			w.bad("bitmap directory entry %d is longer than the directory", i)
			return nil
		}
		dir = dir[length:]
		what := fmt.Sprintf("bitmap %d", i)
		if tableOff&uint64(w.clusterSize()-1) != 0 || entries*8 > maxTable {
			w.bad("%s: table of %d entries at %#x", what, entries, tableOff)
			continue
		}
		if !w.ref(tableOff, entries*8, useBitmapTable, 0, what+" table") {
			continue
		}
		table, err := w.clipped(int64(tableOff), entries*8)
		if err != nil {
			return err
		}
		for j := 0; j+8 <= len(table); j += 8 {
			e := be.Uint64(table[j:])
			off := e & offsetMask
			switch {
			case e&bitmapReserved != 0 || e&1 != 0 && off != 0:
				w.bad("%s table entry %d is %#x: reserved bits", what, j/8, e)
			case off&uint64(w.clusterSize()-1) != 0:
				w.bad("%s table entry %d is %#x: misaligned", what, j/8, e)
			case off != 0:
				w.ref(off, w.clusterSize(), useBitmapData, 0, what+" table entry")
			}
		}
	}
	if len(dir) != 0 {
		w.bad("bitmap directory has %d bytes after its last entry", len(dir))
	}
	return nil
}

// compare sets the refcounts and flags beside the references.
func (w *walker) compare() {
	perBlock := uint64(w.clusterSize()*8) >> w.RefcountOrder
	for c := range w.refs {
		stored, refs := w.stored[c], uint64(w.refs[c])
		switch {
		case stored == refs:
		case stored > refs && int64(c) == w.n && refs == 0:
			w.rep.PastEnd++
		case stored > refs:
			w.find(&w.rep.Leaks, "leak: cluster %d refcount %d references %d", c, stored, refs)
		default:
			more := ""
			if off, ok := w.blank[uint64(c)/perBlock]; ok {
				more = fmt.Sprintf(" (I3: refcount block at %#x is all zeros)", off)
			}
			w.find(&w.rep.TooLow, "I1: cluster %d, %s, refcount %d references %d%s", c, w.uses[c], stored, refs, more)
		}
	}
	for _, f := range w.copied {
		stored, refs := w.stored[f.cluster], w.refs[f.cluster]
		one := stored == 1 && refs == 1
		if f.set == one {
			continue
		}
		what := fmt.Sprintf("L2 entry of guest %#x", f.where)
		if f.l1 {
			what = fmt.Sprintf("L1 entry %d", f.where)
		}
		if f.set {
			w.find(&w.rep.CopiedWrong, "I7: %s has COPIED, cluster %d has refcount %d references %d", what, f.cluster, stored, refs)
		} else {
			w.find(&w.rep.CopiedMissing, "lost COPIED: %s, cluster %d", what, f.cluster)
		}
	}
}

// subclusterBits returns the 32 allocation and 32 zero bits of an entry's second word.
func subclusterBits(sub uint64) (alloc, zero uint32) { return uint32(sub), uint32(sub >> 32) }

// runLength returns how many of the bits of mask from i on equal bit i, up to n bits in all.
func runLength(mask uint32, i, n uint) uint {
	m := mask >> i
	if m&1 != 0 {
		m = ^m
	}
	return min(uint(bits.TrailingZeros32(m)), n-i)
}
