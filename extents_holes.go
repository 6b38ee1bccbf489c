package qcow2

import (
	"errors"
	"io"
	"math"
)

// preallocatedState says whether an image looks as if its clusters had been mapped before they were written.
type preallocatedState int32

const (
	preallocatedUnknown preallocatedState = iota
	preallocatedNo
	preallocatedYes
)

// hostHoles finds holes of the host file in what an image maps as data. It keeps the last answer of the storage, which
// covers many runs where the file is in order. It is used by one goroutine.
type hostHoles struct {
	state      preallocatedState
	from       int64 // host offset from which the answer holds
	start, end int64 // the first data at or after from; from end on nothing is known
}

// yieldData yields e, which the image maps as data, with its holes apart if the image looks preallocated. It reports
// whether to go on.
func (w *tableWalk) yieldData(e Extent, yield func(Extent, error) bool) bool {
	h := &w.holes
	if h.state == preallocatedUnknown {
		h.state = w.img.looksPreallocated()
	}
	if h.state == preallocatedNo {
		return yield(e, nil)
	}
	for e.Len > 0 {
		part := e
		part.Len, part.Hole = h.at(w.img, e.HostOff, e.Len)
		if part.Hole {
			part.Kind = ExtentZero
		}
		if !yield(part, nil) {
			return false
		}
		e.Off, e.HostOff, e.Len = e.Off+part.Len, e.HostOff+part.Len, e.Len-part.Len
	}
	return true
}

// at returns how many of the n bytes at host offset off are of one kind, and whether they are a hole. What the storage
// does not tell is data.
func (h *hostHoles) at(img *Image, off, n int64) (k int64, hole bool) {
	if off < h.from || off >= h.end {
		h.from = off
		s := img.reqs.enter() // Close waits
		start, end, err := img.data.s.NextData(off)
		img.reqs.leave(s)
		switch {
		case errors.Is(err, io.EOF):
			h.start, h.end = math.MaxInt64, math.MaxInt64
		case err != nil || end <= off || start >= end:
			h.start, h.end = off, off+n
		default:
			h.start, h.end = max(start, off), end
		}
	}
	if off < h.start {
		return min(n, h.start-off), true
	}
	return min(n, h.end-off), false
}

// looksPreallocated says whether the image uses more clusters than its file takes space for, by the rule of Extents. What
// cannot be found out counts as no: it is about speed, and nobody's content.
func (img *Image) looksPreallocated() preallocatedState {
	if s := preallocatedState(img.preallocated.Load()); s != preallocatedUnknown {
		return s
	}
	defer img.reqs.leave(img.reqs.enter())
	s := preallocatedNo
	if img.readable() == nil && img.usesMoreThanTaken() {
		s = preallocatedYes
	}
	img.preallocated.Store(int32(s))
	return s
}

// usesMoreThanTaken is looksPreallocated for who is registered. It reads refcounts as the host holds them, until the
// answer is known: soon in an image that was preallocated, and never in a file without space to spare.
func (img *Image) usesMoreThanTaken() bool {
	m, s := img.m, img.host.s
	size, err := s.Size()
	if err != nil || size <= 0 {
		return false
	}
	taken, err := s.Allocated()
	if err != nil {
		return false
	}
	clusters := uint64(max(taken, 0)) >> m.clusterBits
	enough := max(clusters*10/9, clusters+2)
	end := m.clusters(uint64(size))
	if enough > end {
		return false
	}
	m.mu.Lock()
	g := m.geometry
	off, n := img.hdr.refTableOff, uint64(img.hdr.refTableClusters)<<g.clusterBits/8
	m.mu.Unlock()
	used := uint64(0)
	buf := getBuffer(g.clusterSize)
	defer putBuffer(buf)
	err = img.host.words(off, n, uint64(size), func(i, word uint64) error {
		first := i << g.refBlockBits
		if first >= end {
			return errEnough
		}
		block := word &^ (g.clusterSize - 1)
		if block >= maxHostOff {
			return errEnough // a broken table
		}
		if err := img.host.readFull(*buf, block); err != nil {
			return err
		}
		for j := range min(g.perBlock(), end-first) {
			if refcountAt(*buf, g.refcountOrder, j) != 0 {
				used++
			}
		}
		if used >= enough {
			return errEnough
		}
		return nil
	})
	return used >= enough && (err == nil || err == errEnough)
}

// errEnough ends a walk over words that has found what it looked for.
var errEnough = errors.New("enough")
