package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// testImageBytes is the length of the files that header tests build: 192 KiB, like a new empty image.
const testImageBytes = 192 << 10

// headerCmp lets cmp look into headers.
var headerCmp = cmp.AllowUnexported(header{}, headerExtension{}, bitmapsExtension{}, cryptoExtension{})

// testHeader returns the header of a new image with its tables where QEMU puts them.
func testHeader(t testing.TB, size uint64, o *CreateOptions) *header {
	t.Helper()
	h, err := newHeader(size, o)
	if err != nil {
		t.Fatal(err)
	}
	h.refTableOff, h.refTableClusters = h.clusterSize(), 1
	if h.l1Size > 0 {
		h.l1Off = 3 * h.clusterSize()
	}
	return h
}

// testFile returns a file of testImageBytes that begins with the encoded header.
func testFile(t testing.TB, h *header) []byte {
	t.Helper()
	b, err := h.encode()
	if err != nil {
		t.Fatal(err)
	}
	return append(b, make([]byte, testImageBytes-len(b))...)
}

// testBases returns the images that the table of rules pokes at, by name. All are valid.
func testBases(t testing.TB) map[string][]byte {
	t.Helper()
	bases := make(map[string][]byte)
	for name, o := range map[string]*CreateOptions{
		"v3":      nil,
		"v2":      {Version: 2},
		"512":     {ClusterSize: 512},
		"extl2":   {ExtendedL2: true, ClusterSize: 16 << 10},
		"zstd":    {Compression: CompressionZstd},
		"data":    {DataFile: "disk.raw"},
		"rawdata": {DataFile: "disk.raw", DataFileRaw: true},
	} {
		bases[name] = testFile(t, testHeader(t, 1<<20, o))
	}
	h := testHeader(t, 1<<20, &CreateOptions{BackingFile: "base.qcow2", BackingFormat: "qcow2"})
	h.extensions, h.backingOff = nil, 1024 // so that zeros follow a poked length
	bases["backing"] = testFile(t, h)
	h = testHeader(t, 1<<20, nil)
	h.autoclear |= autoclearBitmaps
	h.bitmaps = &bitmapsExtension{count: 2, dirSize: 64, dirOff: 2 * h.clusterSize()}
	h.extensions = nil // so that what follows a poked length is END
	bases["bitmaps"] = testFile(t, h)
	h = testHeader(t, 1<<20, nil)
	h.cryptMethod = cryptLUKS
	data := binary.BigEndian.AppendUint64(nil, 2*h.clusterSize())
	h.extensions = []headerExtension{{extCryptoHeader, binary.BigEndian.AppendUint64(data, 4096)}}
	bases["luks"] = testFile(t, h)
	return bases
}

// poke is a big-endian number of 1, 4 or 8 bytes to be written over an image.
type poke struct {
	off, size int
	value     uint64
}

// apply writes the number into b.
func (p poke) apply(b []byte) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], p.value)
	copy(b[p.off:], n[8-p.size:])
}

// fieldPoke returns the poke of a field of the header.
func fieldPoke(t testing.TB, name string, value uint64) poke {
	t.Helper()
	for _, f := range headerFields {
		if f.name == name {
			return poke{f.off, f.size, value}
		}
	}
	t.Fatalf("no header field %q", name)
	return poke{}
}

// extensionOffset returns the offset of the first extension of a type in the header b.
func extensionOffset(t testing.TB, b []byte, typ uint32) int {
	t.Helper()
	off := headerLengthV2
	if binary.BigEndian.Uint32(b[fieldVersion:]) >= 3 {
		off = int(binary.BigEndian.Uint32(b[fieldHeaderLength:]))
	}
	for {
		got, n := binary.BigEndian.Uint32(b[off:]), binary.BigEndian.Uint32(b[off+4:])
		if got == typ {
			return off
		}
		if got == extEnd {
			t.Fatalf("no %s", extensionName(typ))
		}
		off += extHeaderSize + int(n+7)&^7
	}
}

// headerRule is one value of one field, and what comes of it.
type headerRule struct {
	base  string // the image that is poked
	field string // the field that is poked, in headerFields; with ext, only a name
	value uint64 // what is poked

	ext       uint32          // the field lies in the first extension of this type: extSize bytes at extOff
	extOff    int             // from the start of the extension
	extSize   int             // bytes of the field
	also      map[string]uint // further fields that are poked
	write     bool            // only an open for writing is refused
	limits    Limits          // the limits in force
	wantField string          // the field that the error names; default: field
	wantValue any             // the value that it shows; default: value
	class     error           // nil: accepted
	qemuOpens bool            // QEMU takes what we refuse, or refuses what we take if class is nil
	noQEMU    bool            // QEMU is not asked
}

// headerRules has a row for each rule of the header. 1<<20 bytes of disk need one L1 entry.
var headerRules = []headerRule{
	{base: "v3", field: "magic", value: 0, class: ErrNotQcow2, noQEMU: true},
	{base: "v3", field: "magic", value: 0x514649fa, class: ErrNotQcow2, noQEMU: true},
	{base: "v3", field: "version", value: 0, class: ErrUnsupported},
	{base: "v3", field: "version", value: 1, class: ErrUnsupported},
	{base: "v3", field: "version", value: 4, class: ErrUnsupported},
	{base: "v3", field: "version", value: math.MaxUint32, class: ErrUnsupported},

	{base: "backing", field: "backing_file_offset", value: 64<<10 + 1, class: ErrCorrupt},
	{base: "backing", field: "backing_file_offset", value: math.MaxUint64, class: ErrCorrupt},
	// QEMU takes a name made of header fields.
	{base: "backing", field: "backing_file_offset", value: 111, class: ErrCorrupt, qemuOpens: true},
	{base: "backing", field: "backing_file_offset", value: 112 + 4, class: ErrCorrupt, wantField: "header extensions", wantValue: 4},
	{base: "backing", field: "backing_file_offset", value: 112 + 8, class: ErrCorrupt,
		wantField: "extension backing format length", wantValue: 5},
	{base: "backing", field: "backing_file_offset", value: 64 << 10, class: ErrCorrupt,
		wantField: "backing_file_size", wantValue: 10},
	{base: "v3", field: "backing_file_offset", value: 112},
	{base: "backing", field: "backing_file_size", value: 1024, class: ErrCorrupt},
	{base: "backing", field: "backing_file_size", value: math.MaxUint32, class: ErrCorrupt},
	{base: "512", field: "backing_file_size", value: 213, also: map[string]uint{"backing_file_offset": 300}, class: ErrCorrupt},
	{base: "512", field: "backing_file_size", value: 212, also: map[string]uint{"backing_file_offset": 300}},
	{base: "backing", field: "backing_file_size", value: 1023},
	{base: "v3", field: "backing_file_size", value: math.MaxUint32}, // means nothing without an offset

	{base: "v3", field: "cluster_bits", value: 0, class: ErrCorrupt},
	{base: "v3", field: "cluster_bits", value: 8, class: ErrCorrupt},
	{base: "v3", field: "cluster_bits", value: 22, class: ErrUnsupported},
	{base: "v3", field: "cluster_bits", value: 63, class: ErrUnsupported},
	{base: "v3", field: "cluster_bits", value: 64, class: ErrUnsupported},
	{base: "v3", field: "cluster_bits", value: math.MaxUint32, class: ErrUnsupported},
	{base: "v2", field: "cluster_bits", value: 8, class: ErrCorrupt},
	{base: "extl2", field: "cluster_bits", value: 13, class: ErrCorrupt},

	{base: "v3", field: "size", value: 1 << 63, class: ErrCorrupt},
	{base: "v3", field: "size", value: math.MaxUint64, class: ErrCorrupt},
	{base: "v3", field: "size", value: 512<<20 + 1, class: ErrCorrupt, wantField: "l1_size", wantValue: 1},
	{base: "v3", field: "size", value: math.MaxInt64, class: ErrCorrupt, wantField: "l1_size", wantValue: 1},
	{base: "v3", field: "size", value: 1 << 20, limits: Limits{VirtualSize: 1<<20 - 1}, class: ErrLimit, noQEMU: true},
	{base: "v3", field: "size", value: 1<<20 - 1, limits: Limits{VirtualSize: 1<<20 - 512}},
	{base: "v3", field: "size", value: 1000},

	{base: "v3", field: "crypt_method", value: 3, class: ErrUnsupported},
	{base: "v3", field: "crypt_method", value: math.MaxUint32, class: ErrUnsupported},
	{base: "v3", field: "crypt_method", value: 2, class: ErrCorrupt, wantField: "extension crypto header", wantValue: "absent", noQEMU: true}, // QEMU 7.2 dies of a null pointer
	{base: "luks", field: "crypt_method", value: 0, class: ErrCorrupt, wantField: "extension crypto header", wantValue: "present"},
	{base: "luks", field: "crypt_method", value: 1, class: ErrCorrupt, wantField: "extension crypto header", wantValue: "present"},
	{base: "v2", field: "crypt_method", value: 3, class: ErrUnsupported},

	{base: "v3", field: "l1_size", value: 4<<20 + 1, class: ErrUnsupported},
	{base: "v3", field: "l1_size", value: math.MaxUint32, class: ErrUnsupported},
	{base: "v3", field: "l1_size", value: 0, class: ErrCorrupt},
	{base: "v2", field: "l1_size", value: 0, class: ErrCorrupt},
	{base: "v3", field: "l1_size", value: 4 << 20}, // past the end of the file
	{base: "v3", field: "l1_size", value: 4 << 20, limits: Limits{MetadataBytes: 32 << 20}, class: ErrLimit, noQEMU: true},
	{base: "v3", field: "l1_table_offset", value: 3<<16 + 512, class: ErrCorrupt},
	{base: "v3", field: "l1_table_offset", value: 1, class: ErrCorrupt},
	// QEMU reads the header as an L1 table, and calls the image corrupt at the first write.
	{base: "v3", field: "l1_table_offset", value: 0, class: ErrCorrupt, qemuOpens: true},
	{base: "v3", field: "l1_table_offset", value: 1 << 56, class: ErrCorrupt, qemuOpens: true},
	{base: "v3", field: "l1_table_offset", value: 1<<64 - 1<<16, class: ErrCorrupt},
	{base: "v3", field: "l1_table_offset", value: 1<<56 - 1<<16},
	{base: "v3", field: "l1_table_offset", value: 1 << 16, write: true, class: ErrCorrupt, wantField: "*", wantValue: 1 << 16, noQEMU: true},

	{base: "v3", field: "refcount_table_offset", value: 1<<16 + 512, class: ErrCorrupt},
	{base: "v3", field: "refcount_table_offset", value: 0, class: ErrCorrupt, qemuOpens: true},
	{base: "v3", field: "refcount_table_offset", value: 1 << 56, class: ErrCorrupt, qemuOpens: true},
	{base: "v3", field: "refcount_table_offset", value: 1<<63 - 1<<16, class: ErrCorrupt},
	{base: "v3", field: "refcount_table_offset", value: 3 << 16, write: true, class: ErrCorrupt, wantField: "*", noQEMU: true},
	{base: "v3", field: "refcount_table_clusters", value: 0, class: ErrCorrupt},
	{base: "v3", field: "refcount_table_clusters", value: 129, class: ErrUnsupported},
	{base: "v3", field: "refcount_table_clusters", value: math.MaxUint32, class: ErrUnsupported},
	{base: "512", field: "refcount_table_clusters", value: 16<<10 + 1, class: ErrUnsupported},
	{base: "v3", field: "refcount_table_clusters", value: 128},
	{base: "v3", field: "refcount_table_clusters", value: 128, limits: Limits{MetadataBytes: 8 << 20}, class: ErrLimit, noQEMU: true},
	{base: "v3", field: "refcount_table_clusters", value: 3, write: true, class: ErrCorrupt,
		wantField: "l1_table_offset", wantValue: 3 << 16, noQEMU: true},

	{base: "v3", field: "nb_snapshots", value: 65537, also: map[string]uint{"snapshots_offset": 1 << 17}, class: ErrUnsupported},
	{base: "v3", field: "nb_snapshots", value: math.MaxUint32, also: map[string]uint{"snapshots_offset": 1 << 17}, class: ErrUnsupported},
	{base: "v3", field: "nb_snapshots", value: 11, also: map[string]uint{"snapshots_offset": 1 << 17},
		limits: Limits{Snapshots: 10}, class: ErrLimit, noQEMU: true},
	{base: "v3", field: "nb_snapshots", value: 65536, also: map[string]uint{"snapshots_offset": 1 << 20}},
	{base: "data", field: "nb_snapshots", value: 1, also: map[string]uint{"snapshots_offset": 1 << 17}, write: true, class: ErrCorrupt, noQEMU: true},
	{base: "v3", field: "snapshots_offset", value: 8, class: ErrCorrupt},
	{base: "v3", field: "snapshots_offset", value: 8, also: map[string]uint{"nb_snapshots": 1}, class: ErrCorrupt},
	{base: "v3", field: "snapshots_offset", value: 0, also: map[string]uint{"nb_snapshots": 1}, class: ErrCorrupt, qemuOpens: true},
	{base: "v3", field: "snapshots_offset", value: 1 << 56, also: map[string]uint{"nb_snapshots": 1}, class: ErrCorrupt, qemuOpens: true},
	{base: "v3", field: "snapshots_offset", value: 3 << 16, also: map[string]uint{"nb_snapshots": 1}, write: true, class: ErrCorrupt, wantField: "*", noQEMU: true},

	{base: "v3", field: "incompatible_features", value: 1 << 5, class: ErrUnsupported},
	{base: "v3", field: "incompatible_features", value: 1 << 63, class: ErrUnsupported},
	{base: "v3", field: "incompatible_features", value: math.MaxUint64, class: ErrUnsupported},
	{base: "v3", field: "incompatible_features", value: incompatCorrupt, write: true, class: ErrCorrupt},
	{base: "v3", field: "incompatible_features", value: incompatDirty},
	{base: "v3", field: "incompatible_features", value: incompatCompression, class: ErrCorrupt, wantField: "compression_type", wantValue: 0},
	{base: "zstd", field: "incompatible_features", value: 0, class: ErrCorrupt, wantField: "compression_type", wantValue: 1},
	{base: "512", field: "incompatible_features", value: incompatExtendedL2, class: ErrCorrupt, wantField: "cluster_bits", wantValue: 9},
	{base: "v3", field: "compatible_features", value: math.MaxUint64},
	{base: "v3", field: "autoclear_features", value: autoclearRawData, class: ErrCorrupt, noQEMU: true},
	{base: "v3", field: "autoclear_features", value: math.MaxUint64 &^ autoclearRawData},
	{base: "rawdata", field: "backing_file_offset", value: 4096, also: map[string]uint{"backing_file_size": 4}, noQEMU: true},

	{base: "v3", field: "refcount_order", value: 7, class: ErrCorrupt},
	{base: "v3", field: "refcount_order", value: 64, class: ErrCorrupt},
	{base: "v3", field: "refcount_order", value: math.MaxUint32, class: ErrCorrupt},
	{base: "v3", field: "header_length", value: 0, class: ErrCorrupt},
	{base: "v3", field: "header_length", value: 72, class: ErrCorrupt},
	{base: "v3", field: "header_length", value: 103, class: ErrCorrupt},
	{base: "v3", field: "header_length", value: 64<<10 + 1, class: ErrCorrupt},
	{base: "v3", field: "header_length", value: math.MaxUint32, class: ErrCorrupt},
	{base: "512", field: "header_length", value: 520, class: ErrCorrupt},
	{base: "512", field: "header_length", value: 512},
	{base: "v3", field: "header_length", value: 104},
	{base: "v3", field: "compression_type", value: 2, also: map[string]uint{"incompatible_features": incompatCompression}, class: ErrUnsupported},
	{base: "v3", field: "compression_type", value: 255, class: ErrUnsupported},
	{base: "v3", field: "compression_type", value: 1, class: ErrCorrupt},
	{base: "zstd", field: "compression_type", value: 0, class: ErrCorrupt},
	{base: "v3", field: "padding", value: 1<<56 - 1},

	{base: "v3", ext: extFeatureNames, field: "extension feature name table length", extOff: 4, extSize: 4, value: 64 << 10, class: ErrCorrupt},
	{base: "v3", ext: extFeatureNames, field: "extension feature name table length", extOff: 4, extSize: 4, value: math.MaxUint32, class: ErrCorrupt},
	{base: "v3", ext: extEnd, field: "extension END length", extOff: 4, extSize: 4, value: math.MaxUint32, class: ErrCorrupt},
	{base: "v3", ext: extFeatureNames, field: "extension 0x12345678", extOff: 0, extSize: 4, value: 0x12345678},
	{base: "backing", ext: extBackingFormat, field: "extension backing format length", extOff: 4, extSize: 4, value: 16, class: ErrUnsupported},
	{base: "backing", ext: extBackingFormat, field: "extension backing format length", extOff: 4, extSize: 4, value: math.MaxUint32, class: ErrCorrupt},
	{base: "data", ext: extDataFile, field: "extension external data file length", extOff: 4, extSize: 4, value: 64 << 10, class: ErrCorrupt},

	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps length", extOff: 4, extSize: 4, value: 32, class: ErrCorrupt},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps length", extOff: 4, extSize: 4, value: 16, class: ErrCorrupt,
		wantField: "extension END length", wantValue: 2 << 16}, // the offset that follows, read as an extension
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps nb_bitmaps", extOff: 8, extSize: 4, value: 0, class: ErrCorrupt},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps nb_bitmaps", extOff: 8, extSize: 4, value: 65536, class: ErrUnsupported},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps reserved", extOff: 12, extSize: 4, value: 1, class: ErrCorrupt},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps bitmap_directory_size", extOff: 16, extSize: 8, value: 1024*65535 + 1, class: ErrUnsupported},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps bitmap_directory_size", extOff: 16, extSize: 8, value: math.MaxUint64, class: ErrUnsupported},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps bitmap_directory_size", extOff: 16, extSize: 8, value: 47, class: ErrCorrupt, noQEMU: true},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps bitmap_directory_offset", extOff: 24, extSize: 8, value: 1<<17 + 8, class: ErrCorrupt},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps bitmap_directory_offset", extOff: 24, extSize: 8, value: 0, class: ErrCorrupt, noQEMU: true},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps bitmap_directory_offset", extOff: 24, extSize: 8, value: 1 << 56, class: ErrCorrupt, noQEMU: true},
	{base: "bitmaps", ext: extBitmaps, field: "extension bitmaps bitmap_directory_offset", extOff: 24, extSize: 8, value: 3 << 16,
		write: true, class: ErrCorrupt, wantField: "*", noQEMU: true},

	{base: "luks", ext: extCryptoHeader, field: "extension crypto header length", extOff: 4, extSize: 4, value: 8, class: ErrCorrupt},
	{base: "luks", ext: extCryptoHeader, field: "extension crypto header offset", extOff: 8, extSize: 8, value: 1<<17 + 512, class: ErrCorrupt},
	{base: "luks", ext: extCryptoHeader, field: "extension crypto header offset", extOff: 8, extSize: 8, value: 0, class: ErrCorrupt, noQEMU: true},
	{base: "luks", ext: extCryptoHeader, field: "extension crypto header offset", extOff: 8, extSize: 8, value: 1 << 56, class: ErrCorrupt, noQEMU: true},
	{base: "luks", ext: extCryptoHeader, field: "extension crypto header length field", extOff: 16, extSize: 8, value: 0, class: ErrCorrupt, noQEMU: true},
	{base: "luks", ext: extCryptoHeader, field: "extension crypto header length field", extOff: 16, extSize: 8, value: math.MaxUint64, class: ErrCorrupt, noQEMU: true},
}

// name returns the row's name.
func (r *headerRule) name() string {
	s := fmt.Sprintf("%s/%s=%#x", r.base, r.field, r.value)
	for f, v := range r.also {
		s += fmt.Sprintf(",%s=%#x", f, v)
	}
	if r.write {
		s += ",write"
	}
	if r.limits != (Limits{}) {
		s += ",limits"
	}
	return s
}

// image returns the poked image of the row.
func (r *headerRule) image(t testing.TB, bases map[string][]byte) []byte {
	t.Helper()
	base, ok := bases[r.base]
	if !ok {
		t.Fatalf("no base %q", r.base)
	}
	b := bytes.Clone(base)
	p := poke{size: r.extSize, value: r.value}
	switch {
	case r.extSize != 0:
		p.off = extensionOffset(t, b, r.ext) + r.extOff
	default:
		p = fieldPoke(t, r.field, r.value)
	}
	p.apply(b)
	for f, v := range r.also {
		fieldPoke(t, f, uint64(v)).apply(b)
	}
	return b
}

// TestHeaderRules pokes one field at a time: an illegal value gives an error of its class that names
// the field and shows the value, a legal one is taken and encoded as it stands; no value makes the
// library allocate much.
func TestHeaderRules(t *testing.T) {
	bases := testBases(t)
	for name, b := range bases {
		h, err := readHeader(bytes.NewReader(b), int64(len(b)))
		if err == nil {
			err = h.validate(Limits{})
		}
		if err != nil {
			t.Fatalf("base %s: %v", name, err)
		}
	}
	for _, r := range headerRules {
		t.Run(r.name(), func(t *testing.T) {
			b := r.image(t, bases)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			var h *header
			err, infoErr := error(nil), error(nil)
			h, err = readHeader(bytes.NewReader(b), int64(len(b)))
			if err == nil {
				err = h.validate(r.limits)
			}
			if err == nil && r.class == nil && h.rawData() {
				err = h.checkOpenable(false)
			} else if err == nil && h.cryptMethod == cryptNone {
				if err = h.checkOpenable(false); err == nil && r.write {
					err = h.checkOpenable(true)
				} else if r.write {
					t.Errorf("open for reading: %v", err)
				}
			}
			_, infoErr = Inspect(bytes.NewReader(b), int64(len(b)), &r.limits)
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
				t.Errorf("allocated %d bytes", n)
			}

			if r.class == nil {
				if err != nil || infoErr != nil {
					t.Fatalf("refused: %v; inspect: %v", err, infoErr)
				}
				got, err := h.encode()
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, b[:len(got)]) {
					t.Error("the header does not encode to the bytes that were read")
				}
				return
			}
			for _, class := range []error{ErrNotQcow2, ErrCorrupt, ErrUnsupported, ErrLimit} {
				if want := class == r.class; errors.Is(err, class) != want {
					t.Errorf("error %v is %q: %v, want %v", err, class, !want, want)
				}
			}
			var he *HeaderError
			if !errors.As(err, &he) {
				t.Fatalf("error %v is no *HeaderError", err)
			}
			wantField, wantValue := r.wantField, r.wantValue
			if wantField == "" {
				wantField = r.field
			}
			if wantValue == nil {
				wantValue = r.value
			}
			if wantField == "*" { // two tables overlap: either may be named
				if !strings.HasSuffix(he.Field, "_offset") {
					t.Errorf("error names %q, want an offset", he.Field)
				}
			} else if he.Field != wantField {
				t.Errorf("error names %q, want %q: %v", he.Field, wantField, err)
			}
			if fmt.Sprint(he.Value) != fmt.Sprint(wantValue) {
				t.Errorf("error shows %v, want %v", he.Value, wantValue)
			}
			if he.Bound == "" {
				t.Error("error shows no bound")
			}
			if r.class == ErrLimit {
				var le *LimitError
				if !errors.As(err, &le) || le.Value <= le.Max {
					t.Errorf("no *LimitError, or an impossible one, in %v", err)
				}
			}
		})
	}
}

// TestHeaderRulesCoverFields fails for a header field without a row in headerRules, and for a field
// table with a gap.
func TestHeaderRulesCoverFields(t *testing.T) {
	rows := make(map[string]int)
	for _, r := range headerRules {
		rows[r.field]++
	}
	end := 0
	for _, f := range headerFields {
		if rows[f.name] == 0 {
			t.Errorf("header field %s has no row in headerRules", f.name)
		}
		if f.off != end {
			t.Errorf("header field %s is at %d, want %d", f.name, f.off, end)
		}
		end = f.off + f.size
	}
	if end != headerLengthV3 {
		t.Errorf("the fields end at %d, want %d", end, headerLengthV3)
	}
	for _, typ := range knownExtensions {
		found := false
		for _, r := range headerRules {
			found = found || r.ext == typ && r.class != nil
		}
		if !found {
			t.Errorf("%s has no row in headerRules", extensionName(typ))
		}
	}
}

// TestHeaderRulesQEMU asks qemu-img about the same images: it must refuse what we refuse, and open what
// we open, but for the rows that say otherwise.
func TestHeaderRulesQEMU(t *testing.T) {
	qemutest.Require(t)
	bases := testBases(t)
	name := filepath.Join(t.TempDir(), "poked.qcow2")
	for _, r := range headerRules {
		if r.noQEMU {
			continue
		}
		if err := os.WriteFile(name, r.image(t, bases), 0o600); err != nil {
			t.Fatal(err)
		}
		out, exit := qemutest.ImgExit(t, "info", "-f", "qcow2", name)
		want := r.class == nil || r.write || r.qemuOpens
		if got := exit == 0; got != want {
			t.Errorf("%s: qemu-img opens it: %v, want %v\n%s", r.name(), got, want, out)
		}
	}
}

// TestReadHeaderBytes checks what is read: nothing past the first cluster, nothing past the end, and
// zeros there.
func TestReadHeaderBytes(t *testing.T) {
	full := testFile(t, testHeader(t, 1<<20, &CreateOptions{BackingFile: "base", BackingFormat: "raw"}))
	end := bytes.LastIndex(full, []byte("base")) + 4
	for _, size := range []int{0, 3, 4, 80, 111, 112, end - 1, end, 512, 513, len(full)} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			r := &countingReader{r: bytes.NewReader(full)}
			short, err1 := readHeader(r, int64(size))
			padded := append(bytes.Clone(full[:size]), make([]byte, len(full)-size)...)
			long, err2 := readHeader(bytes.NewReader(padded), int64(size))
			if fmt.Sprint(err1) != fmt.Sprint(err2) {
				t.Fatalf("errors differ: %v, %v", err1, err2)
			}
			if diff := cmp.Diff(long, short, headerCmp); diff != "" {
				t.Errorf("a short file is not read as if zeros followed (-want +got):\n%s", diff)
			}
			if r.end > int64(size) || r.end > 64<<10 {
				t.Errorf("read to %d, of %d bytes", r.end, size)
			}
			if size < 4 && !errors.Is(err1, ErrNotQcow2) {
				t.Errorf("error %v, want ErrNotQcow2", err1)
			}
		})
	}
	wantErr := errors.New("broken disk")
	if _, err := readHeader(&countingReader{err: wantErr}, 1<<20); !errors.Is(err, wantErr) {
		t.Errorf("error %v, want %v", err, wantErr)
	}
	// A reader that ends before the size says so is a short file.
	if _, err := readHeader(bytes.NewReader(full[:600]), 1<<20); err != nil {
		t.Error(err)
	}
	if _, err := readHeader(bytes.NewReader(full), -1); !errors.Is(err, ErrNotQcow2) {
		t.Errorf("error %v, want ErrNotQcow2", err)
	}
}

// countingReader notes how far and how much is read. With err, it fails.
type countingReader struct {
	r    io.ReaderAt
	err  error
	n    int64 // bytes read
	end  int64 // the furthest byte asked for
	runs int   // calls
}

// ReadAt reads from r.
func (c *countingReader) ReadAt(p []byte, off int64) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	c.end = max(c.end, off+int64(len(p)))
	c.runs++
	n, err := c.r.ReadAt(p, off)
	c.n += int64(n)
	return n, err
}

// TestHeaderUnknownFeatureNames checks that an unknown incompatible feature is refused by the name that
// the image has for it, and else by number.
func TestHeaderUnknownFeatureNames(t *testing.T) {
	h := testHeader(t, 1<<20, nil)
	rec := make([]byte, featureRecordSize)
	rec[0], rec[1] = byte(featureIncompatible), 17
	copy(rec[2:], "frobnication")
	full := bytes.Repeat([]byte{'x'}, featureRecordSize) // a name without NUL
	full[0], full[1] = byte(featureIncompatible), 63
	h.extensions = []headerExtension{{extFeatureNames, append(append(rec, full...), 1, 2, 3)}}
	h.incompatible = 1<<17 | 1<<5 | 1<<63
	b := testFile(t, h)
	h, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"incompatible feature 5", "frobnication", strings.Repeat("x", featureNameSize)}
	if diff := cmp.Diff(want, h.unknownIncompatible()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if err := h.validate(Limits{}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "frobnication") {
		t.Errorf("error %v, want ErrUnsupported that names frobnication", err)
	}
}

// TestHeaderOpenableEncrypted checks that encrypted images are valid, and refused.
func TestHeaderOpenableEncrypted(t *testing.T) {
	b := testBases(t)["luks"]
	for _, method := range []uint32{cryptAES, cryptLUKS} {
		h, err := readHeader(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		if h.cryptMethod = method; method == cryptAES {
			h.extensions, h.crypto = nil, nil
		}
		if err := h.validate(Limits{}); err != nil {
			t.Error(err)
		}
		for _, rw := range []bool{false, true} {
			err := h.checkOpenable(rw)
			if !errors.Is(err, ErrEncrypted) || !errors.Is(err, ErrUnsupported) || errors.Is(err, ErrCorrupt) {
				t.Errorf("method %d, write %v: error %v, want ErrEncrypted and ErrUnsupported", method, rw, err)
			}
		}
	}
}

// TestHeaderOpenableRawBacking checks that a raw data file under a backing file is for reading only.
func TestHeaderOpenableRawBacking(t *testing.T) {
	h := testHeader(t, 1<<20, &CreateOptions{DataFile: "d.raw", DataFileRaw: true})
	if err := h.checkOpenable(true); err != nil {
		t.Fatal(err)
	}
	h.backingName = "base"
	if err := h.checkOpenable(false); err != nil {
		t.Error(err)
	}
	if err := h.checkOpenable(true); !errors.Is(err, ErrCorrupt) {
		t.Errorf("error %v, want ErrCorrupt", err)
	}
}

// TestHeaderUpdates checks that each small update changes its fields and nothing else, inside the first
// sector.
func TestHeaderUpdates(t *testing.T) {
	type update struct {
		name string
		off  int64
		data []byte
		set  func(h *header)
	}
	for _, version := range []int{2, 3} {
		h := testHeader(t, 1<<20, &CreateOptions{Version: version})
		file := testFile(t, h)
		var updates []update
		add := func(name string, set func(*header)) func(int64, []byte) {
			return func(off int64, data []byte) { updates = append(updates, update{name, off, data, set}) }
		}
		add("size", func(h *header) { h.size = 1 << 19 })(encodeSizeField(1 << 19))
		add("l1", func(h *header) { h.l1Size, h.l1Off = 7, 9<<16 })(encodeL1Fields(7, 9<<16))
		add("refcount table", func(h *header) { h.refTableOff, h.refTableClusters = 11<<16, 5 })(encodeRefcountTableFields(11<<16, 5))
		add("snapshots", func(h *header) { h.nbSnapshots, h.snapshotsOff = 3, 13<<16 })(encodeSnapshotFields(3, 13<<16))
		v3 := func(f func(*header)) func(*header) {
			if version == 2 {
				return func(*header) {} // there is no such field
			}
			return f
		}
		add("incompatible", v3(func(h *header) { h.incompatible = incompatDirty }))(h.encodeIncompatibleField(incompatDirty))
		add("autoclear", v3(func(h *header) { h.autoclear = 1 << 7 }))(h.encodeAutoclearField(1 << 7))
		for _, u := range updates {
			t.Run(fmt.Sprintf("v%d/%s", version, u.name), func(t *testing.T) {
				if u.off < 0 || u.off+int64(len(u.data)) > sectorSize {
					t.Errorf("%d bytes at %d leave the first sector", len(u.data), u.off)
				}
				b := bytes.Clone(file)
				copy(b[u.off:], u.data)
				got, err := readHeader(bytes.NewReader(b), int64(len(b)))
				if err != nil {
					t.Fatal(err)
				}
				want, err := readHeader(bytes.NewReader(file), int64(len(file)))
				if err != nil {
					t.Fatal(err)
				}
				u.set(want)
				if diff := cmp.Diff(want, got, headerCmp); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		}
	}
}

// reread decodes what h encodes to, in a file of n bytes.
func reread(t testing.TB, h *header) *header {
	t.Helper()
	b := testFile(t, h)
	got, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestHeaderEncodeChanges checks what a rewrite does to names and extensions.
func TestHeaderEncodeChanges(t *testing.T) {
	unknown := []headerExtension{{0x11111111, []byte("one")}, {0x22222222, nil}, {0x33333333, []byte("12345678")}}
	start := func(t *testing.T, o *CreateOptions) *header {
		h := testHeader(t, 1<<20, o)
		h.extensions = append(h.extensions, unknown...)
		return reread(t, h)
	}
	types := func(h *header) (typs []uint32) {
		for _, e := range h.extensions {
			typs = append(typs, e.typ)
		}
		return typs
	}
	backed := &CreateOptions{BackingFile: "base", BackingFormat: "raw"}
	tests := []struct {
		name      string
		opts      *CreateOptions
		change    func(h *header)
		wantTypes []uint32
		wantName  string
		wantKept  bool // the backing name stays in its place
	}{
		{"nothing", backed, func(*header) {},
			[]uint32{extBackingFormat, extFeatureNames, 0x11111111, 0x22222222, 0x33333333}, "base", true},
		{"sorted", backed, func(h *header) { h.sortExtensions() },
			[]uint32{extBackingFormat, 0x11111111, 0x22222222, 0x33333333, extFeatureNames}, "base", true},
		{"new format comes first", nil, func(h *header) { h.backingName, h.backingFormat = "new", "qcow2" },
			[]uint32{extBackingFormat, extFeatureNames, 0x11111111, 0x22222222, 0x33333333}, "new", false},
		{"longer extensions move the name", backed, func(h *header) { h.dataFileName = strings.Repeat("d", 100) },
			[]uint32{extDataFile, extBackingFormat, extFeatureNames, 0x11111111, 0x22222222, 0x33333333}, "base", false},
		{"longer name", backed, func(h *header) { h.backingName = "a/longer/base"; h.backingFormat = "qcow2" },
			[]uint32{extBackingFormat, extFeatureNames, 0x11111111, 0x22222222, 0x33333333}, "a/longer/base", true},
		{"no backing", backed, func(h *header) { h.backingName, h.backingFormat = "", "" },
			[]uint32{extFeatureNames, 0x11111111, 0x22222222, 0x33333333}, "", false},
		{"bitmaps", backed, func(h *header) {
			h.autoclear |= autoclearBitmaps
			h.bitmaps = &bitmapsExtension{count: 1, dirSize: 32, dirOff: 1 << 17}
		}, []uint32{extBitmaps, extBackingFormat, extFeatureNames, 0x11111111, 0x22222222, 0x33333333}, "base", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := start(t, tt.opts)
			old := h.backingOff
			tt.change(h)
			got := reread(t, h)
			if diff := cmp.Diff(tt.wantTypes, types(got)); diff != "" {
				t.Errorf("extensions (-want +got):\n%s", diff)
			}
			for _, e := range unknown {
				found := false
				for _, g := range got.extensions {
					found = found || g.typ == e.typ && bytes.Equal(g.data, e.data)
				}
				if !found {
					t.Errorf("extension %#x is lost", e.typ)
				}
			}
			if got.backingName != tt.wantName || got.backingFormat != h.backingFormat || got.dataFileName != h.dataFileName {
				t.Errorf("backing %q format %q data %q", got.backingName, got.backingFormat, got.dataFileName)
			}
			if tt.wantName == "" && (got.backingOff != 0 || got.backingSize != 0) {
				t.Errorf("backing name of %d bytes left at %#x", got.backingSize, got.backingOff)
			}
			if kept := got.backingOff == old && old != 0; kept != tt.wantKept {
				t.Errorf("backing name at %#x, was at %#x; kept: %v, want %v", got.backingOff, old, kept, tt.wantKept)
			}
			if diff := cmp.Diff(h.bitmaps, got.bitmaps, headerCmp); diff != "" {
				t.Errorf("bitmaps (-want +got):\n%s", diff)
			}
		})
	}
}

// TestHeaderEncodeFull checks the end of the room: the feature name table gives way, and then there is
// an error.
func TestHeaderEncodeFull(t *testing.T) {
	h := testHeader(t, 1<<20, &CreateOptions{ClusterSize: 512, BackingFile: "b", BackingFormat: "raw"})
	h.extensions = append(h.extensions, headerExtension{extFeatureNames, encodeFeatureNames()})
	got := reread(t, h)
	for _, e := range got.extensions {
		if e.typ == extFeatureNames {
			t.Error("a feature name table of 392 bytes stayed, which leaves no room for the name")
		}
	}
	// 112 bytes of fields, 16 of format, 8 of END leave 376 for the name.
	h = testHeader(t, 1<<20, &CreateOptions{ClusterSize: 512, BackingFile: strings.Repeat("b", 376), BackingFormat: "raw"})
	if got := reread(t, h); len(got.backingName) != 376 {
		t.Errorf("name of %d bytes, want 376", len(got.backingName))
	}
	h.backingName += "b"
	if _, err := h.encode(); !errors.Is(err, ErrHeaderFull) {
		t.Errorf("error %v, want ErrHeaderFull", err)
	}
	if _, err := newHeader(1<<20, &CreateOptions{ClusterSize: 512, BackingFile: h.backingName, BackingFormat: "raw"}); !errors.Is(err, ErrHeaderFull) {
		t.Errorf("newHeader: error %v, want ErrHeaderFull", err)
	}
	// Extensions may fill the cluster to its end, without END.
	h = testHeader(t, 1<<20, &CreateOptions{ClusterSize: 512})
	h.extensions = []headerExtension{{0x11111111, bytes.Repeat([]byte{1}, 512-headerLengthV3-extHeaderSize)}}
	b := testFile(t, h)
	got = reread(t, h)
	if len(got.extensions) != 1 {
		t.Fatalf("%d extensions, want 1", len(got.extensions))
	}
	if again, err := got.encode(); err != nil || !bytes.Equal(again, b[:512]) {
		t.Errorf("a full cluster does not encode to itself: %v", err)
	}
	h.extensions[0].data = append(h.extensions[0].data, 1)
	if _, err := h.encode(); !errors.Is(err, ErrHeaderFull) {
		t.Errorf("error %v, want ErrHeaderFull", err)
	}
}

// TestHeaderEncodeUnknownFields checks that what lies between the fields that we know and
// header_length survives, and that a short header stays short.
func TestHeaderEncodeUnknownFields(t *testing.T) {
	for _, length := range []uint32{104, 108, 112, 120, 4096} {
		t.Run(fmt.Sprint(length), func(t *testing.T) {
			h := testHeader(t, 1<<20, nil)
			h.headerLength = length
			h.padding = []byte{1, 2, 3, 4, 5, 6, 7}
			for i := uint32(headerLengthV3); i < length; i++ {
				h.unknownFields = append(h.unknownFields, byte(i)|1)
			}
			b := testFile(t, h)
			got := reread(t, h)
			if got.headerLength != length {
				t.Fatalf("header_length %d, want %d", got.headerLength, length)
			}
			if diff := cmp.Diff(h.unknownFields, got.unknownFields); diff != "" {
				t.Errorf("unknown fields (-want +got):\n%s", diff)
			}
			again, err := got.encode()
			if err != nil || !bytes.Equal(again, b[:len(again)]) {
				t.Errorf("not the same bytes again: %v", err)
			}
		})
	}
}

// TestHeaderDuplicateExtensions checks that the last of several extensions of a type counts, and that a
// NUL ends a name without being lost.
func TestHeaderDuplicateExtensions(t *testing.T) {
	h := testHeader(t, 1<<20, nil)
	h.extensions = nil
	h.backingName = "base"
	h.version = 3
	raw := h.encodeFixed()
	for _, data := range []string{"qcow2\x00xy", "raw\x00"} {
		raw = binary.BigEndian.AppendUint32(raw, extBackingFormat)
		raw = binary.BigEndian.AppendUint32(raw, uint32(len(data)))
		raw = append(raw, data...)
		raw = append(raw, make([]byte, -len(data)&7)...)
	}
	raw = append(raw, make([]byte, extHeaderSize)...)
	binary.BigEndian.PutUint64(raw[fieldBackingOff:], uint64(len(raw)))
	binary.BigEndian.PutUint32(raw[fieldBackingSize:], 6)
	raw = append(raw, "base\x00z"...)
	got, err := readHeader(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	if got.backingFormat != "raw" || got.backingName != "base" {
		t.Errorf("format %q, name %q, want raw and base", got.backingFormat, got.backingName)
	}
	b, err := got.encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if string(again.backingNameRaw) != "base\x00z" {
		t.Errorf("backing name %q, want it verbatim", again.backingNameRaw)
	}
	want := []headerExtension{{extBackingFormat, []byte("raw\x00")}}
	if diff := cmp.Diff(want, again.extensions, headerCmp); diff != "" {
		t.Errorf("extensions (-want +got):\n%s", diff)
	}
}

// TestNewHeaderOptions checks each refused combination of options: one *OptionError of its own.
func TestNewHeaderOptions(t *testing.T) {
	tests := []struct {
		name    string
		size    int64
		opts    CreateOptions
		option  string // "" accepts
		wantErr error  // a further class
	}{
		{name: "default", size: 1 << 30},
		{name: "size 0"},
		{name: "size odd", size: 1000, option: "size"},
		{name: "size negative", size: -512, option: "size"},
		{name: "size largest", size: 32 << 20 / 8 << (9 + 6), opts: CreateOptions{ClusterSize: 512}},
		{name: "size too large", size: 32<<20/8<<(9+6) + 512, opts: CreateOptions{ClusterSize: 512}, option: "size", wantErr: ErrTooLarge},
		{name: "size max", size: math.MaxInt64 &^ 511, opts: CreateOptions{ClusterSize: 2 << 20}, option: "size", wantErr: ErrTooLarge},
		{name: "version 1", opts: CreateOptions{Version: 1}, option: "Version"},
		{name: "version 4", opts: CreateOptions{Version: 4}, option: "Version"},
		{name: "version -1", opts: CreateOptions{Version: -1}, option: "Version"},
		{name: "cluster 256", opts: CreateOptions{ClusterSize: 256}, option: "ClusterSize"},
		{name: "cluster 4 MiB", opts: CreateOptions{ClusterSize: 4 << 20}, option: "ClusterSize"},
		{name: "cluster 1000", opts: CreateOptions{ClusterSize: 1000}, option: "ClusterSize"},
		{name: "cluster negative", opts: CreateOptions{ClusterSize: math.MinInt}, option: "ClusterSize"},
		{name: "refcount 3", opts: CreateOptions{RefcountBits: 3}, option: "RefcountBits"},
		{name: "refcount 128", opts: CreateOptions{RefcountBits: 128}, option: "RefcountBits"},
		{name: "refcount -1", opts: CreateOptions{RefcountBits: -1}, option: "RefcountBits"},
		{name: "compression 2", opts: CreateOptions{Compression: 2}, option: "Compression"},
		{name: "v2 extended L2", opts: CreateOptions{Version: 2, ExtendedL2: true}, option: "ExtendedL2"},
		{name: "v2 lazy", opts: CreateOptions{Version: 2, LazyRefcounts: true}, option: "LazyRefcounts"},
		{name: "v2 refcount 8", opts: CreateOptions{Version: 2, RefcountBits: 8}, option: "RefcountBits"},
		{name: "v2 refcount 16", opts: CreateOptions{Version: 2, RefcountBits: 16}},
		{name: "v2 data file", opts: CreateOptions{Version: 2, DataFile: "d"}, option: "DataFile"},
		{name: "v2 zstd", opts: CreateOptions{Version: 2, Compression: CompressionZstd}, option: "Compression"},
		{name: "extended L2 8 KiB", opts: CreateOptions{ExtendedL2: true, ClusterSize: 8 << 10}, option: "ExtendedL2"},
		{name: "extended L2 16 KiB", opts: CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}},
		{name: "raw without data file", opts: CreateOptions{DataFileRaw: true}, option: "DataFileRaw"},
		{name: "raw with backing", opts: CreateOptions{DataFile: "d", DataFileRaw: true, BackingFile: "b", BackingFormat: "raw"}, option: "DataFileRaw"},
		{name: "data file with backing", opts: CreateOptions{DataFile: "d", BackingFile: "b", BackingFormat: "raw"}},
		{name: "data file NUL", opts: CreateOptions{DataFile: "d\x00"}, option: "DataFile"},
		{name: "data file long", opts: CreateOptions{DataFile: strings.Repeat("d", 65000)}},
		{name: "backing without format", opts: CreateOptions{BackingFile: "b"}, option: "BackingFormat"},
		{name: "format without backing", opts: CreateOptions{BackingFormat: "raw"}, option: "BackingFormat"},
		{name: "backing 1023", opts: CreateOptions{BackingFile: strings.Repeat("b", 1023), BackingFormat: "raw"}},
		{name: "backing 1024", opts: CreateOptions{BackingFile: strings.Repeat("b", 1024), BackingFormat: "raw"}, option: "BackingFile"},
		{name: "backing NUL", opts: CreateOptions{BackingFile: "b\x00c", BackingFormat: "raw"}, option: "BackingFile"},
		{name: "format 15", opts: CreateOptions{BackingFile: "b", BackingFormat: strings.Repeat("f", 15)}},
		{name: "format 16", opts: CreateOptions{BackingFile: "b", BackingFormat: strings.Repeat("f", 16)}, option: "BackingFormat"},
		{name: "format NUL", opts: CreateOptions{BackingFile: "b", BackingFormat: "raw\x00"}, option: "BackingFormat"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h, err := newHeader(uint64(tt.size), &tt.opts)
			if tt.option == "" {
				if err != nil {
					t.Fatal(err)
				}
				h.refTableOff, h.refTableClusters, h.l1Off = h.clusterSize(), 1, 3*h.clusterSize()
				if err := h.validate(Limits{MetadataBytes: 1 << 30}); err != nil {
					t.Errorf("the new header is invalid: %v", err)
				}
				if err := h.checkOpenable(true); err != nil {
					t.Errorf("the new header is not writable: %v", err)
				}
				return
			}
			var oe *OptionError
			if !errors.As(err, &oe) || !errors.Is(err, ErrOption) {
				t.Fatalf("error %v, want an *OptionError", err)
			}
			if oe.Option != tt.option || oe.Reason == "" {
				t.Errorf("error %v names %q, want %q", err, oe.Option, tt.option)
			}
			if multi, ok := err.(interface{ Unwrap() []error }); ok && tt.wantErr == nil {
				t.Errorf("several errors, want one: %v", multi.Unwrap())
			}
			if tt.wantErr != nil && !errors.Is(err, tt.wantErr) {
				t.Errorf("error %v, want %v", err, tt.wantErr)
			}
		})
	}
	// Everything that is wrong is said at once.
	_, err := newHeader(1, &CreateOptions{Version: 2, ExtendedL2: true, LazyRefcounts: true, RefcountBits: 5})
	for _, option := range []string{"size", "ExtendedL2", "LazyRefcounts", "RefcountBits"} {
		if err == nil || !strings.Contains(err.Error(), "option "+option+" ") {
			t.Errorf("error %v does not name %s", err, option)
		}
	}
}

// qemuHeaderOptions are the options of qemu-img create whose headers the round trips read, and what
// they are to newHeader.
func qemuHeaderOptions() (tests []struct {
	options string
	ours    CreateOptions
}) {
	add := func(options string, ours CreateOptions) {
		tests = append(tests, struct {
			options string
			ours    CreateOptions
		}{options, ours})
	}
	for bits := minClusterBits; bits <= maxClusterBits; bits++ {
		size := fmt.Sprintf("cluster_size=%d", 1<<bits)
		add(size, CreateOptions{ClusterSize: 1 << bits})
		switch bits {
		case minExtL2Bits, 16, maxClusterBits:
			add(size+",extended_l2=on", CreateOptions{ClusterSize: 1 << bits, ExtendedL2: true})
		}
	}
	for order := range maxRefcountOrder + 1 {
		add(fmt.Sprintf("refcount_bits=%d", 1<<order), CreateOptions{RefcountBits: 1 << order})
	}
	for _, size := range []int{512, 4096, 65536, 2 << 20} {
		for _, version := range []int{2, 3} {
			compat := map[int]string{2: "0.10", 3: "1.1"}[version]
			base := fmt.Sprintf("cluster_size=%d,compat=%s", size, compat)
			ours := CreateOptions{ClusterSize: size, Version: version}
			add(base, ours)
			backed := ours
			backed.BackingFile, backed.BackingFormat = "some/base.img", "raw"
			add(base+",backing_file=some/base.img,backing_fmt=raw", backed)
			backed.BackingFile, backed.BackingFormat = "x", "qcow2"
			add(base+",backing_file=x,backing_fmt=qcow2", backed)
			if version == 2 {
				continue
			}
			all := ours
			all.Compression, all.LazyRefcounts = CompressionZstd, true
			add(base+",compression_type=zstd,lazy_refcounts=on", all)
			data := ours
			data.DataFile = "DIR/data.raw"
			add(base+",data_file=DIR/data.raw", data)
			data.BackingFile, data.BackingFormat = "b", "raw"
			add(base+",data_file=DIR/data.raw,backing_file=b,backing_fmt=raw", data)
			data.BackingFile, data.BackingFormat, data.DataFileRaw = "", "", true
			add(base+",data_file=DIR/data.raw,data_file_raw=on", data)
		}
	}
	return tests
}

// TestHeaderQEMU reads headers that qemu-img wrote, over the matrix of its options: each is valid,
// encodes to the same bytes, and equals what newHeader makes of the same options.
func TestHeaderQEMU(t *testing.T) {
	qemutest.Require(t)
	const size = 3 << 20
	dir := t.TempDir()
	for i, tt := range qemuHeaderOptions() {
		t.Run(tt.options, func(t *testing.T) {
			name := filepath.Join(dir, fmt.Sprintf("image%d.qcow2", i))
			qemutest.Img(t, "create", "-q", "-u", "-f", "qcow2", "-o", strings.ReplaceAll(tt.options, "DIR", dir), name, fmt.Sprint(size))
			h, b := readImageHeader(t, name)
			if err := h.checkOpenable(true); err != nil {
				t.Error(err)
			}
			checkSameHeader(t, h, b)

			ours := tt.ours
			ours.DataFile = strings.ReplaceAll(ours.DataFile, "DIR", dir)
			n, err := newHeader(size, &ours)
			if err != nil {
				t.Fatal(err)
			}
			n.l1Off, n.refTableOff, n.refTableClusters = h.l1Off, h.refTableOff, h.refTableClusters
			n.fileSize = h.fileSize
			got, err := n.encode()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(b[:len(got)], got); diff != "" {
				t.Errorf("newHeader does not make QEMU's header (-want +got):\n%s", diff)
			}
		})
	}
}

// readImageHeader reads and validates the header of an image file, and returns it with the file's
// first cluster.
func readImageHeader(t testing.TB, name string) (*header, []byte) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	h, err := readHeader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.validate(Limits{}); err != nil {
		t.Fatal(err)
	}
	return h, b[:min(uint64(len(b)), h.clusterSize())]
}

// overwriteFile writes b over the file at off.
func overwriteFile(t testing.TB, name string, off int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// checkSameHeader fails the test unless h encodes to the first bytes of cluster, with nothing but zeros
// behind them.
func checkSameHeader(t testing.TB, h *header, cluster []byte) {
	t.Helper()
	got, err := h.encode()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(cluster[:len(got)], got); diff != "" {
		t.Errorf("the header does not encode to itself (-want +got):\n%s", diff)
	}
	if rest := bytes.TrimRight(cluster[len(got):], "\x00"); len(rest) > 0 {
		t.Errorf("%d bytes are encoded, there are %d more", len(got), len(rest))
	}
}

// TestHeaderQEMURewrites lets QEMU rewrite headers with bitmaps, unknown extensions, unknown fields and
// unknown features, before and after which they encode to themselves; and QEMU opens what we rewrote.
func TestHeaderQEMURewrites(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	name := filepath.Join(dir, "image.qcow2")
	for _, base := range []string{"base", "base2", "base22"} {
		if err := os.WriteFile(filepath.Join(dir, base), make([]byte, sectorSize), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	qemutest.Img(t, "create", "-q", "-u", "-f", "qcow2", "-o", "backing_file=base,backing_fmt=raw", name, "3M")
	qemutest.Img(t, "bitmap", "--add", name, "first")
	h, b := readImageHeader(t, name)
	if h.bitmaps == nil || h.bitmaps.count != 1 {
		t.Fatalf("bitmaps %+v, want one", h.bitmaps)
	}
	checkSameHeader(t, h, b)

	unknown := []headerExtension{{0x600df00d, []byte("odd")}, {0x0bad0bad, bytes.Repeat([]byte("8"), 64)}}
	h.extensions = append(h.extensions, unknown...)
	h.headerLength, h.unknownFields = 128, []byte("unknown fields!!")
	h.compatible |= 1 << 40
	b, err := h.encode()
	if err != nil {
		t.Fatal(err)
	}
	overwriteFile(t, name, 0, b)
	qemutest.CheckClean(t, name)

	// A rewrite by QEMU reverses the unknown extensions, and keeps the rest.
	for range 2 {
		before, _ := readImageHeader(t, name)
		qemutest.Img(t, "rebase", "-u", "-f", "qcow2", "-b", before.backingName+"2", "-F", "raw", name)
		h, b := readImageHeader(t, name)
		checkSameHeader(t, h, b)
		if h.backingName != before.backingName+"2" || h.compatible>>40 != 1 || string(h.unknownFields) != "unknown fields!!" {
			t.Errorf("name %q, compatible %#x, unknown fields %q", h.backingName, h.compatible, h.unknownFields)
		}
		var kept int
		for _, e := range h.extensions {
			for _, u := range unknown {
				if e.typ == u.typ && bytes.Equal(e.data, u.data) {
					kept++
				}
			}
		}
		if kept != len(unknown) {
			t.Errorf("%d unknown extensions, want %d", kept, len(unknown))
		}
	}
	qemutest.CheckClean(t, name)

	// Our own rewrite: the backing file gone, extensions in our order.
	h, _ = readImageHeader(t, name)
	h.backingName, h.backingFormat = "", ""
	h.sortExtensions()
	if b, err = h.encode(); err != nil {
		t.Fatal(err)
	}
	overwriteFile(t, name, 0, b)
	qemutest.CheckClean(t, name)
	if _, has := qemutest.Info(t, name)["backing-filename"]; has {
		t.Error("QEMU still sees a backing file")
	}
}
