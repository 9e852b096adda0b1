package metrics

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/pillion-project/pillion/redirect/flow"
)

// sources answers as all of them.
type sources struct {
	kernel    KernelStats
	err       error
	endpoints []EndpointStats
	relay     RelayStats
	config    ConfigurationStats
	discovery []DiscoveryStats
	sets      SetStats
	checks    []CheckStats
}

func (s *sources) Kernel() (KernelStats, error)      { return s.kernel, s.err }
func (s *sources) Endpoints() []EndpointStats        { return slices.Clone(s.endpoints) }
func (s *sources) Relay() RelayStats                 { return s.relay }
func (s *sources) Configuration() ConfigurationStats { return s.config }
func (s *sources) Discovery() []DiscoveryStats       { return s.discovery }
func (s *sources) Sets() SetStats                    { return s.sets }
func (s *sources) Checks() []CheckStats              { return s.checks }

// full has a value for everything.
func full() *sources {
	reasons := make([]uint64, flow.KernelReasons)
	reasons[flow.ReasonService], reasons[flow.ReasonNone] = 5, 99
	return &sources{
		kernel: KernelStats{
			Reasons: reasons, Connects: 10, Decided: 9, Denied: 2, Unsent: 1, Escaped: 3, EventsLost: 4, Stored: 8, Unaccounted: -1,
			Slots: map[string]int{"free": 100, "named": 7}, SlotsMax: 65000, Live: 6, Mended: 6, BeatAge: 1500 * time.Millisecond,
		},
		endpoints: []EndpointStats{{
			Cluster: "web", Addr: netip.MustParseAddrPort("127.0.0.1:8081"), Weight: 2, Zone: "a", Path: flow.PathDirect, Ejected: true, Down: true, LeftOut: true, Live: 3,
			Connects: 4, Failures: 5, Ejections: 6, ConnectTime: time.Millisecond,
		}},
		relay: RelayStats{
			Accepted: 1, Ended: 2, Live: 3, Dials: 4, DialFailures: 5, Retries: 6,
			Unknown: 7, AcceptPauses: 9, LostRecords: 10, Pipes: 11, Refused: 12, NotInjected: 13,
		},
		config: ConfigurationStats{
			Generation: 3, Refused: []string{"shop"}, Reloads: 4, Failures: 1, Tried: time.Unix(1_700_000_000, 5e8), OK: false,
		},
		discovery: []DiscoveryStats{{Service: "web", Source: "dns", Age: 2 * time.Second, Stale: true, Changes: 6, Errors: 7, Endpoints: 8}},
		sets: SetStats{
			Sets: 2, SetEndpoints: 3, Publishes: 4, Failures: 5, PublishTime: 9 * time.Millisecond,
			Ended: 8,
		},
		checks: []CheckStats{{Cluster: "web", Up: 20, Unknown: 2, Down: 1, Failing: 3}},
	}
}

func (s *sources) all() Sources {
	return Sources{
		Kernel: s, Endpoints: s, Relay: s, Configuration: s, Discovery: s, Sets: s, Checks: s,
		Losses:  func() map[string]uint64 { return map[string]uint64{"handler": 12, "flowlog": 13} },
		Version: "1.2",
	}
}

// get scrapes m and returns the lines that are Pillion's samples.
func get(t *testing.T, m *Metrics) []string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("code %d: %s", w.Code, w.Body)
	}
	var lines []string
	for line := range strings.Lines(w.Body.String()) {
		if strings.HasPrefix(line, "pillion_") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// families scrapes m and returns all of its metrics, by name.
func families(t *testing.T, m *Metrics) []*dto.MetricFamily {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	parser := expfmt.NewTextParser(model.UTF8Validation)
	byName, err := parser.TextToMetricFamilies(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	all := []*dto.MetricFamily{}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		all = append(all, byName[name])
	}
	return all
}
