package dns

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// udpSize is the largest answer that is taken by UDP: one that no path
	// fragments.
	udpSize = 1232
	// maxChain is how many CNAME records may lead to an answer.
	maxChain = 16
)

// question is what a server is asked.
type question struct {
	name string // absolute
	kind dnsmessage.Type
}

func (q question) String() string {
	return strings.TrimPrefix(q.kind.String(), "Type") + " of " + strings.TrimSuffix(q.name, ".")
}

// answer is what a server says.
type answer struct {
	addrs []netip.Addr
	srvs  []dnsmessage.SRVResource
	// ttl is how long all of it holds.
	ttl time.Duration
	// next is a name that the answer leads to without saying what that has.
	next string
}

// missing is the answer that there is nothing: no such name, or none of its
// records of that type.
type missing struct {
	question question
	name     bool // no such name
	// ttl is how long that holds; negative if nothing is said.
	ttl time.Duration
}

func (m *missing) Error() string {
	if m.name {
		return fmt.Sprintf("%s: no such name (NXDOMAIN)", m.question)
	}
	return fmt.Sprintf("%s: the name has none", m.question)
}

// Answers that are none.
var (
	errNotOurs   = errors.New("an answer to another question")
	errTruncated = errors.New("the answer is truncated")
	errLame      = errors.New("the server does not look for answers (a referral)")
	errLoop      = errors.New("the answer goes round in a loop of CNAME records")
)

// refusal is a server's error.
type refusal dnsmessage.RCode

func (r refusal) Error() string {
	switch dnsmessage.RCode(r) {
	case dnsmessage.RCodeFormatError:
		return "FORMERR"
	case dnsmessage.RCodeServerFailure:
		return "SERVFAIL"
	case dnsmessage.RCodeNotImplemented:
		return "NOTIMP"
	case dnsmessage.RCodeRefused:
		return "REFUSED"
	default:
		return fmt.Sprintf("error %d", uint16(r))
	}
}

// pack makes the message that asks q.
func pack(q question, id uint16, edns bool) ([]byte, error) {
	name, err := dnsmessage.NewName(q.name)
	if err != nil {
		return nil, fmt.Errorf("name %q: %w", q.name, err)
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: name, Type: q.kind, Class: dnsmessage.ClassINET}},
	}
	if edns {
		var h dnsmessage.ResourceHeader
		if err := h.SetEDNS0(udpSize, dnsmessage.RCodeSuccess, false); err != nil {
			return nil, fmt.Errorf("set EDNS0: %w", err)
		}
		m.Additionals = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.OPTResource{}}}
	}
	return m.Pack()
}

// records are those of an answer, by name in lower case.
type records struct {
	cnames map[string]link
	addrs  map[string][]netip.Addr
	srvs   map[string][]dnsmessage.SRVResource
	ttls   map[string]time.Duration // of addrs and srvs
	// soa is how long a "no" holds, negative without a SOA record.
	soa   time.Duration
	other bool // there are records of authority that are no SOA
}

type link struct {
	to  string
	ttl time.Duration
}

// unpack reads the answer to q. The errors are errNotOurs, errTruncated, a
// refusal, a *missing, and those of a message that makes no sense.
func unpack(b []byte, q question, id uint16) (*answer, error) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	if h.ID != id || !h.Response || h.OpCode != 0 {
		return nil, errNotOurs
	}
	asked, err := p.AllQuestions()
	if err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	switch {
	case len(asked) == 0 && h.RCode == dnsmessage.RCodeFormatError:
		return nil, refusal(h.RCode) // it could not read the question
	case len(asked) != 1 || fold(asked[0].Name.String()) != fold(q.name) ||
		asked[0].Type != q.kind || asked[0].Class != dnsmessage.ClassINET:
		return nil, errNotOurs
	case h.Truncated:
		return nil, errTruncated
	default:
	}
	r, rcode, err := read(&p, q.kind, h.RCode)
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the answer: %w", err)
	case rcode == dnsmessage.RCodeNameError:
		return nil, &missing{question: q, name: true, ttl: r.soa}
	case rcode != dnsmessage.RCodeSuccess:
		return nil, refusal(rcode)
	default:
	}
	a, err := r.follow(q)
	if err != nil || a.next != "" || len(a.addrs) > 0 || len(a.srvs) > 0 {
		return a, err
	}
	if r.soa < 0 && !h.Authoritative && (!h.RecursionAvailable || r.other) {
		return nil, errLame
	}
	return nil, &missing{question: q, ttl: r.soa}
}

// read reads everything after the question.
func read(p *dnsmessage.Parser, kind dnsmessage.Type, rcode dnsmessage.RCode) (*records, dnsmessage.RCode, error) {
	r := &records{
		cnames: make(map[string]link),
		addrs:  make(map[string][]netip.Addr),
		srvs:   make(map[string][]dnsmessage.SRVResource),
		ttls:   make(map[string]time.Duration),
		soa:    -1,
	}
	if err := each(p.AnswerHeader, func(h dnsmessage.ResourceHeader) error { return r.answer(p, h, kind) }); err != nil {
		return nil, 0, err
	}
	if err := each(p.AuthorityHeader, func(h dnsmessage.ResourceHeader) error { return r.authority(p, h) }); err != nil {
		return nil, 0, err
	}
	err := each(p.AdditionalHeader, func(h dnsmessage.ResourceHeader) error {
		if h.Type == dnsmessage.TypeOPT {
			rcode = h.ExtendedRCode(rcode)
		}
		return p.SkipAdditional()
	})
	return r, rcode, err
}

func each(next func() (dnsmessage.ResourceHeader, error), do func(dnsmessage.ResourceHeader) error) error {
	for {
		h, err := next()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return nil
		}
		if err == nil {
			err = do(h)
		}
		if err != nil {
			return err
		}
	}
}

func (r *records) answer(p *dnsmessage.Parser, h dnsmessage.ResourceHeader, kind dnsmessage.Type) error {
	name := fold(h.Name.String())
	ttl := seconds(h.TTL)
	switch {
	case h.Class != dnsmessage.ClassINET || h.Type != kind && h.Type != dnsmessage.TypeCNAME:
		return p.SkipAnswer()
	case h.Type == dnsmessage.TypeCNAME:
		c, err := p.CNAMEResource()
		if err == nil {
			r.cnames[name] = link{to: c.CNAME.String(), ttl: ttl}
		}
		return err
	case h.Type == dnsmessage.TypeA:
		a, err := p.AResource()
		if err != nil {
			return err
		}
		r.addrs[name] = append(r.addrs[name], netip.AddrFrom4(a.A))
	case h.Type == dnsmessage.TypeAAAA:
		a, err := p.AAAAResource()
		if err != nil {
			return err
		}
		r.addrs[name] = append(r.addrs[name], netip.AddrFrom16(a.AAAA))
	default:
		s, err := p.SRVResource()
		if err != nil {
			return err
		}
		r.srvs[name] = append(r.srvs[name], s)
	}
	if least, ok := r.ttls[name]; !ok || ttl < least {
		r.ttls[name] = ttl
	}
	return nil
}

func (r *records) authority(p *dnsmessage.Parser, h dnsmessage.ResourceHeader) error {
	if h.Type != dnsmessage.TypeSOA {
		r.other = true
		return p.SkipAuthority()
	}
	s, err := p.SOAResource()
	if err == nil {
		r.soa = min(seconds(s.MinTTL), seconds(h.TTL))
	}
	return err
}

// follow goes from the name that was asked for along the chain of CNAME records.
// What else there is in the answer was not asked for, and is not believed.
func (r *records) follow(q question) (*answer, error) {
	name, ttl := fold(q.name), time.Duration(1<<62)
	original := q.name
	for range maxChain {
		if least, ok := r.ttls[name]; ok {
			return &answer{addrs: r.addrs[name], srvs: r.srvs[name], ttl: min(ttl, least)}, nil
		}
		l, ok := r.cnames[name]
		switch {
		case ok:
			original, name, ttl = l.to, fold(l.to), min(ttl, l.ttl)
		case name == fold(q.name) || r.soa >= 0:
			return &answer{}, nil
		default:
			return &answer{next: original, ttl: ttl}, nil
		}
	}
	return nil, errLoop
}

// seconds reads a TTL. RFC 2181, section 8: one with the topmost bit is 0.
func seconds(ttl uint32) time.Duration {
	if ttl > 1<<31-1 {
		return 0
	}
	return time.Duration(ttl) * time.Second
}

// fold makes lower-case letters of those of ASCII, and of those only, as names are
// compared.
func fold(name string) string {
	b := []byte(name)
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}
