package app

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// Kind is what a connection does.
type Kind byte

// These last until the end.
const (
	Echo    Kind = 'e' // a message and its answer, over and over
	Urgent  Kind = 'u' // as Echo, with urgent bytes in between
	Marked  Kind = 'm' // as Echo, with an urgent byte in each message, read in its place
	Stream  Kind = 's' // messages that do not wait for their answers
	Duplex  Kind = 'd' // both sides send whenever they like
	Half    Kind = 'h' // the application has ended its side at once
	FarHalf Kind = 'f' // the server has
	Blocked Kind = 'b' // the application does not read until the end
	Stuffed Kind = 'S' // the server does not
	Idle    Kind = 'i' // nothing until the end
)

// These end by themselves.
const (
	Greet     Kind = 'g' // nothing but the server's name, not even a head
	Empty     Kind = 'n' // not even that
	Once      Kind = 'o' // one message and its answer
	Both      Kind = 'B' // both sides send and end when they like
	AppFirst  Kind = 'a' // the application sends all and ends; then the server
	FarFirst  Kind = 'F' // the other way round
	AppResets Kind = 'r' // the application resets it in the middle
	FarResets Kind = 'R' // the server does
)

// HeadSize is how many bytes stand before the application's stream, in a connection
// that sends any.
const HeadSize = 13

// head begins a connection: what it does, its number, and how much each side sends if
// that is known before; of what lasts, Up is the longest message.
type head struct {
	Kind     Kind
	ID       uint32
	Up, Down uint32
}

func (h head) bytes() []byte {
	b := binary.BigEndian.AppendUint32([]byte{byte(h.Kind)}, h.ID)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, h.Up), h.Down)
}

// readHead also returns how many bytes there were.
func readHead(r io.Reader) (h head, n int, err error) {
	var b [HeadSize]byte
	n, err = io.ReadFull(r, b[:])
	return head{Kind(b[0]), binary.BigEndian.Uint32(b[1:]), binary.BigEndian.Uint32(b[5:]), binary.BigEndian.Uint32(b[9:])}, n, err
}

// streams are the two directions of a connection, to the server and back.
func (h head) streams() (up, down stream) {
	return stream{key: uint64(h.ID) * 2}, stream{key: uint64(h.ID)*2 + 1}
}

// stream is one direction: bytes that tell their place, so that one that is lost,
// doubled or moved is seen, or one of another connection.
type stream struct {
	key uint64
	at  uint64 // how many there were
}

// word is 8 bytes of a stream.
func word(key, n uint64) uint64 {
	x := (key<<32 + n) * 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	return x ^ x>>27
}

// fill writes the next bytes.
func (s *stream) fill(b []byte) {
	for len(b) > 0 {
		var next [8]byte
		binary.LittleEndian.PutUint64(next[:], word(s.key, s.at/8))
		n := copy(b, next[s.at%8:])
		b = b[n:]
		s.at += uint64(n)
	}
}

// check compares with the next bytes.
func (s *stream) check(b []byte) error {
	var space [1024]byte
	for len(b) > 0 {
		from := s.at
		want := space[:min(len(b), len(space))]
		s.fill(want)
		if got := b[:len(want)]; !bytes.Equal(got, want) {
			for i := range want {
				if got[i] != want[i] {
					s.at = from + uint64(i)
					return fmt.Errorf("byte %d is %#x, want %#x", s.at, got[i], want[i])
				}
			}
		}
		b = b[len(want):]
	}
	return nil
}
