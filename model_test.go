package qcow2

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-qcow2/qcow2/internal/qemutest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// The model tests run random operations on an image and on a plain byte slice (sparse), and compare what
// both read. TestModel is a slice of it for every run of the tests. The whole campaign is
//
//	go test -run TestModelCampaign -timeout 120m . -args -model.ops=1000000
//
// which spreads the operations over all configurations. A failure prints a command
// that repeats it from the text of its operations, after shrinking them:
//
//	go test -run TestModelReplay . -args -model.config='...' -model.seed=1 -model.file=ops.txt
var (
	modelOps    = flag.Int("model.ops", 0, "operations of TestModelCampaign in all; 0 skips it")
	modelSeed   = flag.Uint64("model.seed", 1, "seed of TestModelCampaign, TestModelReplay and TestModel")
	modelConfig = flag.String("model.config", "", "TestModelReplay: the configuration")
	modelFile   = flag.String("model.file", "", "TestModelReplay: a file of operations")
)

// modelPage is the unit in which sparseBytes takes memory.
const modelPage = 4096

// sparseBytes is the model: an array of size bytes of which only the pages that were written take memory.
type sparseBytes struct {
	size  int64
	pages map[int64]*[modelPage]byte
}

// newSparseBytes returns size zeros.
func newSparseBytes(size int64) *sparseBytes {
	return &sparseBytes{size: size, pages: make(map[int64]*[modelPage]byte)}
}

// write copies p to off.
func (m *sparseBytes) write(p []byte, off int64) {
	for len(p) > 0 {
		i, in := off/modelPage, off%modelPage
		n := min(int64(len(p)), modelPage-in)
		if m.pages[i] == nil && !allZero(p[:n]) {
			m.pages[i] = new([modelPage]byte)
		}
		if m.pages[i] != nil {
			copy(m.pages[i][in:], p[:n])
		}
		p, off = p[n:], off+n
	}
}

// read fills p from off; past the end are zeros.
func (m *sparseBytes) read(p []byte, off int64) {
	for len(p) > 0 {
		i, in := off/modelPage, off%modelPage
		n := min(int64(len(p)), modelPage-in)
		if pg := m.pages[i]; pg != nil {
			copy(p[:n], pg[in:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

// resize makes the array size bytes long; what it gains is zeros.
func (m *sparseBytes) resize(size int64) {
	m.size = size
	if in := size % modelPage; in != 0 && m.pages[size/modelPage] != nil {
		clear(m.pages[size/modelPage][in:])
	}
	size = (size + modelPage - 1) / modelPage * modelPage
	for i := range m.pages {
		if i*modelPage >= size {
			delete(m.pages, i)
		}
	}
}

// allZero reports whether p is zeros only.
func allZero(p []byte) bool {
	for len(p) > len(zeroChunk) {
		if !bytes.Equal(p[:len(zeroChunk)], zeroChunk[:]) {
			return false
		}
		p = p[len(zeroChunk):]
	}
	return bytes.Equal(p, zeroChunk[:len(p)])
}

// thinStorage is a memory storage that does not spend memory on zeros that are written to it in whole
// chunks, so that images with clusters of 2 MiB stay small.
type thinStorage struct{ *MemoryStorage }

// WriteAt implements Storage.
func (s thinStorage) WriteAt(p []byte, off int64) (int, error) {
	if len(p) < memoryChunk {
		return s.MemoryStorage.WriteAt(p, off)
	}
	for done := 0; done < len(p); {
		n := min(len(p)-done, memoryChunk-int(off+int64(done))%memoryChunk)
		part := p[done : done+n]
		var err error
		if size, _ := s.Size(); n == memoryChunk && allZero(part) && (!s.FixedSize() || off+int64(done+n) <= size) {
			err = s.WriteZeroes(off+int64(done), int64(n))
		} else {
			n, err = s.MemoryStorage.WriteAt(part, off+int64(done))
		}
		done += n
		if err != nil {
			return done, err
		}
	}
	return len(p), nil
}

// modelFiles are the files under one image.
type modelFiles struct {
	image, data Storage
	backing     Storage
	backingName string
	content     *sparseBytes // what the backing file shows
	closers     []io.Closer
	path        string // of the image, where it is a file
	dataName    string // of the data file, for the header
}

// close closes files that are not in memory.
func (f *modelFiles) close() {
	for _, c := range f.closers {
		c.Close()
	}
}

// newModelFiles makes the storages of a configuration, with dir for those that are files. Content of the
// backing file follows from seed.
func newModelFiles(c workloadConfig, seed uint64, dir string) (*modelFiles, error) {
	f := &modelFiles{content: newSparseBytes(c.size()), dataName: "image.raw"}
	storage := func(name string, device int64) (Storage, error) {
		switch c.storage {
		case "device":
			return thinStorage{NewMemoryDevice(device)}, nil
		case "file":
			path := filepath.Join(dir, name)
			s, err := OpenFileStorage(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
			if err != nil {
				return nil, err
			}
			f.closers = append(f.closers, s)
			if name == "image.qcow2" {
				f.path = path
			} else if name == "image.raw" {
				f.dataName = path // QEMU looks for it in its working directory, not beside the image
			}
			return s, nil
		}
		return thinStorage{NewMemoryStorage()}, nil
	}
	var err error
	if f.image, err = storage("image.qcow2", c.deviceSize()); err != nil {
		return f, err
	}
	if c.external() {
		if c.layout == layoutRawData && c.clusterSize == 2<<20 {
			// A device that must read as zeros would have terabytes of them written.
			f.data = thinStorage{NewMemoryStorage()}
		} else if f.data, err = storage("image.raw", c.size()); err != nil {
			return f, err
		}
	}
	if c.backed() {
		err = f.makeBacking(c, seed, storage)
	}
	return f, err
}

// makeBacking makes the backing file, with a storage of that name and size: content in half of the hot
// clusters.
func (f *modelFiles) makeBacking(c workloadConfig, seed uint64, storage func(string, int64) (Storage, error)) error {
	rng := rand.New(rand.NewPCG(seed, 3))
	size := c.size()
	if c.layout == layoutBackingShort {
		// It ends inside a sector range that is nobody's bound, two thirds into the disk.
		size = size*2/3&^511 + 512
	}
	asQcow2 := c.layout == layoutBackingQcow2 || c.layout == layoutBackingShort && rng.IntN(2) == 0
	f.backingName = "backing.raw"
	if asQcow2 {
		f.backingName = "backing.qcow2"
	}
	f.backing = thinStorage{NewMemoryStorage()}
	if c.storage == "file" {
		var err error
		if f.backing, err = storage(f.backingName, size); err != nil {
			return err
		}
	}
	var w io.WriterAt = f.backing
	var img *Image
	if asQcow2 {
		opts := &CreateOptions{ClusterSize: 4 << 10, Open: &OpenOptions{NoSync: true}}
		if c.clusterSize >= 64<<10 {
			opts.ClusterSize = 64 << 10
		}
		if size > 1<<40 {
			opts.ClusterSize = 1 << 20
		}
		var err error
		if img, err = CreateStorage(f.backing, size, opts); err != nil {
			return err
		}
		w = img
	} else if err := f.backing.Truncate(size); err != nil {
		return err
	}
	for _, ci := range c.hot() {
		off := ci * c.clusterSize
		if rng.IntN(2) == 0 || off >= size {
			continue
		}
		off += rng.Int64N(c.clusterSize) / 2
		n := min(1+rng.Int64N(min(c.clusterSize, 48<<10)), size-off)
		if n <= 0 {
			continue
		}
		p := make([]byte, n)
		content(p, rng.Uint64())
		f.content.write(p, off)
		if _, err := w.WriteAt(p, off); err != nil {
			return err
		}
	}
	if img != nil {
		return img.Close()
	}
	return nil
}

// openOptions returns how an image of the configuration is opened.
func (f *modelFiles) openOptions(c workloadConfig) *OpenOptions {
	o := &OpenOptions{ReadWrite: true, DataFile: f.data, Name: "image.qcow2"}
	if f.backing != nil {
		o.Resolver = ResolverMap{f.backingName: f.backing}
	}
	if c.smallCache {
		o.L2CacheBytes, o.RefcountCacheBytes = 1, 1
	}
	c.discardOptions(o)
	return o
}

// create creates the image.
func (f *modelFiles) create(c workloadConfig) (*Image, error) {
	o := &CreateOptions{
		Version: c.version, ClusterSize: int(c.clusterSize), RefcountBits: c.refcountBits,
		ExtendedL2: c.layout == layoutExtended, Compression: c.compression, LazyRefcounts: c.lazy,
		Overwrite: true, Open: f.openOptions(c),
	}
	if f.data != nil {
		o.DataFile, o.DataFileRaw = f.dataName, c.layout == layoutRawData
	}
	if f.backing != nil {
		o.BackingFile, o.BackingFormat = f.backingName, strings.TrimPrefix(filepath.Ext(f.backingName), ".")
	}
	return CreateStorage(f.image, c.size(), o)
}

// modelStats counts what a run did.
type modelStats struct {
	ops, writes     int
	allocating      int // writes into clusters of which at least one was not the image's own plain one
	packed          int // WriteCompressed that were carried out
	syncs, reopens  int
	resizes         int
	walks           int
	tables          int // L2 tables at the end
	tableMoves      int
	amends          int // carried out, with rebases
	judged          int // looks of QEMU
	compressedFound int // compressed clusters that the walks saw, at most at once
}

// add adds the counts of another run; tables and compressedFound are those of the lower and the higher.
func (s *modelStats) add(o modelStats) {
	if s.ops == 0 || o.tables < s.tables {
		s.tables = o.tables
	}
	s.ops += o.ops
	s.writes += o.writes
	s.allocating += o.allocating
	s.packed += o.packed
	s.syncs += o.syncs
	s.reopens += o.reopens
	s.resizes += o.resizes
	s.walks += o.walks
	s.tableMoves += o.tableMoves
	s.amends += o.amends
	s.judged += o.judged
	s.compressedFound = max(s.compressedFound, o.compressedFound)
}

// modelJudge looks at the files of an image that is closed, and says what is wrong, beside the content that its disk should
// have. It reports whether it could.
type modelJudge func(f *modelFiles, content *sparseBytes) (judged bool, err error)

// modelRun is one image beside its model.
type modelRun struct {
	c     workloadConfig
	f     *modelFiles
	judge modelJudge
	img   *Image
	model *sparseBytes
	snaps []modelSnapshot
	stats modelStats
	got   []byte
	want  []byte
}

// modelFailure says which operation failed, counted from 0; len(ops) is the end.
type modelFailure struct {
	at  int
	err error
}

// Error is the operation's number and what was wrong.
func (e *modelFailure) Error() string { return fmt.Sprintf("operation %d: %v", e.at, e.err) }

// Unwrap returns what was wrong.
func (e *modelFailure) Unwrap() error { return e.err }

// runModel runs ops on a new image of the configuration, compares everything at the end, closes it, walks
// it and reads it once more by the independent reader. judge, if not nil, looks at the closed files.
func runModel(c workloadConfig, seed uint64, ops []op, dir string, judge modelJudge) (stats modelStats, err error) {
	f, err := newModelFiles(c, seed, dir)
	defer f.close()
	if err != nil {
		return stats, err
	}
	return runModelOn(c, f, ops, judge)
}

// runModelOn is runModel on given files.
func runModelOn(c workloadConfig, f *modelFiles, ops []op, judge modelJudge) (stats modelStats, err error) {
	at := 0
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
		if err != nil {
			err = &modelFailure{at: at, err: err}
		}
	}()
	r := &modelRun{c: c, f: f, judge: judge, model: newSparseBytes(c.size())}
	for i, pg := range f.content.pages {
		r.model.pages[i] = new([modelPage]byte)
		*r.model.pages[i] = *pg
	}
	r.model.resize(c.size()) // the backing file may be longer
	if r.img, err = f.create(c); err != nil {
		return r.stats, err
	}
	defer func() {
		if err != nil {
			_ = r.img.Abandon() // closed already, perhaps; the failure that counts is err
		}
	}()
	for at = range ops {
		if err := r.do(ops[at]); err != nil {
			return r.stats, fmt.Errorf("%v: %w", ops[at], err)
		}
		r.stats.ops++
	}
	at = len(ops)
	return r.stats, r.finish()
}

// finish compares everything, closes the image and looks at what it left.
func (r *modelRun) finish() error {
	if err := r.compareAll(r.img.ReadAt); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	r.countTables()
	if err := r.close(); err != nil {
		return err
	}
	size, err := r.f.image.Size()
	if err != nil {
		return err
	}
	src := refwalk.Source{Image: r.f.image, Size: size, Data: r.f.data}
	if r.overBacking() {
		src.Backing = func(p []byte, off int64) error { r.f.content.read(p, off); return nil }
	}
	other, err := refwalk.NewReader(src)
	if err != nil {
		return err
	}
	if err := r.compareAll(other.ReadAt); err != nil {
		return fmt.Errorf("by the independent reader, after close: %w", err)
	}
	if err := r.finishSnapshots(src); err != nil {
		return fmt.Errorf("by the independent reader, after close: %w", err)
	}
	if r.c.layout == layoutRawData {
		if err := r.compareAll(r.f.data.ReadAt); err != nil {
			return fmt.Errorf("the raw data file alone: %w", err)
		}
	}
	return r.askJudge()
}

// askJudge has the judge, if there is one, look at the files of the closed image.
func (r *modelRun) askJudge() error {
	if r.judge == nil {
		return nil
	}
	judged, err := r.judge(r.f, r.model)
	if judged {
		r.stats.judged++
	}
	return err
}

// countTables counts the L2 tables of the disk, the most that it has had when it was asked.
func (r *modelRun) countTables() {
	n := 0
	for i := range r.img.m.l1.n {
		if r.img.m.l1.load(i) != 0 {
			n++
		}
	}
	r.stats.tables = max(r.stats.tables, n)
}

// compareAll reads the disk through read and compares it with the model: on a small disk all of it, on
// others every page that holds something, and what lies around them.
func (r *modelRun) compareAll(read func([]byte, int64) (int, error)) error {
	if r.model.size <= 32<<20 {
		return r.compare(read, 0, r.model.size)
	}
	// Runs of whole clusters, so that a compressed one is unpacked once.
	chunk := max(r.c.clusterSize, 64<<10)
	seen := make(map[int64]bool)
	for _, ci := range r.c.hot() {
		seen[ci*r.c.clusterSize/chunk] = true
	}
	for i := range r.model.pages {
		seen[i*modelPage/chunk] = true
	}
	for i := range seen {
		off := i * chunk
		if off >= r.model.size {
			continue
		}
		if err := r.compare(read, off, min(chunk, r.model.size-off)); err != nil {
			return err
		}
	}
	return nil
}

// buffers returns two buffers of n bytes with any content.
func (r *modelRun) buffers(n int64) (got, want []byte) {
	if int64(len(r.got)) < n {
		r.got, r.want = make([]byte, n), make([]byte, n)
	}
	return r.got[:n], r.want[:n]
}

// compare compares the n bytes at off, in pieces.
func (r *modelRun) compare(read func([]byte, int64) (int, error), off, n int64) error {
	for n > 0 {
		m := min(n, 2<<20)
		got, want := r.buffers(m)
		for i := range got {
			got[i] = 0xa5
		}
		if k, err := read(got, off); k != len(got) || err != nil && err != io.EOF {
			return fmt.Errorf("read of %#x bytes at %#x returned %#x, %v", m, off, k, err)
		}
		r.model.read(want, off)
		if err := difference(got, want, off); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// difference returns an error that says where got and want, which lie at off, differ first.
func difference(got, want []byte, off int64) error {
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range want {
		if got[i] != want[i] {
			end := min(i+16, len(want))
			return fmt.Errorf("guest %#x reads % x instead of % x", off+int64(i), got[i:end], want[i:end])
		}
	}
	return fmt.Errorf("%d bytes instead of %d", len(got), len(want))
}

// do carries out one operation on the image and the model.
func (r *modelRun) do(o op) error {
	switch o.kind {
	case opWrite, opWriteV, opWriteC:
		return r.write(o)
	case opRead, opReadV:
		return r.read(o)
	case opDiscard, opZero, opUnmap:
		return r.zero(o)
	case opExtents:
		return r.extents(o)
	case opSync:
		r.stats.syncs++
		if err := r.img.Sync(); err != nil {
			return err
		}
		return r.walk(false)
	case opWalk:
		return r.walk(false)
	case opAmend:
		return r.amend(o)
	case opRebase:
		return r.rebase(o)
	case opEmpty:
		return r.empty()
	case opCommit:
		return r.commit()
	case opResize:
		return r.resize(o)
	case opSnapshot:
		return r.snapshot(o)
	case opReopen:
		r.stats.reopens++
		err := r.close()
		if err == nil && r.stats.reopens%4 == 1 {
			err = r.askJudge()
		}
		if err != nil {
			return err
		}
		r.img, err = OpenStorage(r.f.image, r.f.openOptions(r.c))
		return err
	}
	return fmt.Errorf("unknown operation")
}

// resize carries out a resize.
func (r *modelRun) resize(o op) error {
	r.stats.resizes++
	r.countTables()
	opts := &ResizeOptions{Shrink: true}
	if o.off > r.model.size {
		opts.Preallocation = Preallocation(o.n)
	}
	err := r.img.Resize(context.Background(), o.off, opts)
	if r.c.version == 2 && len(r.snaps) > 0 && o.off != r.model.size {
		if !errors.Is(err, ErrUnsupported) {
			return fmt.Errorf("version 2 with snapshots: %w", err)
		}
		return nil
	}
	if r.c.storage == "device" && isNoSpace(err) {
		if r.img.Size() != r.model.size {
			return fmt.Errorf("refused (%w), and the disk has %#x bytes", err, r.img.Size())
		}
		return r.walk(false)
	}
	if err != nil {
		return err
	}
	r.model.resize(o.off)
	if r.img.Size() != o.off {
		return fmt.Errorf("the disk has %#x bytes", r.img.Size())
	}
	return r.walk(false)
}

// close closes the image, whose file must then be without a flaw.
func (r *modelRun) close() error {
	if err := r.img.Close(); err != nil {
		return err
	}
	return r.walk(true)
}

// walk counts references and refcounts over the bytes of the file. There is never a corruption; closed,
// there is no finding at all.
func (r *modelRun) walk(closed bool) error {
	r.stats.walks++
	if !closed {
		r.countTables()
		// First, since it may push refcounts out of the cache.
		if err := checkList(r.img); err != nil {
			return err
		}
	}
	size, err := r.f.image.Size()
	if err != nil {
		return err
	}
	rep, err := refwalk.Walk(r.f.image, size)
	if err != nil {
		return err
	}
	r.stats.compressedFound = max(r.stats.compressedFound, rep.Compressed)
	if closed && !rep.Clean() || rep.Corruptions() > 0 {
		return fmt.Errorf("walk (closed %v): %d corruptions, %d leaks, %d lost COPIED, %d past the end, dirty %v:\n\t%s",
			closed, rep.Corruptions(), rep.Leaks, rep.CopiedMissing, rep.PastEnd, rep.Dirty(), strings.Join(rep.Findings, "\n\t"))
	}
	return agreesWithWalk(r.f.image, rep)
}

// agreesWithWalk checks an image file with the library, and compares what it finds with the walk. Of a dirty image
// neither knows the counts.
func agreesWithWalk(s Storage, rep *refwalk.Report) error {
	img, err := OpenStorage(s, &OpenOptions{CheckOnly: true, Lock: LockOff})
	if err != nil {
		return err
	}
	var found []string
	res, err := img.Check(context.Background(), &CheckOptions{Found: func(f Finding) {
		if len(found) < 10 {
			found = append(found, f.String())
		}
	}})
	if err = errors.Join(err, img.Close()); err != nil || rep.Dirty() {
		return err
	}
	got := [...]int64{res.Corruptions + res.Unreadable + res.Shared - res.LostCopied, res.LostCopied, res.Leaks, res.CheckErrors}
	want := [...]int64{int64(rep.Corruptions()), int64(rep.CopiedMissing), int64(rep.Leaks), 0}
	if got != want {
		return fmt.Errorf("check: corruptions, lost COPIED, leaks and errors are %d, the walk has %d:\n\t%s\n\t%s", got, want,
			strings.Join(found, "\n\t"), strings.Join(rep.Findings, "\n\t"))
	}
	return nil
}

// write carries out a write of one of the three kinds.
func (r *modelRun) write(o op) error {
	_, p := r.buffers(o.n)
	content(p, o.seed)
	var n int
	var err error
	refused := ErrRange
	inside := o.off >= 0 && o.off <= r.model.size && o.n <= r.model.size-o.off
	if inside {
		r.countWrite(o)
	}
	table := r.img.m.alloc.tableOff
	switch o.kind {
	case opWrite:
		n, err = r.img.WriteAt(p, o.off)
	case opWriteV:
		var v [][]byte
		rest := p
		for _, k := range o.cuts() {
			v, rest = append(v, rest[:k]), rest[k:]
		}
		n, err = r.img.WriteVecAt(v, o.off)
	case opWriteC:
		if r.c.external() {
			inside, refused = false, ErrUnsupported
		}
		if o.n%r.c.clusterSize != 0 && o.off+o.n != r.model.size {
			return nil // was the disk's end when the operations were made
		}
		if err = r.img.WriteCompressed(p, o.off); err == nil {
			n = len(p)
			r.stats.packed++
		}
	}
	if r.img.m.alloc.tableOff != table {
		r.stats.tableMoves++
	}
	if !inside {
		if n != 0 || !errors.Is(err, refused) {
			return fmt.Errorf("wrote %d bytes, %v; want an error that is %v", n, err, refused)
		}
		return nil
	}
	if n != len(p) || err != nil {
		return fmt.Errorf("wrote %d bytes, %v", n, err)
	}
	r.model.write(p, o.off)
	return nil
}

// countWrite counts a write that is about to be made.
func (r *modelRun) countWrite(o op) {
	r.stats.writes++
	if o.kind == opWriteC {
		if !r.c.external() {
			r.stats.allocating++
		}
		return
	}
	for e, err := range r.img.Extents(o.off, o.n) {
		if err != nil || e.Kind != ExtentData || e.Depth > 0 {
			r.stats.allocating++
			return
		}
	}
}

// read carries out a read and compares it.
func (r *modelRun) read(o op) error {
	got, want := r.buffers(o.n)
	for i := range got {
		got[i] = 0x5a
	}
	inside := max(min(o.n, r.model.size-o.off), 0)
	var n int
	var err error
	if o.kind == opRead {
		n, err = r.img.ReadAt(got, o.off)
	} else {
		var v [][]byte
		rest := got
		for _, k := range o.cuts() {
			v, rest = append(v, rest[:k]), rest[k:]
		}
		n, err = r.img.ReadVecAt(v, o.off)
	}
	if int64(n) != inside || (err == io.EOF) != (inside < o.n) || err != nil && err != io.EOF {
		return fmt.Errorf("read %d bytes, %v; want %d", n, err, inside)
	}
	r.model.read(want[:inside], o.off)
	return difference(got[:inside], want[:inside], o.off)
}

// extents checks that the extents of a range are joined and in order, that nothing but zeros is in those
// that do not say data, and that data is where they say.
func (r *modelRun) extents(o op) error {
	at := o.off
	for e, err := range r.img.Extents(o.off, o.n) {
		if err != nil {
			return err
		}
		if e.Off != at || e.Len <= 0 {
			return fmt.Errorf("extent %+v does not begin at %#x", e, at)
		}
		at += e.Len
		var from io.ReaderAt
		switch {
		case e.Kind == ExtentCompressed:
			continue
		case e.Kind == ExtentData && e.Depth == 0:
			from = r.f.image
			if r.f.data != nil {
				from = r.f.data
			}
		case e.Kind == ExtentData && e.Depth == 1 && r.f.backing != nil:
			from = r.f.backing
		case e.Kind == ExtentData:
			return fmt.Errorf("extent %+v is in no file", e)
		}
		for off := e.Off; off < at; {
			n := min(at-off, 1<<20)
			got, want := r.buffers(n)
			clear(got)
			if from != nil {
				if _, err := from.ReadAt(got, e.HostOff+off-e.Off); err != nil && err != io.EOF {
					return err
				}
			}
			r.model.read(want, off)
			if err := difference(got, want, off); err != nil {
				return fmt.Errorf("extent %+v: %w", e, err)
			}
			off += n
		}
	}
	if want := max(o.off, min(o.off+o.n, r.model.size)); at != want { // none of a range behind the end
		return fmt.Errorf("extents end at %#x instead of %#x", at, want)
	}
	return nil
}

// modelImages returns how many images the operations of a configuration are spread over. With a data file
// a cluster is allocated once and for all, so those images are renewed more often.
func (c workloadConfig) modelImages() int {
	if c.external() {
		return 10
	}
	return 3
}

// runConfig runs nOps operations on images of a configuration one after the other.
func runConfig(t *testing.T, c workloadConfig, seed uint64, nOps int) modelStats {
	t.Helper()
	var total modelStats
	judge := func(f *modelFiles, content *sparseBytes) (bool, error) {
		if f.path == "" || !lookQemu() {
			return false, nil
		}
		return true, qemuJudge(t, f.path, content)
	}
	images := min(c.modelImages(), max(nOps/300, 1))
	dir := t.TempDir()
	for i := range images {
		s := seed*1000 + uint64(i)
		ops := generateOps(c, s, nOps*(i+1)/images-nOps*i/images)
		stats, err := runModel(c, s, ops, dir, judge)
		if err != nil {
			reportModel(t, c, s, ops, err)
			return total
		}
		total.add(stats)
	}
	if total.tables < 8 && nOps/images >= 100 {
		t.Errorf("%v: only %d L2 tables in an image", c, total.tables)
	}
	return total
}

// qemuJudge has qemu-img check the image, and compare it with a raw file of the content.
func qemuJudge(t *testing.T, path string, content *sparseBytes) error {
	if r := qemutest.Check(t, path); !r.Clean() {
		return fmt.Errorf("qemu-img check: %s", r.Output)
	}
	raw, err := os.Create(path + ".content")
	if err != nil {
		return err
	}
	defer os.Remove(raw.Name())
	defer raw.Close()
	if err := raw.Truncate(content.size); err != nil {
		return err
	}
	for i, page := range content.pages {
		if _, err := raw.WriteAt(page[:min(modelPage, content.size-i*modelPage)], i*modelPage); err != nil {
			return err
		}
	}
	if out, exit := qemutest.ImgExit(t, "compare", "-f", "qcow2", "-F", "raw", path, raw.Name()); exit != 0 {
		return fmt.Errorf("qemu-img compare: exit code %d: %s", exit, out)
	}
	return nil
}

// lookQemu reports whether qemu-img is there to judge, or must be, so that its absence is a failure.
var lookQemu = sync.OnceValue(func() bool {
	if os.Getenv("QCOW2_REQUIRE_QEMU") == "1" {
		return true
	}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		if _, err := os.Stat(filepath.Join(dir, "qemu-img")); err == nil {
			return true
		}
	}
	return false
})

// reportModel shrinks a failing list of operations, writes it to a file and says how to repeat it.
func reportModel(t *testing.T, c workloadConfig, seed uint64, ops []op, failure error) {
	t.Helper()
	var mf *modelFailure
	if errors.As(failure, &mf) {
		ops = ops[:min(mf.at+1, len(ops))]
	}
	last := failure
	// Shrinking ends by itself, or after about a minute.
	end := time.Now().Add(time.Minute)
	short := shrinkOps(ops, 400, func(ops []op) bool {
		if time.Now().After(end) {
			return false
		}
		_, err := runModel(c, seed, ops, t.TempDir(), nil)
		if err != nil {
			last = err
		}
		return err != nil
	})
	dir := os.Getenv("QCOW2_KEEP_DIR")
	if dir == "" {
		dir = os.TempDir()
	}
	path := filepath.Join(dir, fmt.Sprintf("model-%d.txt", seed))
	text := fmt.Sprintf("# %v seed=%d\n# %s\n%s", c, seed, strings.ReplaceAll(last.Error(), "\n", "\n# "), formatOps(short))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Error(err)
	}
	tail := short[max(len(short)-20, 0):]
	t.Errorf("%v\nseed %d: %v\nshrunk to %d operations: %v\nthe last ones:\n%s\nrepeat it by\n\tgo test -run TestModelReplay . -args -model.config='%v' -model.seed=%d -model.file=%s",
		c, seed, failure, len(short), last, formatOps(tail), c, seed, path)
}

// TestModelReplay runs a list of operations from a file.
func TestModelReplay(t *testing.T) {
	if *modelFile == "" {
		t.Skip("-model.file is not given")
	}
	c, err := parseConfig(*modelConfig)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(*modelFile)
	if err != nil {
		t.Fatal(err)
	}
	ops, err := parseOps(string(text))
	if err != nil {
		t.Fatal(err)
	}
	stats, err := runModel(c, *modelSeed, ops, t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", stats)
}

// checkShares fails the test unless the run had the shares of operations that were asked for.
func checkShares(t *testing.T, c workloadConfig, s modelStats) {
	t.Helper()
	busy, share := s.allocating, 40
	if c.external() {
		share = 20 // without compressed clusters and snapshots, most writes find their clusters mapped
	}
	if c.layout == layoutRawData {
		busy = s.writes // all of a raw data file is mapped from the beginning
	}
	if busy*100 < share*s.ops {
		t.Errorf("%v: %d of %d operations allocate or rewrite: below %d %%", c, busy, s.ops, share)
	}
	if !c.external() && s.packed*100 < 10*s.ops {
		t.Errorf("%v: %d of %d operations are WriteCompressed: below 10 %%", c, s.packed, s.ops)
	}
	if s.syncs*100 < 5*s.ops || s.reopens*100 < s.ops {
		t.Errorf("%v: %d syncs and %d reopens in %d operations: below 5 %% and 1 %%", c, s.syncs, s.reopens, s.ops)
	}
}

// modelShare is the number of operations of a configuration from which on their shares are checked; those
// of fewer vary too much.
const modelShare = 1000

// runModels runs the configurations on all processors and returns the sums.
func runModels(t *testing.T, configs []workloadConfig, seed uint64, nOps func(workloadConfig) int) modelStats {
	var total modelStats
	var mu sync.Mutex
	var next atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for range runtime.GOMAXPROCS(0) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				i := int(next.Add(1)) - 1
				if i >= len(configs) || t.Failed() {
					return
				}
				n := nOps(configs[i])
				s := runConfig(t, configs[i], seed*1000+uint64(i), n)
				if !t.Failed() && n >= modelShare {
					checkShares(t, configs[i], s)
				}
				mu.Lock()
				total.add(s)
				if n >= modelShare && i%10 == 0 {
					t.Logf("%d of %d configurations, %d operations, %v", i+1, len(configs), total.ops, time.Since(begin).Round(time.Second))
				}
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	return total
}

// TestModel runs a slice of the campaign: every configuration for a moment, fewer operations where
// clusters are large.
func TestModel(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	all := workloadConfigs()
	// Every third one, so that each value of each option comes up with others.
	var configs []workloadConfig
	for i := int(*modelSeed) % 3; i < len(all); i += 3 {
		configs = append(configs, all[i])
	}
	s := runModels(t, configs, *modelSeed, func(c workloadConfig) int {
		switch c.clusterSize {
		case 2 << 20:
			return 25
		case 64 << 10:
			return 120
		}
		return 300
	})
	t.Logf("%d of %d configurations: %+v", len(configs), len(all), s)
	if s.packed == 0 || s.compressedFound == 0 || s.reopens == 0 || s.amends == 0 || lookQemu() && s.judged == 0 {
		t.Errorf("the slice has no compressed writes, reopens, amends or looks of QEMU: %+v", s)
	}
}

// TestModelCampaign runs all configurations for as many operations as -model.ops says.
func TestModelCampaign(t *testing.T) {
	if *modelOps == 0 {
		t.Skip("-model.ops is not given")
	}
	configs := workloadConfigs()
	// A configuration with clusters of 2 MiB, of which an operation takes longest, has a tenth of the others'.
	weight := func(c workloadConfig) int {
		if c.clusterSize == 2<<20 {
			return 1
		}
		return 10
	}
	weights := 0
	for _, c := range configs {
		weights += weight(c)
	}
	unit := max((*modelOps+weights-1)/weights, 300)
	begin := time.Now()
	s := runModels(t, configs, *modelSeed, func(c workloadConfig) int { return unit * weight(c) })
	t.Logf("%d configurations, %d or %d operations each, in %v: %+v", len(configs), unit, 10*unit, time.Since(begin).Round(time.Second), s)
	if !t.Failed() && s.ops < *modelOps {
		t.Errorf("%d operations instead of %d", s.ops, *modelOps)
	}
}

// TestModelSeesDamage shows that the runner finds a byte that the storage lost, and shrinks the operations
// to the few that need it.
func TestModelSeesDamage(t *testing.T) {
	c, err := parseConfig("cluster=4096 layout=plain storage=memory")
	if err != nil {
		t.Fatal(err)
	}
	ops := generateOps(c, 1, 100)
	run := func(ops []op) error {
		f, err := newModelFiles(c, 1, "")
		if err != nil {
			return err
		}
		f.image = &lossyStorage{Storage: f.image, from: 32 << 12}
		_, err = runModelOn(c, f, ops, nil)
		return err
	}
	if run(ops) == nil {
		t.Fatal("a storage that loses bytes was not noticed")
	}
	short := shrinkOps(ops, 1000, func(ops []op) bool { return run(ops) != nil })
	if len(short) == 0 || len(short) > 20 {
		t.Errorf("shrunk to %d operations", len(short))
	}
	if err := run(short); err == nil {
		t.Error("the shrunk operations do not fail")
	}
	back, err := parseOps(formatOps(short))
	if err != nil || formatOps(back) != formatOps(short) {
		t.Errorf("the operations do not survive as text: %v", err)
	}
}

// lossyStorage is a storage that flips a bit of the last byte of each write that begins at from or later.
type lossyStorage struct {
	Storage
	from int64
}

// WriteAt implements Storage.
func (s *lossyStorage) WriteAt(p []byte, off int64) (int, error) {
	if off < s.from || len(p) == 0 {
		return s.Storage.WriteAt(p, off)
	}
	bad := append([]byte(nil), p...)
	bad[len(bad)-1] ^= 1
	return s.Storage.WriteAt(bad, off)
}

// TestWorkloadText parses what it formats.
func TestWorkloadText(t *testing.T) {
	for _, c := range workloadConfigs() {
		if got, err := parseConfig(c.String()); err != nil || got != c {
			t.Fatalf("%v: %v, %v", c, got, err)
		}
		ops := generateOps(c, 7, 50)
		got, err := parseOps(formatOps(ops))
		if err != nil || formatOps(got) != formatOps(ops) {
			t.Fatalf("%v: %v", c, err)
		}
	}
	for _, bad := range []string{"", "write 1 2", "sync 1", "jump", "read x 1", "writec 0x0 512 -1"} {
		if _, err := parseOp(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
