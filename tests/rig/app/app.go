package app

import (
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TalkSize is how many bytes [Application.Talk] sends, after [HeadSize] the first time, and
// how many come back.
const TalkSize = 5

// Application is the application, from the test's side.
type Application struct {
	// Patience is how long a connect may take.
	Patience time.Duration
	in       *json.Encoder
	out      *json.Decoder
	// expect bounds the next answer, if something can.
	expect func(time.Time) error
}

// Start starts the application in the scope of a rig. It ends with the test.
func Start(t testing.TB, r *rig.Rig) *Application {
	t.Helper()
	cmd := r.Command(os.Args[0])
	cmd.Env = append(os.Environ(), Env+"=-")
	cmd.Stderr = os.Stderr
	in, out := testutil.Pipes(t, cmd)
	if err := r.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill() // it may be waiting for something
		cmd.Wait()
	})
	a := newApp(in, out)
	if d, ok := out.(interface{ SetReadDeadline(time.Time) error }); ok {
		a.expect = d.SetReadDeadline
	}
	return a
}

// Connect connects to the application that listens at a path, as soon as it does.
func Connect(t testing.TB, path string) *Application {
	t.Helper()
	var c net.Conn
	testutil.Eventually(t, rig.Limit, func() (ok bool) {
		var err error
		c, err = net.Dial("unix", path)
		return err == nil
	}, "somebody listens at ", path)
	t.Cleanup(func() { c.Close() })
	a := newApp(c, c)
	a.expect = c.SetDeadline
	return a
}

func newApp(in io.Writer, out io.Reader) *Application {
	return &Application{Patience: rig.Limit, in: json.NewEncoder(in), out: json.NewDecoder(out)}
}

func (a *Application) do(t testing.TB, o order) (got answer) {
	t.Helper()
	o.Patience = a.Patience
	if a.expect != nil {
		a.expect(time.Now().Add(lifetime + 2*rig.Limit))
	}
	if err := a.in.Encode(o); err != nil {
		t.Fatalf("order %s: %v", o.Do, err)
	}
	if err := a.out.Decode(&got); err != nil {
		t.Fatalf("order %s: %v", o.Do, err)
	}
	return got
}

// First returns what the connect before anything else came to, as Dial does.
func (a *Application) First(t testing.TB) string {
	t.Helper()
	r := a.do(t, order{Do: actFirst})
	return r.Name + r.Errno
}

// Dial connects once, and returns the server's name or the errno.
func (a *Application) Dial(t testing.TB, to netip.AddrPort) string {
	t.Helper()
	r := a.do(t, order{Do: actDial, To: to})
	return r.Name + r.Errno
}

// Open connects, and keeps the connection.
func (a *Application) Open(t testing.TB, id string, to netip.AddrPort) string {
	t.Helper()
	r := a.do(t, order{Do: actOpen, ID: id, To: to})
	return r.Name + r.Errno
}

// Talk sends bytes on an open connection, and returns why they do not come back;
// empty: they do.
func (a *Application) Talk(t testing.TB, id string) string {
	t.Helper()
	return a.do(t, order{Do: actTalk, ID: id}).Errno
}

// EndOf waits until an open connection ends, and returns how.
func (a *Application) EndOf(t testing.TB, id string) string {
	t.Helper()
	return a.do(t, order{Do: actEnded, ID: id}).Errno
}

// Close closes an open connection; without an ID all of them.
func (a *Application) Close(t testing.TB, id string) {
	t.Helper()
	a.do(t, order{Do: actClose, ID: id})
}

// Load begins a load; there is one at a time. Those of its connections that stay are
// open when it returns.
func (a *Application) Load(t testing.TB, l Load) {
	t.Helper()
	a.do(t, order{Do: actLoad, Load: &l})
}

// Turn returns what has become of the load so far.
func (a *Application) Turn(t testing.TB) *Report {
	t.Helper()
	return a.do(t, order{Do: actTurn}).Report
}

// Unload ends the load, and returns what became of it.
func (a *Application) Unload(t testing.TB) *Report {
	t.Helper()
	return a.do(t, order{Do: actUnload}).Report
}
