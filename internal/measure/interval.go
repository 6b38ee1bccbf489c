// Package measure holds what the measuring commands share: medians with confidence intervals, the machine that
// they ran on, and a directory for their files.
package measure

import (
	"fmt"
	"slices"
)

// Interval is a median and a confidence interval for it.
type Interval struct{ Low, Median, High float64 }

// MedianInterval returns the median of samples and the confidence interval for the median that order
// statistics give, at 95 % or better: from the k-th smallest to the k-th largest sample. It assumes nothing
// about the distribution but that samples are independent. With fewer than six samples there is no such
// interval, and it spans all of them.
func MedianInterval(samples []float64) Interval {
	s := slices.Sorted(slices.Values(samples))
	n := len(s)
	if n == 0 {
		return Interval{}
	}
	k := intervalRank(n)
	return Interval{Low: s[k], Median: (s[(n-1)/2] + s[n/2]) / 2, High: s[n-1-k]}
}

// intervalRank returns the largest k, from 0, such that the k-th smallest and the k-th largest of n samples
// (counted from 0) enclose the median with a probability of at least 0.95.
func intervalRank(n int) int {
	// The number of samples below the median is binomial: P(X <= k) must not pass 0.025.
	p := 1.0
	for range n {
		p /= 2
	}
	k := 0
	sum := p
	for {
		p = p * float64(n-k) / float64(k+1)
		if sum += p; sum > 0.025 {
			return k
		}
		k++
	}
}

// String gives the median first, and the interval in brackets; nothing for none.
func (i Interval) String() string { return i.Format("%.2f") }

// Format is String with a verb for each of the numbers.
func (i Interval) Format(verb string) string {
	if i == (Interval{}) {
		return ""
	}
	return fmt.Sprintf("**"+verb+"** ("+verb+" … "+verb+")", i.Median, i.Low, i.High)
}
