package qcow2

// layer says what a disk of a chain holds itself, by a comparable value: of two layers with the same one, each guest
// offset that both decide reads the same. nil is like no other.
type layer any

// Layers of files, by what they are opened as.
type (
	rawLayer     struct{ file any }
	imageLayer   struct{ image, data any }
	foreignLayer struct {
		file   any
		format ForeignFormat
	}
)

// layersOf returns the layers of the chain from d down, by Extent.Depth. It ends below a disk of the caller's own kind,
// whose layers nobody knows. The chain stays as it is while they are in use.
func layersOf(d Disk) []layer {
	var layers []layer
	for d != nil {
		var l layer
		var next Disk
		switch d := d.(type) {
		case *Image:
			// One that can be written knows more than its file says.
			if l, next = d, d.lower().disk; d.readOnly.Load() {
				if image, data := fileOf(d.host.s), fileOf(d.data.s); image != nil && data != nil {
					l = imageLayer{image, data}
				}
			}
		case *SnapshotDisk:
			l, next = d, d.disk.lower().disk
		case *ForeignDisk:
			l, next = d, d.below.disk
			if file := fileOf(d.host.s); file != nil {
				l = foreignLayer{file, d.info.Format}
			}
		case *RawDisk:
			l = rawLayerOf(d)
		case *ownedRaw:
			l = rawLayerOf(d.RawDisk)
		}
		layers = append(layers, l)
		d = next
	}
	return layers
}

// rawLayerOf returns the layer of a raw disk.
func rawLayerOf(d *RawDisk) layer {
	if file := fileOf(d.s); file != nil {
		return rawLayer{file}
	}
	return d
}

// fileOf returns what is equal for two storages only if they hold the same bytes at the same offsets, or nil. Identity
// alone does not say so of a storage of the caller's, which may be a part of a file.
func fileOf(s Storage) any {
	switch s := s.(type) {
	case *FileStorage:
		return s.Identity()
	case *MemoryStorage:
		return s
	}
	return nil
}

// sameLayer reports whether x and y, extents at one offset of two chains with the given layers, read the same because
// one layer decides both.
func sameLayer(x, y *Extent, of [2][]layer) bool {
	if x.Depth >= len(of[0]) || y.Depth >= len(of[1]) {
		return false
	}
	l := of[0][x.Depth]
	return l != nil && l == of[1][y.Depth]
}
