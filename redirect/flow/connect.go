package flow

import "fmt"

// ConnectMode says when the handshake of a redirected application ends. The
// values are those of enum connect_mode in bpf/include/abi.h; a test in package
// bpf compares them.
type ConnectMode uint8

// The modes. Without a dial's answer an application's connect(2) succeeds at
// once on ConnectEarly, and a failed dial is a reset later; on ConnectMirror it
// ends when the dial does, and fails as that did. ConnectAdaptive is early where
// a dial was answered lately, and mirrors where there is doubt.
const (
	ConnectEarly ConnectMode = iota
	ConnectMirror
	ConnectAdaptive

	connectCount
)

var connectNames = [connectCount]string{"early", "mirror", "adaptive"}

// ConnectModes returns every mode, in the order of their values.
func ConnectModes() []ConnectMode { return []ConnectMode{ConnectEarly, ConnectMirror, ConnectAdaptive} }

// String returns the name that the configuration and the C enum share.
func (m ConnectMode) String() string {
	if m < connectCount {
		return connectNames[m]
	}
	return fmt.Sprintf("connect(%d)", uint8(m))
}
