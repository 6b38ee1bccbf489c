package disk

import (
	"context"
	"errors"
	"io"

	"github.com/go-qcow2/qcow2"
)

// Stream writes the disk src to w as a qcow2 image, from its first byte to its last. With to.SparseSize it looks for
// clusters that hold zeros, which reads the source twice, as to.Compress does.
func Stream(ctx context.Context, w io.Writer, src *Disk, to Target) error {
	if to.Format != QCOW2 {
		return errors.New("only the format qcow2 can be written to standard output")
	}
	_, err := qcow2.WriteStream(ctx, w, src, &qcow2.StreamOptions{
		Create:    &to.Create,
		Compress:  to.Compress,
		FindZeros: to.SparseSize > 0,
		Progress:  to.Progress,
	})
	return err
}
