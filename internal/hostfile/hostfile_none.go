//go:build !unix && !windows

package hostfile

import (
	"errors"
	"io/fs"
	"os"
)

const openNonblock = 0

func settle(*os.File) (appends bool, err error) { return false, nil }

func identity(*os.File, fs.FileInfo) (ID, bool) { return ID{}, false }

func allocated(fs.FileInfo) (int64, error) { return 0, errors.ErrUnsupported }

func syncDir(string) error { return errors.ErrUnsupported }
