package qcow2

import (
	"errors"
	"fmt"
	"sync"

	"github.com/go-qcow2/qcow2/internal/codec"
)

// codecType returns the codec of the image's compression type.
func (c CompressionType) codecType() codec.Type {
	if c == CompressionZstd {
		return codec.Zstd
	}
	return codec.Deflate
}

// readCompressed reads the part of a compressed cluster that lies at guestOff into p. Of a part, the whole
// cluster is unpacked and kept, as what lies beside it is often read next.
func (img *Image) readCompressed(p []byte, guestOff uint64, x extent) error {
	m := img.m
	index := guestOff >> m.clusterBits
	in := m.offsetInCluster(guestOff)
	if uint64(len(p)) == m.clusterSize {
		return img.unpack(p, guestOff, x) // who reads it whole is not going to read a part of it next
	}
	if img.decoded.copyTo(p, index, x.word, in) {
		return nil
	}
	out := getBuffer(m.clusterSize)
	defer putBuffer(out)
	if err := img.unpack(*out, m.clusterStart(guestOff), x); err != nil {
		return err
	}
	copy(p, (*out)[in:])
	img.decoded.add(*out, index, x.word)
	return nil
}

// unpack unpacks the compressed cluster at guestOff into p, which is one cluster.
func (img *Image) unpack(p []byte, guestOff uint64, x extent) error {
	off, n := img.m.compressed(x.word)
	payload := getBuffer(n)
	defer putBuffer(payload)
	if err := img.m.h.readFull(*payload, off); err != nil {
		return err
	}
	if err := codec.Decompress(p, *payload, img.codec); err != nil {
		return &CorruptError{What: "compressed cluster", HostOff: int64(off), GuestOff: int64(guestOff), Err: err}
	}
	return nil
}

// decodeCache keeps the last unpacked clusters of an image. A cluster is found by guest cluster index and
// L2 word together. That alone would not do: once the cluster is replaced and its place reused, the same
// word may name other content; so a cluster is dropped just before it is mapped to a compressed place.
// Nobody adds the place's earlier content after that, because who read that is a request during which the
// place is not reused (I4). To drop it when it loses its entry saves memory, and would not suffice: a
// request that read the old content may add it later.
type decodeCache struct {
	mu      sync.Mutex
	entries [decodeEntries]decodedCluster
	clock   uint64
}

// decodeEntries is the number of unpacked clusters that are kept: a few sequential readers' worth.
const decodeEntries = 4

// decodedCluster is an unpacked cluster; data is nil where there is none.
type decodedCluster struct {
	index, word uint64
	data        []byte
	used        uint64
}

// copyTo copies the bytes from in on to p if the cluster is cached.
func (c *decodeCache) copyTo(p []byte, index, word, in uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.entries {
		if e := &c.entries[i]; e.data != nil && e.index == index && e.word == word {
			c.clock++
			e.used = c.clock
			copy(p, e.data[in:])
			return true
		}
	}
	return false
}

// add keeps a copy of data.
func (c *decodeCache) add(data []byte, index, word uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	victim := &c.entries[0]
	for i := range c.entries {
		e := &c.entries[i]
		if e.data != nil && e.index == index {
			victim = e
			break
		}
		if e.used < victim.used {
			victim = e
		}
	}
	c.clock++
	*victim = decodedCluster{index: index, word: word, data: append(victim.data[:0], data...), used: c.clock}
}

// drop forgets a guest cluster.
func (c *decodeCache) drop(index uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.entries {
		if e := &c.entries[i]; e.index == index {
			e.data, e.used = nil, 0
		}
	}
}

// forget forgets all clusters. No request that unpacked one is in flight.
func (c *decodeCache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.entries[:])
}

// WriteCompressed writes p at guest offset off in compressed clusters. off is a multiple of the cluster
// size, and so is len(p), unless the range ends at the end of the disk: the last cluster is padded with
// zeros. What the clusters held before is replaced. A cluster that does not shrink is stored plain.
//
// It may run beside any other call. What it wrote is durable after the next Sync. Each cluster that shrinks is
// replaced whole or not at all; one that does not is written as WriteAt does. On an error the image holds the
// clusters before the failing one.
//
// Errors: *OptionError for a range that is not aligned, ErrUnsupported for an image with an external data
// file, and those of WriteAt. qcow2 spec, "Compressed Clusters Descriptor".
func (img *Image) WriteCompressed(p []byte, off int64) error {
	if err := img.checkRange(off, int64(len(p))); err != nil {
		return opError("write compressed", off, len(p), err)
	}
	if err := img.writeCompressed(p, uint64(off)); err != nil {
		return opError("write compressed", off, len(p), err)
	}
	return nil
}

// writeCompressed is WriteCompressed after the checks of WriteAt.
func (img *Image) writeCompressed(p []byte, off uint64) error {
	m := img.m
	end := off + uint64(len(p))
	switch {
	case m.external:
		return fmt.Errorf("%w: compressed clusters with an external data file", ErrUnsupported)
	case m.offsetInCluster(off) != 0:
		return &OptionError{Option: "off", Value: off, Reason: fmt.Sprintf("is not a multiple of the cluster size %d", m.clusterSize)}
	case m.offsetInCluster(end) != 0 && end != img.size.Load():
		return &OptionError{Option: "off+len(p)", Value: end, Reason: fmt.Sprintf("is neither a multiple of the cluster size %d nor the end of the disk", m.clusterSize)}
	}
	packed := getBuffer(m.clusterSize)
	defer putBuffer(packed)
	for len(p) > 0 {
		part := p[:min(uint64(len(p)), m.clusterSize)]
		if err := img.writePacked(part, off, *packed); err != nil {
			return err
		}
		p, off = p[len(part):], off+uint64(len(part))
	}
	return img.relieve()
}

// writePacked writes one cluster, or the disk's last part of one, compressed. packed is a buffer of one
// cluster.
func (img *Image) writePacked(part []byte, off uint64, packed []byte) error {
	m := img.m
	whole := part
	if uint64(len(part)) < m.clusterSize {
		padded := getBuffer(m.clusterSize)
		defer putBuffer(padded)
		clear((*padded)[copy(*padded, part):])
		whole = *padded
	}
	n, ok, err := codec.Compress(packed, whole, img.codec)
	if err != nil {
		return err
	}
	for ok {
		seen := m.alloc.released.Load()
		err := img.linkPacked(packed[:n], off)
		if err == errNotPackable {
			break
		}
		if isNoSpace(err) && img.reclaim(seen) {
			continue
		}
		return err
	}
	_, err = img.write(part, off)
	return err
}

// errNotPackable says that no compressed descriptor can name the place that was found.
var errNotPackable = errors.New("host offset too large for a compressed cluster")

// linkPacked stores the payload of the guest cluster at off. The order is that of writeNew: refcounts in
// memory, payload on the host, then the L2 entry.
func (img *Image) linkPacked(payload []byte, off uint64) error {
	m := img.m
	held := clusterRange{first: off >> m.clusterBits, last: off >> m.clusterBits}
	img.reqs.lock(&held)
	defer img.reqs.unlock(&held)
	defer img.reqs.leave(img.reqs.enter())
	if err := img.writableAt(off, 1); err != nil {
		return err
	}
	entries, err := m.entries(off, 1)
	if err != nil {
		return err
	}
	hostOff, err := img.takePacked(entries, off, uint64(len(payload)))
	if err != nil {
		return err
	}
	e := l2Entry{word: m.compressedWord(hostOff, uint64(len(payload)))}
	err = m.h.writeData(off, payload, hostOff)
	if err == nil {
		err = m.update(off, img.flush, func(words []uint64, i uint64) {
			img.decoded.drop(off >> m.clusterBits) // see decodeCache
			m.setEntry(words, i, e)
			img.dropReferences(entries, off)
		})
	}
	if err != nil {
		img.returnClusters(m.held(e))
	}
	return err
}

// takePacked allocates n bytes for a compressed cluster that replaces entries, at guest offset off.
func (img *Image) takePacked(entries []l2Entry, off, n uint64) (uint64, error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	return img.takePackedLocked(entries, off, n)
}

// takePackedLocked is takePacked. Precondition: mu.
func (img *Image) takePackedLocked(entries []l2Entry, off, n uint64) (uint64, error) {
	m := img.m
	if err := img.checkDisplaced(entries, off); err != nil {
		return 0, err
	}
	if _, err := m.ownL2(off); err != nil {
		return 0, err
	}
	hostOff, err := m.alloc.pack(n)
	if err != nil {
		return 0, fmt.Errorf("allocate %d bytes: %w", n, err)
	}
	if hostOff+n > 1<<m.csizeShift {
		first := hostOff >> m.clusterBits
		m.alloc.undo(clusterRun{first: first, n: (hostOff+n-1)>>m.clusterBits - first + 1})
		return 0, errNotPackable
	}
	return hostOff, nil
}
