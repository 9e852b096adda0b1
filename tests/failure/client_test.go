package failure

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// app is an application process in the test's hands.
type app struct {
	cmd  *exec.Cmd
	in   io.Closer
	errs rig.Log
	done chan struct{}

	mu       sync.Mutex // guards the rest
	orders   *json.Encoder
	id       int
	waiting  map[int]chan answer
	streamed map[string][]outcome
}

// newApp starts an application in the scope, which uses ports from the first-th on.
// It ends with the test.
func newApp(t *testing.T, r *rig.Rig, first int) *app {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	a := &app{cmd: r.Command(self), done: make(chan struct{}), waiting: map[int]chan answer{}, streamed: map[string][]outcome{}}
	a.cmd.Env = append(os.Environ(), fmt.Sprint(envApp, "=", first))
	a.cmd.Stderr = &a.errs
	stdin, stdout := testutil.Pipes(t, a.cmd)
	if err := r.Start(a.cmd); err != nil {
		t.Fatal(err)
	}
	a.in, a.orders = stdin, json.NewEncoder(stdin)
	go a.collect(stdout)
	t.Cleanup(func() { a.end(t) })
	return a
}

// end ends the process and with it every connection.
func (a *app) end(t *testing.T) {
	a.in.Close()
	select {
	case <-a.done:
	case <-time.After(rig.Limit):
		a.cmd.Process.Kill()
		<-a.done
		t.Error("the application does not end")
	}
	if text := a.errs.String(); text != "" {
		t.Errorf("the application says: %s", text)
	}
}

func (a *app) collect(from io.Reader) {
	defer close(a.done)
	in := json.NewDecoder(from)
	for {
		var w answer
		if err := in.Decode(&w); err != nil {
			break
		}
		a.mu.Lock()
		if w.ID == 0 {
			a.streamed[w.Key] = append(a.streamed[w.Key], w.Seen...)
		} else {
			a.waiting[w.ID] <- w
			delete(a.waiting, w.ID)
		}
		a.mu.Unlock()
	}
	a.cmd.Wait()
}

var errGone = errors.New("the application has ended")

// send gives an order, and returns where its answer comes.
func (a *app) send(o order) (<-chan answer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.id++
	o.ID = a.id
	c := make(chan answer, 1)
	a.waiting[o.ID] = c
	return c, a.orders.Encode(&o)
}

// do gives an order and waits for what came of it.
func (a *app) do(t *testing.T, o order) []outcome {
	t.Helper()
	c, err := a.send(o)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case w := <-c:
		return w.Seen
	case <-a.done:
		t.Fatal(errGone)
	case <-time.After(2*rig.Limit + time.Duration(o.Count)*o.Patience):
		t.Fatalf("the application does not answer: %s", o.Do)
	}
	return nil
}

// since returns what was streamed of a key and started at or after a time.
func (a *app) since(key string, start int64) []outcome {
	a.mu.Lock()
	defer a.mu.Unlock()
	var some []outcome
	for _, o := range a.streamed[key] {
		if o.Start >= start {
			some = append(some, o)
		}
	}
	return some
}

// all are the keys' destinations.
type destinations map[string][]netip.AddrPort
