package metrics

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
)

// without drops the lines that start with one of the prefixes.
func without(lines []string, prefixes ...string) []string {
	return slices.DeleteFunc(slices.Clone(lines), func(line string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(line, p) })
	})
}

func only(lines []string, prefix string) []string {
	return slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return !strings.HasPrefix(line, prefix) })
}

func TestScrape(t *testing.T) {
	t.Parallel()
	lines := get(t, New(full().all()))
	want := []string{
		`pillion_build_info{version="1.2"} 1`,
		`pillion_config_generation 3`,
		`pillion_config_last_reload_successful 0`,
		`pillion_config_last_reload_timestamp_seconds 1.7000000005e+09`,
		`pillion_config_refused{service="shop"} 1`,
		`pillion_config_reload_failures_total 1`,
		`pillion_config_reloads_total 4`,
		`pillion_connects_total 10`,
		`pillion_decisions_stored_total 8`,
		`pillion_decisions_total 9`,
		`pillion_denials_total 2`,
		`pillion_discovery_age_seconds{service="web",source="dns"} 2`,
		`pillion_discovery_endpoints{service="web",source="dns"} 8`,
		`pillion_discovery_errors_total{service="web",source="dns"} 7`,
		`pillion_discovery_stale{service="web",source="dns"} 1`,
		`pillion_discovery_changes_total{service="web",source="dns"} 6`,
		`pillion_endpoint_connect_seconds{cluster="web",endpoint="127.0.0.1:8081"} 0.001`,
		`pillion_endpoint_connections{cluster="web",endpoint="127.0.0.1:8081"} 3`,
		`pillion_endpoint_connects_total{cluster="web",endpoint="127.0.0.1:8081"} 4`,
		`pillion_endpoint_down{cluster="web",endpoint="127.0.0.1:8081"} 1`,
		`pillion_endpoint_ejected{cluster="web",endpoint="127.0.0.1:8081"} 1`,
		`pillion_endpoint_ejections_total{cluster="web",endpoint="127.0.0.1:8081"} 6`,
		`pillion_endpoint_failures_total{cluster="web",endpoint="127.0.0.1:8081"} 5`,
		`pillion_endpoint_info{cluster="web",endpoint="127.0.0.1:8081",path="direct",zone="a"} 1`,
		`pillion_endpoint_left_out{cluster="web",endpoint="127.0.0.1:8081"} 1`,
		`pillion_endpoint_removed_connections_total 8`,
		`pillion_endpoint_weight{cluster="web",endpoint="127.0.0.1:8081"} 2`,
		`pillion_escapes_total 3`,
		`pillion_health_check_endpoints{cluster="web",state="down"} 1`,
		`pillion_health_check_endpoints{cluster="web",state="unknown"} 2`,
		`pillion_health_check_endpoints{cluster="web",state="up"} 20`,
		`pillion_health_check_failing_endpoints{cluster="web"} 3`,
		`pillion_heartbeat_age_seconds 1.5`,
		`pillion_kernel_readable 1`,
		`pillion_live_connections 6`,
		`pillion_reconcile_corrections_total 6`,
		`pillion_records_lost_total{where="flowlog"} 13`,
		`pillion_records_lost_total{where="handler"} 12`,
		`pillion_records_lost_total{where="ring"} 4`,
		`pillion_relay_accept_pauses_total 9`,
		`pillion_relay_accepted_total 1`,
		`pillion_relay_connections 3`,
		`pillion_relay_dial_failures_total 5`,
		`pillion_relay_dials_total 4`,
		`pillion_relay_ended_total 2`,
		`pillion_relay_pipes 11`,
		`pillion_relay_refused_total 12`,
		`pillion_relay_not_injected_total 13`,
		`pillion_relay_retries_total 6`,
		`pillion_relay_unknown_total 7`,
		`pillion_set_endpoints 3`,
		`pillion_set_publish_failures_total 5`,
		`pillion_set_publish_seconds 0.009`,
		`pillion_set_publishes_total 4`,
		`pillion_sets 2`,
		`pillion_slots_limit 65000`,
		`pillion_slots{state="free"} 100`,
		`pillion_slots{state="named"} 7`,
		`pillion_unaccounted_connections -1`,
		`pillion_unsent_total 1`,
	}
	got := without(lines, "pillion_reasons_total")
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}

	// Every reason has its line, and none stands for nothing.
	reasons := only(lines, "pillion_reasons_total")
	if len(reasons) != int(flow.KernelReasons)-1 || !slices.Contains(reasons, `pillion_reasons_total{reason="service"} 5`) {
		t.Errorf("reasons: %q", reasons)
	}
}

func TestRecord(t *testing.T) {
	t.Parallel()
	m := New(Sources{})
	m.Record(&flow.Record{
		Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.ReasonClosed,
		Sent: 100, Received: 50, Duration: 2 * time.Second, Connect: 3 * time.Millisecond,
	})
	m.Record(&flow.Record{Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.ReasonClosed, Sent: 1})
	m.Record(&flow.Record{Path: flow.PathDeny, Reason: flow.ReasonDenied, End: flow.ReasonDenied})
	m.Record(&flow.Record{
		Path: flow.PathDirect, Reason: flow.ReasonHandlerAbsent, End: flow.ReasonReset,
		Received: 7, Duration: time.Millisecond, Connect: time.Minute, RTT: 400 * time.Microsecond, Retransmits: 2,
	})
	m.Record(&flow.Record{Path: flow.PathPass, Reason: flow.ReasonExcluded, End: flow.ReasonRefused})
	want := []string{
		`pillion_build_info{version=""} 1`,
		`pillion_bytes_total{direction="received",path="direct"} 7`,
		`pillion_bytes_total{direction="received",path="pass"} 0`,
		`pillion_bytes_total{direction="received",path="relay"} 50`,
		`pillion_bytes_total{direction="sent",path="direct"} 0`,
		`pillion_bytes_total{direction="sent",path="pass"} 0`,
		`pillion_bytes_total{direction="sent",path="relay"} 101`,
		`pillion_connect_duration_seconds_bucket{path="direct",le="+Inf"} 1`,
		`pillion_connect_duration_seconds_bucket{path="relay",le="+Inf"} 1`,
		`pillion_connect_duration_seconds_count{path="direct"} 1`,
		`pillion_connect_duration_seconds_count{path="relay"} 1`,
		`pillion_connect_duration_seconds_sum{path="direct"} 60`,
		`pillion_connect_duration_seconds_sum{path="relay"} 0.003`,
		`pillion_connection_duration_seconds_bucket{path="direct",le="+Inf"} 1`,
		`pillion_connection_duration_seconds_bucket{path="pass",le="+Inf"} 1`,
		`pillion_connection_duration_seconds_bucket{path="relay",le="+Inf"} 2`,
		`pillion_connection_duration_seconds_count{path="direct"} 1`,
		`pillion_connection_duration_seconds_count{path="pass"} 1`,
		`pillion_connection_duration_seconds_count{path="relay"} 2`,
		`pillion_connection_duration_seconds_sum{path="direct"} 0.001`,
		`pillion_connection_duration_seconds_sum{path="pass"} 0`,
		`pillion_connection_duration_seconds_sum{path="relay"} 2`,
		`pillion_connections_total{end="closed",path="relay",reason="service"} 2`,
		`pillion_connections_total{end="denied",path="deny",reason="denied"} 1`,
		`pillion_connections_total{end="refused",path="pass",reason="excluded"} 1`,
		`pillion_connections_total{end="reset",path="direct",reason="handler_absent"} 1`,
		`pillion_retransmits_total{path="direct"} 2`,
		`pillion_retransmits_total{path="pass"} 0`,
		`pillion_retransmits_total{path="relay"} 0`,
		`pillion_rtt_seconds_bucket{path="direct",le="+Inf"} 1`,
		`pillion_rtt_seconds_count{path="direct"} 1`,
		`pillion_rtt_seconds_sum{path="direct"} 0.0004`,
	}
	lines := get(t, m)
	got := slices.DeleteFunc(slices.Clone(lines), func(line string) bool {
		return strings.Contains(line, "_bucket") && !strings.Contains(line, "+Inf")
	})
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// A bound is in its bucket, and a bucket has those below it.
	for bound, n := range map[string]int{"0.0001": 0, "0.0005": 1, "1": 1} {
		if line := fmt.Sprintf(`pillion_rtt_seconds_bucket{path="direct",le="%s"} %d`, bound, n); !slices.Contains(lines, line) {
			t.Errorf("no line %s", line)
		}
	}
	for bound, n := range map[string]int{"0.001": 0, "1": 0, "10": 1} {
		m := New(Sources{})
		m.Record(&flow.Record{Path: flow.PathPass, Duration: 10 * time.Second})
		if line := fmt.Sprintf(`pillion_connection_duration_seconds_bucket{path="pass",le="%s"} %d`, bound, n); !slices.Contains(get(t, m), line) {
			t.Errorf("no line %s", line)
		}
	}
}

// Whatever is asked of an open world, the series are those of the enums.
func TestRecordMakesNoSeries(t *testing.T) {
	t.Parallel()
	m := New(Sources{})
	before := 0
	for i := range 5000 {
		m.Record(&flow.Record{
			Path: flow.PathPass, Reason: flow.ReasonDefaultPass, End: flow.ReasonClosed, Connect: time.Millisecond, RTT: time.Millisecond,
			OrigDst: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), uint16(i+1)),
			Cgroup:  uint64(i), Service: fmt.Sprint("s", i), Cluster: fmt.Sprint("c", i),
		})
		if i == 0 {
			before = len(get(t, m))
		}
	}
	if after := len(get(t, m)); after != before {
		t.Errorf("%d series of one record, %d of 5000", before, after)
	}
	// Nor does what no enum holds.
	m.Record(&flow.Record{Path: 200, Reason: flow.ReasonService, End: flow.ReasonClosed})
	m.Record(&flow.Record{Path: flow.PathPass, Reason: 255, End: flow.ReasonClosed})
	m.Record(&flow.Record{Path: flow.PathPass, Reason: flow.ReasonExcluded, End: 255})
	if after := len(get(t, m)); after != before {
		t.Errorf("%d series after nonsense, want %d", after, before)
	}
}

func TestRecordAllocatesNothing(t *testing.T) {
	m := New(Sources{})
	r := &flow.Record{Path: flow.PathDirect, Reason: flow.ReasonService, End: flow.ReasonClosed, Connect: 1, RTT: 1}
	m.Record(r)
	if n := testing.AllocsPerRun(100, func() { m.Record(r) }); n != 0 {
		t.Errorf("%v allocations per record", n)
	}
}

// What cannot be read is missing; the rest is there.
func TestKernelUnreadable(t *testing.T) {
	t.Parallel()
	s := full()
	s.err = errors.New("no such map")
	lines := get(t, New(s.all()))
	if !slices.Contains(lines, "pillion_kernel_readable 0") || len(only(lines, "pillion_slots")) != 0 {
		t.Errorf("%q", lines)
	}
	if !slices.Contains(lines, "pillion_relay_dials_total 4") {
		t.Error("the relay's are missing too")
	}
	if len(only(lines, `pillion_records_lost_total{where="ring"}`)) != 0 {
		t.Error("a loss of 0 is claimed")
	}
}

// The same for what else has names.
func TestOddNames(t *testing.T) {
	t.Parallel()
	s := full()
	s.config.Refused = []string{"a", "a", "\xff"}
	s.discovery = append(s.discovery, s.discovery[0])
	s.checks = append(s.checks, s.checks[0])
	lines := get(t, New(s.all()))
	for prefix, want := range map[string]int{
		"pillion_config_refused": 2, "pillion_discovery_age_seconds": 1, "pillion_health_check_endpoints": 3,
	} {
		if got := only(lines, prefix); len(got) != want {
			t.Errorf("%s: %q, want %d", prefix, got, want)
		}
	}
}

// Nothing that the configuration says makes a scrape fail.
func TestOddEndpoints(t *testing.T) {
	t.Parallel()
	s := full()
	e := s.endpoints[0]
	odd := e
	odd.Cluster = "\xffweb\n\""
	s.endpoints = []EndpointStats{e, e, odd}
	lines := only(get(t, New(s.all())), "pillion_endpoint_weight")
	want := []string{
		`pillion_endpoint_weight{cluster="web",endpoint="127.0.0.1:8081"} 2`,
		"pillion_endpoint_weight{cluster=\"\uFFFDweb\\n\\\"\",endpoint=\"127.0.0.1:8081\"} 2",
	}
	slices.Sort(lines)
	slices.Sort(want)
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Error(diff)
	}
}

func TestRecordBesideScrapes(t *testing.T) {
	t.Parallel()
	m := New(full().all())
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for i := range 500 {
				m.Record(&flow.Record{Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.Reason(i % 8), Sent: 1})
			}
		})
		all.Go(func() {
			for range 10 {
				get(t, m)
			}
		})
	}
	all.Wait()
	if !slices.Contains(get(t, m), `pillion_bytes_total{direction="sent",path="relay"} 2000`) {
		t.Error("counts are missing")
	}
}

func BenchmarkRecord(b *testing.B) {
	m := New(Sources{})
	r := &flow.Record{Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.ReasonClosed, Connect: time.Millisecond}
	for b.Loop() {
		m.Record(r)
	}
}

// TestGzip: who asks for it gets the same, compressed.
func TestGzip(t *testing.T) {
	t.Parallel()
	m := New(full().all())
	plain := get(t, m)
	for header, want := range map[string]string{"gzip": "gzip", "br, gzip;q=0.5": "gzip", "": "", "br": "", "gzip;q=0": "", "deflate, *": "gzip"} {
		r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
		r.Header.Set("Accept-Encoding", header)
		w := httptest.NewRecorder()
		m.Handler().ServeHTTP(w, r)
		if got := w.Header().Get("Content-Encoding"); got != want {
			t.Errorf("%q is answered with %q, want %q", header, got, want)
			continue
		}
		if want == "" {
			continue
		}
		z, err := gzip.NewReader(w.Body)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(text), "\npillion_"); n != len(plain) {
			t.Errorf("%q: %d lines are Pillion's, want %d", header, n, len(plain))
		}
	}
}

// TestManyEndpoints bounds what a scrape of ten thousand endpoints allocates beside
// the list of them: it is resident afterwards.
func TestManyEndpoints(t *testing.T) {
	s := full()
	one := s.endpoints[0]
	s.endpoints = nil
	for i := range 10_000 {
		one.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 80)
		s.endpoints = append(s.endpoints, one)
	}
	h := New(s.all()).Handler()
	r := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			h.ServeHTTP(discard{}, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		}
	})
	list := int64(len(s.endpoints)) * int64(unsafe.Sizeof(one))
	t.Logf("%d bytes and %d allocations per scrape, %d of them the list; %v", r.AllocedBytesPerOp(), r.AllocsPerOp(), list, r.T/time.Duration(r.N))
	if most := list + 1<<20; r.AllocedBytesPerOp() > most {
		t.Errorf("%d bytes per scrape, want at most %d", r.AllocedBytesPerOp(), most)
	}
}

// discard takes an answer and keeps nothing of it.
type discard struct{}

func (discard) Header() http.Header         { return http.Header{} }
func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) WriteHeader(int)             {}
