package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// ServiceRange is where services have their addresses.
const ServiceRange = "10.201.0.0/16"

const (
	token  = "admin-token"
	server = "https://" + Address + ":6443"
)

// Cluster starts all the rest of one around the node, and waits until the node is
// ready. Its administrator's kubectl is in PATH of what [Node.Run] runs.
func (n *Node) Cluster() {
	n.t.Helper()
	n.credentials()
	config := n.Write(n.t, "kubeconfig", fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: u, user: {token: %s}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, server, n.Path("ca.crt"), token))
	n.Write(n.t, "bin/kubectl", fmt.Sprintf("#!/bin/sh\nKUBECONFIG=%s exec %s kubectl \"$@\"\n", config, n.bin))
	if err := os.Chmod(n.Path("bin/kubectl"), 0o755); err != nil {
		n.t.Fatal(err)
	}
	for name, target := range map[string]string{"deploy": "../../deploy", "bin/pillion": os.Getenv("PILLION")} {
		target, err := filepath.Abs(target)
		if err == nil {
			err = os.Symlink(target, n.Path(name))
		}
		if err != nil {
			n.t.Fatal(err)
		}
	}
	const etcd = "http://127.0.0.1:2379"
	n.Start("etcd", "--data-dir", n.Path("etcd"), "--client", etcd, "--peer", "http://127.0.0.1:2380")
	api := n.Start("kube-apiserver", "--etcd-servers="+etcd, "--cert-dir="+n.Path("apiserver"), "--secure-port=6443",
		"--bind-address=0.0.0.0", "--advertise-address="+Address, "--service-cluster-ip-range="+ServiceRange,
		"--tls-cert-file="+n.Path("ca.crt"), "--tls-private-key-file="+n.Path("ca.key"),
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+n.Path("sa.key"),
		"--service-account-signing-key-file="+n.Path("sa.key"), "--token-auth-file="+n.Path("tokens.csv"),
		"--authorization-mode=RBAC", "--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP")
	n.Eventually(n.t, "the API server is ready", func() bool {
		if ended, err := api.Ended(); ended {
			n.t.Fatalf("the API server ended: %v", err)
		}
		out, err := n.Run("kubectl get --raw /readyz")
		return err == nil && out == "ok"
	})
	n.Start("kube-controller-manager", "--kubeconfig="+config, "--service-account-private-key-file="+n.Path("sa.key"),
		"--root-ca-file="+n.Path("ca.crt"), "--leader-elect=false", "--cert-dir="+n.Path("controllers"),
		"--use-service-account-credentials=true", "--authentication-skip-lookup")
	n.Start("kube-scheduler", "--kubeconfig="+config, "--leader-elect=false", "--cert-dir="+n.Path("scheduler"), "--authentication-skip-lookup")
	n.Start("kube-proxy", "--master="+server, "--kubeconfig="+config, "--hostname-override="+Name, "--cluster-cidr="+PodRange,
		"--proxy-mode=nftables", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")
	n.Kubelet(config)
	n.Eventually(n.t, "the node is ready", func() bool {
		out, err := n.Run(`kubectl get node ` + Name + ` -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}'`)
		return err == nil && out == "True"
	})
}

// credentials are the API server's certificate, which is its own CA, the key of
// service accounts, and the administrator's token.
func (n *Node) credentials() {
	n.t.Helper()
	for _, name := range []string{"ca", "sa"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			n.t.Fatal(err)
		}
		der, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			n.t.Fatal(err)
		}
		n.Write(n.t, name+".key", string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})))
		if name == "sa" {
			break
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, DNSNames: []string{"kubernetes.default.svc"},
			IPAddresses: []net.IP{net.ParseIP(Address), net.ParseIP("10.201.0.1"), net.ParseIP("127.0.0.1")},
			KeyUsage:    x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		if der, err = x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key); err != nil {
			n.t.Fatal(err)
		}
		n.Write(n.t, name+".crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	}
	n.Write(n.t, "tokens.csv", token+",admin,admin,system:masters\n")
}

// Run runs a command of the shell's in the node's directory, where deploy is this
// tree's, with kubectl and pillion in PATH. It returns all that it says.
func (n *Node) Run(command string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", command)
	cmd.Dir = n.Dir
	cmd.Env = append(os.Environ(), "PATH="+n.Path("bin")+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Say is Run for what has to succeed; command and output are shown.
func (n *Node) Say(t testing.TB, command string) string {
	t.Helper()
	out, err := n.Run(command)
	if err != nil {
		t.Fatalf("$ %s\n%s%v", command, out, err)
	}
	t.Logf("$ %s\n%s", command, strings.TrimSpace(out))
	return out
}
