// Package disk opens, creates and converts disks in files, for the programs beside it: qcow2 images
// and raw files, and, for reading, images of other formats, told apart by a format's name.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-qcow2/qcow2"
)

// Names of the formats.
const (
	Raw   = "raw"
	QCOW2 = "qcow2"

	QED = string(qcow2.ForeignQED) // read only, as those below
	VHD = string(qcow2.ForeignVHD)
	VDI = string(qcow2.ForeignVDI)
)

// IsForeign reports whether the format is one that is read only.
func IsForeign(format string) bool { return format == QED || format == VHD || format == VDI }

// sector is the unit of a disk's size in bytes.
const sector = 512

// RoundUp returns size rounded up to whole sectors. Preconditions: size is at most MaxSize.
func RoundUp(size int64) int64 { return (size + sector - 1) &^ (sector - 1) }

// MaxSize is the largest size of a disk in bytes.
const MaxSize = 1<<63 - sector

// Detect returns the format of the named file as its magic tells, which is in its first bytes or, of a fixed VHD, in
// its last ones; Raw if none is there. Whoever wrote the file chooses the answer, so an image that was found in this
// way is opened without the files that it names.
func Detect(name string) (format string, err error) {
	s, err := qcow2.OpenFileStorage(name, os.O_RDONLY, 0)
	if err != nil {
		return "", err
	}
	defer s.Close()
	return detect(s)
}

// detect is Detect for an open file.
func detect(s qcow2.Storage) (string, error) {
	size, err := s.Size()
	if err != nil {
		return "", err
	}
	var hostErr *fs.PathError
	switch _, err := qcow2.Inspect(s, size, nil); {
	case errors.Is(err, qcow2.ErrNotQcow2):
		f, err := qcow2.DetectForeign(s, size)
		if errors.Is(err, qcow2.ErrWrongFormat) {
			return Raw, nil
		}
		return string(f), err
	case errors.As(err, &hostErr):
		return "", err
	default:
		return QCOW2, nil // broken ones included: opening it says what is wrong
	}
}

// Options says how a disk is opened for reading.
type Options struct {
	Format string // Raw, QCOW2, QED, VHD or VDI
	Follow bool   // open the backing and data files that an image names, wherever they are
	Share  bool   // read beside a writer (qemu-img's -U)

	BackingFormat string // of the backing file; "" if the image tells

	Snapshot *qcow2.SnapshotRef // the internal snapshot that is meant; nil: the disk itself
}

// Disk is an open disk.
type Disk struct {
	qcow2.Disk
	Files   []string // the files of the chain by depth; Files[0] is the disk's own
	closers []func() error
}

// Close closes the disk, and returns the first error.
func (d *Disk) Close() error {
	var first error
	for _, c := range d.closers {
		if err := c(); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// Open opens the named disk for reading.
func Open(name string, opts Options) (*Disk, error) {
	switch opts.Format {
	case Raw:
		if opts.Snapshot != nil {
			return nil, errors.New("a raw file has no snapshots")
		}
		return openRaw(name, opts)
	case QCOW2:
		return openImage(name, opts)
	case QED, VHD, VDI:
		if opts.Snapshot != nil {
			return nil, fmt.Errorf("snapshots of a %s image are not supported", opts.Format)
		}
		return openForeign(name, opts)
	}
	return nil, fmt.Errorf("unknown format %q", opts.Format)
}

// lock takes the image lock of a role on s. Where there are no locks, there are no others to exclude.
func lock(s qcow2.Storage, role qcow2.LockRole) error {
	if err := s.Lock(role); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// openRaw is Open for a raw file.
func openRaw(name string, opts Options) (*Disk, error) {
	s, err := qcow2.OpenFileStorage(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	role := qcow2.LockRawReader
	if opts.Share {
		role = qcow2.LockShared
	}
	if err := lock(s, role); err != nil {
		s.Close()
		return nil, err
	}
	raw, err := newRaw(s)
	if err != nil {
		s.Close()
		return nil, err
	}
	return &Disk{Disk: raw, Files: []string{name}, closers: []func() error{s.Close}}, nil
}

// open returns how the library opens the named image, with the files that it names.
func (o *Options) open(name string, files *localFiles) *qcow2.OpenOptions {
	open := &qcow2.OpenOptions{Name: name, BackingFormat: o.BackingFormat}
	if o.Share {
		open.Lock = qcow2.LockShare
	}
	if o.Follow {
		open.Resolver = files
	}
	return open
}

// openForeign is Open for an image of a format that is read only.
func openForeign(name string, opts Options) (*Disk, error) {
	s, err := qcow2.OpenFileStorage(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	files := &localFiles{}
	d, err := qcow2.OpenForeign(s, qcow2.ForeignFormat(opts.Format), opts.open(name, files))
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return &Disk{Disk: d, Files: append([]string{name}, files.backing...), closers: []func() error{d.Close, s.Close}}, nil
}

// openImage is Open for a qcow2 image.
func openImage(name string, opts Options) (*Disk, error) {
	files := &localFiles{}
	img, err := qcow2.Open(name, opts.open(name, files))
	if err != nil {
		return nil, err
	}
	// The guest data of an image with a data file is there.
	all := append([]string{name}, files.backing...)
	if files.data != "" {
		all[0] = files.data
	}
	d := &Disk{Disk: img, Files: all, closers: []func() error{img.Close}}
	if opts.Snapshot != nil {
		s, err := img.OpenSnapshot(*opts.Snapshot)
		if err != nil {
			return nil, errors.Join(err, img.Close())
		}
		d.Disk, d.closers = s, []func() error{s.Close, img.Close}
	}
	return d, nil
}

// localFiles is a Resolver that opens any file of this machine that the user may: for images whose
// origin the user vouches for. It notes what it opened. It is used by one open at a time.
type localFiles struct {
	create  bool     // make data files that do not exist
	backing []string // backing files in their order
	data    string   // the data file of the image itself
}

// Resolve implements qcow2.Resolver. Names with a protocol are refused.
func (l *localFiles) Resolve(ref qcow2.FileRef) (qcow2.Storage, error) {
	if first, _, _ := strings.Cut(ref.Name, "/"); strings.Contains(first, ":") && !filepath.IsAbs(ref.Name) {
		return nil, &qcow2.ResolveError{Ref: ref, Reason: "the name begins with a protocol"}
	}
	flag := os.O_RDONLY
	if ref.Writable {
		flag = os.O_RDWR
		if l.create && ref.Kind == qcow2.KindData {
			flag |= os.O_CREATE
		}
	}
	name := BesideImage(ref.Image, ref.Name)
	s, err := qcow2.OpenFileStorage(name, flag, 0o644)
	if err != nil {
		return nil, &qcow2.ResolveError{Ref: ref, Reason: "cannot open it", Err: err}
	}
	if ref.Kind == qcow2.KindBacking {
		l.backing = append(l.backing, name)
	} else if len(l.backing) == 0 {
		l.data = name
	}
	return s, nil
}

// BesideImage returns the name of a file that an image names, relative to what the image's own name is
// relative to.
func BesideImage(image, name string) string {
	first, _, _ := strings.Cut(name, "/")
	if filepath.IsAbs(name) || strings.HasPrefix(name, "/") || strings.Contains(first, ":") {
		return name
	}
	return image[:len(image)-len(filepath.Base(image))] + name
}

// Create creates a qcow2 image with a disk of size bytes, replacing an existing file, and opens it for
// writing. Backing and data files are found by their names, and a data file is made.
func Create(name string, size int64, opts qcow2.CreateOptions) (*qcow2.Image, error) {
	opts.Overwrite = true
	opts.Open = &qcow2.OpenOptions{
		Name:      name,
		NoBacking: true,
		Resolver:  &localFiles{create: true},
	}
	return qcow2.Create(name, size, &opts)
}

// CreateRaw creates a raw file of size zeros, replacing the content of an existing one. The caller
// closes it. On a block device the zeros are written.
func CreateRaw(name string, size int64) (s *qcow2.FileStorage, err error) {
	s, err = qcow2.OpenFileStorage(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Close()
			s = nil
		}
	}()
	// The lock comes first: what another process uses is not emptied.
	if err := lock(s, qcow2.LockRawWriter); err != nil {
		return s, err
	}
	if s.FixedSize() {
		if have, err := s.Size(); err != nil || have < size {
			return s, errors.Join(err, fmt.Errorf("%s holds %d bytes, the disk needs %d", name, have, size))
		}
		return s, s.WriteZeroes(0, size)
	}
	if err := s.Truncate(0); err != nil {
		return s, err
	}
	return s, s.Truncate(size)
}

// Target says what Convert writes.
type Target struct {
	Name     string
	Format   string               // Raw or QCOW2
	Create   qcow2.CreateOptions  // for QCOW2
	Options  qcow2.ConvertOptions // how it is written
	Existing bool                 // write into the disk that is there
}

// Convert writes the disk src into a new file, which takes the place of an existing one when it is complete, or into the
// disk that is there.
func Convert(ctx context.Context, src *Disk, to Target) error {
	if err := differ(to.Name, src.Files); err != nil {
		return err
	}
	if to.Existing {
		return convertInto(ctx, src, to)
	}
	to.Create.Open = &qcow2.OpenOptions{Name: to.Name, Resolver: &localFiles{create: true}}
	return qcow2.ConvertFile(ctx, to.Name, src, &qcow2.ConvertFileOptions{
		ConvertOptions: to.Options,
		Format:         to.Format,
		Create:         &to.Create,
		Overwrite:      true,
	})
}

// ErrSmaller says that a target has no room for the source.
var ErrSmaller = errors.New("output file is smaller than input file")

// convertInto is Convert into the disk that is there.
func convertInto(ctx context.Context, src *Disk, to Target) (err error) {
	var dst qcow2.WritableDisk
	if to.Format == QCOW2 {
		img, err := qcow2.Open(to.Name, &qcow2.OpenOptions{ReadWrite: true, Name: to.Name, Resolver: LocalFiles()})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, img.Close()) }()
		dst = img
	} else {
		s, err := qcow2.OpenFileStorage(to.Name, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		if err := lock(s, qcow2.LockRawWriter); err != nil {
			return err
		}
		if dst, err = newRaw(s); err != nil {
			return err
		}
	}
	if dst.Size() < src.Size() {
		return ErrSmaller
	}
	to.Options.KeepRest = true
	return qcow2.Convert(ctx, dst, src, &to.Options)
}

// differ refuses a target that is one of the files that are read.
func differ(target string, files []string) error {
	fi, err := os.Stat(target)
	if err != nil {
		return nil // it does not exist yet, or creating it says why not
	}
	for _, name := range files {
		if other, err := os.Stat(name); err == nil && os.SameFile(fi, other) {
			return fmt.Errorf("%s is read and cannot be written", target)
		}
	}
	return nil
}
