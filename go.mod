module github.com/go-qcow2/qcow2

go 1.24.0

require (
	github.com/google/go-cmp v0.7.0
	github.com/klauspost/compress v1.19.2
	golang.org/x/sys v0.41.0
)
