package e2e

import (
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// onTerminal runs a command on a terminal of its own, presses Ctrl-C when it
// says that it is ready, and prints what came and how it ended.
const onTerminal = `
import os, pty, select, sys
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
out, pressed = b"", False
while select.select([fd], [], [], 30)[0]:
    try:
        b = os.read(fd, 4096)
    except OSError:
        break
    if not b:
        break
    out += b
    if b"ready" in out and not pressed:
        os.write(fd, b"\x03")
        pressed = True
print(out.decode().replace("\r", ""), "code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
`

// TestExecTerminal: the command has the terminal, and what is typed there comes
// to it, once.
func TestExecTerminal(t *testing.T) {
	testutil.Need(t, "python3")
	r := rig.New(t)
	out := r.Output(t, "python3", "-c", onTerminal, rig.Binary(t), "exec", "--runtime-dir", r.Runtime, "--", "sh", "-c",
		"test -t 0 && test -t 1 && echo terminal; trap 'echo interrupted; n=1' INT; echo ready; while [ -z \"$n\" ]; do sleep 0.1; done; sleep 0.3; exit 5")
	if !strings.Contains(out, "terminal\n") || strings.Count(out, "interrupted") != 1 || !strings.Contains(out, "code 5") {
		t.Errorf("output %q", out)
	}
}

// prompting asks for a password as ssh and sudo do: on the terminal, whatever its input
// is. One that may not change the terminal is stopped there. A shell loses a Ctrl-C that
// comes while it starts sleep.
const prompting = `exec "$0" exec --runtime-dir "$1" -- sh -c 'stty -echo </dev/tty && echo changed; stty echo </dev/tty; exec python3 -uc "import time; print(\"ready\"); time.sleep(60)"' </dev/null`

// TestExecPrompt has a command that asks on the terminal although its input is none.
func TestExecPrompt(t *testing.T) {
	testutil.Need(t, "python3", "stty")
	r := rig.New(t)
	// Ctrl-C ends it.
	out := r.Output(t, "timeout", "--foreground", "-k", "1", "20", "python3", "-c", onTerminal, "/bin/sh", "-c", prompting, rig.Binary(t), r.Runtime)
	if !strings.Contains(out, "changed\n") || !strings.Contains(out, "code 130") {
		t.Errorf("output %q", out)
	}
}
