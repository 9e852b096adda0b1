package probe

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/pillion-project/pillion/tests/testutil"
)

// Slots that the rules of the tests are tried on.
const (
	trySlot4 = "240.0.0.5"
	trySlot6 = "fd70:696c:6c69::5"
)

// TestFirewall plays rule sets through and then asks the kernel: a connection
// to a slot has to time out where the finding is a failure, and only there.
func TestFirewall(t *testing.T) {
	testutil.Need(t, "nft")
	testutil.RequireRoot(t)
	tests := map[string]struct {
		rules string
		want  Level
		says  string
	}{
		"nothing":             {"", OK, "0 tables"},
		"counters":            {out(`counter accept`), OK, "1 tables"},
		"bogons out":          {out(`ip daddr 240.0.0.0/4 drop`), Fail, "handle"},
		"bogons out, reject":  {out(`ip daddr 240.0.0.0/4 reject`), Fail, "output"},
		"bogons in a set":     {out(`ip daddr { 10.0.0.0/8, 240.0.0.0/4 } drop`), Fail, "240.0.0.0/10"},
		"bogons in a named":   {`table inet t { set bogons { type ipv4_addr; flags interval; elements = { 0.0.0.0/8, 224.0.0.0-255.255.255.255 } }; chain o { type filter hook output priority 0; ip daddr @bogons counter drop; }; }`, Fail, "chain o"},
		"other addresses":     {out(`ip daddr { 10.0.0.0/8, 198.18.0.0/15 } drop`), OK, ""},
		"not other addresses": {out(`ip daddr != 10.0.0.0/8 ip daddr != 127.0.0.0/8 drop`), Fail, ""},
		"range":               {out(`ip daddr 239.0.0.0-240.255.255.255 drop`), Fail, ""},
		"above":               {out(`ip daddr >= 240.0.0.0 drop`), Fail, ""},
		"bogon sources":       {in(`ip saddr 240.0.0.0/4 drop`), Fail, "from 240.0.0.0/10"},
		"not on lo":           {in(`iifname != "lo" ip saddr 240.0.0.0/4 drop`), OK, ""},
		"not by index":        {in(`iif != lo ip saddr 240.0.0.0/4 drop`), OK, ""},
		"v6":                  {out(`ip6 daddr fc00::/7 drop`), Fail, "fd70:696c:6c69::/48"},
		"v6 source, full":     {in(`ip6 saddr fd70:696c:6c69::5 drop`), Fail, "from fd70"},
		"protocol":            {out(`meta l4proto udp drop`), OK, ""},
		"tcp":                 {out(`meta l4proto tcp drop`), Fail, ""},
		"family":              {out(`meta nfproto ipv6 drop`), Fail, "fd70"},
		"closed input":        {policy("input", ``), Fail, "policy drop"},
		"usual input":         {policy("input", `ct state established,related accept; iifname lo accept; tcp dport 22 accept`), OK, ""},
		"input by vmap":       {policy("input", `ct state vmap { established : accept, related : accept, invalid : drop }; iifname vmap { "lo" : accept }`), OK, ""},
		"input without lo":    {policy("input", `ct state established,related accept; ip saddr 10.0.0.0/8 accept; ip6 saddr fe80::/10 accept`), Warn, "may drop"},
		"input without new":   {policy("input", `ct state established,related accept`), Fail, "policy"},
		"closed output":       {policy("output", `oif "lo" accept`), OK, ""},
		"closed output, lo4":  {policy("output", `ip daddr 127.0.0.0/8 accept`), Fail, "policy"},
		"closed forward":      {policy("forward", ``), OK, ""},
		"jump":                {`table ip t { chain bad { ip daddr 224.0.0.0/3 drop; }; chain o { type filter hook output priority 0; tcp flags syn jump bad; }; }`, Fail, "chain bad"},
		"jump and return":     {`table ip t { chain bad { return; ip daddr 240.0.0.0/4 drop; }; chain o { type filter hook output priority 0; jump bad; }; }`, OK, ""},
		"goto":                {`table ip t { chain fine { accept; }; chain o { type filter hook output priority 0; goto fine; drop; }; }`, OK, ""},
		"accepted before":     {out(`oifname lo accept; ip daddr 240.0.0.0/4 drop`), OK, ""},
		"by owner":            {out(`meta skuid 12345 ip daddr 240.0.0.0/4 drop`), Warn, "may drop"},
		"by another owner":    {out(`meta skuid 12345 tcp dport 25 drop`), Warn, "user or cgroup of the sender"},
		"by port":             {out(`tcp dport 25 drop`), OK, ""},
		"by port and address": {out(`ip daddr . tcp dport { 240.0.0.5 . 25, 10.0.0.1 . 80 } drop`), Warn, ""},
		"by mark":             {out(`meta mark 7 accept; ip daddr 240.0.0.0/4 drop`), Warn, ""},
		"limit":               {out(`limit rate over 1000/second burst 1000 packets drop`), OK, ""},
		"prerouting":          {chainAt("prerouting", "raw", `ip daddr 240.0.0.0/4 drop`), Fail, ""},
		"postrouting":         {chainAt("postrouting", "mangle", `ip saddr 240.0.0.0/4 drop`), Fail, ""},
		"dormant":             {`table ip t { flags dormant; chain o { type filter hook output priority 0; ip daddr 240.0.0.0/4 drop; }; }`, OK, ""},
		"invalid":             {out(`ct state invalid drop`), OK, ""},
		"bridge":              {`table bridge t { chain o { type filter hook output priority 0; drop; }; }`, OK, ""},
		"two chains":          {`table ip t { chain a { type filter hook output priority 0; accept; }; chain b { type filter hook output priority 5; ip daddr 240.0.0.0/4 drop; }; }`, Fail, "chain b"},
		"reverse path":        {chainAt("prerouting", "raw", `meta nfproto ipv4 fib saddr . iif oif missing drop`), OK, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := testutil.NewNS(t)
			slotRoutes(t, ns)
			ns.Do(t, func() error { return nft(tt.rules) })
			var found []Finding
			ns.Do(t, func() error {
				found = checkFirewall(context.Background(), newMachine(Options{}))
				return nil
			})
			wellFormed(t, found)
			worst := OK
			var text strings.Builder
			for _, f := range found {
				worst = max(worst, f.Level)
				fmt.Fprintf(&text, "%s: %s\n", f.Level, f.Detail)
			}
			if worst != tt.want || !strings.Contains(text.String(), tt.says) {
				t.Errorf("want %s with %q, got\n%s", tt.want, tt.says, &text)
			}
			if worst == Warn {
				return // it depends
			}
			// What has to work may take its time on a busy machine.
			limit := 10 * time.Second
			if worst == Fail {
				limit = 300 * time.Millisecond
			}
			if err := reach(ns, limit); (err != nil) != (worst == Fail) {
				t.Errorf("the kernel says %v, the finding is\n%s", err, &text)
			}
		})
	}
}

func out(rule string) string { return chainAt("output", "filter", rule) }
func in(rule string) string  { return chainAt("input", "filter", rule) }

func chainAt(hook, priority, rule string) string {
	return fmt.Sprintf("table inet t { chain %s { type filter hook %s priority %s; %s; }; }", hook, hook, priority, rule)
}

func policy(hook, rules string) string {
	if rules != "" {
		rules += ";"
	}
	return fmt.Sprintf("table inet t { chain %s { type filter hook %s priority 0; policy drop; %s }; }", hook, hook, rules)
}

func nft(rules string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("load rules: %w: %s", err, msg)
	}
	return nil
}

// slotRoutes makes slots local, as Pillion does.
func slotRoutes(t *testing.T, ns *testutil.NS) {
	t.Helper()
	ns.Do(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, cidr := range []string{"240.0.0.0/16", "fd70:696c:6c69::/64"} {
			_, dst, err := net.ParseCIDR(cidr)
			if err != nil {
				return err
			}
			if err := netlink.RouteAdd(&netlink.Route{
				LinkIndex: lo.Attrs().Index, Dst: dst, Protocol: RouteProtocol, Type: 2, Table: 255, Scope: netlink.SCOPE_HOST,
			}); err != nil {
				return err
			}
		}
		return nil
	})
}

// reach connects to a slot of each family, within limit each.
func reach(ns *testutil.NS, limit time.Duration) error {
	return ns.Run(func() error {
		// A wildcard listener answers on slots: nothing steers them here.
		ln, err := net.Listen("tcp", ":0")
		if err != nil {
			return err
		}
		defer ln.Close()
		_, port, err := net.SplitHostPort(ln.Addr().String())
		if err != nil {
			return err
		}
		for _, addr := range []string{trySlot4, trySlot6} {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(addr, port), limit)
			if err != nil {
				return err
			}
			c.Close()
		}
		return nil
	})
}

func TestSavedRules(t *testing.T) {
	filter := func(lines ...string) string {
		return "# Generated\n*filter\n:INPUT ACCEPT [1:2]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n:bogons - [0:0]\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
	}
	tests := map[string]struct {
		text string
		v6   bool
		want Level
	}{
		"empty":            {text: filter()},
		"drop":             {text: filter("-A OUTPUT -d 240.0.0.0/4 -j DROP"), want: Fail},
		"reject":           {text: filter("-A OUTPUT -d 240.0.0.0/4 -j REJECT --reject-with icmp-port-unreachable"), want: Fail},
		"source":           {text: filter("-A INPUT -s 240.0.0.0/4 -j DROP"), want: Fail},
		"not on lo":        {text: filter("-A INPUT -s 240.0.0.0/4 ! -i lo -j DROP")},
		"another device":   {text: filter("-A INPUT -s 240.0.0.0/4 -i eth+ -j DROP")},
		"not ours":         {text: filter("-A OUTPUT ! -d 10.0.0.0/8 -j DROP"), want: Fail},
		"elsewhere":        {text: filter("-A OUTPUT -d 10.0.0.0/8 -j DROP")},
		"v6":               {text: filter("-A OUTPUT -d fc00::/7 -j DROP"), v6: true, want: Fail},
		"chain":            {text: filter("-A OUTPUT -p tcp -j bogons", "-A bogons -d 224.0.0.0/3 -m comment --comment \"no -j ACCEPT \\\" here\" -j DROP"), want: Fail},
		"chain for udp":    {text: filter("-A OUTPUT -p udp -j bogons", "-A bogons -d 224.0.0.0/3 -j DROP")},
		"missing chain":    {text: filter("-A OUTPUT -j NFQUEUE --queue-num 1", "-A OUTPUT -d 240.0.0.0/4 -j DROP"), want: Warn},
		"doubtful":         {text: filter("-A OUTPUT -d 240.0.0.0/4 -m owner --uid-owner 7 -j DROP"), want: Warn},
		"unnamed doubt":    {text: filter("-A OUTPUT -m owner --uid-owner 7 -j DROP")},
		"states":           {text: filter("-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A INPUT -j DROP"), want: Fail},
		"all states":       {text: filter("-A INPUT -m state --state NEW,ESTABLISHED -j ACCEPT", "-A INPUT -j DROP")},
		"log first":        {text: filter("-A OUTPUT -j LOG --log-prefix \"-j ACCEPT\"", "-A OUTPUT -j DROP"), want: Fail},
		"closed":           {text: strings.ReplaceAll(filter("-A INPUT -i lo -j ACCEPT"), ":INPUT ACCEPT", ":INPUT DROP")},
		"closed to all":    {text: strings.ReplaceAll(filter(), ":INPUT ACCEPT", ":INPUT DROP"), want: Fail},
		"unfinished lines": {text: "*filter\n:\n:INPUT\n-A \n-A INPUT\n-A OUTPUT -j\n-A OUTPUT -d\n"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			worst := OK
			tables := parseSaved(tt.text, tt.v6)
			if named := strings.Contains(tt.text, "owner"); (len(judgeSenders(tables)) > 0) != named {
				t.Errorf("a rule about the sender is missed or made up")
			}
			for _, f := range judgeHits(play(tables)) {
				worst = max(worst, f.Level)
			}
			if worst != tt.want {
				t.Errorf("got %s, want %s", worst, tt.want)
			}
		})
	}
}

// FuzzAttrs feeds what no kernel sends: the reader must survive it.
func FuzzAttrs(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 1, 2, 3, 4}, "cmp")
	f.Add([]byte{3, 0, 1, 0}, "payload")
	f.Add([]byte{255, 255, 1, 0}, "bitwise")
	f.Fuzz(func(t *testing.T, b []byte, name string) {
		r := &nftReader{tables: map[string]*table{}, sets: map[string]*nftSet{}}
		e, err := r.compile(2, "t", name, parseAttrs(b))
		if err != nil {
			return
		}
		for _, p := range packets() {
			(&nftRule{exprs: []expr{e, e}}).judge(p)
		}
	})
}

func FuzzSaved(f *testing.F) {
	f.Add("*filter\n:INPUT DROP [0:0]\n-A INPUT ! -s 1.2.3.4/8 -j X\n")
	f.Fuzz(func(t *testing.T, text string) { judgeHits(play(parseSaved(text, false))) })
}
