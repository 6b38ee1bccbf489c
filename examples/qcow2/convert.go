package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2/examples/internal/disk"
	"github.com/go-qcow2/qcow2/examples/internal/progress"
)

// convertCommand is "convert": a disk into a new file of either format.
func convertCommand() *cobra.Command {
	var (
		source          = sourceFlags{reads: true}
		to              disk.Target
		options         []string
		sparse          string
		showsBar, quiet bool
	)
	cmd := &cobra.Command{
		Use:   "convert [-f FMT] [-O OUTPUT_FMT] [-c] [-p] [-o OPTIONS] [-S SPARSE_SIZE] [-l SNAPSHOT] FILE OUTPUT_FILE",
		Short: "Convert a disk into another format, replacing an existing file",
		Args:  cobra.RangeArgs(0, 2), // none with -o help
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := checkFormat(to.Format); err != nil {
				return err
			}
			c, err := readCreateOptions(to.Format, options)
			if err != nil {
				return err
			}
			if c.help {
				if to.Format == disk.QCOW2 {
					fmt.Fprint(cmd.OutOrStdout(), createOptionNames)
				}
				return nil
			}
			if len(args) != 2 {
				return errors.New("must specify one input and one output file name")
			}
			if c.image.BackingFile+c.image.BackingFormat != "" {
				return errors.New("a backing file for the output is not supported")
			}
			if to.Compress && to.Format == disk.Raw {
				return errors.New("compression not supported for this file format")
			}
			if sparse != "" {
				n, err := parseSize(sparse)
				if err != nil {
					return err
				}
				if n < 512 || n > 1<<20 || n&(n-1) != 0 {
					return errors.New("invalid buffer size for sparse output specified: " +
						"must be a power of two from 512 to 1M")
				}
				to.SparseSize = int(n)
			}
			src, err := source.open(args[0], cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, src.Close()) }()
			if c.size >= 0 && c.size != disk.RoundUp(src.Size()) {
				return errors.New("another size for the output is not supported")
			}
			to.Name, to.Create = args[1], c.image
			if showsBar && !quiet {
				bar := progress.Start(cmd.ErrOrStderr(), "convert")
				defer func() { bar.Done(err) }()
				to.Progress = bar.Update
			}
			if err := disk.Convert(cmd.Context(), src, to); err != nil {
				return fmt.Errorf("convert %s to %s: %w", args[0], args[1], err)
			}
			return nil
		},
	}
	source.add(cmd)
	source.addBackingFormat(cmd)
	cmd.Flags().StringVarP(&to.Format, "output-format", "O", disk.Raw, "format of the new file: qcow2 or raw")
	cmd.Flags().BoolVarP(&to.Compress, "compress", "c", false, "compress clusters")
	cmd.Flags().BoolVarP(&showsBar, "progress", "p", false, "show progress")
	cmd.Flags().StringArrayVarP(&options, "options", "o", nil, "options of the output's format: a=b,c=d (or help)")
	cmd.Flags().StringVarP(&sparse, "sparse-size", "S", "", "bytes of zeros that become a hole, a power of two from 512 to 1M (default 4k)")
	cmd.Flags().StringVarP(&source.snapshot, "snapshot", "l", "", "convert an internal snapshot: ID_OR_NAME, or snapshot.id=ID,snapshot.name=NAME")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print errors only")
	return cmd
}
