package qcow2

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/google/go-cmp/cmp"
)

// updateGolden rewrites the golden texts instead of comparing with them.
var updateGolden = flag.Bool("update", false, "rewrite testdata/order")

// orderStorage is a recorded file as a Storage.
type orderStorage struct{ *crashtest.File }

// Lock grants every lock.
func (orderStorage) Lock(LockRole) error { return nil }

// whatIs names the host range at off of the image file by the use that img has for it.
func whatIs(img *Image, off uint64) string {
	m, a := img.m, img.m.alloc
	in := func(start, n uint64) bool { return start <= off && off < start+n }
	if off < m.clusterSize {
		return "header"
	}
	if in(m.l1Off, 8*m.l1.n) {
		return "L1"
	}
	if in(a.tableOff, a.tableClusters<<m.clusterBits) {
		return "refcount table"
	}
	for i := range a.table.n {
		if b := a.table.load(i); b != 0 && in(b, m.clusterSize) {
			return fmt.Sprintf("refcount block %d", i)
		}
	}
	for i := range m.l1.n {
		if t := m.l1.load(i) & offsetMask; t != 0 && in(t, m.clusterSize) {
			return fmt.Sprintf("L2 table %d", i)
		}
	}
	return "data"
}

// orderOf returns the host operations since entry from, a line each.
func orderOf(img *Image, log []crashtest.Entry) string {
	var b strings.Builder
	for _, e := range log {
		fmt.Fprint(&b, "  ", e.Op)
		if e.File == "image" && e.Kind != crashtest.Sync && e.Kind != crashtest.Truncate {
			fmt.Fprint(&b, "  ", whatIs(img, uint64(e.Off)))
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// TestOrder compares the host operations of each kind of change with a golden text: the order of writes and
// syncs is reviewed there as code is. `go test -run TestOrder -update .` writes what there is now.
func TestOrder(t *testing.T) {
	data := bytes.Repeat([]byte("order "), 100_000)
	type step struct {
		name string
		do   func(img *Image) error
	}
	write := func(name string, n int, off int64) step {
		return step{name, func(img *Image) error { _, err := img.WriteAt(data[:n], off); return err }}
	}
	packed := func(name string, n int, off int64) step {
		return step{name, func(img *Image) error { return img.WriteCompressed(data[:n], off) }}
	}
	sync := step{"sync", (*Image).Sync}
	tests := []struct {
		name  string
		size  int64
		opts  CreateOptions
		steps []step
	}{
		{"allocate", 1 << 30, CreateOptions{}, []step{
			write("write into an empty image", 4096, 1<<20), sync,
			write("write into a mapped cluster", 4096, 1<<20+8192), sync,
			write("write into a new cluster of the same table", 70_000, 2<<20), sync,
			{"sync with nothing to write", (*Image).Sync},
		}},
		{"compressed", 1 << 30, CreateOptions{}, []step{
			packed("write two compressed clusters", 128<<10, 0), sync,
			packed("replace one", 64<<10, 0), sync,
			write("rewrite the other", 4096, 64<<10), sync,
		}},
		{"lazy", 1 << 30, CreateOptions{LazyRefcounts: true}, []step{
			write("write", 4096, 1<<20), sync,
			write("write again", 4096, 2<<20), sync,
		}},
		{"datafile", 1 << 30, CreateOptions{DataFile: "data"}, []step{
			write("write", 4096, 1<<20), sync,
		}},
		{"empty", 1 << 30, CreateOptions{}, []step{
			write("write", 300_000, 1<<20), sync,
			{"make empty", func(img *Image) error { return img.MakeEmpty(context.Background()) }},
			write("write again", 4096, 1<<20), sync,
		}},
		{"discard", 1 << 30, CreateOptions{}, []step{
			write("write four clusters", 256<<10, 0), sync,
			{"discard two", func(img *Image) error { return img.Discard(64<<10, 128<<10) }}, sync,
			write("write takes the place of one", 4096, 2<<20), sync,
			{"zero one", func(img *Image) error { return img.WriteZeroes(0, 64<<10, 0) }}, sync,
			{"zero and unmap one, and a part", func(img *Image) error { return img.WriteZeroes(192<<10, 64<<10+2048, ZeroMayUnmap) }}, sync,
		}},
		{"blocks", 1 << 20, CreateOptions{ClusterSize: 512, RefcountBits: 64}, []step{
			write("write past the first refcount block's range", 20_000, 0), sync,
		}},
		{"moved", 8 << 20, CreateOptions{ClusterSize: 512, RefcountBits: 64}, []step{
			{"fill what the refcount table describes", func(img *Image) error {
				for img.m.alloc.table.n<<img.m.refBlockBits > img.m.alloc.many+64 {
					if _, err := img.WriteAt(data[:16384], int64(img.m.alloc.many)<<9&^16383); err != nil {
						return err
					}
				}
				return img.Sync()
			}},
			write("write past it", 64<<10, 6<<20), sync,
			write("the old table is reused", 512, 7<<20), sync,
		}},
		{"amend", 1 << 30, CreateOptions{ClusterSize: 4096}, []step{
			write("write", 4096, 1<<20),
			{"refcounts of 8 bits", func(img *Image) error { return img.Amend(context.Background(), &AmendOptions{RefcountBits: 8}) }},
			{"version 2", func(img *Image) error {
				return img.Amend(context.Background(), &AmendOptions{Version: 2, RefcountBits: 16})
			}},
			{"a backing file with a long name", func(img *Image) error {
				return img.Rebase(context.Background(), &RebaseOptions{BackingFile: strings.Repeat("x", 600), BackingFormat: "raw", Unsafe: true})
			}},
			{"another one", func(img *Image) error {
				return img.Rebase(context.Background(), &RebaseOptions{BackingFile: strings.Repeat("y", 700), BackingFormat: "raw", Unsafe: true})
			}},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rec := crashtest.NewRecorder()
			s := orderStorage{rec.Regular("image", nil)}
			tt.opts.Open = &OpenOptions{DataFile: orderStorage{rec.Regular("data", nil)}}
			img, err := CreateStorage(s, tt.size, &tt.opts)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			fmt.Fprintf(&got, "create\n%s", orderOf(img, rec.Log()))
			for _, st := range append(tt.steps, step{"close", (*Image).Close}) {
				from := len(rec.Log())
				if err := st.do(img); err != nil {
					t.Fatalf("%s: %v", st.name, err)
				}
				log := rec.Log()[from:]
				if len(log) > 40 {
					fmt.Fprintf(&got, "%s\n  %d operations\n", st.name, len(log))
					continue
				}
				fmt.Fprintf(&got, "%s\n%s", st.name, orderOf(img, log))
			}
			golden := filepath.Join("testdata", "order", tt.name+".txt")
			if *updateGolden {
				if err := os.MkdirAll(filepath.Dir(golden), 0o777); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(golden, []byte(got.String()), 0o666); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got.String(), "\n")); diff != "" {
				t.Errorf("host operations (-want +got):\n%s", diff)
			}
		})
	}
}
