package qcow2

import (
	"bytes"
	"context"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// fuzzSeeds returns small images of different kinds, made here so that they follow the format.
func fuzzSeeds(tb testing.TB) [][]byte {
	var seeds [][]byte
	for _, o := range []CreateOptions{
		{Version: 2, ClusterSize: 512},
		{ClusterSize: 512, RefcountBits: 1},
		{ClusterSize: 512, RefcountBits: 64, LazyRefcounts: true},
		{ClusterSize: 1024, Compression: CompressionZstd},
		{ClusterSize: 16384, ExtendedL2: true},
		{ClusterSize: 512, BackingFile: "base", BackingFormat: "raw"},
		{ClusterSize: 512, DataFile: "data", Open: &OpenOptions{DataFile: NewMemoryStorage()}},
		{ClusterSize: 512, DataFile: "data", DataFileRaw: true, Open: &OpenOptions{DataFile: NewMemoryStorage()}},
	} {
		s := NewMemoryStorage()
		if o.BackingFile != "" {
			o.Open = &OpenOptions{Backing: newFuzzBacking(tb)}
		}
		img, err := CreateStorage(s, 64<<10, &o)
		if err != nil {
			tb.Fatal(err)
		}
		cluster := int64(img.Info().ClusterSize)
		p := bytes.Repeat([]byte("qcow2 "), int(cluster))
		for i, write := range []func() error{
			func() error { _, err := img.WriteAt(p[:cluster+100], 300); return err },
			func() error { return img.WriteCompressed(p[:2*cluster], 2*cluster) },
			func() error { _, err := img.WriteAt(p[:7], 63<<10); return err },
		} {
			if err := write(); err != nil && !errors.Is(err, ErrUnsupported) {
				tb.Fatal(i, err)
			}
		}
		if err := img.Close(); err != nil {
			tb.Fatal(err)
		}
		var b bytes.Buffer
		if _, err := s.WriteTo(&b); err != nil {
			tb.Fatal(err)
		}
		seeds = append(seeds, b.Bytes())
	}
	plain := bytes.Clone(seeds[1])
	return append(seeds, addTestBitmap(tb, plain), addTestSnapshot(tb, bytes.Clone(seeds[2])))
}

// newFuzzBacking returns a small raw disk.
func newFuzzBacking(tb testing.TB) Disk {
	s := NewMemoryStorage()
	if _, err := s.WriteAt(bytes.Repeat([]byte("backing "), 4000), 0); err != nil {
		tb.Fatal(err)
	}
	d, err := NewRawDisk(s)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// fuzzOptions are options under which any image can be opened without another file.
func fuzzOptions(tb testing.TB) *OpenOptions {
	return &OpenOptions{
		Backing:  newFuzzBacking(tb),
		DataFile: NewMemoryStorage(),
		Limits:   &Limits{MetadataBytes: 8 << 20, VirtualSize: 1 << 50},
	}
}

// FuzzOpenRead opens whatever it is given, reads it and writes a copy of it: nothing may panic, hang, or
// allocate out of proportion. What was read must not depend on the sizes of caches and requests, and a sound
// image stays one: see fuzzWrite.
func FuzzOpenRead(f *testing.F) {
	for _, s := range fuzzSeeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			t.Skip("larger than the seeds are meant to grow")
		}
		opened := false
		n := allocated(func() {
			img, err := OpenReader(bytes.NewReader(b), int64(len(b)), fuzzOptions(t))
			if err != nil {
				return
			}
			defer img.Close()
			opened = true
			fuzzRead(t, img, b)
		})
		if n > maxHostileAlloc {
			t.Errorf("allocated %d bytes for a file of %d", n, len(b))
		}
		if opened {
			fuzzWrite(t, b)
		}
	})
}

// fuzzRead reads img in two ways.
func fuzzRead(t *testing.T, img *Image, b []byte) {
	o := fuzzOptions(t)
	o.L2CacheBytes = 1
	small, err := OpenReader(bytes.NewReader(b), int64(len(b)), o)
	if err != nil {
		t.Fatalf("opened before, now: %v", err)
	}
	defer small.Close()
	offs := []int64{0, img.Size() / 2, max(0, img.Size()-70_000)}
	p, q := make([]byte, 70_000), make([]byte, 70_000)
	for _, off := range offs {
		n, err := img.ReadAt(p, off)
		if err != nil && err != io.EOF {
			continue
		}
		// Piece by piece, with hardly a cache: the same.
		for at := 0; at < n; at += 1000 {
			if m, err := small.ReadAt(q[at:min(at+1000, n)], off+int64(at)); err != nil {
				t.Fatalf("read %d of %d bytes at %#x: %v", m, n, off+int64(at), err)
			}
		}
		if !bytes.Equal(p[:n], q[:n]) {
			t.Fatalf("read at %#x depends on the size of the request", off)
		}
	}
	end := int64(0)
	for e, err := range img.Extents(0, min(img.Size(), 1<<30)) {
		if err != nil {
			break
		}
		if e.Off != end || e.Len <= 0 {
			t.Fatalf("extent %+v does not follow %#x", e, end)
		}
		end = e.Off + e.Len
	}
}

// fuzzWrite writes into a copy of the image. If that is sound, what was written reads back, before and after
// a reopen, everything else is as before, and the image stays sound, without a leak.
func fuzzWrite(t *testing.T, b []byte) {
	s := NewMemoryStorage()
	if _, err := s.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	o := fuzzOptions(t)
	o.ReadWrite, o.L2CacheBytes, o.RefcountCacheBytes = true, 1, 1
	img, err := OpenStorage(s, o)
	if err != nil {
		return
	}
	before, sound := fuzzWalk(t, s)
	// The model of four windows; of each what must be there.
	const window = 12_000
	offs := []int64{0, img.Size() / 3, img.Size() / 2, max(0, img.Size()-window)}
	models := make([][]byte, len(offs))
	for i, off := range offs {
		models[i] = make([]byte, min(window, img.Size()-off))
		if _, err := img.ReadAt(models[i], off); err != nil {
			sound = false
		}
	}
	check := func(img *Image, when string) {
		for i, off := range offs {
			got := make([]byte, len(models[i]))
			if _, err := img.ReadAt(got, off); err != nil {
				t.Fatalf("%s: read %d bytes at %#x: %v", when, len(got), off, err)
			}
			if !bytes.Equal(got, models[i]) {
				t.Fatalf("%s: window at %#x is not what was written", when, off)
			}
		}
	}
	r := rand.New(rand.NewPCG(1, uint64(crc32.ChecksumIEEE(b))))
	cluster := int64(img.Info().ClusterSize)
	for range 12 {
		w := r.IntN(len(offs))
		if len(models[w]) == 0 {
			break
		}
		n := 1 + r.IntN(min(5000, len(models[w])))
		at := r.IntN(len(models[w]) - n + 1)
		off := offs[w] + int64(at)
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(r.Uint32() & 0x0f)
		}
		write := func() error { _, err := img.WriteAt(p, off); return err }
		if start := (off + cluster - 1) / cluster * cluster; r.IntN(3) == 0 && start+cluster <= off+int64(n) {
			off, p = start, p[:cluster]
			write = func() error { return img.WriteCompressed(p, off) }
		}
		if err := write(); err != nil {
			sound = false // the range may be old or new, the reason may be the image's
			break
		}
		for i, m := range models { // windows may overlap
			for j, v := range p {
				if k := off + int64(j) - offs[i]; k >= 0 && k < int64(len(m)) {
					m[k] = v
				}
			}
		}
		if sound {
			check(img, "after a write")
		}
		if r.IntN(3) == 0 {
			if err := img.Sync(); err != nil {
				sound = false
			}
		}
	}
	err = img.Close()
	if !sound {
		return
	}
	if err != nil {
		t.Fatalf("close: %v", err)
	}
	after, ok := fuzzWalk(t, s)
	if !ok || after.Leaks > before.Leaks+before.PastEnd { // the file grows over stray refcounts
		t.Fatalf("a sound image became %d corruptions, %d leaks (before: %d): %q", after.Corruptions(), after.Leaks, before.Leaks, after.Findings)
	}
	if img, err = OpenStorage(s, o); err != nil {
		t.Fatalf("reopen: %v", err)
	}
	defer img.Close()
	check(img, "after a reopen")
}

// fuzzWalk walks the image in s, and reports whether it is sound.
func fuzzWalk(t *testing.T, s *MemoryStorage) (*refwalk.Report, bool) {
	size, err := s.Size()
	if err != nil {
		t.Fatal(err)
	}
	rep, err := refwalk.Walk(s, size)
	if err != nil {
		return &refwalk.Report{}, false
	}
	return rep, rep.Corruptions() == 0 && !rep.Dirty() && !rep.Header.Corrupt()
}

// FuzzCheck checks whatever it is given, and repairs a copy: nothing may panic, hang, or allocate out of
// proportion. A check writes nothing. What it calls clean, the walker does too, before and after a repair, which
// changes nothing then.
func FuzzCheck(f *testing.F) {
	for _, s := range fuzzSeeds(f) {
		f.Add(s)
		damaged := bytes.Clone(s)
		damaged[len(damaged)/3] ^= 0x11
		f.Add(damaged)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			t.Skip("larger than the seeds are meant to grow")
		}
		// The last sector may be short: the check takes it as whole, as QEMU does, and the walker does not.
		b = append(bytes.Clone(b), make([]byte, -len(b)&(sectorSize-1))...)
		n := allocated(func() { fuzzCheck(t, b) })
		// What is counted is the sum of all passes; each is bounded as an open is.
		if n > 6*maxHostileAlloc {
			t.Errorf("allocated %d bytes for a file of %d", n, len(b))
		}
	})
}

// fuzzCheck checks and repairs b.
func fuzzCheck(t *testing.T, b []byte) {
	d := crashtest.NewDisk(b)
	changed := false
	o := fuzzOptions(t)
	o.CheckOnly = true
	img, err := OpenStorage(crashSealed{d, &changed}, o)
	if err != nil {
		return
	}
	before, err := img.Check(context.Background(), nil)
	if err := errors.Join(err, img.Close()); err != nil || changed {
		t.Fatalf("check: %v, changed the file: %v", err, changed)
	}
	fuzzAgrees(t, "check", d, before)
	after, err := repairStorage(crashStorage{d}, RepairAll)
	if err != nil {
		return // there are images that cannot be repaired
	}
	fuzzAgrees(t, "repair", d, after)
	if before.Clean() && before.PastEnd == 0 && !bytes.Equal(d.Bytes()[sectorSize:], b[min(len(b), sectorSize):]) {
		t.Error("the repair of a clean image changed it")
	}
}

// fuzzAgrees compares what the check calls clean with the walker's opinion, which also knows of clusters with two
// owners.
func fuzzAgrees(t *testing.T, when string, d *crashtest.Disk, res *CheckResult) {
	size, err := d.Size()
	if err != nil {
		t.Fatal(err)
	}
	rep, err := refwalk.Walk(d, size)
	if err != nil || !res.Clean() || rep.Dirty() || rep.Header.DataFile() && rep.Overlaps > 0 {
		return // a table of two owners cannot be at the guest offsets of both
	}
	// The walker is stricter about a flag that nobody reads.
	flag := slices.ContainsFunc(rep.Findings, func(s string) bool { return strings.HasSuffix(s, "COPIED without a cluster") })
	if rep.Corruptions() > rep.Overlaps && !flag || rep.Leaks > 0 || rep.CopiedMissing > 0 {
		t.Errorf("%s: %+v, but the walk finds %q", when, *res, rep.Findings)
	}
}
