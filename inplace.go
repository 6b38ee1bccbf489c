package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
)

// Layout tells where the content of a disk lies in a host file. Every Disk is one: a RawDisk, or a ForeignDisk, over
// the storage that is to be converted.
type Layout interface {
	// Size returns the size of the disk in bytes.
	Size() int64
	// Extents yields the state of the guest range [off, off+n), cut to the disk, in runs without gaps. HostOff of an
	// ExtentData at depth 0 is where its bytes stand in the host file, as the guest reads them. What has a depth
	// above 0 is that of the backing file, and shows through. An error ends it.
	Extents(off, n int64) iter.Seq2[Extent, error]
}

// InPlaceOptions says what image ConvertInPlace makes of a file. The nil pointer and the zero value are right for most.
type InPlaceOptions struct {
	// ClusterSize in bytes is a power of two from 512 B to 2 MiB. Default: the largest from 64 KiB down to 1 KiB
	// that all of the data is aligned to. Clusters of 512 bytes, which suit every format, and few readers, must be
	// asked for.
	ClusterSize int
	// RefcountBits is the width of a refcount: 1, 2, 4, ... 64. Default 16, the only one of version 2.
	RefcountBits int
	// Version is 2 or 3. Default 3.
	Version int
	// Compression is the type of clusters that are compressed later.
	Compression CompressionType
	// LazyRefcounts lets refcounts lag behind on disk, as CreateOptions has it.
	LazyRefcounts bool
	// BackingFile and BackingFormat are the name and format that the header gives for the backing file: that of a
	// source which has one, whose unallocated ranges show it then. What is zero in the source becomes zero clusters,
	// which version 2 has not got. The file is not opened.
	BackingFile   string
	BackingFormat string
	// AllowQcow2 converts a source that begins with a qcow2 header, as a raw disk whose guest wrote one.
	// Default: refused, since it is an image already, most likely.
	AllowQcow2 bool
	// IgnoreFooter converts a source that ends in what an interrupted conversion leaves. A guest can write that at
	// the end of a raw disk. Default: refused.
	IgnoreFooter bool
	// Lock says whether the lock of a writer is taken: LockDefault or LockOff.
	Lock LockMode
	// Limits bounds the disk (VirtualSize), and the memory for its runs of clusters, 48 bytes each, and for its
	// top-level tables (MetadataBytes). Nil: the default of each.
	Limits *Limits
	// Progress, if not nil, is called with the number of bytes of new tables that are written, and of all, now and
	// then, by the goroutine that called.
	Progress func(done, total int64)

	test testHooks
}

// ConvertInPlace makes a qcow2 image of the file s, whose disk src describes, without copying the disk: its data stays
// where it is. Behind it come the tables of the image, and copies of at most two clusters: the one in the place of the
// header, and the last one if something else stands behind the end of the disk there. The first sector is written
// last. Everything else of the source, its own tables among it, is free space in the image.
//
// Nobody may write s meanwhile, or use src afterwards. A lock that the caller holds on s is replaced and given back. s
// must be able to grow and to be truncated.
//
// The result is durable when it returns. Until the first sector is written, durably, s is the source: longer, but with
// all of its bytes in their place, and where its format looks for a trailer at the end, as VHD does, with a copy of
// that; but between the first two writes, of the footer that tells how long it was and of that copy, which stands behind
// it, the format does not find its trailer. A crash leaves the source as it was, or such a file, of which ResumeInPlace
// makes the image, and RollbackInPlace the source, or the image. The length of the source should be noted before,
// since both want to be told. Until then nobody should write to such a file, least of all a guest: it could make header
// and footer.
//
// An error that matches ErrInPlace says that s is in that state between. After any other, the end of ctx included, s is
// bit by bit what it was.
//
// Errors: *AlignError (ErrNotAligned) if the data cannot stay where it is, with clusters of that size or of any: then
// Convert copies it. *InPlaceError for a file that ends in a footer. *OptionError for options that are not allowed or
// contradict the source, and for one that is a qcow2 image. ErrHeaderFull if the backing name does not fit the first
// sector. ErrTooLarge, ErrLimit, ErrCorrupt for a layout that leads out of the file, ErrUnsupported for a device,
// ErrLocked, that of ctx, and those of src and s.
func ConvertInPlace(ctx context.Context, s Storage, src Layout, opts *InPlaceOptions) error {
	err := withInPlace(ctx, s, opts, func(c *inPlace) error {
		size, err := s.Size()
		if err != nil {
			return err
		}
		c.length = uint64(size)
		if err := c.checkSource(); err != nil {
			return err
		}
		if err := c.makePlan(src); err != nil {
			return err
		}
		return c.convert(false)
	})
	if err != nil {
		return fmt.Errorf("qcow2: convert in place: %w", err)
	}
	return nil
}

// ResumeInPlace ends a conversion of s that was interrupted, and returns what it found. originalLength is the length of
// the source in bytes; src describes its disk, and is opened over NewSourceView(s, originalLength). Options are those
// of ConvertInPlace, as they were.
//
// Tables that are not complete are written again. If the source, or the options, have changed in between, the
// conversion begins anew. A file whose header is that of the image already gets that once more, and is cut behind it; src
// is not asked then, and may be nil. Of the options the backing file must be that of the header then.
//
// Errors: *InPlaceError if there is no footer, or one that tells another length, and for an image that was changed
// since, or that uses what would be cut; and those of ConvertInPlace. After an error s is what was found or further on
// its way, as InspectInPlace tells, or, where the conversion began anew, the source.
func ResumeInPlace(ctx context.Context, s Storage, src Layout, originalLength int64, opts *InPlaceOptions) (InPlaceState, error) {
	var found InPlaceState
	err := withInPlace(ctx, s, opts, func(c *inPlace) error {
		var f *inPlaceFooter
		var err error
		if found, f, err = inspectInPlace(ctx, s, originalLength); err != nil {
			return err
		}
		c.length = uint64(originalLength)
		switch found {
		case InPlaceSwitched:
			ok, err := c.resumeSwitched(f)
			if err == nil && !ok {
				found = InPlaceChanged
				err = newInPlaceError(found, f, originalLength)
			}
			return err
		case InPlaceIncomplete, InPlaceComplete:
			if err := c.makePlan(src); err != nil {
				return err
			}
			if c.plan.footer == *f {
				return c.convert(true)
			}
			if err := c.rollback(); err != nil {
				return err
			}
			return c.convert(false)
		}
		return c.refuse(found, f)
	})
	if err != nil {
		return found, fmt.Errorf("qcow2: resume conversion in place: %w", err)
	}
	return found, nil
}

// RollbackInPlace makes of s, whose conversion was interrupted, the source that it was, bit by bit and of the same
// length, and returns what it found. originalLength is the length of the source in bytes. It is durable when it
// returns.
//
// Errors: *InPlaceError if there is no footer, or one that tells another length, and for a file that is the finished
// image already: nothing is changed then. ErrLocked, that of ctx, and those of s.
func RollbackInPlace(ctx context.Context, s Storage, originalLength int64) (InPlaceState, error) {
	var found InPlaceState
	err := withInPlace(ctx, s, nil, func(c *inPlace) error {
		var f *inPlaceFooter
		var err error
		if found, f, err = inspectInPlace(ctx, s, originalLength); err != nil {
			return err
		}
		c.length = uint64(originalLength)
		if found != InPlaceIncomplete && found != InPlaceComplete {
			return c.refuse(found, f)
		}
		return c.rollback()
	})
	if err != nil {
		return found, fmt.Errorf("qcow2: roll back conversion in place: %w", err)
	}
	return found, nil
}

// refuse returns the error for a file that is neither resumed nor rolled back. That there is no footer is made durable:
// whoever cut it off may have been killed before the sync.
func (c *inPlace) refuse(found InPlaceState, f *inPlaceFooter) error {
	if found == InPlaceNone {
		if err := c.host.sync(); err != nil {
			return err
		}
	}
	return newInPlaceError(found, f, int64(c.length))
}

// inPlaceSync is a place in a conversion where what was written must be durable before what follows.
type inPlaceSync int

const (
	inPlaceSyncNone   inPlaceSync = iota
	inPlaceSyncFooter             // the footer, before anything else behind the source: else it cannot be rolled back
	inPlaceSyncTables             // tables and copies, before the header names them: else I3, I2
	inPlaceSyncSwitch             // the header, before the footer goes and what stood behind it: else neither is there
	inPlaceSyncRest               // what stood behind the header, before the footer goes
	inPlaceSyncEnd                // the end of the file, before the call returns
)

// inPlace is a conversion in progress. It is used by one goroutine.
type inPlace struct {
	ctx    context.Context
	s      Storage
	host   *hostFile
	o      InPlaceOptions
	limits Limits
	length uint64 // of the source in bytes
	plan   *inPlacePlan
}

// withInPlace calls f with a conversion of s, and holds the lock of a writer meanwhile.
func withInPlace(ctx context.Context, s Storage, opts *InPlaceOptions, f func(c *inPlace) error) error {
	c := &inPlace{ctx: ctx, s: s, host: newHostFile(s, 0, false)}
	if opts != nil {
		c.o = *opts
	}
	c.limits = c.o.Limits.withDefaults()
	if c.o.Lock != LockDefault && c.o.Lock != LockOff {
		return &OptionError{Option: "Lock", Value: int(c.o.Lock), Reason: "want LockDefault or LockOff"}
	}
	if c.host.fixed {
		return fmt.Errorf("%w: a file that cannot grow", ErrUnsupported)
	}
	var err error
	if c.host.locked, err = lockStorage(s, LockWriter, c.o.Lock); err != nil {
		return err
	}
	if err = ctx.Err(); err == nil {
		err = f(c)
	}
	unlock := c.host.release(false)
	if err == nil && unlock != nil {
		return fmt.Errorf("%w, but it is done: unlock: %w", ErrInPlace, unlock) // s is not what it was
	}
	return errors.Join(err, unlock)
}

// checkSource refuses a source that is another's business, or could not be rolled back.
func (c *inPlace) checkSource() error {
	f, err := findFooter(c.s, c.length)
	if err != nil {
		return err
	}
	if f != nil && !c.o.IgnoreFooter {
		found, f, err := inspectInPlace(c.ctx, c.s, int64(min(f.length, math.MaxInt64)))
		if err != nil {
			return err
		}
		return newInPlaceError(found, f, noOffset)
	}
	first := make([]byte, sectorSize)
	if err := c.host.readFull(first, 0); err != nil {
		return err
	}
	if hasMagic(first) && !c.o.AllowQcow2 {
		return &OptionError{Option: "AllowQcow2", Value: false, Reason: "the file begins with a qcow2 header"}
	}
	if err := c.s.Truncate(int64(c.length)); err != nil {
		return fmt.Errorf("truncate to the length that it has: %w", err)
	}
	return nil
}

// convert carries the plan out. begun says that the footer of this plan was found behind the source.
//
// Order, with the file from left to right, S the source, H the header:
//
//	0  S [source                 ]
//	1  S [source                 ]                              F      footer, which makes the file longer, sync
//	2  S [source                 ] [tables and copies behind it] F T    and the copy of a trailer, sync
//	3  H [source                 ] [tables and copies          ] F T    the first sector, sync
//	4  H 0 [data and free space  ] [tables and copies          ] F T    what stood behind it in its cluster, sync
//	5  H 0 [data and free space  ] [tables and copies          ]        cut, sync
//
// Up to 3 nothing below the length of the source is written: a crash leaves S, and the footer, in one sector, tells
// the length from the moment at which that changes. Before 3, what the header names is durable. From 3 on a crash
// leaves the image: behind the tables nothing is in use, so F and T are nobody's, and nothing in the header's cluster
// is data. 4 takes away what else could be found there, such as a file system's own header by which somebody would
// mount the image.
//
// An error before 3 cuts the file back, but where begun is set. From the write of 3 on it is left: nobody knows how much
// of that has happened.
func (c *inPlace) convert(begun bool) error {
	p := c.plan
	err := c.prepare()
	if err == nil {
		err = c.ctx.Err()
	}
	if err != nil && begun {
		return fmt.Errorf("%w: %w", ErrInPlace, err)
	}
	if err != nil {
		return errors.Join(err, c.rollback())
	}
	if err := c.switchTo(p.first); err != nil {
		return err
	}
	return c.finish(p.g.clusterSize, p.footer.off)
}

// switchTo does the step 3 of convert: it writes the first sector, durably.
func (c *inPlace) switchTo(first []byte) error {
	err := c.host.writeHeader(0, first)
	if err == nil {
		err = c.syncAt(inPlaceSyncSwitch)
	}
	if err != nil {
		return fmt.Errorf("%w: switch to the new header: %w", ErrInPlace, err)
	}
	return nil
}

// resumeSwitched does the steps 3 to 5 of convert for a file whose first sector is that of the image already, with the
// footer f. It is not ok, and changes nothing, if the header names another backing file than the options do: a guest
// that was given the grown file to write to could have made header and footer.
//
// The first sector is written again, with what is there: it need not be durable, as in prepare.
func (c *inPlace) resumeSwitched(f *inPlaceFooter) (ok bool, err error) {
	first := make([]byte, sectorSize)
	if err := c.host.readFull(first, 0); err != nil {
		return false, err
	}
	h, err := readHeader(bytes.NewReader(first), sectorSize)
	if err != nil || h.backingName != c.o.BackingFile || h.backingFormat != c.o.BackingFormat {
		return false, nil // readHeader: inspectInPlace has found it sound
	}
	if err := c.switchTo(first); err != nil {
		return true, err
	}
	return true, c.finish(f.clusterSize(), f.off)
}

// prepare does the steps 1 and 2 of convert. A footer that was found need not be durable: whoever wrote it may have
// ended, or have met an error, before the sync. So it is written again, and synced, in every case.
func (c *inPlace) prepare() error {
	p := c.plan
	if err := c.host.write(useData, p.footer.encode(), p.footer.off); err != nil {
		return fmt.Errorf("footer: %w", err)
	}
	if err := c.syncAt(inPlaceSyncFooter); err != nil {
		return err
	}
	if p.trailer != nil {
		if err := c.host.write(useData, p.trailer, p.footer.off+sectorSize); err != nil {
			return fmt.Errorf("copy of the trailer: %w", err)
		}
	}
	start, total := p.footer.tables, p.footer.off-p.footer.tables
	err := p.emit(c.ctx, c.host, func(off uint64, b []byte) error {
		if err := c.host.write(useData, b, off); err != nil {
			return fmt.Errorf("tables: %w", err)
		}
		if c.o.Progress != nil {
			c.o.Progress(int64(off+uint64(len(b))-start), int64(total))
		}
		return nil
	})
	if err != nil {
		return err
	}
	return c.syncAt(inPlaceSyncTables)
}

// finish does the steps 4 and 5 of convert.
func (c *inPlace) finish(clusterSize, end uint64) error {
	if err := c.clean(clusterSize, end); err != nil {
		return fmt.Errorf("%w, but the image is complete: %w", ErrInPlace, err)
	}
	return nil
}

// clean is finish without words.
func (c *inPlace) clean(clusterSize, end uint64) error {
	if clusterSize > sectorSize {
		if err := c.host.zero(useHeader, sectorSize, clusterSize-sectorSize); err != nil {
			return err
		}
		if err := c.syncAt(inPlaceSyncRest); err != nil {
			return err
		}
	}
	if err := c.s.Truncate(int64(end)); err != nil {
		return fmt.Errorf("truncate to %d bytes: %w", end, err)
	}
	return c.syncAt(inPlaceSyncEnd)
}

// syncAt makes what was written durable, unless a test leaves this sync out.
func (c *inPlace) syncAt(at inPlaceSync) error {
	if at == c.o.test.inPlaceSkip {
		return nil
	}
	return c.host.sync()
}

// rollback makes the file as long as the source was, durably, also where a sync has failed before: it then does what
// can be done.
func (c *inPlace) rollback() error {
	err := c.s.Truncate(int64(c.length))
	if err == nil && c.o.test.inPlaceSkip != inPlaceSyncEnd {
		err = c.s.Sync()
	}
	if err != nil {
		return fmt.Errorf("%w: roll back to %d bytes: %w", ErrInPlace, c.length, err)
	}
	return nil
}
