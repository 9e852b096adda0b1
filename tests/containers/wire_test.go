package containers

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

// The Container Runtime Interface, as much of it as is needed, without the modules
// of Kubernetes and gRPC: requests and answers of one message each.

// message is one in the encoding of protocol buffers. Fields that are zero are left
// out.
type message []byte

// Kinds of fields.
const (
	kindNumber = 0
	kindBytes  = 2
)

func (m message) key(field, kind int) message {
	return binary.AppendUvarint(m, uint64(field)<<3|uint64(kind))
}

func (m message) number(field int, n int64) message {
	if n == 0 {
		return m
	}
	return binary.AppendUvarint(m.key(field, kindNumber), uint64(n))
}

func (m message) flag(field int, on bool) message {
	if !on {
		return m
	}
	return m.number(field, 1)
}

func (m message) text(field int, all ...string) message {
	for _, s := range all {
		m = m.message(field, message(s))
	}
	return m
}

// message adds a message, also an empty one, which says that it is there.
func (m message) message(field int, sub message) message {
	m = binary.AppendUvarint(m.key(field, kindBytes), uint64(len(sub)))
	return append(m, sub...)
}

// fields are what an answer holds. Of a field that is there twice, the last.
type fields struct {
	numbers map[int]int64
	bytes   map[int]message
}

var errWire = errors.New("not in the encoding of protocol buffers")

func (m message) fields() (fields, error) {
	f := fields{numbers: map[int]int64{}, bytes: map[int]message{}}
	for b := []byte(m); len(b) > 0; {
		key, n := binary.Uvarint(b)
		if n <= 0 {
			return f, errWire
		}
		b = b[n:]
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return f, errWire
		}
		b = b[n:]
		switch field := int(key >> 3); key & 7 {
		case kindNumber:
			f.numbers[field] = int64(v)
		case kindBytes:
			if v > uint64(len(b)) {
				return f, errWire
			}
			f.bytes[field], b = message(b[:v]), b[v:]
		default:
			return f, fmt.Errorf("%w: a field of kind %d", errWire, key&7)
		}
	}
	return f, nil
}

// runtimeClient calls a container runtime.
type runtimeClient struct{ http http.Client }

func dialRuntime(socket string) *runtimeClient {
	h2 := new(http.Protocols)
	h2.SetUnencryptedHTTP2(true)
	var d net.Dialer
	return &runtimeClient{http.Client{Transport: &http.Transport{
		Protocols:   h2,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
	}}}
}

func (c *runtimeClient) close() { c.http.CloseIdleConnections() }

// call calls a method, and returns the answer's fields.
func (c *runtimeClient) call(ctx context.Context, method string, request message) (fields, error) {
	body := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(request)))
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://runtime/runtime.v1."+method, bytes.NewReader(append(body, request...)))
	if err != nil {
		return fields{}, fmt.Errorf("%s: %w", method, err)
	}
	r.Header.Set("Content-Type", "application/grpc")
	r.Header.Set("TE", "trailers")
	resp, err := c.http.Do(r)
	if err != nil {
		return fields{}, fmt.Errorf("%s: %w", method, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return fields{}, fmt.Errorf("%s: %w", method, err)
	}
	status := resp.Trailer
	if status.Get("Grpc-Status") == "" {
		status = resp.Header // nothing came but an error
	}
	if s := status.Get("Grpc-Status"); s != "0" {
		text, err := url.PathUnescape(status.Get("Grpc-Message"))
		if err != nil {
			text = status.Get("Grpc-Message")
		}
		return fields{}, fmt.Errorf("%s: status %q: %s", method, s, text)
	}
	if len(answer) < 5 || answer[0] != 0 {
		return fields{}, fmt.Errorf("%s: an answer of %d bytes: %w", method, len(answer), errWire)
	}
	f, err := message(answer[5:]).fields()
	if err != nil {
		return f, fmt.Errorf("%s: %w", method, err)
	}
	return f, nil
}
