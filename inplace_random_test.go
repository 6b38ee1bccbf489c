package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
)

// randomInPlace returns a file whose layout is random: sound, or such as a damaged or hostile file has it.
func randomInPlace(rng *rand.Rand) inPlaceScenario {
	unit := int64(512) << rng.IntN(4) // what most of it is aligned to
	sc := inPlaceScenario{source: make([]byte, unit*int64(8+rng.IntN(120))-int64(rng.IntN(2)*rng.IntN(600)))}
	for off := 0; off < len(sc.source); off += 512 { // half of it is zeros, in runs
		if rng.IntN(8) == 0 {
			off += 512 * rng.IntN(16)
			continue
		}
		crashContent(sc.source[off:min(off+512, len(sc.source))], int64(off), rng.Uint64N(100), false)
	}
	sc.opts.ClusterSize = max(512, int(unit)>>rng.IntN(4)*[]int{0, 1, 1, 1, 1, 2}[rng.IntN(6)])
	if rng.IntN(4) == 0 {
		sc.opts.ClusterSize = 0
	}
	sc.opts.RefcountBits = 1 << rng.IntN(7)
	if rng.IntN(3) == 0 {
		sc.opts.BackingFile, sc.opts.BackingFormat = "base", "raw"
	}
	l := &testLayout{size: unit * rng.Int64N(150)}
	if rng.IntN(4) == 0 {
		l.size = rng.Int64N(60_000)
	}
	sc.layout = l
	places := rng.Perm(len(sc.source)/int(3*unit) + 1) // each of three units
	wild := []float64{0, 0, 0, 0.01, 0.1}[rng.IntN(5)]
	for off := int64(0); off < l.size; {
		e := Extent{Off: off, Len: unit * (1 + rng.Int64N(3)), Kind: ExtentData, HostOff: noOffset}
		if len(places) > 0 {
			e.HostOff, places = int64(places[0])*3*unit, places[1:]
		}
		if n := len(l.extents); n > 0 && l.extents[n-1].HostOff >= 0 && l.extents[n-1].Len < 3*unit && rng.IntN(2) == 0 {
			last := l.extents[n-1]
			e.HostOff = last.HostOff + last.Len // as the one before goes on
			e.Len = min(e.Len, 3*unit-last.Len)
		}
		if rng.Float64() < wild {
			e.Len = 1 + rng.Int64N(3000)
		}
		if rng.Float64() < wild {
			e.HostOff = rng.Int64N(int64(len(sc.source)) + 1)
		}
		switch rng.IntN(6) {
		case 0:
			e.Kind = ExtentUnallocated
		case 1:
			e.Kind = ExtentZero
		case 2:
			if rng.Float64() < wild || sc.opts.BackingFile != "" {
				e.Depth, e.HostOff = 1, 0
			}
		}
		e.Len = min(e.Len, l.size-off)
		if e.Kind == ExtentData && e.HostOff >= 0 && e.Depth == 0 && e.HostOff+e.Len > int64(len(sc.source)) && rng.Float64() >= wild {
			e.Kind = ExtentZero
		}
		if e.Kind == ExtentData && e.HostOff < 0 && rng.Float64() >= wild {
			e.Kind = ExtentUnallocated
		}
		l.extents = append(l.extents, e)
		off += e.Len
	}
	return sc
}

// TestConvertInPlaceRandom converts files with random layouts: one that is refused is not touched, and any other
// becomes a sound image with the content that the layout tells.
func TestConvertInPlaceRandom(t *testing.T) {
	seeds := 600
	if testing.Short() {
		seeds = 150
	}
	refused := make(map[string]int)
	converted := make(map[uint64]int)
	for seed := range seeds {
		sc := randomInPlace(rand.New(rand.NewPCG(uint64(seed), 9)))
		d := sc.disk()
		err := sc.convert(crashStorage{d}, inPlaceSyncNone)
		if err != nil {
			var option *OptionError
			switch {
			case errors.Is(err, ErrNotAligned):
				refused["not aligned"]++
			case errors.Is(err, ErrCorrupt):
				refused["beyond the file"]++
			case errors.As(err, &option):
				refused["option "+option.Option]++
			default:
				t.Errorf("seed %d: %v", seed, err)
			}
			if !bytes.Equal(d.Bytes(), sc.source) {
				t.Errorf("seed %d: refused, and changed: %v", seed, err)
			}
			continue
		}
		h, err := readHeader(d, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		converted[h.clusterSize()]++
		if err := sc.checkImage(d, sc.content()); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	t.Logf("converted, by the size of clusters: %v; refused: %v", converted, refused)
	if len(converted) < 5 || len(refused) < 3 {
		t.Error("too few kinds of ends")
	}
}

// TestConvertInPlaceHuge converts a sparse raw disk of 1 TiB, with data at a few places: what is written, and the memory
// for it, depend on that. The image, whose tables are far behind its first refcount block, is sound.
func TestConvertInPlaceHuge(t *testing.T) {
	const size = 1<<40 + 512
	s := NewMemoryStorage()
	places := map[int64]string{0: "first", 1<<39 + 4096: "middle", 1<<40 - 5: "across the last cluster"}
	for off, text := range places {
		if _, err := s.WriteAt([]byte(text), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Truncate(size); err != nil {
		t.Fatal(err)
	}
	counted := &countedStorage{Storage: s}
	src, err := NewRawDisk(counted)
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := ConvertInPlace(t.Context(), counted, src, nil); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	taken := after.TotalAlloc - before.TotalAlloc
	t.Logf("%d bytes written, %d allocated", counted.written.Load(), taken)
	if counted.written.Load() > 1<<20 || taken > 8<<20 {
		t.Errorf("%d bytes written, %d allocated", counted.written.Load(), taken)
	}
	img, err := OpenStorage(s, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	for off, text := range places {
		p := make([]byte, len(text))
		if _, err := img.ReadAt(p, off); err != nil || string(p) != text {
			t.Errorf("guest %#x is %q, %v", off, p, err)
		}
	}
	if res, err := img.Check(t.Context(), nil); err != nil || !res.Clean() {
		t.Errorf("check: %+v, %v", res, err)
	}
}

// TestConvertInPlaceLong converts a file in which 2 GiB follow each other: tables of several pieces, which are more
// than one refcount block and more than one L2 table describe.
func TestConvertInPlaceLong(t *testing.T) {
	const size = 2 << 30
	s := NewMemoryStorage()
	if err := s.Truncate(size); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 16)
	for off := int64(0); off < size; off += 1 << 20 { // the data is there by what the layout tells
		if _, err := s.WriteAt(fmt.Appendf(p[:0], "%16x", off), off); err != nil {
			t.Fatal(err)
		}
	}
	layout := &testLayout{size: size, extents: []Extent{{Len: size, Kind: ExtentData}}}
	if err := ConvertInPlace(t.Context(), s, layout, &InPlaceOptions{ClusterSize: 4096, RefcountBits: 64}); err != nil {
		t.Fatal(err)
	}
	img, err := OpenStorage(s, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	for off := int64(0); off < size; off += 1 << 20 {
		if _, err := img.ReadAt(p, off); err != nil || string(p) != fmt.Sprintf("%16x", off) {
			t.Fatalf("guest %#x is %q, %v", off, p, err)
		}
	}
	if res, err := img.Check(t.Context(), nil); err != nil || !res.Clean() || res.AllocatedClusters != size/4096 {
		t.Errorf("check: %+v, %v", res, err)
	}
}
