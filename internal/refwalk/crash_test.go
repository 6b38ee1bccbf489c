package refwalk

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// TestCrashOrders maps one cluster after another in a recorded image, by hand: in the right order no
// crash leaves more than leaks, and without each of its syncs the walk or the content shows which
// invariant was broken.
func TestCrashOrders(t *testing.T) {
	const cs = 0x10000
	tests := []struct {
		name         string
		noDataSync   bool // the mapping may come before data and refcount
		mapFirst     bool // the mapping is even written before them, and synced
		noTableSync  bool // a new L2 table may come after the L1 entry
		want         string
		wantContents bool // content that nobody wrote must show
	}{
		{name: "right"},
		{name: "mapping before refcount", noDataSync: true, want: "I1:", wantContents: true},
		{name: "mapping first", mapFirst: true, want: "I1:", wantContents: true},
		{name: "L1 before its L2", noTableSync: true, want: "I3:"},
	}
	for _, tt := range tests {
		for _, device := range []bool{false, true} {
			t.Run(tt.name+map[bool]string{true: "/device"}[device], func(t *testing.T) {
				rec := crashtest.NewRecorder()
				img := literal()
				// One more L1 entry, for a table that the test makes.
				binary.BigEndian.PutUint32(img[36:], 2)
				f := rec.Regular("img", img)
				if device {
					f = rec.Device("img", img, 64*cs)
				}
				write := func(p []byte, off int) {
					t.Helper()
					if _, err := f.WriteAt(p, int64(off)); err != nil {
						t.Fatal(err)
					}
				}
				sync := func(skip bool) {
					t.Helper()
					if skip {
						return
					}
					if err := f.Sync(); err != nil {
						t.Fatal(err)
					}
					rec.Mark("sync")
				}
				entry := func(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }
				one := []byte{0, 1}
				const table = 12
				// A new L2 table at cluster 12, hung under L1 entry 1.
				write(one, 2*cs+2*table)
				write(make([]byte, cs), table*cs)
				sync(tt.noTableSync)
				write(entry(flagCopied|table*cs), 3*cs+8)
				sync(false)
				for i := range 4 {
					c := table + 1 + i
					if tt.mapFirst {
						write(entry(flagCopied|uint64(c*cs)), table*cs+8*i)
						sync(false)
					}
					write(bytes.Repeat([]byte{0xd0}, cs), c*cs)
					write(one, 2*cs+2*c)
					sync(tt.noDataSync)
					write(entry(flagCopied|uint64(c*cs)), table*cs+8*i)
				}
				sync(false)

				found := map[string]bool{}
				foreign := false
				const seed = 7
				stats, err := rec.States(rand.New(rand.NewPCG(seed, 1)), crashtest.Options{PerPoint: 60}, func(s *crashtest.State) error {
					d := s.Disk(f)
					size, err := d.Size()
					if err != nil {
						return err
					}
					rep, err := Walk(d, size)
					if err != nil {
						return err
					}
					for _, finding := range rep.Findings {
						name, _, _ := strings.Cut(finding, " ")
						found[name] = true
						if tt.want == "" && rep.Corruptions() > 0 {
							t.Errorf("seed %d: %s\n%s", seed, finding, s)
						}
					}
					r, err := NewReader(Source{Image: d, Size: size})
					if err != nil {
						return err
					}
					p := make([]byte, 4*cs)
					r.size = 1 << 40 // the new table is behind the end of the disk
					if _, err := r.ReadAt(p, cs/8*cs); err != nil {
						return nil // the walk has found why
					}
					for i := 0; i < len(p); i += 512 {
						// A cluster is mapped with all its data or not at all.
						if p[i] != 0xd0 && p[i] != 0 || p[i] != p[i&^(cs-1)] {
							foreign = true
						}
					}
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				if stats.States < 40 {
					t.Errorf("only %s", stats)
				}
				if tt.want != "" && !found[tt.want] {
					t.Errorf("%s: want %s, found %v", stats, tt.want, found)
				}
				if foreign != tt.wantContents {
					t.Errorf("%s: content that nobody wrote: %t, want %t", stats, foreign, tt.wantContents)
				}
			})
		}
	}
}
