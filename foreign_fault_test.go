package qcow2

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// errFlaky is the error of a reader that fails.
var errFlaky = errors.New("flaky")

// flakyReader fails one reading.
type flakyReader struct {
	r    *bytes.Reader
	left int // readings before the one that fails
}

// ReadAt implements io.ReaderAt.
func (r *flakyReader) ReadAt(p []byte, off int64) (int, error) {
	if r.left--; r.left == -1 {
		return 0, errFlaky
	}
	return r.r.ReadAt(p, off)
}

// TestForeignFaults fails each single reading of an open, a read and a walk of the extents. The call fails with its
// error, and the next try works.
func TestForeignFaults(t *testing.T) {
	for name, build := range foreignImages {
		im := build()
		if name == "qed" {
			im = qedOver("x", true)
		}
		size, failures := im.size(), 0
		for i := 0; ; i++ {
			r := &flakyReader{r: bytes.NewReader(im.file), left: i}
			try := func(f func() error) {
				t.Helper()
				for range 2 {
					err := f()
					if err == nil {
						return
					}
					failures++
					if !errors.Is(err, errFlaky) {
						t.Fatalf("%s: reading %d fails: %v", name, i, err)
					}
				}
				t.Fatalf("%s: reading %d fails, and the second try too", name, i)
			}
			try(func() error { _, err := DetectForeign(r, size); return err })
			try(func() error { _, err := InspectForeign(r, size, im.format, nil); return err })
			var d *ForeignDisk
			try(func() (err error) {
				o := &OpenOptions{NoBacking: im.format == ForeignQED, Limits: &Limits{MetadataBytes: 1}}
				d, err = OpenForeign(NewReaderStorage(r, size), im.format, o)
				return err
			})
			try(func() error {
				for e, err := range d.Extents(0, d.Size()) {
					switch {
					case errors.Is(err, ErrBackingRequired):
						return nil
					case err != nil:
						return err
					}
					try(func() error { _, err := d.ReadAt(make([]byte, e.Len), e.Off); return err })
				}
				return nil
			})
			mustClose(t, d)
			if r.left >= 0 {
				break
			}
		}
		if failures < 4 {
			t.Errorf("%s: %d failures", name, failures)
		}
	}
}

// TestForeignClosed asks a closed disk for its extents, before and while they are walked.
func TestForeignClosed(t *testing.T) {
	im := newTestVDI()
	d := im.mustOpen(t, nil)
	n, last := 0, error(nil)
	for _, err := range d.Extents(0, d.Size()) {
		if n++; n == 1 {
			mustClose(t, d)
		}
		last = err
	}
	if !errors.Is(last, fs.ErrClosed) {
		t.Errorf("extents end after %d runs: %v", n, last)
	}
	for _, err := range d.Extents(0, d.Size()) {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("extents of a closed disk: %v", err)
		}
	}
}

// TestForeignBackingName reads names of backing files as C has them, up to the first NUL; an empty one is none.
func TestForeignBackingName(t *testing.T) {
	for stored, want := range map[string]string{"base": "base", "base\x00more": "base", "": "", "\x00x": "", strings.Repeat("n", 1023): strings.Repeat("n", 1023)} {
		im := qedOver(stored, true)
		info, err := InspectForeign(im.reader(), im.size(), ForeignQED, nil)
		if err != nil || info.BackingFile != want {
			t.Errorf("name %.20q: %.20q, %v", stored, info.BackingFile, err)
		}
	}
}

// TestForeignLock opens an image beside a writer of it: ErrLocked, but with LockShare and LockOff.
func TestForeignLock(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("no such locks here")
	}
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, newTestVDI().file, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func() *FileStorage {
		s, err := OpenFileStorage(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { mustClose(t, s) })
		return s
	}
	writer := open()
	d, err := OpenForeign(open(), ForeignVDI, nil)
	if err != nil || !d.Info().Locked {
		t.Fatal(err)
	}
	if err := writer.Lock(LockWriter); !errors.Is(err, ErrLocked) {
		t.Errorf("a writer beside a reader: %v", err)
	}
	mustClose(t, d)
	if err := writer.Lock(LockWriter); err != nil {
		t.Fatalf("a writer after Close: %v", err)
	}
	for mode, want := range map[LockMode]error{LockDefault: ErrLocked, LockShare: nil, LockOff: nil} {
		s := open()
		d, err := OpenForeign(s, ForeignVDI, &OpenOptions{Lock: mode})
		if !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("lock mode %d: %v, want %v", mode, err, want)
		}
		if err == nil {
			mustClose(t, d)
		}
	}
}
