package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/go-qcow2/qcow2/internal/measure"
)

// row is one conversion by all sides.
type row struct {
	name   string
	source string // the file that is read
	format string // its format
	to     string // the format of the output
	qemu   []string
	ours   []job // variants of the library's side
	raw    bool  // the fastest raw copies are measured, too
}

// rows returns what is measured.
func rows() []row {
	return []row{
		{name: "full qcow2 to raw", source: "full.qcow2", format: "qcow2", to: "raw", raw: true,
			ours: []job{{Name: "library"}, {Name: "library, no zero detection", Sparse: -1}}},
		{name: "half sparse raw to qcow2", source: halfDisk, format: "raw", to: "qcow2", raw: true,
			ours: []job{{Name: "library"}}},
		{name: "deflate", source: fsDisk, format: "raw", to: "qcow2", qemu: []string{"-c"},
			ours: []job{{Name: "library, 4 KiB", Compress: true}, {Name: "library, 32 KiB", Compress: true, Window: 32 << 10}}},
		{name: "zstd", source: fsDisk, format: "raw", to: "qcow2", qemu: []string{"-c", "-o", "compression_type=zstd"},
			ours: []job{{Name: "library", Compress: true, Zstd: true}}},
		{name: "deflate read back", source: "zlib.qcow2", format: "qcow2", to: "raw", ours: []job{{Name: "library"}}},
		{name: "zstd read back", source: "zstd.qcow2", format: "qcow2", to: "raw", ours: []job{{Name: "library"}}},
	}
}

// result is one run of one side.
type result struct {
	seconds float64
	cpu     float64 // seconds of all processors
	rssKiB  int64
}

// start runs a program in the directory of the files.
func (b *bench) start(name string, args ...string) (result, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = b.dir
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	begin := time.Now()
	err := cmd.Run()
	r := result{seconds: time.Since(begin).Seconds()}
	if err != nil {
		return r, fmt.Errorf("%s %q: %w\n%s", name, args, err, &out)
	}
	r.cpu = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
	r.rssKiB = peakKiB(cmd.ProcessState)
	return r, nil
}

// side is one way to convert, and how it went.
type side struct {
	name  string
	start func() (result, error)
	runs  []result
	bytes int64 // of the output
}

// outName is the output of all sides.
const outName = "out"

// sides returns the sides of a row: qemu-img first.
func (b *bench) sides(r *row) ([]*side, error) {
	args := append([]string{"convert", "-W", "-m", "8", "-f", r.format, "-O", r.to}, r.qemu...)
	all := []*side{{name: "qemu-img", start: func() (result, error) {
		return b.start("qemu-img", append(slices.Clone(args), r.source, outName)...)
	}}}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	add := func(j job) error {
		j.Source, j.Format, j.To, j.Out = r.source, r.format, r.to, outName
		text, err := json.Marshal(j)
		if err != nil {
			return err
		}
		all = append(all, &side{name: j.Name, start: func() (result, error) { return b.start(self, childFlag, string(text)) }})
		return nil
	}
	jobs := slices.Clone(r.ours)
	for i := range jobs {
		jobs[i].Workers = b.workers
	}
	if r.raw {
		source := strings.Replace(r.source, ".qcow2", ".raw", 1)
		for _, c := range rawCopies {
			c.Raw = source
			jobs = append(jobs, c)
		}
	}
	for _, j := range jobs {
		if err := add(j); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// measure runs all sides of a row in turns and prints its lines.
func (b *bench) measure(r *row) error {
	sides, err := b.sides(r)
	if err != nil {
		return err
	}
	for k := range b.rounds {
		for _, s := range sides {
			if err := os.Remove(b.path(outName)); err != nil && !os.IsNotExist(err) {
				return err
			}
			res, err := s.start()
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			s.runs = append(s.runs, res)
			if k > 0 {
				continue
			}
			to := r.to
			if strings.HasPrefix(s.name, rawPrefix) {
				to = "raw"
			}
			if _, err := b.start("qemu-img", "compare", "-f", r.format, "-F", to, r.source, outName); err != nil {
				return err
			}
			fi, err := os.Stat(b.path(outName))
			if err != nil {
				return err
			}
			s.bytes = fi.Size()
		}
	}
	virtual, err := b.virtualSize(r)
	if err != nil {
		return err
	}
	b.print(r, sides, virtual)
	return os.Remove(b.path(outName))
}

// virtualSize returns the size in bytes of the disk that a row converts.
func (b *bench) virtualSize(r *row) (int64, error) {
	name := b.path(fullDisk)
	if !r.raw {
		name = b.path(fsDisk)
	}
	fi, err := os.Stat(name)
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// print prints the lines of a row.
func (b *bench) print(r *row, sides []*side, virtual int64) {
	for _, s := range sides {
		var speed, qemu, raw, cpu []float64
		var peak int64
		for k, res := range s.runs {
			speed = append(speed, float64(virtual)/1e6/res.seconds)
			qemu = append(qemu, sides[0].runs[k].seconds/res.seconds)
			cpu = append(cpu, sides[0].runs[k].cpu/res.cpu)
			peak = max(peak, res.rssKiB)
			fastest := 0.0
			for _, o := range sides {
				if t := o.runs[k].seconds; strings.HasPrefix(o.name, rawPrefix) && (fastest == 0 || t < fastest) {
					fastest = t
				}
			}
			if fastest > 0 {
				raw = append(raw, fastest/res.seconds)
			}
		}
		fmt.Printf("| %s | %s | %s | %s | %s | %s | %d | %.3f | %.0f |\n", r.name, s.name,
			measure.MedianInterval(speed).Format("%.0f"), measure.MedianInterval(qemu), measure.MedianInterval(raw), measure.MedianInterval(cpu),
			s.bytes, float64(s.bytes)/float64(sides[0].bytes), float64(peak)/1024)
	}
}
