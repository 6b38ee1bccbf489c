package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/go-qcow2/qcow2/internal/codec"
)

// fill reads what is to be copied of a piece, finds zeros in it, and compresses the rest if that is asked for.
func (c *converter) fill(ctx context.Context, p *piece) error {
	if c.probe(p) {
		return nil
	}
	if err := c.load(ctx, p); err != nil {
		return err
	}
	if c.detect > 0 && c.opts.Zeroes != ZeroesData {
		p.findZeros(c.detect)
	}
	if c.opts.Compress {
		return c.pack(ctx, p)
	}
	return nil
}

// load makes sure that the content of a piece is in memory.
func (c *converter) load(ctx context.Context, p *piece) error {
	if p.loaded {
		return nil
	}
	p.loaded = true
	return c.read(ctx, p)
}

// read reads the parts of a piece that are copied. What no read fills of them is zeros.
func (c *converter) read(ctx context.Context, p *piece) error {
	reads := p.reads
	for _, x := range p.parts {
		if x.class != classCopy {
			continue
		}
		pos, end := x.off, x.off+x.n
		for len(reads) > 0 && reads[0].off < end {
			// Parts that follow each other may be read in one; those that are not copied lie between reads.
			var now []sourceRun
			if now, reads = cutRuns(reads, end); len(now) == 0 {
				break
			}
			for k := 0; k < len(now); {
				// What lies side by side in the source is read at once, wherever the host has it.
				r := now[k].guestSpan
				for k++; k < len(now) && now[k].off == r.off+r.n; k++ {
					r.n += now[k].n
				}
				clear(p.data(guestSpan{pos, r.off - pos}))
				if err := c.reads.read(ctx, c.src, p.data(r), r.off); err != nil {
					return err
				}
				pos = r.off + r.n
			}
		}
		clear(p.data(guestSpan{pos, end - pos}))
	}
	return nil
}

// findZeros divides the parts to copy into such with data and such that are zeros, by runs of whole groups of group
// bytes of the guest.
func (p *piece) findZeros(group int64) {
	var parts []piecePart
	add := func(x piecePart) {
		if k := len(parts) - 1; k >= 0 && parts[k].class == x.class {
			parts[k].n += x.n
			return
		}
		parts = append(parts, x)
	}
	for _, x := range p.parts {
		if x.class != classCopy {
			add(x)
			continue
		}
		for pos, end := x.off, x.off+x.n; pos < end; {
			g := piecePart{guestSpan{pos, min(group-pos%group, end-pos)}, classCopy}
			if isZero(p.data(g.guestSpan)) {
				g.class = classZero
			}
			add(g)
			pos += g.n
		}
	}
	p.parts = parts
}

// pack compresses the clusters that have data.
func (c *converter) pack(ctx context.Context, p *piece) error {
	size := c.unit
	used := 0
	clear(p.buf.sizes)
	for _, x := range p.parts {
		if x.class != classCopy {
			continue
		}
		for off := x.off; off < x.off+x.n; off += size {
			if err := ctx.Err(); err != nil {
				return err
			}
			at := off - p.off
			if p.n-at < size && p.off+p.n < c.dst.Size() {
				continue // of the cluster, the rest stays
			}
			// The disk may end inside its last cluster, which is packed whole.
			whole := p.buf.data[at : at+size]
			clear(whole[min(size, p.n-at):])
			room := p.buf.packed[used:]
			n, ok, err := codec.CompressWindow(room[:0:min(len(room), int(size))], whole, c.image.codec, c.opts.DeflateWindow)
			if err != nil {
				return err
			}
			if ok {
				p.buf.sizes[at/size] = n
				used += n
			}
		}
	}
	return nil
}

// readPolicy is what Convert does about read errors.
type readPolicy struct {
	mu  sync.Mutex
	ask func(off, n int64, err error) error // ConvertOptions.OnReadError
}

// read fills b with what d holds at off, or zeros as the policy says.
func (r *readPolicy) read(ctx context.Context, d Disk, b []byte, off int64) error {
	err := readWhole(d, b, off)
	if err == nil || r.ask == nil {
		return err
	}
	bad, err := r.findBad(ctx, d, b, off, err, nil)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range bad {
		if err := r.ask(x.off, x.n, x.err); err != nil {
			return err
		}
		clear(b[x.off-off:][:x.n])
	}
	return nil
}

// readWhole fills b with what d holds at off.
func readWhole(d Disk, b []byte, off int64) error {
	n, err := d.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read the source at %#x: %w", off, err)
}

// badRun is a run of sectors that cannot be read.
type badRun struct {
	guestSpan
	err error
}

// findBad reads b, whose read has failed with failed, by halves, down to the sectors that fail, which it appends to bad.
func (r *readPolicy) findBad(ctx context.Context, d Disk, b []byte, off int64, failed error, bad []badRun) ([]badRun, error) {
	if err := ctx.Err(); err != nil {
		return bad, err
	}
	end := off + int64(len(b))
	mid := (off + end) / 2 / sectorSize * sectorSize
	if mid <= off {
		mid = (off/sectorSize + 1) * sectorSize
	}
	if mid >= end {
		if k := len(bad) - 1; k >= 0 && bad[k].off+bad[k].n == off {
			bad[k].n += end - off
			return bad, nil
		}
		return append(bad, badRun{guestSpan{off, end - off}, failed}), nil
	}
	for _, x := range []guestSpan{{off, mid - off}, {mid, end - mid}} {
		half := b[x.off-off:][:x.n]
		err := readWhole(d, half, x.off)
		if err == nil {
			continue
		}
		if errors.Is(err, context.Canceled) {
			return bad, err
		}
		if bad, err = r.findBad(ctx, d, half, x.off, err, bad); err != nil {
			return bad, err
		}
	}
	return bad, nil
}
