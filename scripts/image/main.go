package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// architectures are what an image is made for. The BPF objects serve all of
// them: every one is little-endian.
var architectures = []string{"amd64", "arm64"}

// binaryMax is how many bytes an image may have, unpacked.
const binaryMax = 25 << 20

const repository = "ghcr.io/pillion-project/pillion"

// commit is what is built.
type commit struct {
	revision string // empty: no checkout
	version  string
	time     time.Time
}

func main() {
	out := flag.String("o", "build/image", "directory of the layout; the archive is written beside it")
	tree := flag.String("C", ".", "root of the source")
	flag.Parse()
	if err := run(*tree, *out); err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}

// run builds the image of a source tree, and says what it made.
func run(tree, out string) error {
	c, err := look(tree)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "pillion-image")
	if err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	defer os.RemoveAll(work)
	var parts []part
	for _, arch := range architectures {
		binary := filepath.Join(work, arch)
		if err := compile(tree, binary, arch, c); err != nil {
			return err
		}
		p, err := read(binary, arch, c)
		if err != nil {
			return err
		}
		parts = append(parts, p)
	}
	l, err := assemble(parts, c)
	if err != nil {
		return err
	}
	if err := l.writeDir(out); err != nil {
		return err
	}
	if err := l.writeArchive(out+".tar", c.time); err != nil {
		return err
	}
	for _, p := range parts {
		name := filepath.Join(filepath.Dir(out), "pillion-"+p.arch+".spdx.json")
		if err := os.WriteFile(name, p.sbom, 0o644); err != nil {
			return fmt.Errorf("write the bill of materials: %w", err)
		}
		fmt.Printf("%s: %s, %.1f MiB\n", p.arch, p.digest, float64(len(p.binary))/(1<<20))
	}
	fmt.Printf("%s:%s@%s\n", repository, c.tag(), l.root.Digest)
	return nil
}

// look asks git what the tree is. In an archive without git, it is nothing that
// could be named.
func look(tree string) (commit, error) {
	git := func(args ...string) (string, error) {
		out, err := exec.Command("git", append([]string{"-C", tree}, args...)...).Output()
		return strings.TrimSpace(string(out)), err
	}
	c := commit{version: "devel", time: time.Unix(0, 0).UTC()}
	head, err := git("rev-parse", "HEAD")
	if err != nil {
		return c, nil
	}
	c.revision, c.version = head, "devel-"+head[:12]
	if tag, err := git("describe", "--exact-match", "--tags", "--match", "v[0-9]*"); err == nil {
		c.version = strings.TrimPrefix(tag, "v")
	}
	changes, err := git("status", "--porcelain")
	if err != nil {
		return c, fmt.Errorf("ask git for changes: %w", err)
	}
	if changes != "" {
		c.version += "+changes"
	}
	seconds, err := git("log", "-1", "--format=%ct")
	if err != nil {
		return c, fmt.Errorf("ask git for the commit's time: %w", err)
	}
	n, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return c, fmt.Errorf("read the commit's time: %w", err)
	}
	c.time = time.Unix(n, 0).UTC()
	return c, nil
}

// tag is the version in the letters that a tag may have.
func (c commit) tag() string { return strings.ReplaceAll(c.version, "+", "-") }

// keeperEntry is the linker's flag of the Makefile: without it there is no survive: crash.
const keeperEntry = "-E=github.com/pillion-project/pillion/cmd/pillion/keeper.entry"

// compile builds the binary. Everything in the environment that would change it
// is set, and what git knows goes in by the version alone: Go's own stamp depends
// on how deep the checkout is.
func compile(tree, binary, arch string, c commit) error {
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-mod=readonly",
		"-ldflags", "-s -w -buildid= "+keeperEntry+" -X main.version="+c.version, "-o", binary, "./cmd/pillion")
	cmd.Dir = tree
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch,
		"GOAMD64=v1", "GOARM64=v8.0", "GOFLAGS=", "GOEXPERIMENT=", "GOFIPS140=off", "GOWORK=off")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build for %s: %w", arch, err)
	}
	return nil
}

// read takes what was compiled, if it may be shipped.
func read(binary, arch string, c commit) (part, error) {
	b, err := os.ReadFile(binary)
	if err != nil {
		return part{}, fmt.Errorf("read the binary: %w", err)
	}
	if len(b) > binaryMax {
		return part{}, fmt.Errorf("the binary for %s has %d bytes, and %d are the most", arch, len(b), binaryMax)
	}
	sbom, err := bill(b, arch, c)
	if err != nil {
		return part{}, err
	}
	return part{arch: arch, binary: b, sbom: sbom}, nil
}
