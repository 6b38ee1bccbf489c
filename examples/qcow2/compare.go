package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
	"github.com/go-qcow2/qcow2/examples/internal/progress"
)

// The exit codes of compare besides 0, for disks that are equal. Arguments that make no sense end with 1, too, as with
// qemu-img.
const (
	exitDiffer  = 1
	exitOpen    = 2 // a file could not be opened
	exitExtents = 3 // where a disk's content lies could not be found out
	exitRead    = 4 // its content could not be read
)

// compareCommand is "compare": whether two disks read the same.
func compareCommand() *cobra.Command {
	var (
		source          sourceFlags
		second          string
		o               qcow2.CompareOptions
		showsBar, quiet bool
	)
	cmd := &cobra.Command{
		Use: "compare [-f FMT] [-F FMT] [-s] [-p] [-q] [-U] FILE1 FILE2",
		Short: "Tell whether two disks have the same content; exit codes: 0 if so, 1 if not, 2 if one cannot be opened, 3 or 4 if " +
			"one cannot be read",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(args) != 2 {
				return errors.New("expecting two image file names")
			}
			var disks [2]*disk.Disk
			for i, name := range args {
				from := source
				if i == 1 {
					from.format = second
				}
				if disks[i], err = from.open(name, cmd.ErrOrStderr()); err != nil {
					return &exitError{exitOpen, err}
				}
				defer func() { err = errors.Join(err, disks[i].Close()) }()
			}
			if showsBar && !quiet {
				bar := progress.Start(cmd.ErrOrStderr(), "compare")
				defer func() { bar.Done(err) }()
				o.Progress = bar.Update
			}
			w := cmd.OutOrStdout()
			if quiet {
				w = io.Discard
			}
			return compare(cmd.Context(), w, disks[0], disks[1], o)
		},
	}
	source.add(cmd)
	cmd.Flags().StringVarP(&second, "second-format", "F", "", "format of the second file (default: as its first bytes tell)")
	cmd.Flags().BoolVarP(&o.Strict, "strict", "s", false, "compare sizes and allocation, too")
	cmd.Flags().BoolVarP(&showsBar, "progress", "p", false, "show progress")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print errors only")
	return cmd
}

// compare compares two disks, prints the verdict, and returns the error with the exit code.
func compare(ctx context.Context, w io.Writer, a, b *disk.Disk, o qcow2.CompareOptions) error {
	diff, err := qcow2.Compare(ctx, a.Disk, b.Disk, &o)
	var failed *qcow2.CompareError
	switch {
	case errors.As(err, &failed) && failed.Reading:
		return &exitError{exitRead, err}
	case err != nil:
		return &exitError{exitExtents, err}
	}
	small, large := min(a.Size(), b.Size()), max(a.Size(), b.Size())
	if !o.Strict && small != large && (diff == nil || diff.Off >= small) {
		fmt.Fprintln(w, "Warning: Image size mismatch!")
	}
	if diff == nil {
		_, err := fmt.Fprintln(w, "Images are identical.")
		return err
	}
	switch diff.Kind {
	case qcow2.DifferentSize:
		fmt.Fprintln(w, "Strict mode: Image size mismatch!")
	case qcow2.DifferentAllocation:
		fmt.Fprintf(w, "Strict mode: Offset %d block status mismatch!\n", diff.Off)
	default:
		const sector = 512 // the unit of qemu-img
		fmt.Fprintf(w, "Content mismatch at offset %d!\n", diff.Off/sector*sector)
	}
	return &exitError{code: exitDiffer}
}
