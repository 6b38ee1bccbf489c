package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Preallocation says how much of a disk has its place in the host file before it is written. The names are
// QEMU's.
type Preallocation int

const (
	// PreallocationOff maps nothing: clusters are allocated when they are written.
	PreallocationOff Preallocation = iota
	// PreallocationMetadata maps every cluster, so that later writes change no metadata. The host file has
	// its full length, with a hole where the data comes to stand.
	PreallocationMetadata
	// PreallocationFalloc is PreallocationMetadata with the host's space reserved: Storage.Allocate, and
	// zeros written where a storage has nothing of the kind.
	PreallocationFalloc
	// PreallocationFull is PreallocationMetadata with zeros written to all of the data.
	PreallocationFull
)

// String returns QEMU's name of the mode.
func (p Preallocation) String() string {
	names := [...]string{"off", "metadata", "falloc", "full"}
	if p < 0 || int(p) >= len(names) {
		return fmt.Sprintf("Preallocation(%d)", int(p))
	}
	return names[p]
}

// valid reports whether the mode exists.
func (p Preallocation) valid() bool { return p >= PreallocationOff && p <= PreallocationFull }

// bulkBytes is the unit in bytes in which many tables are written at once: a multiple of every cluster size but
// the largest, of which a piece holds one.
const bulkBytes = 1 << 20

// bulkBuffer returns a buffer for whole clusters, as many as are written at once of n.
func (g *geometry) bulkBuffer(n uint64) []byte {
	return make([]byte, min(max(bulkBytes, g.clusterSize), n<<g.clusterBits))
}

// writeBulk writes the n bytes of tables at host offset off in large pieces: fill fills in each, which begins
// pos bytes behind off. An error of fill ends it.
func (h *hostFile) writeBulk(use clusterUse, buf []byte, off, n uint64, fill func(p []byte, pos uint64) error) error {
	for pos := uint64(0); pos < n; {
		p := buf[:min(uint64(len(buf)), n-pos)]
		if err := fill(p, pos); err != nil {
			return err
		}
		if err := h.write(use, p, off+pos); err != nil {
			return err
		}
		pos += uint64(len(p))
	}
	return nil
}

// writeRefcountTable writes t, a new refcount table of n bytes, at host offset off, in pieces of the length of buf.
// Nothing names it yet.
func (h *hostFile) writeRefcountTable(t *table, buf []byte, off, n uint64) error {
	err := h.writeBulk(useRefcountTable, buf, off, n, func(p []byte, pos uint64) error {
		t.encode(p, pos/8)
		return nil
	})
	if err != nil {
		return fmt.Errorf("new refcount table: %w", err)
	}
	return nil
}

// fillPointers fills p, which begins with entry first of a table of pointers, with those to n clusters from off on,
// and zeros behind them.
func (g *geometry) fillPointers(p []byte, first, n, off uint64) {
	for i := uint64(0); i < uint64(len(p))/8; i++ {
		v := uint64(0)
		if first+i < n {
			v = off + (first+i)<<g.clusterBits
		}
		binary.BigEndian.PutUint64(p[8*i:], v)
	}
}

// fillRefcounts fills p with refcounts of 2^order bits: one for the first n, zero for the rest.
func fillRefcounts(p []byte, order uint, n uint64) {
	whole := min(n<<order/64*8, uint64(len(p)))
	for i := uint64(0); i < whole; i += 8 {
		binary.BigEndian.PutUint64(p[i:], laneOnes[order])
	}
	clear(p[whole:])
	for i := whole * 8 >> order; i < min(n, uint64(len(p))*8>>order); i++ {
		setRefcountAt(p, order, i, 1)
	}
}

// putRun encodes the entries of n guest clusters, from entry i of the L2 tables in p on. The first is e; where e
// holds a host cluster, those of the others follow it.
func (r *entryRules) putRun(p []byte, i, n uint64, e l2Entry) {
	step := uint64(0)
	if r.hasCluster(e) {
		step = r.clusterSize
	}
	p = p[i<<r.l2EntryBits:]
	if !r.extendedL2 {
		for ; n > 0; n-- {
			binary.BigEndian.PutUint64(p, e.word)
			p, e.word = p[8:], e.word+step
		}
		return
	}
	for ; n > 0; n-- {
		binary.BigEndian.PutUint64(p, e.word)
		binary.BigEndian.PutUint64(p[8:], e.bitmap)
		p, e.word = p[16:], e.word+step
	}
}

// zeroEntry makes the entry of a preallocated cluster read as zeros, whatever its host cluster holds. Version 2
// cannot say that.
func (r *entryRules) zeroEntry(e l2Entry) l2Entry {
	if r.extendedL2 {
		e.bitmap = bitmapAllocated << 32
	} else {
		e.word |= flagZero
	}
	return e
}

// dataEntry makes the entry of a preallocated cluster read what its host cluster holds.
func (r *entryRules) dataEntry(e l2Entry) l2Entry {
	if r.extendedL2 {
		e.bitmap = bitmapAllocated
	}
	return e
}

// preallocate does for the n bytes of guest data at host offset off what the mode promises of them, and reports
// whether they read as zeros afterwards; pristine says whether they did before, by nobody ever having written
// there. Where the entries cannot hide what stands there (mustZero), zeros are written. The clusters are
// nobody's else.
//
// Unsynced, like all data: a sync must follow before anything maps it.
func (h *hostFile) preallocate(mode Preallocation, off, n uint64, pristine, mustZero bool) (zero bool, err error) {
	if n == 0 {
		return true, nil
	}
	if mode == PreallocationFalloc {
		err := h.s.Allocate(int64(off), int64(n))
		switch {
		case err == nil:
			// A growing file that is allocated reads as zeros there, and content stays elsewhere.
		case errors.Is(err, errors.ErrUnsupported) && h.fixed:
			// The space of a device is there.
		case errors.Is(err, errors.ErrUnsupported):
			mode = PreallocationFull
		default:
			return false, fmt.Errorf("allocate %d bytes at host %#x: %w", n, off, err)
		}
	}
	if mode != PreallocationFull && (pristine || !mustZero) {
		return pristine, nil
	}
	return true, h.zero(useData, off, n)
}

// extend makes the file at least size bytes long, where it is pristine: nobody wrote behind its end. What a
// storage that cannot be truncated lacks is written.
func (h *hostFile) extend(size uint64) error {
	if h.fixed {
		return nil
	}
	now, err := h.s.Size()
	if err != nil || uint64(now) >= size {
		return err
	}
	if err := h.s.Truncate(int64(size)); !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return h.zero(useData, size-sectorSize, sectorSize)
}
