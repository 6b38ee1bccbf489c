package hostfile

import (
	"errors"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// retry runs op again for as long as a signal interrupts it.
func retry(op func() error) error {
	for {
		if err := op(); err != unix.EINTR {
			return err
		}
	}
}

// fallocate is fallocate(2) with the mode.
func fallocate(f *os.File, mode uint32, off, n int64) error {
	err := control(f, func(fd uintptr) error {
		return retry(func() error { return unix.Fallocate(int(fd), mode, off, n) })
	})
	// The range is sane, so EINVAL says that the file system does not know the mode, or that the device
	// does not do it for a range that is not made of its own blocks.
	return unsupported(err, unix.EINVAL)
}

func punchHole(f *os.File, off, n int64) error {
	return fallocate(f, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func zeroRange(f *os.File, off, n int64) error {
	return fallocate(f, unix.FALLOC_FL_ZERO_RANGE, off, n)
}

func allocate(f *os.File, off, n int64) error {
	return fallocate(f, 0, off, n)
}

// copyRange is copy_file_range(2), again until all is copied.
func copyRange(dst, src *os.File, dstOff, srcOff, n int64) (done int64, err error) {
	const most = 1 << 30 // of one call
	err = control(dst, func(to uintptr) error {
		return control(src, func(from uintptr) error {
			for done < n {
				in, out := srcOff+done, dstOff+done
				var k int
				err := retry(func() (err error) {
					k, err = unix.CopyFileRange(int(from), &in, int(to), &out, int(min(n-done, most)), 0)
					return err
				})
				if err != nil || k == 0 {
					return err
				}
				done += int64(k)
			}
			return nil
		})
	})
	// Two file systems, or one that copies by reading and writing; old kernels say EINVAL for special files.
	return done, unsupported(err, unix.EXDEV, unix.EINVAL)
}

// nextData is lseek(2) with SEEK_DATA and SEEK_HOLE. It moves the file's own position, which nobody
// may use.
func nextData(f *os.File, off int64) (start, end int64, err error) {
	err = control(f, func(fd uintptr) error {
		if start, err = unix.Seek(int(fd), off, unix.SEEK_DATA); err != nil {
			return err
		}
		end, err = unix.Seek(int(fd), start, unix.SEEK_HOLE)
		return err
	})
	switch {
	case errors.Is(err, unix.ENXIO): // off is in the last hole or past the end, or the file shrank meanwhile
		return 0, 0, io.EOF
	case err != nil:
		return 0, 0, unsupported(err, unix.EINVAL)
	}
	return start, end, nil
}

// syncData is fdatasync(2).
func syncData(f *os.File) error {
	return control(f, func(fd uintptr) error {
		return retry(func() error { return unix.Fdatasync(int(fd)) })
	})
}

// setLock locks the bytes that l has beyond old, then tests, then lets go of what old had beyond l: in
// this order of two users who start at once, at least one sees the other.
func setLock(f *os.File, old, l ImageLock) error {
	return control(f, func(fd uintptr) error {
		var taken []int64
		undo := func(err error) error {
			for _, b := range taken {
				setByte(fd, b, unix.F_UNLCK) // fails only where locking failed
			}
			return err
		}
		for _, b := range l.without(old).held() {
			if err := setByte(fd, b, unix.F_RDLCK); err != nil {
				return undo(err)
			}
			taken = append(taken, b)
		}
		for _, b := range l.tested() {
			if err := testByte(fd, b); err != nil {
				return undo(err)
			}
		}
		for _, b := range old.without(l).held() {
			if err := setByte(fd, b, unix.F_UNLCK); err != nil {
				return err
			}
		}
		return nil
	})
}

// setByte locks or unlocks one byte for the open file description. A read lock is what a descriptor
// without write access can have.
func setByte(fd uintptr, off int64, typ int16) error {
	lk := unix.Flock_t{Type: typ, Whence: io.SeekStart, Start: off, Len: 1}
	err := retry(func() error { return unix.FcntlFlock(fd, unix.F_OFD_SETLK, &lk) })
	if err == unix.EAGAIN || err == unix.EACCES { // a write lock is in the way
		return &ConflictError{Byte: off}
	}
	return lockErr(err)
}

// testByte returns a *ConflictError if another open file description has locked the byte.
func testByte(fd uintptr, off int64) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: off, Len: 1}
	if err := retry(func() error { return unix.FcntlFlock(fd, unix.F_OFD_GETLK, &lk) }); err != nil {
		return lockErr(err)
	}
	if lk.Type != unix.F_UNLCK {
		return &ConflictError{Byte: off}
	}
	return nil
}

// lockErr is err of a lock operation, where ENOLCK and EINVAL say that the file system has no locks or
// that the system does not know those of open file descriptions.
func lockErr(err error) error {
	return unsupported(err, syscall.ENOLCK, syscall.EINVAL)
}
