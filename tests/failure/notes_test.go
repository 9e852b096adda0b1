package failure

// notes are what the tables cannot say.
const notes = `- *Handler killed*: connections that the handler carried are reset, one that it had only just accepted with them. *direct* and
  *pass* do not know of it. With ` + "`survive: crash`" + ` new ones wait for the next handler, a moment (docs/upgrade.md).
- *Handler stopped*: connections that begin before it is noticed are with a handler that does nothing, and wait for it, or for
  the application's own patience.
- *Slot route deleted*: what an application says in that moment (some 20 ms) takes another way. What TCP repeats arrives later; of a
  reset, which it does not repeat, the handler hears when it next sends something there, or asks, within some ten seconds.
- *Slots full*: only addresses that had none yet need a slot; services have theirs reserved.
- *Events ring full*, *disk full*: records are lost, counted in ` + "`pillion_records_lost_total`" + `, and status says so. No connection is.
- *Pins deleted*, *bpffs unmounted*: what is attached stays attached as long as the process lives. After it was pinned again the
  process is killed in the test: ` + "`on_failure`" + ` decides, and the next one takes over what there was. Killed within the second before
  that, all of it would end with the process, and connections would go to where they were going, whatever ` + "`on_failure`" + ` says. Where the
  process may not mount, status says so, and an operator has to.
- *Connect hooks detached*: until they are attached again nobody captures, and every connection goes to where it was going. That
  takes CAP_NET_ADMIN and the pins, which are Pillion's user's alone.
- *Cgroup removed and made again*: until Pillion attaches to the new one, some milliseconds, nobody captures there. Open connections
  of an application that was moved out before are unaffected. Where the handler is killed first, nobody captures in the new one until
  the next handler is there, and ` + "`closed`" + ` cannot hold: the programs are attached to a cgroup, and it is gone. Programs at its
  parent would stay, but all that they see of a cgroup without CAP_PERFMON is its id, and the id of the new one nobody has told them:
  it could be a stranger's, whom they must not refuse. What holds is a cgroup that stays while what is in it comes and goes: the slice
  of the systemd drop-in (tests/systemd does this to it), or a pod's, which is made anew only with its init container; or a process that
  stays, which ` + "`survive: crash`" + ` has.
- *Second instance, other name*: both are attached, and the older one decides first. Here the younger one knows no service: what the
  older one lets go to an endpoint (*direct*) or to where it was going (*pass*) is for it a connection that no service names,
  which it relays, or refuses while it drains if it is *closed*. Under its own name (` + "`pillion run`" + ` makes one of the scope) it is refused.
- *Clock jumps*: the kernel's programs read CLOCK_MONOTONIC alone, and the process goes by it too; the wall clock is for showing.
`
