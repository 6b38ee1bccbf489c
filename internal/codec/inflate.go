package codec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
)

// A deflate decoder for clusters: the whole payload and the whole output are in memory, so that it keeps no window of
// its own, copies nothing twice, and looks up codes in tables by 64 bits of input at a time. RFC 1951.
//
// It is here because the decoders of the standard library and of klauspost/compress, which are made for streams, take 1.7
// times its processor time: reading compressed images would be no faster than qemu-img. TestInflateAgrees and
// FuzzDecompress hold it to what package flate makes of the same payloads, damaged ones included.

// Entries of the tables of Huffman codes. An entry of 0 belongs to no code.
//
//	bits 0-7    the length of the code in bits; of a link, the bits by which the second table is indexed
//	bits 8-12   the number of extra bits that follow
//	bit 13      a literal: the value is the byte
//	bit 14      the end of the block, or, with a value of 1, a symbol that means nothing
//	bit 15      a link: the value is the index of the second table
//	bits 16-31  the value: a byte, a base length or distance, an index
const (
	entryLiteral = 1 << 13
	entryEnd     = 1 << 14
	entryLink    = 1 << 15
	entryExtra   = 0x1f
)

const (
	literalBits  = 11 // index of the first table of literals and lengths
	distanceBits = 8  // that of distances
	maxCodeBits  = 15

	maxLiterals  = 286 // symbols that a block may have codes for
	maxDistances = 30
	endOfBlock   = 256
)

// What symbols stand for, without the lengths of their codes. Immutable.
var (
	literalEntries  = makeLiteralEntries()
	distanceEntries = makeDistanceEntries()
	lengthOrder     = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
)

// makeLiteralEntries makes the entries of literals and lengths. RFC 1951, section 3.2.5.
func makeLiteralEntries() (e [288]uint32) {
	for i := range uint32(256) {
		e[i] = i<<16 | entryLiteral
	}
	e[endOfBlock] = entryEnd
	base := uint32(3)
	for i := uint32(0); i < 28; i++ {
		extra := uint32(0)
		if i >= 8 {
			extra = i/4 - 1
		}
		e[257+i] = base<<16 | extra<<8
		base += 1 << extra
	}
	e[285] = 258 << 16
	e[286], e[287] = 1<<16|entryEnd, 1<<16|entryEnd
	return e
}

// makeDistanceEntries makes the entries of distances.
func makeDistanceEntries() (e [32]uint32) {
	base := uint32(1)
	for i := range uint32(maxDistances) {
		extra := uint32(0)
		if i >= 4 {
			extra = i/2 - 1
		}
		e[i] = base<<16 | extra<<8
		base += 1 << extra
	}
	e[30], e[31] = 1<<16|entryEnd, 1<<16|entryEnd
	return e
}

// inflater is a pooled deflate decoder. It is used by one goroutine at a time.
//
// The tables are as long as complete codes make them: a second table has two codes at least, so there are no more of them
// than half the symbols.
type inflater struct {
	literals  [1<<literalBits + 288/2<<(maxCodeBits-literalBits)]uint32
	distances [1<<distanceBits + 32/2<<(maxCodeBits-distanceBits)]uint32
	lengths   [1 << 7]uint32
	symbols   [maxLiterals + maxDistances]uint8 // code lengths of a block
	fixed     bool                              // literals and distances are those of fixed codes

	src  []byte
	pos  int    // bytes of src in buf or consumed; past the end they are zeros
	buf  uint64 // bits to come, the next one lowest
	have uint   // their number; what is above them in buf is 0, or what comes next
}

// inflaters holds idle *inflater.
var inflaters = sync.Pool{New: func() any { return new(inflater) }}

// errDeflate says that a payload is no deflate stream.
var errDeflate = errors.New("not a deflate stream")

// inflate unpacks src into dst and fills it exactly.
//
// When the cluster is full, an end of the stream, a cut or garbage are all the same; only one more byte of output is not.
func inflate(dst, src []byte) error {
	i := inflaters.Get().(*inflater)
	i.src, i.pos, i.buf, i.have = src, 0, 0, 0
	n, err := i.blocks(dst)
	i.src = nil
	inflaters.Put(i)
	switch {
	case errors.Is(err, ErrLong):
		return fmt.Errorf("deflate: %w of %d bytes", ErrLong, len(dst))
	case n == len(dst):
		return nil
	case err == nil:
		err = ErrShort
	}
	return fmt.Errorf("deflate: %w: %d of %d bytes", err, n, len(dst))
}

// blocks decodes blocks until the last one ends. It returns how many bytes of dst it filled.
func (i *inflater) blocks(dst []byte) (n int, err error) {
	for last := false; !last && err == nil; {
		i.fill()
		last = i.take(1) == 1
		kind := i.take(2)
		if i.short() {
			return n, ErrShort
		}
		switch kind {
		case 0:
			n, err = i.stored(dst, n)
		case 1:
			i.fixedCodes()
			n, err = i.block(dst, n)
		case 2:
			if err = i.codes(); err == nil {
				n, err = i.block(dst, n)
			}
		default:
			err = errDeflate
		}
	}
	return n, err
}

// fill makes sure that there are 56 bits at least. Past the end of the input they are zeros.
func (i *inflater) fill() {
	if i.pos+8 <= len(i.src) {
		i.buf |= binary.LittleEndian.Uint64(i.src[i.pos:]) << i.have
		i.pos += int(63-i.have) >> 3
		i.have |= 56
		return
	}
	for i.have < 56 {
		if i.pos < len(i.src) {
			i.buf |= uint64(i.src[i.pos]) << i.have
		}
		i.pos++
		i.have += 8
	}
}

// take consumes n bits that are there.
func (i *inflater) take(n uint) uint64 {
	v := i.buf & (1<<n - 1)
	i.buf >>= n
	i.have -= n
	return v
}

// short reports whether bits were consumed that the input does not have.
func (i *inflater) short() bool { return i.pos > len(i.src) && (i.pos-len(i.src))*8 > int(i.have) }

// stored copies a block that is stored plain. RFC 1951, section 3.2.4.
func (i *inflater) stored(dst []byte, n int) (int, error) {
	i.take(i.have & 7)
	pos := i.pos - int(i.have>>3)
	i.buf, i.have = 0, 0
	if pos+4 > len(i.src) {
		return n, ErrShort
	}
	size := int(binary.LittleEndian.Uint16(i.src[pos:]))
	if size^0xffff != int(binary.LittleEndian.Uint16(i.src[pos+2:])) {
		return n, errDeflate
	}
	pos += 4
	i.pos = min(pos+size, len(i.src))
	k := copy(dst[n:], i.src[pos:i.pos])
	n += k
	switch {
	case k < i.pos-pos:
		return n, ErrLong
	case i.pos < pos+size:
		return n, ErrShort
	}
	return n, nil
}

// fixedCodes makes the tables of fixed codes. RFC 1951, section 3.2.6.
func (i *inflater) fixedCodes() {
	if i.fixed {
		return
	}
	var lengths [288]uint8
	for s := range lengths {
		switch {
		case s < 144 || s >= 280:
			lengths[s] = 8
		case s < 256:
			lengths[s] = 9
		default:
			lengths[s] = 7
		}
	}
	makeTable(i.literals[:], literalBits, lengths[:], literalEntries[:])
	for s := range 32 {
		lengths[s] = 5
	}
	makeTable(i.distances[:], distanceBits, lengths[:32], distanceEntries[:])
	i.fixed = true
}

// codes reads the codes of a block and makes their tables. RFC 1951, section 3.2.7.
func (i *inflater) codes() error {
	i.fixed = false
	i.fill()
	nLiterals, nDistances, nLengths := int(i.take(5))+257, int(i.take(5))+1, int(i.take(4))+4
	if i.short() {
		return ErrShort
	}
	if nLiterals > maxLiterals || nDistances > maxDistances {
		return errDeflate
	}
	var lengths [19]uint8
	for _, s := range lengthOrder[:nLengths] {
		i.fill()
		lengths[s] = uint8(i.take(3))
	}
	if i.short() {
		return ErrShort
	}
	var values [19]uint32
	for s := range values {
		values[s] = uint32(s)<<16 | entryLiteral
	}
	if !makeTable(i.lengths[:], 7, lengths[:], values[:]) {
		return errDeflate
	}
	all := i.symbols[:nLiterals+nDistances]
	for n := 0; n < len(all); {
		i.fill()
		e := i.lengths[i.buf&(1<<7-1)]
		i.take(uint(e & 0xff))
		value, repeat := uint8(0), 1
		switch s := e >> 16; {
		case e == 0:
			return i.broken()
		case s < 16:
			value = uint8(s)
		case s == 16:
			if n == 0 {
				return i.broken()
			}
			value, repeat = all[n-1], 3+int(i.take(2))
		case s == 17:
			repeat = 3 + int(i.take(3))
		default:
			repeat = 11 + int(i.take(7))
		}
		if i.short() {
			return ErrShort
		}
		if repeat > len(all)-n {
			return errDeflate
		}
		for range repeat {
			all[n] = value
			n++
		}
	}
	if !makeTable(i.literals[:], literalBits, all[:nLiterals], literalEntries[:]) ||
		!makeTable(i.distances[:], distanceBits, all[nLiterals:], distanceEntries[:]) {
		return errDeflate
	}
	return nil
}

// broken returns the error of a stream that goes on with what means nothing. Where all of the input is in buf, it may just
// end there.
func (i *inflater) broken() error {
	if i.pos >= len(i.src) {
		return ErrShort
	}
	return errDeflate
}

// makeTable makes the table of the code with the given lengths in bits, 0 for a symbol without a code; entries are what
// the symbols stand for. bits is the index of the first table, and all second ones are as long as the longest code asks
// for. It reports whether the code is complete; one of a single bit need not be, nor one without any symbol. RFC 1951,
// section 3.2.2.
func makeTable(table []uint32, rootBits uint, lengths []uint8, entries []uint32) bool {
	var count [maxCodeBits + 1]uint32
	for _, n := range lengths {
		count[n]++
	}
	count[0] = 0
	longest := uint(maxCodeBits)
	for longest > 0 && count[longest] == 0 {
		longest--
	}
	var next [maxCodeBits + 1]uint32 // code of each length
	code := uint32(0)
	for n := uint(1); n <= longest; n++ {
		code = (code + count[n-1]) << 1
		next[n] = code
		if code+count[n] > 1<<n {
			return false
		}
	}
	if longest == 0 || code+count[longest] != 1<<longest {
		if longest > 1 || longest == 1 && count[1] != 1 {
			return false
		}
		clear(table[:1<<rootBits])
	}
	second := 1 << rootBits // where the next second table comes to stand
	if longest > rootBits {
		// A link is made once, so what is left of an earlier code must not look like one.
		clear(table[:1<<rootBits])
	}
	for s, n := range lengths {
		if n == 0 {
			continue
		}
		rev := uint32(bits.Reverse16(uint16(next[n]))) >> (16 - n)
		next[n]++
		e := entries[s] | uint32(n)
		if uint(n) <= rootBits {
			for k := rev; k < 1<<rootBits; k += 1 << n {
				table[k] = e
			}
			continue
		}
		link := &table[rev&(1<<rootBits-1)]
		if *link == 0 {
			if second+1<<(longest-rootBits) > len(table) {
				return false
			}
			*link = uint32(second)<<16 | entryLink | uint32(longest-rootBits)
			second += 1 << (longest - rootBits)
		}
		part := table[*link>>16:][:1<<(longest-rootBits)]
		for k := rev >> rootBits; k < uint32(len(part)); k += 1 << (uint(n) - rootBits) {
			part[k] = e
		}
	}
	return true
}

// maxMatch is the longest match in bytes.
const maxMatch = 258

// fast decodes symbols of a block from dst[n] on for as long as neither the input nor the output is about to end, and the
// symbols are literals and matches. What it leaves is for block to look at.
func (i *inflater) fast(dst []byte, n int) int {
	const mask = 1<<literalBits - 1
	src, buf, have, pos := i.src, i.buf, i.have, i.pos
	for pos+8 <= len(src) && n+maxMatch+8 <= len(dst) {
		// Fill makes it 56 bits: enough for three literals of the first table, or for a match (15 + 5 + 15 + 13).
		buf |= binary.LittleEndian.Uint64(src[pos:]) << (have & 63)
		pos += int(63-have) >> 3
		have |= 56
		e := i.literals[buf&mask]
		if e&entryLiteral != 0 {
			buf >>= e & 63
			have -= uint(e & 63)
			dst[n] = byte(e >> 16)
			n++
			if e = i.literals[buf&mask]; e&entryLiteral != 0 {
				buf >>= e & 63
				have -= uint(e & 63)
				dst[n] = byte(e >> 16)
				n++
				if e = i.literals[buf&mask]; e&entryLiteral != 0 {
					buf >>= e & 63
					have -= uint(e & 63)
					dst[n] = byte(e >> 16)
					n++
				}
			}
			continue
		}
		before, left := buf, have
		if e&entryLink != 0 {
			e = i.literals[e>>16+uint32(buf>>literalBits)&(1<<(e&63)-1)]
		}
		buf >>= e & 63
		have -= uint(e & 63)
		if e&entryLiteral != 0 {
			dst[n] = byte(e >> 16)
			n++
			continue
		}
		extra := e >> 8 & entryExtra
		length := int(e>>16) + int(buf&(1<<extra-1))
		buf >>= extra
		have -= uint(extra)
		d := i.distances[buf&(1<<distanceBits-1)]
		if d&entryLink != 0 {
			d = i.distances[d>>16+uint32(buf>>distanceBits)&(1<<(d&63)-1)]
		}
		buf >>= d & 63
		have -= uint(d & 63)
		extra = d >> 8 & entryExtra
		distance := int(d>>16) + int(buf&(1<<extra-1))
		buf >>= extra
		have -= uint(extra)
		if e&entryEnd != 0 || e == 0 || d&entryEnd != 0 || d == 0 || distance > n {
			buf, have = before, left
			break
		}
		copyMatch(dst, n, length, distance)
		n += length
	}
	i.buf, i.have, i.pos = buf, have, pos
	return n
}

// block decodes a block with the codes in the tables, from dst[n] on.
func (i *inflater) block(dst []byte, n int) (int, error) {
	for {
		n = i.fast(dst, n)
		i.fill()
		e := i.literals[i.buf&(1<<literalBits-1)]
		if e&entryLink != 0 {
			e = i.literals[e>>16+uint32(i.buf>>literalBits)&(1<<(e&0xff)-1)]
		}
		i.buf >>= e & 0xff
		i.have -= uint(e & 0xff)
		if e&entryLiteral != 0 {
			switch {
			case i.short():
				return n, ErrShort
			case n == len(dst):
				return n, ErrLong
			}
			dst[n] = byte(e >> 16)
			n++
			continue
		}
		if e&entryEnd != 0 || e == 0 {
			switch {
			case i.short():
				return n, ErrShort
			case e>>16 == 0 && e != 0:
				return n, nil
			}
			return n, i.broken()
		}
		length := int(e>>16) + int(i.take(uint(e>>8&entryExtra)))

		d := i.distances[i.buf&(1<<distanceBits-1)]
		if d&entryLink != 0 {
			d = i.distances[d>>16+uint32(i.buf>>distanceBits)&(1<<(d&0xff)-1)]
		}
		i.buf >>= d & 0xff
		i.have -= uint(d & 0xff)
		if d == 0 {
			return n, i.broken()
		}
		distance := int(d>>16) + int(i.take(uint(d>>8&entryExtra)))
		switch {
		case i.short():
			return n, ErrShort
		case d&entryEnd != 0 || distance > n:
			return n, errDeflate
		case length > len(dst)-n:
			return len(dst), ErrLong
		}
		copyMatch(dst, n, length, distance)
		n += length
	}
}

// copyMatch copies length bytes from distance bytes before dst[n] to there. What it copies may overlap itself. It may
// write up to seven bytes more, which come to be written anyhow.
func copyMatch(dst []byte, n, length, distance int) {
	if distance >= 8 && n+length+8 <= len(dst) {
		from, to := dst[n-distance:], dst[n:n+length+8]
		for k := 0; k < length; k += 8 {
			binary.LittleEndian.PutUint64(to[k:], binary.LittleEndian.Uint64(from[k:]))
		}
		return
	}
	start, end := n-distance, n+length
	for n < end {
		n += copy(dst[n:end], dst[start:n])
	}
}
