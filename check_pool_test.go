package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// filePage is the unit in bytes in which a pagedFile shares its content.
const filePage = 4096

// pagedFile is the content of a sparse file. Clones share pages, so that a damaged copy of an image costs what
// was damaged. It is an io.ReaderAt.
type pagedFile struct {
	size  int64
	pages map[int64]*[filePage]byte // by index; immutable once shared, zeros where there is none
}

// readPagedFile returns the content of a file.
func readPagedFile(path string) (*pagedFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &pagedFile{pages: make(map[int64]*[filePage]byte)}
	buf := make([]byte, 256*filePage)
	for {
		n, err := io.ReadFull(f, buf)
		p.write(buf[:n], p.size)
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return p, nil
		default:
			return nil, err
		}
	}
}

// clone returns a copy that may be changed.
func (f *pagedFile) clone() *pagedFile { return &pagedFile{f.size, maps.Clone(f.pages)} }

// ReadAt implements io.ReaderAt.
func (f *pagedFile) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), f.size-off))
	for done := 0; done < n; {
		i, in := (off+int64(done))/filePage, (off+int64(done))%filePage
		part := p[done:min(n, done+int(filePage-in))]
		if page := f.pages[i]; page != nil {
			copy(part, page[in:])
		} else {
			clear(part)
		}
		done += len(part)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// bytes returns n bytes from off, zeros past the end.
func (f *pagedFile) bytes(off, n int64) []byte {
	p := make([]byte, n)
	f.ReadAt(p, off)
	return p
}

// write writes p at off and extends the file if need be.
func (f *pagedFile) write(p []byte, off int64) {
	f.size = max(f.size, off+int64(len(p)))
	for len(p) > 0 {
		i, in := off/filePage, off%filePage
		part := p[:min(int64(len(p)), filePage-in)]
		page := f.pages[i]
		if page != nil || !allZero(part) {
			fresh := new([filePage]byte)
			if page != nil {
				*fresh = *page
			}
			copy(fresh[in:], part)
			f.pages[i] = fresh
		}
		p, off = p[len(part):], off+int64(len(part))
	}
}

// truncate sets the size; what is cut off reads as zeros if the file grows again.
func (f *pagedFile) truncate(size int64) {
	if size < f.size {
		keep := (size + filePage - 1) / filePage
		maps.DeleteFunc(f.pages, func(i int64, _ *[filePage]byte) bool { return i >= keep })
		f.size = keep * filePage
		f.write(make([]byte, keep*filePage-size), size)
	}
	f.size = size
}

// save makes path a sparse file of the content.
func (f *pagedFile) save(path string) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(f.size); err != nil {
		return err
	}
	for i, page := range f.pages {
		n := min(filePage, f.size-i*filePage)
		if _, err := out.WriteAt(page[:n], i*filePage); err != nil {
			return err
		}
	}
	return out.Close()
}

// poolSpec describes a sound image of the pool.
type poolSpec struct {
	kind        string
	byUs        bool // made, and first written, by this library; else by QEMU
	version     int
	clusterBits int
	width       int // bits of a refcount
	extended    bool
	zstd        bool
	packed      int  // compressed clusters
	external    bool // external data file
	backing     bool
	lazy        bool
	preallocate bool
	snapshots   int
	bitmaps     int
}

// String names the image.
func (s poolSpec) String() string {
	return fmt.Sprintf("%s/cluster=%d/width=%d", s.kind, 1<<s.clusterBits, s.width)
}

// Names of the files beside the images of the pool.
const (
	poolBacking = "backing.raw"
	poolData    = "data"
	poolNoise   = "noise"
)

// poolKinds are the kinds of images in the pool. Cluster size and width come in poolSpecs.
var poolKinds = []poolSpec{
	{kind: "plain", byUs: true},
	{kind: "deflate", byUs: true, packed: 9},
	{kind: "snapshots", snapshots: 2},
	{kind: "snapshots-deflate", snapshots: 2, packed: 7},
	{kind: "v2-snapshots", version: 2, snapshots: 2, packed: 3},
	{kind: "extl2", extended: true},
	{kind: "extl2-snapshots-zstd", extended: true, zstd: true, snapshots: 2, packed: 6},
	{kind: "bitmaps", bitmaps: 2},
	{kind: "bitmaps-snapshot", bitmaps: 1, snapshots: 1},
	{kind: "data", byUs: true, external: true},
	{kind: "backing", backing: true, packed: 3},
	{kind: "preallocated", preallocate: true, lazy: true},
	{kind: "zstd", byUs: true, zstd: true, packed: 8},
	{kind: "v2-backing", byUs: true, version: 2, backing: true, packed: 4},
	{kind: "extl2-data", byUs: true, extended: true, external: true},
	{kind: "extl2-backing", extended: true, backing: true, snapshots: 1},
	{kind: "ours-snapshots", byUs: true, snapshots: 2, packed: 12},
}

// poolSize is the number of images in the pool: each kind several times, each cluster size with each width.
const poolSize = 91

// poolSpecs returns the images of the pool.
func poolSpecs() []poolSpec {
	var specs []poolSpec
	for i := range poolSize {
		s := poolKinds[i%len(poolKinds)]
		s.clusterBits = minClusterBits + i%13
		s.width = 1 << (i % 7)
		specs = append(specs, s.legal())
	}
	return specs
}

// legal returns the nearest description of an image that there can be.
func (s poolSpec) legal() poolSpec {
	if s.version == 0 {
		s.version = 3
	}
	if s.version == 2 {
		s.width = 16
	}
	if s.extended && s.clusterBits < minExtL2Bits {
		s.clusterBits += maxClusterBits - minExtL2Bits - 1
	}
	switch {
	case s.width == 1:
		s.snapshots = 0
	case s.width == 2:
		s.snapshots = min(s.snapshots, 1)
	}
	if s.snapshots > 0 && s.width < 8 {
		// Payloads in one host cluster count for each snapshot, and once more while one is made.
		s.packed = min(s.packed, (1<<s.width-1)/(s.snapshots+2))
	}
	return s
}

// clusterSize returns the size of a cluster in bytes.
func (s poolSpec) clusterSize() int64 { return 1 << s.clusterBits }

// diskSize returns the size of the disk in bytes: beyond two L2 tables as long as these are small, and not a
// multiple of the cluster size.
func (s poolSpec) diskSize() int64 {
	entry := int64(8)
	if s.extended {
		entry = 16
	}
	perTable := s.clusterSize() / entry
	clusters := min(2*perTable+perTable/3, 2400)
	if s.clusterBits > 15 {
		clusters = 80
	}
	if s.clusterBits > 18 {
		clusters = 24
	}
	return clusters<<s.clusterBits - s.clusterSize()/2/sectorSize*sectorSize
}

// poolOp is one guest request: a command of qemu-io, which a library that knows no others does in part.
type poolOp struct {
	cmd    string // "write", "write -c", "write -z", "write -z -u", "discard"
	off, n int64
}

// ops returns the requests of one stage, which is 0 before the first snapshot.
func (s poolSpec) ops(stage int, rng *rand.Rand) []poolOp {
	var ops []poolOp
	cs, size := s.clusterSize(), s.diskSize()
	clusters := (size + cs - 1) / cs
	add := func(cmd string, off, n int64) {
		if n = min(n, size-off); n > 0 {
			ops = append(ops, poolOp{cmd, off, n})
		}
	}
	// Small requests in big clusters keep the files small.
	most := max(sectorSize, min(cs, 16<<10))
	place := func() int64 { return rng.Int64N(clusters) * cs }
	if stage == 0 {
		// Payloads first: a compressed write takes only clusters that are not mapped.
		first := rng.Int64N(max(1, clusters-int64(s.packed)-1)) * cs
		for i := range int64(s.packed) {
			add("write -c", first+i*cs, cs)
		}
	}
	for range 5 {
		add("write", place(), min(3*cs, most))
		add("write", place()+rng.Int64N(cs/sectorSize)*sectorSize, min(cs/2, most))
	}
	if cs <= 16<<10 {
		add("write", place(), 9*cs)
	}
	if stage == 0 {
		add("write", 0, most)
		add("write", size-sectorSize, sectorSize)
	}
	for range 2 {
		add("write -z", place(), 2*cs)
		add("write -z -u", place(), 2*cs)
		add("write -z", place()+cs/2, cs/2)
		add("discard", place(), cs)
	}
	if stage > 0 || s.byUs {
		rng.Shuffle(len(ops), func(i, j int) { ops[i], ops[j] = ops[j], ops[i] })
	}
	return slices.DeleteFunc(ops, func(o poolOp) bool {
		if o.cmd == "write -c" || s.packed == 0 || s.width >= 8 {
			return false
		}
		// Where the counts are narrow, payloads stay where they are.
		return slices.ContainsFunc(ops, func(c poolOp) bool {
			return c.cmd == "write -c" && o.off < c.off+c.n && c.off < o.off+o.n
		})
	})
}

// poolImage is a sound image of the pool. It is immutable once it is built.
type poolImage struct {
	poolSpec
	seed uint64 // of its content

	once  sync.Once
	file  *pagedFile
	data  *pagedFile // external data file, or nil
	sites *damageMap // nil: the image could not be made
}

// pool is the sound images, which are made when they are first asked for, once for all tests.
var pool = func() (images []*poolImage) {
	for i, spec := range poolSpecs() {
		images = append(images, &poolImage{poolSpec: spec, seed: uint64(i)})
	}
	return images
}()

// poolDir is a directory with the files that images of the pool name.
type poolDir string

// newPoolDir returns a directory that lives as long as the test.
func newPoolDir(t testing.TB) poolDir {
	t.Helper()
	dir := poolDir(t.TempDir())
	if err := os.WriteFile(dir.path(poolBacking), backingContent(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir.path(poolNoise), noiseContent(), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// path returns the path of a file in the directory.
func (d poolDir) path(name string) string { return filepath.Join(string(d), name) }

// backingContent returns the content of the backing file, which is shorter than some disks.
var backingContent = sync.OnceValue(func() []byte { return bytes.Repeat([]byte("backing "), 64<<10) })

// noiseContent returns one cluster of the largest, half of it noise, so that payloads are neither tiny nor full.
var noiseContent = sync.OnceValue(func() []byte {
	noise := make([]byte, 1<<maxClusterBits)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := 0; i < len(noise); i += 2 {
		noise[i] = byte(rng.Uint32())
	}
	return noise
})

// image returns the image, made if need be.
func (img *poolImage) image(t testing.TB) *poolImage {
	t.Helper()
	img.once.Do(func() { img.build(t, newPoolDir(t)) })
	if img.sites == nil {
		t.Fatalf("%v could not be made", img)
	}
	return img
}

// place puts a damaged copy of the image into the directory, with its data file, and returns its path.
func (img *poolImage) place(t testing.TB, dir poolDir, f *pagedFile) string {
	t.Helper()
	path := dir.path("image")
	if err := f.save(path); err != nil {
		t.Fatal(err)
	}
	if img.external {
		if err := img.data.save(path + "." + poolData); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// qemuTarget returns the arguments by which qemu-img opens the image f, which is at path. If it has a data file
// they place that, since QEMU takes a relative name from its working directory.
func (s poolSpec) qemuTarget(path string, f *pagedFile) []string {
	be := binary.BigEndian
	if s.external && be.Uint32(f.bytes(fieldVersion, 4)) > 2 && be.Uint64(f.bytes(fieldIncompatible, 8))&incompatDataFile != 0 {
		return []string{"--image-opts", s.qemuOptions(path)}
	}
	return []string{"-f", "qcow2", path}
}

// qemuOptions returns the image at path, with its data file beside it, as QEMU's list of options.
func (s poolSpec) qemuOptions(path string) string {
	return fmt.Sprintf("driver=qcow2,file.driver=file,file.filename=%s,data-file.driver=file,data-file.filename=%s.%s",
		path, path, poolData)
}

// build makes the image. All of it follows from the description.
func (img *poolImage) build(t testing.TB, dir poolDir) {
	t.Helper()
	path := dir.path("image")
	rng := rand.New(rand.NewPCG(img.seed, 7))
	if img.byUs {
		img.createByUs(t, dir, img.ops(0, rng))
	} else {
		img.createByQEMU(t, path)
	}
	for i := range img.bitmaps {
		qemutest.Img(t, "bitmap", "-f", "qcow2", "--add", "-g", fmt.Sprint(512<<i), path, fmt.Sprintf("bitmap%d", i))
	}
	for stage := range img.snapshots + 1 {
		if stage > 0 {
			qemutest.Img(t, "snapshot", "-q", "-c", fmt.Sprintf("snapshot%d", stage), path)
		}
		if stage > 0 || !img.byUs {
			img.writeByQEMU(t, dir, img.ops(stage, rng))
		}
	}
	var err error
	if img.file, err = readPagedFile(path); err != nil {
		t.Fatal(err)
	}
	if img.external {
		if img.data, err = readPagedFile(path + "." + poolData); err != nil {
			t.Fatal(err)
		}
	}
	sites, err := mapDamage(img.file)
	if err != nil {
		t.Fatalf("%v: %v", img, err)
	}
	img.sites = sites
}

// createByQEMU makes the empty image with qemu-img.
func (img *poolImage) createByQEMU(t testing.TB, path string) {
	t.Helper()
	compat := map[int]string{2: "0.10", 3: "1.1"}[img.version]
	opts := []string{"compat=" + compat, fmt.Sprintf("cluster_size=%d,refcount_bits=%d", img.clusterSize(), img.width)}
	for option, on := range map[string]bool{
		"extended_l2=on":         img.extended,
		"compression_type=zstd":  img.zstd,
		"lazy_refcounts=on":      img.lazy,
		"preallocation=metadata": img.preallocate,
	} {
		if on {
			opts = append(opts, option)
		}
	}
	args := []string{"create", "-q", "-f", "qcow2", "-o", strings.Join(opts, ",")}
	if img.backing {
		args = append(args, "-b", poolBacking, "-F", "raw")
	}
	qemutest.Img(t, append(args, path, fmt.Sprint(img.diskSize()))...)
}

// writeByQEMU does the requests with qemu-io.
func (img *poolImage) writeByQEMU(t testing.TB, dir poolDir, ops []poolOp) {
	t.Helper()
	var cmds []string
	for i, o := range ops {
		pattern := ""
		switch {
		case o.cmd == "write -c":
			pattern = " -s " + dir.path(poolNoise)
		case o.cmd == "write":
			pattern = fmt.Sprintf(" -P %d", 1+i%250)
		}
		cmds = append(cmds, fmt.Sprintf("%s%s -q %d %d", o.cmd, pattern, o.off, o.n))
	}
	opts, path := qemutest.IOOptions{Cache: "unsafe"}, dir.path("image")
	if img.external {
		opts.ImageOpts, path = true, img.qemuOptions(path)
	}
	qemutest.IOWith(t, opts, path, cmds...)
}

// createByUs makes the image with this library and does the requests that it has.
func (img *poolImage) createByUs(t testing.TB, dir poolDir, ops []poolOp) {
	t.Helper()
	path := dir.path("image")
	o := &CreateOptions{
		Version: img.version, ClusterSize: 1 << img.clusterBits, RefcountBits: img.width,
		ExtendedL2: img.extended, Open: &OpenOptions{NoSync: true},
	}
	if img.zstd {
		o.Compression = CompressionZstd
	}
	if img.backing {
		o.BackingFile, o.BackingFormat = poolBacking, "raw"
		o.Open.Resolver = ResolveBeside(string(dir))
	}
	if img.external {
		data, err := OpenFileStorage(path+"."+poolData, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer data.Close()
		o.DataFile, o.Open.DataFile = poolData, data
	}
	disk, err := Create(path, img.diskSize(), o)
	if err != nil {
		t.Fatal(err)
	}
	var rest []poolOp // what only QEMU can do yet
	for i, o := range ops {
		switch o.cmd {
		case "write":
			_, err = disk.WriteAt(bytes.Repeat([]byte{byte(1 + i%250)}, int(o.n)), o.off)
		case "write -c":
			err = disk.WriteCompressed(noiseContent()[:o.n], o.off)
		default:
			rest = append(rest, o)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := disk.Close(); err != nil {
		t.Fatal(err)
	}
	img.writeByQEMU(t, dir, rest)
}
