package flow

import "fmt"

// Path says who carries the bytes of a connection. The values are those of
// enum conn_path in bpf/include/abi.h; a test in package bpf compares them.
type Path uint8

// The paths, cheapest first. PathDeny carries nothing: the application was
// refused. PathEscaped is a connection that Pillion saw but did not decide on.
const (
	PathNone Path = iota
	PathDeny
	PathPass
	PathDirect
	PathRelay
	PathHTTP
	PathEscaped

	pathCount
)

var pathNames = [pathCount]string{"none", "deny", "pass", "direct", "relay", "http", "escaped"}

// Paths returns every path, in the order of their values.
func Paths() []Path {
	all := make([]Path, pathCount)
	for i := range all {
		all[i] = Path(i)
	}
	return all
}

// String returns the name that metrics, logs and the C enum share.
func (p Path) String() string {
	if p < pathCount {
		return pathNames[p]
	}
	return fmt.Sprintf("path(%d)", uint8(p))
}

// MarshalText implements encoding.TextMarshaler.
func (p Path) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *Path) UnmarshalText(text []byte) error {
	for i, name := range pathNames {
		if name == string(text) {
			*p = Path(i)
			return nil
		}
	}
	return fmt.Errorf("unknown path %q", text)
}
