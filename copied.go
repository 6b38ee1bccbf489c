package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// The functions below change COPIED flags in the tables on the host, all of a tree at once. A flag says that a
// refcount is exactly one (I7), so it is durably gone before a count is raised, and set only once the lowered count
// is durable. Each flag stands for itself: a crash or an error in the middle leaves some with and some without, and
// one that is missing is harmless.

// copiedBit is COPIED in the first byte of an entry.
const copiedBit = flagCopied >> 56

// clearCopied takes COPIED from all entries of the L2 tables. Precondition: as eachL2.
func (img *Image) clearCopied(ctx context.Context, tables []treeTable, size uint64) error {
	stride := 1 << img.m.l2EntryBits
	return img.eachL2(ctx, tables, size, func(_ treeTable, p []byte) (bool, error) {
		had := byte(0)
		for i := 0; i < len(p); i += stride {
			had |= p[i]
			p[i] &^= copiedBit
		}
		return had&copiedBit != 0, nil
	})
}

// setCopied sets COPIED in the entries of those active L2 tables that refs, in the first n entries of the L1 table, says
// the refcount of whose clusters is one now (refStoredOne). A table that others share has no such entry, and is not
// read. Preconditions: as eachL2; the counts are durable.
func (img *Image) setCopied(ctx context.Context, refs *refWords, size uint64) error {
	m := img.m
	one := func(off uint64) bool { return refs.load(off>>m.clusterBits)&refStoredOne != 0 }
	var tables []treeTable
	for _, c := range m.l1.all() {
		for j := range c {
			e := m.l1.at(c, j)
			if off := e & offsetMask; off != 0 && (e&flagCopied != 0 || one(off)) {
				tables = append(tables, treeTable{off: off, times: 1})
			}
		}
	}
	tables = sortTables(tables)
	stride := 1 << m.l2EntryBits
	var words *[refChunkWords]uint16 // of the clusters from base on: those of the last look, if they are an array
	base := uint64(0)
	err := img.eachL2(ctx, tables, size, func(_ treeTable, p []byte) (changed bool, err error) {
		for i := 0; i+8 <= len(p); i += stride {
			w := binary.BigEndian.Uint64(p[i:])
			off := w & offsetMask
			if w&(flagCopied|flagCompressed) != 0 || off == 0 {
				continue
			}
			ci := off >> m.clusterBits
			if words == nil || ci-base >= refChunkWords {
				words = nil
				if c := refs.chunk(ci >> refChunkBits); c != nil {
					words, base = c.words, ci&^(refChunkWords-1)
				}
			}
			if words != nil && words[ci&(refChunkWords-1)]&refStoredOne != 0 || words == nil && one(off) {
				p[i] |= copiedBit
				changed = true
			}
		}
		return changed, nil
	})
	if err != nil {
		return err
	}
	return img.editL1(func(_, w uint64) uint64 {
		if off := w & offsetMask; off != 0 && one(off) {
			w |= flagCopied
		}
		return w
	})
}

// restoreCopied is setCopied, made durable; reads find the flags from then on. Preconditions: those of setCopied.
func (img *Image) restoreCopied(ctx context.Context, refs *refWords, size uint64) error {
	err := img.setCopied(ctx, refs, size)
	if err == nil {
		err = img.host.sync()
	}
	return errors.Join(err, img.forgetSlices())
}

// l1EditEntries is how many L1 entries editL1 writes at once.
const l1EditEntries = 1 << 13

// editL1 changes the COPIED flags of the active L1 table, in memory and on the host: f returns what becomes of
// entry i, which is w. A flag is in memory only while the host has it, or may have it. Preconditions: nothing of the table is dirty; the
// caller alone changes the image, and does not hold mu.
func (img *Image) editL1(f func(i, w uint64) uint64) error {
	m := img.m
	img.mu.Lock()
	defer img.mu.Unlock()
	for first := uint64(0); first < m.l1.n; first += l1EditEntries {
		n := min(m.l1.n-first, l1EditEntries)
		var set []uint64 // entries that get the flag once it is written
		changed := false
		for i := first; i < first+n; i++ {
			switch was, w := m.l1.load(i), f(i, m.l1.load(i)); {
			case was&^w != 0:
				m.l1.store(i, w)
				changed = true
			case was != w:
				set = append(set, i)
			}
		}
		if !changed && len(set) == 0 {
			continue
		}
		p := make([]byte, 8*n)
		m.l1.encode(p, first)
		for _, i := range set {
			p[8*(i-first)] |= copiedBit
		}
		if err := img.host.write(useL1, p, m.l1Off+8*first); err != nil {
			return fmt.Errorf("L1 table: %w", err)
		}
		for _, i := range set {
			m.l1.store(i, m.l1.load(i)|flagCopied)
		}
	}
	return nil
}

// forgetSlices empties the cache of what it holds of the image's L2 tables, which have changed on the host. A read in
// flight may still put a slice into the cache that it read before, so it waits for those.
func (img *Image) forgetSlices() error {
	return img.pausing(func() error {
		img.m.cache.forget(img.m.id)
		return nil
	})
}
