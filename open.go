package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
)

// Open opens the image file called name. It opens no other file, unless opts has a Resolver.
//
// Errors: those of os.Open, and those of OpenStorage.
func Open(name string, opts *OpenOptions) (*Image, error) {
	o := optionsOf(opts)
	flag := os.O_RDONLY
	if o.ReadWrite {
		flag = os.O_RDWR
	}
	s, err := OpenFileStorage(name, flag, 0)
	if err != nil {
		return nil, fmt.Errorf("qcow2: open: %w", err)
	}
	if o.Name == "" {
		o.Name = filepath.Base(name)
	}
	return open(s, o, &chain{ownsTop: true})
}

// OpenStorage opens the image in s, which stays the caller's to close after the image. A storage has one lock,
// so it serves one open at a time.
//
// Errors: ErrNotQcow2, ErrCorrupt and ErrUnsupported (*HeaderError for a field of the header), ErrEncrypted,
// ErrLimit, ErrDirty for a writable open of a dirty image that may or can not be repaired, ErrLocked,
// *FileRequiredError where the image names a file that the options give no way to reach, *ResolveError where the
// resolver refuses it, ErrBackingFormatUnknown, ErrChain, and those of the storage. After an error nothing is held,
// and nothing was written, but for unknown autoclear features, which a writable open clears, and the part of a
// repair that was done.
func OpenStorage(s Storage, opts *OpenOptions) (*Image, error) {
	return open(s, optionsOf(opts), &chain{})
}

// OpenReader opens the image of size bytes in r for reading: one behind HTTP ranges, say.
func OpenReader(r io.ReaderAt, size int64, opts *OpenOptions) (*Image, error) {
	o := optionsOf(opts)
	if o.ReadWrite {
		return nil, fmt.Errorf("qcow2: open: %w", &OptionError{Option: "ReadWrite", Value: true, Reason: "a reader cannot be written"})
	}
	return OpenStorage(NewReaderStorage(r, size), &o)
}

// optionsOf returns a copy of opts with defaults filled in.
func optionsOf(opts *OpenOptions) OpenOptions {
	var o OpenOptions
	if opts != nil {
		o = *opts
	}
	limits := o.Limits.withDefaults()
	o.Limits = &limits
	limits.ChainDepth = min(limits.ChainDepth, maxChainDepth)
	if o.L2CacheBytes == 0 {
		o.L2CacheBytes = defaultL2Cache
	}
	if o.RefcountCacheBytes == 0 {
		o.RefcountCacheBytes = defaultRefcountCache
	}
	o.L2CacheBytes = min(o.L2CacheBytes, maxCacheBytes)
	o.RefcountCacheBytes = min(o.RefcountCacheBytes, maxCacheBytes)
	return o
}

// validate returns all options that are not allowed, joined, or nil. Defaults are filled in.
func (o *OpenOptions) validate() error {
	var errs []error
	refuse := func(option string, value any, reason string) {
		errs = append(errs, &OptionError{Option: option, Value: value, Reason: reason})
	}
	if o.Repair < RepairDefault || o.Repair > RepairNever {
		refuse("Repair", int(o.Repair), "is no RepairMode")
	}
	if o.Lock < LockDefault || o.Lock > LockOff {
		refuse("Lock", int(o.Lock), "is no LockMode")
	}
	if o.Lock == LockShare && o.ReadWrite {
		refuse("Lock", "LockShare", "is for reading beside a writer, not for ReadWrite")
	}
	if o.Backing != nil && o.NoBacking {
		refuse("NoBacking", true, "contradicts Backing")
	}
	if o.Discard < DiscardDefault || o.Discard > DiscardNever {
		refuse("Discard", int(o.Discard), "is no DiscardMode")
	}
	if o.L2CacheBytes < 0 {
		refuse("L2CacheBytes", o.L2CacheBytes, "must not be negative")
	}
	if err := o.OverlapCheck.validate(); err != nil {
		errs = append(errs, err)
	}
	if o.RefcountCacheBytes < 0 {
		refuse("RefcountCacheBytes", o.RefcountCacheBytes, "must not be negative")
	}
	return errors.Join(errs...)
}

// maxChainDepth bounds Limits.ChainDepth: the cache tells images apart by 16 bits, of which it gives out half the numbers
// itself (takeID).
const maxChainDepth = 1<<15 - 1

// maxCacheBytes bounds the caches: beyond it lies more than any image's tables that are in use at once.
const maxCacheBytes = 16 << 30

// Defaults of OpenOptions. 32 MiB of L2 slices map 256 GiB at 64 KiB clusters.
const (
	defaultL2Cache       = 32 << 20
	defaultRefcountCache = 1 << 20
)

// chain is what the images of one chain share while it is opened, top first.
type chain struct {
	cache   *tableCache
	depth   int
	seen    []any // identities of the storages above
	ownsTop bool  // whether the top image closes its storage
}

// enter counts a storage in, and refuses one that the chain has met.
func (c *chain) enter(s Storage, limits *Limits) error {
	if c.depth >= limits.ChainDepth {
		return fmt.Errorf("%w: %w", ErrChain, &LimitError{Limit: "ChainDepth", Value: int64(c.depth + 1), Max: int64(limits.ChainDepth)})
	}
	if err := c.meet(s); err != nil {
		return err
	}
	c.depth++
	return nil
}

// meet refuses a storage that the chain has met, and remembers it.
func (c *chain) meet(s Storage) error {
	id := s.Identity()
	if id == nil {
		return nil
	}
	if slices.Contains(c.seen, id) {
		return fmt.Errorf("%w: a file is its own backing or data file", ErrChain)
	}
	c.seen = append(c.seen, id)
	return nil
}

// resolve asks r, and holds it to its contract.
func resolve(r Resolver, ref FileRef) (Storage, error) {
	s, err := r.Resolve(ref)
	if err == nil && s == nil {
		err = &ResolveError{Ref: ref, Reason: "the resolver returned neither a storage nor an error"}
	}
	return s, err
}

// open opens the image in s. It closes s after an error if the chain owns it.
func open(s Storage, o OpenOptions, c *chain) (*Image, error) {
	nested := c.depth > 0
	img, err := openQuietly(s, o, c)
	switch {
	case err == nil || nested:
		return img, err
	case o.Name == "":
		return nil, fmt.Errorf("qcow2: open: %w", err)
	}
	return nil, fmt.Errorf("qcow2: open %s: %w", o.Name, err)
}

// openQuietly is open without the words around the error.
func openQuietly(s Storage, o OpenOptions, c *chain) (*Image, error) {
	owns := c.ownsTop || c.depth > 0
	img := &Image{repairs: o.ReadWrite, checkOnly: o.CheckOnly, ownsHost: owns, reqs: newRequests()}
	img.readOnly.Store(!o.ReadWrite || o.CheckOnly)
	img.host = &hostFile{s: s}
	img.data = img.host
	img.wb.cond.L = &img.wb.mu
	img.wb.punched.L = &img.mu
	if err := img.open(s, o, c); err != nil {
		img.closed.Store(true)
		return nil, errors.Join(err, img.release())
	}
	return img, nil
}

// open fills in img. After an error release gives back what it took.
func (img *Image) open(s Storage, o OpenOptions, c *chain) error {
	if err := o.validate(); err != nil {
		return err
	}
	if err := c.enter(s, o.Limits); err != nil {
		return err
	}
	img.openedWith = o
	id := uint16(c.depth)
	locked, err := lockStorage(s, lockRole(LockReader, LockWriter, o), o.Lock)
	if err != nil {
		return err
	}
	img.host.locked = locked
	size, err := s.Size()
	if err != nil {
		return err
	}
	h, err := readHeader(s, size)
	if err != nil {
		return err
	}
	img.host = newHostFile(s, size, o.NoSync)
	img.host.locked = locked
	img.data = img.host
	img.hdr, img.codec = h, h.compression.codecType()
	img.size.Store(h.virtualSize())
	if o.CheckOnly {
		if err := h.validateForCheck(*o.Limits); err != nil {
			return err
		}
		img.info = h.info()
		img.info.Locked = locked
		return nil
	}
	if err := h.validate(*o.Limits); err != nil {
		return err
	}
	if err := h.checkOpenable(o.ReadWrite); err != nil {
		return err
	}
	if o.DiscardNoUnref && o.ReadWrite && h.version < 3 {
		return &OptionError{Option: "DiscardNoUnref", Value: true, Reason: "needs a version 3 image: version 2 has no zero clusters"}
	}
	img.lazy = h.lazyRefcounts()
	if img.snapshots, err = readSnapshotTable(s, size, h, *o.Limits); err != nil {
		return err
	}
	if c.cache == nil {
		c.cache = newTableCache(o.L2CacheBytes, cacheSliceBits(h))
	}
	if h.hasDataFile() {
		if err := img.openData(o, c); err != nil {
			return err
		}
	}
	if img.below, err = openBacking(h, o, c); err != nil {
		return err
	}
	// From here on the image may be written: what can be refused has been.
	if o.ReadWrite {
		if size, err = img.repairStale(o, size); err != nil {
			return err
		}
	}
	if err := img.openTables(o, c, id, uint64(size)); err != nil {
		return err
	}
	if o.ReadWrite {
		if err := img.openForWriting(o, size); err != nil {
			return err
		}
	}
	img.info = h.info()
	img.info.Locked = locked
	img.info.EndOffset = int64(highestUsed(img.host, h, size))
	return nil
}

// repairStale repairs an image whose refcounts are not to be relied on, before anything is allocated by them: the
// dirty bit is set, or the header's own cluster has no refcount, as in files of some old writers. It is an
// ordinary repair, which may be interrupted at any point, and ends with a check of its own. It returns the size
// of the file afterwards, given that before.
func (img *Image) repairStale(o OpenOptions, size int64) (int64, error) {
	h := img.hdr
	why := "the dirty bit is set"
	if !h.dirty() {
		stale, err := headerUncounted(img.host, h)
		if err != nil || !stale {
			return size, err
		}
		why = "the header has no refcount"
	}
	if o.Repair == RepairNever {
		return size, fmt.Errorf("%w: %s: the refcounts must be rebuilt before it is written", ErrDirty, why)
	}
	res, _, err := checkFile(context.Background(), img.host, h, &CheckOptions{Repair: RepairAll})
	if err == nil && !res.sound() {
		err = &CorruptError{What: fmt.Sprintf("%d corruptions and %d errors are left", res.corrupt(), res.CheckErrors), HostOff: noOffset, GuestOff: noOffset}
	}
	if err == nil {
		size, err = img.host.s.Size()
	}
	if err == nil {
		img.snapshots, err = readSnapshotTable(img.host.s, size, h, *o.Limits)
	}
	if err != nil {
		return size, fmt.Errorf("%w: %s, and the repair failed: %w", ErrDirty, why, err)
	}
	return size, nil
}

// headerUncounted reports whether the refcount of the header's cluster can be read and is zero.
func headerUncounted(host *hostFile, h *header) (bool, error) {
	var p [8]byte
	if err := host.readFull(p[:], h.refTableOff); err != nil {
		return false, fmt.Errorf("refcount table: %w", err)
	}
	block := binary.BigEndian.Uint64(p[:])
	if block&(h.clusterSize()-1) != 0 || block >= maxHostOff {
		return false, nil
	}
	if block != 0 {
		if err := host.readFull(p[:], block); err != nil {
			return false, fmt.Errorf("refcount block: %w", err)
		}
	}
	return block == 0 || refcountAt(p[:], uint(h.refcountOrder), 0) == 0, nil
}

// cacheSliceBits returns log2 of the bytes that a slice in the cache of a chain may have, whose top has header h.
func cacheSliceBits(h *header) uint {
	if h.hasBacking() {
		return tableSliceBits // the images below are not known yet
	}
	g := h.geometry()
	return g.sliceBits
}

// openTables makes the mapper and, for writing, the allocator.
func (img *Image) openTables(o OpenOptions, c *chain, id uint16, size uint64) error {
	h := img.hdr
	g := h.geometry()
	l1, err := readTable(img.host, h.l1Off, uint64(h.l1Size), size)
	if err != nil {
		return fmt.Errorf("L1 table: %w", err)
	}
	img.m = &mapper{
		entryRules: entryRules{geometry: g, version2: h.version < 3, external: h.hasDataFile()},
		id:         id,
		h:          img.host,
		cache:      c.cache,
		mu:         &img.mu,
		l1:         l1,
		l1Off:      h.l1Off,
		l1Dirty:    make(map[uint64]struct{}),
	}
	if !o.ReadWrite {
		return nil
	}
	clusters := uint64(h.refTableClusters)
	t, err := readTable(img.host, h.refTableOff, clusters<<g.clusterBits/8, size)
	if err != nil {
		return fmt.Errorf("refcount table: %w", err)
	}
	img.m.alloc = newAllocator(g, img.host, t, h.refTableOff, clusters, o.RefcountCacheBytes, int64(size))
	img.m.alloc.test = o.test
	img.wb.test = o.test
	return nil
}

// openForWriting does what a writable open owes the image: it clears autoclear features that it does not
// know, durably, and finds out which bitmaps the first write must mark (I9).
func (img *Image) openForWriting(o OpenOptions, size int64) error {
	h := img.hdr
	entries, err := readBitmapDirectory(img.host.s, size, h, *o.Limits)
	if err != nil {
		return err
	}
	img.bitmaps = bitmapMarks(entries)
	img.overlap, img.limits, img.onCorrupt = o.OverlapCheck, *o.Limits, o.OnCorrupt
	img.discard, img.noUnref = o.Discard, o.DiscardNoUnref
	if err := img.watchMetadata(); err != nil {
		return err
	}
	if known := h.autoclear & autoclearKnown; known != h.autoclear {
		if err := img.setAutoclear(known); err != nil {
			return fmt.Errorf("clear unknown autoclear features: %w", err)
		}
		h.autoclear = known
	}
	return nil
}

// lockRole returns the role of an image or data file.
func lockRole(reader, writer LockRole, o OpenOptions) LockRole {
	switch {
	case o.Lock == LockOff:
		return LockNone
	case o.ReadWrite:
		return writer
	case o.Lock == LockShare:
		return LockShared
	}
	return reader
}

// lockStorage takes the lock, and reports whether it is held: not where the host has none.
func lockStorage(s Storage, role LockRole, mode LockMode) (bool, error) {
	if mode == LockOff || role == LockNone {
		return false, nil
	}
	err := s.Lock(role)
	if errors.Is(err, errors.ErrUnsupported) {
		return false, nil
	}
	return err == nil, err
}

// openData opens the external data file.
func (img *Image) openData(o OpenOptions, c *chain) error {
	ref := FileRef{Image: o.Name, Name: img.hdr.dataFileName, Format: "raw", Kind: KindData, Writable: o.ReadWrite}
	s := o.DataFile
	if s == nil || c.depth > 1 {
		if o.Resolver == nil {
			return &FileRequiredError{Ref: ref, Hint: "OpenOptions.DataFile or OpenOptions.Resolver"}
		}
		var err error
		if s, err = resolve(o.Resolver, ref); err != nil {
			return err
		}
		img.ownsData = true
	}
	img.data = &hostFile{s: s} // for release, if what follows fails
	if err := c.meet(s); err != nil {
		return err
	}
	locked, err := lockStorage(s, lockRole(LockDataReader, LockDataWriter, o), o.Lock)
	if err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	img.data.locked = locked
	size, err := s.Size()
	if err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	img.data = newHostFile(s, size, o.NoSync)
	img.data.locked = locked
	return nil
}

// backing is what lies below an image. Its zero value is nothing.
type backing struct {
	disk    Disk    // nil: none
	owned   bool    // the library closes disk
	missing error   // for reads of what a backing file holds that was not opened
	ref     FileRef // by which the library opened disk
	// resolver is what was asked for ref; it is asked again when disk is to be written.
	resolver Resolver
}

// release closes the disk, if it is the library's to close.
func (b *backing) release() error {
	if c, ok := b.disk.(io.Closer); ok && b.owned {
		return c.Close()
	}
	return nil
}

// openBacking opens what lies below an image with header h.
func openBacking(h *header, o OpenOptions, c *chain) (b backing, err error) {
	if o.Backing != nil && c.depth == 1 {
		if o.ReadWrite && h.rawData() {
			return b, &OptionError{Option: "Backing", Value: o.Backing.Size(), Reason: "a raw data file cannot show what lies below, so it is not written over a backing disk"}
		}
		return backing{disk: o.Backing}, nil
	}
	if !h.hasBacking() {
		return b, nil
	}
	return openNamed(h.backingName, h.backingFormat, o, c)
}

// openNamed opens the backing file that the image at the chain's end names, of the given format as far as the image
// tells.
func openNamed(name, format string, o OpenOptions, c *chain) (b backing, err error) {
	if o.BackingFormat != "" && c.depth == 1 {
		format = o.BackingFormat
	}
	ref := FileRef{Image: o.Name, Name: name, Format: format, Kind: KindBacking}
	required := &FileRequiredError{Ref: ref, Hint: "OpenOptions.Backing or OpenOptions.Resolver"}
	switch {
	case o.NoBacking && c.depth == 1:
		return backing{missing: required}, nil
	case o.Resolver == nil:
		return b, required
	case format == "":
		return b, fmt.Errorf("backing file %q: %w", name, ErrBackingFormatUnknown)
	case format != "raw" && format != "qcow2" && !ForeignFormat(format).known():
		return b, fmt.Errorf("backing file %q: %w: format %q", name, ErrUnsupported, format)
	case c.depth >= o.Limits.ChainDepth:
		return b, fmt.Errorf("%w: %w", ErrChain, &LimitError{Limit: "ChainDepth", Value: int64(c.depth + 1), Max: int64(o.Limits.ChainDepth)})
	}
	s, err := resolve(o.Resolver, ref)
	if err != nil {
		return b, err
	}
	b.disk, err = openBelow(s, format, ref, o, c)
	if err != nil {
		return backing{}, fmt.Errorf("backing file %q: %w", name, err)
	}
	b.owned, b.ref, b.resolver = true, ref, o.Resolver
	return b, nil
}

// read reads p at guestOff, which the disk above does not hold: the backing disk, and zeros past its end.
func (b *backing) read(p []byte, guestOff uint64) error {
	if b.missing != nil {
		return b.missing
	}
	if b.disk == nil {
		clear(p)
		return nil
	}
	size := uint64(b.disk.Size())
	if guestOff >= size {
		clear(p)
		return nil
	}
	inside := p[:min(uint64(len(p)), size-guestOff)]
	n, err := readBelow(b.disk, inside, int64(guestOff))
	if n < len(inside) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("backing file: %w", err)
	}
	clear(p[len(inside):])
	return nil
}

// readBelow is d.ReadAt, without words that the caller adds.
func readBelow(d Disk, p []byte, off int64) (int, error) {
	if d, ok := d.(quietDisk); ok {
		return d.readAt(p, off)
	}
	return d.ReadAt(p, off)
}

// filled returns the error of a ReadAt that read n bytes of want: nil if that is all, and io.ErrUnexpectedEOF where the
// disk ends before.
func filled(n, want int, err error) error {
	switch {
	case n >= want:
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	}
	return err
}

// openBelow opens a backing disk in s, which it closes after an error.
func openBelow(s Storage, format string, ref FileRef, o OpenOptions, c *chain) (Disk, error) {
	below := OpenOptions{Resolver: o.Resolver, Name: ref.Path(), Limits: o.Limits, Lock: o.Lock, NoSync: o.NoSync,
		L2CacheBytes: o.L2CacheBytes}
	if format == "qcow2" {
		return open(s, below, c)
	}
	if f := ForeignFormat(format); f.known() {
		return openForeign(s, f, below, c)
	}
	if err := c.enter(s, o.Limits); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	locked, err := lockStorage(s, lockRole(LockRawReader, LockRawReader, below), o.Lock)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	d, err := NewRawDisk(s)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return &ownedRaw{d, locked}, nil
}

// ownedRaw is a raw disk that closes its storage.
type ownedRaw struct {
	*RawDisk
	locked bool // whether the storage has the lock of a reader
}

// Close closes the storage.
func (d *ownedRaw) Close() error { return d.s.Close() }
