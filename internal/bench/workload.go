package main

import (
	"encoding/binary"
	"io"
	"math/rand/v2"
	"slices"
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
	ops   int64   // requests of one round with alloc, where the disk bounds them
	aim   float64 // the rate aimed at, as a part of the raw file's; 0: none
}

// workloads are the rows of the report, for each number of goroutines.
var workloads = []workload{
	{name: "sequential read", n: 1 << 20, aim: 0.9},
	{name: "sequential overwrite", n: 1 << 20, write: true},
	{name: "random read", n: 4 << 10, random: true, aim: 0.8},
	{name: "random overwrite", n: 4 << 10, random: true, write: true, aim: 0.7},
	{name: "sequential allocating write", n: 1 << 20, write: true, alloc: true, ops: 192, aim: 0.9},
	{name: "random allocating write", n: 4 << 10, random: true, write: true, alloc: true, ops: 16 << 10},
}

// disk is what a workload runs on: an Image or an os.File.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	io.Closer
}

// tally is work done, slice by slice.
type tally struct {
	requests int64
	elapsed  time.Duration
	rates    []float64 // of the slices, in requests per second
	err      error     // the first error
}

// add adds a slice in which so many requests took so long.
func (t *tally) add(requests int64, elapsed time.Duration, err error) {
	t.requests += requests
	t.elapsed += elapsed
	t.rates = append(t.rates, float64(requests)/elapsed.Seconds())
	if t.err == nil {
		t.err = err
	}
}

// rate returns the rate over all slices, in requests per second.
func (t *tally) rate() float64 { return float64(t.requests) / t.elapsed.Seconds() }

// undisturbed returns the rate that a quarter of the slices reached. Slices that lost the processor to
// something else lie below.
func (t *tally) undisturbed() float64 {
	rates := slices.Sorted(slices.Values(t.rates))
	return rates[len(rates)*3/4]
}

// job is a workload as one round runs it.
type job struct {
	workload
	size    int64         // of the disk in bytes
	workers int           // goroutines
	slice   time.Duration // length of a slice; with alloc it has a fixed number of requests
	round   uint64        // seed of the random order
	buffers [][]byte      // of the workers
	order   []int         // with alloc and random: the clusters, in random order
}

// newJob returns the job of a round.
func newJob(w workload, size int64, workers int, slice time.Duration, round int) *job {
	j := &job{workload: w, size: size, workers: workers, slice: slice, round: uint64(round)}
	for worker := range workers {
		p := make([]byte, w.n)
		pattern(p, int64(worker)) // not all zeros
		j.buffers = append(j.buffers, p)
	}
	if w.alloc && w.random {
		j.order = rand.New(rand.NewPCG(j.round, 0)).Perm(int(size / clusterSize))
	}
	return j
}

// run runs one slice on d.
func (j *job) run(d disk, turn int) (requests int64, elapsed time.Duration, err error) {
	if j.alloc {
		return j.runNew(d, turn)
	}
	return j.runMapped(d, turn)
}

// runMapped runs requests that map nothing for the time of a slice.
func (j *job) runMapped(d disk, turn int) (int64, time.Duration, error) {
	seed := j.round*turns + uint64(turn)
	blocks := uint64(j.size / j.n)
	// The clock is asked so rarely that it does not count, and so often that slices end in time.
	batch := max(1, (128<<10)/j.n)
	var next atomic.Uint64 // block of the next sequential request
	next.Store(seed * 0x9e3779b97f4a7c15 % blocks)
	var done atomic.Int64
	elapsed, err := inParallel(j.workers, func(worker int) error {
		random := rand.New(rand.NewPCG(seed, uint64(worker)))
		p := j.buffers[worker]
		begin := time.Now()
		count := int64(0)
		defer func() { done.Add(count) }()
		for time.Since(begin) < j.slice {
			for range batch {
				var block uint64
				if j.random {
					block = random.Uint64N(blocks)
				} else {
					block = (next.Add(1) - 1) % blocks
				}
				if err := j.request(d, p, int64(block)*j.n); err != nil {
					return err
				}
			}
			count += batch
		}
		return nil
	})
	return done.Load(), elapsed, err
}

// runNew runs the part of the requests to a new disk that falls to a slice, and syncs. Random requests fall
// into one cluster each, in random order, so that every one allocates.
func (j *job) runNew(d disk, turn int) (int64, time.Duration, error) {
	first, end := j.ops*int64(turn)/turns, j.ops*int64(turn+1)/turns
	var next atomic.Int64
	next.Store(first)
	elapsed, err := inParallel(j.workers, func(worker int) error {
		p := j.buffers[worker]
		for {
			i := next.Add(1) - 1
			if i >= end {
				return nil
			}
			off := i * j.n
			if j.random {
				// Anywhere within the cluster, so that there is something to fill up on both sides.
				off = int64(j.order[i])*clusterSize + int64(uint64(i)*0x9e3779b9%(clusterSize/uint64(j.n)))*j.n
			}
			if err := j.request(d, p, off); err != nil {
				return err
			}
		}
	})
	if err != nil {
		return 0, elapsed, err
	}
	begin := time.Now()
	err = d.Sync()
	return end - first, elapsed + time.Since(begin), err
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
