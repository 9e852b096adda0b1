package rig

import (
	"net/netip"
	"os/exec"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// Redis runs a server without a disk on all these addresses, of one port.
func (r *Rig) Redis(t testing.TB, at ...netip.AddrPort) {
	t.Helper()
	args := []string{"--port", strconv.Itoa(int(at[0].Port())), "--save", "", "--appendonly", "no",
		"--protected-mode", "no", "--dir", t.TempDir(), "--daemonize", "no", "--bind"}
	for _, a := range at {
		r.Give(t, a.Addr())
		args = append(args, a.Addr().String())
	}
	r.Daemon(t, exec.Command("redis-server", args...), unix.SIGTERM, at[0])
}
