package qcow2

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkWriteStream streams a raw file whose content shrinks, all of it data; beside it the same bytes are copied as
// they are.
func BenchmarkWriteStream(b *testing.B) {
	const size = 128 << 20
	s, err := OpenFileStorage(filepath.Join(benchDir(b), "raw"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	fillDisk(b, s, size)
	raw, err := NewRawDisk(s)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("copy", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{io.NewSectionReader(s, 0, size)}, make([]byte, streamChunk)); n != size {
				b.Fatal(n, err)
			}
		}
	})
	for _, mode := range streamModes {
		b.Run(mode.name, func(b *testing.B) {
			o := &StreamOptions{Create: &CreateOptions{}}
			mode.set(o)
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := WriteStream(context.Background(), io.Discard, raw, o); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
