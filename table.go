package qcow2

import (
	"encoding/binary"
	"iter"
	"sync/atomic"
)

// tableChunkBits is log2 of the entries that a table holds in one piece: 4 KiB.
const tableChunkBits = 9

// table is a top-level table in memory: the active L1 table or the refcount table, as a sparse array
// of 64-bit entries in host byte order. A piece that only holds zeros, such as one past the end of the
// file, costs one pointer. Entries are read without a lock; changes are ordered by the metadata lock.
type table struct {
	n      uint64 // number of entries
	chunks []atomic.Pointer[tableChunk]
}

// tableChunk is one piece of a table. Its entries are accessed atomically.
type tableChunk [1 << tableChunkBits]uint64

// newTable returns a table of n zero entries.
func newTable(n uint64) *table {
	return &table{n: n, chunks: make([]atomic.Pointer[tableChunk], (n+1<<tableChunkBits-1)>>tableChunkBits)}
}

// readTable loads a table of n entries at host offset off from a file of size bytes. What lies past the
// end of the file is zeros and takes no memory. Precondition: n is bounded by the format or a limit.
func readTable(h *hostFile, off, n, size uint64) (*table, error) {
	t := newTable(n)
	var buf [8 << tableChunkBits]byte
	for i := range t.chunks {
		pos := off + uint64(i)<<(tableChunkBits+3)
		if pos >= size {
			break
		}
		k := min(n-uint64(i)<<tableChunkBits, 1<<tableChunkBits)
		if err := h.readFull(buf[:8*k], pos); err != nil {
			return nil, err
		}
		var c tableChunk
		used := false
		for j := range k {
			c[j] = binary.BigEndian.Uint64(buf[8*j:])
			used = used || c[j] != 0
		}
		if used {
			t.chunks[i].Store(&c)
		}
	}
	return t, nil
}

// load returns entry i, or 0 past the table's end.
func (t *table) load(i uint64) uint64 {
	if i >= t.n {
		return 0
	}
	c := t.chunks[i>>tableChunkBits].Load()
	if c == nil {
		return 0
	}
	return atomic.LoadUint64(&c[i&(1<<tableChunkBits-1)])
}

// at returns entry j of a piece.
func (t *table) at(c *tableChunk, j int) uint64 { return atomic.LoadUint64(&c[j]) }

// store sets entry i. Preconditions: i < n; the metadata lock is held.
func (t *table) store(i, v uint64) {
	p := &t.chunks[i>>tableChunkBits]
	c := p.Load()
	if c == nil {
		c = new(tableChunk)
		p.Store(c)
	}
	atomic.StoreUint64(&c[i&(1<<tableChunkBits-1)], v)
}

// grow returns a table of n entries with the content of t. Precondition: n >= t.n.
func (t *table) grow(n uint64) *table {
	g := newTable(n)
	for i := range t.chunks {
		g.chunks[i].Store(t.chunks[i].Load())
	}
	return g
}

// encode writes the entries from first on, as they stand on disk, into p; past the end they are zero.
func (t *table) encode(p []byte, first uint64) {
	for i := 0; i+8 <= len(p); i += 8 {
		binary.BigEndian.PutUint64(p[i:], t.load(first+uint64(i)/8))
	}
}

// all yields the pieces that hold more than zeros, with their index.
func (t *table) all() iter.Seq2[uint64, *tableChunk] {
	return func(yield func(uint64, *tableChunk) bool) {
		for i := range t.chunks {
			if c := t.chunks[i].Load(); c != nil && !yield(uint64(i), c) {
				return
			}
		}
	}
}
