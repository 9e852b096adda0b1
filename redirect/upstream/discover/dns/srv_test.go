package dns

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

var srvOptions = Options{Name: "_http._tcp.web.example", SRV: true}

const srvKey = "SRV _http._tcp.web.example"

func TestSRV(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set(srvKey, srvs(time.Minute,
			srv(20, 1, 80, "spare.example."),
			srv(10, 30, 8080, "a.example."), srv(10, 0, 8081, "B.example."), srv(10, 5, 8080, "gone.example.")))
		z.set("A a.example", addrs(30*time.Second, "192.0.2.1"))
		z.set("AAAA b.example", addrs(10*time.Second, "2001:db8::2"))
		z.set("A spare.example", addrs(10*time.Second, "192.0.2.9"))
		return z
	}
	resolve(t, srvOptions, "", z, func(b *bench) {
		// Those of the lowest priority alone; a target without addresses is none.
		b.want(b.after(0), "[192.0.2.1:8080*30 [2001:db8::2]:8081]")
		if q := b.zone.questions(); slices.Contains(q, "A spare.example") {
			t.Errorf("asked %v", q)
		}
		// When no name of the lowest priority has an address, the next one
		// takes over; but the last addresses of names that are listed stay.
		b.zone.set("A a.example", fails("SERVFAIL"))
		b.zone.set("AAAA b.example", none(-1))
		b.want(b.after(10*time.Second), "error: SERVFAIL")
		b.zone.set(srvKey, srvs(time.Minute, srv(20, 1, 80, "spare.example."), srv(10, 5, 8080, "gone.example.")))
		b.want(b.after(time.Second), "[192.0.2.9:80]")
		b.zone.set(srvKey, srvs(time.Minute, srv(20, 1, 80, "spare.example."), srv(10, 5, 8080, "a.example.")))
		// a.example was not needed in between, and is forgotten.
		b.want(b.after(10*time.Second), "error: SERVFAIL")
		b.zone.set("A a.example", addrs(30*time.Second, "192.0.2.1"))
		b.want(b.after(time.Second), "[192.0.2.1:8080*5]")
	})
}

// TestSRVTargetMissing: a target that does not exist, or has no address of the families
// that are asked for, is an answer, which holds for as long as the zone says.
func TestSRVTargetMissing(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set(srvKey, srvs(4*time.Minute, srv(1, 1, 80, "a.example."), srv(1, 1, 80, "b.example."), srv(1, 1, 80, "c.example.")))
		z.set("A a.example", addrs(4*time.Minute, "192.0.2.1"))
		z.set("A b.example", none(50*time.Second))
		z.set("A c.example", say{err: &missing{ttl: -1}}) // it has AAAA records alone
		return z
	}
	resolve(t, Options{Name: srvOptions.Name, SRV: true, Families: FamiliesIPv4}, "", z, func(b *bench) {
		b.want(b.after(0), "[192.0.2.1:80]")
		b.zone.questions()
		b.want(b.after(50*time.Second - 1))
		if q := b.zone.questions(); len(q) != 0 {
			t.Errorf("asked %v while the answers held", q)
		}
		b.zone.set("A b.example", addrs(time.Minute, "192.0.2.2"))
		b.want(b.after(1), "[192.0.2.1:80 192.0.2.2:80]")
		// What was there and is gone is remembered; while nothing is, there is no set.
		b.zone.set("A b.example", none(50*time.Second))
		b.want(b.after(time.Minute), "error: b.example: no such name")
		b.zone.set(srvKey, srvs(4*time.Minute, srv(1, 1, 80, "gone.example."), srv(2, 1, 80, "c.example.")))
		b.want(b.after(time.Second), "error: gone.example: no such name")
	})
}

// TestSRVLacks: what the first answers cannot tell is said to be lacking, and once all has
// been told, or was remembered, nothing is any more.
func TestSRVLacks(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set(srvKey, srvs(time.Minute, srv(1, 1, 80, "a.example."), srv(1, 1, 80, "b.example.")))
		z.set("A a.example", addrs(10*time.Second, "192.0.2.1"))
		z.set("A b.example", fails("SERVFAIL"))
		z.set("AAAA b.example", fails("SERVFAIL"))
		return z
	}
	resolve(t, srvOptions, "", z, func(b *bench) {
		b.want(b.after(0), "[192.0.2.1:80] lacks IPv4 lacks IPv6", "error: SERVFAIL")
		b.zone.set("A b.example", addrs(10*time.Second, "192.0.2.2"))
		b.want(b.after(time.Second), "[192.0.2.1:80 192.0.2.2:80] lacks IPv6", "error: AAAA of b.example: SERVFAIL")
		// a.example is remembered, also that it has no other addresses.
		b.zone.set("A a.example", fails("SERVFAIL"))
		b.zone.set("AAAA a.example", fails("SERVFAIL"))
		b.zone.set("AAAA b.example", none(10*time.Second))
		b.want(b.after(2*time.Second), "[192.0.2.1:80 192.0.2.2:80]", "error: of a.example: SERVFAIL")
		// A target that comes later takes nobody's place.
		b.zone.set(srvKey, srvs(time.Minute, srv(1, 1, 80, "b.example."), srv(1, 1, 80, "c.example.")))
		b.zone.set("A c.example", fails("SERVFAIL"))
		b.want(b.after(4*time.Second), "[192.0.2.2:80]", "error: A of c.example: SERVFAIL")
	})
}

// The TTL is the least of all that was asked for.
func TestSRVTTL(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set(srvKey, srvs(time.Minute, srv(1, 1, 80, "a.example."), srv(1, 1, 81, "a.example.")))
		z.set("A a.example", addrs(7*time.Second, "192.0.2.1"))
		return z
	}
	resolve(t, srvOptions, "", z, func(b *bench) {
		b.want(b.after(7*time.Second-1), "[192.0.2.1:80 192.0.2.1:81]")
		// Each name is asked for once, whatever the number of its ports.
		if q := b.zone.questions(); !slices.Equal(q, []string{"A a.example", "AAAA a.example", srvKey}) {
			t.Errorf("asked %v", q)
		}
		b.after(1)
		if q := b.zone.questions(); len(q) != 3 {
			t.Errorf("asked %v", q)
		}
	})
}

func TestSRVNothing(t *testing.T) {
	z := func() *zone {
		z := newZone()
		z.set(srvKey, srvs(10*time.Second, srv(1, 1, 80, "a.example.")))
		z.set("A a.example", addrs(10*time.Second, "192.0.2.1"))
		return z
	}
	resolve(t, srvOptions, "", z, func(b *bench) {
		b.want(b.after(0), "[192.0.2.1:80]")
		b.zone.set(srvKey, none(5*time.Second))
		b.want(b.after(10*time.Second), "error: NXDOMAIN")
		b.zone.set(srvKey, fails("no answer in time"))
		b.want(b.after(5*time.Second), "error: no answer in time")
		// A target "." says in so many words that there is no such service.
		b.zone.set(srvKey, srvs(10*time.Second, srv(0, 0, 0, ".")))
		b.want(b.after(time.Second), "[]")
		b.zone.set(srvKey, srvs(10*time.Second, srv(0, 0, 0, "a.example.")))
		b.want(b.after(10*time.Second), "error: no record with a target and a port")
	})
}

// Many targets are asked for, a few at once.
func TestSRVMany(t *testing.T) {
	const n = 500
	z := func() *zone {
		z := newZone()
		var all []dnsmessage.SRVResource
		for i := range n {
			name := fmt.Sprintf("pod%d.example", i)
			all = append(all, srv(1, 1, 80, name+"."))
			s := addrs(time.Minute, fmt.Sprintf("10.0.%d.%d", i/250, i%250+1))
			s.after = time.Second
			z.set("A "+name, s)
		}
		z.set(srvKey, srvs(time.Minute, all...))
		return z
	}
	resolve(t, Options{Name: srvOptions.Name, SRV: true, Families: FamiliesIPv4}, "", z, func(b *bench) {
		b.want(b.after(n/maxAtOnce*time.Second - 1))
		if got := b.after(10 * time.Second); len(got) != 1 || len(got[0]) < n*10 {
			t.Errorf("told %d times", len(got))
		}
	})
}

func TestWeigh(t *testing.T) {
	at := func(addrs ...string) *host {
		h := &host{}
		for _, a := range addrs {
			h.addrs = append(h.addrs, netip.MustParseAddr(a))
		}
		return h
	}
	for _, tt := range []struct {
		name  string
		group []dnsmessage.SRVResource
		hosts map[string]*host
		want  string
	}{
		{"as they are", []dnsmessage.SRVResource{srv(1, 3, 80, "a."), srv(1, 65535, 80, "b.")},
			map[string]*host{"a.": at("192.0.2.1"), "b.": at("192.0.2.2")}, "192.0.2.1:80*3 192.0.2.2:80*65535"},
		{"weight 0", []dnsmessage.SRVResource{srv(1, 0, 80, "a."), srv(1, 0, 80, "b.")},
			map[string]*host{"a.": at("192.0.2.1"), "b.": at("192.0.2.2")}, "192.0.2.1:80*1 192.0.2.2:80*1"},
		{"both have two addresses", []dnsmessage.SRVResource{srv(1, 3, 80, "a."), srv(1, 1, 80, "b.")},
			map[string]*host{"a.": at("192.0.2.1", "2001:db8::1"), "b.": at("192.0.2.2", "2001:db8::2")},
			"192.0.2.1:80*3 192.0.2.2:80*1 [2001:db8::1]:80*3 [2001:db8::2]:80*1"},
		{"one has three", []dnsmessage.SRVResource{srv(1, 1, 80, "a."), srv(1, 1, 80, "b.")},
			map[string]*host{"a.": at("192.0.2.1", "192.0.2.2", "192.0.2.3"), "b.": at("192.0.2.4")},
			"192.0.2.1:80*840 192.0.2.2:80*840 192.0.2.3:80*840 192.0.2.4:80*2520"},
		{"no room to scale", []dnsmessage.SRVResource{srv(1, 65535, 80, "a."), srv(1, 1, 80, "b.")},
			map[string]*host{"a.": at("192.0.2.1"), "b.": at("192.0.2.2", "192.0.2.3")},
			"192.0.2.1:80*65535 192.0.2.2:80*1 192.0.2.3:80*1"},
		{"the same address twice", []dnsmessage.SRVResource{srv(1, 60000, 80, "a."), srv(1, 60000, 80, "b.")},
			map[string]*host{"a.": at("192.0.2.1"), "b.": at("192.0.2.1")}, "192.0.2.1:80*65535"},
		{"a target without addresses", []dnsmessage.SRVResource{srv(1, 2, 80, "a."), srv(1, 1, 80, "b.")},
			map[string]*host{"b.": at("192.0.2.1")}, "192.0.2.1:80*1"},
		{"nobody", []dnsmessage.SRVResource{srv(1, 2, 80, "a.")}, nil, ""},
	} {
		got := ""
		for i, e := range weigh(tt.group, tt.hosts) {
			if i > 0 {
				got += " "
			}
			got += fmt.Sprintf("%s*%d", e.Addr, e.Weight)
		}
		if got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

// TestSRVFlood has a server that names more addresses than any set has: it is not listened
// to for long, and the set that there was stays.
func TestSRVFlood(t *testing.T) {
	many := make([]netip.Addr, 4000)
	for i := range many {
		many[i] = netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
	}
	var mu sync.Mutex
	asked := 0
	l := newLookup(Options{Name: srvOptions.Name, SRV: true, Families: FamiliesIPv4}.withDefaults(),
		func(_ context.Context, _ *resolver, q question) (*answer, error) {
			if q.kind == dnsmessage.TypeA {
				mu.Lock()
				defer mu.Unlock()
				asked++
				return &answer{addrs: many, ttl: time.Minute}, nil
			}
			a := &answer{ttl: time.Minute}
			for i := range maxTargets {
				a.srvs = append(a.srvs, srv(1, 1, uint16(i+1), fmt.Sprintf("pod%d.example.", i)))
			}
			return a, nil
		})
	f, err := l.run(t.Context(), &resolver{})
	if err == nil {
		t.Fatalf("%d endpoints are taken", len(f.endpoints))
	}
	if most := addrsMax/len(many) + 2*maxAtOnce; asked > most {
		t.Errorf("%d targets were asked for, want %d at most", asked, most)
	}
	if len(l.known) > 0 {
		t.Errorf("the addresses of %d are remembered", len(l.known))
	}
}
