package qcow2

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
)

// writeback brings the metadata in memory to the host file, in the one order that every operation relies
// on. A cut takes all changes that are complete when it begins, and then writes them as of that moment, so
// that others go on changing tables beside it:
//
//	round 1  refcounts; new tables were written whole when they were made        sync data file, sync
//	round 2  pointers to new refcount blocks, to a moved refcount table          sync, if there are any
//	round 3  L2 slices, L1 entries                                               sync, if there are any
//	then     references that the cut dropped are lowered and written, unsynced; where the host gets the space
//	         back, it is punched before (punchDropped)
//
// With lazy refcounts, round 1 writes the header's dirty bit instead of the refcounts, which follow at Close.
//
// What a crash leaves between any two host operations:
//
//   - Before the sync of round 1 ended: any part of the refcounts, data and new tables of the cut, which
//     nothing on disk names. Refcounts on disk are never below the references (lowered ones are those of
//     dropped references whose drop is durable), so at worst leaks (I1).
//   - In round 2: a block or table that is named is durable, content and refcount (I3). The header names
//     either refcount table, and both are right for every mapping on disk: the old one is not freed
//     before this cut has ended.
//   - In round 3: every cluster that an L2 or L1 entry names has its refcount and its content on disk (I1,
//     I2), and the tables below an L1 entry are whole (I3). Old clusters are still held (I4).
//   - After it: at worst the lowered counts are missing, which are leaks.
//
// An error anywhere leaves all that was not written dirty, and what the cut dropped held; the next cut
// takes it all again (I6).
type writeback struct {
	mu      sync.Mutex // guards the numbers below
	cond    sync.Cond
	running bool   // a cut, or somebody holds the write-back
	held    bool   // somebody holds it
	giving  int    // calls that punch and release what cuts have dropped
	stopped bool   // nothing is written back any more
	begun   uint64 // cuts begun
	ended   uint64 // cuts ended
	err     error  // how the last one ended

	// Used by the running cut alone, or under the metadata lock:
	limbo    []freedCut // dropped references whose drop is durable, and that requests may still use
	punches  []freedRun // such that no request uses any more, whose space the host gets back before they are released
	punching int        // calls of punchDropped whose clusters the host punches
	punched  sync.Cond  // punching fell; on the metadata lock
	taken    uint64     // number of dropped references in the running cut
	lowered  bool       // refcounts were lowered since the last host sync
	test     testHooks
	late     []freedRun // with test.punchLate: released, and not punched yet
	dirty    bool       // the header's dirty bit is set on disk
}

// freedCut is what one cut dropped.
type freedCut struct {
	epoch uint64 // requests registered in this epoch or earlier may use the clusters
	runs  []freedRun
}

// flush writes back a cut that begins after flush was called. Calls at the same time share one.
func (img *Image) flush() error {
	w := &img.wb
	w.mu.Lock()
	defer w.mu.Unlock()
	mine := w.begun + 1
	for w.ended < mine {
		if w.running {
			w.cond.Wait()
			continue
		}
		if w.stopped {
			return fs.ErrClosed
		}
		w.running = true
		w.begun++
		w.mu.Unlock()
		err := img.writeCut()
		w.mu.Lock()
		w.running = false
		w.ended, w.err = w.begun, err
		w.cond.Broadcast()
	}
	return w.err
}

// hold waits for a running cut, and for who gives back what cuts have dropped, and keeps others from doing so until
// letGo. Cuts that are asked for meanwhile wait.
func (w *writeback) hold() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.running {
		w.cond.Wait()
	}
	w.running, w.held = true, true
	for w.giving > 0 {
		w.cond.Wait()
	}
}

// letGo ends hold.
func (w *writeback) letGo() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running, w.held = false, false
	w.cond.Broadcast()
}

// beginGiving lets the caller give back what cuts have dropped, until endGiving: hold and stop wait for him. It reports
// false if nothing is written back any more, and, unless wait is set, while somebody holds the write-back.
func (w *writeback) beginGiving(wait bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.held && wait && !w.stopped {
		w.cond.Wait()
	}
	if w.held || w.stopped {
		return false
	}
	w.giving++
	return true
}

// endGiving ends beginGiving.
func (w *writeback) endGiving() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.giving--
	w.cond.Broadcast()
}

// stop waits for a running cut, and for who gives back what cuts have dropped, and keeps new ones from beginning: the
// storage is about to be released.
func (w *writeback) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	for w.running || w.giving > 0 {
		w.cond.Wait()
	}
}

// hookWrite is a refcount table entry as of a cut.
type hookWrite struct {
	index uint64 // of the entry
	off   uint64 // host offset of the entry
	block uint64 // host offset of the block
}

// cut is what one round of write-back takes.
type cut struct {
	slices []*l2Slice
	l1     []l1Write
	hooks  []hookWrite
	moved  bool // the header's pointer to the refcount table changes
	table  clusterRun
	freed  freedCut
}

// writeCut takes a cut and writes it.
func (img *Image) writeCut() error {
	if err := img.host.failure(); err != nil {
		return err
	}
	c, err := img.takeCut()
	if err == nil {
		err = img.writeRounds(c)
	}
	img.endCut(c, err)
	return err
}

// takeCut takes everything that has changed, and writes the refcounts: they are right at any time, so they
// need not wait, nor be as of the cut.
func (img *Image) takeCut() (*cut, error) {
	m := img.m
	m.mu.Lock()
	defer m.mu.Unlock()
	a := m.alloc
	c := &cut{
		slices: m.cache.cutDirty(m.id),
		l1:     m.cutL1(),
		moved:  a.moved,
		table:  clusterRun{first: a.tableOff >> m.clusterBits, n: a.tableClusters},
	}
	for _, i := range a.hooks {
		c.hooks = append(c.hooks, hookWrite{index: i, off: a.tableOff + 8*i, block: a.table.load(i)})
	}
	a.hooks = nil
	c.freed.runs, a.freed = a.freed, nil
	img.wb.taken = a.waiting.Swap(0)
	c.freed.epoch = img.reqs.advance()
	a.moved = false

	if img.lazy && !img.closing.Load() {
		if (len(c.slices) > 0 || len(c.l1) > 0) && !img.wb.dirty {
			return c, img.setDirty(true)
		}
		return c, nil
	}
	if img.wb.test.refcountsLast {
		return c, nil
	}
	img.wb.lowered = false
	return c, a.writeBack()
}

// writeRounds writes the cut c in the order that writeback describes.
func (img *Image) writeRounds(c *cut) error {
	t := &img.wb.test
	if t.early() {
		if err := img.writeEarly(c); err != nil {
			return err
		}
	}
	if !t.skipDataSync {
		if err := img.syncData(); err != nil {
			return err
		}
	}
	if c.moved || len(c.hooks) > 0 {
		if err := errors.Join(img.writeHooks(c), img.switchTable(c)); err != nil {
			return err
		}
		if err := img.host.sync(); err != nil {
			return err
		}
	}
	if len(c.slices) == 0 && len(c.l1) == 0 {
		return nil
	}
	for _, s := range c.slices {
		if err := img.m.cache.writeCut(s, img.host); err != nil {
			return fmt.Errorf("L2 table: %w", err)
		}
	}
	if err := img.writeL1(c); err != nil {
		return err
	}
	if t.refcountsLast {
		if err := img.writeRefcounts(); err != nil {
			return err
		}
	}
	return img.host.sync()
}

// writeL1 writes the L1 entries of the cut.
func (img *Image) writeL1(c *cut) error {
	for _, p := range c.l1 {
		if err := img.host.write(useL1, p.data, img.m.l1Off+p.piece*sectorSize); err != nil {
			return fmt.Errorf("L1 table: %w", err)
		}
	}
	return nil
}

// writeRefcounts writes the refcounts as they are now.
func (img *Image) writeRefcounts() error {
	img.mu.Lock()
	defer img.mu.Unlock()
	return img.m.alloc.writeBack()
}

// writeEarly writes pointers before what they point at is durable, as the crash tests have it.
func (img *Image) writeEarly(c *cut) error {
	t := &img.wb.test
	var errs []error
	if t.pointerFirst {
		errs = append(errs, img.writeL1(c))
	}
	if t.hookFirst {
		errs = append(errs, img.writeHooks(c))
	}
	if t.headerFirst {
		errs = append(errs, img.switchTable(c))
	}
	return errors.Join(errs...)
}

// syncData makes guest data durable, and everything that was written to the image file: round 1.
func (img *Image) syncData() error {
	if img.data != img.host {
		if err := img.data.sync(); err != nil {
			// A data file that lost data must not get mappings any more.
			return img.host.fail(fmt.Errorf("data file: %w", err))
		}
	}
	return img.host.sync()
}

// writeHooks writes the pointers to new refcount blocks.
func (img *Image) writeHooks(c *cut) error {
	for _, k := range c.hooks {
		var p [8]byte
		binary.BigEndian.PutUint64(p[:], k.block)
		if err := img.host.write(useRefcountTable, p[:], k.off); err != nil {
			return fmt.Errorf("refcount table: %w", err)
		}
	}
	return nil
}

// switchTable writes the header's pointer to a refcount table that moved.
func (img *Image) switchTable(c *cut) error {
	if !c.moved {
		return nil
	}
	if err := img.host.writeHeader(encodeRefcountTableFields(c.table.first<<img.m.clusterBits, uint32(c.table.n))); err != nil {
		return fmt.Errorf("refcount table: %w", err)
	}
	return nil
}

// endCut gives the cut back. After an error it is as if it had not been taken. Otherwise the references
// that it dropped are released as far as no request uses them, and refcounts that fell are written, without
// a sync: if they are lost, they are leaks.
func (img *Image) endCut(c *cut, failed error) {
	m := img.m
	m.cache.endCut(c.slices, failed == nil)
	m.mu.Lock()
	defer m.mu.Unlock()
	a := m.alloc
	img.wb.taken = 0
	if failed != nil {
		m.restoreL1(c.l1)
		for _, k := range c.hooks {
			if !a.moved { // a table that moved meanwhile holds the entry already
				a.hooks = append(a.hooks, k.index)
			}
		}
		a.moved = a.moved || c.moved
		for _, r := range c.freed.runs {
			a.freeFor(r.cause, r.clusterRun)
		}
		return
	}
	if c.moved {
		img.hdr.refTableOff, img.hdr.refTableClusters = c.table.first<<m.clusterBits, uint32(c.table.n)
	}
	if len(c.freed.runs) > 0 {
		img.wb.limbo = append(img.wb.limbo, c.freed)
	}
	_ = img.releaseLimbo() // what could not be released stays; Close meets the error
	if !img.lazy || img.closing.Load() {
		_ = a.writeBack() // what could not be written stays dirty; the next cut meets the error
	}
}

// releaseLimbo lowers the refcounts of clusters whose drop is durable and that no request uses any more.
// What an error of the host keeps from being released stays for the next time. Precondition: the metadata
// lock.
func (img *Image) releaseLimbo() error {
	w := &img.wb
	if len(w.limbo) == 0 {
		return nil
	}
	oldest := img.reqs.oldest()
	for len(w.limbo) > 0 && w.limbo[0].epoch < oldest {
		w.lowered = true
		runs := w.limbo[0].runs
		if img.discard != DiscardNever {
			runs = img.takePunches(runs)
		}
		rest, err := img.m.alloc.release(runs)
		if err != nil {
			w.limbo[0].runs = rest
			return err
		}
		w.limbo = w.limbo[1:]
	}
	return nil
}

// takePunches moves to writeback.punches what is to be punched, and returns the other runs. Precondition: the
// metadata lock.
func (img *Image) takePunches(runs []freedRun) []freedRun {
	kept := runs[:0]
	for _, r := range runs {
		if img.discard.passes(r.cause) {
			img.wb.punches = append(img.wb.punches, r)
		} else {
			kept = append(kept, r)
		}
	}
	return kept
}

// punchBatch is the number of runs that are punched and then released together.
const punchBatch = 1024

// punchDropped releases what releaseLimbo does, and what it has set aside to be punched, in this order for each
// cluster whose last reference was dropped:
//
//   - its drop is durable, and no request that resolved it is in flight (releaseLimbo), so that a crash at any
//     later point finds no mapping of it, and nobody reads it (I4);
//   - the host punches it, while its refcount in memory, and so on disk, is still one: the allocator gives it to
//     nobody, so that no later write can meet the punch. Nobody else refers to it, nor comes to do so: pack is the
//     only one who adds a reference to a cluster in use while guests write, and does not to this one any more;
//     whoever counts references anew waits for punching to end (releaseAll);
//   - it is released. Nobody takes it for zeros: of a punch that was not synced a crash may lose any part.
//
// A punch is a wish. Where the host cannot do it, or fails, the cluster is released all the same. One that would
// hit metadata marks the image as corrupt, as a write does (I8); nothing is released then.
//
// The metadata lock is held, and let go while the host works. What an error keeps from being released stays for
// the next time.
func (img *Image) punchDropped() error {
	w, a := &img.wb, img.m.alloc
	err := img.releaseLimbo()
	for len(w.punches) > 0 && err == nil {
		var sole []freedRun
		for len(w.punches) > 0 && len(sole) < punchBatch {
			r := &w.punches[0]
			var n uint64
			if n, sole, err = a.releaseShared(*r, sole); err != nil {
				r.first, r.n = r.first+n, r.n-n
				break
			}
			w.punches = w.punches[1:]
		}
		if w.test.punchLate {
			// Released now, punched the next time.
			_, _ = a.release(slices.Clone(sole))
			sole, w.late = w.late, sole
		}
		w.punching++
		img.mu.Unlock()
		perr := img.punchRuns(sole)
		img.mu.Lock()
		if perr != nil {
			w.punches = append(w.punches, sole...)
		} else if !w.test.punchLate {
			rest, rerr := a.release(sole)
			w.punches = append(w.punches, rest...)
			perr = rerr
		}
		w.punching--
		w.punched.Broadcast()
		err = errors.Join(err, perr)
	}
	return err
}

// punchRuns has the host punch the runs, whose clusters have the dropped reference alone. It sorts them.
func (img *Image) punchRuns(runs []freedRun) error {
	slices.SortFunc(runs, func(x, y freedRun) int { return cmp.Compare(x.first, y.first) })
	for i := 0; i < len(runs); {
		r := runs[i]
		for i++; i < len(runs) && runs[i].first == r.first+r.n && runs[i].cause == r.cause; i++ {
			r.n += runs[i].n
		}
		// A table that was dropped is on the list of metadata until it is released.
		own := allocatedKinds
		if r.cause == dropDiscard {
			own = 0
		}
		if err := img.host.punch(own, noOffset, r.first<<img.m.clusterBits, r.n<<img.m.clusterBits); err != nil {
			return err
		}
	}
	return nil
}

// releaseAll is punchDropped, and waits for others who do the same: then nothing whose drop is durable, and that no
// request uses, is left to be released. The metadata lock is held, and let go meanwhile.
func (img *Image) releaseAll() error {
	err := img.punchDropped()
	for img.wb.punching > 0 {
		img.wb.punched.Wait()
	}
	return err
}

// giveBack punches and releases what the last write-back made ready for it, and writes the refcounts that fell,
// without a sync. It is for calls that just wrote back, and hold nothing; what it cannot do waits for the next.
func (img *Image) giveBack() {
	if img.discard == DiscardNever || !img.wb.beginGiving(false) {
		return
	}
	defer img.wb.endGiving()
	img.mu.Lock()
	defer img.mu.Unlock()
	if len(img.wb.punches) == 0 && len(img.wb.limbo) == 0 {
		return
	}
	_ = img.punchDropped() // what could not be released stays; Close meets the error
	if !img.lazy || img.closing.Load() {
		_ = img.m.alloc.writeBack() // what could not be written stays dirty; the next cut meets the error
	}
}

// maxQuarantine is the number of bytes in dropped clusters that may wait for a write-back before one is
// made for their sake.
const maxQuarantine = 64 << 20

// relieve writes back if so many clusters wait to become free that the file would grow for no need.
func (img *Image) relieve() error {
	if img.m.alloc.waiting.Load()<<img.m.clusterBits < maxQuarantine {
		return nil
	}
	err := img.flush()
	if err == fs.ErrClosed {
		return nil // Close wrote it back
	}
	if err == nil {
		img.giveBack()
	}
	return err
}

// reclaim is for who found the host full: it writes back, waits for the requests that may still use what
// was dropped, and reports whether references were released since the counter released stood at seen. The
// caller, who read the counter before it searched for space, tries again then. It is no request and holds
// no clusters, so that two who reclaim do not wait for each other (I4).
func (img *Image) reclaim(seen uint64) bool {
	m, w := img.m, &img.wb
	m.mu.Lock()
	held := m.alloc.waiting.Load() > 0 || w.taken > 0 || len(w.limbo) > 0 || len(w.punches) > 0 || w.punching > 0
	m.mu.Unlock()
	if held && img.flush() == nil {
		m.mu.Lock()
		var last uint64
		if n := len(w.limbo); n > 0 {
			last = w.limbo[n-1].epoch
		}
		m.mu.Unlock()
		img.reqs.waitPast(last)
		if w.beginGiving(true) {
			m.mu.Lock()
			_ = img.releaseAll() // what could not be released is not counted
			m.mu.Unlock()
			w.endGiving()
		}
	}
	return m.alloc.released.Load() != seen
}

// setDirty writes the header's dirty bit. Setting it is durable with the sync that precedes the first
// mapping; it is cleared only when all refcounts are durable. Precondition: the metadata lock, or the only
// user.
func (img *Image) setDirty(dirty bool) error {
	img.featureMu.Lock()
	defer img.featureMu.Unlock()
	word := img.hdr.incompatible &^ incompatDirty
	if dirty {
		word |= incompatDirty
	}
	if err := img.host.writeHeader(img.hdr.encodeIncompatibleField(word)); err != nil {
		return fmt.Errorf("dirty bit: %w", err)
	}
	img.hdr.incompatible = word
	img.wb.dirty = dirty
	return nil
}
