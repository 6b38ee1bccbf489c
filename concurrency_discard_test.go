package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
)

// TestDiscardBlockedReadPins blocks a read in the host, plain or compressed, before it has its bytes. The cluster that
// it reads is discarded and synced; it is neither punched nor given to a write until the read is done, which returns
// the old bytes (I4). Then it is punched, and free after that.
func TestDiscardBlockedReadPins(t *testing.T) {
	const cs = 4096
	for _, compressed := range []bool{false, true} {
		t.Run(fmt.Sprintf("compressed=%v", compressed), func(t *testing.T) {
			img, s, held, g, reading := blockedRead(t, cs, compressed)
			hostOff := int64(held.first * cs)

			var touched []string
			check := s.hook.Load()
			f := func(op hostOp, off int64, n int) {
				(*check)(op, off, n)
				if (op == beforeWrite || op == beforePunch) && off < hostOff+cs && off+int64(n) > hostOff {
					touched = append(touched, fmt.Sprintf("op %d at %#x+%#x", op, off, n))
				}
			}
			s.hook.Store(&f)
			if err := img.Discard(0, cs); err != nil {
				t.Fatal(err)
			}
			for i := range int64(8) {
				if err := img.Sync(); err != nil {
					t.Fatal(err)
				}
				mustWrite(t, img, pattern(3, 4*cs), (16+4*i)*cs)
			}
			if touched != nil {
				t.Fatalf("I4: while a read of the cluster was in flight: %q", touched)
			}
			g.open()
			await(t, "the read", reading)
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("op %d at ", beforePunch); len(touched) != 1 || touched[0][:len(want)] != want {
				t.Errorf("after the read: %q, want one punch", touched)
			}
			if v, err := img.m.alloc.refcount(held.first); err != nil || v != 0 {
				t.Fatalf("refcount %d (%v) of a cluster that nobody uses any more", v, err)
			}
			finishes(t, "read", wantAt(img, make([]byte, cs), 0))
		})
	}
}

// TestDiscardBlockedPunch blocks a punch in the host. Reads, writes of every kind and Sync go on; nobody gets the
// cluster until it has been punched, however full the host is.
func TestDiscardBlockedPunch(t *testing.T) {
	const cs = 4096
	img, s := newHooked(t, 1024*cs, CreateOptions{ClusterSize: cs})
	mustWrite(t, img, pattern(1, 8*cs), 0)
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	hostOff := int64(entryAt(t, img, cs).hostOff())
	if err := img.Discard(cs, cs); err != nil {
		t.Fatal(err)
	}
	g := s.block(t, func(op hostOp, off int64, n int) bool { return op == beforePunch })
	syncing := background(t, "Sync that punches", img.Sync)
	await(t, "the punch", g.arrived)
	finishes(t, "read", wantAt(img, make([]byte, cs), cs))
	finishes(t, "in-place write", func() error { _, err := img.WriteAt(pattern(2, 100), 100); return err })
	finishes(t, "allocating write", func() error { _, err := img.WriteAt(pattern(3, cs), 20*cs); return err })
	finishes(t, "write of the discarded cluster", func() error { _, err := img.WriteAt(pattern(4, cs), cs); return err })
	finishes(t, "compressed write", func() error { return img.WriteCompressed(pattern(5, cs), 30*cs) })
	finishes(t, "discard", func() error { return img.Discard(3*cs, cs) })
	finishes(t, "Sync", img.Sync)
	for _, guest := range []uint64{cs, 20 * cs, 30 * cs} {
		if at := int64(img.m.held(entryAt(t, img, guest)).first * cs); at == hostOff {
			t.Errorf("guest %#x has the cluster at %#x, which is being punched", guest, at)
		}
	}
	g.open()
	await(t, "Sync that punches", syncing)
	mustWrite(t, img, pattern(6, cs), 40*cs)
	if at := int64(entryAt(t, img, 40*cs).hostOff()); at != hostOff {
		t.Errorf("after the punch a write took %#x, want the free cluster at %#x", at, hostOff)
	}
	finishes(t, "read after", wantAt(img, pattern(4, cs), cs))
}

// TestDiscardWaitsForWrite blocks writes of guest data in the host, in place and allocating. A Discard and a WriteZeroes
// of the same clusters wait for them before they look at the mapping, and come after them; those of other clusters
// do not wait.
func TestDiscardWaitsForWrite(t *testing.T) {
	const cs = 4096
	for _, mapped := range []bool{false, true} {
		for name, zero := range map[string]func(img *Image) error{
			"discard": func(img *Image) error { return img.Discard(0, 4*cs) },
			"zero":    func(img *Image) error { return img.WriteZeroes(0, 4*cs, 0) },
		} {
			t.Run(fmt.Sprintf("%s mapped=%v", name, mapped), func(t *testing.T) {
				img, s := newHooked(t, 4096*cs, CreateOptions{ClusterSize: cs})
				if mapped {
					mustWrite(t, img, pattern(1, 4*cs), 0)
				}
				mustWrite(t, img, pattern(1, 4*cs), 2048*cs)
				mustWrite(t, img, pattern(1, cs), 8*cs)
				g := s.block(t, func(op hostOp, off int64, n int) bool { return op == beforeWrite && n == 2*cs })
				writing := background(t, "blocked write", func() error { _, err := img.WriteAt(pattern(2, 2*cs), cs); return err })
				await(t, "the write", g.arrived)
				zeroing := background(t, name, func() error { return zero(img) })
				finishes(t, "discard in another table", func() error { return img.Discard(2048*cs, 4*cs) })
				select {
				case <-zeroing:
					t.Error("it did not wait for the write")
				default:
				}
				g.open()
				await(t, "the write", writing)
				await(t, name, zeroing)
				finishes(t, "read", wantAt(img, make([]byte, 4*cs), 0))
			})
		}
	}
}

// discardStress is one image of TestConcurrencyDiscard.
type discardStress struct {
	name string
	opts CreateOptions
	open OpenOptions
	base bool // a backing file lies below

	snapshots bool // somebody takes, reads and deletes snapshots meanwhile
}

// discardStresses is what TestConcurrencyDiscard runs over.
var discardStresses = []discardStress{
	{name: "512 tiny cache", opts: CreateOptions{ClusterSize: 512}, open: OpenOptions{L2CacheBytes: 1, RefcountCacheBytes: 1, Discard: DiscardAll}},
	{name: "4k", opts: CreateOptions{ClusterSize: 4096}},
	{name: "4k no unref", opts: CreateOptions{ClusterSize: 4096, RefcountBits: 8}, open: OpenOptions{DiscardNoUnref: true, Discard: DiscardAll}},
	{name: "4k lazy backing", opts: CreateOptions{ClusterSize: 4096, LazyRefcounts: true, BackingFile: "base", BackingFormat: "raw"}, base: true},
	{name: "16k extended", opts: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}, open: OpenOptions{L2CacheBytes: 1, Discard: DiscardAll}},
	{name: "512 snapshots tiny cache", opts: CreateOptions{ClusterSize: 512}, open: OpenOptions{L2CacheBytes: 1, RefcountCacheBytes: 1, Discard: DiscardAll}, snapshots: true},
	{name: "4k snapshots lazy backing", opts: CreateOptions{ClusterSize: 4096, LazyRefcounts: true, BackingFile: "base", BackingFormat: "raw"}, open: OpenOptions{Discard: DiscardAll}, base: true, snapshots: true},
	{name: "16k extended snapshots", opts: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}, open: OpenOptions{Discard: DiscardAll}, snapshots: true},
	{name: "data file", opts: CreateOptions{ClusterSize: 4096, DataFile: "data"}},
	{name: "raw data file", opts: CreateOptions{ClusterSize: 4096, DataFile: "data", DataFileRaw: true}},
}

// TestConcurrencyDiscard has goroutines write, write compressed, discard, zero, read and sync clusters of their own,
// which alternate, so that they meet in tables and host clusters, while others read all of them. A sector is zero,
// or what its owner wrote there; the owner reads exactly what he left. So a freed cluster that is punched or reused
// while somebody uses it is seen, and so is one punched after it was reused. In some images snapshots come and go
// meanwhile: what one of them shows never changes.
func TestConcurrencyDiscard(t *testing.T) {
	seed := rand.Uint64()
	if s := os.Getenv("QCOW2_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range discardStresses {
		t.Run(c.name, func(t *testing.T) {
			t.Logf("QCOW2_SEED=%d", seed)
			c.run(t, seed)
		})
	}
}

// run is the test of one image.
func (c discardStress) run(t *testing.T, seed uint64) {
	const owners, clusters = 6, 96
	cs := uint64(c.opts.ClusterSize)
	o, open := c.opts, c.open
	open.ReadWrite = true
	data := NewMemoryStorage()
	if o.DataFile != "" {
		open.DataFile = data
	}
	if c.base {
		base := NewMemoryStorage()
		p := make([]byte, clusters*cs/2)
		for i := uint64(0); i < uint64(len(p)); i += sectorSize {
			stamp{i/cs%owners + 1, 0}.put(p[i:], i)
		}
		if _, err := base.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		d, err := NewRawDisk(base)
		if err != nil {
			t.Fatal(err)
		}
		open.Backing = d
	}
	o.Open = &open
	s := NewMemoryStorage()
	img, err := CreateStorage(s, int64(clusters*cs), &o)
	if err != nil {
		t.Fatal(err)
	}
	model := make([]byte, clusters*cs)
	if _, err := img.ReadAt(model, 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for me := range uint64(owners) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			w := discardOwner{img: img, rnd: rand.New(rand.NewPCG(seed, me)), model: model, me: me + 1, owners: owners, clusters: clusters}
			for k := range uint64(150) {
				if err := w.step(k + 1); err != nil {
					t.Errorf("owner %d, step %d: %v", me+1, k, err)
					return
				}
			}
		}()
	}
	if c.snapshots {
		wg.Add(1)
		go func() {
			defer wg.Done()
			w := discardSnapshots{img: img, rnd: rand.New(rand.NewPCG(seed, owners)), owners: owners}
			if err := w.run(snapshotRounds); err != nil {
				t.Errorf("snapshots: %v", err)
			}
		}()
	}
	wg.Wait()
	if err := wantAt(img, model, 0)(); err != nil {
		t.Error(err)
	}
	if err := checkList(img); err != nil {
		t.Error(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	open.ReadWrite = false
	if img, err = OpenStorage(s, &open); err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if err := wantAt(img, model, 0)(); err != nil {
		t.Errorf("after Close: %v", err)
	}
	if o.DataFileRaw {
		b := make([]byte, len(model))
		if _, err := data.ReadAt(b, 0); !bytes.Equal(b, model) {
			t.Errorf("the raw data file does not read as the disk: %v", err)
		}
	}
	if !c.base && o.DataFile == "" {
		checkByQEMU(t, s)
	}
}

// discardOwner is one goroutine of TestConcurrencyDiscard.
type discardOwner struct {
	img                  *Image
	rnd                  *rand.Rand
	model                []byte // what the disk holds; each owner writes his own clusters
	me, owners, clusters uint64
}

// step does one operation, the k-th.
func (w *discardOwner) step(k uint64) error {
	cs := w.img.m.clusterSize
	switch op := w.rnd.IntN(100); {
	case op < 5:
		return w.img.Sync()
	case op < 35:
		return w.readAny()
	}
	ci := w.rnd.Uint64N(w.clusters/w.owners)*w.owners + w.me - 1
	own := w.model[ci*cs : (ci+1)*cs]
	off, n := uint64(0), cs
	if w.rnd.IntN(3) == 0 {
		off = w.rnd.Uint64N(cs/sectorSize) * sectorSize
		n = (1 + w.rnd.Uint64N((cs-off)/sectorSize)) * sectorSize
	}
	part, at := own[off:off+n], int64(ci*cs+off)
	var err error
	switch op := w.rnd.IntN(10); {
	case op < 3:
		clear(own)
		err = w.img.Discard(int64(ci*cs), int64(cs))
	case op < 5:
		clear(part)
		err = w.img.WriteZeroes(at, int64(n), ZeroFlags(w.rnd.IntN(2)))
	default:
		for i := uint64(0); i < n; i += sectorSize {
			stamp{w.me, k}.put(part[i:], uint64(at)+i)
		}
		if n == cs && op < 7 && !w.img.m.external {
			err = w.img.WriteCompressed(part, at)
		} else {
			_, err = w.img.WriteAt(part, at)
		}
	}
	if err != nil {
		return err
	}
	return wantAt(w.img, own, int64(ci*cs))()
}

// readAny reads some clusters and judges their sectors.
func (w *discardOwner) readAny() error {
	cs := w.img.m.clusterSize
	ci := w.rnd.Uint64N(w.clusters)
	p := make([]byte, min(3, w.clusters-ci)*cs)
	if _, err := w.img.ReadAt(p, int64(ci*cs)); err != nil {
		return err
	}
	return judgeStamps(p, ci*cs, cs, w.owners)
}

// judgeStamps tells whether each sector of p, read at guest offset off, is zero or its owner's.
func judgeStamps(p []byte, off, cs, owners uint64) error {
	for ; len(p) > 0; p, off = p[sectorSize:], off+sectorSize {
		st, err := readStamp(p[:sectorSize], off)
		if err != nil {
			return err
		}
		if st != (stamp{}) && st.writer != off/cs%owners+1 {
			return fmt.Errorf("sector at guest %#x was written by %d", off, st.writer)
		}
	}
	return nil
}

// discardSnapshots is the goroutine of TestConcurrencyDiscard that takes, reads and deletes snapshots.
type discardSnapshots struct {
	img    *Image
	rnd    *rand.Rand
	owners uint64
	open   []openSnapshot
}

// run takes n snapshots, and keeps some of them open for a while. The last ones stay in the image.
func (w *discardSnapshots) run(n int) error {
	for i := range n {
		s, err := w.img.CreateSnapshot(context.Background(), &SnapshotOptions{Name: fmt.Sprint(i)})
		if err != nil {
			return err
		}
		d, err := w.img.OpenSnapshot(SnapshotRef{ID: s.ID})
		if err != nil {
			return err
		}
		b, err := readWholeDisk(d)
		if err != nil {
			return err
		}
		if err := judgeStamps(b, 0, w.img.m.clusterSize, w.owners); err != nil {
			return fmt.Errorf("snapshot %d: %w", i, err)
		}
		w.open = append(w.open, openSnapshot{d, b})
		if len(w.open) > 3 {
			if err := w.drop(w.rnd.IntN(len(w.open))); err != nil {
				return err
			}
		}
	}
	for _, s := range w.open {
		if err := errors.Join(s.unchanged(), s.Close()); err != nil {
			return err
		}
	}
	return nil
}

// drop deletes the k-th of the open snapshots.
func (w *discardSnapshots) drop(k int) error {
	s := w.open[k]
	w.open = slices.Delete(w.open, k, k+1)
	if err := errors.Join(s.unchanged(), s.Close()); err != nil {
		return err
	}
	return w.img.DeleteSnapshot(context.Background(), SnapshotRef{ID: s.Snapshot().ID})
}
