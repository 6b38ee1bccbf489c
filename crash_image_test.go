package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// crashBytes is the bytes of a sound image that was closed, to be given what the library cannot make yet:
// an internal snapshot, zero clusters. The image has neither a snapshot nor bitmaps.
type crashBytes struct {
	b     []byte
	h     *refwalk.Header
	fixed bool // b is a device and cannot grow
}

// newCrashBytes returns the editable form of the image in b.
func newCrashBytes(b []byte, fixed bool) (*crashBytes, error) {
	h, err := refwalk.ParseHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, err
	}
	return &crashBytes{b: b, h: h, fixed: fixed}, nil
}

// word returns the big-endian 64-bit word at host offset off.
func (c *crashBytes) word(off uint64) uint64 { return binary.BigEndian.Uint64(c.b[off:]) }

// setWord sets the word at host offset off.
func (c *crashBytes) setWord(off, v uint64) { binary.BigEndian.PutUint64(c.b[off:], v) }

// block returns the refcount block of host cluster ci and the index of its refcount there; nil if there is
// no block.
func (c *crashBytes) block(ci uint64) ([]byte, uint64) {
	blockBits := c.h.ClusterBits + 3 - c.h.RefcountOrder
	if ci>>blockBits >= uint64(c.h.RefTableClusters)<<c.h.ClusterBits/8 {
		return nil, 0
	}
	off := c.word(c.h.RefTableOff + 8*(ci>>blockBits))
	if off == 0 {
		return nil, 0
	}
	return c.b[off : off+1<<c.h.ClusterBits], ci & (1<<blockBits - 1)
}

// refer adds a reference to host cluster ci.
func (c *crashBytes) refer(ci uint64) error {
	block, i := c.block(ci)
	if block == nil {
		return fmt.Errorf("host cluster %d has no refcount block", ci)
	}
	v := refcountAt(block, c.h.RefcountOrder, i) + 1
	if v > maxRefcount(c.h.RefcountOrder) {
		return fmt.Errorf("host cluster %d has no room for a reference", ci)
	}
	setRefcountAt(block, c.h.RefcountOrder, i, v)
	return nil
}

// take allocates n host clusters in one run, zeroed, and returns their host offset.
func (c *crashBytes) take(n uint64) (uint64, error) {
	run := uint64(0)
	for ci := uint64(1); ; ci++ {
		block, i := c.block(ci)
		if block == nil {
			return 0, fmt.Errorf("no %d free clusters below host cluster %d", n, ci)
		}
		if run++; refcountAt(block, c.h.RefcountOrder, i) != 0 {
			run = 0
		}
		if run < n {
			continue
		}
		end := int(ci+1) << c.h.ClusterBits
		if end > len(c.b) {
			if c.fixed {
				return 0, fmt.Errorf("no %d free clusters on a device of %#x bytes", n, len(c.b))
			}
			c.b = append(c.b, make([]byte, end-len(c.b))...)
		}
		off := uint64(end) - n<<c.h.ClusterBits
		clear(c.b[off:end])
		for ; run > 0; run-- {
			if err := c.refer(ci + 1 - run); err != nil {
				return 0, err
			}
		}
		return off, nil
	}
}

// end returns the host offset in bytes behind the last cluster that has a refcount.
func (c *crashBytes) end() int {
	last := uint64(0)
	perBlock := uint64(1) << (c.h.ClusterBits + 3 - c.h.RefcountOrder)
	for ci := uint64(0); ci < uint64(len(c.b))>>c.h.ClusterBits; ci++ {
		block, i := c.block(ci)
		if block == nil {
			ci += perBlock - 1
		} else if refcountAt(block, c.h.RefcountOrder, i) != 0 {
			last = ci
		}
	}
	return int(last+1) << c.h.ClusterBits
}

// entries calls f with the host offset of every L2 entry of the active image whose L2 table exists, and the
// guest cluster it maps.
func (c *crashBytes) entries(f func(off, guestCluster uint64) error) error {
	size := uint64(8)
	if c.h.ExtendedL2() {
		size = 16
	}
	perTable := uint64(1) << c.h.ClusterBits / size
	for i := range uint64(c.h.L1Entries) {
		l2 := c.word(c.h.L1Off+8*i) & offsetMask
		if l2 == 0 {
			continue
		}
		for j := range perTable {
			if (i*perTable+j)<<c.h.ClusterBits >= c.h.VirtualSize {
				return nil
			}
			if err := f(l2+j*size, i*perTable+j); err != nil {
				return err
			}
		}
	}
	return nil
}

// addSnapshot adds an internal snapshot of the active image: every L2 table, data cluster and compressed
// cluster has one more reference then, and no entry COPIED. qcow2 spec, "Snapshots".
func (c *crashBytes) addSnapshot() error {
	for i := range uint64(c.h.L1Entries) {
		at := c.h.L1Off + 8*i
		if l2 := c.word(at) & offsetMask; l2 != 0 {
			c.setWord(at, l2)
			if err := c.refer(l2 >> c.h.ClusterBits); err != nil {
				return err
			}
		}
	}
	rules := entryRules{geometry: newGeometry(c.h.ClusterBits, c.h.RefcountOrder, c.h.ExtendedL2())}
	err := c.entries(func(off, _ uint64) error {
		e := l2Entry{word: c.word(off)}
		held := rules.held(e)
		for i := range held.n {
			if err := c.refer(held.first + i); err != nil {
				return err
			}
		}
		c.setWord(off, e.word&^flagCopied)
		return nil
	})
	if err != nil {
		return err
	}
	l1Bytes := uint64(c.h.L1Entries) * 8
	l1, err := c.take(rules.clusters(l1Bytes))
	if err != nil {
		return err
	}
	copy(c.b[l1:], c.b[c.h.L1Off:c.h.L1Off+l1Bytes])
	table, err := c.take(1)
	if err != nil {
		return err
	}
	be := binary.BigEndian
	s := c.b[table:]
	be.PutUint64(s, l1)
	be.PutUint32(s[8:], c.h.L1Entries)
	be.PutUint16(s[12:], 1) // id
	be.PutUint16(s[14:], 4) // name
	be.PutUint32(s[36:], 16)
	be.PutUint64(s[48:], c.h.VirtualSize)
	copy(s[56:], "1once")
	be.PutUint32(c.b[60:], 1)
	be.PutUint64(c.b[64:], table)
	return nil
}

// addZeros makes about one in ten of the clusters or subclusters read as zeros: with a host cluster where
// they have one, without where they have none.
func (c *crashBytes) addZeros(rng *rand.Rand) error {
	return c.entries(func(off, _ uint64) error {
		e := c.word(off)
		if e&flagCompressed != 0 {
			return nil
		}
		if !c.h.ExtendedL2() {
			if rng.IntN(10) == 0 {
				c.setWord(off, e|flagZero)
			}
			return nil
		}
		bitmap := c.word(off + 8)
		for sub := range subclustersPerCluster {
			if rng.IntN(10) == 0 {
				bitmap = bitmap&^(1<<sub) | 1<<(32+sub)
			}
		}
		c.setWord(off+8, bitmap)
		return nil
	})
}
