package inject

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// The annotations of a pod.
const (
	// Injected says by which version Pillion was put beside a pod. It also tells
	// our containers from somebody else's of the same name.
	Injected = "pillion-project.github.io/injected"
	// Inject is the user's: "false" or "disabled" leaves the pod alone.
	Inject = "pillion-project.github.io/inject"

	// mirrored says that a pod only shows in the API what a kubelet runs of a file of
	// its own: nothing comes of a change to it.
	mirrored = "kubernetes.io/config.mirror"

	defaultContainer = "kubectl.kubernetes.io/default-container"
)

// Form is how Pillion stands in a pod.
type Form string

// The forms.
const (
	// Sidecar is an init container that goes on (Kubernetes 1.29).
	Sidecar Form = "sidecar"
	// Container is one among the application's.
	Container Form = "container"
)

// Options say what is put beside a pod.
type Options struct {
	// Image is that of both containers. Version is told in the annotation.
	Image, Version string
	Form           Form
	// ConfigMap has the configuration, in pillion.yaml.
	ConfigMap string
	// HostNetwork allows pods in the node's network namespace.
	HostNetwork bool
	// CgroupMount mounts the node's /sys/fs/cgroup read-only, and takes no
	// CAP_DAC_READ_SEARCH.
	CgroupMount bool
}

var configMapName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// Check returns what is wrong with the options.
func (o Options) Check() error {
	var errs []error
	if o.Image == "" || strings.ContainsAny(o.Image, " \t\r\n") {
		errs = append(errs, fmt.Errorf("image %q: want a reference", o.Image))
	}
	if o.Form != Sidecar && o.Form != Container {
		errs = append(errs, fmt.Errorf("form %q: want %s or %s", o.Form, Sidecar, Container))
	}
	if !configMapName.MatchString(o.ConfigMap) {
		errs = append(errs, fmt.Errorf("ConfigMap %q: want a name", o.ConfigMap))
	}
	return errors.Join(errs...)
}

// The names of what is added.
const (
	initName     = "pillion-init"
	sidecarName  = "pillion"
	bpfVolume    = "pillion-bpf"
	runVolume    = "pillion-run"
	configVolume = "pillion-config"
	cgroupVolume = "pillion-cgroup"
)

type (
	dict = map[string]any
	seq  = []any
)

const (
	configFile = "/etc/pillion/pillion.yaml"
	// bpfDir is where our containers see the node's bpf file system: below /sys the
	// AppArmor profile of containers lets nobody write, but to cgroups.
	bpfDir = "/bpf"
)

// containers returns the two, as YAML decodes them. ends tells that the pod is
// one that completes.
func (o Options) containers(ends bool) (first, beside dict) {
	first = o.container(initName, "init", "--config", configFile, "--bpffs", bpfDir)
	beside = o.container(sidecarName, "run", "--config", configFile, "--bpffs", bpfDir, "--drain-timeout", "25s")
	beside["startupProbe"] = probe("ready", 1, 2, 120)
	beside["livenessProbe"] = probe("live", 10, 5, 3)
	// A process that hangs does not drain.
	beside["livenessProbe"].(dict)["terminationGracePeriodSeconds"] = 5
	switch {
	case o.Form == Sidecar:
		beside["restartPolicy"] = "Always"
	case ends:
		// The kubelet ends a sidecar, but waits for a container.
		beside["args"] = append(beside["args"].(seq), "--exit-with-scope")
	}
	return first, beside
}

func (o Options) container(name string, args ...string) dict {
	var words seq
	for _, a := range args {
		words = append(words, a)
	}
	caps := seq{"BPF", "NET_ADMIN", "DAC_READ_SEARCH"}
	mounts := seq{
		dict{"name": bpfVolume, "mountPath": bpfDir, "mountPropagation": "HostToContainer"},
		dict{"name": runVolume, "mountPath": "/run/pillion"},
		dict{"name": configVolume, "mountPath": "/etc/pillion", "readOnly": true},
	}
	if o.CgroupMount {
		caps = caps[:2]
		mounts = append(mounts, dict{"name": cgroupVolume, "mountPath": "/sys/fs/cgroup", "readOnly": true})
	}
	return dict{
		"name": name, "image": o.Image, "args": words,
		"env": seq{field("POD_UID", "metadata.uid"), field("NODE_NAME", "spec.nodeName")},
		"securityContext": dict{
			"runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": false,
			"privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
			"capabilities":   dict{"drop": seq{"ALL"}, "add": caps},
			"seccompProfile": dict{"type": "RuntimeDefault"},
		},
		"resources":    dict{"requests": dict{"cpu": "10m", "memory": "64Mi"}},
		"volumeMounts": mounts,
	}
}

func field(name, path string) dict {
	return dict{"name": name, "valueFrom": dict{"fieldRef": dict{"fieldPath": path}}}
}

func probe(command string, period, timeout, failures int) dict {
	return dict{
		"exec":          dict{"command": seq{"/pillion", command}},
		"periodSeconds": period, "timeoutSeconds": timeout, "failureThreshold": failures,
	}
}

func (o Options) volumes() seq {
	all := seq{
		dict{"name": bpfVolume, "hostPath": dict{"path": "/sys/fs/bpf", "type": "Directory"}},
		dict{"name": runVolume, "emptyDir": dict{"medium": "Memory"}},
		dict{"name": configVolume, "configMap": dict{"name": o.ConfigMap}},
	}
	if o.CgroupMount {
		all = append(all, dict{"name": cgroupVolume, "hostPath": dict{"path": "/sys/fs/cgroup", "type": "Directory"}})
	}
	return all
}
