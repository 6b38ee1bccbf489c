package qcow2

import (
	"bytes"
	"context"
	"errors"
	"testing"
)

// qedOver returns a QED image that names a backing file.
func qedOver(name string, raw bool) *foreignImage {
	im := newTestQED()
	features := uint64(1)
	if raw {
		features |= 4
	}
	im.le(16, 8, features)
	im.le(56, 4, 64)
	im.le(60, 4, uint64(len(name)))
	im.put([]byte(name), 64)
	return im
}

// storage returns the image in a storage.
func (im *foreignImage) storage(t testing.TB) *MemoryStorage {
	t.Helper()
	s := NewMemoryStorage()
	if _, err := s.WriteAt(im.file, 0); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestForeignBacking opens QED images over others: by the resolver, by the caller, without. The rules are those of
// qcow2 images: no format is probed, no chain is too deep or meets a file twice.
func TestForeignBacking(t *testing.T) {
	base := NewMemoryStorage()
	if _, err := base.WriteAt(bytes.Repeat([]byte("base"), 3000), 0); err != nil {
		t.Fatal(err)
	}
	image := NewMemoryStorage()
	img, err := CreateStorage(image, 40<<10, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.WriteAt(bytes.Repeat([]byte("qcow"), 10<<10), 0); err != nil {
		t.Fatal(err)
	}
	mustClose(t, img)
	loop := qedOver("loop", false).storage(t)
	names := ResolverMap{"base": base, "image": image, "loop": loop, "under": qedOver("base", true).storage(t)}
	disk := newFuzzBacking(t)
	tests := []struct {
		name  string
		im    *foreignImage
		opts  OpenOptions
		below string // what the first unallocated cluster reads as, repeated
		want  error
	}{
		{"no resolver", qedOver("base", true), OpenOptions{}, "", ErrBackingRequired},
		{"no format", qedOver("base", false), OpenOptions{Resolver: names}, "", ErrBackingFormatUnknown},
		{"raw by the image", qedOver("base", true), OpenOptions{Resolver: names}, "base", nil},
		{"raw by the caller", qedOver("base", false), OpenOptions{Resolver: names, BackingFormat: "raw"}, "base", nil},
		{"qcow2", qedOver("image", false), OpenOptions{Resolver: names, BackingFormat: "qcow2"}, "qcow", nil},
		{"qed over raw", qedOver("under", false), OpenOptions{Resolver: names, BackingFormat: "qed"}, "base", nil},
		{"unknown format", qedOver("base", false), OpenOptions{Resolver: names, BackingFormat: "vmdk"}, "", ErrUnsupported},
		{"not that format", qedOver("base", false), OpenOptions{Resolver: names, BackingFormat: "vdi"}, "", ErrWrongFormat},
		{"no such name", qedOver("none", true), OpenOptions{Resolver: names}, "", ErrResolve},
		{"caller's disk", qedOver("none", false), OpenOptions{Backing: disk}, "backing ", nil},
		{"caller's disk without a name", newTestQED(), OpenOptions{Backing: disk}, "backing ", nil},
		{"without", qedOver("base", true), OpenOptions{NoBacking: true}, "", ErrBackingRequired},
		{"depth", qedOver("base", true), OpenOptions{Resolver: names, Limits: &Limits{ChainDepth: 1}}, "", ErrChain},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d, err := tt.im.open(&tt.opts)
			if tt.opts.NoBacking {
				if err != nil {
					t.Fatal(err)
				}
				defer mustClose(t, d)
				if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
					t.Errorf("read of the image's own: %v", err)
				}
				_, err = d.ReadAt(make([]byte, 512), 4096)
				for _, e := range d.Extents(4096, 512) {
					if !errors.Is(e, tt.want) {
						t.Errorf("extents: %v", e)
					}
				}
			}
			if tt.want != nil {
				if !errors.Is(err, tt.want) {
					t.Fatalf("%v, want %v", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, d)
			got := make([]byte, len(tt.im.disk))
			if _, err := d.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			want := bytes.Clone(tt.im.disk)
			below := d.Backing()
			for _, e := range tt.im.want {
				if e.Kind == ExtentUnallocated {
					n := min(e.Len, max(0, below.Size()-e.Off))
					if _, err := below.ReadAt(want[e.Off:][:n], e.Off); err != nil {
						t.Fatal(err)
					}
				}
			}
			if !bytes.Equal(got, want) || !bytes.HasPrefix(got[4096:], []byte(tt.below)) {
				t.Errorf("not what the image and %q below hold: %q", tt.below, got[4096:][:8])
			}
			data := false
			for _, e := range extentsList(t, d) {
				data = data || e.Kind == ExtentData && e.Depth > 0
			}
			if !data {
				t.Error("no extent comes from below")
			}
		})
	}
	if _, err := OpenForeign(loop, ForeignQED, &OpenOptions{Resolver: names, BackingFormat: "qed"}); !errors.Is(err, ErrChain) {
		t.Errorf("a loop: %v", err)
	}
}

// TestForeignBelow puts images of foreign formats below a qcow2 image. They are read; Commit refuses to write them.
func TestForeignBelow(t *testing.T) {
	for name, build := range foreignImages {
		t.Run(name, func(t *testing.T) {
			im := build()
			base, top := im.storage(t), NewMemoryStorage()
			open := &OpenOptions{ReadWrite: true, Resolver: ResolverMap{"base": base}}
			img, err := CreateStorage(top, int64(len(im.disk)), &CreateOptions{BackingFile: "base", BackingFormat: string(im.format),
				ClusterSize: 4096, Open: open})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := img.WriteAt([]byte("top"), 5000); err != nil {
				t.Fatal(err)
			}
			mustClose(t, img)
			if img, err = OpenStorage(top, open); err != nil {
				t.Fatal(err)
			}
			defer mustClose(t, img)
			want := bytes.Clone(im.disk)
			copy(want[5000:], "top")
			got := make([]byte, len(want))
			if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("not what both hold: %v", err)
			}
			for _, e := range extentsList(t, img) {
				if e.Depth == 1 && e.Kind == ExtentData && !bytes.Equal(im.file[e.HostOff:][:e.Len], want[e.Off:][:e.Len]) {
					t.Errorf("extent %+v is not where it says", e)
				}
			}
			before := bytes.Clone(im.file)
			if err := img.Commit(context.Background(), nil); !errors.Is(err, ErrReadOnly) {
				t.Errorf("Commit: %v", err)
			}
			after := make([]byte, len(before))
			if _, err := base.ReadAt(after, 0); err != nil || !bytes.Equal(before, after) {
				t.Errorf("Commit wrote: %v", err)
			}
			d := im.mustOpen(t, nil)
			defer mustClose(t, d)
			if err := img.Rebase(context.Background(), &RebaseOptions{Backing: d, BackingFile: "other", BackingFormat: string(im.format)}); err != nil {
				t.Fatalf("Rebase: %v", err)
			}
			if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("after Rebase: %v", err)
			}
			if err := img.Commit(context.Background(), nil); !errors.Is(err, ErrReadOnly) {
				t.Errorf("Commit into the caller's: %v", err)
			}
		})
	}
	// An image is not created over its own file.
	im := newTestQED()
	s := im.storage(t)
	d, err := OpenForeign(s, ForeignQED, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, d)
	o := &CreateOptions{BackingFile: "x", BackingFormat: "qed", Overwrite: true, Open: &OpenOptions{Backing: d, Lock: LockOff}}
	if _, err := CreateStorage(s, 1<<20, o); !errors.Is(err, ErrChain) {
		t.Errorf("an image over itself: %v", err)
	}
}
