package qcow2

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"sync"
	"syscall"

	"github.com/go-qcow2/qcow2/internal/hostfile"
)

var (
	_ Storage = (*FileStorage)(nil)
	_ error   = (*FileTypeError)(nil)
)

// FileStorage is a Storage in a regular file or, on Linux, on a block device.
//
// Punching, zeroing, allocation, NextData and locks are those of Linux; elsewhere they return
// errors.ErrUnsupported. All methods may be called from several goroutines at once, Close among them:
// what runs beside it ends as if it had come before or after. After it they return fs.ErrClosed, but
// for Identity and FixedSize, which stay what they were.
type FileStorage struct {
	// f is immutable; its position is nobody's. Data goes through os.File and not past it: its count of
	// users, which makes Close safe, costs less than can be measured beside the system call.
	f      *os.File
	device bool // a block device; immutable
	id     any  // a hostfile.ID or nil; immutable

	mu   sync.Mutex
	held hostfile.ImageLock // the image lock in force; guarded by mu
}

// FileTypeError says that a file is of a type that cannot be a Storage: a directory, a FIFO, a
// character device. It Is ErrUnsupported.
type FileTypeError struct {
	Name string      // the file's name
	Mode fs.FileMode // its type
}

func (e *FileTypeError) Error() string {
	return fmt.Sprintf("%s has file mode %v: neither a regular file nor a usable block device", e.Name, e.Mode)
}

// Is reports whether target is ErrUnsupported.
func (e *FileTypeError) Is(target error) bool { return target == ErrUnsupported }

// OpenFileStorage opens the named file with the flags and permissions of os.OpenFile. A FIFO does not
// make it wait: a file that is neither regular nor a block device is a *FileTypeError. No lock is
// taken, so os.O_TRUNC is better left to Truncate under a Lock. os.O_APPEND is refused.
func OpenFileStorage(name string, flag int, perm fs.FileMode) (*FileStorage, error) {
	f, err := os.OpenFile(name, flag|hostfile.OpenNonblock, perm)
	if err != nil {
		return nil, err
	}
	s, err := NewFileStorage(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

// NewFileStorage makes a Storage of an open file and takes the file over: nobody else may use it
// further, and Close closes it. On an error the file stays the caller's. A file in append mode is
// refused with a *OptionError, one of another type than OpenFileStorage opens with a *FileTypeError.
func NewFileStorage(f *os.File) (*FileStorage, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	mode := fi.Mode()
	// A block device has both ModeDevice and no ModeCharDevice. How its size is asked is known of Linux.
	device := mode.Type() == fs.ModeDevice && runtime.GOOS == "linux"
	if !mode.IsRegular() && !device {
		return nil, &FileTypeError{Name: f.Name(), Mode: mode}
	}
	appends, err := hostfile.Settle(f)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: f.Name(), Err: err}
	}
	if appends {
		return nil, &OptionError{Option: "flag", Value: "O_APPEND", Reason: "offsets of writes would not count"}
	}
	return &FileStorage{f: f, device: device, id: hostfile.Identity(f)}, nil
}

// wrap adds operation and name to an error of hostfile. io.EOF stays itself.
func (s *FileStorage) wrap(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &fs.PathError{Op: op, Path: s.f.Name(), Err: err}
}

// ReadAt implements Storage.
func (s *FileStorage) ReadAt(p []byte, off int64) (int, error) { return s.f.ReadAt(p, off) }

// WriteAt implements Storage. Of a write that fails, a part may have been done.
func (s *FileStorage) WriteAt(p []byte, off int64) (int, error) { return s.f.WriteAt(p, off) }

// Size implements Storage.
func (s *FileStorage) Size() (int64, error) {
	// For a device this is the only portable way, and for a file the one that allocates nothing.
	return s.f.Seek(0, io.SeekEnd)
}

// Truncate implements Storage. A block device cannot.
func (s *FileStorage) Truncate(size int64) error {
	if s.device {
		return s.wrap("truncate", errors.ErrUnsupported)
	}
	return s.f.Truncate(size)
}

// Sync implements Storage. The file's timestamps may not be durable after it. A file that was just
// created or renamed also needs its directory synced.
func (s *FileStorage) Sync() error { return s.wrap("sync", hostfile.SyncData(s.f)) }

// PunchHole implements Storage. A device does it for whole blocks of its own only.
func (s *FileStorage) PunchHole(off, n int64) error {
	if s.device && off >= 0 && n > 0 {
		size, err := s.Size()
		if err != nil {
			return err
		}
		n = min(n, max(size-off, 0))
	}
	return s.wrap("punch hole", hostfile.PunchHole(s.f, off, n))
}

// WriteZeroes implements Storage. A device does it for whole blocks of its own only.
func (s *FileStorage) WriteZeroes(off, n int64) error {
	if err := s.checkFixed(off, n); err != nil {
		return s.wrap("write zeroes", err)
	}
	err := hostfile.ZeroRange(s.f, off, n)
	if !s.device && errors.Is(err, errors.ErrUnsupported) {
		err = s.punchZeroes(off, n)
	}
	return s.wrap("write zeroes", err)
}

// punchZeroes is WriteZeroes where the file system punches but does not zero, as tmpfs does.
func (s *FileStorage) punchZeroes(off, n int64) error {
	if err := hostfile.PunchHole(s.f, off, n); err != nil {
		return err
	}
	size, err := s.Size()
	if err != nil || size >= off+n {
		return err
	}
	// A write of the last byte grows the file. To truncate it to the new end could cut off what another
	// goroutine appended since the size was asked.
	_, err = s.f.WriteAt([]byte{0}, off+n-1)
	return err
}

// Allocate implements Storage.
func (s *FileStorage) Allocate(off, n int64) error {
	if err := s.checkFixed(off, n); err != nil {
		return s.wrap("allocate", err)
	}
	return s.wrap("allocate", hostfile.Allocate(s.f, off, n))
}

// checkFixed returns an error that matches syscall.ENOSPC if the range ends past the end of a device.
func (s *FileStorage) checkFixed(off, n int64) error {
	if !s.device || off < 0 || n <= 0 {
		return nil
	}
	size, err := s.Size()
	if err != nil {
		return err
	}
	if n > size-off {
		return syscall.ENOSPC
	}
	return nil
}

// NextData implements Storage. Devices do not tell.
func (s *FileStorage) NextData(off int64) (start, end int64, err error) {
	start, end, err = hostfile.NextData(s.f, off)
	return start, end, s.wrap("seek data", err)
}

// Allocated implements Storage, where the system is a Unix. Devices do not tell.
func (s *FileStorage) Allocated() (int64, error) {
	if s.device {
		return 0, s.wrap("allocated size", errors.ErrUnsupported)
	}
	n, err := hostfile.Allocated(s.f)
	return n, s.wrap("allocated size", err)
}

// Lock implements Storage, on Linux, as QEMU does, with open-file-description locks: they end with
// Close, and two FileStorages of one process exclude each other as two processes do. A role that
// cannot be had leaves the one before in force. File systems without locks give errors.ErrUnsupported.
func (s *FileStorage) Lock(role LockRole) error {
	lock, ok := imageLocks[role]
	if !ok {
		return fmt.Errorf("lock %s: %w", s.f.Name(), &OptionError{Option: "role", Value: int(role), Reason: "no such role"})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err := hostfile.SetLock(s.f, s.held, lock)
	if err == nil {
		s.held = lock
		return nil
	}
	if c := (*hostfile.ConflictError)(nil); errors.As(err, &c) {
		return fmt.Errorf("lock %s as %v: %w: %w", s.f.Name(), role, ErrLocked, err)
	}
	return s.wrap("lock", err)
}

// Unlock implements Storage. Without a lock it does nothing.
func (s *FileStorage) Unlock() error { return s.Lock(LockNone) }

// imageLocks is what each role uses and denies: docs/LOCKS.md. Reading consistent data is
// denied by nobody, but all who use it test for that.
var imageLocks = map[LockRole]hostfile.ImageLock{
	LockNone:      {},
	LockReader:    {Used: hostfile.PermRead, Denied: hostfile.PermWrite | hostfile.PermResize},
	LockWriter:    {Used: hostfile.PermRead | hostfile.PermWrite | hostfile.PermResize, Denied: hostfile.PermWrite | hostfile.PermResize},
	LockShared:    {Used: hostfile.PermRead},
	LockRawReader: {Used: hostfile.PermRead},
	LockRawWriter: {Used: hostfile.PermRead | hostfile.PermWrite},
	LockDataWriter: {
		Used:   hostfile.PermRead | hostfile.PermWrite | hostfile.PermResize,
		Denied: hostfile.PermResize,
	},
	LockDataReader: {Used: hostfile.PermRead, Denied: hostfile.PermResize},
}

// Identity implements Storage: two storages of one file are equal by whatever names it was opened.
func (s *FileStorage) Identity() any { return s.id }

// FixedSize implements Storage: true of a block device.
func (s *FileStorage) FixedSize() bool { return s.device }

// Close implements Storage. It gives the lock back and does not sync.
//
// The lock is given back by name and not left to end with the file: a process that is being started by this
// one at the same time holds a copy of the descriptor until it executes its program, and the lock would live
// on with it.
func (s *FileStorage) Close() error {
	s.mu.Lock()
	held := s.held != hostfile.ImageLock{}
	s.mu.Unlock()
	var err error
	if held {
		err = s.Unlock()
	}
	return errors.Join(err, s.f.Close())
}
