package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2"
)

// TestMeasureSizes compares Measure with files: one that is created with all of its disk is FullyAllocated long, and one
// that QEMU's way of counting calls for, with all tables and the data of the source, is Required long.
func TestMeasureSizes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, o := range []qcow2.CreateOptions{
		{}, {Version: 2}, {ClusterSize: 512}, {ClusterSize: 512, RefcountBits: 64}, {ClusterSize: 1024, RefcountBits: 1},
		{ClusterSize: 4096, RefcountBits: 2}, {ClusterSize: 16 << 10, ExtendedL2: true}, {ClusterSize: 2 << 20, RefcountBits: 64},
		{ClusterSize: 128 << 10, ExtendedL2: true, RefcountBits: 8},
	} {
		cluster := int64(o.ClusterSize)
		if cluster == 0 {
			cluster = 64 << 10
		}
		for range 4 {
			size := 1 + rng.Int64N(300*min(cluster, 64<<10)*(1+rng.Int64N(8)))
			m, err := qcow2.MeasureSize(size, &qcow2.MeasureOptions{Create: &o})
			if err != nil {
				t.Fatal(err)
			}
			whole := (size + cluster - 1) / cluster * cluster
			o.Preallocation = qcow2.PreallocationMetadata
			s := qcow2.NewMemoryStorage()
			img, err := qcow2.CreateStorage(s, whole, &o)
			if err != nil {
				t.Fatal(err)
			}
			o.Preallocation = qcow2.PreallocationOff
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			have, _ := s.Size()
			if want := (qcow2.Measurement{Required: have - whole, FullyAllocated: have}); *m != want {
				t.Errorf("%+v, %d bytes: %+v, want %+v", o, size, *m, want)
			}
			// A source with data in some of its clusters.
			content := make([]byte, size)
			clusters := map[int64]bool{}
			for range 5 {
				off := rng.Int64N(size) &^ 0xffff
				content[off] = 1
				for at := off; at < min(off+0x10000, size); at += min(cluster, 512) {
					clusters[at/cluster] = true
				}
			}
			src := &dataDisk{newCallerDisk(content)}
			m, err = qcow2.Measure(t.Context(), src, &qcow2.MeasureOptions{Create: &o})
			want := qcow2.Measurement{Required: have - whole + int64(len(clusters))*cluster, FullyAllocated: have}
			if err != nil || *m != want {
				t.Errorf("%+v, %d bytes, %d clusters: %v, %+v, want %+v", o, size, len(clusters), err, m, want)
			}
			full := o
			full.Preallocation = qcow2.PreallocationFull
			m, err = qcow2.Measure(t.Context(), src, &qcow2.MeasureOptions{Create: &full})
			if err != nil || m.Required != have {
				t.Errorf("preallocated: %v, %+v, want %d", err, m, have)
			}
		}
	}
}

// dataDisk is a disk whose extents, of 64 KiB each, are data where the first byte is not zero.
type dataDisk struct{ *callerDisk }

// Extents yields the extents.
func (d *dataDisk) Extents(off, n int64) iter.Seq2[qcow2.Extent, error] {
	return func(yield func(qcow2.Extent, error) bool) {
		for end := off + n; off < end; off += 0x10000 {
			e := qcow2.Extent{Off: off, Len: min(0x10000, end-off), Kind: qcow2.ExtentZero, HostOff: -1}
			if d.content[off] != 0 {
				e.Kind = qcow2.ExtentData
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// TestMeasureRefusals looks at what Measure refuses, and that a source that fails, or whose extents have gaps, ends it.
func TestMeasureRefusals(t *testing.T) {
	disk := newCallerDisk(make([]byte, 1<<20))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	extent := qcow2.Extent{Len: 1000, Kind: qcow2.ExtentData, HostOff: -1}
	gap := badExtentsDisk{disk, func(yield func(qcow2.Extent, error) bool) { yield(extent, nil) }}
	fails := badExtentsDisk{disk, func(yield func(qcow2.Extent, error) bool) { _ = yield(extent, nil) && yield(extent, errDamaged) }}
	for _, tt := range []struct {
		name string
		ctx  context.Context
		src  qcow2.Disk
		o    qcow2.CreateOptions
		want error // nil: any
	}{
		{"cluster size", t.Context(), disk, qcow2.CreateOptions{ClusterSize: 1000}, qcow2.ErrOption},
		{"version 2 with narrow refcounts", t.Context(), disk, qcow2.CreateOptions{Version: 2, RefcountBits: 1}, qcow2.ErrOption},
		{"preallocation over a backing file", t.Context(), disk, qcow2.CreateOptions{Preallocation: qcow2.PreallocationFull, BackingFile: "b", BackingFormat: "raw"}, qcow2.ErrOption},
		{"disk too large", t.Context(), &callerDisk{size: 1 << 50}, qcow2.CreateOptions{ClusterSize: 512}, qcow2.ErrTooLarge},
		{"negative size", t.Context(), &callerDisk{size: -1}, qcow2.CreateOptions{}, qcow2.ErrOption},
		{"cancelled", cancelled, disk, qcow2.CreateOptions{}, context.Canceled},
		{"extents that end too soon", t.Context(), gap, qcow2.CreateOptions{}, nil},
		{"extents that fail", t.Context(), fails, qcow2.CreateOptions{}, nil},
	} {
		m, err := qcow2.Measure(tt.ctx, tt.src, &qcow2.MeasureOptions{Create: &tt.o})
		if m != nil || err == nil || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: %+v, %v; want %v", tt.name, m, err, tt.want)
		}
	}
}

// TestMeasureRaw measures raw targets, and sources of odd length.
func TestMeasureRaw(t *testing.T) {
	for size, want := range map[int64]int64{0: 0, 1: 512, 512: 512, 1 << 40: 1 << 40} {
		got, err := qcow2.MeasureSize(size, &qcow2.MeasureOptions{Raw: true})
		if diff := cmp.Diff(&qcow2.Measurement{Required: want, FullyAllocated: want}, got); diff != "" || err != nil {
			t.Errorf("%d: %v (-want +got):\n%s", size, err, diff)
		}
	}
	told := int64(0)
	_, err := qcow2.Measure(t.Context(), newCallerDisk(bytes.Repeat([]byte{1}, 1000)), &qcow2.MeasureOptions{Raw: true,
		Progress: func(done, total int64) { told = done + total }})
	if err != nil || told != 2000 {
		t.Errorf("%v, progress %d", err, told)
	}
}

// TestMeasureProgress measures a disk of many extents: it tells how far it is every GiB, and at the end.
func TestMeasureProgress(t *testing.T) {
	const size, step = 5 << 30, 256 << 20
	disk := badExtentsDisk{&callerDisk{size: size}, func(yield func(qcow2.Extent, error) bool) {
		for off := int64(0); off < size; off += step {
			if !yield(qcow2.Extent{Off: off, Len: step, Kind: qcow2.ExtentKind(1 + off/step%2), HostOff: -1}, nil) {
				return
			}
		}
	}}
	var told []int64
	_, err := qcow2.Measure(t.Context(), disk, &qcow2.MeasureOptions{Progress: func(done, total int64) {
		told = append(told, done>>30)
		if total != size {
			t.Errorf("total %d", total)
		}
	}})
	if diff := cmp.Diff([]int64{1, 2, 3, 4, 5}, told); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

// ExampleMeasureSize tells how long an image file can become.
func ExampleMeasureSize() {
	m, err := qcow2.MeasureSize(10<<20, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(m.Required, m.FullyAllocated)
	// Output: 327680 10813440
}
