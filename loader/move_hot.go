package loader

import (
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/cilium/ebpf/asm"
	"github.com/pillion-project/pillion/bpf"
)

// This file moves what hooks write to all the time, while hooks of both layouts are at
// work for a moment.
//
//   - live and departed: an entry is in one place. New hooks that find none in the new
//     map read and write the former one where it is (bpf/include/former.h), and what
//     sockops enters is in the new one alone: lookup and hold, which read it, are
//     swapped before. When no old hook is left, pl_move_live moves each entry.
//   - slots: the same, but that only connect writes them, which is swapped last; what it
//     has named by then is copied in the end.
//   - state, endpoints, usage_by_group are counts: what the old ones have grown by is
//     added, again and again, and the last time when no old hook is left. Meanwhile a
//     count may be below zero, which hooks take for none. See catchUp.

// hotFields are what both layouts must have of these maps, with these sizes: what hooks
// use where it is.
var hotFields = map[string]map[string]uint32{
	"live":     {"cookie": 8, "hold": 1, "worker": 1, "canary": 1, "orig.w": 16, "seen.w": 16},
	"departed": {"cookie": 8},
	"slots":    {"state": 4, "orig.w": 16},
	"state":    {"next_slot": 4, "live": 4, "owner": 4},
}

// checkHot fails with [ErrABI] when hooks could not use what they find in another layout.
func (m *move) checkHot() error {
	for _, name := range m.moved {
		from, to := m.from.Maps[name], m.to.Maps[name]
		for field, size := range hotFields[name] {
			for _, l := range []*mapLayout{&from, &to} {
				if f, ok := find(l.Value, field); !ok || f.Size != size {
					return fmt.Errorf("%w: map %s has no field %s of %d bytes", ErrABI, name, field, size)
				}
			}
		}
		same := from.KeySize == to.KeySize && slices.Equal(from.Key, to.Key)
		switch manners[name] {
		case mannerLive:
			theirs := m.from.Maps["live"]
			same = same && from.ValueSize == theirs.ValueSize && slices.Equal(from.Value, theirs.Value)
		case mannerSlots:
			same = same && from.MaxEntries == to.MaxEntries // an address says which
		case mannerSums:
			same = same && from.Flags == to.Flags // mapped into memory, or not
		default:
			continue
		}
		if !same {
			return fmt.Errorf("%w: map %s differs from ABI %d to %d in more than its fields, and cannot be moved while hooks use it",
				ErrABI, name, m.from.ABI, m.to.ABI)
		}
	}
	return nil
}

// bits are what the hooks are told: PL_MOVES_*.
func (m *move) bits() (bits uint32) {
	for name, bit := range map[string]uint32{
		"decisions": bpf.MovesSockets, "cells": bpf.MovesCells, "live": bpf.MovesLive, "slots": bpf.MovesSlots,
		"state": bpf.MovesCounts, "endpoints": bpf.MovesCounts, "usage_by_group": bpf.MovesCounts,
	} {
		if m.has(name) {
			bits |= bit
		}
	}
	if m != nil && m.again == goesBack {
		bits |= bpf.MovesBack
	}
	return bits
}

// bodies are the functions of the hooks that know two layouts.
func (m *move) bodies() map[string]asm.Instructions {
	all := map[string]asm.Instructions{}
	if c, ok := m.carrier(); ok {
		all["carry"], all["wipe"] = c.carry(), c.wipe()
		if m.hasCells() {
			all["former_owner"] = fieldAt(c.from, "owner")
		}
		if m.again == goesBack {
			all["carry"] = c.carryBack()
		}
	}
	if m.has("live") {
		c := m.between("live")
		all["carry_live"] = append(c.fill(), asm.Mov.Imm(result, 0), asm.Return())
		for function, field := range map[string]string{
			"former_cookie": "cookie", "former_hold": "hold", "former_worker": "worker",
			"former_canary": "canary", "former_orig": "orig.w", "former_seen": "seen.w",
		} {
			all[function] = fieldAt(c.from, field)
		}
	}
	if m.has("slots") {
		c := m.between("slots")
		all["former_slot_state"], all["former_slot_orig"] = fieldAt(c.from, "state"), fieldAt(c.from, "orig.w")
	}
	return all
}

// endHot has the new maps hold all that hooks write to, when all of them are this build's.
func (d *Datapath) endHot(m *move) error {
	if err := d.catchUp(m); err != nil {
		return err
	}
	if m.has("slots") {
		if err := d.copySlots(m); err != nil {
			return fmt.Errorf("move map slots: %w", err)
		}
	}
	if m.has("live") {
		if _, err := d.moveLive(m, 0); err != nil {
			return fmt.Errorf("move map live: %w", err)
		}
		if err := m.copyDeparted(d.maps.Departed); err != nil {
			return fmt.Errorf("move map departed: %w", err)
		}
	}
	// Unless ours is at work: see beginSums.
	if m.has("state") && d.state.nextSlot().Load() == slotsEnd {
		d.state.nextSlot().Store(atomic.LoadUint32(m.word("next_slot")))
	}
	return m.sums.end()
}

// clearHot leaves nothing in the layout before: the hooks look there still, and what has
// ended must not be found. Those that have found something there have read and written
// it by then.
func (d *Datapath) clearHot(m *move) error {
	if !m.has("slots") && !m.has("live") {
		return nil
	}
	waitForHooks()
	if m.has("slots") {
		if err := m.clearSlots(); err != nil {
			return fmt.Errorf("move map slots: %w", err)
		}
	}
	if !m.has("live") {
		return nil
	}
	left, err := d.moveLive(m, 1)
	if err == nil && left > 0 {
		// Its hooks go on with these; the next process would not know them.
		d.options.Log.Warn("no room for all open connections in another layout of maps", "left", left)
	}
	if err == nil {
		// Who found an entry in the former live left one in the former departed.
		err = m.copyDeparted(d.maps.Departed)
	}
	if err == nil {
		err = m.clearDeparted()
	}
	if err != nil {
		return fmt.Errorf("move map live: %w", err)
	}
	return nil
}
