package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
)

// sources are the directories whose files fill the file system, in this order.
var sources = []string{"/usr/bin", "/usr/lib", "/usr/share"}

// largestFile is the size in bytes over which a file is left out, so that no single one is the test.
const largestFile = 32 << 20

// errEnough ends the collection of files.
var errEnough = errors.New("enough")

// MakeFileSystem makes an ext4 file system in the file name, from about content bytes of this machine's
// files: the first ones in lexical order. The directory stage is used for copies and removed. It tells w what it took.
func MakeFileSystem(ctx context.Context, w io.Writer, name, stage string, content int64) (err error) {
	mke2fs, err := FindProgram("mke2fs")
	if err != nil {
		return fmt.Errorf("mke2fs is needed (Debian: apt-get install e2fsprogs), or the name of a raw disk as argument: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(stage)) }()
	files, taken := 0, int64(0)
	for _, dir := range sources {
		if err := collect(ctx, dir, filepath.Join(stage, dir), content, &files, &taken); err != nil {
			return err
		}
	}
	if taken == 0 {
		return fmt.Errorf("no files found in %q", sources)
	}
	fmt.Fprintf(w, "%d files, %.1f MiB, from %q\n", files, float64(taken)/(1<<20), sources)

	// Every file takes whole blocks and an inode, and free space is part of a real disk.
	const block, inode = 4096, 256
	blocks := (taken+int64(files)*(block+inode))*5/4/block + 16384
	out, err := exec.CommandContext(ctx, mke2fs, "-q", "-F", "-t", "ext4", "-b", fmt.Sprint(block), "-I", fmt.Sprint(inode),
		"-N", fmt.Sprint(files*2+1024), "-E", "root_owner=0:0", "-d", stage, name, fmt.Sprint(blocks)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", mke2fs, err, out)
	}
	return nil
}

// collect copies regular files and symbolic links below dir to the directory to, until content bytes
// are taken. It adds to files and taken. What cannot be read is left out.
func collect(ctx context.Context, dir, to string, content int64, files *int, taken *int64) error {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err != nil {
			if d != nil && d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(target, 0o755)
		case d.Type() == fs.ModeSymlink:
			link, err := os.Readlink(path)
			if err != nil {
				return nil
			}
			*files++
			return os.Symlink(link, target)
		case !d.Type().IsRegular():
			return nil
		}
		fi, err := d.Info()
		if err != nil || fi.Size() > largestFile {
			return nil
		}
		if *taken+fi.Size() > content {
			return errEnough
		}
		n, err := copyFile(target, path)
		if errors.Is(err, fs.ErrPermission) {
			return nil
		}
		*files++
		*taken += n
		return err
	})
	if err == errEnough {
		return nil
	}
	return err
}

// copyFile copies the file src to dst, which must not exist, and returns its length in bytes.
func copyFile(dst, src string) (n int64, err error) {
	in, err := os.Open(src)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return 0, err
	}
	n, err = io.Copy(out, in)
	return n, errors.Join(err, out.Close())
}

// FindProgram returns where a program is, also if that is where only root looks.
func FindProgram(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", err
}
