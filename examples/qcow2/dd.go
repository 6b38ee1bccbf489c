package main

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2/examples/internal/disk"
)

// ddOperands are the operands of dd. As with qemu-img, count counts from the start of the input, what is skipped included.
type ddOperands struct {
	in, out        string
	bs, count      int64
	skip           int64
	limited, moved bool // count and skip were given
}

// ddCommand is "dd": a part of a disk into a new file.
func ddCommand() *cobra.Command {
	var (
		source = sourceFlags{reads: true}
		format string
	)
	cmd := &cobra.Command{
		Use:   "dd [-f FMT] [-O OUTPUT_FMT] [-U] [bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=FILE of=OUTPUT_FILE",
		Short: "Copy blocks of a disk into a new file",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			d, err := readOperands(args)
			if err != nil {
				return err
			}
			if err := checkFormat(format); err != nil {
				return err
			}
			src, err := source.open(d.in, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, src.Close()) }()
			off, n, ok := d.span(src.Size())
			if !ok {
				fmt.Fprintf(cmd.ErrOrStderr(), "qcow2: %s: cannot skip to specified offset\n", d.in)
			}
			whole := src.Disk
			src.Disk = disk.Section(whole, off, n)
			if err := disk.Convert(cmd.Context(), src, disk.Target{Name: d.out, Format: format}); err != nil {
				return fmt.Errorf("copy %s to %s: %w", d.in, d.out, err)
			}
			return nil
		},
	}
	source.add(cmd)
	cmd.Flags().StringVarP(&format, "output-format", "O", disk.Raw, "format of the new file: qcow2 or raw")
	return cmd
}

// readOperands reads the operands.
func readOperands(args []string) (d ddOperands, err error) {
	d.bs = 512
	for _, arg := range args {
		name, value, _ := strings.Cut(arg, "=")
		switch name {
		case "if":
			d.in = value
		case "of":
			d.out = value
		case "bs":
			if d.bs, err = parseSize(value); err == nil && (d.bs < 1 || d.bs > math.MaxInt32) {
				err = errors.New("must be between 1 and 2147483647")
			}
		case "count":
			d.limited = true
			d.count, err = parseSize(value)
		case "skip":
			d.moved = true
			d.skip, err = parseSize(value)
		default:
			return d, fmt.Errorf("unrecognized operand %s", arg)
		}
		if err != nil {
			return d, fmt.Errorf("invalid %s specified: %w", name, err)
		}
	}
	if d.in == "" || d.out == "" {
		return d, errors.New("must specify both input and output files")
	}
	return d, nil
}

// span returns which bytes of a disk of size bytes are copied. ok is false if there is nothing where to skip to.
func (d *ddOperands) span(size int64) (off, n int64, ok bool) {
	if d.limited && d.count <= math.MaxInt64/d.bs {
		size = min(size, d.count*d.bs)
	}
	if !d.moved {
		return 0, size, true
	}
	if d.skip > math.MaxInt64/d.bs || d.skip*d.bs > size {
		return 0, 0, false
	}
	return d.skip * d.bs, size - d.skip*d.bs, true
}
