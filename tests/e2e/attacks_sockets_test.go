package e2e

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestAttackSocketOptions has an application with every right try to get around
// the capture by what it sets on its sockets: what escapes is counted as such.
func TestAttackSocketOptions(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	s.Serve(t, netip.AddrPortFrom(rig.Far4, 7000), tellsWhom("far"))
	s.Serve(t, netip.AddrPortFrom(rig.Far6, 7000), tellsWhom("far"))
	s.app.learn(`
def meet(a, opts, before=None):
    s = new(a, SOCK_STREAM, opts)
    try:
        if before: before(s)
        s.connect((a, 7000))
        name, seen = s.makefile("rb").readline().decode().split()
        return "passed" if seen.endswith(":%%d" %% s.getsockname()[1]) else "relayed"
    except TimeoutError: return "timeout"
    except OSError as e: return errno.errorcode[e.errno]
    finally: s.close()
`)
	tests := []struct{ name, opts, want, reason string }{
		{"a mark", "(SOL_SOCKET, SO_MARK, 77)", "relayed", "default"},
		{"a device", "(SOL_SOCKET, SO_BINDTODEVICE, b'eth0')", "passed", "bound_device"},
		{"IP_TRANSPARENT", "(IPPROTO_IP, IP_TRANSPARENT, 1)", "relayed", "default"},
		{"IP_FREEBIND", "(IPPROTO_IP, IP_FREEBIND, 1)", "relayed", "default"},
		{"a priority", "(SOL_SOCKET, SO_PRIORITY, 6)", "relayed", "default"},
		{"no routing", "(SOL_SOCKET, SO_REUSEPORT, 1)", "relayed", "default"},
	}
	for _, tt := range tests {
		for _, to := range []netip.Addr{rig.Far4, rig.Far6} {
			before := s.i.Reasons(t)
			if got := s.app.do("meet(%q, [%s])", to, tt.opts); got != tt.want {
				t.Errorf("%s to %s: %q, want %q", tt.name, to, got, tt.want)
			}
			counted(t, s.i, before, map[string]uint64{tt.reason: 1, "no_decision": 0})
		}
	}
	s.i.Conserved(t)
}

// TestAttackPassedSockets passes sockets between the scope and outside. The
// kernel side goes by where a socket was made.
func TestAttackPassedSockets(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	one := s.Scope.Child(t, "one")
	a, out := captive(t, s.Rig, one), outsider(t, s.Rig)
	path := filepath.Join(t.TempDir(), "pass")
	out.wants("None", "exec('p = so.socket(AF_UNIX); p.bind(%q); p.listen()', globals())", path)
	a.wants("None", "exec('q = so.socket(AF_UNIX); q.connect(%q)', globals())", path)
	out.wants("None", "exec('q = p.accept()[0]', globals())")
	for _, who := range []*actor{a, out} {
		who.learn(`
def give(s): so.send_fds(q, [b"x"], [s.fileno()])
def take(): return so.socket(fileno=so.recv_fds(q, 1, 1)[1][0])
`)
	}
	before, counters := arrived(t, s.i), s.i.Reasons(t)
	// One from outside: it is not captured, and the law holds.
	out.wants("None", "exec('s = new(\"1.1.1.1\"); give(s)', globals())")
	a.wants("None", "exec('s = take(); s.settimeout(10)', globals())")
	a.wants("None", "s.connect((%q, %d))", rig.Far4, sitePort)
	a.wants(`b'far\n'`, "s.recv(100)")
	s.undisturbed(t, before)
	counted(t, s.i, counters, map[string]uint64{"default": 0, "no_decision": 0})
	s.i.Conserved(t)
	// One from the scope is, whoever connects it.
	a.wants("None", "exec('s = new(\"1.1.1.1\"); give(s)', globals())")
	out.wants("None", "exec('s = take(); s.settimeout(10)', globals())")
	out.wants("None", "s.connect((%q, %d))", rig.Far4, sitePort)
	out.wants(`b'far\n'`, "s.recv(100)")
	counted(t, s.i, counters, map[string]uint64{"default": 1})
	out.do("s.close()")
	a.do("s.close()")
	records := s.i.Ended(t, int(before)+1)
	if r := records[len(records)-1]; r.Path != flow.PathRelay || r.OrigDst.Addr() != rig.Far4 {
		t.Errorf("record %+v", r)
	}
	// An outsider who cannot be told from an application by its socket cannot
	// reach slots by it, either.
	a.wants("None", "exec('s = new(\"1.1.1.1\"); give(s)', globals())")
	out.wants("None", "exec('s = take(); s.settimeout(10)', globals())")
	out.wants("111", "s.connect_ex((%q, %d))", s.slots.forms(s.known[0])[0], sitePort)
	s.i.Conserved(t)
}

// TestAttackRawEscape sends a SYN past every hook, by a raw socket. No such
// thing is a connection: it is neither captured nor missed by the law.
func TestAttackRawEscape(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	s.app.learn("%s", forging)
	before := arrived(t, s.i)
	for n, to := range []string{rig.Far4.String(), rig.Far6.String()} {
		source := []string{testutil.AppV4.Addr().String(), testutil.AppV6.Addr().String()}[n]
		s.app.wants("None", "forge(%q, 5555, %q, %d)", source, to, sitePort)
		s.app.wants("None", "forge(%q, 5555, %q, %d)", source, s.slots.forms(s.known[n])[n], sitePort)
	}
	s.undisturbed(t, before)
	s.i.Conserved(t)
	_ = fmt.Sprint
}
