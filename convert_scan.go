package qcow2

import (
	"context"
	"slices"
)

// Convert's view of the source: its extents, in pieces that are copied one by one.

// pieceClass says what is to be done with guest bytes.
type pieceClass uint8

const (
	classCopy   pieceClass = iota // they are read, and written unless they turn out to be zeros
	classZero                     // they read as zeros
	classShared                   // what lies below the target gives them
)

// guestSpan is a range of guest bytes.
type guestSpan struct{ off, n int64 }

// sourceRun is a range of the source that is read. Its bytes lie at hostOff in host, if that is not nil, so that they may
// be copied there without being read.
type sourceRun struct {
	guestSpan
	host    *FileStorage
	hostOff int64
}

// follows reports whether r goes on where x ends.
func (r *sourceRun) follows(x *sourceRun) bool {
	return r.off == x.off+x.n && r.host == x.host && (r.host == nil || r.hostOff == x.hostOff+x.n)
}

// cut returns the part of r from off on, with n bytes.
func (r *sourceRun) cut(off, n int64) sourceRun {
	return sourceRun{guestSpan{off, n}, r.host, r.hostOff + off - r.off}
}

// appendRun appends x, joined with the last one where it follows.
func appendRun(runs []sourceRun, x sourceRun) []sourceRun {
	if k := len(runs); k > 0 && x.follows(&runs[k-1]) {
		runs[k-1].n += x.n
		return runs
	}
	return append(runs, x)
}

// piecePart is a run of a piece of one class.
type piecePart struct {
	guestSpan
	class pieceClass
}

// piece is a run of guest bytes that one worker copies. Pieces follow each other in guest order, within cells of the
// converter's piece size; one without a byte to copy may span many cells.
type piece struct {
	guestSpan
	seq   int64       // its number, from 0
	parts []piecePart // all of it, in order
	reads []sourceRun // what of the source the parts to copy are made of; the rest of them is zeros

	buf    *pieceBuffers // content, from off on; nil where nothing is copied
	loaded bool          // the content was read; else the host copies it
	// Of an image as target, between place and writeImage:
	holds []*clusterHold // host clusters set aside
	owned []guestSpan    // to be written in place

	err error // how it ended
}

// data returns the content of a part, or of anything within the piece.
func (p *piece) data(s guestSpan) []byte { return p.buf.data[s.off-p.off:][:s.n] }

// copies reports whether anything of the piece is copied.
func (p *piece) copies() bool {
	return slices.ContainsFunc(p.parts, func(x piecePart) bool { return x.class == classCopy })
}

// scanner makes pieces of extents.
type scanner struct {
	c    *converter
	emit func(*piece) error
	seq  int64
	cur  *piece // the piece that is being made; nil at the start of a cell

	// The unit that the extents so far end in, if they end within one.
	open  []sourceRun // what of it would be read
	zeros int64       // bytes of it that are zeros
	share int64       // bytes of it that are shared
	start int64       // its guest offset
	n     int64       // bytes of it so far
}

// scan emits the pieces of the whole target, in order.
func (c *converter) scan(ctx context.Context, emit func(*piece) error) error {
	s := &scanner{c: c, emit: emit}
	for e, err := range wholeExtents(ctx, c.src.Extents(0, c.total), c.total) {
		if err != nil {
			return err
		}
		class := classCopy
		switch {
		case c.opts.SharedDepth > 0 && e.Depth >= c.opts.SharedDepth:
			class = classShared
		case c.opts.Zeroes == ZeroesData:
			// Zeros are data that need not be read.
		case e.Kind == ExtentZero || e.Kind == ExtentUnallocated:
			class = classZero
		}
		read := e.Kind != ExtentZero && e.Kind != ExtentUnallocated
		run := sourceRun{guestSpan: guestSpan{e.Off, e.Len}}
		if c.offload && e.Kind == ExtentData && e.HostOff >= 0 {
			run.host, run.hostOff = sourceFile(c.src, e.Depth), e.HostOff
		}
		if err := s.add(run, class, read); err != nil {
			return err
		}
	}
	if c.opts.KeepRest {
		return s.finish()
	}
	// What lies behind the end of the source is zeros.
	class := classZero
	if c.opts.Zeroes == ZeroesData {
		class = classCopy
	}
	if err := s.add(sourceRun{guestSpan: guestSpan{c.total, c.dst.Size() - c.total}}, class, false); err != nil {
		return err
	}
	return s.finish()
}

// add takes the next extent.
func (s *scanner) add(x sourceRun, class pieceClass, read bool) error {
	unit := s.c.unit
	for x.n > 0 {
		k := x.n
		if in := x.off % unit; in != 0 || k < unit {
			k = min(k, unit-in)
			s.addOpen(x.cut(x.off, k), class, read)
			if (x.off+k)%unit == 0 {
				if err := s.closeUnit(); err != nil {
					return err
				}
			}
		} else {
			k -= k % unit
			var reads []sourceRun
			if read {
				reads = append(reads, x.cut(x.off, k))
			}
			if err := s.addUnits(guestSpan{x.off, k}, class, reads); err != nil {
				return err
			}
		}
		x = x.cut(x.off+k, x.n-k)
	}
	return nil
}

// addOpen adds a part of a unit.
func (s *scanner) addOpen(x sourceRun, class pieceClass, read bool) {
	if s.n == 0 {
		s.start = x.off
	}
	s.n += x.n
	switch class {
	case classZero:
		s.zeros += x.n
	case classShared:
		s.share += x.n
	}
	if read {
		s.open = appendRun(s.open, x)
	}
}

// closeUnit decides about the open unit: it is copied whole unless all of it is zeros, or all of it is shared.
func (s *scanner) closeUnit() error {
	if s.n == 0 {
		return nil
	}
	x, class := guestSpan{s.start, s.n}, classCopy
	switch s.n {
	case s.zeros:
		class = classZero
	case s.share:
		class = classShared
	}
	reads := s.open
	s.open, s.zeros, s.share, s.n = nil, 0, 0, 0
	return s.addUnits(x, class, reads)
}

// appendSpan appends x, joined with the last one where they meet.
func appendSpan(spans []guestSpan, x guestSpan) []guestSpan {
	if k := len(spans); k > 0 && spans[k-1].off+spans[k-1].n == x.off {
		spans[k-1].n += x.n
		return spans
	}
	return append(spans, x)
}

// addUnits adds whole units of one class, of which reads are read.
func (s *scanner) addUnits(x guestSpan, class pieceClass, reads []sourceRun) error {
	cell := s.c.piece
	for x.n > 0 {
		k := min(x.n, cell-x.off%cell)
		if s.cur == nil && class != classCopy && x.off%cell == 0 && x.n >= cell {
			k = x.n - x.n%cell
		}
		if s.cur == nil {
			s.cur = &piece{guestSpan: guestSpan{off: x.off}, seq: s.seq}
		}
		p := s.cur
		p.n += k
		if last := len(p.parts) - 1; last >= 0 && p.parts[last].class == class {
			p.parts[last].n += k
		} else {
			p.parts = append(p.parts, piecePart{guestSpan{x.off, k}, class})
		}
		if class == classCopy {
			var mine []sourceRun
			mine, reads = cutRuns(reads, x.off+k)
			for _, r := range mine {
				p.reads = appendRun(p.reads, r)
			}
		}
		x.off, x.n = x.off+k, x.n-k
		if x.off%cell == 0 {
			if err := s.finishPiece(); err != nil {
				return err
			}
		}
	}
	return nil
}

// cutRuns returns what of the runs lies before off, and the rest.
func cutRuns(runs []sourceRun, off int64) (before, rest []sourceRun) {
	for i, x := range runs {
		switch {
		case x.off >= off:
			return before, runs[i:]
		case x.off+x.n > off:
			before = append(before, x.cut(x.off, off-x.off))
			return before, append([]sourceRun{x.cut(off, x.off+x.n-off)}, runs[i+1:]...)
		}
		before = append(before, x)
	}
	return before, nil
}

// finishPiece emits the piece that is being made.
func (s *scanner) finishPiece() error {
	p := s.cur
	if p == nil {
		return nil
	}
	s.cur = nil
	s.seq++
	return s.emit(p)
}

// finish emits what is left.
func (s *scanner) finish() error {
	if err := s.closeUnit(); err != nil {
		return err
	}
	return s.finishPiece()
}
