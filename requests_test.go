package qcow2

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// noEpoch is what oldest returns when no request is registered.
const noEpoch = ^uint64(0)

// TestConcurrencyRequestsEpochs follows the oldest epoch while requests come and go.
func TestConcurrencyRequestsEpochs(t *testing.T) {
	r := newRequests()
	type step struct{ ended, oldest uint64 }
	var got []step
	note := func(ended uint64) { got = append(got, step{ended, r.oldest()}) }
	note(0)
	a := r.enter()
	note(r.advance())
	b := r.enterInPlace(3, 4)
	note(r.advance())
	c := r.enter()
	note(0)
	r.leave(a)
	note(0)
	r.leave(c)
	note(r.advance())
	r.leave(b)
	note(0)
	want := []step{{0, noEpoch}, {1, 1}, {2, 1}, {0, 1}, {0, 2}, {3, 2}, {0, noEpoch}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(step{})); diff != "" {
		t.Errorf("epochs (-want +got):\n%s", diff)
	}
}

// TestConcurrencyRequestsSlots takes more slots than a block has: each is somebody's own, and all of them are
// seen.
func TestConcurrencyRequestsSlots(t *testing.T) {
	r := newRequests()
	seen := make(map[*slot]bool)
	for i := range 300 {
		s := r.enter()
		if seen[s] {
			t.Fatalf("request %d got a slot that is taken", i)
		}
		seen[s] = true
		r.advance()
	}
	n := 0
	for s := range seen {
		if r.oldest() > 300 {
			t.Fatalf("oldest epoch is %d with %d requests registered", r.oldest(), 300-n)
		}
		r.leave(s)
		n++
	}
	if got := r.oldest(); got != noEpoch {
		t.Fatalf("oldest epoch is %d with no request registered", got)
	}
	if s := r.enter(); !seen[s] {
		t.Error("a new slot although all are free")
	}
}

// TestConcurrencyRequestsRanges has goroutines take ranges exclusively and for in-place writes. An exclusive
// range is alone on its clusters.
func TestConcurrencyRequestsRanges(t *testing.T) {
	const clusters = 12
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := newRequests()
	var users [clusters]atomic.Int32 // +1 for each in-place write, -1000 for an exclusive one
	use := func(first, last uint64, d int32) error {
		for c := first; c <= last; c++ {
			now := users[c].Add(d)
			if d < 0 && now != d || d > 0 && now <= 0 {
				return fmt.Errorf("cluster %d has users %d after %d entered", c, now, d)
			}
		}
		runtime.Gosched()
		for c := first; c <= last; c++ {
			users[c].Add(-d)
		}
		return nil
	}
	var wg sync.WaitGroup
	for w := range uint64(8) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rnd := rand.New(rand.NewPCG(seed, w))
			for range 2000 {
				first := rnd.Uint64N(clusters)
				last := min(first+rnd.Uint64N(4), clusters-1)
				var err error
				if rnd.IntN(3) == 0 {
					c := clusterRange{first: first, last: last}
					r.lock(&c)
					err = use(first, last, -1000)
					r.unlock(&c)
				} else {
					s := r.enterInPlace(first, last)
					err = use(first, last, 1)
					r.leave(s)
				}
				if err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	if len(r.ranges) != 0 || r.exclusives.Load() != 0 || r.waiters.Load() != 0 || r.oldest() != noEpoch {
		t.Errorf("left behind: ranges %v, exclusives %d, waiters %d, oldest epoch %d", r.ranges, r.exclusives.Load(), r.waiters.Load(), r.oldest())
	}
}

// TestConcurrencyRequestsReuse replaces a place that requests look up, and frees the old one once the epoch in
// which it was replaced is past: no request may then still use it (I4). One side asks for the oldest epoch,
// the other waits for it.
func TestConcurrencyRequestsReuse(t *testing.T) {
	for _, wait := range []bool{false, true} {
		t.Run(fmt.Sprintf("wait=%v", wait), func(t *testing.T) {
			type place struct{ freed atomic.Bool }
			r := newRequests()
			var current atomic.Pointer[place]
			current.Store(new(place))
			var wg sync.WaitGroup
			var stop atomic.Bool
			for range 6 {
				wg.Add(1)
				go func() {
					defer wg.Done()
					for !stop.Load() {
						s := r.enter()
						p := current.Load()
						for range 3 {
							if p.freed.Load() {
								t.Error("a place was freed while a request used it")
								stop.Store(true)
							}
							runtime.Gosched()
						}
						r.leave(s)
					}
				}()
			}
			type old struct {
				p     *place
				epoch uint64
			}
			var limbo []old
			freed := 0
			for range 2000 {
				p := current.Swap(new(place))
				limbo = append(limbo, old{p, r.advance()})
				if wait && len(limbo) > 3 {
					r.waitPast(limbo[0].epoch)
				}
				for oldest := r.oldest(); len(limbo) > 0 && limbo[0].epoch < oldest; limbo = limbo[1:] {
					limbo[0].p.freed.Store(true)
					freed++
				}
				runtime.Gosched()
			}
			stop.Store(true)
			wg.Wait()
			if freed == 0 || wait && freed < 1990 {
				t.Errorf("only %d of 2000 places became free", freed)
			}
		})
	}
}

// TestConcurrencyRequestsDrain closes the door while requests of all kinds come: when drain returns, none is
// inside.
func TestConcurrencyRequestsDrain(t *testing.T) {
	for range 50 {
		r := newRequests()
		var closed atomic.Bool
		var inside, entered atomic.Int32
		visit := func() bool {
			if closed.Load() {
				return false
			}
			inside.Add(1)
			entered.Add(1)
			runtime.Gosched()
			inside.Add(-1)
			return true
		}
		var wg sync.WaitGroup
		for k := range uint64(6) {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for ok := true; ok; {
					switch k % 3 {
					case 0:
						s := r.enter()
						ok = visit()
						r.leave(s)
					case 1:
						s := r.enterInPlace(0, k)
						ok = visit()
						r.leave(s)
					case 2:
						c := clusterRange{first: 1, last: 1}
						r.lock(&c)
						ok = visit()
						r.unlock(&c)
					}
				}
			}()
		}
		for entered.Load() < 50 {
			runtime.Gosched()
		}
		closed.Store(true)
		r.drain()
		if n := inside.Load(); n != 0 {
			t.Fatalf("%d requests inside after drain", n)
		}
		wg.Wait()
	}
}
