package measure

import (
	"os"
	"syscall"
)

// residentMemory returns the most memory in bytes that was resident in a process that has ended.
func residentMemory(s *os.ProcessState) int64 {
	u, ok := s.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0
	}
	return int64(u.Maxrss) << 10
}
