package qcow2

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"sync"
	"testing"
)

// lyingDisk is a disk that has another layout, and other content, at each pass over its extents, and, if it is wild, at
// each read. It notes what it has told last.
type lyingDisk struct {
	size     int64
	versions [][]byte
	layouts  [][]Extent
	wild     bool

	mu   sync.Mutex
	rng  *rand.Rand
	now  int    // the version that is told
	told []byte // what the last pass has told: what was read, and zeros elsewhere
}

// newLyingDisk returns a disk of some clusters. Its versions have the same number of data clusters, or not.
func newLyingDisk(rng *rand.Rand) *lyingDisk {
	d := &lyingDisk{size: sectorSize * (1 + rng.Int64N(300)), rng: rng, wild: rng.IntN(3) == 0}
	for range 2 + rng.IntN(2) {
		content := make([]byte, d.size)
		var l []Extent
		for off := int64(0); off < d.size; {
			n := min(sectorSize*(1+rng.Int64N(16)), d.size-off)
			e := Extent{Off: off, Len: n, Kind: ExtentKind(rng.IntN(3)), HostOff: noOffset}
			if e.Kind != ExtentUnallocated && e.Kind != ExtentZero {
				e.Kind = ExtentData
				switch p := content[off:][:n]; rng.IntN(4) {
				case 0:
				case 1:
					fillGarbage(p, rng.Int64())
				default:
					copy(p, pattern(rng.Uint64(), uint64(n)))
				}
			}
			l = append(l, e)
			off += n
		}
		if len(d.layouts) > 0 && rng.IntN(2) == 0 {
			l = d.layouts[0] // only the content changes
			content = bytes.Clone(d.versions[0])
			for i := range content {
				if content[i] != 0 && rng.IntN(3) > 0 {
					content[i]++
				}
			}
		}
		d.versions, d.layouts = append(d.versions, content), append(d.layouts, l)
	}
	return d
}

// Size implements Disk.
func (d *lyingDisk) Size() int64 { return d.size }

// ReadAt implements Disk.
func (d *lyingDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.wild {
		d.now = d.rng.IntN(len(d.versions))
	}
	n := copy(p, d.versions[d.now][off:])
	copy(d.told[off:], p[:n])
	return n, nil
}

// Extents implements Disk.
func (d *lyingDisk) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		d.mu.Lock()
		d.now = d.rng.IntN(len(d.layouts))
		l := d.layouts[d.now]
		d.told = make([]byte, d.size)
		d.mu.Unlock()
		for _, e := range l {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// TestStreamLies streams disks that tell something else each time. What WriteStream calls good is a sound image of what
// it was told last; everything else is ErrSourceChanged.
func TestStreamLies(t *testing.T) {
	seeds := 200
	if testing.Short() {
		seeds = 60
	}
	changed, good, other := 0, 0, 0
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(uint64(seed), 71))
		d := newLyingDisk(rng)
		o := &StreamOptions{
			Create:   &CreateOptions{ClusterSize: 512 << rng.IntN(4), RefcountBits: 1 << rng.IntN(7)},
			Compress: rng.IntN(3) == 0, FindZeros: rng.IntN(3) == 0, Workers: 1 + rng.IntN(3),
		}
		if rng.IntN(4) == 0 && (o.Compress || o.FindZeros) {
			o.Spool = NewMemoryStorage()
		}
		var b bytes.Buffer
		_, err := WriteStream(context.Background(), &b, d, o)
		switch {
		case errors.Is(err, ErrSourceChanged):
			changed++
			continue
		case err != nil:
			t.Fatalf("seed %d: %v", seed, err)
		}
		good++
		if !bytes.Equal(d.told, d.versions[0]) {
			other++
		}
		if err := judgeStream(t, b.Bytes(), d.told, nil).Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Fatalf("seed %d, %+v", seed, o)
		}
	}
	t.Logf("%d noticed, %d images of what was told last, %d of them not of the first", changed, good, other)
	if changed == 0 || other == 0 {
		t.Error("a kind of end is missing")
	}
}
