package traps

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/peers"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// site is one system, between an application and the world.
type site struct {
	*rig.Rig
	t   *testing.T // fails by what is no verdict
	sys system
	app *application
	// outer is the cgroup around the application's.
	outer *testutil.Cgroup
	// What the system is told.
	endpoints []netip.AddrPort // the destinations that the application will have
	services  []peers.Route
	extra     string // Pillion's configuration
	idle      time.Duration
	accessLog bool
	bare      bool // without any capability that it does not need
	// What runs then: Pillion, or a peer.
	*rig.Instance
	peer *rig.Process
	dir  string
}

func newSite(t *testing.T, sys system) *site {
	s := &site{Rig: rig.New(t), t: t, sys: sys, idle: time.Hour, dir: t.TempDir()}
	s.outer = s.Scope
	s.Scope = s.outer.Child(t, "app")
	s.app = startApplication(t, testutil.Place{NS: s.App, Cgroup: s.Scope})
	// The kernel adds the route to an own IPv6 address a little after the address.
	own := testutil.AppV6.Addr().String()
	testutil.Eventually(t, rig.Limit, func() bool {
		return strings.HasPrefix(s.inside("ip", "-6", "route", "get", own), "local "+own) || wait()
	}, "the application's own IPv6 address is local")
	return s
}

// server serves a destination of the application's.
func (s *site) server(addr netip.AddrPort, serve func(net.Conn)) netip.AddrPort {
	s.Serve(s.t, addr, serve)
	return s.nobody(addr)
}

// nobody is a destination that the test serves itself, or nobody does.
func (s *site) nobody(addr netip.AddrPort) netip.AddrPort {
	s.Give(s.t, addr.Addr())
	s.endpoints = append(s.endpoints, addr)
	return addr
}

// service is a destination that has an endpoint of its own.
func (s *site) service(addr, endpoint netip.AddrPort) netip.AddrPort {
	s.services = append(s.services, peers.Route{Listen: addr, Endpoint: endpoint})
	return addr
}

// start starts the system and waits until it serves.
func (s *site) start() {
	s.t.Helper()
	switch s.sys {
	case pillion:
		config := s.extra
		for n, r := range s.services {
			if n == 0 {
				config += "\nservices:\n"
			}
			config += fmt.Sprintf("  - {name: service%d, address: %q, endpoints: [%q]}\n", n, r.Listen, r.Endpoint)
		}
		s.Instance = s.Run(s.t, config)
	case naive:
		s.startNaive()
	case envoy:
		s.startPeer()
		s.redirect()
	default:
		s.startPeer()
	}
}

// startPeer starts a peer, also again.
func (s *site) startPeer() {
	s.t.Helper()
	c := peers.Config{Dir: s.dir, Workers: 2, Connections: 4096, Idle: s.idle, AccessLog: s.accessLog, Routes: slices.Clone(s.services)}
	if s.sys != envoy {
		for n := range c.Routes {
			c.Routes[n].Listen = s.to(c.Routes[n].Listen)
		}
		for _, e := range s.endpoints {
			c.Routes = append(c.Routes, peers.Route{Listen: s.to(e), Endpoint: e})
		}
	}
	cmd, err := peers.Command(string(s.sys), c)
	if err != nil {
		s.t.Fatal(err)
	}
	if s.bare {
		// It is still root, without any of root's rights.
		args := append([]string{"--bounding-set=-all", "--inh-caps=-all", cmd.Path}, cmd.Args[1:]...)
		cmd = exec.Command("setpriv", args...)
	}
	s.peer = rig.StartProcess(s.t, s.App, cmd, unix.SIGTERM)
	testutil.Eventually(s.t, rig.Limit, func() bool {
		s.peer.Running(s.t)
		return s.serving(c.Routes) || wait()
	}, s.sys, " serves\n", s.peer.Log)
}

// wait lets some time pass between two looks. It returns false.
func wait() bool {
	time.Sleep(10 * time.Millisecond)
	return false
}

// serving tells whether a peer serves: nobody dials it to find out, which the
// endpoints would see.
func (s *site) serving(routes []peers.Route) bool {
	if s.sys == envoy {
		return s.envoyReady() == nil
	}
	for _, r := range routes {
		if !s.listens(r.Listen) {
			return false
		}
	}
	return true
}

func (s *site) envoyReady() error {
	return s.App.Run(func() error {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", peers.EnvoyAdmin))
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET /ready HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n"); err != nil {
			return err
		}
		answer, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("envoy: %s", answer.Status)
		}
		return nil
	})
}

// listens tells whether anybody listens on an address of the application's.
func (s *site) listens(at netip.AddrPort) bool {
	out := s.inside("ss", "-Htnl", "src", at.String())
	return strings.Contains(out, at.String())
}

// inside runs a program beside the application.
func (s *site) inside(name string, args ...string) string {
	s.t.Helper()
	testutil.Need(s.t, name)
	cmd := exec.Command(name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := s.App.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		s.t.Fatalf("%s %v: %v\n%s", name, args, err, errs.String())
	}
	return out.String()
}

// redirect leads what the application's cgroup connects to Envoy, as a mesh
// does by the uid, but in a way that serves applications beside it, too.
func (s *site) redirect() {
	s.t.Helper()
	scope, err := filepath.Rel("/sys/fs/cgroup", s.Scope.Path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.inside("nft", fmt.Sprintf(`table inet mesh {
	chain output {
		type nat hook output priority -100;
		oif lo accept
		socket cgroupv2 level 2 %q meta l4proto tcp redirect to :%d
	}
}`, scope, peers.EnvoyPort))
}

// to is what the application dials to reach a destination.
func (s *site) to(addr netip.AddrPort) netip.AddrPort {
	if s.sys == pillion || s.sys == envoy {
		return addr
	}
	// The proxy itself, on a port for each destination.
	own := testutil.AppV4.Addr()
	if addr.Addr().Is6() {
		own = testutil.AppV6.Addr()
	}
	port := addr.Port()
	if other := slices.IndexFunc(s.endpoints, func(e netip.AddrPort) bool { return e == addr }); other > 0 {
		port += uint16(1000 * other)
	}
	return netip.AddrPortFrom(own, port)
}

// dial connects the application to a destination.
func (s *site) dial(t testing.TB, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	return s.app.dial(t, s.to(to))
}

// kill ends the system without its knowing.
func (s *site) kill() {
	s.t.Helper()
	if s.sys == pillion {
		s.Kill(s.t)
		return
	}
	s.peer.Kill(s.t)
}

// freeze keeps the system from running, or lets it again.
func (s *site) freeze(frozen bool) {
	s.t.Helper()
	switch {
	case s.sys != pillion:
		s.peer.Freeze(s.t, frozen)
	case frozen:
		s.Halt(s.t)
	default:
		s.Signal(s.t, unix.SIGCONT)
	}
}

// again starts the system that was killed.
func (s *site) again() {
	s.t.Helper()
	if s.sys == pillion {
		s.Launch(s.t)
		return
	}
	s.startPeer()
}

// late tells whether Pillion passed connections by because the machine was too
// busy for it: rightly, but then a test has seen something else.
func (s *site) late() bool {
	if s.Instance == nil {
		return false
	}
	st, err := s.Status(context.Background())
	return err == nil && st.Counters[flow.ReasonHandlerStale.String()]+st.Counters[flow.ReasonHandlerBusy.String()] > 0
}

// relayed fails the test unless at least n connections went by relay, and all
// that ended did.
func (s *site) relayed(t testing.TB, n int) {
	t.Helper()
	if s.sys == pillion {
		s.AllRelayed(t, n)
	}
}

// logged returns a line for each connection that has ended, with the address
// that was dialed and the endpoint.
func (s *site) logged(t testing.TB) []string {
	t.Helper()
	switch s.sys {
	case pillion:
		var lines []string
		records, err := s.Flows(context.Background(), admin.FlowQuery{})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range records {
			lines = append(lines, fmt.Sprintf("%s %s", r.OrigDst, r.Endpoint))
		}
		return lines
	case haproxy:
		return strings.Split(s.peer.Log.String(), "\n")
	}
	text, err := os.ReadFile(filepath.Join(s.dir, "access.log"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(string(text), "\n")
}
