package fidelity

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// lowered are the timers of TCP that a connection may meet, each at a sixtieth
// of its default or less: what takes ten minutes with the defaults takes less
// than ten seconds. Those that Pillion sets itself, per socket, are not among
// them: its keep-alive asks the kernel at the other end, which answers as long
// as the socket exists.
var lowered = map[string]string{
	"tcp_fin_timeout":      "1",    // of 60 s
	"tcp_keepalive_time":   "1",    // of 7200 s
	"tcp_keepalive_intvl":  "1",    // of 75 s
	"tcp_keepalive_probes": "2",    // of 9
	"tcp_orphan_retries":   "1",    // of 8
	"tcp_rto_max_ms":       "1000", // of 120 s; since Linux 6.15
}

func lower(t *testing.T, r *rig.Rig, more map[string]string) {
	t.Helper()
	for _, ns := range []*testutil.NS{r.App, r.World} {
		for _, timers := range []map[string]string{lowered, more} {
			for name, value := range timers {
				if _, err := os.Stat("/proc/sys/net/ipv4/" + name); name == "tcp_rto_max_ms" && err != nil {
					continue
				}
				ns.Sysctl(t, "net/ipv4/"+name, value)
			}
		}
	}
}

// TestLasts has connections stay half-open, stalled or idle for what is more
// than ten minutes to the kernel's timers. They go on and end as if nothing
// were.
func TestLasts(t *testing.T) {
	t.Parallel()
	r := both(t, "lasts.py", "", func(r *rig.Rig) { lower(t, r, nil) })
	r.apart = true
	r.compare(t, nil)
}

// cutTable drops what goes to and comes from the ports in a set.
const cutTable = `
table inet cut {
	set dead { type inet_service; }
	chain in { type filter hook input priority 0; tcp dport @dead drop; }
	chain out { type filter hook output priority 0; tcp sport @dead drop; }
}`

// TestDies has peers vanish. The application gets the same events at the same
// occasion; the error is that of a reset, since its own connection has not timed
// out (docs/fidelity.md).
func TestDies(t *testing.T) {
	t.Parallel()
	timedOut := strings.NewReplacer("ETIMEDOUT", "ECONNRESET")
	all := known{}
	for _, name := range []string{"keep-alive", "keep-alive, unread bytes", "keep-alive, the client has ended",
		"keep-alive, the server is not read", "unsent bytes", "user timeout, unsent bytes", "unsent and unread bytes",
		"user timeout, unsent and unread bytes", "unsent bytes, full", "user timeout and keep-alive",
		"unsent bytes, the client ends", "user timeout, the client ends"} {
		all[name] = timedOut
	}
	// Reset behind the end of the stream.
	all["keep-alive, the server has ended"] = strings.NewReplacer("ETIMEDOUT", "EPIPE")
	r := both(t, "dies.py", "", func(r *rig.Rig) {
		lower(t, r, map[string]string{"tcp_retries2": "5"}) // of 15
		r.World.Do(t, func() error { return nft(cutTable) })
	})
	r.compare(t, all)
}

// TestDiesByUserTimeout has peers vanish whom nobody but TCP_USER_TIMEOUT would
// give up in time.
func TestDiesByUserTimeout(t *testing.T) {
	t.Parallel()
	cases := []string{"user timeout, unsent bytes", "user timeout, unsent and unread bytes", "user timeout and keep-alive",
		"user timeout, the client ends"}
	all := known{}
	for _, name := range cases {
		all[name] = strings.NewReplacer("ETIMEDOUT", "ECONNRESET")
	}
	r := both(t, "dies.py", "", func(r *rig.Rig) {
		lower(t, r, map[string]string{"tcp_retries2": "100", "tcp_keepalive_probes": "100"})
		r.World.Do(t, func() error { return nft(cutTable) })
	}, cases...)
	r.compare(t, all)
}

// TestClosedAndForgotten has applications close connections whose servers never
// do. The kernel forgets the application's end after a minute; then the handler
// has to, too.
func TestClosedAndForgotten(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "redirected", "", func(r *rig.Rig) { lower(t, r, nil) })
	held := make(chan struct{})
	defer close(held)
	var closed atomic.Int32
	for _, addr := range []netip.Addr{rig.Far4, rig.Far6} {
		at := w.Serve(t, netip.AddrPortFrom(addr, 0), func(c net.Conn) {
			io.Copy(io.Discard, c)
			closed.Add(1)
			<-held
		})
		w.Output(t, "python3", "-c", `
import socket, sys
for n in range(10):
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
    s.sendall(b"x" * n)
    s.close()
`, at.Addr().String(), fmt.Sprint(at.Port()))
	}
	testutil.Eventually(t, rig.Limit, func() bool { return closed.Load() == 20 }, "the servers have seen all ends")
	var live int
	testutil.Eventually(t, 3*time.Minute, func() bool {
		s, err := w.instance.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		live = s.Live
		if live > 0 {
			time.Sleep(100 * time.Millisecond) // the question costs more than the look
		}
		return live == 0
	}, "the handler has forgotten them")
}
