package suites

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestMQTT has a subscriber whose broker ends and starts again, and a publisher
// in each quality of service.
func TestMQTT(t *testing.T) {
	testutil.Need(t, "mosquitto", "mosquitto_sub", "mosquitto_pub")
	r := rig.New(t)
	at := at6(1883)
	r.Give(t, at.Addr())
	config := filepath.Join(t.TempDir(), "mosquitto.conf")
	text := fmt.Sprintf("listener %d %s\nallow_anonymous true\nuser root\nmax_queued_messages 0\n", at.Port(), at.Addr())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	serve := func(t testing.TB, stop unix.Signal) (end func()) {
		return r.Daemon(t, exec.Command("mosquitto", "-c", config), stop, at)
	}
	where := []string{"-h", at.Addr().String(), "-p", fmt.Sprint(at.Port()), "-V", "mqttv311"}
	messages, rounds := amount(500, 5000), amount(2, 9)
	var lines strings.Builder
	for i := range messages {
		fmt.Fprintf(&lines, "message %d of %d\n", i, messages)
	}
	twice(t, r, 1+4*rounds, func(t testing.TB) []string {
		end := serve(t, unix.SIGTERM)
		// It says what it does, too. Only a subscription that was
		// acknowledged gets messages.
		d := start(t, r, "stdbuf", append(append([]string{"-oL", "mosquitto_sub"}, where...), "-d", "-i", "ear", "-q", "2", "-t", "news", "-F", "got %p")...)
		d.hear(t, "Subscribed")
		for round := range rounds {
			for qos := range 3 {
				app(t, r, lines.String()+fmt.Sprintf("end of %d\n", qos), "mosquitto_pub", append(where, "-i", fmt.Sprintf("mouth%d", qos), "-q", fmt.Sprint(qos), "-t", "news", "-l")...)
				d.hear(t, fmt.Sprintf("got end of %d", qos))
			}
			end()
			end = serve(t, []unix.Signal{unix.SIGTERM, unix.SIGKILL}[round%2])
			d.hear(t, "Subscribed")
		}
		// The next play's has the same name.
		d.kill()
		end()
		return heard(t, d.said, rounds*3*(messages+1))
	})
}

// heard returns what a subscriber got, and how often it subscribed.
func heard(t testing.TB, said []string, want int) (all []string) {
	t.Helper()
	subscribed := 0
	for _, line := range said {
		switch {
		case strings.HasPrefix(line, "got "):
			all = append(all, line)
		case strings.HasPrefix(line, "Subscribed"):
			subscribed++
		}
	}
	if len(all) != want {
		t.Errorf("the subscriber got %d messages, want %d", len(all), want)
	}
	return append(all, fmt.Sprintf("subscribed %d times", subscribed))
}
