package e2e

import (
	"strings"
	"testing"
	"time"
)

// kill is one death of the handler, and when it was back.
type kill struct {
	window
	back int64
}

// forgiven is how long a handler may be away, at least, before what was on its
// way to it is refused: bpf/include/decide.h says how long it is awaited after its
// last sign of life, which is up to half a second older than its death.
const forgiven = 2 * time.Second

// TestKillRounds kills the handler three times while thousands connect: with
// on_failure open none of them fails. A connect whose SYN finds no listener any
// more takes as long as the kernel takes to send it again. What the handler had
// accepted, or the kernel for it, ends unserved, since both ends believe in the
// connection: at most one per kill and worker of the client.
func TestKillRounds(t *testing.T) {
	g := newGround(t)
	i := g.Run(t, "on_failure: open")
	j := g.job()
	j.Workers, j.Pause, j.Limit = 8, 5*time.Millisecond, 20*time.Second
	l := startLoad(t, g.Rig, j)
	var kills []kill
	for range 3 {
		l.becomes(t, "relayed", (*outcome).relayed)
		k := kill{window: window{from: now()}}
		i.Kill(t)
		k.to = now()
		l.becomes(t, "passed", (*outcome).passed)
		i.Launch(t)
		k.back = now()
		kills = append(kills, k)
	}
	l.becomes(t, "relayed", (*outcome).relayed)
	all := l.stop(t)
	unserved, counts := make([]int, len(kills)), map[string]int{}
	for _, o := range all {
		n := 0
		for n < len(kills) && !kills[n].touches(&o) {
			n++
		}
		what := kind(&o)
		counts[what]++
		switch {
		case strings.HasPrefix(o.Said, selfName):
			t.Errorf("the application reached itself: %s", &o)
		case o.served():
		case n == len(kills):
			t.Errorf("%s, and not in flight at a kill: %s", what, &o)
		case what == "unserved":
			unserved[n]++
		case what == "refused" && time.Duration(kills[n].back-kills[n].from) > forgiven && time.Duration(o.Took) > forgiven:
			// Nobody was back in time.
		default:
			t.Errorf("%s: %s", what, &o)
		}
	}
	for n, u := range unserved {
		if u > j.Workers {
			t.Errorf("kill %d: %d unserved, at most %d in flight", n, u, j.Workers)
		}
	}
	t.Logf("%v, unserved at the kills: %v", counts, unserved)
}

// kind says what became of a connection.
func kind(o *outcome) string {
	switch {
	case o.relayed() && time.Duration(o.Took) > 900*time.Millisecond:
		return "relayed by the next handler"
	case o.relayed():
		return "relayed"
	case o.passed():
		return "passed"
	case o.connected(), o.reset():
		return "unserved"
	case o.refused():
		return "refused"
	default:
		return "failed"
	}
}
