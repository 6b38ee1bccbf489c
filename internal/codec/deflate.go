package codec

import (
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
)

// wideLevel is the level of the encoder with the wide window: the fastest one whose payloads of a file system's content
// are not larger, by more than a percent, than those of zlib's default level with the narrow window.
const wideLevel = 6

// errFull ends a compression whose payload does not fit.
var errFull = errors.New("payload does not fit")

// deflater is a pooled deflate encoder. It is used by one goroutine at a time.
type deflater struct {
	w   *flate.Writer
	out boundedWriter
}

// boundedWriter collects a payload in buf and refuses what does not fit with errFull.
type boundedWriter struct {
	buf []byte
	n   int // bytes of buf in use
}

// Write implements io.Writer.
func (w *boundedWriter) Write(p []byte) (int, error) {
	if len(p) > len(w.buf)-w.n {
		return 0, errFull
	}
	w.n += copy(w.buf[w.n:], p)
	return len(p), nil
}

// newDeflater returns an encoder that writes with w, or the error of making w.
func newDeflater(w *flate.Writer, err error) *deflater {
	if err != nil {
		panic(err) // the arguments of w are constants within flate's bounds
	}
	return &deflater{w: w}
}

// matchers, wideMatchers and entropyCoders hold idle *deflater. A matcher looks for matches, and gives up a block
// where it finds none at all. An entropy coder looks for none, and shrinks what has few symbols.
//
// QEMU inflates with a window of 2^12 bytes; an inflate library that enforces it refuses the longer distances of
// a wide matcher.
var (
	matchers = sync.Pool{New: func() any {
		return newDeflater(flate.NewWriterWindow(io.Discard, NarrowWindow))
	}}
	wideMatchers = sync.Pool{New: func() any {
		return newDeflater(flate.NewWriter(io.Discard, wideLevel))
	}}
	entropyCoders = sync.Pool{New: func() any {
		return newDeflater(flate.NewWriter(io.Discard, flate.HuffmanOnly))
	}}
)

// deflate packs src into dst, reaching back at most window bytes, and returns the length; ok is false if it does not
// fit.
func deflate(dst, src []byte, window int) (n int, ok bool) {
	pool := &matchers
	if window == WideWindow {
		pool = &wideMatchers
	}
	if n, ok = deflateWith(pool, dst, src); !ok {
		n, ok = deflateWith(&entropyCoders, dst, src)
	}
	return n, ok
}

// deflateWith is deflate with an encoder of the given pool.
func deflateWith(pool *sync.Pool, dst, src []byte) (n int, ok bool) {
	d := pool.Get().(*deflater)
	d.out = boundedWriter{buf: dst}
	d.w.Reset(&d.out)
	_, err := d.w.Write(src)
	if err == nil {
		err = d.w.Close()
	}
	n = d.out.n
	d.out = boundedWriter{}
	pool.Put(d)
	return n, err == nil
}
