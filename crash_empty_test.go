package qcow2

import (
	"bytes"
	"context"
	"math/rand/v2"
	"testing"
)

// Marks of a record: MakeEmpty begins, and has returned.
type (
	// crashEmptyStart is the start of a MakeEmpty. left is what the guest reads then: what lies below.
	crashEmptyStart struct{ left []byte }
	// crashEmptyEnd is its return.
	crashEmptyEnd struct{ done bool }
)

// empty takes in the marks of a MakeEmpty. While it runs, a crash leaves everything or nothing.
func (o *crashOracle) empty(mark any) {
	switch m := mark.(type) {
	case crashEmptyStart:
		o.left = m.left
	case crashEmptyEnd:
		if m.done {
			o.guest = bytes.Clone(o.left)
			clear(o.touched)
			clear(o.values)
		}
		o.left = nil
	}
}

// emptied reports whether a disk that reads got is one that a MakeEmpty in progress has emptied.
func (o *crashOracle) emptied(got []byte) bool { return o.left != nil && bytes.Equal(got, o.left) }

// emptyWorkload empties images of every kind between writes: some are filled before the record begins, some over a
// backing file, some with snapshots, some on devices that are full.
func emptyWorkload() crashWorkload {
	return crashWorkload{"empty", func(c *crashConfig, rng *rand.Rand) {
		pick := func(of ...int) int { return of[rng.IntN(len(of))] }
		c.create.Version = 2 + rng.IntN(2)
		c.create.ClusterSize = pick(512, 512, 1024, 4096)
		c.create.RefcountBits = 16
		if c.create.Version == 3 {
			c.create.RefcountBits = pick(1, 2, 4, 8, 16, 32, 64)
			c.create.LazyRefcounts = rng.IntN(6) == 0
		}
		c.size = int64((100+rng.IntN(100))*c.create.ClusterSize) + int64(rng.IntN(c.create.ClusterSize/512))*512
		c.ops, c.sync, c.reopen, c.makeEmpty = 24, 10, 2, 15
		c.fill, c.packed, c.compressed = 0.3+0.7*rng.Float64(), 0.3, 10
		c.zeros = c.create.Version == 3
		switch rng.IntN(6) {
		case 0, 1:
			c.backing = []string{"raw", "qcow2"}[rng.IntN(2)]
		case 2:
			c.snapshot = c.create.RefcountBits >= 16
		case 3:
			c.create.Version, c.create.DataFile = 3, "data"
		case 4:
			if c.create.RefcountBits >= 8 {
				c.device, c.full = true, true
			}
		case 5:
			if c.create.Version == 3 {
				c.create.ExtendedL2, c.create.ClusterSize, c.backing = true, 16<<10, "raw"
				c.size = int64((10+rng.IntN(10))*c.create.ClusterSize) + int64(rng.IntN(32))*512
			}
		}
	}}
}

// makeEmptyStep is a MakeEmpty, with its marks. On a full device it may fail, and has done nothing then.
func (g *crashGenerator) makeEmptyStep(img *Image) error {
	left := make([]byte, g.size)
	copy(left, g.backingBytes)
	g.next("make empty")
	g.rec.Mark(crashEmptyStart{left})
	err := img.MakeEmpty(context.Background())
	if err != nil && !(g.full && isNoSpace(err)) {
		return err
	}
	g.rec.Mark(crashEmptyEnd{err == nil})
	if err != nil {
		g.next("refused: %v", err)
	}
	return nil
}

// TestMakeEmptyBroken breaks one ordering of MakeEmpty at a time and wants a crash to show it, by the name of what the
// ordering is for.
func TestMakeEmptyBroken(t *testing.T) {
	tests := []struct {
		name   string
		broken emptyOrder
		want   string
		seeds  uint64
	}{
		{"switch before the tables beside are durable", emptySwitchEarly, "I3", 8},
		// The trap of QEMU's first version: the front is overwritten while the L1 table in force maps it.
		{"front written while it is in use", emptyFrontEarly, "I3", 8},
		{"switch before the tables behind the header are durable", emptyFrontUnsynced, "I1", 8},
		{"file cut while the header names what is cut off", emptyTruncateEarly, "I3", 16},
		{"references lowered while tables refer", emptyLowerEarly, "I1", 24},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			states := 0
			for seed := uint64(1); seed <= tt.seeds; seed++ {
				c := newCrashConfig(emptyWorkload(), seed)
				c.test = testHooks{emptyOrder: tt.broken}
				stats, failure, err := runCrash(c, crashBudget{states: 400, every: true, stopWith: tt.want})
				if err != nil && failure == nil {
					t.Logf("seed %d: %v", seed, err) // a broken image may refuse later work
					continue
				}
				states += stats.States
				if failure == nil {
					continue
				}
				t.Logf("seed %d, after %d states: %s", seed, states, crashFirst(failure, tt.want))
				c = newCrashConfig(emptyWorkload(), seed)
				if _, failure, err := runCrash(c, crashBudget{states: 400, every: true}); failure != nil || err != nil {
					t.Errorf("and without the break: %v, %v", failure, err)
				}
				return
			}
			t.Errorf("no %s in %d states of %d runs", tt.want, states, tt.seeds)
		})
	}
}
