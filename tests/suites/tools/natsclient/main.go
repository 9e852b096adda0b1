// Command natsclient is a client of NATS that does what its standard input says
// and writes what happens to it, one event a line.
//
//	natsclient URL
//
//	publish N     publishes N numbered messages, which come back
//	request N     makes N requests, which it answers itself
//	bytes N       publishes one message of N bytes
package main

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// limit is how long an answer may take that is bound to come.
const limit = time.Minute

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// events writes from the library's goroutines and from ours.
type events struct{ mu sync.Mutex }

func (e *events) say(format string, args ...any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	fmt.Printf(format+"\n", args...)
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: natsclient URL")
	}
	out := &events{}
	conn, err := nats.Connect(args[0], nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond),
		nats.ReconnectJitter(0, 0), nats.RetryOnFailedConnect(true), nats.ReconnectBufSize(-1),
		nats.ConnectHandler(func(*nats.Conn) { out.say("connected") }),
		nats.DisconnectErrHandler(func(*nats.Conn, error) { out.say("disconnected") }),
		nats.ReconnectHandler(func(*nats.Conn) { out.say("reconnected") }))
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	if err := listen(conn, out); err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		verb, count := "", 0
		if _, err := fmt.Sscan(lines.Text(), &verb, &count); err != nil {
			return fmt.Errorf("command %q: %w", lines.Text(), err)
		}
		if err := do(conn, out, verb, count); err != nil {
			return fmt.Errorf("%s: %w", verb, err)
		}
	}
	return lines.Err()
}

// listen has the client hear what it says.
func listen(conn *nats.Conn, out *events) error {
	_, err := conn.Subscribe("lines", func(m *nats.Msg) { out.say("got %s", m.Data) })
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	_, err = conn.Subscribe("bytes", func(m *nats.Msg) { out.say("got %d bytes, %x", len(m.Data), sha256.Sum256(m.Data)) })
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	_, err = conn.Subscribe("shout", func(m *nats.Msg) { m.Respond([]byte(strings.ToUpper(string(m.Data)))) })
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	return nil
}

func do(conn *nats.Conn, out *events, verb string, count int) error {
	switch verb {
	case "publish":
		for i := range count {
			if err := conn.Publish("lines", fmt.Appendf(nil, "line %d", i)); err != nil {
				return err
			}
		}
	case "bytes":
		if err := conn.Publish("bytes", []byte(strings.Repeat("pillion\n", count/8))); err != nil {
			return err
		}
	case "request":
		for i := range count {
			m, err := conn.Request("shout", fmt.Appendf(nil, "request %d", i), limit)
			if err != nil {
				return err
			}
			out.say("answer %s", m.Data)
		}
	default:
		return errors.New("unknown command")
	}
	// Not flushed: who hears what was said knows that it has arrived, and may end the server
	// before it has answered a flush.
	return nil
}
