//go:build !linux

package main

import "os"

// tempDir returns the directory for temporary files, whatever their size.
func tempDir(int64) string { return os.TempDir() }
