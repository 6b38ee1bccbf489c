package measure

import (
	"os"
	"os/signal"
)

// defaultDir returns the tmpfs of Linux, or the system's directory for temporary files.
func defaultDir() string {
	if fi, err := os.Stat("/dev/shm"); err == nil && fi.IsDir() {
		return "/dev/shm"
	}
	return os.TempDir()
}

// InDir calls f with a new directory in parent, which it removes afterwards, and also when the program is
// interrupted: gigabytes in memory must not be left.
func InDir(parent string, f func(dir string) error) error {
	dir, err := os.MkdirTemp(parent, "qcow2-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	interrupt := make(chan os.Signal, 1)
	signal.Notify(interrupt, os.Interrupt)
	defer signal.Stop(interrupt)
	go func() {
		<-interrupt
		os.RemoveAll(dir)
		os.Exit(1)
	}()
	return f(dir)
}
