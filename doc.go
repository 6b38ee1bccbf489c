// Package qcow2 opens, creates, reads and writes QEMU copy-on-write (qcow2) disk images.
//
// An Image is a block device behind io.ReaderAt and io.WriterAt:
//
//	img, err := qcow2.Create("disk.qcow2", 20<<30, nil)
//	...
//	_, err = img.WriteAt(p, 1<<20)
//	...
//	err = img.Sync()  // durable
//	...
//	err = img.Close()
//
// It reads what QEMU writes, and QEMU reads, and checks clean, what it writes. It is pure Go, starts no
// process, has no global state and logs nothing.
//
// Words are those of the specification (docs/interop/qcow2 of QEMU): a guest offset is a place on the virtual
// disk, a host offset one in the image file; clusters, L1 and L2 tables, refcount table and blocks, COPIED,
// subclusters, backing and data files are what it calls so.
//
// # Concurrency
//
// All methods of Image may be called from any number of goroutines. Reads, and writes to clusters that are
// mapped already, take no lock where the table slice that maps them is cached, and do not wait for each other; a
// write that allocates holds its own guest clusters only while it does I/O. Overlapping writes are ordered cluster by cluster, and inside a cluster as
// the storage orders its own.
//
// Locks, outermost first:
//
//	requests            the guest clusters that a request holds (requests.go); all of them, for an operation on the
//	                    image as a whole (exclusive.go)
//	  writeback.mu        who writes back (writeback.go); not held during I/O
//	  Image.startMu       the marking of bitmaps before the first write
//	  Image.mu            the metadata lock: L1 table, allocator, and the order of L2 changes
//	    tableCache.mu       which slices are cached, dirty or part of a cut (cache.go)
//	      decodeCache.mu      the last unpacked clusters (compress.go)
//	    Image.featureMu     the dirty and the corrupt bit of the header (guard.go)
//	overlapList.mu      where the metadata is (overlap.go); hostFile.failMu, the first failed sync; requests.mu, who
//	                    waits for whom: nothing is locked inside
//
// Each field says beside it which of them guards it.
//
// # Durability
//
// What a call wrote is durable after the next successful Sync or Close that began after the call returned.
// Whatever happens in between, a crash of the host included, the image stays consistent: at worst clusters are
// leaked. A byte that was synced and not written since reads back; one that was written since reads old or
// new. The order of host writes behind this is told at the type writeback.
//
// The crash model: a successful Sync of a file keeps every earlier operation on it; of later ones any subset
// survives, in 512-byte sectors.
//
// With lazy refcounts, the header's dirty bit is set while refcounts on disk may be stale; an image that was
// not closed then is repaired by the next open for writing, or refused with ErrDirty (OpenOptions.Repair).
//
// # Checking
//
// Image.Check finds what is wrong with the metadata of an image, and repairs it. A host write that would hit
// metadata, because an image is damaged or was made to lead it there, is refused, and marks the image as corrupt
// (OpenOptions.OverlapCheck).
//
// # Errors
//
// A full host, or a write that fails, fails the call and changes nothing else; it may be tried again. A failed
// host sync is final, because what it lost is unknown: later writes and syncs return ErrFailed, reads go on.
// Sentinels (ErrCorrupt, ErrReadOnly, ErrLocked, ...) are for errors.Is; CorruptError, HeaderError,
// OptionError, LimitError, FileRequiredError and ResolveError carry the details.
//
// # Untrusted images
//
// The defaults are safe for a file from a stranger. Open opens no other file: a backing or data file that the
// image names is reached only by a Resolver, or handed in by the caller. Formats are never probed. Nothing is
// allocated from a claim of the image before a limit bounds it (Limits), a table that the file does not hold
// costs nothing, and a malformed image gives an error. Inspect tells what an image is, and which files it wants,
// from its first cluster alone. The same holds for images of other formats (OpenForeign), but that DetectForeign guesses a
// format for who asks.
package qcow2
