package measure

import (
	"bytes"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// Usage is what a process took.
type Usage struct {
	Seconds float64 // from its start to its end
	Memory  int64   // the most memory that was resident at a time, in bytes; 0 where the system does not tell
}

// Process runs a command to its end.
func Process(cmd *exec.Cmd) (Usage, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	begin := time.Now()
	err := cmd.Run()
	u := Usage{Seconds: time.Since(begin).Seconds()}
	if err != nil {
		return u, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out.Bytes())
	}
	u.Memory = residentMemory(cmd.ProcessState)
	return u, nil
}

// Sides is QEMU beside the library.
type Sides struct {
	QEMU, Ours Usage    // medians of the time, and the largest memory
	Ratio      Interval // QEMU's time as a multiple of ours
}

// SideBySide runs two commands by turns, in the order A B B A. Each ratio is taken within a round.
func SideBySide(rounds int, qemuCommand, oursCommand func() (*exec.Cmd, error)) (Sides, error) {
	var s Sides
	var times [2][]float64
	var ratios []float64
	memory := [2]*int64{&s.QEMU.Memory, &s.Ours.Memory}
	commands := [2]func() (*exec.Cmd, error){qemuCommand, oursCommand}
	for round := range rounds {
		for turn := range 2 {
			which := (round + turn) % 2
			cmd, err := commands[which]()
			if err != nil {
				return s, err
			}
			u, err := Process(cmd)
			if err != nil {
				return s, err
			}
			times[which] = append(times[which], u.Seconds)
			*memory[which] = max(*memory[which], u.Memory)
		}
		ratios = append(ratios, times[0][round]/times[1][round])
	}
	s.QEMU.Seconds = MedianInterval(times[0]).Median
	s.Ours.Seconds = MedianInterval(times[1]).Median
	s.Ratio = MedianInterval(ratios)
	return s, nil
}
