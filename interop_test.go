package qcow2_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// The size of the matrix: the legal combinations of interopCases and those left out. Each legal one runs in
// both directions.
const (
	interopLegal   = 400
	interopLeftOut = 552
)

// interopEnv is what the combinations share, read-only: a directory with patterns and backing files.
type interopEnv struct {
	dir     string
	backing map[string]interopBacking // by file name
}

// interopBacking is a backing file.
type interopBacking struct {
	file, format string
	content      []byte // what it reads as
}

// patternFile returns the name of the file that qemu-io repeats for a pattern.
func (e *interopEnv) patternFile(pattern int) string {
	return filepath.Join(e.dir, fmt.Sprintf("pattern%d", pattern))
}

// backingName returns the name of the backing file of a combination, in the directory of the environment.
func backingName(c interopCase) string {
	return fmt.Sprintf("%s-%d", c.backing, c.clusterSize)
}

// newInteropEnv makes the shared files: patterns, and a backing file of each kind for every disk size.
func newInteropEnv(t *testing.T, cases []interopCase) *interopEnv {
	t.Helper()
	e := &interopEnv{dir: t.TempDir(), backing: make(map[string]interopBacking)}
	for i := range interopPatterns {
		for _, i := range []int{i, i + noisyPattern} {
			if err := os.WriteFile(e.patternFile(i), interopPeriods[i], 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range cases {
		name := backingName(c)
		if _, ok := e.backing[name]; c.backing == "" || ok {
			continue
		}
		size, _ := c.layout()
		b := interopBacking{file: name, format: "qcow2"}
		switch c.backing {
		case "raw":
			b.format = "raw"
		case "short":
			// It ends inside a cluster and inside a sector.
			b.format, size = "raw", size/2+1000
		case "long":
			size += 3*c.clusterSize + 512
		}
		// Data and holes take turns, out of step with the slots.
		b.content = make([]byte, size)
		step := size/11/512*512 + 512
		for off := int64(0); off < size; off += step {
			n := min(step*2/3/512*512, size-off)
			interopOp{pattern: interopPatterns - 1}.fill(b.content[off:][:n])
		}
		path := filepath.Join(e.dir, name)
		if b.format == "qcow2" {
			raw := path + ".raw"
			if err := os.WriteFile(raw, b.content, 0o600); err != nil {
				t.Fatal(err)
			}
			qemutest.Img(t, "convert", "-f", "raw", "-O", "qcow2", raw, path)
			if err := os.Remove(raw); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, b.content, 0o600); err != nil {
			t.Fatal(err)
		}
		e.backing[name] = b
	}
	return e
}

// TestInteropMatrix runs a third of the legal combinations of cluster size, version, refcount width and kind of image
// in one of two directions: QEMU makes the image and we read it, write over it, and QEMU judges; or we make the
// image, QEMU adds zeros and discards, we write over it, and QEMU judges. Which ones, is as good as random, and always
// the same;
//
//	QCOW2_INTEROP_ALL=1 go test -run TestInteropMatrix .
//
// runs all of them in both.
func TestInteropMatrix(t *testing.T) {
	qemutest.Require(t)
	cases, left := interopCases()
	out := 0
	for why, n := range left {
		t.Logf("left out %d: %s", n, why)
		out += n
	}
	if len(cases) != interopLegal || out != interopLeftOut {
		t.Errorf("%d legal combinations and %d left out, want %d and %d", len(cases), out, interopLegal, interopLeftOut)
	}
	env := newInteropEnv(t, cases)
	var ran [2]atomic.Int64
	stride := 1
	if testing.Short() {
		stride = 9
	}
	both := os.Getenv("QCOW2_INTEROP_ALL") != ""
	coin := rand.New(rand.NewPCG(1, 1))
	var want [2]int64
	t.Run("all", func(t *testing.T) {
		for i := 0; i < len(cases); i += stride {
			c, side := cases[i], coin.IntN(6)
			directions := [2]bool{both || side == 0, both || side == 1}
			for k, d := range directions {
				if d {
					want[k]++
				}
			}
			t.Run(c.String(), func(t *testing.T) {
				t.Parallel()
				if directions[0] {
					newInteropRun(t, env, c, "a").fromQEMU()
					ran[0].Add(1)
				}
				if directions[1] {
					newInteropRun(t, env, c, "b").fromUs()
					ran[1].Add(1)
				}
			})
		}
	})
	t.Logf("ran %d combinations from QEMU to us and back, %d from us to QEMU and back; %d of %d left out as illegal",
		ran[0].Load(), ran[1].Load(), out, out+len(cases))
	if selected := strings.Contains(flag.Lookup("test.run").Value.String(), "/"); !selected && !t.Failed() &&
		(ran[0].Load() != want[0] || ran[1].Load() != want[1]) {
		t.Errorf("ran %d and %d combinations, want %d", ran[0].Load(), ran[1].Load(), want)
	}
}

// interopRun is one combination in one direction.
type interopRun struct {
	*testing.T
	interopCase
	env       *interopEnv
	path      string // of the image
	dataPath  string // of its data file, if it has one
	rawPath   string // where qemu-img converts to
	slots     []interopSlot
	m         *interopModel
	snapshots []*interopModel // as QEMU made them: s1, s2
	pattern   int             // of the next write
	scratch   []byte          // what is being written
	rng       *rand.Rand
}

// newInteropRun returns a run whose image, not made yet, has the given name beside the shared files.
func newInteropRun(t *testing.T, env *interopEnv, c interopCase, direction string) *interopRun {
	t.Helper()
	name := fmt.Sprintf("%s-%d.qcow2", direction, c.index)
	r := &interopRun{T: t, interopCase: c, env: env, path: filepath.Join(env.dir, name), rng: rand.New(rand.NewPCG(uint64(c.index), 1))}
	r.rawPath = r.path + ".raw"
	_, r.slots = c.layout()
	r.m = newInteropModel(c, env.backing[backingName(c)].content, direction == "a")
	if c.data {
		r.dataPath = r.path + ".data"
	}
	// The cleanup must not hold r: package testing keeps cleanups, and with them the disks of all models, until
	// the last of the parallel tests has ended.
	paths := []string{r.path, r.rawPath}
	if r.dataPath != "" {
		paths = append(paths, r.dataPath)
	}
	t.Cleanup(func() {
		for _, p := range paths {
			os.Remove(p)
		}
	})
	qemutest.Dump(t, r.path, r.rawPath, r.path+".data")
	return r
}

// fromQEMU is the direction in which QEMU makes the image.
func (r *interopRun) fromQEMU() {
	r.Helper()
	r.createByQEMU()
	r.byQEMU(append(r.baseOps(), r.markOps()...))
	r.takeSnapshot(1)
	r.byQEMU(r.betweenOps())
	r.takeSnapshot(2)
	r.expectInfo()
	r.expectRaw("as QEMU made it", r.m)
	r.expectRead("as QEMU made it", true)
	r.byUs(r.overOps())
	r.judge("written over by us")
	r.judgeSnapshots()
}

// fromUs is the direction in which we make the image.
func (r *interopRun) fromUs() {
	r.Helper()
	img := r.createByUs()
	r.write(img, r.baseOps())
	r.close(img)
	if r.dataPath != "" {
		// QEMU may pad a data file, we do not.
		if fi, err := os.Stat(r.dataPath); err != nil || fi.Size() != int64(len(r.m.data)) {
			r.Errorf("data file: %v, or not %d bytes long: %v", err, len(r.m.data), fi)
		}
	}
	r.expectInfo()
	r.takeSnapshot(1)
	r.byQEMU(append(r.markOps(), r.betweenOps()...))
	r.takeSnapshot(2)
	r.expectRead("after QEMU added to it", true)
	r.byUs(r.overOps())
	r.judge("written over by us")
	r.judgeSnapshots()
}

// nextPattern returns the pattern of the next write. The last one is the backing files'.
func (r *interopRun) nextPattern() int {
	r.pattern++
	p := r.pattern % (interopPatterns - 1)
	if r.clusterSize < 2<<20 {
		p += noisyPattern
	}
	return p
}

// part returns an odd range in the middle of a slot.
func (s interopSlot) part() (off, n int64) {
	return s.off + s.n/3, s.n/2 + 17
}

// baseOps returns the writes that the slots' roles begin with.
func (r *interopRun) baseOps() []interopOp {
	var ops []interopOp
	compressed := 0
	for _, s := range r.slots {
		o := interopOp{kind: opWrite, off: s.off, n: s.n, pattern: r.nextPattern()}
		switch s.role {
		case rolePartial:
			o.off, o.n = s.part()
		case roleUnallocated, roleZeroFresh:
			continue
		case roleCompressed:
			if compressed < r.maxCompressed() {
				o.kind = opCompressed
				compressed++
			}
		case roleData:
			if r.clusterSize <= 4<<10 && s.n == r.clusterSize {
				// Several clusters in one write, across the end of an L2 table for some.
				ops = append(ops, interopOp{kind: opWrite, off: s.off + 8*s.n + s.n/2, n: 6*s.n + 100, pattern: r.nextPattern()})
			}
		}
		ops = append(ops, o)
	}
	return compressedLast(ops)
}

// compressedLast moves compressed writes to the end, where nothing else takes the host clusters behind a
// payload, so that the next one may straddle two of them.
func compressedLast(ops []interopOp) []interopOp {
	slices.SortStableFunc(ops, func(a, b interopOp) int {
		switch {
		case a.kind != opCompressed && b.kind == opCompressed:
			return -1
		case a.kind == opCompressed && b.kind != opCompressed:
			return 1
		}
		return 0
	})
	return ops
}

// markOps returns the zeroing and discarding that completes the slots' roles. QEMU does it in both
// directions.
func (r *interopRun) markOps() []interopOp {
	var ops []interopOp
	for _, s := range r.slots {
		o := interopOp{off: s.off, n: s.n}
		switch s.role {
		case roleZeroPlain:
			o.kind = opZeroUnmap
		case roleZeroFresh, roleZeroAlloc:
			o.kind = opZero
		case roleDiscarded:
			o.kind = opDiscard
		default:
			continue
		}
		ops = append(ops, o)
	}
	return ops
}

// betweenOps returns what QEMU writes between two snapshots: over a whole cluster of each role that is
// written in part later.
func (r *interopRun) betweenOps() []interopOp {
	if !r.interopCase.snapshots {
		return nil
	}
	var ops []interopOp
	for _, s := range r.slots {
		if s.over == overPartial && (s.role == roleData || s.role == roleZeroPlain) {
			ops = append(ops, interopOp{kind: opWrite, off: s.off, n: s.n, pattern: r.nextPattern()})
		}
	}
	return ops
}

// overOps returns what we write over the slots.
func (r *interopRun) overOps() []interopOp {
	var ops []interopOp
	for _, s := range r.slots {
		o := interopOp{kind: opWrite, off: s.off, n: s.n, pattern: r.nextPattern()}
		switch s.over {
		case overKeep:
			continue
		case overPartial:
			o.off, o.n = s.part()
		case overCompressed:
			o.kind = opCompressed
		}
		ops = append(ops, o)
		if s.role == roleData && r.clusterSize <= 4<<10 && s.n == r.clusterSize {
			ops = append(ops, interopOp{kind: opWrite, off: s.off + 6*s.n + 7, n: 5 * s.n, pattern: r.nextPattern()})
		}
	}
	return compressedLast(ops)
}

// createByQEMU makes the image with qemu-img create.
func (r *interopRun) createByQEMU() {
	r.Helper()
	compat := "1.1"
	if r.version == 2 {
		compat = "0.10"
	}
	opts := []string{
		"compat=" + compat,
		fmt.Sprintf("cluster_size=%d", r.clusterSize),
		fmt.Sprintf("refcount_bits=%d", r.refcountBits),
	}
	if r.extended {
		opts = append(opts, "extended_l2=on")
	}
	if r.compression != "" {
		opts = append(opts, "compression_type="+r.compression)
	}
	if r.interopCase.data {
		opts = append(opts, "data_file="+r.dataPath)
	}
	if r.raw {
		opts = append(opts, "data_file_raw=on")
	}
	args := []string{"create", "-q", "-f", "qcow2", "-o", strings.Join(opts, ",")}
	if r.backing != "" {
		b := r.env.backing[backingName(r.interopCase)]
		args = append(args, "-b", b.file, "-F", b.format)
	}
	qemutest.Img(r.T, append(args, r.path, fmt.Sprint(len(r.m.data)))...)
}

// options returns how we open the image.
func (r *interopRun) options(write bool) *qcow2.OpenOptions {
	// The name of the data file is absolute in the images, which ResolveBeside would refuse.
	beside := qcow2.ResolveBeside(r.env.dir)
	o := &qcow2.OpenOptions{ReadWrite: write, NoSync: true, Resolver: qcow2.ResolverFunc(func(ref qcow2.FileRef) (qcow2.Storage, error) {
		if ref.Kind == qcow2.KindData {
			ref.Name = filepath.Base(ref.Name)
		}
		return beside.Resolve(ref)
	})}
	if r.index%2 == 1 {
		o.L2CacheBytes, o.RefcountCacheBytes = 1, 1 // the least there is
	}
	return o
}

// createByUs makes the image with Create.
func (r *interopRun) createByUs() *qcow2.Image {
	r.Helper()
	opts := r.createOptions()
	opts.Open = r.options(true)
	if r.dataPath != "" {
		opts.DataFile = r.dataPath // QEMU takes a relative name from its working directory
		if err := os.WriteFile(r.dataPath, nil, 0o600); err != nil {
			r.Fatal(err)
		}
	}
	if r.backing != "" {
		b := r.env.backing[backingName(r.interopCase)]
		opts.BackingFile, opts.BackingFormat = b.file, b.format
	}
	img, err := qcow2.Create(r.path, int64(len(r.m.data)), opts)
	if err != nil {
		r.Fatal(err)
	}
	return img
}

// createOptions returns the combination as options of Create, but for the other files.
func (c interopCase) createOptions() *qcow2.CreateOptions {
	opts := &qcow2.CreateOptions{
		Version: c.version, ClusterSize: int(c.clusterSize), RefcountBits: c.refcountBits,
		ExtendedL2: c.extended, DataFileRaw: c.raw,
	}
	if c.compression == "zstd" {
		opts.Compression = qcow2.CompressionZstd
	}
	return opts
}

// byQEMU does the operations with one run of qemu-io.
func (r *interopRun) byQEMU(ops []interopOp) {
	r.Helper()
	if len(ops) == 0 {
		return
	}
	var cmds []string
	for _, o := range ops {
		at := fmt.Sprintf("%d %d", o.off, o.n)
		switch o.kind {
		case opWrite:
			cmds = append(cmds, fmt.Sprintf("write -q -s %s %s", r.env.patternFile(o.pattern), at))
		case opCompressed:
			cmds = append(cmds, fmt.Sprintf("write -q -c -s %s %s", r.env.patternFile(o.pattern), at))
		case opZero:
			cmds = append(cmds, "write -q -z "+at)
		case opZeroUnmap:
			cmds = append(cmds, "write -q -z -u "+at)
		case opDiscard:
			cmds = append(cmds, "discard -q "+at)
		}
		r.m.apply(o)
	}
	qemutest.IOWith(r.T, qemutest.IOOptions{Cache: "unsafe"}, r.path, cmds...)
}

// byUs opens the image, does the operations, looks at it and closes it.
func (r *interopRun) byUs(ops []interopOp) {
	r.Helper()
	img, err := qcow2.Open(r.path, r.options(true))
	if err != nil {
		r.Fatal(err)
	}
	r.write(img, ops)
	r.expectDisk("before Close", img)
	r.close(img)
}

// write does the operations on an open image.
func (r *interopRun) write(img *qcow2.Image, ops []interopOp) {
	r.Helper()
	for _, o := range ops {
		// Not a part of the model, which the library must have no way to change.
		r.scratch = slices.Grow(r.scratch[:0], int(o.n))[:o.n]
		o.fill(r.scratch)
		if o.kind == opCompressed {
			err := img.WriteCompressed(r.scratch, o.off)
			switch {
			case !r.interopCase.data && err != nil:
				r.Fatal(err)
			case r.interopCase.data && !errors.Is(err, qcow2.ErrUnsupported):
				r.Fatalf("WriteCompressed with a data file: %v, want ErrUnsupported", err)
			case r.interopCase.data:
				o.kind = opWrite
			}
		}
		if o.kind == opWrite {
			if _, err := img.WriteAt(r.scratch, o.off); err != nil {
				r.Fatal(err)
			}
		}
		r.m.apply(o)
	}
}

// close closes the image.
func (r *interopRun) close(img *qcow2.Image) {
	r.Helper()
	if err := img.Close(); err != nil {
		r.Fatal(err)
	}
}

// takeSnapshot has QEMU make snapshot n, if the combination has so many.
func (r *interopRun) takeSnapshot(n int) {
	r.Helper()
	if n > r.snapshotCount() {
		return
	}
	qemutest.Img(r.T, "snapshot", "-q", "-c", fmt.Sprintf("s%d", n), r.path)
	r.snapshots = append(r.snapshots, r.m.clone())
}

// expectRead opens the image for reading and compares all of it with the model. With roles, every role has
// been played, and the image must hold what that makes.
func (r *interopRun) expectRead(when string, roles bool) {
	r.Helper()
	img, err := qcow2.Open(r.path, r.options(false))
	if err != nil {
		r.Fatalf("%s: %v", when, err)
	}
	got := r.expectDisk(when, img)
	if want := r.m.wantTally(); roles && got != want {
		r.Errorf("%s: the image does not hold all kinds of clusters (-want +got):\n%s", when, cmp.Diff(want, got))
	}
	r.close(img)
}

// interopBuffers holds *[]byte for whole disks.
var interopBuffers sync.Pool

// expectDisk compares an open image with the model: content as a whole and at random offsets, extents, and
// the end of the disk.
func (r *interopRun) expectDisk(when string, img *qcow2.Image) interopTally {
	r.Helper()
	if img.Size() != int64(len(r.m.data)) {
		r.Fatalf("%s: size %d, want %d", when, img.Size(), len(r.m.data))
	}
	pooled, ok := interopBuffers.Get().(*[]byte)
	if !ok {
		pooled = new([]byte)
	}
	defer interopBuffers.Put(pooled)
	*pooled = slices.Grow((*pooled)[:0], len(r.m.data)+1)
	got := (*pooled)[:len(r.m.data)+1]
	if n, err := img.ReadAt(got, 0); n != len(r.m.data) || err != io.EOF {
		r.Fatalf("%s: ReadAt past the end: %d, %v, want %d, EOF", when, n, err, len(r.m.data))
	}
	r.expectBytes(when, got[:len(r.m.data)], 0, r.m)
	for range 32 {
		off := r.rng.Int64N(int64(len(r.m.data)))
		n := min(1+r.rng.Int64N(min(3*r.clusterSize, 100<<10)), int64(len(r.m.data))-off)
		if _, err := img.ReadAt(got[:n], off); err != nil {
			r.Fatalf("%s: %v", when, err)
		}
		if !bytes.Equal(got[:n], r.m.data[off:off+n]) {
			r.Errorf("%s: read %d bytes at %#x: not what is expected", when, n, off)
		}
	}
	tally, err := r.m.expectExtents(img)
	if err != nil {
		r.Errorf("%s: %v", when, err)
	}
	return tally
}

// expectBytes compares bytes of a disk, from off on, with a model. A difference ends the test.
func (r *interopRun) expectBytes(when string, got []byte, off int, m *interopModel) {
	r.Helper()
	want := m.data[off:][:len(got)]
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for got[i] == want[i] {
		i++
	}
	var in interopSlot
	for _, s := range r.slots {
		if s.off <= int64(off+i) {
			in = s
		}
	}
	end := min(i+16, len(got))
	r.Fatalf("%s: at guest %#x (cluster %#x, last slot before it %+v): %x, want %x",
		when, off+i, int64(off+i)/r.clusterSize, in, got[i:end], want[i:end])
}

// expectFile compares a raw file with a model; it may go on with zeros.
func (r *interopRun) expectFile(when, path string, m *interopModel) {
	r.Helper()
	f, err := os.Open(path)
	if err != nil {
		r.Fatal(err)
	}
	defer f.Close()
	r.scratch = slices.Grow(r.scratch[:0], 256<<10)
	buf := r.scratch[:256<<10]
	off := 0
	for {
		n, err := io.ReadFull(f, buf)
		inside := min(n, len(m.data)-off)
		r.expectBytes(when, buf[:inside], off, m)
		if i := slices.IndexFunc(buf[inside:n], func(b byte) bool { return b != 0 }); i >= 0 {
			r.Fatalf("%s: byte %d behind the end of the disk is not zero", when, off+inside+i-len(m.data))
		}
		off += inside
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			r.Fatal(err)
		}
	}
	if off != len(m.data) {
		r.Fatalf("%s: %d bytes, want %d", when, off, len(m.data))
	}
}

// expectRaw compares what qemu-img convert makes of the image with a model.
func (r *interopRun) expectRaw(when string, m *interopModel, args ...string) {
	r.Helper()
	all := append([]string{"convert", "-f", "qcow2", "-O", "raw"}, args...)
	qemutest.Img(r.T, append(all, r.path, r.rawPath)...)
	r.expectFile("qemu-img convert, "+when, r.rawPath, m)
}

// judge has QEMU check the image and read it, reads it once more, and looks at a raw data file.
func (r *interopRun) judge(when string) {
	r.Helper()
	check := qemutest.Check(r.T, r.path)
	if !check.Clean() {
		r.Errorf("%s: qemu-img check: exit %d\n%s", when, check.Exit, check.Output)
	}
	if want := r.m.compressedClusters(); check.CompressedClusters != want {
		r.Errorf("%s: qemu-img check counts %d compressed clusters, want %d", when, check.CompressedClusters, want)
	}
	r.expectRaw(when, r.m)
	r.expectRead(when, false)
	if r.raw {
		r.expectFile(when+", raw data file", r.dataPath, r.m)
	}
	if r.refcountBits == 16 {
		r.expectMap(when)
	}
}

// expectMap compares the host offsets of qemu-img map with those of Extents.
func (r *interopRun) expectMap(when string) {
	r.Helper()
	type run struct {
		Off, HostOff, Len int64
		Data              bool
	}
	// Runs that go on are one, as their cutting is nobody's promise.
	add := func(runs []run, x run) []run {
		if n := len(runs) - 1; n >= 0 {
			last := &runs[n]
			follows := x.Off == last.Off+last.Len && x.Data == last.Data
			if follows && (x.HostOff < 0 && last.HostOff < 0 || last.HostOff >= 0 && x.HostOff == last.HostOff+last.Len) {
				last.Len += x.Len
				return runs
			}
		}
		return append(runs, x)
	}
	img, err := qcow2.Open(r.path, r.options(false))
	if err != nil {
		r.Fatal(err)
	}
	defer r.close(img)
	var got, want []run
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			r.Fatal(err)
		}
		if e.Depth > 0 || e.Kind == qcow2.ExtentUnallocated {
			continue
		}
		got = add(got, run{e.Off, e.HostOff, e.Len, e.Kind == qcow2.ExtentData || e.Kind == qcow2.ExtentCompressed || e.Hole})
	}
	for _, e := range qemutest.Map(r.T, r.path) {
		if e.Depth > 0 || !e.Present {
			continue
		}
		x := run{e.Start, -1, e.Length, e.Data}
		if e.Offset != nil {
			x.HostOff = *e.Offset
		}
		want = add(want, x)
	}
	if d := cmp.Diff(want, got); d != "" {
		r.Errorf("%s: extents differ from qemu-img map (-want +got):\n%s", when, d)
	}
}

// judgeSnapshots has QEMU read every snapshot, apply it, and read the disk; we write beside the snapshot
// once more, and QEMU judges again.
func (r *interopRun) judgeSnapshots() {
	r.Helper()
	for i, s := range r.snapshots {
		r.expectRaw(fmt.Sprintf("snapshot s%d", i+1), s, "-l", fmt.Sprintf("snapshot.name=s%d", i+1))
	}
	for i, s := range r.snapshots {
		when := fmt.Sprintf("snapshot s%d applied", i+1)
		qemutest.Img(r.T, "snapshot", "-q", "-a", fmt.Sprintf("s%d", i+1), r.path)
		r.m = s.clone()
		r.judge(when)
		r.byUs(r.overOps())
		r.judge(when + " and written over")
	}
	for i, s := range r.snapshots {
		r.expectRaw(fmt.Sprintf("snapshot s%d at the end", i+1), s, "-l", fmt.Sprintf("snapshot.name=s%d", i+1))
	}
}

// expectInfo compares Info and Inspect with qemu-img info over the keys of qemuInfo.
func (r *interopRun) expectInfo() {
	r.Helper()
	expectInfo(r.T, r.path, r.options(false))
}

// infoKeys are the keys of qemu-img info --output=json that Info is compared by; those with a dot are of
// format-specific. A list counts as its length.
var infoKeys = []string{
	"virtual-size", "cluster-size", "dirty-flag", "backing-filename", "backing-filename-format", "snapshots",
	"data.compat", "data.compression-type", "data.lazy-refcounts", "data.refcount-bits", "data.corrupt",
	"data.extended-l2", "data.data-file", "data.data-file-raw", "data.bitmaps",
}

// qemuInfo returns what qemu-img info says under infoKeys; a missing key is nil.
func qemuInfo(t *testing.T, path string) map[string]any {
	t.Helper()
	all := qemutest.Info(t, path)
	special, ok := all["format-specific"].(map[string]any)["data"].(map[string]any)
	if !ok {
		t.Fatalf("qemu-img info %s: no format-specific data: %v", path, all)
	}
	out := make(map[string]any)
	for _, key := range infoKeys {
		v, ok := all[key]
		if name, in := strings.CutPrefix(key, "data."); in {
			v, ok = special[name]
		}
		if list, is := v.([]any); is {
			v = json.Number(fmt.Sprint(len(list)))
		}
		if ok {
			out[key] = v
		}
	}
	return out
}

// asQEMUInfo returns an Info as qemu-img info shows it, under infoKeys.
func asQEMUInfo(info *qcow2.Info) map[string]any {
	number := func(n int64) json.Number { return json.Number(fmt.Sprint(n)) }
	out := map[string]any{
		"virtual-size":          number(info.VirtualSize),
		"cluster-size":          number(int64(info.ClusterSize)),
		"dirty-flag":            info.Dirty,
		"data.compression-type": info.Compression.String(),
		"data.refcount-bits":    number(int64(info.RefcountBits)),
		"data.compat":           "0.10",
	}
	if info.Version == 3 {
		out["data.compat"] = "1.1"
		out["data.lazy-refcounts"] = info.LazyRefcounts
		out["data.corrupt"] = info.Corrupt
		out["data.extended-l2"] = info.ExtendedL2
	}
	if info.BackingFile != "" {
		out["backing-filename"] = info.BackingFile
		out["backing-filename-format"] = info.BackingFormat
	}
	if info.NeedsDataFile {
		out["data.data-file"] = info.DataFile
		out["data.data-file-raw"] = info.DataFileRaw
	}
	if info.SnapshotCount > 0 {
		out["snapshots"] = number(int64(info.SnapshotCount))
	}
	if info.BitmapCount > 0 {
		out["data.bitmaps"] = number(int64(info.BitmapCount))
	}
	return out
}

// expectInfo compares Inspect with qemu-img info, and Info of the open image with Inspect and, as to where the
// clusters in use end, with qemu-img check.
func expectInfo(t *testing.T, path string, opts *qcow2.OpenOptions) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	info, err := qcow2.Inspect(f, fi.Size(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(qemuInfo(t, path), asQEMUInfo(info)); d != "" {
		t.Errorf("Inspect %s (-qemu-img info +ours):\n%s", path, d)
	}
	img, err := qcow2.Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	open := img.Info()
	open.Locked = info.Locked
	want := *info
	want.EndOffset = qemutest.Check(t, path).ImageEndOffset
	if d := cmp.Diff(want, open); d != "" {
		t.Errorf("Info of the open image (-Inspect and qemu-img check, +Info):\n%s", d)
	}
}
