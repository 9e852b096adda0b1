package probe

import (
	"context"
	"errors"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

const btfFile = "/sys/kernel/btf/vmlinux"

// ownKernel is for containers whose kernel is not the node's. What it lacks is
// looked at, never its name.
const ownKernel = "a sandbox with a kernel of its own (gVisor, Kata) has none to offer: give the pod another runtimeClassName"

func trim(b []byte) string { return strings.TrimSpace(string(b)) }

// checkKernel is for the reader of a bug report: no check compares versions.
func checkKernel(_ context.Context, m *machine) []Finding {
	release, err := m.read("/proc/sys/kernel/osrelease")
	if err != nil {
		return []Finding{good("kernel", "release unknown: %v", err)}
	}
	return []Finding{good("kernel", "Linux %s (what it can do is probed below)", release)}
}

func checkBTF(_ context.Context, m *machine) []Finding {
	const cure = "boot a kernel that is built with CONFIG_DEBUG_INFO_BTF=y; in a container, mount the host's /sys read-only; " + ownKernel
	info, err := fs.Stat(m.files, btfFile[1:])
	switch {
	case err != nil:
		return []Finding{failure("btf", cure, "the kernel has no type information: %v", err)}
	case info.Size() == 0:
		return []Finding{failure("btf", cure, "%s is empty", btfFile)}
	}
	return []Finding{good("btf", "%s, %d KiB", btfFile, info.Size()>>10)}
}

// checkBPF asks for a command of bpf(2) that no kernel has: what is refused before
// that is known is refused whatever is asked.
func checkBPF(_ context.Context, m *machine) []Finding {
	const none = 1 << 30
	_, _, errno := unix.Syscall(unix.SYS_BPF, none, 0, 0)
	return []Finding{m.judgeBPF(errno)}
}

func (m *machine) judgeBPF(err error) Finding {
	const name = "bpf(2)"
	switch {
	case errors.Is(err, unix.ENOSYS):
		return failure(name, "boot a kernel that is built with CONFIG_BPF_SYSCALL=y; "+ownKernel, "the kernel has no such system call")
	case denied(err):
		return m.unchecked(name, err)
	}
	return good(name, "may be called")
}

// callable tells whether bpf(2) has an answer for this process, be it that a
// capability is missing.
func (m *machine) callable(ctx context.Context) bool { return checkBPF(ctx, m)[0].Level != Fail }

// noCalls is the finding of a check that needs bpf(2). That it cannot be called
// stands already.
func noCalls(name string) Finding {
	return warning(name, "see bpf(2)", "not checked: bpf(2) cannot be called")
}
