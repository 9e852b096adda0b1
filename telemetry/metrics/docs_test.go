package metrics

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"

	"github.com/pillion-project/pillion/redirect/flow"
)

var update = flag.Bool("update", false, "write docs/metrics.md")

const docs = "../../docs/metrics.md"

const docsHead = `# Metrics

Written by ` + "`go test ./telemetry/metrics -update`" + `; change the descriptions there.

They are served at ` + "`metrics:`" + ` of the configuration, and on the admin socket at ` + "`/metrics`" + `, beside the usual ` + "`go_*`" + ` and
` + "`process_*`" + ` of Pillion's own process. Counters of the kernel side count from the creation of the instance, and so survive
a restart of the process; all others count from the start of the process, or of the first one of those that took over from each other.

| metric | type | labels | meaning |
|---|---|---|---|
`

// described returns metrics of which every one has a value.
func described() *Metrics {
	m := New(full().all())
	m.Record(&flow.Record{Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.ReasonClosed, Connect: 1, RTT: 1})
	return m
}

func TestDocs(t *testing.T) {
	t.Parallel()
	b := bytes.NewBufferString(docsHead)
	for _, f := range families(t, described()) {
		if !strings.HasPrefix(f.GetName(), "pillion_") {
			continue
		}
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n",
			f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp())
	}
	b.WriteString(docsLabels())
	if *update {
		if err := os.WriteFile(docs, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(docs)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(have), b.String()); diff != "" {
		t.Errorf("%s is not what the registry says (go test -update):\n%s", docs, diff)
	}
}

// docsLabels lists the values of the labels that are enums.
func docsLabels() string {
	var paths, kernel, ends []string
	for _, p := range flow.Paths()[1:] {
		paths = append(paths, "`"+p.String()+"`")
	}
	for _, r := range flow.Reasons()[1:] {
		if name := "`" + r.String() + "`"; r < flow.KernelReasons {
			kernel = append(kernel, name)
		} else {
			ends = append(ends, name)
		}
	}
	return "\n## Label values\n\n" +
		"- `path`: " + strings.Join(paths, ", ") + ".\n" +
		"- `reason`: " + strings.Join(kernel, ", ") + ".\n" +
		"- `end`: for `deny` the reason, else " + strings.Join(ends, ", ") + ".\n" +
		"- `direction`: `sent` (by the application), `received` (by the application).\n" +
		"- `source`: `file`, `dns`, `kubernetes`.\n" +
		"- `state`: of slots `free`, `named`, `reserved`, `retiring`; of checked endpoints `up`, `down`, `unknown`.\n" +
		"- `where`: `ring` (the kernel side's buffer was full), `unreadable` (its event was not understood), `handler` (nobody took\n" +
		"  its record in time), `unmatched` (only one of the two told: the record is there, but incomplete), `flowlog` (counted, but\n" +
		"  not written).\n" +
		"\n## Worth an alert\n\n" +
		"- `min without (endpoint) ((pillion_endpoint_down + pillion_endpoint_ejected + pillion_endpoint_left_out) and pillion_endpoint_weight > 0) > 0`:\n" +
		"  no endpoint of a service is available. (Those without weight are removed ones that still have connections. A\n" +
		"  service that has none at all has none of these series: `pillion_discovery_endpoints == 0`.)\n" +
		"- `pillion_endpoint_left_out == 1`: an endpoint that a service on `direct` cannot use, for good.\n" +
		"- `pillion_config_last_reload_successful == 0`: something of the file is refused; `pillion reload` says what.\n" +
		"- `pillion_unaccounted_connections != 0`, for some minutes: a bug of Pillion's.\n"
}

// TestDocsAreComplete finds a metric that described has no value of.
func TestDocsAreComplete(t *testing.T) {
	t.Parallel()
	m := described()
	var have []string
	for _, f := range families(t, m) {
		have = append(have, f.GetName())
	}
	var want []string
	for _, f := range endpointFamilies() {
		want = append(want, f.name)
	}
	ch := make(chan *prometheus.Desc, 1000)
	m.registry.Describe(ch)
	close(ch)
	for d := range ch {
		_, name, _ := strings.Cut(d.String(), `fqName: "`)
		name, _, _ = strings.Cut(name, `"`)
		if !strings.HasPrefix(name, "pillion_") {
			continue
		}
		want = append(want, name)
	}
	for _, name := range want {
		if !slices.Contains(have, name) {
			t.Errorf("%s is not in %s", name, docs)
		}
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	var ours []*dto.MetricFamily
	for _, f := range families(t, described()) {
		if strings.HasPrefix(f.GetName(), "pillion_") {
			ours = append(ours, f)
		}
	}
	problems, err := promlint.NewWithMetricFamilies(ours).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}
