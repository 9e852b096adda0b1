package connect

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// What a connection is that was early to a dead server, and what it is like
// without Pillion.
const (
	alive   = "connect=0, send=5, recv=5 hello"
	refused = "connect=-1 ECONNREFUSED"
)

// lostEarly tells whether an application was connected early, and then learned
// that there is nobody.
func lostEarly(saw string) bool {
	return strings.HasPrefix(saw, "connect=-1 ECONNRESET") || saw == "connect=0, send=5, recv=-1 ECONNRESET" || saw == "connect=0, send=-1 ECONNRESET, recv=0" ||
		saw == "connect=0, send=-1 EPIPE, recv=0" || saw == "connect=0, send=-1 EPIPE, recv=-1 ECONNRESET"
}

// closing is a server that can be closed and opened again.
type closing struct {
	g  *ground
	at netip.AddrPort
	ln net.Listener
	up chan struct{} // closed when it no longer accepts
}

func (c *closing) open(t testing.TB) {
	t.Helper()
	c.ln = c.g.Listen(t, c.at)
	c.up = make(chan struct{})
	go c.serve(c.ln, c.up)
}

func (c *closing) serve(ln net.Listener, up chan struct{}) {
	defer close(up)
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go echoAndEnd(conn)
	}
}

func echoAndEnd(c net.Conn) {
	defer c.Close()
	echo(c)
}

func (c *closing) close() {
	c.ln.Close()
	<-c.up
}

// TestAdaptive follows one destination through its life: new and dead, alive,
// dead again, alive again. Only those that connect before anybody can know are
// reset.
func TestAdaptive(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	var b strings.Builder
	fmt.Fprintf(&b, "connect: adaptive\nservices:\n")
	// A service of one endpoint is judged by that, like an unnamed destination.
	targets := map[string]*closing{}
	for name, f := range families {
		at := netip.AddrPortFrom(f.far, 9200)
		targets[name] = &closing{g: g, at: at}
		b.WriteString(service(netip.AddrPortFrom(f.vip, 9200), "", netip.AddrPortFrom(f.far, 9201)))
		targets["service/"+name] = &closing{g: g, at: netip.AddrPortFrom(f.far, 9201)}
	}
	i := g.with(t, b.String())
	for name, c := range targets {
		t.Run(name, func(t *testing.T) {
			to := c.at
			if family, ok := strings.CutPrefix(name, "service/"); ok {
				to = netip.AddrPortFrom(families[family].vip, 9200)
			}
			live(t, g, i, c, to)
		})
	}
}

func live(t *testing.T, g *ground, i *rig.Instance, c *closing, to netip.AddrPort) {
	for range 5 {
		g.wants(t, to, "connect", refused)
	}
	for range 2 {
		c.open(t)
		// A service may know for a while that its endpoint is dead.
		testutil.Eventually(t, rig.Limit, func() bool {
			return g.do(t, to, "connect send=hello recv").String() == alive
		}, "it is connected once it lives")
		for range 20 {
			g.wants(t, to, "connect send=hello recv", alive)
		}
		c.close()
		// Those that came early have ended when the first is refused.
		var early int
		for n := 0; ; n++ {
			saw := g.do(t, to, "connect send=hello recv").String()
			if strings.HasPrefix(saw, refused) {
				break
			}
			if !lostEarly(saw) || n == 5 {
				t.Fatalf("connection %d after the server's death: %s", n, saw)
			}
			early++
		}
		t.Logf("%d connected early to the dead server", early)
		for range 20 {
			g.wants(t, to, "connect", refused)
		}
	}
	i.Idle(t)
}

// TestAdaptiveIsEarly proves that what answered lately is early: the connect to
// it succeeds while its SYNs are dropped.
func TestAdaptiveIsEarly(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	g.with(t, "connect: adaptive")
	for _, at := range farEach(portDrops) {
		g.answer(t, true)
		g.wants(t, at, "connect send=hello recv", alive)
		g.answer(t, false)
		a := g.begin(t, arguments(at, "sndtimeo=20000", "connect", "wait")...)
		if r := a.await(t, "connect"); r.Ret != 0 {
			t.Errorf("%s: %s", at, r)
		}
		a.kill()
	}
}

// TestEarly is the way of before: every connect succeeds, and a failed dial is a
// reset.
func TestEarly(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	g.with(t, "connect: early")
	for _, port := range []uint16{portClosed, portReset, portLateICMP} {
		for _, at := range farEach(port) {
			g.wants(t, at, "connect recv", "connect=0, recv=-1 ECONNRESET")
		}
	}
	for _, at := range farEach(portEcho) {
		g.wants(t, at, "connect send=hello recv", alive)
	}
}

// TestExecConnect gives the mode by exec's flag.
func TestExecConnect(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	for mode, want := range map[string]string{"mirror": "-1", "adaptive": "-1", "early": "0"} {
		args := append([]string{g.app}, arguments(far4(portClosed), "connect")...)
		out, stderr, err := g.Exec(t, []string{"--connect", mode}, args...)
		if err != nil || !strings.Contains(out, `"ret":`+want+`,`) {
			t.Errorf("exec --connect %s: %s %v\n%s", mode, out, err, stderr)
		}
	}
	_, stderr, err := g.Exec(t, []string{"--connect", "late"}, g.app)
	if err == nil || !strings.Contains(stderr, "late") {
		t.Errorf("exec --connect late: %v\n%s", err, stderr)
	}
}
