package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// resizeFault is a Resize that meets faults.
type resizeFault struct {
	name   string
	create CreateOptions
	size   int64 // before
	to     int64
	o      ResizeOptions
	base   int64 // bytes of the backing file; 0: none
	change func(t testing.TB, b []byte) []byte
	after  int64 // shrink to this before, leaving what a cut short one leaves: nothing is given back; 0: none
}

// resizeFaults are the resizes: each step of growth and shrink has one that does it.
func resizeFaults() []resizeFault {
	over := func(o CreateOptions) CreateOptions {
		o.BackingFile, o.BackingFormat = "base", "raw"
		return o
	}
	return []resizeFault{
		{name: "grow", create: CreateOptions{ClusterSize: 512}, size: 40<<10 + 512, to: 200 << 10},
		{name: "grow, all mapped", create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, size: 40<<10 + 512, to: 200 << 10,
			o: ResizeOptions{Preallocation: PreallocationMetadata}},
		{name: "grow beyond the refcount table", create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, size: 40 << 10, to: 2560 << 10,
			o: ResizeOptions{Preallocation: PreallocationMetadata}},
		{name: "grow within the L1 table", create: CreateOptions{ClusterSize: 4096}, size: 1<<20 + 512, to: 1500 << 10,
			o: ResizeOptions{Preallocation: PreallocationFalloc}},
		{name: "grow, new L2 tables in the old L1", create: CreateOptions{ClusterSize: 512}, size: 300 << 10, after: 20<<10 + 512, to: 250 << 10,
			o: ResizeOptions{Preallocation: PreallocationFull}},
		{name: "grow over a base", create: over(CreateOptions{ClusterSize: 1024}), size: 40<<10 + 512, to: 400 << 10, base: 300 << 10},
		{name: "grow version 2 over a base", create: over(CreateOptions{Version: 2, ClusterSize: 1024}), size: 40<<10 + 512, to: 200 << 10, base: 300 << 10},
		{name: "grow extended over a base", create: over(CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}), size: 300<<10 + 512, to: 600 << 10, base: 500 << 10},
		{name: "grow, shared", create: CreateOptions{ClusterSize: 512}, size: 40<<10 + 512, to: 100 << 10, change: addTestSnapshot,
			o: ResizeOptions{Preallocation: PreallocationMetadata}},
		{name: "grow a data file", create: CreateOptions{ClusterSize: 1024, DataFile: "data"}, size: 40<<10 + 512, to: 200 << 10,
			o: ResizeOptions{Preallocation: PreallocationFull}},
		{name: "grow a raw data file", create: CreateOptions{ClusterSize: 1024, DataFile: "data", DataFileRaw: true}, size: 40<<10 + 512, to: 200 << 10},
		{name: "grow lazily", create: CreateOptions{ClusterSize: 512, LazyRefcounts: true}, size: 40<<10 + 512, to: 200 << 10,
			o: ResizeOptions{Preallocation: PreallocationMetadata}},
		{name: "shrink", create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, size: 200 << 10, to: 40<<10 + 512, o: ResizeOptions{Shrink: true}},
		{name: "shrink to nothing", create: CreateOptions{ClusterSize: 512}, size: 100 << 10, to: 0, o: ResizeOptions{Shrink: true}},
		{name: "shrink, shared", create: CreateOptions{ClusterSize: 512}, size: 100 << 10, to: 40<<10 + 512, change: addTestSnapshot,
			o: ResizeOptions{Shrink: true}},
		{name: "shrink a raw data file", create: CreateOptions{ClusterSize: 1024, DataFile: "data", DataFileRaw: true}, size: 200 << 10, to: 40<<10 + 512,
			o: ResizeOptions{Shrink: true}},
		{name: "shrink lazily", create: CreateOptions{ClusterSize: 512, LazyRefcounts: true}, size: 100 << 10, to: 40<<10 + 512, o: ResizeOptions{Shrink: true}},
	}
}

// build makes the files of the resize, and returns them and what the disk reads.
func (f *resizeFault) build(t testing.TB) (map[string]*crashtest.Disk, []byte) {
	t.Helper()
	disks := map[string]*crashtest.Disk{"image": crashtest.NewDisk(nil)}
	content := make([]byte, f.size)
	if f.base > 0 {
		base := fillRepeated(f.base)
		disks["base"] = crashtest.NewDisk(base)
		copy(content, base)
	}
	if f.create.DataFile != "" {
		disks["data"] = crashtest.NewDisk(nil)
	}
	host := newFaultHost(disks)
	o := f.create
	o.Open = &OpenOptions{Resolver: host}
	img, err := CreateStorage(host.storage("image"), f.size, &o)
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < f.size; off += f.size / 5 {
		p := content[off:min(off+f.size/6, f.size)]
		crashContent(p, off, 9, true)
		if _, err := img.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := img.WriteAt(content[f.size-700:], f.size-700); err != nil {
		t.Fatal(err)
	}
	if f.after > 0 {
		content = content[:f.after:f.after]
		if err := img.Resize(t.Context(), f.after, &ResizeOptions{Shrink: true}); err != nil {
			t.Fatal(err)
		}
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if f.change != nil {
		host.disks["image"] = crashtest.NewDisk(f.change(t, host.disks["image"].Bytes()))
	}
	return host.disks, content
}

// expect fails the test unless the image file is sound, but for leaks if they are allowed, and the disk has one of
// two sizes, with the content that belongs to it. It looks without the library.
func (f *resizeFault) expect(t testing.TB, disks map[string]*crashtest.Disk, content []byte, leaks bool, sizes ...int64) {
	t.Helper()
	rep, err := walkFile(disks["image"])
	if err != nil {
		t.Fatal(err)
	}
	if rep.Corruptions() > 0 && !rep.Dirty() || !leaks && !rep.Clean() {
		t.Errorf("%d corruptions, %d leaks: %q", rep.Corruptions(), rep.Leaks, rep.Findings)
	}
	r := faultRun{TB: t, host: &faultHost{disks: disks}}
	expectResized(t, r.readDisks(), content, sizes...)
}

// expectResized fails the test unless got has one of the sizes, and reads as content, cut or filled up with zeros.
func expectResized(t testing.TB, got, content []byte, sizes ...int64) {
	t.Helper()
	for _, size := range sizes {
		if int64(len(got)) != size {
			continue
		}
		want := make([]byte, size)
		copy(want, content)
		if !bytes.Equal(got, want) {
			for i := range got {
				if got[i] != want[i] {
					t.Errorf("byte %#x of %#x is %#x, want %#x", i, size, got[i], want[i])
					return
				}
			}
		}
		return
	}
	t.Errorf("a disk of %#x bytes, want one of %#x", len(got), sizes)
}

// TestFaultResize fails every host operation of every kind of Resize, once and for good: the call fails, the disk has
// its old size and content, or, where a shrink has switched already, the new ones; the same call works afterwards, and
// leaves nothing behind (I6).
func TestFaultResize(t *testing.T) {
	plans := []struct {
		name  string
		fault crashtest.Fault
		kinds string // as in faultPlan
	}{
		{"once", crashtest.Fault{Err: syscall.EIO}, ""},
		{"once after", crashtest.Fault{Err: syscall.EIO, After: true}, "wso"},
		{"short", crashtest.Fault{Err: syscall.EIO, Short: true}, "w"},
		{"full", crashtest.Fault{Err: syscall.ENOSPC, Forever: true}, "w"},
		{"for good", crashtest.Fault{Err: syscall.EIO, Forever: true}, ""},
	}
	for _, f := range resizeFaults() {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			disks, content := f.build(t)
			met := 0
			for _, plan := range plans {
				p := faultPlan{Fault: plan.fault, kinds: plan.kinds}
				for at := 0; ; at++ {
					name := fmt.Sprintf("%s at %d", plan.name, at)
					if !f.run(t, name, p.faultAt(at, disks), disks, content) {
						break
					}
					met++
					if t.Failed() {
						t.Fatal(name)
					}
				}
			}
			if met < 20 {
				t.Errorf("only %d faults were met", met)
			}
		})
	}
}

// run resizes with one fault, and reports whether it was met.
func (f *resizeFault) run(t *testing.T, name string, fault crashtest.Fault, disks map[string]*crashtest.Disk, content []byte) bool {
	host := newFaultHost(disks)
	o := OpenOptions{ReadWrite: true, Resolver: host, L2CacheBytes: 1, RefcountCacheBytes: 1}
	img, err := OpenStorage(host.storage("image"), &o)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	host.faults.Set(fault)
	err = img.Resize(t.Context(), f.to, &f.o)
	met := host.faults.Fired() > 0
	host.faults.Heal()
	old := int64(len(content))
	switch {
	case err == nil && img.Size() != f.to:
		t.Errorf("%s: size %d after a Resize without an error", name, img.Size())
	case err != nil && !errors.Is(err, crashtest.ErrInjected):
		t.Errorf("%s: error without an injected fault: %v", name, err)
	case err != nil && img.Size() == f.to && f.to > old:
		t.Errorf("%s: the disk grew, and the error is %v", name, err)
	}
	got := make([]byte, img.Size())
	if _, rerr := img.ReadAt(got, 0); rerr != nil {
		t.Errorf("%s: read: %v", name, rerr)
	}
	expectResized(t, got, content, old, f.to)
	f.expect(t, host.disks, content, true, old, f.to)
	if errors.Is(err, ErrFailed) {
		if err := img.Close(); !errors.Is(err, ErrFailed) {
			t.Errorf("%s: Close: %v, want ErrFailed", name, err)
		}
		if img, err = OpenStorage(host.storage("image"), &o); err != nil {
			t.Fatalf("%s: open again: %v", name, err)
		}
		err = fmt.Errorf("opened again after %w", ErrFailed)
	}
	if err != nil {
		again := f.o
		again.Shrink = true // where the size is the new one already
		if img.Size() == f.to {
			again.Preallocation = PreallocationOff
		}
		if rerr := img.Resize(t.Context(), f.to, &again); rerr != nil {
			t.Fatalf("%s: again, after %v: %v", name, err, rerr)
		}
	}
	failed := err
	if err := img.Close(); err != nil {
		t.Errorf("%s: Close: %v", name, err)
	}
	host.checkIdle(t)
	// What a failed image held is lost, and leaks; everything else was given back.
	f.expect(t, host.disks, content, errors.Is(failed, ErrFailed), f.to)
	if t.Failed() {
		t.Logf("%s: Resize: %v", name, failed)
	}
	return met
}
