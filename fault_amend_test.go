package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// TestFaultsAmend lets every host operation of each Amend and Rebase fail, once and for good, as reads, writes and syncs
// do. The operation fails, the image has the features of before or of afterwards and the same content, goes on to be used, and
// does what it did not once it is asked again. A failed sync is final (I6), and the next open finds the one or the other.
func TestFaultsAmend(t *testing.T) {
	forever := func(err error) crashtest.Fault { return crashtest.Fault{Err: err, Forever: true} }
	plans := []struct {
		name string
		crashtest.Fault
	}{
		{"once", crashtest.Fault{Err: syscall.EIO}},
		{"once after", crashtest.Fault{Err: syscall.EIO, After: true}},
		{"short", crashtest.Fault{Err: syscall.EIO, Short: true}},
		{"full once", crashtest.Fault{Err: syscall.ENOSPC}},
		{"for good", forever(syscall.EIO)},
		{"full for good", forever(syscall.ENOSPC)},
	}
	for _, w := range amendWorks() {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			runs, failed, final := 0, 0, 0
			seeds := uint64(1)
			if os.Getenv(crashStatesEnv) != "" {
				seeds = 20
			}
			for seed := uint64(1); seed <= seeds; seed++ {
				c := newAmendCase(w, seed+3)
				if most := int64(12 * c.create.ClusterSize); c.size > most {
					c.size = most
				}
				r, err := newAmendRun(c)
				if err != nil {
					t.Fatal(err)
				}
				for _, plan := range plans {
					for at := 0; ; at++ {
						f := amendFault{amendRun: r, TB: t}
						met := f.run(plan.Fault, at)
						if t.Failed() {
							t.Fatalf("%v, %s at operation %d", c, plan.name, at)
						}
						if !met {
							break
						}
						runs++
						if f.failed {
							failed++
						}
						if f.final {
							final++
						}
					}
				}
			}
			t.Logf("%d faults, %d operations failed, %d images failed for good", runs, failed, final)
			if failed == 0 || final == 0 {
				t.Error("the faults met nothing")
			}
		})
	}
}

// amendFault is one run of an operation under a fault.
type amendFault struct {
	*amendRun
	testing.TB
	failed, final bool
}

// run carries the operation out with the fault at the at-th host operation of it, and reports whether it was met.
func (f *amendFault) run(fault crashtest.Fault, at int) bool {
	f.Helper()
	disk := f.image.Disk().Clone()
	faults := new(crashtest.Faults)
	s := crashStorage{faults.Wrap("image", disk)}
	open := func() (*Image, error) {
		return OpenStorage(s, &OpenOptions{ReadWrite: true, Backing: f.base, L2CacheBytes: 1, RefcountCacheBytes: 1})
	}
	img, err := open()
	if err != nil {
		f.Fatal(err)
	}
	fault.At = at
	faults.Set(fault)
	err = f.change(context.Background(), img)
	met := faults.Fired() > 0
	faults.Heal()
	if !met {
		if err != nil {
			f.Errorf("without a fault: %v", err)
		}
		if err := img.Close(); err != nil {
			f.Error(err)
		}
		return false
	}
	info := img.Info()
	f.failed, f.final = err != nil, errors.Is(err, ErrFailed)
	switch {
	case err != nil && !errors.Is(err, crashtest.ErrInjected):
		f.Errorf("the error does not tell of the fault: %v", err)
	case err == nil && !f.now(&info):
		f.Errorf("no error, and the features are not those of afterwards")
	case err != nil && !f.old(&info) && !f.now(&info):
		f.Errorf("after %v the features are neither: %+v", err, info)
	}
	f.expect(img, f.guest, "after the fault")
	if f.final {
		if _, err := img.WriteAt([]byte{1}, 0); !errors.Is(err, ErrFailed) {
			f.Errorf("write to a failed image: %v", err)
		}
		if err := img.Abandon(); err != nil {
			f.Error(err)
		}
		f.reopen(disk, f.guest, true)
		return true
	}
	// It goes on, and does it now.
	want := bytes.Clone(f.guest)
	if err := f.write(img, want, 1); err != nil {
		f.Errorf("write after the fault: %v", err)
	}
	if err != nil {
		if err := f.change(context.Background(), img); err != nil {
			f.Errorf("again, without a fault: %v", err)
		}
	}
	info = img.Info()
	if !f.now(&info) {
		f.Errorf("the features are not those of afterwards: %+v", info)
	}
	if err := f.write(img, want, 2); err != nil {
		f.Errorf("write afterwards: %v", err)
	}
	f.expect(img, want, "in the end")
	if err := img.Close(); err != nil {
		f.Errorf("close: %v", err)
	}
	f.reopen(disk, want, false)
	return true
}

// write writes to some places of the disk, and to the model.
func (f *amendFault) write(img *Image, want []byte, seq uint64) error {
	rng := rand.New(rand.NewPCG(f.seed, seq))
	for range 4 {
		off := rng.IntN(len(want))
		p := want[off:min(off+1+rng.IntN(2*f.create.ClusterSize), len(want))]
		crashContent(p, int64(off), 1<<30+seq, true)
		if _, err := img.WriteAt(p, int64(off)); err != nil {
			return err
		}
	}
	return nil
}

// expect compares the disk with the model.
func (f *amendFault) expect(img *Image, want []byte, when string) {
	f.Helper()
	got := make([]byte, len(want))
	if _, err := img.ReadAt(got, 0); err != nil {
		f.Errorf("read %s: %v", when, err)
	} else if err := difference(got, want, 0); err != nil {
		f.Errorf("%s: %v", when, err)
	}
}

// reopen looks at the files that the run left. An image that failed has leaks at worst.
func (f *amendFault) reopen(disk *crashtest.Disk, want []byte, leaks bool) {
	f.Helper()
	size, err := disk.Size()
	if err != nil {
		f.Fatal(err)
	}
	rep, err := refwalk.Walk(disk, size)
	if err != nil {
		f.Fatal(err)
	}
	if rep.Corruptions() > 0 || !leaks && !rep.Clean() {
		f.Errorf("%d corruptions, %d leaks: %q", rep.Corruptions(), rep.Leaks, rep.Findings)
	}
	info, err := Inspect(disk, size, nil)
	if err != nil {
		f.Fatal(err)
	}
	img, err := OpenStorage(crashStorage{disk}, &OpenOptions{ReadWrite: true, Backing: f.below(info)})
	if err != nil {
		f.Fatal(err)
	}
	f.expect(img, want, fmt.Sprintf("opened again (version %d)", info.Version))
	if f.snap != nil && f.other == nil {
		if got, err := f.read(disk, size, 1, f.below(info)); err != nil || !bytes.Equal(got, f.snap) {
			f.Errorf("the snapshot reads otherwise: %v", err)
		}
	}
	if err := img.Close(); err != nil {
		f.Error(err)
	}
}

// countdown is a context that ends when it was asked so many times whether it has.
type countdown struct {
	context.Context
	left int
}

// Err implements context.Context.
func (c *countdown) Err() error {
	if c.left--; c.left < 0 {
		return context.Canceled
	}
	return nil
}

// TestAmendCanceled ends Amend and Rebase by their context, at every point where they look at it: the image has the
// features and the content of before, and nothing is lost; or it was too late.
func TestAmendCanceled(t *testing.T) {
	for _, w := range amendWorks() {
		t.Run(w.name, func(t *testing.T) {
			c := newAmendCase(w, 6)
			r, err := newAmendRun(c)
			if err != nil {
				t.Fatal(err)
			}
			canceled := 0
			for n := 0; ; n++ {
				disk := r.image.Disk().Clone()
				img, err := OpenStorage(crashStorage{disk}, &OpenOptions{ReadWrite: true, Backing: r.base})
				if err != nil {
					t.Fatal(err)
				}
				err = c.change(&countdown{context.Background(), n}, img)
				info := img.Info()
				if err == nil != r.now(&info) || err != nil && (!r.old(&info) || !errors.Is(err, context.Canceled)) {
					t.Errorf("after %d looks: error %v, features %+v", n, err, info)
				}
				f := amendFault{amendRun: r, TB: t}
				f.expect(img, r.guest, "afterwards")
				if err := img.Close(); err != nil {
					t.Error(err)
				}
				f.reopen(disk, r.guest, false)
				if err == nil || t.Failed() {
					break
				}
				canceled++
			}
			if t.Logf("canceled at %d places", canceled); canceled == 0 {
				t.Error("the context is not looked at")
			}
		})
	}
}
