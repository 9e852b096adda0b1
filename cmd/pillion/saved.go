package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// savedMax is how many ended commands are remembered.
const savedMax = 16

// saved is what a command leaves behind: its flows, to be looked at afterwards.
type saved struct {
	Command []string      `json:"command"`
	Ended   time.Time     `json:"ended"`
	Status  admin.Status  `json:"status"`
	Flows   []flow.Record `json:"flows"`
}

func (s *saved) command() string { return strings.Join(s.Command, " ") }

// errNoInstance means that no instance runs, or none of that name.
var errNoInstance = errors.New("no instance is running")

func (g *global) savedDir() string { return filepath.Join(g.runtime, "ended") }

// save keeps what is known of a command that has ended.
func (i *instance) save(command []string) error {
	status, err := i.status(context.Background())
	if err != nil {
		return err
	}
	status.Ready = false
	b, err := json.Marshal(saved{Command: command, Ended: time.Now(), Status: status, Flows: i.collector.History()})
	if err != nil {
		return fmt.Errorf("save flows: %w", err)
	}
	dir := i.global.savedDir()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("save flows: %w", err)
	}
	path := filepath.Join(dir, i.name+".json")
	// In one step: whoever lists meanwhile sees all of it or nothing.
	err = os.WriteFile(path+".new", b, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		_ = os.Remove(path + ".new") // half of it, on a full disk
		return fmt.Errorf("save flows: %w", err)
	}
	return i.global.pruneSaved()
}

// savedFiles lists the files of ended commands, the latest last.
func (g *global) savedFiles() ([]string, error) {
	entries, err := os.ReadDir(g.savedDir())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list ended commands: %w", err)
	}
	type file struct {
		name string
		when time.Time
	}
	var files []file
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && strings.HasSuffix(e.Name(), ".json") {
			files = append(files, file{e.Name(), info.ModTime()})
		}
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Or(a.when.Compare(b.when), cmp.Compare(a.name, b.name)) })
	var names []string
	for _, f := range files {
		names = append(names, filepath.Join(g.savedDir(), f.name))
	}
	return names, nil
}

func (g *global) pruneSaved() error {
	files, err := g.savedFiles()
	if err != nil {
		return err
	}
	for len(files) > savedMax {
		// Another command may be pruning too.
		if err := os.Remove(files[0]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("forget an ended command: %w", err)
		}
		files = files[1:]
	}
	return nil
}

// loadSaved reads what the command of that name, or the last one, left.
func (g *global) loadSaved(name string) (*saved, error) {
	files, err := g.savedFiles()
	if err != nil {
		return nil, err
	}
	if name != "" {
		want := filepath.Join(g.savedDir(), name+".json")
		files = slices.DeleteFunc(files, func(f string) bool { return f != want })
	}
	if len(files) == 0 {
		return nil, errors.New("no command has ended either")
	}
	file := files[len(files)-1]
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read flows: %w", err)
	}
	s := &saved{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("read flows in %s: %w", file, err)
	}
	return s, nil
}

// printSummary prints the flows for --summary.
func (i *instance) printSummary() error { return printFlows(os.Stderr, i.collector.History()) }
