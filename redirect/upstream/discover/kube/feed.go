package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

const (
	// A watch lasts between one and two of these, so that those that were started
	// together do not end together.
	watchFor = 5 * time.Minute
	// After its time a watch has this long to end by itself.
	watchGrace = 30 * time.Second
	// A watch that ends sooner counts as a failed one.
	watchMin = time.Second
)

// errGone means that the server no longer knows what followed a version.
var errGone = errors.New("the version to watch from is gone")

// feed lists the objects of one selection, and watches what becomes of them.
// Its functions are called by run alone, and must not block: the connection is
// shared.
type feed[C any] struct {
	client   *Client
	path     string
	selector string // of labels; empty: all
	decode   func(read func(any) error) (object[C], error)

	replace func(all map[string]C)     // the whole list
	change  func(name string, value C) // added or changed
	remove  func(name string)          // deleted
	fresh   func()                     // what is known is up to date again
	failed  func(err error)            // it is not, and why
}

// run keeps the selection up to date until ctx is done. Only a complete list
// replaces what was known.
func (f *feed[C]) run(ctx context.Context) {
	var (
		version string // to watch from; none: list first
		last    = "0"  // to list from: not older than that
		pause   = pauser{gate: f.client.gate}
	)
	for ctx.Err() == nil {
		var err error
		if version == "" {
			version, err = f.list(ctx, last)
		}
		if err == nil {
			last = version
			pause.worked = false
			version, err = f.watch(ctx, version, &pause)
			if version != "" {
				last = version
			}
		}
		switch {
		case ctx.Err() != nil:
		case err == nil:
			pause.wait(ctx, nil)
		case isGone(err):
			version, last = "", ""
			pause.wait(ctx, nil)
		case errors.Is(err, errBroken) && pause.worked:
			// The stream broke; whether the server is there, the next one tells.
			pause.wait(ctx, nil)
		default:
			f.failed(err)
			pause.wait(ctx, err)
		}
	}
}

// isGone tells whether the list has to be read again.
func isGone(err error) bool { return errors.Is(err, errGone) || isStatus(err, http.StatusGone) }

// list reads the whole selection and returns its version. from is the version
// that it may not be older than: "" is the newest, which etcd tells, and "0" any,
// out of the server's cache.
func (f *feed[C]) list(ctx context.Context, from string) (string, error) {
	select {
	case f.client.lists <- struct{}{}:
		defer func() { <-f.client.lists }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	for {
		all := make(map[string]C)
		version, err := f.client.list(ctx, f.path, f.query(from), func(read func(any) error) error {
			o, err := f.decode(read)
			if err == nil {
				all[o.name] = o.value
			}
			return err
		})
		switch {
		case isStatus(err, http.StatusGatewayTimeout) && from != "" && from != "0",
			// A cache may be behind. Nothing is what it is asked twice for.
			err == nil && len(all) == 0 && from == "0":
			from = ""
		case err != nil:
			return "", fmt.Errorf("list %s: %w", f.path, err)
		default:
			f.replace(all)
			return version, nil
		}
	}
}

func (f *feed[C]) query(version string) url.Values {
	q := make(url.Values)
	if f.selector != "" {
		q.Set("labelSelector", f.selector)
	}
	if version != "" {
		q.Set("resourceVersion", version)
	}
	return q
}

// errBroken means that a watch ended in the middle.
var errBroken = errors.New("the stream broke")

// watch follows the selection from version on until the server ends it or
// something is wrong. It returns the version to go on from: none to list again.
func (f *feed[C]) watch(ctx context.Context, version string, pause *pauser) (string, error) {
	lasts := watchFor + rand.N(watchFor)
	ctx, cancel := context.WithTimeout(ctx, lasts+watchGrace)
	defer cancel()
	q := f.query(version)
	q.Set("watch", "1")
	q.Set("allowWatchBookmarks", "true")
	q.Set("timeoutSeconds", strconv.Itoa(int(lasts/time.Second)))
	resp, err := f.client.get(ctx, f.path, q)
	if err != nil {
		return version, fmt.Errorf("watch %s: %w", f.path, err)
	}
	defer resp.Body.Close()
	f.fresh()
	started := time.Now()
	next, err := f.events(resp.Body, version)
	pause.worked = time.Since(started) >= watchMin || next != "" && next != version
	if err != nil {
		err = fmt.Errorf("watch %s: %w", f.path, err)
	}
	return next, err
}

// events applies what a watch tells. The decoder, whose buffer has the size of
// the largest event, lives only as long as there is something in it.
func (f *feed[C]) events(body io.Reader, version string) (string, error) {
	limited := &io.LimitedReader{R: body}
	var dec *json.Decoder
	for {
		limited.N = f.client.eventMax
		if dec == nil {
			dec = json.NewDecoder(limited)
		}
		var e struct {
			Type   string          `json:"type"`
			Object json.RawMessage `json:"object"`
		}
		err := dec.Decode(&e)
		switch {
		case err == io.EOF && limited.N > 0:
			return version, nil
		case isMalformed(err), limited.N == 0:
			return "", fmt.Errorf("read an event: %w", err)
		case err != nil:
			f.client.gate.broke()
			return version, fmt.Errorf("%w: %w", errBroken, err)
		}
		if version, err = f.event(e.Type, e.Object, version); err != nil {
			return version, err
		}
		if isSpace(dec.Buffered()) {
			dec = nil
		}
	}
}

func isMalformed(err error) bool {
	_, syntax := errors.AsType[*json.SyntaxError](err)
	_, kind := errors.AsType[*json.UnmarshalTypeError](err)
	return syntax || kind
}

// isSpace tells whether there is nothing but white space in what was read ahead.
func isSpace(r io.Reader) bool {
	b, err := io.ReadAll(io.LimitReader(r, 4))
	return err == nil && len(b) < 4 && len(bytes.TrimSpace(b)) == 0
}

func (f *feed[C]) event(kind string, raw json.RawMessage, version string) (string, error) {
	read := func(to any) error { return json.Unmarshal(raw, to) }
	switch kind {
	case "ADDED", "MODIFIED", "DELETED":
		o, err := f.decode(read)
		if err != nil {
			return "", fmt.Errorf("read an event: %w", err)
		}
		if kind == "DELETED" {
			f.remove(o.name)
		} else {
			f.change(o.name, o.value)
		}
		return o.version, nil
	case "BOOKMARK":
		var b struct {
			Metadata metadata `json:"metadata"`
		}
		if err := read(&b); err != nil {
			return "", fmt.Errorf("read a bookmark: %w", err)
		}
		if b.Metadata.ResourceVersion == "" {
			return "", errors.New("read a bookmark: no version")
		}
		return b.Metadata.ResourceVersion, nil
	case "ERROR":
		var s struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		}
		if err := read(&s); err != nil {
			return "", fmt.Errorf("read an error: %w", err)
		}
		if s.Code == http.StatusGone {
			return "", errGone
		}
		return "", &statusError{code: s.Code, message: s.Message}
	default:
		return "", fmt.Errorf("read an event: type %q", kind)
	}
}

// list reads a list item by item, so that it is never in memory as a whole, and
// returns its version. An answer that is not a complete list is an error.
func (c *Client) list(ctx context.Context, path string, query url.Values, item func(read func(any) error) error) (string, error) {
	resp, err := c.get(ctx, path, query)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var (
		dec  = json.NewDecoder(resp.Body)
		meta metadata
		seen bool
	)
	if err := expect(dec, '{'); err != nil {
		return "", err
	}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return "", unexpected(err)
		}
		switch name {
		case "metadata":
			err = dec.Decode(&meta)
		case "items":
			seen = true
			err = readItems(dec, item)
		default:
			err = dec.Decode(new(json.RawMessage))
		}
		if err != nil {
			return "", unexpected(err)
		}
	}
	if err := expect(dec, '}'); err != nil {
		return "", err
	}
	if !seen || meta.ResourceVersion == "" {
		return "", errors.New("the answer is not a list")
	}
	return meta.ResourceVersion, nil
}

func readItems(dec *json.Decoder, item func(read func(any) error) error) error {
	switch t, err := dec.Token(); {
	case err != nil:
		return err
	case t == nil: // null is a list too
		return nil
	case t != json.Delim('['):
		return errors.New("items is not a list")
	}
	for dec.More() {
		if err := item(dec.Decode); err != nil {
			return err
		}
	}
	return expect(dec, ']')
}

func expect(dec *json.Decoder, want json.Delim) error {
	t, err := dec.Token()
	if err != nil {
		return unexpected(err)
	}
	if t != want {
		return fmt.Errorf("the answer has %v for %v", t, want)
	}
	return nil
}

// unexpected is for an end in the middle of an answer.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// pauser waits between attempts: twice as long after each failure, and always by
// chance, so that the sidecars of a cluster do not come back all at once.
type pauser struct {
	gate   *gate
	next   time.Duration
	worked bool // the last watch lasted for a while
}

func (p *pauser) wait(ctx context.Context, err error) {
	if p.worked {
		p.next = 0
	}
	p.next = max(p.next, p.gate.first)
	d := p.next/2 + rand.N(p.next)
	p.next = min(2*p.next, p.gate.longest)
	if s, ok := errors.AsType[*statusError](err); ok {
		d = max(d, s.after)
	}
	if p.worked {
		d /= 4
	}
	p.worked = false
	p.gate.wait(ctx, d)
}
