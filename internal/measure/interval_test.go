package measure

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestIntervalRank compares with the ranks of the published tables of the sign test (two-sided, 5 %), which
// count from 1.
func TestIntervalRank(t *testing.T) {
	for n, want := range map[int]int{6: 1, 8: 1, 9: 2, 11: 2, 12: 3, 15: 4, 21: 6, 25: 8, 30: 10, 50: 18} {
		if got := intervalRank(n) + 1; got != want {
			t.Errorf("%d samples: rank %d, want %d", n, got, want)
		}
	}
}

// TestMedianInterval holds the median and its interval against samples whose ranks are plain to see.
func TestMedianInterval(t *testing.T) {
	var odd []float64
	for i := range 15 {
		odd = append(odd, float64((i*7)%15+1)) // 1 … 15 in another order
	}
	if diff := cmp.Diff(Interval{4, 8, 12}, MedianInterval(odd)); diff != "" {
		t.Errorf("1 … 15 (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(Interval{1, 1.5, 2}, MedianInterval([]float64{2, 1})); diff != "" {
		t.Errorf("two samples (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(Interval{}, MedianInterval(nil)); diff != "" {
		t.Errorf("no samples (-want +got):\n%s", diff)
	}
}
