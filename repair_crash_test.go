package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// repairStatesEnv asks for the long run of TestRepairCrash, by the number of crash states in all:
//
//	QCOW2_REPAIR_STATES=20000 go test -run TestRepairCrash -timeout 60m -v .
const repairStatesEnv = "QCOW2_REPAIR_STATES"

// repairBase is a sound image that is damaged and repaired.
type repairBase struct {
	name   string
	create CreateOptions
	packed bool // with compressed clusters
	change func(t testing.TB, b []byte) []byte
}

// repairBases have every structure that a repair changes.
var repairBases = []repairBase{
	{name: "plain", create: CreateOptions{ClusterSize: 512}, packed: true},
	{name: "version 2", create: CreateOptions{ClusterSize: 1024, Version: 2}, packed: true},
	{name: "version 2 overlay", create: CreateOptions{ClusterSize: 512, Version: 2, BackingFile: "base", BackingFormat: "raw"}},
	{name: "one bit", create: CreateOptions{ClusterSize: 512, RefcountBits: 1}},
	{name: "snapshot", create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, packed: true, change: addTestSnapshot},
	{name: "bitmap", create: CreateOptions{ClusterSize: 4096, RefcountBits: 4}, packed: true, change: addTestBitmap},
	{name: "extended", create: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true, RefcountBits: 8}, packed: true},
	{name: "data file", create: CreateOptions{ClusterSize: 512, DataFile: "data"}},
	{name: "lazy", create: CreateOptions{ClusterSize: 512, LazyRefcounts: true}},
}

// baseNamed returns the base of the given name.
func baseNamed(t testing.TB, name string) *repairBase {
	t.Helper()
	i := slices.IndexFunc(repairBases, func(b repairBase) bool { return b.name == name })
	if i < 0 {
		t.Fatalf("no base is called %q", name)
	}
	return &repairBases[i]
}

// build returns the bytes of the image.
func (rb *repairBase) build(t testing.TB) *hostileImage {
	t.Helper()
	sc := faultScenario{size: 128 << 10, create: rb.create, change: rb.change}
	sc.prepare = []faultStep{{'w', 0, 20_000}, {'w', 60_000, 9_000}, {'w', 100_000, 300}}
	if rb.create.BackingFile != "" {
		sc.base = 128 << 10
	}
	if rb.packed {
		sc.prepare = append(sc.prepare, faultStep{'c', 1, 2})
	}
	disks, _ := sc.build(t)
	im := &hostileImage{b: disks["image"].Bytes()}
	var err error
	if im.h, err = readHeader(bytes.NewReader(im.b), int64(len(im.b))); err != nil {
		t.Fatal(err)
	}
	im.g = im.h.geometry()
	return im
}

// repairDamage is a way to damage an image. It reports false if the image has not got what it would damage.
type repairDamage struct {
	name string
	do   func(im *hostileImage, rng *rand.Rand) bool
}

// entry returns where a random active L2 entry is that satisfies ok, or 0.
func (im *hostileImage) entry(rng *rand.Rand, ok func(e uint64) bool) uint64 {
	var found []uint64
	for i := range uint64(im.h.l1Size) {
		l2 := im.u64(im.l1(i)) & offsetMask
		if l2 == 0 || l2 >= uint64(len(im.b)) {
			continue
		}
		for j := range uint64(1) << im.g.l2Bits {
			if at := l2 + j<<im.g.l2EntryBits; ok(im.u64(at)) {
				found = append(found, at)
			}
		}
	}
	if len(found) == 0 {
		return 0
	}
	return found[rng.IntN(len(found))]
}

// plainEntry reports whether e holds a plain cluster.
func plainEntry(e uint64) bool { return e&flagCompressed == 0 && e&offsetMask != 0 }

// someCluster returns the host offset of a random cluster: that of a table of any kind, or of guest data.
func (im *hostileImage) someCluster(rng *rand.Rand) uint64 {
	in := []uint64{im.h.l1Off, im.h.refTableOff, im.u64(im.refTable(0)), im.u64(im.l1(0)) & offsetMask}
	if im.h.nbSnapshots > 0 {
		in = append(in, im.h.snapshotsOff, im.u64(im.h.snapshotsOff+snapL1Off))
	}
	if im.h.bitmaps != nil {
		in = append(in, im.h.bitmaps.dirOff, im.u64(im.h.bitmaps.dirOff+bitmapTableOff))
	}
	if at := im.entry(rng, plainEntry); at != 0 && !im.h.hasDataFile() {
		in = append(in, im.u64(at)&offsetMask)
	}
	return in[rng.IntN(len(in))]
}

// someL1 returns where a random L1 entry is, behind the table in use if that has one entry alone.
func (im *hostileImage) someL1(rng *rand.Rand) uint64 {
	if im.h.l1Size > 1 {
		return im.l1(uint64(rng.IntN(int(im.h.l1Size))))
	}
	im.put(fieldL1Size, 4, 2)
	return im.l1(1)
}

// entangledDamages are those after which a cluster is more than one thing. What is something else too is copied
// before it is changed, so that what the guest sees stays even where it sees a table.
var entangledDamages = []repairDamage{
	{"L2 table of two entries", func(im *hostileImage, rng *rand.Rand) bool {
		at := im.someL1(rng)
		from := im.l1(uint64(rng.IntN(int(im.h.l1Size))))
		im.put(at, 8, im.u64(from))
		return at != from
	}},
	{"L2 table in something else", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(im.someL1(rng), 8, im.someCluster(rng)|flagCopied)
		return true
	}},
	{"data in something else", func(im *hostileImage, rng *rand.Rand) bool {
		at := im.entry(rng, plainEntry)
		im.put(at, 8, im.someCluster(rng)|flagCopied)
		return true
	}},
	{"L1 table in something else", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(fieldL1Off, 8, im.someCluster(rng))
		return true
	}},
	{"L1 table over what follows", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(fieldL1Size, 4, im.g.clusterSize/8*uint64(1+rng.IntN(8)))
		return true
	}},
	{"refcount table in something else", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(fieldRefTableOff, 8, im.someCluster(rng))
		return true
	}},
	{"refcount block in something else", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(im.refTable(uint64(rng.IntN(2))), 8, im.someCluster(rng))
		return true
	}},
	{"snapshot L1 table in something else", func(im *hostileImage, rng *rand.Rand) bool {
		if im.h.nbSnapshots > 0 {
			im.put(im.h.snapshotsOff+snapL1Off, 8, im.someCluster(rng))
		}
		return im.h.nbSnapshots > 0
	}},
	{"snapshot table in something else", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(fieldNbSnapshots, 4, 1)
		im.put(fieldSnapshotsOff, 8, im.someCluster(rng))
		return !im.h.hasDataFile() // which goes with no snapshots
	}},
	{"bitmap table in something else", func(im *hostileImage, rng *rand.Rand) bool {
		if im.h.bitmaps != nil {
			im.put(im.h.bitmaps.dirOff+bitmapTableOff, 8, im.someCluster(rng))
		}
		return im.h.bitmaps != nil
	}},
}

// repairDamages are the kinds of damage.
var repairDamages = []repairDamage{
	{"refcount table zeroed", func(im *hostileImage, rng *rand.Rand) bool {
		clear(im.b[im.h.refTableOff:][:im.h.refTableBytes()])
		return true
	}},
	{"refcount table nowhere", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(fieldRefTableOff, 8, 1<<40+uint64(rng.IntN(2))*512)
		return true
	}},
	{"refcount table of no clusters", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(fieldRefTableClusters, 4, 0)
		return true
	}},
	{"refcount block misaligned", func(im *hostileImage, rng *rand.Rand) bool {
		at := im.refTable(0)
		im.put(at, 8, im.u64(at)|1<<rng.IntN(9))
		return true
	}},
	{"refcount block missing", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(im.refTable(uint64(rng.IntN(2))), 8, 0)
		return true
	}},
	{"refcount block shared", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(im.refTable(1), 8, im.u64(im.refTable(0)))
		return true
	}},
	{"refcounts", func(im *hostileImage, rng *rand.Rand) bool {
		for range 1 + rng.IntN(6) {
			off := uint64(rng.IntN(len(im.b))) &^ (im.g.clusterSize - 1)
			if im.u64(im.refTable(off>>im.g.clusterBits>>im.g.refBlockBits)) != 0 {
				im.setRefcount(off, rng.Uint64()&maxRefcount(im.g.refcountOrder)&0xff)
			}
		}
		return true
	}},
	{"COPIED", func(im *hostileImage, rng *rand.Rand) bool {
		for range 4 {
			if at := im.entry(rng, plainEntry); at != 0 {
				im.put(at, 8, im.u64(at)^flagCopied)
			}
		}
		at := im.l1(uint64(rng.IntN(int(im.h.l1Size))))
		if im.u64(at) != 0 {
			im.put(at, 8, im.u64(at)^flagCopied)
		}
		return true
	}},
	// What two guest clusters share stays shared, with a refcount of two: the next write to either parts them. Where a
	// refcount of one bit cannot count so far, the repair does.
	{"cluster of two", func(im *hostileImage, rng *rand.Rand) bool {
		a, b := im.entry(rng, plainEntry), im.entry(rng, plainEntry)
		im.put(a, 8, im.u64(b))
		return a != b
	}},
	{"entry reserved", func(im *hostileImage, rng *rand.Rand) bool {
		at := im.entry(rng, plainEntry)
		im.put(at, 8, im.u64(at)|1<<(56+rng.IntN(6)))
		at = im.l1(0)
		im.put(at, 8, im.u64(at)|1<<rng.IntN(9))
		return true
	}},
	{"entry misaligned", func(im *hostileImage, rng *rand.Rand) bool {
		if im.g.clusterSize == 512 {
			return false // every offset that an entry can hold is that of a cluster
		}
		at := im.entry(rng, plainEntry)
		im.put(at, 8, im.u64(at)|im.g.clusterSize/2)
		return true
	}},
	{"entry past the end", func(im *hostileImage, rng *rand.Rand) bool {
		at := im.entry(rng, plainEntry)
		im.put(at, 8, 1<<40|flagCopied)
		return true
	}},
	{"L1 entry past the end", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(im.l1(uint64(rng.IntN(int(im.h.l1Size)))), 8, 1<<40|flagCopied)
		return true
	}},
	{"compressed COPIED", func(im *hostileImage, rng *rand.Rand) bool {
		at := im.entry(rng, func(e uint64) bool { return e&flagCompressed != 0 })
		if at != 0 {
			im.put(at, 8, im.u64(at)|flagCopied)
		}
		return at != 0
	}},
	{"compressed with subclusters", func(im *hostileImage, rng *rand.Rand) bool {
		at := im.entry(rng, func(e uint64) bool { return e&flagCompressed != 0 })
		if at == 0 || !im.g.extendedL2 {
			return false
		}
		im.put(at+8, 8, 1)
		return true
	}},
	{"leak without COPIED", func(im *hostileImage, rng *rand.Rand) bool {
		at := im.entry(rng, func(e uint64) bool { return plainEntry(e) && e&flagCopied != 0 && e&offsetMask < uint64(len(im.b)) })
		if at == 0 || im.g.refcountOrder == 0 {
			return false
		}
		im.setRefcount(im.u64(at)&offsetMask, 2)
		im.put(at, 8, im.u64(at)&^flagCopied)
		return true
	}},
	{"subclusters", func(im *hostileImage, rng *rand.Rand) bool {
		if im.g.extendedL2 {
			at := im.entry(rng, plainEntry)
			im.put(at+8, 8, im.u64(at+8)|1<<(32+rng.IntN(32)))
		}
		return im.g.extendedL2
	}},
	{"snapshot incomplete", func(im *hostileImage, rng *rand.Rand) bool {
		if im.h.nbSnapshots > 0 {
			im.put(im.h.snapshotsOff+snapExtraSize, 4, uint64(rng.IntN(2))*8)
		}
		return im.h.nbSnapshots > 0
	}},
	{"snapshot with much extra data", func(im *hostileImage, rng *rand.Rand) bool {
		if im.h.nbSnapshots > 0 {
			s := snapshotSpec{l1Off: im.u64(im.h.snapshotsOff + snapL1Off), l1Size: im.h.l1Size, id: "1", name: "before"}
			s.extra = append(snapshotExtra(0, im.h.size), make([]byte, maxSnapshotExtra+rng.IntN(3000))...)
			// Behind everything, where no refcount is: that is mended too.
			im.put(fieldSnapshotsOff, 8, im.g.clusters(uint64(len(im.b)))<<im.g.clusterBits)
			im.b = append(im.b, make([]byte, -uint64(len(im.b))&(im.g.clusterSize-1))...)
			im.b = s.append(im.b)
		}
		return im.h.nbSnapshots > 0
	}},
	{"snapshots beyond the table", func(im *hostileImage, rng *rand.Rand) bool {
		im.put(fieldNbSnapshots, 4, uint64(1+rng.IntN(2)*70_000))
		if im.h.nbSnapshots == 0 {
			im.put(fieldSnapshotsOff, 8, uint64(len(im.b))&^(im.g.clusterSize-1))
		}
		return true
	}},
	{"snapshot L1 table", func(im *hostileImage, rng *rand.Rand) bool {
		if im.h.nbSnapshots > 0 {
			im.put(im.h.snapshotsOff+snapL1Off, 8, im.u64(im.h.snapshotsOff+snapL1Off)|8)
		}
		return im.h.nbSnapshots > 0
	}},
	{"bitmap directory", func(im *hostileImage, rng *rand.Rand) bool {
		if im.h.bitmaps != nil {
			im.put(im.h.bitmaps.dirOff+bitmapGranularity, 1, 77)
		}
		return im.h.bitmaps != nil
	}},
	{"bitmap table", func(im *hostileImage, rng *rand.Rand) bool {
		if im.h.bitmaps != nil {
			im.put(im.u64(im.h.bitmaps.dirOff+bitmapTableOff), 8, 1<<40+8)
		}
		return im.h.bitmaps != nil
	}},
}

// testData is the external data file of the images that have one: no cluster of it is like another.
type testData struct{}

// ReadAt implements io.ReaderAt.
func (testData) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = byte((off+int64(i))>>9*37 + 11)
	}
	return len(p), nil
}

// snapshotContent is where the content of the first snapshot begins in what readClusters returns.
const snapshotContent = 1 << 40

// readClusters returns what the guest of the image in s reads, by cluster, and what the first snapshot holds; an image
// that does not open holds nothing that is read.
func readClusters(s Storage, clusterSize int64) map[int64][]byte {
	img, err := OpenStorage(s, &OpenOptions{NoBacking: true, DataFile: NewReaderStorage(testData{}, 1<<20)})
	if err != nil {
		return nil
	}
	defer img.Close()
	content := make(map[int64][]byte)
	read := func(r io.ReaderAt, size, at int64) {
		for off := int64(0); off < size; off += clusterSize {
			p := make([]byte, min(clusterSize, size-off))
			if _, err := r.ReadAt(p, off); err == nil || err == io.EOF {
				content[at+off] = p
			}
		}
	}
	read(img, img.Size(), 0)
	size, err := s.Size()
	if err == nil && len(img.snapshots) > 0 && img.snapshots[0].checkL1(&img.m.geometry) == nil {
		r, err := refwalk.NewReader(refwalk.Source{Image: s, Size: size, Data: testData{}, Snapshot: 1})
		if err == nil {
			read(r, min(r.Size(), 1<<20), snapshotContent)
		}
	}
	return content
}

// lostContent returns what of before is not in now; "" if it is all there.
func lostContent(before, now map[int64][]byte) string {
	for off, p := range before {
		if q, ok := now[off]; !ok || !bytes.Equal(p, q) {
			return fmt.Sprintf("the cluster of guest %#x could be read before, and reads other content now (readable %v)", off, ok)
		}
	}
	return ""
}

// repairStorage repairs the image in s.
func repairStorage(s Storage, scope RepairScope) (*CheckResult, error) {
	img, err := OpenStorage(s, &OpenOptions{ReadWrite: true, CheckOnly: true})
	if err != nil {
		return nil, err
	}
	res, err := img.Check(context.Background(), &CheckOptions{Repair: scope})
	return res, errors.Join(err, img.Close())
}

// checkRepaired checks that an image which was repaired is without a flaw, and holds what could be read before.
func checkRepaired(d *crashtest.Disk, res *CheckResult, err error, before map[int64][]byte, clusterSize int64) error {
	if err != nil || !res.Clean() {
		return fmt.Errorf("repair: %+v, %w", res, err)
	}
	rep, err := walkFile(d)
	if err != nil {
		return err
	}
	if rep.Overlaps > 0 {
		for _, f := range rep.Findings {
			// Data may be shared, and an L2 table by L1 entries: their refcounts say so.
			one, other, ok := strings.Cut(f, " and also ")
			isData := func(s string) bool { return strings.Contains(s, "data (of") }
			isL2 := func(s string) bool { return strings.Contains(s, "L2 table (of") }
			if ok && !(isData(one) && isData(other)) && !(isL2(one) && isL2(other)) {
				return fmt.Errorf("after the repair: %s", f)
			}
		}
	}
	if rep.Overlaps = 0; !rep.Clean() {
		return fmt.Errorf("after the repair: dirty %v, corrupt %v: %s", rep.Dirty(), rep.Header.Corrupt(), strings.Join(rep.Findings, "; "))
	}
	if lost := lostContent(before, readClusters(crashStorage{d}, clusterSize)); lost != "" {
		return errors.New(lost)
	}
	return nil
}

// smallDamages are the names of those that leave all others possible.
var smallDamages = []string{"refcounts", "COPIED", "entry reserved", "entry past the end"}

// damagedImages calls f with every base damaged in every way, by the seed, half of them in a small way besides.
func damagedImages(t *testing.T, seed uint64, f func(t *testing.T, name string, im *hostileImage, rng *rand.Rand)) {
	for i := range repairBases {
		rb := &repairBases[i]
		t.Run(rb.name, func(t *testing.T) {
			t.Parallel()
			sound := rb.build(t)
			for _, d := range slices.Concat(repairDamages, entangledDamages) {
				rng := rand.New(rand.NewPCG(seed, uint64(i)))
				im := &hostileImage{b: bytes.Clone(sound.b), h: sound.h, g: sound.g}
				for _, small := range repairDamages {
					if small.name != d.name && slices.Contains(smallDamages, small.name) && rng.IntN(8) == 0 {
						small.do(im, rng)
					}
				}
				if !d.do(im, rng) {
					continue
				}
				// Half of the images were marked, as a writer that met the damage would have.
				marked := im.h.version >= 3 && rng.IntN(2) == 0
				if marked {
					im.b[fieldIncompatible+7] |= incompatCorrupt
				}
				f(t, fmt.Sprintf("%s/%s seed %d", rb.name, d.name, seed), im, rng)
			}
		})
	}
}

// TestRepair damages images, repairs them, and finds nothing afterwards, in the image or to repair.
func TestRepair(t *testing.T) {
	seeds := uint64(8)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		damagedImages(t, seed, func(t *testing.T, name string, im *hostileImage, rng *rand.Rand) {
			cluster := int64(im.g.clusterSize)
			d := crashtest.NewDisk(im.b)
			before := readClusters(crashStorage{d}, cluster)
			res, err := repairStorage(crashStorage{d}, RepairAll)
			if err := checkRepaired(d, res, err, before, cluster); err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			once := d.Bytes()
			res, err = repairStorage(crashStorage{d}, RepairAll)
			if err != nil || !res.Clean() || res.CorruptionsFixed+res.LeaksFixed != 0 || !bytes.Equal(once, d.Bytes()) {
				t.Errorf("%s: a second repair: %+v, %v, changed bytes: %v", name, res, err, !bytes.Equal(once, d.Bytes()))
			}
		})
	}
}

// TestRepairCrash interrupts repairs at every host operation: each state that a crash may leave holds what could be
// read before, is in no respect worse than the image was, carries no bit that says it is sound while it is not, and
// is repaired by a second run.
func TestRepairCrash(t *testing.T) {
	o, seeds := crashtest.Options{PerPoint: 2, Every: 8}, uint64(1)
	if testing.Short() {
		o = crashtest.Options{PerPoint: 1, Every: 16}
	}
	if n, err := strconv.Atoi(os.Getenv(repairStatesEnv)); err == nil {
		o, seeds = crashtest.Options{PerPoint: 12}, uint64(max(1, n/800))
	}
	total := make(chan crashtest.Stats, 1)
	total <- crashtest.Stats{}
	t.Run("seeds", func(t *testing.T) {
		for seed := range seeds {
			damagedImages(t, 100+seed, func(t *testing.T, name string, im *hostileImage, rng *rand.Rand) {
				stats, err := repairCrash(im, rng, o, repairSyncNone)
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
				sum := <-total
				sum.Add(stats)
				total <- sum
			})
		}
	})
	t.Logf("crash states of repairs: %v", <-total)
}

// worse returns in which respect the walk now found more than the walk before: counts too low, flags wrong, bad
// entries. Where there was nothing to walk, nothing can be worse.
func worse(before, now *refwalk.Report) string {
	if before == nil || now == nil {
		return ""
	}
	for _, n := range []struct {
		what        string
		before, now int
	}{
		{"I1: counts too low", before.TooLow, now.TooLow},
		{"I3: bad entries", before.BadEntries, now.BadEntries},
		{"I7: wrong COPIED", before.CopiedWrong, now.CopiedWrong},
	} {
		if n.now > n.before {
			if n.what[:2] == "I7" && before.SnapshotsUnread {
				// A repair counts what such a table refers to as well, and raises the counts of what it lies over. COPIED in
				// an L2 table that it lies over is left alone until the two are parted; then the counts are too high.
				continue
			}
			return fmt.Sprintf("%s: %d, and %d before the repair: %s", n.what, n.now, n.before, strings.Join(now.Findings, "; "))
		}
	}
	return ""
}

// walkDisk walks the image in d; nil if there is nothing to walk.
func walkDisk(d *crashtest.Disk) *refwalk.Report {
	rep, err := walkFile(d)
	if err != nil {
		return nil
	}
	return rep
}

// repairCrash records the repair of im, without the sync skip, and looks at states of its crashes, as o says.
func repairCrash(im *hostileImage, rng *rand.Rand, o crashtest.Options, skip repairSync) (crashtest.Stats, error) {
	cluster := int64(im.g.clusterSize)
	rec := crashtest.NewRecorder()
	file := rec.Regular("image", im.b)
	before := readClusters(crashStorage{file}, cluster)
	// An entry that named what lies past the end of the file names something once the file has grown, which is the same
	// flaw: what a crash leaves is compared with the damaged image in front of the same end.
	walked := func(now []byte) *refwalk.Report {
		n := min(len(im.b), len(now))
		return walkDisk(crashtest.NewDisk(slices.Concat(im.b[:n], now[n:])))
	}
	img, err := OpenStorage(crashStorage{file}, &OpenOptions{ReadWrite: true, CheckOnly: true})
	if err != nil {
		return crashtest.Stats{}, err
	}
	_, err = img.Check(context.Background(), &CheckOptions{Repair: RepairAll, test: testHooks{repairSkip: skip}})
	if err := errors.Join(err, img.Close()); err != nil {
		return crashtest.Stats{}, err
	}
	marked := im.b[fieldIncompatible+7]&incompatCorrupt != 0 && im.h.version >= 3
	return rec.States(rng, o, func(s *crashtest.State) error {
		d := s.Disk(file)
		if lost := lostContent(before, readClusters(crashStorage{d}, cluster)); lost != "" {
			return fmt.Errorf("%s: %s", s, lost)
		}
		rep := walkDisk(d)
		if w := worse(walked(d.Bytes()), rep); w != "" {
			return fmt.Errorf("%s: %s", s, w)
		}
		if rep != nil && marked && !rep.Header.Corrupt() && rep.Corruptions() > rep.Overlaps {
			return fmt.Errorf("%s: the corrupt bit is off, but: %s", s, strings.Join(rep.Findings, "; "))
		}
		res, err := repairStorage(crashStorage{d}, RepairAll)
		if err := checkRepaired(d, res, err, before, cluster); err != nil {
			return fmt.Errorf("%s: again: %w", s, err)
		}
		return nil
	})
}

// TestRepairBroken leaves out one sync of a repair at a time, and wants the crash states to show it, under the
// number of the invariant that the sync is for, or as content that is lost. The same repairs with the sync show nothing.
func TestRepairBroken(t *testing.T) {
	tests := []struct {
		name         string
		skip         repairSync
		base, damage string
		want         string
	}{
		{"raised before COPIED is off", repairSyncClear, "extended", "entry misaligned", "I7:"},
		{"header before its table", repairSyncTable, "snapshot", "refcount block shared", "I1:"},
		{"L1 table before its copy", repairSyncCopies, "snapshot", "snapshot L1 table in something else", "could be read before"},
		{"L2 table before its copy", repairSyncCopies, "snapshot", "L2 table in something else", "could be read before"},
		{"lowered before the entry", repairSyncMend, "extended", "compressed with subclusters", "I1:"},
		{"COPIED before the count", repairSyncLower, "plain", "leak without COPIED", "I7:"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rb := baseNamed(t, tt.base)
			damages := slices.Concat(repairDamages, entangledDamages)
			damage := damages[slices.IndexFunc(damages, func(d repairDamage) bool { return d.name == tt.damage })]
			for seed := range uint64(8) {
				im := rb.build(t)
				if !damage.do(im, rand.New(rand.NewPCG(seed, 0))) {
					t.Fatal("the image has not got what is to be damaged")
				}
				if _, err := repairCrash(im, rand.New(rand.NewPCG(seed, 1)), crashtest.Options{PerPoint: 16}, repairSyncNone); err != nil {
					t.Fatalf("with the sync: %v", err)
				}
				if _, err := repairCrash(im, rand.New(rand.NewPCG(seed, 1)), crashtest.Options{PerPoint: 16}, tt.skip); err != nil {
					if !strings.Contains(err.Error(), tt.want) {
						t.Errorf("%v, want %s", err, tt.want)
					}
					return
				}
			}
			t.Error("no crash state shows it")
		})
	}
}

// TestRepairFaults fails host operations of repairs once, one in five or, in the long run, each: the call says so,
// nothing that could be read is lost, and a second repair ends what the first began.
func TestRepairFaults(t *testing.T) {
	stride := 5
	if testing.Short() {
		stride = 20
	}
	if os.Getenv(repairStatesEnv) != "" {
		stride = 1
	}
	damagedImages(t, 200, func(t *testing.T, name string, im *hostileImage, rng *rand.Rand) {
		cluster := int64(im.g.clusterSize)
		before := readClusters(crashStorage{crashtest.NewDisk(im.b)}, cluster)
		for _, fault := range []crashtest.Fault{{Err: syscall.EIO}, {Err: syscall.ENOSPC, Short: true, Match: hostChange}, {Err: syscall.EIO, After: true, Match: hostChange}} {
			for at := rng.IntN(stride); ; at += stride {
				host := newFaultHost(map[string]*crashtest.Disk{"image": crashtest.NewDisk(im.b)})
				fault.At = at
				host.faults.Set(fault)
				_, err := repairStorage(host.storage("image"), RepairAll)
				met := host.faults.Fired() > 0
				host.faults.Heal()
				if met && !errors.Is(err, crashtest.ErrInjected) {
					t.Errorf("%s: fault at operation %d: error %v", name, at, err)
				}
				host.checkIdle(t)
				d := host.disks["image"]
				if lost := lostContent(before, readClusters(crashStorage{d}, cluster)); lost != "" {
					t.Errorf("%s: fault at operation %d: %s", name, at, lost)
				}
				res, err := repairStorage(host.storage("image"), RepairAll)
				if err := checkRepaired(d, res, err, before, cluster); err != nil {
					t.Errorf("%s: after the fault at operation %d: %v", name, at, err)
				}
				if !met || t.Failed() {
					break
				}
			}
		}
	})
}

// TestRepairLeaks lowers refcounts and touches nothing else; where that would not do, it refuses.
func TestRepairLeaks(t *testing.T) {
	im := baseNamed(t, "plain").build(t)
	free := uint64(len(im.b)) &^ (im.g.clusterSize - 1)
	im.b = append(im.b[:free], make([]byte, 2*im.g.clusterSize)...)
	im.setRefcount(free, 3)
	used := im.u64(im.entry(rand.New(rand.NewPCG(1, 1)), plainEntry)) & offsetMask
	im.setRefcount(used, 2)
	d := crashtest.NewDisk(im.b)
	before := readClusters(crashStorage{d}, int64(im.g.clusterSize))
	res, err := repairStorage(crashStorage{d}, RepairLeaks)
	if err := checkRepaired(d, res, err, before, int64(im.g.clusterSize)); err != nil {
		t.Error(err)
	}
	if res.LeaksFixed != 2 {
		t.Errorf("fixed %d leaks, not 2", res.LeaksFixed)
	}
	clear(im.b[im.h.refTableOff:][:im.h.refTableBytes()])
	d = crashtest.NewDisk(im.b)
	if _, err := repairStorage(crashStorage{d}, RepairLeaks); !errors.Is(err, ErrCorrupt) || !bytes.Equal(d.Bytes(), im.b) {
		t.Errorf("without refcounts: error %v, want ErrCorrupt and nothing changed", err)
	}
}

// TestRepairSnapshotExtra cuts the extra data of a snapshot to what a reader takes, and keeps the snapshot and the
// others with all that is known of them.
func TestRepairSnapshotExtra(t *testing.T) {
	im := baseNamed(t, "snapshot").build(t)
	specs := make([]snapshotSpec, 3)
	for i := range specs {
		specs[i] = snapshotSpec{l1Off: im.u64(im.h.snapshotsOff + snapL1Off), l1Size: im.h.l1Size, id: strconv.Itoa(i + 1), name: "n" + strconv.Itoa(i),
			sec: uint32(i), extra: snapshotExtra(0, im.h.size)}
	}
	specs[1].extra = append(specs[1].extra, bytes.Repeat([]byte{0xab}, maxSnapshotExtra)...)
	im.b = append(im.b, make([]byte, -uint64(len(im.b))&(im.g.clusterSize-1))...)
	im.put(fieldSnapshotsOff, 8, uint64(len(im.b)))
	im.put(fieldNbSnapshots, 4, uint64(len(specs)))
	table := []byte{}
	for _, s := range specs {
		table = s.append(table)
	}
	im.b = append(im.b, table...)
	if res, found := findingsOf(t, crashStorage{crashtest.NewDisk(im.b)}, CheckOptions{}); res.CheckErrors != 1 {
		t.Errorf("a check that repairs nothing: %+v, %v", *res, found)
	}
	d := crashtest.NewDisk(im.b)
	res, found := findingsOf(t, crashStorage{d}, CheckOptions{Repair: RepairAll})
	cut := slices.IndexFunc(found, func(f Finding) bool { return f.Kind == FindingSnapshotExtra })
	if !res.Clean() || cut < 0 || found[cut].Found != uint64(len(specs[1].extra)) {
		t.Errorf("repair: %+v, %v", *res, found)
	}
	img, err := OpenStorage(crashStorage{d}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if len(img.snapshots) != len(specs) {
		t.Fatalf("%d snapshots, want %d", len(img.snapshots), len(specs))
	}
	for i, s := range img.snapshots {
		want := specs[i]
		if s.id != want.id || s.name != want.name || s.l1Off != want.l1Off || s.dateSec != want.sec || !bytes.Equal(s.extra, want.extra[:min(len(want.extra), maxSnapshotExtra)]) {
			t.Errorf("snapshot %d is %+v", i, s)
		}
	}
}

// TestRepairTwoEntries repairs images in which two active L1 entries name one L2 table, and writes to both: each
// keeps its own content.
func TestRepairTwoEntries(t *testing.T) {
	for _, name := range []string{"plain", "version 2", "one bit", "data file"} {
		t.Run(name, func(t *testing.T) {
			im := baseNamed(t, name).build(t)
			im.put(im.l1(1), 8, im.u64(im.l1(0)))
			d := crashtest.NewDisk(im.b)
			open := &OpenOptions{ReadWrite: true}
			if im.h.hasDataFile() {
				p := make([]byte, im.h.size)
				testData{}.ReadAt(p, 0)
				open.DataFile = crashStorage{crashtest.NewDisk(p)}
			}
			before := readClusters(crashStorage{d}, int64(im.g.clusterSize))
			if res, err := repairStorage(crashStorage{d}, RepairAll); err != nil || !res.Clean() {
				t.Fatalf("repair: %+v, %v", res, err)
			}
			if lost := lostContent(before, readClusters(crashStorage{d}, int64(im.g.clusterSize))); lost != "" {
				t.Error(lost)
			}
			img, err := OpenStorage(crashStorage{d}, open)
			if err != nil {
				t.Fatal(err)
			}
			model := make([]byte, img.Size())
			if _, err := img.ReadAt(model, 0); err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(7, 7))
			for i := range 200 {
				off := rng.Int64N(2*int64(im.g.clusterSize)<<im.g.l2Bits - 1000)
				off = min(off, img.Size()-1000)
				p := model[off : off+1+rng.Int64N(999)]
				for k := range p {
					p[k] = byte(rng.Uint32())
				}
				if _, err := img.WriteAt(p, off); err != nil {
					t.Fatal(err)
				}
				if i%50 == 0 {
					if err := errors.Join(img.Sync(), checkList(img)); err != nil {
						t.Fatalf("after write %d: %v", i, err)
					}
				}
			}
			got := make([]byte, len(model))
			if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
				t.Errorf("other content than was written: %v", err)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if res, found := findingsOf(t, crashStorage{d}, CheckOptions{}); res.Corruptions != res.LostCopied || res.Unreadable+res.Shared > 0 {
				t.Errorf("after Close: %+v, %v", *res, found)
			}
		})
	}
}

// TestRepairTooMuch repairs an image whose parting would take more copies than a repair makes: the findings stay, the
// bits that keep writers out too, and a second repair changes nothing.
func TestRepairTooMuch(t *testing.T) {
	const clusterSize = 2 << 20
	sc := faultScenario{size: 8 << 20, create: CreateOptions{ClusterSize: clusterSize, DataFile: "data"}, prepare: []faultStep{{'w', 0, 1000}}}
	disks, _ := sc.build(t)
	im := &hostileImage{b: disks["image"].Bytes()}
	var err error
	if im.h, err = readHeader(bytes.NewReader(im.b), int64(len(im.b))); err != nil {
		t.Fatal(err)
	}
	im.g = im.h.geometry()
	entries := uint64(maxPartBytes/clusterSize + 2)
	im.put(fieldL1Size, 4, entries)
	for i := range entries {
		im.put(im.l1(i), 8, im.u64(im.l1(0)))
	}
	im.b[fieldIncompatible+7] |= incompatCorrupt
	d := crashtest.NewDisk(im.b)
	res, err := repairStorage(crashStorage{d}, RepairAll)
	if err != nil || res.Unreadable != int64(entries-1) || d.Bytes()[fieldIncompatible+7]&incompatCorrupt == 0 {
		t.Errorf("repair: %+v, %v, bits %#x", res, err, d.Bytes()[fieldIncompatible+7])
	}
	once := d.Bytes()
	if res, err = repairStorage(crashStorage{d}, RepairAll); err != nil || res.Unreadable != int64(entries-1) || !bytes.Equal(once, d.Bytes()) {
		t.Errorf("a second repair: %+v, %v, changed %v", res, err, !bytes.Equal(once, d.Bytes()))
	}
	im.put(fieldL1Size, 4, 4) // few enough
	d = crashtest.NewDisk(im.b)
	if res, err = repairStorage(crashStorage{d}, RepairAll); err != nil || !res.Clean() || d.Bytes()[fieldIncompatible+7]&incompatCorrupt != 0 {
		t.Errorf("repair of few: %+v, %v", res, err)
	}
}
