package suites

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// pgSums tells what is in the tables of pgbench.
const pgSums = `select count(*), sum(abalance) from pgbench_accounts union all
	select count(*), sum(bbalance) from pgbench_branches union all
	select count(*), sum(tbalance) from pgbench_tellers union all
	select count(*), sum(delta) from pgbench_history`

var (
	pgDone   = regexp.MustCompile(`transactions actually processed: (\d+)/(\d+)`)
	pgFailed = regexp.MustCompile(`number of failed transactions: (\d+)`)
)

// TestPgbench runs pgbench in each of its protocols, in clear text and over TLS,
// with the same random numbers each time.
func TestPgbench(t *testing.T) {
	testutil.Need(t, "psql", "pgbench")
	r := rig.New(t)
	r.PostgreSQL(t)
	const clients = 8
	transactions := amount(40, 1000)
	host := rig.Far4.String()
	pgbench := func(t testing.TB, args ...string) string {
		t.Helper()
		return app(t, r, "", "pgbench", append([]string{"-h", host, "-p", "5432", "-U", "postgres"}, append(args, "postgres")...)...)
	}
	protocols, security := []string{"simple", "prepared", "extended"}, []string{"disable", "require"}
	if !long() {
		protocols, security = protocols[:2], security[:1]
	}
	twice(t, r, len(security)*len(protocols)*(clients+20), func(t testing.TB) (all []string) {
		for _, protocol := range protocols {
			for _, tls := range security {
				t.Setenv("PGSSLMODE", tls)
				pgbench(t, "-i", "-q", "-s", "1")
				out := pgbench(t, "-n", "-M", protocol, "-c", fmt.Sprint(clients), "-j", "2", "-t", fmt.Sprint(transactions), "--random-seed", "42")
				// And a connection for each transaction, as some programs do.
				out += pgbench(t, "-n", "-M", protocol, "-c", "2", "-t", "10", "-C", "--random-seed", "43")
				// And many statements sent before the first is answered.
				if protocol != "simple" {
					out += pgbench(t, "-n", "-M", protocol, "-c", "2", "-t", "20", "-f", pipelined(t), "--random-seed", "44")
				}
				all = append(all, protocol+" "+tls)
				done := pgDone.FindAllStringSubmatch(out, -1)
				for _, m := range done {
					if m[1] != m[2] {
						t.Errorf("pgbench: %s", m[0])
					}
					all = append(all, m[0])
				}
				if len(done) < 2 {
					t.Errorf("pgbench: %s", out)
				}
				all = append(all, pgFailed.FindAllString(out, -1)...)
				all = append(all, strings.Fields(app(t, r, "", "psql", rig.SQL(host, "", pgSums)...))...)
			}
		}
		return all
	})
}

// pipelined writes a script of pgbench.
func pipelined(t testing.TB) string {
	t.Helper()
	text := "\\set aid random(1, 1000)\n\\startpipeline\n"
	for range 50 {
		text += "select abalance from pgbench_accounts where aid = :aid;\n"
	}
	file := filepath.Join(t.TempDir(), "pipelined.sql")
	if err := os.WriteFile(file, []byte(text+"\\endpipeline\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestCopy has rows go both ways, as text and in binary, and a statement be
// cancelled.
func TestCopy(t *testing.T) {
	testutil.Need(t, "psql")
	r := rig.New(t)
	r.PostgreSQL(t)
	var rows bytes.Buffer
	for i := range amount(100_000, 2_000_000) {
		fmt.Fprintf(&rows, "%d\trow %d %x\n", i, i, i*7919)
	}
	file := filepath.Join(t.TempDir(), "rows")
	if err := os.WriteFile(file, rows.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%x", sha256.Sum256(rows.Bytes()))
	twice(t, r, 2*6, func(t testing.TB) (all []string) {
		for _, host := range []string{rig.Far4.String(), rig.Far6.String()} {
			psql := func(options, statement string) string {
				t.Helper()
				return app(t, r, "", "psql", rig.SQL(host, options, statement)...)
			}
			psql("sslmode=disable", "drop table if exists rows; create table rows (n int primary key, text text)")
			psql("sslmode=require", `\copy rows from '`+file+`'`)
			if got := psql("sslmode=disable", `\copy (select * from rows order by n) to stdout`); fmt.Sprintf("%x", sha256.Sum256([]byte(got))) != want {
				t.Errorf("COPY out of %s gives %d bytes, not the %d that went in", host, len(got), rows.Len())
			}
			binary := psql("sslmode=require", `\copy (select * from rows order by n) to stdout (format binary)`)
			all = append(all, fmt.Sprintf("binary: %d bytes, %x", len(binary), sha256.Sum256([]byte(binary))))
			// Back in, from where it came out.
			psql("sslmode=disable", "truncate rows")
			app(t, r, binary, "psql", rig.SQL(host, "sslmode=disable", `\copy rows from stdin (format binary)`)...)
			all = append(all, psql("", "select count(*), sum(hashtext(text)) from rows"))
		}
		said, _ := r.Cancel(t)
		return append(all, said)
	})
}
