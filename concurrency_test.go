package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// The stress test stamps every sector that it writes with where it stands, who wrote it and when. A
// reader can then tell a sector that is foreign, torn, or older than what it must see.

const (
	stampWriters = 8                // goroutines
	stampInitial = stampWriters + 1 // the writer of what was there before
	stampMagic   = 0x5354414d50000000
)

// stamp is what a sector holds: the seq-th write of a writer. The zero stamp is a sector of zeros.
type stamp struct{ writer, seq uint64 }

// put fills one sector for guest offset off. The words repeat, so that clusters compress.
func (s stamp) put(p []byte, off uint64) {
	words := [4]uint64{stampMagic, off, s.writer, s.seq}
	for i := 0; i < sectorSize; i += 32 {
		for j, w := range words {
			binary.LittleEndian.PutUint64(p[i+8*j:], w)
		}
	}
}

// readStamp returns the stamp of one sector at guest offset off, or an error if it is torn or foreign.
func readStamp(p []byte, off uint64) (stamp, error) {
	var want [sectorSize]byte
	if bytes.Equal(p, want[:]) {
		return stamp{}, nil
	}
	s := stamp{binary.LittleEndian.Uint64(p[16:]), binary.LittleEndian.Uint64(p[24:])}
	s.put(want[:], off)
	if !bytes.Equal(p, want[:]) {
		i := 0
		for p[i] == want[i] {
			i++
		}
		return s, fmt.Errorf("sector at guest %#x is foreign or torn: it begins % x, and differs at byte %d: % x", off, p[:32], i, p[i&^31:][:32])
	}
	return s, nil
}

// window is a guest range that the stress test works on. Sectors of a private window belong to one writer
// each, in short runs that alternate, so that the clusters are shared although the sectors are not.
type window struct {
	off, n  uint64 // bytes, aligned to clusters
	private bool
	acked   []atomic.Uint64 // per sector: when the latest of the writes that returned began
	last    []atomic.Uint64 // per sector of a private window: seq of its owner's last write
}

// privateRun is the length of a run of sectors of one owner in a private window.
const privateRun = 3

// owner returns the writer to whom sector i of a private window belongs.
func (w *window) owner(i uint64) uint64 { return i/privateRun%stampWriters + 1 }

// stampTest is one run of the stress test.
type stampTest struct {
	windows []*window
	base    bool // sectors that nobody wrote carry the initial stamp
	clock   atomic.Uint64
	ends    [stampWriters + 2][]atomic.Uint64 // by writer and seq: when the write returned; 0 before
}

// check judges a sector of w that was read after acked was looked up.
func (st *stampTest) check(w *window, p []byte, i, acked uint64) (stamp, error) {
	off := w.off + i*sectorSize
	s, err := readStamp(p, off)
	if err != nil {
		return s, err
	}
	initial := s == stamp{} || s == stamp{stampInitial, 0}
	switch {
	case initial && (s.writer == 0) == st.base:
		return s, fmt.Errorf("sector at guest %#x shows %v, which it never held", off, s)
	case initial && acked > 0:
		return s, fmt.Errorf("sector at guest %#x shows its first content, but a write that began at %d had returned", off, acked)
	case initial:
		return s, nil
	case s.writer == 0 || s.writer > stampWriters || s.seq >= uint64(len(st.ends[s.writer])):
		return s, fmt.Errorf("sector at guest %#x has an impossible stamp %v", off, s)
	case w.private && s.writer != w.owner(i):
		return s, fmt.Errorf("sector at guest %#x belongs to %d and shows %v", off, w.owner(i), s)
	}
	if end := st.ends[s.writer][s.seq].Load(); end != 0 && end < acked {
		return s, fmt.Errorf("sector at guest %#x shows %v, whose write ended at %d, but one that began at %d had returned", off, s, end, acked)
	}
	return s, nil
}

// read reads sectors from first to last of w and judges them. me is the reader.
func (st *stampTest) read(d Disk, w *window, first, n, me uint64) error {
	acked := make([]uint64, n)
	for i := range acked {
		acked[i] = w.acked[first+uint64(i)].Load()
	}
	p := make([]byte, n*sectorSize)
	if _, err := d.ReadAt(p, int64(w.off+first*sectorSize)); err != nil {
		return err
	}
	for i := range n {
		s, err := st.check(w, p[i*sectorSize:][:sectorSize], first+i, acked[i])
		if err != nil {
			return err
		}
		if w.private && w.owner(first+i) == me {
			if last := w.last[first+i].Load(); s.writer == me && s.seq != last || s.writer != me && last != 0 {
				return fmt.Errorf("sector at guest %#x shows %v to its owner, who last wrote %d", w.off+(first+i)*sectorSize, s, last)
			}
		}
	}
	return nil
}

// write has writer me write n sectors of w from first on, by the function given.
func (st *stampTest) write(w *window, first, n, me, seq uint64, write func(p []byte, off int64) error) error {
	p := make([]byte, n*sectorSize)
	off := w.off + first*sectorSize
	for i := range n {
		stamp{me, seq}.put(p[i*sectorSize:], off+i*sectorSize)
	}
	begin := st.clock.Add(1)
	if err := write(p, int64(off)); err != nil {
		return err
	}
	st.ends[me][seq].Store(st.clock.Add(1))
	for i := first; i < first+n; i++ {
		for {
			old := w.acked[i].Load()
			if begin <= old || w.acked[i].CompareAndSwap(old, begin) {
				break
			}
		}
		if w.private {
			w.last[i].Store(seq)
		}
	}
	return nil
}

// worker is one goroutine of the stress test: ops random operations from sequence number seq on.
func (st *stampTest) worker(img *Image, rnd *rand.Rand, me, seq uint64, ops int) error {
	sectors := func(w *window, most uint64) (first, n uint64) {
		first = rnd.Uint64N(w.n / sectorSize)
		return first, 1 + rnd.Uint64N(min(most, w.n/sectorSize-first))
	}
	cluster := img.m.clusterSize
	for range ops {
		w := st.windows[rnd.IntN(len(st.windows))]
		most := uint64(8)
		if rnd.IntN(4) == 0 {
			most = max(2*cluster/sectorSize, 16)
		}
		most = min(most, 512)
		var err error
		switch op := rnd.IntN(100); {
		case op < 40:
			first, n := sectors(w, most)
			err = st.read(img, w, first, n, me)
		case op < 42:
			err = img.Sync()
		case op < 45:
			err = checkExtents(img, int64(w.off), int64(w.n))
		case w.private:
			// A part of one of my runs.
			runs := w.n / sectorSize / (privateRun * stampWriters)
			first := (rnd.Uint64N(runs)*stampWriters+me-1)*privateRun + rnd.Uint64N(privateRun)
			n := 1 + rnd.Uint64N(privateRun-first%privateRun)
			err = st.write(w, first, n, me, seq, func(p []byte, off int64) error {
				_, err := img.WriteAt(p, off)
				return err
			})
			if err == nil {
				err = st.read(img, w, first, n, me)
			}
			seq++
		case op < 60 && !img.m.external:
			n := min(1+rnd.Uint64N(2), w.n/cluster)
			first := rnd.Uint64N(w.n/cluster - n + 1)
			err = st.write(w, first*cluster/sectorSize, n*cluster/sectorSize, me, seq, img.WriteCompressed)
			seq++
		case op < 70:
			first, n := sectors(w, most)
			err = st.write(w, first, n, me, seq, func(p []byte, off int64) error {
				var v [][]byte
				for len(p) > 0 {
					k := min(1+rnd.IntN(3000), len(p))
					v, p = append(v, p[:k]), p[k:]
				}
				_, err := img.WriteVecAt(v, off)
				return err
			})
			seq++
		default:
			first, n := sectors(w, most)
			err = st.write(w, first, n, me, seq, func(p []byte, off int64) error {
				_, err := img.WriteAt(p, off)
				return err
			})
			seq++
		}
		if err != nil {
			return fmt.Errorf("writer %d, write %d: %w", me, seq, err)
		}
	}
	return nil
}

// checkExtents checks that the extents of a range follow each other without gaps.
func checkExtents(img *Image, off, n int64) error {
	at := off
	for e, err := range img.Extents(off, n) {
		if err != nil {
			return err
		}
		if e.Off != at || e.Len <= 0 {
			return fmt.Errorf("extent %+v does not begin at %#x", e, at)
		}
		at += e.Len
	}
	if at != off+n {
		return fmt.Errorf("extents end at %#x, not %#x", at, off+n)
	}
	return nil
}

// stressConfig is one image of the stress test.
type stressConfig struct {
	name     string
	opts     CreateOptions
	windowN  uint64 // bytes of a window
	ops      int    // per goroutine and round; 0: the default
	tiny     bool   // two cached slices of each kind
	backing  bool   // over a raw file with stamps, shorter than the disk
	device   bool   // on a storage that cannot grow and holds garbage
	snapshot bool   // QEMU takes internal snapshots between the rounds
}

// stressConfigs is what TestConcurrencyStamps runs over.
var stressConfigs = []stressConfig{
	{name: "default", windowN: 1 << 20},
	{name: "512", opts: CreateOptions{ClusterSize: 512}, windowN: 96 << 10},
	{name: "512 wide refcounts tiny cache", opts: CreateOptions{ClusterSize: 512, RefcountBits: 64}, windowN: 192 << 10, tiny: true},
	{name: "4k tiny cache backing", opts: CreateOptions{ClusterSize: 4096}, windowN: 384 << 10, tiny: true, backing: true},
	{name: "4k one bit refcounts lazy", opts: CreateOptions{ClusterSize: 4096, RefcountBits: 1, LazyRefcounts: true}, windowN: 384 << 10},
	{name: "16k extended tiny cache", opts: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}, windowN: 768 << 10, tiny: true},
	{name: "64k extended backing", opts: CreateOptions{ExtendedL2: true}, windowN: 1 << 20, backing: true},
	{name: "2M zstd", opts: CreateOptions{ClusterSize: 2 << 20, Compression: CompressionZstd}, windowN: 4 << 20, ops: 20},
	{name: "data file", opts: CreateOptions{ClusterSize: 4096, DataFile: "data.raw"}, windowN: 384 << 10, tiny: true},
	{name: "data file extended backing", opts: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true, DataFile: "data.raw"}, windowN: 768 << 10, backing: true},
	{name: "device", opts: CreateOptions{ClusterSize: 4096}, windowN: 384 << 10, device: true},
	{name: "snapshots", opts: CreateOptions{ClusterSize: 4096}, windowN: 384 << 10, tiny: true, snapshot: true},
}

// TestConcurrencyStamps has eight goroutines read, write, write compressed, sync and list extents over the
// same and over neighbouring sectors of one image. No read may see a sector that is foreign, torn, or older
// than one whose write had returned before the read began and after the older one's had; the last write of
// a sector with one owner must always be seen by him. Close leaves an image that QEMU finds sound, with the
// same content.
func TestConcurrencyStamps(t *testing.T) {
	seed := rand.Uint64()
	if s := os.Getenv("QCOW2_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range stressConfigs {
		t.Run(c.name, func(t *testing.T) {
			t.Logf("QCOW2_SEED=%d", seed)
			c.run(t, seed)
		})
	}
}

// run is the stress test of one image: three rounds, or one, each of which ends in a Close and its checks.
func (c *stressConfig) run(t *testing.T, seed uint64) {
	if c.snapshot {
		qemutest.Require(t)
	}
	rounds := 3
	if testing.Short() && !c.snapshot {
		rounds = 1
	}
	ops := 100
	if c.ops != 0 {
		ops = c.ops
	}
	st := &stampTest{base: c.backing}
	for i := range st.ends {
		st.ends[i] = make([]atomic.Uint64, rounds*ops+1)
	}
	o := c.opts
	cluster := uint64(max(o.ClusterSize, 64<<10))
	if o.ClusterSize != 0 {
		cluster = uint64(o.ClusterSize)
	}
	// Windows stand in L2 tables, or at least slices, of their own where that takes no large disk.
	stride := max(c.windowN, min(cluster*cluster/8, 64<<20))
	size := uint64(0)
	for i := range 4 {
		w := &window{off: uint64(i) * stride, n: c.windowN, private: i%2 == 1}
		w.acked = make([]atomic.Uint64, c.windowN/sectorSize)
		w.last = make([]atomic.Uint64, c.windowN/sectorSize)
		st.windows = append(st.windows, w)
		size = w.off + w.n
	}

	host, data := NewMemoryStorage(), NewMemoryStorage()
	if c.device {
		host = NewMemoryDevice(24 << 20)
	}
	open := OpenOptions{ReadWrite: true}
	if c.tiny {
		open.L2CacheBytes, open.RefcountCacheBytes = 1, 1
	}
	base := NewMemoryStorage()
	if c.backing {
		// All windows but the end of the last.
		for _, w := range st.windows {
			p := make([]byte, w.n)
			for i := uint64(0); i < w.n; i += sectorSize {
				stamp{stampInitial, 0}.put(p[i:], w.off+i)
			}
			if _, err := base.WriteAt(p, int64(w.off)); err != nil {
				t.Fatal(err)
			}
		}
		d, err := NewRawDisk(base)
		if err != nil {
			t.Fatal(err)
		}
		open.Backing = d
		o.BackingFile, o.BackingFormat = "base.raw", "raw"
		size += cluster
	}
	if o.DataFile != "" {
		open.DataFile = data
	}
	o.Overwrite = c.device
	o.Open = &open
	img, err := CreateStorage(host, int64(size), &o)
	if err != nil {
		t.Fatal(err)
	}
	for round := range rounds {
		if !img.m.external {
			st.recompress(t, img)
		}
		var wg sync.WaitGroup
		for me := uint64(1); me <= stampWriters; me++ {
			wg.Add(1)
			go func() {
				defer wg.Done()
				rnd := rand.New(rand.NewPCG(seed, me<<8|uint64(round)))
				if err := st.worker(img, rnd, me, uint64(round*ops)+1, ops); err != nil {
					t.Error(err)
				}
			}()
		}
		wg.Wait()
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		ro := open
		ro.ReadWrite = false
		if img, err = OpenStorage(host, &ro); err != nil {
			t.Fatal(err)
		}
		for _, w := range st.windows {
			for me := uint64(1); me <= stampWriters; me++ {
				if err := st.read(img, w, 0, w.n/sectorSize, me); err != nil {
					t.Fatalf("after Close: %v", err)
				}
			}
		}
		if round == rounds-1 || c.snapshot {
			c.judge(t, img, host, data, base)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		if round < rounds-1 {
			if img, err = OpenStorage(host, &open); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// recompress writes private windows, whose sectors nobody may rewrite whole beside their owners, back in
// compressed clusters, so that the owners meet in clusters that must be replaced.
func (st *stampTest) recompress(t *testing.T, img *Image) {
	t.Helper()
	for _, w := range st.windows {
		if !w.private {
			continue
		}
		p := make([]byte, w.n)
		if _, err := img.ReadAt(p, int64(w.off)); err != nil {
			t.Fatal(err)
		}
		if err := img.WriteCompressed(p, int64(w.off)); err != nil {
			t.Fatal(err)
		}
	}
}

// judge has QEMU check the image and compare it with what img reads. With snapshots, it has QEMU take one
// and puts the file back into host.
func (c *stressConfig) judge(t *testing.T, img *Image, host, data, base *MemoryStorage) {
	t.Helper()
	qemutest.Require(t)
	dir := t.TempDir()
	t.Chdir(dir) // QEMU looks for a data file where it stands
	path := filepath.Join(dir, "img.qcow2")
	for name, m := range map[string]*MemoryStorage{path: host, filepath.Join(dir, "data.raw"): data, filepath.Join(dir, "base.raw"): base} {
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.WriteTo(f); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	qemutest.CheckClean(t, path)
	raw := filepath.Join(dir, "want.raw")
	s, err := OpenFileStorage(raw, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Truncate(img.Size()); err != nil {
		t.Fatal(err)
	}
	d, err := NewRawDisk(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := Convert(t.Context(), d, img, nil); err != nil {
		t.Fatal(err)
	}
	qemutest.Compare(t, path, "qcow2", raw, "raw")
	if c.snapshot {
		qemutest.Img(t, "snapshot", "-c", "s", path)
		p, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(host.Truncate(0), host.Truncate(int64(len(p)))); err != nil {
			t.Fatal(err)
		}
		if _, err := host.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	runtime.GC() // the files are large and short-lived
}
