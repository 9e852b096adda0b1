package bpf

import (
	"encoding/binary"
	"net/netip"
	"unsafe"
)

// The contract of include/abi.h, in Go. Ports are in host byte order, times are
// CLOCK_MONOTONIC in nanoseconds, addresses are [IPAddr].
type (
	Instance    = abiInstance
	Settings    = abiSettings
	State       = abiState
	Beat        = abiBeat
	LiveKey     = abiLiveKey
	Live        = abiLive
	Decision    = abiDecision
	Sent        = abiSent
	Slot        = abiSlot
	Usage       = abiUsage
	Service     = abiService
	EndpointKey = abiEndpointKey
	RuleKey     = abiRuleKey
	PrefixKey   = abiPrefixKey
	Route       = abiRoute
	ConnEvent   = abiConnEvent
	Held        = abiHeld
	// A set is an array of [SetRow], each of which is one of the next five.
	SetRow      = abiSetRow
	SetTiers    = abiSetTiers
	SetConfig   = abiSetConfig
	SetState    = abiSetState
	SetEndpoint = abiSetEndpoint
	SetTable    = abiSetTable
	// Endpoint is the state of an endpoint, EndpointName says whose
	// it is.
	Endpoint     = abiEndpoint
	EndpointName = abiEndpointName
	// DryRun is the question to pl_explain and its answer.
	DryRun = abiDryRun
	// Move is the question to the programs of move.bpf.c.
	Move = abiMove
	// SetQuery is the question to pl_rows.
	SetQuery = abiSetQuery
	// IPAddr is 16 bytes in network byte order, IPv4 as ::ffff:a.b.c.d.
	IPAddr = abiIpAddr
)

// Values of enum slot_state.
const (
	SlotFree     = uint32(abiSlotStateSLOT_FREE)
	SlotNamed    = uint32(abiSlotStateSLOT_NAMED)
	SlotReserved = uint32(abiSlotStateSLOT_RESERVED)
	SlotRetiring = uint32(abiSlotStateSLOT_RETIRING)
)

// Values of enum route_kind.
const (
	RouteNone    = uint32(abiRouteKindROUTE_NONE)
	RouteUnicast = uint32(abiRouteKindROUTE_UNICAST)
)

// The values of enum conn_path that a default or a service may have.
const (
	PathPass   = uint32(abiConnPathPATH_PASS)
	PathDirect = uint32(abiConnPathPATH_DIRECT)
	PathRelay  = uint32(abiConnPathPATH_RELAY)
)

// Values of enum on_failure.
const (
	OnFailureOpen   = uint32(abiOnFailureON_FAILURE_OPEN)
	OnFailureClosed = uint32(abiOnFailureON_FAILURE_CLOSED)
)

// Values of enum hold.
const (
	HoldNo   = uint8(abiHoldHOLD_NO)
	HoldYes  = uint8(abiHoldHOLD_YES)
	HoldOver = uint8(abiHoldHOLD_OVER)
)

// Values of enum held_kind.
const (
	HeldAnswer = uint8(abiHeldKindHELD_ANSWER)
	HeldGone   = uint8(abiHeldKindHELD_GONE)
)

// Values of enum event_kind.
const (
	EventEnd    = uint8(abiEventKindEVENT_END)
	EventDenied = uint8(abiEventKindEVENT_DENIED)
)

// Values of enum instance_kind.
const (
	InstanceRun  = uint32(abiInstanceKindINSTANCE_RUN)
	InstanceExec = uint32(abiInstanceKindINSTANCE_EXEC)
	InstanceInit = uint32(abiInstanceKindINSTANCE_INIT)
)

// Values of enum policy.
const (
	PolicyLeastConnections = uint8(abiPolicyPOLICY_LEAST_CONNECTIONS)
	PolicyRoundRobin       = uint8(abiPolicyPOLICY_ROUND_ROBIN)
	PolicyRandom           = uint8(abiPolicyPOLICY_RANDOM)
	PolicyMaglev           = uint8(abiPolicyPOLICY_MAGLEV)
)

// Values of enum hash_on.
const (
	HashSource      = uint8(abiHashOnHASH_SOURCE)
	HashDestination = uint8(abiHashOnHASH_DESTINATION)
)

// Values of enum ending.
const (
	EndingClosed      = uint8(abiEndingENDING_CLOSED)
	EndingReset       = uint8(abiEndingENDING_RESET)
	EndingRefused     = uint8(abiEndingENDING_REFUSED)
	EndingTimeout     = uint8(abiEndingENDING_TIMEOUT)
	EndingUnreachable = uint8(abiEndingENDING_UNREACHABLE)
	EndingAbandoned   = uint8(abiEndingENDING_ABANDONED)
)

// Values of enum tally: what the conservation law is made of.
const (
	TallyConnects   = uint32(abiTallyTALLY_CONNECTS)
	TallyDecided    = uint32(abiTallyTALLY_DECIDED)
	TallyDenied     = uint32(abiTallyTALLY_DENIED)
	TallyUnsent     = uint32(abiTallyTALLY_UNSENT)
	TallyEscaped    = uint32(abiTallyTALLY_ESCAPED)
	TallySentPass   = uint32(abiTallyTALLY_SENT_PASS)
	TallySentDirect = uint32(abiTallyTALLY_SENT_DIRECT)
	TallySentRelay  = uint32(abiTallyTALLY_SENT_RELAY)
	TallyEventsLost = uint32(abiTallyTALLY_EVENTS_LOST)
	TallyStored     = uint32(abiTallyTALLY_STORED)
	TallyCount      = uint32(abiTallyTALLY__COUNT)
)

// Constants of include/abi.h; a test reads the header and compares them.
const (
	ABI          = 10
	Slots        = 65536
	SlotFirst    = 1
	SlotLast     = 0xffef
	SlotListener = 0xfffd
	SlotCanary   = 0xfffe
	WorkersMax   = 32
	// OwnerDied is what the kernel makes of State.Owner.
	OwnerDied = 0x40000000
	// What is moved from another layout, of what hooks write to.
	MovesSockets = 1
	MovesLive    = 2
	MovesSlots   = 4
	MovesCounts  = 8
	// MovesBack: hooks of the other layout may have gone on with what was ours.
	MovesBack = 16
	// MovesCells: they have cells.
	MovesCells = 32
	// Cells is how many connections may have one, CellLeft marks in Decision.Owner one
	// that others may take.
	Cells    = 16384
	CellLeft = 1 << 63
	// Sets is how many services may have endpoint sets, Endpoints how many
	// endpoints there may be of all, SetEndpoints how many of one.
	Sets         = 16384
	Endpoints    = 131072
	SetEndpoints = 16384
	// SetHead is how many rows stand before the endpoints of a set, SetTableRow
	// how many table entries one row has, SetTableMax how many a table may have.
	SetHead     = 3
	SetTableRow = 8
	SetTableMax = 131072
	// CanaryListener is where the listener of the canary slot is in the map
	// listeners: of IPv4, and one further of IPv6.
	CanaryListener = 64
	// FrameMax is how many bytes of headers a [Held] has room for.
	FrameMax = 120
	// RulePortBits is how many bits of a [RuleKey] stand before the address.
	RulePortBits = 32
)

// FromAddr converts an address; IPv4 becomes ::ffff:a.b.c.d. An invalid one is
// all zero.
func FromAddr(a netip.Addr) IPAddr {
	var ip IPAddr
	if a.IsValid() {
		b := a.As16()
		for i := range ip.W {
			ip.W[i] = binary.NativeEndian.Uint32(b[4*i:])
		}
	}
	return ip
}

// ClassOf gives the bit of map not_own that stands for an address's class, as class_of in
// include/hash.h does.
func ClassOf(a IPAddr) uint64 {
	return 1 << ((a.W[0] ^ a.W[1] ^ a.W[2] ^ a.W[3]) * golden >> 26)
}

// golden is GOLDEN in include/hash.h: 2^32 by the golden ratio.
const golden uint32 = 0x9e3779b9

// ToAddr converts back, unmapped. All zero gives an invalid address.
func ToAddr(ip IPAddr) netip.Addr {
	if ip.W == [4]uint32{} {
		return netip.Addr{}
	}
	var b [16]byte
	for i, w := range ip.W {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}

// ParseEvent reads one record of the ring buffer. ok is false when it has
// another size than this build's [ConnEvent].
func ParseEvent(raw []byte) (e ConnEvent, ok bool) {
	if len(raw) != int(unsafe.Sizeof(e)) {
		return e, false
	}
	return *(*ConnEvent)(unsafe.Pointer(&raw[0])), true
}
