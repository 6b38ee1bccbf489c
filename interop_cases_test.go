package qcow2_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// Offsets of header fields that these tests look at or poke. qcow2 spec, "Header".
const (
	headerSize         = 24
	headerL1Size       = 36
	headerL1Off        = 40
	headerCompatible   = 80
	headerAutoclear    = 88
	headerHeaderLength = 100
)

// readFile returns the content of a file.
func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// poke writes b to a file at off.
func poke(t *testing.T, path string, off int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(b, off)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// open opens an image and closes it when the test ends, unless the test did.
func open(t *testing.T, path string, opts *qcow2.OpenOptions) *qcow2.Image {
	t.Helper()
	img, err := qcow2.Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return img
}

// closeImage closes an image.
func closeImage(t *testing.T, img *qcow2.Image) {
	t.Helper()
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// writeAt writes p at off.
func writeAt(t *testing.T, img *qcow2.Image, p []byte, off int64) {
	t.Helper()
	if _, err := img.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

// expectDisk compares the whole of an open image with want.
func expectDisk(t *testing.T, img *qcow2.Image, want []byte) {
	t.Helper()
	if img.Size() != int64(len(want)) {
		t.Fatalf("size %d, want %d", img.Size(), len(want))
	}
	got := make([]byte, len(want))
	if _, err := img.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("at guest %#x: %#x, want %#x", i, got[i], want[i])
		}
	}
}

// expectConverted compares the whole of an image, as qemu-img reads it, with want.
func expectConverted(t *testing.T, path string, want []byte) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	qemutest.Img(t, "convert", "-f", "qcow2", "-O", "raw", path, raw)
	got := readFile(t, raw)
	if !bytes.Equal(got, want) {
		i := 0
		for i < min(len(got), len(want)) && got[i] == want[i] {
			i++
		}
		t.Fatalf("qemu-img reads %d bytes, want %d; the first difference is at guest %#x", len(got), len(want), i)
	}
}

// text returns n bytes of the given pattern.
func text(pattern int, n int64) []byte {
	p := make([]byte, n)
	interopOp{pattern: pattern}.fill(p)
	return p
}

// TestInteropRefused has every combination that the matrix leaves out refused by Create, with an option of
// ours as the reason, and one for each reason by QEMU.
func TestInteropRefused(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	seen := make(map[string]bool)
	n := 0
	for _, kind := range interopKinds {
		for _, clusterSize := range []int64{512, 4 << 10, 64 << 10, 2 << 20} {
			for _, version := range []int{2, 3} {
				for bits := 1; bits <= 64; bits *= 2 {
					c := interopCase{interopKind: kind, clusterSize: clusterSize, version: version, refcountBits: bits}
					why := c.illegal()
					if why == "" {
						continue
					}
					path := filepath.Join(dir, "image")
					if strings.Contains(why, "snapshots") {
						if !seen[why] {
							qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", path, "1M")
							qemutest.IO(t, path, "write -q 0 64k")
							if _, exit := qemutest.ImgExit(t, "snapshot", "-q", "-c", "s", path); exit == 0 {
								t.Errorf("%v: QEMU makes a snapshot", c)
							}
							os.Remove(path)
							seen[why] = true
						}
						n++
						continue
					}
					opts := c.createOptions()
					opts.Open = &qcow2.OpenOptions{}
					if c.data {
						opts.DataFile = "data"
						opts.Open.DataFile = qcow2.NewMemoryStorage()
					}
					if c.backing != "" {
						opts.BackingFile, opts.BackingFormat = "backing", "raw"
					}
					s := qcow2.NewMemoryStorage()
					_, err := qcow2.CreateStorage(s, 1<<20, opts)
					if option := (*qcow2.OptionError)(nil); !errors.As(err, &option) {
						t.Errorf("%v: Create: %v, want an *OptionError since %s", c, err, why)
					}
					if size, _ := s.Size(); size != 0 {
						t.Errorf("%v: a refused Create left %d bytes", c, size)
					}
					n++
					if seen[why] {
						continue
					}
					seen[why] = true
					compat := []string{"0.10", "1.1"}[version-2]
					o := fmt.Sprintf("compat=%s,cluster_size=%d,refcount_bits=%d", compat, clusterSize, bits)
					if c.extended {
						o += ",extended_l2=on"
					}
					if c.compression != "" {
						o += ",compression_type=" + c.compression
					}
					if c.data {
						o += ",data_file=" + path + ".data"
					}
					if _, exit := qemutest.ImgExit(t, "create", "-q", "-f", "qcow2", "-o", o, path, "1M"); exit == 0 {
						t.Errorf("%v: QEMU makes it, though %s", c, why)
					}
				}
			}
		}
	}
	if n != interopLeftOut || len(seen) != 6 {
		t.Errorf("%d combinations refused for %d reasons, want %d and 6", n, len(seen), interopLeftOut)
	}
}

// TestInteropL1PastEnd opens an image of 192 KiB whose L1 table of 32 MiB lies past the end of the file,
// reads it, writes all over its 2 PiB, and has QEMU judge.
func TestInteropL1PastEnd(t *testing.T) {
	qemutest.Require(t)
	path := filepath.Join(t.TempDir(), "image.qcow2")
	qemutest.Dump(t, path)
	const size = int64(4<<20) << 29 // 4 Mi L1 entries of 512 MiB each
	qemutest.Img(t, "create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
	if err := os.Truncate(path, 192<<10); err != nil {
		t.Fatal(err)
	}
	header := readFile(t, path)
	if off, n := binary.BigEndian.Uint64(header[headerL1Off:]), binary.BigEndian.Uint32(header[headerL1Size:]); off != 192<<10 || n != 4<<20 {
		t.Fatalf("QEMU laid out an L1 table of %d entries at %#x, which is not what this test needs", n, off)
	}
	img := open(t, path, nil)
	got := bytes.Repeat([]byte{1}, 4096)
	if _, err := img.ReadAt(got, size-4096); err != nil || !bytes.Equal(got, make([]byte, 4096)) {
		t.Fatalf("read at the end: %v, %x..., want zeros", err, got[:8])
	}
	closeImage(t, img)
	img = open(t, path, &qcow2.OpenOptions{ReadWrite: true})
	offs := []int64{0, 1 << 29, 1<<29 + 200_000, size / 2, size - 100_000}
	var reads []string
	for i, off := range offs {
		writeAt(t, img, bytes.Repeat([]byte{byte(i + 1)}, 100_000), off)
		reads = append(reads, fmt.Sprintf("read -q -P %d %d 100000", i+1, off))
	}
	if err := img.WriteCompressed(bytes.Repeat([]byte{77}, 65536), size/4); err != nil {
		t.Fatal(err)
	}
	reads = append(reads, fmt.Sprintf("read -q -P 77 %d 65536", size/4), fmt.Sprintf("read -q -P 0 %d 65536", size/4+65536))
	closeImage(t, img)
	qemutest.CheckClean(t, path)
	qemutest.IOWith(t, qemutest.IOOptions{ReadOnly: true}, path, reads...)
	img = open(t, path, nil)
	for i, off := range offs {
		p := make([]byte, 100_000)
		if _, err := img.ReadAt(p, off); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{byte(i + 1)}, len(p))) {
			t.Errorf("read at %#x after reopening: %v, or not what was written", off, err)
		}
	}
}

// TestInteropEndsInsideCluster has files that end inside their last cluster: of data, of an L2 table, of
// compressed data. What is missing reads as zeros, and can be written.
func TestInteropEndsInsideCluster(t *testing.T) {
	qemutest.Require(t)
	const size, cluster = 4 << 20, 64 << 10
	tests := []struct {
		name string
		make []interopOp  // by QEMU
		cut  func() int64 // the file's new size, or nil
		lost int64        // guest offset from which on the first cluster is zero, or -1
	}{
		{
			name: "data",
			make: []interopOp{{kind: opWrite, off: 0, n: cluster}},
			cut:  func() int64 { return 5*cluster + 1000 },
			lost: 1000,
		},
		{
			name: "L2 table",
			make: []interopOp{{kind: opZero, off: 0, n: cluster}},
			cut:  func() int64 { return 4*cluster + 8 },
			lost: 0,
		},
		{
			name: "compressed",
			make: []interopOp{{kind: opCompressed, off: 0, n: cluster}},
			cut:  nil, // QEMU ends the file with the payload
			lost: -1,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "image.qcow2")
			qemutest.Dump(t, path)
			pattern := filepath.Join(dir, "pattern")
			if err := os.WriteFile(pattern, interopPeriods[0], 0o600); err != nil {
				t.Fatal(err)
			}
			qemutest.Img(t, "create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
			want := make([]byte, size)
			for _, o := range tt.make {
				switch o.kind {
				case opWrite:
					qemutest.IO(t, path, fmt.Sprintf("write -q -s %s %d %d", pattern, o.off, o.n))
					o.fill(want[:o.n])
				case opCompressed:
					qemutest.IO(t, path, fmt.Sprintf("write -q -c -s %s %d %d", pattern, o.off, o.n))
					o.fill(want[:o.n])
				case opZero:
					qemutest.IO(t, path, fmt.Sprintf("write -q -z %d %d", o.off, o.n))
				}
			}
			before := int64(len(readFile(t, path)))
			end := before
			if tt.cut != nil {
				end = tt.cut()
			}
			if end > before || end%512 == 0 {
				t.Fatalf("cut at %d of %d bytes: not inside a sector of the file", end, before)
			}
			if err := os.Truncate(path, end); err != nil {
				t.Fatal(err)
			}
			if tt.lost >= 0 {
				clear(want[tt.lost:cluster])
			}
			expectConverted(t, path, want)
			img := open(t, path, nil)
			expectDisk(t, img, want)
			closeImage(t, img)

			img = open(t, path, &qcow2.OpenOptions{ReadWrite: true})
			for i, off := range []int64{5000, cluster + 300, 3*cluster - 77} {
				p := text(i+1, 999)
				writeAt(t, img, p, off)
				copy(want[off:], p)
			}
			expectDisk(t, img, want)
			closeImage(t, img)
			qemutest.CheckClean(t, path)
			expectConverted(t, path, want)
		})
	}
}

// TestInteropOddSize gives the header sizes that are not multiples of 512: QEMU and we round them down.
func TestInteropOddSize(t *testing.T) {
	qemutest.Require(t)
	for _, tt := range []struct{ header, want int64 }{{1000, 512}, {513, 512}, {511, 0}, {65536 + 1023, 65536 + 512}} {
		t.Run(fmt.Sprint(tt.header), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image.qcow2")
			qemutest.Dump(t, path)
			qemutest.Img(t, "create", "-q", "-f", "qcow2", path, "1M")
			poke(t, path, headerSize, binary.BigEndian.AppendUint64(nil, uint64(tt.header)))
			expectInfo(t, path, nil)
			img := open(t, path, &qcow2.OpenOptions{ReadWrite: true})
			if got := img.Info(); got.HeaderSize != tt.header || got.VirtualSize != tt.want || img.Size() != tt.want {
				t.Errorf("header size %d, virtual size %d, Size %d, want %d, %d, %d", got.HeaderSize, got.VirtualSize, img.Size(), tt.header, tt.want, tt.want)
			}
			want := text(1, tt.want)
			writeAt(t, img, want, 0)
			if _, err := img.WriteAt([]byte{1}, tt.want); !errors.Is(err, qcow2.ErrRange) {
				t.Errorf("write at %d: %v, want ErrRange", tt.want, err)
			}
			if n, err := img.ReadAt(make([]byte, 1), tt.want); n != 0 || err != io.EOF {
				t.Errorf("read at %d: %d, %v, want EOF", tt.want, n, err)
			}
			closeImage(t, img)
			if got := binary.BigEndian.Uint64(readFile(t, path)[headerSize:]); got != uint64(tt.header) {
				t.Errorf("the header's size is %d afterwards, want %d", got, tt.header)
			}
			qemutest.CheckClean(t, path)
			expectConverted(t, path, want)
		})
	}
}

// bitmapFlags returns the flags that qemu-img info shows for each bitmap.
func bitmapFlags(t *testing.T, path string) map[string][]string {
	t.Helper()
	list, _ := qemutest.Info(t, path)["format-specific"].(map[string]any)["data"].(map[string]any)["bitmaps"].([]any)
	out := make(map[string][]string)
	for _, b := range list {
		b := b.(map[string]any)
		flags := []string{}
		for _, f := range b["flags"].([]any) {
			flags = append(flags, f.(string))
		}
		slices.Sort(flags)
		out[b["name"].(string)] = flags
	}
	return out
}

// TestInteropBitmaps opens and writes images with persistent bitmaps: opening changes nothing, the first
// write marks all of them in use before guest data changes, and no cluster leaks (I9).
func TestInteropBitmaps(t *testing.T) {
	qemutest.Require(t)
	for _, cluster := range []int{512, 64 << 10} {
		t.Run(fmt.Sprint(cluster), func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "image.qcow2")
			qemutest.Dump(t, path)
			qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", cluster), path, "1M")
			qemutest.Img(t, "bitmap", "--add", path, "one")
			qemutest.Img(t, "bitmap", "--add", "--disable", path, "two")
			qemutest.Img(t, "bitmap", "--add", "-g", "4096", path, "a third one")
			qemutest.IO(t, path, "write -q -P 3 1000 70000")
			fresh := map[string][]string{"one": {"auto"}, "two": {}, "a third one": {"auto"}}
			if d := cmp.Diff(fresh, bitmapFlags(t, path)); d != "" {
				t.Fatalf("bitmaps as QEMU made them (-want +got):\n%s", d)
			}
			expectInfo(t, path, nil)
			before := readFile(t, path)
			closeImage(t, open(t, path, nil))
			closeImage(t, open(t, path, &qcow2.OpenOptions{ReadWrite: true}))
			if !bytes.Equal(readFile(t, path), before) {
				t.Error("opening and closing changed the file")
			}

			img := open(t, path, &qcow2.OpenOptions{ReadWrite: true})
			writeAt(t, img, text(1, 3000), 500_000)
			if err := img.WriteCompressed(text(2, int64(cluster)), 64<<10); err != nil {
				t.Fatal(err)
			}
			closeImage(t, img)
			used := map[string][]string{"one": {"auto", "in-use"}, "two": {"in-use"}, "a third one": {"auto", "in-use"}}
			if d := cmp.Diff(used, bitmapFlags(t, path)); d != "" {
				t.Errorf("bitmaps after our write (-want +got):\n%s", d)
			}
			qemutest.CheckClean(t, path)
			expectInfo(t, path, nil)
			want := make([]byte, 1<<20)
			copy(want[1000:], bytes.Repeat([]byte{3}, 70000))
			copy(want[500_000:], text(1, 3000))
			copy(want[64<<10:], text(2, int64(cluster)))
			expectConverted(t, path, want)
			// QEMU can still remove them, and nothing of them is left.
			for _, name := range []string{"one", "two", "a third one"} {
				qemutest.Img(t, "bitmap", "--remove", path, name)
			}
			qemutest.CheckClean(t, path)
		})
	}
}

// extensions returns the header extensions of an image, up to the end marker: type, length and data of
// each, padded.
func extensions(t *testing.T, path string) (all []byte, end int64) {
	t.Helper()
	b := readFile(t, path)
	start := int64(binary.BigEndian.Uint32(b[headerHeaderLength:]))
	for pos := start; ; {
		typ, n := binary.BigEndian.Uint32(b[pos:]), int64(binary.BigEndian.Uint32(b[pos+4:]))
		if typ == 0 {
			return b[start:pos], pos
		}
		pos += 8 + (n+7)&^7
	}
}

// TestInteropUnknown gives an image header extensions, compatible and autoclear features that nobody knows.
// A reader leaves all of them; a writable open clears the autoclear features alone (I9).
func TestInteropUnknown(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "image.qcow2")
	qemutest.Dump(t, path)
	qemutest.Img(t, "create", "-q", "-f", "qcow2", path, "1M")
	qemutest.Img(t, "bitmap", "--add", path, "one")
	_, end := extensions(t, path)
	unknown := []byte("\x12\x34\x56\x78\x00\x00\x00\x05hello\x00\x00\x00" + "\x87\x65\x43\x21\x00\x00\x00\x00" + "\x11\x22\x33\x44\x00\x00\x00\x08extended")
	poke(t, path, end, append(unknown, make([]byte, 8)...))
	const compatible, autoclear uint64 = 1<<17 | 1<<40, 1<<9 | 1<<63
	known := binary.BigEndian.Uint64(readFile(t, path)[headerAutoclear:])
	if known != 1 {
		t.Fatalf("autoclear features %#x, want the bitmaps' alone", known)
	}
	poke(t, path, headerCompatible, binary.BigEndian.AppendUint64(nil, compatible))
	poke(t, path, headerAutoclear, binary.BigEndian.AppendUint64(nil, autoclear|known))

	before := readFile(t, path)
	img := open(t, path, nil)
	info := img.Info()
	if d := cmp.Diff([]uint32{0x12345678, 0x87654321, 0x11223344}, info.UnknownExtensions); d != "" {
		t.Errorf("unknown extensions (-want +got):\n%s", d)
	}
	if len(info.UnknownCompatible) != 2 || len(info.UnknownAutoclear) != 2 || len(info.UnknownIncompatible) != 0 {
		t.Errorf("unknown features: compatible %q, autoclear %q, incompatible %q", info.UnknownCompatible, info.UnknownAutoclear, info.UnknownIncompatible)
	}
	closeImage(t, img)
	if !bytes.Equal(readFile(t, path), before) {
		t.Error("a reader changed the file")
	}
	exts, _ := extensions(t, path)
	img = open(t, path, &qcow2.OpenOptions{ReadWrite: true})
	b := readFile(t, path)
	if got := binary.BigEndian.Uint64(b[headerAutoclear:]); got != known {
		t.Errorf("autoclear features %#x after a writable open, want %#x", got, known)
	}
	writeAt(t, img, text(1, 5000), 70_000)
	closeImage(t, img)
	b = readFile(t, path)
	if got := binary.BigEndian.Uint64(b[headerCompatible:]); got != compatible {
		t.Errorf("compatible features %#x, want %#x", got, compatible)
	}
	if got := binary.BigEndian.Uint64(b[headerAutoclear:]); got != known {
		t.Errorf("autoclear features %#x after writing, want %#x", got, known)
	}
	if got, _ := extensions(t, path); !bytes.Equal(got, exts) {
		t.Errorf("header extensions changed:\n%q\n%q", exts, got)
	}
	qemutest.CheckClean(t, path)
	want := make([]byte, 1<<20)
	copy(want[70_000:], text(1, 5000))
	expectConverted(t, path, want)
	if d := cmp.Diff(map[string][]string{"one": {"auto", "in-use"}}, bitmapFlags(t, path)); d != "" {
		t.Errorf("bitmaps (-want +got):\n%s", d)
	}
}

// TestInteropChain reads and writes the top of a chain of three images in nested directories, each named
// as its overlay sees it, through ResolveBeside, and compares depth by depth with qemu-img map.
func TestInteropChain(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "sub", "deep"), 0o700); err != nil {
		t.Fatal(err)
	}
	top := filepath.Join(dir, "top.qcow2")
	mid := filepath.Join(dir, "sub", "mid.qcow2")
	base := filepath.Join(dir, "sub", "deep", "base.qcow2")
	qemutest.Dump(t, top, mid, base)
	qemutest.Img(t, "create", "-q", "-f", "qcow2", base, "1M")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "-b", "deep/base.qcow2", "-F", "qcow2", mid, "1500K")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", "sub/mid.qcow2", "-F", "qcow2", top, "2M")
	qemutest.IO(t, base, "write -q -P 1 0 600k", "write -q -z 100k 64k")
	qemutest.IO(t, mid, "write -q -P 2 300k 500k", "write -q -z 500k 100k", "write -q -P 3 1400k 100k")
	qemutest.IO(t, top, "write -q -P 4 700k 33k", "write -q -z 40k 20k")
	want := make([]byte, 2<<20)
	fill := func(b byte, off, n int) { copy(want[off<<10:], bytes.Repeat([]byte{b}, n<<10)) }
	fill(1, 0, 600)
	fill(0, 100, 64)
	fill(2, 300, 500)
	fill(0, 500, 100)
	fill(3, 1400, 100)
	fill(4, 700, 33)
	fill(0, 40, 20)

	opts := &qcow2.OpenOptions{Resolver: qcow2.ResolveBeside(dir)}
	img := open(t, top, opts)
	expectDisk(t, img, want)
	type run struct {
		Off, Len int64
		Depth    int
	}
	add := func(runs []run, x run) []run {
		if n := len(runs) - 1; n >= 0 && runs[n].Depth == x.Depth && runs[n].Off+runs[n].Len == x.Off {
			runs[n].Len += x.Len
			return runs
		}
		return append(runs, x)
	}
	var got, qemu []run
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind != qcow2.ExtentUnallocated {
			got = add(got, run{e.Off, e.Len, e.Depth})
		}
	}
	for _, e := range qemutest.Map(t, top) {
		if e.Present {
			qemu = add(qemu, run{e.Start, e.Length, e.Depth})
		}
	}
	if d := cmp.Diff(qemu, got); d != "" {
		t.Errorf("who holds what (-qemu-img map +Extents):\n%s", d)
	}
	closeImage(t, img)

	below := [][]byte{readFile(t, mid), readFile(t, base)}
	img = open(t, top, &qcow2.OpenOptions{ReadWrite: true, Resolver: opts.Resolver})
	for i, off := range []int64{30_000, 513_000, 819_200, 1_400_000, 2<<20 - 999} {
		p := text(i+1, 999)
		writeAt(t, img, p, off)
		copy(want[off:], p)
	}
	if err := img.WriteCompressed(text(9, 64<<10), 128<<10); err != nil {
		t.Fatal(err)
	}
	copy(want[128<<10:], text(9, 64<<10))
	expectDisk(t, img, want)
	closeImage(t, img)
	qemutest.CheckClean(t, top)
	expectConverted(t, top, want)
	if !bytes.Equal(below[0], readFile(t, mid)) || !bytes.Equal(below[1], readFile(t, base)) {
		t.Error("writing the overlay changed what lies below")
	}
}

// heldQEMU is a qemu-io process that holds an image open until it is told to end.
type heldQEMU struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// holdByQEMU starts qemu-io on the image and returns once it has it open. It ends with the test.
func holdByQEMU(t *testing.T, args ...string) *heldQEMU {
	t.Helper()
	h := &heldQEMU{cmd: exec.Command("qemu-io", args...)}
	var err error
	if h.in, err = h.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	h.out = bufio.NewReader(out)
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.end() })
	// It answers once the image is open.
	if _, err := io.WriteString(h.in, "length\n"); err != nil {
		t.Fatal(err)
	}
	for {
		line, err := h.out.ReadString('\n')
		if err != nil {
			t.Fatalf("qemu-io %q: %v", args, err)
		}
		if strings.Contains(line, "MiB") {
			return h
		}
	}
}

// end has the process end and waits for it. A second call does nothing.
func (h *heldQEMU) end() {
	if h.cmd != nil {
		io.WriteString(h.in, "quit\n")
		h.in.Close()
		io.Copy(io.Discard, h.out)
		h.cmd.Wait()
		h.cmd = nil
	}
}

// TestInteropLocks has us and QEMU hold an image against each other, as readers and writers.
func TestInteropLocks(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	path, base := filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "base.qcow2")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", base, "1M")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path)
	resolver := qcow2.ResolveBeside(dir)
	reader, writer := &qcow2.OpenOptions{Resolver: resolver}, &qcow2.OpenOptions{Resolver: resolver, ReadWrite: true}
	shared := &qcow2.OpenOptions{Resolver: resolver, Lock: qcow2.LockShare}
	img := open(t, path, reader)
	if locked := img.Info().Locked; !locked {
		qemutest.Missing(t, "no image locks here")
	}
	closeImage(t, img)

	// try has QEMU open an image and reports whether it could.
	tools := map[string]func(t *testing.T, path string) bool{
		"info": func(t *testing.T, path string) bool {
			_, exit := qemutest.ImgExit(t, "info", "-f", "qcow2", path)
			return exit == 0
		},
		"info -U": func(t *testing.T, path string) bool {
			_, exit := qemutest.ImgExit(t, "info", "-U", "-f", "qcow2", path)
			return exit == 0
		},
		"check": func(t *testing.T, path string) bool {
			_, exit := qemutest.ImgExit(t, "check", "-q", "-f", "qcow2", path)
			return exit == 0
		},
		"read": func(t *testing.T, path string) bool {
			_, exit := qemutest.IOExit(t, qemutest.IOOptions{ReadOnly: true}, path, "read 0 512")
			return exit == 0
		},
		"read -U": func(t *testing.T, path string) bool {
			_, exit := qemutest.IOExit(t, qemutest.IOOptions{ReadOnly: true, ForceShare: true}, path, "read 0 512")
			return exit == 0
		},
		"write": func(t *testing.T, path string) bool {
			_, exit := qemutest.IOExit(t, qemutest.IOOptions{}, path, "write 0 512")
			return exit == 0
		},
		"snapshot": func(t *testing.T, path string) bool {
			_, exit := qemutest.ImgExit(t, "snapshot", "-q", "-c", "s", path)
			return exit == 0
		},
	}
	everything := []string{"check", "info", "info -U", "read", "read -U", "snapshot", "write"}
	beside := []string{"check", "info", "info -U", "read", "read -U"}
	for _, tt := range []struct {
		name   string
		opts   *qcow2.OpenOptions
		target string   // what QEMU tries
		want   []string // what it can
	}{
		{"writer", writer, path, []string{"info -U", "read -U"}},
		{"reader", reader, path, beside},
		{"sharing reader", shared, path, everything},
		{"unlocked", &qcow2.OpenOptions{Resolver: resolver, Lock: qcow2.LockOff}, path, everything},
		{"backing file of a writer", writer, base, beside},
		{"backing file of a reader", reader, base, beside},
	} {
		t.Run("we hold/"+tt.name, func(t *testing.T) {
			img := open(t, path, tt.opts)
			var can []string
			for name, try := range tools {
				if try(t, tt.target) {
					can = append(can, name)
				}
			}
			slices.Sort(can)
			if d := cmp.Diff(tt.want, can); d != "" {
				t.Errorf("what QEMU can (-want +got):\n%s", d)
			}
			closeImage(t, img)
			if !tools["write"](t, tt.target) {
				t.Error("QEMU cannot write after Close")
			}
		})
	}

	for _, tt := range []struct {
		name                   string
		args                   []string
		reader, writer, shared bool // whether we can
	}{
		{"writer", []string{"-f", "qcow2", path}, false, false, true},
		{"reader", []string{"-r", "-f", "qcow2", path}, true, false, true},
		{"writer of the backing file", []string{"-f", "qcow2", base}, false, false, true},
		{"reader of the backing file", []string{"-r", "-f", "qcow2", base}, true, true, true},
	} {
		t.Run("QEMU holds/"+tt.name, func(t *testing.T) {
			h := holdByQEMU(t, tt.args...)
			for _, us := range []struct {
				name string
				opts *qcow2.OpenOptions
				want bool
			}{{"reader", reader, tt.reader}, {"writer", writer, tt.writer}, {"sharing reader", shared, tt.shared}} {
				img, err := qcow2.Open(path, us.opts)
				switch {
				case us.want && err != nil:
					t.Errorf("we as %s: %v", us.name, err)
				case !us.want && !errors.Is(err, qcow2.ErrLocked):
					t.Errorf("we as %s: %v, want ErrLocked", us.name, err)
				}
				if err == nil {
					closeImage(t, img)
				}
			}
			// Create refuses too, before it touches the file.
			if strings.HasSuffix(tt.args[len(tt.args)-1], "image.qcow2") {
				before := readFile(t, path)
				img, err := qcow2.Create(path, 1<<20, &qcow2.CreateOptions{Overwrite: true})
				if !errors.Is(err, qcow2.ErrLocked) {
					t.Errorf("Create over it: %v, want ErrLocked", err)
				}
				if err == nil {
					closeImage(t, img)
				}
				if !bytes.Equal(before, readFile(t, path)) {
					t.Error("a refused Create changed the file")
				}
			}
			h.end()
			closeImage(t, open(t, path, writer))
		})
	}
}
