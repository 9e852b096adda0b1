package suites

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

// grpcCases are those of the interoperability test that need neither an account
// of a cloud provider nor the servers of a test of load balancing.
var grpcCases = []string{
	"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream",
	"timeout_on_sleeping_server", "cancel_after_begin", "cancel_after_first_response",
	"status_code_and_message", "special_status_message", "custom_metadata",
	"unimplemented_method", "unimplemented_service",
	"orca_per_rpc", "orca_oob", "rpc_soak", "channel_soak",
}

// TestGRPC runs gRPC's client for interoperability tests against its server.
func TestGRPC(t *testing.T) {
	r := rig.New(t)
	cert, key := rig.Certificate(t, t.TempDir(), os.Getuid(), os.Getgid())
	clear, secure := at4(10000), at6(10001)
	r.Give(t, clear.Addr())
	r.Give(t, secure.Addr())
	server := tool(t, "server")
	r.Daemon(t, exec.Command(server, "-port", fmt.Sprint(clear.Port())), unix.SIGTERM, clear)
	r.Daemon(t, exec.Command(server, "-port", fmt.Sprint(secure.Port()), "-use_tls", "-tls_cert_file", cert, "-tls_key_file", key), unix.SIGTERM, secure)
	soak := amount(10, 300)
	// One case is content with a deadline of 1 ms, which may be over before it connects.
	twice(t, r, 2*(len(grpcCases)+soak-2), func(t testing.TB) (all []string) {
		for at, flags := range map[netip.AddrPort][]string{
			clear:  nil,
			secure: {"-use_tls", "-use_test_ca", "-ca_file", cert, "-server_host_override", "world"},
		} {
			passed := 0
			for _, name := range grpcCases {
				args := append([]string{"-server_host", at.Addr().String(), "-server_port", fmt.Sprint(at.Port()), "-test_case", name,
					"-soak_iterations", fmt.Sprint(soak), "-soak_num_threads", "5", "-soak_per_iteration_max_acceptable_latency_ms", "60000",
					"-soak_overall_timeout_seconds", "300"}, flags...)
				if strings.HasPrefix(name, "orca") {
					args = append(args, "-service_config_json", `{"loadBalancingConfig": [{"test_backend_metrics_load_balancer": {}}]}`)
				}
				out, err := r.Feed(appLimit, "", tool(t, "client"), args...)
				if err == nil {
					passed++
				} else {
					t.Logf("%s: %v\n%s", name, err, out)
				}
				all = append(all, fmt.Sprintf("%s at %s: passed %v", name, at, err == nil))
			}
			if passed != len(grpcCases) {
				t.Errorf("%s: %d of %d cases passed", at, passed, len(grpcCases))
			}
		}
		slices.Sort(all)
		return all
	})
}
