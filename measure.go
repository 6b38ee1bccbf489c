package qcow2

import (
	"context"
	"fmt"
)

// MeasureOptions says what target is measured. The nil pointer and the zero value stand for a default qcow2 image.
type MeasureOptions struct {
	// Raw measures a raw file. Create means nothing then.
	Raw bool
	// Create is what the qcow2 image is created with. No file that it names is opened. Nil: the defaults.
	Create *CreateOptions
	// Progress, if not nil, is called with the number of bytes of the source that are done with, now and then and at the
	// end, by the goroutine that called Measure.
	Progress func(done, total int64)
}

// Measurement is how many bytes a target takes. The figures are those of qemu-img measure.
type Measurement struct {
	// Required is the length of the file with the content of the source, and with the tables for all of the disk: it
	// is exact where those are all needed, and otherwise what suffices whatever lies where. With preallocated data it is
	// FullyAllocated, and with a backing file too, if there is a source: nobody knows here what that shares with it.
	Required int64
	// FullyAllocated is the length of the file once all of the disk is written. A disk that ends within a cluster has
	// all of it. With an external data file both figures are those of one file without.
	FullyAllocated int64
	// Bitmaps is what copies of the source's persistent bitmaps take besides, if all of each is written. It is there if
	// HasBitmaps says so: for an image, or a snapshot of one, that may have bitmaps, and a target that may, both of
	// version 3.
	Bitmaps    int64
	HasBitmaps bool
}

// Measure returns how many bytes the content of src takes as a raw file or as a qcow2 image with the given options. It
// reads no content but tables: what src has data for is data, zeros or not; see Image.Extents for clusters that were
// preallocated. The source may be written meanwhile, and counts at each place as it was before or after.
//
// Errors: *OptionError for options that Create would refuse, ErrTooLarge for a disk that the format, with these options,
// cannot hold all of, that of ctx, and those of src.
func Measure(ctx context.Context, src Disk, opts *MeasureOptions) (*Measurement, error) {
	m, err := measureDisk(ctx, src, opts)
	if err != nil {
		return nil, fmt.Errorf("qcow2: measure: %w", err)
	}
	return m, nil
}

// measureDisk is Measure without the words around the error.
func measureDisk(ctx context.Context, src Disk, opts *MeasureOptions) (*Measurement, error) {
	size := src.Size()
	p, err := planMeasure(size, opts)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	switch {
	case p.sparse && p.below:
		p.Required = p.FullyAllocated
	case p.sparse:
		n, err := p.dataClusters(ctx, src, size)
		if err != nil {
			return nil, err
		}
		p.Required += int64(n << p.g.clusterBits)
	}
	if p.o.Progress != nil {
		p.o.Progress(size, size)
	}
	if img := imageOf(src); img != nil && !p.o.Raw && p.version >= 3 {
		if p.Bitmaps, p.HasBitmaps, err = img.measureBitmaps(&p.g); err != nil {
			return nil, fmt.Errorf("bitmaps: %w", err)
		}
	}
	return &p.Measurement, nil
}

// MeasureSize returns how many bytes a disk of size bytes takes that holds nothing, as Measure does. The size is rounded up
// to sectors.
func MeasureSize(size int64, opts *MeasureOptions) (*Measurement, error) {
	p, err := planMeasure(size, opts)
	if err != nil {
		return nil, fmt.Errorf("qcow2: measure: %w", err)
	}
	return &p.Measurement, nil
}

// measurePlan is a measurement to which the data of the source is to be added.
type measurePlan struct {
	Measurement
	o       MeasureOptions
	g       geometry // of a qcow2 target
	version int
	below   bool // a qcow2 target has a backing file
	sparse  bool // Required lacks the clusters that the source has data for
}

// planMeasure measures a target for a disk of size bytes that holds nothing.
func planMeasure(size int64, opts *MeasureOptions) (*measurePlan, error) {
	p := &measurePlan{}
	if opts != nil {
		p.o = *opts
	}
	if size < 0 || size > maxDiskSize {
		return nil, &OptionError{Option: "size", Value: size, Reason: fmt.Sprintf("want 0 to %d", int64(maxDiskSize))}
	}
	size = (size + sectorSize - 1) / sectorSize * sectorSize
	if p.o.Raw {
		p.Required, p.FullyAllocated = size, size
		return p, nil
	}
	o := createOptionsOf(p.o.Create)
	h, err := newHeader(uint64(size), &o)
	if err != nil {
		return nil, err
	}
	p.g, p.version = h.geometry(), int(h.version)
	// The layout of an image that holds all of its disk, whole clusters of it.
	whole := *h
	whole.size = p.g.clusters(h.size) << p.g.clusterBits
	whole.incompatible &^= incompatDataFile
	whole.autoclear &^= autoclearRawData
	l, err := planLayout(&whole, PreallocationMetadata, false)
	if err != nil {
		return nil, err
	}
	p.FullyAllocated = int64(l.end << p.g.clusterBits)
	p.Required = p.FullyAllocated
	p.below = o.BackingFile != "" || o.Open.Backing != nil
	if o.Preallocation != PreallocationFalloc && o.Preallocation != PreallocationFull {
		p.Required -= int64(whole.size)
		p.sparse = true
	}
	return p, nil
}

// maxDiskSize is the largest size in bytes that a Disk can have whole sectors for.
const maxDiskSize = 1<<63 - sectorSize

// dataClusters returns how many clusters of the target the data of src, a disk of total bytes, touches.
func (p *measurePlan) dataClusters(ctx context.Context, src Disk, total int64) (n uint64, err error) {
	told := int64(0)
	counted := uint64(0) // the clusters before are counted, or not needed
	for e, err := range wholeExtents(ctx, extentsOf(src, 0, total), total) {
		if err != nil {
			return 0, err
		}
		if p.o.Progress != nil && e.Off-told >= progressStep {
			p.o.Progress(e.Off, total)
			told = e.Off
		}
		if !e.Kind.readsZero() {
			first := max(counted, uint64(e.Off)>>p.g.clusterBits)
			counted = max(counted, p.g.clusters(uint64(e.Off+e.Len)))
			n += counted - min(first, counted)
		}
	}
	return n, nil
}

// progressStep is how many bytes of a disk an operation that reads tables only passes before it tells its progress.
const progressStep = 1 << 30

// imageOf returns the image that d is, or is a snapshot of, or nil.
func imageOf(d Disk) *Image {
	switch d := d.(type) {
	case *Image:
		return d
	case *SnapshotDisk:
		return d.img
	}
	return nil
}

// measureBitmaps returns how many bytes copies of the image's bitmaps take in an image with geometry g, and whether it
// may have any. Bitmaps that are stale are not copied. qcow2 spec, "Bitmaps".
func (img *Image) measureBitmaps(g *geometry) (n int64, ok bool, err error) {
	defer img.reqs.leave(img.reqs.enter())
	if err := img.readable(); err != nil {
		return 0, false, err
	}
	size, err := img.host.s.Size()
	if err != nil {
		return 0, false, err
	}
	h, err := readHeader(img.host.s, size) // the one in memory may change meanwhile
	if err != nil || h.version < 3 {
		return 0, false, err
	}
	entries, err := readBitmapDirectory(img.host.s, size, h, *img.openedWith.Limits)
	if err != nil {
		return 0, false, err
	}
	directory := uint64(0)
	clusters := uint64(0)
	for i := range entries {
		e := &entries[i]
		if e.inUse() {
			continue
		}
		bits := (h.virtualSize() + 1<<e.granularity - 1) >> e.granularity
		data := g.clusters((bits + 7) / 8)
		clusters += data + g.clusters(8*data)
		directory += (minBitmapDirEntry + uint64(len(e.name)) + 7) &^ 7
	}
	clusters += g.clusters(directory)
	return int64(clusters << g.clusterBits), true, nil
}
