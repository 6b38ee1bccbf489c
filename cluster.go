package qcow2

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
)

// mapper translates guest offsets into extents, and changes the translation. It owns the active L1 table
// in memory; L2 entries live in the table cache.
type mapper struct {
	entryRules
	id    uint16 // the image's number in the cache
	h     *hostFile
	cache *tableCache
	alloc *allocator // nil in a read-only image
	mu    *sync.Mutex

	l1      *table
	l1Off   uint64
	l1Dirty map[uint64]struct{} // indexes of the 64-entry pieces (one sector) to write; guarded by mu
}

// extent is a run of guest bytes that one kind of place answers for. It has four words, which is what the
// compiler still keeps in registers: with a fifth, handing it up cost a third of the time of a mapped read
// without the host's part.
type extent struct {
	kind clusterKind
	n    uint64 // bytes from the guest offset that was asked for
	// hostOff is where the first byte is stored: for normal extents in the file of guest data, for
	// compressed ones the start of the payload of the one cluster. For unallocated subclusters of a cluster that has a
	// place (reserved), where it would be stored.
	hostOff uint64
	word    uint64 // the L2 word of the first cluster; all of a normal extent agrees in COPIED
}

// inPlace reports whether all of the extent may be written in place: normal and COPIED.
func (x extent) inPlace() bool { return x.kind == kindNormal && x.word&flagCopied != 0 }

// corrupt returns the error for a bad table entry that maps guestOff.
func corrupt(what string, hostOff, guestOff uint64) error {
	return &CorruptError{What: what, HostOff: int64(hostOff), GuestOff: int64(guestOff)}
}

// l2Table returns the host offset of the L2 table that maps guestOff, or 0 if there is none.
func (m *mapper) l2Table(guestOff uint64) (uint64, error) {
	e := m.l1.load(m.l1Index(guestOff))
	off := e & offsetMask
	if m.offsetInCluster(off) != 0 {
		return 0, corrupt(fmt.Sprintf("L1 entry %d is %#x: its L2 table is not aligned to clusters", m.l1Index(guestOff), e),
			m.l1Off+8*m.l1Index(guestOff), guestOff)
	}
	return off, nil
}

// sliceAt returns the place of guestOff's entry: the host offset of the slice in the L2 table at l2Off,
// and the index of the entry in the slice.
func (m *mapper) sliceAt(l2Off, guestOff uint64) (sliceOff, index uint64) {
	pos := m.l2Index(guestOff) << m.l2EntryBits
	return l2Off + pos>>m.sliceBits<<m.sliceBits, pos & (1<<m.sliceBits - 1) >> m.l2EntryBits
}

// slice returns the L2 slice at host offset off, for reading.
func (m *mapper) slice(off uint64) (*l2Slice, error) {
	s, err := m.cache.view(makeSliceKey(m.id, off), m.h, off, 1<<m.sliceBits)
	if err != nil {
		return nil, fmt.Errorf("L2 table: %w", err)
	}
	return s, nil
}

// entry returns entry i of a slice.
func (m *entryRules) entry(s *l2Slice, i uint64) l2Entry {
	if !m.extendedL2 {
		return l2Entry{word: atomic.LoadUint64(&s.words[i])}
	}
	for {
		seq := s.seq.Load()
		e := l2Entry{
			word:   atomic.LoadUint64(&s.words[2*i]),
			bitmap: atomic.LoadUint64(&s.words[2*i+1]),
		}
		if seq&1 == 0 && s.seq.Load() == seq {
			return e
		}
	}
}

// setEntry sets entry i of a slice's words, within tableCache.change.
func (m *mapper) setEntry(words []uint64, i uint64, e l2Entry) {
	if !m.extendedL2 {
		atomic.StoreUint64(&words[i], e.word)
		return
	}
	atomic.StoreUint64(&words[2*i], e.word)
	atomic.StoreUint64(&words[2*i+1], e.bitmap)
}

// resolve returns the extent at guestOff, at most n bytes long and inside one L2 slice. The caller is
// registered as a request, so that the clusters it is told stay what they are while it uses them. It
// takes no lock where the slice is cached. Precondition: guestOff+n does not pass the L1 table.
func (m *mapper) resolve(guestOff, n uint64) (extent, error) {
	l2Off, err := m.l2Table(guestOff)
	if err != nil {
		return extent{}, err
	}
	if l2Off == 0 {
		// Nothing up to the end of this L2 table's reach.
		reach := uint64(1) << (m.clusterBits + m.l2Bits)
		return extent{kind: kindUnallocated, n: min(n, reach-guestOff&(reach-1))}, nil
	}
	sliceOff, i := m.sliceAt(l2Off, guestOff)
	s, err := m.slice(sliceOff)
	if err != nil {
		return extent{}, err
	}
	return m.resolveIn(s, i, guestOff, n)
}

// resolveIn is resolve from entry i of slice s on.
func (m *entryRules) resolveIn(s *l2Slice, i, guestOff, n uint64) (extent, error) {
	e := m.entry(s, i)
	in := m.offsetInCluster(guestOff)
	sub := in >> m.subBits
	kind, subs := m.kindRun(e, sub)
	x := extent{kind: kind, n: (sub+subs)<<m.subBits - in, word: e.word}
	switch kind {
	case kindInvalid:
		return x, m.corruptEntry(s, i, e, guestOff)
	case kindCompressed:
		x.hostOff, _ = m.compressed(e.word)
		x.n = min(x.n, n)
		return x, nil
	case kindNormal, kindZeroAlloc:
		x.hostOff = e.hostOff() + in
		if m.external && x.hostOff != guestOff {
			return x, m.corruptEntry(s, i, e, guestOff)
		}
	case kindUnallocated:
		if m.reserved(e) {
			x.hostOff = e.hostOff() + in
		}
	}
	// The run goes on while the next cluster begins with the same kind, and its host cluster, if it holds one,
	// lies right behind.
	perSlice := uint64(len(s.words)) << 3 >> m.l2EntryBits
	if next := e.word + m.clusterSize; m.hasCluster(e) && m.offsetInCluster(guestOff+x.n) == 0 {
		// Most runs are clusters in their order, each of which says so by its word, and a bitmap without a change.
		all := uniformBitmap(kind)
		for ; x.n < n && i+1 < perSlice; i++ {
			if f := m.entry(s, i+1); f.word != next || m.extendedL2 && f.bitmap != all {
				break
			}
			x.n += m.clusterSize
			next += m.clusterSize
		}
	}
	for i++; x.n < n && m.offsetInCluster(guestOff+x.n) == 0 && i < perSlice; i++ {
		e := m.entry(s, i)
		k, subs := m.kindRun(e, 0)
		if k != kind || (kind == kindNormal || kind == kindZeroAlloc) && e.hostOff() != x.hostOff+x.n ||
			kind == kindNormal && (e.word^x.word)&flagCopied != 0 ||
			kind == kindUnallocated && m.extendedL2 && (m.reserved(e) != m.reserved(l2Entry{word: x.word}) || m.reserved(e) && e.hostOff() != x.hostOff+x.n) {
			break
		}
		x.n += subs << m.subBits
	}
	x.n = min(x.n, n)
	return x, nil
}

// corruptEntry returns the error for L2 entry i of s, which breaks the format.
func (m *entryRules) corruptEntry(s *l2Slice, i uint64, e l2Entry, guestOff uint64) error {
	what := fmt.Sprintf("L2 entry %#x", e.word)
	switch {
	case e.word&flagCompressed != 0 && m.external:
		what += " is compressed in an image with a data file"
	case e.word&flagCompressed != 0:
		what += fmt.Sprintf(" is compressed and has subclusters %#x", e.bitmap)
	case m.version2 && e.word&flagZero != 0:
		what += " has the zero flag in a version 2 image"
	case m.offsetInCluster(e.hostOff()) != 0:
		what += " is not aligned to clusters"
	case m.external && m.hasCluster(e) && e.hostOff() != m.clusterStart(guestOff):
		what += " is not at the guest offset in the data file"
	default:
		what += fmt.Sprintf(" has impossible subclusters %#x", e.bitmap)
	}
	return corrupt(what, s.off+i<<m.l2EntryBits, guestOff)
}

// ownL2 makes sure that guestOff's L2 table exists and belongs to the active image alone, and returns its
// host offset.
//
// Order: the new table, zeros or a copy of the one shared with a snapshot, is written whole here; a cut
// syncs it and its refcount before it writes the L1 entry (I1, I3), and drops the reference to the old
// table after that. A crash in between leaves a leak. An error here leaves nothing changed.
//
// Precondition: mu.
func (m *mapper) ownL2(guestOff uint64) (uint64, error) {
	i := m.l1Index(guestOff)
	l1 := m.l1.load(i)
	old, err := m.l2Table(guestOff)
	if err != nil {
		return 0, err
	}
	if old != 0 && l1&flagCopied != 0 {
		return old, nil
	}
	shared := clusterRun{first: old >> m.clusterBits, n: 1}
	if old != 0 {
		if err := m.alloc.checkReferenced(shared); err != nil {
			return 0, err
		}
	}
	r, err := m.alloc.alloc(1)
	if err != nil {
		return 0, fmt.Errorf("new L2 table: %w", err)
	}
	off := r.first << m.clusterBits
	m.h.enter(OverlapActiveL2, off, m.clusterSize)
	if old == 0 {
		err = m.h.zero(useL2, off, m.clusterSize)
	} else {
		// A table that is not COPIED has no changes of ours: each would have brought it here first.
		err = m.copyTable(off, old)
	}
	if err != nil {
		m.alloc.undo(r)
		return 0, fmt.Errorf("new L2 table: %w", err)
	}
	for pos := uint64(0); pos < m.clusterSize; pos += 1 << m.sliceBits {
		m.cache.drop(makeSliceKey(m.id, off+pos))
	}
	if old == 0 {
		sliceOff, _ := m.sliceAt(off, guestOff)
		m.cache.fresh(makeSliceKey(m.id, sliceOff), sliceOff, 1<<m.sliceBits)
	} else {
		m.alloc.free(shared)
	}
	m.setL1(i, off|flagCopied)
	return off, nil
}

// copyTable copies the L2 table at host offset src to dst.
func (m *mapper) copyTable(dst, src uint64) error {
	buf := make([]byte, m.clusterSize)
	if err := m.h.readFull(buf, src); err != nil {
		return err
	}
	return m.h.write(useL2, buf, dst)
}

// l1Piece is the number of L1 entries that are written together: one sector.
const l1Piece = sectorSize / 8

// setL1 sets L1 entry i. Precondition: mu.
func (m *mapper) setL1(i, v uint64) {
	m.l1.store(i, v)
	m.l1Dirty[i/l1Piece] = struct{}{}
}

// l1Write is a piece of the L1 table as of a cut.
type l1Write struct {
	piece uint64
	data  []byte
}

// cutL1 takes the dirty pieces of the L1 table. Precondition: mu.
func (m *mapper) cutL1() []l1Write {
	var w []l1Write
	for _, i := range slices.Sorted(maps.Keys(m.l1Dirty)) {
		p := make([]byte, 8*min(l1Piece, m.l1.n-i*l1Piece))
		m.l1.encode(p, i*l1Piece)
		w = append(w, l1Write{piece: i, data: p})
	}
	clear(m.l1Dirty)
	return w
}

// restoreL1 makes pieces dirty again whose cut failed. Precondition: mu.
func (m *mapper) restoreL1(w []l1Write) {
	for _, p := range w {
		m.l1Dirty[p.piece] = struct{}{}
	}
}

// update calls f with the entries of the slice that maps guestOff, from guestOff's own on, to change
// them; it has the cluster's L2 table made if there is none. The metadata lock is let go and the cache
// written back by pressure where the cache is full. The caller holds the clusters that it changes
// exclusively.
func (m *mapper) update(guestOff uint64, pressure func() error, f func(words []uint64, i uint64)) error {
	for {
		m.mu.Lock()
		err := m.updateLocked(guestOff, f)
		m.mu.Unlock()
		if err != errCacheFull {
			return err
		}
		if err := pressure(); err != nil {
			return err
		}
	}
}

// updateLocked is update without the wait for room: it returns errCacheFull. Precondition: mu.
func (m *mapper) updateLocked(guestOff uint64, f func(words []uint64, i uint64)) error {
	l2Off, err := m.ownL2(guestOff)
	if err != nil {
		return err
	}
	sliceOff, i := m.sliceAt(l2Off, guestOff)
	for {
		s, err := m.cache.get(makeSliceKey(m.id, sliceOff), m.h, sliceOff, 1<<m.sliceBits)
		if err == errCacheFull {
			return err
		}
		if err != nil {
			return fmt.Errorf("L2 table: %w", err)
		}
		if m.cache.change(s, func(words []uint64) { f(words, i) }) {
			return nil
		}
	}
}
