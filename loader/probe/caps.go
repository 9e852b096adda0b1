package probe

import (
	"context"
	"errors"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	capNetAdmin    = unix.CAP_NET_ADMIN
	capSysAdmin    = unix.CAP_SYS_ADMIN
	capSysResource = unix.CAP_SYS_RESOURCE
	capPerfmon     = unix.CAP_PERFMON
	capBPF         = unix.CAP_BPF
)

const capsCure = "run as root, or give the container or unit CAP_BPF and CAP_NET_ADMIN (securityContext.capabilities.add, AmbientCapabilities=)"

// capSet is the effective set of a process.
type capSet uint64

func (s capSet) has(c int) bool { return s&(1<<c) != 0 }

// bpf tells whether the set lets a process load: the kernel takes CAP_SYS_ADMIN
// for CAP_BPF, as it did before CAP_BPF existed.
func (s capSet) bpf() bool { return s.has(capBPF) || s.has(capSysAdmin) }

// enough tells whether the set allows all that Pillion needs.
func (s capSet) enough() bool { return s.bpf() && s.has(capNetAdmin) }

// capabilities is empty when it cannot be read.
func (m *machine) capabilities() capSet {
	n, err := strconv.ParseUint(m.status("CapEff"), 16, 64)
	if err != nil {
		return 0
	}
	return capSet(n)
}

// status returns one field of this thread's status.
func (m *machine) status(field string) string {
	text, err := m.read("/proc/thread-self/status")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(line, ":"); ok && name == field {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// optionalCaps says what each capability beyond the two required ones gives.
var optionalCaps = []struct {
	bit         int
	name, gives string
}{
	{capPerfmon, "CAP_PERFMON", "the names of commands in records"},
	{capSysResource, "CAP_SYS_RESOURCE", "more descriptors than the hard limit, and full-size pipes for more than some 870 bulk connections"},
	{capSysAdmin, "CAP_SYS_ADMIN", "mounting bpffs, entering other network namespaces, and the names of foreign programs in this report"},
}

func checkCapabilities(_ context.Context, m *machine) []Finding {
	caps := m.capabilities()
	var found []Finding
	if uids, err := m.read("/proc/self/uid_map"); err == nil && strings.Join(strings.Fields(uids), " ") != "0 0 4294967295" {
		found = append(found, failure("user namespace", "run outside of the user namespace (hostUsers: true, no userns-remap, not rootless)",
			"this process is in a user namespace, where capabilities do not count for BPF"))
	}
	found = append(found,
		requiredCap("CAP_BPF", caps.bpf(), "loading programs and making maps"),
		requiredCap("CAP_NET_ADMIN", caps.has(capNetAdmin), "attaching to cgroups and namespaces, and adding routes"))
	for _, c := range optionalCaps {
		if caps.has(c.bit) {
			found = append(found, good(c.name, "held: gives %s", c.gives))
		} else {
			found = append(found, good(c.name, "not held, which is fine: it would give %s", c.gives))
		}
	}
	return found
}

func requiredCap(name string, held bool, use string) Finding {
	if held {
		return good(name, "held: for %s", use)
	}
	return failure(name, capsCure, "missing: it is needed for %s", use)
}

// denied tells whether err is the kernel refusing for lack of permission.
func denied(err error) bool {
	return errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)
}

// unchecked is the finding of a probe that this process may not make. With the
// capabilities missing it is no failure of its own: that one stands already.
func (m *machine) unchecked(name string, err error) Finding {
	if !m.capabilities().enough() {
		return warning(name, capsCure, "not checked: %v", err)
	}
	return failure(name, m.whyDenied(), "refused although the capabilities are there: %s", short(err))
}

// whyDenied guesses what refuses bpf(2) to a process that has the capabilities.
func (m *machine) whyDenied() string {
	var why []string
	if m.status("Seccomp") == "2" {
		why = append(why, "allow bpf(2) in this process's seccomp profile: RuntimeDefault of containerd and CRI-O does with CAP_BPF; podman's and docker's may with CAP_SYS_ADMIN alone, there give that or set seccomp=unconfined")
	}
	if text, err := m.read("/sys/kernel/security/lockdown"); err == nil && strings.Contains(text, "[confidentiality]") {
		why = append(why, "boot with lockdown=integrity instead of confidentiality")
	}
	why = append(why, "look for an SELinux, AppArmor or BPF LSM refusal in the kernel log")
	return strings.Join(why, "; ")
}

// short is the error in one line of bearable length: the verifier's are long.
func short(err error) string {
	const most = 240
	text := strings.Join(strings.Fields(err.Error()), " ")
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}
