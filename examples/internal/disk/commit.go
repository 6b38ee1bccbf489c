package disk

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/go-qcow2/qcow2"
)

// ErrNoBase says that an image has no such backing file.
var ErrNoBase = errors.New("not in the backing chain")

// Commit writes what the named qcow2 image holds into its backing file, or into the one called base, if that is not
// empty, of those below it. base is the name as it stands in an image, or any name of the file. The files that the images
// name are opened wherever they are.
func Commit(ctx context.Context, name, base string, o qcow2.CommitOptions) (err error) {
	files := &localFiles{}
	img, err := qcow2.Open(name, &qcow2.OpenOptions{ReadWrite: true, Name: name, Resolver: files})
	if err != nil {
		return fmt.Errorf("could not open '%s': %w", name, err)
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	if base != "" && img.Backing() != nil {
		if o.Depth = depthOf(img, base, files.backing); o.Depth == 0 {
			return fmt.Errorf("'%s': %w of '%s'", base, ErrNoBase, name)
		}
	}
	return img.Commit(ctx, &o)
}

// depthOf returns how many levels below img the file base lies, or 0. paths are the names by which the files below were
// opened.
func depthOf(img *qcow2.Image, base string, paths []string) int {
	fi, _ := os.Stat(base) // a name in an image need not be that of a file from here
	for i, path := range paths {
		if img != nil && img.Info().BackingFile == base {
			return i + 1
		}
		if other, err := os.Stat(path); err == nil && fi != nil && os.SameFile(fi, other) {
			return i + 1
		}
		if img != nil {
			img, _ = img.Backing().(*qcow2.Image)
		}
	}
	return 0
}
