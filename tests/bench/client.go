package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// job is what the client is told to do.
type job struct {
	Work work `json:"work"`
	// Addrs are dialed in turn.
	Addrs []string `json:"addresses"`
}

// result is what the client found.
type result struct {
	// Wall is the time that the work took, P50 the median of the round trips
	// or of the connections; in nanoseconds, like CPU, the client's own.
	Wall int64 `json:"wall_ns"`
	P50  int64 `json:"p50_ns,omitempty"`
	CPU  int64 `json:"cpu_ns"`
	// Opened counts all connections, also those to get warm.
	Opened int `json:"opened"`
}

// Before it is measured, a connection does so many round trips or bytes.
const (
	warmTrips = 20
	warmBytes = 64 << 20
	warmConns = 100
)

// client does one job: it connects and gets warm, says so by an empty line, waits
// for a line, works, and writes the result.
func client(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("client: want a job")
	}
	var j job
	if err := json.Unmarshal([]byte(args[0]), &j); err != nil {
		return fmt.Errorf("client: read the job: %w", err)
	}
	if len(j.Addrs) == 0 {
		return errors.New("client: the job has no address")
	}
	l := &load{job: j}
	defer l.close()
	if err := l.prepare(); err != nil {
		return fmt.Errorf("client: get warm: %w", err)
	}
	if _, err := fmt.Fprintln(out); err != nil {
		return err
	}
	if _, err := bufio.NewReader(in).ReadString('\n'); err != nil {
		return fmt.Errorf("client: wait for the start: %w", err)
	}
	before, start := ownCPU(), time.Now()
	if err := l.work(); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	r := result{Wall: int64(time.Since(start)), CPU: ownCPU() - before, P50: median(l.times), Opened: l.opened}
	return json.NewEncoder(out).Encode(r)
}

// load is a client at work.
type load struct {
	job
	conns  []net.Conn
	dials  atomic.Int64
	mu     sync.Mutex // guards what follows
	times  []int64
	opened int
}

func (l *load) close() {
	for _, c := range l.conns {
		c.Close()
	}
}

func (l *load) dial() (net.Conn, error) {
	var d net.Dialer
	d.SetMultipathTCP(false)
	turn := int(l.dials.Add(1)-1) % len(l.Addrs)
	c, err := d.DialContext(context.Background(), "tcp", l.Addrs[turn])
	if err == nil {
		l.mu.Lock()
		l.opened++
		l.mu.Unlock()
	}
	return c, err
}

func (l *load) prepare() error {
	if l.Work.connects() {
		return l.connect(warmConns)
	}
	for range l.Work.Conns {
		c, err := l.dial()
		if err != nil {
			return err
		}
		l.conns = append(l.conns, c)
	}
	if l.Work.transfer() {
		return l.move(warmBytes)
	}
	return l.pingPong(warmTrips)
}

func (l *load) work() error {
	l.times = make([]int64, 0, l.Work.Ops)
	switch {
	case l.Work.transfer():
		return l.move(int64(l.Work.Ops) * gib)
	case l.Work.connects():
		return l.connect(l.Work.Ops)
	default:
		return l.pingPong(l.Work.Ops / l.Work.Conns)
	}
}

// each runs f for every i below n, all at once.
func each(n int, f func(i int) error) error {
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = f(i) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// pingPong does n round trips on each connection.
func (l *load) pingPong(n int) error {
	return each(len(l.conns), func(i int) error {
		times := make([]int64, 0, n)
		for range n {
			start := time.Now()
			if err := trip(l.conns[i], byte(i)); err != nil {
				return err
			}
			times = append(times, int64(time.Since(start)))
		}
		l.note(times)
		return nil
	})
}

func (l *load) note(times []int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.times = append(l.times, times...)
}

// trip sends a message and checks that it comes back.
func trip(c net.Conn, mark byte) error {
	var got [messageSize]byte
	m := [messageSize]byte{askEcho, messageSize - 1: mark}
	if _, err := c.Write(m[:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, got[:]); err != nil {
		return err
	}
	if got != m {
		return errors.New("the echo is not what was sent")
	}
	return nil
}

// connect opens n connections one after the other, in parallel lines, each for
// one round trip; the client closes first.
func (l *load) connect(n int) error {
	return each(l.Work.Conns, func(i int) error {
		times := make([]int64, 0, n)
		for range n / l.Work.Conns {
			start := time.Now()
			c, err := l.dial()
			if err != nil {
				return err
			}
			err = trip(c, byte(i))
			if err = errors.Join(err, c.Close()); err != nil {
				return err
			}
			times = append(times, int64(time.Since(start)))
		}
		l.note(times)
		return nil
	})
}

// move transfers n bytes on one connection.
func (l *load) move(n int64) error {
	c := l.conns[0]
	if l.Work.Name == workDownload {
		if _, err := c.Write(message(askSend, uint64(n))); err != nil {
			return err
		}
		return takeBytes(c, n)
	}
	m := message(askTake, uint64(n))
	if _, err := c.Write(m); err != nil {
		return err
	}
	if err := sendBytes(c, n); err != nil {
		return err
	}
	got := make([]byte, messageSize)
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, m) {
		return errors.New("the receipt is not what was asked for")
	}
	return nil
}

// ownCPU returns the processor time of this process in ns.
func ownCPU() int64 {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t) != nil {
		return 0
	}
	return t.Nano()
}

// median sorts v and returns its middle, or the zero value.
func median[T int64 | float64](v []T) T {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// medianError is the standard error of the median of v: for a normal distribution 1.2533
// deviations by the root of their number. A deviation is taken for what the middle half
// spans by 1.349, since some rounds are disturbed.
func medianError(v []float64) float64 {
	if len(v) < 4 {
		return 0
	}
	slices.Sort(v)
	half := v[len(v)*3/4] - v[len(v)/4]
	return 1.2533 * half / 1.349 / math.Sqrt(float64(len(v)))
}
