package refwalk

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"

	"github.com/google/go-cmp/cmp"
)

// run runs a tool in dir, and fails the test if it does.
func run(t *testing.T, dir, tool string, args ...string) {
	t.Helper()
	cmd := exec.Command(tool, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
}

// qemuIO runs commands of qemu-io on an image in dir.
func qemuIO(t *testing.T, dir, image string, commands ...string) {
	t.Helper()
	args := []string{"-f", "qcow2", "-d", "unmap"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	run(t, dir, "qemu-io", append(args, image)...)
}

// verdict is what qemu-img check says, as far as it is compared.
type verdict struct {
	Corruptions int `json:"corruptions"`
	Leaks       int `json:"leaks"`
	Allocated   int `json:"allocated-clusters"`
	Compressed  int `json:"compressed-clusters"`
	Errors      int `json:"check-errors"`
}

// qemuCheck returns what qemu-img check says of an image.
func qemuCheck(t *testing.T, name string) verdict {
	t.Helper()
	cmd := exec.Command("qemu-img", "check", "--output=json", "-f", "qcow2", filepath.Base(name))
	cmd.Dir = filepath.Dir(name) // where a data file's relative name is looked up
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var v verdict
	if jerr := json.Unmarshal(out, &v); jerr != nil {
		t.Fatalf("qemu-img check %s: %v, %v\n%s", name, err, jerr, out)
	}
	return v
}

// walkFile walks an image file.
func walkFile(t *testing.T, name string) *Report {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	rep, err := Walk(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

// asQEMU puts a report into qemu-img check's words: it counts a lost COPIED flag as a corruption.
func asQEMU(r *Report) verdict {
	return verdict{
		Corruptions: r.TooLow + r.CopiedWrong + r.CopiedMissing + r.BadEntries,
		Leaks:       r.Leaks,
		Allocated:   r.Allocated,
		Compressed:  r.Compressed,
	}
}

// made is an image that QEMU is asked to make in a directory, as img.qcow2.
type made struct {
	name    string
	options string   // of qemu-img create
	format  string   // of the backing file, "" for none
	before  []string // commands of qemu-io
	after   []string // commands of qemu-io, after snapshot or bitmap
	snap    bool
	bitmap  bool
	size    int
	want    func(*Report) bool // what the image must hold for the row to mean anything
}

// build makes the image.
func (m made) build(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	args := []string{"create", "-q", "-f", "qcow2", "-o", m.options}
	if m.format != "" {
		run(t, dir, "qemu-img", "create", "-q", "-f", m.format, "base", fmt.Sprint(m.size*3/4))
		run(t, dir, "qemu-io", "-f", m.format, "-c", fmt.Sprintf("write -P 0x77 0 %d", m.size/2), "base")
		args = append(args, "-b", "base", "-F", m.format)
	}
	run(t, dir, "qemu-img", append(args, "img.qcow2", fmt.Sprint(m.size))...)
	qemuIO(t, dir, "img.qcow2", m.before...)
	if m.snap {
		run(t, dir, "qemu-img", "snapshot", "-c", "one", "img.qcow2")
		qemuIO(t, dir, "img.qcow2", fmt.Sprintf("write -P 0x31 4096 %d", m.size/4))
		run(t, dir, "qemu-img", "snapshot", "-c", "two", "img.qcow2")
	}
	if m.bitmap {
		run(t, dir, "qemu-img", "bitmap", "--add", "-g", "4096", "img.qcow2", "b0")
		run(t, dir, "qemu-img", "bitmap", "--add", "img.qcow2", "b1")
	}
	if len(m.after) > 0 {
		qemuIO(t, dir, "img.qcow2", m.after...)
	}
	return dir
}

// matrix returns the images that are compared with QEMU.
func matrix() []made {
	const size = 3 << 20
	mixed := func(cs int) []string {
		return []string{
			"write -P 0x11 0 300k", fmt.Sprintf("write -P 0x12 %d 7k", size-9<<10), "write -P 0x13 1234944 1536",
			"write -z 1M 128k", "write -P 0x14 2M 256k", "write -z -u 2176k 64k", "discard 2048k 64k",
			fmt.Sprintf("write -z %d %d", 1536<<10, max(cs, 4096)),
		}
	}
	packed := func(cs int) []string {
		c := []string{"write -P 0x21 0 100k"}
		at := (1 << 20) / cs * cs
		for i := range 4 {
			c = append(c, fmt.Sprintf("write -c -P %d %d %d", 0x40+i, at+i*cs, cs))
		}
		return c
	}
	var list []made
	for _, cs := range []int{512, 4096, 65536, 262144} {
		for _, compat := range []string{"0.10", "1.1"} {
			base := fmt.Sprintf("compat=%s,cluster_size=%d", compat, cs)
			orders := []int{16}
			if compat == "1.1" {
				orders = []int{1, 4, 8, 64}
				if cs == 65536 {
					orders = []int{1, 2, 4, 8, 16, 32, 64}
				}
			}
			for _, bits := range orders {
				opts := base
				if compat == "1.1" {
					opts += fmt.Sprintf(",refcount_bits=%d", bits)
				}
				list = append(list,
					made{name: fmt.Sprintf("plain/%d/%s/%d", cs, compat, bits), options: opts, size: size, before: mixed(cs),
						want: func(r *Report) bool { return r.Allocated > 0 }},
					made{name: fmt.Sprintf("compressed/%d/%s/%d", cs, compat, bits), options: opts, size: size, before: packed(cs),
						want: func(r *Report) bool { return r.Compressed > 0 }},
				)
				if bits > 1 {
					list = append(list, made{name: fmt.Sprintf("snapshots/%d/%s/%d", cs, compat, bits), options: opts, size: size,
						before: append(packed(cs), mixed(cs)[2:]...), snap: true, after: []string{"write -P 0x55 700k 500k"},
						want: func(r *Report) bool { return len(r.InternalSnapshots) == 2 }})
				}
			}
		}
	}
	for _, cs := range []int{16384, 65536} {
		opts := fmt.Sprintf("compat=1.1,cluster_size=%d", cs)
		ext := opts + ",extended_l2=on"
		some := func(r *Report) bool { return r.Allocated > 0 }
		for _, format := range []string{"", "raw", "qcow2"} {
			list = append(list,
				made{name: fmt.Sprintf("overlay/%d/%s", cs, format), options: opts, size: size, format: format, before: mixed(cs), want: some},
				made{name: fmt.Sprintf("extended/%d/%s", cs, format), options: ext, size: size, format: format, before: mixed(cs), want: some},
				made{name: fmt.Sprintf("extended zstd/%d/%s", cs, format), options: ext + ",compression_type=zstd", size: size,
					format: format, before: packed(cs), snap: true, want: func(r *Report) bool { return r.Compressed > 0 }},
			)
		}
		list = append(list,
			made{name: fmt.Sprintf("data file/%d", cs), options: opts + ",data_file=data", size: size, before: mixed(cs), want: some},
			made{name: fmt.Sprintf("raw data file/%d", cs), options: opts + ",data_file=data,data_file_raw=on", size: size,
				before: mixed(cs), want: some},
			made{name: fmt.Sprintf("extended data file/%d", cs), options: ext + ",data_file=data", size: size, before: mixed(cs), want: some},
			made{name: fmt.Sprintf("bitmaps/%d", cs), options: opts, size: size, before: mixed(cs), bitmap: true,
				after: []string{"write -P 0x66 100k 1M"}, want: func(r *Report) bool { return r.Header.Bitmaps == 2 }},
			made{name: fmt.Sprintf("preallocated/%d", cs), options: opts + ",preallocation=metadata", size: size, before: mixed(cs), want: some},
			made{name: fmt.Sprintf("lazy/%d", cs), options: opts + ",lazy_refcounts=on", size: size, before: mixed(cs), want: some},
		)
	}
	return list
}

// TestAgainstQEMU walks and reads images that QEMU made, and compares with qemu-img check and convert.
func TestAgainstQEMU(t *testing.T) {
	qemutest.Require(t)
	for _, m := range matrix() {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			dir := m.build(t)
			name := filepath.Join(dir, "img.qcow2")
			rep := walkFile(t, name)
			if rep.Overlaps != 0 || !rep.Clean() {
				t.Errorf("a sound image: %+v\n%s", *rep, strings.Join(rep.Findings, "\n"))
			}
			if m.want != nil && !m.want(rep) {
				t.Errorf("the image does not hold what the row is about: %+v", *rep)
			}
			if diff := cmp.Diff(qemuCheck(t, name), asQEMU(rep)); diff != "" {
				t.Errorf("qemu-img check and the walk differ (-qemu +walk):\n%s%s", diff, strings.Join(rep.Findings, "\n"))
			}
			for snap := range len(rep.InternalSnapshots) + 1 {
				args := []string{"convert", "-O", "raw"}
				if snap > 0 {
					args = append(args, "-l", "snapshot.id="+rep.InternalSnapshots[snap-1].ID)
				}
				run(t, dir, "qemu-img", append(args, "-f", "qcow2", "img.qcow2", "raw")...)
				want, err := os.ReadFile(filepath.Join(dir, "raw"))
				if err != nil {
					t.Fatal(err)
				}
				got, err := ReadGuest(source(t, dir, snap))
				if err != nil {
					t.Fatal(err)
				}
				if at := firstDifference(want, got); at >= 0 {
					t.Errorf("snapshot %d: content differs from qemu-img convert at guest %#x of %#x and %#x", snap, at, len(want), len(got))
				}
			}
		})
	}
}

// source returns the image of a directory with its backing or data file.
func source(t *testing.T, dir string, snap int) Source {
	t.Helper()
	open := func(name string) (*os.File, int64) {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return nil, 0
		}
		t.Cleanup(func() { f.Close() })
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		return f, st.Size()
	}
	img, size := open("img.qcow2")
	src := Source{Image: img, Size: size, Snapshot: snap}
	if data, _ := open("data"); data != nil {
		src.Data = data
	}
	base, baseSize := open("base")
	if base == nil {
		return src
	}
	content := make([]byte, baseSize)
	if guest, err := ReadGuest(Source{Image: base, Size: baseSize}); err == nil {
		content = guest
	} else if _, err := base.ReadAt(content, 0); err != nil {
		t.Fatal(err)
	}
	src.Backing = func(p []byte, off int64) error {
		clear(p)
		if off < int64(len(content)) {
			copy(p, content[off:])
		}
		return nil
	}
	return src
}

// firstDifference returns where a and b differ first, or -1.
func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	if len(a) != len(b) {
		return min(len(a), len(b))
	}
	return -1
}
