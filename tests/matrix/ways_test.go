package matrix

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// What becomes of a connection, beside "pass, REASON", and the name of an error
// that the kernel gives with and without Pillion.
const (
	relay  = "relay"
	unseen = "not seen" // nothing of Pillion knows of it
	// existing is reported when Pillion starts, and left alone.
	existing = "existing"
	none     = "-" // there is no such combination
)

func pass(reason string) string { return "pass, " + reason }

// family is one of the columns: which sockets, and addresses for them.
type family struct {
	name, title     string
	dest, other     string
	source, foreign string
	routed          string // whose route names another source address
	behind          string // behind another interface
}

// mapped is an address of IPv4 for a socket of IPv6.
func mapped(a string) string { return "::ffff:" + a }

// scoped is an address of the application's link.
func scoped(a string) string { return a + "%" + testutil.AppLink }

func families() []family {
	own4, own6 := testutil.AppV4.Addr().String(), testutil.AppV6.Addr().String()
	return []family{
		{"4", "IPv4", rig.Far4.String(), other4, own4, foreign4, routed4, behind4},
		{"6", "IPv6", rig.Far6.String(), other6, own6, foreign6, routed6, behind6},
		{"mapped", "IPv4-mapped", mapped(rig.Far4.String()), mapped(other4), mapped(own4), mapped(foreign4),
			mapped(routed4), mapped(behind4)},
		{"v6only", "IPv4-mapped, V6ONLY", mapped(rig.Far4.String()), mapped(other4), own6, foreign6,
			mapped(routed4), mapped(behind4)},
		{"link", "link-local", scoped(link), scoped(otherLink), scoped(ownLink), "", "", ""},
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
	// toRouted and toBehind: it goes to that destination of the family.
	toRouted, toBehind bool
	// box and nested say where it runs, where that is not right in the scope.
	box, nested bool
	// out: the process that connects is not of the scope.
	out bool
	// gated: it starts before Pillion, and goes on when that is there.
	gated bool
	// fastOpen has the application's namespace want that all listeners take
	// data with a SYN.
	fastOpen bool
	// bound: the source port is the one that the application asked for.
	bound bool
}

// of has every family want the same.
func of(want ...string) map[string][]string {
	by := map[string][]string{}
	for _, f := range families() {
		by[f.name] = want
	}
	return by
}

// on has the link-local family want this. The kernel binds a socket to the
// interface of a scope when its address is bound, or was connected to before.
func on(want ...string) map[string][]string { return map[string][]string{"link": want} }

func times(n int, want string) []string { return slices.Repeat([]string{want}, n) }

func ways() []way {
	local, device, unreachable := pass("link_local"), pass("bound_device"), "ENETUNREACH"
	return []way{
		{name: "blocking", title: "blocking"},
		{name: "poll", title: "non-blocking, `poll`"},
		{name: "epoll", title: "non-blocking, `epoll`"},
		{name: "select", title: "non-blocking, `select`"},
		{name: "bind_address", title: "bound to an address", by: on(device)},
		{name: "bind_port", title: "bound to an address and a port", bound: true, by: on(device)},
		{name: "bind_any_port", title: "bound to a port", bound: true},
		{name: "bind_no_port", title: "bound to an address, `IP_BIND_ADDRESS_NO_PORT`", by: on(device)},
		{name: "twins", title: "`SO_REUSEPORT` twins: one source port, two destinations; the first destination again", bound: true,
			want: []string{relay, relay, "EADDRNOTAVAIL"}, by: on(device, device, "EADDRNOTAVAIL")},
		{name: "fastopen", title: "Fast Open, `MSG_FASTOPEN`"},
		{name: "fastopen_connect", title: "Fast Open, `TCP_FASTOPEN_CONNECT`"},
		{name: "fastopen_taken", program: "fastopen", title: "Fast Open, `MSG_FASTOPEN`, all listeners take it", fastOpen: true},
		{name: "fastopen_connect_taken", program: "fastopen_connect", title: "Fast Open, `TCP_FASTOPEN_CONNECT`, all listeners take it",
			fastOpen: true},
		{name: "mptcp", title: "MPTCP"},
		{name: "mptcp_poll", title: "MPTCP, non-blocking"},
		{name: "mptcp_bind", title: "MPTCP, bound to an address and a port", bound: true, by: on(device)},
		{name: "ring", title: "io_uring, inline"},
		{name: "ring_async", title: "io_uring, `IOSQE_ASYNC`"},
		{name: "ring_sqpoll", title: "io_uring, `SQPOLL`"},
		{name: "again", title: "connected, `AF_UNSPEC`, another destination", want: times(2, relay), by: on(local, device)},
		{name: "device", title: "`SO_BINDTODEVICE`", by: of(device)},
		{name: "mark", title: "`SO_MARK`"},
		{name: "transparent", title: "`IP_TRANSPARENT`"},
		{name: "transparent_foreign", title: "`IP_TRANSPARENT`, bound to an address that is not local",
			want: []string{pass("foreign_source")}, by: on(none)},
		{name: "freebind_foreign", title: "`IP_FREEBIND`, bound to an address that is not local",
			want: []string{pass("foreign_source")},
			by:   map[string][]string{"4": {unreachable}, "mapped": {unreachable}, "link": {none}}},
		{name: "early_socket", title: "the socket is older than Pillion", gated: true},
		{name: "early_connection", title: "the connection is older than Pillion", gated: true,
			want: []string{existing}, by: on(unseen)},
		{name: "older", title: "the socket is older than the process' move into the scope", by: of(unseen)},
		{name: "passed_in", title: "the socket comes from outside (`SCM_RIGHTS`)", by: of(unseen)},
		{name: "passed_out", title: "the socket goes outside (`SCM_RIGHTS`)", out: true},
		{name: "routed", program: "blocking", title: "the route names another source address", toRouted: true, by: on(none)},
		{name: "routed_port", program: "bind_any_port", title: "the same, bound to a port", toRouted: true, bound: true, by: on(none)},
		{name: "routed_bind", program: "bind_address", title: "the same, bound to an address", toRouted: true, by: on(none)},
		{name: "routed_mptcp", program: "mptcp", title: "the same, MPTCP", toRouted: true, by: on(none)},
		{name: "routed_fastopen", program: "fastopen_connect", title: "the same, Fast Open, `TCP_FASTOPEN_CONNECT`", toRouted: true, by: on(none)},
		{name: "routed_again", program: "again", title: "the same, connected, `AF_UNSPEC`, a destination with the default source",
			toRouted: true, want: times(2, relay), by: on(none)},
		{name: "behind", program: "blocking", title: "behind another interface", toBehind: true, by: on(none)},
		{name: "fork", title: "`fork` after `socket`"},
		{name: "vfork", title: "`vfork` and `exec` after `socket`"},
		{name: "threads", title: "threads, at once, with own sockets and others'", want: times(6, relay), by: on(times(6, local)...)},
		{name: "box", program: "blocking", title: "a container with its own network namespace", box: true, by: of(pass("netns"))},
		{name: "nested", program: "blocking", title: "a nested cgroup", nested: true},
	}
}

// passing is what becomes of each connection, if the kernel lets it be made.
func (w way) passing(f family) []string {
	switch want, ok := w.by[f.name]; {
	case ok:
		return want
	case f.name == "link":
		return []string{pass("link_local")}
	case w.want != nil:
		return w.want
	}
	return []string{relay}
}

// wanted is what becomes of each connection of a way.
func (w way) wanted(f family) []string {
	want := w.passing(f)
	if f.name == "v6only" {
		return times(len(want), "ENETUNREACH")
	}
	return want
}

// counter is the reason that the kernel side counts for a connection, or none.
func (w way) counter(f family, n int) string {
	to := w.passing(f)[n]
	switch {
	case to == unseen || to == existing:
		return ""
	case isError(to) && w.bound && f.name == "link":
		return "bound_device"
	case isError(to) && w.name == "freebind_foreign":
		return "foreign_source"
	case to == relay || isError(to):
		return "default"
	}
	return strings.TrimPrefix(to, pass(""))
}

// environment is what a way is told beside its arguments.
func (w *world) environment(f family, sourcePort int) []string {
	return []string{
		"SOURCE=" + f.source, fmt.Sprintf("SOURCE_PORT=%d", sourcePort), "FOREIGN=" + f.foreign, "OTHER=" + f.other,
		"DEVICE=" + testutil.AppLink, "INSIDE=" + w.Scope.Path, "OUTSIDE=" + w.outside.Path,
		"LIMIT=" + w.limit,
	}
}
