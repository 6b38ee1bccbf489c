package qcow2

import (
	"errors"
	"iter"
	"math"
	"runtime"
	"testing"
)

// shiftingLayout is a layout that is another one at each pass.
type shiftingLayout struct {
	layouts []*testLayout
	pass    int
}

// Size implements Layout.
func (l *shiftingLayout) Size() int64 { return l.layouts[0].size }

// Extents implements Layout.
func (l *shiftingLayout) Extents(off, n int64) iter.Seq2[Extent, error] {
	now := l.layouts[min(l.pass, len(l.layouts)-1)]
	l.pass++
	return now.Extents(off, n)
}

// TestConvertInPlaceShifting converts sources whose layout changes from pass to pass: each pass tries a smaller cluster,
// and what the last one told is the image.
func TestConvertInPlaceShifting(t *testing.T) {
	sc := inPlaceScenario{source: fillRepeated(256 << 10)}
	at := func(host ...int64) *testLayout {
		l := &testLayout{size: int64(len(host)) * 16 << 10}
		for i, h := range host {
			l.extents = append(l.extents, Extent{Off: int64(i) * 16 << 10, Len: 16 << 10, Kind: ExtentData, HostOff: h << 10})
		}
		return l
	}
	shared, even, odd := at(16, 16, 64, 80), at(64, 80, 32, 48), at(17, 33, 81, 65)
	for i, tt := range []struct {
		layouts []*testLayout
		want    *testLayout // nil: refused
	}{
		{[]*testLayout{shared, even}, even}, // in clusters of 32 KiB
		{[]*testLayout{shared, shared, even}, even},
		{[]*testLayout{odd, odd, odd, odd, odd, odd, even}, even},
		{[]*testLayout{even, odd}, odd},
		{[]*testLayout{even, shared}, nil},
	} {
		d := sc.disk()
		err := ConvertInPlace(t.Context(), crashStorage{d}, &shiftingLayout{layouts: tt.layouts}, nil)
		if (err == nil) != (tt.want != nil) {
			t.Errorf("%d: %v", i, err)
		}
		if err != nil || tt.want == nil {
			if !errors.Is(err, ErrNotAligned) {
				t.Errorf("%d: %v", i, err)
			}
			continue
		}
		h, err := readHeader(d, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		now := inPlaceScenario{source: sc.source, layout: tt.want}
		if err := now.checkImage(d, now.content()); err != nil {
			t.Errorf("%d, clusters of %d: %v", i, h.clusterSize(), err)
		}
	}
}

// TestConvertInPlaceLimits converts files and disks of sizes near the limits, which are holes but for a few bytes: they
// are refused by type, or become sound images, in little memory.
func TestConvertInPlaceLimits(t *testing.T) {
	data := func(off, n, host int64) Extent { return Extent{Off: off, Len: n, Kind: ExtentData, HostOff: host} }
	none := func(off, n int64) Extent { return Extent{Off: off, Len: n, HostOff: noOffset} }
	for _, tt := range []struct {
		name   string
		length int64
		layout *testLayout // nil: raw
		opts   InPlaceOptions
		want   error // nil: it is converted
	}{
		{"largest refcount table of 512", 128<<30 - 128<<20, nil, InPlaceOptions{ClusterSize: 512}, nil},
		{"beyond it", 128 << 30, nil, InPlaceOptions{ClusterSize: 512}, ErrTooLarge},
		{"largest L1 table of 512", 128 << 30, nil, InPlaceOptions{ClusterSize: 512, RefcountBits: 1}, nil},
		{"beyond that", 128<<30 + 1, nil, InPlaceOptions{ClusterSize: 512}, ErrTooLarge},
		{"largest of 512 and 64 bits", 32<<30 - 64<<20, nil, InPlaceOptions{ClusterSize: 512, RefcountBits: 64}, nil},
		{"largest L1 table", 2 << 50, nil, InPlaceOptions{}, ErrTooLarge}, // the refcount table is too small
		{"largest refcount table", 2<<50 - 4<<30, nil, InPlaceOptions{}, nil},
		{"far file", 1 << 55, &testLayout{size: 1 << 20, extents: []Extent{data(0, 1<<20, 1<<54)}}, InPlaceOptions{}, ErrTooLarge},
		{"far file of large clusters", 1 << 55, &testLayout{size: 1 << 22, extents: []Extent{data(0, 1<<22, 1<<54)}}, InPlaceOptions{ClusterSize: 2 << 20, RefcountBits: 1}, nil},
		{"beyond all host offsets", 1 << 56, &testLayout{size: 1 << 22, extents: []Extent{data(0, 1<<22, 1<<54)}}, InPlaceOptions{ClusterSize: 2 << 20, RefcountBits: 1}, ErrTooLarge},
		{"longest file", math.MaxInt64, &testLayout{size: 1 << 20, extents: []Extent{none(0, 1<<20)}}, InPlaceOptions{ClusterSize: 2 << 20, RefcountBits: 1}, ErrTooLarge},
		{"largest disk", 1 << 20, &testLayout{size: math.MaxInt64 - 512, extents: []Extent{none(0, math.MaxInt64-512)}}, InPlaceOptions{ClusterSize: 2 << 20}, ErrTooLarge},
		{"many L2 tables under a limit", 1 << 20, &testLayout{size: 2 << 50, extents: []Extent{{Len: 2 << 50, Kind: ExtentZero, HostOff: noOffset}}},
			InPlaceOptions{BackingFile: "base", BackingFormat: "raw", Limits: &Limits{MetadataBytes: 1 << 20}}, ErrLimit},
		{"zeros at the largest host offset", 1 << 20, &testLayout{size: 1 << 20, extents: []Extent{{Len: 1 << 20, Kind: ExtentZero, HostOff: math.MaxInt64}}}, InPlaceOptions{}, nil},
		{"zeros across the end", 1 << 20, &testLayout{size: 1 << 20, extents: []Extent{{Len: 1 << 20, Kind: ExtentZero, HostOff: 1<<20 - 1}}}, InPlaceOptions{}, nil},
		{"data at the largest host offset", 1 << 20, &testLayout{size: 1 << 20, extents: []Extent{data(0, 1<<20, math.MaxInt64)}}, InPlaceOptions{}, ErrCorrupt},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := NewMemoryStorage()
			if err := s.Truncate(tt.length); err != nil {
				t.Fatal(err)
			}
			var src Layout = tt.layout
			if tt.layout == nil {
				raw, err := NewRawDisk(s)
				if err != nil {
					t.Fatal(err)
				}
				src = raw
			}
			if tt.want == nil {
				if _, err := s.WriteAt([]byte("last"), tt.length-4); err != nil {
					t.Fatal(err)
				}
			}
			counted := &countedStorage{Storage: s}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := ConvertInPlace(t.Context(), counted, src, &tt.opts)
			runtime.ReadMemStats(&after)
			taken := after.TotalAlloc - before.TotalAlloc - uint64(counted.written.Load()) // which the storage takes
			t.Logf("%d bytes written, %d allocated besides: %v", counted.written.Load(), int64(taken), err)
			if int64(taken) > 24<<20 {
				t.Errorf("%d bytes allocated", taken)
			}
			if tt.want != nil {
				if size, _ := s.Size(); !errors.Is(err, tt.want) || size != tt.length {
					t.Errorf("error %v, want %v; file of %d", err, tt.want, size)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			img, err := OpenStorage(s, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			if tt.layout == nil {
				p := make([]byte, 4)
				if _, err := img.ReadAt(p, tt.length-4); err != nil || string(p) != "last" {
					t.Errorf("the end reads %q, %v", p, err)
				}
			}
			if res, err := img.Check(t.Context(), nil); err != nil || !res.Clean() {
				t.Errorf("check: %+v, %v", res, err)
			}
		})
	}
}
