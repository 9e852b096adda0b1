package suites

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// cache makes the directory of a build that depends on these files. It stays,
// for the next run. Nobody else builds in it until done is called.
func cache(name string, inputs ...string) (dir string, done func(), err error) {
	sum := sha256.New()
	fmt.Fprintln(sum, runtime.Version())
	for _, file := range inputs {
		text, err := os.ReadFile(file)
		if err != nil {
			return "", nil, err
		}
		fmt.Fprintf(sum, "%s %d\n%s", filepath.Base(file), len(text), text)
	}
	base := os.Getenv("XDG_CACHE_HOME")
	if base == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", nil, err
		}
		base = filepath.Join(home, ".cache")
	}
	dir = filepath.Join(base, "pillion", fmt.Sprintf("%s-%.8x", name, sum.Sum(nil)))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, err
	}
	lock, err := os.Open(dir)
	if err != nil {
		return "", nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		lock.Close()
		return "", nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return dir, func() { lock.Close() }, nil
}

// tools builds the programs of the module below tools, and returns where.
var tools = sync.OnceValues(func() (string, error) {
	inputs := []string{"tools/go.mod", "tools/go.sum"}
	sources, err := filepath.Glob("tools/*/*.go")
	if err != nil {
		return "", err
	}
	dir, done, err := cache("tools", slices.Concat(inputs, sources)...)
	if err != nil {
		return "", err
	}
	defer done()
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "tool", "./...")
	cmd.Dir = "tools"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build tools: %w\n%s", err, out)
	}
	return dir, nil
})

// tool returns the path of a program of the module below tools.
func tool(t testing.TB, name string) string {
	t.Helper()
	dir, err := tools()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	return path
}
