package qcow2

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// rawFile reads and writes a descriptor with the bare system calls.
type rawFile int

func (fd rawFile) ReadAt(p []byte, off int64) (int, error)  { return unix.Pread(int(fd), p, off) }
func (fd rawFile) WriteAt(p []byte, off int64) (int, error) { return unix.Pwrite(int(fd), p, off) }

// rawReadWriter opens the file for the benchmark's comparison.
func rawReadWriter(b *testing.B, name string) rawFile {
	fd, err := unix.Open(name, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Close(fd) })
	return rawFile(fd)
}

// allLockBytes is every byte that image locks use.
var allLockBytes = []int64{100, 101, 102, 103, 200, 201, 202, 203}

// lockRows is the table of docs/LOCKS.md: what each role holds and tests, and how qemu-io is brought to open
// the file of that role. The file is one of lockFiles.
var lockRows = []struct {
	role   LockRole
	holds  []int64
	tests  []int64
	file   string   // the file that is locked
	qemuIO []string // arguments of qemu-io
}{
	{LockWriter, []int64{100, 101, 103, 201, 203}, []int64{101, 103, 200, 201, 203}, "q.qcow2", []string{"-f", "qcow2", "q.qcow2"}},
	{LockReader, []int64{100, 201, 203}, []int64{101, 103, 200}, "q.qcow2", []string{"-r", "-f", "qcow2", "q.qcow2"}},
	{LockReader, []int64{100, 201, 203}, []int64{101, 103, 200}, "q.qcow2", []string{"-f", "qcow2", "over-q.qcow2"}},
	{LockShared, []int64{100}, []int64{200}, "q.qcow2", []string{"-r", "-U", "-f", "qcow2", "q.qcow2"}},
	{LockRawReader, []int64{100}, []int64{200}, "r.raw", []string{"-r", "-f", "raw", "r.raw"}},
	{LockRawReader, []int64{100}, []int64{200}, "r.raw", []string{"-f", "qcow2", "over-r.qcow2"}},
	{LockRawWriter, []int64{100, 101}, []int64{200, 201}, "r.raw", []string{"-f", "raw", "r.raw"}},
	{LockDataWriter, []int64{100, 101, 103, 203}, []int64{103, 200, 201, 203}, "d.raw", []string{"-f", "qcow2", "data.qcow2"}},
	{LockDataReader, []int64{100, 203}, []int64{103, 200}, "d.raw", []string{"-r", "-f", "qcow2", "data.qcow2"}},
}

// lockConflicts says of two roles whether they exclude each other: written down by hand, row by column.
var lockConflicts = map[LockRole]map[LockRole]bool{
	LockNone:       {},
	LockReader:     {LockWriter: true, LockRawWriter: true, LockDataWriter: true},
	LockWriter:     {LockReader: true, LockWriter: true, LockRawWriter: true, LockDataWriter: true, LockDataReader: true},
	LockShared:     {},
	LockRawReader:  {},
	LockRawWriter:  {LockReader: true, LockWriter: true},
	LockDataWriter: {LockReader: true, LockWriter: true, LockDataWriter: true, LockDataReader: true},
	LockDataReader: {LockWriter: true, LockDataWriter: true},
}

// storageQEMU makes the files of lockRows in a new directory, by qemu-img.
func storageQEMU(t *testing.T) (dir string) {
	t.Helper()
	qemutest.Require(t)
	dir = t.TempDir()
	for _, args := range [][]string{
		{"-f", "qcow2", "q.qcow2", "1M"},
		{"-f", "raw", "r.raw", "1M"},
		{"-f", "qcow2", "-o", "data_file=d.raw", "data.qcow2", "1M"},
		{"-f", "qcow2", "-b", "q.qcow2", "-F", "qcow2", "over-q.qcow2"},
		{"-f", "qcow2", "-b", "r.raw", "-F", "raw", "over-r.qcow2"},
	} {
		if out, err := runIn(dir, "qemu-img", append([]string{"create", "-q"}, args...)...); err != nil {
			t.Fatalf("qemu-img create %q: %v: %s", args, err, out)
		}
	}
	return dir
}

// runIn runs a tool in a directory, without input.
func runIn(dir, tool string, args ...string) (string, error) {
	cmd := exec.Command(tool, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// startQEMUIO starts qemu-io and returns once it has opened its image. It runs until stop or the end of
// the test.
func startQEMUIO(t *testing.T, dir string, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command("qemu-io", args...)
	cmd.Dir = dir
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		in.Close()
		io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil {
			t.Errorf("qemu-io %q: %v", args, err)
		}
	}
	t.Cleanup(stop)
	if _, err := io.WriteString(in, "read 0 512\n"); err != nil {
		t.Fatal(err)
	}
	// Data comes only once the image is open.
	for sc := bufio.NewScanner(out); sc.Scan(); {
		if strings.Contains(sc.Text(), "read 512/512 bytes") {
			return stop
		}
	}
	t.Fatalf("qemu-io %q did not open its image", args)
	return nil
}

// heldBytes returns the lock bytes of a file that somebody has locked.
func heldBytes(t *testing.T, file string) (held []int64) {
	t.Helper()
	probe, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer probe.Close()
	for _, b := range allLockBytes {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Start: b, Len: 1}
		if err := unix.FcntlFlock(probe.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
			t.Fatal(err)
		}
		if lk.Type != unix.F_UNLCK {
			held = append(held, b)
		}
	}
	return held
}

// holdByte locks one byte of a file for as long as it is open.
func holdByte(t *testing.T, file string, b int64) *os.File {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	lk := unix.Flock_t{Type: unix.F_RDLCK, Start: b, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk); err != nil {
		t.Skipf("no such locks here: %v", err)
	}
	return f
}

// openForRole opens a file as the role would: read-only unless it is a writer.
func openForRole(t *testing.T, file string, role LockRole) *FileStorage {
	t.Helper()
	flag := os.O_RDONLY
	if role == LockWriter || role == LockRawWriter || role == LockDataWriter {
		flag = os.O_RDWR
	}
	s, err := OpenFileStorage(file, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// TestLockBytes compares with the table, byte by byte, what our roles hold and test.
func TestLockBytes(t *testing.T) {
	seen := map[LockRole]bool{LockNone: true}
	for _, row := range lockRows {
		if seen[row.role] {
			continue
		}
		seen[row.role] = true
		t.Run(row.role.String(), func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			var tests []int64
			for _, b := range allLockBytes {
				other := holdByte(t, file, b)
				s := openForRole(t, file, row.role)
				err := s.Lock(row.role)
				switch {
				case errors.Is(err, ErrLocked):
					tests = append(tests, b)
					if diff := cmp.Diff([]int64{b}, heldBytes(t, file)); diff != "" {
						t.Errorf("a refused lock leaves bytes (-want +got):\n%s", diff)
					}
				case err != nil:
					t.Fatal(err)
				}
				s.Close()
				other.Close()
			}
			if diff := cmp.Diff(row.tests, tests); diff != "" {
				t.Errorf("tested bytes (-want +got):\n%s", diff)
			}
			s := openForRole(t, file, row.role)
			if err := s.Lock(row.role); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(row.holds, heldBytes(t, file)); diff != "" {
				t.Errorf("held bytes (-want +got):\n%s", diff)
			}
			if err := s.Unlock(); err != nil {
				t.Fatal(err)
			}
			if got := heldBytes(t, file); got != nil {
				t.Errorf("after Unlock %v are held", got)
			}
			if err := s.Lock(row.role); err != nil {
				t.Fatal(err)
			}
			s.Close()
			if got := heldBytes(t, file); got != nil {
				t.Errorf("after Close %v are held", got)
			}
		})
	}
	for role := range imageLocks {
		if !seen[role] {
			t.Errorf("%v has no row", role)
		}
	}
}

// TestLockBytesOfQEMU compares with the table, byte by byte, what QEMU holds and tests.
func TestLockBytesOfQEMU(t *testing.T) {
	dir := storageQEMU(t)
	for _, row := range lockRows {
		t.Run(strings.Join(row.qemuIO, " "), func(t *testing.T) {
			file := filepath.Join(dir, row.file)
			stop := startQEMUIO(t, dir, row.qemuIO...)
			if diff := cmp.Diff(row.holds, heldBytes(t, file)); diff != "" {
				t.Errorf("held bytes (-want +got):\n%s", diff)
			}
			stop()
			var tests []int64
			for _, b := range allLockBytes {
				other := holdByte(t, file, b)
				if out, err := runIn(dir, "qemu-io", append(slices.Clone(row.qemuIO), "-c", "read 0 512")...); err != nil {
					if !strings.Contains(out, "lock") {
						t.Fatalf("qemu-io fails for another reason: %s", out)
					}
					tests = append(tests, b)
				}
				other.Close()
			}
			if diff := cmp.Diff(row.tests, tests); diff != "" {
				t.Errorf("tested bytes (-want +got):\n%s", diff)
			}
		})
	}
}

// TestLockRoles has two storages of one process take each pair of roles.
func TestLockRoles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for first := range imageLocks {
		for second := range imageLocks {
			a, b := openForRole(t, file, first), openForRole(t, file, second)
			if err := a.Lock(first); err != nil {
				t.Fatal(err)
			}
			err := b.Lock(second)
			if want := lockConflicts[first][second]; want != errors.Is(err, ErrLocked) || !want && err != nil {
				t.Errorf("%v beside %v: %v, want a conflict: %v", second, first, err, want)
			}
			if lockConflicts[first][second] != lockConflicts[second][first] {
				t.Errorf("the table is not symmetric for %v and %v", first, second)
			}
			a.Close()
			// What was refused goes once the other is away.
			if err := b.Lock(second); err != nil {
				t.Errorf("%v after %v went: %v", second, first, err)
			}
			b.Close()
		}
	}
}

// TestLockChange changes the role of one storage, beside another.
func TestLockChange(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a, b := openForRole(t, file, LockWriter), openForRole(t, file, LockWriter)
	steps := []struct {
		s     *FileStorage
		role  LockRole
		want  error
		holds []int64 // by both, afterwards
	}{
		{a, LockReader, nil, []int64{100, 201, 203}},
		{a, LockWriter, nil, []int64{100, 101, 103, 201, 203}},
		{b, LockReader, ErrLocked, []int64{100, 101, 103, 201, 203}},
		{a, LockReader, nil, []int64{100, 201, 203}},
		{b, LockReader, nil, []int64{100, 201, 203}},
		{a, LockWriter, ErrLocked, []int64{100, 201, 203}}, // and a reads on
		{b, LockNone, nil, []int64{100, 201, 203}},
		{b, LockWriter, ErrLocked, []int64{100, 201, 203}},
		{a, LockNone, nil, nil},
		{b, LockRole(99), ErrOption, nil},
		{b, LockRole(-1), ErrOption, nil},
	}
	for i, step := range steps {
		if err := step.s.Lock(step.role); !errors.Is(err, step.want) {
			t.Fatalf("step %d: %v: %v, want %v", i, step.role, err, step.want)
		}
		if diff := cmp.Diff(step.holds, heldBytes(t, file)); diff != "" {
			t.Errorf("step %d: held bytes (-want +got):\n%s", i, diff)
		}
	}
}

// TestLockAgainstQEMU has a FileStorage hold each role, and QEMU's tools work on the file.
func TestLockAgainstQEMU(t *testing.T) {
	dir := storageQEMU(t)
	read := func(args ...string) []string { return append(append([]string{"qemu-io"}, args...), "-c", "read 0 512") }
	tools := []struct {
		file    string
		command []string
		refused []LockRole // by what is held
	}{
		{"q.qcow2", []string{"qemu-img", "info", "q.qcow2"}, []LockRole{LockWriter}},
		{"q.qcow2", []string{"qemu-img", "info", "-U", "q.qcow2"}, nil},
		{"q.qcow2", []string{"qemu-img", "check", "q.qcow2"}, []LockRole{LockWriter}},
		{"q.qcow2", []string{"qemu-img", "check", "-U", "q.qcow2"}, nil},
		{"q.qcow2", []string{"qemu-img", "map", "q.qcow2"}, []LockRole{LockWriter}},
		{"q.qcow2", []string{"qemu-img", "convert", "-f", "qcow2", "-O", "raw", "q.qcow2", "out.raw"}, []LockRole{LockWriter}},
		{"q.qcow2", []string{"qemu-img", "compare", "q.qcow2", "q.qcow2"}, []LockRole{LockWriter}},
		{"q.qcow2", []string{"qemu-img", "snapshot", "-c", "s", "q.qcow2"}, []LockRole{LockWriter, LockReader}},
		{"q.qcow2", []string{"qemu-img", "create", "-f", "qcow2", "q.qcow2", "1M"}, []LockRole{LockWriter, LockReader}},
		{"q.qcow2", read("-f", "qcow2", "q.qcow2"), []LockRole{LockWriter, LockReader}},
		{"q.qcow2", read("-r", "-f", "qcow2", "q.qcow2"), []LockRole{LockWriter}},
		{"q.qcow2", read("-r", "-U", "-f", "qcow2", "q.qcow2"), nil},
		{"q.qcow2", read("-f", "qcow2", "over-q.qcow2"), []LockRole{LockWriter}},
		{"r.raw", read("-f", "raw", "r.raw"), nil},
		{"r.raw", read("-r", "-f", "raw", "r.raw"), nil},
		{"r.raw", read("-f", "qcow2", "over-r.qcow2"), nil},
		{"r.raw", []string{"qemu-img", "resize", "-f", "raw", "r.raw", "1M"}, nil},
		{"d.raw", read("-f", "qcow2", "data.qcow2"), []LockRole{LockDataWriter, LockDataReader}},
		{"d.raw", read("-r", "-f", "qcow2", "data.qcow2"), []LockRole{LockDataWriter}},
	}
	roles := map[string][]LockRole{
		"q.qcow2": {LockNone, LockWriter, LockReader, LockShared},
		"r.raw":   {LockNone, LockRawReader, LockRawWriter},
		"d.raw":   {LockNone, LockDataWriter, LockDataReader},
	}
	for _, tool := range tools {
		for _, role := range roles[tool.file] {
			t.Run(fmt.Sprintf("%v/%s", role, strings.Join(tool.command, " ")), func(t *testing.T) {
				s := openForRole(t, filepath.Join(dir, tool.file), role)
				if err := s.Lock(role); err != nil {
					t.Fatal(err)
				}
				out, err := runIn(dir, tool.command[0], tool.command[1:]...)
				if refused := slices.Contains(tool.refused, role); refused != (err != nil) {
					t.Errorf("error %v, want a refusal: %v\n%s", err, refused, out)
				} else if refused && !strings.Contains(out, "lock") {
					t.Errorf("refused for another reason: %s", out)
				}
			})
		}
	}
}

// TestQEMUAgainstLock has qemu-io hold a file, and a FileStorage take each role on it.
func TestQEMUAgainstLock(t *testing.T) {
	dir := storageQEMU(t)
	for _, row := range lockRows {
		t.Run(strings.Join(row.qemuIO, " "), func(t *testing.T) {
			startQEMUIO(t, dir, row.qemuIO...)
			for role := range imageLocks {
				s := openForRole(t, filepath.Join(dir, row.file), role)
				err := s.Lock(role)
				if want := lockConflicts[row.role][role]; want != errors.Is(err, ErrLocked) || !want && err != nil {
					t.Errorf("%v beside it: %v, want a conflict: %v", role, err, want)
				}
				s.Close()
			}
		})
	}
}

// TestRegularStorageRefusesDevice opens a device where a resolver had seen a regular file before.
func TestRegularStorageRefusesDevice(t *testing.T) {
	dev := openLoopDevice(t).(*FileStorage)
	f, err := os.Open(dev.f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var typeErr *FileTypeError
	if _, err := newRegularStorage(f); !errors.As(err, &typeErr) {
		t.Errorf("error %v, want a *FileTypeError", err)
	}
}

// TestStorageDescriptorFlags checks that a storage is not left in non-blocking mode, and not inherited
// by processes that are started.
func TestStorageDescriptorFlags(t *testing.T) {
	s := openTestFile(t, t.TempDir())
	link := fmt.Sprintf("/proc/self/fdinfo/%d", int(s.f.Fd()))
	info, err := os.ReadFile(link)
	if err != nil {
		t.Skip(err)
	}
	_, rest, _ := strings.Cut(string(info), "flags:")
	flags, err := strconv.ParseInt(strings.Fields(rest)[0], 8, 64)
	if err != nil {
		t.Fatal(err)
	}
	if flags&unix.O_NONBLOCK != 0 || flags&unix.O_CLOEXEC == 0 {
		t.Errorf("flags are %#o", flags)
	}
}
