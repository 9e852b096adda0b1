package matrix

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// modes are the values of the key connect.
var modes = []string{"adaptive", "mirror", "early"}

// TestMatrix makes every connection without Pillion, and then with it.
func TestMatrix(t *testing.T) {
	w := newWorld(t)
	found, directly := w.compare(t)
	var rows, columns []string
	for _, f := range families() {
		columns = append(columns, f.title)
	}
	for _, way := range ways() {
		rows = append(rows, way.title)
	}
	found.compare(t, waySection, rows, columns)
	directly.compare(t, directSection, rows, columns)
}

// compare makes connections without Pillion, and then with it in every mode, and
// by direct.
func (w *world) compare(t *testing.T) (found, directly table) {
	t.Helper()
	before := map[string][]seen{}
	for _, c := range w.cells() {
		before[c.String()] = w.baseline(t, c)
	}
	found, directly = table{}, table{}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) { w.with(t, mode, w.cells(), before, found) })
	}
	t.Run(direct, func(t *testing.T) { w.with(t, direct, w.cells(), before, directly) })
	return found, directly
}

// baseline makes the connections of a cell without Pillion.
func (w *world) baseline(t *testing.T, c cell) []seen {
	t.Helper()
	all := w.start(t, c).end(t)
	wanted := c.wanted(c.family)
	if len(all) != len(wanted) {
		t.Errorf("%v: %d connections without Pillion, want %d", c, len(all), len(wanted))
		return nil
	}
	for n, s := range all {
		c.sound(t, s, wanted[n], "without Pillion")
	}
	return all
}

// with makes all connections beside an instance.
func (w *world) with(t *testing.T, mode string, cells []cell, before map[string][]seen, found table) {
	early := map[string]*process{}
	for _, c := range cells {
		if c.gated {
			early[c.String()] = w.start(t, c)
		}
	}
	w.tune(t, true)
	s := w.instance(t, mode, found, port)
	for _, c := range cells {
		if a, ok := early[c.String()]; ok {
			s.add(t, c, before[c.String()], a.end(t))
		}
	}
	for _, c := range cells {
		if !c.gated {
			s.add(t, c, before[c.String()], w.start(t, c).end(t))
		}
	}
	s.check(t)
	s.held(t, mode)
	if s.direct {
		s.settled(t, true)
	}
}

// instance starts one in a mode, or one that has services at the ports for the
// arm direct.
func (w *world) instance(t *testing.T, mode string, found table, ports ...string) *sight {
	t.Helper()
	s := &sight{world: w, found: found, direct: mode == direct, picked: map[netip.AddrPort]int{}}
	config := "connect: " + mode
	if s.direct {
		config = directly(ports...)
	}
	s.instance = w.Run(t, config)
	return s
}

// sound checks what can be said of a connection by itself.
func (c cell) sound(t *testing.T, s seen, wanted, when string) {
	t.Helper()
	if isError(wanted) {
		if s.Error != wanted {
			t.Errorf("%v, %s: error %q, want %q", c, when, s.Error, wanted)
		}
		return
	}
	peer := s.To
	if s.Protocol == mptcp {
		// The kernel's own way: there is no scope in its answer.
		peer, _, _ = strings.Cut(peer, "%")
	}
	if s.Error != "" || !s.Same || s.Sent != size || s.Got != size || s.Peer != peer || fmt.Sprint(s.PeerPort) != port {
		t.Errorf("%v, %s: %+v", c, when, s)
	}
	if s.To == c.routed || s.To == c.behind {
		if bound := c.way.name == "routed_bind"; (s.Own == c.source) != bound {
			t.Errorf("%v, %s: from %s", c, when, s.Own)
		}
	}
	if c.bound && s.OwnPort != c.sourcePort {
		t.Errorf("%v, %s: port %d, bound to %d", c, when, s.OwnPort, c.sourcePort)
	}
}

// alike is what must not differ with Pillion. A free port is another one every
// time; a bound one is looked at by itself. The SYN goes to the handler, which
// takes no data with it: a matter of latency.
func (s seen) alike() seen {
	s.OwnPort, s.SynData = 0, 0
	return s
}

// isError tells the name of an error of the kernel's.
func isError(wanted string) bool { return strings.HasPrefix(wanted, "E") }
