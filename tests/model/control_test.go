package model

import (
	"encoding/gob"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// remote is a peer process, as the test sees it.
type remote struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	mu     sync.Mutex // orders orders
	orders *gob.Encoder
	lanes  []chan result
}

// startPeer starts a peer. It ends with the test.
func startPeer(t testing.TB, place testutil.Place, lanes int) *remote {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &remote{cmd: exec.Command(self, argPeer)}
	var errs rig.Log
	p.cmd.Stderr = &errs
	in, out := testutil.Pipes(t, p.cmd)
	p.in = in
	p.orders = gob.NewEncoder(p.in)
	for range lanes {
		p.lanes = append(p.lanes, make(chan result, 1))
	}
	if err := place.Start(p.cmd); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go p.deliver(out, done)
	t.Cleanup(func() {
		p.in.Close()
		<-done
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("peer: %v\n%s", err, errs.String())
		}
	})
	return p
}

// deliver gives the results to the lanes that wait for them.
func (p *remote) deliver(out io.Reader, done chan<- struct{}) {
	defer close(done)
	results := gob.NewDecoder(out)
	for {
		var r result
		if err := results.Decode(&r); err != nil {
			break
		}
		p.lanes[r.Lane] <- r
	}
	for _, ch := range p.lanes {
		close(ch)
	}
}

// order has the peer do something, without waiting for it.
func (p *remote) order(o *order) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.orders.Encode(o); err != nil {
		return fmt.Errorf("order: %w", err)
	}
	return nil
}

// answer waits for what came of the last order of a lane.
func (p *remote) answer(lane int) result {
	r, ok := <-p.lanes[lane]
	if !ok {
		return result{Trouble: "the peer is gone"}
	}
	return r
}
