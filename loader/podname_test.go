package loader

import (
	"errors"
	"strings"
	"testing"
)

// Forms of a pod's uid and of a container's id.
const (
	uidDashes = "64fab0fb-6e1f-4b86-9d27-0f2b6f1c3d4e"
	uidPlain  = "64fab0fb6e1f4b869d270f2b6f1c3d4e"
	id1       = "1a9bf0b6ea76f9a5e5b9f4a6a3b7b8c1d2e3f4a5b6c7d8e9f0a1b2c3d4e5f607"
	id2       = "2b9bf0b6ea76f9a5e5b9f4a6a3b7b8c1d2e3f4a5b6c7d8e9f0a1b2c3d4e5f607"
	id3       = "3c9bf0b6ea76f9a5e5b9f4a6a3b7b8c1d2e3f4a5b6c7d8e9f0a1b2c3d4e5f607"
)

var uidUnder = strings.ReplaceAll(uidDashes, "-", "_")

// layouts are the paths of a process in a pod's container. The pod is what stands
// before the bar.
var layouts = map[string]string{
	"containerd, cgroupfs, burstable":   "kubepods/burstable/pod" + uidDashes + "|" + id1,
	"containerd, cgroupfs, best effort": "kubepods/besteffort/pod" + uidDashes + "|" + id1,
	"containerd, cgroupfs, guaranteed":  "kubepods/pod" + uidDashes + "|" + id1,
	"containerd, cgroupfs, static":      "kubepods/burstable/pod" + uidPlain + "|" + id1,
	"containerd, systemd, burstable":    "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidUnder + ".slice|cri-containerd-" + id1 + ".scope",
	"containerd, systemd, best effort":  "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uidUnder + ".slice|cri-containerd-" + id1 + ".scope",
	"containerd, systemd, guaranteed":   "kubepods.slice/kubepods-pod" + uidUnder + ".slice|cri-containerd-" + id1 + ".scope",
	"containerd, systemd, static":       "kubepods.slice/kubepods-pod" + uidPlain + ".slice|cri-containerd-" + id1 + ".scope",
	"CRI-O, systemd, crun":              "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidUnder + ".slice|crio-" + id1 + ".scope/container",
	"CRI-O, systemd, runc":              "kubepods.slice/kubepods-pod" + uidUnder + ".slice|crio-" + id1 + ".scope",
	"CRI-O, cgroupfs":                   "kubepods/besteffort/pod" + uidDashes + "|crio-" + id1,
	"docker, cgroupfs":                  "kubepods/burstable/pod" + uidDashes + "|" + id1,
	"docker, systemd":                   "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidUnder + ".slice|docker-" + id1 + ".scope",
	"docker, a parent of one's own":     "shop/pod" + uidDashes + "|" + id1,
	"podman, cgroupfs":                  "libpod_parent/" + id3 + "|libpod-" + id1,
	"podman, systemd":                   "machine.slice/machine-libpod_pod_" + id3 + ".slice|libpod-" + id1 + ".scope",
	"podman, systemd, crun":             "machine.slice/machine-libpod_pod_" + id3 + ".slice|libpod-" + id1 + ".scope/container",
	"podman, rootless":                  "user.slice/user-1000.slice/user@1000.service/user.slice/user-libpod_pod_" + id3 + ".slice|libpod-" + id1 + ".scope",
	"kind":                              "docker/" + id2 + "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + uidUnder + ".slice|cri-containerd-" + id1 + ".scope",
	"kind, cgroupfs":                    "docker/" + id2 + "/kubelet/kubepods/besteffort/pod" + uidDashes + "|" + id1,
	"kind in a pod":                     "kubepods/burstable/pod11111111-2222-3333-4444-555555555555/" + id2 + "/kubelet/kubepods/pod" + uidDashes + "|" + id1,
	"podman in a pod":                   "kubepods/pod" + uidDashes + "/" + id2 + "/libpod_parent/" + id3 + "|libpod-" + id1,
	"a cgroup made in the container":    "kubepods/burstable/pod" + uidDashes + "|" + id1 + "/init.scope",
}

func split(path string) []string { return append([]string{""}, strings.Split(path, "/")...) }

func TestFindPodLevel(t *testing.T) {
	for name, path := range layouts {
		pod, _, _ := strings.Cut(path, "|")
		want := podLevel{level: strings.Count(pod, "/") + 1, uid: uidPlain, crio: strings.HasPrefix(name, "CRI-O")}
		if strings.HasPrefix(name, "podman") {
			want.uid = id3
		}
		got, err := findPodLevel(split(strings.ReplaceAll(path, "|", "/")))
		if got != want || err != nil {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, want)
		}
	}
}

// What is no pod, and what may be one of two, is refused, with what was seen.
func TestFindPodLevelRefused(t *testing.T) {
	for path, want := range map[string]string{
		"":                                             "/, and no part",
		"system.slice/shop.service":                    "/system.slice/shop.service, and no part",
		"docker/" + id1:                                "the container /docker/" + id1,
		"system.slice/docker-" + id1 + ".scope":        "the container /system.slice/docker-",
		"machine.slice/libpod-" + id1 + ".scope":       "the container /machine.slice/libpod-",
		"libpod_parent/libpod-" + id1:                  "the container /libpod_parent/libpod-",
		"kubepods/burstable/pod" + uidDashes:           "right in the pod's cgroup",
		"kubepods/burstable/pod" + uidDashes + "/shop": "shop is not named like a container",
		"kubepods/burstable/pod" + uidDashes + "/" + id1 + "/docker/" + id2: "container inside of a pod's container",
		"kubepods/burstable/pod64fab0fb/" + id1:                             "the container /kubepods/burstable/pod64fab0fb/",
		"shop/tripod" + uidPlain + "/" + id1:                                "the container /shop/tripod",
		id3 + "/" + id1:                                                     "the container",
	} {
		names := split(path)
		if path == "" {
			names = []string{""}
		}
		got, err := findPodLevel(names)
		if !errors.Is(err, ErrNoPod) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v, want %q", path, got, err, want)
		}
	}
}
