package qcow2

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
)

// l2Ref is an L2 table that L1 entries name.
type l2Ref struct {
	off      uint64 // host offset
	l1Index  uint32 // of one of the entries
	active   uint32 // number of entries in the active L1 table
	inactive uint32 // number of entries in those of snapshots
}

// l1Entry looks at entry w at host offset at, which active L1 tables and those of snapshots hold so often
// at index i.
func (c *checker) l1Entry(w, at, i, active, inactive uint64) {
	f := Finding{Part: "active L1 table", HostOff: int64(at), GuestOff: int64(i << (c.clusterBits + c.l2Bits)), Found: w, Expected: c.mendL1(w),
		Times: int64(active + inactive)}
	if active == 0 {
		f.Part = "snapshot L1 table"
	}
	if w&l1Reserved != 0 {
		f.Kind = FindingReserved
		c.structural = true
		c.find(f)
	}
	off := w & offsetMask
	if off == 0 && active+inactive > 0 && w&l1Reserved == 0 && w&flagCopied == 0 {
		return
	}
	flags := uint16(0)
	if active > 0 && off != 0 {
		flags = refPlain
		if w&flagCopied != 0 {
			flags = refCopied
		}
	}
	inside := c.refer(off, c.clusterSize, active+inactive, flags, f)
	aligned := c.offsetInCluster(off) == 0
	if !inside || !aligned {
		c.structural = true
		c.copiedWrong = c.copiedWrong || flags != 0
	}
	if !aligned {
		f.Kind = FindingMisaligned
		c.find(f)
	}
	table := l2Ref{off: off, l1Index: uint32(i), active: uint32(active), inactive: uint32(inactive)}
	switch {
	case !inside: // an L2 table past the end of the file is all zeros
	case !aligned || off == 0:
		if uint64(len(c.misplaced)+1)<<c.clusterBits <= misplacedBytes {
			c.misplaced = append(c.misplaced, table)
		}
	default:
		c.addTable(table)
	}
}

// misplacedBytes bounds the misplaced L2 tables that are looked at, in bytes. No reader takes what they hold, so
// that it matters only for totals like those of qemu-img check; but while there can be no more aligned tables
// than fit into the file, an L1 table of 32 MiB can name four million that are not.
const misplacedBytes = 64 << 20

// mendL1 returns what a repair makes of an L1 entry: one without reserved bits, or none where there is no
// L2 table at its offset.
func (c *checker) mendL1(w uint64) uint64 {
	off := w & offsetMask
	if off == 0 || c.offsetInCluster(off) != 0 || !c.inside(off, c.clusterSize) {
		return 0
	}
	return w &^ l1Reserved
}

// addTable notes an L2 table.
func (c *checker) addTable(r l2Ref) {
	c.pending = append(c.pending, r)
	if len(c.pending) >= max(len(c.l2), 1<<16) {
		c.mergeTables()
	}
}

// mergeTables brings the pending L2 tables into order, each once.
func (c *checker) mergeTables() {
	byOffset := func(a, b l2Ref) int { return cmp.Compare(a.off, b.off) }
	slices.SortStableFunc(c.pending, byOffset)
	merged := make([]l2Ref, 0, len(c.l2)+len(c.pending))
	a, b := c.l2, c.pending
	for len(a) > 0 || len(b) > 0 {
		from := &b
		if len(b) == 0 || len(a) > 0 && a[0].off <= b[0].off {
			from = &a
		}
		r := (*from)[0]
		*from = (*from)[1:]
		if n := len(merged); n > 0 && merged[n-1].off == r.off {
			if merged[n-1].active == 0 {
				merged[n-1].l1Index = r.l1Index
			}
			merged[n-1].active += r.active
			merged[n-1].inactive += r.inactive
			continue
		}
		merged = append(merged, r)
	}
	c.l2, c.pending = merged, c.pending[:0]
}

// tableBatch is a number of L2 tables that are read together.
type tableBatch struct {
	refs []l2Ref
	buf  []byte // their content, end to end
	err  error
	done chan struct{} // closed when buf is filled
}

// walkTables looks at all L2 tables, each once, in the order of the file. They are read ahead in large
// pieces, by several goroutines, as far as batches go.
func (c *checker) walkTables() error {
	c.mergeTables()
	c.pending = nil
	c.total = int64(uint64(len(c.l2)+len(c.misplaced)) << c.clusterBits)
	if c.endOnly && c.total > maxEndSearch {
		return errTooLong
	}
	if err := c.eachTable(c.l2, c.walkTable); err != nil {
		return err
	}
	return c.eachTable(c.misplaced, c.walkTable)
}

// errTooLong says that finding the end takes longer than it is worth.
var errTooLong = errors.New("too many L2 tables")

// eachTable reads the given L2 tables and calls f with each, in order.
func (c *checker) eachTable(refs []l2Ref, f func(r l2Ref, table []byte) error) error {
	perBatch := max(readPiece>>c.clusterBits, 1)
	workers := min(runtime.GOMAXPROCS(0)+1, 4)
	if len(refs) <= perBatch {
		workers = 1
	}
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	jobs := make(chan *tableBatch)
	queue := make(chan *tableBatch, workers)
	free := make(chan []byte, workers+2)
	go func() {
		defer close(jobs)
		defer close(queue)
		for len(refs) > 0 {
			n := min(perBatch, len(refs))
			b := &tableBatch{refs: refs[:n], done: make(chan struct{})}
			refs = refs[n:]
			select {
			case b.buf = <-free:
			default:
				b.buf = make([]byte, n<<c.clusterBits) // every batch but the last is a full one
			}
			select {
			case queue <- b:
			case <-ctx.Done():
				return
			}
			select {
			case jobs <- b:
			case <-ctx.Done():
				b.err = ctx.Err()
				close(b.done)
				return
			}
		}
	}()
	for range workers {
		go func() {
			for b := range jobs {
				b.err = c.readBatch(b)
				close(b.done)
			}
		}()
	}
	for b := range queue {
		<-b.done
		if b.err != nil {
			return fmt.Errorf("L2 table: %w", b.err)
		}
		for i, r := range b.refs {
			if err := f(r, b.buf[i<<c.clusterBits:][:c.clusterSize]); err != nil {
				return err
			}
		}
		if err := c.step(uint64(len(b.refs)) << c.clusterBits); err != nil {
			return err
		}
		select {
		case free <- b.buf:
		default:
		}
	}
	return c.ctx.Err()
}

// readBatch reads the tables of a batch: neighbours in one read.
func (c *checker) readBatch(b *tableBatch) error {
	for i := 0; i < len(b.refs); {
		k := i + 1
		for k < len(b.refs) && b.refs[k].off == b.refs[k-1].off+c.clusterSize {
			k++
		}
		if err := c.h.readFull(b.buf[i<<c.clusterBits:k<<c.clusterBits], b.refs[i].off); err != nil {
			return err
		}
		i = k
	}
	return nil
}

// walkTable looks at the entries of an L2 table. Nearly all of them are nothing, or plain clusters in their
// place, which the loop does by itself. qcow2 spec, "Cluster mapping".
func (c *checker) walkTable(r l2Ref, p []byte) error {
	next := uint64(0) // where the cluster behind the last one would be
	times := uint64(r.active) + uint64(r.inactive)
	guest := uint64(r.l1Index) << (c.clusterBits + c.l2Bits)
	if c.extendedL2 || c.external || c.endOnly {
		for i := uint64(0); i < 1<<c.l2Bits; i++ {
			b := p[i<<c.l2EntryBits:]
			e := l2Entry{word: binary.BigEndian.Uint64(b)}
			if c.extendedL2 {
				e.bitmap = binary.BigEndian.Uint64(b[8:])
			}
			if e != (l2Entry{}) {
				next = c.entry(r, e, i, guest+i<<c.clusterBits, next)
			}
		}
		return nil
	}
	plain := offsetMask &^ (c.clusterSize - 1) // bits of an entry in its place, but for the flags
	limit := uint64(min(c.most, refCountMask-1))
	k, words := ^uint64(0), (*[refChunkWords]uint16)(nil)
	fragments := int64(0)
	allocated := int64(0)
	for i := 0; i < len(p); i += 8 {
		w := binary.BigEndian.Uint64(p[i:])
		if w == 0 {
			continue
		}
		off := w & plain
		if off == 0 || off >= c.size || w&^(plain|flagCopied|flagZero) != 0 || w&flagZero != 0 && c.version2 {
			next = c.entry(r, l2Entry{word: w}, uint64(i)/8, guest+uint64(i)/8<<c.clusterBits, next)
			continue
		}
		allocated++
		if next != 0 && off != next {
			fragments++
		}
		next = off + c.clusterSize
		flag := uint16(0)
		if r.active > 0 {
			flag = refPlain
			if w&flagCopied != 0 {
				flag = refCopied
			}
		}
		ci := off >> c.clusterBits
		if ci>>refChunkBits != k || words == nil {
			k = ci >> refChunkBits
			words = c.refs.ensure(k).words
		}
		if words != nil {
			word := &words[ci&(refChunkWords-1)]
			if n := uint64(*word&refCountMask) + times; n <= limit {
				*word = *word&^refCountMask | uint16(n) | flag
				if next < c.size {
					here := words[ci&(refChunkWords-1)+1:]
					here = here[:min(uint64(len(here)), (c.size-1-next)>>c.clusterBits+1)]
					k := refsInRow(p[i+8:], w, c.clusterSize, here, uint16(times), uint16(limit-times), flag)
					allocated += int64(k)
					next += uint64(k) << c.clusterBits
					i += 8 * k
				}
				continue
			}
		}
		at := Finding{Part: "L2 table", HostOff: int64(r.off) + int64(i), GuestOff: int64(guest + uint64(i)/8<<c.clusterBits)}
		c.refer(off, c.clusterSize, times, flag, at)
		words = nil
	}
	c.res.AllocatedClusters += allocated * int64(r.active)
	c.res.FragmentedClusters += fragments * int64(r.active)
	return nil
}

// refsInRow counts the entries of p that go on behind entry w, each one cluster further and otherwise the same, as
// long as words, of the clusters behind that of w, count no more than most references. It adds times references and
// flag to those, and returns how many there are: in most tables nearly all. The sum fits a word.
func refsInRow(p []byte, w, clusterSize uint64, words []uint16, times, most, flag uint16) int {
	n := min(len(p)/8, len(words))
	for i := range n {
		w += clusterSize
		word := words[i]
		if binary.BigEndian.Uint64(p[8*i:]) != w || word&refCountMask > most {
			return i
		}
		words[i] = (word + times) | flag
	}
	return n
}

// entry looks at entry i of an L2 table, which maps guest. next is the host offset behind the cluster
// before, or 0; entry returns that behind its own.
func (c *checker) entry(r l2Ref, e l2Entry, i, guest, next uint64) uint64 {
	active, times := uint64(r.active), uint64(r.active)+uint64(r.inactive)
	mended := c.mendL2(e, guest)
	f := Finding{Part: "L2 table", HostOff: int64(r.off + i<<c.l2EntryBits), GuestOff: int64(guest), Found: e.word, Expected: mended.word,
		Times: int64(times)}
	find := func(k FindingKind) {
		f.Kind = k
		c.find(f)
	}
	if mended != e {
		c.structural = true
	}
	if e.word&flagCompressed != 0 {
		if e.word&flagCopied != 0 {
			find(FindingCompressed)
		}
		if c.external || e.bitmap != 0 {
			find(FindingCompressed)
			return next
		}
		off, n := c.compressed(e.word)
		c.refer(off, n, times, 0, f)
		c.res.AllocatedClusters += int64(active)
		c.res.CompressedClusters += int64(active)
		c.res.FragmentedClusters += int64(active) // none lies where a cluster would
		return next
	}
	if e.word&l2Reserved != 0 {
		find(FindingReserved)
	}
	if c.version2 && e.word&flagZero != 0 {
		find(FindingZeroFlag)
	}
	plainZero := c.external && !c.extendedL2 && e.word&flagZero != 0 && e.hostOff() == 0
	if !c.hasCluster(e) || plainZero {
		if e.bitmap&bitmapAllocated != 0 {
			f.Found, f.Expected = e.bitmap, mended.bitmap
			find(FindingSubclusters)
		}
		return next
	}
	off := e.hostOff()
	flag := uint16(0)
	if active > 0 && !c.external {
		flag = refPlain
		if e.word&flagCopied != 0 {
			flag = refCopied
		}
	}
	if c.external && active > 0 && e.word&flagCopied == 0 {
		c.copiedWrong = true
	}
	if e.bitmap>>32&e.bitmap != 0 {
		conflict := f
		conflict.Found, conflict.Expected = e.bitmap, mended.bitmap
		conflict.Kind = FindingSubclusters
		c.find(conflict)
	}
	if c.offsetInCluster(off) != 0 {
		find(FindingMisaligned)
	}
	c.res.AllocatedClusters += int64(active)
	if next != 0 && off != next {
		c.res.FragmentedClusters += int64(active)
	}
	next = off + c.clusterSize
	switch {
	case c.external:
		if off != guest && c.offsetInCluster(off) == 0 {
			find(FindingDataFilePlace)
		} else if active > 1 {
			// The table can be right for one of the L1 entries that name it.
			f.Times = int64(active - 1)
			find(FindingDataFilePlace)
		}
		if active > 1 {
			c.split[r.off], c.structural = true, true
		}
	case c.offsetInCluster(off) != 0 || !c.refer(off, c.clusterSize, times, flag, f):
		c.copiedWrong = c.copiedWrong || flag != 0
		if c.offsetInCluster(off) != 0 {
			c.refer(off, c.clusterSize, times, 0, f)
		}
	}
	return next
}

// mendL2 returns what a repair makes of the L2 entry e of guest, whatever the refcounts are. What can be read
// of it reads the same afterwards. What no reader accepts reads as zeros. Version 2 has no word for that: there it is
// nothing, and a repair puts a cluster of zeros in its place where there is a backing file; but a zero flag in
// version 2 is a reserved bit like others.
func (c *checker) mendL2(e l2Entry, guest uint64) l2Entry {
	zero := l2Entry{word: flagZero}
	switch {
	case c.version2:
		zero.word = 0
	case c.extendedL2:
		zero = l2Entry{bitmap: bitmapAllocated << 32}
	}
	if e.word&flagCompressed != 0 {
		off, n := c.compressed(e.word)
		if c.external || e.bitmap != 0 || !c.inside(off, n) {
			return zero
		}
		e.word &^= flagCopied
		return e
	}
	e.word &^= l2Reserved
	if c.extendedL2 || c.version2 {
		e.word &^= flagZero
	}
	if c.external && c.hasCluster(e) {
		// There is but one place where the cluster can be.
		e.word = e.word&^offsetMask | guest | flagCopied
	}
	off := e.hostOff()
	gone := c.offsetInCluster(off) != 0 || off != 0 && !c.external && !c.inside(off, c.clusterSize)
	if !c.extendedL2 {
		if gone {
			return zero
		}
		return e
	}
	if gone {
		e.word = 0
	}
	alloc, zeros := e.bitmap&bitmapAllocated, e.bitmap>>32
	if !c.hasCluster(e) {
		// What was to be read from the cluster reads as zeros: so does what lies past the end of the file.
		return l2Entry{bitmap: (zeros | alloc) << 32}
	}
	e.bitmap = zeros<<32 | alloc&^zeros
	return e
}
