package qcow2

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// crashDiscardWorkloads are the workloads with Discard and WriteZeroes among the operations: those given, one after
// the other by seed, in every way that OpenOptions.Discard has.
func crashDiscardWorkloads(base []crashWorkload) []crashWorkload {
	on := func(c *crashConfig, rng *rand.Rand, names ...string) {
		name := names[c.seed%uint64(len(names))]
		for _, w := range base {
			if w.name == name {
				w.setup(c, rng)
			}
		}
		c.discards = 25 + rng.IntN(25)
		c.discard = []DiscardMode{DiscardDefault, DiscardAll, DiscardAll, DiscardNever}[rng.IntN(4)]
		c.noUnref = c.create.Version != 2 && rng.IntN(4) == 0
		c.reopen = min(c.reopen, 1)
	}
	return []crashWorkload{
		{"discard", func(c *crashConfig, rng *rand.Rand) {
			on(c, rng, "rewrite", "compressed", "snapshot", "backing", "lazy")
		}},
		{"discardsub", func(c *crashConfig, rng *rand.Rand) { on(c, rng, "extended", "datafile", "extended") }},
		{"discardrace", func(c *crashConfig, rng *rand.Rand) { on(c, rng, "concurrent", "concurrent", "full") }},
	}
}

// zeroing does a Discard or WriteZeroes. Beside other writers it discards whole clusters of the own part alone.
func (g *crashGenerator) zeroing(img *Image) error {
	cs := int64(g.create.ClusterSize)
	off := g.start + g.rng.Int64N(g.end-g.start)
	if g.rng.IntN(2) == 0 {
		off = g.hot[g.rng.IntN(len(g.hot))]
	}
	n := 1 + g.rng.Int64N(6*cs)
	switch g.rng.IntN(8) {
	case 0: // much
		n = 1 + g.rng.Int64N(g.end-g.start)
	case 1, 2, 3: // whole clusters
		off, n = off/cs*cs, (n+cs-1)/cs*cs
	}
	off = max(off, g.start)
	n = min(n, g.end-off)
	switch g.rng.IntN(4) {
	case 0:
		return g.zero(img, off, n, off, n, func() error { return img.WriteZeroes(off, n, 0) })
	case 1:
		return g.zero(img, off, n, off, n, func() error { return img.WriteZeroes(off, n, ZeroMayUnmap) })
	}
	lo, end := (off+cs-1)/cs*cs, off+n
	hi := end
	if end != g.size {
		hi = end / cs * cs
	}
	if g.writers > 0 {
		off, n = lo, max(hi-lo, 0)
	}
	if g.create.Version == 2 && g.backing != "" {
		lo = max(lo, (int64(len(g.backingBytes))+cs-1)/cs*cs)
	}
	if g.create.ExtendedL2 {
		lo, hi = off, off+n // what of the ends is zeroed is read afterwards
	}
	return g.zero(img, off, n, lo, max(hi-lo, 0), func() error { return img.Discard(off, n) })
}

// zero calls f, which works on n bytes at off, and makes n2 bytes at off2 zeros, with its marks.
func (g *crashGenerator) zero(img *Image, off, n, off2, n2 int64, f func() error) error {
	if n == 0 {
		return nil
	}
	id := g.next("zero %#x+%#x of %#x+%#x", off2, n2, off, n)
	g.rec.Mark(crashWriteStart{id, off2, make([]byte, n2)})
	err := f()
	if err != nil && !(g.full && isNoSpace(err)) {
		return err
	}
	g.rec.Mark(crashWriteEnd{id})
	if err == nil && !g.create.ExtendedL2 || n2 == 0 {
		return nil
	}
	// What was zeroed is what the guest reads now.
	again := g.next("read what it left")
	q := make([]byte, n2)
	if _, err := img.ReadAt(q, off2); err != nil {
		return err
	}
	if err != nil {
		g.refused++
	}
	g.rec.Mark(crashWriteStart{again, off2, q})
	g.rec.Mark(crashWriteEnd{again})
	return nil
}

// TestFreedClusterReuse enumerates the windows in which QEMU 7.2 reuses a freed cluster before its drop is durable
// (hole 4 of the reference: a killed process leaves neither old nor new content): (a) a compressed cluster is
// overwritten, and the next allocating write takes its place; (b) a cluster is discarded, or zeroed and unmapped, and
// the next write takes its place. At every point of the record, with every subset of what was not synced that is
// looked at, each sector is old or new. With clusters that are handed out at once, the same states show the hole.
func TestFreedClusterReuse(t *testing.T) {
	const cs = 4096
	type dropFunc = func(g *crashGenerator, img *Image, off, n int64) error
	discard := func(g *crashGenerator, img *Image, off, n int64) error {
		return g.zero(img, off, n, off, n, func() error { return img.Discard(off, n) })
	}
	tests := []struct {
		name   string
		packed float64
		n      int64 // bytes that are dropped at a time; of compressed clusters all that share a host cluster
		drop   dropFunc
	}{
		{"compressed cluster overwritten", 1, 17 * cs, func(g *crashGenerator, img *Image, off, n int64) error {
			return g.write(img, off, n, func(p []byte) error { _, err := img.WriteAt(p, off); return err })
		}},
		{"discard", 0, cs, discard},
		{"compressed cluster discarded", 1, 17 * cs, discard},
		{"zero and unmap", 0, cs, func(g *crashGenerator, img *Image, off, n int64) error {
			return g.zero(img, off, n, off, n, func() error { return img.WriteZeroes(off, n, ZeroMayUnmap) })
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			run := func(test testHooks, budget crashBudget) (*crashTotals, *crashFailure, error) {
				c := &crashConfig{workload: "freed cluster", seed: 1, size: 48 * cs, fill: 1, third: true, packed: tt.packed, discard: DiscardAll, test: test}
				c.create = CreateOptions{Version: 3, ClusterSize: cs, RefcountBits: 16, Overwrite: true}
				c.script = func(g *crashGenerator, img *Image) error {
					for i := range int64(4) {
						if err := tt.drop(g, img, i*min(2*cs, 17*cs-tt.n), tt.n); err != nil {
							return err
						}
						at := (30 + 3*i) * cs // not mapped yet
						err := g.write(img, at, cs, func(p []byte) error { _, err := img.WriteAt(p, at); return err })
						if err == nil && i == 2 {
							err = g.syncWith("sync", img.Sync)
						}
						if err != nil {
							return err
						}
					}
					return nil
				}
				return runCrash(c, budget)
			}
			stats, failure, err := run(testHooks{}, crashBudget{states: 600, every: true})
			if failure != nil {
				failure.report(t)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_, failure, err = run(testHooks{reuseImmediately: true}, crashBudget{states: 600, every: true})
			if failure == nil {
				t.Errorf("%d states, but none shows a cluster that was handed out at once: %v", stats.States, err)
			}
		})
	}
}

// TestCrashDiscardWhole looks at states of a Discard of the whole disk between two syncs, which must be old or
// zero by cluster: with and without a write into the freed space behind it.
func TestCrashDiscardWhole(t *testing.T) {
	for _, mode := range []DiscardMode{DiscardAll, DiscardNever} {
		c := &crashConfig{workload: "discard all", seed: 2, size: 300 * 512, fill: 0.9, packed: 0.2, discard: mode}
		c.create = CreateOptions{Version: 3, ClusterSize: 512, RefcountBits: 16, Overwrite: true}
		c.script = func(g *crashGenerator, img *Image) error {
			err := g.zero(img, 0, g.size, 0, g.size, func() error { return img.Discard(0, g.size) })
			for range 2 {
				if err == nil {
					err = g.syncWith("sync", img.Sync)
				}
				if err == nil {
					err = g.write(img, 700, 9000, func(p []byte) error { _, err := img.WriteAt(p, 700); return err })
				}
			}
			return err
		}
		if _, failure, err := runCrash(c, crashBudget{states: 200}); failure != nil {
			failure.report(t)
		} else if err != nil {
			t.Fatal(fmt.Errorf("mode %d: %w", mode, err))
		}
	}
}
