// Package webhook is a mutating admission webhook of Kubernetes: it puts Pillion
// beside pods as they are created, as package inject does in manifests.
package webhook
