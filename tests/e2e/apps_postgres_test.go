package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

func TestPostgreSQL(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "psql", "pgbench")
	r := rig.New(t)
	r.PostgreSQL(t)
	s := play(t, r, "")
	psql := func(host, options, statement string) string {
		t.Helper()
		return runApp(t, r, "", "psql", rig.SQL(host, options, statement)...)
	}

	// The client asks whether TLS is spoken, and waits for one byte.
	const whether = "select ssl, inet_server_addr(), inet_server_port() from pg_stat_ssl where pid = pg_backend_pid()"
	same(t, "TLS required", psql("198.51.100.7", "sslmode=require", whether), "t|198.51.100.7|5432")
	same(t, "TLS preferred, IPv6", psql("2001:db8:7::7", "sslmode=prefer", whether), "t|2001:db8:7::7|5432")
	same(t, "TLS disabled", psql("198.51.100.7", "sslmode=disable", whether), "f|198.51.100.7|5432")
	conns := 3

	// COPY in and out.
	var rows bytes.Buffer
	for i := range 200000 {
		fmt.Fprintf(&rows, "%d\trow %d %x\n", i, i, i*7919)
	}
	file := filepath.Join(t.TempDir(), "rows")
	if err := os.WriteFile(file, rows.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	psql("198.51.100.7", "sslmode=disable", "create table rows (n int primary key, text text)")
	psql("198.51.100.7", "sslmode=disable", `\copy rows from '`+file+`'`)
	for _, mode := range []string{"disable", "require"} {
		if got := psql("198.51.100.7", "sslmode="+mode, `\copy (select * from rows order by n) to stdout`); got != rows.String() {
			t.Errorf("sslmode %s: COPY out gives %d bytes, not the %d that went in", mode, len(got), rows.Len())
		}
	}
	conns += 4

	out, looks := r.Cancel(t)
	if !strings.Contains(out, "canceling statement due to user request") {
		t.Errorf("psql: %s", out)
	}
	conns += looks

	// pgbench with connections kept, and with one for each transaction.
	pgbench := func(args ...string) string {
		t.Helper()
		return runApp(t, r, "", "pgbench", append([]string{"-h", "198.51.100.7", "-p", "5432", "-U", "postgres"}, args...)...)
	}
	pgbench("-i", "-q", "-s", "1", "postgres")
	for want, args := range map[string][]string{
		"processed: 400/400\n": {"-c", "8", "-j", "2", "-t", "50", "-n", "postgres"},
		"processed: 60/60\n":   {"-c", "4", "-t", "15", "-C", "-n", "postgres"},
	} {
		if out := pgbench(args...); !strings.Contains(out, want) {
			t.Errorf("pgbench does not say %q: %s", want, out)
		}
	}
	same(t, "transactions", psql("198.51.100.7", "", "select count(*) from pgbench_history"), "460")
	s.AllRelayed(t, conns+1+8+60+1)
}
