package qcow2

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// TestInteropResize resizes images in turns with QEMU, which checks and compares after each: every cluster size,
// widths of refcounts, both versions, extended L2, backing files longer than the disk, data files, and preallocation
// by either side.
func TestInteropResize(t *testing.T) {
	qemutest.Require(t)
	tests := []struct {
		name string
		args string // options of qemu-img create
		size int64
	}{
		{"512", "cluster_size=512", 300<<10 + 512},
		{"1k bits", "cluster_size=1k,refcount_bits=1", 300<<10 + 512},
		{"2k 64 bits", "cluster_size=2k,refcount_bits=64", 500<<10 + 512},
		{"4k version 2", "cluster_size=4k,compat=0.10", 500<<10 + 512},
		{"8k over a base", "cluster_size=8k,backing_file=base,backing_fmt=raw", 500<<10 + 512},
		{"16k extended over a base", "cluster_size=16k,extended_l2=on,backing_file=base,backing_fmt=raw", 500<<10 + 512},
		{"32k version 2 over a base", "cluster_size=32k,compat=0.10,backing_file=base,backing_fmt=raw", 500<<10 + 512},
		{"64k", "cluster_size=64k,lazy_refcounts=on", 2<<20 + 512},
		{"128k extended", "cluster_size=128k,extended_l2=on", 2<<20 + 512},
		{"256k", "cluster_size=256k,refcount_bits=8", 3<<20 + 512},
		{"1M", "cluster_size=1M", 7<<20 + 512},
		{"2M", "cluster_size=2M", 9<<20 + 512},
		{"data file", "cluster_size=4k,data_file=data", 500<<10 + 512},
		{"raw data file", "cluster_size=4k,data_file=data,data_file_raw=on", 500<<10 + 512},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			base := fillRepeated(tt.size * 2)
			writeTestFile(t, "base", base)
			want := make([]byte, tt.size)
			qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", tt.args, "image", fmt.Sprint(tt.size))
			if qemutest.Info(t, "image")["backing-filename"] != nil {
				copy(want, base)
			}
			resolver := ResolverFunc(func(ref FileRef) (Storage, error) { return OpenFileStorage(ref.Name, os.O_RDWR, 0) })
			sizes := []int64{tt.size / 3, tt.size * 9 / 5}
			if i%2 == 0 {
				sizes = []int64{tt.size * 7 / 5, tt.size / 2, tt.size * 9 / 5}
			}
			for k, size := range sizes {
				size = size/512*512 + int64(k%2)*512
				mode := Preallocation(rng.IntN(4))
				if size < int64(len(want)) {
					mode = PreallocationOff
				}
				// The one who resizes writes before and after. QEMU has no zeros for version 2 over a base.
				if (k+i)%2 == 0 || strings.Contains(tt.name, "version 2 over") {
					img, err := Open("image", &OpenOptions{ReadWrite: true, Resolver: resolver})
					if err != nil {
						t.Fatal(err)
					}
					ourWrite(t, img, want, rng)
					if err := img.Resize(t.Context(), size, &ResizeOptions{Shrink: true, Preallocation: mode}); err != nil {
						t.Fatal(err)
					}
					want = resized(want, size)
					ourWrite(t, img, want, rng)
					mustClose(t, img)
				} else {
					theirWrite(t, want, rng)
					args := []string{"resize", "-q", "-f", "qcow2", "--preallocation=" + mode.String()}
					if size < int64(len(want)) {
						args = append(args, "--shrink")
					}
					qemutest.Img(t, append(args, "image", fmt.Sprint(size))...)
					want = resized(want, size)
					theirWrite(t, want, rng)
				}
				qemutest.CheckClean(t, "image")
				writeTestFile(t, "want", want)
				qemutest.Compare(t, "image", "qcow2", "want", "raw")
				expectFileContent(t, "image", resolver, want)
			}
		})
	}
}

// resized returns the content of a disk once it has another size.
func resized(content []byte, size int64) []byte {
	out := make([]byte, size)
	copy(out, content)
	return out
}

// ourWrite writes a range at random, and the last bytes.
func ourWrite(t testing.TB, img *Image, want []byte, rng *rand.Rand) {
	t.Helper()
	for _, r := range writtenRanges(want, rng) {
		p := want[r[0]:r[1]]
		crashContent(p, r[0], rng.Uint64()>>40, true)
		if _, err := img.WriteAt(p, r[0]); err != nil {
			t.Fatal(err)
		}
	}
}

// theirWrite is ourWrite by qemu-io.
func theirWrite(t testing.TB, want []byte, rng *rand.Rand) {
	t.Helper()
	var cmds []string
	for _, r := range writtenRanges(want, rng) {
		b := byte(1 + rng.IntN(255))
		for i := range want[r[0]:r[1]] {
			want[r[0]+int64(i)] = b
		}
		cmds = append(cmds, fmt.Sprintf("write -P %d %d %d", b, r[0], r[1]-r[0]))
	}
	qemutest.IO(t, "image", cmds...)
}

// writtenRanges returns what is written: a range at random, and the last sectors.
func writtenRanges(want []byte, rng *rand.Rand) [][2]int64 {
	n := int64(len(want)) / 512
	a := rng.Int64N(n)
	b := min(a+1+rng.Int64N(n/4+1), n)
	return [][2]int64{{a * 512, b * 512}, {(n - 1) * 512, n * 512}}
}
