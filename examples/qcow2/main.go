// Command qcow2 creates, describes, checks, repairs, converts, maps and resizes disk images, with the options and exit
// codes of qemu-img: 0 if it did what was asked, else 1. Its commands are
//
//	create   a new image
//	info     what an image is
//	check    whether an image is consistent, and its repair; exit codes besides: 2 if it is corrupt, 3 if
//	         space is lost and nothing else, 63 if the format has nothing to check
//	convert  a disk into another format, or, with --in-place, a file into a qcow2 image where it is
//	dd       blocks of a disk into a file
//	map      where the content of a disk lies
//	measure  how large a new image of a disk will be
//	compare  whether two disks read the same; exit codes: 1 if they do not, 2, 3 and 4 if that cannot be told
//	rebase   another backing file for an image
//	amend    other features for an image
//	commit   what an image holds, into its backing file
//	resize   another size for a disk
//	snapshot lists, applies, creates and deletes internal snapshots
//
// Without -f it takes the format from the magic of a file, says so, and opens an image that was
// found in this way without its backing and data files. -f or --trust opens them. convert, info and map read images
// of the formats qed, vpc (VHD) and vdi besides.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// exitError ends the program with an exit code of its own; every other error ends it with 1.
type exitError struct {
	code int
	err  error // nil if the command has told everything
}

// Error says why, or with which code.
func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

// Unwrap returns the reason.
func (e *exitError) Unwrap() error { return e.err }

// run executes a command line without the program's name, and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use:           "qcow2",
		Short:         "Create, describe, check, convert, map and resize disk images, and keep snapshots of them",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(createCommand(), infoCommand(), checkCommand(), convertCommand(), ddCommand(), mapCommand(),
		measureCommand(), compareCommand(), amendCommand(),
		commitCommand(), rebaseCommand(), resizeCommand(), snapshotCommand())
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var exit *exitError
	if !errors.As(err, &exit) {
		exit = &exitError{code: 1, err: err}
	}
	if exit.err != nil {
		fmt.Fprintln(stderr, "qcow2:", err)
	}
	return exit.code
}

// sourceFlags are the flags of a command that reads a disk.
type sourceFlags struct {
	format string // "" means that the file tells
	trust  bool
	share  bool

	snapshot string // -l, of commands that have it

	backingFormat string // --backing-format, of commands that have it
	reads         bool   // the command takes formats that are read only
}

// add defines the flags on cmd.
func (f *sourceFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.format, "format", "f", "", "format of the file: qcow2 or raw (default: as its first bytes tell)")
	if f.reads {
		cmd.Flags().Lookup("format").Usage = "format of the file: qcow2, raw, qed, vpc or vdi (default: as its magic tells)"
	}
	cmd.Flags().BoolVar(&f.trust, "trust", false, "open the files that an image names, although its format was not given")
	cmd.Flags().BoolVarP(&f.share, "force-share", "U", false, "read a file that somebody else writes")
}

// addBackingFormat defines --backing-format on cmd: for QED images, which do not tell it, and images of others.
func (f *sourceFlags) addBackingFormat(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.backingFormat, "backing-format", "", "format of the file's backing file (default: as the image tells)")
}

// options returns how the named file is opened. It says on stderr what was taken for its format.
func (f *sourceFlags) options(name string, stderr io.Writer) (disk.Options, error) {
	opts := disk.Options{Format: f.format, Follow: true, Share: f.share, BackingFormat: f.backingFormat}
	if f.backingFormat != "" && !disk.IsForeign(f.backingFormat) {
		if err := checkFormat(f.backingFormat); err != nil {
			return opts, err
		}
	}
	if f.format != "" {
		return opts, f.check(f.format)
	}
	format, err := disk.Detect(name)
	if err != nil {
		return opts, err
	}
	opts.Format, opts.Follow = format, f.trust
	fmt.Fprintf(stderr, "qcow2: no format given: takes %s as %s\n", name, format)
	return opts, f.check(format)
}

// check refuses a format that the command does not take.
func (f *sourceFlags) check(format string) error {
	switch {
	case !disk.IsForeign(format):
		return checkFormat(format)
	case !f.reads:
		return fmt.Errorf("a %s image is for reading only: convert it into qcow2", format)
	}
	return nil
}

// open opens the named disk.
func (f *sourceFlags) open(name string, stderr io.Writer) (*disk.Disk, error) {
	opts, err := f.options(name, stderr)
	if err != nil {
		return nil, fmt.Errorf("could not open '%s': %w", name, err)
	}
	if f.snapshot != "" {
		ref, err := parseSnapshot(f.snapshot)
		if err != nil {
			return nil, err
		}
		opts.Snapshot = &ref
	}
	d, err := disk.Open(name, opts)
	var missing *qcow2.FileRequiredError
	if errors.As(err, &missing) && !opts.Follow {
		return nil, fmt.Errorf("could not open '%s': it needs its %s '%s'; say -f %s or --trust if you know where it comes from",
			name, missing.Ref.Kind, printable(missing.Ref.Name), opts.Format)
	}
	if errors.Is(err, qcow2.ErrBackingFormatUnknown) {
		return nil, fmt.Errorf("could not open '%s': %w; say --backing-format FMT", name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("could not open '%s': %w", name, err)
	}
	return d, nil
}

// checkFormat refuses a format that is neither qcow2 nor raw.
func checkFormat(format string) error {
	if format != disk.QCOW2 && format != disk.Raw {
		return fmt.Errorf("unknown driver '%s'", format)
	}
	return nil
}

// The two kinds of output.
const (
	outputHuman = "human"
	outputJSON  = "json"
)

// outputFlag defines --output on cmd.
func outputFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("output", outputHuman, "human or json")
}

// checkOutput refuses any other value of --output.
func checkOutput(output string) error {
	if output != outputHuman && output != outputJSON {
		return fmt.Errorf("--output must be used with human or json as argument, not '%s'", output)
	}
	return nil
}
