package matrix

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

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

// addrPort is an address as the records have it: unmapped, without a scope.
func addrPort(t *testing.T, addr string, port int) netip.AddrPort {
	t.Helper()
	a, err := netip.ParseAddr(addr)
	if err != nil {
		t.Errorf("not an address: %v", err)
	}
	return netip.AddrPortFrom(a.WithZone("").Unmap(), uint16(port))
}

// alike is what must not differ with Pillion. A free port is another one every
// time; a bound one is looked at by itself.
func (s seen) alike(w way) seen {
	s.OwnPort = 0
	if !w.fastOpen {
		// The SYN goes to the handler, which does not take data with it,
		// unless all listeners do: a matter of latency.
		s.SynData = 0
	}
	return s
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

// see runs an application, which writes a line of JSON for each connection.
func see(t *testing.T, p testutil.Place, cmd *exec.Cmd) []seen {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := p.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Errorf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, &stdout, &stderr)
		return nil
	}
	var all []seen
	for d := json.NewDecoder(&stdout); ; {
		var s seen
		err := d.Decode(&s)
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Errorf("%s: %v", strings.Join(cmd.Args, " "), err)
			return nil
		}
		all = append(all, s)
	}
}

// cell is one way for sockets of one family, by one application.
type cell struct {
	app string
	way
	family
	sourcePort int
}

func (c cell) String() string { return fmt.Sprintf("%s, %s, %s", c.way.name, c.family.name, c.app) }

// use makes the connections of a cell.
func (w *world) use(t *testing.T, c cell) []seen {
	t.Helper()
	program, socket := c.way.name, c.family.name
	if c.program != "" {
		program = c.program
	}
	if socket == "link" {
		socket = "6"
	}
	cmd := exec.Command(w.ways[c.app], socket, program, c.dest, port)
	cmd.Env = w.environment(c.family, c.sourcePort)
	return see(t, w.place(c.box, c.nested), cmd)
}

// cells are all that there are, by the C application. A bound source port is
// used once only: the kernel keeps its connections in TIME_WAIT.
func (w *world) cells(nextPort *int) []cell {
	var all []cell
	for _, f := range families() {
		for _, way := range ways() {
			if way.wanted(f)[0] == none {
				continue
			}
			for _, app := range []string{"glibc", "musl"} {
				*nextPort++
				all = append(all, cell{app, way, f, *nextPort})
			}
		}
	}
	return all
}
