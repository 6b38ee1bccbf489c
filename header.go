package qcow2

// header is the decoded image header: the fixed fields, the header extensions and the backing file
// name. qcow2 spec, "Header".
type header struct {
	version          uint32
	backingOff       uint64 // host offset of the backing name; 0: none
	backingSize      uint32 // its length in bytes
	clusterBits      uint32
	size             uint64 // virtual size as it stands in the field, in bytes
	cryptMethod      uint32
	l1Size           uint32 // entries of the active L1 table
	l1Off            uint64
	refTableOff      uint64
	refTableClusters uint32
	nbSnapshots      uint32
	snapshotsOff     uint64
	incompatible     uint64
	compatible       uint64
	autoclear        uint64
	refcountOrder    uint32
	headerLength     uint32
	compression      CompressionType
	unknownFields    []byte            // header bytes from 112 to headerLength, kept verbatim (I9)
	extensions       []headerExtension // in the file's order, END excluded
	backingName      string
	backingFormat    string // from the backing format extension, or ""
	dataFileName     string // from the external data file extension, or ""
}

// headerExtension is one header extension: type and data, padding excluded.
type headerExtension struct {
	typ  uint32
	data []byte
}
