package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2/examples/internal/disk"
)

// createCommand is "create": a new image, over a backing file or empty.
func createCommand() *cobra.Command {
	var (
		format, backing, backingFormat string
		options                        []string
		quiet, unsafe                  bool
	)
	cmd := &cobra.Command{
		Use:   "create [-f FMT] [-b BACKING_FILE -F BACKING_FMT] [-u] [-o OPTIONS] FILE [SIZE]",
		Short: "Create a disk image, replacing an existing file",
		Args:  cobra.RangeArgs(0, 2), // none with -o help
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := readCreateOptions(format, options)
			if err != nil {
				return err
			}
			if c.help {
				return printCreateHelp(cmd.OutOrStdout(), format)
			}
			if len(args) == 0 {
				return errors.New("expecting image file name")
			}
			name := args[0]
			if backing != "" {
				c.image.BackingFile = backing
			}
			if backingFormat != "" {
				c.image.BackingFormat = backingFormat
			}
			if format == disk.Raw && c.image.BackingFile+c.image.BackingFormat != "" {
				return fmt.Errorf("%s: backing file not supported for file format 'raw'", name)
			}
			if len(args) == 2 {
				if c.size, err = parseDiskSize(args[1]); err != nil {
					return err
				}
			}
			if b := c.image.BackingFile; b != "" {
				if c.image.BackingFormat == "" {
					return fmt.Errorf("%s: backing file specified without backing format", name)
				}
				if err := differs(name, disk.BesideImage(name, b)); err != nil {
					return err
				}
				// A wrong name shows now rather than at the first use.
				if !unsafe {
					size, err := backingSize(name, b, c.image.BackingFormat)
					if err != nil {
						return fmt.Errorf("%s: %w", name, err)
					}
					if c.size < 0 {
						c.size = size
					}
				}
			}
			if c.size < 0 {
				return fmt.Errorf("%s: image creation needs a size parameter", name)
			}
			if !quiet {
				fmt.Fprintf(cmd.OutOrStdout(), "Formatting '%s', fmt=%s size=%d\n", name, format, c.size)
			}
			if format == disk.Raw {
				s, err := disk.CreateRaw(name, c.size)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				return errors.Join(s.Sync(), s.Close())
			}
			img, err := disk.Create(name, c.size, c.image)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return img.Close()
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", disk.Raw, "format of the new file: qcow2 or raw")
	cmd.Flags().StringVarP(&backing, "backing", "b", "", "backing file, relative to the new image")
	cmd.Flags().StringVarP(&backingFormat, "backing-format", "F", "", "format of the backing file")
	cmd.Flags().BoolVarP(&unsafe, "unsafe", "u", false, "do not look at the backing file")
	cmd.Flags().StringArrayVarP(&options, "options", "o", nil, "options of the format: a=b,c=d (or help)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print errors only")
	return cmd
}

// differs refuses a new image that would replace one of the files that lie below it, by whatever names.
func differs(image string, below ...string) error {
	fi, err := os.Stat(image)
	if err != nil {
		return nil // there is none yet, or creating it says why not
	}
	for _, name := range below {
		if other, err := os.Stat(name); err == nil && os.SameFile(fi, other) {
			return fmt.Errorf("%s: the image cannot be its own backing file", image)
		}
	}
	return nil
}

// backingSize returns the size of the disk in a backing file that the named image is to have. It refuses an
// image that lies below itself.
func backingSize(image, backing, format string) (int64, error) {
	if err := checkFormat(format); err != nil {
		return 0, err
	}
	name := disk.BesideImage(image, backing)
	d, err := disk.Open(name, disk.Options{Format: format, Follow: true})
	if err != nil {
		return 0, fmt.Errorf("could not open backing file '%s': %w", name, err)
	}
	return disk.RoundUp(d.Size()), errors.Join(differs(image, d.Files...), d.Close())
}
