package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/internal/measure"
	"github.com/go-qcow2/qcow2/internal/refwalk"
)

// shareRow is a kind of writes, in the processor time of which the overlap checks have a share.
type shareRow struct {
	name string
	aim  float64 // largest share aimed at
	// prepare makes what is written to, and returns a function that writes a part of the work and says how many
	// writes that were.
	prepare func(b *bench) (part func() (writes int64, err error), done func() error, err error)
}

// shareRows are the kinds of writes.
var shareRows = []shareRow{
	{"sequential allocating writes, 64 KiB, 64 KiB clusters", 0.005, (*bench).sequentialWrites},
	{randomRow, 0.02, (*bench).randomWrites},
}

// randomRow names the row whose image a plain scan is measured on.
const randomRow = "random writes, 512 bytes, 1 GiB, 512-byte clusters"

// scanAim is how often as dear as a query of the list a plain scan of all tables is meant to be.
const scanAim = 100

// shares measures the share of overlap checks, and prints its table.
func (b *bench) shares() error {
	fmt.Printf("| writes, overlap checks on | samples | a write | checks (95 %%) | aim | a check | keeping the list (95 %%) |\n")
	fmt.Printf("| --- | ---: | ---: | --- | --- | ---: | --- |\n")
	var random *profile
	for _, r := range shareRows {
		if !b.wants("overlap/" + r.name) {
			continue
		}
		p, err := b.profile(r)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		checks, keeping := p.share(p.checks), p.share(p.keeping)
		fmt.Printf("| %s | %d | %s | %s %% | %s | %s | %s %% |\n", r.name, p.samples, ns(p.perWrite(p.samples)), percent(checks).Format("%.2f"),
			aim(checks.Median < r.aim, fmt.Sprintf("below %.1f %%", 100*r.aim)), ns(p.perWrite(p.checks)), percent(keeping).Format("%.2f"))
		if r.name == randomRow {
			random = p
		}
	}
	if random == nil {
		return nil
	}
	return b.compareScan(random)
}

// compareScan measures a plain scan and prints it beside the checks of the profile of random writes.
func (b *bench) compareScan(p *profile) error {
	tables, nanos, err := b.scan()
	if err != nil {
		return fmt.Errorf("plain scan: %w", err)
	}
	checks := p.share(p.checks)
	times := func(share float64) float64 { return nanos / (p.perWrite(p.samples) * share) }
	ratio := measure.Interval{Low: times(checks.High), Median: times(checks.Median), High: times(checks.Low)}
	fmt.Printf("\nA plain scan of all %d ranges of metadata takes %s, that is %s times a check in random writes: aim %s.\n",
		tables, ns(nanos), ratio.Format("%.0f"), aim(ratio.Median >= scanAim, fmt.Sprint(scanAim)))
	return nil
}

// profile is what a processor profile says of writes.
type profile struct {
	writes  int64
	samples int64 // within WriteAt and Sync
	checks  int64 // of those, within a query of the overlap list on behalf of a host write, or the refusal
	keeping int64 // of those, within what enters and removes metadata
}

// perWrite returns the nanoseconds of a write that a number of samples stands for.
func (p *profile) perWrite(samples int64) float64 {
	return float64(samples) * samplePeriod.Seconds() * 1e9 / float64(p.writes)
}

// share returns the part of the samples that n are, with Wilson's confidence interval of 95 % for it: samples are
// independent of each other.
func (p *profile) share(n int64) measure.Interval {
	const z = 1.96
	all, part := float64(p.samples), float64(n)/float64(p.samples)
	middle := (part + z*z/(2*all)) / (1 + z*z/all)
	half := z / (1 + z*z/all) * math.Sqrt(part*(1-part)/all+z*z/(4*all*all))
	return measure.Interval{Low: middle - half, Median: part, High: middle + half}
}

// samplePeriod is the processor time between two samples of a profile.
const samplePeriod = 10 * time.Millisecond

// profile writes under a processor profile.
func (b *bench) profile(r shareRow) (*profile, error) {
	part, done, err := r.prepare(b)
	if err != nil {
		return nil, err
	}
	defer done()
	path := filepath.Join(b.dir, "profile")
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, err
	}
	p := &profile{}
	for begin := time.Now(); time.Since(begin) < either(b, 40*time.Second, 5*time.Second) && err == nil; {
		var n int64
		n, err = part()
		p.writes += n
	}
	pprof.StopCPUProfile()
	if err != nil {
		return nil, err
	}
	return p, p.read(path)
}

// library is what the names of the library's functions begin with in a profile.
const library = "github.com/go-qcow2/qcow2."

// read counts the samples of a profile.
func (p *profile) read(path string) error {
	all, err := cumulative(path, "")
	if err != nil {
		return err
	}
	p.samples = all["(*Image).WriteAt"] + all["(*Image).Sync"]
	p.keeping = all["(*hostFile).enter"] + all["(*hostFile).leave"]
	// What keeps the list asks it too.
	rest, err := cumulative(path, `\(\*hostFile\)\.leave$`)
	if err != nil {
		return err
	}
	p.checks = rest["(*overlapList).query"] + rest["(*hostFile).refuse"]
	if p.samples == 0 {
		return fmt.Errorf("the profile has no writes")
	}
	return nil
}

// profileLine is a line of pprof's list: cumulative samples and function.
var profileLine = regexp.MustCompile(`^\s*\d+\s+\S+\s+\S+\s+(\d+)\s+\S+\s+(\S+)`)

// cumulative has the go command say in how many samples of a profile each function of the library is, inlined or
// not. Samples in which a function matches ignore are left out.
func cumulative(path, ignore string) (map[string]int64, error) {
	args := []string{"tool", "pprof", "-sample_index=samples", "-top", "-cum", "-nodefraction=0", "-nodecount=100000"}
	if ignore != "" {
		args = append(args, "-ignore="+ignore)
	}
	cmd := exec.Command("go", append(args, path)...)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	counts := make(map[string]int64)
	for _, line := range strings.Split(string(out), "\n") {
		m := profileLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if name, ok := strings.CutPrefix(m[2], library); ok {
			if counts[name], err = strconv.ParseInt(m[1], 10, 64); err != nil {
				return nil, err
			}
		}
	}
	return counts, nil
}

// sequentialWrites prepares writes of one cluster each that fill a new disk in order; each part is another disk.
func (b *bench) sequentialWrites() (part func() (int64, error), done func() error, err error) {
	const size, n = 1 << 30, 64 << 10
	path := filepath.Join(b.dir, "sequential.qcow2")
	done = func() error { return os.Remove(path) }
	p := make([]byte, n)
	for i := range p {
		p[i] = 165
	}
	return func() (int64, error) {
		os.Remove(path)
		img, err := qcow2.Create(path, size, nil)
		if err != nil {
			return 0, err
		}
		defer img.Close()
		for off := int64(0); off < size; off += n {
			if _, err := img.WriteAt(p, off); err != nil {
				return 0, err
			}
		}
		if err := img.Sync(); err != nil {
			return 0, err
		}
		return size / n, img.Close()
	}, done, nil
}

// randomSize is the size in bytes of the disk that random writes go to.
const randomSize = 1 << 30

// randomPath is the image that random writes go to.
func (b *bench) randomPath() string { return filepath.Join(b.dir, "random.qcow2") }

// randomWrites prepares writes of one 512-byte cluster each, in random order, to an image with preallocated
// metadata. All of it is written once before, so that no write waits for new memory of the tmpfs.
func (b *bench) randomWrites() (part func() (int64, error), done func() error, err error) {
	path := b.randomPath()
	if err := qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=512", path,
		fmt.Sprint(randomSize)); err != nil {
		return nil, nil, err
	}
	img, err := openForWriting(path, qcow2.OverlapAll)
	if err != nil {
		return nil, nil, err
	}
	p := make([]byte, 1<<20)
	for off := int64(0); off < randomSize; off += int64(len(p)) {
		if _, err := img.WriteAt(p, off); err != nil {
			img.Close()
			return nil, nil, err
		}
	}
	random := rand.New(rand.NewPCG(1, 9))
	return func() (int64, error) {
		const writes = 10000
		for range writes {
			if _, err := img.WriteAt(p[:512], random.Int64N(randomSize/512)*512); err != nil {
				return 0, err
			}
		}
		return writes, nil
	}, img.Close, nil
}

// hostRange is a range of metadata in a host file, in bytes.
type hostRange struct{ off, n uint64 }

// scan measures the reference: a look at every table of the image that random writes went to, as a check without
// a list would have to take for each write. It returns the number of ranges and the nanoseconds of a scan.
func (b *bench) scan() (ranges int, nanos float64, err error) {
	defer os.Remove(b.randomPath())
	f, err := os.Open(b.randomPath())
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	tables, end, err := metadata(f)
	if err != nil {
		return 0, 0, err
	}
	random := rand.New(rand.NewPCG(2, 9))
	const scans = 5000
	hits := 0
	begin := time.Now()
	for range scans {
		off := random.Uint64N(end/512) * 512
		for _, t := range tables {
			if off < t.off+t.n && t.off < off+512 {
				hits++
			}
		}
	}
	nanos = float64(time.Since(begin).Nanoseconds()) / scans
	if hits == 0 || hits > scans/2 {
		return 0, 0, fmt.Errorf("%d of %d random clusters are metadata", hits, scans)
	}
	return len(tables), nanos, nil
}

// metadata returns every range of metadata of an image without snapshots, and the size of the file.
func metadata(f *os.File) (tables []hostRange, end uint64, err error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	h, err := refwalk.ParseHeader(f, fi.Size())
	if err != nil {
		return nil, 0, err
	}
	cluster := uint64(1) << h.ClusterBits
	l1 := hostRange{h.L1Off, uint64(h.L1Entries) * 8}
	refTable := hostRange{h.RefTableOff, uint64(h.RefTableClusters) << h.ClusterBits}
	tables = []hostRange{{0, cluster}, l1, refTable}
	for _, t := range []hostRange{l1, refTable} {
		p := make([]byte, t.n)
		if _, err := io.ReadFull(io.NewSectionReader(f, int64(t.off), int64(t.n)), p); err != nil {
			return nil, 0, err
		}
		for ; len(p) > 0; p = p[8:] {
			if off := binary.BigEndian.Uint64(p) & 0x00fffffffffffe00; off != 0 {
				tables = append(tables, hostRange{off, cluster})
			}
		}
	}
	return tables, uint64(fi.Size()), nil
}

// ns gives a time in nanoseconds.
func ns(nanos float64) string { return fmt.Sprintf("%.0f ns", nanos) }
