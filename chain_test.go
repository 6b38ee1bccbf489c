package qcow2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// countingResolver counts what it is asked and what it gives out.
type countingResolver struct {
	Resolver
	asked, opened int
}

// Resolve implements Resolver.
func (c *countingResolver) Resolve(ref FileRef) (Storage, error) {
	c.asked++
	s, err := c.Resolver.Resolve(ref)
	if err == nil {
		c.opened++
	}
	return s, err
}

// openFiles returns the number of files that the process holds open, or -1 where that cannot be told.
func openFiles() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(entries)
}

// chainFile writes an image of 1 MiB to name. change changes its header first.
func chainFile(t testing.TB, name string, change func(h *header)) {
	t.Helper()
	h := testHeader(t, 1<<20, nil)
	if change != nil {
		change(h)
	}
	if err := os.WriteFile(name, testFile(t, h), 0o600); err != nil {
		t.Fatal(err)
	}
}

// overFile names a backing file in a header.
func overFile(name, format string) func(h *header) {
	return func(h *header) { h.backingName, h.backingFormat = name, format }
}

// onData names an external data file in a header.
func onData(name string) func(h *header) {
	return func(h *header) {
		h.dataFileName = name
		h.incompatible |= incompatDataFile
	}
}

// TestOpenBesideRefuses opens images whose references must not be followed, through ResolveBeside: each has
// its own error, nothing is opened that was refused, and nothing stays open.
func TestOpenBesideRefuses(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("needs symbolic links and FIFOs")
	}
	// resolveReason returns a check for a *ResolveError of that reason.
	resolveReason := func(reason string) func(err error) bool {
		return func(err error) bool {
			var re *ResolveError
			return errors.As(err, &re) && re.Reason == reason && errors.Is(err, ErrResolve)
		}
	}
	is := func(targets ...error) func(err error) bool {
		return func(err error) bool {
			for _, target := range targets {
				if !errors.Is(err, target) {
					return false
				}
			}
			return true
		}
	}
	headerField := func(field string, class error) func(err error) bool {
		return func(err error) bool {
			var he *HeaderError
			return errors.As(err, &he) && he.Field == field && errors.Is(err, class)
		}
	}
	tests := []struct {
		name   string
		top    func(h *header)
		others map[string]func(h *header)
		want   func(err error) bool
		asked  int // times that the resolver is asked
		opened int // storages that it gives out
	}{
		{name: "up", top: overFile("../secret", "qcow2"), want: resolveReason(`the name holds ".."`), asked: 1},
		{name: "up, raw", top: overFile("../secret", "raw"), want: resolveReason(`the name holds ".."`), asked: 1},
		{name: "absolute", top: overFile("/etc/hostname", "raw"), want: resolveReason("the name is absolute"), asked: 1},
		{name: "json", top: overFile(`json:{"driver":"file","filename":"/etc/hostname"}`, "raw"), want: resolveReason("the name is a json: description"), asked: 1},
		{name: "protocol", top: overFile("nbd:localhost:10809", "raw"), want: resolveReason("the name begins with a protocol"), asked: 1},
		{name: "link out", top: overFile("out", "raw"), want: resolveReason("a symbolic link leads out of the directory"), asked: 1},
		{name: "fifo", top: overFile("fifo", "raw"), want: resolveReason("not a regular file"), asked: 1},
		{name: "directory", top: overFile(".", "raw"), want: resolveReason("not a regular file"), asked: 1},
		{name: "missing", top: overFile("none", "raw"), want: is(ErrResolve, fs.ErrNotExist), asked: 1},
		{name: "data file up", top: onData("../secret"), want: resolveReason(`the name holds ".."`), asked: 1},
		{name: "data file absolute", top: onData("/etc/hostname"), want: resolveReason("the name is absolute"), asked: 1},
		{name: "data file json", top: onData(`json:{}`), want: resolveReason("the name is a json: description"), asked: 1},
		{name: "data file link out", top: onData("out"), want: resolveReason("a symbolic link leads out of the directory"), asked: 1},
		{name: "data file fifo", top: onData("fifo"), want: resolveReason("not a regular file"), asked: 1},
		{name: "data file without a name", top: onData(""), want: resolveReason("the name is empty"), asked: 1},

		{name: "itself", top: overFile("top", "qcow2"), want: is(ErrChain), asked: 1, opened: 1},
		{name: "itself, raw", top: overFile("top", "raw"), want: is(ErrChain), asked: 1, opened: 1},
		{name: "itself by a link", top: overFile("self", "qcow2"), want: is(ErrChain), asked: 1, opened: 1},
		{name: "two in a loop", top: overFile("mid", "qcow2"), others: map[string]func(*header){"mid": overFile("top", "qcow2")},
			want: is(ErrChain), asked: 2, opened: 2},
		{name: "loop below", top: overFile("mid", "qcow2"), others: map[string]func(*header){"mid": overFile("low", "qcow2"), "low": overFile("mid", "qcow2")},
			want: is(ErrChain), asked: 3, opened: 3},
		{name: "data file itself", top: onData("top"), want: is(ErrChain), asked: 1, opened: 1},
		{name: "data file and backing file", top: func(h *header) { onData("plain")(h); overFile("plain", "raw")(h) },
			want: is(ErrChain), asked: 2, opened: 2},
		{name: "data file of the backing file", top: overFile("mid", "qcow2"), others: map[string]func(*header){"mid": onData("top")},
			want: is(ErrChain), asked: 2, opened: 2},

		{name: "no format", top: overFile("plain", ""), want: is(ErrBackingFormatUnknown)},
		{name: "no format below", top: overFile("mid", "qcow2"), others: map[string]func(*header){"mid": overFile("plain", "")},
			want: is(ErrBackingFormatUnknown), asked: 1, opened: 1},
		{name: "unknown format", top: overFile("plain", "vmdk"), want: is(ErrUnsupported)},
		{name: "not the format", top: overFile("plain", "qcow2"), want: is(ErrNotQcow2), asked: 1, opened: 1},
		{name: "encrypted", top: func(h *header) { overFile("mid", "qcow2")(h); h.cryptMethod = cryptAES },
			others: map[string]func(*header){"mid": nil}, want: is(ErrEncrypted, ErrUnsupported)},
		{name: "encrypted below", top: overFile("mid", "qcow2"), others: map[string]func(*header){"mid": func(h *header) { h.cryptMethod = cryptAES }},
			want: is(ErrEncrypted, ErrUnsupported), asked: 1, opened: 1},
		{name: "unknown feature", top: func(h *header) { overFile("mid", "qcow2")(h); h.incompatible |= 1 << 40 },
			others: map[string]func(*header){"mid": nil}, want: headerField("incompatible_features", ErrUnsupported)},
		{name: "unknown feature below", top: overFile("mid", "qcow2"), others: map[string]func(*header){"mid": func(h *header) { h.incompatible |= 1 << 40 }},
			want: headerField("incompatible_features", ErrUnsupported), asked: 1, opened: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			dir := filepath.Join(root, "in")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"secret", "in/plain"} {
				if err := os.WriteFile(filepath.Join(root, name), make([]byte, 4096), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for name, target := range map[string]string{"out": "../secret", "self": "top"} {
				if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			}
			if out, err := exec.Command("mkfifo", filepath.Join(dir, "fifo")).CombinedOutput(); err != nil {
				t.Fatalf("mkfifo: %v: %s", err, out)
			}
			chainFile(t, filepath.Join(dir, "top"), tt.top)
			for name, change := range tt.others {
				chainFile(t, filepath.Join(dir, name), change)
			}
			for _, readWrite := range []bool{false, true} {
				r := &countingResolver{Resolver: ResolveBeside(dir)}
				before := openFiles()
				img, err := Open(filepath.Join(dir, "top"), &OpenOptions{ReadWrite: readWrite, Resolver: r})
				if err == nil {
					t.Fatalf("writable %v: opened; close: %v", readWrite, img.Close())
				}
				if !tt.want(err) {
					t.Errorf("writable %v: %v", readWrite, err)
				}
				if r.asked != tt.asked || r.opened != tt.opened {
					t.Errorf("writable %v: resolver asked %d times, opened %d; want %d and %d", readWrite, r.asked, r.opened, tt.asked, tt.opened)
				}
				if after := openFiles(); after != before {
					t.Errorf("writable %v: %d files are open, %d were", readWrite, after, before)
				}
			}
		})
	}
}

// TestOpenChainDepth opens the longest chain that the limit allows, and one that is longer.
func TestOpenChainDepth(t *testing.T) {
	for _, tt := range []struct {
		images int
		raw    bool // the last one is raw
		depth  int  // Limits.ChainDepth
		want   bool
	}{
		{images: 32, want: true},
		{images: 32, raw: true, want: true},
		{images: 33},
		{images: 33, raw: true},
		{images: 3, depth: 3, want: true},
		{images: 4, depth: 3},
		{images: 1, depth: 1, want: true},
		{images: 40, depth: 40, want: true},
	} {
		t.Run(fmt.Sprintf("%d images, raw %v, limit %d", tt.images, tt.raw, tt.depth), func(t *testing.T) {
			dir := t.TempDir()
			for i := range tt.images {
				name := filepath.Join(dir, fmt.Sprint(i))
				format := "qcow2"
				switch {
				case i == tt.images-1 && tt.raw:
					if err := os.WriteFile(name, []byte("last"), 0o600); err != nil {
						t.Fatal(err)
					}
					continue
				case i == tt.images-1:
					chainFile(t, name, nil)
					continue
				case i == tt.images-2 && tt.raw:
					format = "raw"
				}
				chainFile(t, name, overFile(fmt.Sprint(i+1), format))
			}
			r := &countingResolver{Resolver: ResolveBeside(dir)}
			before := openFiles()
			img, err := Open(filepath.Join(dir, "0"), &OpenOptions{Resolver: r, Limits: &Limits{ChainDepth: tt.depth}})
			if tt.want {
				if err != nil {
					t.Fatal(err)
				}
				p := make([]byte, 512)
				if _, err := img.ReadAt(p, 0); err != nil {
					t.Error(err)
				}
				if got := string(p[:4]) == "last"; got != tt.raw {
					t.Errorf("the read reached the last file: %v", got)
				}
				if err := img.Close(); err != nil {
					t.Error(err)
				}
			} else {
				var le *LimitError
				if !errors.Is(err, ErrChain) || !errors.As(err, &le) || le.Limit != "ChainDepth" {
					t.Errorf("error %v, want ErrChain and a *LimitError of ChainDepth", err)
				}
			}
			want := tt.images - 1
			if !tt.want {
				want-- // the one too many is not even asked for
			}
			if r.opened != want {
				t.Errorf("%d files opened, want %d", r.opened, want)
			}
			if after := openFiles(); after != before {
				t.Errorf("%d files are open, %d were", after, before)
			}
		})
	}
}

// TestOpenWithoutResolver opens images that name other files without a way to reach those: the error tells
// the file as data.
func TestOpenWithoutResolver(t *testing.T) {
	for _, tt := range []struct {
		name string
		top  func(h *header)
		want FileRef
	}{
		{"backing file", overFile("../base", "qcow2"), FileRef{Image: "top", Name: "../base", Format: "qcow2", Kind: KindBacking}},
		{"data file", onData("/disk"), FileRef{Image: "top", Name: "/disk", Format: "raw", Kind: KindData}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "top")
			chainFile(t, name, tt.top)
			before := openFiles()
			_, err := Open(name, nil)
			var fe *FileRequiredError
			if !errors.Is(err, ErrBackingRequired) || !errors.As(err, &fe) || fe.Ref != tt.want || fe.Hint == "" {
				t.Errorf("error %v, want a *FileRequiredError about %+v", err, tt.want)
			}
			if after := openFiles(); after != before {
				t.Errorf("%d files are open, %d were", after, before)
			}
		})
	}
}
