package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// OverlapCheck says which metadata host writes are checked against (I8). The zero value is everything.
type OverlapCheck struct {
	// Preset is the set to begin with. Default: OverlapAll.
	Preset OverlapPreset
	// With adds kinds to it, Without takes kinds away.
	With, Without OverlapKinds
	// CacheBytes bounds the memory in bytes for what is known of the parts of the file in use. Default
	// 256 kB, which is some eight million clusters; minimum one part of 16384 clusters. Beyond it, a check costs
	// a search.
	CacheBytes int64
}

// kinds returns the kinds that are checked.
func (o *OverlapCheck) kinds() OverlapKinds { return (o.Preset.kinds() | o.With) &^ o.Without }

// validate refuses what is no choice.
func (o *OverlapCheck) validate() error {
	var errs []error
	refuse := func(bad bool, option string, value any, reason string) {
		if bad {
			errs = append(errs, &OptionError{Option: "OverlapCheck." + option, Value: value, Reason: reason})
		}
	}
	refuse(o.Preset < OverlapAll || o.Preset > OverlapNone, "Preset", int(o.Preset), "is no OverlapPreset")
	refuse(o.With&^overlapAllKinds != 0, "With", uint64(o.With), "has bits that are no OverlapKinds")
	refuse(o.Without&^overlapAllKinds != 0, "Without", uint64(o.Without), "has bits that are no OverlapKinds")
	refuse(o.With&o.Without != 0, "Without", o.With&o.Without, "contradicts With")
	refuse(o.CacheBytes < 0, "CacheBytes", o.CacheBytes, "must not be negative")
	return errors.Join(errs...)
}

// watchMetadata makes the list of all metadata clusters of the image, which every later write to its file is
// checked against. Preconditions: nobody writes to the image, and its tables are loaded.
func (img *Image) watchMetadata() error {
	if !img.newMetadataList() {
		return nil
	}
	h := img.host
	size, err := h.s.Size()
	if err != nil {
		return err
	}
	return img.eachMetadata(h.watched, uint64(size), func(k OverlapKinds, off, n uint64) error {
		h.enter(k, off, n)
		return nil
	})
}

// newMetadataList makes an empty list, and reports whether anything is checked against it. Precondition: nobody writes
// to the image.
func (img *Image) newMetadataList() bool {
	kinds := img.overlap.kinds()
	if kinds == 0 {
		return false
	}
	h := img.host
	h.metadata = newOverlapList(img.m.clusterBits, overlapLimits{cacheBytes: img.overlap.CacheBytes, listBytes: img.limits.MetadataBytes})
	h.metadata.scan = img.scanMetadata
	h.watched = kinds
	h.onHit = img.refuseOverlap
	return true
}

// eachMetadata calls f with every range of the image file, which has size bytes, that is metadata of one of the
// given kinds, until f returns an error. A table that snapshots share is met once or more; their L1 tables are
// read, all others are in memory.
func (img *Image) eachMetadata(kinds OverlapKinds, size uint64, f func(k OverlapKinds, off, n uint64) error) error {
	m, h := img.m, img.hdr
	a := m.alloc
	type place struct {
		kind   OverlapKinds
		off, n uint64
	}
	places := []place{
		{OverlapMainHeader, 0, m.clusterSize},
		{OverlapActiveL1, m.l1Off, m.l1.n * l1EntrySize},
		{OverlapRefcountTable, a.tableOff, a.tableClusters << m.clusterBits},
		{OverlapSnapshotTable, h.snapshotsOff, img.snapshotTableBytes()},
	}
	if b := h.bitmaps; b != nil {
		places = append(places, place{OverlapBitmapDirectory, b.dirOff, b.dirSize})
	}
	for _, p := range places {
		if p.kind&kinds != 0 && p.n > 0 {
			if err := f(p.kind, p.off, p.n); err != nil {
				return err
			}
		}
	}
	entries := func(t *table, k OverlapKinds, mask uint64) error {
		if k&kinds == 0 {
			return nil
		}
		for _, chunk := range t.all() {
			for j := range chunk {
				if off := t.at(chunk, j) & mask; off != 0 && off < maxHostOff {
					if err := f(k, off, m.clusterSize); err != nil {
						return err
					}
				}
			}
		}
		return nil
	}
	err := entries(a.table, OverlapRefcountBlock, ^uint64(refTableReserved))
	if err == nil {
		err = entries(m.l1, OverlapActiveL2, offsetMask)
	}
	if err != nil {
		return err
	}
	return img.eachInactive(kinds, size, f)
}

// eachInactive is eachMetadata for the L1 and L2 tables of snapshots. L1 tables that overlap are read once. One
// that no reader takes, since its size or place is impossible, is none.
func (img *Image) eachInactive(kinds OverlapKinds, size uint64, f func(k OverlapKinds, off, n uint64) error) error {
	if kinds&(OverlapInactiveL1|OverlapInactiveL2) == 0 {
		return nil
	}
	var tables []span
	for i := range img.snapshots {
		if s := &img.snapshots[i]; s.l1Size > 0 && s.checkL1(&img.m.geometry) == nil {
			tables = append(tables, span{lo: s.l1Off, hi: s.l1Off + uint64(s.l1Size)*l1EntrySize})
		}
	}
	for _, t := range overlay(tables) {
		if kinds&OverlapInactiveL1 != 0 {
			if err := f(OverlapInactiveL1, t.lo, t.hi-t.lo); err != nil {
				return err
			}
		}
		if kinds&OverlapInactiveL2 == 0 {
			continue
		}
		err := img.host.words(t.lo, (t.hi-t.lo)/8, size, func(_, w uint64) error {
			if off := w & offsetMask; off != 0 {
				return f(OverlapInactiveL2, off, img.m.clusterSize)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("snapshot L1 table: %w", err)
		}
	}
	return nil
}

// snapshotTableBytes returns the length of the snapshot table in bytes.
func (img *Image) snapshotTableBytes() uint64 {
	if len(img.snapshots) == 0 {
		return 0
	}
	s := &img.snapshots[len(img.snapshots)-1]
	return s.entryOff + minSnapshotEntry + uint64(len(s.extra)+len(s.id)+len(s.name)) - img.hdr.snapshotsOff
}

// scanMetadata looks for metadata of the kinds that are watched in the n host clusters from first on, in the
// tables themselves: for where the list has no room. See overlapList.scan.
func (img *Image) scanMetadata(first, n uint64) (kinds OverlapKinds, at uint64) {
	bits := img.m.clusterBits
	size, err := img.host.s.Size()
	if err == nil {
		err = img.eachMetadata(img.host.watched, uint64(size), func(k OverlapKinds, off, length uint64) error {
			lo, hi := max(off>>bits, first), min((off+length-1)>>bits, first+n-1)
			if lo <= hi {
				if kinds == 0 || lo < at {
					at = lo
				}
				kinds |= k
			}
			return nil
		})
	}
	if err != nil {
		return overlapAllKinds, first
	}
	return kinds, at
}

// refuseOverlap refuses a write that would hit metadata, and all later ones: the image is not what it seems, and
// whatever is written now may make it worse. The first time it sets the corrupt bit in the header, durably,
// and tells the caller of Open. Reads go on.
//
// The bit lies within one sector that no other field of a running image shares a write with; a crash leaves the
// image marked or not, and otherwise as it is.
func (img *Image) refuseOverlap(e *CorruptError) error {
	if !img.host.failFirst(e) {
		return img.host.failure()
	}
	err := img.host.failure()
	if merr := img.markCorrupt(); merr != nil {
		err = errors.Join(err, fmt.Errorf("set the corrupt bit: %w", merr))
	}
	if img.onCorrupt != nil {
		img.onCorrupt(e)
	}
	return err
}

// markCorrupt sets the corrupt bit, which version 2 does not have. It writes past the check, and past the failure
// that keeps everybody else from writing.
func (img *Image) markCorrupt() error {
	img.featureMu.Lock()
	defer img.featureMu.Unlock()
	word := img.hdr.incompatible | incompatCorrupt
	off, p := img.hdr.encodeIncompatibleField(word)
	if len(p) == 0 {
		return nil
	}
	if _, err := img.host.s.WriteAt(p, off); err != nil {
		return err
	}
	img.hdr.incompatible = word
	if img.host.noSync {
		return nil
	}
	return img.host.s.Sync()
}

// highestUsed returns the host offset behind the last cluster in use, as the refcounts of the image file with
// header h tell, or, where the dirty bit says that they may be stale, its tables. Where that is not found out
// by reading maxEndSearch bytes, it is the end of the file.
func highestUsed(host *hostFile, h *header, size int64) uint64 {
	g := h.geometry()
	end := g.clusters(uint64(max(size, 0))) << g.clusterBits
	if h.dirty() {
		if at, ok := highestReferred(host, h, size); ok {
			return at
		}
		return end
	}
	if at, ok := highestCounted(host, h, uint64(max(size, 0))); ok {
		return at
	}
	return end
}

// maxEndSearch is how many bytes highestUsed reads at the most.
const maxEndSearch = 256 << 20

// highestCounted looks for the last refcount that is not zero, from the end of the refcount table backwards.
func highestCounted(host *hostFile, h *header, size uint64) (uint64, bool) {
	g := h.geometry()
	const piece = 64 << 10
	buf, block := make([]byte, min(piece, h.refTableBytes())), make([]byte, g.clusterSize)
	read := uint64(0)
	for end := min(h.refTableBytes(), max(size, h.refTableOff)-h.refTableOff) &^ 7; end > 0; {
		start := (end - 1) / piece * piece
		p := buf[:end-start]
		if host.readFull(p, h.refTableOff+start) != nil {
			return 0, false
		}
		for i := len(p) - 8; i >= 0; i -= 8 {
			off := binary.BigEndian.Uint64(p[i:])
			if off == 0 {
				continue
			}
			if read += g.clusterSize; g.offsetInCluster(off) != 0 || off >= maxHostOff || read > maxEndSearch || host.readFull(block, off) != nil {
				return 0, false
			}
			for j := g.perBlock(); j > 0; j-- {
				if refcountAt(block, g.refcountOrder, j-1) != 0 {
					return ((start+uint64(i))/8<<g.refBlockBits + j) << g.clusterBits, true
				}
			}
		}
		end = start
	}
	return 0, false
}

// highestReferred looks for the last cluster that a table names.
func highestReferred(host *hostFile, h *header, size int64) (uint64, bool) {
	c := newChecker(context.Background(), host, h, size, &CheckOptions{})
	c.endOnly = true
	if err := c.countAll(); err != nil || c.uncounted {
		return 0, false
	}
	return c.end, true
}
