package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

const (
	// answerTimeout is how long an instance has to begin its answer.
	answerTimeout = 15 * time.Second
	// errorMax bounds the text of an error.
	errorMax = 64 << 10
	// tries is how often a question is asked whose answer breaks off: the process may
	// have been killed, and another one may answer (survive: crash).
	tries = 4
)

// Client asks an instance. Its methods are safe for concurrent use; each opens a
// connection of its own and leaves nothing behind. They fail with [ErrNotRunning]
// when nobody listens and with [*Error] when the answer is an error.
type Client struct {
	path string
	http http.Client
}

// Dial returns a client of the socket at path. It does not connect yet.
func Dial(path string) *Client {
	var d net.Dialer
	return &Client{path: path, http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		},
		DisableKeepAlives:     true,
		DisableCompression:    true,
		ResponseHeaderTimeout: answerTimeout,
	}}}
}

// Status asks how the instance is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.ask(ctx, "/v1/status", nil, &s)
	return s, err
}

// Flows asks for flow records.
func (c *Client) Flows(ctx context.Context, q FlowQuery) ([]flow.Record, error) {
	var records []flow.Record
	err := c.ask(ctx, "/v1/flows", q.values(), &records)
	return records, err
}

// Ready fails with what is missing for the instance to be ready.
func (c *Client) Ready(ctx context.Context) error {
	return c.ask(ctx, "/v1/ready", nil, &struct{}{})
}

// Live fails with what is missing for the instance to be alive.
func (c *Client) Live(ctx context.Context) error {
	return c.ask(ctx, "/v1/live", nil, &struct{}{})
}

// Resolve asks which original address a slot stands for.
func (c *Client) Resolve(ctx context.Context, slot netip.Addr) (netip.Addr, error) {
	var r resolved
	err := c.ask(ctx, "/v1/resolve", url.Values{"slot": {slot.String()}}, &r)
	return r.Address, err
}

// Explain asks what happens to connections to a destination, and why.
func (c *Client) Explain(ctx context.Context, q ExplainQuery) ([]Explanation, error) {
	var all []Explanation
	err := c.ask(ctx, "/v1/explain", q.values(), &all)
	return all, err
}

// Config asks for the configuration that holds, as JSON.
func (c *Client) Config(ctx context.Context) (json.RawMessage, error) {
	var raw json.RawMessage
	err := c.ask(ctx, "/v1/config", nil, &raw)
	return raw, err
}

// Reload has the instance read its configuration again. What is wrong with that
// is in the result, and no error.
func (c *Client) Reload(ctx context.Context) (ReloadResult, error) {
	var r ReloadResult
	err := insist(func() error {
		body, err := c.send(ctx, http.MethodPost, "/v1/reload", nil, nil)
		if err != nil {
			return err
		}
		r = ReloadResult{}
		return c.decode(body, "/v1/reload", &r)
	})
	return r, err
}

// Diff asks what a reload would do if text were in the instance's file; refusals
// call that by name. What would be wrong with that is in the result, and no error. An
// instance of a version that does not know the question answers with an [*Error]
// of code 404.
func (c *Client) Diff(ctx context.Context, name string, text []byte) (DiffResult, error) {
	var r DiffResult
	err := insist(func() error {
		body, err := c.send(ctx, http.MethodPost, "/v1/diff", url.Values{"name": {name}}, text)
		if err != nil {
			return err
		}
		r = DiffResult{}
		return c.decode(body, "/v1/diff", &r)
	})
	return r, err
}

// Metrics asks for the metrics in Prometheus' text format. The caller closes it.
func (c *Client) Metrics(ctx context.Context) (body io.ReadCloser, err error) {
	err = insist(func() error {
		body, err = c.get(ctx, "/metrics", nil)
		return err
	})
	return body, err
}

// ask decodes the answer of path into answer.
func (c *Client) ask(ctx context.Context, path string, v url.Values, answer any) error {
	return insist(func() error {
		body, err := c.get(ctx, path, v)
		if err != nil {
			return err
		}
		return c.decode(body, path, answer)
	})
}

// insist calls f again when its answer broke off. All that can be asked may be asked
// twice.
func insist(f func() error) error {
	for n := 1; ; n++ {
		err := f()
		if _, broke := errors.AsType[brokenOff](err); !broke || n == tries {
			return err
		}
	}
}

// brokenOff is that an instance was reached, and its answer is not whole.
type brokenOff struct{ error }

func (e brokenOff) Unwrap() error { return e.error }

// broken makes an error brokenOff if that is what it means. http has errors of its own
// for it, without a name.
func broken(err error) error {
	op, ok := errors.AsType[*net.OpError](err)
	if slow, is := errors.AsType[net.Error](err); ok && op.Op == "dial" || is && slow.Timeout() || errors.Is(err, context.Canceled) {
		return err
	}
	return brokenOff{err}
}

// decode reads an answer and closes it.
func (c *Client) decode(body io.ReadCloser, path string, answer any) error {
	defer body.Close()
	if err := json.NewDecoder(body).Decode(answer); err != nil {
		if _, read := errors.AsType[*net.OpError](err); read || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = broken(err)
		}
		return fmt.Errorf("read answer of %s%s: %w", c.path, path, err)
	}
	return nil
}

// get is send with the method that most routes have.
func (c *Client) get(ctx context.Context, path string, v url.Values) (io.ReadCloser, error) {
	return c.send(ctx, http.MethodGet, path, v, nil)
}

// send returns the body of a good answer; the caller closes it.
func (c *Client) send(ctx context.Context, method, path string, v url.Values, text []byte) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: "pillion", Path: path, RawQuery: v.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", c.path, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("%w at %s", ErrNotRunning, c.path)
		}
		// Without the URL that http puts in front: the host in it is made up.
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err
		}
		return nil, fmt.Errorf("ask %s: %w", c.path, broken(err))
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	return nil, readError(resp)
}

// readError reads an answer that is an error. An instance of another version
// may send one that is no JSON.
func readError(resp *http.Response) error {
	e := &Error{Code: resp.StatusCode}
	err := json.NewDecoder(io.LimitReader(resp.Body, errorMax)).Decode(e)
	if err != nil || e.Message == "" {
		e.Message = resp.Status
	}
	return e
}
