package qcow2

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/go-qcow2/qcow2/internal/hostfile"
)

// Names of images. FileRef.Image is the name of the image that holds a reference, as the Resolver
// knows it: of the image that the caller opened, OpenOptions.Name or else the last element of the name
// given to Open; of an image that came from a Resolver, the FileRef.Path by which it came. So a chain
//
//	top.qcow2 -> sub/mid.qcow2 -> base.qcow2
//
// asks for {top.qcow2, sub/mid.qcow2}, then {sub/mid.qcow2, base.qcow2}, which is sub/base.qcow2.

// Path returns the name of the file that r refers to, relative to what the name of the image is
// relative to: the file's name, as seen from the directory of the image. A name that is absolute or
// has a protocol is itself. It is a name only: whether it may be opened is for a Resolver to say.
func (r FileRef) Path() string {
	if r.Name == "" || hasProtocol(r.Name) || path.IsAbs(r.Name) || filepath.IsAbs(r.Name) {
		return r.Name
	}
	return path.Join(path.Dir(filepath.ToSlash(r.Image)), r.Name)
}

// hasProtocol reports whether the first element of a name holds a colon, by which QEMU takes what is
// before it for a protocol: nbd:host:1, json:{...}, and c:\x as well.
func hasProtocol(name string) bool {
	i := strings.IndexAny(name, ":/")
	return i >= 0 && name[i] == ':'
}

// ResolveBeside returns a Resolver that opens files in the directory dir and below it only, meant for
// images that lie in dir and come from strangers. A name in an image counts from the directory of that
// image, never from the working directory; FileRef.Image counts from dir, unless it is absolute.
//
// It takes relative names of regular files. It refuses, each with its own reason in a *ResolveError
// and before anything is opened: an empty name, NUL bytes, json: and every other protocol, absolute
// names, any "..", symbolic links that lead out of dir, and what is not a regular file. Files are opened for
// writing if that is wanted: data files of an image that is, and backing files by Commit alone. The storages are
// *FileStorage, unlocked.
func ResolveBeside(dir string) Resolver {
	abs, err := filepath.Abs(dir)
	return &besideResolver{dir: abs, err: err}
}

// besideResolver is the Resolver of ResolveBeside. It is immutable and holds nothing open.
type besideResolver struct {
	dir string // absolute name of the directory
	err error  // why dir could not be made absolute, or nil
}

// Resolve implements Resolver.
func (b *besideResolver) Resolve(ref FileRef) (Storage, error) {
	refuse := func(reason string, err error) (Storage, error) {
		return nil, &ResolveError{Ref: ref, Reason: reason, Err: err}
	}
	if b.err != nil {
		return refuse("the directory has no absolute name", b.err)
	}
	if reason := refuseName(ref.Name); reason != "" {
		return refuse(reason, nil)
	}
	imageDir, ok := b.imageDir(ref.Image)
	if !ok {
		return refuse("the image that names it lies outside the directory", nil)
	}
	name, err := filepath.Localize(path.Join(imageDir, ref.Name))
	if err != nil {
		return refuse("no file can have this name here", err)
	}

	root, err := os.OpenRoot(b.dir)
	if err != nil {
		return refuse("the directory cannot be opened", err)
	}
	defer root.Close()
	fail := func(err error) (Storage, error) {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return refuse("no such file", err)
		case isEscape(root, err):
			return refuse("a symbolic link leads out of the directory", err)
		}
		return refuse("the file cannot be opened", err)
	}
	// To open some devices and FIFOs is an event for those on their other side, so look first.
	fi, err := root.Stat(name)
	if err != nil {
		return fail(err)
	}
	if !fi.Mode().IsRegular() {
		return refuse("not a regular file", &FileTypeError{Name: name, Mode: fi.Mode()})
	}
	flag := os.O_RDONLY
	if ref.Writable {
		flag = os.O_RDWR
	}
	f, err := root.OpenFile(name, flag|hostfile.OpenNonblock, 0)
	if err != nil {
		return fail(err)
	}
	s, err := newRegularStorage(f)
	if err != nil {
		f.Close()
		return refuse("not a regular file", err)
	}
	return s, nil
}

// newRegularStorage is NewFileStorage for regular files alone: f may be another file than was looked at.
func newRegularStorage(f *os.File) (*FileStorage, error) {
	s, err := NewFileStorage(f)
	if err != nil {
		return nil, err
	}
	if s.device {
		return nil, &FileTypeError{Name: f.Name(), Mode: fs.ModeDevice}
	}
	return s, nil
}

// imageDir returns the directory of the named image, relative to the resolver's, with slashes, and
// whether it lies inside.
func (b *besideResolver) imageDir(image string) (dir string, ok bool) {
	if filepath.IsAbs(image) {
		rel, err := filepath.Rel(b.dir, image)
		if err != nil {
			return "", false
		}
		image = rel
	}
	dir = path.Dir(filepath.ToSlash(image))
	return dir, fs.ValidPath(dir)
}

// refuseName returns why a name from an image is not one of a file beside it, or "".
func refuseName(name string) string {
	slashed := filepath.ToSlash(name)
	switch {
	case name == "":
		return "the name is empty"
	case strings.ContainsRune(name, 0):
		return "the name holds a NUL byte"
	case strings.HasPrefix(name, "json:"):
		return "the name is a json: description"
	case hasProtocol(slashed):
		return "the name begins with a protocol"
	case path.IsAbs(slashed) || filepath.IsAbs(name):
		return "the name is absolute"
	}
	for element := range strings.SplitSeq(slashed, "/") {
		if element == ".." {
			return `the name holds ".."`
		}
	}
	return ""
}

// isEscape reports whether err is how os.Root refuses to leave the directory. Package os does not
// export that error, so one is made to compare with.
func isEscape(root *os.Root, err error) bool {
	_, escape := root.Lstat("..")
	var want *fs.PathError
	return errors.As(escape, &want) && errors.Is(err, want.Err)
}

// ResolverMap is a Resolver that gives out storages by the names that stand in the images. Of a name
// that it lacks it returns a *ResolveError that wraps fs.ErrNotExist.
//
// The storages stay the caller's, who closes them after the images: to close what was given out
// gives back no more than the lock that was taken through it. A storage that has a lock of its own,
// such as a FileStorage, has that one however often it is given out, so it serves one open chain at a
// time.
type ResolverMap map[string]Storage

// Resolve implements Resolver.
func (m ResolverMap) Resolve(ref FileRef) (Storage, error) {
	s := m[ref.Name]
	if s == nil {
		return nil, &ResolveError{Ref: ref, Reason: "not in the map", Err: fs.ErrNotExist}
	}
	return &lentStorage{Storage: s}, nil
}

// lentStorage is a storage whose Close leaves it open.
type lentStorage struct {
	Storage
	locked bool // whether a lock was taken through this one
}

// Lock implements Storage.
func (s *lentStorage) Lock(role LockRole) error {
	err := s.Storage.Lock(role)
	s.locked = s.locked || err == nil
	return err
}

// Unlock implements Storage.
func (s *lentStorage) Unlock() error {
	s.locked = false
	return s.Storage.Unlock()
}

// Close implements Storage by giving back the lock that was taken through s.
func (s *lentStorage) Close() error {
	if !s.locked {
		return nil
	}
	return s.Unlock()
}
