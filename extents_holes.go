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
//
// A hole says that a cluster reads as zeros only if the mapping that names the cluster was looked up before the storage
// was asked, and the cluster was not given back in between: it might be punched by then, or, when the answer is older,
// another one's that was written since. So an answer holds for what one look-up found, and is asked for while none of
// those clusters can have been given back: within the request of the look-up, or in the same epoch of requests.
type hostHoles struct {
	state      preallocatedState
	epoch      uint64 // of the requests, from before the look-up
	from       int64  // host offset from which the answer holds
	start, end int64  // the first data at or after from; from end on nothing is known
}

// begin forgets the answer: a look-up follows, by a request that is registered.
func (h *hostHoles) begin(img *Image) {
	h.epoch = img.reqs.epoch.Load()
	h.from, h.start, h.end = 0, 0, 0
}

// found asks about the n bytes at host offset off, which the look-up has found to be data. Precondition: the caller is the
// request of the look-up.
func (h *hostHoles) found(img *Image, off, n int64) {
	if h.state == preallocatedUnknown {
		h.state = img.looksPreallocated()
	}
	if h.state == preallocatedYes {
		h.ask(img, off, n)
	}
}

// ask asks the storage about the n bytes at host offset off. What it does not tell is data.
func (h *hostHoles) ask(img *Image, off, n int64) {
	h.from = off
	start, end, err := img.data.s.NextData(off)
	switch {
	case errors.Is(err, io.EOF):
		h.start, h.end = math.MaxInt64, math.MaxInt64
	case err != nil || end <= off || start >= end:
		h.start, h.end = off, off+n
	default:
		h.start, h.end = max(start, off), end
	}
}

// at returns how many of the n bytes at host offset off are of one kind, and whether they are a hole. It reports false if
// the look-up is too old to ask about what it found.
func (h *hostHoles) at(img *Image, off, n int64) (k int64, hole, ok bool) {
	if off < h.from || off >= h.end {
		// What was dropped since the look-up is given back by a cut that ends the epoch, and after the requests of that
		// epoch: this one among them, if the epoch is still the same.
		defer img.reqs.leave(img.reqs.enter())
		if img.reqs.epoch.Load() != h.epoch {
			return 0, false, false
		}
		h.ask(img, off, n)
	}
	if off < h.start {
		return min(n, h.start-off), true, true
	}
	return min(n, h.end-off), false, true
}

// yieldData yields e, which the image maps as data, with its holes apart if the image looks preallocated. It returns how
// many bytes of it are done, and whether to go on. Where it is less than all, the rest is to be looked up again.
func (w *tableWalk) yieldData(e Extent, yield func(Extent, error) bool) (n int64, goOn bool) {
	if w.holes.state != preallocatedYes {
		return e.Len, yield(e, nil)
	}
	for n < e.Len {
		part := e
		part.Off, part.HostOff = e.Off+n, e.HostOff+n
		k, hole, ok := w.holes.at(w.img, part.HostOff, e.Len-n)
		if !ok {
			w.forget()
			return n, true
		}
		if part.Len, part.Hole = k, hole; hole {
			part.Kind = ExtentZero
		}
		if !yield(part, nil) {
			return n, false
		}
		n += k
	}
	return n, true
}

// looksPreallocated says whether the image uses more clusters than its file takes space for, by the rule of Extents. What
// cannot be found out counts as no: it is about speed, and nobody's content. Precondition: the caller is a registered
// request.
func (img *Image) looksPreallocated() preallocatedState {
	if s := preallocatedState(img.preallocated.Load()); s != preallocatedUnknown {
		return s
	}
	s := preallocatedNo
	if img.usesMoreThanTaken() {
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
