// Command convertbench compares Convert with qemu-img convert at its best setting (-W -m 8), and with the fastest copy
// of a raw file that Go can do, on the same machine in one run:
//
//	go run ./internal/convertbench [-quick] [-dir DIR] [-run REGEXP] [-size MIB] [-rounds N] [-workers N]
//
// The disk is a file system of this machine's files, made by mke2fs. Every side runs in a process of its own, in turns
// within each round; before each run its output is removed. The table has the medians of the rounds, and of the ratios
// of each round, with confidence intervals, the peak memory and the size of the output. The first output of each side is
// compared with the source by qemu-img. The files belong on a file system in memory, so that the work is measured and not
// the disk; it needs some six times the size.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-qcow2/qcow2/internal/measure"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == childFlag {
		if err := child(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "convertbench:", err)
			os.Exit(1)
		}
		return
	}
	var b bench
	flag.Int64Var(&b.size, "size", 512, "MiB of content")
	flag.IntVar(&b.rounds, "rounds", 9, "runs of each side")
	flag.IntVar(&b.workers, "workers", 0, "workers of the library; 0: its default")
	f, err := measure.ParseFlags("128 MiB and three rounds", "full qcow2 to raw")
	if err == nil {
		if f.Quick {
			b.size, b.rounds = min(b.size, 128), min(b.rounds, 3)
		}
		b.flags = f
		err = measure.InDir(f.Dir, b.run)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "convertbench:", err)
		os.Exit(1)
	}
}

// bench is one run of the program.
type bench struct {
	flags   measure.Flags
	size    int64 // MiB of content
	rounds  int
	workers int
	dir     string
}

// path returns the name of a file of the run.
func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

// run makes the disks and measures the rows.
func (b *bench) run(dir string) error {
	b.dir = dir
	version, err := measure.QEMUVersion()
	if err != nil {
		return err
	}
	measure.PrintMachine(os.Stdout, version)
	if err := b.makeDisks(); err != nil {
		return err
	}
	fmt.Println("\n| case | side | MB/s of virtual size | times as fast as qemu-img | as the fastest raw copy | work per processor second, of qemu-img's | output bytes | of qemu-img's | peak MiB |")
	fmt.Println("|---|---|---|---|---|---|---|---|---|")
	for _, r := range rows() {
		if !b.flags.Filter.MatchString(r.name) {
			continue
		}
		if err := b.measure(&r); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	return nil
}

// The disks that are converted.
const (
	fsDisk   = "fs.raw"   // a file system, with its free space as holes
	fullDisk = "full.raw" // its content without a cluster of zeros
	halfDisk = "half.raw" // every other MiB of that, the rest holes
)

// makeDisks makes the disks, and the images of them that are read back.
func (b *bench) makeDisks() error {
	if err := measure.MakeFileSystem(context.Background(), io.Discard, b.path(fsDisk), b.path("stage"), b.size<<20*3/4); err != nil {
		return err
	}
	if err := b.makeFull(); err != nil {
		return err
	}
	for name, args := range map[string][]string{
		"full.qcow2": {fullDisk},
		"zlib.qcow2": {"-c", fsDisk},
		"zstd.qcow2": {"-c", "-o", "compression_type=zstd", fsDisk},
	} {
		all := append([]string{"convert", "-W", "-m", "8", "-f", "raw", "-O", "qcow2"}, args...)
		if _, err := b.start("qemu-img", append(all, name)...); err != nil {
			return err
		}
	}
	return nil
}

// makeFull writes fullDisk and halfDisk.
func (b *bench) makeFull() error {
	const cluster = 64 << 10
	in, err := os.Open(b.path(fsDisk))
	if err != nil {
		return err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	full, err := os.Create(b.path(fullDisk))
	if err != nil {
		return err
	}
	defer full.Close()
	half, err := os.Create(b.path(halfDisk))
	if err != nil {
		return err
	}
	defer half.Close()
	size := b.size << 20
	p := make([]byte, cluster) // the program stays small: what it starts takes its peak memory over
	for off, at := int64(0), int64(0); off < size; at = (at + cluster) % (fi.Size() - cluster) {
		if _, err := in.ReadAt(p, at); err != nil {
			return err
		}
		if strings.Trim(string(p[:4096]), "\x00") == "" {
			continue
		}
		if _, err := full.WriteAt(p, off); err != nil {
			return err
		}
		if off>>20&1 == 0 {
			if _, err := half.WriteAt(p, off); err != nil {
				return err
			}
		}
		off += cluster
	}
	return half.Truncate(size)
}
