package main

import (
	"errors"
	"fmt"
	"io"
	"math/big"
	"strconv"
	"strings"

	"github.com/go-qcow2/qcow2"
	"github.com/go-qcow2/qcow2/examples/internal/disk"
)

// parseSize reads a number of bytes: a decimal number, with a fraction if a suffix other than b follows
// (b, k, M, G, T, P or E, in either case, of powers of 1024), or a hexadecimal one without a suffix.
func parseSize(s string) (int64, error) {
	bad := fmt.Errorf("invalid image size '%s': use a number and k, M, G, T, P or E for kilobytes, "+
		"megabytes, gigabytes, terabytes, petabytes and exabytes", s)
	if hex, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		n, err := strconv.ParseInt(hex, 16, 64)
		if err != nil || n < 0 || strings.HasPrefix(hex, "+") {
			return 0, bad
		}
		return n, nil
	}
	digits, shift := s, 0
	if s != "" {
		if i := strings.IndexByte("bkmgtpe", s[len(s)-1]|0x20); i >= 0 {
			digits, shift = s[:len(s)-1], 10*i
		}
	}
	whole, fraction, hasFraction := strings.Cut(digits, ".")
	if strings.Trim(whole+fraction, "0123456789") != "" || whole == "" || hasFraction && (fraction == "" || shift == 0) {
		return 0, bad
	}
	n, ok := new(big.Rat).SetString(digits)
	if !ok {
		return 0, bad
	}
	n.Mul(n, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), uint(shift))))
	bytes := new(big.Int).Quo(n.Num(), n.Denom())
	if !bytes.IsInt64() {
		return 0, fmt.Errorf("image size '%s' must be less than 8 EiB", s)
	}
	return bytes.Int64(), nil
}

// parseDiskSize is parseSize rounded up to whole sectors.
func parseDiskSize(s string) (int64, error) {
	n, err := parseSize(s)
	if err != nil {
		return 0, err
	}
	if n > disk.MaxSize {
		return 0, fmt.Errorf("image size '%s' must be less than 8 EiB", s)
	}
	return disk.RoundUp(n), nil
}

// option is one name and value of -o.
type option struct{ name, value string }

// parseOptions splits the arguments of -o, each a list such as "a=b,c=d". A comma in a value is
// doubled; a name alone is "on".
func parseOptions(args []string) (opts []option, err error) {
	for _, arg := range args {
		for arg != "" {
			var field strings.Builder
			for {
				before, after, found := strings.Cut(arg, ",")
				field.WriteString(before)
				arg = after
				if !found {
					break
				}
				if !strings.HasPrefix(arg, ",") {
					break
				}
				field.WriteByte(',')
				arg = arg[1:]
			}
			name, value, found := strings.Cut(field.String(), "=")
			if !found {
				value = "on"
			}
			if name == "" {
				return nil, fmt.Errorf("invalid option list: '%s'", args)
			}
			opts = append(opts, option{name, value})
		}
	}
	return opts, nil
}

// createOptionNames lists what -o takes for qcow2, for -o help.
const createOptionNames = `Supported qcow2 options:
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  cluster_size=<size>    - Cluster size, 512 to 2M (default: 64k)
  compat=<str>           - Version: v2 (0.10) or v3 (1.1, default)
  compression_type=<str> - zlib (default) or zstd
  data_file=<str>        - File name of an external data file
  data_file_raw=<bool>   - The data file alone must read as the disk
  extended_l2=<bool>     - Divide clusters into 32 subclusters
  lazy_refcounts=<bool>  - Postpone refcount updates
  preallocation=<str>    - off (default), metadata, falloc or full
  refcount_bits=<num>    - Width of a reference count in bits: 1 to 64 (default: 16)
  size=<size>            - Virtual disk size
`

// createOptions is what -o and its companions say about a new image.
type createOptions struct {
	image qcow2.CreateOptions
	size  int64 // of option size, in bytes, or -1
	help  bool  // -o help
}

// printCreateHelp prints what -o takes for the format.
func printCreateHelp(w io.Writer, format string) error {
	if format != disk.QCOW2 {
		return nil
	}
	_, err := io.WriteString(w, createOptionNames)
	return err
}

// readCreateOptions reads options of a new image in the given format, which is checked. Of an option that is given twice
// the last counts.
func readCreateOptions(format string, args []string) (c createOptions, err error) {
	if err := checkFormat(format); err != nil {
		return c, err
	}
	opts, err := parseOptions(args)
	if err != nil {
		return c, err
	}
	c.size = -1
	for _, o := range opts {
		if format == disk.Raw && o.name != "size" && o.name != "help" && o.name != "?" {
			return c, fmt.Errorf("invalid parameter '%s'", o.name)
		}
		var err error
		switch o.name {
		case "help", "?":
			c.help = true
		case "size":
			c.size, err = parseDiskSize(o.value)
		case "backing_file":
			c.image.BackingFile = o.value
		case "backing_fmt":
			c.image.BackingFormat = o.value
		case "cluster_size":
			c.image.ClusterSize, err = parsePositive(o.value)
		case "compat":
			c.image.Version, err = oneOf(o.value, map[string]int{"0.10": 2, "v2": 2, "1.1": 3, "v3": 3})
		case "compression_type":
			c.image.Compression, err = oneOf(o.value, map[string]qcow2.CompressionType{
				"zlib": qcow2.CompressionDeflate, "zstd": qcow2.CompressionZstd})
		case "data_file":
			c.image.DataFile = o.value
		case "data_file_raw":
			c.image.DataFileRaw, err = parseBool(o.value)
		case "extended_l2":
			c.image.ExtendedL2, err = parseBool(o.value)
		case "lazy_refcounts":
			c.image.LazyRefcounts, err = parseBool(o.value)
		case "refcount_bits":
			c.image.RefcountBits, err = parsePositive(o.value)
		case "preallocation":
			c.image.Preallocation, err = oneOf(o.value, preallocations)
		default:
			return c, fmt.Errorf("invalid parameter '%s'", o.name)
		}
		if err != nil {
			return c, fmt.Errorf("parameter '%s': %w", o.name, err)
		}
	}
	return c, nil
}

// parsePositive reads a size that is not 0 and not beyond an int. Zero is refused here because it asks
// the library for its default.
func parsePositive(s string) (int, error) {
	n, err := parseSize(s)
	if err == nil && (n == 0 || n > 1<<30) {
		err = errors.New("out of range")
	}
	return int(n), err
}

// parseBool reads on or off, in all their spellings.
func parseBool(s string) (bool, error) {
	return oneOf(s, map[string]bool{"on": true, "yes": true, "true": true, "y": true,
		"off": false, "no": false, "false": false, "n": false})
}

// oneOf returns the value that s stands for.
func oneOf[T any](s string, values map[string]T) (T, error) {
	v, ok := values[s]
	if !ok {
		return v, fmt.Errorf("invalid value '%s'", s)
	}
	return v, nil
}
