package qcow2

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// discardImage is an image made by QEMU, with clusters of every kind, each four times: data, compressed, zero plain,
// zero alloc, unallocated; and data in the disk's last cluster, of which the disk has a part.
type discardImage struct {
	name    string
	options string // of qemu-img create
	cluster int64
	backing bool // a raw backing file that ends in the unallocated clusters
	data    bool // an external data file
	v2      bool // no zero clusters
	snap    bool // an internal snapshot shares everything
}

// discardImages are the images on which Discard and WriteZeroes are compared with QEMU's.
var discardImages = []discardImage{
	{name: "v3", options: "cluster_size=4k", cluster: 4096},
	{name: "v3 backing", options: "cluster_size=4k", cluster: 4096, backing: true},
	{name: "v2", options: "cluster_size=4k,compat=0.10", cluster: 4096, v2: true},
	{name: "v2 backing", options: "cluster_size=4k,compat=0.10", cluster: 4096, backing: true, v2: true},
	{name: "extended", options: "cluster_size=16k,extended_l2=on", cluster: 16 << 10},
	{name: "extended backing", options: "cluster_size=16k,extended_l2=on", cluster: 16 << 10, backing: true},
	{name: "data file", options: "cluster_size=4k,data_file=data", cluster: 4096, data: true},
	{name: "raw data file", options: "cluster_size=4k,data_file=data,data_file_raw=on", cluster: 4096, data: true},
	{name: "snapshot", options: "cluster_size=4k", cluster: 4096, snap: true},
}

// size returns the size of the disk in bytes.
func (d *discardImage) size() int64 { return 24*d.cluster + d.cluster/2 }

// make makes the image in dir, by QEMU.
func (d *discardImage) make(t *testing.T, dir string) {
	t.Helper()
	args := []string{"create", "-q", "-f", "qcow2", "-o", d.options}
	if d.backing {
		base := bytes.Repeat([]byte("base"), int(20*d.cluster/4))
		if err := os.WriteFile(filepath.Join(dir, "base"), base[:18*d.cluster+512], 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-b", "base", "-F", "raw")
	}
	qemutest.Img(t, append(args, "image", fmt.Sprint(d.size()))...)
	c := d.cluster
	cmds := []string{fmt.Sprintf("write -P 1 0 %d", 4*c)}
	if !d.data {
		for i := range int64(4) {
			cmds = append(cmds, fmt.Sprintf("write -c -P 2 %d %d", (4+i)*c, c))
		}
	}
	if !d.v2 {
		cmds = append(cmds, fmt.Sprintf("write -P 3 %d %d", 8*c, 8*c), fmt.Sprintf("write -z -u %d %d", 8*c, 4*c), fmt.Sprintf("write -z %d %d", 12*c, 4*c))
	}
	qemutest.IO(t, "image", append(cmds, fmt.Sprintf("write -P 4 %d %d", 24*c, c/2))...)
	if d.snap {
		qemutest.Img(t, "snapshot", "-c", "s", "image")
	}
}

// discardOp is an operation that both carry out: QEMU's words, and ours.
type discardOp struct {
	name   string
	do     func(img *Image, off, n int64) error
	fourth bool // the range begins and ends inside clusters, at quarters of them
}

// discardOps are the operations. Each is carried out on two clusters of every kind.
var discardOps = []discardOp{
	{"discard", (*Image).Discard, false},
	{"discard", (*Image).Discard, true},
	{"write -z", func(img *Image, off, n int64) error { return img.WriteZeroes(off, n, 0) }, false},
	{"write -z", func(img *Image, off, n int64) error { return img.WriteZeroes(off, n, 0) }, true},
	{"write -z -u", func(img *Image, off, n int64) error { return img.WriteZeroes(off, n, ZeroMayUnmap) }, false},
	{"write -z -u", func(img *Image, off, n int64) error { return img.WriteZeroes(off, n, ZeroMayUnmap) }, true},
}

// name returns the operation's name in the table of differences.
func (o discardOp) String() string {
	if o.fourth {
		return o.name + " inside clusters"
	}
	return o.name
}

// ranges returns the ranges that o works on.
func (o discardOp) ranges(d *discardImage) (r [][2]int64) {
	for first := int64(0); first < 24; first += 4 {
		off, n := (first+1)*d.cluster, 2*d.cluster
		if o.fourth {
			off, n = off+d.cluster/4, n-d.cluster/2
		}
		r = append(r, [2]int64{off, n})
	}
	return append(r, [2]int64{23*d.cluster + d.cluster/2, d.size() - 23*d.cluster - d.cluster/2})
}

// clusterKinds returns the kind of every guest cluster of the image, and of the runs of subclusters where they
// differ in a cluster.
func clusterKinds(t *testing.T, img *Image) []string {
	t.Helper()
	names := map[clusterKind]string{
		kindUnallocated: "unallocated", kindZeroPlain: "zero", kindZeroAlloc: "zero alloc", kindNormal: "data", kindCompressed: "compressed",
	}
	var kinds []string
	for off := uint64(0); off < img.size.Load(); off += img.m.clusterSize {
		e, err := img.m.entries(off, 1)
		if err != nil {
			t.Fatal(err)
		}
		var parts []string
		for sub := uint64(0); sub<<img.m.subBits < img.m.clusterSize; {
			k, n := img.m.kindRun(e[0], sub)
			name := names[k]
			if k == kindUnallocated && img.m.hasCluster(e[0]) {
				name += " alloc"
			}
			if img.m.extendedL2 && n < subclustersPerCluster {
				name = fmt.Sprintf("%d %s", n, name)
			}
			parts = append(parts, name)
			sub += n
		}
		kinds = append(kinds, strings.Join(parts, ", "))
	}
	return kinds
}

// discardDifferences are the differences between QEMU 7.2 and this library in what becomes of clusters, by the first
// row that matches, and why.
var discardDifferences = []struct{ match, why string }{
	{`^v2 backing: discard.*: QEMU data, we unallocated$`, "past the end of the backing file nothing is exposed: QEMU ignores every discard over a backing file in version 2"},
	{`: QEMU .*(zero|data).*, we unallocated$`, "nothing lies below, so it reads as zeros already: nothing is changed, and no L2 table allocated"},
	{`: write -z -u inside clusters: cluster 1[34]: QEMU zero, we zero alloc$`, "all of the cluster reads as zeros already: QEMU goes on to free it, although the range is a part of it"},
	{`^v3 backing: write -z.* inside clusters: cluster 18: QEMU zero, we data$`, "the backing file ends in the range: QEMU finds the rest of the cluster to be zeros below"},
	{`^extended.*: discard inside clusters: cluster (1|2|13|14|17|18): `, "QEMU discards whole clusters only, we subclusters"},
	{`^extended.*: write -z -u inside clusters: cluster 1[34]: QEMU zero alloc, we zero$`, "nothing is left in the cluster, so it is freed"},
}

// TestDiscardAsQEMU has QEMU and the library discard and zero the same ranges of the same images. What guests read
// agrees, but for what a discard leaves to chance; what becomes of each cluster agrees, but for
// discardDifferences; both leave images that qemu-img finds clean, and QEMU reads ours as we do.
func TestDiscardAsQEMU(t *testing.T) {
	qemutest.Require(t)
	met := make([]int, len(discardDifferences))
	for _, d := range discardImages {
		dir := t.TempDir()
		t.Chdir(dir) // QEMU looks for a data file where it stands
		d.make(t, dir)
		files := map[string][]byte{}
		for _, name := range []string{"image", "data"} {
			if b, err := os.ReadFile(name); err == nil {
				files[name] = b
			}
		}
		restore := func() {
			for name, b := range files {
				if err := os.WriteFile(name, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, o := range discardOps {
			restore()
			var cmds []string
			for _, r := range o.ranges(&d) {
				cmds = append(cmds, fmt.Sprintf("%s %d %d", o.name, r[0], r[1]))
			}
			qemutest.IO(t, "image", cmds...)
			theirs, theirGuest := d.look(t)

			restore()
			img, err := Open("image", &OpenOptions{ReadWrite: true, Resolver: ResolveBeside(dir)})
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range o.ranges(&d) {
				if err := o.do(img, r[0], r[1]); err != nil {
					t.Fatalf("%s: %s: %v", d.name, o, err)
				}
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			ours, guest := d.look(t)
			qemutest.CheckClean(t, "image")
			if d.name == "raw data file" {
				b, err := os.ReadFile("data")
				if err != nil || int64(len(b)) < d.size() {
					t.Fatalf("%d bytes: %v", len(b), err)
				}
				for c := int64(0); c < d.size(); c += d.cluster {
					end := min(c+d.cluster, d.size())
					if !bytes.Equal(b[c:end], guest[c:end]) {
						t.Errorf("%s: %s: cluster %d of the data file does not read as the disk", d.name, o, c/d.cluster)
					}
				}
			}
			if err := os.WriteFile("guest", guest, 0o600); err != nil {
				t.Fatal(err)
			}
			qemutest.Compare(t, "image", "qcow2", "guest", "raw")
			if o.name != "discard" && !bytes.Equal(guest, theirGuest) {
				t.Errorf("%s: %s: the guest reads other bytes than with QEMU", d.name, o)
			}
			for i := range ours {
				if ours[i] == theirs[i] {
					continue
				}
				s := fmt.Sprintf("%s: %s: cluster %d: QEMU %s, we %s", d.name, o, i, theirs[i], ours[i])
				k := slices.IndexFunc(discardDifferences, func(x struct{ match, why string }) bool { return regexp.MustCompile(x.match).MatchString(s) })
				if k < 0 {
					t.Error(s)
					continue
				}
				met[k]++
			}
		}
	}
	for k, x := range discardDifferences {
		if met[k] == 0 {
			t.Errorf("no cluster differs any more as %q says: %s", x.match, x.why)
		}
	}
}

// look returns the kinds of the clusters of the image in the working directory, and what a guest reads.
func (d *discardImage) look(t *testing.T) ([]string, []byte) {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	img, err := Open("image", &OpenOptions{Resolver: ResolveBeside(dir)})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	guest := make([]byte, img.Size())
	if _, err := img.ReadAt(guest, 0); err != nil {
		t.Fatal(err)
	}
	return clusterKinds(t, img), guest
}
