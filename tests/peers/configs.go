package peers

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"
)

// Where Envoy is redirected to, and where it is asked how it is.
const (
	EnvoyPort  = 15001
	EnvoyAdmin = 15000
)

func seconds(d time.Duration) string { return fmt.Sprintf("%ds", int(d.Seconds())) }

// haproxy gives the half-closed all the time there is. It has no abortonclose,
// which takes an application that has ended its half for one that has gone.
func (c Config) haproxy() string {
	var b strings.Builder
	fmt.Fprintf(&b, "global\n\tnbthread %d\n\tmaxconn %d\n", c.Workers, c.Connections)
	if c.AccessLog {
		b.WriteString("\tlog stdout format raw local0\n")
	}
	b.WriteString("defaults\n\tmode tcp\n\toption splice-auto\n\n\toption clitcpka\n\toption srvtcpka\n\ttimeout connect 5s\n")
	for _, what := range []string{"client", "server", "tunnel", "client-fin", "server-fin"} {
		fmt.Fprintf(&b, "\ttimeout %s %s\n", what, seconds(c.Idle))
	}
	if c.AccessLog {
		b.WriteString("\tlog global\n\tlog-format \"%fi:%fp %si:%sp\"\n")
	}
	for n, r := range c.Routes {
		fmt.Fprintf(&b, "listen route%d\n\tbind %s\n\tserver one %s\n", n, r.Listen, r.Endpoint)
	}
	return b.String()
}

// nginx has tcp_nodelay although it is the default, as a statement.
func (c Config) nginx() string {
	var b strings.Builder
	fmt.Fprintf(&b, `
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user root;
daemon off;
worker_processes %d;
worker_rlimit_nofile %d;
pid %s/nginx.pid;
error_log stderr crit;
events { worker_connections %d; }
stream {
	tcp_nodelay on;
	proxy_connect_timeout 5s;
	proxy_timeout %s;
	proxy_half_close on;
	proxy_socket_keepalive on;
`, c.Workers, 2*c.Connections+64, c.Dir, c.Connections, seconds(c.Idle))
	if c.AccessLog {
		fmt.Fprintf(&b, "\tlog_format both '$server_addr:$server_port $upstream_addr';\n\taccess_log %s both;\n",
			filepath.Join(c.Dir, "access.log"))
	}
	for _, r := range c.Routes {
		fmt.Fprintf(&b, "\tserver {\n\t\tlisten %s so_keepalive=on;\n\t\tproxy_pass %s;\n\t}\n", r.Listen, r.Endpoint)
	}
	return b.String() + "}\n"
}

// object and list are JSON.
type (
	object map[string]any
	list   []any
)

// envoy is redirected to, and goes on to the original destination, as in a
// mesh. Resets are passed on as resets (off by default), nothing is limited.
func (c Config) envoy() string {
	keepAlive := object{"keepalive_time": 60}
	limits := object{"thresholds": list{object{"max_connections": 1 << 20, "max_pending_requests": 1 << 20}}}
	clusters := list{object{"name": "original", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s",
		"circuit_breakers": limits, "upstream_connection_options": object{"tcp_keepalive": keepAlive}}}
	chains := list{}
	for n, r := range c.Routes {
		name := fmt.Sprintf("route%d", n)
		clusters = append(clusters, object{"name": name, "type": "STATIC", "connect_timeout": "5s", "circuit_breakers": limits,
			"load_assignment": object{"cluster_name": name, "endpoints": list{object{"lb_endpoints": list{
				object{"endpoint": object{"address": socketAddress(r.Endpoint)}}}}}}})
		chains = append(chains, object{"filters": list{c.tcpProxy(name)}, "filter_chain_match": object{
			"destination_port": r.Listen.Port(),
			"prefix_ranges":    list{object{"address_prefix": r.Listen.Addr().String(), "prefix_len": r.Listen.Addr().BitLen()}}}})
	}
	chains = append(chains, object{"filters": list{c.tcpProxy("original")}})
	listeners := list{}
	for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		filter := typed("envoy.filters.listener.original_dst", "envoy.extensions.filters.listener.original_dst.v3.OriginalDst", object{})
		listeners = append(listeners, object{"name": any.String(), "address": socketAddress(netip.AddrPortFrom(any, EnvoyPort)),
			"listener_filters": list{filter}, "filter_chains": chains})
	}
	config := object{
		"admin":            object{"address": socketAddress(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), EnvoyAdmin))},
		"static_resources": object{"listeners": listeners, "clusters": clusters},
		"layered_runtime": object{"layers": list{object{"name": "static", "static_layer": object{
			"envoy.reloadable_features.propagate_downstream_rst_to_upstream":              true,
			"envoy.reloadable_features.propagate_upstream_rst_through_tunneled_tcp_proxy": true,
		}}}},
	}
	// It is made of strings and numbers.
	text, _ := json.MarshalIndent(config, "", " ")
	return string(text)
}

func (c Config) tcpProxy(cluster string) object {
	config := object{"stat_prefix": cluster, "cluster": cluster, "idle_timeout": seconds(c.Idle)}
	if c.AccessLog {
		config["access_log"] = list{typed("envoy.access_loggers.file", "envoy.extensions.access_loggers.file.v3.FileAccessLog", object{
			"path":       filepath.Join(c.Dir, "access.log"),
			"log_format": object{"text_format_source": object{"inline_string": "%DOWNSTREAM_LOCAL_ADDRESS% %UPSTREAM_REMOTE_ADDRESS%\n"}}})}
	}
	return typed("envoy.filters.network.tcp_proxy", "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", config)
}

func typed(name, kind string, config object) object {
	config["@type"] = "type.googleapis.com/" + kind
	return object{"name": name, "typed_config": config}
}

func socketAddress(a netip.AddrPort) object {
	return object{"socket_address": object{"address": a.Addr().String(), "port_value": a.Port()}}
}
