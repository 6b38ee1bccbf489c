package disk

import "github.com/go-qcow2/qcow2"

// Edit opens the named qcow2 image for a change of its structure. Files that it names are opened if opts says so, but for
// the backing files with noBacking.
func Edit(name string, opts Options, noBacking bool) (*qcow2.Image, error) {
	o := &qcow2.OpenOptions{ReadWrite: true, NoBacking: noBacking, Name: name}
	if opts.Share {
		o.Lock = qcow2.LockShare
	}
	if opts.Follow {
		o.Resolver = LocalFiles()
	}
	return qcow2.Open(name, o)
}

// LocalFiles returns a resolver that opens any file of this machine that the user may: for names that the user gave or
// vouches for. Names with a protocol are refused.
func LocalFiles() qcow2.Resolver { return &localFiles{} }
