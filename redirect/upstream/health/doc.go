// Package health decides when an endpoint is left out of picks. It is passive:
// it watches the dials that connections make anyway and sends nothing of its
// own.
//
// An endpoint that fails [Config.Failures] dials in a row is ejected. When its
// wait is over it returns on trial: one dial goes through, and unless that one
// connects the endpoint waits again, twice as long. A group in which too few
// endpoints are left ignores its ejections, because the cause is then more
// likely on this side than on all of theirs.
//
// What an active check has found is told by [Ejector.SetDown], and holds always: an
// endpoint that is down is not picked, whatever became of the others, and when all
// are down there is none. Envoy's panic ignores its active checks too; here it does
// not, as in HAProxy, since a check was asked for, has thresholds of its own, and
// knows more than a connection that failed: of three endpoints with two down, two
// thirds of the connections would fail. The panic threshold is a share of the
// endpoints that are not down.
package health
