package systemd

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig/app"
)

// service writes a unit for the application, called name, with these lines in
// [Service] besides; it does not start it. It may be a template.
func (m *machine) service(t testing.TB, name string, lines ...string) {
	t.Helper()
	m.write(t, units+"/"+name, fmt.Sprintf(`[Unit]
Description=An application
StartLimitIntervalSec=0
[Service]
Type=exec
ExecStart=/usr/local/bin/application
Environment=%s=/run/%%n.sock
%s
`, app.Env, strings.Join(lines, "\n")))
}

// client is the application of one service, from the test's side.
type client struct{ *app.Application }

// client connects to the application that a service runs.
func (m *machine) client(t testing.TB, name string) client {
	t.Helper()
	c := client{app.Connect(t, m.path(filepath.Join("/run", name+".sock")))}
	c.Patience = 5 * time.Second
	return c
}

// load connects all the time, until Unload: workers one after the other, and open
// connections stay, with checked bytes both ways that are never idle.
func (c client) load(t testing.TB, workers, open int, to ...netip.AddrPort) {
	t.Helper()
	c.Load(t, app.Load{
		To: to, Named: true, Stay: open, Kinds: []app.Kind{app.Stream}, Every: 2 * time.Millisecond,
		Come: workers, Visits: []app.Kind{app.Greet}, Pause: 3 * time.Millisecond, // the load is not what is tested
	})
}
