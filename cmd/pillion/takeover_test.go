package main

import (
	"bytes"
	"encoding/gob"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/l4"
)

// TestStopWhileTaking: a taker that is told to stop while it waits for the word that all is
// its own either has been told so, or the giver cannot tell it any more.
func TestStopWhileTaking(t *testing.T) {
	ours, theirs := 0, 0
	for n := range 200 {
		ln, err := handover.Listen(filepath.Join(t.TempDir(), "socket"))
		if err != nil {
			t.Fatal(err)
		}
		taker, err := handover.Dial(t.Context(), ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		giver, err := handover.Accept(ln)
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
		giver.Within(10 * time.Second)
		said := make(chan error, 1)
		go func() { said <- giveTo(giver, func() { taker.Interrupt() }, time.Duration(n%20)*time.Microsecond) }()
		took := taking{conn: taker}
		err = took.receive(nil)
		commit := <-said
		if (err == nil) != (commit == nil) {
			t.Fatalf("the taker says %v, the giver %v", err, commit)
		}
		if err == nil {
			ours++
		} else {
			theirs++
		}
		took.lock.Close()
		taker.Close()
		giver.Close()
	}
	t.Logf("%d taken, %d left", ours, theirs)
}

// giveTo gives an instance without connections, and has the taker be stopped meanwhile. It
// returns what became of the last word.
func giveTo(conn *handover.Conn, stop func(), after time.Duration) error {
	if _, err := conn.Expect(handover.KindFreeze); err != nil {
		return err
	}
	data, _, err := (&l4.Given{}).Encode()
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(handed{At: 1, Connections: data}); err != nil {
		return err
	}
	lock, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := conn.Send(handover.KindState, b.Bytes(), []int{int(lock.Fd())}); err != nil {
		return err
	}
	if _, err := conn.Expect(handover.KindHave); err != nil {
		return err
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		stop()
	}()
	time.Sleep(after)
	defer func() { <-stopped }()
	return conn.Send(handover.KindCommit, nil, nil)
}
