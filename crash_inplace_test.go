package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// inPlaceStatesEnv asks for the long run of TestInPlaceCrash, by the number of crash states in all:
//
//	QCOW2_INPLACE_STATES=20000 go test -run TestInPlaceCrash -timeout 60m -v .
const inPlaceStatesEnv = "QCOW2_INPLACE_STATES"

// Marks of a record of conversions in place: what returned without an error.
type (
	inPlaceConverted  struct{}
	inPlaceRolledBack struct{}
)

// inPlaceLook judges the states that crashes of a conversion leave.
type inPlaceLook struct {
	sc      *inPlaceScenario
	source  []byte // the bytes of the file before
	content []byte // of its disk
	end     int64  // length of the finished image

	sources, halves, images int // states of each kind: untouched, with tables behind, finished
}

// newInPlaceLook returns a judge of the scenario.
func newInPlaceLook(sc *inPlaceScenario) (*inPlaceLook, error) {
	d := sc.disk()
	l := &inPlaceLook{sc: sc, source: d.Bytes(), content: sc.content()}
	if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
		return nil, err
	}
	var err error
	l.end, err = d.Size()
	return l, err
}

// state returns what is wrong with a state, whose marks are given.
func (l *inPlaceLook) state(d *crashtest.Disk, marks []any) error {
	size, err := d.Size()
	if err != nil {
		return err
	}
	untouched, switched := bytes.Equal(d.Bytes(), l.source), l.sc.finished(d)
	if len(marks) > 0 {
		switch marks[len(marks)-1].(type) {
		case inPlaceConverted:
			if !switched || size != l.end {
				return fmt.Errorf("not durable: image %v, %d bytes, want %d", switched, size, l.end)
			}
		case inPlaceRolledBack:
			if !untouched {
				return fmt.Errorf("not durable: it is not the source, but has %d bytes", size)
			}
		}
	}
	switch {
	case switched:
		l.images++
		return l.image(d, size)
	case untouched:
		l.sources++
		return nil
	}
	l.halves++
	return l.half(d)
}

// image judges a file that begins with the header of the image, and has size bytes.
func (l *inPlaceLook) image(d *crashtest.Disk, size int64) error {
	if err := l.sc.checkImage(d, l.content); err != nil {
		return fmt.Errorf("the image: %w", err)
	}
	now := d.Bytes()
	if _, err := RollbackInPlace(context.Background(), crashStorage{d}, int64(len(l.source))); !errors.Is(err, ErrInPlace) || !bytes.Equal(now, d.Bytes()) {
		return fmt.Errorf("roll back the image: %v", err)
	}
	if size != l.end {
		found, err := ResumeInPlace(context.Background(), crashStorage{d}, nil, int64(len(l.source)), &l.sc.opts)
		if err != nil || found != InPlaceSwitched {
			return fmt.Errorf("resume the image: %s", stringOf(found, err))
		}
	}
	return l.done(d)
}

// half judges a file that is longer than the source, and not the image.
func (l *inPlaceLook) half(d *crashtest.Disk) error {
	if now := d.Bytes(); len(now) < len(l.source) || !bytes.Equal(now[:len(l.source)], l.source) {
		return errors.New("bytes of the source changed before the switch")
	}
	back := d.Clone()
	found, err := RollbackInPlace(context.Background(), crashStorage{back}, int64(len(l.source)))
	if err != nil || found != InPlaceIncomplete && found != InPlaceComplete {
		return fmt.Errorf("roll back: %s", stringOf(found, err))
	}
	if !bytes.Equal(back.Bytes(), l.source) {
		return errors.New("rolled back, the file is not what it was")
	}
	if found, err = l.sc.resume(crashStorage{d}); err != nil || found != InPlaceIncomplete && found != InPlaceComplete {
		return fmt.Errorf("resume: %s", stringOf(found, err))
	}
	return l.done(d)
}

// done judges a file after the end of the conversion.
func (l *inPlaceLook) done(d *crashtest.Disk) error {
	b := d.Bytes()
	if int64(len(b)) != l.end {
		return fmt.Errorf("the finished image has %d bytes, want %d", len(b), l.end)
	}
	h, err := readHeader(bytes.NewReader(b), l.end)
	if err != nil {
		return err
	}
	if !isZero(b[sectorSize:h.clusterSize()]) {
		return errors.New("the finished image has something of the source behind the header")
	}
	return l.sc.checkImage(d, l.content)
}

// inPlaceCrash records what do does to a file that is d, and judges the states of its crashes.
func (l *inPlaceLook) crash(d *crashtest.Disk, rng *rand.Rand, o crashtest.Options, mark any, do func(s Storage) error, each func(d *crashtest.Disk)) (crashtest.Stats, error) {
	rec, file := l.sc.record(d)
	if err := do(crashStorage{file}); err != nil {
		return crashtest.Stats{}, err
	}
	rec.Mark(mark)
	return rec.States(rng, o, func(s *crashtest.State) error {
		if each != nil {
			each(s.Disk(file))
		}
		if err := l.state(s.Disk(file), s.Marks()); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
		return nil
	})
}

// TestInPlaceCrash interrupts conversions at every write: each state that a crash may leave is the source, or one
// that is rolled back to it bit by bit, and resumed, or the finished image. Then it interrupts the resumes and
// rollbacks of some of the states between, in the same way.
func TestInPlaceCrash(t *testing.T) {
	o, again := crashtest.Options{PerPoint: 10}, 3
	if testing.Short() {
		o, again = crashtest.Options{PerPoint: 4}, 1
	}
	rounds := 1
	if n, err := strconv.Atoi(os.Getenv(inPlaceStatesEnv)); err == nil {
		o, again = crashtest.Options{PerPoint: 80}, 12
		rounds = max(1, n/5000)
	}
	var total, later crashtest.Stats
	sources, halves, images := 0, 0, 0
	for round := range rounds {
		for i, sc := range inPlaceScenarios() {
			l, err := newInPlaceLook(&sc)
			if err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(uint64(round), uint64(i)))
			var between []*crashtest.Disk
			convert := func(s Storage) error { return sc.convert(s, inPlaceSyncNone) }
			stats, err := l.crash(sc.disk(), rng, o, inPlaceConverted{}, convert, func(d *crashtest.Disk) {
				if size, _ := d.Size(); size > int64(len(sc.source)) && size != l.end {
					between = append(between, d)
				}
			})
			total.Add(stats)
			if err != nil {
				t.Errorf("%s, round %d: %v", sc.name, round, err)
			}
			for range again {
				if len(between) == 0 {
					t.Fatalf("%s: no state between", sc.name)
				}
				d := between[rng.IntN(len(between))]
				resume := func(s Storage) error { _, err := sc.resume(s); return err }
				stats, err := l.crash(d, rng, o, inPlaceConverted{}, resume, nil)
				later.Add(stats)
				if err != nil {
					t.Errorf("%s, round %d, resume: %v", sc.name, round, err)
				}
				if sc.finished(d) {
					continue
				}
				rollback := func(s Storage) error {
					_, err := RollbackInPlace(context.Background(), s, int64(len(sc.source)))
					return err
				}
				stats, err = l.crash(d, rng, o, inPlaceRolledBack{}, rollback, nil)
				later.Add(stats)
				if err != nil {
					t.Errorf("%s, round %d, roll back: %v", sc.name, round, err)
				}
			}
			sources, halves, images = sources+l.sources, halves+l.halves, images+l.images
		}
	}
	t.Logf("crash states of conversions in place: %v; of resumes and rollbacks: %v", total, later)
	t.Logf("%d were the source, %d between, %d the image", sources, halves, images)
	if sources == 0 || halves == 0 || images == 0 {
		t.Error("a kind of state is missing")
	}
}

// TestInPlaceCrashBroken leaves out one sync of a conversion at a time, and wants the crash states to show it. The
// same conversions with the sync show nothing.
func TestInPlaceCrashBroken(t *testing.T) {
	for _, tt := range []struct {
		name     string
		skip     inPlaceSync
		scenario string
	}{
		{"tables before the footer", inPlaceSyncFooter, "raw"},
		{"trailer before the footer", inPlaceSyncFooter, "trailer"},
		{"header before the tables", inPlaceSyncTables, "raw full"},
		{"header before the copy", inPlaceSyncTables, "shuffled"},
		{"cut before the header", inPlaceSyncSwitch, "raw of small clusters"},
		{"zeros before the header", inPlaceSyncSwitch, "raw"},
		{"cut before the zeros", inPlaceSyncRest, "raw"},
		{"return before the cut", inPlaceSyncEnd, "raw"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sc := inPlaceScenarioNamed(t, tt.scenario)
			l, err := newInPlaceLook(sc)
			if err != nil {
				t.Fatal(err)
			}
			run := func(skip inPlaceSync) error {
				rng := rand.New(rand.NewPCG(3, 3))
				do := func(s Storage) error { return sc.convert(s, skip) }
				_, err := l.crash(sc.disk(), rng, crashtest.Options{PerPoint: 32}, inPlaceConverted{}, do, nil)
				return err
			}
			if err := run(inPlaceSyncNone); err != nil {
				t.Errorf("with the sync: %v", err)
			}
			if err := run(tt.skip); err == nil {
				t.Error("no crash state shows it")
			} else {
				t.Logf("%.300v", err)
			}
		})
	}
}
