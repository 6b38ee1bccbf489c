package disk

import "github.com/go-qcow2/qcow2"

// newRaw returns the raw disk in s, which stays the caller's.
func newRaw(s qcow2.Storage) (qcow2.WritableDisk, error) { return qcow2.NewRawDisk(s) }
