package disk

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/go-qcow2/qcow2"
)

// InPlace is a file that is made a qcow2 image in place.
type InPlace struct {
	// Length is that of the source in bytes. The file is longer where a conversion was interrupted.
	Length  int64
	name    string
	storage *qcow2.FileStorage
	closers []func() error
}

// OpenInPlace opens the named file. length is that of the source in bytes where a conversion was interrupted, or -1.
func OpenInPlace(name string, length int64) (*InPlace, error) {
	s, err := qcow2.OpenFileStorage(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	p := &InPlace{name: name, storage: s, Length: length, closers: []func() error{s.Close}}
	if length < 0 {
		if p.Length, err = s.Size(); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return p, nil
}

// Close closes the file, and those that its source names.
func (p *InPlace) Close() error {
	var err error
	for i := len(p.closers); i > 0; i-- {
		err = errors.Join(err, p.closers[i-1]())
	}
	return err
}

// Detect returns the format of the source, as Detect does of a file.
func (p *InPlace) Detect() (string, error) { return detect(qcow2.NewSourceView(p.storage, p.Length)) }

// open opens the source as opts say, and fills in the backing file of a QED image, which becomes the new image's.
func (p *InPlace) open(opts Options, to *qcow2.InPlaceOptions) (qcow2.Layout, error) {
	view := qcow2.NewSourceView(p.storage, p.Length)
	if opts.Format == Raw {
		return newRaw(view)
	}
	if !IsForeign(opts.Format) {
		return nil, fmt.Errorf("a %s image is not converted in place", opts.Format)
	}
	d, err := qcow2.OpenForeign(view, qcow2.ForeignFormat(opts.Format), opts.open(p.name, &localFiles{}))
	if err != nil {
		return nil, err
	}
	p.closers = append(p.closers, d.Close)
	info := d.Info()
	if to.BackingFile == "" && info.BackingFile != "" {
		to.BackingFile, to.BackingFormat = info.BackingFile, info.BackingFormat
		if opts.BackingFormat != "" {
			to.BackingFormat = opts.BackingFormat
		}
	}
	return d, nil
}

// Convert makes the file an image. Its source is as opts say.
func (p *InPlace) Convert(ctx context.Context, opts Options, to qcow2.InPlaceOptions) error {
	src, err := p.open(opts, &to)
	if err != nil {
		return fmt.Errorf("could not open '%s': %w", p.name, err)
	}
	return qcow2.ConvertInPlace(ctx, p.storage, src, &to)
}

// Inspect tells what an interrupted conversion has left.
func (p *InPlace) Inspect(ctx context.Context) (qcow2.InPlaceState, error) {
	return qcow2.InspectInPlace(ctx, p.storage, p.Length)
}

// Resume ends an interrupted conversion, which was found in a state.
func (p *InPlace) Resume(ctx context.Context, found qcow2.InPlaceState, opts Options, to qcow2.InPlaceOptions) (err error) {
	var src qcow2.Layout // of the finished image there is none
	if found == qcow2.InPlaceIncomplete || found == qcow2.InPlaceComplete {
		if src, err = p.open(opts, &to); err != nil {
			return fmt.Errorf("could not open '%s': %w", p.name, err)
		}
	}
	_, err = qcow2.ResumeInPlace(ctx, p.storage, src, p.Length, &to)
	return err
}

// Rollback makes the file what it was before an interrupted conversion.
func (p *InPlace) Rollback(ctx context.Context) error {
	_, err := qcow2.RollbackInPlace(ctx, p.storage, p.Length)
	return err
}
