package qcow2

import "iter"

// extentPair goes through the extents of two disks side by side.
type extentPair struct {
	sides [2]extentSide
}

// extentSide is the extents of one disk on the way.
type extentSide struct {
	next func() (Extent, error, bool)
	stop func()
	end  int64 // guest offset at which next ends
	e    Extent
	last int64 // guest offset up to which e holds
}

// newExtentPair returns the extents of a and b from guest offset off up to end. A disk may be nil: it has no bytes. The
// caller calls stop.
func newExtentPair(a, b Disk, off, end int64) *extentPair {
	p := new(extentPair)
	for i, d := range [2]Disk{a, b} {
		s := &p.sides[i]
		s.last, s.stop = off, func() {}
		if d != nil {
			if s.end = min(d.Size(), end); s.end > off {
				s.next, s.stop = iter.Pull2(checkedExtents(d, off, s.end-off))
			}
		}
	}
	return p
}

// stop ends both.
func (p *extentPair) stop() {
	for i := range p.sides {
		p.sides[i].stop()
	}
}

// seek makes each side's e the extent at off, and returns the offset up to which both hold. Past its end a disk has an
// unallocated one without end. An error is that of the given side. Precondition: off does not go back.
func (p *extentPair) seek(off int64) (last int64, side int, err error) {
	for i := range p.sides {
		if err := p.sides[i].seek(off); err != nil {
			return 0, i, err
		}
	}
	return min(p.sides[0].last, p.sides[1].last), 0, nil
}

// seek is that of the pair, for one side.
func (s *extentSide) seek(off int64) error {
	for off >= s.last {
		if off >= s.end {
			s.e, s.last = Extent{Off: off, HostOff: -1}, 1<<63-1
			return nil
		}
		e, err, ok := s.next()
		if !ok {
			return errBadExtents
		}
		if err != nil {
			return err
		}
		s.e, s.last = e, e.Off+e.Len
	}
	return nil
}
