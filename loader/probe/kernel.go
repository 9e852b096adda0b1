package probe

import (
	"context"
	"io/fs"
	"strings"
)

const btfFile = "/sys/kernel/btf/vmlinux"

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
	const cure = "boot a kernel that is built with CONFIG_DEBUG_INFO_BTF=y; in a container, mount the host's /sys read-only"
	info, err := fs.Stat(m.files, btfFile[1:])
	switch {
	case err != nil:
		return []Finding{failure("btf", cure, "the kernel has no type information: %v", err)}
	case info.Size() == 0:
		return []Finding{failure("btf", cure, "%s is empty", btfFile)}
	}
	return []Finding{good("btf", "%s, %d KiB", btfFile, info.Size()>>10)}
}
