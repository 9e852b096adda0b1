package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// maxSize is how many bytes a configuration may have: the kernel side's tables
// are full before.
const maxSize = 8 << 20

// Load reads the configuration in the file at path. It is valid, and the
// caller owns it. All problems of the file are in one error, each on a line
// that begins with path:line:column.
func Load(path string) (*Config, error) {
	data, err := Read(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

// patience is how long a pipe may take to say all.
const patience = 30 * time.Second

// Read returns the text of the file at path, and of what is too long to be a
// configuration as much as [Parse] needs to say so.
func Read(path string) ([]byte, error) { return ReadWithin(path, patience) }

// ReadWithin is Read for who has something else to do than to wait for a pipe.
func ReadWithin(path string, limit time.Duration) ([]byte, error) {
	data, err := readWithin(path, limit)
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	return data, nil
}

func readWithin(path string, limit time.Duration) ([]byte, error) {
	// Not blocking: a named pipe without a writer would hold us up for ever, and no
	// signal ends an open.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	pipe := info.Mode()&os.ModeNamedPipe != 0
	if pipe {
		if err := f.SetReadDeadline(time.Now().Add(limit)); err != nil {
			return nil, err
		}
	}
	for {
		// One byte more than is allowed, so that Parse sees that it is too much.
		// What the file system says of the size is no guide: it may be a pipe.
		data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
		switch {
		case len(data) == 0 && errors.Is(err, os.ErrDeadlineExceeded):
			return nil, fmt.Errorf("%s is a pipe, and nobody wrote to it", path)
		case err != nil || len(data) > 0 || !pipe:
			return data, err
		default:
			// The writer may wait for a reader, and then take a moment.
			time.Sleep(pipePoll)
		}
	}
}

// pipePoll is how often a pipe without a writer is looked at.
const pipePoll = 10 * time.Millisecond

// Flags puts what a command line says on top of what a file says, before that is
// judged: it appends services and rules, sets settings, and notes all that by
// [Config.Said]. nil says nothing.
type Flags func(*Config)

// Parse reads a configuration from data, as [Load] does from a file. name is
// what errors call it.
func Parse(name string, data []byte) (*Config, error) { return Flags(nil).Parse(name, data) }

// Parse is the function [Parse], with the flags on top. An empty name means that there
// is no file.
func (f Flags) Parse(name string, data []byte) (*Config, error) {
	d, err := parseDraft(name, data, maxSize, f)
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
	own      int  // how many of the services are the file's; those of flags follow
}

// parseDraft reads what it can. An error means that data is not YAML, or more
// than most bytes.
func parseDraft(name string, data []byte, most int, flags Flags) (*draft, error) {
	w := &places{file: name, byPath: make(map[string]position)}
	body, err := parseYAML(w, data, most)
	if err != nil {
		return nil, err
	}
	d := &draft{config: Default(), decoder: &decoder{places: w, bad: make(map[string]bool)}}
	if d.empty = body == nil; !d.empty {
		d.decoder.config(&d.config, body)
	}
	w.remember(&d.config)
	d.own = len(d.config.Services)
	if flags != nil {
		flags(&d.config)
		w.flags = d.config.flags()
	}
	// What was not understood has its default or nothing, which says nothing
	// about what the user wants.
	problems := slices.DeleteFunc(d.config.problems(), func(p problem) bool {
		return d.spoiled(p.path) || slices.ContainsFunc(p.on, d.spoiled)
	})
	d.problems = append(d.found, problems...)
	return d, nil
}
