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

// clone returns a copy.
func (m *sparseBytes) clone() *sparseBytes {
	c := newSparseBytes(m.size)
	for i, pg := range m.pages {
		p := *pg
		c.pages[i] = &p
	}
	return c
}

// empty carries out a MakeEmpty: what the backing file shows is left.
func (r *modelRun) empty() error {
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
	r.model = r.f.content.clone()
	return r.walk(false)
}

// commit carries out a Commit: the backing file shows the same then.
func (r *modelRun) commit() error {
	r.countTables()
	err := r.img.Commit(context.Background(), nil)
	switch {
	case r.c.layout == layoutRawData && errors.Is(err, ErrUnsupported):
		return nil
	case !r.c.backed():
		if !errors.Is(err, ErrNoBacking) {
			return fmt.Errorf("%w, want ErrNoBacking", err)
		}
		return nil
	case err != nil:
		return err
	}
	r.f.content = r.model.clone()
	if !r.c.external() {
		return r.walk(false)
	}
	return nil
}

// countTables notes how many L2 tables there are, before they are dropped.
func (r *modelRun) countTables() {
	n := 0
	for i := range r.img.m.l1.n {
		if r.img.m.l1.load(i) != 0 {
			n++
		}
	}
	r.stats.tables = max(r.stats.tables, n)
}
