package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/google/go-cmp/cmp"
)

// TestConvertInPlace converts files of all kinds: the image is sound, holds what the disk held, and the data bytes have
// not moved.
func TestConvertInPlace(t *testing.T) {
	for _, sc := range inPlaceScenarios() {
		t.Run(sc.name, func(t *testing.T) {
			d, content := sc.disk(), sc.content()
			before := d.Bytes()
			host := newFaultHost(map[string]*crashtest.Disk{"image": d})
			if err := sc.convert(host.storage("image"), inPlaceSyncNone); err != nil {
				t.Fatal(err)
			}
			host.checkIdle(t)
			d = host.disks["image"]
			if err := sc.checkImage(d, content); err != nil {
				t.Error(err)
			}
			h, err := readHeader(d, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			after, cluster := d.Bytes(), int(h.clusterSize())
			if len(after)%cluster != 0 {
				t.Errorf("the file ends at %d, not with a cluster of %d", len(after), cluster)
			}
			if len(before) > cluster && !bytes.Equal(after[cluster:len(before)], before[cluster:]) {
				t.Error("the file changed between the header's cluster and the end of the source")
			}
			if rest := after[sectorSize:min(cluster, len(after))]; !isZero(rest) {
				t.Error("something of the source stands behind the header")
			}
			written := int64(0)
			for _, op := range host.faults.Ops() {
				if op.Kind == crashtest.Write {
					written += op.N
				}
			}
			t.Logf("clusters of %d, source of %d bytes, %d written, file of %d", cluster, len(before), written, len(after))
		})
	}
}

// TestConvertInPlaceGoesOn writes to all of a converted image, grows it, and finds it sound.
func TestConvertInPlaceGoesOn(t *testing.T) {
	for _, sc := range inPlaceScenarios() {
		t.Run(sc.name, func(t *testing.T) {
			d, content := sc.disk(), sc.content()
			if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
				t.Fatal(err)
			}
			img, err := OpenStorage(crashStorage{d}, &OpenOptions{ReadWrite: true, NoBacking: true})
			if err != nil {
				t.Fatal(err)
			}
			grown := img.Size() + 3*sectorSize
			if sc.opts.BackingFile == "" {
				if err := img.Resize(t.Context(), grown, nil); err != nil {
					t.Fatal(err)
				}
				content = append(content, make([]byte, 3*sectorSize)...)
			}
			for off := int64(0); off+int64(sectorSize) <= img.Size(); off += 5 * sectorSize {
				crashContent(content[off:off+sectorSize], off, 8, true)
				if _, err := img.WriteAt(content[off:off+sectorSize], off); errors.Is(err, ErrBackingRequired) {
					continue // a part of a cluster that shows what is below
				} else if err != nil {
					t.Fatal(err)
				}
			}
			mustClose(t, img)
			walkClean(t, crashStorage{d})
			if sc.opts.BackingFile == "" {
				if err := sc.checkImage(d, content); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestInPlaceOrder compares the host operations of a conversion with what its comment says.
func TestInPlaceOrder(t *testing.T) {
	sc := inPlaceScenarioNamed(t, "trailer behind a whole cluster")
	host := newFaultHost(map[string]*crashtest.Disk{"image": sc.disk()})
	if err := sc.convert(host.storage("image"), inPlaceSyncNone); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"image truncate 0x20200",    // whether it can be cut: to the length that it has
		"image write 0x80000+0x200", // footer
		"image sync",
		"image write 0x80200+0x200",   // copy of the trailer
		"image write 0x30000+0x50000", // tables, and the cluster in the header's place
		"image sync",
		"image write 0x0+0x200", // header
		"image sync",
		"image write 0x200+0xfe00", // the rest of its cluster
		"image sync",
		"image truncate 0x80000", // without footer and trailer
		"image sync",
	}
	if diff := cmp.Diff(want, host.changes(0)); diff != "" {
		t.Errorf("host operations (-want +got):\n%s", diff)
	}
}

// TestConvertInPlaceRefuses wants a refusal of its own type, and a file that is not touched.
func TestConvertInPlaceRefuses(t *testing.T) {
	source := fillRepeated(64 << 10)
	qcow2 := bytes.Clone(source)
	copy(qcow2, "QFI\xfb")
	data := func(off, n, host int64) Extent { return Extent{Off: off, Len: n, Kind: ExtentData, HostOff: host} }
	none := func(off, n int64) Extent { return Extent{Off: off, Len: n, HostOff: noOffset} }
	zero := func(off, n int64) Extent { return Extent{Off: off, Len: n, Kind: ExtentZero, HostOff: noOffset} }
	layout := func(size int64, e ...Extent) *testLayout { return &testLayout{size: size, extents: e} }
	over := InPlaceOptions{BackingFile: "base", BackingFormat: "raw"}
	over2 := over
	over2.Version = 2
	// Too many runs: every second cluster is a hole.
	holey := make([]int64, 64)
	for i := range holey {
		holey[i] = int64(i)
		if i%2 == 1 {
			holey[i] = -1
		}
	}
	var option *OptionError
	tests := []struct {
		name   string
		source []byte
		layout *testLayout // nil: raw
		opts   InPlaceOptions
		want   any // a sentinel, or the target of errors.As
	}{
		{"already an image", qcow2, nil, InPlaceOptions{}, &option},
		{"no power of two", source, nil, InPlaceOptions{ClusterSize: 5000}, &option},
		{"no such version", source, nil, InPlaceOptions{Version: 4}, &option},
		{"no such lock", source, nil, InPlaceOptions{Lock: LockShare}, &option},
		{"backing file without a format", source, nil, InPlaceOptions{BackingFile: "base"}, &option},
		{"long name", source, nil, InPlaceOptions{BackingFile: strings.Repeat("n", 400), BackingFormat: "raw"}, ErrHeaderFull},
		{"long name, 512", source, nil, InPlaceOptions{BackingFile: strings.Repeat("n", 400), BackingFormat: "raw", ClusterSize: 512}, ErrHeaderFull},
		{"odd sectors", source, layout(32<<10, data(0, 32<<10, 1536)), InPlaceOptions{}, ErrNotAligned},
		{"bytes", source, layout(32<<10, data(0, 32<<10, 1537)), InPlaceOptions{ClusterSize: 512}, ErrNotAligned},
		{"larger clusters than the data's", source, layout(32<<10, data(0, 16<<10, 32<<10), data(16<<10, 16<<10, 16<<10)), InPlaceOptions{ClusterSize: 32 << 10}, ErrNotAligned},
		{"two places of one", source, layout(64<<10, data(0, 32<<10, 0), data(32<<10, 32<<10, 0)), InPlaceOptions{}, ErrNotAligned},
		{"two places of one behind", source, layout(64<<10, data(0, 32<<10, 32<<10), data(32<<10, 16<<10, 48<<10), none(48<<10, 16<<10)), InPlaceOptions{}, ErrNotAligned},
		{"something between", source, layout(64<<10, data(0, 512, 4096), none(512, 4096-512), data(4096, 60<<10, 8192-4096)), InPlaceOptions{ClusterSize: 4096}, ErrNotAligned},
		{"beyond the file", source, layout(64<<10, data(0, 64<<10, 4096)), InPlaceOptions{}, ErrCorrupt},
		{"far beyond the file", source, layout(64<<10, data(0, 64<<10, math.MaxInt64-100)), InPlaceOptions{}, ErrCorrupt},
		{"compressed", source, layout(64<<10, Extent{Len: 64 << 10, Kind: ExtentCompressed, HostOff: 0}), InPlaceOptions{}, ErrNotAligned},
		{"data nowhere", source, layout(64<<10, data(0, 64<<10, -1)), InPlaceOptions{}, ErrNotAligned},
		{"gap", source, layout(64<<10, data(0, 4096, 0), data(8192, 4096, 8192)), InPlaceOptions{}, errBadExtents},
		{"short", source, layout(64<<10, data(0, 4096, 0)), InPlaceOptions{}, errBadExtents},
		{"overlap", source, layout(64<<10, data(0, 8192, 0), data(4096, 60<<10, 4096)), InPlaceOptions{}, errBadExtents},
		{"negative size", source, layout(-1), InPlaceOptions{}, ErrTooLarge},
		{"huge size", source, layout(math.MaxInt64, none(0, math.MaxInt64)), InPlaceOptions{}, ErrTooLarge},
		{"limit of the size", source, nil, InPlaceOptions{Limits: &Limits{VirtualSize: 4096}}, ErrLimit},
		{"limit of runs", fillRepeated(64 * 512), layoutOf(64*512, 512, 0, holey), InPlaceOptions{ClusterSize: 512, Limits: &Limits{MetadataBytes: 20 * inPlaceRunBytes}}, ErrLimit},
		{"a backing file that is not named", source, layout(64<<10, data(0, 4096, 0), Extent{Off: 4096, Len: 60 << 10, Kind: ExtentData, Depth: 1}), InPlaceOptions{}, &option},
		{"a part that shows", source, layout(64<<10, data(0, 512, 0), none(512, 64<<10-512)), InPlaceOptions{BackingFile: "base", BackingFormat: "raw", ClusterSize: 4096}, ErrNotAligned},
		{"a part that is zero", source, layout(64<<10, zero(0, 512), none(512, 64<<10-512)), InPlaceOptions{BackingFile: "base", BackingFormat: "raw", ClusterSize: 4096}, ErrNotAligned},
		{"zeros of version 2", source, layout(64<<10, data(0, 4096, 0), zero(4096, 60<<10)), over2, &option},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sc := inPlaceScenario{source: tt.source, layout: tt.layout, opts: tt.opts}
			host := newFaultHost(map[string]*crashtest.Disk{"image": sc.disk()})
			err := sc.convert(host.storage("image"), inPlaceSyncNone)
			switch want := tt.want.(type) {
			case error:
				if !errors.Is(err, want) {
					t.Errorf("error %v, want %v", err, want)
				}
			default:
				if !errors.As(err, want) {
					t.Errorf("error %v, want a %T", err, want)
				}
			}
			if errors.Is(err, ErrInPlace) {
				t.Errorf("error %v matches ErrInPlace", err)
			}
			for _, op := range host.faults.Ops() {
				if hostChange(op) && op.Kind != crashtest.Truncate || op.Kind == crashtest.Truncate && op.Off != int64(len(tt.source)) {
					t.Errorf("a refusal did %v", op)
				}
			}
			host.checkIdle(t)
		})
	}
	t.Run("device", func(t *testing.T) {
		d := crashtest.NewDevice(source, 64<<10)
		sc := inPlaceScenario{source: source}
		if err := sc.convert(crashStorage{d}, inPlaceSyncNone); !errors.Is(err, ErrUnsupported) {
			t.Errorf("error %v, want ErrUnsupported", err)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		sc := inPlaceScenario{source: source}
		if err := sc.convert(NewReaderStorage(bytes.NewReader(source), 64<<10), inPlaceSyncNone); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("error %v, want errors.ErrUnsupported", err)
		}
	})
	t.Run("another file", func(t *testing.T) {
		src, err := NewRawDisk(crashStorage{crashtest.NewDisk(source)})
		if err != nil {
			t.Fatal(err)
		}
		if err := ConvertInPlace(t.Context(), crashStorage{crashtest.NewDisk(source)}, src, nil); !errors.As(err, &option) {
			t.Errorf("error %v, want a *OptionError", err)
		}
	})
}

// TestConvertInPlaceClusterSize wants the largest clusters that suit the data, and the place that speaks against those
// that do not.
func TestConvertInPlaceClusterSize(t *testing.T) {
	source := fillRepeated(256 << 10)
	for _, tt := range []struct {
		host int64
		want uint64
	}{{128 << 10, 64 << 10}, {32 << 10, 32 << 10}, {68 << 10, 4096}, {1 << 10, 1024}, {0, 64 << 10}} {
		sc := inPlaceScenario{source: source, layout: &testLayout{size: 128 << 10, extents: []Extent{{Len: 128 << 10, Kind: ExtentData, HostOff: tt.host}}}}
		d := sc.disk()
		if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
			t.Fatal(err)
		}
		if err := sc.checkImage(d, sc.content()); err != nil {
			t.Error(err)
		}
		h, err := readHeader(d, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if h.clusterSize() != tt.want {
			t.Errorf("data at host %#x: clusters of %d, want %d", tt.host, h.clusterSize(), tt.want)
		}
	}
	sc := inPlaceScenario{source: source, layout: &testLayout{size: 4096, extents: []Extent{{Len: 4096, Kind: ExtentData, HostOff: 2560}}}}
	err := sc.convert(crashStorage{sc.disk()}, inPlaceSyncNone)
	var e *AlignError
	if !errors.As(err, &e) || e.Off != 0 || e.HostOff != 2560 || e.ClusterSize != 1024 || !strings.Contains(err.Error(), "Convert") {
		t.Errorf("error %v, want a *AlignError at host 2560 that names Convert", err)
	}
}

// TestConvertInPlaceCancel ends the context at every progress and before: the file is as before.
func TestConvertInPlaceCancel(t *testing.T) {
	sc := inPlaceScenarioNamed(t, "raw of small clusters")
	for stop := 0; ; stop++ {
		d := sc.disk()
		src, err := sc.over(crashStorage{d})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		calls, last := 0, int64(0)
		if stop == 0 {
			cancel()
		}
		o := sc.opts
		o.Progress = func(done, total int64) {
			if calls++; calls == stop {
				cancel()
			}
			if done <= last || done > total {
				t.Errorf("progress %d of %d after %d", done, total, last)
			}
			last = done
		}
		err = ConvertInPlace(ctx, crashStorage{d}, src, &o)
		cancel()
		if calls < stop {
			if err != nil {
				t.Fatal(err)
			}
			return
		}
		if !errors.Is(err, context.Canceled) || errors.Is(err, ErrInPlace) || !bytes.Equal(d.Bytes(), sc.source) {
			t.Errorf("ended at progress %d: %v; changed %v", stop, err, !bytes.Equal(d.Bytes(), sc.source))
		}
	}
}

// TestInPlaceQcow2 converts a raw disk on which a guest has written a qcow2 header, and interrupts that.
func TestInPlaceQcow2(t *testing.T) {
	sc := inPlaceScenario{source: fillRepeated(100 << 10), opts: InPlaceOptions{AllowQcow2: true}}
	copy(sc.source, "QFI\xfb")
	d, content := sc.disk(), sc.content()
	half := interrupted(t, &sc, false)
	if found, err := InspectInPlace(t.Context(), crashStorage{half}, int64(len(sc.source))); err != nil || found != InPlaceComplete {
		t.Errorf("found %v, %v", found, err)
	}
	if _, err := sc.resume(crashStorage{half}); err != nil {
		t.Error(err)
	}
	if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
		t.Error(err)
	}
	for _, d := range []*crashtest.Disk{d, half} {
		if err := sc.checkImage(d, content); err != nil {
			t.Error(err)
		}
	}
}

// interrupted returns what a conversion of the scenario leaves that is interrupted when its tables are complete, or
// when the header is switched.
func interrupted(t testing.TB, sc *inPlaceScenario, switched bool) *crashtest.Disk {
	t.Helper()
	rec, file := sc.record(sc.disk())
	if err := sc.convert(crashStorage{file}, inPlaceSyncNone); err != nil {
		t.Fatal(err)
	}
	d := sc.disk()
	for _, e := range rec.Log() {
		switch {
		case e.Kind == crashtest.Write && e.Off == 0 && !switched, e.Kind == crashtest.Write && e.Off == sectorSize:
			return d
		case e.Kind == crashtest.Write:
			if _, err := d.WriteAt(e.Data, e.Off); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !switched {
		t.Fatal("the header was not switched")
	}
	return d
}

// stringOf names a state and an error in messages.
func stringOf(found InPlaceState, err error) string {
	return fmt.Sprintf("found %q, error %v", found, err)
}
