//go:build unix

package hostfile

import (
	"errors"
	"syscall"
)

// IsNoSpace reports whether err says that the file system, or its user's quota, is full.
func IsNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
