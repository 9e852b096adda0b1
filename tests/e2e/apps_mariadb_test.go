package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestMariaDB is a protocol whose server speaks first.
func TestMariaDB(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "mariadbd", "mariadb", "mariadb-install-db")
	r := rig.New(t)
	r.MariaDB(t)
	s := play(t, r, "")
	query := func(stdin, host string, args ...string) string {
		t.Helper()
		return runApp(t, r, stdin, "mariadb", append([]string{"--no-defaults", "-h", host, "-P", "3306", "--protocol=tcp",
			"-u", "root", "-N", "-B", "--connect-timeout=20", "--max-allowed-packet=64M"}, args...)...)
	}
	for _, host := range []string{"198.51.100.7", "2001:db8:7::7"} {
		same(t, "SELECT", query("", host, "-e", "SELECT 6 * 7"), "42")
		if out := query("", host, "-e", "status"); !strings.Contains(out, host+" via TCP/IP") {
			t.Errorf("status: %s", out)
		}
		// 10 MB in one row, and in many.
		if got, want := query("", host, "-e", "SELECT REPEAT('pillion...', 1000000)"), strings.Repeat("pillion...", 1000000)+"\n"; got != want {
			t.Errorf("%s: one row of %d bytes, want %d", host, len(got), len(want))
		}
	}
	var want, insert strings.Builder
	insert.WriteString("CREATE DATABASE far; CREATE TABLE far.lines (n INT PRIMARY KEY, line VARCHAR(60)); INSERT INTO far.lines VALUES ")
	for i := range 100000 {
		line := fmt.Sprintf("line %d of one hundred thousand lines, all the same", i)
		fmt.Fprintf(&want, "%d\t%s\n", i, line)
		if i > 0 {
			insert.WriteByte(',')
		}
		fmt.Fprintf(&insert, "(%d,'%s')", i, line)
	}
	query(insert.String(), "198.51.100.7")
	if got := query("", "198.51.100.7", "-e", "SELECT * FROM far.lines ORDER BY n"); got != want.String() {
		t.Errorf("%d bytes of rows, want %d", len(got), want.Len())
	}
	if n := s.AllRelayed(t, 8); n != 8 {
		t.Errorf("%d connections, want 8", n)
	}
}
