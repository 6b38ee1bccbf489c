package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
)

// mapCommand is "map": where the disk's content lies.
func mapCommand() *cobra.Command {
	source := sourceFlags{reads: true}
	var start, length string
	cmd := &cobra.Command{
		Use:   "map [-f FMT] [-s START_OFFSET] [-l MAX_LENGTH] [--output=human|json] [-U] FILE",
		Short: "Tell where the content of a disk lies",
		Args:  cobra.ExactArgs(1),
	}
	source.add(cmd)
	cmd.Flags().StringVarP(&start, "start-offset", "s", "", "guest offset to begin at (default: 0)")
	cmd.Flags().StringVarP(&length, "max-length", "l", "", "bytes to look at at most (default: all)")
	source.addBackingFormat(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if err := checkOutput(*output); err != nil {
			return err
		}
		from, n := int64(0), int64(disk.MaxSize)
		for _, f := range []struct {
			flag, text, what string
			n                *int64
		}{{"start-offset", start, "start offset", &from}, {"max-length", length, "max length", &n}} {
			if !cmd.Flags().Changed(f.flag) {
				continue
			}
			if *f.n, err = parseSize(f.text); err != nil {
				return fmt.Errorf("invalid %s specified: %w", f.what, err)
			}
		}
		d, err := source.open(args[0], cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.Close()) }()
		w := bufio.NewWriter(cmd.OutOrStdout())
		defer func() { err = errors.Join(err, w.Flush()) }()
		if *output == outputJSON {
			return printMapJSON(w, d, from, n)
		}
		return printMapHuman(w, d, from, n)
	}
	return cmd
}

// mapRun is a run of the disk as map tells it.
type mapRun struct {
	start, length int64
	depth         int
	present       bool // somebody holds it
	zero          bool // it reads as zeros
	data          bool // it has a place for content, whether or not that was written
	offset        int64
	hasOffset     bool // of a compressed run the bytes at the offset are not the guest's
}

// newMapRun returns the run that e is.
func newMapRun(e qcow2.Extent) mapRun {
	data := e.Kind == qcow2.ExtentData || e.Kind == qcow2.ExtentCompressed
	return mapRun{
		start:     e.Off,
		length:    e.Len,
		depth:     e.Depth,
		present:   e.Kind != qcow2.ExtentUnallocated,
		zero:      !data,
		data:      data || e.Hole,
		offset:    e.HostOff,
		hasOffset: e.HostOff >= 0 && e.Kind != qcow2.ExtentCompressed,
	}
}

// follows reports whether r goes on as last does.
func (r *mapRun) follows(last *mapRun) bool {
	if r.depth != last.depth || r.present != last.present || r.zero != last.zero || r.data != last.data || r.hasOffset != last.hasOffset {
		return false
	}
	return !r.hasOffset || r.offset == last.offset+last.length
}

// runs calls f for each run of the n bytes of the disk from off on, joined where one goes on as the other.
func runs(d *disk.Disk, off, n int64, f func(r *mapRun) error) error {
	var last mapRun
	for e, err := range d.Extents(off, n) {
		if err != nil {
			return err
		}
		r := newMapRun(e)
		if last.length > 0 && r.follows(&last) {
			last.length += r.length
			continue
		}
		if last.length > 0 {
			if err := f(&last); err != nil {
				return err
			}
		}
		last = r
	}
	if last.length == 0 {
		last.start = off // nothing is in the range, and qemu-img says so in a run of its own
	}
	return f(&last)
}

// errNoPlace says that a disk has content that lies nowhere as it is.
var errNoPlace = errors.New("file contains external, encrypted or compressed clusters")

// printMapHuman prints the runs that are stored as they are.
func printMapHuman(w io.Writer, d *disk.Disk, off, n int64) error {
	fmt.Fprintf(w, "%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File")
	return runs(d, off, n, func(r *mapRun) error {
		switch {
		case r.data && !r.hasOffset:
			return errNoPlace
		case !r.data || r.zero:
			return nil
		}
		name := ""
		if r.depth < len(d.Files) {
			name = d.Files[r.depth]
		}
		_, err := fmt.Fprintf(w, "%-16s%-16s%-16s%s\n", hex(r.start), hex(r.length), hex(r.offset), printable(name))
		return err
	})
}

// hex returns n in hexadecimal as C prints it: 0 has no prefix.
func hex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}

// printMapJSON prints every run, one per line.
func printMapJSON(w io.Writer, d *disk.Disk, off, n int64) error {
	line := []byte("[")
	err := runs(d, off, n, func(r *mapRun) error {
		line = strconv.AppendInt(append(line, `{ "start": `...), r.start, 10)
		line = strconv.AppendInt(append(line, `, "length": `...), r.length, 10)
		line = strconv.AppendInt(append(line, `, "depth": `...), int64(r.depth), 10)
		line = strconv.AppendBool(append(line, `, "present": `...), r.present)
		line = strconv.AppendBool(append(line, `, "zero": `...), r.zero)
		line = strconv.AppendBool(append(line, `, "data": `...), r.data)
		if r.hasOffset {
			line = strconv.AppendInt(append(line, `, "offset": `...), r.offset, 10)
		}
		_, err := w.Write(append(line, '}'))
		line = append(line[:0], ",\n"...)
		return err
	})
	fmt.Fprintln(w, "]")
	return err
}
