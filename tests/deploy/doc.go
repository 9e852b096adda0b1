// Package deploy tests the manifests and units below deploy/: that they are what
// Kubernetes, podman and systemd take, ask for no more than is needed, and do not
// drift apart.
package deploy
