package qcow2

import (
	"encoding/binary"
	"errors"
	"testing"
)

// heldStorage lets reads that begin at an offset wait.
type heldStorage struct {
	Storage
	at      int64
	reached chan struct{} // a read of at has begun
	release chan struct{} // closed: it goes on
}

// ReadAt implements Storage.
func (s *heldStorage) ReadAt(p []byte, off int64) (int, error) {
	if off == s.at {
		s.reached <- struct{}{}
		<-s.release
	}
	return s.Storage.ReadAt(p, off)
}

// brokenReads is a storage whose reads fail.
type brokenReads struct{ Storage }

// errBrokenReads is their error.
var errBrokenReads = errors.New("cannot read")

// ReadAt implements Storage.
func (brokenReads) ReadAt([]byte, int64) (int, error) { return 0, errBrokenReads }

// manySlices is a host file of count slices of 512 bytes whose words are their numbers.
func manySlices(t *testing.T, count int) Storage {
	t.Helper()
	p := make([]byte, 512*count)
	for i := range len(p) / 8 {
		binary.BigEndian.PutUint64(p[8*i:], uint64(i))
	}
	s := NewMemoryStorage()
	if _, err := s.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestCacheReadMany reads slices past the cache: what was changed in the cache is seen, nothing else gets into it, a
// slice that somebody reads meanwhile is waited for, and who wants one that is being read waits, and then has his own.
func TestCacheReadMany(t *testing.T) {
	const n, count = 512, 16
	key := func(i uint64) sliceKey { return makeSliceKey(1, i*n) }
	check := func(words []uint64, changed map[int]uint64) {
		t.Helper()
		for i, w := range words {
			want := uint64(i)
			if c, ok := changed[i]; ok {
				want = c
			}
			if w != want {
				t.Fatalf("word %d is %d, want %d", i, w, want)
			}
		}
	}
	s := manySlices(t, count)
	c, h := newTableCache(64*n, 9), newHostFile(s, n*count, false)
	three, err := c.get(key(3), h, 3*n, n)
	if err != nil {
		t.Fatal(err)
	}
	c.change(three, func(words []uint64) { words[5] = 999 })
	words := make([]uint64, n/8*count)
	if err := c.readMany(1, h, 0, n, words); err != nil {
		t.Fatal(err)
	}
	changed := map[int]uint64{3*n/8 + 5: 999}
	check(words, changed)
	for i := range uint64(count) {
		if (c.peek(key(i)) != nil) != (i == 3) {
			t.Errorf("slice %d: in the cache %v", i, c.peek(key(i)) != nil)
		}
	}

	// Who wants a slice of a range that is being read waits for it.
	held := &heldStorage{Storage: s, at: 0, reached: make(chan struct{}), release: make(chan struct{})}
	slow := newHostFile(held, n*count, false)
	done := make(chan error, 2)
	finish := func() {
		t.Helper()
		close(held.release)
		for range 2 {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		check(words, changed)
	}
	clear(words)
	go func() { done <- c.readMany(1, slow, 0, n, words) }()
	<-held.reached
	got := make(chan *l2Slice, 1)
	go func() {
		five, err := c.view(key(5), h, 5*n, n)
		got <- five
		done <- err
	}()
	select {
	case <-got:
		t.Fatal("a slice was loaded while it was being read")
	default:
	}
	finish()
	if five := <-got; five.words[0] != 5*n/8 {
		t.Errorf("slice 5 begins with %d", five.words[0])
	}

	// A slice that somebody else reads is waited for.
	held = &heldStorage{Storage: s, at: 7 * n, reached: make(chan struct{}), release: make(chan struct{})}
	slow = newHostFile(held, n*count, false)
	clear(words)
	go func() {
		_, err := c.view(key(7), slow, 7*n, n)
		done <- err
	}()
	<-held.reached
	go func() { done <- c.readMany(1, h, 0, n, words) }()
	select {
	case err := <-done:
		t.Fatalf("read beside another read: %v", err)
	default:
	}
	finish()

	// An error leaves nothing behind that others would wait for.
	if err := c.readMany(1, newHostFile(brokenReads{s}, n*count, false), 0, n, words); !errors.Is(err, errBrokenReads) {
		t.Errorf("%v", err)
	}
	if err := c.readMany(1, h, 0, n, words); err != nil || len(c.loading) > 0 {
		t.Errorf("%v, %d slices are being read", err, len(c.loading))
	}
	check(words, changed)
}
