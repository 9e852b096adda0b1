package kube

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/goccy/go-yaml"
)

// accountDir is where a pod finds its service account.
const accountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// credentials prove who the server is, and who we are. A file goes before the
// same thing as a value.
type credentials struct {
	token, serverName         string
	ca, cert, key             []byte
	caFile, certFile, keyFile string
	insecure                  bool
	used                      atomic.Value // the client certificate that was read last, a string
}

// kubeconfig is what is read of a file in kubectl's format.
type kubeconfig struct {
	Current  string `yaml:"current-context"`
	Contexts []struct {
		Name    string `yaml:"name"`
		Context struct {
			Cluster   string `yaml:"cluster"`
			User      string `yaml:"user"`
			Namespace string `yaml:"namespace"`
		} `yaml:"context"`
	} `yaml:"contexts"`
	Clusters []struct {
		Name    string  `yaml:"name"`
		Cluster cluster `yaml:"cluster"`
	} `yaml:"clusters"`
	Users []struct {
		Name string `yaml:"name"`
		User user   `yaml:"user"`
	} `yaml:"users"`
}

type cluster struct {
	Server     string `yaml:"server"`
	CAFile     string `yaml:"certificate-authority"`
	CA         string `yaml:"certificate-authority-data"`
	ServerName string `yaml:"tls-server-name"`
	Insecure   bool   `yaml:"insecure-skip-tls-verify"`
	Proxy      string `yaml:"proxy-url"`
}

type user struct {
	Token     string `yaml:"token"`
	TokenFile string `yaml:"tokenFile"`
	CertFile  string `yaml:"client-certificate"`
	Cert      string `yaml:"client-certificate-data"`
	KeyFile   string `yaml:"client-key"`
	Key       string `yaml:"client-key-data"`
	Username  string `yaml:"username"`
	Exec      any    `yaml:"exec"`
	Provider  any    `yaml:"auth-provider"`
}

// resolve fills in what the options leave open, and collects the credentials.
func resolve(o Options) (Options, *credentials, error) {
	creds := &credentials{}
	switch {
	case o.Kubeconfig != "":
		k, err := readKubeconfig(o.Kubeconfig)
		if err == nil {
			err = k.apply(&o, creds)
		}
		if err != nil {
			return o, creds, fmt.Errorf("kubeconfig %s: %w", o.Kubeconfig, err)
		}
	case o.Server == "":
		host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
		if host == "" || port == "" {
			return o, creds, errors.New("no API server: not in a pod (KUBERNETES_SERVICE_HOST and _PORT are not set), and neither server nor kubeconfig is given")
		}
		o.Server, o.ownHost = "https://"+net.JoinHostPort(host, port), host
		o.TokenFile = or(o.TokenFile, accountDir+"/token")
		o.CAFile = or(o.CAFile, accountDir+"/ca.crt")
		if b, err := os.ReadFile(accountDir + "/namespace"); err == nil {
			o.Namespace = or(o.Namespace, strings.TrimSpace(string(b)))
		}
	default:
	}
	o.pingAfter, o.pingTimeout = cmp.Or(o.pingAfter, pingAfter), cmp.Or(o.pingTimeout, pingTimeout)
	o.Node = or(o.Node, os.Getenv("NODE_NAME"))
	o.Namespace = or(o.Namespace, "default")
	o.ClusterDomain = or(o.ClusterDomain, "cluster.local")
	creds.caFile, creds.certFile, creds.keyFile = o.CAFile, o.CertFile, o.KeyFile

	u, err := url.Parse(o.Server)
	switch {
	case err != nil:
		return o, creds, fmt.Errorf("server: %w", err)
	case u.Scheme != "https" && u.Scheme != "http", u.Host == "", u.User != nil, u.RawQuery != "":
		return o, creds, fmt.Errorf("server %q: not a URL like https://host:port", o.Server)
	case u.Scheme == "http" && (o.TokenFile != "" || creds.token != ""):
		return o, creds, fmt.Errorf("server %q: a token would go over the network as it is", o.Server)
	case (o.CertFile == "") != (o.KeyFile == ""):
		return o, creds, errors.New("a client certificate needs both the certificate's file and the key's")
	default:
		return o, creds, nil
	}
}

func or(value, otherwise string) string {
	if value != "" {
		return value
	}
	return otherwise
}

func readKubeconfig(name string) (*kubeconfig, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err // it names the file
	}
	var k kubeconfig
	if err := yaml.Unmarshal(b, &k); err != nil {
		return nil, err
	}
	return &k, nil
}

// apply fills in what o leaves open. Relative paths are relative to the file.
func (k *kubeconfig) apply(o *Options, creds *credentials) error {
	for _, c := range k.Contexts {
		if c.Name != k.Current {
			continue
		}
		o.Namespace = or(o.Namespace, c.Context.Namespace)
		cl, err := k.cluster(c.Context.Cluster)
		if err != nil {
			return err
		}
		u, err := k.user(c.Context.User)
		if err != nil {
			return err
		}
		return errors.Join(cl.apply(o, creds), u.apply(o, creds))
	}
	return fmt.Errorf("no context %q", k.Current)
}

func (k *kubeconfig) cluster(name string) (cluster, error) {
	for _, c := range k.Clusters {
		if c.Name == name {
			return c.Cluster, nil
		}
	}
	return cluster{}, fmt.Errorf("no cluster %q", name)
}

func (k *kubeconfig) user(name string) (user, error) {
	for _, u := range k.Users {
		if u.Name == name {
			return u.User, nil
		}
	}
	return user{}, fmt.Errorf("no user %q", name)
}

func (c cluster) apply(o *Options, creds *credentials) error {
	if c.Proxy != "" {
		return errors.New("proxy-url is not supported")
	}
	o.Server = or(o.Server, c.Server)
	o.CAFile = or(o.CAFile, beside(o.Kubeconfig, c.CAFile))
	creds.serverName, creds.insecure = c.ServerName, c.Insecure
	return decode(c.CA, &creds.ca, "certificate-authority-data")
}

func (u user) apply(o *Options, creds *credentials) error {
	if u.Exec != nil || u.Provider != nil || u.Username != "" {
		return errors.New("the user's credentials are a command, a provider or a password: only tokens and certificates are supported")
	}
	// One without the other would mix two users.
	if o.CertFile == "" && o.KeyFile == "" {
		o.CertFile, o.KeyFile = beside(o.Kubeconfig, u.CertFile), beside(o.Kubeconfig, u.KeyFile)
	}
	o.TokenFile = or(o.TokenFile, beside(o.Kubeconfig, u.TokenFile))
	creds.token = u.Token
	return errors.Join(decode(u.Cert, &creds.cert, "client-certificate-data"), decode(u.Key, &creds.key, "client-key-data"))
}

func beside(file, name string) string {
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(file), name)
}

func decode(text string, to *[]byte, what string) error {
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	*to = b
	return nil
}
