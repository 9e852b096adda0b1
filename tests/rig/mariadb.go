package rig

import (
	"net/netip"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// MariaDB runs a new MariaDB on port 3306 of both far addresses.
func (r *Rig) MariaDB(t testing.TB) {
	t.Helper()
	uid, gid := Account(t, "mysql")
	dir := Dir(t, uid, gid)
	data := filepath.Join(dir, "data")
	out, err := exec.Command("mariadb-install-db", "--no-defaults", "--user=mysql", "--datadir="+data,
		"--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve").CombinedOutput()
	if err != nil {
		t.Fatalf("mariadb-install-db: %v\n%s", err, out)
	}
	r.Give(t, Far4)
	r.Give(t, Far6)
	// It keeps nothing, so it need not end in order.
	r.Daemon(t, exec.Command("mariadbd", "--no-defaults", "--user=mysql", "--datadir="+data,
		"--socket="+filepath.Join(dir, "socket"), "--pid-file="+filepath.Join(dir, "pid"),
		"--bind-address="+Far4.String()+","+Far6.String(), "--port=3306", "--skip-grant-tables",
		"--skip-name-resolve", "--max-allowed-packet=64M", "--innodb-buffer-pool-size=16M"), unix.SIGKILL, netip.AddrPortFrom(Far4, 3306))
}
