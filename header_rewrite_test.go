package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// headerMeaning returns what a header says, without where its parts stand and without the feature name table, which
// says nothing that is needed. Unknown extensions keep their order.
func headerMeaning(h *header) *header {
	m := *h
	m.backingOff, m.backingNameRaw, m.fileSize = 0, nil, 0
	m.backingSize = 0 // the name tells, and without one it means nothing
	m.extensions = nil
	for _, e := range h.extensions {
		if !slices.Contains(knownExtensions[:], e.typ) {
			m.extensions = append(m.extensions, e)
		}
	}
	if len(m.padding) == 0 {
		m.padding = nil
	}
	if len(m.unknownFields) == 0 {
		m.unknownFields = nil
	}
	return &m
}

// differentHeader returns how the meanings of two headers differ; "" if they do not.
func differentHeader(want, got *header) string {
	w, g := headerMeaning(want), headerMeaning(got)
	if reflect.DeepEqual(w, g) {
		return "" // cmp takes its time
	}
	return cmp.Diff(w, g, headerCmp, cmpopts.EquateEmpty())
}

// decodeCluster decodes the header in a cluster.
func decodeCluster(t testing.TB, b []byte) *header {
	t.Helper()
	h, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatalf("decode: %v", err)
	}
	return h
}

// checkHeaderSteps carries the steps out on the cluster b, looks at every crash state between them, and returns what
// the cluster is in the end. Before the first sector of the last step is written the header must mean what it meant
// at first; afterwards what it means to do.
func checkHeaderSteps(t testing.TB, b []byte, steps []headerStep, want *header, rng *rand.Rand) []byte {
	t.Helper()
	b = bytes.Clone(b)
	old := decodeCluster(t, b)
	last := 0
	for i, s := range steps {
		if len(s.sector.p) > 0 {
			last = i
		}
	}
	for i, s := range steps {
		before, after := old, old
		if i >= last {
			after = want
		}
		if i > last {
			before = want
		}
		// Any subset of the sectors may have come through.
		type piece struct {
			off uint64
			p   []byte
		}
		var pieces []piece
		for _, w := range s.beside {
			if w.off < sectorSize {
				t.Fatalf("step %d writes to the first sector beside it", i)
			}
			for off, p := w.off, w.p; len(p) > 0; {
				n := min(uint64(len(p)), sectorSize-off%sectorSize)
				pieces = append(pieces, piece{off, p[:n]})
				off, p = off+n, p[n:]
			}
		}
		const bits = 4 // of all subsets of so many; the rest at random
		subsets := 1 << min(len(pieces), bits)
		for k := range subsets {
			state := bytes.Clone(b)
			for j, p := range pieces {
				if j < bits && k>>j&1 != 0 || j >= bits && rng.IntN(2) == 0 {
					copy(state[p.off:], p.p)
				}
			}
			got, err := readHeader(bytes.NewReader(state), int64(len(state)))
			if err != nil {
				t.Fatalf("step %d, subset %#x: %v", i, k, err)
			}
			if diff := differentHeader(before, got); diff != "" {
				t.Fatalf("step %d, subset %#x of %d sectors (-want +got):\n%s", i, k, len(pieces), diff)
			}
		}
		for _, p := range pieces {
			copy(b[p.off:], p.p)
		}
		if end := s.sector.off + uint64(len(s.sector.p)); end > sectorSize {
			t.Fatalf("step %d switches up to %#x", i, end)
		}
		copy(b[s.sector.off:], s.sector.p)
		if diff := differentHeader(after, decodeCluster(t, b)); diff != "" {
			t.Fatalf("after step %d (-want +got):\n%s", i, diff)
		}
	}
	return b
}

// randomHeader returns a header with any parts, in any order and at any places, and its cluster; false if the parts
// do not fit.
func randomHeader(rng *rand.Rand) (*header, []byte, bool) {
	text := func(n int) string {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte('a' + rng.IntN(26))
		}
		return string(p)
	}
	o := &CreateOptions{ClusterSize: 512 << rng.IntN(6), Version: 2 + rng.IntN(2)}
	h, err := newHeader(1<<20, o)
	if err != nil {
		panic(err)
	}
	h.refTableOff, h.refTableClusters, h.l1Off = h.clusterSize(), 1, 3*h.clusterSize()
	h.extensions = nil
	if h.version >= 3 {
		h.compatible, h.autoclear = rng.Uint64()&0xf0, rng.Uint64()&0xf0
		switch rng.IntN(6) {
		case 0:
			h.headerLength = headerLengthMin
		case 1:
			n := 1 + rng.IntN(80)
			if rng.IntN(8) == 0 {
				n = rng.IntN(700)
			}
			h.headerLength = uint32(headerLengthV3 + 8*n)
			h.unknownFields = []byte(text(8 * n))
		}
		if rng.IntN(2) == 0 {
			h.extensions = append(h.extensions, headerExtension{extFeatureNames, encodeFeatureNames()})
		}
	}
	if rng.IntN(2) == 0 {
		h.backingFormat = []string{"raw", "qcow2", "host_device"}[rng.IntN(3)]
		h.extensions = append(h.extensions, headerExtension{extBackingFormat, []byte(h.backingFormat)})
	}
	if rng.IntN(3) == 0 {
		h.dataFileName = text(1 + rng.IntN(60))
		h.extensions = append(h.extensions, headerExtension{extDataFile, []byte(h.dataFileName)})
	}
	for range rng.IntN(3) {
		n := rng.IntN(40)
		if rng.IntN(3) == 0 {
			n = rng.IntN(900)
		}
		h.extensions = append(h.extensions, headerExtension{0x11111111 + uint32(rng.IntN(5)), []byte(text(n))})
	}
	rng.Shuffle(len(h.extensions), func(i, j int) { h.extensions[i], h.extensions[j] = h.extensions[j], h.extensions[i] })
	if rng.IntN(3) > 0 {
		n := 1 + rng.IntN(40)
		if rng.IntN(3) == 0 {
			n = 1 + rng.IntN(maxBackingName)
		}
		h.backingName = text(n)
		if most := h.mostBytes(); rng.IntN(3) == 0 && most < h.clusterSize() {
			h.backingOff = most - uint64(n) + uint64(rng.Int64N(int64(h.clusterSize()-most)))
		}
	}
	exts := len(h.extensions)
	b, err := h.encode()
	if err != nil {
		return nil, nil, false
	}
	b = append(b, make([]byte, int(h.clusterSize())-len(b))...)
	if h.backingName != "" && rng.IntN(2) == 0 {
		// What nobody looks at may be anything.
		for i := range b[len(b)-len(b)/8:] {
			at := len(b) - 1 - i
			if uint64(at) >= h.mostBytes()+h.backingOff+uint64(len(h.backingName)) {
				b[at] = byte(rng.Uint32())
			}
		}
	}
	got, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		panic(err)
	}
	return got, b, len(got.extensions) == exts
}

// changeHeader returns a header that differs from h as a rebase, an amend or both would have it.
func changeHeader(h *header, rng *rand.Rand) *header {
	n := h.clone()
	if rng.IntN(4) > 0 {
		n.setBacking("", "")
		if rng.IntN(4) > 0 {
			name := strings.Repeat("n", 1+rng.IntN(60))
			if rng.IntN(3) == 0 {
				name = strings.Repeat("m", 1+rng.IntN(maxBackingName))
			}
			n.setBacking(name, []string{"raw", "qcow2", "luks-in-a-file"}[rng.IntN(3)])
		}
	}
	if rng.IntN(3) == 0 {
		n.setVersion(5 - n.version)
	}
	if n.version >= 3 {
		n.refcountOrder = rng.Uint32N(7)
		n.compatible ^= compatLazyRefcounts
	}
	n.refTableOff, n.refTableClusters = 9*n.clusterSize(), 2
	n.snapshotsOff = 12 * n.clusterSize()
	return n
}

// TestHeaderRewrite rewrites random headers into others: every crash state between the writes is the old header or
// the new one.
func TestHeaderRewrite(t *testing.T) {
	n := 150
	if os.Getenv(crashStatesEnv) != "" {
		n = 50_000
	}
	full, stepCounts, dropped := 0, make(map[int]int), 0
	for seed := range uint64(n) {
		rng := rand.New(rand.NewPCG(seed, 7))
		h, b, ok := randomHeader(rng)
		if !ok {
			continue
		}
		want := changeHeader(h, rng)
		steps, now, err := planHeader(b, want)
		if errors.Is(err, ErrHeaderFull) {
			full++
			// Only what cannot leave the place that it has behind the first sector may be in the way.
			fixed := slices.ContainsFunc(h.extensions, func(e headerExtension) bool { return e.typ != extFeatureNames && len(e.data) > 100 })
			if room := int64(h.clusterSize()) - int64(want.mostBytes()); room > 2*maxBackingName && !fixed && h.headerLength < 250 {
				t.Fatalf("seed %d: no room, although %d bytes are free", seed, room)
			}
			continue
		}
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			got := checkHeaderSteps(t, b, steps, want, rng)
			if diff := cmp.Diff(decodeCluster(t, got), now, headerCmp, cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "fileSize" }, cmp.Ignore())); diff != "" {
				t.Errorf("what the plan says of the header (-is +says):\n%s", diff)
			}
			has := func(h *header) bool {
				return slices.ContainsFunc(h.extensions, func(e headerExtension) bool { return e.typ == extFeatureNames })
			}
			if has(want) && !has(now) {
				dropped++
			}
		})
		if t.Failed() {
			return
		}
		k := 0
		for _, s := range steps {
			if len(s.sector.p) > 0 {
				k++
			}
		}
		stepCounts[k]++
	}
	t.Logf("by number of steps: %v; no room for %d; feature names dropped from %d", stepCounts, full, dropped)
	if full == 0 || stepCounts[2] == 0 || n > 10_000 && dropped == 0 {
		t.Error("the headers are too easy")
	}
}

// TestHeaderRewriteQEMU rewrites the headers of images that QEMU made, and has QEMU read what is there after every
// step: the old names or the new ones.
func TestHeaderRewriteQEMU(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	names := func(path string) [2]any {
		info := qemutest.Info(t, path)
		return [2]any{info["backing-filename"], info["backing-filename-format"]}
	}
	long := strings.Repeat("a/long/directory/", 18) + "base"
	for i, options := range []string{
		"cluster_size=512", "cluster_size=4096,compat=0.10", "cluster_size=65536",
	} {
		for j, from := range [][2]string{{}, {long, "qcow2"}} {
			for k, to := range [][2]string{{"new", "qcow2"}, {long + "2", "raw"}, {}} {
				path := filepath.Join(dir, fmt.Sprintf("%d.%d.%d.qcow2", i, j, k))
				args := []string{"create", "-q", "-u", "-f", "qcow2", "-o", options}
				if from[0] != "" {
					args = append(args, "-b", from[0], "-F", from[1])
				}
				qemutest.Img(t, append(args, path, "1M")...)
				h, b := readImageHeader(t, path)
				b = append(bytes.Clone(b), make([]byte, int(h.clusterSize())-len(b))...)
				want := h.clone()
				want.setBacking(to[0], to[1])
				steps, _, err := planHeader(b, want)
				if err != nil {
					t.Fatalf("%s from %q to %q: %v", options, from, to, err)
				}
				checkHeaderSteps(t, b, steps, want, rand.New(rand.NewPCG(1, 1)))
				asRead := func(n [2]string) [2]any {
					if n[0] == "" {
						return [2]any{}
					}
					return [2]any{n[0], n[1]}
				}
				for _, s := range steps {
					for _, w := range s.beside {
						overwriteFile(t, path, int64(w.off), w.p)
					}
					if got := names(path); got != asRead(from) && got != asRead(to) {
						t.Errorf("%s from %q to %q: between, QEMU reads %q", options, from, to, got)
					}
					overwriteFile(t, path, int64(s.sector.off), s.sector.p)
				}
				if got := names(path); got != asRead(to) {
					t.Errorf("%s from %q to %q: QEMU reads %q", options, from, to, got)
				}
				image := fmt.Sprintf(`json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":%q}}`, path)
				if c, ok := qemutest.Verdict(t, time.Minute, image); !ok || !c.Clean() {
					t.Errorf("qemu-img check: %s", c.Output)
				}
			}
		}
	}
}
