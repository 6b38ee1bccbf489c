package crashtest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// fill returns n bytes of v.
func fill(v byte, n int) []byte { return bytes.Repeat([]byte{v}, n) }

// must fails the test on an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// writeAt writes n bytes of v at off.
func writeAt(t testing.TB, f *File, v byte, off int64, n int) {
	t.Helper()
	_, err := f.WriteAt(fill(v, n), off)
	must(t, err)
}

// brute is the crash model in its plainest form: every subset of every part of every operation that is
// not durable, applied to plain bytes. It returns the contents, all files joined, that a crash at point
// k may leave.
func brute(start [][]byte, names []string, log []Entry, k int, block int64) map[string]bool {
	type part struct {
		e          Entry
		start, end int64
		free       int // its bit, or -1: durable
	}
	var parts []part
	bit := 0
	for _, e := range log {
		if e.Begin >= k || e.Kind == Sync {
			continue
		}
		durable := false
		for _, s := range log {
			if s.Kind == Sync && s.File == e.File && s.Return >= 0 && s.Return < k && e.Return >= 0 && e.Return < s.Begin {
				durable = true
			}
		}
		unit := block
		if e.Kind == Write {
			unit = 512
		}
		if e.Kind == Truncate {
			unit = 1 << 40
		}
		for at := e.Off; at < e.Off+max(e.N, 1); {
			end := min((at/unit+1)*unit, e.Off+e.N)
			if e.N == 0 && e.Kind != Truncate {
				break
			}
			p := part{e, at, end, -1}
			if !durable {
				p.free = bit
				bit++
			}
			parts = append(parts, p)
			if e.Kind == Truncate {
				break
			}
			at = end
		}
	}
	all := make(map[string]bool)
	for set := 0; set < 1<<bit; set++ {
		var key string
		for i, name := range names {
			b := bytes.Clone(start[i])
			device := name == "device"
			grow := func(n int64) {
				if !device && n > int64(len(b)) {
					b = append(b, make([]byte, n-int64(len(b)))...)
				}
			}
			for _, p := range parts {
				if p.e.File != name || p.free >= 0 && set>>p.free&1 == 0 {
					continue
				}
				switch p.e.Kind {
				case Write:
					grow(p.end)
					copy(b[p.start:], p.e.Data[p.start-p.e.Off:p.end-p.e.Off])
				case Zero:
					grow(p.end)
					clear(b[p.start:p.end])
				case Punch:
					if p.start < int64(len(b)) {
						clear(b[p.start:min(p.end, int64(len(b)))])
					}
				case Allocate:
					grow(p.end)
				case Truncate:
					if p.e.Off < int64(len(b)) {
						b = b[:p.e.Off]
					}
					grow(p.e.Off)
				}
			}
			key += fmt.Sprintf("%s:%d:%s|", name, len(b), b)
		}
		all[key] = true
	}
	return all
}

// script is a hand-written record.
type script struct {
	name string
	run  func(t *testing.T, rec *Recorder) []*File
}

// scripts are records small enough that every state of each is known.
var scripts = []script{
	{"two writes", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Regular("a", fill(1, 1024))
		writeAt(t, f, 2, 0, 512)
		writeAt(t, f, 3, 512, 512)
		return []*File{f}
	}},
	{"torn and unaligned", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Regular("a", fill(1, 3000))
		writeAt(t, f, 2, 300, 1300)
		writeAt(t, f, 3, 1000, 100)
		return []*File{f}
	}},
	{"growth by the furthest survivor", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Regular("a", fill(1, 100))
		writeAt(t, f, 2, 700, 1000)
		must(t, f.Allocate(1024, 1024))
		must(t, f.WriteZeroes(4096, 600))
		return []*File{f}
	}},
	{"truncate, then write", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Regular("a", fill(1, 6000))
		must(t, f.Truncate(700))
		writeAt(t, f, 2, 2000, 200)
		must(t, f.Truncate(9000))
		must(t, f.PunchHole(100, 500))
		must(t, f.PunchHole(8500, 900))
		return []*File{f}
	}},
	{"sync", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Regular("a", nil)
		writeAt(t, f, 1, 0, 512)
		rec.Mark("wrote 1")
		writeAt(t, f, 2, 512, 512)
		must(t, f.Sync())
		rec.Mark("synced")
		writeAt(t, f, 3, 0, 512)
		must(t, f.PunchHole(0, 1024))
		must(t, f.Sync())
		rec.Mark("synced again")
		writeAt(t, f, 4, 0, 512)
		return []*File{f}
	}},
	{"a sync is of one file", func(t *testing.T, rec *Recorder) []*File {
		f, g := rec.Regular("a", fill(9, 512)), rec.Regular("b", fill(8, 512))
		writeAt(t, f, 1, 0, 512)
		writeAt(t, g, 2, 0, 512)
		must(t, g.Sync())
		rec.Mark("synced b")
		writeAt(t, f, 3, 0, 512)
		must(t, f.Sync())
		rec.Mark("synced a")
		writeAt(t, g, 4, 100, 512)
		return []*File{f, g}
	}},
	{"concurrent", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Regular("a", fill(9, 1024))
		a, err := f.begin(Write, 0, 1024, fill(1, 1024), nil)
		must(t, err)
		b, err := f.begin(Write, 512, 512, fill(2, 512), nil)
		must(t, err)
		f.finish(b)
		s, err := f.begin(Sync, 0, 0, nil, nil) // covers b alone, although a began before it
		must(t, err)
		f.finish(a)
		c, err := f.begin(Write, 0, 512, fill(3, 512), nil)
		must(t, err)
		f.finish(c)
		rec.Mark("before the sync returns")
		f.finish(s)
		rec.Mark("after")
		writeAt(t, f, 4, 700, 100)
		must(t, f.Sync())
		rec.Mark("all")
		return []*File{f}
	}},
	{"a sync that does not return", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Regular("a", fill(9, 512))
		writeAt(t, f, 1, 0, 512)
		_, err := f.begin(Sync, 0, 0, nil, nil)
		must(t, err)
		rec.Mark("no promise")
		writeAt(t, f, 2, 0, 256)
		return []*File{f}
	}},
	{"two syncs, the later call returns first", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Regular("a", fill(9, 512))
		s1, err := f.begin(Sync, 0, 0, nil, nil)
		must(t, err)
		writeAt(t, f, 1, 0, 512)
		must(t, f.Sync())
		f.finish(s1)
		rec.Mark("both")
		return []*File{f}
	}},
	{"device", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Device("device", fill(7, 600), 4096)
		writeAt(t, f, 1, 500, 600)
		must(t, f.WriteZeroes(2048, 1024))
		must(t, f.PunchHole(3584, 512))
		must(t, f.Sync())
		rec.Mark("synced")
		writeAt(t, f, 2, 3584, 512)
		return []*File{f}
	}},
	{"punch of blocks", func(t *testing.T, rec *Recorder) []*File {
		f := rec.Regular("a", fill(5, 12000))
		must(t, f.PunchHole(1000, 9000))
		writeAt(t, f, 6, 4096, 512)
		return []*File{f}
	}},
}

// joined returns the contents of all files of a state in the form of brute.
func joined(s *State, files []*File) string {
	var key string
	for _, f := range files {
		b := s.Disk(f).Bytes()
		key += fmt.Sprintf("%s:%d:%s|", f.Name(), len(b), b)
	}
	return key
}

// TestStatesExhaustive compares all states of small records with the plain model: between every two
// marks exactly the same contents, none twice.
func TestStatesExhaustive(t *testing.T) {
	for _, sc := range scripts {
		t.Run(sc.name, func(t *testing.T) {
			block := int64(512)
			if sc.name == "punch of blocks" {
				block = 4096
			}
			rec := NewRecorder()
			files := sc.run(t, rec)
			var start [][]byte
			var names []string
			for _, f := range files {
				start, names = append(start, f.base.Bytes()), append(names, f.Name())
			}
			want := make(map[string]int)
			marks := 0
			for k := 0; k <= rec.Len(); k++ {
				if k > 0 && rec.events[k-1].op == nil {
					marks++
				}
				for c := range brute(start, names, rec.Log(), k, block) {
					want[fmt.Sprintf("after %d marks %x", marks, c)]++
				}
			}
			for k := range want {
				want[k] = 1
			}
			got := make(map[string]int)
			stats, err := rec.States(rand.New(rand.NewPCG(1, 2)), Options{PerPoint: 1 << 16, Block: block}, func(s *State) error {
				got[fmt.Sprintf("after %d marks %x", len(s.Marks()), joined(s, files))]++
				if s.Index != len(got)-1 {
					t.Errorf("state %d has index %d", len(got)-1, s.Index)
				}
				return nil
			})
			must(t, err)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("states (-want +got):\n%.3000s", diff)
			}
			if stats.States != len(want) {
				t.Errorf("counted %d states of %d", stats.States, len(want))
			}
		})
	}
}

// randomRecord makes a record of a regular file, a device and many operations, synced about every so
// many.
func randomRecord(t testing.TB, rng *rand.Rand, ops, size int, syncs float64) (*Recorder, []*File) {
	rec := NewRecorder()
	files := []*File{rec.Regular("a", fill(1, size/2)), rec.Device("device", fill(2, size/4), int64(size))}
	for i := range ops {
		f := files[rng.IntN(2)]
		if rng.Float64() < syncs {
			must(t, f.Sync())
			rec.Mark(i)
			continue
		}
		n := []int{8, 512, 4096, 700}[rng.IntN(4)]
		off := rng.IntN((size - n) / 512)
		if rng.IntN(2) == 0 {
			off *= 512
		}
		switch rng.IntN(10) {
		case 0:
			must(t, f.PunchHole(int64(off), int64(n)))
		case 1:
			must(t, f.WriteZeroes(int64(off), int64(n)))
		case 2:
			if !f.FixedSize() {
				must(t, f.Truncate(int64(rng.IntN(size))))
				break
			}
			fallthrough
		default:
			writeAt(t, f, byte(i), int64(off), n)
		}
	}
	return rec, files
}

// TestStatesSampled makes states of records too large for all of them: each must be one that the plain
// model has, no two may be equal between two marks, half must be reordered, and the same seed must make
// the same ones.
func TestStatesSampled(t *testing.T) {
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 1))
		// Few parts at a time, so that the plain model can make all: small writes and many syncs.
		rec := NewRecorder()
		files := []*File{rec.Regular("a", fill(1, 5000)), rec.Device("device", fill(2, 1000), 8192)}
		for i := range 30 {
			f := files[rng.IntN(2)]
			if i%6 == 5 {
				must(t, files[0].Sync())
				must(t, files[1].Sync())
				rec.Mark(i)
				continue
			}
			writeAt(t, f, byte(10+i), int64(rng.IntN(12)*512), []int{512, 1024, 100}[rng.IntN(3)])
		}
		start := [][]byte{files[0].base.Bytes(), files[1].base.Bytes()}
		names := []string{"a", "device"}
		opts := Options{PerPoint: 20}
		type key struct {
			marks   int
			content string
		}
		seen := make(map[key]bool)
		legal := make(map[int]map[string]bool)
		var order []string
		stats, err := rec.States(rand.New(rand.NewPCG(seed, 2)), opts, func(s *State) error {
			k := key{len(s.Marks()), joined(s, files)}
			if seen[k] {
				t.Errorf("seed %d: state %d again", seed, s.Index)
			}
			seen[k] = true
			if legal[s.Point] == nil {
				legal[s.Point] = brute(start, names, rec.Log(), s.Point, 512)
			}
			if !legal[s.Point][k.content] {
				t.Errorf("seed %d: the model has no such state: %s", seed, s)
			}
			order = append(order, k.content)
			return nil
		})
		must(t, err)
		if 2*stats.Reordered < stats.States {
			t.Errorf("seed %d: %s: less than half reordered", seed, stats)
		}
		if stats.Torn == 0 || stats.States < 100 || stats.Distinct > stats.States {
			t.Errorf("seed %d: %s", seed, stats)
		}
		i := 0
		again, err := rec.States(rand.New(rand.NewPCG(seed, 2)), opts, func(s *State) error {
			if i >= len(order) || joined(s, files) != order[i] {
				return fmt.Errorf("seed %d: state %d is another one the second time", seed, i)
			}
			i++
			return nil
		})
		must(t, err)
		if diff := cmp.Diff(stats, again); diff != "" {
			t.Errorf("seed %d: statistics of the second time (-want +got):\n%s", seed, diff)
		}
	}
}

// TestStatesReordered looks at the flag on states whose answer is plain.
func TestStatesReordered(t *testing.T) {
	tests := []struct {
		name string
		run  func(t *testing.T, f *File)
		want map[string]bool // content of the two sectors, to flag
	}{
		{"apart", func(t *testing.T, f *File) {
			writeAt(t, f, 'b', 0, 512)
			writeAt(t, f, 'c', 512, 512)
		}, map[string]bool{"aa": false, "ba": false, "ac": true, "bc": false}},
		{"hidden", func(t *testing.T, f *File) {
			writeAt(t, f, 'b', 0, 512)
			writeAt(t, f, 'c', 0, 512)
		}, map[string]bool{"aa": false, "ba": false, "ca": false}},
		{"partly hidden", func(t *testing.T, f *File) {
			writeAt(t, f, 'b', 0, 1024)
			writeAt(t, f, 'c', 0, 512)
		}, map[string]bool{"aa": false, "ba": false, "ab": false, "bb": false, "ca": true, "cb": false}},
		{"nothing to lose", func(t *testing.T, f *File) {
			writeAt(t, f, 'a', 0, 512)
			writeAt(t, f, 'c', 512, 512)
		}, map[string]bool{"aa": false, "ac": false}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rec := NewRecorder()
			f := rec.Regular("a", fill('a', 1024))
			tt.run(t, f)
			got := make(map[string]bool)
			_, err := rec.States(rand.New(rand.NewPCG(1, 1)), Options{PerPoint: 64}, func(s *State) error {
				b := s.Disk(f).Bytes()
				k := string([]byte{b[0], b[512]})
				got[k] = s.Reordered
				return nil
			})
			must(t, err)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("reordered (-want +got):\n%s", diff)
			}
		})
	}
}

// TestStatesOptions looks at what the options leave out.
func TestStatesOptions(t *testing.T) {
	rec, files := randomRecord(t, rand.New(rand.NewPCG(5, 5)), 200, 1<<14, 0.05)
	count := func(o Options, fn func(*State)) Stats {
		stats, err := rec.States(rand.New(rand.NewPCG(1, 1)), o, func(s *State) error {
			if fn != nil {
				fn(s)
			}
			return nil
		})
		must(t, err)
		return stats
	}
	all := count(Options{}, nil)
	if got := count(Options{Max: 17}, nil); got.States != 17 {
		t.Errorf("Max 17: %s", got)
	}
	from := rec.Len() / 2
	some := count(Options{From: from}, func(s *State) {
		if s.Point < from {
			t.Errorf("a state at %d, before %d", s.Point, from)
		}
	})
	if some.States == 0 || some.States >= all.States {
		t.Errorf("From the middle: %s, of %s", some, all)
	}
	if got := count(Options{Every: 10}, nil); got.Points < all.Points/10-1 || got.Points > all.Points/10+2 {
		t.Errorf("Every 10: %s, of %s", got, all)
	}
	// Without tightening marks no content comes twice.
	seen := make(map[string]bool)
	loose := count(Options{Tightens: func(any) bool { return false }}, func(s *State) {
		k := joined(s, files)
		if seen[k] {
			t.Errorf("state %d again", s.Index)
		}
		seen[k] = true
	})
	if loose.Distinct != loose.States {
		t.Errorf("no tightening marks: %s", loose)
	}
	stop := fmt.Errorf("stop")
	if _, err := rec.States(rand.New(rand.NewPCG(1, 1)), Options{}, func(*State) error { return stop }); err != stop {
		t.Errorf("error of the function: got %v", err)
	}
}

// TestStateDisk writes to a state's disk, which must change no other.
func TestStateDisk(t *testing.T) {
	rec := NewRecorder()
	f := rec.Regular("a", fill(1, 9000))
	writeAt(t, f, 2, 0, 5000)
	_, err := rec.States(rand.New(rand.NewPCG(1, 1)), Options{PerPoint: 4}, func(s *State) error {
		d := s.Disk(f)
		want := d.Bytes()
		if _, err := d.WriteAt(fill(9, 20000), 0); err != nil {
			return err
		}
		if got := s.Disk(f).Bytes(); !bytes.Equal(got, want) {
			t.Errorf("state %d changed with its copy", s.Index)
		}
		return nil
	})
	must(t, err)
	if got := f.Disk().Bytes(); !bytes.Equal(got[:5000], fill(2, 5000)) || !bytes.Equal(got[5000:], fill(1, 4000)) {
		t.Errorf("the file changed with the states")
	}
}

// TestRebase forgets the record and makes durable what is there.
func TestRebase(t *testing.T) {
	rec := NewRecorder()
	f := rec.Regular("a", nil)
	writeAt(t, f, 2, 0, 512)
	rec.Rebase()
	writeAt(t, f, 3, 512, 512)
	got := make(map[string]bool)
	_, err := rec.States(rand.New(rand.NewPCG(1, 1)), Options{}, func(s *State) error {
		got[string(s.Disk(f).Bytes())] = true
		return nil
	})
	must(t, err)
	want := map[string]bool{string(fill(2, 512)): true, string(append(fill(2, 512), fill(3, 512)...)): true}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
	if got := rec.Log(); len(got) != 1 {
		t.Errorf("record after Rebase: %v", got)
	}
}

// BenchmarkStates makes states of a 2 MiB image with some 40 operations between two syncs; one
// iteration is one state.
func BenchmarkStates(b *testing.B) {
	rec, files := randomRecord(b, rand.New(rand.NewPCG(5, 5)), 4000, 2<<20, 0.05)
	rng := rand.New(rand.NewPCG(1, 1))
	var stats Stats
	for made := 0; made < b.N; {
		s, err := rec.States(rng, Options{Max: b.N - made, PerPoint: 64}, func(s *State) error {
			_, err := s.Disk(files[0]).Size()
			return err
		})
		must(b, err)
		made += s.States
		stats.Add(s)
	}
	b.ReportMetric(float64(stats.Reordered)/float64(stats.States), "reordered/state")
}
