package hostfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// openFile makes an empty file for the time of the test.
func openFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestLockBytes checks which bytes stand for a lock.
func TestLockBytes(t *testing.T) {
	rows := []struct {
		lock         ImageLock
		held, tested []int64
	}{
		{lock: ImageLock{}},
		{ImageLock{Used: PermRead}, []int64{100}, []int64{200}},
		{ImageLock{Denied: PermResize}, []int64{203}, []int64{103}},
		{ImageLock{Used: PermRead | PermWrite | PermResize, Denied: PermWriteUnchanged}, []int64{100, 101, 103, 202}, []int64{102, 200, 201, 203}},
	}
	for _, row := range rows {
		if diff := cmp.Diff(row.held, row.lock.held()); diff != "" {
			t.Errorf("%+v: held (-want +got):\n%s", row.lock, diff)
		}
		if diff := cmp.Diff(row.tested, row.lock.tested()); diff != "" {
			t.Errorf("%+v: tested (-want +got):\n%s", row.lock, diff)
		}
	}
}

// TestUnsupported checks which errors of the system say that it lacks an operation.
func TestUnsupported(t *testing.T) {
	rows := []struct {
		err    error
		also   error
		want   bool
		reason string
	}{
		{err: nil, reason: "success"},
		{err: syscall.EIO, also: syscall.EINVAL, reason: "a real failure"},
		{err: syscall.ENOSPC, also: syscall.EINVAL, reason: "a full disk"},
		{err: syscall.EINVAL, reason: "EINVAL not listed"},
		{err: syscall.EINVAL, also: syscall.EINVAL, want: true, reason: "EINVAL listed"},
		{err: fmt.Errorf("wrapped: %w", syscall.EINVAL), also: syscall.EINVAL, want: true, reason: "wrapped"},
		{err: syscall.ENOSYS, want: true, reason: "ENOSYS"},
		{err: syscall.EOPNOTSUPP, want: true, reason: "EOPNOTSUPP"},
		{err: syscall.ENOTSUP, want: true, reason: "ENOTSUP"},
	}
	for _, row := range rows {
		var also []error
		if row.also != nil {
			also = append(also, row.also)
		}
		err := unsupported(row.err, also...)
		if got := errors.Is(err, errors.ErrUnsupported); got != row.want || !errors.Is(err, row.err) {
			t.Errorf("%s: %v is unsupported: %v, want %v", row.reason, err, got, row.want)
		}
	}
}

// TestRanges checks the arguments that every range operation refuses or ignores.
func TestRanges(t *testing.T) {
	f := openFile(t)
	for name, op := range map[string]func(f *os.File, off, n int64) error{"PunchHole": PunchHole, "ZeroRange": ZeroRange, "Allocate": Allocate} {
		for _, r := range [][2]int64{{-1, 1}, {0, -1}, {1, maxOffset}, {maxOffset, 1}} {
			if err := op(f, r[0], r[1]); !errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("%s %d bytes at %d: %v, want EINVAL", name, r[1], r[0], err)
			}
		}
		if err := op(f, 5, 0); err != nil {
			t.Errorf("%s of nothing: %v", name, err)
		}
	}
	if _, _, err := NextData(f, -1); !errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("NextData(-1): %v, want EINVAL", err)
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != 0 {
		t.Errorf("the file has grown to %d bytes, %v", fi.Size(), err)
	}
}

// TestSettle ends non-blocking mode and reports append mode.
func TestSettle(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no such modes")
	}
	name := openFile(t).Name()
	for _, row := range []struct {
		flag int
		want bool
	}{{os.O_RDWR, false}, {os.O_RDWR | OpenNonblock, false}, {os.O_RDWR | os.O_APPEND, true}} {
		f, err := os.OpenFile(name, row.flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		appends, err := Settle(f)
		if appends != row.want || err != nil {
			t.Errorf("flags %#x: appends %v, %v", row.flag, appends, err)
		}
		f.Close()
		if _, err := Settle(f); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
}

// TestSyncDir syncs a directory and fails on what is none.
func TestSyncDir(t *testing.T) {
	dir := t.TempDir()
	if err := SyncDir(dir); err != nil && (runtime.GOOS == "linux" || !errors.Is(err, errors.ErrUnsupported)) {
		t.Errorf("a directory: %v", err)
	}
	if runtime.GOOS != "windows" {
		if err := SyncDir(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a missing directory: %v", err)
		}
	}
}

// TestConflictError names the permission that is in the way.
func TestConflictError(t *testing.T) {
	for b, want := range map[int64]string{
		101: "somebody uses its permission write",
		203: "somebody denies its permission resize",
		99:  "somebody has locked its byte 99",
		204: "somebody has locked its byte 204",
	} {
		if got := (&ConflictError{Byte: b}).Error(); got != want {
			t.Errorf("byte %d: %q, want %q", b, got, want)
		}
	}
}

// TestCopyRange copies between files: all of it, what there is before the end of the source, and nothing of what must be
// refused.
func TestCopyRange(t *testing.T) {
	src, dst := openFile(t), openFile(t)
	content := make([]byte, 300_000)
	for i := range content {
		content[i] = byte(i * 7)
	}
	if _, err := src.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	n, err := CopyRange(dst, src, 1000, 5, 200_000)
	if errors.Is(err, errors.ErrUnsupported) && n == 0 {
		t.Skip("the host does not copy here")
	}
	if n != 200_000 || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	got := make([]byte, n)
	if _, err := dst.ReadAt(got, 1000); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(content[5:5+n], got); diff != "" {
		t.Error("other bytes")
	}
	if n, err := CopyRange(dst, src, 0, 299_000, 5000); n != 1000 || err != nil {
		t.Errorf("past the end: %d bytes, %v, want 1000", n, err)
	}
	for _, r := range [][3]int64{{-1, 0, 1}, {0, -1, 1}, {0, 0, -1}, {1, 0, maxOffset}, {0, 1, maxOffset}} {
		if n, err := CopyRange(dst, src, r[0], r[1], r[2]); n != 0 || !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%v: %d bytes, %v, want EINVAL", r, n, err)
		}
	}
	src.Close()
	if _, err := CopyRange(dst, src, 0, 0, 1); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("of a closed file: %v", err)
	}
}
