package codec

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// guestClusters returns how many clusters of size bytes the disks of these tests have: no more than
// the entries of one L2 table of the smallest size, and 4 MiB at most.
func guestClusters(size int) int { return max(10, min(48, 4<<20/size)) }

// guestDisk returns a disk of clusters of every content, none of which is zeros only.
func guestDisk(size int) []byte {
	var disk []byte
	for i := range guestClusters(size) {
		disk = append(disk, contents[1+i%5].cluster(size, uint64(100+i))...)
	}
	return disk
}

// TestReadQEMU decodes every compressed cluster of images that qemu-img wrote.
func TestReadQEMU(t *testing.T) {
	qemutest.Require(t)
	for _, typ := range types {
		for _, size := range clusterSizes {
			t.Run(fmt.Sprintf("%v/cluster=%d", typ, size), func(t *testing.T) {
				dir := t.TempDir()
				raw, image := filepath.Join(dir, "raw"), filepath.Join(dir, "image")
				qemutest.Dump(t, raw, image)
				disk := guestDisk(size)
				if err := os.WriteFile(raw, disk, 0o600); err != nil {
					t.Fatal(err)
				}
				qemutest.Img(t, "convert", "-c", "-f", "raw", "-O", "qcow2",
					"-o", fmt.Sprintf("cluster_size=%d,compression_type=%v", size, typ), raw, image)

				file, err := os.ReadFile(image)
				if err != nil {
					t.Fatal(err)
				}
				u64 := func(off uint64) uint64 { return binary.BigEndian.Uint64(file[off:]) }
				const offsetMask = 1<<56 - 1<<9
				l2 := u64(u64(40)) & offsetMask // the first entry of the L1 table
				clusterBits := binary.BigEndian.Uint32(file[20:])
				compressed := 0
				for i := range guestClusters(size) {
					entry := u64(l2 + uint64(i)*8)
					if entry>>62&1 == 0 {
						continue // it did not shrink
					}
					compressed++
					x := 62 - (clusterBits - 8)
					off := entry & (1<<x - 1)
					end := off&^511 + 512*(entry>>x&(1<<(62-x)-1)+1)
					payload := file[off:min(end, uint64(len(file)))]
					got := make([]byte, size)
					if err := Decompress(got, payload, typ); err != nil {
						t.Errorf("cluster %d at %#x: %v", i, off, err)
					} else if !bytes.Equal(got, disk[i*size:(i+1)*size]) {
						t.Errorf("cluster %d at %#x differs", i, off)
					}
				}
				if compressed < guestClusters(size)/2 {
					t.Errorf("only %d of %d clusters are compressed", compressed, guestClusters(size))
				}
			})
		}
	}
}

// TestQEMUReads writes payloads into a plain image, packed to the byte, and lets QEMU read it.
func TestQEMUReads(t *testing.T) {
	qemutest.Require(t)
	for _, typ := range types {
		for _, size := range clusterSizes {
			t.Run(fmt.Sprintf("%v/cluster=%d", typ, size), func(t *testing.T) {
				dir := t.TempDir()
				raw, image := filepath.Join(dir, "raw"), filepath.Join(dir, "image")
				qemutest.Dump(t, raw, image)
				disk := guestDisk(size)
				file, compressed := buildImage(t, disk, size, typ)
				for name, p := range map[string][]byte{raw: disk, image: file} {
					if err := os.WriteFile(name, p, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				if c := qemutest.Check(t, image); !c.Clean() || c.CompressedClusters != int64(compressed) || compressed < guestClusters(size)/2 {
					t.Errorf("%d compressed clusters, and qemu-img check: %+v", compressed, c)
				}
				qemutest.Compare(t, image, "qcow2", raw, "raw")
			})
		}
	}
}

// buildImage returns a version 3 image of disk with all clusters compressed that shrink, and how many
// these are. Its clusters are: header, refcount table, refcount block, L1 table, L2 table, data.
func buildImage(t *testing.T, disk []byte, size int, typ Type) (file []byte, compressed int) {
	t.Helper()
	const header, refTable, refBlock, l1, l2, data = 0, 1, 2, 3, 4, 5
	clusterBits := uint32(0)
	for 1<<clusterBits < size {
		clusterBits++
	}
	file = make([]byte, data*size)
	put := func(off int, v any) {
		if _, err := binary.Encode(file[off:], binary.BigEndian, v); err != nil {
			t.Fatal(err)
		}
	}

	x := 62 - (clusterBits - 8)
	for i := range len(disk) / size {
		src, dst := disk[i*size:(i+1)*size], make([]byte, size)
		n, ok, err := Compress(dst, src, typ)
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			off := len(file)
			file = append(file, dst[:n]...)
			sectors := (len(file)-1)>>9 - off>>9 // beside the first
			put(l2*size+i*8, uint64(1)<<62|uint64(sectors)<<x|uint64(off))
			for c := off / size; c <= (len(file)-1)/size; c++ {
				refs := binary.BigEndian.Uint16(file[refBlock*size+c*2:])
				put(refBlock*size+c*2, refs+1)
			}
			compressed++
			continue
		}
		// What does not shrink begins at the next cluster.
		file = append(file, make([]byte, -len(file)&(size-1))...)
		off := len(file)
		file = append(file, src...)
		put(l2*size+i*8, uint64(1)<<63|uint64(off))
		put(refBlock*size+off/size*2, uint16(1))
	}
	file = append(file, make([]byte, -len(file)&511)...)

	put(header, []uint32{0x514649fb, 3, 0, 0, 0, clusterBits})
	put(24, []uint64{uint64(len(disk))})
	put(36, []uint32{1})
	put(40, []uint64{uint64(l1 * size), uint64(refTable * size)})
	put(56, []uint32{1})
	put(96, []uint32{4, 104})
	if typ == Zstd {
		put(72, uint64(1<<3))
		put(100, uint32(112))
		put(104, uint8(1))
	}
	put(refTable*size, uint64(refBlock*size))
	put(l1*size, uint64(1)<<63|uint64(l2*size))
	for c := header; c < data; c++ {
		put(refBlock*size+c*2, uint16(1))
	}
	return file, compressed
}

// strictInflate reads payloads, each after its length in 32 bits, and inflates them with a window of
// 4 KiB in steps of 512 bytes, so that a match beyond the window finds nothing.
const strictInflate = `
import sys, zlib
f = sys.stdin.buffer
while head := f.read(4):
    left = f.read(int.from_bytes(head, "big"))
    d = zlib.decompressobj(wbits=-12)
    while not d.eof:
        out = d.decompress(left, 512)
        left = d.unconsumed_tail
        if not out and not d.eof:
            sys.exit("truncated")
        sys.stdout.buffer.write(out)
`

// TestStrictInflate inflates payloads with zlib and a window of 4 KiB.
func TestStrictInflate(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skipf("SKIPPED, NOTHING COMPARED WITH ZLIB: %v", err)
	}
	var in, want bytes.Buffer
	for _, size := range clusterSizes {
		for _, c := range contents {
			src := c.cluster(size, 16)
			dst := make([]byte, size)
			n, ok, err := Compress(dst, src, Deflate)
			if err != nil {
				t.Fatal(err)
			}
			if ok {
				in.Write(binary.BigEndian.AppendUint32(nil, uint32(n)))
				in.Write(dst[:n])
				want.Write(src)
			}
		}
	}
	run := func(in []byte) ([]byte, error) {
		cmd := exec.Command(python, "-c", strictInflate)
		cmd.Stdin = bytes.NewReader(in)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, stderr.Bytes())
		}
		return out, err
	}
	got, err := run(in.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Error("zlib reads something else")
	}

	// The check can fail: a window of 32 KiB is refused.
	var wide bytes.Buffer
	wide.Write(make([]byte, 4))
	deflateWide(t, &wide, contents[2].cluster(1<<20, 6))
	binary.BigEndian.PutUint32(wide.Bytes(), uint32(wide.Len()-4))
	if _, err := run(wide.Bytes()); err == nil {
		t.Error("zlib takes distances beyond the window: not a test")
	}
}
