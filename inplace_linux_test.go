package qcow2

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestConvertInPlaceLock wants a file that somebody else uses to be refused, untouched, by all that would change it,
// and the lock given back.
func TestConvertInPlaceLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk")
	sc := inPlaceScenarioNamed(t, "raw")
	half := interrupted(t, sc, false).Bytes()
	length := int64(len(sc.source))
	if err := os.WriteFile(name, half, 0o666); err != nil {
		t.Fatal(err)
	}
	s, other := openForUpdate(t, name), openForUpdate(t, name)
	if err := other.Lock(LockReader); errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("no locks here: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	src, err := NewRawDisk(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := ConvertInPlace(t.Context(), s, src, &InPlaceOptions{IgnoreFooter: true}); !errors.Is(err, ErrLocked) {
		t.Errorf("convert: %v", err)
	}
	if _, err := ResumeInPlace(t.Context(), s, src, length, nil); !errors.Is(err, ErrLocked) {
		t.Errorf("resume: %v", err)
	}
	if _, err := RollbackInPlace(t.Context(), s, length); !errors.Is(err, ErrLocked) {
		t.Errorf("roll back: %v", err)
	}
	if now, err := os.ReadFile(name); err != nil || !bytes.Equal(now, half) {
		t.Errorf("a refusal changed the file: %v", err)
	}
	if err := other.Unlock(); err != nil {
		t.Fatal(err)
	}
	if _, err := RollbackInPlace(t.Context(), s, length); err != nil {
		t.Error(err)
	}
	if err := other.Lock(LockWriter); err != nil {
		t.Errorf("the lock is still held: %v", err)
	}
	if now, err := os.ReadFile(name); err != nil || !bytes.Equal(now, sc.source) {
		t.Errorf("rolled back, the file is not what it was: %v", err)
	}
}
