// Command roundtrip is the main job from end to end: a real disk goes in, comes out, and every byte is
// compared.
//
//	roundtrip [FILE]
//
// It converts a raw disk to qcow2, that to compressed qcow2, and that back to raw, and compares the
// result with the start. Without FILE it makes an ext4 file system from files of this machine, with
// mke2fs. Where they are installed, qemu-img checks and compares the images and e2fsck looks at the
// result. The exit code is 0 if nothing differs.
//
// What it makes lies in a temporary directory (in $TMPDIR, else /dev/shm where that has room, else the
// system's) and is removed at the end. It needs about four times the size of the disk.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
	"github.com/go-qcow2/qcow2/examples/internal/progress"
	"github.com/go-qcow2/qcow2/internal/measure"
)

func main() {
	size := flag.Int64("size", 400, "without FILE: MiB of this machine's files to take")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: roundtrip [-size MIB] [FILE]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := roundTrip(ctx, os.Stdout, flag.Arg(0), *size<<20)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "roundtrip: FAILED:", err)
		os.Exit(1)
	}
}

// roundTrip does the job with the raw disk in file, or with a file system of about content bytes if
// file is "". It prints what it does on w.
func roundTrip(ctx context.Context, w io.Writer, file string, content int64) (err error) {
	dir, err := os.MkdirTemp(tempDir(4*content), "qcow2-roundtrip-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path := func(name string) string { return filepath.Join(dir, name) }

	made := file == ""
	if made {
		file = path("disk.raw")
		from := time.Now()
		if err := measure.MakeFileSystem(ctx, w, file, path("files"), content); err != nil {
			return fmt.Errorf("make a file system: %w", err)
		}
		fmt.Fprintf(w, "made %s in %v\n", file, time.Since(from).Round(time.Millisecond))
	}
	plain, packed, back := path("plain.qcow2"), path("packed.qcow2"), path("back.raw")

	steps := []struct {
		name     string
		src      string
		format   string
		dst      string
		to       string
		compress bool
	}{
		{"raw -> qcow2", file, disk.Raw, plain, disk.QCOW2, false},
		{"qcow2 -> compressed qcow2", plain, disk.QCOW2, packed, disk.QCOW2, true},
		{"compressed qcow2 -> raw", packed, disk.QCOW2, back, disk.Raw, false},
	}
	for _, s := range steps {
		target := disk.Target{Name: s.dst, Format: s.to, Options: qcow2.ConvertOptions{Compress: s.compress}}
		if err := convert(ctx, w, s.name, s.src, s.format, target); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}

	from := time.Now()
	n, err := compare(ctx, file, back)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "compared %d bytes: identical (%v)\n", n, time.Since(from).Round(time.Millisecond))

	for _, image := range []string{plain, packed} {
		if err := judge(ctx, w, "qemu-img", "check", "-q", "-f", "qcow2", image); err != nil {
			return err
		}
		if err := judge(ctx, w, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", file, image); err != nil {
			return err
		}
	}
	if made {
		if err := judge(ctx, w, "e2fsck", "-fn", back); err != nil {
			return err
		}
	}
	fmt.Fprintln(w, "round trip: PASSED")
	return nil
}

// convert converts one file with a bar on standard error, and prints sizes and the rate.
func convert(ctx context.Context, w io.Writer, name, src, format string, to disk.Target) (err error) {
	from := time.Now()
	d, err := disk.Open(src, disk.Options{Format: format})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	bar := progress.Start(os.Stderr, name)
	to.Options.Progress = bar.Update
	err = disk.Convert(ctx, d, to)
	bar.Done(err)
	if err != nil {
		return err
	}
	took := time.Since(from)
	in, err := disk.Allocated(src)
	if err != nil {
		return err
	}
	out, err := disk.Allocated(to.Name)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%-26s %7.1f MiB -> %7.1f MiB on disk, %v, %.0f MB/s of a disk of %.1f MiB\n", name+":",
		mib(in), mib(out), took.Round(time.Millisecond), float64(d.Size())/1e6/took.Seconds(), mib(d.Size()))
	return nil
}

// mib returns n bytes in MiB.
func mib(n int64) float64 { return float64(n) / (1 << 20) }

// compare returns the length in bytes of the file a, which must be what b begins with. What b has behind
// it fills a sector at most, and is zeros.
func compare(ctx context.Context, a, b string) (n int64, err error) {
	fa, err := os.Open(a)
	if err != nil {
		return 0, err
	}
	defer fa.Close()
	fb, err := os.Open(b)
	if err != nil {
		return 0, err
	}
	defer fb.Close()
	pa, pb := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		na, errA := io.ReadFull(fa, pa)
		nb, errB := io.ReadFull(fb, pb)
		for _, err := range []error{errA, errB} {
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return n, err
			}
		}
		atEnd := errA != nil
		if nb < na || nb > na && (!atEnd || int64(nb) != disk.RoundUp(int64(na))) {
			return n, fmt.Errorf("%s and %s differ in length near byte %d", a, b, n)
		}
		clear(pa[na:nb])
		if !bytes.Equal(pa[:nb], pb[:nb]) {
			for i := range nb {
				if pa[i] != pb[i] {
					return n, fmt.Errorf("%s and %s differ at byte %d", a, b, n+int64(i))
				}
			}
		}
		n += int64(na)
		if atEnd {
			break
		}
	}
	if more, err := fb.Read(pb[:1]); more > 0 || err != io.EOF {
		return n, fmt.Errorf("%s is longer than %s (%v)", b, a, err)
	}
	return n, nil
}

// judge runs another program as a judge, which must exit with 0. One that is not installed is passed
// over, and said to be.
func judge(ctx context.Context, w io.Writer, name string, args ...string) error {
	program, err := measure.FindProgram(name)
	if err != nil {
		fmt.Fprintf(w, "%s %s: SKIPPED, not installed\n", name, args[0])
		return nil
	}
	from := time.Now()
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %q: %w\n%s", name, args, err, out)
	}
	fmt.Fprintf(w, "%s %s %s: clean (%v)\n", name, args[0], filepath.Base(args[len(args)-1]), time.Since(from).Round(time.Millisecond))
	return nil
}
