package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
)

// snapshotCommand is "snapshot": the internal snapshots of an image. It opens no file that the image names.
func snapshotCommand() *cobra.Command {
	var source sourceFlags
	var list, quiet bool
	var create, apply, remove string
	cmd := &cobra.Command{
		Use:   "snapshot [-U] [-q] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] FILE",
		Short: "List, apply, create or delete internal snapshots",
		Args:  cobra.ExactArgs(1),
	}
	source.add(cmd)
	cmd.Flags().BoolVarP(&list, "list", "l", false, "list the snapshots (the default)")
	cmd.Flags().StringVarP(&apply, "apply", "a", "", "make the disk what it was in the snapshot with this id or, if there is none, this name")
	cmd.Flags().StringVarP(&create, "create", "c", "", "keep the disk as a snapshot of this name")
	cmd.Flags().StringVarP(&remove, "delete", "d", "", "delete the first snapshot of this name")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print errors only; this command prints nothing else but the list")
	cmd.MarkFlagsMutuallyExclusive("list", "apply", "create", "delete")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name := args[0]
		opts, err := source.options(name, cmd.ErrOrStderr())
		if err == nil && opts.Format != disk.QCOW2 {
			err = fmt.Errorf("a %s file has no snapshots", opts.Format)
		}
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
		changed := cmd.Flags().Changed
		writes := changed("apply") || changed("create") || changed("delete")
		if writes && opts.Share {
			return errors.New("-U is for -l: a change needs the image for itself")
		}
		if !writes {
			_, snapshots, err := inspect(name, opts.Share)
			if err != nil {
				return fmt.Errorf("could not open '%s': %w", name, err)
			}
			printSnapshots(cmd.OutOrStdout(), describeSnapshots(snapshots))
			return nil
		}
		return changeSnapshots(name, func(img *qcow2.Image) error {
			ctx := cmd.Context()
			switch {
			case changed("create"):
				_, err := img.CreateSnapshot(ctx, &qcow2.SnapshotOptions{Name: create})
				return describeFailure(ctx, "create", create, err)
			case changed("apply"):
				return describeFailure(ctx, "apply", apply, img.ApplySnapshot(ctx, qcow2.SnapshotRef{IDOrName: apply}))
			}
			return describeFailure(ctx, "delete", remove, img.DeleteSnapshot(ctx, qcow2.SnapshotRef{Name: remove}))
		})
	}
	return cmd
}

// describeFailure adds which operation on which snapshot err is about.
func describeFailure(ctx context.Context, what, snapshot string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, qcow2.ErrSnapshotNotFound):
		err = errors.New("snapshot not found")
	case ctx.Err() != nil:
		err = ctx.Err()
	}
	return fmt.Errorf("could not %s snapshot '%s': %w", what, printable(snapshot), err)
}

// changeSnapshots calls f with the named image, open for writing and without what is below it.
func changeSnapshots(name string, f func(img *qcow2.Image) error) (err error) {
	img, err := qcow2.Open(name, &qcow2.OpenOptions{ReadWrite: true, NoBacking: true})
	if err != nil {
		return fmt.Errorf("could not open '%s': %w", name, err)
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	return f(img)
}

// describeSnapshots returns what is told of snapshots, under qemu-img's names.
func describeSnapshots(list []qcow2.Snapshot) []snapshotInfo {
	var all []snapshotInfo
	for _, s := range list {
		si := snapshotInfo{
			ID:          s.ID,
			Name:        s.Name,
			VMStateSize: s.VMStateSize,
			DateSec:     s.Date.Unix(),
			DateNsec:    int64(s.Date.Nanosecond()),
			VMClockSec:  int64(s.VMClock / time.Second),
			VMClockNsec: int64(s.VMClock % time.Second),
		}
		if s.ICount >= 0 {
			si.ICount = &s.ICount
		}
		all = append(all, si)
	}
	return all
}

// printSnapshots prints the list of snapshots for people, if there are any.
func printSnapshots(w io.Writer, list []snapshotInfo) {
	if len(list) == 0 {
		return
	}
	fmt.Fprintf(w, "Snapshot list:\n%-9s %-16s %8s %19s %12s %10s\n", "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
	for _, s := range list {
		icount := ""
		if s.ICount != nil {
			icount = fmt.Sprint(*s.ICount)
		}
		fmt.Fprintf(w, "%-9s %-16s %8s %19s %02d:%02d:%02d.%03d %10s\n", printable(s.ID), printable(s.Name),
			humanSize(s.VMStateSize), time.Unix(s.DateSec, 0).Format("2006-01-02 15:04:05"),
			s.VMClockSec/3600, s.VMClockSec/60%60, s.VMClockSec%60, s.VMClockNsec/1e6, icount)
	}
}

// parseSnapshot reads which snapshot is meant: snapshot.id=ID,snapshot.name=NAME, or one of the two, or an id or name.
func parseSnapshot(s string) (qcow2.SnapshotRef, error) {
	var ref qcow2.SnapshotRef
	if !strings.HasPrefix(s, "snapshot.") {
		ref.IDOrName = s
		return ref, nil
	}
	for _, part := range strings.Split(s, ",") {
		key, value, ok := strings.Cut(part, "=")
		switch {
		case ok && key == "snapshot.id":
			ref.ID = value
		case ok && key == "snapshot.name":
			ref.Name = value
		default:
			return ref, fmt.Errorf("failed in parsing snapshot param '%s'", s)
		}
	}
	return ref, nil
}
