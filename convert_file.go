package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/go-qcow2/qcow2/internal/hostfile"
)

// ConvertFileOptions says what file ConvertFile makes. The nil pointer and the zero value make a qcow2 image with the
// defaults of Create.
type ConvertFileOptions struct {
	ConvertOptions
	// Format is "qcow2" or "raw". Default "qcow2".
	Format string
	// Create says what image is made; it means nothing for "raw". Its Overwrite is not looked at, but the one below.
	Create *CreateOptions
	// Size is the size of the new disk in bytes, a multiple of 512 and at least that of the source. Default: the size
	// of the source, rounded up to a multiple of 512.
	Size int64
	// Overwrite replaces an existing file. Without it such a one is fs.ErrExist.
	Overwrite bool
	// KeepPartial leaves what was written so far after an error, under the name of the file, rather than removing it.
	KeepPartial bool
}

// validate returns all options that are not allowed, joined, or nil.
func (o *ConvertFileOptions) validate() error {
	var errs []error
	if o.Format != "" && o.Format != formatQcow2 && o.Format != formatRaw {
		errs = append(errs, &OptionError{Option: "Format", Value: o.Format, Reason: `must be "qcow2" or "raw"`})
	}
	if o.Size < 0 || o.Size%sectorSize != 0 {
		errs = append(errs, &OptionError{Option: "Size", Value: o.Size, Reason: "must be a multiple of 512, and not negative"})
	}
	return errors.Join(append(errs, o.ConvertOptions.validate())...)
}

// ConvertFile copies the content of src into a new file called name, as Convert does. When it returns, the file and its
// name are durable.
//
// A regular file that exists is replaced at the end, in one step: until the new one is complete and durable it stays as
// it is, and after an error or a crash it still is. Both need space until then. The new file has its permissions, and is
// found under all symbolic links to it; hard links keep the old one. The new file is called name with ".partial-" and a
// number behind it meanwhile, which is what a crash leaves. A device is written where it is.
//
// After an error, or when ctx ends, the file is removed, unless KeepPartial is set. An external data file that
// Create names is not.
//
// Errors: fs.ErrExist if the file exists and Overwrite is not set, ErrLocked if somebody uses it, ErrChain if src is read
// from it, *OptionError, and those of Create, of Convert and of the file system.
func ConvertFile(ctx context.Context, name string, src Disk, opts *ConvertFileOptions) error {
	f := fileConversion{ctx: ctx, src: src, name: name}
	if opts != nil {
		f.o = *opts
	}
	if err := f.run(); err != nil {
		return fmt.Errorf("qcow2: convert to %s: %w", name, err)
	}
	return nil
}

// Names of the formats that ConvertFile makes.
const (
	formatQcow2 = "qcow2"
	formatRaw   = "raw"
)

// fileConversion is one ConvertFile in progress.
type fileConversion struct {
	ctx  context.Context
	src  Disk
	o    ConvertFileOptions
	name string // of the file that comes to be, without symbolic links if it exists
	size int64  // of the new disk

	old *FileStorage // the file that is replaced, or nil; locked
}

// run does all of it.
func (f *fileConversion) run() (err error) {
	if err := f.o.validate(); err != nil {
		return err
	}
	f.size = max(f.o.Size, (f.src.Size()+sectorSize-1)/sectorSize*sectorSize)
	if f.o.Size != 0 && f.o.Size < f.src.Size() {
		return &OptionError{Option: "Size", Value: f.o.Size, Reason: fmt.Sprintf("is less than the source's %d bytes", f.src.Size())}
	}
	if err := f.ctx.Err(); err != nil {
		return err
	}
	fi, err := os.Stat(f.name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return f.make(f.name)
	case err != nil:
		return err
	case !f.o.Overwrite:
		return &fs.PathError{Op: "create", Path: f.name, Err: fs.ErrExist}
	}
	if f.name, err = filepath.EvalSymlinks(f.name); err != nil {
		return err
	}
	if f.old, err = OpenFileStorage(f.name, os.O_RDWR, 0); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.old.Close()) }()
	if diskUses(f.src, []any{f.old.Identity()}) {
		return fmt.Errorf("%w: the source is read from it", ErrChain)
	}
	if f.old.FixedSize() {
		return f.fillDevice()
	}
	if _, err := lockStorage(f.old, LockWriter, LockDefault); err != nil {
		return err
	}
	return f.replace(fi.Mode().Perm())
}

// replace makes the new file beside the old one, and puts it into its place.
//
// Order: the new file is complete and durable, with its permissions; the rename; the directory is synced. A crash
// leaves the old file or the new one under the name, and perhaps the new one beside it.
func (f *fileConversion) replace(mode fs.FileMode) error {
	temp, err := os.CreateTemp(filepath.Dir(f.name), filepath.Base(f.name)+".partial-*")
	if err != nil {
		return err
	}
	partial := temp.Name()
	if err := errors.Join(temp.Close(), os.Remove(partial)); err != nil { // its name is what was wanted
		return err
	}
	err = f.make(partial)
	if err != nil && !f.o.KeepPartial {
		return err
	}
	if _, serr := os.Lstat(partial); serr != nil {
		return err // nothing was begun
	}
	cerr := os.Chmod(partial, mode)
	if cerr == nil {
		cerr = os.Rename(partial, f.name)
	}
	if cerr != nil {
		return errors.Join(err, cerr, os.Remove(partial))
	}
	return errors.Join(err, syncDirOf(f.name))
}

// syncDirOf makes the names in the directory of a file durable, where that can be.
func syncDirOf(name string) error {
	err := hostfile.SyncDir(filepath.Dir(name))
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// make makes the file called name, which does not exist. After an error it is removed, as the options say.
func (f *fileConversion) make(name string) error {
	if f.o.Format == formatRaw {
		return f.makeRaw(name)
	}
	o := createOptionsOf(f.o.Create)
	o.Overwrite = f.o.Overwrite // of a data file; name does not exist
	if o.Open.Name == "" {
		o.Open.Name = filepath.Base(f.name)
	}
	img, err := Create(name, f.size, &o)
	if err != nil {
		return err // the file is removed already
	}
	made, err := img.host.s.(*FileStorage).f.Stat()
	if err == nil {
		err = f.convert(img)
	}
	if err == nil || f.o.KeepPartial {
		err = errors.Join(err, img.Close())
	} else {
		err = errors.Join(err, img.Abandon())
	}
	return f.settle(name, made, err)
}

// makeRaw is make for a raw file.
func (f *fileConversion) makeRaw(name string) error {
	s, err := OpenFileStorage(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	made, err := s.f.Stat()
	if err == nil {
		_, err = lockStorage(s, LockRawWriter, LockDefault)
	}
	if err == nil {
		err = s.Truncate(f.size)
	}
	if err == nil {
		err = f.convertRaw(s)
	}
	return f.settle(name, made, errors.Join(err, s.Close()))
}

// fillDevice writes a device, which cannot be made anew.
func (f *fileConversion) fillDevice() error {
	if f.o.Format == formatRaw {
		if _, err := lockStorage(f.old, LockRawWriter, LockDefault); err != nil {
			return err
		}
		return f.convertRaw(f.old)
	}
	o := createOptionsOf(f.o.Create)
	o.Overwrite = true
	img, err := CreateStorage(f.old, f.size, &o)
	if err != nil {
		return err
	}
	return errors.Join(f.convert(img), img.Close())
}

// convertRaw copies to the raw disk in s.
func (f *fileConversion) convertRaw(s Storage) error {
	d, err := NewRawDisk(s)
	if err != nil {
		return err
	}
	return f.convert(d)
}

// convert copies.
func (f *fileConversion) convert(dst WritableDisk) error {
	c := converter{dst: dst, src: f.src, total: f.src.Size(), opts: f.o.ConvertOptions}
	if err := c.prepare(); err != nil {
		return err
	}
	return c.run(f.ctx)
}

// settle ends the making of a file: after an error it is removed, if it is still the one that was made, else its name
// is made durable.
func (f *fileConversion) settle(name string, made fs.FileInfo, err error) error {
	if err == nil {
		if err = syncDirOf(name); err == nil {
			return nil
		}
	}
	if f.o.KeepPartial {
		return err
	}
	if now, serr := os.Lstat(name); serr == nil && made != nil && os.SameFile(made, now) {
		err = errors.Join(err, os.Remove(name))
	}
	return err
}
