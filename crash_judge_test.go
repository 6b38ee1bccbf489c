package qcow2

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// crashJudge asks QEMU about crash states. It serves one goroutine.
type crashJudge struct {
	t   testing.TB
	dir string
}

// newCrashJudge returns a judge, or nil where there is no QEMU and none is required.
func newCrashJudge(t testing.TB) *crashJudge {
	for _, tool := range []string{"qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("QCOW2_REQUIRE_QEMU") == "1" {
				t.Errorf("QCOW2_REQUIRE_QEMU=1, but: %v", err)
			} else {
				t.Logf("NOTHING COMPARED WITH QEMU: %v (Debian: apt-get install qemu-utils)", err)
			}
			return nil
		}
	}
	return &crashJudge{t: t, dir: t.TempDir()}
}

// judge compares qemu-io's reading of some ranges with what the library read of the state, and takes
// qemu-img's check: leaks are allowed, and lost COPIED flags. A dirty image is repaired first, on the copy.
// It reports false if the state holds no image.
func (j *crashJudge) judge(l *crashLook, s *crashtest.State) (bool, []crashFinding) {
	image := s.Disk(l.image)
	if _, ok := l.read(image, dataOf(l, s), l.oracle.size, l.oracle.next); !ok {
		l.findings = nil
		return false, nil // no image: a state of Create
	}
	files := map[string]*crashtest.Disk{"image": image}
	if l.data != nil {
		files["data"] = s.Disk(l.data)
	}
	if l.backingFile != nil {
		files["backing"] = l.backingFile.Disk()
	}
	for name, d := range files {
		if err := d.WriteFile(filepath.Join(j.dir, name)); err != nil {
			j.t.Errorf("write %s: %v", name, err)
			return false, nil
		}
	}
	if f := j.compare(l, s.Index); f != nil {
		return true, f
	}
	check := j.check()
	rep := l.walk(image)
	if rep == nil {
		return true, l.findings
	}
	if rep.Dirty() {
		if c := j.check("-r", "all"); c.CheckErrors > 0 {
			return true, []crashFinding{{"qemu", "repair: " + c.Output}}
		}
		if c := j.check(); !c.Clean() {
			return true, []crashFinding{{"qemu", "after the repair: " + c.Output}}
		}
		return true, j.compare(l, s.Index)
	}
	if check.CheckErrors > 0 || check.Exit == 1 || check.Corruptions > 0 && !onlyLostCopied(check.Output) {
		return true, []crashFinding{{"qemu", "check: " + check.Output}}
	}
	return true, nil
}

// run runs a tool beside the files, whose names in the images are relative, and returns what it printed and
// its exit code.
func (j *crashJudge) run(tool string, args ...string) (string, int) {
	cmd := exec.Command(tool, args...)
	cmd.Dir, cmd.Env = j.dir, append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		j.t.Errorf("%s: %v", tool, err)
		return err.Error(), -1
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// check runs qemu-img check on the image. Without a verdict, CheckErrors is 1.
func (j *crashJudge) check(args ...string) qemutest.CheckResult {
	all := append([]string{"check", "-f", "qcow2", "--output=json"}, args...)
	out, exit := j.run("qemu-img", append(all, "image")...)
	c := qemutest.CheckResult{CheckErrors: 1}
	// The verdict stands between messages about the findings.
	if i, k := strings.Index(out, "{\n"), strings.LastIndex(out, "}\n"); i >= 0 && k > i {
		c.CheckErrors = 0
		if err := json.Unmarshal([]byte(out[i:k+1]), &c); err != nil {
			c.CheckErrors = 1
		}
	}
	c.Exit, c.Output = exit, out
	return c
}

// dataOf returns the state's data file, or nil.
func dataOf(l *crashLook, s *crashtest.State) *crashtest.Disk {
	if l.data == nil {
		return nil
	}
	return s.Disk(l.data)
}

// onlyLostCopied reports whether every error of a qemu-img check is a COPIED flag that is absent although the
// refcount is one.
func onlyLostCopied(output string) bool {
	for line := range strings.Lines(output) {
		if !strings.HasPrefix(line, "ERROR") {
			continue
		}
		m := copiedError.FindStringSubmatch(line)
		if m == nil || m[2] != "1" || strings.HasPrefix(m[1], "8") && len(m[1]) == 16 {
			return false
		}
	}
	return true
}

// copiedError matches the line of a COPIED flag that does not agree with a refcount.
var copiedError = regexp.MustCompile(`OFLAG_COPIED.*entry=([0-9a-f]+) refcount=([0-9]+)`)

// dumpLine matches a line of qemu-io's "read -v".
var dumpLine = regexp.MustCompile(`^([0-9a-f]{8,}):\s+((?:[0-9a-f]{2} ){1,16})`)

// compare reads ranges of the image with qemu-io: some that were touched, and others.
func (j *crashJudge) compare(l *crashLook, index int) []crashFinding {
	rng := rand.New(rand.NewPCG(l.seed, uint64(index)))
	size := int64(len(l.got))
	var offs []int64
	for _, sector := range slices.Sorted(maps.Keys(l.oracle.touched)) {
		if rng.IntN(2) == 0 && len(offs) < 12 && sector < size/sectorSize {
			offs = append(offs, sector*sectorSize)
		}
	}
	for range 8 {
		if size == 0 {
			break
		}
		offs = append(offs, rng.Int64N(size)&^(sectorSize-1))
	}
	args := []string{"-f", "qcow2", "-r"}
	for _, off := range offs {
		args = append(args, "-c", fmt.Sprintf("read -v %d %d", off, min(2*sectorSize, size-off)))
	}
	out, exit := j.run("qemu-io", append(args, "image")...)
	if exit != 0 || strings.Contains(out, "failed") {
		return []crashFinding{{"qemu", "qemu-io: " + out}}
	}
	compared := 0
	for line := range strings.Lines(out) {
		m := dumpLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		var off int64
		if _, err := fmt.Sscanf(m[1], "%x", &off); err != nil {
			continue
		}
		b, err := hex.DecodeString(strings.ReplaceAll(m[2], " ", ""))
		if err != nil || off+int64(len(b)) > size {
			return []crashFinding{{"qemu", "qemu-io printed " + line}}
		}
		if string(b) != string(l.got[off:off+int64(len(b))]) {
			return []crashFinding{{"qemu", fmt.Sprintf("qemu-io reads %x at guest %#x, we %x", b, off, l.got[off:off+int64(len(b))])}}
		}
		compared += len(b)
	}
	if compared < len(offs)*sectorSize {
		return []crashFinding{{"qemu", fmt.Sprintf("qemu-io printed %d bytes for %d ranges:\n%s", compared, len(offs), out)}}
	}
	return nil
}
