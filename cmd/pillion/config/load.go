package config

import (
	"fmt"
	"io"
	"os"
	"slices"
)

// maxSize is how many bytes a configuration may have: the kernel side's tables
// are full before.
const maxSize = 8 << 20

// Load reads the configuration in the file at path. It is valid, and the
// caller owns it. All problems of the file are in one error, each on a line
// that begins with path:line:column.
func Load(path string) (*Config, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	defer f.Close()
	// One byte more than is allowed, so that Parse sees that it is too much.
	// What the file system says of the size is no guide: it may be a pipe.
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	return data, nil
}

// Parse reads a configuration from data, as [Load] does from a file. name is
// what errors call it.
func Parse(name string, data []byte) (*Config, error) {
	d, err := parseDraft(name, data, maxSize)
	if err != nil {
		return nil, err
	}
	if err := d.join(d.problems); err != nil {
		return nil, err
	}
	return &d.config, nil
}

// draft is a configuration with what is wrong with it.
type draft struct {
	*decoder
	config   Config
	problems []problem
	empty    bool // the file has nothing in it
}

// parseDraft reads what it can. An error means that data is not YAML, or more
// than most bytes.
func parseDraft(name string, data []byte, most int) (*draft, error) {
	w := &places{file: name, byPath: make(map[string]position)}
	body, err := parseYAML(w, data, most)
	if err != nil {
		return nil, err
	}
	d := &draft{config: Default(), decoder: &decoder{places: w, bad: make(map[string]bool)}}
	if d.empty = body == nil; !d.empty {
		d.decoder.config(&d.config, body)
	}
	// What was not understood has its default or nothing, which says nothing
	// about what the user wants.
	problems := slices.DeleteFunc(d.config.problems(), func(p problem) bool { return d.spoiled(p.path) })
	d.problems = append(d.found, problems...)
	w.remember(&d.config)
	return d, nil
}
