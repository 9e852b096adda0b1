package spelling

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// SplitAddrPort parts an address from its port, without reading either. Brackets stay
// with the address.
func SplitAddrPort(s string) (host, port string, err error) {
	switch {
	case s == "":
		return "", "", errors.New("empty, want ADDR:PORT")
	case strings.Contains(s, "://"):
		return "", "", errors.New("this is a URL, want ADDR:PORT")
	case strings.Contains(s, "/"):
		return "", "", errors.New("want one address and no path or range: ADDR:PORT")
	default:
	}
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil && !strings.Contains(s, "]:") {
		if a.Is6() {
			return "", "", fmt.Errorf("no port, want [%s]:PORT", a)
		}
		return "", "", fmt.Errorf("no port, want %s:PORT", a)
	}
	i := strings.LastIndexByte(s, ':')
	switch {
	case i < 0:
		return s, "", nil // no address either
	case i == 0:
		return "", "", fmt.Errorf("no address, want ADDR:PORT such as 127.0.0.1%s", s)
	case strings.HasPrefix(s, "[") && s[i-1] != ']':
		return "", "", errors.New("want [ADDR]:PORT")
	default:
		return s[:i], s[i+1:], nil
	}
}
