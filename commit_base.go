package qcow2

import (
	"errors"
	"fmt"
)

// commitBase is the disk that a Commit writes, for as long as it does.
type commitBase struct {
	disk   WritableDisk
	parent *Image // whose backing disk it is

	// Where the library opened the disk, it is opened once more, for writing; else all of this is zero.
	old   backing // what parent had below it before, open for reading
	s     Storage // the second opening
	image *Image  // disk, unless it is a raw one
	moved []movedLock
}

// movedLock is a reader's lock of a storage whose place a writer's lock of a second opening of the same file has taken.
type movedLock struct {
	from, to Storage
	reader   LockRole
}

// take makes a reader's lock a writer's lock: of the second opening, which has a reader's lock of its own before the
// first one gives its up, so that nobody else comes in between.
func (m *movedLock) take(writer LockRole) error {
	if err := m.to.Lock(m.reader); err != nil {
		return err
	}
	if err := m.from.Unlock(); err != nil {
		return err
	}
	return m.to.Lock(writer)
}

// takeBase returns the disk depth levels below img, open for writing and in its place in the chain. Precondition: the
// caller is in exclusively. After an error everything is as it was.
func (img *Image) takeBase(depth int) (*commitBase, error) {
	parent, ours := img, true
	for level := 1; level < depth; level++ {
		next, ok := parent.below.disk.(*Image)
		if !ok {
			return nil, &OptionError{Option: "Depth", Value: depth, Reason: fmt.Sprintf("only %d images of the chain have something below them", level)}
		}
		ours = ours && parent.below.owned
		parent = next
	}
	b := &commitBase{parent: parent, old: parent.below}
	switch d := b.old.disk; {
	case b.old.missing != nil:
		return nil, b.old.missing
	case d == nil && depth > 1:
		return nil, &OptionError{Option: "Depth", Value: depth, Reason: fmt.Sprintf("the chain has %d levels below the image", depth-1)}
	case d == nil:
		return nil, ErrNoBacking
	case !b.old.owned:
		return b.takeCallers(d)
	case isForeign(d):
		return nil, fmt.Errorf("backing file %q: %w: %w: a format that is read only", b.old.ref.Name, ErrReadOnly, ErrUnsupported)
	case !ours:
		return nil, &OptionError{Option: "Depth", Value: depth, Reason: "the image above that disk is the caller's: commit it by itself"}
	}
	if err := b.open(); err != nil {
		return nil, fmt.Errorf("open backing file %q for writing: %w", b.old.ref.Name, err)
	}
	return b, nil
}

// takeCallers takes a disk of the caller's, which is written as it is.
func (b *commitBase) takeCallers(d Disk) (*commitBase, error) {
	if image, ok := d.(*Image); ok {
		if err := image.writable(); err != nil {
			return nil, fmt.Errorf("backing disk: %w", err)
		}
	}
	w, ok := d.(WritableDisk)
	if !ok {
		return nil, fmt.Errorf("backing disk: %w: a %T has no WriteAt and Sync", ErrReadOnly, d)
	}
	b.disk = w
	return b, nil
}

// open opens the backing file of parent once more, for writing, takes its lock over and puts it into its place.
func (b *commitBase) open() error {
	ref := b.old.ref
	ref.Writable = true
	s, err := resolve(b.old.resolver, ref)
	if err != nil {
		return err
	}
	b.s = s
	below := backing{owned: true, ref: b.old.ref, resolver: b.old.resolver}
	if old, ok := b.old.disk.(*ownedRaw); ok {
		var d *RawDisk
		if d, err = b.openRaw(old, s); err == nil {
			b.disk, below.disk = d, &ownedRaw{d, old.locked}
		}
	} else if err = b.openImage(b.old.disk.(*Image), s); err == nil {
		b.disk, below.disk = b.image, b.image
	}
	if err != nil {
		return errors.Join(err, b.undo())
	}
	return b.replace(below)
}

// openRaw opens the raw disk in s, for writing.
func (b *commitBase) openRaw(old *ownedRaw, s Storage) (*RawDisk, error) {
	if err := b.sameFile(old.s, s); err != nil {
		return nil, err
	}
	if err := b.takeLock(old.locked, old.s, s, LockRawReader, LockRawWriter); err != nil {
		return nil, err
	}
	return NewRawDisk(s)
}

// openImage opens the image in s, for writing. It shares with old, which is open for reading, the disk below and the
// cache of the chain.
func (b *commitBase) openImage(old *Image, s Storage) error {
	if err := b.sameFile(old.host.s, s); err != nil {
		return err
	}
	if err := b.takeLock(old.host.locked, old.host.s, s, LockReader, LockWriter); err != nil {
		return err
	}
	o := old.openedWith
	o.ReadWrite, o.Lock, o.Backing, o.test = true, LockOff, old.below.disk, b.parent.openedWith.test
	w, err := openQuietly(s, o, &chain{cache: old.m.cache})
	if err != nil {
		return err
	}
	b.image = w
	if w.m.id, err = w.m.cache.takeID(); err != nil { // nothing was cached under the one that it had
		return err
	}
	w.openedWith.Lock = old.openedWith.Lock
	if w.data == w.host {
		return nil
	}
	if err := b.sameFile(old.data.s, w.data.s); err != nil {
		return err
	}
	return b.takeLock(old.data.locked, old.data.s, w.data.s, LockDataReader, LockDataWriter)
}

// takeLock takes the lock over that from has as a reader, if it has one.
func (b *commitBase) takeLock(locked bool, from, to Storage, reader, writer LockRole) error {
	if !locked {
		return nil
	}
	b.moved = append(b.moved, movedLock{from: from, to: to, reader: reader})
	return b.moved[len(b.moved)-1].take(writer)
}

// sameFile refuses to write another file than the one that is being read: the name may lead elsewhere now.
func (b *commitBase) sameFile(reading, writing Storage) error {
	if x, y := reading.Identity(), writing.Identity(); x != nil && y != nil && x != y {
		return &ResolveError{Ref: b.old.ref, Reason: "it is another file than the one that is open"}
	}
	return nil
}

// undo closes the second opening, which has written nothing, and gives the first one its locks back.
func (b *commitBase) undo() error {
	errs := []error{b.shareLocks()}
	for _, m := range b.moved {
		errs = append(errs, m.from.Lock(m.reader))
	}
	if b.image != nil {
		errs = append(errs, b.image.Close())
		b.image.m.cache.giveID(b.image.m.id)
	}
	errs = append(errs, b.s.Close())
	// Where both openings share one storage, its lock went with the second.
	for _, m := range b.moved {
		errs = append(errs, m.from.Lock(m.reader))
	}
	return errors.Join(errs...)
}

// replace puts the second opening into the place of the first, which is closed. Whoever reads through that is waited
// for; who begins again finds the second one.
func (b *commitBase) replace(below backing) error {
	old, w := b.old.disk, b.image
	if w != nil {
		// What the first opening owns passes to the second, before anybody knows it.
		old := old.(*Image)
		w.ownsHost = true
		w.host.locked, w.info.Locked = old.host.locked, old.host.locked
		if w.data != w.host {
			w.data.locked = old.data.locked
		}
		w.below = old.below
		err := old.pausing(func() error {
			old.below.owned = false
			return nil
		})
		if err != nil {
			return err
		}
	}
	err := b.parent.pausing(func() error {
		b.parent.below = below
		return nil
	})
	if err == nil {
		err = b.old.release()
	}
	if w != nil {
		w.m.cache.forget(old.(*Image).m.id)
		w.m.cache.giveID(old.(*Image).m.id)
	}
	return err
}

// sync makes durable what was written.
func (b *commitBase) sync() error {
	if b.s != nil && b.image == nil && b.parent.openedWith.NoSync {
		return nil
	}
	if err := b.disk.Sync(); err != nil {
		return fmt.Errorf("backing disk: %w", err)
	}
	return nil
}

// end ends the writing: from now on the disk is read alone, with the lock of a reader. That goes for one that could not
// write everything back, too: it reads as it did, and its file is as after a crash.
func (b *commitBase) end() error {
	if b.s == nil {
		return nil
	}
	var err error
	if b.image != nil {
		if err = b.image.retire(); err != nil {
			err = fmt.Errorf("backing disk: %w", err)
		}
	}
	return errors.Join(err, b.shareLocks())
}

// shareLocks makes the locks of the second opening those of a reader.
func (b *commitBase) shareLocks() error {
	var errs []error
	for _, m := range b.moved {
		errs = append(errs, m.to.Lock(m.reader))
	}
	return errors.Join(errs...)
}

// retire writes everything back, as Close does, and makes the image one that is open for reading.
func (img *Image) retire() error {
	err := img.alone(func() error {
		img.mu.Lock()
		defer img.mu.Unlock()
		return errors.Join(img.endMarking(), img.padFile())
	})
	img.readOnly.Store(true)
	img.wb.stop()
	return err
}
