package live

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
)

// vip is the address of a service. Nobody has it.
func vip(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(n)}), 80)
}

// far is the address of an endpoint, if somebody serves there.
func far(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(n)}), 8080)
}

// serve serves at some of these, and returns the servers by number.
func serve(t testing.TB, r *rig.Rig, numbers ...int) map[int]*rig.Server {
	t.Helper()
	all := map[int]*rig.Server{}
	for _, n := range numbers {
		all[n] = server(t, r, far(n))
	}
	return all
}

// server is one that says its address to whoever connects.
func server(t testing.TB, r *rig.Rig, at netip.AddrPort) *rig.Server {
	t.Helper()
	return r.Server(t, at, app.NewServer(at.String()).Serve)
}

// service is one in YAML, on a line, with more keys.
func service(n int, more string, endpoints ...int) string {
	s := fmt.Sprintf("  - {name: s%d, address: %q", n, vip(n))
	if len(endpoints) > 0 {
		s += ", endpoints: " + list(endpoints...)
	}
	if more != "" {
		s += ", " + more
	}
	return s + "}\n"
}

func list(endpoints ...int) string {
	all := make([]string, len(endpoints))
	for i, n := range endpoints {
		all[i] = fmt.Sprintf("%q", far(n))
	}
	return "[" + strings.Join(all, ", ") + "]"
}

// stage is an instance, its configuration and an application.
type stage struct {
	*rig.Rig
	*rig.Instance
	*app.Application
	file string
}

// newStage starts an instance. What it uses is to be there before.
func newStage(t *testing.T, r *rig.Rig, yaml string) *stage {
	t.Helper()
	s := &stage{Rig: r, file: filepath.Join(t.TempDir(), "pillion.yaml")}
	put(t, s.file, yaml)
	s.Instance = r.Run(t, "", "--config", s.file)
	s.Application = app.Start(t, r)
	return s
}

// load has workers connect all the time, and open connections repeat checked bytes,
// until unload.
func (s *stage) load(t testing.TB, workers, open int, to ...netip.AddrPort) {
	t.Helper()
	s.Load(t, app.Load{
		To: to, Named: true, Stay: open, Kinds: []app.Kind{app.Echo}, Every: 2 * time.Millisecond,
		Come: workers, Visits: []app.Kind{app.Greet}, Pause: 3 * time.Millisecond, // the load is not what is tested
	})
}

// unload ends the load, of which nothing may have failed.
func (s *stage) unload(t testing.TB) *app.Report {
	t.Helper()
	r := s.Unload(t)
	r.Check(t)
	return r
}

// put replaces a file by rename, as it should be.
func put(t testing.TB, file, text string) {
	t.Helper()
	next := filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+".next")
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, file); err != nil {
		t.Fatal(err)
	}
}

// write replaces what is in a file.
func write(t testing.TB, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// load puts a configuration in force, all of which must be taken.
func (s *stage) reload(t testing.TB, yaml string) {
	t.Helper()
	if r := s.tryReload(t, yaml); len(r.Refused) > 0 {
		t.Fatalf("refused: %+v", r.Refused)
	}
}

func (s *stage) tryReload(t testing.TB, yaml string) admin.ReloadResult {
	t.Helper()
	put(t, s.file, yaml)
	r, err := s.Instance.Reload(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (s *stage) status(t testing.TB) admin.Status {
	t.Helper()
	status, err := s.Status(context.Background())
	if err != nil {
		t.Fatalf("status: %v\n%s", err, s.Log())
	}
	return status
}

func (s *stage) service(t testing.TB, name string) admin.ServiceStatus {
	t.Helper()
	for _, service := range s.status(t).Services {
		if service.Name == name {
			return service
		}
	}
	return admin.ServiceStatus{}
}

// endpoints are those of a service, as text: the number, and what is not usual.
func (s *stage) endpoints(t testing.TB, name string) []string {
	t.Helper()
	all := []string{}
	for _, e := range s.service(t, name).Endpoints {
		if e.State == admin.EndpointRemoved {
			continue // it still has connections
		}
		at, text := netip.MustParseAddrPort(e.Address), e.Address
		if at.Addr().Is4() && at.Port() == 8080 {
			text = fmt.Sprint(at.Addr().As4()[3])
		}
		if e.Weight != 1 {
			text += fmt.Sprintf(" weight %d", e.Weight)
		}
		if e.Zone != "" {
			text += " zone " + e.Zone
		}
		if e.State != admin.EndpointAvailable {
			text += " " + e.State
		}
		all = append(all, text)
	}
	slices.Sort(all)
	return all
}

// has waits until a service has these endpoints.
func (s *stage) has(t testing.TB, name string, want ...string) {
	t.Helper()
	slices.Sort(want)
	got := &[]string{}
	testutil.Eventually(t, rig.Limit, func() bool {
		*got = s.endpoints(t, name)
		return slices.Equal(*got, want)
	}, "service ", name, " has endpoints ", want, ", still has ", got)
}

// goes fails the test unless the connections to a service are served by these,
// and by each of them.
func (s *stage) goes(t testing.TB, n int, endpoints ...int) {
	t.Helper()
	got, want := map[string]bool{}, map[string]bool{}
	for _, e := range endpoints {
		want[far(e).String()] = true
	}
	for range 24 * len(endpoints) {
		got[s.Dial(t, vip(n))] = true
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("service %d goes to (-want +got)\n%s", n, diff)
	}
}

// metric returns the value of a metric, with its labels.
func (s *stage) metric(t testing.TB, name string) string {
	t.Helper()
	body, err := s.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	for lines := bufio.NewScanner(body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			return value
		}
	}
	return ""
}

// onPaths runs a test on every path that balances.
func onPaths(t *testing.T, test func(t *testing.T, path string)) {
	t.Helper()
	for _, path := range []string{"relay", "direct"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			test(t, path)
		})
	}
}
