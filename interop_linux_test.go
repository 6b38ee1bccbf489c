package qcow2_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"

	"golang.org/x/sys/unix"

	"github.com/go-qcow2/qcow2"
)

// TestCloseEndsLock closes a storage whose descriptor somebody else still holds a copy of, as a process
// does for a moment that is being started: the image lock ends all the same.
func TestCloseEndsLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	copied, dupErr := -1, error(nil)
	if err := conn.Control(func(fd uintptr) { copied, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || dupErr != nil {
		t.Fatal(err, dupErr)
	}
	defer unix.Close(copied)
	first, err := qcow2.NewFileStorage(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Lock(qcow2.LockWriter); errors.Is(err, errors.ErrUnsupported) {
		qemutest.Missing(t, "no image locks here: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	second, err := qcow2.OpenFileStorage(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := second.Lock(qcow2.LockWriter); !errors.Is(err, qcow2.ErrLocked) {
		t.Fatalf("lock beside the first: %v, want ErrLocked", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := second.Lock(qcow2.LockWriter); err != nil {
		t.Errorf("lock after Close: %v", err)
	}
}
