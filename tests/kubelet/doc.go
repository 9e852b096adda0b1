// Package kubelet runs the manifests of deploy/ as a kubelet and containerd run
// them: static pods, without an API server.
package kubelet
