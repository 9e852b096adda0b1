package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A signal that came before there was a command is its end: what is typed at a terminal
// comes once.
func TestEndedBefore(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ran")
	c := &child{cmd: exec.Command("touch", file), signals: make(chan os.Signal, 2), terminal: true}
	c.signals <- unix.SIGWINCH
	c.signals <- unix.SIGINT
	if code, err := c.run(); code != exitSignal+int(unix.SIGINT) || err != nil {
		t.Errorf("exit code %d, %v", code, err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("the command was run")
	}
	c = &child{cmd: exec.Command("touch", file), signals: make(chan os.Signal, 2), terminal: true}
	c.signals <- unix.SIGWINCH
	if code, err := c.run(); code != 0 || err != nil {
		t.Errorf("exit code %d, %v", code, err)
	}
}
