//go:build unix

package hostfile

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

const openNonblock = unix.O_NONBLOCK

func settle(f *os.File) (appends bool, err error) {
	err = control(f, func(fd uintptr) error {
		flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
		if err != nil {
			return err
		}
		appends = flags&unix.O_APPEND != 0
		if flags&unix.O_NONBLOCK == 0 {
			return nil
		}
		return unix.SetNonblock(int(fd), false)
	})
	return appends, err
}

// identity is the device and inode number of fi, or the number of the device that it is.
func identity(_ *os.File, fi fs.FileInfo) (ID, bool) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return ID{}, false
	}
	if fi.Mode()&fs.ModeDevice != 0 {
		return ID{Device: true, Dev: uint64(st.Rdev)}, true
	}
	return ID{Dev: uint64(st.Dev), Ino: uint64(st.Ino)}, true
}

// allocated counts the blocks of fi, which are 512 bytes whatever the file system's are.
func allocated(fi fs.FileInfo) (int64, error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	return int64(st.Blocks) * 512, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	// EINVAL says that the file system does not sync directories.
	return unsupported(d.Sync(), unix.EINVAL)
}
