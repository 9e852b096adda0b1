package model

import (
	"io"
	"net"
	"net/netip"
	"reflect"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
)

// TestGenerate holds scripts to what can be told without playing them: a seed
// gives the same one again, and every one ends.
func TestGenerate(t *testing.T) {
	kinds := map[kind]int{}
	for seed := range uint64(5000) {
		s := generate(seed, seed%2 == 0)
		if !reflect.DeepEqual(s, generate(seed, seed%2 == 0)) {
			t.Fatalf("seed %d gives another script each time", seed)
		}
		open := [2]bool{}
		for i, st := range s.Steps {
			for k, o := range st.Ops {
				if o == nil {
					continue
				}
				kinds[o.Kind]++
				switch {
				case o.Kind == opConnect || o.Kind == opAccept:
					open[k] = true
				case o.Kind >= opPending:
				case !open[k]:
					t.Fatalf("step %d of a socket that is closed\n%v", i, s)
				case o.Kind == opClose || o.Kind == opReset || o.Then == opClose || o.Then == opReset:
					open[k] = false
				}
			}
		}
		if open[client] || open[server] {
			t.Fatalf("a socket is left open\n%v", s)
		}
	}
	for k := range kindNames {
		if kinds[kind(k)] == 0 {
			t.Errorf("no script has %q", kindNames[k])
		}
	}
}

// TestShrink leaves out what a failure does not need.
func TestShrink(t *testing.T) {
	s := generate(7, false)
	less := shrink(s, func(s *script) bool {
		for _, st := range s.Steps {
			if o := st.Ops[client]; o != nil && (o.Kind == opClose || o.Kind == opReset) {
				return true
			}
		}
		return false
	})
	for _, st := range less.Steps {
		o := st.Ops[client]
		if ends := o != nil && (o.Kind == opClose || o.Kind == opReset); !ends && !st.needed() {
			t.Errorf("step %v is left", st)
		}
	}
}

// TestSees proves that scripts tell a relay of the simple kind from plain TCP: one
// that closes both sides at the first end.
func TestSees(t *testing.T) {
	w := newWorld(t, 1, "early")
	relays := [2]netip.AddrPort{}
	for f, six := range []bool{false, true} {
		addr := rig.Far4
		if six {
			addr = rig.Far6
		}
		to := w.endpoint(0, six)
		relays[f] = w.rig.Serve(t, netip.AddrPortFrom(addr, 0), func(c net.Conn) { w.relay(c, to) })
	}
	w.redirect = &road{server: w.direct.server, client: w.direct.client, at: w.listener}
	w.redirect.to = func(_ int, six bool) netip.AddrPort {
		if six {
			return relays[1]
		}
		return relays[0]
	}
	for seed := range uint64(60) {
		s := generate(seed, false)
		s.Limit = shrinkLimit
		c := w.compare(s, 0)
		if c.undecided != "" {
			t.Errorf("direct runs differ: %s\n%v", c.undecided, s)
		}
		if c.difference != "" {
			t.Logf("after %d scripts: %s", seed+1, c.difference)
			return
		}
	}
	t.Error("60 scripts see no difference")
}

// relay copies both ways until one ends.
func (w *world) relay(down net.Conn, to netip.AddrPort) {
	var up net.Conn
	err := w.rig.World.Run(func() (err error) {
		up, err = net.Dial("tcp", to.String())
		return err
	})
	if err != nil {
		return
	}
	ended := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{down, up}, {up, down}} {
		go func() {
			_, _ = io.Copy(way[1], way[0])
			ended <- struct{}{}
		}()
	}
	<-ended
	up.Close()
	down.Close()
	<-ended
}
