package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// foreignKinds are the ways in which qemu-img makes images of foreign formats.
var foreignKinds = []struct {
	name    string
	format  ForeignFormat
	options string
}{
	{"qed", ForeignQED, ""},
	{"qed 4k tables of 2", ForeignQED, "cluster_size=4096,table_size=2"},
	{"qed 4k tables of 16", ForeignQED, "cluster_size=4096,table_size=16"},
	{"qed 2M", ForeignQED, "cluster_size=2097152,table_size=2"},
	{"vhd dynamic", ForeignVHD, "subformat=dynamic"},
	{"vhd dynamic by size", ForeignVHD, "subformat=dynamic,force_size=on"},
	{"vhd fixed", ForeignVHD, "subformat=fixed"},
	{"vhd fixed by size", ForeignVHD, "subformat=fixed,force_size=on"},
	{"vdi dynamic", ForeignVDI, "static=off"},
	{"vdi static", ForeignVDI, "static=on"},
}

// TestForeignQEMU reads images that qemu-img has made, of a file system and of random patterns, and compares
// them with what qemu-img reads, byte by byte, and their extents with qemu-img map.
func TestForeignQEMU(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	sources := map[string]string{"file system": filepath.Join(dir, "ext4"), "pattern": filepath.Join(dir, "pattern"), "empty": filepath.Join(dir, "empty")}
	makeFileSystem(t, sources["file system"], 24<<20)
	makePattern(t, sources["pattern"], 13<<20+512*7, 11)
	makePattern(t, sources["empty"], 5<<20, 0)
	total := 0
	for _, kind := range foreignKinds {
		for name, source := range sources {
			t.Run(kind.name+" "+name, func(t *testing.T) {
				image, raw := filepath.Join(dir, "image"), filepath.Join(dir, "raw")
				args := []string{"convert", "-f", "raw", "-O", string(kind.format)}
				if kind.options != "" {
					args = append(args, "-o", kind.options)
				}
				qemutest.Img(t, append(args, source, image)...)
				qemutest.Dump(t, image)
				qemutest.Img(t, "convert", "-f", string(kind.format), "-O", "raw", image, raw)
				total += compareForeign(t, kind.format, image, raw)
				if name != "pattern" {
					return
				}
				// Writes in all places afterwards, zeros among them.
				rng := rand.New(rand.NewPCG(5, uint64(len(kind.name))))
				var cmds []string
				for range 20 {
					n, off := 512*(1+rng.IntN(400)), 512*rng.IntN(24<<10)
					cmds = append(cmds, fmt.Sprintf("write %s %d %d", []string{"-z", "-P 7", "-P 0"}[rng.IntN(3)], off, n))
				}
				qemutest.IOWith(t, qemutest.IOOptions{Format: string(kind.format)}, image, cmds...)
				qemutest.Img(t, "convert", "-f", string(kind.format), "-O", "raw", image, raw)
				total += compareForeign(t, kind.format, image, raw)
			})
		}
	}
	t.Logf("%d extents compared", total)
}

// compareForeign compares the image with the raw file, which holds what qemu-img reads, and with qemu-img map. It
// returns the number of extents.
func compareForeign(t *testing.T, format ForeignFormat, image, raw string) int {
	t.Helper()
	s, err := OpenFileStorage(image, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, s)
	size, err := s.Size()
	if err != nil {
		t.Fatal(err)
	}
	if f, err := DetectForeign(s, size); err != nil || f != format {
		t.Errorf("detected as %q: %v", f, err)
	}
	d, err := OpenForeign(s, format, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, d)
	want, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if d.Size() != int64(len(want)) {
		t.Fatalf("size %d, want %d", d.Size(), len(want))
	}
	file, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("not what qemu-img reads (%v); the first difference is at %#x", err, firstDifference(got, want))
	}
	n := checkForeignExtents(t, d, file, want)

	// Where qemu-img says data, it may be told by us as a hole of the file, in images all of which has its place. All
	// other images are told alike.
	var theirs []qemutest.MapEntry
	if err := json.Unmarshal([]byte(qemutest.Img(t, "map", "-f", string(format), "--output=json", image)), &theirs); err != nil {
		t.Fatal(err)
	}
	whole := d.img.Whole
	i := 0
	for _, e := range extentsList(t, d) {
		for ; theirs[i].Start+theirs[i].Length <= e.Off; i++ {
		}
		for j := i; j < len(theirs) && theirs[j].Start < e.Off+e.Len; j++ {
			x := theirs[j]
			switch {
			case x.Zero != (e.Kind != ExtentData) && !whole, x.Present != (e.Kind != ExtentUnallocated), !x.Zero && e.Kind != ExtentData:
				t.Fatalf("extent %+v, qemu-img map says %+v", e, x)
			case e.Kind == ExtentData && x.Offset != nil && *x.Offset-x.Start != e.HostOff-e.Off:
				t.Fatalf("extent %+v is elsewhere: qemu-img map says %+v, offset %d", e, x, *x.Offset)
			}
		}
	}
	return n
}

// checkForeignExtents checks that extents are runs without gaps, joined, whose data is where they say, and that the
// rest reads as zeros. file and disk are the contents of both. It returns their number.
func checkForeignExtents(t *testing.T, d Disk, file, disk []byte) int {
	t.Helper()
	list := extentsList(t, d)
	next := int64(0)
	for i, e := range list {
		if e.Off != next || e.Len <= 0 || e.Depth != 0 || i > 0 && e.follows(&list[i-1]) {
			t.Fatalf("extent %+v does not follow %#x", e, next)
		}
		next += e.Len
		part := disk[e.Off:next]
		switch {
		case e.Kind == ExtentData && (e.HostOff < 0 || !bytes.Equal(file[e.HostOff:][:e.Len], part)):
			t.Fatalf("extent %+v is not where it says", e)
		case e.Kind != ExtentData && (e.HostOff != -1 || !isZero(part)):
			t.Fatalf("extent %+v is not a hole", e)
		}
	}
	if next != d.Size() {
		t.Fatalf("extents end at %#x of %#x", next, d.Size())
	}
	return len(list)
}

// firstDifference returns where a and b, of one length, begin to differ.
func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// makeFileSystem makes an ext4 file system of size bytes with some files of this module in the file name.
func makeFileSystem(t testing.TB, name string, size int64) {
	t.Helper()
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		mke2fs, err = exec.LookPath("/sbin/mke2fs")
	}
	if err != nil {
		qemutest.Missing(t, "%v (Debian: apt-get install e2fsprogs)", err)
	}
	out, err := exec.Command(mke2fs, "-q", "-F", "-t", "ext4", "-d", "internal", name, fmt.Sprintf("%dk", size>>10)).CombinedOutput()
	if err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
}

// makePattern makes a raw disk of size bytes with runs pieces of random data in random places, some of whose sectors
// are zeros.
func makePattern(t testing.TB, name string, size int64, runs int) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, f)
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(9, uint64(runs)))
	for i := range runs {
		p := make([]byte, 512*(1+rng.IntN(1<<(i%11))))
		for j := range p {
			p[j] = byte(rng.Uint32())
		}
		for j := 0; j < len(p); j += 512 {
			if rng.IntN(4) == 0 {
				clear(p[j : j+512])
			}
		}
		off := 512 * rng.Int64N((size-int64(len(p)))/512+1)
		if i == 0 {
			off = size - int64(len(p)) // the end of the disk is data
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
}

// TestForeignQEMUBacking reads chains of QED images that qemu-img has made, and qcow2 images over foreign ones, and the
// other way round.
func TestForeignQEMUBacking(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	makePattern(t, at("base"), 3<<20, 20)
	qemutest.Img(t, "convert", "-f", "raw", "-O", "vdi", at("base"), at("vdi"))
	qemutest.Img(t, "convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", at("base"), at("vpc"))
	qemutest.Img(t, "create", "-q", "-f", "qed", "-b", "base", "-F", "raw", "-o", "cluster_size=4096", at("qed"), "4M")
	qemutest.IOWith(t, qemutest.IOOptions{Format: "qed"}, at("qed"), "write -P 5 100k 9k", "write -z 1M 100k", "write -P 6 3M 1k")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "-b", "qed", "-F", "qed", at("over qed"))
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "-b", "vdi", "-F", "vdi", at("over vdi"))
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "-b", "vpc", "-F", "vpc", at("over vpc"))
	for _, name := range []string{"over qed", "over vdi", "over vpc"} {
		qemutest.IO(t, at(name), "write -P 9 200k 70k")
	}
	qemutest.Img(t, "create", "-q", "-f", "qed", "-b", "over qed", "-F", "qcow2", at("top"))
	qemutest.IOWith(t, qemutest.IOOptions{Format: "qed"}, at("top"), "write -P 3 500k 9k")
	for _, tt := range []struct {
		name, format, backing string
	}{
		{"qed", "qed", ""}, {"over qed", "qcow2", ""}, {"over vdi", "qcow2", ""}, {"over vpc", "qcow2", ""}, {"top", "qed", "qcow2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			qemutest.Img(t, "convert", "-f", tt.format, "-O", "raw", at(tt.name), at("raw"))
			want, err := os.ReadFile(at("raw"))
			if err != nil {
				t.Fatal(err)
			}
			s, err := OpenFileStorage(at(tt.name), os.O_RDONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, s)
			o := &OpenOptions{Resolver: ResolveBeside(dir), Name: tt.name, BackingFormat: tt.backing}
			var d interface {
				Disk
				io.Closer
			}
			if tt.format == "qcow2" {
				d, err = OpenStorage(s, o)
			} else {
				d, err = OpenForeign(s, ForeignFormat(tt.format), o)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, d)
			got := make([]byte, len(want))
			if n, err := d.ReadAt(got, 0); err != nil || d.Size() != int64(n) || !bytes.Equal(got, want) {
				t.Fatalf("not what qemu-img reads (%d bytes, %v)", n, err)
			}
			next, depth := int64(0), 0
			for e, err := range d.Extents(0, d.Size()) {
				if err != nil || e.Off != next {
					t.Fatalf("extent %+v: %v", e, err)
				}
				next += e.Len
				depth = max(depth, e.Depth)
				if e.Kind != ExtentData && !isZero(want[e.Off:next]) {
					t.Fatalf("extent %+v is not zeros", e)
				}
			}
			if next != d.Size() || depth == 0 {
				t.Errorf("extents end at %#x, %d layers deep", next, depth)
			}
			// And through a conversion.
			img, err := Create(at("copy"), d.Size(), &CreateOptions{Overwrite: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := Convert(context.Background(), img, d, nil); err != nil {
				t.Error(err)
			}
			mustClose(t, img)
			qemutest.Compare(t, at("copy"), "qcow2", at("raw"), "raw")
			qemutest.CheckClean(t, at("copy"))
		})
	}
}

// TestForeignQEMUVHDSize compares the size of VHD with QEMU's, over creators and geometries.
func TestForeignQEMUVHDSize(t *testing.T) {
	qemutest.Require(t)
	name := filepath.Join(t.TempDir(), "vhd")
	n := 0
	for _, subformat := range []string{"fixed", "dynamic"} {
		qemutest.Img(t, "create", "-q", "-f", "vpc", "-o", "subformat="+subformat, name, "10M")
		file, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, creator := range []string{"vpc ", "vs  ", "qemu", "qem2", "d2v ", "tap\x00", "tap ", "CTXS", "win ", "vbox", "Win ", "\x00\x00\x00\x00"} {
			for _, geometry := range []uint64{1<<16 | 4<<8 | 17, 200<<16 | 4<<8 | 17, 65535<<16 | 16<<8 | 255} {
				im := &foreignImage{format: ForeignVHD, file: bytes.Clone(file)}
				offs := []int64{int64(len(file)) - 512}
				if subformat == "dynamic" {
					offs = append(offs, 0)
				}
				for _, off := range offs {
					im.put([]byte(creator), off+28)
					im.be(off+48, 8, 9<<20+100)
					im.be(off+56, 4, geometry)
				}
				im.sumVHD()
				if err := os.WriteFile(name, im.file, 0o600); err != nil {
					t.Fatal(err)
				}
				var info struct {
					Size int64 `json:"virtual-size"`
				}
				out := qemutest.Img(t, "info", "-f", "vpc", "--output=json", name)
				if err := json.NewDecoder(strings.NewReader(out)).Decode(&info); err != nil {
					t.Fatal(err)
				}
				got, err := InspectForeign(im.reader(), im.size(), ForeignVHD, nil)
				if err != nil || got.VirtualSize != info.Size {
					t.Errorf("%s, creator %q, geometry %#x: %v, %v; QEMU's size is %d", subformat, creator, geometry, got, err, info.Size)
				}
				n++
			}
		}
	}
	t.Logf("%d sizes compared", n)
}

// TestForeignQEMUKilled reads a QED image whose writer was killed, whole and with clusters at its end that did not
// become part of the file. It reads as what qemu-img's repair makes of it.
func TestForeignQEMUKilled(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	qemutest.Img(t, "create", "-q", "-f", "qed", "-o", "cluster_size=4096,table_size=2", image, "20M")
	cmd := exec.Command("qemu-io", "-f", "qed", "-c", "write -P 1 0 10k", "-c", "write -P 2 3M 20k", "-c", "write -P 3 9M 30k",
		"-c", "flush", "-c", "sigraise 9", image)
	if out, err := cmd.CombinedOutput(); err == nil || cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("qemu-io was not killed: %v\n%s", err, out)
	}
	file, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	lost := 0
	for cut := 0; cut <= 16; cut++ {
		kept := file[:len(file)-cut*4096]
		if err := os.WriteFile(image, kept, 0o600); err != nil {
			t.Fatal(err)
		}
		im := &foreignImage{format: ForeignQED, file: kept}
		d := im.mustOpen(t, nil)
		if !d.Info().NeedsCheck {
			t.Fatal("the flag is not set")
		}
		got := make([]byte, d.Size())
		if _, err := d.ReadAt(got, 0); err != nil {
			t.Fatalf("without %d clusters: %v", cut, err)
		}
		if out, exit := qemutest.ImgExit(t, "check", "-f", "qed", "-r", "all", image); exit != 0 && exit != 3 { // 3: leaks are left
			t.Fatalf("qemu-img check: exit %d\n%s", exit, out)
		}
		raw := filepath.Join(dir, "raw")
		qemutest.Img(t, "convert", "-f", "qed", "-O", "raw", image, raw)
		want, err := os.ReadFile(raw)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("without %d clusters: not what the repaired image reads as, from %#x on", cut, firstDifference(got, want))
		}
		checkForeignExtents(t, d, kept, want)
		if got[9<<20] == 0 {
			lost++
		}
		mustClose(t, d)
	}
	if lost == 0 {
		t.Error("no cluster was cut off")
	}
	t.Logf("%d images, %d without what was written last", 17, lost)
}
