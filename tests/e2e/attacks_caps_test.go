package e2e

import (
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// What the README says that Pillion needs. Who takes over the handler has no
// more than this.
var needed = testutil.Place{}.With(unix.CAP_BPF, unix.CAP_NET_ADMIN)

// TestAttackCapabilities runs Pillion with every other capability gone, through
// all that it does.
func TestAttackCapabilities(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	r.Home = needed
	s := newPreyIn(t, r, "existing: report")
	s.relayed(t, 3)
	status, err := exec.Command("grep", "CapEff", fmt.Sprintf("/proc/%d/status", s.i.Cmd.Process.Pid)).Output()
	if err != nil {
		t.Fatal(err)
	}
	mask := strconv.FormatUint(1<<unix.CAP_BPF|1<<unix.CAP_NET_ADMIN, 16)
	if !strings.HasSuffix(strings.TrimSpace(string(status)), mask) {
		t.Errorf("it has %s, want %s", status, mask)
	}
	// What the upstream leg takes over needs a right of its own.
	s.Serve(t, netip.AddrPortFrom(rig.Far4, 80), named("low"))
	before := arrived(t, s.i)
	for _, opts := range []string{"(SOL_SOCKET, SO_MARK, 7)", "(SOL_SOCKET, SO_PRIORITY, 9)", "(IPPROTO_IP, IP_TOS, 184)"} {
		s.app.wants("low", "dial(%q, 80, SOCK_STREAM, [%s])", rig.Far4, opts)
	}
	s.app.wants("low", "dial(%q, 80, SOCK_STREAM, [], (%q, 0))", rig.Far4, testutil.AppV4.Addr())
	s.undisturbed(t, before+4)
	// Taken over by another process, with the links that stand.
	s.i.Kill(t)
	s.i.Launch(t)
	s.app.wants("low", "dial(%q, 80)", rig.Far4)
	s.i.Conserved(t)
	if strings.Contains(s.i.Log(), "ermitted") {
		t.Errorf("it was not permitted something:\n%s", s.i.Log())
	}
	// Nothing is left: the rig sees to that.
	if err := s.i.Stop(t); err != nil {
		t.Errorf("run: %v\n%s", err, s.i.Log())
	}
}

// TestAttackCapabilitiesReset resets connections that are older, which is done
// by socket diagnostics.
func TestAttackCapabilitiesReset(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	r.Home = needed
	r.Serve(t, netip.AddrPortFrom(rig.Far4, sitePort), named("far"))
	a := captive(t, r, nil)
	a.wants("ok", "dial(%q, %d, SOCK_STREAM, [], None, True)", rig.Far4, sitePort)
	a.wants(`b'far\n'`, "kept[0].recv(100)")
	r.Run(t, "existing: reset")
	a.wants("ECONNABORTED", "ask(kept[0])")
}

// TestAttackCapabilitiesExec runs a command, and sweeps what a killed one left.
func TestAttackCapabilitiesExec(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	r.Home = needed
	// The root of the hierarchy has no write bit: to make a cgroup there would
	// need CAP_DAC_OVERRIDE.
	r.Home.Cgroup = testutil.NewCgroup(t)
	r.Serve(t, netip.AddrPortFrom(rig.Far4, sitePort), named("far"))
	script := fmt.Sprintf("import socket; print(socket.create_connection((%q, %d)).recv(10).decode().strip())", "10.96.0.12", sitePort)
	service := fmt.Sprintf("10.96.0.12:%d=%s:%d", sitePort, rig.Far4, sitePort)
	out, said, err := r.Exec(t, []string{"--service", service}, "python3", "-c", script)
	if err != nil || out != "far\n" || strings.Contains(said, "ermitted") {
		t.Errorf("exec: %q, %v, %s", out, err, said)
	}
	if left, _ := filepath.Glob(filepath.Join(r.Runtime, "*.sock")); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
	// One that is killed leaves its pins, and the next start finds them.
	cmd := exec.Command(rig.Binary(t), "exec", "--runtime-dir", r.Runtime, "--", "sleep", "1000")
	place := r.Home
	place.NS = r.App
	if err := place.Start(cmd); err != nil {
		t.Fatal(err)
	}
	sockets := func() []string { all, _ := filepath.Glob(filepath.Join(r.Runtime, "*.sock")); return all }
	testutil.Eventually(t, rig.Limit, func() bool { return len(sockets()) == 1 }, "the command runs")
	name := strings.TrimSuffix(filepath.Base(sockets()[0]), ".sock")
	testutil.Eventually(t, rig.Limit, func() bool {
		links, _ := filepath.Glob("/sys/fs/bpf/pillion/" + name + "/link_*")
		return len(links) == 12
	}, "the programs are attached")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if err := r.Home.Cgroup.Kill(); err != nil { // and the command
		t.Fatal(err)
	}
	r.Home.Cgroup = testutil.NewCgroup(t)
	t.Cleanup(func() { exec.Command(rig.Binary(t), "unload", name).Run() })
	out, said, err = r.Exec(t, []string{"--service", service}, "python3", "-c", script)
	if err != nil || out != "far\n" || strings.Contains(said, "ermitted") {
		t.Errorf("exec: %q, %v, %s", out, err, said)
	}
	if pins, _ := filepath.Glob("/sys/fs/bpf/pillion/" + name + "/*"); len(pins) > 0 {
		t.Errorf("it is not swept: %v", pins)
	}
}
