package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// errCacheFull says that every place where a slice could go holds one that is not written back yet. The
// caller writes back and tries again.
var errCacheFull = errors.New("all cached table slices are dirty")

// cacheWays is the number of places where a slice can stand.
const cacheWays = 8

// tableCache holds slices of L2 tables in memory, for all images of a chain together. A hit takes no
// lock and allocates nothing. It knows which slices are dirty and keeps what a cut must write, but not
// in which order, nor what an entry means.
//
// The cache is set-associative: a slice can stand in cacheWays places only, and a dirty slice is never
// pushed out, so a miss can meet errCacheFull.
//
// A slice that was pushed out while a request still looks at it stays readable (it is garbage-collected
// memory). Such a request sees entries as they were when it began, and its registration keeps the
// clusters that they name from being reused (I4). An in-place write cannot meet one: the mapping of its
// clusters does not change while it is registered.
type tableCache struct {
	ways int
	mask uint64
	sets []atomic.Pointer[l2Slice] // set i is sets[i*ways:][:ways]

	mu      sync.Mutex
	loading map[sliceKey]*sliceLoad // slices being read; guarded by mu
	dirty   []*l2Slice              // slices with unwritten changes, of all images; guarded by mu
	hand    uint                    // of the clock that finds victims; guarded by mu
	ids     map[uint16]struct{}     // numbers in use that takeID gave out; guarded by mu
	lastID  uint16                  // the last of them; guarded by mu
}

// sliceKey names a slice: the image's number in the chain in the upper 16 bits, and the host offset of
// the slice in units of 512 bytes below (host offsets are less than 2^56).
type sliceKey uint64

// makeSliceKey returns the key of the slice at host offset off of image id.
func makeSliceKey(id uint16, off uint64) sliceKey { return sliceKey(uint64(id)<<48 | off>>9) }

// l2Slice is a piece of an L2 table in memory.
type l2Slice struct {
	key  sliceKey
	off  uint64        // host offset in bytes
	used atomic.Uint32 // 1 when a request found it since the last search for a victim

	// words are the entries in host byte order, one or (extended L2) two words each. Atomic; written
	// under the image's metadata lock and within change.
	words []uint64
	// seq is odd while words change, so that the two words of an extended entry are read together.
	seq atomic.Uint32

	// Guarded by the cache's mu:
	resident bool     // stands in the cache
	dirty    bool     // has changes that no cut has taken
	cut      bool     // a cut has taken it and not written it yet
	shadow   []uint64 // the words as of the cut, if they changed since; else nil
}

// sliceLoad is a read of a slice in progress.
type sliceLoad struct {
	done chan struct{} // closed when slice and err are set
	s    *l2Slice
	err  error
	// many says that the read is one of many slices (readMany), which leaves none behind: who waits looks again.
	many bool
}

// newTableCache returns a cache of about the given number of bytes for slices of 2^sliceBits bytes.
func newTableCache(bytes int64, sliceBits uint) *tableCache {
	n := max(bytes>>sliceBits, 2)
	c := &tableCache{ways: int(min(n, cacheWays)), loading: make(map[sliceKey]*sliceLoad)}
	sets := uint64(1)
	for int64(sets)*2*int64(c.ways) <= n {
		sets *= 2
	}
	c.mask = sets - 1
	c.sets = make([]atomic.Pointer[l2Slice], sets*uint64(c.ways))
	return c
}

// set returns the places where key can stand.
func (c *tableCache) set(key sliceKey) []atomic.Pointer[l2Slice] {
	// Tables are spread over the file at regular distances, so the bits are mixed before some are taken.
	h := uint64(key) * 0x9e3779b97f4a7c15 >> 24 & c.mask
	return c.sets[h*uint64(c.ways):][:c.ways]
}

// lookup returns the slice if it is cached, or nil. It takes no lock.
func (c *tableCache) lookup(key sliceKey) *l2Slice {
	set := c.set(key)
	for i := range set {
		if s := set[i].Load(); s != nil && s.key == key {
			if s.used.Load() == 0 {
				s.used.Store(1)
			}
			return s
		}
	}
	return nil
}

// get returns the slice of n bytes at host offset off of h, reading it on a miss. Nothing is locked
// during the read; a second request for the same slice waits for the first.
func (c *tableCache) get(key sliceKey, h *hostFile, off, n uint64) (*l2Slice, error) {
	return c.load(key, h, off, n, true)
}

// view is get for who only reads: where there is no room, it returns a slice that is not cached, rather
// than errCacheFull. Until it is read nobody else loads the slice, so nobody changes or writes it.
func (c *tableCache) view(key sliceKey, h *hostFile, off, n uint64) (*l2Slice, error) {
	return c.load(key, h, off, n, false)
}

// load is get, or view without needRoom.
func (c *tableCache) load(key sliceKey, h *hostFile, off, n uint64, needRoom bool) (*l2Slice, error) {
	if s := c.lookup(key); s != nil {
		return s, nil
	}
	c.mu.Lock()
	if s := c.lookup(key); s != nil {
		c.mu.Unlock()
		return s, nil
	}
	if l := c.loading[key]; l != nil {
		c.mu.Unlock()
		<-l.done
		if l.many {
			return c.load(key, h, off, n, needRoom)
		}
		return l.s, l.err
	}
	if needRoom && !c.roomLocked(key) {
		c.mu.Unlock()
		return nil, errCacheFull
	}
	l := &sliceLoad{done: make(chan struct{})}
	c.loading[key] = l
	c.mu.Unlock()

	l.s, l.err = readSlice(key, h, off, n)

	c.mu.Lock()
	delete(c.loading, key)
	// Without room now the slice is still good to read, and a change will notice that it is not
	// resident.
	if l.err == nil {
		c.insertLocked(l.s)
	}
	c.mu.Unlock()
	close(l.done)
	return l.s, l.err
}

// readMany fills words with the L2 entries at host offset off of h: as many slices of n bytes as fit, as they are in the
// cache or else on the host. Those go through a buffer in one read, and not into the cache. The rules are those of view:
// until it has read them nobody else loads a slice, so nobody changes or writes it.
func (c *tableCache) readMany(id uint16, h *hostFile, off, n uint64, words []uint64) error {
	own := &sliceLoad{done: make(chan struct{}), many: true}
	held := make([]*l2Slice, uint64(len(words))*8/n) // those that the cache has
	missing := 0
	var others []int // those that somebody else reads
	key := func(i int) sliceKey { return makeSliceKey(id, off+uint64(i)*n) }
	c.mu.Lock()
	for i := range held {
		k := key(i)
		if held[i] = c.peek(k); held[i] != nil {
			continue
		}
		missing++
		if c.loading[k] != nil {
			others = append(others, i)
		} else {
			c.loading[k] = own
		}
	}
	c.mu.Unlock()

	var err error
	if missing > len(others) {
		err = readWords(h, off, words)
	}
	c.mu.Lock()
	for i := range held {
		if k := key(i); c.loading[k] == own {
			delete(c.loading, k)
		}
	}
	c.mu.Unlock()
	close(own.done)
	for _, i := range others {
		if err == nil {
			held[i], err = c.view(key(i), h, off+uint64(i)*n, n)
		}
	}
	for i, s := range held {
		if s != nil && err == nil {
			s.copyTo(words[uint64(i)*n/8:][:n/8])
		}
	}
	return err
}

// peek is lookup without the mark that the slice was used: for who passes over many.
func (c *tableCache) peek(key sliceKey) *l2Slice {
	set := c.set(key)
	for i := range set {
		if s := set[i].Load(); s != nil && s.key == key {
			return s
		}
	}
	return nil
}

// copyTo copies the words of a slice, whose pairs belong together, to w.
func (s *l2Slice) copyTo(w []uint64) {
	for i := 0; i < len(w); i += 2 {
		for {
			seq := s.seq.Load()
			w[i], w[i+1] = atomic.LoadUint64(&s.words[i]), atomic.LoadUint64(&s.words[i+1])
			if seq&1 == 0 && s.seq.Load() == seq {
				break
			}
		}
	}
}

// readWords fills words with those at host offset off of h.
func readWords(h *hostFile, off uint64, words []uint64) error {
	buf := getBuffer(uint64(len(words)) * 8)
	defer putBuffer(buf)
	if err := h.readFull(*buf, off); err != nil {
		return err
	}
	p := *buf
	for i := range words {
		words[i] = binary.BigEndian.Uint64(p[8*i:])
	}
	return nil
}

// readSlice reads a slice without caching it.
func readSlice(key sliceKey, h *hostFile, off, n uint64) (*l2Slice, error) {
	buf := slicePool.Get().(*[]byte)
	defer slicePool.Put(buf)
	p := (*buf)[:n]
	if err := h.readFull(p, off); err != nil {
		return nil, err
	}
	s := &l2Slice{key: key, off: off, words: make([]uint64, n/8)}
	for i := range s.words {
		s.words[i] = binary.BigEndian.Uint64(p[8*i:])
	}
	return s, nil
}

// slicePool holds buffers of one slice, for reading and writing them.
var slicePool = sync.Pool{New: func() any { b := make([]byte, 1<<tableSliceBits); return &b }}

// roomLocked reports whether there is a place for a new slice with key: an empty one, or one whose slice is
// neither dirty nor part of a cut. Precondition: mu.
func (c *tableCache) roomLocked(key sliceKey) bool {
	set := c.set(key)
	for i := range set {
		if s := set[i].Load(); s == nil || !s.dirty && !s.cut {
			return true
		}
	}
	return false
}

// victimLocked returns the place that a new slice for key takes, or nil if there is no room: an empty one, or
// else the first one from the hand on whose slice was not used since the hand came by. Precondition: mu.
func (c *tableCache) victimLocked(key sliceKey) *atomic.Pointer[l2Slice] {
	set := c.set(key)
	for i := range set {
		if set[i].Load() == nil {
			return &set[i]
		}
	}
	// The first round takes the marks away, so the second one finds what the first did not.
	for range 2 * len(set) {
		c.hand++
		place := &set[c.hand%uint(len(set))]
		if s := place.Load(); !s.dirty && !s.cut && s.used.Swap(0) == 0 {
			return place
		}
	}
	return nil
}

// insertLocked makes s resident in place of a clean slice and reports whether there was one.
// Precondition: mu.
func (c *tableCache) insertLocked(s *l2Slice) bool {
	v := c.victimLocked(s.key)
	if v == nil {
		return false
	}
	if old := v.Load(); old != nil {
		old.resident = false
	}
	s.resident = true
	v.Store(s)
	return true
}

// fresh enters a slice of n zero bytes for a table that was just written whole, in place of what the
// cache may still hold of an earlier table at that offset. Where there is no room it is read when it is
// needed.
func (c *tableCache) fresh(key sliceKey, off, n uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked(key)
	c.insertLocked(&l2Slice{key: key, off: off, words: make([]uint64, n/8)})
}

// drop removes a slice whose table is gone, changes included.
func (c *tableCache) drop(key sliceKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked(key)
}

// dropLocked is drop. Precondition: mu.
func (c *tableCache) dropLocked(key sliceKey) {
	set := c.set(key)
	for i := range set {
		if s := set[i].Load(); s != nil && s.key == key {
			set[i].Store(nil)
			s.resident = false
			if s.dirty {
				s.dirty = false
				for j, d := range c.dirty {
					if d == s {
						c.dirty = append(c.dirty[:j], c.dirty[j+1:]...)
						break
					}
				}
			}
		}
	}
}

// forget removes all slices of image id, changes included: there are none, or nobody will write them.
func (c *tableCache) forget(id uint16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dirty = slices.DeleteFunc(c.dirty, func(s *l2Slice) bool { return uint64(s.key)>>48 == uint64(id) })
	for i := range c.sets {
		if s := c.sets[i].Load(); s != nil && uint64(s.key)>>48 == uint64(id) {
			c.sets[i].Store(nil)
			s.resident = false
		}
	}
}

// takeID returns a number that no image of the chain has, for one that is read by tables of its own. It goes back with
// giveID.
func (c *tableCache) takeID() (uint16, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	const first, last = maxChainDepth + 1, 1<<16 - 1
	if c.ids == nil {
		c.ids = make(map[uint16]struct{})
	}
	if len(c.ids) > last-first {
		return 0, fmt.Errorf("%w: %d snapshots are open", ErrBusy, len(c.ids))
	}
	for {
		if c.lastID++; c.lastID < first {
			c.lastID = first
		}
		if _, taken := c.ids[c.lastID]; !taken {
			c.ids[c.lastID] = struct{}{}
			return c.lastID, nil
		}
	}
}

// giveID gives a number of takeID back. The cache has forgotten it.
func (c *tableCache) giveID(id uint16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.ids, id)
}

// change runs f, which changes s.words, and marks the slice dirty. It reports false, without running
// f, if s is no longer resident: the caller gets the slice again. What a cut took stays as it was.
// Precondition: the image's metadata lock is held, so that changes follow each other.
func (c *tableCache) change(s *l2Slice, f func(words []uint64)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !s.resident {
		return false
	}
	if s.cut && s.shadow == nil {
		s.shadow = append([]uint64(nil), s.words...)
	}
	if !s.dirty {
		s.dirty = true
		c.dirty = append(c.dirty, s)
	}
	s.seq.Add(1)
	f(s.words)
	s.seq.Add(1)
	return true
}

// cutDirty takes the dirty slices of image id: what they hold now is what writeCut will write, however
// they change meanwhile.
func (c *tableCache) cutDirty(id uint16) []*l2Slice {
	c.mu.Lock()
	defer c.mu.Unlock()
	var taken []*l2Slice
	kept := c.dirty[:0]
	for _, s := range c.dirty {
		if uint64(s.key)>>48 != uint64(id) {
			kept = append(kept, s)
			continue
		}
		s.dirty, s.cut = false, true
		taken = append(taken, s)
	}
	clear(c.dirty[len(kept):])
	c.dirty = kept
	return taken
}

// writeCut writes a slice as of its cut to h.
func (c *tableCache) writeCut(s *l2Slice, h *hostFile) error {
	buf := slicePool.Get().(*[]byte)
	defer slicePool.Put(buf)
	p := (*buf)[:8*len(s.words)]
	c.mu.Lock()
	words := s.words
	if s.shadow != nil {
		words = s.shadow
	}
	for i, w := range words {
		binary.BigEndian.PutUint64(p[8*i:], w)
	}
	c.mu.Unlock()
	return h.write(useL2, p, s.off)
}

// endCut gives the slices of a cut back: written, or, after a failure, dirty again with all that has
// changed since.
func (c *tableCache) endCut(slices []*l2Slice, written bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range slices {
		s.cut, s.shadow = false, nil
		if !written && !s.dirty && s.resident {
			s.dirty = true
			c.dirty = append(c.dirty, s)
		}
	}
}
