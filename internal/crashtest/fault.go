package crashtest

import (
	"errors"
	"fmt"
	"sync"
)

// ErrInjected is matched by every error that a Faults made, beside the cause that was asked for.
var ErrInjected = errors.New("injected fault")

// InjectedError is the error of an operation that a Faults failed. It matches ErrInjected and its
// cause.
type InjectedError struct {
	// Op is the operation.
	Op Op
	// Index is its number among the operations that the fault counts.
	Index int
	// Err is the cause that was asked for.
	Err error
}

// Error is the operation and the cause.
func (e *InjectedError) Error() string {
	return fmt.Sprintf("injected fault at operation %d, %s: %v", e.Index, e.Op, e.Err)
}

// Unwrap returns ErrInjected and the cause.
func (e *InjectedError) Unwrap() []error { return []error{ErrInjected, e.Err} }

// Fault says which operations fail, and how.
type Fault struct {
	// At is the number of the first operation that fails, counted from 0 over those that Match takes,
	// from the moment the fault is set.
	At int
	// Forever fails every later operation that Match takes, too.
	Forever bool
	// Err is the cause, such as syscall.EIO or syscall.ENOSPC. It must not be nil.
	Err error
	// Short makes a failing write write the first half of its data, up to the end of a sector of the
	// file, since no sector tears; none if that is nothing. A failing read fills the first half of its
	// buffer, cut in the same way.
	Short bool
	// After carries the operation out and fails then.
	After bool
	// Match takes the operations that are counted and may fail. nil: all.
	Match func(Op) bool
}

// Faults counts the operations of the storages that it wraps, all together, and fails some of them. It
// may be used by several goroutines at once.
type Faults struct {
	mu    sync.Mutex
	fault Fault // guarded by mu
	set   bool  // guarded by mu
	seen  int   // operations that Match took since the fault was set; guarded by mu
	fired int   // operations that failed since the fault was set; guarded by mu
	ops   []Op  // every operation since the last Reset; guarded by mu
}

// Wrap returns a storage that asks f before every operation on s; name stands for it in Op.File. Locks,
// identity and Close pass through.
func (f *Faults) Wrap(name string, s Storage) Storage {
	return &hooked{Storage: s, name: name, hook: f.hook}
}

// Set sets the fault, which replaces any other, and counts anew from 0.
func (f *Faults) Set(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault, f.set, f.seen, f.fired = fault, true, 0, 0
}

// Heal ends the fault: no later operation fails. The counts stay.
func (f *Faults) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.set = false
}

// Reset ends the fault and forgets all counts.
func (f *Faults) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.set, f.seen, f.fired, f.ops = false, 0, 0, nil
}

// Fired returns how many operations the fault failed. A loop over Fault.At ends when it is 0.
func (f *Faults) Fired() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fired
}

// Ops returns every operation since the last Reset, in the order of their calls, failed ones included.
func (f *Faults) Ops() []Op {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Op(nil), f.ops...)
}

// hook decides about one operation. It is the hook of the storages.
func (f *Faults) hook(op Op) verdict {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ops = append(f.ops, op)
	if !f.set || f.fault.Match != nil && !f.fault.Match(op) {
		return verdict{}
	}
	i := f.seen
	f.seen++
	if i != f.fault.At && !(f.fault.Forever && i > f.fault.At) {
		return verdict{}
	}
	f.fired++
	return verdict{err: &InjectedError{Op: op, Index: i, Err: f.fault.Err}, short: f.fault.Short, after: f.fault.After}
}

// Blocker wraps storages and holds chosen operations until they are let go. It may be used by several
// goroutines at once.
type Blocker struct {
	mu    sync.Mutex
	gates []*Gate // those that have caught nothing yet; guarded by mu
}

// Gate waits for one operation and holds it.
type Gate struct {
	match   func(Op) bool
	entered chan struct{}
	release chan struct{}
	once    sync.Once
}

// Wrap returns a storage whose operations pass the gates before they are carried out on s; name stands
// for it in Op.File.
func (b *Blocker) Wrap(name string, s Storage) Storage {
	return &hooked{Storage: s, name: name, hook: b.hook}
}

// Block sets a gate that holds the next operation that match takes, and no other. match is called with
// a lock held and must not use the storage.
func (b *Blocker) Block(match func(Op) bool) *Gate {
	g := &Gate{match: match, entered: make(chan struct{}), release: make(chan struct{})}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gates = append(b.gates, g)
	return g
}

// Entered is closed when the gate holds its operation.
func (g *Gate) Entered() <-chan struct{} { return g.entered }

// Release lets the operation go; a gate that has none yet will hold none. It may be called again.
func (g *Gate) Release() { g.once.Do(func() { close(g.release) }) }

// hook waits at the first gate that takes the operation. It is the hook of the storages.
func (b *Blocker) hook(op Op) verdict {
	b.mu.Lock()
	var g *Gate
	for i, c := range b.gates {
		if c.match(op) {
			g = c
			b.gates = append(b.gates[:i:i], b.gates[i+1:]...)
			break
		}
	}
	b.mu.Unlock()
	if g != nil {
		close(g.entered)
		<-g.release
	}
	return verdict{}
}

// verdict is what a hook wants done to an operation; with a nil error, nothing.
type verdict struct {
	err          error
	short, after bool
}

// hooked is a storage that asks a hook before every operation.
type hooked struct {
	Storage
	name string
	hook func(Op) verdict
}

// do asks the hook and carries the operation out, or does not.
func (h *hooked) do(kind Kind, off, n int64, call func() error) error {
	v := h.hook(Op{File: h.name, Kind: kind, Off: off, N: n})
	if v.err != nil && !v.after {
		return v.err
	}
	if err := call(); err != nil {
		return err
	}
	return v.err
}

// transfer asks the hook and carries out a read or write of p, a part of it, or none.
func (h *hooked) transfer(kind Kind, p []byte, off int64, call func([]byte, int64) (int, error)) (int, error) {
	v := h.hook(Op{File: h.name, Kind: kind, Off: off, N: int64(len(p))})
	switch {
	case v.err == nil:
		return call(p, off)
	case v.short:
		half := int64(len(p) / 2)
		half = max(half-(off+half)%SectorSize, 0)
		if half == 0 {
			return 0, v.err
		}
		p = p[:half]
	case !v.after:
		return 0, v.err
	}
	n, err := call(p, off)
	if err != nil {
		return n, err
	}
	return n, v.err
}

// ReadAt is io.ReaderAt.
func (h *hooked) ReadAt(p []byte, off int64) (int, error) {
	return h.transfer(Read, p, off, h.Storage.ReadAt)
}

// WriteAt is io.WriterAt.
func (h *hooked) WriteAt(p []byte, off int64) (int, error) {
	return h.transfer(Write, p, off, h.Storage.WriteAt)
}

// Size returns the length in bytes.
func (h *hooked) Size() (n int64, err error) {
	err = h.do(Size, 0, 0, func() error {
		n, err = h.Storage.Size()
		return err
	})
	return n, err
}

// Truncate sets the length.
func (h *hooked) Truncate(size int64) error {
	return h.do(Truncate, size, 0, func() error { return h.Storage.Truncate(size) })
}

// Sync makes durable what returned before it was called.
func (h *hooked) Sync() error { return h.do(Sync, 0, 0, h.Storage.Sync) }

// PunchHole makes the range read as zeros.
func (h *hooked) PunchHole(off, n int64) error {
	return h.do(Punch, off, n, func() error { return h.Storage.PunchHole(off, n) })
}

// WriteZeroes makes the range read as zeros.
func (h *hooked) WriteZeroes(off, n int64) error {
	return h.do(Zero, off, n, func() error { return h.Storage.WriteZeroes(off, n) })
}

// Allocate reserves space.
func (h *hooked) Allocate(off, n int64) error {
	return h.do(Allocate, off, n, func() error { return h.Storage.Allocate(off, n) })
}

// NextData returns the next range that may hold data.
func (h *hooked) NextData(off int64) (start, end int64, err error) {
	err = h.do(NextData, off, 0, func() error {
		start, end, err = h.Storage.NextData(off)
		return err
	})
	return start, end, err
}
