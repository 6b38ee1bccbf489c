package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// snapshotRounds is how many operations on snapshots the concurrent tests make.
const snapshotRounds = 40

// openSnapshot is a snapshot that is open, and what it showed at first.
type openSnapshot struct {
	*SnapshotDisk
	content []byte
}

// unchanged tells whether the snapshot still shows what it showed at first.
func (s *openSnapshot) unchanged() error {
	b, err := readWholeDisk(s)
	if err == nil && !bytes.Equal(b, s.content) {
		err = fmt.Errorf("I4: snapshot %s changed", s.Snapshot().ID)
	}
	return err
}

// TestConcurrencySnapshots takes, reads and deletes snapshots while others write, compress and sync. Each writer has
// its own stripes of the disk, and adds one to a number in all of them by turns; so a snapshot in which the numbers of
// a writer differ by more than one, or that changes, shows a write that got past it.
func TestConcurrencySnapshots(t *testing.T) {
	const (
		writers = 3
		stripe  = 3000 // bytes: writers meet in clusters
		stripes = 12   // of each writer
		size    = writers * stripes * stripe / 512 * 512
	)
	for _, o := range []CreateOptions{{ClusterSize: 4096}, {ClusterSize: 512, LazyRefcounts: true}} {
		t.Run(fmt.Sprintf("cluster=%d", o.ClusterSize), func(t *testing.T) {
			img, _ := newSnapshotImage(t, size, nil, &o)
			ctx := context.Background()
			var wg sync.WaitGroup
			var stop atomic.Bool
			for w := range writers {
				wg.Add(1)
				go func() {
					defer wg.Done()
					rng := rand.New(rand.NewPCG(1, uint64(w)))
					p := make([]byte, 1000)
					for n := uint64(1); !stop.Load(); n++ {
						for k := range stripes {
							binary.BigEndian.PutUint64(p, n)
							off := int64(k*writers+w) * stripe
							if _, err := img.WriteAt(p, off+100); err != nil {
								t.Errorf("write: %v", err)
								return
							}
						}
						if rng.IntN(8) == 0 {
							if err := img.Sync(); err != nil {
								t.Errorf("sync: %v", err)
							}
						}
					}
				}()
			}
			look := func(d Disk) []byte {
				b, err := readWholeDisk(d)
				if err != nil {
					t.Errorf("read: %v", err)
					return nil
				}
				for w := range writers {
					first := binary.BigEndian.Uint64(b[w*stripe+100:])
					for k := range stripes {
						if n := binary.BigEndian.Uint64(b[(k*writers+w)*stripe+100:]); n > first || first-n > 1 {
							t.Errorf("stripe %d of writer %d has %d, the first one %d", k, w, n, first)
						}
					}
				}
				return b
			}
			rng := rand.New(rand.NewPCG(1, 100))
			var open []openSnapshot
			for i := range snapshotRounds {
				s, err := img.CreateSnapshot(ctx, &SnapshotOptions{Name: fmt.Sprint(i)})
				if err != nil {
					t.Errorf("create: %v", err)
					break
				}
				d, err := img.OpenSnapshot(SnapshotRef{ID: s.ID})
				if err != nil {
					t.Errorf("open: %v", err)
					break
				}
				open = append(open, openSnapshot{d, look(d)})
				if len(open) < 4 {
					continue
				}
				k := rng.IntN(len(open))
				h := open[k]
				open = append(open[:k], open[k+1:]...)
				if err := img.DeleteSnapshot(ctx, SnapshotRef{ID: h.Snapshot().ID}); !errors.Is(err, ErrBusy) {
					t.Errorf("delete of an open snapshot: %v", err)
				}
				if err := errors.Join(h.unchanged(), h.Close(), img.DeleteSnapshot(ctx, SnapshotRef{ID: h.Snapshot().ID})); err != nil {
					t.Errorf("delete: %v", err)
				}
			}
			stop.Store(true)
			wg.Wait()
			for _, h := range open {
				if err := errors.Join(h.unchanged(), h.Close()); err != nil {
					t.Error(err)
				}
			}
			if err := checkList(img); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestConcurrencyApply applies two snapshots by turns while others read and write. A read sees the disk of one, or of
// the other, never a part of each; what is dropped is not reused while a read that found it is in flight (I4).
func TestConcurrencyApply(t *testing.T) {
	const size = 256 << 10
	img, _ := newSnapshotImage(t, size, nil, &CreateOptions{ClusterSize: 4096})
	ctx := context.Background()
	// The first half of the disk is all of one letter; writers use the second.
	for _, name := range []string{"a", "b"} {
		if _, err := img.WriteAt(bytes.Repeat([]byte(name), size/2), 0); err != nil {
			t.Fatal(err)
		}
		createSnapshot(t, img, name)
	}
	var wg sync.WaitGroup
	var stop atomic.Bool
	for r := range 3 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := make([]byte, size/2)
			for !stop.Load() {
				if _, err := img.ReadAt(p, 0); err != nil {
					t.Errorf("read: %v", err)
					return
				}
				if first := p[0]; first != 'a' && first != 'b' || bytes.Count(p, p[:1]) != len(p) {
					t.Errorf("a read sees a part of another disk, from %q on", first)
					return
				}
				q := bytes.Repeat([]byte{byte('A' + r)}, 5000)
				if _, err := img.WriteAt(q, size/2+int64(r)*20_000); err != nil {
					t.Errorf("write: %v", err)
					return
				}
			}
		}()
	}
	for i := range snapshotRounds {
		if err := img.ApplySnapshot(ctx, SnapshotRef{Name: string("ab"[i%2])}); err != nil {
			t.Errorf("apply: %v", err)
			break
		}
	}
	stop.Store(true)
	wg.Wait()
}
