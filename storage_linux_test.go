package qcow2

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// rawFile reads and writes a descriptor with the bare system calls.
type rawFile int

func (fd rawFile) ReadAt(p []byte, off int64) (int, error)  { return unix.Pread(int(fd), p, off) }
func (fd rawFile) WriteAt(p []byte, off int64) (int, error) { return unix.Pwrite(int(fd), p, off) }

// rawReadWriter opens the file for the benchmark's comparison.
func rawReadWriter(b *testing.B, name string) rawFile {
	fd, err := unix.Open(name, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Close(fd) })
	return rawFile(fd)
}
