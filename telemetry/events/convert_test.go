package events

import (
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

var comparable = cmpopts.EquateComparable(netip.AddrPort{})

func TestRecordOfKernel(t *testing.T) {
	t.Parallel()
	c := clock{offset: epoch.UnixNano()}
	e := event(1, flow.PathDirect, bpf.EndingClosed)
	want := flow.Record{
		Cookie:      1,
		Cgroup:      7,
		Source:      app,
		OrigDst:     service,
		Endpoint:    backend,
		Attempts:    1,
		Connect:     1500,
		Path:        flow.PathDirect,
		Reason:      flow.ReasonService,
		End:         flow.ReasonClosed,
		Start:       epoch.Add(time.Minute),
		Duration:    time.Second,
		RTT:         250 * time.Microsecond,
		Retransmits: 3,
		Sent:        100,
		Received:    50,
	}
	if diff := cmp.Diff(want, *kernelRecord(c, e), comparable); diff != "" {
		t.Error(diff)
	}

	// On pass nothing is picked: what was dialed is only told if somebody else
	// rewrote it.
	e.Path = uint8(flow.PathPass)
	want.Path, want.Attempts = flow.PathPass, 0
	if diff := cmp.Diff(want, *kernelRecord(c, e), comparable); diff != "" {
		t.Error(diff)
	}
	e.Endpoint, e.EndpointPort = e.Orig, e.OrigPort
	want.Endpoint = netip.AddrPort{}
	if diff := cmp.Diff(want, *kernelRecord(c, e), comparable); diff != "" {
		t.Error(diff)
	}
	// A handler's is the handler's to tell.
	e.Path = uint8(flow.PathRelay)
	want.Path, want.Connect, want.End = flow.PathRelay, 0, flow.ReasonHandlerLost
	if diff := cmp.Diff(want, *kernelRecord(c, e), comparable); diff != "" {
		t.Error(diff)
	}

	// What an earlier record had does not stay.
	e = bpf.ConnEvent{Kind: bpf.EventEnd, Path: uint8(flow.PathDirect), Connect: math.MaxUint64}
	r := kernelRecord(c, event(1, flow.PathDirect, bpf.EndingClosed))
	c.record(&e, r)
	if r.Endpoint.IsValid() || r.Source.Addr().IsValid() || r.Cookie != 0 || r.Connect != math.MaxInt64 {
		t.Errorf("%+v", r)
	}
}

func TestEnd(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		path   flow.Path
		ending uint8
		want   flow.Reason
	}{
		{flow.PathPass, bpf.EndingClosed, flow.ReasonClosed},
		{flow.PathPass, bpf.EndingReset, flow.ReasonReset},
		{flow.PathDirect, bpf.EndingRefused, flow.ReasonDialRefused},
		{flow.PathDirect, bpf.EndingTimeout, flow.ReasonDialTimeout},
		{flow.PathDirect, bpf.EndingUnreachable, flow.ReasonDialUnreachable},
		{flow.PathDirect, bpf.EndingAbandoned, flow.ReasonAbandoned},
		{flow.PathPass, bpf.EndingRefused, flow.ReasonDialRefused},
		{flow.PathPass, bpf.EndingAbandoned, flow.ReasonAbandoned},
		{flow.PathRelay, bpf.EndingUnreachable, flow.ReasonDialUnreachable},
		{flow.PathRelay, bpf.EndingAbandoned, flow.ReasonAbandoned},
		{flow.PathRelay, bpf.EndingRefused, flow.ReasonRefused},
		{flow.PathRelay, bpf.EndingTimeout, flow.ReasonTimeout},
		{flow.PathRelay, bpf.EndingClosed, flow.ReasonHandlerLost},
		{flow.PathRelay, bpf.EndingReset, flow.ReasonHandlerLost},
	} {
		e := event(1, tt.path, tt.ending)
		if got := endOf(&e); got != tt.want {
			t.Errorf("%s, ending %d: %s, want %s", tt.path, tt.ending, got, tt.want)
		}
	}
	denied := bpf.ConnEvent{Kind: bpf.EventDenied, Path: uint8(flow.PathDeny), Reason: uint8(flow.ReasonDenied)}
	if got := endOf(&denied); got != flow.ReasonDenied {
		t.Errorf("denied: %s", got)
	}
}

// The kernel's byte counters hold sequence numbers; see payload.
func TestPayload(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		ending                 uint8
		sent, received         uint64
		wantSent, wantReceived uint64
	}{
		{bpf.EndingClosed, 102, 50, 100, 50},
		{bpf.EndingClosed, 1, 0, 0, 0},
		{bpf.EndingReset, 101, 50, 100, 50},
		{bpf.EndingReset, 0, 0, 0, 0},
		{bpf.EndingRefused, 0, 0, 0, 0},
		{bpf.EndingTimeout, 0, 0, 0, 0},
		{bpf.EndingUnreachable, 0, 0, 0, 0},
		{bpf.EndingAbandoned, 0, 0, 0, 0},
	} {
		e := bpf.ConnEvent{Ending: tt.ending, Sent: tt.sent, Received: tt.received}
		sent, received := payload(&e)
		if sent != tt.wantSent || received != tt.wantReceived {
			t.Errorf("ending %d: %d, %d of %d, %d", tt.ending, sent, received, tt.sent, tt.received)
		}
	}
}

func TestMerge(t *testing.T) {
	t.Parallel()
	e := event(1, flow.PathRelay, bpf.EndingClosed)
	kernel := *kernelRecord(clock{offset: epoch.UnixNano()}, e)
	handler := handled(1)
	want := handler
	want.Start, want.Duration = epoch.Add(time.Minute), time.Second

	got := merge(&handler, &kernel)
	if diff := cmp.Diff(want, got, comparable); diff != "" {
		t.Error(diff)
	}

	// What the handler does not know comes from the kernel side.
	handler.Cgroup, handler.Source, handler.OrigDst, handler.Reason = 0, netip.AddrPort{}, netip.AddrPort{}, 0
	got = merge(&handler, &kernel)
	if diff := cmp.Diff(want, got, comparable); diff != "" {
		t.Error(diff)
	}
}

func TestReadable(t *testing.T) {
	t.Parallel()
	good := event(1, flow.PathPass, bpf.EndingAbandoned)
	if !readable(&good) {
		t.Error("a good event is not readable")
	}
	denied := bpf.ConnEvent{Kind: bpf.EventDenied, Path: uint8(flow.PathDeny), Reason: uint8(flow.ReasonSlotAddress)}
	if !readable(&denied) {
		t.Error("a denied event is not readable")
	}
	for name, change := range map[string]func(*bpf.ConnEvent){
		"kind":         func(e *bpf.ConnEvent) { e.Kind = 9 },
		"path":         func(e *bpf.ConnEvent) { e.Path = uint8(flow.PathNone) },
		"path unknown": func(e *bpf.ConnEvent) { e.Path = 99 },
		"reason":       func(e *bpf.ConnEvent) { e.Reason = uint8(flow.ReasonClosed) },
		"ending":       func(e *bpf.ConnEvent) { e.Ending = bpf.EndingAbandoned + 1 },
		"denied path":  func(e *bpf.ConnEvent) { e.Kind = bpf.EventDenied },
	} {
		e := good
		change(&e)
		if readable(&e) {
			t.Errorf("%s: readable", name)
		}
	}
}

func TestClock(t *testing.T) {
	t.Parallel()
	c, err := newClock()
	if err != nil {
		t.Fatal(err)
	}
	if off := time.Until(c.wall(0)); off > 0 {
		t.Errorf("the boot is %s ahead", off)
	}
	for _, tt := range []struct {
		from, to uint64
		want     time.Duration
	}{
		{1, 3, 2},
		{3, 1, 0},
		{0, math.MaxUint64, math.MaxInt64},
	} {
		if got := between(tt.from, tt.to); got != tt.want {
			t.Errorf("between(%d, %d) = %d", tt.from, tt.to, got)
		}
	}
}
