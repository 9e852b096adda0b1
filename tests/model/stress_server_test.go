package model

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"
)

// argServer makes the test binary the servers of the stress test.
const argServer = "stress-server"

// serverConfig comes on stdin first.
type serverConfig struct {
	// Steady are never away, Moody come and go, one at a time of a group.
	Steady []string
	Moody  [][]string
}

// serverReport is what the servers have seen.
type serverReport struct {
	Served   int
	Cut      []uint64 // the connections that a death of their endpoint has reset
	Away     []event  // when endpoints were away: from before to after
	Failed   []event  // connections that did not end as they should have
	Unspoken int      // that ended before their header had come
}

// farm is all servers.
type farm struct {
	mu     sync.Mutex // guards report
	report serverReport
	all    sync.WaitGroup
}

// endpoint is one server.
type endpoint struct {
	farm  *farm
	addr  string
	ln    net.Listener
	mu    sync.Mutex // guards conns
	conns map[net.Conn]uint64
}

// runServer serves until stdin ends, and then reports. A line makes endpoints
// come and go, or makes them stay.
func runServer() error {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	var cfg serverConfig
	if !in.Scan() {
		return errors.New("no configuration")
	}
	if err := json.Unmarshal(in.Bytes(), &cfg); err != nil {
		return err
	}
	f := &farm{}
	var groups [][]*endpoint
	for _, group := range append(cfg.Moody, cfg.Steady) {
		var es []*endpoint
		for _, addr := range group {
			e := &endpoint{farm: f, addr: addr, conns: map[net.Conn]uint64{}}
			if err := e.listen(); err != nil {
				return err
			}
			es = append(es, e)
		}
		groups = append(groups, es)
	}
	fmt.Println(`"listening"`)
	ctx, stop := context.WithCancel(context.Background())
	var moods sync.WaitGroup
	for _, g := range groups[:len(cfg.Moody)] {
		moods.Go(func() { f.moody(ctx, g) })
	}
	in.Scan() // until the clients have done
	stop()
	moods.Wait()
	for _, g := range groups {
		for _, e := range g {
			e.ln.Close()
		}
	}
	f.all.Wait()
	return printJSON(os.Stdout, f.report)
}

func (e *endpoint) listen() error {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", e.addr)
	if err != nil {
		return err
	}
	e.ln = ln
	e.farm.all.Go(func() { e.serve(ln) })
	return nil
}

// moody has one endpoint of a group after the other go away, with or without its
// connections, and come back.
func (f *farm) moody(ctx context.Context, group []*endpoint) {
	r := rand.New(rand.NewPCG(1, uint64(len(group))))
	pause := func(least, more int) bool {
		select {
		case <-time.After(time.Duration(least+r.IntN(more)) * time.Millisecond):
			return true
		case <-ctx.Done():
			return false
		}
	}
	for pause(300, 1200) {
		e := group[r.IntN(len(group))]
		away := event{From: clock(), Where: e.addr}
		e.ln.Close()
		if r.IntN(2) == 0 {
			e.cut()
		}
		away.Gone = clock()
		pause(100, 1500)
		if err := e.listen(); err != nil {
			fmt.Fprintln(os.Stderr, "listen again:", err)
			os.Exit(1)
		}
		away.To = clock()
		f.mu.Lock()
		f.report.Away = append(f.report.Away, away)
		f.mu.Unlock()
	}
}

// cut resets every connection of an endpoint.
func (e *endpoint) cut() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.farm.mu.Lock()
	defer e.farm.mu.Unlock()
	for c, id := range e.conns {
		if id != 0 {
			e.farm.report.Cut = append(e.farm.report.Cut, id)
		}
		resetConn(c)
	}
	clear(e.conns)
}

func (e *endpoint) serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		e.mu.Lock()
		e.conns[c] = 0
		e.mu.Unlock()
		e.farm.all.Go(func() { e.answer(c) })
	}
}

// answer serves a connection, and reports it unless it ends as it should.
func (e *endpoint) answer(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(talkLimit))
	var h header
	_, err := io.WriteString(c, greeting)
	if err == nil {
		err = h.read(c)
	}
	e.mu.Lock()
	_, mine := e.conns[c]
	if mine {
		e.conns[c] = h.ID
	}
	e.mu.Unlock()
	if err == nil && mine {
		err = respond(c, &h)
	}
	e.mu.Lock()
	_, still := e.conns[c]
	delete(e.conns, c)
	e.mu.Unlock()
	e.farm.mu.Lock()
	defer e.farm.mu.Unlock()
	r := &e.farm.report
	r.Served++
	switch {
	case !still: // cut
	case h.ID == 0:
		r.Unspoken++
	case err != nil:
		r.Failed = append(r.Failed, event{ID: h.ID, Err: err.Error(), Where: e.addr, Talk: talkNames[h.Talk], To: clock()})
	}
}

// respond does the server's part of a connection.
func respond(c net.Conn, h *header) error {
	up, down := streams(h.ID)
	n := int(h.Size)
	switch h.Talk {
	case talkEcho:
		// What is sent is that far ahead of what is read at most.
		done := make(chan error, 1)
		go func() { done <- pour(c, &down, n, 32<<10) }()
		return errors.Join(drink(c, &up, n, 48<<10), <-done, wantEnd(c))
	case talkUpload:
		if err := drink(c, &up, -1, 64<<10); err != nil {
			return err
		}
		if up.at != uint64(n) {
			return fmt.Errorf("got %d bytes of %d", up.at, n)
		}
		return pour(c, &down, 1000, 1000)
	case talkDownload:
		return pour(c, &down, n, 100<<10)
	case talkChat, talkIdle:
		for up.at < uint64(n) {
			_ = c.SetDeadline(time.Now().Add(talkLimit))
			size := min(100, n-int(up.at))
			if err := drink(c, &up, size, size); err != nil {
				return err
			}
			if err := pour(c, &down, size, size); err != nil {
				return err
			}
		}
		return wantEnd(c)
	case talkReset:
		err := drink(c, &up, -1, 64<<10)
		if isReset(err) {
			return nil
		}
		return fmt.Errorf("want a reset, got %d bytes of %d and %v", up.at, n, err)
	default: // talkResetBack
		if err := pour(c, &down, n, 100<<10); err != nil {
			return err
		}
		resetConn(c)
		return nil
	}
}

// wantEnd reads the end of file.
func wantEnd(c net.Conn) error {
	n, err := c.Read(make([]byte, 1))
	if n != 0 || err != io.EOF {
		return fmt.Errorf("want the end, got %d bytes and %v", n, err)
	}
	return nil
}
