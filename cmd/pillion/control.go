package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/redirect/upstream/discover/watch"
	"github.com/pillion-project/pillion/redirect/upstream/health/check"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// control keeps the kernel side and the handler as the configuration, its sources
// and the health checks say. All of it is done by the goroutine of run, one change
// after the other; what status shows is copied under mu.
type control struct {
	i        *instance
	sources  *sources
	checker  *check.Checker
	removals removals
	former   map[string][]formerly // of services, by name; run's own
	// unsettled: the kernel side goes by what an earlier process left, whose
	// endpoints may be ones that no source has told yet. run's own.
	unsettled bool
	// inCharge: lastRules is what the kernel side goes by. run's own.
	inCharge bool
	closed   map[netip.AddrPort]bool // what close said of services; run's own
	litter   litter                  // run's own
	zones    zones                   // that an earlier process noted; run's own
	noted    []byte                  // what is left for the next one, and for which services; run's own
	notedFor *listing
	told     told  // run's own
	taken    taken // run's own

	requests chan chan<- admin.ReloadResult
	settled  chan chan struct{}
	still    chan chan bool // ends run's pause; see freeze
	kick     chan struct{}  // sources or checks have news

	newsMu sync.Mutex // guards news: a leaf, the checker calls with locks of its own
	news   []check.Change

	mu       sync.Mutex // guards the rest
	config   *config.Config
	state    admin.ConfigurationStatus
	reloads  uint64
	failures uint64
	trouble  string // why the last change could not be put in force; empty: it was
	again    time.Time
	tooMany  []admin.Refusal                 // services for whose endpoints there is no room
	lacking  []admin.Refusal                 // services for whose endpoints there may be some soon
	short    bool                            // there are such ones
	services *listing                        // in force; nil: it is the start
	departed map[string][]*upstream.Endpoint // removed ones that had connections, by service
}

const (
	// overflowEvery is how often the share that leaves the local zone is
	// computed again for services whose endpoints the kernel side ejects.
	overflowEvery = time.Second
	// firstAnswers is how long the start waits for the sources. Services whose
	// source has not told yet go by on_failure.
	firstAnswers = 10 * time.Second
)

func newControl(i *instance) *control {
	c := &control{
		i: i, config: i.plan.config,
		requests: make(chan chan<- admin.ReloadResult),
		settled:  make(chan chan struct{}),
		still:    make(chan chan bool),
		kick:     make(chan struct{}, 1),
		state:    admin.ConfigurationStatus{Generation: 1, File: i.file, Loaded: i.started, Tried: i.started, By: admin.TakenAtStart, Refused: []admin.Refusal{}},
	}
	c.checker = check.New(check.Options{Report: c.checked, Exempt: i.exempt(), Log: i.log})
	c.sources = newSources(i, c.wake)
	c.removals.ends = newEnds(i.endConnections)
	return c
}

// inForce returns the configuration that holds. Nobody may change it.
func (c *control) inForce() *config.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.config
}

// failing tells whether it is time to try again what could not be put in force.
func (c *control) failing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return (c.trouble != "" || c.short) && time.Now().After(c.again)
}

// wake makes run look for news.
func (c *control) wake() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// checked takes what a health check found.
func (c *control) checked(change check.Change) {
	c.newsMu.Lock()
	c.news = append(c.news, change)
	c.newsMu.Unlock()
	c.wake()
}

// run makes every change until ctx is done.
func (c *control) run(ctx context.Context) error {
	var parts sync.WaitGroup
	defer parts.Wait()
	ctx, end := context.WithCancel(ctx)
	defer end()
	c.unsettled = c.i.datapath.Adopted()
	c.inCharge = !c.unsettled
	files := make(chan struct{}, 1)
	if c.i.file != "" {
		parts.Go(func() {
			err := watch.File(ctx, c.i.file, func() {
				select {
				case files <- struct{}{}:
				default:
				}
			})
			if err != nil {
				c.i.log.Error("cannot watch the configuration file", "file", c.i.file, "error", err)
			}
		})
	}
	parts.Go(func() { _ = c.checker.Run(ctx) })
	parts.Go(func() { c.removals.ends.run(ctx) })
	c.sources.start(ctx)
	defer c.sources.stop()
	defer end()
	overflow := time.NewTicker(overflowEvery)
	defer overflow.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case answer := <-c.requests:
			c.i.reopenLog()
			answer <- c.reload(admin.TakenByReload)
		case end := <-c.still:
			if left := <-end; left {
				return nil
			}
		case done := <-c.settled:
			last, n := c.left(), &note{}
			if c.unsettled {
				n = c.noteOfBefore() // the other process may have written it since the start
			}
			c.unsettled = false
			t := c.i.taking
			t.tells(t.lastServices())
			c.update()
			if t != nil && t.state.At > 0 {
				c.inherit(&t.state)
			} else {
				c.removedBefore(last, n)
			}
			t.tells(nil) // from here on what is in force is newer
			close(done)
		case <-c.i.hangups:
			c.i.reopenLog()
			c.reload(admin.TakenBySignal)
		case <-files:
			c.reload(admin.TakenByWatch)
		case <-c.kick:
			c.update()
		case <-overflow.C:
			c.overflow()
			c.close(c.inForce(), c.list())
			c.noteChanges()
			if c.failing() {
				c.update()
			}
			if c.litter.due(time.Now()) {
				trim()
			}
		case <-c.removals.due():
			c.removals.endDue()
		}
	}
}

// endsLimit is how long the answer to a reload waits until connections to endpoints that
// it removed are ended: who asks may want to know that, and need not wait for a worker that
// hangs.
const endsLimit = 250 * time.Millisecond

// requestReload reads the configuration again, as a signal does.
func (c *control) requestReload(ctx context.Context) (admin.ReloadResult, error) {
	answer := make(chan admin.ReloadResult, 1)
	select {
	case c.requests <- answer:
	case <-ctx.Done():
		return admin.ReloadResult{}, context.Cause(ctx)
	}
	select {
	case r := <-answer:
		ctx, cancel := context.WithTimeout(ctx, endsLimit)
		defer cancel()
		c.removals.ends.done(ctx)
		return r, nil
	case <-ctx.Done():
		return admin.ReloadResult{}, context.Cause(ctx)
	}
}

// refusalsOf are those of a whole configuration.
func refusalsOf(err error) []admin.Refusal {
	all := []admin.Refusal{}
	for _, p := range config.Problems(err) {
		all = append(all, refusalOf(&p))
	}
	return all
}

func refusalOf(p *config.Problem) admin.Refusal {
	r := admin.Refusal{Text: p.Text}
	if p.Path != "" {
		r.Text = p.Path + ": " + p.Text
	}
	if p.Line > 0 {
		r.Where = fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
	}
	return r
}

// diff tells what a reload would do if the file said text. That goes by what a reload
// goes by, flags and what was refused before too.
func (c *control) diff(_ context.Context, name string, text []byte) (admin.DiffResult, error) {
	before := c.inForce()
	next, refused, err := c.i.merge(name, text, before, c.sources.able)
	if err != nil {
		return admin.DiffResult{Refused: refusalsOf(err)}, nil
	}
	changes, err := json.Marshal(next.Diff(before))
	if err != nil {
		return admin.DiffResult{}, fmt.Errorf("encode changes: %w", err)
	}
	return admin.DiffResult{Changes: changes, Refused: refusals(refused)}, nil
}

// withoutRestart is next with what only a start reads as it was.
func withoutRestart(next, before *config.Config) *config.Config {
	c := *next
	c.Relay.Workers = before.Relay.Workers
	c.Limits.Connections = before.Limits.Connections
	c.Limits.ConnectionsPerContainer = before.Limits.ConnectionsPerContainer
	c.FlowLog, c.Metrics, c.Probes = before.FlowLog, before.Metrics, before.Probes
	c.Existing, c.Survive, c.Kubernetes = before.Existing, before.Survive, before.Kubernetes
	return &c
}

func refusals(all []config.Refused) []admin.Refusal {
	out := make([]admin.Refusal, 0, len(all))
	for _, r := range all {
		out = append(out, admin.Refusal(r))
	}
	return out
}

// freeze has run change nothing, and nothing ended, until the returned function is
// called with false; with true it ends.
func (c *control) freeze(ctx context.Context) (end func(left bool), err error) {
	over := make(chan bool, 1)
	select {
	case c.still <- over:
		c.removals.ends.pause()
		return func(left bool) {
			if !left {
				c.removals.ends.resume()
			}
			over <- left
		}, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("a change of the configuration is under way: %w", context.Cause(ctx))
	}
}

// answers waits until every source has told, or failed to, once.
func (c *control) answers(ctx context.Context) error {
	late := time.After(firstAnswers)
	for _, answered := range c.sources.waiting() {
		select {
		case <-answered:
		case <-late:
			c.i.log.Warn("not every source has told its endpoints yet: their services keep the last ones, or go by on_failure")
			late = nil
		case <-ctx.Done():
			return cause(ctx)
		}
		if late == nil {
			break
		}
	}
	return nil
}

// settle waits until every source has told, or failed to, once, and all of that is
// in force.
func (c *control) settle(ctx context.Context) error {
	if err := c.answers(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	done := make(chan struct{})
	select {
	case c.settled <- done:
	case <-ctx.Done():
		return cause(ctx)
	}
	<-done
	return nil
}
