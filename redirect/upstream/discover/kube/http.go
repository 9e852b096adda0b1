package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	dialTimeout   = 10 * time.Second
	answerTimeout = 30 * time.Second
	// A connection that has said nothing for pingAfter is asked whether it is
	// still there: a server that vanished would otherwise look like one in whose
	// cluster nothing happens.
	pingAfter   = 30 * time.Second
	pingTimeout = 15 * time.Second
	// tokenFor is how long a token is used before its file is read again. The
	// kubelet renews it long before it expires.
	tokenFor = 10 * time.Second
)

// newHTTP returns the HTTP client. It knows no proxy and follows no redirect: a
// token is for the server alone.
func newHTTP(creds *credentials, o Options) *http.Client {
	d := &net.Dialer{Timeout: dialTimeout}
	d.SetMultipathTCP(false) // an exempt socket has to be the one that connects
	if exempt := o.Exempt; exempt != nil {
		d.Control = func(_, _ string, raw syscall.RawConn) error {
			var err error
			return errors.Join(raw.Control(func(fd uintptr) { err = exempt(int(fd)) }), err)
		}
		plain := &net.Dialer{Timeout: dialTimeout, Control: d.Control}
		plain.SetMultipathTCP(false)
		d.Resolver = &net.Resolver{PreferGo: true, Dial: plain.DialContext}
	}
	var both http.Protocols
	both.SetHTTP1(true)
	both.SetHTTP2(true)
	t := &http.Transport{
		DialContext: d.DialContext,
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return dialTLS(ctx, d, creds, network, addr)
		},
		Protocols:             &both,
		ResponseHeaderTimeout: answerTimeout,
		IdleConnTimeout:       90 * time.Second,
		MaxIdleConnsPerHost:   2,
		DisableCompression:    true, // events are small, and lists are read once
		// A watch that is not read holds up to its window of memory.
		HTTP2: &http.HTTP2Config{SendPingTimeout: o.pingAfter, PingTimeout: o.pingTimeout, MaxReceiveBufferPerStream: 64 << 10},
	}
	return &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// dialTLS reads CA and certificate anew: connections are rare, and files that
// were rotated are noticed by the first that needs them.
func dialTLS(ctx context.Context, d *net.Dialer, creds *credentials, network, addr string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		ServerName:         or(creds.serverName, host),
		MinVersion:         tls.VersionTLS12,
		NextProtos:         []string{"h2", "http/1.1"},
		InsecureSkipVerify: creds.insecure, // the kubeconfig's own word
	}
	if err := creds.load(config); err != nil {
		return nil, err
	}
	raw, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, config)
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

func (c *credentials) load(config *tls.Config) error {
	ca, err := fileOr(c.caFile, c.ca)
	if err != nil {
		return fmt.Errorf("read CA: %w", err)
	}
	if len(ca) > 0 { // else the system's
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return errors.New("read CA: no certificate in it")
		}
	}
	cert, err := fileOr(c.certFile, c.cert)
	if err != nil {
		return fmt.Errorf("read client certificate: %w", err)
	}
	key, err := fileOr(c.keyFile, c.key)
	if err != nil {
		return fmt.Errorf("read client key: %w", err)
	}
	if len(cert) > 0 {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return fmt.Errorf("read client certificate: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
		c.used.Store(string(cert))
	}
	return nil
}

// renewed tells whether the client certificate is another one than that of the youngest
// connection.
func (c *credentials) renewed() bool {
	if c.certFile == "" {
		return false
	}
	cert, err := os.ReadFile(c.certFile)
	return err == nil && string(cert) != c.used.Load()
}

func fileOr(name string, value []byte) ([]byte, error) {
	if name == "" {
		return value, nil
	}
	return os.ReadFile(name)
}

// auth gives the bearer token.
type auth struct {
	file string // goes before token

	mu    sync.Mutex // orders the rest
	token string
	read  time.Time
}

// current returns the token, or "" if there is none to send. again says that
// the last one was refused.
func (a *auth) current(again bool) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.file == "" || !again && time.Since(a.read) < tokenFor {
		return a.token, nil
	}
	b, err := os.ReadFile(a.file)
	if err != nil {
		return "", fmt.Errorf("read token: %w", err)
	}
	a.token, a.read = strings.TrimSpace(string(b)), time.Now()
	return a.token, nil
}

// statusError is an answer that is not what was asked for.
type statusError struct {
	code    int
	message string
	after   time.Duration // when the server wants to be asked again, or 0
}

func (e *statusError) Error() string {
	if e.message == "" {
		return fmt.Sprintf("API server: %d %s", e.code, http.StatusText(e.code))
	}
	return fmt.Sprintf("API server: %d: %s", e.code, e.message)
}

// isStatus tells whether the server answered with that code.
func isStatus(err error, code int) bool {
	s, ok := errors.AsType[*statusError](err)
	return ok && s.code == code
}

// get asks for path. The caller closes the body; the answer is 200.
func (c *Client) get(ctx context.Context, path string, query url.Values) (*http.Response, error) {
	closing := false
	for try := 0; ; try++ {
		token, err := c.auth.current(try > 0)
		if err != nil {
			return nil, err
		}
		address := c.base + path
		if len(query) > 0 {
			address += "?" + query.Encode()
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
		if err != nil {
			return nil, err
		}
		req.Close = closing
		req.Header.Set("Accept", "application/json")
		req.Header.Set("User-Agent", "pillion")
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := c.gate.do(c.http, req)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode == http.StatusOK {
			return resp, nil
		}
		err = refusal(resp)
		resp.Body.Close()
		switch {
		case resp.StatusCode != http.StatusUnauthorized:
			return nil, err
		case closing:
			closing = false // the next one may be over another connection
		case try < triesMost && c.creds.renewed():
			// A connection is not used again once a request has asked for its end.
			closing = true
		case try == 0 && c.auth.file != "":
			// The token may have been renewed since its file was read.
		default:
			return nil, err
		}
	}
}

// triesMost bounds how many connections of a client certificate that was renewed are
// given up by one request.
const triesMost = 8

// refusal reads why there is no answer.
func refusal(resp *http.Response) error {
	e := &statusError{code: resp.StatusCode}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var status struct {
		Message string `json:"message"`
	}
	if err == nil && json.Unmarshal(b, &status) == nil {
		e.message = status.Message
	}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
		e.after = min(time.Duration(n)*time.Second, retryMax)
	}
	return e
}
