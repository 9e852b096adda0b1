package events

import (
	"slices"
	"sync"

	"github.com/pillion-project/pillion/redirect/flow"
)

// history keeps the last records. It is safe for concurrent use.
type history struct {
	// mu orders all and next: listings come from other goroutines.
	mu   sync.Mutex
	max  int
	all  []flow.Record
	next int // the oldest, when all is full
}

func (h *history) add(r *flow.Record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.all) < h.max {
		// It grows with what there is, not to max at once: most instances
		// see few connections.
		h.all = append(h.all, *r)
		return
	}
	h.all[h.next] = *r
	h.next = (h.next + 1) % h.max
}

// list returns a copy, oldest first.
func (h *history) list() []flow.Record {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]flow.Record, 0, len(h.all))
	out = append(out, h.all[h.next:]...)
	return append(out, h.all[:h.next]...)
}

// remember puts older records in front, as far as there is room.
func (h *history) remember(older []flow.Record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := slices.Concat(older, h.all[h.next:], h.all[:h.next])
	h.all, h.next = all[max(len(all)-h.max, 0):], 0
}
