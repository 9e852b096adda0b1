package matrix

import (
	"context"
	"io"
	"net/http"
	"net/netip"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// sound checks what can be said of a client's connections by themselves.
func (c client) sound(t *testing.T, all []seen, to []target, when string) {
	t.Helper()
	if len(all) != len(to) {
		t.Errorf("%s, %s: %d connections, want %d", c.title, when, len(all), len(to))
		return
	}
	for n, s := range all {
		peer, want := netip.MustParseAddr(s.Peer), netip.MustParseAddr(to[n].peer)
		if c.unmaps {
			want = want.Unmap()
		}
		if !s.Same || s.Sent != size || s.Got != size || peer != want {
			t.Errorf("%s, %s, %s: %+v, want %s", c.title, to[n].title, when, s, want)
		}
	}
}

// client compares a client's connections beside the instance with those without
// it.
func (s *sight) client(t *testing.T, c client, mode string, before, after []seen) {
	t.Helper()
	to := targetsOf(c, mode)
	c.sound(t, after, to, "with Pillion")
	if len(after) != len(to) || len(before) != len(targetsOf(c, "")) {
		return
	}
	without := map[string]seen{}
	for n, b := range targetsOf(c, "") {
		without[b.title] = before[n]
	}
	want := c.want
	if want == "" {
		want = relay
	}
	want = s.arm(want)
	for n, a := range after {
		b := without[to[n].title]
		if a.alike() != b.alike() {
			t.Errorf("%s, %s:\n   with: %+v\nwithout: %+v", c.title, to[n].title, a, b)
		}
		a.To = a.Peer
		s.conns = append(s.conns, conn{cell{app: c.title, way: way{title: c.title}, family: family{title: to[n].title}}, a, want, c.curl != nil})
	}
}

// checkClients looks for the record of every connection. There are others, of
// attempts that were given up.
func (s *sight) checkClients(t *testing.T) {
	t.Helper()
	s.instance.Idle(t)
	s.instance.Conserved(t)
	s.instance.Ended(t, len(s.conns))
	all, err := s.instance.Flows(context.Background(), admin.FlowQuery{})
	if err != nil {
		t.Fatal(err)
	}
	records := map[ends]flow.Record{}
	for _, r := range all {
		if r.End == flow.ReasonClosed {
			records[ends{r.Source, r.OrigDst}] = r
		}
	}
	for _, c := range s.conns {
		e := c.ends(t)
		r, ok := records[e]
		if !ok {
			t.Errorf("%v: no record of %s to %s", c.cell, e.source, e.dest)
			continue
		}
		s.compare(t, c, r)
	}
	if n := s.instance.Reasons(t)[flow.ReasonNoDecision.String()]; n > 0 {
		t.Errorf("%d connections without a decision", n)
	}
}

// post answers a request of HTTP with what was posted.
func post(w http.ResponseWriter, r *http.Request) {
	if body, err := io.ReadAll(r.Body); err == nil {
		w.Write(body)
	}
}
