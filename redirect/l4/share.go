package l4

import (
	"sync"

	"github.com/pillion-project/pillion/redirect/flow"
)

// errShare ends a connection of a container that has too many open.
var errShare = flow.NewError(flow.ReasonConnQuota, "the container has too many connections open here")

// shares counts the open connections of each container.
//
// The connect hook goes by the sockets that a container has open. One that is
// closed before its dial is answered, or whose endpoint never closes, is open
// here still: without a count of these, a container that connects and lets go
// over and over has all the descriptors of the handler.
type shares struct {
	mu   sync.Mutex // of all workers: a container's connections are everywhere
	open map[uint64]int
}

// take adds a connection, unless the container has as many as it may.
func (s *shares) take(group uint64, most int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[group] >= most {
		return false
	}
	if s.open == nil {
		s.open = map[uint64]int{}
	}
	s.open[group]++
	return true
}

// give takes a connection off again.
func (s *shares) give(group uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[group]--; s.open[group] == 0 {
		delete(s.open, group)
	}
}
