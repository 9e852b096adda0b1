package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/inject"
	"github.com/pillion-project/pillion/tests/testutil"
)

// selfSigned writes a certificate and its key.
func selfSigned(t *testing.T) (cert, key string) {
	t.Helper()
	secret, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &secret.PublicKey, secret)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, b []byte) string {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	return write("cert", "CERTIFICATE", der), write("key", "PRIVATE KEY", pkcs8)
}

// TestWebhookBounded has many connect to the webhook and say nothing. It answers all the
// same, and few of them are left.
func TestWebhookBounded(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &webhookFlags{listen: free.Addr().String()}
	free.Close()
	f.cert, f.key = selfSigned(t)
	f.Image, f.form, f.ConfigMap, f.Version = "pillion", string(inject.Sidecar), "pillion", "test"
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serveWebhook(ctx, &global{logFormat: "text", logLevel: "error"}, f) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	answers := func() bool {
		resp, err := client.Get("https://" + f.listen + "/ready")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	}
	testutil.Eventually(t, 20*time.Second, answers, "it answers")
	const more = 50
	var all []net.Conn
	for range reviewersMost + more {
		c, err := net.Dial("tcp", f.listen)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		all = append(all, c)
	}
	if !answers() {
		t.Error("it does not answer")
	}
	for n, c := range all[:more] {
		c.SetReadDeadline(time.Now().Add(time.Second))
		var timeout net.Error
		if _, err := c.Read(make([]byte, 1)); errors.As(err, &timeout) && timeout.Timeout() {
			t.Fatalf("connection %d is left", n)
		}
	}
}
