package kubernetes

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
)

// envBin names the binary that tests/kubernetes/server is built to.
const envBin = "PILLION_KUBE_BIN"

const (
	adminToken = "admin-token"
	limit      = 2 * time.Minute // for whatever is waited for
)

func TestMain(m *testing.M) {
	app.Main()
	if os.Getenv(envBin) == "" {
		fmt.Println("tests/kubernetes: skipped, since " + envBin + " is not set: make test-kubernetes builds an API server and runs them")
	}
	testutil.Main(m)
}

// cluster is an etcd and an API server.
type cluster struct {
	t         *testing.T
	ns        *testutil.NS // nil: the test's own
	host      string
	bin, dir  string
	etcd, url string // URLs
	port      string
	server    *process
	admin     *http.Client
}

// process is a running server.
type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
	done  chan error
}

// startCluster starts one on 127.0.0.1.
func startCluster(t *testing.T) *cluster {
	t.Helper()
	return startClusterIn(t, nil, "127.0.0.1")
}

// startClusterIn starts one in a namespace, at an address that this has.
func startClusterIn(t *testing.T, ns *testutil.NS, host string) *cluster {
	t.Helper()
	bin := os.Getenv(envBin)
	if bin == "" {
		t.Skip(envBin + " is not set: make test-kubernetes builds an API server and runs this")
	}
	c := &cluster{t: t, ns: ns, host: host, bin: bin, dir: t.TempDir()}
	ports := freePorts(t, 3)
	c.port, c.etcd = ports[0], "http://127.0.0.1:"+ports[1]
	c.url = "https://" + host + ":" + c.port
	c.admin = &http.Client{Transport: &http.Transport{DialContext: c.dial, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	c.writeCertificate("first")
	c.write("tokens.csv", []byte(adminToken+",admin,admin,system:masters\n"))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	c.write("sa.key", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
	etcd := c.start("etcd", "--data-dir", c.path("etcd"), "--client", c.etcd, "--peer", "http://127.0.0.1:"+ports[2])
	t.Cleanup(func() { etcd.kill() })
	c.startServer()
	t.Cleanup(func() { c.server.kill() })
	return c
}

// dial connects from the cluster's namespace.
func (c *cluster) dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	dial := func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	}
	if c.ns == nil {
		err = dial()
		return conn, err
	}
	err = c.ns.Run(dial)
	return conn, err
}

// freePorts returns ports that were free a moment ago, of which no two are the same.
func freePorts(t *testing.T, n int) (ports []string) {
	t.Helper()
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close() // when all are there
		_, port, err := net.SplitHostPort(ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, port)
	}
	return ports
}

func (c *cluster) path(name string) string { return filepath.Join(c.dir, name) }

// write replaces a file in one step, as the kubelet does.
func (c *cluster) write(name string, b []byte) {
	c.t.Helper()
	if err := os.WriteFile(c.path(name+".new"), b, 0o600); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Rename(c.path(name+".new"), c.path(name)); err != nil {
		c.t.Fatal(err)
	}
}

// writeCertificate makes a new CA and a certificate of the API server: ca.crt,
// tls.crt, tls.key.
func (c *cluster) writeCertificate(name string) {
	c.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.ParseIP(c.host)},
		KeyUsage:    x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		c.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		c.t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	c.write("tls.crt", cert)
	c.write("tls.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	c.write("next-ca.crt", cert)
	if _, err := os.Stat(c.path("ca.crt")); err != nil {
		c.write("ca.crt", cert)
	}
}

func (c *cluster) start(args ...string) *process {
	c.t.Helper()
	name := c.path(args[0] + ".log")
	log, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	p := &process{cmd: exec.Command(c.bin, args...), done: make(chan error, 1)}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if p.stdin, err = p.cmd.StdinPipe(); err != nil { // it ends when this does
		c.t.Fatal(err)
	}
	if err := (testutil.Place{NS: c.ns}).Start(p.cmd); err != nil {
		c.t.Fatal(err)
	}
	go p.wait()
	c.t.Cleanup(func() {
		if c.t.Failed() {
			b, _ := os.ReadFile(name)
			lines := strings.Split(string(b), "\n")
			c.t.Logf("the end of %s:\n%s", name, strings.Join(lines[max(0, len(lines)-15):], "\n"))
		}
	})
	return p
}

func (p *process) wait() {
	p.done <- p.cmd.Wait()
	close(p.done)
}

func (p *process) kill() {
	p.stdin.Close()
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// startServer starts the API server and waits until it is ready.
func (c *cluster) startServer() {
	c.t.Helper()
	c.server = c.start("kube-apiserver",
		"--etcd-servers="+c.etcd, "--bind-address="+c.host, "--secure-port="+c.port, "--advertise-address=192.0.2.1",
		"--cert-dir="+c.path("certs"), "--tls-cert-file="+c.path("tls.crt"), "--tls-private-key-file="+c.path("tls.key"),
		"--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+c.path("sa.key"), "--service-account-signing-key-file="+c.path("sa.key"),
		"--token-auth-file="+c.path("tokens.csv"), "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount")
	c.eventually("the API server is ready", func() bool {
		select {
		case err := <-c.server.done:
			c.t.Fatalf("the API server ended: %v", err)
		default:
		}
		_, code, err := c.ask(http.MethodGet, "/readyz", "")
		return err == nil && code == http.StatusOK
	})
}

// ask sends a request as the cluster's administrator. The body is YAML or JSON.
func (c *cluster) ask(method, path, body string) (string, int, error) {
	req, err := http.NewRequest(method, c.url+path, strings.NewReader(body))
	if err != nil {
		return "", 0, err
	}
	req.Header.Set("Authorization", "Bearer "+adminToken)
	req.Header.Set("Content-Type", "application/yaml")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := c.admin.Do(req)
	if err != nil {
		return "", 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), resp.StatusCode, err
}

// must is ask for what has to succeed.
func (c *cluster) must(method, path, body string) string {
	c.t.Helper()
	answer, code, err := c.ask(method, path, body)
	if err != nil || code/100 != 2 {
		c.t.Fatalf("%s %s: %v, %d %s", method, path, err, code, answer)
	}
	return answer
}

// eventually polls until ok.
func (c *cluster) eventually(what string, ok func() bool) {
	c.t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// apply creates what a YAML file describes.
func (c *cluster) apply(file string) {
	c.t.Helper()
	paths := map[string]string{
		"ServiceAccount":     "/api/v1/namespaces/default/serviceaccounts",
		"ClusterRole":        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
		"ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
	}
	for _, doc := range strings.Split(file, "\n---\n") {
		_, kind, _ := strings.Cut(doc, "kind: ")
		kind, _, _ = strings.Cut(kind, "\n")
		if paths[kind] == "" {
			c.t.Fatalf("no path for kind %q", kind)
		}
		c.must(http.MethodPost, paths[kind], doc)
	}
}

const (
	servicesPath = "/api/v1/namespaces/default/services"
	slicesPath   = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
)

// service creates a Service and returns its ClusterIPs.
func (c *cluster) service(name, spec string) []string {
	c.t.Helper()
	answer := c.must(http.MethodPost, servicesPath, fmt.Sprintf(`{"apiVersion":"v1","kind":"Service","metadata":{"name":%q},"spec":%s}`, name, spec))
	var s struct {
		Spec struct{ ClusterIPs []string }
	}
	if err := json.Unmarshal([]byte(answer), &s); err != nil {
		c.t.Fatal(err)
	}
	return s.Spec.ClusterIPs
}

// slice creates an EndpointSlice, or replaces it.
func (c *cluster) slice(name, service, family, ports string, endpoints ...string) {
	c.t.Helper()
	body := fmt.Sprintf(`{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{"name":%q,"labels":{"kubernetes.io/service-name":%q}},"addressType":%q,"ports":[%s],"endpoints":[%s]}`,
		name, service, family, ports, strings.Join(endpoints, ","))
	if _, code, _ := c.ask(http.MethodGet, slicesPath+"/"+name, ""); code == http.StatusOK {
		c.must(http.MethodPut, slicesPath+"/"+name, body)
		return
	}
	c.must(http.MethodPost, slicesPath, body)
}

func ep(addr string, more ...string) string {
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"addresses":[%q]`, addr)
	for _, m := range more {
		b.WriteString("," + m)
	}
	return b.String() + "}"
}

// newToken writes a new token of the service account.
func (c *cluster) newToken() {
	c.t.Helper()
	answer := c.must(http.MethodPost, "/api/v1/namespaces/default/serviceaccounts/app/token", `{"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","spec":{"expirationSeconds":3600}}`)
	var r struct {
		Status struct{ Token string }
	}
	if err := json.Unmarshal([]byte(answer), &r); err != nil {
		c.t.Fatal(err)
	}
	c.write("token", []byte(r.Status.Token))
}
