package qcow2

import (
	"context"
	"fmt"
	"hash/maphash"
	"iter"
	"sync"
)

// What a stream reads: the source as runs of whole guest clusters, and their data, read ahead and in order.

// streamSource is the disk that is streamed.
type streamSource struct {
	Disk
	size   uint64 // of the disk, in bytes
	r      *entryRules
	backed bool // the image has a backing file
	depth  int  // if positive, the layers at that depth and below are the backing file's
}

// guestRun is a run of guest clusters that have an entry: data, or zeros that hide the backing file.
type guestRun struct {
	first, n uint64 // cluster index, clusters
	zero     bool
}

// What the extents in a guest cluster say, as bits.
const (
	seenData    = 1 << iota // content of its own
	seenZero                // zeros of its own, over a backing file
	seenBelow               // content of the backing file
	seenNothing = 0         // zeros that need no entry
)

// seen says what an extent means for the clusters that it touches.
func (s *streamSource) seen(e *Extent) uint8 {
	zero := e.Kind == ExtentZero || e.Kind == ExtentUnallocated
	switch {
	case s.depth > 0 && e.Depth >= s.depth:
		if zero {
			return seenNothing
		}
		return seenBelow
	case !zero:
		return seenData
	case !s.backed:
		return seenNothing
	case s.r.version2:
		return seenData // it has no zero clusters
	}
	return seenZero
}

// runs yields the runs that have entries, each as long as it is.
func (s *streamSource) runs(ctx context.Context) iter.Seq2[guestRun, error] {
	return func(yield func(guestRun, error) bool) {
		var run guestRun // the last one, which may go on
		add := func(first, n uint64, seen uint8) bool {
			// Zeros beside content of the backing file in one cluster need that content copied.
			data := seen&seenData != 0 || seen&seenZero != 0 && seen&seenBelow != 0
			if !data && seen&seenZero == 0 {
				return true
			}
			if run.n > 0 && run.zero == !data && run.first+run.n == first {
				run.n += n
				return true
			}
			if run.n > 0 && !yield(run, nil) {
				return false
			}
			run = guestRun{first: first, n: n, zero: !data}
			return true
		}
		off := uint64(0)
		part := uint8(seenNothing) // of the cluster that off is inside
		for e, err := range wholeExtents(ctx, s.Extents(0, int64(s.size)), int64(s.size)) {
			if err != nil {
				yield(guestRun{}, err)
				return
			}
			end, seen := off+uint64(e.Len), s.seen(&e)
			if next := s.r.clusterStart(off) + s.r.clusterSize; off != s.r.clusterStart(off) {
				part |= seen
				if end < next {
					off = end
					continue
				}
				if !add(off>>s.r.clusterBits, 1, part) {
					return
				}
				off = next
			}
			if n := (end - off) >> s.r.clusterBits; n > 0 && !add(off>>s.r.clusterBits, n, seen) {
				return
			}
			off, part = end, seen
		}
		if s.r.offsetInCluster(off) != 0 && !add(off>>s.r.clusterBits, 1, part) {
			return
		}
		if run.n > 0 {
			yield(run, nil)
		}
	}
}

// runDigest tells one sequence of runs from another. It is keyed, so that no source can aim at a collision.
type runDigest struct {
	seed maphash.Seed
	sum  uint64
}

// add adds a run.
func (d *runDigest) add(r guestRun) {
	d.sum = maphash.Comparable(d.seed, struct {
		sum uint64
		run guestRun
	}{d.sum, r})
}

// sameRuns is runs, with ErrSourceChanged at the end if they are not those of want.
func (s *streamSource) sameRuns(ctx context.Context, want runDigest) iter.Seq2[guestRun, error] {
	return func(yield func(guestRun, error) bool) {
		d := runDigest{seed: want.seed}
		for run, err := range s.runs(ctx) {
			if err == nil {
				d.add(run)
			}
			if !yield(run, err) || err != nil {
				return
			}
		}
		if d != want {
			yield(guestRun{}, fmt.Errorf("%w: its extents are others", ErrSourceChanged))
		}
	}
}

// readClusters reads whole guest clusters from first on. What lies past the end of the disk is zeros.
func (s *streamSource) readClusters(p []byte, first uint64) error {
	off := first << s.r.clusterBits
	in := p[:min(uint64(len(p)), s.size-off)]
	clear(p[len(in):])
	n, err := s.ReadAt(in, int64(off))
	if err = filled(n, len(in), err); err == nil {
		return nil
	}
	return fmt.Errorf("read %d bytes at guest %#x: %w", len(in), off, err)
}

// streamBatch is a piece of a run on its way through the workers.
type streamBatch struct {
	guestRun
	data   []byte // of the clusters; none of a run of zeros
	packed []byte // payloads, one behind the other
	sizes  []int  // of each cluster: 0 if it is zeros, the cluster size if it is stored plain, else of its payload
	room   []byte // for data
	err    error
	ready  chan struct{} // gets one value when a worker is done with it
}

// each cuts the runs into batches, has workers fill them in, and takes them in their order. One that holds data gets
// it by prepare, in a worker's goroutine. At most workers+2 batches are there at a time. It returns after all of its
// goroutines; after an error there is no next call.
func (s *streamer) each(runs func(context.Context) iter.Seq2[guestRun, error], prepare, take func(*streamBatch) error) error {
	ctx, cancel := context.WithCancel(s.ctx)
	n := s.workers + 2
	free, jobs, order := make(chan *streamBatch, n), make(chan *streamBatch, n), make(chan *streamBatch, n)
	for len(s.batches) < n {
		s.batches = append(s.batches, &streamBatch{ready: make(chan struct{}, 1)})
	}
	for _, b := range s.batches {
		free <- b
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var failed error // of the runs; read after order is closed
	wg.Add(1 + s.workers)
	go func() {
		defer wg.Done()
		defer close(order)
		defer close(jobs)
		failed = s.cut(ctx, runs, free, func(b *streamBatch) {
			order <- b // neither blocks: the channels have room for all batches
			if b.zero {
				b.ready <- struct{}{}
			} else {
				jobs <- b
			}
		})
	}()
	for range s.workers {
		go func() {
			defer wg.Done()
			for b := range jobs {
				if b.err = ctx.Err(); b.err == nil {
					b.err = prepare(b)
				}
				b.ready <- struct{}{}
			}
		}()
	}
	for b := range order {
		<-b.ready
		if b.err != nil {
			return b.err
		}
		if err := take(b); err != nil {
			return err
		}
		free <- b
	}
	return failed
}

// cut sends the runs in batches of free.
func (s *streamer) cut(ctx context.Context, runs func(context.Context) iter.Seq2[guestRun, error], free <-chan *streamBatch, send func(*streamBatch)) error {
	most := uint64(max(streamChunk>>s.r.clusterBits, 1))
	for run, err := range runs(ctx) {
		if err != nil {
			return err
		}
		for run.n > 0 {
			var b *streamBatch
			select {
			case b = <-free:
			case <-ctx.Done():
				return ctx.Err()
			}
			b.guestRun, b.data = run, nil
			if !run.zero {
				b.n = min(run.n, most)
				if b.room == nil {
					b.room = make([]byte, most<<s.r.clusterBits)
				}
				b.data = b.room[:b.n<<s.r.clusterBits]
			}
			run.first, run.n = run.first+b.n, run.n-b.n
			send(b)
		}
	}
	return nil
}
