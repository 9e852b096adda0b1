package suites

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

var (
	// What sysbench counts; what it measures is left out.
	sysbenchCounts = regexp.MustCompile(`(?m)^ +(read|write|other|total|transactions|queries|ignored errors|reconnects): +(\d+)|^    (total number of events): +(\d+)`)
	slapClients    = regexp.MustCompile(`Number of clients running queries: \d+|Average number of queries per client: \d+`)
)

// mariadbClient runs a statement and returns the rows.
func mariadbClient(t testing.TB, r *rig.Rig, statement string) string {
	t.Helper()
	return app(t, r, "", "mariadb", "--no-defaults", "-h", rig.Far4.String(), "-P", "3306", "--protocol=tcp", "-u", "root", "-N", "-B", "--connect-timeout=20", "-e", statement)
}

// TestSysbench runs sysbench's own scripts, with prepared statements and
// without, with the same random numbers each time.
func TestSysbench(t *testing.T) {
	testutil.Need(t, "mariadbd", "mariadb", "sysbench")
	r := rig.New(t)
	r.MariaDB(t)
	// Who writes does so alone: of several, some are rolled back now and then.
	runs := []struct {
		script, threads string
		more            []string
	}{
		{"oltp_read_only", "8", nil},
		{"oltp_point_select", "8", []string{"--db-ps-mode=disable"}},
		{"oltp_read_write", "1", nil},
		{"select_random_ranges", "4", nil},
		{"oltp_read_write", "1", []string{"--db-ps-mode=disable"}},
		{"oltp_update_index", "1", nil},
		{"oltp_insert", "1", nil},
		{"oltp_delete", "1", nil},
	}
	if !long() {
		runs = runs[:3]
	}
	sysbench := func(t testing.TB, script, verb string, more ...string) string {
		t.Helper()
		return app(t, r, "", "sysbench", append([]string{"--mysql-host=" + rig.Far4.String(), "--mysql-port=3306", "--mysql-user=root", "--mysql-ssl=off",
			"--rand-seed=42", "--tables=1", "--table-size=5000", "--time=0", script, verb}, more...)...)
	}
	// Its rows are of another kind every time, so every run gets the same ones.
	mariadbClient(t, r, "CREATE DATABASE sbtest")
	sysbench(t, "oltp_common", "prepare")
	mariadbClient(t, r, "RENAME TABLE sbtest.sbtest1 TO sbtest.first")
	twice(t, r, 8+8+1, func(t testing.TB) (all []string) {
		for _, run := range runs {
			mariadbClient(t, r, "CREATE TABLE sbtest.sbtest1 LIKE sbtest.first; INSERT INTO sbtest.sbtest1 SELECT * FROM sbtest.first")
			out := sysbench(t, run.script, "run", append([]string{"--threads=" + run.threads, fmt.Sprintf("--events=%d", amount(200, 4000))}, run.more...)...)
			counts := sysbenchCounts.FindAllString(out, -1)
			if len(counts) < 3 {
				t.Errorf("%s: counts %q", run.script, counts)
			}
			all = append(all, run.script)
			for _, c := range counts {
				all = append(all, strings.Join(strings.Fields(c), " "))
			}
			all = append(all, mariadbClient(t, r, "CHECKSUM TABLE sbtest.sbtest1; SELECT COUNT(*), SUM(k) FROM sbtest.sbtest1; DROP TABLE sbtest.sbtest1"))
		}
		return all
	})
}

// TestMysqlslap has many clients come and go.
func TestMysqlslap(t *testing.T) {
	testutil.Need(t, "mariadbd", "mariadb", "mariadb-slap")
	r := rig.New(t)
	r.MariaDB(t)
	const clients = 20
	rounds := amount(2, 20)
	// asked counts the statements that the server had.
	asked := func(t testing.TB) (inserts, selects int) {
		t.Helper()
		out := mariadbClient(t, r, "SHOW GLOBAL STATUS LIKE 'Com_insert'; SHOW GLOBAL STATUS LIKE 'Com_select'")
		if _, err := fmt.Sscanf(out, "Com_insert\t%d\nCom_select\t%d", &inserts, &selects); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return inserts, selects
	}
	twice(t, r, clients*rounds, func(t testing.TB) []string {
		inserts, selects := asked(t)
		out := app(t, r, "", "mariadb-slap", "--no-defaults", "-h", rig.Far4.String(), "-P", "3306", "--protocol=tcp", "-u", "root",
			fmt.Sprintf("--concurrency=%d", clients), fmt.Sprintf("--iterations=%d", rounds), fmt.Sprintf("--number-of-queries=%d", 20*clients),
			"--auto-generate-sql", "--auto-generate-sql-load-type=mixed")
		found := slapClients.FindAllString(out, -1)
		if len(found) != 2 {
			t.Errorf("mariadb-slap: %s", out)
		}
		moreInserts, moreSelects := asked(t)
		return append(found, fmt.Sprintf("%d INSERT, %d SELECT", moreInserts-inserts, moreSelects-selects))
	})
}
