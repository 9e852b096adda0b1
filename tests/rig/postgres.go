package rig

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// PostgreSQL runs a new PostgreSQL on port 5432 of both far addresses.
func (r *Rig) PostgreSQL(t testing.TB) {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(found) == 0 {
		testutil.Need(t, "postgres")
		t.Fatalf("no postgres below /usr/lib/postgresql: %v", err)
	}
	bin := filepath.Dir(found[len(found)-1])
	uid, gid := Account(t, "postgres")
	dir := Dir(t, uid, gid)
	as := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(bin, name), args...)
		cmd.Dir = dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
		return cmd
	}
	data := filepath.Join(dir, "data")
	if out, err := as("initdb", "-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync").CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	hba := "host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n"
	if err := os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte(hba), 0o600); err != nil {
		t.Fatal(err)
	}
	cert, key := Certificate(t, dir, uid, gid)
	r.Give(t, Far4)
	r.Give(t, Far6)
	r.Daemon(t, as("postgres", "-D", data, "-h", Far4.String()+","+Far6.String(), "-p", "5432", "-k", dir,
		"-c", "fsync=off", "-c", "ssl=on", "-c", "ssl_cert_file="+cert, "-c", "ssl_key_file="+key, "-c", "shared_buffers=32MB"),
		unix.SIGINT, netip.AddrPortFrom(Far4, 5432))
	// It listens before it answers.
	testutil.Eventually(t, Limit, func() bool {
		return exec.Command(filepath.Join(bin, "pg_isready"), "-q", "-h", dir, "-p", "5432").Run() == nil || pause()
	}, "PostgreSQL has started up")
}

// SQL prepares the arguments of psql for one statement.
func SQL(host, options, statement string) []string {
	return []string{"-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d", fmt.Sprintf("host=%s port=5432 user=postgres dbname=postgres connect_timeout=20 %s", host, options), "-c", statement}
}

// Cancel has psql cancel a statement that would run for long, which takes a
// connection of its own. It returns what psql said, and how many connections
// were made at least.
func (r *Rig) Cancel(t testing.TB) (said string, conns int) {
	t.Helper()
	host := Far4.String()
	cmd := r.Command("psql", SQL(host, "sslmode=prefer application_name=sleeper", "select pg_sleep(600)")...)
	var out Log
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := r.Start(cmd); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(2*Limit, func() { cmd.Process.Kill() })
	defer late.Stop()
	testutil.Eventually(t, Limit, func() bool {
		conns++
		return strings.TrimSpace(r.Output(t, "psql", SQL(host, "", "select count(*) from pg_stat_activity where wait_event = 'PgSleep'")...)) == "1"
	}, "the statement runs")
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Errorf("psql ends well, though its statement was cancelled")
	}
	return out.String(), conns + 2
}
