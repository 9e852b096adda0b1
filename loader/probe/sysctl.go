package probe

import (
	"context"
	"fmt"
	"io/fs"
	"strconv"

	"golang.org/x/sys/unix"
)

// Below these, load that others carry with ease runs into a limit.
const (
	portsEnough       = 10_000
	descriptorsEnough = 65_536
	// pagesPerPipe is the kernel's default size of a pipe.
	pagesPerPipe = 16
)

func checkSysctls(_ context.Context, m *machine) []Finding {
	return []Finding{
		m.ports(), m.timeWait(), m.ipv6(), m.jit(), m.unprivilegedBPF(), m.pipes(),
	}
}

// sysctl reads a number. Values below net are those of this thread's network
// namespace.
func (m *machine) sysctl(key string) (int, error) {
	text, err := m.read("/proc/sys/" + key)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("parse %s: %w", key, err)
	}
	return n, nil
}

// noSysctl is for a value that the kernel does not have or that cannot be read:
// none of them is needed.
func noSysctl(name string, err error) Finding { return good(name, "not known: %v", err) }

func (m *machine) ports() Finding {
	const name = "net.ipv4.ip_local_port_range"
	text, err := m.read("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return noSysctl(name, err)
	}
	var low, high int
	if _, err := fmt.Sscan(text, &low, &high); err != nil {
		return noSysctl(name, fmt.Errorf("parse %q: %w", text, err))
	}
	n := high - low + 1
	if n < portsEnough {
		return warning(name, `sysctl -w net.ipv4.ip_local_port_range="32768 60999"`,
			"%d ports: that is how many connections one address has to one destination at once, those in TIME_WAIT included, with Pillion or without", n)
	}
	return good(name, "%d ports", n)
}

func (m *machine) timeWait() Finding {
	const name = "net.ipv4.tcp_tw_reuse"
	n, err := m.sysctl("net/ipv4/tcp_tw_reuse")
	switch {
	case err != nil:
		return noSysctl(name, err)
	case n == 1:
		return good(name, "1: ports in TIME_WAIT are used again")
	}
	return good(name, "%d: ports in TIME_WAIT are not used again towards slots, as they are not towards remote addresses; 1 helps clients that connect and close very often", n)
}

// ipv6 asks for lo, because a slot's route is on it. Where no interface speaks
// IPv6 there is nothing to capture.
func (m *machine) ipv6() Finding {
	const (
		name = "net.ipv6.conf.lo.disable_ipv6"
		dir  = "proc/sys/net/ipv6/conf"
	)
	lo, err := m.sysctl("net/ipv6/conf/lo/disable_ipv6")
	if err != nil {
		return good(name, "the kernel has no IPv6: there is none to capture")
	}
	if lo == 0 {
		return good(name, "0: IPv6 works")
	}
	links, err := fs.ReadDir(m.files, dir)
	if err != nil {
		return noSysctl(name, err)
	}
	for _, l := range links {
		if l.Name() == "all" || l.Name() == "default" || l.Name() == "lo" {
			continue
		}
		if n, err := m.sysctl("net/ipv6/conf/" + l.Name() + "/disable_ipv6"); err == nil && n == 0 {
			return warning(name, "sysctl -w net.ipv6.conf.lo.disable_ipv6=0",
				"1 on lo, but %s speaks IPv6: connections over IPv6 are not captured (reason no_family)", l.Name())
		}
	}
	return good(name, "1 on every interface: there is no IPv6 to capture")
}

func (m *machine) jit() Finding {
	const name = "net.core.bpf_jit_enable"
	n, err := m.sysctl("net/core/bpf_jit_enable")
	switch {
	case err != nil:
		return noSysctl(name, err)
	case n == 0:
		return warning(name, "sysctl -w net.core.bpf_jit_enable=1", "0: programs are interpreted, which makes every connect slower")
	}
	return good(name, "%d", n)
}

func (m *machine) unprivilegedBPF() Finding {
	const name = "kernel.unprivileged_bpf_disabled"
	n, err := m.sysctl("kernel/unprivileged_bpf_disabled")
	if err != nil {
		return noSysctl(name, err)
	}
	if n == 0 {
		return good(name, "0: any user may load programs; Pillion does not need that")
	}
	return good(name, "%d: programs need CAP_BPF, as is usual", n)
}

func (m *machine) pipes() Finding {
	const name = "fs.pipe-user-pages-soft"
	n, err := m.sysctl("fs/pipe-user-pages-soft")
	caps := m.capabilities()
	switch {
	case err != nil:
		return noSysctl(name, err)
	case n == 0:
		return good(name, "0: no limit")
	case caps.has(capSysResource) || caps.has(capSysAdmin):
		return good(name, "%d pages; the capabilities lift it", n)
	}
	return good(name, "%d pages: some %d connections carry bulk at once through full-size pipes, more go on through small ones", n, n/pagesPerPipe)
}

func checkDescriptors(_ context.Context, m *machine) []Finding {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return []Finding{noSysctl("RLIMIT_NOFILE", err)}
	}
	return []Finding{m.descriptors(l.Max)}
}

// descriptors judges the hard limit; Pillion raises the soft one to it.
func (m *machine) descriptors(hard uint64) Finding {
	const name = "RLIMIT_NOFILE"
	// Two for the connection, and some of them have a pipe.
	room := hard / 2
	if hard >= descriptorsEnough {
		return good(name, "%d: room for some %d relayed connections", hard, room)
	}
	if m.capabilities().has(capSysResource) {
		return good(name, "%d, which Pillion can raise", hard)
	}
	return warning(name, "LimitNOFILE=524288 in the unit, or --ulimit nofile=524288 for the container",
		"%d: room for some %d relayed connections, more wait until one ends", hard, room)
}
