package qcow2

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
)

// inPlaceRun is a run of guest clusters that follow each other in the host file, or that are zero clusters.
type inPlaceRun struct {
	guest uint64 // first guest cluster
	host  uint64 // first host cluster, or one of the two below
	n     uint64 // clusters
}

// What stands in place of a host cluster: none of them is below 2^55.
const (
	hostZero  = ^uint64(0)     // zero clusters
	hostMoved = ^uint64(0) - 1 // one cluster that is copied, and has no place yet
)

// inPlaceRunBytes is the memory for a run: it is sorted in two ways.
const inPlaceRunBytes = 2 * 24

// movedCluster is a guest cluster that cannot stay where it is: that in the place of the header, or the last one,
// where something else stands behind the end of the disk.
type movedCluster struct {
	host uint64 // host cluster where it is
	n    uint64 // bytes of it that are the disk's; the rest becomes zeros
	run  int    // index of its run
}

// AlignError is a range of a disk that cannot stay where it is in its file. It Is ErrNotAligned.
type AlignError struct {
	Off         int64  // guest offset in bytes
	HostOff     int64  // host offset in bytes, or -1
	ClusterSize int    // in bytes: the only one, or the last, that was tried
	Reason      string // what speaks against it

	always bool // with clusters of any size
}

func (e *AlignError) Error() string {
	s := fmt.Sprintf("guest %#x", e.Off)
	if e.HostOff >= 0 {
		s += fmt.Sprintf(", at host %#x,", e.HostOff)
	}
	s = fmt.Sprintf("%s %s with clusters of %d bytes: use Convert", s, e.Reason, e.ClusterSize)
	if !e.always && e.ClusterSize > sectorSize {
		s += ", or ask for smaller clusters"
	}
	return s
}

// Is reports whether target is ErrNotAligned.
func (e *AlignError) Is(target error) bool { return target == ErrNotAligned }

// partKind is what a part of the disk is to the image.
type partKind uint8

const (
	partData    partKind = iota // it stands in the file
	partZero                    // it reads as zeros
	partThrough                 // it shows the backing file, or zeros without one
)

// diskPart is a part of the disk.
type diskPart struct {
	kind partKind
	off  uint64 // guest offset
	n    uint64 // bytes
	host uint64 // host offset of data
}

// layoutReader makes runs of clusters of the extents of a layout. It is used once.
type layoutReader struct {
	h       *hostFile // the file, which is only read
	g       geometry
	length  uint64 // of the file in bytes
	size    uint64 // of the layout's disk in bytes; the image's ends with a whole sector
	backing bool   // the image has a backing file
	holes   bool   // what is zero in the layout reads as zeros in its place in the file, too
	maxRuns int

	runs     []inPlaceRun // sorted by guest clusters
	moved    []movedCluster
	lastUsed bool // the last sector of the file belongs to the disk

	// The guest cluster in the making, if it is not in one piece.
	data bool       // it has some
	host uint64     // host cluster of the data
	zero bool       // it has parts that are zero
	open bool       // it has parts that show through
	gaps []diskPart // all that is no data
}

// fail returns the error for a part of the disk that these clusters do not suit.
func (r *layoutReader) fail(p diskPart, reason string) *AlignError {
	e := &AlignError{Off: int64(p.off), HostOff: noOffset, ClusterSize: int(r.g.clusterSize), Reason: reason}
	if p.kind == partData {
		e.HostOff = int64(p.host)
	}
	return e
}

// read reads all of the layout.
func (r *layoutReader) read(ctx context.Context, src Layout) error {
	next, size := int64(0), int64(r.size)
	for e, err := range src.Extents(0, size) {
		if err == nil && (e.Off != next || e.Len <= 0 || e.Len > size-next) {
			err = errBadExtents
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		next += e.Len
		p, err := r.partOf(e)
		if err != nil {
			return err
		}
		if err := r.add(p); err != nil {
			return err
		}
	}
	if next != size {
		return errBadExtents
	}
	if r.g.offsetInCluster(r.size) != 0 {
		// Bytes that are missing to a whole sector become the disk's, as zeros.
		r.zero = r.zero || r.size%sectorSize != 0 && !r.data
		if err := r.endCluster(r.size >> r.g.clusterBits); err != nil {
			return err
		}
	}
	return r.checkShared()
}

// partOf returns what an extent is to the image.
func (r *layoutReader) partOf(e Extent) (diskPart, error) {
	p := diskPart{kind: partThrough, off: uint64(e.Off), n: uint64(e.Len), host: uint64(e.HostOff)}
	switch {
	case e.Depth > 0:
		if !r.backing && e.Kind != ExtentUnallocated {
			return p, &OptionError{Option: "BackingFile", Value: "", Reason: fmt.Sprintf("guest %#x shows the backing file of the source", e.Off)}
		}
		return p, nil
	case e.Kind == ExtentUnallocated:
		return p, nil
	case e.Kind == ExtentZero:
		p.kind = partZero
	case e.Kind == ExtentData && e.HostOff >= 0:
		p.kind = partData
		end := roundUpSector(r.length)
		if p.host > end || p.n > end-p.host {
			return p, &CorruptError{
				What:     fmt.Sprintf("%d bytes of the disk are to end within a file of %d bytes, and begin", e.Len, r.length),
				HostOff:  e.HostOff,
				GuestOff: e.Off,
			}
		}
	default:
		err := r.fail(p, "does not stand in the file as it is,")
		err.always = true
		return p, err
	}
	if e.HostOff >= 0 && r.length >= sectorSize && p.host < r.length && p.n > r.length-sectorSize-min(p.host, r.length-sectorSize) {
		r.lastUsed = true
	}
	return p, nil
}

// add takes the next part of the disk.
func (r *layoutReader) add(p diskPart) error {
	for p.n > 0 {
		in := r.g.offsetInCluster(p.off)
		n := min(p.n, r.g.clusterSize-in)
		if whole := p.n >> r.g.clusterBits; in == 0 && whole > 0 {
			n = whole << r.g.clusterBits
			if err := r.addWhole(p, whole); err != nil {
				return err
			}
		} else {
			if err := r.addPiece(p, in, n); err != nil {
				return err
			}
			if in+n == r.g.clusterSize {
				if err := r.endCluster(p.off >> r.g.clusterBits); err != nil {
					return err
				}
			}
		}
		p.off, p.host, p.n = p.off+n, p.host+n, p.n-n
	}
	return nil
}

// addWhole takes n whole clusters at the beginning of p.
func (r *layoutReader) addWhole(p diskPart, n uint64) error {
	guest, host := p.off>>r.g.clusterBits, p.host>>r.g.clusterBits
	switch p.kind {
	case partThrough:
		return nil
	case partZero:
		return r.addZero(guest, n)
	}
	if r.g.offsetInCluster(p.host) != 0 {
		return r.fail(p, "does not begin at a cluster")
	}
	if host == 0 {
		if err := r.move(guest, 0, r.g.clusterSize); err != nil {
			return err
		}
		guest, host, n = guest+1, 1, n-1
	}
	return r.addRun(inPlaceRun{guest: guest, host: host, n: n})
}

// addPiece takes n bytes at the beginning of p, which lie at in of a guest cluster, and are not all of it.
func (r *layoutReader) addPiece(p diskPart, in, n uint64) error {
	switch p.kind {
	case partZero:
		r.zero = true
	case partThrough:
		r.open = true
	case partData:
		host := p.host >> r.g.clusterBits
		switch {
		case r.g.offsetInCluster(p.host) != in:
			return r.fail(p, "does not lie in its cluster as in the guest's")
		case r.data && host != r.host:
			return r.fail(p, "is not in one cluster with what is before it")
		}
		r.data, r.host = true, host
		return nil
	}
	if k := len(r.gaps); k > 0 && r.gaps[k-1].off+r.gaps[k-1].n == in && r.gaps[k-1].kind == p.kind {
		r.gaps[k-1].n += n
		return nil
	}
	r.gaps = append(r.gaps, diskPart{kind: p.kind, off: in, n: n})
	return nil
}

// endCluster makes a guest cluster of the pieces that were taken.
func (r *layoutReader) endCluster(guest uint64) error {
	gaps := r.gaps
	data, host, zero, open := r.data, r.host, r.zero, r.open
	r.data, r.zero, r.open, r.gaps = false, false, false, gaps[:0]
	at := diskPart{kind: partThrough, off: guest << r.g.clusterBits}
	switch {
	case open && r.backing && (zero || data):
		return r.fail(at, "shows the backing file in a part of the cluster")
	case !data && zero:
		return r.addZero(guest, 1)
	case !data:
		return nil
	}
	at.kind, at.host = partData, host<<r.g.clusterBits
	for _, gap := range gaps {
		if gap.kind == partZero && r.holes {
			continue
		}
		if zero, err := r.readsZero(at.host+gap.off, gap.n); err != nil {
			return err
		} else if !zero {
			return r.fail(at, "has something else between its data")
		}
	}
	n := min(r.g.clusterSize, r.size-at.off)
	tail, err := r.readsZero(at.host+n, r.g.clusterSize-n)
	switch {
	case err != nil:
		return err
	case host == 0 || !tail:
		return r.move(guest, host, n)
	}
	return r.addRun(inPlaceRun{guest: guest, host: host, n: 1})
}

// readsZero reports whether n bytes of the file at host offset off are zero.
func (r *layoutReader) readsZero(off, n uint64) (bool, error) {
	buf := getBuffer(uint64(len(zeroChunk)))
	defer putBuffer(buf)
	for end := min(off+n, r.length); off < end; {
		p := (*buf)[:min(end-off, uint64(len(*buf)))]
		if err := r.h.readFull(p, off); err != nil {
			return false, err
		}
		if !bytes.Equal(p, zeroChunk[:len(p)]) {
			return false, nil
		}
		off += uint64(len(p))
	}
	return true, nil
}

// addZero takes n guest clusters that read as zeros: without a backing file, unallocated ones do.
func (r *layoutReader) addZero(guest, n uint64) error {
	if !r.backing {
		return nil
	}
	return r.addRun(inPlaceRun{guest: guest, host: hostZero, n: n})
}

// move takes a guest cluster that is to be copied from a host cluster, of which n bytes are its content.
func (r *layoutReader) move(guest, host, n uint64) error {
	for _, m := range r.moved {
		if m.host == host {
			return r.failShared(guest, host)
		}
	}
	r.moved = append(r.moved, movedCluster{host: host, n: n, run: len(r.runs)})
	r.runs = append(r.runs, inPlaceRun{guest: guest, host: hostMoved, n: 1})
	return nil
}

// addRun takes a run.
func (r *layoutReader) addRun(run inPlaceRun) error {
	if run.n == 0 {
		return nil
	}
	if k := len(r.runs); k > 0 {
		last := &r.runs[k-1]
		zero, moved := last.host == hostZero, last.host == hostMoved
		if last.guest+last.n == run.guest && !moved && (zero && run.host == hostZero || !zero && last.host+last.n == run.host) {
			last.n += run.n
			return nil
		}
	}
	if len(r.runs) >= r.maxRuns {
		return &LimitError{
			Limit: "MetadataBytes", Max: int64(r.maxRuns) * inPlaceRunBytes, Value: int64(len(r.runs)+1) * inPlaceRunBytes,
		}
	}
	r.runs = append(r.runs, run)
	return nil
}

// byHost returns the runs that have a place in the file, sorted by it.
func byHost(runs []inPlaceRun) []inPlaceRun {
	var s []inPlaceRun
	for _, run := range runs {
		if run.host < hostMoved {
			s = append(s, run)
		}
	}
	slices.SortFunc(s, func(a, b inPlaceRun) int { return cmp.Compare(a.host, b.host) })
	return s
}

// checkShared refuses a host cluster that holds two guest clusters.
func (r *layoutReader) checkShared() error {
	end := uint64(0)
	for _, run := range byHost(r.runs) {
		if run.host < end {
			return r.failShared(run.guest, run.host)
		}
		end = run.host + run.n
	}
	return nil
}

// failShared returns the error for a guest cluster whose host cluster holds another one.
func (r *layoutReader) failShared(guest, host uint64) error {
	return r.fail(diskPart{kind: partData, off: guest << r.g.clusterBits, host: host << r.g.clusterBits}, "shares its cluster with another place of the disk,")
}
