package kubernetes

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
)

// serverAddr is where the API server is: behind the application's default route.
const serverAddr = "198.51.100.250"

// stage is a cluster in the world of an application.
type stage struct {
	*rig.Rig
	*cluster
}

// pod is the address of an endpoint; the world has those below 10.
func pod(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(n)}), 8080)
}

// at is the address of a service.
func at(clusterIP string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(clusterIP), port)
}

// TestBinary is about all of Pillion: the real binary in an application's world,
// with a real API server in it. There is no kube-proxy: what has a ClusterIP is
// served by Pillion or by nobody.
func TestBinary(t *testing.T) {
	if os.Getenv(envBin) == "" {
		t.Skip(envBin + " is not set: make test-kubernetes builds an API server and runs this")
	}
	r := rig.New(t)
	r.Give(t, netip.MustParseAddr(serverAddr))
	s := &stage{Rig: r, cluster: startClusterIn(t, r.World, serverAddr)}
	s.admit()
	for n := 1; n < 10; n++ {
		s.serveAs(t, pod(n))
	}
	r.Serve(t, netip.MustParseAddrPort("[2001:db8:7::1]:8080"), app.NewServer("six").Serve)
	for _, tt := range []struct {
		name string
		test func(*testing.T, *stage)
	}{
		{"Listed", testListed},
		{"Away", testAway},
		{"AwayAtStart", testAwayAtStart},
		{"First", testFirst},
		{"Passed", testPassed},
		{"Reborn", testReborn},
		{"Exempt", testExempt},
		{"Resident", testResident},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.t = t
			start := time.Now()
			tt.test(t, s)
			t.Logf("took %v", time.Since(start).Round(time.Millisecond))
		})
		s.t = t
	}
}

// serveAs serves at an address, and says which that is.
func (s *stage) serveAs(t *testing.T, addr netip.AddrPort) {
	t.Helper()
	s.Serve(t, addr, app.NewServer(addr.String()).Serve)
}

// instance is a running pillion with an application.
type instance struct {
	*rig.Instance
	*app.Application
	s *stage
}

// run starts both. The API server's keys are added to the configuration.
func (s *stage) run(t *testing.T, kubernetes, yaml string) *instance {
	t.Helper()
	if kubernetes != "" {
		kubernetes += ", "
	}
	return &instance{s: s, Instance: s.Run(t, fmt.Sprintf("kubernetes: {%sserver: %q, ca_file: %q, token_file: %q}\n",
		kubernetes, s.url, s.path("ca.crt"), s.path("token"))+yaml), Application: app.Start(t, s.Rig)}
}

func (i *instance) service(t testing.TB, name string) (admin.ServiceStatus, bool) {
	t.Helper()
	return i.find(t, func(s *admin.ServiceStatus) bool { return s.Name == name })
}

// named returns the service at an address.
func (i *instance) named(t testing.TB, at netip.AddrPort) (admin.ServiceStatus, bool) {
	t.Helper()
	return i.find(t, func(s *admin.ServiceStatus) bool { return s.Address == at.String() })
}

func (i *instance) find(t testing.TB, is func(*admin.ServiceStatus) bool) (admin.ServiceStatus, bool) {
	t.Helper()
	status, err := i.Status(context.Background())
	if err != nil {
		t.Fatalf("status: %v\n%s", err, i.Log())
	}
	for _, s := range status.Services {
		if is(&s) {
			return s, true
		}
	}
	return admin.ServiceStatus{}, false
}

// has waits until a service has these endpoints, as status tells.
func (i *instance) has(t testing.TB, name string, want ...netip.AddrPort) {
	t.Helper()
	var got rig.Log
	testutil.Eventually(t, rig.Limit, func() bool {
		s, _ := i.service(t, name)
		all := []netip.AddrPort{}
		for _, e := range s.Endpoints {
			if e.State != admin.EndpointRemoved {
				all = append(all, netip.MustParseAddrPort(e.Address))
			}
		}
		slices.SortFunc(all, netip.AddrPort.Compare)
		if slices.Equal(all, want) {
			return true
		}
		got = rig.Log{}
		fmt.Fprint(&got, all, s.Source)
		return false
	}, name, " has ", want, ", not ", &got)
}

// goes fails the test unless connections are served by these and by each of them.
func (i *instance) goes(t testing.TB, to netip.AddrPort, want ...netip.AddrPort) {
	t.Helper()
	got := map[string]bool{}
	for range 24 * len(want) {
		got[i.Dial(t, to)] = true
	}
	for _, w := range want {
		if !got[w.String()] {
			t.Errorf("%s is never served by %s", to, w)
		}
		delete(got, w.String())
	}
	if len(got) > 0 {
		t.Errorf("%s ends in %v", to, got)
	}
}

// metric returns the value of a metric of a service.
func (i *instance) metric(t testing.TB, name, service string) string {
	t.Helper()
	body, err := i.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	for lines := bufio.NewScanner(body); lines.Scan(); {
		if labels, ok := strings.CutPrefix(lines.Text(), fmt.Sprintf("%s{service=%q,", name, service)); ok {
			return labels[strings.LastIndexByte(labels, ' ')+1:]
		}
	}
	return ""
}

func conditions(ready, serving, terminating bool) string {
	return fmt.Sprintf(`"conditions":{"ready":%v,"serving":%v,"terminating":%v}`, ready, serving, terminating)
}

// pods are endpoints in an EndpointSlice.
func pods(numbers ...int) []string {
	var all []string
	for _, n := range numbers {
		all = append(all, ep(pod(n).Addr().String()))
	}
	return all
}

const noPort = `{"name":"other","port":9,"protocol":"TCP"}`

// testListed: services of the configuration follow their EndpointSlices, at once on
// both paths.
func testListed(t *testing.T, s *stage) {
	ip := s.cluster.service("listed", `{"ports":[{"name":"http","port":80,"targetPort":8080},{"name":"other","port":81}]}`)[0]
	relay, direct := at(ip, 80), at("10.96.0.80", 80) // no service's: see testPassed
	i := s.run(t, "", fmt.Sprintf(`services:
- {name: relayed, address: %q, path: relay, discover: {kubernetes: {service: default/listed, port: http}}}
- {name: direct, address: %q, path: direct, discover: {kubernetes: {service: default/listed, port: http}}}
`, relay, direct))
	set := func(endpoints []string, want ...netip.AddrPort) {
		t.Helper()
		s.slice("listed-1", "listed", "IPv4", noPort+","+httpPort, endpoints...)
		for name, to := range map[string]netip.AddrPort{"relayed": relay, "direct": direct} {
			i.has(t, name, want...)
			if len(want) > 0 {
				i.goes(t, to, want...)
			} else if got := i.Dial(t, to); got != "ECONNREFUSED" {
				t.Errorf("%s without endpoints: %s", name, got)
			}
		}
	}
	set(pods(1), pod(1))
	set(pods(2, 3), pod(2), pod(3))
	one, two := pod(1).Addr().String(), pod(2).Addr().String()
	set([]string{ep(one, conditions(false, false, false)), ep(two, conditions(true, true, false))}, pod(2))
	set([]string{ep(one, conditions(false, true, true)), ep(two, conditions(false, false, true))}, pod(1))
	set(nil)
	set(pods(4), pod(4))
	for name, path := range map[string]flow.Path{"relayed": flow.PathRelay, "direct": flow.PathDirect} {
		status, _ := i.service(t, name)
		if status.Path != path || status.Source.Kind != admin.SourceKubernetes || status.Source.Name != "default/listed:http" || status.Source.Stale {
			t.Errorf("%s: %+v", name, status)
		}
	}
}

// testAway: the API server is killed, and what it said stays; when it is back, it is
// followed again.
func testAway(t *testing.T, s *stage) {
	ip := s.cluster.service("away", `{"ports":[{"name":"http","port":80}]}`)[0]
	s.slice("away-1", "away", "IPv4", httpPort, pods(1)...)
	i := s.run(t, "", fmt.Sprintf(`services:
- {name: relayed, address: "%s:80", path: relay, discover: {kubernetes: {service: default/away}}}
- {name: direct, address: "10.96.0.81:80", path: direct, discover: {kubernetes: {service: default/away}}}
`, ip))
	addrs := map[string]netip.AddrPort{"relayed": at(ip, 80), "direct": at("10.96.0.81", 80)}
	stale := func(want bool) {
		t.Helper()
		for name, to := range addrs {
			testutil.Eventually(t, rig.Limit, func() bool {
				status, _ := i.service(t, name)
				return status.Source.Stale == want && (status.Source.Error != "") == want && i.metric(t, "pillion_discovery_stale", name) == map[bool]string{false: "0", true: "1"}[want]
			}, name, " is stale: ", want)
			i.has(t, name, pod(1))
			i.goes(t, to, pod(1))
		}
	}
	stale(false)
	s.server.kill()
	stale(true)
	s.startServer()
	stale(false)
	s.slice("away-1", "away", "IPv4", httpPort, pods(2)...)
	for name, to := range addrs {
		i.has(t, name, pod(2))
		i.goes(t, to, pod(2))
	}
}

// testAwayAtStart: what was found on demand is there again when Pillion is killed and
// starts without the API server, with its endpoints and their zones, and what the
// server says when it is back holds.
func testAwayAtStart(t *testing.T, s *stage) {
	ip := s.cluster.service("kept", `{"sessionAffinity":"ClientIP","ports":[{"name":"http","port":80}]}`)[0]
	in := func(zone string, n int) string {
		return ep(pod(n).Addr().String(), fmt.Sprintf("%q:%q", "zone", zone))
	}
	s.slice("kept-1", "kept", "IPv4", httpPort, in("near", 1), in("far", 2))
	defer s.gone("kept")
	for _, path := range []flow.Path{flow.PathDirect, flow.PathRelay} {
		t.Run(path.String(), func(t *testing.T) {
			i := s.run(t, "on_demand: true", fmt.Sprintf("zone: near\non_failure: closed\npath: %s\n", path))
			const name = "default/kept:80"
			kept := func(stale bool) {
				t.Helper()
				i.has(t, name, pod(1), pod(2))
				testutil.Eventually(t, rig.Limit, func() bool {
					status, _ := i.service(t, name)
					zones := map[string]string{}
					for _, e := range status.Endpoints {
						zones[e.Address] = e.Zone
					}
					return zones[pod(1).String()] == "near" && zones[pod(2).String()] == "far" &&
						status.Path == path && status.Policy == "maglev" && status.Source.Stale == stale
				}, name, " is what it was; stale: ", stale)
				i.goes(t, at(ip, 80), pod(1)) // that is in the zone
			}
			if got := i.Dial(t, at(ip, 80)); got != pod(1).String() && got != pod(2).String() {
				t.Fatalf("the first connection: %s", got)
			}
			kept(false)
			time.Sleep(2 * overflowEvery) // it is noted every second
			s.server.kill()
			for range 2 { // who takes over from one that recalled it does too
				i.Kill(t)
				i.Launch(t)
				kept(true)
			}
			s.startServer()
			kept(false)
		})
	}
}

// overflowEvery is how often Pillion does what it does now and then.
const overflowEvery = time.Second

// testExempt: Pillion's own connections to the API server are none of the
// application's, although it is in the same cgroup.
func testExempt(t *testing.T, s *stage) {
	ip := s.cluster.service("exempt", `{"ports":[{"name":"http","port":80}]}`)[0]
	s.slice("exempt-1", "exempt", "IPv4", httpPort, pods(1)...)
	s.Home = testutil.Place{Cgroup: s.Scope}
	defer func() { s.Home = testutil.Place{} }()
	i := s.run(t, "on_demand: true", "")
	if got := i.Dial(t, at(ip, 80)); got != pod(1).String() {
		t.Errorf("the first connection: %s", got)
	}
	i.has(t, "default/exempt:80", pod(1))
	reasons := i.Reasons(t)
	if reasons[flow.ReasonSelf.String()] == 0 {
		t.Errorf("no connection was told to be Pillion's own: %v", reasons)
	}
	open, err := i.Flows(context.Background(), admin.FlowQuery{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range open {
		if r.OrigDst.Addr().String() == serverAddr && r.Reason != flow.ReasonSelf {
			t.Errorf("a connection to the API server was captured: %+v", r)
		}
	}
}

// testResident: 200 services of 50 endpoints in use, in the whole of Pillion, keep to
// 30 MB, when what finding them left behind was given back, for as long as is looked,
// and while the metrics are scraped.
func testResident(t *testing.T, s *stage) {
	const services, endpoints, most = 200, 50, 30_000_000
	// Whatever is asked for in this range is served.
	s.command(t, s.World, "ip", "route", "add", "local", "198.18.0.0/16", "dev", "lo")
	s.Serve(t, netip.MustParseAddrPort("0.0.0.0:8081"), app.NewServer("many").Serve)
	var asked []netip.AddrPort
	for n := range services {
		name := fmt.Sprintf("resident-%d", n)
		asked = append(asked, at(s.cluster.service(name, `{"ports":[{"name":"http","port":80}]}`)[0], 80))
		list := make([]string, endpoints)
		for j := range list {
			list[j] = ep(fmt.Sprintf("198.18.%d.%d", n, j+1), `"nodeName":"node-1","zone":"zone-1"`)
		}
		s.slice(name+"-1", name, "IPv4", `{"name":"http","port":8081}`, list...)
	}
	i := s.run(t, "on_demand: true", "path: direct\n")
	before := i.resident(t)
	for _, to := range asked {
		if got := i.Open(t, to.String(), to); got != "many" {
			_, known := i.named(t, to)
			t.Fatalf("the first connection to %s: %s (a service names it by now: %v)", to, got, known)
		}
	}
	found := i.resident(t)
	testutil.Eventually(t, rig.Limit, func() bool {
		status, err := i.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, s := range status.Services {
			n += len(s.Endpoints)
		}
		return len(status.Services) == services && n == services*endpoints
	}, "all of them in force")
	// What finding all of them leaves behind is given back when it is over, and once
	// more when it is quiet.
	now := 0
	testutil.Eventually(t, time.Minute, func() bool {
		now = i.resident(t)
		return now <= most/2+before/2 || now <= most*9/10
	}, "what finding them left behind is given back; resident are ", &now)
	settled, after, scraped := 0, 0, 0
	for start, looks := time.Now(), 0; time.Since(start) < time.Minute; looks++ {
		time.Sleep(time.Second)
		settled = max(settled, i.resident(t))
		if looks%15 == 14 { // as often as Prometheus does by default
			scraped = i.scrape(t)
			after = max(after, i.resident(t))
		}
	}
	settled = max(settled, after)
	if settled > most {
		t.Errorf("%d bytes resident within a minute, want no more than %d", settled, most)
	}
	t.Logf("%d services of %d endpoints: at most %d KiB resident in a minute, %d KiB after a scrape of %d KiB, %d KiB at its end; %d KiB while they were found, %d KiB before",
		services, endpoints, settled>>10, after>>10, scraped>>10, i.resident(t)>>10, found>>10, before>>10)
	i.Close(t, "")
}

// scrape reads the metrics, and returns how many bytes those are.
func (i *instance) scrape(t testing.TB) int {
	t.Helper()
	body, err := i.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	n, err := io.Copy(io.Discard, body)
	if err != nil || n == 0 {
		t.Fatalf("the metrics are %d bytes: %v", n, err)
	}
	return int(n)
}

// resident is what the process has in memory, in bytes.
func (i *instance) resident(t testing.TB) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", i.Instance.Cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	var kib int
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// command runs a program in a namespace. It must succeed.
func (s *stage) command(t testing.TB, ns *testutil.NS, name string, args ...string) {
	t.Helper()
	cmd := s.Command(name, args...)
	var log rig.Log
	cmd.Stdout, cmd.Stderr = &log, &log
	err := ns.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, log.String())
	}
}

// gone deletes a service and its endpoints.
func (s *stage) gone(name string) {
	s.t.Helper()
	s.must(http.MethodDelete, servicesPath+"/"+name, "")
	s.must(http.MethodDelete, slicesPath+"/"+name+"-1", "")
}
