package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// findingsOf checks the image in s, and returns its findings.
func findingsOf(t testing.TB, s Storage, o CheckOptions) (*CheckResult, []Finding) {
	t.Helper()
	img, err := OpenStorage(s, &OpenOptions{CheckOnly: true, ReadWrite: o.Repair != RepairNothing})
	if err != nil {
		t.Fatal(err)
	}
	var found []Finding
	o.Found = func(f Finding) { found = append(found, f) }
	res, err := img.Check(context.Background(), &o)
	if err := errors.Join(err, img.Close()); err != nil {
		t.Fatal(err)
	}
	return res, found
}

// TestCheckFindings damages one thing at a time and wants the finding that names it: kind, place and values.
func TestCheckFindings(t *testing.T) {
	bases := hostileBases(t)
	l2 := func(im *hostileImage, i uint64) int64 { return int64(im.l2(i)) }
	tests := []struct {
		name, base string
		poke       func(im *hostileImage) Finding // returns the finding that must be among those that are made
	}{
		{"leak", "plain", func(im *hostileImage) Finding {
			off := uint64(len(im.b))
			im.b = append(im.b, make([]byte, im.g.clusterSize)...)
			im.setRefcount(off, 5)
			return Finding{Kind: FindingLeak, Part: "refcount block", HostOff: int64(off), GuestOff: -1, Found: 5, Times: 1}
		}},
		{"too low", "snapshot", func(im *hostileImage) Finding {
			off := im.u64(im.l1(0)) & offsetMask
			im.setRefcount(off, 1)
			return Finding{Kind: FindingRefcount, Part: "refcount block", HostOff: int64(off), GuestOff: -1, Found: 1, Expected: 2, Times: 1}
		}},
		{"COPIED lost", "plain", func(im *hostileImage) Finding {
			e := im.u64(im.l2(4))
			im.put(im.l2(4), 8, e&^flagCopied)
			return Finding{Kind: FindingCopiedLost, Part: "L2 table", HostOff: l2(im, 4), GuestOff: 4 * 4096, Found: e &^ flagCopied, Expected: e, Times: 1}
		}},
		{"COPIED of a shared table", "snapshot", func(im *hostileImage) Finding {
			e := im.u64(im.l1(0))
			im.put(im.l1(0), 8, e|flagCopied)
			return Finding{Kind: FindingCopied, Part: "active L1 table", HostOff: int64(im.l1(0)), GuestOff: 0, Found: e | flagCopied, Expected: e, Times: 1}
		}},
		{"reserved bits, twice by a snapshot", "snapshot", func(im *hostileImage) Finding {
			e := im.u64(im.l2(5))
			im.put(im.l2(5), 8, e|1<<60)
			return Finding{Kind: FindingReserved, Part: "L2 table", HostOff: l2(im, 5), GuestOff: 5 * 4096, Found: e | 1<<60, Expected: e, Times: 2}
		}},
		{"misaligned", "plain", func(im *hostileImage) Finding {
			e := im.u64(im.l2(5)) | 512
			im.put(im.l2(5), 8, e)
			return Finding{Kind: FindingMisaligned, Part: "L2 table", HostOff: l2(im, 5), GuestOff: 5 * 4096, Found: e, Expected: flagZero, Times: 1}
		}},
		{"beyond the end", "plain", func(im *hostileImage) Finding {
			im.put(im.l2(5), 8, 1<<40|flagCopied)
			return Finding{Kind: FindingBeyondEnd, Part: "L2 table", HostOff: l2(im, 5), GuestOff: 5 * 4096, Found: 1<<40 | flagCopied, Expected: flagZero, Times: 1}
		}},
		{"compressed with COPIED", "plain", func(im *hostileImage) Finding {
			e := im.u64(im.l2(1))
			im.put(im.l2(1), 8, e|flagCopied)
			return Finding{Kind: FindingCompressed, Part: "L2 table", HostOff: l2(im, 1), GuestOff: 4096, Found: e | flagCopied, Expected: e, Times: 1}
		}},
		{"subclusters", "extl2", func(im *hostileImage) Finding {
			at := im.l2(0) + 8
			b := im.u64(at) | 1<<32
			im.put(at, 8, b)
			return Finding{Kind: FindingSubclusters, Part: "L2 table", HostOff: l2(im, 0), GuestOff: 0, Found: b, Expected: b &^ 1, Times: 1}
		}},
		{"zero flag", "v2", func(im *hostileImage) Finding {
			e := im.u64(im.l2(5))
			im.put(im.l2(5), 8, e|flagZero)
			return Finding{Kind: FindingZeroFlag, Part: "L2 table", HostOff: l2(im, 5), GuestOff: 5 * 4096, Found: e | flagZero, Expected: e, Times: 1}
		}},
		{"elsewhere in the data file", "data", func(im *hostileImage) Finding {
			im.put(im.l2(2), 8, 4096|flagCopied)
			return Finding{Kind: FindingDataFilePlace, Part: "L2 table", HostOff: l2(im, 2), GuestOff: 2 * 4096, Found: 4096 | flagCopied, Expected: 8192 | flagCopied, Times: 1}
		}},
		{"refcount block", "plain", func(im *hostileImage) Finding {
			e := im.u64(im.refTable(0)) | 8
			im.put(im.refTable(0), 8, e)
			return Finding{Kind: FindingRefcountBlock, Part: "refcount table", HostOff: int64(im.refTable(0)), GuestOff: -1, Found: e, Times: 1}
		}},
		{"refcounts unreadable", "plain", func(im *hostileImage) Finding {
			e := im.u64(im.refTable(0)) | 512
			im.put(im.refTable(0), 8, e)
			return Finding{Kind: FindingUnreadable, Part: "refcount block", GuestOff: -1, Found: e, Times: int64(len(im.b)) / 4096}
		}},
		{"snapshot entry", "snapshot", func(im *hostileImage) Finding {
			at := im.h.snapshotsOff
			im.put(at+snapExtraSize, 4, 8)
			return Finding{Kind: FindingSnapshotEntry, Part: "snapshot table", HostOff: int64(at), GuestOff: -1, Found: 8, Expected: 16, Times: 1}
		}},
		{"snapshot L1 table", "snapshot", func(im *hostileImage) Finding {
			at := im.h.snapshotsOff
			im.put(at+snapL1Size, 4, 1<<30)
			return Finding{Kind: FindingSnapshotL1, Part: "snapshot table", HostOff: int64(at), GuestOff: -1, Found: im.u64(at + snapL1Off), Times: 1}
		}},
		{"snapshot table", "snapshot", func(im *hostileImage) Finding {
			im.put(im.h.snapshotsOff+snapExtraSize, 4, 5000)
			return Finding{Kind: FindingSnapshotTable, Part: "snapshot table", HostOff: int64(im.h.snapshotsOff), GuestOff: -1, Times: 1}
		}},
		{"bitmap directory", "bitmap", func(im *hostileImage) Finding {
			im.put(im.h.bitmaps.dirOff+bitmapType, 1, 9)
			return Finding{Kind: FindingBitmapDirectory, Part: "bitmap directory", HostOff: int64(im.h.bitmaps.dirOff), GuestOff: -1, Times: 1}
		}},
		{"bitmap table", "bitmap", func(im *hostileImage) Finding {
			at := im.u64(im.h.bitmaps.dirOff + bitmapTableOff)
			im.put(at, 8, 4096|1)
			return Finding{Kind: FindingBitmapTable, Part: "bitmap table", HostOff: int64(at), GuestOff: -1, Found: 4096 | 1, Times: 1}
		}},
		{"past the end", "plain", func(im *hostileImage) Finding {
			off := uint64(len(im.b)) + 7*4096
			im.setRefcount(off, 3)
			return Finding{Kind: FindingPastEnd, Part: "refcount block", HostOff: int64(off), GuestOff: -1, Found: 3, Times: 1}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			im := &hostileImage{b: bytes.Clone(bases[tt.base])}
			var err error
			if im.h, err = readHeader(bytes.NewReader(im.b), int64(len(im.b))); err != nil {
				t.Fatal(err)
			}
			im.g = im.h.geometry()
			want := tt.poke(im)
			res, found := findingsOf(t, crashStorage{crashtest.NewDisk(im.b)}, CheckOptions{})
			for _, f := range found {
				if f.Kind == want.Kind && f.HostOff == want.HostOff {
					if d := cmp.Diff(want, f); d != "" {
						t.Errorf("finding (-want +got):\n%s", d)
					}
					if res.Clean() != (want.Kind.Class() == ClassHarmless) {
						t.Errorf("%v: clean %v", f, res.Clean())
					}
					return
				}
			}
			t.Errorf("no finding %v, but %v", want, found)
		})
	}
}

// TestCheckOverflow gives a cluster more references than a refcount of one bit counts.
func TestCheckOverflow(t *testing.T) {
	im := baseNamed(t, "one bit").build(t)
	a, b := im.l2(0), im.l2(1)
	im.put(a, 8, im.u64(b))
	res, found := findingsOf(t, crashStorage{crashtest.NewDisk(im.b)}, CheckOptions{})
	want := Finding{Kind: FindingOverflow, Part: "L2 table", HostOff: int64(im.u64(b) & offsetMask), GuestOff: int64(im.g.clusterSize), Found: 1, Expected: 2, Times: 1}
	if len(found) == 0 || cmp.Diff(want, found[0]) != "" {
		t.Errorf("findings %v, want first %v", found, want)
	}
	if res.Corruptions == 0 || res.Leaks != 1 {
		t.Errorf("%+v", *res)
	}
}

// TestCheckCancel ends a check and a repair by their context.
func TestCheckCancel(t *testing.T) {
	im := baseNamed(t, "plain").build(t)
	clear(im.b[im.h.refTableOff:][:im.h.refTableBytes()])
	for _, scope := range []RepairScope{RepairNothing, RepairAll} {
		d := crashtest.NewDisk(im.b)
		img, err := OpenStorage(crashStorage{d}, &OpenOptions{CheckOnly: true, ReadWrite: true})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		_, err = img.Check(ctx, &CheckOptions{Repair: scope, Found: func(Finding) { cancel() }})
		if !errors.Is(err, context.Canceled) || !bytes.Equal(d.Bytes(), im.b) {
			t.Errorf("scope %d: error %v, changed %v", scope, err, !bytes.Equal(d.Bytes(), im.b))
		}
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestCheckProgress looks at the numbers of the progress: they never fall within a pass, and reach the total.
func TestCheckProgress(t *testing.T) {
	im := baseNamed(t, "plain").build(t)
	img, err := OpenStorage(crashStorage{crashtest.NewDisk(im.b)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	var last, total int64
	passes := 0
	_, err = img.Check(context.Background(), &CheckOptions{Progress: func(done, of int64) {
		if done < last {
			if last != total {
				t.Errorf("a pass ended at %d of %d", last, total)
			}
			passes++
		}
		if done > of {
			t.Errorf("%d of %d", done, of)
		}
		last, total = done, of
	}})
	if err != nil || last != total || total == 0 || passes == 0 {
		t.Errorf("ended at %d of %d after %d passes: %v", last, total, passes, err)
	}
}

// TestCheckRefuses wants each misuse of Check refused by its error.
func TestCheckRefuses(t *testing.T) {
	im := baseNamed(t, "plain").build(t)
	open := func(o *OpenOptions) *Image {
		img, err := OpenStorage(crashStorage{crashtest.NewDisk(im.b)}, o)
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	ctx := context.Background()
	ro := open(nil)
	if _, err := ro.Check(ctx, &CheckOptions{Repair: RepairAll}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("repair of an image that is open for reading: %v", err)
	}
	if _, err := ro.Check(ctx, &CheckOptions{Repair: 7}); !errors.Is(err, ErrOption) {
		t.Errorf("no scope: %v", err)
	}
	if err := ro.Close(); err != nil {
		t.Error(err)
	}
	for _, o := range []*OpenOptions{nil, {ReadWrite: true}, {CheckOnly: true}} {
		img := open(o)
		if err := img.Close(); err != nil {
			t.Error(err)
		}
		if _, err := img.Check(ctx, nil); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
	only := open(&OpenOptions{CheckOnly: true, ReadWrite: true})
	defer only.Close()
	for name, use := range map[string]func() error{
		"ReadAt":          func() error { _, err := only.ReadAt(make([]byte, 10), 0); return err },
		"WriteAt":         func() error { _, err := only.WriteAt(make([]byte, 10), 0); return err },
		"WriteCompressed": func() error { return only.WriteCompressed(make([]byte, 512), 0) },
		"Extents": func() error {
			for _, err := range only.Extents(0, 10) {
				return err
			}
			return nil
		},
	} {
		if err := use(); !errors.Is(err, ErrCheckOnly) {
			t.Errorf("%s: error %v, want ErrCheckOnly", name, err)
		}
	}
	if err := only.Sync(); err != nil {
		t.Errorf("Sync of an image that is open for a check: %v", err)
	}
}

// TestCheckLive checks and repairs an image that is in use: what was written and not synced is seen, nothing of it
// is a finding, leaks and lost flags that were there are mended, and the image goes on.
func TestCheckLive(t *testing.T) {
	for _, lazy := range []bool{false, true} {
		t.Run(fmt.Sprintf("lazy %v", lazy), func(t *testing.T) {
			rb := repairBase{create: CreateOptions{ClusterSize: 512, LazyRefcounts: lazy}, packed: true}
			im := rb.build(t)
			free := uint64(len(im.b)) &^ (im.g.clusterSize - 1)
			im.b = append(im.b[:free], make([]byte, 2*im.g.clusterSize)...)
			im.setRefcount(free, 3)
			im.put(im.l2(3), 8, im.u64(im.l2(3))&^flagCopied)
			d := crashtest.NewDisk(im.b)
			img, err := OpenStorage(crashStorage{d}, &OpenOptions{ReadWrite: true})
			if err != nil {
				t.Fatal(err)
			}
			model := make([]byte, img.Size())
			if _, err := img.ReadAt(model, 0); err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(1, 2))
			write := func(n int) {
				t.Helper()
				for range n {
					off := rng.Int64N(img.Size() - 3000)
					p := model[off : off+1+rng.Int64N(3000)]
					for i := range p {
						p[i] = byte(rng.Uint32())
					}
					if _, err := img.WriteAt(p, off); err != nil {
						t.Fatal(err)
					}
				}
			}
			write(20)
			res, err := img.Check(context.Background(), nil)
			if err != nil || res.Leaks != 1 || res.Corruptions != res.LostCopied {
				t.Errorf("check: %+v, %v", res, err)
			}
			write(20)
			if res, err = img.Check(context.Background(), &CheckOptions{Repair: RepairAll}); err != nil || !res.Clean() || res.LeaksFixed != 1 {
				t.Errorf("repair: %+v, %v", res, err)
			}
			write(20)
			if err := checkList(img); err != nil {
				t.Error(err)
			}
			got := make([]byte, len(model))
			if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
				t.Errorf("the content changed: %v", err)
			}
			if res, err = img.Check(context.Background(), nil); err != nil || !res.Clean() {
				t.Errorf("check after the repair: %+v, %v", res, err)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if res, found := findingsOf(t, crashStorage{d}, CheckOptions{}); !res.Clean() || binary.BigEndian.Uint64(d.Bytes()[fieldIncompatible:]) != 0 {
				t.Errorf("after Close: %+v, %v", *res, found)
			}
		})
	}
}

// TestCheckConcurrent checks and repairs an image beside its readers and writers.
func TestCheckConcurrent(t *testing.T) {
	im := baseNamed(t, "snapshot").build(t) // with a snapshot
	im.put(im.l2(3), 8, im.u64(im.l2(3))&^flagCopied)
	d := crashtest.NewDisk(im.b)
	img, err := OpenStorage(crashStorage{d}, &OpenOptions{ReadWrite: true, L2CacheBytes: 1, RefcountCacheBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	rounds := 40
	if testing.Short() {
		rounds = 15
	}
	var wg sync.WaitGroup
	var done atomic.Bool
	part := img.Size() / 4
	for worker := range int64(4) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(3, uint64(worker)))
			model := make([]byte, part)
			if _, err := img.ReadAt(model, worker*part); err != nil {
				t.Error(err)
				return
			}
			got := make([]byte, part)
			for range rounds {
				off := rng.Int64N(part - 2000)
				p := model[off : off+1+rng.Int64N(2000)]
				p[0]++
				if _, err := img.WriteAt(p, worker*part+off); err != nil {
					t.Error(err)
					return
				}
				if _, err := img.ReadAt(got, worker*part); err != nil || !bytes.Equal(got, model) {
					t.Errorf("worker %d: other content, %v", worker, err)
					return
				}
				if rng.IntN(10) == 0 {
					if err := img.Sync(); err != nil {
						t.Error(err)
					}
				}
			}
		}()
	}
	checks := make(chan int)
	go func() {
		n := 0
		for ; !done.Load(); n++ {
			res, err := img.Check(context.Background(), &CheckOptions{Repair: RepairScope(n % 3)})
			if err != nil || res.Corruptions != res.LostCopied || res.Leaks != 0 {
				t.Errorf("check %d: %+v, %v", n, res, err)
				break
			}
		}
		checks <- n
	}()
	wg.Wait()
	done.Store(true)
	if n := <-checks; n < 2 {
		t.Errorf("only %d checks", n)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if res, found := findingsOf(t, crashStorage{d}, CheckOptions{}); res.Corruptions != res.LostCopied || res.Leaks > 0 {
		t.Errorf("after Close: %+v, %v", *res, found)
	}
}

// TestEndOffset compares Info.EndOffset with the check's, of images that are opened for reading and writing, sound
// and dirty ones, and of a backing file.
func TestEndOffset(t *testing.T) {
	for i := range repairBases {
		im := repairBases[i].build(t)
		for _, dirty := range []bool{false, true} {
			if dirty && im.h.version < 3 {
				continue
			}
			b := bytes.Clone(im.b)
			if dirty {
				b[fieldIncompatible+7] |= incompatDirty
				// The refcounts are stale, and say so of everything.
				block := im.u64(im.refTable(0))
				clear(b[block : block+im.g.clusterSize])
			}
			want, _ := findingsOf(t, crashStorage{crashtest.NewDisk(im.b)}, CheckOptions{})
			img, err := OpenStorage(crashStorage{crashtest.NewDisk(b)}, &OpenOptions{NoBacking: true, DataFile: NewReaderStorage(testData{}, 1<<20)})
			if err != nil {
				t.Fatal(err)
			}
			if got := img.Info().EndOffset; got != want.ImageEndOffset {
				t.Errorf("%s, dirty %v: the end is %#x, want %#x", repairBases[i].name, dirty, got, want.ImageEndOffset)
			}
			overlay, err := CreateStorage(NewMemoryStorage(), img.Size(), &CreateOptions{BackingFile: "base", BackingFormat: "qcow2", Open: &OpenOptions{Backing: img}})
			if err != nil {
				t.Fatal(err)
			}
			if got := overlay.Backing().(*Image).Info().EndOffset; got != want.ImageEndOffset {
				t.Errorf("%s as a backing file: the end is %#x, want %#x", repairBases[i].name, got, want.ImageEndOffset)
			}
			if err := errors.Join(overlay.Close(), img.Close()); err != nil {
				t.Error(err)
			}
		}
	}
}

// longStorage is a storage that says it is longer than it is: a file that ends in a hole.
type longStorage struct {
	crashStorage
	size int64
}

// Size returns the length with the hole.
func (s longStorage) Size() (int64, error) { return s.size, nil }

// ReadAt reads zeros from the hole.
func (s longStorage) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.crashStorage.ReadAt(p, off)
	if err == io.EOF && off+int64(len(p)) <= s.size {
		clear(p[n:])
		return len(p), nil
	}
	return n, err
}

// TestCheckMemory holds the counts to two bytes for each cluster that is referred to, and to nothing for the rest of
// the file.
func TestCheckMemory(t *testing.T) {
	const clusters = 1 << 20
	got := allocated(func() {
		r := newRefWords()
		for ci := range uint64(clusters) {
			r.add(5+ci, 1, 0, 1<<16-1)
		}
	})
	// A chunk begins as a list, whose growth is garbage soon.
	if most := uint64(2*clusters + clusters/refChunkWords*16<<10); got > most {
		t.Errorf("%d clusters took %d bytes, above %d", clusters, got, most)
	}
	im := baseNamed(t, "plain").build(t)
	d := crashStorage{crashtest.NewDisk(im.b)}
	check := func(s Storage) (n uint64, res *CheckResult) {
		return allocated(func() { res, _ = findingsOf(t, s, CheckOptions{}) }), res
	}
	short, want := check(d)
	long, res := check(longStorage{d, 64 << 40})
	if d := cmp.Diff(want, res); d != "" {
		t.Errorf("with a hole at the end (-without +with):\n%s", d)
	}
	if long > short+64<<10 {
		t.Errorf("a hole of 64 TiB at the end took %d bytes, and %d without", long, short)
	}
}

// TestRefWords compares the counts with a map, over counts of every size, in chunks of every kind.
func TestRefWords(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	r, want := newRefWords(), make(map[uint64]uint64)
	places := []uint64{0, 1<<refChunkBits - 1, 1 << refChunkBits, refDirectMax << refChunkBits, 1 << 46}
	most := uint64(1 << 20)
	for range 200_000 {
		ci := places[rng.IntN(len(places))] + uint64(rng.IntN(1500))
		n := uint64(1)
		if rng.IntN(50) == 0 {
			n = rng.Uint64N(most)
		}
		over := r.add(ci, n, refCopied, most)
		if sum := want[ci] + n; sum > most {
			if over != sum-most {
				t.Fatalf("cluster %d: %d references are too many, not %d", ci, over, sum-most)
			}
			want[ci] = most
		} else if want[ci] = sum; over != 0 {
			t.Fatalf("cluster %d: %d references are too many, of %d", ci, over, sum)
		}
		if rng.IntN(100) == 0 {
			v := rng.Uint64N(20_000)
			r.set(ci, v)
			want[ci] = v
		}
	}
	end := uint64(0)
	for ci, n := range want {
		if got := r.count(ci); got != n || r.load(ci)&refCopied == 0 {
			t.Errorf("cluster %d has %d references, want %d", ci, got, n)
		}
		if n > 0 {
			end = max(end, ci+1)
		}
	}
	if got := r.end(); got != end {
		t.Errorf("the end is %d, want %d", got, end)
	}
	if r.count(1<<40) != 0 || r.anyIn(1<<40, 1<<refChunkBits) || !r.anyIn(0, 1<<refChunkBits) {
		t.Error("references where there are none, or none where there are")
	}
}
