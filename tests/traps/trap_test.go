package traps

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/peers"
)

// system is one that traps are laid for.
type system string

const (
	pillion system = "pillion"
	haproxy system = peers.HAProxy
	nginx   system = peers.Nginx
	envoy   system = peers.Envoy
)

// systems are the columns of the score.
var systems = []system{pillion, haproxy, nginx, envoy}

// trap is a row of the score.
type trap struct {
	number int
	// title says what it is in a few words, how what the test does.
	title, how string
	// links are threads: owner/repository/issues/number on GitHub, or URLs.
	links []string
	// open says why it cannot be run yet, or not here. There is no run then.
	open string
	// notFor says to which peers it does not apply, and why.
	notFor map[system]string
	run    func(t testing.TB, s *site)
}

// Why a trap is not one for a peer.
const (
	noKernel   = "it has nothing in the kernel"
	noLauncher = "it starts no application"
	isNamed    = "the application dials the proxy itself, and knows it"
)

// notForPeers is a trap for those who redirect by programs in the kernel.
func notForPeers(why string) map[system]string {
	return map[system]string{haproxy: why, nginx: why, envoy: why}
}

// notForNamed is a trap for those who redirect.
func notForNamed(why string) map[system]string {
	return map[system]string{haproxy: why, nginx: why}
}

// traps are all of them, by number.
func traps() []trap {
	all := slices.Concat(sockmapTraps, kernelTraps, addressTraps, protocolTraps, platformTraps, lifeTraps)
	slices.SortFunc(all, func(a, b trap) int { return a.number - b.number })
	return all
}

// verdict is what became of a trap and a system.
type verdict string

const (
	pass verdict = "pass"
	fail verdict = "fail"
	none verdict = "n/a"
	open verdict = "open"
)

// result is a cell of the score.
type result struct {
	verdict verdict
	why     string
}

// attempt records what a test would fail with. A real test fails by what the
// rig finds.
type attempt struct {
	testing.TB
	failures []string
}

// halt is how an attempt ends early.
type halt struct{}

func (a *attempt) Error(args ...any) { a.Errorf("%s", strings.TrimSuffix(fmt.Sprintln(args...), "\n")) }
func (a *attempt) Errorf(format string, args ...any) {
	a.failures = append(a.failures, fmt.Sprintf(format, args...))
}
func (a *attempt) Fail()                             { a.Errorf("it failed") }
func (a *attempt) FailNow()                          { panic(halt{}) }
func (a *attempt) Failed() bool                      { return len(a.failures) > 0 }
func (a *attempt) Fatal(args ...any)                 { a.Error(args...); a.FailNow() }
func (a *attempt) Fatalf(format string, args ...any) { a.Errorf(format, args...); a.FailNow() }

// run runs a trap at a site.
func (a *attempt) run(tr trap, s *site) {
	defer func() {
		if r := recover(); r != nil && r != (halt{}) {
			panic(r)
		}
	}()
	tr.run(a, s)
}

// tries is how often a trap is laid anew if Pillion had no processor.
const tries = 3

// fall runs a trap against a system.
func (tr trap) fall(t *testing.T, sys system) result {
	if tr.open != "" {
		return result{open, tr.open}
	}
	if why := tr.notFor[sys]; why != "" {
		return result{none, why}
	}
	a := &attempt{TB: t}
	for range tries {
		a.failures = nil
		site := newSite(t, sys)
		a.run(tr, site)
		if !a.Failed() || !site.late() {
			break
		}
		t.Logf("the machine is too busy: %s", strings.Join(a.failures, "; "))
	}
	if len(a.failures) == 0 {
		return result{verdict: pass}
	}
	if sys == pillion {
		for _, f := range a.failures {
			t.Error(f)
		}
	} else {
		t.Logf("%s: %s", sys, strings.Join(a.failures, "\n"))
	}
	return result{fail, strings.Join(a.failures, "; ")}
}

// TestTraps lays every trap. For Pillion every one that can be run must pass. The
// others run, and the score is written, when PILLION_TRAPS names the file.
func TestTraps(t *testing.T) {
	file := os.Getenv("PILLION_TRAPS")
	score := map[int]map[system]result{}
	for _, tr := range traps() {
		score[tr.number] = map[system]result{}
		for _, sys := range systems {
			if sys != pillion && file == "" {
				continue
			}
			t.Run(fmt.Sprintf("%02d/%s", tr.number, sys), func(t *testing.T) { score[tr.number][sys] = tr.fall(t, sys) })
		}
	}
	if file == "" {
		return
	}
	text, err := render(traps(), score)
	if err == nil {
		err = os.WriteFile(file, []byte(text), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}
