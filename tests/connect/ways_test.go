package connect

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// silent are the attempts that nobody answers, with what ends them.
func silent() []attempt {
	var all []attempt
	for i, at := range farEach(portSilent) {
		good := farEach(portEcho)[i]
		for name, steps := range map[string]string{
			"TCP_SYNCNT":           "syncnt=1 connect soerror",
			"TCP_SYNCNT poll":      "nonblock syncnt=1 connect connect poll soerror connect",
			"TCP_USER_TIMEOUT":     "usertimeout=1500 connect soerror",
			"shutdown":             "nonblock connect shutdown poll0 soerror peer to=" + slashed(good) + " connect poll soerror",
			"signal":               "syncnt=1 alarm=200 connect connect soerror",
			"signal, restarted":    "syncnt=1 restart=200 connect soerror",
			"SO_SNDTIMEO":          "sndtimeo=300 connect connect soerror peer",
			"closed while it is":   "nonblock connect connect poll0 reopen to=" + slashed(good) + " connect send=hello recv",
			"AF_UNSPEC":            "nonblock connect poll0 unspec soerror peer to=" + slashed(good) + " connect poll soerror connect send=hello poll",
			"AF_UNSPEC, as it was": "nonblock syncnt=1 connect unspec connect connect poll soerror",
		} {
			all = append(all, attempt{name: "silence/" + familyName(at.Addr()) + "/" + name, at: at, steps: strings.Fields(steps), soft: true})
		}
	}
	return all
}

func slashed(at netip.AddrPort) string { return fmt.Sprintf("%s/%d", at.Addr(), at.Port()) }

// TestSameSource makes attempts from a source that was used just before.
func TestSameSource(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	all := again()
	without := perform(t, g, all)
	t.Run("mirror", func(t *testing.T) {
		g.with(t, "connect: mirror")
		compare(t, g, all, without)
	})
	t.Run("direct", func(t *testing.T) { g.sameByDirect(t, all, without) })
}

// again are the attempts that use a source, address and port, once more: what is
// left of the connection before must not be in the way, or must.
func again() []attempt {
	var all []attempt
	sources := []string{"192.0.2.1", "2001:db8:1::1", "::ffff:192.0.2.1"}
	own := 600 // a port for each, none of which is anybody's by chance
	add := func(name string, n int, port uint16, soft bool, steps string) {
		own++
		bind := fmt.Sprintf("reuse bind=%s/%d ", sources[n], own)
		at := farEach(port)[n]
		all = append(all, attempt{name: "again/" + name + "/" + familyName(at.Addr()), at: at, soft: soft, steps: strings.Fields(strings.ReplaceAll(steps, "BIND ", bind))})
	}
	for n := range sources {
		add("given up", n, portLate, true, "BIND nonblock connect reopen BIND nonblock connect poll soerror send=hello pollin recv")
		add("given up, refused", n, portLateRST, true, "BIND nonblock connect reopen BIND nonblock connect poll soerror")
		add("given up, silent", n, portSilent, true, "BIND nonblock connect reopen BIND syncnt=1 connect soerror")
		add("given up by AF_UNSPEC", n, portLate, true, "BIND nonblock connect unspec connect poll soerror send=hello pollin recv")
		add("server ended", n, portGreets, false, "BIND connect recv recv reopen BIND connect recv recv")
		add("client ended", n, portEcho, false, "BIND connect shutdown recv reopen BIND connect")
		add("refused", n, portClosed, false, "BIND connect reopen BIND connect reopen BIND nonblock connect poll soerror")
		add("another server", n, portGreets, false, "BIND connect recv recv reopen to="+slashed(farEach(portEcho)[n])+" BIND connect send=hello recv")
		add("interrupted", n, portLate, true, "alarm=200 connect connect soerror connect send=hello pollin recv")
		add("interrupted, restarted", n, portLate, true, "restart=200 connect soerror send=hello pollin recv")
	}
	return all
}
