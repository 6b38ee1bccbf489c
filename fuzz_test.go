package qcow2

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
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
	return seeds
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

// FuzzOpenRead opens whatever it is given, reads it and writes a copy of it: nothing may panic or hang. What
// was read must not depend on the sizes of caches and requests.
func FuzzOpenRead(f *testing.F) {
	for _, s := range fuzzSeeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			t.Skip("larger than the seeds are meant to grow")
		}
		img, err := OpenReader(bytes.NewReader(b), int64(len(b)), fuzzOptions(t))
		if err != nil {
			return
		}
		defer img.Close()
		fuzzRead(t, img, b)
		fuzzWrite(t, b)
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

// fuzzWrite writes into a copy of the image.
func fuzzWrite(t *testing.T, b []byte) {
	s := NewMemoryStorage()
	if _, err := s.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	o := fuzzOptions(t)
	o.ReadWrite = true
	img, err := OpenStorage(s, o)
	if err != nil {
		return
	}
	r := rand.New(rand.NewPCG(1, uint64(len(b))))
	for range 8 {
		if img.Size() < 4096 {
			break
		}
		p := make([]byte, 1+r.IntN(4000))
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		off := r.Int64N(img.Size() - int64(len(p)) + 1)
		if _, err := img.WriteAt(p, off); err != nil {
			break
		}
		_ = img.Sync()
	}
	_ = img.Close()
}
