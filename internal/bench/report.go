package main

import (
	"bufio"
	"fmt"
	"io"
	"time"

	"github.com/go-qcow2/qcow2/internal/measure"
)

// printReport prints the rows as Markdown, with what they were measured on.
func printReport(out io.Writer, c config, q *qemu, rows []row, allocs struct{ read, overwrite float64 }, took time.Duration) {
	w := bufio.NewWriter(out)
	defer w.Flush()
	version := ""
	if q != nil {
		version = q.version
	}
	measure.PrintMachine(w, version)
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
	case r.ours.Median >= aim:
		return fmt.Sprintf("%.1f, met", aim)
	default:
		return fmt.Sprintf("%.1f, **missed**", aim)
	}
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
