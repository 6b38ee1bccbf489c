package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/go-qcow2/qcow2"
)

func TestParseSize(t *testing.T) {
	tests := []struct {
		in   string
		want int64 // -1: refused
	}{
		{"0", 0}, {"1", 1}, {"1000", 1000}, {"512b", 512}, {"64k", 65536}, {"64K", 65536},
		{"1M", 1 << 20}, {"10G", 10 << 30}, {"2t", 2 << 40}, {"3P", 3 << 50}, {"7E", 7 << 60},
		{"1.5G", 3 << 29}, {"0.5k", 512}, {"0.1k", 102}, {"0x1000", 4096}, {"0X10", 16},
		{"9223372036854775807", 1<<63 - 1}, {"7.99999999999999999999E", 1<<63 - 1},
		{"", -1}, {"k", -1}, {"1Q", -1}, {"-1", -1}, {"+1", -1}, {" 1", -1}, {"1 ", -1}, {"1.5", -1}, {"1.5b", -1},
		{"1.", -1}, {".5k", -1}, {"1.k", -1}, {"1e3", -1}, {"1kk", -1}, {"0x", -1}, {"0x1k", -1}, {"0x-1", -1}, {"0x+1", -1},
		{"1/2k", -1}, {"1_0", -1}, {"8E", -1}, {"9223372036854775808", -1}, {"1\x8b", -1},
	}
	for _, tt := range tests {
		got, err := parseSize(tt.in)
		if err != nil {
			got = -1
		}
		if got != tt.want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", tt.in, got, err, tt.want)
		}
	}
}

func TestParseDiskSize(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "1": 512, "512": 512, "513": 1024, "1000": 1024,
		"9223372036854775296": 1<<63 - 512, "9223372036854775297": -1,
	} {
		got, err := parseDiskSize(in)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("parseDiskSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
}

func TestParseOptions(t *testing.T) {
	tests := []struct {
		in   []string
		want []option // nil: refused
	}{
		{[]string{"a=b"}, []option{{"a", "b"}}},
		{[]string{"a=b,c=d", "e=f"}, []option{{"a", "b"}, {"c", "d"}, {"e", "f"}}},
		{[]string{"a=b=c,lazy"}, []option{{"a", "b=c"}, {"lazy", "on"}}},
		{[]string{"a=x,,y,,,,z,b="}, []option{{"a", "x,y,,z"}, {"b", ""}}},
		{[]string{"a=b,"}, []option{{"a", "b"}}},
		{[]string{"=b"}, nil},
		{[]string{"a=b,=c"}, nil},
	}
	for _, tt := range tests {
		got, err := parseOptions(tt.in)
		if (err != nil) != (tt.want == nil) {
			t.Errorf("parseOptions(%q): %v", tt.in, err)
			continue
		}
		if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(option{})); err == nil && diff != "" {
			t.Errorf("parseOptions(%q) (-want +got):\n%s", tt.in, diff)
		}
	}
}

func TestReadCreateOptions(t *testing.T) {
	got, err := readCreateOptions("qcow2", []string{
		"compat=v3,cluster_size=128k,refcount_bits=64,extended_l2=on,compression_type=zstd,lazy_refcounts=yes",
		"data_file=d,,1,data_file_raw,backing_file=b,backing_fmt=raw,size=1000,preallocation=falloc,cluster_size=32k",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := createOptions{size: 1024, image: qcow2.CreateOptions{
		Version: 3, ClusterSize: 32768, RefcountBits: 64, ExtendedL2: true, Compression: qcow2.CompressionZstd,
		LazyRefcounts: true, DataFile: "d,1", DataFileRaw: true, BackingFile: "b", BackingFormat: "raw",
		Preallocation: qcow2.PreallocationFalloc,
	}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(createOptions{}), cmpopts.IgnoreUnexported(qcow2.OpenOptions{})); diff != "" {
		t.Errorf("options (-want +got):\n%s", diff)
	}
	for _, bad := range []string{"foo=1", "compat=v4", "cluster_size=0", "cluster_size=x", "cluster_size=4G", "extended_l2=maybe",
		"compression_type=lzma", "refcount_bits=0", "preallocation=some", "size=-1", "encryption=on"} {
		if _, err := readCreateOptions("qcow2", []string{bad}); err == nil {
			t.Errorf("-o %s is accepted", bad)
		}
	}
	if _, err := readCreateOptions("raw", []string{"cluster_size=64k"}); err == nil {
		t.Error("-o cluster_size is accepted for raw")
	}
}

func TestHumanSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 512: "512 B", 999: "999 B", 1000: "0.977 KiB", 1024: "1 KiB", 200704: "196 KiB", 1 << 20: "1 MiB",
		1023 << 10: "0.999 MiB", 3 << 29: "1.5 GiB", 1<<63 - 1: "8 EiB",
	} {
		if got := humanSize(n); got != want {
			t.Errorf("humanSize(%d) = %q, want %q", n, got, want)
		}
	}
}
