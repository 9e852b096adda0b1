package l4

import "github.com/pillion-project/pillion/redirect/flow"

// What a registry says of connections that another process gives: they are written down
// before that process hears that they are here. So there is no moment in which neither
// has them.

// Taking is how far a process is that takes connections from another one.
type Taking uint32

// What a process takes: TakingNothing; what may be here in part (TakingBegun), or whole,
// which the other one is told (TakingHas) and knows (TakingSaid). It is this process's
// from [Registry.SetCharged] on.
const (
	TakingNothing Taking = iota
	TakingBegun
	TakingHas
	TakingSaid
)

// SetTaking writes down how far the process is, and the descriptor of what it talks to
// the other one by; -1: it has said nothing that matters.
func (r *Registry) SetTaking(how Taking, fd int) {
	r.head.takingFD = int32(fd)
	r.head.taking = uint32(how)
	switch how {
	case TakingHas:
		fault(faultHas)
	case TakingSaid:
		fault(faultSaid)
	default:
	}
}

// Taking returns what SetTaking wrote.
func (r *Registry) Taking() (how Taking, fd int) { return Taking(r.head.taking), int(r.head.takingFD) }

// Keep writes down connections that are not yet there. One for which there is no room
// goes on unprotected. [Relay.Adopt] takes them up, or [Registry.Forsake] forgets them.
func (r *Registry) Keep(g *Given) {
	for i := range g.Conns {
		if c := &g.Conns[i]; c.slot == nil {
			r.keep(c)
		}
	}
}

func (r *Registry) keep(g *Carried) {
	sides := [2]*CarriedSide{&g.Down, &g.Up}
	for _, side := range sides {
		if len(side.Rest) > copySize {
			return // of a build with other sizes
		}
	}
	s := r.take()
	if s == nil {
		return
	}
	for k, side := range sides {
		s.fds[k] = int32(side.FD)
		s.flagIf(side.Done, keptDone<<k)
		s.flagIf(side.Urgent, keptUrgent<<k)
		if side.PipeRead >= 0 {
			s.pipes[k] = uint64(uint32(side.PipeRead))<<32 | uint64(uint32(side.PipeWrite))
		}
		if len(side.Rest) == 0 {
			continue
		}
		side.Rest = r.save(side.Rest) // there are two chunks for each slot
		s.rests[k] = r.word(side.Rest)
		s.flagIf(side.RestUrgent, keptRestUrgent<<k)
	}
	s.worker, s.opened, s.connected, s.attempts = uint32(g.Worker%registryWorkers), g.Opened, int64(g.Connected), g.Attempts
	s.downstream.set(&g.Downstream)
	s.service.set(g.Service)
	s.cluster.set(g.Cluster)
	s.endpoint.set(g.Endpoint)
	s.flagIf(g.Up.Chosen, keptChosen)
	s.flagIf(!g.Dialing && !g.Waiting && g.Up.FD >= 0, keptDialed)
	s.flagIf(g.Mirrored, keptMirrored)
	s.flagIf(g.Lingers, keptLingers)
	s.recorded = g.Lingers // by the other process
	if h := g.Released; h != nil {
		s.keepHeld(h)
	}
	g.slot = s
	if g.Down.FD >= 0 {
		s.state = slotOpen
	}
	fault(faultKept)
}

func (s *slot) flagIf(set bool, flag uint32) {
	if set {
		s.flags |= flag
	}
}

func (s *slot) keepHeld(h *flow.Held) {
	s.heldMark, s.heldSize, s.heldFrame = h.Mark, uint32(h.Size), h.Frame
	s.heldSlot.set(h.Slot)
	s.flags |= keptReleased
}

// Forsake forgets connections and listeners that the process before was given, and that
// are another's still. Their descriptors are nobody's then, and to close them ends
// nothing. It comes before a relay.
func (r *Registry) Forsake() {
	for i := range r.used {
		s := &r.slots[i]
		if s.state == slotFree {
			continue
		}
		for k := range s.rests {
			r.dropRest(s, k)
		}
		r.mu.Lock()
		r.give(s)
		r.mu.Unlock()
	}
	r.head.listeners = [2][registryWorkers]int32{}
}
