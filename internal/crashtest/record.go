package crashtest

import (
	"fmt"
	"runtime"
	"sync"
)

// Kind says what a host operation does.
type Kind uint8

const (
	// Read is ReadAt. It is never recorded; faults and gates see it.
	Read Kind = iota
	// Write is WriteAt.
	Write
	// Punch is PunchHole.
	Punch
	// Zero is WriteZeroes.
	Zero
	// Allocate is Allocate.
	Allocate
	// Truncate is Truncate; the offset of the operation is the new size.
	Truncate
	// Sync is Sync.
	Sync
	// Size is Size. It is never recorded; faults and gates see it.
	Size
	// NextData is NextData. It is never recorded; faults and gates see it.
	NextData
)

// kindNames are the names of the kinds, in their order.
var kindNames = [...]string{"read", "write", "punch", "zero", "allocate", "truncate", "sync", "size", "nextdata"}

// String returns the name of the kind.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Op is one host operation.
type Op struct {
	// File is the name that the storage was given.
	File string
	// Kind is what it does.
	Kind Kind
	// Off is the host offset in bytes; of a truncation the new size.
	Off int64
	// N is the length in bytes; 0 for a truncation, a sync or a size.
	N int64
}

// String returns the operation in one line, with hexadecimal offset and length.
func (o Op) String() string {
	switch o.Kind {
	case Sync, Size:
		return fmt.Sprintf("%s %s", o.File, o.Kind)
	case Truncate, NextData:
		return fmt.Sprintf("%s %s %#x", o.File, o.Kind, o.Off)
	}
	return fmt.Sprintf("%s %s %#x+%#x", o.File, o.Kind, o.Off, o.N)
}

// Entry is one recorded operation.
type Entry struct {
	Op
	// Data is what a write wrote, shared with the record: not to be changed.
	Data []byte
	// Begin is the position in the record at which the operation was called.
	Begin int
	// Return is the position at which it returned, or -1 if it has not.
	Return int
}

// Recorder is the record of the operations on several files, in the order in which they were called.
// Its methods, and those of its files, may be called from several goroutines at once.
type Recorder struct {
	mu     sync.RWMutex
	files  []*File   // guarded by mu
	ops    []*record // by their call; guarded by mu
	events []event   // guarded by mu
}

// record is one recorded operation. All but ret is immutable.
type record struct {
	file  int // index of the file
	kind  Kind
	off   int64
	n     int64
	data  []byte // of a write
	begin int    // index of the event of the call
	ret   int    // index of the event of the return, or -1; guarded by Recorder.mu
}

// event is one position of the record: a call, a return or a mark.
type event struct {
	op   *record // nil: a mark
	ret  bool    // the return of op, not its call
	mark any
}

// NewRecorder returns an empty record.
func NewRecorder() *Recorder { return &Recorder{} }

// Regular adds a regular file with that content, which is durable and copied.
func (r *Recorder) Regular(name string, content []byte) *File {
	return r.add(name, NewDisk(content))
}

// Device adds a device of that size in bytes, rounded up to 4 KiB, that begins with content and holds
// garbage after it.
func (r *Recorder) Device(name string, content []byte, size int64) *File {
	return r.add(name, NewDevice(content, size))
}

// add adds a file whose durable content is that of d, which it takes over.
func (r *Recorder) add(name string, d *Disk) *File {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := &File{rec: r, index: len(r.files), name: name, base: d.Clone(), live: d}
	r.files = append(r.files, f)
	return f
}

// Mark puts v into the record, between the operations before and after it: what the caller had started
// or had been told at that moment. States hand out the marks before their crash.
func (r *Recorder) Mark(v any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, event{mark: v})
}

// Len returns the number of positions recorded so far: calls, returns and marks. It is the crash point
// of this moment.
func (r *Recorder) Len() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.events)
}

// Rebase makes the present content of every file durable and forgets the record, so that it begins
// here. No operation may be under way.
func (r *Recorder) Rebase() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.files {
		f.base = f.live.Clone()
	}
	r.ops, r.events = nil, nil
}

// Log returns the recorded operations in the order of their calls.
func (r *Recorder) Log() []Entry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	log := make([]Entry, len(r.ops))
	for i, o := range r.ops {
		log[i] = Entry{Op: r.opOf(o), Data: o.data, Begin: o.begin, Return: o.ret}
	}
	return log
}

// opOf describes a recorded operation. Preconditions: mu is held.
func (r *Recorder) opOf(o *record) Op {
	return Op{File: r.files[o.file].name, Kind: o.kind, Off: o.off, N: o.n}
}

// File is a recorded file. It is a Storage whose reads see every operation at once, whatever a crash
// would leave of it.
type File struct {
	rec   *Recorder
	index int
	name  string
	base  *Disk // durable content at the beginning of the record; guarded by rec.mu
	live  *Disk // content now; changed under rec.mu
}

var _ Storage = (*File)(nil)

// Name returns the name of the file in the record.
func (f *File) Name() string { return f.name }

// Disk returns a copy of the present content.
func (f *File) Disk() *Disk {
	f.rec.mu.Lock()
	defer f.rec.mu.Unlock()
	return f.live.Clone()
}

// begin records the call of an operation and applies it to the present content, unless check refuses
// it. data is copied.
func (f *File) begin(kind Kind, off, n int64, data []byte, check func(d *Disk) error) (*record, error) {
	r := f.rec
	r.mu.Lock()
	defer r.mu.Unlock()
	f.live.mu.Lock()
	defer f.live.mu.Unlock()
	if check != nil {
		if err := check(f.live); err != nil {
			return nil, err
		}
	}
	o := &record{file: f.index, kind: kind, off: off, n: n, begin: len(r.events), ret: -1}
	if kind == Write {
		o.data = append([]byte(nil), data...)
	}
	r.ops = append(r.ops, o)
	r.events = append(r.events, event{op: o})
	o.apply(f.live)
	return o, nil
}

// finish records the return of an operation.
func (f *File) finish(o *record) {
	f.rec.mu.Lock()
	defer f.rec.mu.Unlock()
	o.ret = len(f.rec.events)
	f.rec.events = append(f.rec.events, event{op: o, ret: true})
}

// do records call and return of an operation; between them others may run.
func (f *File) do(kind Kind, off, n int64, data []byte, check func(d *Disk) error) error {
	o, err := f.begin(kind, off, n, data, check)
	if err != nil {
		return fmt.Errorf("%s %s: %w", f.name, kind, err)
	}
	runtime.Gosched()
	f.finish(o)
	return nil
}

// apply carries out the whole operation on d.
func (o *record) apply(d *Disk) {
	switch o.kind {
	case Write:
		d.write(o.off, o.data)
	case Zero:
		if o.n > 0 {
			d.grow(o.off + o.n)
		}
		d.zero(o.off, o.n)
	case Punch:
		d.zero(o.off, o.n)
	case Allocate:
		if o.n > 0 {
			d.grow(o.off + o.n)
		}
	case Truncate:
		d.truncate(o.off)
	}
}

// ReadAt is io.ReaderAt, from the present content. It is not recorded.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.live.ReadAt(p, off) }

// WriteAt is io.WriterAt. On a device, a write that reaches past the end writes nothing and fails with
// an error that matches syscall.ENOSPC.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	if err := f.do(Write, off, n, p, func(d *Disk) error { return d.checkRange(off, n) }); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Size returns the length in bytes.
func (f *File) Size() (int64, error) { return f.live.Size() }

// Truncate sets the length of a regular file; a device has errors.ErrUnsupported.
func (f *File) Truncate(size int64) error {
	return f.do(Truncate, size, 0, nil, func(d *Disk) error { return d.checkTruncate(size) })
}

// Sync makes durable what returned before it was called.
func (f *File) Sync() error { return f.do(Sync, 0, 0, nil, nil) }

// PunchHole makes the range read as zeros; the size stays.
func (f *File) PunchHole(off, n int64) error {
	return f.do(Punch, off, n, nil, func(d *Disk) error { return d.checkRange(off, n) })
}

// WriteZeroes makes the range read as zeros, growing a regular file.
func (f *File) WriteZeroes(off, n int64) error {
	return f.do(Zero, off, n, nil, func(d *Disk) error { return d.checkRange(off, n) })
}

// Allocate grows a regular file to hold the range; a device has errors.ErrUnsupported.
func (f *File) Allocate(off, n int64) error {
	return f.do(Allocate, off, n, nil, func(d *Disk) error { return d.checkAllocate(off, n) })
}

// NextData returns the next range that may hold data, as Disk.NextData does.
func (f *File) NextData(off int64) (start, end int64, err error) { return f.live.NextData(off) }

// Allocated returns how many bytes are there, as Disk.Allocated does.
func (f *File) Allocated() (int64, error) { return f.live.Allocated() }

// Unlock does nothing.
func (f *File) Unlock() error { return nil }

// Identity is the file itself.
func (f *File) Identity() any { return f }

// FixedSize reports whether this is a device.
func (f *File) FixedSize() bool { return f.live.device }

// Close does nothing: it makes nothing durable, and the file stays readable.
func (f *File) Close() error { return nil }
