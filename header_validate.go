package qcow2

import (
	"fmt"
	"iter"
	"slices"
)

// validate checks the header against the format and the limits, and returns the first violation as a
// *HeaderError, or nil. Limits that are zero have their defaults. Nothing here says whether the file holds
// what the header points at: tables past its end read as zeros.
func (h *header) validate(limits Limits) error {
	for err := range h.violations(limits) {
		return err
	}
	return nil
}

// validateForCheck is validate for who only checks the image: it lets pass what a check judges itself.
func (h *header) validateForCheck(limits Limits) error {
	rules := [...]func(Limits) *HeaderError{
		h.checkFeatures,
		h.checkCompression,
		h.checkSubclusters,
		h.checkRefcountOrder,
		h.checkCryptMethod,
		h.checkL1Table,
		h.checkSize,
		h.checkCrypto,
	}
	for err := range violationsOf(rules[:], limits) {
		return err
	}
	return nil
}

// violations yields every rule that the header breaks, in the order in which an opener must look at
// them: features first, since an unknown one may change all that follows.
func (h *header) violations(limits Limits) iter.Seq[*HeaderError] {
	rules := [...]func(Limits) *HeaderError{
		h.checkFeatures,
		h.checkCompression,
		h.checkSubclusters,
		h.checkRefcountOrder,
		h.checkCryptMethod,
		h.checkRefcountTable,
		h.checkSnapshotTable,
		h.checkL1Table,
		h.checkSize,
		h.checkMetadataLimit,
		h.checkBackingFormat,
		h.checkBitmaps,
		h.checkCrypto,
	}
	return violationsOf(rules[:], limits)
}

// violationsOf yields what the rules find, in their order.
func violationsOf(rules []func(Limits) *HeaderError, limits Limits) iter.Seq[*HeaderError] {
	limits = limits.withDefaults()
	return func(yield func(*HeaderError) bool) {
		for _, rule := range rules {
			if err := rule(limits); err != nil && !yield(err) {
				return
			}
		}
	}
}

// checkFeatures refuses unknown incompatible features, by name.
func (h *header) checkFeatures(Limits) *HeaderError {
	if names := h.unknownIncompatible(); names != nil {
		// Names come from the image; there are at most 64.
		return headerErr("incompatible_features", h.incompatible, ErrUnsupported,
			"known features only, not %q", names)
	}
	return nil
}

// checkCompression refuses unknown compression types, and a type that contradicts its feature bit.
func (h *header) checkCompression(Limits) *HeaderError {
	bit := h.incompatible&incompatCompression != 0
	switch {
	case h.compression > CompressionZstd:
		return headerErr("compression_type", uint8(h.compression), ErrUnsupported, "0 (deflate) or 1 (zstd)")
	case h.compression != CompressionDeflate && !bit:
		return headerErr("compression_type", uint8(h.compression), ErrCorrupt, "0 without incompatible feature 3")
	case h.compression == CompressionDeflate && bit:
		return headerErr("compression_type", uint8(h.compression), ErrCorrupt, "not 0 with incompatible feature 3")
	}
	return nil
}

// checkSubclusters refuses subclusters smaller than a sector.
func (h *header) checkSubclusters(Limits) *HeaderError {
	if h.extendedL2() && h.clusterBits < minExtL2Bits {
		return headerErr("cluster_bits", h.clusterBits, ErrCorrupt, "at least %d with extended L2 entries", minExtL2Bits)
	}
	return nil
}

// checkRefcountOrder bounds the width of refcounts.
func (h *header) checkRefcountOrder(Limits) *HeaderError {
	if h.refcountOrder > maxRefcountOrder {
		return headerErr("refcount_order", h.refcountOrder, ErrCorrupt, "at most %d", maxRefcountOrder)
	}
	return nil
}

// checkCryptMethod refuses unknown encryption.
func (h *header) checkCryptMethod(Limits) *HeaderError {
	if h.cryptMethod > cryptLUKS {
		return headerErr("crypt_method", h.cryptMethod, ErrUnsupported, "0 (none), 1 (AES) or 2 (LUKS)")
	}
	return nil
}

// checkTableOffset checks the host offset of a table of n bytes, n at most 2^40. QEMU takes tables
// inside the header's cluster, and reads the header as table entries; the format leaves that cluster
// to the header alone, and a write to such a table would destroy it.
func (h *header) checkTableOffset(field string, off, n uint64) *HeaderError {
	switch {
	case off&(h.clusterSize()-1) != 0:
		return headerErr(field, off, ErrCorrupt, "a multiple of the cluster size %#x", h.clusterSize())
	case off > maxHostOff-n:
		return headerErr(field, off, ErrCorrupt, "such that %#x bytes end below %#x", n, uint64(maxHostOff))
	case n > 0 && off < h.clusterSize():
		return headerErr(field, off, ErrCorrupt, "behind the header's cluster of %#x", h.clusterSize())
	}
	return nil
}

// refTableBytes returns the size of the refcount table in bytes, below 2^53.
func (h *header) refTableBytes() uint64 { return uint64(h.refTableClusters) << h.clusterBits }

// l1Bytes returns the size of the active L1 table in bytes, below 2^35.
func (h *header) l1Bytes() uint64 { return uint64(h.l1Size) * l1EntrySize }

// checkRefcountTable bounds the refcount table. There is always one.
func (h *header) checkRefcountTable(Limits) *HeaderError {
	if most := uint64(maxRefTableBytes) >> h.clusterBits; uint64(h.refTableClusters) > most {
		return headerErr("refcount_table_clusters", h.refTableClusters, ErrUnsupported, "1 to %d", most)
	}
	if h.refTableClusters == 0 {
		return headerErr("refcount_table_clusters", h.refTableClusters, ErrCorrupt, "at least 1")
	}
	return h.checkTableOffset("refcount_table_offset", h.refTableOff, h.refTableBytes())
}

// checkSnapshotTable bounds the number of snapshots, and the offset of their table, whose length is
// known only once it is read.
func (h *header) checkSnapshotTable(limits Limits) *HeaderError {
	if h.nbSnapshots > maxSnapshots {
		return headerErr("nb_snapshots", h.nbSnapshots, ErrUnsupported, "at most %d", maxSnapshots)
	}
	if most := limits.Snapshots; int64(h.nbSnapshots) > int64(most) {
		return headerErr("nb_snapshots", h.nbSnapshots,
			&LimitError{Limit: "Snapshots", Value: int64(h.nbSnapshots), Max: int64(most)}, "at most %d", most)
	}
	return h.checkTableOffset("snapshots_offset", h.snapshotsOff, uint64(h.nbSnapshots)*minSnapshotEntry)
}

// checkL1Table bounds the active L1 table, and requires it to map the whole disk.
func (h *header) checkL1Table(Limits) *HeaderError {
	if h.l1Bytes() > maxL1Bytes {
		return headerErr("l1_size", h.l1Size, ErrUnsupported, "at most %d", maxL1Bytes/l1EntrySize)
	}
	// The L1 table divides by cluster size and extended L2 alone.
	g := newGeometry(uint(h.clusterBits), 0, h.extendedL2())
	if need := g.l1Entries(h.size); uint64(h.l1Size) < need {
		return headerErr("l1_size", h.l1Size, ErrCorrupt, "at least %d for a disk of %#x bytes", need, h.size)
	}
	return h.checkTableOffset("l1_table_offset", h.l1Off, h.l1Bytes())
}

// checkSize applies the caller's limit to the size of the disk.
func (h *header) checkSize(limits Limits) *HeaderError {
	if most := limits.VirtualSize; most > 0 && h.virtualSize() > uint64(most) {
		return headerErr("size", h.size,
			&LimitError{Limit: "VirtualSize", Value: int64(h.virtualSize()), Max: most}, "at most %#x", most)
	}
	return nil
}

// checkMetadataLimit applies the caller's limit to the tables that an open keeps in memory. It counts
// what the header claims, in the file or past its end: a write may fill all of it.
func (h *header) checkMetadataLimit(limits Limits) *HeaderError {
	if n := int64(h.l1Bytes() + h.refTableBytes()); n > limits.MetadataBytes {
		err := &LimitError{Limit: "MetadataBytes", Value: n, Max: limits.MetadataBytes}
		if h.refTableBytes() > h.l1Bytes() {
			return headerErr("refcount_table_clusters", h.refTableClusters, err, "less")
		}
		return headerErr("l1_size", h.l1Size, err, "less")
	}
	return nil
}

// checkBackingFormat bounds the name of the backing file's format.
func (h *header) checkBackingFormat(Limits) *HeaderError {
	for _, e := range h.extensions {
		if e.typ == extBackingFormat && len(e.data) > maxBackingFormat {
			return headerErr(extensionName(e.typ)+" length", len(e.data), ErrUnsupported, "at most %d", maxBackingFormat)
		}
	}
	return nil
}

// checkBitmaps checks a bitmaps extension that the autoclear bit vouches for.
func (h *header) checkBitmaps(Limits) *HeaderError {
	if h.autoclear&autoclearBitmaps == 0 {
		return nil
	}
	name := extensionName(extBitmaps)
	for _, e := range h.extensions {
		if e.typ == extBitmaps && len(e.data) != extBitmapsSize {
			return headerErr(name+" length", len(e.data), ErrCorrupt, "%d", extBitmapsSize)
		}
	}
	b := h.bitmaps
	switch {
	case b == nil:
		return nil
	case b.reserved != 0:
		return headerErr(name+" reserved", b.reserved, ErrCorrupt, "0")
	case b.count == 0:
		return headerErr(name+" nb_bitmaps", b.count, ErrCorrupt, "at least 1")
	case b.count > maxBitmaps:
		return headerErr(name+" nb_bitmaps", b.count, ErrUnsupported, "at most %d", maxBitmaps)
	case b.dirSize > maxBitmapDirBytes:
		return headerErr(name+" bitmap_directory_size", b.dirSize, ErrUnsupported, "at most %d", maxBitmapDirBytes)
	case b.dirSize < uint64(b.count)*minBitmapDirEntry:
		return headerErr(name+" bitmap_directory_size", b.dirSize, ErrCorrupt, "at least %d for %d bitmaps",
			uint64(b.count)*minBitmapDirEntry, b.count)
	}
	return h.checkTableOffset(name+" bitmap_directory_offset", b.dirOff, b.dirSize)
}

// checkCrypto checks the pointer to the LUKS header, which LUKS needs and nothing else may have.
func (h *header) checkCrypto(Limits) *HeaderError {
	name := extensionName(extCryptoHeader)
	for _, e := range h.extensions {
		if e.typ != extCryptoHeader {
			continue
		}
		if h.cryptMethod != cryptLUKS {
			return headerErr(name, "present", ErrCorrupt, "none with crypt_method %d", h.cryptMethod)
		}
		if len(e.data) != extCryptoSize {
			return headerErr(name+" length", len(e.data), ErrCorrupt, "%d", extCryptoSize)
		}
	}
	switch {
	case h.cryptMethod != cryptLUKS:
		return nil
	case h.crypto == nil:
		return headerErr(name, "absent", ErrCorrupt, "one with crypt_method %d", h.cryptMethod)
	case h.crypto.length == 0 || h.crypto.length > maxHostOff:
		return headerErr(name+" length field", h.crypto.length, ErrCorrupt, "1 to %#x", uint64(maxHostOff))
	}
	return h.checkTableOffset(name+" offset", h.crypto.off, h.crypto.length)
}

// errEncryptedImage is the class of an image that is encrypted: ErrEncrypted and ErrUnsupported.
var errEncryptedImage = fmt.Errorf("%w: %w", ErrUnsupported, ErrEncrypted)

// checkOpenable refuses a valid header whose image cannot be opened, for reading or, with readWrite,
// for writing. The dirty bit is not its business. The errors are *HeaderError:
//   - ErrEncrypted and ErrUnsupported if the image is encrypted;
//   - ErrCorrupt if the raw data bit stands without a data file;
//   - for writing, ErrCorrupt if the corrupt bit is set, if a data file comes with snapshots (whose
//     content a write would change) or, being raw, with a backing file (which it cannot show), or if
//     two tables that the header points at overlap.
func (h *header) checkOpenable(readWrite bool) error {
	switch {
	case h.cryptMethod != cryptNone:
		return headerErr("crypt_method", h.cryptMethod, errEncryptedImage, "0")
	case h.rawData() && !h.hasDataFile():
		return headerErr("autoclear_features", h.autoclear, ErrCorrupt, "no bit 1 (raw data) without an external data file")
	case !readWrite:
		return nil
	case h.corrupt():
		return headerErr("incompatible_features", h.incompatible, ErrCorrupt, "no bit 1 (corrupt) for writing")
	case h.hasDataFile() && h.nbSnapshots > 0:
		return headerErr("nb_snapshots", h.nbSnapshots, ErrCorrupt, "0 with an external data file, for writing")
	case h.hasDataFile() && h.rawData() && h.hasBacking():
		return headerErr("autoclear_features", h.autoclear, ErrCorrupt, "no bit 1 (raw data) with a backing file, for writing")
	}
	return h.checkOverlap()
}

// checkOverlap refuses tables of the header that share bytes: a write to one would destroy the other.
func (h *header) checkOverlap() error {
	type table struct {
		field  string
		off, n uint64
	}
	tables := []table{
		{"l1_table_offset", h.l1Off, h.l1Bytes()},
		{"refcount_table_offset", h.refTableOff, h.refTableBytes()},
		{"snapshots_offset", h.snapshotsOff, uint64(h.nbSnapshots) * minSnapshotEntry},
	}
	if h.bitmaps != nil {
		tables = append(tables, table{extensionName(extBitmaps) + " bitmap_directory_offset", h.bitmaps.dirOff, h.bitmaps.dirSize})
	}
	tables = slices.DeleteFunc(tables, func(t table) bool { return t.n == 0 })
	slices.SortFunc(tables, func(a, b table) int {
		if a.off < b.off {
			return -1
		}
		return 1
	})
	for i := 1; i < len(tables); i++ {
		a, b := tables[i-1], tables[i]
		if b.off-a.off < a.n {
			return headerErr(b.field, b.off, ErrCorrupt, "behind what %s points at, %#x to %#x", a.field, a.off, a.off+a.n)
		}
	}
	return nil
}
