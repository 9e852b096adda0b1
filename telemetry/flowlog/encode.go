package flowlog

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// appendRecord appends r to b as [json.Marshal] would write it, which takes ten
// times as long: as much as the rest of a connection's record by far. A test
// compares the two. It fails for a time that JSON cannot express, and then appends
// nothing.
func appendRecord(b []byte, r *flow.Record) ([]byte, error) {
	if y := r.Start.Year(); y < 0 || y > 9999 {
		return b, fmt.Errorf("encode record: year %d", y)
	}
	b = strconv.AppendUint(append(b, `{"cookie":`...), r.Cookie, 10)
	b = strconv.AppendUint(append(b, `,"cgroup":`...), r.Cgroup, 10)
	b = appendAddrPort(append(b, `,"source":`...), r.Source)
	b = appendAddrPort(append(b, `,"original_destination":`...), r.OrigDst)
	if r.Service != "" {
		b = appendString(append(b, `,"service":`...), r.Service)
	}
	if r.Cluster != "" {
		b = appendString(append(b, `,"cluster":`...), r.Cluster)
	}
	if r.Endpoint != (netip.AddrPort{}) {
		b = appendAddrPort(append(b, `,"endpoint":`...), r.Endpoint)
	}
	b = appendString(append(b, `,"path":`...), r.Path.String())
	b = appendString(append(b, `,"reason":`...), r.Reason.String())
	b = appendString(append(b, `,"end":`...), r.End.String())
	b = strconv.AppendInt(append(b, `,"attempts":`...), int64(r.Attempts), 10)
	b = append(r.Start.AppendFormat(append(b, `,"start":"`...), time.RFC3339Nano), '"')
	b = strconv.AppendInt(append(b, `,"duration_ns":`...), int64(r.Duration), 10)
	b = strconv.AppendInt(append(b, `,"connect_ns":`...), int64(r.Connect), 10)
	b = strconv.AppendInt(append(b, `,"rtt_ns":`...), int64(r.RTT), 10)
	b = strconv.AppendUint(append(b, `,"retransmits":`...), uint64(r.Retransmits), 10)
	b = strconv.AppendUint(append(b, `,"bytes_sent":`...), r.Sent, 10)
	b = strconv.AppendUint(append(b, `,"bytes_received":`...), r.Received, 10)
	b = strconv.AppendBool(append(b, `,"mirrored":`...), r.Mirrored)
	b = strconv.AppendBool(append(b, `,"open":`...), r.Open)
	return append(b, '}'), nil
}

// appendAddrPort appends a as text, nothing for one that is not valid.
func appendAddrPort(b []byte, a netip.AddrPort) []byte {
	if a.Addr().Zone() != "" {
		// A zone may be any text.
		return appendString(b, a.String())
	}
	b = append(b, '"')
	if a.IsValid() {
		b = a.AppendTo(b)
	}
	return append(b, '"')
}

// appendString appends s as a string.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		c := s[i]
		if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			// It cannot fail for a string.
			quoted, _ := json.Marshal(s)
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}
