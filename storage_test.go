package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// storageKind is a storage that the suite runs on.
type storageKind struct {
	name  string
	fixed bool // like a block device
	full  bool // every operation that its kind can have must work: ErrUnsupported fails the test
	// open makes one that is empty, or of deviceSize bytes if fixed.
	open func(t *testing.T) Storage
}

// deviceSize is the size of fixed storages of the suite in bytes: not a multiple of a memory chunk.
const deviceSize = 1<<20 + 4096

// storageKinds returns the storages that this machine has.
func storageKinds() []storageKind {
	kinds := []storageKind{
		{name: "file", open: func(t *testing.T) Storage { return openTestFile(t, t.TempDir()) }},
		{name: "memory", full: true, open: func(t *testing.T) Storage { return NewMemoryStorage() }},
		{name: "memory device", fixed: true, full: true, open: func(t *testing.T) Storage { return NewMemoryDevice(deviceSize) }},
		{name: "lent", full: true, open: func(t *testing.T) Storage {
			s, err := ResolverMap{"x": NewMemoryStorage()}.Resolve(FileRef{Name: "x"})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}},
	}
	if runtime.GOOS == "linux" {
		kinds = append(kinds,
			storageKind{name: "tmpfs", full: true, open: func(t *testing.T) Storage {
				dir, err := os.MkdirTemp("/dev/shm", "qcow2-test")
				if err != nil {
					t.Skipf("no /dev/shm: %v", err)
				}
				t.Cleanup(func() { os.RemoveAll(dir) })
				return openTestFile(t, dir)
			}},
			storageKind{name: "loop device", fixed: true, open: openLoopDevice})
	}
	return kinds
}

// openTestFile makes an empty file in dir and opens it for the time of the test.
func openTestFile(t *testing.T, dir string) *FileStorage {
	t.Helper()
	s, err := OpenFileStorage(filepath.Join(dir, "f"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// openLoopDevice makes a block device of deviceSize bytes; the test is skipped where it may not.
func openLoopDevice(t *testing.T) Storage {
	t.Helper()
	file := filepath.Join(t.TempDir(), "loop")
	if err := os.WriteFile(file, bytes.Repeat([]byte{0xa5}, deviceSize), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Skipf("no loop device (needs root): %v", err)
	}
	name := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", name).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", name, err, out)
		}
	})
	s, err := OpenFileStorage(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// eachStorage runs a test on every kind of storage.
func eachStorage(t *testing.T, test func(t *testing.T, kind storageKind, s Storage)) {
	for _, kind := range storageKinds() {
		t.Run(kind.name, func(t *testing.T) {
			s := kind.open(t)
			if got := s.FixedSize(); got != kind.fixed {
				t.Fatalf("FixedSize is %v, want %v", got, kind.fixed)
			}
			test(t, kind, s)
		})
	}
}

// readAll returns the whole contents.
func readAll(t *testing.T, s Storage) []byte {
	t.Helper()
	size, err := s.Size()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, size)
	if n, err := s.ReadAt(p, 0); n != len(p) || err != nil && err != io.EOF {
		t.Fatalf("read of all %d bytes: %d, %v", size, n, err)
	}
	return p
}

// TestStorageModel compares random operations with a plain slice of bytes.
func TestStorageModel(t *testing.T) {
	eachStorage(t, func(t *testing.T, kind storageKind, s Storage) {
		seed := uint64(20240601)
		r := rand.New(rand.NewPCG(seed, 1))
		data := rand.NewChaCha8([32]byte{byte(seed)})
		model := readAll(t, s) // a device begins with garbage
		if kind.fixed == (len(bytes.Trim(model, "\x00")) == 0) {
			t.Fatalf("fresh storage of %d bytes: garbage exactly on a device", len(model))
		}
		grow := func(end int64) {
			if n := end - int64(len(model)); n > 0 {
				model = append(model, make([]byte, n)...)
			}
		}
		done := map[string]int{}
		for i := range 600 {
			off, n := r.Int64N(deviceSize), r.Int64N(200<<10)
			if r.IntN(2) == 0 { // whole blocks, which a device wants
				off, n = off&^4095, n&^4095
			}
			if kind.fixed {
				n = min(n, deviceSize-off)
			}
			var op string
			var err error
			switch r.IntN(6) {
			case 0, 1:
				op = "write"
				p := make([]byte, n)
				data.Read(p)
				var got int
				if got, err = s.WriteAt(p, off); got != len(p) {
					t.Fatalf("seed %d op %d: write %d bytes at %#x: %d, %v", seed, i, n, off, got, err)
				}
				if n > 0 {
					grow(off + n)
					copy(model[off:], p)
				}
			case 2:
				op = "punch"
				if err = s.PunchHole(off, n); err == nil && off < int64(len(model)) {
					clear(model[off:min(off+n, int64(len(model)))])
				}
			case 3:
				op = "zero"
				if err = s.WriteZeroes(off, n); err == nil && n > 0 {
					grow(off + n)
					clear(model[off : off+n])
				}
			case 4:
				op = "allocate"
				if err = s.Allocate(off, n); err == nil && n > 0 {
					grow(off + n)
				}
			case 5:
				op = "truncate"
				if err = s.Truncate(off); err == nil {
					grow(off)
					model = model[:off:off]
				}
			}
			switch {
			case err == nil:
				done[op]++
			case !errors.Is(err, errors.ErrUnsupported):
				t.Fatalf("seed %d op %d: %s %d bytes at %#x: %v", seed, i, op, n, off, err)
			case kind.full && !kind.fixed:
				t.Fatalf("seed %d op %d: %s is unsupported: %v", seed, i, op, err)
			}
			size, err := s.Size()
			if err != nil || size != int64(len(model)) {
				t.Fatalf("seed %d op %d: after %s %d bytes at %#x the size is %#x, %v, want %#x", seed, i, op, n, off, size, err, len(model))
			}
			// A read of a range that may reach past the end.
			off, n = r.Int64N(deviceSize+8192), r.Int64N(100<<10)+1
			got := bytes.Repeat([]byte{0xee}, int(n))
			want := model[min(off, int64(len(model))):min(off+n, int64(len(model)))]
			k, err := s.ReadAt(got, off)
			if !bytes.Equal(got[:k], want) {
				t.Fatalf("seed %d op %d: after %s a read of %d bytes at %#x differs (%d bytes, want %d)", seed, i, op, n, off, k, len(want))
			}
			if wantErr := error(io.EOF); len(want) == len(got) && err != nil || len(want) < len(got) && err != wantErr {
				t.Fatalf("seed %d op %d: read of %d bytes at %#x of %#x: error %v", seed, i, n, off, size, err)
			}
		}
		if !bytes.Equal(readAll(t, s), model) {
			t.Fatalf("seed %d: contents differ at the end", seed)
		}
		if err := s.Sync(); err != nil {
			t.Errorf("sync: %v", err)
		}
		want := map[string]bool{"write": true}
		if kind.full {
			want["punch"], want["zero"] = true, true
		}
		if kind.full && !kind.fixed {
			want["allocate"], want["truncate"] = true, true
		}
		for op := range want {
			if done[op] < 20 {
				t.Errorf("%s worked %d times, want at least 20", op, done[op])
			}
		}
		t.Logf("worked: %v", done)
	})
}

// TestStorageArguments gives every operation ranges at and past the ends of what there is.
func TestStorageArguments(t *testing.T) {
	const maxOff = 1<<63 - 1
	ops := map[string]func(s Storage, off, n int64) error{
		"read":     func(s Storage, off, n int64) error { _, err := s.ReadAt(make([]byte, max(n, 0)), off); return err },
		"write":    func(s Storage, off, n int64) error { _, err := s.WriteAt(make([]byte, max(n, 0)), off); return err },
		"punch":    Storage.PunchHole,
		"zero":     Storage.WriteZeroes,
		"allocate": Storage.Allocate,
		"truncate": func(s Storage, off, _ int64) error { return s.Truncate(off) },
		"seek":     func(s Storage, off, _ int64) error { _, _, err := s.NextData(off); return err },
	}
	rows := []struct {
		op     string
		off, n int64
		want   error // of a growing storage; nil is success, errAny any error
		fixed  error // of a device
	}{
		{op: "read", off: -1, n: 1, want: errAny, fixed: errAny},
		{op: "read", off: 0, n: 0},
		{op: "read", off: 1 << 60, n: 1, want: io.EOF, fixed: io.EOF},
		{op: "read", off: deviceSize, n: 1, want: io.EOF, fixed: io.EOF},
		{op: "read", off: deviceSize - 512, n: 512},
		{op: "read", off: deviceSize - 512, n: 513, want: io.EOF, fixed: io.EOF},
		{op: "write", off: -1, n: 1, want: errAny, fixed: errAny},
		{op: "write", off: maxOff, n: 1, want: errAny, fixed: errAny},
		{op: "write", off: deviceSize, n: 512, fixed: syscall.ENOSPC},
		{op: "write", off: deviceSize - 512, n: 1024, fixed: syscall.ENOSPC},
		{op: "punch", off: -1, n: 1, want: errAny, fixed: errAny},
		{op: "punch", off: 0, n: -1, want: errAny, fixed: errAny},
		{op: "punch", off: 512, n: 0},
		{op: "punch", off: 1 << 40, n: 4096},
		{op: "zero", off: -1, n: 1, want: errAny, fixed: errAny},
		{op: "zero", off: 0, n: -1, want: errAny, fixed: errAny},
		{op: "zero", off: 1, n: maxOff, want: errAny, fixed: errAny},
		{op: "zero", off: 512, n: 0},
		{op: "zero", off: deviceSize - 4096, n: 8192, fixed: syscall.ENOSPC},
		{op: "zero", off: 1 << 30, n: 4096, fixed: syscall.ENOSPC},
		{op: "allocate", off: -1, n: 1, want: errAny, fixed: errAny},
		{op: "allocate", off: 0, n: -1, want: errAny, fixed: errAny},
		{op: "allocate", off: 1, n: maxOff, want: errAny, fixed: errAny},
		{op: "allocate", off: deviceSize, n: 4096, fixed: syscall.ENOSPC},
		{op: "truncate", off: -1, want: errAny, fixed: errors.ErrUnsupported},
		{op: "truncate", off: 4096, fixed: errors.ErrUnsupported},
		{op: "truncate", off: 1 << 30, fixed: errors.ErrUnsupported},
		{op: "seek", off: -1, want: errAny, fixed: errAny},
		{op: "seek", off: deviceSize, want: io.EOF, fixed: errors.ErrUnsupported},
		{op: "seek", off: maxOff, want: io.EOF, fixed: errors.ErrUnsupported},
	}
	eachStorage(t, func(t *testing.T, kind storageKind, s Storage) {
		for _, row := range rows {
			if !kind.fixed {
				if err := s.Truncate(deviceSize); err != nil {
					t.Fatal(err)
				}
			}
			want := row.want
			if kind.fixed {
				want = row.fixed
			}
			err := ops[row.op](s, row.off, row.n)
			if errors.Is(err, errors.ErrUnsupported) && !errors.Is(want, errors.ErrUnsupported) && !kind.full && want == nil {
				t.Logf("%s %d bytes at %#x: %v", row.op, row.n, row.off, err)
				continue
			}
			switch {
			case want == errAny && err == nil, want == nil && err != nil, want != errAny && !errors.Is(err, want):
				t.Errorf("%s %d bytes at %#x: error %v, want %v", row.op, row.n, row.off, err, want)
			}
		}
		// A device may as well cut the range off at its end.
		if err := s.PunchHole(1, maxOff); err == nil && !kind.fixed {
			t.Error("a punch of a range past all offsets succeeds")
		}
	})
}

// errAny stands for any error in tables.
var errAny = errors.New("any error")

// TestStorageNextData looks for holes between data far apart.
func TestStorageNextData(t *testing.T) {
	const step = 1 << 20
	eachStorage(t, func(t *testing.T, kind storageKind, s Storage) {
		if kind.fixed {
			if _, _, err := s.NextData(0); !errors.Is(err, errors.ErrUnsupported) {
				t.Fatalf("NextData of a device: %v, want ErrUnsupported", err)
			}
			return
		}
		// Data in the second and third step, then in the eleventh, and a hole to the end.
		for _, off := range []int64{step, 2 * step, 10 * step} {
			if _, err := s.WriteAt(bytes.Repeat([]byte{1}, step), off); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Truncate(20 * step); err != nil {
			t.Fatal(err)
		}
		runs := func() (got [][2]int64) {
			for off := int64(0); ; {
				start, end, err := s.NextData(off)
				if err == io.EOF {
					return got
				}
				if errors.Is(err, errors.ErrUnsupported) && !kind.full {
					t.Skipf("NextData: %v", err)
				}
				if err != nil || start < off || end <= start {
					t.Fatalf("NextData(%#x) = [%#x, %#x), %v", off, start, end, err)
				}
				if k := len(got); k > 0 && got[k-1][1] == start {
					got[k-1][1] = end
				} else {
					got = append(got, [2]int64{start, end})
				}
				off = end
			}
		}
		if diff := cmp.Diff([][2]int64{{step, 3 * step}, {10 * step, 11 * step}}, runs()); diff != "" {
			t.Errorf("data (-want +got):\n%s", diff)
		}
		start, end, err := s.NextData(2*step + 512)
		if start != 2*step+512 || end != 3*step || err != nil {
			t.Errorf("NextData inside data = [%#x, %#x), %v", start, end, err)
		}
		if err := s.PunchHole(step, step); err != nil {
			if !kind.full {
				t.Skipf("PunchHole: %v", err)
			}
			t.Fatal(err)
		}
		if diff := cmp.Diff([][2]int64{{2 * step, 3 * step}, {10 * step, 11 * step}}, runs()); diff != "" {
			t.Errorf("data after a punch (-want +got):\n%s", diff)
		}
	})
}

// TestStorageConcurrent lets goroutines work on ranges of their own side by side, and readers across
// them, which must never meet a byte that nobody wrote there.
func TestStorageConcurrent(t *testing.T) {
	const workers, span = 4, 160 << 10
	eachStorage(t, func(t *testing.T, kind storageKind, s Storage) {
		if !kind.fixed {
			if err := s.Truncate(deviceSize); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.WriteAt(make([]byte, workers*span), 0); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		fail := func(format string, args ...any) { t.Errorf(format, args...) }
		for w := range workers {
			wg.Add(2)
			go func() { // the writer of [w*span, (w+1)*span), in bytes of value w+1 or 0
				defer wg.Done()
				r := rand.New(rand.NewPCG(7, uint64(w)))
				model := make([]byte, span)
				got := make([]byte, span)
				for i := range 60 {
					off, n := r.Int64N(span/4096)*4096, int64(4096*(1+r.IntN(20)))
					n = min(n, span-off)
					var err error
					switch i % 4 {
					case 0, 1:
						_, err = s.WriteAt(bytes.Repeat([]byte{byte(w + 1)}, int(n)), int64(w*span)+off)
						copy(model[off:off+n], bytes.Repeat([]byte{byte(w + 1)}, int(n)))
					case 2:
						if err = s.PunchHole(int64(w*span)+off, n); err == nil {
							clear(model[off : off+n])
						}
					case 3:
						if err = s.WriteZeroes(int64(w*span)+off, n); err == nil {
							clear(model[off : off+n])
						}
					}
					if err != nil && !errors.Is(err, errors.ErrUnsupported) {
						fail("worker %d: %v", w, err)
						return
					}
					if _, err := s.ReadAt(got, int64(w*span)); err != nil || !bytes.Equal(got, model) {
						fail("worker %d step %d: its range differs: %v", w, i, err)
						return
					}
				}
			}()
			go func() { // a reader of everything
				defer wg.Done()
				r := rand.New(rand.NewPCG(8, uint64(w)))
				p := make([]byte, 20<<10)
				for range 60 {
					off := r.Int64N(workers*span - int64(len(p)))
					if _, err := s.ReadAt(p, off); err != nil {
						fail("reader: %v", err)
						return
					}
					for i, b := range p {
						if owner := (off + int64(i)) / span; b != 0 && int64(b) != owner+1 {
							fail("byte %#x of worker %d reads %d", off+int64(i), owner, b)
							return
						}
					}
				}
			}()
		}
		wg.Wait()
	})
}

// TestStorageReadWriteAllocations counts the heap allocations of the hot path.
func TestStorageReadWriteAllocations(t *testing.T) {
	eachStorage(t, func(t *testing.T, kind storageKind, s Storage) {
		p := make([]byte, 4096)
		if _, err := s.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if n := testing.AllocsPerRun(50, func() {
			if _, err := s.ReadAt(p, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := s.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("a read and an overwrite allocate %v times", n)
		}
	})
}

// TestBaseStorage has every optional operation answer that it is lacking.
func TestBaseStorage(t *testing.T) {
	s := NewReaderStorage(strings.NewReader("0123456789"), 10)
	_, werr := s.WriteAt([]byte{1}, 0)
	_, _, nerr := s.NextData(0)
	for name, err := range map[string]error{
		"WriteAt": werr, "NextData": nerr, "Truncate": s.Truncate(0), "PunchHole": s.PunchHole(0, 1),
		"WriteZeroes": s.WriteZeroes(0, 1), "Allocate": s.Allocate(0, 1), "Lock": s.Lock(LockReader),
	} {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v, want errors.ErrUnsupported", name, err)
		}
	}
	for name, err := range map[string]error{"Sync": s.Sync(), "Unlock": s.Unlock(), "Close": s.Close()} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s.Identity() != nil || s.FixedSize() {
		t.Errorf("identity %v, fixed %v", s.Identity(), s.FixedSize())
	}
}

// TestReaderStorage reads at and past the ends that the reader and the size set.
func TestReaderStorage(t *testing.T) {
	eio := errors.New("reader broke")
	rows := []struct {
		name    string
		r       io.ReaderAt
		size    int64
		off     int64
		n       int
		want    string
		wantErr error
	}{
		{name: "inside", r: strings.NewReader("0123456789"), size: 10, off: 2, n: 3, want: "234"},
		{name: "to the end", r: strings.NewReader("0123456789"), size: 10, off: 7, n: 3, want: "789"},
		{name: "over the end", r: strings.NewReader("0123456789"), size: 10, off: 7, n: 4, want: "789", wantErr: io.EOF},
		{name: "past the end", r: strings.NewReader("0123456789"), size: 10, off: 10, n: 4, wantErr: io.EOF},
		{name: "size below the reader's", r: strings.NewReader("0123456789"), size: 4, off: 2, n: 4, want: "23", wantErr: io.EOF},
		{name: "size above the reader's", r: strings.NewReader("0123"), size: 10, off: 2, n: 4, want: "23", wantErr: io.ErrUnexpectedEOF},
		{name: "EOF with the last byte", r: eagerEOF("0123"), size: 4, off: 0, n: 4, want: "0123"},
		{name: "failing", r: failingReader{eio}, size: 4, off: 0, n: 4, wantErr: eio},
		{name: "negative size", r: strings.NewReader("0123"), size: -1, off: 0, n: 4, wantErr: io.EOF},
		{name: "negative offset", r: strings.NewReader("0123"), size: 4, off: -1, n: 4, wantErr: syscall.EINVAL},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			p := make([]byte, row.n)
			n, err := NewReaderStorage(row.r, row.size).ReadAt(p, row.off)
			if got := string(p[:n]); got != row.want || !cmp.Equal(err, row.wantErr, cmpopts.EquateErrors()) {
				t.Errorf("got %q, %v, want %q, %v", got, err, row.want, row.wantErr)
			}
		})
	}
}

// eagerEOF is a reader that returns io.EOF together with its last byte, as io.ReaderAt allows.
type eagerEOF string

func (s eagerEOF) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, s[off:])
	return n, io.EOF
}

// failingReader is a reader whose reads fail.
type failingReader struct{ err error }

func (r failingReader) ReadAt([]byte, int64) (int, error) { return 0, r.err }

// TestMemoryStorageSparse works at offsets that only a sparse storage can have.
func TestMemoryStorageSparse(t *testing.T) {
	m := NewMemoryStorage()
	const far = 1 << 62
	for _, off := range []int64{0, 1 << 40, far} {
		if _, err := m.WriteAt([]byte("here"), off); err != nil {
			t.Fatal(err)
		}
	}
	var starts []int64
	for off := int64(0); ; {
		start, end, err := m.NextData(off)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		starts = append(starts, start)
		off = end
	}
	if diff := cmp.Diff([]int64{0, 1 << 40, far}, starts); diff != "" {
		t.Errorf("data (-want +got):\n%s", diff)
	}
	if err := m.PunchHole(4096, far-4096); err != nil {
		t.Fatal(err)
	}
	if start, _, err := m.NextData(1 << 20); start != far || err != nil {
		t.Errorf("after a punch of all between: data at %#x, %v", start, err)
	}
	if err := m.Truncate(2); err != nil {
		t.Fatal(err)
	}
	if err := m.Truncate(8); err != nil {
		t.Fatal(err)
	}
	if got := string(readAll(t, m)); got != "he\x00\x00\x00\x00\x00\x00" {
		t.Errorf("after shrinking and growing: %q", got)
	}
}

// TestMemoryStorageAtomic has readers look for a mixture of two writes that cross chunks.
func TestMemoryStorageAtomic(t *testing.T) {
	m := NewMemoryStorage()
	const n = memoryChunk + 8192
	off := int64(memoryChunk - 4096)
	write := func(b byte) {
		if _, err := m.WriteAt(bytes.Repeat([]byte{b}, n), off); err != nil {
			t.Error(err)
		}
	}
	write(1)
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Add(2)
		go func() {
			defer wg.Done()
			for i := range 200 {
				write(byte(1 + w*100 + i%100))
			}
		}()
		go func() {
			defer wg.Done()
			p := make([]byte, n)
			for range 200 {
				if _, err := m.ReadAt(p, off); err != nil || bytes.Count(p, p[:1]) != n {
					t.Errorf("a read sees %d and others in one write: %v", p[0], err)
					return
				}
			}
		}()
	}
	wg.Wait()
}

// TestMemoryStorageClone changes a copy and its original apart.
func TestMemoryStorageClone(t *testing.T) {
	for _, m := range []*MemoryStorage{NewMemoryStorage(), NewMemoryDevice(3 * memoryChunk)} {
		if _, err := m.WriteAt(bytes.Repeat([]byte{1}, 2*memoryChunk), 0); err != nil {
			t.Fatal(err)
		}
		if err := m.WriteZeroes(memoryChunk, memoryChunk); err != nil {
			t.Fatal(err)
		}
		before := readAll(t, m)
		c := m.Clone()
		if !bytes.Equal(readAll(t, c), before) || c.FixedSize() != m.FixedSize() || c.Identity() == m.Identity() {
			t.Errorf("fixed %v: the clone is not a copy of its own", m.FixedSize())
		}
		for i, s := range []*MemoryStorage{m, c} {
			for _, off := range []int64{100, memoryChunk + 100} { // data, and zeros that both may share
				if _, err := s.WriteAt([]byte{byte(10 + i)}, off); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i, s := range []*MemoryStorage{m, c} {
			want := bytes.Clone(before)
			want[100], want[memoryChunk+100] = byte(10+i), byte(10+i)
			var got bytes.Buffer
			if n, err := s.WriteTo(&got); n != int64(len(want)) || err != nil || !bytes.Equal(got.Bytes(), want) {
				t.Errorf("fixed %v, storage %d: WriteTo gives %d bytes, %v, or others than expected", m.FixedSize(), i, n, err)
			}
		}
	}
}

// TestMemoryDeviceGarbage checks that garbage is a function of the offset, whatever is read or written
// around it.
func TestMemoryDeviceGarbage(t *testing.T) {
	a, b := NewMemoryDevice(1<<20), NewMemoryDevice(1<<20)
	want := readAll(t, a)
	for s := range 1 << 20 / 512 {
		if len(bytes.Trim(want[s*512:(s+1)*512], "\x00")) == 0 {
			t.Fatalf("sector %d of a fresh device is zero", s)
		}
	}
	if _, err := b.WriteAt([]byte("x"), 70001); err != nil {
		t.Fatal(err)
	}
	want[70001] = 'x'
	for _, n := range []int64{1, 3, 13, 4099, 1 << 16} {
		p := make([]byte, n)
		for _, off := range []int64{0, 5, 65530, 70000, 1<<20 - 1<<16} {
			if _, err := b.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:off+n]) {
				t.Errorf("%d bytes at %#x differ: %v", n, off, err)
			}
		}
	}
}

// TestShardsOf checks that a range locks exactly the shards of its chunks.
func TestShardsOf(t *testing.T) {
	for _, r := range [][2]int64{
		{0, 1}, {memoryChunk - 1, 1}, {memoryChunk - 1, 2}, {63 * memoryChunk, memoryChunk}, {63 * memoryChunk, memoryChunk + 1},
		{100 * memoryChunk, 62 * memoryChunk}, {100 * memoryChunk, 63 * memoryChunk}, {100*memoryChunk + 1, 63 * memoryChunk},
		{100 * memoryChunk, 64 * memoryChunk}, {5, 1 << 40}, {1<<63 - 2, 1}, {0, 1<<63 - 1},
	} {
		var want shardSet
		first, last := r[0]/memoryChunk, (r[0]+r[1]-1)/memoryChunk
		for i := first; i <= min(last, first+memoryShards); i++ {
			want |= 1 << (i % memoryShards)
		}
		if got := shardsOf(r[0], r[1]); got != want {
			t.Errorf("%#x bytes at %#x: %#x, want %#x", r[1], r[0], got, want)
		}
	}
}

// TestMemoryStorageLock grants every role.
func TestMemoryStorageLock(t *testing.T) {
	m := NewMemoryStorage()
	for role := range imageLocks {
		if err := m.Lock(role); err != nil {
			t.Errorf("%v: %v", role, err)
		}
	}
	if err := m.Unlock(); err != nil {
		t.Error(err)
	}
}

// TestFileStorageClosed calls everything after Close.
func TestFileStorageClosed(t *testing.T) {
	s := openTestFile(t, t.TempDir())
	id := s.Identity()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, rerr := s.ReadAt(make([]byte, 1), 0)
	_, werr := s.WriteAt(make([]byte, 1), 0)
	_, serr := s.Size()
	_, _, nerr := s.NextData(0)
	errs := map[string]error{
		"ReadAt": rerr, "WriteAt": werr, "Size": serr, "Truncate": s.Truncate(0), "Sync": s.Sync(), "Close": s.Close(),
	}
	if runtime.GOOS == "linux" {
		errs["NextData"], errs["PunchHole"], errs["WriteZeroes"] = nerr, s.PunchHole(0, 1), s.WriteZeroes(0, 1)
		errs["Allocate"], errs["Lock"], errs["Unlock"] = s.Allocate(0, 1), s.Lock(LockReader), s.Unlock()
	}
	for name, err := range errs {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s: %v, want fs.ErrClosed", name, err)
		}
	}
	if s.Identity() != id || s.FixedSize() {
		t.Error("identity or kind changed")
	}
}

// TestFileStorageCloseBeside closes while others read, write and sync.
func TestFileStorageCloseBeside(t *testing.T) {
	s := openTestFile(t, t.TempDir())
	if _, err := s.WriteAt(bytes.Repeat([]byte{7}, 8192), 0); err != nil {
		t.Fatal(err)
	}
	var wg, started sync.WaitGroup
	for w := range 6 {
		wg.Add(1)
		started.Add(1)
		go func() {
			defer wg.Done()
			p := bytes.Repeat([]byte{7}, 4096)
			for i := 0; ; i++ {
				var err error
				switch w % 3 {
				case 0:
					_, err = s.ReadAt(p, 4096)
				case 1:
					_, err = s.WriteAt(p, 4096)
				case 2:
					_, err = s.Size()
				}
				if i == 0 {
					started.Done()
				}
				if errors.Is(err, fs.ErrClosed) {
					return
				}
				if err != nil || p[0] != 7 || p[4095] != 7 {
					t.Errorf("worker %d: %v", w, err)
					return
				}
			}
		}()
	}
	started.Wait()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

// TestFileStorageIdentity opens one file by several names.
func TestFileStorageIdentity(t *testing.T) {
	dir := t.TempDir()
	a := openTestFile(t, dir)
	if a.Identity() == nil {
		t.Fatal("no identity")
	}
	names := map[string]bool{"f": true, "hard": true, "soft": true, "other": false}
	if err := os.Link(filepath.Join(dir, "f"), filepath.Join(dir, "hard")); err != nil {
		t.Skipf("no hard links: %v", err)
	}
	if err := os.Symlink("f", filepath.Join(dir, "soft")); err != nil {
		t.Skipf("no symbolic links: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "other"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, same := range names {
		b, err := OpenFileStorage(filepath.Join(dir, name), os.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if got := a.Identity() == b.Identity(); got != same {
			t.Errorf("%s is the same file: %v, want %v", name, got, same)
		}
	}
}

// TestOpenFileStorageRefuses opens what is no host file.
func TestOpenFileStorageRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	typeErr := new(FileTypeError)
	rows := []struct {
		name string
		file string
		flag int
		is   error // what the error matches
		as   any   // pointer to a typed error that is in the chain, or nil
	}{
		{name: "missing", file: filepath.Join(dir, "none"), flag: os.O_RDONLY, is: fs.ErrNotExist},
		{name: "existing", file: filepath.Join(dir, "f"), flag: os.O_RDWR | os.O_CREATE | os.O_EXCL, is: fs.ErrExist},
		{name: "directory", file: dir, flag: os.O_RDONLY, is: ErrUnsupported, as: &typeErr},
	}
	if runtime.GOOS != "windows" {
		rows = append(rows, []struct {
			name string
			file string
			flag int
			is   error
			as   any
		}{
			{name: "character device", file: "/dev/null", flag: os.O_RDWR, is: ErrUnsupported, as: &typeErr},
			{name: "append mode", file: filepath.Join(dir, "f"), flag: os.O_RDWR | os.O_APPEND, is: ErrOption},
		}...)
		if out, err := exec.Command("mkfifo", filepath.Join(dir, "fifo")).CombinedOutput(); err != nil {
			t.Fatalf("mkfifo: %v: %s", err, out)
		}
		for name, flag := range map[string]int{"fifo for reading": os.O_RDONLY, "fifo for both": os.O_RDWR} {
			rows = append(rows, rows[2])
			last := &rows[len(rows)-1]
			last.name, last.file, last.flag = name, filepath.Join(dir, "fifo"), flag
		}
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			s, err := OpenFileStorage(row.file, row.flag, 0o600)
			if err == nil {
				s.Close()
			}
			if !errors.Is(err, row.is) || row.as != nil && !errors.As(err, row.as) {
				t.Errorf("error %v, want one that is %v and %T", err, row.is, row.as)
			}
		})
	}
}

// TestNewFileStorageKeepsRefused leaves a file that it refuses to the caller.
func TestNewFileStorageKeepsRefused(t *testing.T) {
	d, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewFileStorage(d); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a directory: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("the caller's own close: %v", err)
	}
}

// BenchmarkStorage reads and overwrites 4 KiB at random places.
func BenchmarkStorage(b *testing.B) {
	const size = 64 << 20
	dir, err := os.MkdirTemp("/dev/shm", "qcow2-bench")
	if err != nil {
		dir = b.TempDir()
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	file, err := OpenFileStorage(filepath.Join(dir, "f"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { file.Close() })
	raw := rawReadWriter(b, filepath.Join(dir, "f"))
	memory := NewMemoryStorage()
	for _, s := range []Storage{file, memory} {
		if _, err := s.WriteAt(make([]byte, size), 0); err != nil {
			b.Fatal(err)
		}
	}
	for _, goroutines := range []int{1, 2} {
		for _, target := range []struct {
			name string
			s    interface {
				io.ReaderAt
				io.WriterAt
			}
		}{{"file", file}, {"pread", raw}, {"memory", memory}} {
			for _, op := range []struct {
				name string
				do   func(p []byte, off int64) (int, error)
			}{{"read", target.s.ReadAt}, {"write", target.s.WriteAt}} {
				b.Run(fmt.Sprintf("%s/%s/goroutines=%d", op.name, target.name, goroutines), func(b *testing.B) {
					b.SetBytes(4096)
					b.ReportAllocs()
					var wg sync.WaitGroup
					for g := range goroutines {
						wg.Add(1)
						go func() {
							defer wg.Done()
							r := rand.New(rand.NewPCG(1, uint64(g)))
							p := make([]byte, 4096)
							for range b.N / goroutines {
								if n, err := op.do(p, r.Int64N(size/4096)*4096); n != 4096 || err != nil {
									b.Errorf("%d bytes, %v", n, err)
									return
								}
							}
						}()
					}
					wg.Wait()
				})
			}
		}
	}
}
