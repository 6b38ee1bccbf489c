package qcow2

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
)

// DeleteSnapshot deletes an internal snapshot. Clusters that it alone held are free for new data.
//
// It is atomic and durable: a crash leaves the image with the snapshot or without it, and at worst leaks and lost COPIED
// flags. After an error the image is as before, unless the error came after the snapshot was gone, as Snapshots tells:
// then what failed was to free its clusters, of which some may be leaks, and lost COPIED flags cost copies. The
// context ends it before that only.
//
// Errors: ErrSnapshotNotFound, ErrBusy while it is open (OpenSnapshot), ErrCorrupt where tables or refcounts are not
// sound, *OptionError, ErrUnsupported with an external data file, those of the context and of WriteAt.
// qcow2 spec, "Snapshots".
func (img *Image) DeleteSnapshot(ctx context.Context, ref SnapshotRef) error {
	if err := img.changeSnapshot(ref, func(i int) error { return img.deleteSnapshot(ctx, i) }); err != nil {
		return snapshotError("delete", ref, err)
	}
	return nil
}

// RenameSnapshot gives an internal snapshot another name: at most 65535 bytes, of which QEMU knows 255, no NUL. It is
// atomic and durable; after an error the image is as before. A snapshot that is open may be renamed.
//
// Errors: as DeleteSnapshot, but for ErrBusy.
func (img *Image) RenameSnapshot(ref SnapshotRef, name string) error {
	o := SnapshotOptions{Name: name}
	o.Date = unixEpoch
	err := o.validate()
	if err == nil {
		err = img.changeSnapshot(ref, func(i int) error { return img.renameSnapshot(i, name) })
	}
	if err != nil {
		return snapshotError("rename", ref, err)
	}
	return nil
}

// changeSnapshot calls f, alone with the image, with the index of the snapshot that ref means.
func (img *Image) changeSnapshot(ref SnapshotRef, f func(i int) error) error {
	if err := errors.Join(ref.validate(), img.snapshotsWritable()); err != nil {
		return err
	}
	return img.alone(func() error {
		i, err := ref.find(img.snapshots)
		if err != nil {
			return err
		}
		return f(i)
	})
}

// renameSnapshot is RenameSnapshot of snapshot i. Precondition: alone.
//
// Order: the new snapshot table beside the old, sync; the header names it, sync; the old one is freed.
func (img *Image) renameSnapshot(i int, name string) error {
	w, err := img.newSnapshotWork()
	if err != nil {
		return err
	}
	list := slices.Clone(img.snapshots)
	list[i].name = name
	return w.replaceTable(list)
}

// replaceTable makes a snapshot table of list the one in force.
func (w *snapshotWork) replaceTable(list []snapshot) error {
	err := w.img.checkList(list)
	if err == nil {
		err = w.placeTable(list)
	}
	if err == nil {
		err = w.bringOut()
	}
	if err == nil {
		err = w.switchTable()
	}
	if err != nil {
		w.giveBack()
	}
	return err
}

// deleteSnapshot is DeleteSnapshot of snapshot i. Precondition: alone.
//
// Order:
//
//	1  the new snapshot table and its refcounts                                   sync
//	2  the header names it                                                        sync
//	3  refcounts of the snapshot's L1 table and of all that it refers to lowered  sync
//	4  COPIED set in the active tables where the count has become one             sync
//
// What a crash leaves: before the end of step 2, either table, and what the old one names is whole and counted. In
// step 3 counts that are too high, which are leaks (I1). In step 4 lost COPIED flags; none is set where the count on
// disk is not one (I7).
func (img *Image) deleteSnapshot(ctx context.Context, i int) error {
	m, s := img.m, img.snapshots[i]
	if err := img.markDeleted(&s); err != nil {
		return err
	}
	defer img.unmarkDeleted()
	w, err := img.newSnapshotWork()
	if err != nil {
		return err
	}
	tree, err := w.collectSnapshot(ctx, &s, math.MaxUint32)
	if err != nil {
		return err
	}
	l1 := clusterRun{first: s.l1Off >> m.clusterBits, n: m.clusters(uint64(s.l1Size) * l1EntrySize)}
	tree.refs.addRun(l1, 1)
	img.mu.Lock()
	err = m.alloc.surveyRefs(ctx, tree.refs, bulkLower)
	img.mu.Unlock()
	if err != nil {
		return err
	}
	if img.wb.test.snapshotSkip&snapshotLowerFirst != 0 {
		_, _ = w.applyRefs(tree.refs, bulkLower, math.MaxUint64)
		tree.refs = newRefWords()
	}
	if err := w.replaceTable(slices.Delete(slices.Clone(img.snapshots), i, i+1)); err != nil {
		return err
	}
	img.host.leave(OverlapInactiveL1, s.l1Off, l1.n<<m.clusterBits)
	img.relistInactiveL1()
	err = w.lower(tree, true)
	if err != nil {
		return fmt.Errorf("the snapshot is deleted, but not all of its clusters are free: %w", err)
	}
	return nil
}

// relistInactiveL1 enters the L1 tables of all snapshots: one of them that overlaps one that left, in an image that
// is not sound, stays listed.
func (img *Image) relistInactiveL1() {
	for i := range img.snapshots {
		if s := &img.snapshots[i]; s.l1Size > 0 && s.checkL1(&img.m.geometry) == nil {
			img.host.enter(OverlapInactiveL1, s.l1Off, uint64(s.l1Size)*l1EntrySize)
		}
	}
}

// collectSnapshot counts the references of the first n entries of the snapshot's L1 table.
func (w *snapshotWork) collectSnapshot(ctx context.Context, s *snapshot, n uint64) (*refTree, error) {
	l1, err := w.img.readSnapshotL1(s, w.size)
	if err != nil {
		return nil, err
	}
	return w.img.collectTree(ctx, l1, s.l1Off, n, w.size)
}

// readSnapshotL1 reads the L1 table of a snapshot, of an image file of size bytes.
func (img *Image) readSnapshotL1(s *snapshot, size uint64) (*table, error) {
	if err := s.checkL1(&img.m.geometry); err != nil {
		return nil, err
	}
	l1, err := readTable(img.host, s.l1Off, uint64(s.l1Size), size)
	if err != nil {
		return nil, fmt.Errorf("L1 table of the snapshot: %w", err)
	}
	return l1, nil
}

// lower lowers the refcounts of a tree whose loss is durable, and which was surveyed; and sets COPIED in the active
// tables where a count has become one, if it may have. What it cannot lower now is tried again by the next write-back,
// and what that lowers stays without COPIED. The space of what becomes free goes back to the host, as
// OpenOptions.Discard says.
func (w *snapshotWork) lower(tree *refTree, copied bool) error {
	img, m := w.img, w.img.m
	img.mu.Lock()
	a := m.alloc
	done, err := a.applyRefs(tree.refs, bulkLower, math.MaxUint64)
	if err != nil {
		a.dropRefs(tree.refs, done, math.MaxUint64)
		err = errors.Join(err, a.writeBack())
	}
	w.unlistTables(tree.tables, tree.refs)
	img.mu.Unlock()
	if img.discard.passes(dropSnapshot) {
		// Nobody allocates meanwhile, so no write can meet the punch (I4). What is still to be lowered is punched later.
		perr := tree.refs.eachGone(done, func(r clusterRun) error {
			return img.host.punch(0, noOffset, r.first<<m.clusterBits, r.n<<m.clusterBits)
		})
		err = errors.Join(err, perr)
	}
	if err != nil {
		return err
	}
	if err := w.sync(snapshotSyncLower); err != nil || !copied {
		return err
	}
	return img.restoreCopied(context.Background(), tree.refs, w.size)
}

// unlistTables takes L2 tables of a tree out of the overlap list, as active ones where the active L1 table does not name
// them; and as inactive ones where nothing else counts them once the tree is gone, as refs was surveyed to say; nil: none
// of them goes. What is still to be lowered is not asked. Precondition: mu.
func (w *snapshotWork) unlistTables(tables []treeTable, refs *refWords) {
	img, m := w.img, w.img.m
	active := make([]bool, len(tables))
	for _, c := range m.l1.all() {
		for j := range c {
			off := m.l1.at(c, j) & offsetMask
			if i, ok := slices.BinarySearchFunc(tables, off, func(t treeTable, off uint64) int { return cmp.Compare(t.off, off) }); ok {
				active[i] = true
			}
		}
	}
	for i, t := range tables {
		if !active[i] {
			img.host.leave(OverlapActiveL2, t.off, m.clusterSize)
		}
		if refs == nil {
			continue
		}
		if left := refs.load(t.off >> m.clusterBits); left&refStoredNone != 0 || left&refStoredOne != 0 && active[i] {
			img.host.leave(OverlapInactiveL2, t.off, m.clusterSize)
		}
	}
}
