package config

import (
	"errors"
	"fmt"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"unicode"
)

// ParseService reads a service from a flag: ADDR:PORT=ENDPOINT[,ENDPOINT...],
// where ENDPOINT is ADDR:PORT[*WEIGHT]. The service's name is its address. What
// the addresses are is for [Config.Validate] to judge. The error has a line for each
// problem, and does not show s.
func ParseService(s string) (Service, error) {
	addr, list, found := strings.Cut(s, "=")
	if !found {
		return Service{}, errors.New("no endpoints, want ADDR:PORT=ENDPOINT[,ENDPOINT...]")
	}
	var errs []error
	a, err := parseAddrPort(addr)
	if err != nil {
		errs = append(errs, fmt.Errorf("address %w", err))
	}
	service := newService()
	service.Name, service.Addr = a.String(), a
	for i, item := range strings.Split(list, ",") {
		e, err := parseEndpoint(item)
		if err != nil {
			errs = append(errs, fmt.Errorf("endpoint %d %w", i+1, err))
		}
		service.Endpoints = append(service.Endpoints, e)
	}
	if len(errs) > 0 {
		return Service{}, errors.Join(errs...)
	}
	return service, nil
}

// parseEndpoint reads ADDR:PORT[*WEIGHT].
func parseEndpoint(s string) (Endpoint, error) {
	addr, weight, weighted := strings.Cut(s, "*")
	a, err := parseAddrPort(addr)
	if err != nil {
		return Endpoint{}, err
	}
	if !weighted {
		return Endpoint{Addr: a, Weight: 1}, nil
	}
	w, ok := parseNumber(weight, 1, maxWeight)
	if !ok {
		return Endpoint{}, fmt.Errorf("%s: weight %s: want 1 to %d", spelling.Show(s), spelling.Show(weight), maxWeight)
	}
	return Endpoint{Addr: a, Weight: uint32(w)}, nil
}

// ParseRule reads a rule: CIDR[:PORT] or ADDR[:PORT], where IPv6 with a port is
// [CIDR]:PORT or [ADDR]:PORT. Without a port the rule is for every port.
func ParseRule(s string) (Rule, error) {
	r, err := parseRule(s)
	if err != nil {
		return Rule{}, fmt.Errorf("%s: %w", spelling.Show(s), err)
	}
	return r, nil
}

func parseRule(s string) (Rule, error) {
	where, port, err := splitRule(s)
	if err != nil {
		return Rule{}, err
	}
	var r Rule
	if r.Prefix, err = parsePrefix(where); err != nil {
		return Rule{}, err
	}
	if port == nil {
		return r, nil
	}
	if *port == "0" {
		return Rule{}, errors.New("port 0: leave the port out to mean every port")
	}
	r.Port, err = parsePort(*port)
	return r, err
}

// splitRule parts a rule from its port, which is nil where there is none.
func splitRule(s string) (where string, port *string, err error) {
	if inner, ok := strings.CutPrefix(s, "["); ok {
		where, rest, found := strings.Cut(inner, "]")
		after, hasPort := strings.CutPrefix(rest, ":")
		switch {
		case !found:
			return "", nil, errors.New("[ without ]")
		case hasPort:
			return where, &after, nil
		case rest != "":
			return "", nil, fmt.Errorf("%s after ]: want [CIDR]:PORT", spelling.Show(rest))
		default:
			return where, nil, nil
		}
	}
	if strings.Count(s, ":") == 1 {
		where, after, _ := strings.Cut(s, ":")
		return where, &after, nil
	}
	if i := strings.LastIndexByte(s, '/'); i >= 0 && strings.Contains(s[i:], ":") {
		bits, after, _ := strings.Cut(s[i:], ":")
		return "", nil, fmt.Errorf("an IPv6 range with a port stands in brackets: want [%s%s]:%s", s[:i], bits, after)
	}
	return s, nil, nil
}

// parsePrefix reads a range, or an address as the range of itself.
func parsePrefix(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		switch {
		case err != nil:
			return netip.Prefix{}, notAddress(s, "CIDR[:PORT] or ADDR[:PORT]")
		case a.Zone() != "":
			return netip.Prefix{}, fmt.Errorf("zone %s: a rule has none", spelling.Show(a.Zone()))
		default:
			a = a.Unmap()
			return netip.PrefixFrom(a, a.BitLen()), nil
		}
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		host, bits, _ := strings.Cut(s, "/")
		a, err := netip.ParseAddr(host)
		switch {
		case err != nil:
			return netip.Prefix{}, notAddress(host, "CIDR[:PORT] or ADDR[:PORT]")
		case a.Zone() != "":
			return netip.Prefix{}, fmt.Errorf("zone %s: a rule has none", spelling.Show(a.Zone()))
		default:
			return netip.Prefix{}, fmt.Errorf("prefix length %s: want 0 to %d", spelling.Show(bits), a.BitLen())
		}
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("host bits are set: want %s, or %s for the one address", p.Masked(), p.Addr())
	}
	// The kernel side keeps mapped and IPv4 destinations apart from IPv6: what
	// is inside ::ffff:0:0/96 is IPv4.
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96), nil
	}
	return p, nil
}

// zone is a name or number of an interface; netip takes any text for one.
var zone = regexp.MustCompile(`^[\w.-]{1,15}$`)

// parseAddrPort reads ADDR:PORT or [ADDR]:PORT and says what is wrong in the
// words of somebody who wants to know what to write instead.
func parseAddrPort(s string) (netip.AddrPort, error) {
	host, port, err := spelling.SplitAddrPort(s)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%s: %w", spelling.Show(s), err)
	}
	bare, bracketed := strings.CutPrefix(host, "[")
	bare = strings.TrimSuffix(bare, "]")
	a, err := netip.ParseAddr(bare)
	switch {
	case err != nil:
		err = notAddress(bare, "ADDR:PORT")
	case bracketed != a.Is6():
		err = errors.New("brackets are for IPv6: want ADDR:PORT or [ADDR]:PORT")
	case a.Zone() != "" && !zone.MatchString(a.Zone()):
		err = fmt.Errorf("zone %s: want the name of an interface", spelling.Show(a.Zone()))
	default:
	}
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%s: %w", spelling.Show(s), err)
	}
	p, err := parsePort(port)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%s: %w", spelling.Show(s), err)
	}
	return netip.AddrPortFrom(a.Unmap(), p), nil
}

// notAddress says why s is no IP address.
func notAddress(s, want string) error {
	isLetter := func(r rune) bool { return unicode.IsLetter(r) || r == '_' }
	switch {
	case s == "":
		return fmt.Errorf("no address, want %s", want)
	case s == "localhost":
		return errors.New("localhost is a name, and names are not resolved: want 127.0.0.1 or ::1")
	case strings.ContainsFunc(s, isLetter) && !strings.ContainsAny(s, ":%[] \t\n"):
		return fmt.Errorf("%s is a name, and names are not resolved: want an IP address", spelling.Show(s))
	default:
		return fmt.Errorf("%s is not an IP address: want %s", spelling.Show(s), want)
	}
}

func parsePort(s string) (uint16, error) {
	if n, ok := parseNumber(s, 1, 65535); ok {
		return uint16(n), nil
	}
	return 0, fmt.Errorf("port %s: want 1 to 65535", spelling.Show(s))
}

// parseNumber reads a decimal number from low to high. A sign other than minus
// and leading zeros are not taken: there are readers to whom 010 is eight.
func parseNumber(s string, low, high int) (int, bool) {
	n, err := strconv.Atoi(s)
	return n, err == nil && strconv.Itoa(n) == s && n >= low && n <= high
}
