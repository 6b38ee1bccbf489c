//go:build !linux

package hostfile

import (
	"errors"
	"os"
)

func punchHole(*os.File, int64, int64) error { return errors.ErrUnsupported }

func zeroRange(*os.File, int64, int64) error { return errors.ErrUnsupported }

func allocate(*os.File, int64, int64) error { return errors.ErrUnsupported }

func copyRange(_, _ *os.File, _, _, _ int64) (int64, error) { return 0, errors.ErrUnsupported }

// nextData is not done elsewhere than on Linux, although macOS and FreeBSD have the call: file systems
// there have reported holes over data that was not written back yet.
func nextData(*os.File, int64) (start, end int64, err error) { return 0, 0, errors.ErrUnsupported }

// syncData is a whole sync, which on macOS also empties the drive's cache.
func syncData(f *os.File) error { return f.Sync() }

func setLock(_ *os.File, _, l ImageLock) error {
	if l == (ImageLock{}) {
		return nil
	}
	return errors.ErrUnsupported
}
