package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"

	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// maxModelSnapshots is how many internal snapshots an image of the model tests has at most: devices have room for so
// many.
const maxModelSnapshots = 3

// modelSnapshot is an internal snapshot beside its model.
type modelSnapshot struct {
	id      string
	content *sparseBytes
}

// clone returns a copy of m.
func (m *sparseBytes) clone() *sparseBytes {
	c := newSparseBytes(m.size)
	for i, p := range m.pages {
		page := *p
		c.pages[i] = &page
	}
	return c
}

// snapshot carries out an operation on snapshots, which one the operation's seed says, and walks the image.
func (r *modelRun) snapshot(o op) error {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(o.seed, 4))
	if r.c.external() {
		if _, err := r.img.CreateSnapshot(ctx, nil); !errors.Is(err, ErrUnsupported) {
			return fmt.Errorf("snapshot with a data file: %v", err)
		}
		return nil
	}
	k, i := rng.IntN(16), 0
	if n := len(r.snaps); n > 0 {
		i = rng.IntN(n)
	}
	var err error
	switch {
	case len(r.snaps) == 0 || k < 6 && len(r.snaps) < maxModelSnapshots:
		var s Snapshot
		if s, err = r.img.CreateSnapshot(ctx, &SnapshotOptions{Name: "model", Date: unixEpoch}); err == nil {
			r.snaps = append(r.snaps, modelSnapshot{s.ID, r.model.clone()})
		}
	case k < 10:
		if err = r.img.DeleteSnapshot(ctx, SnapshotRef{ID: r.snaps[i].id}); err == nil {
			r.snaps = append(r.snaps[:i:i], r.snaps[i+1:]...)
		}
	case k < 13:
		r.countTables()
		if err = r.img.ApplySnapshot(ctx, SnapshotRef{ID: r.snaps[i].id}); err == nil {
			r.model = r.snaps[i].content.clone()
		}
	case k < 14:
		err = r.img.RenameSnapshot(SnapshotRef{ID: r.snaps[i].id}, fmt.Sprint("renamed ", o.seed))
	}
	if errors.Is(err, ErrTooLarge) && r.c.refcountBits <= 4 {
		err = nil // more references than a refcount counts
	}
	if err != nil {
		return err
	}
	if err := r.readSnapshots(rng); err != nil {
		return err
	}
	return r.walk(false)
}

// readSnapshots opens the snapshots and compares ranges of them.
func (r *modelRun) readSnapshots(rng *rand.Rand) error {
	for _, s := range r.snaps {
		d, err := r.img.OpenSnapshot(SnapshotRef{ID: s.id})
		if err != nil {
			return err
		}
		hot := r.c.hot()
		for range 6 {
			off := hot[rng.IntN(len(hot))] * r.c.clusterSize
			err = errors.Join(err, r.compareSnapshot(s, d.ReadAt, off, min(r.c.clusterSize, 64<<10, d.Size()-off)))
		}
		if err := errors.Join(err, d.Close()); err != nil {
			return fmt.Errorf("snapshot %s: %w", s.id, err)
		}
	}
	return nil
}

// compareSnapshot is compare with the content of a snapshot.
func (r *modelRun) compareSnapshot(s modelSnapshot, read func([]byte, int64) (int, error), off, n int64) error {
	disk := r.model
	r.model = s.content
	defer func() { r.model = disk }()
	return r.compare(read, off, n)
}

// finishSnapshots compares all of every snapshot, by the independent reader of src.
func (r *modelRun) finishSnapshots(src refwalk.Source) error {
	disk := r.model
	defer func() { r.model = disk }()
	for i, s := range r.snaps {
		src.Snapshot = i + 1
		d, err := refwalk.NewReader(src)
		if err != nil {
			return err
		}
		r.model = s.content
		read := func(p []byte, off int64) (int, error) {
			n, err := d.ReadAt(p, off)
			if err == nil && n < len(p) {
				err = io.EOF
			}
			return n, err
		}
		if err := r.compareAll(read); err != nil {
			return fmt.Errorf("snapshot %s: %w", s.id, err)
		}
	}
	return nil
}
