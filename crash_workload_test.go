package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// crashWorkload is a kind of work whose crash states are looked at. setup fills in a configuration at
// random.
type crashWorkload struct {
	name  string
	setup func(c *crashConfig, rng *rand.Rand)
}

// crashConfig is what one recorded run works on, and what it does. A workload and a seed give one.
type crashConfig struct {
	workload string
	seed     uint64
	create   CreateOptions
	size     int64  // of the guest's disk in bytes
	backing  string // format of the backing file, or ""
	device   bool   // image and data file are devices: garbage where nothing was written
	tiny     bool   // caches of two slices

	fill     float64 // part of the clusters that is written before the record begins
	third    bool    // only in the first third of the disk, so that L2 tables are missing behind it
	packed   float64 // part of those that is compressed
	snapshot bool    // an internal snapshot shares everything at first
	zeros    bool    // zero clusters of both kinds
	full     bool    // the device has room for few clusters more, so that writes fail
	edge     bool    // filled until the refcount table is nearly full

	fromCreate bool // the record begins before Create
	overwrite  bool // and there is an old image
	writers    int  // goroutines beside each other, 0: one after the other

	ops        int // operations of the record
	compressed int // percent of the operations that are WriteCompressed
	sync       int // percent that are Sync
	reopen     int // percent that are Close and a new open
	makeEmpty  int // percent that are MakeEmpty, besides
	discards   int // percent of the others that are Discard or WriteZeroes
	discard    DiscardMode
	noUnref    bool
	resize     int // percent that are Resize

	most int64 // the largest size that a resize gives the disk, in bytes

	script func(g *crashGenerator, img *Image) error // takes the place of the random operations
	test   testHooks
}

// String describes the configuration in one line.
func (c *crashConfig) String() string {
	return fmt.Sprintf("workload %s seed %d: cluster %d, refcount bits %d, version %d, size %#x, extended %t, %v, lazy %t, "+
		"backing %q, data file %t (raw %t), device %t, tiny caches %t, fill %.2f (a third %t), packed %.2f, snapshot %t, zeros %t, full %t, edge %t, "+
		"create %t, overwrite %t, writers %d, discards %d %% (mode %d, no unref %t), resizes up to %#x",
		c.workload, c.seed, c.create.ClusterSize, c.create.RefcountBits, c.create.Version, c.size, c.create.ExtendedL2, c.create.Compression,
		c.create.LazyRefcounts, c.backing, c.create.DataFile != "", c.create.DataFileRaw, c.device, c.tiny, c.fill, c.third, c.packed,
		c.snapshot, c.zeros, c.full, c.edge, c.fromCreate, c.overwrite, c.writers, c.discards, c.discard, c.noUnref, c.most)
}

// crashWorkloads are the workloads. Together they hold what docs/GUARANTEES.md speaks of: allocation, rewriting
// in every form, compression, growth of every table, backing files, subclusters, data files, lazy refcounts,
// syncs beside writers, a host without space, and the life of an image from Create to Close.
func crashWorkloads() []crashWorkload {
	pick := func(rng *rand.Rand, of ...int) int { return of[rng.IntN(len(of))] }
	// basic gives any geometry without extended L2.
	basic := func(c *crashConfig, rng *rand.Rand, widths ...int) {
		c.create.Version = 3
		c.create.ClusterSize = pick(rng, 512, 512, 1024, 1024, 2048, 4096, 16<<10)
		c.create.RefcountBits = pick(rng, widths...)
		c.create.Compression = CompressionType(rng.IntN(2))
		clusters := 200 + rng.IntN(200)
		if c.create.ClusterSize >= 4096 {
			clusters = 48 + rng.IntN(48)
		}
		c.size = int64(clusters*c.create.ClusterSize) + int64(rng.IntN(c.create.ClusterSize/512))*512
		c.ops, c.sync, c.reopen = 50, 14, 1
		if c.create.RefcountBits == 16 && rng.IntN(2) == 0 {
			c.create.Version, c.create.Compression = 2, CompressionDeflate
		}
	}
	all := []int{1, 2, 4, 8, 16, 32, 64}
	workloads := []crashWorkload{
		{"allocate", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, all...)
			c.fill, c.third = rng.Float64(), true
		}},
		{"rewrite", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, all...)
			c.fill, c.packed, c.zeros = 0.5+rng.Float64()/2, 0.5, c.create.Version == 3
		}},
		{"snapshot", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, 16, 32, 64)
			c.fill, c.packed, c.zeros, c.snapshot = 0.5+rng.Float64()/2, 0.3, c.create.Version == 3, true
			c.compressed = 10
		}},
		{"compressed", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, all...)
			c.fill, c.packed, c.compressed = rng.Float64()*0.6, 0.7, 50
		}},
		{"growth", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, 64)
			c.create.ClusterSize, c.create.Version = 512, 3
			c.size = 512 * int64(200+rng.IntN(200))
			c.edge = rng.IntN(3) > 0
			if c.edge {
				c.size = 512 * 4500
			}
			c.fill, c.third, c.compressed, c.sync = rng.Float64(), true, 10, 8
		}},
		{"backing", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, all...)
			c.backing = []string{"raw", "qcow2"}[rng.IntN(2)]
			c.fill, c.packed, c.zeros, c.compressed = rng.Float64()*0.5, 0.3, c.create.Version == 3, 10
			c.third = rng.IntN(2) == 0
		}},
		{"extended", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, all...)
			c.create.Version, c.create.ExtendedL2, c.create.ClusterSize = 3, true, pick(rng, 16<<10, 16<<10, 32<<10)
			c.size = int64((10+rng.IntN(20))*c.create.ClusterSize) + int64(rng.IntN(32))*512
			if rng.IntN(2) == 0 {
				c.backing = []string{"raw", "qcow2"}[rng.IntN(2)]
			}
			c.snapshot = c.create.RefcountBits >= 16 && rng.IntN(2) == 0
			c.fill, c.packed, c.zeros, c.compressed = rng.Float64()*0.6, 0.3, true, 10
		}},
		{"datafile", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, all...)
			c.create.Version, c.create.DataFile = 3, "data"
			c.create.DataFileRaw = rng.IntN(2) == 0
			if rng.IntN(3) == 0 {
				c.create.ExtendedL2, c.create.ClusterSize = true, 16<<10
				c.size = int64((10+rng.IntN(20))*c.create.ClusterSize) + int64(rng.IntN(32))*512
			}
			if !c.create.DataFileRaw && rng.IntN(2) == 0 {
				c.backing = []string{"raw", "qcow2"}[rng.IntN(2)]
			}
			c.fill, c.zeros, c.third = rng.Float64()*0.6, !c.create.DataFileRaw, rng.IntN(2) == 0
		}},
		{"lazy", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, all...)
			c.create.Version, c.create.LazyRefcounts = 3, true
			c.fill, c.packed, c.zeros, c.compressed = rng.Float64()*0.8, 0.4, true, 15
			if rng.IntN(3) == 0 {
				c.backing = "raw"
			}
		}},
		{"concurrent", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, 8, 16, 32, 64)
			c.fill, c.packed, c.zeros, c.compressed = rng.Float64()*0.8, 0.4, c.create.Version == 3, 10
			c.writers, c.reopen = 3, 0
			c.third = rng.IntN(2) == 0
			if c.create.RefcountBits >= 16 && rng.IntN(2) == 0 {
				c.snapshot = true
			}
			if rng.IntN(3) == 0 {
				c.backing = "raw"
			}
		}},
		{"full", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, 8, 16, 32, 64)
			c.device, c.full = true, true
			c.fill, c.packed, c.zeros, c.compressed = 0.6+rng.Float64()*0.3, 0.5, c.create.Version == 3, 25
			c.snapshot = c.create.RefcountBits >= 16 && rng.IntN(3) == 0
			c.sync = 7
		}},
		{"create", func(c *crashConfig, rng *rand.Rand) {
			basic(c, rng, all...)
			c.fromCreate, c.overwrite = true, rng.IntN(2) == 0
			c.create.ClusterSize = pick(rng, 512, 1024, 8<<10, 8<<10, 64<<10) // above 4 KiB the header is longer than a sector
			c.size = int64(20+rng.IntN(60))*1024 + int64(rng.IntN(2))*512
			c.ops, c.fill = 6, 0.5 // the old image's part
			switch rng.IntN(4) {
			case 0:
				c.backing = []string{"raw", "qcow2"}[rng.IntN(2)]
			case 1:
				c.create.Version, c.create.DataFile, c.create.DataFileRaw = 3, "data", rng.IntN(2) == 0
			case 2:
				c.create.Version, c.create.LazyRefcounts = 3, true
			}
			if c.create.DataFile == "" {
				c.compressed = 20
			}
			if c.backing == "" && rng.IntN(3) > 0 {
				c.create.Preallocation = Preallocation(1 + rng.IntN(3))
			}
		}},
		emptyWorkload(),
	}
	workloads = append(workloads, crashDiscardWorkloads(workloads)...)
	workloads = append(workloads, resizeCrashWorkload(basic, all))
	return workloads
}

// newCrashConfig returns the configuration of a workload and seed. The seed's parity alternates regular
// files and devices.
func newCrashConfig(w crashWorkload, seed uint64) *crashConfig {
	rng := rand.New(rand.NewPCG(seed, 1))
	c := &crashConfig{workload: w.name, seed: seed, device: seed%2 == 1, tiny: seed/2%2 == 1}
	w.setup(c, rng)
	if c.create.DataFile != "" {
		c.compressed, c.packed, c.create.Compression = 0, 0, CompressionDeflate
	}
	if c.backing != "" {
		c.create.BackingFile, c.create.BackingFormat = "backing", c.backing
	}
	c.create.Overwrite = true
	return c
}

// Marks of a record. A write is started and has returned; a sync, close or create as well.
type (
	// crashWriteStart is the start of write id.
	crashWriteStart struct {
		id   int
		off  int64
		data []byte
	}
	// crashWriteEnd is the return of write id.
	crashWriteEnd struct{ id int }
	// crashSyncStart is the start of a Sync or Close.
	crashSyncStart struct{ id int }
	// crashSyncEnd is its return without an error.
	crashSyncEnd struct{ id int }
	// crashCreated is the return of Create.
	crashCreated struct{}
)

// crashTightens reports whether a mark demands more of the states after it.
func crashTightens(mark any) bool {
	switch mark.(type) {
	case crashSyncEnd, crashCreated, crashEmptyEnd:
		return true
	}
	return false
}

// crashStorage makes a storage of the recorder a Storage: its locks are nobody's.
type crashStorage struct{ crashtest.Storage }

// Lock does nothing.
func (crashStorage) Lock(LockRole) error { return nil }

// crashContent fills p with what write seq writes at guest offset off. It consists of units of 16 bytes that
// tell sector and write, so that content found elsewhere is recognized; where it is not to shrink, of random
// bytes behind the first unit of each sector.
func crashContent(p []byte, off int64, seq uint64, shrinks bool) {
	var unit [16]byte
	for i := range p {
		at := off + int64(i)
		if i == 0 || at%16 == 0 {
			binary.BigEndian.PutUint64(unit[:], crashStamp|uint64(at/sectorSize))
			binary.BigEndian.PutUint64(unit[8:], seq)
			if !shrinks && at%sectorSize >= 16 {
				x := (seq<<32 + uint64(at/16)) * 0x9e3779b97f4a7c15
				binary.BigEndian.PutUint64(unit[:], x^x>>31|1<<63)
				x *= 0xbf58476d1ce4e5b9
				binary.BigEndian.PutUint64(unit[8:], x^x>>29)
			}
		}
		p[i] = unit[at%16]
	}
}

// crashStamp begins the units of written content.
const crashStamp = 0x51c2 << 40

// crashForeign reports whether sector content p, found in sector, holds a unit that was written for another
// sector.
func crashForeign(p []byte, sector, sectors int64) bool {
	for i := 0; i+16 <= len(p); i += 16 {
		v := binary.BigEndian.Uint64(p[i:])
		if at := int64(v &^ (0xffffff << 40)); v&(0xffffff<<40) == crashStamp && at < sectors && at != sector {
			return true
		}
	}
	return false
}

// crashRun is one recorded run.
type crashRun struct {
	*crashConfig
	rec          *crashtest.Recorder
	image        *crashtest.File
	data         *crashtest.File // external data file, or nil
	backingFile  *crashtest.File // or nil
	backingDisk  Disk            // what the library reads of it
	backingBytes []byte          // what its guest reads
	guest        []byte          // what the guest reads when the record begins; with fromCreate, after Create
	old          []byte          // with overwrite, what the guest of the old image reads
	oldImage     []byte          // with overwrite, the old image file
	snap         []byte          // what the internal snapshot reads; nil without

	cur     int64 // the disk's size now, where it is resized
	refused int   // writes that failed for lack of space; of a single writer

	mu    sync.Mutex
	seq   int      // numbers of writes, syncs; guarded by mu
	lines []string // what was done, and where in the record; guarded by mu
}

// next notes an operation and returns its number.
func (r *crashRun) next(format string, args ...any) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seq++
	r.lines = append(r.lines, fmt.Sprintf("at #%d: ", r.rec.Len())+fmt.Sprintf(format, args...))
	return r.seq
}

// newCrashRun builds the files of a configuration, with what they hold when the record begins.
func newCrashRun(c *crashConfig) (*crashRun, error) {
	r := &crashRun{crashConfig: c, rec: crashtest.NewRecorder(), cur: c.size}
	rng := rand.New(rand.NewPCG(c.seed, 2))
	if err := r.makeBacking(rng); err != nil {
		return nil, fmt.Errorf("backing file: %w", err)
	}
	if err := r.makeImage(rng); err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	return r, nil
}

// makeBacking makes the backing file, shorter or longer than the disk.
func (r *crashRun) makeBacking(rng *rand.Rand) error {
	if r.backing == "" {
		return nil
	}
	b := make([]byte, (r.size*int64(70+rng.IntN(60))/100+511)&^511)
	crashContent(b, 0, 1<<20, true)
	r.backingBytes = b
	if r.backing == "raw" {
		r.backingFile = r.rec.Regular("backing", b)
		d, err := NewRawDisk(crashStorage{r.backingFile})
		r.backingDisk = d
		return err
	}
	d := crashtest.NewDisk(nil)
	img, err := CreateStorage(crashStorage{d}, int64(len(b)), &CreateOptions{ClusterSize: 4096})
	if err != nil {
		return err
	}
	if _, err := img.WriteAt(b, 0); err != nil {
		return err
	}
	if err := img.Close(); err != nil {
		return err
	}
	r.backingFile = r.rec.Regular("backing", d.Bytes())
	r.backingDisk, err = OpenStorage(crashStorage{r.backingFile}, nil)
	return err
}

// crashDeviceSpare is how much longer a device is than what the run may need, in bytes.
const crashDeviceSpare = 256 << 10

// hostDisk returns an empty host file for size guest bytes.
func (r *crashRun) hostDisk(size int64) *crashtest.Disk {
	if r.device {
		return crashtest.NewDevice(nil, size)
	}
	return crashtest.NewDisk(nil)
}

// record puts a host file into the record.
func (r *crashRun) record(name string, content []byte) *crashtest.File {
	if r.device {
		return r.rec.Device(name, content, int64(len(content)))
	}
	return r.rec.Regular(name, content)
}

// openOptions returns the options of a writable open with these files.
func (r *crashRun) openOptions(data Storage) *OpenOptions {
	o := &OpenOptions{ReadWrite: true, Backing: r.backingDisk, DataFile: data, test: r.test, Discard: r.discard, DiscardNoUnref: r.noUnref}
	if r.tiny {
		o.L2CacheBytes, o.RefcountCacheBytes = 1, 1
	}
	if r.test.emptyOrder != emptyOrderKept {
		o.OverlapCheck.Preset = OverlapNone // it would refuse what is out of order
	}
	return o
}

// makeImage makes image and data file. With fromCreate they are empty, or hold an old image.
func (r *crashRun) makeImage(rng *rand.Rand) error {
	image := r.hostDisk(3*max(r.size, r.most) + 2*int64(r.create.ClusterSize)*8 + crashDeviceSpare)
	var data *crashtest.Disk
	var dataStorage Storage
	if r.create.DataFile != "" {
		data = r.hostDisk(max(r.size, r.most))
		dataStorage = crashStorage{data}
	}
	if !r.fromCreate || r.overwrite {
		if err := r.fillImage(rng, crashStorage{image}, dataStorage); err != nil {
			return err
		}
	}
	b := image.Bytes()
	if r.snapshot || r.zeros {
		edit, err := newCrashBytes(b, r.device)
		if err != nil {
			return err
		}
		if r.zeros {
			if err := edit.addZeros(rng); err != nil {
				return err
			}
		}
		if r.snapshot {
			if err := edit.addSnapshot(); err != nil {
				return err
			}
		}
		b = edit.b
	}
	if r.full {
		edit, err := newCrashBytes(b, true)
		if err != nil {
			return err
		}
		// Devices end with a page.
		spare := (2 + rng.IntN(12)) * r.create.ClusterSize
		b = b[:min(len(b), (edit.end()+spare+4095)/4096*4096)]
	}
	r.image = r.record("image", b)
	if data != nil {
		r.data = r.record("data", data.Bytes())
	}
	if r.fromCreate {
		r.guest = make([]byte, r.size)
		copy(r.guest, r.backingBytes)
		if !r.overwrite {
			return nil
		}
		r.oldImage = b
	}
	rep, err := refwalk.Walk(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return err
	}
	if !rep.Clean() {
		return fmt.Errorf("not clean before the record begins: %s", strings.Join(rep.Findings, "; "))
	}
	guest, err := refwalk.ReadGuest(r.source(r.image, int64(len(b)), r.data))
	if err != nil {
		return err
	}
	if r.snapshot {
		r.snap = guest
	}
	if r.fromCreate {
		r.old = guest
	} else {
		r.guest = bytes.Clone(guest)
	}
	return nil
}

// source returns what refwalk reads a guest from. data may be nil.
func (r *crashRun) source(image crashtest.Storage, size int64, data crashtest.Storage) refwalk.Source {
	s := refwalk.Source{Image: image, Size: size}
	if r.data != nil {
		s.Data = data
	}
	if r.backing != "" {
		s.Backing = func(p []byte, off int64) error {
			n := 0
			if off < int64(len(r.backingBytes)) {
				n = copy(p, r.backingBytes[off:])
			}
			clear(p[n:])
			return nil
		}
	}
	return s
}

// fillImage makes an image and fills it as the configuration says.
func (r *crashRun) fillImage(rng *rand.Rand, image, data Storage) error {
	o := r.create
	o.Open = r.openOptions(data)
	o.Open.test = testHooks{}
	if r.fromCreate {
		// The header of an old image differs from that of the new one.
		o.LazyRefcounts = o.Version == 2 || !o.LazyRefcounts
		o.Version = 3
	}
	img, err := CreateStorage(image, r.size, &o)
	if err != nil {
		return err
	}
	if err := r.fillGuest(rng, img); err != nil {
		return err
	}
	return img.Close()
}

// fillGuest writes to img what the configuration wants there before the record begins.
func (r *crashRun) fillGuest(rng *rand.Rand, img *Image) error {
	cs := int64(r.create.ClusterSize)
	if r.edge {
		// The table describes 64 clusters by each of its 64 entries.
		p := make([]byte, 512)
		last := int64(64*64 - 3 - rng.IntN(30))
		for off := int64(0); off < r.size && int64(img.m.alloc.one) < last; off += 512 {
			crashContent(p, off, 1<<21, true)
			if _, err := img.WriteAt(p, off); err != nil {
				return err
			}
		}
		return nil
	}
	for off := int64(0); off < r.size; off += cs {
		if rng.Float64() >= r.fill || r.third && off > r.size/3 {
			continue
		}
		p := make([]byte, min(cs, r.size-off))
		crashContent(p, off, 1<<21, rng.IntN(4) > 0)
		var err error
		switch {
		case rng.Float64() < r.packed:
			err = img.WriteCompressed(p, off)
		case rng.IntN(3) == 0:
			_, err = img.WriteAt(p[:(rng.IntN(len(p))/512+1)*512], off)
		default:
			_, err = img.WriteAt(p, off)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// perform does the work of the run on the recorded files.
func (r *crashRun) perform() error {
	rng := rand.New(rand.NewPCG(r.seed, 3))
	var data Storage
	if r.data != nil {
		data = crashStorage{r.data}
	}
	open := r.openOptions(data)
	open.test = r.test
	var img *Image
	var err error
	if r.fromCreate {
		o := r.create
		o.Open = open
		r.next("create")
		if img, err = CreateStorage(crashStorage{r.image}, r.size, &o); err == nil {
			r.rec.Mark(crashCreated{})
		}
	} else {
		img, err = OpenStorage(crashStorage{r.image}, open)
	}
	if err != nil {
		return err
	}
	if r.writers > 0 {
		if err := r.performBeside(img); err != nil {
			return err
		}
		return r.syncWith("close", img.Close)
	}
	g := newCrashGenerator(r, rng, 0, r.size)
	if r.script != nil {
		if err := r.script(g, img); err != nil {
			return err
		}
		return r.syncWith("close", img.Close)
	}
	for range r.ops {
		if rng.IntN(100) < r.reopen {
			if err := r.syncWith("close", img.Close); err != nil {
				return err
			}
			if img, err = OpenStorage(crashStorage{r.image}, open); err != nil {
				return err
			}
		}
		if err := g.step(img); err != nil {
			return err
		}
	}
	return r.syncWith("close", img.Close)
}

// performBeside runs the writers beside each other, each with its own part of the disk's sectors, and syncs
// of their own. Which host operation comes when is then not the seed's alone.
func (r *crashRun) performBeside(img *Image) error {
	errs := make([]error, r.writers)
	var wg sync.WaitGroup
	for i := range r.writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(r.seed, 10+uint64(i)))
			// The parts end inside clusters, so that neighbours meet in one.
			part := r.size / 512 / int64(r.writers) * 512
			g := newCrashGenerator(r, rng, int64(i)*part, int64(i+1)*part)
			for range r.ops / r.writers {
				if errs[i] = g.step(img); errs[i] != nil {
					return
				}
			}
		}()
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// syncWith calls sync, which makes durable whatever returned before, with its marks.
func (r *crashRun) syncWith(name string, sync func() error) error {
	id := r.next("%s", name)
	r.rec.Mark(crashSyncStart{id})
	if err := sync(); err != nil {
		return err
	}
	r.rec.Mark(crashSyncEnd{id})
	return nil
}

// crashGenerator makes the operations of one writer.
type crashGenerator struct {
	*crashRun
	rng        *rand.Rand
	start, end int64   // guest bytes it may write
	hot        []int64 // offsets it comes back to
}

// newCrashGenerator returns a generator for the guest bytes from start to end.
func newCrashGenerator(r *crashRun, rng *rand.Rand, start, end int64) *crashGenerator {
	g := &crashGenerator{crashRun: r, rng: rng, start: start, end: end}
	for range 6 {
		g.hot = append(g.hot, start+rng.Int64N(end-start))
	}
	if r.edge {
		// Beyond what is filled, so that it allocates.
		g.start = max(start, end/8*7)
	}
	return g
}

// step does one operation: a sync or a write. A write that fails is an error of the run.
func (g *crashGenerator) step(img *Image) error {
	if g.makeEmpty > 0 && g.rng.IntN(100) < g.makeEmpty {
		return g.makeEmptyStep(img)
	}
	k := g.rng.IntN(100)
	if k < g.sync {
		return g.syncWith("sync", img.Sync)
	}
	if k -= g.sync; k < g.resize {
		return g.resizeDisk(img)
	}
	k -= g.resize
	if g.end == g.start {
		return nil
	}
	if g.discards > 0 && g.rng.IntN(100) < g.discards {
		return g.zeroing(img)
	}
	off := g.start + g.rng.Int64N(g.end-g.start)
	if g.rng.IntN(10) < 5 {
		off = min(g.hot[g.rng.IntN(len(g.hot))], g.end-1)
	}
	cs := int64(g.create.ClusterSize)
	if k < g.compressed {
		off = off / cs * cs
		n := min(cs*int64(1+g.rng.IntN(3)), g.cur-off)
		// Only whole clusters of the own part, or the disk's last one.
		if off < g.start {
			off, n = off+cs, n-cs
		}
		if off+n > g.end {
			n = (g.end - off) / cs * cs
			if g.end == g.cur {
				n = g.end - off
			}
		}
		if n > 0 {
			return g.write(img, off, n, func(p []byte) error { return img.WriteCompressed(p, off) })
		}
	}
	var n int64
	switch g.rng.IntN(4) {
	case 0: // bytes
		n = 1 + g.rng.Int64N(700)
	case 1: // sectors
		off, n = off&^511, 512*(1+g.rng.Int64N(8))
	default: // clusters
		off, n = off/cs*cs, cs*(1+g.rng.Int64N(3))
		if cs >= 16<<10 {
			n = cs
		}
	}
	off = max(off, g.start)
	n = min(n, g.end-off)
	return g.write(img, off, n, func(p []byte) error {
		m, err := img.WriteAt(p, off)
		if err == nil && m != len(p) {
			err = fmt.Errorf("wrote %d of %d bytes", m, len(p))
		}
		return err
	})
}

// write calls f with new content for the range, with its marks.
func (g *crashGenerator) write(img *Image, off, n int64, f func(p []byte) error) error {
	p := make([]byte, n)
	id := g.next("write %#x+%#x", off, n)
	crashContent(p, off, uint64(id), g.rng.IntN(6) > 0)
	g.rec.Mark(crashWriteStart{id, off, p})
	err := f(p)
	if err != nil && !(g.full && isNoSpace(err)) {
		return err
	}
	g.rec.Mark(crashWriteEnd{id})
	if err == nil {
		return nil
	}
	// How much of it was written is what the guest reads now; nothing but a sync makes that durable.
	again := g.next("failed for lack of space")
	q := make([]byte, n)
	if _, err := img.ReadAt(q, off); err != nil {
		return err
	}
	g.refused++
	g.rec.Mark(crashWriteStart{again, off, q})
	g.rec.Mark(crashWriteEnd{again})
	return nil
}
