package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
	"github.com/go-qcow2/qcow2/examples/internal/progress"
)

// inPlaceLong is what the help of convert says about conversions in place.
const inPlaceLong = `With --in-place the file itself becomes a qcow2 image, and its data stays where it is:

  convert --in-place [-f FMT] [-o OPTIONS] [-B BACKING_FILE -F BACKING_FMT] [-p] FILE
  convert --in-place --resume   --original-size N [-f FMT] [-o OPTIONS] [-B BACKING_FILE -F BACKING_FMT] [-p] FILE
  convert --in-place --rollback --original-size N FILE

Its length is printed before anything is written. Note it: a conversion that was interrupted is ended by --resume, with
the options that it had, or taken back by --rollback, and both must be told that length.`

// inPlaceOptionNames lists what -o takes with --in-place, for -o help.
const inPlaceOptionNames = `Supported options of a conversion in place:
  backing_file=<str>     - File name of a base image (default: that of a QED image)
  backing_fmt=<str>      - Image format of the base image
  cluster_size=<size>    - Cluster size, 512 to 2M (default: the largest from 64k to 1k that suits the data)
  compat=<str>           - Version: v2 (0.10) or v3 (1.1, default)
  compression_type=<str> - zlib (default) or zstd
  lazy_refcounts=<bool>  - Postpone refcount updates
  refcount_bits=<num>    - Width of a reference count in bits: 1 to 64 (default: 16)
`

// inPlaceFlags are the flags of convert for conversions in place.
type inPlaceFlags struct {
	on, resume, rollback bool
	length               string
}

// add defines the flags on cmd.
func (f *inPlaceFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.on, "in-place", false, "make the file itself a qcow2 image")
	cmd.Flags().BoolVar(&f.resume, "resume", false, "end a conversion in place that was interrupted")
	cmd.Flags().BoolVar(&f.rollback, "rollback", false, "take a conversion in place back that was interrupted")
	cmd.Flags().StringVar(&f.length, "original-size", "", "length of the file in bytes before the conversion in place that was interrupted")
}

// asked reports whether the flags ask for anything.
func (f *inPlaceFlags) asked() bool { return f.on || f.resume || f.rollback || f.length != "" }

// check refuses flags that contradict each other, and returns the original length, or -1.
func (f *inPlaceFlags) check(cmd *cobra.Command) (int64, error) {
	again := f.resume || f.rollback
	switch {
	case !f.on:
		return 0, errors.New("--resume, --rollback and --original-size are of conversions --in-place")
	case f.resume && f.rollback:
		return 0, errors.New("--resume and --rollback cannot be used at the same time")
	case again && f.length == "":
		return 0, errors.New("--resume and --rollback need --original-size: the length of the file that was printed before it was converted")
	case !again && f.length != "":
		return 0, errors.New("--original-size is of --resume and --rollback")
	}
	refused := []string{"compress", "sparse-size", "no-create", "target-is-zero", "rate-limit", "parallel", "out-of-order", "salvage", "snapshot", "force-share"}
	if f.rollback {
		refused = append(refused, "format", "options", "backing", "target-backing-format", "backing-format")
	}
	for _, name := range refused {
		if cmd.Flags().Changed(name) {
			return 0, fmt.Errorf("--%s has no place in a conversion in place", name)
		}
	}
	if o := cmd.Flags().Lookup("output-format"); o.Changed && o.Value.String() != disk.QCOW2 {
		return 0, errors.New("a conversion in place makes a qcow2 image")
	}
	if !again {
		return -1, nil
	}
	n, err := parseSize(f.length)
	if err != nil {
		return 0, fmt.Errorf("--original-size: %w", err)
	}
	return n, nil
}

// inPlace returns what the flags of convert say about the image, and whether they ask for help instead.
func (f *convertFlags) inPlace() (o qcow2.InPlaceOptions, help bool, err error) {
	c, err := readCreateOptions(disk.QCOW2, f.options)
	if err != nil || c.help {
		return o, c.help, err
	}
	image := &c.image
	if f.backing != "" {
		image.BackingFile = f.backing
	}
	if f.backingFormat != "" {
		image.BackingFormat = f.backingFormat
	}
	switch {
	case image.DataFile != "" || image.DataFileRaw:
		return o, false, errors.New("a data file has no place in a conversion in place")
	case image.ExtendedL2:
		return o, false, errors.New("extended_l2 is not supported by a conversion in place")
	case image.Preallocation != qcow2.PreallocationOff:
		return o, false, errors.New("preallocation is not supported by a conversion in place")
	case c.size >= 0:
		return o, false, errors.New("a conversion in place keeps the size of the disk")
	case image.BackingFile != "" && image.BackingFormat == "":
		return o, false, errors.New("use of backing file requires explicit backing format")
	case image.BackingFile == "" && image.BackingFormat != "":
		return o, false, errors.New("backing format cannot be used without backing file")
	}
	return qcow2.InPlaceOptions{
		ClusterSize:   image.ClusterSize,
		RefcountBits:  image.RefcountBits,
		Version:       image.Version,
		Compression:   image.Compression,
		LazyRefcounts: image.LazyRefcounts,
		BackingFile:   image.BackingFile,
		BackingFormat: image.BackingFormat,
	}, false, nil
}

// run converts a file in place, or ends or takes back what was interrupted.
func (f *inPlaceFlags) run(cmd *cobra.Command, args []string, source *sourceFlags, flags *convertFlags) (err error) {
	length, err := f.check(cmd)
	if err != nil {
		return err
	}
	to, help, err := flags.inPlace()
	if err != nil {
		return err
	}
	if help {
		fmt.Fprint(cmd.OutOrStdout(), inPlaceOptionNames)
		return nil
	}
	if len(args) != 1 {
		return errors.New("must specify one file name: the file itself is converted")
	}
	name, stderr := args[0], cmd.ErrOrStderr()
	p, err := disk.OpenInPlace(name, length)
	if err != nil {
		return fmt.Errorf("could not open '%s': %w", name, err)
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	done := func(error) {}
	if flags.bar && !flags.quiet && !f.rollback {
		bar := progress.Start(stderr, "convert")
		to.Progress, done, stderr = bar.Update, bar.Done, bar
	}
	switch {
	case f.rollback:
		err = f.takeBack(cmd, p, name)
	case f.resume:
		err = f.goOn(cmd, p, name, source, to, stderr)
	default:
		err = f.convert(cmd, p, name, source, to, stderr)
	}
	done(err)
	if err == nil && !flags.quiet {
		if f.rollback {
			fmt.Fprintf(cmd.OutOrStdout(), "Rolled back to the file of %d bytes that it was.\n", p.Length)
		} else {
			fmt.Fprintln(cmd.OutOrStdout(), "Image converted.")
		}
	}
	return err
}

// convert converts the file.
func (f *inPlaceFlags) convert(cmd *cobra.Command, p *disk.InPlace, name string, source *sourceFlags, to qcow2.InPlaceOptions, stderr io.Writer) error {
	opts, err := source.inPlace(p, name, stderr)
	if err != nil {
		return fmt.Errorf("could not open '%s': %w", name, err)
	}
	fmt.Fprintf(stderr, "qcow2: %s is %d bytes long; if this is interrupted, --resume and --rollback need --original-size %d\n",
		printable(name), p.Length, p.Length)
	err = p.Convert(cmd.Context(), opts, to)
	var found *qcow2.InPlaceError
	var option *qcow2.OptionError
	switch {
	case errors.As(err, &found):
		return fmt.Errorf("%s has not been changed: it ends in what an interrupted conversion leaves, unless its guest wrote that: %w. "+
			"If it was interrupted, say --resume or --rollback, and --original-size, as it was printed then", name, err)
	case errors.As(err, &option) && option.Option == "AllowQcow2":
		return fmt.Errorf("%s has not been changed: %w. If it is a raw disk all the same, convert it into a new file", name, err)
	case errors.Is(err, qcow2.ErrNotAligned):
		return fmt.Errorf("%s has not been changed: %w. That is convert -O qcow2 into a new file, or -o cluster_size=512", name, err)
	}
	return f.explain(p, name, err)
}

// goOn ends a conversion that was interrupted.
func (f *inPlaceFlags) goOn(cmd *cobra.Command, p *disk.InPlace, name string, source *sourceFlags, to qcow2.InPlaceOptions, stderr io.Writer) error {
	found, err := p.Inspect(cmd.Context())
	if err != nil {
		return err
	}
	fmt.Fprintf(stderr, "qcow2: found: %s\n", found)
	var opts disk.Options
	if found == qcow2.InPlaceIncomplete || found == qcow2.InPlaceComplete {
		if opts, err = source.inPlace(p, name, stderr); err != nil {
			return fmt.Errorf("could not open '%s': %w", name, err)
		}
	}
	return f.explain(p, name, p.Resume(cmd.Context(), found, opts, to))
}

// takeBack takes a conversion back that was interrupted.
func (f *inPlaceFlags) takeBack(cmd *cobra.Command, p *disk.InPlace, name string) error {
	found, err := p.Inspect(cmd.Context())
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "qcow2: found: %s\n", found)
	return f.explain(p, name, p.Rollback(cmd.Context()))
}

// explain says what an error has left of the file, and what to do about that.
func (f *inPlaceFlags) explain(p *disk.InPlace, name string, err error) error {
	var found *qcow2.InPlaceError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &found) && found.Found == qcow2.InPlaceSwitched:
		return fmt.Errorf("%s has not been changed: %w. It is the image already; say --resume, which cuts off what is left of the conversion", name, err)
	case errors.As(err, &found):
		return fmt.Errorf("%s has not been changed: %w", name, err)
	case errors.Is(err, qcow2.ErrInPlace):
		return fmt.Errorf("%s: %w. Say --in-place --resume or --rollback, and --original-size %d", name, err, p.Length)
	case errors.Is(err, qcow2.ErrBackingFormatUnknown):
		return fmt.Errorf("%w; say --backing-format FMT", err)
	}
	return err
}

// inPlace returns how the source of a conversion in place is opened. It says on stderr what was taken for its format.
func (f *sourceFlags) inPlace(p *disk.InPlace, name string, stderr io.Writer) (disk.Options, error) {
	opts := disk.Options{Format: f.format, Follow: true, BackingFormat: f.backingFormat}
	if f.format == "" {
		format, err := p.Detect()
		if err != nil {
			return opts, err
		}
		opts.Format, opts.Follow = format, f.trust
		fmt.Fprintf(stderr, "qcow2: no format given: takes %s as %s\n", printable(name), format)
	}
	if opts.Format == disk.QCOW2 {
		return opts, errors.New("it is a qcow2 image already")
	}
	if f.backingFormat != "" && !disk.IsForeign(f.backingFormat) {
		if err := checkFormat(f.backingFormat); err != nil {
			return opts, err
		}
	}
	return opts, f.check(opts.Format)
}
