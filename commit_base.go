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
	old   backing // what parent had below it, open for reading
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

// back makes the lock one of readers again, of both openings.
func (m *movedLock) back() error {
	return errors.Join(m.to.Lock(m.reader), m.from.Lock(m.reader))
}

// takeBase returns the disk depth levels below img, open for writing and in its place in the chain. Precondition: the
// caller is in exclusively. After an error everything is as it was.
func (img *Image) takeBase(depth int) (*commitBase, error) {
	parent, ours := img, true
	for level := 1; level < depth; level++ {
		next, ok := parent.below.disk.(*Image)
		if !ok {
			return nil, &OptionError{Option: "Depth", Value: depth, Reason: fmt.Sprintf("there are %d images above the last disk of the chain", level)}
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
		// The caller's: written as it is.
		w, ok := d.(WritableDisk)
		if image, isImage := d.(*Image); isImage {
			if err := image.writable(); err != nil {
				return nil, fmt.Errorf("backing disk: %w", err)
			}
		}
		if !ok {
			return nil, fmt.Errorf("backing disk: %w: a %T has no WriteAt and Sync", ErrReadOnly, d)
		}
		return &commitBase{disk: w, parent: parent}, nil
	case !ours:
		return nil, &OptionError{Option: "Depth", Value: depth, Reason: "the image above that disk is the caller's: commit it by itself"}
	}
	if err := b.open(); err != nil {
		return nil, fmt.Errorf("open backing file %q for writing: %w", b.old.ref.Name, err)
	}
	return b, nil
}

// open opens the backing file of parent once more, for writing, takes its lock over and puts it into its place.
func (b *commitBase) open() error {
	ref := b.old.ref
	ref.Writable = true
	s, err := resolve(b.parent.opened.Resolver, ref)
	if err != nil {
		return err
	}
	b.s = s
	if err := b.openIn(s); err != nil {
		return errors.Join(err, b.close())
	}
	return b.replace(backing{disk: b.disk, ref: b.old.ref}, b.old.disk)
}

// replace makes below what parent has below it, instead of the disk before. Whoever reads through that is waited for;
// who begins again finds the new one, or that the old one is closed.
func (b *commitBase) replace(below backing, before Disk) error {
	err := b.parent.pausing(func() error {
		b.parent.below = below
		return nil
	})
	if image, ok := before.(*Image); ok && err == nil {
		image.closed.Store(true)
		image.reqs.drain()
	}
	return err
}

// openIn makes the disk in s.
func (b *commitBase) openIn(s Storage) error {
	if old, ok := b.old.disk.(*ownedRaw); ok {
		if err := b.sameFile(old.s, s); err != nil {
			return err
		}
		if b.parent.opened.Lock != LockOff {
			b.moved = append(b.moved, movedLock{from: old.s, to: s, reader: LockRawReader})
		}
		if _, err := lockStorage(s, LockRawWriter, b.parent.opened.Lock); err != nil {
			return err
		}
		d, err := NewRawDisk(s)
		b.disk = d
		return err
	}
	old := b.old.disk.(*Image)
	if err := b.sameFile(old.host.s, s); err != nil {
		return err
	}
	if err := b.takeLock(old.host, s, LockReader, LockWriter); err != nil {
		return err
	}
	o := old.opened
	o.ReadWrite, o.Lock, o.Backing, o.test = true, LockOff, old.below.disk, b.parent.opened.test
	w, err := openQuietly(s, o, &chain{})
	if err != nil {
		return err
	}
	b.disk, b.image = w, w
	if w.data == w.host {
		return nil
	}
	if err := b.sameFile(old.data.s, w.data.s); err != nil {
		return err
	}
	return b.takeLock(old.data, w.data.s, LockDataReader, LockDataWriter)
}

// takeLock takes the lock over that the host file from has as a reader, if it has one.
func (b *commitBase) takeLock(from *hostFile, to Storage, reader, writer LockRole) error {
	if !from.locked {
		return nil
	}
	b.moved = append(b.moved, movedLock{from: from.s, to: to, reader: reader})
	return b.moved[len(b.moved)-1].take(writer)
}

// sameFile refuses to write another file than the one that is being read: the name may lead elsewhere now.
func (b *commitBase) sameFile(reading, writing Storage) error {
	if x, y := reading.Identity(), writing.Identity(); x != nil && y != nil && x != y {
		return &ResolveError{Ref: b.old.ref, Reason: "it is another file than the one that is open"}
	}
	return nil
}

// sync makes durable what was written.
func (b *commitBase) sync() error {
	if b.image == nil && b.s != nil && b.parent.opened.NoSync {
		return nil
	}
	if err := b.disk.Sync(); err != nil {
		return fmt.Errorf("backing disk: %w", err)
	}
	return nil
}

// giveBack ends the writing: the first opening is read again, and the second one is closed. Where the first one cannot
// be read, the second one stays in its place.
func (b *commitBase) giveBack() error {
	if b.s == nil {
		return nil
	}
	var errs []error
	if b.image != nil {
		// What is on disk is what will be read.
		errs = append(errs, b.image.alone(func() error { return nil }))
	}
	disk, err := b.reread()
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("read the backing file again: %w", err), b.stay())...)
	}
	return errors.Join(append(errs, b.replace(backing{disk: disk, owned: true, ref: b.old.ref}, nil), b.close())...)
}

// reread returns the disk of the first opening as it is now, for reading. It takes everything over that the disk before
// had.
func (b *commitBase) reread() (Disk, error) {
	if old, ok := b.old.disk.(*ownedRaw); ok {
		d, err := NewRawDisk(old.s)
		return &ownedRaw{d}, err
	}
	old := b.old.disk.(*Image)
	o := old.opened
	o.Lock, o.Backing = LockOff, old.below.disk
	if old.data != old.host {
		o.DataFile = old.data.s
	}
	old.m.cache.forget(old.m.id)
	r, err := openQuietly(old.host.s, o, &chain{cache: old.m.cache})
	if err != nil {
		return nil, err
	}
	r.m.id = old.m.id
	r.opened, r.below = old.opened, old.below
	r.ownsHost, r.ownsData = old.ownsHost, old.ownsData
	r.host.locked, r.data.locked, r.info.Locked = old.host.locked, old.data.locked, old.info.Locked
	return r, nil
}

// stay leaves the second opening in its place, for good, and closes the first.
func (b *commitBase) stay() error {
	below := backing{disk: b.disk, owned: true, ref: b.old.ref}
	if old, ok := b.old.disk.(*ownedRaw); ok {
		below.disk = &ownedRaw{b.disk.(*RawDisk)}
		return errors.Join(b.replace(below, nil), old.Close())
	}
	old := b.old.disk.(*Image)
	b.image.ownsHost = true
	b.image.below.owned, old.below.owned = old.below.owned, false
	return errors.Join(b.replace(below, nil), old.release())
}

// close closes the second opening, and gives the locks back that it took over.
func (b *commitBase) close() error {
	var errs []error
	each := func(f func(m *movedLock)) {
		for i := range b.moved {
			f(&b.moved[i])
		}
	}
	each(func(m *movedLock) {
		if m.to != b.s { // the image closes it
			errs = append(errs, m.back())
		}
	})
	if b.image != nil {
		errs = append(errs, b.image.Close())
	}
	each(func(m *movedLock) {
		if m.to == b.s {
			errs = append(errs, m.back())
		}
	})
	errs = append(errs, b.s.Close())
	// Where both openings share one storage, its lock went with the second.
	each(func(m *movedLock) { errs = append(errs, m.from.Lock(m.reader)) })
	return errors.Join(errs...)
}
