package main

import (
	"encoding/binary"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// clusterSize is the cluster size in bytes of the images: the default one.
const clusterSize = 64 << 10

// goroutines are the numbers of goroutines, for QEMU the queue depths, that each workload runs with.
var goroutines = []int{1, 2, 4}

// workload is a kind of work.
type workload struct {
	name   string
	n      int64 // bytes of one request
	random bool  // each request at a random multiple of n, rather than behind the one before
	write  bool
	// alloc: each request, or each cluster of it, meets clusters that were never written.
	alloc bool
	ops   int64   // requests of one measurement with alloc, where the disk bounds them
	aim   float64 // the rate aimed at, as a part of the raw file's; 0: none
}

// workloads are the rows of the report, for each number of goroutines.
var workloads = []workload{
	{name: "sequential read", n: 1 << 20, aim: 0.9},
	{name: "sequential overwrite", n: 1 << 20, write: true},
	{name: "random read", n: 4 << 10, random: true, aim: 0.8},
	{name: "random overwrite", n: 4 << 10, random: true, write: true, aim: 0.7},
	{name: "sequential allocating write", n: 1 << 20, write: true, alloc: true, ops: 256, aim: 0.9},
	{name: "random allocating write", n: 4 << 10, random: true, write: true, alloc: true, ops: 16 << 10},
}

// disk is what a workload runs on: an Image or an os.File.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	io.Closer
}

// tally is work done, the time it took, and why it ended early.
type tally struct {
	requests int64
	elapsed  time.Duration
	err      error
}

// add adds more of the same work.
func (t *tally) add(more tally) {
	t.requests += more.requests
	t.elapsed += more.elapsed
	if t.err == nil {
		t.err = more.err
	}
}

// rate returns requests per second.
func (t *tally) rate() float64 { return float64(t.requests) / t.elapsed.Seconds() }

// runFor runs a workload that maps nothing on d, of size bytes, for about the given time.
func (w *workload) runFor(d disk, size int64, workers int, slice time.Duration, seed uint64) tally {
	blocks := uint64(size / w.n)
	// The clock is asked so rarely that it does not count, and so often that slices end in time.
	batch := max(1, (256<<10)/w.n)
	var next atomic.Uint64 // block of the next sequential request
	next.Store(seed * 0x9e3779b97f4a7c15 % blocks)
	var done atomic.Int64
	elapsed, err := inParallel(workers, func(worker int) error {
		random := rand.New(rand.NewPCG(seed, uint64(worker)))
		p := w.buffer(worker)
		begin := time.Now()
		count := int64(0)
		for time.Since(begin) < slice {
			for range batch {
				var block uint64
				if w.random {
					block = random.Uint64N(blocks)
				} else {
					block = (next.Add(1) - 1) % blocks
				}
				if err := w.request(d, p, int64(block)*w.n); err != nil {
					return err
				}
			}
			count += batch
		}
		done.Add(count)
		return nil
	})
	return tally{requests: done.Load(), elapsed: elapsed, err: err}
}

// runAll runs an allocating workload on d, a new disk of size bytes, and syncs it. Random requests fall into one cluster each, in random order, so
// that every one allocates.
func (w *workload) runAll(d disk, size int64, workers int, seed uint64) tally {
	var order []uint32 // of the clusters, in random order
	if w.random {
		order = make([]uint32, size/clusterSize)
		for i := range order {
			order[i] = uint32(i)
		}
		rand.New(rand.NewPCG(seed, 0)).Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	}
	var next atomic.Int64
	elapsed, err := inParallel(workers, func(worker int) error {
		p := w.buffer(worker)
		for {
			i := next.Add(1) - 1
			if i >= w.ops {
				return nil
			}
			off := i * w.n
			if w.random {
				// Anywhere within the cluster, so that there is something to fill up on both sides.
				off = int64(order[i])*clusterSize + int64(uint64(i)*0x9e3779b9%(clusterSize/uint64(w.n)))*w.n
			}
			if err := w.request(d, p, off); err != nil {
				return err
			}
		}
	})
	if err != nil {
		return tally{elapsed: elapsed, err: err}
	}
	begin := time.Now()
	err = d.Sync()
	return tally{requests: w.ops, elapsed: elapsed + time.Since(begin), err: err}
}

// request does one request with p at off.
func (w *workload) request(d disk, p []byte, off int64) error {
	var err error
	if w.write {
		_, err = d.WriteAt(p, off)
	} else {
		_, err = d.ReadAt(p, off)
	}
	return err
}

// buffer returns the buffer of one worker, not all zeros.
func (w *workload) buffer(worker int) []byte {
	p := make([]byte, w.n)
	for i := range p {
		p[i] = byte(i + worker + 1)
	}
	return p
}

// inParallel runs f in the given number of goroutines and returns the time from the start of all to the end
// of the last.
func inParallel(workers int, f func(worker int) error) (time.Duration, error) {
	errs := make([]error, workers)
	start := make(chan struct{})
	var ready, done sync.WaitGroup
	for worker := range workers {
		ready.Add(1)
		done.Add(1)
		go func() {
			defer done.Done()
			ready.Done()
			<-start
			errs[worker] = f(worker)
		}()
	}
	ready.Wait()
	begin := time.Now()
	close(start)
	done.Wait()
	elapsed := time.Since(begin)
	for _, err := range errs {
		if err != nil {
			return elapsed, err
		}
	}
	return elapsed, nil
}

// pattern fills p with what the mapped disks hold at off: each eight bytes tell where they stand.
func pattern(p []byte, off int64) {
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], uint64(off)+uint64(i)+1)
	}
}
