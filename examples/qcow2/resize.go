package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
	"github.com/go-qcow2/qcow2/examples/internal/progress"
)

// preallocations are the modes of preallocation by their names.
var preallocations = map[string]qcow2.Preallocation{
	"off": qcow2.PreallocationOff, "metadata": qcow2.PreallocationMetadata, "falloc": qcow2.PreallocationFalloc, "full": qcow2.PreallocationFull,
}

// resizeCommand is "resize": another size for the disk in an image. The size is the last argument, so that one that
// begins with a minus sign is no flag.
func resizeCommand() *cobra.Command {
	var (
		source                  sourceFlags
		mode                    string
		shrink, quiet, showsBar bool
	)
	cmd := &cobra.Command{
		Use:                "resize [-f FMT] [--preallocation=off|metadata|falloc|full] [--shrink] [-p] [-q] FILE [+|-]SIZE",
		Short:              "Change the size of a disk",
		DisableFlagParsing: true,
	}
	flags := cmd.Flags()
	flags.StringVarP(&source.format, "format", "f", "", "format of the file: qcow2 or raw (default: as its first bytes tell)")
	flags.BoolVar(&source.trust, "trust", false, "open the files that an image names, although its format was not given")
	flags.StringVar(&mode, "preallocation", "off", "preallocation of what a disk gains: off, metadata, falloc or full")
	flags.BoolVar(&shrink, "shrink", false, "allow a smaller size: what lies behind it is lost")
	flags.BoolVarP(&showsBar, "progress", "p", false, "show progress")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print errors only")
	flags.BoolP("help", "h", false, "help for resize")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		size := ""
		if n := len(args); n > 1 {
			args, size = args[:n-1], args[n-1]
		}
		if err := flags.Parse(args); err != nil {
			return err
		}
		if help, err := flags.GetBool("help"); err == nil && help || size == "-h" || size == "--help" {
			return cmd.Help()
		}
		if size == "" || flags.NArg() != 1 {
			return errors.New("expecting image file name and size")
		}
		prealloc, err := oneOf(mode, preallocations)
		if err != nil {
			return fmt.Errorf("invalid preallocation mode '%s'", mode)
		}
		name, stderr := flags.Arg(0), cmd.ErrOrStderr()
		opts, err := source.options(name, stderr)
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		d, err := openResizable(name, opts)
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		defer d.Close()
		now := d.Size()
		n, err := newSize(size, now)
		if err != nil {
			return err
		}
		if n <= now && prealloc != qcow2.PreallocationOff {
			return errors.New("preallocation can only be used for growing images")
		}
		if n < now && !shrink {
			fmt.Fprintln(stderr, "qcow2: warning: shrinking an image will delete all data beyond the shrunken image's end. "+
				"Before performing such an operation, make sure there is no important data there.")
			return errors.New("use the --shrink option to perform a shrink operation")
		}
		o := qcow2.ResizeOptions{Shrink: shrink, Preallocation: prealloc}
		done := func(error) {}
		if showsBar {
			bar := progress.Start(stderr, "resize")
			o.Progress, done = bar.Update, bar.Done
		}
		err = d.Resize(cmd.Context(), n, &o)
		if err == nil {
			err = d.Close()
		}
		done(err)
		if err != nil {
			return err
		}
		if !quiet {
			fmt.Fprintln(cmd.OutOrStdout(), "Image resized.")
		}
		return nil
	}
	return cmd
}

// resizable is an open disk whose size can be changed: an image or a raw file.
type resizable interface {
	Size() int64
	Resize(ctx context.Context, size int64, opts *qcow2.ResizeOptions) error
	Close() error
}

// openResizable opens the named disk for that.
func openResizable(name string, opts disk.Options) (resizable, error) {
	if opts.Format == disk.QCOW2 {
		return disk.OpenImage(name, opts.Follow)
	}
	s, err := disk.OpenRaw(name)
	if err != nil {
		return nil, err
	}
	return &rawFile{s}, nil
}

// rawFile is a raw disk whose size can be changed.
type rawFile struct{ *qcow2.FileStorage }

// Size returns the size of the file in bytes, or 0 where it cannot be told.
func (f *rawFile) Size() int64 {
	n, err := f.FileStorage.Size()
	if err != nil {
		return 0
	}
	return n
}

// Resize cuts or extends the file, durably.
func (f *rawFile) Resize(_ context.Context, size int64, opts *qcow2.ResizeOptions) error {
	old := f.Size()
	var err error
	switch opts.Preallocation {
	case qcow2.PreallocationOff:
		err = f.Truncate(size)
	case qcow2.PreallocationFalloc:
		err = f.Allocate(old, size-old)
	default:
		return fmt.Errorf("unsupported preallocation mode '%s' of a raw disk", opts.Preallocation)
	}
	if err != nil {
		return err
	}
	return f.Sync()
}

// newSize returns the size that s stands for: a number of bytes, or with a sign the difference to now.
func newSize(s string, now int64) (int64, error) {
	sign := s[0]
	n, err := parseSize(strings.TrimLeft(s[:1], "+-") + s[1:])
	if err != nil {
		return 0, err
	}
	switch {
	case sign == '+' && n > math.MaxInt64-now, sign == '-' && n >= now, n == 0 && sign != '+':
		return 0, errors.New("new image size must be positive")
	case sign == '+':
		n += now
	case sign == '-':
		n = now - n
	}
	if n%512 != 0 {
		return 0, errors.New("the new size must be a multiple of 512")
	}
	return n, nil
}
