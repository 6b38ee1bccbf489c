package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/go-qcow2/qcow2"
)

// childFlag is the first argument of a process that does one job: the second one, in JSON.
const childFlag = "-child"

// job is one conversion by the library, or a copy of the raw file Raw in one of the ways that Go has.
type job struct {
	Name                    string
	Source, Format, To, Out string

	Compress, Zstd bool
	Window, Sparse int
	Workers        int

	Raw   string // the file to copy, instead of all above
	Chunk int64  // what is copied at once, in bytes
	Copy  bool   // by copy_file_range
}

// rawPrefix begins the names of raw copies.
const rawPrefix = "raw copy"

// rawCopies are ways to copy a raw file: the fastest of each round counts.
var rawCopies = []job{
	{Name: rawPrefix + ", 2 × 64 KiB", Chunk: 64 << 10, Workers: 2},
	{Name: rawPrefix + ", 2 × 256 KiB", Chunk: 256 << 10, Workers: 2},
	{Name: rawPrefix + ", 2 × 1 MiB", Chunk: 1 << 20, Workers: 2},
	{Name: rawPrefix + ", 4 × 256 KiB", Chunk: 256 << 10, Workers: 4},
	{Name: rawPrefix + ", 2 × kernel", Chunk: 8 << 20, Workers: 2, Copy: true},
}

// child does the job in text.
func child(args []string) (err error) {
	var j job
	if len(args) != 1 {
		return errors.New("one job")
	}
	if err := json.Unmarshal([]byte(args[0]), &j); err != nil {
		return err
	}
	if j.Raw != "" {
		return j.copyRaw()
	}
	src, done, err := j.open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	o := &qcow2.ConvertFileOptions{Format: j.To, Create: &qcow2.CreateOptions{}}
	o.Compress, o.DeflateWindow, o.SparseSize, o.Workers = j.Compress, j.Window, j.Sparse, j.Workers
	if j.Zstd {
		o.Create.Compression = qcow2.CompressionZstd
	}
	return qcow2.ConvertFile(context.Background(), j.Out, src, o)
}

// open opens the source.
func (j *job) open() (qcow2.Disk, func() error, error) {
	if j.Format == "qcow2" {
		img, err := qcow2.Open(j.Source, nil)
		if err != nil {
			return nil, nil, err
		}
		return img, img.Close, nil
	}
	s, err := qcow2.OpenFileStorage(j.Source, os.O_RDONLY, 0)
	if err != nil {
		return nil, nil, err
	}
	d, err := qcow2.NewRawDisk(s)
	return d, s.Close, err
}

// copyRaw copies the data of a raw file, and leaves its holes out.
func (j *job) copyRaw() error {
	s, err := qcow2.OpenFileStorage(j.Raw, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	in, err := os.Open(j.Raw)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(j.Out)
	if err != nil {
		return err
	}
	defer out.Close()
	size, err := s.Size()
	if err != nil {
		return err
	}
	if err := out.Truncate(size); err != nil {
		return err
	}
	type piece struct{ off, n int64 }
	var pieces []piece
	for off := int64(0); ; {
		start, end, err := s.NextData(off)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		for off = start; off < end; off += j.Chunk {
			pieces = append(pieces, piece{off, min(j.Chunk, end-off)})
		}
		off = end
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, j.Workers)
	for w := range j.Workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			buf := make([]byte, j.Chunk)
			for errs[w] == nil {
				i := next.Add(1) - 1
				if i >= int64(len(pieces)) {
					return
				}
				p := pieces[i]
				if j.Copy {
					errs[w] = copyRange(out, in, p.off, p.n)
					continue
				}
				if _, errs[w] = in.ReadAt(buf[:p.n], p.off); errs[w] == nil {
					_, errs[w] = out.WriteAt(buf[:p.n], p.off)
				}
			}
		}()
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("copy %s: %w", j.Raw, err)
	}
	return out.Sync()
}
