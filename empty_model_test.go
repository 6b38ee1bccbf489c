package qcow2

import (
	"context"
	"errors"
	"fmt"
)

// emptying returns a MakeEmpty or a Commit.
func (g *generator) emptying() op {
	if g.rng.IntN(2) == 0 {
		return op{kind: opEmpty}
	}
	return op{kind: opCommit}
}

// copyTo writes everything that m holds, but zeros, to another one, as far as that goes.
func (m *sparseBytes) copyTo(to *sparseBytes) {
	for i, pg := range m.pages {
		if n := to.size - i*modelPage; n > 0 {
			to.write(pg[:min(n, modelPage)], i*modelPage)
		}
	}
}

// empty carries out a MakeEmpty: what the backing file shows is left.
func (r *modelRun) empty() error {
	if r.c.external() && r.c.storage == "device" && r.model.size > 64<<30 {
		return nil // a device in memory keeps a note of each chunk that was zeroed, and gigabytes of them here
	}
	r.countTables()
	err := r.img.MakeEmpty(context.Background())
	if r.c.layout == layoutRawData {
		if !errors.Is(err, ErrUnsupported) {
			return fmt.Errorf("%w, want ErrUnsupported", err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	left := newSparseBytes(r.model.size)
	if r.overBacking() {
		r.f.content.copyTo(left)
	}
	r.model = left
	return r.walk(false)
}

// commit carries out a Commit: the backing file shows the same then. Snapshots would see it, too, so it is left out while
// there are some.
func (r *modelRun) commit() error {
	if len(r.img.Snapshots()) > 0 {
		return nil
	}
	r.countTables()
	err := r.img.Commit(context.Background(), nil)
	switch {
	case r.c.layout == layoutRawData && errors.Is(err, ErrUnsupported):
		return nil
	case !r.overBacking():
		if !errors.Is(err, ErrNoBacking) {
			return fmt.Errorf("%w, want ErrNoBacking", err)
		}
		return nil
	case err != nil:
		return err
	}
	r.f.content.resize(max(r.f.content.size, r.img.Size())) // the backing file has grown
	r.f.content.zero(0, r.img.Size())
	r.model.copyTo(r.f.content)
	if !r.c.external() {
		return r.walk(false)
	}
	return nil
}
