package qcow2

// testHooks breaks one ordering each on purpose. The crash tests set them, to show that the harness sees
// what each ordering is for; nothing else does.
type testHooks struct {
	skipDataSync     bool // write mappings before data is durable: breaks I2
	refcountsLast    bool // write mappings before refcounts: breaks I1
	pointerFirst     bool // write an L1 entry before its L2 table is durable: breaks I3
	hookFirst        bool // write a refcount table entry before its block is durable: breaks I3
	headerFirst      bool // switch the header before the refcount table is durable: breaks I3
	reuseImmediately bool // hand out clusters whose drop is not durable: breaks I4
	punchEarly       bool // punch clusters before their drop is durable: breaks I4
	punchLate        bool // punch clusters after they were released: breaks I4

	growSwitchFirst bool // switch to the larger disk before its tables, and its zeros, are durable: breaks I3, I2
	shrinkDropFirst bool // drop what a shrink loses before the smaller size is durable: breaks I4
	entriesLast     bool // lower counts and cut the file of a shrink before entries are cleared: breaks I1, I3
	tailLast        bool // make what stands behind the old end zeros after the switch: breaks I4

	repairSkip  repairSync  // the sync of a repair that is left out
	amendSkip   amendSync   // the sync of a header rewrite, Rebase or Amend that is left out
	emptyOrder  emptyOrder  // the ordering of MakeEmpty or Commit that is broken
	inPlaceSkip inPlaceSync // the sync of a conversion in place that is left out

	snapshotSkip snapshotSyncs // the syncs of operations on snapshots that are left out
	keepCopied   bool          // leave COPIED in the tables of a snapshot that is applied: breaks I7
}

// snapshotSyncs is a set of places in operations on snapshots where what was written must be durable before what
// follows.
type snapshotSyncs int

const (
	snapshotSyncBeside snapshotSyncs = 1 << iota // new tables, and COPIED off: before counts are raised, else I7
	snapshotSyncRaise                            // raised counts, before the header names who they are for: else I1
	snapshotSyncSwitch                           // the header, before counts are lowered of what it named: else I1
	snapshotSyncLower                            // lowered counts, before COPIED says that they are one: else I7
	snapshotLowerFirst                           // not a sync: counts are lowered before the header changes
)

// repairSync is a place in a repair where what was written must be durable before what follows.
type repairSync int

const (
	repairSyncNone   repairSync = iota
	repairSyncClear             // COPIED off, before counts are raised above one: else I7
	repairSyncTable             // new refcount structures, before the header names them: else I3
	repairSyncCopies            // copies of tables, before anything names them: else I3
	repairSyncMend              // entries, before the counts of what they named are lowered: else I1
	repairSyncLower             // lowered counts, before COPIED says that they are one: else I7
	repairSyncOther             // any other
)

// amendSync is a place in a header rewrite, a Rebase or an Amend where what was written must be durable before what
// follows.
type amendSync int

const (
	amendSyncNone      amendSync = iota
	amendSyncHeader              // what stands behind the first sector, before that sector: else I3
	amendSyncCopy                // what a Rebase copied, before the header names another backing file: else I5
	amendSyncRefcounts           // new refcount structures, before the header names them: else I3
	amendSyncSnapshots           // a new snapshot table, before the header names it: else I3
	amendSyncZeros               // zeros and their refcounts, before entries name them: else I1
)

// early reports whether a pointer is to be written before what it points at is durable.
func (t *testHooks) early() bool { return t.pointerFirst || t.hookFirst || t.headerFirst }
