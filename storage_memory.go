package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"
	"syscall"
)

var (
	_ Storage     = (*MemoryStorage)(nil)
	_ io.WriterTo = (*MemoryStorage)(nil)
	_ Storage     = (*readerStorage)(nil)
)

const (
	// memoryChunk is the unit in which a MemoryStorage holds memory, in bytes: the default cluster.
	memoryChunk = 64 << 10
	// memoryShards is the number of locks among which the chunks are dealt, by index. It is the number
	// of bits of a shardSet.
	memoryShards = 64
)

// MemoryStorage is a Storage in memory. It is sparse: only chunks of 64 KiB that were written to cost
// memory, at whatever offset. The zero value is not usable; NewMemoryStorage and NewMemoryDevice make
// one.
//
// All methods may be called from several goroutines at once. Each ReadAt, WriteAt, PunchHole,
// WriteZeroes and Truncate is atomic to the others: what reads beside a write sees all of it or
// nothing. Calls on different chunks rarely wait for each other. ReadAt, and WriteAt where something
// was written before, allocate nothing.
//
// Close does nothing, so that the contents can be opened again. Locks are granted always: one storage
// is one user, who cannot conflict with himself.
type MemoryStorage struct {
	size   atomic.Int64 // length in bytes; written under the lock of a shard, Truncate's under all
	fixed  bool         // a device; immutable
	shards [memoryShards]memoryShard
}

// memoryShard is the chunks whose index is the shard's modulo memoryShards.
type memoryShard struct {
	mu sync.RWMutex
	// chunks holds contents by chunk index; guarded by mu, and so are the bytes. A chunk that is not
	// there reads as zeros, or as the garbage of a device. zeroedChunk stands for a chunk of zeros that
	// costs nothing. Bytes past the end of the storage are zeros.
	chunks map[int64]*[memoryChunk]byte

	_ [88]byte // keeps the locks of two shards off one pair of cache lines
}

// zeroedChunk is a chunk of zeros that several places share. It is never written to.
var zeroedChunk = new([memoryChunk]byte)

// NewMemoryStorage returns an empty storage that grows as a file does.
func NewMemoryStorage() *MemoryStorage {
	m := &MemoryStorage{}
	for i := range m.shards {
		m.shards[i].chunks = make(map[int64]*[memoryChunk]byte)
	}
	return m
}

// NewMemoryDevice returns a storage of size bytes that is like a block device: it cannot grow or
// shrink, does not tell holes and does not allocate, and what was never written reads as garbage, which
// is the same in every run. A negative size counts as 0. To zero a range costs some 50 bytes of memory
// for each 64 KiB.
func NewMemoryDevice(size int64) *MemoryStorage {
	m := NewMemoryStorage()
	m.fixed = true
	m.size.Store(max(size, 0))
	return m
}

// shardSet is a set of shards, bit i for shard i.
type shardSet uint64

// shardsOf returns the shards of the chunks that [off, off+n) touches. n is positive.
func shardsOf(off, n int64) shardSet {
	first, last := off/memoryChunk, (off+n-1)/memoryChunk
	if last-first >= memoryShards-1 {
		return math.MaxUint64
	}
	run := uint64(1)<<(last-first+1) - 1
	return shardSet(bits.RotateLeft64(run, int(first%memoryShards)))
}

// lock locks the shards of the set for writing, always in the same order.
func (m *MemoryStorage) lock(set shardSet) {
	for ; set != 0; set &= set - 1 {
		m.shards[bits.TrailingZeros64(uint64(set))].mu.Lock()
	}
}

// unlock ends lock.
func (m *MemoryStorage) unlock(set shardSet) {
	for ; set != 0; set &= set - 1 {
		m.shards[bits.TrailingZeros64(uint64(set))].mu.Unlock()
	}
}

// rlock locks the shards of the set for reading, always in the same order.
func (m *MemoryStorage) rlock(set shardSet) {
	for ; set != 0; set &= set - 1 {
		m.shards[bits.TrailingZeros64(uint64(set))].mu.RLock()
	}
}

// runlock ends rlock.
func (m *MemoryStorage) runlock(set shardSet) {
	for ; set != 0; set &= set - 1 {
		m.shards[bits.TrailingZeros64(uint64(set))].mu.RUnlock()
	}
}

// allShards is the set of all shards.
const allShards shardSet = math.MaxUint64

// chunks returns the map that holds the chunk, if any does. Preconditions: the chunk's shard is locked.
func (m *MemoryStorage) chunks(chunkIndex int64) map[int64]*[memoryChunk]byte {
	return m.shards[chunkIndex%memoryShards].chunks
}

// checkMemoryRange returns an error unless [off, off+n) lies within offsets of 63 bits. It is one that
// matches syscall.EINVAL if negative, else syscall.EFBIG.
func checkMemoryRange(op string, off, n int64) error {
	switch {
	case off < 0 || n < 0:
		return fmt.Errorf("memory: %s %d bytes at %#x: %w", op, n, off, syscall.EINVAL)
	case n > math.MaxInt64-off:
		return fmt.Errorf("memory: %s %d bytes at %#x: %w", op, n, off, syscall.EFBIG)
	}
	return nil
}

// noSpace is the error of an operation that would have to grow a device.
func (m *MemoryStorage) noSpace(op string, off, n int64) error {
	return fmt.Errorf("memory: %s %d bytes at %#x of a device of %#x bytes: %w", op, n, off, m.size.Load(), syscall.ENOSPC)
}

// ReadAt implements Storage.
func (m *MemoryStorage) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, checkMemoryRange("read", off, int64(len(p)))
	}
	if len(p) == 0 {
		return 0, nil
	}
	want := min(int64(len(p)), math.MaxInt64-off)
	if want == 0 {
		return 0, io.EOF
	}
	set := shardsOf(off, want)
	m.rlock(set)
	defer m.runlock(set)
	n := int(min(want, max(m.size.Load()-off, 0)))
	for done := 0; done < n; {
		chunkIndex, at := (off+int64(done))/memoryChunk, int((off+int64(done))%memoryChunk)
		part := p[done:min(n, done+memoryChunk-at)]
		if c := m.chunks(chunkIndex)[chunkIndex]; c != nil {
			copy(part, c[at:])
		} else if m.fixed {
			fillGarbage(part, off+int64(done))
		} else {
			clear(part)
		}
		done += len(part)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements Storage. What does not fit on a device is cut off, as the system does.
func (m *MemoryStorage) WriteAt(p []byte, off int64) (int, error) {
	if err := checkMemoryRange("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	n := len(p)
	if m.fixed {
		n = int(min(int64(n), max(m.size.Load()-off, 0)))
	}
	if n > 0 {
		set := shardsOf(off, int64(n))
		m.lock(set)
		defer m.unlock(set)
		for done := 0; done < n; {
			chunkIndex, at := (off+int64(done))/memoryChunk, int((off+int64(done))%memoryChunk)
			part := p[done:min(n, done+memoryChunk-at)]
			copy(m.own(chunkIndex)[at:], part)
			done += len(part)
		}
		m.growTo(off + int64(n))
	}
	if n < len(p) {
		return n, m.noSpace("write", off, int64(len(p)))
	}
	return n, nil
}

// own returns the chunk, made where there was none. Preconditions: its shard is locked for writing.
func (m *MemoryStorage) own(chunkIndex int64) *[memoryChunk]byte {
	chunks := m.chunks(chunkIndex)
	c := chunks[chunkIndex]
	switch c {
	case nil:
		c = new([memoryChunk]byte)
		chunks[chunkIndex] = c
		if m.fixed {
			fillGarbage(c[:], chunkIndex*memoryChunk)
		}
	case zeroedChunk:
		c = new([memoryChunk]byte)
		chunks[chunkIndex] = c
	}
	return c
}

// growTo makes the storage at least size bytes long.
func (m *MemoryStorage) growTo(size int64) {
	for {
		old := m.size.Load()
		if size <= old || m.size.CompareAndSwap(old, size) {
			return
		}
	}
}

// Size implements Storage. It never fails.
func (m *MemoryStorage) Size() (int64, error) { return m.size.Load(), nil }

// Truncate implements Storage. A device cannot.
func (m *MemoryStorage) Truncate(size int64) error {
	if m.fixed {
		return fmt.Errorf("memory: truncate a device: %w", errors.ErrUnsupported)
	}
	if err := checkMemoryRange("truncate to", 0, size); err != nil {
		return err
	}
	m.lock(allShards)
	defer m.unlock(allShards)
	if old := m.size.Load(); size < old {
		m.zeroLocked(size, math.MaxInt64-size)
	}
	m.size.Store(size)
	return nil
}

// Sync implements Storage. Memory is as durable as it gets.
func (m *MemoryStorage) Sync() error { return nil }

// PunchHole implements Storage. It gives the memory of whole chunks back.
func (m *MemoryStorage) PunchHole(off, n int64) error {
	if err := checkMemoryRange("punch", off, n); err != nil {
		return err
	}
	if n = min(n, max(m.size.Load()-off, 0)); n > 0 {
		set := shardsOf(off, n)
		m.lock(set)
		defer m.unlock(set)
		m.zeroLocked(off, n)
	}
	return nil
}

// WriteZeroes implements Storage. It gives the memory of whole chunks back.
func (m *MemoryStorage) WriteZeroes(off, n int64) error {
	if err := checkMemoryRange("zero", off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	if m.fixed && n > m.size.Load()-off {
		return m.noSpace("zero", off, n)
	}
	set := shardsOf(off, n)
	m.lock(set)
	defer m.unlock(set)
	m.zeroLocked(off, n)
	m.growTo(off + n)
	return nil
}

// zeroLocked makes the range read as zeros. Preconditions: its shards are locked for writing; n is
// positive; on a device the range lies inside.
func (m *MemoryStorage) zeroLocked(off, n int64) {
	end := off + n
	first, last := off/memoryChunk, (end-1)/memoryChunk
	m.zeroPart(first, off, end)
	if last > first {
		m.zeroPart(last, off, end)
	}
	if last-first < 2 {
		return
	}
	if m.fixed {
		for i := first + 1; i < last; i++ {
			m.chunks(i)[i] = zeroedChunk
		}
		return
	}
	// A range may be as long as all offsets: the chunks that are there are gone through then.
	if last-first < memoryShards {
		for i := first + 1; i < last; i++ {
			delete(m.chunks(i), i)
		}
		return
	}
	for s := range m.shards {
		for i := range m.shards[s].chunks {
			if first < i && i < last {
				delete(m.shards[s].chunks, i)
			}
		}
	}
}

// zeroPart zeros what of the chunk lies in [off, end). Preconditions: as zeroLocked.
func (m *MemoryStorage) zeroPart(chunkIndex, off, end int64) {
	start := chunkIndex * memoryChunk
	from := max(off-start, 0)
	to := int64(memoryChunk)
	if end-start < memoryChunk {
		to = end - start
	}
	chunks := m.chunks(chunkIndex)
	// What is past the end is nobody's, so a chunk is whole if the range reaches the end of the storage.
	whole := from == 0 && (to == memoryChunk || end >= m.size.Load())
	switch c := chunks[chunkIndex]; {
	case whole && m.fixed:
		chunks[chunkIndex] = zeroedChunk
	case whole:
		delete(chunks, chunkIndex)
	case c == zeroedChunk, c == nil && !m.fixed:
	default:
		clear(m.own(chunkIndex)[from:to])
	}
}

// Allocate implements Storage. It only grows the storage: memory is taken when it is written to. A
// device cannot.
func (m *MemoryStorage) Allocate(off, n int64) error {
	if err := checkMemoryRange("allocate", off, n); err != nil {
		return err
	}
	if m.fixed {
		if n > m.size.Load()-off {
			return m.noSpace("allocate", off, n)
		}
		return fmt.Errorf("memory: allocate on a device: %w", errors.ErrUnsupported)
	}
	if n > 0 {
		set := shardsOf(off+n-1, 1)
		m.lock(set)
		defer m.unlock(set)
		m.growTo(off + n)
	}
	return nil
}

// NextData implements Storage, in whole chunks. A device does not tell.
func (m *MemoryStorage) NextData(off int64) (start, end int64, err error) {
	if err := checkMemoryRange("seek data of", off, 0); err != nil {
		return 0, 0, err
	}
	if m.fixed {
		return 0, 0, fmt.Errorf("memory: seek data on a device: %w", errors.ErrUnsupported)
	}
	m.rlock(allShards)
	defer m.runlock(allShards)
	size := m.size.Load()
	first, ok := m.chunkFromLocked(off / memoryChunk)
	if off >= size || !ok || first*memoryChunk >= size {
		return 0, 0, io.EOF
	}
	last := first
	for m.chunks(last + 1)[last+1] != nil {
		last++
	}
	start = max(off, first*memoryChunk)
	end = size
	if last < (size-1)/memoryChunk {
		end = (last + 1) * memoryChunk
	}
	return start, end, nil
}

// Allocated implements Storage, in whole chunks. A device does not tell.
func (m *MemoryStorage) Allocated() (int64, error) {
	if m.fixed {
		return 0, fmt.Errorf("memory: allocated size of a device: %w", errors.ErrUnsupported)
	}
	m.rlock(allShards)
	defer m.runlock(allShards)
	n := int64(0)
	for i := range m.shards {
		for _, c := range m.shards[i].chunks {
			if c != zeroedChunk {
				n += memoryChunk
			}
		}
	}
	return n, nil
}

// chunkFromLocked returns the least index at or above chunkIndex of a chunk that is there. It costs at
// most a few steps per chunk of the storage, however wide the gap. Preconditions: all shards are locked.
func (m *MemoryStorage) chunkFromLocked(chunkIndex int64) (next int64, ok bool) {
	total := int64(0)
	for i := range m.shards {
		total += int64(len(m.shards[i].chunks))
	}
	for i := chunkIndex; i < chunkIndex+total; i++ {
		if m.chunks(i)[i] != nil {
			return i, true
		}
	}
	for s := range m.shards {
		for i := range m.shards[s].chunks {
			if i >= chunkIndex && (!ok || i < next) {
				next, ok = i, true
			}
		}
	}
	return next, ok
}

// Lock implements Storage. It grants every role.
func (m *MemoryStorage) Lock(LockRole) error { return nil }

// Unlock implements Storage.
func (m *MemoryStorage) Unlock() error { return nil }

// Identity implements Storage: the storage itself.
func (m *MemoryStorage) Identity() any { return m }

// FixedSize implements Storage: true of one by NewMemoryDevice.
func (m *MemoryStorage) FixedSize() bool { return m.fixed }

// Close implements Storage. It does nothing: the contents stay and can be used further.
func (m *MemoryStorage) Close() error { return nil }

// Clone returns a copy that shares nothing with m: what m holds at one moment.
func (m *MemoryStorage) Clone() *MemoryStorage {
	c := NewMemoryStorage()
	m.rlock(allShards)
	defer m.runlock(allShards)
	c.fixed = m.fixed
	c.size.Store(m.size.Load())
	for s := range m.shards {
		for i, chunk := range m.shards[s].chunks {
			if chunk != zeroedChunk {
				own := *chunk
				chunk = &own
			}
			c.shards[s].chunks[i] = chunk
		}
	}
	return c
}

// WriteTo writes the whole contents to w, holes as zeros. It is not atomic to writes beside it.
func (m *MemoryStorage) WriteTo(w io.Writer) (int64, error) {
	// The section hides WriteTo, by which io.Copy would come back here.
	return io.Copy(w, io.NewSectionReader(m, 0, math.MaxInt64))
}

// fillGarbage fills p with what a device holds at off before anybody wrote there: a fixed function of
// the offset that looks random.
func fillGarbage(p []byte, off int64) {
	var word [8]byte
	for len(p) > 0 {
		// The finalizer of splitmix64 over the index of the 8-byte word, which starts at 1 so that no word
		// is its fixed point, zero.
		x := uint64(off)/8 + 1
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(word[:], x^x>>31)
		n := copy(p, word[off%8:])
		p, off = p[n:], off+int64(n)
	}
}

// readerStorage is a read-only Storage over a reader of known size.
type readerStorage struct {
	BaseStorage
	r    io.ReaderAt
	size int64 // in bytes
}

// NewReaderStorage returns a read-only Storage of the first size bytes of r, which must allow what its
// callers do at once. A reader that ends before size gives io.ErrUnexpectedEOF. A negative size counts
// as 0. Close leaves r open.
func NewReaderStorage(r io.ReaderAt, size int64) Storage {
	return &readerStorage{r: r, size: max(size, 0)}
}

// ReadAt implements Storage.
func (s *readerStorage) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %d bytes at %d: %w", len(p), off, syscall.EINVAL)
	}
	want := int(min(int64(len(p)), max(s.size-off, 0)))
	if want > 0 {
		n, err := s.r.ReadAt(p[:want], off)
		switch {
		case n < want && (err == nil || err == io.EOF):
			return n, fmt.Errorf("read %d bytes at %#x: reader ends before its size of %#x: %w", want, off, s.size, io.ErrUnexpectedEOF)
		case n < want:
			return n, err
		}
	}
	if want < len(p) {
		return want, io.EOF
	}
	return want, nil
}

// Size implements Storage.
func (s *readerStorage) Size() (int64, error) { return s.size, nil }
