package containers

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// host is a node with podman, a pod, and containers beside it that serve.
type host struct {
	*node
	pod string // the id of the pod
}

// Addresses of the host and of its pod.
const hostAddr, podAddr = "10.202.0.1", "10.202.0.2"

// newHost starts nothing but a process that keeps the namespaces: podman has no
// daemon. With v2 alone, this podman and runc deny a pod all devices, so the
// host has both.
func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{node: emptyNode(t, viewHybrid)}
	testutil.Need(t, "podman", "runc", "nsenter", "ip")
	images := h.images
	h.launch(t, "/bin/sleep", "infinity")
	text := "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\npids_limit = 0\n[engine]\nevents_logger = \"file\"\ninfra_image = \"" + pauseName + "\"\n"
	if err := os.WriteFile(filepath.Join(h.dir, "containers.conf"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"conf", "run"} {
		if err := os.Mkdir(filepath.Join(h.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		out, err := h.inside("findmnt", "--noheadings", "--types", "bpf", "/sys/fs/bpf").Output()
		return err == nil && len(out) > 0
	}, "the host is furnished")
	for _, archive := range []string{images.pillion, images.app, images.pause} {
		h.podman(t, "load", "--quiet", "--input", archive)
	}
	h.create(t)
	for port, name := range map[int]string{portA: "a", portB: "b", portApart: "apart"} {
		h.podman(t, "run", "--detach", "--network", "host", "--cgroup-parent", "/"+h.top, appName, "serve", fmt.Sprintf(":%d", port), name)
	}
	return h
}

// inside prepares a command that runs in the host's namespaces.
func (h *host) inside(name string, args ...string) *exec.Cmd {
	words := append([]string{"--target", strconv.Itoa(h.cmd.Process.Pid), "--mount", "--net", "--pid", "--ipc", "--", name}, args...)
	cmd := exec.Command("nsenter", words...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+filepath.Join(h.dir, "containers.conf"), "TMPDIR="+h.dir)
	return cmd
}

// try runs podman, and returns all that it wrote and its exit code.
func (h *host) try(t *testing.T, args ...string) (string, int) {
	t.Helper()
	global := []string{
		"--root", filepath.Join(h.dir, "root"), "--runroot", filepath.Join(h.dir, "runroot"), "--tmpdir", filepath.Join(h.dir, "tmp"),
		"--cgroup-manager", "cgroupfs", "--runtime", "runc", "--storage-driver", "overlay",
	}
	cmd := h.inside("podman", append(global, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return strings.TrimSpace(out.String()), exit.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out.String()), 0
}

// podman runs it, and it must succeed. It returns the last line.
func (h *host) podman(t *testing.T, args ...string) string {
	t.Helper()
	out, code := h.try(t, args...)
	if code != 0 {
		t.Fatalf("podman %s: exit code %d\n%s", strings.Join(args, " "), code, out)
	}
	return out[strings.LastIndexByte(out, '\n')+1:]
}

// create makes the pod, and a way from it to the host, as a CNI plug-in would.
func (h *host) create(t *testing.T) {
	t.Helper()
	h.pod = h.podman(t, "pod", "create", "--name", "shop", "--network", "none", "--cgroup-parent", "/"+h.top)
	h.podman(t, "pod", "start", "shop")
	infra := h.podman(t, "pod", "inspect", "--format", "{{.InfraContainerID}}", "shop")
	pid := h.podman(t, "inspect", "--format", "{{.State.Pid}}", infra)
	for _, words := range []string{
		"ip link add pods0 type veth peer name eth0 netns " + pid, "ip addr add " + hostAddr + "/24 dev pods0", "ip link set pods0 up",
		"nsenter --target " + pid + " --net ip addr add " + podAddr + "/24 dev eth0", "nsenter --target " + pid + " --net ip link set eth0 up",
		"nsenter --target " + pid + " --net ip route add default via " + hostAddr,
	} {
		w := strings.Fields(words)
		if out, err := h.inside(w[0], w[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", words, err, out)
		}
	}
}

func (h *host) instance() string { return "pod-" + h.pod[:32] }

// flags begin a container of Pillion's.
func (h *host) flags(more ...string) []string {
	return append([]string{
		"run", "--pod", "shop", "--cap-drop", "all", "--read-only", "--volume", filepath.Join(h.dir, "conf") + ":/etc/pillion:ro",
		"--volume", filepath.Join(h.dir, "run") + ":/run/pillion", "--volume", "/sys/fs/bpf:/sys/fs/bpf", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:ro",
	}, more...)
}

// Privileges of a container of podman's.
var (
	podmanCaps       = []string{"--cap-add", "BPF,NET_ADMIN,DAC_READ_SEARCH"}
	podmanMinimal    = append([]string{"--security-opt", "seccomp=unconfined"}, podmanCaps...)
	podmanSysAdmin   = append([]string{"--cap-add", "SYS_ADMIN"}, podmanCaps...)
	podmanPrivileged = []string{"--privileged"}
)

func (h *host) configure(t *testing.T, more string) {
	t.Helper()
	text := fmt.Sprintf("services: [{name: web, address: %q, policy: round_robin, endpoints: [\"%s:%d\", \"%s:%d\"]}]\n%s\n", service, hostAddr, portA, hostAddr, portB, more)
	if err := os.WriteFile(filepath.Join(h.dir, "conf", "pillion.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// ask has a new container of the pod connect at once.
func (h *host) ask(t *testing.T, times int, to string) []string {
	t.Helper()
	out, _ := h.try(t, "run", "--rm", "--pod", "shop", appName, "ask", strconv.Itoa(times), to)
	return strings.Split(out, "\n")
}

// sidecar starts Pillion, and waits until it is ready.
func (h *host) sidecar(t *testing.T, args ...string) (id string, c *admin.Client) {
	t.Helper()
	words := append(h.flags(append([]string{"--detach"}, podmanMinimal...)...), h.pillionName)
	id = h.podman(t, append(words, append(slices.Clone(runArgs), args...)...)...)
	c = admin.Dial(filepath.Join(h.dir, "run", h.instance()+".sock"))
	testutil.Eventually(t, rig.Limit, func() bool {
		st, err := c.Status(t.Context())
		return err == nil && st.Ready
	}, "pillion is ready")
	if out, code := h.try(t, "exec", id, "/pillion", "ready"); code != 0 {
		t.Errorf("it is ready, and the probe says %q", out)
	}
	return id, c
}

// exited waits for the end of a container, and returns its exit code.
func (h *host) exited(t *testing.T, id string) string {
	t.Helper()
	return h.podman(t, "wait", id)
}

// TestPodman is a pod of podman's: which privileges it takes, and its life.
func TestPodman(t *testing.T) {
	h := newHost(t)
	t.Run("privileges", func(t *testing.T) { podmanPrivileges(t, h) })
	t.Run("life", func(t *testing.T) { podmanLife(t, h) })
	t.Run("job", func(t *testing.T) { podmanJob(t, h) })
}

func podmanPrivileges(t *testing.T, h *host) {
	h.configure(t, "on_failure: closed")
	for _, c := range []struct {
		name  string
		flags []string
		code  int
		says  string
	}{
		{"podman's own profile", podmanCaps, 69, "seccomp=unconfined"},
		{"unconfined", podmanMinimal, 0, "attached instance=pod-"},
		{"with CAP_SYS_ADMIN", podmanSysAdmin, 0, "attached instance=pod-"},
		{"privileged", podmanPrivileged, 0, "attached instance=pod-"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, code := h.try(t, append(append(h.flags(append([]string{"--rm"}, c.flags...)...), h.pillionName), initArgs...)...)
			t.Logf("exit code %d: %s", code, out)
			if code != c.code || !strings.Contains(out, c.says) {
				t.Errorf("exit code %d, want %d, and that it says %q", code, c.code, c.says)
			}
			want := []string{h.instance()}
			if code != 0 {
				want = nil
			}
			if diff := cmp.Diff(want, h.pins(t)); diff != "" {
				t.Errorf("instances: %s", diff)
			}
		})
	}
}

// podmanLife begins with the pod that is captured already.
func podmanLife(t *testing.T, h *host) {
	apart := fmt.Sprintf("%s:%d", hostAddr, portApart)
	if got := h.ask(t, 1, service); !strings.HasPrefix(got[0], "refused true") {
		t.Errorf("between init and run: %q, want that it is refused", got)
	}
	id, client := h.sidecar(t)
	told := map[string]int{}
	for end := time.Now().Add(rig.Limit); told["a"]+told["b"] < 10 && time.Now().Before(end); {
		for _, line := range h.ask(t, 10-told["a"]-told["b"], service) {
			name, rest, _ := strings.Cut(line, " ")
			if told[name]++; name != "refused" && rest != podAddr+" "+service {
				t.Errorf("an application was told %q", line)
			}
		}
	}
	if told["a"] != 5 || told["b"] != 5 {
		t.Errorf("answers %v, want 5 of each endpoint", told)
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		all, err := client.Flows(t.Context(), admin.FlowQuery{})
		st, err2 := client.Status(t.Context())
		return err == nil && err2 == nil && len(all) >= 10 && st.Unaccounted == 0
	}, "all are on record, and accounted for")

	h.podman(t, "kill", "--signal", "KILL", id)
	if code := h.exited(t, id); code != "137" {
		t.Errorf("killed, it ended with %s", code)
	}
	for _, to := range []string{service, apart} {
		if got := h.ask(t, 1, to); !strings.HasPrefix(got[0], "refused true") {
			t.Errorf("with the sidecar killed, %s answers %q, want that it is refused", to, got)
		}
	}
	// The same container, in another cgroup.
	h.podman(t, "start", id)
	testutil.Eventually(t, rig.Limit, func() bool {
		got := h.ask(t, 1, service)
		return strings.HasPrefix(got[0], "a ") || strings.HasPrefix(got[0], "b ")
	}, "the sidecar is back")
	h.podman(t, "stop", "--time", "30", id)
	if code := h.exited(t, id); code != "0" {
		log, _ := h.try(t, "logs", id)
		t.Errorf("told to end, it ended with %s\n%s", code, log)
	}
	if left := h.pins(t); len(left) > 0 {
		t.Errorf("pins are left: %v", left)
	}
}

// podmanJob ends with the applications, and leaves no instance of a pod that is gone.
func podmanJob(t *testing.T, h *host) {
	h.configure(t, "")
	id, _ := h.sidecar(t, "--exit-with-scope")
	app := h.podman(t, "run", "--detach", "--pod", "shop", appName, "wait")
	h.podman(t, "stop", "--time", "10", app)
	if code := h.exited(t, id); code != "0" {
		t.Errorf("it ended with %s", code)
	}
	if out, _ := h.try(t, "logs", id); !strings.Contains(out, "the applications have ended") {
		t.Errorf("it does not say why it ended:\n%s", out)
	}
	h.podman(t, append(append(h.flags(append([]string{"--rm"}, podmanMinimal...)...), h.pillionName), initArgs...)...)
	gone := h.instance()
	h.podman(t, "pod", "rm", "--force", "--time", "0", "shop")
	if diff := cmp.Diff([]string{gone}, h.pins(t)); diff != "" {
		t.Errorf("what stays of a pod that was removed: %s", diff)
	}
	h.create(t)
	h.podman(t, append(append(h.flags(append([]string{"--rm"}, podmanMinimal...)...), h.pillionName), initArgs...)...)
	if diff := cmp.Diff([]string{h.instance()}, h.pins(t)); diff != "" {
		t.Errorf("what is there when the next has started: %s", diff)
	}
}
