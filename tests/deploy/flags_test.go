package deploy

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
)

// TestFlags wants the binary to know what the manifests and the unit tell it.
func TestFlags(t *testing.T) {
	commands := make(map[string]bool)
	note := func(words []string) { commands[strings.Join(words, "\x00")] = true }
	for _, tt := range append(pods, struct {
		file           string
		native, podman bool
		container      []string
	}{file: "kubernetes/webhook.yaml"}) {
		for _, o := range documents(t, tt.file) {
			spec := podOf(o)
			for _, c := range append(list(at(spec, "initContainers")), list(at(spec, "containers"))...) {
				if !strings.Contains(fmt.Sprint(at(c, "image")), "/pillion:") {
					continue
				}
				note(words(at(c, "args")))
				for _, p := range []string{"startupProbe", "livenessProbe"} {
					if probe := words(at(c, p, "exec", "command")); len(probe) > 0 {
						note(probe[1:])
					}
				}
			}
		}
	}
	for line := range strings.Lines(unitText(t, "pillion@.service")) {
		if _, command, ok := strings.Cut(strings.TrimSpace(line), "=/usr/local/bin/pillion "); ok {
			note(strings.Fields(command))
		}
	}
	if len(commands) < 7 {
		t.Errorf("%d commands: does this test still find all?", len(commands))
	}
	for c := range commands {
		// Flags are read up to the last, so that an unknown one is an error.
		args := append(strings.Split(c, "\x00"), "--help")
		if out, err := exec.Command(rig.Binary(t), args...).CombinedOutput(); err != nil || !strings.Contains(string(out), "pillion "+args[0]) {
			t.Errorf("pillion %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

func words(v any) []string {
	var all []string
	for _, w := range list(v) {
		all = append(all, fmt.Sprint(w))
	}
	return all
}
