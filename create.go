package qcow2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/go-qcow2/qcow2/internal/hostfile"
)

// Create creates an image file called name with a disk of size bytes, a multiple of 512, and opens it for
// reading and writing. When it returns, the empty image and its name are durable.
//
// Errors: fs.ErrExist if the file exists and opts.Overwrite is not set, *OptionError for options that are
// not allowed (all of them, joined), ErrHeaderFull if the names do not fit, ErrTooLarge for a size beyond the
// format, ErrLocked if an existing file is in use, and those of the file system. Options are checked and the
// lock is taken before an existing file is touched; a file that Create made is removed after an error.
func Create(name string, size int64, opts *CreateOptions) (*Image, error) {
	o := createOptionsOf(opts)
	if _, err := createHeader(size, &o); err != nil {
		return nil, fmt.Errorf("qcow2: create: %w", err)
	}
	flag := os.O_RDWR | os.O_CREATE | os.O_EXCL
	s, err := OpenFileStorage(name, flag, 0o666)
	made := err == nil
	if o.Overwrite && errors.Is(err, fs.ErrExist) {
		s, err = OpenFileStorage(name, os.O_RDWR, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("qcow2: create: %w", err)
	}
	if o.Open.Name == "" {
		o.Open.Name = filepath.Base(name)
	}
	img, err := create(s, size, &o, &chain{ownsTop: true})
	if err == nil && made {
		if err = hostfile.SyncDir(filepath.Dir(name)); err != nil {
			if errors.Is(err, errors.ErrUnsupported) {
				return img, nil
			}
			err = errors.Join(fmt.Errorf("qcow2: create: sync directory: %w", err), img.Abandon())
		}
	}
	if err != nil && made {
		err = errors.Join(err, os.Remove(name))
	}
	if err != nil {
		return nil, err
	}
	return img, nil
}

// CreateStorage creates an image in s, as Create does, and opens it for reading and writing. s stays the
// caller's to close after the image. A storage that is not empty is fs.ErrExist unless opts.Overwrite is
// set; a block device is never empty.
func CreateStorage(s Storage, size int64, opts *CreateOptions) (*Image, error) {
	o := createOptionsOf(opts)
	return create(s, size, &o, &chain{})
}

// createOptionsOf returns a copy of opts whose Open is set, for writing.
func createOptionsOf(opts *CreateOptions) CreateOptions {
	var o CreateOptions
	if opts != nil {
		o = *opts
	}
	open := optionsOf(o.Open)
	open.ReadWrite = true
	if o.BackingFile != "" && open.Resolver == nil && open.Backing == nil {
		open.NoBacking = true
	}
	o.Open = &open
	return o
}

// createHeader returns the header of a new image, after checking size and options.
func createHeader(size int64, o *CreateOptions) (*header, error) {
	if size < 0 {
		return nil, &OptionError{Option: "size", Value: size, Reason: "must not be negative"}
	}
	if o.DataFile != "" && o.Open.DataFile == nil && o.Open.Resolver == nil {
		return nil, &FileRequiredError{
			Ref:  FileRef{Image: o.Open.Name, Name: o.DataFile, Format: "raw", Kind: KindData, Writable: true},
			Hint: "CreateOptions.Open.DataFile or CreateOptions.Open.Resolver",
		}
	}
	return newHeader(uint64(size), o)
}

// create lays an image out in s and opens it. It closes s after an error if the chain owns it.
func create(s Storage, size int64, o *CreateOptions, c *chain) (*Image, error) {
	unlock, err := createIn(s, size, o)
	if err == nil {
		var img *Image
		if img, err = open(s, *o.Open, c); err == nil {
			return img, nil
		}
		return nil, errors.Join(err, unlock())
	}
	if c.ownsTop {
		err = errors.Join(err, s.Close())
	} else {
		err = errors.Join(err, s.Unlock())
	}
	return nil, fmt.Errorf("qcow2: create %s: %w", o.Open.Name, err)
}

// createIn lays an image out in s and makes it durable. The lock of a data file that is the caller's stays held,
// for the open that follows; unlock gives it back. After an error it has been given back.
func createIn(s Storage, size int64, o *CreateOptions) (unlock func() error, err error) {
	unlock = func() error { return nil }
	h, err := createHeader(size, o)
	if err != nil {
		return unlock, err
	}
	l, err := planLayout(h)
	if err != nil {
		return unlock, err
	}
	if _, err := lockStorage(s, lockRole(LockReader, LockWriter, *o.Open), o.Open.Lock); err != nil {
		return unlock, err
	}
	if err := checkEmpty(s, o); err != nil {
		return unlock, err
	}
	if !h.hasDataFile() {
		l.h, err = unmake(s, o.Open.NoSync)
		if err != nil {
			return unlock, err
		}
		return unlock, l.write(h)
	}
	data, owned, err := takeData(o)
	if err != nil {
		return unlock, fmt.Errorf("data file: %w", err)
	}
	giveBack := data.Unlock
	if owned {
		giveBack = data.Close
	} else {
		unlock = giveBack
	}
	if l.h, err = unmake(s, o.Open.NoSync); err == nil {
		if err = emptyData(data, h, o.Open.NoSync); err != nil {
			err = fmt.Errorf("data file: %w", err)
		} else {
			err = l.write(h)
		}
	}
	if err != nil || owned {
		err = errors.Join(err, giveBack())
	}
	return unlock, err
}

// unmake makes of s what is no image, durably, if it holds anything, and empties it if that can be. The first
// sector decides, and goes in one piece: a crash leaves an earlier image whole, or none, and nothing that
// belongs to it may be touched before.
func unmake(s Storage, noSync bool) (*hostFile, error) {
	size, err := s.Size()
	if err != nil {
		return nil, err
	}
	host := newHostFile(s, size, noSync)
	if size == 0 {
		return host, nil
	}
	if err := host.zero(useHeader, 0, min(sectorSize, uint64(size))); err != nil {
		return nil, err
	}
	if err := host.sync(); err != nil || host.fixed {
		return host, err
	}
	if err := s.Truncate(0); err != nil {
		return nil, err
	}
	host.pristine.Store(0)
	return host, host.sync()
}

// checkEmpty refuses a storage that holds something, unless it may be overwritten.
func checkEmpty(s Storage, o *CreateOptions) error {
	n, err := s.Size()
	if err == nil && n > 0 && !o.Overwrite {
		err = fmt.Errorf("%w: it holds %d bytes", fs.ErrExist, n)
	}
	return err
}

// takeData returns the storage of the external data file, locked and checked but untouched, and whether the
// library is to close it.
func takeData(o *CreateOptions) (s Storage, owned bool, err error) {
	if s = o.Open.DataFile; s == nil {
		owned = true
		s, err = o.Open.Resolver.Resolve(FileRef{Image: o.Open.Name, Name: o.DataFile, Format: "raw", Kind: KindData, Writable: true})
		if err != nil {
			return nil, false, err
		}
	}
	_, err = lockStorage(s, lockRole(LockRawReader, LockDataWriter, *o.Open), o.Open.Lock)
	if err == nil {
		if err = checkEmpty(s, o); err == nil {
			return s, owned, nil
		}
		err = errors.Join(err, s.Unlock())
	}
	if owned {
		err = errors.Join(err, s.Close())
	}
	return nil, false, err
}

// emptyData makes the external data file in s an empty disk, durably. No image names it any more.
func emptyData(s Storage, h *header, noSync bool) error {
	data := &hostFile{s: s, fixed: s.FixedSize(), noSync: noSync}
	if data.fixed {
		// Only a raw data file must read as zeros where nothing is mapped.
		if !h.rawData() {
			return nil
		}
		if err := data.zero(useData, 0, h.size); err != nil {
			return err
		}
		return data.sync()
	}
	if err := s.Truncate(0); err != nil {
		return err
	}
	if err := s.Truncate(int64(h.size)); err != nil {
		return err
	}
	return data.sync()
}

// layout is where the parts of a new image stand, as host cluster indexes, in this order: header, refcount
// table, refcount blocks, L1 table and, for a raw data file, L2 tables that map all of it, so that who writes to
// the data file alone is seen through the image too.
type layout struct {
	g                          geometry
	h                          *hostFile // set before write
	rc                         refcountSize
	table, blocks, l1, l2, end uint64
	l1Entries, l2Tables        uint64
}

// planLayout finds the places for an image with header h, and names them in it.
func planLayout(h *header) (*layout, error) {
	g := h.geometry()
	l := &layout{g: g, table: 1, l1Entries: g.l1Entries(h.virtualSize())}
	l1Clusters := g.clusters(8 * l.l1Entries)
	if h.rawData() {
		l.l2Tables = l.l1Entries
	}
	var err error
	if l.rc, err = g.sizeRefcounts(0, 1+l1Clusters+l.l2Tables, false); err != nil {
		return nil, err
	}
	l.blocks = l.table + l.rc.tableClusters
	l.l1 = l.blocks + l.rc.blocks
	l.l2 = l.l1 + l1Clusters
	l.end = l.l2 + l.l2Tables
	h.refTableOff, h.refTableClusters = l.table<<g.clusterBits, uint32(l.rc.tableClusters)
	h.l1Size = uint32(l.l1Entries)
	if l.l1Entries > 0 {
		h.l1Off = l.l1 << g.clusterBits
	}
	return l, nil
}

// write writes the new image to l.h, which was unmade.
//
// Order: the tables, and what the header has behind its first sector, sync; the first sector, which makes it an
// image, sync. A crash before the last step leaves no image.
func (l *layout) write(h *header) error {
	b, err := h.encode()
	if err != nil {
		return err
	}
	first := make([]byte, l.g.clusterSize)
	copy(first, b)
	if err := l.writeRefcounts(); err != nil {
		return err
	}
	if err := l.writeL1(); err != nil {
		return err
	}
	for i := range l.l2Tables {
		if err := l.writeIdentityL2(i, h.virtualSize()); err != nil {
			return err
		}
	}
	if l.g.clusterSize > sectorSize {
		if err := l.h.write(useHeader, first[sectorSize:], sectorSize); err != nil {
			return err
		}
	}
	if err := l.h.sync(); err != nil {
		return err
	}
	if err := l.h.write(useHeader, first[:sectorSize], 0); err != nil {
		return err
	}
	return l.h.sync()
}

// writeRefcounts writes the refcount table and the blocks: every cluster before end has one reference.
func (l *layout) writeRefcounts() error {
	t := newTable(l.rc.tableClusters << l.g.clusterBits / 8)
	block := make([]byte, l.g.clusterSize)
	for i := range l.rc.blocks {
		t.store(i, (l.blocks+i)<<l.g.clusterBits)
		lo := i << l.g.refBlockBits
		clear(block)
		for ci := lo; ci < min(l.end, lo+1<<l.g.refBlockBits); ci++ {
			setRefcountAt(block, l.g.refcountOrder, ci-lo, 1)
		}
		if err := l.h.write(useRefcountBlock, block, (l.blocks+i)<<l.g.clusterBits); err != nil {
			return err
		}
	}
	for i := range l.rc.tableClusters {
		t.encode(block, i<<l.g.clusterBits/8)
		if err := l.h.write(useRefcountTable, block, (l.table+i)<<l.g.clusterBits); err != nil {
			return err
		}
	}
	return nil
}

// writeL1 writes the L1 table, whose entries are zero, or have their L2 tables behind it.
func (l *layout) writeL1() error {
	if l.l2Tables == 0 && l.h.readsZero(l.l1<<l.g.clusterBits) {
		// The table is there by the file's size.
		return l.h.s.Truncate(int64(l.end << l.g.clusterBits))
	}
	t := newTable(l.l1Entries)
	for i := range l.l2Tables {
		t.store(i, (l.l2+i)<<l.g.clusterBits|flagCopied)
	}
	buf := make([]byte, l.g.clusterSize)
	for ci := l.l1; ci < l.l2; ci++ {
		t.encode(buf, (ci-l.l1)<<l.g.clusterBits/8)
		if err := l.h.write(useL1, buf, ci<<l.g.clusterBits); err != nil {
			return err
		}
	}
	return nil
}

// writeIdentityL2 writes L2 table i, which maps each guest cluster of a disk of size bytes to the same
// offset of the data file.
func (l *layout) writeIdentityL2(i, size uint64) error {
	buf := make([]byte, l.g.clusterSize)
	r := entryRules{geometry: l.g, external: true}
	for j := uint64(0); j < 1<<l.g.l2Bits; j++ {
		guestOff := (i<<l.g.l2Bits + j) << l.g.clusterBits
		if guestOff >= size {
			break
		}
		r.putEntry(buf, j, l2Entry{word: guestOff | flagCopied, bitmap: bitmapAllocated})
	}
	return l.h.write(useL2, buf, (l.l2+i)<<l.g.clusterBits)
}
