package l4_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// An application's socket that is gone without a word is found out. One that is there
// goes on, also if the kernel side does not know it.
func TestUnheardEnd(t *testing.T) {
	testutil.RequireRoot(t)
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)},
			// The kernel side knows none of them.
			options: func(o *l4.Options) { o.Present = func(local, remote netip.AddrPort) bool { return false } },
		})
		gone, there := r.dial(), r.dial()
		mustExchange(t, gone, "and no more")
		mustExchange(t, there, "and more")
		vanish(t, gone)
		r.drain() // it looks more often then
		rec := r.awaitEnded(1)[0]
		if rec.End != flow.ReasonDownstreamReset || rec.Sent != uint64(len("and no more")) {
			t.Errorf("record: %+v", rec)
		}
		for start := time.Now(); time.Since(start) < 2500*time.Millisecond; time.Sleep(1200 * time.Millisecond) {
			mustExchange(t, there, "still there")
		}
		there.Close()
	})
}

// vanish closes a socket without telling its peer.
func vanish(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	control := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1) })
	if control != nil || err != nil {
		t.Fatal(control, err)
	}
	c.Close()
}
