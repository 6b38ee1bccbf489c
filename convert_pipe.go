package qcow2

import (
	"context"
	"errors"
	"sync"
	"time"
)

// The pipeline of Convert:
//
//	the caller's goroutine   scans the source's extents and hands out pieces in guest order; reports progress
//	each worker              reads its piece, looks for zeros, compresses; waits for its turn and takes host clusters;
//	                         writes its piece and maps it
//
// Turns come in guest order, so that the host clusters of an *Image do not depend on the number of workers. A worker
// holds the one piece and its buffers, so the memory is that of the workers. The worker with the first piece never
// waits for another one, so none waits for ever; after an error all turns are over.

// turns gives the workers their turns, in the order of pieces.
type turns struct {
	mu       sync.Mutex
	cond     sync.Cond
	next     int64 // the piece whose turn it is
	finished int64 // pieces that are done with
	over     bool  // somebody failed
}

// wait waits for the turn of piece seq. It reports false if there are no turns any more.
func (t *turns) wait(seq int64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.next != seq && !t.over {
		t.cond.Wait()
	}
	return !t.over
}

// pass ends the turn.
func (t *turns) pass() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next++
	t.cond.Broadcast()
}

// finish notes that a piece is done with.
func (t *turns) finish() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.finished++
	t.cond.Broadcast()
}

// alone waits until all pieces before seq, whose turn it is, are done with. It reports false if there are no turns any
// more.
func (t *turns) alone(seq int64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.finished != seq && !t.over {
		t.cond.Wait()
	}
	return !t.over
}

// errTurnsOver says that another piece has failed, whose error counts.
var errTurnsOver = errors.New("another piece failed")

// end ends all turns.
func (t *turns) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	t.cond.Broadcast()
}

// pipeline is the part of run that the caller's goroutine keeps.
type pipeline struct {
	c        *converter
	ctx      context.Context
	cancel   context.CancelCauseFunc
	jobs     chan *piece // in guest order
	results  chan *piece
	inFlight int
	done     int64 // bytes of the source that are done with
	err      error // the first that was met
	from     time.Time
	spent    int64 // bytes that count for Rate
}

// run copies everything.
func (c *converter) run(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	n := c.workers()
	l := &pipeline{c: c, jobs: make(chan *piece), results: make(chan *piece, n), from: time.Now()}
	l.ctx, l.cancel = context.WithCancelCause(ctx)
	defer l.cancel(nil)
	c.turns.cond.L = &c.turns.mu
	c.buffers = make(chan *pieceBuffers, n)
	var workers sync.WaitGroup
	for range n {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for p := range l.jobs {
				p.err = c.copy(l.ctx, p)
				if p.err != nil {
					c.turns.end()
				}
				l.results <- p
			}
		}()
	}
	err := c.scan(ctx, l.start)
	if err != nil {
		c.turns.end()
		l.fail(err)
	}
	close(l.jobs)
	for l.inFlight > 0 {
		l.take(<-l.results)
	}
	workers.Wait()
	if l.err != nil {
		return l.err
	}
	if c.opts.Progress != nil && c.total == 0 {
		c.opts.Progress(0, 0)
	}
	return c.dst.Sync()
}

// start hands a piece to a worker, and takes results meanwhile. It returns the error that ends the copy.
func (l *pipeline) start(p *piece) error {
	if err := l.limit(p); err != nil {
		return err
	}
	for {
		// An error comes before more work.
		if l.err != nil {
			return l.err
		}
		if err := l.ctx.Err(); err != nil {
			return err
		}
		select {
		case l.jobs <- p:
			l.inFlight++
			return nil
		case q := <-l.results:
			l.take(q)
		case <-l.ctx.Done():
		}
	}
}

// take notes how a piece ended.
func (l *pipeline) take(p *piece) {
	l.inFlight--
	if p.err != nil {
		l.fail(p.err)
		return
	}
	n := min(p.off+p.n, l.c.total) - p.off
	if n <= 0 || l.err != nil || l.ctx.Err() != nil {
		return
	}
	l.done += n
	if l.c.opts.Progress != nil {
		l.c.opts.Progress(l.done, l.c.total)
	}
}

// fail keeps the first error, and ends what is going on.
func (l *pipeline) fail(err error) {
	if l.err == nil || l.err == errTurnsOver {
		l.err = err
	}
	l.cancel(err)
}

// limit waits until the piece may be read at the rate that is asked for, and takes results meanwhile.
func (l *pipeline) limit(p *piece) error {
	if l.c.opts.Rate == 0 {
		return nil
	}
	due := l.from.Add(time.Duration(float64(l.spent) / float64(l.c.opts.Rate) * float64(time.Second)))
	for _, r := range p.reads {
		l.spent += r.n
	}
	timer := time.NewTimer(time.Until(due))
	defer timer.Stop()
	for len(p.reads) > 0 {
		select {
		case <-timer.C:
			return nil
		case q := <-l.results:
			l.take(q)
		case <-l.ctx.Done():
			if l.err != nil {
				return l.err
			}
			return l.ctx.Err()
		}
	}
	return nil
}

// copy copies one piece.
func (c *converter) copy(ctx context.Context, p *piece) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if p.copies() {
		p.buf = c.takeBuffers()
		defer c.putBuffers(p.buf)
		if err := c.fill(ctx, p); err != nil {
			return err
		}
	}
	if c.image == nil {
		return c.writeDisk(ctx, p)
	}
	if !c.turns.wait(p.seq) {
		return errTurnsOver
	}
	err := c.place(p)
	if err == nil {
		c.turns.pass()
		err = c.writeImage(ctx, p)
	}
	if err == nil {
		c.turns.finish()
	}
	return err
}

// pieceBuffers is what a worker needs for a piece.
type pieceBuffers struct {
	data   []byte // content
	packed []byte // payloads of compressed clusters, one behind the other
	sizes  []int  // of each cluster's payload; 0: it is stored plain
}

// takeBuffers returns buffers for a piece. There are as many as workers at most.
func (c *converter) takeBuffers() *pieceBuffers {
	select {
	case b := <-c.buffers:
		return b
	default:
	}
	b := &pieceBuffers{data: make([]byte, c.piece)}
	if c.opts.Compress {
		b.packed = make([]byte, c.piece)
		b.sizes = make([]int, c.piece/c.unit)
	}
	return b
}

// putBuffers gives buffers back.
func (c *converter) putBuffers(b *pieceBuffers) { c.buffers <- b }
