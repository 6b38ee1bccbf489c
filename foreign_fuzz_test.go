package qcow2

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// FuzzForeign opens whatever it is given as each of the formats, and reads it: nothing may panic, hang, or allocate out
// of proportion. Extents are runs without gaps, what is read is what they say, and neither depends on the size of the
// cache or of the requests.
func FuzzForeign(f *testing.F) {
	for _, build := range foreignImages {
		f.Add(build().file)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			t.Skip("larger than the seeds are meant to grow")
		}
		for _, format := range []ForeignFormat{ForeignQED, ForeignVHD, ForeignVDI} {
			im := &foreignImage{format: format, file: b}
			if format == ForeignVHD && len(b) >= 2048 && len(b)%2 == 0 {
				// No mutation hits the checksums.
				im.file = bytes.Clone(b)
				im.sumVHD()
			}
			detected, _ := DetectForeign(im.reader(), im.size())
			n := allocated(func() {
				o := &OpenOptions{Limits: &Limits{MetadataBytes: 8 << 20, VirtualSize: 1 << 60}}
				if format == ForeignQED {
					o.Backing = newFuzzBacking(t)
				}
				d, err := im.open(o)
				if err != nil {
					if errors.Is(err, io.ErrUnexpectedEOF) {
						t.Fatalf("%s: read past the end: %v", format, err)
					}
					return
				}
				defer mustClose(t, d)
				if detected == "" {
					t.Fatalf("opened as %s, but not detected", format)
				}
				o.Limits.MetadataBytes = 1
				small := im.mustOpen(t, o)
				defer mustClose(t, small)
				fuzzForeignExtents(t, d, small, im.file)
			})
			if n > maxHostileAlloc {
				t.Errorf("%s: allocated %d bytes for a file of %d", format, n, len(b))
			}
		}
	})
}

// fuzzForeignExtents walks the first extents of d, which lies in the file b, and compares what is read of them, by
// small, which is the same disk.
func fuzzForeignExtents(t *testing.T, d, small *ForeignDisk, b []byte) {
	next, count := int64(0), 0
	for e, err := range d.Extents(0, d.Size()) {
		if count++; count > 300 {
			return
		}
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("extents at %#x: %v", next, err)
			}
			if _, err := small.ReadAt(make([]byte, 1), next); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("extents are corrupt at %#x, a read is: %v", next, err)
			}
			return
		}
		if e.Off != next || e.Len <= 0 || e.Len > d.Size()-next {
			t.Fatalf("extent %+v does not follow %#x", e, next)
		}
		next += e.Len
		// The ends and the middle of it.
		for _, off := range []int64{e.Off, e.Off + e.Len/2, max(e.Off, next-5000)} {
			want := make([]byte, min(next-off, 5000))
			switch {
			case e.Kind == ExtentData && e.Depth == 0:
				copy(want, b[e.HostOff+off-e.Off:])
			case e.Kind == ExtentData:
				if _, err := d.Backing().ReadAt(want, off); err != nil && err != io.EOF {
					t.Fatal(err)
				}
			}
			got := make([]byte, len(want))
			if n, err := small.ReadAt(got, off); n != len(got) || err != nil || !bytes.Equal(got, want) {
				t.Fatalf("read %d bytes at %#x of extent %+v: %d, %v", len(got), off, e, n, err)
			}
		}
	}
	if next != d.Size() {
		t.Fatalf("extents end at %#x of %#x", next, d.Size())
	}
}
