package qcow2

import (
	"fmt"
	"strings"
)

// OverlapKinds is a set of kinds of metadata clusters.
type OverlapKinds uint16

const (
	OverlapMainHeader      OverlapKinds = 1 << iota // the header's cluster (QCOW2_OL_MAIN_HEADER)
	OverlapActiveL1                                 // the L1 table of the disk (QCOW2_OL_ACTIVE_L1)
	OverlapActiveL2                                 // L2 tables that it names (QCOW2_OL_ACTIVE_L2)
	OverlapRefcountTable                            // the refcount table (QCOW2_OL_REFCOUNT_TABLE)
	OverlapRefcountBlock                            // refcount blocks (QCOW2_OL_REFCOUNT_BLOCK)
	OverlapSnapshotTable                            // the snapshot table (QCOW2_OL_SNAPSHOT_TABLE)
	OverlapInactiveL1                               // L1 tables of snapshots (QCOW2_OL_INACTIVE_L1)
	OverlapInactiveL2                               // L2 tables that those name (QCOW2_OL_INACTIVE_L2)
	OverlapBitmapDirectory                          // the bitmap directory (QCOW2_OL_BITMAP_DIRECTORY)
	OverlapCryptoHeader                             // the LUKS header of an encrypted image
)

// overlapAllKinds is the set of all kinds.
const overlapAllKinds = OverlapCryptoHeader<<1 - 1

// overlapKindNames are the names of the kinds, lowest bit first.
var overlapKindNames = [...]string{
	"header", "active L1 table", "active L2 table", "refcount table", "refcount block", "snapshot table",
	"inactive L1 table", "inactive L2 table", "bitmap directory", "crypto header",
}

// String names the kinds of the set, as in "active L2 table, inactive L2 table"; the empty set is "nothing".
func (k OverlapKinds) String() string {
	var names []string
	for i, name := range overlapKindNames {
		if k>>i&1 != 0 {
			names = append(names, name)
		}
	}
	if rest := k &^ overlapAllKinds; rest != 0 {
		names = append(names, fmt.Sprintf("unknown kinds %#x", uint16(rest)))
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}

// OverlapPreset names the kinds of metadata that host writes are checked against, as QEMU's option
// overlap-check does. Every kind costs the same here, so the default is all of them.
type OverlapPreset int

const (
	// OverlapAll is every kind ("all"). The default.
	OverlapAll OverlapPreset = iota
	// OverlapCached is every kind but L2 tables of snapshots ("cached").
	OverlapCached
	// OverlapConstant is what does not move while a disk is written: header, active L1 table, refcount
	// table, snapshot table, bitmap directory and crypto header ("constant").
	OverlapConstant
	// OverlapNone is no kind: nothing is checked ("none").
	OverlapNone
)

// String returns QEMU's name of the preset.
func (p OverlapPreset) String() string {
	switch p {
	case OverlapAll:
		return "all"
	case OverlapCached:
		return "cached"
	case OverlapConstant:
		return "constant"
	case OverlapNone:
		return "none"
	}
	return fmt.Sprintf("OverlapPreset(%d)", int(p))
}

// kinds returns the kinds that the preset stands for. A preset that does not exist is all of them.
func (p OverlapPreset) kinds() OverlapKinds {
	const constant = OverlapMainHeader | OverlapActiveL1 | OverlapRefcountTable | OverlapSnapshotTable |
		OverlapBitmapDirectory | OverlapCryptoHeader
	switch p {
	case OverlapNone:
		return 0
	case OverlapConstant:
		return constant
	case OverlapCached:
		return constant | OverlapActiveL2 | OverlapRefcountBlock | OverlapInactiveL1
	}
	return overlapAllKinds
}
