//go:build unix

package disk

import (
	"os"
	"syscall"
)

// Allocated returns how many bytes the named file takes on its file system.
func Allocated(name string) (int64, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return 0, err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int64(st.Blocks) * 512, nil
	}
	return fi.Size(), nil
}
