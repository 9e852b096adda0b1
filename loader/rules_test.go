package loader

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestUnavailable writes while what takes long is under way: a worker waits for
// it, with all its connections.
func TestUnavailable(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	service := netip.MustParseAddrPort("10.0.0.1:80")
	rules := plain
	rules.Services = []Service{{Addr: service, Connect: flow.ConnectMirror}}
	setRules(t, d, rules)
	defer p.unload(t, d)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, wait := range []time.Duration{time.Hour, 0} {
		done := make(chan error, 1)
		go func() { done <- d.Unavailable(service, wait) }()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("it waits")
		}
		var s bpf.Service
		if err := d.maps.Services.Lookup(bpf.EndpointKey{Addr: bpf.FromAddr(service.Addr()), Port: service.Port()}, &s); err != nil {
			t.Fatal(err)
		}
		if (s.Unavailable > 0) != (wait > 0) || s.Connect != uint8(d.connect(flow.ConnectMirror)) {
			t.Errorf("after %s: %+v", wait, s)
		}
	}
}

// TestRulesKeepUnavailable: that a service has no endpoint for a while is not taken
// back by rules that say something else of it.
func TestRulesKeepUnavailable(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	rules := plain
	rules.Services = []Service{{Addr: shop, Connect: flow.ConnectMirror}}
	setRules(t, d, rules)
	if err := d.Unavailable(shop, time.Hour); err != nil {
		t.Fatal(err)
	}
	rules.Services = []Service{{Addr: shop, Connect: flow.ConnectEarly, Closed: true}}
	setRules(t, d, rules)
	if s := entry(t, d, shop); s.Unavailable == 0 || uint32(s.OnFailure) != bpf.OnFailureClosed {
		t.Errorf("%+v", s)
	}
	rules.Services = nil
	setRules(t, d, rules)
	rules.Services = []Service{{Addr: shop}}
	setRules(t, d, rules)
	if s := entry(t, d, shop); s.Unavailable != 0 {
		t.Errorf("it is a new service, and unavailable: %+v", s)
	}
}

// TestManyOnRelay: services beyond those that slots are reserved for are in force too,
// and what had a slot keeps it.
func TestManyOnRelay(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	rules := plain
	for n := range reservedSlots + 10 {
		a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}), 80)
		rules.Services = append(rules.Services, Service{Addr: a, Path: flow.PathRelay})
	}
	first := rules
	first.Services = rules.Services[:10]
	setRules(t, d, first)
	had := map[netip.AddrPort]uint32{}
	slot := func(a netip.AddrPort) (n uint32) {
		t.Helper()
		if err := d.maps.SlotByOrig.Lookup(bpf.FromAddr(a.Addr()), &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, s := range first.Services {
		had[s.Addr] = slot(s.Addr)
	}
	for range 2 { // the second time, what is reserved is not looked at again, or is
		setRules(t, d, rules)
		if s := stats(t, d); s.Reserved != reservedSlots {
			t.Errorf("%d slots are reserved, want %d", s.Reserved, reservedSlots)
		}
		for a, n := range had {
			if got := slot(a); got != n {
				t.Errorf("%s had slot %d, has %d", a, n, got)
			}
		}
		for _, s := range rules.Services {
			entry(t, d, s.Addr)
		}
	}
	setRules(t, d, first)
	if s := stats(t, d); s.Reserved != 10 {
		t.Errorf("%d slots are reserved, want 10", s.Reserved)
	}
}

// TestAllRulesReplaced: as many rules as there may be are replaced by as many others,
// by the next process too. In a map of an earlier build that there is no room for both
// is told, with the limit.
func TestAllRulesReplaced(t *testing.T) {
	const most = 16384
	list := func(from, n int) (all []Rule) {
		for i := range n {
			k := from + i
			all = append(all, Rule{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(16 + k>>16), byte(k >> 8), byte(k)}), 32)})
		}
		return all
	}
	count := func(m *ebpf.Map) (n int) {
		var k bpf.RuleKey
		var v uint32
		for it := m.Iterate(); it.Next(&k, &v); {
			n++
		}
		return n
	}
	p := newPlace(t)
	d := p.create(t, "one")
	defer func() { p.unload(t, d) }()
	for _, from := range []int{0, 1, most, 2*most + 1, 7} {
		if from == 7 {
			d = p.restart(t, d)
		}
		r := plain
		r.Deny, r.Exclude = list(from, most), list(from+7, most)
		setRules(t, d, r)
		if deny, exclude := count(d.maps.Deny), count(d.maps.Exclude); deny != most || exclude != most {
			t.Errorf("from %d: %d deny, %d exclude", from, deny, exclude)
		}
		for _, rule := range []Rule{r.Deny[0], r.Deny[most-1]} {
			var v Verdict
			p.App.Do(t, func() (err error) {
				v, err = d.DryRun(netip.Addr{}, netip.AddrPortFrom(rule.Prefix.Addr(), 80))
				return err
			})
			if v.Reason != flow.ReasonDenied {
				t.Errorf("from %d: %s: %s", from, rule.Prefix, v.Reason)
			}
		}
	}
	last := list(0, 100)
	small, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.LPMTrie, KeySize: d.maps.Deny.KeySize(), ValueSize: 4, MaxEntries: 100, Flags: unix.BPF_F_NO_PREALLOC})
	if err != nil {
		t.Fatal(err)
	}
	defer small.Close()
	if err := replace(small, ruleKeys(last), nil); err != nil {
		t.Fatal(err)
	}
	if err := replace(small, ruleKeys(list(60, 100)), nil); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "100") {
		t.Errorf("too many: %v", err)
	}
}

// TestRulesMove: a destination that goes from one list to the other, or becomes a
// service, is at no time one that nothing names.
func TestRulesMove(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	dst, other := netip.MustParseAddrPort("10.96.0.1:80"), netip.MustParseAddrPort("10.97.0.1:80")
	ask := func() (v Verdict) {
		if err := p.App.Run(func() (err error) { v, err = d.DryRun(netip.Addr{}, dst); return err }); err != nil {
			t.Error(err)
		}
		return v
	}
	set := func(n int, want flow.Reason) {
		t.Helper()
		r := plain
		to := setOf(netip.AddrPortFrom(testutil.WorldV4.Addr(), uint16(8000+n)))
		r.Services = []Service{{Addr: other, Path: flow.PathDirect, Set: to}} // has something published
		rule := []Rule{{Prefix: netip.MustParsePrefix("10.96.0.0/16")}}
		switch want {
		case flow.ReasonDenied:
			r.Deny = rule
		case flow.ReasonExcluded:
			r.Exclude = rule
		default:
			r.Services = append(r.Services, Service{Addr: dst, Path: flow.PathDirect, Set: to})
		}
		setRules(t, d, r)
		if got := ask().Reason; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	set(0, flow.ReasonDenied)
	done, met := make(chan struct{}), make(chan map[flow.Reason]int)
	go func() {
		all := map[flow.Reason]int{}
		for {
			select {
			case <-done:
				met <- all
				return
			default:
				all[ask().Reason]++
			}
		}
	}()
	for n := range 30 {
		set(n, flow.ReasonExcluded)
		set(n, flow.ReasonService)
		set(n, flow.ReasonDenied)
	}
	close(done)
	all := <-met
	for _, may := range []flow.Reason{flow.ReasonDenied, flow.ReasonExcluded, flow.ReasonService} {
		delete(all, may)
	}
	if len(all) > 0 {
		t.Errorf("also %v", all)
	}
}

// TestDraining: rules that come while it drains do not send the handler new
// connections, and who takes over drains with the rules that were in force, and is
// not draining itself.
func TestDraining(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	rules := plain
	rules.Closed = true
	rules.Deny = []Rule{{Prefix: netip.MustParsePrefix("192.0.2.0/24")}}
	setRules(t, d, rules)
	settings := func() (v bpf.Settings) {
		t.Helper()
		if err := d.maps.Settings.Lookup(uint32(0), &v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	drain := func() {
		t.Helper()
		if err := d.Drain(); err != nil {
			t.Fatal(err)
		}
	}
	drain()
	setRules(t, d, rules)
	if settings().Draining == 0 {
		t.Error("new rules ended the drain")
	}
	d = p.restart(t, d)
	defer func() { p.unload(t, d) }()
	drain()
	if v := settings(); v.Draining == 0 || v.DenyRules != 1 || v.OnFailure != bpf.OnFailureClosed {
		t.Errorf("who took over drains with %+v", v)
	}
	d = p.restart(t, d)
	setRules(t, d, rules)
	if settings().Draining != 0 {
		t.Error("who took over drains as the one before it did")
	}
}

// TestRelays: whether anything goes to slots follows the rules that are in force.
func TestRelays(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	if d.Relays() {
		t.Error("there are no rules, and it relays")
	}
	service := func(path flow.Path) []Service {
		return []Service{{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Path: path}}
	}
	pass := plain
	pass.Default = flow.PathPass
	for _, step := range []struct {
		path    flow.Path
		by      Rules
		service bool
		want    bool
	}{
		{by: pass},
		{by: pass, path: flow.PathDirect, service: true},
		{by: pass, path: flow.PathRelay, service: true, want: true},
		{by: pass, path: flow.PathPass, service: true},
		{by: pass, path: flow.PathNone, service: true, want: true},
		{by: pass},
		{by: plain, path: flow.PathDirect, service: true, want: true},
	} {
		r := step.by
		if step.service {
			r.Services = service(step.path)
		}
		before := d.Relays()
		setRules(t, d, r)
		if got := d.Relays(); got != step.want {
			t.Errorf("default %s, service %v on %s: relays %v, want %v", r.Default, step.service, step.path, got, step.want)
		}
		if got, want := len(d.Relayed()) == 1, step.want && !before; got != want {
			t.Errorf("default %s, service %v on %s: told %v, want %v", r.Default, step.service, step.path, got, want)
		} else if got {
			<-d.Relayed()
		}
	}
}
