package qcow2

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// makeFilesystem makes a raw disk of size bytes with a file system that holds some files, and returns its name.
func makeFilesystem(t testing.TB, dir string, size int64) string {
	t.Helper()
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		for _, name := range []string{"/sbin/mke2fs", "/usr/sbin/mke2fs"} {
			if _, serr := os.Stat(name); serr == nil {
				mke2fs, err = name, nil
			}
		}
	}
	if err != nil {
		qemutest.Missing(t, "%v (Debian: apt-get install e2fsprogs)", err)
	}
	name := filepath.Join(dir, "disk.raw")
	if err := os.WriteFile(name, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mke2fs, "-q", "-F", "-t", "ext4", "-d", "internal", name).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	return name
}

// copySparse copies a raw disk to a new file of that name in its directory, with its holes, and returns that.
func copySparse(t testing.TB, from, name string) string {
	t.Helper()
	to := filepath.Join(filepath.Dir(from), name)
	qemutest.Img(t, "convert", "-f", "raw", "-O", "raw", from, to)
	return to
}

// openForUpdate opens a host file for reading and writing, until the test ends.
func openForUpdate(t testing.TB, name string) *FileStorage {
	t.Helper()
	s, err := OpenFileStorage(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// fileSize returns the length of a file in bytes.
func fileSize(t testing.TB, name string) int64 {
	t.Helper()
	fi, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}

// TestConvertInPlaceQEMU converts a raw disk with a file system in place: QEMU finds the image clean, and the same
// content in it, grows it, and writes to it.
func TestConvertInPlaceQEMU(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	raw := makeFilesystem(t, dir, 24<<20+512)
	for i, o := range []InPlaceOptions{
		{},
		{ClusterSize: 512, RefcountBits: 1},
		{ClusterSize: 2 << 20, RefcountBits: 64, Compression: CompressionZstd},
		{ClusterSize: 4096, Version: 2},
		{LazyRefcounts: true, RefcountBits: 8},
	} {
		t.Run(fmt.Sprintf("%d", i), func(t *testing.T) {
			name := copySparse(t, raw, fmt.Sprintf("image%d", i))
			qemutest.Dump(t, name)
			s := openForUpdate(t, name)
			counted := &countedStorage{Storage: s}
			src, err := NewRawDisk(counted)
			if err != nil {
				t.Fatal(err)
			}
			if err := ConvertInPlace(t.Context(), counted, src, &o); err != nil {
				t.Fatal(err)
			}
			qemutest.CheckClean(t, name)
			qemutest.Compare(t, raw, "raw", name, "qcow2")
			t.Logf("%d of %d bytes written, file of %d", counted.written, fileSize(t, raw), fileSize(t, name))
			// It goes on as any image.
			want := copySparse(t, raw, fmt.Sprintf("raw%d", i))
			qemutest.IOWith(t, qemutest.IOOptions{Format: "raw"}, want, "write -P 7 70k 300k", "write -P 9 0 512")
			qemutest.IO(t, name, "write -P 7 70k 300k", "write -P 9 0 512")
			qemutest.Img(t, "resize", "-f", "raw", want, "30M")
			qemutest.Img(t, "resize", "-f", "qcow2", name, "30M")
			qemutest.CheckClean(t, name)
			qemutest.Compare(t, want, "raw", name, "qcow2")
		})
	}
}

// countedStorage counts the bytes that are written.
type countedStorage struct {
	Storage
	written int64
}

// WriteAt implements Storage.
func (s *countedStorage) WriteAt(p []byte, off int64) (int, error) {
	s.written += int64(len(p))
	return s.Storage.WriteAt(p, off)
}

// TestConvertInPlaceVHD converts a VHD of fixed size. Until the header is switched, QEMU reads the file as the VHD that
// it was; afterwards, and after it has grown, nothing of the VHD's footer is to be seen.
func TestConvertInPlaceVHD(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	raw := makeFilesystem(t, dir, 6<<20+4096)
	vhd := filepath.Join(dir, "disk.vhd")
	qemutest.Img(t, "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size=on", raw, vhd)
	source, err := os.ReadFile(vhd)
	if err != nil {
		t.Fatal(err)
	}
	size := fileSize(t, raw)
	sc := inPlaceScenario{source: source, layout: &testLayout{size: size, extents: []Extent{{Len: size, Kind: ExtentData}}}}
	half := filepath.Join(dir, "half.vhd")
	if err := interrupted(t, &sc, false).WriteFile(half); err != nil {
		t.Fatal(err)
	}
	if fileSize(t, half) <= fileSize(t, vhd) {
		t.Error("the file has not grown")
	}
	qemutest.Compare(t, raw, "raw", half, "vpc")
	d := sc.disk()
	if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
		t.Fatal(err)
	}
	checkConverted(t, d, raw)
}

// checkConverted wants of a converted file that QEMU finds it clean, and the content of the raw disk in it, also after
// both have grown.
func checkConverted(t testing.TB, d *crashtest.Disk, raw string) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.qcow2")
	if err := d.WriteFile(name); err != nil {
		t.Fatal(err)
	}
	qemutest.Dump(t, name)
	qemutest.CheckClean(t, name)
	qemutest.Compare(t, raw, "raw", name, "qcow2")
	qemutest.Img(t, "resize", "-f", "qcow2", name, "+1M")
	qemutest.Compare(t, raw, "raw", name, "qcow2")
	qemutest.CheckClean(t, name)
}
