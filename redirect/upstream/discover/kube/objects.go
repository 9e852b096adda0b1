package kube

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unique"
)

// object is one object of the API, reduced to what matters.
type object[C any] struct {
	name, version string
	value         C
}

// metadata is what is read of every object's.
type metadata struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace"`
	ResourceVersion string            `json:"resourceVersion"`
	Labels          map[string]string `json:"labels"`
}

func (m *metadata) check() error {
	if m.Name == "" || m.ResourceVersion == "" {
		return errors.New("an object without a name or a version")
	}
	return nil
}

// service is what is kept of a Service. It is immutable.
type service struct {
	key
	addrs []netip.Addr // ClusterIPs; none if it is headless
	ports []port       // TCP only

	external bool // an ExternalName: it has no endpoints
	local    bool // internalTrafficPolicy: Local
	affinity bool // sessionAffinity: ClientIP
	foreign  bool // some other proxy than kube-proxy cares for it
}

// equal tells whether nothing that matters is different.
func (s *service) equal(t *service) bool {
	return s.key == t.key && slices.Equal(s.addrs, t.addrs) && slices.Equal(s.ports, t.ports) &&
		s.external == t.external && s.local == t.local && s.affinity == t.affinity && s.foreign == t.foreign
}

// port is one of a Service or of an EndpointSlice. Names join the two.
type port struct {
	name   string
	number uint16
}

// slice is what is kept of an EndpointSlice. It is immutable.
type slice struct {
	ports   []port // TCP only, with a number
	members []member
}

// member is an endpoint without its port.
type member struct {
	addr  netip.Addr
	zone  string // interned
	zones string // it is hinted to, each with hintEnd behind it; interned
	is    state
}

// hintEnd is in no zone's name.
const hintEnd = "\n"

// sees is what the member is to an application in a zone.
func (m *member) sees(zone string) state {
	if zone != "" && strings.Contains(hintEnd+m.zones, hintEnd+zone+hintEnd) {
		return m.is | forZone
	}
	return m.is
}

// state is what is known of a member, as bits.
type state uint16

const (
	ready state = 1 << iota
	serving
	terminating
	onNode   // on the application's node
	hasNodes // hinted to some nodes
	forNode  // to the application's
	hasZones // hinted to some zones
	forZone  // to the application's, which a reload may change: see sees
)

const proxyLabel = "service.kubernetes.io/service-proxy-name"

type wirePort struct {
	Name     *string `json:"name"`
	Port     *int    `json:"port"`
	Protocol *string `json:"protocol"`
}

// reduce returns the port, and false if it is none to connect to: not TCP, or of
// no number (which stands for all).
func (p *wirePort) reduce() (port, bool) {
	if p.Protocol != nil && *p.Protocol != "" && *p.Protocol != "TCP" {
		return port{}, false
	}
	if p.Port == nil || *p.Port < 1 || *p.Port > 65535 {
		return port{}, false
	}
	var name string
	if p.Name != nil {
		name = intern(*p.Name)
	}
	return port{name, uint16(*p.Port)}, true
}

func reducePorts(wire []wirePort) []port {
	ports := make([]port, 0, len(wire))
	for _, p := range wire {
		if r, ok := p.reduce(); ok {
			ports = append(ports, r)
		}
	}
	return ports
}

// intern lets equal strings share their memory: there are few zones and names
// of ports, and many endpoints.
func intern(s string) string { return unique.Make(s).Value() }

type wireService struct {
	Metadata metadata `json:"metadata"`
	Spec     struct {
		Type       string     `json:"type"`
		ClusterIP  string     `json:"clusterIP"`
		ClusterIPs []string   `json:"clusterIPs"`
		Ports      []wirePort `json:"ports"`
		Affinity   string     `json:"sessionAffinity"`
		Internal   string     `json:"internalTrafficPolicy"`
	} `json:"spec"`
}

// decodeService reads one Service.
func decodeService(read func(any) error) (object[*service], error) {
	var w wireService
	if err := read(&w); err != nil {
		return object[*service]{}, err
	}
	if err := w.Metadata.check(); err != nil {
		return object[*service]{}, err
	}
	s := &service{
		key:      key{strings.Clone(w.Metadata.Namespace), strings.Clone(w.Metadata.Name)},
		ports:    reducePorts(w.Spec.Ports),
		external: w.Spec.Type == "ExternalName",
		local:    w.Spec.Internal == "Local",
		affinity: w.Spec.Affinity == "ClientIP",
		foreign:  w.Metadata.Labels[proxyLabel] != "",
	}
	addrs := w.Spec.ClusterIPs
	if len(addrs) == 0 {
		addrs = []string{w.Spec.ClusterIP}
	}
	for _, text := range addrs {
		if a, err := netip.ParseAddr(text); err == nil { // else None
			s.addrs = append(s.addrs, a.Unmap())
		}
	}
	return object[*service]{w.Metadata.Name, w.Metadata.ResourceVersion, s}, nil
}

type wireSlice struct {
	Metadata    metadata       `json:"metadata"`
	AddressType string         `json:"addressType"`
	Ports       []wirePort     `json:"ports"`
	Endpoints   []wireEndpoint `json:"endpoints"`
}

type wireEndpoint struct {
	Addresses  []string `json:"addresses"`
	Conditions struct {
		Ready       *bool `json:"ready"`
		Serving     *bool `json:"serving"`
		Terminating *bool `json:"terminating"`
	} `json:"conditions"`
	Node  string `json:"nodeName"`
	Zone  string `json:"zone"`
	Hints struct {
		Zones []named `json:"forZones"`
		Nodes []named `json:"forNodes"`
	} `json:"hints"`
}

type named struct {
	Name string `json:"name"`
}

// decodeSlice reads one EndpointSlice, as an application on that node sees it.
func decodeSlice(read func(any) error, node string) (object[*slice], error) {
	var w wireSlice
	if err := read(&w); err != nil {
		return object[*slice]{}, err
	}
	if err := w.Metadata.check(); err != nil {
		return object[*slice]{}, err
	}
	s := &slice{ports: reducePorts(w.Ports)}
	switch w.AddressType {
	case "IPv4", "IPv6":
	case "FQDN": // kube-proxy knows none either
		return object[*slice]{w.Metadata.Name, w.Metadata.ResourceVersion, s}, nil
	default:
		return object[*slice]{}, fmt.Errorf("slice %s: address type %q", w.Metadata.Name, w.AddressType)
	}
	s.members = make([]member, 0, len(w.Endpoints))
	for i := range w.Endpoints {
		e := &w.Endpoints[i]
		// All of its addresses are the same endpoint; everybody takes the first.
		// One that is no address is left out, as kube-proxy does it.
		addr, ok := e.addr()
		if ok && addr.Is4() == (w.AddressType == "IPv4") {
			s.members = append(s.members, member{addr, intern(e.Zone), intern(e.zones()), e.state(node)})
		}
	}
	if len(s.members) == 0 && len(w.Endpoints) > 0 {
		return object[*slice]{}, fmt.Errorf("slice %s: none of its %d endpoints has an %s address", w.Metadata.Name, len(w.Endpoints), w.AddressType)
	}
	return object[*slice]{w.Metadata.Name, w.Metadata.ResourceVersion, s}, nil
}

func (e *wireEndpoint) addr() (netip.Addr, bool) {
	if len(e.Addresses) == 0 {
		return netip.Addr{}, false
	}
	addr, err := netip.ParseAddr(e.Addresses[0])
	return addr.Unmap(), err == nil && addr.Zone() == ""
}

func (e *wireEndpoint) zones() string {
	var b strings.Builder
	for _, z := range e.Hints.Zones {
		b.WriteString(z.Name + hintEnd)
	}
	return b.String()
}

// state reads the conditions as kube-proxy does: what is not said is ready,
// serves, and does not terminate.
func (e *wireEndpoint) state(node string) state {
	var s state
	set := func(bit state, on bool) {
		if on {
			s |= bit
		}
	}
	yes := func(p *bool) bool { return p == nil || *p }
	has := func(list []named, name string) bool {
		return name != "" && slices.ContainsFunc(list, func(n named) bool { return n.Name == name })
	}
	set(ready, yes(e.Conditions.Ready))
	set(serving, yes(e.Conditions.Serving))
	set(terminating, e.Conditions.Terminating != nil && *e.Conditions.Terminating)
	set(onNode, node != "" && e.Node == node)
	set(hasNodes, len(e.Hints.Nodes) > 0)
	set(forNode, has(e.Hints.Nodes, node))
	set(hasZones, len(e.Hints.Zones) > 0)
	return s
}
