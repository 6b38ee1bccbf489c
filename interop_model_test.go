package qcow2_test

import (
	"fmt"
	"slices"

	"github.com/go-qcow2/qcow2"
)

// interopKind is one kind of image of the interoperability matrix.
type interopKind struct {
	name        string
	extended    bool   // extended L2
	compression string // explicit compression_type, or ""
	data, raw   bool   // external data file; a raw one
	backing     string // "", "qcow2", "raw", "short" (an odd raw file) or "long" (qcow2)
	snapshots   bool   // QEMU makes internal snapshots between the writes
}

// interopKinds are the kinds of the matrix.
var interopKinds = []interopKind{
	{name: "plain"},
	{name: "extl2", extended: true},
	{name: "data", data: true},
	{name: "rawdata", data: true, raw: true},
	{name: "backing-qcow2", backing: "qcow2"},
	{name: "backing-raw", backing: "raw"},
	{name: "backing-short", backing: "short"},
	{name: "backing-long", backing: "long"},
	{name: "deflate", compression: "zlib"},
	{name: "zstd", compression: "zstd"},
	{name: "extl2-backing", extended: true, backing: "qcow2"},
	{name: "extl2-deflate", extended: true, compression: "zlib"},
	{name: "extl2-zstd", extended: true, compression: "zstd"},
	{name: "extl2-data", extended: true, data: true},
	{name: "extl2-rawdata", extended: true, data: true, raw: true},
	{name: "snapshots", snapshots: true},
	{name: "extl2-snapshots", extended: true, snapshots: true},
}

// interopCase is one combination of the matrix.
type interopCase struct {
	interopKind
	clusterSize  int64
	version      int
	refcountBits int
	index        int // among the legal ones; picks what rotates through the matrix
}

// String returns the name of the combination's test.
func (c interopCase) String() string {
	return fmt.Sprintf("%s/cluster=%d/v%d/refcount=%d", c.name, c.clusterSize, c.version, c.refcountBits)
}

// illegal returns why the format or QEMU refuses the combination, or "".
func (c interopCase) illegal() string {
	switch {
	case c.version == 2 && c.refcountBits != 16:
		return "version 2 has 16-bit refcounts only"
	case c.version == 2 && c.extended:
		return "version 2 has no extended L2"
	case c.version == 2 && c.data:
		return "version 2 has no data file"
	case c.version == 2 && c.compression == "zstd":
		return "version 2 has no zstd"
	case c.extended && c.clusterSize < 16<<10:
		return "extended L2 needs clusters of 16 KiB"
	case c.snapshots && c.refcountBits == 1:
		return "snapshots need refcounts above 1"
	}
	return ""
}

// interopCases returns the legal combinations, and how many are left out for each reason.
func interopCases() (legal []interopCase, left map[string]int) {
	left = make(map[string]int)
	for _, kind := range interopKinds {
		for _, clusterSize := range []int64{512, 4 << 10, 64 << 10, 2 << 20} {
			for _, version := range []int{2, 3} {
				for bits := 1; bits <= 64; bits *= 2 {
					c := interopCase{interopKind: kind, clusterSize: clusterSize, version: version, refcountBits: bits, index: len(legal)}
					if why := c.illegal(); why != "" {
						left[why]++
						continue
					}
					legal = append(legal, c)
				}
			}
		}
	}
	return legal, left
}

// snapshotCount returns how many snapshots QEMU makes: two, but one where a refcount goes up to 3 only,
// since applying a snapshot takes one more reference for a moment.
func (c interopCase) snapshotCount() int {
	switch {
	case !c.snapshots:
		return 0
	case c.refcountBits == 2:
		return 1
	}
	return 2
}

// maxCompressed returns how many compressed clusters the image may start with: with snapshots, k of them in
// one host cluster count k times for each snapshot, once for the active image and once while one is
// applied.
func (c interopCase) maxCompressed() int {
	switch {
	case c.data:
		return 0
	case c.snapshots && c.refcountBits < 8:
		return (1<<c.refcountBits - 1) / (c.snapshotCount() + 2)
	}
	return 1 << 30
}

// interopRole is what a slot, one guest cluster, of the disk becomes before it is written over.
type interopRole int

const (
	rolePartial     interopRole = iota // a part of the cluster is written
	roleData                           // all of it
	roleUnallocated                    // nothing
	roleZeroPlain                      // data, then zeros with unmap
	roleZeroFresh                      // zeros where nothing was
	roleZeroAlloc                      // data, then zeros that keep the host cluster
	roleDiscarded                      // data, then discarded
	roleCompressed                     // compressed, or data where that is not possible
	interopRoles
)

// interopOver is how a slot is written over.
type interopOver int

const (
	overKeep interopOver = iota
	overFull
	overPartial
	overCompressed
	interopOvers
)

// interopSlot is one guest cluster with its part.
type interopSlot struct {
	role   interopRole
	over   interopOver
	off, n int64
}

// layout returns the size of the combination's disk in bytes and its slots. There is one slot of each role
// for each way of writing it over; with 2 MiB clusters, one of each role, whose way of being written over
// rotates through the matrix. The last slot is a short tail of the disk; with 512-byte clusters there is
// none, as a disk is a multiple of that.
func (c interopCase) layout() (size int64, slots []interopSlot) {
	perRole, stride, tail := int(interopOvers), int64(1), int64(37*512)
	switch c.clusterSize {
	case 512:
		stride, tail = 63, 0 // 64 entries in an L2 table
	case 4 << 10:
		stride, tail = 19, 3*512
	case 2 << 20:
		perRole = 1
	}
	for i := range perRole * int(interopRoles) {
		s := interopSlot{
			role: interopRole(i % int(interopRoles)),
			over: interopOver(i / int(interopRoles)),
			off:  int64(i) * stride * c.clusterSize,
			n:    c.clusterSize,
		}
		if perRole == 1 {
			s.over = interopOver((c.index + c.index/int(interopOvers) + i) % int(interopOvers))
		}
		slots = append(slots, s)
	}
	size = int64(len(slots)) * stride * c.clusterSize
	if tail > 0 {
		slots = append(slots, interopSlot{
			role: interopRole(c.index % int(interopRoles)),
			over: interopOver(c.index / int(interopRoles) % int(interopOvers)),
			off:  size, n: tail,
		})
	}
	return size + tail, slots
}

// interopOpKind is what an operation does.
type interopOpKind int

const (
	opWrite interopOpKind = iota
	opCompressed
	opZero      // qemu-io write -z
	opZeroUnmap // qemu-io write -z -u
	opDiscard
)

// interopOp is one operation on the disk.
type interopOp struct {
	kind    interopOpKind
	off, n  int64
	pattern int // of opWrite and opCompressed
}

// Patterns are what is written: every write repeats one from its start. The periods are primes, so that no
// offset looks like another nearby; no two patterns share a byte, and no byte is zero. They shrink: the plain
// ones to next to nothing, the noisy ones, whose numbers are higher by noisyPattern, to about one half, so
// that compressed clusters of less than 2 MiB straddle host clusters.
const (
	interopPatterns = 15
	noisyPattern    = 100
)

// interopPeriods holds one period of every pattern, by number. It is read-only.
var interopPeriods = func() map[int][]byte {
	periods := make(map[int][]byte)
	for i := range interopPatterns {
		periods[i], periods[i+noisyPattern] = makeInteropPattern(i), makeInteropPattern(i+noisyPattern)
	}
	return periods
}()

// makeInteropPattern makes one period of a pattern.
func makeInteropPattern(pattern int) []byte {
	period, run := 1009, 4
	if pattern >= noisyPattern {
		period, run = 70001, 1
	}
	p := make([]byte, period)
	x := uint32(pattern)*2654435761 + 12345
	for i := 0; i < len(p); i += run {
		x = x*1664525 + 1013904223
		for j := i; j < min(i+run, len(p)); j++ {
			p[j] = byte(1 + 16*(pattern%noisyPattern) + int(x>>28))
		}
	}
	return p
}

// fill makes p what the operation writes.
func (o interopOp) fill(p []byte) {
	for n := copy(p, interopPeriods[o.pattern]); n < len(p); {
		n += copy(p[n:], interopPeriods[o.pattern])
	}
}

// interopUnit is what a subcluster, or without extended L2 a cluster, is expected to be.
type interopUnit uint8

const (
	unitUnallocated interopUnit = iota
	unitData
	unitZero
	unitCompressed
)

// interopModel is what an image is expected to hold.
type interopModel struct {
	interopCase
	data    []byte
	unit    int64         // bytes
	units   []interopUnit // of the whole disk
	host    []bool        // by guest cluster: whether it holds a host cluster of its own
	inChain bool          // there is a backing file
}

// newInteropModel returns the model of a new image over a backing disk that reads as backing, or nil. byQEMU
// tells who makes the image: over a raw data file, QEMU maps all the clusters from the beginning but none of
// their subclusters.
func newInteropModel(c interopCase, backing []byte, byQEMU bool) *interopModel {
	size, _ := c.layout()
	m := &interopModel{interopCase: c, data: make([]byte, size), unit: c.clusterSize, inChain: backing != nil}
	copy(m.data, backing)
	if c.extended {
		m.unit /= 32
	}
	m.units = make([]interopUnit, (size+m.unit-1)/m.unit)
	m.host = make([]bool, (size+c.clusterSize-1)/c.clusterSize)
	if c.raw {
		for i := range m.units {
			if !byQEMU || !c.extended {
				m.units[i] = unitData
			}
		}
		for i := range m.host {
			m.host[i] = true
		}
	}
	return m
}

// clone returns a copy: the state that a snapshot keeps.
func (m *interopModel) clone() *interopModel {
	d := *m
	d.data, d.units, d.host = slices.Clone(m.data), slices.Clone(m.units), slices.Clone(m.host)
	return &d
}

// set makes all the units of a cluster u, with or without a host cluster.
func (m *interopModel) set(cluster int64, u interopUnit, host bool) {
	per := m.clusterSize / m.unit
	for i := cluster * per; i < min((cluster+1)*per, int64(len(m.units))); i++ {
		m.units[i] = u
	}
	m.host[cluster] = host
}

// apply does o to the model. Zeroing, discards and compressed writes are of whole clusters or the tail.
func (m *interopModel) apply(o interopOp) {
	first, last := o.off/m.clusterSize, (o.off+o.n-1)/m.clusterSize
	zeros := func() { clear(m.data[o.off : o.off+o.n]) }
	switch {
	case m.version == 2 && o.kind == opDiscard && m.inChain:
		return // it would show the backing file again
	case m.version == 2 && o.kind != opWrite && o.kind != opCompressed && m.inChain:
		zeros() // written as data, as there is no zero flag
		for c := first; c <= last; c++ {
			m.set(c, unitData, true)
		}
		return
	case m.version == 2 && o.kind != opWrite && o.kind != opCompressed:
		zeros()
		for c := first; c <= last; c++ {
			m.set(c, unitUnallocated, false)
		}
		return
	}
	switch o.kind {
	case opWrite:
		o.fill(m.data[o.off : o.off+o.n])
		for c := first; c <= last; c++ {
			if m.units[c*(m.clusterSize/m.unit)] == unitCompressed {
				m.set(c, unitData, true)
			}
			m.host[c] = true
		}
		for u := o.off / m.unit; u <= (o.off+o.n-1)/m.unit; u++ {
			m.units[u] = unitData
		}
	case opCompressed:
		o.fill(m.data[o.off : o.off+o.n])
		for c := first; c <= last; c++ {
			m.set(c, unitCompressed, false)
		}
	case opZero:
		zeros()
		for c := first; c <= last; c++ {
			m.set(c, unitZero, m.host[c])
		}
	case opZeroUnmap, opDiscard:
		zeros()
		// QEMU zeroes a tail of several subclusters, the last one not whole, in two pieces, neither of which is
		// the whole cluster, so its host cluster stays.
		keep := o.kind == opZeroUnmap && o.n < m.clusterSize && o.n > m.unit && o.n%m.unit != 0
		for c := first; c <= last; c++ {
			m.set(c, unitZero, keep && m.host[c])
		}
	}
}

// compressedClusters returns how many guest clusters are compressed.
func (m *interopModel) compressedClusters() (n int64) {
	per := m.clusterSize / m.unit
	for c := range m.host {
		if m.units[int64(c)*per] == unitCompressed {
			n++
		}
	}
	return n
}

// interopTally counts bytes of what an image holds by what Extents says about it.
type interopTally struct {
	Data, ZeroPlain, ZeroAlloc, Compressed, NotHere bool
}

// expectExtents compares Extents of the image with the model, unit by unit, and returns what there is.
func (m *interopModel) expectExtents(img *qcow2.Image) (interopTally, error) {
	var tally interopTally
	pos := int64(0)
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			return tally, err
		}
		if e.Off != pos || e.Len <= 0 {
			return tally, fmt.Errorf("extent %+v follows offset %#x", e, pos)
		}
		for pos < e.Off+e.Len {
			u := pos / m.unit
			host := m.host[pos/m.clusterSize]
			var ok bool
			switch m.units[u] {
			case unitUnallocated:
				ok = e.Kind == qcow2.ExtentUnallocated || m.inChain && e.Depth == 1
				tally.NotHere = true
			case unitData:
				ok = (e.Kind == qcow2.ExtentData || e.Hole) && e.Depth == 0 && e.HostOff > 0
				if m.interopCase.data {
					ok = (e.Kind == qcow2.ExtentData || e.Hole) && e.Depth == 0 && e.HostOff == e.Off
				}
				tally.Data = true
			case unitZero:
				ok = e.Kind == qcow2.ExtentZero && !e.Hole && e.Depth == 0 && (e.HostOff >= 0) == host
				if host {
					tally.ZeroAlloc = true
				} else {
					tally.ZeroPlain = true
				}
			case unitCompressed:
				ok = e.Kind == qcow2.ExtentCompressed && e.Depth == 0
				tally.Compressed = true
			}
			if !ok {
				return tally, fmt.Errorf("guest %#x: extent %+v, want unit %d, host cluster %t", pos, e, m.units[u], host)
			}
			pos = min((u+1)*m.unit, e.Off+e.Len)
		}
	}
	if pos != int64(len(m.data)) {
		return tally, fmt.Errorf("extents end at %#x, want %#x", pos, len(m.data))
	}
	return tally, nil
}

// roleUnit returns the first unit of the first slot of a role.
func (m *interopModel) roleUnit(role interopRole) int64 {
	_, slots := m.layout()
	return slots[role].off / m.unit
}

// wantTally returns what an image of the combination must hold once all the roles were played. In version 2
// there is no zero flag: zeros are unallocated, or data over a backing file.
func (m *interopModel) wantTally() interopTally {
	return interopTally{
		Data: true, ZeroPlain: m.version == 3, ZeroAlloc: m.version == 3, Compressed: !m.interopCase.data,
		NotHere: m.units[m.roleUnit(roleUnallocated)] == unitUnallocated,
	}
}
