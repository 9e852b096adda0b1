package failure

import (
	"net/netip"
	"testing"
)

// fault is something that goes wrong: a row of the table.
type fault struct {
	name string
	// how says how the test makes it, mended how it ends, or what an operator
	// does about it.
	how, mended string
	// falls means that the handler cannot be reached: new connections go by
	// on_failure.
	falls bool
	// atOnce means that not one connection that starts after the fault may find
	// the handler, still; else the time to notice is bounded by noticeLimit.
	atOnce bool
	// brief means that Pillion mends it before anybody can look.
	brief bool
	// loose means that connections may suffer at any time while it lasts.
	loose bool
	// news is what becomes of new connections otherwise than falls says, by kind;
	// empty: by on_failure.
	news map[string]word
	// open is what becomes of open connections that the handler carries, if
	// they are not unaffected.
	open word
	// config is more configuration; prepare comes before the start and returns
	// more services.
	config  string
	prepare func(*testing.T, *stage) string
	// targets is where tries go, if not as usual; nil: as usual.
	targets func(*stage, string) []netip.AddrPort
	// breaks makes it so; mends undoes it, nil: Pillion does.
	breaks, mends func(*testing.T, *stage)
	// check looks at what the fault shows itself by, while it lasts; then after.
	check, after func(*testing.T, *stage)
}

// table is every fault. It is made anew for each reader.
func table() []fault {
	return []fault{
		{
			name: "handler killed", how: "kill -9", mended: "whoever started it starts it again",
			falls: true, atOnce: true, open: reset, breaks: kill, mends: launch,
		},
		{
			name: "handler out of memory", how: "killed by the kernel, in a memory cgroup that is full", mended: "whoever started it starts it again",
			falls: true, open: reset, breaks: exhaust, mends: launch,
		},
		{
			name: "handler stopped", how: "SIGSTOP", mended: "SIGCONT; a liveness probe restarts one that hangs",
			falls: true, open: waits, breaks: stop, mends: proceed,
		},
	}
}
