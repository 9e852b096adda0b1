package model

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

var (
	flagStress = flag.Duration("stress", 20*time.Second, "how long the stress test loads")
	flagMode   = flag.String("stress-connect", "adaptive", "its mode of connect")
	flagConns  = flag.Int("conns", 5000, "how many connections it has open at once")
)

// servicePort is that of both services.
const servicePort = 1000

// program is a process of the stress test that is spoken to in lines.
type program struct {
	in   io.WriteCloser
	out  *bufio.Scanner
	errs rig.Log
}

// startProgram starts one. It ends with the test.
func startProgram(t *testing.T, place testutil.Place, name string) *program {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &program{}
	cmd := exec.Command(self, name)
	cmd.Stderr = &p.errs
	in, out := testutil.Pipes(t, cmd)
	p.in = in
	p.out = bufio.NewScanner(out)
	p.out.Buffer(nil, 64<<20)
	if err := place.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.in.Close()
		if t.Failed() {
			cmd.Process.Kill()
		}
		if err := cmd.Wait(); err != nil && !t.Failed() {
			t.Errorf("%s: %v\n%s", name, err, p.errs.String())
		}
	})
	return p
}

// tell sends a line, and hear reads one.
func (p *program) tell(t *testing.T, v any) {
	t.Helper()
	if err := printJSON(p.in, v); err != nil {
		t.Fatalf("%v\n%s", err, p.errs.String())
	}
}

func (p *program) hear(t *testing.T, v any) {
	t.Helper()
	if !p.out.Scan() {
		t.Fatalf("it ended: %v\n%s", p.out.Err(), p.errs.String())
	}
	if err := json.Unmarshal(p.out.Bytes(), v); err != nil {
		t.Fatal(err)
	}
}

// arena is what the stress test loads.
type arena struct {
	servers serverConfig
	client  clientOrder
	// behind is what each moody destination has behind it.
	behind map[string][]string
}

func newArena(t *testing.T, r *rig.Rig) (a arena, config string) {
	t.Helper()
	a.behind = map[string][]string{}
	at := func(addr netip.Addr, port int) string {
		r.Give(t, addr)
		return netip.AddrPortFrom(addr, uint16(port)).String()
	}
	var b strings.Builder
	b.WriteString("services:\n")
	for _, addr := range []netip.Addr{rig.Far4, rig.Far6} {
		to := netip.AddrPortFrom(vip(addr.Is6()), servicePort).String()
		var group []string
		for i := range 4 {
			group = append(group, at(addr, 7001+i))
		}
		fmt.Fprintf(&b, "  - {address: %q, endpoints: [%q, %q, %q, %q]}\n", to, group[0], group[1], group[2], group[3])
		a.servers.Moody = append(a.servers.Moody, group)
		a.behind[to] = group
		a.client.Moody = append(a.client.Moody, to, to, to)
		// Nobody stands in for one that no service names.
		alone := at(addr, 7020)
		a.servers.Moody = append(a.servers.Moody, []string{alone})
		a.behind[alone] = []string{alone}
		a.client.Moody = append(a.client.Moody, alone)
		for i := range 3 {
			a.servers.Steady = append(a.servers.Steady, at(addr, 7030+i))
		}
	}
	a.client.Steady = a.servers.Steady
	for _, six := range []bool{false, true} {
		// Where a service's address leads past Pillion.
		a.servers.Steady = append(a.servers.Steady, at(vip(six), servicePort))
	}
	return a, b.String()
}

// TestStress holds thousands of connections at once while endpoints come and go.
// Nothing may be lost but what its own endpoint's death has cut, and what the
// handler holds afterwards is what it held after a shorter load before.
func TestStress(t *testing.T) {
	r := rig.New(t)
	a, config := newArena(t, r)
	servers := startProgram(t, testutil.Place{NS: r.World}, argServer)
	servers.tell(t, a.servers)
	var word string
	servers.hear(t, &word)
	i := r.Run(t, "connect: "+*flagMode+"\n"+config)
	client := startProgram(t, testutil.Place{NS: r.App, Cgroup: r.Scope}, argClient)

	// The first round is what memory is compared with: some of it stays.
	first := a.client
	first.Conns, first.For, first.Seed = *flagConns, max(*flagStress/2, 10*time.Second), 1
	warm, _ := load(t, i, client, first)
	i.Idle(t)
	i.NoLeaks(t)
	before := i.Memory(t)
	second := a.client
	second.Conns, second.For, second.Seed = *flagConns, *flagStress, 2
	main, live := load(t, i, client, second)
	servers.tell(t, "end")
	var far serverReport
	servers.hear(t, &far)

	opened := warm.Opened + main.Opened
	t.Logf("%d connections, %d at once, %v, %d MiB; endpoints away %d times, %d connections cut, %d failed so",
		opened, main.Peak, main.Done, (warm.Bytes+main.Bytes)>>20, len(far.Away), len(far.Cut), len(warm.Failed)+len(main.Failed))
	if most := *flagConns * 9 / 10; main.Peak < most || live < most {
		t.Errorf("%d connections at once, %d of them in the handler, want about %d", main.Peak, live, *flagConns)
	}
	passed := relayed(t, i, opened)
	a.explain(t, append(warm.Failed, main.Failed...), &far, passed)
	for _, e := range far.Failed {
		t.Errorf("a server had %v", e)
	}
	if most := len(warm.Reset) + len(main.Reset); far.Unspoken > most {
		t.Errorf("%d connections that said nothing, and the client has reset %d", far.Unspoken, most)
	}
	i.Settles(t, before)
}

// load has the client do a round, and tells what became of it, and how many
// connections the handler had at once.
func load(t *testing.T, i *rig.Instance, client *program, o clientOrder) (r clientReport, live int) {
	t.Helper()
	var most atomic.Int64
	ctx, stop := context.WithCancel(context.Background())
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for ctx.Err() == nil {
			if s, err := i.Status(ctx); err == nil {
				most.Store(max(most.Load(), int64(s.Live)))
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	client.tell(t, o)
	client.hear(t, &r)
	stop()
	<-watched
	return r, int(most.Load())
}

// explain fails the test for what failed, unless the death of its own endpoint
// explains it. Those that were not relayed, of which there are so many, were refused
// by an endpoint that was away, and nobody tried another one for them.
func (a *arena) explain(t *testing.T, failed []event, far *serverReport, passed int) {
	t.Helper()
	cut := map[uint64]bool{}
	for _, id := range far.Cut {
		cut[id] = true
	}
	wrong := 0
	for _, e := range failed {
		if e.Cut && (cut[e.ID] || e.Early && a.wentAway(e, far.Away, false)) {
			continue
		}
		if e.Cut && e.Early && passed > 0 && a.wentAway(e, far.Away, true) {
			passed--
			continue
		}
		if wrong++; wrong <= 20 {
			t.Errorf("%v", e)
		}
	}
	if wrong > 20 {
		t.Errorf("and %d more", wrong-20)
	}
}

// wentAway tells whether an endpoint of what was dialed went away meanwhile, or
// was away, where no other stands in for it, or alone.
func (a *arena) wentAway(e event, away []event, alone bool) bool {
	for _, w := range away {
		group := a.behind[e.Where]
		if !slices.Contains(group, w.Where) {
			continue
		}
		until := w.Gone
		if alone || len(group) == 1 {
			until = w.To
		}
		if e.From <= until && e.To >= w.From {
			return true
		}
	}
	return false
}
