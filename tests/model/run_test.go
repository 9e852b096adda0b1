package model

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// road is one way for the connections of a script: who connects, to what.
type road struct {
	client, server *remote
	// to is what the client dials, by lane and family, and at what the server
	// listens.
	to, at func(lane int, six bool) netip.AddrPort
}

// run plays a script and returns what came of it, a line for each operation.
// trouble is what no road may have.
func (w *road) run(s *script, lane int) (lines []string, trouble string) {
	if err := w.server.order(w.fill(&order{Lane: lane, Op: op{Kind: opListen}}, s, server)); err != nil {
		return nil, err.Error()
	}
	if r := w.server.answer(lane); r.ReadError != 0 || r.Trouble != "" {
		return nil, fmt.Sprintf("listen: %v %s", r.ReadError, r.Trouble)
	}
	var moved [2]result // what each has written and read
	for i, st := range s.Steps {
		time.Sleep(time.Duration(st.Pause) * time.Millisecond)
		results, err := w.step(s, st, lane, &moved)
		if err != nil {
			return lines, err.Error()
		}
		for k, o := range st.Ops {
			if o == nil {
				continue
			}
			r := &results[k]
			if r.Trouble != "" {
				return lines, fmt.Sprintf("step %d: %s %v: %s (read %d, written %d)", i, peerNames[k], o, r.Trouble, r.Read, r.Written)
			}
			moved[k].Written += r.Written
			if o.Kind == opMove || o.Kind == opRecv {
				moved[k].Read += r.Read
			}
			if k == client && r.Peer == w.to(lane, s.Six).Addr().String() {
				r.Peer = "as asked"
			}
			lines = append(lines, fmt.Sprintf("%3d %s %s", i, peerNames[k], o.normal(r, moved[k].Read, moved[1-k].Written)))
		}
	}
	return lines, ""
}

// step has the peers do a step, at once.
func (w *road) step(s *script, st step, lane int, moved *[2]result) (results [2]result, err error) {
	peers := [2]*remote{w.client, w.server}
	for k, o := range st.Ops {
		if o == nil {
			continue
		}
		now := *o
		if now.Read == theRest {
			now.Read = moved[1-k].Written - moved[k].Read
		}
		if err := peers[k].order(w.fill(&order{Lane: lane, Op: now}, s, k)); err != nil {
			return results, err
		}
	}
	for k, o := range st.Ops {
		if o != nil {
			results[k] = peers[k].answer(lane)
		}
	}
	return results, nil
}

// fill completes an order.
func (w *road) fill(o *order, s *script, k int) *order {
	o.Seed, o.Side, o.Six, o.Options = s.Seed, k, s.Six, s.Options[k]
	if o.Limit = s.Limit; o.Limit == 0 {
		o.Limit = opLimit
	}
	switch o.Op.Kind {
	case opConnect:
		o.To = w.to(o.Lane, s.Six)
	case opListen:
		o.To = w.at(o.Lane, s.Six)
	}
	return o
}

// normal is a result without what plain TCP leaves open.
func (o *op) normal(r *result, allRead, allWritten int) string {
	var b strings.Builder
	b.WriteString(kindNames[o.Kind])
	say := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	if o.Loose&anyWritten == 0 && o.Kind != opFill {
		say(" written %d", r.Written)
	}
	switch {
	case o.Loose&anyCount != 0:
	case o.Read == theRest:
		say(" all read %v", allRead == allWritten)
	default:
		say(" read %d", r.Read)
	}
	if o.Loose&anyEnd == 0 {
		say(" ends %v, %v", name(r.WriteError), name(r.ReadError))
		if r.EOF {
			say(" EOF")
		}
	}
	events := r.Events
	if o.Loose&anyRoom != 0 {
		events &^= unix.POLLOUT
	}
	if o.Kind == opLook && o.Loose != anyAll {
		say(" events %#x peer %s", events, r.Peer)
	}
	return b.String()
}

func name(e unix.Errno) string {
	if e == 0 {
		return "ok"
	}
	return unix.ErrnoName(e)
}

// differ returns the first lines that are not the same.
func differ(a, b []string) string {
	for i := range max(len(a), len(b)) {
		var x, y string
		if i < len(a) {
			x = a[i]
		}
		if i < len(b) {
			y = b[i]
		}
		if x != y {
			return fmt.Sprintf("%s\n    %s", x, y)
		}
	}
	return ""
}
