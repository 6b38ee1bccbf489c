package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
)

// opKind is what a line of a workload does.
type opKind string

// The kinds of operations. off and n are guest bytes.
const (
	opWrite   opKind = "write"   // write off n seed
	opWriteV  opKind = "writev"  // writev off n seed: as several buffers, cut as the seed says
	opWriteC  opKind = "writec"  // writec off n seed: compressed
	opRead    opKind = "read"    // read off n
	opReadV   opKind = "readv"   // readv off n seed
	opExtents opKind = "extents" // extents off n
	opSync    opKind = "sync"
	opWalk    opKind = "walk" // the independent walk over the bytes as they stand, without a sync
	opReopen  opKind = "reopen"
	opAmend   opKind = "amend"   // amend seed: to what the seed says
	opRebase  opKind = "rebase"  // rebase seed: to the backing file, or to none
	opEmpty   opKind = "empty"   // MakeEmpty
	opCommit  opKind = "commit"  // Commit
	opResize  opKind = "resize"  // resize off n: to off bytes, with preallocation n
	opDiscard opKind = "discard" // discard off n
	opZero    opKind = "zero"    // zero off n: WriteZeroes
	opUnmap   opKind = "unmap"   // unmap off n: WriteZeroes with ZeroMayUnmap

	opSnapshot opKind = "snapshot" // snapshot seed: which operation on internal snapshots the seed says
)

// op is one operation of a workload. Its text form is one line.
type op struct {
	kind   opKind
	off, n int64
	seed   uint64 // of the content, or of the cuts
}

// ranged reports whether the operation has a range.
func (o op) ranged() bool {
	switch o.kind {
	case opSync, opWalk, opReopen, opSnapshot, opEmpty, opCommit, opAmend, opRebase:
		return false
	}
	return true
}

// seeded reports whether the operation has a seed.
func (o op) seeded() bool {
	return o.writes() || o.kind == opReadV || o.kind == opSnapshot || o.kind == opAmend || o.kind == opRebase
}

// writes reports whether the operation changes the guest's disk.
func (o op) writes() bool { return o.kind == opWrite || o.kind == opWriteV || o.kind == opWriteC }

// String returns the operation's line.
func (o op) String() string {
	s := string(o.kind)
	if o.ranged() {
		s += fmt.Sprintf(" %#x %#x", o.off, o.n)
	}
	if o.seeded() {
		s += fmt.Sprintf(" %d", o.seed)
	}
	return s
}

// parseOp reads the line of an operation.
func parseOp(line string) (op, error) {
	f := strings.Fields(line)
	if len(f) == 0 {
		return op{}, errors.New("empty operation")
	}
	o := op{kind: opKind(f[0])}
	switch o.kind {
	case opWrite, opWriteV, opWriteC, opRead, opReadV, opExtents, opSync, opWalk, opReopen:
	case opDiscard, opZero, opUnmap, opSnapshot, opResize, opEmpty, opCommit, opAmend, opRebase:
	default:
		return o, fmt.Errorf("unknown operation %q", line)
	}
	want := 1
	if o.ranged() {
		want += 2
	}
	if o.seeded() {
		want++
	}
	if len(f) != want {
		return o, fmt.Errorf("operation %q: %d fields instead of %d", line, len(f), want)
	}
	var err [3]error
	if o.ranged() {
		o.off, err[0] = strconv.ParseInt(f[1], 0, 64)
		o.n, err[1] = strconv.ParseInt(f[2], 0, 64)
	}
	if o.seeded() {
		o.seed, err[2] = strconv.ParseUint(f[want-1], 0, 64)
	}
	if e := errors.Join(err[:]...); e != nil {
		return o, fmt.Errorf("operation %q: %w", line, e)
	}
	return o, nil
}

// parseOps reads operations, one per line. Empty lines and those that begin with # are passed over.
func parseOps(text string) ([]op, error) {
	var ops []op
	for _, line := range strings.Split(text, "\n") {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		o, err := parseOp(line)
		if err != nil {
			return nil, err
		}
		ops = append(ops, o)
	}
	return ops, nil
}

// formatOps returns the lines of operations.
func formatOps(ops []op) string {
	var b strings.Builder
	for _, o := range ops {
		b.WriteString(o.String())
		b.WriteByte('\n')
	}
	return b.String()
}

// cuts returns the lengths of the buffers of a vectored operation: they add up to n, and some may be 0.
func (o op) cuts() []int64 {
	rng := rand.New(rand.NewPCG(o.seed, 1))
	var cuts []int64
	for left := o.n; ; {
		n := min(left, rng.Int64N(max(o.n/3, 1)+1))
		if len(cuts) == 15 {
			n = left
		}
		cuts = append(cuts, n)
		if left -= n; left == 0 {
			return cuts
		}
	}
}

// content fills p with what an operation of that seed writes: zeros, noise, or a mixture that deflate and
// zstd shrink to different sizes. Two seeds differ in nearly every byte that is not zero.
func content(p []byte, seed uint64) {
	noise := 0
	switch seed % 8 {
	case 0:
		clear(p)
		return
	case 1, 2:
		noise = len(p)
	case 3, 4, 5:
		noise = int(seed/8%97) * min(len(p), 128<<10) / 200
	case 6:
		noise = min(len(p), 8)
	}
	x := seed*0x9e3779b97f4a7c15 | 1
	var word [8]byte
	for i := 0; i < noise; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(word[:], x)
		copy(p[i:noise], word[:])
	}
	fill := byte(x >> 32)
	if seed%8 >= 5 {
		fill = 0
	}
	if seed%8 == 7 {
		fill = byte(x>>32) | 1
	}
	rest := p[noise:]
	if fill == 0 {
		clear(rest)
		return
	}
	for i := range rest {
		rest[i] = fill
	}
}

// Layouts of a workload's image.
const (
	layoutPlain        = "plain"
	layoutExtended     = "extended-l2"
	layoutData         = "data-file"
	layoutRawData      = "raw-data-file"
	layoutBackingQcow2 = "backing-qcow2"
	layoutBackingRaw   = "backing-raw"
	layoutBackingShort = "backing-shorter"
)

// workloadLayouts are all layouts.
var workloadLayouts = []string{
	layoutPlain, layoutExtended, layoutData, layoutRawData, layoutBackingQcow2, layoutBackingRaw, layoutBackingShort,
}

// workloadConfig is the image that a workload runs on. Its text form is one line.
type workloadConfig struct {
	clusterSize  int64
	version      int
	refcountBits int
	layout       string
	compression  CompressionType
	lazy         bool
	smallCache   bool   // two L2 slices and two refcount block slices
	storage      string // memory, device or file
}

// String returns the configuration's line.
func (c workloadConfig) String() string {
	return fmt.Sprintf("cluster=%d version=%d refcount-bits=%d layout=%s compression=%v lazy=%v small-cache=%v storage=%s",
		c.clusterSize, c.version, c.refcountBits, c.layout, c.compression, c.lazy, c.smallCache, c.storage)
}

// parseConfig reads a configuration's line.
func parseConfig(line string) (workloadConfig, error) {
	c := workloadConfig{clusterSize: 65536, version: 3, refcountBits: 16, layout: layoutPlain, storage: "memory"}
	for _, f := range strings.Fields(line) {
		key, value, _ := strings.Cut(f, "=")
		var err error
		switch key {
		case "cluster":
			c.clusterSize, err = strconv.ParseInt(value, 0, 32)
		case "version":
			c.version, err = strconv.Atoi(value)
		case "refcount-bits":
			c.refcountBits, err = strconv.Atoi(value)
		case "layout":
			c.layout = value
		case "compression":
			if value == "zstd" {
				c.compression = CompressionZstd
			} else if value != "zlib" {
				err = errors.New("zlib or zstd")
			}
		case "lazy":
			c.lazy, err = strconv.ParseBool(value)
		case "small-cache":
			c.smallCache, err = strconv.ParseBool(value)
		case "storage":
			c.storage = value
		default:
			err = errors.New("unknown key")
		}
		if err != nil {
			return c, fmt.Errorf("configuration %q: %w", f, err)
		}
	}
	return c, nil
}

// workloadConfigs returns every legal combination of cluster size, version, refcount width, layout and
// compression. Lazy refcounts, the size of the caches and the storage alternate over them, so that each
// value meets each other one.
func workloadConfigs() []workloadConfig {
	var all []workloadConfig
	n := 0
	for _, cluster := range []int64{512, 4 << 10, 64 << 10, 2 << 20} {
		for _, version := range []int{2, 3} {
			for _, bits := range []int{1, 2, 4, 8, 16, 32, 64} {
				for _, layout := range workloadLayouts {
					for _, compression := range []CompressionType{CompressionDeflate, CompressionZstd} {
						v2only := version == 2 && (bits != 16 || compression != CompressionDeflate ||
							layout == layoutExtended || layout == layoutData || layout == layoutRawData)
						if v2only || layout == layoutExtended && cluster < 16<<10 {
							continue
						}
						// A scrambled counter, so that no option follows another's rhythm.
						h := uint64(n+1) * 0x9e3779b97f4a7c15 >> 40
						c := workloadConfig{
							clusterSize: cluster, version: version, refcountBits: bits, layout: layout, compression: compression,
							lazy: version == 3 && h&1 != 0, smallCache: n&1 != 0, storage: "memory",
						}
						switch h >> 1 & 7 {
						case 0, 1, 2:
							c.storage = "device"
						case 3:
							if cluster < 2<<20 { // not every file system takes a data file of 4 TiB
								c.storage = "file"
							}
						}
						all = append(all, c)
						n++
					}
				}
			}
		}
	}
	return all
}

// external reports whether guest data is in a data file.
func (c workloadConfig) external() bool { return c.layout == layoutData || c.layout == layoutRawData }

// backed reports whether there is a backing file.
func (c workloadConfig) backed() bool {
	return c.layout == layoutBackingQcow2 || c.layout == layoutBackingRaw || c.layout == layoutBackingShort
}

// reach returns how many guest bytes one L2 table maps.
func (c workloadConfig) reach() int64 {
	if c.layout == layoutExtended {
		return c.clusterSize * (c.clusterSize / 16)
	}
	return c.clusterSize * (c.clusterSize / 8)
}

// tables returns how many L2 tables map the disk: at least 9, and with clusters of 512 bytes enough that
// the disk is not full soon, and that wide refcounts outgrow their first table.
func (c workloadConfig) tables() int64 { return max(9, (8<<20+c.reach()-1)/c.reach()) }

// size returns the size of the disk in bytes. It ends inside a cluster, where that is more than a sector,
// in the middle of an L2 table.
func (c workloadConfig) size() int64 {
	n := c.tables()*c.reach() - c.reach()/2 + c.clusterSize
	if c.clusterSize > 512 {
		n -= 1536
	}
	return n
}

// deviceSize returns the size of a block device that holds the image of the hot clusters and some churn.
func (c workloadConfig) deviceSize() int64 {
	if c.external() {
		return (c.tables()*4 + 64) * c.clusterSize
	}
	return ((3+maxModelSnapshots)*int64(len(c.hot())) + (4+maxModelSnapshots)*c.tables() + 200) * c.clusterSize
}

// hot returns the guest cluster indexes that a workload writes to: on a small disk all, on others some at
// both ends of each L2 table's reach and at the end of the disk.
func (c workloadConfig) hot() []int64 {
	clusters := (c.size() + c.clusterSize - 1) / c.clusterSize
	perTable := c.reach() / c.clusterSize
	span := int64(3)
	switch {
	case c.clusterSize <= 4<<10:
		span = perTable
	case c.clusterSize <= 64<<10:
		span = 12
	}
	var hot []int64
	for t := range c.tables() {
		for i := range min(span, perTable) {
			hot = append(hot, t*perTable+i)
		}
		if span < perTable {
			hot = append(hot, (t+1)*perTable-1)
		}
	}
	n := 0
	for _, ci := range hot {
		if ci < clusters {
			hot[n] = ci
			n++
		}
	}
	hot = hot[:n]
	if hot[n-1] < clusters-1 {
		hot = append(hot, clusters-2, clusters-1)
	}
	return hot
}

// generator makes the operations of a workload.
type generator struct {
	c    workloadConfig
	rng  *rand.Rand
	hot  []int64
	size int64 // of the disk now
	next int64 // tables that the first operations have reached
}

// newGenerator returns a generator whose operations follow from seed.
func newGenerator(c workloadConfig, seed uint64) *generator {
	return &generator{c: c, rng: rand.New(rand.NewPCG(seed, 2)), hot: c.hot(), size: c.size()}
}

// generateOps returns n operations: one in eight discards or zeroes, and of the others about 34 % WriteCompressed and as many writes, 20 % reads and questions
// for extents, 7 % Sync, 3 % reopen; with a data file writes only. The first ones reach into every L2 table.
func generateOps(c workloadConfig, seed uint64, n int) []op {
	g := newGenerator(c, seed)
	ops := make([]op, n)
	for i := range ops {
		ops[i] = g.op()
	}
	return ops
}

// op returns the next operation.
func (g *generator) op() op {
	if o, ok := g.amendOp(); ok {
		return o
	}
	if g.rng.IntN(8) == 0 {
		if g.rng.IntN(10) == 0 {
			return op{kind: opSync} // as often as among the others
		}
		return g.zeroing()
	}
	packed := 34 // percent of WriteCompressed; they turn mapped clusters into such as must be replaced
	if g.c.external() {
		packed = 1 // each is refused
	}
	switch k := g.rng.IntN(100); {
	case g.next >= 9 && g.rng.IntN(100) == 0:
		return g.resize()
	case k < packed:
		return g.compressed()
	case k < 37:
		return op{kind: opSnapshot, seed: g.rng.Uint64N(1 << 32)}
	case k < 68:
		o := op{kind: opWrite, seed: g.rng.Uint64N(1 << 32)}
		if g.rng.IntN(8) == 0 {
			o.kind = opWriteV
		}
		o.off, o.n = g.guestRange()
		return o
	case k < 83:
		o := op{kind: opRead}
		if g.rng.IntN(8) == 0 {
			o.kind, o.seed = opReadV, g.rng.Uint64N(1<<32)
		}
		o.off, o.n = g.guestRange()
		if g.rng.IntN(30) == 0 {
			o.off, o.n = g.size-g.rng.Int64N(3000), g.rng.Int64N(6000)
		}
		return o
	case k < 88:
		o := op{kind: opExtents}
		o.off, o.n = g.guestRange()
		if g.rng.IntN(3) == 0 {
			o.n += g.rng.Int64N(8 * g.c.clusterSize)
		}
		return o
	case k < 95:
		return op{kind: opSync} // 7 %, so that every run has its 5
	case k < 98:
		if g.rng.IntN(6) == 0 {
			return g.emptying()
		}
		return op{kind: opReopen}
	case k < 99:
		// Past the end: refused, nothing is written.
		return op{kind: opWrite, off: g.size - g.rng.Int64N(1000), n: 1000 + g.rng.Int64N(5000), seed: g.rng.Uint64N(1 << 32)}
	}
	return op{kind: opWalk}
}

// compressed returns a WriteCompressed of one cluster, sometimes several, or the tail.
func (g *generator) compressed() op {
	cs := g.c.clusterSize
	o := op{kind: opWriteC, off: g.cluster() * cs, seed: g.rng.Uint64N(1 << 32)}
	o.n = cs
	if cs < 1<<20 && g.rng.IntN(6) == 0 {
		o.n = cs * (2 + g.rng.Int64N(4))
	}
	if cs > 64<<10 && g.rng.IntN(4) != 0 {
		o.seed = o.seed&^7 | 6 // mostly zeros, which is fast
	}
	if o.off >= g.size {
		o.off = (g.size - 1) / cs * cs
	}
	o.n = min(o.n, g.size-o.off)
	return o
}

// resize returns a resize: back to the size at the beginning, or to one not far from it. What must be filled with
// zeros, or is mapped, is bounded; devices have room for no more than the disk at the beginning.
func (g *generator) resize() op {
	base, cs := g.c.size(), g.c.clusterSize
	span := g.c.reach()
	if g.c.version == 2 && g.c.backed() {
		span = 10 * cs
	}
	o := op{kind: opResize, off: base}
	if g.size == base || g.rng.IntN(3) == 0 {
		o.off = max(base-g.rng.Int64N(span), 512) &^ 511
		if g.c.storage != "device" && g.rng.IntN(3) > 0 {
			o.off = base + g.rng.Int64N(span)&^511
			if g.rng.IntN(2) == 0 {
				o.off = max(g.size, base) + g.rng.Int64N(12*cs)&^511
				o.n = g.rng.Int64N(3)
			}
		}
	}
	g.size = o.off
	return o
}

// cluster returns the index of a guest cluster: the first of an L2 table that was not reached yet, or a
// hot one, or, with a data file that is sparse and cannot be packed again, any.
func (g *generator) cluster() int64 {
	perTable := g.c.reach() / g.c.clusterSize
	if t := g.next; t < g.c.tables() && t*g.c.reach() < g.size {
		g.next++
		return t * perTable
	}
	if g.c.external() && g.rng.IntN(3) != 0 {
		return g.rng.Int64N(g.size / g.c.clusterSize)
	}
	return g.hot[g.rng.IntN(len(g.hot))]
}

// guestRange returns a range within the disk: a few bytes, part of a cluster, a whole one, or several.
func (g *generator) guestRange() (off, n int64) {
	cs := g.c.clusterSize
	start := g.cluster() * cs
	const longest = 192 << 10 // of what is not a whole cluster
	switch k := g.rng.IntN(10); {
	case k < 3:
		off = start + g.rng.Int64N(cs)
		n = 1 + g.rng.Int64N(4096)
	case k < 6:
		off = start + g.rng.Int64N(cs)
		n = 1 + g.rng.Int64N(min(cs, longest))
	case k < 7:
		off = start + g.rng.Int64N(32)*(cs/32)
		n = max(cs/32, 1) * (1 + g.rng.Int64N(8))
		n = min(n, longest)
	case k < 9:
		off, n = start, cs
		if cs > longest && g.rng.IntN(8) != 0 {
			n = longest
		}
	default:
		off = start + g.rng.Int64N(cs)
		n = 1 + g.rng.Int64N(max(64<<10, 5*min(cs, longest)))
		if cs > longest {
			off = start + cs - g.rng.Int64N(longest)
		}
	}
	off = min(max(off, 0), g.size-1)
	return off, min(n, g.size-off)
}

// shrinkOps returns a short list of operations that still fails, by leaving out ever smaller parts of one
// that does. It calls fails at most budget times.
func shrinkOps(ops []op, budget int, fails func([]op) bool) []op {
	for part := max(len(ops)/2, 1); ; {
		removed := false
		for i := 0; i < len(ops); {
			if budget--; budget < 0 {
				return ops
			}
			rest := append(append([]op(nil), ops[:i]...), ops[min(i+part, len(ops)):]...)
			if fails(rest) {
				ops, removed = rest, true
			} else {
				i += part
			}
		}
		switch {
		case part > 1:
			part /= 2
		case !removed:
			return ops
		}
	}
}
