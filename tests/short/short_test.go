package short

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// argApp makes the test binary an application: it dials, talks, and prints what
// it saw.
const argApp = "application"

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == argApp {
		if err := application(os.Args[2], os.Args[3:]...); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testutil.Main(m)
}

// application dials an address. Without a size it prints the answer and both
// addresses; with one it sends so many bytes and compares what comes back.
func application(addr string, size ...string) error {
	c, err := net.DialTimeout("tcp", addr, rig.Limit)
	if err != nil {
		return err
	}
	defer c.Close()
	if len(size) == 0 {
		if _, err := io.WriteString(c, "hello"); err != nil {
			return err
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			return err
		}
		answer, err := io.ReadAll(c)
		fmt.Printf("%s %s %s\n", answer, c.RemoteAddr(), c.LocalAddr().(*net.TCPAddr).IP)
		return err
	}
	var n int64
	if _, err := fmt.Sscan(size[0], &n); err != nil {
		return err
	}
	return bulk(c, n)
}

func bulk(c net.Conn, n int64) error {
	sent, got := sha256.New(), sha256.New()
	failed := make(chan error, 1)
	go func() {
		random := rand.NewChaCha8([32]byte{1})
		_, err := io.Copy(io.MultiWriter(c, sent), io.LimitReader(random, n))
		failed <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	back, err := io.Copy(got, c)
	if err = errors.Join(err, <-failed); err != nil {
		return err
	}
	if back != n || string(sent.Sum(nil)) != string(got.Sum(nil)) {
		return fmt.Errorf("sent %d bytes, got %d back, and not the same", n, back)
	}
	fmt.Println("same")
	return nil
}

// app runs the application in the rig.
func app(t *testing.T, r *rig.Rig, args ...string) (string, error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := r.Try(self, append([]string{argApp}, args...)...)
	return strings.TrimSpace(out), err
}

// shout answers what was said, in capitals and with a name, when it has all.
func shout(name string) func(net.Conn) {
	return func(c net.Conn) {
		b, err := io.ReadAll(c)
		if err == nil {
			fmt.Fprintf(c, "%s-%s", name, strings.ToUpper(string(b)))
		}
	}
}

func echo(c net.Conn) { _, _ = io.Copy(c, c) }

// TestShort is the main job once: both families, a service, bulk, a refusal, and
// what is recorded of them.
func TestShort(t *testing.T) {
	r := rig.New(t)
	four := r.Serve(t, netip.AddrPortFrom(rig.Far4, 7000), shout("four"))
	six := r.Serve(t, netip.AddrPortFrom(rig.Far6, 7000), shout("six"))
	r.Serve(t, netip.AddrPortFrom(rig.Far4, 7007), echo)
	a := r.Serve(t, netip.AddrPortFrom(rig.Far4, 7001), shout("a"))
	b := r.Serve(t, netip.AddrPortFrom(rig.Far4, 7002), shout("b"))
	i := r.Run(t, fmt.Sprintf(`
services:
  - {name: shop, address: "10.96.0.12:80", endpoints: ["%s", "%s"], policy: round_robin}
deny: ["203.0.113.0/24:25"]
`, a, b))

	want := map[string]string{
		four.String(): "four-HELLO " + four.String() + " " + testutil.AppV4.Addr().String(),
		six.String():  "six-HELLO " + six.String() + " " + testutil.AppV6.Addr().String(),
	}
	for addr, want := range want {
		if got, err := app(t, r, addr); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", addr, got, err, want)
		}
	}
	names := map[string]int{}
	for range 4 {
		got, err := app(t, r, "10.96.0.12:80")
		name, rest, _ := strings.Cut(got, "-")
		if want := "HELLO 10.96.0.12:80 " + testutil.AppV4.Addr().String(); err != nil || rest != want {
			t.Errorf("service: %q, %v, want %q", got, err, want)
		}
		names[name]++
	}
	if names["a"] != 2 || names["b"] != 2 {
		t.Errorf("endpoints %v, want each twice", names)
	}
	size := "67108864"
	if testutil.InVM() {
		size = "4194304" // its processor is emulated
	}
	if got, err := app(t, r, netip.AddrPortFrom(rig.Far4, 7007).String(), size); err != nil || got != "same" {
		t.Errorf("bulk: %q, %v", got, err)
	}
	if got, err := app(t, r, "203.0.113.66:25"); err == nil || !strings.Contains(got, "connection refused") {
		t.Errorf("denied: %q, %v", got, err)
	}
	check(t, i.Ended(t, 8))
}

func check(t *testing.T, records []flow.Record) {
	t.Helper()
	paths := map[flow.Path]int{}
	for _, r := range records {
		paths[r.Path]++
		if r.Path == flow.PathRelay && (r.End != flow.ReasonClosed || r.Sent == 0 || r.Received == 0 || r.Duration <= 0) {
			t.Errorf("record %+v", r)
		}
	}
	if paths[flow.PathRelay] != 7 || paths[flow.PathDeny] != 1 || len(records) != 8 {
		t.Errorf("paths %v, want 7 relay and 1 deny", paths)
	}
}

// TestShortExec is the main job around one command, which knows of nothing.
func TestShortExec(t *testing.T) {
	r := rig.New(t)
	a := r.Serve(t, netip.AddrPortFrom(rig.Far4, 7001), shout("a"))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, stderr, err := r.Exec(t, []string{"--service", "10.96.0.12:80=" + a.String(), "--summary"}, self, argApp, "10.96.0.12:80")
	if want := "a-HELLO 10.96.0.12:80 " + testutil.AppV4.Addr().String() + "\n"; err != nil || out != want {
		t.Errorf("%q, %v, want %q\n%s", out, err, want, stderr)
	}
	if !strings.Contains(stderr, a.String()) || !strings.Contains(stderr, "relay") {
		t.Errorf("the summary says neither where it went nor how:\n%s", stderr)
	}
}

// TestShortFaults: with the handler dead, connections go where they were going;
// when it is back they are redirected again.
func TestShortFaults(t *testing.T) {
	r := rig.New(t)
	addr := r.Serve(t, netip.AddrPortFrom(rig.Far4, 7000), shout("far")).String()
	i := r.Run(t, "on_failure: open")
	for _, kill := range []bool{false, true, false} {
		if kill {
			i.Kill(t)
		}
		if got, err := app(t, r, addr); err != nil || !strings.HasPrefix(got, "far-HELLO") {
			t.Errorf("killed %v: %q, %v", kill, got, err)
		}
		if kill {
			i.Launch(t)
		}
	}
	reasons := i.Reasons(t)
	if reasons["default"] != 2 || reasons["handler_absent"] != 1 {
		t.Errorf("reasons %v", reasons)
	}
	// Stopped it still listens, and only the heartbeat tells.
	i.Halt(t)
	time.Sleep(500 * time.Millisecond) // the time that noticing may take
	if got, err := app(t, r, addr); err != nil || !strings.HasPrefix(got, "far-HELLO") {
		t.Errorf("stopped: %q, %v", got, err)
	}
	i.Signal(t, unix.SIGCONT)
	testutil.Eventually(t, rig.Limit, func() bool {
		s, err := i.Status(context.Background())
		return err == nil && s.State == "serving"
	}, "serving again")
	if n := i.Reasons(t)["handler_stale"]; n != 1 {
		t.Errorf("handler_stale %d, want 1", n)
	}
}
