package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/go-qcow2/qcow2/internal/codec"
)

// StreamOptions says what image WriteStream writes. The nil pointer and the zero value are right for most.
type StreamOptions struct {
	// Create says what image it is. Nil: the default of each field. Preallocation, DataFile and DataFileRaw are
	// refused: the first has no place for what follows later, the others are not one stream. Open and Overwrite
	// are not looked at. With ExtendedL2 the subclusters of a cluster are all allocated or none.
	Create *CreateOptions
	// SharedDepth, if positive, says that the layers of the source at that depth and below (Extent.Depth) are what
	// the stream's backing file holds, too: what only they hold is left out. It needs Create.BackingFile, which
	// nobody opens: that it reads as those layers do is the caller's promise. With a backing file all other zeros
	// become zero clusters, which hide it, or, in version 2, which has none, plain ones. A cluster that is shared in
	// a part is written whole. Default 0: nothing is shared.
	SharedDepth int
	// FindZeros leaves out clusters that hold zeros, at the cost of a second pass over all data. Without it, and
	// without Compress, which looks for them anyway, what the source's extents call data is written.
	FindZeros bool
	// Compress writes compressed clusters, of the type Create.Compression. Their length is not known before they
	// are packed and the header comes first, so that all data is read and packed twice: at half the speed, and
	// with no memory or file for what was packed. Spool is the other way.
	Compress bool
	// DeflateWindow is how far back deflate payloads reach in bytes: DeflateWindow4K, the default, or
	// DeflateWindow32K.
	DeflateWindow int
	// Spool, if not nil, takes what Compress or FindZeros make, from offset 0 on, until its length is known; the
	// source is then read, and packed, once only. It grows to the length of the stream. It is neither emptied
	// before or afterwards, nor synced, nor closed. Streams from extents alone need none and do not use it.
	Spool Storage
	// Workers is the number of goroutines, at most 1024, that read the source, look for zeros and pack. The bytes
	// of the stream do not depend on it. Default: GOMAXPROCS.
	Workers int
	// Progress, if not nil, is called now and then and at the end, by the goroutine that called WriteStream, with
	// the number of bytes of the disk that are done with. total counts the disk once for each pass over its data.
	Progress func(done, total int64)
}

// maxStreamWorkers bounds StreamOptions.Workers, and so the memory of a stream.
const maxStreamWorkers = 1024

// streamChunk is what a worker reads at once, in bytes, and what the writer gets at once: a multiple of every cluster
// size but the largest, of which a piece holds one.
const streamChunk = 1 << 20

// WriteStream writes a qcow2 image with the content of src to w, from its first byte to its last, and returns how
// many bytes w took. w need not be able to seek: it may be a pipe or an upload. The image is complete, and free of
// leaks, when WriteStream returns nil; after an error w has got the beginning of one. The same source and options
// give the same bytes, whatever the number of workers.
//
// There are two layouts. Where the extents of src alone decide what is written, they are looked at three times, data
// is read once, and the stream is header, refcount table, refcount blocks, L1 table, L2 tables, and the data in guest
// order. With Compress or FindZeros the content decides; it is read twice (but see Spool), and each L2 table and
// refcount block follows what it maps and counts, the L1 table and the refcount table being last. A cluster that does
// not shrink is stored plain. A cluster of which any part is data is written whole.
//
// Memory does not depend on the amount of data: Workers+2 pieces of 1 MiB (of a cluster, if that is 2 MiB), twice
// that with Compress; 1 MiB before w; a table of either kind; up to 4 MiB of plain clusters between compressed ones;
// and of the tables one bit for each L1 entry, or, where the content decides, 8 bytes, 32 MiB at most, and 8 for each
// refcount block. w gets pieces of 1 MiB, the last one aside.
//
// src may not change meanwhile: what it maps, and with Compress or FindZeros what it holds. That is noticed, as
// ErrSourceChanged, where it would have made a broken image; the stream is worthless then. Of an image that WriteStream
// calls good each cluster is what src told of it last; that all of them are of one moment is up to src.
//
// It returns only after calls of src and w that are in flight, whatever becomes of ctx, and leaves no goroutine.
//
// Errors: *OptionError, ErrHeaderFull, ErrTooLarge, ErrSourceChanged, io.ErrShortWrite, that of ctx, and those of
// src, w and Spool. qcow2 spec, "General".
func WriteStream(ctx context.Context, w io.Writer, src Disk, opts *StreamOptions) (int64, error) {
	s, err := newStreamer(ctx, src, opts)
	n := int64(0)
	if err == nil {
		out := newStreamWriter(ctx, w)
		if err = s.write(out); err == nil {
			err = out.flush()
		}
		n = out.written
	}
	if err == nil {
		s.progress(s.total, 0)
		return n, nil
	}
	return n, fmt.Errorf("qcow2: stream: %w", err)
}

// StreamSize returns how many bytes WriteStream writes for the same source and options, for a Content-Length, say.
// From extents alone it costs one pass over them. With Compress or FindZeros it is WriteStream's first pass: all data
// is read, and packed. Spool is not used.
//
// Errors: those of WriteStream, but for those of w and Spool.
func StreamSize(ctx context.Context, src Disk, opts *StreamOptions) (int64, error) {
	s, err := newStreamer(ctx, src, opts)
	n := uint64(0)
	if err == nil {
		n, err = s.measure()
	}
	if err != nil {
		return 0, fmt.Errorf("qcow2: stream size: %w", err)
	}
	return int64(n), nil
}

// streamer is one WriteStream in progress.
type streamer struct {
	ctx     context.Context
	o       StreamOptions
	src     *streamSource
	h       *header // its offsets are filled in when the layout is known
	r       entryRules
	codec   codec.Type
	workers int
	batches []*streamBatch // of each, kept from pass to pass
	total   int64          // for Progress
}

// newStreamer checks the options.
func newStreamer(ctx context.Context, src Disk, opts *StreamOptions) (*streamer, error) {
	s := &streamer{ctx: ctx}
	if opts != nil {
		s.o = *opts
	}
	var c CreateOptions
	if s.o.Create != nil {
		c = *s.o.Create
	}
	c.Open = nil
	if err := s.o.check(&c); err != nil {
		return nil, err
	}
	// As of a raw file: what a size lacks to whole sectors is zeros.
	n := src.Size()
	size := uint64(n)
	if n > 0 {
		size += -size % sectorSize
	}
	var err error
	if s.h, err = newHeader(size, &c); err != nil {
		return nil, err
	}
	s.r = entryRules{geometry: s.h.geometry(), version2: s.h.version < 3}
	s.codec = s.h.compression.codecType()
	if s.o.DeflateWindow == 0 {
		s.o.DeflateWindow = DeflateWindow4K
	}
	s.src = &streamSource{Disk: src, size: uint64(n), r: &s.r, backed: s.h.hasBacking(), depth: s.o.SharedDepth}
	if s.workers = s.o.Workers; s.workers == 0 {
		s.workers = min(runtime.GOMAXPROCS(0), maxStreamWorkers)
	}
	s.total = int64(size)
	if s.byContent() {
		s.total *= 2 // 62 bits: no L1 table maps more than 2^61 bytes
	}
	return s, nil
}

// check returns all that cannot be streamed, joined, or nil.
func (o *StreamOptions) check(c *CreateOptions) error {
	var errs []error
	bad := func(option string, value any, reason string) {
		errs = append(errs, &OptionError{Option: option, Value: value, Reason: reason})
	}
	if c.DataFile != "" {
		bad("DataFile", c.DataFile, "cannot be streamed: it is another file")
	}
	if c.Preallocation != PreallocationOff {
		bad("Preallocation", c.Preallocation, "cannot be streamed: a stream has no room for later")
	}
	if o.Workers < 0 || o.Workers > maxStreamWorkers {
		bad("Workers", o.Workers, fmt.Sprintf("want 0 to %d", maxStreamWorkers))
	}
	if !validDeflateWindow(o.DeflateWindow) {
		bad("DeflateWindow", o.DeflateWindow, "must be 4096 or 32768")
	}
	if o.SharedDepth < 0 {
		bad("SharedDepth", o.SharedDepth, "must not be negative")
	}
	if o.SharedDepth > 0 && c.BackingFile == "" {
		bad("SharedDepth", o.SharedDepth, "needs Create.BackingFile")
	}
	return errors.Join(errs...)
}

// byContent reports whether the content decides what is written, rather than the extents alone.
func (s *streamer) byContent() bool { return s.o.Compress || s.o.FindZeros }

// write writes the image.
func (s *streamer) write(out *streamWriter) error {
	if s.byContent() {
		return s.writePacked(out)
	}
	p, err := s.planPlain()
	if err != nil {
		return err
	}
	return p.write(out)
}

// measure returns the length of the image.
func (s *streamer) measure() (uint64, error) {
	if s.byContent() {
		s.total /= 2 // there is no second pass
		p, err := s.pack(newStreamWriter(s.ctx, nil), nil)
		return p.end, err
	}
	p, err := s.planPlain()
	if err != nil {
		return 0, err
	}
	return p.l.end << p.l.g.clusterBits, nil
}

// writeHeader writes the cluster of the header.
func (s *streamer) writeHeader(out *streamWriter) error {
	b, err := s.h.encode()
	if err != nil {
		return err
	}
	if err := out.write(b); err != nil {
		return err
	}
	return out.zeros(s.r.clusterSize - uint64(len(b)))
}

// progress reports that of a pass the disk is done with up to guest offset off; before is what the passes before
// it count.
func (s *streamer) progress(before int64, off uint64) {
	if s.o.Progress != nil {
		s.o.Progress(min(before+int64(min(off, s.h.size)), s.total), s.total)
	}
}

// streamWriter passes bytes on to a writer in pieces of streamChunk, and counts them.
type streamWriter struct {
	ctx     context.Context
	w       io.Writer // nil: the bytes are only counted
	buf     []byte    // what waits for more
	n       int       // bytes of buf in use
	pos     uint64    // host offset of the next byte
	written int64     // bytes that w took
}

// newStreamWriter returns a streamWriter at host offset 0; w may be nil.
func newStreamWriter(ctx context.Context, w io.Writer) *streamWriter {
	o := &streamWriter{ctx: ctx, w: w}
	if w != nil {
		o.buf = make([]byte, streamChunk)
	}
	return o
}

// write writes p. An error is final.
func (o *streamWriter) write(p []byte) error {
	o.pos += uint64(len(p))
	if o.w == nil {
		return nil
	}
	for len(p) > 0 {
		if o.n == 0 && len(p) >= len(o.buf) {
			if err := o.pass(p[:len(o.buf)]); err != nil {
				return err
			}
			p = p[len(o.buf):]
			continue
		}
		k := copy(o.buf[o.n:], p)
		o.n, p = o.n+k, p[k:]
		if o.n == len(o.buf) {
			if err := o.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush passes on what waits.
func (o *streamWriter) flush() error {
	p := o.buf[:o.n]
	o.n = 0
	if len(p) == 0 {
		return nil
	}
	return o.pass(p)
}

// pass gives p to the writer.
func (o *streamWriter) pass(p []byte) error {
	if err := o.ctx.Err(); err != nil {
		return err
	}
	n, err := o.w.Write(p)
	if n < 0 || n > len(p) {
		return fmt.Errorf("write %d bytes: the writer says that it took %d", len(p), n)
	}
	o.written += int64(n)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write %d bytes: %w", len(p), err)
	}
	return nil
}

// zeros writes n zeros.
func (o *streamWriter) zeros(n uint64) error {
	for n > 0 {
		k := min(n, uint64(len(zeroChunk)))
		if err := o.write(zeroChunk[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// tables writes n clusters of tables in large pieces: fill fills in each, which begins pos bytes behind the first.
func (o *streamWriter) tables(g *geometry, n uint64, fill func(p []byte, pos uint64)) error {
	buf := g.bulkBuffer(n)
	for pos := uint64(0); pos < n<<g.clusterBits; {
		p := buf[:min(uint64(len(buf)), n<<g.clusterBits-pos)]
		fill(p, pos)
		if err := o.write(p); err != nil {
			return err
		}
		pos += uint64(len(p))
	}
	return nil
}

// l2Stream is the L2 table that is being filled in, of tables that come in their order.
type l2Stream struct {
	r     *entryRules
	buf   []byte // the table
	index uint64 // its L1 index
	open  bool   // there is one
	done  func(index uint64) error
}

// at makes the table of an L1 entry the present one. The one before is done with.
func (t *l2Stream) at(index uint64) error {
	if t.open && t.index == index {
		return nil
	}
	if err := t.close(); err != nil {
		return err
	}
	if t.buf == nil {
		t.buf = make([]byte, t.r.clusterSize)
	}
	t.index, t.open = index, true
	return nil
}

// put maps n guest clusters from first on: the first by e; where e holds a host cluster, the others follow it.
func (t *l2Stream) put(first, n uint64, e l2Entry) error {
	for n > 0 {
		if err := t.at(first >> t.r.l2Bits); err != nil {
			return err
		}
		i := first & (1<<t.r.l2Bits - 1)
		k := min(n, 1<<t.r.l2Bits-i)
		t.r.putRun(t.buf, i, k, e)
		if t.r.hasCluster(e) {
			e.word += k << t.r.clusterBits
		}
		first, n = first+k, n-k
	}
	return nil
}

// close is done with the present table, if there is one.
func (t *l2Stream) close() error {
	if !t.open {
		return nil
	}
	if err := t.done(t.index); err != nil {
		return err
	}
	clear(t.buf)
	t.open = false
	return nil
}
