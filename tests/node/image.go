package node

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// The images of a node.
const (
	// Pillion is the image of deploy/, as it is named there.
	Pillion = "ghcr.io/pillion-project/pillion:devel"
	// App is that of tests/node/app.
	App = "localhost/app:1"
	// pause is what holds a sandbox together: the same program.
	pause = "localhost/pause:1"
)

// appImage builds the application and writes its images into one archive.
func appImage(dir string) (string, error) {
	bin := filepath.Join(dir, "app")
	cmd := exec.Command("go", "build", "-trimpath", "-o", bin, "github.com/pillion-project/pillion/tests/node/app")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the application: %w\n%s", err, out)
	}
	content, err := os.ReadFile(bin)
	if err != nil {
		return "", err
	}
	var layer bytes.Buffer
	if err := writeTar(&layer, []entry{{"app", 0o755, content}}); err != nil {
		return "", err
	}
	var files []entry
	var index []any
	for name, args := range map[string][]string{App: nil, pause: {"pause"}} {
		config, err := json.Marshal(map[string]any{
			"architecture": runtime.GOARCH, "os": "linux",
			"config": map[string]any{"Entrypoint": []string{"/app"}, "Cmd": args},
			"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer.Bytes()))}},
		})
		if err != nil {
			return "", err
		}
		file := fmt.Sprintf("%x.json", sha256.Sum256(config))
		files = append(files, entry{file, 0o644, config})
		index = append(index, map[string]any{"Config": file, "RepoTags": []string{name}, "Layers": []string{"layer.tar"}})
	}
	manifest, err := json.Marshal(index)
	if err != nil {
		return "", err
	}
	var archive bytes.Buffer
	if err := writeTar(&archive, append(files, entry{"layer.tar", 0o644, layer.Bytes()}, entry{"manifest.json", 0o644, manifest})); err != nil {
		return "", err
	}
	name := filepath.Join(dir, "app.tar")
	return name, os.WriteFile(name, archive.Bytes(), 0o600)
}

type entry struct {
	name    string
	mode    int64
	content []byte
}

func writeTar(b *bytes.Buffer, files []entry) error {
	w := tar.NewWriter(b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.content))}); err != nil {
			return fmt.Errorf("write an image: %w", err)
		}
		if _, err := w.Write(f.content); err != nil {
			return fmt.Errorf("write an image: %w", err)
		}
	}
	return w.Close()
}
