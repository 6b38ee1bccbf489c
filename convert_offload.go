package qcow2

import (
	"context"
	"errors"

	"github.com/go-qcow2/qcow2/internal/hostfile"
)

// Data that need not be looked at goes from file to file within the host, which may let the two share the space. Both
// must be a FileStorage itself: a wrapper of one sees all reads and writes, so what lies in it is read and written.

// sourceFile returns the file that holds the data of a layer of d, or nil: it is no FileStorage, or it may be written
// meanwhile, so that a host offset need not stay what it is.
func sourceFile(d Disk, depth int) *FileStorage {
	switch d := d.(type) {
	case *SnapshotDisk:
		return sourceFile(d.disk, depth)
	case *Image:
		if depth > 0 {
			return sourceFile(d.lower().disk, depth-1)
		}
		if !d.readOnly.Load() {
			return nil
		}
		s, _ := d.data.s.(*FileStorage)
		return s
	case *ForeignDisk:
		if depth > 0 {
			return sourceFile(d.below.disk, depth-1)
		}
		s, _ := d.host.s.(*FileStorage)
		return s
	case *RawDisk:
		s, _ := d.s.(*FileStorage)
		return s
	case *ownedRaw:
		return sourceFile(d.RawDisk, depth)
	}
	return nil
}

// targetFile returns the file that the data of the target goes to, or nil.
func (c *converter) targetFile() *FileStorage {
	var s Storage
	if c.image != nil {
		s = c.image.data.s
	} else if raw, ok := c.dst.(*RawDisk); ok {
		s = raw.s
	}
	f, _ := s.(*FileStorage)
	return f
}

// mayOffload reports whether the host may copy data: where all of it is written as it is, or where whole clusters are
// looked at, which show by their beginning that they are not zeros. Groups of zeros of some KiB are found by reading.
func (c *converter) mayOffload() bool {
	return !c.opts.Compress && c.targetFile() != nil && (c.detect == 0 || c.detect >= probeGroup)
}

const (
	probeGroup = 32 << 10 // the smallest group in bytes that is worth a look at its beginning
	probeBytes = 512      // what is looked at
)

// probe decides what of a piece is zeros without reading all of it. It reports whether that could be done: if not, the
// piece is to be read.
func (c *converter) probe(p *piece) bool {
	if !c.offload || c.noOffload.Load() {
		return false
	}
	covered := int64(0)
	for _, r := range p.reads {
		if r.host == nil {
			return false
		}
		covered += r.n
	}
	for _, x := range p.parts {
		if x.class == classCopy {
			covered -= x.n
		}
	}
	if covered != 0 {
		return false // there are zeros between the reads
	}
	if c.detect == 0 || c.opts.Zeroes == ZeroesData {
		return true
	}
	for _, x := range p.parts {
		if x.class != classCopy {
			continue
		}
		for pos, end := x.off, x.off+x.n; pos < end; pos += c.detect - pos%c.detect {
			b := p.data(guestSpan{pos, min(probeBytes, end-pos)})
			if readWhole(c.src, b, pos) != nil || isZero(b) {
				return false
			}
		}
	}
	return true
}

// offloadRange has the host copy the bytes of x to hostOff of the target's file. It reports false if it did not copy all
// of them; they are to be read and written then, which also tells why.
func (c *converter) offloadRange(p *piece, x guestSpan, hostOff int64) bool {
	dst := c.targetFile()
	for _, r := range p.reads {
		from, to := max(r.off, x.off), min(r.off+r.n, x.off+x.n)
		if from >= to {
			continue
		}
		n, err := hostfile.CopyRange(dst.f, r.host.f, hostOff+from-x.off, r.hostOff+from-r.off, to-from)
		if n == to-from && err == nil {
			continue
		}
		if errors.Is(err, errors.ErrUnsupported) {
			c.noOffload.Store(true)
		}
		return false
	}
	return true
}

// offloadChange is the host's way to write the data of a change of plain clusters. It reports whether it was gone; if
// not, the piece is in memory.
func (c *converter) offloadChange(ctx context.Context, p *piece, x guestSpan, ch *clusterChange) (bool, error) {
	if p.loaded {
		return false, nil
	}
	img, m := c.image, c.image.m
	hostOff := ch.run.first << m.clusterBits
	if x.n == int64(len(ch.changed))<<m.clusterBits {
		if err := img.data.claim(useData, x.off, hostOff, uint64(x.n)); err != nil {
			return false, err
		}
		if c.offloadRange(p, x, int64(hostOff)) {
			if m.extendedL2 {
				for i := range ch.changed {
					ch.changed[i].bitmap = bitmapAllocated
				}
			}
			return true, nil
		}
	}
	return false, c.load(ctx, p)
}
