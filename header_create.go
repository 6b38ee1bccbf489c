package qcow2

import (
	"errors"
	"fmt"
	"math"
	"strings"
)

// Defaults of CreateOptions.
const (
	defaultVersion      = 3
	defaultClusterSize  = 64 << 10
	defaultRefcountBits = 16
)

// featureTableMinCluster is the cluster size in bytes above which a new image gets a feature name
// table, as QEMU does it: it would crowd the backing name out of smaller header clusters.
const featureTableMinCluster = 4096

// newHeader returns the header of a new image of size bytes; offsets of the L1 table and the offset
// and clusters of the refcount table are the caller's to fill in. The options are not changed; nil
// stands for the zero value. The errors are *OptionError, all of them joined; ErrTooLarge comes with
// the one for a size that no L1 table maps; ErrHeaderFull if the names do not fit.
func newHeader(size uint64, o *CreateOptions) (*header, error) {
	if o == nil {
		o = &CreateOptions{}
	}
	version, clusterSize, refcountBits := o.Version, o.ClusterSize, o.RefcountBits
	if version == 0 {
		version = defaultVersion
	}
	if clusterSize == 0 {
		clusterSize = defaultClusterSize
	}
	if refcountBits == 0 {
		refcountBits = defaultRefcountBits
	}
	if err := checkCreate(size, o, version, clusterSize, refcountBits); err != nil {
		return nil, err
	}

	h := &header{
		version:       uint32(version),
		clusterBits:   log2(clusterSize),
		size:          size,
		refcountOrder: log2(refcountBits),
		headerLength:  headerLengthV2,
		backingName:   o.BackingFile,
		backingFormat: o.BackingFormat,
		dataFileName:  o.DataFile,
		compression:   o.Compression,
	}
	if version >= 3 {
		h.headerLength = headerLengthV3
		h.padding = make([]byte, headerLengthV3-fieldPadding)
	}
	for _, f := range []struct {
		on   bool
		word *uint64
		bit  uint64
	}{
		{o.DataFile != "", &h.incompatible, incompatDataFile},
		{o.Compression != CompressionDeflate, &h.incompatible, incompatCompression},
		{o.ExtendedL2, &h.incompatible, incompatExtendedL2},
		{o.LazyRefcounts, &h.compatible, compatLazyRefcounts},
		{o.DataFileRaw, &h.autoclear, autoclearRawData},
	} {
		if f.on {
			*f.word |= f.bit
		}
	}
	if version >= 3 && clusterSize > featureTableMinCluster {
		h.extensions = append(h.extensions, headerExtension{extFeatureNames, encodeFeatureNames()})
	}
	// What the layout adds and leaves out is settled here, so that a later rewrite gives the same bytes.
	h.extensions = h.currentExtensions()
	h.sortExtensions()
	if _, err := h.encode(); err != nil {
		return nil, err
	}

	g := h.geometry()
	entries := g.l1Entries(size)
	if entries > maxL1Bytes/l1EntrySize {
		return nil, tooLarge(&g, size)
	}
	h.l1Size = uint32(entries)
	return h, nil
}

// log2 returns the binary logarithm of a power of two.
func log2(n int) uint32 {
	var bits uint32
	for ; n > 1; n >>= 1 {
		bits++
	}
	return bits
}

// isPowerOfTwo reports whether n is a power of two from low to high.
func isPowerOfTwo(n, low, high int) bool { return n >= low && n <= high && n&(n-1) == 0 }

// checkCreate returns every contradiction in the options of a new image, joined, or nil. Version,
// clusterSize and refcountBits are those of the options with the defaults filled in.
func checkCreate(size uint64, o *CreateOptions, version, clusterSize, refcountBits int) error {
	var errs []error
	refuse := func(bad bool, option string, value any, reason string, args ...any) {
		if bad {
			errs = append(errs, &OptionError{option, value, fmt.Sprintf(reason, args...)})
		}
	}
	refuse(version != 2 && version != 3, "Version", version, "want 2 or 3")
	clusterOK := isPowerOfTwo(clusterSize, 1<<minClusterBits, 1<<maxClusterBits)
	refuse(!clusterOK, "ClusterSize", clusterSize, "want a power of two from %d to %d", 1<<minClusterBits, 1<<maxClusterBits)
	widthOK := isPowerOfTwo(refcountBits, 1, 1<<maxRefcountOrder)
	refuse(!widthOK, "RefcountBits", refcountBits, "want a power of two from 1 to %d", 1<<maxRefcountOrder)
	if size > math.MaxInt64 {
		refuse(true, "size", int64(size), "want no negative number")
	} else {
		refuse(size%sectorSize != 0, "size", size, "want a multiple of %d", sectorSize)
	}
	refuse(o.Compression > CompressionZstd, "Compression", uint8(o.Compression), "want deflate or zstd")

	if version == 2 {
		const needs = "needs version 3"
		refuse(o.ExtendedL2, "ExtendedL2", true, needs)
		refuse(o.LazyRefcounts, "LazyRefcounts", true, needs)
		refuse(widthOK && refcountBits != defaultRefcountBits, "RefcountBits", refcountBits, "version 2 has %d", defaultRefcountBits)
		refuse(o.DataFile != "", "DataFile", o.DataFile, needs)
		refuse(o.Compression == CompressionZstd, "Compression", o.Compression, needs)
	}
	refuse(o.ExtendedL2 && clusterOK && clusterSize < 1<<minExtL2Bits, "ExtendedL2", true,
		"needs clusters of at least %d, not %d", 1<<minExtL2Bits, clusterSize)

	refuse(o.DataFileRaw && o.DataFile == "", "DataFileRaw", true, "needs DataFile")
	refuse(o.DataFileRaw && o.BackingFile != "", "DataFileRaw", true, "excludes BackingFile")
	refuse(!o.Preallocation.valid(), "Preallocation", int(o.Preallocation), "is no Preallocation")
	refuse(o.Preallocation != PreallocationOff && !o.ExtendedL2 && (o.BackingFile != "" || o.Open != nil && o.Open.Backing != nil),
		"Preallocation", o.Preallocation, "with a backing file it needs ExtendedL2: mapped clusters would hide it")
	refuse(strings.ContainsRune(o.DataFile, 0), "DataFile", o.DataFile, "want no NUL")

	refuse(o.BackingFile != "" && o.BackingFormat == "", "BackingFormat", "", "needed with BackingFile")
	refuse(o.BackingFile == "" && o.BackingFormat != "", "BackingFormat", o.BackingFormat, "needs BackingFile")
	refuse(len(o.BackingFile) > maxBackingName, "BackingFile", o.BackingFile, "want at most %d bytes", maxBackingName)
	refuse(strings.ContainsRune(o.BackingFile, 0), "BackingFile", o.BackingFile, "want no NUL")
	refuse(len(o.BackingFormat) > maxBackingFormat, "BackingFormat", o.BackingFormat, "want at most %d bytes", maxBackingFormat)
	refuse(strings.ContainsRune(o.BackingFormat, 0), "BackingFormat", o.BackingFormat, "want no NUL")
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}
