package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
	"strconv"
)

// A snapshot operation works on structures that it makes beside those in force, and then switches to by one write of
// the header. It is alone with the image; reads go on. snapshotWork is what it holds until then.
type snapshotWork struct {
	img  *Image
	size uint64 // of the image file in bytes, when the work began
	runs []heldRun
	// table is the new snapshot table, list what it lists, and data its bytes; once it is placed.
	table clusterRun
	list  []snapshot
}

// heldRun is clusters that the work has allocated, and that nothing names yet.
type heldRun struct {
	clusterRun
	kinds OverlapKinds
}

// newSnapshotWork begins the work.
func (img *Image) newSnapshotWork() (*snapshotWork, error) {
	size, err := img.host.s.Size()
	if err != nil {
		return nil, err
	}
	return &snapshotWork{img: img, size: uint64(size)}, nil
}

// take allocates n clusters in one run for metadata of the given kinds. It looks for them first where the image ended
// when it was opened: no search through the refcounts of all before is worth a hole there.
func (w *snapshotWork) take(n uint64, kinds OverlapKinds) (clusterRun, error) {
	img := w.img
	img.mu.Lock()
	defer img.mu.Unlock()
	r, err := img.m.alloc.allocRun(uint64(img.info.EndOffset)>>img.m.clusterBits, n)
	if err != nil {
		return r, err
	}
	w.hold(r, kinds)
	return r, nil
}

// takeSome allocates up to n clusters in one run for data.
func (w *snapshotWork) takeSome(n uint64) (clusterRun, error) {
	img := w.img
	img.mu.Lock()
	defer img.mu.Unlock()
	r, err := img.m.alloc.alloc(n)
	if err != nil {
		return r, err
	}
	w.hold(r, 0)
	return r, nil
}

// hold notes clusters that were allocated. Precondition: mu.
func (w *snapshotWork) hold(r clusterRun, kinds OverlapKinds) {
	if kinds != 0 {
		w.img.host.enter(kinds, r.first<<w.img.m.clusterBits, r.n<<w.img.m.clusterBits)
	}
	if k := len(w.runs); k > 0 && w.runs[k-1].kinds == kinds && w.runs[k-1].first+w.runs[k-1].n == r.first {
		w.runs[k-1].n += r.n
		return
	}
	w.runs = append(w.runs, heldRun{r, kinds})
}

// giveBack frees what the work holds: nothing names it.
func (w *snapshotWork) giveBack() {
	img := w.img
	img.mu.Lock()
	defer img.mu.Unlock()
	for _, r := range w.runs {
		if r.kinds != 0 {
			img.host.leave(r.kinds, r.first<<img.m.clusterBits, r.n<<img.m.clusterBits)
		}
		img.m.alloc.undo(r.clusterRun)
	}
	w.runs = nil
}

// bringOut makes durable what the work has written, and the refcounts of what it holds.
func (w *snapshotWork) bringOut() error {
	img := w.img
	img.mu.Lock()
	err := img.m.alloc.writeBack() // with lazy refcounts, too
	img.mu.Unlock()
	if err != nil || img.wb.test.snapshotSkip&snapshotSyncBeside != 0 {
		return err
	}
	return img.writeCut()
}

// sync makes durable what the work has written, up to the given step.
func (w *snapshotWork) sync(step snapshotSyncs) error {
	if w.img.wb.test.snapshotSkip&step != 0 {
		return nil
	}
	return w.img.host.sync()
}

// checkList returns why list cannot be the snapshots of the image: *LimitError above the caller's limits, ErrTooLarge
// above the format's.
func (img *Image) checkList(list []snapshot) error {
	n := int64(len(list))
	if n > maxSnapshots {
		return fmt.Errorf("%w: %d snapshots, at most %d", ErrTooLarge, n, maxSnapshots)
	}
	if n > int64(img.limits.Snapshots) {
		return &LimitError{Limit: "Snapshots", Value: n, Max: int64(img.limits.Snapshots)}
	}
	size := int64(snapshotTableSize(list))
	if size > maxSnapshotBytes {
		return fmt.Errorf("%w: a snapshot table of %d bytes, at most %d", ErrTooLarge, size, maxSnapshotBytes)
	}
	if size > img.limits.MetadataBytes {
		return &LimitError{Limit: "MetadataBytes", Value: size, Max: img.limits.MetadataBytes}
	}
	return nil
}

// snapshotTableSize returns the length in bytes of the snapshot table that lists list.
func snapshotTableSize(list []snapshot) uint64 {
	n := 0
	for i := range list {
		s := &list[i]
		n = (n + 7) &^ 7
		n += minSnapshotEntry + max(len(s.extra), snapExtraDiskSize+8) + len(s.id) + len(s.name)
	}
	return uint64(n)
}

// encodeSnapshots returns the snapshot table that lists list, for host offset off, and notes the places of the
// entries. What an entry lacks of its extra data is filled in; what it has is kept (I9).
func encodeSnapshots(list []snapshot, off uint64) []byte {
	var p []byte
	for i := range list {
		s := &list[i]
		p = append(p, make([]byte, -len(p)&7)...)
		s.complete()
		s.entryOff = off + uint64(len(p))
		p = s.append(p)
	}
	return p
}

// placeTable writes a snapshot table of list beside the one in force. Nothing names it yet.
func (w *snapshotWork) placeTable(list []snapshot) error {
	w.list = list
	if len(list) == 0 {
		return nil
	}
	m := w.img.m
	n := m.clusters(snapshotTableSize(list))
	r, err := w.take(n, OverlapSnapshotTable)
	if err != nil {
		return fmt.Errorf("new snapshot table: %w", err)
	}
	p := encodeSnapshots(list, r.first<<m.clusterBits)
	p = append(p, make([]byte, r.n<<m.clusterBits-uint64(len(p)))...)
	if err := w.img.host.write(useSnapshotTable, p, r.first<<m.clusterBits); err != nil {
		return fmt.Errorf("new snapshot table: %w", err)
	}
	w.table = r
	return nil
}

// switchTable makes the new snapshot table the one in force, by one write of the header, and frees the old one. After
// an error the old one is in force, unless the image is failed. Precondition: the new table, and all that it names, is
// durable.
func (w *snapshotWork) switchTable() error {
	img, m := w.img, w.img.m
	off := w.table.first << m.clusterBits
	if err := img.switchTo(encodeSnapshotFields(uint32(len(w.list)), off)); err != nil {
		return err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	oldOff, oldBytes := img.hdr.snapshotsOff, img.snapshotTableBytes()
	img.hdr.nbSnapshots, img.hdr.snapshotsOff = uint32(len(w.list)), off
	img.snapshots = w.list
	img.refreshInfo()
	w.runs = nil
	if n := m.clusters(oldBytes); n > 0 {
		img.host.leave(OverlapSnapshotTable, oldOff, n<<m.clusterBits)
		w.free(clusterRun{first: oldOff >> m.clusterBits, n: n})
	}
	return nil
}

// switchTo is switchHeader, in an order that the tests may break.
func (img *Image) switchTo(off int64, p []byte) error {
	if img.wb.test.snapshotSkip&snapshotSyncSwitch != 0 {
		return img.host.writeHeader(off, p)
	}
	return img.switchHeader(off, p)
}

// free drops a reference of each cluster of r, whose loss is durable, and which nobody reads. What cannot be lowered
// now is tried again by the next write-back. Precondition: mu.
func (w *snapshotWork) free(r clusterRun) {
	a := w.img.m.alloc
	w.img.wb.lowered = true
	rest, err := a.release([]freedRun{{r, dropOther}})
	if err == nil {
		err = a.writeBack()
	}
	if err != nil {
		for _, r := range rest {
			a.freeFor(r.cause, r.clusterRun)
		}
	}
}

// complete fills in the extra data that version 3 demands.
func (s *snapshot) complete() {
	if len(s.extra) < snapExtraDiskSize+8 {
		s.extra = binary.BigEndian.AppendUint64(nil, s.vmState)
		s.extra = binary.BigEndian.AppendUint64(s.extra, s.diskSize)
	}
}

// nextSnapshotID returns the identifier that QEMU would give a new snapshot: one more than the largest number that
// an identifier in list begins with. Where that is the largest of all, it is the smallest number that is no identifier.
func nextSnapshotID(list []snapshot) string {
	largest := uint64(0)
	for i := range list {
		largest = max(largest, leadingNumber(list[i].id))
	}
	if largest < math.MaxUint64 {
		return strconv.FormatUint(largest+1, 10)
	}
	taken := make(map[string]bool)
	for i := range list {
		taken[list[i].id] = true
	}
	for n := uint64(1); ; n++ {
		if id := strconv.FormatUint(n, 10); !taken[id] {
			return id
		}
	}
}

// leadingNumber returns the decimal number that s begins with, or 0; the largest that there is if it is larger.
func leadingNumber(s string) uint64 {
	i := 0
	for i < len(s) && '0' <= s[i] && s[i] <= '9' {
		i++
	}
	n, _ := strconv.ParseUint(s[:i], 10, 64) // a number out of range is returned as the largest
	return n
}
