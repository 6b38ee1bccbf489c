package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"

	"github.com/go-qcow2/qcow2"
)

// check ends an example after an error.
func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// An image on a storage in memory: a virtual disk for a test.
func Example() {
	s := qcow2.NewMemoryStorage()
	img, err := qcow2.CreateStorage(s, 1<<30, nil)
	check(err)
	_, err = img.WriteAt([]byte("hello"), 512<<20)
	check(err)
	check(img.Close())

	img, err = qcow2.OpenStorage(s, nil) // read-only, as os.Open
	check(err)
	p := make([]byte, 5)
	_, err = img.ReadAt(p, 512<<20)
	check(err)
	n, err := s.Size()
	check(err)
	fmt.Printf("%s, a disk of %d bytes in %d\n", p, img.Size(), n)
	check(img.Close())
	// Output: hello, a disk of 1073741824 bytes in 393216
}

// A new image with options, and what Info tells of it.
func ExampleCreateStorage() {
	img, err := qcow2.CreateStorage(qcow2.NewMemoryStorage(), 10<<30, &qcow2.CreateOptions{
		ClusterSize: 128 << 10,
		ExtendedL2:  true,
		Compression: qcow2.CompressionZstd,
	})
	check(err)
	defer img.Close()
	info := img.Info()
	fmt.Println(info.Version, info.ClusterSize, info.SubclusterSize, info.Compression)
	// Output: 3 131072 4096 zstd
}

// An overlay: what it does not hold itself is read from the image below.
func ExampleOpenOptions_backing() {
	base, err := qcow2.CreateStorage(qcow2.NewMemoryStorage(), 1<<20, nil)
	check(err)
	defer base.Close()
	_, err = base.WriteAt([]byte("from below"), 0)
	check(err)

	top, err := qcow2.CreateStorage(qcow2.NewMemoryStorage(), 1<<20, &qcow2.CreateOptions{
		BackingFile:   "base.qcow2",
		BackingFormat: "qcow2",
		Open:          &qcow2.OpenOptions{Backing: base},
	})
	check(err)
	defer top.Close()
	_, err = top.WriteAt([]byte("FROM"), 0)
	check(err)
	p := make([]byte, 10)
	_, err = top.ReadAt(p, 0)
	check(err)
	fmt.Printf("%s\n", p)
	// Output: FROM below
}

// An image from a stranger that names another file is not followed.
func ExampleOpenStorage_untrusted() {
	s := qcow2.NewMemoryStorage()
	img, err := qcow2.CreateStorage(s, 1<<20, &qcow2.CreateOptions{BackingFile: "/etc/passwd", BackingFormat: "raw"})
	check(err)
	check(img.Close())

	_, err = qcow2.OpenStorage(s, nil)
	var required *qcow2.FileRequiredError
	if errors.As(err, &required) {
		fmt.Println(required.Ref.Kind, required.Ref.Name, required.Ref.Format)
	}
	// Output: backing file /etc/passwd raw
}

// Where an image holds data.
func ExampleImage_Extents() {
	img, err := qcow2.CreateStorage(qcow2.NewMemoryStorage(), 1<<20, nil)
	check(err)
	defer img.Close()
	_, err = img.WriteAt(make([]byte, 100), 200_000)
	check(err)
	for e, err := range img.Extents(0, img.Size()) {
		check(err)
		fmt.Println(e.Off, e.Len, e.Kind)
	}
	// Output:
	// 0 196608 unallocated
	// 196608 65536 data
	// 262144 786432 unallocated
}

// A raw disk becomes a compressed image.
func ExampleConvert() {
	raw := qcow2.NewMemoryStorage()
	_, err := raw.WriteAt(make([]byte, 1<<20), 0)
	check(err)
	_, err = raw.WriteAt([]byte("content"), 123_456)
	check(err)
	src, err := qcow2.NewRawDisk(raw)
	check(err)

	dst, err := qcow2.CreateStorage(qcow2.NewMemoryStorage(), src.Size(), nil)
	check(err)
	defer dst.Close()
	check(qcow2.Convert(context.Background(), dst, src, &qcow2.ConvertOptions{Compress: true}))
	for e, err := range dst.Extents(0, dst.Size()) {
		check(err)
		fmt.Println(e.Off, e.Len, e.Kind)
	}
	// Output:
	// 0 65536 unallocated
	// 65536 65536 compressed
	// 131072 917504 unallocated
}

// A disk goes, compressed, to a writer that cannot seek, such as a pipe or an upload.
func ExampleWriteStream() {
	raw := qcow2.NewMemoryStorage()
	_, err := raw.WriteAt([]byte("content"), 1<<20)
	check(err)
	src, err := qcow2.NewRawDisk(raw)
	check(err)

	r, w := io.Pipe()
	go func() {
		_, err := qcow2.WriteStream(context.Background(), w, src, &qcow2.StreamOptions{Compress: true})
		w.CloseWithError(err)
	}()
	image, err := io.ReadAll(r)
	check(err)

	img, err := qcow2.OpenReader(bytes.NewReader(image), int64(len(image)), nil)
	check(err)
	defer img.Close()
	p := make([]byte, 7)
	_, err = img.ReadAt(p, 1<<20)
	check(err)
	fmt.Printf("%s in %d bytes\n", p, len(image))
	// Output: content in 393216 bytes
}

// The length of an upload is known before it begins.
func ExampleStreamSize() {
	raw := qcow2.NewMemoryStorage()
	_, err := raw.WriteAt([]byte("content"), 10<<30)
	check(err)
	src, err := qcow2.NewRawDisk(raw)
	check(err)

	n, err := qcow2.StreamSize(context.Background(), src, nil)
	check(err)
	body, w := io.Pipe()
	go func() {
		_, err := qcow2.WriteStream(context.Background(), w, src, nil)
		w.CloseWithError(err)
	}()
	// With net/http, body is the body of the request and n its ContentLength.
	sent, err := io.Copy(io.Discard, body)
	check(err)
	fmt.Println(n, sent)
	// Output: 393216 393216
}

// A raw disk becomes an image in its own file: the data stays where it is.
func ExampleConvertInPlace() {
	s := qcow2.NewMemoryStorage()
	_, err := s.WriteAt([]byte("hello"), 3<<20)
	check(err)
	check(s.Truncate(1 << 30))
	src, err := qcow2.NewRawDisk(s)
	check(err)
	length := src.Size() // to be noted: RollbackInPlace and ResumeInPlace want to be told after a crash
	check(qcow2.ConvertInPlace(context.Background(), s, src, nil))

	img, err := qcow2.OpenStorage(s, nil)
	check(err)
	defer img.Close()
	p := make([]byte, 5)
	_, err = img.ReadAt(p, 3<<20)
	check(err)
	for e, err := range img.Extents(3<<20, 1<<16) {
		check(err)
		fmt.Printf("%s, at %d of the disk and %d of the file\n", p, e.Off, e.HostOff)
	}
	_, err = qcow2.RollbackInPlace(context.Background(), s, length)
	fmt.Println(errors.Is(err, qcow2.ErrInPlace)) // there is nothing to roll back
	// Output:
	// hello, at 3145728 of the disk and 3145728 of the file
	// true
}

// An image that was damaged is checked and repaired.
func ExampleImage_Check() {
	s := qcow2.NewMemoryStorage()
	img, err := qcow2.CreateStorage(s, 1<<20, nil)
	check(err)
	check(img.Close())
	// The refcount table stands in the second cluster of a new image. Without it the header, it
	// and the L1 table are in use and have no refcount.
	_, err = s.WriteAt(make([]byte, 512), 64<<10)
	check(err)

	img, err = qcow2.OpenStorage(s, &qcow2.OpenOptions{CheckOnly: true, ReadWrite: true})
	check(err)
	defer img.Close()
	res, err := img.Check(context.Background(), &qcow2.CheckOptions{Repair: qcow2.RepairAll})
	check(err)
	fmt.Printf("fixed %d, left %d, clean: %v\n", res.CorruptionsFixed, res.Corruptions, res.Clean())
	// Output: fixed 3, left 0, clean: true
}
