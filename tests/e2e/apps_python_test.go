package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestPythonSockets makes connections in many ways, and asks each whom it is
// connected to and from where.
func TestPythonSockets(t *testing.T) {
	testutil.Need(t, "python3")
	r := rig.New(t)
	r.Serve(t, at4(7), echoBack)
	r.Serve(t, at6(7), echoBack)
	s := play(t, r, "")
	out := runApp(t, r, "", "python3", "testdata/python_sockets.py")
	var want strings.Builder
	three := func(prefix string) {
		fmt.Fprintf(&want, "%sv4 198.51.100.7 7 192.0.2.1 same\n", prefix)
		fmt.Fprintf(&want, "%sv6 2001:db8:7::7 7 2001:db8:1::1 same\n", prefix)
		fmt.Fprintf(&want, "%smapped ::ffff:198.51.100.7 7 ::ffff:192.0.2.1 same\n", prefix)
	}
	three("")
	three("nonblocking-")
	want.WriteString("bound 198.51.100.7 7 192.0.2.1 same\n")
	three("mptcp-")
	three("fastopen1-")
	three("fastopen2-")
	want.WriteString("fastopen-connect 198.51.100.7 7 192.0.2.1 same\n")
	same(t, "sockets", out, want.String())
	if n := s.AllRelayed(t, 17); n != 17 {
		t.Errorf("%d connections, want 17", n)
	}
}

func TestPythonAsyncio(t *testing.T) {
	testutil.Need(t, "python3")
	r := rig.New(t)
	r.Serve(t, at4(7), echoBack)
	r.Serve(t, at6(7), echoBack)
	s := play(t, r, "")
	same(t, "asyncio", runApp(t, r, "", "python3", "testdata/python_asyncio.py"), "100 of 100 are the same")
	if n := s.AllRelayed(t, 100); n != 100 {
		t.Errorf("%d connections, want 100", n)
	}
}
