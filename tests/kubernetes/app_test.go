package kubernetes

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

// envApp makes this test binary the application.
const envApp = "PILLION_TEST_KUBERNETES_APP"

// app is the application, in the scope: it is told an address, connects, says what
// the server called itself or the errno, and keeps the connection if it is told to.
type app struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	say *json.Encoder
	out *json.Decoder
}

// request is one such line.
type request struct {
	To   netip.AddrPort
	Keep bool // until the next request with Drop
	Drop bool
}

func newApp(t testing.TB, r *rig.Rig) *app {
	t.Helper()
	a := &app{cmd: r.Command(os.Args[0], "-test.run=^TestApplication$")}
	a.cmd.Env = append(os.Environ(), envApp+"=1")
	a.cmd.Stderr = os.Stderr
	var err error
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	a.say, a.out = json.NewEncoder(a.in), json.NewDecoder(out)
	if err := r.Start(a.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.in.Close()
		a.cmd.Wait()
	})
	return a
}

func (a *app) do(t testing.TB, q request) string {
	t.Helper()
	if err := a.say.Encode(q); err != nil {
		t.Fatal(err)
	}
	var answer string
	if err := a.out.Decode(&answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

// dial connects once.
func (a *app) dial(t testing.TB, to netip.AddrPort) string {
	t.Helper()
	return a.do(t, request{To: to})
}

// TestApplication is the application. As a test it does nothing.
func TestApplication(*testing.T) {
	if os.Getenv(envApp) == "" {
		return
	}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var kept []net.Conn
	for {
		var q request
		if in.Decode(&q) != nil {
			os.Exit(0)
		}
		answer := ""
		if q.Drop {
			for _, c := range kept {
				c.Close()
			}
			kept = nil
		} else {
			var c net.Conn
			c, answer = connect(q.To)
			if c != nil && q.Keep {
				kept = append(kept, c)
			} else if c != nil {
				c.Close()
			}
		}
		if out.Encode(answer) != nil {
			os.Exit(1)
		}
	}
}

// connect connects, and hears the server's name.
func connect(to netip.AddrPort) (net.Conn, string) {
	c, err := net.DialTimeout("tcp", to.String(), rig.Limit)
	if err != nil {
		return nil, errnoOf(err)
	}
	c.SetDeadline(time.Now().Add(rig.Limit))
	name := make([]byte, 64)
	n, err := c.Read(name)
	if err != nil {
		c.Close()
		return nil, "connected, then " + errnoOf(err)
	}
	c.SetDeadline(time.Time{})
	return c, strings.TrimSpace(string(name[:n]))
}

func errnoOf(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}
