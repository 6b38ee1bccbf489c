package codec

import (
	"bytes"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
)

// packer packs with encoders that it has for itself.
type packer struct {
	testing.TB
	buf [MaxClusterSize]byte
}

// newPacker returns a packer whose encoders are new, and stay the same ones until renew: one processor, no collection.
func newPacker(t *testing.T) *packer {
	procs, percent := runtime.GOMAXPROCS(1), debug.SetGCPercent(-1)
	t.Cleanup(func() {
		runtime.GOMAXPROCS(procs)
		debug.SetGCPercent(percent)
	})
	p := &packer{TB: t}
	p.renew()
	return p
}

// renew drops all encoders.
func (p *packer) renew() {
	for _, pool := range []*sync.Pool{&matchers, &wideMatchers, &entropyCoders, &zstdEncoders, &zstdEntropyCoders} {
		*pool = sync.Pool{New: pool.New}
	}
}

// pack returns the payload of src, valid until the next call, or nil if there is none.
func (p *packer) pack(src []byte, typ Type) []byte {
	p.Helper()
	n, ok, err := Compress(p.buf[:0], src, typ)
	if err != nil {
		p.Fatal(err)
	}
	if !ok {
		return nil
	}
	return p.buf[:n]
}

// fresh returns the payloads of clusters, each from a new encoder.
func (p *packer) fresh(clusters [][]byte, typ Type) (payloads [][]byte) {
	p.Helper()
	for _, c := range clusters {
		p.renew()
		payloads = append(payloads, bytes.Clone(p.pack(c, typ)))
	}
	return payloads
}

// TestDeterministic packs clusters on a new encoder and on ones with a history: other contents, other sizes, what did
// not fit, and so much that their positions wrapped around. The payloads are the same.
func TestDeterministic(t *testing.T) {
	p := newPacker(t)
	compared := 0
	for _, typ := range types {
		rng := rand.New(rand.NewPCG(uint64(typ), 9))
		var clusters [][]byte
		for _, size := range []int{512, 4096, 64 << 10, 256 << 10, MaxClusterSize} {
			for _, c := range contents {
				clusters = append(clusters, c.cluster(size, 1))
			}
		}
		want := p.fresh(clusters, typ)
		for range 4 {
			for _, i := range rng.Perm(len(clusters)) {
				if got := p.pack(clusters[i], typ); !bytes.Equal(got, want[i]) {
					t.Fatalf("%v, cluster %d of %d bytes: %d bytes of payload after other clusters, %d on a new encoder",
						typ, i, len(clusters[i]), len(got), len(want[i]))
				}
				compared++
			}
		}
	}
	t.Logf("compared %d payloads", compared)
}

// TestDeterministicWrap does so with encoders whose 31-bit positions wrap around: after 2 GiB for deflate, which takes
// half a minute, and some thousand clusters for zstd.
func TestDeterministicWrap(t *testing.T) {
	if os.Getenv("QCOW2_LONG") == "" {
		t.Skip("set QCOW2_LONG=1 for a run of a minute")
	}
	p := newPacker(t)
	for _, typ := range types {
		var clusters [][]byte
		for _, c := range contents {
			clusters = append(clusters, c.cluster(64<<10, 2))
		}
		want := p.fresh(clusters, typ)
		total := int64(0)
		for total < 5<<30/2 {
			for i := range clusters {
				if got := p.pack(clusters[i], typ); !bytes.Equal(got, want[i]) {
					t.Fatalf("%v, %s: another payload after %d bytes", typ, contents[i].name, total)
				}
				total += int64(len(clusters[i]))
			}
		}
		t.Logf("%v: %d MiB through one encoder", typ, total>>20)
	}
}
