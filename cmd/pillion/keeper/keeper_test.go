package keeper_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/cmd/pillion/keeper"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// build makes the worker, with the keeper in it.
func build(t *testing.T) string {
	t.Helper()
	return testutil.Build(t, "keeper-worker", "-ldflags=-E=github.com/pillion-project/pillion/cmd/pillion/keeper.entry",
		"github.com/pillion-project/pillion/cmd/pillion/keeper/testdata/worker")
}

func code(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

// A build without the entry point works, and says that it has no keeper.
func TestNotLinked(t *testing.T) {
	if err := keeper.Start(); !errors.Is(err, keeper.ErrNotLinked) {
		t.Errorf("start: %v, want %v", err, keeper.ErrNotLinked)
	}
	if k := keeper.Of(); k != nil {
		t.Errorf("the test has a keeper: %+v", k)
	}
}

func TestEnds(t *testing.T) {
	path := build(t)
	for _, tt := range []struct {
		what  string
		code  int
		says  string
		lives int
	}{
		{"0", 0, "0 ", 1},
		{"75", 75, "0 ", 1},
		{"once", 0, "1 ", 2},                     // the next one ends in order
		{"panic", 1, "ten workers in a row", 10}, // and no end of it
	} {
		t.Run(tt.what, func(t *testing.T) {
			cmd := exec.Command(path, tt.what)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			err := cmd.Run()
			if got := code(err); got != tt.code || !strings.Contains(out.String(), tt.says) {
				t.Errorf("exit code %d, want %d and %q:\n%s", got, tt.code, tt.says, &out)
			}
			if lives := strings.Count(out.String(), "<nil>"); lives != tt.lives {
				t.Errorf("%d workers, want %d:\n%s", lives, tt.lives, &out)
			}
		})
	}
}

// What a worker has open when it is killed is there for the next one.
func TestLeft(t *testing.T) {
	out, err := exec.Command(build(t), "once").Output()
	if err != nil {
		t.Fatal(err)
	}
	var first, second struct{ deaths, open int }
	if _, err := fmt.Sscanf(string(out), "%d %d <nil>\n%d %d <nil>", &first.deaths, &first.open, &second.deaths, &second.open); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if first.deaths != 0 || second.deaths != 1 || second.open <= first.open {
		t.Errorf("two workers say %+v and %+v; want one death, and more that is open", first, second)
	}
}

// A signal to the keeper is the worker's, and its exit code the keeper's.
func TestSignal(t *testing.T) {
	cmd := exec.Command(build(t), "wait")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "waits"; {
	}
	worker, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
	for _, pid := range []string{strconv.Itoa(cmd.Process.Pid), strings.TrimSpace(string(worker))} {
		if name, err := os.ReadFile("/proc/" + pid + "/comm"); string(name) != "pillion\n" {
			t.Errorf("keeper or worker is called %q, %v", name, err)
		}
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := code(cmd.Wait()); got != 75 {
		t.Errorf("exit code %d, want 75", got)
	}
}
