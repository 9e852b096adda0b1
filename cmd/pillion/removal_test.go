package main

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
)

// TestRemovals: a reset ends what there is at once, and what was under way a moment
// later; a close ends in time; what is back is spared.
func TestRemovals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := map[string]int{}
		r := removals{end: func(ctx context.Context, g gone) {
			if limit, ok := ctx.Deadline(); !ok || time.Until(limit) > endLimit {
				t.Errorf("%s: it may take until %s", g.service, limit)
			}
			ended[g.service]++
		}}
		ctx, cancel := context.WithTimeout(t.Context(), endLimit)
		defer cancel()
		at := netip.MustParseAddrPort("10.0.0.1:80")
		r.add(ctx, gone{"reset", at, at}, config.OnRemoveReset, time.Hour)
		r.add(ctx, gone{"close", at, at}, config.OnRemoveClose, time.Minute)
		r.add(ctx, gone{"keep", at, at}, config.OnRemoveKeep, 0)
		r.add(ctx, gone{"back", at, at}, config.OnRemoveReset, 0)
		wants := func(when string, reset, closed int) {
			t.Helper()
			if ended["reset"] != reset || ended["close"] != closed || ended["keep"] != 0 || ended["back"] != 1 {
				t.Errorf("%s: ended %v, want reset %d, close %d", when, ended, reset, closed)
			}
		}
		wants("at once", 1, 0)
		r.spare(func(g gone) bool { return g.service == "back" })
		<-r.due()
		r.endDue()
		wants("a moment later", 2, 0)
		<-r.due()
		r.endDue()
		wants("a minute later", 2, 1)
		if r.due() != nil {
			t.Error("there is more to end")
		}
	})
}
