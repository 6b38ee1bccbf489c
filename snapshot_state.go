package qcow2

import (
	"context"
	"encoding/binary"
	"io"
)

// The state of a machine is kept in guest address space behind the disk: its first byte is at the first L1 entry
// that no byte of the disk needs (QEMU's l1_vm_state_index). It belongs to its snapshot alone.

// stateStart returns the guest offset in bytes where the VM state of a snapshot of a disk of size bytes begins.
func (g *geometry) stateStart(size uint64) uint64 {
	return g.l1Entries(size) << (g.clusterBits + g.l2Bits)
}

// stateChunkBytes is how much VM state is read and written at once.
const stateChunkBytes = 1 << 20

// writeState writes the snapshot's VM state, read from r, and L2 tables for it, into new clusters, and fills in l1,
// the encoded L1 entries behind the disk. Nothing names any of it.
func (c *snapshotCreation) writeState(ctx context.Context, r io.Reader, l1 []byte) error {
	m, left := c.img.m, c.s.vmState
	if left == 0 {
		return nil
	}
	buf := getBuffer(max(stateChunkBytes, m.clusterSize))
	defer putBuffer(buf)
	l2 := make([]byte, m.clusterSize)
	guestOff := m.stateStart(c.s.diskSize)
	for k := 0; left > 0; k++ {
		table, err := c.take(1, OverlapInactiveL2)
		if err != nil {
			return err
		}
		clear(l2)
		for i := uint64(0); i < 1<<m.l2Bits && left > 0; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(m.clusters(min(left, uint64(len(*buf)))), 1<<m.l2Bits-i, uint64(len(*buf))>>m.clusterBits)
			run, err := c.takeSome(n)
			if err != nil {
				return err
			}
			p := (*buf)[:run.n<<m.clusterBits]
			have := min(left, uint64(len(p)))
			if _, err := io.ReadFull(r, p[:have]); err != nil {
				if err == io.EOF {
					err = io.ErrUnexpectedEOF
				}
				return err
			}
			clear(p[have:])
			if err := c.img.host.writeData(guestOff, p, run.first<<m.clusterBits); err != nil {
				return err
			}
			for j := range run.n {
				e := l2Entry{word: (run.first + j) << m.clusterBits}
				if m.extendedL2 {
					e.bitmap = bitmapAllocated
				}
				m.putEntry(l2, i+j, e)
			}
			i, left, guestOff = i+run.n, left-have, guestOff+uint64(len(p))
		}
		off := table.first << m.clusterBits
		if err := c.img.host.write(useAnyL2, l2, off); err != nil {
			return err
		}
		binary.BigEndian.PutUint64(l1[8*k:], off)
	}
	return nil
}
