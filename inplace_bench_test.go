package qcow2

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkConvertInPlace converts raw files in place: one of 10 GiB, of which every 64th MiB is there, and one of 2 GiB
// that is full; and reports how much it writes, and how many times as long qemu-img convert takes to make a copy. The
// files lie in the directory that TMPDIR names:
//
//	TMPDIR=/dev/shm go test -run '^$' -bench ConvertInPlace -benchtime 3x .
func BenchmarkConvertInPlace(b *testing.B) {
	for _, bm := range []struct {
		name       string
		size, step int64 // of each step in bytes, the first MiB is data
	}{{"sparse=10GiB", 10 << 30, 64 << 20}, {"full=2GiB", 2 << 30, 1 << 20}} {
		b.Run(bm.name, func(b *testing.B) {
			name := filepath.Join(b.TempDir(), "disk")
			s := openBenchDisk(b, name, bm.size, bm.step)
			first := make([]byte, defaultClusterSize)
			if _, err := s.ReadAt(first, 0); err != nil {
				b.Fatal(err)
			}
			theirs := timeQemuConvert(b, name)
			counted := &countedStorage{Storage: s}
			for b.Loop() {
				counted.written.Store(0)
				src, err := NewRawDisk(counted)
				if err != nil {
					b.Fatal(err)
				}
				if err := ConvertInPlace(b.Context(), counted, src, nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer() // the data did not move: what was the first cluster makes the raw file of it
				if _, err := s.WriteAt(first, 0); err != nil {
					b.Fatal(err)
				}
				if err := s.Truncate(bm.size); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(counted.written.Load()), "written-B")
			if theirs > 0 {
				b.ReportMetric(theirs.Seconds()*float64(b.N)/b.Elapsed().Seconds(), "x-qemu")
				b.ReportMetric(float64(theirs.Milliseconds()), "qemu-ms")
			}
		})
	}
}

// openBenchDisk makes a raw file of size bytes, with a MiB of random data in every step.
func openBenchDisk(b *testing.B, name string, size, step int64) *FileStorage {
	b.Helper()
	s, err := OpenFileStorage(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	if err := s.Truncate(size); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 1<<20)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(p)
	for off := int64(0); off < size; off += step {
		copy(p, fmt.Sprintf("MiB at %#x", off))
		if _, err := s.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	return s
}

// timeQemuConvert returns how long qemu-img takes to convert a raw file, at its best setting, or 0 without it.
func timeQemuConvert(b *testing.B, name string) time.Duration {
	b.Helper()
	out := name + ".qcow2"
	defer os.Remove(out)
	start := time.Now()
	cmd := exec.Command("qemu-img", "convert", "-W", "-m", "8", "-f", "raw", "-O", "qcow2", name, out)
	if msg, err := cmd.CombinedOutput(); err != nil {
		b.Logf("no time of qemu-img: %v %s", err, msg)
		return 0
	}
	return time.Since(start)
}
