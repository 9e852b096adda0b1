package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestHTTP2: all that a client asks goes over one connection.
func TestHTTP2(t *testing.T) {
	k := startKube(t)
	c := k.client(t)
	addrs := make(map[string]bool)
	for i := range 20 {
		name := fmt.Sprintf("web%d", i)
		k.put("services", "default", name, "", webSpec)
		k.put("endpointslices", "default", name+"-1", name, sliceOf("IPv4", httpPort, ep("10.0.0.1")))
		listen(t, c.Source(Ref{Name: name, Port: "80"})).waitFor("10.0.0.1")
	}
	k.count(func(r *http.Request) bool {
		if r.ProtoMajor != 2 {
			t.Errorf("%s by %s", r.URL, r.Proto)
		}
		addrs[r.RemoteAddr] = true
		return false
	})
	if len(addrs) != 1 {
		t.Errorf("%d connections", len(addrs))
	}
}

// TestFewDials: however many wait for the server, few of them connect, at the
// start and after an outage.
func TestFewDials(t *testing.T) {
	const n = 40
	k := startKube(t)
	var dials atomic.Int32
	c := k.client(t, func(o *Options) { o.Exempt = func(int) error { dials.Add(1); return nil } })
	var all []*heard
	for i := range n {
		name := fmt.Sprintf("web%d", i)
		k.put("services", "default", name, "", webSpec)
		k.put("endpointslices", "default", name+"-1", name, sliceOf("IPv4", httpPort, ep("10.0.0.1")))
		all = append(all, listen(t, c.Source(Ref{Name: name, Port: "80"})))
	}
	for _, h := range all {
		h.waitFor("10.0.0.1")
	}
	if n := dials.Load(); n > startsMax {
		t.Errorf("%d connections at the start", n)
	}
	dials.Store(0)
	k.CloseClientConnections()
	for i := range n {
		name := fmt.Sprintf("web%d", i)
		k.put("endpointslices", "default", name+"-1", name, sliceOf("IPv4", httpPort, ep("10.0.0.2")))
	}
	for _, h := range all {
		h.waitFor("10.0.0.2")
	}
	if n := dials.Load(); n > startsMax {
		t.Errorf("%d connections after the outage", n)
	}
}

// TestOutageTrials: while the server is away, those that wait for it try together
// and ever more seldom, and all of them are back when one of them finds it.
func TestOutageTrials(t *testing.T) {
	const n = 40
	k := startKube(t)
	var dials atomic.Int32
	var away atomic.Bool
	c := k.client(t, func(o *Options) {
		o.Exempt = func(int) error {
			dials.Add(1)
			if away.Load() {
				return os.ErrPermission
			}
			return nil
		}
	})
	c.gate.first, c.gate.longest = 20*time.Millisecond, time.Hour
	var all []*heard
	for i := range n {
		name := fmt.Sprintf("web%d", i)
		k.put("services", "default", name, "", webSpec)
		k.put("endpointslices", "default", name+"-1", name, sliceOf("IPv4", httpPort, ep("10.0.0.1")))
		all = append(all, listen(t, c.Source(Ref{Name: name, Port: "80"})))
	}
	for _, h := range all {
		h.waitFor("10.0.0.1")
	}
	away.Store(true)
	dials.Store(0)
	k.CloseClientConnections()
	for _, h := range all {
		h.waitErr("permission denied")
	}
	// By the pause: trials that were under way when the server went fail together, and
	// count as one.
	eventually(t, "a pause of 80 ms, which is the third", func() bool {
		c.gate.mu.Lock()
		defer c.gate.mu.Unlock()
		return c.gate.pause >= 80*time.Millisecond
	})
	away.Store(false)
	for _, h := range all {
		h.waitFor("10.0.0.1")
	}
	// Some may have tried together at the beginning. 40 on their own, at least
	// three times each, would be 120.
	if d := dials.Load(); d > 40 {
		t.Errorf("%d dials", d)
	}
}

// TestFullConnection: a server that takes few requests on a connection has more
// connections, and not one for each watch.
func TestFullConnection(t *testing.T) {
	const n, each = 40, 10
	k := newKube(t)
	k.Server = httptest.NewUnstartedServer(k)
	k.EnableHTTP2 = true
	k.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: each}
	k.StartTLS()
	t.Cleanup(func() {
		k.CloseClientConnections()
		k.Server.Close()
	})
	var dials atomic.Int32
	c := k.client(t, func(o *Options) { o.Exempt = func(int) error { dials.Add(1); return nil } })
	for i := range n {
		name := fmt.Sprintf("web%d", i)
		k.put("services", "default", name, "", webSpec)
		k.put("endpointslices", "default", name+"-1", name, sliceOf("IPv4", httpPort, ep("10.0.0.1")))
		listen(t, c.Source(Ref{Name: name, Port: "80"})).waitFor("10.0.0.1")
	}
	if d := dials.Load(); d < n/each || d > n/each+startsMax {
		t.Errorf("%d connections for %d watches, of which one takes %d", d, n, each)
	}
}

// TestTrial: those that wait for a trial share its end, and one that is given up
// is taken over.
func TestTrial(t *testing.T) {
	g := newGate(time.Millisecond, time.Millisecond)
	if trial, err := g.enter(t.Context()); !trial || err != nil {
		t.Fatalf("the first is no trial: %v", err)
	}
	type entered struct {
		trial bool
		err   error
	}
	waiting := make(chan entered, 2)
	enter := func() {
		trial, err := g.enter(t.Context())
		waiting <- entered{trial, err}
	}
	go enter()
	go enter()
	g.leave(true, context.Canceled, true)
	first := <-waiting
	if !first.trial || first.err != nil {
		t.Errorf("after a trial that was given up: %+v", first)
	}
	g.leave(true, os.ErrDeadlineExceeded, false)
	// It waited for the second trial, or came late and is the third.
	if second := <-waiting; !second.trial && second.err != os.ErrDeadlineExceeded {
		t.Errorf("after one that failed: %+v", second)
	} else if second.trial {
		g.leave(true, nil, false)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	g = newGate(time.Millisecond, time.Millisecond)
	if _, err := g.enter(cancelled); err != nil {
		t.Error(err)
	}
	if _, err := g.enter(cancelled); err != context.Canceled {
		t.Errorf("a cancelled one waits for a trial: %v", err)
	}
	g.leave(true, nil, false)
	if trial, err := g.enter(cancelled); trial || err != nil {
		t.Errorf("the server is up, and this is a trial: %v, %v", trial, err)
	}
}

// TestVanished: a server that is gone without a word is noticed, though nothing
// is sent to it, and another one at its address is found.
func TestVanished(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	between := &middle{ln: ln, to: k.Listener.Addr().String()}
	between.run.Go(between.accept)
	t.Cleanup(func() {
		ln.Close()
		between.closeAll()
		between.run.Wait()
	})
	c := k.client(t, func(o *Options) {
		o.Server = "https://" + ln.Addr().String()
		o.pingAfter, o.pingTimeout = 50*time.Millisecond, 50*time.Millisecond
	})
	h := listen(t, c.Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.1")
	between.freeze()
	k.webSlice("10.0.0.2")
	h.waitFor("10.0.0.2")
	if _, empty := h.counts(); empty > 0 {
		t.Errorf("%d empty sets", empty)
	}
}

// middle passes bytes between client and server. Once frozen, the connections
// that there are stay open and carry nothing.
type middle struct {
	ln  net.Listener
	to  string
	run sync.WaitGroup

	mu    sync.Mutex // orders conns
	conns []net.Conn
	epoch atomic.Int32
}

func (m *middle) freeze() { m.epoch.Add(1) }

func (m *middle) closeAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.conns {
		c.Close()
	}
}

func (m *middle) accept() {
	for {
		client, err := m.ln.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", m.to)
		if err != nil {
			client.Close()
			continue
		}
		m.mu.Lock()
		m.conns = append(m.conns, client, server)
		m.mu.Unlock()
		epoch := m.epoch.Load()
		m.run.Go(func() { m.copy(client, server, epoch) })
		m.run.Go(func() { m.copy(server, client, epoch) })
	}
}

func (m *middle) copy(to, from net.Conn, epoch int32) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if m.epoch.Load() != epoch {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// TestNoRedirect: a token does not follow a redirect.
func TestNoRedirect(t *testing.T) {
	other := startKube(t)
	other.web("10.0.0.1")
	k := startKube(t)
	k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, other.URL+r.URL.String(), http.StatusTemporaryRedirect)
		return true
	})
	listen(t, k.client(t).Source(Ref{Name: "web", Port: "80"})).waitErr("307")
	if n := other.count(func(*http.Request) bool { return true }); n > 0 {
		t.Errorf("%d requests to the other server", n)
	}
}

// TestKubeconfig: server, CA, certificate, namespace and token are read of the
// current context, from the file itself or from beside it.
func TestKubeconfig(t *testing.T) {
	a := newAuthority(t, "ca")
	cert, key := a.issue(t)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	k := startKubeTLS(t, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool})
	k.put("services", "prod", "web", "", webSpec)
	k.put("endpointslices", "prod", "web-1", "web", sliceOf("IPv4", httpPort, ep("10.0.0.7")))

	b64 := base64.StdEncoding.EncodeToString
	inline := fmt.Sprintf(`{certificate-authority-data: %s, server: "%s"}`, b64(a.pem), k.URL)
	beside := fmt.Sprintf(`{certificate-authority: ca.crt, server: "%s"}`, k.URL)
	for _, tt := range []struct{ name, cluster, user, bad string }{
		{name: "in the file", cluster: inline, user: fmt.Sprintf(`{token: secret, client-certificate-data: %s, client-key-data: %s}`, b64(cert), b64(key))},
		{name: "beside it", cluster: beside, user: `{tokenFile: token, client-certificate: tls.crt, client-key: tls.key}`},
		{name: "unverified", cluster: fmt.Sprintf(`{insecure-skip-tls-verify: true, server: "%s"}`, k.URL), user: `{token: secret, client-certificate: tls.crt, client-key: tls.key}`},
		{name: "another name", cluster: strings.Replace(beside, "{", "{tls-server-name: 127.0.0.1, ", 1), user: `{token: secret, client-certificate: tls.crt, client-key: tls.key}`},
		{name: "command", cluster: inline, user: `{exec: {command: aws}}`, bad: "a command"},
		{name: "password", cluster: inline, user: `{username: a, password: b}`, bad: "a password"},
		{name: "proxy", cluster: strings.Replace(inline, "{", "{proxy-url: x, ", 1), user: `{token: secret}`, bad: "proxy-url"},
		{name: "not base64", cluster: strings.Replace(inline, "data: ", "data: =", 1), user: `{token: secret}`, bad: "certificate-authority-data"},
		{name: "key without certificate", cluster: inline, user: `{client-key: tls.key}`, bad: "needs both"},
		{name: "token in the clear", cluster: `{server: "http://127.0.0.1:1"}`, user: `{token: secret}`, bad: "as it is"},
		{name: "no server", cluster: `{}`, user: `{token: secret}`, bad: "not a URL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, b := range map[string][]byte{"ca.crt": a.pem, "tls.crt": cert, "tls.key": key, "token": []byte("secret\n")} {
				writeFile(t, dir, name, b)
			}
			file := writeFile(t, dir, "config", fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: here
contexts:
- {name: there, context: {cluster: b, user: b}}
- {name: here, context: {cluster: a, user: a, namespace: prod}}
clusters: [{name: a, cluster: %s}]
users: [{name: a, user: %s}]
`, tt.cluster, tt.user))
			c, err := New(Options{Kubeconfig: file})
			if tt.bad != "" {
				if err == nil || !strings.Contains(err.Error(), tt.bad) {
					t.Fatalf("error %v, want one that says %s", err, tt.bad)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(c.Close)
			c.gate.first, c.gate.longest = time.Millisecond, 10*time.Millisecond
			listen(t, c.Source(Ref{Name: "web", Port: "80"})).waitFor("10.0.0.7")
		})
	}
}

// TestNewRefuses: what can never work is said before anything is tried.
func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, tt := range []struct {
		options Options
		want    string
	}{
		{Options{}, "not in a pod"},
		{Options{Server: "example.org"}, "not a URL"},
		{Options{Server: "ftp://example.org"}, "not a URL"},
		{Options{Server: "https://"}, "not a URL"},
		{Options{Server: "https://user@example.org"}, "not a URL"},
		{Options{Server: "http://example.org", TokenFile: "token"}, "as it is"},
		{Options{Server: "https://example.org", CertFile: "tls.crt"}, "needs both"},
		{Options{Kubeconfig: filepath.Join(dir, "none")}, "no such file"},
		{Options{Kubeconfig: writeFile(t, dir, "bad", []byte("a: [")), Server: "https://example.org"}, "kubeconfig"},
		{Options{Kubeconfig: writeFile(t, dir, "empty", nil)}, `no context ""`},
	} {
		if _, err := New(tt.options); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: error %v, want one that says %s", tt.options, err, tt.want)
		}
	}
}

// TestInCluster: in a pod nothing needs to be said.
func TestInCluster(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	t.Setenv("NODE_NAME", "n1")
	c, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	if c.node != "n1" || c.base != "https://[fd00::1]:443" || c.primary != FamilyIPv6 || c.auth.file != accountDir+"/token" {
		t.Errorf("server %s, family %d, token %s", c.base, c.primary, c.auth.file)
	}
}
