package disk

import (
	"context"
	"errors"
	"io"

	"github.com/go-qcow2/qcow2"
)

// Stream writes the disk src to w as a qcow2 image, from its first byte to its last. With a SparseSize it looks for
// clusters that hold zeros, which reads the source twice, as Compress does. A stream has no backing file, no bound on
// its rate, and nothing to go into that is there.
func Stream(ctx context.Context, w io.Writer, src *Disk, to Target) error {
	if to.Format != QCOW2 {
		return errors.New("only the format qcow2 can be written to standard output")
	}
	if o := &to.Options; to.Existing || to.Create.BackingFile != "" || o.Rate != 0 || o.OnReadError != nil || o.Zeroes != qcow2.ZeroesHoles {
		return errors.New("standard output takes neither -n, -B, -r, --salvage nor -S 0")
	}
	_, err := qcow2.WriteStream(ctx, w, src, &qcow2.StreamOptions{
		Create:        &to.Create,
		Compress:      to.Options.Compress,
		DeflateWindow: to.Options.DeflateWindow,
		FindZeros:     to.Options.SparseSize > 0,
		Workers:       to.Options.Workers,
		Progress:      to.Options.Progress,
	})
	return err
}
