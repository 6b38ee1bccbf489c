package qcow2

import (
	"errors"
	"fmt"
	"io"
)

// Storage is a host file: where an image, its data file or a raw backing file lives. Offsets are
// host offsets in bytes.
//
// Every method exists on every Storage, so that a wrapper (fault injection, limits, statistics)
// never hides an ability: what a storage cannot do returns an error that matches
// errors.ErrUnsupported, and BaseStorage, embedded, gives just that.
//
// ReadAt, WriteAt, PunchHole, WriteZeroes, Allocate, NextData, Allocated, Size and Sync may be called from
// several goroutines at once. Negative offsets and lengths are errors; a length of 0 does nothing. An
// operation that returns an error that matches errors.ErrUnsupported has changed nothing. A write that returned and was followed by a successful Sync survives
// a crash; of one that was not, any subset of its 512-byte sectors may.
type Storage interface {
	// ReadAt is io.ReaderAt. Past the end it returns io.EOF with what there was; the library takes
	// the rest as zeros.
	io.ReaderAt
	// WriteAt is io.WriterAt. Past the end it grows the storage (a gap reads as zeros), unless
	// FixedSize, where it fails with an error that matches syscall.ENOSPC.
	io.WriterAt
	// Size returns the current length in bytes.
	Size() (int64, error)
	// Truncate sets the length. New bytes read as zeros.
	Truncate(size int64) error
	// Sync returns once every write, punch, zeroing, allocation and truncation that returned before
	// it was called is durable.
	Sync() error
	// PunchHole gives the range's space back; it reads as zeros afterwards. The size stays.
	PunchHole(off, n int64) error
	// WriteZeroes makes the range read as zeros without moving them through memory; it may grow the
	// storage. The space stays allocated or is, as the storage likes.
	WriteZeroes(off, n int64) error
	// Allocate reserves space for the range, growing the storage where needed; contents stay, and new
	// bytes read as zeros.
	Allocate(off, n int64) error
	// NextData returns the first range at or after off that may hold data: [start, end). Past the last
	// one it returns io.EOF.
	NextData(off int64) (start, end int64, err error)
	// Allocated returns how many bytes of its host's space the storage takes, which holes do not.
	Allocated() (int64, error)
	// Lock takes the image lock of the given role until Unlock or Close, replacing the one it holds.
	// It never waits: a conflict is ErrLocked, and the one it holds stays.
	Lock(role LockRole) error
	// Unlock gives the lock back.
	Unlock() error
	// Identity returns a comparable value that is equal for two storages exactly if they are the same
	// file, or nil if that cannot be told. A chain refuses to meet one identity twice.
	Identity() any
	// FixedSize reports whether the storage is like a block device: it cannot grow or shrink, and what
	// was never written there is garbage, not zeros.
	FixedSize() bool
	// Close releases the storage. The library closes only what it opened or was handed by a Resolver.
	io.Closer
}

// LockRole says which permissions of an image file are held and which are denied to others, as QEMU's
// file driver does on Linux, so that both exclude each other.
type LockRole int

const (
	// LockNone takes no lock and looks at none.
	LockNone LockRole = iota
	// LockReader is a reader of a qcow2 file: it shares with readers, and excludes writers.
	LockReader
	// LockWriter is the writer of a qcow2 file: it excludes readers and writers.
	LockWriter
	// LockShared is a reader that tolerates a writer beside it (qemu-img's -U): what it reads may be
	// inconsistent.
	LockShared
	// LockRawReader is a reader of a raw file, such as a raw backing file.
	LockRawReader
	// LockRawWriter is the writer of a raw file.
	LockRawWriter
	// LockDataWriter is the writer of an external data file.
	LockDataWriter
	// LockDataReader is a reader of an external data file: it excludes who would resize it.
	LockDataReader
)

// String returns the role in words.
func (r LockRole) String() string {
	names := [...]string{
		LockNone:       "nobody",
		LockReader:     "reader",
		LockWriter:     "writer",
		LockShared:     "sharing reader",
		LockRawReader:  "reader of a raw file",
		LockRawWriter:  "writer of a raw file",
		LockDataWriter: "writer of a data file",
		LockDataReader: "reader of a data file",
	}
	if r < 0 || int(r) >= len(names) {
		return fmt.Sprintf("role %d", int(r))
	}
	return names[r]
}

// BaseStorage, embedded in a Storage, answers for every ability that it lacks: optional operations
// return errors.ErrUnsupported, the identity is unknown, Close does nothing.
type BaseStorage struct{}

// WriteAt returns errors.ErrUnsupported.
func (BaseStorage) WriteAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }

// Truncate returns errors.ErrUnsupported.
func (BaseStorage) Truncate(int64) error { return errors.ErrUnsupported }

// Sync does nothing: a storage without WriteAt has nothing to make durable. One with WriteAt must
// have its own.
func (BaseStorage) Sync() error { return nil }

// PunchHole returns errors.ErrUnsupported.
func (BaseStorage) PunchHole(int64, int64) error { return errors.ErrUnsupported }

// WriteZeroes returns errors.ErrUnsupported.
func (BaseStorage) WriteZeroes(int64, int64) error { return errors.ErrUnsupported }

// Allocate returns errors.ErrUnsupported.
func (BaseStorage) Allocate(int64, int64) error { return errors.ErrUnsupported }

// NextData returns errors.ErrUnsupported.
func (BaseStorage) NextData(int64) (int64, int64, error) { return 0, 0, errors.ErrUnsupported }

// Allocated returns errors.ErrUnsupported.
func (BaseStorage) Allocated() (int64, error) { return 0, errors.ErrUnsupported }

// Lock returns errors.ErrUnsupported: there is nobody to exclude, or no way to do it.
func (BaseStorage) Lock(LockRole) error { return errors.ErrUnsupported }

// Unlock does nothing.
func (BaseStorage) Unlock() error { return nil }

// Identity returns nil: unknown.
func (BaseStorage) Identity() any { return nil }

// FixedSize returns false.
func (BaseStorage) FixedSize() bool { return false }

// Close does nothing.
func (BaseStorage) Close() error { return nil }
