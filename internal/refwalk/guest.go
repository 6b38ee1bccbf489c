package refwalk

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Source is an image whose guest content is to be read.
type Source struct {
	// Image is the image file, of Size bytes.
	Image io.ReaderAt
	Size  int64
	// Data is the external data file, if the image has one; past its end are zeros.
	Data io.ReaderAt
	// Backing fills p with what the backing file's guest reads at off, zeros past its end. With nil, the
	// range reads as zeros in an image without a backing file, and fails in one with.
	Backing func(p []byte, off int64) error
	// Snapshot is the number of an internal snapshot, counted from 1 in the order of the table. 0: the
	// active content.
	Snapshot int
}

// Reader reads the guest content of an image, straight from its bytes: nothing is cached but the last
// L2 table and the last compressed cluster. It is not safe for concurrent use. Encrypted images are
// refused.
type Reader struct {
	Source
	*Header
	file file
	size int64
	l1   []byte // the part of the L1 table that lies within the file

	l2Off uint64 // host offset of l2; 0: none
	l2    []byte

	packed   uint64 // compressed entry of unpacked; 0: none
	unpacked []byte
}

// errEncrypted is matched by the refusal of an encrypted image.
var errEncrypted = errors.New("refwalk: encrypted image")

// NewReader returns a reader of the content.
func NewReader(src Source) (*Reader, error) {
	h, err := ParseHeader(src.Image, src.Size)
	if err != nil {
		return nil, err
	}
	r := &Reader{
		Source: src,
		Header: h,
		file:   file{r: src.Image, size: src.Size},
		l2:     make([]byte, h.clusterSize()),
	}
	if h.CryptMethod != 0 {
		return nil, errEncrypted
	}
	l1Off, l1Entries, size := h.L1Off, h.L1Entries, h.VirtualSize
	if src.Snapshot > 0 {
		list, _, err := h.readSnapshots(&r.file)
		if err != nil {
			return nil, err
		}
		if src.Snapshot > len(list) {
			return nil, fmt.Errorf("refwalk: snapshot %d of %d", src.Snapshot, len(list))
		}
		s := list[src.Snapshot-1]
		if uint64(s.L1Entries)*8 > maxTable || s.L1Off >= 1<<62 {
			return nil, fmt.Errorf("refwalk: snapshot %d: L1 table of %d entries at %#x", src.Snapshot, s.L1Entries, s.L1Off)
		}
		l1Off, l1Entries, size = s.L1Off, s.L1Entries, s.DiskSize
	}
	r.size = int64(size &^ 511)
	r.l1, err = r.file.clipped(int64(l1Off), int64(l1Entries)*8)
	return r, err
}

// ReadGuest returns the whole guest content. A disk of more than 1 GiB is an error.
func ReadGuest(src Source) ([]byte, error) {
	r, err := NewReader(src)
	if err != nil {
		return nil, err
	}
	if r.size > 1<<30 {
		return nil, fmt.Errorf("refwalk: a disk of %#x bytes is too long", r.size)
	}
	p := make([]byte, r.size)
	_, err = r.ReadAt(p, 0)
	return p, err
}

// Size returns the length of the disk: the virtual size without what is short of a sector.
func (r *Reader) Size() int64 { return r.size }

// ReadAt is io.ReaderAt on the guest's disk. An entry that the format forbids is an error.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > r.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), r.size-off))
	for done := 0; done < n; {
		at := off + int64(done)
		in := at & (r.clusterSize() - 1)
		m := min(n-done, int(r.clusterSize()-in))
		if err := r.readCluster(p[done:done+m], at, in); err != nil {
			return done, fmt.Errorf("refwalk: read guest %#x: %w", at, err)
		}
		done += m
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// readCluster fills p from guest offset at, which is in bytes into its cluster; p ends in it.
func (r *Reader) readCluster(p []byte, at, in int64) error {
	e, sub, err := r.entry(at)
	if err != nil {
		return err
	}
	if e&flagCompressed != 0 {
		if r.DataFile() {
			return fmt.Errorf("entry %#x: compressed with a data file", e)
		}
		if err := r.unpack(e); err != nil {
			return fmt.Errorf("entry %#x: %w", e, err)
		}
		copy(p, r.unpacked[in:])
		return nil
	}
	host := e & offsetMask
	present := host != 0 || r.DataFile() && e&flagCopied != 0
	if host&uint64(r.clusterSize()-1) != 0 {
		return fmt.Errorf("entry %#x: misaligned", e)
	}
	if !r.ExtendedL2() {
		return r.fill(p, at, int64(host)+in, present && e&1 == 0, e&1 != 0)
	}
	alloc, zero := subclusterBits(sub)
	if alloc&zero != 0 || alloc != 0 && !present {
		return fmt.Errorf("entry %#x, %#x: contradictory subclusters", e, sub)
	}
	subSize := r.clusterSize() / 32
	for done := int64(0); done < int64(len(p)); {
		i := uint((in + done) / subSize)
		// A run of equal bits in both halves ends where the shorter of the two does.
		run := int64(min(runLength(alloc, i, 32), runLength(zero, i, 32)))
		m := min((int64(i)+run)*subSize-in-done, int64(len(p))-done)
		err := r.fill(p[done:done+m], at+done, int64(host)+in+done, alloc>>i&1 != 0, zero>>i&1 != 0)
		if err != nil {
			return err
		}
		done += m
	}
	return nil
}

// fill fills p from the host file, the data file, zeros, or what is behind.
func (r *Reader) fill(p []byte, at, host int64, data, zero bool) error {
	switch {
	case data && r.DataFile():
		if r.Data == nil {
			return errors.New("no data file given")
		}
		n, err := r.Data.ReadAt(p, host)
		if n < len(p) && err != io.EOF {
			return err
		}
		clear(p[n:])
		return nil
	case data:
		return r.file.read(p, host)
	case zero || r.Backing == nil && r.BackingName == "":
		clear(p)
		return nil
	case r.Backing == nil:
		return errors.New("no backing file given")
	}
	return r.Backing(p, at)
}

// entry returns the L2 entry of guest offset at, and its subclusters.
func (r *Reader) entry(at int64) (e, sub uint64, err error) {
	size := r.l2EntrySize()
	perTable := r.clusterSize() / size
	i := at >> r.ClusterBits
	l1Index, l2Index := i/perTable, i%perTable
	if l1Index*8+8 > int64(len(r.l1)) {
		return 0, 0, nil
	}
	be := binary.BigEndian
	off := be.Uint64(r.l1[l1Index*8:]) & offsetMask
	if off == 0 {
		return 0, 0, nil
	}
	if off&uint64(r.clusterSize()-1) != 0 {
		return 0, 0, fmt.Errorf("L1 entry %d: misaligned L2 table at %#x", l1Index, off)
	}
	if off != r.l2Off {
		r.l2Off = 0
		if err := r.file.read(r.l2, int64(off)); err != nil {
			return 0, 0, err
		}
		r.l2Off = off
	}
	b := r.l2[l2Index*size:]
	e = be.Uint64(b)
	if size == 16 {
		sub = be.Uint64(b[8:])
	}
	return e, sub, nil
}

// zstdDecoders are decoders that nobody uses: one costs more than the clusters of a test.
var zstdDecoders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
	if err != nil {
		return err
	}
	return d
}}

// unpack makes unpacked the content of the compressed entry e: one cluster, of what follows in the last
// sector nothing. qcow2 spec, "Compressed Clusters Descriptor".
func (r *Reader) unpack(e uint64) error {
	if r.packed == e {
		return nil
	}
	r.packed = 0
	off, n := r.compressedRange(e)
	payload, err := r.file.padded(int64(off), n)
	if err != nil {
		return err
	}
	if r.unpacked == nil {
		r.unpacked = make([]byte, r.clusterSize())
	}
	var stream io.Reader
	if r.Zstd {
		d, ok := zstdDecoders.Get().(*zstd.Decoder)
		if !ok {
			return errors.New("no zstd decoder")
		}
		defer func() {
			if d.Reset(nil) == nil {
				zstdDecoders.Put(d)
			}
		}()
		if err := d.Reset(bytes.NewReader(payload)); err != nil {
			return err
		}
		stream = d
	} else {
		stream = flate.NewReader(bytes.NewReader(payload))
	}
	if _, err := io.ReadFull(stream, r.unpacked); err != nil {
		return fmt.Errorf("decompress %#x bytes at host %#x: %w", n, off, err)
	}
	r.packed = e
	return nil
}
