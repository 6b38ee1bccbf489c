package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// imageBytes is a qcow2 image of 64 KiB clusters and 16-bit refcounts, whose first refcount block counts all of
// it and whose first L2 table maps all of its disk.
type imageBytes []byte

const (
	testCluster  = 64 << 10
	testOffMask  = 0x00fffffffffffe00 // the host offset in an L1 or L2 entry
	testHeaderL1 = 40                 // place of l1_table_offset in the header
	testHeaderRT = 48                 // place of refcount_table_offset
	testFeatures = 72                 // place of incompatible_features
)

// word returns the eight bytes at off.
func (b imageBytes) word(off uint64) uint64 { return binary.BigEndian.Uint64(b[off:]) }

// setWord replaces the eight bytes at off.
func (b imageBytes) setWord(off, v uint64) { binary.BigEndian.PutUint64(b[off:], v) }

// refcount returns the bytes of the refcount of host cluster ci.
func (b imageBytes) refcount(ci uint64) []byte { return b[b.word(b.word(testHeaderRT))+2*ci:][:2] }

// setRefcount replaces the refcount of host cluster ci.
func (b imageBytes) setRefcount(ci uint64, n uint16) { binary.BigEndian.PutUint16(b.refcount(ci), n) }

// l2Entry returns the place of the L2 entry of guest cluster gi.
func (b imageBytes) l2Entry(gi uint64) uint64 { return b.word(b.word(testHeaderL1))&testOffMask + 8*gi }

// hostCluster returns the index of the host cluster of guest cluster gi.
func (b imageBytes) hostCluster(gi uint64) uint64 {
	return b.word(b.l2Entry(gi)) & testOffMask / testCluster
}

// The damages of images.

// leakCluster returns the image with one more cluster, which has a refcount and no reference.
func leakCluster(b imageBytes) imageBytes {
	ci := (len(b) + testCluster - 1) / testCluster
	b.setRefcount(uint64(ci), 1)
	return append(b, make([]byte, (ci+1)*testCluster-len(b))...)
}

// forgetCluster makes the refcount of a cluster of data 0.
func forgetCluster(b imageBytes) imageBytes {
	b.setRefcount(b.hostCluster(1), 0)
	return b
}

// shareCluster makes two entries refer to one cluster, whose refcount stays 1.
func shareCluster(b imageBytes) imageBytes {
	b.setWord(b.l2Entry(1), b.word(b.l2Entry(0)))
	return b
}

// loseCopied clears the COPIED flag of an entry whose cluster has refcount one.
func loseCopied(b imageBytes) imageBytes {
	b.setWord(b.l2Entry(1), b.word(b.l2Entry(1))&^(1<<63))
	return b
}

// hideRefcounts makes the place of the first refcount block impossible.
func hideRefcounts(b imageBytes) imageBytes {
	b.setWord(b.word(testHeaderRT), testOffMask&0x200)
	return b
}

// setDirty sets the dirty bit.
func setDirty(b imageBytes) imageBytes {
	b.setWord(testFeatures, b.word(testFeatures)|1)
	return b
}

// checkCases are images and what check says about them.
var checkCases = []struct {
	name   string
	image  string                        // the file: "plain", "packed", "empty", or "disk", which is raw; or none
	damage []func(imageBytes) imageBytes // of a copy of it
	args   []string
	exit   int
	want   *checkInfo // Corruptions, Leaks, CheckErrors and what was fixed; nil if there is no JSON

	// Where qemu-img's verdict is another one.
	qemuExit int      // its exit code, with no JSON
	apart    []string // JSON keys with another value
}{
	{name: "clean", image: "plain", want: &checkInfo{}},
	{name: "clean, compressed", image: "packed", want: &checkInfo{}},
	{name: "clean, without a disk", image: "empty", want: &checkInfo{}},
	{name: "clean, repair of leaks", image: "plain", args: []string{"-r", "leaks"}, want: &checkInfo{}},
	{name: "clean, repair", image: "plain", args: []string{"-r", "all"}, want: &checkInfo{}},

	{name: "leak", image: "plain", damage: damages{leakCluster},
		exit: 3, want: &checkInfo{Leaks: 1}},
	{name: "leak, repair of leaks", image: "plain", damage: damages{leakCluster}, args: []string{"-r", "leaks"},
		want: &checkInfo{LeaksFixed: 1}},
	{name: "leak, repair", image: "plain", damage: damages{leakCluster}, args: []string{"-r", "all"},
		want: &checkInfo{LeaksFixed: 1}},

	// Both the refcount and the COPIED flag of the entry are wrong.
	{name: "no refcount", image: "plain", damage: damages{forgetCluster},
		exit: 2, want: &checkInfo{Corruptions: 2}},
	// qemu-img gives up where a refcount is 0 and only leaks may be repaired; ours says what is left.
	{name: "no refcount, repair of leaks", image: "plain", damage: damages{forgetCluster}, args: []string{"-r", "leaks"},
		exit: 2, want: &checkInfo{Corruptions: 2}, qemuExit: 1},
	// qemu-img makes the refcounts anew for it, which lengthens the image, and sees no COPIED flag before.
	{name: "no refcount, repair", image: "plain", damage: damages{forgetCluster}, args: []string{"-r", "all"},
		want: &checkInfo{CorruptionsFixed: 2}, apart: []string{"corruptions-fixed", "image-end-offset"}},

	{name: "leak and no refcount", image: "plain", damage: damages{leakCluster, forgetCluster},
		exit: 2, want: &checkInfo{Corruptions: 2, Leaks: 1}},
	{name: "leak and no refcount, repair of leaks", image: "plain", damage: damages{leakCluster, forgetCluster},
		args: []string{"-r", "leaks"}, exit: 2, want: &checkInfo{Corruptions: 2, LeaksFixed: 1}, qemuExit: 1},
	{name: "leak and no refcount, repair", image: "plain", damage: damages{leakCluster, forgetCluster},
		args: []string{"-r", "all"}, want: &checkInfo{CorruptionsFixed: 2, LeaksFixed: 1},
		apart: []string{"corruptions-fixed", "image-end-offset"}},

	// The cluster that the second entry had is a leak. Repaired, the first one is shared: no COPIED.
	{name: "shared", image: "plain", damage: damages{shareCluster},
		exit: 2, want: &checkInfo{Corruptions: 1, Leaks: 1}},
	{name: "shared, repair of leaks", image: "plain", damage: damages{shareCluster}, args: []string{"-r", "leaks"},
		exit: 2, want: &checkInfo{Corruptions: 1, LeaksFixed: 1}},
	// qemu-img counts the two flags that its own repair makes wrong.
	{name: "shared, repair", image: "plain", damage: damages{shareCluster}, args: []string{"-r", "all"},
		want: &checkInfo{CorruptionsFixed: 1, LeaksFixed: 1}, apart: []string{"corruptions-fixed"}},

	{name: "lost flag", image: "plain", damage: damages{loseCopied},
		exit: 2, want: &checkInfo{Corruptions: 1}},
	{name: "lost flag, repair of leaks", image: "plain", damage: damages{loseCopied}, args: []string{"-r", "leaks"},
		want: &checkInfo{CorruptionsFixed: 1}},
	{name: "lost flag, repair", image: "plain", damage: damages{loseCopied}, args: []string{"-r", "all"},
		want: &checkInfo{CorruptionsFixed: 1}},

	{name: "unreadable refcounts", image: "plain", damage: damages{hideRefcounts},
		exit: 1, want: &checkInfo{Corruptions: 1, CheckErrors: 1}},

	{name: "dirty", image: "plain", damage: damages{setDirty}, want: &checkInfo{}},
	{name: "dirty, repair of leaks", image: "plain", damage: damages{setDirty}, args: []string{"-r", "leaks"}, want: &checkInfo{}},
	{name: "dirty, repair", image: "plain", damage: damages{setDirty}, args: []string{"-r", "all"}, want: &checkInfo{}},
	{name: "dirty with a leak, repair", image: "plain", damage: damages{setDirty, leakCluster}, args: []string{"-r", "all"},
		want: &checkInfo{LeaksFixed: 1}},

	{name: "raw", image: "disk", args: []string{"-f", "raw"}, exit: 63},
	{name: "raw, repair", image: "disk", args: []string{"-f", "raw", "-r", "all"}, exit: 63},
	{name: "raw as qcow2", image: "disk", exit: 1},
	{name: "raw that is missing", args: []string{"-f", "raw"}, exit: 1},
	{name: "missing", exit: 1},
	{name: "missing, repair", args: []string{"-r", "all"}, exit: 1},
}

// damages shortens a list of damages.
type damages = []func(imageBytes) imageBytes

// checkImages makes the files that checkCases begin with, in a new working directory.
func checkImages(t *testing.T) {
	t.Helper()
	inTempDir(t)
	writeDisk(t, "disk", 1<<20)
	mustTool(t, "convert", "-f", "raw", "-O", "qcow2", "disk", "plain")
	mustTool(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "disk", "packed")
	mustTool(t, "create", "-q", "-f", "qcow2", "empty", "0")
}

// writeDamaged writes a damaged copy of an image, or removes it if there is none to copy.
func writeDamaged(t *testing.T, name, image string, damage damages) {
	t.Helper()
	if err := os.RemoveAll(name); err != nil || image == "" {
		return
	}
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range damage {
		b = d(b)
	}
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCheck looks at the verdicts on checkCases, in both forms, and that only a repair changes an image.
func TestCheck(t *testing.T) {
	checkImages(t)
	for _, tt := range checkCases {
		t.Run(tt.name, func(t *testing.T) {
			args := append([]string{"check", "-f", "qcow2"}, tt.args...) // of a flag the last one counts
			writeDamaged(t, "x", tt.image, tt.damage)
			before, _ := os.ReadFile("x")
			stdout, stderr, exit := tool(append(args, "--output=json", "x")...)
			after, _ := os.ReadFile("x")
			if exit != tt.exit {
				t.Errorf("exit %d, want %d\n%s", exit, tt.exit, stderr)
			}
			if repairs := slices.Contains(tt.args, "-r"); !repairs && !bytes.Equal(before, after) {
				t.Error("the image was changed")
			} else if repairs && tt.want != nil {
				if _, stderr, again := tool("check", "-q", "-f", "qcow2", "x"); again != exit {
					t.Errorf("exit %d after the repair, which said %d\n%s", again, exit, stderr)
				}
			}
			if tt.want == nil {
				if stdout != "" || !strings.HasPrefix(stderr, "qcow2: ") {
					t.Errorf("stdout %q, stderr %q", stdout, stderr)
				}
				return
			}
			got := decode(t, stdout).(map[string]any)
			for key, want := range map[string]int64{
				"corruptions": tt.want.Corruptions, "corruptions-fixed": tt.want.CorruptionsFixed,
				"leaks": tt.want.Leaks, "leaks-fixed": tt.want.LeaksFixed,
			} {
				if n := number(t, got, key); n != want {
					t.Errorf("%s %d, want %d\n%s", key, n, want, stderr)
				}
			}
			if n := number(t, got, "check-errors"); (n > 0) != (tt.want.CheckErrors > 0) {
				t.Errorf("check-errors %d", n)
			}
			found := tt.want.Corruptions+tt.want.CorruptionsFixed+tt.want.Leaks+tt.want.LeaksFixed+tt.want.CheckErrors > 0
			if found == (stderr == "") {
				t.Errorf("stderr %q", stderr)
			}

			writeDamaged(t, "x", tt.image, tt.damage)
			stdout, human, exit := tool(append(args, "x")...)
			if exit != tt.exit || human != stderr || !strings.Contains(stdout, "verdict: ") {
				t.Errorf("exit %d, want %d; text %q; stderr %q, want %q", exit, tt.exit, stdout, human, stderr)
			}
			writeDamaged(t, "x", tt.image, tt.damage)
			if stdout, quiet, exit := tool(append(args, "-q", "x")...); exit != tt.exit || quiet != stderr || stdout != "" {
				t.Errorf("with -q: exit %d, want %d; %q; stderr %q, want %q", exit, tt.exit, stdout, quiet, stderr)
			}
		})
	}
}

// number returns a number in JSON, 0 if it is not there.
func number(t *testing.T, m map[string]any, key string) int64 {
	t.Helper()
	v, ok := m[key]
	if !ok {
		return 0
	}
	n, err := v.(interface{ Int64() (int64, error) }).Int64()
	if err != nil {
		t.Fatalf("%s: %v", key, err)
	}
	return n
}

// TestCheckAsQEMU compares check with qemu-img's on copies of one image: exit code and JSON, and what both say
// about the images that they leave.
func TestCheckAsQEMU(t *testing.T) {
	qemutest.Require(t)
	checkImages(t)
	for _, tt := range checkCases {
		t.Run(tt.name, func(t *testing.T) {
			check := append([]string{"check", "--output=json"}, tt.args...)
			if !slices.Contains(tt.args, "-f") {
				check = append(check, "-f", "qcow2")
			}
			check = append(check, "x")

			writeDamaged(t, "x", tt.image, tt.damage)
			want, wantExit := qemutest.ImgExit(t, check...)
			wantDirty := dirty(t, tt.want != nil)
			writeDamaged(t, "x", tt.image, tt.damage)
			got, stderr, exit := tool(check...)
			if tt.qemuExit != 0 {
				if wantExit != tt.qemuExit || want != "" {
					t.Errorf("qemu-img: exit %d, want %d; %q", wantExit, tt.qemuExit, want)
				}
				return
			}
			if exit != wantExit {
				t.Errorf("exit %d, qemu-img's %d\n%s", exit, wantExit, stderr)
			}
			if (got == "") != (want == "") {
				t.Fatalf("%q, qemu-img prints %q", got, want)
			}
			if got == "" {
				return
			}
			ours, theirs := decode(t, got).(map[string]any), decode(t, want).(map[string]any)
			for _, key := range tt.apart {
				if cmp.Equal(ours[key], theirs[key]) {
					t.Errorf("%s is qemu-img's: %v", key, ours[key])
				}
				delete(ours, key)
				delete(theirs, key)
			}
			if diff := cmp.Diff(theirs, ours); diff != "" {
				t.Errorf("JSON (-qemu-img +ours):\n%s", diff)
			}
			if c := qemutest.Check(t, "x"); c.Exit != exit {
				t.Errorf("exit %d, then qemu-img's is %d\n%s", exit, c.Exit, c.Output)
			}
			if got := dirty(t, true); got != wantDirty {
				t.Errorf("dirty bit %v, qemu-img leaves %v", got, wantDirty)
			}
		})
	}
}

// dirty returns the dirty bit of the file x, if it is an image.
func dirty(t *testing.T, isImage bool) bool {
	t.Helper()
	if !isImage {
		return false
	}
	b, err := os.ReadFile("x")
	if err != nil {
		t.Fatal(err)
	}
	return imageBytes(b).word(testFeatures)&1 != 0
}

// TestCheckAlone checks images whose backing and data files are gone, with and without a format.
func TestCheckAlone(t *testing.T) {
	inTempDir(t)
	mustTool(t, "create", "-q", "-u", "-f", "qcow2", "-b", "gone", "-F", "qcow2", "overlay", "1M")
	mustTool(t, "create", "-q", "-f", "qcow2", "-o", "data_file=data", "image", "1M")
	if err := os.Remove("data"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"overlay", "image"} {
		for _, args := range [][]string{{}, {"-f", "qcow2"}, {"-r", "all"}, {"--trust"}} {
			mustTool(t, append(append([]string{"check", "-p"}, args...), name)...)
		}
	}
	if _, stderr, _ := tool("check", "overlay"); !strings.Contains(stderr, "takes overlay as qcow2") {
		t.Errorf("stderr %q", stderr)
	}
	for _, name := range []string{"gone", "data"} {
		if _, err := os.Stat(name); err == nil {
			t.Errorf("%s was made", name)
		}
	}
}

// TestCheckLock checks an image that somebody writes: only with -U, and then without a repair.
func TestCheckLock(t *testing.T) {
	checkImages(t)
	img, err := qcow2.Open("plain", &qcow2.OpenOptions{ReadWrite: true})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if !img.Info().Locked {
		t.Skip("the host has no image locks")
	}
	for _, tt := range []struct {
		args []string
		exit int
	}{
		{[]string{}, 1},
		{[]string{"-U"}, 0},
		{[]string{"-r", "leaks"}, 1},
		{[]string{"-r", "all", "-U"}, 1},
	} {
		_, stderr, exit := tool(append([]string{"check", "-f", "qcow2", "plain"}, tt.args...)...)
		if exit != tt.exit || exit != 0 && !strings.HasPrefix(stderr, "qcow2: ") {
			t.Errorf("%q: exit %d, want %d; %q", tt.args, exit, tt.exit, stderr)
		}
	}
}
