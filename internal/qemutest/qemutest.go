// Package qemutest runs QEMU's own tools, qemu-img and qemu-io, as the second opinion of
// interoperability tests.
//
// Every function takes the test and ends it with the tool's output when the tool does not do what was
// asked, so that a test reads as the list of its steps. A test that uses the package calls Require
// first: without the tools it is skipped, loudly, or fails where the environment variable
// QCOW2_REQUIRE_QEMU is "1", as in CI.
//
// The tools' default for a missing format is to probe it. No function here relies on that: a format
// is "qcow2" unless the call names another.
package qemutest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	// requireEnv is the environment variable that turns a missing tool into a failure.
	requireEnv = "QCOW2_REQUIRE_QEMU"
	// keepEnv is the environment variable that names the directory for the images of failed tests.
	// Default: the system's temporary directory.
	keepEnv = "QCOW2_KEEP_DIR"
	// toolTimeout bounds one run of a tool, so that a hang is reported as one.
	toolTimeout = 5 * time.Minute
)

// Require skips the test if qemu-img or qemu-io is missing, or fails it if QCOW2_REQUIRE_QEMU is "1".
func Require(t testing.TB) {
	t.Helper()
	for _, tool := range []string{"qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			Missing(t, "%v (Debian: apt-get install qemu-utils)", err)
		}
	}
}

// Missing skips the test, loudly, because the machine lacks something that it needs; or fails it if
// QCOW2_REQUIRE_QEMU is "1", where nothing may be lacking.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	what := fmt.Sprintf(format, args...)
	if os.Getenv(requireEnv) == "1" {
		t.Fatalf("%s=1, but: %s", requireEnv, what)
	}
	t.Skipf("SKIPPED, NOTHING COMPARED: %s", what)
}

// result is what a tool printed and how it ended.
type result struct {
	stdout, stderr string
	exit           int
}

// String shows both outputs and the exit code.
func (r result) String() string {
	return fmt.Sprintf("exit %d\n%s%s", r.exit, r.stdout, r.stderr)
}

// run starts the tool and waits for it. The test ends if the tool cannot be started, is killed by a
// signal, or takes longer than toolTimeout.
func run(t testing.TB, tool string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, tool, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if ctx.Err() != nil || r.exit < 0 || err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s %s: %v\n%v", tool, strings.Join(args, " "), errors.Join(err, ctx.Err()), r)
	}
	return r
}

// mustRun is run for a tool that must exit with 0.
func mustRun(t testing.TB, tool string, args ...string) result {
	t.Helper()
	r := run(t, tool, args...)
	if r.exit != 0 {
		t.Fatalf("%s %s: %v", tool, strings.Join(args, " "), r)
	}
	return r
}

// Img runs qemu-img and returns its standard output. Any exit code but 0 ends the test.
func Img(t testing.TB, args ...string) string {
	t.Helper()
	return mustRun(t, "qemu-img", args...).stdout
}

// ImgExit runs qemu-img and returns its standard output and exit code, whatever it is. Its standard
// error goes to the test's log.
func ImgExit(t testing.TB, args ...string) (stdout string, exit int) {
	t.Helper()
	r := run(t, "qemu-img", args...)
	if r.stderr != "" {
		t.Logf("qemu-img %s: %s", strings.Join(args, " "), r.stderr)
	}
	return r.stdout, r.exit
}

// IOOptions says how qemu-io opens a file. The zero value opens a qcow2 image for writing.
type IOOptions struct {
	Format     string // "qcow2", "raw", ... Default "qcow2"
	Cache      string // -t: "writeback", "unsafe", ... Default: qemu-io's own
	ReadOnly   bool   // -r
	ForceShare bool   // -U; needs ReadOnly
	ImageOpts  bool   // the file is a list of options ("driver=qcow2,file.filename=..."), without Format
}

// IO runs commands of qemu-io on the qcow2 image file, opened for writing, and returns what it
// printed. The test ends if a command fails or a pattern ("read -P") is not found.
func IO(t testing.TB, file string, cmds ...string) string {
	t.Helper()
	return IOWith(t, IOOptions{}, file, cmds...)
}

// IOWith is IO with options.
func IOWith(t testing.TB, opts IOOptions, file string, cmds ...string) string {
	t.Helper()
	out, exit := IOExit(t, opts, file, cmds...)
	// An exit code covers the last command only in some versions, so the words count as well.
	if exit != 0 || strings.Contains(out, "Pattern verification failed") || strings.Contains(out, "failed:") {
		t.Fatalf("qemu-io %s %q: exit %d\n%s", file, cmds, exit, out)
	}
	return out
}

// IOExit is IOWith for commands that may fail: it returns both outputs, standard output first, and
// the exit code.
func IOExit(t testing.TB, opts IOOptions, file string, cmds ...string) (output string, exit int) {
	t.Helper()
	var args []string
	if opts.ImageOpts {
		args = append(args, "--image-opts")
	} else if opts.Format == "" {
		args = append(args, "-f", "qcow2")
	} else {
		args = append(args, "-f", opts.Format)
	}
	if opts.Cache != "" {
		args = append(args, "-t", opts.Cache)
	}
	if opts.ReadOnly {
		args = append(args, "-r")
	}
	if opts.ForceShare {
		args = append(args, "-U")
	}
	for _, c := range cmds {
		args = append(args, "-c", c)
	}
	r := run(t, "qemu-io", append(args, file)...)
	return r.stdout + r.stderr, r.exit
}

// CheckResult is the verdict of qemu-img check. A count that qemu-img does not mention is 0.
type CheckResult struct {
	Exit               int    `json:"-"` // 0 clean, 1 not done, 2 corruptions, 3 leaks only, 63 not supported
	Output             string `json:"-"` // everything it printed, for messages
	Format             string `json:"format"`
	Corruptions        int64  `json:"corruptions"`
	Leaks              int64  `json:"leaks"`
	CheckErrors        int64  `json:"check-errors"`
	CorruptionsFixed   int64  `json:"corruptions-fixed"`
	LeaksFixed         int64  `json:"leaks-fixed"`
	ImageEndOffset     int64  `json:"image-end-offset"`
	TotalClusters      int64  `json:"total-clusters"`
	AllocatedClusters  int64  `json:"allocated-clusters"`
	FragmentedClusters int64  `json:"fragmented-clusters"`
	CompressedClusters int64  `json:"compressed-clusters"`
}

// Clean reports whether the check was done and found neither corruptions nor leaks nor errors.
func (r CheckResult) Clean() bool {
	return r.Exit == 0 && r.Corruptions == 0 && r.Leaks == 0 && r.CheckErrors == 0
}

// Check runs qemu-img check on the qcow2 image at path, without repairing, and returns its verdict.
// Further arguments ("-r", "leaks") come before the path. The test ends only if there is no verdict.
func Check(t testing.TB, path string, args ...string) CheckResult {
	t.Helper()
	all := append([]string{"check", "-f", "qcow2", "--output=json"}, args...)
	r := run(t, "qemu-img", append(all, path)...)
	var c CheckResult
	if err := json.Unmarshal([]byte(r.stdout), &c); err != nil {
		t.Fatalf("qemu-img check %s: no verdict: %v\n%v", path, err, r)
	}
	c.Exit, c.Output = r.exit, r.stdout+r.stderr
	return c
}

// Verdict runs qemu-img check on an image that may be damaged in any way. args come last: how the image is
// opened, its name, and repairs. ok is false if there is no verdict: qemu-img could not open the image, gave the
// check up, crashed, or took longer than timeout; the result then has Exit, which is negative after a crash or
// the timeout, and Output only.
func Verdict(t testing.TB, timeout time.Duration, args ...string) (c CheckResult, ok bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-img", append([]string{"check", "--output=json"}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatalf("qemu-img check %s: %v", strings.Join(args, " "), err)
	}
	if json.Unmarshal(stdout.Bytes(), &c) != nil || cmd.ProcessState.ExitCode() < 0 {
		c = CheckResult{}
	} else {
		ok = true
	}
	c.Exit, c.Output = cmd.ProcessState.ExitCode(), stdout.String()+stderr.String()
	if ctx.Err() != nil {
		c.Output += fmt.Sprintf("\n%v after %v", ctx.Err(), timeout)
	}
	return c, ok
}

// CheckClean fails the test, without ending it, unless Check finds the image clean. It reports the
// same.
func CheckClean(t testing.TB, path string) bool {
	t.Helper()
	c := Check(t, path)
	if !c.Clean() {
		t.Errorf("qemu-img check %s: exit %d, %d corruptions, %d leaks, %d errors\n%s",
			path, c.Exit, c.Corruptions, c.Leaks, c.CheckErrors, c.Output)
	}
	return c.Clean()
}

// Compare fails the test, without ending it, unless qemu-img finds the disks a and b equal. It reports
// the same. A longer disk equals a shorter one if the rest reads as zeros.
func Compare(t testing.TB, a, formatA, b, formatB string) bool {
	t.Helper()
	r := run(t, "qemu-img", "compare", "-f", formatA, "-F", formatB, a, b)
	if r.exit != 0 {
		t.Errorf("qemu-img compare %s (%s) with %s (%s): %v", a, formatA, b, formatB, r)
	}
	return r.exit == 0
}

// Info returns what qemu-img info --output=json says about the qcow2 image at path. Numbers are
// json.Number, so that 64 bits stay exact.
func Info(t testing.TB, path string) map[string]any {
	t.Helper()
	var info map[string]any
	decodeJSON(t, Img(t, "info", "-f", "qcow2", "--output=json", path), &info)
	return info
}

// MapEntry is a run of the guest's disk, as qemu-img map gives it.
type MapEntry struct {
	Start   int64  `json:"start"`  // guest offset in bytes
	Length  int64  `json:"length"` // in bytes
	Depth   int    `json:"depth"`  // layer of the chain that decides: 0 is the image
	Present bool   `json:"present"`
	Zero    bool   `json:"zero"` // reads as zeros
	Data    bool   `json:"data"` // stored somewhere
	Offset  *int64 `json:"offset"`
}

// Map returns what qemu-img map says about the qcow2 image at path, in the order of guest offsets.
func Map(t testing.TB, path string) []MapEntry {
	t.Helper()
	var entries []MapEntry
	decodeJSON(t, Img(t, "map", "-f", "qcow2", "--output=json", path), &entries)
	return entries
}

// decodeJSON decodes s into v, with numbers as json.Number where v leaves the choice.
func decodeJSON(t testing.TB, s string, v any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(s))
	d.UseNumber()
	if err := d.Decode(v); err != nil {
		t.Fatalf("decode JSON: %v\n%s", err, s)
	}
}

// Dump keeps the files at paths if the test fails: when it ends they are copied into a new directory
// under $QCOW2_KEEP_DIR, or under the system's temporary directory, whose name is logged. A file that
// does not exist by then is left out. Call it after t.TempDir, whose files it would find gone
// otherwise.
func Dump(t testing.TB, paths ...string) {
	t.Helper()
	t.Cleanup(func() {
		t.Helper()
		if !t.Failed() {
			return
		}
		dir, err := os.MkdirTemp(os.Getenv(keepEnv), "qcow2-failed-")
		if err != nil {
			t.Logf("images of the failed test are lost: %v", err)
			return
		}
		for _, path := range paths {
			kept := filepath.Join(dir, filepath.Base(path))
			switch err := copySparse(kept, path); {
			case errors.Is(err, os.ErrNotExist):
			case err != nil:
				t.Logf("keep %s: %v", path, err)
			default:
				t.Logf("kept %s", kept)
			}
		}
	})
}

// copySparse copies the file src to dst, which must not exist, and leaves holes for zeros.
func copySparse(dst, src string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	buf, zeros := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); ; {
		n, err := io.ReadFull(in, buf)
		if !bytes.Equal(buf[:n], zeros[:n]) {
			if _, err := out.WriteAt(buf[:n], off); err != nil {
				return err
			}
		}
		off += int64(n)
		switch {
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			return out.Truncate(off)
		case err != nil:
			return err
		}
	}
}
