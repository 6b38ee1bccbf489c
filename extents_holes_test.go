package qcow2

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
)

// TestExtentsHolesMoved changes what an image maps within a walk that looks for holes of its file. In the image 32 MiB,
// which one slice of a table maps, are preallocated and, but for the first cluster, holes; from 48 MiB on there is content
// at any time, in the image or below it. It is never a hole.
func TestExtentsHolesMoved(t *testing.T) {
	const preallocated, size, cluster = 32 << 20, 64 << 20, 64 << 10
	for _, tt := range []struct {
		name    string
		written []int64                // guest offsets of clusters that are written before the walk
		hole    int64                  // guest offset of one of them that is discarded again
		at      int64                  // the walk stops in front of it
		change  func(img *Image) error // and goes on behind this
	}{
		// The file had no data where the new cluster is when that was asked.
		{"written", nil, 0, preallocated, func(img *Image) error {
			_, err := img.WriteAt(slices.Repeat([]byte{2}, cluster), 48<<20)
			return err
		}},
		// The file has no data any more where the cluster was. The walk has its entry in a window.
		{"given back", []int64{36 << 20, 40 << 20, 48 << 20}, 40 << 20, 40 << 20, func(img *Image) error {
			return img.MakeEmpty(context.Background())
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := NewMemoryStorage()
			img := newTestImage(t, s, preallocated, CreateOptions{Preallocation: PreallocationMetadata})
			data := slices.Repeat([]byte{2}, cluster)
			if _, err := img.WriteAt(data, 0); err != nil {
				t.Fatal(err)
			}
			if err := img.Resize(t.Context(), size, nil); err != nil {
				t.Fatal(err)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			below := newTestRaw(t, slices.Repeat([]byte{1}, size))
			img, err := OpenStorage(s, &OpenOptions{ReadWrite: true, Backing: below})
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			for _, off := range tt.written {
				if _, err := img.WriteAt(data, off); err != nil {
					t.Fatal(err)
				}
			}
			if tt.hole > 0 {
				if err := errors.Join(img.Discard(tt.hole, cluster), img.Sync()); err != nil {
					t.Fatal(err)
				}
			}
			changed, holes := false, int64(0)
			for e, err := range img.extents(0, size) {
				if err != nil {
					t.Fatal(err)
				}
				if e.Off+e.Len > 48<<20 && e.Kind != ExtentData {
					t.Errorf("%+v", e)
				}
				if e.Hole {
					holes += e.Len
				}
				if !changed && e.Off+e.Len >= tt.at {
					changed = true
					if err := tt.change(img); err != nil {
						t.Fatal(err)
					}
				}
			}
			if !changed || holes != preallocated-cluster {
				t.Errorf("changed: %v; %d bytes of holes, want %d", changed, holes, preallocated-cluster)
			}
		})
	}
}

// TestExtentsHolesBesideWriters walks an image whose lower half is preallocated and holes, every other one of them free for
// new clusters, and whose upper half is written over and over, never by zeros, while snapshots come and go and what they
// held is punched: of the upper half no walk sees zeros or holes.
func TestExtentsHolesBesideWriters(t *testing.T) {
	const cluster, half, size, rounds = 64 << 10, 48 << 20, 96 << 20, 400
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	img := newTestImage(t, NewMemoryStorage(), size, CreateOptions{ClusterSize: cluster, Preallocation: PreallocationMetadata,
		Open: &OpenOptions{Discard: DiscardAll, NoSync: true, L2CacheBytes: 1}})
	data := slices.Repeat([]byte{1}, half)
	if _, err := img.WriteAt(data, half); err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < half; off += 2 * cluster {
		if err := img.Discard(off, cluster); err != nil {
			t.Fatal(err)
		}
	}
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var writers, walkers sync.WaitGroup
	until := func(wait *sync.WaitGroup, n uint64, f func(rng *rand.Rand) error) {
		wait.Add(1)
		go func() {
			defer wait.Done()
			rng := rand.New(rand.NewPCG(seed, n))
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := f(rng); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	for n := range uint64(2) {
		until(&writers, n, func(rng *rand.Rand) error {
			_, err := img.WriteAt(data[:cluster*(1+rng.IntN(4))], half+rng.Int64N(half/cluster-4)*cluster)
			return err
		})
	}
	holes := int64(0)
	until(&walkers, 0, func(*rand.Rand) error {
		for e, err := range img.Extents(0, size) {
			if err != nil {
				return err
			}
			if e.Off+e.Len > half && e.Kind != ExtentData {
				t.Errorf("%+v", e)
			}
			if e.Hole {
				holes += e.Len
			}
			runtime.Gosched()
		}
		return nil
	})
	for range rounds {
		snap, err := img.CreateSnapshot(t.Context(), &SnapshotOptions{Name: "snap"})
		if err != nil {
			t.Error(err)
			break
		}
		if err := img.Sync(); err != nil {
			t.Error(err)
		}
		if err := img.DeleteSnapshot(t.Context(), SnapshotRef{ID: snap.ID}); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	writers.Wait()
	walkers.Wait()
	if holes == 0 {
		t.Error("no holes were found")
	}
}
