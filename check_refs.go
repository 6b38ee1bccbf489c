package qcow2

import (
	"maps"
	"slices"
)

// Layout of a refWord.
const (
	refCountMask = 1<<13 - 1 // references; refCountMask itself: the number is in refWords.more
	refStoredOne = 1 << 13   // the refcount on disk is one
	refCopied    = 1 << 14   // an active entry refers to the cluster with COPIED
	refPlain     = 1 << 15   // an active entry refers to it without COPIED
)

// Sizes of refWords.
const (
	refChunkBits  = 15      // log2 of the clusters of a chunk
	refSparseMax  = 1024    // entries of a chunk that is kept as a list
	refDirectMax  = 1 << 16 // chunks that the slice reaches; those of higher clusters are in the map
	refChunkWords = 1 << refChunkBits
)

// refWords counts references to host clusters: two bytes each, where there are any. A chunk without
// references costs nothing, one with few the few, so that the memory is bounded by the entries that are in
// the file, wherever they point.
type refWords struct {
	direct []*refChunk          // chunks by index
	far    map[uint64]*refChunk // those from refDirectMax on
	more   map[uint64]uint64    // counts that a word does not hold, by cluster
	gone   []uint64             // of an operation on a tree: chunks with words that have refStoredNone, in order

	last  *refChunk // the chunk of the last use
	lastK uint64
}

// refChunk holds the words of 1<<refChunkBits clusters.
type refChunk struct {
	words  *[refChunkWords]uint16 // nil while the chunk is a list
	sparse []sparseRef            // sorted by index
}

// sparseRef is one word of a chunk that is a list.
type sparseRef struct{ index, word uint16 }

// newRefWords returns a count of nothing.
func newRefWords() *refWords {
	return &refWords{far: make(map[uint64]*refChunk), more: make(map[uint64]uint64)}
}

// chunk returns chunk k, or nil if it has no references.
func (r *refWords) chunk(k uint64) *refChunk {
	if r.last != nil && r.lastK == k {
		return r.last
	}
	var c *refChunk
	if k < uint64(len(r.direct)) {
		c = r.direct[k]
	} else if k >= refDirectMax {
		c = r.far[k]
	}
	if c != nil {
		r.last, r.lastK = c, k
	}
	return c
}

// ensure returns chunk k, made if there is none.
func (r *refWords) ensure(k uint64) *refChunk {
	if c := r.chunk(k); c != nil {
		return c
	}
	c := &refChunk{}
	if k >= refDirectMax {
		r.far[k] = c
	} else {
		for uint64(len(r.direct)) <= k {
			r.direct = append(r.direct, nil)
		}
		r.direct[k] = c
	}
	r.last, r.lastK = c, k
	return c
}

// find returns the place of index in the list of c, and whether it is there.
func (c *refChunk) find(index uint16) (int, bool) {
	if n := len(c.sparse); n == 0 || c.sparse[n-1].index < index {
		return n, false
	}
	return slices.BinarySearchFunc(c.sparse, index, func(s sparseRef, i uint16) int { return int(s.index) - int(i) })
}

// word returns where the word of cluster ci is kept, made if there is none. It is valid until the next call
// of a method.
func (r *refWords) word(ci uint64) *uint16 {
	c := r.ensure(ci >> refChunkBits)
	index := uint16(ci & (refChunkWords - 1))
	if c.words != nil {
		return &c.words[index]
	}
	i, ok := c.find(index)
	if ok {
		return &c.sparse[i].word
	}
	if len(c.sparse) < refSparseMax {
		c.sparse = slices.Insert(c.sparse, i, sparseRef{index: index})
		return &c.sparse[i].word
	}
	c.spread()
	return &c.words[index]
}

// spread makes an array of the list.
func (c *refChunk) spread() {
	c.words = new([refChunkWords]uint16)
	for _, s := range c.sparse {
		c.words[s.index] = s.word
	}
	c.sparse = nil
}

// load returns the word of cluster ci, or 0.
func (r *refWords) load(ci uint64) uint16 {
	c := r.chunk(ci >> refChunkBits)
	if c == nil {
		return 0
	}
	index := uint16(ci & (refChunkWords - 1))
	if c.words != nil {
		return c.words[index]
	}
	if i, ok := c.find(index); ok {
		return c.sparse[i].word
	}
	return 0
}

// count returns the references to cluster ci.
func (r *refWords) count(ci uint64) uint64 {
	n := uint64(r.load(ci) & refCountMask)
	if n == refCountMask {
		return r.more[ci]
	}
	return n
}

// add adds n references to cluster ci, and flags to its word. It counts to most, and returns how many
// references were too many.
func (r *refWords) add(ci, n uint64, flags uint16, most uint64) (over uint64) {
	w := r.word(ci)
	have := uint64(*w & refCountMask)
	*w |= flags
	if have+n < refCountMask && have+n <= most {
		*w += uint16(n)
		return 0
	}
	if have == refCountMask {
		have = r.more[ci]
	}
	sum := have + n
	if sum > most || sum < have {
		over, sum = n-(most-have), most
	}
	*w |= refCountMask
	if sum < refCountMask {
		*w = *w&^refCountMask | uint16(sum)
		return over
	}
	r.more[ci] = sum
	return over
}

// set makes n the number of references to cluster ci.
func (r *refWords) set(ci, n uint64) {
	w := r.word(ci)
	if n < refCountMask {
		*w = *w&^refCountMask | uint16(n)
		delete(r.more, ci)
		return
	}
	*w |= refCountMask
	r.more[ci] = n
}

// chunks returns the indexes of all chunks, in order.
func (r *refWords) chunks() []uint64 {
	var ks []uint64
	for k, c := range r.direct {
		if c != nil {
			ks = append(ks, uint64(k))
		}
	}
	return append(ks, slices.Sorted(maps.Keys(r.far))...)
}

// end returns the cluster behind the last one with references, or 0.
func (r *refWords) end() uint64 {
	ks := r.chunks()
	for _, k := range slices.Backward(ks) {
		c := r.chunk(k)
		for i := len(c.sparse) - 1; i >= 0; i-- {
			if c.sparse[i].word&refCountMask != 0 {
				return k<<refChunkBits + uint64(c.sparse[i].index) + 1
			}
		}
		for i := refChunkWords - 1; c.words != nil && i >= 0; i-- {
			if c.words[i]&refCountMask != 0 {
				return k<<refChunkBits + uint64(i) + 1
			}
		}
	}
	return 0
}

// anyIn reports whether a cluster of [first, first+n) has references. n is at most the clusters of a chunk or
// a multiple of them, and first is aligned to the smaller of the two.
func (r *refWords) anyIn(first, n uint64) bool {
	for ci := first; ci < first+n; ci = (ci>>refChunkBits + 1) << refChunkBits {
		c := r.chunk(ci >> refChunkBits)
		if c == nil {
			continue
		}
		lo := ci & (refChunkWords - 1)
		hi := min(lo+first+n-ci, refChunkWords)
		for _, s := range c.sparse {
			if uint64(s.index) >= lo && uint64(s.index) < hi && s.word&refCountMask != 0 {
				return true
			}
		}
		if c.words == nil {
			continue
		}
		for _, w := range c.words[lo:hi] {
			if w&refCountMask != 0 {
				return true
			}
		}
	}
	return false
}
