package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/qemutest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// listOf returns the kinds of every cluster that is in the list of the image, and those that its tables give.
// Nobody changes the image.
func listOf(img *Image) (listed, tables map[uint64]OverlapKinds, err error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	listed, tables = make(map[uint64]OverlapKinds), make(map[uint64]OverlapKinds)
	for r := range img.host.metadata.runs() {
		for ci := r.first; ci < r.first+r.n; ci++ {
			listed[ci] = r.kinds
		}
	}
	size, err := img.host.s.Size()
	if err != nil {
		return nil, nil, err
	}
	bits := img.m.clusterBits
	err = img.eachMetadata(overlapAllKinds, uint64(size), func(k OverlapKinds, off, n uint64) error {
		for ci := off >> bits; ci <= (off+n-1)>>bits; ci++ {
			tables[ci] |= k
		}
		return nil
	})
	return listed, tables, err
}

// checkList compares the list of metadata clusters of an open image with its tables. The list has all of what they
// name; what it has more is waiting to be released, or an L2 table that a snapshot still holds.
func checkList(img *Image) error {
	if img.host.metadata == nil {
		return errors.New("I8: the image has no list of its metadata")
	}
	listed, tables, err := listOf(img)
	if err != nil {
		return err
	}
	for ci, k := range tables {
		if missing := k &^ listed[ci]; missing != 0 {
			return fmt.Errorf("I8: cluster %d is %s, and the list does not know", ci, missing)
		}
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	for ci, k := range listed {
		more := k &^ tables[ci]
		if more == 0 {
			continue
		}
		n, err := img.m.alloc.refcount(ci)
		if err != nil {
			return err
		}
		if n == 0 || more&^allocatedKinds != 0 {
			return fmt.Errorf("I8: cluster %d, with refcount %d, is listed as %s, but is %s", ci, n, k, tables[ci])
		}
	}
	return nil
}

// overlapBase returns an image with metadata of every kind that can be written over, but for the header a cluster
// of each alone: tables in use, those of a snapshot, and a bitmap directory.
func overlapBase(t testing.TB, version int) *hostileImage {
	t.Helper()
	sc := faultScenario{size: 1 << 20, create: CreateOptions{ClusterSize: 4096, Version: version}}
	sc.prepare = []faultStep{{'w', 0, 40_000}}
	disks, _ := sc.build(t)
	s := crashStorage{crashtest.NewDisk(addTestSnapshot(t, disks["image"].Bytes()))}
	img, err := OpenStorage(s, &OpenOptions{ReadWrite: true})
	if err != nil {
		t.Fatal(err)
	}
	// The table that the snapshot shares is copied, and is the snapshot's alone then.
	if _, err := img.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	im := &hostileImage{b: s.Storage.(*crashtest.Disk).Bytes()}
	if version >= 3 {
		im.b = addTestBitmap(t, im.b)
	}
	if im.h, err = readHeader(bytes.NewReader(im.b), int64(len(im.b))); err != nil {
		t.Fatal(err)
	}
	im.g = im.h.geometry()
	return im
}

// luredPlace is a kind of metadata and where a cluster of it is.
type luredPlace struct {
	kind OverlapKinds
	off  func(im *hostileImage) uint64
}

// luredPlaces are the kinds of metadata that an image which can be written has. (A crypto header it has not.)
var luredPlaces = []luredPlace{
	{OverlapMainHeader, func(im *hostileImage) uint64 { return 0 }},
	{OverlapActiveL1, func(im *hostileImage) uint64 { return im.h.l1Off }},
	{OverlapActiveL2, func(im *hostileImage) uint64 { return im.u64(im.l1(0)) & offsetMask }},
	{OverlapRefcountTable, func(im *hostileImage) uint64 { return im.h.refTableOff }},
	{OverlapRefcountBlock, func(im *hostileImage) uint64 { return im.u64(im.refTable(0)) }},
	{OverlapSnapshotTable, func(im *hostileImage) uint64 { return im.h.snapshotsOff }},
	{OverlapInactiveL1, func(im *hostileImage) uint64 { return im.u64(im.h.snapshotsOff + snapL1Off) }},
	{OverlapInactiveL2, func(im *hostileImage) uint64 { return im.u64(im.u64(im.h.snapshotsOff+snapL1Off)) & offsetMask }},
	{OverlapBitmapDirectory, func(im *hostileImage) uint64 { return im.h.bitmaps.dirOff }},
}

// overlapLure is a way to make the next write land on a cluster of metadata.
type overlapLure struct {
	name string
	set  func(im *hostileImage, off uint64)
	// guest is where the write goes.
	guest int64
}

// overlapLures are the two ways in which an image leads a write astray: a refcount of zero, by which the cluster is
// handed out, and an L2 entry that names it.
var overlapLures = []overlapLure{
	{"refcount", func(im *hostileImage, off uint64) { im.setRefcount(off, 0) }, 800_000 &^ 4095},
	{"L2 entry", func(im *hostileImage, off uint64) { im.put(im.l2(3), 8, off|flagCopied) }, 3 * 4096},
}

// TestOverlapRefused damages an image so that the next write would land on metadata of each kind, and wants the
// write refused, the metadata untouched, the corrupt bit on disk, and every later change refused. With the
// check switched off the same write destroys the metadata, which shows that the image is what it should be.
func TestOverlapRefused(t *testing.T) {
	for _, version := range []int{2, 3} {
		for _, place := range luredPlaces {
			if version == 2 && place.kind == OverlapBitmapDirectory {
				continue
			}
			for _, lure := range overlapLures {
				if lure.name == "L2 entry" && place.kind == OverlapMainHeader {
					continue // offset 0 in an entry is no cluster
				}
				t.Run(fmt.Sprintf("v%d/%s/%s", version, place.kind, lure.name), func(t *testing.T) {
					im := overlapBase(t, version)
					off := place.off(im)
					runOverlap(t, im, place.kind, off, lure, OverlapCheck{})
					runOverlap(t, im, place.kind, off, lure, OverlapCheck{Preset: OverlapNone, With: place.kind})
					runOverlap(t, im, place.kind, off, lure, OverlapCheck{Preset: OverlapNone})
					runOverlap(t, im, place.kind, off, lure, OverlapCheck{Without: place.kind})
				})
			}
		}
	}
}

// runOverlap opens a copy of im, leads its next write to the metadata at off, and looks at what becomes of it.
func runOverlap(t *testing.T, im *hostileImage, kind OverlapKinds, off uint64, lure overlapLure, check OverlapCheck) {
	t.Helper()
	im = &hostileImage{b: bytes.Clone(im.b), h: im.h, g: im.g}
	disk := crashtest.NewDisk(im.b)
	var heard []*CorruptError
	img, err := OpenStorage(crashStorage{disk}, &OpenOptions{ReadWrite: true, OverlapCheck: check,
		OnCorrupt: func(e *CorruptError) { heard = append(heard, e) }})
	if err != nil {
		t.Fatal(err)
	}
	// The lure is laid after the open, which would repair a header without a refcount.
	lure.set(im, off)
	if _, err := disk.WriteAt(im.b, 0); err != nil {
		t.Fatal(err)
	}
	if err := img.start(); err != nil { // bitmaps are marked before any guest data is written
		t.Fatal(err)
	}
	before := disk.Bytes()
	p := bytes.Repeat([]byte("guest"), 4096/5+1)[:4096]
	_, err = img.WriteAt(p, lure.guest)
	after := disk.Bytes()
	metadata := func(b []byte) []byte { return b[off : off+im.g.clusterSize] }

	if check.kinds()&kind == 0 {
		if err != nil || !bytes.Equal(metadata(after), p) {
			t.Errorf("without the check: error %v; the write went elsewhere: %v", err, !bytes.Equal(metadata(after), p))
		}
		_ = img.Abandon()
		return
	}
	var ce *CorruptError
	switch {
	case !errors.Is(err, ErrCorrupt) || !errors.As(err, &ce):
		t.Fatalf("write: error %v, want a *CorruptError", err)
	case !strings.Contains(ce.What, kind.String()) || ce.HostOff != int64(off) || ce.GuestOff != lure.guest:
		t.Errorf("write: error %v, want one that names %s, host %#x and guest %#x", err, kind, off, lure.guest)
	}
	if len(heard) != 1 || heard[0] != ce {
		t.Errorf("OnCorrupt heard %v", heard)
	}
	want := bytes.Clone(before)
	if im.h.version >= 3 {
		want[fieldIncompatible+7] |= incompatCorrupt
	}
	if !bytes.Equal(after, want) {
		t.Error("more than the corrupt bit was written")
	}
	for name, change := range map[string]func() error{
		"WriteAt":         func() error { _, err := img.WriteAt(p, 0); return err },
		"WriteCompressed": func() error { return img.WriteCompressed(p, 8192) },
		"Sync":            img.Sync,
	} {
		if err := change(); !errors.Is(err, ErrCorrupt) || !errors.Is(err, ErrFailed) {
			t.Errorf("%s afterwards: error %v, want ErrCorrupt and ErrFailed", name, err)
		}
	}
	if _, err := img.ReadAt(p, 500_000); err != nil {
		t.Errorf("read afterwards: %v", err)
	}
	if err := img.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Close: error %v, want ErrCorrupt", err)
	}
	if !bytes.Equal(disk.Bytes(), want) {
		t.Error("something was written afterwards")
	}
	if len(heard) != 1 {
		t.Errorf("OnCorrupt was called %d times", len(heard))
	}
	if im.h.version < 3 {
		return
	}
	if _, err := OpenStorage(crashStorage{disk}, &OpenOptions{ReadWrite: true}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("writable open of the marked image: error %v, want ErrCorrupt", err)
	}
	ro, err := OpenStorage(crashStorage{disk}, nil)
	if err != nil {
		t.Fatalf("read-only open of the marked image: %v", err)
	}
	if !ro.Info().Corrupt {
		t.Error("Info does not say that the image is corrupt")
	}
	if err := ro.Close(); err != nil {
		t.Error(err)
	}
}

// TestOverlapQEMU lets QEMU look at images that a refused write has marked, one for each kind of metadata, and repairs
// them.
func TestOverlapQEMU(t *testing.T) {
	qemutest.Require(t)
	for _, place := range luredPlaces {
		t.Run(place.kind.String(), func(t *testing.T) {
			im := overlapBase(t, 3)
			path := filepath.Join(t.TempDir(), "marked.qcow2")
			qemutest.Dump(t, path)
			if err := os.WriteFile(path, im.b, 0o600); err != nil {
				t.Fatal(err)
			}
			img, err := Open(path, &OpenOptions{ReadWrite: true})
			if err != nil {
				t.Fatal(err)
			}
			lure := overlapLures[0]
			lure.set(im, place.off(im))
			if err := os.WriteFile(path, im.b, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := img.WriteAt(make([]byte, 4096), lure.guest); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("write: %v", err)
			}
			if err := img.Close(); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("Close: %v", err)
			}
			specific := qemutest.Info(t, path)["format-specific"].(map[string]any)["data"].(map[string]any)
			if specific["corrupt"] != true {
				t.Errorf("qemu-img info: %v", specific)
			}
			if _, exit := qemutest.IOExit(t, qemutest.IOOptions{}, path, "write 0 512"); exit == 0 {
				t.Error("QEMU opens the marked image for writing")
			}
			img, err = Open(path, &OpenOptions{ReadWrite: true, CheckOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			res, err := img.Check(context.Background(), &CheckOptions{Repair: RepairAll})
			if err != nil || !res.Clean() || res.CorruptionsFixed == 0 {
				t.Errorf("repair: %+v, %v", res, err)
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
			qemutest.CheckClean(t, path)
			if img, err = Open(path, &OpenOptions{ReadWrite: true}); err != nil {
				t.Fatalf("writable open after the repair: %v", err)
			}
			if _, err := img.WriteAt(make([]byte, 4096), lure.guest); err != nil {
				t.Errorf("write after the repair: %v", err)
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
			qemutest.CheckClean(t, path)
		})
	}
}

// TestOverlapMarkFails fails the write and the sync of the corrupt bit: the image is failed all the same, and says
// both.
func TestOverlapMarkFails(t *testing.T) {
	for _, kind := range []crashtest.Kind{crashtest.Write, crashtest.Sync} {
		t.Run(kind.String(), func(t *testing.T) {
			im := overlapBase(t, 3)
			overlapLures[1].set(im, im.h.l1Off)
			host := newFaultHost(map[string]*crashtest.Disk{"image": crashtest.NewDisk(im.b)})
			img, err := OpenStorage(host.storage("image"), &OpenOptions{ReadWrite: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := img.start(); err != nil {
				t.Fatal(err)
			}
			host.faults.Set(crashtest.Fault{Err: syscall.EIO, Match: func(op crashtest.Op) bool { return op.Kind == kind }})
			if _, err := img.WriteAt(make([]byte, 512), overlapLures[1].guest); !errors.Is(err, ErrCorrupt) || !errors.Is(err, crashtest.ErrInjected) {
				t.Errorf("write: error %v, want ErrCorrupt and its cause", err)
			}
			host.faults.Heal()
			if _, err := img.WriteAt(make([]byte, 512), 0); !errors.Is(err, ErrCorrupt) {
				t.Errorf("write afterwards: error %v, want ErrCorrupt", err)
			}
			_ = img.Close()
			host.checkIdle(t)
		})
	}
}

// TestOverlapSound writes to images whose list has no room and must scan the tables, and to such with all presets:
// a sound image meets no hit, and the list follows the tables.
func TestOverlapSound(t *testing.T) {
	sc := faultScenario{size: 4 << 20, create: CreateOptions{ClusterSize: 512, RefcountBits: 64}}
	sc.prepare = []faultStep{{'w', 0, 300_000}, {'c', 2000, 40}}
	disks, _ := sc.build(t)
	base := addTestSnapshot(t, disks["image"].Bytes())
	tests := []struct {
		name   string
		check  OverlapCheck
		limits *Limits
	}{
		{"all", OverlapCheck{}, nil},
		{"one window", OverlapCheck{CacheBytes: 1}, nil},
		{"no room", OverlapCheck{}, nil},
		{"cached", OverlapCheck{Preset: OverlapCached}, nil},
		{"constant", OverlapCheck{Preset: OverlapConstant}, nil},
		{"none", OverlapCheck{Preset: OverlapNone}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			disk := crashtest.NewDisk(base)
			img, err := OpenStorage(crashStorage{disk}, &OpenOptions{ReadWrite: true, OverlapCheck: tt.check})
			if err != nil {
				t.Fatal(err)
			}
			if tt.name == "no room" {
				// Less than the format's own limits would let through.
				img.limits.MetadataBytes = 1
				if err := img.watchMetadata(); err != nil {
					t.Fatal(err)
				}
				if !img.host.metadata.memory().suspect {
					t.Fatal("the list has room for all")
				}
			}
			p := bytes.Repeat([]byte("x"), 2048)
			for i := range int64(400) {
				if _, err := img.WriteAt(p, i*7919*512%(4<<20-2048)); err != nil {
					t.Fatal(err)
				}
				if i%50 == 49 {
					if err := img.Sync(); err != nil {
						t.Fatal(err)
					}
				}
				if i%20 == 0 && tt.check.kinds() == overlapAllKinds && tt.name != "no room" {
					if err := checkList(img); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			size, _ := disk.Size()
			if rep, err := refwalk.Walk(disk, size); err != nil || !rep.Clean() {
				t.Errorf("not clean: %v, %v", rep.Findings, err)
			}
		})
	}
}

// TestOverlapOptions refuses options that are none, by name.
func TestOverlapOptions(t *testing.T) {
	for name, o := range map[string]OverlapCheck{
		"OverlapCheck.Preset":     {Preset: 9},
		"OverlapCheck.With":       {With: 1 << 15},
		"OverlapCheck.Without":    {With: OverlapActiveL1, Without: OverlapActiveL1},
		"OverlapCheck.CacheBytes": {CacheBytes: -1},
	} {
		_, err := OpenStorage(NewMemoryStorage(), &OpenOptions{ReadWrite: true, OverlapCheck: o})
		var oe *OptionError
		if !errors.As(err, &oe) || oe.Option != name {
			t.Errorf("%s: error %v", name, err)
		}
	}
}
