package matrix

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
)

// firstPort is below those that the kernel gives away.
const firstPort = 20000

// TestMatrix makes every connection without Pillion, and then with it.
func TestMatrix(t *testing.T) {
	w := newWorld(t)
	nextPort := firstPort
	before := map[string][]seen{}
	for _, c := range w.cells(&nextPort) {
		before[c.String()] = w.baseline(t, c)
	}
	t.Run("adaptive", func(t *testing.T) {
		i := w.Run(t, "")
		i.Prefer(t)
		s := &sight{t: t, world: w, instance: i}
		for _, c := range w.cells(&nextPort) {
			w.tune(t, c)
			s.add(c, before[c.String()], w.use(t, c))
		}
		s.check()
	})
}

// tune has listeners take data with a SYN, or not.
func (w *world) tune(t *testing.T, c cell) {
	t.Helper()
	if c.fastOpen == w.tuned {
		return
	}
	w.tuned = c.fastOpen
	value := fastOpenClient
	if c.fastOpen {
		value = fastOpenBoth
	}
	w.App.Sysctl(t, "net/ipv4/tcp_fastopen", value)
}

// baseline makes the connections of a cell without Pillion.
func (w *world) baseline(t *testing.T, c cell) []seen {
	t.Helper()
	w.tune(t, c)
	all := w.use(t, c)
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

// sound checks what can be said of a connection by itself.
func (c cell) sound(t *testing.T, s seen, wanted, when string) {
	t.Helper()
	want := seen{To: s.To, Error: wanted}
	if isError(wanted) {
		if s.Error != wanted {
			t.Errorf("%v, %s: error %q, want %q", c, when, s.Error, wanted)
		}
		return
	}
	if s.Error != want.Error && s.Error != "" || !s.Same || s.Sent != size || s.Got != size || s.Peer != s.To {
		t.Errorf("%v, %s: %+v", c, when, s)
	}
	if c.bound && s.OwnPort != c.sourcePort {
		t.Errorf("%v, %s: port %d, bound to %d", c, when, s.OwnPort, c.sourcePort)
	}
}

// isError tells the name of an error of the kernel's.
func isError(wanted string) bool { return strings.HasPrefix(wanted, "E") }

// sight is what was seen with one instance.
type sight struct {
	t        *testing.T
	world    *world
	instance *rig.Instance
	conns    []conn
}

// conn is one connection, and what is wanted of it.
type conn struct {
	cell
	seen
	wanted string
}

func (s *sight) add(c cell, before, after []seen) {
	s.t.Helper()
	wanted := c.wanted(c.family)
	if len(after) != len(before) || len(after) != len(wanted) {
		s.t.Errorf("%v: %d connections, %d without Pillion, want %d", c, len(after), len(before), len(wanted))
		return
	}
	for n, a := range after {
		c.sound(s.t, a, wanted[n], "with Pillion")
		if b := before[n]; a.alike(c.way) != b.alike(c.way) {
			s.t.Errorf("%v:\n   with: %+v\nwithout: %+v", c, a, b)
		}
		s.conns = append(s.conns, conn{c, a, wanted[n]})
	}
}

// ends is what tells one connection from another.
type ends struct{ source, dest netip.AddrPort }

// check compares all with what Pillion has recorded.
func (s *sight) check() {
	s.t.Helper()
	s.instance.Idle(s.t)
	records := map[ends][]flow.Record{}
	all, err := s.instance.Flows(context.Background(), admin.FlowQuery{})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, r := range all {
		e := ends{r.Source, r.OrigDst}
		records[e] = append(records[e], r)
	}
	s.t.Log(len(all), s.instance.Reasons(s.t))
	for _, c := range s.conns {
		e := ends{addrPort(s.t, c.Own, c.OwnPort), addrPort(s.t, c.To, c.PeerPort)}
		have := records[e]
		if len(have) == 0 {
			if c.wanted != unseen && !isError(c.wanted) {
				s.t.Errorf("%v: no record of %v to %v", c, e.source, e.dest)
			}
			continue
		}
		s.t.Logf("%v: %+v", c, have[0])
		records[e] = slices.Delete(have, 0, 1)
	}
}
