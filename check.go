package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
)

// RepairScope says what a check repairs.
type RepairScope int

const (
	// RepairNothing only looks.
	RepairNothing RepairScope = iota
	// RepairLeaks lowers refcounts that are above the references, and sets COPIED where exactly one is left.
	RepairLeaks
	// RepairAll repairs everything that can be.
	RepairAll
)

// CheckOptions says how an image is checked. The nil pointer and the zero value look and repair nothing.
type CheckOptions struct {
	// Repair says what is repaired, which needs an image that was opened for writing.
	Repair RepairScope
	// Found is called with each finding as it is made, from the goroutine that called Check. It must not
	// call the image. With Repair, what was found before the repair comes first, then what is left (Left).
	Found func(Finding)
	// Progress is called from time to time with the part of the work that is done: bytes of tables, of the
	// pass that runs. Each pass of a repair begins again at 0.
	Progress func(done, total int64)

	test testHooks // breaks orderings on purpose, for the crash tests
}

// FindingKind is a rule that an image breaks.
type FindingKind int

const (
	// FindingLeak is a refcount above the references: space is lost, nothing else.
	FindingLeak FindingKind = iota
	// FindingRefcount is a refcount below the references: the cluster could be given away.
	FindingRefcount
	// FindingOverflow is a cluster with more references than its refcount can count.
	FindingOverflow
	// FindingCopiedLost is an active entry without COPIED whose cluster has refcount one. It costs a copy
	// at the next write, and is what a crash may leave.
	FindingCopiedLost
	// FindingCopied is an active entry with COPIED whose cluster has another refcount than one: a write in
	// place would change somebody else's data.
	FindingCopied
	// FindingReserved is a table entry with reserved bits.
	FindingReserved
	// FindingMisaligned is a table entry whose offset is not that of a cluster.
	FindingMisaligned
	// FindingBeyondEnd is a pointer to what lies beyond the end of the file by a cluster or more.
	FindingBeyondEnd
	// FindingCompressed is a compressed entry that contradicts itself: with COPIED, with subclusters, or in
	// an image with an external data file.
	FindingCompressed
	// FindingSubclusters is an extended entry whose subclusters contradict each other or their cluster.
	FindingSubclusters
	// FindingZeroFlag is a zero flag in a version 2 image, which knows none.
	FindingZeroFlag
	// FindingDataFilePlace is an entry of an image with a data file that is not at its guest offset there.
	FindingDataFilePlace
	// FindingRefcountTable is a refcount table that cannot be used at all.
	FindingRefcountTable
	// FindingRefcountBlock is a refcount block that cannot be used: its entry in the refcount table is
	// none, or the block's cluster is somebody else's too.
	FindingRefcountBlock
	// FindingUnreadable is a refcount that cannot be read because its refcount block's place is impossible.
	// It counts as an error of the check.
	FindingUnreadable
	// FindingSnapshotTable is a snapshot table that cannot be read. The references are not known then, so
	// nothing else is judged. It counts as an error of the check.
	FindingSnapshotTable
	// FindingSnapshotEntry is a snapshot table entry that lacks what its version demands.
	FindingSnapshotEntry
	// FindingSnapshotExtra is a snapshot table entry with more extra data than any reader takes, which is 1 KiB. Found is
	// its length in bytes. RepairAll finds it, and cuts the rest off, which nobody knows; a check without it stops there:
	// see FindingSnapshotTable.
	FindingSnapshotExtra
	// FindingSnapshotL1 is a snapshot whose L1 table is impossible: the snapshot cannot be used.
	FindingSnapshotL1
	// FindingSnapshotDataFile is that an image with an external data file has snapshots.
	FindingSnapshotDataFile
	// FindingBitmapDirectory is a bitmap directory that cannot be read; see FindingSnapshotTable.
	FindingBitmapDirectory
	// FindingBitmapTable is an entry of a bitmap's table that is impossible.
	FindingBitmapTable
	// FindingShared is a table in a cluster that is something else too: another table, or guest data. A write to one
	// changes the other. Found is the number of references to the cluster, Expected that of those that make it the
	// table. RepairAll gives each its own copy, if that takes no more than 256 MiB and there is room.
	FindingShared
	// FindingPastEnd is a refcount that is not zero of a cluster past the end of the file. It is harmless,
	// and counts as nothing.
	FindingPastEnd
)

// findingWords says in words what each kind is.
var findingWords = [...]string{
	FindingLeak:             "leaked cluster",
	FindingRefcount:         "refcount below the references",
	FindingOverflow:         "more references than the refcount's width can count",
	FindingCopiedLost:       "refcount one without COPIED",
	FindingCopied:           "COPIED although the refcount is not one",
	FindingReserved:         "reserved bits",
	FindingMisaligned:       "offset is not that of a cluster",
	FindingBeyondEnd:        "beyond the end of the file",
	FindingCompressed:       "contradictory compressed entry",
	FindingSubclusters:      "contradictory subclusters",
	FindingZeroFlag:         "zero flag in version 2",
	FindingDataFilePlace:    "not at the guest offset in the data file",
	FindingRefcountTable:    "unusable",
	FindingRefcountBlock:    "unusable",
	FindingUnreadable:       "refcounts cannot be read",
	FindingSnapshotTable:    "cannot be read",
	FindingSnapshotEntry:    "incomplete",
	FindingSnapshotExtra:    "extra data above 1 KiB",
	FindingSnapshotL1:       "impossible",
	FindingSnapshotDataFile: "snapshots with an external data file",
	FindingBitmapDirectory:  "cannot be read",
	FindingBitmapTable:      "impossible entry",
	FindingShared:           "in a cluster that is something else too",
	FindingPastEnd:          "refcount of a cluster past the end of the file",
}

// String says in words what the kind is.
func (k FindingKind) String() string {
	if k < 0 || int(k) >= len(findingWords) {
		return fmt.Sprintf("finding %d", int(k))
	}
	return findingWords[k]
}

// FindingClass is how bad a finding is.
type FindingClass int

const (
	ClassHarmless   FindingClass = iota // nothing is lost
	ClassLeak                           // space is lost
	ClassCorruption                     // data is, or may be
	ClassError                          // a part could not be checked
)

// Class returns how bad findings of the kind are.
func (k FindingKind) Class() FindingClass {
	switch k {
	case FindingPastEnd:
		return ClassHarmless
	case FindingLeak:
		return ClassLeak
	case FindingUnreadable, FindingSnapshotTable, FindingBitmapDirectory:
		return ClassError
	}
	return ClassCorruption
}

// Finding is one place where an image breaks a rule of the format.
type Finding struct {
	Kind FindingKind
	// Part is the part of the image that holds what is wrong: "L2 table", "refcount table", ...
	Part string
	// HostOff is the host offset in bytes of the entry or field that is wrong, of the cluster if its
	// refcount is; -1 if there is none.
	HostOff int64
	// GuestOff is the guest offset in bytes that the entry maps, or -1. An entry of snapshots is named by
	// the guest offset in one of them.
	GuestOff int64
	// Found is what stands there: an entry, a refcount.
	Found uint64
	// Expected is what should, where that is known: the number of references, an entry without the flag.
	Expected uint64
	// Times is how often the finding counts, at least once: a table that snapshots share counts for each
	// of them.
	Times int64
	// Left tells that it was found after a repair, which did not mend it.
	Left bool
}

// String describes the finding in one line.
func (f Finding) String() string {
	s := f.Part + ": " + f.Kind.String()
	if f.HostOff >= 0 {
		s += fmt.Sprintf(" at host %#x", f.HostOff)
	}
	if f.GuestOff >= 0 {
		s += fmt.Sprintf(" for guest %#x", f.GuestOff)
	}
	switch f.Kind {
	case FindingLeak, FindingRefcount, FindingOverflow, FindingPastEnd, FindingUnreadable:
		s += fmt.Sprintf(": refcount %d, references %d", f.Found, f.Expected)
	default:
		s += fmt.Sprintf(": found %#x, expected %#x", f.Found, f.Expected)
	}
	if f.Times > 1 {
		s += fmt.Sprintf(" (%d times)", f.Times)
	}
	return s
}

// CheckResult is the outcome of a check. The totals count as qemu-img check counts, so that both can be
// compared; after a repair they are what is left.
type CheckResult struct {
	// Corruptions and Leaks are the numbers of findings of either class; CheckErrors that of places which
	// could not be checked.
	Corruptions, Leaks, CheckErrors int64
	// Unreadable is the number of entries that no reader accepts, and that qemu-img check passes over:
	// FindingZeroFlag and FindingDataFilePlace. They are corruptions that count nowhere else.
	Unreadable int64
	// Shared is the number of tables in clusters that are something else too, FindingShared, which qemu-img check passes
	// over where the refcounts are right. They are corruptions that count nowhere else.
	Shared int64
	// CorruptionsFixed (unreadable entries and shared tables too) and LeaksFixed are the numbers of findings that a repair mended.
	CorruptionsFixed, LeaksFixed int64
	// LostCopied is the part of Corruptions that is harmless: FindingCopiedLost.
	LostCopied int64
	// PastEnd is the number of refcounts of clusters past the end of the file; they count nowhere else.
	PastEnd int64
	// Rebuilt tells that a repair made new refcount structures.
	Rebuilt bool

	// ImageEndOffset is the host offset in bytes behind the last cluster that is in use or has a refcount.
	ImageEndOffset int64
	// TotalClusters is the number of guest clusters of the disk; AllocatedClusters that of the active
	// ones with a place in the file, CompressedClusters that of those that are compressed, and
	// FragmentedClusters that of those whose place is not right behind the one before.
	TotalClusters, AllocatedClusters, CompressedClusters, FragmentedClusters int64
}

// Clean reports that the whole image was checked and nothing was found, or is left.
func (r *CheckResult) Clean() bool { return r.Leaks == 0 && r.sound() }

// sound reports that the whole image was checked and nothing but leaks was found, or is left.
func (r *CheckResult) sound() bool {
	return r.corrupt() == 0 && r.CheckErrors == 0
}

// corrupt returns the number of corruptions of all totals.
func (r *CheckResult) corrupt() int64 { return r.Corruptions + r.Unreadable + r.Shared }

// count counts a finding in its total.
func (r *CheckResult) count(f Finding) {
	switch f.Kind {
	case FindingZeroFlag, FindingDataFilePlace:
		r.Unreadable += f.Times
		return
	case FindingShared:
		r.Shared += f.Times
		return
	}
	switch f.Kind.Class() {
	case ClassLeak:
		r.Leaks += f.Times
	case ClassCorruption:
		r.Corruptions += f.Times
	case ClassError:
		r.CheckErrors += f.Times
	}
	switch f.Kind {
	case FindingCopiedLost:
		r.LostCopied += f.Times
	case FindingPastEnd:
		r.PastEnd += f.Times
	}
}

// validate refuses options that are none.
func (o *CheckOptions) validate() error {
	if o.Repair < RepairNothing || o.Repair > RepairAll {
		return &OptionError{Option: "Repair", Value: int(o.Repair), Reason: "is no RepairScope"}
	}
	return nil
}

// Check looks at all metadata of the image: the tables of the disk and of its snapshots, compressed clusters,
// refcounts and COPIED flags, snapshot table, bitmaps and crypto header. What it finds is no error: it is in
// the result, and each finding is handed to CheckOptions.Found. Guest data is not read, nor any other file.
//
// An image that cannot be opened otherwise is opened for it with OpenOptions.CheckOnly. In an image that is
// open for writing, reads go on beside it, everything else waits, and it begins with a Sync.
// Memory is two bytes for each host cluster that is referred to.
//
// Errors: that of the context, *OptionError, ErrReadOnly for a repair of an image that was opened for reading,
// ErrFailed after a failed sync, ErrCorrupt where RepairLeaks would not do, or where nothing can be repaired since the
// header contradicts itself, fs.ErrClosed, and those of the storage. The result is that of the part that was done then.
//
// qcow2 spec, "Host cluster management", "Cluster mapping", "Snapshots" and "Bitmaps".
func (img *Image) Check(ctx context.Context, opts *CheckOptions) (*CheckResult, error) {
	var o CheckOptions
	if opts != nil {
		o = *opts
	}
	res, err := img.check(ctx, &o)
	if err != nil {
		err = fmt.Errorf("qcow2: check: %w", err)
	}
	return res, err
}

// check is Check without the words around the error.
func (img *Image) check(ctx context.Context, o *CheckOptions) (*CheckResult, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if !img.readOnly.Load() {
		return img.checkLive(ctx, o)
	}
	defer img.reqs.leave(img.reqs.enter()) // Close waits for it
	if img.closed.Load() {
		return nil, fs.ErrClosed
	}
	if o.Repair == RepairNothing {
		res, _, err := checkFile(ctx, img.host, img.hdr, o)
		return res, err
	}
	if !img.repairs {
		return nil, ErrReadOnly
	}
	img.mu.Lock() // one repair after the other
	defer img.mu.Unlock()
	res, _, err := checkFile(ctx, img.host, img.hdr, o)
	return res, err
}

// checkLive is check of an image that is open for writing. Nothing changes it meanwhile, but the repair; reads go on.
//
// A repair changes tables under the image. What the image holds of them is read again afterwards. A read in flight
// may still put a slice into the cache that it read before the repair; so the cache is emptied only when
// those are done.
func (img *Image) checkLive(ctx context.Context, o *CheckOptions) (res *CheckResult, err error) {
	err = img.alone(func() error {
		var changed bool
		res, changed, err = checkFile(ctx, img.host, img.hdr, o)
		if changed {
			err = errors.Join(err, img.reload())
		}
		return err
	})
	return res, err
}

// checkFile checks, and repairs, the image with header h in host. It keeps h as the header on disk, and reports
// whether anything was changed there.
func checkFile(ctx context.Context, host *hostFile, h *header, o *CheckOptions) (res *CheckResult, changed bool, err error) {
	size, err := host.s.Size()
	if err != nil {
		return nil, false, err
	}
	c := newChecker(ctx, host, h, size, o)
	if err := c.walk(); err != nil || o.Repair == RepairNothing {
		return c.res, false, err
	}
	r := &repairer{ctx: ctx, host: host, h: h, o: o, first: c}
	if err := r.repair(); err != nil {
		return c.res, r.wrote, fmt.Errorf("repair: %w", err)
	}
	res, err = r.result()
	return res, r.wrote, err
}
