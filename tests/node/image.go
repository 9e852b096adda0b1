package node

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	_ "embed"
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
	// pause is that of sandboxes, of pause/pause.c.
	pause = "localhost/pause:1"
)

//go:embed pause/pause.c
var pauseSource []byte

// images builds the programs of tests and writes their images into one archive.
func images(dir string) (string, error) {
	app, sandbox := filepath.Join(dir, "app"), filepath.Join(dir, "pause")
	build := exec.Command("go", "build", "-trimpath", "-o", app, "github.com/pillion-project/pillion/tests/node/app")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the application: %w\n%s", err, out)
	}
	build = exec.Command("gcc", "-static", "-Os", "-s", "-o", sandbox, "-x", "c", "-")
	build.Stdin = bytes.NewReader(pauseSource)
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the sandbox's program: %w\n%s", err, out)
	}
	var files []entry
	var index []any
	for name, bin := range map[string]string{App: app, pause: sandbox} {
		content, err := os.ReadFile(bin)
		if err != nil {
			return "", err
		}
		var layer bytes.Buffer
		if err := writeTar(&layer, []entry{{filepath.Base(bin), 0o755, content}}); err != nil {
			return "", err
		}
		config, err := json.Marshal(map[string]any{
			"architecture": runtime.GOARCH, "os": "linux",
			"config": map[string]any{"Entrypoint": []string{"/" + filepath.Base(bin)}},
			"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer.Bytes()))}},
		})
		if err != nil {
			return "", err
		}
		names := fmt.Sprintf("%x", sha256.Sum256(config))
		files = append(files, entry{names + ".json", 0o644, config}, entry{names + ".tar", 0o644, layer.Bytes()})
		index = append(index, map[string]any{"Config": names + ".json", "RepoTags": []string{name}, "Layers": []string{names + ".tar"}})
	}
	manifest, err := json.Marshal(index)
	if err != nil {
		return "", err
	}
	var archive bytes.Buffer
	if err := writeTar(&archive, append(files, entry{"manifest.json", 0o644, manifest})); err != nil {
		return "", err
	}
	name := filepath.Join(dir, "images.tar")
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
