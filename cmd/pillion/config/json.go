package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// MarshalJSON returns the configuration in its own form: the keys are those of
// the file, in one order, and every setting is said. In a service those are that
// the user said. JSON is YAML, so [Parse] reads it too.
func (c Config) MarshalJSON() ([]byte, error) { return json.Marshal(c.object()) }

// UnmarshalJSON reads what MarshalJSON returned. The values then have no place.
func (c *Config) UnmarshalJSON(data []byte) error {
	d, err := parseDraft("json", data, maxJSON, nil)
	if err != nil {
		return err
	}
	if err := joinPaths(d.problems); err != nil {
		return err
	}
	*c = d.config
	c.at = positions{}
	for i := range c.Services {
		c.Services[i].at = positions{}
	}
	return nil
}

// maxJSON is how many bytes a configuration may have as JSON, where the same
// takes more of them.
const maxJSON = 8 * maxSize

// MarshalJSON returns the service in the form that it has in the file.
func (s Service) MarshalJSON() ([]byte, error) { return json.Marshal(s.object()) }

// object is a mapping whose keys have an order.
type object []member

// member is a key and its value: a text, a number, a bool, an object, or a []any
// of those.
type member struct {
	key   string
	value any
}

// set adds a key. What is a type of ours, or an address, becomes its text.
func (o *object) set(key string, value any) {
	switch v := value.(type) {
	case string, int, bool, object, []any:
	case time.Duration:
		value = v.String()
	default:
		value = fmt.Sprint(v)
	}
	*o = append(*o, member{key, value})
}

// add adds a key whose value says something: it is not zero, nil or empty.
func (o *object) add(key string, value any) {
	v := reflect.ValueOf(value)
	if !v.IsValid() || v.IsZero() || v.Kind() == reflect.Slice && v.Len() == 0 {
		return
	}
	if v.Kind() == reflect.Pointer {
		value = v.Elem().Interface()
	}
	o.set(key, value)
}

// MarshalJSON implements json.Marshaler.
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		if err := e.Encode(m.key); err != nil {
			return nil, fmt.Errorf("encode: %w", err)
		}
		b.WriteByte(':')
		if err := e.Encode(m.value); err != nil {
			return nil, fmt.Errorf("encode %s: %w", m.key, err)
		}
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// list is the values of a slice as members can hold them.
func list[T any](all []T, as func(T) any) []any {
	values := make([]any, 0, len(all))
	for _, v := range all {
		values = append(values, as(v))
	}
	return values
}

// text is a value's text.
func text[T fmt.Stringer](v T) any { return v.String() }

func (c *Config) object() object {
	o := object{{"services", list(c.Services, func(s Service) any { return s.object() })}}
	for _, m := range c.settings() {
		o.set(m.key, m.value)
	}
	return o
}

// settings is what is outside the services.
func (c *Config) settings() object {
	var o object
	o.add("deny", list(c.Deny, text[Rule]))
	o.add("exclude", list(c.Exclude, text[Rule]))
	o.set("default", c.Default)
	o.set("path", c.Path)
	o.add("zone", c.Zone)
	o.set("on_failure", c.OnFailure)
	o.set("connect", c.Connect)
	o.set("no_endpoint", c.NoEndpoint)
	o.set("existing", c.Existing)
	o.set("survive", c.Survive)
	o.set("relay", object{
		{"workers", c.Relay.Workers},
		{"dial_timeout", c.Relay.DialTimeout.String()},
		{"dial_budget", c.Relay.DialBudget.String()},
		{"attempts", c.Relay.Attempts},
		{"idle_timeout", c.Relay.IdleTimeout.String()},
		{"max_lifetime", c.Relay.MaxLifetime.String()},
	})
	o.set("health", object{
		{"failures", c.Health.Failures},
		{"base", c.Health.Base.String()},
		{"max", c.Health.Max.String()},
		{"panic", c.Health.Panic},
	})
	o.set("limits", object{
		{"slots_per_container", c.Limits.SlotsPerContainer},
		{"connections_per_container", c.Limits.ConnectionsPerContainer},
		{"connections", c.Limits.Connections},
	})
	var k object
	k.add("on_demand", c.Kubernetes.OnDemand)
	k.add("server", c.Kubernetes.Server)
	k.add("token_file", c.Kubernetes.TokenFile)
	k.add("ca_file", c.Kubernetes.CAFile)
	k.add("kubeconfig", c.Kubernetes.Kubeconfig)
	k.set("idle", c.Kubernetes.Idle)
	o.set("kubernetes", k)
	o.add("flow_log", c.FlowLog)
	if c.Metrics.IsValid() {
		o.set("metrics", c.Metrics)
	}
	if c.Probes.IsValid() {
		o.set("probes", c.Probes)
	}
	return o
}

func (s *Service) object() object {
	var o object
	o.set("name", s.Name)
	o.set("address", s.Addr)
	o.add("endpoints", list(s.Endpoints, func(e Endpoint) any { return e.object() }))
	if s.Discover != nil {
		o.set("discover", s.Discover.object())
	}
	o.set("policy", s.Policy)
	if s.Policy == flow.PolicyMaglev {
		o.set("hash", s.Hash)
	}
	o.add("path", s.Path)
	o.add("attempts", s.Attempts)
	o.add("idle_timeout", s.IdleTimeout)
	o.add("max_lifetime", s.MaxLifetime)
	if s.Check != nil {
		o.set("health_check", s.Check.object())
	}
	var h object
	h.add("failures", s.Health.Failures)
	h.add("base", s.Health.Base)
	h.add("max", s.Health.Max)
	h.add("panic", s.Health.Panic)
	o.add("health", h)
	o.set("on_remove", s.OnRemove)
	o.add("remove_after", s.RemoveAfter)
	o.add("on_failure", s.OnFailure)
	o.add("connect", s.Connect)
	o.add("no_endpoint", s.NoEndpoint)
	return o
}

func (e *Endpoint) object() object {
	var o object
	o.set("address", e.Addr)
	o.set("weight", int(e.Weight))
	o.add("zone", e.Zone)
	return o
}

func (d *Discover) object() object {
	var o object
	o.add("file", d.File)
	if s := d.DNS; s != nil {
		var dns object
		dns.set("name", s.Name)
		dns.set("type", s.Type)
		dns.add("port", int(s.Port))
		dns.set("min_ttl", s.MinTTL)
		dns.set("max_ttl", s.MaxTTL)
		dns.add("servers", list(s.Servers, text[netip.AddrPort]))
		dns.add("resolv_conf", s.ResolvConf)
		o.set("dns", dns)
	}
	if s := d.Kubernetes; s != nil {
		k := object{{"service", s.Namespace + "/" + s.Name}}
		k.add("port", s.Port)
		o.set("kubernetes", k)
	}
	return o
}

func (c *HealthCheck) object() object {
	var o object
	if c.TCP {
		o.set("tcp", object{})
	}
	if h := c.HTTP; h != nil {
		http := object{{"path", h.Path}}
		http.add("host", h.Host)
		http.set("status", list(h.Status, text[StatusRange]))
		o.set("http", http)
	}
	o.add("command", list(c.Command, func(word string) any { return word }))
	o.set("interval", c.Interval)
	o.set("timeout", c.Timeout)
	o.set("jitter", c.Jitter)
	o.set("healthy", c.Healthy)
	o.set("unhealthy", c.Unhealthy)
	o.add("port", int(c.Port))
	return o
}
