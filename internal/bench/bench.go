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
	name   string
	open   func(path string) (disk, error)
	create func(path string, size int64) (disk, error)
}

// ours is the library.
var ours = contender{
	name: "ours",
	open: func(path string) (disk, error) {
		return qcow2.Open(path, &qcow2.OpenOptions{ReadWrite: true})
	},
	create: func(path string, size int64) (disk, error) { return qcow2.Create(path, size, nil) },
}

// rawFile is a file without a format.
var rawFile = contender{
	name: "raw",
	open: func(path string) (disk, error) { return os.OpenFile(path, os.O_RDWR, 0) },
	create: func(path string, size int64) (disk, error) {
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
	d, err := c.open(path)
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
	rawRate    float64  // median, in bytes per second
	ours, qemu interval // rates as parts of the raw file's; qemu is zero where it did not run
	mode       string   // how qemu-img was run
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
		pair := b.mappedPair
		if w.alloc {
			pair = b.freshPair
		}
		oursRate, rawRate, err := pair(w, workers, round)
		if err != nil {
			return r, err
		}
		rawRates = append(rawRates, rawRate*float64(w.n))
		oursRatios = append(oursRatios, oursRate/rawRate)
		if q != nil {
			v, err := q.run(b)
			if err != nil {
				return r, err
			}
			qemuRatios = append(qemuRatios, v/rawRate)
		}
	}
	r.rawRate = medianInterval(rawRates).median
	r.ours = medianInterval(oursRatios)
	if q != nil {
		r.qemu = medianInterval(qemuRatios)
	}
	return r, nil
}

// turns is how often the library and the raw file take turns within a round on mapped disks: what else the
// machine does then slows both.
const turns = 6

// first reports whether the library is to begin the given turn or round: in the order A B B A A B B A, so that
// neither gains by a drift.
func first(i int) bool { return i%2 == 0 }

// mappedPair measures the library and the raw file on the mapped disks, and returns their rates in requests
// per second. Opening and closing are not measured, and the caches are warm.
func (b *bench) mappedPair(w workload, workers, round int) (oursRate, rawRate float64, err error) {
	image, err := ours.open(b.image)
	if err != nil {
		return 0, 0, err
	}
	defer image.Close()
	raw, err := rawFile.open(b.raw)
	if err != nil {
		return 0, 0, err
	}
	defer raw.Close()
	// One read from every L2 slice fills the cache.
	var p [512]byte
	for off := int64(0); off < b.size; off += 512 * clusterSize {
		if _, err := image.ReadAt(p[:], off); err != nil {
			return 0, 0, err
		}
	}
	var oursTotal, rawTotal tally
	slice := b.slice / turns
	for turn := range turns {
		seed := uint64(round*turns + turn)
		if first(round + turn) {
			oursTotal.add(w.runFor(image, b.size, workers, slice, seed))
			rawTotal.add(w.runFor(raw, b.size, workers, slice, seed))
		} else {
			rawTotal.add(w.runFor(raw, b.size, workers, slice, seed))
			oursTotal.add(w.runFor(image, b.size, workers, slice, seed))
		}
	}
	return oursTotal.rate(), rawTotal.rate(), errors.Join(oursTotal.err, rawTotal.err)
}

// freshPair measures the library and the raw file on new disks each, and returns their rates in requests per
// second. Creating and closing are not measured, the last Sync is.
func (b *bench) freshPair(w workload, workers, round int) (oursRate, rawRate float64, err error) {
	order := []contender{ours, rawFile}
	if !first(round) {
		order[0], order[1] = order[1], order[0]
	}
	for _, c := range order {
		rate, err := b.fresh(c, w, workers, uint64(round))
		if err != nil {
			return 0, 0, fmt.Errorf("%s: %w", c.name, err)
		}
		if c.name == ours.name {
			oursRate = rate
		} else {
			rawRate = rate
		}
	}
	return oursRate, rawRate, nil
}

// fresh measures a contender on a new disk.
func (b *bench) fresh(c contender, w workload, workers int, seed uint64) (rate float64, err error) {
	path := filepath.Join(b.dir, "fresh."+c.name)
	d, err := c.create(path, b.allocSize)
	if err != nil {
		return 0, err
	}
	defer os.Remove(path)
	t := w.runAll(d, b.allocSize, workers, seed)
	return t.rate(), errors.Join(t.err, d.Close())
}

// allocations returns the heap allocations per mapped 4 KiB read and overwrite.
func (b *bench) allocations() (a struct{ read, overwrite float64 }, err error) {
	d, err := ours.open(b.image)
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
const qemuTime = 180 * time.Millisecond
