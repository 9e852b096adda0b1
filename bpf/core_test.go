package bpf

import (
	_ "embed"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

//go:embed include/decide.h
var decideHeader string

// Our slots in these tests: 240.5.0.0/16 and fd70:696c:6c69:9::/64.
const (
	testSlot4 = 0xf0050000
	testSlot6 = 9
)

// loadCoreProgs loads the programs of tests/core.test.c. They end with the test.
func loadCoreProgs(t *testing.T) *corePrograms {
	t.Helper()
	testutil.RequireRoot(t)
	var objects coreObjects
	if err := loadCoreObjects(&objects, nil); err != nil {
		t.Fatalf("load: %+v", err)
	}
	t.Cleanup(func() { objects.Close() })
	return &objects.corePrograms
}

// run runs p once: io holds its input, and then also its answer.
func run[IO any](t *testing.T, p *ebpf.Program, io *IO) {
	t.Helper()
	in := *io
	if _, err := p.Run(&ebpf.RunOptions{Context: &in, ContextOut: io}); err != nil {
		t.Fatalf("%v: %v", p, err)
	}
}

// possible returns the names with prefix that the body of a C function of
// include/decide.h can give, lower-cased and sorted.
func possible(t *testing.T, function, prefix string) []string {
	t.Helper()
	_, body, ok := strings.Cut(decideHeader, " "+function+"(")
	if !ok {
		t.Fatalf("include/decide.h has no function %s", function)
	}
	body, _, _ = strings.Cut(body, "\n}\n")
	names := map[string]bool{}
	for _, m := range regexp.MustCompile(`return[^;]*;`).FindAllString(cComment.ReplaceAllString(body, ""), -1) {
		for _, name := range regexp.MustCompile(prefix+`\w+`).FindAllString(m, -1) {
			names[strings.ToLower(strings.TrimPrefix(name, prefix))] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

// reached collects the answers of a table, to be compared with the possible.
type reached map[string]bool

func (r reached) equal(t *testing.T, function, prefix string) {
	t.Helper()
	if diff := cmp.Diff(possible(t, function, prefix), slices.Sorted(maps.Keys(r))); diff != "" {
		t.Errorf("the table does not reach all that %s can give (-can give +reached):\n%s", function, diff)
	}
}

func coreAddr(s string) coreIpAddr { return coreIpAddr(FromAddr(netip.MustParseAddr(s))) }

func TestLeaveAlone(t *testing.T) {
	const tcp, udp = 6, 17
	progs := loadCoreProgs(t)
	ours := func(dst string, change ...func(*coreAttempt)) coreAttempt {
		a := coreAttempt{
			Dst: coreAddr(dst), Netns: 7, OurNetns: 7,
			Slot4: testSlot4, Slot6: testSlot6, Protocol: tcp,
		}
		for _, c := range change {
			c(&a)
		}
		return a
	}
	foreignNetns := func(a *coreAttempt) { a.Netns = 8 }
	viaUDP := func(a *coreAttempt) { a.Protocol = udp }
	bound := func(a *coreAttempt) { a.BoundDev = 3 }
	own := func(a *coreAttempt) { a.OwnAddr = 1 }
	self := func(a *coreAttempt) { a.Self = 1 }
	answers := func(a *coreAttempt) { a.SlotListener = 1 }

	tests := []struct {
		name string
		in   coreAttempt
		want flow.Reason
	}{
		{"plain v4", ours("10.96.0.12"), flow.ReasonNone},
		{"plain v6", ours("2001:db8::1"), flow.ReasonNone},
		{"mapped v6 is v4", ours("::ffff:10.96.0.12"), flow.ReasonNone},
		{"other netns", ours("10.96.0.12", foreignNetns), flow.ReasonNetns},
		{"other netns, slot", ours("240.5.0.1", foreignNetns), flow.ReasonNetns},
		{"other netns, everything", ours("127.0.0.1", foreignNetns, viaUDP, bound, own, self), flow.ReasonNetns},
		{"UDP", ours("10.96.0.12", viaUDP), flow.ReasonProtocol},
		{"UDP, bound, metadata", ours("169.254.169.254", viaUDP, bound), flow.ReasonProtocol},
		{"bound device", ours("10.96.0.12", bound), flow.ReasonBoundDevice},
		{"bound device, loopback", ours("127.0.0.1", bound), flow.ReasonBoundDevice},
		{"loopback v4", ours("127.0.0.1"), flow.ReasonLoopback},
		{"loopback v6", ours("::1"), flow.ReasonLoopback},
		{"unspecified v4", ours("0.0.0.0"), flow.ReasonLoopback},
		{"unspecified v6", ours("::"), flow.ReasonLoopback},
		{"loopback is an own address", ours("127.0.0.1", own), flow.ReasonLoopback},
		{"metadata before link-local", ours("169.254.169.254"), flow.ReasonMetadata},
		{"metadata before own address", ours("100.100.100.200", own), flow.ReasonMetadata},
		{"metadata v6", ours("fd00:ec2::254"), flow.ReasonMetadata},
		{"link-local v4", ours("169.254.0.1"), flow.ReasonLinkLocal},
		{"link-local v6", ours("fe80::1"), flow.ReasonLinkLocal},
		{"link-local is an own address", ours("fe80::1", own), flow.ReasonLinkLocal},
		{"own address", ours("10.0.0.5", own), flow.ReasonOwnAddress},
		{"own address, self", ours("10.0.0.5", own, self), flow.ReasonOwnAddress},
		{"multicast v4", ours("224.0.0.1"), flow.ReasonMulticast},
		{"multicast v6", ours("ff02::1"), flow.ReasonMulticast},
		{"broadcast", ours("255.255.255.255"), flow.ReasonMulticast},
		{"multicast is an own address", ours("255.255.255.255", own), flow.ReasonOwnAddress},
		{"multicast, self", ours("224.0.0.1", self), flow.ReasonMulticast},
		{"bound device, metadata", ours("169.254.169.254", bound), flow.ReasonBoundDevice},
		{"self", ours("10.96.0.12", self), flow.ReasonSelf},
		{"self to a slot", ours("240.5.0.1", self), flow.ReasonSelf},
		{"our slot", ours("240.5.0.1"), flow.ReasonSlotAddress},
		{"our slot, mapped", ours("::ffff:240.5.0.1"), flow.ReasonSlotAddress},
		{"our slot, answered", ours("240.5.0.1", answers), flow.ReasonSlotAddress},
		{"our slot by UDP", ours("240.5.0.1", viaUDP), flow.ReasonSlotAddress},
		{"our slot, bound device", ours("240.5.0.1", bound), flow.ReasonSlotAddress},
		{"our slot as own address", ours("240.5.0.1", own), flow.ReasonSlotAddress},
		{"our slot v6", ours("fd70:696c:6c69:9::1"), flow.ReasonSlotAddress},
		{"our slot v6, answered", ours("fd70:696c:6c69:9::1", answers), flow.ReasonSlotAddress},
		{"our /64, above the slots", ours("fd70:696c:6c69:9:1::", answers), flow.ReasonSlotAddress},
		{"another's slot", ours("240.6.0.1", answers), flow.ReasonForeignSlot},
		{"another's slot v6", ours("fd70:696c:6c69:a::1", answers), flow.ReasonForeignSlot},
		{"another's slot by UDP", ours("240.6.0.1", answers, viaUDP), flow.ReasonForeignSlot},
		{"nobody's slot", ours("240.6.0.1"), flow.ReasonSlotAddress},
		{"nobody's slot v6", ours("fd70:696c:6c69:a::1"), flow.ReasonSlotAddress},
		{"below the supernet", ours("239.255.255.255"), flow.ReasonMulticast},
		{"above the supernet", ours("240.64.0.0"), flow.ReasonNone},
		{"above the supernet v6", ours("fd70:696c:6c6a::"), flow.ReasonNone},
	}
	all := reached{}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			io := coreRunLeaveAlone{In: tt.in}
			run(t, progs.PlLeaveAlone, &io)
			got := flow.Reason(io.Out)
			all[got.String()] = true
			if got != tt.want {
				t.Errorf("leave_alone: %v, want %v", got, tt.want)
			}
		})
	}
	all.equal(t, "leave_alone", "REASON_")
}

// TestPlain: no address that is plain is one to be left alone. All /16 of IPv4 are looked
// at, with the last digits of what is special in some, and IPv6 by its first 16 bits.
func TestPlain(t *testing.T) {
	progs := loadCoreProgs(t)
	plain := 0
	look := func(a netip.Addr) {
		io := coreRunIsPlain{In: coreIpAddr(FromAddr(a))}
		run(t, progs.PlIsPlain, &io)
		if io.Out == 0 {
			return
		}
		plain++
		at := coreRunLeaveAlone{In: coreAttempt{Dst: io.In, Netns: 7, OurNetns: 7, Slot4: testSlot4, Slot6: testSlot6, Protocol: 6}}
		run(t, progs.PlLeaveAlone, &at)
		if why := flow.Reason(at.Out); why != flow.ReasonNone {
			t.Errorf("%s is plain, and left alone: %v", a, why)
		}
	}
	ends4 := [][2]byte{{0, 0}, {0, 1}, {255, 255}, {169, 254}, {170, 2}, {129, 16}, {100, 200}}
	ends6 := [][14]byte{{}, {0x0e, 0xc2, 12: 2, 13: 0x54}, {1: 0xce, 12: 2, 13: 0x54}, {1: 0xc1, 10: 0xa9, 11: 0xfe, 12: 0xa9, 13: 0xfe}, {1: 0x42, 13: 0x42}, {0x69, 0x6c, 0x6c, 0x69, 5: 9, 13: 1}}
	for high := range 1 << 16 {
		for _, e := range ends4 {
			look(netip.AddrFrom4([4]byte{byte(high >> 8), byte(high), e[0], e[1]}))
		}
		for _, e := range ends6 {
			look(netip.AddrFrom16([16]byte(append([]byte{byte(high >> 8), byte(high)}, e[:]...))))
		}
	}
	// 2000::/3, and IPv4 without 0, 100, 127, 168, 169 and what is above 223.
	if want := 1<<13*len(ends6) + 219<<8*len(ends4); plain != want {
		t.Errorf("%d addresses are plain, want %d", plain, want)
	}
}

func TestByRules(t *testing.T) {
	progs := loadCoreProgs(t)
	// Each row has every weaker fact set too: the order is what is tested.
	tests := []struct {
		name string
		in   coreFacts
		want flow.Reason
	}{
		{"denied", coreFacts{Denied: 1, Excluded: 1, Foreign: 1, Service: 1, DefaultPass: 1, Routed: 1}, flow.ReasonDenied},
		{"denied alone", coreFacts{Denied: 1}, flow.ReasonDenied},
		{"excluded", coreFacts{Excluded: 1, Foreign: 1, Service: 1, DefaultPass: 1, Routed: 1}, flow.ReasonExcluded},
		{"excluded alone", coreFacts{Excluded: 1}, flow.ReasonExcluded},
		{"foreign source", coreFacts{Foreign: 1, Service: 1, DefaultPass: 1, Routed: 1}, flow.ReasonForeignSource},
		{"foreign source alone", coreFacts{Foreign: 1}, flow.ReasonForeignSource},
		{"service", coreFacts{Service: 1, DefaultPass: 1, Routed: 1}, flow.ReasonService},
		{"service without route", coreFacts{Service: 1}, flow.ReasonService},
		{"default pass", coreFacts{DefaultPass: 1, Routed: 1}, flow.ReasonDefaultPass},
		{"default pass without route", coreFacts{DefaultPass: 1}, flow.ReasonDefaultPass},
		{"no route", coreFacts{}, flow.ReasonNoRoute},
		{"default", coreFacts{Routed: 1}, flow.ReasonDefault},
	}
	all := reached{}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			io := coreRunByRules{In: tt.in}
			run(t, progs.PlByRules, &io)
			got := flow.Reason(io.Out)
			all[got.String()] = true
			if got != tt.want {
				t.Errorf("by_rules: %v, want %v", got, tt.want)
			}
		})
	}
	all.equal(t, "by_rules", "REASON_")
}

func TestObstacle(t *testing.T) {
	progs := loadCoreProgs(t)
	well := func(change ...func(*coreHealth)) coreHealth {
		h := coreHealth{
			Now: 1000, Stamp: 900, MaxAge: 300,
			Conns: 9, ConnQuota: 10, Live: 99, LiveMax: 100,
			Family: 1, Listener: 1,
		}
		for _, c := range change {
			c(&h)
		}
		return h
	}
	noFamily := func(h *coreHealth) { h.Family = 0 }
	draining := func(h *coreHealth) { h.Draining = 1 }
	noListener := func(h *coreHealth) { h.Listener = 0 }
	stamp := func(n uint64) func(*coreHealth) { return func(h *coreHealth) { h.Stamp = n } }
	busy := func(h *coreHealth) { h.Busy = 1 }
	live := func(n, limit uint32) func(*coreHealth) {
		return func(h *coreHealth) { h.Live, h.LiveMax = n, limit }
	}
	died := func(h *coreHealth) { h.Died = 1 }
	conns := func(n, quota uint64) func(*coreHealth) {
		return func(h *coreHealth) { h.Conns, h.ConnQuota = n, quota }
	}

	tests := []struct {
		name string
		in   coreHealth
		want flow.Reason
	}{
		{"well", well(), flow.ReasonNone},
		{"no family", well(noFamily), flow.ReasonNoFamily},
		{"no family, and all else", well(noFamily, draining, noListener, stamp(0), busy, live(1, 0), conns(2, 1)), flow.ReasonNoFamily},
		{"draining", well(draining), flow.ReasonHandlerAbsent},
		{"died", well(died), flow.ReasonHandlerAbsent},
		{"died, and all else", well(died, noListener, stamp(0), busy, live(1, 0), conns(2, 1)), flow.ReasonHandlerAbsent},
		{"no listener", well(noListener), flow.ReasonHandlerAbsent},
		{"no listener, and all else", well(noListener, stamp(0), busy, live(1, 0), conns(2, 1)), flow.ReasonHandlerAbsent},
		{"never stamped", well(stamp(0)), flow.ReasonHandlerStale},
		{"exactly at the age", well(stamp(700)), flow.ReasonNone},
		{"one past the age", well(stamp(699)), flow.ReasonHandlerStale},
		{"stamped right now", well(stamp(1000)), flow.ReasonNone},
		{"stamped after now", well(stamp(1001)), flow.ReasonNone},
		{"stamped far after now", well(stamp(1 << 63)), flow.ReasonNone},
		{"stale, and all else", well(stamp(1), busy, live(1, 0), conns(2, 1)), flow.ReasonHandlerStale},
		{"busy", well(busy), flow.ReasonHandlerBusy},
		{"busy, and all else", well(busy, live(1, 0), conns(2, 1)), flow.ReasonHandlerBusy},
		{"full", well(live(100, 100)), flow.ReasonLiveFull},
		{"over full", well(live(101, 100)), flow.ReasonLiveFull},
		{"room for none", well(live(0, 0)), flow.ReasonLiveFull},
		{"full, and over the quota", well(live(100, 100), conns(10, 10)), flow.ReasonLiveFull},
		{"at the quota", well(conns(10, 10)), flow.ReasonConnQuota},
		{"over the quota", well(conns(11, 10)), flow.ReasonConnQuota},
		{"no quota", well(conns(1<<40, 0)), flow.ReasonNone},
		{"quota of a wide number", well(conns(1<<40, 1<<40+1)), flow.ReasonNone},
	}
	all := reached{}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			io := coreRunObstacle{In: tt.in}
			run(t, progs.PlObstacle, &io)
			got := flow.Reason(io.Out)
			all[got.String()] = true
			if got != tt.want {
				t.Errorf("obstacle: %v, want %v", got, tt.want)
			}
		})
	}
	all.equal(t, "obstacle", "REASON_")
}

// TestPathOf goes through every reason that the kernel side knows, so that a new
// one has to be given a path here.
func TestPathOf(t *testing.T) {
	const relay, deny, pass, byOnFailure = "relay", "deny", "pass", "by on_failure"
	const asAsked = "as asked"
	want := map[flow.Reason]string{
		flow.ReasonService: asAsked,
		flow.ReasonDefault: relay,

		flow.ReasonDenied:      deny,
		flow.ReasonSlotAddress: deny,
		flow.ReasonNoEndpoint:  deny,

		flow.ReasonHandlerAbsent: byOnFailure,
		flow.ReasonHandlerStale:  byOnFailure,
		flow.ReasonHandlerBusy:   byOnFailure,
		flow.ReasonNoSlot:        byOnFailure,
		flow.ReasonSlotQuota:     byOnFailure,
		flow.ReasonLiveFull:      byOnFailure,
		flow.ReasonConnQuota:     byOnFailure,
		flow.ReasonNoFamily:      byOnFailure,
		flow.ReasonNoMemory:      byOnFailure,

		flow.ReasonProtocol:    pass,
		flow.ReasonNetns:       pass,
		flow.ReasonBoundDevice: pass,
		flow.ReasonLoopback:    pass,
		flow.ReasonLinkLocal:   pass,
		flow.ReasonMetadata:    pass,
		flow.ReasonOwnAddress:  pass,
		flow.ReasonMulticast:   pass,
		flow.ReasonSelf:        pass,
		flow.ReasonForeignSlot: pass,
		flow.ReasonExcluded:    pass,
		flow.ReasonDefaultPass: pass,
		flow.ReasonNoRoute:     pass,

		flow.ReasonForeignSource: pass,

		// No connect hook gives these.
		flow.ReasonNone:       pass,
		flow.ReasonAdmitted:   pass,
		flow.ReasonProbe:      pass,
		flow.ReasonNotLive:    pass,
		flow.ReasonNoListener: pass,
		flow.ReasonNoDecision: pass,
		flow.ReasonExisting:   pass,
		flow.ReasonUnsent:     pass,
		flow.ReasonLiveLost:   pass,
		flow.ReasonHeld:       pass,
		flow.ReasonInjected:   pass,
		flow.ReasonHoldStale:  pass,
		flow.ReasonHoldFull:   pass,
		flow.ReasonForged:     pass,
		flow.ReasonAwaited:    pass,
	}
	progs := loadCoreProgs(t)
	all := reached{}
	for _, why := range flow.Reasons()[:flow.KernelReasons] {
		for _, onFailure := range []uint32{OnFailureOpen, OnFailureClosed, OnFailureClosed + 1} {
			for _, asked := range flow.Paths() {
				for _, set := range []uint32{0, 1} {
					expect := want[why]
					switch {
					case expect == "":
						t.Errorf("reason %v has no path in this table", why)
					case expect == asAsked && (asked == flow.PathPass || asked == flow.PathDirect):
						expect = asked.String()
					case expect == asAsked:
						expect = relay
					case expect == byOnFailure && onFailure == OnFailureClosed:
						expect = deny
					case expect == byOnFailure && set == 1:
						expect = "direct"
					case expect == byOnFailure:
						expect = pass
					}
					io := coreRunPathOf{Why: uint32(why), OnFailure: onFailure, Asked: uint32(asked), Set: set}
					run(t, progs.PlPathOf, &io)
					got := flow.Path(io.Out).String()
					all[got] = true
					if got != expect {
						t.Errorf("path_of(%v, %d, %v, %d): %v, want %v", why, onFailure, asked, set, got, expect)
					}
				}
			}
		}
	}
	all.equal(t, "path_of", "PATH_")
}

// TestAdmit goes through all sixteen arrivals.
func TestAdmit(t *testing.T) {
	progs := loadCoreProgs(t)
	all := reached{}
	for bits := range uint8(16) {
		in := coreArrival{Tcp: bits & 1, Probe: bits >> 1 & 1, Live: bits >> 2 & 1, Listener: bits >> 3 & 1}
		want := flow.ReasonAdmitted
		switch {
		case in.Tcp == 0, in.Live == 0 && in.Probe == 0:
			want = flow.ReasonNotLive
		case in.Listener == 0:
			want = flow.ReasonNoListener
		case in.Probe == 1:
			want = flow.ReasonProbe
		}
		io := coreRunAdmit{In: in}
		run(t, progs.PlAdmit, &io)
		got := flow.Reason(io.Out)
		all[got.String()] = true
		if got != want {
			t.Errorf("admit(%+v): %v, want %v", in, got, want)
		}
	}
	all.equal(t, "admit", "REASON_")
}

// TestAwaits starts from a refusal that is kept back, and changes one thing.
func TestAwaits(t *testing.T) {
	const established, synSent = 1, 2 // BPF_TCP_*
	const second = uint64(time.Second)
	progs := loadCoreProgs(t)
	for name, tt := range map[string]struct {
		change func(r *coreRefusal)
		want   uint32
	}{
		"just gone":            {func(*coreRefusal) {}, 1},
		"gone for two seconds": {func(r *coreRefusal) { r.Now = r.Stamp + 2*second }, 1},
		"gone for three":       {func(r *coreRefusal) { r.Now = r.Stamp + 3*second }, 0},
		"a younger stamp":      {func(r *coreRefusal) { r.Now = r.Stamp - 1 }, 1},
		"no stamp":             {func(r *coreRefusal) { r.Now, r.Stamp = second, 0 }, 0},
		"held":                 {func(r *coreRefusal) { r.Hold = HoldYes }, 1},
		"the dial's result":    {func(r *coreRefusal) { r.Hold = HoldOver }, 0},
		"established":          {func(r *coreRefusal) { r.State = established }, 0},
		"nobody":               {func(r *coreRefusal) { r.State = 0 }, 0},
		"closed":               {func(r *coreRefusal) { r.OnFailure = OnFailureClosed }, 0},
		"draining":             {func(r *coreRefusal) { r.Draining = 1 }, 0},
		"canary":               {func(r *coreRefusal) { r.Canary = 1 }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			io := coreRunAwaits{In: coreRefusal{Now: 11 * second, Stamp: 10 * second, State: synSent, OnFailure: OnFailureOpen}}
			tt.change(&io.In)
			run(t, progs.PlAwaits, &io)
			if io.Out != tt.want {
				t.Errorf("awaits(%+v): %d, want %d", io.In, io.Out, tt.want)
			}
		})
	}
}

func TestEndingOf(t *testing.T) {
	// enum of the kernel's linux/bpf.h: BPF_TCP_*.
	const (
		established = iota + 1
		synSent
		synRecv
		finWait1
		finWait2
		timeWait
		closed
		closeWait
		lastAck
		listen
		closing
		newSynRecv
	)
	names := []string{"closed", "reset", "refused", "timeout", "unreachable", "abandoned"}
	progs := loadCoreProgs(t)
	all := reached{}
	for _, tt := range []struct {
		state, segs       uint32
		unacked           uint32
		expired, released uint8
		want              uint8
		failure           []uint32 // by retransmits
	}{
		{synSent, 0, 0, 0, 0, EndingUnreachable, []uint32{1, 1}},
		{synSent, 0, 0, 0, 1, EndingAbandoned, []uint32{0, 1}},
		{synSent, 0, 1, 0, 0, EndingAbandoned, []uint32{0, 1}}, // by shutdown, or AF_UNSPEC
		{synSent, 0, 1, 1, 0, EndingTimeout, []uint32{1, 1}},
		{synSent, 0, 0, 1, 0, EndingTimeout, []uint32{1, 1}},
		{synSent, 0, 0, 1, 1, EndingTimeout, []uint32{1, 1}}, // it had closed it as well
		{synSent, 1, 0, 0, 0, EndingRefused, []uint32{1, 1}},
		{synSent, 1, 0, 1, 1, EndingRefused, []uint32{1, 1}},
		{synSent, 1 << 31, 0, 0, 0, EndingRefused, []uint32{1, 1}},
		{established, 0, 0, 0, 0, EndingReset, nil}, // fast open, or repair: no segment yet
		{established, 5, 0, 0, 0, EndingReset, nil},
		{established, 5, 0, 1, 1, EndingReset, nil},
		{finWait1, 5, 0, 0, 1, EndingReset, nil},
		{closeWait, 5, 0, 0, 0, EndingReset, nil},
		{finWait2, 5, 0, 0, 1, EndingClosed, nil}, // to TIME_WAIT, which is another object
		{timeWait, 5, 0, 0, 0, EndingClosed, nil},
		{lastAck, 5, 0, 0, 1, EndingClosed, nil},
		{closing, 5, 0, 0, 0, EndingClosed, nil},
		{closed, 0, 0, 0, 0, EndingClosed, nil},
		{listen, 0, 0, 0, 0, EndingClosed, nil},
		{synRecv, 1, 0, 0, 0, EndingClosed, nil},
		{newSynRecv, 1, 0, 0, 0, EndingClosed, nil},
		{0, 0, 0, 0, 0, EndingClosed, nil},
		{newSynRecv + 1, 0, 0, 0, 0, EndingClosed, nil},
	} {
		for retransmits := range uint32(3) {
			io := coreRunEndingOf{In: coreEnd{State: tt.state, SegsIn: tt.segs, Unacked: tt.unacked, Expired: tt.expired, Released: tt.released}, Retransmits: retransmits}
			run(t, progs.PlEndingOf, &io)
			if int(io.Out) >= len(names) {
				t.Fatalf("ending_of(%+v): %d, which is no ending", io.In, io.Out)
			}
			all[names[io.Out]] = true
			if io.Out != uint32(tt.want) {
				t.Errorf("ending_of(%+v): %s, want %s", io.In, names[io.Out], names[tt.want])
			}
			var failure uint32
			if tt.failure != nil {
				failure = tt.failure[min(retransmits, 1)]
			}
			if io.Failure != failure {
				t.Errorf("%+v with %d retransmits: failure %d, want %d", io.In, retransmits, io.Failure, failure)
			}
		}
	}
	all.equal(t, "ending_of", "ENDING_")
}

// TestHolds goes through when a handshake waits for its dial.
func TestHolds(t *testing.T) {
	progs := loadCoreProgs(t)
	const early, mirror, adaptive = uint32(flow.ConnectEarly), uint32(flow.ConnectMirror), uint32(flow.ConnectAdaptive)
	for _, tt := range []struct {
		mode          uint32
		now, answered uint64
		want          uint32
	}{
		{early, 100, 0, 0},
		{early, 100, 200, 0},
		{mirror, 100, 0, 1},
		{mirror, 100, 200, 1},
		{adaptive, 100, 0, 1},   // nothing is known
		{adaptive, 100, 101, 0}, // it answered lately
		{adaptive, 100, 100, 1}, // that is over
		{adaptive, 100, 99, 1},
		{adaptive, 0, 1 << 63, 0},
		{adaptive + 1, 100, 0, 0}, // no mode
	} {
		io := coreRunHolds{Mode: tt.mode, Now: tt.now, Answered: tt.answered}
		run(t, progs.PlHolds, &io)
		if io.Out != tt.want {
			t.Errorf("holds(%v, now %d, answered until %d): %d, want %d", flow.ConnectMode(tt.mode), tt.now, tt.answered, io.Out, tt.want)
		}
	}
}

// TestPeerEnded goes through the ends of a socket: whether a FIN is among the bytes
// that the kernel counted.
func TestPeerEnded(t *testing.T) {
	progs := loadCoreProgs(t)
	// enum of the kernel's linux/bpf.h: BPF_TCP_*.
	const established, synSent, finWait1, finWait2, timeWait, closeWait, lastAck, closing = 1, 2, 4, 5, 6, 8, 9, 11
	for _, tt := range []struct {
		in   corePeerEnd
		want uint32
	}{
		{corePeerEnd{State: synSent}, 0},
		{corePeerEnd{State: established, Received: 9}, 0},
		{corePeerEnd{State: finWait1, Received: 9, Released: 1}, 0},
		{corePeerEnd{State: closeWait, Received: 9}, 1},
		{corePeerEnd{State: lastAck, Received: 9, Released: 1}, 1},
		{corePeerEnd{State: closing, Received: 9}, 1},
		{corePeerEnd{State: timeWait, Received: 9}, 1},
		// It has shut, and the peer then did.
		{corePeerEnd{State: finWait2, Received: 9, Half: 3}, 1},
		// It has shut, read, and closed before the peer did.
		{corePeerEnd{State: finWait2, Received: 9, Half: 3, Released: 1}, 0},
		// It has closed, and the peer's FIN came with the acknowledgement, or later.
		{corePeerEnd{State: finWait2, Received: 10, Half: 9, Released: 1, ClosedFirst: 1}, 1},
		{corePeerEnd{State: finWait2, Received: 9, Half: 9, Released: 1, ClosedFirst: 1}, 0},
	} {
		io := coreRunPeerEnded{In: tt.in}
		run(t, progs.PlPeerEnded, &io)
		if io.Out != tt.want {
			t.Errorf("%+v: %d, want %d", tt.in, io.Out, tt.want)
		}
	}
}
