package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
)

// mapCommand is "map": where the disk's content lies.
func mapCommand() *cobra.Command {
	source := sourceFlags{reads: true}
	cmd := &cobra.Command{
		Use:   "map [-f FMT] [--output=human|json] [-U] FILE",
		Short: "Tell where the content of a disk lies",
		Args:  cobra.ExactArgs(1),
	}
	source.add(cmd)
	source.addBackingFormat(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if err := checkOutput(*output); err != nil {
			return err
		}
		d, err := source.open(args[0], cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.Close()) }()
		w := bufio.NewWriter(cmd.OutOrStdout())
		defer func() { err = errors.Join(err, w.Flush()) }()
		print := printMapHuman
		if *output == outputJSON {
			print = printMapJSON
		}
		return print(w, d)
	}
	return cmd
}

// runs calls f for each run of the disk in order, joined where one goes on as the other.
func runs(d *disk.Disk, f func(e qcow2.Extent) error) error {
	var last qcow2.Extent
	for e, err := range d.Extents(0, d.Size()) {
		if err != nil {
			return err
		}
		goesOn := last.HostOff < 0 && e.HostOff < 0 || last.HostOff >= 0 && e.HostOff == last.HostOff+last.Len
		if last.Len > 0 && goesOn && e.Kind == last.Kind && e.Depth == last.Depth {
			last.Len += e.Len
			continue
		}
		if last.Len > 0 {
			if err := f(last); err != nil {
				return err
			}
		}
		last = e
	}
	if last.Len == 0 {
		return nil
	}
	return f(last)
}

// printMapHuman prints the runs that are stored as they are.
func printMapHuman(w io.Writer, d *disk.Disk) error {
	fmt.Fprintf(w, "%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File")
	return runs(d, func(e qcow2.Extent) error {
		switch e.Kind {
		case qcow2.ExtentCompressed:
			return errors.New("file contains external, encrypted or compressed clusters")
		case qcow2.ExtentData:
			name := ""
			if e.Depth < len(d.Files) {
				name = d.Files[e.Depth]
			}
			_, err := fmt.Fprintf(w, "%-16s%-16s%-16s%s\n", hex(e.Off), hex(e.Len), hex(e.HostOff), printable(name))
			return err
		}
		return nil
	})
}

// hex returns n in hexadecimal as C prints it: 0 has no prefix.
func hex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}

// printMapJSON prints every run, one per line. A compressed run has no offset, because its bytes are
// not the guest's.
func printMapJSON(w io.Writer, d *disk.Disk) error {
	separator := "["
	err := runs(d, func(e qcow2.Extent) error {
		stored := e.Kind == qcow2.ExtentData || e.Kind == qcow2.ExtentCompressed
		_, err := fmt.Fprintf(w, `%s{ "start": %d, "length": %d, "depth": %d, "present": %v, "zero": %v, "data": %v`,
			separator, e.Off, e.Len, e.Depth, e.Kind != qcow2.ExtentUnallocated, !stored, stored)
		if e.HostOff >= 0 && e.Kind != qcow2.ExtentCompressed {
			fmt.Fprintf(w, `, "offset": %d`, e.HostOff)
		}
		fmt.Fprint(w, "}")
		separator = ",\n"
		return err
	})
	if separator == "[" {
		fmt.Fprint(w, separator)
	}
	fmt.Fprintln(w, "]")
	return err
}
