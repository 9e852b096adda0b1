package webhook

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/cmd/pillion/inject"
)

var quiet = slog.New(slog.DiscardHandler)

func options() Options {
	return Options{Log: quiet, Inject: inject.Options{Image: "pillion:1", Version: "1", Form: inject.Sidecar, ConfigMap: "pillion"}}
}

// ask sends a review of an object, and returns the answer.
func ask(t *testing.T, o Options, operation, object string) response {
	t.Helper()
	s := httptest.NewServer(Handler(o))
	defer s.Close()
	body := `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u-1","operation":"` + operation +
		`","kind":{"kind":"Pod"},"namespace":"default","object":` + object + `}}`
	r, err := s.Client().Post(s.URL+Path, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var out review
	if err := json.NewDecoder(r.Body).Decode(&out); err != nil {
		t.Fatal(err)
	}
	if r.StatusCode != http.StatusOK || out.APIVersion != reviewVersion || out.Kind != reviewKind || out.Response == nil {
		t.Fatalf("%s: %+v", r.Status, out)
	}
	if out.Response.UID != "u-1" {
		t.Errorf("the answer is to %q", out.Response.UID)
	}
	return *out.Response
}

// patched applies a patch as RFC 6902 says.
func patched(t *testing.T, object string, patch []byte) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(object), &v); err != nil {
		t.Fatal(err)
	}
	var ops []struct {
		Op, Path string
		Value    any
	}
	if err := json.Unmarshal(patch, &ops); err != nil {
		t.Fatal(err)
	}
	for _, op := range ops {
		keys := strings.Split(op.Path, "/")[1:]
		for i := range keys {
			keys[i] = strings.NewReplacer("~1", "/", "~0", "~").Replace(keys[i])
		}
		v = patchAt(t, v, op.Op, keys, op.Value)
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func patchAt(t *testing.T, v any, op string, keys []string, value any) any {
	t.Helper()
	last := len(keys) == 1
	switch w := v.(type) {
	case map[string]any:
		_, there := w[keys[0]]
		switch {
		case !there && !(last && op == "add"):
			t.Fatalf("%s of %v: not there", op, keys)
		case !last:
			w[keys[0]] = patchAt(t, w[keys[0]], op, keys[1:], value)
		case op == "remove":
			delete(w, keys[0])
		default:
			w[keys[0]] = value
		}
		return w
	case []any:
		i, err := strconv.Atoi(keys[0])
		if err != nil || i > len(w) || i == len(w) && !(last && op == "add") {
			t.Fatalf("%s of %v in a list of %d", op, keys, len(w))
		}
		switch {
		case !last:
			w[i] = patchAt(t, w[i], op, keys[1:], value)
		case op == "replace":
			w[i] = value
		case op == "remove":
			return append(append([]any{}, w[:i]...), w[i+1:]...)
		default:
			return append(append(append([]any{}, w[:i]...), value), w[i:]...)
		}
		return w
	}
	t.Fatalf("%s of %v in %T", op, keys, v)
	return nil
}

const (
	pod    = `{"apiVersion":"v1","kind":"Pod","metadata":{"generateName":"a-"},"spec":{"containers":[{"name":"a"}],"volumes":[{"name":"token"}]}}`
	onHost = `{"apiVersion":"v1","kind":"Pod","metadata":{},"spec":{"hostNetwork":true,"containers":[{"name":"a"}]}}`
)

// TestPatch wants the patch to make what inject makes of the manifest, from
// whatever version was there before.
func TestPatch(t *testing.T) {
	o := options()
	older := o.Inject
	older.Image, older.Version, older.Form = "pillion:0", "0", inject.Container
	before, _, err := older.Manifest([]byte(pod))
	if err != nil {
		t.Fatal(err)
	}
	for name, object := range map[string]string{"new": pod, "older": string(before)} {
		t.Run(name, func(t *testing.T) {
			a := ask(t, o, "CREATE", object)
			if !a.Allowed || a.PatchType != "JSONPatch" {
				t.Fatalf("%+v", a)
			}
			got := patched(t, object, a.Patch)
			text, _, err := o.Inject.Manifest([]byte(object))
			if err != nil {
				t.Fatal(err)
			}
			var want bytes.Buffer
			if err := json.Compact(&want, text); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want.String(), got); d != "" {
				t.Errorf("-inject +webhook:\n%s", d)
			}
			if again := ask(t, o, "CREATE", got); !again.Allowed || again.Patch != nil {
				t.Errorf("asked again: %+v", again)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	o := options()
	a := ask(t, o, "CREATE", onHost)
	if a.Allowed || a.Status == nil || !strings.Contains(a.Status.Message, "hostNetwork") || a.Patch != nil {
		t.Errorf("a pod on the node's network: %+v", a)
	}
	o.Admit = true
	a = ask(t, o, "CREATE", onHost)
	if !a.Allowed || len(a.Warnings) != 1 || a.Patch != nil {
		t.Errorf("the same, when it is to be admitted: %+v", a)
	}
}

func TestAlone(t *testing.T) {
	for _, tt := range []struct{ operation, object string }{
		{"DELETE", "null"}, {"CONNECT", pod}, {"CREATE", `{"apiVersion":"v1","kind":"Service"}`},
	} {
		if a := ask(t, options(), tt.operation, tt.object); !a.Allowed || a.Patch != nil {
			t.Errorf("%s of %s: %+v", tt.operation, tt.object, a)
		}
	}
}

func TestNoReview(t *testing.T) {
	s := httptest.NewServer(Handler(options()))
	defer s.Close()
	for body, want := range map[string]int{
		"":               http.StatusBadRequest,
		"[]":             http.StatusBadRequest,
		`{"kind":"Pod"}`: http.StatusBadRequest,
		`{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview","request":{}}`: http.StatusBadRequest,
		strings.Repeat(" ", bodyMax+1): http.StatusRequestEntityTooLarge,
	} {
		r, err := s.Client().Post(s.URL+Path, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
		if r.StatusCode != want {
			t.Errorf("%.40q is answered %s, want %d", body, r.Status, want)
		}
	}
}

// TestLong has a client send a long body and stop in the middle: others are answered
// meanwhile, and another long one is refused rather than kept in memory.
func TestLong(t *testing.T) {
	own := newServer(options())
	own.patience = 10 * time.Millisecond
	s := httptest.NewServer(own.handler())
	defer s.Close()
	head, tail := `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u-1","operation":"CREATE","object":`+pod, "}}"
	post := func(body io.Reader) int {
		t.Helper()
		r, err := s.Client().Post(s.URL+Path, "application/json", body)
		if err != nil {
			t.Error(err)
			return 0
		}
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
		return r.StatusCode
	}
	long := head + strings.Repeat(" ", smallMax)
	r, w := io.Pipe()
	slow := make(chan int, 1)
	go func() { slow <- post(r) }()
	if _, err := io.WriteString(w, long); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); len(own.long) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody reads it")
		}
	}
	if got := post(strings.NewReader(head + tail)); got != http.StatusOK {
		t.Errorf("a short one meanwhile: %d", got)
	}
	if got := post(strings.NewReader(long + tail)); got != http.StatusServiceUnavailable {
		t.Errorf("a long one meanwhile: %d, want %d", got, http.StatusServiceUnavailable)
	}
	if _, err := io.WriteString(w, tail); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if got := <-slow; got != http.StatusOK {
		t.Errorf("the long one, when it is complete: %d", got)
	}
	own.patience = time.Minute
	if got := post(strings.NewReader(long + tail)); got != http.StatusOK {
		t.Errorf("a long one after that: %d", got)
	}
}

// makePair writes a certificate with a serial number, and its key.
func makePair(t *testing.T, dir string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(serial), DNSNames: []string{"pillion"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "tls.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	write(t, filepath.Join(dir, "tls.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}))
}

func write(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// swap makes the link dir/..data lead to another directory in one step, as the
// kubelet does with a Secret.
func swap(t *testing.T, dir, to string) {
	t.Helper()
	if err := os.Symlink(to, filepath.Join(dir, "next")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "next"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
}

func TestServe(t *testing.T) {
	dir := t.TempDir()
	for n, name := range []string{"one", "two"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		makePair(t, filepath.Join(dir, name), int64(n+1))
	}
	swap(t, dir, "one")
	data := filepath.Join(dir, "..data")
	c, err := LoadCertificate(filepath.Join(data, "tls.crt"), filepath.Join(data, "tls.key"), quiet)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, ln, options(), c) }()
	serial := func() int64 {
		t.Helper()
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
		r, err := client.Get("https://" + ln.Addr().String() + "/ready")
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		return r.TLS.PeerCertificates[0].SerialNumber.Int64()
	}
	if got := serial(); got != 1 {
		t.Errorf("certificate %d, want 1", got)
	}
	swap(t, dir, "two")
	if got := serial(); got != 2 {
		t.Errorf("certificate %d after both files were replaced, want 2", got)
	}
	// A key of another certificate, as in the middle of a copy; then none at all.
	key, err := os.ReadFile(filepath.Join(dir, "one", "tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "two", "tls.key"), append(key, '\n'))
	if got := serial(); got != 2 {
		t.Errorf("certificate %d while the key does not belong to it, want 2", got)
	}
	if err := os.Remove(filepath.Join(dir, "two", "tls.key")); err != nil {
		t.Fatal(err)
	}
	if got := serial(); got != 2 {
		t.Errorf("certificate %d while there is no key, want 2", got)
	}
	makePair(t, filepath.Join(dir, "two"), 3)
	if got := serial(); got != 3 {
		t.Errorf("certificate %d, want 3", got)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("it ended: %v", err)
	}
	if _, err := LoadCertificate(filepath.Join(dir, "none"), filepath.Join(dir, "none"), quiet); err == nil {
		t.Error("a certificate that is not there: no error")
	}
}
