package e2e

import (
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

func TestPythonAsyncio(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "python3")
	r := rig.New(t)
	r.Serve(t, at4(7), echoBack)
	r.Serve(t, at6(7), echoBack)
	s := play(t, r, "")
	same(t, "asyncio", runApp(t, r, "", "python3", "testdata/python_asyncio.py"), "100 of 100 are the same")
	if n := s.AllRelayed(t, 100); n != 100 {
		t.Errorf("%d connections, want 100", n)
	}
}
