package qcow2

import (
	"context"
	"os"
	"testing"
)

func BenchmarkSnapProf(b *testing.B) {
	name := os.Getenv("SNAPIMG")
	for range b.N {
		img, err := Open(name, &OpenOptions{ReadWrite: true})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := img.CreateSnapshot(context.Background(), &SnapshotOptions{Name: "x"}); err != nil {
			b.Fatal(err)
		}
		if os.Getenv("SNAPAPPLY") != "" {
			if err := img.ApplySnapshot(context.Background(), SnapshotRef{Name: "x"}); err != nil {
				b.Fatal(err)
			}
		}
		if err := img.DeleteSnapshot(context.Background(), SnapshotRef{Name: "x"}); err != nil {
			b.Fatal(err)
		}
		if err := img.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
