package dns

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/dns/dnsmessage"
)

// must packs a message of a test.
func must(t testing.TB, m dnsmessage.Message) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatalf("pack: %v", err)
	}
	return b
}

func dnsName(s string) dnsmessage.Name { return dnsmessage.MustNewName(s) }

func header(name string, kind dnsmessage.Type, ttl uint32) dnsmessage.ResourceHeader {
	return dnsmessage.ResourceHeader{Name: dnsName(name), Type: kind, Class: dnsmessage.ClassINET, TTL: ttl}
}

func recA(name string, ttl uint32, addr string) dnsmessage.Resource {
	return dnsmessage.Resource{
		Header: header(name, dnsmessage.TypeA, ttl),
		Body:   &dnsmessage.AResource{A: netip.MustParseAddr(addr).As4()},
	}
}

func recAAAA(name string, ttl uint32, addr string) dnsmessage.Resource {
	return dnsmessage.Resource{
		Header: header(name, dnsmessage.TypeAAAA, ttl),
		Body:   &dnsmessage.AAAAResource{AAAA: netip.MustParseAddr(addr).As16()},
	}
}

func recCNAME(name string, ttl uint32, to string) dnsmessage.Resource {
	return dnsmessage.Resource{
		Header: header(name, dnsmessage.TypeCNAME, ttl), Body: &dnsmessage.CNAMEResource{CNAME: dnsName(to)},
	}
}

func recSRV(name string, ttl uint32, priority, weight, port uint16, to string) dnsmessage.Resource {
	return dnsmessage.Resource{Header: header(name, dnsmessage.TypeSRV, ttl), Body: &dnsmessage.SRVResource{
		Priority: priority, Weight: weight, Port: port, Target: dnsName(to),
	}}
}

func recSOA(name string, ttl, minimum uint32) dnsmessage.Resource {
	return dnsmessage.Resource{Header: header(name, dnsmessage.TypeSOA, ttl), Body: &dnsmessage.SOAResource{
		NS: dnsName("ns."), MBox: dnsName("root."), MinTTL: minimum,
	}}
}

func recNS(name string) dnsmessage.Resource {
	return dnsmessage.Resource{Header: header(name, dnsmessage.TypeNS, 60), Body: &dnsmessage.NSResource{NS: dnsName("ns.")}}
}

// reply7 is the message that answers q with id 7.
func reply7(q question, change func(m *dnsmessage.Message)) dnsmessage.Message {
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 7, Response: true, RecursionAvailable: true},
		Questions: []dnsmessage.Question{{Name: dnsName(q.name), Type: q.kind, Class: dnsmessage.ClassINET}},
	}
	change(&m)
	return m
}

func TestUnpack(t *testing.T) {
	web := question{"web.example.", dnsmessage.TypeA}
	addr := netip.MustParseAddr
	type change = func(m *dnsmessage.Message)
	answers := func(r ...dnsmessage.Resource) change {
		return func(m *dnsmessage.Message) { m.Answers = r }
	}
	var loop []dnsmessage.Resource
	var long []dnsmessage.Resource
	for i := range 40 {
		from, to := strings.Repeat("x", i)+"web.example.", strings.Repeat("x", i+1)+"web.example."
		long = append(long, recCNAME(from, 9, to))
	}
	loop = append(loop, recCNAME("web.example.", 9, "b.example."), recCNAME("b.example.", 9, "web.example."))
	for _, tt := range []struct {
		name   string
		change change
		want   *answer
		err    error
		text   string // of another error
	}{
		{"addresses", answers(recA("web.example.", 60, "192.0.2.1"), recA("web.example.", 30, "192.0.2.2")),
			&answer{addrs: []netip.Addr{addr("192.0.2.1"), addr("192.0.2.2")}, ttl: 30 * time.Second}, nil, ""},
		{"another case", answers(recA("WEB.eXample.", 60, "192.0.2.1")),
			&answer{addrs: []netip.Addr{addr("192.0.2.1")}, ttl: time.Minute}, nil, ""},
		{"records of others", answers(
			recA("web.example.", 60, "192.0.2.1"), recA("evil.example.", 1, "192.0.2.66"),
			recAAAA("web.example.", 1, "2001:db8::66"), recCNAME("evil.example.", 1, "web.example.")),
			&answer{addrs: []netip.Addr{addr("192.0.2.1")}, ttl: time.Minute}, nil, ""},
		{"a chain, in any order", answers(
			recA("c.example.", 60, "192.0.2.1"), recCNAME("b.example.", 10, "C.example."), recCNAME("web.example.", 20, "b.example.")),
			&answer{addrs: []netip.Addr{addr("192.0.2.1")}, ttl: 10 * time.Second}, nil, ""},
		{"a chain that leads on", answers(recCNAME("web.example.", 20, "B.example.")),
			&answer{next: "B.example.", ttl: 20 * time.Second}, nil, ""},
		{"a chain to nothing", func(m *dnsmessage.Message) {
			m.Answers = []dnsmessage.Resource{recCNAME("web.example.", 20, "b.example.")}
			m.Authorities = []dnsmessage.Resource{recSOA("example.", 60, 5)}
		}, nil, &missing{question: web, ttl: 5 * time.Second}, ""},
		{"a loop", answers(loop...), nil, errLoop, ""},
		{"a chain without end", answers(long...), nil, errLoop, ""},
		{"a TTL with the topmost bit", answers(recA("web.example.", 1<<31, "192.0.2.1")),
			&answer{addrs: []netip.Addr{addr("192.0.2.1")}}, nil, ""},
		{"a huge TTL", answers(recA("web.example.", 1<<31-1, "192.0.2.1")),
			&answer{addrs: []netip.Addr{addr("192.0.2.1")}, ttl: (1<<31 - 1) * time.Second}, nil, ""},
		{"no such name", func(m *dnsmessage.Message) {
			m.RCode = dnsmessage.RCodeNameError
			m.Authorities = []dnsmessage.Resource{recSOA("example.", 3, 60)}
		}, nil, &missing{question: web, name: true, ttl: 3 * time.Second}, ""},
		{"no such name, and no SOA", func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeNameError },
			nil, &missing{question: web, name: true, ttl: -1}, ""},
		{"no data", func(m *dnsmessage.Message) {
			m.Authorities = []dnsmessage.Resource{recSOA("example.", 60, 3)}
		}, nil, &missing{question: web, ttl: 3 * time.Second}, ""},
		{"no data, and no SOA", func(*dnsmessage.Message) {}, nil, &missing{question: web, ttl: -1}, ""},
		{"a referral", func(m *dnsmessage.Message) {
			m.RecursionAvailable = false
			m.Authorities = []dnsmessage.Resource{recNS("example.")}
		}, nil, errLame, ""},
		{"a referral of a forwarder", func(m *dnsmessage.Message) {
			m.Authorities = []dnsmessage.Resource{recNS(".")}
		}, nil, errLame, ""},
		{"a server that fails", func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeServerFailure },
			nil, refusal(dnsmessage.RCodeServerFailure), ""},
		{"an extended error", func(m *dnsmessage.Message) {
			var h dnsmessage.ResourceHeader
			if err := h.SetEDNS0(1232, 16, false); err != nil {
				t.Fatal(err)
			}
			m.Additionals = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.OPTResource{}}}
		}, nil, refusal(16), ""},
		{"truncated", func(m *dnsmessage.Message) { m.Truncated = true }, nil, errTruncated, ""},
		{"another id", func(m *dnsmessage.Message) { m.ID = 8 }, nil, errNotOurs, ""},
		{"a question", func(m *dnsmessage.Message) { m.Response = false }, nil, errNotOurs, ""},
		{"another operation", func(m *dnsmessage.Message) { m.OpCode = 4 }, nil, errNotOurs, ""},
		{"another name", func(m *dnsmessage.Message) { m.Questions[0].Name = dnsName("evil.example.") }, nil, errNotOurs, ""},
		{"another type", func(m *dnsmessage.Message) { m.Questions[0].Type = dnsmessage.TypeAAAA }, nil, errNotOurs, ""},
		{"another class", func(m *dnsmessage.Message) { m.Questions[0].Class = dnsmessage.ClassCHAOS }, nil, errNotOurs, ""},
		{"no question", func(m *dnsmessage.Message) { m.Questions = nil }, nil, errNotOurs, ""},
		{"no question, since it was not understood", func(m *dnsmessage.Message) {
			m.Questions, m.RCode = nil, dnsmessage.RCodeFormatError
		}, nil, refusal(dnsmessage.RCodeFormatError), ""},
	} {
		got, err := unpack(must(t, reply7(web, tt.change)), web, 7)
		none, ok := errors.AsType[*missing](err)
		want, _ := tt.err.(*missing)
		switch {
		case ok && want != nil:
			if *none != *want {
				t.Errorf("%s: %+v, want %+v", tt.name, none, want)
			}
		case !errors.Is(err, tt.err):
			t.Errorf("%s: error %v, want %v", tt.name, err, tt.err)
		case err == nil:
			if diff := cmp.Diff(tt.want, got, equal, cmp.AllowUnexported(answer{})); diff != "" {
				t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
			}
		default:
		}
	}
}

func FuzzUnpack(f *testing.F) {
	web := question{"web.example.", dnsmessage.TypeA}
	srv := question{"web.example.", dnsmessage.TypeSRV}
	f.Add(must(f, reply7(web, func(m *dnsmessage.Message) {
		m.Answers = []dnsmessage.Resource{recCNAME("web.example.", 1, "b."), recA("b.", 1, "192.0.2.1")}
		m.Authorities = []dnsmessage.Resource{recSOA("example.", 3, 60)}
	})))
	f.Add(must(f, reply7(srv, func(m *dnsmessage.Message) {
		m.Answers = []dnsmessage.Resource{recSRV("web.example.", 1, 1, 1, 1, "b.")}
	})))
	f.Add([]byte{0, 7, 0x80})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, q := range []question{web, srv} {
			a, err := unpack(b, q, 7)
			if err == nil && a.next == "" && len(a.addrs) == 0 && len(a.srvs) == 0 {
				t.Error("neither an answer nor an error")
			}
			if err == nil && (a.ttl < 0 || a.ttl > (1<<31-1)*time.Second) {
				t.Errorf("TTL %v", a.ttl)
			}
			for i := 0; err == nil && i < len(a.addrs); i++ {
				if !a.addrs[i].Is4() {
					t.Errorf("A is %v", a.addrs[i])
				}
			}
		}
	})
}

func TestPack(t *testing.T) {
	q := question{"web.example.", dnsmessage.TypeAAAA}
	for _, edns := range []bool{true, false} {
		b, err := pack(q, 7, edns)
		if err != nil {
			t.Fatal(err)
		}
		var m dnsmessage.Message
		if err := m.Unpack(b); err != nil {
			t.Fatal(err)
		}
		if m.ID != 7 || !m.RecursionDesired || m.Response || len(m.Questions) != 1 || (len(m.Additionals) == 1) != edns {
			t.Errorf("edns %v: %+v", edns, m)
		}
		if edns && (m.Additionals[0].Header.Type != dnsmessage.TypeOPT || m.Additionals[0].Header.Class != udpSize) {
			t.Errorf("OPT record: %+v", m.Additionals[0].Header)
		}
	}
}
