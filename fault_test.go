package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// faultHost is the host of one run: files in memory that all fail by one plan, and that know who holds
// them. It is the Resolver of the images on it.
type faultHost struct {
	faults *crashtest.Faults
	disks  map[string]*crashtest.Disk // by the names "image", "data" and "base"
	locks  map[string]int             // locks held, by file
	open   map[string]int             // storages handed out by Resolve and not closed, by file
}

// newFaultHost returns a host with copies of the given disks.
func newFaultHost(disks map[string]*crashtest.Disk) *faultHost {
	h := &faultHost{
		faults: new(crashtest.Faults),
		disks:  make(map[string]*crashtest.Disk),
		locks:  make(map[string]int),
		open:   make(map[string]int),
	}
	for name, d := range disks {
		h.disks[name] = d.Clone()
	}
	return h
}

// storage returns a storage of the named file, which fails by the host's plan.
func (h *faultHost) storage(name string) *faultStorage {
	return &faultStorage{Storage: h.faults.Wrap(name, h.disks[name]), host: h, name: name}
}

// Resolve implements Resolver.
func (h *faultHost) Resolve(ref FileRef) (Storage, error) {
	if h.disks[ref.Name] == nil {
		return nil, fs.ErrNotExist
	}
	h.open[ref.Name]++
	return h.storage(ref.Name), nil
}

// checkIdle reports locks and storages that are still held.
func (h *faultHost) checkIdle(t testing.TB) {
	t.Helper()
	for name, n := range h.locks {
		if n != 0 {
			t.Errorf("%d locks of %s are held", n, name)
		}
	}
	for name, n := range h.open {
		if n != 0 {
			t.Errorf("%d storages of %s are open", n, name)
		}
	}
}

// hostChange reports whether an operation changes a file, or is a sync.
func hostChange(op crashtest.Op) bool {
	switch op.Kind {
	case crashtest.Read, crashtest.Size, crashtest.NextData:
		return false
	}
	return true
}

// changes returns the operations from the i-th on that change a file, or sync it.
func (h *faultHost) changes(i int) (ops []string) {
	for _, op := range h.faults.Ops()[i:] {
		if hostChange(op) {
			ops = append(ops, op.String())
		}
	}
	return ops
}

// faultStorage is a storage of a faultHost: a crashtest.Storage with a lock, both counted.
type faultStorage struct {
	crashtest.Storage
	host   *faultHost
	name   string
	locked bool
}

// Lock counts the lock.
func (s *faultStorage) Lock(LockRole) error {
	if !s.locked {
		s.locked = true
		s.host.locks[s.name]++
	}
	return nil
}

// Unlock counts the lock back.
func (s *faultStorage) Unlock() error {
	if s.locked {
		s.locked = false
		s.host.locks[s.name]--
	}
	return nil
}

// Close counts the storage back.
func (s *faultStorage) Close() error {
	s.host.open[s.name]--
	return s.Unlock()
}

// faultStep is one operation on an image: 'w' writes, 'c' writes compressed, 'r' reads, 's' syncs, 'd' discards, 'z'
// zeroes, 'u' zeroes and unmaps.
type faultStep struct {
	op     byte
	off, n int64 // in bytes; a c counts in clusters
}

// bytes returns what the k-th step of a run writes: no two steps write the same, and half of each
// 512 bytes compresses.
func (s faultStep) bytes(k int, n int64) []byte {
	p := make([]byte, n)
	r := rand.New(rand.NewPCG(uint64(k), uint64(s.off)))
	for i := range p {
		if i&256 == 0 {
			p[i] = byte(r.Uint32())
		} else {
			p[i] = byte(k + 1)
		}
	}
	return p
}

// faultModel is what a disk must hold. Of a write that failed, old and new bytes are both right until a
// write of the same range succeeds; after the image failed, the same goes for all since the last sync.
type faultModel struct {
	now, synced []byte
	failed      []modelWrite // whose writes failed, not written over yet
	since       []modelWrite // writes since the last sync, and failed ones before
}

// modelWrite is a write whose bytes may be there. dead marks bytes that were written over.
type modelWrite struct {
	off  int64
	p    []byte
	dead []bool
}

// wrote notes a write of p of which the first n bytes are known to be there.
func (m *faultModel) wrote(off int64, p []byte, n int) {
	for _, w := range m.failed {
		for i := range w.p {
			if at := w.off + int64(i); at >= off && at < off+int64(n) {
				w.dead[i] = true
			}
		}
	}
	copy(m.now[off:], p[:n])
	m.since = append(m.since, modelWrite{off, p, make([]bool, len(p))})
	if n < len(p) {
		m.failed = append(m.failed, modelWrite{off + int64(n), p[n:], make([]bool, len(p)-n)})
	}
}

// sync notes a sync that succeeded.
func (m *faultModel) sync() {
	m.synced = bytes.Clone(m.now)
	m.since = append([]modelWrite(nil), m.failed...)
}

// explain returns where got, read at off, differs from base in a way that none of the writes explains;
// "" if nowhere.
func explainContent(got []byte, off int64, base []byte, writes []modelWrite) string {
	if bytes.Equal(got, base[off:off+int64(len(got))]) {
		return ""
	}
next:
	for i, b := range got {
		at := off + int64(i)
		if b == base[at] {
			continue
		}
		for _, w := range writes {
			if j := at - w.off; j >= 0 && j < int64(len(w.p)) && !w.dead[j] && w.p[j] == b {
				continue next
			}
		}
		return fmt.Sprintf("byte %#x is %#x, want %#x", at, b, base[at])
	}
	return ""
}

// faultScenario is an image, and operations on it that meet faults.
type faultScenario struct {
	name    string
	size    int64
	create  CreateOptions
	base    int64 // length of the backing file in bytes; 0: none
	prepare []faultStep
	change  func(t testing.TB, b []byte) []byte // changes the image file before the run
	open    OpenOptions
	steps   []faultStep
}

// faultScenarios are the images and operations. Their caches hold two slices, so that most operations
// push something out.
func faultScenarios() []faultScenario {
	tiny := OpenOptions{L2CacheBytes: 1, RefcountCacheBytes: 1}
	scenarios := []faultScenario{
		{
			name: "plain", size: 256 << 10, create: CreateOptions{ClusterSize: 512}, open: tiny,
			prepare: []faultStep{{'w', 0, 3000}, {'w', 100_000, 700}},
			steps: []faultStep{
				{'w', 200, 100}, {'w', 40_000, 1500}, {'w', 70_300, 5}, {'s', 0, 0}, {'w', 130_000, 3000}, {'w', 39_000, 2000},
				{'r', 0, 256 << 10}, {'w', 163_000, 2000}, {'w', 200_000, 600}, {'s', 0, 0}, {'w', 230_000, 512},
			},
		},
		{
			name: "compressed", size: 128 << 10, create: CreateOptions{ClusterSize: 4096, RefcountBits: 2}, open: tiny,
			prepare: []faultStep{{'c', 0, 6}, {'w', 28_000, 6000}},
			steps: []faultStep{
				{'c', 2, 1}, {'c', 10, 5}, {'w', 4_000, 9000}, {'s', 0, 0}, {'c', 6, 4}, {'w', 45_000, 100}, {'c', 0, 3},
				{'r', 0, 128 << 10}, {'s', 0, 0}, {'c', 3, 2}, {'w', 0, 20_000},
			},
		},
		{
			name: "zstd", size: 128 << 10, create: CreateOptions{ClusterSize: 4096, Compression: CompressionZstd},
			prepare: []faultStep{{'c', 0, 6}},
			steps:   []faultStep{{'c', 3, 5}, {'w', 5_000, 5000}, {'s', 0, 0}, {'c', 1, 2}},
		},
		{
			name: "snapshot", size: 120 << 10, create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, open: tiny,
			prepare: []faultStep{{'w', 0, 40_000}, {'c', 80, 30}},
			change:  addTestSnapshot,
			steps: []faultStep{
				{'w', 300, 100}, {'w', 33_000, 3000}, {'c', 20, 3}, {'s', 0, 0}, {'w', 41_000, 1000}, {'w', 1_000, 100},
				{'r', 0, 120 << 10}, {'s', 0, 0}, {'w', 2_000, 4000}, {'c', 81, 4},
			},
		},
		{
			name: "extended over base", size: 1 << 20, create: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true, BackingFile: "base", BackingFormat: "raw"},
			base: 700_000, open: tiny,
			prepare: []faultStep{{'w', 1_000, 10_000}, {'c', 8, 2}},
			steps: []faultStep{
				{'w', 12_000, 300}, {'w', 40_000, 30_000}, {'w', 131_100, 600}, {'s', 0, 0}, {'w', 699_900, 300}, {'c', 0, 2},
				{'r', 0, 1 << 20}, {'w', 500, 100}, {'s', 0, 0}, {'w', 999_999, 2},
			},
		},
		{
			name: "base", size: 128 << 10, create: CreateOptions{ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw"},
			base:  50_001,
			steps: []faultStep{{'w', 1_000, 10}, {'w', 48_000, 5_000}, {'s', 0, 0}, {'w', 4_000, 200}, {'w', 100_000, 10_000}},
		},
		{
			name: "data file", size: 300<<10 + 512, create: CreateOptions{ClusterSize: 1024, DataFile: "data"}, open: tiny,
			prepare: []faultStep{{'w', 0, 3000}},
			steps: []faultStep{
				{'w', 1_000, 4000}, {'s', 0, 0}, {'w', 140_000, 2000}, {'s', 0, 0}, {'w', 50_000, 2000}, {'r', 0, 300 << 10}, {'w', 300<<10 + 100, 1}, {'w', 51_100, 2000}, {'s', 0, 0},
				{'w', 500, 20},
			},
		},
		{
			name: "raw data file", size: 64 << 10, create: CreateOptions{ClusterSize: 1024, DataFile: "data", DataFileRaw: true},
			steps: []faultStep{{'w', 1_000, 4000}, {'s', 0, 0}, {'w', 50_000, 2000}, {'r', 0, 64 << 10}},
		},
		{
			name: "lazy refcounts", size: 256 << 10, create: CreateOptions{ClusterSize: 512, LazyRefcounts: true}, open: tiny,
			prepare: []faultStep{{'w', 0, 3000}, {'c', 100, 3}},
			steps: []faultStep{
				{'w', 40_000, 1500}, {'w', 70_300, 5}, {'s', 0, 0}, {'c', 101, 2}, {'w', 130_000, 3000}, {'r', 0, 256 << 10}, {'s', 0, 0},
				{'w', 51_200, 600}, {'c', 200, 2},
			},
		},
		{
			name: "bitmaps", size: 128 << 10, create: CreateOptions{ClusterSize: 4096},
			prepare: []faultStep{{'w', 0, 3000}},
			change:  addTestBitmap,
			steps:   []faultStep{{'r', 0, 8192}, {'w', 1_000, 10}, {'w', 48_000, 5_000}, {'s', 0, 0}, {'w', 4_000, 200}},
		},
		{
			// A refcount block describes 32 KiB, and the table, which moves, 2 MiB.
			name: "growth", size: 2560 << 10, create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, open: tiny,
			prepare: []faultStep{{'w', 0, 1960 << 10}},
			steps:   []faultStep{{'w', 1961 << 10, 30 << 10}, {'w', 2200 << 10, 100}, {'s', 0, 0}, {'w', 2000 << 10, 40 << 10}, {'w', 100, 1000}, {'w', 2100 << 10, 9 << 10}},
		},
	}
	return append(scenarios, faultDiscardScenarios()...)
}

// appendClusters appends n zero clusters to the image file b, whose refcount blocks must reach so far,
// with refcount one, and returns it and the host offset of the first.
func appendClusters(t testing.TB, b []byte, n uint64) ([]byte, uint64) {
	t.Helper()
	h, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	g := h.geometry()
	first := g.clusters(uint64(len(b)))
	b = append(b, make([]byte, (first+n)<<g.clusterBits-uint64(len(b)))...)
	for ci := first; ci < first+n; ci++ {
		raiseTestRefcount(t, b, h, ci)
	}
	return b, first << g.clusterBits
}

// raiseTestRefcount adds a reference to cluster ci in the image file b.
func raiseTestRefcount(t testing.TB, b []byte, h *header, ci uint64) {
	t.Helper()
	g := h.geometry()
	block := binary.BigEndian.Uint64(b[h.refTableOff+8*(ci>>g.refBlockBits):])
	if block == 0 {
		t.Fatalf("no refcount block for cluster %d", ci)
	}
	p, i := b[block:block+g.clusterSize], ci&(1<<g.refBlockBits-1)
	setRefcountAt(p, g.refcountOrder, i, refcountAt(p, g.refcountOrder, i)+1)
}

// addTestSnapshot adds an internal snapshot of the present content to the image file b.
func addTestSnapshot(t testing.TB, b []byte) []byte {
	h, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	g := h.geometry()
	r := entryRules{geometry: g}
	l1Clusters := g.clusters(h.l1Bytes())
	b, off := appendClusters(t, b, l1Clusters+1)
	be := binary.BigEndian
	for i := range uint64(h.l1Size) {
		e := b[h.l1Off+8*i:]
		l2Off := be.Uint64(e) & offsetMask
		be.PutUint64(e, l2Off)
		if l2Off == 0 {
			continue
		}
		raiseTestRefcount(t, b, h, l2Off>>g.clusterBits)
		for j := range uint64(1) << g.l2Bits {
			e := b[l2Off+8*j:]
			word := be.Uint64(e)
			be.PutUint64(e, word&^flagCopied)
			held := r.held(l2Entry{word: word})
			for k := range held.n {
				raiseTestRefcount(t, b, h, held.first+k)
			}
		}
	}
	copy(b[off:], b[h.l1Off:h.l1Off+h.l1Bytes()])
	table := off + l1Clusters<<g.clusterBits
	copy(b[table:], snapshotSpec{l1Off: off, l1Size: h.l1Size, id: "1", name: "before", extra: snapshotExtra(0, h.size)}.append(nil))
	fieldPoke(t, "nb_snapshots", 1).apply(b)
	fieldPoke(t, "snapshots_offset", table).apply(b)
	return b
}

// unknownAutoclear is an autoclear feature that nobody knows.
const unknownAutoclear = 1 << 7

// addTestBitmap adds a persistent bitmap that is not in use to the image file b, and an unknown autoclear
// feature.
func addTestBitmap(t testing.TB, b []byte) []byte {
	h, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	g := h.geometry()
	b, off := appendClusters(t, b, 2)
	dir := bitmapSpec{tableOff: off + g.clusterSize, tableSize: 1, typ: bitmapTypeDirty, granularity: 16, name: "changes"}.append(nil)
	copy(b[off:], dir)
	h.bitmaps = &bitmapsExtension{count: 1, dirSize: uint64(len(dir)), dirOff: off}
	h.autoclear |= autoclearBitmaps | unknownAutoclear
	first, err := h.encode()
	if err != nil {
		t.Fatal(err)
	}
	copy(b, first)
	return b
}

// build makes the scenario's files, and what the disk holds.
func (sc *faultScenario) build(t testing.TB) (map[string]*crashtest.Disk, []byte) {
	t.Helper()
	disks := map[string]*crashtest.Disk{"image": crashtest.NewDisk(nil)}
	content := make([]byte, sc.size)
	if sc.base > 0 {
		base := faultStep{}.bytes(1000, sc.base)
		disks["base"] = crashtest.NewDisk(base)
		copy(content, base)
	}
	if sc.create.DataFile != "" {
		disks["data"] = crashtest.NewDisk(nil)
	}
	host := newFaultHost(disks)
	o := sc.create
	o.Open = &OpenOptions{Resolver: host}
	img, err := CreateStorage(host.storage("image"), sc.size, &o)
	if err != nil {
		t.Fatal(err)
	}
	run := faultRun{img: img, model: faultModel{now: content}}
	for k, s := range sc.prepare {
		if err := run.do(500+k, s); err != nil {
			t.Fatal(err)
		}
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if sc.change != nil {
		host.disks["image"] = crashtest.NewDisk(sc.change(t, host.disks["image"].Bytes()))
	}
	return host.disks, content
}

// faultPlan is a kind of fault.
type faultPlan struct {
	name string
	crashtest.Fault
	file    string // the file whose operations fail; "": all
	kinds   string // the kinds of operations that fail: r(ead), w(rite), s(ync), o(ther); "": all
	growing bool   // only operations fail that make a file grow beyond its length at the start
	through bool   // the fault lasts until the image is closed
}

// faultPlans are the kinds of faults, each carried out at every operation.
func faultPlans(sc *faultScenario) []faultPlan {
	once := func(err error) crashtest.Fault { return crashtest.Fault{Err: err} }
	forever := func(err error) crashtest.Fault { return crashtest.Fault{Err: err, Forever: true} }
	plans := []faultPlan{
		{name: "once", Fault: once(syscall.EIO)},
		{name: "once through Close", Fault: once(syscall.EIO), through: true},
		{name: "once after", Fault: crashtest.Fault{Err: syscall.EIO, After: true}, kinds: "ws"},
		{name: "short", Fault: crashtest.Fault{Err: syscall.EIO, Short: true}, kinds: "rw"},
		{name: "full once", Fault: once(syscall.ENOSPC), kinds: "w"},
		{name: "for good", Fault: forever(syscall.EIO)},
		{name: "for good through Close", Fault: forever(syscall.EIO), through: true},
		{name: "reads for good", Fault: forever(syscall.EIO), kinds: "r"},
		{name: "reads for good through Close", Fault: forever(syscall.EIO), kinds: "r", through: true},
		{name: "writes for good", Fault: crashtest.Fault{Err: syscall.EIO, Forever: true, Short: true}, kinds: "w"},
		{name: "writes for good through Close", Fault: forever(syscall.EIO), kinds: "w", through: true},
	}
	if sc.create.DataFile == "" {
		return append(plans,
			faultPlan{name: "full", Fault: forever(syscall.ENOSPC), growing: true},
			faultPlan{name: "full through Close", Fault: forever(syscall.ENOSPC), growing: true, through: true})
	}
	for _, file := range []string{"image", "data"} {
		plans = append(plans,
			faultPlan{name: file + " for good", Fault: forever(syscall.EIO), file: file, through: true},
			faultPlan{name: file + " syncs for good", Fault: forever(syscall.EIO), file: file, kinds: "s"})
		if file == "data" || !sc.create.DataFileRaw { // the tables of a raw data file never change
			plans = append(plans, faultPlan{name: file + " writes for good", Fault: forever(syscall.ENOSPC), file: file, kinds: "w"})
		}
	}
	return plans
}

// faultAt returns the plan's fault at its at-th operation on the files of disks.
func (p *faultPlan) faultAt(at int, disks map[string]*crashtest.Disk) crashtest.Fault {
	sizes := make(map[string]int64)
	for name, d := range disks {
		sizes[name], _ = d.Size()
	}
	f := p.Fault
	f.At = at
	f.Match = func(op crashtest.Op) bool {
		if p.file != "" && p.file != op.File {
			return false
		}
		if p.growing {
			return (op.Kind == crashtest.Write || op.Kind == crashtest.Truncate) && op.Off+op.N > sizes[op.File]
		}
		kind := "o"
		switch op.Kind {
		case crashtest.Read:
			kind = "r"
		case crashtest.Write:
			kind = "w"
		case crashtest.Sync:
			kind = "s"
		}
		return p.kinds == "" || strings.Contains(p.kinds, kind)
	}
	return f
}

// faultRun is one run of a scenario under one fault.
type faultRun struct {
	testing.TB
	host  *faultHost
	sc    *faultScenario
	img   *Image
	model faultModel
	seen  *faultsSeen
}

// faultsSeen counts what happened in the runs of a scenario, which would be in vain if it never did.
type faultsSeen struct {
	failed int // images that failed for good
	lost   int // images that could not be closed
	dirty  int // images that were left dirty
	moved  int // refcount tables that moved
	marked int // bitmaps that were marked in use
}

// do carries out the k-th step and tells the model.
func (r *faultRun) do(k int, s faultStep) error {
	cluster := int64(r.img.Info().ClusterSize)
	switch s.op {
	case 'w':
		p := s.bytes(k, s.n)
		n, err := r.img.WriteAt(p, s.off)
		r.model.wrote(s.off, p, n)
		return err
	case 'c':
		p := s.bytes(k, s.n*cluster)
		err := r.img.WriteCompressed(p, s.off*cluster)
		n := len(p)
		if err != nil {
			n = 0
		}
		r.model.wrote(s.off*cluster, p, n)
		return err
	case 'd', 'z', 'u':
		return r.zero(s)
	case 's':
		err := r.img.Sync()
		if err == nil {
			r.model.sync()
		}
		return err
	}
	p := make([]byte, s.n)
	_, err := r.img.ReadAt(p, s.off)
	if err == nil {
		if diff := explainContent(p, s.off, r.model.now, r.model.failed); diff != "" {
			r.Errorf("read %d bytes at %#x: %s", s.n, s.off, diff)
		}
	}
	return err
}

// injected returns the operation whose fault err tells of, and fails the test if it tells of none.
func (r *faultRun) injected(err error) crashtest.Op {
	r.Helper()
	var i *crashtest.InjectedError
	if !errors.As(err, &i) {
		r.Fatalf("error without an injected fault: %v", err)
	}
	return i.Op
}

// openImage opens the image for writing, twice if it must.
func (r *faultRun) openImage() {
	r.Helper()
	o := r.sc.open
	o.ReadWrite, o.Resolver, o.Name = true, r.host, "image"
	s := r.host.storage("image")
	img, err := OpenStorage(s, &o)
	if err != nil {
		r.injected(err)
		r.host.checkIdle(r)
		if ops := r.host.changes(0); len(ops) > 0 && r.sc.name != "bitmaps" {
			r.Errorf("an open that failed made changes: %q", ops)
		}
		r.host.faults.Heal()
		if img, err = OpenStorage(s, &o); err != nil {
			r.Fatalf("open again: %v", err)
		}
	}
	r.img = img
}

// walk walks the image file and fails the test for anything but what is allowed.
func (r *faultRun) walk(leaks bool) *refwalk.Report {
	r.Helper()
	d := r.host.disks["image"]
	rep, err := walkFile(d)
	if err != nil {
		r.Fatal(err)
	}
	if rep.Corruptions() > 0 || !leaks && !rep.Clean() {
		r.Errorf("dirty %v, %d corruptions, %d leaks, %d beyond the end: %q", rep.Dirty(), rep.Corruptions(), rep.Leaks, rep.PastEnd, rep.Findings)
	}
	return rep
}

// readDisks returns what the files hold, read without the library.
func (r *faultRun) readDisks() []byte {
	r.Helper()
	d := r.host.disks
	size, err := d["image"].Size()
	if err != nil {
		r.Fatal(err)
	}
	src := refwalk.Source{Image: d["image"], Size: size}
	if d["data"] != nil {
		src.Data = d["data"]
	}
	if d["base"] != nil {
		src.Backing = func(p []byte, off int64) error {
			clear(p)
			_, _ = d["base"].ReadAt(p, off)
			return nil
		}
	}
	p, err := refwalk.ReadGuest(src)
	if err != nil {
		r.Fatal(err)
	}
	return p
}

// checkFailed checks an image whose host failed a sync: no more changes, but reads.
func (r *faultRun) checkFailed() {
	r.Helper()
	before := len(r.host.faults.Ops())
	for _, s := range []faultStep{{'w', 0, 100}, {'w', r.sc.size - 600, 600}, {'s', 0, 0}, {'c', 0, 1}} {
		if s.op == 'c' && r.sc.create.DataFile != "" {
			continue
		}
		if err := r.do(900, s); !errors.Is(err, ErrFailed) || !errors.Is(err, crashtest.ErrInjected) {
			r.Errorf("%c after a failed sync: error %v, want ErrFailed and its cause", s.op, err)
		}
	}
	if err := r.do(0, faultStep{'r', 0, r.sc.size}); err != nil {
		r.Errorf("read after a failed sync: %v", err)
	}
	if err := r.img.Close(); !errors.Is(err, ErrFailed) || !errors.Is(err, crashtest.ErrInjected) {
		r.Errorf("Close after a failed sync: error %v, want ErrFailed and its cause", err)
	}
	if ops := r.host.changes(before); len(ops) > 0 {
		r.Errorf("changes after a failed sync: %q", ops)
	}
}

// checkLost checks the files of an image whose Close failed: what was synced is there, and the image can
// be used again.
func (r *faultRun) checkLost(pending []int) {
	r.Helper()
	rep := r.walk(true)
	r.seen.lost++
	if diff := explainContent(r.readDisks(), 0, r.model.synced, r.model.since); diff != "" {
		r.Errorf("after the image failed: %s", diff)
	}
	o := r.sc.open
	o.ReadWrite, o.Resolver = true, r.host
	if rep.Dirty() {
		r.seen.dirty++
		never := o
		never.Repair = RepairNever
		if _, err := OpenStorage(r.host.storage("image"), &never); !errors.Is(err, ErrDirty) {
			r.Errorf("open of the dirty image without a repair: error %v, want ErrDirty", err)
		}
	}
	img, err := OpenStorage(r.host.storage("image"), &o)
	if err != nil {
		r.Fatalf("open after the image failed: %v", err)
	}
	r.img = img
	r.model = faultModel{now: bytes.Clone(r.model.synced), failed: r.model.since}
	for _, k := range pending {
		if err := r.do(k, r.sc.steps[k]); err != nil {
			r.Errorf("step %d after the image failed: %v", k, err)
		}
	}
	if err := img.Close(); err != nil {
		r.Errorf("Close after the image failed: %v", err)
	}
	r.walk(true)
	if diff := explainContent(r.readDisks(), 0, r.model.now, r.model.failed); diff != "" {
		r.Errorf("after the image was used again: %s", diff)
	}
}

// steps carries out the steps under the fault. It returns those that did not succeed, and whether a sync
// failed for good.
func (r *faultRun) steps(plan *faultPlan) (pending []int, failed bool) {
	r.Helper()
	for k, s := range r.sc.steps {
		err := r.do(k, s)
		if err == nil {
			continue
		}
		op := r.injected(err)
		if isSync, isFinal := op.Kind == crashtest.Sync, errors.Is(err, ErrFailed); isSync != isFinal {
			r.Errorf("step %d: %s failed, and the error is %v", k, op, err)
		}
		if s.op == 'r' && op.Kind != crashtest.Read {
			r.Errorf("step %d: a read failed because of %s", k, op)
		}
		if errors.Is(err, ErrFailed) {
			return append(pending, k), true
		}
		if !plan.Forever {
			if err = r.do(k, s); err != nil {
				r.Errorf("step %d tried again: %v", k, err)
			}
			continue
		}
		pending = append(pending, k)
		// Nothing else changed.
		if err := r.do(0, faultStep{'r', max(0, s.off-5000), min(10_000, r.sc.size-max(0, s.off-5000))}); err != nil && r.injected(err).Kind != crashtest.Read {
			r.Errorf("read after step %d: %v", k, err)
		}
	}
	return pending, false
}

// run runs the scenario with the fault at the at-th operation. It reports whether the fault was met.
func (r *faultRun) run(plan *faultPlan, at int) bool {
	faults := r.host.faults
	faults.Set(plan.faultAt(at, r.host.disks))
	r.openImage()
	pending, failed := r.steps(plan)
	if !plan.through {
		faults.Heal()
	}
	r.walk(true)
	if failed {
		r.seen.failed++
		if plan.through {
			faults.Heal()
		}
		r.checkFailed()
		r.host.checkIdle(r)
		r.checkLost(pending)
		return true
	}
	if !plan.through {
		for _, k := range pending {
			if err := r.do(k, r.sc.steps[k]); err != nil {
				r.Errorf("step %d after the fault: %v", k, err)
			}
		}
		for k, s := range []faultStep{{'w', 3000, 1500}, {'s', 0, 0}, {'r', 0, r.sc.size}} {
			if err := r.do(800+k, s); err != nil {
				r.Errorf("%c after the fault: %v", s.op, err)
			}
		}
	}
	err := r.img.Close()
	fired := faults.Fired() > 0
	faults.Heal()
	r.host.checkIdle(r)
	if err != nil {
		r.injected(err)
		if !plan.through {
			r.Errorf("Close after the fault: %v", err)
		}
		r.checkLost(pending)
		return true
	}
	r.walk(false)
	if diff := explainContent(r.readDisks(), 0, r.model.now, r.model.failed); diff != "" {
		r.Errorf("after Close: %s", diff)
	}
	r.look()
	return fired
}

// look notes what became of the tables of an image that was closed, and checks what must hold of its header.
func (r *faultRun) look() {
	r.Helper()
	d := r.host.disks["image"]
	size, err := d.Size()
	if err != nil {
		r.Fatal(err)
	}
	h, err := readHeader(d, size)
	if err != nil {
		r.Fatal(err)
	}
	if h.refTableOff != 1<<h.clusterBits {
		r.seen.moved++
	}
	if h.bitmaps == nil {
		return
	}
	if h.autoclear&autoclearBitmaps == 0 || h.autoclear&unknownAutoclear != 0 {
		r.Errorf("autoclear features %#x: want the bitmaps, and nothing unknown", h.autoclear)
	}
	list, err := readBitmapDirectory(d, size, h, Limits{})
	if err != nil {
		r.Fatal(err)
	}
	if list[0].inUse() {
		r.seen.marked++
	} else if !bytes.Equal(r.model.now, r.model.synced) {
		r.Error("the guest wrote, and the bitmap does not know")
	}
}

// TestFaults fails every host operation of a writable open, of writes of every kind, syncs, growth,
// eviction and Close, in every way of faultPlans, goes on, and compares (I6, I10).
func TestFaults(t *testing.T) {
	for _, sc := range faultScenarios() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			disks, content := sc.build(t)
			var seen faultsSeen
			for i, plan := range faultPlans(&sc) {
				t.Run(plan.name, func(t *testing.T) {
					at, stride := 0, 1
					if testing.Short() {
						at, stride = i%5, 5 // each way its own operations
					}
					for ; !t.Failed(); at += stride {
						r := faultRun{
							TB:    t,
							host:  newFaultHost(disks),
							sc:    &sc,
							model: faultModel{now: bytes.Clone(content), synced: content},
							seen:  &seen,
						}
						met := r.run(&plan, at)
						if t.Failed() {
							t.Logf("fault at operation %d; the operations:\n%s", at, logOps(r.host.faults.Ops()))
						}
						if !met {
							break
						}
					}
					if at == 0 {
						t.Error("no operation to fail")
					}
				})
			}
			t.Logf("%+v", seen)
			for what, n := range map[string]int{"failed": seen.failed, "lost": seen.lost} {
				if n == 0 {
					t.Errorf("no image was %s", what)
				}
			}
			if sc.create.LazyRefcounts != (seen.dirty > 0) {
				t.Errorf("%d images were left dirty", seen.dirty)
			}
			if (sc.name == "growth") != (seen.moved > 0) {
				t.Errorf("%d refcount tables moved", seen.moved)
			}
			if (sc.name == "bitmaps") != (seen.marked > 0) {
				t.Errorf("%d bitmaps were marked", seen.marked)
			}
		})
	}
}

// logOps returns the operations, one in a line.
func logOps(ops []crashtest.Op) string {
	var b strings.Builder
	for i, op := range ops {
		fmt.Fprintf(&b, "%4d %s\n", i, op)
	}
	return b.String()
}

// TestFaultsReadOnly fails every host operation of a read-only open, of reads and Close. Nothing is ever
// written, whatever the image asks of a writer (I10), and what was read despite a fault is right.
func TestFaultsReadOnly(t *testing.T) {
	for _, sc := range faultScenarios() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			disks, content := sc.build(t)
			for _, plan := range []faultPlan{
				{name: "once", Fault: crashtest.Fault{Err: syscall.EIO}},
				{name: "short", Fault: crashtest.Fault{Err: syscall.EIO, Short: true}, kinds: "r"},
				{name: "for good", Fault: crashtest.Fault{Err: syscall.EIO, Forever: true}},
			} {
				step := int64(40_000)
				for at := 0; !t.Failed(); at++ {
					host := newFaultHost(disks)
					host.faults.Set(plan.faultAt(at, disks))
					o := sc.open
					o.Resolver, o.Name = host, "image"
					r := faultRun{TB: t, host: host, sc: &sc, model: faultModel{now: content}}
					img, err := OpenStorage(host.storage("image"), &o)
					if err != nil {
						r.injected(err)
						host.checkIdle(t)
						host.faults.Heal()
						if img, err = OpenStorage(host.storage("image"), &o); err != nil {
							t.Fatalf("open again: %v", err)
						}
					}
					r.img = img
					for off := int64(0); off < sc.size; off += step {
						s := faultStep{'r', off, min(step, sc.size-off)}
						if err := r.do(0, s); err != nil {
							if op := r.injected(err); op.Kind != crashtest.Read {
								t.Errorf("read at %#x: %v", off, err)
							}
							if plan.Forever {
								break
							}
							if err := r.do(0, s); err != nil {
								t.Errorf("read at %#x again: %v", off, err)
							}
						}
					}
					fired := host.faults.Fired() > 0
					host.faults.Heal()
					if err := r.do(0, faultStep{'r', 0, sc.size}); err != nil {
						t.Errorf("read after the fault: %v", err)
					}
					if err := img.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
					host.checkIdle(t)
					if ops := host.changes(0); len(ops) > 0 {
						t.Errorf("%s at operation %d: changes %q", plan.name, at, ops)
					}
					if !fired {
						break
					}
				}
			}
		})
	}
}

// TestFaultsCreate fails every host operation of CreateStorage. It holds nothing after an error, leaves no
// half of an image, and can be called again.
func TestFaultsCreate(t *testing.T) {
	for _, tt := range []struct {
		name string
		opts CreateOptions
		old  bool // the files hold something, which is to be overwritten
		dev  bool // block devices
	}{
		{name: "plain", opts: CreateOptions{ClusterSize: 4096}},
		{name: "overwrite", opts: CreateOptions{ClusterSize: 512}, old: true},
		{name: "data file", opts: CreateOptions{ClusterSize: 4096, DataFile: "data"}},
		{name: "data file by a resolver", opts: CreateOptions{ClusterSize: 4096, DataFile: "data"}, old: true},
		{name: "raw data file", opts: CreateOptions{ClusterSize: 4096, DataFile: "data", DataFileRaw: true}},
		{name: "devices", opts: CreateOptions{ClusterSize: 4096, DataFile: "data", DataFileRaw: true}, dev: true},
		{name: "base", opts: CreateOptions{ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const size = 256 << 10
			base := faultStep{}.bytes(1, 50_000)
			disks := map[string]*crashtest.Disk{"base": crashtest.NewDisk(base)}
			for _, name := range []string{"image", "data"} {
				switch {
				case tt.dev:
					disks[name] = crashtest.NewDevice(nil, 512<<10)
				case tt.old:
					disks[name] = crashtest.NewDisk(base)
				default:
					disks[name] = crashtest.NewDisk(nil)
				}
			}
			sc := faultScenario{size: size, create: tt.opts}
			for _, plan := range faultPlans(&sc) {
				t.Run(plan.name, func(t *testing.T) {
					for at := 0; !t.Failed(); at++ {
						host := newFaultHost(disks)
						host.faults.Set(plan.faultAt(at, disks))
						o := tt.opts
						o.Overwrite = tt.old || tt.dev
						o.Open = &OpenOptions{Resolver: host}
						if o.DataFile != "" && !strings.Contains(tt.name, "resolver") {
							o.Open.DataFile = host.storage("data")
						}
						s := host.storage("image")
						r := faultRun{TB: t, host: host, sc: &sc}
						img, err := CreateStorage(s, size, &o)
						fired := host.faults.Fired() > 0
						host.faults.Heal()
						if err != nil {
							r.injected(err)
							host.checkIdle(t)
							n, _ := s.Size()
							if info, err := Inspect(s, n, nil); err == nil && info.VirtualSize != size {
								t.Errorf("half an image: %+v", info)
							} else if err == nil {
								r.walk(true)
							}
							// What was empty is so again, unless what failed stands in the way of that too.
							full := int64(0)
							for _, name := range []string{"image", "data"} {
								n, _ := host.disks[name].Size()
								full += n
							}
							if full > 0 && !o.Overwrite {
								if !plan.Forever {
									t.Errorf("%d bytes are left in storages that were empty", full)
								}
								o.Overwrite = true
							}
							if img, err = CreateStorage(s, size, &o); err != nil {
								t.Fatalf("create again: %v", err)
							}
						}
						r.img = img
						r.model.now = make([]byte, size)
						if o.BackingFile != "" {
							copy(r.model.now, base)
						}
						for k, s := range []faultStep{{'r', 0, size}, {'w', 5_000, 300}, {'r', 0, size}} {
							if err := r.do(k, s); err != nil {
								t.Errorf("%c of the new image: %v", s.op, err)
							}
						}
						if err := img.Close(); err != nil {
							t.Errorf("Close: %v", err)
						}
						host.checkIdle(t)
						r.walk(tt.dev)
						if t.Failed() {
							t.Logf("fault at operation %d; the operations:\n%s", at, logOps(host.faults.Ops()))
						}
						if !fired {
							break
						}
					}
				})
			}
		})
	}
}

// TestUndoUnreadable takes clusters back whose refcounts cannot be read at that moment: they are free after
// the next sync all the same.
func TestUndoUnreadable(t *testing.T) {
	sc := faultScenario{size: 1 << 20, create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, prepare: []faultStep{{'w', 0, 1 << 20}}}
	disks, _ := sc.build(t)
	host := newFaultHost(disks)
	img, err := OpenStorage(host.storage("image"), &OpenOptions{ReadWrite: true, RefcountCacheBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	a := img.m.alloc
	run, err := a.alloc(3)
	if err != nil {
		t.Fatal(err)
	}
	for ci := range uint64(3) { // other blocks push this one out
		if _, err := a.refcount(ci << a.g.refBlockBits); err != nil {
			t.Fatal(err)
		}
	}
	host.faults.Set(crashtest.Fault{Err: syscall.EIO, Forever: true, Match: func(op crashtest.Op) bool { return op.Kind == crashtest.Read }})
	a.undo(run)
	if host.faults.Fired() == 0 {
		t.Fatal("no read failed")
	}
	host.faults.Heal()
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	for i := range run.n {
		if v, err := a.refcount(run.first + i); v != 0 || err != nil {
			t.Errorf("refcount %d of cluster %d, error %v", v, run.first+i, err)
		}
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	(&faultRun{TB: t, host: host}).walk(false)
}
