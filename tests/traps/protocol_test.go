package traps

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

// protocolTraps are those of how a proxy speaks TCP, and of what rides on it.
var protocolTraps = []trap{
	{
		number: 20, title: "Protocols whose server speaks first hang",
		how: "A banner arrives without a byte from the application, over IPv4 and IPv6; so does one that comes late.",
		links: []string{"istio/api/pull/1033", "istio/istio/issues/16581", "istio/istio/issues/16835", "istio/istio/issues/38284",
			"istio/istio/issues/35232", "istio/istio/issues/14028"},
		run: serverFirst,
	},
	{
		number: 21, title: "A half-closed connection is cut, or leaks",
		how: "Either side ends its direction first, before or after bytes, and the other goes on for a mebibyte; " +
			"a connection that the application closes while nobody reads or writes is noticed by the server.",
		links: []string{"envoyproxy/envoy/issues/2067", "envoyproxy/envoy/issues/2386", "envoyproxy/envoy/issues/47378", "istio/istio/issues/43297",
			"linkerd/linkerd2/issues/5180", "linkerd/linkerd2/issues/8033", "linkerd/linkerd2/issues/473", "inetaf/tcpproxy/issues/21",
			"golang/go/issues/67337", "golang/go/pull/65719", "caddyserver/caddy/issues/8026", "tailscale/tailscale/pull/20879"},
		run: halfClose,
	},
	{
		number: 22, title: "A reset becomes an end, an end a reset; connecting to a dead backend succeeds",
		how: "A reset by the server is one for the application, with and without bytes before it, and the other way round; " +
			"an end stays an end; and connect(2) to where nobody listens fails, so that the application tries elsewhere.",
		links: []string{"istio/ztunnel/issues/1483", "istio/ztunnel/issues/1183", "envoyproxy/envoy/issues/2703", "envoyproxy/envoy/issues/28817",
			"envoyproxy/envoy/issues/44148", "envoyproxy/envoy/issues/46519", "envoyproxy/envoy/issues/45267"},
		run: resets,
	},
	{
		number: 23, title: "A new configuration cuts long-lived connections",
		links: []string{"istio/istio/issues/11971", "istio/istio/issues/12245", "istio/istio/issues/19198", "istio/istio/issues/34989",
			"istio/istio/issues/53539", "envoyproxy/envoy/issues/8564", "envoyproxy/envoy/issues/30037"},
		open: "a reload cuts none, which tests/live holds; it is not tried with the others yet",
	},
	{
		number: 24, title: "An upgrade of the proxy resets every connection",
		links: []string{"istio/istio/issues/51126", "istio/istio/issues/51805", "istio-ecosystem/sail-operator/issues/1552",
			"istio/ztunnel/issues/519", "istio/ztunnel/issues/311"},
		open: "the upgrade that hands connections over is planned; what a restart does is in 32, 37, 43 and 44",
	},
	{
		number: 25, title: "The HTTP keep-alive race gives 503s",
		links: []string{"envoyproxy/envoy/issues/8639", "envoyproxy/envoy/issues/14981", "istio/istio/issues/55138", "istio/istio/issues/13205"},
		open:  "the path http is planned",
	},
}

func serverFirst(t testing.TB, s *site) {
	speak := make(chan bool)
	now4, now6 := s.server(at4(7000), says("banner")), s.server(at6(7000), says("banner"))
	late := s.server(at4(7001), func(c net.Conn) {
		<-speak
		says("banner")(c)
	})
	s.start()
	for n, c := range []*net.TCPConn{s.dial(t, now4), s.dial(t, now6), s.dial(t, late)} {
		if n == 2 {
			close(speak)
		}
		if got := line(c); got != "banner" {
			t.Errorf("server %d says %s", n, got)
		}
		c.Close()
	}
	s.relayed(t, 3)
}

func halfClose(t testing.TB, s *site) {
	block := noise(1 << 20)
	// The application ends first; then the server sends all it has.
	first := s.server(at4(7000), func(c net.Conn) {
		if b, err := io.ReadAll(c); err == nil && string(b) == "question" || len(b) == 0 {
			c.Write(block)
		}
	})
	// The server ends first; then the application sends all it has.
	sum := make(chan string, 4)
	last := s.server(at4(7001), func(c net.Conn) {
		io.WriteString(c, "bye")
		c.(*net.TCPConn).CloseWrite()
		b, err := io.ReadAll(c)
		sum <- fmt.Sprintf("%d %v %v", len(b), bytes.Equal(b, block), err)
	})
	// Nobody reads or writes.
	ends := make(chan bool, 4)
	silent := s.server(at4(7002), func(c net.Conn) {
		io.WriteString(c, "x\n")
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { ends <- ready(int(fd), unix.POLLRDHUP, rig.Limit) })
		}
		if err != nil {
			ends <- false
		}
	})
	s.start()

	for _, said := range []string{"question", ""} {
		c := s.dial(t, first)
		io.WriteString(c, said)
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, block) {
			t.Errorf("half-closed after %d bytes, the application reads %d of %d, then %s", len(said), len(b), len(block), ending(err))
		}
		c.Close()
	}
	c := s.dial(t, last)
	if b, err := io.ReadAll(c); err != nil || string(b) != "bye" {
		t.Fatalf("the application reads %q, then %s", b, ending(err))
	}
	if _, err := c.Write(block); err != nil {
		t.Errorf("writing after the server's end: %v", err)
	}
	c.Close()
	if got, want := from(t, sum), fmt.Sprintf("%d true <nil>", len(block)); got != want {
		t.Errorf("half-closed itself, the server reads %s, want %s", got, want)
	}
	c = s.dial(t, silent)
	hears(t, c)
	c.Close()
	if !from(t, ends) {
		t.Error("the server never sees that the application has closed")
	}
	s.relayed(t, 4)
}

// hears ends the test unless the server says x.
func hears(t testing.TB, c *net.TCPConn) {
	t.Helper()
	if got := line(c); got != "x" {
		t.Fatalf("the application hears %s", got)
	}
}

func resets(t testing.TB, s *site) {
	block := noise(100000)
	seen := make(chan error, 4)
	bare := s.server(at4(7000), func(c net.Conn) {
		c.Read(make([]byte, 1))
		abort(c)
	})
	after := s.server(at4(7001), func(c net.Conn) {
		c.Write(block)
		c.Read(make([]byte, 1)) // the application has read all
		abort(c)
	})
	watch := s.server(at4(7002), func(c net.Conn) {
		io.WriteString(c, "x\n")
		_, err := io.Copy(io.Discard, c)
		seen <- err
	})
	dead := s.nobody(at4(7009))
	s.start()

	c := s.dial(t, bare)
	io.WriteString(c, "x")
	if _, err := io.ReadAll(c); !isReset(err) {
		t.Errorf("a reset by the server: the application reads %s", ending(err))
	}
	c.Close()
	c = s.dial(t, after)
	if _, err := io.ReadFull(c, make([]byte, len(block))); err != nil {
		t.Errorf("before the reset: %v", err)
	}
	io.WriteString(c, "x")
	if _, err := io.ReadAll(c); !isReset(err) {
		t.Errorf("a reset by the server, after bytes: the application reads %s", ending(err))
	}
	c.Close()
	c = s.dial(t, watch)
	hears(t, c)
	abort(c)
	if err := from(t, seen); !isReset(err) {
		t.Errorf("a reset by the application: the server reads %s", ending(err))
	}
	c = s.dial(t, watch)
	hears(t, c)
	io.WriteString(c, "bytes")
	c.Close()
	if err := from(t, seen); err != nil {
		t.Errorf("an end by the application: the server reads %s", ending(err))
	}
	s.relayed(t, 4)
	refused(t, s, "nobody listens", dead)
}

// ending is how a stream ended.
func ending(err error) string {
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return "an end"
	case isReset(err):
		return "a reset"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "nothing"
	}
	return err.Error()
}
