package qcow2

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
)

// Bits of table entries that mean nothing and must be zero. qcow2 spec, "L1 table entry", "Standard Cluster
// Descriptor", "Refcount table entry" and "Bitmap table".
const (
	l1Reserved          = 0x7f000000000001ff
	l2Reserved          = 0x3f000000000001fe
	refTableReserved    = 0x1ff
	bitmapTableReserved = 0xff000000000001fe
	bitmapTableAllOnes  = 1 // without an offset: all bits of the cluster are set
)

// checker walks the tables of an image as they stand in its file, counts the references to every host
// cluster, and compares them with the refcounts and the COPIED flags. It shares no state with the
// allocator and the mapper, so that it can contradict them. Nothing it allocates is sized by a claim: the
// counts cost what is referenced, tables are read in pieces.
//
// It counts as qemu-img check counts, so that the totals of both can be compared. In particular an entry
// that is out of place is not a reference, and a table that several L1 tables share counts once for each.
type checker struct {
	entryRules
	ctx   context.Context
	h     *hostFile
	hdr   *header
	size  uint64 // of the file in bytes, rounded up to a sector
	most  uint64 // largest refcount
	refs  *refWords
	res   *CheckResult
	found func(Finding)

	refTable  *table     // nil if it cannot be used
	snapshots []snapshot // of the snapshot table
	snapBytes uint64     // bytes of the snapshot table
	// snapBeyond is the clusters of the snapshot table if it ends past the end of the file: they are not counted.
	snapBeyond clusterRun
	l2         []l2Ref // the L2 tables, by host offset
	pending    []l2Ref // not yet merged into l2
	bitmaps    []span  // the tables of bitmaps
	misplaced  []l2Ref // what L1 entries name that no L2 table can be: not aligned, or the header; see misplacedBytes

	unusable    bool // a refcount block, or the table, cannot be used: to be repaired, it must be replaced
	badBitmaps  bool // the bitmap directory or a bitmap's table is not in the file
	missing     bool // a cluster with references has no refcount block
	uncounted   bool // references are not known: nothing may be concluded from the counts
	copiedWrong bool // a COPIED flag contradicts a refcount
	structural  bool // an entry must be mended, beyond counts and COPIED

	shared map[sharedTable]bool // tables in clusters that are something else too
	split  map[uint64]bool      // L2 tables, by host offset, that several active L1 entries name, and can be right for one alone
	over   map[uint64]uint64    // references that refs could not count, by cluster; at most maxOver clusters

	cutExtra bool // take snapshots with too much extra data for what a repair makes of them

	endOnly bool   // count nothing, but find the end of what is referred to
	end     uint64 // with endOnly: the host offset behind the last cluster that is

	progress func(done, total int64)
	done     int64
	total    int64
}

// newChecker returns a checker of the image with header h in host, a file of size bytes.
func newChecker(ctx context.Context, host *hostFile, h *header, size int64, o *CheckOptions) *checker {
	g := h.geometry()
	c := &checker{
		entryRules: entryRules{geometry: g, version2: h.version < 3, external: h.hasDataFile()},
		ctx:        ctx,
		h:          host,
		hdr:        h,
		size:       (uint64(max(size, 0)) + sectorSize - 1) &^ (sectorSize - 1),
		most:       maxRefcount(g.refcountOrder),
		refs:       newRefWords(),
		shared:     make(map[sharedTable]bool),
		split:      make(map[uint64]bool),
		over:       make(map[uint64]uint64),
		res:        &CheckResult{TotalClusters: int64(g.clusters(h.virtualSize()))},
		found:      o.Found,
		cutExtra:   o.Repair == RepairAll,
		progress:   o.Progress,
	}
	return c
}

// find counts a finding and reports it.
func (c *checker) find(f Finding) {
	f.Times = max(f.Times, 1)
	c.res.count(f)
	if c.found != nil {
		c.found(f)
	}
}

// part returns a finding about a part of the image that is no table entry.
func part(kind FindingKind, what string, hostOff uint64) Finding {
	return Finding{Kind: kind, Part: what, HostOff: int64(hostOff), GuestOff: noOffset}
}

// step counts n bytes of tables as done.
func (c *checker) step(n uint64) error {
	c.done += int64(n)
	if c.progress != nil {
		c.progress(min(c.done, c.total), c.total)
	}
	return c.ctx.Err()
}

// walk makes the whole check. An error means that it ended early: it is one of the host, or of the context.
func (c *checker) walk() error {
	if err := c.countAll(); err != nil || c.uncounted {
		return err
	}
	if err := c.compare(); err != nil {
		return err
	}
	if c.copiedWrong {
		return c.compareCopied()
	}
	return nil
}

// countAll counts every reference that there is. qcow2 spec, "Host cluster management".
func (c *checker) countAll() error {
	if err := c.readTables(); err != nil || c.uncounted {
		return err
	}
	c.refer(0, c.clusterSize, 1, 0, part(FindingBeyondEnd, "header", 0))
	steps := []func() error{c.walkActive, c.walkSnapshots, c.walkTables, c.walkSmall, c.walkBitmaps, c.walkBlocks, c.findShared}
	for _, step := range steps {
		if err := step(); err != nil || c.uncounted {
			return err
		}
	}
	return nil
}

// readTables reads the snapshot table and the refcount table.
func (c *checker) readTables() error {
	if err := c.readSnapshots(); err != nil || c.uncounted {
		return err
	}
	// A table without an entry, or past the end of any file, has no refcount block. Both must be replaced.
	off, n := c.hdr.refTableOff, c.hdr.refTableBytes()
	empty := c.offsetInCluster(off) == 0 && (n == 0 || off >= maxHostOff && off <= maxFileEnd-n)
	if err := c.hdr.checkRefcountTable(Limits{}); err != nil {
		c.unusable = true
		if !empty {
			c.find(part(FindingRefcountTable, "refcount table", c.hdr.refTableOff))
			return nil
		}
		c.refTable = newTable(0)
		return nil
	}
	t, err := readTable(c.h, c.hdr.refTableOff, c.hdr.refTableBytes()/8, c.size)
	if err != nil {
		return fmt.Errorf("refcount table: %w", err)
	}
	c.refTable = t
	return nil
}

// readSnapshots reads the snapshot table as it stands. What lies past the end of the file is zeros, as in
// any other table. qcow2 spec, "Snapshots".
func (c *checker) readSnapshots() error {
	h := c.hdr
	bad := func() {
		c.uncounted, c.structural = true, true
		c.find(part(FindingSnapshotTable, "snapshot table", h.snapshotsOff))
	}
	many := h.nbSnapshots > maxSnapshots
	if many {
		bad() // a repair keeps those that are there
	} else if err := h.checkSnapshotTable(Limits{Snapshots: maxSnapshots}); err != nil {
		// Without snapshots a place beyond every file is nothing to QEMU. Other places are, to us all.
		c.structural = true
		if h.nbSnapshots > 0 || c.offsetInCluster(h.snapshotsOff) != 0 || h.snapshotsOff > math.MaxInt64 {
			bad()
		}
		return nil
	}
	if h.nbSnapshots == 0 || h.checkTableOffset("", h.snapshotsOff, minSnapshotEntry) != nil {
		return nil
	}
	t := &tableReader{what: "snapshot table", start: h.snapshotsOff, off: h.snapshotsOff, limit: maxSnapshotBytes, cutExtra: c.cutExtra}
	t.r = bufio.NewReaderSize(&paddedReader{c.h.s, int64(c.size), int64(h.snapshotsOff)}, tableReadSize)
	for i := range min(h.nbSnapshots, maxSnapshots) {
		if t.off >= c.size {
			c.blankSnapshots(t, uint64(h.nbSnapshots-i), many)
			break
		}
		s, err := readSnapshotEntry(t, h)
		var corrupt *CorruptError
		switch {
		case many && (errors.As(err, &corrupt) || err == nil && s.id == ""):
			return nil
		case errors.As(err, &corrupt):
			bad()
			return nil
		case err != nil:
			return err
		}
		if !many && !c.version2 && len(s.extra) < snapExtraDiskSize+8 {
			c.structural = true
			c.find(Finding{Kind: FindingSnapshotEntry, Part: "snapshot table", HostOff: int64(s.entryOff), GuestOff: noOffset,
				Found: uint64(len(s.extra)), Expected: snapExtraDiskSize + 8})
		}
		if s.cut > 0 {
			c.structural = true
			c.find(Finding{Kind: FindingSnapshotExtra, Part: "snapshot table", HostOff: int64(s.entryOff), GuestOff: noOffset,
				Found: uint64(len(s.extra)) + uint64(s.cut), Expected: maxSnapshotExtra})
		}
		c.snapshots = append(c.snapshots, s)
	}
	c.snapBytes = t.off - t.start
	return nil
}

// blankSnapshots looks at the last n entries of the snapshot table t, which are past the end of the file: each is
// zeros, and needs no more than to be counted.
func (c *checker) blankSnapshots(t *tableReader, n uint64, many bool) {
	t.off = (t.off+7)&^7 + n*minSnapshotEntry
	if many {
		return
	}
	c.structural = true
	if !c.version2 {
		c.find(Finding{Kind: FindingSnapshotEntry, Part: "snapshot table", HostOff: int64(t.off - n*minSnapshotEntry), GuestOff: noOffset,
			Expected: snapExtraDiskSize + 8, Times: int64(n)})
	}
}

// paddedReader reads a file of size bytes from off on, and zeros past its end without an end.
type paddedReader struct {
	r    io.ReaderAt
	size int64
	off  int64
}

// Read is io.Reader.
func (p *paddedReader) Read(b []byte) (int, error) {
	if err := readPadded(p.r, p.size, b, p.off); err != nil {
		return 0, err
	}
	p.off += int64(len(b))
	return len(b), nil
}

// refer counts times references to every cluster that [off, off+n) touches, and adds flags to their words. A
// range that ends past the end of the file by a cluster or more is the finding f instead, and refer
// reports false.
func (c *checker) refer(off, n, times uint64, flags uint16, f Finding) bool {
	if n == 0 {
		return true
	}
	if !c.inside(off, n) {
		f.Kind, f.Times = FindingBeyondEnd, int64(times)
		c.find(f)
		return false
	}
	c.referAll(off, n, times, flags, f)
	return true
}

// referAll is refer of a range that lies inside, or whose last cluster does in part.
func (c *checker) referAll(off, n, times uint64, flags uint16, f Finding) {
	if c.endOnly {
		c.end = max(c.end, c.clusterStart(off+n-1)+c.clusterSize)
		return
	}
	for ci := off >> c.clusterBits; ci <= (off+n-1)>>c.clusterBits; ci++ {
		if over := c.refs.add(ci, times, flags, c.most); over > 0 {
			c.addOver(ci, over)
			c.find(Finding{Kind: FindingOverflow, Part: f.Part, HostOff: int64(ci << c.clusterBits), GuestOff: f.GuestOff,
				Found: c.most, Expected: c.most + over, Times: int64(over)})
		}
	}
}

// inside reports whether [off, off+n), n > 0, ends within the file or past its end by less than a cluster:
// the last cluster may be short.
func (c *checker) inside(off, n uint64) bool {
	limit := c.size + c.clusterSize
	return off < limit && n < limit-off
}

// words calls f with every non-zero word of the n at host offset off, and its index.
func (c *checker) words(off, n uint64, f func(i, word uint64) error) error {
	return c.h.words(off, n, c.size, func(i, w uint64) error {
		if i%(readPiece/8) == 0 {
			if err := c.ctx.Err(); err != nil {
				return err
			}
		}
		return f(i, w)
	})
}

// walkActive looks at the active L1 table.
func (c *checker) walkActive() error {
	h := c.hdr
	if h.l1Size == 0 {
		return nil
	}
	c.refer(h.l1Off, h.l1Bytes(), 1, 0, part(FindingBeyondEnd, "active L1 table", h.l1Off))
	err := c.words(h.l1Off, uint64(h.l1Size), func(i, w uint64) error {
		c.l1Entry(w, h.l1Off+8*i, i, 1, 0)
		return nil
	})
	if err != nil {
		return fmt.Errorf("active L1 table: %w", err)
	}
	return nil
}

// span is a host range that some of a list of ranges cover.
type span struct {
	lo, hi uint64
	times  uint64 // how many cover it
	one    int    // index of one that does
}

// overlay cuts ranges into the pieces in which the same of them overlap. A range that ends where it begins
// covers nothing.
func overlay(ranges []span) []span {
	type edge struct {
		at    uint64
		index int
		begin bool
	}
	var edges []edge
	for i, r := range ranges {
		if r.lo < r.hi {
			edges = append(edges, edge{r.lo, i, true}, edge{r.hi, i, false})
		}
	}
	slices.SortStableFunc(edges, func(a, b edge) int { return cmp.Compare(a.at, b.at) })
	var out []span
	open, one := uint64(0), -1 // ranges that cover the place, and the one of them that reaches furthest
	for i, e := range edges {
		if e.begin {
			open++
			if one < 0 || ranges[one].hi < ranges[e.index].hi {
				one = e.index
			}
		} else if open--; open == 0 {
			one = -1
		}
		if open > 0 && i+1 < len(edges) && edges[i+1].at > e.at {
			out = append(out, span{e.at, edges[i+1].at, open, one})
		}
	}
	return out
}

// walkSnapshots looks at the L1 tables of the snapshots. What several snapshots share is looked at once, and
// counted for each, so that the time depends on what is in the file.
func (c *checker) walkSnapshots() error {
	if c.external && len(c.snapshots) > 0 {
		c.find(part(FindingSnapshotDataFile, "snapshot table", c.hdr.snapshotsOff))
	}
	var clusters, entries []span
	for i := range c.snapshots {
		s := &c.snapshots[i]
		n := uint64(s.l1Size) * l1EntrySize
		if c.offsetInCluster(s.l1Off) != 0 || n > maxL1Bytes {
			c.structural = true
			c.find(Finding{Kind: FindingSnapshotL1, Part: "snapshot table", HostOff: int64(s.entryOff), GuestOff: noOffset, Found: s.l1Off})
			clusters, entries = append(clusters, span{}), append(entries, span{})
			continue
		}
		e := span{lo: s.l1Off, hi: s.l1Off + n}
		r := span{lo: e.lo, hi: c.clusterStart(e.hi + c.clusterSize - 1)}
		if n > 0 && !c.inside(s.l1Off, n) {
			c.structural = true
			c.find(part(FindingBeyondEnd, "snapshot L1 table", s.l1Off))
			r = span{}
		}
		if n == 0 {
			r, e = span{}, span{}
		}
		clusters, entries = append(clusters, r), append(entries, e)
	}
	for _, r := range overlay(clusters) {
		c.referAll(r.lo, r.hi-r.lo, r.times, 0, part(FindingBeyondEnd, "snapshot L1 table", r.lo))
	}
	for _, r := range overlay(entries) {
		base := c.snapshots[r.one].l1Off
		err := c.words(r.lo, (r.hi-r.lo)/8, func(i, w uint64) error {
			at := r.lo + 8*i
			c.l1Entry(w, at, (at-base)/8, 0, r.times)
			return nil
		})
		if err != nil {
			return fmt.Errorf("snapshot L1 table: %w", err)
		}
	}
	return nil
}

// walkSmall counts the tables that are one range each.
func (c *checker) walkSmall() error {
	h := c.hdr
	if !c.refer(h.snapshotsOff, c.snapBytes, 1, 0, part(FindingBeyondEnd, "snapshot table", h.snapshotsOff)) {
		c.structural = true
		c.snapBeyond = clusterRun{first: h.snapshotsOff >> c.clusterBits, n: c.clusters(c.offsetInCluster(h.snapshotsOff) + c.snapBytes)}
	}
	if c.refTable != nil && !c.refer(h.refTableOff, h.refTableBytes(), 1, 0, part(FindingBeyondEnd, "refcount table", h.refTableOff)) {
		c.unusable = true
	}
	if h.crypto != nil && h.cryptMethod == cryptLUKS {
		c.refer(h.crypto.off, h.crypto.length, 1, 0, part(FindingBeyondEnd, "crypto header", h.crypto.off))
	}
	return nil
}

// walkBitmaps looks at the bitmap directory and the bitmap tables. qcow2 spec, "Bitmaps".
func (c *checker) walkBitmaps() error {
	h := c.hdr
	bad := func() {
		c.uncounted, c.structural = true, true
		f := part(FindingBitmapDirectory, "bitmap directory", 0)
		if h.bitmaps != nil {
			f.HostOff = int64(h.bitmaps.dirOff)
		}
		c.find(f)
	}
	if h.bitmaps == nil {
		if h.checkBitmaps(Limits{}) != nil {
			bad() // the extension has the wrong length
		}
		return nil
	}
	if !c.refer(h.bitmaps.dirOff, h.bitmaps.dirSize, 1, 0, part(FindingBeyondEnd, "bitmap directory", h.bitmaps.dirOff)) {
		c.badBitmaps, c.structural = true, true
	}
	entries, err := readBitmapDirectory(c.h.s, int64(c.size), h, Limits{MetadataBytes: maxBitmapDirBytes})
	if herr := h.checkBitmaps(Limits{}); herr != nil {
		err = herr
	}
	if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrUnsupported) {
		bad()
		return nil
	}
	if err != nil {
		return err
	}
	for i := range entries {
		b := &entries[i]
		if !c.refer(b.tableOff, uint64(b.tableSize)*8, 1, 0, part(FindingBeyondEnd, "bitmap table", b.tableOff)) {
			c.badBitmaps, c.structural = true, true
		}
		c.bitmaps = append(c.bitmaps, span{lo: b.tableOff, hi: b.tableOff + uint64(b.tableSize)*8})
		err := c.words(b.tableOff, uint64(b.tableSize), func(i, w uint64) error {
			f := Finding{Part: "bitmap table", HostOff: int64(b.tableOff + 8*i), GuestOff: noOffset, Found: w}
			off := w & offsetMask
			if badBitmapEntry(w, c.clusterSize) {
				f.Kind = FindingBitmapTable
				c.structural = true
				c.find(f)
			} else if off != 0 && !c.refer(off, c.clusterSize, 1, 0, f) {
				c.structural = true
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("bitmap table: %w", err)
		}
	}
	return nil
}

// badBitmapEntry reports whether w cannot be an entry of a bitmap table. qcow2 spec, "Bitmap table".
func badBitmapEntry(w, clusterSize uint64) bool {
	off := w & offsetMask
	return w&bitmapTableReserved != 0 || off != 0 && (w&bitmapTableAllOnes != 0 || off&(clusterSize-1) != 0)
}

// walkBlocks counts the refcount blocks. One whose entry is impossible, or whose cluster is not its own, is
// not fit to be corrected in place.
func (c *checker) walkBlocks() error {
	if c.refTable == nil {
		return nil
	}
	end := max(c.clusters(c.size), c.refs.end())
	for k, chunk := range c.refTable.all() {
		for j, w := range chunk {
			if w != 0 {
				c.walkBlock(k<<tableChunkBits+uint64(j), w, end)
			}
		}
	}
	return nil
}

// walkBlock counts the refcount block of refcount table entry i, which is w. The clusters of the file are those
// before end.
func (c *checker) walkBlock(i, w, end uint64) {
	f := Finding{Kind: FindingRefcountBlock, Part: "refcount table", HostOff: int64(c.hdr.refTableOff + 8*i), GuestOff: noOffset, Found: w}
	off := w &^ refTableReserved
	if w&refTableReserved != 0 || c.offsetInCluster(off) != 0 || off>>c.clusterBits >= end {
		c.unusable = true
		c.find(f)
		return
	}
	if c.refs.count(off>>c.clusterBits) != 0 {
		c.unusable = true // the count itself may be at its most already
	}
	c.refer(off, c.clusterSize, 1, 0, f)
	if n := c.refs.count(off >> c.clusterBits); n != 1 && !c.endOnly {
		f.Found, f.Expected = n, 1
		c.unusable = true
		c.find(f)
	}
}
