package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// Marks of a resize in a record.
type (
	// crashResizeStart is the start of a Resize.
	crashResizeStart struct{ size int64 }
	// crashResizeEnd is its return without an error.
	crashResizeEnd struct{}
)

// resizeCrashWorkload resizes the disk, up and down, with every mode of preallocation, between writes: over backing
// files that are longer, data files, snapshots that share everything, zeros and compressed clusters.
func resizeCrashWorkload(basic func(c *crashConfig, rng *rand.Rand, widths ...int), widths []int) crashWorkload {
	return crashWorkload{"resize", func(c *crashConfig, rng *rand.Rand) {
		basic(c, rng, widths...)
		c.fill, c.packed, c.zeros, c.compressed = rng.Float64(), 0.3, c.create.Version == 3, 10
		c.ops, c.sync, c.reopen, c.resize = 36, 5, 1, 14
		switch rng.IntN(6) {
		case 0, 1:
			c.backing = []string{"raw", "qcow2"}[rng.IntN(2)]
		case 2:
			c.create.Version, c.create.DataFile, c.create.DataFileRaw = 3, "data", rng.IntN(2) == 0
			c.zeros = !c.create.DataFileRaw
		case 3:
			c.create.Version, c.create.RefcountBits = 3, 16
			c.snapshot = true
		case 4:
			c.create.Version, c.create.LazyRefcounts = 3, true
		}
		if rng.IntN(4) == 0 {
			c.create.Version, c.create.ExtendedL2, c.create.ClusterSize = 3, true, 16<<10
			c.size = int64((6+rng.IntN(10))*c.create.ClusterSize) + int64(rng.IntN(32))*512
		}
		c.most = c.size*3/2/512*512 + 512
		if c.create.ClusterSize == 512 {
			c.most = 3 * c.size // the L1 table grows, and the refcount table
		}
	}}
}

// resizeDisk resizes the disk, with its marks.
func (g *crashGenerator) resizeDisk(img *Image) error {
	size, o := resizeAtRandom(g.rng, g.cur, g.most)
	g.next("resize to %#x, %s", size, o.Preallocation)
	g.rec.Mark(crashResizeStart{size})
	if err := img.Resize(context.Background(), size, &o); err != nil {
		return err
	}
	g.rec.Mark(crashResizeEnd{})
	g.cur, g.end = size, size
	return nil
}

// resizeAtRandom returns another size than the present one, and how to get there.
func resizeAtRandom(rng *rand.Rand, now, most int64) (int64, ResizeOptions) {
	for {
		size := rng.Int64N(most/512+1) * 512
		o := ResizeOptions{Shrink: true}
		if size > now && rng.IntN(2) == 0 {
			o.Preallocation = Preallocation(rng.IntN(4))
		}
		if size != now && (size > now || rng.IntN(2) == 0) && (size > 0 || rng.IntN(4) == 0) {
			return size, o
		}
	}
}

// resizeAfter resizes the disk after a crash, and returns what it reads then, or nil after a finding. Whatever the
// crash left behind the end must not show.
func (l *crashLook) resizeAfter(img *Image, rng *rand.Rand, content []byte) []byte {
	now := int64(len(content))
	size, o := resizeAtRandom(rng, now, int64(len(l.buf)))
	if err := img.Resize(context.Background(), size, &o); err != nil {
		l.add("I5", "resize to %#x after the crash: %v", size, errors.Join(err, img.Abandon()))
		return nil
	}
	if size <= now {
		return content[:size]
	}
	return append(content, make([]byte, size-now)...)
}

// TestCrashResizeBroken breaks one ordering of Resize at a time, as TestCrashBroken does.
func TestCrashResizeBroken(t *testing.T) {
	testCrashBroken(t, []crashBreak{
		{"switch before the tables", testHooks{growSwitchFirst: true}, "resize", "I3", 8},
		{"switch before the zeros", testHooks{tailLast: true}, "resize", "I4", 12},
		{"drop before the switch", testHooks{shrinkDropFirst: true}, "resize", "I4", 8},
		{"cut the file before the drop", testHooks{entriesLast: true}, "resize", "I3", 8},
		{"lower counts before the drop", testHooks{entriesLast: true}, "resize", "I1", 8},
	})
}

// TestCrashHoleShrink enumerates the window of the second hole of the reference (FORMAT.md 3.4): QEMU 7.2 lowers the
// refcounts of what a shrink drops, cuts the refcount table and the file, and writes the size, before it makes the
// cleared entries durable; a crash then leaves entries that name clusters whose refcount is 0. Here a crash at any
// point leaves the old disk, whole, or the new one, with no refcount below its references. The order of the reference,
// put in place of ours, shows.
func TestCrashHoleShrink(t *testing.T) {
	const size, smaller = 160 << 10, 20<<10 + 512
	content := make([]byte, size)
	crashContent(content, 0, 1, true)
	record := func(test testHooks) (*crashtest.Recorder, *crashtest.File) {
		d := crashtest.NewDisk(nil)
		img, err := CreateStorage(crashStorage{d}, size, &CreateOptions{ClusterSize: 512, RefcountBits: 64})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := img.WriteAt(content, 0); err != nil {
			t.Fatal(err)
		}
		mustClose(t, img)
		rec := crashtest.NewRecorder()
		file := rec.Regular("image", d.Bytes())
		if img, err = OpenStorage(crashStorage{file}, &OpenOptions{ReadWrite: true, test: test}); err != nil {
			t.Fatal(err)
		}
		if err := img.Resize(t.Context(), smaller, &ResizeOptions{Shrink: true}); err != nil {
			t.Fatal(err)
		}
		mustClose(t, img)
		return rec, file
	}
	// look returns how many states hold the smaller disk, and in how many a refcount is below its references, or an
	// entry names what is beyond the end of the file.
	look := func(rec *crashtest.Recorder, file *crashtest.File) (switched, low, beyond int) {
		stats, err := rec.States(rand.New(rand.NewPCG(1, 1)), crashtest.Options{PerPoint: 24}, func(s *crashtest.State) error {
			d := s.Disk(file)
			rep, err := walkFile(d)
			if err != nil {
				return err
			}
			low, beyond = low+min(rep.TooLow, 1), beyond+min(rep.BadEntries, 1)
			img, err := OpenStorage(crashStorage{d}, nil)
			if err != nil {
				return err
			}
			got := make([]byte, img.Size())
			if _, err := img.ReadAt(got, 0); err != nil && low+beyond == 0 {
				return err
			}
			if img.Size() == smaller {
				switched++
			}
			if (img.Size() != size && img.Size() != smaller || !bytes.Equal(got, content[:len(got)])) && low+beyond == 0 {
				return fmt.Errorf("%s: a disk of %d bytes with other content", s, img.Size())
			}
			return img.Close()
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%v; %d of the smaller disk, %d with low refcounts, %d with entries beyond the file", stats, switched, low, beyond)
		return switched, low, beyond
	}
	if switched, low, beyond := look(record(testHooks{})); switched == 0 || low+beyond > 0 {
		t.Errorf("%d states of the smaller disk; %d with low refcounts, %d with entries beyond the file", switched, low, beyond)
	}
	if _, low, beyond := look(record(testHooks{entriesLast: true})); low == 0 || beyond == 0 {
		t.Errorf("the order of the reference: %d states with low refcounts, %d with entries beyond the file", low, beyond)
	}
}
