package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/redirect/upstream/discover/watch"
)

const (
	// maxSize is how many bytes a file may have: what fits into a ConfigMap,
	// eight times. maxYAML is less, since the parser of YAML needs some hundred
	// times of it in memory: it is 10,000 endpoints with everything.
	maxSize = 8 << 20
	maxYAML = 1 << 20
	// maxValues is how many values, or tokens of YAML, a file may have.
	maxValues = 1 << 18
)

// Source is the endpoints that stand in one file.
type Source struct{ path string }

// New returns the source that reads the file at path, whose name ends in .json,
// .yml or .yaml. The file need not exist.
func New(path string) (*Source, error) {
	if path == "" {
		return nil, errors.New("no path")
	}
	if _, err := formatOf(path); err != nil {
		return nil, err
	}
	return &Source{path: path}, nil
}

// Run is as in [discover.Source]. A file that is missing, is empty, or has any
// problem is an error; an empty list is an answer.
func (s *Source) Run(ctx context.Context, out chan<- discover.Snapshot) error {
	t := discover.NewTeller(out)
	return watch.File(ctx, s.path, func() {
		endpoints, err := Load(s.path)
		if err != nil {
			t.Fail(ctx, err)
			return
		}
		t.Set(ctx, endpoints)
	})
}

// Load reads the endpoints in the file at path, as [Parse] does.
func Load(path string) ([]discover.Endpoint, error) {
	// Not blocking: a pipe without a writer would hold us up for ever.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read endpoints: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read endpoints: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read endpoints: %s is no regular file", path)
	}
	// One byte more than is allowed, so that Parse sees that it is too much.
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read endpoints: %w", err)
	}
	return Parse(path, data)
}

// Parse reads endpoints from data, sorted by address. name is what errors call
// it, and its extension tells the format. All problems are in one error, each on
// a line that begins with name:line:column.
func Parse(name string, data []byte) ([]discover.Endpoint, error) {
	read, err := formatOf(name)
	if err != nil {
		return nil, err
	}
	p := &problems{file: name}
	if len(data) > maxSize {
		p.add(position{1, 1}, "more than %d bytes: these are no endpoints", maxSize)
		return nil, p.join()
	}
	root := read(p, data)
	if p.none() {
		endpoints := interpret(p, root)
		if p.none() {
			return endpoints, nil
		}
	}
	return nil, p.join()
}

// formatOf returns what reads a file of that name.
func formatOf(name string) (func(p *problems, data []byte) *node, error) {
	switch ext := strings.ToLower(filepath.Ext(name)); ext {
	case ".json":
		return readJSON, nil
	case ".yml", ".yaml":
		return readYAML, nil
	default:
		return nil, fmt.Errorf("%s: the name tells the format: want one that ends in .json, .yml or .yaml", name)
	}
}
