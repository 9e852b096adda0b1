package check

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func overHTTP(change func(*HTTP)) Spec {
	s := Default()
	s.Kind = KindHTTP
	change(&s.HTTP)
	return s
}

func TestHTTPRequest(t *testing.T) {
	for _, a := range []string{"127.0.0.1:0", "[::1]:0"} {
		to, asked := serve(t, a, func(conn net.Conn) {
			io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
		})
		c := asker()
		wantErr(t, c.ask(within(t, limit), Target{Addr: to, Spec: overHTTP(func(*HTTP) {})}), "")
		wantErr(t, c.ask(within(t, limit), Target{Addr: to, Spec: overHTTP(func(h *HTTP) {
			h.Path, h.Host = "/well/%2Fx?a=b&c", "shop.test"
		})}), "")
		want := []string{
			"GET / HTTP/1.1\r\nHost: " + to.String() + "\r\nUser-Agent: pillion-health-check\r\nConnection: close\r\n\r\n",
			"GET /well/%2Fx?a=b&c HTTP/1.1\r\nHost: shop.test\r\nUser-Agent: pillion-health-check\r\nConnection: close\r\n\r\n",
		}
		if diff := cmp.Diff(want, asked()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
}

func TestHTTPAnswers(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for name, tt := range map[string]struct {
		answer, want string
		status       []StatusRange
	}{
		"200":              {ok + "Content-Length: 2\r\n\r\nok", "", nil},
		"redirect":         {"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n", "", nil},
		"503":              {"HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\n\r\n", "http: status 503", nil},
		"404 is good here": {"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "", []StatusRange{{200, 200}, {404, 404}}},
		"201 is not here":  {"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n", "http: status 201", []StatusRange{{200, 200}, {404, 404}}},
		"until the end":    {ok + "\r\nsome", "", nil},
		"chunked":          {ok + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "", nil},
		"HTTP/1.0":         {"HTTP/1.0 200 OK\r\n\r\nold", "", nil},
		"interim":          {"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ok + "Content-Length: 0\r\n\r\n", "", nil},
		"only interim":     {strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 9), "http: read answer: nothing but interim answers", nil},
		"switching":        {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", "http: status 101", nil},
		"nothing":          {"", "http: read answer: unexpected EOF", nil},
		"half a header":    {ok + "X: y\r\n", "http: read answer: unexpected EOF", nil},
		"half a body":      {ok + "Content-Length: 100\r\n\r\nok", "http: read body: unexpected EOF", nil},
		"another protocol": {"SSH-2.0-OpenSSH_9\r\n", `http: read answer: malformed HTTP response "SSH-2.0-OpenSSH_9"`, nil},
		"endless header":   {ok + strings.Repeat("X-Filler: "+strings.Repeat("x", 1000)+"\r\n", 100), "http: answer has a header of more than 65536 bytes", nil},
		"large body":       {ok + "Content-Length: 1000000\r\n\r\n" + strings.Repeat("x", 1000000), "", nil},
		"small chunks":     {ok + "Transfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1\r\nx\r\n", 100000), "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			to, _ := serve(t, "127.0.0.1:0", func(conn net.Conn) { io.WriteString(conn, tt.answer) })
			err := asker().ask(within(t, limit), Target{Addr: to, Spec: overHTTP(func(h *HTTP) {
				if tt.status != nil {
					h.Status = tt.status
				}
			})})
			wantErr(t, err, tt.want)
			if isOwn(err) {
				t.Error("an answer is our own failure")
			}
		})
	}
}

// TestHTTPGarbage: an error is short and of one line, whatever was answered.
func TestHTTPGarbage(t *testing.T) {
	to, _ := serve(t, "127.0.0.1:0", func(conn net.Conn) { io.WriteString(conn, strings.Repeat("\x00\x1b[2Jgarbage", 1000)+"\n") })
	err := asker().ask(within(t, limit), Target{Addr: to, Spec: overHTTP(func(*HTTP) {})})
	if err == nil || len(err.Error()) > maxOutput+50 || strings.ContainsAny(err.Error(), "\x00\x1b\n") {
		t.Errorf("%d bytes: %v", len(fmt.Sprint(err)), err)
	}
}

// TestHTTPTimeout: the time-out is for all of the exchange.
func TestHTTPTimeout(t *testing.T) {
	for name, first := range map[string]string{
		"no answer":   "",
		"slow header": "HTTP/1.1 200 OK\r\n",
		"slow body":   "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
	} {
		t.Run(name, func(t *testing.T) {
			to, _ := serve(t, "127.0.0.1:0", func(conn net.Conn) {
				io.WriteString(conn, first)
				io.Copy(io.Discard, conn) // until the other side goes
			})
			err := asker().ask(within(t, 50*time.Millisecond), Target{Addr: to, Spec: overHTTP(func(*HTTP) {})})
			want := "http: no answer in time"
			if err != nil && strings.HasPrefix(err.Error(), "connect") {
				want = "connect: no answer in time" // the machine is busy
			}
			wantErr(t, err, want)
		})
	}
}

// TestHTTPReset: a connection that breaks is the endpoint's failure.
func TestHTTPReset(t *testing.T) {
	to, _ := serve(t, "127.0.0.1:0", func(conn net.Conn) { conn.(*net.TCPConn).SetLinger(0) })
	err := asker().ask(within(t, limit), Target{Addr: to, Spec: overHTTP(func(*HTTP) {})})
	wantErr(t, err, "http: read answer: connection reset by peer")
	if isOwn(err) {
		t.Error("a reset is our own failure")
	}
}
