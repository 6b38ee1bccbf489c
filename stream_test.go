package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// streamDisk is a Disk whose extents are told apart as the test likes, however they lie to clusters.
type streamDisk struct {
	content []byte
	below   []byte // what the layers at depth and below read as
	depth   int
	runs    []Extent

	onRead    func(off int64) error // called before each read
	onExtents func(pass int) error  // called before each pass over the extents, counted from 1
	passes    int
}

func (d *streamDisk) Size() int64 { return int64(len(d.content)) }

func (d *streamDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.onRead != nil {
		if err := d.onRead(off); err != nil {
			return 0, err
		}
	}
	return bytes.NewReader(d.content).ReadAt(p, off)
}

// Extents yields those of the whole disk, whatever is asked for: WriteStream asks for nothing less.
func (d *streamDisk) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		d.passes++
		if off != 0 || n != d.Size() {
			yield(Extent{}, ErrRange)
			return
		}
		if d.onExtents != nil {
			if err := d.onExtents(d.passes); err != nil {
				yield(Extent{}, err)
				return
			}
		}
		for _, e := range d.runs {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// streamContent fills p with one of several kinds of data, some of which shrink.
func streamContent(p []byte, rng *rand.Rand) {
	switch rng.IntN(4) {
	case 0:
		clear(p)
	case 1:
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
	default:
		copy(p, pattern(rng.Uint64(), uint64(len(p))))
	}
}

// newStreamDisk returns a disk of size bytes with extents of all kinds, some of which begin and end inside clusters;
// those of depth and below, if it is not 0, are what a backing file holds.
func newStreamDisk(rng *rand.Rand, size, clusterSize int64, depth int) *streamDisk {
	d := &streamDisk{content: make([]byte, size), below: make([]byte, size), depth: depth}
	for off := int64(0); off < size; {
		n := 1 + rng.Int64N(3*clusterSize)
		switch rng.IntN(3) {
		case 0:
			n = (1 + rng.Int64N(6)) * clusterSize
		case 1:
			n = clusterSize - off%clusterSize
		}
		n = min(n, size-off)
		e := Extent{Off: off, Len: n, Kind: ExtentKind(rng.IntN(4)), HostOff: -1}
		part, below := d.content[off:off+n], d.below[off:off+n]
		if depth > 0 {
			e.Depth = rng.IntN(depth + 2)
		}
		data := e.Kind == ExtentData || e.Kind == ExtentCompressed
		if data {
			streamContent(part, rng)
		}
		if depth > 0 && e.Depth >= depth {
			copy(below, part)
		} else {
			streamContent(below, rng)
		}
		d.runs = append(d.runs, e)
		off += n
	}
	return d
}

// wantKinds returns of each cluster what the stream must say of it: nothing, zeros or data.
func (d *streamDisk) wantKinds(clusterSize int64, o *StreamOptions) (kinds []ExtentKind) {
	backed := o.Create.BackingFile != ""
	size := d.Size()
	i := 0
	for off := int64(0); off < size; off += clusterSize {
		end := min(off+clusterSize, size)
		var data, zero, below bool
		for ; i < len(d.runs) && d.runs[i].Off < end; i++ {
			e := d.runs[i]
			stored := e.Kind == ExtentData || e.Kind == ExtentCompressed
			switch {
			case o.SharedDepth > 0 && e.Depth >= o.SharedDepth:
				below = below || stored
			case stored:
				data = true
			default:
				zero = true
			}
			if e.Off+e.Len > end {
				break
			}
		}
		i = max(i-1, 0) // it may go on
		for i < len(d.runs) && d.runs[i].Off+d.runs[i].Len <= end {
			i++
		}
		kind := ExtentUnallocated
		switch {
		case data, backed && zero && (below || o.Create.Version == 2):
			kind = ExtentData
		case backed && zero:
			kind = ExtentZero
		}
		if kind == ExtentData && (o.Compress || o.FindZeros) && isZero(d.content[off:end]) {
			switch {
			case !backed:
				kind = ExtentUnallocated
			case o.Create.Version != 2:
				kind = ExtentZero
			}
		}
		kinds = append(kinds, kind)
	}
	return kinds
}

// streamed returns the stream of src.
func streamed(t testing.TB, src Disk, o *StreamOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := WriteStream(context.Background(), &b, src, o)
	if err != nil {
		t.Fatalf("WriteStream: %v", err)
	}
	if n != int64(b.Len()) {
		t.Errorf("WriteStream wrote %d bytes and says %d", b.Len(), n)
	}
	return b.Bytes()
}

// checkStreamSize asks how long the stream is that has n bytes.
func checkStreamSize(t testing.TB, src Disk, o *StreamOptions, n int) {
	t.Helper()
	if size, err := StreamSize(context.Background(), src, o); err != nil || size != int64(n) {
		t.Errorf("StreamSize says %d, %v of a stream of %d bytes", size, err, n)
	}
}

// judgeStream opens a stream, which must be sound to the last byte and read as want.
func judgeStream(t testing.TB, b, want []byte, backing Disk) *Image {
	t.Helper()
	rep, err := refwalk.Walk(bytes.NewReader(b), int64(len(b)))
	if err != nil || !rep.Clean() {
		t.Fatalf("walk: %v, %+v", err, rep)
	}
	img, err := OpenReader(bytes.NewReader(b), int64(len(b)), &OpenOptions{Backing: backing})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	res, err := img.Check(context.Background(), nil)
	if err != nil || !res.Clean() || res.Leaks != 0 || res.LostCopied != 0 {
		t.Fatalf("check: %v, %+v", err, res)
	}
	if res.ImageEndOffset != int64(len(b)) {
		t.Errorf("the image ends at %d, the stream at %d", res.ImageEndOffset, len(b))
	}
	got := make([]byte, img.Size())
	if _, err := io.ReadFull(io.NewSectionReader(img, 0, img.Size()), got); err != nil {
		t.Fatal(err)
	}
	want = append(bytes.Clone(want), make([]byte, -uint64(len(want))%sectorSize)...)
	if !bytes.Equal(got, want) {
		i := 0
		for i < min(len(got), len(want)) && got[i] == want[i] {
			i++
		}
		t.Fatalf("the stream reads otherwise at guest %#x (sizes %d and %d)", i, len(got), len(want))
	}
	return img
}

// streamKinds returns the kinds of the clusters of an image's own layer; stored ones are ExtentData.
func streamKinds(t testing.TB, img *Image) (kinds []ExtentKind) {
	t.Helper()
	size := int64(img.m.clusterSize)
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		for off := (e.Off + size - 1) / size * size; off < e.Off+e.Len; off += size {
			kind := e.Kind
			switch {
			case e.Depth > 0:
				kind = ExtentUnallocated
			case kind == ExtentCompressed:
				kind = ExtentData
			}
			kinds = append(kinds, kind)
		}
	}
	return kinds
}

// streamModes are the ways of WriteStream.
var streamModes = []struct {
	name string
	set  func(o *StreamOptions)
}{
	{"plain", func(*StreamOptions) {}},
	{"zeros", func(o *StreamOptions) { o.FindZeros = true }},
	{"deflate", func(o *StreamOptions) { o.Compress = true }},
	{"zstd", func(o *StreamOptions) {
		o.Compress = true
		if o.Create.Version != 2 {
			o.Create.Compression = CompressionZstd
		}
	}},
}

// TestStream streams disks of all kinds of extents in every mode, cluster size and refcount width. Each stream is the
// same with 1, 2 and 8 workers and from a spool, is sound, reads as the disk and maps what it must.
func TestStream(t *testing.T) {
	streams, bytesOut := 0, 0
	step := 1
	if testing.Short() {
		step = 3
	}
	for clusterBits := minClusterBits; clusterBits <= maxClusterBits; clusterBits += step {
		for i, mode := range streamModes {
			for _, depth := range []int{0, 1, 2} {
				if testing.Short() && depth != i%3 {
					continue
				}
				seed := uint64(clusterBits*100 + i*10 + depth)
				rng := rand.New(rand.NewPCG(seed, 5))
				c := CreateOptions{ClusterSize: 1 << clusterBits, RefcountBits: 1 << (seed % 7)}
				switch {
				case seed%7 == 4 && rng.IntN(2) == 0:
					c.Version = 2
				case clusterBits >= minExtL2Bits:
					c.ExtendedL2 = rng.IntN(2) == 0
				}
				o := &StreamOptions{Create: &c}
				if depth > 0 {
					c.BackingFile, c.BackingFormat = "below", "raw"
					if rng.IntN(3) > 0 { // else nothing is shared that could be
						o.SharedDepth = depth + rng.IntN(2)
					}
				}
				mode.set(o)
				name := fmt.Sprintf("%d/%s/depth=%d/v%d/bits=%d", c.ClusterSize, mode.name, depth, c.Version, c.RefcountBits)
				t.Run(name, func(t *testing.T) {
					size := int64(max(c.ClusterSize*3, 300<<10))
					size += rng.Int64N(int64(c.ClusterSize))
					d := newStreamDisk(rng, size, int64(c.ClusterSize), depth)
					o.Workers = 1
					b := streamed(t, d, o)
					checkStreamSize(t, d, o, len(b))
					for _, workers := range []int{2, 8} {
						o.Workers = workers
						if !bytes.Equal(streamed(t, d, o), b) {
							t.Errorf("seed %d: other bytes with %d workers", seed, workers)
						}
					}
					o.Spool = NewMemoryStorage()
					if !bytes.Equal(streamed(t, d, o), b) {
						t.Errorf("seed %d: other bytes from a spool", seed)
					}
					var backing Disk
					if depth > 0 {
						backing = newTestRaw(t, d.below)
					}
					img := judgeStream(t, b, d.content, backing)
					if diff := cmp.Diff(d.wantKinds(int64(c.ClusterSize), o), streamKinds(t, img)); diff != "" {
						t.Errorf("seed %d: kinds of clusters (-want +got):\n%s", seed, diff)
					}
					streams, bytesOut = streams+1, bytesOut+len(b)
				})
			}
		}
	}
	t.Logf("%d streams of %d MiB", streams, bytesOut>>20)
}

// newTestRaw returns a raw disk with the given content.
func newTestRaw(t testing.TB, content []byte) *RawDisk {
	t.Helper()
	s := NewMemoryStorage()
	if _, err := s.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	d, err := NewRawDisk(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestStreamEmpty streams disks without any data: of no bytes, of one sector, and of 1 TiB.
func TestStreamEmpty(t *testing.T) {
	for _, size := range []int64{0, 512, 1 << 40} {
		for _, mode := range streamModes {
			s := NewMemoryStorage()
			if err := s.Truncate(size); err != nil {
				t.Fatal(err)
			}
			d, err := NewRawDisk(s)
			if err != nil {
				t.Fatal(err)
			}
			o := &StreamOptions{Create: &CreateOptions{}}
			mode.set(o)
			b := streamed(t, d, o)
			checkStreamSize(t, d, o, len(b))
			img, err := OpenReader(bytes.NewReader(b), int64(len(b)), nil)
			if err != nil {
				t.Fatal(err)
			}
			res, err := img.Check(context.Background(), nil)
			if err != nil || !res.Clean() || res.ImageEndOffset != int64(len(b)) || res.AllocatedClusters != 0 || img.Size() != size {
				t.Errorf("%s, disk of %d: %v, %+v, size %d, stream of %d", mode.name, size, err, res, img.Size(), len(b))
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestStreamOptions refuses by name what is no stream.
func TestStreamOptions(t *testing.T) {
	base := CreateOptions{BackingFile: "b", BackingFormat: "raw"}
	for _, tc := range []struct {
		option string
		o      StreamOptions
		size   int64
	}{
		{"DataFile", StreamOptions{Create: &CreateOptions{DataFile: "d"}}, 512},
		{"DataFileRaw", StreamOptions{Create: &CreateOptions{DataFileRaw: true}}, 512},
		{"Preallocation", StreamOptions{Create: &CreateOptions{Preallocation: PreallocationMetadata}}, 512},
		{"Workers", StreamOptions{Workers: -1}, 512},
		{"Workers", StreamOptions{Workers: maxStreamWorkers + 1}, 512},
		{"DeflateWindow", StreamOptions{DeflateWindow: 8192}, 512},
		{"SharedDepth", StreamOptions{Create: &base, SharedDepth: -1}, 512},
		{"SharedDepth", StreamOptions{SharedDepth: 1}, 512},
		{"ClusterSize", StreamOptions{Create: &CreateOptions{ClusterSize: 1000}}, 512},
		{"BackingFormat", StreamOptions{Create: &CreateOptions{BackingFile: "b"}}, 512},
		{"ExtendedL2", StreamOptions{Create: &CreateOptions{ExtendedL2: true, Version: 2}}, 512},
		{"size", StreamOptions{}, -5},
	} {
		var b bytes.Buffer
		n, err := WriteStream(context.Background(), &b, sizeDisk(tc.size), &tc.o)
		var e *OptionError
		if !errors.As(err, &e) || e.Option != tc.option || n != 0 || b.Len() != 0 {
			t.Errorf("WriteStream, want %s refused: %d bytes, %v", tc.option, n, err)
		}
		if _, err := StreamSize(context.Background(), sizeDisk(tc.size), &tc.o); !errors.As(err, &e) || e.Option != tc.option {
			t.Errorf("StreamSize, want %s refused: %v", tc.option, err)
		}
	}
	_, err := StreamSize(context.Background(), sizeDisk(512), &StreamOptions{Workers: -1, SharedDepth: -1})
	if text := fmt.Sprint(err); !strings.Contains(text, "Workers") || !strings.Contains(text, "SharedDepth") {
		t.Errorf("two options are refused: %v", err)
	}
	if _, err := WriteStream(context.Background(), io.Discard, sizeDisk(1<<60), nil); !errors.Is(err, ErrTooLarge) {
		t.Errorf("disk of 1 EiB: %v, want ErrTooLarge", err)
	}
}

// TestStreamDeflateWindow streams what repeats at a distance of 16 KiB: the wide window alone finds it.
func TestStreamDeflateWindow(t *testing.T) {
	unit := make([]byte, 16<<10)
	rand.NewChaCha8([32]byte{1}).Read(unit)
	p := bytes.Repeat(unit, 64)
	src, err := NewRawDisk(NewReaderStorage(bytes.NewReader(p), int64(len(p))))
	if err != nil {
		t.Fatal(err)
	}
	var lengths []int
	for _, window := range []int{0, DeflateWindow4K, DeflateWindow32K} {
		var b bytes.Buffer
		if _, err := WriteStream(context.Background(), &b, src, &StreamOptions{Compress: true, DeflateWindow: window}); err != nil {
			t.Fatal(err)
		}
		img, err := OpenReader(bytes.NewReader(b.Bytes()), int64(b.Len()), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(wantAt(img, p, 0)(), img.Close()); err != nil {
			t.Errorf("window %d: %v", window, err)
		}
		lengths = append(lengths, b.Len())
	}
	if lengths[0] != lengths[1] || lengths[2] >= lengths[1]/2 {
		t.Errorf("lengths %d by default, with 4 KiB and with 32 KiB", lengths)
	}
}

// sizeDisk is a Disk of that many bytes of which nobody may ask more.
type sizeDisk int64

func (d sizeDisk) Size() int64                       { return int64(d) }
func (d sizeDisk) ReadAt([]byte, int64) (int, error) { return 0, errors.New("nothing to read") }
func (d sizeDisk) Extents(int64, int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) { yield(Extent{}, errors.New("no extents")) }
}

// TestStreamProgress calls back with numbers that rise to the total.
func TestStreamProgress(t *testing.T) {
	for _, mode := range streamModes {
		for _, spool := range []bool{false, true} {
			d := newStreamDisk(rand.New(rand.NewPCG(1, 1)), 5<<20+100, 64<<10, 0)
			var last, total int64
			calls := 0
			o := &StreamOptions{Create: &CreateOptions{}, Progress: func(done, of int64) {
				if done < last || done > of || total != 0 && of != total {
					t.Errorf("%s: %d of %d after %d of %d", mode.name, done, of, last, total)
				}
				last, total = done, of
				calls++
			}}
			mode.set(o)
			if spool {
				o.Spool = NewMemoryStorage()
			}
			if _, err := WriteStream(context.Background(), io.Discard, d, o); err != nil {
				t.Fatal(err)
			}
			passes := int64(1)
			if o.Compress || o.FindZeros {
				passes = 2
			}
			if want := passes * (5<<20 + 512); last != total || total != want || calls < 3 {
				t.Errorf("%s: ended at %d of %d, want %d; %d calls", mode.name, last, total, want, calls)
			}
		}
	}
}

// TestStreamMixed streams clusters of which every second does not shrink. Plain clusters do not end the host cluster of
// the payloads around them: the stream is at most a tenth longer than what it holds.
func TestStreamMixed(t *testing.T) {
	const size = 64 << 10
	rng := rand.New(rand.NewPCG(3, 3))
	content := make([]byte, 256*size)
	for off := 0; off < len(content); off += 2 * size {
		for i := range content[off:][:size] {
			content[off+i] = byte(rng.Uint32())
		}
		half := content[off+size:][:size]
		for i := range half[:size/2] {
			half[i] = byte(rng.Uint32())
		}
	}
	b := streamed(t, newTestRaw(t, content), &StreamOptions{Compress: true})
	judgeStream(t, b, content, nil)
	if ideal := 128*size + 128*size/2; len(b) > ideal+ideal/10 {
		t.Errorf("the stream has %d bytes, what it holds %d", len(b), ideal)
	} else {
		t.Logf("%d bytes, %.3f of what it holds", len(b), float64(len(b))/float64(ideal))
	}
}
