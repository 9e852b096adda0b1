package suites

import (
	"crypto/tls"
	"encoding/xml"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
)

// h2server is Go's own server of HTTP/2, in clear text or over TLS. It counts
// the connections that it gets.
func h2server(t testing.TB, r *rig.Rig, addr netip.AddrPort, secure bool) (netip.AddrPort, *atomic.Int64) {
	t.Helper()
	var conns atomic.Int64
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			io.Copy(io.Discard, q.Body)
			io.WriteString(w, strings.Repeat("pillion\n", 128))
		}),
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				conns.Add(1)
			}
		},
		ErrorLog:  log.New(io.Discard, "", 0), // breaking the protocol is what the client does
		Protocols: new(http.Protocols),
	}
	ln := r.Listen(t, addr)
	serve := server.Serve
	if secure {
		server.Protocols.SetHTTP2(true)
		cert, key := rig.Certificate(t, t.TempDir(), os.Getuid(), os.Getgid())
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{pair}}
		serve = func(ln net.Listener) error { return server.ServeTLS(ln, "", "") }
	} else {
		server.Protocols.SetUnencryptedHTTP2(true)
	}
	ended := make(chan error, 1)
	go func() { ended <- serve(ln) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-ended; err != http.ErrServerClosed {
			t.Errorf("HTTP server: %v", err)
		}
	})
	return ln.Addr().(*net.TCPAddr).AddrPort(), &conns
}

// h2report is what h2spec writes.
type h2report struct {
	Suites []struct {
		ID    string `xml:"id,attr"`
		Cases []struct {
			Package string    `xml:"package,attr"`
			Name    string    `xml:"classname,attr"`
			Failure *struct{} `xml:"failure"`
			Error   *struct{} `xml:"error"`
			Skipped *struct{} `xml:"skipped"`
		} `xml:"testcase"`
	} `xml:"testsuite"`
}

// lines returns one for each case, and how many passed.
func (h *h2report) lines() (all []string, passed int) {
	for _, s := range h.Suites {
		for _, c := range s.Cases {
			result := "passed"
			switch {
			case c.Failure != nil || c.Error != nil:
				result = "failed"
			case c.Skipped != nil:
				result = "skipped"
			default:
				passed++
			}
			all = append(all, fmt.Sprintf("%s %s: %s", c.Package, c.Name, result))
		}
	}
	return all, passed
}

// h2run is what of h2spec is run: how many cases that is, and how many of them
// the server passes by itself at least.
type h2run struct {
	sections     []string
	cases, least int
}

func h2cases() h2run {
	if long() {
		return h2run{nil, 145, 139}
	}
	return h2run{[]string{"generic", "hpack"}, 51, 51}
}

// TestH2spec breaks the rules of HTTP/2 in every way that there is a rule for.
func TestH2spec(t *testing.T) {
	for name, c := range map[string]struct {
		addr   netip.AddrPort
		secure bool
	}{
		"clear": {at4(0), false},
		"tls":   {at6(0), true},
	} {
		t.Run(name, func(t *testing.T) {
			r := rig.New(t)
			addr, conns := h2server(t, r, c.addr, c.secure)
			runs, what := []int64{0}, h2cases()
			twice(t, r, what.cases, func(t testing.TB) []string {
				report := filepath.Join(t.TempDir(), "report.xml")
				host := addr.Addr().String()
				if addr.Addr().Is6() {
					host = "[" + host + "]"
				}
				args := []string{"-h", host, "-p", fmt.Sprint(addr.Port()), "-j", report, "-o", "5"}
				if c.secure {
					args = append(args, "-t", "-k")
				}
				args = append(args, what.sections...)
				// It fails if a case does, which the report tells better.
				out, err := r.Feed(appLimit, "", tool(t, "h2spec"), args...)
				text, readErr := os.ReadFile(report)
				if readErr != nil {
					t.Fatalf("h2spec: %v\n%s", err, out)
				}
				var h h2report
				if err := xml.Unmarshal(text, &h); err != nil {
					t.Fatal(err)
				}
				lines, passed := h.lines()
				if len(lines) != what.cases || passed < what.least {
					t.Errorf("h2spec ran %d cases, %d passed\n%s", len(lines), passed, out)
				}
				t.Logf("%d of %d cases passed", passed, len(lines))
				runs = append(runs, conns.Load())
				return lines
			})
			if direct, relayed := runs[1], runs[2]-runs[1]; relayed < int64(what.cases) || direct != relayed {
				t.Errorf("the server had %d connections without Pillion, %d with", direct, relayed)
			}
		})
	}
}
