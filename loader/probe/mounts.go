package probe

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

const cgroupCure = "boot with systemd.unified_cgroup_hierarchy=1, or mount it: mount -t cgroup2 cgroup2 /sys/fs/cgroup"

// mount is one line of mountinfo.
type mount struct {
	id, parent string
	// root is the directory of the file system that is mounted.
	root, point string
	options     []string
	fstype      string
	super       []string
}

// parseMounts leaves out lines that it does not understand, and mounts that
// another one on the same point hides.
func parseMounts(text string) []mount {
	var all []mount
	for line := range strings.Lines(text) {
		head, tail, ok := strings.Cut(line, " - ")
		w, v := strings.Fields(head), strings.Fields(tail)
		if !ok || len(w) < 6 || len(v) < 3 {
			continue
		}
		all = append(all, mount{
			id: w[0], parent: w[1], root: unescape(w[3]), point: unescape(w[4]),
			options: strings.Split(w[5], ","), fstype: v[0], super: strings.Split(v[2], ","),
		})
	}
	visible := make([]mount, 0, len(all))
	for _, m := range all {
		hidden := slices.ContainsFunc(all, func(o mount) bool {
			return o.parent == m.id && o.point == m.point && o.id != m.id
		})
		if !hidden {
			visible = append(visible, m)
		}
	}
	return visible
}

// unescape undoes the octal escapes of mountinfo (\040 is a space).
func unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

func (m *machine) mounts() ([]mount, error) {
	text, err := m.read("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	return parseMounts(text), nil
}

// CgroupRoot returns where the cgroup v2 hierarchy is mounted. On a machine
// that also mounts v1 that is usually /sys/fs/cgroup/unified. The error wraps
// [ErrUnsupported] when it is mounted nowhere.
func CgroupRoot() (string, error) { return newMachine(Options{}).cgroupRoot() }

func (m *machine) cgroupRoot() (string, error) {
	all, err := m.mounts()
	if err != nil {
		return "", err
	}
	best, rank := "", 0
	for _, o := range all {
		if o.fstype != "cgroup2" {
			continue
		}
		if r := cgroupRank(o); r > rank {
			best, rank = o.point, r
		}
	}
	if best == "" {
		return "", fmt.Errorf("%w: cgroup v2 is not mounted; %s", ErrUnsupported, cgroupCure)
	}
	return best, nil
}

// cgroupRank prefers the whole hierarchy to a part of it, and the usual places
// to others.
func cgroupRank(o mount) int {
	rank := 1
	switch o.point {
	case "/sys/fs/cgroup":
		rank = 3
	case "/sys/fs/cgroup/unified":
		rank = 2
	}
	if o.root == "/" {
		rank += 3
	}
	return rank
}

func checkCgroup(_ context.Context, m *machine) []Finding {
	const name = "cgroup v2"
	all, err := m.mounts()
	if err != nil {
		return []Finding{failure(name, "mount /proc", "%v", err)}
	}
	v1 := slices.ContainsFunc(all, func(o mount) bool { return o.fstype == "cgroup" })
	root, err := m.cgroupRoot()
	if errors.Is(err, ErrUnsupported) && m.hidden() {
		return []Finding{m.judgeHidden(name)}
	}
	if errors.Is(err, ErrUnsupported) {
		what := "it is not mounted"
		if v1 {
			what = "only cgroup v1 is mounted, which has no BPF hooks"
		}
		return []Finding{failure(name, cgroupCure, "%s", what)}
	}
	found := []Finding{good(name, "mounted on %s", root)}
	if v1 {
		found[0].Detail += ", beside cgroup v1"
	}
	if by := netControllers(all); by != "" {
		found = append(found, warning("cgroup v1 "+by, "boot with cgroup_no_v1=net_cls,net_prio unless something uses them",
			"mounted: on kernels before 5.15 a socket that gets a class or priority from it loses its cgroup v2, so its connections are not captured"))
	}
	return found
}

// hidden tells whether the machine has cgroup v2 mounted, and this process is in one:
// the kernel lists it then, also where no mount shows it, as in a container on a
// node with v1 beside v2.
func (m *machine) hidden() bool {
	text, err := m.read("/proc/self/cgroup")
	return err == nil && strings.Contains("\n"+text, "\n0::")
}

// judgeHidden is no failure where Pillion may mount it for itself, which it does to
// find its pod.
func (m *machine) judgeHidden(name string) Finding {
	const cure = "mount the node's /sys/fs/cgroup (in a pod: a hostPath volume, read-only will do)"
	if m.capabilities().has(capSysAdmin) {
		return warning(name, cure+" to use --cgroup or pillion exec, or ignore this", "no mount of this container shows it: Pillion makes one for itself when it looks for its pod")
	}
	return failure(name, cure+", or give CAP_SYS_ADMIN", "no mount of this container shows it, and without CAP_SYS_ADMIN Pillion cannot mount it")
}

// noMount is the finding of a check that needs a mount of cgroup v2. That there is
// none stands already.
func noMount(name string) Finding {
	return warning(name, "see cgroup v2", "not checked: cgroup v2 is not mounted here")
}

// netControllers names a v1 controller that shares the socket's cgroup pointer.
func netControllers(all []mount) string {
	for _, o := range all {
		for _, c := range []string{"net_cls", "net_prio"} {
			if o.fstype == "cgroup" && slices.Contains(o.super, c) {
				return c
			}
		}
	}
	return ""
}

func checkBPFFS(_ context.Context, m *machine) []Finding {
	const name = "bpffs"
	all, err := m.mounts()
	if err != nil {
		return []Finding{failure(name, "mount /proc", "%v", err)}
	}
	mountCure := "mount -t bpf bpf " + m.bpffs
	at := mountOf(all, m.bpffs)
	switch {
	case at.fstype == "bpf" && slices.Contains(at.options, "ro"):
		return []Finding{failure(name, "mount -o remount,rw "+at.point, "%s is mounted read-only: nothing can be pinned", at.point)}
	case at.fstype == "bpf":
		return []Finding{good(name, "mounted on %s", at.point)}
	case at.point == path.Clean(m.bpffs):
		return []Finding{failure(name, "umount "+at.point+" && "+mountCure,
			"%s has another file system (%s): nothing can be pinned there", at.point, at.fstype)}
	case !m.exists(m.bpffs):
		return []Finding{failure(name, "mount sysfs on /sys, or give another directory", "there is no directory %s", m.bpffs)}
	case !m.capabilities().has(capSysAdmin):
		return []Finding{failure(name, mountCure+" (in a pod: a hostPath volume with mountPropagation: HostToContainer)",
			"not mounted on %s, and without CAP_SYS_ADMIN Pillion cannot mount it: nothing can be pinned", m.bpffs)}
	}
	return []Finding{good(name, "not mounted on %s yet: Pillion mounts it", m.bpffs)}
}

// mountOf returns the mount that holds dir: the one with the longest mount
// point.
func mountOf(all []mount, dir string) mount {
	var best mount
	dir = path.Clean(dir)
	for _, o := range all {
		if (o.point == "/" || dir == o.point || strings.HasPrefix(dir, o.point+"/")) && len(o.point) >= len(best.point) {
			best = o
		}
	}
	return best
}
