package qcow2

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/go-qcow2/qcow2/internal/crashtest"
)

// TestInspectInPlace wants every state by its name, and the refusals of those that are neither resumed nor rolled back.
func TestInspectInPlace(t *testing.T) {
	for _, name := range []string{"raw", "trailer", "shuffled"} {
		sc := inPlaceScenarioNamed(t, name)
		length := int64(len(sc.source))
		change := func(d *crashtest.Disk, off int64, p ...byte) *crashtest.Disk {
			if _, err := d.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			return d
		}
		done := sc.disk()
		if err := sc.convert(crashStorage{done}, inPlaceSyncNone); err != nil {
			t.Fatal(err)
		}
		tables, err := done.Size()
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name   string
			disk   *crashtest.Disk
			length int64
			want   InPlaceState
			ends   bool // whether resume and rollback do something
		}{
			{"source", sc.disk(), length, InPlaceNone, false},
			{"image", done, length, InPlaceNone, false},
			{"another length", interrupted(t, sc, false), length + 512, InPlaceOtherLength, false},
			{"negative length", interrupted(t, sc, false), -1, InPlaceOtherLength, false},
			{"complete", interrupted(t, sc, false), length, InPlaceComplete, true},
			{"incomplete", change(interrupted(t, sc, false), tables-1, 0x5a), length, InPlaceIncomplete, true},
			{"source written to", change(interrupted(t, sc, false), 3, 0x5a), length, InPlaceComplete, true},
			{"switched", interrupted(t, sc, true), length, InPlaceSwitched, false},
			{"image written to", change(interrupted(t, sc, true), 79, 1), length, InPlaceChanged, false},
		} {
			before := tt.disk.Bytes()
			found, err := InspectInPlace(t.Context(), crashStorage{tt.disk}, tt.length)
			if err != nil || found != tt.want {
				t.Errorf("%s, %s: %s, want %q", name, tt.name, stringOf(found, err), tt.want)
			}
			back := tt.disk.Clone()
			found, err = RollbackInPlace(t.Context(), crashStorage{back}, tt.length)
			var e *InPlaceError
			if found != tt.want || (err == nil) != tt.ends || err != nil && (!errors.As(err, &e) || e.Found != tt.want) {
				t.Errorf("%s, %s: roll back: %s", name, tt.name, stringOf(found, err))
			}
			want := before
			if tt.ends {
				want = before[:length]
			}
			if !bytes.Equal(back.Bytes(), want) {
				t.Errorf("%s, %s: roll back left another file", name, tt.name)
			}
			if tt.ends {
				continue // TestResumeInPlace
			}
			src, err := sc.over(crashStorage{tt.disk})
			if err != nil {
				t.Fatal(err)
			}
			found, err = ResumeInPlace(t.Context(), crashStorage{tt.disk}, src, tt.length, &sc.opts)
			if found != tt.want || (err == nil) != (tt.want == InPlaceSwitched) || err != nil && (!errors.As(err, &e) || e.Found != tt.want) {
				t.Errorf("%s, %s: resume: %s", name, tt.name, stringOf(found, err))
			}
			if err != nil && !bytes.Equal(tt.disk.Bytes(), before) {
				t.Errorf("%s, %s: a refused resume changed the file", name, tt.name)
			}
		}
	}
}

// TestResumeInPlace resumes conversions after the source, the options or the tables have changed: the image has what
// the source holds now.
func TestResumeInPlace(t *testing.T) {
	for _, tt := range []struct {
		name   string
		off    int64 // where something is written in between, or -1
		change func(o *InPlaceOptions)
	}{
		{"nothing", -1, nil},
		{"first sector", 100, nil},
		{"copied cluster", 5000, nil},
		{"hole", 100 << 10, nil},
		{"data", 250 << 10, nil},
		{"tables", 420 << 10, nil},
		{"larger clusters", -1, func(o *InPlaceOptions) { o.ClusterSize = 64 << 10 }},
		{"smaller clusters", 100 << 10, func(o *InPlaceOptions) { o.ClusterSize = 512 }},
		{"version 2", -1, func(o *InPlaceOptions) { o.Version = 2 }},
	} {
		sc := *inPlaceScenarioNamed(t, "raw sparse")
		half := interrupted(t, &sc, false)
		if tt.off >= 0 {
			if _, err := half.WriteAt([]byte("written in between"), tt.off); err != nil {
				t.Fatal(err)
			}
		}
		if tt.change != nil {
			tt.change(&sc.opts)
		}
		content := half.Bytes()[:len(sc.source)]
		content = append(content, make([]byte, -len(content)&(sectorSize-1))...)
		if found, err := sc.resume(crashStorage{half}); err != nil {
			t.Errorf("%s: %s", tt.name, stringOf(found, err))
		}
		if err := sc.checkImage(half, content); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	sc := inPlaceScenarioNamed(t, "raw")
	var option *OptionError
	half := interrupted(t, sc, false)
	if _, err := ResumeInPlace(t.Context(), crashStorage{half}, nil, int64(len(sc.source)), nil); !errors.As(err, &option) {
		t.Errorf("resume without a layout: %v", err)
	}
	// A layout of the file as it is, not of the source.
	grown, err := NewRawDisk(crashStorage{half})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ResumeInPlace(t.Context(), crashStorage{half}, grown, int64(len(sc.source)), nil); !errors.As(err, &option) {
		t.Errorf("resume with the layout of the grown file: %v", err)
	}
}

// TestInPlaceFooterFound refuses a file that ends in a footer, left or forged, unless that is ignored.
func TestInPlaceFooterFound(t *testing.T) {
	sc := inPlaceScenarioNamed(t, "raw")
	half := interrupted(t, sc, false)
	size, err := half.Size()
	if err != nil {
		t.Fatal(err)
	}
	again := inPlaceScenario{source: half.Bytes()}
	d := again.disk()
	var e *InPlaceError
	if err := again.convert(crashStorage{d}, inPlaceSyncNone); !errors.As(err, &e) || e.Found != InPlaceComplete || e.Length != int64(len(sc.source)) {
		t.Errorf("error %v, want a *InPlaceError", err)
	}
	if !bytes.Equal(d.Bytes(), again.source) {
		t.Error("the refusal changed the file")
	}
	// To whom the footer is one that a guest wrote, the disk is as long as the file.
	if _, err := RollbackInPlace(t.Context(), crashStorage{d}, size); !errors.As(err, &e) || e.Found != InPlaceOtherLength {
		t.Errorf("roll back to the whole length: %v", err)
	}
	again.opts.IgnoreFooter = true
	forged := interrupted(t, &again, false)
	if found, err := InspectInPlace(t.Context(), crashStorage{forged}, size); err != nil || found != InPlaceComplete {
		t.Error(stringOf(found, err))
	}
	if _, err := RollbackInPlace(t.Context(), crashStorage{forged}, size); err != nil || !bytes.Equal(forged.Bytes(), again.source) {
		t.Errorf("roll back: %v", err)
	}
	content := again.content()
	if err := again.convert(crashStorage{d}, inPlaceSyncNone); err != nil {
		t.Error(err)
	}
	if err := again.checkImage(d, content); err != nil {
		t.Error(err)
	}
}

// sealFooter makes the sum of a footer right.
func sealFooter(b []byte) {
	sum := sha256.Sum256(b[:footerSum])
	copy(b[footerSum:], sum[:])
}

// TestInPlaceFooterBad changes every bit of a footer, and every field with the sum made right: what it does not fit is
// no footer.
func TestInPlaceFooterBad(t *testing.T) {
	f := inPlaceFooter{clusterBits: 12, length: 10000, tables: 3 << 12, off: 9 << 12, trailer: 512, tablesSum: [32]byte{1}, headerSum: [32]byte{2}}
	good := f.encode()
	size := f.off + 2*sectorSize
	for _, n := range []uint64{size, size - sectorSize} {
		if got := decodeFooter(good, f.off, n); got == nil || *got != f {
			t.Fatalf("decoded as %+v", got)
		}
	}
	for i := range 8 * len(good) {
		b := bytes.Clone(good)
		b[i/8] ^= 1 << (i % 8)
		if decodeFooter(b, f.off, size) != nil {
			t.Errorf("bit %d makes no difference", i)
		}
	}
	for _, tt := range []struct {
		name   string
		off, n int
		value  uint64
	}{
		{"version", footerVersion, 4, 2},
		{"small clusters", footerClusterBits, 4, 8},
		{"large clusters", footerClusterBits, 4, 22},
		{"clusters of no size", footerClusterBits, 4, 1<<32 - 1},
		{"long source", footerLength, 8, 3<<12 + 1},
		{"longest source", footerLength, 8, 1<<64 - 1},
		{"no tables", footerTables, 8, 9 << 12},
		{"tables in the header", footerTables, 8, 0},
		{"tables between clusters", footerTables, 8, 3<<12 + 512},
		{"elsewhere", footerOff, 8, 8 << 12},
		{"long trailer", footerTrailer, 8, 1024},
		{"no trailer", footerTrailer, 8, 0},
		{"reserved", footerTrailer + 8, 8, 1},
	} {
		b := bytes.Clone(good)
		v := binary.BigEndian.AppendUint64(nil, tt.value)
		copy(b[tt.off:], v[8-tt.n:])
		sealFooter(b)
		if decodeFooter(b, f.off, size) != nil {
			t.Errorf("%s: taken for a footer", tt.name)
		}
	}
	if decodeFooter(good, f.off, size+512) != nil || decodeFooter(good, f.off+512, size) != nil {
		t.Error("a footer elsewhere is taken for one")
	}
}

// FuzzInPlaceFooter looks at any file for a footer, with the sum of its seal-th sector from the end made right: nothing panics, a file that is refused is
// not changed, and what is rolled back has the length that was asked for.
func FuzzInPlaceFooter(f *testing.F) {
	for i, name := range []string{"raw of few bytes", "trailer of small clusters"} {
		sc := inPlaceScenarioNamed(f, name)
		sc.opts.ClusterSize = 512
		length := int64(len(sc.source))
		f.Add(interrupted(f, sc, false).Bytes(), length, uint8(1+i))
		f.Add(interrupted(f, sc, true).Bytes(), length, uint8(1+i))
		f.Add(interrupted(f, sc, false).Bytes(), length+512, uint8(0))
	}
	f.Fuzz(func(t *testing.T, b []byte, length int64, seal uint8) {
		if n := int(seal) * sectorSize; n > 0 && n <= len(b) {
			sealFooter(b[len(b)-n:][:sectorSize])
		}
		d := crashtest.NewDisk(b)
		want, err := InspectInPlace(t.Context(), crashStorage{d}, length)
		if err != nil {
			t.Fatal(err)
		}
		found, err := RollbackInPlace(t.Context(), crashStorage{d}, length)
		if found != want {
			t.Errorf("found %q, then %q", want, found)
		}
		now := d.Bytes()
		if err != nil {
			length = int64(len(b))
		}
		if int64(len(now)) != length || !bytes.Equal(now, b[:length]) {
			t.Errorf("%s: the file has %d bytes", stringOf(found, err), len(now))
		}
		d = crashtest.NewDisk(b)
		src, err := NewRawDisk(NewSourceView(crashStorage{d}, length))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ResumeInPlace(t.Context(), crashStorage{d}, src, length, nil); err != nil && !errors.Is(err, ErrInPlace) {
			var option *OptionError
			if !errors.As(err, &option) {
				t.Errorf("resume: %v", err)
			}
		}
	})
}

// TestSourceView wants the first bytes of a storage, and nothing else, and no change.
func TestSourceView(t *testing.T) {
	sc := inPlaceScenarioNamed(t, "raw sparse")
	d := interrupted(t, sc, false)
	v := NewSourceView(crashStorage{d}, int64(len(sc.source)))
	got, err := io.ReadAll(io.NewSectionReader(v, 0, 1<<40))
	if err != nil || !bytes.Equal(got, sc.disk().Bytes()) {
		t.Errorf("%d bytes of other content, %v", len(got), err)
	}
	if size, err := v.Size(); err != nil || size != int64(len(sc.source)) {
		t.Errorf("size %d, %v", size, err)
	}
	if _, _, err := v.NextData(int64(len(sc.source))); err != io.EOF {
		t.Errorf("data behind the source: %v", err)
	}
	if _, end, err := v.NextData(390 << 10); err != nil || end != int64(len(sc.source)) {
		t.Errorf("data up to %d, %v", end, err)
	}
	for _, err := range []error{v.Truncate(0), v.PunchHole(0, 512), v.WriteZeroes(0, 512), v.Allocate(0, 512), v.Lock(LockWriter)} {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("a view changes: %v", err)
		}
	}
	if _, err := v.WriteAt([]byte{1}, 0); err == nil {
		t.Error("a view can be written to")
	}
	if size, err := NewSourceView(crashStorage{d}, -1).Size(); err != nil || size != 0 {
		t.Errorf("a negative length: size %d, %v", size, err)
	}
}
