package qcow2

import (
	"fmt"
	"strconv"
)

// SnapshotRef says which internal snapshot is meant. Neither identifiers nor names need be unique in an image: the
// first snapshot in the order of the table is meant that fits. One of the fields is set, or ID and Name, which must
// then both fit.
type SnapshotRef struct {
	// ID is the snapshot's identifier.
	ID string
	// Name is its name. qemu-img snapshot -d looks for a name alone.
	Name string
	// IDOrName is an identifier or, where no snapshot has that, a name. qemu-img snapshot -a and convert -l look so.
	IDOrName string
}

// String describes the reference, with the text of the caller quoted.
func (r SnapshotRef) String() string {
	switch {
	case r.IDOrName != "":
		return strconv.Quote(r.IDOrName)
	case r.ID != "" && r.Name != "":
		return fmt.Sprintf("with id %q and name %q", r.ID, r.Name)
	case r.ID != "":
		return fmt.Sprintf("with id %q", r.ID)
	}
	return fmt.Sprintf("with name %q", r.Name)
}

// validate refuses a reference to nothing, or one that says it twice.
func (r SnapshotRef) validate() error {
	switch {
	case r == SnapshotRef{}:
		return &OptionError{Option: "SnapshotRef", Value: "", Reason: "names no snapshot"}
	case r.IDOrName != "" && (r.ID != "" || r.Name != ""):
		return &OptionError{Option: "IDOrName", Value: r.IDOrName, Reason: "excludes ID and Name"}
	}
	return nil
}

// find returns the index in list of the snapshot that is meant, ErrSnapshotNotFound if there is none, or an
// *OptionError.
func (r SnapshotRef) find(list []snapshot) (int, error) {
	if err := r.validate(); err != nil {
		return 0, err
	}
	if r.IDOrName != "" {
		for i := range list {
			if list[i].id == r.IDOrName {
				return i, nil
			}
		}
		r.Name = r.IDOrName
	}
	for i := range list {
		if (r.ID == "" || list[i].id == r.ID) && (r.Name == "" || list[i].name == r.Name) {
			return i, nil
		}
	}
	return 0, ErrSnapshotNotFound
}

// FindSnapshot returns the snapshot that ref means.
//
// Errors: ErrSnapshotNotFound, and *OptionError for a reference that is none.
func (img *Image) FindSnapshot(ref SnapshotRef) (Snapshot, error) {
	s, err := img.findSnapshot(ref)
	if err != nil {
		return Snapshot{}, snapshotError("find", ref, err)
	}
	return s.public(), nil
}

// findSnapshot is FindSnapshot without the words around the error.
func (img *Image) findSnapshot(ref SnapshotRef) (snapshot, error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	i, err := ref.find(img.snapshots)
	if err != nil {
		return snapshot{}, err
	}
	return img.snapshots[i], nil
}

// snapshotError adds what was being done to which snapshot at the exported edge.
func snapshotError(op string, ref SnapshotRef, err error) error {
	return fmt.Errorf("qcow2: %s snapshot %s: %w", op, ref, err)
}
