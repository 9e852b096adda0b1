package matrix

import (
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// appLimit is how long an application may run.
const appLimit = time.Minute

// size is how many bytes are echoed.
const size = 150001

// seen is one connection, as the application saw it.
type seen struct {
	To       string
	First    string // what a call that did not wait said
	Error    string
	Again    string // what one more connect said
	Ready    string
	Peer     string
	PeerPort int `json:"peer_port"`
	Own      string
	OwnPort  int `json:"own_port"`
	Protocol int
	Mark     int
	Device   int
	Pending  int // SO_ERROR
	// SynData tells that data went with the SYN, and was taken.
	SynData int `json:"syn_data"`
	Sent    int
	Got     int
	Same    bool
}

// place is where an application runs.
func (w *world) place(box, nested bool) testutil.Place {
	p := testutil.Place{NS: w.App, Cgroup: w.Scope}
	if box {
		p.NS, p.Cgroup = w.box, w.nested
	}
	if nested {
		p.Cgroup = w.nested
	}
	return p
}

// process is a running application.
type process struct {
	cmd            *exec.Cmd
	stdout, stderr rig.Log
	gate           io.Closer
	limit          *time.Timer
}

// launch starts an application, and waits until it stands at its gate, if it has
// one.
func launch(t *testing.T, p testutil.Place, cmd *exec.Cmd, gated bool) *process {
	t.Helper()
	a := &process{cmd: cmd}
	cmd.Stdout, cmd.Stderr = &a.stdout, &a.stderr
	var err error
	if gated {
		a.gate, err = cmd.StdinPipe()
	}
	if err == nil {
		err = p.Start(cmd)
	}
	if err != nil {
		t.Fatalf("%s: %v", cmd, err)
	}
	a.limit = time.AfterFunc(appLimit, func() { cmd.Process.Kill() })
	if gated {
		testutil.Eventually(t, rig.Limit, func() bool { return a.stdout.String() != "" }, cmd, " is at its gate")
	}
	return a
}

// end waits for an application, which writes a line of JSON for each connection.
func (a *process) end(t *testing.T) []seen {
	t.Helper()
	if a.gate != nil {
		a.gate.Close()
	}
	err := a.cmd.Wait()
	a.limit.Stop()
	var all []seen
	for d := json.NewDecoder(strings.NewReader(a.stdout.String())); err == nil; {
		var s seen
		if err = d.Decode(&s); err == nil {
			all = append(all, s)
		}
	}
	if err != io.EOF {
		t.Errorf("%s: %v\n%s%s", a.cmd, err, a.stdout.String(), a.stderr.String())
		return nil
	}
	return all
}

// cell is one way for sockets of one family, by one application.
type cell struct {
	app string
	way
	family
	sourcePort int
}

func (c cell) String() string { return fmt.Sprintf("%s, %s, %s", c.way.name, c.family.name, c.app) }

// start has the C application make the connections of a cell.
func (w *world) start(t *testing.T, c cell) *process {
	t.Helper()
	w.tune(t, c.fastOpen)
	program, socket := c.way.name, c.family.name
	if c.program != "" {
		program = c.program
	}
	if socket == "link" {
		socket = "6"
	}
	dest := c.dest
	switch {
	case c.toRouted:
		dest = c.routed
	case c.toBehind:
		dest = c.behind
	}
	cmd := exec.Command(w.ways[c.app], socket, program, dest, port)
	cmd.Env = w.environment(c.family, c.sourcePort)
	return launch(t, w.place(c.box, c.nested), cmd, c.gated)
}

// tune has listeners take data with a SYN, or not, if they could when they began
// to listen.
func (w *world) tune(t *testing.T, taken bool) {
	t.Helper()
	if taken == w.tuned {
		return
	}
	w.tuned = taken
	value := fastOpenClient
	if taken {
		value = fastOpenBoth
	}
	w.App.Sysctl(t, "net/ipv4/tcp_fastopen", value)
}

// cells are all that there are, by the C application. A bound source port is used
// once only: the kernel keeps its connections in TIME_WAIT.
func (w *world) cells() []cell {
	var all []cell
	for _, f := range families() {
		for _, way := range ways() {
			if way.wanted(f)[0] == none {
				continue
			}
			for app := range w.ways {
				w.lastPort++
				all = append(all, cell{app, way, f, w.lastPort})
			}
		}
	}
	return all
}
