package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

// TestGo has Go's HTTP client go by a name, and its dialer meet the kernel's no.
// tests/matrix has all that its dialer does otherwise.
func TestGo(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	r.ServeHTTP(t, at4(8080), webSite())
	r.ServeHTTP(t, at6(8080), webSite())
	r.NameServer(t, at4(53), map[string][]netip.Addr{"both.test.": {rig.Far4, rig.Far6}})
	unroute(t, r)
	s := play(t, r, "")
	same(t, "go", goApp(t, r, "dial", at4(53).String()), `
v6 alone: network is unreachable
both.test:8080 200 both.test:8080`)
	s.relayedBut(t, 1, 1)
}

func dialApp(args []string) error {
	d := dialer(args[0])
	_, err := d.Dial("tcp", "[2001:db8:dead::1]:7")
	errno, ok := errors.AsType[unix.Errno](err)
	if !ok {
		return fmt.Errorf("dial what has no route: %w", err)
	}
	fmt.Println("v6 alone:", errno)
	client := http.Client{Transport: &http.Transport{DialContext: d.DialContext, DisableKeepAlives: true}}
	answer, err := client.Get("http://both.test:8080/who")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	who, err := io.ReadAll(answer.Body)
	fmt.Printf("both.test:8080 %d %s", answer.StatusCode, who)
	return err
}

// dialer returns Go's default dialer with a name server of ours.
func dialer(server string) *net.Dialer {
	return &net.Dialer{Timeout: 20 * time.Second, Resolver: &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "udp", server)
		},
	}}
}
