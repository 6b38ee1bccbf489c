package codec

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// types are the compression types under test.
var types = []Type{Deflate, Zstd}

// clusterSizes are all sizes that the format allows.
var clusterSizes = func() (sizes []int) {
	for n := 512; n <= MaxClusterSize; n *= 2 {
		sizes = append(sizes, n)
	}
	return sizes
}()

// content is a kind of cluster content; fill makes one, the same for the same seed.
type content struct {
	name    string
	shrinks bool // at every cluster size, under every type
	fill    func(p []byte, rng *rand.Rand)
}

// contents are kinds that exercise different parts of the encoders: runs, matches near and far,
// literals only.
var contents = []content{
	{"zeros", true, func([]byte, *rand.Rand) {}},
	{"words", true, func(p []byte, rng *rand.Rand) {
		words := []string{"cluster ", "refcount ", "snapshot ", "subcluster ", "backing file\n", "L2 "}
		for n := 0; n < len(p); {
			n += copy(p[n:], words[rng.IntN(len(words))])
		}
	}},
	{"far matches", false, func(p []byte, rng *rand.Rand) {
		// Random bytes that come again at distances around 4 KiB and around 32 KiB.
		for n := 0; n < len(p); {
			run := min(len(p)-n, 64+rng.IntN(256))
			dist := []int{4000, 4095, 4096, 4097, 5000, 32767, 32768, 32769}[rng.IntN(8)]
			if dist > n || rng.IntN(3) == 0 {
				for i := range run {
					p[n+i] = byte(rng.Uint32())
				}
			} else {
				copy(p[n:n+run], p[n-dist:])
			}
			n += run
		}
	}},
	{"half random", true, func(p []byte, rng *rand.Rand) {
		for i := range p[:len(p)/2] {
			p[i] = byte(rng.Uint32())
		}
	}},
	{"nibbles", true, func(p []byte, rng *rand.Rand) {
		for i := range p {
			p[i] = byte(rng.Uint32() & 15)
		}
	}},
	{"random", false, func(p []byte, rng *rand.Rand) {
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
	}},
}

// cluster returns a cluster of n bytes of the given kind.
func (c content) cluster(n int, seed uint64) []byte {
	p := make([]byte, n)
	c.fill(p, rand.New(rand.NewPCG(seed, uint64(n))))
	return p
}

// forEach runs f for every type, cluster size and kind of content.
func forEach(t *testing.T, f func(t *testing.T, typ Type, c content, src []byte)) {
	for _, typ := range types {
		for _, size := range clusterSizes {
			for _, c := range contents {
				t.Run(fmt.Sprintf("%v/cluster=%d/%s", typ, size, c.name), func(t *testing.T) {
					f(t, typ, c, c.cluster(size, 1))
				})
			}
		}
	}
}

// pack compresses src into a new buffer, and ends the test if that fails or does not shrink it.
func pack(t testing.TB, src []byte, typ Type) []byte {
	t.Helper()
	dst := make([]byte, 0, len(src)-1)
	n, ok, err := Compress(dst, src, typ)
	if err != nil || !ok {
		t.Fatalf("Compress: ok %v, %v", ok, err)
	}
	return dst[:n]
}

// padded returns payload followed by n bytes of rubbish.
func padded(payload []byte, n int) []byte {
	rng := rand.New(rand.NewPCG(2, 2))
	p := bytes.Clone(payload)
	for range n {
		p = append(p, byte(rng.Uint32()))
	}
	return p
}

func TestRoundTrip(t *testing.T) {
	forEach(t, func(t *testing.T, typ Type, c content, src []byte) {
		keep := bytes.Clone(src)
		buf := bytes.Repeat([]byte{0xee}, len(src)+8)
		n, ok, err := Compress(buf[:0:len(src)-1], src, typ)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(src, keep) {
			t.Fatal("Compress changed its source")
		}
		if !bytes.Equal(buf[len(src)-1:], bytes.Repeat([]byte{0xee}, 9)) {
			t.Error("Compress wrote past the capacity of dst")
		}
		if !ok {
			if c.shrinks {
				t.Error("does not shrink")
			}
			return
		}
		if c.name == "random" {
			t.Errorf("random bytes shrink to %d", n)
		}
		if n < 1 || n >= len(src) {
			t.Fatalf("%d bytes for a cluster of %d", n, len(src))
		}
		payload := buf[:n]
		for name, in := range map[string][]byte{
			"exact":             payload,
			"zeros behind":      append(bytes.Clone(payload), make([]byte, 511)...),
			"rubbish behind":    padded(payload, 511),
			"the same behind":   append(bytes.Clone(payload), payload...),
			"one byte behind":   padded(payload, 1),
			"three more behind": padded(payload, 3),
		} {
			got := bytes.Repeat([]byte{0xdd}, len(src)+16)
			if err := Decompress(got[:len(src)], in, typ); err != nil {
				t.Errorf("%s: %v", name, err)
			} else if !bytes.Equal(got[:len(src)], src) {
				t.Errorf("%s: differs", name)
			}
			if !bytes.Equal(got[len(src):], bytes.Repeat([]byte{0xdd}, 16)) {
				t.Errorf("%s: wrote past the cluster", name)
			}
		}
	})
}

// TestTooSmall gives Compress less room than a payload needs.
func TestTooSmall(t *testing.T) {
	for _, typ := range types {
		src := contents[1].cluster(4096, 3)
		n := len(pack(t, src, typ))
		for _, room := range []int{0, 1, n / 2, n - 1} {
			if got, ok, err := Compress(make([]byte, 0, room), src, typ); ok || err != nil {
				t.Errorf("%v in %d of %d bytes: %d, %v, %v", typ, room, n, got, ok, err)
			}
		}
		if got, ok, err := Compress(make([]byte, 0, n), src, typ); got != n || !ok || err != nil {
			t.Errorf("%v in %d bytes: %d, %v, %v", typ, n, got, ok, err)
		}
	}
}

// TestWrongLength decodes payloads into clusters that are smaller or larger than what was packed.
func TestWrongLength(t *testing.T) {
	for _, typ := range types {
		for _, size := range clusterSizes {
			for _, c := range contents[:2] {
				payload := pack(t, c.cluster(size, 4), typ)
				for _, n := range []int{1, size / 2, size - 1} {
					if err := Decompress(make([]byte, n), payload, typ); !errors.Is(err, ErrLong) {
						t.Errorf("%v %s: %d bytes into %d: %v, want ErrLong", typ, c.name, size, n, err)
					}
				}
				if size < MaxClusterSize {
					if err := Decompress(make([]byte, size+1), payload, typ); !errors.Is(err, ErrShort) {
						t.Errorf("%v %s: %d bytes into one more: %v, want ErrShort", typ, c.name, size, err)
					}
				}
			}
		}
	}
}

// TestTruncated cuts payloads at every length. A deflate payload may lose what follows its last byte
// of output, a zstd payload nothing.
func TestTruncated(t *testing.T) {
	for _, typ := range types {
		for _, c := range contents[:5] {
			src := c.cluster(2048, 5)
			dst := make([]byte, len(src))
			n, ok, _ := Compress(dst, src, typ)
			if !ok {
				continue
			}
			payload := bytes.Clone(dst[:n])
			for cut := range n {
				err := Decompress(dst, payload[:cut], typ)
				if err == nil && typ == Deflate && cut >= n-8 && bytes.Equal(dst, src) {
					continue // only the end of the last block, and an empty one, was lost
				}
				if !errors.Is(err, ErrShort) {
					t.Errorf("%v %s cut at %d of %d: %v, want ErrShort", typ, c.name, cut, n, err)
				}
			}
		}
	}
}

func TestArguments(t *testing.T) {
	buf := make([]byte, MaxClusterSize+1)
	for _, n := range []int{0, len(buf)} {
		for _, typ := range types {
			if _, _, err := Compress(nil, buf[:n], typ); !errors.Is(err, ErrSize) {
				t.Errorf("Compress %d bytes: %v, want ErrSize", n, err)
			}
			if err := Decompress(buf[:n], []byte{3, 0}, typ); !errors.Is(err, ErrSize) {
				t.Errorf("Decompress %d bytes: %v, want ErrSize", n, err)
			}
		}
	}
	if _, _, err := Compress(buf, buf[:512], 2); !errors.Is(err, ErrType) {
		t.Errorf("Compress with type 2: %v, want ErrType", err)
	}
	if err := Decompress(buf[:512], buf[512:1024], 2); !errors.Is(err, ErrType) {
		t.Errorf("Decompress with type 2: %v, want ErrType", err)
	}
	for typ, want := range map[Type]string{Deflate: "zlib", Zstd: "zstd", 7: "unknown"} {
		if got := typ.String(); got != want {
			t.Errorf("%d is %q, want %q", typ, got, want)
		}
	}
}

// deflateWide appends src to buf as a deflate stream that reaches back 32 KiB.
func deflateWide(t *testing.T, buf *bytes.Buffer, src []byte) {
	t.Helper()
	w, err := flate.NewWriter(buf, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(src); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestInflateWindow decodes deflate streams of encoders that reach back 32 KiB.
func TestInflateWindow(t *testing.T) {
	src := contents[2].cluster(1<<20, 6)
	var buf bytes.Buffer
	deflateWide(t, &buf, src)
	if dist, n, err := walkDeflate(buf.Bytes()); err != nil || dist <= 1<<14 || n != len(src) {
		t.Fatalf("the stream reaches back %d bytes of %d (%v): not a test", dist, n, err)
	}
	got := make([]byte, len(src))
	if err := Decompress(got, buf.Bytes(), Deflate); err != nil || !bytes.Equal(got, src) {
		t.Errorf("differs, or %v", err)
	}
}

// inflateByPackage is inflate by package flate.
func inflateByPackage(dst, src []byte) error {
	r := flate.NewReader(bytes.NewReader(src))
	if _, err := io.ReadFull(r, dst); err != nil {
		return err
	}
	for {
		n, err := r.Read(make([]byte, 1))
		if n > 0 {
			return ErrLong
		}
		if err != nil {
			return nil
		}
	}
}

// TestInflateAgrees damages deflate payloads: package flate unpacks the same ones, to the same bytes.
func TestInflateAgrees(t *testing.T) {
	const seed = 12
	rng := rand.New(rand.NewPCG(seed, seed))
	good, bad := 0, 0
	for _, c := range contents[:5] {
		src := c.cluster(4096, 9)
		for _, level := range []int{flate.HuffmanOnly, flate.NoCompression, 1, 6, 9} {
			var buf bytes.Buffer
			w, err := flate.NewWriter(&buf, level)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(src); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			for round := range 400 {
				p := bytes.Clone(buf.Bytes())
				for range rng.IntN(4) {
					at := rng.IntN(len(p))
					if round%2 == 0 {
						at = rng.IntN(min(len(p), 80)) // the codes are there
					}
					p[at] ^= 1 << rng.IntN(8)
				}
				p = p[:len(p)-rng.IntN(2)*rng.IntN(len(p))]
				want, got := make([]byte, len(src)), make([]byte, len(src))
				wantErr, gotErr := inflateByPackage(want, p), inflate(got, p)
				if gotErr == nil && wantErr == io.ErrUnexpectedEOF {
					// It asks for a code more, as long as the longest, where the end of the input cuts the end of the stream.
					if wantErr = inflateByPackage(want, append(p, 0, 0)); errors.Is(wantErr, ErrLong) {
						wantErr = nil
					}
				}
				switch {
				case (wantErr == nil) != (gotErr == nil), wantErr == nil && !bytes.Equal(got, want):
					t.Fatalf("seed %d, %s, level %d, round %d: %v, want %v (payload %x)", seed, c.name, level, round, gotErr, wantErr, p)
				case wantErr == nil:
					good++
				default:
					bad++
				}
			}
		}
	}
	if good < 100 || bad < 100 {
		t.Errorf("%d payloads unpack, %d do not: too few to say much", good, bad)
	}
}

// TestCompressWindow packs with the wide window: payloads reach further back than the narrow one, and unpack to what they were.
func TestCompressWindow(t *testing.T) {
	farthest := 0
	for _, size := range clusterSizes {
		for _, c := range contents {
			src := c.cluster(size, 11)
			dst := make([]byte, size)
			n, ok, err := CompressWindow(dst, src, Deflate, WideWindow)
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				if c.shrinks {
					t.Errorf("%s of %d bytes does not shrink", c.name, size)
				}
				continue
			}
			dist, plain, err := walkDeflate(dst[:n])
			if err != nil || plain != size || dist > WideWindow {
				t.Fatalf("%s of %d bytes: walked %d bytes, %d back, %v", c.name, size, plain, dist, err)
			}
			farthest = max(farthest, dist)
			got := make([]byte, size)
			if err := Decompress(got, dst[:n], Deflate); err != nil || !bytes.Equal(got, src) {
				t.Errorf("%s of %d bytes: differs, or %v", c.name, size, err)
			}
		}
	}
	if farthest <= WideWindow/2 {
		t.Errorf("the farthest match is %d bytes back: the contents do not try the window", farthest)
	}
	for _, window := range []int{0, 512, NarrowWindow - 1, WideWindow + 1} {
		if _, _, err := CompressWindow(nil, make([]byte, 512), Deflate, window); !errors.Is(err, ErrWindow) {
			t.Errorf("window %d: %v, want ErrWindow", window, err)
		}
	}
}

// TestDeflateDistance walks deflate payloads and asks how far they reach back. Encoders are reused
// between the rounds, because what is left in a pooled one must not matter.
func TestDeflateDistance(t *testing.T) {
	farthest := 0
	for round := uint64(0); round < 3; round++ {
		for _, size := range clusterSizes {
			if round > 0 && size > 1<<16 {
				continue
			}
			for _, c := range contents {
				src := c.cluster(size, 7+round)
				dst := make([]byte, size)
				n, ok, err := Compress(dst, src, Deflate)
				if err != nil {
					t.Fatal(err)
				}
				if !ok {
					continue
				}
				dist, plain, err := walkDeflate(dst[:n])
				if err != nil || plain != size {
					t.Fatalf("%s of %d bytes: walked %d bytes, %v", c.name, size, plain, err)
				}
				if dist > NarrowWindow {
					t.Errorf("%s of %d bytes: reaches back %d bytes", c.name, size, dist)
				}
				farthest = max(farthest, dist)
			}
		}
	}
	if farthest < NarrowWindow/2 {
		t.Errorf("the farthest match is %d bytes back: the contents do not try the window", farthest)
	}
}

// zstdFrame returns src as a frame of an encoder with the given options.
func zstdFrame(t testing.TB, src []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil, append(opts, zstd.WithEncoderConcurrency(1))...)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	return enc.EncodeAll(src, nil)
}

// zstdStream returns src as a frame that was written in pieces, so that its header has no content size.
func zstdStream(t testing.TB, src []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	enc, err := zstd.NewWriter(&buf, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	for len(src) > 0 {
		n := min(len(src), 1000)
		if _, err := enc.Write(src[:n]); err != nil {
			t.Fatal(err)
		}
		if err := enc.Flush(); err != nil {
			t.Fatal(err)
		}
		src = src[n:]
	}
	if err := enc.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// skippable returns a skippable frame of n bytes of content.
func skippable(n int) []byte {
	return append(binary.LittleEndian.AppendUint32([]byte{0x57, 0x2a, 0x4d, 0x18}, uint32(n)), make([]byte, n)...)
}

// badChecksum returns the frame with its last byte changed.
func badChecksum(frame []byte) []byte {
	p := bytes.Clone(frame)
	p[len(p)-1] ^= 1
	return p
}

// errAny stands in tables for an error of the decoder that is not one of ours.
var errAny = errors.New("any error")

// TestZstdFrames decodes payloads of one or more frames of every shape.
func TestZstdFrames(t *testing.T) {
	const size = 1 << 16
	src := contents[1].cluster(size, 8)
	crc := zstdFrame(t, src, zstd.WithEncoderCRC(true))
	halves := append(zstdFrame(t, src[:size/2]), zstdStream(t, src[size/2:])...)
	third := zstdFrame(t, src[:size/3])
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	random := contents[5].cluster(size, 9)

	tests := []struct {
		name    string
		payload []byte
		want    []byte // src if nil
		wantErr error
	}{
		{name: "checksum", payload: crc},
		{name: "checksum and rubbish", payload: padded(crc, 300)},
		{name: "no content size", payload: zstdStream(t, src)},
		{name: "no content size and rubbish", payload: padded(zstdStream(t, src), 300)},
		{name: "single segment", payload: zstdFrame(t, src, zstd.WithSingleSegment(true))},
		{name: "8 MiB window", payload: zstdFrame(t, src, zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false))},
		{name: "raw blocks", payload: zstdFrame(t, random), want: random},
		{name: "two frames", payload: halves},
		{name: "two frames and rubbish", payload: padded(halves, 7)},
		{name: "skippable between", payload: join(skippable(0), zstdFrame(t, src[:100]), skippable(400), zstdStream(t, src[100:]))},
		{name: "empty frames between", payload: join(zstdFrame(t, nil), third, zstdFrame(t, nil), zstdFrame(t, src[size/3:]))},
		{name: "many frames", payload: func() (p []byte) {
			for i := 0; i < size; i += 1024 {
				p = append(p, zstdFrame(t, src[i:i+1024])...)
			}
			return p
		}()},

		{name: "empty", payload: nil, wantErr: ErrShort},
		{name: "no magic", payload: make([]byte, 512), wantErr: errZstdMagic},
		{name: "wrong checksum", payload: badChecksum(crc), wantErr: zstd.ErrCRCMismatch},
		{name: "half of the checksum", payload: crc[:len(crc)-2], wantErr: ErrShort},
		{name: "no last block", payload: halves[:len(halves)-3], wantErr: ErrShort},
		{name: "one frame of two", payload: zstdFrame(t, src[:size/2]), wantErr: ErrShort},
		{name: "rubbish between", payload: join(third, make([]byte, 5), zstdFrame(t, src[size/3:])), wantErr: errZstdMagic},
		{name: "skippable over the end", payload: skippable(10)[:17], wantErr: ErrShort},
		{name: "skippable of 4 GiB", payload: []byte{0x50, 0x2a, 0x4d, 0x18, 255, 255, 255, 255, 0, 0}, wantErr: ErrShort},
		{name: "frame over the end of the cluster", payload: join(third, zstdFrame(t, src)), wantErr: ErrLong},
		{name: "stream over the end of the cluster", payload: zstdStream(t, append(bytes.Clone(src), 1)), wantErr: ErrLong},
		{name: "raw blocks over the end of the cluster", payload: zstdFrame(t, contents[5].cluster(size+1, 9)), wantErr: ErrLong},
		{name: "content size over the end of the cluster", payload: zstdFrame(t, make([]byte, 10*size)), wantErr: ErrLong},
		{name: "dictionary", payload: []byte{0x28, 0xb5, 0x2f, 0xfd, 1, 0x58, 9, 1, 0, 0}, wantErr: zstd.ErrUnknownDictionary},
		{name: "reserved bit", payload: []byte{0x28, 0xb5, 0x2f, 0xfd, 8, 0x58, 1, 0, 0}, wantErr: errAny},
		{name: "reserved block type", payload: []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x58, 7, 0, 0}, wantErr: zstd.ErrReservedBlockType},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := make([]byte, size)
			err := Decompress(got, tt.payload, Zstd)
			if tt.wantErr != nil {
				if err == nil || tt.wantErr != errAny && !errors.Is(err, tt.wantErr) {
					t.Errorf("got error %v, want %v", err, tt.wantErr)
				}
				return
			}
			want := tt.want
			if want == nil {
				want = src
			}
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("differs, or %v", err)
			}
		})
	}
}

// hostile are payloads that claim or hold far more than a cluster.
func hostile() map[string]struct {
	typ     Type
	payload []byte
} {
	type p = struct {
		typ     Type
		payload []byte
	}
	frame := func(header ...byte) []byte { return append([]byte{0x28, 0xb5, 0x2f, 0xfd}, header...) }
	// An RLE block turns four bytes into 128 KiB, as often as it comes.
	bomb := frame(0, 0x88) // a window of 128 MiB
	for range 5000 {
		bomb = append(bomb, 2, 0, 0x10, 0xaa)
	}
	bomb = append(bomb, 1, 0, 0)
	var deflateBomb bytes.Buffer
	w, _ := flate.NewWriter(&deflateBomb, flate.BestCompression)
	for range 32 {
		_, _ = w.Write(make([]byte, 1<<20))
	}
	_ = w.Close()
	return map[string]p{
		"zstd bomb":                {Zstd, bomb},
		"zstd content size 2^63":   {Zstd, frame(0xe0, 0, 0, 0, 0, 0, 0, 0, 0x80, 1, 0, 0)},
		"zstd content size 2^64-1": {Zstd, frame(0xe0, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0)},
		"zstd content size 2 GiB":  {Zstd, frame(0xa0, 0, 0, 0, 0x80, 1, 0, 0)},
		"zstd window 128 MiB":      {Zstd, frame(0, 0x88, 1, 0, 0)},
		"zstd window 3.75 TiB":     {Zstd, frame(0, 0xff, 1, 0, 0)},
		"zstd window 128 MiB and blocks": {Zstd, append(append(frame(0, 0x88), bytes.Repeat([]byte{2, 0, 0x10, 7}, 3)...),
			1, 0, 0)},
		"zstd literals 1 MiB":               {Zstd, frame(0, 0x88, 5|6<<3, 0, 0, 0xfd, 0xff, 0xff, 0, 0, 0)},
		"deflate bomb":                      {Deflate, deflateBomb.Bytes()},
		"deflate empty blocks":              {Deflate, bytes.Repeat([]byte{0, 0, 0, 0xff, 0xff}, 100000)},
		"deflate reserved":                  {Deflate, []byte{7}},
		"deflate rubbish":                   {Deflate, padded(nil, 1<<16)},
		"deflate distance before the start": {Deflate, []byte{0x63, 0x60, 0x80, 0x05, 0x00}},
	}
}

// TestHostile decodes hostile payloads with warm and with cold pools and looks at what that allocates.
func TestHostile(t *testing.T) {
	const size = 1 << 16
	// A cold decoder makes its own tables; a block is at most 128 KiB, and may be held twice.
	const most = size + 1<<20
	dst := make([]byte, size)
	for name, h := range hostile() {
		t.Run(name, func(t *testing.T) {
			for range 3 {
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				err := Decompress(dst, h.payload, h.typ)
				runtime.ReadMemStats(&after)
				if err == nil {
					t.Error("accepted")
				}
				if n := after.TotalAlloc - before.TotalAlloc; n > most {
					t.Errorf("allocated %d bytes, want at most %d (%v)", n, most, err)
				}
			}
		})
	}
}

// TestAfterErrors uses the pools for good payloads right after bad ones.
func TestAfterErrors(t *testing.T) {
	const size = 1 << 16
	good := map[Type][]byte{}
	src := contents[1].cluster(size, 10)
	for _, typ := range types {
		good[typ] = pack(t, src, typ)
	}
	got := make([]byte, size)
	for name, h := range hostile() {
		if err := Decompress(got, h.payload, h.typ); err == nil {
			t.Errorf("%s: accepted", name)
		}
		clear(got)
		if err := Decompress(got, good[h.typ], h.typ); err != nil || !bytes.Equal(got, src) {
			t.Errorf("after %s: differs, or %v", name, err)
		}
	}
	noise := contents[5].cluster(size, 11)
	for _, typ := range types {
		if _, ok, err := Compress(got, noise, typ); ok || err != nil {
			t.Fatalf("%v: random bytes: %v, %v", typ, ok, err)
		}
		clear(got)
		if err := Decompress(got, pack(t, src, typ), typ); err != nil || !bytes.Equal(got, src) {
			t.Errorf("%v after random bytes: differs, or %v", typ, err)
		}
	}
}

func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("pools drop entries at random under the race detector")
	}
	for _, typ := range types {
		for _, size := range []int{512, 1 << 16, MaxClusterSize} {
			for _, c := range []content{contents[1], contents[5]} {
				src := c.cluster(size, 12)
				dst := make([]byte, size)
				var ok bool
				if n := testing.AllocsPerRun(20, func() { _, ok, _ = Compress(dst, src, typ) }); n != 0 {
					t.Errorf("%v Compress %d bytes of %s: %v allocations", typ, size, c.name, n)
				}
				if !ok {
					continue
				}
				payload := pack(t, src, typ)
				if n := testing.AllocsPerRun(20, func() {
					if err := Decompress(dst, payload, typ); err != nil {
						t.Error(err)
					}
				}); n != 0 {
					t.Errorf("%v Decompress %d bytes of %s: %v allocations", typ, size, c.name, n)
				}
			}
		}
	}
}

func TestConcurrent(t *testing.T) {
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 20 {
				typ := types[(g+i)%2]
				src := contents[1+i%3].cluster(512<<(i%8), uint64(g*100+i))
				dst, got := make([]byte, len(src)), make([]byte, len(src))
				n, ok, err := Compress(dst, src, typ)
				if err != nil {
					t.Error(err)
				}
				if !ok {
					continue
				}
				if err := Decompress(got, dst[:n], typ); err != nil || !bytes.Equal(got, src) {
					t.Errorf("%v, seed %d, %d bytes: differs, or %v", typ, g*100+i, len(src), err)
				}
			}
		}()
	}
	wg.Wait()
}

func FuzzDecompress(f *testing.F) {
	for _, typ := range types {
		for _, c := range contents[:5] {
			for _, size := range []int{512, 4096} {
				src := c.cluster(size, 13)
				dst := make([]byte, size)
				if n, ok, _ := Compress(dst, src, typ); ok {
					f.Add(dst[:n], uint8(typ), uint32(size))
					f.Add(padded(dst[:n/2], 20), uint8(typ), uint32(size))
				}
			}
		}
	}
	for _, h := range hostile() {
		if len(h.payload) < 1<<12 {
			f.Add(h.payload, uint8(h.typ), uint32(512))
		}
	}
	f.Fuzz(func(t *testing.T, payload []byte, typ uint8, size uint32) {
		size = size%(1<<17) + 1
		const guard = 32
		keep := bytes.Clone(payload)
		buf := bytes.Repeat([]byte{0xdd}, int(size)+guard)
		dst := buf[:size:size]
		err := Decompress(dst, payload, Type(typ%2))
		if !bytes.Equal(buf[size:], bytes.Repeat([]byte{0xdd}, guard)) {
			t.Fatal("wrote past the cluster")
		}
		if !bytes.Equal(payload, keep) {
			t.Fatal("changed the payload")
		}
		if err != nil {
			return
		}
		if Type(typ%2) == Deflate {
			want := make([]byte, size)
			if err := inflateByPackage(want, payload); err == nil && !bytes.Equal(want, dst) {
				t.Fatal("package flate unpacks it to other bytes")
			}
		}
		// The result depends on nothing but the payload, and what was decoded can be packed again.
		again := bytes.Repeat([]byte{0x22}, int(size))
		if err := Decompress(again, payload, Type(typ%2)); err != nil || !bytes.Equal(again, dst) {
			t.Fatalf("decoded again: differs, or %v", err)
		}
		packed := make([]byte, size)
		n, ok, err := Compress(packed, dst, Type(typ%2))
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return
		}
		if err := Decompress(again, packed[:n], Type(typ%2)); err != nil || !bytes.Equal(again, dst) {
			t.Fatalf("packed again: differs, or %v", err)
		}
		if typ%2 == uint8(Deflate) {
			if dist, _, err := walkDeflate(packed[:n]); err != nil || dist > NarrowWindow {
				t.Fatalf("packed again: reaches back %d bytes, %v", dist, err)
			}
		}
	})
}

func BenchmarkCompress(b *testing.B) {
	for _, typ := range types {
		for _, c := range []content{contents[1], contents[4], contents[5]} {
			b.Run(fmt.Sprintf("%v/cluster=64KiB/%s", typ, c.name), func(b *testing.B) {
				src := c.cluster(1<<16, 14)
				dst := make([]byte, len(src))
				b.SetBytes(int64(len(src)))
				b.ReportAllocs()
				n, ok := 0, false
				for b.Loop() {
					n, ok, _ = Compress(dst, src, typ)
				}
				if ok {
					b.ReportMetric(float64(n)/float64(len(src)), "ratio")
				}
			})
		}
	}
}

func BenchmarkDecompress(b *testing.B) {
	for _, typ := range types {
		for _, c := range []content{contents[1], contents[4]} {
			b.Run(fmt.Sprintf("%v/cluster=64KiB/%s", typ, c.name), func(b *testing.B) {
				src := c.cluster(1<<16, 15)
				payload := pack(b, src, typ)
				dst := make([]byte, len(src))
				b.SetBytes(int64(len(src)))
				b.ReportAllocs()
				for b.Loop() {
					if err := Decompress(dst, payload, typ); err != nil {
						b.Fatal(err)
					}
				}
				if !bytes.Equal(dst, src) {
					b.Fatal("differs")
				}
			})
		}
	}
}
