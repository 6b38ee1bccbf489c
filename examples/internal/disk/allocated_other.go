//go:build !unix

package disk

import "os"

// Allocated returns the length in bytes of the named file, which is what it takes at most.
func Allocated(name string) (int64, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}
