// Command resident finds services by the addresses on its standard input, and
// says how many endpoints it knows and what memory it takes: in a process of its
// own, with what finds endpoints and nothing else in it.
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"sync"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/redirect/upstream/discover/kube"
)

func main() {
	var o kube.Options
	flag.StringVar(&o.Server, "server", "", "the API server's URL")
	flag.StringVar(&o.CAFile, "ca", "", "file of its CA")
	flag.StringVar(&o.TokenFile, "token", "", "file of the token")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// holder has what a user of endpoints would have: the last set of each service.
type holder struct {
	mu   sync.Mutex // orders last
	last map[string]discover.Snapshot
}

func run(o kube.Options) error {
	client, err := kube.New(o)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	demand := client.Demand(kube.DemandOptions{})
	h := &holder{last: make(map[string]discover.Snapshot)}
	lists := make(chan []kube.Service)
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() { _ = demand.Run(ctx, lists) })
	all.Go(func() { h.follow(ctx, lists) })
	all.Go(func() { h.tell(ctx) })
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		addr, err := netip.ParseAddrPort(lines.Text())
		if err != nil {
			return err
		}
		demand.Asked(addr)
		time.Sleep(time.Millisecond) // an application does not connect everywhere at once
	}
	cancel()
	return lines.Err()
}

// follow runs the source of each service that is found.
func (h *holder) follow(ctx context.Context, lists <-chan []kube.Service) {
	var sources sync.WaitGroup
	defer sources.Wait()
	known := make(map[string]bool)
	for {
		select {
		case list := <-lists:
			for _, s := range list {
				if !known[s.Name] {
					known[s.Name] = true
					out := make(chan discover.Snapshot)
					sources.Go(func() { _ = s.Source.Run(ctx, out) })
					sources.Go(func() { h.hold(ctx, s.Name, out) })
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

func (h *holder) hold(ctx context.Context, name string, out <-chan discover.Snapshot) {
	for {
		select {
		case s := <-out:
			h.mu.Lock()
			h.last[name] = s
			h.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

// tell writes services, endpoints and the resident memory in KiB, twice a second.
func (h *holder) tell(ctx context.Context) {
	tick := time.NewTicker(time.Second / 2)
	defer tick.Stop()
	for {
		h.mu.Lock()
		services, endpoints := len(h.last), 0
		for _, s := range h.last {
			endpoints += len(s.Endpoints)
		}
		h.mu.Unlock()
		fmt.Println(services, endpoints, resident())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// resident is VmRSS in KiB.
func resident() string {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err.Error()
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	return strings.Fields(rest)[0]
}
