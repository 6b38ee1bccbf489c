package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/go-qcow2/qcow2/internal/qemutest"
)

// measureTargets are targets by the arguments of measure.
var measureTargets = [][]string{
	{"-O", "raw"},
	{"-O", "qcow2"},
	{"-O", "qcow2", "-o", "cluster_size=512"},
	{"-O", "qcow2", "-o", "cluster_size=2M,refcount_bits=64"},
	{"-O", "qcow2", "-o", "cluster_size=512,refcount_bits=64"},
	{"-O", "qcow2", "-o", "cluster_size=4k,refcount_bits=1"},
	{"-O", "qcow2", "-o", "refcount_bits=2,lazy_refcounts=on"},
	{"-O", "qcow2", "-o", "extended_l2=on,cluster_size=16k,refcount_bits=8"},
	{"-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k,compression_type=zstd"},
	{"-O", "qcow2", "-o", "compat=0.10"},
	{"-O", "qcow2", "-o", "preallocation=metadata"},
	{"-O", "qcow2", "-o", "preallocation=falloc,cluster_size=1k"},
	{"-O", "qcow2", "-o", "preallocation=full"},
	{"-O", "qcow2", "-o", "backing_file=somewhere,backing_fmt=raw,cluster_size=32k"},
	{"-O", "qcow2", "-o", "data_file=somewhere"},
	{"-O", "qcow2", "-o", "data_file=somewhere,data_file_raw=on,refcount_bits=4"},
}

// compareMeasures compares what measure prints in both forms with what qemu-img prints.
func compareMeasures(t *testing.T, args ...string) {
	t.Helper()
	for _, output := range []string{"json", "human"} {
		all := append([]string{"measure", "--output=" + output}, args...)
		want, wantExit := qemutest.ImgExit(t, all...)
		got, stderr, gotExit := tool(all...)
		if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); diff != "" || gotExit != wantExit {
			t.Errorf("%q: exit %d, want %d; %s(-qemu-img +ours):\n%s", all, gotExit, wantExit, stderr, diff)
		}
	}
}

// TestMeasureSize compares measure of sizes with qemu-img's for all targets, up to where a refcount table or an L1 table
// has to have more than one cluster.
func TestMeasureSize(t *testing.T) {
	qemutest.Require(t)
	for _, target := range measureTargets {
		for _, size := range []string{"0", "1", "64k", "1000001", "33M", "7.7G", "100G", "3T"} {
			args := append(target, "--size", size)
			if _, stderr, exit := tool(append([]string{"measure"}, args...)...); exit == 1 && strings.Contains(stderr, "exceeds 8388608 bytes") {
				// No image with these options can be written in full: its refcount table would be too long. qemu-img
				// tells how long it would be.
				if n := strings.Count(target[len(target)-1], "cluster_size=512") + strings.Count(size, "T"); n == 0 {
					t.Errorf("%q: %s", args, stderr)
				}
				continue
			}
			compareMeasures(t, args...)
		}
	}
}

// TestMeasure compares measure of images with qemu-img's: mapImages, raw files, and images with bitmaps and snapshots. Each
// is measured for some of measureTargets, by turns.
func TestMeasure(t *testing.T) {
	qemutest.Require(t)
	makeMapImages(t)
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "bitmaps", "3M")
	qemutest.IO(t, "bitmaps", "write -P 1 1M 100k")
	qemutest.Img(t, "snapshot", "-c", "snap", "bitmaps")
	qemutest.IO(t, "bitmaps", "write -P 1 2M 1M")
	qemutest.Img(t, "bitmap", "--add", "-g", "512", "-f", "qcow2", "bitmaps", "one")
	qemutest.Img(t, "bitmap", "--add", "--disable", "-f", "qcow2", "bitmaps", "the second bitmap")
	sources := [][]string{{"-f", "raw", "base"}, {"-f", "raw", "holes"}, {"-f", "raw", "mid"}, {"-f", "qcow2", "bitmaps"}, {"-l", "snap", "-f", "qcow2", "bitmaps"}}
	for _, im := range mapImages {
		sources = append(sources, []string{"-f", "qcow2", im.name})
	}
	for i, source := range sources {
		t.Run(source[len(source)-1], func(t *testing.T) {
			for k := range 5 {
				compareMeasures(t, append(measureTargets[(3*i+k*k)%len(measureTargets)], source...)...)
			}
		})
	}
	for _, target := range measureTargets {
		compareMeasures(t, append(target, "-f", "qcow2", "bitmaps")...)
	}
}

// TestMeasureRefusals compares the exit codes of command lines that make no sense with qemu-img's.
func TestMeasureRefusals(t *testing.T) {
	qemutest.Require(t)
	inTempDir(t)
	writeDisk(t, "disk", 1<<20)
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "image", "1M")
	for _, args := range [][]string{
		{},
		{"--size", "1M", "disk"},
		{"--size", "1M", "-f", "raw"},
		{"--size", "1M", "-l", "snap"},
		{"--size", "x"},
		{"--size", "8E"},
		{"--size", "1M", "-O", "qcow2", "-o", "bogus=1"},
		{"--size", "1M", "-O", "qcow2", "-o", "cluster_size=5k"},
		{"--size", "1M", "-O", "qcow2", "-o", "compat=0.10,refcount_bits=1"},
		{"--size", "1M", "-O", "qcow2", "-o", "extended_l2=on,cluster_size=4k"},
		{"--size", "2T", "-O", "qcow2", "-o", "cluster_size=512"},
		{"--size", "7E", "-O", "qcow2", "-o", "cluster_size=2M"},
		{"-f", "qcow2", "disk"},
		{"-f", "qcow2", "nothing"},
		{"-f", "qcow2", "-l", "snap", "image"},
		{"-O", "qcow2", "disk", "image"},
	} {
		compareMeasures(t, args...)
	}
}
