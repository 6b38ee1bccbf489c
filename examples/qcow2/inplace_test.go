package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// inPlaceKinds are the sources that are converted in place.
var inPlaceKinds = []struct {
	name, format, options string
	in                    []string // options of the conversion
}{
	{"raw", "raw", "", nil},
	{"qed", "qed", "cluster_size=4k", nil},
	{"fixed vhd", "vpc", "subformat=fixed,force_size=on", []string{"-o", "cluster_size=4k,refcount_bits=1"}},
	{"vdi", "vdi", "static=off", []string{"-o", "cluster_size=512"}},
}

// makeInPlace makes the file "source" of a raw file "disk".
func makeInPlace(t *testing.T, format, options string) {
	t.Helper()
	writeDisk(t, "disk", 3<<20+1536)
	args := []string{"convert", "-f", "raw", "-O", format}
	if options != "" {
		args = append(args, "-o", options)
	}
	qemutest.Img(t, append(args, "disk", "source")...)
}

// writeFile writes the named file.
func writeFile(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestInPlace converts files in place, with -f and without. Their length is told; qemu-img finds the same content.
func TestInPlace(t *testing.T) {
	qemutest.Require(t)
	for _, tt := range inPlaceKinds {
		t.Run(tt.name, func(t *testing.T) {
			inTempDir(t)
			makeInPlace(t, tt.format, tt.options)
			source := readFile("source")
			for _, format := range [][]string{{"-f", tt.format}, nil} {
				writeFile(t, "image", source)
				args := append(append([]string{"convert", "--in-place"}, format...), tt.in...)
				stdout, stderr, exit := tool(append(args, "image")...)
				if exit != 0 || !strings.Contains(stderr, fmt.Sprintf("--original-size %d\n", len(source))) || stdout != "Image converted.\n" {
					t.Errorf("%q: exit %d, %q, %q", args, exit, stdout, stderr)
				}
				qemutest.CheckClean(t, "image")
				qemutest.Compare(t, "disk", "raw", "image", "qcow2")
			}
		})
	}
	t.Run("overlay", func(t *testing.T) {
		inTempDir(t)
		writeDisk(t, "base", 1<<20)
		qemutest.Img(t, "create", "-q", "-f", "qed", "-b", "base", "-F", "raw", "image")
		qemutest.IOWith(t, qemutest.IOOptions{Format: "qed"}, "image", "write -P 5 64k 64k", "write -z 256k 64k")
		qemutest.Img(t, "convert", "-f", "qed", "-O", "raw", "image", "disk")
		if _, stderr, exit := tool("convert", "--in-place", "image"); exit != 1 || !strings.Contains(stderr, "base") {
			t.Errorf("without -f: exit %d, %q", exit, stderr)
		}
		mustTool(t, "convert", "--in-place", "-f", "qed", "image")
		qemutest.CheckClean(t, "image")
		qemutest.Compare(t, "disk", "raw", "image", "qcow2")
		if info := qemutest.Img(t, "info", "-f", "qcow2", "image"); !strings.Contains(info, "backing file: base") {
			t.Errorf("the image has lost its backing file:\n%s", info)
		}
	})
}

// errKilled is what a dyingStorage panics with.
var errKilled = errors.New("killed")

// dyingStorage kills the program, so to say, at a change of the file.
type dyingStorage struct {
	*qcow2.FileStorage
	left int
}

// count counts a change.
func (s *dyingStorage) count() {
	if s.left--; s.left < 0 {
		panic(errKilled)
	}
}

// WriteAt implements qcow2.Storage.
func (s *dyingStorage) WriteAt(p []byte, off int64) (int, error) {
	s.count()
	return s.FileStorage.WriteAt(p, off)
}

// Truncate implements qcow2.Storage.
func (s *dyingStorage) Truncate(size int64) error {
	s.count()
	return s.FileStorage.Truncate(size)
}

// Sync implements qcow2.Storage.
func (s *dyingStorage) Sync() error {
	s.count()
	return s.FileStorage.Sync()
}

// convertKilled converts the named file in place, is killed at a change, and reports whether it came to that.
func convertKilled(t *testing.T, name, format string, clusterSize, left int) (was bool) {
	t.Helper()
	s, err := qcow2.OpenFileStorage(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	size, err := s.Size()
	if err != nil {
		t.Fatal(err)
	}
	view := qcow2.NewSourceView(s, size)
	var src qcow2.Layout
	if format == "raw" {
		src, err = qcow2.NewRawDisk(view)
	} else {
		src, err = qcow2.OpenForeign(view, qcow2.ForeignFormat(format), nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if v := recover(); v != nil && v != errKilled {
			panic(v)
		} else if v != nil {
			was = true
		}
	}()
	if err := qcow2.ConvertInPlace(context.Background(), &dyingStorage{s, left}, src, &qcow2.InPlaceOptions{ClusterSize: clusterSize}); err != nil {
		t.Fatal(err)
	}
	return false
}

// TestInPlaceInterrupted kills conversions at every change. --rollback makes the file what it was, bit by bit, and
// --resume the image, without -f too; each says what it found, and where it cannot do it, what can be done.
func TestInPlaceInterrupted(t *testing.T) {
	qemutest.Require(t)
	for _, tt := range inPlaceKinds {
		t.Run(tt.name, func(t *testing.T) {
			inTempDir(t)
			makeInPlace(t, tt.format, tt.options)
			source := readFile("source")
			size := strconv.Itoa(len(source))
			clusterSize := 4096
			if tt.format == "vdi" {
				clusterSize = 512
			}
			back, resumed := 0, 0
			for left := 0; ; left++ {
				writeFile(t, "file", source)
				if !convertKilled(t, "file", tt.format, clusterSize, left) {
					break
				}
				half := readFile("file")
				if bytes.Equal(half, source) {
					continue
				}
				if _, stderr, exit := tool("convert", "--in-place", "-f", tt.format, "file"); exit != 1 || !bytes.Equal(readFile("file"), half) {
					t.Errorf("convert again: exit %d, %s", exit, stderr)
				}
				if _, stderr, exit := tool("convert", "--in-place", "--resume", "--original-size", "512", "file"); exit != 1 || !bytes.Equal(readFile("file"), half) {
					t.Errorf("another length: exit %d, %s", exit, stderr)
				}
				_, stderr, exit := tool("convert", "--in-place", "--rollback", "--original-size", size, "file")
				image := bytes.HasPrefix(half, []byte("QFI\xfb"))
				switch now := readFile("file"); {
				case image && (exit != 1 || !bytes.Equal(now, half)):
					t.Errorf("killed at %d: roll back the image: exit %d, %s", left, exit, stderr)
				case !image && (exit != 0 || !bytes.Equal(now, source)):
					t.Errorf("killed at %d: roll back: exit %d, same %v, %s", left, exit, bytes.Equal(now, source), stderr)
				case !image:
					back++
				}
				writeFile(t, "file", half)
				args := []string{"convert", "--in-place", "--resume", "--original-size", size, "-o", fmt.Sprintf("cluster_size=%d", clusterSize)}
				if left%2 == 0 {
					args = append(args, "-f", tt.format)
				}
				_, stderr, exit = tool(append(args, "file")...)
				switch {
				case exit == 0:
					resumed++
				case !image || !strings.Contains(stderr, "no footer"): // it may be done but for a sync
					t.Errorf("killed at %d: resume: exit %d, %s", left, exit, stderr)
				}
				qemutest.CheckClean(t, "file")
				qemutest.Compare(t, "disk", "raw", "file", "qcow2")
			}
			t.Logf("%d rolled back, %d resumed", back, resumed)
			if back == 0 || resumed <= back {
				t.Error("a kind of end is missing")
			}
		})
	}
}

// TestInPlaceRefusals refuses what contradicts itself, or cannot be done, and does not touch the file.
func TestInPlaceRefusals(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	writeDisk(t, "disk", 1<<20)
	qemutest.Img(t, "convert", "-f", "raw", "-O", "qcow2", "disk", "image")
	qemutest.Img(t, "convert", "-f", "raw", "-O", "vdi", "disk", "vdi")
	for _, tt := range []struct {
		args []string // behind convert
		want string   // in the message
	}{
		{[]string{"--resume", "disk"}, "--in-place"},
		{[]string{"--original-size", "5", "disk"}, "--in-place"},
		{[]string{"--in-place"}, "one file name"},
		{[]string{"--in-place", "disk", "other"}, "one file name"},
		{[]string{"--in-place", "--resume", "disk"}, "--original-size"},
		{[]string{"--in-place", "--rollback", "disk"}, "--original-size"},
		{[]string{"--in-place", "--original-size", "5", "disk"}, "--resume"},
		{[]string{"--in-place", "--resume", "--rollback", "--original-size", "5", "disk"}, "same time"},
		{[]string{"--in-place", "--resume", "--original-size", "-5", "disk"}, "invalid"},
		{[]string{"--in-place", "--rollback", "--original-size", "1M", "-f", "raw", "disk"}, "--format"},
		{[]string{"--in-place", "-c", "disk"}, "--compress"},
		{[]string{"--in-place", "-m", "4", "disk"}, "--parallel"},
		{[]string{"--in-place", "-O", "raw", "disk"}, "qcow2 image"},
		{[]string{"--in-place", "-o", "data_file=x", "disk"}, "data file"},
		{[]string{"--in-place", "-o", "extended_l2=on", "disk"}, "extended_l2"},
		{[]string{"--in-place", "-o", "preallocation=full", "disk"}, "preallocation"},
		{[]string{"--in-place", "-o", "size=1G", "disk"}, "size"},
		{[]string{"--in-place", "-o", "cluster_size=5000", "disk"}, "ClusterSize"},
		{[]string{"--in-place", "-B", "base", "disk"}, "backing format"},
		{[]string{"--in-place", "image"}, "already"},
		{[]string{"--in-place", "-f", "qcow2", "image"}, "already"},
		{[]string{"--in-place", "-f", "raw", "image"}, "header"},
		{[]string{"--in-place", "-f", "vdi", "-o", "cluster_size=4k", "vdi"}, "cluster_size=512"},
		{[]string{"--in-place", "-f", "vhdx", "disk"}, "unknown driver"},
		{[]string{"--in-place", "none"}, "could not open"},
		{[]string{"--in-place", "--resume", "--original-size", "1M", "-f", "raw", "disk"}, "no footer"},
		{[]string{"--in-place", "--rollback", "--original-size", "1M", "disk"}, "no footer"},
	} {
		before := [][]byte{readFile("disk"), readFile("image"), readFile("vdi")}
		stdout, stderr, exit := tool(append([]string{"convert"}, tt.args...)...)
		if exit != 1 || stdout != "" || !strings.Contains(stderr, tt.want) {
			t.Errorf("convert %q: exit %d, %q, %q, want %q", tt.args, exit, stdout, stderr, tt.want)
		}
		for i, name := range []string{"disk", "image", "vdi"} {
			if !bytes.Equal(readFile(name), before[i]) {
				t.Errorf("convert %q changed %s", tt.args, name)
			}
		}
	}
	if help := mustTool(t, "convert", "--in-place", "-o", "help"); help != inPlaceOptionNames {
		t.Errorf("-o help: %q", help)
	}
}
