package traps

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/peers"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// lifeTraps are those of starting, ending and starting again.
var lifeTraps = []trap{
	{
		number: 32, title: "Connections go past the proxy while it restarts",
		how: "The proxy is killed and started again, and told to fail closed (Pillion): in between nothing reaches the server, and " +
			"afterwards all is carried.",
		links: []string{"kmesh-net/kmesh/issues/662", "kmesh-net/kmesh/issues/951", "kmesh-net/kmesh/issues/1409"},
		run:   restartGap,
	},
	{
		number: 36, title: "The application starts before the proxy",
		how:    "The first thing that a command under exec does is to connect: ten commands of ten are captured, and served.",
		links:  []string{"istio/istio/issues/11130", "istio/istio/issues/36681", "linkerd/linkerd2/issues/485", "aws/aws-app-mesh-roadmap/issues/334"},
		notFor: notForPeers(noLauncher),
		run:    startUp,
	},
	{
		number: 37, title: "The proxy ends before the application's last request",
		how: "Told to end as its documentation says (SIGTERM; SIGUSR1; SIGQUIT; a graceful drain), the proxy lets an open " +
			"connection go on, and the application can still open another one.",
		links: []string{"istio/istio/issues/51855", "istio/istio/issues/47718", "istio/istio/issues/36631", "istio/istio/issues/44690", "istio/istio/issues/36660"},
		run:   shutDown,
	},
	{
		number: 38, title: "A job never ends, since its sidecar does not",
		how:    "exec ends when its command does, with its exit code, also when a connection is still open; nothing is left.",
		links:  []string{"kubernetes/kubernetes/issues/25908", "istio/istio/issues/6324", "istio/istio/issues/19072"},
		notFor: notForPeers(noLauncher),
		run:    jobs,
	},
	{
		number: 43, title: "A restart without a gap needs both processes at once, which containers do not give",
		how:   "The new process starts when the old one is gone, as a container's does: connections that are opened in between are served.",
		links: []string{"envoyproxy/envoy/issues/7187", "envoyproxy/envoy/issues/23412", "envoyproxy/envoy/issues/35635"},
		run:   container,
	},
	{
		number: 44, title: "(Re)starting the interceptor resets the connections of users",
		how:    "A connection that is older goes on when the proxy starts, is killed, starts again and ends; so does (Pillion) one on the path pass.",
		links:  []string{"evilsocket/opensnitch/issues/1329"},
		notFor: notForNamed(isNamed),
		run:    bystanders,
	},
}

func restartGap(t testing.TB, s *site) {
	at := s.server(at4(7000), says("here"))
	s.extra = "on_failure: closed"
	s.start()
	ask := func() string {
		c, err := s.app.try(s.to(at))
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		return line(c)
	}
	if got := ask(); got != "here" {
		t.Fatalf("before, the server says %s", got)
	}
	for range 2 {
		s.kill()
		for range 20 {
			if got := ask(); got == "here" {
				t.Fatal("the server is reached while the proxy is away")
			}
		}
		s.again()
		if got := ask(); got != "here" {
			t.Errorf("afterwards, the server says %s", got)
		}
	}
	if s.sys == pillion {
		if n := s.Reasons(s.t)["handler_absent"]; n < 40 {
			t.Errorf("%d connections are counted as refused for want of a handler, want 40", n)
		}
	}
}

// self is this test binary.
func self(t testing.TB) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func startUp(t testing.TB, s *site) {
	at := s.server(at4(7000), whom)
	service := s.service(shop, at)
	for range 10 {
		out, errs, err := s.Exec(s.t, []string{"--service", fmt.Sprintf("%s=%s", service, at)}, self(t), roleApp, service.String())
		if err != nil {
			t.Fatalf("exec: %v\n%s", err, errs)
		}
		if _, err := netip.ParseAddrPort(strings.TrimSpace(out)); err != nil {
			t.Fatalf("the server says %q", out)
		}
	}
}

func shutDown(t testing.TB, s *site) {
	at := s.server(at4(7000), func(c net.Conn) {
		for b := bufio.NewReader(c); ; {
			text, err := b.ReadString('\n')
			if err != nil {
				return
			}
			io.WriteString(c, text)
		}
	})
	s.start()
	ask := func(c net.Conn) string {
		fmt.Fprintln(c, "still?")
		return line(c)
	}
	c := s.dial(t, at)
	if got := ask(c); got != "still?" {
		t.Fatalf("before, the server says %s", got)
	}
	s.tellToEnd()
	if got := ask(c); got != "still?" {
		t.Errorf("told to end, the open connection says %s", got)
	}
	last, err := s.app.try(s.to(at))
	if err != nil {
		t.Errorf("told to end, connect says %v", err)
	} else {
		if got := ask(last); got != "still?" {
			t.Errorf("told to end, a new connection says %s", got)
		}
		last.Close()
	}
	if got := ask(c); got != "still?" {
		t.Errorf("later, the open connection says %s", got)
	}
	c.Close()
	if s.sys == pillion {
		if err := s.Wait(s.t); err != nil {
			t.Errorf("run: %v", err)
		}
	}
}

// tellToEnd tells the system to end when its connections have, and waits until
// it has begun to.
func (s *site) tellToEnd() {
	s.t.Helper()
	switch s.sys {
	case pillion:
		s.Signal(s.t, unix.SIGTERM)
		testutil.Eventually(s.t, rig.Limit, func() bool { return strings.Contains(s.Log(), "draining") || wait() }, "Pillion drains")
		return
	case envoy:
		if err := s.envoyDrain(); err != nil {
			s.t.Fatal(err)
		}
		return
	case haproxy:
		s.peer.Cmd.Process.Signal(unix.SIGUSR1)
	case nginx:
		s.peer.Cmd.Process.Signal(unix.SIGQUIT)
	}
	testutil.Eventually(s.t, rig.Limit, func() bool { return !s.listens(s.to(s.endpoints[0])) || wait() }, s.sys, " listens no more")
}

func (s *site) envoyDrain() error {
	return s.App.Run(func() error {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", peers.EnvoyAdmin))
		if err != nil {
			return err
		}
		defer c.Close()
		io.WriteString(c, "POST /drain_listeners?graceful HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n")
		answer, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil {
			answer.Body.Close()
		}
		return err
	})
}

func jobs(t testing.TB, s *site) {
	at := s.server(at4(7000), says("here"))
	script := fmt.Sprintf("exec 3<>/dev/tcp/%s/%d; read -r text <&3; echo $text; exit 3", at.Addr(), at.Port())
	out, errs, err := s.Exec(s.t, []string{"--summary"}, "bash", "-c", script)
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.ExitCode() != 3 || strings.TrimSpace(out) != "here" {
		t.Errorf("exec: %v, want exit code 3; it says %q\n%s", err, out, errs)
	}
	if !strings.Contains(errs, flow.PathRelay.String()) {
		t.Errorf("the summary has no relay: %s", errs)
	}
	if routes := s.inside("ip", "route", "show", "table", "local"); strings.Contains(routes, "240.") {
		t.Errorf("a route is left:\n%s", routes)
	}
}

func container(t testing.TB, s *site) {
	at := s.server(at4(7000), says("here"))
	s.start()
	try := func(when string) bool {
		c, err := s.app.try(s.to(at))
		if err != nil {
			t.Errorf("%s, connect says %v", when, err)
			return false
		}
		defer c.Close()
		if got := line(c); got != "here" {
			t.Errorf("%s, the server says %s", when, got)
			return false
		}
		return true
	}
	s.kill()
	for range 20 {
		if !try("between the two") {
			break
		}
	}
	s.again()
	try("afterwards")
}

func bystanders(t testing.TB, s *site) {
	at := s.server(at4(7000), echo)
	passed := s.server(at4(7001), echo)
	says := func(c net.Conn, when string) {
		t.Helper()
		fmt.Fprintln(c, when)
		if got := line(c); got != when {
			t.Errorf("%s, an open connection says %s", when, got)
		}
	}
	// As on most machines, connections are tracked already: a redirection that
	// comes later then knows an old one.
	s.firewall("ct state invalid counter")
	old := s.dial(t, at)
	says(old, "before")
	s.extra = fmt.Sprintf("exclude: [\"%s/32:%d\"]", passed.Addr(), passed.Port())
	s.start()
	says(old, "started")
	var beside net.Conn = old
	if s.sys == pillion {
		beside = s.dial(t, passed)
		says(beside, "passed")
	}
	s.kill()
	says(old, "killed")
	says(beside, "killed")
	s.again()
	says(old, "started again")
	says(beside, "started again")
	s.kill()
	says(old, "ended")
	says(beside, "ended")
	if s.sys == pillion {
		s.again()
	}
}
