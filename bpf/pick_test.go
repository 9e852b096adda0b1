package bpf

import (
	"math"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/balance"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestWords compares the hash and the words of a pick with those of package flow.
func TestWords(t *testing.T) {
	progs := loadCoreProgs(t)
	for _, addr := range []string{"0.0.0.0", "10.96.0.12", "255.255.255.255", "::", "2001:db8::1", "::ffff:10.96.0.12"} {
		for i, port := range []uint16{0, 80, 65535} {
			a := netip.MustParseAddr(addr)
			seed := flow.Hash(a, port)
			io := coreRunWords{Addr: coreIpAddr(FromAddr(a)), Port: uint32(port), Seed: seed, N: uint32(1000 * i), Share: []uint32{0, 1 << 31, flow.All}[i]}
			run(t, progs.PlWords, &io)
			words := flow.Words(seed)
			want := io
			want.Hash, want.Word = seed, words.Next()
			want.Below = uint32(uint64(words.Next()) * uint64(io.N) >> 32)
			want.Chance = 0
			if io.Share == flow.All || words.Next() < io.Share {
				want.Chance = 1
			}
			if io != want {
				t.Errorf("%s, port %d: %+v, want %+v", addr, port, io, want)
			}
		}
	}
	// Who has no address has the unspecified one of IPv6.
	io := coreRunWords{}
	run(t, progs.PlWords, &io)
	if want := flow.Hash(netip.IPv6Unspecified(), 0); io.Hash != want {
		t.Errorf("no address: %d, want %d", io.Hash, want)
	}
}

// TestWaits: the waits of an ejection double up to the longest, less a quarter at
// most, at random.
func TestWaits(t *testing.T) {
	progs := loadCoreProgs(t)
	ms := uint64(time.Millisecond)
	for _, tt := range []struct {
		base, max, round uint32
		random, want     uint64
	}{
		{1000, 30000, 1, 0, 1000 * ms},
		{1000, 30000, 2, 0, 2000 * ms},
		{1000, 30000, 5, 0, 16000 * ms},
		{1000, 30000, 6, 0, 30000 * ms},
		{1000, 30000, 1 << 31, 0, 30000 * ms},
		{1000, 30000, math.MaxUint32, 0, 30000 * ms},
		{1, math.MaxUint32, 32, 0, (1 << 31) * ms},
		{1, math.MaxUint32, 33, 0, math.MaxUint32 * ms},
		{math.MaxUint32, math.MaxUint32, 33, 0, math.MaxUint32 * ms},
		{1000, 1000, 9, 0, 1000 * ms},
		{1000, 30000, 1, 1, 1000*ms - 1},
		{1000, 30000, 1, 250 * ms, 750 * ms},
		{1000, 30000, 1, 250*ms + 1, 1000 * ms},
		{1000, 30000, 9, math.MaxUint64, 30000*ms - math.MaxUint64%(7500*ms+1)},
	} {
		io := coreRunHealth{Base: tt.base, Max: tt.max, Round: tt.round, Random: tt.random}
		run(t, progs.PlHealth, &io)
		if io.Wait != tt.want {
			t.Errorf("round %d of %d to %d ms, random %d: %d, want %d", tt.round, tt.base, tt.max, tt.random, io.Wait, tt.want)
		}
	}
}

// TestEjectedAndPanics has the cases of package health.
func TestEjectedAndPanics(t *testing.T) {
	progs := loadCoreProgs(t)
	for _, tt := range []struct {
		until, now      uint64
		percent         uint32
		up, well        uint64
		ejected, panics uint32
	}{
		{0, 5, 50, 0, 0, 0, 0},
		{5, 5, 50, 1, 1, 0, 0}, // on trial
		{6, 5, 50, 1, 0, 1, 1},
		{math.MaxUint64, 5, 50, 2, 1, 1, 0},
		{0, 0, 50, 2, 0, 0, 1},
		{0, 0, 50, 3, 2, 0, 0},
		{0, 0, 50, 3, 1, 0, 1},
		{0, 0, 0, 2, 0, 0, 0},
		{0, 0, 1, 3, 1, 0, 0},
		{0, 0, 1, 3, 0, 0, 1},
		{0, 0, 100, 100, 100, 0, 0},
		{0, 0, 100, 100, 99, 0, 1},
		{0, 0, 50, 16384, 8192, 0, 0},
	} {
		io := coreRunHealth{Until: tt.until, Now: tt.now, Percent: tt.percent, Up: tt.up, Well: tt.well}
		run(t, progs.PlHealth, &io)
		if io.Ejected != tt.ejected || io.Panics != tt.panics {
			t.Errorf("%+v: ejected %d, panics %d", tt, io.Ejected, io.Panics)
		}
	}
}

func TestIsLess(t *testing.T) {
	progs := loadCoreProgs(t)
	for _, tt := range []struct {
		live, weight, other, otherWeight uint32
		want                             uint32
	}{
		{0, 1, 0, 1, 0}, // equal: not less
		{0, 1, 1, 1, 1},
		{1, 1, 0, 1, 0},
		{1, 2, 1, 1, 1},
		{2, 2, 1, 1, 0},
		{0, 1, 0, 65535, 0},
		{math.MaxInt32, 65535, math.MaxInt32, 65534, 1},
		{math.MaxUint32, 1, 1, 1, 1}, // below 0 is 0
		{0, 1, math.MaxUint32, 1, 0},
		{1, 1, math.MaxUint32, 1, 0},
	} {
		io := coreRunIsLess{Live: tt.live, Weight: tt.weight, OtherLive: tt.other, OtherWeight: tt.otherWeight}
		run(t, progs.PlIsLess, &io)
		if io.Out != tt.want {
			t.Errorf("%+v: %d", tt, io.Out)
		}
	}
}

// twin answers as the maps do.
type twin struct {
	set    *flow.Set
	states []Endpoint
	now    uint64
}

func (w *twin) ejected(i int) bool { return w.states[i].Until > w.now }

func (w *twin) Available(i int) bool {
	up, well := 0, 0
	for j := range w.states {
		if w.states[j].Down == 0 {
			up++
			if !w.ejected(j) {
				well++
			}
		}
	}
	return w.states[i].Down == 0 && (w.set.Failures == 0 || !w.ejected(i) || well*100 < w.set.Panic*up)
}

func (w *twin) Live(i int) int64 { return int64(w.states[i].Live) }

// write publishes a set as the loader does.
func (h *hooks) write(t *testing.T, id, firstID uint32, s *flow.Set, turns [2]uint32) *ebpf.Map {
	t.Helper()
	var members []endpointOf
	for _, e := range s.Endpoints {
		members = append(members, endpointOf{e.Addr.String(), e.Weight})
	}
	inner := h.publish(t, id, SetConfig{
		Spill: s.Spill, Base: uint32(s.Base.Milliseconds()), Max: uint32(s.Max.Milliseconds()), Failures: uint16(s.Failures),
		Policy: uint8(s.Policy), Hash: uint8(s.Hash), Panic: uint8(s.Panic),
	}, s.Tiers[0].Count, firstID, members, s.Tiers[0].Table, s.Tiers[1].Table)
	for i, e := range s.Endpoints {
		row := SetEndpoint{
			Addr: abiIpAddr(FromAddr(e.Addr.Addr())), Port: e.Addr.Port(), Weight: e.Weight,
			Id: firstID + uint32(i), Cut: e.Cut, Alias: e.Alias,
		}
		if err := inner.Put(uint32(SetHead+i), asRow(row)); err != nil {
			t.Fatal(err)
		}
	}
	if err := inner.Put(uint32(2), asRow(SetState{Turn: turns})); err != nil {
		t.Fatal(err)
	}
	return inner
}

// TestPickIsTheHandlers compares picks with those of package balance: over the
// same set, health, load and seed they are the same.
func TestPickIsTheHandlers(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	h.put(t, "beat", uint32(0), Beat{}) // no probing of a handler
	service := netip.MustParseAddrPort("10.96.0.12:80")
	h.service(t, service.String(), Service{Id: 7, Path: uint8(PathDirect)})
	random := rand.New(rand.NewPCG(1, 2))
	const far = math.MaxUint64 >> 1
	picked := map[int]int{}
	for round := range 100 {
		policy := flow.Policies()[round%4]
		n := 1 + random.IntN(40)
		var list []balance.Endpoint
		for i := range n {
			e := balance.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 80), Weight: 1 + random.Uint32N(9)}
			if random.IntN(3) == 0 {
				e.Zone = "here"
			}
			list = append(list, e)
		}
		s, _ := balance.Arrange(policy, "here", list)
		s.Failures, s.Panic = random.IntN(3), []int{0, 50, 100}[random.IntN(3)]
		s.Base, s.Max = time.Second, time.Minute
		s.Hash = flow.HashOns()[random.IntN(2)]
		s.Spill = []uint32{0, 1 << 31, flow.All}[random.IntN(3)]
		states := make([]Endpoint, len(s.Endpoints))
		ill := random.IntN(4) // of three
		for i := range states {
			states[i].Live = random.Uint32N(5)
			if random.IntN(3) < ill {
				states[i].Until = far
			}
			if random.IntN(6) < ill {
				states[i].Down = 1
			}
			h.put(t, "endpoints", uint32(100+i), states[i])
		}
		turns := [2]uint32{random.Uint32(), random.Uint32()}
		h.write(t, 7, 100, &s, turns)
		for range 20 {
			seed := 1 + random.Uint32N(math.MaxUint32)
			source := netip.AddrFrom4([4]byte{127, 0, 0, byte(random.IntN(256))})
			h.put(t, "own_addrs", FromAddr(source), uint32(1))
			q := DryRun{Dst: abiIpAddr(FromAddr(service.Addr())), Port: service.Port(), Bound: abiIpAddr(FromAddr(source)), Seed: seed}
			got := h.ask(t, q)
			if policy == flow.PolicyMaglev {
				seed = flow.Hash(source, 0)
				if s.Hash == flow.HashDestination {
					seed = flow.Hash(service.Addr(), service.Port())
				}
			}
			var now balance.Turns
			now[0].Store(turns[0])
			now[1].Store(turns[1])
			want := balance.Pick(&s, s.Spill, &now, &twin{&s, states, 1}, seed)
			picked[bits.Len(uint(want+1))]++
			switch {
			case want < 0:
				if got.Path != uint8(flow.PathDeny) || got.Reason != uint8(flow.ReasonNoEndpoint) || ToAddr(got.Endpoint).IsValid() {
					t.Fatalf("round %d: %+v, want no endpoint", round, got)
				}
			case got.Path != uint8(flow.PathDirect) || int(got.Index) != want || ToAddr(got.Endpoint) != s.Endpoints[want].Addr.Addr() ||
				got.EndpointPort != 80 || int(got.Id) != 100+want || int(got.Tier) != b2i(want >= s.Tiers[0].Count):
				t.Fatalf("round %d, %v of %d and %d: picks %+v, want %d", round, policy, s.Tiers[0].Count, s.Tiers[1].Count, got, want)
			}
		}
	}
	if picked[0] == 0 || picked[3] == 0 || picked[5] == 0 {
		t.Errorf("the cases are not wide: %v", picked)
	}
	if n := len(h.counts(t, "reasons")); n != 0 {
		t.Errorf("dry runs have counted: %v", h.reasons(t))
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}
