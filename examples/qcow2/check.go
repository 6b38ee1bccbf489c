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

// The exit codes of check besides 0, for an image in which nothing is wrong or left, and 1, for one that could
// not be checked, or not all of it.
const (
	exitCorrupt = 2  // data is lost or may be, whether or not space is
	exitLeaks   = 3  // space is lost, and nothing else
	exitNoCheck = 63 // the format has nothing that could be checked
)

// checkInfo is what check tells, under qemu-img's names; corruptions that qemu-img does not look for are among them. Of the numbers only CheckErrors is there when it is 0.
type checkInfo struct {
	ImageEndOffset     int64  `json:"image-end-offset,omitempty"`
	CompressedClusters int64  `json:"compressed-clusters,omitempty"`
	TotalClusters      int64  `json:"total-clusters,omitempty"`
	Corruptions        int64  `json:"corruptions,omitempty"`
	CorruptionsFixed   int64  `json:"corruptions-fixed,omitempty"`
	CheckErrors        int64  `json:"check-errors"`
	Leaks              int64  `json:"leaks,omitempty"`
	LeaksFixed         int64  `json:"leaks-fixed,omitempty"`
	AllocatedClusters  int64  `json:"allocated-clusters,omitempty"`
	Filename           string `json:"filename"`
	Format             string `json:"format"`
	FragmentedClusters int64  `json:"fragmented-clusters,omitempty"`
}

// checkCommand is "check": whether an image is consistent, and its repair. It never opens a file that the image
// names. What it finds goes to stderr, one finding a line, even with -q; the totals go to stdout.
func checkCommand() *cobra.Command {
	var (
		source          = sourceFlags{reads: true}
		repair          string
		showsBar, quiet bool
	)
	cmd := &cobra.Command{
		Use:   "check [-f FMT] [-r leaks|all] [--output=human|json] [-p] [-q] [-U] FILE",
		Short: "Look for inconsistencies in a disk image, and repair them",
		Args:  cobra.ExactArgs(1),
	}
	source.add(cmd)
	output := outputFlag(cmd)
	cmd.Flags().StringVarP(&repair, "repair", "r", "", "repair leaks, or all that can be repaired (default: nothing)")
	cmd.Flags().BoolVarP(&showsBar, "progress", "p", false, "show progress")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print what is wrong only, without the totals")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		var o qcow2.CheckOptions
		if cmd.Flags().Changed("repair") {
			var err error
			o.Repair, err = oneOf(repair, map[string]qcow2.RepairScope{"leaks": qcow2.RepairLeaks, "all": qcow2.RepairAll})
			if err != nil {
				return fmt.Errorf("-r must be used with leaks or all as argument: %w", err)
			}
			if source.share {
				return errors.New("-r cannot be used with -U: a repair needs the image for itself")
			}
		}
		name, stderr := args[0], cmd.ErrOrStderr()
		opts, err := source.options(name, stderr)
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		if opts.Format != disk.QCOW2 {
			return refuseCheck(name, opts)
		}
		res, err := checkImage(cmd.Context(), name, opts, o, stderr, showsBar && !quiet)
		if err != nil {
			return err
		}
		if !quiet {
			if *output == outputJSON {
				err = printJSON(cmd.OutOrStdout(), describeCheck(name, res))
			} else {
				err = printCheck(cmd.OutOrStdout(), name, res)
			}
			if err != nil {
				return err
			}
		}
		switch {
		case res.CheckErrors > 0:
			return fmt.Errorf("%s: not everything could be checked", name)
		case res.Corruptions+res.Unreadable+res.Shared > 0:
			return &exitError{code: exitCorrupt}
		case res.Leaks > 0:
			return &exitError{code: exitLeaks}
		}
		return nil
	}
	return cmd
}

// refuseCheck returns the error of a check of the named file, which is no qcow2 image: a raw file has nothing to check,
// and other images are not checked; unless not even opening it succeeds.
func refuseCheck(name string, opts disk.Options) error {
	if disk.IsForeign(opts.Format) {
		if _, err := inspectForeign(name, opts); err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		return &exitError{exitNoCheck, fmt.Errorf("%s: the check of a %s image is not supported", name, opts.Format)}
	}
	d, err := disk.Open(name, opts)
	if err != nil {
		return fmt.Errorf("could not open '%s': %w", name, err)
	}
	if err := d.Close(); err != nil {
		return err
	}
	return &exitError{exitNoCheck, fmt.Errorf("%s: a %s file has nothing to check", name, opts.Format)}
}

// checkImage checks the named image as o says, alone, and prints the findings and the bar, if wanted, on stderr.
func checkImage(ctx context.Context, name string, opts disk.Options, o qcow2.CheckOptions, stderr io.Writer,
	showsBar bool) (res *qcow2.CheckResult, err error) {
	open := &qcow2.OpenOptions{CheckOnly: true, ReadWrite: o.Repair != qcow2.RepairNothing}
	if opts.Share {
		open.Lock = qcow2.LockShare
	}
	img, err := qcow2.Open(name, open)
	if err != nil {
		return nil, fmt.Errorf("could not open '%s': %w", name, err)
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	if showsBar {
		bar := progress.Start(stderr, "check")
		defer func() { bar.Done(err) }()
		o.Progress, stderr = bar.Update, bar
	}
	o.Found = func(f qcow2.Finding) { fmt.Fprintln(stderr, findingLine(f)) }
	if res, err = img.Check(ctx, &o); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return res, nil
}

// findingLine describes a finding in one line, how bad it is first. Nothing in it is text from the image.
func findingLine(f qcow2.Finding) string {
	class := "harmless"
	switch f.Kind.Class() {
	case qcow2.ClassLeak:
		class = "leak"
	case qcow2.ClassCorruption:
		class = "corruption"
	case qcow2.ClassError:
		class = "not checked"
	}
	if f.Left {
		class += " left"
	}
	return class + ": " + f.String()
}

// describeCheck collects what check tells about the named image.
func describeCheck(name string, res *qcow2.CheckResult) *checkInfo {
	return &checkInfo{
		Filename:           name,
		Format:             disk.QCOW2,
		CheckErrors:        res.CheckErrors,
		Corruptions:        res.Corruptions + res.Unreadable,
		Leaks:              res.Leaks,
		CorruptionsFixed:   res.CorruptionsFixed,
		LeaksFixed:         res.LeaksFixed,
		ImageEndOffset:     res.ImageEndOffset,
		TotalClusters:      res.TotalClusters,
		AllocatedClusters:  res.AllocatedClusters,
		FragmentedClusters: res.FragmentedClusters,
		CompressedClusters: res.CompressedClusters,
	}
}

// printCheck prints the outcome of a check for people: what it means, what is wrong, and what the image holds.
func printCheck(w io.Writer, name string, res *qcow2.CheckResult) error {
	p := &linePrinter{w: w}
	p.line("image", printable(name))
	p.line("verdict", verdict(res))
	if res.CorruptionsFixed > 0 || res.LeaksFixed > 0 || res.Rebuilt {
		p.line("corruptions repaired", res.CorruptionsFixed)
		p.line("leaks repaired", res.LeaksFixed)
	}
	if res.Rebuilt {
		p.line("refcounts", "made anew")
	}
	if !res.Clean() {
		p.line("corruptions", res.Corruptions+res.Unreadable+res.Shared)
		if res.LostCopied > 0 {
			p.line("of these without harm", res.LostCopied)
		}
		p.line("leaks", res.Leaks)
		p.line("not checked", res.CheckErrors)
	}
	if res.PastEnd > 0 {
		p.line("refcounts past the end", res.PastEnd)
	}
	if n := res.TotalClusters; n > 0 {
		p.line("clusters of the disk", n)
		p.line("allocated", share(res.AllocatedClusters, n))
		p.line("compressed", share(res.CompressedClusters, res.AllocatedClusters))
		p.line("fragmented", share(res.FragmentedClusters, res.AllocatedClusters))
	}
	p.line("end of the image", res.ImageEndOffset)
	return p.err
}

// verdict says what the outcome of a check means.
func verdict(res *qcow2.CheckResult) string {
	switch {
	case res.CheckErrors > 0:
		return "unknown, because not everything could be checked"
	case res.Corruptions+res.Unreadable+res.Shared > res.LostCopied:
		return "corrupt: do not write to the image before it is repaired"
	case res.Corruptions > 0:
		return "sound, but for flags that cost copies"
	case res.Leaks > 0:
		return "sound, but space is lost"
	}
	return "sound"
}

// share returns n and its part of all in percent.
func share(n, all int64) string {
	return fmt.Sprintf("%d (%.1f%%)", n, 100*float64(n)/float64(max(all, 1)))
}

// linePrinter prints lines of a name and a value, until one fails.
type linePrinter struct {
	w   io.Writer
	err error
}

// line prints one line.
func (p *linePrinter) line(name string, value any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, "%s: %v\n", name, value)
	}
}
