package model

import "math/rand/v2"

// generator writes a script and keeps account of what is determined, so that a
// barrier which it writes is bound to come and what it leaves open is as little
// as plain TCP does.
type generator struct {
	*rand.Rand
	script  *script
	sides   [2]sideState
	budget  [2]int // what side k may leave unread
	bulky   bool   // sizes are large ones
	refused bool   // connects may be refused
	dead    bool   // a reset has come, or both ends have: nothing more flows
}

// sideState is what is known of one peer.
type sideState struct {
	open     bool
	fin      bool // it has sent its FIN
	deaf     bool // shut for reading too: bytes sent to it reset
	unread   int  // bytes that were sent to it and not read
	flooded  bool // more bytes than it can have received, nobody knows how many
	arrived  bool // the unread ones are known to have arrived,
	sawEnd   bool // and the other's FIN
	doubtful bool // what it sees from here on is left open
}

// generate writes the script of a seed, with connects that are refused or without.
func generate(seed uint64, refused bool) *script {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 4)), script: &script{Seed: seed}}
	g.script.Six = g.IntN(2) == 0
	for k := range g.script.Options {
		o := &g.script.Options[k]
		sizes := []int{0, 0, 8 << 10, 64 << 10, 1 << 20}
		o.Receive, o.Send = sizes[g.IntN(len(sizes))], sizes[g.IntN(len(sizes))]
		o.NoDelay = g.IntN(2) == 0
		g.sides[k] = sideState{open: true, arrived: true}
	}
	g.bulky = g.chance(15) && !g.tight(client) && !g.tight(server)
	for k := range g.budget {
		// Of a large segment that is read in part, all is charged to the
		// buffer, and little of the window is left.
		switch {
		case g.tight(k):
			g.budget[k] = 1 << 10
		case g.script.Options[k].Receive == 1<<20:
			g.budget[k] = 32 << 10
		default:
			g.budget[k] = 4 << 10
		}
	}
	g.refused = refused
	g.begin()
	for n := 1 + g.IntN(12); n > 0 && !g.dead && g.sides[client].open && g.sides[server].open; n-- {
		g.talk()
	}
	for g.sides[client].open || g.sides[server].open {
		g.finish()
	}
	return g.script
}

// tight tells whether the way to side k has small buffers.
func (g *generator) tight(k int) bool {
	small := func(n int) bool { return n != 0 && n < 64<<10 }
	return small(g.script.Options[k].Receive) || small(g.script.Options[1-k].Send)
}

func (g *generator) chance(percent int) bool { return g.IntN(100) < percent }

// one adds a step of one peer.
func (g *generator) one(k int, o op) { g.both(k, &o, nil) }

// both adds a step of peer k and, at the same time, of the other.
func (g *generator) both(k int, mine, others *op) {
	s := step{}
	s.Ops[k], s.Ops[1-k] = mine, others
	if g.chance(5) {
		s.Pause = 1 + g.IntN(30)
	}
	g.script.Steps = append(g.script.Steps, s)
}

// begin connects.
func (g *generator) begin() {
	if how := g.IntN(2); g.refused && g.chance(25) {
		g.refuse(how)
	} else {
		g.one(client, op{Kind: opConnect, How: how})
	}
	early := g.chance(25)
	// Not awaited, a connection that Pillion has answered early may not be at the
	// server yet, and one that is reset by then never comes.
	awaited := !early || g.chance(50)
	if awaited {
		g.one(server, op{Kind: opPending})
	}
	if early {
		g.early(awaited || g.refused)
	}
	if !awaited {
		g.one(server, op{Kind: opPending})
	}
	g.one(server, op{Kind: opAccept})
	if g.dead {
		g.one(server, op{Kind: opHangUp})
	}
}

// early has the client speak or end before the server has accepted.
func (g *generator) early(mayReset bool) {
	switch n := g.IntN(4); {
	case n == 3 && mayReset:
		g.one(client, op{Kind: opReset})
		g.sides[client].open, g.dead = false, true
	case n == 2:
		g.one(client, op{Kind: opClose})
		g.sides[client].open, g.sides[client].fin = false, true
	default:
		n := g.size(g.budget[server])
		g.one(client, op{Kind: opMove, Write: n, Chunk: g.chunk(n)})
		g.sent(client, n)
		if g.chance(50) {
			g.one(client, op{Kind: opShut, How: 1})
			g.sides[client].fin = true
		}
		if g.sides[client].fin && g.chance(50) {
			g.one(client, op{Kind: opClose})
			g.sides[client].open = false
		}
	}
}

// refuse has nobody listen at first, then again.
func (g *generator) refuse(how int) {
	g.one(server, op{Kind: opGone})
	g.one(client, op{Kind: opConnect, How: how})
	same := g.chance(50)
	asks := []kind{opRecv, opSend, opError, opLook, opShut}
	if same {
		asks = asks[:4] // what was shut stays so
	}
	for n := g.IntN(3); n > 0; n-- {
		g.one(client, op{Kind: asks[g.IntN(len(asks))], Write: 10, Read: 10, How: 1})
	}
	g.one(server, op{Kind: opListen})
	if !same {
		g.one(client, op{Kind: opConnect, How: g.IntN(2)})
		return
	}
	if how == inProgress {
		// The kernel first tells, once more, that the last one failed.
		g.one(client, op{Kind: opConnect, How: again, Stillborn: true})
	}
	g.one(client, op{Kind: opConnect, How: again + g.IntN(2)})
}

func (g *generator) sent(k, n int) {
	if n > 0 {
		o := &g.sides[1-k]
		o.unread += n
		o.arrived = false
	}
}

// size is a number of bytes up to most: small ones as often as large ones.
func (g *generator) size(most int) int {
	if most <= 0 {
		return 0
	}
	if g.bulky && g.chance(60) {
		return 1 + g.IntN(most)
	}
	limits := []int{1, 10, 100, 1500, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20}
	weights := []int{2, 3, 4, 4, 4, 3, 2, 1, 1}
	total := 0
	for i := range limits {
		if i == 0 || limits[i-1] < most {
			total += weights[i]
		}
	}
	n := g.IntN(total)
	for i := range limits {
		if n < weights[i] {
			return 1 + g.IntN(min(limits[i], most))
		}
		n -= weights[i]
	}
	return most
}

// chunk is a size of single calls that does not make thousands of them.
func (g *generator) chunk(n int) int {
	return max(1+g.IntN(max(n, 1)), n/64, 1)
}

// awaitArrival has what was sent to side k arrive, where that is determined.
func (g *generator) awaitArrival(k int) {
	s, o := &g.sides[k], &g.sides[1-k]
	if !s.open || s.flooded || s.doubtful {
		return
	}
	if !s.arrived && s.unread > 0 {
		g.one(k, op{Kind: opArrived, Read: s.unread})
	}
	s.arrived = true
	if o.fin && !s.sawEnd {
		if !s.deaf {
			g.one(k, op{Kind: opEnd})
		}
		s.sawEnd = true
	}
}

// talk adds something that does not end the connection, or begins its end.
func (g *generator) talk() {
	k := g.IntN(2)
	s, o := &g.sides[k], &g.sides[1-k]
	switch n := g.IntN(100); {
	case o.deaf && !s.fin && n < 30:
		g.breakOff(k)
	case n < 45:
		g.move()
	case n < 51:
		g.fill(k)
	case n < 60:
		g.inspect(k)
	case n < 72:
		if !s.fin {
			g.shut(k, 1)
		}
	case n < 74:
		// Without a FIN of the other's to come, what deafness does is local.
		if !s.deaf && !s.flooded {
			g.shut(k, 2)
		}
	case n < 77:
		if !s.fin && !o.fin && !s.flooded && !o.flooded {
			g.both(k, &op{Kind: opShut, How: 1}, &op{Kind: opShut, How: 1})
			s.fin, o.fin = true, true
			g.over()
		}
	case n < 84:
		g.close(k)
	case n < 90:
		g.reset(k)
	case n < 95:
		g.moveAndEnd(k)
	default:
		g.race(k)
	}
}

// move has the peers write and read, both at the same time.
func (g *generator) move() {
	var ops [2]*op
	for k := range ops {
		s, o := &g.sides[k], &g.sides[1-k]
		n := 0
		if !s.fin && !o.flooded && !o.deaf && !s.doubtful && g.chance(75) {
			n = g.size(g.most())
			if g.chance(3) {
				n = 0
			}
		}
		ops[k] = &op{Kind: opMove, Write: n}
	}
	for k := range ops {
		s, o := &g.sides[k], &g.sides[1-k]
		if s.deaf {
			g.awaitArrival(k)
		}
		g.receive(k, ops[k], ops[1-k].Write)
		if ops[k].Read != theRest {
			ops[k].Chunk = g.chunk(max(ops[k].Write, ops[k].Read))
		}
		if o.fin && !s.flooded && s.unread == 0 && ops[k].Read > 0 && g.chance(50) {
			ops[k].Read = untilEnd
			s.sawEnd = true
		}
	}
	for k := range ops {
		if ops[k].Read != 0 && g.chance(15) {
			ops[k].Nap = 1 + g.IntN(20)
		}
	}
	g.both(0, ops[0], ops[1])
	for k := range ops {
		if s := &g.sides[k]; s.unread > 0 && g.chance(70) {
			g.awaitArrival(k)
		}
	}
}

func (g *generator) most() int {
	if g.tight(client) || g.tight(server) {
		return 64 << 10
	}
	return 1 << 20
}

// receive decides how much of what there is, and of what comes in the same step,
// side k reads.
func (g *generator) receive(k int, o *op, coming int) {
	s := &g.sides[k]
	if s.flooded {
		if g.chance(70) {
			o.Read, o.Chunk = theRest, 64<<10
			s.flooded, s.unread, s.arrived = false, 0, true
		}
		return
	}
	all := s.unread + coming
	o.Read = all
	// With small buffers, the last of what did not fit in at once may stay with
	// its sender until everything else was read: the kernel avoids small windows.
	whole := all > g.budget[k] && g.script.Options[k].Receive != 1<<20
	if g.chance(40) && all > 0 && !whole {
		least := max(0, all-g.budget[k])
		o.Read = least + g.IntN(all-least+1)
	}
	s.unread = all - o.Read
	if coming > 0 {
		s.arrived = s.unread == 0
	}
}

// fill has side k write until there is no more room.
func (g *generator) fill(k int) {
	s, o := &g.sides[k], &g.sides[1-k]
	if s.fin || o.flooded || o.deaf {
		return
	}
	g.one(k, op{Kind: opFill, Write: 2 << 20, Chunk: 1 << (8 + g.IntN(10))})
	o.flooded, o.arrived = true, false
	if g.chance(50) {
		// Some of it has come.
		g.one(1-k, op{Kind: opArrived, Read: 1, Loose: anyCount})
	}
}

// inspect asks for what is determined without moving on.
func (g *generator) inspect(k int) {
	g.awaitArrival(k)
	s := &g.sides[k]
	if s.flooded {
		return
	}
	switch g.IntN(5) {
	case 0:
		g.one(k, op{Kind: opLook, Loose: anyRoom})
	case 1:
		g.one(k, op{Kind: opError})
	case 2:
		g.one(k, op{Kind: opPeek, Read: 1 + g.IntN(s.unread+100)})
	case 3:
		n := g.IntN(s.unread + 100)
		g.one(k, op{Kind: opRecv, Read: n})
		s.unread -= min(n, s.unread)
	case 4:
		if !s.deaf {
			n := 0
			if s.fin {
				n = g.IntN(100) // which is an error
			}
			g.one(k, op{Kind: opSend, Write: n})
		}
	}
}
