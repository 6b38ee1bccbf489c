package qemutest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// recorder is a testing.TB that notes what a helper does to it instead of doing it.
type recorder struct {
	testing.TB
	failed, skipped bool
	log             []string
	cleanups        []func()
}

func (r *recorder) Helper()          {}
func (r *recorder) Failed() bool     { return r.failed }
func (r *recorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }

func (r *recorder) Logf(format string, args ...any) {
	r.log = append(r.log, fmt.Sprintf(format, args...))
}

func (r *recorder) Errorf(format string, args ...any) {
	r.Logf(format, args...)
	r.failed = true
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Skipf(format string, args ...any) {
	r.Logf(format, args...)
	r.skipped = true
	runtime.Goexit()
}

// record runs f on a recorder, cleanups included, until it returns or ends its test.
func record(t *testing.T, f func(t testing.TB)) *recorder {
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			for _, c := range r.cleanups {
				c()
			}
		}()
		f(r)
	}()
	<-done
	return r
}

func TestRequire(t *testing.T) {
	empty := t.TempDir()
	tests := []struct {
		name, path, env string
		skipped, failed bool
	}{
		{name: "missing tool skips", path: empty, skipped: true},
		{name: "missing tool fails where required", path: empty, env: "1", failed: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("PATH", tt.path)
			t.Setenv(requireEnv, tt.env)
			r := record(t, Require)
			if r.skipped != tt.skipped || r.failed != tt.failed {
				t.Errorf("skipped %v, failed %v; want %v, %v", r.skipped, r.failed, tt.skipped, tt.failed)
			}
			if log := strings.Join(r.log, "\n"); !strings.Contains(log, "qemu-img") {
				t.Errorf("message %q does not name the tool", log)
			}
		})
	}
}

// newImage creates a qcow2 image of 1 MiB with 64 KiB of a pattern at 128 KiB.
func newImage(t *testing.T) string {
	t.Helper()
	Require(t)
	path := filepath.Join(t.TempDir(), "image.qcow2")
	Img(t, "create", "-q", "-f", "qcow2", path, "1M")
	IO(t, path, "write -P 0xa5 128k 64k")
	return path
}

func TestImg(t *testing.T) {
	path := newImage(t)
	if out, exit := ImgExit(t, "check", "-f", "qcow2", path); exit != 0 || !strings.Contains(out, "No errors") {
		t.Errorf("check: exit %d, %q", exit, out)
	}
	if _, exit := ImgExit(t, "info", filepath.Join(t.TempDir(), "absent")); exit != 1 {
		t.Errorf("info of an absent file: exit %d, want 1", exit)
	}
	if r := record(t, func(t testing.TB) { Img(t, "no-such-command") }); !r.failed {
		t.Error("Img passes over a failure")
	}
}

func TestIO(t *testing.T) {
	path := newImage(t)
	IO(t, path, "read -P 0xa5 128k 64k", "read -P 0 0 128k")
	IOWith(t, IOOptions{Cache: "writeback", ReadOnly: true, ForceShare: true}, path, "read -P 0xa5 128k 64k")
	IOWith(t, IOOptions{ImageOpts: true}, "driver=qcow2,file.filename="+path, "read -P 0xa5 128k 64k")

	raw := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(raw, bytes.Repeat([]byte{7}, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	IOWith(t, IOOptions{Format: "raw"}, raw, "read -P 7 0 512")

	for _, cmds := range [][]string{
		{"read -P 0xa4 128k 64k"},
		{"read -P 0xa4 128k 64k", "read -P 0xa5 128k 64k"}, // the first of two
		{"read 1M 512"},
		{"no-such-command"},
	} {
		if r := record(t, func(t testing.TB) { IO(t, path, cmds...) }); !r.failed {
			t.Errorf("IO passes over the failure of %q", cmds)
		}
	}
	if r := record(t, func(t testing.TB) { IO(t, raw, "read 0 512") }); !r.failed {
		t.Error("IO takes a raw file for a qcow2 image")
	}
}

func TestCheck(t *testing.T) {
	path := newImage(t)
	c := Check(t, path)
	want := CheckResult{Format: "qcow2", TotalClusters: 16, AllocatedClusters: 1}
	c.Output, c.ImageEndOffset = "", 0
	if diff := cmp.Diff(want, c); diff != "" {
		t.Errorf("Check (-want +got):\n%s", diff)
	}
	if !CheckClean(t, path) {
		t.Error("not clean")
	}

	// The refcount block is cluster 2. Counting cluster 9, which is not there, leaks it; not counting
	// the L2 table or the data is a corruption.
	tests := []struct {
		name   string
		off    int64
		value  byte
		want   CheckResult
		broken func(CheckResult) bool
	}{
		{"leak", 2<<16 + 9*2 + 1, 1, CheckResult{Exit: 3}, func(c CheckResult) bool { return c.Leaks == 1 && c.Corruptions == 0 }},
		{"corruption", 2<<16 + 4*2 + 1, 0, CheckResult{Exit: 2}, func(c CheckResult) bool { return c.Corruptions > 0 }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := newImage(t)
			poke(t, path, tt.off, tt.value)
			c := Check(t, path)
			if c.Exit != tt.want.Exit || !tt.broken(c) || c.Clean() {
				t.Errorf("Check: %+v", c)
			}
			if r := record(t, func(t testing.TB) { CheckClean(t, path) }); !r.failed {
				t.Error("CheckClean passes over it")
			}
			if c := Check(t, path, "-r", "all"); c.LeaksFixed+c.CorruptionsFixed == 0 {
				t.Errorf("Check -r all: %+v", c)
			}
			CheckClean(t, path)
		})
	}
	if r := record(t, func(t testing.TB) { Check(t, filepath.Join(os.TempDir(), "no", "such", "file")) }); !r.failed {
		t.Error("Check of an absent file gives a verdict")
	}
}

// poke sets one byte of a file, growing it by a cluster first if the byte counts one at its end.
func poke(t *testing.T, path string, off int64, value byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(10 << 16); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{value}, off); err != nil {
		t.Fatal(err)
	}
}

func TestCompare(t *testing.T) {
	path := newImage(t)
	raw := filepath.Join(t.TempDir(), "raw")
	Img(t, "convert", "-f", "qcow2", "-O", "raw", path, raw)
	if !Compare(t, path, "qcow2", raw, "raw") {
		t.Error("equal disks differ")
	}
	poke(t, raw, 0, 1)
	if r := record(t, func(t testing.TB) { Compare(t, path, "qcow2", raw, "raw") }); !r.failed {
		t.Error("different disks are equal")
	}
}

func TestInfoAndMap(t *testing.T) {
	path := newImage(t)
	info := Info(t, path)
	got := map[string]any{"format": info["format"], "virtual-size": info["virtual-size"]}
	want := map[string]any{"format": "qcow2", "virtual-size": json.Number("1048576")}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Info (-want +got):\n%s", diff)
	}

	entries := Map(t, path)
	if len(entries) != 3 || entries[1].Offset == nil {
		t.Fatalf("Map: %+v", entries)
	}
	entries[1].Offset = nil
	wantMap := []MapEntry{
		{Start: 0, Length: 128 << 10, Zero: true},
		{Start: 128 << 10, Length: 64 << 10, Present: true, Data: true},
		{Start: 192 << 10, Length: 832 << 10, Zero: true},
	}
	if diff := cmp.Diff(wantMap, entries); diff != "" {
		t.Errorf("Map (-want +got):\n%s", diff)
	}
}

func TestDump(t *testing.T) {
	keep := t.TempDir()
	t.Setenv(keepEnv, keep)
	path := filepath.Join(t.TempDir(), "image")
	content := make([]byte, 200<<10)
	content[70<<10], content[len(content)-1] = 1, 2
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	kept := func() []string {
		names, err := filepath.Glob(filepath.Join(keep, "*", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return names
	}

	record(t, func(t testing.TB) { Dump(t, path) })
	if names := kept(); len(names) != 0 {
		t.Errorf("a passed test leaves %q", names)
	}
	r := record(t, func(t testing.TB) {
		Dump(t, path, path+".absent")
		t.Errorf("on purpose")
	})
	names := kept()
	if len(names) != 1 || filepath.Base(names[0]) != "image" {
		t.Fatalf("a failed test leaves %q", names)
	}
	got, err := os.ReadFile(names[0])
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("the kept image differs (%v)", err)
	}
	if log := strings.Join(r.log, "\n"); !strings.Contains(log, names[0]) {
		t.Errorf("log %q does not name %s", log, names[0])
	}
}
