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

func syncDir(string) error { return errors.ErrUnsupported }
