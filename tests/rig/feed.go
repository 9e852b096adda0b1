package rig

import (
	"bytes"
	"fmt"
	"strings"
	"time"
)

// Feed runs a program as an application, with its text on stdin, for limit at
// most, and returns what it wrote to stdout. The error of a program that failed
// has what it wrote to stderr.
func (r *Rig) Feed(limit time.Duration, stdin, name string, args ...string) (string, error) {
	cmd := r.Command(name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := r.Start(cmd); err != nil {
		return "", err
	}
	late := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	defer late.Stop()
	if err := cmd.Wait(); err != nil {
		return stdout.String(), fmt.Errorf("%w: %s", err, stderr.String())
	}
	return stdout.String(), nil
}
