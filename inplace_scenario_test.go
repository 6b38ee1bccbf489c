package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// testLayout is a layout by its extents, which follow each other.
type testLayout struct {
	size    int64
	extents []Extent
}

// Size implements Layout.
func (l *testLayout) Size() int64 { return l.size }

// Extents implements Layout.
func (l *testLayout) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		end := min(off+n, l.size)
		for _, e := range l.extents {
			if cut := off - e.Off; cut > 0 && cut < e.Len {
				e.Off, e.Len = off, e.Len-cut
				if e.HostOff >= 0 {
					e.HostOff += cut
				}
			}
			e.Len = min(e.Len, end-e.Off)
			if e.Off >= off && e.Len > 0 && !yield(e, nil) {
				return
			}
		}
	}
}

// layoutOf returns the layout of a disk whose clusters, of clusterSize bytes, stand at the given host clusters, shifted
// by shift bytes: -1 is unallocated, -2 zero, -3 shows the backing file.
func layoutOf(size, clusterSize, shift int64, clusters []int64) *testLayout {
	l := &testLayout{size: size}
	for i, at := range clusters {
		e := Extent{Off: int64(i) * clusterSize, Len: clusterSize, Kind: ExtentData, HostOff: at*clusterSize + shift}
		e.Len = min(e.Len, size-e.Off)
		switch at {
		case -1:
			e.Kind, e.HostOff = ExtentUnallocated, noOffset
		case -2:
			e.Kind, e.HostOff = ExtentZero, noOffset
		case -3:
			e.Kind, e.HostOff, e.Depth = ExtentData, 0, 1
		}
		l.extents = append(l.extents, e)
	}
	return l
}

// inPlaceScenario is a file that is converted in place.
type inPlaceScenario struct {
	name   string
	opts   InPlaceOptions
	source []byte
	holes  [][2]int64  // ranges of the source, in bytes from and to, that are holes
	layout *testLayout // nil: the source is raw, or of the format
	format ForeignFormat
	below  Disk // the backing file of a source of the format, or nil
}

// disk returns the file.
func (sc *inPlaceScenario) disk() *crashtest.Disk {
	d := crashtest.NewDisk(sc.source)
	for _, h := range sc.holes {
		if err := d.PunchHole(h[0], h[1]-h[0]); err != nil {
			panic(err)
		}
	}
	return d
}

// record returns a record of operations on a file that is d.
func (sc *inPlaceScenario) record(d *crashtest.Disk) (*crashtest.Recorder, *crashtest.File) {
	rec := crashtest.NewRecorder()
	file := rec.Regular("image", d.Bytes())
	for _, h := range sc.holes {
		if err := file.PunchHole(h[0], h[1]-h[0]); err != nil {
			panic(err)
		}
	}
	rec.Rebase()
	return rec, file
}

// over returns the layout of the source in s.
func (sc *inPlaceScenario) over(s Storage) (Layout, error) {
	if sc.layout != nil {
		return sc.layout, nil
	}
	if sc.format != "" {
		return OpenForeign(NewSourceView(s, int64(len(sc.source))), sc.format, &OpenOptions{Backing: sc.below})
	}
	return NewRawDisk(NewSourceView(s, int64(len(sc.source))))
}

// convert converts the file in s.
func (sc *inPlaceScenario) convert(s Storage, skip inPlaceSync) error {
	src, err := sc.over(s)
	if err != nil {
		return err
	}
	o := sc.opts
	o.test.inPlaceSkip = skip
	return ConvertInPlace(context.Background(), s, src, &o)
}

// resume resumes the conversion of the file in s.
func (sc *inPlaceScenario) resume(s Storage) (InPlaceState, error) {
	src, err := sc.over(s)
	if err != nil && sc.format != "" {
		src = nil // its header is the image's by now
	} else if err != nil {
		return InPlaceNone, err
	}
	return ResumeInPlace(context.Background(), s, src, int64(len(sc.source)), &sc.opts)
}

// backingByte is what the backing file of the images that have one holds.
const backingByte = 0xb7

// content returns what the disk of the source reads.
func (sc *inPlaceScenario) content() []byte {
	source := sc.disk().Bytes()
	if sc.format != "" {
		src, err := sc.over(crashStorage{sc.disk()})
		if err != nil {
			panic(err)
		}
		p := make([]byte, src.Size())
		if _, err := src.(Disk).ReadAt(p, 0); err != nil {
			panic(err)
		}
		return p
	}
	if sc.layout == nil {
		return append(source, make([]byte, -len(source)&(sectorSize-1))...)
	}
	p := make([]byte, roundUpSector(uint64(sc.layout.size)))
	for _, e := range sc.layout.extents {
		switch part := p[e.Off:][:e.Len]; {
		case e.Depth > 0, e.Kind == ExtentUnallocated && sc.opts.BackingFile != "":
			copy(part, bytes.Repeat([]byte{backingByte}, len(part)))
		case e.Kind == ExtentData:
			copy(part, source[e.HostOff:])
		}
	}
	return p
}

// finished reports whether the file begins with the header of the image.
func (sc *inPlaceScenario) finished(d *crashtest.Disk) bool {
	b := make([]byte, 4)
	_, _ = d.ReadAt(b, 0)
	return hasMagic(b)
}

// checkImage checks that the file is a sound image with the content of the source. It looks without the library, and
// with it.
func (sc *inPlaceScenario) checkImage(d *crashtest.Disk, content []byte) error {
	rep, err := walkFile(d)
	if err != nil {
		return err
	}
	if !rep.Clean() || rep.PastEnd > 0 {
		return fmt.Errorf("%d corruptions, %d leaks, %d past the end: %q", rep.Corruptions(), rep.Leaks, rep.PastEnd, rep.Findings)
	}
	size, err := d.Size()
	if err != nil {
		return err
	}
	look := refwalk.Source{Image: d, Size: size}
	if sc.opts.BackingFile != "" {
		look.Backing = func(p []byte, off int64) error {
			copy(p, bytes.Repeat([]byte{backingByte}, len(p)))
			return nil
		}
	}
	got, err := refwalk.ReadGuest(look)
	if err == nil && !bytes.Equal(got, content) {
		err = fmt.Errorf("%d bytes of other content than the %d of the source", len(got), len(content))
	}
	if err != nil {
		return err
	}
	below, err := NewRawDisk(NewReaderStorage(bytes.NewReader(bytes.Repeat([]byte{backingByte}, len(content))), int64(len(content))))
	if err != nil {
		return err
	}
	o := &OpenOptions{}
	if sc.opts.BackingFile != "" {
		o.Backing = below
	}
	img, err := OpenStorage(crashStorage{d}, o)
	if err != nil {
		return err
	}
	defer img.Close()
	res, err := img.Check(context.Background(), nil)
	if err == nil && !res.Clean() {
		err = fmt.Errorf("check: %+v", *res)
	}
	if _, rerr := img.ReadAt(got, 0); err == nil && rerr != nil {
		err = rerr
	}
	if err == nil && !bytes.Equal(got, content) {
		err = errors.New("the library reads other content than the source has")
	}
	return err
}

// inPlaceScenarios are the files that are converted in the tests.
func inPlaceScenarios() []inPlaceScenario {
	raw := func(n int64) []byte { return fillRepeated(n) }
	over := InPlaceOptions{BackingFile: "base", BackingFormat: "raw"}
	with := func(o InPlaceOptions, clusterSize, refcountBits int) InPlaceOptions {
		o.ClusterSize, o.RefcountBits = clusterSize, refcountBits
		return o
	}
	// Host clusters in any order, with free ones and holes between them, and one in the header's place.
	rng := rand.New(rand.NewPCG(5, 5))
	shuffle := func(n, of int) []int64 {
		clusters := make([]int64, n)
		for i, at := range rng.Perm(of - 1)[:n] {
			clusters[i] = int64(at) + 1
			if i%5 == 3 {
				clusters[i] = -1 - int64(i%2)
			}
		}
		clusters[n/4] = 0
		return clusters
	}
	// As in QED: a header, tables, and clusters where they were allocated.
	overlay := []int64{5, 4, -3, -2, 7, -3, -3, 9, -2, 11, 10, -3}
	trailed := func(n int64) []byte { return append(raw(n), bytes.Repeat([]byte("conectix"), 64)...) }
	all := func(n int64) *testLayout {
		return &testLayout{size: n, extents: []Extent{{Len: n, Kind: ExtentData}}}
	}
	return []inPlaceScenario{
		{name: "raw", source: raw(300<<10 + 123)},
		{name: "raw full", source: raw(256 << 10), opts: with(InPlaceOptions{}, 4096, 1)},
		{name: "raw sparse", source: raw(400<<10 + 700), holes: [][2]int64{{8 << 10, 200 << 10}, {300 << 10, 348 << 10}}, opts: with(InPlaceOptions{}, 16<<10, 16)},
		{name: "raw with a hole at both ends", source: raw(200 << 10), holes: [][2]int64{{0, 20 << 10}, {100 << 10, 200 << 10}}, opts: with(InPlaceOptions{}, 512, 64)},
		{name: "raw of small clusters", source: raw(150<<10 + 1), opts: with(InPlaceOptions{}, 512, 64)},
		{name: "raw version 2", source: raw(70 << 10), opts: InPlaceOptions{Version: 2, ClusterSize: 1024}},
		{name: "raw of few bytes", source: raw(100)},
		{name: "raw of no bytes", source: nil},
		{name: "raw hole", source: raw(1 << 20), holes: [][2]int64{{0, 1 << 20}}, opts: with(InPlaceOptions{}, 512, 64)},
		{name: "raw overlay", source: raw(90 << 10), holes: [][2]int64{{16 << 10, 48 << 10}}, opts: with(over, 4096, 8)},
		{name: "raw lazy", source: raw(65 << 10), opts: InPlaceOptions{LazyRefcounts: true, Compression: CompressionZstd, ClusterSize: 128 << 10}},
		{name: "shuffled", source: raw(400 * 512), layout: layoutOf(300*512, 512, 0, shuffle(300, 400)), opts: with(InPlaceOptions{}, 512, 16)},
		{name: "odd sectors", source: raw(401 * 512), layout: layoutOf(299*512, 1024, 512, shuffle(150, 200)), opts: with(InPlaceOptions{}, 512, 32)},
		{name: "overlay", source: raw(12 << 12), layout: layoutOf(12<<12, 4096, 0, overlay), opts: over},
		{name: "trailer", source: trailed(200<<10 + 512), layout: all(200<<10 + 512)},
		{name: "trailer behind a whole cluster", source: trailed(128 << 10), layout: all(128 << 10)},
		{name: "trailer of small clusters", source: trailed(33 << 10), layout: all(33 << 10), opts: with(InPlaceOptions{}, 512, 2)},
	}
}

// inPlaceScenarioNamed returns the scenario of that name.
func inPlaceScenarioNamed(t testing.TB, name string) *inPlaceScenario {
	t.Helper()
	for _, sc := range inPlaceScenarios() {
		if sc.name == name {
			return &sc
		}
	}
	t.Fatalf("no scenario is called %q", name)
	return nil
}
