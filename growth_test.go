package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// walkFile walks the references of the image in f: a storage, or a recorded disk.
func walkFile(f interface {
	io.ReaderAt
	Size() (int64, error)
}) (*refwalk.Report, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	return refwalk.Walk(f, size)
}

// walkStorage walks the references of the image in s. A closed image must have no finding at all, an open
// one no corruption.
func walkStorage(t *testing.T, s Storage, closed bool) {
	t.Helper()
	rep, err := walkFile(s)
	if err != nil {
		t.Fatal(err)
	}
	if rep.Corruptions() > 0 || closed && !rep.Clean() {
		t.Fatalf("walk (closed %v): %d corruptions, %d leaks, %d lost COPIED, %d past the end:\n%s",
			closed, rep.Corruptions(), rep.Leaks, rep.CopiedMissing, rep.PastEnd, strings.Join(rep.Findings, "\n"))
	}
}

// TestRefcountTableGrowth grows images of 512-byte clusters past several moves of the refcount table, with
// plain and compressed clusters, and has QEMU check the image after each move, and after reopening.
func TestRefcountTableGrowth(t *testing.T) {
	qemutest.Require(t)
	tests := []struct {
		bits       int
		smallCache bool
		lazy       bool
		reopen     bool // after each move
		size       int64
		moves      int // at least
	}{
		{bits: 64, size: 16 << 20, moves: 4},
		{bits: 64, size: 16 << 20, moves: 4, smallCache: true},
		{bits: 64, size: 16 << 20, moves: 4, reopen: true},
		{bits: 64, size: 16 << 20, moves: 4, reopen: true, smallCache: true},
		{bits: 64, size: 10 << 20, moves: 3, lazy: true, reopen: true},
		{bits: 32, size: 20 << 20, moves: 3, smallCache: true, reopen: true},
		{bits: 32, size: 20 << 20, moves: 3},
		{bits: 16, size: 26 << 20, moves: 2, smallCache: true},
		{bits: 8, size: 30 << 20, moves: 1, reopen: true},
	}
	for _, tt := range tests {
		name := fmt.Sprintf("bits=%d small-cache=%v lazy=%v reopen=%v", tt.bits, tt.smallCache, tt.lazy, tt.reopen)
		t.Run(name, func(t *testing.T) {
			if testing.Short() && (tt.bits != 64 || tt.smallCache || !tt.reopen) {
				t.Skip("long")
			}
			dir := t.TempDir()
			path, rawPath := filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "disk.raw")
			qemutest.Dump(t, path)
			open := &OpenOptions{ReadWrite: true, NoSync: true}
			if tt.smallCache {
				open.L2CacheBytes, open.RefcountCacheBytes = 1, 1
			}
			img, err := Create(path, tt.size, &CreateOptions{
				ClusterSize: 512, RefcountBits: tt.bits, LazyRefcounts: tt.lazy, Open: open,
			})
			if err != nil {
				t.Fatal(err)
			}
			raw, err := os.Create(rawPath)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			if err := raw.Truncate(tt.size); err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(uint64(tt.bits), 1))
			// Pieces in any order, so that L2 tables of all ages lie between the data.
			const piece = 24 << 10
			buf := make([]byte, piece)
			moves, table := 0, img.m.alloc.tableOff
			for _, i := range rng.Perm(int(tt.size / piece)) {
				off := int64(i) * piece
				content(buf, uint64(i)&^7|1) // noise, so that the file grows
				if rng.IntN(4) == 0 {
					content(buf, uint64(i)&^7|3)
					err = img.WriteCompressed(buf, off)
				} else {
					_, err = img.WriteAt(buf, off)
				}
				if err != nil {
					t.Fatal(err)
				}
				if _, err := raw.WriteAt(buf, off); err != nil {
					t.Fatal(err)
				}
				if img.m.alloc.tableOff == table {
					continue
				}
				moves, table = moves+1, img.m.alloc.tableOff
				// The state before the switch, with blocks and table beside the old ones, is sound too.
				walkStorage(t, img.host.s, false)
				if err := img.Sync(); err != nil {
					t.Fatal(err)
				}
				walkStorage(t, img.host.s, false)
				if !tt.lazy {
					if r := qemutest.Check(t, path, "-U"); r.Corruptions != 0 || r.CheckErrors != 0 {
						t.Fatalf("after move %d: %s", moves, r.Output)
					}
				}
				if !tt.reopen {
					continue
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				if !qemutest.CheckClean(t, path) {
					t.FailNow()
				}
				if img, err = Open(path, open); err != nil {
					t.Fatal(err)
				}
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if moves < tt.moves {
				t.Errorf("the refcount table moved %d times, want %d at least", moves, tt.moves)
			}
			qemutest.CheckClean(t, path)
			if tt.smallCache { // QEMU takes long for small clusters
				qemutest.Compare(t, path, "qcow2", rawPath, "raw")
			} else if img, err = Open(path, nil); err != nil {
				t.Fatal(err)
			} else {
				want, err := os.ReadFile(rawPath)
				if err != nil {
					t.Fatal(err)
				}
				if got := diskBytes(t, img); !bytes.Equal(got, want) {
					t.Errorf("the disk differs from %#x on", differenceAt(got, want))
				}
				if err := img.Close(); err != nil {
					t.Error(err)
				}
			}
			s, err := OpenFileStorage(path, os.O_RDONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			walkStorage(t, s, true)
		})
	}
}

// TestSteadyOverwrite overwrites compressed clusters, and clusters that a snapshot of QEMU's shares, over
// and over with a Sync now and then. What is dropped is reused, so the file stops growing.
func TestSteadyOverwrite(t *testing.T) {
	qemutest.Require(t)
	const (
		clusters = 160
		warmUp   = 4
		rounds   = 16
	)
	for _, cluster := range []int64{512, 4096, 65536} {
		for _, lazy := range []bool{false, true} {
			for _, snapshots := range []bool{false, true} {
				t.Run(fmt.Sprintf("cluster=%d lazy=%v snapshots=%v", cluster, lazy, snapshots), func(t *testing.T) {
					path := filepath.Join(t.TempDir(), "image.qcow2")
					qemutest.Dump(t, path)
					img, err := Create(path, clusters*cluster, &CreateOptions{
						ClusterSize: int(cluster), LazyRefcounts: lazy, Open: &OpenOptions{NoSync: true},
					})
					if err != nil {
						t.Fatal(err)
					}
					model := make([]byte, clusters*cluster)
					var sizes []int64
					for round := range rounds {
						overwriteRound(t, img, model, cluster, uint64(round))
						if err := img.Close(); err != nil {
							t.Fatal(err)
						}
						if snapshots {
							if round > 0 {
								qemutest.Img(t, "snapshot", "-d", "steady", path)
							}
							qemutest.Img(t, "snapshot", "-c", "steady", path)
						}
						if img, err = Open(path, &OpenOptions{ReadWrite: true, NoSync: true}); err != nil {
							t.Fatal(err)
						}
						fi, err := os.Stat(path)
						if err != nil {
							t.Fatal(err)
						}
						sizes = append(sizes, fi.Size())
					}
					got := make([]byte, len(model))
					if _, err := img.ReadAt(got, 0); err != nil {
						t.Fatal(err)
					}
					if err := difference(got, model, 0); err != nil {
						t.Error(err)
					}
					if err := img.Close(); err != nil {
						t.Fatal(err)
					}
					qemutest.CheckClean(t, path)
					t.Logf("sizes after each round: %d", sizes)
					// The last payload may be a few bytes longer than any before, for which a cluster is
					// allowed; each round drops more than a hundred.
					most := int64(0)
					for _, n := range sizes[:warmUp] {
						most = max(most, (n+cluster-1)/cluster)
					}
					for round, n := range sizes[warmUp:] {
						if n > (most+1)*cluster {
							t.Errorf("round %d: the file grew to %d bytes, from %d clusters after the warm-up", warmUp+round, n, most)
						}
					}
				})
			}
		}
	}
}

// overwriteRound overwrites every cluster of the image twice, compressed and then in part, with a Sync
// every eighth of the way.
func overwriteRound(t *testing.T, img *Image, model []byte, cluster int64, round uint64) {
	t.Helper()
	clusters := int64(len(model)) / cluster
	p := make([]byte, cluster)
	sync := func(i int64) {
		t.Helper()
		if i%(clusters/8) == 0 {
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range clusters {
		content(p, (round*97000+uint64(i))*8|3) // other noise each round, as much of it
		if err := img.WriteCompressed(p, i*cluster); err != nil {
			t.Fatal(err)
		}
		copy(model[i*cluster:], p)
		sync(i)
	}
	for i := range clusters {
		// The same part of the clusters each round, so that each needs the same room; the others stay
		// compressed.
		if i%3 == 0 {
			continue
		}
		part := p[:cluster/2+1]
		content(part, (round*97000+uint64(i))*8|1)
		off := i*cluster + cluster/4
		if _, err := img.WriteAt(part, off); err != nil {
			t.Fatal(err)
		}
		copy(model[off:], part)
		sync(i)
	}
}

// limitedStorage is a storage on a host that is full: it does not grow beyond limit bytes. A write that
// would is cut off there, as the system does.
type limitedStorage struct {
	Storage
	limit int64
}

// WriteAt implements Storage.
func (s *limitedStorage) WriteAt(p []byte, off int64) (int, error) {
	if n := s.limit - off; n < int64(len(p)) {
		done := 0
		if n > 0 {
			var err error
			if done, err = s.Storage.WriteAt(p[:n], off); err != nil {
				return done, err
			}
		}
		return done, fmt.Errorf("host is full: %w", syscall.ENOSPC)
	}
	return s.Storage.WriteAt(p, off)
}

// fullHost is an image on a host that becomes full, and what it should read as.
type fullHost struct {
	t       *testing.T
	img     *Image
	s       Storage
	model   []byte
	cluster int64
	rng     *rand.Rand
}

// write makes one random write, plain or compressed, and keeps the model up. Bytes that the call says were
// written must be; a compressed write may have replaced any number of clusters from the first on.
func (h *fullHost) write() (err error) {
	h.t.Helper()
	cs := h.cluster
	off := h.rng.Int64N(int64(len(h.model)) / cs)
	n := 1 + h.rng.Int64N(6)
	off, n = off*cs, min(n*cs, int64(len(h.model))-off*cs)
	seed := h.rng.Uint64()
	if h.rng.IntN(3) == 0 {
		p := make([]byte, n)
		content(p, seed&^7|3)
		if err = h.img.WriteCompressed(p, off); err == nil {
			copy(h.model[off:], p)
			return nil
		}
		// Cluster by cluster, new ones before old ones.
		got := make([]byte, cs)
		done := true
		for i := int64(0); i < n; i += cs {
			if _, err := h.img.ReadAt(got, off+i); err != nil {
				h.t.Fatal(err)
			}
			if done = done && bytes.Equal(got, p[i:i+cs]); done {
				copy(h.model[off+i:], got)
			}
		}
		return err
	}
	if h.rng.IntN(2) == 0 { // not at the ends of clusters
		off, n = off+cs/3, max(n-cs/2, 1)
		n = min(n, int64(len(h.model))-off)
	}
	p := make([]byte, n)
	content(p, seed&^7|1)
	k, err := h.img.WriteAt(p, off)
	if err == nil && k != len(p) {
		h.t.Fatalf("wrote %d of %d bytes without an error", k, len(p))
	}
	copy(h.model[off:], p[:k])
	return err
}

// check compares everything with the model.
func (h *fullHost) check(when string) {
	h.t.Helper()
	got := make([]byte, len(h.model))
	if _, err := h.img.ReadAt(got, 0); err != nil {
		h.t.Fatalf("%s: %v", when, err)
	}
	if err := difference(got, h.model, 0); err != nil {
		h.t.Fatalf("%s: %v", when, err)
	}
	walkStorage(h.t, h.s, false)
}

// finish closes the image, on whatever is left of the host, walks it and reads it once more by the
// independent reader.
func (h *fullHost) finish() {
	h.t.Helper()
	if err := h.img.Close(); err != nil {
		h.t.Fatalf("close: %v", err)
	}
	walkStorage(h.t, h.s, true)
	size, err := h.s.Size()
	if err != nil {
		h.t.Fatal(err)
	}
	got, err := refwalk.ReadGuest(refwalk.Source{Image: h.s, Size: size})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := difference(got, h.model, 0); err != nil {
		h.t.Fatalf("after close: %v", err)
	}
}

// TestHostFull fills hosts of many sizes. The write that does not fit says ENOSPC and changes nothing but
// the bytes it counts; reads, Sync and Close work; with more space the next writes do.
func TestHostFull(t *testing.T) {
	tests := []struct {
		name       string
		cluster    int64
		bits       int
		lazy       bool
		smallCache bool
		size       int64
		from, to   int64 // limits of the file in bytes
		step       int64
	}{
		{name: "small", cluster: 512, bits: 16, size: 200 << 10, from: 8 << 10, to: 30 << 10, step: 256},
		{name: "lazy", cluster: 512, bits: 16, lazy: true, size: 200 << 10, from: 8 << 10, to: 30 << 10, step: 512},
		// 4096 refcount entries of 64 bits are 2 MiB of host file: the table moves.
		{name: "table-move", cluster: 512, bits: 64, size: 4 << 20, from: 2<<20 - 4<<10, to: 2<<20 + 60<<10, step: 1024},
		{name: "table-move-small-cache", cluster: 512, bits: 64, smallCache: true, size: 4 << 20, from: 2<<20 - 2<<10, to: 2<<20 + 60<<10, step: 2048},
		{name: "clusters-4K", cluster: 4096, bits: 16, smallCache: true, size: 4 << 20, from: 40 << 10, to: 400 << 10, step: 6000},
	}
	for _, tt := range tests {
		for _, device := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/device=%v", tt.name, device), func(t *testing.T) {
				full := 0
				for limit := tt.from; limit < tt.to; limit += tt.step {
					full += fillHost(t, tt.cluster, tt.size, limit, device, &CreateOptions{
						ClusterSize: int(tt.cluster), RefcountBits: tt.bits, LazyRefcounts: tt.lazy, Overwrite: true,
						Open: openSmall(tt.smallCache),
					})
				}
				if full == 0 {
					t.Error("no host became full")
				}
			})
		}
	}
}

// openSmall returns options with the smallest caches, or the default ones.
func openSmall(small bool) *OpenOptions {
	o := &OpenOptions{ReadWrite: true}
	if small {
		o.L2CacheBytes, o.RefcountCacheBytes = 1, 1
	}
	return o
}

// fillHost fills one host of limit bytes and returns how many writes it refused.
func fillHost(t *testing.T, cluster, size, limit int64, device bool, opts *CreateOptions) int {
	t.Helper()
	var s Storage
	limited := &limitedStorage{Storage: NewMemoryStorage(), limit: limit}
	if s = limited; device {
		s = NewMemoryDevice(limit)
	}
	img, err := CreateStorage(s, size, opts)
	if err != nil {
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("limit %d: %v", limit, err)
		}
		return 0 // not even the tables fit
	}
	h := &fullHost{t: t, img: img, s: s, model: make([]byte, size), cluster: cluster, rng: rand.New(rand.NewPCG(uint64(limit), 1))}
	// First densely up to near the limit, without a check in between.
	for off := int64(0); off+64*cluster < size && off < limit*9/10-40*cluster; off += 16 * cluster {
		p := make([]byte, 16*cluster)
		content(p, uint64(off)*8|1)
		n, err := img.WriteAt(p, off)
		copy(h.model[off:], p[:n])
		if err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("limit %d: %v", limit, err)
			}
			break
		}
	}
	refused := 0
	for i := 0; i < 300 && refused < 6; i++ {
		if err := h.write(); err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("limit %d: %v", limit, err)
			}
			refused++
			h.check(fmt.Sprintf("limit %d: after refusal %d", limit, refused))
			if err := img.Sync(); err != nil {
				t.Fatalf("limit %d: sync on a full host: %v", limit, err)
			}
		}
	}
	if device || limit%(2*cluster) == 0 {
		// Closed while it is full.
		h.finish()
		return refused
	}
	limited.limit += 1 << 20
	for range 20 {
		if err := h.write(); err != nil {
			t.Fatalf("limit %d: with more space: %v", limit, err)
		}
	}
	h.check(fmt.Sprintf("limit %d: with more space", limit))
	h.finish()
	return refused
}

// TestDeviceFullThenFreed frees clusters of a full device by packing what they hold, and writes again.
func TestDeviceFullThenFreed(t *testing.T) {
	const cluster, size = 4096, 4 << 20
	s := NewMemoryDevice(300 << 10)
	img, err := CreateStorage(s, size, &CreateOptions{ClusterSize: cluster, Overwrite: true})
	if err != nil {
		t.Fatal(err)
	}
	h := &fullHost{t: t, img: img, s: s, model: make([]byte, size), cluster: cluster}
	put := func(compressed bool, off int64, n int, seed uint64) error {
		p := make([]byte, n)
		content(p, seed)
		if compressed {
			err := img.WriteCompressed(p, off)
			if err == nil {
				copy(h.model[off:], p)
			}
			return err
		}
		k, err := img.WriteAt(p, off)
		copy(h.model[off:], p[:k])
		return err
	}
	// The cluster that is packed into has room for what will be packed later.
	if err := put(true, size-cluster, cluster, 0); err != nil {
		t.Fatal(err)
	}
	off := int64(0)
	for ; err == nil; off += cluster {
		err = put(false, off, cluster, uint64(off)*8|1)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	h.check("full")
	for i := range int64(8) {
		if err := put(true, i*cluster, cluster, 0); err != nil {
			t.Fatalf("pack cluster %d: %v", i, err)
		}
	}
	// The retry has to make room itself: what was packed is not released before a write-back.
	for i := range int64(6) {
		if err := put(false, off+i*cluster, cluster, uint64(i)*8|1); err != nil {
			t.Fatalf("retry %d after space was freed: %v", i, err)
		}
	}
	h.check("after the retry")
	h.finish()
}

var _ io.WriterAt = (*limitedStorage)(nil)
