package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// sql prepares the arguments of psql for one statement.
func sql(host, options, statement string) []string {
	return []string{"-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d", fmt.Sprintf("host=%s port=5432 user=postgres dbname=postgres connect_timeout=20 %s", host, options), "-c", statement}
}

func TestPostgreSQL(t *testing.T) {
	testutil.Need(t, "psql", "pgbench")
	r := rig.New(t)
	r.PostgreSQL(t)
	s := play(t, r, "")
	psql := func(host, options, statement string) string {
		t.Helper()
		return runApp(t, r, "", "psql", sql(host, options, statement)...)
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

	conns += pgCancel(t, s, psql)

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

// pgCancel has psql cancel a statement, which takes a connection of its own. It
// returns how many connections it made at least.
func pgCancel(t *testing.T, s *stage, psql func(host, options, statement string) string) int {
	t.Helper()
	cmd := s.Command("psql", sql("198.51.100.7", "sslmode=prefer application_name=sleeper", "select pg_sleep(600)")...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := s.Start(cmd); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(appLimit, func() { cmd.Process.Kill() })
	defer late.Stop()
	looks := 0
	testutil.Eventually(t, rig.Limit, func() bool {
		looks++
		return strings.TrimSpace(psql("198.51.100.7", "", "select count(*) from pg_stat_activity where wait_event = 'PgSleep'")) == "1"
	}, "the statement runs")
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), "canceling statement due to user request") {
		t.Errorf("psql: %v\n%s", err, out.String())
	}
	return looks + 2
}
