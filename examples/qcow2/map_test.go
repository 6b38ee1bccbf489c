package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// mapImages are images by the options with which qemu-img creates them, and what qemu-io writes into each. All have 3 MiB.
var mapImages = []struct {
	name    string
	options string // of qemu-img create
	backing string // FORMAT:NAME of one made before, or empty
	cmds    []string
	convert bool // then it is compressed
}{
	{name: "mid", cmds: []string{"write -P 2 0 64k", "write -P 3 128k 192k", "write -z 512k 64k", "write -z -u 640k 64k"}},
	{name: "top", backing: "qcow2:mid", cmds: []string{"write -P 4 192k 64k", "write -P 5 2M 128k"}},
	{name: "third", backing: "qcow2:top", options: "cluster_size=4k", cmds: []string{"write -P 9 190k 6k", "write -z 256k 64k"}},
	{name: "over raw", backing: "raw:base", cmds: []string{"write -P 6 64k 64k"}},
	{name: "over holes", backing: "raw:holes", options: "cluster_size=512", cmds: []string{"write -P 6 100k 1k", "write -z 300k 5k", "discard 300k 1k"}},
	{name: "version 2", options: "compat=0.10,cluster_size=1k", cmds: []string{"write -P 1 1k 20k", "write -P 1 2M 3k", "discard 5k 2k"}},
	{name: "small clusters", options: "cluster_size=512", cmds: []string{"write -P 1 0 300k", "write -z -u 100k 20k", "write -z 130k 20k", "write -P 1 2M 512k"}},
	{name: "large clusters", options: "cluster_size=2M", cmds: []string{"write -P 1 0 4k", "write -z -u 2M 1M"}},
	{name: "packed", backing: "qcow2:mid", cmds: []string{"write -P 7 1M 300k"}, convert: true},
	{name: "over packed", backing: "qcow2:packed", cmds: []string{"write -P 7 1M 64k"}},
	{name: "subclusters", options: "extended_l2=on,cluster_size=64k", cmds: []string{"write -P 1 2k 6k", "write -P 2 66k 2k",
		"write -z 80k 4k", "write -P 3 256k 256k", "write -z 300k 6k", "write -z -u 320k 64k", "write -z -u 1M 2k"}},
	{name: "subclusters over raw", backing: "raw:base", options: "extended_l2=on,cluster_size=16k", cmds: []string{"write -P 1 2k 6k", "write -z 20k 1k", "discard 32k 16k"}},
	{name: "data file", options: "data_file=data 1", cmds: []string{"write -P 1 64k 64k", "write -z 256k 64k", "write -z -u 512k 64k", "write -P 1 2M 1M"}},
	{name: "raw data file", options: "data_file=data 2,data_file_raw=on", cmds: []string{"write -P 1 64k 64k", "write -z 256k 64k"}},
	{name: "data file, metadata", options: "data_file=data 3,preallocation=metadata", cmds: []string{"write -P 1 64k 64k"}},
	{name: "metadata", options: "preallocation=metadata", cmds: []string{"write -P 1 0 64k", "write -P 1 1M 8k", "write -z 2M 64k"}},
	{name: "metadata, small clusters", options: "preallocation=metadata,cluster_size=512", cmds: []string{"write -P 1 0 300k", "write -P 1 1M 3k"}},
	{name: "metadata, subclusters", options: "preallocation=metadata,extended_l2=on", cmds: []string{"write -P 1 10k 2k", "write -z 128k 2k"}},
	{name: "metadata, untouched", options: "preallocation=metadata,refcount_bits=1,cluster_size=4k"},
	{name: "metadata, subclusters over raw", options: "preallocation=metadata,extended_l2=on", backing: "raw:base", cmds: []string{"write -P 1 10k 2k"}},
	{name: "metadata, full", options: "preallocation=metadata", cmds: []string{"write -P 1 0 3M"}},
	{name: "over metadata", backing: "qcow2:metadata", cmds: []string{"write -P 1 512k 64k"}},
	{name: "falloc", options: "preallocation=falloc", cmds: []string{"write -P 1 0 64k"}},
	{name: "full", options: "preallocation=full", cmds: []string{"write -P 1 0 64k"}},
	{name: "nothing"},
}

// makeMapImages makes mapImages and the raw files base, which has no holes, and holes.
func makeMapImages(t *testing.T) {
	t.Helper()
	inTempDir(t)
	writeDisk(t, "full", 1<<20)
	base := []byte(strings.Repeat("base", 1<<18))
	if err := os.WriteFile("base", base, 0o600); err != nil {
		t.Fatal(err)
	}
	qemutest.Img(t, "create", "-q", "-f", "raw", "holes", "2M")
	qemutest.IOWith(t, qemutest.IOOptions{Format: "raw"}, "holes", "write -P 1 64k 64k", "write -P 1 1M 4k", "write -P 1 1900k 8k")
	for _, im := range mapImages {
		args := []string{"create", "-q", "-f", "qcow2"}
		if im.options != "" {
			args = append(args, "-o", im.options)
		}
		if im.backing != "" {
			format, name, _ := strings.Cut(im.backing, ":")
			args = append(args, "-b", name, "-F", format)
		}
		qemutest.Img(t, append(args, im.name, "3M")...)
		if len(im.cmds) > 0 {
			qemutest.IOWith(t, qemutest.IOOptions{Cache: "writeback"}, im.name, im.cmds...)
		}
		if im.convert {
			qemutest.Img(t, "convert", "-c", "-f", "qcow2", "-O", "qcow2", im.name, "x")
			if err := os.Rename("x", im.name); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// compareMaps compares what map prints, with the given arguments, with what qemu-img prints.
func compareMaps(t *testing.T, args ...string) {
	t.Helper()
	for _, output := range []string{"json", "human"} {
		all := append([]string{"map", "--output=" + output}, args...)
		want, wantExit := qemutest.ImgExit(t, all...)
		got, _, gotExit := tool(all...)
		if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); diff != "" || gotExit != wantExit {
			t.Errorf("%q: exit %d, want %d; (-qemu-img +ours):\n%s", all, gotExit, wantExit, diff)
		}
	}
}

// TestMap compares map with qemu-img's, byte by byte, on mapImages and raw files.
func TestMap(t *testing.T) {
	qemutest.Require(t)
	makeMapImages(t)
	for _, im := range mapImages {
		t.Run(im.name, func(t *testing.T) { compareMaps(t, "-f", "qcow2", im.name) })
	}
	for _, name := range []string{"base", "holes", "mid"} {
		t.Run("raw "+name, func(t *testing.T) { compareMaps(t, "-f", "raw", name) })
	}
}

// TestMapRange compares map of parts of a disk with qemu-img's, and its refusals.
func TestMapRange(t *testing.T) {
	qemutest.Require(t)
	makeMapImages(t)
	for _, args := range [][]string{
		{"-s", "100k"}, {"-l", "100k"}, {"-s", "130k", "-l", "70k"}, {"--start-offset=190k", "--max-length", "1M"},
		{"-s", "1000", "-l", "1000"}, {"-s", "3M"}, {"-s", "5M"}, {"-l", "0"}, {"-s", "2M", "-l", "8388607T"},
		{"-s", "x"}, {"-s", "-1"}, {"-l", "1Q"}, {"-l", ""},
	} {
		for _, image := range []string{"qcow2:top", "qcow2:metadata", "raw:holes", "qcow2:nothing"} {
			format, name, _ := strings.Cut(image, ":")
			compareMaps(t, append(args, "-f", format, name)...)
		}
	}
}

// TestMapRandom compares map with qemu-img's on chains of three images into which much is written, in all cluster sizes.
func TestMapRandom(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for round := range 6 {
		below := ""
		for depth := range 3 {
			bits := 9 + rng.IntN(13)
			options := fmt.Sprintf("cluster_size=%d", 1<<bits)
			if bits >= 14 && rng.IntN(2) == 0 {
				options += ",extended_l2=on"
			} else if below == "" && rng.IntN(3) == 0 {
				options += ",preallocation=metadata"
			}
			name := fmt.Sprintf("image-%d-%d", round, depth)
			args := []string{"create", "-q", "-f", "qcow2", "-o", options}
			if below != "" {
				args = append(args, "-b", below, "-F", "qcow2")
			}
			qemutest.Img(t, append(args, name, fmt.Sprintf("%dk", 4<<10+rng.IntN(60<<10)))...)
			var cmds []string
			for range 40 {
				op := []string{"write -P 1", "write -P 2", "write -z", "write -z -u", "discard"}[rng.IntN(5)]
				n := 1 + rng.IntN(min(1<<(bits-9+1+rng.IntN(3)), 1<<10))
				cmds = append(cmds, fmt.Sprintf("%s %d %d", op, 512*rng.IntN(8<<10-n), 512*n))
			}
			qemutest.IOWith(t, qemutest.IOOptions{Cache: "unsafe"}, name, cmds...)
			compareMaps(t, "-f", "qcow2", name)
			below = name
		}
	}
}
