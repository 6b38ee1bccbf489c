package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
)

// A header that changes in more than fields of fixed places is rewritten so that a crash leaves the old one or the
// new one, whole: only the first sector of the file changes in one piece.
//
//	1  what the new header has behind the first sector, where the old one does not look,
//	   or where both have the same bytes                                                  sync
//	2  the first sector                                                                   sync
//
// Before step 2 is durable the old header reads what it always read: of a sector of step 1, any part may be new, and
// none of that is looked at. After it the new one reads what step 1 made durable. Where the new header would need
// bytes at which the old one looks, it is brought out of the way first, by the same two steps: the old header, with
// the backing name at another place or without the feature name table, means what it meant before. What takes
// more than maxHeaderSteps of them has no room.

// headerWrite is a write into the header's cluster.
type headerWrite struct {
	off uint64 // host offset in bytes
	p   []byte
}

// headerStep is one change of the header, from one valid header to another: first beside, sync, then sector, which
// lies within the first sector, sync. One without a sector only blanks what nobody looks at, and needs no sync.
type headerStep struct {
	beside []headerWrite
	sector headerWrite // p is empty if the first sector stays as it is
}

// maxHeaderSteps bounds the number of steps of a rewrite.
const maxHeaderSteps = 3

// headerImage is a header as it stands in its cluster.
type headerImage struct {
	h    *header
	b    []byte // the cluster; it may be cut off behind everything that matters
	room uint64 // as far as a backing name is placed, in bytes
	look []span // the bytes of it that a reader looks at
}

// newHeaderImage decodes the header in the cluster b.
func newHeaderImage(b []byte, fileSize int64) (*headerImage, error) {
	h, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, err
	}
	h.fileSize = fileSize
	m := &headerImage{h: h, b: b}
	m.look = []span{{lo: 0, hi: h.extensionsEnd(b)}}
	if n := uint64(len(h.backingNameRaw)); n > 0 {
		m.look = append(m.look, span{lo: h.backingOff, hi: h.backingOff + n})
	}
	return m, nil
}

// extensionsEnd returns where the extensions of the header, which was decoded from the cluster b, end: behind END, or
// where their area ends. The header is valid.
func (h *header) extensionsEnd(b []byte) uint64 {
	area := uint64(len(b))
	if h.backingOff != 0 {
		area = h.backingOff
	}
	off := uint64(h.headerLength)
	for off+extHeaderSize <= area {
		typ, n := binary.BigEndian.Uint32(b[off:]), uint64(binary.BigEndian.Uint32(b[off+4:]))
		off += extHeaderSize
		if typ == extEnd {
			return off
		}
		off += (n + 7) &^ 7
	}
	return min(off, area)
}

// clash returns the end of the first range that a reader of m looks at and in which p, at off, would change a byte
// behind the first sector; 0 if there is none. before is where that range begins.
func (m *headerImage) clash(p []byte, off uint64) (before, end uint64) {
	for _, s := range m.look {
		lo, hi := max(s.lo, off, sectorSize), min(s.hi, off+uint64(len(p)))
		if lo < hi && !bytes.Equal(m.b[lo:hi], p[lo-off:hi-off]) {
			return s.lo, s.hi
		}
	}
	return 0, 0
}

// namePlace says where a new place for the backing name is looked for.
type namePlace int

const (
	nameKept  namePlace = iota // where it is, if that is the same name; else nameFirst
	nameFirst                  // as far in front as can be
	nameLast                   // as far behind as can be
)

// place lays out the header h with the given extensions so that one step leads there from m, and returns it; nil if
// that cannot be. A new place for the backing name is not before from.
func (m *headerImage) place(h *header, exts []headerExtension, at namePlace, from uint64) *headerImage {
	size := h.clusterSize()
	b := h.encodeFixed()
	end := uint64(len(b)) // without the padding of the last extension
	for _, e := range exts {
		b = binary.BigEndian.AppendUint32(b, e.typ)
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.data)))
		b = append(b, e.data...)
		end = uint64(len(b))
		b = append(b, make([]byte, -len(e.data)&7)...)
	}
	withEnd := append(slices.Clone(b), make([]byte, extHeaderSize)...)
	// fit returns b as it stands in an area that ends there: END, and the padding before it, may be missing where
	// the area ends anyway.
	fit := func(area uint64) []byte {
		switch {
		case uint64(len(withEnd)) <= area:
			return withEnd
		case end <= area && area <= uint64(len(b)):
			return b[:area]
		}
		return nil
	}
	name := h.rawName()
	off := uint64(0)
	if len(name) > 0 {
		same := m.h.hasBacking() && bytes.Equal(m.h.rawName(), name)
		kept := m.h.backingOff
		if at == nameKept && same && kept+uint64(len(name)) <= size && fit(kept) != nil {
			off = kept
		} else if off = m.findName(name, max(uint64(len(withEnd)), from), at); off == 0 {
			return nil
		}
		b = fit(off)
	} else if b = fit(size); b == nil {
		return nil
	}
	be := binary.BigEndian
	be.PutUint64(b[fieldBackingOff:], off)
	be.PutUint32(b[fieldBackingSize:], h.nameSize())
	if _, hi := m.clash(b, 0); hi != 0 {
		return nil
	}

	placed := *h
	placed.extensions = exts
	placed.backingOff, placed.backingSize, placed.backingNameRaw = off, h.nameSize(), name
	to := &headerImage{h: &placed, room: m.room, look: []span{{lo: 0, hi: uint64(len(b))}}}
	to.b = append([]byte(nil), m.b...)
	if need := max(uint64(len(b)), off+uint64(len(name))); need > uint64(len(to.b)) {
		to.b = append(to.b, make([]byte, need-uint64(len(to.b)))...)
	}
	clear(to.b[:min(sectorSize, len(to.b))])
	copy(to.b, b)
	if len(name) > 0 {
		copy(to.b[off:], name)
		to.look = append(to.look, span{lo: off, hi: off + uint64(len(name))})
	}
	return to
}

// findName returns where the backing name can stand from low on, so that nothing is in the way; 0 if nowhere.
func (m *headerImage) findName(name []byte, low uint64, at namePlace) uint64 {
	n := uint64(len(name))
	if n > m.room || low > m.room-n {
		return 0
	}
	if at == nameLast {
		for off := m.room - n; off >= low; {
			lo, hi := m.clash(name, off)
			if hi == 0 {
				return off
			}
			if lo < n {
				return 0
			}
			off = lo - n
		}
		return 0
	}
	for off := low; off <= m.room-n; {
		_, hi := m.clash(name, off)
		if hi == 0 {
			return off
		}
		off = max(hi, off+1)
	}
	return 0
}

// rawName returns the backing name as it is to stand in the file.
func (h *header) rawName() []byte {
	if h.backingName != "" && cString(h.backingNameRaw) == h.backingName {
		return h.backingNameRaw
	}
	return []byte(h.backingName)
}

// nameSize returns the value of the field backing_file_size, which means nothing without a backing file, and is kept
// then.
func (h *header) nameSize() uint32 {
	if n := len(h.rawName()); n > 0 || h.backingOff != 0 {
		return uint32(n)
	}
	return h.backingSize
}

// step returns the step from m to to.
func (m *headerImage) step(to *headerImage) headerStep {
	var s headerStep
	at := func(b []byte, i uint64) (byte, bool) {
		if i < uint64(len(b)) {
			return b[i], true
		}
		return 0, false
	}
	differs := func(i uint64) bool {
		v, ok := at(m.b, i)
		return !ok || v != to.b[i]
	}
	run := func(lo, hi uint64) headerWrite {
		for lo < hi && !differs(lo) {
			lo++
		}
		for lo < hi && !differs(hi-1) {
			hi--
		}
		return headerWrite{off: lo, p: to.b[lo:hi]}
	}
	for _, l := range to.look {
		if w := run(max(l.lo, sectorSize), max(l.hi, sectorSize)); len(w.p) > 0 {
			s.beside = append(s.beside, w)
		}
	}
	s.sector = run(0, min(sectorSize, uint64(len(to.b))))
	return s
}

// variants are the orders in which the extensions of h may stand: as they are, if nothing about them changes against
// old; sorted for later changes; and without the feature name table, if it is to be dropped.
func (h *header) variants(old *header, dropNames bool) [][]headerExtension {
	sorted := *h
	sorted.extensions = h.currentExtensions()
	asIs := slices.Clone(sorted.extensions)
	sorted.sortExtensions()
	v := [][]headerExtension{sorted.extensions, asIs}
	if slices.EqualFunc(asIs, old.extensions, func(a, b headerExtension) bool { return a.typ == b.typ && bytes.Equal(a.data, b.data) }) {
		slices.Reverse(v)
	}
	if dropNames {
		for i := range v {
			v[i] = slices.DeleteFunc(v[i], func(e headerExtension) bool { return e.typ == extFeatureNames })
		}
	}
	return v
}

// direct returns the header h with the given fate of the feature name table, one step from m; nil if none is.
func (m *headerImage) direct(h *header, dropNames bool) *headerImage {
	for _, exts := range h.variants(m.h, dropNames) {
		for _, at := range []namePlace{nameKept, nameFirst} {
			if to := m.place(h, exts, at, 0); to != nil {
				return to
			}
		}
	}
	return nil
}

// besides returns headers that mean what m means, one step from it, and leave room for h in other places.
func (m *headerImage) besides(h *header) []*headerImage {
	need := h.mostBytes()
	var found []*headerImage
	for _, dropNames := range []bool{false, true} {
		for _, exts := range m.h.variants(m.h, dropNames) {
			for _, from := range []uint64{need, 0} {
				for _, at := range []namePlace{nameFirst, nameLast} {
					if to := m.place(m.h, exts, at, from); to != nil {
						found = append(found, to)
					}
				}
			}
		}
	}
	return found
}

// mostBytes returns how many bytes the header takes at most, with its extensions and the backing name.
func (h *header) mostBytes() uint64 {
	n := uint64(len(h.encodeFixed()) + extHeaderSize + len(h.rawName()))
	for _, e := range h.currentExtensions() {
		n += extHeaderSize + uint64(len(e.data)+7)&^7
	}
	return n
}

// path returns at most n steps from m to h; nil if there are none.
func (m *headerImage) path(h *header, dropNames bool, n int) []*headerImage {
	if to := m.direct(h, dropNames); to != nil {
		return []*headerImage{to}
	}
	if n <= 1 {
		return nil
	}
	for _, mid := range m.besides(h) {
		if rest := mid.path(h, dropNames, n-1); rest != nil {
			return append([]*headerImage{mid}, rest...)
		}
	}
	return nil
}

// planHeader returns the steps from the header in the cluster old, whose bytes are given whole, to h, and the header
// as it will be read then. The feature name table is dropped only where there is no way with it. Unknown extensions
// keep their order, and whatever is unknown its bytes (I9). ErrHeaderFull if there is no way.
func planHeader(old []byte, h *header) (steps []headerStep, now *header, err error) {
	m, err := newHeaderImage(old, h.fileSize)
	if err != nil {
		return nil, nil, err
	}
	// The backing name can stand behind everything else, even while it moves.
	m.room = m.h.mostBytes() + h.mostBytes()
	for _, s := range m.look {
		m.room += s.hi
	}
	m.room = min(max(m.room, sectorSize), h.clusterSize())
	m.b = m.b[:m.room]
	for _, dropNames := range []bool{false, true} {
		for n := 1; n <= maxHeaderSteps; n++ {
			path := m.path(h, dropNames, n)
			if path == nil {
				continue
			}
			var looked []span
			for _, to := range path {
				steps = append(steps, m.step(to))
				looked = append(looked, m.look...)
				m = to
			}
			if rest := m.leftOver(looked); len(rest) > 0 {
				steps = append(steps, headerStep{beside: rest})
			}
			final := append(m.b[:len(m.b):len(m.b)], make([]byte, int(h.clusterSize())-len(m.b))...)
			if m, err = newHeaderImage(final, h.fileSize); err != nil {
				return nil, nil, fmt.Errorf("rewrite the header: %w", err)
			}
			return steps, m.h, nil
		}
	}
	return nil, nil, fmt.Errorf("%w of %d bytes", ErrHeaderFull, h.clusterSize())
}

// leftOver returns the writes that blank what was looked at behind the first sector and is no more: names of files,
// for one. It blanks m.b.
func (m *headerImage) leftOver(looked []span) (w []headerWrite) {
	used := func(i uint64) bool {
		return slices.ContainsFunc(m.look, func(s span) bool { return s.lo <= i && i < s.hi })
	}
	for _, s := range looked {
		for lo := max(s.lo, sectorSize); lo < s.hi; {
			hi := lo
			for hi < s.hi && !used(hi) {
				hi++
			}
			if hi > lo && !isZero(m.b[lo:hi]) {
				clear(m.b[lo:hi])
				w = append(w, headerWrite{off: lo, p: make([]byte, hi-lo)})
			}
			lo = hi + 1
		}
	}
	return w
}

// planRewrite is planHeader from what the file holds.
func (img *Image) planRewrite(h *header) ([]headerStep, *header, error) {
	old := make([]byte, h.clusterSize())
	if err := img.host.readFull(old, 0); err != nil {
		return nil, nil, err
	}
	return planHeader(old, h)
}

// rewriteHeader makes h the header on disk, durably, in place of the one that is there, and returns it as it reads
// now: the caller makes that img.hdr. ErrHeaderFull, before anything is written, if it does not fit. After any other
// error the header on disk means what it meant before, or the image is failed. Only within exclusively.
//
// The order, and what a crash leaves, is that of headerStep. What h names is durable already (I3).
func (img *Image) rewriteHeader(h *header) (*header, error) {
	steps, now, err := img.planRewrite(h)
	if err != nil {
		return nil, err
	}
	for _, s := range steps {
		if err := img.writeHeaderStep(s); err != nil {
			return nil, fmt.Errorf("header: %w", err)
		}
	}
	return now, nil
}

// writeHeaderStep carries out one step.
func (img *Image) writeHeaderStep(s headerStep) error {
	early := img.wb.test.amendSkip == amendSyncHeader
	if early && len(s.sector.p) > 0 {
		if err := img.host.write(useHeader, s.sector.p, s.sector.off); err != nil {
			return err
		}
	}
	for _, w := range s.beside {
		if err := img.host.write(useHeader, w.p, w.off); err != nil {
			if len(s.sector.p) == 0 {
				return nil // bytes that nobody looks at stay as they are
			}
			return err
		}
	}
	if len(s.sector.p) == 0 {
		return nil
	}
	if len(s.beside) > 0 && !early {
		if err := img.host.sync(); err != nil {
			return err
		}
	}
	return img.switchHeader(int64(s.sector.off), s.sector.p)
}

// clone returns a copy of the header that may be changed.
func (h *header) clone() *header {
	c := *h
	c.extensions = slices.Clone(h.extensions)
	return &c
}

// setBacking makes the header name the backing file of the given format; "" for none.
func (h *header) setBacking(name, format string) {
	if name != h.backingName {
		h.backingName, h.backingNameRaw = name, nil
	}
	h.backingFormat = format
}

// setVersion makes the header one of the given version, 2 or 3, with what that has. What version 2 has no place for is
// gone.
func (h *header) setVersion(version uint32) {
	switch {
	case h.version == version:
	case version >= 3:
		h.version, h.headerLength = version, headerLengthV3
		h.padding = make([]byte, headerLengthV3-fieldPadding)
		if h.clusterSize() > featureTableMinCluster {
			h.extensions = append(h.extensions, headerExtension{extFeatureNames, encodeFeatureNames()})
		}
	default:
		h.version, h.headerLength, h.padding, h.unknownFields = version, headerLengthV2, nil, nil
		h.incompatible, h.compatible, h.autoclear, h.refcountOrder = 0, 0, 0, 4
		h.compression, h.bitmaps = CompressionDeflate, nil
		h.extensions = slices.DeleteFunc(h.extensions, func(e headerExtension) bool { return e.typ == extFeatureNames })
	}
}
