package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// shipped says where the image is that make image wrote. Without it only what
// needs no compiler is tested.
const shipped = "PILLION_IMAGE"

var released = commit{
	revision: "0123456789abcdef0123456789abcdef01234567", version: "1.2.3", time: time.Unix(1700000000, 0).UTC(),
}

// sample assembles an image around a small file.
func sample(t *testing.T, content string) *layout {
	t.Helper()
	var parts []part
	for _, arch := range architectures {
		parts = append(parts, part{arch: arch, binary: []byte(content + arch), sbom: []byte(`{"spdxVersion":"SPDX-2.3"}`)})
	}
	l, err := assemble(parts, released)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestSame(t *testing.T) {
	var digests []string
	var archives [][]byte
	for range 2 {
		l := sample(t, "x")
		var b bytes.Buffer
		if err := l.archive(&b, released.time); err != nil {
			t.Fatal(err)
		}
		digests, archives = append(digests, l.root.Digest), append(archives, b.Bytes())
	}
	if digests[0] != digests[1] || !bytes.Equal(archives[0], archives[1]) {
		t.Errorf("the same content gives %s and %s", digests[0], digests[1])
	}
	if other := sample(t, "y").root.Digest; other == digests[0] {
		t.Errorf("other content has the same digest %s", other)
	}
}

func TestSampleLayout(t *testing.T) {
	dir := t.TempDir()
	if err := sample(t, "x").writeDir(dir); err != nil {
		t.Fatal(err)
	}
	for _, image := range images(t, dir) {
		if got, want := string(image.binary), "x"+image.arch; got != want {
			t.Errorf("%s: the layer has %q, want %q", image.arch, got, want)
		}
		if got := image.config.Config.Labels["org.opencontainers.image.revision"]; got != released.revision {
			t.Errorf("%s: revision %q, want %q", image.arch, got, released.revision)
		}
	}
}

func TestBill(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := bill(b, "amd64", released)
	if err != nil {
		t.Fatal(err)
	}
	checkBill(t, doc, "stdlib") // all that a test's binary tells
	if _, err := bill([]byte("#!/bin/sh"), "amd64", released); err == nil {
		t.Error("a bill of materials of what Go has not built: no error")
	}
}

// checkBill wants a document that is whole, with packages of these names.
func checkBill(t *testing.T, text []byte, want ...string) {
	t.Helper()
	var doc spdx
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatalf("bill of materials: %v", err)
	}
	ids, names := map[string]bool{doc.ID: true}, map[string]bool{}
	for _, p := range doc.Packages {
		if ids[p.ID] {
			t.Errorf("%s names two packages", p.ID)
		}
		ids[p.ID], names[p.Name] = true, true
	}
	for _, r := range doc.Relationships {
		if !ids[r.From] || !ids[r.To] {
			t.Errorf("%s %s %s: not in the document", r.From, r.Type, r.To)
		}
	}
	if doc.Version != "SPDX-2.3" || len(doc.Relationships) != len(doc.Packages) {
		t.Errorf("%s with %d packages and %d relationships", doc.Version, len(doc.Packages), len(doc.Relationships))
	}
	for _, name := range want {
		if !names[name] {
			t.Errorf("the bill of materials has no %s", name)
		}
	}
}

// unpacked is one architecture's image, as a runtime finds it.
type unpacked struct {
	arch         string
	config       imageConfig
	binary, sbom []byte
	size         int // of what is pulled
}

// images reads a layout, follows every digest, and returns what is in it.
func images(t *testing.T, dir string) []unpacked {
	t.Helper()
	blob := func(d descriptor, v any) []byte {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(d.Digest, "sha256:")))
		if err != nil {
			t.Fatal(err)
		}
		if digest(b) != d.Digest || len(b) != d.Size {
			t.Fatalf("%s of %d bytes is %s of %d", d.Digest, d.Size, digest(b), len(b))
		}
		if v != nil {
			if err := json.Unmarshal(b, v); err != nil {
				t.Fatalf("%s: %v", d.MediaType, err)
			}
		}
		return b
	}
	text, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var top, index manifest
	if err := json.Unmarshal(text, &top); err != nil {
		t.Fatal(err)
	}
	if len(top.Manifests) != 1 {
		t.Fatalf("the layout has %d images; more than one takes a name to load", len(top.Manifests))
	}
	blob(top.Manifests[0], &index)
	bills := make(map[string][]byte)
	var all []unpacked
	for _, d := range index.Manifests {
		var m manifest
		blob(d, &m)
		if of := d.Annotations["vnd.docker.reference.digest"]; of != "" {
			var statement struct {
				Predicate json.RawMessage
			}
			blob(m.Layers[0], &statement)
			bills[of] = statement.Predicate
			if m.Subject == nil || m.Subject.Digest != of {
				t.Errorf("the bill of %s has the subject %v", of, m.Subject)
			}
			continue
		}
		u := unpacked{arch: d.Platform.Architecture, sbom: []byte(d.Digest), size: m.Config.Size}
		blob(*m.Config, &u.config)
		if len(m.Layers) != 1 {
			t.Fatalf("%s has %d layers, want 1", u.arch, len(m.Layers))
		}
		packed := blob(m.Layers[0], nil)
		u.size += len(packed)
		u.binary = only(t, packed, u.config.RootFS.DiffIDs)
		all = append(all, u)
	}
	var archs []string
	for i := range all {
		archs = append(archs, all[i].arch)
		all[i].sbom = bills[string(all[i].sbom)]
		if len(all[i].sbom) == 0 {
			t.Errorf("%s has no bill of materials", all[i].arch)
		}
	}
	if d := cmp.Diff(architectures, archs); d != "" {
		t.Errorf("architectures (-want +got):\n%s", d)
	}
	return all
}

// only returns the one file of a layer.
func only(t *testing.T, packed []byte, diffs []string) []byte {
	t.Helper()
	g, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(g)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{digest(plain)}, diffs); d != "" {
		t.Errorf("digests of layers, uncompressed (-layer +configuration):\n%s", d)
	}
	r := tar.NewReader(bytes.NewReader(plain))
	h, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	if h.Name != "pillion" || h.Mode != 0o755 || h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
		t.Errorf("the layer has %+v", h)
	}
	content, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := r.Next(); err != io.EOF {
		t.Errorf("the layer has more than the binary: %v, %v", h, err)
	}
	return content
}

// layoutDir is where make image wrote, if that is what runs this.
func layoutDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv(shipped)
	if dir == "" {
		t.Skip("tests what make image writes: run make image")
	}
	return dir
}

func TestShipped(t *testing.T) {
	for _, u := range images(t, layoutDir(t)) {
		if n := len(u.binary); n > binaryMax {
			t.Errorf("%s: %d bytes, want %d at most", u.arch, n, binaryMax)
		}
		t.Logf("%s: %.1f MiB, %.1f MiB to pull", u.arch, float64(len(u.binary))/(1<<20), float64(u.size)/(1<<20))
		for _, label := range []string{"title", "description", "source", "licenses", "version", "created", "revision"} {
			if u.config.Config.Labels["org.opencontainers.image."+label] == "" {
				t.Errorf("%s: no label %s", u.arch, label)
			}
		}
		if d := cmp.Diff([]string{"/pillion"}, u.config.Config.Entrypoint); d != "" {
			t.Errorf("%s: entry point (-want +got):\n%s", u.arch, d)
		}
		checkBill(t, u.sbom, "github.com/cilium/ebpf", "github.com/spf13/cobra", "stdlib")
		checkStatic(t, u)
	}
}

// TestRuns runs the binary with nothing else in its root directory.
func TestRuns(t *testing.T) {
	dir := layoutDir(t)
	var machine unix.Utsname
	if err := unix.Uname(&machine); err != nil {
		t.Fatal(err)
	}
	arch := map[string]string{"x86_64": "amd64", "aarch64": "arm64"}[unix.ByteSliceToString(machine.Machine[:])]
	for _, u := range images(t, dir) {
		if u.arch != arch {
			t.Logf("%s: not run, this machine is %s", u.arch, arch)
			continue
		}
		want := fmt.Sprintf("pillion %s\n", u.config.Config.Labels["org.opencontainers.image.version"])
		t.Run("chroot", func(t *testing.T) {
			if os.Getuid() != 0 {
				t.Skip("chroot takes root")
			}
			root := t.TempDir()
			if err := os.WriteFile(filepath.Join(root, "pillion"), u.binary, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("/pillion", "version")
			cmd.Dir, cmd.Env, cmd.SysProcAttr = "/", []string{}, &unix.SysProcAttr{Chroot: root}
			check(t, cmd, want)
		})
		t.Run("podman", func(t *testing.T) { podman(t, dir, want) })
	}
}

// podman loads the archive and runs a container of it.
func podman(t *testing.T, dir, want string) {
	s := newStore(t)
	image := s.load(t, dir+".tar")
	parent := fmt.Sprintf("/pillion-image-%d", os.Getpid())
	t.Cleanup(func() { forgetCgroups(t, parent) })
	check(t, s.run("run", "--rm", "--network", "none", "--cgroup-parent", parent, "--read-only", "--cap-drop", "all", image, "version"), want)
}

// forgetCgroups removes what podman leaves of a parent, in every hierarchy.
func forgetCgroups(t *testing.T, parent string) {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		dirs, err := filepath.Glob(pattern + parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range dirs {
			// podman's monitor has one of its own below, and may be there for a moment.
			remove := exec.Command("find", dir, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+")
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
				out, err := remove.CombinedOutput()
				if err == nil {
					break
				}
				if time.Now().After(deadline) {
					t.Errorf("remove the cgroup %s: %v\n%s", dir, err, out)
					break
				}
				remove = exec.Command(remove.Args[0], remove.Args[1:]...)
			}
		}
	}
}

func check(t *testing.T, cmd *exec.Cmd, want string) {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || string(out) != want {
		t.Errorf("%v says %q, want %q: %v\n%s", cmd.Args, out, want, err, stderr.String())
	}
}

// TestElsewhere builds the image of the same tree in another directory.
func TestElsewhere(t *testing.T) {
	dir := layoutDir(t)
	const tree = "../.."
	files, err := exec.Command("git", "-C", tree, "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	if err != nil {
		t.Skipf("no checkout to copy: %v", err)
	}
	other := filepath.Join(t.TempDir(), "a", "longer path")
	if err := os.MkdirAll(other, 0o755); err != nil {
		t.Fatal(err)
	}
	copied := exec.Command("cp", "-r", "--parents", "--no-dereference", "--preserve=mode", "--target-directory", other, ".git")
	copied.Dir = tree
	for name := range strings.SplitSeq(strings.TrimRight(string(files), "\x00"), "\x00") {
		if _, err := os.Lstat(filepath.Join(tree, name)); err == nil {
			copied.Args = append(copied.Args, name)
		}
	}
	if out, err := copied.CombinedOutput(); err != nil {
		t.Fatalf("copy the tree: %v\n%s", err, out)
	}
	again := filepath.Join(t.TempDir(), "image")
	if err := run(other, again); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{dir + "/index.json", dir + ".tar"} {
		first, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		second, err := os.ReadFile(again + strings.TrimPrefix(name, dir))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, second) {
			t.Errorf("%s is another one when it is built in %s", name, other)
		}
	}
}
