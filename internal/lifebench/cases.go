package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/go-qcow2/qcow2"
)

// benchCases are the cases, in the order of the table.
func benchCases() []benchCase {
	return []benchCase{
		{
			name: "create 2 GiB, 512-byte clusters, metadata", want: 100, rounds: 1, slow: true,
			ours:   create(2<<30, qcow2.CreateOptions{ClusterSize: 512, Preallocation: qcow2.PreallocationMetadata}),
			theirs: []string{"create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=512", "FILE", "2G"},
		},
		{
			name: "create 1 TiB, 64 KiB clusters, metadata", want: 5, rounds: 3,
			ours:   create(1<<40, qcow2.CreateOptions{Preallocation: qcow2.PreallocationMetadata}),
			theirs: []string{"create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "FILE", "1T"},
		},
		{
			name: "create 1 TiB, 128 KiB clusters with subclusters, metadata", rounds: 3,
			ours:   create(1<<40, qcow2.CreateOptions{ClusterSize: 128 << 10, ExtendedL2: true, Preallocation: qcow2.PreallocationMetadata}),
			theirs: []string{"create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=128k,extended_l2=on", "FILE", "1T"},
		},
		{
			name: "create 512 MiB, full", rounds: 3,
			ours:   create(512<<20, qcow2.CreateOptions{Preallocation: qcow2.PreallocationFull}),
			theirs: []string{"create", "-q", "-f", "qcow2", "-o", "preallocation=full", "FILE", "512M"},
		},
		{
			name: "grow 1 MiB to 1 TiB, metadata", rounds: 3, prepare: ready(1<<20, qcow2.CreateOptions{}),
			ours:   resize(1<<40, qcow2.ResizeOptions{Preallocation: qcow2.PreallocationMetadata}),
			theirs: []string{"resize", "-q", "-f", "qcow2", "--preallocation=metadata", "FILE", "1T"},
		},
		{
			name: "grow 1 MiB to 512 MiB, 512-byte clusters, metadata", rounds: 3, prepare: ready(1<<20, qcow2.CreateOptions{ClusterSize: 512}),
			ours:   resize(512<<20, qcow2.ResizeOptions{Preallocation: qcow2.PreallocationMetadata}),
			theirs: []string{"resize", "-q", "-f", "qcow2", "--preallocation=metadata", "FILE", "512M"},
		},
		{
			name: "shrink 1 TiB of mapped clusters to 1 MiB", rounds: 1, slow: true,
			prepare: ready(1<<40, qcow2.CreateOptions{Preallocation: qcow2.PreallocationMetadata}),
			ours:    resize(1<<20, qcow2.ResizeOptions{Shrink: true}),
			theirs:  []string{"resize", "-q", "-f", "qcow2", "--shrink", "FILE", "1M"},
		},
		{
			name: "rebase past the middle of a chain, 1 GiB below, 64 MiB in the middle", rounds: 5, prepare: chain(1<<30, 64<<20),
			ours:   rebase("base"),
			theirs: []string{"rebase", "-f", "qcow2", "-b", "base", "-F", "qcow2", "FILE"},
		},
		{
			name: "rebase to a copy of 256 MiB", rounds: 5, prepare: chain(256<<20, 1<<20),
			ours:   rebase("copy"),
			theirs: []string{"rebase", "-f", "qcow2", "-b", "copy", "-F", "qcow2", "FILE"},
		},
		{
			name: "commit 256 MiB", rounds: 5, prepare: chain(256<<20, 256<<20),
			ours: func(string) error {
				img, err := qcow2.Open("middle", &qcow2.OpenOptions{ReadWrite: true, Resolver: qcow2.ResolveBeside(".")})
				if err != nil {
					return err
				}
				return errors.Join(img.Commit(context.Background(), &qcow2.CommitOptions{}), img.Close())
			},
			theirs: []string{"commit", "-q", "-f", "qcow2", "middle"},
		},
	}
}

// chain returns the creation of an image on a middle on a base, and of a copy of the base. The base holds size bytes, and
// the middle, which is as large, some other ones at the beginning.
func chain(size, middle int) func() error {
	return func() error {
		data := make([]byte, size)
		rand.NewChaCha8([32]byte{1}).Read(data)
		for _, f := range []struct {
			name, on string
			data     []byte
		}{{"base", "", data}, {"copy", "", data}, {"middle", "base", data[size-middle:]}, {"image", "middle", data[:1<<20]}} {
			o := &qcow2.CreateOptions{BackingFile: f.on, Open: &qcow2.OpenOptions{Resolver: qcow2.ResolveBeside(".")}}
			if f.on != "" {
				o.BackingFormat = "qcow2"
			}
			img, err := qcow2.Create(f.name, int64(size), o)
			if err != nil {
				return err
			}
			_, err = img.WriteAt(f.data, 0)
			if err := errors.Join(err, img.Close()); err != nil {
				return err
			}
		}
		return nil
	}
}

// rebase returns the rebase of an image to a file beside it.
func rebase(to string) func(name string) error {
	return func(name string) error {
		beside := qcow2.ResolveBeside(".")
		img, err := qcow2.Open(name, &qcow2.OpenOptions{ReadWrite: true, Resolver: beside})
		if err != nil {
			return err
		}
		o := &qcow2.RebaseOptions{BackingFile: to, BackingFormat: "qcow2", Resolver: beside}
		return errors.Join(img.Rebase(context.Background(), o), img.Close())
	}
}

// create returns the creation of an image.
func create(size int64, o qcow2.CreateOptions) func(name string) error {
	return func(name string) error {
		img, err := qcow2.Create(name, size, &o)
		if err != nil {
			return err
		}
		return img.Close()
	}
}

// ready returns the creation of the image that a case works on.
func ready(size int64, o qcow2.CreateOptions) func() error {
	return func() error { return create(size, o)("image") }
}

// resize returns a resize of an image.
func resize(size int64, o qcow2.ResizeOptions) func(name string) error {
	return func(name string) error {
		img, err := qcow2.Open(name, &qcow2.OpenOptions{ReadWrite: true})
		if err != nil {
			return err
		}
		if err := img.Resize(context.Background(), size, &o); err != nil {
			return errors.Join(fmt.Errorf("resize: %w", err), img.Close())
		}
		return img.Close()
	}
}
