package connect

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// appLimit is how long an application may take for anything.
const appLimit = 90 * time.Second

// compile builds the application. It ends with the test.
func compile(t testing.TB) string {
	t.Helper()
	testutil.Need(t, "gcc")
	path := filepath.Join(t.TempDir(), "app")
	out, err := exec.Command("gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", path, "testdata/app.c").CombinedOutput()
	if err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return path
}

// result is what one system call gave.
type result struct {
	Call    string `json:"call"`
	Ret     int    `json:"ret"`
	Errno   string `json:"errno"`
	Note    string `json:"note"`
	Retrans int    `json:"retrans"` // of the SYN, so far
}

// String leaves out what a moment more or less changes.
func (r result) String() string {
	return strings.Join(strings.Fields(fmt.Sprintf("%s=%d %s %s", r.Call, r.Ret, r.Errno, r.Note)), " ")
}

// transcript is what an application saw.
type transcript []result

func (tr transcript) String() string {
	words := make([]string, len(tr))
	for i, r := range tr {
		words[i] = r.String()
	}
	return strings.Join(words, ", ")
}

// retrans is how often a SYN had to be sent again.
func (tr transcript) retrans() int {
	most := 0
	for _, r := range tr {
		most = max(most, r.Retrans)
	}
	return most
}

// last returns the last result of a call.
func (tr transcript) last(call string) result {
	for i := len(tr) - 1; i >= 0; i-- {
		if tr[i].Call == call {
			return tr[i]
		}
	}
	return result{Call: "no " + call}
}

// app is a running application.
type app struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
	err rig.Log

	late *time.Timer
	end  sync.Once
	all  transcript
}

// start starts the application. The caller ends it.
func (g *ground) start(args ...string) (*app, error) {
	return launch(g.Rig, exec.Command(g.app, args...))
}

// launch starts a program that writes results as the application does.
func launch(r *rig.Rig, cmd *exec.Cmd) (*app, error) {
	a := &app{cmd: cmd}
	a.cmd.Stderr = &a.err
	var err error
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	a.out = bufio.NewScanner(out)
	if err := r.Start(a.cmd); err != nil {
		return nil, err
	}
	a.late = time.AfterFunc(appLimit, func() { a.cmd.Process.Kill() })
	return a, nil
}

// next waits for the next result.
func (a *app) next() (result, error) {
	var r result
	if !a.out.Scan() {
		return r, errors.Join(errors.New("application ended"), a.out.Err())
	}
	if err := json.Unmarshal(a.out.Bytes(), &r); err != nil {
		return r, fmt.Errorf("%q: %w", a.out.Text(), err)
	}
	a.all = append(a.all, r)
	return r, nil
}

// until waits for the next result of a call.
func (a *app) until(call string) (result, error) {
	for {
		r, err := a.next()
		if err != nil || r.Call == call {
			return r, err
		}
	}
}

// tell lets an application that has paused go on.
func (a *app) tell() { fmt.Fprintln(a.in) }

// rest waits until the application ends by itself, and returns all its results.
func (a *app) rest() (transcript, error) {
	var err error
	for err == nil {
		_, err = a.next()
	}
	a.in.Close()
	a.late.Stop()
	if err := a.wait(); err != nil {
		return a.all, fmt.Errorf("%s: %w: %s", strings.Join(a.cmd.Args[1:], " "), err, a.err.String())
	}
	return a.all, nil
}

func (a *app) wait() (err error) {
	a.end.Do(func() { err = a.cmd.Wait() })
	return err
}

// kill ends the application, whatever it does.
func (a *app) kill() {
	a.late.Stop()
	a.cmd.Process.Kill()
	a.in.Close()
	a.wait()
}

// begin is start for a test, which ends with it.
func (g *ground) begin(t testing.TB, args ...string) *app {
	t.Helper()
	a, err := g.start(args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.kill)
	return a
}

// await is until for a test.
func (a *app) await(t testing.TB, call string) result {
	t.Helper()
	r, err := a.until(call)
	if err != nil {
		t.Fatalf("%s: %v after %s\n%s", call, err, a.all, a.err.String())
	}
	return r
}

// do has an application do its steps, and returns what it saw.
func (g *ground) do(t testing.TB, at netip.AddrPort, steps string) transcript {
	t.Helper()
	tr, err := g.begin(t, arguments(at, strings.Fields(steps)...)...).rest()
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// wants fails the test unless an application sees this.
func (g *ground) wants(t testing.TB, at netip.AddrPort, steps, want string) {
	t.Helper()
	var got string
	if !g.calmly(t, func() bool {
		got = g.do(t, at, steps).String()
		return got == want
	}) {
		t.Errorf("%s to %s: %s, want %s", steps, at, got, want)
	}
}

// arguments are those of an application.
func arguments(at netip.AddrPort, steps ...string) []string {
	return append([]string{at.Addr().String(), fmt.Sprint(at.Port())}, steps...)
}
