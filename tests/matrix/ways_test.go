package matrix

import (
	"fmt"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// What becomes of a connection, beside "pass, REASON", and the name of an error
// that the kernel gives with and without Pillion.
const (
	relay  = "relay"
	unseen = "not seen" // nothing of Pillion knows of it
	none   = "-"        // there is no such combination
)

func pass(reason string) string { return "pass, " + reason }

// family is one of the columns: which sockets, and addresses for them.
type family struct {
	name, title          string
	dest, other          string
	source, foreign, any string
}

// mapped is an address of IPv4 for a socket of IPv6.
func mapped(a string) string { return "::ffff:" + a }

// scoped is an address of the application's link.
func scoped(a string) string { return a + "%" + testutil.AppLink }

func families() []family {
	own4, own6 := testutil.AppV4.Addr().String(), testutil.AppV6.Addr().String()
	return []family{
		{"4", "IPv4", rig.Far4.String(), other4, own4, foreign4, "0.0.0.0"},
		{"6", "IPv6", rig.Far6.String(), other6, own6, foreign6, "::"},
		{"mapped", "IPv4-mapped", mapped(rig.Far4.String()), mapped(other4), mapped(own4), mapped(foreign4), "::"},
		{"v6only", "IPv4-mapped, V6ONLY", mapped(rig.Far4.String()), mapped(other4), own6, foreign6, "::"},
		{"link", "link-local", scoped(link), scoped(otherLink), scoped(ownLink), "", "::"},
	}
}

// way is one of the rows.
type way struct {
	name, title string
	// program is the C application's name for it, where it is not name.
	program string
	// want is what becomes of each connection, where it is not relay.
	want []string
	// by has what is wanted of a family where it is something else.
	by map[string][]string
	// same is set where connections are made all at once: in any order.
	conns int
	// box and nested say where it runs, where that is not right in the scope.
	box, nested bool
	// outside: the process that connects is not of the scope.
	outside bool
	// fastOpen has listeners of the application's namespace take data with a
	// SYN, and so the handler's.
	fastOpen bool
	// bound: the source port is the one that the application asked for.
	bound bool
}

func ways() []way {
	alone := map[string][]string{"link": {none}}
	return []way{
		{name: "blocking", title: "blocking"},
		{name: "poll", title: "non-blocking, `poll`"},
		{name: "epoll", title: "non-blocking, `epoll`"},
		{name: "select", title: "non-blocking, `select`"},
		{name: "bind_address", title: "bound to an address"},
		{name: "bind_port", title: "bound to an address and a port", bound: true},
		{name: "bind_any_port", title: "bound to a port", bound: true},
		{name: "bind_no_port", title: "bound to an address, `IP_BIND_ADDRESS_NO_PORT`"},
		{name: "twins", title: "`SO_REUSEPORT` twins: one source port, two destinations, and the first one once more", bound: true,
			want: []string{relay, relay, "EADDRNOTAVAIL"},
			by:   map[string][]string{"link": {pass("link_local"), pass("link_local"), "EADDRNOTAVAIL"}}},
		{name: "fastopen", title: "TCP Fast Open, `MSG_FASTOPEN`"},
		{name: "fastopen_connect", title: "TCP Fast Open, `TCP_FASTOPEN_CONNECT`"},
		{name: "fastopen_taken", program: "fastopen", title: "TCP Fast Open, `MSG_FASTOPEN`, all listeners take it", fastOpen: true},
		{name: "fastopen_connect_taken", program: "fastopen_connect", title: "TCP Fast Open, `TCP_FASTOPEN_CONNECT`, all listeners take it", fastOpen: true},
		{name: "mptcp", title: "MPTCP"},
		{name: "mptcp_poll", title: "MPTCP, non-blocking"},
		{name: "mptcp_bind", title: "MPTCP, bound to an address and a port", bound: true},
		{name: "ring", title: "io_uring, inline"},
		{name: "ring_async", title: "io_uring, `IOSQE_ASYNC`"},
		{name: "ring_sqpoll", title: "io_uring, `SQPOLL`"},
		{name: "again", title: "`AF_UNSPEC`, and another destination", conns: 2},
		{name: "device", title: "`SO_BINDTODEVICE`", want: []string{pass("bound_device")},
			by: map[string][]string{"link": {pass("bound_device")}}},
		{name: "mark", title: "`SO_MARK`"},
		{name: "transparent", title: "`IP_TRANSPARENT`"},
		{name: "transparent_foreign", title: "`IP_TRANSPARENT`, bound to an address that is not local", by: alone},
		{name: "freebind_foreign", title: "`IP_FREEBIND`, bound to an address that is not local",
			by: map[string][]string{"4": {"ENETUNREACH"}, "mapped": {"ENETUNREACH"}, "link": {none}}},
		{name: "older", title: "the socket is older than the process' move into the scope", want: []string{unseen},
			by: map[string][]string{"link": {unseen}}},
		{name: "passed_in", title: "the socket comes from outside (`SCM_RIGHTS`)", want: []string{unseen},
			by: map[string][]string{"link": {unseen}}},
		{name: "passed_out", title: "the socket goes outside (`SCM_RIGHTS`)", outside: true},
		{name: "fork", title: "`fork` after `socket`"},
		{name: "vfork", title: "`vfork` and `exec` after `socket`"},
		{name: "threads", title: "threads, at once, own sockets and others'", conns: 6},
		{name: "box", program: "blocking", title: "a container with its own network namespace", box: true, want: []string{pass("netns")},
			by: map[string][]string{"link": {pass("netns")}}},
		{name: "nested", program: "blocking", title: "a nested cgroup", nested: true},
	}
}

// wanted is what becomes of each connection of a way.
func (w way) wanted(f family) []string {
	want := w.want
	switch {
	case w.by[f.name] != nil:
		want = w.by[f.name]
	case f.name == "link":
		want = []string{pass("link_local")}
	case f.name == "v6only":
		want = []string{"ENETUNREACH"}
		if len(w.want) > 1 {
			want = []string{"ENETUNREACH", "ENETUNREACH", "ENETUNREACH"}
		}
	case want == nil:
		want = []string{relay}
	}
	for len(want) < w.conns {
		want = append(want, want[0])
	}
	return want
}

// environment is what a way is told beside its arguments.
func (w *world) environment(f family, sourcePort int) []string {
	return []string{
		"SOURCE=" + f.source, fmt.Sprintf("SOURCE_PORT=%d", sourcePort), "FOREIGN=" + f.foreign, "OTHER=" + f.other,
		"DEVICE=" + testutil.AppLink, "INSIDE=" + w.Scope.Path, "OUTSIDE=" + w.outside.Path,
	}
}
