package qcow2

import "context"

// ResizeOptions and Resize stand in for what resize.go brings.
type ResizeOptions struct{}

func (img *Image) Resize(ctx context.Context, size int64, o *ResizeOptions) error {
	return ErrUnsupported
}
