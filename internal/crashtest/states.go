package crashtest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// Options says which crash states are made. The zero value tries 16 states at every point.
type Options struct {
	// PerPoint is how many states are made at a crash point at most, beside the two ends. 0: 16.
	PerPoint int
	// Max ends the generation after that many states in all. 0: no bound.
	Max int
	// From is the first crash point, a value of Recorder.Len. Operations before it still count.
	From int
	// Every makes states only at every so-manieth crash point, from a random one on, so that a long
	// record spends its states over its whole length. 0 or 1: all.
	Every int
	// Block is the unit in which punches, zeroings and allocations are torn, in bytes: a power of two,
	// 512 at least. 0: 512.
	Block int64
	// Tightens reports whether a mark demands more of the states after it, as the return of a Sync
	// does: the same content before and after it makes two states. nil: every mark does.
	Tightens func(mark any) bool
}

// Stats counts what a generation made.
type Stats struct {
	// Points is the number of crash points that were looked at.
	Points int
	// States is the number of states handed out: distinct by content and by the tightening marks
	// before them.
	States int
	// Distinct is the number of contents among them.
	Distinct int
	// Reordered is the number of states that lost something of an operation, visibly, and kept a
	// visible change by a later one.
	Reordered int
	// Torn is the number of states that kept a part of an operation.
	Torn int
}

// Add adds the counts of another record's generation; contents of two records are taken as different.
func (s *Stats) Add(o Stats) {
	s.Points += o.Points
	s.States += o.States
	s.Distinct += o.Distinct
	s.Reordered += o.Reordered
	s.Torn += o.Torn
}

// String returns the counts in one line.
func (s Stats) String() string {
	return fmt.Sprintf("%d states at %d points, %d contents, %d reordered, %d torn", s.States, s.Points, s.Distinct,
		s.Reordered, s.Torn)
}

// State is what a crash left. It is valid until the function that was given it returns; what Disk
// returned stays valid.
type State struct {
	// Point is the crash point: how many positions of the record came before the crash.
	Point int
	// Index counts the states of a generation from 0.
	Index int
	// Reordered reports that something of an operation was visibly lost and a later one's change kept.
	Reordered bool
	// Torn reports that a part of an operation was kept.
	Torn bool

	gen    *generator
	disks  []*Disk
	choice []choice
}

// Marks returns the marks before the crash, in order; not to be changed.
func (s *State) Marks() []any { return s.gen.marks[:len(s.gen.marks):len(s.gen.marks)] }

// Disk returns what is left of a file of the record: a copy of its own, which may be written to.
func (s *State) Disk(f *File) *Disk { return s.disks[f.index].Clone() }

// String tells which of the operations that were not durable the state kept, lost and tore.
func (s *State) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "crash state %d at point %d", s.Index, s.Point)
	for i, w := range s.gen.window {
		how := "lost"
		switch c := s.choice[i]; {
		case w.kept:
			how = "durable"
		case c.whole:
			how = "kept"
		case c.parts != nil:
			how = "torn, kept blocks" + runs(c.parts)
		}
		fmt.Fprintf(&b, "\n\t#%d %s: %s", w.begin, Op{File: s.gen.files[w.file].name, Kind: w.kind, Off: w.off, N: w.n}, how)
	}
	return b.String()
}

// runs lists the set indices as ranges.
func runs(parts []bool) string {
	var b strings.Builder
	for i := 0; i < len(parts); i++ {
		if !parts[i] {
			continue
		}
		j := i
		for j+1 < len(parts) && parts[j+1] {
			j++
		}
		fmt.Fprintf(&b, " %d-%d", i, j)
		i = j
	}
	return b.String()
}

// choice says what a crash keeps of an operation: all of it, some of its parts, or with the zero value
// nothing.
type choice struct {
	whole bool
	parts []bool // by part, if not whole; nil: none
}

// windowOp is an operation that is not part of the durable base.
type windowOp struct {
	*record
	// kept is set for one that is durable, but behind one of the same file that is not.
	kept bool
	// parts is how many parts a crash may tell apart.
	parts int
	// unit is the length of a part in bytes; the first and the last may be shorter.
	unit int64
}

// part returns the range of part i.
func (w *windowOp) part(i int) (start, end int64) {
	if w.kind == Truncate {
		return w.off, w.off
	}
	first := w.off / w.unit
	return max(w.off, (first+int64(i))*w.unit), min(w.off+w.n, (first+int64(i)+1)*w.unit)
}

// changes reports whether applying [start, end) of the operation would change d.
func (w *windowOp) changes(d *Disk, start, end int64) bool {
	switch w.kind {
	case Write:
		return !d.holds(w.data[start-w.off:end-w.off], start, end-start)
	case Zero:
		return !d.holds(nil, start, end-start)
	case Punch:
		end = min(end, d.size)
		return start < end && !d.holds(nil, start, end-start)
	case Allocate:
		return !d.device && end > d.size
	case Truncate:
		return d.size != w.off
	}
	return false
}

// applyPart carries out [start, end) of the operation on d.
func (w *windowOp) applyPart(d *Disk, start, end int64) {
	o := record{kind: w.kind, off: start, n: end - start}
	if w.kind == Write {
		o.data = w.data[start-w.off : end-w.off]
	}
	o.apply(d)
}

// fileBase is the durable content of one file at the current crash point.
type fileBase struct {
	name string
	disk *Disk
	ops  []*record // all of the file's operations, syncs excluded
	next int       // ops before it are in disk
	// synced is the call of the latest Sync that returned, or -1.
	synced int
	// lost tells for each sector which operation's loss shows there: its index in the window plus 1.
	lost map[int64]int
}

// generator makes the states of one record.
type generator struct {
	opts   Options
	rng    *rand.Rand
	fn     func(*State) error
	files  []*fileBase
	window []windowOp // operations that may be lost, and kept ones behind them, in order of their calls
	free   []int      // indices in window of those that may be lost
	marks  []any
	point  int
	made   int                 // states made at this point beside the ends
	seen   map[uint64]struct{} // contents handed out since the last tightening mark
	stats  Stats
	all    map[uint64]struct{} // contents handed out
}

// States calls fn with states that a crash at any point of the record so far could leave, no content
// twice between two tightening marks, in the order of their points: at each point first the two ends
// (nothing that was not durable, everything), then every subset where there are few, otherwise single
// operations, all but one, tails that lost what came before, one file without the others, and random
// subsets of all densities with torn operations. Except where fewer than two operations are open,
// states beside the ends are left out while less than half are reordered.
//
// The same record, options and random source make the same states. An error of fn ends the generation
// and is returned. Several generations may run at once.
func (r *Recorder) States(rng *rand.Rand, opts Options, fn func(*State) error) (Stats, error) {
	if opts.PerPoint == 0 {
		opts.PerPoint = 16
	}
	if opts.Block == 0 {
		opts.Block = SectorSize
	}
	g := &generator{
		opts: opts, rng: rng, fn: fn,
		seen: make(map[uint64]struct{}),
		all:  make(map[uint64]struct{}),
	}
	return g.run(g.take(r))
}

// take copies what the generation needs of the record, which may go on growing, and returns its events.
func (g *generator) take(r *Recorder) []event {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, f := range r.files {
		g.files = append(g.files, &fileBase{name: f.name, disk: f.base.Clone(), synced: -1, lost: make(map[int64]int)})
	}
	copies := make(map[*record]*record, len(r.ops))
	for _, o := range r.ops {
		c := *o
		copies[o] = &c
		if !c.empty() {
			f := g.files[c.file]
			f.ops = append(f.ops, &c)
		}
	}
	events := slices.Clone(r.events)
	for i := range events {
		if events[i].op != nil {
			events[i].op = copies[events[i].op]
		}
	}
	return events
}

// empty reports whether the operation changes nothing wherever it is applied.
func (o *record) empty() bool { return o.kind == Sync || o.n == 0 && o.kind != Truncate }

// run goes through the crash points.
func (g *generator) run(events []event) (Stats, error) {
	skip := 0
	if g.opts.Every > 1 {
		skip = g.rng.IntN(g.opts.Every)
	}
	for k := 0; k <= len(events); k++ {
		worth := k == 0
		if k > 0 {
			worth = g.step(events[k-1], k-1)
		}
		g.point = k
		if !worth && k != len(events) || k < g.opts.From {
			continue
		}
		if skip > 0 && k != len(events) {
			skip--
			continue
		}
		skip = g.opts.Every - 1
		g.stats.Points++
		if err := g.statesHere(); err != nil {
			if err == errEnough {
				err = nil
			}
			return g.stats, err
		}
	}
	return g.stats, nil
}

// errEnough ends a generation that has made Options.Max states.
var errEnough = fmt.Errorf("enough states")

// step takes one event, at position at, into the state of the generator, and reports whether the crash
// point behind it can have other states, or states that must satisfy more, than the one before.
func (g *generator) step(e event, at int) bool {
	switch {
	case e.op == nil:
		g.marks = append(g.marks, e.mark)
		if g.opts.Tightens != nil && !g.opts.Tightens(e.mark) {
			return false
		}
		clear(g.seen)
		return true
	case e.op.kind == Sync:
		if !e.ret {
			return false
		}
		f := g.files[e.op.file]
		if e.op.begin > f.synced {
			f.synced = e.op.begin
			g.rebase(f, at)
		}
		return false // nothing new is possible; the next mark demands it
	case e.ret || e.op.empty():
		return false
	}
	w := windowOp{record: e.op, parts: 1, unit: SectorSize}
	if e.op.kind != Write {
		w.unit = g.opts.Block
	}
	if e.op.kind != Truncate {
		w.parts = int((e.op.off+e.op.n-1)/w.unit - e.op.off/w.unit + 1)
	}
	g.free = append(g.free, len(g.window))
	g.window = append(g.window, w)
	return true
}

// rebase moves the operations of f that have become durable into its base, as far as none is before
// them that may be lost, and marks the others; at is the position of the event that brought it about.
func (g *generator) rebase(f *fileBase, at int) {
	durable := func(o *record) bool { return o.begin < at && o.ret >= 0 && o.ret < f.synced }
	gone := make(map[*record]bool)
	for ; f.next < len(f.ops) && durable(f.ops[f.next]); f.next++ {
		f.ops[f.next].apply(f.disk)
		gone[f.ops[f.next]] = true
	}
	g.window = slices.DeleteFunc(g.window, func(w windowOp) bool { return gone[w.record] })
	g.free = g.free[:0]
	for i := range g.window {
		w := &g.window[i]
		if g.files[w.file] == f && durable(w.record) {
			w.kept = true
		}
		if !w.kept {
			g.free = append(g.free, i)
		}
	}
}

// statesHere makes the states of the present crash point.
func (g *generator) statesHere() error {
	g.made = 0
	if err := g.emit(g.constant(false), true); err != nil {
		return err
	}
	if len(g.free) == 0 {
		return nil
	}
	if err := g.emit(g.constant(true), true); err != nil {
		return err
	}
	if parts, few := g.totalParts(); few {
		return g.exhaust(parts)
	}
	return g.sample()
}

// constant returns the choice of all or none of the operations that may be lost.
func (g *generator) constant(whole bool) []choice {
	c := make([]choice, len(g.window))
	for i := range c {
		c[i].whole = whole || g.window[i].kept
	}
	return c
}

// totalParts returns the number of parts that may be lost, and whether their subsets are few enough to
// make them all.
func (g *generator) totalParts() (parts int, few bool) {
	for _, i := range g.free {
		parts += g.window[i].parts
		if parts > 20 {
			return 0, false
		}
	}
	return parts, 1<<parts <= g.opts.PerPoint
}

// exhaust makes every subset of the parts that may be lost.
func (g *generator) exhaust(parts int) error {
	for set := 1; set < 1<<parts-1; set++ {
		c := g.constant(false)
		bit := 0
		for _, i := range g.free {
			kept := make([]bool, g.window[i].parts)
			for j := range kept {
				kept[j] = set>>bit&1 != 0
				bit++
			}
			c[i] = pick(kept)
		}
		if err := g.emit(c, true); err != nil {
			return err
		}
	}
	return nil
}

// pick returns the choice of those parts.
func pick(kept []bool) choice {
	switch {
	case !slices.Contains(kept, false):
		return choice{whole: true}
	case !slices.Contains(kept, true):
		return choice{}
	}
	return choice{parts: kept}
}

// sample makes some of the many states of this point.
func (g *generator) sample() error {
	n := len(g.free)
	newest := g.free[n-1]
	budget := g.opts.PerPoint
	// try makes the state and reports whether to go on to the next kind of state.
	try := func(c []choice) error { return g.emit(c, false) }

	single := func(i int) []choice {
		c := g.constant(false)
		c[i].whole = true
		return c
	}
	allBut := func(i int) []choice {
		c := g.constant(true)
		c[i] = choice{}
		return c
	}
	if n > 1 {
		if err := try(single(newest)); err != nil {
			return err
		}
	}
	files := make(map[int]bool)
	for _, i := range g.free {
		files[g.window[i].file] = true
	}
	if len(files) > 1 {
		for f := range g.files {
			if !files[f] {
				continue
			}
			only, without := g.constant(false), g.constant(true)
			for _, i := range g.free {
				if g.window[i].file == f {
					only[i].whole = true
					without[i] = choice{}
				}
			}
			if err := try(only); err != nil {
				return err
			}
			if err := try(without); err != nil {
				return err
			}
		}
	}
	// The latest operations first: with the newest one, their states were not possible before.
	for _, i := range g.some(budget/4 + 1) {
		if err := try(allBut(i)); err != nil {
			return err
		}
	}
	for _, i := range g.some(budget/8 + 1) {
		c := g.constant(false)
		for _, j := range g.free {
			c[j].whole = c[j].whole || j > i
		}
		if err := try(c); err != nil {
			return err
		}
		if err := try(single(i)); err != nil {
			return err
		}
	}
	for tries := 0; tries < 3*budget && g.made < budget; tries++ {
		if err := try(g.random(newest)); err != nil {
			return err
		}
	}
	return nil
}

// some returns up to n of the operations that may be lost: all, or half of them the latest and half at
// random.
func (g *generator) some(n int) []int {
	if n >= len(g.free) {
		return g.free
	}
	latest := n / 2
	at := len(g.free) - latest
	s := slices.Clone(g.free[at:])
	for range n - latest {
		s = append(s, g.free[g.rng.IntN(at)])
	}
	return s
}

// densities are the probabilities with which a random state keeps an operation.
var densities = [...]float64{0.05, 0.2, 0.5, 0.5, 0.8, 0.95}

// random returns a random choice, which mostly keeps something of the newest operation.
func (g *generator) random(newest int) []choice {
	rng := g.rng
	c := g.constant(false)
	density := densities[rng.IntN(len(densities))]
	tear := [...]float64{0, 0, 0.1, 0.5}[rng.IntN(4)]
	for _, i := range g.free {
		p := density
		if i == newest {
			p = max(p, 0.75)
		}
		if rng.Float64() >= p {
			continue
		}
		c[i] = choice{whole: true}
		if g.window[i].parts > 1 && rng.Float64() < tear {
			c[i] = g.torn(g.window[i].parts)
		}
	}
	switch rng.IntN(4) {
	case 0: // everything but what one operation should have done, whole or in part
		i := g.free[rng.IntN(len(g.free))]
		c = g.constant(true)
		c[i] = choice{}
		if g.window[i].parts > 1 && rng.IntN(2) == 0 {
			c[i] = g.torn(g.window[i].parts)
		}
	case 1: // two operations differ from the rest
		i, j := g.free[rng.IntN(len(g.free))], g.free[rng.IntN(len(g.free))]
		whole := rng.IntN(2) == 0
		c = g.constant(whole)
		c[i], c[j] = choice{whole: !whole}, choice{whole: !whole}
	}
	return c
}

// torn returns a choice of some of n parts: the first, the last, all but one, one alone, or any.
func (g *generator) torn(n int) choice {
	kept := make([]bool, n)
	at := g.rng.IntN(n)
	style := g.rng.IntN(5)
	for i := range kept {
		switch style {
		case 0:
			kept[i] = i < at
		case 1:
			kept[i] = i >= at
		case 2:
			kept[i] = i != at
		case 3:
			kept[i] = i == at
		default:
			kept[i] = g.rng.IntN(2) == 0
		}
	}
	return pick(kept)
}

// emit builds the state of a choice and hands it out if it is new. Unless always is set, it may leave
// the state out for the share of the reordered ones.
func (g *generator) emit(c []choice, always bool) error {
	s := &State{Point: g.point, gen: g, choice: c, disks: make([]*Disk, len(g.files))}
	lost, changed := g.build(s)
	s.Reordered = lost < changed
	if !always {
		if g.made >= g.opts.PerPoint {
			return nil
		}
		if !s.Reordered && len(g.free) > 1 && 2*g.stats.Reordered < g.stats.States+1 {
			return nil
		}
	}
	var content uint64
	for i, d := range s.disks {
		content ^= mix(d.contentHash() + uint64(i)*0x9e3779b97f4a7c15)
	}
	if _, ok := g.seen[content]; ok {
		return nil
	}
	g.seen[content] = struct{}{}
	g.all[content] = struct{}{}
	s.Index = g.stats.States
	g.stats.States++
	g.stats.Distinct = len(g.all)
	if s.Reordered {
		g.stats.Reordered++
	}
	if s.Torn {
		g.stats.Torn++
	}
	g.made++
	if err := g.fn(s); err != nil {
		return err
	}
	if g.opts.Max > 0 && g.stats.States >= g.opts.Max {
		return errEnough
	}
	return nil
}

// build makes the disks of a state. It returns the first operation of which something is lost that
// nothing later hides, and the last one that changed something; with nothing lost, the first is beyond
// every other.
func (g *generator) build(s *State) (lost, changed int) {
	for i := range g.window {
		if f := g.window[i].file; s.disks[f] == nil {
			s.disks[f] = g.files[f].disk.Clone()
		}
	}
	for i, d := range s.disks {
		if d == nil {
			s.disks[i] = g.files[i].disk // nothing to apply: nobody writes to it
		}
	}
	lostSize := len(g.window)
	changed = -1
	for i := range g.window {
		w, c := &g.window[i], s.choice[i]
		f, d := g.files[w.file], s.disks[w.file]
		if c.whole {
			if w.changes(d, w.off, w.off+w.n) {
				changed = i
				w.applyPart(d, w.off, w.off+w.n)
				g.hide(f, w.off, w.off+w.n)
			}
			continue
		}
		s.Torn = s.Torn || c.parts != nil
		for j := range w.parts {
			start, end := w.part(j)
			if !w.changes(d, start, end) {
				continue
			}
			switch {
			case c.parts != nil && c.parts[j]:
				changed = i
				w.applyPart(d, start, end)
				g.hide(f, start, end)
			case w.kind == Truncate || w.kind == Allocate:
				lostSize = min(lostSize, i)
			default:
				for at := start / SectorSize; at*SectorSize < end; at++ {
					f.lost[at] = i + 1
				}
			}
		}
	}
	lost = lostSize
	for _, f := range g.files {
		for _, i := range f.lost {
			lost = min(lost, i-1)
		}
		clear(f.lost)
	}
	return lost, changed
}

// hide notes that what [start, end) of the file covers no longer shows what was lost there.
func (g *generator) hide(f *fileBase, start, end int64) {
	if len(f.lost) == 0 {
		return
	}
	for at := start / SectorSize; at*SectorSize < end; at++ {
		if i := f.lost[at]; i > 0 {
			w := &g.window[i-1]
			if start <= max(w.off, at*SectorSize) && min(w.off+w.n, (at+1)*SectorSize) <= end {
				delete(f.lost, at)
			}
		}
	}
}
