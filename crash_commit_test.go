package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// commitStatesEnv asks for the long run of TestCommitCrash, by the number of crash states in all:
//
//	QCOW2_COMMIT_STATES=20000 go test -run 'TestCommitCrash$' -timeout 60m -v .
const commitStatesEnv = "QCOW2_COMMIT_STATES"

// crashCommitted is the mark of a Commit that has returned.
type crashCommitted struct{}

// commitFiles are the files of a chain, of a record or of a crash state. They are the Resolver of the images.
type commitFiles map[string]Storage

// Resolve implements Resolver.
func (f commitFiles) Resolve(ref FileRef) (Storage, error) {
	if f[ref.Name] == nil {
		return nil, fs.ErrNotExist
	}
	return f[ref.Name], nil
}

// commitCrash is a recorded Commit whose crash states are looked at.
type commitCrash struct {
	sc    *commitScenario
	files map[string]*crashtest.File
	rec   *crashtest.Recorder
	want  []byte // what the guest reads, at any time
}

// newCommitCrash records a Commit of the scenario's chain, with the ordering broken that is given.
func newCommitCrash(t testing.TB, sc *commitScenario, disks map[string]*crashtest.Disk, broken emptyOrder) (*commitCrash, error) {
	c := &commitCrash{sc: sc, files: make(map[string]*crashtest.File), rec: crashtest.NewRecorder()}
	live := make(commitFiles)
	for _, name := range []string{"data", "deep", "low", "mid", "base", "image"} {
		if d := disks[name]; d != nil {
			c.files[name] = c.rec.Regular(name, d.Bytes())
			live[name] = crashStorage{c.files[name]}
		}
	}
	img, err := OpenStorage(live["image"], &OpenOptions{ReadWrite: true, Resolver: live, Name: "image", test: testHooks{emptyOrder: broken}})
	if err != nil {
		return nil, err
	}
	c.want = readDisk(t, img)
	if err := img.Commit(context.Background(), &sc.opts); err != nil {
		return nil, err
	}
	c.rec.Mark(crashCommitted{})
	return c, img.Close()
}

// look looks at a crash state: the guest reads the same as ever, and no image is worse than with leaks. When Commit has
// returned, the base holds everything. Some are committed again, which must lead to the end.
func (c *commitCrash) look(t testing.TB, s *crashtest.State) error {
	files, disks := make(commitFiles), make(map[string]*crashtest.Disk)
	for name, f := range c.files {
		disks[name] = s.Disk(f)
		files[name] = crashStorage{disks[name]}
	}
	if err := c.compare(files, "image"); err != nil {
		return err
	}
	for _, l := range c.sc.layers {
		if l.raw {
			continue
		}
		size, err := disks[l.name].Size()
		if err != nil {
			return err
		}
		rep, err := refwalk.Walk(disks[l.name], size)
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		if rep.Corruptions() > 0 && (!rep.Dirty() || rep.BadEntries+rep.Overlaps > 0) {
			return fmt.Errorf("%s: dirty %v, %d corruptions: %s", l.name, rep.Dirty(), rep.Corruptions(), strings.Join(rep.Findings, "; "))
		}
	}
	if len(s.Marks()) > 0 && !c.sc.base().raw {
		if err := c.compare(files, c.sc.base().name); err != nil {
			return fmt.Errorf("the base after the commit: %w", err)
		}
	}
	if s.Index%16 != 5 {
		return nil
	}
	img, err := OpenStorage(files["image"], &OpenOptions{ReadWrite: true, Resolver: files, Name: "image"})
	if err != nil {
		return err
	}
	if err := img.Commit(context.Background(), &c.sc.opts); err != nil {
		return fmt.Errorf("commit again: %w", err)
	}
	if err := img.Close(); err != nil {
		return err
	}
	return c.compare(files, "image")
}

// compare opens the named image of a state, and compares what it reads.
func (c *commitCrash) compare(files commitFiles, name string) error {
	img, err := OpenStorage(files[name], &OpenOptions{Resolver: files, Name: name})
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	defer img.Close()
	p := make([]byte, len(c.want))
	if n, err := img.ReadAt(p, 0); n < len(p) {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if !bytes.Equal(p, c.want) {
		return fmt.Errorf("%s: content: %s", name, explainContent(p, 0, c.want, nil))
	}
	return nil
}

// run looks at about the given number of states, and returns how many it were, and the first fault.
func (c *commitCrash) run(t testing.TB, states int, seed uint64) (crashtest.Stats, error) {
	n := len(c.rec.Log()) + 1
	o := crashtest.Options{PerPoint: max(states/n+2, 8)}
	o.Every = max(1, n*o.PerPoint/states)
	return c.rec.States(rand.New(rand.NewPCG(seed, 1)), o, func(s *crashtest.State) error {
		if err := c.look(t, s); err != nil {
			return fmt.Errorf("%w\n%s", err, s)
		}
		return nil
	})
}

// scattered returns the scenario with writes at random besides, in all layers.
func (sc commitScenario) scattered(seed uint64) *commitScenario {
	rng := rand.New(rand.NewPCG(seed, 5))
	sc.layers = slices.Clone(sc.layers)
	for i := range sc.layers {
		l := &sc.layers[i]
		l.write = slices.Clone(l.write)
		for range 12 {
			n := 1 + rng.Int64N(3000)
			l.write = append(l.write, faultStep{'w', rng.Int64N(l.size - n), n})
		}
	}
	return &sc
}

// TestCommitCrash interrupts the commit of chains of every kind at every host operation, with all files in one record.
func TestCommitCrash(t *testing.T) {
	total, perRun := 700, 45
	if s := os.Getenv(commitStatesEnv); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		total, perRun = n, 300
	}
	var sum crashtest.Stats
	for seed := uint64(1); sum.Distinct < total; seed++ {
		for _, sc := range commitScenarios() {
			c, err := newCommitCrash(t, sc.scattered(seed), sc.scattered(seed).build(t), emptyOrderKept)
			if err != nil {
				t.Fatalf("%s, seed %d: %v", sc.name, seed, err)
			}
			stats, err := c.run(t, perRun, seed)
			if err != nil {
				t.Fatalf("%s, seed %d: %v", sc.name, seed, err)
			}
			sum.Add(stats)
		}
	}
	t.Logf("%s", sum)
}

// TestCommitBroken empties the overlay before the base is durable. A crash then shows content that is lost.
func TestCommitBroken(t *testing.T) {
	for _, name := range []string{"raw", "qcow2", "version 2", "base with snapshot", "base with data file"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, sc := range commitScenarios() {
				if sc.name != name {
					continue
				}
				disks := sc.build(t)
				for _, broken := range []emptyOrder{commitOverlayEarly, emptyOrderKept} {
					c, err := newCommitCrash(t, &sc, disks, broken)
					if err != nil {
						t.Fatal(err)
					}
					stats, err := c.run(t, 1000, 1)
					if lost := err != nil && strings.Contains(err.Error(), "content:"); lost != (broken != emptyOrderKept) {
						t.Errorf("broken %v: %d states, %v", broken != emptyOrderKept, stats.States, err)
					}
				}
			}
		})
	}
}
