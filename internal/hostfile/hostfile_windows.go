package hostfile

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/windows"
)

const openNonblock = 0

func settle(*os.File) (appends bool, err error) { return false, nil }

// identity is the serial number of the volume and the index of the file on it.
func identity(f *os.File, _ fs.FileInfo) (ID, bool) {
	var fi windows.ByHandleFileInformation
	err := control(f, func(fd uintptr) error {
		return windows.GetFileInformationByHandle(windows.Handle(fd), &fi)
	})
	if err != nil {
		return ID{}, false
	}
	return ID{
		Dev: uint64(fi.VolumeSerialNumber),
		Ino: uint64(fi.FileIndexHigh)<<32 | uint64(fi.FileIndexLow),
	}, true
}

func allocated(fs.FileInfo) (int64, error) { return 0, errors.ErrUnsupported }

// syncDir is not done: Windows has no call that makes a directory durable.
func syncDir(string) error { return errors.ErrUnsupported }
