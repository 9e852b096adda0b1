package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"golang.org/x/sys/unix"
)

// lookUpLimit is how long a host name may take to resolve. The one who asked is
// still waiting then.
const lookUpLimit = 8 * time.Second

// explainer answers what happens to connections to a destination. All of its
// functions are called by several goroutines at once.
type explainer struct {
	// tryOut asks the kernel side's own code: [loader.Datapath.DryRun].
	tryOut func(source netip.Addr, dst netip.AddrPort) (loader.Verdict, error)
	// config is the configuration that holds, whose rules tryOut goes by.
	config func() *config.Config
	// services are those of status.
	services func() []admin.ServiceStatus
	// noRoom tells whether there is no room for the endpoints of a service.
	noRoom func(name string) bool
	// lookUp resolves a host name as the application would: [net.Resolver]'s
	// LookupNetIP.
	lookUp func(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// explainer returns what answers for an instance.
func (i *instance) explainer() *explainer {
	return &explainer{
		tryOut:   i.datapath.DryRun,
		config:   i.control.inForce,
		services: i.control.serviceStatus,
		noRoom:   i.control.noRoom,
		lookUp:   net.DefaultResolver.LookupNetIP,
	}
}

// noRoom tells whether there is no room for the endpoints of a service.
func (c *control) noRoom(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	is := func(r admin.Refusal) bool { return r.Name == name }
	return slices.ContainsFunc(c.tooMany, is) || slices.ContainsFunc(c.lacking, is)
}

// explain implements the function of [admin.API].
func (e *explainer) explain(ctx context.Context, q admin.ExplainQuery) ([]admin.Explanation, error) {
	c, services := e.config(), e.services()
	targets, err := e.targets(ctx, q.Destination, c, services)
	if err != nil {
		return nil, err
	}
	if q.Source.IsValid() {
		targets = slices.DeleteFunc(targets, func(a netip.AddrPort) bool { return a.Addr().Is4() != q.Source.Is4() })
		if len(targets) == 0 {
			return nil, &admin.Error{Code: http.StatusBadRequest, Message: fmt.Sprintf("source %s: %s is not of its family", q.Source, q.Destination)}
		}
	}
	all := make([]admin.Explanation, 0, len(targets))
	for _, dst := range targets {
		v, err := e.tryOut(q.Source, dst)
		if err != nil {
			return nil, fmt.Errorf("try out %s: %w", dst, err)
		}
		x := e.explanation(c, &v, dst, services)
		x.Asked, x.Source = q.Destination, q.Source
		all = append(all, x)
	}
	return all, nil
}

// targets are the addresses that dst stands for, unmapped. An address is that,
// whatever is called by it; a service's name goes before a host's.
func (e *explainer) targets(ctx context.Context, dst string, c *config.Config, services []admin.ServiceStatus) ([]netip.AddrPort, error) {
	if a, err := netip.ParseAddrPort(dst); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a.Addr().Unmap(), a.Port())}, nil
	}
	for _, s := range services {
		if a, ok := serviceAddr(&s); ok && s.Name == dst {
			return []netip.AddrPort{a}, nil
		}
	}
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(dst, "["), "]")); err == nil {
		return portsOf(a.Unmap(), c, services), nil
	}
	host, port, err := splitHost(dst)
	if err != nil {
		return nil, err
	}
	addrs, err := e.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	var all []netip.AddrPort
	for _, a := range addrs {
		if port == 0 {
			all = append(all, portsOf(a, c, services)...)
		} else {
			all = append(all, netip.AddrPortFrom(a, port))
		}
	}
	return all, nil
}

// splitHost parts a host name from its port, 0 if it has none.
func splitHost(dst string) (host string, port uint16, err error) {
	host, text, found := strings.Cut(dst, ":")
	if !found {
		return host, 0, nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || host == "" {
		return "", 0, &admin.Error{Code: http.StatusBadRequest, Message: fmt.Sprintf(
			"%q is no address, service or host name: want for example 10.96.0.12:80, [2001:db8::1]:80, web or web.example:80", dst)}
	}
	return host, uint16(n), nil
}

// resolve returns the addresses of a host, unmapped, each once.
func (e *explainer) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, lookUpLimit)
	defer cancel()
	addrs, err := e.lookUp(ctx, "ip", host)
	if e, ok := errors.AsType[*net.DNSError](err); ok && e.IsNotFound {
		return nil, &admin.Error{Code: http.StatusNotFound, Message: fmt.Sprintf("no service and no host is called %q", host)}
	}
	if err != nil {
		return nil, fmt.Errorf("look up %q, which no service is called: %w", host, err)
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs), nil
}

// portsOf are the ports of an address that rules and services name, and one, 0, for all
// others.
func portsOf(addr netip.Addr, c *config.Config, services []admin.ServiceStatus) []netip.AddrPort {
	var all []netip.AddrPort
	for _, r := range slices.Concat(c.Deny, c.Exclude) {
		if r.Port != 0 && r.Prefix.Contains(addr) {
			all = append(all, netip.AddrPortFrom(addr, r.Port))
		}
	}
	for _, s := range services {
		if a, ok := serviceAddr(&s); ok && a.Addr() == addr {
			all = append(all, a)
		}
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return append(slices.Compact(all), netip.AddrPortFrom(addr, 0))
}

// serviceAddr is the address of a service; ok is false if it has none.
func serviceAddr(s *admin.ServiceStatus) (a netip.AddrPort, ok bool) {
	a, err := netip.ParseAddrPort(s.Address)
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), err == nil
}

// explanation says in words of the configuration what the kernel side decided.
func (e *explainer) explanation(c *config.Config, v *loader.Verdict, dst netip.AddrPort, services []admin.ServiceStatus) admin.Explanation {
	x := admin.Explanation{
		Destination: dst,
		Path:        v.Path,
		Reason:      v.Reason,
		Meaning:     meaning(v.Reason),
		OnFailure:   string(c.OnFailure),
	}
	for _, s := range services {
		if a, ok := serviceAddr(&s); ok && a == dst {
			x.Service, x.Why = &s, s.Why
			break
		}
	}
	var own config.Service // zero: what no service says
	if i := slices.IndexFunc(c.Services, func(s config.Service) bool { return s.Addr == dst }); i >= 0 {
		own = c.Services[i]
		x.OnFailure = string(cmp.Or(own.OnFailure, c.OnFailure))
	}
	if x.Service == nil && v.Reason == flow.ReasonDefault {
		x.Why = []string{place(fmt.Sprintf("%s: default: %s is what is left for destinations that nothing names", flow.PathPass, c.Default), c.Where("default"))}
	}
	x.Rule = ruleOf(c, v, dst, x.Service)
	if picks(&x) {
		x.Pick, x.Tier = v.Endpoint, v.Tier
	}
	if x.Service != nil {
		x.Why = cheaperThan(v.Path, x.Rule.Kind, x.Why)
		x.Meaning += e.passing(v, x.Service)
	}
	if v.Path == flow.PathDeny {
		x.Errno = unix.ErrnoName(v.Errno)
	}
	return x
}

// passing says, of a service, why it is for now on a cheaper path than the configuration
// means; the kernel side, which was told so, calls that the service's own. Empty: it is not.
func (e *explainer) passing(v *loader.Verdict, s *admin.ServiceStatus) string {
	source := s.Source.Kind != "" && s.Source.Kind != admin.SourceStatic
	switch {
	case v.Reason != flow.ReasonService || v.Path >= s.Path:
		return ""
	case e.noRoom(s.Name):
		return ", but the kernel has no room for its endpoints: on_failure decides"
	case source && s.Source.Updated.IsZero():
		return ", but its source has not told any endpoints yet: on_failure decides"
	default:
		// A process that has just begun, or a change that is under way.
		return ", and the kernel still goes by an earlier state of it"
	}
}

// picks tells whether a connection gets an endpoint of the service at all: not where a
// rule goes before it, and not where it is refused. A dry pick is made all the same.
func picks(x *admin.Explanation) bool {
	return x.Rule.Kind == admin.RuleService && x.Path != flow.PathDeny
}

// cheaperThan keeps, of why a service is not on cheaper paths, what is about paths that
// are cheaper than the one that its connections take: where a rule goes before the
// service, or the handler is not there, that is another one.
func cheaperThan(path flow.Path, rule string, why []string) []string {
	if rule != admin.RuleService {
		return nil
	}
	if path == flow.PathDeny {
		return why
	}
	return slices.DeleteFunc(slices.Clone(why), func(text string) bool {
		of, _, _ := strings.Cut(text, ":")
		n := slices.IndexFunc(flow.Paths(), func(p flow.Path) bool { return p.String() == of })
		return n >= 0 && flow.Paths()[n] >= path
	})
}

// place appends where to text, if it is known.
func place(text, where string) string {
	if where == "" {
		return text
	}
	return text + " (" + where + ")"
}

// ruleOf names the rule that decided.
func ruleOf(c *config.Config, v *loader.Verdict, dst netip.AddrPort, s *admin.ServiceStatus) admin.Rule {
	switch {
	case v.Reason == flow.ReasonDenied:
		return listed(c, admin.RuleDeny, c.Deny, v.Rule, dst)
	case v.Reason == flow.ReasonExcluded:
		return listed(c, admin.RuleExclude, c.Exclude, v.Rule, dst)
	case builtin(v.Reason):
		return admin.Rule{Kind: admin.RuleBuiltin, Text: "built in: never redirected"}
	case v.Reason == flow.ReasonSlotAddress:
		return admin.Rule{Kind: admin.RuleBuiltin, Text: "built in: nobody dials slots"}
	case v.Service.IsValid() && s != nil:
		return admin.Rule{Kind: admin.RuleService, Text: "service " + s.Name, Where: s.Where}
	case v.Service.IsValid():
		// The configuration is being replaced at this moment.
		return admin.Rule{Kind: admin.RuleService, Text: "service " + v.Service.String()}
	default:
		return admin.Rule{Kind: admin.RuleDefault, Text: "default: " + c.Default.String(), Where: c.Where("default")}
	}
}

// listed is the rule of that index in a list of the configuration, which names dst. There
// is none while the kernel side goes by an earlier list: it is being given another one, or
// the sources of a process that has taken over have not told yet.
func listed(c *config.Config, kind string, rules []config.Rule, index int, dst netip.AddrPort) admin.Rule {
	if index < 0 || index >= len(rules) || !rules[index].Prefix.Contains(dst.Addr()) || rules[index].Port != 0 && rules[index].Port != dst.Port() {
		return admin.Rule{Kind: kind, Text: "a rule that is being replaced"}
	}
	return admin.Rule{
		Kind:  kind,
		Text:  kind + " " + rules[index].String(),
		Where: c.Where(fmt.Sprintf("%s[%d]", kind, index)),
	}
}

// builtin tells whether a reason is one of Pillion's own to leave a destination
// alone.
func builtin(r flow.Reason) bool {
	switch r {
	case flow.ReasonProtocol, flow.ReasonNetns, flow.ReasonBoundDevice, flow.ReasonLoopback, flow.ReasonLinkLocal,
		flow.ReasonMetadata, flow.ReasonOwnAddress, flow.ReasonMulticast, flow.ReasonSelf, flow.ReasonForeignSlot,
		flow.ReasonNoRoute, flow.ReasonForeignSource:
		return true
	default:
		return false
	}
}

// meanings are the reasons that a connect hook gives.
var meanings = map[flow.Reason]string{
	flow.ReasonService:       "a service names the destination",
	flow.ReasonDefault:       "no rule and no service names the destination, and the default is relay",
	flow.ReasonProtocol:      "it is not TCP",
	flow.ReasonNetns:         "the socket lives in another network namespace",
	flow.ReasonBoundDevice:   "the socket is bound to a device, and from there no slot can be reached",
	flow.ReasonLoopback:      "it is a loopback address",
	flow.ReasonLinkLocal:     "it is a link-local address",
	flow.ReasonMetadata:      "it is a cloud provider's metadata service",
	flow.ReasonOwnAddress:    "it is an address of this network namespace",
	flow.ReasonMulticast:     "it is a multicast or broadcast address",
	flow.ReasonSelf:          "it is the handler's own socket",
	flow.ReasonForeignSlot:   "it is a slot of another instance, which has decided already",
	flow.ReasonExcluded:      "an exclusion names the destination",
	flow.ReasonDefaultPass:   "no rule and no service names the destination, and the default is pass",
	flow.ReasonNoRoute:       "the kernel has no route to it, and says so itself",
	flow.ReasonForeignSource: "the source is no address of this network namespace, or one of loopback: nothing would come back to it",
	flow.ReasonDenied:        "a deny rule names the destination",
	flow.ReasonSlotAddress:   "it is one of Pillion's own slots",
	flow.ReasonHandlerAbsent: "the handler is not there, or is draining: on_failure decides",
	flow.ReasonHandlerStale:  "the handler gives no sign of life: on_failure decides",
	flow.ReasonHandlerBusy:   "the handler's accept queues are nearly full: on_failure decides",
	flow.ReasonNoSlot:        "every slot is taken: on_failure decides",
	flow.ReasonSlotQuota:     "the container has used up its share of slots: on_failure decides",
	flow.ReasonLiveFull:      "too many connections are open: on_failure decides",
	flow.ReasonConnQuota:     "the container has too many connections open: on_failure decides",
	flow.ReasonNoFamily:      "there are no slots in this address family: on_failure decides",
	flow.ReasonNoMemory:      "the kernel has no memory for the decision: on_failure decides",
	flow.ReasonNoEndpoint:    "the service has no endpoint that may be picked",
}

// meaning is a reason in words.
func meaning(r flow.Reason) string { return cmp.Or(meanings[r], r.String()) }
