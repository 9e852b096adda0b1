package loader

import (
	"fmt"
	"regexp"
	"strings"
)

// The names that runtimes give to cgroups. Kubernetes's cgroupfs driver calls a
// pod's pod<uid>, its systemd driver kubepods[-<class>]-pod<uid, with
// underscores>.slice; a static pod's uid has no separators at all. podman calls a
// pod's by its id.
var (
	kubePod   = regexp.MustCompile(`(?:^|-)pod([0-9a-f]{8}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{12})(?:\.slice)?$`)
	podmanPod = regexp.MustCompile(`^(?:(?:machine|user)-libpod_pod_)?([0-9a-f]{64})(?:\.slice)?$`)
	// <id>, cri-containerd-<id>.scope, crio-<id>[.scope], docker-<id>.scope,
	// libpod-<id>[.scope].
	container = regexp.MustCompile(`^(?:([a-z-]+)-)?[0-9a-f]{64}(?:\.scope)?$`)
)

// The prefixes in names of containers that tell something.
const (
	prefixPodman = "libpod"
	prefixCRIO   = "crio"
)

// podLevel is where a process's pod is among the names of its cgroups.
type podLevel struct {
	level int    // of the pod's; the container's is one more
	uid   string // without separators
	crio  bool   // the one runtime whose pods may have no sandbox
}

// findPodLevel returns the nearest pod. names are those of a process's cgroup and
// all above it, the root's, which has none, first. What is above the pod is
// nobody's concern: the node may itself be a container. It fails with [ErrNoPod].
func findPodLevel(names []string) (podLevel, error) {
	for i := len(names) - 1; i > 0; i-- {
		below := ""
		if i+1 < len(names) {
			below = names[i+1]
		}
		uid := podUID(names[i], below)
		if uid == "" {
			continue
		}
		m := container.FindStringSubmatch(below)
		switch {
		case below == "":
			return podLevel{}, fmt.Errorf("%w: this process is right in the pod's cgroup %s, in none of a container", ErrNoPod, pathOf(names))
		case m == nil:
			return podLevel{}, fmt.Errorf("%w: in %s, %s is a pod, but %s is not named like a container", ErrNoPod, pathOf(names), names[i], below)
		}
		for _, deeper := range names[i+2:] {
			if container.MatchString(deeper) {
				return podLevel{}, fmt.Errorf("%w: in %s, this process is in a container inside of a pod's container: is its pod all of %s?", ErrNoPod, pathOf(names), names[i])
			}
		}
		return podLevel{level: i, uid: uid, crio: m[1] == prefixCRIO}, nil
	}
	if len(names) > 1 && container.MatchString(names[len(names)-1]) {
		return podLevel{}, fmt.Errorf("%w: this process is in the container %s, which has no cgroup in common with those of its pod only", ErrNoPod, pathOf(names))
	}
	return podLevel{}, fmt.Errorf("%w: this process is in %s, and no part of that is named like a pod", ErrNoPod, pathOf(names))
}

// podUID returns the uid in the name of a pod's cgroup, and nothing where it is
// not one. below is the name of the next cgroup on the way to the process.
func podUID(name, below string) string {
	if m := kubePod.FindStringSubmatch(name); m != nil {
		return plainUID(m[1])
	}
	c, m := container.FindStringSubmatch(below), podmanPod.FindStringSubmatch(name)
	if m != nil && c != nil && c[1] == prefixPodman {
		return m[1]
	}
	return ""
}

// plainUID is a uid as all its spellings have it in common.
func plainUID(uid string) string {
	return strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(uid))
}

// pathOf joins names as in a path; one that is not known is a question mark.
func pathOf(names []string) string {
	var b strings.Builder
	for _, n := range names[1:] {
		if n == "" {
			n = "?"
		}
		b.WriteString("/" + n)
	}
	if b.Len() == 0 {
		return "/"
	}
	return b.String()
}
