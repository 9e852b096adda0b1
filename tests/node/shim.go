package node

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
)

// shim is the name under which the test's binary is what containerd takes for
// runc: where a machine has cgroup v1, the v2 hierarchy lacks the controllers
// that the limits of containers take, and runc refuses them. So limits are left
// out there, and all else is runc's.
const shim = "runc-without-limits"

func runShim() int {
	args := os.Args[1:]
	switch {
	case slices.Contains(args, "update"):
		return 0
	case slices.Contains(args, "create"):
		if err := dropLimits(args); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	runc, err := exec.LookPath("runc")
	if err == nil {
		err = syscall.Exec(runc, append([]string{"runc"}, args...), os.Environ())
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

func dropLimits(args []string) error {
	bundle := "."
	for i, a := range args[:len(args)-1] {
		if a == "--bundle" {
			bundle = args[i+1]
		}
	}
	name := filepath.Join(bundle, "config.json")
	b, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("read the container's specification: %w", err)
	}
	var spec map[string]any
	if err := json.Unmarshal(b, &spec); err != nil {
		return fmt.Errorf("read the container's specification: %w", err)
	}
	linux := spec["linux"].(map[string]any)
	if r, ok := linux["resources"].(map[string]any); ok {
		linux["resources"] = map[string]any{"devices": r["devices"]}
	}
	if b, err = json.Marshal(spec); err != nil {
		return fmt.Errorf("write the container's specification: %w", err)
	}
	return os.WriteFile(name, b, 0o600)
}
