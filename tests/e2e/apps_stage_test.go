package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

// stage is a world with servers, and an instance beside the applications that
// must be as quiet at the end as at the start.
type stage struct {
	*rig.Rig
	*rig.Instance
}

// play starts an instance in a rig whose servers are there.
func play(t testing.TB, r *rig.Rig, config string) *stage {
	t.Helper()
	i := r.Run(t, config)
	i.NoLeaks(t)
	return &stage{Rig: r, Instance: i}
}

// number is one that is printed as it is then.
type number int

func (n *number) String() string { return strconv.Itoa(int(*n)) }

func at4(port uint16) netip.AddrPort { return netip.AddrPortFrom(rig.Far4, port) }
func at6(port uint16) netip.AddrPort { return netip.AddrPortFrom(rig.Far6, port) }

// echoBack sends back what it gets, and ends when the client does.
func echoBack(c net.Conn) {
	buf := make([]byte, 64<<10)
	io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, buf)
}

// appLimit is how long a program may run.
const appLimit = 2 * time.Minute

// runApp runs a program as an application, with its text on stdin, and returns what
// it wrote to stdout. It must succeed.
func runApp(t testing.TB, r *rig.Rig, stdin, name string, args ...string) string {
	t.Helper()
	out, err := tryApp(r, stdin, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func tryApp(r *rig.Rig, stdin, name string, args ...string) (string, error) {
	return r.Feed(appLimit, stdin, name, args...)
}

// same fails the test unless a program wrote exactly this.
func same(t testing.TB, what, got, want string) {
	t.Helper()
	if got, want = strings.TrimSpace(got), strings.TrimSpace(want); got != want {
		t.Errorf("%s:\n got: %s\nwant: %s", what, got, want)
	}
}

// envApp makes this test binary an application written in Go: a JSON list of
// what it does, which is a key of goApps, and its arguments.
const envApp = "PILLION_TEST_APP"

// TestGoProcess is that application. As a test it does nothing.
func TestGoProcess(t *testing.T) {
	text := os.Getenv(envApp)
	if text == "" {
		return
	}
	var args []string
	err := json.Unmarshal([]byte(text), &args)
	if err == nil {
		err = goApps()[args[0]](args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// goCommand prepares a process of this binary that does what args say.
func goCommand(t testing.TB, r *rig.Rig, args ...string) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := r.Command(self, "-test.run=^TestGoProcess$")
	cmd.Env = append(os.Environ(), envApp+"="+string(text))
	return cmd
}

// goApp runs a Go application to its end, and returns what it wrote to stdout.
func goApp(t testing.TB, r *rig.Rig, args ...string) string {
	t.Helper()
	cmd := goCommand(t, r, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := r.Start(cmd); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(appLimit, func() { cmd.Process.Kill() })
	defer late.Stop()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("Go application %q: %v\n%s", args, err, stderr.String())
	}
	return stdout.String()
}

// abort closes a connection with a reset.
func abort(c net.Conn) error {
	return errors.Join(c.(*net.TCPConn).SetLinger(0), c.Close())
}

// isReset tells whether the other side has reset a connection.
func isReset(err error) bool { return errors.Is(err, unix.ECONNRESET) }
