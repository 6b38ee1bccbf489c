package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// newSnapshotImage returns a new image in memory, whose disk holds content from its start. When the test ends it is
// closed, and its file is checked.
func newSnapshotImage(t testing.TB, size int64, content []byte, o *CreateOptions) (*Image, *MemoryStorage) {
	t.Helper()
	s := NewMemoryStorage()
	img, err := CreateStorage(s, size, o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
			t.Error(err)
		}
		checkSnapshotImage(t, s)
	})
	return img, s
}

// checkSnapshotImage fails the test unless the image in s is sound and holds no leak.
func checkSnapshotImage(t testing.TB, s Storage) {
	t.Helper()
	img, err := OpenStorage(s, &OpenOptions{CheckOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	res, err := img.Check(context.Background(), &CheckOptions{Found: func(f Finding) { t.Log(f) }})
	if err != nil || !res.Clean() {
		t.Errorf("check: %+v, %v", res, err)
	}
}

// createSnapshot creates a snapshot called name.
func createSnapshot(t testing.TB, img *Image, name string) Snapshot {
	t.Helper()
	s, err := img.CreateSnapshot(context.Background(), &SnapshotOptions{Name: name, Date: unixEpoch})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// expectContent fails the test unless d reads as want.
func expectContent(t testing.TB, d Disk, want []byte) {
	t.Helper()
	got, err := readWholeDisk(d)
	if err != nil {
		t.Fatal(err)
	}
	if err := difference(got, want, 0); err != nil {
		t.Error(err)
	}
}

// TestSnapshotLife creates, reads, applies, renames and deletes snapshots of one image.
func TestSnapshotLife(t *testing.T) {
	ctx := context.Background()
	fill := func(b byte) []byte { return bytes.Repeat([]byte{b}, 64<<10) }
	for _, o := range []CreateOptions{
		{}, {Version: 2}, {ClusterSize: 512, RefcountBits: 32}, {ClusterSize: 1024, RefcountBits: 64}, {ClusterSize: 16 << 10, ExtendedL2: true},
		{ClusterSize: 2 << 20, RefcountBits: 2}, {ClusterSize: 4096, LazyRefcounts: true, RefcountBits: 8},
	} {
		t.Run(fmt.Sprintf("cluster=%d,bits=%d,version=%d", o.ClusterSize, o.RefcountBits, o.Version), func(t *testing.T) {
			img, s := newSnapshotImage(t, 64<<10, fill(1), &o)
			if err := img.WriteCompressed(fill(1), 0); err != nil {
				t.Fatal(err)
			}
			createSnapshot(t, img, "one")
			if _, err := img.WriteAt(fill(2), 0); err != nil {
				t.Fatal(err)
			}
			createSnapshot(t, img, "two")
			if _, err := img.WriteAt(fill(3)[:30_000], 0); err != nil {
				t.Fatal(err)
			}
			mixed := append(fill(3)[:30_000], fill(2)[30_000:]...)
			expectContent(t, img, mixed)
			for name, want := range map[string][]byte{"one": fill(1), "two": fill(2)} {
				d, err := img.OpenSnapshot(SnapshotRef{Name: name})
				if err != nil {
					t.Fatal(err)
				}
				expectContent(t, d, want)
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
			if err := img.ApplySnapshot(ctx, SnapshotRef{Name: "one"}); err != nil {
				t.Fatal(err)
			}
			expectContent(t, img, fill(1))
			if err := img.RenameSnapshot(SnapshotRef{Name: "one"}, "first"); err != nil {
				t.Fatal(err)
			}
			if err := img.DeleteSnapshot(ctx, SnapshotRef{ID: "2"}); err != nil {
				t.Fatal(err)
			}
			want := []Snapshot{{ID: "1", Name: "first", DiskSize: 64 << 10, Date: unixEpoch}}
			if diff := cmp.Diff(want, img.Snapshots(), cmpopts.EquateApproxTime(0)); diff != "" {
				t.Errorf("snapshots (-want +got):\n%s", diff)
			}
			if err := checkList(img); err != nil {
				t.Error(err)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			checkSnapshotImage(t, s)
			img, err := OpenStorage(s, &OpenOptions{ReadWrite: true})
			if err != nil {
				t.Fatal(err)
			}
			expectContent(t, img, fill(1))
			if diff := cmp.Diff(want, img.Snapshots(), cmpopts.EquateApproxTime(0)); diff != "" {
				t.Errorf("snapshots after reopening (-want +got):\n%s", diff)
			}
			if err := img.DeleteSnapshot(ctx, SnapshotRef{IDOrName: "first"}); err != nil {
				t.Fatal(err)
			}
			if info := img.Info(); info.SnapshotCount != 0 {
				t.Errorf("Info tells of %d snapshots", info.SnapshotCount)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestSnapshotOptions refuses options that are none, all at once, and changes nothing.
func TestSnapshotOptions(t *testing.T) {
	img, s := newSnapshotImage(t, 64<<10, []byte("content"), nil)
	createSnapshot(t, img, "there")
	before := bytes.Clone(readStorage(t, s))
	long := strings.Repeat("x", math.MaxUint16+1)
	_, err := img.CreateSnapshot(context.Background(), &SnapshotOptions{
		ID: long, Name: "a\x00b", Date: time.Unix(-1, 0), VMClock: -1, ICount: -2, VMStateSize: -1, VMState: strings.NewReader(""),
	})
	for _, option := range []string{"ID", "Name", "Date", "VMClock", "ICount", "VMStateSize"} {
		if !errors.Is(err, ErrOption) || !strings.Contains(err.Error(), "option "+option+" ") {
			t.Errorf("option %s is not refused: %.200v", option, err)
		}
	}
	ctx := context.Background()
	for name, f := range map[string]func() error{
		"id of another": func() error { _, err := img.CreateSnapshot(ctx, &SnapshotOptions{ID: "1"}); return err },
		"state without a size": func() error {
			_, err := img.CreateSnapshot(ctx, &SnapshotOptions{VMState: strings.NewReader("x")})
			return err
		},
		"size without a state": func() error { _, err := img.CreateSnapshot(ctx, &SnapshotOptions{VMStateSize: 1}); return err },
		"no reference":         func() error { return img.ApplySnapshot(ctx, SnapshotRef{}) },
		"two references":       func() error { return img.DeleteSnapshot(ctx, SnapshotRef{ID: "1", IDOrName: "1"}) },
		"long name":            func() error { return img.RenameSnapshot(SnapshotRef{ID: "1"}, long) },
	} {
		if err := f(); !errors.Is(err, ErrOption) {
			t.Errorf("%s: error %v, want ErrOption", name, err)
		}
	}
	for name, f := range map[string]func() error{
		"apply":  func() error { return img.ApplySnapshot(ctx, SnapshotRef{Name: "nobody"}) },
		"delete": func() error { return img.DeleteSnapshot(ctx, SnapshotRef{ID: "there"}) },
		"rename": func() error { return img.RenameSnapshot(SnapshotRef{ID: "1", Name: "nobody"}, "x") },
		"open":   func() error { _, err := img.OpenSnapshot(SnapshotRef{IDOrName: "nobody"}); return err },
		"find":   func() error { _, err := img.FindSnapshot(SnapshotRef{IDOrName: "nobody"}); return err },
	} {
		if err := f(); !errors.Is(err, ErrSnapshotNotFound) {
			t.Errorf("%s: error %v, want ErrSnapshotNotFound", name, err)
		}
	}
	if !bytes.Equal(before, readStorage(t, s)) {
		t.Error("what was refused changed the file")
	}
}

// readStorage returns the bytes of a storage.
func readStorage(t testing.TB, s Storage) []byte {
	t.Helper()
	n, err := s.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := s.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return b
}

// TestSnapshotRef looks snapshots up as QEMU does: identifiers before names where either will do, and the first that
// fits.
func TestSnapshotRef(t *testing.T) {
	list := []snapshot{{id: "1", name: "2"}, {id: "2", name: "1"}, {id: "3", name: "same"}, {id: "4", name: "same"}, {id: "4", name: "twice"}}
	for _, tt := range []struct {
		ref  SnapshotRef
		want int // -1: not found
	}{
		{SnapshotRef{IDOrName: "1"}, 0}, {SnapshotRef{IDOrName: "2"}, 1}, {SnapshotRef{IDOrName: "same"}, 2}, {SnapshotRef{IDOrName: "5"}, -1},
		{SnapshotRef{ID: "2"}, 1}, {SnapshotRef{ID: "same"}, -1}, {SnapshotRef{ID: "4"}, 3},
		{SnapshotRef{Name: "1"}, 1}, {SnapshotRef{Name: "3"}, -1}, {SnapshotRef{Name: "same"}, 2},
		{SnapshotRef{ID: "4", Name: "same"}, 3}, {SnapshotRef{ID: "4", Name: "twice"}, 4}, {SnapshotRef{ID: "1", Name: "1"}, -1},
	} {
		got, err := tt.ref.find(list)
		if tt.want < 0 && !errors.Is(err, ErrSnapshotNotFound) || tt.want >= 0 && (err != nil || got != tt.want) {
			t.Errorf("%s: %d, %v, want %d", tt.ref, got, err, tt.want)
		}
	}
}

// TestNextSnapshotID counts on from the largest number, as QEMU does.
func TestNextSnapshotID(t *testing.T) {
	for _, tt := range []struct {
		ids  []string
		want string
	}{
		{nil, "1"}, {[]string{"1", "7", "3"}, "8"}, {[]string{"", "name"}, "1"}, {[]string{"12abc"}, "13"},
		{[]string{"18446744073709551615", "1", "2"}, "3"}, {[]string{"99999999999999999999999"}, "1"},
	} {
		var list []snapshot
		for _, id := range tt.ids {
			list = append(list, snapshot{id: id})
		}
		if got := nextSnapshotID(list); got != tt.want {
			t.Errorf("after %q: %q, want %q", tt.ids, got, tt.want)
		}
	}
}

// TestSnapshotOverflow refuses snapshots that refcounts cannot count, before anything changes, and takes as many as they
// can; so do identical snapshots that are applied.
func TestSnapshotOverflow(t *testing.T) {
	ctx := context.Background()
	for bits, most := range map[int]int{1: 0, 2: 2, 4: 14, 8: 254} {
		t.Run(fmt.Sprint(bits), func(t *testing.T) {
			img, s := newSnapshotImage(t, 64<<10, bytes.Repeat([]byte{1}, 9000), &CreateOptions{ClusterSize: 4096, RefcountBits: bits})
			for i := range most {
				createSnapshot(t, img, fmt.Sprint(i))
			}
			if err := img.Sync(); err != nil {
				t.Fatal(err)
			}
			before := readStorage(t, s)
			if _, err := img.CreateSnapshot(ctx, nil); !errors.Is(err, ErrTooLarge) {
				t.Errorf("snapshot %d: error %v, want ErrTooLarge", most, err)
			}
			if !bytes.Equal(before, readStorage(t, s)) {
				t.Error("a snapshot that was refused changed the file")
			}
			if most > 0 {
				// The disk and the snapshot hold the same: no count is above what it was.
				if err := img.ApplySnapshot(ctx, SnapshotRef{ID: "1"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestSnapshotBounds refuses what goes beyond the caller's limits and the format's.
func TestSnapshotBounds(t *testing.T) {
	ctx := context.Background()
	s := NewMemoryStorage()
	img, err := CreateStorage(s, 1<<20, &CreateOptions{ClusterSize: 512, Open: &OpenOptions{Limits: &Limits{Snapshots: 3, MetadataBytes: 70_000}}})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	for range 3 {
		createSnapshot(t, img, "x")
	}
	if _, err := img.CreateSnapshot(ctx, nil); !errors.Is(err, ErrLimit) {
		t.Errorf("a fourth snapshot: error %v, want ErrLimit", err)
	}
	for _, name := range []string{strings.Repeat("x", 60_000), strings.Repeat("x", 20_000)} {
		if err := img.RenameSnapshot(SnapshotRef{ID: fmt.Sprint(len(name)/20_000 - 1)}, name); err != nil && !errors.Is(err, ErrLimit) && !errors.Is(err, ErrSnapshotNotFound) {
			t.Error(err)
		}
	}
	var limit *LimitError
	if err := img.RenameSnapshot(SnapshotRef{ID: "3"}, strings.Repeat("x", 65_000)); !errors.As(err, &limit) || limit.Limit != "MetadataBytes" {
		t.Errorf("a table above the limit: error %v", err)
	}
	_, err = img.CreateSnapshot(ctx, &SnapshotOptions{VMState: strings.NewReader(""), VMStateSize: math.MaxInt64})
	if err == nil {
		t.Error("a VM state beyond the largest L1 table is taken")
	}
	big := &Image{limits: Limits{Snapshots: math.MaxInt, MetadataBytes: math.MaxInt64}}
	if err := big.checkList(make([]snapshot, maxSnapshots+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("65537 snapshots: error %v, want ErrTooLarge", err)
	}
	if err := big.checkList(make([]snapshot, maxSnapshots)); err != nil {
		t.Errorf("65536 snapshots: %v", err)
	}
	wide := make([]snapshot, 1100)
	for i := range wide {
		wide[i].name = strings.Repeat("x", 62_000)
	}
	if err := big.checkList(wide); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a table above 64 MiB: error %v, want ErrTooLarge", err)
	}
}

// TestSnapshotMany makes more snapshots than one cluster of the table lists, and deletes them in another order.
func TestSnapshotMany(t *testing.T) {
	ctx := context.Background()
	img, _ := newSnapshotImage(t, 64<<10, bytes.Repeat([]byte{9}, 3000), &CreateOptions{ClusterSize: 512, RefcountBits: 16})
	for i := range 60 {
		createSnapshot(t, img, fmt.Sprint("snapshot ", i))
		if _, err := img.WriteAt([]byte{byte(i)}, int64(i)*700); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 60 {
		if err := img.DeleteSnapshot(ctx, SnapshotRef{Name: fmt.Sprint("snapshot ", i*7%60)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := checkList(img); err != nil {
		t.Error(err)
	}
}

// TestSnapshotState keeps VM states of several lengths, and reads them back, through an apply and a reopen.
func TestSnapshotState(t *testing.T) {
	ctx := context.Background()
	for _, o := range []CreateOptions{{ClusterSize: 512}, {ClusterSize: 64 << 10}, {ClusterSize: 16 << 10, ExtendedL2: true}, {Version: 2, ClusterSize: 4096}} {
		img, s := newSnapshotImage(t, 1<<20, bytes.Repeat([]byte{1}, 100_000), &o)
		want := make(map[string][]byte)
		for i, n := range []int{1, 511, 5000, 64 << 10, 1<<20 + 17} {
			state := make([]byte, n)
			content(state, uint64(8*i+3))
			c, err := img.CreateSnapshot(ctx, &SnapshotOptions{VMState: bytes.NewReader(state), VMStateSize: int64(n)})
			if err != nil {
				t.Fatal(err)
			}
			want[c.ID] = state
		}
		look := func() {
			t.Helper()
			for id, state := range want {
				d, err := img.OpenSnapshot(SnapshotRef{ID: id})
				if err != nil {
					t.Fatal(err)
				}
				if d.Snapshot().VMStateSize != int64(len(state)) {
					t.Errorf("snapshot %s has %d bytes of state instead of %d", id, d.Snapshot().VMStateSize, len(state))
				}
				got, err := io.ReadAll(d.VMState())
				if err != nil {
					t.Error(err)
				} else if err := difference(got, state, 0); err != nil {
					t.Errorf("state of snapshot %s: %v", id, err)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
		}
		look()
		if err := img.ApplySnapshot(ctx, SnapshotRef{ID: "3"}); err != nil {
			t.Fatal(err)
		}
		if _, err := img.WriteAt(make([]byte, 1<<20), 0); err != nil {
			t.Fatal(err)
		}
		if err := img.DeleteSnapshot(ctx, SnapshotRef{ID: "2"}); err != nil {
			t.Fatal(err)
		}
		delete(want, "2")
		look()
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		var err error
		if img, err = OpenStorage(s, nil); err != nil {
			t.Fatal(err)
		}
		look()
		if err := img.Close(); err != nil {
			t.Error(err)
		}
		// A state that ends early changes nothing.
		if img, err = OpenStorage(s, &OpenOptions{ReadWrite: true}); err != nil {
			t.Fatal(err)
		}
		_, err = img.CreateSnapshot(ctx, &SnapshotOptions{VMState: strings.NewReader("short"), VMStateSize: 100_000})
		if !errors.Is(err, io.ErrUnexpectedEOF) || len(img.Snapshots()) != len(want) {
			t.Errorf("a state that ends early: error %v, %d snapshots", err, len(img.Snapshots()))
		}
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestSnapshotPins keeps an open snapshot from being deleted, and ends its reads with the image.
func TestSnapshotPins(t *testing.T) {
	ctx := context.Background()
	img, _ := newSnapshotImage(t, 64<<10, []byte("content"), &CreateOptions{ClusterSize: 4096})
	createSnapshot(t, img, "a")
	createSnapshot(t, img, "b")
	a := SnapshotRef{Name: "a"}
	first, err := img.OpenSnapshot(a)
	if err != nil {
		t.Fatal(err)
	}
	second, err := img.OpenSnapshot(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.RenameSnapshot(a, "renamed"); err != nil {
		t.Errorf("rename of an open snapshot: %v", err)
	}
	a.Name = "renamed"
	if err := img.DeleteSnapshot(ctx, SnapshotRef{Name: "b"}); err != nil {
		t.Errorf("delete of another snapshot: %v", err)
	}
	for i, d := range []*SnapshotDisk{first, second} {
		if err := img.DeleteSnapshot(ctx, a); !errors.Is(err, ErrBusy) {
			t.Errorf("delete while %d disks are open: error %v, want ErrBusy", 2-i, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if err := d.Close(); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("second Close: %v", err)
		}
		if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("read after Close: %v", err)
		}
	}
	third, err := img.OpenSnapshot(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := third.ReadAt(make([]byte, 1), 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("read after the image's Close: %v", err)
	}
	if _, err := third.VMState().Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read of no state: %v", err)
	}
	if err := third.Close(); err != nil {
		t.Error(err)
	}
	if _, err := img.OpenSnapshot(a); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("open after the image's Close: %v", err)
	}
}

// TestSnapshotRefusals names what an image does not let be done.
func TestSnapshotRefusals(t *testing.T) {
	ctx := context.Background()
	_, s := newSnapshotImage(t, 64<<10, []byte("content"), nil)
	img, err := OpenStorage(s, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.CreateSnapshot(ctx, nil); !errors.Is(err, ErrReadOnly) {
		t.Errorf("of a read-only image: %v", err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := img.CreateSnapshot(ctx, nil); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("of a closed image: %v", err)
	}
	check, err := OpenStorage(s, &OpenOptions{CheckOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := check.CreateSnapshot(ctx, nil); !errors.Is(err, ErrCheckOnly) {
		t.Errorf("of an image that is checked: %v", err)
	}
	if _, err := check.OpenSnapshot(SnapshotRef{ID: "1"}); !errors.Is(err, ErrCheckOnly) {
		t.Errorf("open of an image that is checked: %v", err)
	}
	if err := check.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := CreateStorage(NewMemoryStorage(), 64<<10, &CreateOptions{DataFile: "data", Open: &OpenOptions{DataFile: NewMemoryStorage()}})
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	if _, err := data.CreateSnapshot(ctx, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("with a data file: %v", err)
	}
	if err := data.ApplySnapshot(ctx, SnapshotRef{ID: "1"}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("apply with a data file: %v", err)
	}
}

// TestSnapshotCancel ends operations by their context: nothing has changed.
func TestSnapshotCancel(t *testing.T) {
	img, s := newSnapshotImage(t, 1<<20, bytes.Repeat([]byte{1}, 1<<20), &CreateOptions{ClusterSize: 512})
	createSnapshot(t, img, "a")
	if _, err := img.WriteAt(bytes.Repeat([]byte{2}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := img.Sync(); err != nil {
		t.Fatal(err)
	}
	before := readStorage(t, s)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	ref := SnapshotRef{Name: "a"}
	_, err := img.CreateSnapshot(ctx, nil)
	for _, err := range []error{err, img.ApplySnapshot(ctx, ref), img.DeleteSnapshot(ctx, ref)} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want that of the context", err)
		}
	}
	if !bytes.Equal(before, readStorage(t, s)) {
		t.Error("what was cancelled changed the file")
	}
	// In the middle of a VM state, it is taken back.
	ctx, cancel = context.WithCancel(context.Background())
	state := readerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil })
	if _, err := img.CreateSnapshot(ctx, &SnapshotOptions{VMState: state, VMStateSize: 4 << 20}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that of the context", err)
	}
	if err := checkList(img); err != nil {
		t.Error(err)
	}
}

// readerFunc is a function that is an io.Reader.
type readerFunc func(p []byte) (int, error)

// Read calls the function.
func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestSnapshotUnknownExtra keeps a snapshot's extra data that nobody knows, through every rewrite of the table (I9).
func TestSnapshotUnknownExtra(t *testing.T) {
	ctx := context.Background()
	img, s := newSnapshotImage(t, 64<<10, []byte("content"), &CreateOptions{ClusterSize: 4096})
	createSnapshot(t, img, "a")
	createSnapshot(t, img, "b")
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	// The entry is rewritten in place with more extra data; the cluster has room.
	h, err := readHeader(s, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	list, err := readSnapshotTable(s, 1<<20, h, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	unknown := "what the future brings"
	list[1].extra = append(list[1].extra, unknown...)
	if _, err := s.WriteAt(encodeSnapshots(list, h.snapshotsOff), int64(h.snapshotsOff)); err != nil {
		t.Fatal(err)
	}
	if img, err = OpenStorage(s, &OpenOptions{ReadWrite: true}); err != nil {
		t.Fatal(err)
	}
	createSnapshot(t, img, "c")
	if err := errors.Join(img.DeleteSnapshot(ctx, SnapshotRef{Name: "a"}), img.RenameSnapshot(SnapshotRef{Name: "b"}, "bb"),
		img.ApplySnapshot(ctx, SnapshotRef{Name: "bb"}), img.Close()); err != nil {
		t.Fatal(err)
	}
	if h, err = readHeader(s, 1<<20); err != nil {
		t.Fatal(err)
	}
	if list, err = readSnapshotTable(s, 1<<20, h, Limits{}); err != nil {
		t.Fatal(err)
	}
	if list[0].name != "bb" || !bytes.HasSuffix(list[0].extra, []byte(unknown)) || len(list[0].extra) != snapExtraKnown+len(unknown) {
		t.Errorf("entry %q has extra data %q", list[0].name, list[0].extra)
	}
}

// TestSnapshotEmpty takes snapshots of disks without content, and without any byte.
func TestSnapshotEmpty(t *testing.T) {
	ctx := context.Background()
	for _, size := range []int64{0, 512, 1 << 20} {
		img, _ := newSnapshotImage(t, size, nil, &CreateOptions{ClusterSize: 512, RefcountBits: 1})
		createSnapshot(t, img, "empty")
		d, err := img.OpenSnapshot(SnapshotRef{ID: "1"})
		if err != nil {
			t.Fatal(err)
		}
		expectContent(t, d, make([]byte, size))
		if err := errors.Join(d.Close(), img.ApplySnapshot(ctx, SnapshotRef{ID: "1"}), img.DeleteSnapshot(ctx, SnapshotRef{ID: "1"})); err != nil {
			t.Error(err)
		}
	}
}

// TestSnapshotDamaged refuses operations on tables and counts that are not sound, and leaves the file as it is.
func TestSnapshotDamaged(t *testing.T) {
	ctx := context.Background()
	for _, tt := range []struct {
		name   string
		damage func(img *Image) (off int64, p []byte)
	}{
		{"L1 entry not aligned", func(img *Image) (int64, []byte) { return int64(img.m.l1Off), []byte{0, 0, 0, 0, 0, 0, 0x12, 0} }},
		{"L1 entry in the header", func(img *Image) (int64, []byte) {
			return int64(img.snapshots[0].l1Off), []byte{0, 0, 0, 0, 0, 0, 0x02, 0}
		}},
		{"L1 table not aligned", func(img *Image) (int64, []byte) {
			return int64(img.snapshots[0].entryOff), []byte{0, 0, 0, 0, 0, 1, 2, 3}
		}},
		{"L2 entry beyond all refcounts", func(img *Image) (int64, []byte) {
			return int64(img.m.l1.load(0) & offsetMask), []byte{0, 0x70, 0, 0, 0, 0, 0, 0}
		}},
		{"refcount too low", func(img *Image) (int64, []byte) {
			block := img.m.alloc.table.load(0)
			return int64(block + img.m.l1.load(0)&offsetMask>>12*2), []byte{0, 0}
		}},
		{"no refcount block", func(img *Image) (int64, []byte) { return int64(img.m.alloc.tableOff), make([]byte, 8) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := NewMemoryStorage()
			img, err := CreateStorage(s, 64<<10, &CreateOptions{ClusterSize: 4096})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := img.WriteAt(make([]byte, 20_000), 0); err != nil {
				t.Fatal(err)
			}
			createSnapshot(t, img, "a")
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if img, err = OpenStorage(s, &OpenOptions{ReadWrite: true, OverlapCheck: OverlapCheck{Preset: OverlapNone}}); err != nil {
				t.Fatal(err)
			}
			off, p := tt.damage(img)
			if err := img.Abandon(); err != nil {
				t.Fatal(err)
			}
			if _, err := s.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			if img, err = OpenStorage(s, &OpenOptions{ReadWrite: true, Repair: RepairNever, OverlapCheck: OverlapCheck{Preset: OverlapNone}}); err != nil {
				if errors.Is(err, ErrDirty) {
					return // the header has no refcount either
				}
				t.Fatal(err)
			}
			before := readStorage(t, s)
			_, err = img.CreateSnapshot(ctx, nil)
			refused := 0
			for _, err := range []error{err, img.ApplySnapshot(ctx, SnapshotRef{ID: "1"}), img.DeleteSnapshot(ctx, SnapshotRef{ID: "1"})} {
				if errors.Is(err, ErrCorrupt) {
					refused++
				} else if err != nil {
					t.Errorf("error %v, want ErrCorrupt", err)
				}
			}
			if refused == 0 {
				t.Error("nothing was refused")
			}
			if refused == 3 && !bytes.Equal(before, readStorage(t, s)) {
				t.Error("what was refused changed the file")
			}
			if err := img.Abandon(); err != nil {
				t.Error(err)
			}
		})
	}
}
