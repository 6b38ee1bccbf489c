package codec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// maxZstdWindow is the largest window that a frame may declare, in bytes: 128 MiB, which is where the
// reference decoder refuses unless told otherwise. It costs nothing here: the history is the cluster.
const maxZstdWindow = 128 << 20

// zstdEncoder is a pooled zstd encoder. It is used by one goroutine at a time.
type zstdEncoder struct {
	enc *zstd.Encoder
	buf []byte // a whole frame, so that one that does not shrink needs no allocation
}

// zstdEncoders and zstdEntropyCoders hold idle *zstdEncoder. The first kind takes what has no matches for
// incompressible, which is a tenth faster. The second one, asked for what does not shrink, packs few symbols without
// matches, too.
var (
	zstdEncoders      = sync.Pool{New: func() any { return newZstdEncoder(false) }}
	zstdEntropyCoders = sync.Pool{New: func() any { return newZstdEncoder(true) }}
)

// newZstdEncoder returns an encoder that packs literals without matches if allLiterals is set.
func newZstdEncoder(allLiterals bool) *zstdEncoder {
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false),
		zstd.WithSingleSegment(true), // no window descriptor: one byte less
		zstd.WithAllLitEntropyCompression(allLiterals),
		zstd.WithWindowSize(MaxClusterSize),
		zstd.WithLowerEncoderMem(true))
	if err != nil {
		panic(err) // the options are constants within their bounds
	}
	return &zstdEncoder{enc: enc}
}

// zstdCompress packs src into dst as one frame and returns the length; ok is false if it does not
// fit.
func zstdCompress(dst, src []byte) (n int, ok bool) {
	if n, ok = zstdCompressWith(&zstdEncoders, dst, src); !ok {
		n, ok = zstdCompressWith(&zstdEntropyCoders, dst, src)
	}
	return n, ok
}

// zstdCompressWith is zstdCompress with an encoder of pool.
func zstdCompressWith(pool *sync.Pool, dst, src []byte) (n int, ok bool) {
	e := pool.Get().(*zstdEncoder)
	defer pool.Put(e)
	if room := e.enc.MaxEncodedSize(len(src)); cap(e.buf) < room {
		e.buf = make([]byte, 0, room)
	}
	e.buf = e.enc.EncodeAll(src, e.buf[:0])
	if len(e.buf) > len(dst) {
		return 0, false
	}
	return copy(dst, e.buf), true
}

// zstdDecoders holds idle *zstd.Decoder, each used by one goroutine at a time. They decode straight
// into the cluster (DecodeAll), so that no window is allocated, and run no goroutines of their own.
var zstdDecoders = sync.Pool{New: func() any {
	dec, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxZstdWindow),
		zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err) // the options are constants within their bounds
	}
	return dec
}}

// zstdDecompress unpacks the frames of src into dst until it is full.
//
// Each frame is measured first and decoded alone, because the decoder would take what follows the
// last one, which is padding or another cluster's payload, for a damaged frame.
func zstdDecompress(dst, src []byte) error {
	dec := zstdDecoders.Get().(*zstd.Decoder)
	defer zstdDecoders.Put(dec)
	for filled := 0; filled < len(dst); {
		n, skip, err := zstdFrameLen(src)
		if err != nil {
			return fmt.Errorf("zstd: %d of %d bytes: %w", filled, len(dst), err)
		}
		frame := src[:n]
		src = src[n:]
		if skip {
			continue
		}
		out, err := dec.DecodeAll(frame, dst[filled:filled:len(dst)])
		switch {
		case errors.Is(err, zstd.ErrDecoderSizeExceeded), err == nil && len(out) > len(dst)-filled:
			return fmt.Errorf("zstd: %w of %d bytes", ErrLong, len(dst))
		case err != nil:
			return fmt.Errorf("zstd: %d of %d bytes: %w", filled, len(dst), err)
		}
		if len(out) > 0 && &out[0] != &dst[filled] {
			copy(dst[filled:], out) // the decoder wanted slack behind its output
		}
		filled += len(out)
	}
	return nil
}

// errZstdMagic says that no frame starts where one is needed.
var errZstdMagic = errors.New("no zstd frame")

// zstdFrameLen returns the length in bytes of the frame at the start of src, and whether it is a
// skippable one. ErrShort if src ends before the frame does. RFC 8878, sections 3.1.1 and 3.1.2.
func zstdFrameLen(src []byte) (n int, skip bool, err error) {
	const (
		magic     = 0xFD2FB528
		skipMagic = 0x184D2A50 // the low four bits are free
	)
	if len(src) < 4 {
		return 0, false, ErrShort
	}
	m := binary.LittleEndian.Uint32(src)
	if m&^0xf == skipMagic {
		if len(src) < 8 || uint64(binary.LittleEndian.Uint32(src[4:])) > uint64(len(src)-8) {
			return 0, true, ErrShort
		}
		return 8 + int(binary.LittleEndian.Uint32(src[4:])), true, nil
	}
	if m != magic {
		return 0, false, errZstdMagic
	}
	if len(src) < 5 {
		return 0, false, ErrShort
	}

	// Frame header: descriptor, window descriptor, dictionary id, content size.
	descriptor := src[4]
	singleSegment := descriptor&(1<<5) != 0
	checksum := descriptor&(1<<2) != 0
	n = 5
	if !singleSegment {
		n++
	}
	n += [4]int{0, 1, 2, 4}[descriptor&3]
	switch sizeFlag := descriptor >> 6; {
	case sizeFlag > 0:
		n += 1 << sizeFlag
	case singleSegment:
		n++
	}

	// Blocks: three bytes of header each (last, type, size), then the content.
	const blockRLE = 1
	for last := false; !last; {
		if n > len(src)-3 {
			return 0, false, ErrShort
		}
		header := int(src[n]) | int(src[n+1])<<8 | int(src[n+2])<<16
		n += 3
		last = header&1 != 0
		size := header >> 3
		if header>>1&3 == blockRLE {
			size = 1
		}
		if size > len(src)-n {
			return 0, false, ErrShort
		}
		n += size
	}
	if checksum {
		n += 4
	}
	if n > len(src) {
		return 0, false, ErrShort
	}
	return n, false, nil
}
