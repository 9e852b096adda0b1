package direct

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// Ports of the world, and what becomes of a connection there.
const (
	portEcho    = 7000
	portRefused = 7001
	portReset   = 7002
	portSilent  = 7003
)

// resets reads a word, and ends the connection by a reset.
func resets(c net.Conn) {
	c.Read(make([]byte, 5))
	c.(*net.TCPConn).SetLinger(0)
}

// passed are destinations that are left alone for a reason.
type passed struct {
	reason flow.Reason
	far    netip.Addr // where servers are
	void   netip.Addr // where nobody is
}

func passes() []passed {
	addr := netip.MustParseAddr
	return []passed{
		{flow.ReasonDefaultPass, rig.Far4, rig.Void4},
		{flow.ReasonDefaultPass, rig.Far6, addr("2001:db8:8::7")},
		{flow.ReasonExcluded, addr("198.51.100.20"), addr("203.0.113.20")},
		{flow.ReasonExcluded, addr("2001:db8:7::20"), addr("2001:db8:8::20")},
		{flow.ReasonService, addr("198.51.100.30"), addr("203.0.113.30")},
		{flow.ReasonService, addr("2001:db8:7::30"), addr("2001:db8:8::30")},
	}
}

// passing makes a world with them, and an instance that passes them.
func passing(t *testing.T) (*world, *rig.Instance) {
	t.Helper()
	w := newWorld(t)
	silence(t, w)
	var exclude []string
	services := ""
	for _, p := range passes() {
		w.Serve(t, netip.AddrPortFrom(p.far, portEcho), echo)
		w.Serve(t, netip.AddrPortFrom(p.far, portReset), resets)
		switch p.reason {
		case flow.ReasonExcluded:
			exclude = append(exclude, fmt.Sprintf("%q", p.far), fmt.Sprintf("%q", p.void))
		case flow.ReasonService:
			for _, port := range []uint16{portEcho, portRefused, portReset} {
				services += service(netip.AddrPortFrom(p.far, port), ", path: pass")
			}
			services += service(netip.AddrPortFrom(p.void, portSilent), ", path: pass")
		}
	}
	return w, w.with(t, "default: pass\nexclude: ["+strings.Join(exclude, ", ")+"]\nservices:\n"+services)
}

// silence has the world drop what is for the addresses that nobody has.
func silence(t *testing.T, w *world) {
	t.Helper()
	for version, to := range map[string]string{"-4": "203.0.113.0/24", "-6": "2001:db8:8::/48"} {
		w.command(t, w.World, "ip", version, "route", "add", "blackhole", to)
	}
}

// ended is how a connection ends, by what an application does where.
type ended struct {
	port  uint16
	steps string
	saw   string
	end   flow.Reason
	// words were sent, and came back.
	sent, received uint64
}

func endings() []ended {
	return []ended{
		{portEcho, "connect send=hello recv shutdown recv", talked + ", shutdown=0, recv=0", flow.ReasonClosed, 5, 5},
		{portReset, "connect send=hello recv", "connect=0, send=5, recv=-1 ECONNRESET", flow.ReasonReset, 5, 0},
		{portRefused, "connect", refused, flow.ReasonDialRefused, 0, 0},
		{portSilent, "syncnt=1 connect", "connect=-1 ETIMEDOUT", flow.ReasonDialTimeout, 0, 0},
	}
}

// check looks at a record.
func (e ended) check(t *testing.T, r flow.Record, reason flow.Reason) {
	t.Helper()
	answered := e.end == flow.ReasonClosed || e.end == flow.ReasonReset
	if r.Path != flow.PathPass || r.Reason != reason || r.End != e.end || r.Sent != e.sent || r.Received != e.received ||
		r.Endpoint.IsValid() || r.Attempts != 0 || r.Mirrored || r.Open || r.Duration <= 0 ||
		(r.Connect > 0) != answered || r.Connect > r.Duration || (r.RTT > 0) != answered ||
		(r.Retransmits > 0) != (e.end == flow.ReasonDialTimeout) || (r.Service != "") != (reason == flow.ReasonService) {
		t.Errorf("want %s for %s, %d bytes sent and %d received: %+v", e.end, reason, e.sent, e.received, r)
	}
}

// ways are the destinations of a port, a mapped one with it.
func (p passed) ways(port uint16) []netip.AddrPort {
	to := netip.AddrPortFrom(p.far, port)
	if port == portSilent {
		to = netip.AddrPortFrom(p.void, port)
	}
	if to.Addr().Is4() {
		return []netip.AddrPort{to, mapped(to)}
	}
	return []netip.AddrPort{to}
}

// pass has applications connect, and looks at what they see.
func (w *world) pass(t *testing.T, p passed) {
	for _, e := range endings() {
		for _, to := range p.ways(e.port) {
			saw, peer := e.saw, fmt.Sprintf("connect=0, peer=0 %s %d", to.Addr(), to.Port())
			if after, ok := strings.CutPrefix(saw, "connect=0"); ok {
				saw = peer + after
			} else {
				saw += ", peer=-1 ENOTCONN"
			}
			w.wants(t, to, strings.Replace(e.steps, "connect", "connect peer", 1), saw)
		}
	}
}

// TestPass observes what the kernel carries: excluded, passed by default, and a
// service that is to be passed.
func TestPass(t *testing.T) {
	w, i := passing(t)
	var running sync.WaitGroup
	for _, p := range passes() {
		running.Go(func() { w.pass(t, p) })
	}
	running.Wait()
	made, answered, sent, received, again := 0, 0, 0, 0, 0
	for _, p := range passes() {
		for _, e := range endings() {
			ways := p.ways(e.port)
			for _, r := range recordsOf(t, i, ways[0], len(ways)) {
				e.check(t, r, p.reason)
				made++
				sent += int(r.Sent)
				received += int(r.Received)
				again += int(r.Retransmits)
				if r.Connect > 0 {
					answered++
				}
			}
		}
	}
	total := 0
	for _, kind := range i.Totals(t) {
		if kind.Path != flow.PathPass {
			t.Errorf("%d connections took %s (%s), want pass", kind.Count, kind.Path, kind.Reason)
		}
		total += kind.Count
	}
	for name, want := range map[string]int{
		`pillion_bytes_total{direction="sent",path="pass"}`:      sent,
		`pillion_bytes_total{direction="received",path="pass"}`:  received,
		`pillion_retransmits_total{path="pass"}`:                 again,
		`pillion_connect_duration_seconds_count{path="pass"}`:    answered,
		`pillion_rtt_seconds_count{path="pass"}`:                 answered,
		`pillion_connection_duration_seconds_count{path="pass"}`: made,
		`pillion_unaccounted_connections`:                        0,
	} {
		if n := i.Metric(t, name); n != want {
			t.Errorf("%s is %d, want %d", name, n, want)
		}
	}
	if total != made {
		t.Errorf("%d connections are counted, want %d", total, made)
	}
}

// TestLive lists what is open, on each of the paths of the kernel.
func TestLive(t *testing.T) {
	w := newWorld(t)
	one, two := w.Serve(t, netip.AddrPortFrom(rig.Far4, portEcho), echo), w.Serve(t, netip.AddrPortFrom(rig.Far6, portEcho), echo)
	direct4, direct6 := at("10.96.0.1:80"), at("[fd00:96::1]:80")
	silence(t, w)
	pass4, silent := netip.AddrPortFrom(rig.Far4, portEcho), netip.AddrPortFrom(rig.Void4, portSilent)
	i := w.with(t, "default: pass\npath: direct\nservices:\n"+service(direct4, "", one)+service(direct6, "", two))
	type open struct {
		path     flow.Path
		reason   flow.Reason
		endpoint netip.AddrPort
		attempts int
		sent     uint64
	}
	want := map[netip.AddrPort]open{
		direct4: {flow.PathDirect, flow.ReasonService, one, 1, 5},
		direct6: {flow.PathDirect, flow.ReasonService, two, 1, 5},
		pass4:   {flow.PathPass, flow.ReasonDefaultPass, netip.AddrPort{}, 0, 5},
		two:     {flow.PathPass, flow.ReasonDefaultPass, netip.AddrPort{}, 0, 5},
		silent:  {flow.PathPass, flow.ReasonDefaultPass, netip.AddrPort{}, 0, 0},
	}
	var ends []func()
	for to, o := range want {
		steps := talk + " wait"
		if o.sent == 0 {
			steps = "nonblock connect wait"
		}
		ends = append(ends, w.hold(t, to, steps))
	}
	live := func() map[netip.AddrPort]flow.Record {
		out, err := w.Pillion(t, "flows", "--live", "--instance", i.Name, "-o", "json")
		if err != nil {
			t.Fatal(err)
		}
		var all []flow.Record
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			t.Fatal(err)
		}
		by := map[netip.AddrPort]flow.Record{}
		for _, r := range all {
			by[r.OrigDst] = r
		}
		return by
	}
	have := live()
	if len(have) != len(want) {
		t.Errorf("%d are open, want %d: %+v", len(have), len(want), have)
	}
	for to, o := range want {
		r := have[to]
		if r.Path != o.path || r.Reason != o.reason || r.Endpoint != o.endpoint || r.Attempts != o.attempts || !r.Open || r.End != flow.ReasonNone || r.Cgroup != w.Scope.ID ||
			r.Sent != o.sent || r.Received != o.sent || (r.Connect > 0) != (o.sent > 0) || (r.RTT > 0) != (o.sent > 0) || r.Duration <= 0 {
			t.Errorf("%s is open, want %+v: %+v", to, o, r)
		}
	}
	for _, end := range ends {
		end()
	}
	testutil.Eventually(t, rig.Limit, func() bool { return len(live()) == 0 }, "nothing is open any more")
	for to := range want {
		if r := recordsOf(t, i, to, 1)[0]; r.Cookie != have[to].Cookie {
			t.Errorf("%s ended as %+v, and was open as %+v", to, r, have[to])
		}
	}
	nobody(t, i)
}

// hold has an application do its steps, the last of which is to wait, and returns
// what lets it end.
func (w *world) hold(t *testing.T, to netip.AddrPort, steps string) (end func()) {
	t.Helper()
	cmd := exec.Command(w.app, append([]string{to.Addr().String(), fmt.Sprint(to.Port())}, strings.Fields(steps)...)...)
	var out, errs rig.Log
	cmd.Stdout, cmd.Stderr = &out, &errs
	in, err := cmd.StdinPipe()
	if err == nil {
		err = w.Start(cmd)
	}
	if err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, rig.Limit, func() bool { return strings.Contains(out.String(), `"wait"`) }, steps, " to ", to, &out, &errs)
	return func() {
		io.WriteString(in, "\n")
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s to %s: %v: %s", steps, to, err, errs.String())
		}
	}
}
