package connect

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// second is an address of the world where all is well.
var second = netip.MustParseAddr("198.51.100.8")

// pythonDialer has the standard library choose among the addresses of a name,
// and tells what became of each: PORT ADDRESS...
const pythonDialer = `
import errno, socket, sys
port = int(sys.argv[1])
def answers(*args, **kwargs):
    return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in sys.argv[2:]]
socket.getaddrinfo = answers
class Socket(socket.socket):
    def connect(self, to):
        try: super().connect(to)
        except OSError as e:
            print(to[0], errno.errorcode[e.errno])
            raise
        print(to[0], "connected")
socket.socket = Socket
s = socket.create_connection(("name.test", port), timeout=30)
s.sendall(b"GET / HTTP/1.0\r\n\r\n")
print(s.makefile().read().split("\n")[-1])
`

// clients are programs that fail over to the next address.
var clients = map[string]func(port uint16, addrs ...netip.Addr) *exec.Cmd{
	"python": func(port uint16, addrs ...netip.Addr) *exec.Cmd {
		return exec.Command("python3", append([]string{"-c", pythonDialer, fmt.Sprint(port)}, texts(addrs)...)...)
	},
	"curl": func(port uint16, addrs ...netip.Addr) *exec.Cmd {
		return exec.Command("curl", "-sS", "-m", "60", "--resolve", fmt.Sprintf("name.test:%d:%s", port, strings.Join(texts(addrs), ",")),
			"-w", " %{remote_ip} %{http_code} %{num_connects}", fmt.Sprintf("http://name.test:%d/", port))
	},
	"go": func(port uint16, addrs ...netip.Addr) *exec.Cmd {
		cmd := exec.Command(os.Args[0], append([]string{fmt.Sprint(port)}, texts(addrs)...)...)
		cmd.Env = append(os.Environ(), envGoApp+"=1")
		return cmd
	},
}

func texts(addrs []netip.Addr) []string {
	all := make([]string, len(addrs))
	for n, a := range addrs {
		all[n] = a.String()
	}
	return all
}

// TestFailover has programs choose among two addresses of a name, the first of
// which fails, and compares what they tell of it.
func TestFailover(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "python3", "curl")
	g := newGround(t)
	site := func(c net.Conn) {
		if _, err := c.Read(make([]byte, 4096)); err == nil {
			io.WriteString(c, "HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nhere")
		}
	}
	for _, port := range []uint16{portClosed, portReset, portICMP + 1} {
		g.Serve(t, netip.AddrPortFrom(second, port), site)
	}
	in(t, g.World, fmt.Sprintf("insert rule ip connect in ip daddr %s accept\n", second), "nft", "-f", "-")
	cases := map[string]func(client string) (string, error){}
	for _, port := range []uint16{portClosed, portReset, portICMP + 1} {
		for _, first := range []netip.Addr{far4(0).Addr(), far6(0).Addr()} {
			// A client that is made to wait tries both families at once.
			if port >= portICMP && first.Is6() {
				continue
			}
			cases[fmt.Sprintf("%s, %d", first, port)] = func(client string) (string, error) {
				return g.program(clients[client](port, first, second))
			}
		}
	}
	all := func(t *testing.T) map[string]string {
		saw := map[string]string{}
		var mu sync.Mutex
		var running sync.WaitGroup
		for client := range clients {
			for name, run := range cases {
				running.Go(func() {
					out, err := run(client)
					if err != nil || !strings.Contains(out, "here") || !strings.Contains(out, second.String()) {
						t.Errorf("%s, %s: %v: %s", client, name, err, out)
					}
					mu.Lock()
					defer mu.Unlock()
					saw[client+", "+name] = out
				})
			}
		}
		running.Wait()
		return saw
	}
	without := all(t)
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			i := g.with(t, "connect: "+mode)
			var with map[string]string
			g.calmly(t, func() bool {
				with = all(t)
				return maps.Equal(with, without)
			})
			for name, got := range with {
				if got != without[name] {
					t.Errorf("%s:\n without %s\n with    %s", name, without[name], got)
				}
			}
			redirected(t, i, 2*len(clients)*len(cases))
		})
	}
}

// program runs one as an application, and returns what it wrote, or its error
// with that.
func (g *ground) program(cmd *exec.Cmd) (string, error) {
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := g.Start(cmd); err != nil {
		return "", err
	}
	late := time.AfterFunc(appLimit, func() { cmd.Process.Kill() })
	defer late.Stop()
	err := cmd.Wait()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, errs.String())
	}
	return out.String(), err
}

// goDialer is the application of Go: PORT ADDRESS... It tells what became of
// each address.
func goDialer(args []string) error {
	port := args[0]
	dialer := net.Dialer{Resolver: &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return &names{addrs: args[1:]}, nil
	}}}
	transport := &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}
	trace := &httptrace.ClientTrace{ConnectDone: func(_, addr string, err error) {
		errno, _ := errors.AsType[unix.Errno](err)
		fmt.Println(addr, unix.ErrnoName(errno))
	}}
	ctx, cancel := context.WithTimeout(httptrace.WithClientTrace(context.Background(), trace), time.Minute)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://name.test.:"+port+"/", nil)
	if err != nil {
		return err
	}
	answer, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	fmt.Printf("%s\n", body)
	return err
}

// names is a connection to a name server that knows one name.
type names struct {
	net.Conn
	addrs []string
	reply []byte
}

// ReadFrom makes names a net.PacketConn, as which the resolver asks it by
// datagrams.
func (n *names) ReadFrom(p []byte) (int, net.Addr, error) {
	c, err := n.Read(p)
	return c, n.RemoteAddr(), err
}

func (n *names) WriteTo(p []byte, _ net.Addr) (int, error) { return n.Write(p) }

func (n *names) RemoteAddr() net.Addr { return &net.UDPAddr{} }

func (n *names) Close() error { return nil }

func (n *names) SetDeadline(time.Time) error { return nil }

func (n *names) Read(p []byte) (int, error) { return copy(p, n.reply), nil }

// Write answers a question of DNS (RFC 1035, section 4) for A or AAAA.
func (n *names) Write(query []byte) (int, error) {
	const header, typeA, typeAAAA = 12, 1, 28
	end := header
	for query[end] != 0 {
		end += 1 + int(query[end])
	}
	kind := binary.BigEndian.Uint16(query[end+1:])
	r := append([]byte(nil), query[:end+5]...)
	clear(r[6:header])
	r[2], r[3] = 0x84, 0x80
	for _, text := range n.addrs {
		a := netip.MustParseAddr(text)
		if a.Is4() != (kind == typeA) || kind != typeA && kind != typeAAAA {
			continue
		}
		r = append(r, 0xc0, header)
		r = binary.BigEndian.AppendUint16(r, kind)
		r = append(r, 0, 1, 0, 0, 0, 60, 0, byte(a.BitLen()/8))
		r = append(r, a.AsSlice()...)
		r[7]++
	}
	n.reply = r
	return len(query), nil
}
