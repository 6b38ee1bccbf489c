package qcow2_test

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/measure"
	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// convertFormat is a way to store a disk, by qemu-img and by us.
type convertFormat struct {
	name   string
	format string   // "raw" or "qcow2"
	qemu   []string // options of qemu-img convert
	ours   qcow2.ConvertFileOptions
	packed bool
}

// convertFormats are the formats that the file system goes through.
func convertFormats() []convertFormat {
	packed := qcow2.ConvertOptions{Compress: true}
	wide := qcow2.ConvertOptions{Compress: true, DeflateWindow: qcow2.DeflateWindow32K}
	return []convertFormat{
		{name: "raw", format: "raw", ours: qcow2.ConvertFileOptions{Format: "raw"}},
		{name: "qcow2", format: "qcow2"},
		{name: "small", format: "qcow2", qemu: []string{"-o", "cluster_size=4k,compat=0.10"},
			ours: qcow2.ConvertFileOptions{Create: &qcow2.CreateOptions{ClusterSize: 4096, Version: 2}}},
		{name: "extended", format: "qcow2", qemu: []string{"-o", "extended_l2=on"},
			ours: qcow2.ConvertFileOptions{Create: &qcow2.CreateOptions{ExtendedL2: true}}},
		{name: "deflate", format: "qcow2", qemu: []string{"-c"}, packed: true, ours: qcow2.ConvertFileOptions{ConvertOptions: packed}},
		{name: "deflate wide", format: "qcow2", qemu: []string{"-c", "-o", "cluster_size=2M"}, packed: true,
			ours: qcow2.ConvertFileOptions{ConvertOptions: wide}},
		{name: "zstd", format: "qcow2", qemu: []string{"-c", "-o", "compression_type=zstd"}, packed: true,
			ours: qcow2.ConvertFileOptions{ConvertOptions: packed, Create: &qcow2.CreateOptions{Compression: qcow2.CompressionZstd}}},
	}
}

// openDisk opens a disk for reading until the test ends.
func openDisk(t *testing.T, name, format string) qcow2.Disk {
	t.Helper()
	if format == "qcow2" {
		img, err := qcow2.Open(name, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { img.Close() })
		return img
	}
	s, err := qcow2.OpenFileStorage(name, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if format != "raw" {
		d, err := qcow2.OpenForeign(s, qcow2.ForeignFormat(format), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	d, err := qcow2.NewRawDisk(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// foreignSources are the formats that the file system comes from besides, by qemu-img alone.
var foreignSources = []convertFormat{
	{name: "QED", format: "qed"},
	{name: "fixed VHD", format: "vpc", qemu: []string{"-o", "subformat=fixed,force_size=on"}},
	{name: "dynamic VHD", format: "vpc", qemu: []string{"-o", "subformat=dynamic,force_size=on"}},
	{name: "VDI", format: "vdi"},
	{name: "static VDI", format: "vdi", qemu: []string{"-o", "static=on"}},
}

// TestInteropConvert takes a real file system from each format, as qemu-img and as we wrote it, and from each foreign one,
// to each. qemu-img finds all of them the same, and the images without fault.
func TestInteropConvert(t *testing.T) {
	qemutest.Require(t)
	if _, err := measure.FindProgram("mke2fs"); err != nil {
		qemutest.Missing(t, "%v (Debian: apt-get install e2fsprogs)", err)
	}
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	source := path("fs")
	if err := measure.MakeFileSystem(t.Context(), io.Discard, source, path("stage"), 6<<20); err != nil {
		t.Fatal(err)
	}
	formats := convertFormats()
	convert := func(t *testing.T, from, fromFormat string, to *convertFormat, name string) {
		t.Helper()
		opts := to.ours
		opts.Workers = 3
		if err := qcow2.ConvertFile(t.Context(), name, openDisk(t, from, fromFormat), &opts); err != nil {
			t.Fatal(err)
		}
		qemutest.Compare(t, source, "raw", name, to.format)
		if to.format == "qcow2" {
			qemutest.CheckClean(t, name)
			if c := qemutest.Check(t, name); to.packed != (c.CompressedClusters > 0) {
				t.Errorf("%d compressed clusters", c.CompressedClusters)
			}
		}
	}
	// pair is convert to a file that is not needed any more.
	pair := func(t *testing.T, from, fromFormat string, to *convertFormat) {
		t.Helper()
		convert(t, from, fromFormat, to, path("pair"))
		if err := os.Remove(path("pair")); err != nil {
			t.Fatal(err)
		}
	}
	for i, from := range formats {
		theirs, ours := path("theirs-"+from.name), path("ours-"+from.name)
		qemutest.Dump(t, theirs, ours)
		qemutest.Img(t, append(append([]string{"convert", "-f", "raw", "-O", from.format}, from.qemu...), source, theirs)...)
		convert(t, source, "raw", &from, ours)
		for j := range formats {
			to := &formats[j]
			t.Run(from.name+" to "+to.name, func(t *testing.T) {
				// Either writer's image goes to every format: QEMU's if the sum is even, and so on.
				from, name := from, ours
				if (i+j)%2 == 0 {
					name = theirs
				}
				pair(t, name, from.format, to)
			})
		}
	}
	for _, from := range foreignSources {
		theirs := path("theirs-" + from.name)
		qemutest.Img(t, append(append([]string{"convert", "-f", "raw", "-O", from.format}, from.qemu...), source, theirs)...)
		for j := range formats {
			t.Run(from.name+" to "+formats[j].name, func(t *testing.T) { pair(t, theirs, from.format, &formats[j]) })
		}
	}
}
