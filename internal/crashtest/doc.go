// Package crashtest holds the storages that tests put under an image: one that records every host
// operation, so that the states a crash could leave are rebuilt and looked at; one that fails chosen
// operations; one that holds an operation until it is let go.
//
// It knows nothing of the image format, and package qcow2 is not imported: its storages have every
// method of qcow2.Storage but Lock, whose argument is a type of that package. A test there adds it:
//
//	type unlocked struct{ crashtest.Storage }
//
//	func (unlocked) Lock(LockRole) error { return nil }
//
// # The crash model
//
// A crash keeps every operation on a file that returned before the last successful Sync of that file
// was called, and any subset of the later ones, applied in the order in which they were issued: of a
// write any subset of its 512-byte sectors, of a punch, zeroing or allocation any subset of its
// blocks, a truncation whole or not at all. The file is as long as the furthest survivor says; holes
// read as zeros; what was never written on a device is garbage.
package crashtest

import "io"

// Storage is what the storages of this package do: qcow2.Storage without Lock. Offsets and lengths
// are bytes of the host file.
type Storage interface {
	io.ReaderAt
	io.WriterAt
	// Size returns the length.
	Size() (int64, error)
	// Truncate sets the length; new bytes read as zeros.
	Truncate(size int64) error
	// Sync makes durable what returned before it was called.
	Sync() error
	// PunchHole makes the range read as zeros and gives its space back; the size stays.
	PunchHole(off, n int64) error
	// WriteZeroes makes the range read as zeros, growing a regular file.
	WriteZeroes(off, n int64) error
	// Allocate reserves space, growing a regular file; contents stay.
	Allocate(off, n int64) error
	// NextData returns the first range at or after off that may hold data, or io.EOF.
	NextData(off int64) (start, end int64, err error)
	// Allocated returns how many bytes of space it takes.
	Allocated() (int64, error)
	// Unlock gives back a lock, of which these storages know nothing.
	Unlock() error
	// Identity is comparable, and equal for the same file alone.
	Identity() any
	// FixedSize reports a device.
	FixedSize() bool
	io.Closer
}

// SectorSize is the unit of a torn write, in bytes: a sector is old or new, never a mixture.
const SectorSize = 512
