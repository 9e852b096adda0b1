package survive

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
)

// envApp makes this test binary the application; it is what it is told to do.
const envApp = "PILLION_TEST_SURVIVE_APP"

// task is what the application does, until its stdin ends.
type task struct {
	To netip.AddrPort
	// Workers make one connection after the other, of all kinds; Pings stay, and Urgent,
	// which send urgent bytes too.
	Workers, Pings, Urgent int
	// Most is the most that a connection sends in one direction, in bytes.
	Most uint32
}

// outcome is what became of it.
type outcome struct {
	// Opened are connections that were, Empty those of them without a byte.
	Opened, Empty, Done int64
	Bytes               int64
	Errs                []string
	// Whole are those of which all bytes are known, by what their records must say.
	// Stayed are such that were open from the beginning to the end.
	Whole, Stayed []whole
}

// whole is a connection as its record tells it.
type whole struct {
	Port           uint16
	Sent, Received uint64
}

// app is the application, in the scope.
type app struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

func newApp(t testing.TB, r *rig.Rig, q task) *app {
	t.Helper()
	line, err := json.Marshal(q)
	if err != nil {
		t.Fatal(err)
	}
	a := &app{cmd: r.Command(os.Args[0], "-test.run=^TestApplication$")}
	a.cmd.Env = append(os.Environ(), envApp+"="+string(line))
	a.cmd.Stderr = os.Stderr
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	a.out = json.NewDecoder(out)
	if err := r.Start(a.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.in.Close()
		a.cmd.Process.Kill()
		a.cmd.Wait()
	})
	return a
}

// end has everything end, and returns what became of it.
func (a *app) end(t testing.TB) (o outcome) {
	t.Helper()
	if _, err := fmt.Fprintln(a.in, "end"); err != nil {
		t.Fatal(err)
	}
	if err := a.out.Decode(&o); err != nil {
		t.Fatalf("the application: %v", err)
	}
	for _, e := range o.Errs {
		t.Errorf("application: %s", e)
	}
	return o
}

// TestApplication is the application. As a test it does nothing.
func TestApplication(*testing.T) {
	text := os.Getenv(envApp)
	if text == "" {
		return
	}
	p := &player{talker: talker{app: true, end: make(chan struct{})}}
	if err := json.Unmarshal([]byte(text), &p.task); err != nil {
		panic(err)
	}
	var all sync.WaitGroup
	for range p.Workers {
		all.Go(p.visit)
	}
	for range p.Pings {
		all.Go(func() { p.open(head{Kind: kindPing}) })
	}
	for range p.Urgent {
		all.Go(func() { p.open(head{Kind: kindUrgent}) })
	}
	var word string
	fmt.Scanln(&word)
	close(p.end)
	all.Wait()
	json.NewEncoder(os.Stdout).Encode(outcome{
		Opened: p.opened.Load(), Empty: p.none.Load(), Done: p.done.Load(), Bytes: p.sent.Load(), Errs: p.take(), Whole: p.whole, Stayed: p.stayed,
	})
	os.Exit(0)
}

type player struct {
	talker
	task
	opened atomic.Int64

	wholeMu sync.Mutex // guards what follows
	whole   []whole
	stayed  []whole
}

// visit makes connections until the end.
func (p *player) visit() {
	kinds := []kind{kindBoth, kindBoth, kindBoth, kindBoth, kindAppFirst, kindAppFirst, kindServer, kindServer, kindAppResets, kindReset, kindEmpty}
	for {
		select {
		case <-p.end:
			return
		default:
		}
		h := head{Kind: kinds[rand.IntN(len(kinds))], Up: 1 + rand.Uint32N(p.Most), Down: 1 + rand.Uint32N(p.Most)}
		if rand.IntN(3) == 0 {
			h.Up, h.Down = 1+h.Up%500, 1+h.Down%500
		}
		p.open(h)
	}
}

func (p *player) open(h head) {
	c, err := net.DialTimeout("tcp", p.To.String(), lifetime)
	if err != nil {
		p.fail("open connection: %v", err)
		time.Sleep(10 * time.Millisecond)
		return
	}
	defer c.Close()
	h.ID = uint32(p.opened.Add(1))
	if h.Kind == kindEmpty {
		p.none.Add(1)
		return
	}
	if _, err := c.Write(h.bytes()); err != nil {
		p.fail("connection %d (%c): write head: %v", h.ID, h.Kind, err)
		return
	}
	said := p.talk(c.(*net.TCPConn), h)
	if h.Kind == kindPing || h.Kind == kindUrgent {
		h.Up, h.Down = said, said
	}
	w := whole{uint16(c.LocalAddr().(*net.TCPAddr).Port), uint64(h.Up) + headSize, uint64(h.Down)}
	p.wholeMu.Lock()
	defer p.wholeMu.Unlock()
	switch h.Kind {
	case kindBoth, kindAppFirst, kindServer:
		p.whole = append(p.whole, w)
	case kindPing, kindUrgent:
		p.stayed = append(p.stayed, w)
	}
}
