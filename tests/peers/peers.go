package peers

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// The names of the peers.
const (
	HAProxy = "haproxy"
	Nginx   = "nginx"
	Envoy   = "envoy"
)

// envoyVersion is the one that scripts/setup.sh installs, by this name.
const envoyVersion = "1.40.0"

// Route is an address that a proxy is to carry to an endpoint.
type Route struct{ Listen, Endpoint netip.AddrPort }

// Config is what a proxy is to do.
type Config struct {
	// Dir is where it may keep files. Its access log is in Dir/access.log,
	// but for HAProxy, which writes it to stdout.
	Dir     string
	Workers int
	// Connections is how many connections it must have room for.
	Connections int
	// Idle is how long a connection may be silent, half-closed or not.
	Idle time.Duration
	// Routes are what it listens on; for Envoy, which is redirected to,
	// destinations that have an endpoint of their own.
	Routes []Route
	// AccessLog has it write a line for each connection: the address that was
	// dialed, and the endpoint.
	AccessLog bool
}

// Command prepares a proxy, with its configuration written to c.Dir.
func Command(name string, c Config) (*exec.Cmd, error) {
	path, err := Find(name)
	if err != nil {
		return nil, err
	}
	var text string
	var args []string
	switch name {
	case HAProxy:
		text, args = c.haproxy(), []string{"-db", "-f"}
	case Nginx:
		text, args = c.nginx(), []string{"-p", c.Dir, "-e", "stderr", "-c"}
	case Envoy:
		text, args = c.envoy(), []string{"--concurrency", strconv.Itoa(c.Workers), "--log-level", "warning",
			"--file-flush-interval-msec", "50", "--disable-hot-restart", "-c"}
	default:
		return nil, fmt.Errorf("no peer %s", name)
	}
	file := filepath.Join(c.Dir, name+".conf")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	return exec.Command(path, append(args, file)...), nil
}

// Find looks for a program where setup.sh puts it, and where root's are.
func Find(name string) (string, error) {
	if name == Envoy {
		return findEnvoy()
	}
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	if err != nil {
		return "", fmt.Errorf("needs %s (scripts/setup.sh bench installs it)", name)
	}
	return path, nil
}

func findEnvoy() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	path := filepath.Join(cache, "pillion", "envoy-"+envoyVersion)
	if _, err := exec.LookPath(path); err != nil {
		return "", fmt.Errorf("needs %s (scripts/setup.sh traps installs it)", path)
	}
	return path, nil
}

// Version returns what a proxy says about itself.
func Version(name string) (string, error) {
	path, err := Find(name)
	if err != nil {
		return "", err
	}
	flag := "-v"
	if name == Envoy {
		flag = "--version"
	}
	out, err := exec.Command(path, flag).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, flag, err)
	}
	for _, word := range strings.FieldsFunc(string(out), func(r rune) bool { return strings.ContainsRune(" /\n", r) }) {
		if word[0] >= '0' && word[0] <= '9' && strings.Count(word, ".") >= 2 {
			return word, nil
		}
	}
	return "", fmt.Errorf("%s %s: no version in %q", name, flag, out)
}
