package connect

import (
	"errors"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// pendingApps are applications that connect to what is silent, and try for some
// seconds.
func pendingApps(t *testing.T, g *ground) []*app {
	t.Helper()
	const each = 6
	var apps []*app
	for range each {
		for _, at := range []netip.AddrPort{far4(portSilent), far6(portSilent)} {
			apps = append(apps,
				g.begin(t, arguments(at, "syncnt=2", "connect")...),
				g.begin(t, arguments(at, strings.Fields("nonblock syncnt=2 connect poll soerror")...)...))
		}
	}
	dials(t, g, far4(portSilent), 2*each)
	dials(t, g, far6(portSilent), 2*each)
	return apps
}

// ends fails the test unless all applications learn that they are not connected.
func ends(t *testing.T, apps []*app) {
	t.Helper()
	for _, a := range apps {
		tr, err := a.rest()
		if err != nil {
			t.Errorf("%v after %s", err, tr)
			continue
		}
		errno := tr.last("connect").Errno
		if errno == "EINPROGRESS" {
			errno = tr.last("soerror").Note
		}
		switch errno {
		case "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET":
		default:
			t.Errorf("pending while the handler ended: %s", tr)
		}
	}
}

// within has an application do its steps, and returns what it saw if that takes
// no longer than limit.
func (g *ground) within(limit time.Duration, at netip.AddrPort, steps string) (transcript, error) {
	a, err := g.start(arguments(at, strings.Fields(steps)...)...)
	if err != nil {
		return nil, err
	}
	late := time.AfterFunc(limit, a.kill)
	defer late.Stop()
	return a.rest()
}

// becomes waits until what new connections see is this, and none hangs any more.
func (g *ground) becomes(t *testing.T, at netip.AddrPort, steps, want string) {
	t.Helper()
	var saw transcript
	var err error
	testutil.Eventually(t, rig.Limit, func() bool {
		saw, err = g.within(3*time.Second, at, steps)
		return err == nil && saw.String() == want
	}, "new connections to ", at, " see ", want, "; they see ", &saw, &err)
	for range 10 {
		g.wants(t, at, steps, want)
	}
}

// TestHandlerKilled kills the handler with connects pending: they end, and new
// ones go by on_failure. The next run mirrors again.
func TestHandlerKilled(t *testing.T) {
	t.Parallel()
	const talk = "connect send=hello recv"
	for setting, want := range map[string]string{"open": alive, "closed": refused} {
		t.Run(setting, func(t *testing.T) {
			g := newGround(t)
			i := g.Run(t, "connect: mirror\non_failure: "+setting)
			apps := pendingApps(t, g)
			i.Kill(t)
			for _, at := range []netip.AddrPort{far4(portEcho), far6(portEcho)} {
				steps := talk
				if want == refused {
					steps = "connect"
				}
				g.becomes(t, at, steps, want)
				g.wants(t, netip.AddrPortFrom(at.Addr(), portClosed), "connect", refused)
			}
			ends(t, apps)
			i.Launch(t)
			for _, at := range []netip.AddrPort{far4(portEcho), far6(portEcho)} {
				g.becomes(t, at, talk, alive)
				g.wants(t, netip.AddrPortFrom(at.Addr(), portClosed), "connect", refused)
			}
		})
	}
}

// TestHandlerStopped stops the handler with connects pending: new ones pass it,
// and when it goes on, nothing is left hanging.
func TestHandlerStopped(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	i := g.Run(t, "connect: mirror")
	i.NoLeaks(t)
	apps := pendingApps(t, g)
	i.Halt(t)
	for _, at := range []netip.AddrPort{far4(portEcho), far6(portEcho)} {
		g.becomes(t, at, "connect send=hello recv", alive)
		g.wants(t, netip.AddrPortFrom(at.Addr(), portClosed), "connect", refused)
	}
	i.Signal(t, unix.SIGCONT)
	// While it was stopped, a SYN that came again may have been let by to it.
	for _, a := range apps {
		tr, err := a.rest()
		if err != nil {
			t.Errorf("%v after %s", err, tr)
		}
	}
	for _, at := range []netip.AddrPort{far4(portSilent), far6(portSilent)} {
		dials(t, g, at, 0)
	}
	relays(t, g, i)
}

// relays waits until the handler has connections again, and mirrors.
func relays(t *testing.T, g *ground, i *rig.Instance) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		before := i.Reasons(t)["default"]
		g.wants(t, far4(portEcho), "connect send=hello recv", alive)
		return i.Reasons(t)["default"] > before
	}, "the handler is used again")
	for range 5 {
		g.wants(t, far6(portClosed), "connect", refused)
	}
}

// TestStopWhilePending ends the handler in order, with connects pending.
func TestStopWhilePending(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	i := g.Run(t, "connect: mirror")
	apps := pendingApps(t, g)
	// 75: those that waited had to be ended.
	if err, ok := errors.AsType[*exec.ExitError](i.Stop(t)); !ok || err.ExitCode() != 75 {
		t.Errorf("run: %v, want exit code 75", err)
	}
	ends(t, apps)
	g.wants(t, far4(portEcho), "connect send=hello recv", alive)
}
