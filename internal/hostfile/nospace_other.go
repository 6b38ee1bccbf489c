//go:build !unix && !windows

package hostfile

import (
	"errors"
	"syscall"
)

// IsNoSpace reports whether err says that the file system is full.
func IsNoSpace(err error) bool { return errors.Is(err, syscall.ENOSPC) }
