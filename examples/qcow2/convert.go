package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
	"github.com/go-qcow2/qcow2/examples/internal/progress"
)

// convertFlags are the flags of convert besides those of its source.
type convertFlags struct {
	format                 string
	options                []string
	backing, backingFormat string
	sparse, rate           string
	workers                int
	compress, salvage      bool
	existing, isZero       bool
	bar, quiet             bool
}

// convertCommand is "convert": a disk into a new file of either format, or into a disk that is there.
func convertCommand() *cobra.Command {
	var (
		source = sourceFlags{reads: true}
		f      convertFlags
	)
	var in inPlaceFlags
	cmd := &cobra.Command{
		Use: "convert [-f FMT] [-O OUTPUT_FMT] [-c] [-p] [-q] [-n] [--target-is-zero] [-B BACKING_FILE -F BACKING_FMT] [-o OPTIONS] " +
			"[-S SPARSE_SIZE] [-l SNAPSHOT] [-r RATE] [-m WORKERS] [-W] [--salvage] [-U] FILE OUTPUT_FILE",
		Short: "Convert a disk into another format, replacing an existing file",
		Long: "Convert a disk into another format, replacing an existing file. With the output file - a qcow2 image goes to\n" +
			"standard output, which may be a pipe; with -c or -S the source is read twice for that.\n\n" + inPlaceLong,
		Args: cobra.RangeArgs(0, 2), // none with -o help
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if in.asked() {
				return in.run(cmd, args, &source, &f)
			}
			to, help, err := f.target(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if help {
				return printCreateHelp(cmd.OutOrStdout(), to.Format)
			}
			if len(args) != 2 {
				return errors.New("must specify one input and one output file name")
			}
			src, err := source.open(args[0], cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, src.Close()) }()
			to.Name = args[1]
			if f.bar && !f.quiet {
				bar := progress.Start(cmd.ErrOrStderr(), "convert")
				defer func() { bar.Done(err) }()
				to.Options.Progress = bar.Update
			}
			if args[1] == "-" {
				err = disk.Stream(cmd.Context(), cmd.OutOrStdout(), src, to)
			} else {
				err = disk.Convert(cmd.Context(), src, to)
			}
			if err != nil {
				return fmt.Errorf("convert %s to %s: %w", args[0], args[1], err)
			}
			return nil
		},
	}
	source.add(cmd)
	source.addBackingFormat(cmd)
	f.add(cmd)
	in.add(cmd)
	cmd.Flags().StringVarP(&source.snapshot, "snapshot", "l", "", "convert an internal snapshot: ID_OR_NAME, or snapshot.id=ID,snapshot.name=NAME")
	return cmd
}

// add defines the flags on cmd.
func (f *convertFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.format, "output-format", "O", disk.Raw, "format of the output: qcow2 or raw")
	cmd.Flags().BoolVarP(&f.compress, "compress", "c", false, "compress clusters")
	cmd.Flags().BoolVarP(&f.bar, "progress", "p", false, "show progress")
	cmd.Flags().StringArrayVarP(&f.options, "options", "o", nil, "options of the output's format: a=b,c=d (or help)")
	cmd.Flags().StringVarP(&f.backing, "backing", "B", "", "backing file of the output, with the content of that of the input: it is not copied")
	cmd.Flags().StringVarP(&f.backingFormat, "target-backing-format", "F", "", "format of the backing file of the output")
	cmd.Flags().StringVarP(&f.sparse, "sparse-size", "S", "", "bytes of zeros that become a hole, a multiple of 512 up to 1M (default 4k); 0: none does")
	cmd.Flags().BoolVarP(&f.existing, "no-create", "n", false, "write into the output that is there")
	cmd.Flags().BoolVar(&f.isZero, "target-is-zero", false, "the output that is there reads as zeros")
	cmd.Flags().StringVarP(&f.rate, "rate-limit", "r", "", "bytes per second that are copied at the most")
	cmd.Flags().IntVarP(&f.workers, "parallel", "m", 8, "workers, 1 to 16")
	cmd.Flags().BoolP("out-of-order", "W", false, "has no effect: workers write beside each other, and the output is the same always")
	cmd.Flags().BoolVar(&f.salvage, "salvage", false, "take what cannot be read for zeros, and say so")
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "print errors only")
}

// target returns the target that the flags ask for, and whether they ask for help instead.
func (f *convertFlags) target(stderr io.Writer) (to disk.Target, help bool, err error) {
	c, err := readCreateOptions(f.format, f.options)
	if err != nil || c.help {
		to.Format = f.format
		return to, c.help, err
	}
	if c.size >= 0 {
		fmt.Fprintln(stderr, "qcow2: option size has no effect: the output has the size of the input")
	}
	if f.backing != "" {
		c.image.BackingFile = f.backing
	}
	if f.backingFormat != "" {
		c.image.BackingFormat = f.backingFormat
	}
	if err := f.check(&c.image); err != nil {
		return to, false, err
	}
	to = disk.Target{Format: f.format, Create: c.image, Existing: f.existing}
	o := &to.Options
	o.Compress, o.TargetIsZero, o.Workers = f.compress, f.isZero, f.workers
	if c.image.BackingFile != "" {
		o.SharedDepth = 1
	}
	if f.salvage {
		o.OnReadError = func(off, n int64, err error) error {
			fmt.Fprintf(stderr, "qcow2: takes %d bytes at %d for zeros: %v\n", n, off, err)
			return nil
		}
	}
	if f.rate != "" {
		if o.Rate, err = parseSize(f.rate); err != nil {
			return to, false, fmt.Errorf("invalid rate limit specified: %w", err)
		}
	}
	return to, false, readSparse(f.sparse, o)
}

// check refuses flags that contradict each other.
func (f *convertFlags) check(image *qcow2.CreateOptions) error {
	switch {
	case f.workers < 1 || f.workers > 16:
		return errors.New("invalid number of coroutines: it must be between 1 and 16")
	case f.existing && len(f.options) > 0:
		return errors.New("-o has no effect when skipping image creation")
	case f.isZero && !f.existing:
		return errors.New("--target-is-zero requires use of -n flag")
	case f.isZero && image.BackingFile != "":
		return errors.New("cannot use --target-is-zero when the destination image has a backing file")
	case f.compress && f.format == disk.Raw:
		return errors.New("compression not supported for this file format")
	case f.compress && image.Preallocation != qcow2.PreallocationOff:
		return errors.New("compression and preallocation not supported at the same time")
	case image.BackingFile != "" && f.format == disk.Raw:
		return errors.New("backing file not supported for file format 'raw'")
	case image.BackingFile != "" && image.BackingFormat == "":
		return errors.New("use of backing file requires explicit backing format")
	case image.BackingFormat != "" && image.BackingFile == "":
		return errors.New("backing format cannot be used without backing file")
	}
	return nil
}

// readSparse reads the value of -S. It is rounded up to a power of two: so many bytes of zeros at least become a hole.
func readSparse(s string, o *qcow2.ConvertOptions) error {
	if s == "" {
		return nil
	}
	n, err := parseSize(s)
	if err != nil {
		return err
	}
	if n > 1<<20 || n%512 != 0 {
		return errors.New("invalid buffer size for sparse output specified: valid sizes are multiples of 512 up to 1M, and 0 to disable sparse detection")
	}
	if n == 0 {
		o.SparseSize, o.Zeroes = -1, qcow2.ZeroesData
		return nil
	}
	for o.SparseSize = 512; int64(o.SparseSize) < n; {
		o.SparseSize *= 2
	}
	return nil
}
