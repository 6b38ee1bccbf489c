package crashtest

import (
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"sync"
	"syscall"
)

const (
	// pageSize is the unit in which disks share content, in bytes.
	pageSize = 4096
	// maxSize is the longest a disk gets, in bytes: the page index of a longer one would cost more
	// memory than a test should take.
	maxSize = 1 << 36
)

// hashSeed keys the content hashes of one process.
var hashSeed = maphash.MakeSeed()

// zeroPage is a page of zeros, never written.
var zeroPage [pageSize]byte

// page is pageSize bytes of a disk. Only the disk whose token it carries writes to it; a page that
// other disks can see is hashed and never changes again.
type page struct {
	data   [pageSize]byte
	owner  *token
	hash   uint64 // of content and place, valid if hashed
	hashed bool
}

// token names the disk that may write to a page. It has a size, so that two are never equal.
type token struct{ _ byte }

// Disk is a file in memory that is cheap to copy: copies share pages until one of them writes. A
// regular disk grows and shrinks, and reads as zeros where nothing was written. A device has a fixed
// size and reads as garbage there.
//
// It may be used by several goroutines at once. It is a Storage; Sync does nothing.
type Disk struct {
	mu     sync.RWMutex
	pages  []*page // nil: zeros, or garbage on a device; guarded by mu
	size   int64   // guarded by mu; immutable on a device
	device bool    // immutable
	owner  *token  // guarded by mu
	sum    uint64  // XOR of the hashes of the hashed pages; guarded by mu
	dirty  []int   // indices of pages that may not be hashed; guarded by mu
}

var _ Storage = (*Disk)(nil)

// NewDisk returns a regular disk with that content, which is copied.
func NewDisk(content []byte) *Disk {
	d := &Disk{owner: new(token)}
	d.write(0, content)
	return d
}

// NewDevice returns a device of that size in bytes, rounded up to whole pages, which begins with
// content and holds garbage after it.
func NewDevice(content []byte, size int64) *Disk {
	size = (size + pageSize - 1) / pageSize * pageSize
	d := &Disk{owner: new(token), device: true, size: size, pages: make([]*page, size/pageSize)}
	d.write(0, content[:min(int64(len(content)), size)])
	return d
}

// Clone returns an independent copy in time proportional to the number of pages, not their content.
func (d *Disk) Clone() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.clone()
}

// clone is Clone. Preconditions: mu is held.
func (d *Disk) clone() *Disk {
	d.rehash()
	d.owner = new(token)
	return &Disk{
		pages:  append([]*page(nil), d.pages...),
		size:   d.size,
		device: d.device,
		owner:  new(token),
		sum:    d.sum,
	}
}

// garbage fills p with what a device holds at off where nothing was written: bytes that are never
// zero, and the same at every call.
func garbage(p []byte, off int64) {
	for i := range p {
		o := uint64(off) + uint64(i)
		x := (o>>3 + 1) * 0x9e3779b97f4a7c15
		p[i] = byte(x>>(o&7*8)) | 0x10
	}
}

// hashPage returns the hash of a page's content at that index; zeros on a regular disk have 0, as a
// hole has.
func (d *Disk) hashPage(i int, p *page) uint64 {
	if !d.device && p.data == zeroPage {
		return 0
	}
	return mix(maphash.Bytes(hashSeed, p.data[:]) + uint64(i)*0x9e3779b97f4a7c15)
}

// mix spreads the bits of x, so that hashes may be joined by XOR.
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// rehash hashes the pages that changed. Preconditions: mu is held.
func (d *Disk) rehash() {
	for _, i := range d.dirty {
		if i >= len(d.pages) || d.pages[i] == nil || d.pages[i].hashed {
			continue
		}
		p := d.pages[i]
		p.hash, p.hashed = d.hashPage(i, p), true
		d.sum ^= p.hash
	}
	d.dirty = d.dirty[:0]
}

// contentHash returns a hash of content and size: equal contents have equal hashes, except that a device
// page that was written to hold its garbage has another than one never written. Preconditions: mu
// is held, or nobody else uses the disk.
func (d *Disk) contentHash() uint64 {
	d.rehash()
	return mix(d.sum + mix(uint64(d.size)))
}

// own returns page i for writing. Preconditions: mu is held, i is within pages.
func (d *Disk) own(i int) *page {
	p := d.pages[i]
	switch {
	case p == nil:
		p = &page{owner: d.owner}
		if d.device {
			garbage(p.data[:], int64(i)*pageSize)
		}
		d.pages[i] = p
		d.dirty = append(d.dirty, i)
	case p.owner != d.owner:
		d.sum ^= p.hash
		c := &page{owner: d.owner, data: p.data}
		d.pages[i] = c
		d.dirty = append(d.dirty, i)
		p = c
	case p.hashed:
		d.sum ^= p.hash
		p.hashed = false
		d.dirty = append(d.dirty, i)
	}
	return p
}

// drop forgets page i, which then reads as zeros. Preconditions: mu is held, the disk is regular.
func (d *Disk) drop(i int) {
	if p := d.pages[i]; p != nil {
		if p.hashed {
			d.sum ^= p.hash
		}
		d.pages[i] = nil
	}
}

// grow makes a regular disk at least size bytes long. Preconditions: mu is held, or nobody else uses
// the disk.
func (d *Disk) grow(size int64) {
	if d.device || size <= d.size {
		return
	}
	d.size = size
	if n := int((size + pageSize - 1) / pageSize); n > len(d.pages) {
		d.pages = append(d.pages, make([]*page, n-len(d.pages))...)
	}
}

// write puts p at off, growing a regular disk. Preconditions: mu is held, or nobody else uses the
// disk; a device reaches as far.
func (d *Disk) write(off int64, p []byte) {
	if len(p) == 0 {
		return
	}
	d.grow(off + int64(len(p)))
	for len(p) > 0 {
		in := off % pageSize
		n := copy(d.own(int(off / pageSize)).data[in:], p)
		p, off = p[n:], off+int64(n)
	}
}

// zero makes the part of the range that lies within the disk read as zeros. Preconditions: as write.
func (d *Disk) zero(off, n int64) {
	for end := min(off+n, d.size); off < end; {
		i, in := int(off/pageSize), off%pageSize
		m := min(pageSize-in, end-off)
		switch {
		case !d.device && d.pages[i] == nil:
		case !d.device && m == pageSize:
			d.drop(i)
		default:
			clear(d.own(i).data[in : in+m])
		}
		off += m
	}
}

// truncate sets the size of a regular disk. Preconditions: as write.
func (d *Disk) truncate(size int64) {
	if size >= d.size {
		d.grow(size)
		return
	}
	d.zero(size, d.size-size)
	n := int((size + pageSize - 1) / pageSize)
	for i := n; i < len(d.pages); i++ {
		d.drop(i)
	}
	d.pages, d.size = d.pages[:n], size
}

// read fills p from off; where nothing was written are zeros, or garbage. Preconditions: mu is held,
// or nobody else writes; the range is within the disk.
func (d *Disk) read(p []byte, off int64) {
	for len(p) > 0 {
		in := off % pageSize
		m := min(pageSize-in, int64(len(p)))
		switch pg := d.pages[off/pageSize]; {
		case pg != nil:
			copy(p[:m], pg.data[in:])
		case d.device:
			garbage(p[:m], off)
		default:
			clear(p[:m])
		}
		p, off = p[m:], off+m
	}
}

// holds reports whether the disk holds p at off; beyond the end it does not. A nil p of n bytes means
// zeros. Preconditions: as read.
func (d *Disk) holds(p []byte, off, n int64) bool {
	if off+n > d.size {
		return false
	}
	for done := int64(0); done < n; {
		i, in := (off+done)/pageSize, (off+done)%pageSize
		m := min(pageSize-in, n-done)
		want := zeroPage[:m]
		if p != nil {
			want = p[done : done+m]
		}
		var have []byte
		switch pg := d.pages[i]; {
		case pg != nil:
			have = pg.data[in : in+m]
		case d.device:
			have = make([]byte, m)
			garbage(have, off+done)
		default:
			have = zeroPage[:m]
		}
		if string(have) != string(want) {
			return false
		}
		done += m
	}
	return true
}

// checkRange returns an error for a range that is negative or further out than any disk reaches, and
// one that matches syscall.ENOSPC for one beyond the end of a device. Preconditions: mu is held.
func (d *Disk) checkRange(off, n int64) error {
	switch {
	case off < 0 || n < 0:
		return fmt.Errorf("range of %#x bytes at %#x: %w", n, off, syscall.EINVAL)
	case d.device && (off > d.size || n > d.size-off):
		return fmt.Errorf("range of %#x bytes at %#x on a device of %#x: %w", n, off, d.size, syscall.ENOSPC)
	case off > maxSize || n > maxSize-off:
		return fmt.Errorf("range of %#x bytes at %#x: %w", n, off, syscall.EFBIG)
	}
	return nil
}

// ReadAt is io.ReaderAt.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if off < 0 {
		return 0, fmt.Errorf("read at %#x: %w", off, syscall.EINVAL)
	}
	if off >= d.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	n := min(int64(len(p)), d.size-off)
	d.read(p[:n], off)
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// WriteAt is io.WriterAt. Beyond the end it grows a regular disk; on a device it writes nothing and
// fails with an error that matches syscall.ENOSPC.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.checkRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	d.write(off, p)
	return len(p), nil
}

// Size returns the length in bytes.
func (d *Disk) Size() (int64, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.size, nil
}

// Truncate sets the length of a regular disk; a device has errors.ErrUnsupported.
func (d *Disk) Truncate(size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.checkTruncate(size); err != nil {
		return err
	}
	d.truncate(size)
	return nil
}

// checkTruncate returns the error of a truncation to size. Preconditions: mu is held.
func (d *Disk) checkTruncate(size int64) error {
	if d.device {
		return fmt.Errorf("truncate a device: %w", errors.ErrUnsupported)
	}
	return d.checkRange(size, 0)
}

// Sync does nothing.
func (d *Disk) Sync() error { return nil }

// PunchHole makes the part of the range that lies within the disk read as zeros.
func (d *Disk) PunchHole(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.checkRange(off, n); err != nil {
		return err
	}
	d.zero(off, n)
	return nil
}

// WriteZeroes makes the range read as zeros, growing a regular disk.
func (d *Disk) WriteZeroes(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.checkRange(off, n); err != nil {
		return err
	}
	if n > 0 {
		d.grow(off + n)
	}
	d.zero(off, n)
	return nil
}

// Allocate grows a regular disk to hold the range. A device has errors.ErrUnsupported.
func (d *Disk) Allocate(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.checkAllocate(off, n); err != nil {
		return err
	}
	if n > 0 {
		d.grow(off + n)
	}
	return nil
}

// checkAllocate returns the error of an allocation. Preconditions: mu is held.
func (d *Disk) checkAllocate(off, n int64) error {
	if d.device {
		return fmt.Errorf("allocate on a device: %w", errors.ErrUnsupported)
	}
	return d.checkRange(off, n)
}

// Allocated returns how many bytes the pages that are there have. A device does not tell.
func (d *Disk) Allocated() (int64, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.device {
		return 0, fmt.Errorf("allocated size of a device: %w", errors.ErrUnsupported)
	}
	n := int64(0)
	for _, p := range d.pages {
		if p != nil {
			n += pageSize
		}
	}
	return n, nil
}

// NextData returns the next run of pages that were written and not punched, or io.EOF. All of a device
// is data.
func (d *Disk) NextData(off int64) (start, end int64, err error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if off < 0 || off >= d.size {
		return 0, 0, io.EOF
	}
	if d.device {
		return off, d.size, nil
	}
	i := off / pageSize
	for ; i < int64(len(d.pages)) && d.pages[i] == nil; i++ {
	}
	if i == int64(len(d.pages)) {
		return 0, 0, io.EOF
	}
	j := i
	for ; j < int64(len(d.pages)) && d.pages[j] != nil; j++ {
	}
	return max(off, i*pageSize), min(j*pageSize, d.size), nil
}

// Unlock does nothing.
func (d *Disk) Unlock() error { return nil }

// Identity is the disk itself.
func (d *Disk) Identity() any { return d }

// FixedSize reports whether this is a device.
func (d *Disk) FixedSize() bool { return d.device }

// Close does nothing: the disk stays readable.
func (d *Disk) Close() error { return nil }

// Bytes returns a copy of the whole content.
func (d *Disk) Bytes() []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	p := make([]byte, d.size)
	d.read(p, 0)
	return p
}

// WriteFile writes the content to a new or truncated file of that name, for tools that want one. Holes
// stay holes.
func (d *Disk) WriteFile(name string) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	err = f.Truncate(d.size)
	buf := make([]byte, pageSize)
	for i, p := range d.pages {
		if err != nil {
			break
		}
		if p == nil && !d.device {
			continue
		}
		off := int64(i) * pageSize
		b := buf[:min(pageSize, d.size-off)]
		d.read(b, off)
		_, err = f.WriteAt(b, off)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
