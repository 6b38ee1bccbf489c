package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
)

// TestAmendLive amends beside writers, readers and syncs, back and forth between everything: what is read is what was
// written, and the image is without a flaw.
func TestAmendLive(t *testing.T) {
	const size = 2<<20 + 512*5
	on, off := true, false
	base := memoryDisk(t, size, 1)
	img, s := memoryOverlay(t, base, size, CreateOptions{ClusterSize: 4096}, OpenOptions{L2CacheBytes: 1, RefcountCacheBytes: 1})
	want := diskBytes(t, base)
	want = want[:size]
	stop, done := make(chan struct{}), make(chan error)
	go func() { done <- writeAround(img, want, stop) }()
	synced := make(chan error)
	go func() {
		for {
			select {
			case <-stop:
				synced <- nil
				return
			default:
			}
			img.Info()
			if err := img.Sync(); err != nil {
				synced <- err
				return
			}
		}
	}()
	for i := range 4 {
		for _, o := range []AmendOptions{
			{Version: 2}, {Version: 3}, {RefcountBits: 1}, {RefcountBits: 64, LazyRefcounts: &on}, {RefcountBits: 8}, {LazyRefcounts: &off, RefcountBits: 2},
			{RefcountBits: 32}, {Version: 2, RefcountBits: 16}, {Version: 3, LazyRefcounts: &on}, {LazyRefcounts: &off},
		} {
			if err := img.Amend(context.Background(), &o); err != nil {
				t.Errorf("round %d, %+v: %v", i, o, err)
			}
		}
	}
	close(stop)
	if err := errors.Join(<-done, <-synced); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(diskBytes(t, img), want) {
		t.Error("the image reads otherwise")
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
	walkStorage(t, s, true)
}

// TestAmendRefused lists what is refused, by the name of the option, with nothing changed.
func TestAmendRefused(t *testing.T) {
	on := true
	bitmap := func(t *testing.T, b []byte) []byte { return addTestBitmap(t, b) }
	edited := func(change func(h *header)) func(t *testing.T, b []byte) []byte {
		return func(t *testing.T, b []byte) []byte {
			h := decodeCluster(t, b[:4096])
			change(h)
			p, err := h.encode()
			if err != nil {
				t.Fatal(err)
			}
			copy(b, p)
			return b
		}
	}
	snapshot := func(extra []byte) func(t *testing.T, b []byte) []byte {
		return func(t *testing.T, b []byte) []byte {
			b = addTestSnapshot(t, b)
			h := decodeCluster(t, b[:4096])
			copy(b[h.snapshotsOff+minSnapshotEntry:], extra)
			return b
		}
	}
	tests := []struct {
		name   string
		create CreateOptions
		change func(t *testing.T, b []byte) []byte
		opts   AmendOptions
		option string // that is named
		want   error
	}{
		{name: "version 4", opts: AmendOptions{Version: 4}, option: "Version"},
		{name: "refcounts of 3 bits", opts: AmendOptions{RefcountBits: 3}, option: "RefcountBits"},
		{name: "refcounts of 128 bits", opts: AmendOptions{RefcountBits: 128}, option: "RefcountBits"},
		{name: "version 2 with 8 bits", opts: AmendOptions{Version: 2, RefcountBits: 8}, option: "RefcountBits"},
		{name: "version 2, lazy", opts: AmendOptions{Version: 2, LazyRefcounts: &on}, option: "LazyRefcounts"},
		{name: "8 bits in version 2", create: CreateOptions{Version: 2}, opts: AmendOptions{RefcountBits: 8}, option: "RefcountBits"},
		{name: "lazy in version 2", create: CreateOptions{Version: 2}, opts: AmendOptions{LazyRefcounts: &on}, option: "LazyRefcounts"},
		{name: "raw", opts: AmendOptions{DataFileRaw: &on}, option: "DataFileRaw"},
		{name: "8 bits to version 2", create: CreateOptions{RefcountBits: 8}, opts: AmendOptions{Version: 2}, option: "Version"},
		{name: "extended to version 2", create: CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}, opts: AmendOptions{Version: 2}, option: "Version"},
		{name: "zstd to version 2", create: CreateOptions{Compression: CompressionZstd}, opts: AmendOptions{Version: 2}, option: "Version"},
		{name: "bitmaps to version 2", change: bitmap, opts: AmendOptions{Version: 2}, option: "Version"},
		{name: "unknown feature to version 2", change: edited(func(h *header) { h.compatible |= 1 << 9 }), opts: AmendOptions{Version: 2}, option: "Version"},
		{name: "unknown field to version 2", change: edited(func(h *header) { h.headerLength, h.unknownFields = 120, []byte("unknown!") }), opts: AmendOptions{Version: 2}, option: "Version"},
		{name: "snapshot of another size to version 2", change: snapshot(snapshotExtra(0, 1<<19)), opts: AmendOptions{Version: 2}, option: "Version"},
		{name: "snapshot of 4 GiB of state to version 2", change: snapshot(snapshotExtra(1<<32, 1<<20)), opts: AmendOptions{Version: 2}, option: "Version"},
		{name: "shared clusters to 1 bit", change: snapshot(nil), opts: AmendOptions{RefcountBits: 1}, want: ErrTooLarge},
		{name: "no room for version 3", create: CreateOptions{Version: 2, ClusterSize: 512}, opts: AmendOptions{Version: 3}, want: ErrHeaderFull,
			change: func(t *testing.T, b []byte) []byte {
				h := decodeCluster(t, b[:512])
				h.extensions = append(h.extensions, headerExtension{0x11111111, make([]byte, 400)})
				p, err := h.encode()
				if err != nil {
					t.Fatal(err)
				}
				copy(b, p)
				return b
			}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := NewMemoryStorage()
			tt.create.ClusterSize = max(tt.create.ClusterSize, 4096)
			if tt.want == ErrHeaderFull {
				tt.create.ClusterSize = 512
			}
			img, err := CreateStorage(s, 1<<20, &tt.create)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := img.WriteAt(bytes.Repeat([]byte{1}, 100_000), 0); err != nil {
				t.Fatal(err)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if tt.change != nil {
				b := tt.change(t, readAll(t, s))
				if _, err := s.WriteAt(b, 0); err != nil {
					t.Fatal(err)
				}
			}
			if img, err = OpenStorage(s, &OpenOptions{ReadWrite: true}); err != nil {
				t.Fatal(err)
			}
			before := readAll(t, s)
			info := img.Info()
			err = img.Amend(context.Background(), &tt.opts)
			var oe *OptionError
			switch {
			case tt.want != nil && !errors.Is(err, tt.want):
				t.Errorf("error %v, want %v", err, tt.want)
			case tt.want == nil && (!errors.As(err, &oe) || oe.Option != tt.option):
				t.Errorf("error %v, want one about option %s", err, tt.option)
			}
			if now := img.Info(); fmt.Sprint(now) != fmt.Sprint(info) {
				t.Errorf("features are %+v, were %+v", now, info)
			}
			if !bytes.Equal(before, readAll(t, s)) {
				t.Error("the file changed")
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
			walkStorage(t, s, false)
		})
	}
}

// TestAmendMovesRefcountTable writes out so many zero clusters that the refcount table has to grow on the way: the
// header of version 2 names the table that is in force (I1, I3).
func TestAmendMovesRefcountTable(t *testing.T) {
	const cs, size = 512, 12 << 20
	s := NewMemoryStorage()
	below, err := NewRawDisk(NewReaderStorage(bytes.NewReader(pattern(1, size)), size))
	if err != nil {
		t.Fatal(err)
	}
	open := &OpenOptions{ReadWrite: true, Backing: below}
	img, err := CreateStorage(s, size, &CreateOptions{ClusterSize: cs, BackingFile: "base", BackingFormat: "raw", Open: open})
	if err != nil {
		t.Fatal(err)
	}
	// A table of one cluster counts 8 MiB.
	const data = 6 << 20
	mustWrite(t, img, pattern(2, data), 0)
	if err := img.WriteZeroes(data, size-data, 0); err != nil {
		t.Fatal(err)
	}
	before := img.hdr.refTableOff
	if err := img.Amend(context.Background(), &AmendOptions{Version: 2}); err != nil {
		t.Fatal(err)
	}
	if img.hdr.refTableOff == before {
		t.Error("the refcount table did not move")
	}
	if err := wantAt(img, append(pattern(2, data), make([]byte, size-data)...), 0)(); err != nil {
		t.Error(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	walkStorage(t, s, true)
}

// TestAmendLeavesCopied writes out a zero cluster of a snapshot, which shared its host cluster with data of the disk. The
// disk is then the only one with it, which COPIED tells (I7).
func TestAmendLeavesCopied(t *testing.T) {
	const cs = 4096
	s := NewMemoryStorage()
	img, err := CreateStorage(s, 64*cs, &CreateOptions{ClusterSize: cs})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	mustWrite(t, img, pattern(1, cs), 0)
	createSnapshot(t, img, "data")
	if err := img.WriteZeroes(0, cs, 0); err != nil {
		t.Fatal(err)
	}
	createSnapshot(t, img, "zeros")
	if err := errors.Join(img.ApplySnapshot(ctx, SnapshotRef{Name: "data"}), img.DeleteSnapshot(ctx, SnapshotRef{Name: "data"})); err != nil {
		t.Fatal(err)
	}
	// A write of its own gives the disk an L2 table of its own.
	mustWrite(t, img, pattern(2, cs), 8*cs)
	e := entryAt(t, img, 0)
	if e.word&flagCopied != 0 || img.m.kind(e, 0) != kindNormal {
		t.Fatalf("entry %#x, want data that is shared", e.word)
	}
	if err := img.Amend(ctx, &AmendOptions{Version: 2}); err != nil {
		t.Fatal(err)
	}
	if now := entryAt(t, img, 0); now.word != e.word|flagCopied {
		t.Errorf("entry %#x, want %#x with COPIED", now.word, e.word)
	}
	if err := errors.Join(wantAt(img, pattern(1, cs), 0)(), img.Close()); err != nil {
		t.Error(err)
	}
	walkStorage(t, s, true)
}

// TestAmendNothing shows that an Amend of nothing writes nothing.
func TestAmendNothing(t *testing.T) {
	s := NewMemoryStorage()
	img, err := CreateStorage(s, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	before := readAll(t, s)
	off := false
	for _, o := range []*AmendOptions{nil, {}, {Version: 3, RefcountBits: 16, LazyRefcounts: &off, DataFileRaw: &off}} {
		if err := img.Amend(context.Background(), o); err != nil {
			t.Error(err)
		}
	}
	if !bytes.Equal(before, readAll(t, s)) {
		t.Error("the file changed")
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
	if err := img.Amend(context.Background(), nil); err == nil {
		t.Error("amend of a closed image")
	}
}
