package qcow2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/go-qcow2/qcow2/internal/hostfile"
)

// Create creates an image file called name with a disk of size bytes, a multiple of 512, and opens it for
// reading and writing. When it returns, the empty image and its name are durable.
//
// Whatever can be refused is refused before an existing file is touched: options, locks, and the files that the
// image is to name, which are opened first. A file that Create made is removed after an error.
//
// Errors: fs.ErrExist if the file exists and opts.Overwrite is not set, *OptionError for options that are
// not allowed (all of them, joined) and for a device that is smaller than the disk, ErrHeaderFull if the names
// do not fit, ErrTooLarge for a size beyond the format, ErrLimit for one beyond the limits, ErrLocked if an
// existing file is in use, ErrChain if the image would be its own backing or data file, those of OpenStorage
// about the files that it names, and those of the file system.
func Create(name string, size int64, opts *CreateOptions) (*Image, error) {
	return createFile(name, size, opts, hostfile.SyncDir)
}

// createFile is Create with the function that makes the names in a directory durable.
func createFile(name string, size int64, opts *CreateOptions, syncDir func(dir string) error) (*Image, error) {
	o := createOptionsOf(opts)
	if o.Open.Name == "" {
		o.Open.Name = filepath.Base(name)
	}
	n, err := planImage(size, &o)
	if err != nil {
		return nil, createError(&o, err)
	}
	s, err := OpenFileStorage(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	var made fs.FileInfo // the file, if this made it
	if err == nil {
		if made, err = s.f.Stat(); err != nil {
			err = errors.Join(err, s.Close())
		}
	} else if o.Overwrite && errors.Is(err, fs.ErrExist) {
		s, err = OpenFileStorage(name, os.O_RDWR, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("qcow2: create: %w", err)
	}
	img, err := n.create(s, &chain{ownsTop: true})
	if err == nil && made != nil {
		if err = syncDir(filepath.Dir(name)); err == nil || errors.Is(err, errors.ErrUnsupported) {
			return img, nil
		}
		err = errors.Join(createError(&o, fmt.Errorf("sync directory: %w", err)), img.Abandon())
	}
	if err == nil {
		return img, nil
	}
	if made != nil {
		// Somebody may have put another file there.
		if now, serr := os.Lstat(name); serr == nil && os.SameFile(made, now) {
			err = errors.Join(err, os.Remove(name))
		}
	}
	return nil, err
}

// CreateStorage creates an image in s, as Create does, and opens it for reading and writing. s stays the
// caller's to close after the image. A storage that is not empty is fs.ErrExist unless opts.Overwrite is
// set; a block device is never empty, and one on which the empty image has no room matches syscall.ENOSPC.
//
// After an error a storage that was empty is made empty again, image or data file, as far as it lets itself be
// truncated then.
func CreateStorage(s Storage, size int64, opts *CreateOptions) (*Image, error) {
	o := createOptionsOf(opts)
	n, err := planImage(size, &o)
	if err != nil {
		return nil, createError(&o, err)
	}
	return n.create(s, &chain{})
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

// createError says of err that it ended the creation of an image.
func createError(o *CreateOptions, err error) error {
	if o.Open.Name == "" {
		return fmt.Errorf("qcow2: create: %w", err)
	}
	return fmt.Errorf("qcow2: create %s: %w", o.Open.Name, err)
}

// creation is an image in the making. It is used by one goroutine.
type creation struct {
	o *CreateOptions // with defaults, as createOptionsOf gives them
	h *header
	l *layout

	host      *hostFile // the image file
	data      *hostFile // the external data file, or nil
	ownsData  bool      // data came from the resolver
	below     backing
	wereEmpty []Storage // those of host and data that were empty
}

// planImage checks size and options, and plans an image.
func planImage(size int64, o *CreateOptions) (*creation, error) {
	h, err := newHeader(uint64(size), o) // a negative size is refused as one beyond 63 bits
	if err := errors.Join(err, o.Open.validate()); err != nil {
		return nil, err
	}
	if o.DataFile != "" && o.Open.DataFile == nil && o.Open.Resolver == nil {
		return nil, &FileRequiredError{
			Ref:  o.dataRef(),
			Hint: "CreateOptions.Open.DataFile or CreateOptions.Open.Resolver",
		}
	}
	l, err := planLayout(h, o.Preallocation, o.BackingFile != "" || o.Open.Backing != nil)
	if err != nil {
		return nil, err
	}
	if err := h.validate(*o.Open.Limits); err != nil {
		return nil, err
	}
	return &creation{o: o, h: h, l: l}, nil
}

// dataRef is what a resolver is asked for the external data file.
func (o *CreateOptions) dataRef() FileRef {
	return FileRef{Image: o.Open.Name, Name: o.DataFile, Format: "raw", Kind: KindData, Writable: true}
}

// create makes the image in s and opens it. It closes s after an error if the chain owns it.
func (n *creation) create(s Storage, c *chain) (*Image, error) {
	n.host = &hostFile{s: s}
	err := n.prepare(c)
	if err == nil {
		if err = n.lay(); err == nil {
			var img *Image
			if img, err = n.open(c); err == nil {
				return img, nil
			}
			n.empty()
			if !c.ownsTop { // else it is closed already
				err = errors.Join(err, n.host.release(false))
			}
			return nil, errors.Join(err, n.release())
		}
		n.empty()
	}
	return nil, errors.Join(createError(n.o, err), n.host.release(c.ownsTop), n.release())
}

// prepare finds out everything that can speak against the image, before anything is touched: it takes the locks
// and opens the data file and the backing disk. After an error release gives back what it took.
func (n *creation) prepare(c *chain) (err error) {
	open, s := n.o.Open, n.host.s
	if err := c.enter(s, open.Limits); err != nil {
		return err
	}
	if n.host.locked, err = lockStorage(s, lockRole(LockReader, LockWriter, *open), open.Lock); err != nil {
		return err
	}
	size, err := n.checkEmpty(s)
	if err != nil {
		return err
	}
	if need := int64(n.l.end << n.l.g.clusterBits); s.FixedSize() && size < need {
		return fmt.Errorf("the empty image takes %d bytes of a device of %d: %w", need, size, syscall.ENOSPC)
	}
	if n.h.hasDataFile() {
		if err := n.takeData(c); err != nil {
			return fmt.Errorf("data file: %w", err)
		}
	}
	if diskUses(open.Backing, c.seen) {
		return fmt.Errorf("%w: a file is its own backing file", ErrChain)
	}
	if n.h.hasBacking() {
		// The cache is that of the whole chain, whose slices may be as large as slices get.
		c.cache = newTableCache(open.L2CacheBytes, tableSliceBits)
	}
	n.below, err = openBacking(n.h, *open, c)
	return err
}

// diskUses reports whether the disk, or one below it, lies in a storage with one of the identities.
func diskUses(d Disk, ids []any) bool {
	in := func(s Storage) bool {
		id := s.Identity()
		return id != nil && slices.Contains(ids, id)
	}
	switch d := d.(type) {
	case *Image:
		return in(d.host.s) || in(d.data.s) || diskUses(d.below.disk, ids)
	case *SnapshotDisk:
		return diskUses(d.img, ids)
	case *ForeignDisk:
		return in(d.host.s) || diskUses(d.below.disk, ids)
	case *RawDisk:
		return in(d.s)
	case *ownedRaw:
		return in(d.s)
	}
	return false
}

// checkEmpty returns the size of a storage, and refuses one that holds something unless it may be overwritten.
// It notes one that is empty.
func (n *creation) checkEmpty(s Storage) (int64, error) {
	size, err := s.Size()
	switch {
	case err != nil:
	case size == 0:
		n.wereEmpty = append(n.wereEmpty, s)
	case !n.o.Overwrite:
		err = fmt.Errorf("%w: it holds %d bytes", fs.ErrExist, size)
	}
	return size, err
}

// takeData finds the storage of the external data file, locks it and checks it.
func (n *creation) takeData(c *chain) (err error) {
	open := n.o.Open
	s := open.DataFile
	if s == nil {
		if s, err = resolve(open.Resolver, n.o.dataRef()); err != nil {
			return err
		}
		n.ownsData = true
	}
	n.data = &hostFile{s: s}
	if err := c.meet(s); err != nil {
		return err
	}
	if n.data.locked, err = lockStorage(s, lockRole(LockDataReader, LockDataWriter, *open), open.Lock); err != nil {
		return err
	}
	size, err := n.checkEmpty(s)
	if err == nil && s.FixedSize() && uint64(size) < n.h.size {
		err = &OptionError{Option: "size", Value: n.h.size, Reason: fmt.Sprintf("the data file is a device of %d bytes", size)}
	}
	return err
}

// lay lays the image out and makes it durable.
//
// Order: nothing of an earlier image is touched before it is none any more, durably; the data file is an empty
// disk, durably, before the image names it.
func (n *creation) lay() error {
	noSync := n.o.Open.NoSync
	host, err := unmake(n.host.s, noSync)
	if err != nil {
		return err
	}
	if n.data != nil {
		if n.l.data, n.l.dataZero, err = emptyData(n.data.s, n.h, noSync); err != nil {
			return fmt.Errorf("data file: %w", err)
		}
	}
	n.l.h = host
	return n.l.write(n.h)
}

// open opens the image, and hands the data file and the backing disk over to it. An error gives the image
// file back, and nothing else.
func (n *creation) open(c *chain) (*Image, error) {
	o := *n.o.Open
	if n.data != nil {
		o.DataFile = n.data.s
	}
	if n.below.disk != nil {
		o.Backing = n.below.disk
	}
	img, err := open(n.host.s, o, &chain{cache: c.cache, ownsTop: c.ownsTop})
	if err != nil {
		return nil, err
	}
	img.ownsData = n.ownsData
	img.below.owned, img.below.ref, img.below.resolver = n.below.owned, n.below.ref, n.below.resolver
	return img, nil
}

// empty makes the storages empty again that were empty, as far as that goes: whoever tries again finds them as
// they were. The lock of one may have been given back; one that somebody else has taken since is his.
func (n *creation) empty() {
	for _, s := range n.wereEmpty {
		role := LockWriter
		if s != n.host.s {
			role = LockDataWriter
		}
		if _, err := lockStorage(s, role, n.o.Open.Lock); err == nil {
			_ = s.Truncate(0) // what made the creation fail may make this fail
		}
	}
}

// release gives the data file and the backing disk back.
func (n *creation) release() error {
	var errs []error
	errs = append(errs, n.below.release())
	if n.data != nil {
		errs = append(errs, n.data.release(n.ownsData))
	}
	return errors.Join(errs...)
}

// unmake makes of s what is no image, durably, if it holds anything, and empties it if that can be. The first
// sector decides, and goes in one piece: a crash leaves an earlier image whole, or none, and nothing that
// belongs to it may be touched before. Where s cannot be emptied, nothing up to its size is taken for zeros.
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
	switch err := s.Truncate(0); {
	case errors.Is(err, errors.ErrUnsupported):
		return host, nil
	case err != nil:
		return nil, err
	}
	host.pristine.Store(0)
	return host, host.sync()
}

// emptyData makes the external data file in s an empty disk, durably, and reports whether all of it reads as
// zeros. No image names it any more.
func emptyData(s Storage, h *header, noSync bool) (data *hostFile, zero bool, err error) {
	size, err := s.Size()
	if err != nil {
		return nil, false, err
	}
	data = newHostFile(s, size, noSync)
	if !data.fixed {
		if err = s.Truncate(0); err == nil {
			err = s.Truncate(int64(h.size))
		}
		if err == nil {
			return data, true, data.sync()
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return nil, false, err
		}
	}
	// It stays as long as it is. Only a raw data file must read as zeros where nothing is mapped, and be as
	// long as the disk.
	if !h.rawData() {
		return data, size == 0 && !data.fixed, nil
	}
	old := min(uint64(size), h.size)
	if err := data.zero(useData, 0, old); err != nil {
		return nil, false, err
	}
	if old < h.size {
		if err := data.zero(useData, h.size-sectorSize, sectorSize); err != nil {
			return nil, false, err
		}
	}
	return data, true, data.sync()
}

// layout is where the parts of a new image stand, as host cluster indexes, in this order: header, refcount
// table, refcount blocks, L1 table and, where clusters are preallocated or the data file is raw, the L2 tables
// that map all of the disk, and its clusters. With a raw data file all is mapped so that who writes to the data
// file alone is seen through the image too.
type layout struct {
	g                                geometry
	h                                *hostFile // set before write
	data                             *hostFile // the external data file, or nil; set before write
	dataZero                         bool      // the external data file reads as zeros; set before write
	mode                             Preallocation
	below                            bool // what the image does not hold shows through from below
	rc                               refcountSize
	table, blocks, l1, l2, disk, end uint64
	l1Entries, l2Tables              uint64
}

// planLayout finds the places for an image with header h, and names them in it. below says that there is a
// backing disk.
func planLayout(h *header, mode Preallocation, below bool) (*layout, error) {
	g := h.geometry()
	l := &layout{g: g, mode: mode, below: below, table: 1, l1Entries: g.l1Entries(h.virtualSize())}
	if h.rawData() || mode != PreallocationOff {
		l.l2Tables = l.l1Entries
	}
	var diskClusters uint64
	if mode != PreallocationOff && !h.hasDataFile() {
		diskClusters = g.clusters(h.virtualSize())
	}
	return l, l.place(h, diskClusters)
}

// place gives every part of an image with l.l2Tables L2 tables and diskClusters clusters of data its place, and names
// them in h.
func (l *layout) place(h *header, diskClusters uint64) (err error) {
	g := l.g
	l1Clusters := g.clusters(8 * l.l1Entries)
	if l.rc, err = g.sizeRefcounts(0, 1+l1Clusters+l.l2Tables+diskClusters, false); err != nil {
		return err
	}
	l.blocks = l.table + l.rc.tableClusters
	l.l1 = l.blocks + l.rc.blocks
	l.l2 = l.l1 + l1Clusters
	l.disk = l.l2 + l.l2Tables
	l.end = l.disk + diskClusters
	if l.end > maxHostOff>>g.clusterBits {
		return fmt.Errorf("%w: clusters up to host %#x, above %#x", ErrTooLarge, l.end<<g.clusterBits, uint64(maxHostOff))
	}
	h.refTableOff, h.refTableClusters = l.table<<g.clusterBits, uint32(l.rc.tableClusters)
	h.l1Size = uint32(l.l1Entries)
	if l.l1Entries > 0 {
		h.l1Off = l.l1 << g.clusterBits
	}
	return nil
}

// write writes the new image to l.h, which was unmade.
//
// Order: preallocated data, the tables, and what the header has behind its first sector, sync; the first sector,
// which makes it an image, sync. A crash before the last step leaves no image.
func (l *layout) write(h *header) error {
	b, err := h.encode()
	if err != nil {
		return err
	}
	first := make([]byte, l.g.clusterSize)
	copy(first, b)
	entry, err := l.preallocate(h)
	if err != nil {
		return err
	}
	if err := l.writeRefcounts(); err != nil {
		return err
	}
	if err := l.writeL1(); err != nil {
		return err
	}
	if err := l.writeL2(h, entry); err != nil {
		return err
	}
	if l.g.clusterSize > sectorSize {
		if err := l.h.write(useHeader, first[sectorSize:], sectorSize); err != nil {
			return err
		}
	}
	if l.mode != PreallocationOff {
		if err := l.h.extend(l.end << l.g.clusterBits); err != nil {
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

// preallocate does for the clusters of the disk what the mode promises, and returns the entry of the first; it
// means nothing where none is mapped. Those that are not zero by themselves are mapped as zeros, and filled with
// zeros where the format cannot say that. Over a backing disk no subcluster is in use, so that all of it shows.
//
// A data file is made durable here; the image file is when its tables are.
func (l *layout) preallocate(h *header) (l2Entry, error) {
	r := entryRules{geometry: l.g, version2: h.version < 3, external: h.hasDataFile()}
	e := l2Entry{word: l.disk<<l.g.clusterBits | flagCopied}
	host, off, n := l.h, l.disk<<l.g.clusterBits, (l.end-l.disk)<<l.g.clusterBits
	pristine := l.h.readsZero(off)
	if l.data != nil {
		e.word = flagCopied
		host, off, n, pristine = l.data, 0, h.virtualSize(), l.dataZero
	}
	if l.l2Tables == 0 {
		return e, nil
	}
	zero, err := host.preallocate(l.mode, off, n, pristine, r.version2 && !l.below)
	if err == nil && l.data != nil {
		err = l.data.sync()
	}
	switch {
	case err != nil:
		return e, fmt.Errorf("preallocate: %w", err)
	case l.below:
	case zero:
		e = r.dataEntry(e)
	default:
		e = r.zeroEntry(e)
	}
	return e, nil
}

// writeRefcounts writes the refcount table and the blocks: every cluster before end has one reference.
func (l *layout) writeRefcounts() error {
	bits := l.g.clusterBits
	buf := l.g.bulkBuffer(l.rc.blocks)
	ones := uint64(0) // bytes of buf that are known to hold ones
	err := l.h.writeBulk(useRefcountBlock, buf, l.blocks<<bits, l.rc.blocks<<bits, func(p []byte, pos uint64) error {
		at := pos * 8 >> l.g.refcountOrder
		left := max(l.end, at) - at
		if n := uint64(len(p)); n*8>>l.g.refcountOrder > left || ones < n {
			fillRefcounts(p, l.g.refcountOrder, left)
			ones = n
		}
		return nil
	})
	if err != nil {
		return err
	}
	return l.h.writeBulk(useRefcountTable, l.g.bulkBuffer(l.rc.tableClusters), l.table<<bits, l.rc.tableClusters<<bits, func(p []byte, pos uint64) error {
		l.g.fillPointers(p, pos/8, l.rc.blocks, l.blocks<<bits)
		return nil
	})
}

// writeL1 writes the L1 table, whose entries are zero, or have their L2 tables behind it.
func (l *layout) writeL1() error {
	bits := l.g.clusterBits
	if l.l2Tables == 0 && l.h.readsZero(l.l1<<bits) {
		// The table is there by the file's size, where that can be set.
		err := l.h.s.Truncate(int64(l.end << bits))
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	n := l.l2 - l.l1
	return l.h.writeBulk(useL1, l.g.bulkBuffer(n), l.l1<<bits, n<<bits, func(p []byte, pos uint64) error {
		l.g.fillPointers(p, pos/8, l.l2Tables, l.l2<<bits|flagCopied)
		return nil
	})
}

// writeL2 writes the L2 tables, if there are any: the first entry is e, and the clusters of the others follow.
func (l *layout) writeL2(h *header, e l2Entry) error {
	r := entryRules{geometry: l.g, external: h.hasDataFile()}
	total := l.g.clusters(h.virtualSize())
	return l.h.writeBulk(useL2, l.g.bulkBuffer(l.l2Tables), l.l2<<l.g.clusterBits, l.l2Tables<<l.g.clusterBits, func(p []byte, pos uint64) error {
		first := pos >> l.g.l2EntryBits
		n := min(uint64(len(p))>>l.g.l2EntryBits, total-first)
		clear(p[n<<l.g.l2EntryBits:])
		r.putRun(p, 0, n, l2Entry{word: e.word + first<<l.g.clusterBits, bitmap: e.bitmap})
		return nil
	})
}
