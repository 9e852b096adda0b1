package events

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// out is what a joiner emitted, in short.
type out struct {
	Cookie uint64
	End    flow.Reason
	// Joined is true if both halves are in it: the handler's service, and the
	// kernel side's duration.
	Joined bool
}

// half returns a record of one side.
func half(from side, cookie uint64) *flow.Record {
	if from == fromHandler {
		r := handled(cookie)
		return &r
	}
	e := event(cookie, flow.PathRelay, bpf.EndingClosed)
	return kernelRecord(clock{}, e)
}

func collect(emitted *[]out) func(*flow.Record) {
	return func(r *flow.Record) {
		joined := r.Service != "" && r.Duration == time.Second
		*emitted = append(*emitted, out{Cookie: r.Cookie, End: r.End, Joined: joined})
	}
}

func check(t *testing.T, got *[]out, want ...out) {
	t.Helper()
	if diff := cmp.Diff(want, *got); diff != "" {
		t.Error(diff)
	}
	*got = nil
}

func TestJoinInEitherOrder(t *testing.T) {
	t.Parallel()
	for _, first := range []side{fromHandler, fromKernel} {
		var got []out
		j := newJoiner(false, 10, collect(&got))
		j.add(first, half(first, 1), epoch)
		check(t, &got)
		j.add(1-first, half(1-first, 1), epoch.Add(time.Second))
		check(t, &got, out{1, flow.ReasonClosed, true})
		j.expire(epoch.Add(time.Hour), nil)
		check(t, &got)
		if n := j.unmatched.Load(); n != 0 || j.pending() != 0 || len(j.byKey) != 0 {
			t.Errorf("first %d: %d unmatched, %d pending, %d keys", first, n, j.pending(), len(j.byKey))
		}
	}
}

func TestJoinGivesUp(t *testing.T) {
	t.Parallel()
	var got []out
	j := newJoiner(false, 10, collect(&got))
	j.add(fromKernel, half(fromKernel, 1), epoch)
	j.add(fromHandler, half(fromHandler, 2), epoch.Add(time.Second))
	j.expire(epoch.Add(patience-1), nil)
	check(t, &got)
	j.expire(epoch.Add(patience), nil)
	check(t, &got, out{1, flow.ReasonHandlerLost, false})
	j.expire(epoch.Add(time.Second+patience), nil)
	check(t, &got, out{2, flow.ReasonClosed, false})
	if n := j.unmatched.Load(); n != 2 {
		t.Errorf("%d unmatched, want 2", n)
	}
}

func TestJoinRefusedIsComplete(t *testing.T) {
	t.Parallel()
	var got []out
	j := newJoiner(false, 10, collect(&got))
	e := event(1, flow.PathRelay, bpf.EndingRefused)
	j.add(fromKernel, kernelRecord(clock{}, e), epoch)
	j.expire(epoch.Add(patience), nil)
	check(t, &got, out{1, flow.ReasonRefused, false})
	if n := j.unmatched.Load(); n != 0 {
		t.Errorf("%d unmatched: the handler never had it", n)
	}
}

func TestJoinWhenFull(t *testing.T) {
	t.Parallel()
	var got []out
	j := newJoiner(false, 2, collect(&got))
	for cookie := range uint64(3) {
		j.add(fromKernel, half(fromKernel, cookie+1), epoch)
	}
	check(t, &got, out{1, flow.ReasonHandlerLost, false})
	// Its other half now has none.
	j.add(fromHandler, half(fromHandler, 2), epoch)
	check(t, &got, out{2, flow.ReasonClosed, true})
	if j.pending() != 1 {
		t.Errorf("%d pending, want 1", j.pending())
	}
}

func TestJoinFlush(t *testing.T) {
	t.Parallel()
	var got []out
	j := newJoiner(false, 10, collect(&got))
	j.add(fromKernel, half(fromKernel, 1), epoch)
	j.add(fromHandler, half(fromHandler, 2), epoch)
	j.flush()
	check(t, &got, out{1, flow.ReasonHandlerLost, false}, out{2, flow.ReasonClosed, false})
	if n := j.unmatched.Load(); n != 0 || len(j.byKey) != 0 {
		t.Errorf("%d unmatched, %d keys", n, len(j.byKey))
	}
}

func TestJoinSingleSide(t *testing.T) {
	t.Parallel()
	var got []out
	j := newJoiner(true, 10, collect(&got))
	j.add(fromHandler, half(fromHandler, 1), epoch)
	check(t, &got, out{1, flow.ReasonClosed, false})
}

func TestJoinWithoutCookie(t *testing.T) {
	t.Parallel()
	var got []out
	j := newJoiner(false, 10, collect(&got))
	j.add(fromHandler, half(fromHandler, 0), epoch)
	check(t, &got, out{0, flow.ReasonClosed, false})
}

// One socket may connect twice: after a refusal, from another port, or from the
// same one if it was bound.
func TestJoinSameSocket(t *testing.T) {
	t.Parallel()
	var got []out
	j := newJoiner(false, 10, collect(&got))
	refused := half(fromKernel, 1)
	refused.Source = netip.AddrPortFrom(app.Addr(), 39999)
	refused.End = flow.ReasonRefused
	j.add(fromKernel, refused, epoch)
	j.add(fromKernel, half(fromKernel, 1), epoch)
	j.add(fromHandler, half(fromHandler, 1), epoch)
	check(t, &got, out{1, flow.ReasonClosed, true})
	j.flush()
	check(t, &got, out{1, flow.ReasonRefused, false})

	for range 3 {
		j.add(fromKernel, half(fromKernel, 2), epoch)
	}
	for range 4 {
		j.add(fromHandler, half(fromHandler, 2), epoch)
	}
	joined := out{2, flow.ReasonClosed, true}
	check(t, &got, joined, joined, joined)
	j.flush()
	check(t, &got, out{2, flow.ReasonClosed, false})
}

// An application may close its side long before the endpoint does: its half waits
// for as long as the handler carries the connection.
func TestJoinWaitsForTheHandler(t *testing.T) {
	t.Parallel()
	var got []out
	j := newJoiner(false, 10, collect(&got))
	first, second := half(fromKernel, 1), half(fromKernel, 2)
	carried := map[key]bool{{cookie: 1, port: first.Source.Port()}: true}
	j.add(fromKernel, first, epoch)
	j.add(fromKernel, half(fromKernel, 1), epoch) // the same socket again
	j.add(fromKernel, second, epoch)
	now := epoch.Add(patience)
	j.expire(now, carried)
	check(t, &got, out{2, flow.ReasonHandlerLost, false})
	j.expire(now.Add(patience-1), nil)
	check(t, &got)
	j.expire(now.Add(patience), carried)
	j.add(fromHandler, half(fromHandler, 1), now.Add(patience))
	check(t, &got, out{1, flow.ReasonClosed, true})
	j.expire(now.Add(2*patience), nil)
	check(t, &got, out{1, flow.ReasonHandlerLost, false})
	if j.pending() != 0 || len(j.byKey) != 0 {
		t.Errorf("%d pending, %d keys", j.pending(), len(j.byKey))
	}
}
