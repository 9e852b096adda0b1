package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// What the first byte of a message asks of the server.
const (
	askEcho = 'e' // the same message back
	askSend = 's' // as many bytes as bytes 8 to 15 say
	askTake = 't' // take that many, then the same message back
)

const bulkBuffer = 256 << 10

// message is a request that asks for an amount.
func message(ask byte, amount uint64) []byte {
	m := make([]byte, messageSize)
	m[0] = ask
	binary.BigEndian.PutUint64(m[8:], amount)
	return m
}

// serve answers at some addresses until it is killed.
func serve(args []string) error {
	if len(args) == 0 {
		return errors.New("server: want an address")
	}
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	var all []net.Listener
	for _, addr := range args {
		ln, err := lc.Listen(context.Background(), "tcp", addr)
		if err != nil {
			return fmt.Errorf("server: %w", err)
		}
		all = append(all, ln)
	}
	return each(len(all), func(i int) error { return accept(all[i]) })
}

// accept answers until ln is closed, and when all clients have gone returns why.
func accept(ln net.Listener) error {
	var all sync.WaitGroup
	defer all.Wait()
	for {
		c, err := ln.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		all.Go(func() { answer(c) })
	}
}

// answer is the server's side of one connection.
func answer(c net.Conn) {
	defer c.Close()
	buf := make([]byte, messageSize)
	for {
		if _, err := io.ReadFull(c, buf); err != nil {
			return // the client has closed, or is gone
		}
		if err := obey(c, buf); err != nil {
			return
		}
	}
}

func obey(c net.Conn, m []byte) error {
	amount := int64(binary.BigEndian.Uint64(m[8:]))
	switch m[0] {
	case askSend:
		return sendBytes(c, amount)
	case askTake:
		if err := takeBytes(c, amount); err != nil {
			return err
		}
	default: // askEcho
	}
	_, err := c.Write(m)
	return err
}

// sendBytes writes n bytes.
func sendBytes(c net.Conn, n int64) error {
	buf := make([]byte, bulkBuffer)
	for n > 0 {
		m, err := c.Write(buf[:min(n, bulkBuffer)])
		if err != nil {
			return err
		}
		n -= int64(m)
	}
	return nil
}

// takeBytes reads n bytes. It is no io.Copy, which would move them in ways of
// its own.
func takeBytes(c net.Conn, n int64) error {
	buf := make([]byte, bulkBuffer)
	for n > 0 {
		m, err := c.Read(buf[:min(n, bulkBuffer)])
		if err != nil {
			return err
		}
		n -= int64(m)
	}
	return nil
}

// answers waits until something accepts connections at addr.
func answers(addr string, limit time.Duration) error {
	end := time.Now().Add(limit)
	for {
		c, err := net.DialTimeout("tcp", addr, limit)
		if err == nil {
			return c.Close()
		}
		if time.Now().After(end) {
			return fmt.Errorf("nobody answers at %s: %w", addr, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
