package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// writeConvertSources makes the disks of the tests: raw ones, images with a snapshot and over a base, targets that are
// there.
func writeConvertSources(t *testing.T) {
	t.Helper()
	writeDisk(t, "disk", 5<<20+512)
	writeDisk(t, "base.raw", 3<<20)
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "overlay", "4M")
	qemutest.IO(t, "overlay", "write -P 7 1M 100k", "write -z 2M 64k", "write -P 8 3500k 1k")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "snap", "2M")
	qemutest.IO(t, "snap", "write -P 1 0 1M")
	qemutest.Img(t, "snapshot", "-c", "one", "snap")
	qemutest.IO(t, "snap", "write -P 2 512k 1M")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "small", "1M")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "empty", "6M")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "full", "6M")
	qemutest.IO(t, "full", "write -P 9 0 6M")
	if err := os.WriteFile("full.raw", bytes.Repeat([]byte{9}, 6<<20), 0o600); err != nil {
		t.Fatal(err)
	}
}

// copyFile copies a file.
func copyFile(t *testing.T, dst, src string) {
	t.Helper()
	b, err := os.ReadFile(src)
	if err == nil {
		err = os.WriteFile(dst, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestConvertAsQEMU runs command lines of convert and dd by qemu-img and by us: the exit codes are the same, and so is
// what the outputs hold.
func TestConvertAsQEMU(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	writeConvertSources(t)
	tests := []struct {
		args   string // OUT stands for the output
		format string // of the output; "" if the command fails
		there  string // the output is a copy of this file before; "": it is not there
	}{
		{"convert -f raw -O qcow2 disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 disk OUT", "qcow2", "full"},
		{"convert -f raw -O raw disk OUT", "raw", "full.raw"},
		{"convert -f raw disk OUT", "raw", ""},
		{"convert -f raw -O qcow2 -c disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -c -m 4 -W disk OUT -o compression_type=zstd", "qcow2", ""},
		{"convert -f raw -O qcow2 -m 1 disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -m 16 -q disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -m 0 disk OUT", "", ""},
		{"convert -f raw -O qcow2 -m 17 disk OUT", "", ""},
		{"convert -f raw -O qcow2 -S 64k disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -S 1536 disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -S 0 disk OUT", "qcow2", ""},
		{"convert -f raw -O raw -S 0 disk OUT", "raw", ""},
		{"convert -f raw -O qcow2 -S 0 -c disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -S 100 disk OUT", "", ""},
		{"convert -f raw -O qcow2 -S 17M disk OUT", "", ""},
		{"convert -f raw -O qcow2 -S x disk OUT", "", ""},
		{"convert -f raw -O qcow2 -o cluster_size=4k -o compat=0.10,refcount_bits=16 disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -o size=10M disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -o preallocation=metadata disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -o preallocation=metadata -c disk OUT", "", ""},
		{"convert -f raw -O qcow2 -o cluster_size=3 disk OUT", "", ""},
		{"convert -f raw -O raw -c disk OUT", "", ""},
		{"convert -f raw -O raw -o cluster_size=4k disk OUT", "", ""},
		{"convert -f raw -O vmdk2 disk OUT", "", ""},
		{"convert -f nothing -O raw disk OUT", "", ""},
		{"convert -f raw -O qcow2 disk", "", ""},
		{"convert -f raw -O qcow2 none OUT", "", ""},
		{"convert -f raw -O qcow2 disk none/OUT", "", ""},
		{"convert -f raw -O raw disk disk", "", ""},
		{"convert -f raw -O qcow2 -r 0 disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -r 100M disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -r x disk OUT", "", ""},
		{"convert -f raw -O qcow2 --salvage disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -U disk OUT", "qcow2", ""},
		{"convert -f qcow2 -O qcow2 -l one snap OUT", "qcow2", ""},
		{"convert -f qcow2 -O raw -l snapshot.name=one snap OUT", "raw", ""},
		{"convert -f qcow2 -O raw -l two snap OUT", "", ""},
		{"convert -f raw -O raw -l one disk OUT", "", ""},
		{"convert -f qcow2 -O qcow2 overlay OUT", "qcow2", ""}, // flattened
		{"convert -f qcow2 -O qcow2 -B base.raw -F raw overlay OUT", "qcow2", ""},
		{"convert -f qcow2 -O qcow2 -c -o backing_file=base.raw,backing_fmt=raw overlay OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -B base.raw -F raw disk OUT", "qcow2", ""},
		{"convert -f raw -O qcow2 -B base.raw disk OUT", "", ""},
		{"convert -f raw -O qcow2 -F raw disk OUT", "", ""},
		{"convert -f raw -O raw -B base.raw -F raw disk OUT", "", ""},
		{"convert -f raw -O qcow2 -n disk OUT", "qcow2", "empty"},
		{"convert -f raw -O qcow2 -n --target-is-zero disk OUT", "qcow2", "empty"},
		{"convert -f raw -O qcow2 -n disk OUT", "qcow2", "full"},
		// qemu-img cannot where the input ends inside a cluster of a larger output.
		{"convert -f raw -O qcow2 -n -c base.raw OUT", "qcow2", "empty"},
		{"convert -f raw -O raw -n disk OUT", "raw", "full.raw"},
		{"convert -f qcow2 -O qcow2 -n -B base.raw -F raw overlay OUT", "qcow2", "overlay"},
		{"convert -f raw -O qcow2 -n disk OUT", "", "small"},
		{"convert -f raw -O qcow2 -n disk OUT", "", ""},
		{"convert -f raw -O qcow2 -n -o cluster_size=4k disk OUT", "", "empty"},
		{"convert -f raw -O qcow2 --target-is-zero disk OUT", "", ""},
		{"dd -f raw -O raw if=disk of=OUT", "raw", ""},
		{"dd -f raw -O qcow2 bs=64k if=disk of=OUT", "qcow2", ""},
		{"dd -f raw -O raw bs=1000 count=3 if=disk of=OUT", "raw", ""},
		{"dd -f raw -O raw bs=1M count=4 skip=1 if=disk of=OUT", "raw", "full.raw"},
		{"dd -f raw bs=1M skip=4 if=disk of=OUT", "raw", ""},
		{"dd -f raw bs=1M skip=9 if=disk of=OUT", "raw", ""},
		{"dd -f raw count=0 if=disk of=OUT", "raw", ""},
		{"dd -f qcow2 -O qcow2 bs=1M skip=1 -U if=overlay of=OUT", "qcow2", ""},
		{"dd -f raw bs=0 if=disk of=OUT", "", ""},
		{"dd -f raw bs=3G if=disk of=OUT", "", ""},
		{"dd -f raw count=-1 if=disk of=OUT", "", ""},
		{"dd -f raw skip=x if=disk of=OUT", "", ""},
		{"dd -f raw if=disk", "", ""},
		{"dd -f raw of=OUT", "", ""},
		{"dd -f raw xx=1 if=disk of=OUT", "", ""},
		{"dd -f raw if=disk of=OUT more", "", ""},
		{"dd -f raw if=none of=OUT", "", ""},
		{"dd -f raw -O nothing if=disk of=OUT", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.args+" "+tt.there, func(t *testing.T) {
			args := func(out string) []string { return strings.Fields(strings.ReplaceAll(tt.args, "OUT", out)) }
			for _, out := range []string{"ours", "theirs"} {
				if err := os.Remove(out); err != nil && !os.IsNotExist(err) {
					t.Fatal(err)
				}
				if tt.there != "" {
					copyFile(t, out, tt.there)
				}
			}
			_, want := qemutest.ImgExit(t, args("theirs")...)
			_, stderr, got := tool(args("ours")...)
			if got != want || (got == 0) != (tt.format != "") {
				t.Fatalf("exit %d, want %d: %s", got, want, stderr)
			}
			if tt.format == "" {
				if got := readFile("ours"); tt.there == "" && got != nil || tt.there != "" && !bytes.Equal(got, readFile(tt.there)) {
					t.Errorf("a command that failed left %d bytes", len(got))
				}
				return
			}
			if tt.format == "qcow2" {
				qemutest.CheckClean(t, "ours")
			}
			qemutest.Compare(t, "theirs", tt.format, "ours", tt.format)
			if tt.format == "raw" {
				if !bytes.Equal(readFile("ours"), readFile("theirs")) {
					t.Errorf("%d bytes, want %d, or others", len(readFile("ours")), len(readFile("theirs")))
				}
				return
			}
			info := func(name string) any {
				m := qemutest.Info(t, name)
				for _, k := range []string{"filename", "actual-size", "full-backing-filename"} {
					delete(m, k)
				}
				return m
			}
			if diff := cmp.Diff(info("theirs"), info("ours")); diff != "" {
				t.Errorf("qemu-img info (-its own +ours):\n%s", diff)
			}
		})
	}
}

// readFile returns what a file holds, or nil.
func readFile(name string) []byte {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil
	}
	return b
}
