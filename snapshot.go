package qcow2

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"time"
)

// Snapshot is an internal snapshot as its image lists it. ID and Name come from the image: they are
// untrusted, need not be unique, and may hold any byte.
type Snapshot struct {
	// ID is the snapshot's identifier; QEMU gives out decimal numbers.
	ID string
	// Name is the snapshot's name; QEMU calls it the tag.
	Name string
	// DiskSize is the size of the disk in the snapshot, in bytes.
	DiskSize int64
	// VMStateSize is the number of bytes of a saved machine's state behind the disk; 0 without one.
	VMStateSize int64
	// Date is when the snapshot was taken.
	Date time.Time
	// VMClock is how long the machine had run by then.
	VMClock time.Duration
	// ICount is the number of instructions that it had executed, or -1 if that was not recorded.
	ICount int64
}

// Layout of a snapshot table entry: a fixed part, extra data, id and name, padded to 8 bytes.
// qcow2 spec, "Snapshots".
const (
	snapL1Off       = 0
	snapL1Size      = 8
	snapIDSize      = 12
	snapNameSize    = 14
	snapDateSec     = 16
	snapDateNsec    = 20
	snapVMClock     = 24
	snapVMStateSize = 32
	snapExtraSize   = 36

	snapExtraVMState  = 0 // offsets in the extra data, each as far as the entry has it
	snapExtraDiskSize = 8
	snapExtraICount   = 16
	snapExtraKnown    = 24 // the extra data that we know
)

// noICount stands for an instruction count that was not recorded.
const noICount = math.MaxUint64

// snapshot is one entry of the snapshot table. It is not changed once it was read.
// qcow2 spec, "Snapshots".
type snapshot struct {
	entryOff uint64 // host offset of the entry
	l1Off    uint64 // host offset of the snapshot's L1 table; see checkL1
	l1Size   uint32 // its entries
	id, name string
	dateSec  uint32 // seconds since 1970
	dateNsec uint32
	vmClock  uint64 // nanoseconds
	vmState  uint64 // bytes of VM state
	diskSize uint64 // bytes; the image's own size where the entry lacks it
	icount   uint64 // noICount if absent
	extra    []byte // all the extra data as it stands, the known part included (I9)
	cut      uint32 // bytes of extra data behind extra that were left out; see tableReader.cutExtra
}

// public returns what callers see of the snapshot. Numbers that int64 does not hold become the largest
// that it does.
func (s *snapshot) public() Snapshot {
	clamp := func(v uint64) int64 { return int64(min(v, math.MaxInt64)) }
	p := Snapshot{
		ID:          s.id,
		Name:        s.name,
		DiskSize:    clamp(s.diskSize),
		VMStateSize: clamp(s.vmState),
		Date:        time.Unix(int64(s.dateSec), int64(s.dateNsec)),
		VMClock:     time.Duration(clamp(s.vmClock)),
		ICount:      -1,
	}
	if s.icount != noICount {
		p.ICount = clamp(s.icount)
	}
	return p
}

// checkL1 returns a *CorruptError if the snapshot's L1 table is not one that may be read: unaligned,
// over its bound, in the header's cluster or beyond the largest host offset. An image with such a
// snapshot opens, as it does in QEMU, and can be repaired; only the snapshot itself is out of use.
func (s *snapshot) checkL1(g *geometry) error {
	n := uint64(s.l1Size) * l1EntrySize
	what := ""
	switch {
	case n > maxL1Bytes:
		what = fmt.Sprintf("L1 table of snapshot %q has %d entries, above %d", s.id, s.l1Size, maxL1Bytes/l1EntrySize)
	case g.offsetInCluster(s.l1Off) != 0:
		what = fmt.Sprintf("L1 table of snapshot %q is not aligned to clusters", s.id)
	case n > 0 && s.l1Off < g.clusterSize:
		what = fmt.Sprintf("L1 table of snapshot %q is in the header's cluster", s.id)
	case s.l1Off > maxHostOff-n:
		what = fmt.Sprintf("L1 table of snapshot %q ends above %#x", s.id, uint64(maxHostOff))
	default:
		return nil
	}
	return &CorruptError{What: what, HostOff: int64(min(s.l1Off, math.MaxInt64)), GuestOff: noOffset}
}

// readSnapshotTable reads the snapshot table that a validated header points at, from a file of
// fileSize bytes. It reads in pieces, and keeps no more than the table holds. An entry that does not lie
// inside the file, or has more extra data than the format's readers take, is a *CorruptError; a table
// above limits.MetadataBytes is a *LimitError. The L1 tables that the entries name are not judged: see
// checkL1. qcow2 spec, "Snapshots".
func readSnapshotTable(r io.ReaderAt, fileSize int64, h *header, limits Limits) ([]snapshot, error) {
	if h.nbSnapshots == 0 {
		return nil, nil
	}
	limits = limits.withDefaults()
	t := &tableReader{off: h.snapshotsOff, limit: uint64(min(limits.MetadataBytes, maxSnapshotBytes)), start: h.snapshotsOff}
	if t.limit < maxSnapshotBytes {
		t.limitErr = &LimitError{Limit: "MetadataBytes", Max: limits.MetadataBytes}
	}
	t.what = "snapshot table"
	end := uint64(max(fileSize, 0))
	// Before the first allocation: so many entries must fit into the file.
	if need := uint64(h.nbSnapshots) * minSnapshotEntry; h.snapshotsOff > end || need > end-h.snapshotsOff {
		return nil, t.corrupt(fmt.Sprintf("of %d entries ends beyond the file", h.nbSnapshots))
	}
	t.r = bufio.NewReaderSize(io.NewSectionReader(r, int64(t.off), int64(end-t.off)), tableReadSize)

	snapshots := make([]snapshot, 0, h.nbSnapshots)
	for range h.nbSnapshots {
		s, err := readSnapshotEntry(t, h)
		if err != nil {
			return nil, err
		}
		snapshots = append(snapshots, s)
	}
	return snapshots, nil
}

// readSnapshotEntry reads the entry that t stands at.
func readSnapshotEntry(t *tableReader, h *header) (snapshot, error) {
	if err := t.align(); err != nil {
		return snapshot{}, err
	}
	s := snapshot{entryOff: t.off, diskSize: h.virtualSize(), icount: noICount}
	var fixed [minSnapshotEntry]byte
	if err := t.read(fixed[:]); err != nil {
		return s, err
	}
	be := binary.BigEndian
	s.l1Off = be.Uint64(fixed[snapL1Off:])
	s.l1Size = be.Uint32(fixed[snapL1Size:])
	s.dateSec = be.Uint32(fixed[snapDateSec:])
	s.dateNsec = be.Uint32(fixed[snapDateNsec:])
	s.vmClock = be.Uint64(fixed[snapVMClock:])
	s.vmState = uint64(be.Uint32(fixed[snapVMStateSize:]))

	extraSize := be.Uint32(fixed[snapExtraSize:])
	if extraSize > maxSnapshotExtra {
		if !t.cutExtra {
			return s, t.corrupt(fmt.Sprintf("entry has %d bytes of extra data, above %d", extraSize, maxSnapshotExtra))
		}
		s.cut, extraSize = extraSize-maxSnapshotExtra, maxSnapshotExtra
	}
	s.extra = make([]byte, extraSize)
	if err := t.read(s.extra); err != nil {
		return s, err
	}
	if err := t.skip(s.cut); err != nil {
		return s, err
	}
	idSize, nameSize := be.Uint16(fixed[snapIDSize:]), be.Uint16(fixed[snapNameSize:])
	b := make([]byte, int(idSize)+int(nameSize)) // at most twice 64 KiB
	if err := t.read(b); err != nil {
		return s, err
	}
	s.id, s.name = string(b[:idSize]), string(b[idSize:])
	if extraSize >= snapExtraVMState+8 {
		s.vmState = be.Uint64(s.extra[snapExtraVMState:])
	}
	if extraSize >= snapExtraDiskSize+8 {
		s.diskSize = be.Uint64(s.extra[snapExtraDiskSize:])
	}
	if extraSize >= snapExtraICount+8 {
		s.icount = be.Uint64(s.extra[snapExtraICount:])
	}
	return s, nil
}

// tableReadSize is the unit in bytes in which tables of variable entries are read.
const tableReadSize = 64 << 10

// tableReader reads a table whose entries have variable lengths and are aligned to 8 bytes: the
// snapshot table, the bitmap directory.
type tableReader struct {
	what     string // the table, for errors
	r        *bufio.Reader
	start    uint64      // host offset of the table
	off      uint64      // host offset of the next byte
	limit    uint64      // bytes that the table may have
	limitErr *LimitError // what to return above limit; nil: the limit is the format's
	cutExtra bool        // read a snapshot with more extra data than maxSnapshotExtra, without the rest of it
}

// corrupt returns a *CorruptError about the table at the present offset.
func (t *tableReader) corrupt(what string) error {
	return &CorruptError{What: t.what + " " + what, HostOff: int64(t.off), GuestOff: noOffset}
}

// take accounts for the next n bytes.
func (t *tableReader) take(n uint64) error {
	if have := t.off - t.start; n > t.limit-have {
		if t.limitErr != nil {
			t.limitErr.Value = int64(have + n)
			return fmt.Errorf("%s at host %#x: %w", t.what, t.start, t.limitErr)
		}
		return t.corrupt(fmt.Sprintf("is longer than %d bytes", t.limit))
	}
	t.off += n
	return nil
}

// read fills p. The end of the file or table is a *CorruptError.
func (t *tableReader) read(p []byte) error {
	at := t.off
	if err := t.take(uint64(len(p))); err != nil {
		return err
	}
	if _, err := io.ReadFull(t.r, p); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return &CorruptError{What: t.what + " ends inside an entry", HostOff: int64(at), GuestOff: noOffset, Err: io.ErrUnexpectedEOF}
		}
		return fmt.Errorf("read %s at host %#x: %w", t.what, at, err)
	}
	return nil
}

// skip leaves out n bytes. The end of the file or table is a *CorruptError.
func (t *tableReader) skip(n uint32) error {
	at := t.off
	if err := t.take(uint64(n)); err != nil {
		return err
	}
	_, err := t.r.Discard(int(n))
	switch {
	case errors.Is(err, io.EOF):
		return &CorruptError{What: t.what + " ends inside an entry", HostOff: int64(at), GuestOff: noOffset, Err: io.ErrUnexpectedEOF}
	case err != nil:
		return fmt.Errorf("read %s at host %#x: %w", t.what, at, err)
	}
	return nil
}

// align skips the padding before the next entry.
func (t *tableReader) align() error {
	var pad [8]byte
	return t.read(pad[:-(t.off-t.start)&7])
}
