package measure

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
)

// PrintMachine prints the head of a report's first table, of two columns: what was measured, and on what. qemu is
// QEMU's version, or empty where it did not run.
func PrintMachine(w io.Writer, qemu string) {
	fmt.Fprintf(w, "| | |\n| --- | --- |\n")
	fmt.Fprintf(w, "| processor | %s, %d cores |\n", processor(), runtime.NumCPU())
	fmt.Fprintf(w, "| system | %s/%s, %s |\n", runtime.GOOS, runtime.GOARCH, kernel())
	fmt.Fprintf(w, "| Go | %s, GOMAXPROCS %d |\n", runtime.Version(), runtime.GOMAXPROCS(0))
	if qemu != "" {
		fmt.Fprintf(w, "| QEMU | %s |\n", qemu)
	} else {
		fmt.Fprintf(w, "| QEMU | not run |\n")
	}
	if rev := revision(); rev != "" {
		fmt.Fprintf(w, "| revision | %s |\n", rev)
	}
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

// QEMUVersion returns the version of the installed qemu-img.
func QEMUVersion() (string, error) {
	out, err := exec.Command("qemu-img", "--version").Output()
	if err != nil {
		return "", err
	}
	version, _, _ := strings.Cut(string(out), "\n")
	version = strings.TrimPrefix(version, "qemu-img version ")
	version, _, _ = strings.Cut(version, " ")
	return version, nil
}
