package qcow2

import (
	"errors"
	"fmt"
	"math"
)

// The operations on an image as a whole, snapshots, resizing, emptying and the like, have three tools here:
// exclusively keeps everybody else from changing the image, pausing keeps readers out too while the structure in
// memory is exchanged, and switchHeader is the one write that exchanges it on disk. All of them follow one
// pattern: what is new is written beside what is in force, and made durable; one write inside the header's first
// sector switches; what was in force is freed afterwards. A crash before the switch leaves the old structure, one
// after it the new one, and at worst leaks.

// exclusively runs f as the only one who changes the image, as alone does, once the bitmaps are marked: f changes
// what the guest sees, or the structure that it is in (I9).
func (img *Image) exclusively(f func() error) error {
	if err := img.writable(); err != nil {
		return err
	}
	if err := img.start(); err != nil {
		return err
	}
	return img.alone(f)
}

// alone runs f as the only one who changes the image. All guest clusters are held, so no guest write is in
// flight or begins; the write-back is held, so that a Sync waits; nothing in memory is dirty and nothing waits to be
// freed: what the host holds, durably, is exactly what the memory says, refcounts included, and the dirty bit is
// off. Reads go on, with what they find.
//
// f may write to the host in an order of its own, may use the allocator under mu, and may call writeCut, without
// mu, to bring what it changed in memory to the host. It holds no registration, and must not make one while it
// pauses. What else guards by mu it changes under mu. The lock order is: guest clusters, write-back, startMu, mu.
//
// Errors: why the image takes no writes (writable), those of the write-back, and that of f.
func (img *Image) alone(f func() error) error {
	all := clusterRange{first: 0, last: math.MaxUint64}
	img.reqs.lock(&all)
	defer img.reqs.unlock(&all)
	return img.aloneHeld(f)
}

// aloneHeld is alone for who holds all guest clusters already, and is not registered.
func (img *Image) aloneHeld(f func() error) error {
	if err := img.writable(); err != nil {
		return err
	}
	if err := img.flush(); err != nil {
		return err
	}
	img.wb.hold()
	defer img.wb.letGo()
	img.startMu.Lock()
	defer img.startMu.Unlock()
	if err := img.settle(); err != nil {
		return err
	}
	img.turns.Add(1)
	return f()
}

// settle ends what a cut left over: it waits for the requests that may use dropped clusters, releases those, and
// makes all refcounts durable; then the dirty bit has nothing left to say. Preconditions: those of f in alone.
//
// Order: refcounts, sync; the dirty bit off, sync. A crash or an error before the end leaves the bit set.
func (img *Image) settle() error {
	img.mu.Lock()
	defer img.mu.Unlock()
	if n := len(img.wb.limbo); n > 0 {
		img.reqs.waitPast(img.wb.limbo[n-1].epoch)
	}
	if err := errors.Join(img.releaseAll(), img.m.alloc.writeBack()); err != nil {
		return err
	}
	if !img.wb.dirty && !img.wb.lowered {
		return nil
	}
	if err := img.host.sync(); err != nil {
		return err
	}
	img.wb.lowered = false
	if !img.wb.dirty {
		return nil
	}
	if err := img.setDirty(false); err != nil {
		return err
	}
	return img.host.sync()
}

// pausing runs f while no request is registered: reads wait, too. It is for the moment in which what they find is
// exchanged in memory. Precondition: the caller is in exclusively, and f makes no request of this image.
func (img *Image) pausing(f func() error) error {
	img.reqs.pause()
	defer img.reqs.resume()
	return f()
}

// switchHeader writes p at off, inside the header's first sector, and makes it durable: the one write that switches
// from one structure to another. Preconditions: everything that p names is durable, and the caller is in
// exclusively.
//
// A crash leaves the old bytes or the new ones. If the write fails, the old bytes are written again, durably, so
// that the call changed nothing; where this fails too, or the sync does, nobody knows what the header names, and
// the image is failed (I6): both structures are whole, so the next open finds one of them.
func (img *Image) switchHeader(off int64, p []byte) error {
	if off < 0 || int64(len(p)) > sectorSize-off {
		return fmt.Errorf("switch %d bytes of the header at %#x: %w", len(p), off, ErrRange)
	}
	old := make([]byte, len(p))
	if err := img.host.readFull(old, uint64(off)); err != nil {
		return err
	}
	if err := img.host.writeHeader(off, p); err != nil {
		err = fmt.Errorf("switch the header: %w", err)
		if img.host.failure() != nil {
			return err
		}
		if back := img.host.writeHeader(off, old); back != nil {
			return img.host.fail(errors.Join(err, fmt.Errorf("put the old header back: %w", back)))
		}
		return errors.Join(err, img.host.sync())
	}
	return img.host.sync()
}

// reload reads the header and all tables again: after a repair, and after an operation that ended with an error, so
// that what is in memory is what the host holds. Where this fails the image is failed, since it must not write by
// tables that may be stale. Preconditions: the caller is in exclusively, and nothing is dirty.
func (img *Image) reload() error {
	err := img.pausing(img.reloadPaused)
	if err != nil {
		err = img.host.fail(fmt.Errorf("read the tables again: %w", err))
	}
	return err
}

// reloadPaused is reload for who pauses already.
func (img *Image) reloadPaused() error {
	img.mu.Lock()
	defer img.mu.Unlock()
	s := img.host.s
	size, err := s.Size()
	if err != nil {
		return err
	}
	h, err := readHeader(s, size)
	if err != nil {
		return err
	}
	if err := h.validate(img.limits); err != nil {
		return err
	}
	img.featureMu.Lock()
	*img.hdr = *h
	img.wb.dirty = h.dirty()
	img.featureMu.Unlock()
	img.size.Store(h.virtualSize())
	img.lazy = h.lazyRefcounts()

	m := img.m
	// The rest of the geometry does not change, and is read without a registration.
	g := h.geometry()
	m.refcountOrder, m.refBlockBits, m.version2 = g.refcountOrder, g.refBlockBits, h.version < 3
	m.cache.forget(m.id)
	img.decoded.forget()
	l1, err := readTable(img.host, h.l1Off, uint64(h.l1Size), uint64(size))
	if err != nil {
		return fmt.Errorf("L1 table: %w", err)
	}
	m.l1, m.l1Off = l1, h.l1Off
	clear(m.l1Dirty)
	clusters := uint64(h.refTableClusters)
	t, err := readTable(img.host, h.refTableOff, clusters<<m.clusterBits/8, uint64(size))
	if err != nil {
		return fmt.Errorf("refcount table: %w", err)
	}
	m.alloc.reload(m.geometry, t, h.refTableOff, clusters)
	if img.snapshots, err = readSnapshotTable(s, size, h, img.limits); err != nil {
		return err
	}
	img.reloadSnapshots(uint64(size))
	img.refreshInfo()
	return img.watchMetadata()
}

// refreshInfo makes Info say what the header says now; EndOffset stays as of open. Precondition: mu.
func (img *Image) refreshInfo() {
	info := img.hdr.info()
	info.Locked, info.EndOffset = img.info.Locked, img.info.EndOffset
	img.info = info
}
