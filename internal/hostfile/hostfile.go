// Package hostfile does to an open host file what package os has no portable call for: punching
// holes, zeroing, reserving space, finding data, image locks, identity, durable data and directories.
//
// Every operation exists on every system. Where the system, or the file system below the file, lacks
// it, the error matches errors.ErrUnsupported and nothing has changed. After the file was closed the
// error matches fs.ErrClosed. Descriptors are borrowed through SyscallConn, so that an operation may
// run beside a Close, and never changes how the file blocks.
//
// Offsets and lengths are in bytes and must not be negative; a length of zero does nothing.
package hostfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
)

// ID is a file as the host knows it: equal IDs of two open files mean the same file.
type ID struct {
	Device bool   // a device node, which is what its device number says, whatever its name
	Dev    uint64 // the file system's device number, or the device's own
	Ino    uint64 // the file's number on that file system, or 0 of a device
}

// Perms is a set of the permissions that image locks speak of.
type Perms uint8

const (
	PermRead           Perms = 1 << iota // consistent read
	PermWrite                            // write
	PermWriteUnchanged                   // write what is there already
	PermResize                           // resize
)

// nPerms is the number of permissions.
const nPerms = 4

// String names the permissions of the set.
func (p Perms) String() string {
	var s []string
	for i, name := range [nPerms]string{"read", "write", "write-unchanged", "resize"} {
		if p&(1<<i) != 0 {
			s = append(s, name)
		}
	}
	return strings.Join(s, "+")
}

// ImageLock is what one user of an image file has: the permissions that it uses, and those that it
// denies to others. The zero value is no lock.
//
// It lies in the file as open-file-description read locks of one byte each: byte 100+i while
// permission i is used, byte 200+i while it is denied. Two users conflict when one uses what the other
// denies, which each finds by testing the bytes of the other kind. docs/LOCKS.md.
type ImageLock struct {
	Used   Perms
	Denied Perms
}

const (
	usedByte   = 100 // file offset of the lock byte for use of permission 0
	deniedByte = 200 // file offset of the lock byte for denial of permission 0
)

// held returns the file offsets of the bytes that are locked while l is held.
func (l ImageLock) held() []int64 { return lockBytes(l.Used, l.Denied) }

// tested returns the file offsets of the bytes that nobody else may have locked for l to be granted.
func (l ImageLock) tested() []int64 { return lockBytes(l.Denied, l.Used) }

// without returns the part of l that m does not have.
func (l ImageLock) without(m ImageLock) ImageLock {
	return ImageLock{Used: l.Used &^ m.Used, Denied: l.Denied &^ m.Denied}
}

// lockBytes returns the bytes of used, then those of denied.
func lockBytes(used, denied Perms) []int64 {
	var b []int64
	for i := range nPerms {
		if used&(1<<i) != 0 {
			b = append(b, int64(usedByte+i))
		}
	}
	for i := range nPerms {
		if denied&(1<<i) != 0 {
			b = append(b, int64(deniedByte+i))
		}
	}
	return b
}

// ConflictError says that another user of the file has locked a byte that must be free.
type ConflictError struct {
	Byte int64 // the file offset of the byte
}

func (e *ConflictError) Error() string {
	switch {
	case e.Byte >= usedByte && e.Byte < usedByte+nPerms:
		return fmt.Sprintf("somebody uses its permission %v", Perms(1)<<(e.Byte-usedByte))
	case e.Byte >= deniedByte && e.Byte < deniedByte+nPerms:
		return fmt.Sprintf("somebody denies its permission %v", Perms(1)<<(e.Byte-deniedByte))
	}
	return fmt.Sprintf("somebody has locked its byte %d", e.Byte)
}

// SetLock changes the image lock of f from old, which it holds, to l. It never waits. If somebody else
// is in the way it returns a *ConflictError, and on any error the lock is old still.
func SetLock(f *os.File, old, l ImageLock) error { return setLock(f, old, l) }

// PunchHole gives the space of the range back to the host. The range reads as zeros afterwards as far
// as it lies inside the file, whose size stays.
func PunchHole(f *os.File, off, n int64) error {
	return rangeOp(f, off, n, punchHole)
}

// ZeroRange makes the range read as zeros and leaves its space to the host's liking. The file grows to
// the end of the range where it was shorter.
func ZeroRange(f *os.File, off, n int64) error {
	return rangeOp(f, off, n, zeroRange)
}

// Allocate reserves space for the range: contents stay, new bytes read as zeros, and the file grows to
// the end of the range where it was shorter.
func Allocate(f *os.File, off, n int64) error {
	return rangeOp(f, off, n, allocate)
}

// rangeOp checks the range and runs op, unless the range is empty.
func rangeOp(f *os.File, off, n int64, op func(f *os.File, off, n int64) error) error {
	if off < 0 || n < 0 || n > maxOffset-off {
		return fmt.Errorf("range of %d bytes at %#x: %w", n, off, syscall.EINVAL)
	}
	if n == 0 {
		return nil
	}
	return op(f, off, n)
}

// maxOffset is the largest file offset that fits the host's signed 64 bits.
const maxOffset = 1<<63 - 1

// CopyRange copies n bytes at srcOff of src to dstOff of dst within the host, which may let the two share the space. It
// returns how many were copied before an error, or before the end of src. The two files are not the same, unless the
// ranges do not overlap.
func CopyRange(dst, src *os.File, dstOff, srcOff, n int64) (int64, error) {
	if dstOff < 0 || srcOff < 0 || n < 0 || n > maxOffset-dstOff || n > maxOffset-srcOff {
		return 0, fmt.Errorf("copy %d bytes from %#x to %#x: %w", n, srcOff, dstOff, syscall.EINVAL)
	}
	return copyRange(dst, src, dstOff, srcOff, n)
}

// NextData returns the first range [start, end) at or after off that may hold data: everything between
// such ranges is holes, which read as zeros. Past the last one it returns io.EOF.
func NextData(f *os.File, off int64) (start, end int64, err error) {
	if off < 0 {
		return 0, 0, fmt.Errorf("offset %d: %w", off, syscall.EINVAL)
	}
	return nextData(f, off)
}

// Allocated returns how many bytes of its file system f takes.
func Allocated(f *os.File) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return allocated(fi)
}

// SyncData returns once the contents of f, and what of its attributes is needed to read them back (its
// size, its map of the disk), are durable. Timestamps may not be.
func SyncData(f *os.File) error { return syncData(f) }

// Identity returns the ID of f, or nil where the host has none.
func Identity(f *os.File) any {
	fi, err := f.Stat()
	if err != nil {
		return nil
	}
	if id, ok := identity(f, fi); ok {
		return id
	}
	return nil
}

// SyncDir makes the names in the directory durable: those of files that were created, renamed or
// removed in it before the call.
func SyncDir(dir string) error { return syncDir(dir) }

// OpenNonblock is the flag for os.OpenFile with which opening a FIFO or a serial line does not wait for
// the other side: 0 where opening never waits.
const OpenNonblock = openNonblock

// Settle ends the non-blocking mode of a file that was opened with OpenNonblock, and returns whether
// the file is in append mode, in which a write lands at the end whatever its offset.
func Settle(f *os.File) (appends bool, err error) { return settle(f) }

// control runs op with the descriptor of f. The descriptor is valid until op returns.
func control(f *os.File, op func(fd uintptr) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var opErr error
	if err := c.Control(func(fd uintptr) { opErr = op(fd) }); err != nil {
		// The one reason for which Control does not run op is that f was closed; its own error of
		// package internal/poll cannot be matched.
		return fs.ErrClosed
	}
	return opErr
}

// unsupported makes err match errors.ErrUnsupported if it is one of errnos, by which the host says in
// its way that it cannot do the operation. ENOSYS, ENOTSUP and EOPNOTSUPP match by themselves.
func unsupported(err error, errnos ...error) error {
	for _, e := range errnos {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
		}
	}
	return err
}
