package main

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// tool runs a command line and returns its outputs and exit code.
func tool(args ...string) (stdout, stderr string, exit int) {
	var out, err bytes.Buffer
	exit = run(context.Background(), args, &out, &err)
	return out.String(), err.String(), exit
}

// mustTool is tool for a command line that must succeed. It returns the standard output.
func mustTool(t *testing.T, args ...string) string {
	t.Helper()
	stdout, stderr, exit := tool(args...)
	if exit != 0 {
		t.Fatalf("qcow2 %q: exit %d\n%s", args, exit, stderr)
	}
	return stdout
}

// decode returns the value of a JSON text, with numbers as they stand.
func decode(t *testing.T, s string) (v any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(s))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%v in:\n%s", err, s)
	}
	return v
}

// inTempDir makes a new directory the working directory, so that names are short.
func inTempDir(t *testing.T) {
	t.Helper()
	t.Chdir(t.TempDir())
}

// writeDisk writes a raw disk of n bytes: random data, zeros, text.
func writeDisk(t *testing.T, name string, n int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	p := make([]byte, n)
	for i := range p[:n/3] {
		p[i] = byte(rng.Uint32())
	}
	copy(p[n/2:], bytes.Repeat([]byte("qcow2 "), n/12))
	if err := os.WriteFile(name, p, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestInfo compares info with qemu-img's, in both forms.
func TestInfo(t *testing.T) {
	qemutest.Require(t)
	t.Setenv("TZ", "UTC")
	tests := []struct {
		name   string
		create []string // arguments of qemu-img create but the file and the size
		after  func(t *testing.T)
	}{
		{name: "default"},
		{name: "version 2", create: []string{"-o", "compat=0.10,cluster_size=4k"}},
		{name: "zstd", create: []string{"-o", "compression_type=zstd,refcount_bits=1"}},
		{name: "extended L2", create: []string{"-o", "extended_l2=on,cluster_size=2M,lazy_refcounts=on"}},
		{name: "data file", create: []string{"-o", "data_file=data"}},
		{name: "raw data file", create: []string{"-o", "data_file=data,data_file_raw=on"}},
		{name: "backing file", create: []string{"-b", "sub/base", "-F", "raw"}},
		{name: "backing file that is gone", create: []string{"-u", "-b", "gone", "-F", "qcow2"}},
		{name: "snapshots", after: func(t *testing.T) {
			qemutest.Img(t, "snapshot", "-c", "first", "dir/image")
			qemutest.Img(t, "snapshot", "-c", "second one", "dir/image")
		}},
		{name: "data", after: func(t *testing.T) { qemutest.IO(t, "dir/image", "write 0 300k") }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inTempDir(t)
			if err := os.MkdirAll("dir/sub", 0o700); err != nil {
				t.Fatal(err)
			}
			writeDisk(t, "dir/sub/base", 1<<20)
			t.Chdir("dir")
			qemutest.Img(t, append(append([]string{"create", "-q", "-f", "qcow2"}, tt.create...), "image", "3M")...)
			t.Chdir("..")
			if tt.after != nil {
				tt.after(t)
			}
			want := qemutest.Img(t, "info", "-U", "-f", "qcow2", "--output=json", "dir/image")
			got := mustTool(t, "info", "-f", "qcow2", "--output=json", "dir/image")
			if diff := cmp.Diff(decode(t, want), decode(t, got)); diff != "" {
				t.Errorf("JSON (-qemu-img +ours):\n%s", diff)
			}
			want = qemutest.Img(t, "info", "-U", "-f", "qcow2", "dir/image")
			got = mustTool(t, "info", "-f", "qcow2", "dir/image")
			if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); diff != "" && tt.name != "snapshots" {
				t.Errorf("text (-qemu-img +ours):\n%s", diff)
			}
		})
	}
	t.Run("raw", func(t *testing.T) {
		inTempDir(t)
		writeDisk(t, "disk", 1000)
		want := qemutest.Img(t, "info", "-f", "raw", "--output=json", "disk")
		got := mustTool(t, "info", "-f", "raw", "--output=json", "disk")
		if diff := cmp.Diff(decode(t, want), decode(t, got)); diff != "" {
			t.Errorf("JSON (-qemu-img +ours):\n%s", diff)
		}
	})
}

// TestCreate creates images in the ways of qemu-img and compares what it says about ours and its own.
func TestCreate(t *testing.T) {
	qemutest.Require(t)
	tests := []struct {
		name string
		args []string // of create, but the file
	}{
		{"default", []string{"-f", "qcow2", "IMAGE", "1000"}},
		{"large", []string{"-f", "qcow2", "IMAGE", "1.5T"}},
		{"empty", []string{"-f", "qcow2", "IMAGE", "0"}},
		{"flags last", []string{"IMAGE", "10M", "-f", "qcow2", "-o", "cluster_size=512", "-o", "refcount_bits=64"}},
		{"glued flags", []string{"-qfqcow2", "-ocompat=v2", "IMAGE", "1M"}},
		{"size as option", []string{"-f", "qcow2", "-o", "size=1M,compression_type=zstd,lazy_refcounts=on", "IMAGE"}},
		{"extended L2", []string{"-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k", "IMAGE", "1G"}},
		{"backing file", []string{"-f", "qcow2", "-b", "base", "-F", "raw", "IMAGE"}},
		{"backing file and size", []string{"-f", "qcow2", "-b", "base", "-F", "raw", "IMAGE", "7M"}},
		{"backing file that is not there", []string{"-f", "qcow2", "-u", "-b", "none", "-F", "qcow2", "IMAGE", "7M"}},
		{"backing options", []string{"-f", "qcow2", "-o", "backing_file=base,backing_fmt=raw", "IMAGE"}},
		{"data file", []string{"-f", "qcow2", "-o", "data_file=IMAGE.data", "IMAGE", "1M"}},
		{"raw data file", []string{"-f", "qcow2", "-o", "data_file=IMAGE.data,data_file_raw=on", "IMAGE", "1M"}},
		{"metadata", []string{"-f", "qcow2", "-o", "preallocation=metadata,cluster_size=4k", "IMAGE", "3M"}},
		{"falloc", []string{"-f", "qcow2", "-o", "preallocation=falloc,compat=0.10", "IMAGE", "3M"}},
		{"full", []string{"-f", "qcow2", "-o", "preallocation=full", "IMAGE", "3M"}},
		{"metadata over a backing file", []string{"-f", "qcow2", "-o", "preallocation=metadata,extended_l2=on,backing_file=base,backing_fmt=raw", "IMAGE"}},
		{"raw", []string{"-f", "raw", "IMAGE", "1000"}},
		{"raw by default", []string{"IMAGE", "1M"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inTempDir(t)
			writeDisk(t, "base", 5<<20)
			args := func(name string) (a []string) {
				for _, s := range append([]string{"create"}, tt.args...) {
					a = append(a, strings.ReplaceAll(s, "IMAGE", name))
				}
				return a
			}
			// A file that stands there is replaced, as qemu-img does it.
			writeDisk(t, "ours", 1<<16)
			mustTool(t, args("ours")...)
			qemutest.Img(t, args("theirs")...)
			if strings.HasPrefix(tt.name, "raw") && !strings.Contains(tt.name, "data") {
				ours, err := os.ReadFile("ours")
				if err != nil {
					t.Fatal(err)
				}
				theirs, err := os.ReadFile("theirs")
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(ours, theirs) {
					t.Errorf("%d bytes, want %d zeros", len(ours), len(theirs))
				}
				return
			}
			if tt.name != "backing file that is not there" { // check opens it
				qemutest.CheckClean(t, "ours")
			}
			info := func(name string) any {
				s := qemutest.Img(t, "info", "-U", "-f", "qcow2", "--output=json", name)
				m := decode(t, strings.ReplaceAll(s, name, "IMAGE")).(map[string]any)
				delete(m, "actual-size")
				return m
			}
			if diff := cmp.Diff(info("theirs"), info("ours")); diff != "" {
				t.Errorf("qemu-img info (-its own +ours):\n%s", diff)
			}
		})
	}
}

// TestCreateOverItself has create refuse to replace a file that the new image is to stand on, by any name.
func TestCreateOverItself(t *testing.T) {
	for _, args := range [][]string{
		{"-b", "a", "-F", "qcow2", "a"},
		{"-b", "a", "-F", "raw", "a", "1M"},
		{"-u", "-b", "a", "-F", "qcow2", "a", "1M"},
		{"-b", "link", "-F", "qcow2", "a"},
		{"-b", "overlay", "-F", "qcow2", "a"},
		{"-o", "backing_file=a,backing_fmt=qcow2", "./a"},
		{"-o", "data_file=a", "a", "1M"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			inTempDir(t)
			mustTool(t, "create", "-q", "-f", "qcow2", "a", "1M")
			mustTool(t, "create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "overlay")
			if err := os.Symlink("a", "link"); err != nil {
				t.Skip(err)
			}
			want, err := os.ReadFile("a")
			if err != nil {
				t.Fatal(err)
			}
			if _, stderr, exit := tool(append([]string{"create", "-f", "qcow2"}, args...)...); exit == 0 || stderr == "" {
				t.Errorf("exit %d, %q", exit, stderr)
			}
			if got, err := os.ReadFile("a"); err != nil || !bytes.Equal(want, got) {
				t.Errorf("the file was changed: %d bytes, want %d; %v", len(got), len(want), err)
			}
		})
	}
}

// TestConvert converts to and fro and lets qemu-img compare.
func TestConvert(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	writeDisk(t, "disk", 5<<20+512)
	tests := []struct {
		name string
		args []string
	}{
		{"plain", []string{"-f", "raw", "-O", "qcow2"}},
		{"compressed", []string{"-c", "-f", "raw", "-O", "qcow2"}},
		{"zstd", []string{"-cf", "raw", "-O", "qcow2", "-o", "compression_type=zstd,cluster_size=4k"}},
		{"version 2 with progress", []string{"-p", "-f", "raw", "-O", "qcow2", "-o", "compat=0.10", "-S", "64k"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			mustTool(t, append(append([]string{"convert"}, tt.args...), "disk", "image")...)
			qemutest.CheckClean(t, "image")
			qemutest.Compare(t, "disk", "raw", "image", "qcow2")
			if c := qemutest.Check(t, "image"); (c.CompressedClusters > 0) != (tt.args[0][:2] == "-c") {
				t.Errorf("%d compressed clusters", c.CompressedClusters)
			}
			mustTool(t, "convert", "-f", "qcow2", "image", "back") // to raw
			want, err := os.ReadFile("disk")
			if err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile("back")
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Error("differs after the way back")
			}
		})
	}
}

// TestTrust opens overlays with and without leave to open their backing files.
func TestTrust(t *testing.T) {
	inTempDir(t)
	if err := os.Mkdir("sub", 0o700); err != nil {
		t.Fatal(err)
	}
	writeDisk(t, "base", 1<<20)
	base, err := filepath.Abs("base")
	if err != nil {
		t.Fatal(err)
	}
	for _, backing := range []string{"../base", base} {
		mustTool(t, "create", "-f", "qcow2", "-b", backing, "-F", "raw", "sub/overlay")
		for _, args := range [][]string{
			{"convert", "sub/overlay", "out"},
			{"map", "sub/overlay"},
		} {
			_, stderr, exit := tool(args...)
			if exit != 1 || !strings.Contains(stderr, "takes sub/overlay as qcow2") || !strings.Contains(stderr, "--trust") {
				t.Errorf("%q: exit %d, %q", args, exit, stderr)
			}
			mustTool(t, append(args, "--trust")...)
			mustTool(t, append(args, "-f", "qcow2")...)
		}
		want, err := os.ReadFile("base")
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile("out")
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Error("the overlay does not read as its backing file")
		}
		// info needs no file but the image.
		mustTool(t, "info", "sub/overlay")
	}
	mustTool(t, "create", "-u", "-f", "qcow2", "-b", "nbd:localhost:1", "-F", "raw", "sub/overlay", "1M")
	if _, stderr, exit := tool("map", "--trust", "sub/overlay"); exit != 1 || !strings.Contains(stderr, "protocol") {
		t.Errorf("a backing file with a protocol: exit %d, %q", exit, stderr)
	}
}

func TestRefusals(t *testing.T) {
	inTempDir(t)
	writeDisk(t, "disk", 1<<20)
	mustTool(t, "convert", "-f", "raw", "-O", "qcow2", "disk", "image")
	mustTool(t, "create", "-f", "qcow2", "-b", "image", "-F", "qcow2", "overlay")
	if err := os.Link("image", "link"); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile("image")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"no-such-command"},
		{"create"},
		{"create", "-f", "qcow2", "x"},
		{"create", "-f", "vmdk", "x", "1M"},
		{"create", "-f", "qcow2", "x", "1Q"},
		{"create", "-f", "qcow2", "x", "8E"},
		{"create", "-f", "qcow2", "-o", "cluster_size=1000", "x", "1M"},
		{"create", "-f", "qcow2", "-b", "image", "x"},
		{"create", "-f", "qcow2", "-b", "absent", "-F", "raw", "x"},
		{"create", "-f", "qcow2", "-b", "disk", "-F", "qcow2", "x"},
		{"create", "-b", "image", "-F", "qcow2", "x"},
		{"info", "absent"},
		{"info", "-f", "qcow2", "disk"},
		{"info", "--output=xml", "image"},
		{"info", "."},
		{"check"},
		{"check", "image", "overlay"},
		{"check", "absent"},
		{"check", "."},
		{"check", "-f", "vmdk", "image"},
		{"check", "-f", "qcow2", "disk"},
		{"check", "--output=xml", "image"},
		{"check", "-r", "some", "image"},
		{"check", "-r", "", "image"},
		{"check", "-U", "-r", "all", "image"},
		{"convert", "image"},
		{"convert", "-c", "image", "x"},
		{"convert", "-O", "vmdk", "image", "x"},
		{"convert", "-S", "1000", "image", "x"},
		{"convert", "image", "image"},
		{"convert", "image", "link"},
		{"convert", "-O", "qcow2", "image", "link"},
		{"convert", "-f", "raw", "image", "image"},
		{"convert", "-f", "qcow2", "overlay", "image"},
		{"convert", "-f", "qcow2", "overlay", "overlay"},
		{"convert", "-f", "qcow2", "disk", "x"},
		{"convert", "image", "absent/x"},
		{"snapshot"},
		{"snapshot", "-l", "absent"},
		{"snapshot", "-l", "-c", "x", "image"},
		{"snapshot", "-U", "-c", "x", "image"},
		{"snapshot", "-c", "x", "disk"},
		{"snapshot", "-d", "absent", "image"},
		{"snapshot", "-a", "absent", "image"},
		{"convert", "-l", "absent", "image", "x"},
		{"convert", "-l", "snapshot.tag=1", "image", "x"},
		{"convert", "-l", "1", "disk", "x"},
		{"map", "absent"},
		{"map", "--output=xml", "image"},
	} {
		if _, stderr, exit := tool(args...); exit != 1 || !strings.Contains(stderr, "qcow2: ") {
			t.Errorf("qcow2 %q: exit %d, %q", args, exit, stderr)
		}
	}
	after, err := os.ReadFile("image")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("a refused command changed the image")
	}
	if _, err := os.Stat("x"); err == nil {
		t.Error("a refused command made a file")
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"create", "--help"}, {"create", "-f", "qcow2", "-o", "help"}, {"convert", "-O", "qcow2", "-o", "?"}} {
		if stdout := mustTool(t, args...); !strings.Contains(stdout, "qcow2") {
			t.Errorf("qcow2 %q prints %q", args, stdout)
		}
	}
}
