package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
	"github.com/go-qcow2/qcow2/examples/internal/progress"
)

// rebaseCommand is "rebase": another backing file for an image, or none.
func rebaseCommand() *cobra.Command {
	var (
		source                  sourceFlags
		o                       qcow2.RebaseOptions
		unsafe, showsBar, quiet bool
	)
	cmd := &cobra.Command{
		Use:   "rebase [-f FMT] [-u] -b BACKING_FILE [-F BACKING_FMT] [-p] FILE",
		Short: "Give an image another backing file, or none with -b \"\"",
		Args:  cobra.ExactArgs(1),
	}
	source.add(cmd)
	cmd.Flags().StringVarP(&o.BackingFile, "backing", "b", "", "new backing file, relative to the image")
	cmd.Flags().StringVarP(&o.BackingFormat, "backing-format", "F", "", "format of the new backing file")
	cmd.Flags().BoolVarP(&unsafe, "unsafe", "u", false, "change the name only: the new backing file reads as the old one")
	cmd.Flags().BoolVarP(&showsBar, "progress", "p", false, "show progress")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print errors only")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name := args[0]
		if !unsafe && !cmd.Flags().Changed("backing") {
			return errors.New("must specify backing file (-b) or use unsafe mode (-u)")
		}
		if o.BackingFormat != "" {
			if err := checkFormat(o.BackingFormat); err != nil {
				return err
			}
		}
		switch {
		case o.BackingFile == "":
			o.BackingFormat = ""
		case o.BackingFormat == "":
			return fmt.Errorf("could not change the backing file to '%s': backing format must be specified", o.BackingFile)
		}
		opts, err := source.options(name, cmd.ErrOrStderr())
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		if opts.Format == disk.Raw {
			return fmt.Errorf("could not change the backing file to '%s': a raw file has none", o.BackingFile)
		}
		img, err := disk.Edit(name, opts, unsafe)
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		o.Unsafe = unsafe
		if !unsafe {
			o.Resolver = disk.LocalFiles() // the name is the user's own
		}
		if showsBar && !quiet {
			bar := progress.Start(cmd.ErrOrStderr(), "rebase")
			defer func() { bar.Done(err) }()
			o.Progress = bar.Update
		}
		err = errors.Join(img.Rebase(cmd.Context(), &o), img.Close())
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		return err
	}
	return cmd
}
