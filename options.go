package qcow2

// LockMode says which image lock an open takes, where the host has such locks (Linux).
type LockMode int

const (
	// LockDefault locks as QEMU does: readers share, a writer excludes everybody else. Where the host
	// or its file system has no such locks, the image is opened unlocked and Info.Locked is false.
	LockDefault LockMode = iota
	// LockShare opens for reading beside a writer (qemu-img's -U). What is read may be inconsistent.
	LockShare
	// LockOff takes no lock and respects none.
	LockOff
)

// RepairMode says what a writable open does about an image whose refcounts are not to be relied on: its dirty bit
// is set, or its header has no refcount, as in files of some old writers.
type RepairMode int

const (
	// RepairDefault repairs such an image, as Check with RepairAll does; it returns ErrDirty if that fails or
	// leaves more than leaks.
	RepairDefault RepairMode = iota
	// RepairNever returns ErrDirty.
	RepairNever
)

// DiscardMode says which space that an image frees goes back to the host file system, by punching holes. It does so
// once the change that freed it is durable: with the next Sync, or Close.
type DiscardMode int

const (
	// DiscardDefault gives back what Discard, WriteZeroes with ZeroMayUnmap and the deletion of snapshots free.
	// What is freed otherwise, by rewriting a shared or compressed cluster, or by a table that moves, is kept
	// for the next allocation. QEMU does the same by default for a disk with discard=unmap.
	DiscardDefault DiscardMode = iota
	// DiscardAll gives back all that is freed.
	DiscardAll
	// DiscardNever gives nothing back: freed clusters stay in the file, for the next allocation.
	DiscardNever
)

// passes reports whether clusters that were dropped for the cause are punched.
func (d DiscardMode) passes(cause dropCause) bool {
	return d == DiscardAll || d == DiscardDefault && cause != dropOther
}

// OpenOptions says how an image is opened. The nil pointer and the zero value open for reading, safe
// for a file from a stranger: no other file is opened.
type OpenOptions struct {
	// ReadWrite opens for writing. Default: read-only.
	ReadWrite bool
	// Repair says what a writable open does about an image whose refcounts are stale.
	Repair RepairMode
	// CheckOnly opens the image for Check and Info alone, with ReadWrite for a repair: no other file is opened,
	// and what makes other opens fail and Check can judge is let pass: the dirty and the corrupt bit,
	// encryption, broken refcounts, snapshot tables and bitmaps. Everything else returns ErrCheckOnly.
	CheckOnly bool
	// NoBacking opens an overlay without its backing file: reads of what the overlay does not hold
	// return ErrBackingRequired. For information, checks and an unsafe rebase.
	NoBacking bool
	// Backing supplies the backing disk, whatever the header names. The caller closes it, after the
	// image. The header's name is not resolved. An image that names no backing file takes it too, as a
	// throw-away overlay does; whoever opens it otherwise sees zeros there.
	Backing Disk
	// BackingFormat overrides the format that the header gives for its backing file: "qcow2", "raw", or a ForeignFormat.
	BackingFormat string
	// DataFile supplies the external data file. The caller closes it, after the image.
	DataFile Storage
	// Resolver is asked for every file that the image, or one below it in the chain, names. Default:
	// nil, with which such an image is refused with a *FileRequiredError.
	Resolver Resolver
	// Name is the image's own name for the Resolver and messages; Open sets it to the file's name.
	Name string
	// Lock says which lock is taken. Open and a Resolver's storages are locked; a storage that the
	// caller passes in is locked too, unless LockOff.
	Lock LockMode
	// Discard says which freed space the host file gives back to its file system. Default: what Discard,
	// WriteZeroes and the deletion of snapshots free. A host that cannot punch holes keeps it.
	Discard DiscardMode
	// DiscardNoUnref has Discard and WriteZeroes keep plain clusters allocated, as clusters that read as zeros,
	// so that the image does not fragment when the guest writes them again; their host space is punched as Discard
	// says. Compressed clusters are freed all the same. It needs a version 3 image.
	DiscardNoUnref bool
	// NoSync turns host syncs off: Sync then only writes back. For test harnesses; a crash may leave
	// anything.
	NoSync bool
	// OverlapCheck says which metadata every host write of a writable image is checked against. A write that
	// would hit some is not made: the image is marked as corrupt on disk and takes no more writes, which
	// return an error that matches ErrCorrupt. Default: everything is checked.
	OverlapCheck OverlapCheck
	// OnCorrupt is called once, when that happens, with what would have been hit and where; from the goroutine
	// whose write it was. It must not call the image.
	OnCorrupt func(*CorruptError)
	// Limits bounds what an image may ask for. Nil: the default of each.
	Limits *Limits
	// L2CacheBytes bounds the memory for L2 slices of the whole chain. Default 32 MiB, minimum two
	// slices, maximum 16 GiB.
	L2CacheBytes int64
	// RefcountCacheBytes bounds the memory for refcount block slices. Default 1 MiB, minimum two slices,
	// maximum 16 GiB.
	RefcountCacheBytes int64

	test testHooks // breaks orderings on purpose, for the crash tests
}

// Limits bounds what an image may make the library do. A zero field has its default.
type Limits struct {
	// MetadataBytes bounds the memory for tables at open, in bytes, of one image, and, besides, that for the
	// list of its metadata (OpenOptions.OverlapCheck), which becomes slower then. Default 64 MiB.
	MetadataBytes int64
	// ChainDepth bounds the number of images in a chain. Default 32.
	ChainDepth int
	// Snapshots bounds the number of internal snapshots. Default 65536, the format's own bound.
	Snapshots int
	// VirtualSize bounds the size of the disk in bytes. Default: none but the format's.
	VirtualSize int64
}

// CompressionType is how compressed clusters are packed: the header's field compression_type.
type CompressionType uint8

const (
	CompressionDeflate CompressionType = 0 // raw deflate; called zlib by QEMU
	CompressionZstd    CompressionType = 1
)

// String returns QEMU's name of the compression type.
func (c CompressionType) String() string {
	switch c {
	case CompressionDeflate:
		return "zlib"
	case CompressionZstd:
		return "zstd"
	}
	return "unknown"
}

// CreateOptions says what image is created. The nil pointer and the zero value give what every stack
// accepts: version 3, 64 KiB clusters, 16-bit refcounts, deflate, no extended L2.
type CreateOptions struct {
	// Version is 2 or 3. Default 3.
	Version int
	// ClusterSize in bytes is a power of two from 512 B to 2 MiB. Default 64 KiB.
	ClusterSize int
	// RefcountBits is the width of a refcount: 1, 2, 4, ... 64. Default 16, the only one of version 2.
	RefcountBits int
	// BackingFile and BackingFormat are the name and format ("qcow2", "raw", ...) that the header gives
	// for the backing file; the format is required with the name. The file is opened only if
	// Open.Resolver or Open.Backing is given; without, the new image is open as with Open.NoBacking:
	// reads, and writes of parts of clusters, return ErrBackingRequired.
	BackingFile   string
	BackingFormat string
	// DataFile is the name of the external data file that the header gives. The storage itself comes
	// from Open.DataFile or Open.Resolver. A relative name counts from the directory of the image, as that of
	// a backing file does; QEMU 7.2 takes it from its working directory.
	DataFile string
	// DataFileRaw says that the data file alone must always read as the disk.
	DataFileRaw bool
	// ExtendedL2 divides each cluster into 32 subclusters. Clusters are then at least 16 KiB.
	ExtendedL2 bool
	// Compression is the type of compressed clusters.
	Compression CompressionType
	// LazyRefcounts lets refcounts lag behind on disk, with the dirty bit set: fewer writes, and a
	// repair after a crash.
	LazyRefcounts bool
	// Preallocation maps all of the disk from the start. With a backing file it needs ExtendedL2: the
	// clusters have their place then, and show the backing file until they are written. An image whose data
	// file is raw is mapped as with PreallocationMetadata at least.
	Preallocation Preallocation
	// Overwrite lets Create replace an existing file, and CreateStorage a storage that is not empty.
	Overwrite bool
	// Open says how the new image is opened: ReadWrite is implied.
	Open *OpenOptions
}

// FileKind is the part that another file plays for an image.
type FileKind int

const (
	KindBacking FileKind = iota // a backing file, opened for reading, and by Commit for writing
	KindData                    // an external data file
)

// String returns "backing file" or "data file".
func (k FileKind) String() string {
	if k == KindData {
		return "data file"
	}
	return "backing file"
}

// FileRef is a file that an image names.
type FileRef struct {
	Image    string   // name of the image that holds the reference
	Name     string   // the file's name as it stands in the image: untrusted
	Format   string   // its format as far as the image or the options tell: "qcow2", "raw", a ForeignFormat or ""
	Kind     FileKind // what it is for
	Writable bool     // whether writing is wanted: data files of a writable image, the backing file that Commit writes
}

// Resolver opens the files that images name. It is the only way by which an image can reach another
// file. The library closes the storage.
type Resolver interface {
	Resolve(ref FileRef) (Storage, error)
}

// ResolverFunc is a function that is a Resolver.
type ResolverFunc func(ref FileRef) (Storage, error)

// Resolve calls the function.
func (f ResolverFunc) Resolve(ref FileRef) (Storage, error) { return f(ref) }
