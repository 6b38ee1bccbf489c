package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// RebaseOptions says what an image's backing file is to be. The zero value is none.
type RebaseOptions struct {
	// BackingFile and BackingFormat are the name and format ("qcow2", "raw", ...) that the header gives for the new
	// backing file; the format is required with the name, and never guessed. "" for no backing file.
	BackingFile   string
	BackingFormat string
	// Unsafe changes the name and the format only: the caller knows that the new backing file reads as the old one
	// does, wherever the image itself holds nothing. It works without either file, on an image that was opened with
	// OpenOptions.NoBacking.
	Unsafe bool
	// Backing is the new backing disk. The caller closes it, after the image. Not with a BackingFile of "".
	Backing Disk
	// Resolver is asked for the new backing file if Backing is nil; the image closes what it opens. With neither, an
	// unsafe rebase leaves the image as OpenOptions.NoBacking does: reads of what it does not hold return
	// ErrBackingRequired.
	Resolver Resolver
	// Progress, if not nil, is called now and then with the guest bytes that were compared, of those that there are, and
	// at the end. Where another operation comes between, it begins again. It must not call the image.
	Progress func(done, total int64)
}

// validate returns all options that are not allowed, joined, or nil.
func (o *RebaseOptions) validate() error {
	var errs []error
	refuse := func(bad bool, option string, value any, reason string) {
		if bad {
			errs = append(errs, &OptionError{Option: option, Value: value, Reason: reason})
		}
	}
	refuse(o.BackingFile != "" && o.BackingFormat == "", "BackingFormat", "", "needed with BackingFile")
	refuse(o.BackingFile == "" && o.BackingFormat != "", "BackingFormat", o.BackingFormat, "needs BackingFile")
	refuse(o.BackingFile == "" && o.Backing != nil, "BackingFile", "", "needed with Backing")
	refuse(len(o.BackingFile) > maxBackingName, "BackingFile", o.BackingFile, "want at most 1023 bytes")
	refuse(len(o.BackingFormat) > maxBackingFormat, "BackingFormat", o.BackingFormat, "want at most 15 bytes")
	refuse(strings.ContainsRune(o.BackingFile, 0), "BackingFile", o.BackingFile, "want no NUL")
	refuse(strings.ContainsRune(o.BackingFormat, 0), "BackingFormat", o.BackingFormat, "want no NUL")
	refuse(!o.Unsafe && o.BackingFile != "" && o.Backing == nil && o.Resolver == nil, "Backing", nil, "needed, or Resolver, unless Unsafe")
	return errors.Join(errs...)
}

// Rebase gives the image another backing file, or none. Unless it is Unsafe, the guest sees the same afterwards: what
// the image does not hold itself and reads differently from the old and the new chain is copied into it, by clusters
// or subclusters; what was zeros becomes zero clusters, where the version has them. A backing file that is shorter than
// the disk reads as zeros behind its end. What both chains say to be zeros, and what one file decides that is part of both,
// is not read.
//
// Internal snapshots read through the new backing file too, where they hold nothing themselves: as with QEMU, what they
// show may change.
//
// Reads and writes go on while it copies; they wait for the moment of the change. Afterwards the live image reads
// through the new disk, and Backing returns it. The old one is closed if the library opened it; else it is the
// caller's to close.
//
// Until the header is switched, by one write, the image names the old backing file: an error, the end of ctx or a
// crash leaves that, and at worst copies of what it reads there. When Rebase returns nil, the change is durable.
//
// Errors: *OptionError; ErrHeaderFull, before anything is written, if the name does not fit; ErrChain if the image would lie below
// itself; ErrBackingRequired if the old backing file is not open; ErrReadOnly, ErrFailed, those of the resolver, of both disks, of ctx and of the storage.
func (img *Image) Rebase(ctx context.Context, opts *RebaseOptions) error {
	var o RebaseOptions
	if opts != nil {
		o = *opts
	}
	if err := img.rebase(ctx, &o); err != nil {
		return fmt.Errorf("qcow2: rebase: %w", err)
	}
	return nil
}

// rebase is Rebase without the words around the error.
func (img *Image) rebase(ctx context.Context, o *RebaseOptions) error {
	if err := o.validate(); err != nil {
		return err
	}
	if err := img.writable(); err != nil {
		return err
	}
	img.chainMu.Lock()
	defer img.chainMu.Unlock()
	r := &rebaser{img: img, ctx: ctx, o: o}
	// Whether the name fits is found out first.
	if err := img.alone(r.prepare); err != nil {
		return err
	}
	if err := r.open(); err != nil {
		return err
	}
	err := r.run()
	if err != nil {
		return errors.Join(err, r.below.release())
	}
	// What goes wrong now goes wrong with the old backing file, of which nothing is needed any more.
	return r.was.release()
}

// rebaser is one Rebase. The order is that of the image's own writes, and then one switch:
//
//	1  clusters whose content differs between the two chains are copied, as guest writes are     a cut: syncs
//	2  the header names the new backing file                                                      rewriteHeader
//	3  in memory, reads go to the new disk
//
// A crash before step 2 is durable leaves the old name: what was copied reads as what lies there. After it the new
// name, where whatever differs is durably in the image (I5). Nothing that the image holds is dropped.
type rebaser struct {
	img   *Image
	ctx   context.Context
	o     *RebaseOptions
	h     *header // of the image as it is, with the new names
	below backing // the new one
	was   backing // the old one, once it is not in use any more
	// unmaps says that guest requests can make the image let go of what it holds.
	unmaps bool
	told   uint64 // guest offset that Progress heard of last
}

// prepare finds out whether the image can have the new backing file. Only within alone.
func (r *rebaser) prepare() error {
	h := r.img.hdr
	if h.rawData() && r.o.BackingFile != "" {
		return &OptionError{Option: "BackingFile", Value: r.o.BackingFile, Reason: "a raw data file cannot show what lies below"}
	}
	if old := &r.img.below; !r.o.Unsafe && old.missing != nil {
		return fmt.Errorf("compare with the old backing file: %w", old.missing)
	}
	r.unmaps = h.version < 3
	r.h = h.clone()
	r.h.setBacking(r.o.BackingFile, r.o.BackingFormat)
	_, _, err := r.img.planRewrite(r.h)
	return err
}

// open opens the new backing disk, and refuses one that the image itself lies below.
func (r *rebaser) open() (err error) {
	img, o := r.img, r.o
	if o.BackingFile == "" {
		return nil
	}
	c := &chain{depth: 1, cache: newTableCache(defaultL2Cache, tableSliceBits)}
	for _, h := range []*hostFile{img.host, img.data} {
		if id := h.s.Identity(); id != nil {
			c.seen = append(c.seen, id)
		}
	}
	if diskUses(o.Backing, c.seen) || o.Backing == Disk(img) {
		return fmt.Errorf("%w: a file is its own backing file", ErrChain)
	}
	limits := img.limits
	open := OpenOptions{Backing: o.Backing, Resolver: o.Resolver, Limits: &limits, Name: img.openedWith.Name, NoSync: img.host.noSync,
		NoBacking: o.Backing == nil && o.Resolver == nil}
	if !img.host.locked {
		open.Lock = LockOff
	}
	r.below, err = openBacking(r.h, open, c)
	return err
}

// run copies and switches. At first guest writes go on while it copies. Where another operation on the whole image came
// between the copying and the switch, it copies again, and then keeps everybody out; so it does at once where guest
// requests can take clusters out of the image: version 2 without a backing file has no other way to discard.
func (r *rebaser) run() error {
	img := r.img
	if r.o.Unsafe {
		return img.alone(r.change)
	}
	if !r.unmaps {
		turns := img.turns.Load()
		if err := r.copy(false); err != nil {
			return err
		}
		done := false
		err := img.alone(func() error {
			if done = img.turns.Load() == turns+1; !done { // this turn is the one that follows
				return nil
			}
			return r.change()
		})
		if done || err != nil {
			return err
		}
	}
	all := clusterRange{first: 0, last: math.MaxUint64}
	img.reqs.lock(&all)
	defer img.reqs.unlock(&all)
	if err := r.copy(true); err != nil {
		return err
	}
	return img.aloneHeld(r.change)
}

// change is steps 2 and 3. Only within alone. What the guest sees does not change, or by the caller's word not, so
// that persistent bitmaps stay what they are.
func (r *rebaser) change() error {
	img := r.img
	if err := r.ctx.Err(); err != nil {
		return err
	}
	if err := r.prepare(); err != nil {
		return err
	}
	now, err := img.rewriteHeader(r.h)
	if err != nil {
		return err
	}
	return img.pausing(func() error {
		img.mu.Lock()
		defer img.mu.Unlock()
		img.featureMu.Lock()
		*img.hdr = *now
		img.featureMu.Unlock()
		r.was, img.below = img.below, r.below
		for d := range img.opened {
			d.disk.below = r.below
			d.disk.below.owned = false
		}
		img.refreshInfo()
		return nil
	})
}

// rebasePiece is the number of guest bytes that are compared at once, while their clusters are held; a cluster where that
// is larger.
const rebasePiece = 1 << 20

// copy is step 1. The caller holds all clusters, or none.
func (r *rebaser) copy(held bool) error {
	if r.img.wb.test.amendSkip == amendSyncCopy {
		return nil
	}
	was, will := r.img.lower().disk, r.below.disk
	layers := [2][]layer{layersOf(was), layersOf(will)}
	// The disk may grow meanwhile.
	for off, end := uint64(0), r.img.size.Load(); off < end; off, end = end, r.img.size.Load() {
		if err := r.copyUpTo(newExtentPair(was, will, int64(off), int64(end)), layers, off, end, held); err != nil {
			return err
		}
	}
	return nil
}

// copyUpTo copies what differs from off up to end, by the extents of both chains. What both say to be zeros is passed
// over, and what one layer decides in both: the common part of two chains is not read.
func (r *rebaser) copyUpTo(p *extentPair, layers [2][]layer, off, end uint64, held bool) error {
	defer p.stop()
	m := r.img.m
	x, y := &p.sides[0].e, &p.sides[1].e
	copied := m.clusterStart(off)
	for off < end {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		last, _, err := p.seek(int64(off))
		if err != nil {
			return fmt.Errorf("backing file: %w", err)
		}
		// Whole clusters are copied; those up to copied are done.
		next := min(uint64(last), end)
		if same := x.Kind.readsZero() && y.Kind.readsZero() || sameLayer(x, y, layers); !same {
			from, to := max(copied, m.clusterStart(off)), min(m.clusterStart(next+m.clusterSize-1), end)
			if err := r.copyClusters(from, to, held); err != nil {
				return err
			}
			copied, next = to, to
		}
		off = next
		r.progress(off)
	}
	return nil
}

// copyClusters copies what differs of the clusters from off up to end, piece by piece.
func (r *rebaser) copyClusters(off, end uint64, held bool) error {
	img := r.img
	m := img.m
	perSlice := uint64(1) << (m.sliceBits - m.l2EntryBits + m.clusterBits)
	for off < end {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		n := min(max(rebasePiece, m.clusterSize), perSlice-off&(perSlice-1), end-off)
		seen := m.alloc.released.Load()
		err := r.copyPiece(off, n, held)
		if err == nil {
			err = img.relieve()
		}
		if err != nil {
			if isNoSpace(err) && img.reclaim(seen) {
				continue
			}
			return err
		}
		off += n
		r.progress(off)
	}
	return nil
}

// progress tells that everything before off was compared, now and then.
func (r *rebaser) progress(off uint64) {
	size := r.img.size.Load()
	if off = min(off, size); r.o.Progress != nil && (off-r.told >= size/1000 || off < r.told || off == size) {
		r.told = off
		r.o.Progress(int64(off), int64(size))
	}
}

// copyPiece copies what differs of the n guest bytes at off, which lie within the reach of one L2 slice. Their clusters
// are held, so that what the image does not hold now it does not hold until the copies are made.
func (r *rebaser) copyPiece(off, n uint64, held bool) error {
	img := r.img
	m := img.m
	if !held {
		piece := clusterRange{first: off >> m.clusterBits, last: (off + n - 1) >> m.clusterBits}
		img.reqs.lock(&piece)
		defer img.reqs.unlock(&piece)
	}
	defer img.reqs.leave(img.reqs.enter())
	if err := img.writable(); err != nil {
		return err
	}
	end := min(off+n, img.size.Load())
	for at := off; at < end; {
		x, err := m.resolve(at, end-at)
		if err != nil {
			return err
		}
		if x.kind == kindUnallocated {
			if err := r.copyRange(at, x.n); err != nil {
				return fmt.Errorf("guest %#x: %w", at, err)
			}
		}
		at += x.n
	}
	return nil
}

// copyRange copies what differs of the n guest bytes at off, which the image does not hold. Their clusters are held.
func (r *rebaser) copyRange(off, n uint64) error {
	img := r.img
	buf := getBuffer(2 * n)
	defer putBuffer(buf)
	was, will := (*buf)[:n], (*buf)[n:]
	if err := img.readBacking(was, off); err != nil {
		return err
	}
	if err := r.below.read(will, off); err != nil {
		return err
	}
	unit := uint64(1) << img.m.subBits
	for at := uint64(0); at < n; {
		k := min(unit-(off+at)&(unit-1), n-at)
		if bytes.Equal(was[at:at+k], will[at:at+k]) {
			at += k
			continue
		}
		// As many units as differ, and are zeros or are not, in one go.
		zeros := isZero(was[at : at+k])
		end := at + k
		for end < n {
			k := min(unit, n-end)
			if bytes.Equal(was[end:end+k], will[end:end+k]) || isZero(was[end:end+k]) != zeros {
				break
			}
			end += k
		}
		var err error
		if zeros && !img.m.version2 {
			err = img.zeroUnallocated(off+at, end-at)
		} else {
			err = img.writeHeld(was[at:end], off+at)
		}
		if err != nil {
			return err
		}
		at = end
	}
	return nil
}

// writeHeld writes p at guestOff, which lies within the reach of one L2 slice; the caller holds its clusters and is
// registered.
func (img *Image) writeHeld(p []byte, guestOff uint64) error {
	m := img.m
	for len(p) > 0 {
		last := (guestOff + uint64(len(p)) - 1) >> m.clusterBits
		entries, err := m.entries(guestOff, last-guestOff>>m.clusterBits+1)
		if err != nil {
			return err
		}
		n := 0
		if m.owned(entries[0]) {
			k := min(uint64(len(p)), m.clusterSize-m.offsetInCluster(guestOff))
			n, err = img.writeOwned(p[:k], guestOff, entries[0])
		} else {
			k := slices.IndexFunc(entries, m.owned)
			if k < 0 {
				k = len(entries)
			}
			most := min(uint64(len(p)), uint64(k)<<m.clusterBits-m.offsetInCluster(guestOff))
			n, err = img.writeFresh(p[:most], guestOff, entries[:k])
		}
		if err != nil {
			return err
		}
		p, guestOff = p[n:], guestOff+uint64(n)
	}
	return nil
}

// zeroUnallocated makes n guest bytes at guestOff read as zeros, whole units of allocation (a cluster or subcluster; the
// disk may end in the last) within the reach of one L2 slice, none of which the image holds. The caller holds their
// clusters and is registered. Only entries change: a crash leaves each old or new.
func (img *Image) zeroUnallocated(guestOff, n uint64) error {
	m := img.m
	first, last := guestOff>>m.clusterBits, (guestOff+n-1)>>m.clusterBits
	entries, err := m.entries(guestOff, last-first+1)
	if err != nil {
		return err
	}
	for j := range entries {
		if !m.extendedL2 {
			entries[j].word = flagZero
			continue
		}
		start := (first + uint64(j)) << m.clusterBits
		lo, hi := max(guestOff, start)-start, min(guestOff+n, start+m.clusterSize)-start
		mask := subclusterMask(lo>>m.subBits, (hi-1)>>m.subBits)
		entries[j].bitmap = entries[j].bitmap&^mask | mask<<32
	}
	return m.update(guestOff, img.flush, func(words []uint64, i uint64) {
		for j, e := range entries {
			m.setEntry(words, i+uint64(j), e)
		}
	})
}
