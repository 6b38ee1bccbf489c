package qcow2

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// namesIn returns the names of the files in a directory.
func namesIn(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// expectFile fails the test unless the file holds a disk of the format that reads as want.
func expectFile(t *testing.T, name, format string, want []byte) {
	t.Helper()
	if format == formatRaw {
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := difference(got, want, 0); err != nil {
			t.Error(err)
		}
		return
	}
	img, err := Open(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	expectContent(t, img, want)
}

// TestConvertFile makes files, over others and not.
func TestConvertFile(t *testing.T) {
	content := convertContent(4, 3<<20)
	src := &knownDisk{content: content}
	old := []byte("what was there before")
	for _, format := range []string{formatRaw, formatQcow2} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			name := filepath.Join(dir, "disk")
			opts := &ConvertFileOptions{Format: format, Size: 4 << 20}
			if err := ConvertFile(t.Context(), name, src, opts); err != nil {
				t.Fatal(err)
			}
			want := append(bytes.Clone(content), make([]byte, 1<<20)...)
			expectFile(t, name, format, want)

			if err := ConvertFile(t.Context(), name, src, opts); !errors.Is(err, fs.ErrExist) {
				t.Errorf("over another file: %v, want fs.ErrExist", err)
			}
			expectFile(t, name, format, want)

			// The file itself is replaced, whatever names it.
			if err := os.WriteFile(name, old, 0o640); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(name, 0o640); err != nil {
				t.Fatal(err)
			}
			link := filepath.Join(dir, "link")
			if err := os.Symlink("disk", link); err != nil {
				t.Skip(err)
			}
			opts.Overwrite = true
			if err := ConvertFile(t.Context(), link, src, opts); err != nil {
				t.Fatal(err)
			}
			expectFile(t, name, format, want)
			if fi, err := os.Lstat(link); err != nil || fi.Mode().Type() != fs.ModeSymlink {
				t.Errorf("the link: %v, %v", fi.Mode(), err)
			}
			if fi, err := os.Stat(name); err != nil || fi.Mode().Perm() != 0o640 {
				t.Errorf("permissions %v, %v", fi.Mode(), err)
			}
			if d := cmp.Diff([]string{"disk", "link"}, namesIn(t, dir)); d != "" {
				t.Errorf("files (-want +got):\n%s", d)
			}
		})
	}
}

// TestConvertFileFails ends the making of files: nothing is left but what was there before, or with KeepPartial what was
// written so far.
func TestConvertFileFails(t *testing.T) {
	content := convertContent(4, 3<<20)
	old := []byte("what was there before")
	for _, format := range []string{formatRaw, formatQcow2} {
		for _, exists := range []bool{false, true} {
			for _, keep := range []bool{false, true} {
				for _, cause := range []error{errBadSector, context.Canceled} {
					dir := t.TempDir()
					name := filepath.Join(dir, "disk")
					if exists {
						if err := os.WriteFile(name, old, 0o600); err != nil {
							t.Fatal(err)
						}
					}
					ctx, cancel := context.WithCancel(t.Context())
					src := &knownDisk{content: content}
					if cause == errBadSector {
						src.failAt = 3
					} else {
						src.onRead = func(n int64) {
							if n == 2 {
								cancel()
							}
						}
					}
					opts := &ConvertFileOptions{Format: format, Overwrite: exists, KeepPartial: keep}
					err := ConvertFile(ctx, name, src, opts)
					cancel()
					if !errors.Is(err, cause) {
						t.Errorf("%v, want %v", err, cause)
					}
					var want []string
					if exists || keep {
						want = []string{"disk"}
					}
					if d := cmp.Diff(want, namesIn(t, dir)); d != "" {
						t.Errorf("%s, exists %t, keep %t, %v: files (-want +got):\n%s", format, exists, keep, cause, d)
					}
					got, err := os.ReadFile(name)
					if err != nil && len(want) > 0 {
						t.Fatal(err)
					}
					if exists && keep == bytes.Equal(got, old) {
						t.Errorf("%s, exists, keep %t: the old content is there: %t", format, keep, !keep)
					}
					if keep && format == formatQcow2 {
						img, err := Open(name, nil)
						if err != nil {
							t.Fatal(err)
						}
						if err := img.Close(); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
		}
	}
}

// TestConvertFileRefuses gives ConvertFile what it must refuse; the file that is there stays as it is.
func TestConvertFileRefuses(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "disk")
	img, err := Create(name, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	src := &knownDisk{content: make([]byte, 1<<20)}
	base := filepath.Join(dir, "raw")
	raw := newRawFile(t, base, make([]byte, 512), os.O_RDWR)
	tests := []struct {
		name string
		file string
		src  Disk
		opts ConvertFileOptions
		want error
	}{
		{"the source itself", name, img, ConvertFileOptions{Overwrite: true}, ErrChain},
		{"the raw source itself", base, raw, ConvertFileOptions{Overwrite: true}, ErrChain},
		{"in use", name, src, ConvertFileOptions{Overwrite: true}, ErrLocked},
		{"unknown format", filepath.Join(dir, "new"), src, ConvertFileOptions{Format: "vmdk"}, ErrOption},
		{"odd size", filepath.Join(dir, "new"), src, ConvertFileOptions{Size: 2<<20 + 1}, ErrOption},
		{"smaller", filepath.Join(dir, "new"), src, ConvertFileOptions{Size: 512}, ErrOption},
		{"bad option of the copy", filepath.Join(dir, "new"), src, ConvertFileOptions{ConvertOptions: ConvertOptions{Rate: -1}}, ErrOption},
		{"bad option of the image", filepath.Join(dir, "new"), src, ConvertFileOptions{Create: &CreateOptions{ClusterSize: 3}}, ErrOption},
		{"compressed raw", filepath.Join(dir, "new"), src, ConvertFileOptions{Format: formatRaw, ConvertOptions: ConvertOptions{Compress: true}}, ErrOption},
		{"no directory", filepath.Join(dir, "none", "new"), src, ConvertFileOptions{}, fs.ErrNotExist},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.want == ErrLocked && !img.Info().Locked {
				t.Skip("no locks here")
			}
			if err := ConvertFile(t.Context(), tt.file, tt.src, &tt.opts); !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
			if got := namesIn(t, dir); !slices.Equal(got, []string{"disk", "raw"}) {
				t.Errorf("files %q", got)
			}
		})
	}
	if err := img.Sync(); err != nil {
		t.Errorf("the image in use: %v", err)
	}
}

// newRawFile returns the disk in a new raw file with the given content, opened with flag until the test ends.
func newRawFile(t *testing.T, name string, content []byte, flag int) *RawDisk {
	t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := OpenFileStorage(name, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	raw, err := NewRawDisk(s)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
