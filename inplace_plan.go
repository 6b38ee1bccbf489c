package qcow2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
)

// inPlacePlan is the image that a file becomes. Behind the source, rounded up to clusters, stand, as host clusters:
//
//	table                 blocks                 l1             l2             moved               end
//	| refcount table ... | refcount blocks ... | L1 table ... | L2 tables ... | copied clusters ... |
//
// Ranges of the file in which nothing is in use have no refcount block, and ranges of the disk in which nothing is
// allocated no L2 table.
type inPlacePlan struct {
	g                             geometry
	runs                          []inPlaceRun // by guest clusters; those of copied clusters have their place
	used                          []inPlaceRun // those in the source's part of the file, by host clusters
	moved                         []movedCluster
	refTable, l1Table             *table
	table, blocks, l1, l2, copies uint64
	end                           uint64
	trailer                       []byte // last sector of the source, to be kept at the end; nil: none
	first                         []byte // first sector of the image
	footer                        inPlaceFooter
}

// makePlan plans the image for the source of c, which src describes.
func (c *inPlace) makePlan(src Layout) error {
	size, err := c.checkLayout(src)
	if err != nil {
		return err
	}
	if c.o.ClusterSize != 0 {
		return c.planWith(src, size, c.o.ClusterSize)
	}
	for clusterSize := defaultClusterSize; ; clusterSize /= 2 {
		err := c.planWith(src, size, clusterSize)
		var e *AlignError
		if !errors.As(err, &e) || e.always || clusterSize == 2*sectorSize {
			return err
		}
	}
}

// checkLayout returns the size of the disk in bytes.
func (c *inPlace) checkLayout(src Layout) (int64, error) {
	if src == nil {
		return 0, &OptionError{Option: "src", Value: nil, Reason: "the layout of the source is needed"}
	}
	size := src.Size()
	if size < 0 || size > math.MaxInt64-sectorSize {
		return 0, fmt.Errorf("%w: a disk of %d bytes", ErrTooLarge, size)
	}
	if c.limits.VirtualSize > 0 && size > c.limits.VirtualSize {
		return 0, &LimitError{Limit: "VirtualSize", Value: size, Max: c.limits.VirtualSize}
	}
	if foreign, ok := src.(*ForeignDisk); ok {
		if err := c.checkFile("a ForeignDisk", foreign.host.s); err != nil {
			return 0, err
		}
	}
	raw, ok := src.(*RawDisk)
	if !ok {
		return size, nil
	}
	if err := c.checkFile("a RawDisk", raw.s); err != nil {
		return 0, err
	}
	if want := roundUpSector(c.length); uint64(size) != want {
		return 0, &OptionError{Option: "src", Value: size, Reason: fmt.Sprintf("a RawDisk over this source has %d bytes", want)}
	}
	return size, nil
}

// checkFile refuses a disk, which what names, in another file, as far as that can be told.
func (c *inPlace) checkFile(what string, s Storage) error {
	if id := c.s.Identity(); id != nil && s.Identity() != id {
		return &OptionError{Option: "src", Value: what, Reason: "lies in another file"}
	}
	return nil
}

// roundUpSector rounds n bytes up to whole sectors.
func roundUpSector(n uint64) uint64 { return (n + sectorSize - 1) &^ (sectorSize - 1) }

// planWith plans the image with clusters of that size.
func (c *inPlace) planWith(src Layout, size int64, clusterSize int) error {
	h, err := newHeader(roundUpSector(uint64(size)), &CreateOptions{
		Version:       c.o.Version,
		ClusterSize:   clusterSize,
		RefcountBits:  c.o.RefcountBits,
		BackingFile:   c.o.BackingFile,
		BackingFormat: c.o.BackingFormat,
		LazyRefcounts: c.o.LazyRefcounts,
		Compression:   c.o.Compression,
	})
	if err != nil {
		return err
	}
	if err := h.checkMetadataLimit(c.limits); err != nil { // of the L1 table, before anything is made for it
		return err
	}
	h.dropFeatureNames() // all of the header must fit one sector
	_, raw := src.(*RawDisk)
	r := layoutReader{
		h: c.host, g: h.geometry(), length: c.length, size: uint64(size), backing: h.hasBacking(), holes: raw,
		maxRuns: int(min(max(c.limits.MetadataBytes/inPlaceRunBytes, 1), math.MaxInt32)),
	}
	if err := r.read(c.ctx, src); err != nil {
		return err
	}
	if h.version < 3 {
		for _, run := range r.runs {
			if run.host == hostZero {
				return &OptionError{Option: "Version", Value: h.version, Reason: fmt.Sprintf(
					"has no zero clusters, to hide the backing file at guest %#x", run.guest<<r.g.clusterBits)}
			}
		}
	}
	p := &inPlacePlan{g: r.g, runs: r.runs, used: byHost(r.runs), moved: r.moved}
	if err := p.place(h, c.length); err != nil {
		return err
	}
	if err := h.validate(c.limits); err != nil {
		return err
	}
	if p.first, err = h.encode(); err != nil {
		return err
	}
	if len(p.first) > sectorSize {
		return fmt.Errorf("%w: %d bytes in one sector of %d", ErrHeaderFull, len(p.first), sectorSize)
	}
	p.first = append(p.first, make([]byte, sectorSize-len(p.first))...)
	if err := c.checkFirst(p.first); err != nil {
		return err
	}
	if !r.lastUsed && c.length >= sectorSize && c.length%sectorSize == 0 {
		p.trailer = make([]byte, sectorSize)
		if err := c.host.readFull(p.trailer, c.length-sectorSize); err != nil {
			return err
		}
		if hasFooterMagic(p.trailer) {
			p.trailer = nil // behind the footer it could be taken for that
		}
	}
	c.plan = p
	return p.fillFooter(c)
}

// checkFirst refuses a source whose first sector is that of the image, first: nobody could tell the one from the other
// after a crash.
func (c *inPlace) checkFirst(first []byte) error {
	source := make([]byte, sectorSize)
	if err := c.host.readFull(source, 0); err != nil {
		return err
	}
	if bytes.Equal(source, first) {
		return &OptionError{Option: "AllowQcow2", Value: true, Reason: "the file begins with the very header that the image is to get"}
	}
	return nil
}

// dropFeatureNames takes the feature name table out of a header.
func (h *header) dropFeatureNames() {
	kept := h.extensions[:0]
	for _, e := range h.extensions {
		if e.typ != extFeatureNames {
			kept = append(kept, e)
		}
	}
	h.extensions = kept
}

// place finds the places of everything new behind a source of length bytes, and names them in h.
func (p *inPlacePlan) place(h *header, length uint64) error {
	g := p.g
	p.table = max(g.clusters(length), 1)
	l1Entries := g.l1Entries(h.virtualSize())
	l1Clusters := g.clusters(8 * l1Entries)
	var l2 []uint64 // the L1 entries that have tables
	err := p.eachL2(func(l1Index uint64) ([]byte, error) {
		l2 = append(l2, l1Index)
		return nil, nil
	})
	if err != nil {
		return err
	}
	firstBlock := p.table >> g.refBlockBits // its range, and all behind it, is in use
	below := p.blocksBelow(firstBlock)
	inRange := p.table & (g.perBlock() - 1)
	rc, err := g.sizeRefcounts(firstBlock, inRange+uint64(len(below))+l1Clusters+uint64(len(l2)+len(p.moved)), false)
	if err != nil {
		return err
	}
	p.blocks = p.table + rc.tableClusters
	p.l1 = p.blocks + uint64(len(below)) + rc.blocks
	p.l2 = p.l1 + l1Clusters
	p.copies = p.l2 + uint64(len(l2))
	p.end = p.copies + uint64(len(p.moved))
	if p.end >= maxHostOff>>g.clusterBits {
		return fmt.Errorf("%w: tables up to host %#x, above %#x", ErrTooLarge, p.end<<g.clusterBits, uint64(maxHostOff))
	}
	for i := range p.moved {
		p.runs[p.moved[i].run].host = p.copies + uint64(i)
	}
	p.refTable = newTable(rc.tableClusters << g.clusterBits / 8)
	for i, b := range below {
		p.refTable.store(b, (p.blocks+uint64(i))<<g.clusterBits)
	}
	for i := range rc.blocks {
		p.refTable.store(firstBlock+i, (p.blocks+uint64(len(below))+i)<<g.clusterBits)
	}
	p.l1Table = newTable(l1Entries)
	for i, l1Index := range l2 {
		p.l1Table.store(l1Index, (p.l2+uint64(i))<<g.clusterBits|flagCopied)
	}
	h.refTableOff, h.refTableClusters = p.table<<g.clusterBits, uint32(rc.tableClusters)
	if l1Entries > 0 {
		h.l1Off = p.l1 << g.clusterBits
	}
	return nil
}

// blocksBelow returns which of the first n refcount blocks describe a cluster in use: that of the header, or one of
// the source's that stay.
func (p *inPlacePlan) blocksBelow(n uint64) []uint64 {
	var blocks []uint64
	next := uint64(0) // the first that is not in blocks
	add := func(first, last uint64) {
		for next = max(next, first); next <= last && next < n; next++ {
			blocks = append(blocks, next)
		}
	}
	add(0, 0)
	for _, run := range p.used {
		add(run.host>>p.g.refBlockBits, (run.host+run.n-1)>>p.g.refBlockBits)
	}
	return blocks
}

// eachL2 calls table with the L1 index of every L2 table, in their order, and fills the zeros that it returns with
// the table's entries, unless that is nil.
func (p *inPlacePlan) eachL2(table func(l1Index uint64) ([]byte, error)) error {
	rules := entryRules{geometry: p.g}
	done := uint64(0) // clusters of run i that are in earlier tables
	for i := 0; i < len(p.runs); {
		l1Index := (p.runs[i].guest + done) >> p.g.l2Bits
		b, err := table(l1Index)
		if err != nil {
			return err
		}
		for i < len(p.runs) && (p.runs[i].guest+done)>>p.g.l2Bits == l1Index {
			run := p.runs[i]
			guest := run.guest + done
			n := min(run.n-done, (l1Index+1)<<p.g.l2Bits-guest)
			if b != nil {
				e := l2Entry{word: (run.host+done)<<p.g.clusterBits | flagCopied}
				if run.host == hostZero {
					e.word = flagZero
				}
				rules.putRun(b, guest&(1<<p.g.l2Bits-1), n, e)
			}
			if done += n; done == run.n {
				i, done = i+1, 0
			}
		}
	}
	return nil
}

// bulkWriter hands host clusters that follow each other to a function, in large pieces.
type bulkWriter struct {
	ctx  context.Context
	g    geometry
	off  uint64 // host offset of buf
	buf  []byte
	used int // bytes of buf
	sink func(off uint64, p []byte) error
}

// cluster returns the next cluster, which is zero, to be filled before the next call.
func (w *bulkWriter) cluster() ([]byte, error) {
	if w.used == len(w.buf) {
		if err := w.flush(); err != nil {
			return nil, err
		}
	}
	b := w.buf[w.used:][:w.g.clusterSize]
	w.used += len(b)
	clear(b)
	return b, nil
}

// flush hands out what there is.
func (w *bulkWriter) flush() error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	p := w.buf[:w.used]
	off := w.off
	w.off, w.used = off+uint64(len(p)), 0
	return w.sink(off, p)
}

// emit hands everything new to sink, from the refcount table to the last copied cluster: whole clusters in the order of
// their host offsets. Copied clusters are read from h. The memory for it does not depend on how much it is.
func (p *inPlacePlan) emit(ctx context.Context, h *hostFile, sink func(off uint64, b []byte) error) error {
	w := &bulkWriter{
		ctx: ctx, g: p.g, off: p.table << p.g.clusterBits, sink: sink, buf: p.g.bulkBuffer(p.end - p.table),
	}
	if err := p.emitTable(w, p.refTable, p.blocks-p.table); err != nil {
		return err
	}
	if err := p.emitBlocks(w); err != nil {
		return err
	}
	if err := p.emitTable(w, p.l1Table, p.l2-p.l1); err != nil {
		return err
	}
	err := p.eachL2(func(uint64) ([]byte, error) { return w.cluster() })
	if err != nil {
		return err
	}
	for _, m := range p.moved {
		b, err := w.cluster()
		if err == nil {
			err = h.readFull(b[:m.n], m.host<<p.g.clusterBits)
		}
		if err != nil {
			return fmt.Errorf("copy a cluster: %w", err)
		}
	}
	return w.flush()
}

// emitTable hands out a table of n clusters.
func (p *inPlacePlan) emitTable(w *bulkWriter, t *table, n uint64) error {
	for i := range n {
		b, err := w.cluster()
		if err != nil {
			return err
		}
		t.encode(b, i<<p.g.clusterBits/8)
	}
	return nil
}

// emitBlocks hands out the refcount blocks: the header's cluster, what stays of the source, and everything new have
// one reference each, and all else is free.
func (p *inPlacePlan) emitBlocks(w *bulkWriter) error {
	used := p.used
	for index := range p.refTable.n {
		if p.refTable.load(index) == 0 {
			continue
		}
		b, err := w.cluster()
		if err != nil {
			return err
		}
		lo, hi := index<<p.g.refBlockBits, (index+1)<<p.g.refBlockBits
		refer := func(first, end uint64) {
			for ci := max(first, lo); ci < min(end, hi); ci++ {
				setRefcountAt(b, p.g.refcountOrder, ci-lo, 1)
			}
		}
		refer(0, 1)
		for len(used) > 0 && used[0].host+used[0].n <= lo {
			used = used[1:]
		}
		for _, run := range used {
			if run.host >= hi {
				break
			}
			refer(run.host, run.host+run.n)
		}
		refer(p.table, p.end)
	}
	return nil
}

// fillFooter makes the footer, for which it makes all tables once. That they come out the same when they are written is
// certain: they depend on the plan, and on copied clusters that nobody writes.
func (p *inPlacePlan) fillFooter(c *inPlace) error {
	source := make([]byte, sectorSize)
	if err := c.host.readFull(source[:min(sectorSize, c.length)], 0); err != nil {
		return err
	}
	sum := sha256.New()
	err := p.emit(c.ctx, c.host, func(_ uint64, b []byte) error {
		sum.Write(b)
		return nil
	})
	if err != nil {
		return err
	}
	p.footer = inPlaceFooter{
		clusterBits: uint32(p.g.clusterBits),
		length:      c.length,
		tables:      p.table << p.g.clusterBits,
		off:         p.end << p.g.clusterBits,
		trailer:     uint64(len(p.trailer)),
		tablesSum:   [sha256.Size]byte(sum.Sum(nil)),
		headerSum:   sha256.Sum256(p.first),
		sourceSum:   sha256.Sum256(source),
	}
	return nil
}
