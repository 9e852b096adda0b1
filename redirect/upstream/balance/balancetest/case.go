package balancetest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Case is a set in one state of health and load. The endpoints that are Down are
// marked in the set too, and its Spill is what both make it. A case is the
// balance.Members of its set.
type Case struct {
	Name string
	Set  flow.Set
	// Down and Ejected are by index in the set; both are out. No case panics.
	Down, Ejected []bool
	// Load is how many connections each endpoint has, and stays so.
	Load []uint32
	// Want is the share of the picks that each endpoint is to get. All are 0 where
	// none may be picked. Slack is by how much a share may be off in the long run,
	// where a table rounds the weights.
	Want  []float64
	Slack float64
	// Cycle, if not 0, is a number of picks, counted from turn 0, after which the
	// counts are exactly those of Want.
	Cycle int
}

// Available implements balance.Members.
func (c *Case) Available(i int) bool { return !c.Down[i] && !c.Ejected[i] }

// Live implements balance.Members.
func (c *Case) Live(i int) int64 { return int64(c.Load[i]) }

// Seeds returns n seeds, always the same: hashes of addresses for PolicyMaglev,
// random words for the others.
func (c *Case) Seeds(n int) []uint32 {
	seeds := make([]uint32, n)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range seeds {
		seeds[i] = random.Uint32()
		if c.Set.Policy == flow.PolicyMaglev {
			b := [4]byte{10}
			binary.BigEndian.PutUint16(b[2:], uint16(i))
			b[1] = byte(i >> 16)
			seeds[i] = flow.Hash(netip.AddrFrom4(b), 0)
		}
	}
	return seeds
}

// Check compares how often each endpoint was picked with Want: each by itself,
// within five standard deviations, and all together by a chi-square test. The
// seeds are always the same, so it is not a matter of luck.
func (c *Case) Check(counts []int) error {
	var errs []error
	n := 0
	for _, count := range counts {
		n += count
	}
	chi, kinds := 0.0, -1
	for i, got := range counts {
		want := c.Want[i] * float64(n)
		slack := 5*math.Sqrt(want*(1-c.Want[i])) + c.Slack*float64(n)
		if math.Abs(float64(got)-want) > slack || got > 0 && want == 0 {
			errs = append(errs, fmt.Errorf("endpoint %d was picked %d times of %d, want %.1f +- %.1f", i, got, n, want, slack))
		}
		if want > 0 {
			// What rounding explains is no deviation.
			off := max(0, math.Abs(float64(got)-want)-c.Slack*float64(n))
			chi += off * off / want
			kinds++
		}
	}
	// The distribution has a mean of kinds and a variance of twice that; the term
	// that does not grow is for its skew.
	if k := float64(kinds); k > 0 && chi > k+6*math.Sqrt(2*k)+10 {
		errs = append(errs, fmt.Errorf("chi-square %.1f for %d degrees of freedom", chi, kinds))
	}
	return errors.Join(errs...)
}

// CheckCycle compares the counts of Cycle picks with what they are to be exactly.
func (c *Case) CheckCycle(counts []int) error {
	want := make([]int, len(counts))
	for i := range want {
		want[i] = int(math.Round(c.Want[i] * float64(c.Cycle)))
	}
	if !slices.Equal(counts, want) {
		return fmt.Errorf("after %d picks %v, want %v", c.Cycle, counts, want)
	}
	return nil
}
