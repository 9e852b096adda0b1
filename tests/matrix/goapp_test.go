package matrix

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// envNames makes this binary an application written in Go: the address of its name
// server. Its arguments are METHOD HOST PORT, again and again: dial, or mptcp.
const envNames = "PILLION_TEST_NAMES"

// goApp is that application. It writes a line of JSON for each connection.
func goApp(names string, args []string) error {
	out := json.NewEncoder(os.Stdout)
	for ; len(args) >= 3; args = args[3:] {
		d := &net.Dialer{Timeout: 20 * time.Second, FallbackDelay: 2 * time.Second, Resolver: &net.Resolver{
			PreferGo: true,
			Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "udp", names)
			},
		}}
		d.SetMultipathTCP(args[0] == "mptcp")
		s, err := goTrip(d, args[1], args[2])
		if err != nil {
			return fmt.Errorf("%s: %w", args[1], err)
		}
		if err := out.Encode(s); err != nil {
			return err
		}
	}
	return nil
}

// goTrip has random bytes echoed.
func goTrip(d *net.Dialer, host, port string) (seen, error) {
	c, err := d.Dial("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return seen{}, err
	}
	defer c.Close()
	peer, own := c.RemoteAddr().(*net.TCPAddr), c.LocalAddr().(*net.TCPAddr)
	data := make([]byte, size)
	rand.Read(data)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	return seen{
		To: host, Peer: peer.IP.String(), PeerPort: peer.Port, Own: own.IP.String(), OwnPort: own.Port,
		Sent: size, Got: len(got), Same: bytes.Equal(got, data),
	}, errors.Join(err, <-sent)
}
