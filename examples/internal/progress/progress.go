// Package progress draws progress bars on a terminal.
package progress

import (
	"errors"
	"io"
	"sync"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/cwriter"
	"github.com/vbauerster/mpb/v8/decor"
)

// Bar is the bar of one long operation.
type Bar struct {
	w     io.Writer
	drawn bool // w is a terminal
	pool  *mpb.Progress
	bar   *mpb.Bar
	mu    sync.Mutex // orders the two steps of an Update
}

// Start draws a bar with the given name on w, which is a terminal or stays empty until the end.
func Start(w io.Writer, name string) *Bar {
	pool := mpb.New(mpb.WithOutput(w), mpb.WithWidth(64))
	bar := pool.AddBar(0,
		mpb.PrependDecorators(
			decor.Name(name, decor.WCSyncSpaceR),
			decor.CountersKibiByte("% .1f / % .1f", decor.WCSyncSpace)),
		mpb.AppendDecorators(
			decor.Percentage(decor.WCSyncSpace),
			decor.AverageSpeed(decor.SizeB1024(0), " % .0f")))
	return &Bar{w: w, drawn: cwriter.New(w).IsTerminal(), pool: pool, bar: bar}
}

// Write writes whole lines above the bar. Where no bar is drawn, and once it is done, they go straight to its
// writer.
func (b *Bar) Write(p []byte) (int, error) {
	if b.drawn {
		if n, err := b.pool.Write(p); !errors.Is(err, mpb.ErrDone) {
			return n, err
		}
	}
	return b.w.Write(p)
}

// Update moves the bar to done of total bytes. It is the callback of the library's long operations,
// and safe for concurrent use.
func (b *Bar) Update(done, total int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bar.SetTotal(max(total, 1), false)
	b.bar.SetCurrent(done)
}

// Done ends the bar: full if err is nil, else where it stands. It draws nothing afterwards.
func (b *Bar) Done(err error) {
	if err != nil {
		b.bar.Abort(false)
	} else {
		b.bar.SetTotal(-1, true)
	}
	b.pool.Wait()
}
