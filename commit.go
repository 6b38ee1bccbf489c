package qcow2

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"sync"
	"syscall"
)

// CommitOptions says what Commit does. The nil pointer and the zero value commit into the backing file and empty the
// image afterwards.
type CommitOptions struct {
	// Depth is how many levels below the image lies the disk that is written: 1, the default, is the backing file, 2
	// the backing file's own backing file, and so on. What all levels above it hold is written there. With a depth
	// beyond 1 the image is not emptied, and the images between it and the one that was written do not show any more
	// what they did: they are of no use but to this image. qemu-img commit -b does the same.
	Depth int
	// KeepOverlay leaves the image as it is, as qemu-img commit -d does. What it holds is in the backing file as well
	// then.
	KeepOverlay bool
	// Progress, if not nil, is called with the number of bytes of the image's disk that are done with, now and then and
	// at the end, by the goroutine that called Commit.
	Progress func(done, total int64)
}

// validate returns all options that are not allowed, joined, or nil.
func (o *CommitOptions) validate() error {
	if o.Depth < 0 {
		return &OptionError{Option: "Depth", Value: o.Depth, Reason: "must not be negative"}
	}
	return nil
}

// Commit writes what the image holds into its backing file, and empties the image then, unless opts says otherwise. The
// guest reads the same before, meanwhile and afterwards, whatever happens: a backing file changes only where the image
// hides it, what was written there is durable before the image is emptied, and that is atomic (MakeEmpty). What the
// image has as zeros becomes zeros in the backing file. A backing file that is smaller than the image grows first; one
// that is larger keeps what it has behind the image's end.
//
// Writes, syncs and other operations of the image wait meanwhile. Reads go on.
//
// A backing file that the library opened is open for reading. To write it, Commit asks the Resolver that opened it for it
// once more, with FileRef.Writable set, and takes over its lock, as a writer; nobody else gets
// the file in between. If that fails, the first opening stays as it was. If not, the second one takes its place, and
// keeps it: at the end of the call, also after an error, it has the lock of a reader again, and nothing is written to it
// any more. What Backing returned before is closed; ask for it again. A Disk of the caller's (OpenOptions.Backing) is
// written itself: it must be an *Image that is open for writing, a *RawDisk, or another WritableDisk.
//
// Internal snapshots of the image read the backing file where they hold nothing, and so find there what was committed;
// while one is open (OpenSnapshot) Commit is refused with ErrBusy.
//
// Errors: ErrNoBacking, ErrBusy, *OptionError, ErrReadOnly for a Disk of the caller's that cannot be written, ErrLocked where
// somebody else reads or writes the backing file, *ResolveError, ErrTooLarge and one that matches syscall.ENOSPC for a
// backing disk that cannot grow, those of opening the backing file for writing, of MakeEmpty, of ctx and of the storages.
// After an error nothing has changed that a reader of the image could see: it is not emptied, or it is
// and everything is in the backing file. The backing file may hold a part of the image's content, and may have
// grown. Another call does the rest.
func (img *Image) Commit(ctx context.Context, opts *CommitOptions) error {
	var o CommitOptions
	if opts != nil {
		o = *opts
	}
	err := o.validate()
	if err == nil {
		o.Depth = max(o.Depth, 1)
		err = img.exclusively(func() error { return img.commit(ctx, &o) })
	}
	if err != nil {
		return fmt.Errorf("qcow2: commit: %w", err)
	}
	return nil
}

// commit is Commit within exclusively.
//
// Order: what the base is to hold, its sync; the overlay is emptied, in the order of MakeEmpty. Until the base is
// durable the overlay stays as it is and hides all of the base that changes, so a crash or an error leaves what was
// there; from then on either of them gives the same content.
func (img *Image) commit(ctx context.Context, o *CommitOptions) error {
	img.chainMu.Lock()
	defer img.chainMu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	empties := !o.KeepOverlay && o.Depth == 1
	if empties && img.hdr.rawData() {
		return fmt.Errorf("%w: to empty an image whose raw data file must always read as the disk", ErrUnsupported)
	}
	img.mu.Lock()
	err := img.openSnapshots()
	img.mu.Unlock()
	if err != nil {
		return err
	}
	base, err := img.takeBase(o.Depth)
	if err != nil {
		return err
	}
	c := &committer{ctx: ctx, img: img, base: base.disk, o: o}
	err = c.run()
	if early := img.wb.test.emptyOrder == commitOverlayEarly; err == nil && early {
		err = img.makeEmpty(ctx)
	}
	if err == nil {
		err = base.sync()
	}
	if err = errors.Join(err, base.end()); err != nil {
		return err
	}
	if !empties {
		return nil
	}
	// The content is in the base: a late cancellation changes nothing any more.
	return img.makeEmpty(context.WithoutCancel(ctx))
}

// committer is one Commit in progress: it copies.
type committer struct {
	ctx  context.Context
	img  *Image
	base WritableDisk
	o    *CommitOptions
}

// run makes the base as large as the image, and writes what is above the base into it.
func (c *committer) run() error {
	total := c.img.Size()
	if err := growDisk(c.ctx, c.base, total); err != nil {
		return fmt.Errorf("grow the backing disk to %d bytes: %w", total, err)
	}
	// Pieces are read ahead, and written in order by this goroutine: what the base looks like does not depend on who was
	// faster. What is written hides nothing that is still to be read, for all of that lies above the base.
	pieces := make([]commitPiece, min(runtime.GOMAXPROCS(0), maxCommitReaders)+1)
	for i := range pieces {
		pieces[i].read = make(chan struct{}, 1)
	}
	ctx, cancel := context.WithCancel(c.ctx)
	jobs := make(chan *commitPiece, len(pieces))
	var readers sync.WaitGroup
	for range len(pieces) - 1 {
		readers.Add(1)
		go func() {
			defer readers.Done()
			for p := range jobs {
				if err := p.fill(ctx, c); err != nil {
					p.err = err // it comes before what ended the search
				}
				p.read <- struct{}{}
			}
		}()
	}
	defer readers.Wait()
	defer close(jobs)
	defer cancel()
	next, stop := iter.Pull2(c.img.extents(0, total))
	defer stop()
	scan := &commitScan{ctx: ctx, next: next, depth: c.o.Depth}
	found, written := 0, 0
	for {
		for found-written < len(pieces) && !scan.done {
			if p := &pieces[found%len(pieces)]; scan.piece(p) {
				jobs <- p
				found++
			}
		}
		if written == found {
			break
		}
		p := &pieces[written%len(pieces)]
		<-p.read
		if err := c.write(p); err != nil {
			return err
		}
		written++
		if c.o.Progress != nil && p.end < total {
			c.o.Progress(p.end, total)
		}
	}
	if c.o.Progress != nil {
		c.o.Progress(total, total)
	}
	return nil
}

const (
	// maxCommitReaders is how many pieces of convertChunk bytes are read at once at most.
	maxCommitReaders = 4
	// maxCommitZeros is the most zeros that a piece has, in bytes, so that a cancellation is heard.
	maxCommitZeros = 1 << 30
)

// commitPiece is a piece of the disk on its way into the base.
type commitPiece struct {
	off, end int64         // guest offset that buf begins at; up to which everything is in this piece, or before it
	parts    []commitPart  // what lies above the base, in order
	buf      []byte        // convertChunk bytes of the disk, as far as parts are data
	err      error         // what comes after the parts: an error of the search, or of reading, which leaves fewer of them
	read     chan struct{} // receives once the reader is done
}

// commitPart is a run of zeros or of data.
type commitPart struct {
	off, n int64
	zero   bool
}

// commitScan goes through the extents of the image, and finds what lies above the base.
type commitScan struct {
	ctx   context.Context
	next  func() (Extent, error, bool)
	depth int    // of the base
	e     Extent // the rest of the last one; Len is 0 where nothing is left
	done  bool   // there is no more
}

// piece makes p the next piece, with an error perhaps. It reports whether there is one. The data of a piece lies within
// convertChunk bytes from a multiple of that on, so that no cluster is unpacked twice. What nobody holds above the base,
// behind the end of a disk in between, hides the base as zeros do.
func (s *commitScan) piece(p *commitPiece) bool {
	p.parts, p.err = p.parts[:0], nil
	for {
		if s.e.Len == 0 {
			e, err, ok := s.next()
			if err == nil {
				err = s.ctx.Err()
			}
			if s.done = !ok || err != nil; s.done {
				p.err = err
				return len(p.parts) > 0 || err != nil
			}
			if e.Depth >= s.depth {
				continue
			}
			s.e = e
		}
		part := commitPart{off: s.e.Off, n: s.e.Len, zero: s.e.Kind.readsZero()}
		if len(p.parts) == 0 {
			p.off = part.off - part.off%convertChunk
		}
		end := p.off + convertChunk
		switch {
		case part.off >= end:
			return true
		case part.zero && len(p.parts) == 0:
			part.n = min(part.n, maxCommitZeros)
		default:
			part.n = min(part.n, end-part.off)
		}
		s.e.Off, s.e.Len = s.e.Off+part.n, s.e.Len-part.n
		p.end = part.off + part.n
		if last := len(p.parts) - 1; last >= 0 && p.parts[last].zero == part.zero && p.parts[last].off+p.parts[last].n == part.off {
			p.parts[last].n += part.n
		} else {
			p.parts = append(p.parts, part)
		}
	}
}

// fill reads the data of a piece. It cuts the parts before the one with an error.
func (p *commitPiece) fill(ctx context.Context, c *committer) error {
	for i, part := range p.parts {
		if part.zero {
			continue
		}
		if err := ctx.Err(); err != nil {
			p.parts = p.parts[:i]
			return err
		}
		if p.buf == nil {
			p.buf = make([]byte, convertChunk)
		}
		data := p.data(part)
		n, err := c.img.readAt(data, part.off)
		if err := filled(n, len(data), err); err != nil {
			p.parts = p.parts[:i]
			return err
		}
	}
	return nil
}

// data returns the place in buf of a part.
func (p *commitPiece) data(part commitPart) []byte { return p.buf[part.off-p.off:][:part.n] }

// write writes a piece that was read into the base, and returns what ended its reading.
func (c *committer) write(p *commitPiece) error {
	for _, part := range p.parts {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if part.zero {
			if err := c.zero(part.off, part.n); err != nil {
				return err
			}
			continue
		}
		if _, err := c.base.WriteAt(p.data(part), part.off); err != nil {
			return fmt.Errorf("backing disk: %w", err)
		}
	}
	return p.err
}

// zero makes n bytes at off of the base read as zeros, where they do not.
func (c *committer) zero(off, n int64) error {
	for e, err := range extentsOf(c.base, off, n) {
		if err != nil {
			return fmt.Errorf("backing disk: %w", err)
		}
		if e.Kind == ExtentZero || e.Kind == ExtentUnallocated {
			continue
		}
		if err := c.writeZeros(e.Off, e.Len); err != nil {
			return fmt.Errorf("backing disk: %w", err)
		}
	}
	return nil
}

// writeZeros writes n zeros at off of the base.
func (c *committer) writeZeros(off, n int64) error {
	if image, ok := c.base.(*Image); ok {
		return image.WriteZeroes(off, n, ZeroMayUnmap)
	}
	for n > 0 {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		k := min(n, int64(len(zeroChunk)))
		if _, err := c.base.WriteAt(zeroChunk[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// growDisk makes d at least size bytes long. What is new reads as zeros.
func growDisk(ctx context.Context, d WritableDisk, size int64) error {
	if d.Size() >= size {
		return nil
	}
	switch d := d.(type) {
	case *Image:
		return d.Resize(ctx, size, nil)
	case *RawDisk:
		return d.grow(size)
	}
	return fmt.Errorf("%w: it has %d bytes, and cannot grow", ErrTooLarge, d.Size())
}

// grow makes the disk size bytes long. Bytes that its storage did not have read as zeros.
func (d *RawDisk) grow(size int64) error {
	if d.s.FixedSize() {
		return fmt.Errorf("a device of %d bytes: %w", d.Size(), syscall.ENOSPC)
	}
	if err := d.s.Truncate(size); err != nil {
		return err
	}
	d.size.Store(size)
	return nil
}
