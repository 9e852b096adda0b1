package check

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"
)

const (
	// maxHead bounds the status line and the header of an answer, maxBody how
	// much of a body is read, so that the endpoint is not reset half-way.
	maxHead = 64 << 10
	maxBody = 64 << 10
	// maxInterim is how many answers of status 1xx may come before the one that
	// counts.
	maxInterim = 5

	userAgent = "pillion-health-check"
)

// askHTTP sends one GET on a connection of its own. It does by hand what
// http.Transport would: that one dials in a goroutine that nobody can wait for.
func (c *Checker) askHTTP(ctx context.Context, to netip.AddrPort, h HTTP) error {
	conn, err := c.dial(ctx, to)
	if err != nil {
		return err
	}
	defer conn.Close()
	release := interrupt(ctx, conn)
	defer release()
	err = exchange(conn, to, h)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("http: %w", errTimeout)
	default:
		return fmt.Errorf("http: %w", err)
	}
}

// interrupt ends every wait on conn when ctx is done. release ends that, and
// waits for it.
func interrupt(ctx context.Context, conn net.Conn) (release func()) {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = conn.SetDeadline(time.Unix(1, 0)) // closed: then nobody waits
	})
	return func() {
		if !stop() {
			<-done
		}
	}
}

// exchange sends the request and reads the answer.
func exchange(conn net.Conn, to netip.AddrPort, h HTTP) error {
	u, err := h.url()
	if err != nil {
		return err
	}
	u.Scheme, u.Host = "http", to.String()
	req := &http.Request{
		Method: http.MethodGet, URL: u, Host: h.Host, Close: true,
		Header: http.Header{"User-Agent": {userAgent}},
	}
	if err := req.Write(conn); err != nil {
		return fmt.Errorf("send request: %w", shorten(err))
	}
	limited := &io.LimitedReader{R: conn, N: maxHead}
	resp, err := readHead(bufio.NewReader(limited), req)
	if err != nil {
		if limited.N <= 0 {
			return fmt.Errorf("answer has a header of more than %d bytes", maxHead)
		}
		return fmt.Errorf("read answer: %w", shorten(err))
	}
	// The body is not closed: that would read what is left of it, and the
	// connection is closed at once.
	if !slices.ContainsFunc(h.Status, func(r StatusRange) bool {
		return r.First <= resp.StatusCode && resp.StatusCode <= r.Last
	}) {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	limited.N = maxBody
	_, err = io.Copy(io.Discard, resp.Body)
	if err != nil && limited.N > 0 {
		return fmt.Errorf("read body: %w", shorten(err))
	}
	return nil
}

// readHead reads up to the header of the answer that counts.
func readHead(r *bufio.Reader, req *http.Request) (*http.Response, error) {
	for range maxInterim {
		resp, err := http.ReadResponse(r, req)
		if err != nil {
			return nil, clip(err)
		}
		if resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			return resp, nil
		}
	}
	return nil, errors.New("nothing but interim answers")
}

// clip cuts off the text of an error, which may quote all of an answer.
func clip(err error) error {
	if text := err.Error(); len(text) > maxOutput {
		return errors.New(printable(text[:maxOutput]))
	}
	return err
}
