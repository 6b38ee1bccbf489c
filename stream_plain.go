package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"iter"
	"math/bits"
)

// plainStream is the layout of a stream whose data clusters are known by the extents of the source: all tables in
// front of the data. Of the tables it holds one bit for each L1 entry, 512 KiB at most; their contents come from the
// extents, in further passes.
type plainStream struct {
	*streamer
	l      *layout
	tables []uint64 // the L1 entries that have an L2 table, one bit each
	runs   runDigest
}

// planPlain counts the clusters, and finds the places.
func (s *streamer) planPlain() (*plainStream, error) {
	p := &plainStream{streamer: s, runs: runDigest{seed: maphash.MakeSeed()}}
	p.l = &layout{g: s.r.geometry, table: 1, l1Entries: s.r.l1Entries(s.h.virtualSize())}
	p.tables = make([]uint64, (p.l.l1Entries+63)/64)
	data := uint64(0)
	for run, err := range s.src.runs(s.ctx) {
		if err != nil {
			return nil, err
		}
		p.runs.add(run)
		if !run.zero {
			data += run.n
		}
		for i := run.first >> s.r.l2Bits; i <= (run.first+run.n-1)>>s.r.l2Bits; i++ {
			p.tables[i/64] |= 1 << (i % 64)
		}
	}
	for _, word := range p.tables {
		p.l.l2Tables += uint64(bits.OnesCount64(word))
	}
	return p, p.l.place(s.h, data)
}

// hasTable reports whether an L1 entry has an L2 table.
func (p *plainStream) hasTable(l1Index uint64) bool { return p.tables[l1Index/64]>>(l1Index%64)&1 != 0 }

// write writes the image.
func (p *plainStream) write(out *streamWriter) error {
	l, g := p.l, &p.l.g
	if err := p.writeHeader(out); err != nil {
		return err
	}
	err := out.tables(g, l.rc.tableClusters, func(b []byte, pos uint64) {
		g.fillPointers(b, pos/8, l.rc.blocks, l.blocks<<g.clusterBits)
	})
	if err != nil {
		return err
	}
	err = out.tables(g, l.rc.blocks, func(b []byte, pos uint64) {
		at := pos * 8 >> g.refcountOrder
		fillRefcounts(b, g.refcountOrder, max(l.end, at)-at)
	})
	if err != nil {
		return err
	}
	next := l.l2<<g.clusterBits | flagCopied
	err = out.tables(g, l.l2-l.l1, func(b []byte, pos uint64) {
		for i := uint64(0); i < uint64(len(b)); i += 8 {
			entry := uint64(0)
			if n := (pos + i) / 8; n < l.l1Entries && p.hasTable(n) {
				entry, next = next, next+g.clusterSize
			}
			binary.BigEndian.PutUint64(b[i:], entry)
		}
	})
	if err == nil {
		err = p.writeL2(out)
	}
	if err == nil {
		err = p.writeData(out)
	}
	return err
}

// writeL2 writes the L2 tables.
func (p *plainStream) writeL2(out *streamWriter) error {
	l, clusterBits := p.l, p.l.g.clusterBits
	t := l2Stream{r: &p.r}
	t.done = func(index uint64) error {
		if !p.hasTable(index) || out.pos >= l.disk<<clusterBits {
			return p.changed(out)
		}
		return out.write(t.buf)
	}
	host := l.disk
	for run, err := range p.src.sameRuns(p.ctx, p.runs) {
		if err != nil {
			return err
		}
		e := p.r.zeroEntry(l2Entry{})
		if !run.zero {
			e = p.r.dataEntry(l2Entry{word: host<<clusterBits | flagCopied})
			host += run.n
		}
		if err := t.put(run.first, run.n, e); err != nil {
			return err
		}
	}
	if err := t.close(); err != nil {
		return err
	}
	if out.pos != l.disk<<clusterBits {
		return p.changed(out)
	}
	return nil
}

// writeData writes the data.
func (p *plainStream) writeData(out *streamWriter) error {
	end := p.l.end << p.l.g.clusterBits
	prepare := func(b *streamBatch) error { return p.src.readClusters(b.data, b.first) }
	runs := func(ctx context.Context) iter.Seq2[guestRun, error] { return p.src.sameRuns(ctx, p.runs) }
	return p.each(runs, prepare, func(b *streamBatch) error {
		if uint64(len(b.data)) > end-out.pos {
			return p.changed(out)
		}
		if err := out.write(b.data); err != nil {
			return err
		}
		p.progress(0, (b.first+b.n)<<p.r.clusterBits)
		return nil
	})
}

// changed says that the source has changed since it was counted.
func (s *streamer) changed(out *streamWriter) error {
	return fmt.Errorf("%w: at host %#x of the stream", ErrSourceChanged, out.pos)
}
