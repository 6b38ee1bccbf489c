package codec

import "errors"

// errWalk says that walkDeflate met something that is not deflate.
var errWalk = errors.New("not a deflate stream")

// walker reads a deflate stream bit by bit, plainly and slowly, as a second opinion about what an
// encoder wrote. RFC 1951.
type walker struct {
	src  []byte
	bit  int // bits read so far
	dist int // the farthest distance met, in bytes
	out  int // bytes of output so far
}

// walkDeflate returns the farthest distance of a match in a whole deflate stream and the length of
// its output, both in bytes. A match that reaches back before the start is an error.
func walkDeflate(src []byte) (dist, n int, err error) {
	defer func() {
		if r := recover(); r != nil {
			if r != errWalk {
				panic(r)
			}
			err = errWalk
		}
	}()
	w := &walker{src: src}
	for final := false; !final; {
		final = w.bits(1) == 1
		switch w.bits(2) {
		case 0:
			w.bit = (w.bit + 7) &^ 7
			n := w.bits(16)
			if w.bits(16) != n^0xffff {
				panic(errWalk)
			}
			w.bit += n * 8
			w.out += n
		case 1:
			lengths := make([]int, 288)
			for i := range lengths {
				switch {
				case i < 144:
					lengths[i] = 8
				case i < 256:
					lengths[i] = 9
				case i < 280:
					lengths[i] = 7
				default:
					lengths[i] = 8
				}
			}
			distances := make([]int, 30)
			for i := range distances {
				distances[i] = 5
			}
			w.block(newCode(lengths), newCode(distances))
		case 2:
			w.block(w.codes())
		default:
			panic(errWalk)
		}
	}
	if w.bit > len(src)*8 {
		return 0, 0, errWalk
	}
	return w.dist, w.out, nil
}

// bits reads a number of n bits, the lowest first.
func (w *walker) bits(n int) (v int) {
	if w.bit+n > len(w.src)*8 {
		panic(errWalk)
	}
	for i := range n {
		v |= int(w.src[w.bit>>3]>>(w.bit&7)&1) << i
		w.bit++
	}
	return v
}

// code is a canonical Huffman code: the symbols in the order of their codes, and for each length in
// bits how many there are.
type code struct {
	symbols []int
	count   [16]int
}

// newCode makes the code for the given lengths in bits, 0 for an absent symbol. RFC 1951, section
// 3.2.2.
func newCode(lengths []int) (c code) {
	for bits := 1; bits <= 15; bits++ {
		for symbol, n := range lengths {
			if n == bits {
				c.symbols = append(c.symbols, symbol)
				c.count[bits]++
			}
		}
	}
	return c
}

// symbol reads one Huffman code, the highest bit first.
func (w *walker) symbol(c code) int {
	value, first, index := 0, 0, 0 // first is the first code of the length, index that of its symbol
	for _, count := range c.count[1:] {
		value = value<<1 | w.bits(1)
		first <<= 1
		if value-first < count {
			return c.symbols[index+value-first]
		}
		first += count
		index += count
	}
	panic(errWalk)
}

// codes reads the codes of a dynamic block. RFC 1951, section 3.2.7.
func (w *walker) codes() (literals, distances code) {
	nLiterals, nDistances, nLengths := w.bits(5)+257, w.bits(5)+1, w.bits(4)+4
	var order = [19]int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
	lengthLengths := make([]int, 19)
	for _, i := range order[:nLengths] {
		lengthLengths[i] = w.bits(3)
	}
	lengthCode := newCode(lengthLengths)
	var lengths []int
	for len(lengths) < nLiterals+nDistances {
		value, repeat := 0, 1
		switch s := w.symbol(lengthCode); {
		case s < 16:
			value = s
		case s == 16:
			if len(lengths) == 0 {
				panic(errWalk)
			}
			value, repeat = lengths[len(lengths)-1], 3+w.bits(2)
		case s == 17:
			repeat = 3 + w.bits(3)
		default:
			repeat = 11 + w.bits(7)
		}
		for range repeat {
			lengths = append(lengths, value)
		}
	}
	return newCode(lengths[:nLiterals]), newCode(lengths[nLiterals : nLiterals+nDistances])
}

// block reads the symbols of a block up to its end. RFC 1951, section 3.2.5.
func (w *walker) block(literals, distances code) {
	for {
		s := w.symbol(literals)
		switch {
		case s < 256:
			w.out++
			continue
		case s == 256:
			return
		case s > 285:
			panic(errWalk)
		}
		length := s - 254
		if s == 285 {
			length = 258
		} else if s >= 265 {
			extra := (s - 261) / 4
			length = 3 + (4+(s-261)%4)<<extra + w.bits(extra)
		}
		d := w.symbol(distances)
		if d > 29 {
			panic(errWalk)
		}
		dist := d + 1
		if d >= 4 {
			extra := d/2 - 1
			dist = 1 + (2+d%2)<<extra + w.bits(extra)
		}
		if dist > w.out {
			panic(errWalk)
		}
		w.dist = max(w.dist, dist)
		w.out += length
	}
}
