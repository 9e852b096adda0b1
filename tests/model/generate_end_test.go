package model

// shut half-closes: how is 1 for writing, 2 for both.
func (g *generator) shut(k, how int) {
	s, o := &g.sides[k], &g.sides[1-k]
	if how == 2 {
		g.awaitArrival(k)
		s.deaf = true
	}
	g.one(k, op{Kind: opShut, How: how})
	s.fin = true
	if s.fin && o.fin {
		g.over()
		return
	}
	if g.chance(70) {
		g.awaitArrival(1 - k)
	}
}

// over is the state after both FINs.
func (g *generator) over() {
	g.dead = true
	for k := range g.sides {
		if s := &g.sides[k]; !s.flooded || !s.open || s.doubtful {
			continue
		}
		if g.chance(30) {
			// Whether the other knows by now that its FIN has come is open.
			g.one(k, op{Kind: []kind{opClose, opReset}[g.IntN(2)]})
			g.sides[k].open, g.sides[1-k].doubtful = false, true
			continue
		}
		// Its FIN is behind bytes that are to be read first.
		g.drain(k)
	}
	for k := range g.sides {
		g.awaitArrival(k)
	}
	for k := range g.sides {
		// If the other has told it by a reset that its bytes are lost, and there
		// is a hop that knows that they have come, it is not told.
		if s := &g.sides[k]; s.open && !(s.flooded && s.doubtful) {
			g.one(k, op{Kind: opClosed})
		}
	}
}

// drain reads all there is.
func (g *generator) drain(k int) {
	s := &g.sides[k]
	if s.open && s.flooded {
		g.one(k, op{Kind: opMove, Read: theRest, Chunk: 64 << 10})
		s.flooded, s.unread, s.arrived = false, 0, true
	}
}

// close closes side k. What it has not read makes that a reset.
func (g *generator) close(k int) {
	s, o := &g.sides[k], &g.sides[1-k]
	g.awaitArrival(k)
	if s.flooded {
		g.one(k, op{Kind: opArrived, Read: 1, Loose: anyCount})
	}
	if s.flooded || s.unread > 0 {
		g.cut(k, op{Kind: opClose})
		return
	}
	g.one(k, op{Kind: opClose})
	s.open, s.fin = false, true
	if o.fin {
		g.over()
	} else if g.chance(70) {
		g.awaitArrival(1 - k)
	}
}

func (g *generator) reset(k int) { g.cut(k, op{Kind: opReset}) }

// cut ends side k with a reset, when what it has sent has arrived.
func (g *generator) cut(k int, how op) {
	s, o := &g.sides[k], &g.sides[1-k]
	g.awaitArrival(1 - k)
	if o.flooded && s.fin {
		// Nobody knows whether its FIN comes before the reset.
		o.doubtful = true
	}
	g.one(k, how)
	s.open = false
	g.hungUp(1 - k)
}

// hungUp waits until the reset is at side k.
func (g *generator) hungUp(k int) {
	g.dead = true
	switch s := &g.sides[k]; {
	case !s.open:
	case s.deaf: // which looks like a hang-up by itself
		g.one(k, op{Kind: opClosed})
	default:
		g.one(k, op{Kind: opHangUp})
	}
}

// moveAndEnd has side k write and end in the same step in which the other reads
// what it writes, and its end.
func (g *generator) moveAndEnd(k int) {
	s, o := &g.sides[k], &g.sides[1-k]
	if s.fin || o.deaf || s.flooded || o.flooded {
		return
	}
	g.awaitArrival(k)
	g.awaitArrival(1 - k)
	n := g.size(g.most())
	mine := &op{Kind: opMove, Write: n, Chunk: g.chunk(n)}
	others := &op{Kind: opMove, Read: untilEnd, Chunk: g.chunk(o.unread + n)}
	if g.chance(30) {
		others.Nap = 1 + g.IntN(20)
	}
	mine.Then = []kind{opShut, opClose, opReset}[g.IntN(3)]
	cuts := mine.Then == opReset || mine.Then == opClose && s.unread > 0
	if cuts {
		others.Loose = anyCount
	}
	g.both(k, mine, others)
	o.unread, o.sawEnd = 0, true
	s.fin = true
	s.open = mine.Then == opShut
	switch {
	case cuts:
		g.hungUp(1 - k)
	case o.fin:
		g.over()
	}
}

// race has side k end while the other writes: what the other sees of that is
// open, but that it ends.
func (g *generator) race(k int) {
	s, o := &g.sides[k], &g.sides[1-k]
	if o.fin || s.deaf || s.flooded {
		return
	}
	n := g.size(g.most())
	mine := &op{Kind: []kind{opClose, opReset}[g.IntN(2)]}
	others := &op{Kind: opMove, Write: n, Read: untilEnd, Chunk: g.chunk(max(n, 4096)), Loose: anyAll}
	g.both(k, mine, others)
	s.open, s.fin = false, true
	o.doubtful = true
	g.hungUp(1 - k)
}

// finish adds what is left to do, until both sides are closed.
func (g *generator) finish() {
	k := g.IntN(2)
	if !g.sides[k].open {
		k = 1 - k
	}
	s, o := &g.sides[k], &g.sides[1-k]
	switch {
	case g.dead:
		for n := g.IntN(5); n > 0; n-- {
			g.probe(k)
		}
		g.one(k, op{Kind: []kind{opClose, opReset}[g.IntN(2)]})
		s.open = false
	case !o.open:
		g.alone(k)
	case g.chance(40):
		g.shutOrClose(k)
	case g.chance(30):
		g.reset(k)
	default:
		g.close(k)
	}
}

// shutOrClose goes on with the end as orderly as can be.
func (g *generator) shutOrClose(k int) {
	if g.sides[k].fin {
		g.close(k)
	} else {
		g.shut(k, 1)
	}
}

// alone is the end of side k, whose other side has closed without a reset.
func (g *generator) alone(k int) {
	s := &g.sides[k]
	if g.chance(20) && !s.fin && !s.doubtful {
		g.breakOff(k)
		return
	}
	switch n := g.IntN(10); {
	case s.flooded:
		g.drain(k)
	case n < 4:
		g.one(k, op{Kind: opMove, Read: untilEnd, Chunk: g.chunk(s.unread)})
		s.unread, s.sawEnd, s.arrived = 0, true, true
		if !s.fin {
			g.shut(k, 1)
		} else {
			g.over()
		}
	case n < 7:
		g.inspect(k)
	case n < 8 && !s.fin:
		g.shut(k, 1)
	case n < 9:
		g.close(k)
	default:
		g.reset(k)
	}
}

// breakOff has side k write to one that has closed, or is deaf, which is answered
// by a reset.
func (g *generator) breakOff(k int) {
	s := &g.sides[k]
	g.awaitArrival(k)
	if s.flooded {
		// How much of it, and whether the FIN, was before the reset.
		s.doubtful = true
	}
	n := 1 + g.IntN(1000)
	// Not one send: that there is room again may be known a little later.
	g.one(k, op{Kind: opMove, Write: n, Chunk: n})
	g.hungUp(k)
	g.hungUp(1 - k)
}

// probe asks a dead connection one thing.
func (g *generator) probe(k int) {
	s := &g.sides[k]
	o := op{Kind: []kind{opSend, opSend, opRecv, opRecv, opMove, opError, opLook, opShut, opPeek}[g.IntN(9)]}
	switch o.Kind {
	case opSend:
		o.Write = g.IntN(3) * g.size(2000)
	case opRecv, opPeek:
		o.Read = g.IntN(s.unread + 1000)
	case opMove:
		o.Read, o.Chunk = untilEnd, g.chunk(s.unread)
		if s.flooded {
			o.Chunk = 64 << 10
		}
	case opShut:
		o.How = g.IntN(3)
	}
	if s.flooded {
		if o.Kind == opRecv || o.Kind == opPeek {
			o = op{Kind: opMove, Read: untilEnd, Chunk: 64 << 10}
		}
		o.Loose = anyCount
	}
	if s.doubtful {
		o.Loose = anyAll
	}
	switch o.Kind {
	case opRecv:
		s.unread -= min(o.Read, s.unread)
	case opMove:
		s.unread, s.flooded = 0, false
	}
	g.one(k, o)
}
