package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/measure"
)

// bench holds the files of a run.
type bench struct {
	config
	dir  string
	qemu *qemu // nil: not installed or not wanted

	image, raw string // mapped disks: all of both is written
}

// contender is one way to keep a disk in a file.
type contender struct {
	name       string
	openFile   func(path string) (disk, error)
	createFile func(path string, size int64) (disk, error)
}

// create makes a new disk of size bytes.
func (c contender) create(path string, size int64) (disk, error) { return c.createFile(path, size) }

// openWarm opens a disk of size bytes and reads from every 4 KiB of its L2 tables, so that they are cached.
func (c contender) openWarm(path string, size int64) (disk, error) {
	d, err := c.openFile(path)
	if err != nil {
		return nil, err
	}
	var p [512]byte
	for off := int64(0); off < size; off += 512 * clusterSize {
		if _, err := d.ReadAt(p[:], off); err != nil {
			return nil, errors.Join(err, d.Close())
		}
	}
	return d, nil
}

// ours is the library.
var ours = contender{
	name: "ours",
	openFile: func(path string) (disk, error) {
		return qcow2.Open(path, &qcow2.OpenOptions{ReadWrite: true})
	},
	createFile: func(path string, size int64) (disk, error) { return qcow2.Create(path, size, nil) },
}

// rawFile is a file without a format.
var rawFile = contender{
	name:     "raw",
	openFile: func(path string) (disk, error) { return os.OpenFile(path, os.O_RDWR, 0) },
	createFile: func(path string, size int64) (disk, error) {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return nil, err
		}
		if err := f.Truncate(size); err != nil {
			f.Close()
			return nil, err
		}
		return f, nil
	},
}

// prepare writes the mapped disks, all of both. They are written by turns: on a tmpfs the two files then lie
// in the same parts of memory, of which some are faster than others.
func (b *bench) prepare() error {
	b.image = filepath.Join(b.dir, "mapped.qcow2")
	b.raw = filepath.Join(b.dir, "mapped.raw")
	image, err := ours.create(b.image, b.size)
	if err != nil {
		return err
	}
	defer image.Close()
	raw, err := rawFile.create(b.raw, b.size)
	if err != nil {
		return err
	}
	defer raw.Close()
	p := make([]byte, 1<<20)
	for off := int64(0); off < b.size; off += int64(len(p)) {
		pattern(p, off)
		for _, d := range []disk{image, raw} {
			if _, err := d.WriteAt(p, off); err != nil {
				return err
			}
		}
	}
	if err := image.Close(); err != nil {
		return err
	}
	return b.verify(ours, b.image)
}

// verify looks at a mapped disk in some places.
func (b *bench) verify(c contender, path string) error {
	d, err := c.openFile(path)
	if err != nil {
		return err
	}
	defer d.Close()
	random := rand.New(rand.NewPCG(1, 2))
	got, want := make([]byte, 4<<10), make([]byte, 4<<10)
	for range 1000 {
		off := random.Int64N(b.size/4096) * 4096
		if _, err := d.ReadAt(got, off); err != nil {
			return err
		}
		if pattern(want, off); !bytes.Equal(got, want) {
			return fmt.Errorf("%s: wrong content at %#x", c.name, off)
		}
	}
	return nil
}

// row is the outcome of one workload with one number of goroutines.
type row struct {
	workload   workload
	goroutines int
	rawRate    float64          // median, in bytes per second
	ours, qemu measure.Interval // rates as parts of the raw file's; qemu is zero where it did not run
	mode       string           // how qemu-img was run
}

// measure measures one row. A round is a measurement of the library and the raw file by turns, and then one
// of qemu-img; each ratio is within a round.
func (b *bench) measure(w workload, workers int) (row, error) {
	r := row{workload: w, goroutines: workers}
	var q *qemuRun
	if b.qemu != nil {
		var err error
		if q, err = b.qemu.calibrate(b, w, workers); err != nil {
			return r, err
		}
		r.mode = q.mode.String()
	}
	var rawRates, oursRatios, qemuRatios []float64
	for round := range b.rounds {
		// Nobody pays for the garbage of another.
		runtime.GC()
		image, raw, err := b.pair(w, workers, round)
		if err != nil {
			return r, err
		}
		rawRates = append(rawRates, raw.undisturbed()*float64(w.n))
		oursRatios = append(oursRatios, image.undisturbed()/raw.undisturbed())
		if q != nil {
			v, err := q.run(b)
			if err != nil {
				return r, err
			}
			qemuRatios = append(qemuRatios, v/raw.rate())
		}
	}
	r.rawRate = measure.MedianInterval(rawRates).Median
	r.ours = measure.MedianInterval(oursRatios)
	if q != nil {
		r.qemu = measure.MedianInterval(qemuRatios)
	}
	return r, nil
}

// turns is how often the library and the raw file take turns within a round: slices of few milliseconds, of
// which many get through between two interruptions by whatever else the machine does.
const turns = 24

// pair measures the library and the raw file in one round. Opening, creating and closing are not measured.
func (b *bench) pair(w workload, workers, round int) (image, raw tally, err error) {
	imagePath, rawPath, open, size := b.image, b.raw, contender.openWarm, b.size
	if w.alloc {
		imagePath, rawPath = filepath.Join(b.dir, "fresh.qcow2"), filepath.Join(b.dir, "fresh.raw")
		open, size = contender.create, b.allocSize
		defer os.Remove(imagePath)
		defer os.Remove(rawPath)
	}
	imageDisk, err := open(ours, imagePath, size)
	if err != nil {
		return image, raw, err
	}
	defer func() { err = errors.Join(err, imageDisk.Close()) }()
	rawDisk, err := open(rawFile, rawPath, size)
	if err != nil {
		return image, raw, err
	}
	defer rawDisk.Close()
	j := newJob(w, size, workers, b.slice/turns, round)
	for turn := range turns {
		// In the order A B B A A B B A, so that neither gains by a drift.
		if (round+turn)%2 == 0 {
			image.add(j.run(imageDisk, turn))
			raw.add(j.run(rawDisk, turn))
		} else {
			raw.add(j.run(rawDisk, turn))
			image.add(j.run(imageDisk, turn))
		}
		if err := errors.Join(image.err, raw.err); err != nil {
			return image, raw, err
		}
	}
	return image, raw, nil
}

// allocations returns the heap allocations per mapped 4 KiB read and overwrite.
func (b *bench) allocations() (a struct{ read, overwrite float64 }, err error) {
	d, err := ours.openFile(b.image)
	if err != nil {
		return a, err
	}
	defer d.Close()
	random := rand.New(rand.NewPCG(3, 4))
	p := make([]byte, 4<<10)
	count := func(f func(p []byte, off int64) (int, error)) float64 {
		return testing.AllocsPerRun(10000, func() {
			if _, opErr := f(p, random.Int64N(b.size/4096)*4096); opErr != nil {
				err = opErr
			}
		})
	}
	a.read = count(d.ReadAt)
	a.overwrite = count(d.WriteAt)
	return a, err
}

// judge has qemu-img check the mapped image at the end, where it is installed.
func (b *bench) judge() error {
	if b.qemu == nil {
		return nil
	}
	return b.qemu.check(b.image)
}

// qemuTime is how long one measurement of qemu-img is meant to take: it tells time in milliseconds.
const qemuTime = 120 * time.Millisecond
