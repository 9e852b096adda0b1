package model

import (
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
)

// TestServerEndsLate: an application that closes and is gone, while its endpoint
// goes on for longer than the halves of a record wait for each other, is one
// connection that ended in order.
func TestServerEndsLate(t *testing.T) {
	r := rig.New(t)
	at := r.Serve(t, netip.AddrPortFrom(rig.Far4, 7000), func(c net.Conn) {
		_, _ = io.ReadAll(c)
		time.Sleep(4 * time.Second) // what it has to do
	})
	i := r.Run(t, "")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Try(self, argBrief, at.String(), "1"); err != nil {
		t.Fatal(err)
	}
	i.Idle(t)
	records := i.Ended(t, 1)
	if len(records) != 1 || records[0].End != flow.ReasonClosed || records[0].Sent != uint64(len(briefWord)) {
		t.Errorf("records %+v, want one that is closed", records)
	}
}
