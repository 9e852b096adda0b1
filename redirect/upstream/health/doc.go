// Package health decides when an endpoint is left out of picks. It is passive:
// it watches the dials that connections make anyway and sends nothing of its
// own.
//
// An endpoint that fails [Config.Failures] dials in a row is ejected. When its
// wait is over it returns on trial: one dial goes through, and unless that one
// connects the endpoint waits again, twice as long. A group in which too few
// endpoints are left ignores its ejections, because the cause is then more
// likely on this side than on all of theirs.
package health
