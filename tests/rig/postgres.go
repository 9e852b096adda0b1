package rig

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

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
}
