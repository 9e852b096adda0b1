package l4

// What a registry says of descriptors that are no connection's, so that the next
// process goes on with these too: to open them again would take longer than a
// connection may pause, and who asks meanwhile would find nobody.

const (
	// handlesMost is how many handles there may be, socketsMost how many sockets.
	handlesMost = 256
	socketsMost = 8
	// handleName is the longest name of either, buildName that of a build.
	handleName = 27
	buildName  = 63
)

// handle is a descriptor with a name.
type handle struct {
	fd   int32 // + 1; 0: none
	size uint8
	name [handleName]byte
}

// set is such that whoever reads it finds all of it or nothing.
func (h *handle) set(name string, fd int) {
	h.fd = 0
	h.size = uint8(copy(h.name[:], name))
	h.fd = int32(fd) + 1
}

func (h *handle) get() (name string, fd int) { return string(h.name[:h.size]), int(h.fd) - 1 }

// handles are those of a process, which are all there or none.
type handles struct {
	whole uint32 // all of them are written
	count uint32
	size  uint32
	build [buildName + 1]byte
	all   [handlesMost]handle
}

// SetHandles writes down descriptors that together are of use to another process of
// the same build, for [Registry.Handles]. It returns false, and none are there, if that
// is too much. One that is there must not be closed before DropHandles.
func (r *Registry) SetHandles(build string, all map[string]int) bool {
	h := &r.head.handles
	h.whole = 0
	if len(build) > buildName || len(all) > handlesMost {
		return false
	}
	n := 0
	for name, fd := range all {
		if len(name) > handleName {
			return false
		}
		h.all[n].set(name, fd)
		n++
	}
	h.count, h.size = uint32(n), uint32(copy(h.build[:], build))
	h.whole = 1
	return true
}

// DropHandles forgets them.
func (r *Registry) DropHandles() { r.head.handles.whole = 0 }

// Handles returns what SetHandles wrote for a build; nil: there are none.
func (r *Registry) Handles(build string) map[string]int {
	h := &r.head.handles
	if h.whole == 0 || string(h.build[:h.size]) != build {
		return nil
	}
	all := make(map[string]int, h.count)
	for i := range h.all[:h.count] {
		name, fd := h.all[i].get()
		all[name] = fd
	}
	return all
}

// Giving is how far a process is that gives its connections to another one.
type Giving uint32

// What a process gives: GivingNothing, or what it has begun to send (GivingBegun), has
// sent (GivingSent), or the other one has (GivingGone).
const (
	GivingNothing Giving = iota
	GivingBegun
	GivingSent
	GivingGone
)

// SetGiving writes down how far the process is, and the descriptor of what it talks to
// the other one by.
func (r *Registry) SetGiving(how Giving, fd int) {
	r.head.givingFD = int32(fd)
	r.head.giving = uint32(how)
	fault(faultGiving)
}

// Giving returns what SetGiving wrote.
func (r *Registry) Giving() (how Giving, fd int) { return Giving(r.head.giving), int(r.head.givingFD) }

// Used is how many connections it has had at once, about.
func (r *Registry) Used() int { return r.used }

// KeepSocket writes down a socket, in place of the one of that name, which may then be
// closed. It returns false if there is no room.
func (r *Registry) KeepSocket(name string, fd int) bool {
	if len(name) > handleName {
		return false
	}
	var free *handle
	for i := range r.head.sockets {
		switch h := &r.head.sockets[i]; {
		case h.fd == 0:
			if free == nil {
				free = h
			}
		case string(h.name[:h.size]) == name:
			h.fd = int32(fd) + 1
			return true
		}
	}
	if free == nil {
		return false
	}
	free.set(name, fd)
	return true
}

// DropSocket comes before one is closed for good.
func (r *Registry) DropSocket(name string) {
	for i := range r.head.sockets {
		if h := &r.head.sockets[i]; h.fd != 0 && string(h.name[:h.size]) == name {
			h.fd = 0
		}
	}
}

// Sockets returns those that KeepSocket wrote down.
func (r *Registry) Sockets() map[string]int {
	all := map[string]int{}
	for i := range r.head.sockets {
		if h := &r.head.sockets[i]; h.fd != 0 {
			name, fd := h.get()
			all[name] = fd
		}
	}
	return all
}
