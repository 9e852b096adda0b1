package failure

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// The kinds of destination. Each is there in both families.
const (
	toRelay   = "relay"        // a service on relay
	toOther   = "relay, other" // one whose on_failure is the opposite of the default
	toUnnamed = "relay, unnamed"
	toDirect  = "direct"
	toPass    = "pass"
)

// The settings of on_failure.
const (
	onOpen   = "open"
	onClosed = "closed"
)

const (
	attempts = 20 // per cell
	openPer  = 4  // open connections per kind
	// patience is the application's, but letGo that of a connection of the
	// stream that a handler may leave waiting: there is one to each kind every
	// pace. quickly is enough to see that nothing comes.
	patience = 10 * time.Second
	letGo    = 2 * time.Second
	pace     = 40 * time.Millisecond
	quickly  = 300 * time.Millisecond

	servicePort, unnamedPort, manyPort = 80, 7000, 7070
)

// kinds are all, and redirected those that the handler carries.
var (
	kinds      = []string{toRelay, toOther, toUnnamed, toDirect, toPass}
	redirected = []string{toRelay, toOther, toUnnamed}
)

// opposite is the other setting of on_failure.
func opposite(setting string) string {
	if setting == onOpen {
		return onClosed
	}
	return onOpen
}

// usual is what becomes of a new connection when all is well.
func usual(kind string) word {
	switch kind {
	case toDirect:
		return direct
	case toPass:
		return passed
	default:
		return carried
	}
}

// byFailure is what on_failure makes of one that cannot be redirected.
func byFailure(kind, setting string) word {
	if kind == toOther {
		setting = opposite(setting)
	}
	switch {
	case kind == toDirect, kind == toPass:
		return usual(kind)
	case setting == onClosed:
		return refused
	case kind == toUnnamed:
		return passed // nobody knows an endpoint
	default:
		return direct
	}
}

// stage is a world with a running instance and an application, before, in and
// after a fault.
type stage struct {
	*rig.Rig
	*rig.Instance
	*app
	fault   *fault
	setting string
	to      destinations

	// Of the fault, as needed: what undoes it, and what is looked at.
	undo   func()
	extra  any
	former *app // that has the open connections, if not app
}

// introduce is a server that says its name and whom it sees, and then repeats
// what it hears.
func introduce(name string) func(net.Conn) {
	return func(c net.Conn) {
		fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
		io.Copy(c, c)
	}
}

func newStage(t *testing.T, f *fault, setting string) *stage {
	t.Helper()
	s := &stage{Rig: rig.New(t), fault: f, setting: setting, to: destinations{}}
	config := "relay: {workers: 1}\non_failure: " + setting + "\n" + f.config + "services:\n"
	for _, family := range []struct {
		far netip.Addr
		vip string
	}{{rig.Far4, "10.96.0.%d"}, {rig.Far6, "fd00:96::%d"}} {
		one := s.Serve(t, netip.AddrPortFrom(family.far, 7001), introduce(endpoint))
		two := s.Serve(t, netip.AddrPortFrom(family.far, 7002), introduce(endpoint))
		for n, kind := range []string{toRelay, toOther, toDirect, toPass} {
			at := s.Serve(t, netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf(family.vip, n+1)), servicePort), introduce(origin))
			s.to[kind] = append(s.to[kind], at)
			more := map[string]string{
				toOther: ", on_failure: " + opposite(setting), toDirect: ", path: direct", toPass: ", path: pass",
			}[kind]
			if kind != toPass {
				more += fmt.Sprintf(", endpoints: [%q, %q]", one, two)
			}
			config += fmt.Sprintf("  - {address: %q%s}\n", at, more)
		}
		s.to[toUnnamed] = append(s.to[toUnnamed], s.Serve(t, netip.AddrPortFrom(family.far, unnamedPort), introduce(origin)))
	}
	if f.prepare != nil {
		more := f.prepare(t, s)
		config = strings.Replace(config, "services:\n", "services:\n"+more, 1)
	}
	s.Instance = s.Run(t, config)
	s.app = newApp(t, s.Rig, 0)
	return s
}

// want is what becomes of new connections in the fault.
func (f *fault) want(kind, setting string) word {
	if w, ok := f.news[kind]; ok {
		if w == "" {
			return byFailure(kind, setting)
		}
		return w
	}
	if f.falls {
		return byFailure(kind, setting)
	}
	return usual(kind)
}

// wantOpen is what becomes of open ones.
func (f *fault) wantOpen(kind string) word {
	if f.open != "" && usual(kind) == carried {
		return f.open
	}
	return unaffected
}

// streams has the application connect to every kind of destination, all the time.
func (s *stage) streams(t *testing.T) {
	t.Helper()
	for _, kind := range kinds {
		s.do(t, order{Do: "stream", Key: kind, To: s.to[kind], Every: pace, Patience: s.streamPatience(kind)})
	}
}

// streamPatience is how long a connection of the stream waits. Where no handler is
// asked none is left waiting, and only a machine that is busy makes it late.
func (s *stage) streamPatience(kind string) time.Duration {
	if usual(kind) != carried || s.fault.news[kind] == passed {
		return patience
	}
	return letGo
}

// tally counts what connections met.
type tally map[word]int

func tallyOf(seen []outcome) tally {
	c := tally{}
	for _, o := range seen {
		c[o.Word]++
	}
	return c
}

// tries has the application connect, until as many as there are to be in a row
// come out as wanted. What may come out otherwise is that the handler was late,
// on a busy machine: then it goes by on_failure.
func (s *stage) tries(t *testing.T, a *app, kind string, want word) tally {
	t.Helper()
	var seen []outcome
	testutil.Eventually(t, rig.Limit, func() bool {
		seen = a.do(t, order{Do: "try", To: s.targets(kind), Count: attempts, Patience: patience})
		right := true
		for _, o := range seen {
			if o.Word == want {
				continue
			}
			right = false
			if want != carried || o.Word != byFailure(kind, s.setting) {
				t.Fatalf("%s: %s, want %s\n%s", kind, &o, want, s.Log())
			}
		}
		return right
	}, kind, " is ", want, &printed{&seen})
	return tallyOf(seen)
}

// targets are where tries go.
func (s *stage) targets(kind string) []netip.AddrPort {
	if s.fault.targets != nil {
		if to := s.fault.targets(s, kind); to != nil {
			return to
		}
	}
	return s.to[kind]
}

// asks has the application use its open connections of a kind.
func (s *stage) asks(t *testing.T, kind string, limit time.Duration) []outcome {
	t.Helper()
	a := s.app
	if s.former != nil {
		a = s.former
	}
	return a.do(t, order{Do: "ask", Key: kind, Patience: limit})
}

// printed is outcomes that are printed as they are then.
type printed struct{ seen *[]outcome }

func (p *printed) String() string {
	var b strings.Builder
	for _, o := range *p.seen {
		fmt.Fprintf(&b, "\n%s", &o)
	}
	return b.String()
}

// logged is the instance's log as it is then.
type logged struct{ s *stage }

func (l *logged) String() string { return l.s.Log() }
