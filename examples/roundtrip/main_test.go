package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/measure"
)

func TestRoundTrip(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	t.Run("a file system", func(t *testing.T) {
		if _, err := measure.FindProgram("mke2fs"); err != nil {
			if os.Getenv("QCOW2_REQUIRE_QEMU") == "1" {
				t.Fatal(err)
			}
			t.Skipf("SKIPPED: %v", err)
		}
		var out bytes.Buffer
		if err := roundTrip(context.Background(), &out, "", 8<<20); err != nil || !strings.Contains(out.String(), "PASSED") {
			t.Errorf("%v\n%s", err, &out)
		}
	})
	t.Run("a file of odd length", func(t *testing.T) {
		name := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(name, bytes.Repeat([]byte("odd"), 100001), 0o600); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := roundTrip(context.Background(), &out, name, 1<<20); err != nil || !strings.Contains(out.String(), "PASSED") {
			t.Errorf("%v\n%s", err, &out)
		}
	})
	t.Run("no such file", func(t *testing.T) {
		if err := roundTrip(context.Background(), &bytes.Buffer{}, filepath.Join(t.TempDir(), "absent"), 1<<20); err == nil {
			t.Error("no error")
		}
	})
	left, err := os.ReadDir(os.Getenv("TMPDIR"))
	if err != nil || len(left) != 0 {
		t.Errorf("leaves %v (%v)", left, err)
	}
}

func TestCompare(t *testing.T) {
	big := bytes.Repeat([]byte{1}, 1<<20)
	tests := []struct {
		name string
		a, b []byte
		same bool
	}{
		{"empty", nil, nil, true},
		{"equal", big[:1024], big[:1024], true},
		{"equal, one buffer", big, big, true},
		{"padded to a sector", big[:1000], append(bytes.Clone(big[:1000]), make([]byte, 24)...), true},
		{"padded behind a buffer", append(bytes.Clone(big), 1), append(append(bytes.Clone(big), 1), make([]byte, 511)...), true},
		{"padded with rubbish", big[:1000], big[:1024], false},
		{"padded with too much", big[:1000], append(bytes.Clone(big[:1000]), make([]byte, 536)...), false},
		{"a sector more", big[:512], append(bytes.Clone(big[:512]), make([]byte, 512)...), false},
		{"a sector more behind a buffer", big, append(bytes.Clone(big), make([]byte, 512)...), false},
		{"shorter", big[:1024], big[:512], false},
		{"shorter by a buffer", append(bytes.Clone(big), 1), big, false},
		{"last byte differs", big[:512], append(bytes.Clone(big[:511]), 2), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
			for name, p := range map[string][]byte{a: tt.a, b: tt.b} {
				if err := os.WriteFile(name, p, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			n, err := compare(context.Background(), a, b)
			if (err == nil) != tt.same || tt.same && n != int64(len(tt.a)) {
				t.Errorf("%d, %v", n, err)
			}
		})
	}
}
