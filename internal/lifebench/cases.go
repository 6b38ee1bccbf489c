package main

import (
	"context"
	"errors"
	"fmt"

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
