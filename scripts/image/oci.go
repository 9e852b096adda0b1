package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Media types of the image specification, and of what BuildKit attaches.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
	typeInToto   = "application/vnd.in-toto+json"
	typeSPDX     = "https://spdx.dev/Document"
)

// part is the image of one architecture.
type part struct {
	arch         string
	binary, sbom []byte
	digest       string // of its manifest
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    *platform         `json:"platform,omitempty"`
}

// manifest is that of an image or an index.
type manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Config        *descriptor       `json:"config,omitempty"`
	Layers        []descriptor      `json:"layers,omitempty"`
	Manifests     []descriptor      `json:"manifests,omitempty"`
	Subject       *descriptor       `json:"subject,omitempty"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

type settings struct {
	Entrypoint []string          `json:"Entrypoint,omitempty"`
	WorkingDir string            `json:"WorkingDir,omitempty"`
	Env        []string          `json:"Env,omitempty"`
	Labels     map[string]string `json:"Labels,omitempty"`
}

type rootfs struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

type imageConfig struct {
	Created string `json:"created,omitempty"`
	platform
	Config settings `json:"config"`
	RootFS rootfs   `json:"rootfs"`
}

// layout is an OCI image layout in memory.
type layout struct {
	blobs map[string][]byte // by digest
	root  descriptor
}

// add keeps a blob.
func (l *layout) add(mediaType string, b []byte) descriptor {
	d := descriptor{MediaType: mediaType, Digest: digest(b), Size: len(b)}
	l.blobs[d.Digest] = b
	return d
}

// addJSON keeps a document.
func (l *layout) addJSON(mediaType string, v any) (descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, fmt.Errorf("write %s: %w", mediaType, err)
	}
	return l.add(mediaType, b), nil
}

func digest(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// assemble joins the parts, and gives each its digest.
func assemble(parts []part, c commit) (*layout, error) {
	l := &layout{blobs: make(map[string][]byte)}
	labels := c.labels()
	var images, bills []descriptor
	for i := range parts {
		p := &parts[i]
		image, err := l.image(p, c, labels)
		if err != nil {
			return nil, err
		}
		p.digest = image.Digest
		attached, err := l.attach(p, image)
		if err != nil {
			return nil, err
		}
		images, bills = append(images, image), append(bills, attached)
	}
	var err error
	l.root, err = l.addJSON(typeIndex, manifest{
		SchemaVersion: 2, MediaType: typeIndex, Manifests: append(images, bills...), Annotations: labels,
	})
	if err != nil {
		return nil, err
	}
	l.root.Annotations = map[string]string{
		"org.opencontainers.image.ref.name": c.tag(),
		"io.containerd.image.name":          repository + ":" + c.tag(),
	}
	return l, nil
}

// labels are the same in the configuration of each image and on the index.
func (c commit) labels() map[string]string {
	const name = "org.opencontainers.image."
	labels := map[string]string{
		name + "title":         "Pillion",
		name + "description":   "A transparent networking sidecar in Go and eBPF",
		name + "url":           "https://github.com/pillion-project/pillion",
		name + "source":        "https://github.com/pillion-project/pillion",
		name + "documentation": "https://github.com/pillion-project/pillion/tree/main/docs",
		name + "licenses":      "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)",
		name + "vendor":        "The Pillion project",
		name + "version":       c.version,
		name + "created":       c.time.Format(time.RFC3339),
	}
	if c.revision != "" {
		labels[name+"revision"] = c.revision
	}
	return labels
}

func (l *layout) image(p *part, c commit, labels map[string]string) (descriptor, error) {
	plain, packed, err := layer(p.binary, c.time)
	if err != nil {
		return descriptor{}, err
	}
	where := platform{Architecture: p.arch, OS: "linux"}
	config, err := l.addJSON(typeConfig, imageConfig{
		Created:  c.time.Format(time.RFC3339),
		platform: where,
		Config: settings{
			Entrypoint: []string{"/pillion"}, WorkingDir: "/", Env: []string{"PATH=/"}, Labels: labels,
		},
		RootFS: rootfs{Type: "layers", DiffIDs: []string{digest(plain)}},
	})
	if err != nil {
		return descriptor{}, err
	}
	d, err := l.addJSON(typeManifest, manifest{
		SchemaVersion: 2, MediaType: typeManifest, Config: &config,
		Layers: []descriptor{l.add(typeLayer, packed)}, Annotations: labels,
	})
	d.Platform = &where
	return d, err
}

// attach adds the bill of materials of an image, as a statement about it.
func (l *layout) attach(p *part, image descriptor) (descriptor, error) {
	type subject struct {
		Name   string            `json:"name"`
		Digest map[string]string `json:"digest"`
	}
	statement, err := l.addJSON(typeInToto, struct {
		Type      string          `json:"_type"`
		Predicate string          `json:"predicateType"`
		Subject   []subject       `json:"subject"`
		SPDX      json.RawMessage `json:"predicate"`
	}{
		"https://in-toto.io/Statement/v0.1", typeSPDX,
		[]subject{{repository, map[string]string{"sha256": image.Digest[len("sha256:"):]}}}, p.sbom,
	})
	if err != nil {
		return descriptor{}, err
	}
	statement.Annotations = map[string]string{"in-toto.io/predicate-type": typeSPDX}
	nowhere := platform{Architecture: "unknown", OS: "unknown"}
	config, err := l.addJSON(typeConfig, imageConfig{
		platform: nowhere, RootFS: rootfs{Type: "layers", DiffIDs: []string{statement.Digest}},
	})
	if err != nil {
		return descriptor{}, err
	}
	d, err := l.addJSON(typeManifest, manifest{
		SchemaVersion: 2, MediaType: typeManifest, Config: &config, Layers: []descriptor{statement},
		Subject: &descriptor{MediaType: image.MediaType, Digest: image.Digest, Size: image.Size},
	})
	d.Platform = &nowhere
	d.Annotations = map[string]string{
		"vnd.docker.reference.type":   "attestation-manifest",
		"vnd.docker.reference.digest": image.Digest,
	}
	return d, err
}

// layer makes a layer with the binary in it, as it is and compressed.
func layer(binary []byte, when time.Time) (plain, packed []byte, err error) {
	var b, z bytes.Buffer
	w := tar.NewWriter(&b)
	if err := file(w, "pillion", binary, 0o755, when); err != nil {
		return nil, nil, err
	}
	if err := w.Close(); err != nil {
		return nil, nil, fmt.Errorf("end a layer: %w", err)
	}
	g, err := gzip.NewWriterLevel(&z, gzip.BestCompression)
	if err != nil {
		return nil, nil, fmt.Errorf("compress a layer: %w", err)
	}
	_, err = g.Write(b.Bytes())
	if err := errors.Join(err, g.Close()); err != nil {
		return nil, nil, fmt.Errorf("compress a layer: %w", err)
	}
	return b.Bytes(), z.Bytes(), nil
}

// file adds a file of root's.
func file(w *tar.Writer, name string, content []byte, mode int64, when time.Time) error {
	err := w.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Mode: mode, ModTime: when, Format: tar.FormatUSTAR,
	})
	if err == nil {
		_, err = w.Write(content)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// files calls do for every file of the layout, in a fixed order.
func (l *layout) files(do func(name string, content []byte) error) error {
	index, err := json.Marshal(manifest{SchemaVersion: 2, MediaType: typeIndex, Manifests: []descriptor{l.root}})
	if err != nil {
		return fmt.Errorf("write the index: %w", err)
	}
	if err := do("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	if err := do("index.json", index); err != nil {
		return err
	}
	for _, d := range slices.Sorted(maps.Keys(l.blobs)) {
		if err := do("blobs/sha256/"+d[len("sha256:"):], l.blobs[d]); err != nil {
			return err
		}
	}
	return nil
}

// writeDir writes the layout as a directory, instead of what was there.
func (l *layout) writeDir(dir string) error {
	for _, old := range []string{"blobs", "index.json", "oci-layout"} {
		if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
			return fmt.Errorf("remove an older image: %w", err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return fmt.Errorf("make the layout: %w", err)
	}
	return l.files(func(name string, content []byte) error {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return fmt.Errorf("write the layout: %w", err)
		}
		return nil
	})
}

// writeArchive writes the layout as what docker, podman and ctr load.
func (l *layout) writeArchive(name string, when time.Time) error {
	f, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("write the archive: %w", err)
	}
	return errors.Join(l.archive(f, when), f.Close())
}

func (l *layout) archive(out io.Writer, when time.Time) error {
	w := tar.NewWriter(out)
	err := l.files(func(name string, content []byte) error { return file(w, name, content, 0o644, when) })
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("end the archive: %w", err)
	}
	return nil
}
