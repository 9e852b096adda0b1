package health

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// clock is a clock that a test moves. It is safe for concurrent use.
type clock struct{ now atomic.Int64 }

func (c *clock) read() time.Duration  { return time.Duration(c.now.Load()) }
func (c *clock) pass(d time.Duration) { c.now.Add(int64(d)) }
func zero() uint64                    { return 0 } // no jitter: waits are whole
func fakeMonitor() (*Monitor, *clock) { c := &clock{}; return NewMonitor(c.read, zero), c }
func plain() *Config                  { return &Config{Failures: 3, Base: time.Second, Max: 8 * time.Second} }
func fail(e *Ejector, c *Config, n int) {
	for range n {
		e.Dialing(c)
		e.Failed(c)
	}
}

func TestConfigValidate(t *testing.T) {
	for name, c := range map[string]struct {
		config Config
		want   []string
	}{
		"default":       {Default(), nil},
		"zero":          {Config{}, nil},
		"never ejects":  {Config{Base: -1, Max: -2}, nil},
		"equal waits":   {Config{Failures: 1, Base: time.Second, Max: time.Second}, nil},
		"no base":       {Config{Failures: 1}, []string{"base wait 0s is not positive"}},
		"short max":     {Config{Failures: 1, Base: 2, Max: 1}, []string{"longest wait 1ns is shorter than the base wait 2ns"}},
		"longest max":   {Config{Failures: 1, Base: 1, Max: 1000 * time.Hour}, nil},
		"long max":      {Config{Failures: 1, Base: 1, Max: 1000*time.Hour + 1}, []string{"longest wait 1000h0m0.000000001s is longer than 1000h0m0s"}},
		"percentages":   {Config{Panic: 100}, nil},
		"everything":    {Config{Failures: -1, Panic: 101}, []string{"failures -1 is negative", "panic 101 is no percentage"}},
		"panic below 0": {Config{Panic: -1}, []string{"panic -1 is no percentage"}},
	} {
		var got []string
		if err := c.config.Validate(); err != nil {
			got = strings.Split(err.Error(), "\n")
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// Waits double from Base up to Max, whatever the range.
func TestWait(t *testing.T) {
	for _, c := range []Config{
		{Base: time.Second, Max: 30 * time.Second},
		{Base: time.Second, Max: time.Second},
		{Base: 3, Max: 10},
		{Base: 1, Max: math.MaxInt64},
		{Base: time.Second, Max: math.MaxInt64},
		{Base: 7 * time.Second, Max: math.MaxInt64 - 1},
		{Base: math.MaxInt64, Max: math.MaxInt64},
	} {
		want := c.Base
		for round := uint32(1); round < 200; round++ {
			if got := c.wait(round, 0); got != want {
				t.Fatalf("%v: wait %d is %d, want %d", c, round, got, want)
			}
			shortest := c.wait(round, uint64(want/4))
			if shortest != want-want/4 {
				t.Fatalf("%v: wait %d is at least %d, want %d", c, round, shortest, want-want/4)
			}
			if want > c.Max/2 {
				want = c.Max
			} else {
				want *= 2
			}
		}
		if got := c.wait(math.MaxUint32, 0); got != c.Max {
			t.Errorf("%v: the longest wait is %d", c, got)
		}
	}
}

// The random part is spread over a quarter, evenly.
func TestWaitIsSpread(t *testing.T) {
	c := Config{Base: time.Second, Max: time.Second}
	random := rand.New(rand.NewPCG(1, 2))
	const n, parts = 10000, 10
	var counts [parts]int
	for range n {
		d := c.wait(1, random.Uint64())
		if d < 750*time.Millisecond || d > time.Second {
			t.Fatalf("waits %s", d)
		}
		counts[min(int((time.Second-d)*parts/(250*time.Millisecond)), parts-1)]++
	}
	for i, got := range counts {
		// 1000 each; five standard deviations are 150.
		if got < n/parts-150 || got > n/parts+150 {
			t.Errorf("part %d of %d has %d of %d waits", i, parts, got, n)
		}
	}
}

func TestEjection(t *testing.T) {
	m, now := fakeMonitor()
	c := plain()
	e := NewEjector(m)

	fail(e, c, 2)
	if e.Ejected() || e.Ejections() != 0 {
		t.Fatal("ejected after two failures of three")
	}
	e.Connected()
	fail(e, c, 2)
	if e.Ejected() {
		t.Fatal("failures that an answer interrupts are counted in a row")
	}
	fail(e, c, 1)
	if !e.Ejected() || e.Ejections() != 1 {
		t.Fatal("not ejected after three failures in a row")
	}

	now.pass(time.Second - 1)
	if !e.Ejected() {
		t.Fatal("returned early")
	}
	now.pass(1)
	if e.Ejected() {
		t.Fatal("not on trial when the wait is over")
	}
}

// Every trial that does not connect makes the next wait twice as long, whether
// it fails, hangs or is given up.
func TestTrials(t *testing.T) {
	m, now := fakeMonitor()
	c := plain()
	e := NewEjector(m)
	fail(e, c, 3)
	wait := c.Base
	for _, failing := range []bool{true, false, true, false, true} {
		now.pass(wait - 1)
		if !e.Ejected() {
			t.Fatalf("returned before %s", wait)
		}
		now.pass(1)
		if e.Ejected() {
			t.Fatalf("still waiting after %s", wait)
		}
		e.Dialing(c)
		if !e.Ejected() {
			t.Fatal("a second dial goes to an endpoint on trial")
		}
		if failing {
			e.Failed(c)
		}
		wait = min(2*wait, c.Max)
	}
	if e.Ejections() != 1 {
		t.Errorf("%d ejections: trials are not counted", e.Ejections())
	}

	now.pass(wait)
	e.Dialing(c)
	e.Connected()
	if e.Ejected() {
		t.Error("ejected after a trial that connected")
	}
	fail(e, c, 2)
	if e.Ejected() {
		t.Error("failures from before the answer still count")
	}
	fail(e, c, 1)
	now.pass(c.Base)
	if e.Ejected() || e.Ejections() != 2 {
		t.Error("a new ejection does not begin with the base wait")
	}
}

// Dials that began before an ejection, or in panic, neither prolong it nor
// count towards the next.
func TestLateFailures(t *testing.T) {
	m, now := fakeMonitor()
	c := plain()
	e := NewEjector(m)
	fail(e, c, 3)
	for range 10 {
		e.Dialing(c)
		e.Failed(c)
	}
	now.pass(c.Base)
	e.Failed(c)
	if e.Ejected() || e.Ejections() != 1 {
		t.Error("a late failure prolonged the ejection")
	}
	e.Connected()
	fail(e, c, 2)
	if e.Ejected() {
		t.Error("a late failure counts")
	}
}

func TestNeverEjects(t *testing.T) {
	m, _ := fakeMonitor()
	c := &Config{}
	e := NewEjector(m)
	fail(e, c, 100)
	g := NewGroup(m, *c, []*Ejector{e}, nil)
	if e.Ejected() || !g.Available(e) || g.Panicking() {
		t.Error("ejected although nothing is to be")
	}
	// A reload switches ejection off while one is ejected.
	fail(e, plain(), 3)
	if !e.Ejected() || !g.Available(e) {
		t.Error("an old ejection holds although nothing is to be ejected")
	}
}

func TestClockAtTheEnd(t *testing.T) {
	m := NewMonitor(func() time.Duration { return math.MaxInt64 - 1 }, zero)
	e := NewEjector(m)
	fail(e, plain(), 3)
	if !e.Ejected() {
		t.Error("an ejection past the end of time is none")
	}
	// A clock may begin before its origin: the end must not be 0.
	before := &clock{}
	before.pass(-time.Second)
	e = NewEjector(NewMonitor(before.read, zero))
	fail(e, plain(), 3)
	if !e.Ejected() {
		t.Error("an ejection that ends at the clock's origin is none")
	}
}

func TestPanic(t *testing.T) {
	for _, c := range []struct {
		panic, members, ejected int
		want                    bool
	}{
		{50, 0, 0, false},
		{50, 1, 0, false},
		{50, 1, 1, true},
		{50, 2, 1, false},
		{50, 2, 2, true},
		{50, 3, 1, false},
		{50, 3, 2, true},
		{50, 4, 2, false},
		{50, 5, 3, true},
		{0, 2, 2, false},
		{1, 3, 2, false},
		{1, 3, 3, true},
		{100, 100, 0, false},
		{100, 100, 1, true},
	} {
		t.Run(fmt.Sprintf("%d of %d at %d percent", c.ejected, c.members, c.panic), func(t *testing.T) {
			m, now := fakeMonitor()
			config := *plain()
			config.Panic = c.panic
			var members []*Ejector
			for range c.members {
				members = append(members, NewEjector(m))
			}
			g := NewGroup(m, config, members, nil)
			if g.Panicking() {
				t.Error("panics with nobody ejected")
			}
			for _, e := range members[:c.ejected] {
				fail(e, &config, 3)
			}
			if got := g.Panicking(); got != c.want {
				t.Errorf("panics: %v, want %v", got, c.want)
			}
			for i, e := range members {
				if got, want := g.Available(e), i >= c.ejected || c.want; got != want {
					t.Errorf("member %d is available: %v, want %v", i, got, want)
				}
			}
			now.pass(config.Base)
			if g.Panicking() {
				t.Error("panics although all waits are over")
			}
		})
	}
}

// The verdict follows every change at once: a wait that is over, a trial, an
// answer, an ejection in the same group.
func TestVerdictIsFresh(t *testing.T) {
	m, now := fakeMonitor()
	c := *plain()
	c.Panic = 50
	a, b := NewEjector(m), NewEjector(m)
	g := NewGroup(m, c, []*Ejector{a, b}, nil)
	check := func(when string, want bool) {
		t.Helper()
		for range 2 { // the second answer is remembered
			if got := g.Panicking(); got != want {
				t.Fatalf("%s: panics: %v, want %v", when, got, want)
			}
		}
	}
	check("at first", false)
	fail(a, &c, 3)
	check("one is ejected", false)
	now.pass(time.Second / 2)
	fail(b, &c, 3)
	check("both are", true)
	now.pass(time.Second / 2)
	check("the first is on trial", false)
	a.Dialing(&c)
	check("the trial began", true)
	a.Connected()
	check("the trial connected", false)
	a.SetDown(true)
	check("and went down: of the others all are ejected", true)
	if !g.Available(b) || g.Available(a) {
		t.Error("down counts in panic, and an ejection does not")
	}
	b.SetDown(true)
	check("of none nobody is ejected", false)
	b.SetDown(false)
	b.Connected()
	check("the other is there again", false)
}

// What overflow says is asked for after a change only, about who is available then.
func TestSpill(t *testing.T) {
	m, now := fakeMonitor()
	c := *plain()
	c.Panic = 30
	members := []*Ejector{NewEjector(m), NewEjector(m), NewEjector(m), NewEjector(m)}
	asked := 0
	g := NewGroup(m, c, members, func(available func(int) bool) (bits uint32) {
		asked++
		for i := range members {
			if available(i) {
				bits |= 1 << i
			}
		}
		return bits
	})
	check := func(when string, want uint32) {
		t.Helper()
		for range 3 {
			if got := g.Spill(); got != want {
				t.Errorf("%s: available are %04b, want %04b", when, got, want)
			}
		}
	}
	check("at first", 0b1111)
	members[0].SetDown(true)
	check("one down", 0b1110)
	fail(members[1], &c, 3)
	check("one ejected", 0b1100)
	members[1].SetDown(true)
	members[1].SetDown(false)
	check("and back from a check", 0b1100)
	fail(members[2], &c, 3)
	check("two ejected", 0b1000)
	fail(members[3], &c, 3)
	check("all but the one that is down: panic", 0b1110)
	now.pass(c.Base)
	check("on trial", 0b1110)
	members[0].SetDown(false)
	check("all", 0b1111)
	if asked != 8 {
		t.Errorf("asked %d times for 8 states", asked)
	}
	c = Config{}
	if g := NewGroup(m, c, members[:1], nil); g.Spill() != 0 || !g.Available(members[0]) {
		t.Error("without zones something spills")
	}
}

// However many look at once, one dial is the trial.
func TestOneTrial(t *testing.T) {
	m, now := fakeMonitor()
	c := plain()
	e := NewEjector(m)
	for range 100 {
		fail(e, c, 3)
		now.pass(c.Max)
		before := m.changes.Load()
		var dials sync.WaitGroup
		for range 8 {
			dials.Go(func() { e.Dialing(c) })
		}
		dials.Wait()
		if got := m.changes.Load() - before; got != 1 {
			t.Fatalf("%d trials began", got)
		}
		e.Connected()
	}
}

// Failures of many workers at once are one ejection.
func TestOneEjection(t *testing.T) {
	m, _ := fakeMonitor()
	c := plain()
	for range 100 {
		e := NewEjector(m)
		var dials sync.WaitGroup
		for range 16 {
			dials.Go(func() { fail(e, c, 3) })
		}
		dials.Wait()
		if !e.Ejected() || e.Ejections() != 1 {
			t.Fatalf("ejected: %v, %d times", e.Ejected(), e.Ejections())
		}
	}
}

// Everything at once, for the race detector. Afterwards one answer per endpoint
// makes all of them available.
func TestRace(t *testing.T) {
	m, now := fakeMonitor()
	c := *plain()
	c.Panic = 50
	members := []*Ejector{NewEjector(m), NewEjector(m), NewEjector(m)}
	g := NewGroup(m, c, members, nil)
	var workers sync.WaitGroup
	for w := range 8 {
		workers.Go(func() {
			random := rand.New(rand.NewPCG(uint64(w), 1))
			for range 2000 {
				e := members[random.IntN(len(members))]
				e.Dialing(&c)
				if random.IntN(4) == 0 {
					e.Connected()
				} else {
					e.Failed(&c)
				}
				e.SetDown(random.IntN(8) == 0)
				g.Available(e)
				now.pass(time.Duration(random.IntN(int(time.Second / 10))))
			}
		})
	}
	workers.Wait()
	for i, e := range members {
		e.Connected()
		e.SetDown(false)
		if !g.Available(e) || e.Ejected() {
			t.Errorf("member %d is not available after an answer", i)
		}
	}
	if g.Panicking() {
		t.Error("panics with nobody ejected")
	}
}

func TestMonitorOfTheProcess(t *testing.T) {
	m := NewMonitor(nil, nil)
	if a, b := m.now(), m.now(); a < 0 || b < a {
		t.Errorf("the clock goes from %s to %s", a, b)
	}
	if a, b := m.Random(), m.Random(); a == b {
		t.Errorf("%d twice", a)
	}
}

func TestNothingAllocates(t *testing.T) {
	m, _ := fakeMonitor()
	c := *plain()
	c.Panic = 50
	e := NewEjector(m)
	g := NewGroup(m, c, []*Ejector{e, NewEjector(m)}, nil)
	fail(e, &c, 3)
	g.Panicking()
	if n := testing.AllocsPerRun(100, func() { e.Dialing(&c); e.Failed(&c); g.Available(e) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
