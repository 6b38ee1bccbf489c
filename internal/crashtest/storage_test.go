package crashtest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestDiskModel runs random operations on disks and their copies beside plain bytes.
func TestDiskModel(t *testing.T) {
	for _, device := range []bool{false, true} {
		for seed := range uint64(20) {
			rng := rand.New(rand.NewPCG(seed, 3))
			const size = 40960
			d := NewDisk(fill(3, 5000))
			if device {
				d = NewDevice(fill(3, 5000), size)
			}
			model := d.Bytes()
			type pair struct {
				d *Disk
				b []byte
			}
			var copies []pair
			for step := range 200 {
				off := int64(rng.IntN(size))
				n := int64(rng.IntN(int(size - off)))
				grow := func(end int64) {
					if end > int64(len(model)) {
						model = append(model, make([]byte, end-int64(len(model)))...)
					}
				}
				switch rng.IntN(6) {
				case 0:
					p := fill(byte(rng.IntN(3)), int(n))
					_, err := d.WriteAt(p, off)
					must(t, err)
					if n > 0 {
						grow(off + n)
					}
					copy(model[min(off, int64(len(model))):], p)
				case 1:
					must(t, d.PunchHole(off, n))
					if off < int64(len(model)) {
						clear(model[off:min(off+n, int64(len(model)))])
					}
				case 2:
					must(t, d.WriteZeroes(off, n))
					if n > 0 {
						grow(off + n)
						clear(model[off : off+n])
					}
				case 3:
					err := d.Truncate(off)
					if device {
						if !errors.Is(err, errors.ErrUnsupported) {
							t.Fatalf("truncate a device: %v", err)
						}
						break
					}
					must(t, err)
					model = model[:min(off, int64(len(model)))]
					grow(off)
				case 4:
					copies = append(copies, pair{d.Clone(), bytes.Clone(model)})
				case 5:
					if len(copies) > 0 {
						i := rng.IntN(len(copies))
						d, model, copies[i] = copies[i].d, copies[i].b, pair{d, model}
					}
				}
				if got := d.Bytes(); !bytes.Equal(got, model) {
					t.Fatalf("seed %d, step %d: content differs", seed, step)
				}
				// A disk made at once of the same content has the same hash. On a device, garbage that was
				// written and garbage that was not may differ: there a copy stands in for it.
				same := NewDisk(model)
				if device {
					same = d.Clone()
				}
				if same.contentHash() != d.contentHash() {
					t.Fatalf("seed %d, step %d: equal contents, different hashes", seed, step)
				}
				if len(model) > 0 {
					same.write(0, []byte{model[0] + 1})
					if same.contentHash() == d.contentHash() {
						t.Fatalf("seed %d, step %d: different contents, equal hashes", seed, step)
					}
				}
			}
			for i, c := range copies {
				if !bytes.Equal(c.d.Bytes(), c.b) {
					t.Errorf("seed %d: copy %d changed", seed, i)
				}
			}
		}
	}
}

// TestDiskEdges looks at what happens at the end of a disk.
func TestDiskEdges(t *testing.T) {
	d, dev := NewDisk(fill(1, 10)), NewDevice(nil, 5000)
	p := make([]byte, 20)
	if n, err := d.ReadAt(p, 4); n != 6 || err != io.EOF {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	if n, err := d.ReadAt(p, 10); n != 0 || err != io.EOF {
		t.Errorf("read at the end: %d, %v", n, err)
	}
	if _, err := d.WriteAt(p, -1); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("write before the beginning: %v", err)
	}
	if n, err := dev.Size(); n != 8192 || err != nil {
		t.Errorf("size of a device of 5000 bytes: %d, %v", n, err)
	}
	if n, err := dev.WriteAt(p, 8190); n != 0 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write over the end of a device: %d, %v", n, err)
	}
	if b := dev.Bytes(); bytes.IndexByte(b, 0) >= 0 {
		t.Errorf("a device has a zero where nothing was written")
	}
	must(t, d.WriteZeroes(20000, 10))
	_, err := d.WriteAt(p, 9000)
	must(t, err)
	var runs [][2]int64
	for off := int64(0); ; {
		start, end, err := d.NextData(off)
		if err == io.EOF {
			break
		}
		must(t, err)
		runs, off = append(runs, [2]int64{start, end}), end
	}
	if diff := cmp.Diff([][2]int64{{0, 4096}, {8192, 12288}}, runs); diff != "" {
		t.Errorf("data (-want +got):\n%s", diff)
	}
	for name, disk := range map[string]*Disk{"regular": d, "device": dev} {
		path := filepath.Join(t.TempDir(), name)
		must(t, disk.WriteFile(path))
		got, err := os.ReadFile(path)
		must(t, err)
		if !bytes.Equal(got, disk.Bytes()) {
			t.Errorf("WriteFile of a %s disk wrote something else", name)
		}
	}
}

// TestRecorderConcurrent uses one record from several goroutines: every operation must be in it, its
// return after its call, and the live content must be that of the calls in order.
func TestRecorderConcurrent(t *testing.T) {
	rec := NewRecorder()
	f := rec.Regular("a", nil)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 50 {
				if _, err := f.WriteAt(fill(byte(g), 700), int64(i*100)); err != nil {
					t.Error(err)
				}
				if i%10 == 0 {
					if err := f.Sync(); err != nil {
						t.Error(err)
					}
				}
				rec.Mark(g)
			}
		}()
	}
	wg.Wait()
	log := rec.Log()
	if len(log) != 8*55 || rec.Len() != 2*len(log)+400 {
		t.Fatalf("%d operations, %d positions", len(log), rec.Len())
	}
	replay := NewDisk(nil)
	for i, e := range log {
		if e.Return <= e.Begin || i > 0 && e.Begin <= log[i-1].Begin {
			t.Errorf("operation %d is called at %d and returns at %d", i, e.Begin, e.Return)
		}
		if e.Kind == Write {
			replay.write(e.Off, e.Data)
		}
	}
	if !bytes.Equal(replay.Bytes(), f.Disk().Bytes()) {
		t.Errorf("the content is not that of the record")
	}
	if stats, err := rec.States(rand.New(rand.NewPCG(1, 1)), Options{Every: 20}, func(*State) error { return nil }); err != nil ||
		stats.States == 0 {
		t.Errorf("states: %s, %v", stats, err)
	}
}

// TestFaults fails operations in every way and looks at the error and at what was done.
func TestFaults(t *testing.T) {
	work := func(s Storage) (errs []bool) {
		p := make([]byte, 2048)
		_, err := s.WriteAt(fill(1, 2048), 0)
		errs = append(errs, err != nil)
		_, err = s.ReadAt(p, 0)
		errs = append(errs, err != nil && err != io.EOF)
		errs = append(errs, s.PunchHole(0, 512) != nil, s.WriteZeroes(4096, 512) != nil, s.Allocate(0, 8192) != nil)
		errs = append(errs, s.Sync() != nil, s.Truncate(6000) != nil)
		_, err = s.Size()
		errs = append(errs, err != nil)
		_, _, err = s.NextData(0)
		errs = append(errs, err != nil && err != io.EOF)
		return errs
	}
	const all = 9
	for at := range all + 1 {
		for _, forever := range []bool{false, true} {
			var f Faults
			s := f.Wrap("a", NewDisk(nil))
			f.Set(Fault{At: at, Forever: forever, Err: syscall.EIO})
			want := make([]bool, all)
			n := 0
			for i := range want {
				want[i] = i == at || forever && i > at
				if want[i] {
					n++
				}
			}
			if diff := cmp.Diff(want, work(s)); diff != "" {
				t.Errorf("at %d, forever %t (-want +got):\n%s", at, forever, diff)
			}
			if f.Fired() != n || len(f.Ops()) != all {
				t.Errorf("at %d, forever %t: fired %d of %d, %d operations", at, forever, f.Fired(), n, len(f.Ops()))
			}
			f.Heal()
			if diff := cmp.Diff(make([]bool, all), work(s)); diff != "" {
				t.Errorf("healed (-want +got):\n%s", diff)
			}
		}
	}
}

// TestFaultKinds looks at one write that fails entirely, by half, and after the fact.
func TestFaultKinds(t *testing.T) {
	tests := []struct {
		name  string
		fault Fault
		n     int
		want  []byte
	}{
		{"nothing", Fault{Err: syscall.ENOSPC}, 0, nil},
		{"short", Fault{Err: syscall.ENOSPC, Short: true}, 512, fill(1, 512)},
		{"after", Fault{Err: syscall.EIO, After: true}, 1400, fill(1, 1400)},
		{"matched", Fault{Err: syscall.EIO, Match: func(o Op) bool { return o.Kind == Write && o.File == "a" && o.N == 1400 }}, 0, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var f Faults
			d := NewDisk(nil)
			s := f.Wrap("a", d)
			f.Set(tt.fault)
			n, err := s.WriteAt(fill(1, 1400), 0)
			var inj *InjectedError
			if n != tt.n || !errors.Is(err, ErrInjected) || !errors.Is(err, tt.fault.Err) || !errors.As(err, &inj) {
				t.Fatalf("wrote %d, want %d; %v", n, tt.n, err)
			}
			if diff := cmp.Diff(Op{File: "a", Kind: Write, N: 1400}, inj.Op); diff != "" {
				t.Errorf("operation (-want +got):\n%s", diff)
			}
			if !bytes.Equal(d.Bytes(), tt.want) {
				t.Errorf("content of %d bytes, want %d", len(d.Bytes()), len(tt.want))
			}
			if tt.name == "matched" {
				must(t, s.Sync())
			}
		})
	}
	// A Sync that fails makes nothing durable.
	var f Faults
	rec := NewRecorder()
	file := rec.Regular("a", nil)
	s := f.Wrap("a", file)
	_, err := s.WriteAt(fill(1, 512), 0)
	must(t, err)
	f.Set(Fault{Err: syscall.EIO, Match: func(o Op) bool { return o.Kind == Sync }})
	if err := s.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	rec.Mark("sync failed")
	lost := false
	_, err = rec.States(rand.New(rand.NewPCG(1, 1)), Options{}, func(st *State) error {
		n, err := st.Disk(file).Size()
		lost = lost || n == 0 && len(st.Marks()) == 1
		return err
	})
	must(t, err)
	if !lost {
		t.Errorf("a failed Sync made the write durable")
	}
}

// TestBlocker holds one write while another and a read go on.
func TestBlocker(t *testing.T) {
	var b Blocker
	d := NewDisk(fill(0, 4096))
	s := b.Wrap("a", d)
	g := b.Block(func(o Op) bool { return o.Kind == Write && o.Off == 512 })
	done := make(chan error)
	go func() {
		_, err := s.WriteAt(fill(1, 512), 512)
		done <- err
	}()
	<-g.Entered()
	_, err := s.WriteAt(fill(2, 512), 1024)
	must(t, err)
	_, err = s.WriteAt(fill(3, 256), 512) // the gate has its operation: this one passes
	must(t, err)
	p := make([]byte, 2048)
	_, err = s.ReadAt(p, 0)
	must(t, err)
	if p[512] != 3 || p[800] != 0 || p[1024] != 2 {
		t.Errorf("while held: %d %d %d", p[512], p[800], p[1024])
	}
	g.Release()
	g.Release()
	must(t, <-done)
	_, err = s.ReadAt(p, 0)
	must(t, err)
	if p[512] != 1 {
		t.Errorf("released: %d", p[512])
	}
	b.Block(func(Op) bool { return true }).Release()
	must(t, s.Sync())
}

// TestOpString shows operations as the golden texts will have them.
func TestOpString(t *testing.T) {
	for want, op := range map[string]Op{
		"img write 0x200+0x1000": {"img", Write, 512, 4096},
		"img punch 0x0+0x200":    {"img", Punch, 0, 512},
		"data truncate 0x400":    {"data", Truncate, 1024, 0},
		"data sync":              {"data", Sync, 0, 0},
	} {
		if got := op.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
