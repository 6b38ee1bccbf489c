package qcow2

import (
	"bytes"
	"testing"
)

func TestDiscardQuick(t *testing.T) {
	s := NewMemoryStorage()
	img, err := CreateStorage(s, 10<<20+512, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte("discard!"), 10<<20/8)
	mustWrite(t, img, p, 0)
	if err := img.Discard(100, 5<<20); err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(p)
	clear(want[64<<10 : 5<<20])
	if err := wantAt(img, want, 0)(); err != nil {
		t.Fatal(err)
	}
	if err := img.WriteZeroes(6<<20+5, 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	clear(want[6<<20+5:][:1<<20])
	if err := img.WriteZeroes(7<<20+5, 1<<20, ZeroMayUnmap); err != nil {
		t.Fatal(err)
	}
	clear(want[7<<20+5:][:1<<20])
	if err := wantAt(img, want, 0)(); err != nil {
		t.Fatal(err)
	}
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, img, p, 0)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	checkByQEMU(t, s)
}
