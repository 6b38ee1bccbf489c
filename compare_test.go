package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2"
)

// mappedDisk is a disk whose extents, of 64 KiB each, are data where its content is not zero, and zeros of a kind where it
// is; every third of those is data all the same.
type mappedDisk struct {
	*callerDisk
	kind qcow2.ExtentKind
}

// Extents yields the extents.
func (d *mappedDisk) Extents(off, n int64) iter.Seq2[qcow2.Extent, error] {
	return func(yield func(qcow2.Extent, error) bool) {
		for end := min(off+n, d.size); off < end; {
			next := min(off&^0xffff+0x10000, end)
			e := qcow2.Extent{Off: off, Len: next - off, Kind: d.kind, HostOff: -1}
			if off>>16%3 == 0 || bytes.Trim(d.content[off&^0xffff:min(off&^0xffff+0x10000, d.size)], "\x00") != nil {
				e.Kind = qcow2.ExtentData
			}
			if !yield(e, nil) {
				return
			}
			off = next
		}
	}
}

// sparseBytes returns n bytes of which most are zeros.
func sparseBytes(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for range n >> 18 {
		at := rng.IntN(n)
		for i := at; i < min(at+rng.IntN(200<<10), n); i++ {
			p[i] = byte(i)
		}
	}
	return p
}

// TestCompareModel compares disks with copies of themselves that differ in some bytes, are longer or shorter, with one
// worker and with several: the first difference is that of the bytes.
func TestCompareModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for round := range 150 {
		n := rng.IntN(6 << 20)
		a := sparseBytes(rng, n)
		b := append(bytes.Clone(a), make([]byte, max(0, rng.IntN(1<<20)-1<<19))...)
		if rng.IntN(4) == 0 {
			b = b[:rng.IntN(len(b)+1)]
		}
		for range rng.IntN(4) {
			if len(b) > 0 {
				b[rng.IntN(len(b))] ^= byte(rng.IntN(256))
			}
		}
		want := (*qcow2.Difference)(nil)
		long := make([]byte, max(len(a), len(b)))
		other := make([]byte, len(long))
		copy(long, a)
		copy(other, b)
		for i := range long {
			if long[i] != other[i] {
				want = &qcow2.Difference{Off: int64(i)}
				break
			}
		}
		da := &mappedDisk{newCallerDisk(a), qcow2.ExtentZero}
		db := &mappedDisk{newCallerDisk(b), qcow2.ExtentUnallocated}
		for _, workers := range []int{0, 1, 5} {
			told := int64(-1)
			got, err := qcow2.Compare(t.Context(), da, db, &qcow2.CompareOptions{Workers: workers, Progress: func(done, total int64) {
				if done < told || done > total || total != int64(len(long)) {
					t.Errorf("progress %d of %d after %d", done, total, told)
				}
				told = done
			}})
			if diff := cmp.Diff(want, got); diff != "" || err != nil {
				t.Fatalf("round %d, %d workers, %d and %d bytes: %v (-want +got):\n%s", round, workers, len(a), len(b), err, diff)
			}
			if want == nil && told != int64(len(long)) {
				t.Errorf("progress ends at %d", told)
			}
		}
	}
}

// TestCompareStrict looks at what counts in strict mode, between images of one content.
func TestCompareStrict(t *testing.T) {
	const size = 4 << 20
	make1 := func(o qcow2.CreateOptions, change func(img *qcow2.Image) error) *qcow2.Image {
		img, err := qcow2.CreateStorage(qcow2.NewMemoryStorage(), size, &o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { img.Close() })
		data := bytes.Repeat([]byte{1}, 64<<10)
		if _, err := img.WriteAt(data, 1<<20); err != nil {
			t.Fatal(err)
		}
		if change != nil {
			if err := change(img); err != nil {
				t.Fatal(err)
			}
		}
		return img
	}
	plain := make1(qcow2.CreateOptions{}, nil)
	tests := []struct {
		name string
		b    *qcow2.Image
		want *qcow2.Difference
	}{
		{"the same elsewhere", make1(qcow2.CreateOptions{ClusterSize: 4096}, nil), nil},
		{"zeros in a cluster", make1(qcow2.CreateOptions{}, func(img *qcow2.Image) error {
			if _, err := img.WriteAt([]byte{1}, 2<<20); err != nil {
				return err
			}
			return img.WriteZeroes(2<<20, 64<<10, 0)
		}), &qcow2.Difference{Kind: qcow2.DifferentAllocation, Off: 2 << 20}},
		{"written zeros", make1(qcow2.CreateOptions{}, func(img *qcow2.Image) error {
			_, err := img.WriteAt(make([]byte, 64<<10), 512<<10)
			return err
		}), &qcow2.Difference{Kind: qcow2.DifferentAllocation, Off: 512 << 10}},
		{"compressed", make1(qcow2.CreateOptions{}, func(img *qcow2.Image) error {
			return img.WriteCompressed(bytes.Repeat([]byte{1}, 64<<10), 1<<20)
		}), &qcow2.Difference{Kind: qcow2.DifferentAllocation, Off: 1 << 20}},
		{"preallocated", make1(qcow2.CreateOptions{Preallocation: qcow2.PreallocationMetadata}, nil),
			&qcow2.Difference{Kind: qcow2.DifferentAllocation, Off: 0}},
		{"content", make1(qcow2.CreateOptions{}, func(img *qcow2.Image) error {
			_, err := img.WriteAt([]byte{2}, 1<<20+777)
			return err
		}), &qcow2.Difference{Kind: qcow2.DifferentContent, Off: 1<<20 + 777}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, pair := range [][2]qcow2.Disk{{plain, tt.b}, {tt.b, plain}} {
				got, err := qcow2.Compare(t.Context(), pair[0], pair[1], &qcow2.CompareOptions{Strict: true})
				if diff := cmp.Diff(tt.want, got); diff != "" || err != nil {
					t.Errorf("%v (-want +got):\n%s", err, diff)
				}
				got, err = qcow2.Compare(t.Context(), pair[0], pair[1], nil)
				if err != nil || (got == nil) != (tt.name != "content") {
					t.Errorf("not strict: %v, %v", got, err)
				}
			}
		})
	}
	short := newCallerDisk(make([]byte, 1000))
	got, err := qcow2.Compare(t.Context(), plain, short, &qcow2.CompareOptions{Strict: true})
	if diff := cmp.Diff(&qcow2.Difference{Kind: qcow2.DifferentSize, Off: 1000}, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

// errDamaged is the error of a disk in these tests.
var errDamaged = errors.New("damaged")

// failsAt returns a disk of content that cannot be read from bad on.
func failsAt(content []byte, bad int64) *callerDisk {
	d := newCallerDisk(content)
	d.read = func(d *callerDisk, p []byte, off int64) (int, error) {
		if off+int64(len(p)) > bad {
			return 0, errDamaged
		}
		return bytes.NewReader(d.content).ReadAt(p, off)
	}
	return d
}

// badExtentsDisk is a disk whose extents are those of a function.
type badExtentsDisk struct {
	*callerDisk
	extents func(yield func(qcow2.Extent, error) bool)
}

// Extents yields what the function yields.
func (d badExtentsDisk) Extents(_, _ int64) iter.Seq2[qcow2.Extent, error] { return d.extents }

// TestCompareErrors has a disk fail before and behind a difference: what comes first counts, whatever the number of
// workers. Extents with gaps are errors.
func TestCompareErrors(t *testing.T) {
	const size = 4 << 20
	content := bytes.Repeat([]byte{1}, size)
	differs := bytes.Clone(content)
	differs[2<<20] = 2
	extent := func(off, n int64) qcow2.Extent {
		return qcow2.Extent{Off: off, Len: n, Kind: qcow2.ExtentData, HostOff: -1}
	}
	tests := []struct {
		name    string
		a, b    qcow2.Disk
		want    *qcow2.Difference
		wantErr *qcow2.CompareError
	}{
		{name: "behind the difference", a: failsAt(content, 3<<20), b: newCallerDisk(differs), want: &qcow2.Difference{Off: 2 << 20}},
		{name: "before it", a: newCallerDisk(differs), b: failsAt(content, 1<<20), wantErr: &qcow2.CompareError{Second: true, Reading: true, Off: 1 << 20}},
		{name: "a short read", a: newCallerDisk(content), b: &callerDisk{content: content[:size/2], size: size}, wantErr: &qcow2.CompareError{Second: true, Reading: true, Off: 2 << 20}},
		{name: "a gap", b: newCallerDisk(content), a: badExtentsDisk{newCallerDisk(content), func(yield func(qcow2.Extent, error) bool) {
			_ = yield(extent(0, 1<<20), nil) && yield(extent(3<<20, 1<<20), nil)
		}}, wantErr: &qcow2.CompareError{Off: 1 << 20}},
		{name: "an end too soon", b: newCallerDisk(content), a: badExtentsDisk{newCallerDisk(content), func(yield func(qcow2.Extent, error) bool) {
			yield(extent(0, 3<<20), nil)
		}}, wantErr: &qcow2.CompareError{Off: 3 << 20}},
		{name: "extents that fail", a: newCallerDisk(content), b: badExtentsDisk{newCallerDisk(content), func(yield func(qcow2.Extent, error) bool) {
			_ = yield(extent(0, 1<<20), nil) && yield(qcow2.Extent{}, errDamaged)
		}}, wantErr: &qcow2.CompareError{Second: true, Off: 1 << 20}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, workers := range []int{1, 2, 7} {
				got, err := qcow2.Compare(t.Context(), tt.a, tt.b, &qcow2.CompareOptions{Workers: workers})
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				var failed *qcow2.CompareError
				if !errors.As(err, &failed) {
					failed = nil
				} else {
					failed = &qcow2.CompareError{Second: failed.Second, Reading: failed.Reading, Off: failed.Off}
				}
				if diff := cmp.Diff(tt.wantErr, failed); diff != "" {
					t.Errorf("%v (-want +got):\n%s", err, diff)
				}
			}
		})
	}
	for _, workers := range []int{-1, 65} {
		if _, err := qcow2.Compare(t.Context(), tests[0].a, tests[0].b, &qcow2.CompareOptions{Workers: workers}); !errors.Is(err, qcow2.ErrOption) {
			t.Errorf("%d workers: %v", workers, err)
		}
	}
}

// TestCompareCancelled ends a comparison in its middle: it returns the context's error, and leaves no goroutine. It
// holds no more ranges than it has workers.
func TestCompareCancelled(t *testing.T) {
	before := runtime.NumGoroutine()
	content := make([]byte, 32<<20)
	ctx, cancel := context.WithCancel(t.Context())
	var reads, inFlight, most atomic.Int64
	d := newCallerDisk(content)
	d.read = func(d *callerDisk, p []byte, off int64) (int, error) {
		for n := inFlight.Add(1); ; {
			if old := most.Load(); n <= old || most.CompareAndSwap(old, n) {
				break
			}
		}
		defer inFlight.Add(-1)
		if reads.Add(1) == 20 {
			cancel()
		}
		return copy(p, d.content[off:]), nil
	}
	diff, err := qcow2.Compare(ctx, d, d, &qcow2.CompareOptions{Workers: 3})
	if !errors.Is(err, context.Canceled) || diff != nil {
		t.Errorf("%v, %v", diff, err)
	}
	if n := reads.Load(); n > 30 || most.Load() > 3 {
		t.Errorf("%d reads, %d at once", n, most.Load())
	}
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines, %d before", runtime.NumGoroutine(), before)
}

// TestCompareCancelledAtTheEnd cancels while the last range is read: of disks that differ in it Compare does not say that they
// are equal.
func TestCompareCancelledAtTheEnd(t *testing.T) {
	const size = 1000
	for _, workers := range []int{1, 2} {
		ctx, cancel := context.WithCancel(t.Context())
		a := newCallerDisk(bytes.Repeat([]byte{1}, size))
		a.read = func(d *callerDisk, p []byte, off int64) (int, error) {
			for range 1000 {
				runtime.Gosched() // all ranges are handed out
			}
			cancel()
			return copy(p, d.content[off:]), nil
		}
		diff, err := qcow2.Compare(ctx, a, newCallerDisk(bytes.Repeat([]byte{2}, size)), &qcow2.CompareOptions{Workers: workers})
		if !errors.Is(err, context.Canceled) || diff != nil {
			t.Errorf("%d workers: %v, %v", workers, diff, err)
		}
	}
}

// ExampleCompare finds the first byte in which two disks differ.
func ExampleCompare() {
	a, err := qcow2.CreateStorage(qcow2.NewMemoryStorage(), 1<<20, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer a.Close()
	b, err := qcow2.CreateStorage(qcow2.NewMemoryStorage(), 2<<20, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer b.Close()
	diff, err := qcow2.Compare(context.Background(), a, b, nil)
	fmt.Println(diff, err) // the rest of b reads as zeros
	if _, err := b.WriteAt([]byte("boot"), 510); err != nil {
		fmt.Println(err)
		return
	}
	diff, err = qcow2.Compare(context.Background(), a, b, nil)
	fmt.Println(diff.Kind, diff.Off, err)
	// Output:
	// <nil> <nil>
	// content 510 <nil>
}
