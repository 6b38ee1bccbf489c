package qcow2

import "context"

// ZeroFlags, WriteZeroes and Resize stand in for what discard.go and resize.go bring.
type ZeroFlags uint

const ZeroMayUnmap ZeroFlags = 1

func (img *Image) WriteZeroes(off, n int64, f ZeroFlags) error {
	for n > 0 {
		k := min(n, int64(len(zeroChunk)))
		if _, err := img.WriteAt(zeroChunk[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

type ResizeOptions struct{}

func (img *Image) Resize(ctx context.Context, size int64, o *ResizeOptions) error {
	return ErrUnsupported
}
