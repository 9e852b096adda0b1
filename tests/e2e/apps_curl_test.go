package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// randomBytes returns a source of n bytes that looks random and is always the same.
func randomBytes(n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{1}), n)
}

func sumOf(t testing.TB, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// webSite answers /big?n=N with N bytes, /sum with the hash of what it is sent, and
// /who with the name it was called by.
func webSite() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/big", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		if r.Method != http.MethodHead {
			io.Copy(w, randomBytes(n))
		}
	})
	mux.HandleFunc("/sum", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, "%s %d %x\n", r.Method, n, h.Sum(nil))
	})
	mux.HandleFunc("/who", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, r.Host) })
	return mux
}

// TestCurl is HTTP as curl speaks it.
func TestCurl(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "curl", "sha256sum", "ip")
	r := rig.New(t)
	r.ServeHTTP(t, at4(8080), webSite())
	r.ServeHTTP(t, at6(8080), webSite())
	unroute(t, r)
	s := play(t, r, "")
	file := filepath.Join(t.TempDir(), "upload")
	const size = 32 << 20
	body, err := io.ReadAll(randomBytes(size))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, body, 0o600); err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(body))
	base4, base6 := "http://"+at4(8080).String(), "http://"+at6(8080).String()
	curl := func(args ...string) string {
		t.Helper()
		return runApp(t, r, "", "curl", append([]string{"-sS", "-g", "-m", "60"}, args...)...)
	}

	// Keep-alive: one connection for three requests, both its ends true.
	report := "%{http_code} %{num_connects} %{remote_ip}:%{remote_port} %{local_ip}\n"
	three := func(base string) string {
		return curl("-w", report, "-o", os.DevNull, "-o", os.DevNull, "-o", os.DevNull, base+"/who", base+"/big?n=70000", base+"/who")
	}
	same(t, "three requests, IPv4", three(base4),
		strings.Repeat("200 1 198.51.100.7:8080 192.0.2.1\n", 1)+strings.Repeat("200 0 198.51.100.7:8080 192.0.2.1\n", 2))
	same(t, "three requests, IPv6", three(base6),
		"200 1 2001:db8:7::7:8080 2001:db8:1::1\n"+strings.Repeat("200 0 2001:db8:7::7:8080 2001:db8:1::1\n", 2))

	// A POST that asks for leave first, an upload of unknown length, HEAD.
	out := curl("-v", "--stderr", "-", "-H", "Expect: 100-continue", "--expect100-timeout", "30", "--data-binary", "@"+file, base4+"/sum")
	if !strings.Contains(out, "< HTTP/1.1 100 Continue") || !strings.Contains(out, fmt.Sprintf("POST %d %s\n", size, sum)) {
		t.Errorf("POST with Expect:\n%s", out)
	}
	same(t, "chunked upload", runApp(t, r, "a stream", "curl", "-sS", "-m", "60", "-g", "-T", "-", base6+"/sum"),
		fmt.Sprintf("PUT 8 %x", sha256.Sum256([]byte("a stream"))))
	same(t, "upload", curl("-T", file, base6+"/sum"), fmt.Sprintf("PUT %d %s", size, sum))
	if head := curl("-I", base4+"/big?n=123456789"); !strings.HasPrefix(head, "HTTP/1.1 200 OK\r\n") || !strings.Contains(head, "Content-Length: 123456789\r\n") || !strings.HasSuffix(head, "\r\n\r\n") {
		t.Errorf("HEAD: %q", head)
	}

	// A download by hash.
	const big = 128 << 20
	got := runApp(t, r, "", "sh", "-c", fmt.Sprintf("curl -sS -m 60 '%s/big?n=%d' | sha256sum", base4, big))
	same(t, "download", got, sumOf(t, randomBytes(big))+"  -")

	// The first address of a name has no route: curl goes on to the second.
	got = curl("-w", report, "-o", os.DevNull, "--resolve", "two.test:8080:2001:db8:dead::1,198.51.100.7", "http://two.test:8080/who")
	same(t, "two addresses", got, "200 1 198.51.100.7:8080 192.0.2.1")

	s.relayedBut(t, 8, 1)
	for _, rec := range s.Ended(t, 8) {
		if rec.OrigDst != rec.Endpoint || rec.End != flow.ReasonClosed {
			t.Errorf("record %+v", rec)
		}
	}
}
