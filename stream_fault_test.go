package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
)

// errStream is the error that the faults of these tests return.
var errStream = errors.New("injected")

// streamFaultCluster is the cluster size of these tests in bytes.
const streamFaultCluster = 32 << 10

// streamFaultModes are the modes of the tests, those by content also with a spool.
func streamFaultModes() (modes []StreamOptions) {
	for _, mode := range streamModes {
		o := StreamOptions{Create: &CreateOptions{ClusterSize: streamFaultCluster}, Workers: 3}
		mode.set(&o)
		modes = append(modes, o)
		if o.Compress || o.FindZeros {
			o.Spool = NewMemoryStorage()
			modes = append(modes, o)
		}
	}
	return modes
}

// streamModeName names a mode.
func streamModeName(o *StreamOptions) string {
	return fmt.Sprintf("compress=%v/%v/zeros=%v/spool=%v", o.Compress, o.Create.Compression, o.FindZeros, o.Spool != nil)
}

// cutWriter takes the first left bytes.
type cutWriter struct {
	left    int
	err     error // what it returns then
	onWrite func()
	pieces  []int
}

// Write takes what it may.
func (w *cutWriter) Write(p []byte) (int, error) {
	if w.onWrite != nil {
		w.onWrite()
	}
	w.pieces = append(w.pieces, len(p))
	n := min(len(p), w.left)
	w.left -= n
	if n < len(p) {
		return n, w.err
	}
	return n, nil
}

// TestStreamWriter has the writer fail, and take less than it is given, at every place in turn. The error says so and
// the number of bytes that it took is right; it gets pieces of 1 MiB but for the last.
func TestStreamWriter(t *testing.T) {
	before := runtime.NumGoroutine()
	runs := 0
	for _, o := range streamFaultModes() {
		d := newStreamDisk(rand.New(rand.NewPCG(11, 1)), 2<<20+777, streamFaultCluster, 0)
		all := &cutWriter{left: 1 << 30}
		n, err := WriteStream(context.Background(), all, d, &o)
		if err != nil {
			t.Fatal(err)
		}
		for i, k := range all.pieces {
			if last := i == len(all.pieces)-1; k > streamChunk || !last && k != streamChunk {
				t.Errorf("%s: piece %d of %d has %d bytes", streamModeName(&o), i, len(all.pieces), k)
			}
		}
		cuts := []int64{0, 1, 4095, 4096, streamChunk - 1, streamChunk, streamChunk + 1, n - 1}
		for at := int64(0); at < n; at += n/5 + 1 {
			cuts = append(cuts, at)
		}
		for _, at := range cuts {
			if at >= n {
				continue
			}
			for _, want := range []error{errStream, nil} {
				got, err := WriteStream(context.Background(), &cutWriter{left: int(at), err: want}, d, &o)
				if want == nil {
					want = io.ErrShortWrite
				}
				if !errors.Is(err, want) || got != at {
					t.Errorf("%s: a writer of %d bytes: %d, %v, want %v", streamModeName(&o), at, got, err, want)
				}
				runs++
			}
		}
		for _, lie := range []int{-1, streamChunk + 1} {
			if n, err := WriteStream(context.Background(), writerFunc(func([]byte) (int, error) { return lie, nil }), d, &o); err == nil || n != 0 {
				t.Errorf("a writer that says it took %d bytes: %d, %v", lie, n, err)
			}
		}
	}
	wantGoroutines(t, before)
	t.Logf("%d runs", runs)
}

// writerFunc is a function as io.Writer.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestStreamSourceFaults has each read, and each pass over the extents, fail in turn; and the context end there. The
// stream ends with that error, and no goroutine stays.
func TestStreamSourceFaults(t *testing.T) {
	before := runtime.NumGoroutine()
	runs := 0
	for _, o := range streamFaultModes() {
		d := newStreamDisk(rand.New(rand.NewPCG(12, 1)), 2_000_000, streamFaultCluster, 0)
		var reads atomic.Int64
		d.onRead = func(int64) error { reads.Add(1); return nil }
		d.passes = 0
		if _, err := WriteStream(context.Background(), io.Discard, d, &o); err != nil {
			t.Fatal(err)
		}
		total, passes := reads.Load(), d.passes
		for at := int64(1); at <= total+int64(passes); at += 1 + total/25 {
			for _, cancels := range []bool{false, true} {
				ctx, cancel := context.WithCancel(context.Background())
				want := errStream
				if cancels {
					want = context.Canceled
				}
				fail := func() error {
					if cancels {
						cancel()
						return nil
					}
					return errStream
				}
				reads.Store(0)
				d.passes = 0
				d.onRead = func(int64) error {
					if reads.Add(1) == at {
						return fail()
					}
					return nil
				}
				d.onExtents = func(pass int) error {
					if int64(pass) == at-total {
						return fail()
					}
					return nil
				}
				n, err := WriteStream(ctx, io.Discard, d, &o)
				// The last read may be done with when the context ends.
				if done := cancels && err == nil && at >= total-int64(o.Workers); !done && !errors.Is(err, want) {
					t.Errorf("%s: fault %d of %d+%d, cancelled %v: %d bytes, %v", streamModeName(&o), at, total, passes, cancels, n, err)
				}
				cancel()
				runs++
			}
		}
		d.onRead, d.onExtents = nil, nil

		// The writer has got nothing of a stream that was over before it began.
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if n, err := WriteStream(ctx, io.Discard, d, &o); !errors.Is(err, context.Canceled) || n != 0 {
			t.Errorf("%s: context at its end: %d bytes, %v", streamModeName(&o), n, err)
		}
		ctx, cancel = context.WithCancel(context.Background())
		noise := make([]byte, 5<<20/2)
		fillGarbage(noise, 0)
		big := newTestRaw(t, noise)
		w := &cutWriter{left: 1 << 30, onWrite: cancel}
		if n, err := WriteStream(ctx, w, big, &o); !errors.Is(err, context.Canceled) || n != streamChunk {
			t.Errorf("%s: context ended by the first write: %d bytes, %v", streamModeName(&o), n, err)
		}
	}
	wantGoroutines(t, before)
	t.Logf("%d runs", runs)
}

// spoolFault is a spool of which one operation fails.
type spoolFault struct {
	Storage
	write, read int // counts down to the one that fails
}

func (s *spoolFault) WriteAt(p []byte, off int64) (int, error) {
	if s.write--; s.write == 0 {
		return 0, errStream
	}
	return s.Storage.WriteAt(p, off)
}

func (s *spoolFault) ReadAt(p []byte, off int64) (int, error) {
	if s.read--; s.read == 0 {
		return 0, errStream
	}
	return s.Storage.ReadAt(p, off)
}

// TestStreamSpoolFaults has every operation on the spool fail in turn.
func TestStreamSpoolFaults(t *testing.T) {
	before := runtime.NumGoroutine()
	noise := make([]byte, 5<<20/2)
	fillGarbage(noise, 0)
	d := newTestRaw(t, noise)
	o := StreamOptions{Compress: true, Workers: 2}
	for at := 1; ; at++ {
		w := &spoolFault{Storage: NewMemoryStorage(), write: at}
		r := &spoolFault{Storage: NewMemoryStorage(), read: at}
		o.Spool = w
		_, errW := WriteStream(context.Background(), io.Discard, d, &o)
		o.Spool = r
		_, errR := WriteStream(context.Background(), io.Discard, d, &o)
		if errW == nil && errR == nil {
			if w.write != r.read || at < 3 {
				t.Errorf("%d faults met; %d writes and %d reads are left", at-1, w.write, r.read)
			}
			break
		}
		if !errors.Is(errW, errStream) && w.write <= 0 || !errors.Is(errR, errStream) && r.read <= 0 {
			t.Fatalf("operation %d: %v and %v", at, errW, errR)
		}
	}
	wantGoroutines(t, before)
}

// TestStreamBadExtents refuses extents that do not follow each other.
func TestStreamBadExtents(t *testing.T) {
	const size = 1 << 20
	for name, runs := range map[string][]Extent{
		"none":       {},
		"gap":        {{Len: 512, Kind: ExtentData}, {Off: 1024, Len: size - 1024, Kind: ExtentData}},
		"overlap":    {{Len: 1024, Kind: ExtentData}, {Off: 512, Len: size - 512, Kind: ExtentData}},
		"empty":      {{Len: 0, Kind: ExtentData}, {Len: size, Kind: ExtentData}},
		"negative":   {{Len: -512, Kind: ExtentData}},
		"too long":   {{Len: size + 512, Kind: ExtentData}},
		"too short":  {{Len: size - 512, Kind: ExtentData}},
		"other part": {{Off: 512, Len: size - 512, Kind: ExtentData}},
	} {
		for _, o := range streamFaultModes() {
			d := &streamDisk{content: make([]byte, size), runs: runs}
			if _, err := WriteStream(context.Background(), io.Discard, d, &o); !errors.Is(err, errBadExtents) {
				t.Errorf("%s, %s: %v", name, streamModeName(&o), err)
			}
		}
	}
}

// TestStreamSourceChanges changes the extents, or the content, before each pass. What comes out is ErrSourceChanged or
// a sound image, which can only be of a change by which no cluster got another length.
func TestStreamSourceChanges(t *testing.T) {
	const size, cluster = 512 << 10, streamFaultCluster
	data := func(at, n int64) Extent { return Extent{Off: at, Len: n, Kind: ExtentData} }
	hole := func(at, n int64) Extent { return Extent{Off: at, Len: n, Kind: ExtentZero} }
	was := []Extent{data(0, size/2), hole(size/2, size/2)}
	changes := map[string]func(d *streamDisk){
		"less data": func(d *streamDisk) { d.runs = []Extent{data(0, size/4), hole(size/4, size*3/4)} },
		"more data": func(d *streamDisk) { d.runs = []Extent{data(0, size)} },
		"moved":     func(d *streamDisk) { d.runs = []Extent{hole(0, size/2), data(size/2, size/2)} },
		"one moved": func(d *streamDisk) {
			d.runs = []Extent{data(0, size/2-cluster), hole(size/2-cluster, cluster), data(size/2, cluster), hole(size/2+cluster, size/2-cluster)}
		},
		"no data":    func(d *streamDisk) { d.runs = []Extent{hole(0, size)} },
		"zeros":      func(d *streamDisk) { clear(d.content[:size/4]) },
		"noise":      func(d *streamDisk) { fillGarbage(d.content[:size/4], 0) },
		"other text": func(d *streamDisk) { copy(d.content, pattern(99, size/4)) },
	}
	changed, sound := 0, 0
	for name, change := range changes {
		for _, o := range streamFaultModes() {
			for pass := 1; pass <= 3; pass++ {
				d := &streamDisk{content: pattern(5, size), runs: was}
				d.onExtents = func(now int) error {
					if now == pass {
						change(d)
					}
					return nil
				}
				var b bytes.Buffer
				_, err := WriteStream(context.Background(), &b, d, &o)
				extents := name != "zeros" && name != "noise" && name != "other text"
				late := pass > 1 && pass <= d.passes
				switch {
				case errors.Is(err, ErrSourceChanged) && late:
					changed++
				case err != nil:
					t.Errorf("%s before pass %d, %s: %v", name, pass, streamModeName(&o), err)
				case extents && late && (!o.Compress && !o.FindZeros):
					t.Errorf("%s before pass %d, %s: not noticed", name, pass, streamModeName(&o))
				default:
					img := judgeStream(t, b.Bytes(), streamView(t, b.Bytes()), nil)
					if err := img.Close(); err != nil {
						t.Error(err)
					}
					sound++
				}
			}
		}
	}
	t.Logf("%d noticed, %d sound images", changed, sound)
}

// streamView returns what a stream reads as.
func streamView(t testing.TB, b []byte) []byte {
	t.Helper()
	img, err := OpenReader(bytes.NewReader(b), int64(len(b)), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	return readDisk(t, img)
}

// sparseDisk is a disk of size bytes with n bytes of data every step bytes.
type sparseDisk struct{ size, step, n int64 }

func (d sparseDisk) Size() int64 { return d.size }

func (d sparseDisk) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = byte(off>>12) + byte(i)&7
	}
	return len(p), nil
}

func (d sparseDisk) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for at := int64(0); at < d.size; at += d.step {
			if !yield(Extent{Off: at, Len: d.n, Kind: ExtentData, HostOff: -1}, nil) ||
				!yield(Extent{Off: at + d.n, Len: d.step - d.n, HostOff: -1}, nil) {
				return
			}
		}
	}
}

// TestStreamMemory streams disks with many tables, and measures the memory: it stays that of the pieces in flight.
func TestStreamMemory(t *testing.T) {
	for _, tc := range []struct {
		name        string
		d           sparseDisk
		clusterSize int
		tables      uint64 // what the L1 table takes, where the content decides
	}{
		{"1 TiB", sparseDisk{1 << 40, 512 << 20, 64 << 10}, 64 << 10, 0},
		{"32 GiB of 512-byte clusters", sparseDisk{32 << 30, 1 << 20, 512}, 512, 8 << 20},
	} {
		for _, mode := range streamModes[:3] {
			o := &StreamOptions{Create: &CreateOptions{ClusterSize: tc.clusterSize}, Workers: 4}
			mode.set(o)
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			before := m.HeapAlloc
			held, peak := uint64(0), uint64(0) // without and with garbage
			writes := 0
			n, err := WriteStream(context.Background(), writerFunc(func(p []byte) (int, error) {
				runtime.ReadMemStats(&m)
				peak = max(peak, m.HeapAlloc-min(before, m.HeapAlloc))
				if writes++; writes%16 == 0 {
					runtime.GC()
					runtime.ReadMemStats(&m)
					held = max(held, m.HeapAlloc-min(before, m.HeapAlloc))
				}
				return len(p), nil
			}), tc.d, o)
			if err != nil {
				t.Fatal(err)
			}
			// Four workers: six pieces of 1 MiB, twice that packed; one before the writer; encoders.
			most := uint64(20 << 20)
			if o.FindZeros || o.Compress {
				most += tc.tables
			}
			if held > most || peak == 0 {
				t.Errorf("%s, %s: %d MiB of memory, want at most %d", tc.name, mode.name, held>>20, most>>20)
			}
			t.Logf("%s, %s: stream of %d MiB, at most %.1f MiB of memory held, %.1f with garbage",
				tc.name, mode.name, n>>20, float64(held)/(1<<20), float64(peak)/(1<<20))
		}
	}
}
