package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/peers"
)

// The arms, by name. The peers are what Debian has.
const (
	armDirect  = "direct"
	armRelay   = "relay"
	armMirror  = "mirror" // relay, with connect: mirror
	armHAProxy = peers.HAProxy
	armNginx   = peers.Nginx
)

// rivals are those that relay is held against.
var rivals = []string{armHAProxy, armNginx}

// workers is how many threads every proxy has.
const workers = 2

// arm is one way to the server.
type arm struct {
	name string
	// addr is what the client dials, from the cgroup.
	addr   netip.AddrPort
	cgroup *os.File
	// process is the proxy, nil for none.
	process *process
	// only is the one work that the arm does, or empty.
	only string
	// opened counts the connections of all clients.
	opened int
}

// arms starts the proxies and waits until they serve.
func (w *world) arms(ctx context.Context) ([]*arm, error) {
	direct := &arm{name: armDirect, addr: server, cgroup: w.beside}
	relay, err := w.startPillion(ctx)
	if err != nil {
		return nil, fmt.Errorf("start pillion: %w", err)
	}
	haproxy, err := w.startPeer(armHAProxy, haproxyAddr)
	if err != nil {
		return nil, err
	}
	nginx, err := w.startPeer(armNginx, nginxAddr)
	if err != nil {
		return nil, err
	}
	// The same process, and another service.
	mirror := &arm{name: armMirror, addr: mirrorAddr, cgroup: relay.cgroup, process: relay.process, only: workConnection}
	w.pill.mirror = mirror
	return []*arm{direct, relay, mirror, haproxy, nginx}, nil
}

// startPeer runs a proxy in front of the server.
func (w *world) startPeer(name string, listen netip.AddrPort) (*arm, error) {
	cmd, err := peers.Command(name, peers.Config{Dir: w.dir, Workers: workers, Connections: 4096, Idle: time.Minute,
		Routes: []peers.Route{{Listen: listen, Endpoint: server}}})
	if err != nil {
		return nil, err
	}
	p, err := w.start(cmd.Path, cmd.Args[1:]...)
	if err != nil {
		return nil, err
	}
	a := &arm{name: name, addr: listen, cgroup: w.beside, process: p}
	if err := answers(listen.String(), startLimit); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return a, nil
}

// pillion is the one under test.
type pillion struct {
	*arm
	mirror *arm
	client *admin.Client
}

const pillionConfig = `
services:
  - {address: "%s", endpoints: ["%s"]}
  - {address: "%s", endpoints: ["%s"], connect: mirror}
relay: {workers: %d}
# A connection that is not relayed must fail, not spoil the figures.
on_failure: closed
`

// startPillion runs pillion over the scope and waits until it serves.
func (w *world) startPillion(ctx context.Context) (*arm, error) {
	path, err := w.binary()
	if err != nil {
		return nil, err
	}
	config := filepath.Join(w.dir, "pillion.yaml")
	text := fmt.Sprintf(pillionConfig, serviceAddr, server, mirrorAddr, server, workers)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	name, runtime := fmt.Sprintf("bench-%d", os.Getpid()), filepath.Join(w.dir, "run")
	w.later(func() error { return unload(path, name, runtime) })
	ready, err := newReadiness(filepath.Join(w.dir, "notify.sock"))
	if err != nil {
		return nil, err
	}
	defer ready.close()
	p, err := w.start(path, "run", "--name", name, "--runtime-dir", runtime,
		"--cgroup", w.scope.Name(), "--config", config, "--drain-timeout", "1s")
	if err != nil {
		return nil, err
	}
	w.pill = &pillion{
		arm:    &arm{name: armRelay, addr: serviceAddr, cgroup: w.scope, process: p},
		client: admin.Dial(filepath.Join(runtime, name+".sock")),
	}
	return w.pill.arm, ready.wait(ctx, p)
}

// unload removes what a killed pillion leaves.
func unload(path, name, runtime string) error {
	out, err := exec.Command(path, "unload", name, "--runtime-dir", runtime).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 64 {
		return nil // it has left nothing
	}
	if err != nil {
		return fmt.Errorf("pillion unload: %w: %s", err, out)
	}
	return nil
}

// binary returns $PILLION, or builds it.
func (w *world) binary() (string, error) {
	if path := os.Getenv("PILLION"); path != "" {
		return path, nil
	}
	path := filepath.Join(w.dir, "pillion")
	cmd := exec.Command("go", "build", "-o", path, "github.com/pillion-project/pillion/cmd/pillion")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build pillion: %w\n%s", err, out)
	}
	return path, nil
}

// relayed fails unless every connection of the relay arm went by relay.
func (w *world) relayed(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, startLimit)
	defer stop()
	for {
		got, err := w.pill.count(ctx)
		if err != nil {
			return err
		}
		if got >= w.pill.opened+w.pill.mirror.opened {
			return nil
		}
		// Records come five times a second.
		if pause(ctx, 100*time.Millisecond) != nil {
			return fmt.Errorf("%d of the %d connections of arm %s and its like went by relay: the figures are not Pillion's",
				got, w.pill.opened+w.pill.mirror.opened, armRelay)
		}
	}
}

// count reads from the metrics how many connections went by relay.
func (p *pillion) count(ctx context.Context) (int, error) {
	body, err := p.client.Metrics(ctx)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	sum := 0
	for lines := bufio.NewScanner(body); lines.Scan(); {
		series, value, _ := strings.Cut(lines.Text(), "} ")
		if !strings.HasPrefix(series, "pillion_connections_total{") || !strings.Contains(series, `path="relay"`) {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, fmt.Errorf("read metrics: %w", err)
		}
		sum += int(n)
	}
	return sum, nil
}
