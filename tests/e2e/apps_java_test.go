package e2e

import (
	"os/exec"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

func TestJava(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "java", "javac")
	classes := t.TempDir()
	if out, err := exec.Command("javac", "-d", classes, "testdata/Client.java").CombinedOutput(); err != nil {
		t.Fatalf("javac: %v\n%s", err, out)
	}
	r := rig.New(t)
	r.Serve(t, at4(7), echoBack)
	r.Serve(t, at6(7), echoBack)
	r.ServeHTTP(t, at4(8080), webSite())
	s := play(t, r, "")
	same(t, "java", runApp(t, r, "", "java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", classes, "Client"), `
selected /198.51.100.7:7 /192.0.2.1 20
selected /[2001:db8:7:0:0:0:0:7]:7 /2001:db8:1:0:0:0:0:1 20
http 5 20000000`)
	// A single connection for all that HTTP asks.
	if n := s.AllRelayed(t, 40+1); n != 41 {
		t.Errorf("%d connections, want 41", n)
	}
}
