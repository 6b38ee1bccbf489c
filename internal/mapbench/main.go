// Command mapbench measures the tool's map, measure and compare beside qemu-img, on the same machine in one run:
//
//	go run ./internal/mapbench [-quick] [-dir DIR] [-run REGEXP]
//
// Both sides are whole processes, by turns, on images that nearly all QEMU has made; what they print must be the same. The report in
// Markdown gives medians, the ratio and the most memory. It needs qemu-img, and the go command, by which it builds
// examples/qcow2; it is started in the root of the repository. The figures are meant for a tmpfs with 3 GiB to spare.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/go-qcow2/qcow2/internal/measure"
)

// row is one command line on one image.
type row struct {
	name   string
	make   [][]string // commands that make the images, in the directory
	args   []string   // of both programs
	aim    float64    // how often as fast as qemu-img the tool is meant to be; 0: no aim
	rounds int
	disk   bool // the raw file "disk" is there, of 512 MiB of data
}

// tera is the image that issue 5 asks for: 1 TiB whose metadata is preallocated.
var tera = []string{"qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "tera", "1T"}

// rows are the rows of the report.
var rows = []row{
	{name: "map 1 TiB, 64 KiB clusters, preallocated", make: [][]string{tera},
		args: []string{"map", "--output=json", "-f", "qcow2", "tera"}, aim: 5, rounds: 9},
	{name: "map the same below two empty overlays", make: [][]string{tera,
		{"qemu-img", "create", "-q", "-f", "qcow2", "-b", "tera", "-F", "qcow2", "mid"},
		{"qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top"}},
		args: []string{"map", "--output=json", "-f", "qcow2", "top"}, aim: 5, rounds: 5},
	{name: "map 1 TiB, 128 KiB clusters, subclusters, preallocated", make: [][]string{
		{"qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,extended_l2=on,cluster_size=128k", "image", "1T"}},
		args: []string{"map", "--output=json", "-f", "qcow2", "image"}, aim: 5, rounds: 5},
	{name: "map 2 GiB, 512-byte clusters, preallocated", make: [][]string{ // qemu-img takes minutes to make it
		{"tool", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=512", "image", "2G"}},
		args: []string{"map", "--output=json", "-f", "qcow2", "image"}, aim: 5, rounds: 3},
	{name: "measure 1 TiB, 64 KiB clusters, preallocated", make: [][]string{tera},
		args: []string{"measure", "-O", "qcow2", "-f", "qcow2", "tera"}, aim: 5, rounds: 9},
	{name: "compare 512 MiB of data, raw and qcow2", disk: true,
		make: [][]string{{"qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk", "image"}},
		args: []string{"compare", "-f", "raw", "-F", "qcow2", "disk", "image"}, aim: 1, rounds: 9},
	{name: "compare 512 MiB of data, two qcow2", disk: true,
		make: [][]string{{"qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk", "image"},
			{"qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "disk", "other"}},
		args: []string{"compare", "-f", "qcow2", "-F", "qcow2", "image", "other"}, aim: 1, rounds: 9},
	{name: "compare 512 MiB of data, raw and compressed", disk: true,
		make: [][]string{{"qemu-img", "convert", "-c", "-W", "-m", "8", "-f", "raw", "-O", "qcow2", "disk", "image"}},
		args: []string{"compare", "-f", "raw", "-F", "qcow2", "disk", "image"}, aim: 1, rounds: 3},
	{name: "compare 1 TiB, preallocated, with itself", make: [][]string{tera},
		args: []string{"compare", "-U", "-f", "qcow2", "-F", "qcow2", "tera", "tera"}, aim: 5, rounds: 3},
}

func main() {
	f, err := measure.ParseFlags("three rounds", "compare")
	if err == nil {
		err = measure.InDir(f.Dir, func(dir string) error { return report(dir, f) })
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mapbench:", err)
		os.Exit(1)
	}
}

// report measures with files in dir and prints the report.
func report(dir string, f measure.Flags) error {
	version, err := measure.QEMUVersion()
	if err != nil {
		return err
	}
	tool := filepath.Join(dir, "tool")
	build := exec.Command("go", "build", "-o", tool, "./qcow2")
	build.Dir = "examples"
	if _, err := measure.Process(build); err != nil {
		return err
	}
	measure.PrintMachine(os.Stdout, version)
	fmt.Printf("\n| | rounds | QEMU | ours | QEMU / ours (95 %%) | aim | QEMU's memory | ours |\n")
	fmt.Printf("| --- | ---: | ---: | ---: | --- | --- | ---: | ---: |\n")
	begin := time.Now()
	for _, r := range rows {
		if !f.Filter.MatchString(r.name) {
			continue
		}
		if f.Quick {
			r.rounds = min(r.rounds, 3)
		}
		if err := r.measure(filepath.Join(dir, "images"), tool); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	fmt.Printf("\nTook %v.\n", time.Since(begin).Round(time.Second))
	return nil
}

// measure measures a row in a new directory, which it removes, and prints it.
func (r *row) measure(dir, tool string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if r.disk {
		if err := writeDisk(filepath.Join(dir, "disk")); err != nil {
			return err
		}
	}
	command := func(name string, args []string) *exec.Cmd {
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		return cmd
	}
	for _, args := range r.make {
		name := args[0]
		if name == "tool" {
			name = tool
		}
		if _, err := measure.Process(command(name, args[1:])); err != nil {
			return err
		}
	}
	theirs, err := command("qemu-img", r.args).Output()
	if err != nil {
		return err
	}
	ours, err := command(tool, r.args).Output()
	if err != nil {
		return err
	}
	if !bytes.Equal(theirs, ours) {
		return fmt.Errorf("%q prints %d bytes, which are not the %d of qemu-img", r.args, len(ours), len(theirs))
	}
	s, err := measure.SideBySide(r.rounds,
		func() (*exec.Cmd, error) { return command("qemu-img", r.args), nil },
		func() (*exec.Cmd, error) { return command(tool, r.args), nil })
	if err != nil {
		return err
	}
	aim := "none"
	if r.aim > 0 {
		aim = fmt.Sprintf("%.0f, met", r.aim)
		if s.Ratio.Median < r.aim {
			aim = fmt.Sprintf("%.0f, **missed**", r.aim)
		}
	}
	fmt.Printf("| %s | %d | %.0f ms | %.0f ms | %s | %s | %.0f MiB | %.0f MiB |\n", r.name, r.rounds, 1000*s.QEMU.Seconds, 1000*s.Ours.Seconds,
		s.Ratio, aim, float64(s.QEMU.Memory)/(1<<20), float64(s.Ours.Memory)/(1<<20))
	return nil
}

// writeDisk writes the raw disk of 512 MiB. A quarter of each KiB is random and the rest is text, so that compression has
// something to do and to save. It does so in small pieces: the memory of a process counts for those that it starts.
func writeDisk(name string) (err error) {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	rng := rand.New(rand.NewPCG(1, 2))
	p := bytes.Repeat([]byte("0123456789abcdef"), 1<<20/16)
	for range 512 {
		for i := 0; i < len(p); i += 1024 {
			for j := i; j < i+256; j++ {
				p[j] = byte(rng.Uint32())
			}
		}
		if _, err := f.Write(p); err != nil {
			return err
		}
	}
	return nil
}
