package main

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
)

// measureInfo is what measure tells, under qemu-img's names and in its order.
type measureInfo struct {
	Bitmaps        *int64 `json:"bitmaps,omitempty"` // not there where there can be none
	Required       int64  `json:"required"`
	FullyAllocated int64  `json:"fully-allocated"`
}

// measureCommand is "measure": how large a new image of a disk is.
func measureCommand() *cobra.Command {
	var (
		source   sourceFlags
		format   string
		options  []string
		sizeText string
	)
	cmd := &cobra.Command{
		Use: "measure [--output=human|json] [-O OUTPUT_FMT] [-o OPTIONS] [--size N | [-f FMT] [-l SNAPSHOT] [-U] FILE]",
		Short: "Tell how large a new image will be: now, and once all of its disk is written, and how much its bitmaps take " +
			"besides",
		Args: cobra.MaximumNArgs(1),
	}
	source.add(cmd)
	output := outputFlag(cmd)
	cmd.Flags().StringVarP(&format, "output-format", "O", disk.Raw, "format of the new file: qcow2 or raw")
	cmd.Flags().StringArrayVarP(&options, "options", "o", nil, "options of the new image: a=b,c=d (or help)")
	cmd.Flags().StringVar(&sizeText, "size", "", "size of a disk that holds nothing, in place of a file")
	cmd.Flags().StringVarP(&source.snapshot, "snapshot", "l", "", "measure an internal snapshot: ID_OR_NAME, or snapshot.id=ID,snapshot.name=NAME")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		c, err := readCreateOptions(format, options)
		if err != nil {
			return err
		}
		if c.help {
			return printCreateHelp(cmd.OutOrStdout(), format)
		}
		bySize := cmd.Flags().Changed("size")
		switch {
		case bySize && len(args) > 0:
			return errors.New("--size N cannot be used together with a filename")
		case !bySize && len(args) == 0:
			return errors.New("either --size N or one filename must be specified")
		case bySize && (source.format != "" || source.snapshot != ""):
			return errors.New("-f and -l require a filename argument")
		}
		o := &qcow2.MeasureOptions{Raw: format == disk.Raw, Create: &c.image}
		var m *qcow2.Measurement
		if bySize {
			size, err := parseSize(sizeText)
			if err != nil {
				return err
			}
			if m, err = qcow2.MeasureSize(size, o); err != nil {
				return err
			}
		} else if m, err = measureFile(cmd.Context(), args[0], &source, cmd.ErrOrStderr(), o); err != nil {
			return err
		}
		if *output == outputJSON {
			info := &measureInfo{Required: m.Required, FullyAllocated: m.FullyAllocated}
			if m.HasBitmaps {
				info.Bitmaps = &m.Bitmaps
			}
			return printJSON(cmd.OutOrStdout(), info)
		}
		return printMeasure(cmd.OutOrStdout(), m)
	}
	return cmd
}

// measureFile measures the named file.
func measureFile(ctx context.Context, name string, source *sourceFlags, stderr io.Writer, o *qcow2.MeasureOptions) (m *qcow2.Measurement, err error) {
	d, err := source.open(name, stderr)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return qcow2.Measure(ctx, d.Disk, o)
}

// printMeasure prints the figures for people.
func printMeasure(w io.Writer, m *qcow2.Measurement) error {
	p := &linePrinter{w: w}
	p.line("required size", m.Required)
	p.line("fully allocated size", m.FullyAllocated)
	if m.HasBitmaps {
		p.line("bitmaps size", m.Bitmaps)
	}
	return p.err
}
