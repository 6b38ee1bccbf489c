package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
)

// imageInfo is what info tells, under qemu-img's names.
type imageInfo struct {
	Snapshots     []snapshotInfo  `json:"snapshots,omitempty"`
	BackingFormat string          `json:"backing-filename-format,omitempty"`
	VirtualSize   int64           `json:"virtual-size"`
	Filename      string          `json:"filename"`
	ClusterSize   int             `json:"cluster-size,omitempty"`
	Format        string          `json:"format"`
	ActualSize    int64           `json:"actual-size"`
	Encrypted     bool            `json:"encrypted,omitempty"`
	Specific      *formatSpecific `json:"format-specific,omitempty"`
	FullBacking   string          `json:"full-backing-filename,omitempty"`
	Backing       string          `json:"backing-filename,omitempty"`
	Dirty         bool            `json:"dirty-flag"`
}

// formatSpecific is what only qcow2 has.
type formatSpecific struct {
	Type string    `json:"type"`
	Data qcow2Data `json:"data"`
}

// qcow2Data is the features of a qcow2 image. A nil field does not exist in its version, or image.
type qcow2Data struct {
	Compat          string `json:"compat"`
	CompressionType string `json:"compression-type"`
	LazyRefcounts   *bool  `json:"lazy-refcounts,omitempty"`
	RefcountBits    int    `json:"refcount-bits"`
	DataFile        string `json:"data-file,omitempty"`
	DataFileRaw     *bool  `json:"data-file-raw,omitempty"`
	Corrupt         *bool  `json:"corrupt,omitempty"`
	ExtendedL2      *bool  `json:"extended-l2,omitempty"`
}

// snapshotInfo is an internal snapshot.
type snapshotInfo struct {
	ICount      *int64 `json:"icount,omitempty"`
	VMClockNsec int64  `json:"vm-clock-nsec"`
	Name        string `json:"name"`
	DateSec     int64  `json:"date-sec"`
	DateNsec    int64  `json:"date-nsec"`
	VMClockSec  int64  `json:"vm-clock-sec"`
	ID          string `json:"id"`
	VMStateSize int64  `json:"vm-state-size"`
}

// infoCommand is "info": what an image is. It never opens a file that the image names.
func infoCommand() *cobra.Command {
	source := sourceFlags{reads: true}
	cmd := &cobra.Command{
		Use:   "info [-f FMT] [--output=human|json] [-U] FILE",
		Short: "Describe a disk image",
		Args:  cobra.ExactArgs(1),
	}
	source.add(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		opts, err := source.options(args[0], cmd.ErrOrStderr())
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", args[0], err)
		}
		info, err := describe(args[0], opts)
		if err != nil {
			return fmt.Errorf("could not open '%s': %w", args[0], err)
		}
		if *output == outputJSON {
			return printJSON(cmd.OutOrStdout(), info)
		}
		printInfo(cmd.OutOrStdout(), info)
		return nil
	}
	return cmd
}

// describe collects what info tells about the named file.
func describe(name string, opts disk.Options) (*imageInfo, error) {
	allocated, err := disk.Allocated(name)
	if err != nil {
		return nil, err
	}
	if opts.Format == disk.Raw {
		d, err := disk.Open(name, opts)
		if err != nil {
			return nil, err
		}
		size := disk.RoundUp(d.Size())
		return &imageInfo{Filename: name, Format: disk.Raw, VirtualSize: size, ActualSize: allocated}, d.Close()
	}
	if disk.IsForeign(opts.Format) {
		return describeForeign(name, opts, allocated)
	}
	h, snapshots, err := inspect(name, opts.Share)
	if err != nil {
		return nil, err
	}
	info := &imageInfo{
		Filename:      name,
		Format:        disk.QCOW2,
		VirtualSize:   h.VirtualSize,
		ClusterSize:   h.ClusterSize,
		ActualSize:    allocated,
		Backing:       h.BackingFile,
		BackingFormat: h.BackingFormat,
		Encrypted:     h.Encryption != "",
		Dirty:         h.Dirty,
		Specific: &formatSpecific{Type: disk.QCOW2, Data: qcow2Data{
			Compat:          "0.10",
			CompressionType: h.Compression.String(),
			RefcountBits:    h.RefcountBits,
			DataFile:        h.DataFile,
		}},
	}
	if h.BackingFile != "" {
		info.FullBacking = disk.BesideImage(name, h.BackingFile)
	}
	if h.Version >= 3 {
		data := &info.Specific.Data
		data.Compat = "1.1"
		data.LazyRefcounts, data.Corrupt, data.ExtendedL2 = &h.LazyRefcounts, &h.Corrupt, &h.ExtendedL2
		if h.NeedsDataFile {
			data.DataFileRaw = &h.DataFileRaw
		}
	}
	info.Snapshots = describeSnapshots(snapshots)
	return info, nil
}

// inspect reads the header and the snapshot table of the named image. An image that cannot be opened
// for its encryption or its features is described without its snapshots.
func inspect(name string, share bool) (info *qcow2.Info, snapshots []qcow2.Snapshot, err error) {
	s, size, err := openHeader(name, share)
	if err != nil {
		return nil, nil, err
	}
	defer s.Close()
	info, err = qcow2.Inspect(s, size, nil)
	if err != nil || info.SnapshotCount == 0 {
		return info, nil, err
	}
	opts := &qcow2.OpenOptions{NoBacking: true, Lock: qcow2.LockOff}
	if info.NeedsDataFile {
		opts.DataFile = qcow2.NewMemoryStorage() // nothing of the guest is read
	}
	img, err := qcow2.OpenStorage(s, opts)
	if errors.Is(err, qcow2.ErrUnsupported) {
		return info, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	return info, img.Snapshots(), img.Close()
}

// openHeader opens the named image, whose size is size bytes, to look at its header.
func openHeader(name string, share bool) (s *qcow2.FileStorage, size int64, err error) {
	s, err = qcow2.OpenFileStorage(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, 0, err
	}
	role := qcow2.LockReader
	if share {
		role = qcow2.LockShared
	}
	if err = s.Lock(role); errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	if err == nil {
		size, err = s.Size()
	}
	if err != nil {
		return nil, 0, errors.Join(err, s.Close())
	}
	return s, size, nil
}

// inspectForeign reads the header of the named image, of a format that is read only.
func inspectForeign(name string, opts disk.Options) (*qcow2.ForeignInfo, error) {
	s, size, err := openHeader(name, opts.Share)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return qcow2.InspectForeign(s, size, qcow2.ForeignFormat(opts.Format), nil)
}

// describeForeign is describe for an image of a format that is read only.
func describeForeign(name string, opts disk.Options, allocated int64) (*imageInfo, error) {
	h, err := inspectForeign(name, opts)
	if err != nil {
		return nil, err
	}
	info := &imageInfo{
		Filename:      name,
		Format:        opts.Format,
		VirtualSize:   h.VirtualSize,
		ClusterSize:   int(h.BlockSize),
		ActualSize:    allocated,
		Backing:       h.BackingFile,
		BackingFormat: h.BackingFormat,
		Dirty:         h.NeedsCheck,
	}
	if h.BackingFile != "" {
		info.FullBacking = disk.BesideImage(name, h.BackingFile)
	}
	return info, nil
}

// printJSON prints v as qemu-img does, four spaces deep.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "    ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// humanSize returns n bytes in three digits and a unit.
func humanSize(n int64) string {
	units := []string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}
	v, i := float64(n), 0
	for v >= 1000 && i < len(units)-1 {
		v /= 1024
		i++
	}
	return fmt.Sprintf("%.3g %sB", v, units[i])
}

// printInfo prints info for people. Names come from the image, so they are shown without control
// characters.
func printInfo(w io.Writer, info *imageInfo) {
	line := func(name string, value any) { fmt.Fprintf(w, "%s: %v\n", name, value) }
	line("image", printable(info.Filename))
	line("file format", info.Format)
	line("virtual size", fmt.Sprintf("%s (%d bytes)", humanSize(info.VirtualSize), info.VirtualSize))
	line("disk size", humanSize(info.ActualSize))
	if info.Encrypted {
		line("encrypted", "yes")
	}
	if info.ClusterSize != 0 {
		line("cluster_size", info.ClusterSize)
	}
	if info.Dirty {
		line("cleanly shut down", "no")
	}
	if info.Backing != "" {
		actual := ""
		if info.FullBacking != info.Backing {
			actual = fmt.Sprintf(" (actual path: %s)", printable(info.FullBacking))
		}
		line("backing file", printable(info.Backing)+actual)
	}
	if info.BackingFormat != "" {
		line("backing file format", printable(info.BackingFormat))
	}
	printSnapshots(w, info.Snapshots)
	if info.Specific == nil {
		return
	}
	fmt.Fprintln(w, "Format specific information:")
	data := info.Specific.Data
	line("    compat", data.Compat)
	line("    compression type", data.CompressionType)
	flag := func(name string, value *bool) {
		if value != nil {
			line("    "+name, *value)
		}
	}
	flag("lazy refcounts", data.LazyRefcounts)
	line("    refcount bits", data.RefcountBits)
	if data.DataFile != "" {
		line("    data file", printable(data.DataFile))
	}
	flag("data file raw", data.DataFileRaw)
	flag("corrupt", data.Corrupt)
	flag("extended l2", data.ExtendedL2)
}

// printable returns s with a dot for every character that could steer a terminal.
func printable(s string) string {
	out := []rune(s)
	for i, r := range out {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			out[i] = '.'
		}
	}
	return string(out)
}
