package qcow2

// testHooks is set by the package's own tests only.
type testHooks struct{}
