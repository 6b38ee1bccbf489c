package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// maxHostileAlloc is what the library may allocate, in bytes, for an image file below 1 MiB.
const maxHostileAlloc = 64 << 20

// allocated returns how many bytes f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// hostileOptions are options under which an image needs no other file.
func hostileOptions(t testing.TB, readWrite bool, limits *Limits) *OpenOptions {
	t.Helper()
	d, err := NewRawDisk(NewReaderStorage(strings.NewReader(strings.Repeat("base", 5000)), 20_000))
	if err != nil {
		t.Fatal(err)
	}
	return &OpenOptions{ReadWrite: readWrite, Backing: d, DataFile: NewMemoryStorage(), Limits: limits}
}

// useImage reads from, and writes to, the ends and the middle of the disk, and walks its first extents. It
// returns the first error of the reads and of the writes.
func useImage(img *Image, readWrite bool) (readErr, writeErr error) {
	p := make([]byte, min(20_000, img.Size()))
	for _, off := range []int64{0, img.Size() / 2, img.Size() - int64(len(p))} {
		off = min(off, img.Size()-int64(len(p)))
		if _, err := img.ReadAt(p, off); err != nil && err != io.EOF && readErr == nil {
			readErr = err
		}
	}
	n := 0
	for range img.Extents(0, img.Size()) {
		if n++; n == 1000 {
			break
		}
	}
	if !readWrite {
		return readErr, nil
	}
	for _, off := range []int64{0, img.Size() / 2, img.Size() - int64(len(p))} {
		off = min(off, img.Size()-int64(len(p)))
		if _, err := img.WriteAt(p, off); err != nil && writeErr == nil {
			writeErr = err
		}
	}
	return readErr, writeErr
}

// TestHostileHeader opens the images of headerRules: an illegal field is a *HeaderError that names it, no
// open that fails writes anything, nothing panics, and memory is bounded.
func TestHostileHeader(t *testing.T) {
	bases := testBases(t)
	name := filepath.Join(t.TempDir(), "hostile.qcow2")
	for _, r := range headerRules {
		t.Run(r.name(), func(t *testing.T) {
			b := r.image(t, bases)
			for _, readWrite := range []bool{false, true} {
				d := crashtest.NewDisk(b)
				host := newFaultHost(map[string]*crashtest.Disk{"image": d})
				s := host.storage("image")
				o := hostileOptions(t, readWrite, &r.limits)
				var img *Image
				var err error
				n := allocated(func() {
					if img, err = OpenStorage(s, o); err == nil {
						_, _ = useImage(img, readWrite)
						_ = img.Close()
					}
				})
				if n > maxHostileAlloc {
					t.Errorf("writable %v: allocated %d bytes", readWrite, n)
				}
				host.checkIdle(t)
				if err != nil && !bytes.Equal(host.disks["image"].Bytes(), b) {
					t.Errorf("writable %v: an open that failed changed the storage", readWrite)
				}
				if r.class == nil || r.write && !readWrite {
					if err != nil && !readWrite && r.base != "luks" && !errors.Is(err, ErrCorrupt) {
						t.Errorf("legal, but open: %v", err)
					}
					continue
				}
				checkHostileHeader(t, &r, err)
			}
			// The same by the file's name.
			if r.class == nil || r.write {
				return
			}
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
			o := hostileOptions(t, true, &r.limits)
			_, err := Open(name, o)
			checkHostileHeader(t, &r, err)
			if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, b) {
				t.Errorf("an open that failed changed the file: %v", err)
			}
		})
	}
}

// checkHostileHeader checks that err is of the row's class and names its field.
func checkHostileHeader(t *testing.T, r *headerRule, err error) {
	t.Helper()
	want := r.wantField
	if want == "" {
		want = r.field
	}
	var he *HeaderError
	switch {
	case !errors.As(err, &he) || !errors.Is(err, r.class):
		t.Errorf("error %v, want a *HeaderError of class %q", err, r.class)
	case want == "*" && strings.HasSuffix(he.Field, "_offset"):
	case he.Field != want:
		t.Errorf("error names %q, want %q: %v", he.Field, want, err)
	}
}

// hostileImage is an image file to be poked. Offsets are host offsets.
type hostileImage struct {
	b []byte
	h *header
	g geometry
}

// l1 returns where L1 entry i is.
func (im *hostileImage) l1(i uint64) uint64 { return im.h.l1Off + 8*i }

// l2 returns where the entry of guest cluster i is, within the first L2 table.
func (im *hostileImage) l2(i uint64) uint64 {
	return im.u64(im.l1(0))&offsetMask + i<<im.g.l2EntryBits
}

// refTable returns where refcount table entry i is.
func (im *hostileImage) refTable(i uint64) uint64 { return im.h.refTableOff + 8*i }

// u64 returns the number at off.
func (im *hostileImage) u64(off uint64) uint64 { return binary.BigEndian.Uint64(im.b[off:]) }

// put sets the number of n bytes at off.
func (im *hostileImage) put(off uint64, n int, v uint64) { poke{int(off), n, v}.apply(im.b) }

// setRefcount sets the refcount of the cluster at host offset off.
func (im *hostileImage) setRefcount(off, v uint64) {
	ci := off >> im.g.clusterBits
	block := im.u64(im.refTable(ci >> im.g.refBlockBits))
	setRefcountAt(im.b[block:block+im.g.clusterSize], im.g.refcountOrder, ci&(1<<im.g.refBlockBits-1), v)
}

// hostileBases are the images whose tables are poked, by name.
func hostileBases(t testing.TB) map[string][]byte {
	t.Helper()
	bases := make(map[string][]byte)
	for name, sc := range map[string]*faultScenario{
		"plain":    {create: CreateOptions{ClusterSize: 4096}},
		"v2":       {create: CreateOptions{ClusterSize: 4096, Version: 2}},
		"zstd":     {create: CreateOptions{ClusterSize: 4096, Compression: CompressionZstd}},
		"extl2":    {create: CreateOptions{ClusterSize: 16384, ExtendedL2: true}},
		"data":     {create: CreateOptions{ClusterSize: 4096, DataFile: "data"}},
		"snapshot": {create: CreateOptions{ClusterSize: 4096}, change: addTestSnapshot},
		"bitmap":   {create: CreateOptions{ClusterSize: 4096}, change: addTestBitmap},
	} {
		sc.size = 1 << 20
		sc.prepare = []faultStep{{'w', 0, 40_000}}
		if name != "data" {
			sc.prepare = append(sc.prepare, faultStep{'c', 1, 1})
		}
		disks, _ := sc.build(t)
		bases[name] = disks["image"].Bytes()
	}
	return bases
}

// hostileRow is one illegal value in a table, and what comes of it.
type hostileRow struct {
	name string
	base string
	// poke pokes the value, and returns the host offset that the error must name; 0: none.
	poke func(im *hostileImage) uint64
	// at is what fails first: "open", "open for writing", "read", "write" (reads are fine then), or
	// "" if the value is to be borne.
	at    string
	class error  // of the error: ErrCorrupt (a *CorruptError) or ErrUnsupported
	what  string // what the error names
}

// hostileRows have a row for each rule of a table's entries.
func hostileRows() []hostileRow {
	// set returns a poke of n bytes at the place that where tells, which the error names.
	set := func(where func(im *hostileImage) uint64, n int, v func(old uint64) uint64) func(*hostileImage) uint64 {
		return func(im *hostileImage) uint64 {
			off := where(im)
			old := im.u64(off) >> (64 - 8*n)
			im.put(off, n, v(old))
			return off
		}
	}
	to := func(v uint64) func(uint64) uint64 { return func(uint64) uint64 { return v } }
	or := func(v uint64) func(uint64) uint64 { return func(old uint64) uint64 { return old | v } }
	l1 := func(im *hostileImage) uint64 { return im.l1(0) }
	l2 := func(i uint64) func(im *hostileImage) uint64 { return func(im *hostileImage) uint64 { return im.l2(i) } }
	bitmap := func(i uint64) func(im *hostileImage) uint64 {
		return func(im *hostileImage) uint64 { return im.l2(i) + 8 }
	}
	ref := func(i uint64) func(im *hostileImage) uint64 {
		return func(im *hostileImage) uint64 { return im.refTable(i) }
	}
	snap := func(field uint64) func(im *hostileImage) uint64 {
		return func(im *hostileImage) uint64 { return im.h.snapshotsOff + field }
	}
	// somewhere drops the place: the error names another, or the start of the entry.
	somewhere := func(poke func(*hostileImage) uint64, want func(im *hostileImage) uint64) func(*hostileImage) uint64 {
		return func(im *hostileImage) uint64 {
			poke(im)
			if want == nil {
				return 0
			}
			return want(im)
		}
	}
	dir := func(field uint64) func(im *hostileImage) uint64 {
		return func(im *hostileImage) uint64 { return im.h.bitmaps.dirOff + field }
	}
	inDir := func(field uint64, n int, v uint64) func(*hostileImage) uint64 {
		return somewhere(set(dir(field), n, to(v)), dir(0))
	}
	rows := []hostileRow{
		{"L1 entry unaligned", "plain", set(l1, 8, or(512)), "read", ErrCorrupt, "L1 entry 0"},
		{"L1 entry unaligned", "extl2", set(l1, 8, or(8192)), "read", ErrCorrupt, "L1 entry 0"},
		{"L1 entry reserved bits", "plain", set(l1, 8, or(0x7f000000000001ff)), "", nil, ""},
		{"L1 entry beyond the file", "plain", set(l1, 8, to(1<<40|flagCopied)), "", nil, ""},
		{"L1 entry at the last offset", "plain", set(l1, 8, to(offsetMask&^4095|flagCopied)), "", nil, ""},
		{"L1 entry of a table without a refcount", "plain", func(im *hostileImage) uint64 {
			off := im.u64(im.l1(0)) & offsetMask
			im.put(im.l1(0), 8, off)
			im.setRefcount(off, 0)
			return off
		}, "write", ErrCorrupt, "refcount 0"},

		{"L2 entry unaligned", "plain", set(l2(0), 8, or(512)), "read", ErrCorrupt, "aligned"},
		{"L2 entry unaligned", "extl2", set(l2(0), 8, or(8192)), "read", ErrCorrupt, "aligned"},
		{"L2 entry unaligned zero", "plain", set(l2(0), 8, or(512|flagZero)), "read", ErrCorrupt, "aligned"},
		{"L2 entry reserved bits", "plain", set(l2(0), 8, or(0x3f000000000001fe)), "", nil, ""},
		{"L2 entry zero in version 2", "v2", set(l2(0), 8, or(flagZero)), "read", ErrCorrupt, "version 2"},
		{"L2 entry beyond the file", "plain", set(l2(0), 8, to(1<<40|flagCopied)), "", nil, ""},
		{"L2 entry without a refcount", "plain", func(im *hostileImage) uint64 {
			off := im.u64(im.l2(0)) & offsetMask
			im.put(im.l2(0), 8, off)
			im.setRefcount(off, 0)
			return off
		}, "write", ErrCorrupt, "refcount 0"},
		{"L2 entry compressed, beyond the file", "plain", set(l2(0), 8, to(flagCompressed|1<<40)), "read", ErrCorrupt, "compressed cluster"},
		{"L2 entry compressed, of the most sectors", "plain", set(l2(0), 8, to(flagCompressed|0xf<<58)), "read", ErrCorrupt, "compressed cluster"},
		{"L2 entry compressed, of other bytes", "plain", set(l2(1), 8, func(old uint64) uint64 { return old + 7 }), "read", ErrCorrupt, "compressed cluster"},
		{"L2 entry compressed, of other bytes", "zstd", set(l2(1), 8, func(old uint64) uint64 { return old + 7 }), "read", ErrCorrupt, "compressed cluster"},
		{"L2 entry compressed in an image with a data file", "data", set(l2(0), 8, or(flagCompressed)), "read", ErrCorrupt, "data file"},
		{"L2 entry at another offset of the data file", "data", set(l2(0), 8, to(1<<20|flagCopied)), "read", ErrCorrupt, "guest offset"},
		{"L2 entry unaligned in the data file", "data", set(l2(0), 8, to(512|flagCopied)), "read", ErrCorrupt, "aligned"},
		{"L2 bitmap of a compressed cluster", "extl2", somewhere(set(bitmap(1), 8, to(1)), l2(1)), "read", ErrCorrupt, "subclusters"},
		{"L2 bitmap allocated and zero", "extl2", somewhere(set(bitmap(0), 8, to(math.MaxUint64)), l2(0)), "read", ErrCorrupt, "subclusters"},
		{"L2 bitmap allocated without a cluster", "extl2", func(im *hostileImage) uint64 {
			im.put(im.l2(0), 8, 0)
			return im.l2(0)
		}, "read", ErrCorrupt, "subclusters"},

		{"refcount table entry unaligned", "plain", set(ref(0), 8, or(512)), "write", ErrCorrupt, "refcount table entry 0"},
		{"refcount table entry reserved bits", "plain", set(ref(0), 8, or(1)), "write", ErrCorrupt, "refcount table entry 0"},
		{"refcount table entry too large", "plain", set(ref(0), 8, or(1<<56)), "write", ErrCorrupt, "refcount table entry 0"},
		{"refcount table entry 0 absent", "plain", somewhere(set(ref(0), 8, to(0)), nil), "", nil, ""},
		{"refcount table entry beyond the file", "plain", set(ref(0), 8, to(1<<40)), "", nil, ""},

		{"snapshot L1 unaligned", "snapshot", set(snap(snapL1Off), 8, or(512)), "", nil, ""},
		{"snapshot L1 too large", "snapshot", set(snap(snapL1Size), 4, to(math.MaxUint32)), "", nil, ""},
		{"snapshot id beyond the file", "snapshot", somewhere(set(snap(snapIDSize), 2, to(math.MaxUint16)), snap(minSnapshotEntry+snapExtraICount)), "open", ErrCorrupt, "snapshot table"},
		{"snapshot name beyond the file", "snapshot", somewhere(set(snap(snapNameSize), 2, to(math.MaxUint16)), snap(minSnapshotEntry+snapExtraICount)), "open", ErrCorrupt, "snapshot table"},
		{"snapshot extra data too large", "snapshot", somewhere(set(snap(snapExtraSize), 4, to(1025)), snap(minSnapshotEntry)), "open", ErrCorrupt, "extra data"},
		{"snapshot extra data without end", "snapshot", somewhere(set(snap(snapExtraSize), 4, to(math.MaxUint32)), snap(minSnapshotEntry)), "open", ErrCorrupt, "extra data"},
		{"more snapshots than entries", "snapshot", func(im *hostileImage) uint64 {
			im.put(fieldNbSnapshots, 4, 65536)
			return im.h.snapshotsOff
		}, "open", ErrCorrupt, "snapshot table"},

		{"bitmap table unaligned", "bitmap", inDir(bitmapTableOff, 8, 12<<12|512), "open for writing", ErrCorrupt, "aligned"},
		{"bitmap table in the header", "bitmap", inDir(bitmapTableOff, 8, 0), "open for writing", ErrCorrupt, "table"},
		{"bitmap table too far", "bitmap", inDir(bitmapTableOff, 8, 1<<56), "open for writing", ErrCorrupt, "table"},
		{"bitmap table of no entries", "bitmap", inDir(bitmapTableSize, 4, 0), "open for writing", ErrCorrupt, "0 entries"},
		{"bitmap table of many entries", "bitmap", inDir(bitmapTableSize, 4, math.MaxUint32), "open for writing", ErrCorrupt, "entries"},
		{"bitmap table of another disk", "bitmap", inDir(bitmapTableSize, 4, 2), "open for writing", ErrCorrupt, "2 entries"},
		{"bitmap flags", "bitmap", inDir(bitmapFlags, 4, 4), "open for writing", ErrUnsupported, "flags 0x4"},
		{"bitmap type", "bitmap", inDir(bitmapType, 1, 2), "open for writing", ErrUnsupported, "type 0x2"},
		{"bitmap granularity", "bitmap", inDir(bitmapGranularity, 1, 8), "open for writing", ErrCorrupt, "granularity"},
		{"bitmap granularity", "bitmap", inDir(bitmapGranularity, 1, 255), "open for writing", ErrCorrupt, "granularity"},
		{"bitmap without a name", "bitmap", inDir(bitmapNameSize, 2, 0), "open for writing", ErrCorrupt, "name"},
		{"bitmap name too long", "bitmap", inDir(bitmapNameSize, 2, 1024), "open for writing", ErrCorrupt, "name"},
		{"bitmap name beyond the directory", "bitmap", somewhere(set(dir(bitmapNameSize), 2, to(1023)), dir(minBitmapDirEntry)), "open for writing", ErrCorrupt, "bitmap directory"},
		{"bitmap extra data", "bitmap", inDir(bitmapExtraSize, 4, math.MaxUint32), "open for writing", ErrUnsupported, "extra data"},
	}
	return rows
}

// TestHostileTables pokes one entry of a table at a time and opens, reads and writes the image: it gives an
// error that names what and where, or it is borne; nothing panics, memory is bounded, and an open that
// fails writes nothing.
func TestHostileTables(t *testing.T) {
	bases := hostileBases(t)
	for _, r := range hostileRows() {
		t.Run(fmt.Sprintf("%s/%s", r.base, r.name), func(t *testing.T) {
			im := &hostileImage{b: bytes.Clone(bases[r.base])}
			var err error
			if im.h, err = readHeader(bytes.NewReader(im.b), int64(len(im.b))); err != nil {
				t.Fatal(err)
			}
			im.g = im.h.geometry()
			where := r.poke(im)
			if len(im.b) >= 1<<20 {
				t.Fatalf("the file has %d bytes", len(im.b))
			}
			for _, readWrite := range []bool{false, true} {
				host := newFaultHost(map[string]*crashtest.Disk{"image": crashtest.NewDisk(im.b)})
				o := hostileOptions(t, readWrite, nil)
				var openErr, readErr, writeErr error
				n := allocated(func() {
					var s Storage = host.storage("image")
					if strings.Contains(r.name, "beyond the file") || strings.Contains(r.name, "last offset") {
						// What such an entry names may be written to.
						s = NewMemoryStorage()
						if _, err := s.WriteAt(im.b, 0); err != nil {
							t.Fatal(err)
						}
					}
					var img *Image
					if img, openErr = OpenStorage(s, o); openErr == nil {
						readErr, writeErr = useImage(img, readWrite)
						_ = img.Close()
					}
				})
				if n > maxHostileAlloc {
					t.Errorf("writable %v: allocated %d bytes", readWrite, n)
				}
				host.checkIdle(t)
				if openErr != nil && !bytes.Equal(host.disks["image"].Bytes(), im.b) {
					t.Errorf("writable %v: an open that failed changed the storage", readWrite)
				}
				wantOpen := r.at == "open" || r.at == "open for writing" && readWrite
				wantWrite := readWrite && (r.at == "read" || r.at == "write")
				r.check(t, "open", openErr, wantOpen, where)
				if openErr == nil {
					r.check(t, "read", readErr, r.at == "read", where)
					// A whole cluster is written over a payload without unpacking that.
					if r.at != "" && readWrite && r.what != "compressed cluster" {
						r.check(t, "write", writeErr, wantWrite, where)
					}
				}
			}
		})
	}
}

// check checks that err is there if it is wanted, and names what and where.
func (r *hostileRow) check(t *testing.T, op string, err error, want bool, where uint64) {
	t.Helper()
	if !want || err == nil {
		if want != (err != nil) {
			t.Errorf("%s: error %v, want one: %v", op, err, want)
		}
		return
	}
	if !errors.Is(err, r.class) {
		t.Errorf("%s: error %v, want %q", op, err, r.class)
	}
	var ce *CorruptError
	if r.class == ErrCorrupt {
		if !errors.As(err, &ce) {
			t.Errorf("%s: error %v is no *CorruptError", op, err)
			return
		}
		if !strings.Contains(ce.What, r.what) {
			t.Errorf("%s: error %v does not name %q", op, err, r.what)
		}
		// A payload is named by its own place.
		if where != 0 && ce.HostOff != int64(where) && r.what != "compressed cluster" {
			t.Errorf("%s: error %v does not name host %#x", op, err, where)
		}
		return
	}
	if !strings.Contains(err.Error(), r.what) {
		t.Errorf("%s: error %v does not name %q", op, err, r.what)
	}
}

// TestHostileBomb looks at a file of 192 KiB that claims 65536 snapshots past its end.
func TestHostileBomb(t *testing.T) {
	b := snapshotBomb(t)
	var err error
	begin := time.Now()
	n := allocated(func() { _, err = Inspect(bytes.NewReader(b), int64(len(b)), nil) })
	t.Logf("Inspect: %v, %d bytes allocated", time.Since(begin), n)
	if err != nil || n > 16<<20 {
		t.Errorf("Inspect: error %v, %d bytes allocated", err, n)
	}
	for _, readWrite := range []bool{false, true} {
		n = allocated(func() {
			_, err = OpenStorage(NewReaderStorage(bytes.NewReader(b), int64(len(b))), hostileOptions(t, readWrite, nil))
		})
		var ce *CorruptError
		if !errors.As(err, &ce) || ce.HostOff != 1<<20 {
			t.Errorf("open: error %v, want a *CorruptError about the snapshot table", err)
		}
		if n > 16<<20 {
			t.Errorf("open: %d bytes allocated", n)
		}
	}
}
