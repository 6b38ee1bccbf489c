package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/qemutest"
	"github.com/google/go-cmp/cmp"
)

// emptyScenarios are images of every kind that MakeEmpty empties. The first ones have nothing but their tables, so that
// these are replaced; of the others the active tables are dropped.
func emptyScenarios() []faultScenario {
	tiny := OpenOptions{L2CacheBytes: 1, RefcountCacheBytes: 1}
	fill := []faultStep{{'w', 0, 40_000}, {'w', 70_000, 9_000}, {'w', 127_000, 500}}
	packed := append([]faultStep{{'c', 20, 3}}, fill...)
	return []faultScenario{
		{name: "plain", size: 128 << 10, create: CreateOptions{ClusterSize: 512}, open: tiny, prepare: packed},
		{name: "version 2", size: 128 << 10, create: CreateOptions{ClusterSize: 512, Version: 2}, prepare: packed},
		{name: "overlay", size: 128 << 10, create: CreateOptions{ClusterSize: 1024, BackingFile: "base", BackingFormat: "raw"}, base: 100_001, prepare: packed},
		{name: "one bit", size: 128 << 10, create: CreateOptions{ClusterSize: 512, RefcountBits: 1}, prepare: fill},
		{name: "wide refcounts", size: 128 << 10, create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, open: tiny, prepare: packed},
		{name: "lazy refcounts", size: 128 << 10, create: CreateOptions{ClusterSize: 512, LazyRefcounts: true}, prepare: packed},
		{name: "extended over base", size: 256 << 10, create: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true, BackingFile: "base", BackingFormat: "raw"},
			base: 300_000, prepare: []faultStep{{'w', 1000, 40_000}, {'c', 5, 2}, {'w', 200_100, 300}}},
		{name: "data file", size: 128<<10 + 512, create: CreateOptions{ClusterSize: 1024, DataFile: "data"}, prepare: fill},
		{name: "data file over base", size: 128 << 10, create: CreateOptions{ClusterSize: 1024, DataFile: "data", BackingFile: "base", BackingFormat: "raw"},
			base: 90_000, prepare: fill},
		{name: "snapshot", size: 128 << 10, create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, open: tiny, prepare: packed, change: addTestSnapshot},
		{name: "version 2 snapshot", size: 128 << 10, create: CreateOptions{ClusterSize: 1024, Version: 2}, prepare: packed, change: addTestSnapshot},
		{name: "lazy snapshot", size: 128 << 10, create: CreateOptions{ClusterSize: 512, LazyRefcounts: true}, prepare: packed, change: addTestSnapshot},
		{name: "bitmaps", size: 128 << 10, create: CreateOptions{ClusterSize: 4096}, prepare: packed[1:], change: addTestBitmap},
	}
}

// emptied returns what the disk of the scenario reads when it is emptied: the backing file, or zeros.
func (sc *faultScenario) emptied(disks map[string]*crashtest.Disk) []byte {
	p := make([]byte, sc.size)
	if d := disks["base"]; d != nil {
		_, _ = d.ReadAt(p, 0)
	}
	return p
}

// openScenario opens the image of a scenario for writing.
func (sc *faultScenario) openScenario(host *faultHost) (*Image, error) {
	o := sc.open
	o.ReadWrite, o.Resolver, o.Name = true, host, "image"
	return OpenStorage(host.storage("image"), &o)
}

// readDisk returns what the whole disk reads.
func readDisk(t testing.TB, d Disk) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatalf("read the disk: %v", err)
	}
	return p
}

// TestMakeEmpty empties images of every kind. They read as their backing file then, take new content, empty themselves
// again, and are without a flaw at any time; snapshots keep what they hold.
func TestMakeEmpty(t *testing.T) {
	for _, sc := range emptyScenarios() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			disks, content := sc.build(t)
			host := newFaultHost(disks)
			run := &faultRun{TB: t, host: host, sc: &sc}
			img, err := sc.openScenario(host)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(content, sc.emptied(disks)) {
				t.Fatal("there is nothing to empty")
			}
			full, _ := host.disks["image"].Size()
			for round := range 3 {
				if _, err := img.WriteAt(faultStep{}.bytes(round, 3000), 60_000); err != nil {
					t.Fatal(err)
				}
				if err := img.MakeEmpty(t.Context()); err != nil {
					t.Fatal(err)
				}
				run.walk(false)
				if err := checkList(img); err != nil {
					t.Error(err)
				}
				if diff := explainContent(readDisk(t, img), 0, sc.emptied(disks), nil); diff != "" {
					t.Errorf("emptied: %s", diff)
				}
				if diff := explainContent(run.readDisks(), 0, sc.emptied(disks), nil); diff != "" {
					t.Errorf("emptied, to the independent reader: %s", diff)
				}
				if round == 0 {
					now, _ := host.disks["image"].Size()
					if bare := !strings.Contains(sc.name, "snapshot") && sc.name != "bitmaps"; bare && now != img.Info().EndOffset || bare && now >= full {
						t.Errorf("a file of %d bytes is one of %d, of which %d are used", full, now, img.Info().EndOffset)
					}
				}
			}
			want := sc.emptied(disks)
			for k, s := range sc.prepare {
				p := s.bytes(k, s.n)
				copy(want[s.off:], p)
				if _, err := img.WriteAt(p, s.off); err != nil {
					t.Fatal(err)
				}
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			run.walk(false)
			if diff := explainContent(run.readDisks(), 0, want, nil); diff != "" {
				t.Errorf("written again: %s", diff)
			}
			host.checkIdle(t)
		})
	}
}

// TestMakeEmptyKeepsSnapshot empties an image, and reads the snapshot with QEMU, and applies it.
func TestMakeEmptyKeepsSnapshot(t *testing.T) {
	qemutest.Require(t)
	path := filepath.Join(t.TempDir(), "img.qcow2")
	qemutest.Img(t, "create", "-f", "qcow2", path, "8M")
	qemutest.IO(t, path, "write -P 1 0 3M", "write -P 2 5M 64k")
	qemutest.Img(t, "snapshot", "-c", "before", path)
	qemutest.IO(t, path, "write -P 3 1M 2M")
	img, err := Open(path, &OpenOptions{ReadWrite: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := img.MakeEmpty(t.Context()); err != nil {
		t.Error(err)
	}
	if !allZero(readDisk(t, img)) {
		t.Error("it is not empty")
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	qemutest.CheckClean(t, path)
	qemutest.IO(t, path, "read -P 0 0 8M")
	qemutest.Img(t, "snapshot", "-a", "before", path)
	qemutest.IO(t, path, "read -P 1 0 3M", "read -P 0 3M 2M", "read -P 2 5M 64k")
	qemutest.CheckClean(t, path)
}

// TestMakeEmptyQEMU empties overlays that QEMU made; QEMU then finds the backing file's content, and no flaw, and
// describes an image like one that it made anew.
func TestMakeEmptyQEMU(t *testing.T) {
	qemutest.Require(t)
	for _, opts := range []string{"compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M", "extended_l2=on,cluster_size=64k", "refcount_bits=1", "lazy_refcounts=on"} {
		t.Run(opts, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			base, path, fresh := filepath.Join(dir, "base"), filepath.Join(dir, "img.qcow2"), filepath.Join(dir, "fresh.qcow2")
			qemutest.Img(t, "create", "-f", "raw", base, "24M")
			qemutest.IOWith(t, qemutest.IOOptions{Format: "raw"}, base, "write -P 9 1M 5M")
			for _, p := range []string{path, fresh} {
				qemutest.Img(t, "create", "-f", "qcow2", "-o", opts, "-b", "base", "-F", "raw", p, "32M")
			}
			qemutest.IO(t, path, "write -P 1 0 4M", "write -P 2 20M 10M", "write -z 5M 1M", "write -c -P 3 12M 2M")
			img, err := Open(path, &OpenOptions{ReadWrite: true, Resolver: ResolveBeside(dir)})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(img.MakeEmpty(t.Context()), img.Close()); err != nil {
				t.Fatal(err)
			}
			qemutest.CheckClean(t, path)
			qemutest.Compare(t, base, "raw", path, "qcow2")
			want, got := qemutest.Info(t, fresh), qemutest.Info(t, path)
			for _, m := range []map[string]any{want, got} {
				delete(m, "filename")
				delete(m, "actual-size")
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("qemu-img info of a new image and of an emptied one (-new +emptied):\n%s", diff)
			}
			qemutest.IO(t, path, "write -P 7 3M 2M", "read -P 9 2M 1M", "read -P 7 3M 2M")
			qemutest.CheckClean(t, path)
		})
	}
}

// TestMakeEmptyCost empties images that hold little and much, in few and in many places. What the host is asked for is
// the same, so it does not depend on how much there is.
func TestMakeEmptyCost(t *testing.T) {
	ops := func(t *testing.T, fill func(img *Image)) (int64, int64) {
		s := &hookStorage{Storage: NewMemoryStorage()}
		img, err := CreateStorage(s, 256<<20, &CreateOptions{ClusterSize: 1024})
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		fill(img)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		if img, err = OpenStorage(s, &OpenOptions{ReadWrite: true}); err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		ops, syncs := s.ops.Load(), s.syncs.Load()
		if err := img.MakeEmpty(t.Context()); err != nil {
			t.Fatal(err)
		}
		return s.ops.Load() - ops, s.syncs.Load() - syncs
	}
	p := make([]byte, 1<<20)
	content(p, 1)
	// Both are larger than what the first refcount block describes, for which no other is needed.
	few, fewSyncs := ops(t, func(img *Image) {
		for off := int64(0); off < 4<<20; off += 1 << 20 {
			mustWrite(t, img, p, off)
		}
	})
	many, manySyncs := ops(t, func(img *Image) {
		for off := int64(0); off < 256<<20; off += 8 << 20 {
			mustWrite(t, img, p, off)
		}
	})
	if few != many || fewSyncs != manySyncs {
		t.Errorf("%d host operations and %d syncs for 4 MiB, %d and %d for 32 MiB", few, fewSyncs, many, manySyncs)
	}
	t.Logf("%d host operations, %d of them syncs", many, manySyncs)
}

// displacedImage creates an image with clusters of 4 KiB whose tables stand farther behind, so that what is written next
// comes to stand right behind the header: its first MakeEmpty could not write there.
func displacedImage(t *testing.T, size int64, test testHooks) (*Image, *hookStorage) {
	t.Helper()
	host := newFaultHost(map[string]*crashtest.Disk{"image": crashtest.NewDisk(nil)})
	s := &hookStorage{Storage: host.storage("image")}
	img, err := CreateStorage(s, size, &CreateOptions{ClusterSize: 4096, Open: &OpenOptions{test: test}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = img.Close() }) // closed already, perhaps
	host.faults.Set(crashtest.Fault{Err: syscall.EIO, Match: func(op crashtest.Op) bool { return op.Kind == crashtest.Write && op.Off == 4096 }})
	if err := img.MakeEmpty(t.Context()); err != nil {
		t.Fatal(err)
	}
	if host.faults.Fired() != 1 || img.m.l1Off < 4*4096 {
		t.Fatalf("%d faults, and the L1 table is at %#x", host.faults.Fired(), img.m.l1Off)
	}
	return img, s
}

// TestMakeEmptyWaitsForReads holds a read up in the host, of the cluster behind the header, where new tables come to
// stand. They are not written before it has its bytes, which are the old ones (I4); without the wait they are.
func TestMakeEmptyWaitsForReads(t *testing.T) {
	const cs = 4096
	run := func(t *testing.T, broken emptyOrder) (hit bool) {
		img, s := displacedImage(t, 64*cs, testHooks{emptyOrder: broken})
		old := pattern(1, 16*cs)
		mustWrite(t, img, old[:cs], 0) // one cluster alone takes the first free one
		mustWrite(t, img, old, 0)
		if err := img.Sync(); err != nil {
			t.Fatal(err)
		}
		if off := entryAt(t, img, 0).hostOff(); off > 3*cs {
			t.Fatalf("the data is at host %#x, not behind the header", off)
		}
		g := s.block(t, func(op hostOp, off int64, n int) bool { return op == beforeRead && off < 4*cs && n == cs })
		got := make([]byte, cs)
		reading := background(t, "blocked read", func() error { _, err := img.ReadAt(got, 0); return err })
		await(t, "the read", g.arrived)
		var front atomic.Bool
		f := func(op hostOp, off int64, n int) {
			if op == beforeWrite && off >= cs && off < 4*cs {
				front.Store(true)
			}
		}
		s.hook.Store(&f)
		emptying := background(t, "MakeEmpty", func() error { return img.MakeEmpty(t.Context()) })
		if broken != emptyOrderKept {
			await(t, "MakeEmpty", emptying)
		} else {
			for !img.reqs.paused.Load() {
				runtime.Gosched()
			}
		}
		hit = front.Load()
		g.open()
		await(t, "the read", reading)
		await(t, "MakeEmpty", emptying)
		if !bytes.Equal(got, old[:cs]) != hit {
			t.Errorf("the tables were written %v, and the read found % x...", hit, got[:16])
		}
		if !allZero(readDisk(t, img)) {
			t.Error("it is not empty")
		}
		return hit
	}
	if run(t, emptyOrderKept) {
		t.Error("I4: new tables were written behind the header while a read was in flight")
	}
	if !run(t, emptyReadersLate) {
		t.Error("nothing was written behind the header even without the wait")
	}
}

// TestMakeEmptyRefuses refuses what cannot be emptied, and changes nothing.
func TestMakeEmptyRefuses(t *testing.T) {
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	tests := []struct {
		name string
		sc   faultScenario
		ctx  context.Context
		open func(img *Image) error // before
		want error
	}{
		{name: "raw data file", sc: faultScenario{size: 64 << 10, create: CreateOptions{ClusterSize: 1024, DataFile: "data", DataFileRaw: true}}, want: ErrUnsupported},
		{name: "cancelled", sc: faultScenario{size: 64 << 10, create: CreateOptions{ClusterSize: 1024}}, ctx: cancelled, want: context.Canceled},
		{name: "closed", sc: faultScenario{size: 64 << 10, create: CreateOptions{ClusterSize: 1024}}, open: (*Image).Close, want: fs.ErrClosed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.sc.prepare = []faultStep{{'w', 100, 20_000}}
			disks, content := tt.sc.build(t)
			host := newFaultHost(disks)
			img, err := tt.sc.openScenario(host)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			if tt.open != nil {
				if err := tt.open(img); err != nil {
					t.Fatal(err)
				}
			}
			ctx := tt.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			before := len(host.faults.Ops())
			err = img.MakeEmpty(ctx)
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if tt.want == fs.ErrClosed {
				return
			}
			for _, op := range host.changes(before) {
				if !strings.Contains(op, "sync") {
					t.Errorf("a refusal changed: %s", op)
				}
			}
			if diff := explainContent(readDisk(t, img), 0, content, nil); diff != "" {
				t.Error(diff)
			}
		})
	}
	disks, _ := (&faultScenario{size: 64 << 10, create: CreateOptions{ClusterSize: 1024}}).build(t)
	img, err := OpenStorage(newFaultHost(disks).storage("image"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if err := img.MakeEmpty(t.Context()); !errors.Is(err, ErrReadOnly) {
		t.Errorf("of an image that is open for reading: error %v, want ErrReadOnly", err)
	}
}

// TestMakeEmptyFullDevice empties images on devices with less and less room. Where there is none for a table it fails
// for lack of space, and nothing has changed.
func TestMakeEmptyFullDevice(t *testing.T) {
	const cs, size = 512, 64 << 10
	refused := 0
	for spare := range 8 {
		dev := crashtest.NewDevice(nil, 256<<10)
		img, err := CreateStorage(crashStorage{dev}, size, &CreateOptions{ClusterSize: cs, Overwrite: true})
		if err != nil {
			t.Fatal(err)
		}
		want := pattern(uint64(spare), size)
		mustWrite(t, img, want, 0)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		edit, err := newCrashBytes(dev.Bytes(), true)
		if err != nil {
			t.Fatal(err)
		}
		room := (edit.end() + spare*cs + 4095) / 4096 * 4096 // devices end with a page
		for range (room-edit.end())/cs - spare {
			if _, err := edit.take(1); err != nil { // a leak
				t.Fatal(err)
			}
		}
		short := crashtest.NewDevice(edit.b[:room], int64(room))
		if img, err = OpenStorage(crashStorage{short}, &OpenOptions{ReadWrite: true}); err != nil {
			t.Fatal(err)
		}
		switch err := img.MakeEmpty(t.Context()); {
		case err == nil:
			want = make([]byte, size)
		case !errors.Is(err, syscall.ENOSPC):
			t.Errorf("%d clusters: %v", spare, err)
		default:
			refused++
		}
		if diff := explainContent(readDisk(t, img), 0, want, nil); diff != "" {
			t.Errorf("%d clusters: %s", spare, diff)
		}
		if _, err := img.WriteAt(want[:1000], 100); err != nil {
			t.Errorf("%d clusters: write afterwards: %v", spare, err)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		run := &faultRun{TB: t, host: &faultHost{disks: map[string]*crashtest.Disk{"image": short}}}
		run.walk(true)
	}
	if refused == 0 || refused == 8 {
		t.Errorf("%d of 8 devices had no room", refused)
	}
}

// TestMakeEmptyBeside empties an image while others read and write it. Every read finds a cluster as it was written
// last, or zeros, and the image is sound at the end.
func TestMakeEmptyBeside(t *testing.T) {
	const cs, clusters = 4096, 64
	img, _ := newHooked(t, clusters*cs, CreateOptions{ClusterSize: cs})
	done := make(chan struct{})
	var running []<-chan struct{}
	for i := range 3 {
		running = append(running, background(t, "reader and writer", func() error {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			p := make([]byte, cs)
			for {
				select {
				case <-done:
					return nil
				default:
				}
				off := int64(rng.IntN(clusters)) * cs
				if rng.IntN(2) == 0 {
					if _, err := img.WriteAt(bytes.Repeat([]byte{byte(off/cs + 1)}, cs), off); err != nil {
						return err
					}
					continue
				}
				if _, err := img.ReadAt(p, off); err != nil {
					return err
				}
				for _, b := range p {
					if b != p[0] || b != 0 && b != byte(off/cs+1) {
						return fmt.Errorf("cluster %d reads %d beside %d", off/cs, b, p[0])
					}
				}
			}
		}))
	}
	for range 20 {
		if err := img.MakeEmpty(t.Context()); err != nil {
			t.Error(err)
		}
	}
	close(done)
	for _, c := range running {
		await(t, "a reader and writer", c)
	}
}

// truncateTimer is a storage that knows how long its Truncate took.
type truncateTimer struct {
	Storage
	took time.Duration
}

// Truncate implements Storage.
func (s *truncateTimer) Truncate(size int64) error {
	begin := time.Now()
	defer func() { s.took += time.Since(begin) }()
	return s.Storage.Truncate(size)
}

// BenchmarkMakeEmpty empties images that QEMU has preallocated, on /dev/shm if there is one. It reports the time of
// Truncate, in which the host frees what was cut off, apart.
func BenchmarkMakeEmpty(b *testing.B) {
	qemutest.Require(b)
	dir := "/dev/shm"
	if _, err := os.Stat(dir); err != nil {
		dir = b.TempDir()
	}
	for _, size := range []string{"1G", "64G"} {
		b.Run("mapped="+size, func(b *testing.B) {
			path := filepath.Join(dir, "empty-benchmark.qcow2")
			defer os.Remove(path)
			var truncate time.Duration
			b.StopTimer()
			for range b.N {
				qemutest.Img(b, "create", "-f", "qcow2", "-o", "preallocation=metadata", path, size)
				f, err := OpenFileStorage(path, os.O_RDWR, 0)
				if err != nil {
					b.Fatal(err)
				}
				s := &truncateTimer{Storage: f}
				img, err := OpenStorage(s, &OpenOptions{ReadWrite: true})
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				err = img.MakeEmpty(context.Background())
				b.StopTimer()
				if err := errors.Join(err, img.Close(), f.Close()); err != nil {
					b.Fatal(err)
				}
				truncate += s.took
			}
			b.ReportMetric(float64(truncate.Nanoseconds())/float64(b.N), "truncate-ns/op")
		})
	}
}
