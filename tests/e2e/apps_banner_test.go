package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// mailbox is an SMTP server that greets, and keeps what it is sent.
type mailbox struct {
	mu    sync.Mutex
	mails []string
}

func (m *mailbox) serve(c net.Conn) {
	fmt.Fprintf(c, "220 world ready\r\n")
	in := bufio.NewReader(c)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		switch verb, _, _ := strings.Cut(strings.ToUpper(strings.TrimSpace(line)), " "); verb {
		case "DATA":
			fmt.Fprintf(c, "354 go on\r\n")
			var text strings.Builder
			for line != ".\r\n" && err == nil {
				if line, err = in.ReadString('\n'); line != ".\r\n" {
					text.WriteString(line)
				}
			}
			m.mu.Lock()
			m.mails = append(m.mails, text.String())
			m.mu.Unlock()
			fmt.Fprintf(c, "250 kept\r\n")
		case "QUIT":
			fmt.Fprintf(c, "221 bye\r\n")
			return
		default:
			fmt.Fprintf(c, "250 fine\r\n")
		}
	}
}

// TestServerSpeaksFirst has clients that say nothing until they have heard.
func TestServerSpeaksFirst(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "python3")
	r := rig.New(t)
	box := &mailbox{}
	r.Serve(t, at4(25), box.serve)
	r.Serve(t, at6(25), box.serve)
	s := play(t, r, "")
	out := runApp(t, r, `
import smtplib, socket
for host in "198.51.100.7", "2001:db8:7::7":
    # Only to listen.
    c = socket.create_connection((host, 25), 20)
    print(c.recv(100)); c.close()
    with smtplib.SMTP(host, 25, timeout=20) as m:
        m.sendmail("a@app", ["b@world"], "Subject: x\r\n\r\n" + "a line of the mail\r\n" * 5000)
        print(m.noop())
`, "python3", "-")
	same(t, "client", out, strings.Repeat("b'220 world ready\\r\\n'\n(250, b'fine')\n", 2))
	want := "Subject: x\r\n\r\n" + strings.Repeat("a line of the mail\r\n", 5000)
	if len(box.mails) != 2 || box.mails[0] != want || box.mails[1] != want {
		t.Errorf("%d mails, want 2 of %d bytes", len(box.mails), len(want))
	}
	if n := s.AllRelayed(t, 4); n != 4 {
		t.Errorf("%d connections, want 4", n)
	}
}

// sshServer runs sshd on port 22 of both far addresses. It returns the file with
// the key that root may come in with.
func sshServer(t testing.TB, r *rig.Rig) string {
	t.Helper()
	dir := t.TempDir()
	host, user := filepath.Join(dir, "host"), filepath.Join(dir, "user")
	for _, key := range []string{host, user} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v\n%s", err, out)
		}
	}
	config := filepath.Join(dir, "config")
	text := fmt.Sprintf("ListenAddress %s\nListenAddress [%s]:22\nHostKey %s\nAuthorizedKeysFile %s.pub\nStrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\n", rig.Far4, rig.Far6, host, user)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// Debian's service makes it when it starts.
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		t.Fatal(err)
	}
	r.Give(t, rig.Far4)
	r.Give(t, rig.Far6)
	r.Daemon(t, exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", config), unix.SIGTERM, at4(22))
	return user
}

func TestSSH(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "ssh", "ssh-keygen", "/usr/sbin/sshd")
	r := rig.New(t)
	key := sshServer(t, r)
	s := play(t, r, "")
	ssh := func(stdin []byte, host, command string) (string, error) {
		t.Helper()
		return tryApp(r, string(stdin), "ssh", "-F", "none", "-i", key, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile="+os.DevNull,
			"-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=20", "root@"+host, command)
	}
	body := bytes.Repeat([]byte("sixteen bytes...\n"), 1<<19)
	for _, host := range []string{"198.51.100.7", "2001:db8:7::7"} {
		out, err := ssh(body, host, "cat")
		if err != nil || out != string(body) {
			t.Errorf("%s: cat: %v, %d bytes of %d", host, err, len(out), len(body))
		}
		out, err = ssh(nil, host, "set -- $SSH_CONNECTION; echo $3 $4; exit 7")
		if err == nil || !strings.Contains(err.Error(), "exit status 7") {
			t.Errorf("%s: exit: %v", host, err)
		}
		same(t, "server address", out, host+" 22")
	}
	if n := s.AllRelayed(t, 4); n != 4 {
		t.Errorf("%d connections, want 4", n)
	}
}
