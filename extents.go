package qcow2

// ExtentKind says what a guest range reads as, and whose content it is.
type ExtentKind uint8

const (
	ExtentUnallocated ExtentKind = iota // nothing in the whole chain: reads as zeros
	ExtentZero                          // zero clusters: read as zeros, and hide what lies below
	ExtentData                          // stored data
	ExtentCompressed                    // stored data in compressed clusters
)

// String returns the kind's name in lower case.
func (k ExtentKind) String() string {
	switch k {
	case ExtentUnallocated:
		return "unallocated"
	case ExtentZero:
		return "zero"
	case ExtentData:
		return "data"
	case ExtentCompressed:
		return "compressed"
	}
	return "invalid"
}

// Extent is a run of guest bytes of one state.
type Extent struct {
	Off, Len int64      // guest range in bytes
	Kind     ExtentKind // what the range reads as
	Depth    int        // the layer that decides: 0 is the image itself, 1 its backing file, ...
	HostOff  int64      // host offset in that layer's file (or data file) where Off is stored, or -1
}
