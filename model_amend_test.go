package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
)

// amendOp returns an Amend or a Rebase now and then; about one operation in fifty, where clusters are small.
func (g *generator) amendOp() (op, bool) {
	often := 50
	if g.c.clusterSize > 64<<10 {
		often = 500
	}
	if g.rng.IntN(often) != 0 {
		return op{}, false
	}
	o := op{kind: opAmend, seed: g.rng.Uint64N(1 << 32)}
	if g.c.backed() && g.rng.IntN(2) == 0 {
		o.kind = opRebase
	}
	return o, true
}

// amend gives the image the features that the operation says. It may be refused by name, and then has changed nothing.
func (r *modelRun) amend(o op) error {
	rng := rand.New(rand.NewPCG(o.seed, 5))
	var a AmendOptions
	lazy := rng.IntN(2) == 0
	switch rng.IntN(4) {
	case 0:
		a.Version, a.RefcountBits = 2, 16
	case 1:
		a.Version, a.LazyRefcounts = 3, &lazy
	case 2:
		a.LazyRefcounts = &lazy
	default:
		a.Version, a.RefcountBits = 3, 1<<rng.IntN(7)
		if r.c.storage == "device" {
			a.RefcountBits = min(a.RefcountBits, 16) // there is no room for more than it was made for
		}
	}
	before := r.img.Info()
	err := r.img.Amend(context.Background(), &a)
	after := r.img.Info()
	if errors.Is(err, ErrOption) || errors.Is(err, ErrTooLarge) || r.c.storage == "device" && isNoSpace(err) {
		if after.Version != before.Version || after.RefcountBits != before.RefcountBits || after.LazyRefcounts != before.LazyRefcounts {
			return fmt.Errorf("refused (%w), and the image has changed", err)
		}
		return r.walk(false)
	}
	if err != nil {
		return err
	}
	r.stats.amends++
	r.c.version, r.c.refcountBits, r.c.lazy = after.Version, after.RefcountBits, after.LazyRefcounts
	if a.Version != 0 && after.Version != a.Version || a.RefcountBits != 0 && after.RefcountBits != a.RefcountBits ||
		a.LazyRefcounts != nil && after.LazyRefcounts != *a.LazyRefcounts {
		return fmt.Errorf("asked for %+v, got %+v", a, after)
	}
	return r.walk(false)
}

// rebase takes the backing file away, or gives it back.
func (r *modelRun) rebase(o op) error {
	if len(r.snaps) > 0 {
		return nil // it would change what they show
	}
	var b RebaseOptions
	if r.img.Info().BackingFile == "" {
		b.BackingFile, b.BackingFormat = r.f.backingName, "raw"
		if strings.HasSuffix(b.BackingFile, ".qcow2") {
			b.BackingFormat = "qcow2"
		}
		b.Resolver = ResolverMap{r.f.backingName: r.f.backing}
	} else if o.seed%4 == 0 {
		return nil // it stays a while
	}
	err := r.img.Rebase(context.Background(), &b)
	if r.c.storage == "device" && isNoSpace(err) {
		return r.walk(false)
	}
	if err != nil {
		return err
	}
	r.stats.amends++
	return r.walk(false)
}

// overBacking reports whether the image names its backing file, which a rebase may have taken away.
func (r *modelRun) overBacking() bool { return r.f.backing != nil && r.img.Info().BackingFile != "" }
