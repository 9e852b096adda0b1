package upstream

// Removal is an endpoint that is no longer in its cluster, or whose cluster is
// gone.
type Removal struct {
	Cluster string
	// Endpoint is that of the old snapshot: its Live still counts down.
	Endpoint *Endpoint
}

// Removed returns the endpoints of old that are not in new, by cluster and address,
// in the order of old. Either may be nil. What becomes of their connections is the
// caller's choice; an endpoint that comes back later is a new one.
func Removed(old, new *Snapshot) []Removal {
	var gone []Removal
	stay := make(map[*record]bool)
	for _, after := range new.Clusters() {
		if old.Cluster(after.Name) == after {
			continue
		}
		for _, e := range after.Endpoints {
			stay[e.record] = true
		}
	}
	for _, before := range old.Clusters() {
		if new.Cluster(before.Name) == before {
			continue
		}
		for _, e := range before.Endpoints {
			if !stay[e.record] {
				gone = append(gone, Removal{Cluster: before.Name, Endpoint: e})
			}
		}
	}
	return gone
}
