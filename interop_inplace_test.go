package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/qemutest"
)

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
	raw := filepath.Join(dir, "disk.raw")
	makeFileSystem(t, raw, 24<<20)
	if err := os.Truncate(raw, 24<<20+512); err != nil {
		t.Fatal(err)
	}
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
			t.Logf("%d of %d bytes written, file of %d", counted.written.Load(), fileSize(t, raw), fileSize(t, name))
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

// makeForeign makes an image of a foreign format of a raw disk.
func makeForeign(t testing.TB, format ForeignFormat, options, raw, image string) {
	t.Helper()
	args := []string{"convert", "-f", "raw", "-O", string(format)}
	if options != "" {
		args = append(args, "-o", options)
	}
	qemutest.Img(t, append(args, raw, image)...)
}

// inPlaceForeign returns the conversion of an image of a foreign format, in the named file. Its backing file, if there is
// one, is in the file below.
func inPlaceForeign(t testing.TB, name string, format ForeignFormat, below string) *inPlaceScenario {
	t.Helper()
	source, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	sc := &inPlaceScenario{name: name, source: source, format: format}
	if below != "" {
		s := openForUpdate(t, below)
		if sc.below, err = NewRawDisk(s); err != nil {
			t.Fatal(err)
		}
		sc.opts.BackingFile, sc.opts.BackingFormat = filepath.Base(below), "raw"
	}
	return sc
}

// TestConvertInPlaceForeign converts images of foreign formats that qemu-img has made, with the largest clusters that
// suit them and with the smallest: QEMU finds the same content in the clean image. What an interrupted conversion
// leaves is, to QEMU, still the image that it was; resumed, it is the same image, and rolled back, the same file.
func TestConvertInPlaceForeign(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	raws := []string{filepath.Join(dir, "file system"), filepath.Join(dir, "pattern"), filepath.Join(dir, "large")}
	makeFileSystem(t, raws[0], 8<<20)
	makePattern(t, raws[1], 5<<20+512*7, 11)
	makePattern(t, raws[2], 200<<20, 5) // to a VDI, whose table of blocks has two sectors then, and data stands behind three
	for i, kind := range foreignKinds {
		for j, raw := range raws {
			if j == 2 && kind.name != "vdi dynamic" || os.Getenv(inPlaceStatesEnv) == "" && j < 2 && (i+j)%2 == 0 {
				continue // one disk of each in every run
			}
			t.Run(kind.name+" "+filepath.Base(raw), func(t *testing.T) {
				image := filepath.Join(dir, fmt.Sprintf("image%d.%d", i, j))
				want := image + ".raw"
				makeForeign(t, kind.format, kind.options, raw, image)
				qemutest.Img(t, "convert", "-f", string(kind.format), "-O", "raw", image, want)
				sc := inPlaceForeign(t, image, kind.format, "")
				d := sc.disk()
				err := sc.convert(crashStorage{d}, inPlaceSyncNone)
				switch odd := strings.HasPrefix(kind.name, "vhd dynamic"); {
				case odd || j == 2:
					if !errors.Is(err, ErrNotAligned) || !bytes.Equal(d.Bytes(), sc.source) {
						t.Errorf("error %v, want ErrNotAligned", err)
					}
				case err != nil:
					t.Error(err)
				default:
					checkConverted(t, d, want)
					checkInterrupted(t, sc, image, want)
				}
				sc.opts.ClusterSize = 512
				d = sc.disk()
				if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
					t.Fatal(err)
				}
				checkConverted(t, d, want)
				checkInterrupted(t, sc, image, want)
			})
		}
	}
}

// checkInterrupted interrupts the conversion of an image, before the switch, and judges what is left, as
// TestConvertInPlaceForeign tells. want is its content.
func checkInterrupted(t testing.TB, sc *inPlaceScenario, image, want string) {
	t.Helper()
	d := interrupted(t, sc, false)
	half := image + ".half"
	if err := d.WriteFile(half); err != nil {
		t.Fatal(err)
	}
	qemutest.Compare(t, half, string(sc.format), want, "raw")
	back := d.Clone()
	if found, err := RollbackInPlace(t.Context(), crashStorage{back}, int64(len(sc.source))); err != nil || !bytes.Equal(back.Bytes(), sc.source) {
		t.Errorf("roll back: %s", stringOf(found, err))
	}
	if found, err := sc.resume(crashStorage{d}); err != nil {
		t.Errorf("resume: %s", stringOf(found, err))
	}
	checkConverted(t, d, want)
}

// TestConvertInPlaceBacking converts a QED image that has a backing file: the image has the same one.
func TestConvertInPlaceBacking(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	base, image, want := filepath.Join(dir, "base"), filepath.Join(dir, "image"), filepath.Join(dir, "want")
	makePattern(t, base, 4<<20+512, 9)
	qemutest.Img(t, "create", "-f", "qed", "-b", base, "-F", "raw", image, "6M")
	qemutest.IOWith(t, qemutest.IOOptions{Format: "qed"}, image, "write -P 5 100k 300k", "write -z 1M 256k", "write -P 6 6000k 10k", "write -P 7 0 70k")
	qemutest.Img(t, "convert", "-f", "qed", "-O", "raw", image, want)
	sc := inPlaceForeign(t, image, ForeignQED, base)
	d := sc.disk()
	if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "image.qcow2")
	if err := d.WriteFile(name); err != nil {
		t.Fatal(err)
	}
	qemutest.CheckClean(t, name)
	qemutest.Compare(t, want, "raw", name, "qcow2")
	if depth := qemutest.Map(t, name); !slices.ContainsFunc(depth, func(e qemutest.MapEntry) bool { return e.Depth == 1 && e.Data }) {
		t.Error("nothing of the backing file shows")
	}
	sc.opts.BackingFile, sc.opts.BackingFormat = "", ""
	var option *OptionError
	if err := sc.convert(crashStorage{sc.disk()}, inPlaceSyncNone); !errors.As(err, &option) || option.Option != "BackingFile" {
		t.Errorf("without the backing file's name: %v", err)
	}
}

// TestConvertInPlaceForeignCrash judges crash states of conversions of foreign images, as TestInPlaceCrash does.
func TestConvertInPlaceForeignCrash(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	makePattern(t, raw, 1<<20+512*7, 5)
	o := crashtest.Options{PerPoint: 6}
	if os.Getenv(inPlaceStatesEnv) != "" {
		o.PerPoint = 200
	}
	for i, kind := range foreignKinds {
		if strings.Contains(kind.name, "2M") {
			continue // much of the same
		}
		image := filepath.Join(dir, fmt.Sprintf("image%d", i))
		makeForeign(t, kind.format, kind.options, raw, image)
		sc := inPlaceForeign(t, image, kind.format, "")
		sc.opts.ClusterSize = 512
		l, err := newInPlaceLook(sc)
		if err != nil {
			t.Fatalf("%s: %v", kind.name, err)
		}
		do := func(s Storage) error { return sc.convert(s, inPlaceSyncNone) }
		stats, err := l.crash(sc.disk(), rand.New(rand.NewPCG(uint64(i), 7)), o, inPlaceConverted{}, do, nil)
		if err != nil {
			t.Errorf("%s: %v", kind.name, err)
		}
		t.Logf("%s: %v; %d were the source, %d between, %d the image", kind.name, stats, l.sources, l.halves, l.images)
	}
}
