package discover

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

var equal = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

func set(addrs ...string) []Endpoint {
	var all []Endpoint
	for _, a := range addrs {
		all = append(all, Endpoint{Addr: netip.MustParseAddrPort(a), Weight: 1})
	}
	return all
}

func TestTeller(t *testing.T) {
	broken := errors.New("broken")
	one, two := "192.0.2.1:80", "192.0.2.2:80"
	for _, tt := range []struct {
		name string
		do   func(ctx context.Context, t *Teller)
		want []Snapshot
	}{
		{"what changes is told, and nothing else", func(ctx context.Context, t *Teller) {
			t.Set(ctx, set(two, one))
			t.Set(ctx, set(one, two))
			t.Set(ctx, set(one))
		}, []Snapshot{{Endpoints: set(one, two)}, {Endpoints: set(one)}}},
		{"nobody is told first and last", func(ctx context.Context, t *Teller) {
			t.Set(ctx, nil)
			t.Set(ctx, nil)
			t.Set(ctx, set(one))
			t.Set(ctx, nil)
		}, []Snapshot{{}, {Endpoints: set(one)}, {}}},
		{"an old set ends an error", func(ctx context.Context, t *Teller) {
			t.Fail(ctx, broken)
			t.Set(ctx, set(one))
			t.Fail(ctx, broken)
			t.Fail(ctx, broken)
			t.Set(ctx, set(one))
		}, []Snapshot{{Err: broken}, {Endpoints: set(one)}, {Err: broken}, {Err: broken}, {Endpoints: set(one)}}},
		{"a part", func(ctx context.Context, t *Teller) {
			t.Part(ctx, set(one), 0, broken)
			t.Part(ctx, set(one), 0, broken)
			t.Part(ctx, set(two), 0, broken)
			t.Set(ctx, set(two))
		}, []Snapshot{
			{Endpoints: set(one)}, {Err: broken}, {Err: broken},
			{Endpoints: set(two)}, {Err: broken}, {Endpoints: set(two)},
		}},
		{"what a set lacks, until it lacks nothing", func(ctx context.Context, t *Teller) {
			t.Part(ctx, set(one), LackIPv4|LackIPv6, broken)
			t.Part(ctx, set(one), LackIPv4|LackIPv6, broken)
			t.Part(ctx, set(one), LackIPv6, broken)
			t.Set(ctx, set(one))
			t.Part(ctx, set(one), LackIPv4, broken)
			t.Part(ctx, set(two), LackIPv4, broken)
		}, []Snapshot{
			{Endpoints: set(one), Lacks: LackIPv4 | LackIPv6}, {Err: broken}, {Err: broken},
			{Endpoints: set(one), Lacks: LackIPv6}, {Err: broken}, {Endpoints: set(one)},
			{Err: broken}, {Endpoints: set(two)}, {Err: broken},
		}},
		{"a part of nothing", func(ctx context.Context, t *Teller) {
			t.Part(ctx, nil, 0, broken)
		}, []Snapshot{{}, {Err: broken}}},
	} {
		out := make(chan Snapshot, 10)
		tt.do(t.Context(), NewTeller(out))
		close(out)
		var got []Snapshot
		for s := range out {
			got = append(got, s)
		}
		same := cmp.Comparer(func(a, b error) bool { return a == b })
		if diff := cmp.Diff(tt.want, got, equal, same); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
		}
	}
}

// Who does not listen any more does not hold a source up.
func TestTellerEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	NewTeller(make(chan Snapshot)).Set(ctx, set("192.0.2.1:80"))
}

func TestCheckAddr(t *testing.T) {
	for _, tt := range []struct {
		addr string
		good bool
	}{
		{"192.0.2.1", true},
		{"127.0.0.1", true},
		{"::1", true},
		{"fe80::1%eth0", true},
		{"fe80::1", false},
		{"0.0.0.0", false},
		{"::", false},
		{"::ffff:0.0.0.0", false},
		{"240.0.0.1", false},
		{"::ffff:240.63.255.255", false},
		{"240.64.0.1", true},
		{"fd70:696c:6c69::1", false},
		{"fd70:696c:6c69::1%eth0", false},
		{"224.0.0.1", false},
		{"255.255.255.255", false},
		{"ff02::1", false},
	} {
		if err := CheckAddr(netip.MustParseAddr(tt.addr)); (err == nil) != tt.good {
			t.Errorf("%s: %v", tt.addr, err)
		}
	}
	if CheckAddr(netip.Addr{}) == nil {
		t.Error("no address is one")
	}
}
