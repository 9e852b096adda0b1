package main

import (
	"fmt"
	"io"
	"os"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"golang.org/x/sys/unix"
)

// A handler that is killed must come back also when its configuration file has become
// one that no start would take: its reload has refused that, and so the text that it
// took last is kept in memory that outlives it.

// lastGood is what it is called among the descriptors that are kept.
const lastGood = "configuration"

// keepConfiguration has the next worker know the text of a file, of which all was taken.
// What the file says by now may be something else.
func (s *survival) keepConfiguration(file string, text []byte) error {
	if s == nil || file == "" {
		return nil
	}
	fd, err := unix.MemfdCreate("configuration", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("keep the configuration: %w", err)
	}
	f := os.NewFile(uintptr(fd), file)
	if _, err := f.Write(text); err != nil {
		f.Close()
		return fmt.Errorf("keep the configuration: %w", err)
	}
	s.registry.KeepSocket(lastGood, fd)
	if s.text != nil {
		s.text.Close()
	}
	s.text = f
	return nil
}

// configuration returns what a killed worker went by, where the file is no use any more
// because of err.
func (s *survival) configuration(file string, err error) (*config.Config, error) {
	if s == nil || s.text == nil {
		return nil, err
	}
	text, readErr := io.ReadAll(io.NewSectionReader(s.text, 0, 1<<40))
	if readErr != nil {
		return nil, err
	}
	last, parseErr := config.Parse(file, text)
	if parseErr != nil {
		return nil, err
	}
	c, _, partErr := config.LoadPartial(file, last)
	if partErr != nil {
		return last, nil
	}
	return c, nil
}
