package qcow2

import (
	"errors"
	"fmt"
)

// Sentinels: one for each decision that a caller can take. They are matched with errors.Is; the
// causes of the system (ENOSPC, fs.ErrClosed, fs.ErrExist, ...) stay in the chain beside them.
var (
	// ErrNotQcow2 says that the storage does not begin with the qcow2 magic.
	ErrNotQcow2 = errors.New("not a qcow2 image")
	// ErrWrongFormat says that the storage has not the magic of the format as which OpenForeign was to open it, or of
	// any that DetectForeign knows.
	ErrWrongFormat = errors.New("not an image of this format")
	// ErrCorrupt says that the image breaks the format. The located form is *CorruptError, or
	// *HeaderError for a field of the header.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrUnsupported says that the image, or what is asked of it, needs something that this library
	// does not do. It is not errors.ErrUnsupported, which speaks of the host's abilities.
	ErrUnsupported = errors.New("unsupported")
	// ErrEncrypted says that the image is encrypted. It comes with ErrUnsupported.
	ErrEncrypted = errors.New("image is encrypted")
	// ErrReadOnly refuses a change of an image that was opened for reading.
	ErrReadOnly = errors.New("image is read-only")
	// ErrCheckOnly refuses to use an image that was opened with OpenOptions.CheckOnly.
	ErrCheckOnly = errors.New("image is open for checking alone")
	// ErrDirty refuses a writable open of an image whose dirty bit is set, or whose header has no refcount: its
	// refcounts are stale, and the options forbid to repair them, or that failed.
	ErrDirty = errors.New("image is dirty")
	// ErrLocked says that somebody else holds the image in a way that excludes this open.
	ErrLocked = errors.New("image is locked")
	// ErrLimit says that a limit of OpenOptions.Limits was met. The located form is *LimitError.
	ErrLimit = errors.New("limit exceeded")
	// ErrTooLarge says that a request does not fit the format: a virtual size beyond the largest L1
	// table, a cluster beyond the largest host offset, a refcount beyond its width.
	ErrTooLarge = errors.New("too large for the format")
	// ErrOption says that options contradict each other or the format. The located form is *OptionError.
	ErrOption = errors.New("invalid option")
	// ErrRange says that a guest range does not lie inside the disk.
	ErrRange = errors.New("range outside the disk")
	// ErrHeaderFull says that the first cluster has no room for what the header must name.
	ErrHeaderFull = errors.New("no room left in the header cluster")
	// ErrBackingRequired says that the image names another file (backing or data) and that the options
	// give no way to reach it. The located form is *FileRequiredError.
	ErrBackingRequired = errors.New("image needs another file")
	// ErrNoBacking refuses to commit an image that has no backing file.
	ErrNoBacking = errors.New("image has no backing file")
	// ErrBackingFormatUnknown says that neither the header nor the caller tells the format of a backing
	// file. It is never probed.
	ErrBackingFormatUnknown = errors.New("format of the backing file is not given")
	// ErrChain says that a chain of backing files is too deep, or meets one storage twice.
	ErrChain = errors.New("bad chain of backing files")
	// ErrResolve says that a resolver refused a file name. The located form is *ResolveError.
	ErrResolve = errors.New("file name refused")
	// ErrSnapshotNotFound says that no snapshot has the given id or name.
	ErrSnapshotNotFound = errors.New("no such snapshot")
	// ErrNotAligned says that the data of a file cannot stay where it is in a conversion in place. Convert copies it.
	// The located form is *AlignError.
	ErrNotAligned = errors.New("data is not aligned to clusters")
	// ErrInPlace says that a file is between its source and a qcow2 image, by a conversion in place that did not end
	// (ConvertInPlace), or is not, where that was expected. What was found is in *InPlaceError.
	ErrInPlace = errors.New("conversion in place is not finished")
	// ErrBusy refuses an operation while something else holds what it would change.
	ErrBusy = errors.New("busy")
	// ErrSourceChanged says that the source of WriteStream maps, or holds, something else than in the pass before.
	ErrSourceChanged = errors.New("source changed meanwhile")
	// ErrFailed is returned by every change after a host sync failed: what the host lost is unknown,
	// so nothing more is written (I6). Reads go on. The failure itself is in the chain.
	ErrFailed = errors.New("image failed earlier")
)

// noOffset stands for an absent offset in located errors.
const noOffset = -1

// CorruptError is a place where an image breaks the format. It Is ErrCorrupt.
type CorruptError struct {
	What     string // the structure and the rule that it breaks
	HostOff  int64  // host offset of the structure in bytes, or -1
	GuestOff int64  // guest offset that it maps in bytes, or -1
	Err      error  // the cause below (of a decoder, say), or nil
}

func (e *CorruptError) Error() string {
	s := "corrupt image: " + e.What
	if e.HostOff >= 0 {
		s += fmt.Sprintf(" at host %#x", e.HostOff)
	}
	if e.GuestOff >= 0 {
		s += fmt.Sprintf(" for guest %#x", e.GuestOff)
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Is reports whether target is ErrCorrupt.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// Unwrap returns the cause below, or nil.
func (e *CorruptError) Unwrap() error { return e.Err }

// HeaderError is a field of the header, or of one of its extensions, whose value is not allowed. It
// wraps ErrCorrupt, ErrUnsupported, ErrNotQcow2 (of other formats ErrWrongFormat) or ErrLimit, as the value is against
// the format, or beyond this library, or beyond the caller's limits.
type HeaderError struct {
	Field string // the field's name in the specification, such as "cluster_bits"
	Value any    // what stands there
	Bound string // what would be allowed
	Err   error  // the class
}

func (e *HeaderError) Error() string {
	return fmt.Sprintf("header field %s is %v, want %s: %v", e.Field, formatValue(e.Value), e.Bound, e.Err)
}

// Unwrap returns the class of the error.
func (e *HeaderError) Unwrap() error { return e.Err }

// formatValue shows large integers, which are offsets or masks, in hexadecimal.
func formatValue(v any) string {
	switch v := v.(type) {
	case uint64:
		if v >= 1<<16 {
			return fmt.Sprintf("%#x", v)
		}
	case string:
		return fmt.Sprintf("%q", v)
	}
	return fmt.Sprint(v)
}

// OptionError is an option, or a combination of options, that is refused. It Is ErrOption.
type OptionError struct {
	Option string // the option's name in Go
	Value  any
	Reason string // the bound or the contradiction
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("option %s %v: %s", e.Option, formatValue(e.Value), e.Reason)
}

// Is reports whether target is ErrOption.
func (e *OptionError) Is(target error) bool { return target == ErrOption }

// LimitError is a limit of OpenOptions.Limits that an image would exceed. It Is ErrLimit.
type LimitError struct {
	Limit string // the limit's name in Limits
	Value int64  // what the image asks for
	Max   int64  // the limit in force
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("limit %s is %d, the image needs %d", e.Limit, e.Max, e.Value)
}

// Is reports whether target is ErrLimit.
func (e *LimitError) Is(target error) bool { return target == ErrLimit }

// FileRequiredError says which file an image names that the options give no way to reach. It Is
// ErrBackingRequired.
type FileRequiredError struct {
	Ref  FileRef
	Hint string // which option would answer
}

func (e *FileRequiredError) Error() string {
	return fmt.Sprintf("image needs its %s %q (format %q): set %s", e.Ref.Kind, e.Ref.Name, e.Ref.Format, e.Hint)
}

// Is reports whether target is ErrBackingRequired.
func (e *FileRequiredError) Is(target error) bool { return target == ErrBackingRequired }

// ResolveError is a file name that a resolver refuses. It Is ErrResolve.
type ResolveError struct {
	Ref    FileRef
	Reason string
	Err    error // the cause below, or nil
}

func (e *ResolveError) Error() string {
	s := fmt.Sprintf("resolve %s %q: %s", e.Ref.Kind, e.Ref.Name, e.Reason)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Is reports whether target is ErrResolve.
func (e *ResolveError) Is(target error) bool { return target == ErrResolve }

// Unwrap returns the cause below, or nil.
func (e *ResolveError) Unwrap() error { return e.Err }
