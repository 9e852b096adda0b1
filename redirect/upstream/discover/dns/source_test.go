package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// zone is what the world's name servers say, by "TYPE name".
type zone struct {
	mu    sync.Mutex
	says  map[string]say
	asked []string
	times []time.Duration // since the zone was made
	began time.Time
}

// say is one answer, and when it comes.
type say struct {
	answer answer
	err    error
	after  time.Duration
}

func newZone() *zone { return &zone{says: make(map[string]say), began: time.Now()} }

func (z *zone) set(key string, s say) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.says[key] = s
}

// addrs is an answer of addresses.
func addrs(ttl time.Duration, all ...string) say {
	s := say{answer: answer{ttl: ttl}}
	for _, a := range all {
		s.answer.addrs = append(s.answer.addrs, netip.MustParseAddr(a))
	}
	return s
}

func srvs(ttl time.Duration, all ...dnsmessage.SRVResource) say {
	return say{answer: answer{ttl: ttl, srvs: all}}
}

func srv(priority, weight, port uint16, to string) dnsmessage.SRVResource {
	return dnsmessage.SRVResource{Priority: priority, Weight: weight, Port: port, Target: dnsName(to)}
}

// none says that there is nothing, for ttl.
func none(ttl time.Duration) say { return say{err: &missing{ttl: ttl, name: true}} }

func fails(text string) say { return say{err: errors.New(text)} }

// ask is what [client.ask] is elsewhere. A name that nothing is said of does not
// exist.
func (z *zone) ask(ctx context.Context, _ *resolver, q question) (*answer, error) {
	key := strings.TrimPrefix(q.kind.String(), "Type") + " " + strings.TrimSuffix(q.name, ".")
	z.mu.Lock()
	z.asked = append(z.asked, key)
	z.times = append(z.times, time.Since(z.began))
	s, ok := z.says[key]
	z.mu.Unlock()
	if !ok {
		s = none(-1)
	}
	select {
	case <-time.After(s.after):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if m, ok := errors.AsType[*missing](s.err); ok {
		return nil, &missing{question: q, name: m.name, ttl: m.ttl}
	}
	if s.err != nil {
		return nil, fmt.Errorf("%s: %w", q, s.err)
	}
	a := s.answer
	return &a, nil
}

// questions returns what was asked since the last call, sorted.
func (z *zone) questions() []string {
	z.mu.Lock()
	defer z.mu.Unlock()
	all := slices.Sorted(slices.Values(z.asked))
	z.asked, z.times = nil, nil
	return all
}

// bench is a source in a synctest bubble.
type bench struct {
	t    *testing.T
	zone *zone
	out  chan discover.Snapshot
	conf string
}

// resolve runs a source in a bubble, whose resolv.conf has text in it, and which
// leaves nothing to chance.
func resolve(t *testing.T, o Options, text string, z func() *zone, check func(b *bench)) {
	t.Helper()
	resolveBy(t, false, o, text, z, check)
}

func resolveBy(t *testing.T, chance bool, o Options, text string, z func() *zone, check func(b *bench)) {
	t.Helper()
	o.ResolvConf = filepath.Join(t.TempDir(), "resolv.conf")
	write(t, o.ResolvConf, text)
	synctest.Test(t, func(t *testing.T) {
		s, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		b := &bench{t: t, zone: z(), out: make(chan discover.Snapshot, 1000), conf: o.ResolvConf}
		s.lookup.ask = b.zone.ask
		if !chance {
			s.chance = func(time.Duration) time.Duration { return 0 }
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- s.Run(ctx, b.out) }()
		check(b)
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// after lets time pass, and returns what was told meanwhile: sets as words, and
// errors.
func (b *bench) after(d time.Duration) []string {
	time.Sleep(d)
	synctest.Wait()
	var all []string
	for {
		select {
		case s := <-b.out:
			all = append(all, words(s))
		default:
			return all
		}
	}
}

func words(s discover.Snapshot) string {
	if s.Err != nil {
		return "error: " + s.Err.Error()
	}
	parts := make([]string, 0, len(s.Endpoints))
	for _, e := range s.Endpoints {
		text := e.Addr.String()
		if e.Weight != 1 {
			text += fmt.Sprintf("*%d", e.Weight)
		}
		parts = append(parts, text)
	}
	text := "[" + strings.Join(parts, " ") + "]"
	if s.Lacks&discover.LackIPv4 != 0 {
		text += " lacks IPv4"
	}
	if s.Lacks&discover.LackIPv6 != 0 {
		text += " lacks IPv6"
	}
	return text
}

// want compares what was told with patterns: an error by a part of its text.
func (b *bench) want(got []string, want ...string) {
	b.t.Helper()
	same := len(got) == len(want)
	for i := 0; same && i < len(got); i++ {
		rest, isErr := strings.CutPrefix(want[i], "error: ")
		same = got[i] == want[i] || isErr && strings.HasPrefix(got[i], "error: ") && strings.Contains(got[i], rest)
	}
	if !same {
		b.t.Errorf("told %q, want %q", got, want)
	}
}

var webOptions = Options{Name: "web.example", Port: 80}

func TestTTL(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set("A web.example", addrs(20*time.Second, "192.0.2.2", "192.0.2.1", "192.0.2.1"))
		z.set("AAAA web.example", addrs(time.Minute, "2001:db8::1"))
		return z
	}
	resolve(t, webOptions, "", z, func(b *bench) {
		b.want(b.after(0), "[192.0.2.1:80 192.0.2.2:80 [2001:db8::1]:80]")
		b.zone.questions()
		b.want(b.after(20*time.Second - 1))
		if q := b.zone.questions(); len(q) != 0 {
			t.Errorf("asked %v while the answer held", q)
		}
		// The least TTL of the two. The same set in another order is not told
		// again.
		b.zone.set("A web.example", addrs(20*time.Second, "192.0.2.1", "192.0.2.2"))
		b.want(b.after(1))
		if q := b.zone.questions(); !slices.Equal(q, []string{"A web.example", "AAAA web.example"}) {
			t.Errorf("asked %v", q)
		}
		b.zone.set("A web.example", addrs(20*time.Second, "192.0.2.3"))
		b.want(b.after(20*time.Second), "[192.0.2.3:80 [2001:db8::1]:80]")
	})
}

// The next look-up is at a moment between the TTL and a tenth more, by chance.
func TestJitterAndBounds(t *testing.T) {
	for _, tt := range []struct{ ttl, low, high time.Duration }{
		{0, 5 * time.Second, 5500 * time.Millisecond},
		{time.Second, 5 * time.Second, 5500 * time.Millisecond},
		{time.Minute, time.Minute, 66 * time.Second},
		{(1<<31 - 1) * time.Second, 5 * time.Minute, 330 * time.Second},
	} {
		var z *zone
		resolveBy(t, true, Options{Name: "web.example", Port: 80, Families: FamiliesIPv4}, "", func() *zone {
			z = newZone()
			z.set("A web.example", addrs(tt.ttl, "192.0.2.1"))
			return z
		}, func(b *bench) {
			b.after(20 * tt.high)
			z.mu.Lock()
			defer z.mu.Unlock()
			waits := make(map[time.Duration]bool)
			for i := 1; i < len(z.times); i++ {
				d := z.times[i] - z.times[i-1]
				waits[d] = true
				if d < tt.low || d > tt.high {
					t.Errorf("TTL %v: asked again after %v, want %v to %v", tt.ttl, d, tt.low, tt.high)
				}
			}
			if len(z.times) < 20 || len(waits) < 10 {
				t.Errorf("TTL %v: %d look-ups, %d different waits", tt.ttl, len(z.times), len(waits))
			}
		})
	}
}

func TestNothingIsNoAnswer(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set("A web.example", addrs(10*time.Second, "192.0.2.1"))
		return z
	}
	resolve(t, webOptions, "", z, func(b *bench) {
		b.want(b.after(0), "[192.0.2.1:80]")
		b.zone.set("A web.example", none(40*time.Second))
		b.want(b.after(10*time.Second), "error: look up web.example: A of web.example: no such name (NXDOMAIN)")
		// That holds for as long as the zone says.
		b.zone.questions()
		b.want(b.after(40*time.Second - 1))
		if q := b.zone.questions(); len(q) != 0 {
			t.Errorf("asked %v while the answer held", q)
		}
		b.zone.set("A web.example", addrs(10*time.Second, "192.0.2.1"))
		b.want(b.after(1), "[192.0.2.1:80]")
	})
}

// Servers that fail are asked soon, and then less and less often.
func TestBackOff(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set("A web.example", fails("SERVFAIL"))
		return z
	}
	resolve(t, Options{Name: "web.example", Port: 80, Families: FamiliesIPv4}, "", z, func(b *bench) {
		b.want(b.after(0), "error: SERVFAIL")
		b.want(b.after(time.Second), "error: SERVFAIL")
		b.want(b.after(2*time.Second), "error: SERVFAIL")
		b.want(b.after(4*time.Second), "error: SERVFAIL")
		b.want(b.after(8*time.Second), "error: SERVFAIL")
		b.want(b.after(16*time.Second), "error: SERVFAIL")
		if got := b.after(5 * time.Minute); len(got) != 10 {
			t.Errorf("%d look-ups in five minutes, want one each 30 s", len(got))
		}
		b.zone.set("A web.example", addrs(time.Minute, "192.0.2.1"))
		b.want(b.after(30*time.Second), "[192.0.2.1:80]")
		b.zone.set("A web.example", fails("SERVFAIL"))
		b.want(b.after(66 * time.Second)[:1], "error: SERVFAIL")
	})
}

// A family that fails keeps its last addresses, and one that has none has none.
func TestOneFamilyFails(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set("A web.example", addrs(10*time.Second, "192.0.2.1"))
		z.set("AAAA web.example", fails("SERVFAIL"))
		return z
	}
	resolve(t, webOptions, "", z, func(b *bench) {
		b.want(b.after(0), "[192.0.2.1:80] lacks IPv6", "error: AAAA of web.example: SERVFAIL")
		b.zone.set("AAAA web.example", addrs(10*time.Second, "2001:db8::1"))
		b.want(b.after(time.Second), "[192.0.2.1:80 [2001:db8::1]:80]")
		b.zone.set("AAAA web.example", fails("SERVFAIL"))
		b.zone.set("A web.example", addrs(10*time.Second, "192.0.2.2"))
		b.want(b.after(10*time.Second), "[192.0.2.2:80 [2001:db8::1]:80]", "error: SERVFAIL")
		// It fails on: nothing new is told but that.
		b.want(b.after(time.Second), "error: SERVFAIL")
		b.zone.set("AAAA web.example", none(time.Minute))
		b.want(b.after(2*time.Second), "[192.0.2.2:80]")
		b.zone.set("AAAA web.example", fails("SERVFAIL"))
		b.want(b.after(10*time.Second), "error: SERVFAIL") // not forgotten that there were none
	})
}

// The family that never answers does not hold up the other one.
func TestOneFamilyIsSilent(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set("A web.example", addrs(10*time.Second, "192.0.2.1"))
		s := addrs(10*time.Second, "2001:db8::1")
		s.after = time.Hour
		z.set("AAAA web.example", s)
		return z
	}
	resolve(t, webOptions, "", z, func(b *bench) {
		b.want(b.after(patience - 1))
		b.want(b.after(1), "[192.0.2.1:80] lacks IPv6", "error: no answer 2s after that for the other family")
	})
}

func TestFamilies(t *testing.T) {
	for _, tt := range []struct {
		families Families
		conf     string
		want     string
		asked    []string
	}{
		{FamiliesBoth, "", "[192.0.2.1:80 [2001:db8::1]:80]", []string{"A web.example", "AAAA web.example"}},
		{FamiliesIPv4, "", "[192.0.2.1:80]", []string{"A web.example"}},
		{FamiliesIPv6, "", "[[2001:db8::1]:80]", []string{"AAAA web.example"}},
		{FamiliesBoth, "options no-aaaa\n", "[192.0.2.1:80]", []string{"A web.example"}},
		{FamiliesIPv6, "options no-aaaa\n", "[[2001:db8::1]:80]", []string{"AAAA web.example"}},
	} {
		z := func() *zone {
			z := newZone()
			z.set("A web.example", addrs(time.Minute, "192.0.2.1"))
			z.set("AAAA web.example", addrs(time.Minute, "2001:db8::1"))
			return z
		}
		resolve(t, Options{Name: "web.example", Port: 80, Families: tt.families}, tt.conf, z, func(b *bench) {
			b.want(b.after(0), tt.want)
			if q := b.zone.questions(); !slices.Equal(q, tt.asked) {
				t.Errorf("asked %v, want %v", q, tt.asked)
			}
		})
	}
}

// Addresses that nothing can be sent to are no endpoints, and alone no answer.
func TestUnusable(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set("A web.example", addrs(10*time.Second, "0.0.0.0", "192.0.2.1", "240.0.0.7"))
		z.set("AAAA web.example", addrs(10*time.Second, "::ffff:192.0.2.2"))
		return z
	}
	resolve(t, webOptions, "", z, func(b *bench) {
		b.want(b.after(0), "[192.0.2.1:80 192.0.2.2:80]")
		b.zone.set("A web.example", addrs(10*time.Second, "0.0.0.0"))
		b.zone.set("AAAA web.example", addrs(10*time.Second, "::"))
		b.want(b.after(10*time.Second), "error: no address to use: 0.0.0.0 is the unspecified address")
	})
}

func TestSearch(t *testing.T) {
	const text = "search shop.svc svc\noptions ndots:5\n"
	z := func() *zone {
		z := newZone()
		z.set("A web.svc", addrs(10*time.Second, "192.0.2.1"))
		z.set("A web", addrs(10*time.Second, "192.0.2.66"))
		return z
	}
	o := Options{Name: "web", Port: 80, Families: FamiliesIPv4}
	resolve(t, o, text, z, func(b *bench) {
		b.want(b.after(0), "[192.0.2.1:80]")
		if q := b.zone.questions(); !slices.Equal(q, []string{"A web.shop.svc", "A web.svc"}) {
			t.Errorf("asked %v", q)
		}
		// The name that answered is asked for alone from then on.
		b.want(b.after(10 * time.Second))
		if q := b.zone.questions(); !slices.Equal(q, []string{"A web.svc"}) {
			t.Errorf("asked %v", q)
		}
		// When it is gone for a moment, the name further down is not meant.
		b.zone.set("A web.svc", none(5*time.Second))
		b.want(b.after(10*time.Second), "error: NXDOMAIN")
		b.want(b.after(5*time.Second), "error: NXDOMAIN")
		b.zone.set("A web.svc", addrs(10*time.Second, "192.0.2.2"))
		b.want(b.after(5*time.Second), "[192.0.2.2:80]")
		// When it stays away, the list is gone through again.
		b.zone.set("A web.svc", none(5*time.Second))
		b.want(b.after(25*time.Second), "error: NXDOMAIN", "error: NXDOMAIN", "error: NXDOMAIN", "[192.0.2.66:80]")
	})
}

// Doubt about one name of the list is no reason to take the next one.
func TestSearchStopsAtDoubt(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set("A web.shop.svc", fails("SERVFAIL"))
		z.set("A web.svc", addrs(10*time.Second, "192.0.2.66"))
		return z
	}
	resolve(t, Options{Name: "web", Port: 80, Families: FamiliesIPv4}, "search shop.svc svc\n", z, func(b *bench) {
		b.want(b.after(0), "error: A of web.shop.svc: SERVFAIL")
		b.zone.set("A web.shop.svc", addrs(10*time.Second, "192.0.2.1"))
		b.want(b.after(time.Second), "[192.0.2.1:80]")
	})
}

func TestSearchFindsNothing(t *testing.T) {
	resolve(t, Options{Name: "web", Port: 80}, "search a b\n", newZone, func(b *bench) {
		b.want(b.after(0), "error: (asked for web.a, web.b, web)")
	})
}

// A resolv.conf that changes is read at the next look-up.
func TestResolvConfChanges(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set("A web.old", addrs(10*time.Second, "192.0.2.1"))
		z.set("A web.new", addrs(10*time.Second, "192.0.2.2"))
		return z
	}
	resolve(t, Options{Name: "web", Port: 80}, "search old\n", z, func(b *bench) {
		b.want(b.after(0), "[192.0.2.1:80]")
		write(t, b.conf, "search new old\n")
		b.want(b.after(10*time.Second), "[192.0.2.2:80]")
		if err := os.Remove(b.conf); err != nil {
			t.Fatal(err)
		}
		b.want(b.after(10 * time.Second)[:1], "error: no such file")
	})
}
