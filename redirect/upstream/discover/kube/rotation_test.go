package kube

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// authority makes certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return a
}

// issue returns a certificate of its for 127.0.0.1, and its key.
func (a *authority) issue(t *testing.T) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "leaf"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &k.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// startKubeTLS is startKube with settings of TLS.
func startKubeTLS(t *testing.T, config *tls.Config) *kube {
	t.Helper()
	k := newKube(t)
	k.Server = httptest.NewUnstartedServer(k)
	k.Config.ErrorLog = log.New(io.Discard, "", 0)
	k.EnableHTTP2 = true
	k.TLS = config
	k.StartTLS()
	t.Cleanup(func() {
		k.CloseClientConnections()
		k.Server.Close()
	})
	return k
}

// TestTokenRotation: a token that is refused is read again before anybody
// hears of it, and one that stays refused is an error that leaves the set.
func TestTokenRotation(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	var file string
	c := k.client(t, func(o *Options) { file = o.TokenFile })
	h := listen(t, c.Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.1")
	setToken := func(inFile, atServer string) {
		t.Helper()
		if inFile != "" {
			// As the kubelet does it: the file is another one.
			next := writeFile(t, filepath.Dir(file), "next", []byte(inFile))
			if err := os.Rename(next, file); err != nil {
				t.Fatal(err)
			}
		}
		k.mu.Lock()
		k.token = atServer
		k.mu.Unlock()
	}
	setToken("second", "second")
	k.webSlice("10.0.0.2")
	k.CloseClientConnections()
	h.waitFor("10.0.0.2")
	h.mu.Lock()
	for _, s := range h.all { // that young watches broke is there too
		if isStatus(s.Err, http.StatusUnauthorized) {
			t.Errorf("the new token was not tried: %v", s.Err)
		}
	}
	h.mu.Unlock()
	setToken("", "third")
	k.CloseClientConnections()
	h.waitErr("401: Unauthorized")
	setToken("third", "third")
	h.waitFor("10.0.0.2")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	c.auth.mu.Lock()
	c.auth.read = time.Time{}
	c.auth.mu.Unlock()
	k.CloseClientConnections()
	h.waitErr("read token")
}

// TestCARotation: a new CA is believed once it is in the file, and not before.
func TestCARotation(t *testing.T) {
	first, second := newAuthority(t, "first"), newAuthority(t, "second")
	current := make(chan tls.Certificate, 1)
	use := func(a *authority) {
		cert, key := a.issue(t)
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-current:
		default:
		}
		current <- pair
	}
	use(first)
	k := startKubeTLS(t, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		pair := <-current
		current <- pair
		return &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}}, nil
	}})
	k.web("10.0.0.1")
	dir := t.TempDir()
	file := writeFile(t, dir, "ca.crt", first.pem)
	h := listen(t, k.client(t, func(o *Options) { o.CAFile = file }).Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.1")
	use(second)
	k.webSlice("10.0.0.2")
	k.CloseClientConnections()
	h.waitErr("certificate signed by unknown authority")
	for _, bad := range []string{"", "no certificate"} {
		writeFile(t, dir, "ca.crt", []byte(bad))
		if bad != "" {
			h.waitErr("read CA: no certificate in it")
		}
	}
	writeFile(t, dir, "ca.crt", append(first.pem, second.pem...))
	h.waitFor("10.0.0.2")
	if _, empty := h.counts(); empty > 0 {
		t.Errorf("%d empty sets", empty)
	}
}

// TestCertificateRotation: a certificate that is refused on a connection is read again,
// before anybody hears of it.
func TestCertificateRotation(t *testing.T) {
	server, clients := newAuthority(t, "server"), newAuthority(t, "clients")
	cert, key := server.issue(t)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	k := startKubeTLS(t, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert})
	dir := t.TempDir()
	ca := writeFile(t, dir, "ca.crt", server.pem)
	renew := func() {
		t.Helper()
		cert, key := clients.issue(t)
		writeFile(t, dir, "client.key", key)
		writeFile(t, dir, "client.crt", cert)
		block, _ := pem.Decode(cert)
		k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
			if bytes.Equal(r.TLS.PeerCertificates[0].Raw, block.Bytes) {
				return false
			}
			status(w, http.StatusUnauthorized, "expired")
			return true
		})
	}
	renew()
	c := k.client(t, func(o *Options) {
		o.CAFile, o.CertFile, o.KeyFile = ca, filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
	})
	k.web("10.0.0.1")
	for n := range 3 {
		h := listen(t, c.Source(Ref{Name: "web", Namespace: "default", Port: "80"}))
		h.waitFor("10.0.0.1")
		renew()
		// Another one's requests go over the connection of the first.
		name := fmt.Sprint("other", n)
		k.put("services", "default", name, "", webSpec)
		k.put("endpointslices", "default", name+"-1", name, sliceOf("IPv4", httpPort, ep("10.0.0.2")))
		other := listen(t, c.Source(Ref{Name: name, Port: "80"}))
		other.waitFor("10.0.0.2")
		for _, h := range []*heard{h, other} {
			h.mu.Lock()
			for _, s := range h.all {
				if isStatus(s.Err, http.StatusUnauthorized) {
					t.Errorf("the new one was not tried: %v", s.Err)
				}
			}
			h.mu.Unlock()
		}
	}
	// One that stays refused is not tried on connection after connection.
	k.setIntercept(func(w http.ResponseWriter, _ *http.Request) bool {
		status(w, http.StatusUnauthorized, "never")
		return true
	})
	const path = "/never"
	for range 10 {
		if _, err := c.get(t.Context(), path, nil); !isStatus(err, http.StatusUnauthorized) {
			t.Fatal(err)
		}
	}
	over := map[string]bool{}
	n := k.count(func(r *http.Request) bool {
		over[r.RemoteAddr] = over[r.RemoteAddr] || r.URL.Path == path
		return r.URL.Path == path
	})
	maps.DeleteFunc(over, func(_ string, is bool) bool { return !is })
	if n > 24 || len(over) > 2 {
		t.Errorf("%d requests over %d connections, want two for each: the token is read again", n, len(over))
	}
}
