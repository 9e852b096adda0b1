package failure

import (
	"context"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// A reset is sent once. When it is lost on the way, because the slots have no route in
// that moment, the handler finds out by itself, and ends the connection as if it had
// come. An end of file comes again, and one that is on the way is not taken for a reset.
func TestUnheardReset(t *testing.T) {
	t.Parallel()
	s := newStage(t, &fault{}, onOpen)
	opened := 0
	for _, kind := range redirected {
		for _, how := range []string{"reset", "close", "stay"} {
			for _, o := range s.do(t, order{Do: "open", Key: how, To: s.to[kind], Count: openPer, Patience: patience}) {
				if o.Word != carried {
					t.Fatalf("%s: %s", kind, &o)
				}
				opened++
			}
		}
	}
	st := s.status(t)
	stop(t, s) // it would mend the routes at once
	s.unroute(t, st)
	s.do(t, order{Do: "reset", Key: "reset"})
	s.do(t, order{Do: "close", Key: "close"})
	proceed(t, s)
	start, left := time.Now(), 0
	testutil.Eventually(t, rig.Limit, func() bool {
		st, err := s.Status(context.Background())
		left = st.Live
		return err == nil && left == opened/3
	}, "the handler carries what is open: ", &left)
	t.Logf("%d of %d connections ended within %v", opened-left, opened, time.Since(start).Round(time.Millisecond))
	for _, o := range s.asks(t, "stay", patience) {
		if o.Word != unaffected {
			t.Errorf("one that nobody has ended: %s", &o)
		}
	}
	s.do(t, order{Do: "close", Key: "stay"})
}
