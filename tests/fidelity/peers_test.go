package fidelity

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// appLimit is how long a program may run.
const appLimit = 4 * time.Minute

// second are further addresses of the application.
var second = []netip.Prefix{netip.MustParsePrefix("192.0.2.9/24"), netip.MustParsePrefix("2001:db8:1::9/64")}

// seen is what a case saw of its connections in one family.
type seen struct {
	Case        string
	Family      int
	Saw         any
	Trouble     string
	Connections int
	Seconds     float64
}

func (s *seen) name() string { return fmt.Sprintf("%s/IPv%d", s.Case, s.Family) }

func (s *seen) text() string {
	if s.Trouble != "" {
		return s.Trouble
	}
	b, err := json.Marshal(s.Saw)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// world is where one program runs.
type world struct {
	*rig.Rig
	kind     string // direct or redirected
	instance *rig.Instance
}

// newWorld makes a world with servers' addresses, and an instance if it is to be
// redirected. prepare, if set, comes before that.
func newWorld(t *testing.T, kind, config string, prepare func(*rig.Rig)) *world {
	t.Helper()
	testutil.Need(t, "python3", "nft", "ip", "ss")
	w := &world{Rig: rig.New(t), kind: kind}
	w.World.AddAddr(t, "lo", netip.PrefixFrom(rig.Far4, 32), netip.PrefixFrom(rig.Far6, 128))
	w.App.AddAddr(t, testutil.AppLink, second...)
	if prepare != nil {
		prepare(w.Rig)
	}
	if kind == "redirected" {
		w.instance = w.Run(t, config)
		w.instance.NoLeaks(t)
	}
	return w
}

// run runs a program of testdata to its end, and returns what its cases saw.
func (w *world) run(program string, cases ...string) ([]seen, error) {
	fd, err := unix.FcntlInt(uintptr(w.World.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ns := os.NewFile(uintptr(fd), "world")
	defer ns.Close()
	cmd := w.Command("python3", append([]string{"-B", "testdata/" + program, w.kind}, cases...)...)
	cmd.ExtraFiles = []*os.File{ns}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := w.Start(cmd); err != nil {
		return nil, err
	}
	late := time.AfterFunc(appLimit, func() { cmd.Process.Kill() })
	defer late.Stop()
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("%s, %s: %w\n%s%s", program, w.kind, err, &stdout, &stderr)
	}
	return parseSeen(&stdout)
}

func parseSeen(from *bytes.Buffer) ([]seen, error) {
	var all []seen
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var s seen
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			return nil, fmt.Errorf("%q: %w", lines.Text(), err)
		}
		all = append(all, s)
	}
	return all, lines.Err()
}

// ran is what one program saw on both ways.
type ran struct {
	direct, redirected []seen
	instance           *rig.Instance
	// apart is set when the application's end of a connection may be gone for
	// long before the handler's: then each has a record of its own.
	apart bool
}

// both runs a program directly and redirected, side by side. Where the machine let the
// handler's beat be late, which the hooks then act on as they should, it says so and does
// it again.
func both(t *testing.T, program, config string, prepare func(*rig.Rig), cases ...string) ran {
	t.Helper()
	const tries = 3
	for n := 1; ; n++ {
		r := bothOnce(t, program, config, prepare, cases...)
		reasons := r.instance.Reasons(t)
		late := reasons[flow.ReasonHoldStale.String()] + reasons[flow.ReasonHandlerStale.String()]
		if late == 0 || n == tries {
			return r
		}
		t.Logf("the handler's beat was late for %d connections", late)
	}
}

func bothOnce(t *testing.T, program, config string, prepare func(*rig.Rig), cases ...string) ran {
	t.Helper()
	worlds := []*world{newWorld(t, "direct", config, prepare), newWorld(t, "redirected", config, prepare)}
	results := make([][]seen, 2)
	errs := make([]error, 2)
	var running sync.WaitGroup
	for n, w := range worlds {
		running.Go(func() { results[n], errs[n] = w.run(program, cases...) })
	}
	running.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	r := ran{direct: results[0], redirected: results[1], instance: worlds[1].instance}
	if len(r.direct) == 0 || len(r.direct) != len(r.redirected) {
		t.Fatalf("%d cases directly, %d redirected", len(r.direct), len(r.redirected))
	}
	return r
}

// known are differences that docs/fidelity.md explains: by case, what is to be
// replaced in what was seen directly.
type known map[string]*strings.Replacer

// compare fails the test for every case that differs, and unless all of its
// connections were relayed.
func (r *ran) compare(t *testing.T, differs known) {
	t.Helper()
	connections := 0
	for n := range r.direct {
		d, p := &r.direct[n], &r.redirected[n]
		connections += p.Connections
		t.Run(d.name(), func(t *testing.T) {
			t.Logf("%.1f s directly, %.1f s redirected", d.Seconds, p.Seconds)
			if d.Trouble != "" {
				t.Fatalf("it does not work without Pillion:\n%s", d.Trouble)
			}
			want := d.text()
			if change := differs[d.Case]; change != nil {
				if want = change.Replace(want); want == d.text() {
					t.Errorf("the known difference is none: %s", want)
				}
			}
			if got := p.text(); d.name() != p.name() || got != want {
				t.Errorf("with Pillion:\n got: %s\nwant: %s", got, want)
			}
		})
	}
	if n := r.instance.AllRelayed(t, connections); n != connections && !r.apart {
		t.Errorf("%d connections were relayed, want %d", n, connections)
	}
}

// nft loads rules into the namespace of the calling thread.
func nft(rules string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, out)
	}
	return nil
}
