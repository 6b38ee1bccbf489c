package qcow2

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
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
	l2        []l2Ref    // the L2 tables, by host offset
	pending   []l2Ref    // not yet merged into l2
	misplaced []l2Ref    // what L1 entries name that no L2 table can be: not aligned, or the header; see misplacedBytes

	unusable    bool // a refcount block, or the table, cannot be used: to be repaired, it must be replaced
	badBitmaps  bool // the bitmap directory or a bitmap's table is not in the file
	missing     bool // a cluster with references has no refcount block
	uncounted   bool // references are not known: nothing may be concluded from the counts
	copiedWrong bool // a COPIED flag contradicts a refcount
	structural  bool // an entry must be mended, beyond counts and COPIED

	endOnly bool   // count nothing, but find the end of what is referred to
	end     uint64 // with endOnly: the host offset behind the last cluster that is

	progress func(done, total int64)
	done     int64
	total    int64
}

// l2Ref is an L2 table that L1 entries name.
type l2Ref struct {
	off      uint64 // host offset
	l1Index  uint32 // of one of the entries
	active   uint32 // number of entries in the active L1 table
	inactive uint32 // number of entries in those of snapshots
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
		res:        &CheckResult{TotalClusters: int64(g.clusters(h.virtualSize()))},
		found:      o.Found,
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
	steps := []func() error{c.walkActive, c.walkSnapshots, c.walkTables, c.walkSmall, c.walkBitmaps, c.walkBlocks}
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
	t := &tableReader{what: "snapshot table", start: h.snapshotsOff, off: h.snapshotsOff, limit: maxSnapshotBytes}
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

// l1Entry looks at entry w at host offset at, which active L1 tables and those of snapshots hold so often
// at index i.
func (c *checker) l1Entry(w, at, i, active, inactive uint64) {
	f := Finding{Part: "active L1 table", HostOff: int64(at), GuestOff: int64(i << (c.clusterBits + c.l2Bits)), Found: w, Expected: c.mendL1(w),
		Times: int64(active + inactive)}
	if active == 0 {
		f.Part = "snapshot L1 table"
	}
	if w&l1Reserved != 0 {
		f.Kind = FindingReserved
		c.structural = true
		c.find(f)
	}
	off := w & offsetMask
	if off == 0 && active+inactive > 0 && w&l1Reserved == 0 && w&flagCopied == 0 {
		return
	}
	flags := uint16(0)
	if active > 0 && off != 0 {
		flags = refPlain
		if w&flagCopied != 0 {
			flags = refCopied
		}
	}
	inside := c.refer(off, c.clusterSize, active+inactive, flags, f)
	aligned := c.offsetInCluster(off) == 0
	if !inside || !aligned {
		c.structural = true
		c.copiedWrong = c.copiedWrong || flags != 0
	}
	if !aligned {
		f.Kind = FindingMisaligned
		c.find(f)
	}
	table := l2Ref{off: off, l1Index: uint32(i), active: uint32(active), inactive: uint32(inactive)}
	switch {
	case !inside: // an L2 table past the end of the file is all zeros
	case !aligned || off == 0:
		if uint64(len(c.misplaced)+1)<<c.clusterBits <= misplacedBytes {
			c.misplaced = append(c.misplaced, table)
		}
	default:
		c.addTable(table)
	}
}

// misplacedBytes bounds the misplaced L2 tables that are looked at, in bytes. No reader takes what they hold, so
// that it matters only for totals like those of qemu-img check; but while there can be no more aligned tables
// than fit into the file, an L1 table of 32 MiB can name four million that are not.
const misplacedBytes = 64 << 20

// mendL1 returns what a repair makes of an L1 entry: one without reserved bits, or none where there is no
// L2 table at its offset.
func (c *checker) mendL1(w uint64) uint64 {
	off := w & offsetMask
	if off == 0 || c.offsetInCluster(off) != 0 || !c.inside(off, c.clusterSize) {
		return 0
	}
	return w &^ l1Reserved
}

// addTable notes an L2 table.
func (c *checker) addTable(r l2Ref) {
	c.pending = append(c.pending, r)
	if len(c.pending) >= max(len(c.l2), 1<<16) {
		c.mergeTables()
	}
}

// mergeTables brings the pending L2 tables into order, each once.
func (c *checker) mergeTables() {
	byOffset := func(a, b l2Ref) int { return cmp.Compare(a.off, b.off) }
	slices.SortStableFunc(c.pending, byOffset)
	merged := make([]l2Ref, 0, len(c.l2)+len(c.pending))
	a, b := c.l2, c.pending
	for len(a) > 0 || len(b) > 0 {
		from := &b
		if len(b) == 0 || len(a) > 0 && a[0].off <= b[0].off {
			from = &a
		}
		r := (*from)[0]
		*from = (*from)[1:]
		if n := len(merged); n > 0 && merged[n-1].off == r.off {
			if merged[n-1].active == 0 {
				merged[n-1].l1Index = r.l1Index
			}
			merged[n-1].active += r.active
			merged[n-1].inactive += r.inactive
			continue
		}
		merged = append(merged, r)
	}
	c.l2, c.pending = merged, c.pending[:0]
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

// tableBatch is a number of L2 tables that are read together.
type tableBatch struct {
	refs []l2Ref
	buf  []byte // their content, end to end
	err  error
	done chan struct{} // closed when buf is filled
}

// walkTables looks at all L2 tables, each once, in the order of the file. They are read ahead in large
// pieces, by several goroutines, as far as batches go.
func (c *checker) walkTables() error {
	c.mergeTables()
	c.pending = nil
	c.total = int64(uint64(len(c.l2)+len(c.misplaced)) << c.clusterBits)
	if c.endOnly && c.total > maxEndSearch {
		return errTooLong
	}
	if err := c.eachTable(c.l2, c.walkTable); err != nil {
		return err
	}
	return c.eachTable(c.misplaced, c.walkTable)
}

// errTooLong says that finding the end takes longer than it is worth.
var errTooLong = errors.New("too many L2 tables")

// eachTable reads the given L2 tables and calls f with each, in order.
func (c *checker) eachTable(refs []l2Ref, f func(r l2Ref, table []byte) error) error {
	perBatch := max(readPiece>>c.clusterBits, 1)
	workers := min(runtime.GOMAXPROCS(0)+1, 4)
	if len(refs) <= perBatch {
		workers = 1
	}
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	jobs := make(chan *tableBatch)
	queue := make(chan *tableBatch, workers)
	free := make(chan []byte, workers+2)
	go func() {
		defer close(jobs)
		defer close(queue)
		for len(refs) > 0 {
			n := min(perBatch, len(refs))
			b := &tableBatch{refs: refs[:n], done: make(chan struct{})}
			refs = refs[n:]
			select {
			case b.buf = <-free:
			default:
				b.buf = make([]byte, perBatch<<c.clusterBits)
			}
			select {
			case queue <- b:
			case <-ctx.Done():
				return
			}
			select {
			case jobs <- b:
			case <-ctx.Done():
				b.err = ctx.Err()
				close(b.done)
				return
			}
		}
	}()
	for range workers {
		go func() {
			for b := range jobs {
				b.err = c.readBatch(b)
				close(b.done)
			}
		}()
	}
	for b := range queue {
		<-b.done
		if b.err != nil {
			return fmt.Errorf("L2 table: %w", b.err)
		}
		for i, r := range b.refs {
			if err := f(r, b.buf[i<<c.clusterBits:][:c.clusterSize]); err != nil {
				return err
			}
		}
		if err := c.step(uint64(len(b.refs)) << c.clusterBits); err != nil {
			return err
		}
		select {
		case free <- b.buf:
		default:
		}
	}
	return c.ctx.Err()
}

// readBatch reads the tables of a batch: neighbours in one read.
func (c *checker) readBatch(b *tableBatch) error {
	for i := 0; i < len(b.refs); {
		k := i + 1
		for k < len(b.refs) && b.refs[k].off == b.refs[k-1].off+c.clusterSize {
			k++
		}
		if err := c.h.readFull(b.buf[i<<c.clusterBits:k<<c.clusterBits], b.refs[i].off); err != nil {
			return err
		}
		i = k
	}
	return nil
}

// walkTable looks at the entries of an L2 table. Nearly all of them are nothing, or plain clusters in their
// place, which the loop does by itself. qcow2 spec, "Cluster mapping".
func (c *checker) walkTable(r l2Ref, p []byte) error {
	next := uint64(0) // where the cluster behind the last one would be
	times := uint64(r.active) + uint64(r.inactive)
	guest := uint64(r.l1Index) << (c.clusterBits + c.l2Bits)
	if c.extendedL2 || c.external || c.endOnly {
		for i := uint64(0); i < 1<<c.l2Bits; i++ {
			b := p[i<<c.l2EntryBits:]
			e := l2Entry{word: binary.BigEndian.Uint64(b)}
			if c.extendedL2 {
				e.bitmap = binary.BigEndian.Uint64(b[8:])
			}
			if e != (l2Entry{}) {
				next = c.entry(r, e, i, guest+i<<c.clusterBits, next)
			}
		}
		return nil
	}
	plain := offsetMask &^ (c.clusterSize - 1) // bits of an entry in its place, but for the flags
	limit := uint64(min(c.most, refCountMask-1))
	k, words := ^uint64(0), (*[refChunkWords]uint16)(nil)
	fragments := int64(0)
	allocated := int64(0)
	for i := 0; i < len(p); i += 8 {
		w := binary.BigEndian.Uint64(p[i:])
		if w == 0 {
			continue
		}
		off := w & plain
		if off == 0 || off >= c.size || w&^(plain|flagCopied|flagZero) != 0 || w&flagZero != 0 && c.version2 {
			next = c.entry(r, l2Entry{word: w}, uint64(i)/8, guest+uint64(i)/8<<c.clusterBits, next)
			continue
		}
		allocated++
		if next != 0 && off != next {
			fragments++
		}
		next = off + c.clusterSize
		flag := uint16(0)
		if r.active > 0 {
			flag = refPlain
			if w&flagCopied != 0 {
				flag = refCopied
			}
		}
		ci := off >> c.clusterBits
		if ci>>refChunkBits != k || words == nil {
			k = ci >> refChunkBits
			words = c.refs.ensure(k).words
		}
		if words != nil {
			word := &words[ci&(refChunkWords-1)]
			if n := uint64(*word&refCountMask) + times; n <= limit {
				*word = *word&^refCountMask | uint16(n) | flag
				if next < c.size {
					here := words[ci&(refChunkWords-1)+1:]
					here = here[:min(uint64(len(here)), (c.size-1-next)>>c.clusterBits+1)]
					k := refsInRow(p[i+8:], w, c.clusterSize, here, uint16(times), uint16(limit-times), flag)
					allocated += int64(k)
					next += uint64(k) << c.clusterBits
					i += 8 * k
				}
				continue
			}
		}
		at := Finding{Part: "L2 table", HostOff: int64(r.off) + int64(i), GuestOff: int64(guest + uint64(i)/8<<c.clusterBits)}
		c.refer(off, c.clusterSize, times, flag, at)
		words = nil
	}
	c.res.AllocatedClusters += allocated * int64(r.active)
	c.res.FragmentedClusters += fragments * int64(r.active)
	return nil
}

// refsInRow counts the entries of p that go on behind entry w, each one cluster further and otherwise the same, as
// long as words, of the clusters behind that of w, count no more than most references. It adds times references and
// flag to those, and returns how many there are: in most tables nearly all. The sum fits a word.
func refsInRow(p []byte, w, clusterSize uint64, words []uint16, times, most, flag uint16) int {
	n := min(len(p)/8, len(words))
	for i := range n {
		w += clusterSize
		word := words[i]
		if binary.BigEndian.Uint64(p[8*i:]) != w || word&refCountMask > most {
			return i
		}
		words[i] = (word + times) | flag
	}
	return n
}

// entry looks at entry i of an L2 table, which maps guest. next is the host offset behind the cluster
// before, or 0; entry returns that behind its own.
func (c *checker) entry(r l2Ref, e l2Entry, i, guest, next uint64) uint64 {
	active, times := uint64(r.active), uint64(r.active)+uint64(r.inactive)
	mended := c.mendL2(e, guest)
	f := Finding{Part: "L2 table", HostOff: int64(r.off + i<<c.l2EntryBits), GuestOff: int64(guest), Found: e.word, Expected: mended.word,
		Times: int64(times)}
	find := func(k FindingKind) {
		f.Kind = k
		c.find(f)
	}
	if mended != e {
		c.structural = true
	}
	if e.word&flagCompressed != 0 {
		if e.word&flagCopied != 0 {
			find(FindingCompressed)
		}
		if c.external || e.bitmap != 0 {
			find(FindingCompressed)
			return next
		}
		off, n := c.compressed(e.word)
		c.refer(off, n, times, 0, f)
		c.res.AllocatedClusters += int64(active)
		c.res.CompressedClusters += int64(active)
		c.res.FragmentedClusters += int64(active) // none lies where a cluster would
		return next
	}
	if e.word&l2Reserved != 0 {
		find(FindingReserved)
	}
	if c.version2 && e.word&flagZero != 0 {
		find(FindingZeroFlag)
	}
	plainZero := c.external && !c.extendedL2 && e.word&flagZero != 0 && e.hostOff() == 0
	if !c.hasCluster(e) || plainZero {
		if e.bitmap&bitmapAllocated != 0 {
			f.Found, f.Expected = e.bitmap, mended.bitmap
			find(FindingSubclusters)
		}
		return next
	}
	off := e.hostOff()
	flag := uint16(0)
	if active > 0 && !c.external {
		flag = refPlain
		if e.word&flagCopied != 0 {
			flag = refCopied
		}
	}
	if c.external && active > 0 && e.word&flagCopied == 0 {
		c.copiedWrong = true
	}
	if e.bitmap>>32&e.bitmap != 0 {
		conflict := f
		conflict.Found, conflict.Expected = e.bitmap, mended.bitmap
		conflict.Kind = FindingSubclusters
		c.find(conflict)
	}
	if c.offsetInCluster(off) != 0 {
		find(FindingMisaligned)
	}
	c.res.AllocatedClusters += int64(active)
	if next != 0 && off != next {
		c.res.FragmentedClusters += int64(active)
	}
	next = off + c.clusterSize
	switch {
	case c.external:
		if off != guest && c.offsetInCluster(off) == 0 {
			find(FindingDataFilePlace)
		}
	case c.offsetInCluster(off) != 0 || !c.refer(off, c.clusterSize, times, flag, f):
		c.copiedWrong = c.copiedWrong || flag != 0
		if c.offsetInCluster(off) != 0 {
			c.refer(off, c.clusterSize, times, 0, f)
		}
	}
	return next
}

// mendL2 returns what a repair makes of the L2 entry e of guest, whatever the refcounts are. What can be read
// of it reads the same afterwards. What no reader accepts reads as zeros. Version 2 has no word for that: there it is
// nothing, and a repair puts a cluster of zeros in its place where there is a backing file; but a zero flag in
// version 2 is a reserved bit like others.
func (c *checker) mendL2(e l2Entry, guest uint64) l2Entry {
	zero := l2Entry{word: flagZero}
	switch {
	case c.version2:
		zero.word = 0
	case c.extendedL2:
		zero = l2Entry{bitmap: bitmapAllocated << 32}
	}
	if e.word&flagCompressed != 0 {
		off, n := c.compressed(e.word)
		if c.external || e.bitmap != 0 || !c.inside(off, n) {
			return zero
		}
		e.word &^= flagCopied
		return e
	}
	e.word &^= l2Reserved
	if c.extendedL2 || c.version2 {
		e.word &^= flagZero
	}
	if c.external && c.hasCluster(e) {
		// There is but one place where the cluster can be.
		e.word = e.word&^offsetMask | guest | flagCopied
	}
	off := e.hostOff()
	gone := c.offsetInCluster(off) != 0 || off != 0 && !c.external && !c.inside(off, c.clusterSize)
	if !c.extendedL2 {
		if gone {
			return zero
		}
		return e
	}
	if gone {
		e.word = 0
	}
	alloc, zeros := e.bitmap&bitmapAllocated, e.bitmap>>32
	if !c.hasCluster(e) {
		// What was to be read from the cluster reads as zeros: so does what lies past the end of the file.
		return l2Entry{bitmap: (zeros | alloc) << 32}
	}
	e.bitmap = zeros<<32 | alloc&^zeros
	return e
}

// walkSmall counts the tables that are one range each.
func (c *checker) walkSmall() error {
	h := c.hdr
	c.refer(h.snapshotsOff, c.snapBytes, 1, 0, part(FindingBeyondEnd, "snapshot table", h.snapshotsOff))
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
