package main

import (
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// peakKiB returns the largest resident size of a process that has ended.
func peakKiB(s *os.ProcessState) int64 {
	if r, ok := s.SysUsage().(*syscall.Rusage); ok {
		return int64(r.Maxrss)
	}
	return 0
}

// copyRange has the kernel copy n bytes at off.
func copyRange(out, in *os.File, off, n int64) error {
	for n > 0 {
		from, to := off, off
		k, err := unix.CopyFileRange(int(in.Fd()), &from, int(out.Fd()), &to, int(n), 0)
		if err != nil {
			return err
		}
		if k == 0 {
			return io.ErrUnexpectedEOF
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}
