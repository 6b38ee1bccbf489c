package qcow2

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
)

// mappedDisk is a disk all of which is written, for benchmarks: an Image, or a file of the same size.
type mappedDisk interface {
	io.ReaderAt
	io.WriterAt
}

// benchSize is the size in bytes of the disks that are measured: 16 L2 slices, and more than processors cache.
const benchSize = 512 << 20

// benchDir returns a directory for the files of a benchmark: in memory where the system has such a place, so
// that the disk is not what is measured.
func benchDir(tb testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "qcow2-bench-")
	if err != nil {
		return tb.TempDir()
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// fillDisk writes all of a disk.
func fillDisk(tb testing.TB, d io.WriterAt, size int64) {
	p := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(p)) {
		for i := range p {
			p[i] = byte(off>>20) + byte(i)
		}
		if _, err := d.WriteAt(p, off); err != nil {
			tb.Fatal(err)
		}
	}
}

// benchDisks returns an image in a file and a raw file, both mapped as a whole, and an image in which host
// reads and writes do nothing: what is left is the library's own work.
func benchDisks(b *testing.B) map[string]mappedDisk {
	dir := benchDir(b)
	img, err := Create(filepath.Join(dir, "image"), benchSize, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := img.Close(); err != nil {
			b.Error(err)
		}
	})
	fillDisk(b, img, benchSize)
	raw, err := os.Create(filepath.Join(dir, "raw"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { raw.Close() })
	fillDisk(b, raw, benchSize)

	idle := &idleStorage{MemoryStorage: NewMemoryStorage()}
	alone, err := CreateStorage(idle, benchSize, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { alone.Abandon() })
	one := make([]byte, 512)
	for off := int64(0); off < benchSize; off += 64 << 10 {
		if _, err := alone.WriteAt(one, off); err != nil {
			b.Fatal(err)
		}
	}
	idle.idle.Store(true)
	return map[string]mappedDisk{"image": img, "raw": raw, "alone": alone}
}

// idleStorage is a memory storage whose reads and writes cost nothing once it idles.
type idleStorage struct {
	*MemoryStorage
	idle atomic.Bool
}

// ReadAt does nothing.
func (s *idleStorage) ReadAt(p []byte, off int64) (int, error) {
	if s.idle.Load() {
		return len(p), nil
	}
	return s.MemoryStorage.ReadAt(p, off)
}

// WriteAt does nothing.
func (s *idleStorage) WriteAt(p []byte, off int64) (int, error) {
	if s.idle.Load() {
		return len(p), nil
	}
	return s.MemoryStorage.WriteAt(p, off)
}

// benchmarkDisks runs requests on each disk: sequential ones of 1 MiB and random ones of 4 KiB, each from one,
// two and four goroutines.
func benchmarkDisks(b *testing.B, request func(d mappedDisk, p []byte, off int64) (int, error)) {
	disks := benchDisks(b)
	for _, order := range []struct {
		name string
		n    int64
	}{{"seq", 1 << 20}, {"random", 4 << 10}} {
		for _, name := range []string{"raw", "image", "alone"} {
			for _, goroutines := range []int{1, 2, 4} {
				b.Run(fmt.Sprintf("%s/disk=%s/goroutines=%d", order.name, name, goroutines), func(b *testing.B) {
					d := disks[name]
					b.SetBytes(order.n)
					b.ReportAllocs()
					b.SetParallelism((goroutines + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
					if goroutines == 1 {
						defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
					}
					var worker, block atomic.Int64
					b.RunParallel(func(pb *testing.PB) {
						r := rand.New(rand.NewPCG(1, uint64(worker.Add(1))))
						p := make([]byte, order.n)
						for pb.Next() {
							off := r.Int64N(benchSize/order.n) * order.n
							if order.name == "seq" {
								off = block.Add(1) * order.n % benchSize
							}
							if n, err := request(d, p, off); n != len(p) || err != nil {
								b.Errorf("%d bytes, %v", n, err)
								return
							}
						}
					})
				})
			}
		}
	}
}

// BenchmarkImageReadAt reads what is mapped, beside a raw file.
func BenchmarkImageReadAt(b *testing.B) {
	benchmarkDisks(b, func(d mappedDisk, p []byte, off int64) (int, error) { return d.ReadAt(p, off) })
}

// BenchmarkImageWriteAt overwrites in place what is mapped, beside a raw file.
func BenchmarkImageWriteAt(b *testing.B) {
	benchmarkDisks(b, func(d mappedDisk, p []byte, off int64) (int, error) { return d.WriteAt(p, off) })
}

// BenchmarkImageWriteAtNew writes where nothing was written before, so that each request allocates, beside a raw
// file that grows as sparsely. The Sync at the end of each disk counts.
func BenchmarkImageWriteAtNew(b *testing.B) {
	type growing interface {
		mappedDisk
		Sync() error
		Close() error
	}
	create := map[string]func(path string) (growing, error){
		"image": func(path string) (growing, error) { return Create(path, benchSize, nil) },
		"raw": func(path string) (growing, error) {
			f, err := os.Create(path)
			if err == nil {
				err = f.Truncate(benchSize)
			}
			return f, err
		},
	}
	for _, order := range []struct {
		name    string
		n, step int64
	}{{"seq", 1 << 20, 1 << 20}, {"random", 4 << 10, 64 << 10}} {
		for _, name := range []string{"raw", "image"} {
			b.Run(fmt.Sprintf("%s/disk=%s", order.name, name), func(b *testing.B) {
				path := filepath.Join(benchDir(b), "disk")
				b.SetBytes(order.n)
				b.ReportAllocs()
				p := make([]byte, order.n)
				for i := range p {
					p[i] = byte(i)
				}
				perDisk := int(benchSize / order.step)
				for done := 0; done < b.N; {
					b.StopTimer()
					d, err := create[name](path)
					if err != nil {
						b.Fatal(err)
					}
					places := rand.New(rand.NewPCG(1, 2)).Perm(perDisk)
					b.StartTimer()
					for i := 0; i < perDisk && done < b.N; i, done = i+1, done+1 {
						off := int64(i) * order.step
						if order.name == "random" {
							off = int64(places[i]) * order.step
						}
						if _, err := d.WriteAt(p, off); err != nil {
							b.Fatal(err)
						}
					}
					if err := d.Sync(); err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					if err := d.Close(); err != nil {
						b.Fatal(err)
					}
					if err := os.Remove(path); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
		}
	}
}

// TestNoAllocs holds reads and in-place overwrites of what is mapped to no heap allocation at all, from a part
// of a sector to many clusters.
func TestNoAllocs(t *testing.T) {
	const size = 8 << 20
	for _, storage := range []struct {
		name string
		make func(t *testing.T) Storage
	}{
		{"file", func(t *testing.T) Storage {
			s, err := OpenFileStorage(filepath.Join(t.TempDir(), "image"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			return s
		}},
		{"memory", func(t *testing.T) Storage { return NewMemoryStorage() }},
	} {
		for _, layout := range []struct {
			name string
			opts CreateOptions
		}{
			{"default", CreateOptions{}},
			{"cluster=4KiB", CreateOptions{ClusterSize: 4 << 10}},
			{"extended", CreateOptions{ExtendedL2: true}},
		} {
			t.Run(storage.name+"/"+layout.name, func(t *testing.T) {
				opts := layout.opts
				img, err := CreateStorage(storage.make(t), size, &opts)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := img.Close(); err != nil {
						t.Error(err)
					}
				})
				fillDisk(t, img, size)
				if err := img.Sync(); err != nil {
					t.Fatal(err)
				}
				for _, n := range []int{100, 4 << 10, 1 << 20} {
					p := make([]byte, n)
					off := int64(0)
					for op, do := range map[string]func([]byte, int64) (int, error){"read": img.ReadAt, "overwrite": img.WriteAt} {
						got := testing.AllocsPerRun(50, func() {
							off = (off + 1<<20 + 512) % (size - 1<<20)
							if _, err := do(p, off); err != nil {
								t.Fatal(err)
							}
						})
						if got != 0 {
							t.Errorf("%s of %d bytes: %v heap allocations, want none", op, n, got)
						}
					}
				}
			})
		}
	}
}
