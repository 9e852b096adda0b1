// Package kubernetes tests what reads the Kubernetes API against a real
// kube-apiserver and etcd, which `make test-kubernetes` builds. Without them the
// package is skipped.
package kubernetes
