//go:build !linux

package measure

import "os"

// residentMemory returns 0: other systems have other units for it, or do not tell.
func residentMemory(*os.ProcessState) int64 { return 0 }
