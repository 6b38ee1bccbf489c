package qcow2

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// besideDir makes a directory of images with a file outside of it, and returns it.
//
//	secret              a file outside
//	in/top, in/base     files
//	in/sub/mid, in/sub/base
//	in/inside           link to sub/base
//	in/out, in/outdir   links to ../secret and to ..
//	in/dangling         link to a missing file beside
//	in/loop             link to itself
//	in/a:b              a file with a colon in its name
//	in/fifo
func besideDir(t *testing.T) string {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("needs symbolic links and FIFOs")
	}
	root := t.TempDir()
	dir := filepath.Join(root, "in")
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"secret", "in/top", "in/base", "in/sub/mid", "in/sub/base", "in/a:b"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"inside": "sub/base", "out": "../secret", "outdir": "..", "absolute": filepath.Join(root, "secret"),
		"dangling": "none", "loop": "loop",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("mkfifo", filepath.Join(dir, "fifo")).CombinedOutput(); err != nil {
		t.Fatalf("mkfifo: %v: %s", err, out)
	}
	return dir
}

// TestResolveBeside opens what may be opened, and checks that it is that file and how it was opened.
func TestResolveBeside(t *testing.T) {
	dir := besideDir(t)
	rows := []struct {
		name     string
		ref      FileRef
		want     string // contents
		writable bool
	}{
		{name: "beside", ref: FileRef{Image: "top", Name: "base"}, want: "in/base"},
		{name: "no image name", ref: FileRef{Name: "base"}, want: "in/base"},
		{name: "dot", ref: FileRef{Image: "top", Name: "./base"}, want: "in/base"},
		{name: "double slash", ref: FileRef{Image: "top", Name: "sub//mid"}, want: "in/sub/mid"},
		{name: "below", ref: FileRef{Image: "top", Name: "sub/mid"}, want: "in/sub/mid"},
		{name: "beside an image below", ref: FileRef{Image: "sub/mid", Name: "base"}, want: "in/sub/base"},
		{name: "absolute image name", ref: FileRef{Image: filepath.Join(dir, "sub", "mid"), Name: "base"}, want: "in/sub/base"},
		{name: "link inside", ref: FileRef{Image: "top", Name: "inside"}, want: "in/sub/base"},
		{name: "colon after a slash", ref: FileRef{Image: "top", Name: "./a:b"}, want: "in/a:b"},
		{name: "data file", ref: FileRef{Image: "top", Name: "base", Kind: KindData}, want: "in/base"},
		{name: "data file for writing", ref: FileRef{Image: "top", Name: "base", Kind: KindData, Writable: true}, want: "in/base", writable: true},
		{name: "backing file for writing", ref: FileRef{Image: "top", Name: "base", Writable: true}, want: "in/base", writable: true},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			s, err := ResolveBeside(dir).Resolve(row.ref)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if diff := cmp.Diff(row.want, string(readAll(t, s))); diff != "" {
				t.Errorf("contents (-want +got):\n%s", diff)
			}
			if _, err := s.WriteAt([]byte(row.want), 0); (err == nil) != row.writable {
				t.Errorf("a write gives %v, want success: %v", err, row.writable)
			}
		})
	}
	t.Run("working directory", func(t *testing.T) {
		t.Chdir(dir)
		r := ResolveBeside(".")
		t.Chdir("sub")
		s, err := r.Resolve(FileRef{Image: "top", Name: "base"})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if got := string(readAll(t, s)); got != "in/base" {
			t.Errorf("got %s of another working directory", got)
		}
	})
}

// TestResolveBesideRefuses gives every name that is refused, with its own reason. That nothing was
// opened shows in the access by a FIFO, which would hang, and in no storage being returned.
func TestResolveBesideRefuses(t *testing.T) {
	dir := besideDir(t)
	rows := []struct {
		name   string
		ref    FileRef
		reason string
		is     error // what else the error matches, or nil
	}{
		{name: "empty", ref: FileRef{Name: ""}, reason: "the name is empty"},
		{name: "NUL", ref: FileRef{Name: "base\x00"}, reason: "the name holds a NUL byte"},
		{name: "json", ref: FileRef{Name: `json:{"driver":"file","filename":"/etc/passwd"}`}, reason: "the name is a json: description"},
		{name: "nbd", ref: FileRef{Name: "nbd:localhost:10809"}, reason: "the name begins with a protocol"},
		{name: "http", ref: FileRef{Name: "http://host/base"}, reason: "the name begins with a protocol"},
		{name: "file protocol", ref: FileRef{Name: "file:base"}, reason: "the name begins with a protocol"},
		{name: "protocol with plus", ref: FileRef{Name: "nbd+unix:///x?socket=/s"}, reason: "the name begins with a protocol"},
		{name: "file with a colon", ref: FileRef{Name: "a:b"}, reason: "the name begins with a protocol"},
		{name: "drive", ref: FileRef{Name: `c:\base`}, reason: "the name begins with a protocol"},
		{name: "absolute", ref: FileRef{Name: filepath.Join(dir, "base")}, reason: "the name is absolute"},
		{name: "up", ref: FileRef{Name: "../secret"}, reason: `the name holds ".."`},
		{name: "up from below", ref: FileRef{Name: "sub/../../secret"}, reason: `the name holds ".."`},
		{name: "up but inside", ref: FileRef{Name: "sub/../base"}, reason: `the name holds ".."`},
		{name: "up from an image below", ref: FileRef{Image: "sub/mid", Name: "../base"}, reason: `the name holds ".."`},
		{name: "up alone", ref: FileRef{Name: ".."}, reason: `the name holds ".."`},
		{name: "link out", ref: FileRef{Name: "out"}, reason: "a symbolic link leads out of the directory"},
		{name: "link out to a directory", ref: FileRef{Name: "outdir/secret"}, reason: "a symbolic link leads out of the directory"},
		{name: "absolute link out", ref: FileRef{Name: "absolute"}, reason: "a symbolic link leads out of the directory"},
		{name: "image outside", ref: FileRef{Image: "../top", Name: "secret"}, reason: "the image that names it lies outside the directory"},
		{name: "absolute image outside", ref: FileRef{Image: filepath.Join(dir, "..", "top"), Name: "secret"}, reason: "the image that names it lies outside the directory"},
		{name: "missing", ref: FileRef{Name: "none"}, reason: "no such file", is: fs.ErrNotExist},
		{name: "link to a missing file", ref: FileRef{Name: "dangling"}, reason: "no such file", is: fs.ErrNotExist},
		{name: "link to itself", ref: FileRef{Name: "loop"}, reason: "the file cannot be opened"},
		{name: "below a file", ref: FileRef{Name: "base/x"}, reason: "the file cannot be opened", is: syscall.ENOTDIR},
		{name: "directory", ref: FileRef{Name: "sub"}, reason: "not a regular file", is: ErrUnsupported},
		{name: "directory itself", ref: FileRef{Name: "."}, reason: "not a regular file", is: ErrUnsupported},
		{name: "fifo", ref: FileRef{Name: "fifo"}, reason: "not a regular file", is: ErrUnsupported},
		{name: "fifo for writing", ref: FileRef{Name: "fifo", Kind: KindData, Writable: true}, reason: "not a regular file", is: ErrUnsupported},
		{name: "backing fifo for writing", ref: FileRef{Name: "fifo", Writable: true}, reason: "not a regular file", is: ErrUnsupported},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			s, err := ResolveBeside(dir).Resolve(row.ref)
			if s != nil {
				s.Close()
				t.Fatal("a storage is returned")
			}
			var re *ResolveError
			if !errors.As(err, &re) || !errors.Is(err, ErrResolve) {
				t.Fatalf("error %v, want a *ResolveError", err)
			}
			if diff := cmp.Diff(&ResolveError{Ref: row.ref, Reason: row.reason}, &ResolveError{Ref: re.Ref, Reason: re.Reason}); diff != "" {
				t.Errorf("refusal (-want +got):\n%s\n%v", diff, err)
			}
			if row.is != nil && !errors.Is(err, row.is) {
				t.Errorf("error %v does not match %v", err, row.is)
			}
		})
	}
	if _, err := ResolveBeside(filepath.Join(dir, "none")).Resolve(FileRef{Name: "base"}); !errors.Is(err, ErrResolve) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory: %v", err)
	}
}

// TestFileRefPath checks the names by which nested images are known.
func TestFileRefPath(t *testing.T) {
	rows := []struct{ image, name, want string }{
		{"top", "base", "base"},
		{"", "base", "base"},
		{"top", "sub/mid", "sub/mid"},
		{"sub/mid", "base", "sub/base"},
		{"sub/mid", "./deep/base", "sub/deep/base"},
		{"sub/mid", "../base", "base"},
		{"/images/top", "base", "/images/base"},
		{"sub/mid", "/base", "/base"},
		{"sub/mid", "nbd://host/x", "nbd://host/x"},
		{"sub/mid", "json:{}", "json:{}"},
		{"sub/mid", "./a:b", "sub/a:b"},
		{"sub/mid", "", ""},
	}
	for _, row := range rows {
		if got := (FileRef{Image: row.image, Name: row.name}).Path(); got != row.want {
			t.Errorf("%q in %q is %q, want %q", row.name, row.image, got, row.want)
		}
	}
}

// TestResolverMap gives out storages that survive being closed.
func TestResolverMap(t *testing.T) {
	m := NewMemoryStorage()
	if _, err := m.WriteAt([]byte("contents"), 0); err != nil {
		t.Fatal(err)
	}
	file := openTestFile(t, t.TempDir())
	r := ResolverMap{"memory": m, "file": file, "nil": nil}
	for _, name := range []string{"none", "nil", ""} {
		var re *ResolveError
		_, err := r.Resolve(FileRef{Name: name})
		if !errors.As(err, &re) || re.Ref.Name != name || !errors.Is(err, ErrResolve) || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v, want a *ResolveError of what does not exist", name, err)
		}
	}
	for range 2 {
		s, err := r.Resolve(FileRef{Name: "memory"})
		if err != nil {
			t.Fatal(err)
		}
		if got := string(readAll(t, s)); got != "contents" || s.Identity() != m.Identity() {
			t.Errorf("got %q with identity %v", got, s.Identity())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	s, err := r.Resolve(FileRef{Name: "file"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Lock(LockWriter); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Fatal(err)
	}
	other, err := r.Resolve(FileRef{Name: "file"})
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Close(); err != nil { // took no lock, so gives none back
		t.Error(err)
	}
	locked := file.held
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if runtime.GOOS == "linux" && (locked != imageLocks[LockWriter] || file.held != imageLocks[LockNone]) {
		t.Errorf("lock %v, and after closing %v", locked, file.held)
	}
	if _, err := file.WriteAt([]byte("x"), 0); err != nil {
		t.Errorf("the caller's storage was closed: %v", err)
	}
}

// TestResolverFunc calls the function.
func TestResolverFunc(t *testing.T) {
	want := FileRef{Image: "top", Name: "base", Format: "raw", Kind: KindData, Writable: true}
	var got FileRef
	m := NewMemoryStorage()
	s, err := ResolverFunc(func(ref FileRef) (Storage, error) { got = ref; return m, nil }).Resolve(want)
	if s != m || err != nil {
		t.Errorf("got %v, %v", s, err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("reference (-want +got):\n%s", diff)
	}
}

// FuzzResolveName looks for a name that is taken and leads out of the directory.
func FuzzResolveName(f *testing.F) {
	for _, seed := range []string{"base", "../x", "a/../../x", "/x", "nbd:x", "json:{}", "a\x00", ".", "./a:b", `..\x`, "a//b/", "\xff"} {
		f.Add("sub/mid", seed)
	}
	f.Add("..", "x")
	f.Add("/dir/sub/top", "x")
	f.Add("/dirs/top", "x")
	b := &besideResolver{dir: "/dir"}
	f.Fuzz(func(t *testing.T, image, name string) {
		if refuseName(name) != "" {
			return
		}
		imageDir, ok := b.imageDir(image)
		if !ok {
			return
		}
		local, err := filepath.Localize(path.Join(imageDir, name))
		if err != nil {
			return
		}
		if !filepath.IsLocal(local) || strings.ContainsRune(local, 0) {
			t.Errorf("%q in %q leads to %q", name, image, local)
		}
	})
}
