// Package codec packs and unpacks the payloads of compressed clusters: raw deflate and zstd, one
// cluster at a time.
//
// Encoders and decoders are kept in pools, so that a call allocates nothing once the pools are warm.
// Every function is safe for concurrent use and keeps none of the slices it is given.
//
// # Untrusted input
//
// Decompress writes into the caller's cluster and nowhere else. What it allocates beside is bounded
// by the cluster and by constants of the decoders (some 200 KiB), whatever the payload claims.
//
// qcow2 spec, "Compressed Clusters Descriptor" and the header field compression_type.
package codec

import (
	"errors"
	"fmt"
)

// Type is a compression type, as in the header field compression_type.
type Type uint8

const (
	Deflate Type = 0 // raw deflate (RFC 1951), without zlib's header and checksum
	Zstd    Type = 1 // zstd frames (RFC 8878)
)

// String returns QEMU's name of the type, or "unknown".
func (t Type) String() string {
	switch t {
	case Deflate:
		return "zlib"
	case Zstd:
		return "zstd"
	}
	return "unknown"
}

// MaxClusterSize is the largest cluster in bytes, 2 MiB: the format's own bound.
const MaxClusterSize = 2 << 20

var (
	// ErrType says that a compression type is neither Deflate nor Zstd.
	ErrType = errors.New("unknown compression type")
	// ErrWindow says that a window is neither NarrowWindow nor WideWindow.
	ErrWindow = errors.New("no window of deflate payloads")
	// ErrSize says that the plain side of a call is empty or larger than MaxClusterSize.
	ErrSize = errors.New("not the size of a cluster")
	// ErrShort says that a payload ends, or is cut off, before the cluster is full.
	ErrShort = errors.New("compressed data ends before the cluster is full")
	// ErrLong says that a payload holds more than a cluster.
	ErrLong = errors.New("compressed data holds more than a cluster")
)

// Compress packs the cluster src into dst, of which it uses the capacity, and returns the length of
// the payload. A payload is at most len(src)-1 bytes, so that a dst of that capacity always does; it
// must not overlap src. ok is false, without an error, if the payload would not fit: the cluster is
// then stored plain.
//
// Deflate payloads reach back at most 4 KiB, which is the window that QEMU gives its decoder. Zstd
// payloads are one frame without a checksum.
//
// ErrType and ErrSize are the only errors. Equal clusters give equal payloads under one type, whatever the encoders
// did before (but not under another version of this package, or of the encoders').
func Compress(dst, src []byte, typ Type) (n int, ok bool, err error) {
	return CompressWindow(dst, src, typ, NarrowWindow)
}

// The windows of deflate payloads in bytes.
const (
	NarrowWindow = 1 << 12 // QEMU's
	WideWindow   = 1 << 15 // the format's
)

// CompressWindow is Compress with deflate payloads that reach back at most window bytes: NarrowWindow or WideWindow.
// The window is nothing to zstd.
func CompressWindow(dst, src []byte, typ Type, window int) (n int, ok bool, err error) {
	if window != NarrowWindow && window != WideWindow {
		return 0, false, fmt.Errorf("compress: %w: %d bytes", ErrWindow, window)
	}
	if len(src) == 0 || len(src) > MaxClusterSize {
		return 0, false, fmt.Errorf("compress %d bytes: %w", len(src), ErrSize)
	}
	dst = dst[:min(cap(dst), len(src)-1)]
	switch typ {
	case Deflate:
		n, ok = deflate(dst, src, window)
	case Zstd:
		n, ok = zstdCompress(dst, src)
	default:
		return 0, false, fmt.Errorf("compress: %w: %d", ErrType, typ)
	}
	return n, ok, nil
}

// Decompress unpacks the payload src into dst, which is one cluster, and fills it exactly. What
// follows the payload in src is ignored, because the descriptor counts sectors.
//
// A deflate payload must decode to len(dst) bytes; its window may be up to 32 KiB. What comes after
// the last of these bytes may be the end of the stream or anything else that yields no further byte.
// A zstd payload is a sequence of frames, skippable ones included, of which the one that fills the
// cluster must be whole.
//
// ErrShort and ErrLong say that the payload is too short or too long, ErrType and ErrSize that the
// call is wrong; any other error is the decoder's. After an error the content of dst is undefined.
func Decompress(dst, src []byte, typ Type) error {
	if len(dst) == 0 || len(dst) > MaxClusterSize {
		return fmt.Errorf("decompress to %d bytes: %w", len(dst), ErrSize)
	}
	switch typ {
	case Deflate:
		return inflate(dst, src)
	case Zstd:
		return zstdDecompress(dst, src)
	}
	return fmt.Errorf("decompress: %w: %d", ErrType, typ)
}
