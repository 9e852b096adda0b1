package flowlog

import (
	"encoding/json"
	"math"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
)

// checkEncode compares appendRecord with json.Marshal.
func checkEncode(t *testing.T, r *flow.Record) {
	t.Helper()
	want, wantErr := json.Marshal(r)
	got, err := appendRecord([]byte("before "), r)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%+v: %v, want %v", r, err, wantErr)
	}
	if diff := cmp.Diff("before "+string(want), string(got)); diff != "" {
		t.Errorf("%+v:\n%s", r, diff)
	}
}

func TestEncode(t *testing.T) {
	t.Parallel()
	checkEncode(t, record(1))
	checkEncode(t, &flow.Record{})
	checkEncode(t, &flow.Record{
		Service: "a \"b\" \\ <c> & \u2028 é \x00 \xff", Cluster: "\x7f", Path: 200, Reason: 255, End: 254,
		Source:  netip.MustParseAddrPort("[fe80::1%eth\"0]:1"),
		OrigDst: netip.MustParseAddrPort("[::ffff:10.0.0.1]:2"),
		// The address is not valid and the port is: json does not take it for
		// none.
		Endpoint: netip.AddrPortFrom(netip.Addr{}, 80),
		Attempts: -1, Duration: math.MinInt64, Sent: math.MaxUint64, Open: true,
		Start: time.Date(9999, 12, 31, 23, 59, 59, 999999999, time.FixedZone("", 3600)),
	})
	checkEncode(t, &flow.Record{Start: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)})
	checkEncode(t, &flow.Record{Start: time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC)})
}

// TestEncodeHasEveryField finds a field that was added to the record alone.
func TestEncodeHasEveryField(t *testing.T) {
	t.Parallel()
	for i := range reflect.TypeFor[flow.Record]().NumField() {
		r := &flow.Record{}
		switch f := reflect.ValueOf(r).Elem().Field(i); f.Interface().(type) {
		case netip.AddrPort:
			f.Set(reflect.ValueOf(netip.MustParseAddrPort("192.0.2.1:1")))
		case time.Time:
			f.Set(reflect.ValueOf(time.Unix(1, 2).UTC()))
		case string:
			f.SetString("x")
		case bool:
			f.SetBool(true)
		default:
			if f.CanInt() {
				f.SetInt(1)
			} else {
				f.SetUint(1)
			}
		}
		checkEncode(t, r)
	}
}

func FuzzEncode(f *testing.F) {
	f.Add("web", "<\u2028>", []byte{192, 0, 2, 1}, uint16(80), uint8(1), uint8(40), int64(1))
	f.Add("\xff", "\\\"", []byte("0123456789abcdef"), uint16(0), uint8(99), uint8(255), int64(-1))
	f.Fuzz(func(t *testing.T, service, zone string, addr []byte, port uint16, path, reason uint8, n int64) {
		a, _ := netip.AddrFromSlice(addr)
		if zone != "" && a.Is6() {
			a = a.WithZone(zone)
		}
		checkEncode(t, &flow.Record{
			Cookie: uint64(n), Source: netip.AddrPortFrom(a, port), Endpoint: netip.AddrPortFrom(a, port), Service: service,
			Path: flow.Path(path), Reason: flow.Reason(reason), End: flow.Reason(reason ^ 3), Start: time.Unix(n/1000, n).UTC(),
			Duration: time.Duration(n), Retransmits: uint32(n), Open: n%2 == 0,
		})
	})
}

func BenchmarkEncode(b *testing.B) {
	r, buf := record(1), []byte(nil)
	b.ReportAllocs()
	for b.Loop() {
		buf, _ = appendRecord(buf[:0], r)
	}
}
