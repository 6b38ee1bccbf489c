package qcow2

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/metrics"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// inspectFile is Inspect on a file.
func inspectFile(t testing.TB, name string) *Info {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	info, err := Inspect(bytes.NewReader(b), int64(len(b)), nil)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// qemuInfoKeys are the keys of qemu-img info --output=json that come from the header.
func qemuInfoKeys(info *Info) map[string]any {
	number := func(n int64) json.Number { return json.Number(fmt.Sprint(n)) }
	data := map[string]any{
		"compat":           map[int]string{2: "0.10", 3: "1.1"}[info.Version],
		"compression-type": info.Compression.String(),
		"refcount-bits":    number(int64(info.RefcountBits)),
	}
	if info.Version >= 3 {
		data["lazy-refcounts"] = info.LazyRefcounts
		data["corrupt"] = info.Corrupt
		data["extended-l2"] = info.ExtendedL2
	}
	if info.NeedsDataFile {
		data["data-file"] = info.DataFile
		data["data-file-raw"] = info.DataFileRaw
	}
	m := map[string]any{
		"virtual-size":    number(info.VirtualSize),
		"cluster-size":    number(int64(info.ClusterSize)),
		"dirty-flag":      info.Dirty,
		"format-specific": map[string]any{"type": "qcow2", "data": data},
		"snapshots":       info.SnapshotCount,
		"bitmaps":         info.BitmapCount,
	}
	if info.BackingFile != "" {
		m["backing-filename"] = info.BackingFile
		m["backing-filename-format"] = info.BackingFormat
	}
	if info.Encryption != "" {
		m["encrypted"] = true
	}
	return m
}

// TestInspectQEMU compares Inspect with qemu-img info on the same images.
func TestInspectQEMU(t *testing.T) {
	qemutest.Require(t)
	dir := t.TempDir()
	base := filepath.Join(dir, "base.raw")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name    string
		options string
		after   func(t *testing.T, name string)
	}{
		{name: "default", options: "cluster_size=65536"},
		{name: "v2", options: "compat=0.10"},
		{name: "backing", options: "backing_file=" + base + ",backing_fmt=raw"},
		{name: "v2 backing", options: "compat=0.10,backing_file=" + base + ",backing_fmt=raw"},
		{name: "extended", options: "extended_l2=on,cluster_size=131072,compression_type=zstd,lazy_refcounts=on"},
		{name: "refcount 1", options: "refcount_bits=1,cluster_size=512"},
		{name: "data file", options: "data_file=" + filepath.Join(dir, "data1.raw")},
		{name: "raw data file", options: "data_file=" + filepath.Join(dir, "data2.raw") + ",data_file_raw=on"},
		{name: "snapshots", options: "compat=1.1", after: func(t *testing.T, name string) {
			qemutest.Img(t, "snapshot", "-c", "one", name)
			qemutest.Img(t, "snapshot", "-c", "two", name)
		}},
		{name: "bitmaps", options: "compat=1.1", after: func(t *testing.T, name string) {
			qemutest.Img(t, "bitmap", "--add", name, "one")
			qemutest.Img(t, "bitmap", "--add", name, "two")
		}},
		{name: "odd size, dirty, corrupt", options: "compat=1.1", after: func(t *testing.T, name string) {
			off, b := encodeSizeField(1000)
			overwriteFile(t, name, off, b)
			off, b = (&header{version: 3}).encodeIncompatibleField(incompatDirty | incompatCorrupt)
			overwriteFile(t, name, off, b)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "image.qcow2")
			qemutest.Img(t, "create", "-q", "-f", "qcow2", "-o", tt.options, name, "3M")
			if tt.after != nil {
				tt.after(t, name)
			}
			info := inspectFile(t, name)
			got, theirs := qemuInfoKeys(info), qemutest.Info(t, name)
			want := map[string]any{"snapshots": 0, "bitmaps": 0}
			for k := range got {
				if v, ok := theirs[k]; ok {
					want[k] = v
				}
			}
			for _, k := range []string{"backing-filename", "backing-filename-format", "encrypted"} {
				if v, ok := theirs[k]; ok {
					want[k] = v
				}
			}
			if l, ok := theirs["snapshots"].([]any); ok {
				want["snapshots"] = len(l)
			}
			if data, ok := want["format-specific"].(map[string]any)["data"].(map[string]any); ok {
				if l, ok := data["bitmaps"].([]any); ok {
					want["bitmaps"] = len(l)
					delete(data, "bitmaps")
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("Inspect and qemu-img info differ (-qemu +ours):\n%s", diff)
			}
			if st, err := os.Stat(name); err != nil || info.FileSize != st.Size() {
				t.Errorf("FileSize %d, want %d (%v)", info.FileSize, st.Size(), err)
			}
		})
	}
}

// TestInspect checks all of Info on images of our own, among them ones that cannot be opened.
func TestInspect(t *testing.T) {
	plain := Info{
		Version: 3, VirtualSize: 1 << 20, HeaderSize: 1 << 20, FileSize: testImageBytes,
		ClusterSize: 64 << 10, SubclusterSize: 64 << 10, RefcountBits: 16,
		L1Entries: 1, HeaderLength: 112,
	}
	with := func(change func(*Info)) *Info {
		info := plain
		change(&info)
		return &info
	}
	bases := testBases(t)
	tests := []struct {
		name  string
		base  string
		pokes map[string]uint64
		want  *Info
	}{
		{"plain", "v3", nil, &plain},
		{"v2", "v2", nil, with(func(i *Info) { i.Version, i.HeaderLength = 2, 72 })},
		{"odd size", "v3", map[string]uint64{"size": 1<<20 + 1000},
			with(func(i *Info) { i.VirtualSize, i.HeaderSize = 1<<20+512, 1<<20+1000 })},
		{"extended L2", "extl2", nil, with(func(i *Info) {
			i.ClusterSize, i.SubclusterSize, i.ExtendedL2, i.IncompatibleFeatures = 16<<10, 512, true, incompatExtendedL2
		})},
		{"raw data file", "rawdata", map[string]uint64{"compatible_features": 1 | 1<<9}, with(func(i *Info) {
			i.NeedsDataFile, i.DataFile, i.DataFileRaw, i.LazyRefcounts = true, "disk.raw", true, true
			i.IncompatibleFeatures, i.CompatibleFeatures, i.AutoclearFeatures = incompatDataFile, 1|1<<9, autoclearRawData
			i.UnknownCompatible = []string{"compatible feature 9"}
		})},
		{"backing", "backing", map[string]uint64{"refcount_order": 6}, with(func(i *Info) {
			i.BackingFile, i.BackingFormat, i.RefcountBits = "base.qcow2", "qcow2", 64
		})},
		{"bitmaps", "bitmaps", nil, with(func(i *Info) { i.BitmapCount, i.AutoclearFeatures = 2, autoclearBitmaps })},
		{"stale bitmaps", "bitmaps", map[string]uint64{"autoclear_features": 1 << 5}, with(func(i *Info) {
			i.AutoclearFeatures, i.UnknownAutoclear = 1<<5, []string{"autoclear feature 5"}
		})},
		{"luks", "luks", nil, with(func(i *Info) { i.Encryption = "luks" })},
		{"aes, dirty, corrupt", "v3", map[string]uint64{"crypt_method": 1, "incompatible_features": incompatDirty | incompatCorrupt},
			with(func(i *Info) {
				i.Encryption, i.Dirty, i.Corrupt, i.IncompatibleFeatures = "aes", true, true, incompatDirty|incompatCorrupt
			})},
		// With an unknown feature the rules for the rest cannot be known.
		{"unknown feature", "v3", map[string]uint64{"incompatible_features": 1 << 20, "l1_size": 0, "refcount_order": 9, "crypt_method": 7},
			with(func(i *Info) {
				i.IncompatibleFeatures, i.UnknownIncompatible = 1<<20, []string{"incompatible feature 20"}
				i.L1Entries, i.RefcountBits, i.Encryption = 0, 0, "unknown"
			})},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := bytes.Clone(bases[tt.base])
			for f, v := range tt.pokes {
				fieldPoke(t, f, v).apply(b)
			}
			got, err := Inspect(bytes.NewReader(b), int64(len(b)), nil)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	h := testHeader(t, 1<<20, nil)
	h.extensions = append(h.extensions, headerExtension{0x11111111, nil}, headerExtension{0x22222222, []byte{1}})
	b := testFile(t, h)
	got, err := Inspect(bytes.NewReader(b), int64(len(b)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]uint32{0x11111111, 0x22222222}, got.UnknownExtensions); diff != "" {
		t.Errorf("unknown extensions (-want +got):\n%s", diff)
	}
	if _, err := Inspect(bytes.NewReader(nil), 0, nil); !errors.Is(err, ErrNotQcow2) {
		t.Errorf("empty file: error %v, want ErrNotQcow2", err)
	}
}

// snapshotBomb returns a file of 192 KiB that claims 65536 snapshots past its end.
func snapshotBomb(t testing.TB) []byte {
	b := bytes.Clone(testBases(t)["v3"])
	fieldPoke(t, "nb_snapshots", maxSnapshots).apply(b)
	fieldPoke(t, "snapshots_offset", 1<<20).apply(b)
	return b
}

// TestInspectBomb checks that a claim costs nothing: neither memory nor reads.
func TestInspectBomb(t *testing.T) {
	b := snapshotBomb(t)
	r := &countingReader{r: bytes.NewReader(b)}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	info, err := Inspect(r, int64(len(b)), nil)
	runtime.ReadMemStats(&after)
	if err != nil {
		t.Fatal(err)
	}
	if info.SnapshotCount != maxSnapshots {
		t.Errorf("%d snapshots, want %d", info.SnapshotCount, maxSnapshots)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 64<<10 {
		t.Errorf("allocated %d bytes", n)
	}
	if r.n > 4096 || r.runs > 3 {
		t.Errorf("read %d bytes in %d calls", r.n, r.runs)
	}
	if _, err := Inspect(bytes.NewReader(b), int64(len(b)), &Limits{Snapshots: 100}); !errors.Is(err, ErrLimit) {
		t.Errorf("error %v, want ErrLimit", err)
	}
}

// BenchmarkInspectBomb measures Inspect on the same file.
func BenchmarkInspectBomb(b *testing.B) {
	image := snapshotBomb(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Inspect(bytes.NewReader(image), int64(len(image)), nil); err != nil {
			b.Fatal(err)
		}
	}
}

// TestLimitsDefaults checks which limits apply.
func TestLimitsDefaults(t *testing.T) {
	tests := []struct {
		name string
		in   *Limits
		want Limits
	}{
		{"nil", nil, Limits{MetadataBytes: 64 << 20, ChainDepth: 32, Snapshots: 65536}},
		{"zero", &Limits{}, Limits{MetadataBytes: 64 << 20, ChainDepth: 32, Snapshots: 65536}},
		{"set", &Limits{MetadataBytes: 1, ChainDepth: 2, Snapshots: 3, VirtualSize: 4}, Limits{MetadataBytes: 1, ChainDepth: 2, Snapshots: 3, VirtualSize: 4}},
		{"negative", &Limits{MetadataBytes: -1, ChainDepth: -1, Snapshots: -1, VirtualSize: -1}, Limits{MetadataBytes: 64 << 20, ChainDepth: 32, Snapshots: 65536}},
		{"above the format", &Limits{MetadataBytes: math.MaxInt64, Snapshots: math.MaxInt32}, Limits{MetadataBytes: math.MaxInt64, ChainDepth: 32, Snapshots: 65536}},
	}
	for _, tt := range tests {
		got := tt.in.withDefaults()
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
		if again := got.withDefaults(); again != got {
			t.Errorf("%s: defaults of defaults are %+v, want %+v", tt.name, again, got)
		}
	}
}

// allocatedBytes returns how many bytes this process has allocated so far. It is coarser than
// runtime.ReadMemStats, and does not stop the world.
func allocatedBytes() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// FuzzInspect runs checkInspect on any bytes.
func FuzzInspect(f *testing.F) {
	for _, b := range testBases(f) {
		f.Add(bytes.TrimRight(b, "\x00"))
	}
	f.Fuzz(func(t *testing.T, b []byte) { checkInspect(t, b) })
}

// TestInspectMutations runs checkInspect on valid headers with a few numbers changed, which reaches
// further behind the first rules than a fuzzer does in a short run.
func TestInspectMutations(t *testing.T) {
	const seed, runs = 1, 50000
	rng := rand.New(rand.NewPCG(seed, 0))
	bases := testBases(t)
	for name, b := range bases {
		bases[name] = b[:len(bytes.TrimRight(b, "\x00"))+64]
	}
	names := slices.Sorted(maps.Keys(bases))
	numbers := []uint64{0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 47, 48, 64, 104, 107, 112, 120, 255, 256, 512, 1023, 1024, 4096, 1 << 16, 1 << 17,
		3 << 16, extBackingFormat, extFeatureNames, extBitmaps, extCryptoHeader, extDataFile, 1 << 31, math.MaxUint32, 1 << 56, math.MaxUint64}
	for run := range runs {
		b := bytes.Clone(bases[names[rng.IntN(len(names))]])
		b = b[:len(b)-rng.IntN(64)]
		for range 1 + rng.IntN(4) {
			p := poke{size: 1 << rng.IntN(4), value: numbers[rng.IntN(len(numbers))]}
			if p.off = rng.IntN(min(len(b), 700)); rng.IntN(2) == 0 {
				f := headerFields[1+rng.IntN(len(headerFields)-1)]
				p.off, p.size = f.off, f.size
			} else if rng.IntN(2) == 0 {
				p.off &^= 7
			}
			if p.off+p.size <= len(b) {
				p.apply(b)
			}
		}
		checkInspect(t, b)
		if t.Failed() {
			t.Fatalf("seed %d, run %d, image %x", seed, run, b)
		}
	}
}

// checkInspect decodes any bytes: never a panic, every refusal typed, memory in proportion, and what was
// decoded encodes to a header that says the same and encodes to itself. The tables that the header
// points at are read too.
func checkInspect(t *testing.T, b []byte) {
	t.Helper()
	size := int64(len(b))
	before := allocatedBytes()
	info, err := Inspect(bytes.NewReader(b), size, nil)
	if n := allocatedBytes() - before; n > 64<<20 {
		t.Errorf("Inspect allocated %d bytes for %d", n, size)
	}
	var he *HeaderError
	if err != nil && !errors.As(err, &he) {
		t.Fatalf("error %v is no *HeaderError", err)
	}
	h, err := readHeader(bytes.NewReader(b), size)
	if err != nil {
		if info != nil {
			t.Fatalf("readHeader: %v, but Inspect took it", err)
		}
		return
	}
	first, err := h.encode()
	if err != nil {
		t.Fatalf("what was decoded does not encode: %v", err)
	}
	again, err := readHeader(bytes.NewReader(first), size)
	if err != nil {
		t.Fatalf("what was encoded does not decode: %v", err)
	}
	second, err := again.encode()
	if err != nil {
		t.Fatalf("encode after decode after encode: %v", err)
	}
	// cmp is slow: it only explains.
	if !bytes.Equal(first, second) {
		t.Fatalf("encoding is not stable (-first +second):\n%s", cmp.Diff(first, second))
	}
	one, two := h.info(), again.info()
	for _, i := range []*Info{&one, &two} {
		i.UnknownExtensions = nil // a nil and an empty list are alike
	}
	if !reflect.DeepEqual(one, two) {
		t.Fatalf("the encoded header says something else (-before +after):\n%s", cmp.Diff(one, two))
	}
	// Of several extensions of one type one is written, so only this direction holds.
	if err := h.validate(Limits{}); err != nil {
		return
	}
	if err := again.validate(Limits{}); err != nil {
		t.Fatalf("the encoded header is invalid: %v", err)
	}
	typed := func(what string, err error) {
		var ce *CorruptError
		var le *LimitError
		if err != nil && !errors.As(err, &ce) && !errors.As(err, &le) && !errors.Is(err, ErrUnsupported) {
			t.Fatalf("%s: untyped error %v", what, err)
		}
	}
	snapshots, err := readSnapshotTable(bytes.NewReader(b), size, h, Limits{})
	typed("snapshot table", err)
	g := h.geometry()
	for i := range snapshots {
		typed("snapshot L1", snapshots[i].checkL1(&g))
		_ = snapshots[i].public()
	}
	bitmaps, err := readBitmapDirectory(bytes.NewReader(b), size, h, Limits{})
	typed("bitmap directory", err)
	for _, m := range bitmapMarks(bitmaps) {
		if m.off+4 > uint64(size) || m.off < h.bitmaps.dirOff || m.flags&bitmapInUse == 0 {
			t.Fatalf("mark %+v outside the directory", m)
		}
	}
	_ = h.checkOpenable(true)
}
