package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
)

// CompareOptions says how two disks are compared. The nil pointer and the zero value compare what they read as.
type CompareOptions struct {
	// Strict compares sizes, too, and what the extents say: whether anybody in the chain holds a range, whether it reads
	// as zeros by that, whether it has a place in the host file, and whether that is a hole (Extent.Hole). Which layer it
	// is, and which place, does not matter.
	Strict bool
	// Workers is how many ranges are read and compared at once. Each takes 512 KiB of memory. Default, and for 0:
	// GOMAXPROCS; the most is 64.
	Workers int
	// Progress, if not nil, is called with the number of bytes of the larger disk that are done with, but for the ranges
	// that workers hold, now and then and, if there is no difference, at the end, by the goroutine that called Compare.
	Progress func(done, total int64)
}

// DifferenceKind says in what two disks differ.
type DifferenceKind int

const (
	DifferentContent    DifferenceKind = iota // one byte
	DifferentSize                             // the sizes; with CompareOptions.Strict
	DifferentAllocation                       // what a range is, read from the extents; with CompareOptions.Strict
)

// String returns "content", "size" or "allocation".
func (k DifferenceKind) String() string {
	switch k {
	case DifferentContent:
		return "content"
	case DifferentSize:
		return "size"
	case DifferentAllocation:
		return "allocation"
	}
	return fmt.Sprintf("DifferenceKind(%d)", int(k))
}

// Difference is the first difference of two disks.
type Difference struct {
	Kind DifferenceKind
	// Off is the guest offset in bytes of the first byte, or of the beginning of the first range, that differs. It is
	// the smaller size for DifferentSize.
	Off int64
}

// CompareError is an error of one of two disks that are compared.
type CompareError struct {
	Second  bool  // it is the second of the two
	Reading bool  // its content could not be read; otherwise its extents
	Off     int64 // guest offset in bytes
	Err     error
}

func (e *CompareError) Error() string {
	which, what := "first", "extents"
	if e.Second {
		which = "second"
	}
	if e.Reading {
		what = "content"
	}
	return fmt.Sprintf("%s of the %s disk at guest %#x: %v", what, which, e.Off, e.Err)
}

// Unwrap returns the error of the disk.
func (e *CompareError) Unwrap() error { return e.Err }

// Compare returns the first difference of a and b, or nil if there is none. Disks of different size are equal if the
// rest of the larger one reads as zeros, unless opts.Strict says otherwise. What reads as zeros by the extents of both is
// not read. Neither disk may be written meanwhile.
//
// The answer does not depend on the number of workers: what comes first on the disk counts, a difference or an error. With
// Strict, a range that differs in its allocation and in its content differs in its allocation.
//
// Errors: *OptionError, *CompareError with that of a disk, and that of ctx.
func Compare(ctx context.Context, a, b Disk, opts *CompareOptions) (*Difference, error) {
	var o CompareOptions
	if opts != nil {
		o = *opts
	}
	d, err := compareDisks(ctx, a, b, o)
	if err != nil {
		return nil, fmt.Errorf("qcow2: compare: %w", err)
	}
	return d, nil
}

const (
	// compareChunk is the most bytes of each disk that are compared at once. Two of them fit the processor's cache with
	// room to spare, and a system call is little beside them.
	compareChunk = 256 << 10
	// maxCompareWorkers bounds CompareOptions.Workers.
	maxCompareWorkers = 64
)

// compareDisks is Compare without the words around the error.
func compareDisks(ctx context.Context, a, b Disk, o CompareOptions) (*Difference, error) {
	if o.Workers < 0 || o.Workers > maxCompareWorkers {
		return nil, &OptionError{Option: "Workers", Value: o.Workers, Reason: fmt.Sprintf("want 0 to %d", maxCompareWorkers)}
	}
	if o.Workers == 0 {
		o.Workers = min(runtime.GOMAXPROCS(0), maxCompareWorkers)
	}
	c := &comparison{o: o, disks: [2]Disk{a, b}}
	small, large := min(a.Size(), b.Size()), max(a.Size(), b.Size())
	if o.Strict && small != large {
		return &Difference{Kind: DifferentSize, Off: small}, nil
	}
	c.first.Store(&outcome{off: large})
	c.run(ctx, large)
	end := c.first.Load()
	if end.err == nil && end.diff == nil && o.Progress != nil {
		o.Progress(large, large)
	}
	return end.diff, end.err
}

// comparison is one Compare in progress.
type comparison struct {
	o     CompareOptions
	disks [2]Disk
	// first is what comes first on the disk, of what was found so far. It is replaced by compare and swap.
	first atomic.Pointer[outcome]
}

// outcome is how a comparison ends: with a difference, an error or, at the end of the larger disk, with neither.
type outcome struct {
	off  int64 // guest offset up to which the disks are equal
	diff *Difference
	err  error
}

// found notes an outcome, unless one that comes before it is known. Of two at one offset the first one counts.
func (c *comparison) found(o *outcome) {
	for {
		first := c.first.Load()
		if o.off >= first.off || c.first.CompareAndSwap(first, o) {
			return
		}
	}
}

// compareJob is a range to be read of both disks, of one, or of none, where it is known to read as zeros.
type compareJob struct {
	off, n int64
	read   [2]bool
}

// run compares up to total. The caller's goroutine goes through the extents and hands ranges to the workers, until it
// comes to where the first outcome is.
func (c *comparison) run(ctx context.Context, total int64) {
	jobs := make(chan compareJob)
	var workers sync.WaitGroup
	for range c.o.Workers {
		workers.Add(1)
		go func() {
			defer workers.Done()
			var bufs [2][]byte
			for j := range jobs {
				if j.off < c.first.Load().off {
					c.compare(ctx, j, &bufs)
				}
			}
		}()
	}
	defer workers.Wait()
	defer close(jobs)

	p := newExtentPair(c.disks[0], c.disks[1], 0, total)
	defer p.stop()
	x, y := &p.sides[0].e, &p.sides[1].e
	told := int64(0)
	for off := int64(0); off < c.first.Load().off; {
		last, side, err := p.seek(off)
		if err != nil {
			c.found(&outcome{off: off, err: &CompareError{Second: side == 1, Off: off, Err: err}})
			return
		}
		if c.o.Strict && x.strictState() != y.strictState() {
			c.found(&outcome{off: off, diff: &Difference{Kind: DifferentAllocation, Off: off}})
			return
		}
		n := min(last, total) - off
		read := [2]bool{!x.Kind.readsZero(), !y.Kind.readsZero()}
		if read[0] || read[1] {
			n = min(n, compareChunk-off%compareChunk)
			select {
			case jobs <- compareJob{off: off, n: n, read: read}:
			case <-ctx.Done():
			}
		}
		if err := ctx.Err(); err != nil {
			c.found(&outcome{off: -1, err: err})
			return
		}
		off += n
		if c.o.Progress != nil && off-told >= total/1000 && off < total {
			c.o.Progress(off, total)
			told = off
		}
	}
}

// strictState is what two extents have to have in common in a strict comparison.
type strictState struct{ held, zero, hole, hasPlace bool }

// strictState returns the state of e. What is compressed has no place of its own.
func (e *Extent) strictState() strictState {
	return strictState{
		held:     e.Kind != ExtentUnallocated,
		zero:     e.Kind.readsZero(),
		hole:     e.Hole,
		hasPlace: e.HostOff >= 0 && e.Kind != ExtentCompressed,
	}
}

// compare reads what job j says of the disks, and notes the first difference or error. The buffers are the worker's.
func (c *comparison) compare(ctx context.Context, j compareJob, bufs *[2][]byte) {
	var parts [2][]byte
	for i := range parts {
		if !j.read[i] {
			continue
		}
		if bufs[i] == nil {
			bufs[i] = make([]byte, compareChunk)
		}
		if err := ctx.Err(); err != nil {
			c.found(&outcome{off: -1, err: err}) // the ranges may all be handed out
			return
		}
		parts[i] = bufs[i][:j.n]
		n, err := readBelow(c.disks[i], parts[i], j.off)
		if err := filled(n, len(parts[i]), err); err != nil {
			c.found(&outcome{off: j.off, err: &CompareError{Second: i == 1, Reading: true, Off: j.off, Err: err}})
			return
		}
	}
	at := int64(-1)
	switch {
	case j.read[0] && j.read[1]:
		at = differenceAt(parts[0], parts[1])
	case j.read[0]:
		at = firstNonZero(parts[0])
	default:
		at = firstNonZero(parts[1])
	}
	if at >= 0 {
		c.found(&outcome{off: j.off + at, diff: &Difference{Kind: DifferentContent, Off: j.off + at}})
	}
}

// differenceAt returns the index of the first byte in which p and q, of one length, differ, or -1.
func differenceAt(p, q []byte) int64 {
	const step = 4096
	for base := 0; base < len(p); base += step {
		a, b := p[base:min(base+step, len(p))], q[base:min(base+step, len(p))]
		if bytes.Equal(a, b) {
			continue
		}
		for i := range a {
			if a[i] != b[i] {
				return int64(base + i)
			}
		}
	}
	return -1
}

// firstNonZero returns the index of the first byte of p that is not zero, or -1.
func firstNonZero(p []byte) int64 {
	for base := 0; base < len(p); base += len(zeroChunk) {
		part := p[base:min(base+len(zeroChunk), len(p))]
		if i := differenceAt(part, zeroChunk[:len(part)]); i >= 0 {
			return int64(base) + i
		}
	}
	return -1
}
