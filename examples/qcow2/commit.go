package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
	"github.com/go-qcow2/qcow2/examples/internal/progress"
)

// commitCommand is "commit": what an image holds, into a file below it.
func commitCommand() *cobra.Command {
	var (
		source          sourceFlags
		base            string
		keep            bool
		showsBar, quiet bool
	)
	cmd := &cobra.Command{
		Use:   "commit [-f FMT] [-b BASE] [-d] [-p] [-q] FILE",
		Short: "Write what an image holds into its backing file, and empty it",
		Args:  cobra.ExactArgs(1),
	}
	source.add(cmd)
	cmd.Flags().StringVarP(&base, "base", "b", "", "write into this file of the chain, and keep the image as it is (default: its backing file)")
	cmd.Flags().BoolVarP(&keep, "keep", "d", false, "do not empty the image")
	cmd.Flags().BoolVarP(&showsBar, "progress", "p", false, "show progress")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print errors only")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		name := args[0]
		if source.share {
			return errors.New("-U cannot be used: the image and its backing file are written")
		}
		opts, err := source.options(name, cmd.ErrOrStderr())
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		switch {
		case opts.Format == disk.Raw:
			return fmt.Errorf("'%s': %w", name, qcow2.ErrNoBacking)
		case !opts.Follow:
			return fmt.Errorf("'%s' names the file that is written: say -f %s or --trust if you know where it comes from", name, opts.Format)
		}
		o := qcow2.CommitOptions{KeepOverlay: keep || base != ""}
		if showsBar && !quiet {
			bar := progress.Start(cmd.ErrOrStderr(), "commit")
			defer func() { bar.Done(err) }()
			o.Progress = bar.Update
		}
		if err := disk.Commit(cmd.Context(), name, base, o); err != nil {
			return err
		}
		if !quiet {
			fmt.Fprintln(cmd.OutOrStdout(), "Image committed.")
		}
		return nil
	}
	return cmd
}
