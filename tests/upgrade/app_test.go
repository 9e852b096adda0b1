package upgrade

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
)

// talkEvery is how long an echoing connection waits for its next message, in the mean.
const talkEvery = 250 * time.Millisecond

// kinds are those of the connections that stay: most echo, and some of each other kind.
func kinds() []app.Kind {
	all := make([]app.Kind, 100)
	for n := range all {
		switch {
		case n < 4:
			all[n] = app.Duplex
		case n < 7:
			all[n] = app.Half
		case n < 10:
			all[n] = app.FarHalf
		case n == 10:
			all[n] = app.Blocked
		case n == 11:
			all[n] = app.Stuffed
		case n < 20:
			all[n] = app.Idle
		case n < 24:
			all[n] = app.Urgent
		default:
			all[n] = app.Echo
		}
	}
	return all
}

// task is what the application does: how many connections stay, and how many workers
// make new ones.
type task struct{ Conns, Come int }

// client is the application.
type client struct{ *app.Application }

func newClient(t testing.TB, r *rig.Rig, q task) client {
	t.Helper()
	c := client{app.Start(t, r)}
	c.Load(t, app.Load{
		To: []netip.AddrPort{vip}, Stay: q.Conns, Kinds: kinds(), Every: talkEvery,
		Come: q.Come, Visits: []app.Kind{app.Once}, Pause: 10 * time.Millisecond, Most: 2000,
	})
	return c
}

// turn ends a turn of the measurement: the slowest answers since the last one.
func (c client) turn(t testing.TB) *app.Report {
	t.Helper()
	r := c.Turn(t)
	r.Check(t)
	return r
}

// end has the connections end, and returns what became of all.
func (c client) end(t testing.TB) *app.Report {
	t.Helper()
	r := c.Unload(t)
	r.Check(t)
	return r
}
