package disk

import (
	"context"

	"github.com/go-qcow2/qcow2"
)

// newRaw returns the raw disk in s, which stays the caller's.
func newRaw(s qcow2.Storage) (qcow2.WritableDisk, error) { return qcow2.NewRawDisk(s) }

// convert copies src to dst as the target asks, and makes it durable.
func convert(ctx context.Context, dst qcow2.WritableDisk, src qcow2.Disk, to Target) error {
	return qcow2.Convert(ctx, dst, src, &qcow2.ConvertOptions{
		Compress:   to.Compress,
		SparseSize: to.SparseSize,
		Progress:   to.Progress,
	})
}
