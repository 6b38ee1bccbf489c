package qcow2

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
)

// requests knows which guest requests are in flight. It answers two questions without a lock on the
// path of reads and of in-place writes:
//
//   - Which requests may still use a host cluster that was freed? Each registers with the epoch in which
//     it began; a cluster freed in epoch e is nobody's once every registered epoch is above e (I4).
//   - Who writes into which guest clusters? An in-place write registers its range; whoever wants to
//     change the mapping of a range holds it exclusively, which waits for in-place writes of the same
//     clusters and makes new ones wait.
//
// The argument for both is the same. A request stores its registration before it looks at a mapping (or
// at the exclusive ranges); the other side changes the mapping (or enters its range) before it scans the
// registrations. Atomics are totally ordered, so one of the two always sees the other.
type requests struct {
	epoch atomic.Uint64 // current epoch, from 1
	first slotBlock     // the slots; more blocks are linked behind when all are taken

	paused     atomic.Bool  // no request may register
	exclusives atomic.Int32 // number of ranges held or about to be held exclusively
	waiters    atomic.Int32 // goroutines in cond.Wait, or about to be
	mu         sync.Mutex
	cond       sync.Cond       // something left; on mu
	ranges     []*clusterRange // exclusive ranges; guarded by mu
}

// clusterRange is a range of guest clusters, both ends included.
type clusterRange struct{ first, last uint64 }

// overlaps reports whether r and the range from first to last share a cluster.
func (r *clusterRange) overlaps(first, last uint64) bool { return r.first <= last && first <= r.last }

// slotBlock is a piece of the list of slots.
type slotBlock struct {
	slots [64]slot
	next  atomic.Pointer[slotBlock]
}

// slot is the registration of one request. It fills a cache line, so that requests on different
// processors do not meet.
type slot struct {
	state       atomic.Uint64 // 0: free; else epoch<<1, with bit 0 set for an in-place write
	first, last atomic.Uint64 // guest clusters of an in-place write; valid while bit 0 is set
	_           [40]byte
}

// newRequests returns an empty table.
func newRequests() *requests {
	r := &requests{}
	r.epoch.Store(1)
	r.cond.L = &r.mu
	return r
}

// enter registers a request in the current epoch. The slot goes back with leave.
func (r *requests) enter() *slot {
	start := rand.Uint32()
	for b := &r.first; ; {
		for i := range uint32(len(b.slots)) {
			s := &b.slots[(start+i)%uint32(len(b.slots))]
			if s.state.Load() == 0 && s.state.CompareAndSwap(0, r.epoch.Load()<<1) {
				if r.paused.Load() {
					r.leave(s)
					r.waitResumed()
					return r.enter()
				}
				return s
			}
		}
		next := b.next.Load()
		if next == nil {
			b.next.CompareAndSwap(nil, &slotBlock{})
			next = b.next.Load()
		}
		b = next
	}
}

// leave ends a registration.
func (r *requests) leave(s *slot) {
	s.state.Store(0)
	if r.waiters.Load() != 0 {
		r.mu.Lock()
		r.cond.Broadcast()
		r.mu.Unlock()
	}
}

// enterInPlace registers a request that may write in place into the guest clusters from first to last.
// It waits while somebody holds one of them exclusively.
func (r *requests) enterInPlace(first, last uint64) *slot {
	for {
		s := r.enter()
		s.first.Store(first)
		s.last.Store(last)
		s.state.Store(s.state.Load() | 1)
		if r.exclusives.Load() == 0 {
			return s
		}
		r.mu.Lock()
		if !r.heldLocked(first, last) {
			r.mu.Unlock()
			return s
		}
		// Step back before waiting: the holder may be waiting for this very slot.
		r.mu.Unlock()
		r.leave(s)
		r.mu.Lock()
		r.waiters.Add(1)
		for r.heldLocked(first, last) {
			r.cond.Wait()
		}
		r.waiters.Add(-1)
		r.mu.Unlock()
	}
}

// pause waits until no request is registered, and keeps new ones waiting until resume. The caller is not registered,
// and pauses once. By the argument above a request either sees the pause, or is seen by it.
func (r *requests) pause() {
	r.paused.Store(true)
	r.waitPast(r.advance())
}

// resume ends a pause.
func (r *requests) resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.paused.Store(false)
	r.cond.Broadcast()
}

// waitResumed waits until there is no pause.
func (r *requests) waitResumed() {
	r.mu.Lock()
	r.waiters.Add(1)
	for r.paused.Load() {
		r.cond.Wait()
	}
	r.waiters.Add(-1)
	r.mu.Unlock()
}

// heldLocked reports whether a cluster from first to last is held exclusively. Precondition: mu.
func (r *requests) heldLocked(first, last uint64) bool {
	for _, h := range r.ranges {
		if h.overlaps(first, last) {
			return true
		}
	}
	return false
}

// lock takes the range c exclusively: it waits for other holders and for in-place writes of its
// clusters, and keeps new ones out until unlock. The caller must not be registered for in-place
// writes.
func (r *requests) lock(c *clusterRange) {
	r.mu.Lock()
	r.waiters.Add(1)
	for r.heldLocked(c.first, c.last) {
		r.cond.Wait()
	}
	r.ranges = append(r.ranges, c)
	r.exclusives.Add(1)
	for r.writingInPlace(c) {
		r.cond.Wait()
	}
	r.waiters.Add(-1)
	r.mu.Unlock()
}

// unlock gives the range c back.
func (r *requests) unlock(c *clusterRange) {
	r.mu.Lock()
	for i, h := range r.ranges {
		if h == c {
			last := len(r.ranges) - 1
			r.ranges[i] = r.ranges[last]
			r.ranges[last] = nil
			r.ranges = r.ranges[:last]
			break
		}
	}
	r.exclusives.Add(-1)
	if r.waiters.Load() != 0 {
		r.cond.Broadcast()
	}
	r.mu.Unlock()
}

// writingInPlace reports whether an in-place write of a cluster of c is registered.
func (r *requests) writingInPlace(c *clusterRange) bool {
	for b := &r.first; b != nil; b = b.next.Load() {
		for i := range b.slots {
			s := &b.slots[i]
			if s.state.Load()&1 != 0 && c.overlaps(s.first.Load(), s.last.Load()) {
				return true
			}
		}
	}
	return false
}

// advance ends the current epoch and returns it. Whatever was unlinked before the call can be in use
// only by requests registered in the returned epoch or an earlier one.
func (r *requests) advance() uint64 { return r.epoch.Add(1) - 1 }

// oldest returns the smallest epoch that a request is registered in, or the largest possible one.
func (r *requests) oldest() uint64 {
	oldest := ^uint64(0)
	for b := &r.first; b != nil; b = b.next.Load() {
		for i := range b.slots {
			if st := b.slots[i].state.Load(); st != 0 {
				oldest = min(oldest, st>>1)
			}
		}
	}
	return oldest
}

// waitPast waits until no request is registered in the given epoch or an earlier one. The caller is not
// registered.
func (r *requests) waitPast(epoch uint64) {
	r.mu.Lock()
	r.waiters.Add(1)
	for r.oldest() <= epoch {
		r.cond.Wait()
	}
	r.waiters.Add(-1)
	r.mu.Unlock()
}

// drain waits until no request is registered and no range held. The caller keeps new ones out.
func (r *requests) drain() {
	r.mu.Lock()
	r.waiters.Add(1)
	for len(r.ranges) > 0 || r.oldest() != ^uint64(0) {
		r.cond.Wait()
	}
	r.waiters.Add(-1)
	r.mu.Unlock()
}
