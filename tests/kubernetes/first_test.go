package kubernetes

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// testFirst: a service that nobody lists is served from the first connection on,
// whatever says when a connect ends, on the path that services have; who asks for
// what is none is not kept waiting.
func testFirst(t *testing.T, s *stage) {
	addrs := s.cluster.service("first", `{"ipFamilyPolicy":"RequireDualStack","ports":[{"name":"http","port":80},{"name":"other","port":81}]}`)
	s.slice("first-1", "first", "IPv4", noPort+","+httpPort, pods(1, 2)...)
	s.slice("first-6", "first", "IPv6", httpPort, ep("2001:db8:7::1"))
	defer func() {
		s.must(http.MethodDelete, slicesPath+"/first-6", "")
		s.gone("first")
	}()
	four, six := at(addrs[0], 80), at(addrs[1], 80)
	for _, tt := range []struct {
		yaml string
		path flow.Path
	}{
		{"connect: mirror\npath: direct\n", flow.PathDirect},
		{"connect: early\npath: auto\n", flow.PathDirect},
		{"path: relay\n", flow.PathRelay},
		{"on_failure: closed\npath: direct\n", flow.PathDirect},
	} {
		t.Run(strings.ReplaceAll(strings.TrimSpace(tt.yaml), "\n", ", "), func(t *testing.T) {
			i := s.run(t, "on_demand: true", tt.yaml)
			if got := i.Dial(t, four); got != pod(1).String() && got != pod(2).String() {
				t.Errorf("the first connection: %s", got)
			}
			i.has(t, "default/first:80", pod(1), pod(2))
			i.goes(t, four, pod(1), pod(2))
			// The address of the second family is found by reading all services,
			// which takes longer the second time.
			if got := i.Dial(t, six); got != "six" {
				t.Errorf("the first connection to %s: %s", six, got)
			}
			i.has(t, "default/first:80/ipv6", netip.MustParseAddrPort("[2001:db8:7::1]:8080"))
			status, _ := i.service(t, "default/first:80")
			if status.Path != tt.path || status.Source.Kind != admin.SourceKubernetes || status.Source.Name != "default/first:80" || status.Address != four.String() {
				t.Errorf("%+v", status)
			}
			out, err := s.Pillion(t, "explain", four.String(), "--instance", i.Name)
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"default/first:80", "kubernetes", tt.path.String(), pod(1).String()} {
				if !strings.Contains(out, want) {
					t.Errorf("explain does not tell %q:\n%s", want, out)
				}
			}
			// What is no service's goes where it always did.
			if got := i.Dial(t, pod(3)); got != pod(3).String() {
				t.Errorf("%s: %s", pod(3), got)
			}
			if tt.path == flow.PathRelay {
				return
			}
			relayed := 0
			for _, r := range i.Ended(t, 3) {
				if r.OrigDst == four && r.Path == flow.PathRelay {
					relayed++
					if r.Service != "default/first:80" || r.Attempts != 1 || r.Endpoint.Port() != 8080 {
						t.Errorf("the first connection is on record as %+v", r)
					}
				}
			}
			if relayed != 1 {
				t.Errorf("%d connections were relayed, want the first", relayed)
			}
		})
	}
}

// testPassed: where unnamed destinations are passed, a service is found by the
// connections that have ended and by those that are open.
func testPassed(t *testing.T, s *stage) {
	// The address is the pod's own, so that there is somebody without us.
	for n, keep := range []bool{false, true} {
		name := fmt.Sprintf("passed-%d", n)
		// Of those that the API server gives away last.
		ip := netip.AddrFrom4([4]byte{10, 96, 0, 200 + byte(n)})
		s.cluster.service(name, fmt.Sprintf(`{"clusterIP":%q,"ports":[{"name":"http","port":8080}]}`, ip))
		s.slice(name+"-1", name, "IPv4", httpPort, pods(5)...)
		to := netip.AddrPortFrom(ip, 8080)
		s.serveAs(t, to)
		t.Run(name, func(t *testing.T) {
			i := s.run(t, "on_demand: true", "default: pass\npath: direct\n")
			got := i.Open(t, name, to)
			if !keep {
				i.Close(t, name)
			}
			if got != to.String() {
				t.Errorf("the first connection: %s", got)
			}
			i.has(t, "default/"+name+":8080", pod(5))
			i.goes(t, to, pod(5))
			i.Close(t, "")
		})
	}
}

// testReborn: what is not used is dropped, and found again; a service that is
// deleted is gone, and one that is made again, at another address, is another one.
func testReborn(t *testing.T, s *stage) {
	make := func(n int) netip.AddrPort {
		ip := s.cluster.service("reborn", `{"ports":[{"name":"http","port":80}]}`)[0]
		s.slice("reborn-1", "reborn", "IPv4", httpPort, pods(n)...)
		return at(ip, 80)
	}
	const name = "default/reborn:80"
	i := s.run(t, "on_demand: true, idle: 2s", "path: direct\n")
	absent := func(why string) {
		t.Helper()
		testutil.Eventually(t, rig.Limit, func() bool { _, is := i.service(t, name); return !is }, "no ", name, " since it is ", why)
	}
	first := func(to netip.AddrPort, want int) {
		t.Helper()
		if got := i.Dial(t, to); got != pod(want).String() {
			t.Errorf("the first connection to %s: %s", to, got)
		}
		i.has(t, name, pod(want))
	}
	to := make(6)
	first(to, 6)
	absent("idle")
	first(to, 6)
	absent("idle again")
	// A connection that stays is use.
	if got := i.Open(t, to.String(), to); got != pod(6).String() {
		t.Fatalf("a connection that stays: %s", got)
	}
	for range 8 {
		i.has(t, name, pod(6))
		time.Sleep(time.Second / 2) // in all, twice what it may be idle for
	}
	if _, is := i.service(t, name); !is {
		t.Error("it is dropped although it has a connection")
	}
	s.gone("reborn")
	absent("deleted")
	// It holds its address, so that the next one has another.
	s.cluster.service("holder", fmt.Sprintf(`{"clusterIP":%q,"ports":[{"name":"http","port":80}]}`, to.Addr()))
	next := make(7)
	if next == to {
		t.Fatalf("the address is %s again", to)
	}
	first(next, 7)
	i.Close(t, "")
	s.must(http.MethodDelete, servicesPath+"/holder", "")
}
