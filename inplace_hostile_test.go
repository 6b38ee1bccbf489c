package qcow2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// errKilled is what a killedStorage panics with.
var errKilled = errors.New("killed")

// killedStorage ends the program, so to say, at a change: what it did before stays in the host's memory, unsynced.
type killedStorage struct {
	Storage
	left int // changes until then
}

// count counts a change.
func (s *killedStorage) count() {
	if s.left == 0 {
		panic(errKilled)
	}
	s.left--
}

// WriteAt implements Storage.
func (s *killedStorage) WriteAt(p []byte, off int64) (int, error) {
	s.count()
	return s.Storage.WriteAt(p, off)
}

// Truncate implements Storage.
func (s *killedStorage) Truncate(size int64) error {
	s.count()
	return s.Storage.Truncate(size)
}

// Sync implements Storage.
func (s *killedStorage) Sync() error {
	s.count()
	return s.Storage.Sync()
}

// killed has do change s until it is killed at the given change, and reports whether that came.
func killed(s Storage, at int, do func(s Storage) error) (was bool, err error) {
	defer func() {
		if v := recover(); v != nil && v != errKilled {
			panic(v)
		} else if v != nil {
			was, err = true, nil
		}
	}()
	return false, do(&killedStorage{s, at})
}

// TestInPlaceKilled kills the program that converts, resumes or rolls back at every change, resumes or rolls back at
// once, and crashes the host in between: what the first had not synced is lost then, maybe, although the second has seen
// it.
func TestInPlaceKilled(t *testing.T) {
	o := crashtest.Options{PerPoint: 8}
	if testing.Short() {
		o.PerPoint = 3
	}
	var total crashtest.Stats
	for _, name := range []string{"raw", "raw of small clusters", "shuffled", "trailer", "overlay"} {
		sc := inPlaceScenarioNamed(t, name)
		l, err := newInPlaceLook(sc)
		if err != nil {
			t.Fatal(err)
		}
		convert := func(s Storage) error { return sc.convert(s, inPlaceSyncNone) }
		resume := func(s Storage) error {
			found, err := sc.resume(s)
			if now, _ := s.Size(); found == InPlaceNone && now == l.end {
				return nil // it is done
			} else if found == InPlaceNone { // it had not begun
				return convert(s)
			}
			return err
		}
		rollback := func(s Storage) error {
			found, err := RollbackInPlace(context.Background(), s, int64(len(sc.source)))
			if found == InPlaceNone {
				return nil
			}
			return err
		}
		half, switched := interrupted(t, sc, false), interrupted(t, sc, true)
		for i, first := range []struct {
			name string
			disk *crashtest.Disk
			do   func(s Storage) error
		}{{"convert", sc.disk(), convert}, {"resume", half, resume}, {"resume switched", switched, resume}, {"roll back", half, rollback}} {
			for at := 0; ; at++ {
				d := first.disk.Clone()
				was, err := killed(crashStorage{d}, at, first.do)
				if err != nil {
					t.Fatal(err)
				}
				if !was {
					break
				}
				run := func(what string, mark any, then func(s Storage) error) {
					rng := rand.New(rand.NewPCG(uint64(at), uint64(i)))
					stats, err := l.crash(first.disk, rng, o, mark, func(s Storage) error {
						if _, err := killed(s, at, first.do); err != nil {
							return err
						}
						return then(s)
					}, nil)
					total.Add(stats)
					if err != nil {
						t.Errorf("%s, %s killed at %d, %s: %v", name, first.name, at, what, err)
					}
				}
				run("resume", inPlaceConverted{}, resume)
				if !sc.finished(d) {
					run("roll back", inPlaceRolledBack{}, rollback)
				}
			}
		}
	}
	t.Logf("crash states after a kill: %v", total)
}

// TestInPlaceSameHeader wants a source to be refused whose guest wrote the very header that the image is to get: what a
// crash leaves of its conversion would be taken for the image from the footer on.
func TestInPlaceSameHeader(t *testing.T) {
	sc := inPlaceScenario{source: fillRepeated(200 << 10)}
	sc.opts = InPlaceOptions{AllowQcow2: true, ClusterSize: 4096}
	image := sc.disk()
	if err := sc.convert(crashStorage{image}, inPlaceSyncNone); err != nil {
		t.Fatal(err)
	}
	copy(sc.source, image.Bytes()[:sectorSize])
	d := sc.disk()
	var option *OptionError
	if err := sc.convert(crashStorage{d}, inPlaceSyncNone); !errors.As(err, &option) || option.Option != "AllowQcow2" {
		t.Errorf("error %v, want a *OptionError for AllowQcow2", err)
	}
	if !bytes.Equal(d.Bytes(), sc.source) {
		t.Error("the refusal changed the file")
	}
	sc.source[sectorSize-1] ^= 1 // any other is converted
	d = sc.disk()
	content := sc.content()
	if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
		t.Fatal(err)
	}
	if err := sc.checkImage(d, content); err != nil {
		t.Error(err)
	}
}

// TestInPlaceForgedTrailer converts a source whose last sector, which is not the disk's, is a footer for the place of the
// trailer's copy, and tells another length. What is interrupted is resumed and rolled back all the same.
func TestInPlaceForgedTrailer(t *testing.T) {
	const size = 20 << 10
	sc := inPlaceScenario{
		source: fillRepeated(size + sectorSize),
		layout: &testLayout{size: size, extents: []Extent{{Len: size, Kind: ExtentData}}},
		opts:   InPlaceOptions{ClusterSize: 512},
	}
	length := int64(len(sc.source))
	end, err := newInPlaceLook(&sc)
	if err != nil {
		t.Fatal(err)
	}
	forged := inPlaceFooter{clusterBits: 9, length: 512, tables: 1024, off: uint64(end.end) + sectorSize}
	copy(sc.source[size:], forged.encode())
	before := sc.disk().Bytes()
	half := interrupted(t, &sc, false)
	if found, err := InspectInPlace(t.Context(), crashStorage{half}, length); err != nil || found != InPlaceComplete {
		t.Errorf("inspect: %s", stringOf(found, err))
	}
	back := half.Clone()
	if found, err := RollbackInPlace(t.Context(), crashStorage{back}, length); err != nil || !bytes.Equal(back.Bytes(), before) {
		t.Errorf("roll back: %s", stringOf(found, err))
	}
	content := sc.content()
	if found, err := sc.resume(crashStorage{half}); err != nil {
		t.Errorf("resume: %s", stringOf(found, err))
	}
	if err := sc.checkImage(half, content); err != nil {
		t.Error(err)
	}
}

// TestInPlaceForgedInImage has a guest write a footer into the last cluster of a finished image, with the digest of its
// header: neither resume nor rollback cuts its data off.
func TestInPlaceForgedInImage(t *testing.T) {
	for _, tt := range []struct {
		clusterSize, refcountBits int
		trailer                   uint64
	}{{512, 16, 0}, {512, 1, 512}, {512, 64, 512}, {1024, 16, 512}} {
		t.Run(fmt.Sprintf("%+v", tt), func(t *testing.T) {
			sc := inPlaceScenario{source: fillRepeated(64 << 10)}
			sc.opts = InPlaceOptions{ClusterSize: tt.clusterSize, RefcountBits: tt.refcountBits}
			length := int64(len(sc.source))
			d := sc.disk()
			if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
				t.Fatal(err)
			}
			img, err := OpenStorage(crashStorage{d}, &OpenOptions{ReadWrite: true})
			if err != nil {
				t.Fatal(err)
			}
			grown := length + 64<<10
			if err := img.Resize(t.Context(), grown, nil); err != nil {
				t.Fatal(err)
			}
			if _, err := img.WriteAt(fillRepeated(64<<10), length); err != nil {
				t.Fatal(err)
			}
			mustClose(t, img)
			image := d.Bytes()
			size := uint64(len(image))
			h, err := readHeader(bytes.NewReader(image), int64(size))
			if err != nil {
				t.Fatal(err)
			}
			f := inPlaceFooter{
				clusterBits: h.clusterBits, length: uint64(length), tables: h.refTableOff, trailer: tt.trailer,
				off: size - sectorSize - tt.trailer, headerSum: sha256.Sum256(image[:sectorSize]),
			}
			if _, err := d.WriteAt(f.encode(), int64(f.off)); err != nil {
				t.Fatal(err)
			}
			image = d.Bytes()
			if found, err := InspectInPlace(t.Context(), crashStorage{d}, length); err != nil || found != InPlaceChanged {
				t.Errorf("inspect: %s", stringOf(found, err))
			}
			var e *InPlaceError
			if found, err := ResumeInPlace(t.Context(), crashStorage{d}, nil, length, &sc.opts); !errors.As(err, &e) || e.Found != InPlaceChanged {
				t.Errorf("resume: %s", stringOf(found, err))
			}
			if found, err := RollbackInPlace(t.Context(), crashStorage{d}, length); !errors.As(err, &e) || e.Found != InPlaceChanged {
				t.Errorf("roll back: %s", stringOf(found, err))
			}
			if !bytes.Equal(d.Bytes(), image) {
				t.Error("the image changed")
			}
		})
	}
}

// TestInPlaceForgedHeader has a guest, which got the grown raw file to write to, make header and footer of an image over
// a backing file that it would like to read: the resume does not call that the finished image.
func TestInPlaceForgedHeader(t *testing.T) {
	sc := inPlaceScenarioNamed(t, "raw full")
	length := int64(len(sc.source))
	over := *sc
	over.opts.BackingFile, over.opts.BackingFormat = "/etc/passwd", "raw"
	other := *sc
	other.opts.BackingFile, other.opts.BackingFormat = "base", "raw"
	for _, tt := range []struct {
		name   string
		made   *inPlaceScenario // by the guest
		opts   *InPlaceOptions  // of the resume
		change bool
	}{
		{"as it was", &over, &over.opts, false},
		{"no backing file", &over, &sc.opts, true},
		{"no options", &over, nil, true},
		{"another one", &over, &other.opts, true},
		{"none in the header", sc, &other.opts, true},
	} {
		d := interrupted(t, tt.made, true)
		before := d.Bytes()
		found, err := ResumeInPlace(t.Context(), crashStorage{d}, nil, length, tt.opts)
		var e *InPlaceError
		switch {
		case !tt.change && (err != nil || found != InPlaceSwitched):
			t.Errorf("%s: %s", tt.name, stringOf(found, err))
		case tt.change && (!errors.As(err, &e) || e.Found != InPlaceChanged || found != InPlaceChanged || !bytes.Equal(d.Bytes(), before)):
			t.Errorf("%s: %s", tt.name, stringOf(found, err))
		}
	}
}

// TestInPlaceResumeOrder compares the host operations of resumes: what was found written is not taken for durable.
func TestInPlaceResumeOrder(t *testing.T) {
	sc := inPlaceScenarioNamed(t, "trailer behind a whole cluster")
	for _, tt := range []struct {
		switched bool
		want     []string
	}{
		{false, []string{
			"image write 0x80000+0x200", "image sync", "image write 0x80200+0x200", "image write 0x30000+0x50000", "image sync",
			"image write 0x0+0x200", "image sync", "image write 0x200+0xfe00", "image sync", "image truncate 0x80000", "image sync",
		}},
		{true, []string{
			"image write 0x0+0x200", "image sync", "image write 0x200+0xfe00", "image sync", "image truncate 0x80000", "image sync",
		}},
	} {
		host := newFaultHost(map[string]*crashtest.Disk{"image": interrupted(t, sc, tt.switched)})
		if _, err := sc.resume(host.storage("image")); err != nil {
			t.Fatal(err)
		}
		if got := host.changes(0); fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("switched %v: host operations %q, want %q", tt.switched, got, tt.want)
		}
	}
}

// TestInPlaceOtherFile refuses a foreign disk that lies in another file.
func TestInPlaceOtherFile(t *testing.T) {
	vhd := newTestFixedVHD().file
	src, err := OpenForeign(crashStorage{crashtest.NewDisk(vhd)}, ForeignVHD, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := crashtest.NewDisk(vhd)
	var option *OptionError
	if err := ConvertInPlace(t.Context(), crashStorage{d}, src, nil); !errors.As(err, &option) || !bytes.Equal(d.Bytes(), vhd) {
		t.Errorf("error %v, want a *OptionError", err)
	}
}

// unlockStorage fails to give its lock back.
type unlockStorage struct{ Storage }

// Unlock implements Storage.
func (unlockStorage) Unlock() error { return errors.New("no unlock") }

// TestInPlaceUnlock wants the error of a lock that is not given back to say that the file is not what it was.
func TestInPlaceUnlock(t *testing.T) {
	sc := inPlaceScenarioNamed(t, "raw")
	d, content := sc.disk(), sc.content()
	if err := sc.convert(unlockStorage{crashStorage{d}}, inPlaceSyncNone); !errors.Is(err, ErrInPlace) {
		t.Errorf("error %v, want ErrInPlace", err)
	}
	if err := sc.checkImage(d, content); err != nil {
		t.Error(err)
	}
}

// TestInPlaceSizes converts files of every number of clusters up to some hundreds, so that refcount blocks and tables end
// at every place: sources that are all data, and that have data at their end alone.
func TestInPlaceSizes(t *testing.T) {
	const most = 300
	step := 2
	if testing.Short() {
		step = 7
	}
	n := 0
	for clusters := 1; clusters <= most; clusters += step {
		for _, bits := range []int{1, 16, 64} {
			for _, sparse := range []bool{false, true} {
				size := int64(clusters) * 512
				sc := inPlaceScenario{source: fillRepeated(size), opts: InPlaceOptions{ClusterSize: 512, RefcountBits: bits}}
				if sparse {
					hole := size - 512
					clear(sc.source[:hole])
					sc.layout = &testLayout{size: size, extents: []Extent{{Len: 512, Kind: ExtentData, HostOff: hole}, {Off: 512, Len: size - 512, HostOff: noOffset}}}
				}
				d, content := sc.disk(), sc.content()
				if err := sc.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
					t.Fatal(err)
				}
				if err := sc.checkImage(d, content); err != nil {
					t.Fatalf("%d clusters, %d bits, sparse %v: %v", clusters, bits, sparse, err)
				}
				n++
			}
		}
	}
	t.Logf("%d files", n)
}
