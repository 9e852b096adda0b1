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
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
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
	// addrs is what the client dials in turn, from the cgroup and the network
	// namespace, nil for the bench's own.
	addrs  []netip.AddrPort
	cgroup *os.File
	netns  *os.File
	// process is the proxy, nil for none.
	process *process
	// programs are those that the work workHook times.
	programs programs
	// only are the works that the arm does; none: all.
	only []string
	// opened counts the connections of all clients.
	opened int
}

// arms starts the proxies and waits until they serve.
func (w *world) arms(ctx context.Context) ([]*arm, error) {
	direct := &arm{name: armDirect, addrs: []netip.AddrPort{server}, cgroup: w.beside}
	relay, err := w.startRelay(ctx)
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
	mirror := &arm{name: armMirror, addrs: []netip.AddrPort{mirrorAddr}, cgroup: relay.cgroup, process: relay.process, only: []string{workConnection}}
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
	a := &arm{name: name, addrs: []netip.AddrPort{listen}, cgroup: w.beside, process: p}
	if err := answers(listen.String(), startLimit); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return a, nil
}

// pillion is the one under test.
type pillion struct {
	*arm
	mirror *arm
	instance
}

// instance is a running pillion.
type instance struct {
	name    string
	process *process
	client  *admin.Client
}

const pillionConfig = `
services:
  - {address: "%s", endpoints: ["%s"]}
  - {address: "%s", endpoints: ["%s"], connect: mirror}
relay: {workers: %d}
# A connection that is not relayed must fail, not spoil the figures.
on_failure: closed
`

// startRelay runs the pillion that relays.
func (w *world) startRelay(ctx context.Context) (*arm, error) {
	i, err := w.startPillion(ctx, nil, w.scope, "", fmt.Sprintf(pillionConfig, serviceAddr, server, mirrorAddr, server, workers))
	if err != nil {
		return nil, err
	}
	w.pill = &pillion{
		arm:      &arm{name: armRelay, addrs: []netip.AddrPort{serviceAddr}, cgroup: w.scope, process: i.process},
		instance: i,
	}
	return w.pill.arm, nil
}

// startPillion runs pillion over a scope in a network namespace, nil for the
// bench's own, and waits until it serves. suffix tells it from others.
func (w *world) startPillion(ctx context.Context, ns, scope *os.File, suffix, config string) (instance, error) {
	path, err := w.binary()
	if err != nil {
		return instance{}, err
	}
	file := filepath.Join(w.dir, "pillion"+suffix+".yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return instance{}, err
	}
	i := instance{name: fmt.Sprintf("bench-%d%s", os.Getpid(), suffix)}
	runtime := filepath.Join(w.dir, "run")
	w.later(func() error { return unload(path, i.name, runtime) })
	ready, err := newReadiness(filepath.Join(w.dir, "notify"+suffix+".sock"))
	if err != nil {
		return i, err
	}
	defer ready.close()
	err = within(ns, func() (err error) {
		i.process, err = w.start(path, "run", "--name", i.name, "--runtime-dir", runtime,
			"--cgroup", scope.Name(), "--config", file, "--drain-timeout", "1s")
		return err
	})
	if err != nil {
		return i, err
	}
	i.client = admin.Dial(filepath.Join(runtime, i.name+".sock"))
	return i, ready.wait(ctx, i.process)
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
	return w.pill.carried(ctx, flow.PathRelay, w.pill.opened+w.pill.mirror.opened)
}

// carried fails unless at least n connections went by a path.
func (i *instance) carried(ctx context.Context, path flow.Path, n int) error {
	ctx, stop := context.WithTimeout(ctx, startLimit)
	defer stop()
	for {
		got, err := i.count(ctx, path)
		if err != nil {
			return err
		}
		if got >= n {
			return nil
		}
		// Records come five times a second.
		if pause(ctx, 100*time.Millisecond) != nil {
			return fmt.Errorf("%d of the %d connections that were to go by %s did: the figures are not Pillion's", got, n, path)
		}
	}
}

// count reads from the metrics how many connections went by a path.
func (i *instance) count(ctx context.Context, path flow.Path) (int, error) {
	body, err := i.client.Metrics(ctx)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	sum := 0
	for lines := bufio.NewScanner(body); lines.Scan(); {
		series, value, _ := strings.Cut(lines.Text(), "} ")
		if !strings.HasPrefix(series, "pillion_connections_total{") || !strings.Contains(series, fmt.Sprintf("path=%q", path)) {
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

// does tells whether the arm does a work.
func (a *arm) does(w work) bool { return len(a.only) == 0 || slices.Contains(a.only, w.Name) }
