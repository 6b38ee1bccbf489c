//go:build !linux

package qcow2

import (
	"os"
	"testing"
)

// rawReadWriter opens the file for the benchmark's comparison: elsewhere than on Linux, package os.
func rawReadWriter(b *testing.B, name string) *os.File {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	return f
}
