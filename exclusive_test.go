package qcow2

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
)

// TestExclusively shows what holds while an operation is alone with the image: writers and Sync wait, readers do not
// until it pauses, and the dirty bit is off.
func TestExclusively(t *testing.T) {
	s := NewMemoryStorage()
	img, err := CreateStorage(s, 1<<20, &CreateOptions{LazyRefcounts: true})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	old, fresh := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
	if _, err := img.WriteAt(old, 0); err != nil {
		t.Fatal(err)
	}
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	if !img.wb.dirty {
		t.Fatal("lazy refcounts: the dirty bit is off after a write and a Sync")
	}

	var wg sync.WaitGroup
	var left, paused atomic.Bool // the operation has ended; its pause has begun and not ended
	err = img.exclusively(func() error {
		if img.wb.dirty || img.hdr.dirty() {
			t.Error("the dirty bit is set")
		}
		for _, f := range []func() error{
			func() error { _, err := img.WriteAt(fresh, 0); return err },     // in place
			func() error { _, err := img.WriteAt(fresh, 1<<19); return err }, // allocating
			img.Sync,
		} {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if err := f(); err != nil {
					t.Error(err)
				}
				if !left.Load() {
					t.Error("a write or a Sync went on beside the operation")
				}
			}()
		}
		got := make([]byte, len(old))
		if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, old) {
			t.Errorf("read beside the operation: %v, content as before: %v", err, bytes.Equal(got, old))
		}
		err := img.pausing(func() error {
			paused.Store(true)
			wg.Add(1)
			started := make(chan struct{})
			go func() {
				defer wg.Done()
				close(started)
				if _, err := img.ReadAt(make([]byte, 1), 0); err != nil {
					t.Error(err)
				}
				if paused.Load() {
					t.Error("a read went on during the pause")
				}
			}()
			<-started
			paused.Store(false)
			return nil
		})
		left.Store(true)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	got := make([]byte, len(fresh))
	for _, off := range []int64{0, 1 << 19} {
		if _, err := img.ReadAt(got, off); err != nil || !bytes.Equal(got, fresh) {
			t.Errorf("read at %#x after the operation: %v, content as written: %v", off, err, bytes.Equal(got, fresh))
		}
	}
}

// headerFaults fails writes of the header's first sector while armed, as many as it says.
type headerFaults struct {
	*MemoryStorage
	fail int
}

// errHeaderFault is what a failed write of the header returns.
var errHeaderFault = errors.New("no write of the header")

// WriteAt implements Storage. A write that fails has reached the host all the same: nobody knows.
func (s *headerFaults) WriteAt(p []byte, off int64) (int, error) {
	n, err := s.MemoryStorage.WriteAt(p, off)
	if off < sectorSize && s.fail > 0 {
		s.fail--
		return 0, errHeaderFault
	}
	return n, err
}

// TestSwitchHeader shows what becomes of a switch that fails: it is put back, or the image is failed (I6).
func TestSwitchHeader(t *testing.T) {
	for _, test := range []struct {
		name   string
		fail   int // writes of the header that fail
		want   error
		size   uint64 // on disk afterwards
		failed bool
	}{
		{name: "well", size: 2 << 20},
		{name: "failed once", fail: 1, want: errHeaderFault, size: 1 << 20},
		{name: "failed for good", fail: 2, want: ErrFailed, size: 1 << 20, failed: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &headerFaults{MemoryStorage: NewMemoryStorage()}
			img, err := CreateStorage(s, 1<<20, nil)
			if err != nil {
				t.Fatal(err)
			}
			s.fail = test.fail
			err = img.exclusively(func() error { return img.switchHeader(encodeSizeField(2 << 20)) })
			if !errors.Is(err, test.want) {
				t.Errorf("switch: %v, want %v", err, test.want)
			}
			h, err := readHeader(s, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			if h.size != test.size {
				t.Errorf("size on disk %d, want %d", h.size, test.size)
			}
			if _, err := img.WriteAt([]byte{1}, 0); (err != nil) != test.failed || test.failed && !errors.Is(err, ErrFailed) {
				t.Errorf("a write afterwards: %v", err)
			}
			_ = img.Abandon()
		})
	}
	img, err := CreateStorage(NewMemoryStorage(), 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if err := img.switchHeader(508, make([]byte, 8)); !errors.Is(err, ErrRange) {
		t.Errorf("a switch across two sectors: %v, want ErrRange", err)
	}
}
