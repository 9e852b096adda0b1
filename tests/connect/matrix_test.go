package connect

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// attempt is one application's way to one destination.
type attempt struct {
	name  string
	at    netip.AddrPort
	steps []string
	// soft is set where the moment is the kernel's: an ICMP error that comes
	// while connect() holds the socket's lock waits for the next SYN.
	soft bool
	// answers is set where a server accepts.
	answers bool
}

// Ways to connect.
var (
	// A socket that was refused may be used again.
	wayBlocking = strings.Fields("connect soerror peer source connect")
	wayPoll     = strings.Fields("nonblock connect poll soerror connect connect poll soerror")
	// Without SO_ERROR, the next connect tells.
	wayNext  = strings.Fields("nonblock connect poll connect connect poll soerror")
	wayEpoll = strings.Fields("nonblock connect epoll soerror peer")
	wayRing  = strings.Fields("uring soerror peer uring")
	// An ICMP error that comes while connect() holds the socket's lock, which it
	// hardly does on a real network, leaves more traces than others.
	wayHard = strings.Fields("connect peer source")
	// Where the answer takes its time, what comes before it can be seen.
	wayLate = strings.Fields("nonblock connect connect poll0 peer send=early recv soerror poll soerror connect connect poll soerror")
)

// talks adds to a way that an application then has its words echoed.
func talks(way []string) []string {
	return append(slices.Clone(way), strings.Fields("send=hello pollin recv shutdown pollin recv")...)
}

func familyName(a netip.Addr) string {
	switch {
	case a.Is4In6():
		return "mapped"
	case a.Is4():
		return "IPv4"
	}
	return "IPv6"
}

// everyWay adds all ways to a destination.
func everyWay(all []attempt, what string, at netip.AddrPort, soft bool) []attempt {
	for way, steps := range map[string][]string{"blocking": wayBlocking, "poll": wayPoll, "next": wayNext, "epoll": wayEpoll, "io_uring": wayRing} {
		if way == "io_uring" && soft && at.Addr().Unmap().Is4() {
			// Woken by the error before the connection has ended, as in seen,
			// the kernel's io_uring says that it is connected.
			continue
		}
		all = append(all, attempt{name: what + "/" + familyName(at.Addr()) + "/" + way, at: at, steps: steps, soft: soft})
	}
	return all
}

// failing are the attempts that nobody accepts.
func failing() []attempt {
	var all []attempt
	for _, at := range farEach(portClosed) {
		all = everyWay(all, "closed", at, false)
	}
	for _, at := range farEach(portReset) {
		all = everyWay(all, "reset by firewall", at, false)
	}
	for n := range icmp4 {
		for _, at := range farEach(uint16(portICMP + n)) {
			if code, ok := icmpAt(n, at.Addr()); ok {
				all = append(all, attempt{name: code + "/" + familyName(at.Addr()) + "/blocking", at: at, steps: wayHard, soft: true})
				at = netip.AddrPortFrom(at.Addr(), uint16(portLateICMP+n))
				if code == "port-unreachable" && at.Addr().Unmap().Is4() {
					// The application gets a reset instead. The errno is the
					// same, but nothing is left on the socket for its next
					// connect, as the kernel leaves an ICMP error of IPv4.
					all = append(all, attempt{name: code + " late/" + familyName(at.Addr()) + "/epoll", at: at, steps: wayEpoll, soft: true})
					continue
				}
				all = everyWay(all, code+" late", at, true)
				all = append(all, attempt{name: code + " late/" + familyName(at.Addr()) + "/all", at: at, steps: wayLate, soft: true})
			}
		}
	}
	for _, a := range []netip.Addr{neighbour4, neighbour6, mapped(neighbour4)} {
		all = everyWay(all, "no neighbour", netip.AddrPortFrom(a, portEcho), true)
	}
	for n, kind := range routeTypes {
		for _, a := range []netip.Addr{typed4(n), typed6(n), mapped(typed4(n))} {
			all = everyWay(all, kind, netip.AddrPortFrom(a, portEcho), false)
		}
	}
	for _, a := range []netip.Addr{noRoute4, noRoute6, mapped(noRoute4)} {
		all = everyWay(all, "no route", netip.AddrPortFrom(a, portEcho), false)
	}
	for i := range farEach(0) {
		rst := farEach(portLateRST)[i]
		all = append(all, attempt{name: "refused late/" + familyName(rst.Addr()), at: rst, steps: wayLate, soft: true})
	}
	return append(all, fast("refused", portClosed)...)
}

// icmpAt is what the firewall answers at portICMP+n.
func icmpAt(n int, a netip.Addr) (string, bool) {
	if a.Unmap().Is4() {
		return icmp4[n], true
	}
	if n >= len(icmp6) {
		return "", false
	}
	return icmp6[n], true
}

// fast are the ways to send with the SYN. The world gives no cookies, so nothing
// is, but the calls are others.
func fast(what string, port uint16) []attempt {
	var all []attempt
	for _, at := range farEach(port) {
		name := what + "/" + familyName(at.Addr())
		all = append(all,
			attempt{name: name + "/MSG_FASTOPEN", at: at, steps: strings.Fields("fastopen=hello soerror recv")},
			attempt{name: name + "/MSG_FASTOPEN non-blocking", at: at, steps: strings.Fields("nonblock fastopen=hello poll soerror")},
			attempt{name: name + "/TCP_FASTOPEN_CONNECT", at: at, steps: strings.Fields("fastconnect connect soerror send=hello recv")})
	}
	return all
}

// accepted are the attempts that a server accepts.
func accepted() []attempt {
	var all []attempt
	for _, at := range farEach(portEcho) {
		for way, steps := range map[string][]string{"blocking": wayBlocking, "poll": wayPoll, "next": wayNext, "epoll": wayEpoll, "io_uring": wayRing} {
			all = append(all, attempt{name: "good/" + familyName(at.Addr()) + "/" + way, at: at, steps: talks(steps)})
		}
	}
	for _, at := range farEach(portCloses) {
		name := "closes at once/" + familyName(at.Addr())
		all = append(all,
			attempt{name: name + "/blocking", at: at, steps: strings.Fields("connect recv soerror")},
			attempt{name: name + "/poll", at: at, steps: strings.Fields("nonblock connect poll soerror connect")})
	}
	for _, at := range farEach(portGreets) {
		all = append(all, attempt{name: "greets/" + familyName(at.Addr()), at: at, steps: strings.Fields("connect recv recv peer")})
	}
	for source, at := range map[string]netip.AddrPort{"192.0.2.1": far4(portEcho), "2001:db8:1::1": far6(portEcho), "::ffff:192.0.2.1": farEach(portEcho)[2]} {
		for _, port := range []uint16{portEcho, portClosed} {
			at := netip.AddrPortFrom(at.Addr(), port)
			all = append(all, attempt{name: fmt.Sprintf("bound/%s", at), at: at, steps: append([]string{"bind=" + source}, wayBlocking...)})
		}
	}
	for _, at := range farEach(portLate) {
		all = append(all,
			attempt{name: "late/" + familyName(at.Addr()), at: at, steps: talks(wayLate), soft: true},
			attempt{name: "late/blocking/" + familyName(at.Addr()), at: at, steps: talks(wayBlocking), soft: true})
	}
	all = append(all, fast("good", portEcho)...)
	for i := range all {
		all[i].answers = true
	}
	return all
}

// atOnce is how many applications run side by side.
func atOnce() int { return 50 * runtime.NumCPU() }

// perform has an application make every attempt, and returns what each saw.
func perform(t testing.TB, g *ground, all []attempt) map[string]transcript {
	t.Helper()
	saw := make(map[string]transcript, len(all))
	var mu sync.Mutex
	var running sync.WaitGroup
	tokens := make(chan struct{}, atOnce())
	for _, a := range all {
		tokens <- struct{}{}
		running.Go(func() {
			defer func() { <-tokens }()
			app, err := g.start(arguments(a.at, a.steps...)...)
			var tr transcript
			if err == nil {
				tr, err = app.rest()
			}
			if err != nil {
				t.Errorf("%s: %v", a.name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			saw[a.name] = tr
		})
	}
	running.Wait()
	return saw
}

// compare fails the test where an application can tell the difference.
func compare(t testing.TB, g *ground, all []attempt, without map[string]transcript) {
	t.Helper()
	before := g.early(t)
	with := perform(t, g, all)
	busy := g.early(t) != before
	for _, a := range all {
		want, got := without[a.name], with[a.name]
		if busy && a.seen(got) != a.seen(want) {
			g.calmly(t, func() bool {
				got = perform(t, g, []attempt{a})[a.name]
				return a.seen(got) == a.seen(want)
			})
		}
		if a.seen(got) != a.seen(want) {
			t.Errorf("%s (%s):\n without %s\n with    %s", a.name, a.at, want, got)
			continue
		}
		// The moment: no SYN had to be sent again that had not to be before.
		// The machine may be busy, so who was late gets other chances.
		for range 3 {
			if a.soft || want.retrans() > 0 || got.retrans() == 0 {
				break
			}
			t.Logf("%s: once more, the SYN was sent %d times", a.name, 1+got.retrans())
			got = perform(t, g, []attempt{a})[a.name]
		}
		if !a.soft && want.retrans() == 0 && got.retrans() > 0 {
			t.Errorf("%s: the SYN is sent %d times, without Pillion once", a.name, 1+got.retrans())
		}
	}
}

// seen is what an attempt's transcript says for certain. For IPv4, the kernel
// wakes who polls for an ICMP error before it ends the connection, so that one
// looks before or after.
func (a attempt) seen(tr transcript) string {
	if !a.soft || !a.at.Addr().Unmap().Is4() {
		return tr.String()
	}
	all := slices.Clone(tr)
	for n, r := range all {
		if strings.Contains(r.Note, "ERR") {
			all[n].Note = "ERR"
		}
	}
	return all.String()
}

// sound fails the test if what the baseline saw is not what the world is for.
func sound(t testing.TB, all []attempt, saw map[string]transcript) {
	t.Helper()
	errnos := map[string]int{}
	for _, a := range all {
		tr := saw[a.name]
		if a.answers && !strings.Contains(tr.String(), "send=5") && slices.Contains(a.steps, "send=hello") {
			t.Errorf("%s, without Pillion: %s", a.name, tr)
		}
		for _, r := range tr {
			errnos[r.Errno]++
			if r.Call == "soerror" && r.Note != "" {
				errnos[r.Note]++
			}
		}
	}
	for _, want := range []string{"ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "EACCES", "EINVAL", "ETIMEDOUT", "EINPROGRESS", "EALREADY", "EISCONN", "ECONNABORTED", "ENOPROTOOPT"} {
		if errnos[want] == 0 {
			t.Errorf("no attempt ends in %s without Pillion: %v", want, errnos)
		}
	}
}

// TestSame makes every attempt without Pillion and with it: mirrored all of them,
// adaptive those that nobody answers, since the others may be early.
func TestSame(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	bad := slices.Concat(failing(), silent())
	all := append(accepted(), bad...)
	g.fresh(t)
	without := perform(t, g, all)
	sound(t, all, without)
	for mode, attempts := range map[string][]attempt{"mirror": all, "adaptive": bad} {
		t.Run(mode, func(t *testing.T) {
			g.fresh(t)
			i := g.with(t, "connect: "+mode)
			compare(t, g, attempts, without)
			redirected(t, i, len(attempts)/2)
		})
	}
	t.Run("direct", func(t *testing.T) { g.sameByDirect(t, all, without) })
}

// redirected waits until at least so many connections have ended, and fails the
// test unless they went by relay. On a busy machine the handler may be late, and
// a few pass.
func redirected(t testing.TB, i *rig.Instance, least int) {
	t.Helper()
	var relayed, all count
	testutil.Eventually(t, rig.Limit, func() bool {
		relayed, all = 0, 0
		for _, total := range i.Totals(t) {
			all += count(total.Count)
			if total.Path == flow.PathRelay {
				relayed += count(total.Count)
			}
		}
		return int(all) >= least
	}, "ended connections: want ", least, ", have ", &all, ", of them by relay ", &relayed)
	if int(relayed)*10 < least*9 {
		t.Errorf("%d connections went by relay, want %d: %v, %v", relayed, least, i.Totals(t), i.Reasons(t))
	}
}
