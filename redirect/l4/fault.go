package l4

// Where a worker can be killed that has a registry: what is open then is to go on as
// if nothing had been. A build with the tag pillion_fault does so (fault_on.go).
const (
	faultAccepted = iota // a socket that nothing tells of
	faultRegistered
	faultRead  // bytes are in the worker's buffer,
	faultSaved // and in a chunk that nothing tells of
	faultForgot
	faultSocket // an upstream socket that nothing tells of
	faultConnecting
	faultConnected
	faultSent // the first bytes are out, and nothing says so
	faultEstablished
	faultWritten
	faultPipe   // one that nothing tells of
	faultFilled // a pipe
	faultEmptied
	faultReturned
	faultEOF
	faultShutting
	faultShut
	faultRefused // a dial failed, and nothing says so
	faultDropped // its socket is forgotten, and open
	faultEnding
	faultAborting
	faultClosing // forgotten, and open
	faultClosed
	faultEnded
	faultArrived  // a handshake's child is accepted
	faultReleased // its answer is given
	faultUrgent   // an urgent byte is passed on, and there still; then not any more
	faultGiving   // another process is told something about taking over
	faultKept     // a connection that another process has still is written down,
	faultHas      // and so are all, which nobody was told
	faultSaid     // it was told that they are here
	faultCharged  // they are this process's
	faultTookUp   // and one is at a worker
	faultPoints
)
