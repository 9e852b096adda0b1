package model

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What a connection under stress is about. Its first bytes say so to the server.
const (
	talkEcho      = iota // all that is sent comes back at the same time
	talkUpload           // an answer after the client's half-close
	talkDownload         // the server ends first
	talkChat             // small messages there and back, with pauses
	talkIdle             // nothing for a while, then one message
	talkReset            // the client resets half-way
	talkResetBack        // the server does
	talks
)

var talkNames = [talks]string{"echo", "upload", "download", "chat", "idle", "reset", "reset back"}

// talkLimit is how long a connection may be stuck.
const talkLimit = 60 * time.Second

// greeting is what a server says first.
const greeting = "pillion!"

// header is what a client says first.
type header struct {
	ID   uint64
	Size uint32
	Talk uint32
}

const headerSize = 16

func (h *header) write(c net.Conn) error {
	b := make([]byte, 0, headerSize)
	b = binary.BigEndian.AppendUint64(b, h.ID)
	b = binary.BigEndian.AppendUint32(b, h.Size)
	b = binary.BigEndian.AppendUint32(b, h.Talk)
	_, err := c.Write(b)
	return err
}

func (h *header) read(c net.Conn) error {
	b := make([]byte, headerSize)
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	h.ID = binary.BigEndian.Uint64(b)
	h.Size = binary.BigEndian.Uint32(b[8:])
	h.Talk = binary.BigEndian.Uint32(b[12:])
	return nil
}

// event is something that happened to a connection or to an endpoint, between two
// moments of the clock that all processes share.
type event struct {
	ID       uint64
	Where    string // what was dialed, or the endpoint
	Talk     string
	From, To int64
	Gone     int64 // when an endpoint had gone
	Err      string
	Cut      bool // the error is that of a reset or of a refusal
	Early    bool // before anything but the greeting was received
}

func (e event) String() string {
	return fmt.Sprintf("connection %d to %s (%s): %s, after %v", e.ID, e.Where, e.Talk, e.Err, time.Duration(e.To-e.From))
}

// clock is the time that all processes share.
func clock() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// isReset tells what calls return on a connection that was reset: ENOTCONN is
// shutdown's.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN)
}

var errBytes = errors.New("other bytes than were sent")

// pour sends n bytes of a stream.
func pour(c net.Conn, s *stream, n, chunk int) error {
	for n > 0 {
		b := s.next(min(n, chunk))
		m, err := c.Write(b)
		s.at += uint64(m)
		n -= m
		if err != nil {
			return err
		}
	}
	return nil
}

// drink reads n bytes of a stream and compares them; n < 0 is until the end.
func drink(c net.Conn, s *stream, n, chunk int) error {
	buf := make([]byte, chunk)
	for n != 0 {
		b := buf
		if n > 0 {
			b = buf[:min(n, chunk)]
		}
		m, err := c.Read(b)
		if !bytes.Equal(b[:m], s.next(m)) {
			return fmt.Errorf("after %d: %w", s.at, errBytes)
		}
		s.at += uint64(m)
		if n > 0 {
			n -= m
		}
		switch {
		case err == io.EOF && n < 0:
			return nil
		case err == io.EOF && n > 0:
			return io.ErrUnexpectedEOF
		case err != nil && err != io.EOF:
			return err
		}
	}
	return nil
}

// streams are the two of a connection: what the client sends, and the server.
func streams(id uint64) (up, down stream) {
	return stream{phase: id * 31}, stream{phase: id*31 + 500009}
}

// printJSON writes a line of JSON.
func printJSON(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

func resetConn(c net.Conn) {
	_ = c.(*net.TCPConn).SetLinger(0)
	c.Close()
}
