package events

import (
	"context"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

var (
	epoch   = time.Unix(1_700_000_000, 0)
	app     = netip.MustParseAddrPort("192.0.2.7:40000")
	service = netip.MustParseAddrPort("10.96.0.12:80")
	backend = netip.MustParseAddrPort("10.1.0.9:8080")
)

// event is one that the kernel side could write: a connection of a second.
func event(cookie uint64, path flow.Path, ending uint8) bpf.ConnEvent {
	return bpf.ConnEvent{
		Cookie:       cookie,
		Cgroup:       7,
		Group:        8,
		Opened:       uint64(time.Minute),
		Ended:        uint64(time.Minute + time.Second),
		Sent:         102,
		Received:     50,
		Source:       bpf.FromAddr(app.Addr()),
		SourcePort:   app.Port(),
		Orig:         bpf.FromAddr(service.Addr()),
		OrigPort:     service.Port(),
		Endpoint:     bpf.FromAddr(backend.Addr()),
		EndpointPort: backend.Port(),
		Connect:      1500,
		SrttUs:       250,
		Retransmits:  3,
		Kind:         bpf.EventEnd,
		Path:         uint8(path),
		Reason:       uint8(flow.ReasonService),
		Ending:       ending,
	}
}

// kernelRecord is what the kernel side tells by e.
func kernelRecord(c clock, e bpf.ConnEvent) *flow.Record {
	r := &flow.Record{}
	c.record(&e, r)
	return r
}

// handled is what the handler tells of the same connection.
func handled(cookie uint64) flow.Record {
	return flow.Record{
		Cookie:      cookie,
		Cgroup:      7,
		Source:      app,
		OrigDst:     service,
		Service:     "web",
		Cluster:     "web",
		Endpoint:    netip.MustParseAddrPort("127.0.0.1:8081"),
		Path:        flow.PathRelay,
		Reason:      flow.ReasonService,
		End:         flow.ReasonClosed,
		Attempts:    2,
		Start:       epoch.Add(time.Hour),
		Duration:    900 * time.Millisecond,
		Connect:     2 * time.Millisecond,
		RTT:         time.Millisecond,
		Retransmits: 1,
		Sent:        100,
		Received:    50,
	}
}

// raw is e as it lies in the ring buffer.
func raw(e bpf.ConnEvent) []byte {
	return append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(&e)), unsafe.Sizeof(e))...)
}

// sink collects what it is given.
type sink struct {
	mu      sync.Mutex
	records []flow.Record
}

func (s *sink) Record(r *flow.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = append(s.records, *r)
}

func (s *sink) taken() []flow.Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.records
	s.records = nil
	return out
}

// fakeRing is a ring that tests fill.
type fakeRing struct {
	mu     sync.Mutex
	events [][]byte
	busy   bool // nothing can be read
	err    error
	closed int
}

func (f *fakeRing) put(events ...[]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, events...)
}

func (f *fakeRing) read(each func(raw []byte)) (all bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.busy {
		return false, f.err
	}
	for _, e := range f.events {
		each(e)
	}
	f.events = nil
	return true, f.err
}

func (f *fakeRing) wait(ctx context.Context, _ time.Duration) { pause(ctx, time.Millisecond) }

func (f *fakeRing) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed++
	return nil
}

// fakeKernel has the connections that tests give it.
type fakeKernel struct {
	open []flow.Record
	err  error
}

func (f *fakeKernel) Connections() ([]flow.Record, error) { return f.open, f.err }

// names is what a configuration of one service knows.
func names(orig netip.AddrPort) (string, string) {
	if orig == service {
		return "web", "web-cluster"
	}
	return "", ""
}

// fakeHandler is a handler that tests fill.
type fakeHandler struct {
	mu    sync.Mutex
	ended []flow.Record
	hangs bool // it does not say what it carries
}

func (f *fakeHandler) end(records ...flow.Record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = append(f.ended, records...)
}

func (f *fakeHandler) Ended(buf []flow.Record) []flow.Record {
	f.mu.Lock()
	defer f.mu.Unlock()
	buf = append(buf, f.ended...)
	f.ended = nil
	return buf
}

func (f *fakeHandler) Live(ctx context.Context) []flow.Record {
	if f.hangs {
		<-ctx.Done()
	}
	return []flow.Record{{Open: true}}
}

func (f *fakeHandler) Lost() uint64 { return 5 }
