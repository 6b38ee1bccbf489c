//go:build !race

package codec

// raceEnabled says that the test runs under the race detector.
const raceEnabled = false
