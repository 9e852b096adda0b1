// Package containers runs the container image in real pods: containerd and runc
// over CRI, as a kubelet would, and podman. `make test-containers` builds the image;
// without it the package is skipped.
package containers
