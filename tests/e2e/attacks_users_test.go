package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestAttackOtherUser has a user without rights try everything that the owner
// can: none of it works, and all of it goes on.
func TestAttackOtherUser(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	// Everything on the way to the socket is open to everybody.
	for dir := filepath.Dir(s.Runtime); dir != "/" && dir != "/tmp"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	user := outsider(t, s.Rig)
	user.learn(`
def try_(f, *a):
    try: f(*a); return "ok"
    except OSError as e: return errno.errorcode[e.errno]
def bpf(cmd, *words):
    "words: (offset, format, value)"
    b = bytearray(128)
    for o, f, v in words: struct.pack_into(f, b, o, v)
    buf = (ctypes.c_char * 128).from_buffer(b)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(321, cmd, buf, 128)
    return fd if fd >= 0 else errno.errorcode[ctypes.get_errno()]
def pin(path):
    p = ctypes.create_string_buffer(path.encode())
    kept.append(p)
    return bpf(7, (0, "Q", ctypes.addressof(p)))
`)
	user.drop()
	pins := filepath.Join("/sys/fs/bpf/pillion", s.i.Name)
	socket := filepath.Join(s.Runtime, s.i.Name+".sock")
	m := pinned(t, s.i, "listeners")
	info, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	m.Close()
	for _, do := range []string{
		fmt.Sprintf("try_(os.listdir, %q)", pins),
		fmt.Sprintf("try_(os.listdir, %q)", filepath.Dir(pins)),
		fmt.Sprintf("try_(os.unlink, %q)", filepath.Join(pins, "link_pl_connect4")),
		fmt.Sprintf("try_(os.rename, %q, %q)", filepath.Join(pins, "listeners"), filepath.Join(pins, "gone")),
		fmt.Sprintf("try_(os.mkdir, %q)", filepath.Join(filepath.Dir(pins), "mine")),
		fmt.Sprintf("try_(os.chmod, %q, 0o777)", filepath.Join(pins, "listeners")),
		fmt.Sprintf("pin(%q)", filepath.Join(pins, "listeners")),
		fmt.Sprintf("pin(%q)", filepath.Join(pins, "live")),
		fmt.Sprintf("pin(%q)", filepath.Join(pins, "link_pl_connect4")),
		fmt.Sprintf("bpf(14, (0, 'I', %d))", id), // BPF_MAP_GET_FD_BY_ID
		fmt.Sprintf("try_(so.socket(AF_UNIX).connect, %q)", socket),
		fmt.Sprintf("try_(os.listdir, %q)", s.Runtime),
		fmt.Sprintf("try_(os.unlink, %q)", socket),
		fmt.Sprintf("try_(open, %q, 'w')", filepath.Join(s.Scope.Path, "cgroup.procs")),
	} {
		if got := user.do("%s", do); got != "EACCES" && got != "EPERM" {
			t.Errorf("%s: %s", do, got)
		}
	}
	// The modes themselves, not only what stands in the way.
	for path, mode := range map[string]os.FileMode{filepath.Dir(pins): 0o700, pins: 0o700, s.Runtime: 0o700, socket: 0o600} {
		st, err := os.Stat(path)
		if err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, want %v", path, st.Mode().Perm(), mode)
		}
	}
	entries, err := os.ReadDir(pins)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if st, err := e.Info(); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("pin %s: %v, %v", e.Name(), st.Mode(), err)
		}
	}
	s.relayed(t, 3)
}

// refusal runs pillion where it must refuse to: one that starts instead is ended
// after the limit.
func refusal(t *testing.T, r *rig.Rig, args ...string) (code int, said string) {
	t.Helper()
	cmd := exec.Command(rig.Binary(t), append(args, "--runtime-dir", r.Runtime)...)
	var log rig.Log
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := (testutil.Place{NS: r.App}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(rig.Limit, func() { cmd.Process.Signal(unix.SIGTERM) })
	defer late.Stop()
	cmd.Wait()
	return cmd.ProcessState.ExitCode(), log.String()
}

// asUser runs pillion as a user without rights, beside the applications.
func asUser(t *testing.T, r *rig.Rig, args ...string) (code int, said string) {
	t.Helper()
	// The binary may lie where the user cannot reach it.
	binary := filepath.Join(rig.Dir(t, 65534, 65534), "pillion")
	b, err := os.ReadFile(rig.Binary(t))
	if err == nil {
		err = os.WriteFile(binary, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var log rig.Log
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := (testutil.Place{NS: r.App}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	return cmd.ProcessState.ExitCode(), log.String()
}

// TestAttackUserStarts has a user without rights start, end and ask.
func TestAttackUserStarts(t *testing.T) {
	s := newPrey(t, "")
	dir := filepath.Join(rig.Dir(t, 65534, 65534), "run")
	for name, tt := range map[string]struct {
		args []string
		code int
	}{
		"run":          {[]string{"run", "--cgroup", s.Scope.Path, "--runtime-dir", dir}, 69},
		"run, a name":  {[]string{"run", "--cgroup", s.Scope.Path, "--name", s.i.Name, "--runtime-dir", dir}, 69},
		"exec":         {[]string{"exec", "--runtime-dir", dir, "--", "true"}, 69},
		"unload":       {[]string{"unload", s.i.Name, "--runtime-dir", dir}, 0},
		"unload force": {[]string{"unload", "--force", s.i.Name, "--runtime-dir", s.Runtime}, 0},
		"status":       {[]string{"status", s.i.Name, "--runtime-dir", s.Runtime}, 0},
	} {
		code, said := asUser(t, s.Rig, tt.args...)
		if code == 0 || tt.code != 0 && code != tt.code {
			t.Errorf("%s: code %d, %s", name, code, said)
		}
	}
	s.relayed(t, 3)
	if entries, _ := os.ReadDir("/sys/fs/bpf"); len(entries) == 0 {
		t.Error("the pins are gone")
	}
}

// TestAttackSquat has another user make the directory of pins first, on a bpf
// file system that everybody may write to: it is refused.
func TestAttackSquat(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	fs := t.TempDir()
	if err := unix.Mount("bpf", fs, "bpf", 0, "mode=1777"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(fs, 0); err != nil {
			t.Error(err)
		}
	})
	pins := filepath.Join(fs, "pillion")
	for name, squat := range map[string]func() error{
		"another's": func() error { return os.Chown(pins, 65534, 65534) },
		"open":      func() error { return os.Chmod(pins, 0o777) },
		"group's":   func() error { return os.Chmod(pins, 0o770) },
	} {
		if err := os.Mkdir(pins, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := squat(); err != nil {
			t.Fatal(err)
		}
		code, said := refusal(t, r, "run", "--cgroup", r.Scope.Path, "--bpffs", fs)
		if code == 0 || !strings.Contains(said, pins) {
			t.Errorf("%s: %d, %s", name, code, said)
		}
		if err := os.Remove(pins); err != nil { // and nothing was left in it
			t.Error(err)
		}
	}
	if err := os.Symlink("/root", pins); err == nil {
		if code, said := refusal(t, r, "run", "--cgroup", r.Scope.Path, "--bpffs", fs); code == 0 {
			t.Errorf("a symbolic link was followed: %s", said)
		}
		os.Remove(pins)
	}
}

// TestAttackAdminGarbage sends the admin socket what is no request. It goes on,
// and so do the connections.
func TestAttackAdminGarbage(t *testing.T) {
	t.Parallel()
	s := newPrey(t, "")
	path := filepath.Join(s.Runtime, s.i.Name+".sock")
	pid := s.i.Cmd.Process.Pid
	for name, text := range map[string]string{
		"nothing":        "",
		"zeros":          strings.Repeat("\x00", 1<<16),
		"high bytes":     strings.Repeat("\xff\xfe", 1<<15),
		"no end":         "GET /v1/status HTTP/1.1\r\nHost: x\r\n",
		"a long line":    "GET /" + strings.Repeat("a", 1<<21) + " HTTP/1.1\r\n\r\n",
		"many headers":   "GET /v1/status HTTP/1.1\r\n" + strings.Repeat("A: b\r\n", 1<<17) + "\r\n",
		"a bad length":   "POST /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
		"a huge body":    "POST /v1/flows HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n" + strings.Repeat("x", 1<<20),
		"a path":         "GET /v1/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
		"a bad slot":     "GET /v1/resolve?slot=%00%ff HTTP/1.1\r\nHost: x\r\n\r\n",
		"a bad limit":    "GET /v1/flows?limit=-9999999999999999999 HTTP/1.1\r\nHost: x\r\n\r\n",
		"HTTP/2":         "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"smuggled":       "POST /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
		"TLS":            "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"an upgrade":     "GET /v1/status HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
		"another method": "DELETE /v1/flows HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		c.SetDeadline(time.Now().Add(rig.Limit))
		c.Write([]byte(text)) // it may be cut short
		c.(*net.UnixConn).CloseWrite()
		answer := make([]byte, 64)
		n, _ := c.Read(answer)
		c.Close()
		if got := string(answer[:n]); strings.HasPrefix(got, "HTTP/1.1 200") && name != "an upgrade" {
			t.Errorf("%s: %q", name, got)
		}
	}
	// Many that say nothing: the others are answered.
	for range 300 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if _, err := s.i.Status(context.Background()); err != nil {
		t.Errorf("status: %v", err)
	}
	s.relayed(t, 3)
	if s.i.Cmd.Process.Pid != pid || strings.Contains(s.i.Log(), "panic") {
		t.Errorf("it broke:\n%s", s.i.Log())
	}
}
