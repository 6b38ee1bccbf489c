package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-qcow2/qcow2/internal/qemutest"
	"github.com/google/go-cmp/cmp"
)

// hostOp is an operation of a hookStorage: before or after what it names.
type hostOp int

const (
	beforeRead hostOp = iota
	afterRead
	beforeWrite
	afterWrite
	beforeSync
	beforePunch
	afterPunch
)

// hookStorage is a storage that calls a function around its reads, writes and syncs.
type hookStorage struct {
	Storage
	hook  atomic.Pointer[func(op hostOp, off int64, n int)]
	syncs atomic.Int64
	ops   atomic.Int64
}

// call calls the hook, if there is one.
func (s *hookStorage) call(op hostOp, off int64, n int) {
	s.ops.Add(1)
	if f := s.hook.Load(); f != nil {
		(*f)(op, off, n)
	}
}

// ReadAt implements Storage.
func (s *hookStorage) ReadAt(p []byte, off int64) (int, error) {
	s.call(beforeRead, off, len(p))
	n, err := s.Storage.ReadAt(p, off)
	s.call(afterRead, off, len(p))
	return n, err
}

// WriteAt implements Storage.
func (s *hookStorage) WriteAt(p []byte, off int64) (int, error) {
	s.call(beforeWrite, off, len(p))
	n, err := s.Storage.WriteAt(p, off)
	s.call(afterWrite, off, len(p))
	return n, err
}

// PunchHole implements Storage.
func (s *hookStorage) PunchHole(off, n int64) error {
	s.call(beforePunch, off, int(n))
	err := s.Storage.PunchHole(off, n)
	s.call(afterPunch, off, int(n))
	return err
}

// Sync implements Storage.
func (s *hookStorage) Sync() error {
	s.syncs.Add(1)
	s.call(beforeSync, 0, 0)
	return s.Storage.Sync()
}

// gate holds one operation of a hookStorage up.
type gate struct {
	arrived chan struct{} // closed when the operation is there
	through chan struct{} // closed to let it through
	used    atomic.Bool
	once    sync.Once
}

// open lets the operation through.
func (g *gate) open() { g.once.Do(func() { close(g.through) }) }

// block makes s hold up the next operation for which match is true, until the test ends at the latest.
func (s *hookStorage) block(t *testing.T, match func(op hostOp, off int64, n int) bool) *gate {
	g := &gate{arrived: make(chan struct{}), through: make(chan struct{})}
	t.Cleanup(g.open)
	f := func(op hostOp, off int64, n int) {
		if match(op, off, n) && !g.used.Swap(true) {
			close(g.arrived)
			<-g.through
		}
	}
	s.hook.Store(&f)
	return g
}

// hangGuard is how long a call may take before the test takes it for one that waits for ever.
const hangGuard = time.Minute

// await waits for c. It ends the test if that takes so long that it must be a hang.
func await(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	timer := time.NewTimer(hangGuard)
	defer timer.Stop()
	select {
	case <-c:
	case <-timer.C:
		p := make([]byte, 1<<20)
		t.Fatalf("%s hangs:\n%s", what, p[:runtime.Stack(p, true)])
	}
}

// background runs f beside the test and returns a channel that is closed at its end. An error of f is the
// test's.
func background(t *testing.T, what string, f func() error) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := f(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}()
	return done
}

// finishes runs f, which must not wait for anything that the test holds up.
func finishes(t *testing.T, what string, f func() error) {
	t.Helper()
	await(t, what, background(t, what, f))
}

// newHooked creates an image in memory behind a hookStorage.
func newHooked(t *testing.T, size int64, o CreateOptions) (*Image, *hookStorage) {
	t.Helper()
	s := &hookStorage{Storage: NewMemoryStorage()}
	t.Cleanup(func() { checkByQEMU(t, s.Storage) })
	return newTestImage(t, s, size, o), s
}

// checkByQEMU has qemu-img check the image in s, where it is installed or required.
func checkByQEMU(t *testing.T, s Storage) {
	t.Helper()
	m, ok := s.(*MemoryStorage)
	if !ok || t.Failed() {
		return
	}
	qemutest.Require(t)
	path := filepath.Join(t.TempDir(), "img.qcow2")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := m.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	qemutest.CheckClean(t, path)
}

// pattern returns n bytes that repeat every 1 KiB, from seed: they compress well.
func pattern(seed uint64, n uint64) []byte {
	p := make([]byte, 1024)
	rnd := rand.New(rand.NewPCG(seed, 7))
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rnd.Uint64())
	}
	return bytes.Repeat(p, int((n+1023)/1024))[:n]
}

// mustWrite writes p at off.
func mustWrite(t *testing.T, img *Image, p []byte, off int64) {
	t.Helper()
	if _, err := img.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

// wantAt returns a function that reads and compares.
func wantAt(img *Image, want []byte, off int64) func() error {
	return func() error {
		got := make([]byte, len(want))
		if _, err := img.ReadAt(got, off); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("guest %#x reads % x..., want % x...", off, got[:16], want[:16])
		}
		return nil
	}
}

// entryAt returns the L2 entry of guestOff.
func entryAt(t *testing.T, img *Image, guestOff uint64) l2Entry {
	t.Helper()
	e, err := img.m.entries(guestOff, 1)
	if err != nil {
		t.Fatal(err)
	}
	return e[0]
}

// TestConcurrencyBlockedDataWrite blocks one write of guest data in the host. Reads, in-place writes, writes
// that allocate elsewhere, compressed ones, extents and Sync of what was acknowledged go on; the blocked
// cluster reads as before.
func TestConcurrencyBlockedDataWrite(t *testing.T) {
	const cs = 64 << 10
	old, next := pattern(1, cs), pattern(2, 2*cs)
	tests := []struct {
		name  string
		opts  CreateOptions
		write func(img *Image) error // blocks inside cluster 1, which holds old
		wrote []byte                 // what cluster 1 holds afterwards
		in    bool                   // in place: the blocked part may read old or new
	}{
		{name: "allocating", write: func(img *Image) error { _, err := img.WriteAt(next[:512], cs+512); return err },
			wrote: append(append(append([]byte(nil), old[:512]...), next[:512]...), old[1024:]...)},
		{name: "in place", in: true, write: func(img *Image) error { _, err := img.WriteAt(next[:cs], cs); return err }, wrote: next[:cs]},
		{name: "compressed", write: func(img *Image) error { return img.WriteCompressed(next[:cs], cs) }, wrote: next[:cs]},
		{name: "subclusters", opts: CreateOptions{ExtendedL2: true}, write: func(img *Image) error { _, err := img.WriteAt(next[:cs], cs); return err }, wrote: next[:cs]},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img, s := newHooked(t, 256*cs, tt.opts)
			mustWrite(t, img, pattern(3, cs), 0)
			if tt.in {
				mustWrite(t, img, old, cs)
			} else if err := img.WriteCompressed(old, cs); err != nil {
				t.Fatal(err)
			}
			// Nothing else writes until the gate has its write, which is that of the data.
			g := s.block(t, func(op hostOp, off int64, n int) bool { return op == beforeWrite })
			writing := background(t, "blocked write", func() error { return tt.write(img) })
			await(t, "the write", g.arrived)

			finishes(t, "read elsewhere", wantAt(img, pattern(3, cs), 0))
			finishes(t, "read of the blocked cluster", wantAt(img, old, cs))
			finishes(t, "in-place write", func() error { _, err := img.WriteAt(pattern(4, 4096), 4096); return err })
			finishes(t, "Sync", img.Sync)
			finishes(t, "allocating write", func() error { _, err := img.WriteAt(pattern(5, 3*cs), 5*cs+512); return err })
			finishes(t, "allocating write beside", func() error { _, err := img.WriteAt(pattern(6, cs), 2*cs); return err })
			finishes(t, "compressed write", func() error { return img.WriteCompressed(pattern(7, 4*cs), 32*cs) })
			finishes(t, "extents", func() error { return checkExtents(img, 0, img.Size()) })
			finishes(t, "Sync", img.Sync)
			finishes(t, "read of what was synced", wantAt(img, pattern(5, 3*cs), 5*cs+512))
			finishes(t, "read of the blocked cluster", wantAt(img, old, cs))

			g.open()
			await(t, "the write", writing)
			finishes(t, "read after", wantAt(img, tt.wrote, cs))
			finishes(t, "read elsewhere after", wantAt(img, pattern(6, cs), 2*cs))
		})
	}
}

// blockedRead creates an image of 1024 clusters of cs bytes whose first one is written, plain or compressed, and synced,
// and blocks a read of it in the host, before it has its bytes. It returns the host cluster, the gate that lets the
// read go on, and what tells that the read is done and had the bytes that it should.
func blockedRead(t *testing.T, cs int, compressed bool) (img *Image, s *hookStorage, held clusterRun, g *gate, done <-chan struct{}) {
	t.Helper()
	img, s = newHooked(t, 1024*int64(cs), CreateOptions{ClusterSize: cs})
	old := pattern(1, uint64(cs))
	var err error
	if compressed {
		err = img.WriteCompressed(old, 0)
	} else {
		_, err = img.WriteAt(old, 0)
	}
	if err = errors.Join(err, img.Sync()); err != nil {
		t.Fatal(err)
	}
	held = img.m.held(entryAt(t, img, 0))
	g = s.block(t, func(op hostOp, off int64, n int) bool { return op == beforeRead && off == int64(held.first)*int64(cs) })
	done = background(t, "blocked read", wantAt(img, old, 0))
	await(t, "the read", g.arrived)
	return img, s, held, g, done
}

// TestConcurrencyBlockedReadPins blocks a read in the host, plain or compressed, before it has its bytes. The
// cluster that it reads is rewritten and synced; no other write may get it until the read is done, which
// returns the old bytes (I4). Afterwards it is free.
func TestConcurrencyBlockedReadPins(t *testing.T) {
	const cs = 4096
	for _, compressed := range []bool{false, true} {
		t.Run(fmt.Sprintf("compressed=%v", compressed), func(t *testing.T) {
			img, s, held, g, reading := blockedRead(t, cs, compressed)
			hostOff := int64(held.first * cs)

			// Compressed over plain and plain over compressed both take another cluster.
			if compressed {
				mustWrite(t, img, pattern(2, cs), 0)
			} else if err := img.WriteCompressed(pattern(2, cs), 0); err != nil {
				t.Fatal(err)
			}
			hit := false
			check := s.hook.Load()
			f := func(op hostOp, off int64, n int) {
				(*check)(op, off, n)
				if op == beforeWrite && off < hostOff+cs && off+int64(n) > hostOff {
					hit = true
				}
			}
			s.hook.Store(&f)
			for i := range int64(8) {
				if err := img.Sync(); err != nil {
					t.Fatal(err)
				}
				mustWrite(t, img, pattern(3, 4*cs), (16+4*i)*cs)
			}
			if hit {
				t.Fatal("I4: a cluster was reused while a read of it was in flight")
			}
			if v, err := img.m.alloc.refcount(held.first); err != nil || v == 0 {
				t.Fatalf("I4: refcount %d (%v) of a cluster whose read is in flight", v, err)
			}
			g.open()
			await(t, "the read", reading)
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
			if v, err := img.m.alloc.refcount(held.first); err != nil || v != 0 {
				t.Fatalf("refcount %d (%v) of a cluster that nobody uses any more", v, err)
			}
		})
	}
}

// TestConcurrencyBlockedTableRead blocks the read of an L2 slice by a read and by an allocating write (whose
// second it is: the first is that of its try to write in place; the cache has no room). The table is
// replaced by a write elsewhere, since its L1 entry has lost the COPIED flag, and synced: its cluster must
// not be reused before they are done (I4), and they must go by what the table said.
func TestConcurrencyBlockedTableRead(t *testing.T) {
	const cs = 64 << 10
	for _, write := range []bool{false, true} {
		t.Run(fmt.Sprintf("write=%v", write), func(t *testing.T) {
			m := NewMemoryStorage()
			img, err := CreateStorage(m, 1<<30, nil)
			if err != nil {
				t.Fatal(err)
			}
			mustWrite(t, img, pattern(1, cs), 0)
			l1, table := img.m.l1Off, img.m.l1.load(0)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := m.WriteAt(binary.BigEndian.AppendUint64(nil, table&^flagCopied), int64(l1)); err != nil {
				t.Fatal(err)
			}
			tableOff := int64(table & offsetMask)
			s := &hookStorage{Storage: m}
			if img, err = OpenStorage(s, &OpenOptions{ReadWrite: true, L2CacheBytes: 1}); err != nil {
				t.Fatal(err)
			}
			// Two dirty slices of another table.
			mustWrite(t, img, bytes.Repeat([]byte{0xfe}, 2*cs), 512<<20)
			mustWrite(t, img, bytes.Repeat([]byte{0xfe}, 2*cs), 576<<20)
			var reads atomic.Int32
			g := s.block(t, func(op hostOp, off int64, n int) bool {
				return op == beforeRead && off == tableOff && n == 4096 && (!write || reads.Add(1) == 2)
			})
			blocked := background(t, "blocked call", func() error {
				if write {
					return writeErr(img.WriteAt(pattern(2, 512), cs+512))
				}
				return wantAt(img, pattern(1, cs), 0)()
			})
			await(t, "the read of the slice", g.arrived)
			// Another slice of the same table; then writes that would take its place.
			for i := range int64(8) {
				mustWrite(t, img, bytes.Repeat([]byte{0xfe}, cs), 64<<20+i*cs)
				if err := img.Sync(); err != nil {
					t.Fatal(err)
				}
			}
			g.open()
			await(t, "the blocked call", blocked)
			want := append(pattern(1, cs), make([]byte, cs)...)
			if write {
				copy(want[cs+512:], pattern(2, 512))
			}
			finishes(t, "read", wantAt(img, want, 0))
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			checkByQEMU(t, m)
		})
	}
}

// TestConcurrencyDecodeCache has a read unpack a compressed cluster, and blocks it before it keeps the
// result. The cluster is rewritten, its place freed and used again for the same guest cluster, so that the
// same L2 word names other content, which reads must show.
func TestConcurrencyDecodeCache(t *testing.T) {
	const cs = 64 << 10
	img, s := newHooked(t, 16*cs, CreateOptions{})
	a, b := pattern(1, cs), pattern(2, cs)
	if err := errors.Join(img.WriteCompressed(a, 0), img.Sync()); err != nil {
		t.Fatal(err)
	}
	word := entryAt(t, img, 0).word
	hostOff, _ := img.m.compressed(word)
	g := s.block(t, func(op hostOp, off int64, n int) bool { return op == afterRead && off == int64(hostOff) })
	reading := background(t, "blocked read", wantAt(img, a, 0))
	await(t, "the read", g.arrived)
	mustWrite(t, img, pattern(3, cs), 0)
	g.open()
	await(t, "the read", reading)
	if err := errors.Join(img.Sync(), img.WriteCompressed(b, 0)); err != nil {
		t.Fatal(err)
	}
	if got := entryAt(t, img, 0).word; got != word {
		t.Fatalf("the L2 word is %#x, not %#x: the test lost its point", got, word)
	}
	finishes(t, "read", wantAt(img, b, 0))
}

// TestConcurrencyUncachedSlice blocks the read of an L2 slice for which the cache has no room. Until it is
// done nobody else may load the slice, for who loads it could change it and have it written beside the read,
// which would then tear the two words of an extended entry apart.
func TestConcurrencyUncachedSlice(t *testing.T) {
	const cs = 16 << 10
	const perSlice = cs * 256 // guest bytes that a slice maps
	m := NewMemoryStorage()
	open := &OpenOptions{ReadWrite: true, L2CacheBytes: 1}
	img, err := CreateStorage(m, 64*perSlice, &CreateOptions{ClusterSize: cs, ExtendedL2: true, Open: open})
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, img, pattern(1, cs), 0)
	sliceOff, _ := img.m.sliceAt(img.m.l1.load(0)&offsetMask, 0)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	s := &hookStorage{Storage: m}
	if img, err = OpenStorage(s, open); err != nil {
		t.Fatal(err)
	}
	// Both places of the cache get dirty slices.
	mustWrite(t, img, pattern(2, 512), perSlice)
	mustWrite(t, img, pattern(2, 512), 2*perSlice)
	g := s.block(t, func(op hostOp, off int64, n int) bool { return op == beforeRead && off == int64(sliceOff) })
	reading := background(t, "blocked read", wantAt(img, pattern(1, cs), 0))
	await(t, "the read of the slice", g.arrived)
	c := img.m.cache
	c.mu.Lock()
	load := c.loading[makeSliceKey(img.m.id, sliceOff)]
	c.mu.Unlock()
	if load == nil {
		t.Fatal("a slice is read without keeping others from loading it")
	}
	// A reader and a writer of the slice wait for the one read. The writer's cluster is another: a read beside a
	// write of its own range may see either content.
	second := background(t, "second read", wantAt(img, pattern(1, 512), 512+512))
	writing := background(t, "write", func() error { return errors.Join(img.Sync(), writeErr(img.WriteAt(pattern(3, 512), 3*cs))) })
	g.open()
	await(t, "the read", reading)
	await(t, "the second read", second)
	await(t, "the write", writing)
	finishes(t, "read", wantAt(img, pattern(3, 512), 3*cs))
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	checkByQEMU(t, m)
}

// writeErr drops a count.
func writeErr(_ int, err error) error { return err }

// TestConcurrencyReclaim rewrites compressed clusters on a device that is full but for what the rewrites
// drop. The space comes back only when the references were dropped durably and no read may use them: a
// writer must wait for that, whoever runs the write-back, and must not see ENOSPC.
func TestConcurrencyReclaim(t *testing.T) {
	const cs = 4096
	noise := func(rnd *rand.Rand) []byte { // half of a cluster does not compress
		p := make([]byte, cs)
		for i := 0; i < cs/2; i += 8 {
			binary.LittleEndian.PutUint64(p[i:], rnd.Uint64())
		}
		return p
	}
	const clusters = 64
	m := NewMemoryDevice(cs * (clusters + 24))
	img, err := CreateStorage(m, clusters*cs, &CreateOptions{ClusterSize: cs, Overwrite: true})
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for w := range uint64(4) {
		wg.Add(2)
		own := int64(w) * clusters / 4 * cs // each writer has a quarter
		go func() {
			defer wg.Done()
			rnd := rand.New(rand.NewPCG(seed, w))
			for i := range 300 {
				off := own + rnd.Int64N(clusters/4)*cs
				var err error
				if rnd.IntN(2) == 0 {
					err = img.WriteCompressed(noise(rnd), off)
				} else {
					_, err = img.WriteAt(noise(rnd), off)
				}
				if err != nil {
					t.Errorf("write %d of writer %d: %v", i, w, err)
					return
				}
			}
		}()
		go func() {
			defer wg.Done()
			p := make([]byte, 8*cs)
			for range 300 {
				if _, err := img.ReadAt(p, own); err != nil {
					t.Error(err)
					return
				}
			}
			if err := img.Sync(); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	checkByQEMU(t, m)
}

// TestConcurrencyReclaimWaits fills a device and rewrites a compressed cluster while a read of it is blocked.
// The rewrite that finds the device full waits for the read, rather than fail with ENOSPC; a really full
// device is ENOSPC at once.
func TestConcurrencyReclaimWaits(t *testing.T) {
	const cs = 4096
	s := &hookStorage{Storage: NewMemoryDevice(32 * cs)}
	img, err := CreateStorage(s, 64*cs, &CreateOptions{ClusterSize: cs, Overwrite: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := img.WriteCompressed(pattern(1, cs), 0); err != nil {
		t.Fatal(err)
	}
	hostOff, _ := img.m.compressed(entryAt(t, img, 0).word)
	// Fill up, and leave one cluster.
	n := int64(1)
	for ; ; n++ {
		if _, err := img.WriteAt(pattern(2, cs), n*cs); err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
			break
		}
	}
	g := s.block(t, func(op hostOp, off int64, n int) bool { return op == beforeRead && off == int64(hostOff) })
	reading := background(t, "blocked read", wantAt(img, pattern(1, cs), 0))
	await(t, "the read", g.arrived)

	finishes(t, "write to a full device", func() error {
		if _, err := img.WriteAt(pattern(3, cs), n*cs); !errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("error %v, want ENOSPC", err)
		}
		return nil
	})
	// Drop the compressed cluster without a new one: a plain cluster's entry is free after this.
	img.mu.Lock()
	err = img.m.updateLocked(0, func(words []uint64, i uint64) {
		e := l2Entry{word: words[i]}
		img.m.setEntry(words, i, l2Entry{})
		img.dropReferences([]l2Entry{e}, 0)
	})
	img.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	writing := background(t, "write", func() error { return writeErr(img.WriteAt(pattern(3, cs), n*cs)) })
	finishes(t, "Sync", img.Sync)
	g.open()
	await(t, "the read", reading)
	await(t, "the write", writing)
	finishes(t, "read", wantAt(img, pattern(3, cs), n*cs))
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	checkByQEMU(t, s.Storage)
}

// TestConcurrencyClose closes an image while calls of every kind are in flight. Each call either works or
// is fs.ErrClosed; Close waits for those in flight, after it the storage is left alone, and nothing is left
// running.
func TestConcurrencyClose(t *testing.T) {
	const cs = 4096
	before := runtime.NumGoroutine()
	for _, abandon := range []bool{false, true} {
		for round := range 8 {
			s := &hookStorage{Storage: NewMemoryStorage()}
			img, err := CreateStorage(s, 256*cs, &CreateOptions{ClusterSize: cs})
			if err != nil {
				t.Fatal(err)
			}
			want := pattern(9, 3*cs)
			mustWrite(t, img, want, 0)
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
			calls := []func(i int64) error{
				func(i int64) error { return writeErr(img.ReadAt(make([]byte, 3*cs), i%128*cs)) },
				func(i int64) error { return writeErr(img.WriteAt(pattern(1, 2*cs), (8+i%64)*cs+512)) },
				func(i int64) error { return img.WriteCompressed(pattern(2, 2*cs), (8+i%64)*cs) },
				func(i int64) error {
					return writeErr(img.WriteVecAt([][]byte{pattern(3, 700), pattern(4, cs)}, (8+i%64)*cs))
				},
				func(int64) error { return img.Sync() },
				func(int64) error { return checkExtents(img, 0, img.Size()) },
			}
			var wg sync.WaitGroup
			var going sync.WaitGroup
			for k, call := range calls {
				wg.Add(1)
				going.Add(1)
				go func() {
					defer wg.Done()
					for i := int64(0); ; i++ {
						err := call(i)
						if i == 3 || err != nil && i < 3 {
							going.Done()
						}
						if errors.Is(err, fs.ErrClosed) {
							return
						}
						if err != nil {
							t.Errorf("call %d: %v", k, err)
							return
						}
					}
				}()
			}
			going.Wait()
			end, other := img.Close, img.Abandon
			if abandon {
				end, other = other, end
			}
			if err := end(); err != nil {
				t.Fatal(err)
			}
			ops := s.ops.Load()
			for _, err := range []error{other(), end(), img.Sync(), writeErr(img.ReadAt(want, 0)), writeErr(img.WriteAt(want, 0)), img.WriteCompressed(want, 0), checkExtents(img, 0, cs)} {
				if !errors.Is(err, fs.ErrClosed) {
					t.Errorf("after Close: %v, want fs.ErrClosed", err)
				}
			}
			wg.Wait()
			if now := s.ops.Load(); now != ops {
				t.Fatalf("%d operations on the storage after Close", now-ops)
			}
			if img, err = OpenStorage(s, nil); err != nil {
				t.Fatal(err)
			}
			if err := wantAt(img, want, 0)(); err != nil {
				t.Fatal(err)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if !abandon && round == 0 {
				checkByQEMU(t, s.Storage)
			}
		}
	}
	wantGoroutines(t, before)
}

// wantGoroutines fails the test if more goroutines are left than there were before. One that has done its work may
// still be on its way out.
func wantGoroutines(t *testing.T, before int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if runtime.NumGoroutine() <= before {
			return
		}
	}
	p := make([]byte, 1<<20)
	t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, p[:runtime.Stack(p, true)])
}

// TestConcurrencyCloseWaits blocks a call in the host and closes the image beside it: Close returns only
// after the call, and the call works.
func TestConcurrencyCloseWaits(t *testing.T) {
	const cs = 64 << 10
	tests := []struct {
		name  string
		op    hostOp
		call  func(img *Image) error
		again func(img *Image) error // what the image holds afterwards
	}{
		{name: "read", op: beforeRead, call: func(img *Image) error { return wantAt(img, pattern(1, cs), 0)() }},
		{name: "in place", op: beforeWrite, call: func(img *Image) error { return writeErr(img.WriteAt(pattern(2, cs), 0)) },
			again: func(img *Image) error { return wantAt(img, pattern(2, cs), 0)() }},
		{name: "allocating", op: beforeWrite, call: func(img *Image) error { return writeErr(img.WriteAt(pattern(2, cs), cs)) },
			again: func(img *Image) error { return wantAt(img, pattern(2, cs), cs)() }},
		{name: "compressed", op: beforeWrite, call: func(img *Image) error { return img.WriteCompressed(pattern(2, cs), cs) },
			again: func(img *Image) error { return wantAt(img, pattern(2, cs), cs)() }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			img, s := newHooked(t, 16*cs, CreateOptions{})
			mustWrite(t, img, pattern(1, cs), 0)
			g := s.block(t, func(op hostOp, _ int64, _ int) bool { return op == tt.op })
			call := background(t, "call", func() error { return tt.call(img) })
			await(t, "the call", g.arrived)
			closing := background(t, "Close", img.Close)
			for !img.closed.Load() {
				runtime.Gosched()
			}
			if err := img.Sync(); !errors.Is(err, fs.ErrClosed) {
				t.Errorf("Sync beside Close: %v", err)
			}
			select {
			case <-closing:
				t.Error("Close did not wait")
			default:
			}
			g.open()
			await(t, "the call", call)
			await(t, "Close", closing)
			if tt.again != nil {
				img, err := OpenStorage(s, nil)
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(tt.again(img), img.Close()); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestConcurrencySyncCounts counts the host syncs of a Sync: one where nothing is dirty but data, two with
// dirty tables, three with a new refcount block or a moved refcount table, and one of the data file beside.
func TestConcurrencySyncCounts(t *testing.T) {
	const cs = 512 // a refcount block describes 256 clusters, a table of one cluster 64 blocks
	type counts struct{ Image, Data int64 }
	tests := []struct {
		name string
		do   func(t *testing.T, img *Image)
		want counts // Data counts with a data file only
	}{
		{"nothing", func(*testing.T, *Image) {}, counts{1, 1}},
		{"in place", func(t *testing.T, img *Image) { mustWrite(t, img, pattern(2, cs), 0) }, counts{1, 1}},
		{"mapped", func(t *testing.T, img *Image) { mustWrite(t, img, pattern(2, cs), cs) }, counts{2, 1}},
		{"new L2 table", func(t *testing.T, img *Image) { mustWrite(t, img, pattern(2, cs), 64*cs) }, counts{2, 1}},
		{"refcount block", func(t *testing.T, img *Image) {
			n := len(img.m.alloc.hooks)
			for off := int64(0); len(img.m.alloc.hooks) == n; off += 64 * cs {
				mustWrite(t, img, pattern(2, cs), 1<<20+off)
			}
		}, counts{3, 1}},
		{"refcount table", func(t *testing.T, img *Image) {
			for off := int64(0); !img.m.alloc.moved; off += 64 * cs {
				mustWrite(t, img, pattern(2, cs), 64<<20+off)
				if len(img.m.alloc.hooks) > 0 && !img.m.alloc.moved {
					if err := img.Sync(); err != nil {
						t.Fatal(err)
					}
				}
			}
		}, counts{3, 1}},
		{"nothing again", func(*testing.T, *Image) {}, counts{1, 1}},
	}
	for _, external := range []bool{false, true} {
		s := &hookStorage{Storage: NewMemoryStorage()}
		data := &hookStorage{Storage: NewMemoryStorage()}
		o := CreateOptions{ClusterSize: cs, RefcountBits: 64}
		if external {
			o.DataFile, o.Open = "data", &OpenOptions{DataFile: data}
		}
		img, err := CreateStorage(s, 1<<30, &o)
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, img, pattern(1, cs), 0)
		if err := img.Sync(); err != nil {
			t.Fatal(err)
		}
		for _, tt := range tests {
			tt.do(t, img)
			before := counts{s.syncs.Load(), data.syncs.Load()}
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
			got := counts{s.syncs.Load() - before.Image, data.syncs.Load() - before.Data}
			want := tt.want
			if !external {
				want.Data = 0
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, data file %v: host syncs (-want +got):\n%s", tt.name, external, diff)
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		if !external {
			checkByQEMU(t, s.Storage)
		}
	}
}

// TestConcurrencySyncShares blocks the host sync of one Sync and starts eight more: they share one round. What
// was written before they were called is durable with it.
func TestConcurrencySyncShares(t *testing.T) {
	img, s := newHooked(t, 1<<30, CreateOptions{})
	mustWrite(t, img, pattern(1, 512), 0)
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	g := s.block(t, func(op hostOp, _ int64, _ int) bool { return op == beforeSync })
	first := background(t, "first Sync", img.Sync)
	await(t, "the host sync", g.arrived)
	before := s.syncs.Load()
	mustWrite(t, img, pattern(2, 512), 1<<20) // a mapping: two host syncs
	var others []<-chan struct{}
	for range 8 {
		others = append(others, background(t, "Sync", img.Sync))
	}
	for waitingIn("(*Image).flush(") < len(others) {
		runtime.Gosched()
	}
	g.open()
	await(t, "first Sync", first)
	for _, c := range others {
		await(t, "Sync", c)
	}
	if got := s.syncs.Load() - before; got != 2 {
		t.Errorf("%d Syncs took %d host syncs, want 2", len(others), got)
	}
	img.mu.Lock()
	dirty := len(img.m.cache.dirty) + len(img.m.l1Dirty)
	img.mu.Unlock()
	if dirty != 0 {
		t.Errorf("%d tables are dirty after Sync", dirty)
	}
}

// waitingIn returns how many goroutines wait for a condition in the function given.
func waitingIn(function string) int {
	p := make([]byte, 1<<20)
	p = p[:runtime.Stack(p, true)]
	n := 0
	for _, g := range strings.Split(string(p), "\n\n") {
		if strings.Contains(g, "sync.(*Cond).Wait") && strings.Contains(g, function) {
			n++
		}
	}
	return n
}

// TestConcurrencyFirstWrite blocks the marking of bitmaps that a first write begins with, and closes the image:
// Close waits for it.
func TestConcurrencyFirstWrite(t *testing.T) {
	img, s := newHooked(t, 1<<20, CreateOptions{})
	img.bitmaps = []bitmapMark{{off: 4 << 20, flags: 1}} // past all clusters
	g := s.block(t, func(op hostOp, _ int64, _ int) bool { return op == beforeSync })
	writing := background(t, "first write", func() error {
		if err := writeErr(img.WriteAt(pattern(1, 512), 0)); !errors.Is(err, fs.ErrClosed) {
			return fmt.Errorf("error %v, want fs.ErrClosed", err)
		}
		return nil
	})
	await(t, "the sync of the header", g.arrived)
	closing := background(t, "Close", img.Close)
	for !img.closed.Load() {
		runtime.Gosched()
	}
	for waitingIn("(*requests).drain(") == 0 {
		select {
		case <-closing:
			t.Fatal("Close did not wait for the marking of bitmaps")
		default:
			runtime.Gosched()
		}
	}
	g.open()
	await(t, "the write", writing)
	await(t, "Close", closing)
}
