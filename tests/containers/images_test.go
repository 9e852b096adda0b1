package containers

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

// envImage names the layout that scripts/image wrote; the archive is beside it.
const envImage = "PILLION_IMAGE"

// Images of the tests' own.
const (
	appName   = "localhost/app:test"
	pauseName = "localhost/pause:test"
)

// pause holds a pod's namespaces. It has one thread, as those of runtimes have.
const pause = `#include <unistd.h>
int main(void) { for (;;) pause(); }
`

// images are archives that containerd and podman load.
type images struct {
	pillion, pillionName string
	app, pause           string
	binary               string // app, for who wants it in another container
}

// newImages makes archives in a directory.
func newImages(t *testing.T, dir string) images {
	t.Helper()
	testutil.Need(t, "gcc")
	i, err := makeImages(dir)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// needImage skips the test without it.
func needImage(t *testing.T) {
	t.Helper()
	if os.Getenv(envImage) == "" {
		t.Skip(envImage + " is not set: make test-containers builds the image and runs this")
	}
}

func makeImages(dir string) (images, error) {
	layout := os.Getenv(envImage)
	i := images{pillion: layout + ".tar"}
	b, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		return i, fmt.Errorf("read the image: %w", err)
	}
	var index struct {
		Manifests []struct{ Annotations map[string]string }
	}
	if err := json.Unmarshal(b, &index); err != nil || len(index.Manifests) != 1 {
		return i, fmt.Errorf("read the image: %d manifests, %w", len(index.Manifests), err)
	}
	i.pillionName = index.Manifests[0].Annotations["io.containerd.image.name"]
	i.binary, i.app, i.pause = filepath.Join(dir, "app"), filepath.Join(dir, "app.tar"), filepath.Join(dir, "pause.tar")
	build := exec.Command("go", "build", "-o", i.binary, "./app")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	source, hold := filepath.Join(dir, "pause.c"), filepath.Join(dir, "pause")
	if err := os.WriteFile(source, []byte(pause), 0o600); err != nil {
		return i, err
	}
	for _, cmd := range []*exec.Cmd{build, exec.Command("gcc", "-static", "-Os", "-s", "-o", hold, source)} {
		if out, err := cmd.CombinedOutput(); err != nil {
			return i, fmt.Errorf("%s: %w\n%s", cmd, err, out)
		}
	}
	return i, errors.Join(archive(i.app, appName, i.binary), archive(i.pause, pauseName, hold))
}

// archive writes an image of one program, which is also what it starts, as an
// archive of an OCI layout.
func archive(file, name, program string) error {
	binary, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	base := filepath.Base(program)
	blobs := map[string][]byte{}
	keep := func(kind string, b []byte) map[string]any {
		digest := fmt.Sprintf("%x", sha256.Sum256(b))
		blobs["blobs/sha256/"+digest] = b
		return map[string]any{"mediaType": "application/vnd.oci.image." + kind, "digest": "sha256:" + digest, "size": len(b)}
	}
	layer, err := tarOf(map[string][]byte{base: binary})
	if err != nil {
		return err
	}
	l := keep("layer.v1.tar", layer)
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "config": map[string]any{"Entrypoint": []string{"/" + base}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []any{l["digest"]}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": keep("config.v1+json", config), "layers": []any{l},
	})
	if err != nil {
		return err
	}
	m := keep("manifest.v1+json", manifest)
	m["annotations"] = map[string]string{"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
	m["platform"] = map[string]string{"architecture": runtime.GOARCH, "os": "linux"}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{m}})
	if err != nil {
		return err
	}
	blobs["index.json"], blobs["oci-layout"] = index, []byte(`{"imageLayoutVersion":"1.0.0"}`)
	all, err := tarOf(blobs)
	if err != nil {
		return err
	}
	return os.WriteFile(file, all, 0o600)
}

func tarOf(files map[string][]byte) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return b.Bytes(), err
}
