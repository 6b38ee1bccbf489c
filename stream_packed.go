package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/go-qcow2/qcow2/internal/codec"
)

// packedStream writes a stream whose clusters are known only when their content is: the image behind its header, in
// an order in which nothing is named before it is known. An L2 table follows the clusters that it maps, a refcount
// block those that it counts, but for the last ones; then come L1 table, refcount table and the last blocks. Only what
// the header says of them must be known beforehand: so this runs twice, first for that.
//
// Every host cluster is taken in turn: by a table, a plain cluster, or payloads, which are packed to the byte, as the
// allocator has it.
type packedStream struct {
	*streamer
	out    *streamWriter
	want   *packedLayout // what the run before has found, or nil
	l1     *table
	l2     l2Stream
	block  []byte   // the first refcount block that is not written
	blocks []uint64 // host offsets of those that are
	held   heldClusters
}

// packedLayout is what the header says of the image, and its length.
type packedLayout struct {
	l1Off, tableOff, tableClusters uint64
	end                            uint64
}

// heldClusters are plain clusters that wait for the payloads around them to fill their cluster: they would end it.
type heldClusters struct {
	data   []byte
	guests []uint64 // guest cluster indexes
}

// mostHeld is how many bytes of plain clusters wait at most, in bytes: a multiple of every cluster size.
const mostHeld = 4 << 20

// writePacked writes the image in two runs, or one into the spool.
func (s *streamer) writePacked(out *streamWriter) error {
	body := newStreamWriter(s.ctx, nil)
	if s.o.Spool != nil {
		body = newStreamWriter(s.ctx, io.NewOffsetWriter(s.o.Spool, 0))
	}
	l, err := s.pack(body, nil)
	if err == nil {
		err = body.flush()
	}
	if err != nil {
		return err
	}
	if s.h.l1Size > 0 {
		s.h.l1Off = l.l1Off
	}
	s.h.refTableOff, s.h.refTableClusters = l.tableOff, uint32(l.tableClusters)
	if s.o.Spool == nil {
		_, err = s.pack(out, &l)
		return err
	}
	if err := s.writeHeader(out); err != nil {
		return err
	}
	return s.unspool(out, l.end)
}

// unspool copies what is behind the header from the spool.
func (s *streamer) unspool(out *streamWriter, end uint64) error {
	buf := make([]byte, streamChunk)
	for out.pos < end {
		p := buf[:min(uint64(len(buf)), end-out.pos)]
		if n, err := s.o.Spool.ReadAt(p, int64(out.pos)); n < len(p) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read %d bytes at %#x of the spool: %w", len(p), out.pos, err)
		}
		if err := out.write(p); err != nil {
			return err
		}
		s.progress(s.total/2, uint64(float64(s.h.size)*float64(out.pos)/float64(end)))
	}
	return nil
}

// pack makes one run. want is what the one before has found, or nil; the header is as good as that.
func (s *streamer) pack(out *streamWriter, want *packedLayout) (packedLayout, error) {
	p := &packedStream{streamer: s, out: out, want: want, l1: newTable(uint64(s.h.l1Size)), block: make([]byte, s.r.clusterSize)}
	p.l2 = l2Stream{r: &s.r, done: p.writeL2}
	if err := s.writeHeader(out); err != nil {
		return packedLayout{}, err
	}
	p.setRefcount(0, 1)
	before := int64(0)
	if want != nil {
		before = s.total / 2
	}
	err := s.each(s.src.runs, s.packBatch, func(b *streamBatch) error {
		if err := p.take(b); err != nil {
			return err
		}
		s.progress(before, (b.first+b.n)<<s.r.clusterBits)
		return nil
	})
	if err == nil {
		err = p.l2.close()
	}
	if err != nil {
		return packedLayout{}, err
	}
	return p.finish()
}

// packBatch reads the clusters of a batch, looks for zeros, and packs the others.
func (s *streamer) packBatch(b *streamBatch) error {
	if err := s.src.readClusters(b.data, b.first); err != nil {
		return err
	}
	size := int(s.r.clusterSize)
	if s.o.Compress && b.packed == nil {
		b.packed = make([]byte, 0, len(b.room))
	}
	b.packed, b.sizes = b.packed[:0], b.sizes[:0]
	for p := b.data; len(p) > 0; p = p[size:] {
		n := size
		switch {
		case isZero(p[:size]) && !(s.src.backed && s.r.version2): // which has no zero clusters
			n = 0
		case s.o.Compress:
			used := len(b.packed)
			k, ok, err := s.compress(b.packed[used:used:used+size-1], p[:size])
			if err != nil {
				return err
			}
			if ok {
				n = k
				b.packed = b.packed[:used+k]
			}
		}
		b.sizes = append(b.sizes, n)
	}
	return nil
}

// compress packs a cluster into dst. Equal clusters give equal payloads: the second run relies on it.
func (s *streamer) compress(dst, cluster []byte) (n int, ok bool, err error) {
	return codec.CompressWindow(dst, cluster, s.codec, s.o.DeflateWindow)
}

// take writes, and maps, the clusters of a batch.
func (p *packedStream) take(b *streamBatch) error {
	if b.zero {
		return p.l2.put(b.first, b.n, p.r.zeroEntry(l2Entry{}))
	}
	packed, size := b.packed, int(p.r.clusterSize)
	for i, n := range b.sizes {
		guest, plain := b.first+uint64(i), b.data[i*size:][:size]
		var err error
		switch n {
		case 0:
			if p.src.backed {
				err = p.l2.put(guest, 1, p.r.zeroEntry(l2Entry{}))
			}
		case size:
			err = p.hold(guest, plain)
		default:
			err = p.addPayload(guest, packed[:n], plain)
			packed = packed[n:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// place ends the host cluster that has begun, and returns the offset of the next one that is free, behind the
// refcount blocks whose clusters are all taken.
func (p *packedStream) place() (uint64, error) {
	if in := p.r.offsetInCluster(p.out.pos); in != 0 {
		if err := p.out.zeros(p.r.clusterSize - in); err != nil {
			return 0, err
		}
	}
	if p.out.pos>>p.r.clusterBits>>p.r.refBlockBits > uint64(len(p.blocks)) {
		off := p.out.pos
		if err := p.out.write(p.block); err != nil {
			return 0, err
		}
		p.blocks = append(p.blocks, off)
		clear(p.block)
		p.setRefcount(off>>p.r.clusterBits, 1)
	}
	switch {
	case p.out.pos >= maxHostOff:
		return 0, fmt.Errorf("%w: clusters above host %#x", ErrTooLarge, uint64(maxHostOff))
	case p.want != nil && p.out.pos > p.want.l1Off:
		return 0, p.changed(p.out)
	}
	return p.out.pos, nil
}

// refcount returns the refcount of a host cluster that the present block counts.
func (p *packedStream) refcount(clusterIndex uint64) uint64 {
	return refcountAt(p.block, p.r.refcountOrder, clusterIndex&(1<<p.r.refBlockBits-1))
}

// setRefcount sets it.
func (p *packedStream) setRefcount(clusterIndex, v uint64) {
	setRefcountAt(p.block, p.r.refcountOrder, clusterIndex&(1<<p.r.refBlockBits-1), v)
}

// writeCluster writes a host cluster that has one reference, and returns its offset.
func (p *packedStream) writeCluster(data []byte) (uint64, error) {
	off, err := p.place()
	if err != nil {
		return 0, err
	}
	p.setRefcount(off>>p.r.clusterBits, 1)
	return off, p.out.write(data)
}

// hold writes a plain cluster, or keeps it while payloads have begun a host cluster that has room, until much is kept.
func (p *packedStream) hold(guest uint64, data []byte) error {
	if err := p.l2.at(guest >> p.r.l2Bits); err != nil {
		return err
	}
	if p.r.offsetInCluster(p.out.pos) == 0 {
		return p.writePlain(guest, data)
	}
	p.held.guests = append(p.held.guests, guest)
	p.held.data = append(p.held.data, data...)
	if len(p.held.data) >= mostHeld {
		return p.letGo()
	}
	return nil
}

// letGo writes the plain clusters that are held. All of them are of the present L2 table.
func (p *packedStream) letGo() error {
	size := int(p.r.clusterSize)
	for i, guest := range p.held.guests {
		if err := p.writePlain(guest, p.held.data[i*size:][:size]); err != nil {
			return err
		}
	}
	p.held.data, p.held.guests = p.held.data[:0], p.held.guests[:0]
	return nil
}

// writePlain writes a plain cluster of the present L2 table.
func (p *packedStream) writePlain(guest uint64, data []byte) error {
	off, err := p.writeCluster(data)
	if err != nil {
		return err
	}
	return p.l2.put(guest, 1, p.r.dataEntry(l2Entry{word: off | flagCopied}))
}

// addPayload writes the payload of a guest cluster behind the one before, or in a new host cluster: where the present
// one has no room left in its refcount, or the next is a refcount block's. Where no descriptor can name the place it
// writes the plain cluster. qcow2 spec, "Compressed Clusters Descriptor".
func (p *packedStream) addPayload(guest uint64, payload, plain []byte) error {
	if err := p.l2.at(guest >> p.r.l2Bits); err != nil {
		return err
	}
	n, in := uint64(len(payload)), p.r.offsetInCluster(p.out.pos)
	ci := p.out.pos >> p.r.clusterBits
	spills := n > p.r.clusterSize-in
	if in == 0 || p.refcount(ci) == maxRefcount(p.r.refcountOrder) || spills && (ci+1)&(1<<p.r.refBlockBits-1) == 0 {
		if err := p.letGo(); err != nil { // the host cluster ends anyway
			return err
		}
		off, err := p.place()
		if err != nil {
			return err
		}
		ci, spills = off>>p.r.clusterBits, false
	}
	off := p.out.pos
	if off+n > 1<<p.r.csizeShift {
		return p.hold(guest, plain)
	}
	p.setRefcount(ci, p.refcount(ci)+1)
	if spills {
		p.setRefcount(ci+1, 1)
	}
	if err := p.out.write(payload); err != nil {
		return err
	}
	if err := p.l2.put(guest, 1, l2Entry{word: p.r.compressedWord(off, n)}); err != nil {
		return err
	}
	if p.r.offsetInCluster(p.out.pos) == 0 {
		return p.letGo()
	}
	return nil
}

// writeL2 writes the present L2 table, which is complete but for the clusters that are held.
func (p *packedStream) writeL2(index uint64) error {
	if err := p.letGo(); err != nil {
		return err
	}
	off, err := p.writeCluster(p.l2.buf)
	p.l1.store(index, off|flagCopied)
	return err
}

// finish writes L1 table, refcount table and the last refcount blocks. Where the run before has found other places
// for them, nothing of it is written.
func (p *packedStream) finish() (packedLayout, error) {
	at, err := p.place()
	if err != nil {
		return packedLayout{}, err
	}
	g, first := &p.r.geometry, uint64(len(p.blocks))
	start := at >> g.clusterBits
	l1Clusters := g.clusters(8 * p.l1.n)
	rc, err := g.sizeRefcounts(first, start-first<<g.refBlockBits+l1Clusters, false)
	if err != nil {
		return packedLayout{}, err
	}
	blocks := start + l1Clusters + rc.tableClusters
	end := blocks + rc.blocks
	l := packedLayout{
		l1Off:         at,
		tableOff:      at + l1Clusters<<g.clusterBits,
		tableClusters: rc.tableClusters,
		end:           end << g.clusterBits,
	}
	if p.want != nil && *p.want != l {
		return l, p.changed(p.out)
	}
	err = p.out.tables(g, l1Clusters, func(b []byte, pos uint64) { p.l1.encode(b, pos/8) })
	if err != nil {
		return l, err
	}
	err = p.out.tables(g, rc.tableClusters, func(b []byte, pos uint64) {
		for i := uint64(0); i < uint64(len(b)); i += 8 {
			off := uint64(0)
			switch n := (pos + i) / 8; {
			case n < first:
				off = p.blocks[n]
			case n-first < rc.blocks:
				off = (blocks + n - first) << g.clusterBits
			}
			binary.BigEndian.PutUint64(b[i:], off)
		}
	})
	for i := range rc.blocks {
		if err != nil {
			break
		}
		// Of the first block, which counts what is before the tables, too, the rest.
		from := (first + i) << g.refBlockBits
		for ci := max(start, from); ci < min(end, from+1<<g.refBlockBits); ci++ {
			p.setRefcount(ci, 1)
		}
		err = p.out.write(p.block)
		clear(p.block)
	}
	return l, err
}
