package qcow2

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// An operation on a whole tree of tables, an L1 table with all that it refers to, changes the refcount of every
// cluster in it. That is done in three passes, each over large pieces in the order of the host file, so that it
// costs what the tables are long, not what they map:
//
//	collectTree   counts the references of the tree, in two bytes for each cluster
//	surveyRefs    looks whether every refcount can take the change; nothing is written
//	applyRefs     reads, changes and writes the refcount blocks
//
// The allocator holds none of the blocks afterwards, but for what could not be written.

// refTree is the references of an L1 table: to its L2 tables, and from those to clusters.
type refTree struct {
	refs   *refWords
	tables []treeTable // the L2 tables, by host offset, each once
}

// treeTable is an L2 table of a tree.
type treeTable struct {
	off   uint64 // host offset
	times uint64 // L1 entries that name it
}

// collectTree counts the references of the first n entries of the L1 table l1, which stands at host offset l1Off in a
// file of size bytes. A table that is no such is a *CorruptError. Preconditions: what the file holds is current.
func (img *Image) collectTree(ctx context.Context, l1 *table, l1Off, n uint64, size uint64) (*refTree, error) {
	m := img.m
	t := &refTree{refs: newRefWords()}
	for k, c := range l1.all() {
		for j := range c {
			i := k<<tableChunkBits + uint64(j)
			e := l1.at(c, j)
			off := e & offsetMask
			if i >= n || off == 0 {
				continue
			}
			if m.offsetInCluster(off) != 0 || off < m.clusterSize {
				return nil, &CorruptError{What: fmt.Sprintf("L1 entry %d is %#x: not the offset of an L2 table", i, e),
					HostOff: int64(l1Off + 8*i), GuestOff: noOffset}
			}
			t.tables = append(t.tables, treeTable{off: off, times: 1})
		}
	}
	t.tables = sortTables(t.tables)
	for _, tab := range t.tables {
		t.refs.addRun(clusterRun{first: tab.off >> m.clusterBits, n: 1}, tab.times)
	}
	err := img.eachL2(ctx, t.tables, size, func(tab treeTable, p []byte) (bool, error) {
		return false, t.count(&m.entryRules, tab, p)
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// sortTables puts tables into the order of the host file, each once.
func sortTables(tables []treeTable) []treeTable {
	slices.SortFunc(tables, func(a, b treeTable) int { return cmp.Compare(a.off, b.off) })
	once := tables[:0]
	for _, tab := range tables {
		if k := len(once); k > 0 && once[k-1].off == tab.off {
			once[k-1].times += tab.times
			continue
		}
		once = append(once, tab)
	}
	return once
}

// count counts the references of L2 table tab, which is p.
func (t *refTree) count(r *entryRules, tab treeTable, p []byte) error {
	if r.external {
		return nil // what it maps is in the data file, and has no refcounts
	}
	stride := 1 << r.l2EntryBits
	var run clusterRun
	next := uint64(0) // the entry that would continue the run with the same flags, which most do; 0: none
	for i := 0; i+8 <= len(p); i += stride {
		w := binary.BigEndian.Uint64(p[i:])
		if w == next && w != 0 {
			run.n++
			next += r.clusterSize
			continue
		}
		if w&flagCompressed != 0 {
			t.refs.addRun(r.held(l2Entry{word: w}), tab.times)
			continue
		}
		host := w & offsetMask
		if host == 0 {
			continue
		}
		if r.offsetInCluster(host) != 0 {
			return &CorruptError{What: fmt.Sprintf("L2 entry %#x is not aligned to clusters", w), HostOff: int64(tab.off) + int64(i), GuestOff: noOffset}
		}
		ci := host >> r.clusterBits
		next = w + r.clusterSize
		if ci == run.first+run.n && run.n > 0 {
			run.n++
			continue
		}
		t.refs.addRun(run, tab.times)
		run = clusterRun{first: ci, n: 1}
	}
	t.refs.addRun(run, tab.times)
	return nil
}

// treeReadBytes is the unit in which L2 tables that follow each other in the host file are read and written, and
// treeAheadBytes the length of tables from which on they are read ahead of who looks at them.
const (
	treeReadBytes  = 1 << 20
	treeAheadBytes = 4 << 20
)

// l2Group is L2 tables that follow each other in the host file.
type l2Group struct {
	tables []treeTable
	buf    *[]byte // of getBuffer
	p      []byte  // the tables
	err    error   // of the read
}

// eachL2 calls f with every L2 table of tables, which are in the order of the host file, as the host holds it, and
// writes those back that f changes, which it tells. What lies past the end of the file, which has size bytes, is
// zeros, and passed over. An error ends it: some tables are then written and others not, and whether the last of
// them is, is unknown.
func (img *Image) eachL2(ctx context.Context, tables []treeTable, size uint64, f func(tab treeTable, p []byte) (changed bool, err error)) error {
	groups := make(chan l2Group, 1)
	stop := make(chan struct{})
	next := func() (g l2Group, ok bool) {
		g, tables = img.readGroup(tables, size)
		return g, g.buf != nil
	}
	if uint64(len(tables))<<img.m.clusterBits >= treeAheadBytes {
		read := next
		go func() {
			defer close(groups)
			for {
				g, ok := read()
				if !ok {
					return
				}
				select {
				case groups <- g:
				case <-stop:
					putBuffer(g.buf)
					return
				}
			}
		}()
		defer func() {
			close(stop)
			for g := range groups {
				putBuffer(g.buf)
			}
		}()
		next = func() (g l2Group, ok bool) {
			g, ok = <-groups
			return g, ok
		}
	}
	for {
		g, ok := next()
		if !ok {
			return nil
		}
		err := errors.Join(ctx.Err(), g.err)
		if err == nil {
			err = img.changeGroup(g, f)
		}
		putBuffer(g.buf)
		if err != nil {
			return err
		}
	}
}

// readGroup reads the first of tables, with those behind it that it may be read with, and returns the others. There
// is no group where there is no table within the file.
func (img *Image) readGroup(tables []treeTable, size uint64) (l2Group, []treeTable) {
	m := img.m
	if len(tables) == 0 || tables[0].off >= size {
		return l2Group{}, nil
	}
	k := 1
	for k < max(treeReadBytes>>m.clusterBits, 1) && k < len(tables) && tables[k].off == tables[k-1].off+m.clusterSize {
		k++
	}
	g := l2Group{tables: tables[:k], buf: getBuffer(uint64(k) << m.clusterBits)}
	g.p = *g.buf
	if err := img.host.readFull(g.p, tables[0].off); err != nil {
		g.err = fmt.Errorf("L2 table: %w", err)
	}
	return g, tables[k:]
}

// changeGroup calls f with the tables of a group and writes those that it changes.
func (img *Image) changeGroup(g l2Group, f func(tab treeTable, p []byte) (changed bool, err error)) error {
	m := img.m
	lo, hi := len(g.tables), 0 // the tables that changed lie between
	for i, tab := range g.tables {
		changed, err := f(tab, g.p[uint64(i)<<m.clusterBits:][:m.clusterSize])
		if err != nil {
			return err
		}
		if changed {
			lo, hi = min(lo, i), i+1
		}
	}
	if lo >= hi {
		return nil
	}
	part := g.p[uint64(lo)<<m.clusterBits : uint64(hi)<<m.clusterBits]
	if err := img.host.write(useAnyL2, part, g.tables[lo].off); err != nil {
		return fmt.Errorf("L2 table: %w", err)
	}
	return nil
}

// addRun adds times references to every cluster of run.
func (r *refWords) addRun(run clusterRun, times uint64) {
	for run.n > 0 {
		lo := run.first & (refChunkWords - 1)
		n := min(run.n, refChunkWords-lo)
		c := r.ensure(run.first >> refChunkBits)
		if c.words == nil && uint64(len(c.sparse))+n > refSparseMax {
			c.spread()
		}
		if c.words == nil {
			for i := range n {
				r.add(run.first+i, times, 0, ^uint64(0))
			}
		} else {
			words := c.words[lo : lo+n]
			for i := range words {
				if w := words[i] & refCountMask; times < refCountMask && uint64(w)+times < refCountMask {
					words[i] += uint16(times)
				} else {
					r.add(run.first+uint64(i), times, 0, ^uint64(0))
				}
			}
		}
		run.first, run.n = run.first+n, run.n-n
	}
}

// cancel takes from both counts what they have in common, so that each is left with what it has more of.
func cancel(r, o *refWords) {
	for _, k := range r.chunks() {
		a, b := r.chunk(k), o.chunk(k)
		if b == nil {
			continue
		}
		if a.words == nil || b.words == nil {
			o.each(k, func(ci uint64, _ *uint16) { cancelOne(r, o, ci) })
			continue
		}
		for i := range a.words {
			x, y := a.words[i]&refCountMask, b.words[i]&refCountMask
			if x == refCountMask || y == refCountMask {
				cancelOne(r, o, k<<refChunkBits+uint64(i))
				continue
			}
			both := min(x, y)
			a.words[i] -= both
			b.words[i] -= both
		}
	}
}

// cancelOne is cancel for one cluster.
func cancelOne(r, o *refWords, ci uint64) {
	x, y := r.count(ci), o.count(ci)
	if both := min(x, y); both > 0 {
		r.set(ci, x-both)
		o.set(ci, y-both)
	}
}

// each calls f with every cluster of chunk k that has references, in order, and its word.
func (r *refWords) each(k uint64, f func(ci uint64, w *uint16)) {
	c := r.chunk(k)
	base := k << refChunkBits
	for i := range c.sparse {
		if s := &c.sparse[i]; s.word&refCountMask != 0 {
			f(base+uint64(s.index), &s.word)
		}
	}
	if c.words == nil {
		return
	}
	for i := range c.words {
		if w := &c.words[i]; *w&refCountMask != 0 {
			f(base+uint64(i), w)
		}
	}
}

// refStoredNone marks a cluster whose refcount is zero, in a refWord of an operation on a tree. A check has another use
// for the bit.
const refStoredNone = refPlain

// bulkChange is what is done to a refcount for each reference.
type bulkChange int

const (
	bulkRaise bulkChange = iota
	bulkLower
)

// blockPiece is a part of refcount blocks that is read and written at once.
type blockPiece struct {
	first, n uint64 // clusters that it counts
	off      uint64 // host offset
}

// bytes returns the length of the piece.
func (b *blockPiece) bytes(order uint) uint64 { return b.n << order >> 3 }

// pieces returns the parts of refcount blocks that count clusters of chunk k of refs which have references. Blocks
// that follow each other on the host are one piece. A cluster without a block is a *CorruptError.
func (a *allocator) pieces(refs *refWords, k uint64) ([]blockPiece, error) {
	perBlock := min(a.g.perBlock(), refChunkWords)
	c := refs.chunk(k)
	var out []blockPiece
	next := 0 // in the list of a sparse chunk
	for lo := uint64(0); lo < refChunkWords; lo += perBlock {
		used := false
		if c.words != nil {
			for _, w := range c.words[lo : lo+perBlock] {
				if w&refCountMask != 0 {
					used = true
					break
				}
			}
		}
		for ; next < len(c.sparse) && uint64(c.sparse[next].index) < lo+perBlock; next++ {
			used = used || c.sparse[next].word&refCountMask != 0
		}
		if !used {
			continue
		}
		first := k<<refChunkBits + lo
		index := first >> a.g.refBlockBits
		block := a.table.load(index)
		if block == 0 {
			ci := refs.firstIn(first, perBlock)
			return nil, &CorruptError{What: "refcount 0 of a cluster in use", HostOff: int64(ci << a.g.clusterBits), GuestOff: noOffset}
		}
		if err := a.checkBlock(block, index); err != nil {
			return nil, err
		}
		p := blockPiece{first: first, n: perBlock, off: block + first&(a.g.perBlock()-1)<<a.g.refcountOrder>>3}
		if n := len(out); n > 0 && out[n-1].first+out[n-1].n == first && out[n-1].off+out[n-1].bytes(a.g.refcountOrder) == p.off {
			out[n-1].n += perBlock
			continue
		}
		out = append(out, p)
	}
	return out, nil
}

// firstIn returns the first cluster from first on with references, of n in one chunk; first if there is none.
func (r *refWords) firstIn(first, n uint64) uint64 {
	for ci := first; ci < first+n; ci++ {
		if r.load(ci)&refCountMask != 0 {
			return ci
		}
	}
	return first
}

// surveyRefs looks whether every refcount can take the change for each of the references in refs. It marks the
// clusters whose refcount is, before a raise or after a lowering, exactly one (refStoredOne) or zero (refStoredNone).
// Nothing is written.
//
// Errors: ErrTooLarge for a refcount that is too narrow, *CorruptError for one that is below the number of
// references, that of the context, and those of the host. Precondition: mu.
func (a *allocator) surveyRefs(ctx context.Context, refs *refWords, change bulkChange) error {
	buf := getBuffer(refChunkWords << a.g.refcountOrder >> 3)
	defer putBuffer(buf)
	for _, k := range refs.chunks() {
		if err := ctx.Err(); err != nil {
			return err
		}
		pieces, err := a.pieces(refs, k)
		if err != nil {
			return err
		}
		for _, piece := range pieces {
			p := (*buf)[:piece.bytes(a.g.refcountOrder)]
			if err := a.readPiece(p, piece.off); err != nil {
				return err
			}
			b := bulkBlock{a: a, refs: refs, change: change, piece: piece, p: p}
			if err := b.survey(); err != nil {
				return err
			}
		}
	}
	return nil
}

// applyRefs makes the change for each of the references in refs to clusters below the given one, and returns the
// first cluster for which it is not made. Preconditions: mu, and surveyRefs found no fault.
//
// Where a write fails, nobody knows what the host holds. So the allocator keeps the piece as dirty, to be written
// again by the next write-back (I6): a raise as it was before, and ends with the error; a lowering as it is now, and
// goes on, unless that becomes much. Nothing else changes by an error.
func (a *allocator) applyRefs(refs *refWords, change bulkChange, below uint64) (done uint64, err error) {
	buf := getBuffer(refChunkWords << a.g.refcountOrder >> 3)
	defer putBuffer(buf)
	for off, s := range a.slices {
		if !s.dirty {
			delete(a.slices, off)
		}
	}
	var errs []error
	for _, k := range refs.chunks() {
		if k<<refChunkBits >= below {
			break
		}
		pieces, err := a.pieces(refs, k)
		if err != nil {
			return k << refChunkBits, errors.Join(append(errs, err)...)
		}
		for _, piece := range pieces {
			if piece.first >= below {
				break
			}
			p := (*buf)[:piece.bytes(a.g.refcountOrder)]
			if err := a.readPiece(p, piece.off); err != nil {
				return piece.first, errors.Join(append(errs, err)...)
			}
			b := bulkBlock{a: a, refs: refs, change: change, piece: piece, p: p, below: below}
			if err := b.apply(); err != nil {
				return piece.first, errors.Join(append(errs, err)...)
			}
			if err := a.h.write(useRefcountBlock, p, piece.off); err != nil {
				errs = append(errs, fmt.Errorf("refcount block: %w", err))
				if change == bulkRaise {
					b.change = bulkLower
					_ = b.apply() // it takes back what it did, which fits
					a.adopt(p, piece.off)
					return piece.first, errors.Join(errs...)
				}
				a.adopt(p, piece.off)
				b.release()
				if len(errs) >= maxAdopted {
					return piece.first + piece.n, errors.Join(errs...)
				}
				continue
			}
			for off := range a.slices {
				if off-piece.off < uint64(len(p)) {
					delete(a.slices, off)
				}
			}
			b.release()
		}
	}
	return below, errors.Join(errs...)
}

// readPiece fills p, parts of refcount blocks that stand at host offset off, with what the host holds and, where the
// allocator has something to write there, with that.
func (a *allocator) readPiece(p []byte, off uint64) error {
	if err := a.h.readFull(p, off); err != nil {
		return fmt.Errorf("refcount block: %w", err)
	}
	for at, s := range a.slices {
		if s.dirty && at-off < uint64(len(p)) {
			copy(p[at-off:], s.data)
		}
	}
	return nil
}

// maxAdopted is how many pieces of refcount blocks are kept in memory for failed writes of one operation.
const maxAdopted = 8

// adopt makes p, parts of refcount blocks that stand at host offset off, the allocator's own, to be written. It
// pushes nothing out, so that the cache is larger until it is emptied.
func (a *allocator) adopt(p []byte, off uint64) {
	n := uint64(1) << a.g.sliceBits
	for i := uint64(0); i < uint64(len(p)); i += n {
		a.clock++
		a.slices[off+i] = &refcountSlice{off: off + i, data: slices.Clone(p[i : i+n]), dirty: true, used: a.clock}
	}
}

// dropRefs drops the references of refs to clusters from one on and below another, as free does: they are lowered with
// the next write-backs. Precondition: mu.
func (a *allocator) dropRefs(refs *refWords, from, below uint64) {
	for _, k := range refs.chunks() {
		if (k+1)<<refChunkBits <= from {
			continue
		}
		refs.each(k, func(ci uint64, _ *uint16) {
			if ci < from || ci >= below {
				return
			}
			for range min(refs.count(ci), a.max) {
				a.freeFor(dropSnapshot, clusterRun{first: ci, n: 1})
			}
		})
	}
}

// eachGone calls f with the runs of clusters below the given one whose refcount is zero after the lowering that refs was
// surveyed for, in order, until f returns an error.
func (r *refWords) eachGone(below uint64, f func(run clusterRun) error) error {
	var run clusterRun
	for _, k := range r.gone {
		var err error
		r.each(k, func(ci uint64, w *uint16) {
			if *w&refStoredNone == 0 || ci >= below || err != nil {
				return
			}
			if ci != run.first+run.n && run.n > 0 {
				err = f(run)
				run.n = 0
			}
			if run.n == 0 {
				run.first = ci
			}
			run.n++
		})
		if err != nil {
			return err
		}
	}
	if run.n == 0 {
		return nil
	}
	return f(run)
}

// bulkBlock is a piece of refcount blocks that is looked at or changed.
type bulkBlock struct {
	a      *allocator
	refs   *refWords
	change bulkChange
	piece  blockPiece
	p      []byte // the refcounts
	below  uint64 // clusters from here on stay as they are
	freed  bool   // apply has made a refcount zero
}

// words returns the words of the piece's clusters, nil if their chunk is a list, and of the list its part.
func (b *bulkBlock) words() (words []uint16, sparse []sparseRef) {
	c := b.refs.chunk(b.piece.first >> refChunkBits)
	lo := b.piece.first & (refChunkWords - 1)
	if c.words != nil {
		return c.words[lo : lo+b.piece.n], nil
	}
	i, _ := c.find(uint16(lo))
	j := i
	for j < len(c.sparse) && uint64(c.sparse[j].index) < lo+b.piece.n {
		j++
	}
	return nil, c.sparse[i:j]
}

// alike reports whether each of the words counts one reference.
func alike(words []uint16) bool {
	odd := uint16(0)
	for len(words) >= 4 {
		odd |= (words[0] ^ 1) | (words[1] ^ 1) | (words[2] ^ 1) | (words[3] ^ 1)
		words = words[4:]
	}
	for _, w := range words {
		odd |= w ^ 1
	}
	return odd&refCountMask == 0
}

// survey is surveyRefs for one piece.
func (b *bulkBlock) survey() error {
	order := b.a.g.refcountOrder
	perWord := uint64(64) >> order
	words, sparse := b.words()
	for i := range sparse {
		s := &sparse[i]
		if s.word&refCountMask == 0 {
			continue
		}
		if err := b.surveyOne(uint64(s.index)-b.piece.first&(refChunkWords-1), &s.word); err != nil {
			return err
		}
	}
	one := laneOnes[order] // what most words of refcounts are: each one before a raise, two before a lowering
	if b.change == bulkLower {
		one *= 2
	}
	for i := uint64(0); i < uint64(len(words)); i += perWord {
		group := words[i : i+perWord]
		if order > 0 && binary.BigEndian.Uint64(b.p[i/perWord*8:]) == one && alike(group) {
			for j := range group {
				group[j] |= refStoredOne
			}
			continue
		}
		for j := range group {
			if group[j]&refCountMask == 0 {
				continue
			}
			if err := b.surveyOne(i+uint64(j), &group[j]); err != nil {
				return err
			}
		}
	}
	return nil
}

// surveyOne looks at refcount i of the piece, whose word is w.
func (b *bulkBlock) surveyOne(i uint64, w *uint16) error {
	ci := b.piece.first + i
	v, n := refcountAt(b.p, b.a.g.refcountOrder, i), uint64(*w&refCountMask)
	if n == refCountMask {
		n = b.refs.count(ci)
	}
	if v == 0 || b.change == bulkLower && v < n {
		return &CorruptError{What: fmt.Sprintf("refcount %d of a cluster with more references", v), HostOff: int64(ci << b.a.g.clusterBits), GuestOff: noOffset}
	}
	if b.change == bulkRaise && n > b.a.max-v {
		return fmt.Errorf("%w: refcount of the cluster at host %#x would exceed %d", ErrTooLarge, ci<<b.a.g.clusterBits, b.a.max)
	}
	if b.change == bulkLower {
		v -= n
	}
	*w &^= refStoredOne | refStoredNone
	switch v {
	case 0:
		*w |= refStoredNone
		if k, n := ci>>refChunkBits, len(b.refs.gone); n == 0 || b.refs.gone[n-1] != k {
			b.refs.gone = append(b.refs.gone, k)
		}
	case 1:
		*w |= refStoredOne
	}
	return nil
}

// apply changes the refcounts of the piece. It changes all or, with an error, leaves p to be forgotten.
func (b *bulkBlock) apply() error {
	order := b.a.g.refcountOrder
	perWord := uint64(64) >> order
	words, sparse := b.words()
	for i := range sparse {
		s := &sparse[i]
		if s.word&refCountMask == 0 {
			continue
		}
		if err := b.applyOne(uint64(s.index)-b.piece.first&(refChunkWords-1), s.word); err != nil {
			return err
		}
	}
	ones := laneOnes[order]
	from := ones
	if b.change == bulkLower {
		from *= 2
	}
	for i := uint64(0); i < uint64(len(words)); i += perWord {
		group := words[i : i+perWord]
		if order > 0 && b.piece.first+i+perWord <= b.below && binary.BigEndian.Uint64(b.p[i/perWord*8:]) == from && alike(group) {
			binary.BigEndian.PutUint64(b.p[i/perWord*8:], 3*ones-from) // one becomes two, two become one
			continue
		}
		for j := range group {
			if group[j]&refCountMask == 0 {
				continue
			}
			if err := b.applyOne(i+uint64(j), group[j]); err != nil {
				return err
			}
		}
	}
	return nil
}

// applyOne changes refcount i of the piece, whose word is w.
func (b *bulkBlock) applyOne(i uint64, w uint16) error {
	ci := b.piece.first + i
	if ci >= b.below {
		return nil
	}
	v, n := refcountAt(b.p, b.a.g.refcountOrder, i), uint64(w&refCountMask)
	if n == refCountMask {
		n = b.refs.count(ci)
	}
	if b.change == bulkLower && v < n || b.change == bulkRaise && n > b.a.max-v {
		return &CorruptError{What: "refcount that is counted twice", HostOff: int64(ci << b.a.g.clusterBits), GuestOff: noOffset}
	}
	if b.change == bulkLower {
		n = -n
	}
	setRefcountAt(b.p, b.a.g.refcountOrder, i, v+n)
	b.freed = b.freed || v+n == 0
	return nil
}

// release tells the allocator and the overlap list which clusters of the piece have become free.
func (b *bulkBlock) release() {
	if !b.freed {
		return
	}
	a := b.a
	var run clusterRun
	end := func() {
		if run.n == 0 {
			return
		}
		a.h.leave(allocatedKinds, run.first<<a.g.clusterBits, run.n<<a.g.clusterBits)
		a.one, a.many = min(a.one, run.first), min(a.many, run.first)
		if ci := a.packOff >> a.g.clusterBits; run.first <= ci && ci-run.first < run.n {
			a.packOff = 0
		}
	}
	one := func(i uint64) {
		ci := b.piece.first + i
		if ci >= b.below || refcountAt(b.p, a.g.refcountOrder, i) != 0 {
			return
		}
		if ci != run.first+run.n {
			end()
			run = clusterRun{first: ci}
		}
		run.n++
	}
	words, sparse := b.words()
	for i := range sparse {
		if sparse[i].word&refCountMask != 0 {
			one(uint64(sparse[i].index) - b.piece.first&(refChunkWords-1))
		}
	}
	perWord := uint64(64) >> a.g.refcountOrder
	for i := uint64(0); i < uint64(len(words)); i += perWord {
		if nonzeroRun(b.p, a.g.refcountOrder, i, perWord) == perWord {
			continue
		}
		for j := i; j < i+perWord; j++ {
			if words[j]&refCountMask != 0 {
				one(j)
			}
		}
	}
	end()
}
