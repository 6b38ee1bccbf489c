package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-qcow2/qcow2/internal/qemutest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// The tests of this file repair the damaged images of TestCheckParity, and sound ones whose refcounts were taken
// away, and set our repair beside that of qemu-img check. The campaign is
//
//	QCOW2_PARITY_IMAGES=1000 QCOW2_PARITY_SEED=7 go test -run TestRepairParity -timeout 30m -v .
//
// and QCOW2_PARITY_ONLY=k looks at image k alone.

// parityRepairTimeout bounds a repair by QEMU, which takes long where a table is read again for each entry.
const parityRepairTimeout = 3 * time.Second

// pagedStorage is a Storage of a pagedFile.
type pagedStorage struct {
	BaseStorage
	f *pagedFile
}

// ReadAt implements Storage.
func (s *pagedStorage) ReadAt(p []byte, off int64) (int, error) { return s.f.ReadAt(p, off) }

// WriteAt implements Storage.
func (s *pagedStorage) WriteAt(p []byte, off int64) (int, error) {
	s.f.write(p, off)
	return len(p), nil
}

// Size implements Storage.
func (s *pagedStorage) Size() (int64, error) { return s.f.size, nil }

// Truncate implements Storage.
func (s *pagedStorage) Truncate(size int64) error {
	s.f.truncate(size)
	return nil
}

// Sync implements Storage.
func (s *pagedStorage) Sync() error { return nil }

// Lock implements Storage: nobody else has the file.
func (s *pagedStorage) Lock(LockRole) error { return nil }

// Unlock implements Storage.
func (s *pagedStorage) Unlock() error { return nil }

// equal reports whether both files hold the same bytes.
func (f *pagedFile) equal(g *pagedFile) bool {
	within := func(a, b *pagedFile) bool {
		for i, page := range a.pages {
			if other := b.pages[i]; other != page && (other == nil && !allZero(page[:]) || other != nil && *other != *page) {
				return false
			}
		}
		return true
	}
	return f.size == g.size && within(f, g) && within(g, f)
}

// contentSeed makes the sums of contents of one run comparable.
var contentSeed = maphash.MakeSeed()

// contentUnit returns in bytes what is read at once: a cluster, or a subcluster, since some of a cluster may be in the
// backing file, which is not read.
func contentUnit(clusterSize int64, extended bool) int64 {
	if extended {
		return clusterSize / 32
	}
	return clusterSize
}

// sumContent returns a sum of every unit of clusterSize bytes of a disk of size bytes that r can read, by guest offset. It stops at
// limit.
func sumContent(r io.ReaderAt, size, limit, clusterSize int64) map[int64][]byte {
	sums := make(map[int64][]byte)
	p, zeros := make([]byte, clusterSize), []byte("zeros")
	for off := int64(0); off < min(size, limit); off += clusterSize {
		q := p[:min(clusterSize, size-off)]
		switch _, err := r.ReadAt(q, off); {
		case err != nil && err != io.EOF:
		case allZero(q):
			sums[off] = zeros
		default:
			sums[off] = binary.BigEndian.AppendUint64(nil, maphash.Bytes(contentSeed, q))
		}
	}
	return sums
}

// contents is what can be read of an image: sums by guest offset, of the disk as our library reads it, and of each
// snapshot as the walker does. A disk or snapshot that cannot be read at all is nil.
type contents struct {
	disk      map[int64][]byte
	snapshots []map[int64][]byte
}

// contentsOf reads all of the image f.
func (img *poolImage) contentsOf(t testing.TB, f *pagedFile) (c contents) {
	t.Helper()
	limit := 2 * img.diskSize()
	err := watched(t, "reading the disk", func(context.Context) error {
		o := &OpenOptions{NoBacking: true}
		if img.external {
			o.DataFile = NewReaderStorage(img.data, img.data.size)
		}
		disk, err := OpenStorage(NewReaderStorage(f, f.size), o)
		if err != nil {
			return nil // nothing can be read
		}
		g := disk.hdr.geometry()
		c.disk = sumContent(disk, disk.Size(), limit, contentUnit(int64(g.clusterSize), g.extendedL2))
		return disk.Close()
	})
	if err != nil {
		t.Error(err)
	}
	h, err := refwalk.ParseHeader(f, f.size)
	if err != nil {
		return c
	}
	for i := range min(int(h.Snapshots), 8) {
		src := refwalk.Source{Image: f, Size: f.size, Snapshot: i + 1}
		if img.external {
			src.Data = img.data
		}
		r, err := refwalk.NewReader(src)
		if err != nil {
			c.snapshots = append(c.snapshots, nil)
			continue
		}
		c.snapshots = append(c.snapshots, sumContent(r, r.Size(), limit, contentUnit(1<<h.ClusterBits, h.ExtendedL2())))
	}
	return c
}

// openForCheck opens the image f for a check and counts its references.
func openForCheck(f *pagedFile) (*checker, error) {
	img, err := OpenStorage(NewReaderStorage(f, f.size), &OpenOptions{CheckOnly: true})
	if err != nil {
		return nil, err
	}
	c := newChecker(context.Background(), img.host, img.hdr, f.size, &CheckOptions{})
	return c, errors.Join(c.countAll(), img.Close())
}

// tables returns how many tables lie in each host cluster of the image, by number.
func (c *checker) tables() map[uint64]int {
	in := make(map[uint64]int)
	add := func(off, n uint64) {
		for ci := off >> c.clusterBits; n > 0 && c.inside(off, n) && ci <= (off+n-1)>>c.clusterBits; ci++ {
			in[ci]++
		}
	}
	h := c.hdr
	add(0, c.clusterSize)
	add(h.l1Off, h.l1Bytes())
	add(h.snapshotsOff, c.snapBytes)
	for _, s := range c.snapshotL1s() {
		add(s.lo, s.hi-s.lo)
	}
	for _, l2 := range append(slices.Clone(c.l2), c.misplaced...) {
		add(l2.off, c.clusterSize)
	}
	if c.refTable != nil {
		add(h.refTableOff, h.refTableBytes())
		for i := range c.refTable.n {
			if off := c.refTable.load(i) &^ refTableReserved; off != 0 {
				add(off, c.clusterSize)
			}
		}
	}
	if h.bitmaps != nil {
		add(h.bitmaps.dirOff, h.bitmaps.dirSize)
		entries, err := readBitmapDirectory(c.h.s, int64(c.size), h, Limits{MetadataBytes: maxBitmapDirBytes})
		for i := range entries {
			if err == nil {
				add(entries[i].tableOff, uint64(entries[i].tableSize)*8)
			}
		}
	}
	if h.crypto != nil {
		add(h.crypto.off, h.crypto.length)
	}
	return in
}

// changes reports whether a repair may change what the guest reads at guest in the disk with the L1 table at l1Off: it
// is in the header, or in what the walker reads and no reader may accept, which is zeros where version 2 has a zero flag.
func (c *checker) changes(l1Off, guest uint64) bool {
	word := func(off uint64) uint64 {
		var p [16]byte
		c.h.readFull(p[:], off)
		return binary.BigEndian.Uint64(p[:])
	}
	l2 := word(l1Off+guest>>(c.clusterBits+c.l2Bits)*l1EntrySize) & offsetMask
	e := word(l2 + guest>>c.clusterBits&(1<<c.l2Bits-1)<<c.l2EntryBits)
	if e&flagCompressed == 0 {
		return c.version2 && e&flagZero != 0
	}
	off, _ := c.compressed(e)
	return off < c.clusterSize
}

// lost returns what could be read of the image f before its repair and reads other content now; "" if it is all
// there. It leaves out what a repair may change, and reports how many clusters those are.
func (img *poolImage) lost(t testing.TB, f *pagedFile, before, now contents) (lost string, left int) {
	t.Helper()
	c, err := openForCheck(f)
	if err != nil {
		return "", 0
	}
	compare := func(what string, l1Off uint64, before, now map[int64][]byte) {
		for off, p := range before {
			q, ok := now[off]
			switch {
			case bytes.Equal(p, q):
			case c.changes(l1Off, uint64(off)):
				left++
			case lost == "":
				lost = fmt.Sprintf("%s: the cluster of guest %#x could be read before, and reads other content now (readable %v)", what, off, ok)
			}
		}
	}
	compare("disk", c.hdr.l1Off, before.disk, now.disk)
	for i := range min(len(before.snapshots), len(c.snapshots)) {
		s := &c.snapshots[i]
		if s.checkL1(&c.geometry) != nil || !c.inside(s.l1Off, max(uint64(s.l1Size)*l1EntrySize, 1)) {
			continue // no reader accepts it
		}
		var content map[int64][]byte
		if i < len(now.snapshots) {
			content = now.snapshots[i]
		}
		compare(fmt.Sprintf("snapshot %d", i+1), s.l1Off, before.snapshots[i], content)
	}
	return lost, left
}

// repairOutcome is what became of the repair of a damaged image: the name of the class of those that cannot be
// repaired, or "", and what is wrong with it.
type repairOutcome struct {
	class  string
	faults []string
	shared int // clusters that were left out of the comparison
	first  *CheckResult
}

// fault notes what is wrong.
func (o *repairOutcome) fault(format string, args ...any) {
	o.faults = append(o.faults, fmt.Sprintf(format, args...))
}

// repairAll repairs the damaged image f, and judges what became of it.
func (img *poolImage) repairAll(t testing.TB, dir poolDir, what string, f *pagedFile) (o repairOutcome) {
	t.Helper()
	before := img.contentsOf(t, f)
	now := &pagedStorage{f: f.clone()}
	repair := checkStorage(t, what, now, RepairAll)
	o.first = repair.res
	if repair.err != nil || !repair.res.Clean() {
		if o.class = unrepairable(now.f, repair); o.class == "" {
			o.fault("repair: %v", repair)
		}
	}
	var lost string
	if errors.Is(repair.err, ErrCorrupt) && !now.f.equal(f) {
		o.fault("a repair that was refused changed the image: %v", repair)
	}
	if lost, o.shared = img.lost(t, f, before, img.contentsOf(t, now.f)); lost != "" {
		o.fault("%s", lost)
	}
	once := now.f.clone()
	again := checkStorage(t, what, now, RepairAll)
	if !now.f.equal(once) {
		o.fault("a second repair changes the image: %v", again)
	}
	if o.class != "" {
		return o
	}
	if again.err != nil || !again.res.Clean() || again.res.CorruptionsFixed+again.res.LeaksFixed > 0 {
		o.fault("a second repair: %v", again)
	}
	path := img.place(t, dir, now.f)
	qemu, ok := qemutest.Verdict(t, parityQEMUTimeout, img.qemuTarget(path, now.f)...)
	switch {
	case !ok:
		if o.class = exception(qemu, ok, again); o.class == "" {
			o.fault("QEMU does not judge the repaired image: exit %d\n%s", qemu.Exit, brief(qemu.Output))
		}
	case !qemu.Clean():
		o.fault("QEMU finds in the repaired image: exit %d\n%s", qemu.Exit, brief(qemu.Output))
	}
	return o
}

// unrepairable returns the name of the class of images that cannot be repaired to which an image belongs, of which
// the repair left f; or "".
func unrepairable(f *pagedFile, o *checkOutcome) string {
	var header *HeaderError
	var corrupt *CorruptError
	switch {
	case errors.As(o.err, &header):
		field, _, _ := strings.Cut(header.Field, " ") // "extension" and more
		return "the header cannot be used: " + field
	case errors.As(o.err, &corrupt) && corrupt.HostOff == fieldIncompatible:
		return "the data file bit without a data file"
	case errors.As(o.err, &corrupt) && strings.Contains(corrupt.What, "active L1 table"):
		return "the active L1 table is far past the end of the file"
	case o.err != nil:
		return ""
	}
	c, err := openForCheck(f)
	if err != nil {
		return ""
	}
	in := c.tables()
	for _, f := range o.findings {
		if !f.Left {
			continue
		}
		switch {
		case f.Kind == FindingSnapshotDataFile:
			return "snapshots with a data file"
		case f.Part == "crypto header" && f.Kind == FindingBeyondEnd:
			return "the crypto header is past the end of the file"
		case f.Kind == FindingShared:
			return "too much shares clusters"
		case f.Kind == FindingOverflow && in[uint64(f.HostOff)>>c.clusterBits] > 1:
			return "more tables in a cluster than the refcount's width can count"
		case f.Kind == FindingOverflow:
			return "more references than the refcount's width can count"
		}
	}
	return ""
}

// TestRepairParity repairs damaged images: what is left is without a flaw to us and to QEMU, holds what could be
// read before, and is not changed by a second repair. What QEMU repairs is without a flaw to us.
func TestRepairParity(t *testing.T) {
	qemutest.Require(t)
	seed, dir := paritySeed(t), newPoolDir(t)
	first, images := 0, parityImages(t, 80, 20)
	if os.Getenv("QCOW2_PARITY_ONLY") != "" {
		first = parityNumber(t, "QCOW2_PARITY_ONLY", 0)
		images = first + 1
	}
	classes, faults := make(map[string][]string), 0
	repaired, shared, byQEMU, cleanToUs := 0, 0, 0, 0
	for k := first; k < images; k++ {
		c := newParityCase(t, seed, k)
		f := damaged(c.img.file, c.damages...)
		o := c.img.repairAll(t, dir, c.String(), f)
		if len(o.faults) > 0 {
			faults++
			t.Errorf("%v\n%s", c, strings.Join(o.faults, "\n"))
		}
		if o.class != "" {
			classes[o.class] = append(classes[o.class], c.String())
		} else {
			repaired++
		}
		shared += o.shared

		path := c.img.place(t, dir, f)
		args := append([]string{"-r", "all", "-T", "unsafe"}, c.img.qemuTarget(path, f)...)
		if qemu, ok := qemutest.Verdict(t, parityRepairTimeout, args...); !ok || !qemu.Clean() {
			continue
		}
		// What it stores of bitmaps when it closes the image comes after that verdict.
		qemu, ok := qemutest.Verdict(t, parityRepairTimeout, c.img.qemuTarget(path, f)...)
		if !ok || !qemu.Clean() {
			continue
		}
		f, err := readPagedFile(path)
		if err != nil {
			t.Fatal(err)
		}
		byQEMU++
		ours := checkStorage(t, c.String(), NewReaderStorage(f, f.size), RepairNothing)
		var header *HeaderError
		if errors.As(ours.err, &header) {
			// It leaves fields of the header that it passes over, and this library does not.
			if class := exception(qemu, ok, ours); class != "" {
				classes["repaired by QEMU: "+class] = append(classes["repaired by QEMU: "+class], c.String())
				continue
			}
		}
		if ours.err != nil || ours.res.Corruptions+ours.res.Leaks+ours.res.CheckErrors > 0 {
			t.Errorf("%v\nrepaired by QEMU: %v", c, ours)
			continue
		}
		cleanToUs++
	}
	t.Logf("seed %d, %d images: %d repaired, %d with a fault; %d guest clusters left out; QEMU repaired %d, of which we find %d clean",
		seed, images-first, repaired, faults, shared, byQEMU, cleanToUs)
	logClasses(t, "repairs", classes)
}

// rebuildDamage is a way in which an image loses all of its refcounts.
type rebuildDamage struct {
	name    string
	rebuilt bool // new structures are needed; else the old ones are filled in
	damages func(t testing.TB, img *poolImage) []damage
}

// each returns a damage of every word of the refcount table that is not zero.
func (img *poolImage) eachRefTableWord(value func(old uint64) uint64) (damages []damage) {
	for _, at := range img.sites.words[partRefTable] {
		damages = append(damages, setWord(partRefTable, at, value(img.sites.word(img.file, at))))
	}
	return damages
}

// rebuildDamages are the ways.
var rebuildDamages = []rebuildDamage{
	{"table zeroed", false, func(t testing.TB, img *poolImage) []damage {
		return img.eachRefTableWord(func(uint64) uint64 { return 0 })
	}},
	{"blocks zeroed", false, func(t testing.TB, img *poolImage) (damages []damage) {
		for _, at := range img.sites.refBlocks {
			damages = append(damages, damage{part: partRefcounts, what: "all", off: at, b: make([]byte, img.clusterSize())})
		}
		return damages
	}},
	{"table of no clusters", true, func(t testing.TB, img *poolImage) []damage {
		return []damage{setField(t, "refcount_table_clusters", 0)}
	}},
	{"table past the end", true, func(t testing.TB, img *poolImage) []damage {
		return []damage{setField(t, "refcount_table_offset", 1<<40)}
	}},
	{"table misaligned", true, func(t testing.TB, img *poolImage) []damage {
		return []damage{setField(t, "refcount_table_offset", img.sites.h.RefTableOff+8)}
	}},
	{"table in the L1 table", true, func(t testing.TB, img *poolImage) []damage {
		return []damage{setField(t, "refcount_table_offset", img.sites.h.L1Off)}
	}},
	{"entries misaligned", true, func(t testing.TB, img *poolImage) []damage {
		return img.eachRefTableWord(func(old uint64) uint64 { return old | 8 })
	}},
	{"one block for all", true, func(t testing.TB, img *poolImage) []damage {
		first := img.sites.words[partRefTable][0]
		return append(img.eachRefTableWord(func(uint64) uint64 { return img.sites.word(img.file, first) }),
			setWord(partRefTable, first+8, img.sites.word(img.file, first)))
	}},
}

// convert returns what qemu-img reads of a disk of the image at path, with the arguments args: sums of its clusters.
func (img *poolImage) convert(t testing.TB, dir poolDir, path string, args ...string) map[int64][]byte {
	t.Helper()
	raw := dir.path("raw")
	qemutest.Img(t, append(append([]string{"convert", "-f", "qcow2", "-O", "raw"}, args...), path, raw)...)
	f, err := readPagedFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return sumContent(f, f.size, f.size, contentUnit(img.clusterSize(), img.extended))
}

// TestRebuild takes all refcounts of sound images with snapshots or compressed clusters away, repairs them, and
// reads the disk and the snapshots as before, of every third image with QEMU too. QCOW2_REBUILD_STRIDE=1 does all
// images in all ways; the default is each third.
func TestRebuild(t *testing.T) {
	qemutest.Require(t)
	stride := 5
	if testing.Short() {
		stride = 11
	}
	stride = max(1, parityNumber(t, "QCOW2_REBUILD_STRIDE", stride))
	dir, n := newPoolDir(t), 0
	for i, img := range pool {
		if img.snapshots == 0 && img.packed == 0 {
			continue
		}
		img.image(t)
		for j, test := range rebuildDamages {
			if (i+j)%stride > 0 {
				continue
			}
			n++
			what := fmt.Sprintf("%v, refcount %s", img, test.name)
			f := damaged(img.file, test.damages(t, img)...)
			o := img.repairAll(t, dir, what, f)
			if len(o.faults) > 0 || o.class != "" {
				t.Errorf("%s: class %q\n%s", what, o.class, strings.Join(o.faults, "\n"))
				continue
			}
			if o.first.Rebuilt != test.rebuilt {
				t.Errorf("%s: rebuilt %v, want %v", what, o.first.Rebuilt, test.rebuilt)
			}
			if n%3 > 0 {
				continue
			}
			path, before := dir.path("image"), img.contentsOf(t, img.file) // where repairAll left it
			if lost := lostContent(before.disk, img.convert(t, dir, path)); lost != "" {
				t.Errorf("%s: QEMU: %s", what, lost)
			}
			for k, snapshot := range before.snapshots {
				if lost := lostContent(snapshot, img.convert(t, dir, path, "-l", fmt.Sprintf("snapshot.name=snapshot%d", k+1))); lost != "" {
					t.Errorf("%s: QEMU: snapshot %d: %s", what, k+1, lost)
				}
			}
		}
	}
	t.Logf("%d images", n)
}

// TestRepairShared repairs images in which a table lies in the old refcount structures, which ends when these are
// replaced, and one that a wrong bit in the header makes another image.
func TestRepairShared(t *testing.T) {
	qemutest.Require(t)
	dir := newPoolDir(t)
	for _, test := range []struct {
		name    string
		spec    poolSpec
		damages func(img *poolImage) []damage
		class   string
	}{
		{"L2 table in a refcount block", poolSpec{kind: "data", byUs: true, external: true}, func(img *poolImage) []damage {
			return []damage{setWord(partL1, img.sites.words[partL1][0], flagCopied|uint64(img.sites.refBlocks[0]))}
		}, ""},
		{"L1 table in the refcount table, with COPIED where a cluster has two owners", poolSpec{kind: "plain"}, func(img *poolImage) []damage {
			h, l1, l2 := img.sites.h, img.sites.words[partL1], img.sites.words[partL2]
			data := l2[slices.IndexFunc(l2, func(at int64) bool { return img.sites.word(img.file, at)&offsetMask != 0 })]
			return []damage{
				setField(t, "refcount_table_clusters", (h.L1Off-h.RefTableOff)>>h.ClusterBits+1),
				setWord(partL1, l1[len(l1)-1], flagCopied|img.sites.word(img.file, data)&offsetMask),
			}
		}, ""},
		{"data file bit", poolSpec{kind: "plain"}, func(img *poolImage) []damage {
			return []damage{setField(t, "incompatible_features", incompatDataFile)}
		}, "the data file bit without a data file"},
	} {
		test.spec.clusterBits, test.spec.width = 12, 16
		img := (&poolImage{poolSpec: test.spec.legal(), seed: uint64(len(pool))}).image(t)
		f := damaged(img.file, test.damages(img)...)
		if o := img.repairAll(t, dir, test.name, f); len(o.faults) > 0 || o.class != test.class {
			t.Errorf("%s: class %q, want %q\n%s", test.name, o.class, test.class, strings.Join(o.faults, "\n"))
		}
	}
}
