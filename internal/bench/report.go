package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"
)

// printReport prints the rows as Markdown, with what they were measured on.
func printReport(out io.Writer, c config, q *qemu, rows []row, allocs struct{ read, overwrite float64 }, took time.Duration) {
	w := bufio.NewWriter(out)
	defer w.Flush()
	fmt.Fprintf(w, "| | |\n| --- | --- |\n")
	fmt.Fprintf(w, "| processor | %s, %d cores |\n", processor(), runtime.NumCPU())
	fmt.Fprintf(w, "| system | %s/%s, %s |\n", runtime.GOOS, runtime.GOARCH, kernel())
	fmt.Fprintf(w, "| Go | %s, GOMAXPROCS %d |\n", runtime.Version(), runtime.GOMAXPROCS(0))
	if q != nil {
		fmt.Fprintf(w, "| QEMU | %s |\n", q.version)
	} else {
		fmt.Fprintf(w, "| QEMU | not run |\n")
	}
	if rev := revision(); rev != "" {
		fmt.Fprintf(w, "| revision | %s |\n", rev)
	}
	fmt.Fprintf(w, "| mapped disk | %d MiB, %d KiB clusters, all written |\n", c.size>>20, clusterSize>>10)
	fmt.Fprintf(w, "| rounds | %d per row, %d slices each of %v |\n", c.rounds, turns, c.slice/turns)
	fmt.Fprintf(w, "| took | %v |\n\n", took.Round(time.Second))

	fmt.Fprintf(w, "| workload | goroutines | raw file | ours / raw (95 %%) | aim | QEMU / raw (95 %%) | QEMU mode |\n")
	fmt.Fprintf(w, "| --- | ---: | ---: | --- | --- | --- | --- |\n")
	for _, r := range rows {
		fmt.Fprintf(w, "| %s, %s | %d | %s | %s | %s | %s | %s |\n", r.workload.name, size(r.workload.n), r.goroutines,
			rate(r.rawRate, r.workload.n), r.ours, r.aim(), r.qemu, r.mode)
	}
	fmt.Fprintf(w, "\nHeap allocations: %v per mapped read, %v per overwrite in place.\n", allocs.read, allocs.overwrite)
}

// aim says whether the row's aim is met, by its median.
func (r *row) aim() string {
	switch aim := r.workload.aim; {
	case aim == 0:
		return ""
	case r.ours.median >= aim:
		return fmt.Sprintf("%.1f, met", aim)
	default:
		return fmt.Sprintf("%.1f, **missed**", aim)
	}
}

// String gives the median first, and the interval in brackets; nothing for none.
func (i interval) String() string {
	if i == (interval{}) {
		return ""
	}
	return fmt.Sprintf("**%.2f** (%.2f … %.2f)", i.median, i.low, i.high)
}

// size gives a size in bytes in the largest unit that divides it.
func size(n int64) string {
	if n >= 1<<20 {
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d KiB", n>>10)
}

// rate gives a rate in bytes per second, for small requests in requests.
func rate(bytesPerSecond float64, n int64) string {
	if n >= 1<<20 {
		return fmt.Sprintf("%.1f GiB/s", bytesPerSecond/(1<<30))
	}
	return fmt.Sprintf("%.0f k/s", bytesPerSecond/float64(n)/1000)
}

// processor returns the processor's name, as Linux tells it.
func processor() string {
	info, _ := os.ReadFile("/proc/cpuinfo")
	for _, line := range strings.Split(string(info), "\n") {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// kernel returns the kernel's version, as Linux tells it.
func kernel() string {
	version, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "kernel unknown"
	}
	release, _, _ := strings.Cut(strings.TrimSpace(string(version)), "-")
	return "kernel " + release
}

// revision returns the commit that the program was built from, where the go command noted it.
func revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value[:min(12, len(s.Value))]
		}
	}
	return ""
}
