package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
	"github.com/go-qcow2/qcow2/examples/internal/progress"
)

// amendOptionNames lists what -o of amend takes, for -o help.
const amendOptionNames = `Amend options for 'qcow2':
  backing_file=<str>     - File name of a base image: as it is, else use rebase
  backing_fmt=<str>      - Image format of the base image: as it is, else use rebase
  compat=<str>           - Version: v2 (0.10) or v3 (1.1)
  data_file_raw=<bool>   - The data file alone must read as the disk: off only
  lazy_refcounts=<bool>  - Postpone refcount updates
  refcount_bits=<num>    - Width of a reference count in bits: 1 to 64
  size=<size>            - Size of the disk in bytes: larger, or smaller without asking
`

// amendOptions is what -o of amend says.
type amendOptions struct {
	image                     qcow2.AmendOptions
	size                      int64 // of the disk; 0: as it is
	backing, backingFmt       string
	namesBacking, namesFormat bool
	help                      bool
}

// readAmendOptions reads the options of amend. Of an option that is given twice the last counts.
func readAmendOptions(args []string) (a amendOptions, err error) {
	opts, err := parseOptions(args)
	if err != nil {
		return a, err
	}
	for _, o := range opts {
		var err error
		flag := func() *bool {
			v, e := parseBool(o.value)
			err = e
			return &v
		}
		switch o.name {
		case "help", "?":
			a.help = true
		case "compat":
			a.image.Version, err = oneOf(o.value, map[string]int{"0.10": 2, "v2": 2, "1.1": 3, "v3": 3})
		case "refcount_bits":
			a.image.RefcountBits, err = parsePositive(o.value)
		case "lazy_refcounts":
			a.image.LazyRefcounts = flag()
		case "data_file_raw":
			a.image.DataFileRaw = flag()
		case "backing_file":
			a.backing, a.namesBacking = o.value, true
		case "backing_fmt":
			a.backingFmt, a.namesFormat = o.value, true
		case "size":
			if a.size, err = parseSize(o.value); err == nil && a.size%512 != 0 {
				err = errors.New("the new size must be a multiple of 512")
			}
		case "cluster_size", "compression_type", "extended_l2", "preallocation":
			return a, fmt.Errorf("invalid parameter '%s': this option is only supported for image creation", o.name)
		case "data_file":
			return a, fmt.Errorf("amending '%s' is not supported", o.name)
		default:
			return a, fmt.Errorf("invalid parameter '%s'", o.name)
		}
		if err != nil {
			return a, fmt.Errorf("parameter '%s': %w", o.name, err)
		}
	}
	return a, nil
}

// apply amends img. The size changes while the image has the higher of its versions, as version 2 can less.
func (a *amendOptions) apply(ctx context.Context, img *qcow2.Image) error {
	steps := []func() error{
		func() error {
			if a.size == 0 || a.size == img.Size() {
				return nil
			}
			return img.Resize(ctx, a.size, &qcow2.ResizeOptions{Shrink: true})
		},
		func() error { return img.Amend(ctx, &a.image) },
	}
	if a.image.Version == 3 {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// amendCommand is "amend": other features for an image that exists.
func amendCommand() *cobra.Command {
	var (
		source          sourceFlags
		options         []string
		showsBar, quiet bool
	)
	cmd := &cobra.Command{
		Use:   "amend [-f FMT] [-p] [-q] -o OPTIONS FILE",
		Short: "Change the features of an image",
		Args:  cobra.RangeArgs(0, 1), // none with -o help
	}
	source.add(cmd)
	cmd.Flags().StringArrayVarP(&options, "options", "o", nil, "what the image is to have: a=b,c=d (or help)")
	cmd.Flags().BoolVarP(&showsBar, "progress", "p", false, "show progress")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print errors only")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(options) == 0 {
			return errors.New("must specify options (-o)")
		}
		a, err := readAmendOptions(options)
		if err != nil {
			return err
		}
		if a.help {
			fmt.Fprint(cmd.OutOrStdout(), amendOptionNames)
			return nil
		}
		if len(args) != 1 {
			return errors.New("expecting one image file name")
		}
		name := args[0]
		opts, err := source.options(name, cmd.ErrOrStderr())
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		if opts.Format == disk.Raw {
			return errors.New("format driver 'raw' does not support option amendment")
		}
		img, err := disk.Edit(name, opts, a.size == 0) // a larger disk may show what the backing file has there
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		if showsBar && !quiet {
			bar := progress.Start(cmd.ErrOrStderr(), "amend")
			defer func() { bar.Done(err) }()
			a.image.Progress = bar.Update
		}
		info := img.Info()
		if a.namesBacking && a.backing != info.BackingFile || a.namesFormat && a.backingFmt != info.BackingFormat {
			err = errors.New("cannot amend the backing file; you can use rebase instead")
		} else {
			err = a.apply(cmd.Context(), img)
		}
		if err = errors.Join(err, img.Close()); err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		return err
	}
	return cmd
}
