package events

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// bench is a collector with everything around it.
type bench struct {
	*Collector
	ring    *fakeRing
	handler *fakeHandler
	sink    *sink
}

func newBench(o Options) *bench {
	b := &bench{ring: &fakeRing{}, handler: &fakeHandler{}, sink: &sink{}}
	o.Handler, o.Sinks = b.handler, []Sink{b.sink}
	b.Collector = newCollector(o, b.ring)
	b.clock = clock{offset: epoch.UnixNano()}
	b.now = func() time.Time { return epoch }
	return b
}

// waits lets polls pass that take so long together.
func (b *bench) waits(ctx context.Context, d time.Duration) {
	end := b.now().Add(d)
	for now := b.now(); now.Before(end); {
		now = now.Add(min(interval, end.Sub(now)))
		b.now = func() time.Time { return now }
		b.Flush(ctx)
	}
}

func cookies(records []flow.Record) []uint64 {
	var all []uint64
	for _, r := range records {
		all = append(all, r.Cookie)
	}
	return all
}

func TestCollect(t *testing.T) {
	t.Parallel()
	b := newBench(Options{})
	ctx := t.Context()
	denied := bpf.ConnEvent{
		Cookie: 2, Kind: bpf.EventDenied, Path: uint8(flow.PathDeny), Reason: uint8(flow.ReasonDenied),
		Orig: bpf.FromAddr(service.Addr()), OrigPort: service.Port(), Opened: 9, Ended: 9,
	}
	b.ring.put(
		raw(event(1, flow.PathPass, bpf.EndingReset)),
		raw(denied),
		[]byte("short"),
		raw(event(3, 99, bpf.EndingClosed)),
		raw(event(4, flow.PathRelay, bpf.EndingClosed)),
		raw(event(5, flow.PathRelay, bpf.EndingReset)),
	)
	b.handler.end(handled(4))
	b.Flush(ctx)

	got := b.sink.taken()
	if diff := cmp.Diff([]uint64{1, 2, 4}, cookies(got)); diff != "" {
		t.Fatal(diff)
	}
	if r := got[1]; r.Path != flow.PathDeny || r.End != flow.ReasonDenied || r.Duration != 0 || r.OrigDst != service {
		t.Errorf("denied: %+v", r)
	}
	if r := got[2]; r.Service != "web" || r.Duration != time.Second || !r.Start.Equal(epoch.Add(time.Minute)) {
		t.Errorf("joined: %+v", r)
	}

	b.waits(ctx, patience-1)
	if got := b.sink.taken(); len(got) != 0 {
		t.Errorf("before its time: %+v", got)
	}
	b.waits(ctx, 1)
	got = b.sink.taken()
	if len(got) != 1 || got[0].Cookie != 5 || got[0].End != flow.ReasonHandlerLost {
		t.Errorf("alone: %+v", got)
	}
	if diff := cmp.Diff(Losses{Unreadable: 2, Unmatched: 1, Handler: 5}, b.Losses()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]uint64{1, 2, 4, 5}, cookies(b.History())); diff != "" {
		t.Error(diff)
	}
	if live, err := b.Live(ctx); err != nil || len(live) != 1 || !live[0].Open {
		t.Errorf("live: %+v", live)
	}
}

func TestHistoryKeepsTheLast(t *testing.T) {
	t.Parallel()
	b := newBench(Options{History: 3})
	for cookie := range uint64(8) {
		b.ring.put(raw(event(cookie+1, flow.PathPass, bpf.EndingClosed)))
		b.Flush(t.Context())
		want := []uint64{cookie - 1, cookie, cookie + 1}[max(0, 2-int(cookie)):]
		if diff := cmp.Diff(want, cookies(b.History())); diff != "" {
			t.Fatal(diff)
		}
	}
	// It is a copy.
	b.History()[0].Cookie = 99
	if got := b.History()[0].Cookie; got != 6 {
		t.Errorf("oldest is %d", got)
	}
}

func TestRunGivesOutEverything(t *testing.T) {
	b := newBench(Options{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()

	b.ring.put(raw(event(1, flow.PathPass, bpf.EndingClosed)))
	testutil.Eventually(t, 10*time.Second, func() bool { return len(b.History()) == 1 })
	b.ring.put(raw(event(2, flow.PathRelay, bpf.EndingClosed)))
	b.handler.end(handled(3))
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]uint64{1, 2, 3}, cookies(b.History())); diff != "" {
		t.Error(diff)
	}
	if b.ring.closed != 1 {
		t.Errorf("ring closed %d times", b.ring.closed)
	}
	b.ring.put(raw(event(4, flow.PathPass, bpf.EndingClosed)))
	b.Flush(t.Context())
	if err := b.Close(); err != nil || len(b.History()) != 3 || b.ring.closed != 1 {
		t.Errorf("after its end: %v, %d records, closed %d times", err, len(b.History()), b.ring.closed)
	}
}

func TestRunReportsErrors(t *testing.T) {
	b := newBench(Options{})
	b.ring.err = errors.New("broken")
	b.handler.end(handled(1))
	if err := b.Run(t.Context()); !errors.Is(err, b.ring.err) {
		t.Errorf("error %v", err)
	}
	if len(b.History()) != 1 || b.ring.closed != 1 {
		t.Errorf("%d records, closed %d times", len(b.History()), b.ring.closed)
	}
}

func TestFlushBesideRun(t *testing.T) {
	const flushers, each = 4, 200
	b := newBench(Options{History: flushers * each})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	var all sync.WaitGroup
	for f := range flushers {
		all.Go(func() {
			for i := range each {
				cookie := uint64(f*each + i + 1)
				b.ring.put(raw(event(cookie, flow.PathRelay, bpf.EndingClosed)))
				b.handler.end(handled(cookie))
				b.Flush(ctx)
				b.Losses()
			}
		})
	}
	all.Wait()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := len(b.sink.taken()); n != flushers*each {
		t.Errorf("%d records, want %d", n, flushers*each)
	}
}

func TestWithoutSources(t *testing.T) {
	c, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Run(ctx); err != nil {
		t.Error(err)
	}
	if live, err := c.Live(ctx); live != nil || err != nil || len(c.History()) != 0 || c.Losses() != (Losses{}) {
		t.Error("something came from nowhere")
	}
	if _, err := New(Options{History: -1}); err == nil {
		t.Error("a negative history is accepted")
	}
}

// The handler's own connections are no application's: nobody is told of them.
func TestOwnConnections(t *testing.T) {
	t.Parallel()
	b := newBench(Options{})
	own := event(1, flow.PathPass, bpf.EndingReset)
	own.Reason = uint8(flow.ReasonSelf)
	b.ring.put(raw(own), raw(event(2, flow.PathPass, bpf.EndingClosed)))
	b.Flush(t.Context())
	if diff := cmp.Diff([]uint64{2}, cookies(b.sink.taken())); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]uint64{2}, cookies(b.History())); diff != "" {
		t.Error(diff)
	}
}

// Records that no handler made are named by the configuration, those of a handler
// by itself.
func TestNames(t *testing.T) {
	t.Parallel()
	b := newBench(Options{Names: names})
	fallback := event(1, flow.PathDirect, bpf.EndingClosed)
	fallback.Reason = uint8(flow.ReasonHandlerAbsent)
	other := event(2, flow.PathPass, bpf.EndingClosed)
	other.OrigPort++
	denied := bpf.ConnEvent{
		Cookie: 3, Kind: bpf.EventDenied, Path: uint8(flow.PathDeny), Reason: uint8(flow.ReasonNoEndpoint),
		Orig: bpf.FromAddr(service.Addr()), OrigPort: service.Port(),
	}
	b.ring.put(raw(fallback), raw(other), raw(denied), raw(event(4, flow.PathRelay, bpf.EndingClosed)),
		raw(event(5, flow.PathRelay, bpf.EndingClosed)))
	carried := handled(4)
	carried.Service, carried.Cluster = "shop", "shop"
	b.handler.end(carried)
	b.Flush(t.Context())
	b.waits(t.Context(), patience) // the handler does not speak of 5

	type named struct{ Service, Cluster string }
	got := map[uint64]named{}
	for _, r := range b.sink.taken() {
		got[r.Cookie] = named{r.Service, r.Cluster}
		if r.Cookie == 1 && (r.Path != flow.PathDirect || r.Reason != flow.ReasonHandlerAbsent || r.Endpoint != backend) {
			t.Errorf("fallback: %+v", r)
		}
	}
	web := named{"web", "web-cluster"}
	if diff := cmp.Diff(map[uint64]named{1: web, 2: {}, 3: web, 4: {"shop", "shop"}, 5: web}, got); diff != "" {
		t.Error(diff)
	}
}

// What is open on a kernel path is listed beside what the handler carries, and
// that only once.
func TestLive(t *testing.T) {
	t.Parallel()
	k := &fakeKernel{open: []flow.Record{
		{Cookie: 1, Path: flow.PathDirect, OrigDst: service, Endpoint: backend, Open: true},
		{Cookie: 2, Path: flow.PathRelay, OrigDst: service, Open: true},
		{Cookie: 3, Path: flow.PathPass, Reason: flow.ReasonExcluded, OrigDst: backend, Endpoint: backend, Open: true},
		{Cookie: 4, Path: flow.PathPass, Reason: flow.ReasonSelf, Open: true},
	}}
	b := newBench(Options{Kernel: k, Names: names})
	live, err := b.Live(t.Context())
	if diff := cmp.Diff([]uint64{0, 1, 3}, cookies(live)); err != nil || diff != "" {
		t.Fatalf("%v\n%s", err, diff)
	}
	if live[1].Service != "web" || live[1].Cluster != "web-cluster" || live[2].Service != "" {
		t.Errorf("named %+v", live)
	}
	if live[1].Endpoint != backend || live[1].Attempts != 1 || live[2].Endpoint.IsValid() {
		t.Errorf("endpoints %+v", live)
	}
	k.err = errors.New("no such map")
	live, err = b.Live(t.Context())
	if !errors.Is(err, k.err) || len(live) != 1 {
		t.Errorf("%v, %+v", err, live)
	}
}

func TestEventAllocatesNothing(t *testing.T) {
	c := newCollector(Options{Names: names, History: 1}, &fakeRing{})
	e := raw(event(1, flow.PathDirect, bpf.EndingClosed))
	c.event(e)
	if n := testing.AllocsPerRun(100, func() { c.event(e) }); n != 0 {
		t.Errorf("%v allocations per event", n)
	}
}
