package model

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// argClient makes the test binary the client of the stress test.
const argClient = "stress-client"

// clientOrder is a round of load, one line of stdin; a line of stdout answers.
type clientOrder struct {
	Seed  uint64
	Conns int           // open at once
	For   time.Duration // from when so many are
	// Steady are destinations that are always there, Moody ones that are away
	// now and then, or have endpoints that are.
	Steady, Moody []string
}

// clientReport is what became of a round.
type clientReport struct {
	Opened, Peak int
	Done         map[string]int // by talk
	Bytes        int64
	Reset        []uint64 // that the client itself has reset
	Failed       []event
}

// crowd is the client.
type crowd struct {
	order clientOrder
	dials chan struct{} // bounds the dials at once
	heavy chan struct{} // and what moves much
	open  atomic.Int64
	peak  atomic.Int64 // of open, nearly
	end   atomic.Int64 // by clock; 0: not all are open yet
	ids   *atomic.Uint64
	bytes atomic.Int64

	mu     sync.Mutex // guards report
	report clientReport
}

func runClient() error {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	var ids atomic.Uint64
	for in.Scan() {
		w := &crowd{dials: make(chan struct{}, 64), heavy: make(chan struct{}, 8), ids: &ids}
		w.report.Done = map[string]int{}
		if err := json.Unmarshal(in.Bytes(), &w.order); err != nil {
			return err
		}
		late := time.AfterFunc(talkLimit, w.full)
		var all sync.WaitGroup
		for i := range w.order.Conns {
			all.Go(func() { w.slot(rand.New(rand.NewPCG(w.order.Seed, uint64(i)))) })
		}
		all.Wait()
		late.Stop()
		w.report.Bytes, w.report.Peak = w.bytes.Load(), int(w.peak.Load())
		if err := printJSON(os.Stdout, &w.report); err != nil {
			return err
		}
	}
	return in.Err()
}

// slot has one connection after the other.
func (w *crowd) slot(r *rand.Rand) {
	for w.left() > 0 {
		w.once(r)
	}
}

// full begins the time that the round takes, when all connections are open, or
// when that takes too long.
func (w *crowd) full() { w.end.CompareAndSwap(0, clock()+int64(w.order.For)) }

// left is how much of the round is left.
func (w *crowd) left() time.Duration {
	end := w.end.Load()
	if end == 0 {
		return talkLimit
	}
	return time.Duration(max(end-clock(), 0))
}

// once makes a connection and talks over it.
func (w *crowd) once(r *rand.Rand) {
	// Most are quiet most of the time.
	h := header{ID: w.ids.Add(1), Talk: talkIdle}
	switch n := r.IntN(3 * int(talks)); {
	case n < int(talks):
		h.Talk = uint32(n)
	case n < 2*int(talks):
		h.Talk = talkChat
	}
	to := w.order.Moody
	if r.IntN(3) == 0 {
		to = w.order.Steady
	}
	e := event{ID: h.ID, Talk: talkNames[h.Talk], Where: to[r.IntN(len(to))]}
	w.dials <- struct{}{}
	e.From = clock()
	c, err := net.DialTimeout("tcp", e.Where, talkLimit)
	<-w.dials
	got := 0
	if err == nil {
		got, err = w.talk(c, &h, r)
		c.Close()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report.Opened++
	if h.Talk == talkReset {
		w.report.Reset = append(w.report.Reset, h.ID)
	}
	if err == nil {
		w.report.Done[e.Talk]++
		return
	}
	e.To, e.Err, e.Early = clock(), err.Error(), got <= len(greeting)
	e.Cut = isReset(err) || errors.Is(err, syscall.ECONNREFUSED)
	w.report.Failed = append(w.report.Failed, e)
}

// talk does the client's part of a connection. It returns how many bytes came.
func (w *crowd) talk(c net.Conn, h *header, r *rand.Rand) (got int, err error) {
	if n := int(w.open.Add(1)); n > int(w.peak.Load()) {
		w.peak.Store(int64(n))
		if n == w.order.Conns {
			w.full()
		}
	}
	defer w.open.Add(-1)
	_ = c.SetDeadline(time.Now().Add(talkLimit))
	hello := make([]byte, len(greeting))
	if got, err = io.ReadFull(c, hello); err != nil {
		return got, fmt.Errorf("greeting: %w", err)
	}
	if string(hello) != greeting {
		return got, errBytes
	}
	h.Size = uint32(1 + r.IntN(1<<(4+r.IntN(17)))) // up to 1 MiB
	switch h.Talk {
	case talkChat:
		h.Size = uint32(100 * (1 + r.IntN(30)))
	case talkIdle:
		h.Size = 100
	}
	if err := h.write(c); err != nil {
		return got, err
	}
	if h.Talk != talkChat && h.Talk != talkIdle {
		w.heavy <- struct{}{}
		defer func() { <-w.heavy }()
	}
	up, down := streams(h.ID)
	err = w.say(c, h, &up, &down, r)
	w.bytes.Add(int64(up.at + down.at))
	return got + int(down.at), err
}

func (w *crowd) say(c net.Conn, h *header, up, down *stream, r *rand.Rand) error {
	n := int(h.Size)
	chunk := 1 + r.IntN(64<<10)
	switch h.Talk {
	case talkEcho:
		sent := make(chan error, 1)
		go func() { sent <- pour(c, up, n, chunk) }()
		return errors.Join(drink(c, down, n, 64<<10), <-sent)
	case talkUpload:
		if err := pour(c, up, n, chunk); err != nil {
			return err
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			return err
		}
		return drinkAll(c, down, 1000)
	case talkDownload:
		return drinkAll(c, down, n)
	case talkChat, talkIdle:
		for up.at < uint64(n) {
			nap := time.Duration(r.IntN(1000)) * time.Millisecond
			if h.Talk == talkIdle {
				nap *= 10
			}
			time.Sleep(min(nap, w.left()))
			_ = c.SetDeadline(time.Now().Add(talkLimit))
			size := min(100, n-int(up.at))
			if err := pour(c, up, size, size); err != nil {
				return err
			}
			if err := drink(c, down, size, size); err != nil {
				return err
			}
		}
		return nil
	case talkReset:
		err := pour(c, up, n, chunk)
		resetConn(c)
		return err
	default: // talkResetBack
		err := drink(c, down, -1, 64<<10)
		if isReset(err) {
			return nil
		}
		return fmt.Errorf("want a reset, got %d bytes of %d and %v", down.at, n, err)
	}
}

// drinkAll reads n bytes and the end of file.
func drinkAll(c net.Conn, s *stream, n int) error {
	if err := drink(c, s, -1, 64<<10); err != nil {
		return err
	}
	if s.at != uint64(n) {
		return fmt.Errorf("got %d bytes of %d and the end", s.at, n)
	}
	return nil
}
