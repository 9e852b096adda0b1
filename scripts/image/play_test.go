package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// application is a program that waits to be told to end; it is also what holds a
// pod's namespaces.
const application = `package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	<-c
}
`

// TestPlay plays podman's manifest with the image in it, as it is shipped: with
// two capabilities and a third, and not privileged.
func TestPlay(t *testing.T) {
	dir := layoutDir(t)
	store := newStore(t)
	const bpffs = "/sys/fs/bpf"
	if out, err := exec.Command("findmnt", "--noheadings", "--types", "bpf", bpffs).CombinedOutput(); err != nil {
		t.Skipf("no bpf file system is mounted at %s: %v %s", bpffs, err, out)
	}
	image := store.load(t, dir+".tar")
	app := store.load(t, appArchive(t))
	text, err := os.ReadFile("../../deploy/podman/pillion.kube.yaml")
	if err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(t.TempDir(), "pod.yaml")
	text = []byte(strings.NewReplacer("localhost/pillion:devel", image, "registry.example/shop:1.0", app).Replace(string(text)))
	if err := os.WriteFile(manifest, text, 0o600); err != nil {
		t.Fatal(err)
	}
	store.infra(t, app)
	// The last clean-up comes first.
	t.Cleanup(func() { forgetCgroups(t, "/libpod_parent") })
	t.Cleanup(func() {
		if out, err := store.run("pod", "rm", "--force", "shop").CombinedOutput(); err != nil {
			t.Errorf("remove the pod: %v\n%s", err, out)
		}
	})
	if out, err := store.run("kube", "play", "--network", "none", manifest).CombinedOutput(); err != nil {
		t.Fatalf("podman kube play: %v\n%s", err, out)
	}
	id, err := store.run("pod", "inspect", "--format", "{{.ID}}", "shop").Output()
	if err != nil {
		t.Fatal(err)
	}
	pins := filepath.Join(bpffs, "pillion", "pod-"+string(id)[:32])
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		out, err := store.run("exec", "shop-pillion", "/pillion", "ready", "--timeout", "10s").CombinedOutput()
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			logs, _ := store.run("logs", "shop-pillion").CombinedOutput()
			t.Fatalf("not ready: %v\n%s\n%s", err, out, logs)
		}
	}
	if _, err := os.Stat(pins); err != nil {
		t.Errorf("it is ready, and has no pins: %v", err)
	}
	if out, err := store.run("pod", "stop", "--time", "20", "shop").CombinedOutput(); err != nil {
		t.Errorf("stop the pod: %v\n%s", err, out)
	}
	if _, err := os.Stat(pins); !os.IsNotExist(err) {
		t.Errorf("pins are left in %s: %v", pins, err)
	}
}

// appArchive makes an image with the application in it.
func appArchive(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	source, binary := filepath.Join(dir, "main.go"), filepath.Join(dir, "app")
	if err := os.WriteFile(source, []byte(application), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", binary, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the application: %v\n%s", err, out)
	}
	b, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	c := commit{version: "app", time: released.time}
	var parts []part
	for _, arch := range architectures {
		parts = append(parts, part{arch: arch, binary: b, sbom: []byte("{}")})
	}
	l, err := assemble(parts, c)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "app.tar")
	if err := l.writeArchive(name, c.time); err != nil {
		t.Fatal(err)
	}
	return name
}
