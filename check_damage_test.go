package qcow2

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// damagePart is a part of an image that a damage hits.
type damagePart string

// The parts. Words of tables are 8 bytes.
const (
	partL1            damagePart = "active L1"
	partL2            damagePart = "active L2"        // first words of entries that are not compressed
	partSubclusters   damagePart = "subclusters"      // second words
	partPacked        damagePart = "compressed"       // first words of compressed entries
	partSnapshotL1    damagePart = "snapshot L1"      //
	partSnapshotL2    damagePart = "snapshot L2"      // first words of tables that the active L1 does not share
	partRefTable      damagePart = "refcount table"   //
	partRefcounts     damagePart = "refcounts"        // in refcount blocks
	partHeader        damagePart = "header"           // fields
	partExtension     damagePart = "header extension" // the bitmaps extension
	partSnapshotEntry damagePart = "snapshot entry"   // fields of the snapshot table
	partBitmapEntry   damagePart = "bitmap entry"     // fields of the bitmap directory
	partBitmapTable   damagePart = "bitmap table"     //
	partSize          damagePart = "file size"        //
	partByte          damagePart = "byte of a table"  // any byte of any table
)

// damageWeights says how often each part is hit, where the image has it. Most hits leave an image that can
// still be judged.
var damageWeights = []struct {
	part   damagePart
	weight int
}{
	{partL1, 8}, {partL2, 20}, {partSubclusters, 8}, {partPacked, 10}, {partSnapshotL1, 6}, {partSnapshotL2, 8},
	{partRefTable, 5}, {partRefcounts, 20}, {partHeader, 8}, {partExtension, 1}, {partSnapshotEntry, 5},
	{partBitmapEntry, 3}, {partBitmapTable, 4}, {partSize, 3}, {partByte, 5},
}

// damage is one change of an image.
type damage struct {
	part damagePart
	what string // where and how, in words
	off  int64  // host offset in bytes
	b    []byte // what is written there; nil: the file is cut off, or grows, to off bytes
}

// String describes the damage in one line.
func (d damage) String() string { return fmt.Sprintf("%s: %s", d.part, d.what) }

// apply changes f.
func (d damage) apply(f *pagedFile) {
	if d.b == nil {
		f.truncate(d.off)
		return
	}
	f.write(d.b, d.off)
}

// damaged returns a copy of f with the damages.
func damaged(f *pagedFile, damages ...damage) *pagedFile {
	f = f.clone()
	for _, d := range damages {
		d.apply(f)
	}
	return f
}

// describeDamages returns the damages in one line.
func describeDamages(damages []damage) string {
	var s []string
	for _, d := range damages {
		s = append(s, d.String())
	}
	return strings.Join(s, "; ")
}

// damageMap is where an image can be hit: its tables as they were when it was sound.
type damageMap struct {
	h      *refwalk.Header
	size   int64
	words  map[damagePart][]int64 // host offsets of the words of tables that are not zero
	blanks map[damagePart][]int64 // of some that are

	refBlocks    []int64 // host offsets of the refcount blocks
	firstOf      []int64 // the first cluster that each counts
	snapshots    []int64 // host offsets of snapshot table entries
	bitmaps      []int64 // host offsets of bitmap directory entries
	bitmapsExt   int64   // host offset of the bitmaps extension's data, or 0
	tables       []int64 // host offsets of all clusters of tables
	clusterSize  int64
	clusterCount int64
}

// mapDamage finds the tables of a sound image.
func mapDamage(f *pagedFile) (*damageMap, error) {
	rep, err := refwalk.Walk(f, f.size)
	if err != nil {
		return nil, err
	}
	if rep.Corruptions() > 0 {
		return nil, fmt.Errorf("is not sound: %v", rep.Findings)
	}
	h := rep.Header
	m := &damageMap{
		h: h, size: f.size, clusterSize: 1 << h.ClusterBits,
		words: make(map[damagePart][]int64), blanks: make(map[damagePart][]int64),
	}
	m.clusterCount = (f.size + m.clusterSize - 1) / m.clusterSize
	seen := map[int64]bool{0: true} // clusters of tables
	active := make(map[uint64]bool)
	m.addTable(f, seen, partL1, int64(h.L1Off), int64(h.L1Entries)*8)
	for _, at := range m.words[partL1] {
		l2 := m.word(f, at) & offsetMask
		active[l2] = true
		m.addL2(f, seen, partL2, int64(l2))
	}
	for _, s := range rep.InternalSnapshots {
		m.addTable(f, seen, partSnapshotL1, int64(s.L1Off), int64(s.L1Entries)*8)
	}
	for _, at := range m.words[partSnapshotL1] {
		if l2 := m.word(f, at) & offsetMask; !active[l2] && !seen[int64(l2)] {
			m.addL2(f, seen, partSnapshotL2, int64(l2))
		}
	}
	m.addTable(f, seen, partRefTable, int64(h.RefTableOff), int64(h.RefTableClusters)<<h.ClusterBits)
	for _, at := range m.words[partRefTable] {
		block := int64(m.word(f, at))
		m.refBlocks = append(m.refBlocks, block)
		m.firstOf = append(m.firstOf, (at-int64(h.RefTableOff))/8*(m.clusterSize*8>>h.RefcountOrder))
		seen[block] = true
	}
	m.addSnapshots(f, seen)
	m.addBitmaps(f, seen)
	m.tables = slices.Sorted(maps.Keys(seen))
	return m, nil
}

// word returns the word at host offset off.
func (m *damageMap) word(f *pagedFile, off int64) uint64 {
	return binary.BigEndian.Uint64(f.bytes(off, 8))
}

// addTable adds the words of a table of n bytes at off.
func (m *damageMap) addTable(f *pagedFile, seen map[int64]bool, part damagePart, off, n int64) {
	b := f.bytes(off, n)
	for i := int64(0); i < n; i += 8 {
		if i%m.clusterSize == 0 {
			seen[off+i] = true
		}
		m.addWord(part, off+i, binary.BigEndian.Uint64(b[i:]))
	}
}

// addWord adds the word v at off. Of words that are zero it keeps what a random choice needs.
func (m *damageMap) addWord(part damagePart, off int64, v uint64) {
	if v != 0 {
		m.words[part] = append(m.words[part], off)
	} else if len(m.blanks[part]) < 200 {
		m.blanks[part] = append(m.blanks[part], off)
	}
}

// addL2 adds the entries of the L2 table at off.
func (m *damageMap) addL2(f *pagedFile, seen map[int64]bool, part damagePart, off int64) {
	seen[off] = true
	b := f.bytes(off, m.clusterSize)
	step := int64(8)
	if m.h.ExtendedL2() {
		step = 16
	}
	for i := int64(0); i < m.clusterSize; i += step {
		v := binary.BigEndian.Uint64(b[i:])
		if v&flagCompressed != 0 {
			m.addWord(partPacked, off+i, v)
		} else {
			m.addWord(part, off+i, v)
		}
		if step == 16 {
			m.addWord(partSubclusters, off+i+8, binary.BigEndian.Uint64(b[i+8:]))
		}
	}
}

// addSnapshots adds the entries of the snapshot table.
func (m *damageMap) addSnapshots(f *pagedFile, seen map[int64]bool) {
	at := int64(m.h.SnapshotsOff)
	for range m.h.Snapshots {
		at = (at + 7) &^ 7
		m.snapshots = append(m.snapshots, at)
		seen[at&^(m.clusterSize-1)] = true
		b := f.bytes(at, minSnapshotEntry)
		be := binary.BigEndian
		at += minSnapshotEntry + int64(be.Uint16(b[snapIDSize:])) + int64(be.Uint16(b[snapNameSize:])) + int64(be.Uint32(b[snapExtraSize:]))
	}
}

// addBitmaps adds the entries of the bitmap directory, the extension that points at it, and the bitmap tables.
func (m *damageMap) addBitmaps(f *pagedFile, seen map[int64]bool) {
	if m.h.Bitmaps == 0 {
		return
	}
	be := binary.BigEndian
	m.bitmapsExt = int64(be.Uint32(f.bytes(fieldHeaderLength, 4)))
	for {
		b := f.bytes(m.bitmapsExt, extHeaderSize)
		m.bitmapsExt += extHeaderSize
		if be.Uint32(b) == extBitmaps {
			break
		}
		m.bitmapsExt += (int64(be.Uint32(b[4:])) + 7) &^ 7
	}
	at := int64(m.h.BitmapDirOff)
	for range m.h.Bitmaps {
		m.bitmaps = append(m.bitmaps, at)
		seen[at&^(m.clusterSize-1)] = true
		b := f.bytes(at, minBitmapDirEntry)
		m.addTable(f, seen, partBitmapTable, int64(be.Uint64(b[bitmapTableOff:])), int64(be.Uint32(b[bitmapTableSize:]))*8)
		at += (minBitmapDirEntry + int64(be.Uint16(b[bitmapNameSize:])) + int64(be.Uint32(b[bitmapExtraSize:])) + 7) &^ 7
	}
}

// has reports whether the image has the part.
func (m *damageMap) has(part damagePart) bool {
	switch part {
	case partHeader, partSize, partByte:
		return true
	case partRefcounts:
		return len(m.refBlocks) > 0
	case partExtension:
		return m.bitmapsExt != 0
	case partSnapshotEntry:
		return len(m.snapshots) > 0
	case partBitmapEntry:
		return len(m.bitmaps) > 0
	}
	return len(m.words[part]) > 0
}

// mutator damages images.
type mutator struct {
	*damageMap
	f   *pagedFile // the image as it is damaged so far
	rng *rand.Rand
}

// damageImage returns one to four damages of an image, in the order in which they are made.
func damageImage(img *poolImage, rng *rand.Rand) []damage {
	m := &mutator{img.sites, img.file.clone(), rng}
	var damages []damage
	for range 1 + rng.IntN(4) {
		d := m.damage(m.pickPart())
		d.apply(m.f)
		damages = append(damages, d)
	}
	return damages
}

// pickPart returns a part that the image has.
func (m *mutator) pickPart() damagePart {
	sum := 0
	for _, w := range damageWeights {
		if m.has(w.part) {
			sum += w.weight
		}
	}
	n := m.rng.IntN(sum)
	for _, w := range damageWeights {
		if !m.has(w.part) {
			continue
		}
		if n -= w.weight; n < 0 {
			return w.part
		}
	}
	panic("weights do not add up")
}

// damage returns a damage of the part.
func (m *mutator) damage(part damagePart) damage {
	d := damage{part: part}
	switch part {
	case partHeader:
		m.field(&d, 0, headerDamage)
	case partExtension:
		m.field(&d, m.bitmapsExt, extensionDamage)
	case partSnapshotEntry:
		m.field(&d, pick(m.rng, m.snapshots), snapshotDamage)
	case partBitmapEntry:
		m.field(&d, pick(m.rng, m.bitmaps), bitmapDamage)
	case partRefcounts:
		m.refcount(&d)
	case partSize:
		m.fileSize(&d)
	case partByte:
		m.anyByte(&d)
	default:
		m.tableWord(&d)
	}
	return d
}

// pick returns one of the elements.
func pick[T any](rng *rand.Rand, from []T) T { return from[rng.IntN(len(from))] }

// anyByte makes d a random byte of a table, in its first part more often than elsewhere.
func (m *mutator) anyByte(d *damage) {
	d.off = pick(m.rng, m.tables) + m.rng.Int64N(pick(m.rng, []int64{64, 256, 512, m.clusterSize}))
	d.off = min(d.off, m.f.size-1)
	old := m.f.bytes(d.off, 1)[0]
	d.b = []byte{old ^ byte(1+m.rng.IntN(255))}
	d.what = fmt.Sprintf("at %#x: %#x, was %#x", d.off, d.b[0], old)
}

// fileSize makes d cut the file, or let it grow.
func (m *mutator) fileSize(d *damage) {
	switch m.rng.IntN(6) {
	case 0:
		d.off = m.f.size + (1+m.rng.Int64N(4))*m.clusterSize
	case 1:
		d.off = m.rng.Int64N(m.f.size)
	case 2:
		d.off = m.f.size - 1 - m.rng.Int64N(m.clusterSize)
	default:
		d.off = m.f.size - (1+m.rng.Int64N(4))*m.clusterSize
	}
	d.off = max(d.off, headerLengthV3)
	d.what = fmt.Sprintf("%#x, was %#x", d.off, m.f.size)
}

// refcount makes d change a refcount, mostly one that is not zero.
func (m *mutator) refcount(d *damage) {
	k := m.rng.IntN(len(m.refBlocks))
	if m.rng.IntN(4) > 0 {
		k = 0 // the first block counts most
	}
	block := m.f.bytes(m.refBlocks[k], m.clusterSize)
	order := m.h.RefcountOrder
	n := uint64(m.clusterSize) * 8 >> order
	i := m.rng.Uint64N(n)
	if m.rng.IntN(8) > 0 {
		i = m.rng.Uint64N(min(n, uint64(max(1, m.clusterCount-m.firstOf[k]))))
	}
	for tries := 0; refcountAt(block, order, i) == 0 && tries < 20; tries++ {
		i = m.rng.Uint64N(min(n, uint64(m.clusterCount)))
	}
	old := refcountAt(block, order, i)
	v := old
	switch m.rng.IntN(6) {
	case 0, 1:
		v = min(old, maxRefcount(order)-1) + 1
	case 2, 3:
		v = max(old, 1) - 1
	case 4:
		v = 0
	case 5:
		v = m.rng.Uint64() & maxRefcount(order)
	}
	if v == old {
		v = old ^ 1
	}
	setRefcountAt(block, order, i, v)
	// The bytes that hold it.
	first, last := int64(i)<<order/8, ((int64(i)+1)<<order-1)/8
	d.off, d.b = m.refBlocks[k]+first, block[first:last+1]
	d.what = fmt.Sprintf("of cluster %d: %d, was %d", m.firstOf[k]+int64(i), v, old)
}

// tableWord makes d change a word of a table, mostly one that is not zero.
func (m *mutator) tableWord(d *damage) {
	from := m.words[d.part]
	if blanks := m.blanks[d.part]; len(blanks) > 0 && m.rng.IntN(8) == 0 {
		from = blanks
	}
	d.off = pick(m.rng, from)
	old := m.word(m.f, d.off)
	v, how := m.newWord(d.part, old)
	d.b = binary.BigEndian.AppendUint64(nil, v)
	d.what = fmt.Sprintf("word at %#x: %#x (%s), was %#x", d.off, v, how, old)
}

// anyCluster returns the host offset of a cluster of the file, or of one not far beyond its end.
func (m *mutator) anyCluster() uint64 {
	if m.rng.IntN(6) == 0 {
		return uint64(max(0, m.clusterCount-2+m.rng.Int64N(5))) << m.h.ClusterBits
	}
	return m.rng.Uint64N(uint64(m.clusterCount)) << m.h.ClusterBits
}

// newWord returns what replaces a word of a table, and how it came about.
func (m *mutator) newWord(part damagePart, old uint64) (uint64, string) {
	switch m.rng.IntN(11) {
	case 0, 1:
		return old ^ 1<<m.rng.IntN(64), "bit"
	case 2:
		return old ^ pick(m.rng, []uint64{flagCopied, flagCopied, flagCompressed, flagZero}), "flag"
	case 3:
		if old != 0 {
			return 0, "zero"
		}
		return flagCopied | m.anyCluster(), "cluster"
	case 4, 5:
		return m.word(m.f, pick(m.rng, m.words[part])), "copy"
	case 6:
		return m.rng.Uint64(), "random"
	case 7:
		return old&^offsetMask | m.anyCluster() | m.rng.Uint64N(uint64(m.clusterSize)/sectorSize)*sectorSize, "sector"
	case 8:
		return old&^offsetMask | m.rng.Uint64()&offsetMask&^uint64(m.clusterSize-1), "far cluster"
	}
	if part == partSubclusters {
		// Whole runs of subclusters.
		lo, hi := uint64(m.rng.IntN(32)), uint64(m.rng.IntN(32))
		return old ^ subclusterMask(min(lo, hi), max(lo, hi))<<(32*m.rng.IntN(2)), "subclusters"
	}
	if part == partPacked {
		shift := 62 - (m.h.ClusterBits - 8)
		mask := uint64(1)<<62 - 1<<shift
		return old&^mask | m.rng.Uint64()&mask, "sectors"
	}
	return old&^offsetMask | m.anyCluster(), "cluster"
}

// fieldDamage is a field that can be hit: its offset and size in bytes and values that are worth trying; none:
// any. A value below 64 that is negative is a bit to flip.
type fieldDamage struct {
	off, size int
	name      string
	weight    int
	values    func(m *mutator, old uint64) []uint64
}

// counts returns the neighbours of a number, and what is far from it.
func counts(_ *mutator, old uint64) []uint64 {
	return []uint64{0, old + 1, old - 1, old + 2, old * 2, 1, 0xffff, 1 << 20}
}

// places returns host offsets.
func places(m *mutator, old uint64) []uint64 {
	return []uint64{
		0, m.anyCluster(), m.anyCluster(), m.anyCluster(), old + uint64(m.clusterSize), old + sectorSize, old + 8,
		uint64(m.f.size) &^ uint64(m.clusterSize-1), 1 << 40, 1 << 60,
	}
}

// bitsOf returns a function of old with one of the bits flipped.
func bitsOf(bits ...int) func(*mutator, uint64) []uint64 {
	return func(_ *mutator, old uint64) (values []uint64) {
		for _, b := range bits {
			values = append(values, old^1<<b)
		}
		return values
	}
}

// valuesOf returns a function that knows only these.
func valuesOf(values ...uint64) func(*mutator, uint64) []uint64 {
	return func(*mutator, uint64) []uint64 { return values }
}

// Fields that are hit: of the header, of the bitmaps extension, of a snapshot table entry and of a bitmap
// directory entry.
var (
	headerDamage = []fieldDamage{
		{fieldSize, 8, "size", 2, func(m *mutator, old uint64) []uint64 {
			return []uint64{0, old + 512, old - 512, old / 2, old - uint64(m.clusterSize), old | 1, old * 2}
		}},
		{fieldL1Size, 4, "l1_size", 3, counts},
		{fieldL1Off, 8, "l1_table_offset", 2, places},
		{fieldRefTableOff, 8, "refcount_table_offset", 3, places},
		{fieldRefTableClusters, 4, "refcount_table_clusters", 3, counts},
		{fieldNbSnapshots, 4, "nb_snapshots", 3, counts},
		{fieldSnapshotsOff, 8, "snapshots_offset", 2, places},
		{fieldIncompatible, 8, "incompatible_features", 5, bitsOf(0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 60)},
		{fieldCompatible, 8, "compatible_features", 1, bitsOf(0, 1, 63)},
		{fieldAutoclear, 8, "autoclear_features", 2, bitsOf(0, 0, 1, 2)},
		{fieldRefcountOrder, 4, "refcount_order", 2, valuesOf(0, 1, 2, 3, 4, 5, 6, 7)},
		{fieldHeaderLength, 4, "header_length", 1, valuesOf(72, 103, 104, 105, 112, 120, 511, 512, 1<<20)},
		{fieldClusterBits, 4, "cluster_bits", 1, func(_ *mutator, old uint64) []uint64 { return []uint64{old - 1, old + 1, 8, 22} }},
		{fieldVersion, 4, "version", 1, valuesOf(1, 2, 3, 4)},
		{fieldBackingOff, 8, "backing_file_offset", 1, valuesOf(0, 8, 120, 1<<20)},
		{fieldBackingSize, 4, "backing_file_size", 1, valuesOf(0, 1, 1023, 1024)},
		{fieldCryptMethod, 4, "crypt_method", 1, valuesOf(1, 2, 3)},
	}
	extensionDamage = []fieldDamage{
		{-8, 4, "type", 1, valuesOf(0, 0x12345678)},
		{-4, 4, "length", 1, valuesOf(0, 16, 25, 32, 1<<20)},
		{0, 4, "nb_bitmaps", 2, counts},
		{4, 4, "reserved", 1, valuesOf(1)},
		{8, 8, "bitmap_directory_size", 2, func(_ *mutator, old uint64) []uint64 { return []uint64{0, old - 8, old + 8, old * 2, 1 << 30} }},
		{16, 8, "bitmap_directory_offset", 2, places},
	}
	snapshotDamage = []fieldDamage{
		{snapL1Off, 8, "l1_table_offset", 4, places},
		{snapL1Size, 4, "l1_size", 4, func(_ *mutator, old uint64) []uint64 {
			return []uint64{0, old - 1, old + 1, old + 100, 1 << 22, 1<<22 + 1, 1<<32 - 1}
		}},
		{snapIDSize, 2, "id_str_size", 1, counts},
		{snapNameSize, 2, "name_size", 1, counts},
		{snapExtraSize, 4, "extra_data_size", 3, valuesOf(0, 8, 15, 16, 23, 24, 32, 1024, 1025, 4096, 1<<32-1)},
		{snapDateSec, 4, "date_sec", 1, valuesOf(0, 1<<32-1)},
		{snapVMStateSize, 4, "vm_state_size", 1, valuesOf(0, 1, 1<<32-1)},
		{minSnapshotEntry + snapExtraDiskSize, 8, "disk size", 1, valuesOf(0, 512, 1<<40, 1<<63)},
	}
	bitmapDamage = []fieldDamage{
		{bitmapTableOff, 8, "bitmap_table_offset", 3, places},
		{bitmapTableSize, 4, "bitmap_table_size", 2, counts},
		{bitmapFlags, 4, "flags", 2, bitsOf(0, 0, 1, 2, 3, 31)},
		{bitmapType, 1, "type", 1, valuesOf(0, 2, 255)},
		{bitmapGranularity, 1, "granularity_bits", 1, valuesOf(0, 8, 9, 16, 31, 32, 63, 64)},
		{bitmapNameSize, 2, "name_size", 1, counts},
		{bitmapExtraSize, 4, "extra_data_size", 1, valuesOf(0, 8, 4096)},
	}
)

// field makes d change one of the fields at base: to a value worth trying, or by any bit.
func (m *mutator) field(d *damage, base int64, fields []fieldDamage) {
	sum := 0
	for _, f := range fields {
		sum += f.weight
	}
	n := m.rng.IntN(sum)
	k := slices.IndexFunc(fields, func(f fieldDamage) bool { n -= f.weight; return n < 0 })
	f := fields[k]
	if m.h.Version == 2 && d.part == partHeader && f.off >= headerLengthV2 {
		f = fields[1] // there are no such fields
	}
	d.off = base + int64(f.off)
	raw := make([]byte, 8)
	copy(raw[8-f.size:], m.f.bytes(d.off, int64(f.size)))
	old := binary.BigEndian.Uint64(raw)
	v := old ^ 1<<m.rng.IntN(8*f.size)
	if m.rng.IntN(8) > 0 {
		v = pick(m.rng, f.values(m, old))
	}
	binary.BigEndian.PutUint64(raw, v)
	d.b = raw[8-f.size:]
	d.what = fmt.Sprintf("%s at %#x: %#x, was %#x", f.name, d.off, v, old)
}
