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
	data, err := createIn(s, size, o)
	if err != nil {
		if c.ownsTop {
			err = errors.Join(err, s.Close())
		} else {
			err = errors.Join(err, s.Unlock())
		}
		err = fmt.Errorf("qcow2: create %s: %w", o.Open.Name, err)
	} else {
		var img *Image
		if img, err = open(s, *o.Open, c); err == nil {
			return img, nil
		}
	}
	if data != nil {
		err = errors.Join(err, data.Unlock())
	}
	return nil, err
}

// createIn lays an image out in s and makes it durable. It returns the caller's data file if it locked
// that, error or not.
func createIn(s Storage, size int64, o *CreateOptions) (data Storage, err error) {
	h, err := createHeader(size, o)
	if err != nil {
		return nil, err
	}
	if _, err := lockStorage(s, lockRole(LockReader, LockWriter, *o.Open), o.Open.Lock); err != nil {
		return nil, err
	}
	if err := checkEmpty(s, o); err != nil {
		return nil, err
	}
	if h.hasDataFile() {
		if data, err = createData(h, o); err != nil {
			return data, fmt.Errorf("data file: %w", err)
		}
	}
	return data, layOut(s, h, o.Open.NoSync)
}

// checkEmpty refuses a storage that holds something, unless it may be overwritten.
func checkEmpty(s Storage, o *CreateOptions) error {
	n, err := s.Size()
	if err == nil && n > 0 && !o.Overwrite {
		err = fmt.Errorf("%w: it holds %d bytes", fs.ErrExist, n)
	}
	return err
}

// createData makes the external data file an empty disk, durably. It returns the caller's data file if it
// locked that, error or not.
func createData(h *header, o *CreateOptions) (locked Storage, err error) {
	s := o.Open.DataFile
	owned := s == nil
	if owned {
		s, err = o.Open.Resolver.Resolve(FileRef{Image: o.Open.Name, Name: o.DataFile, Format: "raw", Kind: KindData, Writable: true})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.Close()) }()
	}
	held, err := lockStorage(s, lockRole(LockRawReader, LockDataWriter, *o.Open), o.Open.Lock)
	if err != nil {
		return nil, err
	}
	if held && !owned {
		locked = s
	}
	if err := checkEmpty(s, o); err != nil {
		return locked, err
	}
	host := &hostFile{s: s, fixed: s.FixedSize(), noSync: o.Open.NoSync}
	switch {
	case !host.fixed:
		if err := s.Truncate(0); err != nil {
			return locked, err
		}
		if err := s.Truncate(int64(h.size)); err != nil {
			return locked, err
		}
	case h.rawData():
		// Only a raw data file must read as zeros where nothing is mapped.
		if err := host.zero(useData, 0, h.size); err != nil {
			return locked, err
		}
	}
	return locked, host.sync()
}

// layOut writes a new image to s: header, refcount table, refcount blocks, L1 table and, for a raw data
// file, L2 tables that map all of it, so that who writes to the data file alone is seen through the image
// too.
//
// Order: what may have been an image before is unmade by its first sector, sync; the tables, sync; the
// header, sync. A crash before the last step leaves no image.
func layOut(s Storage, h *header, noSync bool) error {
	size, err := s.Size()
	if err != nil {
		return err
	}
	host := newHostFile(s, size, noSync)
	if size > 0 {
		if err := host.zero(useHeader, 0, min(sectorSize, uint64(size))); err != nil {
			return err
		}
		if !host.fixed {
			if err := s.Truncate(0); err != nil {
				return err
			}
			host.pristine.Store(0)
		}
		if err := host.sync(); err != nil {
			return err
		}
	}
	g := h.geometry()
	l1Entries := g.l1Entries(h.virtualSize())
	l1Clusters := g.clusters(8 * l1Entries)
	l2Tables := uint64(0)
	if h.rawData() {
		l2Tables = l1Entries
	}
	rc, err := g.sizeRefcounts(0, 1+l1Clusters+l2Tables, false)
	if err != nil {
		return err
	}
	l := layout{g: g, h: host, table: 1, rc: rc}
	l.blocks = l.table + rc.tableClusters
	l.l1 = l.blocks + rc.blocks
	l.l2 = l.l1 + l1Clusters
	l.end = l.l2 + l2Tables
	if err := l.writeRefcounts(); err != nil {
		return err
	}
	if err := l.writeL1(l1Entries, l2Tables > 0); err != nil {
		return err
	}
	for i := range l2Tables {
		if err := l.writeIdentityL2(i, h.virtualSize()); err != nil {
			return err
		}
	}
	if err := host.sync(); err != nil {
		return err
	}
	h.refTableOff, h.refTableClusters = l.table<<g.clusterBits, uint32(rc.tableClusters)
	h.l1Size = uint32(l1Entries)
	if l1Entries > 0 {
		h.l1Off = l.l1 << g.clusterBits
	}
	b, err := h.encode()
	if err != nil {
		return err
	}
	first := make([]byte, g.clusterSize)
	copy(first, b)
	if err := host.write(useHeader, first, 0); err != nil {
		return err
	}
	return host.sync()
}

// layout is where the parts of a new image stand, as host cluster indexes.
type layout struct {
	g                          geometry
	h                          *hostFile
	rc                         refcountSize
	table, blocks, l1, l2, end uint64
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

// writeL1 writes the L1 table of n entries, all zero, or each with its L2 table behind it.
func (l *layout) writeL1(n uint64, mapped bool) error {
	if !mapped && l.h.readsZero(l.l1<<l.g.clusterBits) {
		// The table is there by the file's size.
		return l.h.s.Truncate(int64(l.end << l.g.clusterBits))
	}
	t := newTable(n)
	if mapped {
		for i := range n {
			t.store(i, (l.l2+i)<<l.g.clusterBits|flagCopied)
		}
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
