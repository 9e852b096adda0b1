package live

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestRotate moves the flow log away, as logrotate does: after a reload, by a signal or by
// the command, records go to a new file, and none is lost.
func TestRotate(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1)
	path := filepath.Join(t.TempDir(), "flows.jsonl")
	s := newStage(t, r, "flow_log: "+path+"\nservices:\n"+service(1, "", 1))
	written := func(file string) int {
		if _, err := os.Stat(file); err != nil {
			return 0
		}
		return len(rig.ReadFlows(t, file))
	}
	var old []string
	const each = 24 // connects of goes
	connects := 0
	goes := func() {
		t.Helper()
		s.goes(t, 1, 1)
		connects += each
	}
	for name, reload := range map[string]func(){
		"command": func() {
			if out, code := s.cli(t); code != 0 {
				t.Fatalf("exit code %d: %s", code, out)
			}
		},
		"signal": func() { s.Signal(t, unix.SIGHUP) },
	} {
		goes()
		old = append(old, path+"."+name)
		if err := os.Rename(path, old[len(old)-1]); err != nil {
			t.Fatal(err)
		}
		reload()
		goes()
		testutil.Eventually(t, rig.Limit, func() bool { return written(path) > 0 }, name, ": a record in a new file")
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		all := written(path)
		for _, file := range old {
			all += written(file)
		}
		return all == connects
	}, "one record of each connection in one of the files")
}
