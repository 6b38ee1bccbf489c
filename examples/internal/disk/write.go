package disk

import (
	"os"

	"github.com/go-qcow2/qcow2"
)

// OpenImage opens the named qcow2 image for writing. With follow it opens the files that the image names.
func OpenImage(name string, follow bool) (*qcow2.Image, error) {
	o := &qcow2.OpenOptions{Name: name, ReadWrite: true}
	if follow {
		o.Resolver = &localFiles{}
	}
	return qcow2.Open(name, o)
}

// OpenRaw opens the named file for writing, locked as a raw disk.
func OpenRaw(name string) (*qcow2.FileStorage, error) {
	s, err := qcow2.OpenFileStorage(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := lock(s, qcow2.LockRawWriter); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}
