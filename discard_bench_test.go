package qcow2

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// BenchmarkDiscardAll discards all of an image whose metadata is preallocated: only tables are read and written. Beside
// the time it reports how much longer qemu-io takes for the same, where it is installed.
func BenchmarkDiscardAll(b *testing.B) {
	for _, gib := range []int64{16, 64} {
		b.Run(fmt.Sprintf("size=%dGiB", gib), func(b *testing.B) {
			qemutest.Require(b)
			dir := b.TempDir()
			if d, err := os.MkdirTemp("/dev/shm", "qcow2-bench-"); err == nil {
				defer os.RemoveAll(d)
				dir = d
			}
			master, path := filepath.Join(dir, "master"), filepath.Join(dir, "image")
			size := gib << 30
			qemutest.Img(b, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", master, fmt.Sprint(size))
			fresh := func() {
				if out, err := exec.Command("cp", "--sparse=always", master, path).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
			}
			var qemu time.Duration
			for range 1 {
				fresh()
				start := time.Now()
				qemutest.IOWith(b, qemutest.IOOptions{Cache: "writeback"}, path, discardCommands(size)...)
				if d := time.Since(start); qemu == 0 || d < qemu {
					qemu = d
				}
			}
			b.ResetTimer()
			for range b.N {
				b.StopTimer()
				fresh()
				b.StartTimer()
				img, err := Open(path, &OpenOptions{ReadWrite: true})
				if err != nil {
					b.Fatal(err)
				}
				if err := img.Discard(0, size); err != nil {
					b.Fatal(err)
				}
				if err := img.Close(); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			b.ReportMetric(float64(qemu)/(float64(b.Elapsed())/float64(b.N)), "times-faster-than-qemu-io")
			qemutest.CheckClean(b, path)
		})
	}
}

// discardCommands returns the commands with which qemu-io, which takes at most 2 GiB at a time, discards a disk.
func discardCommands(size int64) (cmds []string) {
	const most = 2<<30 - 64<<10
	for off := int64(0); off < size; off += most {
		cmds = append(cmds, fmt.Sprintf("discard %d %d", off, min(most, size-off)))
	}
	return cmds
}
